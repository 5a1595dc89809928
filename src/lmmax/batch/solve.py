"""Many problems of one shape solved at once, each to its own optimum.

The problems are lanes: entries along a leading axis of those leaves in which they differ.  They
run through the solver of a single fit under ``vmap``, in chunks whose arrays stay in the
processor's cache.  A vectorised loop goes on until its last lane has finished; so a loop is a few
steps only, after which the lanes that are not done are gathered anew, in chunks of two sizes.
Problems that are solved by dense factors run one after the other instead, inside one compiled call.

What a single fit does besides, :func:`lmmax.estimation.estimate`, is done here over lanes: other
starts where the first one fails or a structure may have several optima, the certificate at the
boundary, and the way back to the user's units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import zero_scale
from ..constraints import Settings, TermColumns
from ..em import moment_start
from ..estimation import (
    BOUNDARY,
    MAX_STEPS,
    RESTARTS,
    free_terms,
    grown,
    tolerance,
)
from ..likelihood.crossed import CrossedProblem
from ..likelihood.nested import NestedProblem
from ..likelihood.shared import SharedProblem, derivatives_of_lanes
from ..optima import ROWS_PER_EFFECT, is_balanced, looks_again, spread_starts, work
from ..solve import (
    TRACE_COLUMNS,
    Constraints,
    Options,
    Point,
    State,
    Status,
    advance,
    better,
    chart,
    evaluate,
    is_credible,
    is_optimal,
    point_of,
    whole_covariance,
)
from ..starts import ROUGH_STEPS, ROUGH_TOL, is_hopeless, is_near, structure_starts
from .devices import OverLanes, n_devices, side_by_side

LANES = 256
"""Most lanes that run together."""
CHUNK_BYTES = 1 << 24
"""Most bytes of the data of lanes that run together."""
PARTS = 8
"""The lanes that do not fill a chunk run in chunks this many times smaller."""
FIRST_EM, FIRST_STEPS, NEXT_STEPS = 2, 3, 1
"""Steps that all lanes need, and steps after which those that are done leave.  EM is taken by those
only that are more than about two standard errors away, where Newton's steps overshoot."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lanes:
    """Problems of one shape.

    Attributes:
        problem: the problems, grouped or with shared designs; the leaves named in ``varying`` have
            a leading axis of n lanes.
        natural: fixed natural covariances in the units of each lane, (n, q, q).
        varying: names of the fields in which the problems differ.
    """

    problem: Any
    natural: Any
    varying: tuple[str, ...] = field(metadata={"static": True})

    def take(self, lanes: np.ndarray) -> Lanes:
        """Return some of the lanes."""
        parts = {name: self._of(name, lanes) for name in self.varying}
        return replace(self, problem=replace(self.problem, **parts), natural=self.natural[lanes])

    def one(self, lane: int) -> Any:
        """Return the problem of a lane."""
        return replace(self.problem, **{name: self._of(name, lane) for name in self.varying})

    def _of(self, name: str, lanes: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[lanes], getattr(self.problem, name))

    @property
    def noise(self) -> np.ndarray:
        """Standard deviation, relative to the residual's, of one average group's mean, (n, q)."""
        groups = np.asarray(self.problem.n_groups)
        found = np.sqrt(groups / self.values("n_obs")[:, None])
        return np.broadcast_to(found, (len(self.natural), groups.shape[-1]))

    def values(self, name: str) -> np.ndarray:
        """Return a field that is a number, for each lane, (n,)."""
        return np.broadcast_to(np.asarray(getattr(self.problem, name)), (len(self.natural),))


class Start(NamedTuple):
    """Where each lane starts: D (n, q, q), s (n,) and theta (n, k), in working coordinates."""

    D: np.ndarray
    s: np.ndarray
    theta: np.ndarray

    def take(self, lanes: np.ndarray) -> Start:
        """Return the starts of some lanes."""
        return Start(*(part[lanes] for part in self))


@dataclass
class Effort:
    """Evaluations of the criterion.

    Attributes:
        run: evaluations for which lanes were in a chunk, whether they needed them or not.
        needed: evaluations that they needed.
    """

    run: int = 0
    needed: int = 0


