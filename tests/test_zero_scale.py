"""Residual variances of zero, small ones, and likelihoods without a maximum."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

import lmmax

N_GROUPS, N_TIMES = 12, 4
FORMULA = "y ~ x + ar1(0 + C(t) | g)"
LAGS = np.abs(np.subtract.outer(np.arange(N_TIMES), np.arange(N_TIMES)))


def without_residual(seed: int) -> pd.DataFrame:
    """Return responses of an autoregression that is observed without error."""
    rng = np.random.default_rng(seed)
    data = pd.DataFrame(
        {
            "g": np.repeat(np.arange(N_GROUPS), N_TIMES),
            "t": np.tile(np.arange(1, N_TIMES + 1), N_GROUPS),
            "x": rng.normal(size=N_GROUPS * N_TIMES),
        }
    )
    effects = rng.normal(size=(N_GROUPS, N_TIMES)) @ np.linalg.cholesky(0.4**LAGS).T
    return data.assign(y=effects.ravel() + 0.5 * data["x"])


def dense(variances: np.ndarray, data: pd.DataFrame, reml: bool) -> float:
    """Return -2 log-likelihood at (log variance, atanh rho, residual variance)."""
    X = np.column_stack([np.ones(len(data)), data["x"]])
    y, n, p = data["y"].to_numpy(), len(data), 2
    block = np.exp(variances[0]) * np.tanh(variances[1]) ** LAGS
    V = np.kron(np.eye(N_GROUPS), block + variances[2] * np.eye(N_TIMES))
    inverse = np.linalg.inv(V)
    information = X.T @ inverse @ X
    r = y - X @ np.linalg.solve(information, X.T @ inverse @ y)
    value = np.linalg.slogdet(V)[1] + r @ inverse @ r + (n - reml * p) * np.log(2.0 * np.pi)
    return float(value + reml * np.linalg.slogdet(information)[1])


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    return without_residual(3)


@pytest.fixture(scope="module")
def at_zero(data: pd.DataFrame) -> lmmax.Fit:
    """A fit whose likelihood is largest at a residual variance of zero, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return lmmax.fit(FORMULA, data)


@pytest.mark.parametrize("reml", [True, False])
def test_maximum_at_zero_is_that_of_the_dense_likelihood(data: pd.DataFrame, reml: bool) -> None:
    fit = lmmax.fit(FORMULA, data, reml=reml)
    best = minimize(
        lambda z: dense(np.append(z, 0.0), data, reml), [0.0, 0.5], method="BFGS", tol=1e-10
    )
    assert fit.status == "zero_scale" and fit.converged and fit.singular
    assert fit.scale == 0.0
    assert fit.deviance == pytest.approx(best.fun, abs=1e-9)
    sd, rho = fit.structures()["estimate"]
    assert (2.0 * np.log(sd), np.arctanh(rho)) == pytest.approx(tuple(best.x), abs=1e-5)
    # It is a maximum at the boundary: the criterion rises from there.
    assert dense(np.append(best.x, 1e-4), data, reml) > best.fun


def test_numbers_of_a_zero_scale_are_limits(at_zero: lmmax.Fit, data: pd.DataFrame) -> None:
    near = lmmax.fit(FORMULA, data, fix={"scale": 1e-8}, start=at_zero)
    assert near.converged and near.deviance == pytest.approx(at_zero.deviance, abs=1e-6)
    for ddf in ("satterthwaite", "kenward-roger", "between-within", "normal"):
        expected = near.coefficients(ddf)
        np.testing.assert_allclose(at_zero.coefficients(ddf), expected, rtol=1e-5, err_msg=ddf)
    np.testing.assert_allclose(at_zero.cov_re, near.cov_re, rtol=1e-6)
    np.testing.assert_allclose(at_zero.cov_re_se, near.cov_re_se, rtol=1e-6)
    np.testing.assert_allclose(at_zero.random_effects, near.random_effects, atol=1e-6)
    np.testing.assert_allclose(at_zero.fittedvalues, data["y"], atol=1e-9)
    np.testing.assert_allclose(lmmax.sandwich(at_zero), lmmax.sandwich(near), rtol=1e-5, atol=1e-9)
    drawn = lmmax.simulate(at_zero, seed=1), lmmax.simulate(near, seed=1)
    np.testing.assert_allclose(*drawn, atol=1e-3)
    # The scale counts as a parameter that was estimated, as other variances of zero do.
    assert at_zero.n_params == near.n_params + 1


def test_zero_scale_prints_and_says_so(at_zero: lmmax.Fit) -> None:
    text = str(at_zero)
    assert "did not converge" not in text and "max_steps" not in text
    assert "The residual variance is estimated as zero" in text
    assert "zero_scale" in repr(at_zero) and at_zero._repr_html_()
    assert at_zero.convergence.optima[0] == pytest.approx(at_zero.deviance)
    residual = at_zero.varcorr().iloc[-1]
    assert residual["vcov"] == residual["sdcor"] == 0.0
    assert np.isnan(residual["vcov_se"]) and np.isnan(residual["sdcor_se"])
    assert np.isnan(at_zero.theta).all()  # relative to nothing


