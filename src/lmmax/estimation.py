"""From sufficient statistics to estimates: start, constraints, solve, certificate.

The solver works in coordinates where columns are orthonormal and the response has unit length.
This module is the one place that maps the user's quantities there and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import starts, zero_scale
from .compilation import Compiled
from .compilation_cache import compilation_cache
from .compress import Compression
from .compress.iterative import Rows
from .constraints import Settings, TermColumns, read_constraints, usual_log_scale
from .covariances import matrix_at, slopes
from .likelihood import Problem
from .parameters import factor, lower_from_root, pack_triangle, unpack_symmetric
from .solve import (
    NEWTON_LIMIT,
    TRACE_COLUMNS,
    TRACE_LENGTH,
    Constraints,
    Options,
    Point,
    Solution,
    Status,
    lbfgs,
    newton,
    point_of,
)

Solver = Callable[..., Solution]
MAX_STEPS = {"newton": 100, "lbfgs": 3000}
TOLERANCE, TOLERANCE_CROSSED = 1e-16, 1e-13
"""Newton decrements that count as converged; squared distances to the optimum in standard errors.
Where an evaluation takes seconds, one more for the eighth digit of them is too many."""
RESTARTS = 5
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
        ends: the criterion at each optimum that was found, ascending.
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
        q = len(self.working_root)
        k = q * (q + 1) // 2
        A = self.z_inverse
        moved = np.einsum("ai,ijr,bj->abr", A, unpack_symmetric(directions[:k]), A, optimize=True)
        return curvatures, np.concatenate([pack_triangle(moved), directions[k:]])

    @cached_property
    def _working_information(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the same with cov_re in working coordinates, whatever the covariates' origin.

        The observed information of the (restricted) likelihood in covariances and scale jointly,
        the coefficients profiled out.  In the coordinates of the root it also holds for singular
        covariances, given their rank.
        """
        point, q = self.solution.point, len(self.working_root)
        free = point.free > 0.0
        # What convergence left of the gradient outside D's null space would pass for curvature.
        G = unpack_symmetric(point.at.gradient[:-1]) * (0.5 + 0.5 * np.eye(q))
        G = G * self.constraints.blocks
        values, vectors = np.linalg.eigh(self.working_root @ self.working_root.T)
        null = vectors[:, values <= 1e-12 * values[-1]]
        left = G - null @ (null.T @ G @ null) @ null.T
        n_theta = len(point.theta)
        bend = np.pad(np.kron(2.0 * left, np.eye(q)), ((1, n_theta), (1, n_theta)))
        hessian = (point.hessian - bend)[np.ix_(free, free)]
        # Units in which a real curvature is about one; rounding errors are no curvature.
        size = np.maximum(np.max(point.root**2, axis=1, initial=0.0), self.noise**2)
        n_groups = self.noise**2 * point.at.hessian[-1, -1]
        few = np.min(n_groups)
        floor = np.concatenate(
            [[few], np.repeat(n_groups / size, q), few / np.maximum(point.theta**2, 1.0)]
        )
        floor = 1e-6 * floor[free]
        unit = np.sqrt(np.maximum(np.abs(np.diag(hessian)), floor))
        values, vectors = np.linalg.eigh(hessian / np.outer(unit, unit))

        # d(vech Psi, scale) / d(s, root, theta) for Psi = exp(s) y_scale^2 root root'.
        root = np.asarray(point.root)
        k = q * (q + 1) // 2
        jacobian = np.zeros((k + 1 + n_theta, len(free)))
        for entry, (i, j) in enumerate(np.ndindex(q, q)):
            half = np.zeros((q, q))
            half[i] = root[:, j]
            jacobian[:k, 1 + entry] = self.scale * pack_triangle(half + half.T)
        for part in self.constraints.structures:
            here, at = slice(*part.columns), slice(*part.parameters)
            slope = slopes(part.covariance, point.theta[at], here.stop - here.start)
            for j in range(at.start, at.stop):
                whole = np.zeros((q, q))
                z_factor = np.linalg.inv(self.z_inverse[here, here])
                natural = self.scale * slope[..., j - at.start]
                whole[here, here] = z_factor @ natural @ z_factor.T
                jacobian[:k, 1 + q * q + j] = pack_triangle(whole)
                jacobian[k + 1 + j, 1 + q * q + j] = 1.0
        jacobian[:k, 0] = self.scale * pack_triangle(point.D * (1.0 - self.constraints.held))
        jacobian[k, 0] = self.scale
        return 0.5 * values, (jacobian[:, free] / unit) @ vectors

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
        curved = curvatures > 1e-10 * np.max(curvatures, initial=0.0)
        curved &= self.n_free <= self.contrasts
        size = parts.sum(axis=1)
        flat = parts[:, ~curved].sum(axis=1) > 1e-12 * size
        variances = parts[:, curved] @ (1.0 / curvatures[curved])
        return np.sqrt(np.where(flat | (size == 0.0), np.nan, variances))

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

    def _covariance(self, curvatures: np.ndarray, directions: np.ndarray) -> np.ndarray:
        curved = curvatures > 1e-10 * np.max(curvatures, initial=0.0)
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
    compression: Compression, terms: Sequence[TermColumns], settings: Settings
) -> Estimates:
    """Solve a compressed model.

    Args:
        compression: sufficient statistics.
        terms: the random terms' places among the columns.
        settings: how to estimate.

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
        solver = "newton" if len(z_inverse) <= NEWTON_LIMIT else "lbfgs"

    D, s, theta = guess.D, guess.s, guess.theta
    variances = compression.start
    if not constraints.scale_free:
        # What the moments say is relative to their own scale, not to the one that is held.
        variances = variances * np.exp(usual_log_scale(problem) - s)
    if D is None:
        D = np.diag(variances) * constraints.blocks
    else:
        # A start is a hint: from absurdly large variances rounding hides the way down.
        D = D / max(1.0, np.max(np.diag(D)) / (1e4 * np.max(compression.start)))
    # EM moves what is in the root; of a model with structures only it has nothing to move.
    em_steps = settings.em_steps if constraints.rooted.any() else 0
    solve = partial(_solve, problem, settings, solver)

    def settle(
        constraints: Constraints, D: np.ndarray, s: float, theta: np.ndarray, **options: float
    ) -> Solution:
        """Solve, stepping off boundaries from which the criterion falls."""
        solution = solve(constraints, D, s, theta, **options)
        for _ in range(RESTARTS):
            interior = _is_interior(solution.point.D, noise)
            if solution.status != Status.CONVERGED or interior:
                break
            better = _step_off(solution, constraints, terms, problem, noise)
            if better is None:
                break
            solution = solve(constraints, better[0], float(solution.point.s), better[1])
        return solution

    # A structure may describe the data without a residual; the search would go on for ever.
    lowest = zero_scale.log_scale(float(problem.n_obs), zero_scale.LOOKED_AT)
    options = {"smallest_scale": lowest} if constraints.structures else {}

    def finish(D: np.ndarray, s: float, theta: np.ndarray, em_steps: int = 0) -> Solution:
        end = settle(constraints, D, s, theta, em_steps=em_steps, **options)
        return zero_scale.look_closer(problem, constraints, end, settle)

    if theta is not None or not constraints.structures:
        solution = finish(D, s, np.zeros(0) if theta is None else theta, em_steps)
        ends: tuple[float, ...] = (float(solution.point.at.value),)
    else:
        longest = min(settings.max_steps or starts.ROUGH_STEPS, starts.ROUGH_STEPS)
        rough = {"em_steps": em_steps, "max_steps": longest, "tol": starts.ROUGH_TOL, **options}
        solution, ends = starts.search(
            starts.structure_starts(constraints, z_inverse, variances),
            lambda theta: solve(constraints, D, s, theta, **rough),
            lambda end: finish(
                np.asarray(end.point.D), float(end.point.s), np.asarray(end.point.theta)
            ),
        )
    return _in_user_units(compression, terms, settings, constraints, solution, solver, ends)


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
        structure_theta=_canonical(constraints, theta),
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


def _flat(solver: Solver) -> Callable[..., jax.Array]:
    """Make a solver return one flat array: a transfer costs more than a small solve."""

    def solve(*arguments: Any) -> jax.Array:
        leaves = jax.tree.leaves(solver(*arguments))
        dtype = leaves[0].dtype
        return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])

    return solve


def _unflatten(flat: np.ndarray, problem: Problem, n_theta: int) -> Solution:
    """Undo the flattening of a record."""
    at = 0

    def take(*shape: int) -> Any:
        nonlocal at
        size = math.prod(shape)
        part = flat[at : at + size].reshape(shape)
        at += size
        return part

    return Solution(
        point=point_of(take, problem, n_theta),
        status=take(),
        steps=take(),
        decrement=take(),
        trace=take(TRACE_LENGTH, TRACE_COLUMNS),
    )


_compiled = {"newton": Compiled(_flat(newton)), "lbfgs": Compiled(_flat(lbfgs))}


def _solve(
    problem: Problem,
    settings: Settings,
    solver: str,
    constraints: Constraints,
    D: np.ndarray,
    s: float,
    theta: np.ndarray,
    **options: float,
) -> Solution:
    """Run the solver in float64 and return its record as NumPy arrays."""
    usual = {
        "em_steps": 0,
        "max_steps": settings.max_steps or MAX_STEPS[solver],
        "tol": tolerance(problem) if settings.tol is None else settings.tol,
    }
    chosen = Options(reml=float(settings.reml), **(usual | options))
    with jax.enable_x64(True), compilation_cache():
        flat = np.asarray(_compiled[solver](problem, constraints, chosen, D, float(s), theta))
    return _unflatten(flat, problem, len(theta))


def tolerance(problem: Problem) -> float:
    """Return the default tolerance: a tenth of a millionth of a standard error, or less."""
    return TOLERANCE_CROSSED if problem.effect_shapes else TOLERANCE


def group_noise(problem: Problem) -> np.ndarray:
    """Return the standard deviation, relative to the residual's, of one group's mean, (q,)."""
    return np.asarray(np.sqrt(np.asarray(problem.n_groups) / float(problem.n_obs)))


def _canonical(constraints: Constraints, theta: np.ndarray) -> np.ndarray:
    """Return theta with standard deviations that are not negative, where signs do not matter."""
    theta = theta.copy()
    for part in constraints.structures:
        at, q = slice(*part.parameters), part.columns[1] - part.columns[0]
        own = np.where(part.covariance.is_sd(q), np.abs(theta[at]), theta[at])
        before, after = (matrix_at(part.covariance, x, q) for x in (theta[at], own))
        if np.array_equal(before, after):
            theta[at] = own
    return theta


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
    return bool(np.linalg.eigvalsh(D / np.outer(noise, noise))[0] > BOUNDARY**2)


def _step_off(
    solution: Solution,
    constraints: Constraints,
    terms: Sequence[TermColumns],
    problem: Problem,
    noise: np.ndarray,
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
            theta = grown(solution, constraints, term, problem, noise)
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
            change = np.append(pack_triangle(np.outer(v, v)), 0.0)
            curvature = change @ at.hessian @ change
            gain = slopes[0] ** 2 / (2.0 * curvature) if curvature > 0.0 else np.inf
            if gain > 1e-8:
                step = -slopes[0] / curvature if curvature > 0.0 else size**2
                return np.asarray(D + step * np.outer(v, v)), np.asarray(point.theta)
    return None


def grown(
    solution: Solution,
    constraints: Constraints,
    term: TermColumns,
    problem: Problem,
    noise: np.ndarray,
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
    best: tuple[float, np.ndarray] | None = None
    for trial in range(12):
        theta = base.copy()
        is_sd = np.asarray(part.covariance.is_sd(term.width))
        if trial:
            theta[~is_sd] = rng.normal(scale=1.5, size=int(np.sum(~is_sd)))
        matrix = matrix_at(part.covariance, theta, term.width)
        whole = np.zeros((q, q))
        whole[here, here] = A @ matrix @ A.T
        change = np.append(pack_triangle(whole), 0.0)
        slope, curvature = point.at.gradient @ change, change @ point.at.hessian @ change
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
