"""Minimise the criterion: a few EM steps, then damped Newton with the exact Hessian.

An iterate is the relative covariance ``D`` of the random effects, ``s``, the logarithm of the
residual scale, and ``theta``, the parameters of terms with a covariance structure.  A step moves
``s``, ``theta``, and a root ``R`` of ``D = R R'`` for all other terms, every entry unconstrained,
so that ``D`` stays positive semidefinite.  ``R`` is a Cholesky factor with pivoting, made anew at
every iterate: a variance near zero then owns a small last column.  With the rows in a fixed order
its correlations would be free to rotate, a curved valley that Newton follows slowly.

Profiling the scale means that each evaluation replaces ``s`` by its minimiser, where its gradient
is zero; the Newton step of the joint system is then the Newton step of the profiled criterion, so
one loop serves fits with the scale or covariances fixed as well.

The criterion is even in each column of ``R``: a zero column is a stationary point by symmetry.  The
loop steps off it when the curvature there is negative; otherwise a zero variance is a legitimate
minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .covariances import Covariance
from .em import em_step
from .likelihood import (
    Derivatives,
    Problem,
    degrees_of_freedom,
    derivatives,
    objective,
    profiled_log_scale,
    reduce,
)
from .linalg import gls, ldl, solve_unit_lower, solve_unit_upper, symmetrize
from .parameters import pack_triangle, unpack_lower, unpack_symmetric

TRACE_LENGTH, TRACE_COLUMNS = 64, 5
NEAR = 5.0
"""Newton decrement, about two standard errors squared, below which EM has nothing to add."""
VANISHING = 1e-9
"""Scale, relative to the variance of the response, below which there is hardly a residual."""
UNSEEN = 1e-6
"""Newton decrement that may be left where rounding in D hides any further decrease."""
SAME = 1e-7
"""Difference of the criterion up to which two ends of a search are the same."""
NEWTON_LIMIT = 22
"""Most random effects of a group (253 parameters) for which the exact Hessian pays; beyond it
L-BFGS is the default."""


class Status(IntEnum):
    """How a solve ended.

    ``ZERO_SCALE`` is a maximum at a residual variance of zero, see :mod:`lmmax.zero_scale`;
    ``INFINITE`` to ``TOO_FEW`` are responses of many that no solve was begun for.
    """

    RUNNING = 0
    CONVERGED = 1
    MAX_STEPS = 2
    STALLED = 3
    NOT_FINITE = 4
    UNBOUNDED = 5
    INFINITE = 6
    CONSTANT = 7
    EXPLAINED = 8
    TOO_FEW = 9
    ZERO_SCALE = 10


def is_optimal(status: Any) -> Any:
    """Return whether a solve found an optimum, for a status or an array of them."""
    return (status == Status.CONVERGED) | (status == Status.ZERO_SCALE)


class Structured(NamedTuple):
    """A term whose covariance is a function of few parameters; see :mod:`lmmax.covariances`.

    Attributes:
        covariance: the structure.
        columns: first and last (exclusive) of its columns of D.
        parameters: likewise of its entries of theta.
    """

    covariance: Covariance
    columns: tuple[int, int]
    parameters: tuple[int, int]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Constraints:
    """Which parameters move.

    Attributes:
        blocks: 1.0 where an entry of D belongs to a term, (q, q); on the diagonal only for
            terms with a structure.
        held: 1.0 where an entry belongs to a term whose natural covariance is fixed, (q, q).
        natural: the fixed natural covariances, zero elsewhere, (q, q).
        scale_free: whether the scale is estimated.
        profile: whether it is profiled out; False too where natural covariances are fixed.
        structures: the terms with a structure whose parameters are free.
    """

    blocks: Any
    held: Any
    natural: Any
    scale_free: Any
    profile: Any
    structures: tuple[Structured, ...] = field(default=(), metadata={"static": True})

    @property
    def n_theta(self) -> int:
        """Number of parameters of structures."""
        return self.structures[-1].parameters[1] if self.structures else 0

    @property
    def rooted(self) -> np.ndarray:
        """1.0 for each effect whose covariance is in the root, 0.0 in a structure, (q,)."""
        inside = np.ones(len(self.blocks))
        for part in self.structures:
            inside[slice(*part.columns)] = 0.0
        return inside

    @property
    def columns(self) -> np.ndarray:
        """Columns of D whose covariance is in the root."""
        return np.flatnonzero(self.rooted)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Options:
    """Options of the solve, all of them data: changing one does not recompile.

    Attributes:
        reml: 1.0 for the restricted criterion, 0.0 for the other.
        em_steps: most EM steps.
        max_steps: most steps after them.
        tol: Newton decrement that counts as converged.
        smallest_scale: logarithm of the scale below which Newton's method gives up; never below
            what rounding leaves of a residual.
    """

    reml: Any
    em_steps: Any
    max_steps: Any
    tol: Any
    smallest_scale: Any = -np.inf


class Point(NamedTuple):
    """An evaluated iterate.

    Attributes:
        s: logarithm of the scale.
        D: relative covariance, (q, q).
        theta: parameters of structures, (k,).
        root: pivoted Cholesky factor of D, zero where structures are, (q, q).
        pivot: 1.0 at each column's pivot in ``root``, (q, q).
        free: 1.0 for each of ``(s, root, theta)`` that moves, (q q + k + 1,); of a narrow model
            (see :func:`narrow`) the root has no more than the columns that are not in structures.
        at: the criterion's derivatives in D and s; of a narrow model those of second order are
            along the directions in which D moves with ``(s, root, theta)``.
        gradient: the same in ``(s, root, theta)``.
        hessian: likewise; the identity for what does not move.
    """

    s: Array
    D: Array
    theta: Array
    root: Array
    pivot: Array
    free: Array
    at: Derivatives
    gradient: Array
    hessian: Array


class Solution(NamedTuple):
    """The end of a solve, in working coordinates.

    Attributes:
        point: the last accepted iterate.
        status: a :class:`Status`.
        steps: evaluations of the criterion.
        decrement: ``g' H^-1 g``: how far, in units of the criterion, a Newton step still goes.
        trace: a row per evaluation: criterion, decrement, damping, whether it was accepted, and
            whether an EM step follows.
    """

    point: Point
    status: Any
    steps: Any
    decrement: Any
    trace: Any


def narrow(problem: Problem, constraints: Constraints) -> bool:
    """Return whether D, with many entries, moves along so few directions that they come first.

    The second derivatives are along these then, in place of all entries: that is what structures
    over many levels have few parameters for.
    """
    if not problem.contracts or not constraints.structures:
        return False
    q, r = len(problem.n_groups), len(constraints.columns)
    return r * r + constraints.n_theta < q * (q + 1) // 2


def root_columns(problem: Problem, constraints: Constraints) -> np.ndarray:
    """Return the columns whose roots are coordinates of the solver, r of them."""
    if narrow(problem, constraints):
        return constraints.columns
    return np.arange(len(problem.n_groups))


def continued(first: Solution, then: Solution) -> Solution:
    """Return the end of a solve that went on where another ended, with the record of both."""
    before, after = int(first.steps), int(then.steps)
    as_array: Any = np.asarray  # the records of solves are in NumPy
    rows = np.concatenate([first.trace[:before], then.trace[:after]])[:TRACE_LENGTH]
    trace = np.full((TRACE_LENGTH, TRACE_COLUMNS), np.nan)
    trace[: len(rows)] = rows
    return then._replace(trace=as_array(trace), steps=as_array(np.int32(before + after)))


def point_of(make: Callable[..., Any], problem: Problem, constraints: Constraints) -> Point:
    """Return a point whose fields are ``make(*shape)``, in order."""
    q, p = len(problem.n_groups), len(problem.beta_origin)
    n_theta = constraints.n_theta
    k = q * (q + 1) // 2
    x = len(root_columns(problem, constraints)) ** 2 + n_theta + 1
    c = x if narrow(problem, constraints) else k
    return Point(
        s=make(),
        D=make(q, q),
        theta=make(n_theta),
        root=make(q, q),
        pivot=make(q, q),
        free=make(x),
        at=Derivatives(
            value=make(),
            gradient=make(k + 1),
            hessian=make(c + 1, c + 1),
            log_scale=make(),
            beta=make(p),
            beta_inverse=make(p, p),
            x_slope=make(c, p, p),
            effects=tuple((make(r, m), make(r, r, m)) for r, m in problem.effect_shapes),
        ),
        gradient=make(x),
        hessian=make(x, x),
    )


def unstructured(q: int) -> Constraints:
    """Return the constraints of one correlated term, everything free and the scale profiled."""
    return Constraints(
        blocks=np.ones((q, q)),
        held=np.zeros((q, q)),
        natural=np.zeros((q, q)),
        scale_free=True,
        profile=True,
    )


def structured(problem: Problem, constraints: Constraints, theta: Array) -> Array:
    """Return the part of D, in working coordinates, that follows from theta, (q, q)."""
    A = jnp.asarray(problem.z_factor, theta.dtype)
    D = jnp.zeros_like(A)
    for part in constraints.structures:
        here = slice(*part.columns)
        q = here.stop - here.start
        matrix = part.covariance.matrix(theta[slice(*part.parameters)], q)
        D = D.at[here, here].set(A[here, here] @ matrix @ A[here, here].T)
    return D


def evaluate(
    problem: Problem,
    constraints: Constraints,
    reml: Array,
    D: Array,
    s: Array,
    theta: Array,
) -> Point:
    """Evaluate the criterion at ``D``, ``s`` and ``theta``, and prepare a step from there."""
    rooted, whole = whole_covariance(problem, constraints, D, s, theta)
    if narrow(problem, constraints):
        return _evaluate_narrow(problem, constraints, reml, rooted, whole, s, theta)
    at = derivatives(problem, whole, reml, s, constraints.profile)
    return chart(problem, constraints, at, rooted, whole, theta)


def _evaluate_narrow(
    problem: Problem,
    constraints: Constraints,
    reml: Array,
    D: Array,
    whole: Array,
    s: Array,
    theta: Array,
) -> Point:
    """Evaluate along the directions of the solver's coordinates; as :func:`chart` otherwise."""
    root, pivot, inside = pivoted_factor(D, constraints.blocks)
    columns = constraints.columns
    here, r, n_theta = np.ix_(columns, columns), len(columns), len(theta)
    held = jnp.asarray(constraints.held)
    free = jnp.concatenate(
        [
            jnp.asarray(constraints.scale_free, D.dtype)[None],
            (inside * (1.0 - jnp.diag(held))[:, None])[here].reshape(-1),
            jnp.ones(n_theta, D.dtype),
        ]
    )

    # D along (s, root, theta).
    half = jnp.einsum("ai,bj->ijab", np.eye(r), root[here])
    by_root = jnp.zeros((r * r, *D.shape), D.dtype)
    by_root = by_root.at[:, columns[:, None], columns].set(
        (half + jnp.swapaxes(half, 2, 3)).reshape(r * r, r, r)
    )
    structure = jax.jacfwd(lambda theta: structured(problem, constraints, theta))(theta)
    directions = jnp.concatenate([-(D * held)[None], by_root, jnp.moveaxis(structure, -1, 0)])
    at = derivatives(problem, whole, reml, s, constraints.profile, directions=directions)
    G = unpack_symmetric(at.gradient[:-1]) * (0.5 + 0.5 * np.eye(len(D)))
    bend = jnp.kron(2.0 * G[here], jnp.eye(r, dtype=D.dtype))
    bend = jnp.pad(bend, ((1, n_theta), (1, n_theta)))
    bend = bend.at[0, 0].set(jnp.sum(G * D * held))

    for part in constraints.structures:
        at_theta, own = slice(*part.parameters), slice(*part.columns)
        A = jnp.asarray(problem.z_factor, D.dtype)[own, own]
        curved = _curvature(part.covariance, A.T @ G[own, own] @ A, theta[at_theta])
        place = slice(1 + r * r + at_theta.start, 1 + r * r + at_theta.stop)
        bend = bend.at[place, place].set(curved)
    to = jnp.eye(len(free) + 1, len(free), dtype=D.dtype).at[-1, 0].set(1.0)
    hessian = (to.T @ at.hessian @ to + bend) * jnp.outer(free, free)
    gradient = jnp.einsum("ab,cab->c", G, directions).at[0].add(at.gradient[-1])
    return Point(
        s=at.log_scale,
        D=whole,
        theta=theta,
        root=root,
        pivot=pivot,
        free=free,
        at=at,
        gradient=gradient * free,
        hessian=hessian + jnp.diag(1.0 - free),
    )


