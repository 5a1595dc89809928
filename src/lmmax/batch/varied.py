"""Models that differ in more than the response: a column of X, prior weights, a known part.

A block of models is a :class:`Block`: what each has of its own, already read; what they share is
the design, whose columns that change are to be multiplied by the model's own.  Where only columns
of X change, the models share the designs' part of the statistics: with one variance besides the
residual's they are a search on a line each (:mod:`lmmax.batch.scan`), with one grouping factor they
are solved side by side (:mod:`lmmax.batch.scan_lanes`).  Other models are data sets of the same
rows, stacked one on the other, and solved as subsets are (:mod:`lmmax.batch.subsets`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..design import DataError, Design
from ..frames import Table, in_rows_of, n_rows
from .seals import fingerprint
from .sources import Columns, columns

STACKED_NUMBERS = 1 << 22
"""Most numbers in the models that are stacked, or looked at at once."""


@dataclass(frozen=True, eq=False)
class Block:
    """What some models have of their own; a part with one column is the same for all of them.

    Attributes:
        y: responses, the models' own offsets taken off, (n, lanes or 1).
        x: the changing column, (n, lanes or 1), or None.
        weights: prior weights, (n, lanes or 1), or None.
    """

    y: np.ndarray
    x: np.ndarray | None
    weights: np.ndarray | None

    @property
    def parts(self) -> tuple[np.ndarray | None, ...]:
        """All of it."""
        return self.y, self.x, self.weights

    @cached_property
    def gone(self) -> np.ndarray:
        """Rows that a model lacks a value of, (n, lanes)."""
        found: Any = False
        for part in self.parts:
            found = found | np.isnan(part) if part is not None else found
        return np.asarray(found)

    @property
    def complete(self) -> bool:
        """Whether no value is missing; found out without a look at each."""
        return all(part is None or not np.isnan(part.sum(axis=0)).any() for part in self.parts)

    @property
    def infinite(self) -> np.ndarray:
        """Models with infinite values, (lanes,)."""
        found = np.zeros(len(self), dtype=bool)
        for part in self.parts:
            if part is not None:
                found |= np.isinf(part).any(axis=0)
        return found

    def __len__(self) -> int:
        """Number of models."""
        return max(part.shape[1] for part in self.parts if part is not None)

    def take(self, lanes: np.ndarray | slice, rows: np.ndarray | slice = slice(None)) -> Block:
        """Return some of the models, on some rows."""

        def some(part: np.ndarray | None) -> np.ndarray | None:
            return part if part is None else part[rows][:, lanes if part.shape[1] > 1 else [0]]

        y = some(self.y)
        assert y is not None
        return Block(y, some(self.x), some(self.weights))


@dataclass(frozen=True, eq=False)
class Varied:
    """Responses with what goes with each; stands where :class:`lmmax.batch.sources.Columns` does.

    Each part has a column per model, or one.

    Attributes:
        names: names of the models.
        y: the responses.
        offset: known parts of the mean, or None.
        x: the changing column of X, or None.
        weights: prior weights, or None.
        columns: positions of the columns of X that are multiplied by x.
    """

    names: pd.Index
    y: Columns
    offset: Columns | None
    x: Columns | None
    weights: Columns | None
    columns: tuple[int, ...] = ()

    @property
    def rows(self) -> np.ndarray:
        """Rows of the design."""
        return self.y.rows

    @property
    def path(self) -> str | None:
        """That of the responses, if all parts are in files."""
        files = [part.path for part in self.parts if part is not None]
        return None if None in files else self.y.path

    @property
    def parts(self) -> tuple[Columns | None, ...]:
        """All of it."""
        return self.y, self.offset, self.x, self.weights

    @property
    def nbytes(self) -> int:
        """Size of all parts in double precision."""
        counts = [len(part.names) for part in self.parts if part is not None]
        return 8 * len(self.rows) * sum(counts)

    def block(self, first: int, last: int) -> np.ndarray | Block:
        """Return what some models have; a plain array if that is a response only.

        Raises:
            DataError: for a weight that is not positive.
        """
        y, offset, x, weights = (
            part if part is None else part.block(*self._columns_of(part, first, last))
            for part in self.parts
        )
        assert y is not None
        if offset is not None:
            y = y - offset
        if weights is not None:
            self._check(weights, np.isnan(y) | (False if x is None else np.isnan(x)), first)
        if x is None and weights is None:
            return y
        return Block(y, x, weights)

    def _columns_of(self, part: Columns, first: int, last: int) -> tuple[int, int]:
        return (first, last) if len(part.names) > 1 else (0, 1)

    def _check(self, weights: np.ndarray, gone: np.ndarray, first: int) -> None:
        """Raise for a weight that is not positive, or infinite, and belongs to a value."""
        with np.errstate(invalid="ignore"):
            wrong = ~gone & ~np.isnan(weights) & ~((weights > 0.0) & (weights < np.inf))
        if not wrong.any():
            return
        row, lane = (int(each) for each in np.argwhere(wrong)[0])
        value = weights[row, lane if weights.shape[1] > 1 else 0]
        hint = "" if value else ": a row that says nothing may have a missing weight (NaN)"
        raise DataError(
            f"weights must be positive and finite, but that of response "
            f"{self.names[first + lane]!r} in row {self.rows[row]} is {value:g}{hint}"
        )

    def check(self) -> None:
        """Raise for weights that are in memory and not positive."""
        step = max(1, STACKED_NUMBERS // max(len(self.rows), 1))
        if self.weights is not None and self.weights.path is None:
            for first in range(0, len(self.names), step):
                self.block(first, min(first + step, len(self.names)))

    def values(self, number: int) -> list[np.ndarray]:
        """Return all that one model has, part by part, (n,) each."""
        return [
            part.column(self._columns_of(part, number, number + 1)[0])
            for part in self.parts
            if part is not None
        ]

    def identity(self) -> dict[str, str]:
        """Return what tells whether models are the same as some before, beside the responses."""
        first, last = (self.values(number) for number in (0, len(self.names) - 1))
        return {"models": fingerprint(self.columns, *first, *last)}

    def column(self, number: int) -> np.ndarray:
        """Return one response, NaN in rows in which its model lacks a value, (n,)."""
        y, *others = self.values(number)
        return np.where(np.isnan(others).any(axis=0), np.nan, y)

    def design_of(self, design: Design, number: int) -> Design:
        """Return the design with what one model has of its own, but the response."""
        rest = iter(self.values(number)[1:])
        offset, x, weights = (None if part is None else next(rest) for part in self.parts[1:])
        if offset is not None:
            offset = offset if design.offset is None else design.offset + offset
            design = replace(design, offset=offset)
        if weights is not None:
            design = replace(design, weights=weights)
        return design if x is None else replace(design, X=scaled(design.X, self.columns, x))


def scaled(X: np.ndarray, columns: tuple[int, ...], x: np.ndarray) -> np.ndarray:
    """Return X with some columns multiplied by x, (n, p)."""
    found = np.array(X, order="F")
    found[:, list(columns)] *= x[:, None]
    return found


def read_varied(parts: Mapping[str, Columns], columns: tuple[int, ...]) -> Varied:
    """Pair what models have of their own.

    Args:
        parts: the columns by argument: responses, and offset, scan, weights where they differ.
        columns: positions of the columns of X that the scan changes.

    Raises:
        DataError: if their numbers do not fit together.
    """
    counts = {name: len(part.names) for name, part in parts.items()}
    several = {name: count for name, count in counts.items() if count > 1}
    if len(set(several.values())) > 1:
        (one, a), (other, b) = list(several.items())[:2]
        raise DataError(
            f"{one} has {a} columns and {other} has {b}: model i takes column i of each, so give "
            f"as many, or one that all models share; for every pair, call fit_many for each column "
            f"of {one}"
        )
    for name, part in parts.items():
        own, others = part.names, parts["responses"].names
        if set(own) == set(others) and not own.equals(others):
            raise DataError(
                f"the columns of {name} have the names of the responses in another order: model i "
                "takes column i of each, so reorder them"
            )
    # The responses name the models, unless there is one for all of them.
    named = next(iter(several), "scan" if "scan" in parts else "responses")
    names = parts["responses" if "responses" in several else named].names
    found = Varied(
        names,
        parts["responses"],
        parts.get("offset"),
        parts.get("scan"),
        parts.get("weights"),
        columns,
    )
    found.check()
    return found


def varying_options(
    options: Mapping[str, Any], table: Table
) -> tuple[dict[str, Columns], dict[str, Any]]:
    """Return the weights and offsets that differ from model to model, and the other options.

    Args:
        options: of the design.
        table: the data.
    """
    varying, others = {}, dict(options)
    every = np.arange(n_rows(table))
    for name in ("weights", "offset"):
        value = others[name] = in_rows_of(others.get(name), name, table)
        listed = isinstance(value, list) and bool(value) and isinstance(value[0], str)
        if len(getattr(value, "shape", ())) != 2 and not listed and not isinstance(value, Path):
            continue
        found = read_columns(name, value, table, every)
        others[name] = None
        if len(found.names) == 1:
            others[name] = found.column(0)
        else:
            varying[name] = found
    return varying, others


def read_columns(what: str, value: Any, table: Table, rows: np.ndarray) -> Columns:
    """Read an argument that has a column per model, as `columns` reads responses."""
    try:
        found = columns(value, table, rows)
    except DataError as error:
        raise DataError(str(error).replace("responses", what)) from None
    if not isinstance(found, Columns):
        raise DataError(f"{what} is an iterator: pass an array, a data frame, or a file")
    return found
