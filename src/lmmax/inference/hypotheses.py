"""What an analysis of variance tests: for each fixed-effects term a matrix L, ``L beta = 0``.

The overparametrised design of SAS has an indicator for every cell of a term's categorical factors,
times its numeric factors.  Its columns are ``X M``, where M follows from the codings alone, and
``X = Q R A`` holds all that matters of the rows, so no such design is ever made.  A expresses the
aliased columns by those that were kept, whose coordinates R are those of orthonormal columns Q; its
columns are those of ``W = R A M``, in as many coordinates as coefficients can be estimated.

The estimable functions are ``a' W``.  A hypothesis on a term is a space of these, of the vectors a,
that follows from W alone, whatever coefficients the terms were coded by and whichever columns were
dropped as aliased.  With ``W = [W_o, W_t, W_c]`` for the other terms, the term itself, and those
that do not count as other (the later ones for type I, the terms that contain it for II and III):

* types I and II: what ``W_t`` adds to the span of ``W_o``;
* type III: those a in the complement of ``W_o`` whose functions ``a' W`` are orthogonal to all that
  involve ``W_c`` only.

Both have as many dimensions as ``W_t`` adds to the rank of ``W_o``.

Sources: SAS/STAT User's Guide, "The Four Types of Estimable Functions"; Goodnight (1978), SAS
Technical Report R-101; Kuznetsova, Brockhoff and Christensen (2017), J. Stat. Softw. 82(13), for
their meaning in mixed models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from ..compress.columns import Dependence, column_factor
from ..terms import CodedTerms, Element, Term

if TYPE_CHECKING:
    from ..results import Fit

Array: TypeAlias = np.ndarray
SumsOfSquares = Literal["I", "II", "III"]
RANK_TOLERANCE = 1e-9
"""A column adds to the span of others if they leave more than this fraction of it: less than what
counts as aliased, since no column that was kept for the model may be lost here."""
ROUNDING = 1e-12
"""A sum below this fraction of the size of its terms is zero."""

# A coordinate: the numeric columns that are multiplied, and the levels, never a first one, that
# must be met.  Each column of a design is one combination of these, whatever the data.
_Product = tuple[tuple[str, int], ...]
_Coordinate = tuple[_Product, frozenset[tuple[str, int]]]
# A column of a categorical factor: its part at each level but the first, and everywhere (None).
_Factor = list[tuple[tuple[str, int] | None, float]]


@dataclass(frozen=True)
class Cells:
    """The overparametrised design of some terms, ``X M``.

    Attributes:
        M: its columns as combinations of those of X, (p, c).
        slices: columns of each term, by label; those of the intercept under "".
        plain: whether a column is among those of treatment coding in every factor, (c,).
        names: names of the columns, such as ``f[a]:x``, (c,).
    """

    M: np.ndarray
    slices: dict[str, slice]
    plain: np.ndarray
    names: tuple[str, ...]


def cells(coded: CodedTerms) -> Cells:
    """Return the overparametrised design of terms."""
    used = {
        (element.factor, element.reduced)
        for term in coded.terms
        for elements in term.elements
        for element in elements
        if element.factor in coded.codings
    }
    codings = {
        (name, reduced): [_factor(name, column) for column in coded.codings[name].matrix(reduced).T]
        for name, reduced in used
    }
    units = {
        name: [_factor(name, unit) for unit in np.eye(len(coding.levels))]
        for name, coding in coded.codings.items()
    }
    columns = [
        _coordinates(*_factors(codings, elements))
        for term in coded.terms
        for elements in term.elements
    ]
    wanted: list[dict[_Coordinate, float]] = []
    plain: list[bool] = []
    names: list[str] = []
    slices = {}
    for term in coded.terms:
        start = len(wanted)
        for product, levels in _cells_of(coded, term):
            wanted.append(_coordinates(product, [units[name][i] for name, i in levels.items()]))
            plain.append(all(level > 0 for level in levels.values()))
            names.append(_name(coded, term, product, levels))
        slices[term.label if term.factors else ""] = slice(start, len(wanted))
    rows: dict[_Coordinate, int] = {}
    for coordinate in itertools.chain(*columns, *wanted):
        rows.setdefault(coordinate, len(rows))
    M = _solve(_dense(columns, rows), _dense(wanted, rows))
    return Cells(M, slices, np.array(plain, dtype=bool), tuple(names))


def _factors(
    codings: Mapping[tuple[str, bool], Sequence[_Factor]], elements: Sequence[Element]
) -> tuple[_Product, list[_Factor]]:
    """Return a column as a product: its numeric columns, and its categorical factors.

    Args:
        codings: the columns of categorical factors, by factor and whether reduced.
        elements: what the column is made of.
    """
    product, factors = [], []
    for element in elements:
        coding = codings.get((element.factor, element.reduced))
        if coding is None:
            product.append((element.factor, element.column))
        else:
            factors.append(coding[element.column])
    return tuple(sorted(product)), factors


def _factor(name: str, by_level: np.ndarray) -> _Factor:
    """Return a column of a categorical factor by its values at each level."""
    rest = by_level[1:] - by_level[0]
    part: _Factor = [((name, int(j) + 1), float(rest[j])) for j in np.flatnonzero(rest)]
    return [*part, (None, float(by_level[0]))] if by_level[0] else part


def _coordinates(product: _Product, factors: Sequence[_Factor]) -> dict[_Coordinate, float]:
    """Return the coordinates of a column, those that are not zero."""
    found = {}
    for combination in itertools.product(*factors):
        levels = frozenset(level for level, _ in combination if level is not None)
        found[product, levels] = math.prod(weight for _, weight in combination)
    return found


def _cells_of(coded: CodedTerms, term: Term) -> Iterator[tuple[_Product, dict[str, int]]]:
    """Yield the cells of a term: numeric columns and the level of each categorical factor."""
    products = dict.fromkeys(
        tuple(sorted((e.factor, e.column) for e in elements if e.factor not in coded.codings))
        for elements in term.elements
    )
    categorical = [name for name in term.factors if name in coded.codings]
    # The first factor's levels run fastest, as in R.
    for index in np.ndindex(*(len(coded.codings[name].levels) for name in categorical[::-1])):
        levels = dict(zip(categorical, index[::-1], strict=True))
        for product in products:
            yield product, levels


def _name(coded: CodedTerms, term: Term, product: _Product, levels: Mapping[str, int]) -> str:
    """Return the name of a cell."""
    numeric = dict(product)
    parts = []
    for factor in term.factors:
        if factor in levels:
            parts.append(f"{factor}[{coded.codings[factor].levels[levels[factor]]}]")
        elif numeric.get(factor):
            parts.append(f"{factor}[{numeric[factor]}]")
        else:
            parts.append(factor)
    return ":".join(parts)


def _dense(columns: Sequence[dict[_Coordinate, float]], rows: Mapping[_Coordinate, int]) -> Array:
    matrix = np.zeros((len(rows), len(columns)))
    for j, column in enumerate(columns):
        for coordinate, weight in column.items():
            matrix[rows[coordinate], j] = weight
    return matrix


def _solve(B: Array, wanted: Array) -> Array:
    """Return M with ``B M = wanted``; B has independent columns."""
    if B.shape[0] == B.shape[1]:
        ones = (B == 1.0).sum(axis=0), (B == 1.0).sum(axis=1)
        if np.count_nonzero(B) == len(B) and np.all(ones[0] == 1) and np.all(ones[1] == 1):
            return B.T @ wanted  # a permutation: treatment coding
        return np.linalg.solve(B, wanted)
    return np.linalg.lstsq(B, wanted, rcond=None)[0]


@dataclass(frozen=True)
class FixedTerms:
    """The fixed-effects terms of a fit, and all of the data that hypotheses on them depend on.

    Attributes:
        coded: the terms and their columns.
        kept: columns of X that are not aliased, (p,).
        A: all columns by those that are kept, ``X = X_kept A``, (p, p_all).
        R: these in orthonormal coordinates, ``X_kept = Q R``, (p, p).
    """

    coded: CodedTerms
    kept: Array
    A: Array
    R: Array

    @cached_property
    def cells(self) -> Cells:
        """The overparametrised design."""
        return cells(self.coded)

    @cached_property
    def W(self) -> Array:
        """The overparametrised design in orthonormal coordinates, ``Q' X M``, (p, c)."""
        T = self.R @ self.A
        W = T @ self.cells.M
        whole = np.linalg.norm(T, axis=0) @ np.abs(self.cells.M)
        return np.where(np.linalg.norm(W, axis=0) <= ROUNDING * whole, 0.0, W)

    @cached_property
    def empty(self) -> tuple[str, ...]:
        """Names of the cells that have no observation."""
        zero = ~np.any(self.W, axis=0)
        return tuple(itertools.compress(self.cells.names, zero))

    def columns(self, term: Term) -> Array:
        """Positions, among the columns kept, of those of a term."""
        inside = (self.kept >= term.columns.start) & (self.kept < term.columns.stop)
        return np.flatnonzero(inside)

    def test(self, kind: SumsOfSquares) -> dict[str, Array]:
        """Return the hypothesis of each term, ``L (r, p)`` of full row rank, by its label.

        No row is left, r = 0, of a term of which the other terms hold all.
        """
        return {term.label: self._hypothesis(term, kind) for term in self.coded.named}

    def by_coefficients(self, term: Term) -> bool:
        """Return whether a type II hypothesis is that on the coefficients of the term's columns.

        That is what lmerTest tests.  It may be another one where columns were dropped, or are
        coded without regard to a term beside them.
        """
        last = {other.label for other in self.coded.containing(term)}
        here = self.columns(term)
        later = [self.columns(other) for other in self.coded.named if other.label in last]
        others = np.setdiff1d(np.arange(len(self.kept)), np.concatenate([here, *later]))
        rest, _, a = self._spaces(term, last)
        return (
            (len(others), len(here)) == (rest.shape[1], a.shape[1])
            and _within(rest, self.R[:, others])
            and _within(np.hstack([rest, a]), self.R[:, here])
        )

    def lacking(self, kind: SumsOfSquares) -> list[str]:
        """Return the terms within interactions some of whose parts are no terms of the model.

        Such as ``f`` in ``f / h``, or ``x`` in ``x + x:f``: what such a term means depends on how
        the interaction is coded.  For type II hypotheses that is so of an interaction itself, too,
        if none of its parts is in the model.
        """
        known = {frozenset(term.factors) for term in self.coded.named}
        found = []
        for term in self.coded.named:
            own = frozenset(term.factors)
            within = [frozenset(other.factors) for other in self.coded.containing(term)]
            partial = any(not _parts(other) <= known for other in within)
            alone = len(own) > 1 < len(known) and not _parts(own) & known
            if partial or (kind == "II" and alone and self.coded.intercept is None):
                found.append(term.label)
        return found

    def _last(self, term: Term, kind: SumsOfSquares) -> set[str]:
        """Return the labels of the terms that a term is not adjusted for."""
        if kind == "I":
            labels = [other.label for other in self.coded.named]
            return set(labels[labels.index(term.label) + 1 :])
        return {other.label for other in self.coded.containing(term)}

    def _spaces(self, term: Term, last: AbstractSet[str]) -> tuple[Array, Array, Array]:
        """Return what the hypothesis of a term follows from.

        Args:
            term: the term.
            last: labels of the terms that it is not adjusted for.

        Returns:
            An orthonormal basis of what it is adjusted for, (p, r_o), its own cells, (p, c_t), and
            a basis of what these add, (p, r).
        """
        key = (term.label, frozenset(last))
        if key not in self._known:
            others = np.ones(self.W.shape[1], dtype=bool)
            for label in (term.label, *last):
                others[self.cells.slices[label]] = False
            rest = _added(self.W[:, :0], self.W[:, others])
            own = self.W[:, self.cells.slices[term.label]]
            self._known[key] = rest, own, _added(rest, own)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[str, frozenset[str]], tuple[Array, Array, Array]]:
        return {}

    def _hypothesis(self, term: Term, kind: SumsOfSquares) -> Array:
        last = self._last(term, kind)
        rest, own, a = self._spaces(term, last)
        r = a.shape[1]
        sequential = kind == "I" or (kind == "II" and last) or len(self.coded.named) == 1
        if kind == "III" and last:
            containing = np.hstack([self.W[:, self.cells.slices[label]] for label in sorted(last)])
            pure = _added(np.hstack([rest, a]), containing)
            both = np.hstack([own, containing]).T
            a = a - pure @ np.linalg.lstsq(both @ pure, both @ a, rcond=None)[0]
        # Satterthwaite's degrees of freedom of a joint test depend on the rows that stand for a
        # hypothesis: those of lmerTest in treatment coding, where they are a basis of it, and
        # else an orthonormal one, of which all have the same degrees of freedom.
        plain = self.cells.plain[self.cells.slices[term.label]]
        for chosen in (own[:, plain], own):
            if chosen.shape[1] != r:
                continue
            part = a.T @ chosen
            sizes = np.linalg.norm(part, axis=0)
            if not np.all(sizes) or np.linalg.cond(part / sizes) > 1.0 / RANK_TOLERANCE:
                continue
            if sequential:
                Q, triangle = np.linalg.qr(part)
                a = a @ (Q / np.diag(triangle))
            else:
                a = np.linalg.solve(part, a.T).T
            break
        L = a.T @ self.R
        sizes = np.outer(np.linalg.norm(a, axis=0), np.linalg.norm(self.R, axis=0))
        return np.where(np.abs(L) <= ROUNDING * sizes, 0.0, L)

    def without(self, term: Term) -> tuple[Array, Array]:
        """Return what leaving out a term means.

        Returns:
            The hypothesis L (r, p), and B (p, p - r): the columns of the smaller model are
            ``X_kept B``.
        """
        rest, _, _ = self._spaces(term, frozenset())
        L = self._hypothesis(term, "II")
        others = np.setdiff1d(np.arange(len(self.kept)), self.columns(term))
        if len(others) == rest.shape[1] and _within(rest, self.R[:, others]):
            # Nothing of the term is left in the others: its columns are what is tested.
            return L, np.eye(len(self.kept))[:, others]
        cells = np.delete(np.arange(self.W.shape[1]), np.r_[self.cells.slices[term.label]])
        cells = cells[_independent_columns(self.W[:, cells])]
        B = self.A @ self.cells.M[:, cells]
        whole = np.abs(self.A) @ np.abs(self.cells.M[:, cells])
        return L, np.where(np.abs(B) <= ROUNDING * whole, 0.0, B)


