"""What a worker does with models that differ in more than the response."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from ..compress.grouped import Statistics, equal_groups
from ..compress.rows import SMALLEST_BUCKET
from ..constraints import Settings, TermColumns
from ..design import DataError, Design
from ..fit import arrange, prepare
from ..solve import Status
from .engines import Hypothesis, Record, empty, put, stacked
from .rows import levels_left, subset
from .scan_engine import LaneScan, ScanEngine, apart_without, lane_scan, scan_engine
from .seals import fingerprint, parts_of
from .subsets import LARGE, Subsets, SubsetWork
from .varied import STACKED_NUMBERS, Block
from .work import PATTERNS, Done, Work, by_pattern, remembered

COMPANY = 16
"""Models that lack the same rows, from which on a design of their own pays."""


@dataclass(eq=False)
class VariedWork(Work):
    """Fits blocks of models that differ in more than the response.

    Attributes:
        columns: positions of the columns of X that are multiplied by the models' own.
        weighted: whether prior weights differ.
        lines: per pattern of missing values, as bytes, what fits the models that have it.
        apart: per pattern of missing responses, what fits models that lack other rows each.
    """

    columns: tuple[int, ...] = ()
    weighted: bool = False
    unit: ClassVar[str] = "model"
    lines: dict[bytes, ScanEngine | None] = field(default_factory=dict)
    apart: dict[bytes, LaneScan | None] = field(default_factory=dict)

    @cached_property
    def on_a_line(self) -> bool:
        """Whether complete models are a search on a line."""
        every = np.arange(len(self.design.y))
        return not self.weighted and self._line_of(b"", every) is not None

    @property
    def name(self) -> str:
        """How complete models are fitted."""
        if self.on_a_line:
            engine = self._line_of(b"", np.arange(len(self.design.y)))
            assert engine is not None
            return engine.name
        together = SubsetWork(self.design, self.settings, self.tests, _one_subset(self.design))
        how = "side by side: Newton's method in lanes" if together.together else "one by one"
        return f"designs that differ, {how}"

    @cached_property
    def aliased(self) -> tuple[str, ...]:
        """See `Work`; which columns depend on others differs from model to model."""
        return ()

    @cached_property
    def not_identified(self) -> tuple[str, ...]:
        """See `Work`; what no model tells apart."""
        found = apart_without(self.design, self.columns, self.settings)
        return () if found is None else (str(found),)

    @cached_property
    def key(self) -> str:
        """See `Work`."""
        own = [self.settings, self.tests, self.columns, self.weighted]
        return fingerprint(*parts_of(self.design), self.design.y, *own)

    def __reduce__(self) -> Any:
        parts = (self.design, self.settings, self.tests, self.columns, self.weighted)
        return remembered, (self.key, varied_work, *parts)

    def done(self, block: np.ndarray | Block) -> Done:
        """Fit a block of models and count their rows."""
        assert isinstance(block, Block)
        n, complete = len(block.y), block.complete
        if not self.on_a_line:
            record = self._stacked(block)
        elif complete or not block.gone.any():
            record = self._on_line(block, b"", None, None)
        else:
            record = self._lacking(block)
        return record, np.full(len(block), n) if complete else n - block.gone.sum(axis=0)

    def _lacking(self, block: Block) -> Record:
        """Fit models of which some lack values.

        Rows that many lack are left out of a design that these share; what few lack is left out of
        each model.
        """
        gone = block.gone
        _, which, counts = np.unique(
            np.packbits(gone, axis=0), axis=1, return_inverse=True, return_counts=True
        )
        rare = (counts[which.reshape(-1)] < COMPANY) & gone.any(axis=0)
        # A response that all share lacks its rows in all of them.
        lacks = np.isnan(block.y[:, 0]) if block.y.shape[1] == 1 else np.zeros(len(gone), bool)
        rows = np.flatnonzero(~lacks)
        key = np.packbits(lacks).tobytes() if lacks.any() else b""
        engine = self._apart_of(key, rows) if rare.any() else None
        if engine is None:
            return by_pattern(gone, partial(self._on_line, block))
        own = block.take(np.flatnonzero(rare), rows)
        assert own.x is not None
        parts, others = engine.fit_lacking(own.y, own.x), block.take(np.flatnonzero(~rare))
        found = empty(len(block), self.design.X.shape[1], self.width, len(self.tests))
        put(found, rare, parts)
        if not rare.all():
            put(found, ~rare, by_pattern(others.gone, partial(self._on_line, others)))
        return found

    def _apart_of(self, key: bytes, rows: np.ndarray) -> LaneScan | None:
        """Return what fits models that lack rows of their own, or None; as `_line_of`."""
        with self._lock:
            if key not in self.apart:
                if len(self.apart) >= PATTERNS:
                    self.apart.pop(next(iter(self.apart)))
                found = None
                if len(rows):
                    design = subset(self.design, rows, self.design.y[rows])
                    with suppress(DataError):
                        found = lane_scan(design, self.columns, self.settings, self.tests)
                self.apart[key] = found
            return self.apart[key]

    def _on_line(
        self, block: Block, key: bytes, rows: np.ndarray | None, lanes: np.ndarray | None
    ) -> Record:
        """Fit models that lack the same rows; None for all of the rows, or models."""
        own = block if lanes is None or rows is None else block.take(lanes, rows)
        assert own.x is not None
        rows = np.arange(len(block.y)) if rows is None else rows
        engine = self._line_of(key, rows) if len(rows) else None
        return self._stacked(own, rows) if engine is None else engine.fit(own.y, own.x)

    @cached_property
    def _terms(self) -> tuple[TermColumns, ...]:
        """The random terms' places, also those that some models have no rows of."""
        return arrange(self.design)[1]

    def _line_of(self, key: bytes, rows: np.ndarray) -> ScanEngine | None:
        with self._lock:
            if key not in self.lines:
                if len(self.lines) >= PATTERNS:
                    self.lines.pop(next(k for k in self.lines if k))
                design = subset(self.design, rows, self.design.y[rows])
                try:
                    self.lines[key] = scan_engine(design, self.columns, self.settings, self.tests)
                except DataError:
                    if not key:
                        raise
                    self.lines[key] = None
            return self.lines[key]

    @cached_property
    def _most_groups(self) -> int:
        """Groups that data sets may have and be compressed in company."""
        if self.weighted:
            return LARGE
        compressed = prepare(self.design, self.settings.engine).compression.detail
        if not isinstance(compressed, Statistics):
            return SMALLEST_BUCKET
        # Where groups share designs, merging them makes the data sets small.
        alike = sum(map(len, equal_groups(compressed.U, self.width)))
        return SMALLEST_BUCKET if 2 * alike > compressed.U.shape[2] else LARGE

    def _stacked(self, block: Block, rows: np.ndarray | None = None) -> Record:
        """Fit models as data sets, some at a time."""
        design = self.design
        if rows is not None:
            design = subset(design, rows, design.y[rows])
        numbers = len(design.y) * (design.X.shape[1] + self.width + 2)
        step = max(1, STACKED_NUMBERS // max(numbers, 1))
        parts = []
        for first in range(0, len(block), step):
            here = block.take(slice(first, first + step))
            found = empty(len(here), design.X.shape[1], self.width, len(self.tests))
            # Infinite columns would be mistaken for some without any variation.
            infinite, nothing = here.infinite, here.gone.all(axis=0)
            found.status[nothing], found.status[infinite] = Status.TOO_FEW, Status.INFINITE
            sound = np.flatnonzero(~(infinite | nothing))
            if sound.size:
                own = here if len(sound) == len(here) else here.take(sound)
                subsets = stacked_models(design, self.columns, own)
                work = SubsetWork(
                    subsets.design,
                    self.settings,
                    self.tests,
                    subsets,
                    self._most_groups,
                    self._terms,
                )
                put(found, sound, work.done(np.arange(len(sound)))[0])
            parts.append(found)
        return stacked(parts)


def varied_work(
    design: Design,
    settings: Settings,
    tests: tuple[Hypothesis, ...],
    columns: tuple[int, ...],
    weighted: bool,
) -> VariedWork:
    """Return the work of models that differ in more than the response."""
    return VariedWork(design, settings, tests, columns=columns, weighted=weighted)


def stacked_models(design: Design, columns: tuple[int, ...], block: Block) -> Subsets:
    """Return models as subsets of the rows of a design in which they follow on one another."""
    lane, row = np.nonzero(~block.gone.T)

    def own(part: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(part[row, lane if part.shape[1] > 1 else 0])

    X = np.asfortranarray(design.X[row])
    if block.x is not None:
        X[:, list(columns)] *= own(block.x)[:, None]
    weights = None if design.weights is None else design.weights[row]
    stack = replace(
        design,
        y=own(block.y),
        X=X,
        blocks=tuple(replace(each, Z=np.asfortranarray(each.Z[row])) for each in design.blocks),
        groupings=tuple(levels_left(each, row) for each in design.groupings),
        weights=weights if block.weights is None else own(block.weights),
        offset=None if design.offset is None else design.offset[row],
        index=design.index[row],
    )
    return Subsets(pd.RangeIndex(len(block)), lane, stack)


def _one_subset(design: Design) -> Subsets:
    return Subsets(pd.RangeIndex(1), np.zeros(len(design.y), dtype=np.int64), design)
