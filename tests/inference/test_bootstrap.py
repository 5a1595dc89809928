"""Bootstrap: replicates against single fits, limits against their definitions."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtr, ndtri

import lmmax
from lmmax.batch import BatchEstimates
from lmmax.compress import Engine, EngineError
from lmmax.inference import resampling
from lmmax.inference.bootstrap import Bootstrap, BootstrapError, bootstrap
from lmmax.inference.bootstrap_comparison import bootstrap_test
from lmmax.inference.comparison import ComparisonError
from lmmax.inference.jackknife import JackknifeError, leave_out_groups
from lmmax.simulate import simulate
from tests.reference import load_data

pytestmark = pytest.mark.unoptimised

SLOPE = "Reaction ~ Days + (1 + Days | Subject)"


@pytest.fixture(scope="module")
def result(sleepstudy_slope: lmmax.Fit) -> Bootstrap:
    return bootstrap(sleepstudy_slope, 400, seed=1)


@pytest.fixture(scope="module")
def penicillin() -> lmmax.Fit:
    return lmmax.fit("diameter ~ 1 + (1 | plate) + (1 | sample)", load_data("penicillin"))


# --- replicates ---------------------------------------------------------------------------------


def test_the_default_statistic_is_all_parameters(result: Bootstrap) -> None:
    fit = result.fit
    sd = fit.varcorr()["sdcor"].tolist()
    assert result.observed.to_dict() == pytest.approx(
        {
            "Intercept": fit.params["Intercept"],
            "Days": fit.params["Days"],
            "Subject: sd(Intercept)": sd[0],
            "Subject: sd(Days)": sd[1],
            "Subject: cor(Intercept, Days)": sd[2],
            "sigma": sd[3],
        },
        rel=1e-12,
    )
    assert result.replicates.shape == (400, 6)
    assert list(result.replicates) == list(result.observed.index)


def test_spread_agrees_with_large_sample_theory(result: Bootstrap) -> None:
    """Coefficients of this balanced design are normal with the covariance of ``cov_params``."""
    fit = result.fit
    for name in ("Intercept", "Days"):
        assert abs(result.bias[name]) < 4.5 * fit.bse[name] / np.sqrt(400)
        assert abs(result.se[name] / fit.bse[name] - 1.0) < 4.5 / np.sqrt(2 * 400)
    # Within groups 144 degrees of freedom, exactly chi-squared but for singular replicates.
    assert abs(result.se["sigma"] * np.sqrt(2 * 144) / np.sqrt(fit.scale) - 1.0) < 4.5 / np.sqrt(
        800
    )


def test_replicates_do_not_depend_on_n_or_chunks(
    result: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = result.fit
    few = bootstrap(fit, 70, seed=1).replicates
    pd.testing.assert_frame_equal(few, result.replicates.iloc[:70], rtol=1e-9)
    # One replicate at a time, and blocks that are split.
    monkeypatch.setattr(resampling, "STREAM_BYTES", 1 << 14)
    again = bootstrap(fit, 70, seed=1).replicates
    pd.testing.assert_frame_equal(few, again, rtol=1e-9)
    other = bootstrap(fit, 70, seed=2).replicates
    assert not np.isclose(other, few).any(axis=1).any()


@pytest.mark.parametrize("method", ["parametric", "residual"])
def test_several_factors_one_by_one(penicillin: lmmax.Fit, method: str) -> None:
    result = bootstrap(penicillin, 20, method=method, seed=3)
    if method == "parametric":
        responses = simulate(penicillin, 20, seed=3).to_numpy().T
    else:
        responses = np.array(list(resampling.resampled(penicillin, 20, 3)))
    for j in (0, 19):
        again = penicillin.refit(responses[j])
        row = result.replicates.iloc[j]
        assert row["Intercept"] == pytest.approx(again.params["Intercept"], rel=1e-9)
        assert row["plate: sd(Intercept)"] == pytest.approx(again.varcorr()["sdcor"][0], rel=1e-6)
        assert row["sigma"] == pytest.approx(np.sqrt(again.scale), rel=1e-6)


def test_residual_replicates_are_fits_to_resampled_rows(sleepstudy_slope: lmmax.Fit) -> None:
    result = bootstrap(sleepstudy_slope, 30, method="residual", seed=4)
    rows = list(resampling.resampled(sleepstudy_slope, 30, 4))
    for j in (0, 17, 29):
        again = sleepstudy_slope.refit(rows[j])
        assert result.estimates.llf[j] == pytest.approx(again.llf, rel=1e-12)
        np.testing.assert_allclose(result.estimates.params[j], again.params, rtol=1e-8)


def test_resampled_parts_have_the_estimated_variances(sleepstudy_slope: lmmax.Fit) -> None:
    """Mean zero and covariance exactly as estimated, over the empirical distribution."""
    fit = lmmax.fit(SLOPE, load_data("sleepstudy"), weights="w")
    for one in (fit, sleepstudy_slope):
        modes = resampling._rescaled(one._effects[0].modes, one.cov_re.to_numpy())
        np.testing.assert_allclose(modes.mean(axis=0), 0.0, atol=1e-12)
        np.testing.assert_allclose(modes.T @ modes / len(modes), one.cov_re, rtol=1e-10)
    # Directions are kept: the rescaling is a linear map of the centred modes.
    centred = one._effects[0].modes - one._effects[0].modes.mean(axis=0)
    assert np.linalg.matrix_rank(np.hstack([centred, modes]), tol=1e-8) == 2


def test_resampled_responses_have_the_model_covariance(penicillin: lmmax.Fit) -> None:
    y = np.array(list(resampling.resampled(penicillin, 3000, 5)))
    left = y - penicillin.fittedvalues_marginal.to_numpy()
    plate, sample = (grouping.codes for grouping in penicillin.design.groupings)
    total = np.trace(penicillin.cov_re) + penicillin.scale
    assert abs(left.var() / total - 1.0) < 0.05  # 6 samples carry most of it
    same = (plate[:, None] == plate) & (sample[:, None] != sample)
    own = (left.T @ left / len(left))[same].mean()
    assert own == pytest.approx(penicillin.cov_re.iloc[0, 0], rel=0.05)


def test_related_levels_are_resampled_as_independent_ones() -> None:
    from tests.oracles import designs

    problem = designs.simulate("related_alone", 1)
    fit = lmmax.fit(problem.formula, problem.data, relmat=problem.relmat)
    result = bootstrap(fit, 3, method="residual", seed=1)
    assert result.status["converged"] == 3
    y = np.array(list(resampling.resampled(fit, 2000, 1)))
    left = y - fit.fittedvalues_marginal.to_numpy()
    covs = [fit.cov_re.to_numpy()]
    V = problem.model.covariance(covs, fit.scale)
    assert np.mean(left**2) / np.mean(np.diag(V)) == pytest.approx(1.0, abs=0.05)
    assert np.sum(left.sum(axis=1) ** 2) / 2000 / V.sum() == pytest.approx(1.0, abs=0.15)


# --- statistics ---------------------------------------------------------------------------------


def icc(b: BatchEstimates) -> np.ndarray:
    return b.cov_re[..., 0, 0] / (b.cov_re[..., 0, 0] + b.scale)


def test_a_function_of_the_estimates(result: Bootstrap) -> None:
    fit = result.fit
    own = bootstrap(fit, 400, statistic=icc, seed=1)
    variance = result.replicates["Subject: sd(Intercept)"] ** 2
    expected = variance / (variance + result.replicates["sigma"] ** 2)
    np.testing.assert_allclose(own.replicates["icc"], expected, rtol=1e-12)
    assert own.observed["icc"] == pytest.approx(
        icc(own.estimates.take(slice(None))).mean(), abs=0.2
    )


def test_names_of_statistics(sleepstudy_slope: lmmax.Fit) -> None:
    def both(b: BatchEstimates) -> dict[str, np.ndarray]:
        return {"icc": icc(b), "Psi": b.cov_re}

    labels = ["icc", "Psi[0, 0]", "Psi[0, 1]", "Psi[1, 0]", "Psi[1, 1]"]
    assert list(bootstrap(sleepstudy_slope, 3, statistic=both).replicates) == labels
    plain = bootstrap(sleepstudy_slope, 3, statistic=lambda b: b.scale)
    assert list(plain.replicates) == ["statistic"]


def test_statistics_of_the_wrong_shape(sleepstudy_slope: lmmax.Fit) -> None:
    with pytest.raises(ValueError, match=r"first axis must .*: index from the end"):
        bootstrap(sleepstudy_slope, 4, statistic=lambda b: b.cov_re[0, 0])
    with pytest.raises(ValueError, match="gives 2 values for the fit and 1 for each replicate"):
        bootstrap(
            sleepstudy_slope,
            4,
            statistic=lambda b: b.params.sum(axis=-1) if b.params.ndim > 1 else b.params,
        )
    with pytest.raises(ValueError, match="first axis must be that of the replicates"):
        bootstrap(sleepstudy_slope, 4, statistic=lambda b: b.cov_re.sum())


# --- limits -------------------------------------------------------------------------------------


def synthetic(result: Bootstrap, values: Any, observed: float) -> Bootstrap:
    """A result with given replicates of one statistic."""
    frame = pd.DataFrame({"sigma": np.asarray(values, dtype=float)})
    estimates = result.estimates.take(np.zeros(len(frame), dtype=int))
    return replace(
        result,
        observed=pd.Series({"sigma": observed}),
        replicates=frame,
        estimates=estimates,
        statistic=lambda b: b.sigma,
    )


def test_limits_by_their_definitions(result: Bootstrap) -> None:
    # 99 replicates 1, ..., 99: the quantile at level k / 100 is k.
    ranks = synthetic(result, np.random.default_rng(0).permutation(np.arange(1.0, 100.0)), 40.0)
    assert ranks.conf_int(0.1).to_numpy().tolist() == [[5.0, 95.0]]
    assert ranks.conf_int(0.1, "basic").to_numpy().tolist() == [[-15.0, 75.0]]
    np.testing.assert_allclose(ranks.conf_int(0.05), [[2.5, 97.5]], rtol=1e-14)
    se = np.std(np.arange(1.0, 100.0), ddof=1)
    z = 1.6448536269514722
    np.testing.assert_allclose(
        ranks.conf_int(0.1, "normal").to_numpy(), [[30.0 - z * se, 30.0 + z * se]], rtol=1e-12
    )
    assert (ranks.bias["sigma"], ranks.se["sigma"]) == pytest.approx((10.0, se), rel=1e-14)


def test_bca_by_its_definition(result: Bootstrap) -> None:
    """Bias correction and acceleration from fits of the data without each subject."""
    fit, data = result.fit, lmmax.datasets.load("sleepstudy")
    without = []
    for subject in fit.design.groupings[0].levels:
        part = lmmax.fit(SLOPE, data[data["Subject"] != subject])
        without.append([*part.params, *part.varcorr()["sdcor"]])
    values = np.array(without)
    found = leave_out_groups(fit)
    np.testing.assert_allclose(found.params, values[:, :2], rtol=1e-9)
    np.testing.assert_allclose(found.sd, values[:, 2:4], rtol=1e-6)
    np.testing.assert_allclose(found.sigma, values[:, 5], rtol=1e-7)

    influence = values.mean(axis=0) - values
    a = np.sum(influence**3, axis=0) / (6.0 * np.sum(influence**2, axis=0) ** 1.5)
    limits = result.conf_int(0.2, "bca")
    for j, name in enumerate(result.observed.index):
        replicates = np.sort(result.replicates[name])
        z0 = ndtri(np.mean(replicates < result.observed[name]))
        for side, level in (("lower", 0.1), ("upper", 0.9)):
            z = z0 + ndtri(level)
            at = ndtr(z0 + z / (1.0 - a[j] * z)) * 401.0
            below = int(at)
            expected = replicates[below - 1] + (at - below) * np.diff(replicates)[below - 1]
            assert limits.loc[name, side] == pytest.approx(expected, rel=1e-5)


def test_jackknife_with_weights_and_offset() -> None:
    data = load_data("sleepstudy")
    formula = "Reaction ~ Days + offset(off) + (1 | Subject)"
    fit = lmmax.fit(formula, data, weights="w", reml=False)
    found = leave_out_groups(fit)
    for j in (0, 11):
        rest = data[data["Subject"] != fit.design.groupings[0].levels[j]]
        part = lmmax.fit(formula, rest, weights="w", reml=False)
        np.testing.assert_allclose(found.params[j], part.params, rtol=1e-9)
        assert found.llf[j] == pytest.approx(part.llf, rel=1e-12)


def test_jackknife_of_several_factors(penicillin: lmmax.Fit) -> None:
    found = leave_out_groups(penicillin)
    data = load_data("penicillin")
    assert len(found.scale) == 6  # samples: fewer than plates
    for j, sample in enumerate(penicillin.design.groupings[1].levels):
        part = lmmax.fit(penicillin.formula, data[data["sample"] != sample])
        assert found.llf[j] == pytest.approx(part.llf, rel=1e-10)
        np.testing.assert_allclose(found.params[j], part.params, rtol=1e-8)


def test_many_groups_are_left_out_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmmax.inference import jackknife

    fit = lmmax.fit("Weight ~ Time + (1 | Pig)", load_data("dietox"))
    monkeypatch.setattr(jackknife, "MOST", 10)
    monkeypatch.setattr(jackknife, "STREAM_BYTES", 1 << 15)  # a few parts at a time
    found = leave_out_groups(fit)
    assert len(found.scale) == 10
    part = np.random.default_rng(0).permutation(72) % 10
    codes = fit.design.groupings[0].codes
    rest = load_data("dietox").loc[fit.design.index][part[codes] != 3]
    again = lmmax.fit("Weight ~ Time + (1 | Pig)", rest)
    assert found.scale[3] == pytest.approx(again.scale, rel=1e-8)


def test_bca_is_refused_where_a_group_cannot_be_left_out() -> None:
    data = load_data("dyestuff").assign(only=lambda d: (d["Batch"] == "C").astype(float))
    fit = lmmax.fit("Yield ~ only + (1 | Batch)", data)
    with pytest.raises(JackknifeError, match=r"without group 'C' of 'Batch' not all coefficients"):
        leave_out_groups(fit)
    drawn = bootstrap(fit, 40)
    with pytest.raises(BootstrapError, match="use kind='percentile' or kind='basic'"):
        drawn.conf_int(0.2, "bca")
    assert np.isfinite(drawn.conf_int(0.2, "basic").to_numpy()).all()


def test_limits_out_of_reach(result: Bootstrap) -> None:
    with pytest.raises(BootstrapError, match="use more replicates"):
        synthetic(result, np.arange(30.0), 15.0).conf_int(0.05)
    with pytest.warns(UserWarning, match="the BCa limits of 'sigma' lie beyond the replicates"):
        beyond = synthetic(result, np.arange(99.0), 1e3).conf_int(0.05, "bca")
    assert beyond.isna().all(axis=None)
    with pytest.raises(ValueError, match="kind='t' is unknown"):
        result.conf_int(kind="t")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha=0 must lie"):
        result.conf_int(alpha=0)


def test_limits_at_the_boundary(result: Bootstrap) -> None:
    """Replicates of zero are quantiles like others; the lower limit of a variance is zero."""
    fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", load_data("dyestuff2"))
    drawn = bootstrap(fit, 1999, seed=2)
    assert drawn.status["singular"] > 600
    limits = drawn.conf_int().loc["Batch: sd(Intercept)"]
    assert limits["lower"] == 0.0 < limits["upper"]
    bca = drawn.conf_int(kind="bca").loc["Batch: sd(Intercept)"]
    assert bca["lower"] == 0.0 <= bca["upper"]
    assert f"{drawn.status['singular']:,} replicates singular." in str(drawn)


# --- status and output --------------------------------------------------------------------------


def test_failures_are_counted_and_left_out(result: Bootstrap) -> None:
    fit = replace(result.fit, settings=replace(result.fit.settings, max_steps=4, em_steps=0))
    drawn = bootstrap(fit, 400, seed=1)
    failed = ~drawn.estimates.converged
    assert drawn.status["max_steps"] == failed.sum() > 0
    assert drawn.status["converged"] == 400 - failed.sum() > 40
    assert drawn.replicates[failed].isna().all(axis=None)
    assert drawn.replicates[~failed].notna().all(axis=None)
    expected = result.replicates[~failed]
    pd.testing.assert_series_equal(drawn.se, expected.std(), check_names=False, rtol=1e-6)
    limits = np.quantile(expected["Days"], [0.1, 0.9], method="weibull")
    np.testing.assert_allclose(drawn.conf_int(0.2).loc["Days"], limits, rtol=1e-7)
    assert f"{failed.sum()} replicates did not converge and are left out" in str(drawn)
    assert f"({failed.sum()} max_steps)" in str(drawn)


def test_printed(result: Bootstrap) -> None:
    lines = str(result).splitlines()
    assert lines[0] == "Parametric bootstrap, 400 replicates (REML)"
    assert lines[1] == f"Formula: {SLOPE}"
    assert lines[3].split() == ["observed", "bias", "std", "err", "[0.025", "0.975]"]
    assert lines[5].split()[:2] == ["Days", "10.467"]
    assert lines[-2] == "Limits are percentiles of the replicates."
    assert max(map(len, lines)) <= 80
    html = result._repr_html_()
    assert '<th scope="row">Subject: cor(Intercept, Days)</th>' in html
    assert "10.467" in html and "<caption>" not in html
    assert repr(result).startswith("<lmmax.Bootstrap 'Reaction ~ Days")


def test_few_replicates_are_printed_without_limits(sleepstudy_slope: lmmax.Fit) -> None:
    text = str(bootstrap(sleepstudy_slope, 5))
    assert "There are too few replicates for limits of level 95%." in text
    assert "0.975" not in text


def test_bad_requests(sleepstudy_slope: lmmax.Fit) -> None:
    with pytest.raises(ValueError, match="n=0 must be"):
        bootstrap(sleepstudy_slope, 0)
    with pytest.raises(ValueError, match="seed=None must be"):
        bootstrap(sleepstudy_slope, 5, seed=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use 'parametric' or 'residual'"):
        bootstrap(sleepstudy_slope, 5, method="cases")
    layout = replace(sleepstudy_slope.layout, engine=Engine("iterative", ""))
    with pytest.raises(EngineError, match="fit with engine='crossed'"):
        bootstrap(replace(sleepstudy_slope, layout=layout), 5)


def test_progress(sleepstudy_slope: lmmax.Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"pip install 'lmmax\[progress\]'"):
        bootstrap(sleepstudy_slope, 5, progress=True)

    steps: list[int] = []

    class Bar(SimpleNamespace):
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            steps.append(-self.total)

        def update(self, count: int) -> None:
            steps.append(count)

    module = ModuleType("tqdm.auto")
    module.tqdm = Bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm.auto", module)
    monkeypatch.setattr(resampling, "TOGETHER", 64)
    bootstrap(sleepstudy_slope, 100, progress=True)
    assert steps == [64, 36, -100]


# --- test of two models -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quadratic() -> tuple[lmmax.Fit, lmmax.Fit]:
    data = lmmax.datasets.load("sleepstudy")
    return (
        lmmax.fit("Reaction ~ Days + (1 | Subject)", data),
        lmmax.fit("Reaction ~ Days + I(Days**2) + (1 | Subject)", data),
    )


def test_the_reference_distribution_is_that_of_refits(
    quadratic: tuple[lmmax.Fit, lmmax.Fit],
) -> None:
    small, large = (fit.refit_ml() for fit in quadratic)
    test = bootstrap_test(*quadratic, n=49, seed=2)
    y = simulate(small, 49, seed=2)
    expected = [2.0 * (large.refit(y[j]).llf - small.refit(y[j]).llf) for j in range(49)]
    np.testing.assert_allclose(test.replicates, expected, atol=1e-7)
    assert test.statistic == pytest.approx(2.0 * (large.llf - small.llf), abs=1e-9)
    assert test.df == 1
    assert test.pvalue == (1 + np.sum(np.array(expected) >= test.statistic)) / 50
    assert test.n_failed == 0
    corrected = test.statistic / np.mean(expected)
    assert test.pvalue_bartlett == pytest.approx(2.0 * ndtr(-np.sqrt(corrected)), rel=1e-6)
    assert test.pvalue_chi2 == pytest.approx(2.0 * ndtr(-np.sqrt(test.statistic)), rel=1e-9)
    text = str(test)
    assert f"LRT = {test.statistic:.4f} on 1 degree of freedom" in text
    assert f"bootstrap   p = {test.pvalue:.3f}" in text


def test_a_fixed_effect_in_a_balanced_design_has_a_known_distribution(
    quadratic: tuple[lmmax.Fit, lmmax.Fit],
) -> None:
    """``n log(1 + F / df)`` with F on 1 and 160 degrees of freedom: the within-group regression.

    The profile over the variance ratio does not move as long as the fit is not singular.
    """
    from scipy.special import fdtrc, fdtri

    test = bootstrap_test(*quadratic, n=999, seed=1)
    # The ML ratio of the within-group regression, whose residuals have 162 - 1 dimensions.
    levels = np.array([0.5, 0.9, 0.95])
    F = fdtri(1, 160, levels)
    limits = 162.0 * np.log1p(F / 160.0)
    share = np.mean(test.replicates[:, None] <= limits, axis=0)
    assert np.all(np.abs(share - levels) < 4.5 * np.sqrt(levels * (1.0 - levels) / 999))
    exact = fdtrc(1, 160, 160.0 * np.expm1(test.statistic / 162.0))
    assert abs(test.pvalue - exact) < 4.5 * test.pvalue_se


def test_a_variance_at_the_boundary_of_the_null() -> None:
    """About half of the replicates have a statistic of zero, and chi-squared is conservative."""
    data = load_data("dyestuff2").assign(part=lambda d: np.arange(len(d)) % 3)
    small = lmmax.fit("Yield ~ 1 + (1 | Batch)", data)
    large = lmmax.fit("Yield ~ 1 + (1 | Batch) + (1 | part)", data)
    test = bootstrap_test(small, large, n=60, seed=1)
    assert "a variance is zero under the smaller model" in str(test)
    assert 0.3 < np.mean(test.replicates < 1e-6) < 0.95
    assert test.replicates.min() > -1e-6


def test_models_that_do_not_compare(quadratic: tuple[lmmax.Fit, lmmax.Fit]) -> None:
    small, large = quadratic
    with pytest.raises(ComparisonError, match="pass the model of the null hypothesis first"):
        bootstrap_test(large, small, n=9)
    data = lmmax.datasets.load("sleepstudy")
    with pytest.raises(ComparisonError, match="different rows"):
        bootstrap_test(lmmax.fit("Reaction ~ 1 + (1 | Subject)", data.iloc[:100]), small, n=9)
    with pytest.raises(ComparisonError, match="different weights"):
        weighted = lmmax.fit("Reaction ~ 1 + (1 | Subject)", data, weights=np.full(180, 2.0))
        bootstrap_test(weighted, small, n=9)
    with pytest.raises(ComparisonError, match=r"not nested: 'np\.exp\(Days\)'"):
        bootstrap_test(lmmax.fit("Reaction ~ np.exp(Days) + (1 | Subject)", data), large, n=9)
    with pytest.raises(ComparisonError, match="no covariances of the random effects"):
        other = lmmax.fit("Reaction ~ 1 + (0 + Days | Subject)", data)
        bootstrap_test(other, large, n=9)
