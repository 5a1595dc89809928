"""Minimise the criterion: a few EM steps, then damped Newton with the exact Hessian.

The variables are ``x = (s, theta)``: the logarithm of the residual scale and the lower triangle
(row by row) of the factor ``Lambda`` of the relative covariance ``D``, every entry unconstrained.
Profiling the scale means that each evaluation replaces ``s`` by its minimiser, where its gradient
is zero; the Newton step of the joint system is then the Newton step of the profiled criterion, so
one loop serves fits with the scale or covariances fixed as well.

The rows of ``Lambda`` are ordered by pivoting, largest remaining variance first, anew at every step.
A variance near zero then sits in the last rows, where its entries of ``Lambda`` are small too; with
the order as given, its correlations would be free to rotate, a curved valley that Newton follows
slowly.

The criterion is even in each column of ``Lambda``: a zero diagonal entry is a stationary point by
symmetry.  The loop steps off it when the curvature there is negative; otherwise a zero variance
is a legitimate minimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from .em import em_step, moment_start
from .likelihood.grouped import (
    Derivatives,
    GroupedProblem,
    degrees_of_freedom,
    derivatives,
    objective,
    profiled_log_scale,
    reduce,
)
from .linalg import gls, ldl, solve_unit_lower, solve_unit_upper
from .parameters import pack_triangle, triangle_order, unpack_lower, unpack_symmetric

TRACE_LENGTH = 64
NEWTON_LIMIT = 250
"""Most free parameters for which the exact Hessian pays; beyond it L-BFGS is the default."""


class Status(IntEnum):
    """How a solve ended."""

    RUNNING = 0
    CONVERGED = 1
    MAX_STEPS = 2
    STALLED = 3
    NOT_FINITE = 4
    UNBOUNDED = 5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Constraints:
    """Which parameters move.

    Attributes:
        free: 1.0 for each of ``x = (s, theta)`` that is estimated, else 0.0; (k + 1,).
        natural: 1.0 for entries of theta whose start is a factor of the *natural* covariance, held
            there while the scale moves; (k,).
        blocks: 1.0 where an entry of D belongs to a term, (q, q).
        profile: whether the scale is profiled out (False where it, or a natural covariance, is
            fixed).
    """

    free: Any
    natural: Any
    blocks: Any
    profile: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Options:
    """Options of the solve, all of them data: changing one does not recompile."""

    reml: Any
    em_steps: Any
    max_steps: Any
    tol: Any


class Solution(NamedTuple):
    """The end of a solve, in working coordinates.

    ``order`` (q, q) is the permutation matrix of the rows: ``D = order L L' order'`` with ``L`` the
    lower triangle in ``x``.
    ``trace`` has a row per evaluation: criterion, decrement, damping, whether accepted.
    ``decrement`` is ``g' H^-1 g``: how far, in units of the criterion, a Newton step still goes.
    """

    x: Array
    order: Array
    derivatives: Derivatives
    gradient: Array
    hessian: Array
    status: Array
    steps: Array
    decrement: Array
    trace: Array


def unstructured(q: int) -> Constraints:
    """Return the constraints of one correlated term, everything free and the scale profiled."""
    k = q * (q + 1) // 2
    return Constraints(
        free=np.ones(k + 1), natural=np.zeros(k), blocks=np.ones((q, q)), profile=True
    )


def default_start(problem: GroupedProblem, constraints: Constraints) -> Array:
    """Return ``x`` at the moment estimate of the relative covariance."""
    D = moment_start(problem)
    theta = pack_triangle(jnp.sqrt(D))
    return jnp.append(jnp.zeros(1, theta.dtype), theta * constraints.free[1:])


def relative_covariance(x: Array, natural: Array, order: Array) -> Array:
    """Return ``D`` (q, q) at ``x = (s, theta)``."""
    root = order @ unpack_lower(x[1:] * jnp.exp(-0.5 * x[0] * natural))
    return root @ root.T


class Evaluation(NamedTuple):
    """A point, its rows in pivot order, and the criterion's derivatives in D and in ``x``."""

    x: Array
    order: Array
    at: Derivatives
    gradient: Array
    hessian: Array


