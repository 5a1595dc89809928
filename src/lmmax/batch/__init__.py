"""One model fitted to many responses.

The responses share the designs' part of the statistics (:mod:`lmmax.batch.statistics` for one
grouping factor, :mod:`lmmax.batch.factors` for several) and run through one solver
(:mod:`lmmax.batch.solve`), each from the estimates of the first fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..compress import EngineError, compress
from ..constraints import Settings, read_constraints
from ..estimation import Estimates, group_noise
from ..far_apart import (
    estimate_closely,
    is_far,
    is_off_center,
    may_be_endless,
    needs_rows,
    strong_starts,
)
from ..likelihood.shared import SharedProblem
from ..parameters import pack_triangle
from ..solve import NEWTON_LIMIT, Constraints, Status, better, is_optimal, narrow
from ..spanned import without_maximum
from . import factors
from .factors import SharedFactors, shared_factors
from .solve import (
    BatchEstimates,
    Effort,
    Ends,
    Lanes,
    Start,
    in_user_units,
    join,
    snapped,
    solve,
    stack,
    starts_from,
)
from .starts import scored
from .statistics import Responses, SharedDesigns, lanes_of, project, shared_designs
from .uncertainty import parameter_covariance

if TYPE_CHECKING:
    from ..results import Fit

__all__ = [
    "BatchEstimates",
    "estimates_of",
    "join",
    "refit_responses",
    "refit_statistics",
    "shared_by_responses",
    "solve_responses",
    "solve_statistics",
    "stack",
    "vectorises",
]

LIFT = 0.1
"""A singular start is moved inside by this much of the sampling variance of one group: a variance
of zero is a stationary point by symmetry."""


def vectorises(fit: Fit) -> bool:
    """Return whether the model has one grouping factor, and its responses run in lanes.

    A single series has as many effects as times: lanes of so many take minutes to compile.
    """
    several = fit.engine.name == "grouped" and fit.layout.factors[0].n_groups > 1
    return several and _by_newton(fit)


def _by_newton(fit: Fit) -> bool:
    few = len(fit.estimates.root) <= NEWTON_LIMIT
    # Of a narrow model one fit after the other is quicker than the Hessian in all entries.
    alone = narrow(fit.compression.problem, fit.estimates.constraints)
    return fit.estimates.solver == "newton" and few and not alone


def shared_by_responses(fit: Fit) -> SharedDesigns | SharedFactors | None:
    """Return what responses share that run in lanes; None if they must be fitted one by one."""
    if vectorises(fit):
        return shared_designs(fit)
    if fit.engine.name in ("nested", "crossed") and _by_newton(fit):
        return shared_factors(fit.layout, fit.compression)
    return None


def refit_responses(
    fit: Fit,
    y: np.ndarray | Iterable[np.ndarray],
    shared: SharedDesigns | SharedFactors | None = None,
) -> BatchEstimates:
    """Fit the model of ``fit`` to many responses of its rows.

    Args:
        fit: the model, fitted to one response; it lends designs, settings and start.
        y: responses, offset included, (n, nobs).
        shared: what :func:`shared_by_responses` returned for the fit, if it is at hand.

    Returns:
        The same estimates as ``fit.refit`` of each response.

    Raises:
        EngineError: if the fit is by the iterative engine.

    Example:
        >>> import lmmax
        >>> from lmmax.batch import refit_responses
        >>> fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", lmmax.datasets.load("dyestuff"))
        >>> y = fit.design.y
        >>> refit_responses(fit, np.stack([y, 2.0 * y])).scale.round(2)
        array([2451.25, 9805.  ])
    """
    check_engine(fit)
    offset = 0.0 if fit.design.offset is None else fit.design.offset
    shared = shared_by_responses(fit) if shared is None else shared
    if shared is not None:
        return solve_responses(fit, shared, np.asarray(y) - offset).estimates
    return stack([estimates_of(fit, _one(fit, response - offset)) for response in y])


def check_engine(fit: Fit) -> None:
    """Raise if a fit cannot be repeated for other responses at a reasonable cost."""
    if fit.engine.name == "iterative":
        raise EngineError(
            "the iterative engine evaluates the likelihood with a Monte Carlo error, which many "
            "fits in a row do not share; fit with engine='crossed', if its dense factor fits into "
            "memory"
        )


class Solved(NamedTuple):
    """Fits of many responses of a model, with what inference needs.

    Attributes:
        estimates: the estimates.
        ends: where each lane ended, working coordinates.
        free: which entries of D's lower triangle, and the scale, are estimated freely, (k + 1,).
        to_user: from working coefficients to the user's, (p, p), or (n, p, p) if they differ.
        uncertain: whether all of D is free but for entries that are zero, without structure, and
            the data determine it, (n,).
        y_scale: units of the data per working unit, (n,).
        D: where each lane ended, exactly singular where it counts as such, (n, q, q).
        noise: standard deviation of one average group's mean, relative to the residual's, (n, q).
        blocks: 1.0 where an entry of D belongs to a term, (q, q).
    """

    estimates: BatchEstimates
    ends: Ends
    free: np.ndarray
    to_user: np.ndarray
    uncertain: np.ndarray
    y_scale: np.ndarray
    D: np.ndarray
    noise: np.ndarray
    blocks: np.ndarray

    @property
    def gradient(self) -> np.ndarray:
        """Norm of the gradient in the root of D and in s, working coordinates, (n,).

        It is zero at a minimum on the boundary too.
        """
        packed = np.where(self.free, self.ends.gradient, 0.0)
        q = self.ends.D.shape[1]
        G = np.zeros((len(packed), q, q))
        rows, columns = np.tril_indices(q)
        G[:, rows, columns] = packed[:, :-1]
        G = G + G.transpose(0, 2, 1)
        inner = np.linalg.norm((G @ self.ends.root).reshape(len(packed), -1), axis=1)
        return np.hypot(inner, packed[:, -1])

    def replaced(self, lanes: np.ndarray, new: Solved) -> None:
        """Put what another solve found for some lanes in the place of what this one did."""
        for mine, other in zip(self.ends, new.ends, strict=True):
            mine[lanes] = other
        for mine, other in zip(
            vars(self.estimates).values(), vars(new.estimates).values(), strict=True
        ):
            mine[lanes] = other
        for name in ("y_scale", "D"):
            getattr(self, name)[lanes] = getattr(new, name)

    def improve(self, other: Solved) -> None:
        """Put what another solve of the same lanes found in place where it is better."""
        mine, theirs = self.estimates, other.estimates
        won = np.flatnonzero(
            better(-2.0 * theirs.llf, theirs.converged, -2.0 * mine.llf, mine.converged)
        )
        chosen = other._replace(
            ends=other.ends.take(won),
            estimates=theirs.take(won),
            y_scale=other.y_scale[won],
            D=other.D[won],
        )
        self.replaced(won, chosen)

    def parameter_covariance(self, lanes: np.ndarray) -> np.ndarray:
        """Return the covariance of the free entries of D and s of some lanes, (n, k, k)."""
        own, k = np.ix_(lanes, self.free, self.free), int(self.free.sum())
        singular = self.estimates.singular[lanes]
        C = 2.0 * np.linalg.inv(
            np.where(singular[:, None, None], np.eye(k), self.ends.hessian[own])
        )
        at = lanes[singular]
        if at.size:
            found = parameter_covariance(
                Ends(*(leaf[at] for leaf in self.ends)),
                self.D[at],
                self.blocks,
                self.noise[at],
                bool(self.free[-1]),
            )
            C[singular] = found[:, self.free][:, :, self.free]
        return np.asarray(C)

    def combined(self, lanes: np.ndarray, L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the covariance of ``L beta`` and its derivatives in the same parameters.

        Args:
            lanes: the lanes, n of them.
            L: combinations of the coefficients that were kept, (r, p).
        """
        p = self.to_user.shape[-1]
        # Positive where a residual variance is estimated as zero, and the errors are the limits.
        scale = (np.exp(self.ends.s) * self.y_scale**2)[lanes, None, None]
        turned = L @ (self.to_user if self.to_user.ndim == 2 else self.to_user[lanes])
        inner = self.ends.beta_inverse[lanes, :p, :p] @ np.swapaxes(turned, -1, -2)
        V = scale * (turned @ inner)
        slopes = self.ends.x_slope[:, self.free[:-1]][lanes][:, :, :p, :p]
        moved = -np.einsum("npr,ncpq,nqs->ncrs", inner, slopes, inner, optimize=True)
        return V, np.concatenate([scale[:, None] * moved, V[:, None]], axis=1)


