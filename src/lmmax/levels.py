"""Labels -> levels and codes: categories, grouping factors and their combinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .frames import DataError

__all__ = ["Grouping"]


@dataclass(frozen=True, eq=False)
class Grouping:
    """One grouping factor.

    Args:
        name: `"Pig"`, or `"batch:cask"` for the combinations that occur.
        codes: (n,) int64, position in `levels` of each row's group.
        levels: (m,) labels, sorted where they can be (in the order of a pandas categorical, else
            of first appearance); combinations are strings `"A:a"`.
    """

    name: str
    codes: np.ndarray
    levels: pd.Index


def as_categories(values: Any) -> pd.Categorical:
    """Values as categories: those that occur, sorted as the levels of `Grouping` are.

    Whole numbers become integers, because a missing value may have made them floats.
    """
    categorical = pd.Categorical(values)
    if isinstance(values.dtype, pd.CategoricalDtype):
        categorical = categorical.remove_unused_categories()
    levels = categorical.categories
    if levels.dtype == np.float64:
        numbers: Any = levels.to_numpy()
        if ((numbers % 1 == 0) & (np.abs(numbers) < 2**53)).all():
            return pd.Categorical.from_codes(categorical.codes, numbers.astype(np.int64))
    return categorical


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
                texts = {str(level) for level in known}
                alike = [level for level in new.categories if str(level) in texts]
                if alike:
                    raise DataError(
                        f"the labels of {column.name!r} are of another type in the new data "
                        f"({alike[0]!r}) than in the data of the fit ({known[0]!r}): convert them"
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


def group_rows(name: str, columns: Sequence[pd.Series]) -> tuple[Grouping, GroupKey]:
    """Complete columns of labels -> grouping factor, and the key for new rows.

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
    if len(names) < 2:
        raise DataError(
            f"the grouping factor {name!r} has one level, {str(names[0])!r}: the variance "
            "of random effects cannot be estimated from one group; leave its random terms out"
        )
    return Grouping(name, codes.astype(np.int64), names), GroupKey(levels, cells)
