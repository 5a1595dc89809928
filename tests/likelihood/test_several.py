"""The nested and the crossed form: value, gradient and Hessian against independent computations."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmax import likelihood
from lmmax.compress import compress, layout
from lmmax.compress import crossed as crossed_statistics
from lmmax.design import build_design
from lmmax.fit import arrange
from lmmax.likelihood.cells import DenseCells, SparseCells
from lmmax.parameters import pack_triangle, unpack_symmetric
from tests.compiled import jit, oracle
from tests.oracles.designs import simulate

# Design and form; the nested ones also by the crossed form.
CASES = [
    ("nested", "nested"),
    ("nested", "crossed"),
    ("nested_three", "nested"),
    ("nested_slope", "nested"),
    ("nested_slope", "crossed"),
    ("weights", "crossed"),
    ("terms_of_one_factor", "crossed"),
    ("crossed_nested", "crossed"),
    ("crossed_slopes", "crossed"),
    ("related_slope", "crossed"),
    ("related_alone", "crossed"),
]


def joint(problem: Any, x: jax.Array, reml: float) -> jax.Array:
    """The criterion of (vech D, log scale), by the route that plain autodiff can follow."""
    S, logdet = likelihood.reduce(problem, unpack_symmetric(x[:-1]))
    d = likelihood.degrees_of_freedom(problem, reml)
    return likelihood.objective(S, logdet, x[-1], d, reml)


# Compiled once for each shape, for all tests.
CRITERION = jit(likelihood.criterion)
EVALUATE = jit(likelihood.derivatives)
VALUE, SLOPE = oracle(joint), oracle(jax.jacfwd(joint, argnums=1))
BEND = oracle(jax.jacfwd(jax.jacfwd(joint, argnums=1), argnums=1))


@pytest.fixture(autouse=True)
def double() -> Any:
    with jax.enable_x64(True):
        yield


@cache
def made(kind: str, engine: str) -> tuple[Any, Any, np.ndarray]:
    """The compressed problem, the dense model, and a mask of D's free entries."""
    case = simulate(kind, 1)
    design = build_design(case.formula, case.data, weights=case.weights, relmat=case.relmat or None)
    factors, terms = arrange(design)
    problem = compress(design.y, layout(design.X, factors, design.weights, engine)).problem
    inside = np.zeros((len(problem.z_factor),) * 2)
    for term in terms:
        inside[term.columns, term.columns] = term.pattern
    return problem, case, inside


def covariance(inside: np.ndarray, seed: int, rank: int | None = None) -> np.ndarray:
    """A random relative covariance with the given blocks, singular if its rank is limited."""
    q = len(inside)
    root = np.random.default_rng(seed).normal(size=(q, q))
    D = np.zeros((q, q))
    for i in range(q):
        block = np.flatnonzero(inside[i])
        if block[0] == i:
            part = root[np.ix_(block, block)][:, :rank]
            D[np.ix_(block, block)] = part @ part.T
    return D


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize(("kind", "engine"), CASES)
def test_criterion_is_that_of_the_dense_model(kind: str, engine: str, reml: bool) -> None:
    problem, case, inside = made(kind, engine)
    for seed in range(2):
        D = covariance(inside, seed)
        expected = case.model.criterion(case.by_factor(case.by_term(D)), reml)
        ours = float(CRITERION(problem, D, float(reml)))
        assert ours == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("rank", [None, 1, 0])
@pytest.mark.parametrize(("kind", "engine"), CASES)
def test_derivatives_equal_autodiff(kind: str, engine: str, rank: int | None) -> None:
    """With D regular, singular, and zero; by forward mode over another route to the value."""
    problem, _, inside = made(kind, engine)
    A = np.asarray(problem.z_factor)
    D = A @ covariance(inside, 3, rank) @ A.T
    s, q = -5.0, len(D)
    free = np.append(pack_triangle(inside) > 0.0, True)
    x = jnp.append(pack_triangle(D), s)

    for reml in (1.0, 0.0):
        at = EVALUATE(problem, D, reml, s, False)
        gradient = SLOPE(problem, x, reml)[free]
        hessian = BEND(problem, x, reml)[np.ix_(free, free)]
        size = float(np.max(np.abs(hessian)))
        assert float(at.value) == pytest.approx(float(VALUE(problem, x, reml)), rel=1e-12)
        np.testing.assert_allclose(at.gradient[free], gradient, rtol=1e-9, atol=1e-11 * size)
        ours = at.hessian[np.ix_(free, free)]
        # Value and gradient at a singular D are exact to rounding; its Hessian is the one a
        # millionth of the sampling variance inside.
        inside_by = 1e-5 if engine == "crossed" and rank is not None else 1e-10
        np.testing.assert_allclose(ours, hessian, rtol=1e-8, atol=inside_by * size)
        assert ours.shape == (free.sum(),) * 2 and q == len(problem.n_groups)


