"""Where the search for the parameters of covariance structures starts, and which end wins.

The criterion of a structure may have several minima.  Every start is followed roughly; those ends
that may still be the best are followed to the end.  All of them run through one compiled solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .solve import Constraints, Solution, Status, better, continued, is_optimal, merit

ROUGH_TOL, ROUGH_STEPS = 1e-3, 20
"""Newton decrement at which a start has been followed far enough to tell its minimum, and the most
steps to there."""
NEAR = 0.05
"""Covariances of the random effects that differ by less, relative to the largest entry, lead to
the same minimum."""


class Pattern(NamedTuple):
    """How a start differs from the usual one, which has moderate positive correlations.

    Attributes:
        size: factor of the variances.
        first: added to the first parameter that is no standard deviation, which is the correlation
            of neighbours, or the only one; it lives on the scale of atanh.
        rest: added to the others.
        sign: -1.0 if they alternate.
    """

    size: float = 1.0
    first: float = 0.0
    rest: float = 0.0
    sign: float = 1.0


PATTERNS = (
    Pattern(),
    Pattern(size=0.1),
    Pattern(first=1.0, rest=1.0),
    Pattern(size=4.0, first=-0.95),
    Pattern(size=0.1, first=-0.75, rest=-0.5),
    Pattern(first=1.75),
    Pattern(size=0.02),
    Pattern(size=4.0),
    Pattern(size=0.02, rest=-1.5),
    Pattern(size=25.0, first=-1.5, rest=1.5, sign=-1.0),
    Pattern(first=-1.5, rest=-1.0),
    Pattern(size=100.0, first=-0.25),
    Pattern(size=0.1, first=0.45, rest=0.7, sign=-1.0),
)
"""Chosen among 96 by what they find in 338 random small designs of all structures: the first five
miss the best of all ends in four of them, the first eight in none; all others are a reserve."""
FEW, WIDE = 5, 8
"""How many of them do for structures of two parameters, and for more than sixteen effects, where a
solve is no longer free; and for more than eight effects."""


class Search(NamedTuple):
    """What a search from several starts found.

    Attributes:
        solution: the best end.
        ends: the criterion at each minimum that was found, working units, ascending.
    """

    solution: Solution
    ends: tuple[float, ...]


def structure_starts(
    constraints: Constraints, z_inverse: np.ndarray, variances: np.ndarray
) -> list[np.ndarray]:
    """Return starts for the structures from rough relative variances (q,), working units."""
    parameters, widths = (
        max(last - first for first, last in places)
        for places in zip(*((p.parameters, p.columns) for p in constraints.structures), strict=True)
    )
    enough = len(PATTERNS) if widths <= 8 else WIDE if widths <= 16 else FEW
    starts: list[np.ndarray] = []
    for pattern in PATTERNS[: FEW if parameters <= 2 else enough]:
        parts = [np.zeros(0)]
        for part in constraints.structures:
            here = slice(*part.columns)
            width = here.stop - here.start
            rough = pattern.size * variances[here] * np.diag(z_inverse)[here] ** 2
            start = part.covariance.start(rough)
            others = np.flatnonzero(~np.asarray(part.covariance.is_sd(width), dtype=bool))
            start[others[:1]] += pattern.first
            start[others[1:]] += pattern.rest * pattern.sign ** np.arange(1, len(others))
            parts.append(start)
        start = np.concatenate(parts)
        if not any(np.array_equal(start, known) for known in starts):
            starts.append(start)
    return starts


def is_hopeless(rough: Any, best: Any) -> Any:
    """Return whether a rough end leads to no better minimum than the best; also over lanes.

    Args:
        rough: status, value and decrement of the rough end.
        best: the value of the best one.
    """
    return (rough.status == Status.CONVERGED) & (rough.value - rough.decrement > best)


def is_near(one: Any, other: Any) -> Any:
    """Return whether two ends, each with D and s, have about the same natural covariance."""

    def natural(end: Any) -> np.ndarray:
        return np.asarray(np.exp(end.s)[..., None, None] * end.D)

    a, b = natural(one), natural(other)
    size = np.max(np.abs(b), axis=(-2, -1))
    return np.max(np.abs(a - b), axis=(-2, -1)) <= NEAR * size


class _Rough(NamedTuple):
    status: Any
    value: Any
    decrement: Any


def search(
    starts: Sequence[np.ndarray],
    rough: Callable[[np.ndarray], Solution],
    settle: Callable[[Solution], Solution],
) -> Search:
    """Follow all starts, and return the best end.

    Args:
        starts: parameters of the structures to start from, (k,) each.
        rough: solves from there to ``ROUGH_TOL``.
        settle: solves from a rough end as far as it goes.
    """
    first, *others = sorted(map(rough, starts), key=_height)
    best = continued(first, settle(first))
    known = [best]
    for end in others:
        hopeless = is_hopeless(
            _Rough(end.status, end.point.at.value, end.decrement), best.point.at.value
        )
        if hopeless or any(is_near(end.point, settled.point) for settled in known):
            continue
        known.append(continued(end, settle(end)))
        if better(*merit(known[-1]), *merit(best)):
            best = known[-1]
    return Search(best, tuple(sorted(_height(end) for end in known if is_optimal(end.status))))


def _height(end: Solution) -> float:
    value = float(end.point.at.value)
    return value if np.isfinite(value) else np.inf
