"""Working coordinates: columns of X orthonormal, those of a random term orthogonal in the mean.

Units, offsets and near collinearity then cost no digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ALIAS_TOLERANCE = 1e-7
"""A column of X is aliased if the columns before it leave less than this fraction of it (as R)."""
REPEATED = 0.1
"""Where a column leaves less than this of another, the Gram matrix is taken of both again, in the
coordinates found: its squares cost digits, which come back so (Yamamoto et al., 2015, ETNA 44)."""
CHUNK_ROWS = 1 << 15
"""Rows of these coordinates that are made at a time."""
IN_SPAN = 1e-8
"""Fraction of its parts by which a new row may miss what the kept columns say of the others."""
SPANNED = 1e-9
"""The constant is in the span of columns if they leave no more of it than this."""


@dataclass(frozen=True)
class Factor:
    """Working coordinates for a set of columns: ``columns[:, kept] = working @ R``."""

    R: np.ndarray
    kept: np.ndarray

    @cached_property
    def inverse(self) -> np.ndarray:
        """``R^-1``."""
        return np.linalg.inv(self.R)


@dataclass(frozen=True)
class Dependence:
    """The aliased columns by those that were kept, ``columns[:, aliased] = columns[:, kept] A``.

    Attributes:
        kept: positions of the columns kept, (p,).
        aliased: positions of the others, (r,).
        A: (p, r).
        off: how far the rows are off that, at most, (r,).
    """

    kept: np.ndarray
    aliased: np.ndarray
    A: np.ndarray
    off: np.ndarray

    def missed(self, rows: np.ndarray, exact: bool = False) -> np.ndarray:
        """Return which aliased columns are not what the others say they are, (n, r).

        Only where all are, a row is a combination of those factored, and ``row @ beta`` can be
        estimated: else it depends on which columns were dropped.

        Args:
            rows: all columns, (n, p_all).
            exact: whether to allow for rounding alone, not for rows as far off as those factored;
                for combinations of coefficients, whose units are others.
        """
        off = 0.0 if exact else 10.0 * self.off
        own, others = rows[:, self.aliased], rows[:, self.kept]
        whole = np.abs(own) + np.abs(others) @ np.abs(self.A)
        return np.asarray(np.abs(own - others @ self.A) > off + IN_SPAN * whole)


def dependence(columns: np.ndarray, factor: Factor, weights: np.ndarray | None) -> Dependence:
    """Return how columns that were not kept follow from those that were.

    Args:
        columns: those that were factored, (n, p_all).
        factor: their factor.
        weights: prior weights of the rows, or None.
    """
    kept = factor.kept
    aliased = np.setdiff1d(np.arange(columns.shape[1]), kept)
    A, off = np.zeros((len(kept), len(aliased))), np.zeros(len(aliased))
    if not len(aliased):
        return Dependence(kept, aliased, A, off)
    chunks = [slice(at, at + CHUNK_ROWS) for at in range(0, len(columns), CHUNK_ROWS)]
    for _ in range(2):  # the second time for the digits that ill-conditioned columns cost
        products = np.zeros_like(A)
        for here in chunks:
            own = columns[here, kept]
            left = columns[here, aliased] - own @ A
            left = left if weights is None else left * weights[here, None]
            products += factor.inverse.T @ (own.T @ left)
        A = A + factor.inverse @ products
    for here in chunks:
        left = columns[here, aliased] - columns[here, kept] @ A
        off = np.maximum(off, np.abs(left).max(axis=0))
    return Dependence(kept, aliased, A, off)


def column_factor(columns: np.ndarray, weights: np.ndarray | None) -> Factor:
    """Find the independent columns and a triangular ``R`` that makes them orthonormal.

    Args:
        columns: shape (n, p).
        weights: prior weights of the rows, or None.

    Returns:
        The columns kept, in order, and ``R`` (upper triangular) of ``columns[:, kept] = W R``.
        The Gram matrix serves unless it is ill-conditioned; then Householder's QR is used.
    """
    p = columns.shape[1]
    weighted = columns if weights is None else columns * weights[:, None]
    gram = columns.T @ weighted
    norms = np.sqrt(np.diag(gram))
    scale = np.where(norms > 0.0, norms, 1.0)
    try:
        if not np.all(norms > 0.0):
            raise np.linalg.LinAlgError
        lower = np.linalg.cholesky(gram / np.outer(scale, scale))
        least, R = np.min(np.diag(lower), initial=1.0), lower.T * scale
        if least > 1e-5:
            if least < REPEATED:
                R = np.linalg.cholesky(_gram(columns, np.linalg.inv(R), weights)).T @ R
            return Factor(R, np.arange(p))
    except np.linalg.LinAlgError:
        pass

    root = columns / scale if weights is None else columns / scale * np.sqrt(weights)[:, None]
    root = triangle(root)
    kept: list[int] = []
    for j in range(p):
        candidate = triangle(root[:, [*kept, j]])
        if candidate.shape[0] > len(kept) and norms[j] > 0.0:
            left = abs(candidate[len(kept), len(kept)])
            if left > ALIAS_TOLERANCE:
                kept.append(j)
    R = triangle(root[:, kept])
    R *= np.where(np.diag(R) < 0.0, -1.0, 1.0)[:, None]
    return Factor(R * scale[kept], np.asarray(kept, dtype=int))


def _gram(columns: np.ndarray, turn: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return the Gram matrix of ``columns turn``, (p, p), without all of its rows at once."""
    found = np.zeros((turn.shape[1], turn.shape[1]))
    for first in range(0, len(columns), CHUNK_ROWS):
        here = slice(first, first + CHUNK_ROWS)
        working = columns[here] @ turn
        found += working.T @ (working if weights is None else working * weights[here, None])
    return found