def evaluate(
    problem: GroupedProblem, constraints: Constraints, reml: Array, x: Array, order: Array
) -> Evaluation:
    """Evaluate at ``x``, profile the scale, and choose the order of rows for the next step."""
    D = relative_covariance(x, constraints.natural, order)
    at = derivatives(problem, D, reml, x[0], constraints.profile)
    x = x.at[0].set(at.log_scale)
    x, order = _pivoted(x, order, D, constraints)

    def coordinates(x: Array) -> Array:
        D = relative_covariance(x, constraints.natural, order)
        return jnp.append(pack_triangle(D), x[0])

    jacobian = jax.jacfwd(coordinates)(x)
    bend = jax.hessian(lambda x: at.gradient @ coordinates(x))(x)
    free = jnp.asarray(constraints.free, x.dtype)
    gradient = (jacobian.T @ at.gradient) * free
    hessian = jacobian.T @ at.hessian @ jacobian + bend
    hessian = hessian * jnp.outer(free, free) + jnp.diag(1.0 - free)
    return Evaluation(x, order, at, gradient, hessian)


def _pivoted(x: Array, order: Array, D: Array, constraints: Constraints) -> tuple[Array, Array]:
    """Return ``x`` and ``order`` with the rows of each estimated term in pivot order."""
    q = D.shape[0]
    if q == 1:
        return x, order
    diagonal = np.flatnonzero(pack_triangle(np.eye(q)))
    movable = jnp.asarray(constraints.free)[1:][diagonal] > 0.0
    # Rows trade places within their term; fixed terms keep theirs.
    allowed = jnp.where(movable[:, None], jnp.asarray(constraints.blocks) > 0.0, np.eye(q) > 0.0)

    def choose(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rest, left, new = carry
        candidates = jnp.where(allowed[j] & left, jnp.diag(rest), -jnp.inf)
        pick = jax.nn.one_hot(jnp.argmax(candidates), q, dtype=D.dtype)
        column = rest @ pick
        pivot = pick @ column
        positive = pivot > 0.0
        rest = rest - jnp.where(
            positive, jnp.outer(column, column) / jnp.where(positive, pivot, 1.0), 0.0
        )
        return rest, left & (pick == 0.0), new.at[:, j].set(pick)

    start = (D, jnp.ones(q, bool), jnp.zeros_like(D))
    _, _, new = lax.fori_loop(0, q, choose, start)
    same = jnp.all(new == order)  # factoring D again would cost half the digits of a small pivot
    theta = _free_factor(new.T @ D @ new, x, constraints)
    return jnp.where(same, x, x.at[1:].set(theta)), new


def _free_factor(D: Array, x: Array, constraints: Constraints) -> Array:
    """Return theta: the packed Cholesky factor of D in free entries, those of ``x`` elsewhere."""
    L, d = ldl(D)
    free = jnp.asarray(constraints.free)[1:] > 0.0
    return jnp.where(free, pack_triangle(L * jnp.sqrt(d)[None, :]), x[1:])


def newton_step(gradient: Array, hessian: Array, damping: Array) -> tuple[Array, Array]:
    """Return ``-(H + damping |diag H|)^-1 g``, a descent direction, and its predicted decrease."""
    eps = jnp.finfo(hessian.dtype).eps
    diagonal = jnp.abs(jnp.diag(hessian))
    scale = jnp.sqrt(jnp.maximum(diagonal, eps * jnp.max(diagonal)))
    scale = jnp.where(scale > 0.0, scale, 1.0)
    scaled = hessian / jnp.outer(scale, scale)
    damped = scaled + damping * jnp.eye(len(scale), dtype=scale.dtype)
    L, d = ldl(damped, floor=jnp.sqrt(eps))
    step = solve_unit_lower(L, -(gradient / scale)[:, None])
    step = solve_unit_upper(L, step / d[:, None])[:, 0]
    return step / scale, -jnp.sum(gradient / scale * step)


class _State(NamedTuple):
    evaluations: Array
    status: Array
    point: Evaluation
    trial: Array
    predicted: Array
    damping: Array
    decrement: Array
    trace: Array


def newton(
    problem: GroupedProblem, constraints: Constraints, options: Options, start: Array
) -> Solution:
    """Minimise from ``start``; pure, and works under ``jit`` and ``vmap``.

    The body evaluates the criterion once, so the traced graph holds one copy of it.
    """
    dtype = start.dtype
    eps = jnp.finfo(dtype).eps
    reml = jnp.asarray(options.reml, dtype)
    q = triangle_order(start.shape[0] - 1)
    diagonal = np.concatenate([[0.0], pack_triangle(np.eye(q))])
    n_groups = jnp.sum(jnp.asarray(problem.weight))
    # Rounding in the gradient grows with the number of observations.
    tol = jnp.maximum(options.tol, 10.0 * eps**2 * problem.n_obs)

    def body(state: _State) -> _State:
        first = state.evaluations == 0
        old = state.point
        new = evaluate(problem, constraints, reml, state.trial, old.order)
        slack = 100.0 * eps * (jnp.abs(old.at.value) + problem.n_obs)
        gain = old.at.value - new.at.value
        finite = jnp.isfinite(new.at.value) & jnp.all(jnp.isfinite(new.hessian))
        accept = finite & (first | (gain >= -slack))
        point = jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)
        x, _, at, gradient, hessian = point
        good = accept & (gain >= 0.25 * state.predicted - slack)
        relaxed = jnp.where(state.damping < 1e-3, 0.0, 0.1 * state.damping)
        damping = jnp.where(
            good,
            relaxed,
            jnp.where(accept, 2.0 * state.damping, jnp.maximum(8.0 * state.damping, 1e-2)),
        )

        step, _ = newton_step(gradient, hessian, damping)
        slope = -jnp.sum(gradient * step)
        decrement = slope * (1.0 + damping)
        theta_length = jnp.sqrt(jnp.sum(step[1:] ** 2))
        limit = 1.0 + jnp.sqrt(jnp.sum(x[1:] ** 2))
        shrink = jnp.minimum(1.0, limit / jnp.where(theta_length > 0.0, theta_length, 1.0))
        step = shrink * step
        predicted = -jnp.sum(gradient * step) - 0.5 * step @ hessian @ step

        em = state.evaluations < options.em_steps
        warm = _em_trial(point, constraints, n_groups)
        # Where rounding hides any further decrease, Newton has arrived if it has also stopped
        # getting closer.
        arrived = (decrement <= slack) & (decrement >= 0.25 * state.decrement)
        settled = accept & ~em & ((decrement <= tol) | arrived)
        # A stationary point by symmetry only: leave it along the columns with negative curvature.
        curvature = jnp.diag(hessian)
        escape = diagonal * constraints.free * (curvature < -1e-6 * jnp.max(jnp.abs(curvature)))
        stuck = settled & jnp.any(escape > 0.0)
        bump = 0.1 * escape / (1.0 + 100.0 * damping)

        evaluations = state.evaluations + 1
        exhausted = evaluations >= options.max_steps + options.em_steps
        status = jnp.where(
            settled & ~stuck,
            Status.CONVERGED,
            jnp.where(
                ~accept & first,
                Status.NOT_FINITE,
                jnp.where(
                    at.log_scale < jnp.log(eps) * 1.8 - jnp.log(problem.n_obs),
                    Status.UNBOUNDED,
                    jnp.where(
                        damping > 1e12,
                        Status.STALLED,
                        jnp.where(exhausted, Status.MAX_STEPS, Status.RUNNING),
                    ),
                ),
            ),
        )
        row = jnp.stack([at.value, decrement, damping, accept.astype(dtype)])
        trace = state.trace.at[jnp.minimum(state.evaluations, TRACE_LENGTH - 1)].set(row)
        return _State(
            evaluations=evaluations,
            status=status.astype(jnp.int32),
            point=point,
            trial=jnp.where(em, warm, x + jnp.where(stuck, bump, step)),
            predicted=jnp.where(em | stuck, 0.0, predicted),
            damping=damping,
            decrement=decrement,
            trace=trace,
        )

    order = jnp.eye(q, dtype=dtype)
    shapes = jax.eval_shape(
        lambda x, order: evaluate(problem, constraints, reml, x, order), start, order
    )
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    state = _State(
        evaluations=jnp.asarray(0, jnp.int32),
        status=jnp.asarray(Status.RUNNING, jnp.int32),
        point=blank._replace(x=start, order=order),
        trial=start,
        predicted=jnp.zeros((), dtype),
        damping=jnp.zeros((), dtype),
        decrement=jnp.full((), jnp.inf, dtype),
        trace=jnp.full((TRACE_LENGTH, 4), jnp.nan, dtype),
    )
    state = lax.while_loop(lambda state: state.status == Status.RUNNING, body, state)
    x, order, at, gradient, hessian = state.point
    return Solution(
        x=x,
        order=order,
        derivatives=at,
        gradient=gradient,
        hessian=hessian,
        status=state.status,
        steps=state.evaluations,
        decrement=state.decrement,
        trace=state.trace,
    )


