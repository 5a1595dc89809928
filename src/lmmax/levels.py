"""Labels -> levels and codes: categories, grouping factors and their combinations."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from .frames import DataError, listing

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
    categorical = pd.Categorical(values)
    if isinstance(values.dtype, pd.CategoricalDtype):
        if not categorical.categories.is_monotonic_increasing:
            categorical = categorical.as_ordered()
        if not unused:
            categorical = categorical.remove_unused_categories()
    levels = categorical.categories
    if levels.dtype == np.float64:
        values = levels.to_numpy()
        if ((values % 1 == 0) & (np.abs(values) < 2**53)).all():
            return pd.Categorical.from_codes(
                categorical.codes, values.astype(np.int64), ordered=categorical.ordered
            )
    return categorical


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
            position = known.get_indexer(new.categories)
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


def group_rows(
    name: str, columns: Sequence[pd.Series], terms: Iterable[Any] | None
) -> tuple[Grouping, GroupKey]:
    """Complete columns of labels -> grouping factor, and the key for new rows.

    Args:
        name: name of the grouping factor.
        columns: (n,) labels, one column for each part of its name.
        terms: its random terms, for messages; None to take one group only, too.

    Raises:
        DataError: if there is one group only.
    """
    parts = [as_categories(column) for column in columns]
    levels = tuple(part.categories for part in parts)
    if len(parts) == 1:
        codes, names = parts[0].codes, levels[0]
        cells: pd.Index = pd.RangeIndex(len(names))
    else:
        codes, found = pd.factorize(_cell([part.codes for part in parts], levels), sort=True)
        cells = pd.Index(found)
        digits = np.unravel_index(found, [len(labels) for labels in levels])
        texts = [
            labels.astype(str).to_numpy(dtype=object)[digit]
            for labels, digit in zip(levels, digits, strict=True)
        ]
        names = pd.Index([":".join(text) for text in zip(*texts, strict=True)], dtype=object)
    if len(names) < 2 and terms is not None:
        raise DataError(
            f"the grouping factor {name!r} has one level, {str(names[0])!r}: the variance "
            f"of random effects cannot be estimated from one group; leave out {listing(terms)}"
        )
    return Grouping(name, codes.astype(np.int64), names), GroupKey(levels, cells)
