"""Structures over many levels: derivatives along few directions against those in all entries."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax import compress, likelihood
from lmmax.likelihood.grouped import MANY_EFFECTS
from lmmax.likelihood.problem import Hold
from lmmax.parameters import pack_triangle
from tests.compiled import jit, oracle

pytestmark = pytest.mark.unoptimised

Q = MANY_EFFECTS + 1


def simulate(q: int, m: int, kept: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Series of q times for m subjects, a part of the rows kept."""
    rng = np.random.default_rng(seed)
    lags = np.abs(np.subtract.outer(np.arange(q), np.arange(q)))
    series = 1.5 * rng.normal(size=(m, q)) @ np.linalg.cholesky(0.7**lags).T
    data = pd.DataFrame(
        {
            "g": np.repeat(np.arange(m), q),
            "t": np.tile(np.arange(q), m),
            "x": rng.normal(size=m * q),
            "y": series.ravel() + rng.normal(size=m * q),
        }
    )
    return data[rng.uniform(size=len(data)) < kept]


@cache
def fitted() -> lmmax.Fit:
    """A fit with several patterns of missing times, some of them shared."""
    whole, lacking = simulate(Q, 12), simulate(Q, 12, 0.8, seed=1)
    data = pd.concat([whole, lacking.assign(g=lacking["g"] + 12)])
    return lmmax.fit("y ~ x + ar1(0 + C(t) | g)", data)


def points() -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """The problem, the same without shared factors, a covariance, and directions."""
    problem = fitted().compression.problem
    rng = np.random.default_rng(2)
    D, *directions = (a @ a.T / Q for a in rng.normal(size=(4, Q, Q)))
    return problem, replace(problem, patterns=None), D, np.stack(directions)


def derivatives(problem: Any, D: Any, reml: Any, hold: Any, directions: Any = None) -> Any:
    s = jnp.log(0.3 / problem.n_obs)
    return likelihood.derivatives(problem, D, reml, s, reml > 0.0, hold, directions)


DERIVATIVES = jit(derivatives)
EXPAND = jit(likelihood.expand)


def test_groups_of_one_pattern_share_its_factor() -> None:
    first, of = fitted().compression.problem.patterns
    assert len(np.unique(of)) < fitted().compression.problem.U.shape[2]
    U = fitted().compression.problem.U
    np.testing.assert_array_equal(U[:, :, first[of]], U)


@pytest.mark.parametrize("reml", [1.0, 0.0])
def test_derivatives_equal_contracted_ones(reml: float) -> None:
    problem, plain, D, E = points()
    width = len(problem.beta_origin)
    hold = Hold(np.arange(width) * 0.5, 0.1)
    with jax.enable_x64(True):
        found, entries = jax.tree.map(
            np.asarray, (DERIVATIVES(problem, D, reml, hold, E), DERIVATIVES(plain, D, reml, hold))
        )
    to = np.zeros((len(entries.gradient), len(E) + 1))
    to[:-1, :-1] = pack_triangle(np.moveaxis(E, 0, -1))
    to[-1, -1] = 1.0
    hessian = to.T @ entries.hessian @ to
    np.testing.assert_allclose(found.value, entries.value, rtol=1e-13)
    np.testing.assert_allclose(
        found.gradient, entries.gradient, rtol=0.0, atol=1e-11 * np.abs(entries.gradient).max()
    )
    np.testing.assert_allclose(found.hessian, hessian, rtol=0.0, atol=1e-11 * np.abs(hessian).max())
    slopes = np.tensordot(to[:-1, :-1].T, entries.x_slope, 1)
    np.testing.assert_allclose(found.x_slope, slopes, rtol=0.0, atol=1e-12 * np.abs(slopes).max())


