"""What the data cannot tell apart: a property of the designs, whatever the response is.

The covariance of n rows is linear in the natural variance parameters tau, the entries of the
covariances of the random effects and the residual variance::

    V(tau) = sum_c tau_c G_c      G_c = Z (K x E_c) Z'      G_residual = I

with rows multiplied by the roots of their weights, K the relationships between groups, and E_c the
direction in which parameter c moves the covariance of one group's effects.  The likelihood depends
on V, the restricted one on ``M V M`` with M the projection that takes the fixed effects out.  So a
direction t is not identified if and only if ``sum_c t_c M G_c M = 0`` (M = I under maximum
likelihood): the criterion is then flat along it, wherever the estimates are.

No n x n matrix is formed.  Applied to a random vector the sum costs a pass over the rows, and a
combination that vanishes on a fresh one vanishes altogether, with probability one.  Differences are
relative to what the matrices themselves do to the vector: rank decides, not how precisely a
parameter is estimated.

Source: Rothenberg (1971), Econometrica 39, 577-591, for identification by the rank of the
information; Patterson and Thompson (1971), Biometrika 58, 545-554, for the likelihood of ``M y``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .compress import Layout
from .compress.columns import triangle
from .constraints import TermColumns
from .covariances import matrix_at, slopes
from .frames import DataError
from .parameters import pack_triangle, triangle_size

VANISHES = 1e-8
"""A combination of matrices is zero if it changes a vector by less than this fraction of what they
do on their own."""
INVOLVED = 1e-6
"""A parameter takes part in a direction if it has at least this share of it."""
ROUNDING = 1e-10
"""A smaller share is rounding."""
ROUNDS = 7
"""Most times that more random vectors are drawn, each time as many as there were."""
COEFFICIENTS = 1e-7
"""A combination of coefficients depends on a flat direction if it moves by more than this."""
STEPS = 500
"""Most steps of the search for a combination that equals the residual's covariance."""


class Structure(NamedTuple):
    """A term whose covariance is a function of few parameters.

    Attributes:
        columns: its columns of D.
        slopes: derivatives of its working covariance in its parameters, (k, width, width).
        parameters: positions of these among the parameters of all structures.
    """

    columns: slice
    slopes: np.ndarray
    parameters: np.ndarray


@dataclass(frozen=True, eq=False)
class Directions:
    """The directions in which the covariance can move: entries, structures, then the scale.

    Attributes:
        q: number of random effects of all factors.
        rows: of the free entries of the lower triangle of D, (e,).
        columns: likewise.
        structures: the terms with a structure whose parameters are free.
        base: what the scale moves besides the residual: the covariances of structures, (q, q).
        scale: whether the residual variance is free.
    """

    q: int
    rows: np.ndarray
    columns: np.ndarray
    structures: tuple[Structure, ...]
    base: np.ndarray
    scale: bool

    @property
    def n_moving(self) -> int:
        """Number of directions, the scale apart."""
        return len(self.rows) + sum(len(part.slopes) for part in self.structures)

    def matrix(self, t: np.ndarray) -> np.ndarray:
        """Return the change of the working covariance along t, the scale left out, (q, q)."""
        E, at = np.zeros((self.q, self.q)), len(self.rows)
        E[self.rows, self.columns] = E[self.columns, self.rows] = t[:at]
        for part in self.structures:
            own = t[at : at + len(part.slopes)]
            E[part.columns, part.columns] = np.tensordot(own, part.slopes, 1)
            at += len(own)
        return E

    def inner(self, P: np.ndarray) -> np.ndarray:
        """Return the sums of the entries of each direction times those of P, (n_moving,)."""
        both = P + P.T
        own = np.where(self.rows == self.columns, 0.5, 1.0) * both[self.rows, self.columns]
        found = [own]
        for part in self.structures:
            inside = P[part.columns, part.columns]
            found.append(np.einsum("kij,ij->k", part.slopes, inside))
        return np.concatenate(found)

    def each(self) -> Iterator[np.ndarray]:
        """Yield the change along one direction after the other, the scale last, (q, q)."""
        for unit in np.eye(self.n_moving):
            yield self.matrix(unit)
        if self.scale:
            yield self.base