def _curvature(covariance: Covariance, weights: Array, theta: Array) -> Array:
    """Return the second derivatives in theta (k,) of the sum of ``weights * D``, (k, k)."""

    def slope(unit: Array) -> Array:
        def along(theta: Array) -> Array:
            matrix = jax.jvp(lambda x: covariance.matrix(x, len(weights)), (theta,), (unit,))[1]
            return jnp.sum(weights * matrix)

        return jax.jacfwd(along)(theta)

    # One parameter after the other: those of D all at once may be large.
    return lax.map(slope, jnp.eye(len(theta), dtype=theta.dtype))


def whole_covariance(
    problem: Problem, constraints: Constraints, D: Array, s: Array, theta: Array
) -> tuple[Array, Array]:
    """Return D without and with the structures, what is held in its place."""
    held = jnp.asarray(constraints.held)
    rooted = jnp.asarray(constraints.rooted, D.dtype)
    D = jnp.where(held > 0.0, constraints.natural * jnp.exp(-s), D * jnp.outer(rooted, rooted))
    # A structure may have no parameters at all.
    return D, D + structured(problem, constraints, theta) if constraints.structures else D


def chart(
    problem: Problem,
    constraints: Constraints,
    at: Derivatives,
    D: Array,
    whole: Array,
    theta: Array,
) -> Point:
    """Return derivatives in the coordinates in which the solver steps.

    Args:
        problem: compressed data.
        constraints: what moves.
        at: the criterion's derivatives at ``whole``.
        D: relative covariance without the structures, (q, q).
        whole: relative covariance, (q, q).
        theta: parameters of structures.
    """
    q, n_theta = D.shape[0], len(theta)
    held = jnp.asarray(constraints.held)
    rooted = jnp.asarray(constraints.rooted, D.dtype)
    root, pivot, inside = pivoted_factor(D, constraints.blocks)
    movable = inside * ((1.0 - jnp.diag(held)) * rooted)[:, None]
    free = jnp.concatenate(
        [
            jnp.asarray(constraints.scale_free, D.dtype)[None],
            movable.reshape(-1),
            jnp.ones(n_theta, D.dtype),
        ]
    )

    # d(vech D, s) / d(s, root); natural covariances that are fixed shrink as the scale grows.
    row, column = _triangle_selectors(q)
    by_root = (
        row[:, :, None] * (column @ root)[:, None] + column[:, :, None] * (row @ root)[:, None]
    )
    by_scale = -pack_triangle(D * held)
    parts = [by_scale[:, None], by_root.reshape(-1, q * q)]
    G = unpack_symmetric(at.gradient[:-1]) * (0.5 + 0.5 * np.eye(q))
    bend = jnp.kron(2.0 * G, jnp.eye(q, dtype=D.dtype))
    bend = jnp.pad(bend, ((1, n_theta), (1, n_theta)))
    bend = bend.at[0, 0].set(-at.gradient[:-1] @ by_scale)
    if n_theta:

        def vech(theta: Array) -> Array:
            return jnp.asarray(pack_triangle(structured(problem, constraints, theta)))

        parts.append(jax.jacfwd(vech)(theta))
        curved = jax.jacfwd(jax.jacfwd(lambda theta: at.gradient[:-1] @ vech(theta)))(theta)
        bend = bend.at[-n_theta:, -n_theta:].set(curved)
    jacobian = jnp.concatenate(
        [jnp.concatenate(parts, axis=1), jnp.eye(1, q * q + n_theta + 1, dtype=D.dtype)]
    )
    hessian = (jacobian.T @ at.hessian @ jacobian + bend) * jnp.outer(free, free)
    return Point(
        s=at.log_scale,
        D=whole,
        theta=theta,
        root=root,
        pivot=pivot,
        free=free,
        at=at,
        gradient=(jacobian.T @ at.gradient) * free,
        hessian=hessian + jnp.diag(1.0 - free),
    )


