"""The data of crossed factors in working form: cross-products by levels and meetings of levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.sparse as sparse

from ..likelihood.iterative import IterativeProblem, Meetings, sparse_rows


class Factor(NamedTuple):
    """One grouping factor: level of each row (n,), design (n, q), and the number of levels."""

    codes: np.ndarray
    Z: np.ndarray
    n_levels: int


class Model(NamedTuple):
    """The data in working form: the head first, levels by popularity, columns of unit mean square.

    Attributes:
        problem: the cross-products, on the device.
        cross: ``A_1t`` as a SciPy matrix.
        tail: the blocks of ``A_tt`` between different factors, likewise, or None.
        W: ``Z'[X y]``, (effects, p + 1).
        C: ``[X y]'[X y]``, (p + 1, p + 1).
        n: number of rows.
        reml: whether the criterion is restricted.
        free: 1.0 where an entry of the joint D is estimated, (q, q).
        columns: columns of each factor in the joint D.
        effects: positions of each factor's effects among all.
        z_scale: ``Z = z_scale * Z_working``, (q,).
        noise: sampling variance of one average level's effect, relative to the scale, (q,).
        order: the factors' places in the caller's list.
        ranks: for each factor, the place of each of the caller's levels.
        seed: seed of the probes.
        products: multiplications for ``||E||_F``.
    """

    problem: IterativeProblem
    cross: Any
    tail: Any
    W: np.ndarray
    C: np.ndarray
    n: int
    reml: bool
    free: np.ndarray
    columns: tuple[slice, ...]
    effects: tuple[slice, ...]
    z_scale: np.ndarray
    noise: np.ndarray
    order: tuple[int, ...]
    ranks: tuple[np.ndarray, ...]
    seed: int
    products: float


def prepare(
    parts: list[Factor],
    X: np.ndarray,
    y: np.ndarray,
    reml: bool,
    patterns: Sequence[np.ndarray] | None,
    seed: int,
) -> Model:
    """Form the cross-products."""
    given = [np.atleast_2d(np.asarray(part.Z, dtype=float).T).T for part in parts]
    order = sorted(range(len(parts)), key=lambda f: -parts[f].n_levels * given[f].shape[1])
    scales = [np.sqrt(np.mean(Z**2, axis=0)) for Z in given]
    scales = [np.where(size > 0.0, size, 1.0) for size in scales]
    Z = [given[f] / scales[f] for f in order]
    m = [parts[f].n_levels for f in order]
    q = [part.shape[1] for part in Z]
    XY = np.column_stack([X, y])
    n = len(y)

    # Popular levels first, so that rows of the sparse matrices that are stored together are of
    # similar length.
    ranks, codes = [], []
    for f, levels in zip(order, m, strict=True):
        count = np.bincount(parts[f].codes, minlength=levels)
        rank = np.empty(levels, dtype=np.int64)
        rank[np.argsort(-count, kind="stable")] = np.arange(levels)
        ranks.append(rank)
        codes.append(rank[parts[f].codes])

    diagonal, W = [], []
    for levels, code, part in zip(m, codes, Z, strict=True):
        diagonal.append(_block_sums(code, part, part, levels))
        W.append(_block_sums(code, part, XY, levels).transpose(2, 0, 1).reshape(-1, XY.shape[1]))

    ends = np.cumsum([levels * size for levels, size in zip(m, q, strict=True)])
    starts = ends - [levels * size for levels, size in zip(m, q, strict=True)]
    n_head, n_tail = int(ends[0]), int(ends[-1] - ends[0])
    meetings: list[Meetings] = []
    head_tail: list[tuple[np.ndarray, ...]] = []
    tail_tail: list[tuple[np.ndarray, ...]] = []
    for g in range(1, len(m)):
        for f in range(g):
            # By level of g first: that is the order in which the head's meetings are summed.
            key, pair = np.unique(codes[g] * m[f] + codes[f], return_inverse=True)
            block = _block_sums(pair, Z[f], Z[g], len(key))
            level_g, level_f = np.divmod(key, m[f])
            rows = (level_f * q[f])[None, None] + np.arange(q[f])[:, None, None]
            columns = (level_g * q[g])[None, None] + np.arange(q[g])[None, :, None]
            rows, columns, block_ = np.broadcast_arrays(
                rows + (starts[f] - n_head * (f > 0)), columns + starts[g] - n_head, block
            )
            entries = (rows.ravel(), columns.ravel(), block_.ravel())
            kept = entries[2] != 0.0
            entries = (entries[0][kept], entries[1][kept], entries[2][kept])
            if f == 0:
                meetings.append(Meetings(level_f.astype(np.int32), level_g.astype(np.int32), block))
                head_tail.append(entries)
            else:
                tail_tail += [entries, (entries[1], entries[0], entries[2])]
    row, column, weight = (np.concatenate(part) for part in zip(*head_tail, strict=True))
    cross = sparse.csr_matrix((weight, (row, column)), shape=(n_head, n_tail))
    products = float(np.sum(np.diff(cross.indptr).astype(float) ** 2))
    between, tail = None, None
    if tail_tail:
        r, c, w = (np.concatenate(part) for part in zip(*tail_tail, strict=True))
        between = sparse_rows(r, c, w, n_tail)
        tail = sparse.csr_matrix((w, (r, c)), shape=(n_tail, n_tail))

    widths = np.cumsum(q)
    columns_ = tuple(slice(int(e - size), int(e)) for e, size in zip(widths, q, strict=True))
    free = np.zeros((sum(q), sum(q)))
    for f, here in zip(order, columns_, strict=True):
        free[here, here] = 1.0 if patterns is None else np.asarray(patterns[f], dtype=float)
    problem = IterativeProblem(
        diagonal=tuple(diagonal),
        meetings=tuple(meetings),
        head_tail=sparse_rows(row, column, weight, n_head),
        tail_head=sparse_rows(column, row, weight, n_tail),
        tail_tail=between,
    )
    return Model(
        problem=jax.device_put(problem),
        cross=cross,
        tail=tail,
        W=np.concatenate(W),
        C=XY.T @ XY,
        n=n,
        reml=reml,
        free=free,
        columns=columns_,
        effects=tuple(slice(int(a), int(b)) for a, b in zip(starts, ends, strict=True)),
        z_scale=np.concatenate([scales[f] for f in order]),
        noise=np.repeat(np.array(m) / n, q),
        order=tuple(order),
        ranks=tuple(ranks),
        seed=seed,
        products=products,
    )


def _block_sums(code: np.ndarray, A: np.ndarray, B: np.ndarray, m: int) -> np.ndarray:
    """Return ``sum A_i' B_i`` over the rows i of each code, (a, b, m)."""
    out = np.empty((A.shape[1], B.shape[1], m))
    for a, b in np.ndindex(A.shape[1], B.shape[1]):
        out[a, b] = np.bincount(code, A[:, a] * B[:, b], minlength=m)
    return out


def join(model: Model, D: Sequence[np.ndarray]) -> np.ndarray:
    """Return the joint covariance in working units from the caller's."""
    joint = np.zeros_like(model.free)
    for f, here in zip(model.order, model.columns, strict=True):
        joint[here, here] = np.asarray(D[f])
    return joint * model.free * np.outer(model.z_scale, model.z_scale)
