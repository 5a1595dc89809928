"""One grouping factor: sufficient statistics per group.

For each group the thin QR factorisation ``Z_i = Q_i U_i`` keeps ``U_i``, the projection
``Y_i = Q_i' [X_i y_i]``, and adds the cross-product of the remaining rows to ``C``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ..likelihood.grouped import MANY_EFFECTS, GroupedProblem
from .columns import triangle
from .layout import Layout
from .rows import SMALLEST_BUCKET, bucket, chunk_rows, chunks, orthonormalise, project_out
from .scaling import Scaling, pad_coordinates, pad_fixed, padding, scaled

MERGE_LIMIT = 2000
"""Most patterns of ``U`` merged by a loop; with more, merging would cost more than it saves."""


@dataclass(frozen=True)
class Statistics:
    """Statistics per group in working coordinates.

    Attributes:
        U: triangular factors, (q, q, m).
        Y: projected ``[X y]``, (q, p + 1, m).
    """

    U: np.ndarray
    Y: np.ndarray


def compress(
    y: np.ndarray, layout: Layout, *, pad: bool = True, center: np.ndarray | None = None
) -> tuple[GroupedProblem, Statistics, Scaling]:
    """Compress a response (n,), its offset removed, around coefficients in working coordinates."""
    p = len(layout.fixed.kept)
    beta = layout.least_squares(y) if center is None else center
    U, Y, C, total = _sums(y, layout, beta)
    shift, far_apart = within_groups(C[:p, :p], C[None, p, :p], C[None, p, p])
    if far_apart[0]:
        beta = beta + shift[0]
        U, Y, C, total = _sums(y, layout, beta)
    scaling = scaled(y, layout, beta, total)
    Y[:, p] /= scaling.y_scale
    C[p] /= scaling.y_scale
    C[:, p] /= scaling.y_scale
    merged_U, merged_Y, weight = _merge(U, Y)
    problem = GroupedProblem(
        U=merged_U, Y=merged_Y, weight=weight, C=C, **scaling.coordinates(layout)
    )
    if pad:
        whole = problem.U is U
        problem = _pad(problem)
        if whole and problem.Y.shape[1] == p + 1:
            # Not merged: one copy of the statistics serves both views.
            U, Y = problem.U[:, :, : U.shape[2]], problem.Y[:, :, : U.shape[2]]
    if len(layout.A) > MANY_EFFECTS:
        problem = replace(problem, patterns=_patterns(problem.U, pad))
    return problem, Statistics(U, Y), scaling


def within_groups(XX: np.ndarray, Xy: np.ndarray, yy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the coefficients within groups, and where they are the better centre.

    With groups far apart, the least-squares residuals are a poor centre for what varies within
    groups: rss would be a small difference of large sums.

    Args:
        XX: cross-products of what the groups' column spaces leave of the working X, (p, p).
        Xy: the same with responses around some centre, (n, p).
        yy: of the responses with themselves, (n,).

    Returns:
        Coefficients beyond the centre, (n, p), and whether to move there, (n,).
    """
    # What varies between groups only has no part in XX, whose eigenvalues are at most one.
    shift = Xy @ np.linalg.inv(XX + 1e-10 * np.eye(len(XX)))
    left = yy - 2.0 * np.einsum("ni,ni->n", shift, Xy) + np.einsum("ni,ni->n", shift @ XX, shift)
    return shift, left < 1e-4 * yy


