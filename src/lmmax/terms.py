"""Terms of a part of a formula: which columns are theirs, and of which factors these are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

__all__ = ["CodedTerms", "Coding", "Element", "Term"]


class Coding(Protocol):
    """How a categorical factor is turned into columns."""

    @property
    def levels(self) -> tuple[Any, ...]:
        """The levels in order."""

    def matrix(self, reduced: bool) -> np.ndarray:
        """Return the columns' values by level, (levels, columns), with or without all levels."""


class Element(NamedTuple):
    """One factor's part in a column: the column is the product of its elements.

    Attributes:
        factor: the factor, a column of the data or an expression.
        column: position among the columns of the factor.
        reduced: whether a categorical factor is coded by contrasts, one column less than levels.
    """

    factor: str
    column: int
    reduced: bool = False


@dataclass(frozen=True)
class Term:
    """A term such as ``x:f`` and its columns.

    Attributes:
        label: the term as text.
        factors: the factors that it is made of; empty for the intercept.
        columns: its columns in the matrix.
        elements: per column, the elements whose product it is.
    """

    label: str
    factors: tuple[str, ...]
    columns: slice
    elements: tuple[tuple[Element, ...], ...]


@dataclass(frozen=True)
class CodedTerms:
    """The terms of the fixed effects, or of the left side of a random term's bar.

    Attributes:
        terms: the terms in the order of their columns, the intercept among them.
        codings: of the categorical factors, by name; the other factors are numeric.
    """

    terms: tuple[Term, ...]
    codings: Mapping[str, Coding] = field(default_factory=dict)

    @property
    def named(self) -> tuple[Term, ...]:
        """The terms without the intercept."""
        return tuple(term for term in self.terms if term.factors)

    @property
    def intercept(self) -> Term | None:
        """The intercept, None if there is no such column."""
        return next((term for term in self.terms if not term.factors), None)

    def numeric(self, term: Term) -> frozenset[str]:
        """Numeric factors of a term."""
        return frozenset(name for name in term.factors if name not in self.codings)

    def containing(self, term: Term) -> tuple[Term, ...]:
        """Terms that contain a term: the same numeric factors, more categorical ones.

        The definition of SAS (The Four Types of Estimable Functions) and lmerTest.
        """
        return tuple(
            other
            for other in self.named
            if set(term.factors) < set(other.factors) and self.numeric(term) == self.numeric(other)
        )

    def droppable(self) -> tuple[Term, ...]:
        """Terms that respect marginality when left out: no other term has all their factors."""
        return tuple(
            term
            for term in self.named
            if not any(set(term.factors) < set(other.factors) for other in self.named)
        )


def plain_terms(names: tuple[str, ...], X: np.ndarray) -> CodedTerms:
    """Return terms for a matrix without a formula: each column is one, a column of ones none.

    Args:
        names: names of the columns, (p,).
        X: the matrix, (n, p).
    """
    terms = []
    for j, name in enumerate(names):
        column = X[:, j]
        # The first rows tell most columns from the intercept.
        ones = bool((column[:8] == 1.0).all()) and bool((column == 1.0).all())
        factors = () if ones else (name,)
        elements = tuple(Element(factor, 0) for factor in factors)
        terms.append(Term(name, factors, slice(j, j + 1), (elements,)))
    return CodedTerms(tuple(terms))
