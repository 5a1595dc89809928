"""Models that differ in a column of X: on a line each, or side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
import numpy as np

from ..compress import layout
from ..compress.columns import ALIAS_TOLERANCE
from ..constraints import Settings
from ..design import DataError, Design
from ..fit import arrange, check_enough, unidentified_by_design, without_offset
from ..identifiability import Unidentified
from ..likelihood.shared import MOST_EFFECTS
from ..results import Fit
from ..solve import Status
from ..threads import NUMPY, n_cores, one_blas_thread
from . import line_fits, line_statistics, scan, scan_lanes
from .engines import (
    FLAT,
    Hypothesis,
    Record,
    empty,
    fitted_alone,
    put,
    record_of,
    record_of_lanes,
    record_on_line,
    stacked,
)
from .grouped_rows import as_range
from .one_variance import OneVariance, one_variance, suits
from .reasons import reasons, suspects
from .rows import subset
from .scan_lanes import ScanDesigns, scan_designs
from .subsets import check_groups
from .varied import scaled

BLOCK_LANES = 4096
"""Most models on a line that are worked on at once."""


@dataclass(eq=False)
class ScanEngine(ABC):
    """Fits models that differ in columns of X.

    Attributes:
        design: the design on the rows that the models have.
        columns: positions of the columns of X that are multiplied by the model's own.
        settings: how to fit.
        tests: what is tested.
        kept: positions of the other columns that were kept, then of the changing ones.
    """

    design: Design
    columns: tuple[int, ...]
    settings: Settings
    tests: tuple[Hypothesis, ...]
    kept: np.ndarray

    @property
    def name(self) -> str:
        """How models are fitted, for a reader."""
        changing = f"{len(self.columns)} of {self.design.X.shape[1]} columns of X change"
        return f"{self._form}, {changing}: {self._method}"

    _form: ClassVar[str]
    _method: ClassVar[str]

    def fit(self, y: np.ndarray, x: np.ndarray) -> Record:
        """Fit models.

        Args:
            y: responses, offset of the design included, (n, lanes or 1).
            x: changing columns, (n, lanes).
        """
        lanes = x.shape[1]
        offset = 0.0 if self.design.offset is None else self.design.offset[:, None]
        with np.errstate(invalid="ignore"):
            around = y - offset
        one = around.shape[1] == 1
        response = self._analysed(around) if one and np.isfinite(around).all() else None
        parts = []
        for first in range(0, lanes, BLOCK_LANES):
            here = slice(first, first + BLOCK_LANES)
            parts.append(self._block(around if one else around[:, here], response, x[:, here]))
        return stacked(parts)

    def _block(self, y: np.ndarray, response: Any, x: np.ndarray) -> Record:
        """Fit some models, the offset removed; `response` if there is one for all of them."""
        lanes = x.shape[1]
        found = self._empty(lanes)
        status = np.zeros(lanes, dtype=int)
        with np.errstate(invalid="ignore"):
            status[np.broadcast_to(_constant(y), lanes)] = Status.CONSTANT
        status[~(_finite(y) & _finite(x))] = Status.INFINITE
        if len(x) <= len(self.kept):
            status[status == 0] = Status.TOO_FEW
        found.status[:] = status
        # A column that is constant changes nothing but its own coefficient, which is aliased.
        still = _constant(x) & ((x[0] == 0.0) | self._constant_aliased)
        usable = status == 0
        put(found, np.flatnonzero(usable & still), self._without(y, usable & still))
        moving = np.flatnonzero(usable & ~still)
        if moving.size:
            self._side_by_side(found, y, response, x, moving)
        return found

    def _side_by_side(
        self, found: Record, y: np.ndarray, response: Any, x: np.ndarray, lanes: np.ndarray
    ) -> None:
        """Fit some models, and those on their own that need a closer look; see `_scanned`."""
        record, closer = self._scanned(y, response, x, lanes)
        closer[suspects(record, self.design.X)] = True
        put(found, lanes, record)
        for lane in lanes[closer]:
            put(found, [lane], self._one(y, x, int(lane)))

    @abstractmethod
    def _analysed(self, y: np.ndarray) -> Any:
        """Return what is worked out once for a response of all models, (n, 1)."""

    @abstractmethod
    def _scanned(
        self, y: np.ndarray, response: Any, x: np.ndarray, lanes: np.ndarray
    ) -> tuple[Record, np.ndarray]:
        """Fit some models side by side, and tell which need a closer look.

        Args:
            y: responses, the offset removed, (n, all or 1).
            response: what `_analysed` returned for it, if there is one.
            x: changing columns of the design's, (n, all).
            lanes: which of the models.
        """

    @abstractmethod
    def _without(self, y: np.ndarray, lanes: np.ndarray) -> Record:
        """Fit some models without their changing columns, which are aliased.

        Args:
            y: responses, the offset removed, (n, all or 1).
            lanes: whether a model is meant, (all,).
        """

    def _columns(self, x: np.ndarray, take: Any) -> list[np.ndarray]:
        """Return the changing columns of some models, (n, models) each."""
        return [self._changed(j, x[:, take]) for j in self.columns]

    def _changed(self, column: int, x: np.ndarray) -> np.ndarray:
        factor = self.design.X[:, column]
        return x if column in self._plain else factor[:, None] * x

    @cached_property
    def _plain(self) -> list[int]:
        """Columns that are the models' own as they are."""
        return [j for j in self.columns if np.all(self.design.X[:, j] == 1.0)]

    def _one(self, y: np.ndarray, x: np.ndarray, lane: int) -> Record:
        """Fit one model on its own."""
        y, x, design = y[:, lane if y.shape[1] > 1 else 0], x[:, lane], self.design
        gone = np.isnan(y) | np.isnan(x)
        if gone.any():
            rows = np.flatnonzero(~gone)
            y, x, design = y[rows], x[rows], subset(design, rows, y[rows])
        X = scaled(design.X, self.columns, x)
        try:
            check_groups(design)
            fit = fitted_alone(replace(design, y=y, X=X, offset=None), self.settings)
        except DataError:
            found = self._empty(1)
            why = reasons(y[:, None], X)
            found.status[:] = np.where(why == Status.NOT_FINITE, Status.TOO_FEW, why)
            return found
        return record_of(fit, self.tests)

    def _empty(self, lanes: int) -> Record:
        width = sum(block.Z.shape[1] for block in self.design.blocks)
        return empty(lanes, self.design.X.shape[1], width, len(self.tests))

    @cached_property
    def _constant_aliased(self) -> bool:
        """Whether the changing columns of a constant are combinations of columns before them."""
        X = self.design.X
        for j in self.columns:
            before = X[:, [i for i in range(j) if i not in self.columns]]
            left = X[:, j] - before @ np.linalg.lstsq(before, X[:, j], rcond=None)[0]
            if np.linalg.norm(left) > ALIAS_TOLERANCE * np.linalg.norm(X[:, j]):
                return False
        return True


