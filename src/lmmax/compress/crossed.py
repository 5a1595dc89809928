"""Crossed grouping factors: statistics of the head's groups and of the tail's levels.

See :mod:`lmmax.likelihood.crossed`.  What depends on the designs only is made once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..compilation import Compiled, computing
from ..compilation_cache import compilation_cache
from ..likelihood.cells import DenseCells, SparseCells
from ..likelihood.crossed import CrossedProblem, Tail
from .layout import COPIES, EngineError, FactorColumns, Layout, memory
from .rows import bucket, orthonormalise, project_out
from .scaling import Scaling, pad_columns, pad_fixed, padding, scaled

PAIR_SECONDS, FLOP_SECONDS = 6e-9, 1e-11
"""Rough cost of a pair of cells and of a multiplication in a dense product, for choosing."""
DENSE_CELLS_LIMIT = 1 << 27
"""Most entries of a dense array of cells (1 GB)."""
ROTATED_LIMIT, ROTATED_FLOPS = 1 << 25, 2e11
"""Most entries of dense columns of the tail by row, and multiplications, for which they are made
orthonormal."""


@dataclass(frozen=True)
class Outside:
    """What the head leaves of ``[Z_t X]``, as ``Q R``.

    Attributes:
        Q: orthonormal columns, rows in the order of the head's groups, (n, k).
        R: triangular factor, (k, N + p).
    """

    Q: np.ndarray
    R: np.ndarray

    def of(self, left: np.ndarray) -> np.ndarray:
        """Return ``Q'y`` and the norm of what remains, for what the head leaves of y, (..., n)."""
        inside = left @ self.Q
        rest = left - inside @ self.Q.T
        again = rest @ self.Q  # for the digits that large effects cost
        norm = np.linalg.norm(rest - again @ self.Q.T, axis=-1, keepdims=True)
        return np.concatenate([inside + again, norm], axis=-1)


@dataclass(frozen=True)
class Skeleton:
    """What a crossed model's designs give, for any response.

    Attributes:
        order: positions of the rows sorted by the head.
        starts, sizes: first sorted row and number of rows of the head's groups.
        U: triangular factors of the head's columns, (q1, q1, m).
        cells: projected columns of the tail, padded.
        C_tail: the tail's cross-product outside the head's column spaces, padded, (N, N).
        precision: largest diagonal entry of Z'Z, per factor of the tail.
        tails: the factors of the tail with padding.
        positions: their places in the layout.
        head: that of the head, None without one.
        outside: rows for ``C_tail``, where effects are far larger than the residual.
    """

    order: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    U: np.ndarray
    cells: SparseCells | DenseCells
    C_tail: Any
    precision: np.ndarray
    tails: tuple[Tail, ...]
    positions: tuple[int, ...]
    head: int | None
    outside: Outside | None = None


def rotates(layout: Layout, frame: Skeleton) -> bool:
    """Return whether the rows are few enough to be kept in place of cross-products."""
    width = len(frame.C_tail) + len(layout.fixed.kept)
    q1, _, m = frame.U.shape
    tall = max(len(frame.order), q1 * m) + width
    return tall * width <= ROTATED_LIMIT and 4.0 * tall * width**2 <= ROTATED_FLOPS


def rotated(layout: Layout, frame: Skeleton) -> Skeleton:
    """Return the skeleton with rows in place of cross-products."""
    n, n_tail, p = len(frame.order), len(frame.C_tail), len(layout.fixed.kept)
    root = None if layout.weights is None else np.sqrt(layout.weights[frame.order])
    data = np.zeros((n_tail + p, n))
    for tail, position in zip(frame.tails, frame.positions, strict=True):
        codes = layout.factors[position].codes[frame.order]
        for effect, z in enumerate(layout.random_columns(position, frame.order)):
            data[tail.start + effect * tail.levels + codes, np.arange(n)] = z
    data[n_tail:] = layout.response(np.zeros(n), np.zeros(p), frame.order)[:-1]
    if root is not None:
        data *= root
    if frame.head is not None:
        project_out(_head_columns(layout, frame, root), data, frame.starts, frame.sizes)
    Q, R = np.linalg.qr(data.T)
    return replace(frame, outside=Outside(Q, R))