def constant(columns: np.ndarray, factor: Factor, weights: np.ndarray | None) -> np.ndarray | None:
    """Return the coefficients of the constant 1 on the kept columns; None if they have it not.

    Args:
        columns: those that were factored, (n, p).
        factor: their factor.
        weights: prior weights of the rows, or None.
    """
    for j, column in enumerate(factor.kept):
        if np.all(columns[:, column] == 1.0):
            return np.eye(len(factor.kept))[j]  # exactly: a mean may be large
    own, found = columns[:, factor.kept], np.zeros(len(factor.kept))
    left = np.ones(len(columns))
    for _ in range(2):  # the second time for the digits that ill-conditioned columns cost
        weighted = left if weights is None else left * weights
        found = found + factor.inverse @ (factor.inverse.T @ (own.T @ weighted))
        left = 1.0 - own @ found
    return None if np.max(np.abs(left), initial=0.0) > SPANNED else found


def to_first(direction: np.ndarray) -> np.ndarray:
    """Return orthogonal matrices (..., q, q) that take directions (..., q) to the first axis."""
    unit = direction / np.linalg.norm(direction, axis=-1, keepdims=True)
    # Householder's reflection, the one that does not cancel, and a sign.
    sign = np.where(unit[..., :1] >= 0.0, 1.0, -1.0)
    v = unit + sign * np.eye(unit.shape[-1])[0]
    size = np.sum(v * v, axis=-1)[..., None, None]
    reflected = np.eye(unit.shape[-1]) - 2.0 * v[..., :, None] * v[..., None, :] / size
    there = np.all(np.abs(unit[..., 1:]) < 1e-8, axis=-1)[..., None, None]
    return np.asarray(np.where(there, np.eye(unit.shape[-1]), -sign[..., None] * reflected))


def triangle(columns: np.ndarray) -> np.ndarray:
    """Return the triangular factor of Householder's QR."""
    return np.asarray(np.linalg.qr(columns, mode="r"))


def random_factor(
    blocks: Sequence[np.ndarray],
    correlated: Sequence[bool],
    weights: np.ndarray | None,
    n: int,
) -> np.ndarray:
    """Return ``A`` (q, q), block diagonal over terms, with ``Z = Z_working A``.

    The working columns have mean square one over n observations and, within a correlated term, are
    orthogonal over all rows; uncorrelated terms are only scaled, since mixing columns would break
    the structure.  The first is the constant where the columns have it, as those of ``0 + f`` do:
    levels of groups that are far apart then have a variance of their own, not a share of all.
    """
    q = sum(block.shape[1] for block in blocks)
    A = np.zeros((q, q))
    at = 0
    for block, mix in zip(blocks, correlated, strict=True):
        here = slice(at, at + block.shape[1])
        at = here.stop
        factor = column_factor(block, weights) if mix and block.shape[1] > 1 else None
        if factor is not None and len(factor.kept) == block.shape[1]:
            A[here, here] = factor.R / np.sqrt(n)
            # An intercept is the first working column already.
            ones = None if np.all(block[:, 0] == 1.0) else constant(block, factor, weights)
            if ones is not None:
                A[here, here] = to_first(factor.R @ ones) @ A[here, here]
        else:
            squares = block * block if weights is None else block * block * weights[:, None]
            A[here, here] = np.diag(np.sqrt(squares.sum(axis=0) / n))
    return A
