"""From sufficient statistics to estimates: start, constraints, solve, certificate.

The solver works in coordinates where columns are orthonormal and the response has unit length.
This module is the one place that maps the user's quantities there and back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import starts, zero_scale
from .along import hessian_along
from .compilation import Compiled
from .compilation_cache import compilation_cache
from .compress import Compression
from .compress.iterative import Rows
from .constraints import Guess, Settings, TermColumns, read_constraints, usual_log_scale
from .covariances import matrix_at, slopes
from .likelihood import Problem
from .optima import FREE_WORK, is_balanced, looks_again, spread_starts, work
from .parameters import factor, lower_from_root, pack_triangle, unpack_symmetric
from .solve import (
    NEWTON_LIMIT,
    TRACE_COLUMNS,
    TRACE_LENGTH,
    Best,
    Constraints,
    Options,
    Point,
    Solution,
    Starts,
    Status,
    better,
    is_credible,
    is_optimal,
    lbfgs_from,
    merit,
    narrow,
    newton_from_each,
    point_of,
)

MAX_STEPS = {"newton": 100, "lbfgs": 3000}
TOLERANCE, TOLERANCE_CROSSED = 1e-16, 1e-13
"""Newton decrements that count as converged; squared distances to the optimum in standard errors.
Where an evaluation takes seconds, one more for the eighth digit of them is too many."""
ENDS_TOL = 1e-8
"""Newton decrement up to which searches from far away are followed."""
RESTARTS = 5
TOGETHER = 12
"""Most starts of one call of the compiled solver."""
SUSPECT = 1e-3
"""Curvature, in units in which a real one is about one, below which the designs are asked whether
there is none at all."""
FLAT = 1e-6
"""Of a model whose designs leave something unidentified, curvature below it is rounding."""
FEW_CORRELATIONS = 10
"""Most parameters of correlations with which Newton's method is the default for a narrow model."""
BOUNDARY = 1e-4
"""A direction of the random effects is at the boundary if its standard deviation is below this
fraction of the sampling noise of one average group (working columns have mean square one)."""


