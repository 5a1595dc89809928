"""Sufficient statistics of many responses that share the designs of a model with several factors.

Of the statistics in :mod:`lmmax.compress.nested` and :mod:`lmmax.compress.crossed`, only the
cross-products with y differ between responses.  The designs are projected once; then each response
is centred, scaled and projected as one of its own would be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..compress import Compression, compress
from ..compress.crossed import Outside, Skeleton
from ..compress.layout import Layout
from ..compress.nested import Tree
from ..compress.rows import orthonormalise, project_out
from ..compress.scaling import Scaling, rough_variances
from ..far_apart import needs_rows
from ..likelihood.cells import DenseCells
from ..likelihood.crossed import CrossedProblem
from ..likelihood.nested import NestedProblem

BYTES = 1 << 24
"""Most bytes of the rows of responses that are projected together."""


class FactorResponses(NamedTuple):
    """What differs between n responses, in working coordinates.

    Attributes:
        problem: the problems; the fields named in ``varying`` have a leading axis of n.
        varying: these names.
        origin: coefficients (units of the data) already taken out, (n, p).
        y_scale: units of the data per unit of the working response, (n,).
        total: sum of squares of the working responses relative to that of the data, (n,).
    """

    problem: NestedProblem | CrossedProblem
    varying: tuple[str, ...]
    origin: np.ndarray
    y_scale: np.ndarray
    total: np.ndarray


@dataclass(frozen=True, eq=False)
class SharedFactors:
    """What responses share; rows are in the order of the head's (or finest) groups.

    Attributes:
        problem: the problem of one response, of which the entries of y are to be replaced.
        layout: the designs by row.
        order: positions of the rows, (n,).
        root: roots of their weights, (n,), or None.
        Q: orthonormal columns of the head, (q1, n).
        starts, sizes: first row and number of rows of each of its groups.
        place: the groups' places in the problem.
        columns: what the head leaves of the other columns that y meets in a product: of X, and in
            front of them, in nested models, of the coarser levels, (w, n).
        outer: first row of each group of the next level, and their places, of a nested model.
        tail: transposed columns of the tail, a sparse matrix (N, n), of a crossed model.
        compression: what the designs were compressed to with some response.
    """

    problem: NestedProblem | CrossedProblem
    layout: Layout
    order: np.ndarray
    root: np.ndarray | None
    Q: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    place: np.ndarray
    columns: np.ndarray
    outer: tuple[np.ndarray, np.ndarray] | None
    tail: Any
    compression: Compression

    @property
    def outside(self) -> Outside | None:
        """Rows of what the head leaves of tail and X, where a crossed model holds them."""
        detail = self.compression.detail
        return detail.outside if isinstance(detail, Skeleton) else None

    @cached_property
    def closer(self) -> SharedFactors:
        """The same for responses whose effects are far larger than the residual."""
        if not needs_rows(self.layout, self.compression):
            return self
        y = np.zeros(len(self.layout.X))
        known = compress(y, self.layout, earlier=self.compression, far_apart=True)
        return shared_factors(self.layout, known)

    @property
    def n_fixed(self) -> int:
        """Number of coefficients, without padding."""
        return len(self.layout.fixed.kept)

    @property
    def varying(self) -> tuple[str, ...]:
        """Names of the fields in which the problems of responses differ."""
        if isinstance(self.problem, NestedProblem):
            return ("Y", "C")
        return ("Y", "C_cross", "C") if self.outside is None else ("Y", "outside_y")

    @property
    def numbers(self) -> int:
        """How many numbers a response brings with it."""
        return sum(getattr(self.problem, name).size for name in self.varying)


def shared_factors(layout: Layout, compression: Compression) -> SharedFactors:
    """Return what all responses of a model with several grouping factors share.

    Args:
        layout: the designs.
        compression: what they were compressed to with some response.
    """
    problem, detail = compression.problem, compression.detail
    outer = tail = None
    if isinstance(detail, Tree):
        head: int | None = layout.chain[0]
        rank = np.empty(len(detail.levels[0]), dtype=np.int64)
        rank[detail.levels[0]] = np.arange(len(rank))
        order = np.argsort(rank[layout.factors[layout.chain[0]].codes], kind="stable")
        sizes, coarse = (
            layout.sizes[at][level]
            for at, level in zip(layout.chain, detail.levels[:2], strict=False)
        )
        starts, coarse = (np.cumsum(each) - each for each in (sizes, coarse))
        problem, (place, of_outer, *_) = _arranged(problem, detail)
        outer = coarse, of_outer
        others = layout.chain[1:]
    else:
        assert isinstance(detail, Skeleton)  # the engine is "crossed"
        head, order, starts, sizes = detail.head, detail.order, detail.starts, detail.sizes
        others = ()
        tail = _tail(layout, detail)
        problem, place = _trimmed(problem), np.arange(len(sizes))
    root = None if layout.weights is None else np.sqrt(layout.weights[order])
    Q = np.zeros((0, len(order))) if head is None else layout.random_columns(head, order)
    none = np.zeros(len(layout.fixed.kept))
    X = layout.response(np.zeros(len(order)), none, order)[:-1]
    columns = np.concatenate([*(layout.random_columns(at, order) for at in others), X])
    if root is not None:
        Q, columns = Q * root, columns * root
    if head is not None:
        orthonormalise(Q, starts, sizes)
        project_out(Q, columns, starts, sizes)
    return SharedFactors(
        problem, layout, order, root, Q, starts, sizes, place, columns, outer, tail, compression
    )


def _tail(layout: Layout, frame: Skeleton) -> Any:
    """Return the transposed columns of the tail, weighted, a sparse matrix (N, n)."""
    from scipy.sparse import csr_array

    n, at, rows, values = len(frame.order), 0, [], []
    for tail, position in zip(frame.tails, frame.positions, strict=True):
        codes = layout.factors[position].codes[frame.order]
        for effect, z in enumerate(layout.random_columns(position, frame.order)):
            rows.append(tail.start + effect * tail.levels + codes)
            values.append(z if layout.weights is None else z * np.sqrt(layout.weights[frame.order]))
            at = tail.columns.stop
    place = (np.concatenate(rows), np.tile(np.arange(n), len(rows)))
    return csr_array((np.concatenate(values), place), shape=(at, n))


def _arranged(problem: NestedProblem, tree: Tree) -> tuple[NestedProblem, list[np.ndarray]]:
    """Pad groups until each has equally many in it, so that sums over them need no index.

    Returns:
        The problem and the places of each level's groups; with the padding of single fits where
        groups are too unequal.
    """
    size = _rounded(len(tree.levels[-1]))
    sizes, places = [size], [np.arange(len(tree.levels[-1]))]
    for parent in tree.parents[::-1]:
        counts = np.bincount(parent)
        rank = np.arange(len(parent)) - np.repeat(np.cumsum(counts) - counts, counts)
        most = int(counts.max())
        size *= most
        sizes.insert(0, size)
        places.insert(0, places[0][parent] * most + rank)
    if sizes[0] > 2 * _rounded(len(tree.levels[0])):
        return problem, [np.arange(len(level)) for level in tree.levels]

    def put(x: np.ndarray, level: int) -> np.ndarray:
        moved = np.zeros((*x.shape[:-1], sizes[level]))
        moved[..., places[level]] = x[..., : len(places[level])]
        return moved

    arranged = replace(
        problem,
        U=put(problem.U, 0),
        Y=put(problem.Y, 0),
        C=put(problem.C, 1),
        parents=(None,) * len(tree.parents),
        sizes=tuple(sizes[1:]),
    )
    return arranged, places


def _trimmed(problem: CrossedProblem) -> CrossedProblem:
    """Take most of the padding of few groups away: lanes pay for each of them."""
    m = problem.U.shape[2]
    if not m or not isinstance(problem.cells, DenseCells):
        return problem
    size = min(m, _rounded(int(problem.n_groups[problem.slices[0].start])))
    return replace(
        problem,
        U=problem.U[:, :, :size],
        Y=problem.Y[:, :, :size],
        cells=DenseCells(problem.cells.value[:, :size]),
    )


def _rounded(groups: int) -> int:
    """Round up by an eighth at most, so that similar designs share compiled code."""
    step = max(2, 1 << max(groups.bit_length() - 4, 0))
    return -(-groups // step) * step


def project(
    shared: SharedFactors, y: np.ndarray, center: np.ndarray | None = None
) -> FactorResponses:
    """Compress responses given by row, their offset removed, (n, nobs).

    Args:
        shared: what they share.
        y: the responses.
        center: coefficients (working coordinates) to take out of them, (n, p); None for those of
            least squares.
    """
    layout, p = shared.layout, shared.n_fixed
    problem: Any = shared.problem
    weighted = y if layout.weights is None else y * layout.weights
    origin = center
    if origin is None:
        origin = (weighted @ layout.X)[:, layout.fixed.kept] @ layout.fixed.inverse
    squares = np.maximum(np.einsum("ni,ni->n", weighted, y), np.finfo(float).tiny)
    n = len(y)
    nested = isinstance(problem, NestedProblem)
    parts = {
        name: np.repeat(np.asarray(getattr(problem, name))[None], n, axis=0)
        for name in shared.varying
    }
    total = np.empty(n)
    together = max(1, BYTES // (8 * y.shape[1]))
    for first in range(0, n, together):
        lanes = slice(first, min(first + together, n))
        data = _residuals(shared, y[lanes], origin[lanes])
        total[lanes] = np.einsum("ni,ni->n", data, data)
        inside = project_out(shared.Q, data, shared.starts, shared.sizes).transpose(1, 0, 2)
        parts["Y"][lanes, :, -1][:, :, shared.place] = inside
        if nested:
            _fill_nested(shared, parts["C"][lanes], data)
        elif shared.outside is not None:
            found, k = shared.outside.of(data), len(shared.outside.R)
            parts["outside_y"][lanes, : k + 1] = found
        else:
            parts["C_cross"][lanes, :, -1] = (shared.tail @ data.T).T
            C = parts["C"][lanes]
            C[:, -1, :p] = C[:, :p, -1] = data @ shared.columns.T
            C[:, -1, -1] = np.einsum("ni,ni->n", data, data)
    y_scale = np.sqrt(np.where(total > 0.0, total, 1.0))
    for name, part in parts.items():
        if name == "outside_y":
            part /= y_scale[:, None]
            continue
        unit = y_scale.reshape(-1, *[1] * (part.ndim - 2))
        part[:, :, -1] /= unit
        if name == "C":
            part[:, -1] /= unit
    whole = replace(problem, **parts)
    return FactorResponses(whole, shared.varying, origin, y_scale, total / squares)


def _residuals(shared: SharedFactors, y: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Return least-squares residuals in the order of the groups, weighted, (n, nobs)."""
    layout = shared.layout
    fixed = layout.fixed
    fitted = layout.X[:, fixed.kept] @ (fixed.inverse @ origin.T)
    data = np.ascontiguousarray((y - fitted.T)[:, shared.order])
    return data if shared.root is None else data * shared.root


def _fill_nested(shared: SharedFactors, C: np.ndarray, data: np.ndarray) -> None:
    """Put the cross-products of responses (n, nobs) into C (n, w, w, m2)."""
    assert shared.outer is not None
    first, place = shared.outer
    for j, column in enumerate(shared.columns):
        sums = np.add.reduceat(column * data, first, axis=1)
        C[:, -1, j][:, place] = C[:, j, -1][:, place] = sums
    C[:, -1, -1][:, place] = np.add.reduceat(data * data, first, axis=1)


def rough(
    shared: SharedFactors, y: np.ndarray, responses: FactorResponses, which: np.ndarray
) -> np.ndarray:
    """Return rough relative covariances, diagonal, of some of the responses, (n, q, q)."""
    origin, y_scale, total = responses.origin, responses.y_scale, responses.total
    found = [
        rough_variances(
            y[lane],
            shared.layout,
            Scaling(origin[lane], float(y_scale[lane]), float(total[lane])),
        )
        for lane in which
    ]
    return np.stack(found)[:, :, None] * np.eye(len(shared.layout.A))
