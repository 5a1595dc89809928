"""Whether one mixed model is a special case of another, from their designs alone.

Fixed effects: columns of the one in the column space of the other.  Random effects: the marginal
covariance is ``scale (W^-1 + sum_t Z_t (I x E_t) Z_t')``, linear in the E_t of unstructured and
diagonal terms.  The smaller model is nested if each direction in which its covariance can move is a
combination of those of the larger one.  Directions are compared through random probes ``u' G v``,
sums over groups of products of ``Z_i' u_i`` and ``Z_i' v_i``: no matrix of all rows is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from ..compress.rows import chunk_rows
from ..constraints import TermColumns, directions
from ..covariances import matrix_at
from ..matrices import Design
from .hypotheses import Array

if TYPE_CHECKING:
    from ..results import Fit
    from .submodels import Submodel

SPAN_TOLERANCE = 1e-7
"""Columns, relative to their length, and covariances closer than this to a space lie in it."""
SPARE = 6
"""Random probes beyond the number of directions that they have to tell apart."""


@dataclass(frozen=True)
class FixedNesting:
    """How the fixed effects of a smaller model relate to those of a larger one.

    Attributes:
        outside: names of the smaller model's columns that the larger one does not hold.
        same_space: whether the two hold the same means.
        log_ratio: of REML criteria between two codings of the same means, the part that is only
            due to the coding, ``2 log|det T|`` for ``X_small = X_large T``.
    """

    outside: tuple[str, ...]
    same_space: bool
    log_ratio: float


class RandomNesting(Enum):
    """How the random effects of a smaller model relate to those of a larger one."""

    SAME = "same"
    INSIDE = "nested, with no variance at zero"
    BOUNDARY = "nested, with a variance at zero"
    NOT_NESTED = "not nested"
    UNKNOWN = "not known"


def fixed_nesting(small: Fit, large: Fit) -> FixedNesting:
    """Compare the fixed effects of two fits to the same rows."""
    kept, factor = small.layout.fixed.kept, large.layout.fixed
    X0, X1 = small.design.X, large.design.X
    p0, p1 = len(kept), len(factor.kept)
    if X0 is X1 or (X0.shape == X1.shape and np.array_equal(X0, X1)):
        return FixedNesting((), True, 0.0)
    step = chunk_rows(X0.shape[1] + X1.shape[1])
    starts = range(0, len(X0), step)

    def rows(start: int) -> tuple[Array, Array]:
        here = slice(start, start + step)
        return X0[here][:, kept], X1[here][:, factor.kept] @ factor.inverse

    gram, cross = np.zeros((p1, p1)), np.zeros((p1, p0))
    for start in starts:
        columns, Q = rows(start)
        gram += Q.T @ Q
        cross += Q.T @ columns
    C = np.linalg.solve(gram, cross)
    size, left = np.zeros(p0), np.zeros(p0)
    for start in starts:
        columns, Q = rows(start)
        size += np.sum(columns**2, axis=0)
        left += np.sum((columns - Q @ C) ** 2, axis=0)
    outside = left > SPAN_TOLERANCE**2 * size
    names = tuple(small.design.x_names[kept[j]] for j in np.flatnonzero(outside))
    same = not names and p0 == p1
    # X_small = X_large R^-1 C
    ratio = 2.0 * float(np.linalg.slogdet(factor.inverse @ C)[1]) if same else 0.0
    return FixedNesting(names, same, ratio)


def random_nesting(small: Fit, large: Fit) -> RandomNesting:
    """Compare the random effects of two fits to the same rows."""
    if _same_terms(small, large):
        return RandomNesting.SAME
    if "cov_re" in (small.settings.fix or {}) or "cov_re" in (large.settings.fix or {}):
        return RandomNesting.UNKNOWN
    # A structure that is not linear can be compared with itself only.
    hulls = [_hull(term) for term in large.terms]
    linear = [_is_linear(term, hull) for term, hull in zip(large.terms, hulls, strict=True)]
    matched = [
        (a, b)
        for a in range(len(small.terms))
        for b in range(len(large.terms))
        if not linear[b] and _same_term(small, a, large, b)
    ]
    left_out = sum(not each for each in linear) > len({b for _, b in matched})
    own = {a for a, _ in matched}
    compared = {a: _hull(term) for a, term in enumerate(small.terms) if a not in own}
    if not compared:
        return RandomNesting.BOUNDARY
    ours = [(a, E) for a, hull in compared.items() for E in hull]
    theirs = [(b, E) for b, hull in enumerate(hulls) if linear[b] for E in hull]
    count = len(theirs) + 1 + SPARE
    values: list[Array] = []
    squares: list[Array] = []
    for residual, left, right in _probes(small.design, large.design, count):
        squares.append(np.concatenate([np.diag(moment) for moment in right]))
        values.append(
            np.array(
                [np.sum(E * left[a]) for a, E in ours]
                + [np.sum(E * right[b]) for b, E in theirs]
                + [residual]
            )
        )
    probes = np.array(values)
    inner, outer = probes[:, : len(ours)], probes[:, len(ours) :]
    unit = np.linalg.norm(outer, axis=0)
    solution, _, rank, _ = np.linalg.lstsq(outer / unit, inner, rcond=None)
    gap = np.linalg.norm(inner - (outer / unit) @ solution, axis=0)
    if np.any(gap > SPAN_TOLERANCE * np.linalg.norm(inner, axis=0)):
        return RandomNesting.UNKNOWN if left_out else RandomNesting.NOT_NESTED
    if left_out or rank < outer.shape[1]:
        # A structure without variance, or directions that cannot be told apart.
        return RandomNesting.BOUNDARY
    # Where the larger model has to be for an interior point of the smaller one.
    interior = np.concatenate([_interior(hull) for hull in compared.values()])
    there = (solution @ interior)[:-1] / unit[:-1]
    sizes = np.split(
        np.linalg.norm(squares, axis=0), np.cumsum([term.width for term in large.terms])[:-1]
    )
    terms = [
        (sum(value * E for value, (at, E) in zip(there, theirs, strict=True) if at == b), sizes[b])
        for b in range(len(large.terms))
        if linear[b]
    ]
    return _place([(np.asarray(E), size) for E, size in terms])


def covariances_like(small: Submodel, large: Fit) -> Array:
    """Return where a larger model has about the covariance of a smaller one's fit.

    Exact if the larger model can have it; variances are not negative in any case.

    Args:
        small: the smaller model, fitted.
        large: the larger one.

    Returns:
        Covariance of the larger model's random effects, natural units, (q, q).
    """
    found = np.zeros_like(np.asarray(large.cov_re))
    if small.fit is None:
        return found
    fit, Psi = small.fit, np.asarray(small.fit.cov_re)
    same = {
        b: a
        for a in reversed(range(len(fit.terms)))
        for b in range(len(large.terms))
        if _same_term(fit, a, large, b)
    }
    if len(set(same.values())) == len(fit.terms):
        for b, a in same.items():
            found[large.terms[b].columns, large.terms[b].columns] = _block(Psi, fit.terms[a])
        return found
    theirs = [(b, E) for b, term in enumerate(large.terms) for E in _hull(term)]
    rows, asked = [], []
    for residual, left, right in _probes(fit.design, large.design, len(theirs) + 1 + SPARE):
        rows.append([*(np.sum(E * right[b]) for b, E in theirs), residual])
        known = [np.sum(_block(Psi, term) * left[a]) for a, term in enumerate(fit.terms)]
        asked.append(np.sum(known) + fit.estimates.scale * residual)
    unit = np.linalg.norm(rows, axis=0)
    weights = np.linalg.lstsq(np.array(rows) / unit, np.array(asked), rcond=None)[0] / unit
    for weight, (b, E) in zip(weights, theirs, strict=False):
        found[large.terms[b].columns, large.terms[b].columns] += weight * E
    for term in large.terms:
        values, vectors = np.linalg.eigh(_block(found, term))
        found[term.columns, term.columns] = (vectors * values.clip(min=0.0)) @ vectors.T
    return found


def _block(Psi: Array, term: TermColumns) -> Array:
    return Psi[term.columns, term.columns]


def _place(terms: list[tuple[Array, Array]]) -> RandomNesting:
    """Return whether covariances are inside of what they can be, or at the boundary.

    Args:
        terms: per term its covariance (q, q), and for each effect the size of one unit of its
            variance, comparable between terms, (q,).
    """
    variances = np.concatenate([np.diag(E) * sizes for E, sizes in terms])
    limit = SPAN_TOLERANCE * np.max(np.abs(variances))
    if np.min(variances) < -limit:
        return RandomNesting.UNKNOWN
    if np.min(variances) <= limit:
        return RandomNesting.BOUNDARY
    units = [np.sqrt(np.diag(E)) for E, _ in terms]
    smallest = min(
        np.linalg.eigvalsh(E / np.outer(unit, unit))[0]
        for (E, _), unit in zip(terms, units, strict=True)
    )
    if smallest < -SPAN_TOLERANCE:
        return RandomNesting.UNKNOWN
    return RandomNesting.BOUNDARY if smallest <= SPAN_TOLERANCE else RandomNesting.INSIDE


def _same_terms(small: Fit, large: Fit) -> bool:
    return len(small.terms) == len(large.terms) and all(
        _same_term(small, i, large, i) for i in range(len(small.terms))
    )


def _same_term(small: Fit, a: int, large: Fit, b: int) -> bool:
    """Return whether two terms are the same: structure, effects, groups and their relations."""
    one, other = small.design.blocks[a], large.design.blocks[b]
    first = small.design.groupings[one.grouping]
    second = large.design.groupings[other.grouping]
    if first.root is None or second.root is None:
        related = first.root is second.root
    else:
        related = np.array_equal(first.root, second.root)
    return (
        one.covariance == other.covariance
        and one.Z.shape == other.Z.shape
        and np.array_equal(first.codes, second.codes)
        and related
        and np.array_equal(one.Z, other.Z)
    )


def _probes(
    small: Design, large: Design, count: int
) -> Iterator[tuple[float, list[Array], list[Array]]]:
    """Yield ``u' W^-1 v`` and the moments of two models for random u and v."""
    noise = np.random.default_rng(0)
    for _ in range(count):
        u, v = noise.standard_normal((2, len(small.y)))
        weights = large.weights
        residual = float(u @ v if weights is None else (u / weights) @ v)
        yield residual, _moments(small, u, v), _moments(large, u, v)


