"""Models that differ in more than the response: a column of X, prior weights, a known part.

A block of models is a :class:`Block`: what each has of its own, already read; what they share is
the design, whose columns that change are to be multiplied by the model's own.  Where only columns
of X change and there is one variance besides the residual's, the models are a search on a line each
(:mod:`lmmax.batch.scan`).  Other models are data sets of the same rows, stacked one on the other,
and solved as subsets are (:mod:`lmmax.batch.subsets`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..compress import layout
from ..compress.columns import ALIAS_TOLERANCE
from ..compress.grouped import Statistics, equal_groups
from ..compress.rows import SMALLEST_BUCKET
from ..constraints import Settings
from ..design import DataError, Design
from ..encoding import factor_names, offset_factor, term_factors
from ..fit import (
    ConvergenceWarning,
    RankWarning,
    arrange,
    check_enough,
    fit_prepared,
    prepare,
)
from ..frames import Table, n_rows
from ..results import Fit
from ..solve import Status
from ..spec import ModelSpec
from . import one_variance, scan
from .engines import Hypothesis, Record, empty, record_of, record_on_line, stacked
from .reasons import reasons
from .rows import subset
from .sources import Columns, columns
from .store import fingerprint
from .subsets import LARGE, Subsets, SubsetWork
from .work import PATTERNS, Done, Work, arrays, by_pattern, remembered

BLOCK_LANES = 4096
"""Most models on a line that are worked on at once."""
STACKED_NUMBERS = 1 << 22
"""Most numbers in the designs of models that are stacked at once."""
ROUNDING = 1e-9
"""Relative error within which a column of X is linear in the changing one."""
PROBES = (-2.0, 1.0, 3.0)
"""Values that the changing column takes to see whether the design is linear in it."""


# --- what differs -------------------------------------------------------------------------------


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
        value = others.get(name)
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


# --- the changing column ------------------------------------------------------------------------


def changing(scan: Any) -> tuple[str, Any]:
    """Read the `scan` argument of `fit_many`: the name and the values of a column."""
    if not isinstance(scan, Mapping) or len(scan) != 1:
        raise DataError(
            "scan must be a mapping with one entry, the changing column's name in the formula and "
            "its values: scan={'snp': genotypes}"
        )
    ((name, values),) = scan.items()
    return str(name), values


def scanned_design(
    spec: ModelSpec, table: Table, name: str, build: Callable[[Any], Design]
) -> tuple[Design, tuple[int, ...]]:
    """Return the design with ones for the changing column, and which columns of X it changes.

    Args:
        spec: the model.
        table: the data.
        name: name of the changing column in the formula.
        build: makes the design of a table.

    Raises:
        DataError: unless the column is in the formula, in the fixed effects only, and these are
            linear in it.
    """
    fixed = [names for factor in term_factors(spec.fixed) for names in factor_names(factor)[0]]
    for term in spec.random:
        parts = [*term_factors(term.design), *(offset_factor(g) for g in term.group_names)]
        if any(name in factor_names(factor)[0] for factor in parts):
            raise DataError(
                f"scan={name!r} is in the random term {term}: only columns of the fixed effects "
                "can change from model to model"
            )
    for text in spec.offsets:
        if name in factor_names(offset_factor(text))[0]:
            raise DataError(f"scan={name!r} is in offset({text}): pass offset= a column per model")
    if name not in fixed:
        raise DataError(
            f"scan={name!r} is not in the formula, {spec.fixed!r}: add it where the changing "
            "column belongs"
        )
    values = np.random.default_rng(0).choice(PROBES, size=n_rows(table))
    with warnings.catch_warnings():
        # Of logarithms of what is negative here.
        warnings.simplefilter("ignore")
        probe = build(with_column(table, name, values))
    own = [factor.expr for factor in term_factors(spec.fixed) if name in factor_names(factor)[0]]
    for expression in own:
        if expression in probe.terms.codings:
            raise _not_linear(name, expression)
    transformed = next((expression for expression in own if expression != name), name)
    try:
        design = build(with_column(table, name, np.ones(len(values))))
    except DataError:
        raise _not_linear(name, transformed) from None
    x = values[np.asarray(probe.index, dtype=np.int64)]
    if len(x) != len(design.y):
        raise _not_linear(name, transformed)
    columns = np.flatnonzero((probe.X != design.X).any(axis=0))
    for j in columns:
        size = np.abs(design.X[:, j]).max() + np.abs(probe.X[:, j]).max()
        if np.abs(probe.X[:, j] - x * design.X[:, j]).max() > ROUNDING * size:
            raise _not_linear(name, design.x_names[j])
    return design, tuple(columns.tolist())


def _not_linear(name: str, term: str) -> DataError:
    return DataError(
        f"{term!r} is not linear in scan={name!r}: the changing column may be multiplied "
        "by others, but not transformed; transform its values before"
    )


def with_column(table: Any, name: str, values: np.ndarray) -> Any:
    """Return a table with one column more, or another in its place."""
    if isinstance(table, pd.DataFrame):
        return table.assign(**{name: values})
    return {**table, name: values}


# --- models on a line ---------------------------------------------------------------------------


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
    line: one_variance.OneVariance
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
        _put(found, np.flatnonzero(usable & still), self._without(y, usable & still))
        moving = np.flatnonzero(usable & ~still)
        if moving.size:
            record, closer = self._scanned(y, responses, x, moving)
            _put(found, moving, record)
            for lane in moving[closer]:
                _put(found, [lane], self._alone(y[:, lane if y.shape[1] > 1 else 0], x[:, lane]))
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
            fitted.unscaled_variances,
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
        statistics = one_variance.statistics(self.line, y[:, take])
        found = one_variance.fits(self.line, statistics, self.settings.reml)
        record = record_on_line(
            found,
            self.design.X.shape[1],
            self.kept[: -len(self.columns)],
            self.tests,
            partial(self.line.unscaled_variances, found.variance),
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
    free = not settings.fix and len(terms) == 1 and terms[0].pattern is not None
    if len(columns) > scan.MOST_COLUMNS or settings.engine not in ("auto", "grouped"):
        return None
    arranged = layout(design.X[:, others], factors, design.weights, settings.engine)
    if not one_variance.suits(arranged, free):
        return None
    check_enough(design, arranged, terms, settings)
    line = one_variance.one_variance(arranged)
    if line is None:
        return None
    kept = np.concatenate([others[arranged.fixed.kept], np.array(columns, dtype=int)])
    return ScanEngine(design, columns, settings, tests, line, kept)


def fitted_alone(design: Design, settings: Settings) -> Fit:
    """Fit one model without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", RankWarning)
        return fit_prepared(prepare(design, settings.engine), settings)