def _sums(
    y: np.ndarray, layout: Layout, beta: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return U, Y, C, and the sum of squares of ``y - X_working beta``, in one pass."""
    order, weights, sizes = layout.order, layout.weights, layout.sizes[0]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    p, q, m = len(layout.fixed.kept), len(layout.A), len(sizes)
    U = np.zeros((q, q, m))
    Y = np.empty((q, p + 1, m))
    C = np.zeros((p + 1, p + 1))
    total = 0.0
    for groups, rows in chunks(starts, sizes, chunk_rows(max(p + 1, q))):
        take: slice | np.ndarray = rows if order is None else order[rows]
        data = layout.response(y, beta, take)
        Q = layout.random_columns(0, take)
        if weights is not None:
            root = np.sqrt(weights[take])
            data *= root
            Q *= root
        total += data[p] @ data[p]
        local, count = starts[groups] - rows.start, sizes[groups]
        U[:, :, groups] = orthonormalise(Q, local, count)
        Y[:, :, groups] = project_out(Q, data, local, count)
        C += data @ data.T
    return U, Y, C, total


def equal_groups(U: np.ndarray, fewest: int) -> list[np.ndarray]:
    """Return the positions of groups with equal factors ``U (q, q, m)``, pattern by pattern.

    Only patterns with more than ``fewest`` groups; none at all if there are too many of them.
    """
    entries = U[np.triu_indices(len(U))]
    mixing = np.sqrt(np.arange(2.0, 2.0 + len(entries)))
    key = np.zeros(U.shape[2])
    for entry, factor in zip(entries, mixing, strict=True):  # a fixed order of summation
        key += entry * factor
    label, _ = pd.factorize(key)
    counts = np.bincount(label)
    merged = np.flatnonzero(counts > fewest)
    if len(merged) > MERGE_LIMIT:
        return []
    by_label = np.argsort(label, kind="stable")
    ends = np.cumsum(counts)
    patterns = [by_label[ends[at] - counts[at] : ends[at]] for at in merged]
    # Different factors may have equal keys.
    return [one for one in patterns if not np.any(U[:, :, one] != U[:, :, one[:1]])]


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
    patterns = equal_groups(U, rows)
    gain = sum(len(members) - rows for members in patterns)
    if gain < m // 4:
        return U, Y, weight

    keep = np.ones(m, dtype=bool)
    parts_U, parts_Y, parts_weight = [], [], []
    for members in patterns:
        keep[members] = False
        shared = U[:, :, members[0]]
        R = triangle(Y[:, :, members].reshape(rows, -1).T)
        parts_Y.append(R.T.reshape(q, width, rows))
        parts_U.append(np.broadcast_to(shared[:, :, None], (q, q, rows)))
        parts_weight.append(np.full(rows, len(members) / rows))
    return (
        np.concatenate([*parts_U, U[:, :, keep]], axis=2),
        np.concatenate([*parts_Y, Y[:, :, keep]], axis=2),
        np.concatenate([*parts_weight, weight[keep]]),
    )


def _patterns(U: np.ndarray, pad: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return ``patterns`` of a :class:`GroupedProblem`; padding repeats the first factor."""
    alike = np.arange(U.shape[2])
    for members in equal_groups(U, 1):
        alike[members] = members[0]
    first, of = np.unique(alike, return_inverse=True)
    extra = _finely(len(first)) - len(first) if pad else 0
    first = np.concatenate([first, np.full(extra, first[0])])
    return first.astype(np.int32), of.astype(np.int32)


def _finely(size: int) -> int:
    """Round a number up to one of eight values per octave."""
    step = 1 << max(size.bit_length() - 4, 0)
    return -(-size // step) * step


def _pad(problem: GroupedProblem) -> GroupedProblem:
    """Round the numbers of groups and of fixed effects up, so that compiled code is reused."""
    q, width, m = problem.Y.shape
    # With many effects each group is so much work that it takes more to do a few in vain.
    groups = (bucket if q <= MANY_EFFECTS else _finely)(m) - m
    extra = padding(width - 1)
    if not groups and not extra:
        return problem
    Y = np.zeros((q, width + extra, m + groups))
    Y[:, : width - 1, :m], Y[:, -1, :m] = problem.Y[:, :-1], problem.Y[:, -1]  # y stays last
    U = np.zeros((q, q, m + groups))
    U[:, :, :m] = problem.U
    x_inverse, beta_origin = pad_coordinates(problem.x_inverse, problem.beta_origin, extra)
    return replace(
        problem,
        U=U,
        Y=Y,
        weight=np.concatenate([problem.weight, np.zeros(groups)]),
        C=pad_fixed(problem.C, extra),
        x_inverse=x_inverse,
        beta_origin=beta_origin,
    )