@dataclass(frozen=True)
class Estimates:
    """A solved model in the user's units; arrays are NumPy float64.

    Attributes:
        beta: coefficients of the columns of X that were kept, (p,).
        beta_unscaled: ``(X' V^-1 X)^-1`` with V relative to the scale, (p, p).
        scale: residual variance.
        working_root: square root of the relative covariance of the random effects in working
            coordinates, exactly singular where the covariance counts as such, (q, q).
        structure_theta: parameters of the terms with a structure, (k,).
        criterion: -2 log-likelihood (the REML criterion if ``reml``).
        reml: whether the criterion is the restricted one.
        status: how the solve ended.
        solver: "newton" or "lbfgs".
        solution: the solver's record, in working coordinates.
        boundary: labels of the terms whose covariance is singular.
        constraints: what was free.
        z_inverse: ``A^-1``, from working to the user's random-effects coordinates, (q, q).
        contrasts: ``d``, n for ML and n - p for REML.
        noise: standard deviation of one average group's mean, relative to the residual's, (q,).
        criterion_error: Monte Carlo standard error of the criterion.
        probes: number of random probes behind it.
        ends: the criterion where each search that converged has ended, from one start or several.
        flat: directions that the data do not identify, of (vech cov_re in working coordinates,
            scale, theta), (k + 1 + t, r); see :mod:`lmmax.identifiability`.
    """

    beta: np.ndarray
    beta_unscaled: np.ndarray
    scale: float
    working_root: np.ndarray
    structure_theta: np.ndarray
    criterion: float
    reml: bool
    status: Status
    solver: str
    solution: Solution
    boundary: tuple[str, ...]
    constraints: Constraints
    z_inverse: np.ndarray
    contrasts: float
    noise: np.ndarray
    criterion_error: float = 0.0
    probes: int = 0
    ends: tuple[float, ...] = ()
    flat: np.ndarray | None = None

    @property
    def narrow(self) -> bool:
        """Whether second derivatives are along the solver's coordinates; see `solve.narrow`."""
        return _is_narrow(self.solution.point)

    @property
    def root_columns(self) -> np.ndarray:
        """Columns whose roots are coordinates of the solver, (r,)."""
        return self.constraints.columns if self.narrow else np.arange(len(self.working_root))

    @cached_property
    def root(self) -> np.ndarray:
        """Square root of the relative covariance, ``D = root root'``, (q, q)."""
        return self.z_inverse @ self.working_root

    @cached_property
    def D(self) -> np.ndarray:
        """Covariance of the random effects relative to the scale, (q, q)."""
        return self.root @ self.root.T

    @cached_property
    def lower(self) -> np.ndarray:
        """Cholesky factor of D, (q, q)."""
        return lower_from_root(self.root)

    @cached_property
    def _information(self) -> tuple[np.ndarray, np.ndarray]:
        """Return curvatures (r,) and directions (k + 1 + t, r) of (vech cov_re, scale, theta)."""
        curvatures, directions = self._working_information
        return curvatures, self._in_user_units(directions)

    def _in_user_units(self, directions: np.ndarray) -> np.ndarray:
        """Return directions of (vech cov_re, scale, theta), given with cov_re in working units."""
        q, A = len(self.working_root), self.z_inverse
        k = q * (q + 1) // 2
        moved = np.einsum("ai,ijr,bj->abr", A, unpack_symmetric(directions[:k]), A, optimize=True)
        return np.concatenate([pack_triangle(moved), directions[k:]])

    @cached_property
    def _spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Return curvatures (r,) and directions (x, r) of the solver's ``(s, root, theta)``.

        The observed information of the (restricted) likelihood in covariances and scale jointly,
        the coefficients profiled out.  In the coordinates of the root it also holds for singular
        covariances, given their rank.
        """
        point, q = self.solution.point, len(self.working_root)
        free, columns = point.free > 0.0, self.root_columns
        r = len(columns)
        # What convergence left of the gradient outside D's null space would pass for curvature.
        G = unpack_symmetric(point.at.gradient[:-1]) * (0.5 + 0.5 * np.eye(q))
        G = G * self.constraints.blocks
        values, vectors = np.linalg.eigh(self.working_root @ self.working_root.T)
        null = vectors[:, values <= 1e-12 * values[-1]]
        left = G - null @ (null.T @ G @ null) @ null.T
        n_theta = len(point.theta)
        left = left[np.ix_(columns, columns)]
        bend = np.pad(np.kron(2.0 * left, np.eye(r)), ((1, n_theta), (1, n_theta)))
        hessian = (point.hessian - bend)[np.ix_(free, free)]
        unit = self._units(np.asarray(hessian))
        values, vectors = np.linalg.eigh(hessian / np.outer(unit, unit))
        directions = np.zeros((len(free), len(values)))
        directions[free] = vectors / unit[:, None]
        return 0.5 * values, directions

    @cached_property
    def _working_information(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the same with cov_re in working coordinates, whatever the covariates' origin."""
        curvatures, directions = self._spectrum
        point, q = self.solution.point, len(self.working_root)
        columns, n_theta = self.root_columns, len(point.theta)
        r = len(columns)
        # d(vech Psi, scale) / d(s, root, theta) for Psi = exp(s) y_scale^2 root root', at the
        # estimates themselves: what is zero there moves nothing, however the solver came near it.
        root, theta = self.working_root, self.structure_theta
        k = q * (q + 1) // 2
        jacobian = np.zeros((k + 1 + n_theta, len(directions)))
        for entry, (i, j) in enumerate(itertools.product(columns, columns)):
            half = np.zeros((q, q))
            half[i] = root[:, j]
            jacobian[:k, 1 + entry] = self.scale * pack_triangle(half + half.T)
        for part in self.constraints.structures:
            here, at = slice(*part.columns), slice(*part.parameters)
            slope = slopes(part.covariance, theta[at], here.stop - here.start)
            for j in range(at.start, at.stop):
                whole = np.zeros((q, q))
                z_factor = np.linalg.inv(self.z_inverse[here, here])
                natural = self.scale * slope[..., j - at.start]
                whole[here, here] = z_factor @ natural @ z_factor.T
                jacobian[:k, 1 + r * r + j] = pack_triangle(whole)
                jacobian[k + 1 + j, 1 + r * r + j] = 1.0
        jacobian[:k, 0] = self.scale * pack_triangle(root @ root.T * (1.0 - self.constraints.held))
        jacobian[k, 0] = self.scale
        return curvatures, jacobian @ directions

    def _units(self, hessian: np.ndarray) -> np.ndarray:
        """Return units in which a real curvature is about one, of what is free.

        Rounding errors are no curvature.
        """
        point, columns, noise = self.solution.point, self.root_columns, self.noise**2
        diagonal = np.abs(hessian.diagonal())
        if diagonal.min(initial=np.inf) >= 1e-6 * point.at.hessian[-1, -1] * max(1.0, noise.min()):
            return np.sqrt(diagonal)  # none of the floors below is higher than that
        size = np.maximum((np.asarray(point.root) ** 2).max(axis=1, initial=0.0), noise)
        n_groups = noise * point.at.hessian[-1, -1]
        few, r = n_groups.min(), len(columns)
        floor = np.empty(len(point.free))
        floor[0] = few
        floor[1 : 1 + r * r] = np.repeat((n_groups / size)[columns], r)
        floor[1 + r * r :] = few / np.maximum(point.theta**2, 1.0)
        return np.sqrt(np.maximum(diagonal, 1e-6 * floor[point.free > 0.0]))

    @property
    def suspect(self) -> bool:
        """Whether the criterion may be flat in some direction, so that the designs are asked."""
        if self.boundary or self.probes:
            return True
        free = np.flatnonzero(self.solution.point.free)
        hessian = np.asarray(self.solution.point.hessian)[free[:, None], free]
        if not hessian.size or not np.isfinite(hessian).all():
            return False
        unit = self._units(hessian)
        return bool(np.linalg.eigvalsh(hessian / (unit[:, None] * unit))[0] < SUSPECT)

    def standard_errors(self, gradients: np.ndarray) -> np.ndarray:
        """Return standard errors of functions of (vech cov_re row by row, scale, theta).

        Args:
            gradients: their derivatives, shape (r, q (q + 1) / 2 + 1), with those in the parameters
                of structures behind them where there are any.

        Returns:
            Delta-method standard errors, (r,); NaN where the likelihood is flat in the function,
            and where it does not vary at all (fixed, or at a boundary).
        """
        curvatures, directions = self._information
        parts = (gradients @ directions[: gradients.shape[1]]) ** 2
        # With fewer contrasts than parameters, whatever curvature there is comes from rounding.
        curved = self._curved(curvatures)
        curved &= self.n_free <= self.contrasts
        size = parts.sum(axis=1)
        flat = parts[:, ~curved].sum(axis=1) > 1e-12 * size
        if self.flat is not None:
            null, width = self.flat_in_user_units, gradients.shape[1]
            along = np.abs(gradients @ null[:width])
            # As far as the function would move if every parameter did.
            most = np.abs(gradients) / self.sizes[:width] @ np.ones(width)
            most = most[:, None] * np.max(self.sizes[:, None] * np.abs(null), axis=0, initial=0.0)
            flat |= (along > 1e-7 * most).any(axis=1)
        variances = parts[:, curved] @ (1.0 / curvatures[curved])
        return np.sqrt(np.where(flat | (size == 0.0), np.nan, variances))

    def _curved(self, curvatures: np.ndarray) -> np.ndarray:
        """Return which of the directions have a curvature that is not rounding, (r,)."""
        least = 1e-10 if self.flat is None else FLAT
        return np.asarray(curvatures > least * np.max(curvatures, initial=0.0))

    @cached_property
    def flat_in_user_units(self) -> np.ndarray:
        """Directions of (vech cov_re, scale, theta) that are not identified, (k + 1 + t, r)."""
        none = np.zeros((len(self.sizes), 0))
        return none if self.flat is None else self._in_user_units(self.flat)

    @cached_property
    def sizes(self) -> np.ndarray:
        """What a unit of (vech cov_re, scale, theta) adds to the variance of rows, (k + 1 + t,)."""
        A = np.linalg.inv(self.z_inverse)
        own = np.sqrt(np.sum(A * A, axis=0))
        entries = pack_triangle(np.outer(own, own))
        return np.concatenate([entries, [1.0], np.full(len(self.structure_theta), self.scale)])

    @cached_property
    def variance_cov(self) -> np.ndarray:
        """Covariance of (vech cov_re row by row, scale); zero rows for what is fixed.

        Along directions in which the likelihood is flat it counts no variance;
        :meth:`standard_errors` tells where that matters.
        """
        return self._covariance(*self._information)

    @cached_property
    def working_variance_cov(self) -> np.ndarray:
        """The same with cov_re in working coordinates."""
        return self._covariance(*self._working_information)

    @cached_property
    def slope_cov(self) -> np.ndarray:
        """The same in the parameters that `covariance_slopes` has derivatives in."""
        if not self.narrow:
            return self.working_variance_cov
        curvatures, directions = self._spectrum
        curved = self._curved(curvatures)
        inside = directions[:, curved]
        return np.asarray((inside / curvatures[curved]) @ inside.T)

    def _covariance(self, curvatures: np.ndarray, directions: np.ndarray) -> np.ndarray:
        curved = self._curved(curvatures)
        k = len(self.working_root) * (len(self.working_root) + 1) // 2 + 1
        inside = directions[:k, curved]
        return np.asarray((inside / curvatures[curved]) @ inside.T)

    @cached_property
    def hessian_eigenvalues(self) -> np.ndarray:
        """Eigenvalues of the Hessian in (log scale, root), free entries, working coordinates."""
        free = self.solution.point.free > 0.0
        return np.linalg.eigvalsh(self.solution.point.hessian[np.ix_(free, free)])

    @property
    def n_free(self) -> int:
        """Number of covariance parameters and scale that were estimated."""
        return int(np.sum(self.solution.point.free > 0.0)) + self.zero_scale

    @property
    def zero_scale(self) -> bool:
        """Whether the residual variance is estimated as zero.

        Then `scale` is small enough to stand for zero next to `cov_re`, and counts as given.
        """
        return self.status == Status.ZERO_SCALE