@dataclass(eq=False)
class LineScan(ScanEngine):
    """Fits models with one variance besides the residual's; ``line`` is the other columns'."""

    line: OneVariance
    _form = "one variance"
    _method = "a search on a line"

    def _analysed(self, y: np.ndarray) -> scan.Vectors:
        """See `ScanEngine`."""
        return scan.vectors(self.line, y, residualise=True)

    def _scanned(
        self, y: np.ndarray, response: scan.Vectors | None, x: np.ndarray, lanes: np.ndarray
    ) -> tuple[Record, np.ndarray]:
        """See `ScanEngine`."""
        parts, closer = [], []
        for take in _tiles(lanes, scan.TILE_LANES):
            changing = [scan.vectors(self.line, column) for column in self._columns(x, take)]
            own = response
            if own is None:
                own = scan.vectors(self.line, y[:, take], residualise=True)
            coordinates, near = scan.models(self.line, own, changing)
            parts.append(coordinates)
            closer.append(near)
        fitted = scan.fits(self.line, scan.joined(parts), self.settings.reml)
        record = record_on_line(
            fitted.found,
            self.design.X.shape[1],
            self.kept,
            self.tests,
            fitted.unscaled_variances(np.eye(len(self.kept))),
            fitted.unscaled_covariance,
        )
        far = fitted.found.variance > line_fits.FAR_APART * self.line.unit
        # A column may take all that the groups differ in.
        flat = fitted.found.information[:, 0, 0] * fitted.found.variance**2 <= FLAT
        return record, np.concatenate(closer) | far | flat & ~record.singular

    def _without(self, y: np.ndarray, lanes: np.ndarray) -> Record:
        """See `ScanEngine`."""
        take = np.flatnonzero(lanes) if y.shape[1] > 1 else [0]
        if not lanes.any():
            return self._empty(0)
        statistics = line_statistics.statistics(self.line, y[:, take])
        found = line_fits.fits(self.line, statistics, self.settings.reml)
        record = record_on_line(
            found,
            self.design.X.shape[1],
            self.kept[: -len(self.columns)],
            self.tests,
            (found.unscaled, found.unscaled_slope),
            partial(self.line.unscaled_covariance, found.variance),
        )
        repeated = np.zeros(int(lanes.sum()), dtype=int) if y.shape[1] == 1 else slice(None)
        return Record(*(leaf[repeated] for leaf in record))


