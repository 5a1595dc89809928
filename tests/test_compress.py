"""Compression keeps all that the likelihood needs, and the maps back are exact."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lmmax import likelihood
from lmmax.compress import FactorColumns, compress, grouped, layout, rows
from lmmax.compress.columns import column_factor, constant
from lmmax.compress.rows import bucket
from tests.oracles import dense
from tests.simulate import simulate


def criterion(case: dict, D: np.ndarray, *, pad: bool, blocks=None, correlated=(True,)) -> float:
    m = int(case["codes"].max()) + 1
    factor = FactorColumns("g", case["codes"], m, tuple(blocks or [case["Z"]]), correlated)
    arranged = layout(case["X"], [factor], case["weights"])
    problem = compress(case["y"], arranged, pad=pad).problem
    with jax.enable_x64(True):
        return float(likelihood.criterion(problem, D, 1.0))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("q", [1, 2, 4])
def test_padding_and_coordinates_leave_the_criterion_alone(q: int, weighted: bool) -> None:
    case = simulate(q, q=q, weighted=weighted)
    root = np.tril(np.random.default_rng(q).normal(size=(q, q)))
    D = root @ root.T
    expected = dense.criterion(**case, D=D, reml=True)
    assert criterion(case, D, pad=True) == pytest.approx(expected, rel=1e-11)
    assert criterion(case, D, pad=False) == pytest.approx(expected, rel=1e-11)
    columns = [case["Z"][:, [j]] for j in range(q)]
    scaled_only = criterion(case, D, pad=True, blocks=columns, correlated=(False,) * q)
    assert scaled_only == pytest.approx(expected, rel=1e-11)


def test_merging_equal_groups_leaves_the_criterion_alone(monkeypatch) -> None:
    # 130 groups of three patterns: two balanced designs and one of single rows.
    rng = np.random.default_rng(0)
    sizes = np.r_[np.full(60, 4), np.full(50, 6), np.full(20, 1)]
    codes = np.repeat(np.arange(130), sizes)
    time = np.concatenate([np.arange(size) for size in sizes]).astype(float)
    X = np.column_stack([np.ones(len(codes)), time])
    y = rng.normal(size=len(codes)) + rng.normal(size=130)[codes]
    arranged = layout(X, [FactorColumns("g", codes, 130, (X,), (True,))])
    merged = compress(y, arranged, pad=False).problem
    assert merged.U.shape[2] < 45  # 2 patterns x 6 pseudo-groups + the rest
    assert np.sum(merged.weight) == pytest.approx(130.0)
    monkeypatch.setattr(grouped, "MERGE_LIMIT", -1)
    whole = compress(y, arranged, pad=False).problem
    assert whole.U.shape[2] == 130
    D = np.array([[0.5, 0.1], [0.1, 0.3]])
    with jax.enable_x64(True):
        assert float(likelihood.criterion(merged, D)) == pytest.approx(
            float(likelihood.criterion(whole, D)), rel=1e-12
        )
    expected = dense.criterion(y, X, X, codes, D, True)
    with jax.enable_x64(True):
        assert float(likelihood.criterion(merged, D)) == pytest.approx(expected, rel=1e-11)


def test_chunks_of_rows_and_of_groups_leave_the_criterion_alone(monkeypatch) -> None:
    case = simulate(3, sizes=np.random.default_rng(3).integers(1, 7, 64))
    D = np.array([[0.7, 0.2], [0.2, 0.4]])
    expected = criterion(case, D, pad=True)
    monkeypatch.setattr(rows, "CHUNK_ROWS", 10)
    assert criterion(case, D, pad=True) == pytest.approx(expected, rel=1e-13)


def test_a_group_smaller_than_q_and_a_constant_column_within_groups() -> None:
    case = simulate(5, q=3, sizes=[1, 2, 1, 5, 7, 2, 3, 4])
    case["Z"][:, 2] = case["codes"] % 3  # constant in every group, dependent on the intercept
    D = np.diag([1.0, 0.5, 0.25])
    expected = dense.criterion(**case, D=D, reml=True)
    assert criterion(case, D, pad=True) == pytest.approx(expected, rel=1e-11)


def test_column_factor_drops_later_columns_as_r_does() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(50, 5))
    X[:, 2] = X[:, 0] + 2.0 * X[:, 1]
    X[:, 4] = 1e-9 * X[:, 3]
    factor = column_factor(X, None)
    assert factor.kept.tolist() == [0, 1, 3]
    working = X[:, factor.kept] @ np.linalg.inv(factor.R)
    assert np.allclose(working.T @ working, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_column_factor_of_a_covariate_far_from_zero(offset: float) -> None:
    x = np.random.default_rng(1).normal(size=200) + offset
    X = np.column_stack([np.ones(200), x])
    factor = column_factor(X, None)
    assert factor.kept.tolist() == [0, 1]
    centred = np.linalg.norm(x - x.mean())
    assert abs(factor.R[1, 1]) == pytest.approx(centred, rel=1e-13 * offset)


@pytest.mark.parametrize("offset", [1e2, 3e4, 1e6])
def test_working_columns_are_orthonormal(offset: float) -> None:
    """To the rounding of the columns themselves, whichever factorisation served."""
    rng = np.random.default_rng(2)
    X = np.column_stack([rng.normal(size=200) + offset, np.ones(200), rng.normal(size=200)])
    for weights in (None, rng.uniform(0.5, 2.0, size=200)):
        factor = column_factor(X, weights)
        working = X @ factor.inverse
        weighted = working if weights is None else working * weights[:, None]
        assert np.abs(working.T @ weighted - np.eye(3)).max() < 1e-15 * offset + 1e-14
        assert constant(X, factor, weights).tolist() == [0.0, 1.0, 0.0]
        halves = np.column_stack([X[:, 2] > 0.0, X[:, 2] <= 0.0, X[:, 0]]).astype(float)
        found = constant(halves, column_factor(halves, weights), weights)
        np.testing.assert_allclose(found, [1.0, 1.0, 0.0], atol=1e-15 * offset + 1e-14)
        assert constant(X[:, ::2], column_factor(X[:, ::2], weights), weights) is None


def test_buckets_waste_little_and_are_few() -> None:
    sizes = np.arange(1, 200_000, 7)
    padded = np.array([bucket(int(size)) for size in sizes])
    assert np.all(padded >= sizes)
    large = sizes > 256
    assert np.max(padded[large] / sizes[large]) < 1.34
    assert len(set(padded.tolist())) < 50
