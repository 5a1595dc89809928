"""Several optima: when a search is repeated from elsewhere, and from where.

The likelihood of a mixed model can have several maxima: few groups, factors that share a common
parent which is not in the model, one large group.  Where it has, some direction of the covariance
is poorly determined at the maximum that a search found, or lies at the boundary.  Searches are
repeated there, from covariances far apart: all effects large, all of a middling size, and each
large beside small others and small beside large ones.  In trials on over two thousand random small
models these found whatever twelve or twenty random starts did.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np

from .likelihood import Problem
from .likelihood.crossed import CrossedProblem
from .likelihood.grouped import GroupedProblem
from .likelihood.shared import SharedProblem
from .solve import Constraints

WELL_DETERMINED = 20.0
"""Curvature of the criterion in relative changes of the covariance from which an optimum inside is
taken for the only one: roughly the number of groups that tell of the least determined direction."""
ROWS_PER_EFFECT = 4.0
"""Rows for each random effect from which one of many models, of whom a search is a small part of a
millisecond and six more a multiple of it, is searched once.  In trials no likelihood of so many had
a second maximum, but for data whose rows had been repeated."""
SMALL, MIDDLING, LARGE = 1e-2, 1e2, 1e5
"""Variances to start from, in units of the sampling variance of an average group's effect."""
ON_A_LINE = (1e-2, 1e1, 1e2, 1e3, 1e5, 1e8)
"""The same with one effect only."""
DIFFERENT = 1e-5
"""Difference of the criterion from which two ends of searches are two optima."""
MOST_UNITS = 5
"""Most effects, or sets of effects, that are varied one by one."""
FREE_WORK, CHEAP_WORK = 2e5, 5e7
"""Multiplications of an evaluation up to which all starts are free beside what a fit costs
otherwise, and up to which one more is worth its time where an optimum lies at the boundary."""


def least_determined(root: np.ndarray, hessian: np.ndarray, constraints: Constraints) -> np.ndarray:
    """Return the least curvature of the criterion in relative changes of D, (n,).

    The changes are ``D -> R (I + E) R'`` with ``D = R R'``: of a variance that m groups determine
    by themselves the curvature is m.

    Args:
        root: R, (n, q, q).
        hessian: of the criterion in the triangle of D and the logarithm of the scale,
            (n, k + 1, k + 1).
        constraints: which entries of D are free, and whether the scale is.
    """
    movable = np.asarray(constraints.blocks) * (1.0 - np.asarray(constraints.held))
    rooted = constraints.rooted
    free = movable * (rooted[:, None] * rooted)
    basis, rows, columns = _symmetric_units(free.tobytes(), len(free))
    if not len(basis):
        return np.full(len(root), np.inf)
    profiled = hessian[:, :-1, :-1]
    if constraints.scale_free:
        cross = hessian[:, :-1, -1]
        corner = hessian[:, -1, -1][:, None, None]
        profiled = profiled - cross[:, :, None] * cross[:, None, :] / corner
    moved = (root[:, None] @ basis @ root[:, None].transpose(0, 1, 3, 2))[:, :, rows, columns]
    curvature = moved @ profiled @ moved.transpose(0, 2, 1)
    if np.isfinite(curvature).all():
        return np.linalg.eigvalsh(curvature)[:, 0]
    finite = np.isfinite(curvature).all(axis=(1, 2))
    return np.where(
        finite, np.linalg.eigvalsh(np.where(finite[:, None, None], curvature, 0.0))[:, 0], -np.inf
    )


