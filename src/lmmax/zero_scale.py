"""A residual variance of zero: a maximum at the boundary, or no maximum at all.

Random effects that describe the data without a residual let the scale fall to zero.  At fixed
natural covariances ``Psi`` the criterion, as a function of the logarithm ``s`` of the scale, then
goes one of two ways:

* ``Z Psi Z'`` has full rank.  The criterion has a limit, from which it rises like ``a exp(s)``: a
  minimum at the boundary, as good as that of any other variance at zero.
* It has not, and the response lies in its range.  The criterion falls like ``k s`` with k the
  number of contrasts without a variance: there is no minimum.

Newton's method, in covariances relative to the scale, creeps along both for ever.  So the scale is
held at a value that is none next to the data, where everything else has an ordinary minimum, and
the slope in ``s`` tells the cases apart.  What is reported for the first is the limit: the
criterion is continued to zero along its slope, and other quantities differ from their limits by
the ratio of the scale to the variances of the effects, far below what can be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .along import hessian_along
from .covariances import matrix_at
from .parameters import pack_triangle
from .solve import Constraints, Point, Solution, Status, Structured, continued, narrow

if TYPE_CHECKING:
    from .estimation import Estimates

LOOKED_AT = 1e-6
"""Scale, relative to the variance of the response, at which a search for the parameters of
structures stops, to see where it leads."""
PROBED, LIMIT = 1e-8, 1e-12
"""Scales, likewise, that stand for zero: for the sign of the slope, which rounding hides further
down, and for the estimates."""
ROUNDING = 1e-24
"""Scale, likewise, at which nothing but rounding errors is left of residuals."""
SMALL, UNFINISHED = 1e-4, 1e-2
"""Scales, likewise, below which a solve is looked at that converged, and one that did not."""
LEVEL, FALLING = 1e-3, 0.5
"""Largest slope in ``s`` of a criterion that has a limit, and least one of a criterion that falls
with each contrast."""

INDEFINITE = 1e-6
"""Negative curvature, relative to that of single parameters, that is more than rounding."""

Settle = Callable[[Constraints, np.ndarray, float, np.ndarray], Solution]
"""Solve under constraints from D, s and theta, as far as rounding allows."""


def log_scale(n_obs: float, share: float) -> float:
    """Return ``s`` at a scale relative to the variance of a working response of n_obs rows."""
    return float(np.log(share) - np.log(n_obs))


def held(constraints: Constraints) -> Constraints:
    """Return the constraints with the scale held."""
    return replace(constraints, scale_free=False, profile=False)


def slope(point: Any) -> Any:
    """Return the derivative of the criterion in ``s`` at fixed natural covariances.

    Args:
        point: a point, or the ends of lanes, with an axis in front.
    """
    gradient, D = point.gradient, point.D
    rows, columns = np.tril_indices(D.shape[-1])
    return gradient[..., -1] - np.sum(gradient[..., :-1] * D[..., rows, columns], axis=-1)


def curvature(point: Any) -> Any:
    """Return the second derivative likewise."""
    gradient, hessian, D = point.gradient, point.hessian, point.D
    rows, columns = np.tril_indices(D.shape[-1])
    vech = D[..., rows, columns]
    along = np.concatenate([-vech, np.ones((*vech.shape[:-1], 1))], axis=-1)
    bent = np.einsum("...a,...ab,...b->...", along, hessian, along)
    return bent + np.sum(gradient[..., :-1] * vech, axis=-1)


class Derivatives(NamedTuple):
    """What :func:`slope` and :func:`curvature` look at: D, and derivatives in D and s."""

    D: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray


def derivatives_at(point: Point) -> Derivatives:
    """Return them for the end of a solve."""
    return Derivatives(*map(np.asarray, (point.D, point.at.gradient, point.at.hessian)))


def is_suspicious(share: Any, bend: Any, status: Any) -> Any:
    """Return whether a solve may have ended on the way to a residual variance of zero.

    Args:
        share: its scale relative to the variance of the working response.
        bend: see :func:`curvature`.  Residuals of an interior minimum bend the criterion by about
            one for each of their contrasts.
        status: how it ended.
    """
    settled = status == Status.CONVERGED
    failed = np.isin(status, (Status.MAX_STEPS, Status.STALLED, Status.UNBOUNDED))
    return (settled & (share < SMALL) & (bend < 0.1)) | (failed & (share < UNFINISHED))


def _curvature_at(problem: Any, constraints: Constraints, point: Point, reml: bool) -> float:
    """Return :func:`curvature` at the end of a single solve."""
    if not narrow(problem, constraints):
        return float(curvature(derivatives_at(point)))
    D = np.asarray(point.D)
    bent = np.sum(hessian_along(problem, point, reml, -D[None]))
    return float(bent + np.asarray(point.at.gradient)[:-1] @ pack_triangle(D))


def look_closer(
    problem: Any, constraints: Constraints, reml: bool, solution: Solution, settle: Settle
) -> Solution:
    """Return the solution, or what is at the boundary of the scale if the solve was heading there.

    Args:
        problem: the problem.
        constraints: what was free.
        reml: whether the criterion is the restricted one.
        solution: the end of the solve.
        settle: solves further.

    Returns:
        The solution itself; one with status ``ZERO_SCALE`` and the scale held; or one that went on
        to a minimum with a small scale, or to the ``UNBOUNDED`` end.
    """
    point = solution.point
    share = np.exp(float(point.s)) * float(problem.n_obs)
    if not constraints.scale_free or not share < UNFINISHED:
        return solution
    bend = _curvature_at(problem, constraints, point, reml)
    if not is_suspicious(share, bend, int(solution.status)):
        return _judged(problem, solution)
    fixed = held(constraints)

    def at(share: float, point: Point) -> Solution:
        s = log_scale(float(problem.n_obs), share)
        return settle(fixed, *moved(constraints, point, s))

    probe = at(PROBED, point)
    if is_likely(probe.status, slope(derivatives_at(probe.point))):
        end = at(LIMIT, probe.point)
        rise = slope(derivatives_at(end.point))
        there = _Value(end.status, end.point.at.value)
        if is_limit(there, rise, _Value(solution.status, point.at.value)):
            whole = continued(solution, continued(probe, end))
            status: Any = np.int32(Status.ZERO_SCALE)
            return whole._replace(status=status)
    lost = int(solution.status) in (Status.STALLED, Status.MAX_STEPS)
    if lost and share < LIMIT and is_falling(probe.status, slope(derivatives_at(probe.point))):
        endless: Any = np.int32(Status.UNBOUNDED)
        return solution._replace(status=endless)
    if was_stopped(solution.status, share):
        # Nothing is there, so it goes on.
        here = np.asarray(point.D), float(point.s), np.asarray(point.theta)
        solution = continued(solution, settle(constraints, *here))
    return _judged(problem, solution)


def _judged(problem: Any, solution: Solution) -> Solution:
    """Return a solution that says so where rounding, far down, passed for an optimum.

    With almost no residual the criterion may fall along a valley that digits do not resolve.  At an
    optimum it bends upwards in all that moves.
    """
    share = np.exp(float(solution.point.s)) * float(problem.n_obs)
    if solution.status != Status.CONVERGED or share > LOOKED_AT:
        return solution
    free = np.asarray(solution.point.free) > 0.0
    hessian = np.asarray(solution.point.hessian)[np.ix_(free, free)]
    unit = np.sqrt(np.abs(np.diag(hessian)))
    unit = np.where(unit > 0.0, unit, 1.0)
    if np.linalg.eigvalsh(hessian / np.outer(unit, unit))[0] >= -INDEFINITE:
        return solution
    status: Any = np.int32(Status.STALLED)
    return solution._replace(status=status)


class _Value(NamedTuple):
    status: Any
    value: Any


def is_likely(status: Any, rise: Any) -> Any:
    """Return whether the criterion has a limit at zero, from the end and the slope at `PROBED`."""
    return (status == Status.CONVERGED) & (rise > 0.0) & (rise < FALLING)


def is_falling(status: Any, rise: Any) -> Any:
    """Return whether the criterion falls with each contrast, likewise."""
    return (status == Status.CONVERGED) & (rise >= FALLING)


def is_limit(end: Any, rise: Any, known: Any) -> Any:
    """Return whether the end at `LIMIT` is an optimum, and no worse than what was known.

    Args:
        end: status and value there.
        rise: its slope.
        known: status and value of the solve that was looked at.
    """
    better = known.value - end.value + rise > -1e-7
    return (
        (end.status == Status.CONVERGED)
        & (rise <= LEVEL)
        & (better | (known.status != Status.CONVERGED))
    )


def was_stopped(status: Any, share: Any) -> Any:
    """Return whether a solve was stopped at `LOOKED_AT`, not where rounding stops all."""
    return (status == Status.UNBOUNDED) & (share > ROUNDING)


def check_residual(estimates: Estimates, what: str) -> None:
    """Raise if the residual variance of a fit went to zero.

    Args:
        estimates: the estimates.
        what: what does not exist then, for the message.

    Raises:
        ValueError: if it did, to a maximum there or without any.
    """
    if estimates.status in (Status.ZERO_SCALE, Status.UNBOUNDED):
        raise ValueError(
            f"{what} does not exist: the likelihood of the fit is highest with a residual variance "
            f"of zero (status {estimates.status.name.lower()!r}); use fewer random effects, or "
            "hold it at a value above zero with fix={'scale': ...}"
        )


def moved(constraints: Constraints, point: Point, s: float) -> tuple[np.ndarray, float, np.ndarray]:
    """Return D, s and theta of the same natural covariances at another scale."""
    ratio = float(np.exp(point.s - s))
    theta = np.array(point.theta)
    for part in constraints.structures:
        at = slice(*part.parameters)
        theta[at] = _rescaled(part, theta[at], ratio)
    return ratio * np.asarray(point.D), s, theta


def _rescaled(part: Structured, theta: np.ndarray, ratio: float) -> np.ndarray:
    """Return the parameters of a structure's covariance times a number."""
    structure, q = part.covariance, part.columns[1] - part.columns[0]
    target, is_sd = ratio * matrix_at(structure, theta, q), np.asarray(structure.is_sd(q))
    # A standard deviation is its parameter, or the square of it.
    for power in (0.5, 0.25):
        found = np.where(is_sd, theta * ratio**power, theta)
        if np.allclose(matrix_at(structure, found, q), target, rtol=1e-9, atol=0.0):
            return found
    return structure.theta_of(target)
