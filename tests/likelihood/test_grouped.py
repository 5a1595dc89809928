"""The criterion and its derivatives against the dense density, closed forms and autodiff."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmax import functional, likelihood
from lmmax.likelihood import grouped
from lmmax.parameters import pack_triangle, unpack_lower
from lmmax.solve import evaluate, unstructured
from tests.compiled import jit, oracle
from tests.oracles import dense, lindstrom_bates
from tests.simulate import simulate


def joint(problem: functional.Problem, x: jax.Array, reml: jax.Array) -> jax.Array:
    """The criterion of (log scale, root of D), by the route that autodiff can follow."""
    q = len(problem.n_groups)
    root = x[1:].reshape(q, q)
    S, logdet = grouped.reduce(problem, root @ root.T)
    d = likelihood.degrees_of_freedom(problem, reml)
    return likelihood.objective(S, logdet, x[0], d, reml)


CRITERION = jit(functional.criterion)
GRADIENT = jit(jax.grad(functional.criterion, argnums=1))
HESSIAN = jit(jax.hessian(functional.criterion, argnums=1))
SOLVE = jit(functional.solve)
EVALUATE = jit(evaluate)
JOINT, JOINT_GRADIENT = oracle(joint), oracle(jax.grad(joint, argnums=1))
JOINT_HESSIAN = oracle(jax.hessian(joint, argnums=1))
CASES = [(q, weighted) for q in (1, 2, 3) for weighted in (False, True)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=CASES, ids=[f"q{q}{'w' if w else ''}" for q, w in CASES])
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    q, weighted = request.param
    return simulate(10 + q, q=q, weighted=weighted)


def problem_of(case: dict[str, Any]) -> functional.Problem:
    return functional.problem(
        case["y"], case["X"], case["codes"], case["Z"], weights=case["weights"]
    )


def random_theta(q: int, seed: int = 0) -> np.ndarray:
    return pack_triangle(np.tril(np.random.default_rng(seed).normal(size=(q, q))))


@pytest.mark.parametrize("reml", [True, False])
def test_criterion_is_the_multivariate_normal_density(case: dict[str, Any], reml: bool) -> None:
    q = case["Z"].shape[1]
    problem = problem_of(case)
    for seed in range(3):
        theta = random_theta(q, seed)
        L = lindstrom_bates.unpack_factor(theta, q)
        expected = dense.criterion(**case, D=L @ L.T, reml=reml)
        assert float(CRITERION(problem, theta, reml)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reml", [True, False])
def test_autodiff_equals_the_closed_forms(case: dict[str, Any], reml: bool) -> None:
    q = case["Z"].shape[1]
    theta = random_theta(q)
    problem = problem_of(case)
    gradient, hessian = lindstrom_bates.derivatives_theta(**case, theta=theta, reml=reml)
    size = np.max(np.abs(hessian))
    ours = GRADIENT(problem, theta, reml)
    assert np.allclose(ours, gradient, rtol=1e-10, atol=1e-10 * size)
    ours = HESSIAN(problem, theta, reml)
    assert np.allclose(ours, hessian, rtol=1e-9, atol=1e-10 * size)


@pytest.mark.parametrize("reml", [True, False])
def test_gradient_equals_central_differences(case: dict[str, Any], reml: bool) -> None:
    theta = random_theta(case["Z"].shape[1])
    problem = problem_of(case)
    gradient = np.asarray(GRADIENT(problem, theta, reml))
    for j, step in enumerate(1e-4 * np.eye(len(theta))):
        # Fourth-order central difference.
        f = [float(CRITERION(problem, theta + k * step, reml)) for k in (-2, -1, 1, 2)]
        difference = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / 12e-4
        assert gradient[j] == pytest.approx(difference, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("reml", [True, False])
def test_newton_derivatives_equal_autodiff(case: dict[str, Any], reml: bool) -> None:
    q = case["Z"].shape[1]
    problem = problem_of(case)
    flag = np.asarray(float(reml))
    L = unpack_lower(random_theta(q, 2))
    point = EVALUATE(problem, unstructured(q), flag, L @ L.T, np.zeros(()), np.zeros(0))
    assert np.allclose(point.root @ point.root.T, L @ L.T, rtol=1e-12, atol=1e-12)
    x = np.append(point.s, point.root)
    free = np.asarray(point.free) > 0.0
    assert np.sum(free) == q * (q + 1) // 2 + 1
    expected = np.asarray(JOINT_HESSIAN(problem, x, flag))[np.ix_(free, free)]
    size = float(np.max(np.abs(expected)))
    assert float(point.at.value) == pytest.approx(float(JOINT(problem, x, flag)), rel=1e-13)
    gradient = np.asarray(JOINT_GRADIENT(problem, x, flag))[free]
    assert np.allclose(point.gradient[free], gradient, rtol=1e-10, atol=1e-11 * size)
    assert np.allclose(point.hessian[np.ix_(free, free)], expected, rtol=1e-9, atol=1e-11 * size)
    assert abs(float(point.gradient[0])) < 1e-10 * size  # the scale is profiled


def test_derivatives_in_the_data_equal_central_differences() -> None:
    case = simulate(7, q=2)
    problem = problem_of(case)
    theta = random_theta(2)
    gradient = jit(jax.grad(functional.criterion))(problem, theta, True)
    rng = np.random.default_rng(0)
    for name in ("U", "Y", "C", "weight"):
        leaf = np.asarray(getattr(problem, name))
        direction = rng.normal(size=leaf.shape)
        if name == "C":
            direction = direction + direction.T

        def moved(t: float, name=name, leaf=leaf, direction=direction) -> float:
            changed = {**vars(problem), name: leaf + t * direction}
            return float(CRITERION(functional.Problem(**changed), theta, True))

        h = 1e-6
        difference = (moved(h) - moved(-h)) / (2 * h)
        assert float(np.sum(getattr(gradient, name) * direction)) == pytest.approx(
            difference, rel=1e-6, abs=1e-6
        )


def test_chunks_of_groups_give_the_same_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    case = simulate(3, sizes=np.random.default_rng(3).integers(1, 7, 64))
    problem = problem_of(case)
    L = unpack_lower(random_theta(2))
    arguments = (problem, unstructured(2), np.asarray(1.0), L @ L.T, np.zeros(()), np.zeros(0))
    whole = EVALUATE(*arguments)
    monkeypatch.setattr(grouped, "CHUNK_GROUPS", 16)
    # A function of its own, since JAX remembers what it traced.
    chunked = jit(lambda *arguments: evaluate(*arguments))(*arguments)
    assert "scan[" in str(jax.make_jaxpr(evaluate)(*arguments))  # the loop over chunks is there
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(chunked), strict=True):
        assert np.allclose(a, b, rtol=1e-11, atol=1e-11 * float(jnp.max(jnp.abs(whole.hessian))))


def test_float32_is_usable() -> None:
    case = simulate(21, q=2, sizes=np.full(30, 8))
    problem = problem_of(case)
    theta = random_theta(2)
    exact = float(CRITERION(problem, theta))
    single = jax.tree.map(lambda leaf: np.float32(leaf), problem)
    with jax.enable_x64(False):
        value = CRITERION(single, jnp.asarray(theta, jnp.float32))
        assert value.dtype == jnp.float32
        assert float(value) == pytest.approx(exact, rel=2e-6)
        optimum = SOLVE(single)
    double = SOLVE(problem)
    assert int(optimum.status) == 1
    assert float(optimum.criterion) == pytest.approx(float(double.criterion), rel=2e-6)
    assert np.allclose(optimum.beta, double.beta, rtol=1e-4)
    assert np.allclose(optimum.cov_re, double.cov_re, rtol=2e-3, atol=1e-4)
