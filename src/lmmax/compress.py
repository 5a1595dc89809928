"""Rows to sufficient statistics: after this, no computation depends on the number of rows.

For each group the thin QR factorisation ``Z_i = Q_i U_i`` keeps ``U_i``, the projection
``Y_i = Q_i' [X_i y_i]``, and adds the cross-product of the remaining rows to ``C``.  X and each
random term are first brought to working coordinates in which their columns are orthonormal, so
that units, offsets and near collinearity cost no digits; see :class:`GroupedProblem` for the maps.

Everything here is NumPy on the host, in chunks of rows that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from .likelihood.grouped import GroupedProblem

CHUNK_ROWS = 1 << 13
"""Most rows handled together; fewer with many columns."""
CHUNK_WORK = 1 << 18
"""Most multiplications in a product over a chunk: beyond it BLAS starts threads, which on busy
processors wait for each other longer than they compute."""
ALIAS_TOLERANCE = 1e-7
"""A column of X is aliased if the columns before it leave less than this fraction of it (as R)."""
DEPENDENT_TOLERANCE = 1e-12
"""A column of Z_i is dependent within its group below this fraction of its norm: rounding."""
SMALLEST_BUCKET = 64
"""Groups are padded to at least this number; merging fewer would gain nothing."""
MERGE_LIMIT = 2000
"""Most patterns of ``U`` merged by a loop; with more, merging would cost more than it saves."""


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
class Layout:
    """What compressing needs to know of the designs; it serves any number of responses.

    Attributes:
        X: fixed-effects design, (n, p_all).
        blocks: columns of each random term, (n, q_t).
        fixed: independent columns of X and their triangular factor.
        A: block-diagonal factor of the random-effects columns, (q, q).
        order: positions of the rows sorted by group, or None if they are in order already.
        starts, sizes: first sorted row and number of rows of each group, (m,).
        weights: prior weights of the rows in the data's order, (n,), or None.
    """

    X: np.ndarray
    blocks: tuple[np.ndarray, ...]
    fixed: Factor
    A: np.ndarray
    order: np.ndarray | None
    starts: np.ndarray
    sizes: np.ndarray
    weights: np.ndarray | None

    @cached_property
    def A_inverse(self) -> np.ndarray:
        """``A^-1``."""
        return np.linalg.inv(self.A)


@dataclass(frozen=True)
class Compression:
    """Sufficient statistics of a one-factor model.

    Attributes:
        problem: the optimiser's view, merged over groups with equal ``U`` and padded.
        U, Y: statistics per group in working coordinates, (q, q, m) and (q, p + 1, m).
        total: sum of squares of the least-squares residuals, relative to that of y.
    """

    problem: GroupedProblem
    U: np.ndarray
    Y: np.ndarray
    total: float


class CompressionError(ValueError):
    """The data cannot identify the model."""


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
        if np.min(np.diag(lower), initial=1.0) > 1e-5:
            return Factor(lower.T * scale, np.arange(p))
    except np.linalg.LinAlgError:
        pass

    root = columns / scale if weights is None else columns / scale * np.sqrt(weights)[:, None]
    root = _triangle(root)
    kept: list[int] = []
    for j in range(p):
        candidate = _triangle(root[:, [*kept, j]])
        if candidate.shape[0] > len(kept) and norms[j] > 0.0:
            left = abs(candidate[len(kept), len(kept)])
            if left > ALIAS_TOLERANCE:
                kept.append(j)
    R = _triangle(root[:, kept])
    R *= np.where(np.diag(R) < 0.0, -1.0, 1.0)[:, None]
    return Factor(R * scale[kept], np.asarray(kept, dtype=int))


def _triangle(columns: np.ndarray) -> np.ndarray:
    """Return the triangular factor of Householder's QR."""
    return np.asarray(np.linalg.qr(columns, mode="r"))


