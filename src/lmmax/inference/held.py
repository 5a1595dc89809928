"""Minimise the criterion with one quantity held: a point of a likelihood profile.

The criterion is a function of the relative covariance D of the random effects and of ``s``, the
logarithm of the scale.  A :class:`Chart` says how they follow from variables ``x`` without
constraints and from ``v``, a coordinate of the quantity that is held::

    D = e^(o - s) (B R R' B' + N) + A S(theta) A',       x = (s, entries of R, theta)

with N what the fit held anyway, and S the covariance structures.  ``R`` is a root of the *natural*
covariance, relative to the scale ``e^o`` of the fit, in axes ``B`` in which the held effects come
first:

* a standard deviation is held through the length of a row of R,
* a correlation through the angle between two rows, ``(a, 0, ...)`` and ``b (sin v, cos v, ...)``,
  whose lengths are squares, ``a = x^2``, so that no sign can turn the correlation round,
* the scale through s,
* a parameter of a structure, if its value follows from one entry of theta, through that entry,
* a coefficient through the residual sum of squares, see :class:`lmmax.likelihood.Hold`.

Rows of R are pivoted: a variance near zero owns a small last column (see :mod:`lmmax.solve`).  All
of this is data, so that one compiled function serves every parameter of a model, many at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..compilation import Compiled, computing
from ..compilation_cache import compilation_cache
from ..likelihood import Hold, Problem, derivatives
from ..parameters import pack_triangle, unpack_symmetric
from ..solve import Constraints, Status, bounded_step, judge, narrow, structured

MAX_STEPS = 30
"""Most steps in one chart: where these do not do, another chart will do better."""
TOLERANCE = 1e-12
"""Newton decrement, in units of -2 log-likelihood, that counts as converged."""
FORGIVEN = 1e-8
"""Largest decrement of a search that can get no further and still counts as converged."""
LANES = 16
"""Searches side by side: one number for all calls, so that they share compiled code."""
LANES_BYTES = 5e4
"""Most bytes of data that searches are run side by side for; beyond, one after the other is
quicker, and takes less memory."""


class Chart(NamedTuple):
    """How D and s follow from the variables; k entries of R, t of theta.

    Attributes:
        axes: ``B``, (q, q).
        place: which of the variables each entry of R is, k for none, (q, q).
        square: 1.0 where it is the square of the variable, (k,).
        sine: 1.0 where it is multiplied by ``sin v``, (q, q).
        cosine: likewise by ``cos v``, (q, q).
        length: 1.0 for a row whose length is v, (q,).
        scale: 1.0 if s is v.
        theta: 1.0 for the entry that is ``v e^(kappa (o - s))``, (t,).
        kappa: power of the scale in it: the value that is held is a natural one.
        origin: ``o``.
        contrast: of the coefficients (working coordinates) that is held, (p,).
        centre: its value at v = 0.
        unit: what v = 1 adds to it.
        free: 1.0 for each of ``(s, R, theta)`` that moves, (1 + k + t,).
    """

    axes: Any
    place: Any
    square: Any
    sine: Any
    cosine: Any
    length: Any
    scale: Any
    theta: Any
    kappa: Any
    origin: Any
    contrast: Any
    centre: Any
    unit: Any
    free: Any


class Held(NamedTuple):
    """The end of a search.

    Attributes:
        value: the criterion, without the constants of the user's units.
        slope: its derivative in v, everything else at its minimiser.
        status: a :class:`lmmax.solve.Status`.
        steps: evaluations.
        decrement: how far, in units of the criterion, a Newton step would still go.
        s: logarithm of the scale.
        root: ``B R``, (q, q).
        theta: parameters of structures, (t,).
        beta: coefficients, working coordinates, (p,).
    """

    value: Any
    slope: Any
    status: Any
    steps: Any
    decrement: Any
    s: Any
    root: Any
    theta: Any
    beta: Any


def decode(chart: Chart, x: Array, v: Array) -> tuple[Array, Array, Array]:
    """Return ``s``, ``B R`` (q, q) and theta."""
    k = len(chart.square)
    s = jnp.where(chart.scale > 0.0, v, x[0])
    z = jnp.where(chart.square > 0.0, x[1 : k + 1] ** 2, x[1 : k + 1])
    R = jnp.append(z, 0.0)[chart.place]
    R = R * jnp.where(chart.sine > 0.0, jnp.sin(v), 1.0)
    R = R * jnp.where(chart.cosine > 0.0, jnp.cos(v), 1.0)
    square = jnp.where(chart.length > 0.0, jnp.sum(R**2, axis=1), 1.0)
    R = R * jnp.where(chart.length > 0.0, v * lax.rsqrt(square), 1.0)[:, None]
    held = v * jnp.exp(chart.kappa * (chart.origin - s))
    theta = jnp.where(chart.theta > 0.0, held, x[k + 1 :])
    return s, chart.axes @ R, theta


def covariance(
    problem: Problem, constraints: Constraints, chart: Chart, x: Array, v: Array
) -> Array:
    """Return the lower triangle of D, working coordinates, and s: (q (q + 1) / 2 + 1,)."""
    s, root, theta = decode(chart, x, v)
    D = jnp.exp(chart.origin - s) * (root @ root.T)
    D = jnp.where(constraints.held > 0.0, constraints.natural * jnp.exp(-s), D)
    if len(theta):
        D = D + structured(problem, constraints, theta)
    return jnp.append(pack_triangle(D), s)


class _Point(NamedTuple):
    x: Array
    value: Array
    slope: Array
    beta: Array
    gradient: Array
    hessian: Array


def _evaluate(
    problem: Problem, constraints: Constraints, reml: Array, chart: Chart, x: Array, v: Array
) -> _Point:
    """Evaluate the criterion and its derivatives in x, by the chain rule from those in D and s."""

    def at_x(x: Array) -> Array:
        return covariance(problem, constraints, chart, x, v)

    q = len(chart.axes)
    here = at_x(x)
    rows, columns = np.tril_indices(q)
    D = jnp.zeros((q, q), here.dtype).at[rows, columns].set(here[:-1])
    D = D.at[columns, rows].set(here[:-1])

    jacobian = jax.jacfwd(at_x)(x)
    directions: tuple[Array, ...] = ()
    if narrow(problem, constraints):
        directions = (jnp.moveaxis(unpack_symmetric(jacobian[:-1]), -1, 0),)

    def criterion(value: Array) -> Any:
        hold = Hold(chart.contrast, value)
        no = jnp.asarray(False)
        at = derivatives(problem, D, reml, here[-1], no, hold, *directions)
        return at.value, at

    # Along the value of a coefficient only what follows the reduction of the data has a tangent.
    value = chart.centre + chart.unit * v
    _, by_value, at = jax.jvp(criterion, (value,), (chart.unit,), has_aux=True)
    by_v = jax.jacfwd(lambda v: covariance(problem, constraints, chart, x, v))(v)
    along = jacobian
    if directions:
        along = jnp.concatenate([jnp.eye(len(x), dtype=x.dtype), jacobian[-1:]])
    bend = jax.jacfwd(jax.jacfwd(lambda x: at.gradient @ at_x(x)))(x)
    hessian = (along.T @ at.hessian @ along + bend) * jnp.outer(chart.free, chart.free)
    return _Point(
        x=x,
        value=at.value,
        slope=by_value + at.gradient @ by_v,
        beta=at.beta,
        gradient=(jacobian.T @ at.gradient) * chart.free,
        hessian=hessian + jnp.diag(1.0 - chart.free),
    )


class _State(NamedTuple):
    evaluations: Array
    status: Array
    point: _Point
    trial: Array
    predicted: Array
    damping: Array
    decrement: Array


def minimise(
    problem: Problem, constraints: Constraints, reml: Array, chart: Chart, x: Array, v: Array
) -> Held:
    """Minimise over x at held v by damped Newton from x; pure, works under ``jit`` and ``vmap``.

    As :func:`lmmax.solve.newton`, without its EM steps: the start is close.
    """
    eps = jnp.finfo(x.dtype).eps
    tol = jnp.maximum(TOLERANCE, 10.0 * eps**2 * problem.n_obs)

    def body(state: _State) -> _State:
        old = state.point
        first = state.evaluations == 0
        new = _evaluate(problem, constraints, reml, chart, state.trial, v)
        slack = 100.0 * eps * (jnp.abs(old.value) + problem.n_obs)
        gain = old.value - new.value
        finite = jnp.isfinite(new.value) & jnp.all(jnp.isfinite(new.hessian))
        accept, damping = judge(gain, state.predicted, state.damping, slack, finite, first)
        point = jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)
        size = jnp.sqrt(jnp.sum(point.x[1:] ** 2))
        step, decrement, predicted = bounded_step(point.gradient, point.hessian, damping, size)

        arrived = (decrement <= slack) & (decrement >= 0.25 * state.decrement)
        settled = accept & ((decrement <= tol) | arrived)
        # A stationary point by symmetry only: leave it where the curvature is negative.
        curvature = jnp.diag(point.hessian) * chart.free
        escape = (curvature < -1e-6 * jnp.max(jnp.abs(curvature))).astype(x.dtype).at[0].set(0.0)
        stuck = settled & jnp.any(escape > 0.0)
        step = jnp.where(stuck, 0.1 * escape / (1.0 + 100.0 * damping), step)

        evaluations = state.evaluations + 1
        spent = (damping > 1e12) | (evaluations >= MAX_STEPS)
        nearly = spent & (decrement <= FORGIVEN)
        outcomes = [
            ((settled & ~stuck) | nearly, Status.CONVERGED),
            (first & ~accept, Status.NOT_FINITE),
            (damping > 1e12, Status.STALLED),
            (spent, Status.MAX_STEPS),
        ]
        status = jnp.asarray(Status.RUNNING, jnp.int32)
        for happened, outcome in reversed(outcomes):
            status = jnp.where(happened, jnp.int32(outcome), status)
        return _State(
            evaluations=evaluations,
            status=status,
            point=point,
            trial=point.x + step,
            predicted=jnp.where(stuck, 0.0, predicted),
            damping=damping,
            decrement=decrement,
        )

    zero = jnp.zeros((), x.dtype)
    p, size = len(chart.contrast), len(x)
    start = _Point(
        x, zero, zero, jnp.zeros(p, x.dtype), jnp.zeros_like(x), jnp.zeros((size, size), x.dtype)
    )
    state = _State(
        evaluations=jnp.asarray(0, jnp.int32),
        status=jnp.asarray(Status.RUNNING, jnp.int32),
        point=start,
        trial=x,
        predicted=zero,
        damping=zero,
        decrement=jnp.full((), jnp.inf, x.dtype),
    )
    state = lax.while_loop(lambda state: state.status == Status.RUNNING, body, state)
    s, root, theta = decode(chart, state.point.x, v)
    return Held(
        value=state.point.value,
        slope=state.point.slope,
        status=state.status,
        steps=state.evaluations,
        decrement=state.decrement,
        s=s,
        root=root,
        theta=theta,
        beta=state.point.beta,
    )


def _flat(
    problem: Problem, constraints: Constraints, reml: Array, chart: Chart, x: Array, v: Array
) -> Array:
    """Run :func:`minimise` and return one flat array: a transfer costs more than a search."""
    leaves = minimise(problem, constraints, reml, chart, x, v)
    return jnp.concatenate([jnp.ravel(leaf).astype(x.dtype) for leaf in leaves])


def _side_by_side(
    problem: Problem, constraints: Constraints, reml: Array, chart: Chart, x: Array, v: Array
) -> Array:
    one = jax.vmap(_flat, in_axes=(None, None, None, 0, 0, 0))
    return one(problem, constraints, reml, chart, x, v)


_compiled = {"one": Compiled(_flat), "many": Compiled(_side_by_side)}


class Searches:
    """Constrained searches on one problem, in double precision.

    Args:
        problem: compressed data.
        constraints: what the fit held, and its structures.
        reml: whether the criterion is the restricted one.
    """

    def __init__(self, problem: Problem, constraints: Constraints, reml: bool) -> None:
        leaves = jax.tree.leaves(problem)
        # A batched Cholesky factor is slow on CPU, and may hang (see lmmax.linalg); the expansion
        # of nested factors takes longer to compile for many than it would save.
        plain = len(problem.slices) == 1 and not problem.effect_shapes
        self._many = plain and sum(map(np.size, leaves)) * 8 <= LANES_BYTES
        self._reml = float(reml)
        with computing():
            # Once, not at every call.
            self._problem, self._constraints = jax.tree.map(jnp.asarray, (problem, constraints))

    def run(self, charts: list[Chart], x: np.ndarray, v: np.ndarray) -> list[Held]:
        """Minimise for each chart from ``x (lanes, 1 + k + t)`` at held ``v (lanes,)``."""
        if not charts:
            return []
        data = (self._problem, self._constraints, self._reml)
        with computing(), compilation_cache():
            rows: list[np.ndarray] = []
            if not self._many:
                for i, chart in enumerate(charts):
                    rows.append(np.asarray(_compiled["one"](*data, chart, x[i], float(v[i]))))
            else:
                for first in range(0, len(charts), LANES):
                    take = [*range(first, min(first + LANES, len(charts)))]
                    take += [first] * (LANES - len(take))
                    stacked = Chart(*map(np.stack, zip(*(charts[i] for i in take), strict=True)))
                    rows += list(np.asarray(_compiled["many"](*data, stacked, x[take], v[take])))
        q, t = len(charts[0].axes), len(charts[0].theta)
        return [_unflatten(row, q, t) for row in rows[: len(charts)]]


def compiled_count() -> int:
    """Return how many executables have been compiled, one for each set of shapes."""
    return sum(function.count() for function in _compiled.values())


def _unflatten(row: np.ndarray, q: int, t: int) -> Held:
    """Undo the flattening of a record."""
    value, slope, status, steps, decrement, s = row[:6].tolist()
    root, theta, beta = np.split(row[6:], [q * q, q * q + t])
    return Held(
        value, slope, Status(int(status)), int(steps), decrement, s, root.reshape(q, q), theta, beta
    )