def solve_responses(
    fit: Fit,
    shared: SharedDesigns | SharedFactors,
    y: np.ndarray,
    moved: np.ndarray | float = 0.0,
    effort: Effort | None = None,
) -> Solved:
    """Fit a model to many responses by row, with what inference needs.

    Args:
        fit: the model, fitted to one response.
        shared: what the responses share.
        y: the responses, their offset removed, (n, nobs).
        moved: coefficients, working coordinates, that were taken out of them before, (n, p).
        effort: counts the work, if given.
    """
    solved = _solve_around(fit, shared, y, moved, effort=effort)
    far = _unclear(fit, shared, solved)
    if far.size:
        y_far, moved = y[far], np.broadcast_to(moved, (len(y), len(fit.layout.fixed.kept)))[far]
        closer = shared.closer if isinstance(shared, SharedFactors) else shared
        found = solved.estimates.params[far][:, fit.layout.fixed.kept] @ fit.layout.fixed.R.T

        def around(ends: Ends) -> Solved:
            onward = ends, solved.y_scale[far]
            return _solve_around(fit, closer, y_far, moved, found - moved, onward, effort)

        ends = solved.ends.take(far)
        again = around(ends)
        if fit.estimates.constraints.structures:
            for theta in strong_starts(fit.estimates.constraints, ends.theta):
                again.improve(around(ends._replace(theta=theta)))
        solved.replaced(far, again)
    if may_be_endless(fit.layout, fit.compression.problem, fit.reml) and without_maximum(
        fit.layout, fit.terms, fit.estimates.constraints
    ):
        solved.estimates.status[:] = Status.UNBOUNDED
    return solved