def directions(
    terms: Sequence[TermColumns],
    layout: Layout,
    scale: bool,
    theta: Mapping[str, np.ndarray] | None = None,
) -> Directions:
    """Return the directions in which free terms can move, in working coordinates.

    Args:
        terms: the random terms that are estimated.
        layout: the designs.
        scale: whether the residual variance is estimated.
        theta: where the structures are, by label of the term; any point by default, which shows
            what holds in general.
    """
    q = len(layout.A)
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    structures, base, at = [], np.zeros((q, q)), 0
    for term in terms:
        here, pattern, width = term.columns, term.pattern, term.width
        if pattern is not None:
            i, j = np.nonzero(np.tril(pattern))
            rows.append(here.start + i)
            columns.append(here.start + j)
            continue
        size = term.covariance.n_parameters(width)
        somewhere = np.random.default_rng(0).uniform(0.5, 1.5, size)
        where = somewhere if theta is None else theta[term.label]
        own = np.moveaxis(slopes(term.covariance, where, width), -1, 0)
        if not own.any(axis=(1, 2)).all():
            # At a boundary some parameters move nothing, which the designs do not cause.
            where = somewhere
            own = np.moveaxis(slopes(term.covariance, where, width), -1, 0)
        A = layout.A[here, here]
        base[here, here] = A @ matrix_at(term.covariance, where, width) @ A.T
        structures.append(Structure(here, A @ own @ A.T, np.arange(at, at + size)))
        at += size
    none = [np.zeros(0, dtype=int)]
    i, j = np.concatenate(rows or none), np.concatenate(columns or none)
    return Directions(q, i, j, tuple(structures), base, scale)


