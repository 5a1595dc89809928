"""A second look at models whose random effects are far larger than the residual.

The working coordinates of :mod:`lmmax.compress` are chosen before anything is estimated.  Where
effects are r times as large as the residual, three things in them cost up to ``r^2`` of the digits,
and are known better once the model has been solved:

- the centre of y: residuals of least squares are as large as the effects, and what the fixed
  effects explain beyond them is a small difference.  Around the coefficients found it is none;
- the axes of the random effects: where a few combinations vary far more than others, such as the
  mean of the cells in ``(0 + f | g)``, each entry of D is as large as the largest variance, and the
  small ones are differences.  Along the axes of the D found they stand on the diagonal;
- the cross-products of crossed effects, instead of which their rows are kept; see
  :mod:`lmmax.likelihood.crossed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .compress import Compression, Layout, compress
from .compress.crossed import Skeleton, rotates
from .compress.iterative import Rows
from .compress.layout import turned
from .constraints import Guess, Settings, TermColumns
from .estimation import Estimates, estimate
from .likelihood import Problem
from .optima import distinct, may_vanish
from .solve import Constraints, Status, better
from .spanned import without_maximum

FAR = 1e-3
"""Effects are far apart if the residual variance is less than this part of the mean square of the
least-squares residuals: elsewhere no more than three digits are at stake."""
ALIGNED = 1e-3
"""Axes are far from those of D if its correlations have an eigenvalue below this."""
OFF_CENTER = 1e4
"""What fixed effects may explain, in residual variances per observation, before digits of what is
left are worth another centre."""
STRENGTHS = (3.0, 5.0, 7.0, 9.0)
"""Parameters of correlations, on the scale of atanh, from which searches begin: ``1 - rho`` is the
square of how much less the levels of a group vary than the groups do."""
LOOKS = 3
"""Most times that coordinates are chosen anew."""


class Closer(NamedTuple):
    """A solved model and the coordinates in which it was solved."""

    layout: Layout
    compression: Compression
    estimates: Estimates


def estimate_closely(
    y: np.ndarray,
    layout: Layout,
    compression: Compression,
    terms: Sequence[TermColumns],
    settings: Settings,
) -> Closer:
    """Solve a compressed model, again in better coordinates where its effects are far apart.

    Args:
        y: the response, its offset removed, (n,).
        layout: the designs.
        compression: the statistics of both.
        terms: the random terms' places among the columns.
        settings: how to estimate.

    Raises:
        ConstraintError: if ``start`` or ``fix`` does not fit the model.
    """
    endless = may_be_endless(layout, compression.problem, settings.reml)
    if endless and needs_rows(layout, compression):
        compression = compress(y, layout, earlier=compression, far_apart=True)
    found = Closer(layout, compression, estimate(compression, terms, settings))
    for look in range(LOOKS):
        strong = look == 0 and _has_strong(found)
        if not strong and not _is_unclear(found, terms):
            break
        found = _closer(y, found, terms, settings, strong)
    if endless and without_maximum(layout, terms, found.estimates.constraints, y):
        # Where the search ended there may be a maximum, but no highest one.
        found = found._replace(estimates=replace(found.estimates, status=Status.UNBOUNDED))
    return found


def may_be_endless(layout: Layout, problem: Problem, reml: bool) -> bool:
    """Return whether the likelihood may rise without end, so that the ranks are worth a look."""
    # Between related levels the rise begins beyond what anyone means.
    return all(factor.root is None for factor in layout.factors) and may_vanish(problem, reml)


def _has_strong(found: Closer) -> bool:
    """Return whether a structure may have correlations too close to one for a search to find."""
    estimates = found.estimates
    if not estimates.constraints.structures:
        return False
    far = is_far(estimates.solution.point.s, float(found.compression.problem.n_obs))
    # Without a residual at all, a structure describes the data by itself.
    return bool(far and estimates.status is not Status.UNBOUNDED)


def _is_unclear(found: Closer, terms: Sequence[TermColumns]) -> bool:
    """Return whether other coordinates would show more digits."""
    compression, estimates = found.compression, found.estimates
    point, n_obs = estimates.solution.point, float(compression.problem.n_obs)
    if isinstance(compression.detail, Rows) or not is_far(point.s, n_obs):
        return False
    if needs_rows(found.layout, compression):
        return True
    if estimates.status is Status.UNBOUNDED:
        return False
    return (
        estimates.status is not Status.CONVERGED
        or is_off_center(point.s, point.at.beta, point.at.beta_inverse, n_obs)
        or not _is_aligned(np.asarray(point.D), estimates.constraints, terms)
    )


def unclear_lanes(
    ends: Any, constraints: Constraints, terms: Sequence[TermColumns], n_obs: np.ndarray
) -> np.ndarray:
    """Return the lanes that other coordinates would show more digits of, or another optimum.

    Structures may have correlations too close to one for a search to find.

    Args:
        ends: where the lanes ended, a :class:`lmmax.batch.solve.Ends`.
        constraints: what was free.
        terms: the random terms.
        n_obs: number of rows of each lane, (n,).
    """
    far = is_far(ends.s, n_obs) & (ends.status != Status.UNBOUNDED)
    return np.array(
        [
            lane
            for lane in np.flatnonzero(far)
            if constraints.structures
            or ends.status[lane] != Status.CONVERGED
            or is_off_center(
                ends.s[lane], ends.beta[lane], ends.beta_inverse[lane], float(n_obs[lane])
            )
            or not _is_aligned(ends.D[lane], constraints, terms)
        ],
        dtype=int,
    )


def is_far(s: Any, n_obs: Any) -> Any:
    """Return whether effects are far larger than the residual, from the logarithms of scales."""
    return np.isfinite(s) & (np.exp(s) * n_obs <= FAR)


def needs_rows(layout: Layout, compression: Compression) -> bool:
    """Return whether a model's statistics are cross-products where rows could be kept."""
    detail = compression.detail
    return isinstance(detail, Skeleton) and detail.outside is None and rotates(layout, detail)


