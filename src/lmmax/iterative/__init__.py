"""Fit crossed factors too large for a dense factor, by Newton steps on estimated gradients.

Given a fixed set of probes, the estimate of the gradient in :mod:`lmmax.likelihood.iterative` is a
smooth function of the covariances, and the estimates are its root.  Steps use the average of
observed and expected information (Gilmour, Thompson and Cullis, 1995), which needs no traces, in
the coordinates of a root of D as in :mod:`lmmax.solve`.  The first steps make do with few probes;
then their number grows until the criterion is known to the error asked for.

The Monte Carlo error has two faces, both reported: that of the criterion at the estimates, and that
of the estimates, which are where another set of probes would not quite have put them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..compilation import computing
from ..compilation_cache import compilation_cache
from ..compress import EngineError
from ..compress.iterative import Rows
from ..constraints import Guess, Settings, TermColumns
from ..likelihood import Derivatives, Problem
from ..likelihood.problem import spread
from ..solve import TRACE_COLUMNS, TRACE_LENGTH, Constraints, Point, Solution, chart
from .model import Factor, join, prepare
from .moments import moments
from .newton import newton
from .solution import IterativeSolution, in_user_units

__all__ = ["IterativeSolution", "probed", "solve_iterative"]


def solve_iterative(
    factors: Sequence[Factor | tuple[np.ndarray, np.ndarray, int]],
    X: np.ndarray,
    y: np.ndarray,
    *,
    reml: bool = True,
    D0: Sequence[np.ndarray] | None = None,
    patterns: Sequence[np.ndarray] | None = None,
    seed: int = 0,
    target_error: float = 0.05,
    tol: float = 1e-5,
    max_steps: int = 50,
    max_probes: int = 4096,
) -> IterativeSolution:
    """Estimate a model with two or more crossed factors by matrix-free iterations.

    Args:
        factors: codes from 0 to n_levels - 1 (n,), design (n, q_f) and number of levels of each
            grouping factor, rows multiplied by the square roots of prior weights.
        X: fixed-effects design of full column rank, (n, p), preferably orthonormal.
        y: response, (n,), preferably its residual from X and of unit length.
        reml: whether to maximise the restricted likelihood.
        D0: starting values, (q_f, q_f) for each factor; moment estimates if None.
        patterns: 1 where an entry of each ``D_f`` is estimated, 0 where it is zero: all ones for
            an unstructured covariance, the identity for independent effects.  Unstructured if None.
        seed: of the probes: the same seed gives the same numbers.
        target_error: Monte Carlo standard error of the criterion at which no more probes are drawn.
        tol: Newton decrement, in units of the criterion, at which to stop.
        max_steps: most evaluations.
        max_probes: most probes, whatever error is reached.

    Returns:
        The estimates with their Monte Carlo errors.

    Raises:
        ValueError: if there are fewer than two factors.
    """
    if len(factors) < 2:
        raise ValueError("the iterative engine is for two or more grouping factors")
    with computing(), compilation_cache():
        parts = [Factor(*part) for part in factors]
        model = prepare(parts, np.asarray(X), np.asarray(y), reml, patterns, seed)
        D = moments(model) if D0 is None else join(model, D0)
        ended = newton(model, D, target_error, tol, max_steps, max_probes)
        return in_user_units(model, *ended)


def probed(
    problem: Problem,
    rows: Rows,
    constraints: Constraints,
    guess: Guess,
    settings: Settings,
    terms: Sequence[TermColumns],
) -> tuple[Solution, IterativeSolution]:
    """Estimate a model in working coordinates, with a record in the form of the other solvers'.

    The Hessian of the record is that of the average information, in place of the observed one.

    Raises:
        EngineError: for what this engine does not do.
    """
    if settings.fix or constraints.structures:
        what = "fix= argument" if settings.fix else "covariance structures"
        remedy = "use engine='crossed'"
        if settings.engine != "iterative":
            remedy = f"this model is too large for any other, so leave out the {what}"
        raise EngineError(f"engine='iterative' does not take {what}; {remedy}")
    factors = sorted({term.factor for term in terms})
    blocks = []
    for factor in factors:
        own = [term.columns for term in terms if term.factor == factor]
        blocks.append(slice(min(c.start for c in own), max(c.stop for c in own)))
    found = solve_iterative(
        rows.factors,
        rows.X,
        rows.y,
        reml=settings.reml,
        D0=None if guess.D is None else [guess.D[here, here] for here in blocks],
        patterns=[np.asarray(constraints.blocks)[here, here] for here in blocks],
        seed=settings.seed,
        max_steps=settings.max_steps or 50,
    )
    D = np.zeros_like(constraints.blocks)
    for here, block in zip(blocks, found.D, strict=True):
        D[here, here] = block
    with computing():
        point = _record(problem, constraints, found, blocks, D)
    trace = np.full((TRACE_LENGTH, TRACE_COLUMNS), np.nan)
    shown = found.trace[:TRACE_LENGTH]
    # Criterion, decrement, damping, accepted; and no EM steps.
    trace[: len(shown), :4] = shown[:, [0, 2, 3, 4]]
    trace[: len(shown), 4] = 0.0
    as_array: Any = np.asarray  # the record of a solve is in NumPy
    solution = Solution(
        point=point,
        status=as_array(int(found.status)),
        steps=as_array(found.steps),
        decrement=as_array(found.decrement),
        trace=as_array(trace),
    )
    return solution, found


def _record(
    problem: Problem,
    constraints: Constraints,
    found: IterativeSolution,
    blocks: Sequence[slice],
    D: np.ndarray,
) -> Point:
    """Return the solution as a point of the exact solvers."""
    own_at = Derivatives(
        value=jnp.asarray(found.criterion),
        gradient=jnp.append(found.gradient, 0.0),
        hessian=jnp.asarray(2.0 * found.information),
        log_scale=jnp.log(found.scale),
        beta=jnp.asarray(found.beta),
        beta_inverse=jnp.asarray(found.beta_unscaled),
        x_slope=jnp.asarray(found.slopes),
    )
    theta = jnp.zeros(0)
    at = spread(own_at, tuple(blocks), len(D))
    point = chart(problem, constraints, at, jnp.asarray(D), jnp.asarray(D), theta)
    none = np.zeros((1, 1, 0))
    effects = tuple((modes.T, none) for modes in found.modes)
    point = jax.tree.map(np.asarray, point._replace(at=point.at._replace(effects=())))
    return point._replace(at=point.at._replace(effects=effects))