class Ends(NamedTuple):
    """Where each lane ended, in working coordinates; see :class:`lmmax.solve.Point`.

    ``gradient`` and ``hessian`` are those in the entries of D and s; ``x_slope`` has the
    derivatives of ``X'V^-1 X`` in the entries of D.
    """

    s: Any
    D: Any
    theta: Any
    root: Any
    value: Any
    gradient: Any
    hessian: Any
    beta: Any
    beta_inverse: Any
    x_slope: Any
    status: Any
    steps: Any
    decrement: Any

    def take(self, lanes: np.ndarray) -> Ends:
        """Return some of the ends."""
        return Ends(*(part[lanes] for part in self))

    def replaced(self, lanes: np.ndarray, new: Ends) -> None:
        """Put the ends of some lanes, of another solve, in their place."""
        for mine, part in zip(self, new, strict=True):
            mine[lanes] = part


@dataclass(frozen=True)
class BatchEstimates:
    """Estimates of one model for n responses, in the user's units.

    Every field has a leading axis of responses; the same record without it holds the estimates for
    one response.  Written with ``...`` for that axis, a function of one serves for the other.

    Attributes:
        params: coefficients, NaN for aliased columns, (n, p).
        bse: their standard errors, (n, p).
        cov_re: covariance of the random effects, (n, q, q).
        scale: residual variance, (n,).
        llf: log-likelihood, restricted under REML, (n,).
        status: a :class:`lmmax.solve.Status` each, (n,).
        singular: whether a covariance lies on the boundary, (n,).
    """

    params: np.ndarray
    bse: np.ndarray
    cov_re: np.ndarray
    scale: np.ndarray
    llf: np.ndarray
    status: np.ndarray
    singular: np.ndarray

    @property
    def sd(self) -> np.ndarray:
        """Standard deviations of the random effects, (n, q)."""
        return np.sqrt(np.einsum("...kk->...k", self.cov_re))

    @property
    def sigma(self) -> np.ndarray:
        """Residual standard deviation, (n,)."""
        return np.sqrt(self.scale)

    @property
    def corr(self) -> np.ndarray:
        """Correlations of the random effects, NaN with a variance of zero, (n, q, q)."""
        sd = self.sd
        size = sd[..., :, None] * sd[..., None, :]
        missing = np.full_like(size, np.nan)
        return np.divide(self.cov_re, size, out=missing, where=size > 0.0)

    @property
    def converged(self) -> np.ndarray:
        """Whether the optimum was reached, (n,)."""
        return np.asarray(is_optimal(self.status))

    def take(self, which: Any) -> BatchEstimates:
        """Return the estimates for some of the responses."""
        return BatchEstimates(**{name: part[which] for name, part in vars(self).items()})


def join(parts: Sequence[BatchEstimates]) -> BatchEstimates:
    """Return batches one after the other as one."""
    names = vars(parts[0])
    return BatchEstimates(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    )


def stack(singles: Sequence[BatchEstimates]) -> BatchEstimates:
    """Return estimates without a leading axis as a batch."""
    names = vars(singles[0])
    return BatchEstimates(
        **{name: np.stack([getattr(single, name) for single in singles]) for name in names}
    )