def estimate(
    compression: Compression,
    terms: Sequence[TermColumns],
    settings: Settings,
    at: Guess | None = None,
) -> Estimates:
    """Solve a compressed model.

    Args:
        compression: sufficient statistics.
        terms: the random terms' places among the columns.
        settings: how to estimate.
        at: where an earlier solve ended, in the working coordinates of these statistics; the search
            goes on from there.

    Raises:
        ConstraintError: if ``start`` or ``fix`` does not fit the model.
    """
    problem = compression.problem
    z_inverse = np.asarray(problem.z_inverse)
    constraints, guess = read_constraints(problem, terms, settings)
    if isinstance(compression.detail, Rows):
        from .iterative import probed  # here, since few models need it and SciPy

        solution, found = probed(problem, compression.detail, constraints, guess, settings, terms)
        estimates = _in_user_units(compression, terms, settings, constraints, solution, "newton")
        return replace(
            estimates,
            criterion_error=float(np.hypot(found.criterion_error, found.decrement)),
            probes=found.probes,
        )
    noise = group_noise(problem)
    solver = settings.solver
    if solver == "auto":
        few = len(z_inverse) <= NEWTON_LIMIT or _suits_newton(problem, constraints)
        solver = "newton" if few else "lbfgs"

    # EM moves what is in the root; of a model with structures only it has nothing to move.
    em_steps = settings.em_steps if constraints.rooted.any() and at is None else 0
    D, theta, s = guess if at is None else at
    variances = compression.start
    if not constraints.scale_free:
        # What the moments say is relative to their own scale, not to the one that is held.
        variances = variances * np.exp(usual_log_scale(problem) - s)
    if D is None:
        D = np.diag(variances) * constraints.blocks
    elif at is None:
        # A start is a hint: from absurdly large variances rounding hides the way down.
        D = D / max(1.0, np.max(np.diag(D)) / (1e4 * np.max(compression.start)))
    search = _Search(problem, constraints, settings, solver, terms, noise)
    if theta is not None or not constraints.structures:
        theta = np.zeros(0) if theta is None else theta
        solution = search.finish(Start(D, s, theta, em_steps))
        ends = [float(solution.point.at.value)] if is_optimal(int(solution.status)) else []
        if settings.start is None and at is None:
            solution, others = _further(search, solution)
            ends += others
    else:
        longest = min(settings.max_steps or starts.ROUGH_STEPS, starts.ROUGH_STEPS)
        rough: dict[str, Any] = {"max_steps": longest, "tol": starts.ROUGH_TOL, **search.stops}
        solution, found_ends = starts.search(
            starts.structure_starts(constraints, z_inverse, variances),
            lambda theta: search.end_of(Start(D, s, theta, em_steps), **rough),
            lambda end: search.finish(start_at(end)),
        )
        ends = list(found_ends)
    stopped = solution.status in (Status.MAX_STEPS, Status.STALLED)
    if stopped and settings.solver == "auto" and len(z_inverse) > NEWTON_LIMIT:
        # Of many parameters Newton's method may leave some that L-BFGS does not.
        again = replace(search, solver="lbfgs").finish(start_at(solution))
        if better(*merit(again), *merit(solution)):
            solution, solver = again, "lbfgs"
    return _in_user_units(compression, terms, settings, constraints, solution, solver, ends)