def test_what_a_zero_scale_lacks_has_a_reason(at_zero: lmmax.Fit, data: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="a residual variance of zero"):
        lmmax.conditional_aic(at_zero)
    with pytest.warns(lmmax.ProfileWarning, match="residual variance is estimated as zero"):
        limits = lmmax.confint(at_zero)
    assert limits.isna().to_numpy().all()
    assert np.isfinite(lmmax.confint(at_zero, method="wald")).to_numpy().all()
    for start in (at_zero, {"cov_re": at_zero.cov_re, "scale": at_zero.scale}):
        again = lmmax.fit(FORMULA, data, start=start)
        assert again.status == "zero_scale"
        assert again.deviance == pytest.approx(at_zero.deviance, abs=1e-9)


def test_batches_end_at_a_zero_scale_as_fits_do(data: pd.DataFrame) -> None:
    columns = [without_residual(seed)["y"] - data["x"] for seed in range(6)]
    many = lmmax.fit_many(FORMULA, data, np.column_stack(columns))
    single = [lmmax.fit(FORMULA, data.assign(y=y)) for y in columns]
    assert many.certificate["status"].tolist() == [fit.status for fit in single]
    assert {"zero_scale", "converged"} <= set(many.status)
    np.testing.assert_allclose(many.llf, [fit.llf for fit in single], atol=1e-9)
    np.testing.assert_allclose(many.scale, [fit.scale for fit in single], atol=1e-8)
    np.testing.assert_allclose(many.bse, [fit.bse for fit in single], rtol=1e-7)
    np.testing.assert_allclose(many.df, [fit.df for fit in single], rtol=1e-6)


def test_free_covariances_have_boundary_maxima_too() -> None:
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"g": np.repeat(np.arange(15), 2), "x": rng.normal(size=30)})
    effects = rng.normal(size=(15, 2))
    data["y"] = effects[data["g"], 0] + effects[data["g"], 1] * data["x"]
    fit = lmmax.fit("y ~ x + (1 + x | g)", data)
    assert fit.status == "zero_scale"
    # Two rows show both effects of a group: the estimates are their mean and covariance.
    np.testing.assert_allclose(fit.params, effects.mean(axis=0), atol=1e-8)
    np.testing.assert_allclose(fit.cov_re, np.cov(effects.T), atol=1e-8)


def test_likelihood_without_maximum_prints() -> None:
    rng = np.random.default_rng(2)
    g = np.repeat(np.arange(6), 4)
    data = pd.DataFrame(
        {"y": rng.normal(size=6)[g], "x": rng.normal(size=6)[g], "z": rng.normal(size=24), "g": g}
    )
    with (
        pytest.warns(lmmax.ConvergenceWarning, match="no maximum"),
        pytest.warns(lmmax.IdentifiabilityWarning, match="does not vary within any group"),
    ):
        fit = lmmax.fit("y ~ x + z + (1 + x | g)", data)
    assert fit.status == "unbounded" and not fit.converged
    assert "the fit did not converge" in str(fit) and fit._repr_html_()
    np.testing.assert_allclose(fit.fittedvalues, data["y"], atol=1e-8)
    np.testing.assert_allclose(fit.predict(), data["y"], atol=1e-8)
    assert np.isfinite(fit.random_effects).to_numpy().all()
    with pytest.raises(ValueError, match="'unbounded'"):
        lmmax.conditional_aic(fit)


@pytest.mark.parametrize("structure", ["ar1", "hetar1"])
def test_small_residuals(structure: str) -> None:
    """With replicates the within-cell squares and the cells' means separate in the limit."""
    rng = np.random.default_rng(5)
    cells = pd.DataFrame(
        [(g, t) for g in range(N_GROUPS) for t in range(N_TIMES) for _ in range(3)],
        columns=["g", "t"],
    )
    effects = rng.normal(size=(N_GROUPS, N_TIMES)) @ np.linalg.cholesky(0.5**LAGS).T
    noise = rng.normal(size=len(cells))
    within = noise - pd.Series(noise).groupby([cells["g"], cells["t"]]).transform("mean")
    n_within = 2 * N_GROUPS * N_TIMES
    levels = []
    for sd in (1e-4, 1e-5, 1e-6):
        y = effects[cells["g"], cells["t"]] + sd * noise
        fit = lmmax.fit(f"y ~ 1 + {structure}(0 + C(t) | g)", cells.assign(y=y))
        assert fit.status == "converged"
        assert fit.scale == pytest.approx(sd**2 * np.sum(within**2) / n_within, rel=1e-5)
        levels.append(fit.llf + n_within * np.log(sd))
    assert levels[1] == pytest.approx(levels[2], abs=1e-2)
    assert levels[0] == pytest.approx(levels[2], abs=1e-1)


@pytest.mark.parametrize("scale", [1e-4, 1e-8, 1e-12])
def test_scale_held_at_next_to_nothing(data: pd.DataFrame, scale: float) -> None:
    fit = lmmax.fit(FORMULA, data, fix={"scale": scale})
    sd, rho = fit.structures()["estimate"]
    here = np.array([2.0 * np.log(sd), np.arctanh(rho)])
    best = minimize(lambda z: dense(np.append(z, scale), data, True), here, method="BFGS")
    assert fit.status == "converged"
    assert fit.deviance == pytest.approx(best.fun, abs=1e-7)
