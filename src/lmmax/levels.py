"""Labels -> levels and codes: categories, grouping factors and their combinations."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from .frames import DataError, beyond_integers, listing, plural

__all__ = ["Grouping"]


@dataclass(frozen=True, eq=False)
class Grouping:
    """One grouping factor.

    Args:
        name: `"Pig"`, or `"batch:cask"` for the combinations that occur.
        codes: (n,) int64, position in `levels` of each row's group.
        levels: (m,) labels, sorted where they can be (in the order of a pandas categorical, else
            of first appearance); combinations are strings `"A:a"`.
        root: (m, m) root of the known relationship matrix of the levels, triangular, None if
            they are independent.
    """

    name: str
    codes: np.ndarray
    levels: pd.Index
    root: np.ndarray | None = None


def as_categories(values: Any, *, unused: bool = False) -> pd.Categorical:
    """Values as categories: those that occur, sorted as the levels of `Grouping` are.

    With `unused`, those of a pandas categorical that do not occur as well.
    Whole numbers become integers, because a missing value may have made them floats. The result
    counts as ordered if the data say so, or have the categories in another order than the sorted.
    """
    _check_kinds(values)
    if isinstance(values.dtype, np.dtype) and values.dtype.kind in "fiu":
        if values.dtype.kind == "f" and values.dtype != np.float32:  # half and long numbers
            values = values.astype(np.float64)
        elif not values.dtype.isnative:
            values = values.astype(values.dtype.newbyteorder("="))
    try:
        categorical = pd.Categorical(values)
    except (TypeError, NotImplementedError) as error:  # lists, dicts, sets
        name = getattr(values, "name", None)
        raise DataError(
            f"the labels of {'groups' if name is None else repr(name)} are of a kind that cannot "
            "be told apart (lists, dicts or other containers): convert them to text"
        ) from error
    if isinstance(values.dtype, pd.CategoricalDtype):
        if not categorical.categories.is_monotonic_increasing:
            categorical = categorical.as_ordered()
        if not unused:
            categorical = categorical.remove_unused_categories()
    levels = categorical.categories
    if levels.dtype == np.float64:
        values = levels.to_numpy()
        if (np.abs(values) < 2**53).all() and (values % 1 == 0).all():
            return pd.Categorical.from_codes(
                categorical.codes, values.astype(np.int64), ordered=categorical.ordered
            )
    return categorical


def _check_kinds(values: Any) -> None:
    """Raise for labels of which some are logical values and others numbers.

    To Python 1 is True and 0 is False, so they would be one label.
    """
    if values.dtype != object or not pd.api.types.infer_dtype(values).startswith("mixed"):
        return
    column = pd.Series(values)
    known = column.dropna()
    logical = known.map(lambda value: isinstance(value, (bool, np.bool_)))
    number = ~logical & known.map(lambda value: isinstance(value, numbers.Number))
    same, name = known[logical].unique(), "groups" if column.name is None else column.name
    for value in known[number].unique():
        if value in same:
            raise DataError(
                f"the labels of {name!r} hold both {value!r} and {bool(value)}, which are one "
                "label to Python: convert them to text"
            )


def level_numbers(levels: Iterable[Any]) -> tuple[float, ...] | None:
    """The levels as numbers, text being read as such; None if one of them is no finite number."""
    found = []
    for level in levels:
        if isinstance(level, (bool, np.bool_)) or not isinstance(level, (str, numbers.Real)):
            return None
        try:
            number = float(level)
        except ValueError:
            return None
        if not math.isfinite(number):
            return None
        found.append(number)
    return tuple(found)


def has_order(values: pd.Categorical) -> bool:
    """Whether the order of the levels means something: not where text is merely sorted.

    Numbers, dates and ordered categories have an order, and so has text that is numbers and sorts
    like them.
    """
    levels = values.categories
    if values.ordered or levels.dtype.kind in "mM":
        return True
    found = level_numbers(levels)
    return found is not None and all(a < b for a, b in pairwise(found))


def other_type(asked: Iterable[Any], known: pd.Index) -> Any | None:
    """A label that is none of the known ones but reads like one, None if there is no such label."""
    texts = {str(level) for level in known}
    return next((level for level in asked if level not in known and str(level) in texts), None)


def positions(known: pd.Index, asked: pd.Index) -> np.ndarray:
    """Return where each label asked for is among the known ones, -1 for one that is not, (k,)."""
    if known.dtype != asked.dtype:
        # In a type that both fit into, whole numbers might be rounded.
        known, asked = known.astype(object), asked.astype(object)
    return known.get_indexer(asked)


def label_positions(levels: pd.Index, labels: pd.Index, where: str, remedy: str) -> np.ndarray:
    """Return where each level is among the labels of a frame, (m,).

    Args:
        levels: the levels, (m,).
        labels: the labels, which may be more, in any order.
        where: what the labels are, for messages.
        remedy: what to do where a level is lacking; may be empty.

    Raises:
        DataError: for labels that come twice, and levels that are none of them.
    """
    repeated = labels[labels.duplicated()].unique()
    if len(repeated):
        raise DataError(f"{where} has labels more than once: {listing(map(repr, repeated), 5)}")
    found = positions(labels, levels)
    lacking = levels[found < 0]
    if len(lacking):
        alike = other_type(labels, levels)
        hint = f"; {remedy}" if remedy else ""
        if alike is not None:
            hint = (
                f"; its labels are of another type ({alike!r}) than those of the data "
                f"({next(iter(levels))!r}): convert them"
            )
        raise DataError(
            f"{where} lacks {plural(len(lacking), 'level')} of the data: "
            f"{listing(map(repr, lacking), 5)}{hint}"
        )
    return found


@dataclass(frozen=True, eq=False)
class GroupKey:
    """How the labels in one or several columns give a group code, learnt from the data of a fit.

    Args:
        levels: the levels of each column.
        cells: the combinations that occur, each as one number with a digit per column.
    """

    levels: tuple[pd.Index, ...]
    cells: pd.Index

    def codes(self, columns: Sequence[pd.Series]) -> np.ndarray:
        """Group codes of new rows, (n,) int64; -1 for a missing or unknown label or combination.

        Raises:
            DataError: for labels of another type than those of the fit.
        """
        digits = []
        for column, known in zip(columns, self.levels, strict=True):
            new = as_categories(column)
            position = positions(known, new.categories)
            if len(position) and (position < 0).all():
                alike = other_type(new.categories, known)
                if alike is not None:
                    raise DataError(
                        f"the labels of {column.name!r} are of another type in the new data "
                        f"({alike!r}) than in the data of the fit ({next(iter(known))!r}): convert "
                        "them"
                    )
            digits.append(np.append(position, -1)[new.codes])
        return self.cells.get_indexer(pd.Index(_cell(digits, self.levels))).astype(np.int64)


def _cell(digits: Sequence[np.ndarray], levels: Sequence[pd.Index]) -> np.ndarray:
    """One number per row from a code per column; -1 if any of them is."""
    cell = np.zeros(len(digits[0]), dtype=np.int64)
    known = np.ones(len(cell), dtype=bool)
    for codes, labels in zip(digits, levels, strict=True):
        cell = cell * len(labels) + codes
        known &= codes >= 0
    return np.where(known, cell, -1)


def _joined(name: str, levels: Sequence[pd.Index], digits: Sequence[np.ndarray]) -> pd.Index:
    """Labels of combinations, `"A:a"`, no two of them alike.

    Where joining makes `"p:q:r"` both of `p` with `q:r` and of `p:q` with `r`, or `"1:a"` both of
    the number and of the text 1, parts that are text stand in quotes.

    Args:
        name: of the grouping factor, for messages.
        levels: the levels of each part.
        digits: the level of each part in each combination, (m,).

    Raises:
        DataError: if two levels are one text even so.
    """
    for quoted in (False, True):
        parts = [
            _texts(labels, quoted)[digit] for labels, digit in zip(levels, digits, strict=True)
        ]
        found = pd.Index([":".join(texts) for texts in zip(*parts, strict=True)], dtype=object)
        if found.is_unique:
            return found
    twice = found[found.duplicated()][0]
    raise DataError(
        f"different levels of the grouping factor {name!r} have the same text, {twice!r}: give "
        "them labels that tell them apart"
    )


def _texts(labels: pd.Index, quoted: bool) -> np.ndarray:
    """Return the labels as text, (k,); what is text already in quotes, if asked for."""
    texts = labels.astype(str).to_numpy(dtype=object)
    if quoted:
        pairs = zip(labels, texts, strict=True)
        texts[:] = [repr(text) if isinstance(label, str) else text for label, text in pairs]
    return texts


def group_rows(name: str, columns: Sequence[pd.Series]) -> tuple[Grouping, GroupKey]:
    """Complete columns of labels -> grouping factor, and the key for new rows.

    Args:
        name: name of the grouping factor.
        columns: (n,) labels, one column for each part of its name.

    Raises:
        DataError: for different levels of a combination that cannot be told apart as text.
    """
    parts = [as_categories(column) for column in columns]
    levels = tuple(part.categories for part in parts)
    for column, labels in zip(columns, levels, strict=True):
        if labels.dtype == np.float64 and beyond_integers(labels):
            warnings.warn(
                f"the labels of {column.name!r} are floating-point numbers beyond 2**53, which "
                "cannot tell neighbouring whole numbers apart: if they were whole numbers, read "
                "them as Int64 or as text",
                stacklevel=2,
            )
    if len(parts) == 1:
        codes, names = parts[0].codes, levels[0]
        cells: pd.Index = pd.RangeIndex(len(names))
    else:
        codes, found = pd.factorize(_cell([part.codes for part in parts], levels), sort=True)
        cells = pd.Index(found)
        digits = np.unravel_index(found, [len(labels) for labels in levels])
        names = _joined(name, levels, digits)
    return Grouping(name, codes.astype(np.int64), names), GroupKey(levels, cells)
