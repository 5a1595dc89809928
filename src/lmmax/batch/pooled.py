"""Sufficient statistics of many small data sets of one model, in one pass over all their rows.

What :mod:`lmmax.compress.grouped` does for one data set is done for all of them at once: sums over
the rows of a data set, or of a group, are sums over stretches of the rows of all.  Data sets that
need a closer look (dependent columns, groups far apart, nothing left to explain) are not served;
they are compressed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from ..compress.columns import column_factor, constant, to_first
from ..compress.rows import bucket, orthonormalise, project_out
from ..compress.scaling import padding
from ..fit import ROUNDING
from ..likelihood.grouped import GroupedProblem

INDEPENDENT = 1e-5
"""Columns of which the ones before leave less than this fraction get a closer look."""
FEW_GROUPS = 16
"""Smallest number of groups that data sets are padded to."""
FIELDS = tuple(field.name for field in fields(GroupedProblem) if field.name != "patterns")
"""What several data sets have side by side; each group counts as having a design of its own."""


class Rows(NamedTuple):
    """Rows of several data sets, one after the other, each in the order of its groups.

    Attributes:
        X: fixed-effects design, (n, p).
        Z: random-effects design, (n, q).
        y: response, its offset removed, (n,).
        weights: prior weights, (n,), or None.
        groups: group of each row, (n,); the same number in two data sets is two groups.
        sizes: number of rows of each data set, none of them zero, (s,).
    """

    X: np.ndarray
    Z: np.ndarray
    y: np.ndarray
    weights: np.ndarray | None
    groups: np.ndarray
    sizes: np.ndarray


class Pooled(NamedTuple):
    """Compressed data sets that are padded to one shape.

    Attributes:
        numbers: which data sets, (n,).
        problem: their problems; every leaf has a leading axis.
        total: sum of squares of the least-squares residuals, relative to that of y, (n,).
    """

    numbers: np.ndarray
    problem: GroupedProblem
    total: np.ndarray


def pooled(rows: Rows, mixed: Sequence[tuple[slice, bool]]) -> list[Pooled]:
    """Compress data sets in one pass; their groups are not merged.

    Args:
        rows: the data.
        mixed: columns of Z of each random term, and whether they may be mixed.

    Returns:
        The statistics by number of groups.  Data sets that are missing need a closer look.
    """
    X, Z, y, weights, codes, sizes = rows
    s, p, q = len(sizes), X.shape[1], Z.shape[1]
    own = np.repeat(np.arange(s), sizes)
    firsts = np.cumsum(sizes) - sizes
    w = np.ones(len(y)) if weights is None else weights

    def sums(values: np.ndarray) -> np.ndarray:
        return np.asarray(np.add.reduceat(values, firsts))

    R, sound = _factors(sums((w[:, None] * X)[:, :, None] * X[:, None, :]))
    A = np.zeros((s, q, q))
    for here, mix in mixed:
        part = Z[:, here]
        gram = sums((w[:, None] * part)[:, :, None] * part[:, None, :]) / sizes[:, None, None]
        if mix and gram.shape[1] > 1:
            factors, independent = _factors(gram)
            factor = column_factor(part, weights)
            ones = constant(part, factor, weights) if len(factor.kept) == part.shape[1] else None
            if ones is not None:
                factors = to_first(factors @ ones) @ factors
            A[:, here, here] = factors
        else:
            squares = np.einsum("sii->si", gram)
            independent = (squares > 0.0).all(axis=1)
            root = np.sqrt(np.where(independent[:, None], squares, 1.0))
            A[:, here, here] = root[:, :, None] * np.eye(gram.shape[1])
        sound &= independent
    R_inverse, A_inverse = np.linalg.inv(R), np.linalg.inv(A)
    working = np.einsum("ni,nij->nj", X, R_inverse[own])
    beta = sums(working * (w * y)[:, None])
    data = np.empty((p + 1, len(y)))
    data[:p] = working.T
    data[p] = y - np.einsum("nj,nj->n", working, beta[own])
    Q = np.ascontiguousarray(np.einsum("ni,nij->jn", Z, A_inverse[own]))
    if weights is not None:
        data *= np.sqrt(weights)
        Q *= np.sqrt(weights)
    squares, total = sums(w * y * y), sums(data[p] ** 2)
    starts = np.flatnonzero(np.diff(own, prepend=-1) | np.diff(codes, prepend=codes[0] - 1))
    counts = np.diff(starts, append=len(y))
    U = orthonormalise(Q, starts, counts)
    Y = project_out(Q, data, starts, counts)
    C = sums(data.T[:, :, None] * data.T[:, None, :])

    sound &= ~_far_apart(C)
    condition = np.linalg.norm(R, axis=1) * np.linalg.norm(R_inverse, axis=2)
    rounding = ROUNDING * np.finfo(float).eps * condition.max(axis=1, initial=1.0)
    relative = total / np.maximum(squares, np.finfo(float).tiny)
    sound &= np.isfinite(total) & (relative > rounding**2)
    y_scale = np.sqrt(np.where(sound, total, 1.0))
    group_own = own[starts]
    Y[:, p] /= y_scale[group_own]
    C[:, p] /= y_scale[:, None]
    C[:, :, p] /= y_scale[:, None]
    n_groups = np.bincount(group_own, minlength=s)
    values = {
        "n_obs": sizes.astype(float),
        "n_fixed": np.full(s, float(p)),
        "n_groups": np.repeat(n_groups[:, None].astype(float), q, axis=1),
        "z_factor": A,
        "z_inverse": A_inverse,
        "x_inverse": R_inverse,
        "x_logdet": np.log(np.einsum("sii->si", R)).sum(axis=1),
        "beta_origin": beta / y_scale[:, None],
        "y_scale": y_scale,
        "log_weights": sums(np.log(w)),
        "C": C,
    }
    padded_to = np.array([lane_groups(count) for count in n_groups.tolist()])
    position = np.arange(len(starts)) - (np.cumsum(n_groups) - n_groups)[group_own]
    found = []
    for size in np.unique(padded_to[sound]):
        numbers = np.flatnonzero(sound & (padded_to == size))
        lane = np.full(s, -1)
        lane[numbers] = np.arange(len(numbers))
        groups = np.flatnonzero(lane[group_own] >= 0)
        at = lane[group_own[groups]], position[groups]
        parts = {name: value[numbers] for name, value in values.items()}
        parts["U"] = np.zeros((len(numbers), q, q, size))
        parts["Y"] = np.zeros((len(numbers), q, p + 1, size))
        parts["weight"] = np.zeros((len(numbers), size))
        parts["U"][at[0], :, :, at[1]] = U[:, :, groups].transpose(2, 0, 1)
        parts["Y"][at[0], :, :, at[1]] = Y[:, :, groups].transpose(2, 0, 1)
        parts["weight"][at] = 1.0
        problem = GroupedProblem(**_padded(parts, padding(p)))
        found.append(Pooled(numbers, problem, relative[numbers]))
    return found


def alone(number: int, problem: GroupedProblem, total: float) -> Pooled:
    """Return one compressed data set, not padded, in the shape of several."""
    parts = {name: np.asarray(getattr(problem, name))[None] for name in FIELDS}
    m = parts["weight"].shape[-1]
    for name in ("U", "Y", "weight"):
        widths = [(0, 0)] * (parts[name].ndim - 1) + [(0, lane_groups(m) - m)]
        parts[name] = np.pad(parts[name], widths)
    padded = _padded(parts, padding(int(problem.n_fixed)))
    return Pooled(np.array([number]), GroupedProblem(**padded), np.array([total]))


def joined(parts: Sequence[Pooled]) -> list[Pooled]:
    """Return data sets of equal shapes as one."""
    by_shape: dict[Any, list[Pooled]] = {}
    for part in parts:
        by_shape.setdefault(part.problem.Y.shape[1:], []).append(part)
    found = []
    for same in by_shape.values():
        numbers = np.concatenate([part.numbers for part in same])
        total = np.concatenate([part.total for part in same])
        leaves: dict[str, Any] = {
            name: np.concatenate([getattr(part.problem, name) for part in same]) for name in FIELDS
        }
        found.append(Pooled(numbers, GroupedProblem(**leaves), total))
    return found


def lane_groups(count: int) -> int:
    """Round a number of groups up, so that data sets of similar size share compiled code."""
    return FEW_GROUPS if count <= FEW_GROUPS else bucket(count)


def _factors(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return triangular R with ``gram = R'R``, (s, p, p), and where columns are independent, (s,).

    R is the identity where they are not.
    """
    p = gram.shape[1]
    norms = np.sqrt(np.einsum("sii->si", gram))
    sound = np.isfinite(norms).all(axis=1) & (norms > 0.0).all(axis=1)
    norms = np.where(sound[:, None], norms, 1.0)
    unit = np.where(sound[:, None, None], gram / (norms[:, :, None] * norms[:, None, :]), np.eye(p))
    R = np.zeros_like(unit)
    for j in range(p):
        left = unit[:, j, j:] - np.einsum("si,sij->sj", R[:, :j, j], R[:, :j, j:])
        sound &= left[:, 0] > INDEPENDENT**2
        pivot = np.sqrt(np.where(sound, left[:, 0], 1.0))
        R[:, j, j:] = left / pivot[:, None]
        R[:, j, j] = pivot
    R = np.where(sound[:, None, None], R * norms[:, None, :], np.eye(p))
    return R, sound


