"""The printed summary shows the right numbers, says what went wrong, and fits a terminal."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax import ConvergenceWarning, Fit, RankWarning
from lmmax.rendering import _format_correlation, _format_p, format_block
from lmmax.summary import summarize


@pytest.fixture(scope="module")
def dietox() -> pd.DataFrame:
    return lmmax.datasets.load("dietox")


@pytest.fixture(scope="module")
def intercepts(dietox: pd.DataFrame) -> Fit:
    return lmmax.fit("Weight ~ Time + (1 | Pig)", dietox)


@pytest.fixture(scope="module")
def slopes(dietox: pd.DataFrame) -> Fit:
    return lmmax.fit("Weight ~ Time + (1 + Time | Pig)", dietox)


@pytest.fixture(scope="module")
def singular() -> Fit:
    return lmmax.fit("Yield ~ 1 + (1 | Batch)", lmmax.datasets.load("dyestuff2"))


@pytest.fixture(scope="module")
def unfinished(dietox: pd.DataFrame) -> Fit:
    with pytest.warns(ConvergenceWarning):
        return lmmax.fit("Weight ~ Time + (1 + Time | Pig)", dietox, max_steps=1, em_steps=0)


def line(text: str, start: str) -> list[str]:
    """Return the words after ``start`` of the first line that starts with it."""
    found = next(row for row in text.splitlines() if row.startswith(start))
    return found.removeprefix(start).split()


def flat(text: str) -> str:
    return " ".join(text.split())


class Cells(HTMLParser):
    """Collect tags and text; raise at a tag that is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.append(tag)
        if tag in ("td", "th", "code", "li"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th", "code", "li"):
            self.cells[-1] += data


def test_documented_statsmodels_example(intercepts: Fit) -> None:
    text = str(intercepts.summary(ddf="normal"))
    assert text.splitlines()[0].strip() == "Linear mixed model fit by REML"
    assert "Formula: Weight ~ Time + (1 | Pig)" in text
    for entry in (
        "Dependent variable: Weight",
        "Method: REML",
        "No. observations: 861",
        "No. groups (Pig): 72",
        "Min. group size: 11",
        "Mean group size: 11.96",
        "Max. group size: 12",
        "Log-likelihood: -2404.7753",
        "REML criterion: 4809.550",
        "Scale: 11.3669",
        "Converged: yes",
        "Singular fit: no",
    ):
        assert entry in flat(text)
    # Coefficients as statsmodels documents them; the variance's standard error is lmmax's own.
    assert line(text, "Intercept") == ["15.724", "0.788", "19.952", "<0.001", "14.179", "17.268"]
    assert line(text, "Time") == ["6.943", "0.033", "207.939", "<0.001", "6.877", "7.008"]
    assert line(text, "Pig") == ["Intercept", "40.394", "6.939", "6.356"]
    assert line(text, "Residual") == ["11.367", "0.573", "3.371"]
    assert "large-sample" in text
    assert "WARNING" not in text and "Singular fit:" not in text.split("Notes:")[1]


def test_degrees_of_freedom_are_shown(intercepts: Fit) -> None:
    """Satterthwaite's and Kenward and Roger's for a random intercept, by lmerTest."""
    text = str(intercepts)
    assert line(text, "Intercept")[:4] == ["15.724", "0.788", "83.0", "19.952"]
    assert line(text, "Time")[:4] == ["6.943", "0.033", "788.0", "207.939"]
    assert "Degrees of freedom by Satterthwaite's method." in text
    assert "Kenward and Roger" in flat(str(intercepts.summary(ddf="kenward-roger")))
    for ddf in ("between-within", "residual", "kenward-roger-linear"):
        assert "egrees of freedom" in intercepts.summary(ddf=ddf).notes[-1]
    with pytest.raises(ValueError, match=r"ddf='kr3' is unknown; use one of 'satterthwaite'"):
        intercepts.summary(ddf="kr3")


def test_tables_hold_unrounded_numbers(slopes: Fit) -> None:
    header, random, fixed = slopes.summary().tables
    assert header.loc["Log-likelihood", "value"] == slopes.llf
    assert header.loc["AIC", "value"] == slopes.aic
    assert header.loc["BIC", "value"] == slopes.bic
    assert header.loc["Converged", "value"] is True
    varcorr = slopes.varcorr()
    diagonal = varcorr[varcorr["var2"].isna()]
    np.testing.assert_allclose(random["variance"], diagonal["vcov"], rtol=1e-14)
    np.testing.assert_allclose(random["std err"], diagonal["vcov_se"], rtol=1e-14)
    np.testing.assert_allclose(random["std dev"], diagonal["sdcor"], rtol=1e-14)
    correlation = varcorr.loc[varcorr["var2"].notna(), "sdcor"]
    np.testing.assert_allclose(random["corr 1"].iloc[1], correlation, rtol=1e-12)
    assert random["corr 1"].isna().tolist() == [True, False, True]
    np.testing.assert_array_equal(fixed["coef"], slopes.params)
    np.testing.assert_array_equal(fixed["std err"], slopes.bse)
    np.testing.assert_allclose(fixed["t"], slopes.tvalues)
    np.testing.assert_allclose(fixed["p"], slopes.pvalues)
    np.testing.assert_allclose(fixed[["lower", "upper"]], slopes.conf_int())


def test_maximum_likelihood_is_named(intercepts: Fit) -> None:
    text = str(intercepts.refit_ml())
    assert text.splitlines()[0].strip() == "Linear mixed model fit by maximum likelihood"
    assert "Method: ML" in flat(text) and "Deviance: 4805.86" in flat(text)
    assert "REML" not in text


@pytest.mark.parametrize(
    ("alpha", "labels"), [(0.1, ["[0.05", "0.95]"]), (0.01, ["[0.005", "0.995]"])]
)
def test_limits_follow_alpha(intercepts: Fit, alpha: float, labels: list[str]) -> None:
    summary = intercepts.summary(alpha=alpha)
    limits = summary.tables[2][["lower", "upper"]].to_numpy()
    np.testing.assert_allclose(limits, intercepts.conf_int(alpha=alpha))
    assert all(label in str(summary) and label in summary._repr_html_() for label in labels)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0])