def _moments(design: Design, u: Array, v: Array) -> list[Array]:
    """Return ``sum_i Z_i'u_i v_i'Z_i`` of each term, (q, q), made symmetric."""
    found = []
    for block in design.blocks:
        grouping = design.groupings[block.grouping]
        m = len(grouping.levels)
        left, right = (
            np.column_stack(
                [np.bincount(grouping.codes, column * w, minlength=m) for column in block.Z.T]
            )
            for w in (u, v)
        )
        if grouping.root is not None:
            left, right = grouping.root.T @ left, grouping.root.T @ right
        product = left.T @ right
        found.append(0.5 * (product + product.T))
    return found


def _samples(term: TermColumns) -> list[Array]:
    """Return covariances that a structure can have, enough of them to span all."""
    q = term.width
    noise = np.random.default_rng(1)
    size = term.covariance.n_parameters(q)
    thetas = noise.uniform(-1.5, 1.5, (q * (q + 1) // 2 + 2, size))
    return [np.asarray(matrix_at(term.covariance, theta, q)) for theta in thetas]


def _hull(term: TermColumns) -> list[Array]:
    """Return matrices whose linear combinations hold all covariances of a term, independent."""
    if term.pattern is not None:
        return list(directions(term))
    samples = np.array([matrix.ravel() for matrix in _samples(term)])
    _, sizes, vectors = np.linalg.svd(samples, full_matrices=False)
    rank = int(np.sum(sizes > SPAN_TOLERANCE * sizes[0]))
    return [row.reshape(term.width, term.width) for row in vectors[:rank]]


def _is_linear(term: TermColumns, hull: list[Array]) -> bool:
    """Return whether the covariances of a term are all those in the span of its hull."""
    return term.pattern is not None or len(hull) == term.covariance.n_parameters(term.width)


def _interior(hull: list[Array]) -> Array:
    """Return weights of matrices that give about the identity, which no variance at zero does."""
    q = len(hull[0])
    columns = np.array([matrix.ravel() for matrix in hull]).T
    weights, *_ = np.linalg.lstsq(columns, np.eye(q).ravel(), rcond=None)
    return np.asarray(weights)
