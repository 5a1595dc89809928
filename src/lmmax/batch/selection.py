"""A smaller model of a design: some of its columns, chosen by a formula, with no look at the data.

Columns of a term depend on which other terms there are: ``f`` has a column less beside an
intercept.  So a term can be left out where the coding of those that stay does not depend on it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from ..covariances import Covariance, Effects, covariance
from ..encoding import terms_by_factors
from ..formula import FormulaError, parse_formula
from ..frames import DataError, listing
from ..levels import level_numbers
from ..matrices import Design, RandomBlock
from ..spec import ModelSpec, RandomTerm
from ..terms import CodedTerms, Term

Key = frozenset[str]
"""A term: the factors that it is made of."""


def selected(design: Design, formula: str | ModelSpec | None, columns: Any = None) -> Design:
    """Return the design of a smaller model.

    Args:
        design: a design, of any number of rows.
        formula: the model, of terms that the design has; None for all of them.
        columns: names of columns of X to keep; None for all.

    Raises:
        DataError: for a term or column that the design does not have.
    """
    if formula is not None:
        design = _by_formula(design, _read(formula, design))
    if columns is None:
        return design
    asked = [columns] if isinstance(columns, str) else list(columns)
    absent = [name for name in asked if name not in design.x_names]
    if absent:
        raise DataError(
            f"columns has the name {absent[0]!r}; the columns are "
            f"{listing(map(repr, design.x_names))}"
        )
    kept = [j for j, name in enumerate(design.x_names) if name in asked]
    return _with_columns(design, kept, _of_columns(design.terms, kept))


def _read(formula: str | ModelSpec, design: Design) -> ModelSpec:
    if isinstance(formula, str):
        _, tilde, rest = formula.partition("~")
        if not tilde:
            parse_formula(formula)  # raises
        formula = parse_formula(f"response ~ {rest}")
    if not isinstance(formula, ModelSpec):
        raise TypeError(f"formula must be text or a ModelSpec, not {type(formula).__name__}")
    offsets = design.spec.offsets
    if formula.offsets and formula.offsets != offsets:
        raise DataError(
            "the formula has an offset other than that of the statistics, from which it was taken "
            f"out ({listing(offsets) or 'there was none'}); leave it out of the formula"
        )
    if not formula.random:
        raise FormulaError(
            "the formula has no random term; keep one of "
            f"{listing(str(term) for term in design.spec.random)}"
        )
    return replace(formula, response=design.spec.response, offsets=offsets)


def _by_formula(design: Design, spec: ModelSpec) -> Design:
    kept, terms = _chosen(spec.fixed, [design.terms], "the fixed effects")
    small = _with_columns(design, [j for _, j in kept], terms)
    known = [frozenset(names) for names in design.spec.group_columns]
    groupings, blocks = [], []
    for names in spec.group_columns:
        if frozenset(names) not in known:
            raise DataError(
                f"the grouping factor {':'.join(names)!r} is not in the statistics, which have "
                f"{listing(repr(grouping.name) for grouping in design.groupings)}"
            )
        groupings.append(known.index(frozenset(names)))
    for term in spec.random:
        factor = groupings[spec.grouping_of(term)]
        own = [block for block in design.blocks if block.grouping == factor]
        where, terms = _chosen(term.design, [block.terms for block in own], f"the term {term}")
        if not where:
            raise DataError(f"the random term {term} has no column: its design is empty")
        Z = np.stack([own[b].Z[:, j] for b, j in where], axis=1)
        names = tuple(own[b].names[j] for b, j in where)
        structure = _prepared(term, names, terms, own)
        blocks.append(RandomBlock(term, spec.grouping_of(term), Z, names, structure, terms))
    return replace(
        small,
        spec=spec,
        blocks=tuple(blocks),
        groupings=tuple(design.groupings[at] for at in groupings),
    )


def _chosen(
    text: str, stored: list[CodedTerms], what: str
) -> tuple[list[tuple[int, int]], CodedTerms]:
    """Return the columns of the terms of a part of a formula, and the terms as they are there.

    Args:
        text: the part of the formula.
        stored: the terms that there are, in one or several matrices.
        what: the part, for messages.

    Returns:
        Per column, the matrix and the position in it.
    """
    asked = terms_by_factors(text)
    have = {
        frozenset(term.factors): (at, term)
        for at, terms in enumerate(stored)
        for term in terms.terms
    }
    for key, label in asked.items():
        if key not in have:
            shown = listing(repr(_shown(term.label)) for _, term in have.values())
            raise DataError(
                f"{what}: the statistics have no term {_shown(label)!r}; their terms are {shown}"
            )
    columns, terms, at = [], [], 0
    codings: dict[str, Any] = {}
    for key, (matrix, term) in have.items():
        if key not in asked:
            continue
        coded = stored[matrix].codings
        before = _margins(key, [frozenset(t.factors) for t in stored[matrix].terms], coded)
        now = _margins(key, asked, coded)
        for other in before ^ now:
            name = _shown(asked.get(other) or have[other][1].label)
            was, has, remedy = (
                ("beside", "lacks", "keep it")
                if other in before
                else ("without", "has", "leave it out")
            )
            raise DataError(
                f"{what}: the columns of {term.label!r} were coded {was} {name!r}, which the "
                f"formula {has}; {remedy}, or make statistics of the smaller model"
            )
        width = term.columns.stop - term.columns.start
        columns += [(matrix, j) for j in range(term.columns.start, term.columns.stop)]
        terms.append(replace(term, columns=slice(at, at + width)))
        codings |= {name: coded[name] for name in term.factors if name in coded}
        at += width
    return columns, CodedTerms(tuple(terms), codings)


def _margins(key: Key, terms: Iterable[Key], categorical: Collection[str]) -> set[Key]:
    """Return the terms on which the coding of a term depends: it less some categorical factors."""
    return {other for other in terms if other < key and key - other <= set(categorical)}


def _shown(label: str) -> str:
    """Return a term as text, the intercept by its name."""
    return "Intercept" if label == "1" else label


def _with_columns(design: Design, kept: Sequence[int], terms: CodedTerms) -> Design:
    return replace(
        design,
        X=np.asfortranarray(design.X[:, list(kept)]),
        x_names=tuple(design.x_names[j] for j in kept),
        terms=terms,
    )


def _of_columns(terms: CodedTerms, kept: Sequence[int]) -> CodedTerms:
    """Return the terms on some of their columns."""
    found, at = [], 0
    for term in terms.terms:
        here = range(term.columns.start, term.columns.stop)
        elements = tuple(e for j, e in zip(here, term.elements, strict=True) if j in kept)
        if elements:
            place = slice(at, at + len(elements))
            found.append(Term(term.label, term.factors, place, elements))
            at = place.stop
    return CodedTerms(tuple(found), terms.codings)


def _prepared(
    term: RandomTerm, names: tuple[str, ...], terms: CodedTerms, stored: Sequence[RandomBlock]
) -> Covariance:
    """Return the covariance structure of a random term, told about the order of its effects."""
    for block in stored:
        if (block.term.design, block.term.covariance) == (term.design, term.covariance):
            return block.covariance
    return structure_of(term, names, terms)


def structure_of(
    term: RandomTerm, names: tuple[str, ...], terms: CodedTerms, ordered: bool | None = None
) -> Covariance:
    """Return the covariance structure of a random term of a design without rows.

    Args:
        term: the term.
        names: its effects.
        terms: the terms of its columns.
        ordered: whether the levels of its factor have an order; by the levels if None.
    """
    factor, levels = "", None
    if len(terms.terms) == 1 and len(terms.codings) == 1:
        factor, coding = next(iter(terms.codings.items()))
        levels = coding.levels if len(coding.levels) == len(names) else None
    if ordered is None:
        numbers = level_numbers(levels or ())
        ordered = bool(numbers) and all(a < b for a, b in pairwise(numbers or ()))
    return covariance(term.covariance).prepare(Effects(names, levels, ordered, str(term), factor))
