"""The pure layer under jit, vmap, grad and in float32; and batches that must not hang."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmmax
from lmmax import functional
from tests.compiled import jit
from tests.simulate import simulate

SOLVE = jit(functional.solve)
CRITERION = jit(functional.criterion)
COMPRESS = jit(functional.padded_problem)
SIZES = np.full(20, 6)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def balanced(seed: int) -> dict[str, Any]:
    """Groups of equal size with rows in order, so that problems stack."""
    case = simulate(seed, sizes=SIZES)
    order = np.argsort(case["codes"], kind="stable")
    return {name: None if value is None else value[order] for name, value in case.items()}


def problem_of(case: dict[str, Any]) -> functional.Problem:
    return functional.problem(case["y"], case["X"], case["codes"], case["Z"])


def padded(case: dict[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
    m, h = len(SIZES), SIZES[0]
    y = case["y"].reshape(m, h).T
    X = case["X"].T.reshape(-1, m, h).transpose(0, 2, 1)
    Z = case["Z"].T.reshape(-1, m, h).transpose(0, 2, 1)
    return jnp.asarray(y), jnp.asarray(X), jnp.asarray(Z)


@pytest.mark.parametrize("reml", [True, False])
def test_solve_equals_fit(reml: bool) -> None:
    case = balanced(1)
    optimum = SOLVE(problem_of(case), reml)
    fit = lmmax.fit_arrays(case["y"], case["X"], case["codes"], case["Z"], reml=reml)
    assert int(optimum.status) == 1
    assert float(optimum.criterion) == pytest.approx(fit.deviance, rel=1e-12)
    # Singular here: a factor's last pivot is good to half the digits.
    assert np.allclose(optimum.theta, fit.theta, rtol=1e-8, atol=1e-7)
    assert np.allclose(optimum.beta, fit.params, rtol=1e-9)
    assert np.allclose(optimum.beta_cov, fit.cov_params(), rtol=1e-8, atol=1e-12)
    assert np.allclose(optimum.cov_re, fit.cov_re, rtol=1e-8, atol=1e-12)
    assert float(optimum.scale) == pytest.approx(fit.scale, rel=1e-9)


def test_float32_after_a_fit_in_float64() -> None:
    """High-level fits compute in float64 and must leave no trace in the process."""
    case = balanced(1)
    fit = lmmax.fit_arrays(case["y"], case["X"], case["codes"], case["Z"])
    with jax.enable_x64(False):
        optimum = jit(lambda p: functional.solve(p))(problem_of(case))
        assert optimum.beta.dtype == jnp.float32
    assert float(optimum.criterion) == pytest.approx(fit.deviance, rel=1e-5)


def test_start_needs_fewer_steps_and_finds_the_same_optimum() -> None:
    problem = problem_of(balanced(1))
    cold = SOLVE(problem)
    warm = SOLVE(problem, start=cold.theta)
    assert int(warm.steps) < int(cold.steps)
    assert float(warm.criterion) == pytest.approx(float(cold.criterion), rel=1e-13)


def test_vmap_over_problems_equals_one_by_one() -> None:
    problems = [problem_of(balanced(seed)) for seed in range(8)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *problems)
    together = jit(jax.vmap(functional.solve))(stacked)
    values = jit(jax.vmap(functional.criterion))(stacked, together.theta)
    assert np.allclose(values, together.criterion, rtol=1e-12)
    for i, problem in enumerate(problems):
        alone = SOLVE(problem)
        assert int(together.status[i]) == int(alone.status) == 1
        assert float(together.criterion[i]) == pytest.approx(float(alone.criterion), rel=1e-12)
        assert np.allclose(together.theta[i], alone.theta, rtol=1e-7, atol=1e-7)


def test_padded_problem_equals_the_host_compression() -> None:
    case = balanced(3)
    inside = COMPRESS(*padded(case))
    theta = jnp.array([0.7, -0.2, 0.5])
    for reml in (True, False):
        assert float(CRITERION(inside, theta, reml)) == pytest.approx(
            float(CRITERION(problem_of(case), theta, reml)), rel=1e-12
        )


def test_padded_rows_count_for_nothing() -> None:
    y, X, Z = padded(balanced(3))
    inside = COMPRESS(y, X, Z)
    rows = ((0, 2), (0, 0))
    longer = COMPRESS(jnp.pad(y, rows), jnp.pad(X, ((0, 0), *rows)), jnp.pad(Z, ((0, 0), *rows)))
    theta = jnp.array([0.7, -0.2, 0.5])
    assert float(CRITERION(longer, theta)) == pytest.approx(float(CRITERION(inside, theta)))


def test_optimum_is_differentiable_in_the_data() -> None:
    y, X, Z = padded(balanced(2))
    direction = jnp.asarray(np.random.default_rng(0).normal(size=y.shape))

    def packed(optimum: functional.Optimum) -> jax.Array:
        return jnp.concatenate([optimum.theta, optimum.beta, optimum.scale[None]])

    def estimates(t: jax.Array) -> jax.Array:
        return packed(functional.solve(functional.padded_problem(y + t * direction, X, Z)))

    forward = jit(jax.jacfwd(estimates))(0.0)
    backward = jit(jax.jacrev(estimates))(0.0)
    h = 1e-4
    values = [packed(SOLVE(COMPRESS(y + k * h * direction, X, Z))) for k in (-2, -1, 1, 2)]
    central = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
    assert np.allclose(forward, central, rtol=1e-6, atol=1e-7)
    assert np.allclose(backward, forward, rtol=1e-9, atol=1e-12)


def test_derivative_at_a_boundary_keeps_the_variance_at_zero() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(6, 20))
    noise -= noise.mean(axis=0)  # less variation between groups than chance gives
    y, X, Z = jnp.asarray(noise), jnp.ones((1, 6, 20)), jnp.ones((1, 6, 20))

    def theta(t: jax.Array) -> jax.Array:
        return functional.solve(functional.padded_problem(y * (1.0 + t * X[0]), X, Z)).theta[0]

    value, slope = jit(jax.value_and_grad(theta))(0.0)
    assert float(value) < 1e-6
    assert abs(float(slope)) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.r_[np.nan, np.zeros(119)]}, "y has missing or infinite values"),
        ({"X": np.ones((120, 2))}, "linear combinations"),
        ({"Z": np.ones((119, 1))}, "Z has 119 rows, y has 120"),
    ],
)
def test_bad_arrays(change: dict[str, Any], message: str) -> None:
    case = {**balanced(1), **change}
    with pytest.raises(ValueError, match=message):
        problem_of(case)


BATCH = """
import jax, jax.numpy as jnp, numpy as np
from lmmax import functional
from lmmax.compilation import CPU_OPTIONS
rng = np.random.default_rng(0)
with jax.enable_x64(True):
    m, h, models = 6, 8, 20_000
    Z = jnp.asarray(rng.normal(size=(3, h, m))).at[0].set(1.0)
    X = Z[:2]
    b = rng.normal(size=(models, 3, m))
    y = jnp.asarray(np.einsum("qhm,kqm->khm", Z, b) + rng.normal(size=(models, h, m)))
    solve = jax.jit(
        jax.vmap(lambda y: functional.solve(functional.padded_problem(y, X, Z))),
        compiler_options=CPU_OPTIONS,
    )
    optimum = jax.block_until_ready(solve(y))
    print(int(jnp.sum(optimum.status == 1)))
"""


def test_a_large_batch_of_models_does_not_hang() -> None:
    """Batched LAPACK calls can deadlock on CPU; none may be in the graph."""
    done = subprocess.run(
        [sys.executable, "-c", BATCH], capture_output=True, text=True, timeout=300, check=True
    )
    assert int(done.stdout) == 20_000


def test_no_lapack_call_in_the_graph() -> None:
    case = balanced(1)
    text = jax.jit(functional.solve).lower(problem_of(case)).as_text()
    assert "lapack" not in text.lower()
