"""Estimates without one group at a time, for the acceleration of bootstrap limits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..batch import BatchEstimates, estimates_of, join, stack, start_at, vectorises
from ..batch.solve import Lanes, in_user_units, solve
from ..characters import Visible
from ..compress import compress, layout
from ..compress.grouped import Statistics
from ..compress.rows import chunk_rows, chunks, orthonormalise, project_out
from ..constraints import read_constraints
from ..far_apart import estimate_closely
from ..fit import arrange, without_offset
from ..likelihood.grouped import GroupedProblem
from ..relationship import semidefinite_root
from ..solve import is_optimal

if TYPE_CHECKING:
    from ..compress import Layout
    from ..results import Fit

MOST = 200
"""Most parts that are left out in turn; with more groups, a part is several of them at random."""
STREAM_BYTES = 1 << 28
"""Bytes of statistics that are in memory together."""


class JackknifeError(Visible, ValueError):
    """A model that cannot be fitted without some of its groups."""


def leave_out_groups(fit: Fit) -> BatchEstimates:
    """Fit a model without each group of its coarsest factor in turn.

    Returns:
        A row for each group; for each of 200 random parts, if there are more groups.

    Raises:
        JackknifeError: if the model cannot be fitted without one of the groups.
    """
    factor = int(np.argmin([len(grouping.levels) for grouping in fit.design.groupings]))
    grouping = fit.design.groupings[factor]
    m = len(grouping.levels)
    if m < 3:
        raise JackknifeError(
            f"leaving out a group of {grouping.name!r}, which has {m}, leaves nothing to compare"
        )
    part = np.arange(m)
    if m > MOST:
        part = np.random.default_rng(0).permutation(m) % MOST
    found = _vectorised(fit, part) if vectorises(fit) else _one_by_one(fit, factor, part)
    failed = np.flatnonzero(~is_optimal(found.status))
    if failed.size:
        raise JackknifeError(
            f"the fit without {_name(fit, factor, part, int(failed[0]))} does not converge"
        )
    return found


def _name(fit: Fit, factor: int, part: np.ndarray, which: int) -> str:
    grouping = fit.design.groupings[factor]
    levels = grouping.levels[part == which]
    if len(levels) == 1:
        return f"group {levels[0]!r} of {grouping.name!r}"
    return f"{len(levels)} groups of {grouping.name!r}, among them {levels[0]!r},"


def _vectorised(fit: Fit, part: np.ndarray) -> BatchEstimates:
    """Leave out parts of the groups of a one-factor model, (m,) their numbers."""
    statistics, whole, arranged = fit.compression.detail, fit.compression.problem, fit.layout
    assert isinstance(statistics, Statistics)
    p, width = int(whole.n_fixed), whole.Y.shape[1]
    q, _, m = statistics.Y.shape
    y_scale = float(whole.y_scale)
    origin = np.asarray(whole.beta_origin)[:p] * y_scale
    n_parts = int(part.max()) + 1
    outside = _outside(arranged, without_offset(fit.design), origin, part)
    outside[:, p] /= y_scale
    outside[:, :, p] /= y_scale
    # What all other parts contribute, as sums: a difference could lose digits.
    none = np.zeros((1, p + 1, p + 1))
    before = np.concatenate([none, np.cumsum(outside, axis=0)[:-1]])
    after = np.concatenate([np.cumsum(outside[::-1], axis=0)[::-1][1:], none])
    C = np.tile(np.asarray(whole.C), (n_parts, 1, 1))
    last = [*range(p), width - 1]
    C[np.ix_(np.arange(n_parts), last, last)] = before + after
    Y = np.zeros((q, width, m))
    Y[:, last] = statistics.Y
    weights = fit.design.weights
    logs = np.zeros(fit.nobs) if weights is None else np.log(weights)
    row_part = part[arranged.factors[0].codes]
    n_obs = fit.nobs - np.bincount(row_part, minlength=n_parts).astype(float)
    log_weights = float(whole.log_weights) - np.bincount(row_part, logs, n_parts)

    problem = replace(whole, U=statistics.U)
    constraints, _ = read_constraints(problem, fit.terms, fit.settings)
    size = max(1, STREAM_BYTES // (8 * Y.size))
    found = []
    for first in range(0, n_parts, size):
        here = np.arange(first, min(first + size, n_parts))
        inside = part[None, :] != here[:, None]
        own = replace(
            problem,
            Y=Y * inside[:, None, None, :],
            weight=inside.astype(float),
            C=C[here],
            n_obs=n_obs[here],
            log_weights=log_weights[here],
        )
        _check_rank(fit, own, here, part)
        n = len(here)
        lanes = Lanes(
            own,
            np.tile(np.asarray(constraints.natural), (n, 1, 1)),
            ("Y", "weight", "C", "n_obs", "log_weights"),
        )
        start = start_at(fit, constraints, np.ones(n))
        ends = solve(lanes, constraints, fit.settings, fit.terms, start)
        found.append(
            in_user_units(
                lanes,
                constraints,
                fit.settings,
                fit.terms,
                ends,
                np.tile(origin, (n, 1)),
                np.full(n, y_scale),
                arranged.fixed.kept,
                len(fit.design.x_names),
            )
        )
    return join(found)


def _outside(arranged: Layout, y: np.ndarray, beta: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Return each part's cross-product of ``[X y]`` outside the column spaces of Z."""
    order, weights, sizes = arranged.order, arranged.weights, arranged.sizes[0]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    width = len(beta) + 1
    found = np.zeros((int(part.max()) + 1, width, width))
    for groups, rows in chunks(starts, sizes, chunk_rows(width)):
        take = rows if order is None else order[rows]
        data = arranged.response(y, beta, take)
        Q = arranged.random_columns(0, take)
        if weights is not None:
            root = np.sqrt(weights[take])
            data *= root
            Q *= root
        local, count = starts[groups] - rows.start, sizes[groups]
        orthonormalise(Q, local, count)
        project_out(Q, data, local, count)
        for j in range(width):
            products = np.add.reduceat(data[j] * data, local, axis=1)
            np.add.at(found[:, j], part[groups], products.T)
    return found