def _parts(factors: frozenset[str]) -> set[frozenset[str]]:
    """Return the proper subsets of an interaction's factors, but for the empty one."""
    names = sorted(factors)
    return {
        frozenset(part) for r in range(1, len(names)) for part in itertools.combinations(names, r)
    }


def _added(basis: Array, columns: Array) -> Array:
    """Return an orthonormal basis of what columns add to the span of an orthonormal basis.

    Each column counts in units of its own size.
    """
    sizes = np.linalg.norm(columns, axis=0)
    real = sizes > 0.0
    left = _without(basis, columns[:, real] / sizes[real])
    vectors, values, _ = np.linalg.svd(left, full_matrices=False)
    rank = int(np.sum(values > RANK_TOLERANCE))
    if not rank or not basis.shape[1]:
        return np.asarray(vectors[:, :rank])
    # Little may be left of all columns: then what is left is orthogonal to rounding of the whole.
    return np.asarray(np.linalg.qr(_without(basis, vectors[:, :rank]))[0])


def _within(basis: Array, columns: Array) -> bool:
    """Return whether columns add nothing to the span of an orthonormal basis."""
    left = np.linalg.norm(_without(basis, columns), axis=0)
    return bool(np.all(left <= RANK_TOLERANCE * np.linalg.norm(columns, axis=0)))