def test_expansion_equals_contracted_one() -> None:
    problem, plain, D, E = points()
    with jax.enable_x64(True):
        found, entries = jax.tree.map(np.asarray, (EXPAND(problem, D, E), EXPAND(plain, D)))
    to = pack_triangle(np.moveaxis(E, 0, -1))
    wanted = (
        (found.at.logdet_slope, to.T @ entries.at.logdet_slope),
        (found.at.S_slope, np.tensordot(to.T, entries.at.S_slope, 1)),
        (found.logdet_bend, to.T @ entries.logdet_bend @ to),
        (found.S_bend, np.einsum("ac,abxy,bd->cdxy", to, entries.S_bend, to, optimize=True)),
    )
    for ours, theirs in wanted:
        np.testing.assert_allclose(ours, theirs, rtol=0.0, atol=1e-11 * np.abs(theirs).max())


def test_reduction_and_its_slope() -> None:
    problem, plain, D, E = points()

    def total(problem: Any, t: Any) -> Any:
        S, logdet = likelihood.reduce(problem, D + t * E[0])
        return jnp.sum(S * jnp.arange(S.size).reshape(S.shape)) + logdet

    for order in (total, jax.grad(total, 1), jax.grad(jax.grad(total, 1), 1)):
        function = oracle(order)
        with jax.enable_x64(True):
            np.testing.assert_allclose(function(problem, 0.3), function(plain, 0.3), rtol=1e-9)


@pytest.mark.parametrize("terms", ["ar1(0 + C(t) | g)", "(1 + x | g) + hetar1(0 + C(t) | g)"])
def test_everything_asked_of_a_fit(terms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fit finds along few directions is what it finds in all entries of D."""
    data = simulate(Q, 30, 0.9, seed=3)
    found = lmmax.fit(f"y ~ x + {terms}", data)
    for module in (likelihood.grouped, compress.grouped):
        monkeypatch.setattr(module, "MANY_EFFECTS", 100)
    plain = lmmax.fit(f"y ~ x + {terms}", data)
    assert found.estimates.narrow
    assert not plain.estimates.narrow
    assert found.status == plain.status == "converged"
    assert found.singular == plain.singular
    assert found.deviance == pytest.approx(plain.deviance, rel=1e-11)
    for name in ("structures", "varcorr", "coefficients"):
        ours, theirs = (
            getattr(each, name)().select_dtypes("number").to_numpy(float) for each in (found, plain)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(
        found.convergence.hessian_eigenvalues, plain.convergence.hessian_eigenvalues, rtol=1e-5
    )


def test_forty_times_and_what_they_cost() -> None:
    """The criterion is the dense one, lowest at the estimates; the Hessian has their size only."""
    q, m = 40, 12
    data = simulate(q, m, seed=4)
    fit = lmmax.fit("y ~ 1 + ar1(0 + C(t) | g)", data, reml=False)
    assert fit.converged
    point = fit.estimates.solution.point
    assert point.hessian.shape == (3, 3)
    assert point.at.hessian.shape == (4, 4)
    assert fit.varcorr()["vcov_se"].notna().sum() == q + q * (q - 1) // 2 + 1
    y = data["y"].to_numpy().reshape(m, q)
    lags = np.abs(np.subtract.outer(np.arange(q), np.arange(q)))

    def dense(sd: float, rho: float, scale: float) -> float:
        V = sd**2 * rho**lags + scale * np.eye(q)
        weights = np.linalg.solve(V, np.ones(q))
        residual = y - (y @ weights).sum() / (m * weights.sum())
        quadratic = np.sum(residual * np.linalg.solve(V, residual.T).T)
        return float(m * (np.linalg.slogdet(V)[1] + q * np.log(2.0 * np.pi)) + quadratic)

    sd, rho = fit.structures()["estimate"]
    at = np.array([sd, rho, fit.scale])
    best = dense(*at)
    assert fit.deviance == pytest.approx(best, rel=1e-11)
    for step in 1e-3 * np.vstack([np.eye(3), -np.eye(3)]):
        assert dense(*(at * (1.0 + step))) > best
