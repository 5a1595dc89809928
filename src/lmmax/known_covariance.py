"""A covariance structure of which some entries are known, relative to the residual variance.

Held entries of the covariance ``D`` itself leave a set of matrices that no simple formula spans, so
it is built like a Cholesky factor ``D = L L'``, row by row.  In row i the entries ``L_ij`` of free
covariances are parameters.  A held ``D_ij = v`` determines its entry from those before it::

    L_ij = (v - sum_{k < j} L_ik L_jk) / L_jj

which makes the held part of the row an affine function of the free one.  A free variance has
``L_ii`` as its parameter.  A held variance ``v`` is the squared length of the row, which puts the
free entries into an ellipsoid: after the change of variables that makes it a ball of radius r, a
stereographic projection, ``u = r x / (1 + |x|^2 / 4)`` and ``L_ii = r (1 - |x|^2 / 4) / (1 +
|x|^2 / 4)``, takes unconstrained parameters x onto the sphere that it bounds.

The order of the rows decides whether all this is smooth.  With zeros held and all variances free,
there is an order without any division if the graph of the free covariances is chordal (Rose, 1970,
"Triangulated graphs and the elimination process", J. Math. Anal. Appl. 32, 597-609; every graph of
three effects is): then L has the zeros of D.  A held variance needs a radius that does not depend
on the parameters.  The best order is searched for; a division by a parameter costs.  Where one is
left, D is not defined at the zero of that parameter, and only there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from .covariances import Covariance, Diagonal, Effects, Unstructured, correlations_and_sd, matrix_at
from .frames import DataError, real_numbers
from .linalg import ldl, solve_unit_lower, solve_unit_upper
from .parameters import factor, pack_triangle

__all__ = ["PartlyKnown"]

_KINDS = ("covariance", "factor")
# Rounding in what should be zero, relative to the held entries.
_ROUNDING = 1e-12
# All orders of so many effects are tried, a few of more.
_ALL_ORDERS = 6
# Starts with variances left out of account keep this part of their standard deviation.
_LEAST = 0.3
# Starts stay inside the ball.
_INSIDE = 1.0 - 1e-3


@dataclass(frozen=True)
class PartlyKnown(Covariance):
    """A covariance of which the free entries are estimated and the others held.

    What is held is relative to the residual variance; to hold a term's covariance in natural units
    use the argument ``fix`` of :func:`lmmax.fit`.  Effects that are independent of each other and
    otherwise free become the structure "diag", and a covariance that is free throughout "us".

    Parameters are the free entries of the lower triangle, row by row; they are reported as
    standard deviations (diagonal) and correlations.

    Args:
        given: (q, q) relative covariance, or its lower Cholesky factor; what stands in the place
            of free entries does not matter.
        free: (q, q) whether an entry is estimated.  Of both matrices the lower triangle counts.
        of: "covariance" or "factor", what ``given`` and ``free`` describe.

    Raises:
        ValueError: if the matrices are not square, of one size and finite, or ``of`` is unknown.

    Example:
        A slope's variance is a tenth of the residual's, the intercept's is estimated.

        >>> import lmmax
        >>> from lmmax.known_covariance import PartlyKnown
        >>> known = PartlyKnown([[1.0, 0.0], [0.0, 0.1]], [[True, False], [False, False]])
        >>> spec = lmmax.ModelSpec("Reaction", "Days", [lmmax.RandomTerm("Days", "Subject", known)])
        >>> fit = lmmax.fit(spec, lmmax.datasets.load("sleepstudy"))
        >>> (fit.cov_re / fit.scale).round(3).to_numpy().tolist()
        [[0.995, 0.0], [0.0, 0.1]]

    Source: statsmodels holds such entries by ``MixedLM.fit(free=...)``; with its default
    ``use_sqrt=True`` those of the factor.
    """

    given: tuple[tuple[float, ...], ...]
    free: tuple[tuple[bool, ...], ...]
    of: str = "covariance"

    def __post_init__(self) -> None:
        if self.of not in _KINDS:
            raise ValueError(f"of={self.of!r} is unknown; use {' or '.join(map(repr, _KINDS))}")
        given, free = _matrix(self.given, "given"), _matrix(self.free, "free") != 0.0
        if given.shape != free.shape:
            raise ValueError(
                f"given is {len(given)} x {len(given)} and free {len(free)} x {len(free)}: they "
                "describe the same entries"
            )
        # Tuples, of what counts alone: structures are compared and hashed.
        free = np.tril(free)
        given = np.tril(np.where(free, 0.0, given))
        object.__setattr__(self, "given", tuple(tuple(row) for row in given.tolist()))
        object.__setattr__(self, "free", tuple(tuple(row) for row in free.tolist()))

    @property
    def name(self) -> str:
        """`"known"`."""
        return "known"

    def prepare(self, effects: Effects) -> Covariance:
        """Return the structure for the effects of a term; "diag" or "us" if it is one of them.

        Raises:
            DataError: if the sizes differ, or no covariance has the held entries, or they leave a
                set that this structure cannot describe.
        """
        q = len(effects.names)
        if len(self.free) != q:
            raise DataError(
                f"the random term {effects.label} has {q} effects, {', '.join(effects.names)}, and "
                f"its known covariance is {len(self.free)} x {len(self.free)}: give one of their "
                "number"
            )
        pattern = self.pattern(q)
        if pattern is not None and pattern.all():
            return Unstructured()
        if pattern is not None and not np.tril(pattern, -1).any():
            return Diagonal()
        if self.of == "covariance":
            try:
                _plan(self.given, self.free)
            except _Conflict as conflict:
                raise DataError(conflict.message(effects)) from None
        return self

    def pattern(self, q: int) -> np.ndarray | None:
        """Return the pattern of free blocks with zeros between them, or None for other masks."""
        free = np.array(self.free)
        free = free | free.T
        blocks = free.diagonal().all() and np.array_equal(free @ free, free)
        return free.astype(float) if blocks and not np.any(self.given) else None

    def n_parameters(self, q: int) -> int:
        """See `Covariance`."""
        return int(np.sum(self.free))

    def nullity(self, q: int) -> int:
        """See `Covariance`."""
        theta = np.random.default_rng(0).uniform(0.5, 1.0, self.n_parameters(q))
        D = matrix_at(self, theta, q)
        size = np.sqrt(np.diag(D))
        scale = np.where(size > 0.0, size, 1.0)
        return int(np.sum(np.linalg.eigvalsh(D / np.outer(scale, scale)) < 1e-9))

    def matrix(self, theta: Array, q: int) -> Array:
        """See `Covariance`."""
        if self.of == "factor":
            places = tuple(index.astype(np.int32) for index in np.nonzero(np.array(self.free)))
            L = jnp.asarray(self.given, theta.dtype).at[places].set(theta)
            return L @ L.T
        plan = _plan(self.given, self.free)
        number = self._numbers()
        rows: list[Array] = []
        for i, row in enumerate(plan.rows):
            x = theta[np.array([number[plan.entry(i, j)] for j in row.free], dtype=np.int32)]
            if row.radius is None:
                diagonal = theta[number[plan.entry(i, i)]]
            else:
                x, diagonal = _on_sphere(row, rows, x)
            rows.append(_whole(row, rows, x, q).at[i].set(diagonal))
        L = jnp.stack(rows)[np.argsort(plan.order).astype(np.int32)]
        # The product has the held entries up to rounding.
        held = np.array(self.given) + np.tril(self.given, -1).T
        free = np.array(self.free)
        return jnp.where(free | free.T, L @ L.T, jnp.asarray(held, theta.dtype))

    def theta_of(self, D: np.ndarray) -> np.ndarray:
        """See `Covariance`."""
        D, free = np.asarray(D, dtype=float), np.array(self.free)
        if self.of == "factor":
            L = factor(D)
            # Columns have the sign that the held entries give them.
            signs = np.sum(np.where(free, 0.0, self.given) * L, axis=0)
            return np.asarray((L * np.where(signs < 0.0, -1.0, 1.0))[free])
        plan = _plan(self.given, self.free)
        D = D[np.ix_(plan.order, plan.order)]
        L, theta, number = np.zeros_like(D), np.zeros(int(free.sum())), self._numbers()
        for i, row in enumerate(plan.rows):
            E, columns = _affine(row, list(L)), list(row.free)
            for j in columns:
                # Entries in between follow from the free ones before them.
                L[i, :j] = (E @ np.append(1.0, L[i, columns]))[:j]
                rest = D[i, j] - L[i, :j] @ L[j, :j]
                L[i, j] = rest / L[j, j] if abs(L[j, j]) > 1e-8 * np.sqrt(D[j, j]) else 0.0
            x = L[i, columns]
            if row.radius is not None:
                x, L[i, columns], L[i, i] = _from_sphere(row, E, x)
            L[i, : len(E)] = E @ np.append(1.0, L[i, columns])
            if row.radius is None:
                L[i, i] = np.sqrt(max(D[i, i] - L[i, :i] @ L[i, :i], 0.0))
                theta[number[plan.entry(i, i)]] = L[i, i]
            theta[[number[plan.entry(i, j)] for j in columns]] = x
        return theta

    def start(self, variances: np.ndarray) -> np.ndarray:
        """See `Covariance`."""
        variances = np.asarray(variances, dtype=float)
        largest = np.max(variances, initial=0.0)
        variances = np.maximum(variances, 0.01 * largest) if largest > 0.0 else variances + 1.0
        theta = self.theta_of(np.diag(variances))
        # A standard deviation of zero is where its derivative vanishes.
        least = _LEAST * np.sqrt(variances)[np.nonzero(np.array(self.free))[0]]
        on_diagonal = np.array(self.is_sd(len(variances)), dtype=bool)
        return np.where(on_diagonal, np.maximum(theta, least), theta)

    def values(self, theta: Array, q: int) -> Array:
        """Return standard deviations and correlations, NaN with an effect of variance zero."""
        return pack_triangle(correlations_and_sd(self.matrix(theta, q)))[self._packed]

    def is_sd(self, q: int) -> tuple[bool, ...]:
        """See `Covariance`."""
        return tuple(bool(i == j) for i, j in zip(*np.nonzero(np.array(self.free)), strict=True))

    def labels(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """See `Covariance`."""
        every = Unstructured().labels(names)
        return tuple(every[at] for at in self._packed)

    @property
    def _packed(self) -> np.ndarray:
        """Positions of the free entries in the packed triangle, (k,)."""
        return np.flatnonzero(pack_triangle(np.array(self.free))).astype(np.int32)

    def _numbers(self) -> dict[tuple[int, int], int]:
        """Return the position of each free entry among the parameters."""
        entries = zip(*np.nonzero(np.array(self.free)), strict=True)
        return {(int(i), int(j)): number for number, (i, j) in enumerate(entries)}


def _matrix(value: Any, name: str) -> np.ndarray:
    try:
        matrix = real_numbers(value, name)
    except DataError as error:
        raise ValueError(str(error)) from None
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a square matrix of numbers, got {value!r}") from None
    if matrix.ndim != 2 or len(matrix) != matrix.shape[1] or not len(matrix):
        raise ValueError(f"{name} must be a square matrix, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite")
    return matrix


# --- rows of the factor ---------------------------------------------------------------------


class _Solved(NamedTuple):
    """An entry of the factor that a held covariance determines."""

    column: int
    value: float


class _Row(NamedTuple):
    """How a row of the factor follows from those before it.

    Attributes:
        free: columns whose entries are parameters, in order.
        solved: those that held covariances determine; the others are zero.
        radius: what a held variance leaves to the free entries, squared; None for a free variance.
    """

    free: tuple[int, ...]
    solved: tuple[_Solved, ...]
    radius: float | None


class _Plan(NamedTuple):
    """Rows of the factor in the order in which they are made.

    Attributes:
        order: the effects, (q,).
        rows: one for each.
        cost: number of divisions by a parameter.
    """

    order: tuple[int, ...]
    rows: tuple[_Row, ...]
    cost: int

    def entry(self, i: int, j: int) -> tuple[int, int]:
        """Return where in the lower triangle of the effects an entry of the factor belongs."""
        a, b = self.order[i], self.order[j]
        return max(a, b), min(a, b)


class _Conflict(Exception):
    """Why an order of effects does not work.

    Args:
        row, column: the entry.
        impossible: whether no covariance has the held entries, whatever the order.
        reason: in words.
    """

    def __init__(self, row: int, column: int, impossible: bool, reason: str) -> None:
        self.row, self.column = max(row, column), min(row, column)
        self.impossible, self.reason = impossible, reason
        super().__init__(reason)

    def message(self, effects: Effects) -> str:
        """Return the message for the effects of a term."""
        names = effects.names
        entry = f"({names[self.row]}, {names[self.column]})"
        return f"the known covariance of {effects.label}, entry {entry}: {self.reason}"


IMPOSSIBLE = (
    "no covariance matrix has this entry beside the others that are held; change one of them, or "
    "estimate it"
)
NO_ROOM = (
    "the entries that are held leave this one no room, or determine it; hold it, or estimate the "
    "variances too"
)
BEYOND = (
    "with this entry held, what the others may be depends on the estimates, in a way that this "
    "structure cannot describe; estimate the variance, hold all covariances of the effects that it "
    "is held with, or hold entries of the Cholesky factor, of='factor'"
)


@lru_cache(maxsize=256)
def _plan(given: tuple[tuple[float, ...], ...], free: tuple[tuple[bool, ...], ...]) -> _Plan:
    """Return the best order in which to make the rows of the factor.

    Raises:
        _Conflict: if no order works; that of the given order of effects unless another one shows
            that no covariance has the held entries.
    """
    D, mask = np.array(given), np.array(free)
    D, mask = D + np.tril(D, -1).T, mask | mask.T
    best: _Plan | None = None
    worst: _Conflict | None = None
    for order in _orders(mask):
        try:
            plan = _rows(D[np.ix_(order, order)], mask[np.ix_(order, order)], order)
        except _Conflict as conflict:
            if conflict.impossible:
                raise
            worst = worst or conflict
            continue
        if best is None or plan.cost < best.cost:
            best = plan
        if plan.cost == 0:
            break
    if best is None:
        assert worst is not None
        raise worst
    return best


def _orders(free: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Yield orders of the effects to try, the given one first."""
    q = len(free)
    if q <= _ALL_ORDERS:
        yield from permutations(range(q))
        return
    given, filled = tuple(range(q)), _least_fill(free)
    held = [j for j in given if not free[j, j]]
    yield given
    for order in (filled, given):
        rest = [j for j in order if free[j, j]]
        yield (*held, *rest)
        yield (*rest, *held)
        yield tuple(order)


