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
from tests.compiled import jit, oracle
from tests.likelihood.test_several import covariance, made
from tests.oracles.problems import simulate

CASES = ["grouped", "nested_slope", "crossed_slopes"]


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


EXPAND = jit(likelihood.expand)
HELD = jit(likelihood.derivatives)
VALUE = oracle(reduced)
SLOPE = oracle(jax.jacfwd(reduced, argnums=1))


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("kind", CASES)
def test_slopes_equal_autodiff(kind: str, rank: int | None) -> None:
    """The contracted second derivatives are compared with autodiff in test_several."""
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
    size = float(np.max(np.abs(S)))
    np.testing.assert_allclose(found.at.S, S, rtol=0.0, atol=1e-12 * size)
    assert float(found.at.logdet) == pytest.approx(float(logdet), rel=1e-12)
    for ours, target in (
        (found.at.S_slope[used], np.moveaxis(S_slope, -1, 0)[at]),
        (found.at.logdet_slope[used], logdet_slope[at]),
    ):
        np.testing.assert_allclose(ours, target, rtol=0.0, atol=1e-9 * np.max(np.abs(target)))


@pytest.mark.parametrize("kind", CASES)
def test_second_derivatives_equal_central_differences_of_the_first(kind: str) -> None:
    problem, inside = problem_of(kind)
    with jax.enable_x64(True):
        A = np.asarray(problem.z_factor)
        D = A @ covariance(inside, 5) @ A.T
        found = EXPAND(problem, D)
        place = likelihood.block_entries(problem.slices, len(D))
        positions = np.flatnonzero(pack_triangle(inside)[place] > 0.0)
        h = 1e-5 * float(np.min(np.linalg.eigvalsh(D)))
        for c in positions:
            E = np.asarray(unpack_symmetric(np.eye(len(pack_triangle(D)))[place[c]]))
            up, down = EXPAND(problem, D + h * E).at, EXPAND(problem, D - h * E).at
            for ours, slopes in (
                (found.S_bend[c], (up.S_slope - down.S_slope) / (2.0 * h)),
                (found.logdet_bend[c], (up.logdet_slope - down.logdet_slope) / (2.0 * h)),
            ):
                target = slopes[positions]
                size = np.max(np.abs(target))
                np.testing.assert_allclose(ours[positions], target, rtol=0.0, atol=1e-6 * size)


@pytest.mark.parametrize("kind", CASES)
def test_held_coefficient_equals_a_column_moved_to_the_response(kind: str) -> None:
    """ML with a coefficient held is ML without its column, its part taken out of the response."""
    problem, inside = problem_of(kind)
    p, j, value, s = len(problem.beta_origin), 1, 0.3, np.float64(-4.0)
    T = np.delete(np.eye(p + 1), j, axis=1)
    T[j, -1] = -value
    with jax.enable_x64(True):
        A = np.asarray(problem.z_factor)
        D = A @ covariance(inside, 5) @ A.T
        hold = likelihood.Hold(np.eye(p)[j], jnp.asarray(value))

        def without(D: np.ndarray, s: float) -> float:
            S, logdet = VALUE(problem, pack_triangle(D))
            S = T.T @ np.asarray(S) @ T
            rss = S[-1, -1] - S[-1, :-1] @ np.linalg.solve(S[:-1, :-1], S[:-1, -1])
            n = float(problem.n_obs)
            return float(logdet) + n * (np.log(2.0 * np.pi) + s) + rss * np.exp(-s)

        at = HELD(problem, D, 0.0, s, False, hold)
        assert float(at.value) == pytest.approx(without(D, s), rel=1e-12)
        assert at.beta[j] == pytest.approx(value, abs=1e-12)
        free = np.append(pack_triangle(inside) > 0.0, True)
        size = float(np.max(np.abs(at.hessian)))
        h = 1e-5 * float(np.min(np.linalg.eigvalsh(D)))
        for c in np.flatnonzero(free):
            step = h * np.eye(len(free))[c]
            move = np.asarray(unpack_symmetric(step[:-1]))
            ends = [(D + sign * move, s + sign * step[-1]) for sign in (1.0, -1.0)]
            up, down = (without(*end) for end in ends)
            assert at.gradient[c] == pytest.approx((up - down) / (2.0 * h), abs=1e-8 * size)
            above, below = (HELD(problem, end[0], 0.0, end[1], False, hold) for end in ends)
            column = (above.gradient - below.gradient) / (2.0 * h)
            np.testing.assert_allclose(at.hessian[c][free], column[free], atol=1e-6 * size)
        nothing = HELD(problem, D, 0.0, s, False, likelihood.Hold(np.zeros(p), jnp.asarray(value)))
        plain = HELD(problem, D, 0.0, s, False)
    assert float(nothing.value) == float(plain.value)