@pytest.mark.parametrize(("kind", "engine"), [CASES[2], CASES[8]])
def test_gradient_equals_central_differences(kind: str, engine: str) -> None:
    problem, case, inside = made(kind, engine)
    D = covariance(inside, 4)
    A = np.asarray(problem.z_factor)
    one = jnp.ones(())
    at = EVALUATE(problem, A @ D @ A.T, one, one, True)

    def dense(D: np.ndarray) -> float:
        return float(case.model.criterion(case.by_factor(case.by_term(D)), True))

    for i, j in zip(*np.nonzero(np.tril(inside)), strict=True):
        E = np.zeros_like(D)
        E[i, j] = E[j, i] = 1.0
        h = 1e-4 * D[i, i]
        f = [dense(D + k * h * E) for k in (-2, -1, 1, 2)]
        difference = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)
        slope = float(at.gradient[:-1] @ pack_triangle(A @ E @ A.T))
        assert slope == pytest.approx(difference, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", ["crossed_nested", "crossed_slopes"])
def test_cells_as_lists_and_as_an_array(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to hold the cells give the same derivatives."""
    case = simulate(kind, 1)
    design = build_design(case.formula, case.data, weights=case.weights)
    factors, _ = arrange(design)
    arranged = layout(design.X, factors, design.weights)
    results = []
    for cost, expected in ((1e3, DenseCells), (0.0, SparseCells)):
        monkeypatch.setattr(crossed_statistics, "PAIR_SECONDS", cost)
        problem = compress(design.y, arranged).problem
        assert isinstance(problem.cells, expected)
        A = np.asarray(problem.z_factor)
        D = A @ np.diag(np.linspace(0.5, 1.5, len(A))) @ A.T
        results.append(EVALUATE(problem, D, 1.0, 0.0, True))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11 * np.max(np.abs(b)))


@pytest.mark.parametrize(("kind", "engine"), [CASES[2], CASES[7]])
def test_padding_changes_nothing(kind: str, engine: str) -> None:
    case = simulate(kind, 1)
    design = build_design(case.formula, case.data, weights=case.weights)
    factors, _ = arrange(design)
    arranged = layout(design.X, factors, design.weights, engine)
    D = np.diag(np.linspace(0.5, 1.5, len(arranged.A)))
    values = [
        float(CRITERION(compress(design.y, arranged, pad=pad).problem, D)) for pad in (True, False)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-13)


@pytest.mark.parametrize(("kind", "engine"), [CASES[2], CASES[7]])
def test_similar_data_share_compiled_code(kind: str, engine: str) -> None:
    """A second data set, some rows short, has the same shapes, so nothing is traced again."""
    shapes = []
    for seed, drop in ((1, 0), (2, 3)):
        case = simulate(kind, seed)
        design = build_design(case.formula, case.data.iloc[drop:], weights=case.weights)
        factors, _ = arrange(design)
        problem = compress(design.y, layout(design.X, factors, design.weights, engine)).problem
        leaves, structure = jax.tree.flatten(problem)
        shapes.append(([np.shape(leaf) for leaf in leaves], structure))
    assert shapes[0] == shapes[1]


def test_float32_is_close() -> None:
    problem, _, inside = made("crossed", "crossed")
    D = covariance(inside, 5)
    exact = float(CRITERION(problem, D))
    single = jax.tree.map(
        lambda x: np.asarray(x, np.float32) if np.asarray(x).dtype == np.float64 else x, problem
    )
    with jax.enable_x64(False):
        assert float(CRITERION(single, D.astype(np.float32))) == pytest.approx(exact, rel=1e-5)