class Covariances:
    """The matrices G_c of a layout, applied to vectors of rows without being formed."""

    def __init__(self, layout: Layout, reml: bool) -> None:
        """Gather the weighted columns of the designs: as many numbers as they have."""
        root = 1.0 if layout.weights is None else np.sqrt(layout.weights)
        every = slice(None)
        self.layout, self.n = layout, len(layout.X)
        self.Z = [layout.random_columns(i, every) * root for i in range(len(layout.factors))]
        self.reml, fixed = reml, layout.fixed
        X = layout.X if len(fixed.kept) == layout.X.shape[1] else layout.X[:, fixed.kept]
        self.X = X @ fixed.inverse
        if layout.weights is not None:
            self.X *= np.sqrt(layout.weights)[:, None]

    def residual(self, v: np.ndarray) -> np.ndarray:
        """Return ``M v``, (n,) or (n, r)."""
        if not self.reml:
            return v
        for _ in range(2):  # the second time for the digits that X costs
            v = v - self.X @ (self.X.T @ v)
        return v

    def levels(self, v: np.ndarray) -> list[np.ndarray]:
        """Return ``(K x I) Z' v`` of each factor, (q_f, groups)."""
        found = []
        for Z, factor in zip(self.Z, self.layout.factors, strict=True):
            u = np.array(
                [np.bincount(factor.codes, column * v, minlength=factor.n_groups) for column in Z]
            )
            found.append(u if factor.root is None else (u @ factor.root) @ factor.root.T)
        return found

    def spread(self, E: np.ndarray, u: Sequence[np.ndarray]) -> np.ndarray:
        """Return ``Z (E x I) u``, from levels as :meth:`levels` returns them, (n,)."""
        total = np.zeros(self.n)
        for Z, factor, here, own in zip(
            self.Z, self.layout.factors, self.layout.slices, u, strict=True
        ):
            inside = E[here, here]
            to, by = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
            if len(to):
                moved = inside[np.ix_(to, by)] @ own[by]
                for i, effect in enumerate(to):
                    total += Z[effect] * moved[i, factor.codes]
        return total

    def along(self, at: Directions, t: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return ``sum_c t_c G_c v``, (n,)."""
        E, moved = at.matrix(t), np.zeros(self.n)
        if at.scale:
            E, moved = E + t[-1] * at.base, t[-1] * v
        return moved + self.spread(E, self.levels(v))


# --- the residual variance ----------------------------------------------------------------------


def check_residual(layout: Layout, terms: Sequence[TermColumns], reml: bool) -> None:
    """Raise if the random effects can imitate the residual: its variance is then not identified.

    Args:
        layout: the designs.
        terms: the random terms that are estimated.
        reml: whether the restricted likelihood is asked about.

    Raises:
        DataError: naming the terms.
    """
    if layout.n_zero:
        return  # rows without random effects
    by_factor = [[term for term in terms if term.factor == i] for i in range(len(layout.factors))]
    used = [own for own in by_factor if own]
    for own in used:
        _check_count(layout, own)
    # A factor by itself makes the better message.
    for own in used if len(used) == 1 else [*used, list(terms)]:
        related = [layout.factors[t.factor].name for t in own if _root(layout, t) is not None]
        # Otherwise what only the fixed effects hide is a fit without errors, not an error.
        restricted = reml and bool(related)
        if _has_free_rows(layout, own, restricted) or not _spans_residual(layout, own, restricted):
            continue
        labels = " + ".join(term.label for term in own)
        names = " and ".join(repr(layout.factors[i].name) for i in sorted({t.factor for t in own}))
        if len({t.factor for t in own}) > 1:
            why = f"the random effects {labels} of {names} together can produce any residual"
        elif related:
            why = (
                f"the random effects {labels} alone can produce any residual: the relationship "
                f"matrix of {names} is, as far as the data see it, that of unrelated levels"
            )
        else:
            largest = int(layout.sizes[own[0].factor].max())
            why = (
                f"no group of {names} has more than {largest} row{'s' * (largest > 1)}, and the "
                f"random effects {labels} alone can produce any residual"
            )
        raise DataError(
            f"the residual variance is not identified: {why}. Group more coarsely, use fewer "
            "random effects, or fix the residual variance with fix={'scale': ...}"
        )


def _root(layout: Layout, term: TermColumns) -> np.ndarray | None:
    return layout.factors[term.factor].root


def _check_count(layout: Layout, terms: Sequence[TermColumns]) -> None:
    """Raise if one factor has more free covariances than the covariance of the rows has entries."""
    factor, sizes = layout.factors[terms[0].factor], layout.sizes[terms[0].factor]
    counts = [_n_free(term) for term in terms]
    n = int(layout.n_obs)
    if sum(counts) <= n:
        return  # each row shows its own variance at least
    entries = n * (n + 1) // 2 if factor.root is not None else int(np.sum(sizes * (sizes + 1)) // 2)
    if sum(counts) <= entries:
        return
    worst = terms[int(np.argmax(counts))]
    raise DataError(
        f"the covariances of {worst.label} are not identified: it has {worst.width} effects per "
        f"group of {factor.name!r}, with {max(counts)} variances and covariances, and the {n} rows "
        f"show {entries} of their own. Use fewer effects (are numbers read as text?), or a "
        "structure with few parameters such as `diag` or `homcs`"
    )


def _n_free(term: TermColumns) -> int:
    """Return the number of parameters of a term's covariance."""
    pattern = term.pattern
    if pattern is None:
        return term.covariance.n_parameters(term.width)
    return int(np.tril(pattern).sum())


def _has_free_rows(layout: Layout, terms: Sequence[TermColumns], reml: bool) -> bool:
    """Return whether a count shows contrasts of the rows in which no random effect is seen."""
    p = len(layout.fixed.kept) if reml else 0
    positions = sorted({term.factor for term in terms})
    factors = [layout.factors[i] for i in positions]
    if layout.n_obs > p + sum(factor.n_effects * factor.n_groups for factor in factors):
        return True
    largest = int(layout.sizes[positions[0]].max())
    return len(factors) == 1 and largest > p + factors[0].n_effects


def _spans_residual(layout: Layout, terms: Sequence[TermColumns], reml: bool) -> bool:
    """Return whether some combination of the ``M G_c M`` of random effects is that of the scale."""
    at = directions(terms, layout, scale=True)
    of, rng = Covariances(layout, reml), np.random.default_rng(0)
    of_scale = np.append(np.zeros(at.n_moving), 1.0)

    def drawn() -> Probe:
        v = of.residual(rng.standard_normal(of.n))
        return Probe(v, of.residual(of.along(at, of_scale, v)))

    probes: list[Probe] = []
    more = 1 + at.n_moving // of.n
    for _ in range(ROUNDS):
        probes += [drawn() for _ in range(more)]
        t = _solved(of, at, probes)
        if t is None:
            return False
        fresh = drawn()
        left = of.residual(of.along(at, np.append(t, 0.0), fresh.v)) - fresh.target
        if np.linalg.norm(left) <= 10.0 * VANISHES * np.linalg.norm(fresh.target):
            return True
        more = len(probes)
    return False


class Probe(NamedTuple):
    """A random vector of error contrasts, and what the matrix of the scale makes of it, (n,)."""

    v: np.ndarray
    target: np.ndarray


def _solved(of: Covariances, at: Directions, probes: Sequence[Probe]) -> np.ndarray | None:
    """Return t with ``sum_c t_c M G_c v`` the target of every probe, None if there is none."""
    from scipy.sparse.linalg import LinearOperator, lsqr

    seen = [of.levels(probe.v) for probe in probes]
    slices, n = of.layout.slices, of.n

    def forward(t: np.ndarray) -> np.ndarray:
        E = at.matrix(np.ravel(t))
        return np.concatenate([of.residual(of.spread(E, u)) for u in seen])

    def backward(w: np.ndarray) -> np.ndarray:
        total = np.zeros((at.q, at.q))
        for u, part in zip(seen, np.ravel(w).reshape(-1, n), strict=True):
            part = of.residual(part)
            for here, Z, factor, own in zip(slices, of.Z, of.layout.factors, u, strict=True):
                for i, column in enumerate(Z):
                    sums = np.bincount(factor.codes, column * part, minlength=factor.n_groups)
                    total[here.start + i, here] += own @ sums
        return at.inner(total)

    target = np.concatenate([probe.target for probe in probes])
    operator = LinearOperator((len(target), at.n_moving), matvec=forward, rmatvec=backward)
    steps = min(STEPS, 10 * at.n_moving + 10)
    (
        t,
        *_,
    ) = lsqr(operator, target, atol=1e-14, btol=1e-12, conlim=0.0, iter_lim=steps)
    left = np.linalg.norm(forward(t) - target)
    return t if left <= VANISHES * np.linalg.norm(target) else None


# --- everything else ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unidentified:
    """What the data do not tell apart.

    Attributes:
        names: groups of variance parameters of which only a combination is identified, or one about
            which the data say nothing.
        directions: along which the likelihood is flat, (k + 1 + t, r): changes of vech cov_re in
            working coordinates (k) and of the scale, at parameters of structures relative to the
            scale, and of these (t) times the scale.
        n_entries: k.
        bends: how the coefficients' best weights move along a mixture of them, (p, p).
        moves: how the coefficients' covariance moves along it, (p, p).
        to_x: from coordinates in which X is orthonormal to the coefficients of the columns of X
            that were kept, (p, p); both matrices above are in the former.
    """

    names: tuple[tuple[str, ...], ...]
    directions: np.ndarray
    n_entries: int
    bends: np.ndarray
    moves: np.ndarray
    to_x: np.ndarray

    def __str__(self) -> str:
        parts = [
            f"the data do not tell {_listed(group)} apart" for group in self.names if len(group) > 1
        ]
        alone = [group[0] for group in self.names if len(group) == 1]
        parts += [f"the data say nothing about {_listed(alone)}"] if alone else []
        return "not identified: " + "; ".join(parts)

    @property
    def redundant(self) -> np.ndarray:
        """Positions of entries of cov_re that, held anywhere, leave no flat direction, (r,)."""
        # The scale, and parameters of structures, stay.
        entries = reduced(self.directions[: self.n_entries].T)
        return np.asarray(np.argmax(np.abs(entries), axis=1))

    def concerns(self, L: np.ndarray) -> np.ndarray:
        """Return whether estimate or error of combinations of coefficients depend on it, (m,).

        Args:
            L: combinations of the coefficients that were kept, (m, p).
        """
        return np.array([self.concerns_jointly(row[None]) for row in L], dtype=bool)

    def concerns_jointly(self, L: np.ndarray) -> bool:
        """Return the same for a joint test of combinations."""
        x = L @ self.to_x
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(float).tiny)
        bent, moved = np.linalg.norm(x @ self.bends.T), np.linalg.norm(x @ self.moves @ x.T)
        return bool(max(bent, moved) > COEFFICIENTS)