def estimate_given(
    compression: Compression, terms: Sequence[TermColumns], settings: Settings, found: Estimates
) -> Estimates:
    """Return what other data of the same designs say at the variances of a solved model."""
    problem, y_scale = compression.problem, float(compression.problem.y_scale)
    D = found.working_root @ found.working_root.T
    held = np.zeros_like(D)
    for term in terms:
        held[term.columns, term.columns] = 1.0 if term.pattern is None else term.pattern
    constraints = Constraints(
        blocks=held,
        held=held,
        natural=found.scale / y_scale**2 * D,
        scale_free=False,
        profile=False,
    )
    s = math.log(found.scale / y_scale**2)
    search = _Search(problem, constraints, settings, "newton", terms, group_noise(problem))
    solution = search.end_of(Start(D, s, np.zeros(0), 0))
    settings = replace(settings, fix={"scale": found.scale})
    return _in_user_units(compression, terms, settings, constraints, solution, "newton")


def _in_user_units(
    compression: Compression,
    terms: Sequence[TermColumns],
    settings: Settings,
    constraints: Constraints,
    solution: Solution,
    solver: str,
    ends: Sequence[float] = (),
) -> Estimates:
    """Map the end of a solve to the user's units."""
    problem = compression.problem
    solution = _canonical(constraints, solution)
    z_inverse, noise = np.asarray(problem.z_inverse), group_noise(problem)
    point = solution.point
    at = point.at
    status = Status(int(solution.status))
    if status == Status.ZERO_SCALE:
        constraints = zero_scale.held(constraints)
    # Residuals of the size of y's own rounding are none, however far from zero y lies.
    rounding = (10.0 * np.finfo(float).eps) ** 2 / (compression.total * float(problem.n_obs))
    if constraints.scale_free and np.exp(point.s) <= rounding:
        status = Status.UNBOUNDED
    root, boundary = _snap(point, constraints, terms, noise)
    theta = np.asarray(point.theta)
    if boundary:
        theta = _at_zero(theta, constraints, np.asarray(problem.z_factor), noise)
    for part in constraints.structures:
        here = slice(*part.columns)
        own = theta[slice(*part.parameters)]
        natural = factor(matrix_at(part.covariance, own, here.stop - here.start))
        root[here, here] = np.linalg.solve(z_inverse[here, here], natural)
    p = int(problem.n_fixed)
    R_inverse = np.asarray(problem.x_inverse)[:p, :p]
    y_scale = float(problem.y_scale)
    d = float(problem.n_obs) - settings.reml * p
    constant = 2.0 * (d * np.log(y_scale) + settings.reml * float(problem.x_logdet))
    constant = constant - float(problem.log_weights)
    value = float(at.value)
    if status == Status.ZERO_SCALE:
        # The limit at a scale of zero, to second order.
        value -= float(zero_scale.slope(zero_scale.derivatives_at(point)))
    return Estimates(
        beta=R_inverse @ (at.beta[:p] + np.asarray(problem.beta_origin)[:p]) * y_scale,
        beta_unscaled=R_inverse @ at.beta_inverse[:p, :p] @ R_inverse.T,
        scale=float((settings.fix or {}).get("scale", np.exp(point.s) * y_scale**2)),
        working_root=root,
        structure_theta=theta,
        criterion=float(value + constant),
        reml=settings.reml,
        status=status,
        solver=solver,
        solution=solution,
        boundary=boundary,
        constraints=constraints,
        z_inverse=z_inverse,
        contrasts=d,
        noise=noise,
        ends=tuple(float(end + constant) for end in ends),
    )


