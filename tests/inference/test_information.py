"""Information matrices and the conditional AIC against dense formulas and refitting."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.inference.information import conditional_aic, information, joint_covariance, score
from tests.inference.test_denominator import KINDS, dense_of, fitted, projection


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_information_is_that_of_the_dense_model(kind: str, reml: bool) -> None:
    fit, case = fitted(kind, reml)
    at = dense_of(fit, case)
    inverse, _, R = projection(at)
    T = R if reml else inverse
    r = at.y - at.X @ fit.params.to_numpy()
    p, s = at.X.shape[1], inverse @ r
    traces = np.array([[np.trace(T @ a @ T @ b) for b in at.G] for a in at.G])
    forms = np.array([[s @ a @ inverse @ b @ s for b in at.G] for a in at.G])
    cross = np.array([at.X.T @ inverse @ g @ s for g in at.G])
    fixed = at.X.T @ inverse @ at.X
    for name, own, between in (
        ("observed", forms - 0.5 * traces, cross),
        ("expected", 0.5 * traces, 0.0 * cross),
    ):
        found = information(fit, name).to_numpy()
        size = np.sqrt(np.diag(information(fit, "expected")))
        found = found / np.outer(size, size)
        expected = np.block([[fixed, between.T], [between, own]]) / np.outer(size, size)
        np.testing.assert_allclose(found, expected, rtol=0.0, atol=1e-9)
    slope = 0.5 * np.array([s @ g @ s - np.trace(T @ g) for g in at.G])
    steady = fit.natural_parameters.steady
    found = score(fit) @ steady.slope @ steady.forward
    np.testing.assert_allclose(found / size[p:], slope / size[p:], atol=1e-6)


def test_theta_by_differences(sleepstudy_slope: lmmax.Fit) -> None:
    """The Hessian of the dense log-likelihood in (beta, theta, scale)."""
    fit = sleepstudy_slope.refit_ml()
    X, y = fit.design.X, fit.design.y
    codes = fit.design.groupings[0].codes
    same = codes[:, None] == codes

    def minus_logl(x: np.ndarray) -> float:
        L = np.array([[x[2], 0.0], [x[3], x[4]]])
        V = x[5] * (np.eye(len(y)) + same * (X @ L @ L.T @ X.T))
        r = y - X @ x[:2]
        return float(0.5 * (np.linalg.slogdet(V)[1] + r @ np.linalg.solve(V, r)))

    at = np.concatenate([fit.params, fit.theta_parameters.values])
    matrix = information(fit, parameters="theta")
    step = 1e-3 / np.sqrt(np.diag(matrix))
    moves = np.diag(step)
    hessian = np.empty_like(matrix)
    for i, a in enumerate(moves):
        for j, b in enumerate(moves):
            corners = [minus_logl(at + s * a + t * b) * s * t for s in (1, -1) for t in (1, -1)]
            hessian[i, j] = sum(corners) / (4.0 * step[i] * step[j])
    unit = np.outer(step, step) * 1e6
    np.testing.assert_allclose(matrix * unit, hessian * unit, rtol=0.0, atol=2e-5)
    assert list(matrix)[2:] == [
        "Subject: theta(Intercept)",
        "Subject: theta(Intercept, Days)",
        "Subject: theta(Days)",
        "scale",
    ]


def test_joint_covariance(sleepstudy_slope: lmmax.Fit) -> None:
    """Its blocks are the covariance of the coefficients and the errors in ``varcorr``."""
    cov = joint_covariance(sleepstudy_slope)
    np.testing.assert_allclose(cov.iloc[:2, :2], sleepstudy_slope.cov_params(), rtol=1e-9)
    errors = np.sqrt(np.diag(cov))[2:]
    table = sleepstudy_slope.varcorr()
    order = [0, 2, 1, 3]  # variances first there
    np.testing.assert_allclose(errors[order], table["vcov_se"], rtol=1e-6)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize(
    ("formula", "name"),
    [
        ("Yield ~ 1 + (1 | Batch)", "dyestuff"),
        ("Yield ~ 1 + (1 | Batch)", "dyestuff2"),  # singular
        ("strength ~ 1 + (1 | batch/cask)", "pastes"),
    ],
)
def test_conditional_aic_by_refitting(formula: str, name: str, reml: bool) -> None:
    """The effective degrees of freedom are the derivative of the fitted values in y."""
    fit = lmmax.fit(formula, lmmax.datasets.load(name), reml=reml)
    y = fit.design.y
    h, trace = 1e-3 * float(np.std(y)), 0.0
    for i, e in enumerate(h * np.eye(len(y))):
        up, down = fit.refit(y + e), fit.refit(y - e)
        trace += (up.fittedvalues.iloc[i] - down.fittedvalues.iloc[i]) / (2.0 * h)
    found = conditional_aic(fit)
    assert found.df == pytest.approx(trace, rel=1e-6)
    sd = np.sqrt(fit.scale)
    llf = float(np.sum(-0.5 * (fit.resid / sd) ** 2 - np.log(sd * np.sqrt(2.0 * np.pi))))
    assert found.llf == pytest.approx(llf, rel=1e-10)
    assert found.caic == pytest.approx(-2.0 * llf + 2.0 * (trace + 1.0), rel=1e-7)
    known = conditional_aic(fit, correction=False)
    assert (known.df, known.rho) == (found.rho, found.rho)
    assert f"{found.caic:.4f}" in str(found)


def test_effective_degrees_of_freedom_with_weights() -> None:
    """The trace of the dense matrix that maps y to its fitted values."""
    fit, case = fitted("weights")
    at = dense_of(fit, case)
    _, _, R = projection(at)
    assert case.model.weights is not None
    hat = np.eye(len(at.y)) - fit.scale * np.diag(1.0 / case.model.weights) @ R
    assert conditional_aic(fit, correction=False).rho == pytest.approx(np.trace(hat), rel=1e-9)


def test_errors(sleepstudy_slope: lmmax.Fit) -> None:
    with pytest.raises(ValueError, match="kind='fisher' is unknown; use 'observed' or 'expected'"):
        information(sleepstudy_slope, "fisher")
    with pytest.raises(ValueError, match="parameters='sd' is unknown; use 'natural' or 'theta'"):
        joint_covariance(sleepstudy_slope, parameters="sd")


def test_mean_predictions(sleepstudy_slope: lmmax.Fit) -> None:
    """Those at a row of X are the test of that contrast; rows with missing values are NaN."""
    new = pd.DataFrame({"Days": [0.0, np.nan, 9.0]}, index=["a", "b", "c"])
    for ddf in ("satterthwaite", "kenward-roger", "normal"):
        table = sleepstudy_slope.predict_mean(new, ddf=ddf, alpha=0.1)
        assert table.loc["b"].isna().all()
        tests = sleepstudy_slope.t_test([[1.0, 0.0], [1.0, 9.0]], alpha=0.1, ddf=ddf).table
        wanted = [name for name in tests if name not in ("t", "z", "p")]
        np.testing.assert_allclose(table.dropna(), tests[wanted], rtol=1e-12)
    whole = sleepstudy_slope.predict_mean()
    np.testing.assert_allclose(whole["predicted"], sleepstudy_slope.fittedvalues_marginal)