def _least_fill(free: np.ndarray) -> tuple[int, ...]:
    """Return an order of elimination that joins few effects: none if the graph is chordal."""
    graph, left, order = free.copy(), list(range(len(free))), []

    def missing(j: int) -> list[tuple[int, int]]:
        around = [k for k in left if k != j and graph[j, k]]
        return [pair for pair in combinations(around, 2) if not graph[pair]]

    while left:
        chosen = min(left, key=lambda j: len(missing(j)))
        for a, b in missing(chosen):
            graph[a, b] = graph[b, a] = True
        left.remove(chosen)
        order.append(chosen)
    return tuple(order)


_ZERO, _CONSTANT, _VARIES = 0, 1, 2


def _rows(D: np.ndarray, free: np.ndarray, order: tuple[int, ...]) -> _Plan:
    """Return how the rows of the factor are made in one order, the effects already in it.

    Raises:
        _Conflict: if they cannot be.
    """
    q, cost, rows = len(D), 0, []
    kind, L = np.zeros((q, q), dtype=int), np.zeros((q, q))

    def conflict(i: int, j: int, impossible: bool, reason: str) -> _Conflict:
        return _Conflict(order[i], order[j], impossible, reason)

    for i in range(q):
        solved: list[_Solved] = []
        for j in range(i):
            if free[i, j]:
                if kind[j, j] == _ZERO:
                    raise conflict(i, j, True, NO_ROOM)
                kind[i, j] = _VARIES
                continue
            both = [k for k in range(j) if kind[i, k] and kind[j, k]]
            varies = any(_VARIES in (kind[i, k], kind[j, k]) for k in both)
            if not varies:
                rest = D[i, j] - L[i, :j] @ L[j, :j]
                if abs(rest) <= _ROUNDING * (abs(D[i, j]) + np.abs(L[i, :j]) @ np.abs(L[j, :j])):
                    continue
                if kind[j, j] == _ZERO:
                    raise conflict(i, j, True, IMPOSSIBLE)
            elif kind[j, j] == _ZERO:
                raise conflict(i, j, False, BEYOND)
            if varies or kind[j, j] == _VARIES:
                kind[i, j] = _VARIES
                cost += kind[j, j] == _VARIES
            else:
                kind[i, j], L[i, j] = _CONSTANT, rest / L[j, j]
            solved.append(_Solved(j, float(D[i, j])))
        columns = tuple(j for j in range(i) if free[i, j])
        radius = None
        if free[i, i]:
            kind[i, i] = _VARIES
        else:
            taken = _taken(D, free, kind, L, i)
            if taken is None:
                raise conflict(i, i, False, BEYOND)
            radius = float(D[i, i] - taken)
            if radius < -_ROUNDING * abs(D[i, i]) or D[i, i] < 0.0:
                raise conflict(i, i, True, IMPOSSIBLE)
            if radius <= _ROUNDING * D[i, i]:
                radius = 0.0
                if columns:
                    raise conflict(i, columns[0], True, NO_ROOM)
            elif columns or any(kind[i, s.column] == _VARIES for s in solved):
                kind[i, i] = _VARIES
            else:
                kind[i, i], L[i, i] = _CONSTANT, np.sqrt(radius)
        rows.append(_Row(columns, tuple(solved), radius))
    return _Plan(order, tuple(rows), int(cost))