def _solve_around(
    fit: Fit,
    shared: SharedDesigns | SharedFactors,
    y: np.ndarray,
    moved: np.ndarray | float,
    center: np.ndarray | None = None,
    ends: tuple[Ends, np.ndarray] | None = None,
    effort: Effort | None = None,
) -> Solved:
    """Do what :func:`solve_responses` does, once.

    Around ``center``, coefficients in working coordinates (n, p), or those of least squares; from
    ``ends``, where earlier searches ended, with the units of their responses, (n,).
    """
    if isinstance(shared, SharedDesigns):
        responses = project(shared, y, center)
        responses = responses._replace(origin=responses.origin + moved)
        return solve_statistics(fit, shared, responses, effort, ends)
    found = factors.project(shared, y, center)
    constraints, _ = read_constraints(shared.problem, fit.terms, fit.settings)
    unit = (float(shared.problem.y_scale) / found.y_scale) ** 2
    natural = np.asarray(constraints.natural) * unit[:, None, None]
    lanes = Lanes(found.problem, natural, found.varying)

    def others(which: np.ndarray) -> list[Start]:
        return starts_from(lanes, constraints, which, factors.rough(shared, y, found, which))

    start = start_at(fit, constraints, unit) if ends is None else _onward(*ends, found.y_scale)
    ended = solve(lanes, constraints, fit.settings, fit.terms, start, effort, others)
    origin = found.origin + moved
    return with_inference(fit, lanes, constraints, ended, origin, found.y_scale, found.total)