def solve(
    lanes: Lanes,
    constraints: Constraints,
    settings: Settings,
    terms: Sequence[TermColumns],
    start: Start | None,
    effort: Effort | None = None,
    others: Callable[[np.ndarray], list[Start]] | None = None,
) -> Ends:
    """Minimise the criterion of every lane, as a fit of its own would.

    Args:
        lanes: the problems.
        constraints: what is free in each; the fixed covariances are those of the lanes.
        settings: how to estimate.
        terms: the random terms.
        start: where to start; None for where a fit starts that has no other: by moments, and, with
            structures, which may have several optima, more than once.
        effort: counts the work, if given.
        others: returns the starts of some lanes where a fit has none; ``usual_starts`` if None.

    Returns:
        The ends; a lane that found no optimum says so in its status.
    """
    longest = settings.max_steps or MAX_STEPS["newton"]
    # EM does not know structures: of a model with nothing else it moves nothing.
    movable = bool(constraints.rooted.any())
    usual_em = settings.em_steps * movable
    everyone = np.arange(len(lanes.natural))
    effort = Effort() if effort is None else effort
    others = partial(usual_starts, lanes, constraints) if others is None else others
    # A structure may describe the data without a residual; the search would go on for ever.
    n_obs = float(np.max(lanes.values("n_obs")))
    stop = zero_scale.log_scale(n_obs, zero_scale.LOOKED_AT) if constraints.structures else -np.inf

    def run(
        start: Start, which: np.ndarray, constraints: Constraints = constraints, **options: Any
    ) -> Ends:
        chosen = {"max_steps": longest, **options}
        return _run(lanes, constraints, settings, start, which, effort, **chosen)

    def finish(start: Start, which: np.ndarray, em_steps: int = 0) -> Ends:
        """Solve some lanes as far as they go: off boundaries, and to a scale of zero."""
        own = lanes if np.array_equal(which, everyone) else lanes.take(which)
        ends = run(start, which, em_steps=em_steps, smallest_scale=stop)

        def again(start: Start, local: np.ndarray, *changed: Constraints) -> Ends:
            return run(start, which[local], *changed)

        _leave_boundary(own, constraints, terms, ends, again)
        _look_closer(own, constraints, ends, again)
        return ends

    if start is not None:
        ends = finish(start, everyone, FIRST_EM * movable)
    else:
        starts = others(everyone)
        if len(starts) == 1:
            ends = finish(starts[0], everyone, usual_em)
        else:
            rough: dict[str, Any] = {
                "em_steps": usual_em,
                "max_steps": min(longest, ROUGH_STEPS),
                "tol": ROUGH_TOL,
                "smallest_scale": stop,
            }
            ends = _best([run(other, everyone, **rough) for other in starts], finish)
    lost = np.flatnonzero(~is_optimal(ends.status))
    if lost.size:
        # From the usual starts; where these have failed, from the noise of an average group.
        squares = lanes.noise[lost, :, None] ** 2 * np.eye(len(constraints.blocks))
        again = starts_from(lanes, constraints, lost, squares) if start is None else others(lost)
        for other in again:
            _keep_better(ends, lost, finish(other, lost, usual_em))
    if settings.start is None:
        _search_further(lanes, constraints, terms, ends, finish)
    return ends


def _best(rough: list[Ends], finish: Callable[[Start, np.ndarray], Ends]) -> Ends:
    """Return the best ends that rough ones lead to; over lanes what a single fit does.

    Args:
        rough: where each start led to, see :func:`lmmax.starts.search`.
        finish: solves some lanes as far as they go.
    """
    heights = np.array([np.where(np.isfinite(end.value), end.value, np.inf) for end in rough])
    order = np.argsort(heights, axis=0, kind="stable")
    everyone = np.arange(heights.shape[1])

    def chosen(position: int) -> Ends:
        """Return the rough ends that come at this position, one for each lane."""
        parts = [np.stack(leaves)[order[position], everyone] for leaves in zip(*rough, strict=True)]
        return Ends(*parts)

    def start(ends: Ends) -> Start:
        return Start(ends.D, ends.s, ends.theta)

    best = finish(start(chosen(0)), everyone)
    known = [best.take(everyone)]
    for position in range(1, len(rough)):
        ends = chosen(position)
        left = ~is_hopeless(ends, best.value)
        for settled in known:
            left &= ~is_near(ends, settled)
        which = np.flatnonzero(left)
        if which.size:
            found = finish(start(ends.take(which)), which)
            _keep_better(best, which, found)
            known.append(known[0].take(everyone))
            known[-1].replaced(which, found)
    return best


def _search_further(
    lanes: Lanes,
    constraints: Constraints,
    terms: Sequence[TermColumns],
    ends: Ends,
    finish: Callable[[Start, np.ndarray], Ends],
) -> None:
    """Solve again, from elsewhere, lanes that may have another optimum."""
    noise, cost = lanes.noise, work(lanes.one(0))
    inside = (ends.status == Status.CONVERGED) & _interior(ends.D, noise)
    again = looks_again(ends.root, ends.hessian, inside, cost, constraints)
    effects = np.broadcast_to(np.sum(lanes.problem.n_groups, axis=-1), inside.shape)
    left = np.flatnonzero(again & (lanes.values("n_obs") < ROWS_PER_EFFECT * effects))
    if left.size:
        # Responses of one design are balanced together; models with designs of their own are not.
        own = left if "U" in lanes.varying else left[:1]
        balanced = np.array([is_balanced(lanes.one(lane), constraints) for lane in own])
        left = left[~np.broadcast_to(balanced, left.shape)]
    units = [block for _, blocks in free_terms(terms, constraints) for block in blocks]
    sizes = spread_starts(constraints, units, cost)
    if not left.size or not sizes:
        return
    # All together, the starts one after the other: a step of many lanes takes as long as of few.
    many = np.tile(left, len(sizes))
    variances = noise[many] ** 2 * np.repeat(sizes, len(left), axis=0)
    D = variances[:, :, None] * np.eye(variances.shape[1])
    found = finish(Start(D, np.log(0.5 / lanes.values("n_obs")[many]), ends.theta[many]), many)
    for first in range(0, len(many), len(left)):
        own_ends = Ends(*(part[first : first + len(left)] for part in found))
        believed = np.flatnonzero(is_credible(lanes.one(0), own_ends.status, own_ends.s))
        _keep_better(ends, left[believed], own_ends.take(believed))


