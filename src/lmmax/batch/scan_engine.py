"""Models that differ in a column of X, fitted on a line each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from ..compress import layout
from ..compress.columns import ALIAS_TOLERANCE
from ..constraints import Settings
from ..design import DataError, Design
from ..fit import (
    arrange,
    check_enough,
)
from ..solve import Status
from . import line_fits, line_statistics, scan
from .engines import (
    Hypothesis,
    Record,
    empty,
    fitted_alone,
    put,
    record_of,
    record_on_line,
    stacked,
)
from .grouped_rows import as_range
from .one_variance import OneVariance, one_variance, suits
from .reasons import reasons
from .varied import scaled

BLOCK_LANES = 4096
"""Most models on a line that are worked on at once."""


@dataclass(eq=False)
class ScanEngine:
    """Fits models with one variance besides the residual's that differ in columns of X.

    Attributes:
        design: the design on the rows that the models have.
        columns: positions of the columns of X that are multiplied by the model's own.
        settings: how to fit.
        tests: what is tested.
        line: the design of the other columns.
        kept: positions of those that were kept, then of the changing ones.
    """

    design: Design
    columns: tuple[int, ...]
    settings: Settings
    tests: tuple[Hypothesis, ...]
    line: OneVariance
    kept: np.ndarray

    @property
    def name(self) -> str:
        """How models are fitted, for a reader."""
        return (
            f"one variance, {len(self.columns)} of {self.design.X.shape[1]} columns of X change: "
            "a search on a line"
        )

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
        responses = None
        if one and np.isfinite(around).all():
            responses = scan.vectors(self.line, around, residualise=True)
        parts = []
        for first in range(0, lanes, BLOCK_LANES):
            here = slice(first, first + BLOCK_LANES)
            parts.append(self._block(around if one else around[:, here], responses, x[:, here]))
        return stacked(parts)

    def _block(self, y: np.ndarray, responses: scan.Vectors | None, x: np.ndarray) -> Record:
        """Fit some models, the offset removed; `responses` if there is one for all of them."""
        lanes = x.shape[1]
        found = empty(lanes, self.design.X.shape[1], 1, len(self.tests))
        status = np.zeros(lanes, dtype=int)
        with np.errstate(invalid="ignore"):
            status[np.broadcast_to(_constant(y), lanes)] = Status.CONSTANT
        status[~(_finite(y) & _finite(x))] = Status.INFINITE
        if len(x) <= self.line.n_fixed + len(self.columns):
            status[status == 0] = Status.TOO_FEW
        found.status[:] = status
        # A column that is constant changes nothing but its own coefficient, which is aliased.
        still = _constant(x) & ((x[0] == 0.0) | self._constant_aliased)
        usable = status == 0
        put(found, np.flatnonzero(usable & still), self._without(y, usable & still))
        moving = np.flatnonzero(usable & ~still)
        if moving.size:
            record, closer = self._scanned(y, responses, x, moving)
            put(found, moving, record)
            for lane in moving[closer]:
                put(found, [lane], self._alone(y[:, lane if y.shape[1] > 1 else 0], x[:, lane]))
        return found

    def _scanned(
        self, y: np.ndarray, responses: scan.Vectors | None, x: np.ndarray, lanes: np.ndarray
    ) -> tuple[Record, np.ndarray]:
        """Fit some models side by side, and tell which need a closer look."""
        parts, closer = [], []
        for first in range(0, len(lanes), scan.TILE_LANES):
            take = as_range(lanes[first : first + scan.TILE_LANES])  # no copy
            changing = [scan.vectors(self.line, self._changed(j, x[:, take])) for j in self.columns]
            own = responses
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
        return record, np.concatenate(closer)

    def _changed(self, column: int, x: np.ndarray) -> np.ndarray:
        factor = self.design.X[:, column]
        return x if column in self._plain else factor[:, None] * x

    @cached_property
    def _plain(self) -> list[int]:
        """Columns that are the models' own as they are."""
        return [j for j in self.columns if np.all(self.design.X[:, j] == 1.0)]

    def _without(self, y: np.ndarray, lanes: np.ndarray) -> Record:
        """Fit some models without their changing columns, which are aliased."""
        take = np.flatnonzero(lanes) if y.shape[1] > 1 else [0]
        if not lanes.any():
            return empty(0, self.design.X.shape[1], 1, len(self.tests))
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

    def _alone(self, y: np.ndarray, x: np.ndarray) -> Record:
        """Fit one model on its own."""
        X = scaled(self.design.X, self.columns, x)
        try:
            fit = fitted_alone(replace(self.design, y=y, X=X, offset=None), self.settings)
        except DataError:
            found = empty(1, X.shape[1], 1, len(self.tests))
            found.status[:] = reasons(y[:, None], X)
            return found
        return record_of(fit, self.tests)

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


def scan_engine(
    design: Design, columns: tuple[int, ...], settings: Settings, tests: tuple[Hypothesis, ...]
) -> ScanEngine | None:
    """Return what fits models that differ in columns of X on a line; None if nothing does.

    Raises:
        DataError: if the designs cannot tell the parameters apart, whatever the response is.
    """
    others = np.setdiff1d(np.arange(design.X.shape[1]), columns)
    factors, terms = arrange(design)
    if len(columns) > scan.MOST_COLUMNS:
        return None
    arranged = layout(design.X[:, others], factors, design.weights, settings.engine)
    if not suits(arranged, terms, settings):
        return None
    check_enough(design, arranged, terms, settings)
    line = one_variance(arranged)
    if line is None:
        return None
    kept = np.concatenate([others[arranged.fixed.kept], np.array(columns, dtype=int)])
    return ScanEngine(design, columns, settings, tests, line, kept)


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