def _head_columns(layout: Layout, frame: Skeleton, root: np.ndarray | None) -> np.ndarray:
    """Return orthonormal columns of the head, rows in the order of its groups, (q1, n)."""
    assert frame.head is not None
    Q = layout.random_columns(frame.head, frame.order)
    if root is not None:
        Q *= root
    orthonormalise(Q, frame.starts, frame.sizes)
    return Q


def fine_bucket(size: int) -> int:
    """Round a number of levels up: the cost grows with its cube, so by a sixteenth at most."""
    step = max(8, 1 << max(size.bit_length() - 5, 0))
    return -(-size // step) * step


def skeleton(layout: Layout, *, pad: bool = True) -> Skeleton:
    """Analyse the designs: head, tail, and the cells where they meet."""
    chain = layout.chain
    headless = layout.factors[chain[0]].root is not None
    head, positions = (None, chain) if headless else (chain[0], chain[1:])
    tails, at = [], 0
    for position in positions:
        factor = layout.factors[position]
        levels = fine_bucket(factor.n_groups) if pad else factor.n_groups
        tails.append(Tail(at, factor.n_effects, levels))
        at += factor.n_effects * levels
    _check_memory(layout, at)
    n = len(layout.X)
    order = np.arange(n) if headless or layout.order is None else layout.order
    root = None if layout.weights is None else np.sqrt(layout.weights[order])
    columns = [layout.random_columns(position, order) for position in positions]
    if root is not None:
        columns = [z * root for z in columns]
    codes = [layout.factors[position].codes[order] for position in positions]
    where, what = _cross_products(columns, codes, tails, at)
    precision = _precision(layout, columns, codes, positions)
    if head is None:
        C_tail = _sum_at(where, what, at)
        none = np.zeros((0, 0, 0))
        sizes = starts = np.zeros(0, dtype=np.int64)
        cells: Any = DenseCells(np.zeros((0, 0, at)))
        return Skeleton(
            order,
            starts,
            sizes,
            none,
            cells,
            C_tail,
            precision,
            tuple(tails),
            tuple(positions),
            None,
        )

    sizes = layout.sizes[head]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    Q = layout.random_columns(head, order)
    if root is not None:
        Q *= root
    U = orthonormalise(Q, starts, sizes)
    groups = layout.factors[head].codes[order]
    value, group, column = _cells(Q, groups, columns, codes, tails)
    m, size = len(sizes), bucket(len(sizes)) if pad else len(sizes)
    counts = np.bincount(group, minlength=m).astype(np.int64)
    pairs = int(np.sum(counts * (counts + 1)) // 2)
    q1 = len(U)
    dense = 2.0 * m * q1 * at**2 * FLOP_SECONDS < pairs * q1 * PAIR_SECONDS
    if dense and q1 * size * at <= DENSE_CELLS_LIMIT:
        array = np.zeros((q1, size, at))
        array[:, group, column] = value
        cells = DenseCells(array)
        C_tail = _sum_at(where, what, at)
        for part in array:
            C_tail -= part.T @ part
    else:
        first, second = _pairs(counts)
        cells = _pad_cells(value, group, column, first, second, size, at, pad)
        n_terms = sum(map(len, where))
        padded_terms = bucket(n_terms) if pad else n_terms
        place, term = np.zeros(padded_terms, dtype=np.int32), np.zeros(padded_terms)
        np.concatenate(where, out=place[:n_terms], casting="unsafe")
        np.concatenate(what, out=term[:n_terms])
        with computing(), compilation_cache():
            C_tail = _outside(cells, place, term)
    padded = np.zeros((q1, q1, size))
    padded[:, :, :m] = U
    return Skeleton(
        order, starts, sizes, padded, cells, C_tail, precision, tuple(tails), tuple(positions), head
    )


def compress(
    y: np.ndarray,
    layout: Layout,
    frame: Skeleton,
    *,
    pad: bool = True,
    center: np.ndarray | None = None,
) -> tuple[CrossedProblem, Scaling]:
    """Compress a response (n,), its offset removed, around coefficients in working coordinates."""
    beta = layout.least_squares(y) if center is None else center
    p = len(beta)
    data = layout.response(y, beta, frame.order)
    root = None if layout.weights is None else np.sqrt(layout.weights[frame.order])
    if root is not None:
        data *= root
    scaling = scaled(y, layout, beta, float(data[-1] @ data[-1]))
    data[-1] /= scaling.y_scale
    q1, size = frame.U.shape[0], frame.U.shape[2]
    Y = np.zeros((q1, p + 1, size))
    if frame.head is not None:
        Q = _head_columns(layout, frame, root)
        Y[:, :, : len(frame.sizes)] = project_out(Q, data, frame.starts, frame.sizes)
    extra = padding(p) if pad else 0
    blocks = [(0, 0)] if frame.head is None else []
    for position in layout.chain:
        here = layout.slices[position]
        blocks.append((here.start, here.stop))
    problem = CrossedProblem(
        U=frame.U,
        cells=frame.cells,
        Y=pad_columns(Y, extra, 1),
        **_products(layout, frame, data, root, extra),
        roots=tuple(
            _pad_root(layout.factors[position], tail)
            for position, tail in zip(frame.positions, frame.tails, strict=True)
        ),
        precision=frame.precision,
        tails=frame.tails,
        blocks=tuple(blocks),
        **scaling.coordinates(layout, extra),
    )
    return problem, scaling


def _products(
    layout: Layout, frame: Skeleton, data: np.ndarray, root: np.ndarray | None, extra: int
) -> dict[str, Any]:
    """Return the cross-products of what the head leaves of ``[X y]`` (p + 1, n), or its rows."""
    n_tail, p = len(frame.C_tail), len(data) - 1
    if frame.outside is not None:
        k, width = frame.outside.R.shape
        return {
            "C_tail": np.zeros((0, 0)),
            "C_cross": np.zeros((0, p + 1 + extra)),
            "C": pad_fixed(np.zeros((p + 1, p + 1)), extra),
            # As many rows as columns, however many the data have.
            "outside": np.pad(frame.outside.R, ((0, width - k), (0, extra))),
            "outside_y": np.pad(frame.outside.of(data[-1]), (0, width - k)),
        }
    C_cross = np.zeros((n_tail, p + 1))
    for tail, position in zip(frame.tails, frame.positions, strict=True):
        Z = layout.random_columns(position, frame.order)
        codes = layout.factors[position].codes[frame.order]
        for effect, z in enumerate(Z if root is None else Z * root):
            at = tail.start + effect * tail.levels
            for j, column in enumerate(data):
                sums = np.bincount(codes, weights=z * column, minlength=tail.levels)
                C_cross[at : at + tail.levels, j] = sums
    return {
        "C_tail": frame.C_tail,
        "C_cross": pad_columns(C_cross, extra, 1),
        "C": pad_fixed(data @ data.T, extra),
    }


def _outside_head(cells: SparseCells, place: Any, value: Any) -> jax.Array:
    """Return ``Z_t'Z_t`` from its terms, less what the head's columns explain."""
    n = cells.n_columns
    whole = jnp.zeros(n * n, cells.value.dtype).at[place].add(value).reshape(n, n)
    return whole - sum(cells.gram(a, a) for a in range(len(cells.value)))


# On the device, where the same pairs are summed in every evaluation.
_outside = Compiled(_outside_head)


def _precision(
    layout: Layout,
    columns: list[np.ndarray],
    codes: list[np.ndarray],
    positions: tuple[int, ...],
) -> np.ndarray:
    """Return the largest diagonal entry of ``Z'Z``, in terms of independent effects, per factor."""
    largest = []
    for position, Z, code in zip(positions, columns, codes, strict=True):
        factor = layout.factors[position]
        own = np.array([np.bincount(code, z * z, factor.n_groups) for z in Z])
        if factor.root is not None:
            own = own @ factor.root**2
        largest.append(own.max())
    return np.array(largest)


def _check_memory(layout: Layout, n_tail: int) -> None:
    """Raise if the dense tail cannot fit into memory."""
    needed = COPIES * 8.0 * n_tail**2
    available = memory()
    if needed > 0.9 * available:
        related = any(factor.root is not None for factor in layout.factors)
        tail = layout.chain[0 if layout.factors[layout.chain[0]].root is not None else 1 :]
        names = ", ".join(layout.factors[at].name for at in tail)
        remedy = "fewer levels" if related else "engine='iterative', or fewer levels"
        raise EngineError(
            f"the crossed form needs a dense matrix of order {n_tail} for the effects of {names}, "
            f"about {needed / 2**30:.2g} GB with its copies, and this machine has "
            f"{available / 2**30:.2g} GB; use {remedy}"
        )


def _cross_products(
    columns: list[np.ndarray], codes: list[np.ndarray], tails: list[Tail], n_tail: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the terms of ``Z_t' Z_t`` as positions in the flat matrix (N N,) and values."""
    positions, values = [], []
    for f, z_f, code_f in zip(tails, columns, codes, strict=True):
        for g, z_g, code_g in zip(tails, columns, codes, strict=True):
            for a in range(f.effects):
                for b in range(g.effects):
                    row = f.start + a * f.levels + code_f
                    positions.append(row * n_tail + (g.start + b * g.levels + code_g))
                    values.append(z_f[a] * z_g[b])
    return positions, values


def _sum_at(positions: list[np.ndarray], values: list[np.ndarray], n: int) -> np.ndarray:
    """Return the (n, n) matrix of the sums of values at positions, in one pass over it."""
    flat = np.bincount(np.concatenate(positions), np.concatenate(values), n * n)
    return np.asarray(flat.reshape(n, n))


def _cells(
    Q: np.ndarray,
    groups: np.ndarray,
    columns: list[np.ndarray],
    codes: list[np.ndarray],
    tails: list[Tail],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values (q1, c), groups and columns (c,) of the projected tail, sorted by group."""
    values, heads, places = [], [], []
    for tail, z, code in zip(tails, columns, codes, strict=True):
        key, row_cell = np.unique(groups * tail.levels + code, return_inverse=True)
        for effect, z_effect in enumerate(z):
            values.append(
                np.array(
                    [np.bincount(row_cell, weights=q * z_effect, minlength=len(key)) for q in Q]
                )
            )
            heads.append(key // tail.levels)
            places.append(tail.start + effect * tail.levels + key % tail.levels)
    group, column = np.concatenate(heads), np.concatenate(places)
    by_group = np.argsort(group, kind="stable")
    return np.concatenate(values, axis=1)[:, by_group], group[by_group], column[by_group]


def _pairs(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of positions within groups of ``counts`` consecutive ones."""
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    size = int(counts.sum())
    within = np.arange(size) - np.repeat(starts, counts)
    first = np.repeat(np.arange(size), within + 1)
    before = np.concatenate([[0], np.cumsum(within + 1)[:-1]])
    second = np.arange(len(first)) - np.repeat(before - np.repeat(starts, counts), within + 1)
    return first, second


def _pad_cells(
    value: np.ndarray,
    group: np.ndarray,
    column: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    n_groups: int,
    n_columns: int,
    pad: bool,
) -> SparseCells:
    """Add cells of value zero, and pairs of them, up to a few sizes."""
    cells = bucket(len(group) + 1) if pad else len(group)
    pairs = bucket(len(first)) if pad else len(first)
    padded = np.zeros((len(value), cells))
    padded[:, : len(group)] = value

    def fill(x: np.ndarray, size: int, last: int) -> np.ndarray:
        return np.concatenate([x, np.full(size - len(x), last)]).astype(np.int32)

    return SparseCells(
        value=padded,
        head=fill(group, cells, n_groups - 1),
        column=fill(column, cells, n_columns - 1),
        first=fill(first, pairs, cells - 1),
        second=fill(second, pairs, cells - 1),
        n_groups=n_groups,
        n_columns=n_columns,
    )


def _pad_root(factor: FactorColumns, tail: Tail) -> np.ndarray | None:
    """Return the factor of the relationship matrix, with padding levels unrelated to any."""
    if factor.root is None:
        return None
    root = np.eye(tail.levels)
    root[: factor.n_groups, : factor.n_groups] = factor.root
    return root
