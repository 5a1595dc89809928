"""What a fit on a line needs of each response: a few numbers, from one pass over its rows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..threads import NUMPY, n_cores, one_blas_thread
from .grouped_rows import as_range
from .one_variance import OneVariance

EXPLAINED = 1e-3
"""Share of a response's sum of squares below which what X leaves is taken from its residuals."""
SUM_BYTES, LEAST_LANES, MOST_LANES = 1 << 26, 16, 512
"""Bytes of the groups' sums of responses that are compressed together; bounds of their number."""
TILE_BYTES = 1 << 19
"""Bytes of the rows that are summed together: they stay in cache from one sum to the next."""


class Statistics(NamedTuple):
    """What a fit needs of each response; additive in nothing, small.

    Attributes:
        origin: least-squares coefficients in working coordinates, (lanes, p).
        total: residual sum of squares of least squares, (lanes,).
        inside: coordinates of the groups' sums of residuals, (lanes, R).
        sets: sums of squares of those coordinates that X does not see, per set, (lanes, U).
    """

    origin: np.ndarray
    total: np.ndarray
    inside: np.ndarray
    sets: np.ndarray


def statistics(design: OneVariance, y: np.ndarray) -> Statistics:
    """Compress responses, offset removed, a column each, (n, lanes); sums are in float64.

    One pass over them, tile by tile in cache, around the mean of a few rows.  Where that or X
    explains nearly all of a response, its residuals are taken before anything is squared.
    """
    k = y.shape[1]
    lanes = min(max(SUM_BYTES // (8 * len(design.groups_X)), LEAST_LANES), MOST_LANES)
    ends = np.linspace(0, k, -(-k // lanes) + 1).astype(np.int64)
    blocks = [y[:, first:last] for first, last in pairwise(ends.tolist())]
    if len(blocks) == 1:
        return _statistics(design, y)
    # NumPy lets other threads run meanwhile; its own would have no cores left.
    with one_blas_thread(NUMPY), ThreadPoolExecutor(n_cores()) as threads:
        parts = list(threads.map(partial(_statistics, design), blocks))
    return Statistics(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


def _statistics(design: OneVariance, y: np.ndarray) -> Statistics:
    fixed = design.layout.fixed
    with np.errstate(invalid="ignore", over="ignore"):
        centre = design.centre(y)
        origin, size, sums = summed(design, y, centre)
        total = size - np.einsum("ij,ij->j", origin, origin)
        fitted = origin.copy()
        close = np.flatnonzero(total < EXPLAINED * size)
        if close.size:
            X = design.layout.X[:, fixed.kept]
            rest = y[:, close] - centre[close] - X @ (fixed.inverse @ origin[:, close])
            again, size, sums[:, close] = summed(design, rest, np.zeros(len(close)))
            total[close] = size - np.einsum("ij,ij->j", again, again)
            fitted[:, close] = again
            origin[:, close] += again
        if design.ones is not None:
            origin += design.ones[:, None] * centre
        return _of_sums(design, fitted, total, sums)._replace(origin=origin.T)


def summed(
    design: OneVariance, y: np.ndarray, centre: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return least-squares coefficients, sums of squares and the groups' sums around a centre.

    Args:
        design: the designs.
        y: the responses, (n, lanes).
        centre: what is taken from each, (lanes,).

    Returns:
        Working coefficients (p, lanes), sums of squares (lanes,), weighted sums of z times the
        responses (m, lanes).
    """
    rows, lanes = design.rows, len(centre)
    products, size = np.zeros((rows.X.shape[1], lanes)), np.zeros(lanes)
    sums = np.zeros((len(design.groups_X), lanes))
    tiles = rows.tiles(max(TILE_BYTES // (8 * lanes), 1))
    buffer = np.empty((max((tile.at.stop - tile.at.start for tile in tiles), default=0), lanes))
    for tile in tiles:
        around = buffer[: tile.at.stop - tile.at.start]
        np.copyto(around, y[tile.rows])
        around -= centre
        both = around if rows.weights is None else around * rows.weights[tile.at, None]
        products += rows.X[tile.at].T @ both
        size += np.einsum("ij,ij->j", both, around)
        if tile.group_size:
            each = around.reshape(-1, tile.group_size, lanes)
            np.add.reduce(each, axis=1, out=sums[tile.groups])
        else:
            sums[tile.groups] += tile.to_sums @ around
    return design.layout.fixed.inverse.T @ products, size, sums


def from_sums(
    design: OneVariance, origin: np.ndarray, total: np.ndarray, sums: np.ndarray
) -> Statistics:
    """Return the statistics from the groups' sums of weighted residuals times z, (lanes, m)."""
    found = _of_sums(design, np.zeros_like(origin.T), total, np.ascontiguousarray(sums.T))
    return found._replace(origin=origin)


def _of_sums(
    design: OneVariance, origin: np.ndarray, total: np.ndarray, sums: np.ndarray
) -> Statistics:
    """Return the statistics from sums from which the fitted part is still to be taken.

    Args:
        design: the designs.
        origin: working coefficients of that part, (p, lanes).
        total: residual sums of squares, (lanes,).
        sums: the groups' weighted sums of z times the responses, (m, lanes).
    """
    groups_X = design.groups_X
    if design.to_groups is not None:
        sums = design.to_groups @ (sums - groups_X @ origin)
        groups_X, origin = np.zeros_like(groups_X), np.zeros_like(origin)
    inside, sets = [], []
    for own, basis in design.members:
        here = sums[as_range(own)]
        # The basis spans what X does there: what it leaves of the sums is free of the fitted part.
        seen = basis.T @ here
        squares = np.einsum("ij,ij->j", here, here)
        left = squares - np.einsum("ij,ij->j", seen, seen)
        seen -= (basis.T @ groups_X[own]) @ origin
        close = np.flatnonzero(left < EXPLAINED * squares)
        if close.size:
            rest = here[:, close] - groups_X[own] @ origin[:, close]
            seen[:, close] = basis.T @ rest
            rest -= basis @ seen[:, close]
            left[close] = np.einsum("ij,ij->j", rest, rest)
        inside.append(seen.T)
        sets.append(left)
    loose = sums[design.inside] - groups_X[design.inside] @ origin
    inside.append(loose.T)
    return Statistics(
        origin.T,
        total,
        np.concatenate(inside, axis=1),
        np.stack(sets, axis=1) if sets else np.zeros((len(total), 0)),
    )
