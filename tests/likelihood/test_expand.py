"""The second-order expansion of the reduction, and coefficients that are held."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmax import functional, likelihood
from lmmax.parameters import pack_triangle, unpack_symmetric
from tests.likelihood.test_several import covariance, made
from tests.oracles.problems import simulate

CASES = ["grouped", "nested_slope", "crossed_slopes", "related_slope"]


@cache
def problem_of(kind: str) -> tuple[Any, np.ndarray]:
    """A compressed problem and the mask of D's free entries."""
    if kind == "grouped":
        case = simulate(3, 2, True)
        y, X, groups = case["y"], case["X"], case["codes"]
        problem = functional.problem(y, X, groups, case["Z"], weights=case["weights"])
        return problem, np.ones((2, 2))
    problem, _, inside = made(kind, "nested" if kind.startswith("nested") else "crossed")
    return problem, inside


def reduced(problem: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return likelihood.reduce(problem, unpack_symmetric(x))


EXPAND = jax.jit(likelihood.expand)
VALUE = jax.jit(reduced)
SLOPE = jax.jit(jax.jacfwd(reduced, argnums=1))
BEND = jax.jit(jax.jacfwd(jax.jacfwd(reduced, argnums=1), argnums=1))
HELD = jax.jit(likelihood.derivatives)


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("kind", CASES)
def test_expansion_equals_autodiff(kind: str, rank: int | None) -> None:
    problem, inside = problem_of(kind)
    with jax.enable_x64(True):
        A = np.asarray(problem.z_factor)
        D = A @ covariance(inside, 5, rank) @ A.T
        x = pack_triangle(D)
        found = EXPAND(problem, D)
        place = likelihood.block_entries(problem.slices, len(D))
        used = pack_triangle(inside)[place] > 0.0
        at = place[used]
        S, logdet = VALUE(problem, x)
        S_slope, logdet_slope = SLOPE(problem, x)
        S_bend, logdet_bend = BEND(problem, x)
    size = float(np.max(np.abs(S)))
    np.testing.assert_allclose(found.at.S, S, rtol=0.0, atol=1e-12 * size)
    assert float(found.at.logdet) == pytest.approx(float(logdet), rel=1e-12)
    for ours, target in (
        (found.at.S_slope[used], np.moveaxis(S_slope, -1, 0)[at]),
        (found.at.logdet_slope[used], logdet_slope[at]),
    ):
        np.testing.assert_allclose(ours, target, rtol=0.0, atol=1e-9 * np.max(np.abs(target)))
    # Second derivatives of a singular crossed design are those a little inside.
    tolerance = 1e-4 if rank is not None and kind in ("crossed_slopes", "related_slope") else 1e-9
    pairs = np.ix_(used, used)
    for ours, target in (
        (found.S_bend[pairs], np.moveaxis(S_bend, (-2, -1), (0, 1))[np.ix_(at, at)]),
        (found.logdet_bend[pairs], logdet_bend[np.ix_(at, at)]),
    ):
        np.testing.assert_allclose(ours, target, rtol=0.0, atol=tolerance * np.max(np.abs(target)))


@pytest.mark.parametrize("kind", CASES)
def test_held_coefficient_equals_a_column_moved_to_the_response(kind: str) -> None:
    """ML with a coefficient held is ML without its column, its part taken out of the response."""
    problem, inside = problem_of(kind)
    with jax.enable_x64(True):
        A = np.asarray(problem.z_factor)
        D = A @ covariance(inside, 5) @ A.T
        p, j, value = len(problem.beta_origin), 1, 0.3
        contrast = np.zeros(p)
        contrast[j] = 1.0
        hold = likelihood.Hold(contrast, jnp.asarray(value))

        def without(x: jax.Array) -> jax.Array:
            S, logdet = likelihood.reduce(problem, unpack_symmetric(x[:-1]))
            T = np.delete(np.eye(p + 1), j, axis=1)
            T[j, -1] = -value
            d = likelihood.degrees_of_freedom(problem, 0.0)
            return likelihood.objective(T.T @ S @ T, logdet, x[-1], d, 0.0)

        x = np.append(pack_triangle(D), -4.0)
        at = HELD(problem, D, 0.0, -4.0, False, hold)
        free = np.append(pack_triangle(inside) > 0.0, True)
        expected = float(without(x))
        gradient = jax.jacfwd(without)(x)
        hessian = jax.jacfwd(jax.jacfwd(without))(x)
        nothing = HELD(problem, D, 0.0, -4.0, False, likelihood.Hold(0.0 * contrast, 1.0 * value))
        plain = HELD(problem, D, 0.0, -4.0, False)
    assert float(at.value) == pytest.approx(expected, rel=1e-12)
    assert at.beta[j] == pytest.approx(value, abs=1e-12)
    size = float(np.max(np.abs(hessian)))
    np.testing.assert_allclose(at.gradient[free], gradient[free], rtol=1e-9, atol=1e-10 * size)
    pairs = np.ix_(free, free)
    np.testing.assert_allclose(at.hessian[pairs], hessian[pairs], rtol=1e-8, atol=1e-10 * size)
    assert float(nothing.value) == float(plain.value)