def test_alpha_outside_its_range(intercepts: Fit, alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        summarize(intercepts, alpha)


def test_correlation_triangle() -> None:
    fit = lmmax.fit("score ~ Machine + (0 + Machine | Worker)", lmmax.datasets.load("machines"))
    text = str(fit)
    assert "Std.Dev.   Corr" in text
    assert line(text, "Worker")[:2] == ["Machine[A]", "16.641"]
    assert line(text, "          Machine[B]")[3:] == ["0.80"]
    assert line(text, "          Machine[C]")[3:] == ["0.62", "0.77"]


def test_each_term_names_its_group(dietox: pd.DataFrame) -> None:
    fit = lmmax.fit("Weight ~ Time + (1 | Pig) + (0 + Time | Pig)", dietox)
    table = fit.summary().tables[1]
    assert table.index.tolist() == ["(1 | Pig)", "(0 + Time | Pig)", "Residual"]
    assert re.findall(r"^Pig +(\w+)", str(fit), re.MULTILINE) == ["Intercept", "Time"]
    assert "Corr" not in str(fit)


def test_scaled_residuals_use_weights(dietox: pd.DataFrame) -> None:
    weights = np.random.default_rng(0).uniform(0.5, 2.0, len(dietox))
    fit = lmmax.fit("Weight ~ Time + (1 | Pig)", dietox, weights=weights)
    expected = np.sqrt(weights) * fit.resid.to_numpy() / np.sqrt(fit.scale)
    found = fit.summary().residuals
    assert found.index.tolist() == ["Min", "1Q", "Median", "3Q", "Max"]
    np.testing.assert_allclose(found, np.quantile(expected, [0, 0.25, 0.5, 0.75, 1]))
    assert f"{found['Min']:.4f}" in str(fit)
    assert "Prior weights were used" in str(fit)


def test_singular_fit_is_explained(singular: Fit) -> None:
    text = str(singular)
    assert "Singular fit: yes" in flat(text)
    assert line(text, "Batch") == ["Intercept", "0.000", "-", "0.000"]
    note = flat(text.split("Notes:")[1])
    assert (
        "(1 | Batch) lies on the boundary: the variance of Intercept is estimated as zero" in note
    )
    assert "legitimate maximum of the restricted likelihood" in note
    assert "WARNING" not in text


def test_singular_correlation_is_explained() -> None:
    fit = lmmax.fit("angle ~ recipe + temp + (0 + recipe | replicate)", lmmax.datasets.load("cake"))
    note = flat(str(fit).split("Notes:")[1])
    assert "(0 + recipe | replicate) lies on the boundary: some combination" in note


def test_missing_correlation_of_a_correlated_term() -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(12), 6)
    x = np.tile(np.arange(6.0), 12)
    noise = rng.normal(size=72)
    X = np.column_stack([np.ones(72), x])
    # Residuals orthogonal to both effects in every group: both variances are zero.
    basis = np.linalg.qr(X[:6])[0]
    noise = (noise.reshape(12, 6) @ (np.eye(6) - basis @ basis.T)).ravel()
    fit = lmmax.fit_arrays(noise, X, groups, X, z_names=["Intercept", "x"])
    assert fit.singular
    text = str(fit)
    assert line(text, "          x") == ["0.000", "-", "0.000", "-"]
    assert "the variances of Intercept, x are estimated as zero" in flat(text)