@cache
def _symmetric_units(free: bytes, q: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an orthonormal basis of the symmetric matrices with the given entries, (c, q, q).

    And rows and columns of the lower triangle, (k,) each.
    """
    rows, columns = np.nonzero(np.tril(np.frombuffer(free).reshape(q, q)))
    basis = np.zeros((len(rows), q, q))
    size = np.where(rows == columns, 1.0, np.sqrt(0.5))
    basis[np.arange(len(rows)), rows, columns] = size
    basis[np.arange(len(rows)), columns, rows] = size
    return basis, *np.tril_indices(q)


def is_balanced(problem: Problem, constraints: Constraints) -> bool:
    """Return whether the likelihood is known to have a single maximum.

    With one unstructured term, the same random-effects design in all groups, and a mean inside
    its columns, it factors into a chi-squared and a Wishart density, whose joint maximum under the
    order constraint between them is explicit and unique (Anderson, Anderson and Olkin, 1986,
    Ann. Statist. 14, 405-417).
    """
    if not constraints.blocks.all() or constraints.held.any():
        return False
    if isinstance(problem, SharedProblem):
        if problem.exchanged is not None or problem.order is not None:
            return False
    elif not isinstance(problem, GroupedProblem):
        return False
    p, groups = int(problem.n_fixed), np.flatnonzero(problem.weight)
    if np.asarray(problem.C).diagonal()[:p].max(initial=0.0) > 1e-12:
        return False
    # Equal groups have been merged, but for rounding.
    if len(groups) > 1:
        U = np.asarray(problem.U)[:, :, groups]
        return bool(np.abs(U - U[:, :, :1]).max() <= 1e-12 * np.abs(U).max())
    return True


def work(problem: Problem) -> float:
    """Return roughly how many multiplications an evaluation of the criterion takes."""
    q = len(problem.n_groups)
    if isinstance(problem, CrossedProblem):
        return float(np.shape(problem.C_tail)[0]) ** 3 / 6.0 + q * float(np.size(problem.Y))
    if isinstance(problem, SharedProblem):
        return q * float(np.size(problem.U) + np.size(problem.X) + np.size(problem.y[0]))
    by_group: Any = problem
    return q * float(np.size(by_group.U) + np.size(by_group.Y))


def looks_again(
    root: np.ndarray,
    hessian: np.ndarray,
    inside: np.ndarray,
    cost: float,
    constraints: Constraints,
) -> np.ndarray:
    """Return which searches are repeated from elsewhere, (n,).

    Args:
        root: square roots of D where they ended, (n, q, q).
        hessian: see :func:`least_determined`.
        inside: whether they converged, and not at the boundary, (n,).
        cost: of an evaluation; see :func:`work`.
        constraints: which entries of D are free.
    """
    if constraints.structures or cost > CHEAP_WORK:
        return np.zeros(len(root), dtype=bool)
    again = ~inside
    if cost <= FREE_WORK and inside.any():
        least = least_determined(root[inside], hessian[inside], constraints)
        again[inside] = least < WELL_DETERMINED
    return again


def may_vanish(problem: Problem, reml: bool) -> bool:
    """Return whether maximum likelihood may have no maximum, as all rows may be spanned.

    Coefficients and random effects that together fit every row let the residual go to zero, and the
    criterion falls without end where the effects alone do not fit them.
    """
    if reml:
        return False
    columns = float(problem.n_fixed) + float(np.sum(problem.n_groups))
    return columns >= float(problem.n_obs) and work(problem) <= FREE_WORK


def spread_starts(
    constraints: Constraints, units: Sequence[np.ndarray], cost: float
) -> list[np.ndarray]:
    """Return variances far apart, in units of the sampling variance of a group's effect, (q,) each.

    Args:
        constraints: which entries of D are free.
        units: positions of the effects, those that may be correlated together.
        cost: of an evaluation; see :func:`work`.
    """
    q = len(constraints.blocks)
    free = (np.diag(constraints.held) == 0.0) * (constraints.rooted > 0.0)
    effects = [np.array([j]) for j in np.flatnonzero(free)]
    if not effects:
        return []
    if len(effects) == 1:
        sizes = [np.full(q, size) for size in reversed(ON_A_LINE)]
    else:
        units = effects if len(effects) <= MOST_UNITS else [u for u in units if free[u[0]]]
        sizes = [np.full(q, LARGE), np.full(q, MIDDLING)]
        if 1 < len(units) <= MOST_UNITS:
            for unit, (one, others) in chain.from_iterable(
                ((unit, pair) for pair in ((LARGE, SMALL), (SMALL, LARGE))) for unit in units
            ):
                size = np.full(q, others)
                size[unit] = one
                if not any(np.array_equal(size[free], known[free]) for known in sizes):
                    sizes.append(size)
    return sizes if cost <= FREE_WORK else sizes[:1]


def distinct(ends: Sequence[float]) -> np.ndarray:
    """Return the criterion at different ends of searches, ascending, each once."""
    ascending = np.sort(np.asarray(ends, dtype=float))
    return ascending[np.diff(ascending, prepend=-np.inf) > DIFFERENT]