def _leave_boundary(
    lanes: Lanes,
    constraints: Constraints,
    terms: Sequence[TermColumns],
    ends: Ends,
    run: Callable[[Start, np.ndarray], Ends],
) -> None:
    """Solve lanes again that stopped at a boundary where the criterion falls inwards."""
    noise = lanes.noise
    left = np.flatnonzero(ends.status == Status.CONVERGED)
    for _ in range(RESTARTS):
        inside = _interior(ends.D[left], noise[left])
        left = left[~inside & (ends.status[left] == Status.CONVERGED)]
        if not left.size:
            break
        moved, start = _step_off(lanes, constraints, terms, ends, left, noise[left])
        left, start = left[moved], start.take(moved)
        if left.size:
            ends.replaced(left, run(start, left))


def _look_closer(
    lanes: Lanes, constraints: Constraints, ends: Ends, run: Callable[..., Ends]
) -> None:
    """Replace the ends of lanes that were heading for a scale of zero by what is there.

    Over lanes what :func:`lmmax.zero_scale.look_closer` does.
    """
    if not constraints.scale_free:
        return
    n_obs = lanes.values("n_obs")
    with np.errstate(over="ignore", invalid="ignore"):
        share = np.exp(ends.s) * n_obs
        bend = zero_scale.curvature(ends)
    which = np.flatnonzero(zero_scale.is_suspicious(share, bend, ends.status))
    if not which.size:
        return
    fixed = zero_scale.held(constraints)

    def at(share: float, ends: Ends, which: np.ndarray) -> Ends:
        parts = [
            zero_scale.moved(constraints, point, zero_scale.log_scale(n, share))
            for point, n in zip(_points(ends), n_obs[which], strict=True)
        ]
        return run(Start(*map(np.stack, zip(*parts, strict=True))), which, fixed)

    mine = ends.take(which)
    probe = at(zero_scale.PROBED, mine, which)
    likely = np.flatnonzero(zero_scale.is_likely(probe.status, zero_scale.slope(probe)))
    found = np.zeros(which.size, dtype=bool)
    if likely.size:
        limit = at(zero_scale.LIMIT, probe.take(likely), which[likely])
        rise = zero_scale.slope(limit)
        there = zero_scale.is_limit(limit, rise, ends.take(which[likely]))
        limit.status[there] = Status.ZERO_SCALE
        # The limit at a scale of zero, to second order.
        limit.value[there] -= rise[there]
        found[likely[there]] = True
        ends.replaced(which[likely[there]], limit.take(there))
    left = which[~found & zero_scale.was_stopped(mine.status, share[which])]
    if left.size:
        ends.replaced(left, run(Start(ends.D[left], ends.s[left], ends.theta[left]), left))


def _points(ends: Ends) -> Iterator[Any]:
    """Yield where each lane ended, in the shape of a point."""
    for D, s, theta in zip(ends.D, ends.s, ends.theta, strict=True):
        yield SimpleNamespace(D=D, s=s, theta=theta)