def _without(basis: Array, columns: Array) -> Array:
    """Return columns without their parts in the span of an orthonormal basis."""
    for _ in range(2):  # twice is enough (Giraud et al., 2005)
        columns = columns - basis @ (basis.T @ columns)
    return columns


def _independent_columns(columns: Array) -> Array:
    """Return the columns that are no combinations of those before them, by position."""
    basis = np.zeros((len(columns), 0))
    chosen: list[int] = []
    for j, column in enumerate(columns.T):
        size = np.linalg.norm(column)
        rest = column
        for _ in range(2):  # twice is enough (Giraud et al., 2005)
            rest = rest - basis @ (basis.T @ rest)
        left = np.linalg.norm(rest)
        if left > RANK_TOLERANCE * size and len(chosen) < len(columns):
            basis = np.column_stack([basis, rest / left])
            chosen.append(j)
    return np.array(chosen, dtype=int)


def fixed_terms(fit: Fit) -> FixedTerms:
    """Return the fixed-effects terms of a fit; the rows are seen only if weighted or aliased."""
    layout, R = fit.layout, fit.layout.fixed.R
    if layout.weights is not None:
        # Sums of squares of X are not weighted, as in lmerTest.
        R = column_factor(layout.X[:, layout.fixed.kept], None).R
    return terms_of_columns(fit.design.terms, R, layout.dependence)


def terms_of_columns(coded: CodedTerms, R: Array, dependence: Dependence) -> FixedTerms:
    """Return terms with all that matters of their columns.

    Args:
        coded: the terms.
        R: factor of the columns kept, without weights, (p, p).
        dependence: the others by these.
    """
    kept, aliased = dependence.kept, dependence.aliased
    A = np.zeros((len(kept), len(kept) + len(aliased)))
    A[:, kept], A[:, aliased] = np.eye(len(kept)), dependence.A
    return FixedTerms(coded, kept, A, R)