def is_off_center(s: Any, beta: Any, beta_inverse: Any, n_obs: float) -> bool:
    """Return whether fixed effects explain far more of y around its centre than is left.

    Args:
        s: logarithm of the scale.
        beta: coefficients around the centre, (p,).
        beta_inverse: ``(X'V^-1 X)^-1``, (p, p).
        n_obs: number of observations.
    """
    if not np.all(np.isfinite(beta_inverse)):
        return False
    explained = beta @ np.linalg.lstsq(np.asarray(beta_inverse), np.asarray(beta))[0]
    return bool(explained * np.exp(-s) > OFF_CENTER * n_obs)


def _is_aligned(D: np.ndarray, constraints: Constraints, terms: Sequence[TermColumns]) -> bool:
    """Return whether no block of D that can be turned is close to singular along its axes."""
    for here in _turnable(constraints, terms):
        sd = np.sqrt(np.diag(D)[here])
        if np.all(sd > 0.0):
            values = np.linalg.eigvalsh(D[here, here] / np.outer(sd, sd))
            if values[0] < ALIGNED:
                return False
    return True


def _turnable(constraints: Constraints, terms: Sequence[TermColumns]) -> list[slice]:
    """Return the columns of each term of which any combinations may be taken."""
    held = np.asarray(constraints.held)
    return [
        term.columns
        for term in terms
        if term.pattern is not None
        and term.width > 1
        and term.pattern.all()
        and not held[term.columns.start, term.columns.start]
    ]


def _closer(
    y: np.ndarray,
    found: Closer,
    terms: Sequence[TermColumns],
    settings: Settings,
    strong: bool,
) -> Closer:
    """Solve again around the coefficients found, along the axes of the covariance found.

    And with ``strong`` from correlations close to one, as those of levels of groups far apart are.
    """
    layout, compression, estimates = found
    problem, point = compression.problem, estimates.solution.point
    p = int(problem.n_fixed)
    turn = np.eye(len(point.D))
    for here in _turnable(estimates.constraints, terms):
        turn[here, here] = np.linalg.svd(np.asarray(point.root)[here, here])[0]
    moved = not np.array_equal(turn, np.eye(len(turn)))
    layout = turned(layout, turn) if moved else layout
    unit = float(problem.y_scale)
    again = compress(
        y,
        layout,
        earlier=None if moved else compression,
        center=(np.asarray(point.at.beta)[:p] + np.asarray(problem.beta_origin)[:p]) * unit,
        far_apart=True,
    )
    root = turn.T @ np.asarray(point.root)
    s = float(point.s) + 2.0 * float(np.log(unit / again.problem.y_scale))
    end = Guess(root @ root.T, np.asarray(point.theta), s)
    best = estimate(again, terms, settings, end)
    # Which of several optima is the best one, digits decide.
    unsure = best.status is not Status.CONVERGED or len(distinct(estimates.ends)) > 1
    others: list[Guess | None] = [None] if unsure else []
    if strong:
        theta = np.asarray(point.theta)
        starts = strong_starts(estimates.constraints, theta)
        others += [end._replace(theta=start) for start in starts]
    for start in others:
        other = estimate(again, terms, settings, start)
        converged = other.status is Status.CONVERGED, best.status is Status.CONVERGED
        if better(other.criterion, converged[0], best.criterion, converged[1]):
            best = other
    return Closer(layout, again, best)


def strong_starts(constraints: Constraints, theta: np.ndarray) -> list[np.ndarray]:
    """Return parameters of the structures with correlations that are closer and closer to one.

    Args:
        constraints: what is free.
        theta: the parameters where searches have ended, (..., k).
    """
    parts = constraints.structures
    is_sd = [part.covariance.is_sd(part.columns[1] - part.columns[0]) for part in parts]
    return [np.where(np.concatenate(is_sd), theta, strength) for strength in STRENGTHS]