def _further(search: _Search, usual: Solution) -> tuple[Solution, list[float]]:
    """Search from elsewhere too, where there may be another optimum.

    Args:
        search: searches of the model.
        usual: the end of the usual search.

    Returns:
        The best end, and the criterion at all those of the further searches that converged.
    """
    problem, constraints, point = search.problem, search.constraints, usual.point
    cost = work(problem)
    # Of little data this is the cheaper question, of much the dearer one.
    little = cost <= FREE_WORK
    if little and is_balanced(problem, constraints):
        return usual, []
    inside = usual.status == Status.CONVERGED and _is_interior(point.D, search.noise)
    root, hessian = np.asarray(point.root)[None], np.asarray(point.at.hessian)[None]
    again = looks_again(root, hessian, np.array([inside]), cost, constraints)
    many = len(search.noise) > NEWTON_LIMIT
    if many or not again[0] or (not little and is_balanced(problem, constraints)):
        return usual, []
    units = [block for _, blocks in free_terms(search.terms, constraints) for block in blocks]
    sizes = spread_starts(constraints, units, cost)
    if not sizes:
        return usual, []
    s = usual_log_scale(problem) if constraints.scale_free else float(point.s)
    theta = np.asarray(point.theta)
    # Ends are told apart long before they are exact: the best one is, if it is another.
    tol = max(ENDS_TOL, tolerance(problem) if search.settings.tol is None else search.settings.tol)
    # From far away L-BFGS is easily lost, and models that have so few parameters do not need it.
    found = replace(search, solver="newton").run(
        [Start(np.diag(search.noise**2 * size), s, theta, 0) for size in sizes], far=True, tol=tol
    )
    ends = found.values[found.statuses == Status.CONVERGED].tolist()
    new = found.solution
    if is_credible(problem, new.status, float(new.point.s)) and better(*merit(new), *merit(usual)):
        new = search.finish(start_at(new))
        if better(*merit(new), *merit(usual)):
            return new, ends
    return usual, ends


class Start(NamedTuple):
    """Where a search begins, in working coordinates.

    Attributes:
        D: relative covariance, (q, q).
        s: logarithm of the scale.
        theta: parameters of structures, (k,).
        em_steps: most EM steps.
    """

    D: np.ndarray
    s: float
    theta: np.ndarray
    em_steps: int


