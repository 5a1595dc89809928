"""What a worker of `fit_many` does: fit blocks of responses of one design."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, ClassVar

import numpy as np

from ..compress.columns import column_factor
from ..constraints import Settings
from ..design import DataError
from ..fit import aliased, prepare
from ..frames import plural
from ..matrices import Design, lone_group
from ..solve import Status
from .engines import Engine, PartialEngine, Record, as_identified, empty, engine_of, stacked
from .reasons import failed, with_reasons
from .rows import subset
from .seals import fingerprint, parts_of

PATTERNS = 64
"""Most designs on some of the rows that are kept for responses with the same missing values."""
REMEMBERED = 2
"""Most works that a process keeps which came from another one."""

Done = tuple[Record, np.ndarray]
"""Results of a block, and the number of rows of each of its responses."""


@dataclass(eq=False)
class Work:
    """Fits blocks of responses; designs and templates are shared by all of them.

    A copy in another process, of which each block brings one, is the same object every time.

    Attributes:
        design: the design; where fits need a start, its response lends them one, so that results
            do not depend on which responses are fitted together.
        settings: how to fit.
        tests: what is tested.
        engines: per pattern of missing values, as bytes, what fits it.
    """

    design: Design
    settings: Settings
    tests: tuple[Any, ...]
    engines: dict[bytes, Engine | None] = field(default_factory=dict)
    unit: ClassVar[str] = "response"
    _lock: Any = field(default_factory=Lock, repr=False)

    @property
    def name(self) -> str:
        """How complete responses are fitted."""
        engine = self._engine_of(b"", np.arange(len(self.design.y)))
        return "nothing can be fitted" if engine is None else engine.name

    def notes(self, n_obs: np.ndarray) -> tuple[str, ...]:
        """Return what a reader of the results should know.

        Args:
            n_obs: number of rows that each response has.
        """
        return left_out(self.design, n_obs, self.unit) + self.not_identified

    @cached_property
    def aliased(self) -> tuple[str, ...]:
        """What all complete responses have no coefficient of, in words."""
        return dropped_columns(self.design)

    @property
    def not_identified(self) -> tuple[str, ...]:
        """What complete responses do not tell apart, in words."""
        return not_identified(self._engine_of(b"", np.arange(len(self.design.y))))

    @cached_property
    def key(self) -> str:
        """The same for the same work, wherever it is done."""
        return fingerprint(*parts_of(self.design), self.design.y, self.settings, self.tests)

    def __reduce__(self) -> Any:
        return remembered, (self.key, Work, self.design, self.settings, self.tests)

    def done(self, y: np.ndarray) -> Done:
        """Fit a block of responses and count their rows."""
        gone = missing(y)
        rows = np.full(y.shape[1], len(y))
        return self._fit_lacking(y, gone), rows if gone is None else rows - gone.sum(axis=0)

    def fit(self, y: np.ndarray) -> Record:
        """Fit a block of responses, NaN where missing, (n, lanes)."""
        return self._fit_lacking(y, missing(y))

    def _fit_lacking(self, y: np.ndarray, gone: np.ndarray | None) -> Record:
        if gone is None:
            return self._fit(b"", np.arange(len(y)), y)
        return by_pattern(
            gone, lambda key, rows, lanes: self._fit(key, rows, y[np.ix_(rows, lanes)])
        )

    def _fit(self, key: bytes, rows: np.ndarray, y: np.ndarray) -> Record:
        found = self._engine_of(key, rows)
        if found is None:
            none = empty(y.shape[1], len(self.design.x_names), self.width, len(self.tests))
            return failed(none, np.arange(y.shape[1]), Status.TOO_FEW)
        X, offset = self.design.X, self.design.offset
        if key:
            X, offset = X[rows], None if offset is None else offset[rows]
        return with_reasons(found.fit(y), y, X, offset)

    @property
    def width(self) -> int:
        """Number of random effects, q."""
        return sum(block.Z.shape[1] for block in self.design.blocks)

    def _engine_of(self, key: bytes, rows: np.ndarray) -> Engine | None:
        with self._lock:  # of several threads, one analyses the design
            if key not in self.engines:
                if len(self.engines) >= PATTERNS:
                    # The oldest that is not the complete one.
                    self.engines.pop(next(k for k in self.engines if k))
                self.engines[key] = self._engine(rows)
            return self.engines[key]

    def _engine(self, rows: np.ndarray) -> Engine | None:
        """Return what fits responses on some of the rows; None if nothing can."""
        if len(rows) == 0:
            return None
        design = subset(self.design, rows, self.design.y[rows])
        if lone_group(design.groupings, design.blocks) is not None:
            return None
        try:
            prepared = prepare(design, self.settings.engine, self.settings)
            engine = engine_of(prepared, self.settings, self.tests)
            return as_identified(engine, prepared, self.settings, self.tests)
        except DataError:
            if len(rows) == len(self.design.y):
                raise
            return None


def missing(y: np.ndarray) -> np.ndarray | None:
    """Return where values are missing, (n, lanes); None if, as mostly, none is."""
    # The least of some values is NaN if any of them is: one pass that writes nothing.
    return np.isnan(y) if np.isnan(y.min(axis=0)).any() else None


def by_pattern(gone: np.ndarray, fit: Callable[[bytes, np.ndarray, np.ndarray], Record]) -> Record:
    """Fit the lanes that lack the same rows together, and return all in their order.

    Args:
        gone: where values are missing, (n, lanes).
        fit: fits some lanes on some rows; the first argument names the pattern, empty for all rows.
    """
    packed = np.packbits(gone, axis=0)
    keys, which = np.unique(packed, axis=1, return_inverse=True)
    which = which.reshape(-1)
    parts: list[tuple[np.ndarray, Record]] = []
    for number in range(keys.shape[1]):
        lanes = np.flatnonzero(which == number)
        rows = np.flatnonzero(~gone[:, lanes[0]])
        key = b"" if len(rows) == len(gone) else keys[:, number].tobytes()
        parts.append((lanes, fit(key, rows, lanes)))
    order = np.argsort(np.concatenate([lanes for lanes, _ in parts]), kind="stable")
    whole = stacked([record for _, record in parts])
    return Record(*(leaf[order] for leaf in whole))


def left_out(design: Design, n_obs: np.ndarray, unit: str) -> tuple[str, ...]:
    """Return notes on the rows that were left out.

    Args:
        design: the design.
        n_obs: number of rows of each fit.
        unit: what is fitted.
    """
    found = []
    if design.n_dropped:
        found.append(f"{plural(design.n_dropped, 'row')} dropped for missing covariates")
    gaps = int(np.sum(n_obs < len(design.y)))
    if gaps:
        verb = "has" if gaps == 1 else "have"
        found.append(
            f"{plural(gaps, unit)} {verb} missing values; each is fitted to the rows that it has"
        )
    return tuple(found)


def dropped_columns(design: Design) -> tuple[str, ...]:
    """Return a note on the columns that are linear combinations of others in all rows together."""
    return aliased(design.x_names, column_factor(design.X, design.weights).kept)


def not_identified(engine: Engine | None) -> tuple[str, ...]:
    """Return a note on what a design does not tell apart."""
    return (str(engine.unidentified),) if isinstance(engine, PartialEngine) else ()


def remembered(key: str, make: Callable[..., Any], *parts: Any) -> Any:
    """Return the work that has come to this process before, with what it has analysed."""
    work = _WORKS.pop(key, None) or make(*parts)
    _WORKS[key] = work
    while len(_WORKS) > REMEMBERED:
        _WORKS.pop(next(iter(_WORKS)))
    return work


_WORKS: dict[str, Any] = {}


def arrays(design: Design) -> list[np.ndarray]:
    """Return all arrays that make a design, its response apart."""
    found = [design.X, *(block.Z for block in design.blocks)]
    for grouping in design.groupings:
        found += [grouping.codes] + ([] if grouping.root is None else [grouping.root])
    return found + [part for part in (design.weights, design.offset) if part is not None]