def _far_apart(C: np.ndarray) -> np.ndarray:
    """Return where the least-squares fit is a poor centre for what varies within groups, (s,)."""
    p = C.shape[1] - 1
    cross = C[:, :p, p]
    shift = np.linalg.solve(C[:, :p, :p] + 1e-10 * np.eye(p), cross[:, :, None])[:, :, 0]
    bent = np.einsum("si,sij,sj->s", shift, C[:, :p, :p], shift)
    left = C[:, p, p] - 2.0 * np.einsum("si,si->s", shift, cross) + bent
    return np.asarray(left < 1e-4 * C[:, p, p])


def _padded(parts: dict[str, np.ndarray], extra: int) -> dict[str, Any]:
    """Add columns of X that are nothing but themselves, before the response."""
    if not extra:
        return parts
    p = parts["beta_origin"].shape[1]
    Y = np.insert(parts["Y"], [p] * extra, 0.0, axis=2)
    C = np.insert(np.insert(parts["C"], [p] * extra, 0.0, axis=1), [p] * extra, 0.0, axis=2)
    new = np.arange(p, p + extra)
    C[:, new, new] = 1.0
    widths = [(0, 0), (0, extra)]
    return {
        **parts,
        "Y": Y,
        "C": C,
        "x_inverse": np.pad(parts["x_inverse"], [*widths, (0, extra)]),
        "beta_origin": np.pad(parts["beta_origin"], widths),
    }