def random_factor(
    blocks: Sequence[np.ndarray], correlated: Sequence[bool], weights: np.ndarray | None
) -> np.ndarray:
    """Return ``A`` (q, q), block diagonal over terms, with ``Z = Z_working A``.

    The working columns have mean square one and, within a correlated term, are orthogonal over all
    rows; uncorrelated terms are only scaled, since mixing columns would break the structure.
    """
    q = sum(block.shape[1] for block in blocks)
    A = np.zeros((q, q))
    at = 0
    for block, mix in zip(blocks, correlated, strict=True):
        here = slice(at, at + block.shape[1])
        at = here.stop
        n = len(block)
        factor = column_factor(block, weights) if mix and block.shape[1] > 1 else None
        if factor is not None and len(factor.kept) == block.shape[1]:
            A[here, here] = factor.R / np.sqrt(n)
        else:
            squares = block * block if weights is None else block * block * weights[:, None]
            A[here, here] = np.diag(np.sqrt(squares.sum(axis=0) / n))
    return A


def layout(
    X: np.ndarray,
    blocks: Sequence[np.ndarray],
    correlated: Sequence[bool],
    codes: np.ndarray,
    n_groups: int,
    weights: np.ndarray | None = None,
) -> Layout:
    """Analyse the designs once.

    Args:
        X: fixed-effects design, shape (n, p).
        blocks: per random term its columns, each of shape (n, q_t).
        correlated: per random term whether its effects are correlated.
        codes: group of each row, integers from 0 to n_groups - 1, shape (n,).
        n_groups: number of groups, m.
        weights: prior weights (inverse variances), shape (n,).
    """
    in_order = bool(np.all(codes[1:] >= codes[:-1]))
    sizes = np.bincount(codes, minlength=n_groups)
    return Layout(
        X=X,
        blocks=tuple(blocks),
        fixed=column_factor(X, weights),
        A=random_factor(blocks, correlated, weights),
        order=None if in_order else np.argsort(codes, kind="stable"),
        starts=np.concatenate([[0], np.cumsum(sizes)[:-1]]),
        sizes=sizes,
        weights=weights,
    )


def compress(y: np.ndarray, layout: Layout, *, pad: bool = True) -> Compression:
    """Compress a response (n,), its offset removed, with the designs of ``layout``.

    ``pad`` rounds the sizes up to a few values, so that data of similar size share compiled code.
    """
    weighted = y if layout.weights is None else y * layout.weights
    beta = layout.fixed.inverse.T @ (layout.X.T @ weighted)[layout.fixed.kept]
    U, Y, C, total = _sums(y, layout, beta)
    # With groups far apart, the least-squares residuals are a poor centre for what varies within
    # groups: rss would be a small difference of large sums.  Then centre at the within-group fit.
    p = len(beta)
    # What varies between groups only has no part in C, whose eigenvalues are at most one.
    shift = np.linalg.solve(C[:p, :p] + 1e-10 * np.eye(p), C[:p, p])
    left = C[p, p] - 2.0 * shift @ C[:p, p] + shift @ C[:p, :p] @ shift
    if left < 1e-4 * C[p, p]:
        beta = beta + shift
        U, Y, C, total = _sums(y, layout, beta)
    y_scale = np.sqrt(total) if total > 0.0 else 1.0
    Y[:, p] /= y_scale
    C[p] /= y_scale
    C[:, p] /= y_scale
    merged_U, merged_Y, weight = _merge(U, Y)
    problem = GroupedProblem(
        U=merged_U,
        Y=merged_Y,
        weight=weight,
        C=C,
        n_obs=float(len(y)),
        n_fixed=float(p),
        z_factor=layout.A,
        z_inverse=layout.A_inverse,
        x_inverse=layout.fixed.inverse,
        x_logdet=float(np.sum(np.log(np.diag(layout.fixed.R)))),
        beta_origin=beta / y_scale,
        y_scale=y_scale,
        log_weights=0.0 if layout.weights is None else float(np.sum(np.log(layout.weights))),
    )
    if pad:
        whole = problem.U is U
        problem = _pad(problem)
        if whole and problem.Y.shape[1] == p + 1:
            # Not merged: one copy of the statistics serves both views.
            U, Y = problem.U[:, :, : U.shape[2]], problem.Y[:, :, : U.shape[2]]
    return Compression(
        problem=problem,
        U=U,
        Y=Y,
        total=float(total / max(np.sum(weighted * y), np.finfo(float).tiny)),
    )


