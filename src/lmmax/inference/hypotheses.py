"""What an analysis of variance tests: for each fixed-effects term a matrix L, ``L beta = 0``.

``X = X_kept A`` expresses the aliased columns by those that were kept, and ``X_kept = Q R`` with
orthonormal Q holds all that matters of the rows.  The overparametrised design of SAS has an
indicator for every cell of a term's categorical factors, times its numeric factors.  Its columns
are ``X M``, where M follows from the codings alone, so no such design is ever made.

Sources: SAS/STAT User's Guide, "The Four Types of Estimable Functions"; Kuznetsova, Brockhoff and
Christensen (2017), J. Stat. Softw. 82(13), for their meaning in mixed models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from ..compress.columns import ALIAS_TOLERANCE, column_factor
from ..compress.rows import chunk_rows
from ..terms import CodedTerms, Element, Term

if TYPE_CHECKING:
    from ..results import Fit

Array: TypeAlias = np.ndarray
SumsOfSquares = Literal["I", "II", "III"]
RANK_TOLERANCE = 1e-8
"""A direction of a hypothesis below this fraction of the largest, for orthonormal columns of X, is
rounding."""

# A coordinate: the numeric columns that are multiplied, and the levels, never a first one, that
# must be met.  Each column of a design is one combination of these, whatever the data.
_Product = tuple[tuple[str, int], ...]
_Coordinate = tuple[_Product, frozenset[tuple[str, int]]]


@dataclass(frozen=True)
class Cells:
    """The overparametrised design of some terms, ``X M``.

    Attributes:
        M: its columns as combinations of those of X, (p, c).
        slices: columns of each term, by label; those of the intercept under "".
        plain: whether a column is among those of treatment coding, (c,).
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
    codings = {(name, reduced): coded.codings[name].matrix(reduced) for name, reduced in used}
    columns = [
        _coordinates(*_values(codings, elements))
        for term in coded.terms
        for elements in term.elements
    ]
    wanted: list[dict[_Coordinate, float]] = []
    plain: list[bool] = []
    names: list[str] = []
    slices = {}
    for term in coded.terms:
        start = len(wanted)
        reduced = _reduced(term)
        for product, levels in _cells_of(coded, term):
            units = {
                factor: np.arange(len(coded.codings[factor].levels)) == level
                for factor, level in levels.items()
            }
            wanted.append(_coordinates(product, units))
            plain.append(
                all(level > 0 or factor not in reduced for factor, level in levels.items())
            )
            names.append(_name(coded, term, product, levels))
        slices[term.label if term.factors else ""] = slice(start, len(wanted))
    rows: dict[_Coordinate, int] = {}
    for coordinate in itertools.chain(*columns, *wanted):
        rows.setdefault(coordinate, len(rows))
    M = _solve(_dense(columns, rows), _dense(wanted, rows))
    return Cells(M, slices, np.array(plain, dtype=bool), tuple(names))


def _values(
    codings: Mapping[tuple[str, bool], Array], elements: Sequence[Element]
) -> tuple[_Product, dict[str, Array]]:
    """Return a column as a product: its numeric columns, and values by level of the others.

    Args:
        codings: values of categorical factors' columns by level, by factor and whether reduced.
        elements: what the column is made of.
    """
    product, values = [], {}
    for element in elements:
        coding = codings.get((element.factor, element.reduced))
        if coding is None:
            product.append((element.factor, element.column))
        else:
            values[element.factor] = coding[:, element.column]
    return tuple(sorted(product)), values


def _coordinates(product: _Product, values: Mapping[str, np.ndarray]) -> dict[_Coordinate, float]:
    """Return the coordinates of a column, those that are not zero."""
    parts = []
    for factor, by_level in values.items():
        rest = by_level[1:].astype(float) - by_level[0]
        part: list[tuple[tuple[str, int] | None, float]] = [
            ((factor, int(j) + 1), float(rest[j])) for j in np.flatnonzero(rest)
        ]
        parts.append([*part, (None, float(by_level[0]))] if by_level[0] else part)
    found = {}
    for combination in itertools.product(*parts):
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