def _taken(
    D: np.ndarray, free: np.ndarray, kind: np.ndarray, L: np.ndarray, i: int
) -> float | None:
    """Return the least squared length that held covariances leave a row; None if it varies."""
    held = [j for j in range(i) if not free[i, j]]
    v, inside = D[i, held], np.ix_(held, held)
    if not np.any(kind[i, held] == _VARIES):
        return float(L[i, held] @ L[i, held])
    if not v.any():
        return 0.0
    # The length of the projection on the rows of these effects.
    return None if free[inside].any() else float(v @ np.linalg.pinv(D[inside], hermitian=True) @ v)


def _affine(row: _Row, rows: Sequence[Any]) -> Any:
    """Return the row's entries as functions of its free ones, (i, k + 1), a constant first.

    Args:
        row: how it is made.
        rows: those before it.
    """
    xp: Any = jnp if rows and isinstance(rows[0], Array) else np
    i = max([*row.free, *(solved.column for solved in row.solved)], default=-1) + 1
    units = np.eye(len(row.free) + 1)
    lines = [0.0 * units[0]] * i
    for unit, j in zip(units[1:], row.free, strict=True):
        lines[j] = unit
    for j, value in sorted(row.solved):
        line = value * units[0]
        if j:
            line = line - rows[j][:j] @ xp.stack(lines[:j])
        lines[j] = line / rows[j][j]
    return xp.stack(lines) if i else np.zeros((0, len(units)))