def unidentified(
    layout: Layout,
    terms: Sequence[TermColumns],
    effects: Sequence[str],
    groups: Sequence[str],
    *,
    reml: bool,
    scale: bool,
    theta: Mapping[str, np.ndarray] | None = None,
) -> Unidentified | None:
    """Return what the data do not tell apart, None if that is nothing.

    Args:
        layout: the designs.
        terms: the random terms that are estimated.
        effects: names of the random effects, (q,).
        groups: names of the grouping factors.
        reml: whether the restricted likelihood is asked about.
        scale: whether the residual variance is estimated.
        theta: parameters of the structures, by label of the term.
    """
    # Rows that are zero throughout show the scale.
    at = directions(terms, layout, scale and not layout.n_zero, theta)
    if not at.n_moving:
        return None
    of, rng = Covariances(layout, reml), np.random.default_rng(0)
    null = _null(of, at, rng)
    if not null.shape[1]:
        return None
    names = _involved(null, at, layout, _names(terms, effects, groups, at))
    mixed = null @ rng.standard_normal(null.shape[1])
    moved = np.array([of.along(at, mixed, column) for column in of.X.T]).reshape(-1, of.n).T
    p = moved.shape[1]
    return Unidentified(
        names=names,
        directions=np.column_stack([_natural(at, t) for t in null.T]),
        n_entries=triangle_size(at.q),
        # A covariance that does not change at all changes no coefficient.
        bends=triangle(of.residual(moved)) if reml else np.zeros((0, p)),
        moves=of.X.T @ moved if reml else np.zeros((p, p)),
        to_x=layout.fixed.inverse,
    )


