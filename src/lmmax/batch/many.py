"""`fit_many`: one model for many responses."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from ..constraints import Settings
from ..design import Design, build_design
from ..fit import check_reml
from ..formula import parse_formula
from ..frames import as_table, n_rows
from ..spec import ModelSpec
from .engines import stacked
from .result import BatchFit, hypotheses
from .sources import Columns, columns
from .store import Store, columns_of, fingerprint
from .stream import stream
from .subsets import SUBSETS, Subsets, SubsetWork, read_subsets
from .work import Work, arrays

CHUNK_BYTES = 1 << 27
"""Most bytes of responses, in double precision, that are worked on at once."""
CANDIDATES = 32
"""Responses among which one is sought that lends the others a start."""


def fit_many(
    formula: str | ModelSpec,
    data: Any,
    responses: Any = None,
    *,
    by: Any = None,
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
    """Fit one model to many responses, or to many subsets of the rows, each to its own optimum.

    What the responses share is worked out once.  A model with one random intercept, one random
    slope or one known relationship matrix is then a search on a line for each response; other
    models with one grouping factor are solved side by side; those with several one by one.

    With `by` there is one fit for each level of a column, to its rows, and the response is that of
    the formula.  Columns of the design are those of all rows together: subsets share names and
    contrasts, ``scale(x)`` scales by all rows, and a coefficient that a subset cannot tell, such as
    that of a level it lacks, is NaN there.  Models with one grouping factor are solved side by
    side.

    Args:
        formula: the model, ``"~ age + (1 | subject)"``; what is left of the tilde is a label.  With
            `by` the whole model, ``"sales ~ price + (1 + price | product)"``.
        data: the covariates and groups, n rows.
        responses: an array (n, k), memory-mapped or not, Zarr, SciPy sparse, a data frame with k
            columns, a list of columns of ``data``, or the path of a ``.npy`` or ``.parquet`` file,
            of which a block at a time is read.  A response may have missing values (NaN), which
            are left out: this is nearly as fast while many responses lack the same rows.
        by: in place of `responses`, name of the column whose levels are the subsets, or a list of
            several names; rows where it is missing are left out.
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
        its status, and does not disturb the others; so has a subset.

    Raises:
        ValueError: unless one of `responses` and `by` is given.
        DataError: if the responses have another number of rows than the data, and as for
            :func:`lmmax.fit`.
        StoreError: if `out` holds other results.

    Warns:
        LostWorkerWarning: if a worker of the executor is lost; its responses are fitted here.

    Example:
        >>> import lmmax, numpy as np
        >>> sleep = lmmax.datasets.load("sleepstudy")
        >>> noise = np.random.default_rng(0).normal(size=(180, 3))
        >>> y = sleep["Reaction"].to_numpy()[:, None] + 30.0 * noise
        >>> batch = lmmax.fit_many("~ Days + (1 + Days | Subject)", sleep, y)
        >>> batch.params.round(2)
           Intercept   Days
        0     247.48  10.98
        1     260.95   8.56
        2     250.38  10.49
        >>> pastes = lmmax.datasets.load("pastes")
        >>> by_batch = lmmax.fit_many("strength ~ 1 + (1 | cask)", pastes, by="batch")
        >>> by_batch.variances.loc["C"].round(3).to_dict()
        {'cask: Intercept': 11.563, 'residual': 0.828}
        >>> by_batch["C"].n_groups
        3
    """
    if (responses is None) == (by is None):
        raise ValueError(
            "give one of responses= (many for the same rows) and by= (a column whose levels are "
            "fitted each on its own)"
        )
    settings = Settings(
        reml=check_reml(reml), solver=solver, tol=tol, max_steps=max_steps, engine=engine
    )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a whole number, at least 1")
    options: dict[str, Any] = {
        "weights": weights,
        "offset": offset,
        "contrasts": contrasts,
        "relmat": relmat,
        "missing": missing,
        "context": context,
    }
    source: Columns | Subsets
    work: Work | SubsetWork
    if by is None:
        design, source, work = begin(formula, data, responses, settings, tests, options)
        size = block_size(chunk, len(design.y))
    else:
        design, source = read_subsets(formula, data, by, **options)
        work = SubsetWork(design, settings, hypotheses(tests, design.x_names), source)
        size = chunk or SUBSETS
    engine = work.name
    store = None if out is None else _store(Path(out), work, source, size, resume)
    records, counts = [], []
    with _bar(len(source.names), progress) as bar:
        for record, n_obs in stream(work, source, size, store, executor):
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
        engine=engine,
        notes=work.notes(np.concatenate(counts)),
        source=source,
    )


def begin(
    formula: Any,
    data: Any,
    responses: Any,
    settings: Settings,
    tests: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> tuple[Design, Columns, Work]:
    """Read the design and the responses, and say what is to be done with them.

    Args:
        formula: the model.
        data: covariates and groups.
        responses: the responses.
        settings: how to fit.
        tests: hypotheses.
        options: of the design.
    """
    design, rows = _design(formula, data, **options)
    source = columns(responses, as_table(data), rows)
    return design, source, Work(lent(design, source), settings, hypotheses(tests, design.x_names))


def block_size(chunk: int | None, n: int) -> int:
    """Return how many responses of n rows are worked on at once."""
    return chunk or max(1, min(1 << 16, CHUNK_BYTES // (8 * n)))


def lent(design: Design, source: Columns) -> Design:
    """Return the design with the first response that varies, from which fits may start.

    The same for the same responses, whichever of them are fitted first, and where.
    """
    first = source.block(0, min(CANDIDATES, len(source.names)))
    for y in first.T:
        known = np.isfinite(y)
        if 2 * known.sum() > len(y) and y[known].max() > y[known].min():
            return replace(design, y=np.where(known, y, y[known].mean()))
    return design


def _store(
    path: Path, work: Work | SubsetWork, source: Columns | Subsets, size: int, resume: bool
) -> Store:
    design = work.design
    store = Store(path, columns_of(design.x_names, work.width, [t.name for t in work.tests]))
    store.begin(
        {
            "format": 1,
            "formula": str(design.spec),
            "design": fingerprint(*arrays(design)),
            "rows": fingerprint(source.rows),
            "settings": repr(work.settings),
            "tests": fingerprint(*(part for test in work.tests for part in test)),
            "responses": len(source.names),
            "values": fingerprint(design.y, source.column(len(source.names) - 1)),
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
    # A response that no design explains; rows keep their positions as labels.
    placeholder = np.random.default_rng(0).normal(size=n_rows(table))
    if isinstance(table, pd.DataFrame):
        table = table.reset_index(drop=True).assign(response=placeholder)
    else:
        table = {**table, "response": placeholder}
    design = build_design(spec, table, **options)
    return replace(design, response_name=label), np.asarray(design.index, dtype=np.int64)