def test_not_converged_is_said_first(unfinished: Fit) -> None:
    text = str(unfinished)
    assert text.splitlines()[2].startswith("WARNING: the fit did not converge")
    assert "Converged: NO (1 step)" in flat(text)
    assert "Not converged (status max_steps)" in text.split("Notes:")[1]
    html = unfinished._repr_html_()
    assert html.index("did not converge") < html.index("<table>")
    assert "legitimate" not in text


def test_failed_fit_still_prints(intercepts: Fit) -> None:
    estimates = replace(
        intercepts.estimates,
        beta=np.full(2, np.nan),
        beta_unscaled=np.full((2, 2), np.nan),
        scale=np.nan,
        working_root=np.full((1, 1), np.nan),
        criterion=np.nan,
    )
    text = str(replace(intercepts, estimates=estimates))
    assert line(text, "Time") == ["-"] * 7
    assert "nan" not in text.lower() and "aliased" not in text
    assert "Log-likelihood: - " in flat(text)


def test_aliased_column_rows_and_offset(dietox: pd.DataFrame) -> None:
    data = dietox.assign(Twice=2.0 * dietox["Time"], known=1.0)
    data.loc[data.index[5:10], "Weight"] = np.nan
    with pytest.warns(RankWarning):
        fit = lmmax.fit("Weight ~ Time + Twice + offset(known) + (1 | Pig)", data)
    text = str(fit)
    assert line(text, "Twice") == ["aliased"] + ["-"] * 6
    notes = flat(text.split("Notes:")[1])
    assert "5 rows dropped for missing values (Weight 5)." in notes
    assert re.search(r"[Ff]ixed-effects columns dropped.*: Twice\.", notes)
    assert "The mean includes an offset." in notes


def test_fixed_parameters_are_named(dietox: pd.DataFrame) -> None:
    fit = lmmax.fit(
        "Weight ~ Time + (1 | Pig) + (0 + Time | Pig)",
        dietox,
        fix={"scale": 6.0, "cov_re": {"(1 | Pig)": [[20.0]]}},
    )
    text = str(fit)
    assert "Held fixed, so without standard errors: scale, cov_re of (1 | Pig)." in flat(text)
    assert line(text, "Pig") == ["Intercept", "20.000", "-", "4.472"]
    assert line(text, "Residual")[1] == "-"


def arrays_fit(n_columns: int, n_effects: int, **names: Any) -> Fit:
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(60), 20)
    n = len(groups)
    X = np.column_stack([np.ones(n), rng.normal(size=(n, n_columns - 1))])
    Z = np.column_stack([np.ones(n), rng.normal(size=(n, n_effects - 1))])
    effects = rng.normal(size=(60, n_effects))[groups]
    y = X @ rng.normal(size=n_columns) + np.sum(Z * effects, axis=1) + rng.normal(size=n)
    return lmmax.fit_arrays(y, X, groups, Z, **names)


def test_width_limit(
    intercepts: Fit, slopes: Fit, singular: Fit, unfinished: Fit, dietox: pd.DataFrame
) -> None:
    fits = [intercepts, slopes, singular, unfinished, arrays_fit(30, 1)]
    fits.append(
        arrays_fit(
            3,
            5,
            x_names=["Intercept", "x" * 60, "a moderately long name, twenty"],
            z_names=["Intercept", "np.log(income)", "attendance_rate", "z4", "z5"],
            group_name="school_in_district",
        )
    )
    for scale in (1e-8, 1e8):
        data = dietox.assign(Weight=scale * dietox["Weight"], Time=dietox["Time"] / scale)
        fits.append(lmmax.fit("Weight ~ Time + (1 + Time | Pig)", data))
    for fit in fits:
        lines = str(fit).splitlines()
        assert max(map(len, lines)) <= 80
        assert not any(row != row.rstrip() for row in lines)


def test_a_name_longer_than_the_page() -> None:
    long = "C(diet, levels=['a', 'b'])[T.b]:" * 4
    text = str(arrays_fit(2, 1, x_names=["Intercept", long]))
    rows = text.splitlines()
    at = next(i for i, row in enumerate(rows) if row == long)
    assert len(rows[at + 1].split()) == 7
    assert max(len(row) for row in rows if long not in row) <= 80


