"""`fit_many`: one model for many responses."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pandas as pd

from ..constraints import Settings
from ..design import DataError, Design, build_design
from ..fit import Prepared, check_reml, prepare
from ..formula import parse_formula
from ..frames import as_table
from ..spec import ModelSpec
from .engines import Engine, Record, empty, engine_of, stacked
from .result import BatchFit, hypotheses
from .rows import subset
from .sources import Columns, columns
from .store import Store, columns_of, fingerprint

CHUNK_BYTES = 1 << 27
"""Most bytes of responses, in double precision, that are worked on at once."""
WINDOW = 8
"""Most chunks that are handed to workers before the first of them is waited for."""
PATTERNS = 64
"""Most designs on some of the rows that are kept for responses with the same missing values."""


def fit_many(
    formula: str | ModelSpec,
    data: Any,
    responses: Any,
    *,
    reml: bool = True,
    tests: Mapping[str, Any] | None = None,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, Any] | None = None,
    relmat: Mapping[str, pd.DataFrame] | None = None,
    missing: str = "drop",
    solver: str = "auto",
    tol: float | None = None,
    max_steps: int | None = None,
    engine: str = "auto",
    chunk: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    executor: Executor | None = None,
    progress: bool = False,
    context: Mapping[str, Any] | None = None,
) -> BatchFit:
    """Fit one model to many responses, each to its own optimum.

    What the responses share is worked out once.  A model with one random intercept, one random
    slope or one known relationship matrix is then a search on a line for each response; other
    models with one grouping factor are solved side by side; those with several one by one.

    Args:
        formula: the model, ``"~ age + (1 | subject)"``; what is left of the tilde is a label.
        data: the covariates and groups, n rows.
        responses: an array (n, k), memory-mapped or not, Zarr, SciPy sparse, a data frame with k
            columns, a list of columns of ``data``, or the path of a ``.npy`` or ``.parquet`` file,
            of which a block at a time is read.  A response may have missing values (NaN), which
            are left out: this is nearly as fast while many responses lack the same rows.
        reml: restricted maximum likelihood or, if False, maximum likelihood.
        tests: hypotheses to test in each fit besides the single coefficients, by name, each in a
            form that :meth:`lmmax.Fit.t_test` takes.
        weights: prior weights, as in :func:`lmmax.fit`; like all that follow.
        offset: known part of the mean.
        contrasts: coding per factor.
        relmat: relationship matrices by grouping factor.
        missing: "drop" rows whose covariates are missing, or "raise".
        solver: "auto", "newton" or "lbfgs".
        tol: largest Newton decrement that counts as converged.
        max_steps: most solver steps.
        engine: form of the likelihood.
        chunk: responses worked on at once; by their size if None.  Results do not depend on it.
        out: directory for the results, a Parquet file for each chunk as it is done (needs
            pyarrow).
        resume: go on with what is in `out`, if that is the same work; chunks that are there are
            not fitted again.
        executor: a `concurrent.futures` executor, or one that acts like it (Dask's
            ``client.get_executor()``), that fits the chunks.  Results are the same without it.
        progress: show a progress bar with rate and remaining time (needs tqdm).
        context: names for use in the formula.

    Returns:
        The fits.  A response that cannot be fitted (constant, infinite, too few rows) has NaN and
        its status, and does not disturb the others.

    Raises:
        DataError: if the responses have another number of rows than the data, and as for
            :func:`lmmax.fit`.
        StoreError: if `out` holds other results.

    Example:
        >>> import lmmax, numpy as np
        >>> sleep = lmmax.datasets.load("sleepstudy")
        >>> noise = np.random.default_rng(0).normal(size=(180, 3))
        >>> y = sleep["Reaction"].to_numpy()[:, None] + 30.0 * noise
        >>> batch = lmmax.fit_many("~ Days + (1 + Days | Subject)", sleep, y)
        >>> batch.params.round(2)
           Intercept   Days
        0     250.81  10.54
        1     250.85  10.46
        2     254.96  10.39
    """
    settings = Settings(
        reml=check_reml(reml), solver=solver, tol=tol, max_steps=max_steps, engine=engine
    )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a whole number, at least 1")
    design, rows = _design(
        formula,
        data,
        weights=weights,
        offset=offset,
        contrasts=contrasts,
        relmat=relmat,
        missing=missing,
        context=context,
    )
    source = columns(responses, as_table(data), rows)
    work = Work(design, settings, hypotheses(tests, design.x_names))
    size = chunk or max(1, min(1 << 16, CHUNK_BYTES // (8 * len(design.y))))
    store = None if out is None else _store(Path(out), work, source, size, resume)
    records, counts = [], []
    with _bar(len(source.names), progress) as bar:
        for record, n_obs in _chunks(work, source, size, store, executor):
            records.append(record)
            counts.append(n_obs)
            bar.update(len(n_obs))
    return BatchFit(
        names=source.names,
        record=stacked(records),
        design=design,
        settings=settings,
        hypotheses=work.tests,
        n_obs=np.concatenate(counts),
        engine=work.name,
        notes=work.notes(np.concatenate(counts)),
        source=source,
    )


_Done = tuple[Record, np.ndarray]


def _chunks(
    work: Work, source: Columns, size: int, store: Store | None, executor: Executor | None
) -> Iterator[_Done]:
    """Yield the results of the chunks in order; what is in the store is not fitted again.

    Reading runs ahead of fitting, by one chunk, or by a few for each worker.
    """
    k = len(source.names)

    def names(first: int) -> Any:
        return source.names[first : first + size]

    def finished(first: int, done: _Done) -> _Done:
        if store is not None:
            store.write(first, names(first), *done)
        return done

    starts = range(0, k, size)
    waiting: deque[tuple[int, Any]] = deque()
    with ThreadPoolExecutor(1) as reader:
        blocks: deque[tuple[int, Any]] = deque()
        todo = deque(starts)
        ahead = 1 if executor is None else WINDOW
        while todo or blocks or waiting:
            while todo and len(blocks) + len(waiting) <= ahead:
                first = todo.popleft()
                known = None if store is None else store.read(first)
                if known is not None:
                    blocks.append((first, known))
                else:
                    last = min(first + size, k)
                    blocks.append((first, reader.submit(source.block, first, last)))
            first, block = blocks.popleft() if blocks else (-1, None)
            if isinstance(block, tuple):
                waiting.append((first, block))
            elif block is not None and executor is not None:
                y = block.result()
                waiting.append((first, _submitted(executor, work, y)))
            elif block is not None:
                waiting.append((first, partial(fitted, work, block.result())))
            if executor is None or not blocks or len(waiting) > ahead:
                first, result = waiting.popleft()
                yield result if isinstance(result, tuple) else finished(first, result())


def fitted(work: Work, y: np.ndarray) -> _Done:
    """Fit a block of responses; what a worker does."""
    here = _WORKS.setdefault(work.key, work)
    return here.fit(y), len(y) - np.isnan(y).sum(axis=0)


_WORKS: WeakValueDictionary[str, Work] = WeakValueDictionary()


def _submitted(executor: Executor, work: Work, y: np.ndarray) -> Any:
    """Hand a block to a worker; what a lost worker does not return is done here."""
    future: Any
    try:
        future = executor.submit(fitted, work, y)
    except (BrokenExecutor, RuntimeError):
        return partial(fitted, work, y)

    def result() -> _Done:
        try:
            return future.result()
        except (BrokenExecutor, CancelledError, ConnectionError):
            return fitted(work, y)

    return result


def _store(path: Path, work: Work, source: Columns, size: int, resume: bool) -> Store:
    design = work.design
    store = Store(path, columns_of(design.x_names, work.width, [t.name for t in work.tests]))
    arrays = [design.X, *(block.Z for block in design.blocks)]
    arrays += [grouping.codes for grouping in design.groupings]
    arrays += [part for part in (design.weights, design.offset) if part is not None]
    store.begin(
        {
            "format": 1,
            "formula": str(design.spec),
            "design": fingerprint(*arrays, *(t.L for t in work.tests)),
            "settings": repr(work.settings),
            "responses": len(source.names),
            "names": fingerprint(list(map(str, source.names))),
            "chunk": size,
        },
        resume,
    )
    return store


def _bar(total: int, show: bool) -> Any:
    if not show:
        return nullcontext(SimpleNamespace(update=lambda n: None))
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="fit", unit_scale=True)


def _design(formula: Any, data: Any, **options: Any) -> tuple[Design, np.ndarray]:
    """Return the design, its response a placeholder, and the positions of its rows in the data."""
    if isinstance(formula, str):
        label, tilde, rest = formula.partition("~")
        if not tilde:
            parse_formula(formula)  # raises
        spec = parse_formula(f"response ~ {rest}")
        label = label.strip() or "response"
    elif isinstance(formula, ModelSpec):
        spec, label = replace(formula, response="response"), formula.response
    else:
        raise TypeError(f"formula must be text or a ModelSpec, not {type(formula).__name__}")
    table = as_table(data)
    n = len(table) if isinstance(table, pd.DataFrame) else len(next(iter(table.values())))
    # A response that no design explains; rows keep their positions as labels.
    placeholder = np.random.default_rng(0).normal(size=n)
    if isinstance(table, pd.DataFrame):
        table = table.reset_index(drop=True).assign(response=placeholder)
    else:
        table = {**table, "response": placeholder}
    design = build_design(spec, table, **options)
    return replace(design, response_name=label), np.asarray(design.index, dtype=np.int64)


# --- work -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Work:
    """Fits blocks of responses; designs and templates are shared by all of them.

    Attributes:
        design: the design.
        settings: how to fit.
        tests: what is tested.
        engines: per pattern of missing values, as bytes, what fits it.
    """

    design: Design
    settings: Settings
    tests: tuple[Any, ...]
    engines: dict[bytes, Engine | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How the responses without missing values are fitted."""
        first = next((found for found in self.engines.values() if found is not None), None)
        return "nothing could be fitted" if first is None else first.name

    def notes(self, n_obs: np.ndarray) -> tuple[str, ...]:
        """What a reader should know.

        Args:
            n_obs: number of rows that each response had, (k,).
        """
        found = []
        design = self.design
        if design.n_dropped:
            found.append(f"{design.n_dropped} rows dropped for missing covariates")
        gaps = int(np.sum(n_obs < len(design.y)))
        if gaps:
            found.append(
                f"{gaps} responses have missing values; each is fitted to the rows that it has"
            )
        return tuple(found)

    @cached_property
    def key(self) -> str:
        """The same for the same work, wherever it is done."""
        return fingerprint(self.design.X, self.design.y, repr(self.settings), self.tests)

    def __getstate__(self) -> dict[str, Any]:
        return {"design": self.design, "settings": self.settings, "tests": self.tests}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, engines={})

    def fit(self, y: np.ndarray) -> Record:
        """Fit a block of responses, NaN where missing, (n, lanes)."""
        gone = np.isnan(y)
        if not gone.any():
            return self._fit(b"", np.arange(len(y)), y)
        packed = np.packbits(gone, axis=0)
        keys, which = np.unique(packed, axis=1, return_inverse=True)
        which = which.reshape(-1)
        parts: list[tuple[np.ndarray, Record]] = []
        for number in range(keys.shape[1]):
            lanes = np.flatnonzero(which == number)
            rows = np.flatnonzero(~gone[:, lanes[0]])
            key = b"" if len(rows) == len(y) else keys[:, number].tobytes()
            parts.append((lanes, self._fit(key, rows, y[np.ix_(rows, lanes)])))
        order = np.argsort(np.concatenate([lanes for lanes, _ in parts]), kind="stable")
        whole = stacked([record for _, record in parts])
        return Record(*(leaf[order] for leaf in whole))

    def _fit(self, key: bytes, rows: np.ndarray, y: np.ndarray) -> Record:
        if key not in self.engines:
            if len(self.engines) >= PATTERNS:
                # The oldest that is not the complete one.
                self.engines.pop(next(k for k in self.engines if k))
            self.engines[key] = self._engine(rows)
        found = self.engines[key]
        if found is None:
            return empty(y.shape[1], len(self.design.x_names), self.width, len(self.tests))
        return found.fit(y)

    @property
    def width(self) -> int:
        """Number of random effects, q."""
        return sum(block.Z.shape[1] for block in self.design.blocks)

    def _engine(self, rows: np.ndarray) -> Engine | None:
        """Return what fits responses on some of the rows; None if nothing can."""
        design = subset(self.design, rows, self.design.y[rows])
        if len(rows) == 0 or any(len(np.unique(g.codes)) < 2 for g in design.groupings):
            return None
        try:
            prepared: Prepared = prepare(design, self.settings.engine)
            return engine_of(prepared, self.settings, self.tests)
        except DataError:
            if len(rows) == len(self.design.y):
                raise
            return None
