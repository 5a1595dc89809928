"""Rows turned into fewer rows that have the same likelihood, whatever the response.

The likelihood of a mixed model depends on the rows by cross-products within the groups only, so
rows of one group may be rotated.  With ``Z_i = Q_i U_i`` the rows of group i become the q rows
``[U_i, Q_i'X_i, Q_i'y_i]``; what is left has no random effects, so it may be rotated as a whole:
with ``E = X - Q Q'X = W S`` and orthonormal W it becomes the p rows ``[0, S, W'y]``, one row
``[0, 0, |y - Q Q'y - W W'y|]``, and rows of zeros, of which the number is enough.

The groups of a model with several factors are the combinations of their levels that occur.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..compress.columns import Factor, column_factor, constant
from ..compress.rows import CHUNK_WORK, orthonormalise

DEPENDENT = 1e-10
"""A direction of unit length of which less than this is left outside Z has no part there."""
EXPLAINED = 1e-3
"""Share of a response's sum of squares below which what X leaves is projected once more."""
BLOCK_BYTES, BLOCK_LANES = 1 << 23, 128
"""Bytes of responses that are rotated together, but at least so many responses."""
CENTRE_ROWS = 8
"""Rows whose mean a response is centred at."""
CANCELS = 1e-2
"""Share of a sum of squares below which it is not taken as a difference."""
ROUNDING = 100.0 * np.finfo(float).eps
"""Residuals below this, relative to the response, are not real."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """A rotation of n rows to N, found from the designs.

    Attributes:
        X: rotated fixed-effects design, (N, p).
        Z: rotated columns of the random effects, (N, q).
        codes: level of each factor in each rotated row, (factors, N).
        inside: the rows of ``Q'``, sparse, (N_1, n).
        outside: W, (n, r).
        has_rest: whether a row for the rest of the response is there.
        working: orthonormal columns that span X, (n, rank).
        fixed: independent columns of X and their triangular factor.
        root: roots of the rows' weights, (n,), or None.
        ones: coefficients of the constant 1 on the independent columns, (rank,); None where X does
            not have it.
        dense: the working columns and W, (n, rank + r).
        seen: ``working'dense``, (rank, rank + r).
        inside_seen: the working columns in the rows of ``Q'``, (N_1, rank).
    """

    X: np.ndarray
    Z: np.ndarray
    codes: np.ndarray
    inside: Any
    outside: np.ndarray
    has_rest: bool
    working: np.ndarray
    fixed: Factor
    root: np.ndarray | None
    ones: np.ndarray | None
    dense: np.ndarray
    seen: np.ndarray
    inside_seen: np.ndarray


class Rotated(NamedTuple):
    """Rotated responses.

    Attributes:
        y: what is left of them around an origin, (lanes, N).
        origin: coefficients that were taken out, (lanes, p).
    """

    y: np.ndarray
    origin: np.ndarray


def rotation(
    X: np.ndarray,
    Z: np.ndarray,
    codes: np.ndarray,
    n_obs: int,
    weights: np.ndarray | None = None,
) -> Rotation:
    """Analyse rows.

    Args:
        X: fixed-effects design, (n, p).
        Z: columns of all random effects, (n, q).
        codes: level of each factor, (factors, n).
        n_obs: number of observations, zero rows included.
        weights: weights of the rows, (n,), or None.
    """
    from scipy.sparse import csr_array

    fixed = column_factor(X, weights)
    ones = constant(X, fixed, weights)
    root = None if weights is None else np.sqrt(weights)
    if root is not None:
        X, Z = X * root[:, None], Z * root[:, None]

    n, q = Z.shape
    cell, first = _cells(codes)
    order = np.argsort(cell, kind="stable")
    sizes = np.bincount(cell)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    Q = np.array(Z[order].T, order="C")
    U = orthonormalise(Q, starts, sizes)
    present = np.einsum("kkm->mk", U) > 0.0
    count = int(present.sum())
    number = np.cumsum(present.ravel()).reshape(present.shape) - 1
    rows, columns, values = [], [], []
    for k in range(q):
        here = present[:, k][cell[order]]
        rows.append(number[:, k][cell[order]][here])
        columns.append(order[here])
        values.append(Q[k][here])
    where = (np.concatenate(rows), np.concatenate(columns))
    inside = csr_array((np.concatenate(values), where), shape=(count, n))

    working = X[:, fixed.kept] @ fixed.inverse
    left = working - inside.T @ (inside @ working)
    left -= inside.T @ (inside @ left)
    basis, R = np.linalg.qr(left)
    turn, size, across = np.linalg.svd(R)
    kept = size > DEPENDENT
    # The columns that were kept are exact in working coordinates; those dropped depend on them.
    coefficients = working.T @ X
    coefficients[:, fixed.kept] = fixed.R
    below = (size[kept, None] * across[kept]) @ coefficients
    has_rest = n_obs > count + len(below)
    outside = basis @ turn[:, kept]
    dense = np.concatenate([working, outside], axis=1)
    extra = len(below) + has_rest
    return Rotation(
        X=np.concatenate([inside @ X, below, np.zeros((int(has_rest), X.shape[1]))]),
        Z=np.concatenate([U.transpose(2, 0, 1)[present], np.zeros((extra, q))]),
        codes=np.concatenate(
            [codes[:, first][:, np.nonzero(present)[0]], np.repeat(codes[:, :1], extra, axis=1)],
            axis=1,
        ),
        inside=inside,
        outside=outside,
        has_rest=has_rest,
        working=working,
        fixed=fixed,
        root=root,
        ones=ones,
        dense=dense,
        seen=working.T @ dense,
        inside_seen=inside @ working,
    )


def _cells(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the combinations of levels that occur; return those of the rows, and a row of each."""
    cell = codes[0]
    for more in codes[1:]:
        cell = np.unique(cell * (int(more.max()) + 1) + more, return_inverse=True)[1]
    _, first, cell = np.unique(cell, return_index=True, return_inverse=True)
    return cell.reshape(-1), first