def pivoted_factor(D: Array, blocks: Array) -> tuple[Array, Array, Array]:
    """Factor ``D = R R'`` by Cholesky with pivoting inside each term.

    Returns:
        ``R`` (q, q), whose j-th column belongs to the term of the j-th row; the pivots, one 1.0 in
        each column; and 1.0 where ``R`` may be other than zero.
    """
    q = D.shape[0]
    blocks = jnp.asarray(blocks, D.dtype)

    def eliminate(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        rest, left, root, pivot, inside = carry
        candidates = left * blocks[j]
        choice = jnp.argmax(jnp.where(candidates > 0.0, jnp.diag(rest), -jnp.inf))
        pick = (jnp.arange(q) == choice).astype(D.dtype)
        column, size = rest[choice], rest[choice, choice]
        column = jnp.where(size > 0.0, column * lax.rsqrt(jnp.where(size > 0.0, size, 1.0)), 0.0)
        return (
            rest - jnp.outer(column, column),
            left - pick,
            root.at[:, j].set(column * candidates),
            pivot.at[:, j].set(pick),
            inside.at[:, j].set(candidates),
        )

    zeros = jnp.zeros_like(D)
    start = (D, jnp.ones(q, D.dtype), zeros, zeros, zeros)
    _, _, root, pivot, inside = lax.fori_loop(0, q, eliminate, start)
    return root, pivot, inside


def _triangle_selectors(q: int) -> tuple[np.ndarray, np.ndarray]:
    """Return 0/1 matrices (k, q) that pick row and column of each entry of a lower triangle."""
    rows, columns = np.tril_indices(q)
    return np.eye(q)[rows], np.eye(q)[columns]


def newton_step(gradient: Array, hessian: Array, damping: Array) -> Array:
    """Return ``-(H + damping |diag H|)^-1 g``, with ``H`` modified to be a descent direction."""
    eps = jnp.finfo(hessian.dtype).eps
    diagonal = jnp.abs(jnp.diag(hessian))
    scale = jnp.sqrt(jnp.maximum(diagonal, eps * jnp.max(diagonal)))
    scaled = hessian / jnp.outer(scale, scale)
    L, d = ldl(scaled + damping * jnp.eye(len(scale), dtype=scale.dtype), floor=jnp.sqrt(eps))
    step = solve_unit_lower(L, -(gradient / scale)[:, None])
    return solve_unit_upper(L, step / d[:, None])[:, 0] / scale


def judge(
    gain: Array, predicted: Array, damping: Array, slack: Array, finite: Array, first: Array
) -> tuple[Array, Array]:
    """Return whether a trial is accepted, and the damping of the next step.

    Args:
        gain: how far the criterion fell.
        predicted: how far it should have fallen.
        damping: of the step to the trial.
        slack: rounding error of the criterion.
        finite: whether everything at the trial is.
        first: whether there is nothing to compare it with.
    """
    # Rounding may hide a small gain; where a large one was promised, the criterion must fall.
    enough = jnp.where(predicted > 10.0 * slack, slack, -slack)
    accept = finite & (first | (gain >= enough))
    good = accept & (gain >= 0.25 * predicted - slack)
    relaxed = jnp.where(damping < 1e-3, 0.0, 0.1 * damping)
    raised = jnp.where(accept, 2.0 * damping, jnp.maximum(8.0 * damping, 1e-2))
    return accept, jnp.where(good, relaxed, raised)


def bounded_step(
    gradient: Array, hessian: Array, damping: Array, size: Array
) -> tuple[Array, Array, Array]:
    """Return a Newton step, its decrement, and how far the criterion should fall.

    The step goes no further than ``size``, that of all parameters but the first, the logarithm of
    the scale; and just as far where the curvature is negative.
    """
    step = newton_step(gradient, hessian, damping)
    decrement = -(gradient @ step) * (1.0 + damping)
    length = jnp.maximum(jnp.sqrt(jnp.sum(step[1:] ** 2)), jnp.finfo(step.dtype).eps)
    limit = (1.0 + size) / (1.0 + 10.0 * damping)
    bent = step @ hessian @ step < 0.0
    step = step * jnp.where(bent, limit / length, jnp.minimum(1.0, limit / length))
    return step, decrement, -(gradient @ step) - 0.5 * step @ hessian @ step


class State(NamedTuple):
    """A solve by Newton's method under way.

    Attributes:
        evaluations: evaluations of the criterion so far.
        status: a :class:`Status`.
        point: the last accepted iterate.
        trial_D: where the criterion is evaluated next, (q, q).
        trial_s: likewise.
        trial_theta: likewise, (k,).
        predicted: how far the criterion should fall there.
        damping: of the step to there.
        decrement: of the last accepted iterate.
        trace: see :class:`Solution`; without rows, none is kept.
    """

    evaluations: Any
    status: Any
    point: Point
    trial_D: Any
    trial_s: Any
    trial_theta: Any
    predicted: Any
    damping: Any
    decrement: Any
    trace: Any


def newton(
    problem: Problem,
    constraints: Constraints,
    options: Options,
    D: Array,
    s: Array,
    theta: Array,
) -> Solution:
    """Minimise from ``D``, ``s`` and ``theta``; pure, and works under ``jit`` and ``vmap``.

    The body evaluates the criterion once, so the traced graph holds one copy of it.
    """
    reml = jnp.asarray(options.reml, D.dtype)

    def body(state: State) -> State:
        new = evaluate(problem, constraints, reml, state.trial_D, state.trial_s, state.trial_theta)
        return advance(problem, constraints, options, state, new)

    state = lax.while_loop(
        lambda state: state.status == Status.RUNNING,
        body,
        beginning(problem, constraints, D, s, theta, TRACE_LENGTH),
    )
    return Solution(
        point=state.point,
        status=state.status,
        steps=state.evaluations,
        decrement=state.decrement,
        trace=state.trace,
    )


class Starts(NamedTuple):
    """Where searches begin; as many as count, the others fill up.

    Attributes:
        D: relative covariances, (K, q, q).
        s: logarithms of the scale, (K,).
        theta: parameters of structures, (K, k).
        count: how many count.
        far: whether they are far from where the optimum is likely; see :func:`is_credible`.
    """

    D: Any
    s: Any
    theta: Any
    count: Any
    far: Any


class Best(NamedTuple):
    """The best of several searches.

    Attributes:
        solution: its end.
        values: the criterion where each search ended, (K,).
        statuses: a :class:`Status` each, (K,).
    """

    solution: Solution
    values: Array
    statuses: Array


def better(value: Any, converged: Any, other_value: Any, other_converged: Any, xp: Any = np) -> Any:
    """Return whether one end of a search is better than another, converged or not.

    A criterion without a minimum is a result too: a local one above it would hide that.  Of ends
    that are the same to rounding the first stands.
    """
    gain = other_value - value
    least = xp.where(converged & ~other_converged, -SAME, SAME)
    return (gain > least) | (xp.isfinite(value) & ~xp.isfinite(other_value))


def merit(solution: Solution) -> tuple[float, bool]:
    """Return what :func:`better` compares of the end of a search, on the host."""
    return float(solution.point.at.value), bool(is_optimal(int(solution.status)))


def is_credible(problem: Problem, status: Any, s: Any) -> Any:
    """Return whether an end of a search that began far away is what it seems.

    On its way to an optimum a search may stop at covariances so large that cross-products of
    crossed factors have no digits left there; other forms lose none, and see where a criterion has
    no minimum.

    Args:
        problem: the problem.
        status: how the search ended.
        s: logarithm of the scale where it did.
    """
    found = (status == Status.CONVERGED) | (status == Status.ZERO_SCALE)
    lost = (status == Status.STALLED) | (status == Status.MAX_STEPS)
    vanishing = lost & (s < np.log(VANISHING) - jnp.log(problem.n_obs))
    return found | (((status == Status.UNBOUNDED) | vanishing) & (not problem.costly))


def newton_from_each(
    problem: Problem, constraints: Constraints, options: Options, starts: Starts
) -> Best:
    """Minimise from each of several starts, one after the other, by :func:`newton`.

    The number of starts is data, so one compiled function serves for one as for many.
    """
    dtype, most = starts.D.dtype, starts.D.shape[0]

    def body(carry: tuple[Array, Best]) -> tuple[Array, Best]:
        i, best = carry
        new = newton(problem, constraints, options, starts.D[i], starts.s[i], starts.theta[i])
        old = best.solution
        wins = ~is_credible(problem, old.status, old.point.s) & starts.far | better(
            new.point.at.value,
            new.status == Status.CONVERGED,
            old.point.at.value,
            old.status == Status.CONVERGED,
            jnp,
        )
        wins = (i == 0) | (wins & (~starts.far | is_credible(problem, new.status, new.point.s)))
        return i + 1, Best(
            solution=lax.cond(wins, lambda: new, lambda: old),
            values=best.values.at[i].set(new.point.at.value),
            statuses=best.statuses.at[i].set(new.status),
        )

    none = Solution(
        point=point_of(lambda *shape: jnp.zeros(shape, dtype), problem, constraints),
        status=jnp.asarray(Status.RUNNING, jnp.int32),
        steps=jnp.asarray(0, jnp.int32),
        decrement=jnp.full((), jnp.inf, dtype),
        trace=jnp.full((TRACE_LENGTH, TRACE_COLUMNS), jnp.nan, dtype),
    )
    first = Best(none, jnp.full(most, jnp.nan, dtype), jnp.zeros(most, jnp.int32))
    _, best = lax.while_loop(lambda carry: carry[0] < starts.count, body, (jnp.int32(0), first))
    return best


def beginning(
    problem: Problem,
    constraints: Constraints,
    D: Array,
    s: Array,
    theta: Array,
    trace_length: int = 0,
) -> State:
    """Return the state of a solve that starts at ``D``, ``s`` and ``theta``."""
    dtype = D.dtype
    return State(
        evaluations=jnp.asarray(0, jnp.int32),
        status=jnp.asarray(Status.RUNNING, jnp.int32),
        point=point_of(lambda *shape: jnp.zeros(shape, dtype), problem, constraints),
        trial_D=D,
        trial_s=s,
        trial_theta=theta,
        predicted=jnp.zeros((), dtype),
        damping=jnp.zeros((), dtype),
        decrement=jnp.full((), jnp.inf, dtype),
        trace=jnp.full((trace_length, TRACE_COLUMNS), jnp.nan, dtype),
    )


def advance(
    problem: Problem, constraints: Constraints, options: Options, state: State, new: Point
) -> State:
    """Judge an evaluated trial and choose the next one.

    Args:
        problem: the problem, of which the data are not looked at.
        constraints: what moves.
        options: options of the solve.
        state: the solve so far.
        new: its trial, evaluated.
    """
    dtype, q = state.trial_D.dtype, state.trial_D.shape[0]
    eps = jnp.finfo(dtype).eps
    n_groups = jnp.asarray(problem.n_groups, dtype)
    # Rounding in the gradient grows with the number of observations.
    tol = jnp.maximum(options.tol, 10.0 * eps**2 * problem.n_obs)
    # Residuals a thousand roundings in size are none: the response has unit length.
    smallest_scale = jnp.maximum(
        options.smallest_scale, 2.0 * jnp.log(1e3 * eps) - jnp.log(problem.n_obs)
    )

    old = state.point
    first = state.evaluations == 0
    slack = 100.0 * eps * (jnp.abs(old.at.value) + problem.n_obs)
    visible = jnp.maximum(slack, UNSEEN)
    # That of D's entries counts where large ones hide a direction of small variance.
    whole = unpack_symmetric(old.at.gradient[:-1]) * (0.5 + 0.5 * np.eye(q))
    slack = slack + eps * jnp.sum(jnp.abs(whole * old.D))
    gain = old.at.value - new.at.value
    finite = jnp.isfinite(new.at.value) & jnp.all(jnp.isfinite(new.hessian))
    columns = root_columns(problem, constraints)
    here, r = np.ix_(columns, columns), len(columns)
    accept, damping = judge(gain, state.predicted, state.damping, slack, finite, first)
    point = jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)
    size = jnp.sqrt(jnp.sum(point.root**2) + jnp.sum(point.theta**2))
    step, decrement, predicted = bounded_step(point.gradient, point.hessian, damping, size)

    em = (state.evaluations < options.em_steps) & (decrement > NEAR)
    # Where rounding hides any further decrease, Newton has arrived if it has also stopped
    # getting closer.
    arrived = (decrement <= slack) & (decrement >= 0.25 * state.decrement)
    # Where D hides more than that, it has not arrived but lost its way.
    arrived &= decrement <= visible
    settled = accept & ~em & ((decrement <= tol) | arrived)
    # A stationary point by symmetry only: leave it along the pivots of negative curvature.
    curvature = jnp.diag(point.hessian)
    escape = jnp.asarray(curvature < -1e-6 * jnp.max(jnp.abs(curvature)), dtype)[1:]
    pivot = point.pivot if r == q else point.pivot[here]
    escape = escape.at[: r * r].multiply(pivot.reshape(-1))
    stuck = settled & jnp.any(escape > 0.0)
    bump = 0.1 * escape / (1.0 + 100.0 * damping)

    change = jnp.where(stuck, bump, step[1:])
    turn = change[: r * r].reshape(r, r)
    moved = point.root + turn if r == q else point.root.at[here].add(turn)
    G = unpack_symmetric(point.at.gradient[:-1]) * (0.5 + 0.5 * np.eye(q))
    expected = em_step(point.D, G, n_groups, constraints.blocks)

    evaluations = state.evaluations + 1
    outcomes = [
        (settled & ~stuck, Status.CONVERGED),
        (first & ~accept, Status.NOT_FINITE),
        ((point.s < smallest_scale) & constraints.scale_free, Status.UNBOUNDED),
        (damping > 1e12, Status.STALLED),
        (evaluations >= options.max_steps + options.em_steps, Status.MAX_STEPS),
    ]
    status = jnp.asarray(Status.RUNNING, jnp.int32)
    for happened, outcome in reversed(outcomes):
        status = jnp.where(happened, jnp.int32(outcome), status)
    trace = state.trace
    if len(trace):
        row = jnp.stack(
            [point.at.value, decrement, damping, accept.astype(dtype), em.astype(dtype)]
        )
        trace = trace.at[jnp.minimum(state.evaluations, len(trace) - 1)].set(row)
    return State(
        evaluations=evaluations,
        status=status,
        point=point,
        trial_D=jnp.where(em, expected, moved @ moved.T),
        trial_s=point.s + jnp.where(em | stuck, 0.0, step[0]),
        trial_theta=point.theta + jnp.where(em, 0.0, change[r * r :]),
        predicted=jnp.where(em | stuck, 0.0, predicted),
        damping=damping,
        decrement=decrement,
        trace=trace,
    )