def _em_trial(point: Evaluation, constraints: Constraints, n_groups: Array) -> Array:
    """Return ``x`` after one EM step; fixed entries stay."""
    x, order, at, _, _ = point
    q = constraints.blocks.shape[0]
    D = relative_covariance(x, constraints.natural, order)
    # A packed off-diagonal entry moves two entries of D, hence half of its derivative each.
    halves = 0.5 + 0.5 * np.eye(q)
    G = unpack_symmetric(at.gradient[:-1]) * halves
    D = em_step(D, G, n_groups, constraints.blocks)
    return x.at[1:].set(_free_factor(order.T @ D @ order, x, constraints))


def lbfgs(
    problem: GroupedProblem, constraints: Constraints, options: Options, start: Array
) -> Solution:
    """Minimise by limited-memory BFGS; for models with hundreds of covariance parameters.

    An iteration costs a few gradients, linear in the number of parameters.  The Hessian is
    evaluated once, at the end, for standard errors and the convergence record.
    """
    dtype = start.dtype
    eps = jnp.finfo(dtype).eps
    reml = jnp.asarray(options.reml, dtype)
    free = jnp.asarray(constraints.free, dtype)
    d = degrees_of_freedom(problem, reml)
    order = jnp.eye(len(constraints.blocks), dtype=dtype)

    def value(x: Array) -> Array:
        x = jnp.where(free > 0.0, x, start)
        S, logdet = reduce(problem, relative_covariance(x, constraints.natural, order))
        s = jnp.where(constraints.profile, profiled_log_scale(gls(S)[2], d), x[0])
        return objective(S, logdet, s, d, reml) / problem.n_obs

    method = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(value)
    tol = jnp.maximum(options.tol, 10.0 * eps**2 * problem.n_obs)
    limit = options.max_steps + options.em_steps

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        x, state, steps, _, trace = carry
        f, gradient = value_and_grad(x, state=state)
        updates, state = method.update(gradient, state, x, value=f, grad=gradient, value_fn=value)
        decrement = -problem.n_obs * jnp.sum(gradient * updates)
        row = jnp.stack([f * problem.n_obs, decrement, jnp.zeros_like(f), jnp.ones_like(f)])
        trace = trace.at[jnp.minimum(steps, TRACE_LENGTH - 1)].set(row.astype(dtype))
        return optax.apply_updates(x, updates), state, steps + 1, decrement, trace

    def unfinished(carry: tuple[Any, ...]) -> Array:
        _, _, steps, decrement, _ = carry
        return (steps < limit) & ~(jnp.abs(decrement) <= tol)

    x, _, steps, decrement, trace = lax.while_loop(
        unfinished,
        body,
        (
            start,
            method.init(start),
            jnp.asarray(0, jnp.int32),
            jnp.full((), jnp.inf, dtype),
            jnp.full((TRACE_LENGTH, 4), jnp.nan, dtype),
        ),
    )
    x = jnp.where(free > 0.0, x, start)
    x, order, at, gradient, hessian = evaluate(problem, constraints, reml, x, order)
    finite = jnp.isfinite(at.value)
    converged = jnp.abs(decrement) <= tol
    status = jnp.where(converged, Status.CONVERGED, Status.MAX_STEPS)
    return Solution(
        x=x,
        order=order,
        derivatives=at,
        gradient=gradient,
        hessian=hessian,
        status=jnp.where(finite, status, Status.NOT_FINITE).astype(jnp.int32),
        steps=steps,
        decrement=decrement,
        trace=trace,
    )