def start_at(end: Solution) -> Start:
    """Return the end of a search as the start of another."""
    return Start(np.asarray(end.point.D), float(end.point.s), np.asarray(end.point.theta), 0)


@dataclass(frozen=True)
class _Search:
    """Searches for the optimum of one model, in float64; the records returned are in NumPy arrays.

    Attributes:
        problem: compressed data.
        constraints: what moves.
        settings: how to estimate.
        solver: "newton" or "lbfgs".
        terms: the random terms.
        noise: standard deviation, relative to the residual's, of one average group's mean, (q,).
    """

    problem: Problem
    constraints: Constraints
    settings: Settings
    solver: str
    terms: Sequence[TermColumns]
    noise: np.ndarray

    @property
    def stops(self) -> dict[str, Any]:
        """Options that stop a search on the way to a scale of zero, to see where it leads."""
        if not self.constraints.structures:
            return {}
        # A structure may describe the data without a residual; the search would go on for ever.
        lowest = zero_scale.log_scale(float(self.problem.n_obs), zero_scale.LOOKED_AT)
        return {"smallest_scale": lowest}

    def finish(self, start: Start) -> Solution:
        """Search as far as it goes: off boundaries, and to a scale of zero."""
        at: tuple[Any, ...] = start
        end = self.settle(self.constraints, *at, **self.stops)
        reml = self.settings.reml
        return zero_scale.look_closer(self.problem, self.constraints, reml, end, self.settle)

    def settle(
        self,
        constraints: Constraints,
        D: np.ndarray,
        s: float,
        theta: np.ndarray,
        em_steps: int = 0,
        **options: Any,
    ) -> Solution:
        """Search, and again where it ends at a boundary from which the criterion falls inwards."""
        own = self if constraints is self.constraints else replace(self, constraints=constraints)
        solution = own.end_of(Start(D, s, theta, em_steps), **options)
        for _ in range(RESTARTS):
            interior = _is_interior(solution.point.D, self.noise)
            if solution.status != Status.CONVERGED or interior:
                break
            inside = _step_off(
                solution, constraints, self.terms, self.problem, self.noise, self.settings.reml
            )
            if inside is None:
                break
            solution = own.end_of(Start(inside[0], float(solution.point.s), inside[1], 0))
        return solution

    def end_of(self, start: Start, **options: Any) -> Solution:
        """Return the end of one search."""
        return self.run([start], **options).solution

    def run(self, starts: Sequence[Start], far: bool = False, **options: Any) -> Best:
        """Search from some starts in one call; see :func:`lmmax.solve.newton_from_each`.

        No more than ``TOGETHER`` of them, or than one by L-BFGS; with as many EM steps from each.
        """
        usual = {
            "max_steps": self.settings.max_steps or MAX_STEPS[self.solver],
            "tol": tolerance(self.problem) if self.settings.tol is None else self.settings.tol,
            "smallest_scale": -np.inf,
        }
        reml, em_steps = float(self.settings.reml), starts[0].em_steps
        chosen = Options(reml=reml, em_steps=em_steps, **(usual | options))
        q, k = len(starts[0].D), len(starts[0].theta)
        together = TOGETHER if self.solver == "newton" else 1
        many = Starts(
            D=np.zeros((together, q, q)),
            s=np.zeros(together),
            theta=np.zeros((together, k)),
            count=len(starts),
            far=far,
        )
        for i, start in enumerate(starts):
            many.D[i], many.s[i], many.theta[i] = start[:3]
        with jax.enable_x64(True), compilation_cache():
            flat = np.asarray(_compiled[self.solver](self.problem, self.constraints, chosen, many))
        found = _unflatten(flat, self.problem, self.constraints, together)
        values, statuses = found.values[: len(starts)], found.statuses[: len(starts)]
        return found._replace(values=values, statuses=statuses)


def _flat(solver: Callable[..., Best]) -> Callable[..., jax.Array]:
    """Make a solver return one flat array: a transfer costs more than a small solve."""

    def solve(*arguments: Any) -> jax.Array:
        leaves = jax.tree.leaves(solver(*arguments))
        dtype = leaves[0].dtype
        return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])

    return solve


def _unflatten(flat: np.ndarray, problem: Problem, constraints: Constraints, together: int) -> Best:
    """Undo the flattening of a record."""
    at = 0

    def take(*shape: int) -> Any:
        nonlocal at
        size = math.prod(shape)
        part = flat[at : at + size].reshape(shape)
        at += size
        return part

    solution = Solution(
        point=point_of(take, problem, constraints),
        status=take(),
        steps=take(),
        decrement=take(),
        trace=take(TRACE_LENGTH, TRACE_COLUMNS),
    )
    return Best(solution, take(together), take(together))