def lbfgs_from(
    problem: Problem, constraints: Constraints, options: Options, starts: Starts
) -> Best:
    """Minimise from the only one of the starts by :func:`lbfgs`."""
    found = lbfgs(problem, constraints, options, starts.D[0], starts.s[0], starts.theta[0])
    return Best(found, found.point.at.value[None], found.status[None])


def lbfgs(
    problem: Problem,
    constraints: Constraints,
    options: Options,
    D: Array,
    s: Array,
    theta: Array,
) -> Solution:
    """Minimise by limited-memory BFGS; for models with hundreds of covariance parameters.

    The variables are ``s``, the lower Cholesky factor of ``D``, and ``theta``.  An iteration costs
    a few gradients, linear in the number of parameters.  The Hessian is evaluated once, at the end,
    for standard errors and the convergence record.
    """
    import optax  # here, since it is slow to import and seldom needed

    dtype = D.dtype
    reml = jnp.asarray(options.reml, dtype)
    d = degrees_of_freedom(problem, reml)
    held = jnp.asarray(constraints.held)
    rooted = jnp.asarray(constraints.rooted, dtype)
    inside = pack_triangle(constraints.blocks * (1.0 - held) * jnp.outer(rooted, rooted))
    k = len(inside)
    free = jnp.concatenate(
        [jnp.asarray(constraints.scale_free, dtype)[None], inside, jnp.ones(len(theta), dtype)]
    )

    def rooted_part(x: Array) -> Array:
        L = unpack_lower(x[1 : k + 1])
        return jnp.where(held > 0.0, constraints.natural * jnp.exp(-x[0]), L @ L.T)

    def covariance(x: Array) -> Array:
        return rooted_part(x) + structured(problem, constraints, x[k + 1 :])

    def value(x: Array) -> Array:
        x = jnp.where(free > 0.0, x, start)
        S, logdet = reduce(problem, covariance(x))
        s = jnp.where(constraints.profile, profiled_log_scale(gls(S)[2], d), x[0])
        return objective(S, logdet, s, d, reml) / problem.n_obs

    fixed = structured(problem, constraints, theta)

    def value_of(D: Array) -> Array:
        D = jnp.where(held > 0.0, constraints.natural * jnp.exp(-s), D)
        S, logdet = reduce(problem, D + fixed)
        at = jnp.where(constraints.profile, profiled_log_scale(gls(S)[2], d), s)
        return objective(S, logdet, at, d, reml)

    def expected(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        D, last = carry
        gradient = symmetrize(jax.grad(value_of)(D))
        # With effects far apart, rounding may leave D's small variances negative.
        D, gradient = jax.tree.map(
            lambda x, y: jnp.where(jnp.all(jnp.isfinite(gradient)), x, y),
            (D, gradient),
            (last, jnp.zeros_like(gradient)),
        )
        return em_step(D, gradient, jnp.asarray(problem.n_groups), constraints.blocks), D

    D = D * jnp.outer(rooted, rooted)
    D, last = lax.fori_loop(0, options.em_steps, expected, (D, D))
    D = jnp.where(jnp.isfinite(value_of(D)), D, last)
    L, pivots = ldl(D)
    start = jnp.concatenate([s[None], pack_triangle(L * jnp.sqrt(pivots)[None, :]), theta])
    method = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(value)
    tol = jnp.maximum(options.tol, 10.0 * jnp.finfo(dtype).eps ** 2 * problem.n_obs)
    limit = options.max_steps

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        x, state, steps, _, trace = carry
        f, gradient = value_and_grad(x, state=state)
        updates, state = method.update(gradient, state, x, value=f, grad=gradient, value_fn=value)
        decrement = -problem.n_obs * jnp.sum(gradient * updates)
        zero, one = jnp.zeros_like(f), jnp.ones_like(f)
        row = jnp.stack([f * problem.n_obs, decrement, zero, one, zero])
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
            jnp.full((TRACE_LENGTH, TRACE_COLUMNS), jnp.nan, dtype),
        ),
    )
    x = jnp.where(free > 0.0, x, start)
    point = evaluate(problem, constraints, reml, rooted_part(x), x[0], x[k + 1 :])
    # The line search can die on a plateau: the exact Newton step judges where it ended.
    step = newton_step(point.gradient, point.hessian, jnp.zeros((), dtype))
    decrement = jnp.maximum(jnp.abs(decrement), -(point.gradient @ step))
    status = jnp.where(decrement <= jnp.sqrt(tol), Status.CONVERGED, Status.MAX_STEPS)
    return Solution(
        point=point,
        status=jnp.where(jnp.isfinite(point.at.value), status, Status.NOT_FINITE).astype(jnp.int32),
        steps=steps + options.em_steps,
        decrement=decrement,
        trace=trace,
    )