@dataclass(eq=False)
class LaneScan(ScanEngine):
    """Fits models with one grouping factor; ``template`` is the model without changing columns."""

    template: Fit
    _form = "one grouping factor"
    _method = "Newton's method in lanes"

    def _analysed(self, y: np.ndarray) -> ScanDesigns | None:
        """See `ScanEngine`."""
        same = np.array_equal(y[:, 0], without_offset(self.template.design))
        return self._with_response if same else None

    @property
    def serves(self) -> bool:
        """Whether this form of the likelihood pays."""
        return self._with_response is not None

    @cached_property
    def _with_response(self) -> ScanDesigns | None:
        return scan_designs(self.template, len(self.columns), True)

    @cached_property
    def _with_responses(self) -> ScanDesigns | None:
        return scan_designs(self.template, len(self.columns), False)

    def fit_lacking(self, y: np.ndarray, x: np.ndarray) -> Record:
        """Fit models that lack values in rows of their own.

        Args:
            y: responses, offset of the design included, (n, lanes or 1), complete if it is one.
            x: changing columns, (n, lanes).
        """
        around = y if self.design.offset is None else y - self.design.offset[:, None]
        lanes, one = x.shape[1], y.shape[1] == 1
        response = self._analysed(around) if one else None
        parts = []
        for first in range(0, lanes, BLOCK_LANES):
            here = slice(first, first + BLOCK_LANES)
            parts.append(self._lacking(around if one else around[:, here], response, x[:, here]))
        return stacked(parts)

    def _lacking(self, y: np.ndarray, response: ScanDesigns | None, x: np.ndarray) -> Record:
        found = self._empty(x.shape[1])
        infinite = np.isinf(x).any(axis=0) | np.isinf(y).any(axis=0)
        found.status[infinite] = Status.INFINITE
        finite = np.flatnonzero(~infinite)
        if finite.size:
            self._side_by_side(found, y, response, x, finite)
        return found

    def _scanned(
        self, y: np.ndarray, response: ScanDesigns | None, x: np.ndarray, lanes: np.ndarray
    ) -> tuple[Record, np.ndarray]:
        """See `ScanEngine`; rows in which a model lacks a value are left out."""
        designs = response or self._with_responses
        if designs is None:
            return self._empty(len(lanes)), np.ones(len(lanes), dtype=bool)
        with np.errstate(invalid="ignore"):
            lacking = bool(np.isnan(x.sum()) or np.isnan(y.sum()))

        def tile(take: Any) -> tuple[scan_lanes.Columns, np.ndarray]:
            changing, own, gone = x[:, take], None, None
            if response is None:
                own = np.broadcast_to(y if y.shape[1] == 1 else y[:, take], changing.shape)
            if lacking:
                gone = np.isnan(changing) if own is None else np.isnan(changing) | np.isnan(own)
                changing = _filled(changing, gone)
                own = None if own is None else _filled(own, gone)
            columns = [self._changed(j, changing) for j in self.columns]
            return scan_lanes.compressed(designs, columns, own, gone)

        # NumPy lets other threads run meanwhile; its own would have no cores left.
        with one_blas_thread(NUMPY), ThreadPoolExecutor(n_cores()) as threads:
            parts = list(threads.map(tile, _tiles(lanes, designs.tile_lanes)))
        compressed = scan_lanes.joined([part for part, _ in parts])
        near = np.concatenate([each for _, each in parts])
        found = self._empty(len(lanes))
        usable = np.flatnonzero(~near)
        if usable.size:
            taken = jax.tree.map(lambda leaf: leaf[usable], compressed)
            put(
                found,
                usable,
                record_of_lanes(
                    scan_lanes.solved(designs, taken, self.kept, self.design.X.shape[1]),
                    self.kept,
                    self.tests,
                    lambda lane: self._one(y, x, int(lanes[usable[lane]])),
                ),
            )
        return found, near

    def _without(self, y: np.ndarray, lanes: np.ndarray) -> Record:
        """See `ScanEngine`."""
        which = np.flatnonzero(lanes)
        found = self._empty(len(which))
        # Zeros are aliased, wherever they stand.
        nothing = np.zeros((len(y), len(lanes)))
        if y.shape[1] == 1:
            which = which[:1]
        for i, lane in enumerate(which):
            put(found, [i] if y.shape[1] > 1 else slice(None), self._one(y, nothing, int(lane)))
        return found