def _unclear(fit: Fit, shared: SharedDesigns | SharedFactors, solved: Solved) -> np.ndarray:
    """Return the lanes of which other statistics would show more digits, or another optimum."""
    ends, n_obs = solved.ends, float(fit.layout.n_obs)
    far = np.flatnonzero(is_far(ends.s, n_obs))
    if isinstance(shared, SharedFactors) and needs_rows(shared.layout, shared.compression):
        return far
    bounded = far[solved.estimates.status[far] != Status.UNBOUNDED]
    if fit.estimates.constraints.structures:
        return bounded
    off = [is_off_center(*lane, n_obs) for lane in _centers(ends, bounded)]
    return bounded[np.array(off, dtype=bool)]


def _centers(ends: Ends, lanes: np.ndarray) -> Iterator[tuple[Any, Any, Any]]:
    """Yield ``s``, coefficients and their covariance of some lanes."""
    return zip(ends.s[lanes], ends.beta[lanes], ends.beta_inverse[lanes], strict=True)


def _onward(ends: Ends, before: np.ndarray, y_scale: np.ndarray) -> Start:
    """Return where searches ended as starts of others, in other units of the responses."""
    return Start(ends.D, ends.s + 2.0 * np.log(before / y_scale), ends.theta)


def solve_statistics(
    fit: Fit,
    shared: SharedDesigns,
    responses: Responses,
    effort: Effort | None = None,
    earlier: tuple[Ends, np.ndarray] | None = None,
) -> Solved:
    """Fit a one-factor model to the statistics of many responses, with what inference needs.

    Args:
        fit: the model, fitted to one response.
        shared: what the responses share.
        responses: their statistics.
        effort: counts the work, if given.
        earlier: where earlier searches ended, with the units of their responses, (n,).
    """
    (problem, varying), y_scale = lanes_of(shared, responses), responses.y_scale
    constraints, _ = read_constraints(shared.problem, fit.terms, fit.settings)
    unit = (float(shared.problem.y_scale) / y_scale) ** 2
    lanes = Lanes(problem, np.asarray(constraints.natural) * unit[:, None, None], varying)
    start = start_at(fit, constraints, unit)
    if earlier is not None:
        start = _onward(*earlier, y_scale)
    moves = earlier is None and constraints.profile and not np.any(constraints.held)
    if start is not None and isinstance(problem, SharedProblem) and moves:
        D, s = scored(
            problem, shared.problem, start.D[0], np.asarray(constraints.blocks), lanes.noise[0]
        )
        start = start._replace(D=D, s=s)
    ends = solve(lanes, constraints, fit.settings, fit.terms, start, effort)
    return with_inference(fit, lanes, constraints, ends, responses.origin, y_scale)


def with_inference(
    fit: Fit,
    lanes: Lanes,
    constraints: Constraints,
    ends: Ends,
    origin: np.ndarray,
    y_scale: np.ndarray,
    total: np.ndarray | float = 1.0,
    columns: tuple[np.ndarray, int] | None = None,
) -> Solved:
    """Return the ends of lanes in the user's units, with what inference needs.

    Args:
        fit: the fit that lent them settings and start.
        lanes: the problems.
        constraints: what was free.
        ends: the ends.
        origin: see :func:`lmmax.batch.solve.in_user_units`; so are `y_scale` and `total`.
        y_scale: units of the data per unit of the working response, (n,).
        total: sum of squares of the working responses relative to that of the data, (n,).
        columns: positions of the columns of X that were kept, and their number before that; None
            for those of the fit.
    """
    kept, n_columns = columns or (fit.layout.fixed.kept, len(fit.design.x_names))
    estimates = in_user_units(
        lanes,
        constraints,
        fit.settings,
        fit.terms,
        ends,
        origin,
        y_scale,
        kept,
        n_columns,
        total,
    )
    free = pack_triangle(np.asarray(constraints.blocks) * (1.0 - constraints.held)) > 0.0
    free = np.append(free, constraints.scale_free)
    enough = free.sum() <= lanes.values("n_obs") - fit.settings.reml * len(kept)
    plain = not constraints.structures and not np.any(constraints.held)
    plain = plain & enough & (estimates.status != Status.ZERO_SCALE)
    if fit.unidentified is not None:
        # With as many parameters held as there are flat directions, the others tell as much.
        free[fit.unidentified.redundant] = False
        plain = plain & ~estimates.singular
    return Solved(
        estimates,
        ends,
        free,
        np.asarray(lanes.problem.x_inverse)[..., : len(kept), : len(kept)],
        plain,
        y_scale,
        snapped(ends, constraints, fit.terms, lanes.noise)[0],
        lanes.noise,
        np.asarray(constraints.blocks),
    )