def _null(of: Covariances, at: Directions, rng: np.random.Generator) -> np.ndarray:
    """Return a basis of the t with ``sum_c t_c M G_c M = 0``, (directions, r).

    A unit of what takes part in it changes a random vector by about its own length.
    """
    k = at.n_moving + at.scale
    size = min(of.n, 2 * k + 64)
    sketch, norms, drawn = np.zeros((0, k)), np.zeros(k), 0
    more = 1 + k // of.n
    for _ in range(ROUNDS):
        for _ in range(more):
            seen, norm = _sketched(of, at, size, rng)
            sketch, norms = np.vstack([sketch, seen]), np.hypot(norms, norm)
            if len(sketch) > 2 * size + k:
                sketch = triangle(sketch)
        drawn += more
        unit = np.where(norms > 0.0, norms, 1.0) / np.sqrt(drawn * of.n)
        _, values, right = np.linalg.svd(sketch / (unit * np.sqrt(drawn * of.n)))
        values = np.append(values, np.zeros(k - len(values)))
        null = reduced(right[values <= VANISHES], ROUNDING).T / unit[:, None]
        if not null.shape[1] or _vanishes(of, at, null, unit, rng):
            return null
        more = drawn
    return null[:, :0]


def _sketched(
    of: Covariances, at: Directions, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``M G_c M v`` for a random v, rows added up with random signs, and norms of G_c v."""
    v = rng.standard_normal(of.n)
    whole, inside = of.levels(v), of.levels(of.residual(v))
    bucket, sign = rng.integers(size, size=of.n), rng.choice([-1.0, 1.0], of.n)
    if size == of.n:
        bucket = np.arange(of.n)
    columns, norms = [], []
    for c, E in enumerate(at.each()):
        moved, own = of.spread(E, inside), of.spread(E, whole)
        if c == at.n_moving:  # the scale moves the residual as well
            moved, own = moved + of.residual(v), own + v
        columns.append(np.bincount(bucket, sign * of.residual(moved), minlength=size))
        norms.append(np.linalg.norm(own))
    return np.array(columns).T, np.array(norms)


def _vanishes(
    of: Covariances, at: Directions, null: np.ndarray, unit: np.ndarray, rng: np.random.Generator
) -> bool:
    """Return whether combinations change nothing in a fresh random vector either."""
    v = of.residual(rng.standard_normal(of.n))
    most = 10.0 * VANISHES * np.sqrt(of.n) * np.linalg.norm(null * unit[:, None], axis=0)
    left = [np.linalg.norm(of.residual(of.along(at, t, v))) for t in null.T]
    return bool(np.all(left <= most))


def _natural(at: Directions, t: np.ndarray) -> np.ndarray:
    """Return changes of (vech cov_re, scale, parameters of structures) along t."""
    of_scale = t[-1] if at.scale else 0.0
    n_theta = max((int(part.parameters.max()) + 1 for part in at.structures), default=0)
    theta, first = np.zeros(n_theta), len(at.rows)
    for part in at.structures:
        theta[part.parameters] = t[first : first + len(part.slopes)]
        first += len(part.slopes)
    vech = pack_triangle(at.matrix(t) + of_scale * at.base)
    return np.concatenate([vech, [of_scale], theta])


def _names(
    terms: Sequence[TermColumns], effects: Sequence[str], groups: Sequence[str], at: Directions
) -> list[str]:
    """Return a name for each direction, with its term where names repeat."""
    entries: list[tuple[str, TermColumns]] = []
    rest: list[tuple[str, TermColumns]] = []
    parts, first = iter(at.structures), 0
    for term in terms:
        own, group = effects[term.columns], groups[term.factor]
        if term.pattern is not None:
            entries += [
                (f"{group}: var({own[i]})" if i == j else f"{group}: cov({own[j]}, {own[i]})", term)
                for i, j in zip(*np.nonzero(np.tril(term.pattern)), strict=True)
            ]
            continue
        labels = term.covariance.labels(tuple(own))
        rest += [(f"{group}: {labels[int(j)]}", term) for j in next(parts).parameters - first]
        first += len(labels)
    every = [*entries, *rest]
    count = Counter(name for name, _ in every)
    found = [f"{name} of {term.label}" if count[name] > 1 else name for name, term in every]
    return [*found, *(["scale"] if at.scale else [])]


def _involved(
    null: np.ndarray, at: Directions, layout: Layout, names: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Return which parameters take part in flat directions, those of the same ones together."""
    n_entries, back = len(at.rows), layout.A_inverse
    size = np.sqrt(np.einsum("ij,ij->j", layout.A, layout.A))
    sparse = np.array(null.T)
    for row, t in zip(sparse, null.T, strict=True):
        # The user's covariances, in units of their columns' mean squares.
        user = back @ at.matrix(np.append(t[:n_entries], np.zeros(len(t) - n_entries))) @ back.T
        row[:n_entries] = (user * np.outer(size, size))[at.rows, at.columns]
    groups: list[set[int]] = []
    for row in reduced(sparse):
        members = set(np.flatnonzero(row).tolist())
        apart = [group for group in groups if not group & members]
        groups = [*apart, members.union(*(group for group in groups if group & members))]
    return tuple(tuple(names[c] for c in sorted(group)) for group in sorted(groups, key=min))


def reduced(rows: np.ndarray, least: float = INVOLVED) -> np.ndarray:
    """Return rows that span the same space, each with a pivot of one that no other has.

    Gauss-Jordan elimination with complete pivoting; entries smaller than ``least`` become zero.
    """
    rows = np.linalg.qr(rows.T)[0].T if rows.size else rows.copy()
    left = list(range(len(rows)))
    while left:
        inside = np.abs(rows[left])
        i, j = np.unravel_index(int(np.argmax(inside)), inside.shape)
        pivot = left.pop(int(i))
        rows[pivot] /= rows[pivot, j]
        others = np.arange(len(rows)) != pivot
        rows[others] -= np.outer(rows[others, j], rows[pivot])
    return np.where(np.abs(rows) > least, rows, 0.0)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]][len(names) < 2 :])