def _reduced(term: Term) -> set[str]:
    """Return the factors that lose a level in a term.

    If the term's columns are of several shapes, because terms that it contains are not in the
    model, none does: what is redundant is then found from the columns.
    """
    shapes = {frozenset((e.factor, e.reduced) for e in elements) for elements in term.elements}
    if len(shapes) == 1 and {name for name, _ in next(iter(shapes))} == set(term.factors):
        return {name for name, reduced in next(iter(shapes)) if reduced}
    return set()


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
        R: triangular, ``X_kept = Q R``, (p, p).
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
    def G(self) -> Array:
        """Columns of the overparametrised design by those of X that are kept, (p, c)."""
        G = self.A @ self.cells.M
        whole = np.abs(self.A) @ np.abs(self.cells.M)
        return np.where(np.abs(G) <= ALIAS_TOLERANCE * whole, 0.0, G)

    @cached_property
    def empty(self) -> tuple[str, ...]:
        """Names of the cells that have no observation."""
        zero = ~np.any(self.G, axis=0)
        return tuple(itertools.compress(self.cells.names, zero))

    def columns(self, term: Term) -> Array:
        """Positions, among the columns kept, of those of a term."""
        inside = (self.kept >= term.columns.start) & (self.kept < term.columns.stop)
        return np.flatnonzero(inside)

    def test(self, kind: SumsOfSquares) -> dict[str, Array]:
        """Return the hypothesis of each term, ``L (r, p)`` of full row rank, by its label.

        No row is left, r = 0, of a term that the terms before it alias.
        """
        terms = self.coded.named
        # The rows that stand for a hypothesis are those of lmerTest: Satterthwaite's degrees of
        # freedom of a joint test depend on them.
        if kind == "I" or len(terms) == 1:
            found = {term.label: self._sequential(term, ()) for term in terms}
        elif kind == "II":
            found = {
                term.label: self._sequential(term, containing) if containing else self._alone(term)
                for term in terms
                for containing in [self.coded.containing(term)]
            }
        else:
            found = self._type_three()
        return {label: self.independent(L) for label, L in found.items()}

    def _alone(self, term: Term) -> Array:
        """Return the hypothesis that all coefficients of a term are zero."""
        return np.eye(len(self.kept))[self.columns(term)]

    def _sequential(self, term: Term, last: Sequence[Term]) -> Array:
        """Return a term's rows of the factor of X, in the order in which columns are fitted.

        That is the order of the columns, or, if there are terms to come last, all others first and
        then the term and these.
        """
        here = self.columns(term)
        order = np.arange(len(self.kept))
        triangle = self.R
        if last:
            later = [here, *(self.columns(other) for other in last)]
            order = np.concatenate([np.setdiff1d(order, np.concatenate(later)), *later])
            triangle = np.asarray(np.linalg.qr(self.R[:, order], mode="r"))
        L = np.empty_like(triangle)
        L[:, order] = triangle / np.diag(triangle)[:, None]
        return L[np.isin(order, here)]

    def _type_three(self) -> dict[str, Array]:
        """Return type III hypotheses, from the general form of estimable functions.

        A column of ``form`` holds what one coefficient of treatment coding is, in terms of the
        cells' effects; those of a term are made orthogonal to those of the terms that contain it.
        """
        chosen = self._treatment_columns()
        to_treatment = np.linalg.inv(self.G[:, chosen])
        form = np.ascontiguousarray((to_treatment @ self.G).T)
        at = {
            label: np.flatnonzero((chosen >= here.start) & (chosen < here.stop))
            for label, here in self.cells.slices.items()
        }
        for term in sorted(self.coded.named, key=lambda term: -len(term.factors)):
            containing = [at[other.label] for other in self.coded.containing(term)]
            if containing:
                others, here = form[:, np.concatenate(containing)], at[term.label]
                part, *_ = np.linalg.lstsq(others, form[:, here], rcond=None)
                form[:, here] -= others @ part
        return {
            term.label: form[np.ix_(chosen, at[term.label])].T @ to_treatment
            for term in self.coded.named
        }

    def _treatment_columns(self) -> Array:
        """Return cells that serve as columns of X in treatment coding, (p,)."""
        candidates = np.flatnonzero(self.cells.plain)
        p = len(self.kept)
        if len(candidates) == p and len(self.kept) == self.A.shape[1]:
            return candidates
        chosen = _independent_columns(self.R @ self.G[:, candidates])
        return candidates[chosen]

    def independent(self, L: Array) -> Array:
        """Return rows that span the same hypotheses, none of them redundant.

        Judged in coordinates in which the columns of X are orthonormal.
        """
        if not len(L):
            return L
        rows = np.linalg.solve(self.R.T, L.T).T
        sizes = np.linalg.norm(rows, axis=1)
        real = sizes > RANK_TOLERANCE * max(np.max(sizes), np.finfo(float).tiny)
        L, rows = L[real], rows[real] / sizes[real, None]
        left, values, _ = np.linalg.svd(rows, full_matrices=False)
        rank = int(np.sum(values > RANK_TOLERANCE * np.max(values, initial=0.0)))
        if rank == len(L):
            return L
        return (left[:, :rank] / sizes[real, None]).T @ L

    def without(self, term: Term) -> tuple[Array, Array]:
        """Return what leaving out a term means.

        Returns:
            The hypothesis L (r, p), and B (p, p - r): the columns of the smaller model are
            ``X_kept B``.
        """
        here = self.cells.slices[term.label]
        rest = np.delete(np.arange(self.G.shape[1]), np.r_[here])
        B = self.G[:, rest]
        others = np.setdiff1d(np.arange(len(self.kept)), self.columns(term))
        outside = np.delete(B, others, axis=0)
        if not np.any(np.abs(outside) > RANK_TOLERANCE):
            # Nothing of the term is left in the others: its columns are what is tested.
            return self._alone(term), np.eye(len(self.kept))[:, others]
        B = B[:, _independent_columns(self.R @ B)]
        left, _, _ = np.linalg.svd(self.R @ B)
        return left[:, B.shape[1] :].T @ self.R, B


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
        if left > ALIAS_TOLERANCE * size and len(chosen) < len(columns):
            basis = np.column_stack([basis, rest / left])
            chosen.append(j)
    return np.array(chosen, dtype=int)


def fixed_terms(fit: Fit) -> FixedTerms:
    """Return the fixed-effects terms of a fit; the rows are seen only if weighted or aliased."""
    design, kept = fit.design, fit.layout.fixed.kept
    X = design.X
    p_all = X.shape[1]
    factor = fit.layout.fixed
    if fit.layout.weights is not None:
        # Sums of squares of X are not weighted, as in lmerTest.
        factor = column_factor(X if len(kept) == p_all else X[:, kept], None)
    A = np.eye(p_all)[kept]
    aliased = np.setdiff1d(np.arange(p_all), kept)
    if len(aliased):
        step = chunk_rows(p_all)
        products = np.zeros((len(kept), len(aliased)))
        for start in range(0, len(X), step):
            rows = X[start : start + step]
            products += (rows[:, kept] @ factor.inverse).T @ rows[:, aliased]
        A[:, aliased] = factor.inverse @ products
        A[np.abs(A) < ALIAS_TOLERANCE * np.max(np.abs(A), axis=0)] = 0.0
    return FixedTerms(design.terms, kept, A, factor.R)