def _sums(
    y: np.ndarray, layout: Layout, beta: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return U, Y, C, and the sum of squares of ``y - X_working beta``, in one pass."""
    X, fixed, A, order = layout.X, layout.fixed, layout.A, layout.order
    starts, sizes, weights = layout.starts, layout.sizes, layout.weights
    p, q, m = len(fixed.kept), A.shape[0], len(sizes)
    whole = p == X.shape[1]
    R_inverse, A_inverse = fixed.inverse, layout.A_inverse

    U = np.zeros((q, q, m))
    Y = np.empty((q, p + 1, m))
    C = np.zeros((p + 1, p + 1))
    total = 0.0
    chunk = min(CHUNK_ROWS, max(CHUNK_WORK // max(p + 1, q) ** 2, 2048))
    for groups, rows in _chunks(starts, sizes, chunk):
        take: slice | np.ndarray = rows if order is None else order[rows]
        data = np.empty((p + 1, rows.stop - rows.start))
        data[:p] = (X[take] if whole else X[take][:, fixed.kept]).T
        data[p] = y[take]
        Z = np.concatenate([block[take].T for block in layout.blocks])
        if weights is not None:
            root = np.sqrt(weights[take])
            data *= root
            Z *= root
        data[:p] = R_inverse.T @ data[:p]
        data[p] -= beta @ data[:p]
        total += data[p] @ data[p]
        Q = A_inverse.T @ Z
        local, count = starts[groups] - rows.start, sizes[groups]
        U[:, :, groups] = _orthonormalise(Q, local, count)
        Y[:, :, groups] = _project_out(Q, data, local, count)
        C += data @ data.T

    return U, Y, C, total


def _chunks(starts: np.ndarray, sizes: np.ndarray, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of whole groups, and of their rows, of about ``chunk`` rows each."""
    ends = starts + sizes
    first, m = 0, len(starts)
    while first < m:
        last = int(np.searchsorted(ends, starts[first] + chunk, side="right"))
        last = max(last, first + 1)
        yield slice(first, last), slice(int(starts[first]), int(ends[last - 1]))
        first = last


def _orthonormalise(Q: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Replace the columns of Z, given as rows of ``Q (q, rows)``, by orthonormal ones per group.

    Modified Gram-Schmidt, each column orthogonalised twice, which is orthonormal to rounding
    (Giraud et al., 2005).  A column that depends on earlier ones within a group becomes zero.
    Returns the triangular factors, shape (q, q, groups).
    """
    q = len(Q)
    U = np.zeros((q, q, len(starts)))
    for k in range(q):
        norm = np.sqrt(np.add.reduceat(Q[k] * Q[k], starts))
        for _ in range(2 if k else 0):
            for j in range(k):
                part = np.add.reduceat(Q[j] * Q[k], starts)
                U[j, k] += part
                Q[k] -= np.repeat(part, sizes) * Q[j]
        left = np.sqrt(np.add.reduceat(Q[k] * Q[k], starts)) if k else norm
        left = np.where(left > DEPENDENT_TOLERANCE * norm, left, 0.0)
        inverse = np.divide(1.0, left, out=np.zeros_like(left), where=left > 0.0)
        U[k, k] = left
        Q[k] *= np.repeat(inverse, sizes)
    return U


def _project_out(
    Q: np.ndarray, data: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Take the projection on ``Q`` out of ``data (r, rows)`` in place; return ``Q' data``."""
    parts = np.empty((len(Q), len(data), len(starts)))
    for k, column in enumerate(Q):
        parts[k] = np.add.reduceat(data * column, starts, axis=1)
        data -= np.repeat(parts[k], sizes, axis=1) * column
    return parts


def _merge(U: np.ndarray, Y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge groups that share ``U``: the criterion needs only ``sum vec(Y_i) vec(Y_i)'`` of them.

    A triangular factor of the stacked ``vec(Y_i)'`` has the same cross-product and at most
    q (p + 1) rows; each row is a pseudo-group.  Balanced designs, and every random-intercept
    model, shrink to a handful of pseudo-groups whatever the number of groups.
    """
    q, width, m = Y.shape
    weight = np.ones(m)
    rows = q * width
    if m <= max(rows, SMALLEST_BUCKET):
        return U, Y, weight
    entries = U[np.triu_indices(q)]
    mixing = np.sqrt(np.arange(2.0, 2.0 + len(entries)))
    key = np.zeros(m)
    for entry, factor in zip(entries, mixing, strict=True):  # a fixed order of summation
        key += entry * factor
    label, _ = pd.factorize(key)
    counts = np.bincount(label)
    merged = np.flatnonzero(counts > rows)
    gain = int(np.sum(counts[merged] - rows))
    if len(merged) > MERGE_LIMIT or gain < m // 4:
        return U, Y, weight

    by_label = np.argsort(label, kind="stable")
    ends = np.cumsum(counts)
    keep = np.ones(m, dtype=bool)
    parts_U, parts_Y, parts_weight = [], [], []
    for pattern in merged:
        members = by_label[ends[pattern] - counts[pattern] : ends[pattern]]
        shared = U[:, :, members[0]]
        if np.any(U[:, :, members] != shared[:, :, None]):
            continue  # different factors with equal keys
        keep[members] = False
        R = _triangle(Y[:, :, members].reshape(rows, -1).T)
        parts_Y.append(R.T.reshape(q, width, rows))
        parts_U.append(np.broadcast_to(shared[:, :, None], (q, q, rows)))
        parts_weight.append(np.full(rows, len(members) / rows))
    return (
        np.concatenate([*parts_U, U[:, :, keep]], axis=2),
        np.concatenate([*parts_Y, Y[:, :, keep]], axis=2),
        np.concatenate([*parts_weight, weight[keep]]),
    )


def bucket(size: int) -> int:
    """Round a number of groups up: powers of four while small, then four values per octave."""
    if size <= SMALLEST_BUCKET:
        return SMALLEST_BUCKET
    if size <= 4 * SMALLEST_BUCKET:
        return 4 * SMALLEST_BUCKET
    step = 1 << (size.bit_length() - 3)
    return -(-size // step) * step


def _pad(problem: GroupedProblem) -> GroupedProblem:
    """Round the numbers of groups and of fixed effects up, so that compiled code is reused."""
    q, width, m = problem.Y.shape
    p = width - 1
    groups = bucket(m) - m
    extra = -p % 4 if p > 2 else 2 - p
    if not groups and not extra:
        return problem
    Y = np.zeros((q, width + extra, m + groups))
    Y[:, :p, :m], Y[:, -1, :m] = problem.Y[:, :p], problem.Y[:, p]  # y stays last
    U = np.zeros((q, q, m + groups))
    U[:, :, :m] = problem.U
    C = np.eye(width + extra)
    C[:p, :p], C[:p, -1], C[-1, :p], C[-1, -1] = (
        problem.C[:p, :p],
        problem.C[:p, p],
        problem.C[p, :p],
        problem.C[p, p],
    )
    x_inverse = np.zeros((p + extra, p + extra))
    x_inverse[:p, :p] = problem.x_inverse
    return replace(
        problem,
        U=U,
        Y=Y,
        weight=np.concatenate([problem.weight, np.zeros(groups)]),
        C=C,
        x_inverse=x_inverse,
        beta_origin=np.concatenate([problem.beta_origin, np.zeros(extra)]),
    )
