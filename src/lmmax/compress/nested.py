"""Nested grouping factors: statistics of the finest groups, gathered by the next level.

See :mod:`lmmax.likelihood.nested`.  The rows are passed over once, in chunks of whole groups of the
second level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..likelihood.nested import NestedProblem
from .layout import Layout, parent_codes
from .rows import bucket, chunk_rows, chunks, orthonormalise, project_out
from .scaling import Scaling, pad_columns, pad_fixed, padding, scaled


@dataclass(frozen=True)
class Tree:
    """How the groups of the levels lie in each other.

    Attributes:
        levels: per level, finest first, the factor's code of each sorted group.
        parents: per level but the last, the sorted group of the next level.
    """

    levels: tuple[np.ndarray, ...]
    parents: tuple[np.ndarray, ...]


def tree(layout: Layout) -> Tree:
    """Sort the groups of each level by those of the next."""
    factors = [layout.factors[at] for at in layout.chain]
    levels = [np.arange(factors[-1].n_groups)]
    parents: list[np.ndarray] = []
    for fine, coarse in zip(factors[-2::-1], factors[:0:-1], strict=True):
        parent = parent_codes(fine, coarse)
        assert parent is not None  # the engine was chosen for that
        place = np.empty(coarse.n_groups, dtype=np.int64)
        place[levels[0]] = np.arange(coarse.n_groups)
        order = np.argsort(place[parent], kind="stable")
        levels.insert(0, order)
        parents.insert(0, place[parent][order])
    return Tree(tuple(levels), tuple(parents))


def compress(
    y: np.ndarray, layout: Layout, *, pad: bool = True, center: np.ndarray | None = None
) -> tuple[NestedProblem, Tree, Scaling]:
    """Compress a response (n,), its offset removed, around coefficients in working coordinates."""
    shape = tree(layout)
    chain = layout.chain
    counts = [layout.sizes[at][level] for at, level in zip(chain, shape.levels, strict=True)]
    rank = np.empty(len(shape.levels[0]), dtype=np.int64)
    rank[shape.levels[0]] = np.arange(len(rank))
    order = np.argsort(rank[layout.factors[chain[0]].codes], kind="stable")

    beta = layout.least_squares(y) if center is None else center
    p = len(beta)
    others = chain[1:]
    extra_width = sum(layout.factors[at].n_effects for at in others)
    width = extra_width + p + 1
    q1, m1, m2 = layout.factors[chain[0]].n_effects, len(counts[0]), len(counts[1])
    U, Y, C = np.zeros((q1, q1, m1)), np.empty((q1, width, m1)), np.empty((width, width, m2))
    starts = [np.concatenate([[0], np.cumsum(size)[:-1]]) for size in counts[:2]]
    first = np.searchsorted(starts[0], starts[1])  # first finest group of each of level 2
    total = 0.0
    for groups, rows in chunks(starts[1], counts[1], chunk_rows(width)):
        take = order[rows]
        data = np.concatenate(
            [*(layout.random_columns(at, take) for at in others), layout.response(y, beta, take)]
        )
        Q = layout.random_columns(chain[0], take)
        if layout.weights is not None:
            root = np.sqrt(layout.weights[take])
            data *= root
            Q *= root
        total += float(data[-1] @ data[-1])
        last = first[groups.stop] if groups.stop < m2 else m1
        fine = slice(int(first[groups.start]), int(last))
        local, size = starts[0][fine] - rows.start, counts[0][fine]
        U[:, :, fine] = orthonormalise(Q, local, size)
        Y[:, :, fine] = project_out(Q, data, local, size)
        local = starts[1][groups] - rows.start
        for j in range(width):
            C[j, j:, groups] = np.add.reduceat(data[j] * data[j:], local, axis=1)
    upper = np.triu_indices(width, 1)
    C[upper[1], upper[0]] = C[upper]
    scaling = scaled(y, layout, beta, total)
    Y[:, -1] /= scaling.y_scale
    C[-1] /= scaling.y_scale
    C[:, -1] /= scaling.y_scale

    extra = padding(p) if pad else 0
    sizes = tuple(bucket(len(level)) if pad else len(level) for level in shape.levels)
    Y, C = pad_columns(Y, extra, 1), pad_columns(pad_columns(C, extra, 0), extra, 1)
    last_groups = [
        min(len(level), size - 1) for level, size in zip(shape.levels, sizes, strict=True)
    ]
    parents = tuple(
        np.concatenate([parent, np.full(size - len(parent), above)]).astype(np.int32)
        for parent, size, above in zip(shape.parents, sizes, last_groups[1:], strict=False)
    )
    problem = NestedProblem(
        U=_pad_last(U, sizes[0]),
        Y=_pad_last(Y, sizes[0]),
        C=_pad_last(C, sizes[1]),
        parents=parents,
        C_rest=pad_fixed(np.zeros((p + 1, p + 1)), extra),
        sizes=sizes[1:],
        blocks=tuple((layout.slices[at].start, layout.slices[at].stop) for at in chain),
        **scaling.coordinates(layout, extra),
    )
    return problem, shape, scaling


def _pad_last(x: np.ndarray, size: int) -> np.ndarray:
    padded = np.zeros((*x.shape[:-1], size))
    padded[..., : x.shape[-1]] = x
    return padded