def _whole(row: _Row, rows: Sequence[Array], y: Array, q: int) -> Array:
    """Return the row with its free entries y (k,), zero from the diagonal on, (q,)."""
    found = jnp.zeros(q, y.dtype)
    if row.solved:
        E = _affine(row, rows)
        return found.at[: len(E)].set(E[:, 0] + E[:, 1:] @ y)
    return found.at[np.array(row.free, dtype=np.int32)].set(y)


def _on_sphere(row: _Row, rows: Sequence[Array], x: Array) -> tuple[Array, Array]:
    """Return the free entries of a row of held length, (k,), and its diagonal one.

    With ``|E (1, y)|^2 = (y - c)' M (y - c) + const``, ``C' (y - c)`` is in a ball if ``M = C C'``.
    """
    assert row.radius is not None
    r = float(np.sqrt(row.radius))
    quarter = 0.25 * jnp.sum(x * x)
    u, diagonal = r * x / (1.0 + quarter), r * (1.0 - quarter) / (1.0 + quarter)
    if not row.solved or not row.free:
        return u, diagonal
    E = _affine(row, rows)
    Q = jnp.asarray(E.T @ E)
    U, d = ldl(Q[1:, 1:])
    offset = solve_unit_lower(U, -Q[1:, :1])[:, 0] / d
    return solve_unit_upper(U, (offset + u / jnp.sqrt(d))[:, None])[:, 0], diagonal


def _from_sphere(row: _Row, E: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the parameters of free entries, the entries, pulled inside, and the diagonal one."""
    assert row.radius is not None
    r = float(np.sqrt(row.radius))
    if not row.free:
        return y, y, r
    Q = E.T @ E
    C = np.linalg.cholesky(Q[1:, 1:])
    centre = -np.linalg.solve(Q[1:, 1:], Q[1:, 0])
    u = C.T @ (y - centre) / r
    length = float(np.sqrt(u @ u))
    if length > 1.0:
        u, length = u * (_INSIDE / length), _INSIDE
    diagonal = np.sqrt(1.0 - length**2)
    return 2.0 * u / (1.0 + diagonal), centre + r * np.linalg.solve(C.T, u), r * diagonal