def scan_engine(
    design: Design, columns: tuple[int, ...], settings: Settings, tests: tuple[Hypothesis, ...]
) -> ScanEngine | None:
    """Return what fits models that differ in columns of X on a line; None if nothing does.

    Raises:
        DataError: if the designs cannot tell the parameters apart, whatever the response is.
    """
    factors, terms = arrange(design)
    if len(factors) > 1:
        return None
    if len(columns) <= scan.MOST_COLUMNS:
        others = np.setdiff1d(np.arange(design.X.shape[1]), columns)
        arranged = layout(design.X[:, others], factors, design.weights, settings.engine)
        if suits(arranged, terms, settings):
            check_enough(design, arranged, terms, settings)
            if unidentified_by_design(design, arranged, terms, settings) is not None:
                return None
            line = one_variance(arranged)
            if line is not None:
                kept = np.concatenate([others[arranged.fixed.kept], columns]).astype(int)
                return LineScan(design, columns, settings, tests, kept, line)
    return lane_scan(design, columns, settings, tests)


def apart_without(
    design: Design, columns: tuple[int, ...], settings: Settings
) -> Unidentified | None:
    """Return what models do not tell apart without their changing columns, nor with them."""
    others = np.setdiff1d(np.arange(design.X.shape[1]), columns)
    factors, terms = arrange(design)
    arranged = layout(design.X[:, others], factors, design.weights, settings.engine)
    return unidentified_by_design(design, arranged, terms, settings)


def lane_scan(
    design: Design, columns: tuple[int, ...], settings: Settings, tests: tuple[Hypothesis, ...]
) -> LaneScan | None:
    """Return what fits models that differ in columns of X side by side; None if nothing does."""
    q = sum(block.Z.shape[1] for block in design.blocks)
    groupings = design.groupings
    if len(columns) > scan_lanes.MOST_COLUMNS or q > MOST_EFFECTS or len(groupings) > 1:
        return None
    if groupings[0].root is not None or settings.engine not in ("auto", "grouped"):
        return None
    if settings.solver not in ("auto", "newton"):
        return None
    others = np.setdiff1d(np.arange(design.X.shape[1]), columns)
    names = tuple(design.x_names[j] for j in others)
    try:
        template = fitted_alone(replace(design, X=design.X[:, others], x_names=names), settings)
    except DataError:
        return None  # what is wrong with the response is found out model by model
    kept = np.concatenate([others[template.layout.fixed.kept], columns]).astype(int)
    if template.unidentified is not None:
        return None
    found = LaneScan(design, columns, settings, tests, kept, template)
    return found if found.serves else None


def _filled(columns: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Return columns (n, lanes) with the mean of what is there in rows that are gone."""
    kept = np.where(gone, 0.0, columns)
    mean = kept.sum(axis=0) / np.maximum(np.sum(~gone, axis=0), 1)
    return np.where(gone, mean, kept)


def _tiles(lanes: np.ndarray, size: int) -> Iterator[Any]:
    """Yield some lanes at a time, in a form that makes no copy of them."""
    for first in range(0, len(lanes), size):
        yield as_range(lanes[first : first + size])


def _finite(columns: np.ndarray) -> np.ndarray:
    """Return which columns have no infinite or missing values, (lanes,)."""
    # A sum tells of nearly all, at the price of one pass.
    with np.errstate(invalid="ignore", over="ignore"):
        finite = np.isfinite(columns.sum(axis=0))
    at = np.flatnonzero(~finite)
    finite[at] = np.isfinite(columns[:, at]).all(axis=0)
    return np.asarray(finite)


def _constant(columns: np.ndarray) -> np.ndarray:
    """Return which columns do not vary, (lanes,)."""
    some = columns[np.linspace(0, len(columns) - 1, 32).astype(np.int64)]
    constant = (some == some[:1]).all(axis=0)
    at = np.flatnonzero(constant)
    constant[at] = (columns[:, at] == columns[0, at]).all(axis=0)
    return np.asarray(constant)
