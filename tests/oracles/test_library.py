"""The library's criterion, derivatives, and predictions equal those of the oracles."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import lmmax
from lmmax import functional
from tests.compiled import jit
from tests.oracles import dense
from tests.oracles import lindstrom_bates as lb
from tests.oracles.problems import simulate

CRITERION = jit(functional.criterion)
GRADIENT = jit(jax.grad(functional.criterion, argnums=1))
HESSIAN = jit(jax.hessian(functional.criterion, argnums=1))
CASES = [(q, reml, weighted) for q in (1, 2, 3) for reml in (True, False) for weighted in (0, 1)]


@pytest.fixture(params=CASES, ids=lambda c: f"q{c[0]}-{'reml' if c[1] else 'ml'}-w{c[2]}")
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    q, reml, weighted = request.param
    rng = np.random.Generator(np.random.PCG64(30 + q))
    theta = rng.standard_normal(q * (q + 1) // 2)
    return {"data": simulate(20 + q, q, bool(weighted)), "theta": theta, "q": q, "reml": reml}


def problem_of(data: dict[str, Any]) -> functional.Problem:
    return functional.problem(
        data["y"], data["X"], data["codes"], data["Z"], weights=data["weights"]
    )


def thetas(case: dict[str, Any]) -> list[np.ndarray]:
    """A regular point, a singular one (last column of the factor zero), and zero."""
    factor = lb.unpack_factor(case["theta"], case["q"])
    singular = factor.copy()
    singular[:, -1] = 0.0
    lower = np.tril_indices(case["q"])
    return [factor[lower], singular[lower], 0 * factor[lower]]


def test_criterion(case: dict[str, Any]) -> None:
    problem = problem_of(case["data"])
    for theta in thetas(case):
        L = lb.unpack_factor(theta, case["q"])
        expected = dense.criterion(**case["data"], D=L @ L.T, reml=case["reml"])
        with jax.enable_x64(True):
            got = float(CRITERION(problem, theta, case["reml"]))
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-10)


def test_gradient_and_hessian(case: dict[str, Any]) -> None:
    problem, reml = problem_of(case["data"]), case["reml"]
    for theta in thetas(case):
        gradient, hessian = lb.derivatives_theta(**case["data"], theta=theta, reml=reml)
        with jax.enable_x64(True):
            got_gradient = GRADIENT(problem, theta, reml)
            got_hessian = HESSIAN(problem, theta, reml)
        np.testing.assert_allclose(got_gradient, gradient, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got_hessian, hessian, rtol=1e-9, atol=1e-9)


def fit_balanced(q: int, reml: bool, weighted: bool) -> tuple[lmmax.Fit, dict[str, Any]]:
    """A regular fit: groups large enough for an interior optimum."""
    rng = np.random.Generator(np.random.PCG64(50 + q))
    codes = np.repeat(np.arange(15), 8 + np.arange(15) % 4)
    n = len(codes)
    Z = np.column_stack([np.ones(n), rng.standard_normal((n, 2))])[:, :q]
    X = np.column_stack([np.ones(n), rng.standard_normal((n, 2))])
    effects = rng.standard_normal((15, q)) * [2.0, 1.0, 1.5][:q]
    y = X @ [3.0, 1.0, -1.0] + (Z * effects[codes]).sum(1) + rng.standard_normal(n)
    w = rng.uniform(0.5, 2.0, n) if weighted else None
    fit = lmmax.fit_arrays(y, X, codes, Z, reml=reml, weights=w)
    return fit, {"y": y, "X": X, "Z": Z, "codes": codes, "weights": w}


@pytest.mark.parametrize(("q", "reml", "weighted"), CASES)
def test_fit(q: int, reml: bool, weighted: int) -> None:
    fit, data = fit_balanced(q, reml, bool(weighted))
    assert fit.converged
    assert not fit.singular
    Z, codes, w = data["Z"], data["codes"], data["weights"]
    cov_re = fit.cov_re.to_numpy()
    D = cov_re / fit.scale
    assert fit.deviance == pytest.approx(dense.criterion(**data, D=D, reml=reml), rel=1e-11)
    assert fit.scale == pytest.approx(dense.profiled_scale(**data, D=D, reml=reml), rel=1e-9)
    beta, A, _ = dense.gls(data["y"], data["X"], dense.covariance(Z, codes, D, w))
    np.testing.assert_allclose(fit.params, beta, rtol=1e-9)
    np.testing.assert_allclose(fit.cov_params(), fit.scale * np.linalg.inv(A), rtol=1e-8)
    modes = dense.conditional_modes(**data, D=D)
    np.testing.assert_allclose(fit.random_effects, modes, rtol=1e-8, atol=1e-9)
    covariances = dense.conditional_covariance(Z, codes, D, fit.scale, w)
    np.testing.assert_allclose(fit.random_effects_cov, covariances, rtol=1e-8, atol=1e-10)
    gradient, hessian = lb.derivatives_theta(
        **data, theta=np.linalg.cholesky(D)[np.tril_indices(q)], reml=reml
    )
    step = np.linalg.solve(hessian, gradient)
    assert abs(gradient @ step) < 1e-9

    score, information = dense.score_and_information(
        **data, cov_re=cov_re, scale=fit.scale, reml=reml
    )
    errors = np.sqrt(np.diag(np.linalg.inv(information)))
    assert np.abs(score * errors).max() < 1e-4
    np.testing.assert_allclose(fit.cov_re_se.to_numpy()[np.tril_indices(q)], errors[:-1], rtol=1e-5)
    assert fit.scale_se == pytest.approx(errors[-1], rel=1e-5)


@pytest.mark.parametrize("reml", [True, False])
def test_variance_errors_of_uncorrelated_effects(reml: bool) -> None:
    """Only the entries that are estimated enter the information."""
    _, data = fit_balanced(2, reml, False)
    fit = lmmax.fit_arrays(
        data["y"], data["X"], data["codes"], data["Z"], reml=reml, covariance="diag"
    )
    _, information = dense.score_and_information(
        **data, cov_re=fit.cov_re.to_numpy(), scale=fit.scale, reml=reml, pairs=[(0, 0), (1, 1)]
    )
    errors = np.sqrt(np.diag(np.linalg.inv(information)))
    np.testing.assert_allclose(np.diag(fit.cov_re_se), errors[:2], rtol=1e-5)
    assert fit.scale_se == pytest.approx(errors[-1], rel=1e-5)