def rotate(rotation: Rotation, y: np.ndarray, known: np.ndarray | None = None) -> Rotated:
    """Rotate responses, offset removed, (n, lanes).

    Sums are in double precision, around the mean of a few rows.  Where that or X explains nearly
    all of a response, residuals are taken before anything is squared.  A response that is constant,
    or a combination of the columns of X, is zero; one with an infinite value is infinite
    throughout.

    Args:
        rotation: the rotation.
        y: the responses.
        known: sum of squares of what was taken out of the responses earlier, (lanes,).
    """
    known = np.zeros(y.shape[1]) if known is None else known
    lanes = max(BLOCK_LANES, BLOCK_BYTES // (8 * max(len(y), 1)))
    parts = [
        _rotate(rotation, y[:, first : first + lanes], known[first : first + lanes])
        for first in range(0, y.shape[1], lanes)
    ]
    return Rotated(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


def _rotate(rotation: Rotation, y: np.ndarray, known: np.ndarray) -> Rotated:
    fixed, (n, lanes), rank = rotation.fixed, y.shape, rotation.working.shape[1]
    centre = np.zeros(lanes)
    if rotation.ones is not None:
        centre = y[np.linspace(0, n - 1, CENTRE_ROWS).astype(np.int64)].mean(axis=0, dtype=float)
        centre = np.where(np.isfinite(centre), centre, 0.0)
    around = np.ascontiguousarray(y - centre, dtype=float)
    if rotation.root is not None:
        around *= rotation.root[:, None]
    size = np.einsum("ij,ij->j", around, around)
    finite = np.isfinite(size)
    if not finite.all():
        around = np.where(finite, around, 0.0)
        size = np.where(finite, size, 0.0)

    products = np.zeros((rotation.dense.shape[1], lanes))
    step = max(CHUNK_WORK // max(products.size, 1), 16)
    for first in range(0, n, step):
        products += rotation.dense[first : first + step].T @ around[first : first + step]
    origin = products[:rank]
    # The working columns are orthonormal but for the rounding of an ill-conditioned X.
    explained = 2.0 * origin - rotation.seen[:, :rank] @ origin
    total = size - np.einsum("ij,ij->j", origin, explained)
    inside = rotation.inside @ around - rotation.inside_seen @ origin
    outside = products[rank:] - rotation.seen[:, rank:].T @ origin
    squares = np.einsum("ij,ij->j", inside, inside) + np.einsum("ij,ij->j", outside, outside)
    rest = total - squares

    close = np.flatnonzero((total < EXPLAINED * size) | (rest < CANCELS * total))
    if close.size:
        own = around[:, close] - rotation.working @ origin[:, close]
        again = rotation.working.T @ own
        own -= rotation.working @ again
        origin[:, close] += again
        total[close] = np.einsum("ij,ij->j", own, own)
        inside[:, close], outside[:, close] = rotation.inside @ own, rotation.outside.T @ own
        own -= rotation.inside.T @ inside[:, close] + rotation.outside @ outside[:, close]
        rest[close] = np.einsum("ij,ij->j", own, own)

    condition = np.linalg.norm(fixed.R, axis=0) * np.linalg.norm(fixed.inverse, axis=1)
    rounding = ROUNDING * np.max(condition, initial=1.0)
    found = np.zeros((lanes, len(rotation.X)))
    at = len(inside) + len(outside)
    found[:, : len(inside)], found[:, len(inside) : at] = inside.T, outside.T
    if rotation.has_rest:
        found[:, at] = np.sqrt(rest)
    coefficients = np.zeros((lanes, rotation.X.shape[1]))
    coefficients[:, fixed.kept] = (fixed.inverse @ origin).T
    if rotation.ones is not None:
        coefficients[:, fixed.kept] += centre[:, None] * rotation.ones
        origin += (fixed.R @ rotation.ones)[:, None] * centre
    size = size + known + np.einsum("ij,ij->j", origin, origin)
    found[total <= rounding**2 * size] = 0.0
    found[~finite] = np.inf
    return Rotated(found, coefficients)