def test_thirty_coefficients() -> None:
    fit = arrays_fit(30, 1)
    text = str(fit)
    for name, value in fit.params.items():
        assert line(text, f"{name} ")[0] == f"{value:.3f}"


def test_many_correlations_have_their_own_block() -> None:
    fit = arrays_fit(2, 11)
    text = str(fit)
    assert "Correlations of the random effects:" in text
    block = text.split("Correlations of the random effects:")[1].split("---")[0]
    table = fit.summary().tables[1].filter(like="corr ").to_numpy()
    expected = [_format_correlation(table[i, j]) for i in range(11) for j in range(i)]
    shown = [word for row in block.splitlines() for word in re.findall(r" (-?\d\.\d+)", row)]
    assert sorted(shown) == sorted(expected)
    assert "(10)  z10" in block


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_extreme_units_stay_readable(dietox: pd.DataFrame, scale: float) -> None:
    data = dietox.assign(Weight=scale * dietox["Weight"])
    fit = lmmax.fit("Weight ~ Time + (1 | Pig)", data)
    text = str(fit)
    for words, expected in (
        (line(text, "Intercept"), (15.724, 0.788)),
        (line(text, "Time"), (6.943, 0.0334)),
    ):
        np.testing.assert_allclose(
            [float(w) for w in words[:2]], np.multiply(expected, scale), 1e-3
        )
        assert all(len(word) <= 11 for word in words)
    variance, se, sd = (float(word) for word in line(text, "Pig")[1:])
    np.testing.assert_allclose(
        [variance, se, sd], [40.394 * scale**2, 6.939 * scale**2, 6.356 * scale], 1e-3
    )


def test_common_decimals_or_row_by_row() -> None:
    def cells(rows: list[list[float]]) -> list[list[str]]:
        values = np.array(rows)
        return format_block(values, values[:, 1:])

    assert cells([[15.72352, 0.78805], [6.94251, 0.03339]]) == [
        ["15.724", "0.788"],
        ["6.943", "0.033"],
    ]
    assert cells([[6.94251, 0.00339]]) == [["6.9425", "0.0034"]]
    assert cells([[251405.1, 6824.6]]) == [["251405.1", "6824.6"]]
    assert cells([[15.72352, 0.78805], [1e-11, 2e-10]]) == [
        ["15.724", "0.788"],
        ["1.000e-11", "2.000e-10"],
    ]
    assert cells([[0.0, np.nan]]) == [["0.000", "-"]]
    assert cells([[-1e-7, 0.5]]) == [["0.000", "0.500"]]


def test_p_values_and_correlations_do_not_overstate() -> None:
    assert [_format_p(p) for p in (0.0, 0.00049, 0.0005, 0.0496, 1.0)] == [
        "<0.001",
        "<0.001",
        "0.001",
        "0.050",
        "1.000",
    ]
    assert [_format_correlation(r) for r in (0.1, -0.996, 0.99996, 1.0, -1.0)] == [
        "0.10",
        "-0.996",
        "1.00",
        "1.00",
        "-1.00",
    ]


def test_html_holds_the_same_cells(intercepts: Fit) -> None:
    summary = intercepts.summary()
    parsed = Cells(summary._repr_html_())
    for cell in ("15.724", "6.943", "40.394", "6.939", "11.3669", "-2404.7753", "<0.001"):
        assert cell in parsed.cells
    assert set(summary.notes) <= set(parsed.cells)
    assert parsed.tags.count("table") == 4
    assert not {"script", "link", "img"} & set(parsed.tags)


def test_html_escapes_names(dietox: pd.DataFrame) -> None:
    data = dietox.rename(columns={"Time": "<b>T&T</b>"})
    fit = lmmax.fit("Weight ~ `<b>T&T</b>` + I(Start<25) + (1 | Pig)", data)
    html = fit._repr_html_()
    assert "<b>" not in html and "T&T" not in html and "Start<25" not in html
    parsed = Cells(html)
    assert all(name in parsed.cells for name in fit.params.index)
    assert any("<b>T&T</b>" in name for name in fit.params.index)
    assert fit.formula in parsed.cells


def test_print_and_repr(intercepts: Fit) -> None:
    summary = intercepts.summary()
    assert str(summary) == repr(summary) == str(intercepts)
    assert copy.deepcopy(summary).title == summary.title
    with pytest.raises(AttributeError):
        summary.title = "x"  # type: ignore[misc]