_compiled = {"newton": Compiled(_flat(newton_from_each)), "lbfgs": Compiled(_flat(lbfgs_from))}


def _suits_newton(problem: Problem, constraints: Constraints) -> bool:
    """Return whether the exact Hessian pays for a narrow model.

    It does not with a correlation for each of many lags: far from the end Newton's method finds
    its way among them less easily than L-BFGS does.
    """
    if not narrow(problem, constraints):
        return False
    correlations = 0
    for part in constraints.structures:
        is_sd = part.covariance.is_sd(part.columns[1] - part.columns[0])
        correlations += len(is_sd) - sum(is_sd)
    size = len(constraints.columns) ** 2 + constraints.n_theta
    return correlations <= FEW_CORRELATIONS and size <= NEWTON_LIMIT**2


def tolerance(problem: Problem) -> float:
    """Return the default tolerance: a tenth of a millionth of a standard error, or less."""
    return TOLERANCE_CROSSED if problem.costly else TOLERANCE


def group_noise(problem: Problem) -> np.ndarray:
    """Return the standard deviation, relative to the residual's, of one group's mean, (q,)."""
    return np.asarray(np.sqrt(np.asarray(problem.n_groups) / float(problem.n_obs)))


def _is_narrow(point: Point) -> bool:
    """Return whether second derivatives are along the solver's coordinates."""
    return len(point.at.hessian) == len(point.free) + 1 != len(point.at.gradient)


def _canonical(constraints: Constraints, solution: Solution) -> Solution:
    """Return the end of a solve with standard deviations that are not negative.

    Where signs do not matter, that is; derivatives turn with the parameters.
    """
    point: Any = solution.point
    theta = np.array(point.theta)
    for part in constraints.structures:
        at, q = slice(*part.parameters), part.columns[1] - part.columns[0]
        own = np.where(part.covariance.is_sd(q), np.abs(theta[at]), theta[at])
        before, after = (matrix_at(part.covariance, x, q) for x in (theta[at], own))
        if np.array_equal(before, after):
            theta[at] = own
    turned = theta != point.theta
    if not turned.any():
        return solution
    signs = np.ones(len(point.free))
    signs[len(signs) - len(theta) :][turned] = -1.0
    found = point.at
    if _is_narrow(point):
        along = np.append(signs, 1.0)
        found = found._replace(
            hessian=found.hessian * np.outer(along, along),
            x_slope=found.x_slope * signs[:, None, None],
        )
    point = point._replace(
        theta=theta,
        at=found,
        gradient=point.gradient * signs,
        hessian=point.hessian * np.outer(signs, signs),
    )
    return solution._replace(point=point)


