"""Options that are words or levels, public names, and how results print: the same everywhere."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any, get_args, get_type_hints

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax import options
from lmmax.inference.confint import transformed_limits

LONG = "a_name_of_a_measurement_that_is_longer_than_most_lines_have_room_for_it_and_<b>more</b>"


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    g = np.repeat(np.arange(12), 6)
    x = rng.normal(size=72)
    b = rng.normal(size=(12, 2)) @ np.array([[1.0, 0.3], [0.0, 0.5]])
    y = 1 + x + b[g, 0] + b[g, 1] * x + rng.normal(size=72)
    between = rng.normal(size=12)[g]
    f = np.where(rng.random(72) < 0.5, "u", "v")
    return pd.DataFrame({"y": y, "x": x, "g": g, "between": between, "f": f})


@pytest.fixture(scope="module")
def fit(data: pd.DataFrame) -> lmmax.Fit:
    return lmmax.fit("y ~ x + (1 + x | g)", data)


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "method"),
    [
        ("Kenward-Roger", "kenward-roger"),
        ("KR", "kenward-roger"),
        ("kenward_roger", "kenward-roger"),
        ("kenward roger", "kenward-roger"),
        ("satt", "satterthwaite"),
        ("SATTERTHWAITE", "satterthwaite"),
        ("between_within", "between-within"),
        ("BW", "between-within"),
        ("Residual", "residual"),
        ("z", "normal"),
        (None, "satterthwaite"),
    ],
)
def test_methods_in_any_spelling(fit: lmmax.Fit, word: Any, method: Any) -> None:
    pd.testing.assert_frame_equal(fit.coefficients(word), fit.coefficients(method))
    assert fit.denominator(word) is fit.denominator(method)
    assert fit.summary(ddf=word).notes == fit.summary(ddf=method).notes


WRONG: dict[str, tuple[Callable[[lmmax.Fit, pd.DataFrame], Any], str]] = {
    "ddf": (lambda fit, _: fit.coefficients("satterwaite"), "satterthwaite"),
    "solver": (lambda _, data: lmmax.fit("y ~ x + (1 | g)", data, solver="newtn"), "newton"),
    "engine": (lambda _, data: lmmax.fit("y ~ x + (1 | g)", data, engine="grupped"), "grouped"),
    "missing": (lambda _, data: lmmax.fit("y ~ x + (1 | g)", data, missing="rais"), "raise"),
    "method": (lambda fit, _: lmmax.confint(fit, method="profil"), "profile"),
    "kind": (lambda fit, _: lmmax.information(fit, "observd"), "observed"),
    "type": (lambda fit, _: lmmax.robust(fit, type="CR22"), "CR2"),
    "new_levels": (lambda fit, _: fit.predict(new_levels="populaton"), "population"),
    "random_effects": (lambda fit, _: lmmax.simulate(fit, random_effects="conditonal"), "condit"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words_list_the_choices_and_the_nearest(
    fit: lmmax.Fit, data: pd.DataFrame, name: str
) -> None:
    call, near = WRONG[name]
    with pytest.raises(ValueError, match=rf"{name}='.*' is unknown; use .*Did you.*{near}"):
        call(fit, data)


def test_words_in_any_spelling(fit: lmmax.Fit, data: pd.DataFrame) -> None:
    other = lmmax.fit(
        "y ~ x + (1 + x | g)", data, engine="Grouped", solver="Newton", missing="Drop"
    )
    assert other.settings == fit.settings.__class__(engine="grouped", solver="newton")
    assert lmmax.robust(fit, type="cr2").type == "CR2"
    assert lmmax.anova(fit, type="iii").heading == lmmax.anova(fit).heading
    lmmax.confint(fit, "fixed", method="Wald")


def test_types_name_the_choices() -> None:
    hints = get_type_hints(lmmax.fit)
    assert get_args(hints["engine"]) == get_args(options.EngineName)
    assert get_args(hints["solver"]) == get_args(options.Solver)
    assert get_args(hints["missing"]) == get_args(options.Missing)


# --- levels ---------------------------------------------------------------------------------------


INTERVALS: dict[str, Callable[..., pd.DataFrame]] = {
    "conf_int": lambda fit, *a, **k: fit.conf_int(*a, **k),
    "coefficients": lambda fit, *a, **k: fit.coefficients(None, *a, **k)[["lower", "upper"]],
    "t_test": lambda fit, *a, **k: fit.t_test("x = 0", *a, **k).table[["lower", "upper"]],
    "summary": lambda fit, *a, **k: fit.summary(*a, **k).tables[2][["lower", "upper"]],
    "robust": lambda fit, *a, **k: lmmax.robust(fit).conf_int(*a, **k),
    "robust t_test": lambda fit, *a, **k: lmmax.robust(fit).t_test("x", *a, **k).table,
    "confint": lambda fit, *a, **k: lmmax.confint(fit, None, "wald", *a, **k),
}


@pytest.mark.parametrize("name", INTERVALS)
def test_levels(fit: lmmax.Fit, name: str) -> None:
    """A level is never taken for its complement, and cannot be given twice."""
    limits = INTERVALS[name]
    usual = limits(fit)
    for same in (limits(fit, 0.95), limits(fit, 0.05), limits(fit, alpha=0.05)):
        np.testing.assert_allclose(same.to_numpy(float), usual.to_numpy(float), rtol=1e-12)
    wide, narrow = limits(fit, level=0.99), limits(fit, level=0.5)
    assert ((wide["upper"] - wide["lower"]) > (usual["upper"] - usual["lower"])).all()
    assert ((narrow["upper"] - narrow["lower"]) < (usual["upper"] - usual["lower"])).all()
    with pytest.raises(TypeError, match="say the same"):
        limits(fit, 0.95, alpha=0.05)
    for wrong in (95, 0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"level=.*must lie between 0 and 1"):
            limits(fit, wrong)
    with pytest.raises(TypeError, match="must be a number"):
        limits(fit, "high")


def test_one_vocabulary(fit: lmmax.Fit) -> None:
    names = ["coef", "std err", "df", "t", "p", "lower", "upper"]
    assert list(fit.coefficients()) == list(fit.t_test("x").table) == names
    assert list(lmmax.robust(fit).coefficients()) == names
    assert list(fit.predict_mean()) == ["predicted", "std err", "df", "lower", "upper"]
    assert list(fit.coefficients("normal")) == ["coef", "std err", "z", "p", "lower", "upper"]


# --- Wald limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(-1.0, 1.0), (-0.25, 1.0), (0.0, np.inf), (-np.inf, 2.0)])
@pytest.mark.parametrize("error", [1e-3, 0.1, 10.0])
def test_transformed_limits_stay_inside(ends: tuple[float, float], error: float) -> None:
    low, high = max(ends[0], -3.0), min(ends[1], 3.0)
    for estimate in np.linspace(low, high, 9)[1:-1]:
        lower, upper = transformed_limits(estimate, error, 1.96, ends)
        assert ends[0] <= lower < estimate < upper <= ends[1]
        if error < 0.01:  # the delta method: alike where errors are small
            assert (upper - lower) / (2 * 1.96 * error) == pytest.approx(1.0, abs=2e-3)
    for end in ends:
        assert np.isnan(transformed_limits(end, error, 1.96, ends)).all()


def test_no_wald_limits_at_the_boundary() -> None:
    rng = np.random.default_rng(3)
    data = pd.DataFrame({"g": np.repeat(np.arange(8), 5), "y": rng.normal(size=40)})
    data["y"] -= data.groupby("g")["y"].transform("mean")
    limits = lmmax.confint(lmmax.fit("y ~ 1 + (1 | g)", data), method="wald")
    assert limits.loc["g: sd(Intercept)"].isna().all()
    assert limits.loc["sigma"].notna().all()
    (note,) = limits.attrs["notes"]
    assert "g: sd(Intercept)" in note and "boundary" in note


# --- names ----------------------------------------------------------------------------------------


def test_public_names() -> None:
    assert dir(lmmax) == sorted(lmmax.__all__)
    machinery = {"solve", "frames", "encoding", "inference", "batch", "Any", "import_module"}
    assert not machinery & set(dir(lmmax))
    namespace: dict[str, Any] = {}
    exec("from lmmax import *", namespace)
    assert set(lmmax.__all__) <= set(namespace)
    code = (
        "import sys, lmmax; dir(lmmax); "
        "late = ('lmmax.batch', 'lmmax.inference.profile'); "
        "sys.exit(any(m.startswith(late) for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- printing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(data: pd.DataFrame) -> dict[str, Any]:
    named = data.rename(columns={"x": LONG})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = lmmax.fit(f"y ~ `{LONG}` + (1 + `{LONG}` | g)", named)
        small = lmmax.fit("y ~ 1 + (1 | g)", named)
    nested = lmmax.fit("strength ~ 1 + (1 | batch/cask)", lmmax.datasets.load("pastes"))
    return {
        "summary": fit.summary(),
        "t_test": fit.t_test(f"`{LONG}` = 0"),
        "f_test": fit.f_test(f"`{LONG}` = 0"),
        "robust": lmmax.robust(fit),
        "anova": lmmax.anova(fit),
        "drop1": lmmax.drop1(fit),
        "ranova": lmmax.ranova(fit),
        "convergence": fit.convergence,
        "conditional_aic": lmmax.conditional_aic(fit),
        "bootstrap_test": lmmax.bootstrap_test(small, fit, n=9),
        "plan": lmmax.plan("y ~ x + (1 | g)", data, data[["y"]]),
        "random_effects": nested.random_effects,
    }


NAMES = (
    *("summary", "t_test", "f_test", "robust", "anova", "drop1", "ranova", "convergence"),
    *("conditional_aic", "bootstrap_test", "plan", "random_effects"),
)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        if tag not in ("br",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", NAMES)
def test_results_print(shown: dict[str, Any], name: str) -> None:
    result = shown[name]
    text = str(result)
    for line in text.splitlines():
        assert len(line) <= 80 or LONG[:20] in line, line
    assert "..." not in text and "array(" not in text and "np.float64" not in repr(result)
    assert "Test(" not in repr(result) and "Plan(" not in repr(result)
    page = result._repr_html_()
    tags = _Tags()
    tags.feed(page)
    assert not tags.open and "b" not in tags.seen
    if "<th" in page and name != "random_effects":  # stronger than JupyterLab's rule
        assert ".lmmax-summary.lmmax-summary tbody th { text-align: left;" in page


def test_frames_print_every_column(fit: lmmax.Fit) -> None:
    for frame in (fit.coefficients(), fit.varcorr(), fit.predict_mean()):
        head = repr(frame).splitlines()
        assert not any("..." in line.split()[:-1] for line in head[:1])
        assert all(name in repr(frame) for name in frame)
        assert type(frame.round(3)["std err"] if "std err" in frame else frame["vcov"]) is pd.Series
    again = pickle.loads(pickle.dumps(fit.coefficients()))
    pd.testing.assert_frame_equal(again, fit.coefficients())


# --- messages -------------------------------------------------------------------------------------


def test_unseen_groups_are_named(fit: lmmax.Fit) -> None:
    with pytest.raises(lmmax.DataError, match=r"the first '99' in row 1; pass new_levels"):
        fit.predict({"x": [0.0, 1.0], "g": [3, np.int64(99)]})
    nested = lmmax.fit("strength ~ 1 + (1 | batch/cask)", lmmax.datasets.load("pastes"))
    with pytest.raises(lmmax.DataError, match=r"'batch:cask' that were not.* first 'A:q' in row 0"):
        nested.predict({"batch": "A", "cask": "q"})


def test_single_values_stand_for_every_row(fit: lmmax.Fit) -> None:
    whole = fit.predict({"x": [0.0, 1.0, 2.0], "g": [3, 3, 3]})
    pd.testing.assert_series_equal(fit.predict({"x": [0.0, 1.0, 2.0], "g": 3}), whole)
    one = fit.predict({"x": 1.0, "g": np.array(3)})
    assert one.tolist() == [whole.iloc[1]]
    rows = pd.Series([0.0, 1.0], index=["a", "b"])
    assert fit.predict({"x": rows, "g": 3}).tolist() == whole[:2].tolist()
    with pytest.raises(lmmax.DataError, match="differ in length"):
        fit.predict({"x": [0.0, 1.0], "g": [3, 3, 3]})


@pytest.mark.parametrize(
    ("term", "warned"),
    [
        ("(between | g)", True),
        ("(between || g)", True),
        ("(1 | g) + (0 + between | g)", True),
        ("(x | g)", False),
        ("(0 + between_group | g)", False),
    ],
)
def test_slopes_that_do_not_vary_within_groups(data: pd.DataFrame, term: str, warned: bool) -> None:
    data = data.assign(between_group=(data["g"] % 2).astype(float))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lmmax.fit(f"y ~ x + {term}", data)
    found = [str(w.message) for w in caught if w.category is lmmax.IdentifiabilityWarning]
    assert bool(found) == warned and len(found) <= 1
    assert not warned or "'between' does not vary within any group of 'g'" in found[0]


def test_reference_levels(data: pd.DataFrame) -> None:
    short, long, plain = (
        lmmax.fit(f"y ~ {term} + (1 | g)", data)
        for term in ('C(f, ref="v")', 'C(f, Treatment("v"))', "f")
    )
    np.testing.assert_allclose(short.params, long.params, rtol=1e-12)
    assert short.params.iloc[1] == pytest.approx(-plain.params.iloc[1], rel=1e-9)
    new = short.predict({"f": ["v"]}, random_effects=False)
    assert new.iloc[0] == pytest.approx(short.params.iloc[0])
    with pytest.raises(lmmax.DataError, match=r"ref='w'\) names no level; the levels are 'u', 'v'"):
        lmmax.fit('y ~ C(f, ref="w") + (1 | g)', data)


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("y ~ x + (. | g)", "name the variables"),
        ("y ~ x %in% f + (1 | g)", "write `a:b`"),
        ("y ~ 1/x + (1 | g)", r"I\(1/x\)"),
        ("y ~ (x > 0) + (1 | g)", r"I\(x > 0\)"),
        ("y ~ x + (1 | g) # all", "no comments"),
        ("y ~ x + offset(x) + offset(x) + (1 | g)", "comes twice"),
        ("y ~ x.shift(1).fillna(0) + (1 | g)", r"inside `I\(...\)`"),
    ],
)
def test_notation_that_means_something_else(formula: str, message: str) -> None:
    with pytest.raises(lmmax.FormulaError, match=message):
        lmmax.parse_formula(formula)


def test_small_messages(data: pd.DataFrame) -> None:
    with pytest.warns(UserWarning, match="'f' has one level, 'u', in the rows used"):
        lmmax.fit("y ~ x + f + (1 | g)", data.assign(f="u"))
    with pytest.raises(lmmax.DataError, match="its columns have several levels"):
        lmmax.fit("y ~ x + (1 | g)", pd.concat({"A": data}, axis=1))
    with pytest.raises(TypeError, match=r"DataFrame\.from_records"):
        lmmax.fit("y ~ x + (1 | g)", data.to_records(index=False))
    spaced = lmmax.fit("y ~ poly(x, 2) + (1 | g)", data)
    assert spaced.t_test("poly(x,2)[1] = 0").table.equals(spaced.t_test("poly(x, 2)[1] = 0").table)