def refit_statistics(fit: Fit, shared: SharedDesigns, responses: Responses) -> BatchEstimates:
    """Fit a one-factor model to the statistics of many responses."""
    return solve_statistics(fit, shared, responses).estimates


def start_at(fit: Fit, constraints: Constraints, unit: np.ndarray) -> Start | None:
    """Return the estimates of a fit as the start of n lanes, a little inside the boundary.

    None with structures, which may have several optima: each lane then starts where a fit of its
    own would.

    Args:
        fit: the fit.
        constraints: what is free.
        unit: the scale of each lane is this much larger in working units than the fit's, (n,).
    """
    if constraints.structures and fit.settings.start is None:
        return None
    n, point = len(unit), fit.estimates.solution.point
    return Start(
        np.tile(_lifted(fit), (n, 1, 1)),
        float(point.s) + np.log(unit),
        np.tile(np.asarray(point.theta), (n, 1)),
    )


def _lifted(fit: Fit) -> np.ndarray:
    """Return the relative covariance of a fit, moved inside if it is singular, working units."""
    D = np.asarray(fit.estimates.solution.point.D)
    if fit.singular:
        D = D + LIFT * np.diag(group_noise(fit.compression.problem) ** 2)
    return D


def _one(fit: Fit, y: np.ndarray) -> Estimates:
    """Fit another response, its offset removed, from the estimates of a fit."""
    compressed = compress(y, fit.layout, earlier=fit.compression)

    def solved(settings: Settings) -> Estimates:
        return estimate_closely(y, fit.layout, compressed, fit.terms, settings).estimates

    if fit.estimates.constraints.structures:  # which may have several optima
        return solved(fit.settings)
    D = fit.estimates.z_inverse @ _lifted(fit) @ fit.estimates.z_inverse.T
    scale = fit.estimates.scale
    start = {"cov_re": scale * D, "scale": scale}
    estimates = solved(replace(fit.settings, start=start, em_steps=0))
    return estimates if is_optimal(estimates.status) else solved(fit.settings)


def estimates_of(fit: Fit, estimates: Estimates | None = None) -> BatchEstimates:
    """Return the estimates of a fit, or others of its model, as a record without a leading axis."""
    estimates = fit.estimates if estimates is None else estimates
    kept, p = fit.layout.fixed.kept, len(fit.design.x_names)
    params, bse = np.full(p, np.nan), np.full(p, np.nan)
    params[kept] = estimates.beta
    bse[kept] = np.sqrt(estimates.scale * np.diag(estimates.beta_unscaled))
    return BatchEstimates(
        params=params,
        bse=bse,
        cov_re=estimates.scale * estimates.D,
        scale=np.asarray(0.0 if estimates.zero_scale else estimates.scale),
        llf=np.asarray(-0.5 * estimates.criterion),
        status=np.asarray(int(estimates.status)),
        singular=np.asarray(bool(estimates.boundary) or estimates.zero_scale),
    )