def _interior(D: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return for each lane whether no direction of the random effects is at the boundary, (n,)."""
    if D.shape[1] == 1:
        return np.asarray(D[:, 0, 0] > (BOUNDARY * noise[:, 0]) ** 2)
    size = noise[:, :, None] * noise[:, None, :]
    return np.asarray(np.linalg.eigvalsh(D / size)[:, 0] > BOUNDARY**2)


def usual_starts(lanes: Lanes, constraints: Constraints, which: np.ndarray) -> list[Start]:
    """Return where a fit without an earlier one starts, for some lanes; several with structures."""
    data = lanes.take(which).problem
    data = data.by_group() if isinstance(data, SharedProblem) else data
    return starts_from(lanes, constraints, which, moment_start(data))


def starts_from(
    lanes: Lanes, constraints: Constraints, which: np.ndarray, D: np.ndarray
) -> list[Start]:
    """Return the starts of some lanes from rough relative covariances, (n, q, q) or (q, q)."""
    q = len(constraints.blocks)
    D = np.broadcast_to(D, (len(which), q, q))
    inverses = np.broadcast_to(np.asarray(lanes.take(which).problem.z_inverse), D.shape)
    if constraints.structures:
        thetas = [
            structure_starts(constraints, inverse, np.diag(own))
            for inverse, own in zip(inverses, D, strict=True)
        ]
    else:
        thetas = [[np.zeros(0)]] * len(which)
    s = np.log(0.5 / lanes.values("n_obs")[which])
    return [
        Start(D * constraints.blocks, s, np.stack(theta)) for theta in zip(*thetas, strict=True)
    ]


def _keep_better(ends: Ends, which: np.ndarray, new: Ends) -> None:
    """Replace the ends of lanes whose new end is better, as for a single fit."""
    mine, yours = is_optimal(ends.status[which]), is_optimal(new.status)
    won = np.flatnonzero(better(new.value, yours, ends.value[which], mine))
    ends.replaced(which[won], new.take(won))


# --- running ------------------------------------------------------------------------------------


def _beginning(lanes: Lanes, constraints: Constraints, start: Start) -> State:
    """Return the state of every lane at its start, NumPy arrays."""
    n = len(start.theta)
    point = point_of(lambda *shape: np.zeros((n, *shape)), lanes.one(0), constraints)
    return State(
        evaluations=np.zeros(n, np.int32),
        status=np.full(n, Status.RUNNING, np.int32),
        point=_without_effects(point),
        trial_D=np.array(start.D),
        trial_s=np.array(start.s),
        trial_theta=np.array(start.theta),
        predicted=np.zeros(n),
        damping=np.zeros(n),
        decrement=np.full(n, np.inf),
        trace=np.zeros((n, 0, TRACE_COLUMNS)),
    )


def _without_effects(point: Point) -> Point:
    """Leave out the conditional effects, which nobody asks lanes for."""
    return point._replace(at=point.at._replace(effects=()))


def _steps(
    lanes: Lanes, constraints: Constraints, options: Options, state: State, most: Any
) -> State:
    """Take some steps of the solver on every lane that has not finished."""
    if isinstance(lanes.problem, CrossedProblem):
        return _in_turn(lanes, constraints, options, state)
    axes: Any = jax.tree.map(lambda _: None, lanes.problem)
    axes = replace(axes, **dict.fromkeys(lanes.varying, 0))

    def own(natural: Any) -> Constraints:
        return replace(constraints, natural=natural)

    def evaluated(problem: Any, natural: Any, D: Any, s: Any, theta: Any) -> Point:
        return evaluate(problem, own(natural), options.reml, D, s, theta)

    def evaluated_together(problem: Any, natural: Any, D: Any, s: Any, theta: Any) -> Point:
        def whole_of(natural: Any, D: Any, s: Any, theta: Any) -> Any:
            return whole_covariance(problem, own(natural), D, s, theta)

        def chart_of(natural: Any, at: Any, rooted: Any, whole: Any, theta: Any) -> Point:
            return chart(problem, own(natural), at, rooted, whole, theta)

        rooted, whole = jax.vmap(whole_of)(natural, D, s, theta)
        at = derivatives_of_lanes(problem, whole, options.reml, s, constraints.profile)
        return jax.vmap(chart_of)(natural, at, rooted, whole, theta)

    shared = isinstance(lanes.problem, SharedProblem)
    look = evaluated_together if shared else jax.vmap(evaluated, (axes, 0, 0, 0, 0))
    go_on = jax.vmap(
        lambda problem, natural, *rest: advance(problem, own(natural), options, *rest),
        (axes, 0, 0, 0),
    )

    def body(carry: tuple[Any, State]) -> tuple[Any, State]:
        taken, state = carry
        new = look(lanes.problem, lanes.natural, state.trial_D, state.trial_s, state.trial_theta)
        after = go_on(lanes.problem, lanes.natural, state, new)
        running = state.status == Status.RUNNING

        def choose(a: Any, b: Any) -> Any:
            return jnp.where(running.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        return taken + 1, jax.tree.map(choose, after, state)

    def unfinished(carry: tuple[Any, State]) -> Any:
        return (carry[0] < most) & jnp.any(carry[1].status == Status.RUNNING)

    _, state = lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state))
    return state


def _in_turn(lanes: Lanes, constraints: Constraints, options: Options, state: State) -> State:
    """Run the solver on one lane after the other.

    Batches of dense factors are slow on a CPU, where they may also hang.
    """

    def to_end(own: Any) -> State:
        parts, natural, state = own
        problem = replace(lanes.problem, **parts)
        mine = replace(constraints, natural=natural)

        def body(state: State) -> State:
            trial = state.trial_D, state.trial_s, state.trial_theta
            new = _without_effects(evaluate(problem, mine, options.reml, *trial))
            return advance(problem, mine, options, state, new)

        return lax.while_loop(lambda state: state.status == Status.RUNNING, body, state)

    parts = {name: jnp.asarray(getattr(lanes.problem, name)) for name in lanes.varying}
    return lax.map(to_end, (parts, lanes.natural, state))


def _axes(lanes: Lanes, *_: Any) -> tuple[Any, ...]:
    """Return where the arguments of `_steps` have an axis of lanes."""
    problem = jax.tree.map(lambda _: -1, lanes.problem)
    problem = replace(problem, **dict.fromkeys(lanes.varying, 0))
    return replace(lanes, problem=problem, natural=0), -1, -1, 0, -1


_compiled = OverLanes(_steps, _axes)


def chunk_size(lanes: Lanes) -> int:
    """Return how many lanes run together on a device."""
    problem = lanes.problem
    if isinstance(problem, SharedProblem):
        # Weights of the value and its slopes; some arrays of that size for intermediates.
        _, c, q, m = problem.y.shape
        k = q * (q + 1) // 2
        numbers = 2 * (k + 1) * (k * problem.U.shape[2] + c * q * m)
        if problem.exchanged is not None:
            numbers += 4 * math.prod(problem.exchanged.Y.shape[1:])
    elif isinstance(problem, NestedProblem):
        # And as much for each pair of entries of D, whose second derivatives are taken in turn.
        k = sum(size * (size + 1) // 2 for size in (b - a for a, b in problem.blocks))
        numbers = math.prod(problem.Y.shape[1:]) + math.prod(problem.C.shape[1:])
        numbers *= 1 + k * (k + 1) // 2
    elif isinstance(problem, CrossedProblem):
        # One at a time: only what goes back and forth counts.
        numbers = sum(math.prod(getattr(problem, name).shape[1:]) for name in lanes.varying)
    else:
        q, width, m = np.shape(problem.Y)[-3:]
        numbers = q * (q + width) * m
    fitting = CHUNK_BYTES // (8 * numbers)
    return int(min(LANES, 1 << max(fitting.bit_length() - 1, 0)))


def _chunks(left: np.ndarray, size: int, small: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield lanes in chunks of two sizes, with how many of each chunk count.

    The last one is filled up with its first lane.
    """
    first = 0
    while first < len(left):
        length = size if len(left) - first > size - small else small
        chunk = left[first : first + length]
        yield len(chunk), np.append(chunk, np.full(length - len(chunk), chunk[0]))
        first += length


def _run(
    lanes: Lanes,
    constraints: Constraints,
    settings: Settings,
    start: Start,
    which: np.ndarray,
    effort: Effort,
    **options: Any,
) -> Ends:
    """Run the solver in float64 on some lanes, chunk by chunk; the arrays returned are NumPy's."""
    usual = {
        "em_steps": 0,
        "tol": tolerance(lanes.problem) if settings.tol is None else settings.tol,
    }
    chosen = Options(reml=float(settings.reml), **(usual | options))
    size, in_turn = chunk_size(lanes), isinstance(lanes.problem, CrossedProblem)
    small = max(1, size // PARTS) * n_devices()
    size *= n_devices()
    state = _beginning(lanes, constraints, start)
    leaves, structure = jax.tree.flatten(state)
    left, most = np.arange(len(which)), np.int32(FIRST_STEPS)

    def run(local: np.ndarray) -> list[Any]:
        own = jax.tree.unflatten(structure, [leaf[local] for leaf in leaves])
        # What fills a chunk up has no work to do.
        own.status[1:][local[1:] == local[0]] = Status.STALLED
        return jax.tree.leaves(_compiled(lanes.take(which[local]), constraints, chosen, own, most))

    while left.size:
        counts, chunks = zip(*_chunks(left, size, small), strict=True)
        for count, local, new in zip(counts, chunks, side_by_side(run, chunks), strict=True):
            local = local[:count]
            taken = new[0][:count] - leaves[0][local]
            effort.run += int(taken.sum() if in_turn else taken.max() * len(new[0]))
            effort.needed += int(taken.sum())
            for leaf, part in zip(leaves, new, strict=True):
                leaf[local] = part[:count]
        left = left[state.status[left] == Status.RUNNING]
        most = np.int32(NEXT_STEPS)
    point = state.point
    return Ends(
        s=point.s,
        D=point.D,
        theta=point.theta,
        root=point.root,
        value=point.at.value,
        gradient=point.at.gradient,
        hessian=point.at.hessian,
        beta=point.at.beta,
        beta_inverse=point.at.beta_inverse,
        x_slope=point.at.x_slope,
        status=state.status,
        steps=state.evaluations,
        decrement=state.decrement,
    )


# --- the boundary -------------------------------------------------------------------------------


def _step_off(
    lanes: Lanes,
    constraints: Constraints,
    terms: Sequence[TermColumns],
    ends: Ends,
    which: np.ndarray,
    noise: np.ndarray,
) -> tuple[np.ndarray, Start]:
    """Certify boundary solutions, or find better starts; over lanes what a single fit does.

    At a minimum over positive semidefinite D the gradient is positive semidefinite on D's null
    space; where it is not, some variance wants to grow.

    Returns:
        Whether each of the lanes must go on, (n,), and starts for all of them.
    """
    n, q = len(which), len(constraints.blocks)
    D, theta = ends.D[which].copy(), ends.theta[which].copy()
    moved = np.zeros(n, dtype=bool)
    rows, columns = np.tril_indices(q)
    G = np.zeros((n, q, q))
    G[:, rows, columns] = ends.gradient[which, :-1]
    G = 0.5 * (G + G.transpose(0, 2, 1))
    hessian = ends.hessian[which, :-1, :-1]
    for term, blocks in free_terms(terms, constraints):
        if term.pattern is None:
            for i in np.flatnonzero(~moved):
                problem = lanes.one(which[i])
                larger = grown(_record(ends, which[i]), constraints, term, problem, noise[i])
                if larger is not None:
                    theta[i], moved[i] = larger, True
            continue
        for block in blocks:
            rows_in, columns_in = np.ix_(block, block)
            values, vectors = np.linalg.eigh(ends.D[which][:, rows_in, columns_in])
            size = np.min(noise[:, block], axis=1)
            null = values <= (BOUNDARY * size[:, None]) ** 2
            basis = vectors * null[:, None, :]
            onto = basis @ basis.transpose(0, 2, 1)
            inner = onto @ G[:, rows_in, columns_in] @ onto
            # Outside the null space far above anything inside it.
            far = 1.0 + 2.0 * np.linalg.norm(inner, axis=(1, 2))
            slopes, directions = np.linalg.eigh(
                inner + far[:, None, None] * (np.eye(onto.shape[1]) - onto)
            )
            v = np.zeros((n, q))
            v[:, block] = directions[:, :, 0]
            outer = v[:, :, None] * v[:, None, :]
            change = outer[:, rows, columns]
            curvature = np.einsum("na,nab,nb->n", change, hessian, change)
            slope = slopes[:, 0]
            bent = curvature > 0.0
            safe = np.where(bent, curvature, 1.0)
            gain = np.where(bent, slope**2 / (2.0 * safe), np.inf)
            step = np.where(bent, -slope / safe, size**2)
            go = ~moved & null.any(axis=1) & (slope < 0.0) & (gain > 1e-8)
            D[go] += step[go, None, None] * outer[go]
            moved |= go
    return moved, Start(D, ends.s[which], theta)


def _record(ends: Ends, lane: int) -> Any:
    """Return a lane's end in the shape of a single solve's."""
    at = SimpleNamespace(gradient=ends.gradient[lane], hessian=ends.hessian[lane])
    point = SimpleNamespace(D=ends.D[lane], theta=ends.theta[lane], at=at)
    return SimpleNamespace(point=point)


def snapped(
    ends: Ends, constraints: Constraints, terms: Sequence[TermColumns], noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Set directions at the boundary to exactly zero; return D (n, q, q) and what is singular."""
    D, singular = ends.D.copy(), np.zeros(len(ends.s), dtype=bool)
    near = np.flatnonzero(~_interior(ends.D, noise) & np.isfinite(ends.value))
    if not near.size:
        return D, singular
    root, flagged = ends.root[near].copy(), np.zeros(near.size, dtype=bool)
    for term, blocks in free_terms(terms, constraints):
        for block in blocks:
            size, (i, j) = np.min(noise[near][:, block], axis=1)[:, None], np.ix_(block, block)
            if term.pattern is None:
                values = np.linalg.eigvalsh(ends.D[near][:, i, j])
                values = values[:, term.covariance.nullity(term.width) :]
                flagged |= np.any(values <= (BOUNDARY * size) ** 2, axis=1)
                continue
            left, values, right = np.linalg.svd(root[:, i, j])
            zero = values <= BOUNDARY * size
            kept = (left * np.where(zero, 0.0, values)[:, None, :]) @ right
            some = np.asarray(zero.any(axis=1))
            root[:, i, j] = np.where(some[:, None, None], kept, root[:, i, j])
            flagged |= some
    # Structures, and what is held, are no part of the root.
    rooted = np.outer(constraints.rooted, constraints.rooted) * (1.0 - constraints.held)
    D[near] = np.where(rooted > 0.0, root @ root.transpose(0, 2, 1), D[near])
    singular[near] = flagged
    return D, singular


# --- in the user's units ------------------------------------------------------------------------


def in_user_units(
    lanes: Lanes,
    constraints: Constraints,
    settings: Settings,
    terms: Sequence[TermColumns],
    ends: Ends,
    origin: np.ndarray,
    y_scale: np.ndarray,
    kept: np.ndarray,
    n_columns: int,
    total: np.ndarray | float = 1.0,
) -> BatchEstimates:
    """Map the ends of a solve to the user's units.

    Args:
        lanes: the problems.
        constraints: what was free.
        settings: how they were estimated.
        terms: the random terms.
        ends: the ends.
        origin: coefficients already taken out of the responses (working coordinates, units of the
            data), (n, p).
        y_scale: units of the data per unit of the working response, (n,).
        kept: positions of the columns of X that were kept, (p,).
        n_columns: their number before that.
        total: sum of squares of the working responses relative to that of the data, (n,).
    """
    problem, n, p = lanes.problem, len(ends.s), len(kept)
    n_obs = lanes.values("n_obs")
    status = ends.status.copy()
    if constraints.scale_free:
        rounding = (10.0 * np.finfo(float).eps) ** 2 / (total * n_obs)
        status[np.exp(ends.s) <= rounding] = Status.UNBOUNDED
    scale = np.exp(ends.s) * y_scale**2
    fixed = (settings.fix or {}).get("scale")
    if fixed is not None:
        scale = np.full(n, float(fixed))
    D, singular = snapped(ends, constraints, terms, lanes.noise)
    z_inverse = np.asarray(problem.z_inverse)
    cov_re = scale[:, None, None] * (z_inverse @ D @ np.swapaxes(z_inverse, -1, -2))
    R_inverse = np.asarray(problem.x_inverse)[..., :p, :p]
    params = np.full((n, n_columns), np.nan)
    working = ends.beta[:, :p] * y_scale[:, None] + origin
    params[:, kept] = np.einsum("...ij,...j->...i", R_inverse, working)
    half = np.sum((R_inverse @ ends.beta_inverse[:, :p, :p]) * R_inverse, axis=-1)
    bse = np.full((n, n_columns), np.nan)
    bse[:, kept] = np.sqrt(scale[:, None] * half)
    d = n_obs - settings.reml * p
    constant = 2.0 * (d * np.log(y_scale) + settings.reml * lanes.values("x_logdet"))
    criterion = ends.value + constant - lanes.values("log_weights")
    at_zero = status == Status.ZERO_SCALE
    scale = np.where(at_zero, 0.0, scale)
    singular |= at_zero
    return BatchEstimates(params, bse, cov_re, scale, -0.5 * criterion, status, singular)