def _at_zero(
    theta: np.ndarray, constraints: Constraints, z_factor: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    """Return theta with the standard deviations at the boundary set to exactly zero."""
    theta = theta.copy()
    for part in constraints.structures:
        here, start = slice(*part.columns), part.parameters[0]
        unit = z_factor[here, here] / noise[here, None]
        q = here.stop - here.start
        for j in np.flatnonzero(part.covariance.is_sd(q)):
            own = theta[slice(*part.parameters)]
            zero = own * (np.arange(len(own)) != j)
            change = matrix_at(part.covariance, own, q) - matrix_at(part.covariance, zero, q)
            # NaN where a structure does not reach zero.
            if np.max(np.abs(unit @ change @ unit.T)) <= BOUNDARY**2:
                theta[start + j] = 0.0
    return theta


def free_terms(
    terms: Sequence[TermColumns], constraints: Constraints
) -> Iterator[tuple[TermColumns, list[np.ndarray]]]:
    """Yield each estimated term with the columns of its irreducible blocks."""
    for term in terms:
        start, q = term.columns.start, term.width
        if constraints.held[start, start] or not term.covariance.n_parameters(q):
            continue
        yield term, [start + positions for positions in term.sets]


def _is_interior(D: Any, noise: np.ndarray) -> bool:
    """Return whether no direction of the random effects is at the boundary."""
    # One end of a search is asked about several times.
    return _is_interior_in((D / (noise[:, None] * noise)).tobytes())


@lru_cache(maxsize=64)
def _is_interior_in(units: bytes) -> bool:
    """Return the same for D in units of the noise, (q, q)."""
    flat = np.frombuffer(units)
    if not np.isfinite(flat).all():
        return True  # nor anywhere else
    q = math.isqrt(len(flat))
    return bool(np.linalg.eigvalsh(flat.reshape(q, q))[0] > BOUNDARY**2)


def _step_off(
    solution: Solution,
    constraints: Constraints,
    terms: Sequence[TermColumns],
    problem: Problem,
    noise: np.ndarray,
    reml: bool,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Certify a boundary solution, or return a better start, D and theta.

    At a minimum over positive semidefinite ``D`` the gradient is positive semidefinite on D's null
    space (first-order optimality); where it is not, some variance wants to grow.
    """
    point = solution.point
    D, at, q = point.D, point.at, len(constraints.blocks)
    G = unpack_symmetric(at.gradient[:-1]) * (0.5 + 0.5 * np.eye(q))
    for term, blocks in free_terms(terms, constraints):
        if term.pattern is None:
            theta = grown(solution, constraints, term, problem, noise, reml)
            if theta is not None:
                return np.asarray(D), theta
            continue
        for block in blocks:
            inside = np.ix_(block, block)
            values, vectors = np.linalg.eigh(D[inside])
            size = float(np.min(noise[block]))
            null = vectors[:, values <= (BOUNDARY * size) ** 2]
            if not null.size:
                continue
            slopes, directions = np.linalg.eigh(null.T @ G[inside] @ null)
            if slopes[0] >= 0.0:
                continue
            v = np.zeros(q)
            v[block] = null @ directions[:, 0]
            change = np.outer(v, v)
            curvature = _curvatures(solution, constraints, problem, change[None], reml)[0]
            gain = slopes[0] ** 2 / (2.0 * curvature) if curvature > 0.0 else np.inf
            if gain > 1e-8:
                step = -slopes[0] / curvature if curvature > 0.0 else size**2
                return np.asarray(D + step * change), np.asarray(point.theta)
    return None


def _curvatures(
    solution: Solution,
    constraints: Constraints,
    problem: Problem,
    changes: np.ndarray,
    reml: bool,
) -> np.ndarray:
    """Return the criterion's second derivatives along ``changes (c, q, q)`` of D, (c,)."""
    point = solution.point
    if narrow(problem, constraints):
        return np.diag(hessian_along(problem, point, reml, changes))[:-1]
    packed = pack_triangle(np.moveaxis(changes, 0, -1))
    return np.einsum("ac,ab,bc->c", packed, point.at.hessian[:-1, :-1], packed, optimize=True)


def grown(
    solution: Solution,
    constraints: Constraints,
    term: TermColumns,
    problem: Problem,
    noise: np.ndarray,
    reml: bool = True,
) -> np.ndarray | None:
    """Return theta with a structure's variance grown from zero where that lowers the criterion.

    At variance zero the correlations have no slope, so a few of them are tried.
    """
    point, q, here = solution.point, len(constraints.blocks), term.columns
    part = next(p for p in constraints.structures if p.columns == (here.start, here.stop))
    at = slice(*part.parameters)
    size = float(np.min(noise[here]))
    if np.max(np.diag(point.D)[here]) > (BOUNDARY * size) ** 2:
        return None
    A = np.asarray(problem.z_factor)[here, here]
    variances = (size / np.diag(A)) ** 2
    base = part.covariance.start(variances)
    rng = np.random.default_rng(0)
    trials, changes = np.tile(base, (12, 1)), np.zeros((12, q, q))
    correlations = ~np.asarray(part.covariance.is_sd(term.width))
    for trial, theta in enumerate(trials):
        if trial:
            theta[correlations] = rng.normal(scale=1.5, size=int(np.sum(correlations)))
        matrix = matrix_at(part.covariance, theta, term.width)
        changes[trial, here, here] = A @ matrix @ A.T
    curvatures = _curvatures(solution, constraints, problem, changes, reml)
    best: tuple[float, np.ndarray] | None = None
    for theta, change, curvature in zip(trials, changes, curvatures, strict=True):
        slope = point.at.gradient[:-1] @ pack_triangle(change)
        gain = slope**2 / (2.0 * curvature) if curvature > 0.0 else np.inf
        if slope < 0.0 and gain > 1e-8 and (best is None or gain > best[0]):
            best = gain, theta
    if best is None:
        return None
    grown = np.array(point.theta)
    grown[at] = best[1]
    return grown


def _snap(
    point: Point, constraints: Constraints, terms: Sequence[TermColumns], noise: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Set directions at the boundary to exactly zero; return the root and the singular terms."""
    root = np.array(point.root)
    if _is_interior(point.D, noise):
        return root, ()
    singular = []
    for term, blocks in free_terms(terms, constraints):
        for block in blocks:
            size, inside = float(np.min(noise[block])), np.ix_(block, block)
            if term.pattern is None:
                zero = np.linalg.eigvalsh(point.D[inside]) <= (BOUNDARY * size) ** 2
                zero = zero[term.covariance.nullity(term.width) :]
            else:
                left, values, right = np.linalg.svd(root[inside])
                zero = values <= BOUNDARY * size
                if zero.any():
                    root[inside] = (left * np.where(zero, 0.0, values)) @ right
            if zero.any():
                singular.append(term.label)
    return root, tuple(dict.fromkeys(singular))
