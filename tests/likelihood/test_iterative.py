"""The matrix-free engine of crossed factors against the dense covariance matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from lmmax.iterative import IterativeSolution, solve_iterative
from lmmax.iterative.evaluation import Evaluator
from lmmax.iterative.model import Factor as Part
from lmmax.iterative.model import join, prepare
from lmmax.iterative.traces import power_traces
from lmmax.likelihood.iterative import CHUNK_ROWS, multiply_schur, sparse_rows
from lmmax.parameters import pack_triangle
from lmmax.solve import Status
from tests.oracles.dense import Factor, Model

UNLIMITED = 1e9


class Case(NamedTuple):
    """A small crossed design: data, true relative covariances, estimated entries."""

    factors: list[tuple[np.ndarray, np.ndarray, int]]
    X: np.ndarray
    y: np.ndarray
    D: list[np.ndarray]
    patterns: list[np.ndarray]

    @property
    def model(self) -> Model:
        return Model(self.y, self.X, tuple(Factor(code, Z) for code, Z, _ in self.factors))


INTERCEPT = np.ones((1, 1))
SLOPES = np.array([[0.8, -0.2], [-0.2, 0.3]])
KINDS = {
    "sparse": ([160, 150], [INTERCEPT, 1.5 * INTERCEPT]),
    "slopes": ([30, 40], [SLOPES, 0.5 * INTERCEPT]),
    "slopes_in_tail": ([70, 30], [INTERCEPT, SLOPES]),
    "independent_slopes": ([70, 30], [INTERCEPT, np.diag([0.6, 0.4])]),
    "three_factors": ([60, 30, 12], [INTERCEPT, SLOPES, 0.5 * INTERCEPT]),
}


def simulate(kind: str, seed: int = 0, n: int = 400) -> Case:
    levels, D = KINDS[kind]
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    X = np.linalg.qr(np.column_stack([np.ones(n), x, rng.normal(size=n)]))[0]
    y = rng.normal(size=n)
    weights = rng.uniform(0.7, 1.4, n)
    factors, patterns = [], []
    for m, cov in zip(levels, D, strict=True):
        # Every level occurs; some far more often than others.
        code = np.append(np.arange(m), (m * rng.uniform(size=n - m) ** 1.7).astype(int))
        code = rng.permutation(code)
        Z = np.column_stack([np.ones(n), 3.0 * x])[:, : len(cov)]
        b = rng.multivariate_normal(np.zeros(len(cov)), cov, m)
        y = y + np.einsum("ij,ij->i", Z, b[code])
        factors.append((code, Z * np.sqrt(weights)[:, None], m))
        patterns.append((cov != 0.0).astype(float))
    y = y * np.sqrt(weights)
    y = y - X @ (X.T @ y)
    return Case(factors, X, y / np.linalg.norm(y), D, patterns)


def fit(case: Case, **options: Any) -> IterativeSolution:
    return solve_iterative(
        case.factors, case.X, case.y, patterns=case.patterns, **{"seed": 1, **options}
    )


def at_truth(case: Case, **options: Any) -> IterativeSolution:
    """Evaluate the criterion at the true covariance, with the first few probes alone."""
    return fit(case, D0=case.D, max_steps=1, **{"target_error": UNLIMITED, **options})


def dense_gradient(
    case: Case, D: list[np.ndarray], reml: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """Gradient of the profiled criterion in D, and information in (D, log scale), by dense V."""
    pairs = [list(zip(*np.tril_indices(len(cov)), strict=True)) for cov in D]
    scale = case.model.profiled_scale(D, reml)
    covs = [scale * cov for cov in D]
    score, information = case.model.score_and_information(covs, scale, reml, pairs)
    # (Psi, scale) = (scale D, scale): the chain rule into (D, log scale).
    vech = np.concatenate([pack_triangle(cov) for cov in D])
    k = len(vech)
    jacobian = np.block(
        [[scale * np.eye(k), scale * vech[:, None]], [np.zeros((1, k)), np.array([[scale]])]]
    )
    return -2.0 * scale * score[:k], jacobian.T @ information @ jacobian, scale


@pytest.mark.parametrize("reml", [True, False], ids=["REML", "ML"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_criterion_and_its_gradient_are_those_of_the_dense_model(kind: str, reml: bool) -> None:
    case = simulate(kind)
    got = at_truth(case, reml=reml)
    assert abs(got.criterion - case.model.criterion(case.D, reml)) < 4.0 * got.criterion_error
    assert got.criterion_error < 0.5
    gradient, _, scale = dense_gradient(case, case.D, reml)
    np.testing.assert_array_less(np.abs(got.gradient - gradient), 4.5 * got.gradient_error + 1e-4)
    assert got.scale == pytest.approx(scale, rel=1e-9)


@pytest.mark.parametrize("kind", ["slopes", "three_factors"])
def test_what_needs_no_probes_is_exact(kind: str) -> None:
    case = simulate(kind)
    got = at_truth(case)
    covs = [got.scale * D for D in case.D]
    beta, covariance = case.model.coefficients(covs, got.scale)
    np.testing.assert_allclose(got.beta, beta, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(got.scale * got.beta_unscaled, covariance, rtol=1e-7, atol=1e-14)
    for modes, expected in zip(got.modes, case.model.modes(covs, got.scale), strict=True):
        np.testing.assert_allclose(modes, expected, rtol=1e-6, atol=1e-10)


def test_the_information_is_the_average_of_observed_and_expected() -> None:
    case = simulate("slopes")
    got = at_truth(case)
    V = case.model.covariance(case.D)
    inverse = np.linalg.inv(V)
    P = inverse - inverse @ case.X @ np.linalg.solve(
        case.X.T @ inverse @ case.X, case.X.T @ inverse
    )
    directions = []
    for factor, D in zip(case.model.factors, case.D, strict=True):
        for i, j in zip(*np.tril_indices(len(D)), strict=True):
            E = np.zeros_like(D)
            E[i, j] = E[j, i] = 1.0
            directions.append(factor.related() * (factor.Z @ E @ factor.Z.T) @ P @ case.y)
    F = np.stack([*directions, case.y], axis=1)
    expected = F.T @ P @ F / got.scale / 2.0
    np.testing.assert_allclose(got.information, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sparse", "slopes_in_tail"])
def test_monte_carlo_errors_are_honest(kind: str) -> None:
    case = simulate(kind)
    exact = case.model.criterion(case.D, True)
    gradient, _, _ = dense_gradient(case, case.D, True)
    fits = [at_truth(case, seed=seed) for seed in range(30)]
    z = np.array([(fit.criterion - exact) / fit.criterion_error for fit in fits])
    assert 0.6 < np.sqrt(np.mean(z**2)) < 1.6
    assert abs(z.mean()) < 4.0 / np.sqrt(len(z))
    z = np.array([(fit.gradient - gradient) / fit.gradient_error for fit in fits])
    size = np.sqrt(np.mean(z**2, axis=0))
    assert np.all((size > 0.5) & (size < 1.8)), size


@pytest.mark.parametrize("kind", ["sparse", "independent_slopes", "three_factors"])
def test_estimates_are_the_optimum_within_their_monte_carlo_error(kind: str) -> None:
    case = simulate(kind)
    got = fit(case)
    assert got.status == Status.CONVERGED
    assert got.criterion_error <= 0.05
    D = list(got.D)
    gradient, information, _ = dense_gradient(case, D, True)
    free = np.append(got.free, True)
    profile = np.linalg.inv(np.linalg.inv(information[np.ix_(free, free)])[:-1, :-1])
    # So near the optimum a dense Newton step ends there.
    miss = np.linalg.solve(2.0 * profile, gradient[got.free])
    error = np.concatenate([pack_triangle(part) for part in got.D_error])[got.free]
    np.testing.assert_array_less(np.abs(miss), 4.5 * error + 1e-3)
    assert gradient[got.free] @ miss < 0.05
    exact = case.model.criterion(D, True)
    assert abs(got.criterion - exact) < 4.5 * got.criterion_error


def test_more_probes_are_drawn_until_the_error_is_small() -> None:
    case = simulate("sparse")
    loose, tight = at_truth(case, target_error=UNLIMITED), at_truth(case, target_error=0.002)
    assert loose.criterion_error > 0.002 >= tight.criterion_error
    assert tight.probes > loose.probes
    exact = case.model.criterion(case.D, True)
    assert abs(tight.criterion - exact) < 4.0 * tight.criterion_error
    capped = at_truth(case, target_error=1e-12, max_probes=64)
    assert capped.probes <= 64 and capped.criterion_error > 1e-12


def test_a_seed_fixes_every_digit() -> None:
    case = simulate("sparse")
    a, b, other = fit(case, seed=3), fit(case, seed=3), fit(case, seed=4)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert a.criterion != other.criterion


def test_the_order_of_rows_levels_and_factors_does_not_matter() -> None:
    case = simulate("slopes_in_tail")
    got = fit(case)
    rng = np.random.default_rng(5)
    shuffle = rng.permutation(len(case.y))
    rows = case._replace(
        factors=[(code[shuffle], Z[shuffle], m) for code, Z, m in case.factors],
        X=case.X[shuffle],
        y=case.y[shuffle],
    )
    again = fit(rows)
    assert again.criterion == pytest.approx(got.criterion, abs=1e-5)
    np.testing.assert_allclose(again.modes[1], got.modes[1], atol=1e-6)
    swapped = case._replace(factors=case.factors[::-1], patterns=case.patterns[::-1])
    backwards = fit(swapped)
    assert backwards.criterion == pytest.approx(got.criterion, abs=1e-6)
    np.testing.assert_allclose(backwards.D[0], got.D[1], rtol=1e-6)
    np.testing.assert_allclose(backwards.modes[0], got.modes[1], atol=1e-8)


def test_units_of_the_random_effects_do_not_matter() -> None:
    case = simulate("slopes_in_tail")
    got = fit(case)
    unit = np.array([1.0, 100.0])
    code, Z, m = case.factors[1]
    scaled = fit(case._replace(factors=[case.factors[0], (code, Z * unit, m)]))
    assert scaled.criterion == pytest.approx(got.criterion, abs=1e-6)
    np.testing.assert_allclose(scaled.D[1] * np.outer(unit, unit), got.D[1], rtol=1e-6)
    np.testing.assert_allclose(scaled.modes[1] * unit, got.modes[1], rtol=1e-5, atol=1e-9)
    factor = np.append(1.0, pack_triangle(np.outer(unit, unit)))
    np.testing.assert_allclose(scaled.gradient_error / factor, got.gradient_error, rtol=1e-4)


@pytest.mark.parametrize("absent", [0, 1], ids=["head", "tail"])
def test_a_variance_of_zero_is_a_legitimate_estimate(absent: int) -> None:
    case = simulate("sparse")
    # Levels whose sums are all alike vary less than chance would have it.
    code, Z, _ = case.factors[absent]
    rng = np.random.default_rng(8)
    y = rng.normal(size=len(case.y))
    other = case.factors[1 - absent][0]
    y = y + rng.normal(size=len(y))[other]
    for _ in range(200):
        y = y - (np.bincount(code, y * Z[:, 0]) / np.bincount(code, Z[:, 0] ** 2))[code] * Z[:, 0]
        y = y - case.X @ (case.X.T @ y)
    y = y / np.linalg.norm(y)
    got = fit(case._replace(y=y))
    assert got.status == Status.CONVERGED
    assert got.boundary == (absent == 0, absent == 1)
    assert got.D[absent] == 0.0
    assert got.gradient[absent] > 0.0
    assert got.D[1 - absent] > 0.05
    away = fit(case._replace(y=y), D0=[2.0 * INTERCEPT, 2.0 * INTERCEPT])
    assert away.D[absent] == 0.0
    np.testing.assert_allclose(away.D[1 - absent], got.D[1 - absent], rtol=1e-2)


def test_a_start_at_zero_is_left() -> None:
    case = simulate("sparse")
    got = fit(case)
    away = fit(case, D0=[0.0 * INTERCEPT, 0.0 * INTERCEPT])
    assert away.status == Status.CONVERGED
    for ours, theirs, error in zip(away.D, got.D, got.D_error, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=10.0 * error.max() + 1e-4)


def test_nested_and_unseen_levels() -> None:
    rng = np.random.default_rng(2)
    inner = np.append(np.arange(50), rng.integers(0, 50, 350))
    y = rng.normal(size=60)[inner] + rng.normal(size=60)[inner // 5] + rng.normal(size=400)
    X = np.full((400, 1), 400**-0.5)
    factors = [(inner, np.ones((400, 1)), 60), (inner // 5, np.ones((400, 1)), 12)]
    got = solve_iterative(factors, X, y, D0=[INTERCEPT, INTERCEPT], max_steps=1)
    model = Model(y, X, tuple(Factor(code, Z) for code, Z, _ in factors))
    assert got.criterion == pytest.approx(model.criterion([INTERCEPT, INTERCEPT], True), abs=1e-6)
    assert got.criterion_error < 1e-6
    np.testing.assert_array_equal(got.modes[0][50:], 0.0)


def test_one_factor_is_refused() -> None:
    case = simulate("sparse")
    with pytest.raises(ValueError, match="two or more"):
        solve_iterative(case.factors[:1], case.X, case.y)


@pytest.mark.parametrize("n_rows", [3, CHUNK_ROWS + 7])
def test_sparse_products_with_rows_of_very_different_length(n_rows: int) -> None:
    rng = np.random.default_rng(4)
    dense = rng.normal(size=(n_rows, 700)) * (rng.uniform(size=(n_rows, 700)) < 0.01)
    dense[1] = rng.normal(size=700)
    dense[n_rows - 1, :450] = 1.0
    dense[2] = 0.0
    row, column = np.nonzero(dense)
    shuffle = rng.permutation(len(row))
    row, column = row[shuffle], column[shuffle]
    matrix = sparse_rows(row, column, dense[row, column], n_rows)
    assert len(matrix.extra) > 0
    v = rng.normal(size=(700, 5))
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(lambda A, v: A @ v)(matrix, v), dense @ v, atol=1e-12)
    # Padding stays moderate although one row is full.
    assert matrix.weight.size < 10 * max(len(row), CHUNK_ROWS * 4)


@pytest.mark.parametrize("kind", ["slopes", "three_factors"])
def test_traces_of_powers_are_exact(kind: str) -> None:
    case = simulate(kind)
    parts = [Part(*factor) for factor in case.factors]
    with jax.enable_x64(True):
        model = prepare(parts, case.X, case.y, True, case.patterns, 0)
        evaluate = Evaluator(model)
        at = evaluate._eliminate(join(model, case.D))
        identity = np.eye(evaluate.n_tail)
        E = identity - np.asarray(multiply_schur(model.problem, at, identity))
    np.testing.assert_allclose(np.diag(E), 0.0, atol=1e-12)
    expected = [np.trace(np.linalg.matrix_power(E, k)) for k in range(1, 9)]
    deep = power_traces(model, at, 4)
    np.testing.assert_allclose(deep, expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(power_traces(model, at, 1), expected[:2], rtol=1e-9, atol=1e-10)


def test_higher_powers_serve_where_many_probes_would_be_needed() -> None:
    case = simulate("sparse")
    got = at_truth(case, target_error=1e-4)
    assert got.criterion_error <= 1e-4
    # Without them the error falls with the square root of the number of probes alone.
    first = at_truth(case)
    assert got.probes < first.probes * (first.criterion_error / 1e-4) ** 2 / 4.0
    assert abs(got.criterion - case.model.criterion(case.D, True)) < 4.5 * got.criterion_error