def _check_rank(fit: Fit, problem: GroupedProblem, here: np.ndarray, part: np.ndarray) -> None:
    """Raise if the coefficients cannot be estimated without a part."""
    p = int(problem.n_fixed)
    Y, C = problem.Y[:, :, :p], problem.C[:, :p, :p]
    for lane, which in enumerate(here):
        flat = Y[lane].transpose(1, 0, 2).reshape(p, Y.shape[1] * Y.shape[3])
        if p and np.linalg.eigvalsh(C[lane] + flat @ flat.T)[0] < 1e-10:
            _raise_rank(fit, 0, part, int(which))


def _raise_rank(fit: Fit, factor: int, part: np.ndarray, which: int) -> None:
    raise JackknifeError(
        f"without {_name(fit, factor, part, which)} not all coefficients can be estimated"
    )


def _one_by_one(fit: Fit, factor: int, part: np.ndarray) -> BatchEstimates:
    """Leave out parts of the groups of one of several factors."""
    design = fit.design
    row_part = part[design.groupings[factor].codes]
    settings = replace(fit.settings, start=fit, em_steps=3)
    found = []
    for which in range(int(part.max()) + 1):
        rows = row_part != which
        groupings = []
        for grouping in design.groupings:
            left, codes = np.unique(grouping.codes[rows], return_inverse=True)
            root = grouping.root
            if root is not None:
                root = semidefinite_root(root[left] @ root[left].T)
            groupings.append(
                replace(grouping, codes=codes, levels=grouping.levels[left], root=root)
            )
        smaller = replace(
            design,
            y=design.y[rows],
            X=design.X[rows],
            blocks=tuple(replace(block, Z=block.Z[rows]) for block in design.blocks),
            groupings=tuple(groupings),
            weights=None if design.weights is None else design.weights[rows],
            offset=None if design.offset is None else design.offset[rows],
            index=design.index[rows],
        )
        factors, terms = arrange(smaller)
        arranged = layout(smaller.X, factors, smaller.weights, fit.engine.name)
        if not np.array_equal(arranged.fixed.kept, fit.layout.fixed.kept):
            _raise_rank(fit, factor, part, which)
        y = without_offset(smaller)
        closer = estimate_closely(y, arranged, compress(y, arranged), terms, settings)
        found.append(estimates_of(fit, closer.estimates))
    return stack(found)
