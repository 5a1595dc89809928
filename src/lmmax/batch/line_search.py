"""The minima of many functions on a half-line: Newton's method from the best of a grid.

Each lane has a function of d >= 0, given by its values on one grid for all and by its derivatives
where they are asked for.  The best cell of the grid brackets the search, which therefore finds the
least of several minima, and does not depend on a start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

STEPS = 60
"""Most steps of a search."""
DECREMENT = 1e-16
"""Newton decrement that counts as converged, as for a single fit."""


def minimise(evaluate: Callable[[Array], Any], grid: Array, values: Array) -> Any:
    """Return where each lane's function is least.

    Args:
        evaluate: returns what is known at places (n,): a named tuple of arrays with a leading axis
            of lanes, among them the place ``d``, the derivatives ``slope`` and ``bend``, and
            ``steps`` and ``converged``, which the search fills in.
        grid: places to try, ascending from zero, (G,).
        values: the functions there, (n, G).

    Returns:
        What is known at the minima; not converged where they are beyond the grid.
    """
    best = jnp.argmin(values, axis=1)
    low = jnp.log1p(grid[jnp.maximum(best - 1, 0)])
    high = jnp.log1p(grid[jnp.minimum(best + 1, len(grid) - 1)])

    # In t = log(1 + d) a variance near zero and a huge one are equally easy.
    def judge(t: Array, at: Any) -> tuple[Array, Array, Array]:
        inner = at.d + 1.0
        slope, bend = at.slope * inner, at.bend * inner**2 + at.slope * inner
        stays = (t <= 0.0) & (slope >= 0.0)
        near = (bend > 0.0) & (slope**2 <= DECREMENT * jnp.where(bend > 0.0, bend, 1.0))
        return slope, bend, stays | near

    def go_on(state: tuple[Any, ...]) -> Array:
        return jnp.any(~state[1].converged & (state[1].steps < STEPS))

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        t, at, low, high = state
        slope, bend, _ = judge(t, at)
        high = jnp.where(slope > 0.0, t, high)
        low = jnp.where(slope > 0.0, low, t)
        newton = t - slope / jnp.where(bend > 0.0, bend, 1.0)
        # Downhill and inside the bracket; else in its middle, or at the boundary.
        inside = (bend > 0.0) & (newton < high) & (newton > low)
        at_zero = (bend > 0.0) & (newton <= 0.0) & (low <= 0.0)
        new = jnp.where(inside, newton, jnp.where(at_zero, 0.0, 0.5 * (low + high)))
        new = jnp.where(at.converged, t, new)
        after = evaluate(jnp.expm1(new))
        done = at.converged | judge(new, after)[2] | (high - low <= 1e-14 * high)
        steps = at.steps + (~at.converged & (at.steps < STEPS))
        return new, after._replace(steps=steps, converged=done), low, high

    t = jnp.clip(vertex(jnp.log1p(grid), values, best), low, high)
    at = evaluate(jnp.expm1(t))
    finite = jnp.isfinite(at.slope)
    at = at._replace(converged=judge(t, at)[2] | ~finite)
    t, at, _, _ = lax.while_loop(go_on, step, (t, at, low, high))
    # At the end of the grid it may fall still: the minimum is beyond.
    beyond = (t >= jnp.log1p(grid[-1])) & ~judge(t, at)[2]
    return at._replace(converged=at.converged & finite & ~beyond)


def vertex(t: Array, values: Array, best: Array) -> Array:
    """Return the vertex of the parabola through the best of a grid and its neighbours, (n,).

    Args:
        t: the grid, (G,).
        values: the criterion there, (n, G).
        best: where it is least, (n,); at either end that is the answer.
    """
    left, right = jnp.maximum(best - 1, 0), jnp.minimum(best + 1, len(t) - 1)
    at = jnp.arange(len(best))
    rise_left = values[at, left] - values[at, best]
    rise_right = values[at, right] - values[at, best]
    to_left, to_right = t[left] - t[best], t[right] - t[best]
    below = to_left * rise_right - to_right * rise_left
    change = 0.5 * (to_left**2 * rise_right - to_right**2 * rise_left)
    inner = (left < best) & (right > best) & (below < 0.0)
    return t[best] + jnp.where(inner, change / jnp.where(inner, below, 1.0), 0.0)


def sums_of(*terms: Array) -> tuple[Array, ...]:
    """Return the sums along lanes of several arrays (n, K), in one pass: divisions are dear."""

    def add(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    return tuple(lax.reduce(terms, (jnp.zeros((), terms[0].dtype),) * len(terms), add, (1,)))
