"""Singular fits: a variance of zero or a correlation of one is a maximum like any other.

The optimum over positive semidefinite D is certified by the closed-form gradient (first-order
conditions), and the fit compared with closed forms: analysis of variance for balanced one-way
data, least squares where every variance is zero, and the fit of lower rank that it amounts to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from tests.oracles import dense, lindstrom_bates

INTERCEPT = "y ~ x + (1 | g)"
SLOPE = "y ~ x + z + (1 + z | g)"
DIAGONAL = "y ~ x + z + (1 + z || g)"


def simulate(seed: int, cov: Any = 0.0, groups: int = 20, size: int = 10) -> pd.DataFrame:
    """x between groups, z within; intercepts and slopes in z with the given covariance."""
    rng = np.random.Generator(np.random.PCG64(seed))
    g = np.repeat(np.arange(groups), size)
    x, z = rng.standard_normal(groups)[g], rng.standard_normal(len(g))
    values, vectors = np.linalg.eigh(cov * np.eye(2) if np.ndim(cov) == 0 else np.array(cov))
    b = rng.standard_normal((groups, 2)) @ (vectors * np.sqrt(values.clip(min=0.0))).T
    y = 5 + 2 * x + z + b[g, 0] + b[g, 1] * z + rng.standard_normal(len(g))
    return pd.DataFrame({"y": y, "x": x, "z": z, "g": g})


def matrices(data: pd.DataFrame, fixed: str, effects: str) -> dict[str, Any]:
    columns = {"1": np.ones(len(data)), "x": data["x"], "z": data["z"]}
    return {
        "y": data["y"].to_numpy(),
        "X": np.column_stack([columns[name] for name in fixed]),
        "Z": np.column_stack([columns[name] for name in effects]),
        "codes": data["g"].to_numpy(),
    }


def certify(fit: lmmax.Fit, problem: dict[str, Any], diagonal: bool = False) -> None:
    """Criterion, first-order conditions over positive semidefinite D, and the singular flag."""
    D = fit.cov_re.to_numpy() / fit.scale
    q = len(D)
    assert fit.converged and fit.status == "converged", fit.message
    value = lindstrom_bates.criterion(**problem, D=D, reml=fit.reml)
    assert fit.deviance == pytest.approx(value, abs=1e-8)
    gradient, _ = lindstrom_bates.derivatives_D(**problem, D=D, reml=fit.reml)
    G = np.zeros((q, q))
    G[np.tril_indices(q)] = gradient
    G = 0.5 * (G + G.T)
    if diagonal:
        G = np.diag(np.diag(G))
    # The gradient is a difference of terms of this size.
    size = np.abs(sum(lindstrom_bates.parts(**problem, D=D).K)).max()
    assert np.linalg.eigvalsh(G)[0] > -1e-7 * size  # nothing wants to grow
    np.testing.assert_allclose(D @ G, 0.0, atol=1e-7 * size)  # what grew is at its optimum
    values, vectors = np.linalg.eigh(D)
    null = vectors[:, values <= 1e-9 * max(values[-1], 1e-9)]
    assert fit.singular == bool(null.size)
    if null.size:
        assert np.linalg.eigvalsh(null.T @ G @ null)[0] > -1e-9 * size
        assert "singular" in fit.message and "singular" in repr(fit)
        assert fit.convergence.boundary
    else:
        assert fit.convergence.boundary == () and "singular" not in fit.message


def assert_least_squares(fit: lmmax.Fit, problem: dict[str, Any]) -> None:
    """With all variances zero everything is that of ordinary least squares."""
    y, X = problem["y"], problem["X"]
    n, p = X.shape
    beta, rss = np.linalg.lstsq(X, y, rcond=None)[:2]
    scale = float(rss[0]) / (n - p if fit.reml else n)
    assert (fit.cov_re.to_numpy() == 0.0).all()
    assert fit.scale == pytest.approx(scale, rel=1e-12)
    np.testing.assert_allclose(fit.params, beta, rtol=1e-10)
    np.testing.assert_allclose(fit.cov_params(), scale * np.linalg.inv(X.T @ X), rtol=1e-9)
    assert (fit.random_effects.to_numpy() == 0.0).all()
    assert (fit.random_effects_cov == 0.0).all()
    np.testing.assert_allclose(fit.fittedvalues, X @ beta, rtol=1e-10)
    likelihood = n * np.log(2 * np.pi * fit.scale) + float(rss[0]) / fit.scale
    if fit.reml:
        likelihood += np.linalg.slogdet(X.T @ X)[1] - p * np.log(2 * np.pi * fit.scale)
    assert fit.deviance == pytest.approx(likelihood, rel=1e-12)


# --- no variance between groups --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_no_group_variance(seed: int) -> None:
    """statsmodels converges on 24 of 60 such data sets, and returns b = (0, 0, 1) near zero."""
    data, reml = simulate(seed), seed % 2 == 0
    problem = matrices(data, "1x", "1")
    fit = lmmax.fit(INTERCEPT, data, reml=reml)
    certify(fit, problem)
    # Balanced, and x between groups: analysis of variance of the group means about the line.
    groups, size = 20, 10
    means = data.groupby("g").mean()
    rss = np.linalg.lstsq(means[["x"]].assign(one=1.0), means["y"], rcond=None)[1][0]
    between = size * rss / (groups - 2 if reml else groups)
    within = ((data["y"] - means["y"].to_numpy()[data["g"]]) ** 2).sum() / (groups * (size - 1))
    assert fit.singular == (between <= within)
    if fit.singular:
        assert_least_squares(fit, problem)
    else:
        # The decrement of 1e-14 at which a fit may stop is 1e-7 standard errors.
        assert fit.scale == pytest.approx(within, rel=1e-8)
        assert fit.cov_re.iloc[0, 0] == pytest.approx((between - within) / size, rel=1e-6)


def test_no_group_variance_is_singular_about_half_of_the_time() -> None:
    singular = [lmmax.fit(INTERCEPT, simulate(seed)).singular for seed in range(60)]
    assert 20 < sum(singular) < 40


@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
def test_negative_intraclass_correlation(solver: str) -> None:
    """Group means closer together than chance has them: far inside the singular region."""
    data = simulate(0)
    data["y"] -= data.groupby("g")["y"].transform("mean") - 5 - 2 * data["x"]
    fit = lmmax.fit(INTERCEPT, data, solver=solver)
    certify(fit, matrices(data, "1x", "1"))
    assert_least_squares(fit, matrices(data, "1x", "1"))


@pytest.mark.parametrize("start", [0.0, 1e-8, 1.0, 1e4])
def test_a_start_at_zero_is_no_trap(start: float) -> None:
    """Zero is stationary by symmetry; it must be left where the variance is positive."""
    for seed in (0, 1, 2, 3):
        for cov in (0.0, 0.05, 1.0):
            data = simulate(seed, cov)
            fit = lmmax.fit(INTERCEPT, data, start=[start], em_steps=0)
            certify(fit, matrices(data, "1x", "1"))


# --- random slopes ---------------------------------------------------------------------------

TRUTHS: dict[str, Any] = {
    "nothing": np.zeros((2, 2)),
    "intercept only": np.diag([1.0, 0.0]),
    "slope only": np.diag([0.0, 1.0]),
    "correlation one": np.array([[1.0, 0.5], [0.5, 0.25]]),
    "correlation minus one": np.array([[1.0, -0.5], [-0.5, 0.25]]),
    "nearly one": np.array([[1.0, 0.499], [0.499, 0.25]]),
    "regular": np.array([[1.0, 0.2], [0.2, 1.0]]),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("formula", [SLOPE, DIAGONAL], ids=["us", "diag"])
def test_random_slopes(formula: str, truth: str, seed: int) -> None:
    data, reml = simulate(seed, TRUTHS[truth]), seed % 2 == 0
    problem = matrices(data, "1xz", "1z")
    fit = lmmax.fit(formula, data, reml=reml)
    certify(fit, problem, diagonal=formula == DIAGONAL)
    if truth == "regular":
        assert not fit.singular
    lbfgs = lmmax.fit(formula, data, reml=reml, solver="lbfgs", max_steps=1000)
    certify(lbfgs, problem, diagonal=formula == DIAGONAL)
    assert lbfgs.deviance == pytest.approx(fit.deviance, abs=1e-8)
    if (fit.cov_re.to_numpy() == 0.0).all():
        assert_least_squares(fit, problem)


def find(truth: str, formula: str, wanted: Any) -> tuple[pd.DataFrame, lmmax.Fit]:
    """The first simulated data set whose fit is of the kind wanted."""
    for seed in range(40):
        data = simulate(seed, TRUTHS[truth])
        fit = lmmax.fit(formula, data)
        if wanted(fit):
            return data, fit
    raise AssertionError("no such fit among forty")


@pytest.mark.parametrize("sign", [1, -1])
def test_correlation_one(sign: int) -> None:
    """The fit of rank one: unit correlation, one effect per group, and no error for it."""
    truth = "correlation one" if sign > 0 else "correlation minus one"
    data, fit = find(truth, SLOPE, lambda fit: fit.singular)
    table = fit.varcorr().set_index(["var1", "var2"])
    row = table.loc[("Intercept", "z")]
    assert row["sdcor"] == pytest.approx(sign, abs=1e-12)
    assert np.isnan(row["sdcor_se"])
    # All groups lie on one line.
    modes = fit.random_effects.to_numpy()
    slope = fit.cov_re.loc["z", "Intercept"] / fit.cov_re.loc["Intercept", "Intercept"]
    np.testing.assert_allclose(modes[:, 1], slope * modes[:, 0], atol=1e-12)
    # It is the maximum among matrices of rank one, so the fit with the effect 1 + slope z.
    line = data.assign(w=1 + slope * data["z"])
    one = lmmax.fit("y ~ x + z + (0 + w | g)", line)
    assert one.deviance == pytest.approx(fit.deviance, abs=1e-8)
    np.testing.assert_allclose(one.params, fit.params, rtol=1e-6)
    np.testing.assert_allclose(one.fittedvalues, fit.fittedvalues, atol=1e-6)
    # Given the rank, the variances have standard errors, from the information in (a, b), D = vv'.
    problem = matrices(data, "1xz", "1z")

    def criterion(parameters: np.ndarray) -> float:
        v = parameters[:2]
        return float(
            dense.natural_criterion(
                **problem, cov_re=np.outer(v, v), scale=parameters[2], reml=True
            )
        )

    sd = np.sqrt(np.diag(fit.cov_re))
    at = np.array([sd[0], sign * sd[1], fit.scale])
    step = 1e-3 * np.abs(at)
    hessian = np.empty((3, 3))
    for i, a in enumerate(np.diag(step)):
        for j, b in enumerate(np.diag(step)):
            corners = [criterion(at + s * a + t * b) * s * t for s in (1, -1) for t in (1, -1)]
            hessian[i, j] = sum(corners) / (4 * step[i] * step[j])
    errors = np.sqrt(np.diag(np.linalg.inv(hessian / 2)))
    assert table["sdcor_se"].iloc[0] == pytest.approx(errors[0], rel=1e-4)
    assert fit.scale_se == pytest.approx(errors[2], rel=1e-4)


def test_zero_slope_variance() -> None:
    """Uncorrelated effects with one at zero: the model without it, and no error for it."""
    data, fit = find(
        "intercept only", DIAGONAL, lambda fit: fit.singular and fit.cov_re.iloc[0, 0] > 0
    )
    without = lmmax.fit("y ~ x + z + (1 | g)", data)
    assert fit.cov_re.loc["z", "z"] == 0.0
    assert fit.convergence.boundary == ("(1 + z || g)",)
    assert fit.deviance == pytest.approx(without.deviance, rel=1e-12)
    assert fit.scale == pytest.approx(without.scale, rel=1e-7)
    np.testing.assert_allclose(fit.params, without.params, rtol=1e-7)
    np.testing.assert_allclose(fit.bse, without.bse, rtol=1e-7)
    variance = fit.cov_re.loc["Intercept", "Intercept"]
    assert variance == pytest.approx(without.cov_re.iloc[0, 0], rel=1e-6)
    error = fit.cov_re_se.loc["Intercept", "Intercept"]
    assert error == pytest.approx(without.cov_re_se.iloc[0, 0], rel=1e-6)
    assert fit.scale_se == pytest.approx(without.scale_se, rel=1e-6)
    assert np.isnan(fit.cov_re_se.loc["z", "z"])
    assert (fit.random_effects["z"] == 0.0).all()
    np.testing.assert_allclose(
        fit.random_effects["Intercept"], without.random_effects["Intercept"], atol=1e-7
    )
    table = fit.varcorr().set_index("var1")
    assert table.loc["z", ["vcov", "sdcor"]].tolist() == [0.0, 0.0]
    assert table.loc["z", ["vcov_se", "sdcor_se"]].isna().all()


@pytest.mark.parametrize("formula", [SLOPE, DIAGONAL])
def test_no_variance_at_all(formula: str) -> None:
    """No standard error, correlation or text that is zero by accident."""
    data, fit = find("nothing", formula, lambda fit: not fit.cov_re.to_numpy().any())
    assert_least_squares(fit, matrices(data, "1xz", "1z"))
    assert fit.cov_re_se.isna().all(axis=None)
    table = fit.varcorr().set_index(["group", "var1", "var2"])
    effects = table.loc["g"]
    assert effects[["vcov_se", "sdcor_se"]].isna().all(axis=None)
    assert (effects["vcov"] == 0.0).all()
    if formula == SLOPE:
        assert np.isnan(effects.loc[("Intercept", "z"), "sdcor"])
    # The residual's is that of least squares, sqrt(2 / (n - p)) of the scale.
    assert fit.scale_se == pytest.approx(fit.scale * np.sqrt(2 / fit.df_resid), rel=1e-6)
    assert np.isfinite(fit.bse).all() and np.isfinite(fit.predict(data)).all()


def test_one_singular_term_beside_a_regular_one() -> None:
    data, fit = find(
        "intercept only",
        "y ~ x + z + (1 | g) + (0 + z | g)",
        lambda fit: fit.singular and fit.cov_re.iloc[0, 0] > 0,
    )
    assert fit.convergence.boundary == ("(0 + z | g)",)
    assert "(0 + z | g)" in fit.message and "(1 | g)" not in fit.message
    certify(fit, matrices(data, "1xz", "1z"), diagonal=True)


def test_fixed_zero_variance_is_not_called_singular() -> None:
    """The flag is about estimates: a value the user chose says nothing."""
    data = simulate(0, 1.0)
    fit = lmmax.fit(INTERCEPT, data, fix={"cov_re": 0.0})
    assert fit.converged and not fit.singular
    assert_least_squares(fit, matrices(data, "1x", "1"))


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_the_flag_does_not_depend_on_units(unit: float) -> None:
    for seed in range(8):
        data = simulate(seed, TRUTHS["correlation one"])
        plain = lmmax.fit(SLOPE, data)
        fit = lmmax.fit(SLOPE, data.assign(z=unit * data["z"], y=data["y"] / unit))
        assert fit.singular == plain.singular and fit.converged
        scaled = fit.cov_re.to_numpy() * np.outer([1, unit], [1, unit]) * unit**2
        np.testing.assert_allclose(scaled, plain.cov_re, rtol=1e-6, atol=1e-9)


def test_hessian_at_the_boundary_is_positive_on_what_is_free() -> None:
    """A strict maximum: no curvature below zero in any direction of the working parameters."""
    for seed in range(10):
        for truth in TRUTHS:
            fit = lmmax.fit(SLOPE, simulate(seed, TRUTHS[truth]))
            values = fit.convergence.hessian_eigenvalues
            assert values[0] > -1e-8 * values[-1]
            assert fit.convergence.decrement < 1e-9