def as_range(lanes: np.ndarray) -> np.ndarray | slice:
    """Return ascending positions as a slice if they follow on one another."""
    first, last = int(lanes[0]), int(lanes[-1])
    return slice(first, last + 1) if last - first + 1 == len(lanes) else lanes


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


def _put(found: Record, lanes: np.ndarray | list[int], record: Record) -> None:
    """Put the results of some lanes in their places."""
    for mine, part in zip(found, record, strict=True):
        mine[lanes] = part


# --- the work -----------------------------------------------------------------------------------


@dataclass(eq=False)
class VariedWork(Work):
    """Fits blocks of models that differ in more than the response.

    Attributes:
        columns: positions of the columns of X that are multiplied by the models' own.
        weighted: whether prior weights differ.
        lines: per pattern of missing values, as bytes, what fits it on a line.
    """

    columns: tuple[int, ...] = ()
    weighted: bool = False
    lines: dict[bytes, ScanEngine | None] = field(default_factory=dict)

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

    def notes(self, n_obs: np.ndarray) -> tuple[str, ...]:
        """See `Work`."""
        return tuple(
            note.replace(" responses have", " models have") for note in super().notes(n_obs)
        )

    @cached_property
    def key(self) -> str:
        """See `Work`."""
        own = [str(self.design.spec), self.settings, self.tests, self.columns, self.weighted]
        return fingerprint(*arrays(self.design), *own)

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
            record = by_pattern(block.gone, partial(self._on_line, block))
        return record, np.full(len(block), n) if complete else n - block.gone.sum(axis=0)

    def _on_line(
        self, block: Block, key: bytes, rows: np.ndarray | None, lanes: np.ndarray | None
    ) -> Record:
        """Fit models that lack the same rows; None for all of the rows, or models."""
        own = block if lanes is None or rows is None else block.take(lanes, rows)
        assert own.x is not None
        engine = self._line_of(key, np.arange(len(block.y)) if rows is None else rows)
        return self._stacked(own, rows) if engine is None else engine.fit(own.y, own.x)

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
            infinite = here.infinite
            # They would be mistaken for columns without any variation.
            sound = here.take(np.flatnonzero(~infinite)) if infinite.any() else here
            subsets = stacked_models(design, self.columns, sound)
            work = SubsetWork(subsets.design, self.settings, self.tests, subsets, self._most_groups)
            found = empty(len(here), design.X.shape[1], self.width, len(self.tests))
            found.status[infinite] = Status.INFINITE
            _put(found, np.flatnonzero(~infinite), work.done(np.arange(int(np.sum(~infinite))))[0])
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
        groupings=tuple(replace(each, codes=each.codes[row]) for each in design.groupings),
        weights=weights if block.weights is None else own(block.weights),
        offset=None if design.offset is None else design.offset[row],
        index=design.index[row],
    )
    return Subsets(pd.RangeIndex(len(block)), lane, stack)


def _one_subset(design: Design) -> Subsets:
    return Subsets(pd.RangeIndex(1), np.zeros(len(design.y), dtype=np.int64), design)
