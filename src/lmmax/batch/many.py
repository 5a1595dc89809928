"""`fit_many`: one model for many responses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..archive import ArchiveError
from ..constraints import Settings
from ..fit import IdentifiabilityWarning, RankWarning, check_reml, warn_of_slopes
from ..options import EngineName, Missing, Solver
from ..safe import Evaluate
from ..spec import ModelSpec
from .engines import Record, stacked
from .processes import alone, check_same, first_of_all, put_together, share, wait
from .progress import progress_bar
from .reading import begin, block_size, check_chunk
from .result import BatchFit, hypotheses
from .saved import to_bytes
from .seals import fingerprint, parts_of
from .sources import Chunks, Columns, identity, total
from .store import FORMAT, Store, StoredRecord, StoreError, fields_of, store_at
from .stream import check_forks, stream
from .subsets import SUBSETS, Subsets, SubsetWork, read_subsets
from .varied import Varied
from .work import Done, Work

Source = Columns | Chunks | Varied | Subsets
"""Where models come from."""


def fit_many(
    formula: str | ModelSpec,
    data: Any,
    responses: Any = None,
    *,
    names: Any = None,
    by: Any = None,
    scan: Mapping[str, Any] | None = None,
    reml: bool = True,
    tests: Mapping[str, Any] | None = None,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, Any] | None = None,
    relmat: Mapping[str, pd.DataFrame] | None = None,
    missing: Missing = "drop",
    solver: Solver = "auto",
    tol: float | None = None,
    max_steps: int | None = None,
    engine: EngineName = "auto",
    chunk: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    executor: Executor | None = None,
    progress: bool = False,
    context: Mapping[str, Any] | None = None,
    evaluate: Evaluate = "python",
) -> BatchFit:
    """Fit one model to many responses, or to many subsets of the rows, each to its own optimum.

    A formula is code: its expressions run as Python.  For text of others use ``evaluate="safe"``.

    What the responses share is worked out once.  A model with one random intercept, one random
    slope or one known relationship matrix is then a search on a line for each response; other
    models are solved side by side, those too large for a dense factor one by one.

    With `by` there is one fit for each level of a column, to its rows, and the response is that of
    the formula.  Columns of the design are those of all rows together: subsets share names and
    contrasts, ``scale(x)`` scales by all rows, and a coefficient that a subset cannot tell, such as
    that of a level it lacks, is NaN there.  Models with one grouping factor are solved side by
    side.

    Args:
        formula: the model, ``"~ age + (1 | subject)"``; what is left of the tilde is a label.  With
            `by` the whole model, ``"sales ~ price + (1 + price | product)"``.
        data: the covariates and groups, n rows.
        responses: an array (n, k), memory-mapped or not, Zarr, HDF5, SciPy sparse, a data frame
            with k columns, a list of columns of ``data``, an AnnData object or a tuple of it and
            the name of a layer, or the path of a ``.npy`` or ``.parquet`` file, of which a block at
            a time is read.  Or an iterator of arrays (n, c) or data frames with any number of
            columns each, which is read once: there is no ``batch[i]`` then.  A response may have
            missing values (NaN), which are left out: this is nearly as fast while many responses
            lack the same rows.
        names: names of the responses, in place of their own.
        by: in place of `responses`, name of the column whose levels are the subsets, or a list of
            several names; rows where it is missing are left out.
        scan: a column of the design that changes from model to model, such as a genotype: its name
            in the formula, and what `responses` takes, a column per model: ``{"snp": genotypes}``.
            Columns of the fixed effects that it occurs in must be linear in it (``snp``,
            ``snp:age``).  There is a model for each column and one response, for each response and
            one column, or for each pair of the two, column i with response i.  Rows in which it is
            missing are left out of that model.
        reml: restricted maximum likelihood or, if False, maximum likelihood.
        tests: hypotheses to test in each fit besides the single coefficients, by name, each in a
            form that :meth:`lmmax.Fit.t_test` takes.
        weights: prior weights, as in :func:`lmmax.fit`, or an array (n, k) or data frame with those
            of each response in a column; rows without a weight (NaN) are left out.
        offset: known part of the mean, likewise.
        contrasts: coding per factor, as in :func:`lmmax.fit`; like all that follow.
        relmat: relationship matrices by grouping factor.
        missing: "drop" rows whose covariates are missing, or "raise".
        solver: "auto", "newton" or "lbfgs".
        tol: largest Newton decrement that counts as converged.
        max_steps: most solver steps.
        engine: form of the likelihood.
        chunk: responses worked on at once; by their size if None.  Results do not depend on it.
        out: directory for the results, to which each chunk is written as it is done: Zarr arrays
            if its name ends in ``.zarr`` (needs zarr), else Parquet files (needs pyarrow).  They
            are then not held in memory, but read, field by field, when the batch is asked for them,
            in another process too: :meth:`lmmax.BatchFit.open`.
        resume: go on with what is in `out`, if that is the same work by the same version of lmmax;
            chunks that are there are not fitted again.  Their responses are read, and compared with
            those that the chunk was fitted to by a hash of all of them: where they differ, or where
            files were moved or copied, it is fitted again.  If another run still writes to the
            directory, this one waits up to a minute for it to end.
        executor: a `concurrent.futures` executor, or one that acts like it (Dask's
            ``client.get_executor()``), that fits the chunks.  Results are the same without it.
            Processes must not be forked, which JAX does not survive:
            ``ProcessPoolExecutor(8, mp_context=multiprocessing.get_context("spawn"))``, in a
            script under ``if __name__ == "__main__":``.
        progress: show a progress bar with rate and remaining time (needs tqdm).
        context: names for use in the formula.
        evaluate: "python", for which a formula is code, or "safe" for formulas of others: only
            columns, arithmetic, elementwise functions of NumPy and the transforms.

    Returns:
        The fits.  A response that cannot be fitted (constant, infinite, too few rows) has NaN and
        its status, and does not disturb the others; so has a subset.

    Raises:
        ValueError: unless one of `responses` and `by` is given.
        DataError: if the responses have another number of rows than the data, and as for
            :func:`lmmax.fit`.
        StoreError: if `out` holds other results, or another run writes to it.
        ValueError: for an executor whose processes are forked.

    Warns:
        LostWorkerWarning: if a worker of the executor is lost; its responses are fitted here.
        StoreWarning: if chunks in `out` are of other responses, or were copied there or moved, and
            are fitted again.

    Example:
        >>> import lmmax, numpy as np, pandas as pd
        >>> sleep = lmmax.datasets.load("sleepstudy")
        >>> noise = np.random.default_rng(0).normal(size=(180, 3))
        >>> y = sleep["Reaction"].to_numpy()[:, None] + 30.0 * noise
        >>> batch = lmmax.fit_many("~ Days + (1 + Days | Subject)", sleep, y)
        >>> batch.params.round(2)
           Intercept   Days
        0     247.48  10.98
        1     260.95   8.56
        2     250.38  10.49
        >>> genotypes = np.random.default_rng(1).integers(0, 3, size=(18, 4))
        >>> rows = pd.factorize(sleep["Subject"])[0]
        >>> model = "~ Days * snp + (1 | Subject)"
        >>> scan = lmmax.fit_many(model, sleep, ["Reaction"], scan={"snp": genotypes[rows]})
        >>> scan.pvalues["Days:snp"].round(3).tolist()
        [0.87, 0.55, 0.762, 0.415]
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
    if by is not None and scan is not None:
        raise ValueError("scan= goes with responses=, not with by=")
    settings = Settings(
        reml=check_reml(reml), solver=solver, tol=tol, max_steps=max_steps, engine=engine
    )
    check_chunk(chunk)
    _check_where(out, resume, executor)
    options: dict[str, Any] = {
        "weights": weights,
        "offset": offset,
        "contrasts": contrasts,
        "relmat": relmat,
        "missing": missing,
        "context": context,
        "evaluate": evaluate,
    }
    source: Source
    work: Work | SubsetWork
    if by is None:
        design, source, work = begin(
            formula, data, responses, settings, tests, options, names, scan
        )
        size = block_size(chunk, len(design.y))
    elif names is not None:
        raise ValueError("names= is for responses; subsets are named by the levels of by=")
    else:
        design, source = read_subsets(formula, data, by, **options)
        work = SubsetWork(design, settings, hypotheses(tests, design.x_names), source)
        size = chunk or SUBSETS
    served = work.name
    for note in work.aliased:
        warnings.warn(note, RankWarning, stacklevel=2)
    if isinstance(work, Work) and work.not_identified:
        warnings.warn(
            f"{work.not_identified[0]}; errors of coefficients that depend on them are NaN",
            IdentifiabilityWarning,
            stacklevel=2,
        )
    else:
        warn_of_slopes(design)
    store = None if out is None else _store(Path(out), work, source, size, resume)
    with nullcontext() if store is None else store:
        record, n_obs = _fitted(work, source, size, store, executor, progress)
        batch = BatchFit(
            names=source.names,
            record=record,
            design=design,
            settings=settings,
            hypotheses=work.tests,
            n_obs=n_obs,
            engine=served,
            notes=(*work.aliased, *work.notes(n_obs)),
            source=source,
        )
        return batch if store is None else _finished(batch, store)


def _check_where(out: Any, resume: bool, executor: Any) -> None:
    """Raise for what is no directory, or no executor."""
    if out is None and resume:
        raise ValueError("resume=True goes with out=, the directory of the results to go on with")
    if out is not None and not isinstance(out, str | PathLike):
        raise TypeError(f"out={out!r} must be the path of a directory")
    if out is not None and not str(out).strip():
        raise ValueError(f"out={out!r} must be the path of a directory: it names none")
    if executor is None:
        return
    if isinstance(executor, type) or not callable(getattr(executor, "submit", None)):
        raise TypeError(
            f"executor={executor!r} must be an executor of concurrent.futures, or have its submit()"
        )
    check_forks(executor)


def _fitted(
    work: Work | SubsetWork,
    source: Source,
    size: int,
    store: Store | None,
    executor: Executor | None,
    progress: bool,
) -> tuple[Record | StoredRecord, np.ndarray]:
    """Fit all blocks; return the results, those in a store left there, and the numbers of rows."""
    done: list[Done] = []
    known, mine = total(source), share()
    with progress_bar(known and len(range(mine[0], known, mine[1])), progress) as bar:
        for found in stream(work, source, size, store, executor, mine):
            bar.update(len(found[1]))
            if store is None:
                done.append(found)
    k = len(source.names)
    if store is not None:
        wait()
        record = StoredRecord(store, k, size, store.contents(k, size))
        return record, store.field("n_obs", k, size, record.contents)
    if not alone():
        done = put_together(done, -(-k // size))
    return stacked([record for record, _ in done]), np.concatenate([n_obs for _, n_obs in done])


def _finished(batch: BatchFit, store: Store) -> BatchFit:
    """Keep in the store what reads its results back, the responses left out."""
    trouble = ""
    if share()[0] == 0:
        try:
            content = to_bytes(batch)
        except ArchiveError as error:
            trouble = str(error)
        else:
            store.finish(batch.names, content)
    wait()
    if trouble:
        note = f"BatchFit.open cannot read the results back: {trouble}"
        batch = replace(batch, notes=(*batch.notes, note))
    return batch


def _store(
    path: Path,
    work: Work | SubsetWork,
    source: Source,
    size: int,
    resume: bool,
) -> Store:
    from .. import __version__

    design = work.design
    store = store_at(path, fields_of(design.x_names, work.width, [t.name for t in work.tests]))
    # The response that lends the others a start, or that of all subsets; and the last, if it is
    # there to be seen.
    seen = [design.y]
    if isinstance(source, Columns | Varied):
        seen.append(source.column(len(source.names) - 1))
    description = {
        "format": FORMAT,
        "lmmax": __version__,
        "formula": str(design.spec),
        "design": fingerprint(*parts_of(design)),
        "rows": fingerprint(source.rows),
        "settings": repr(work.settings),
        "tests": fingerprint(*(part for test in work.tests for part in test)),
        **identity(source, *seen),
        **(source.identity() if isinstance(source, Varied) else {}),
        "chunk": size,
    }
    check_same(fingerprint(json.dumps(description)), "work, or other responses")

    def begin_or_join() -> None:
        if share()[0] == 0:
            store.begin(description, resume)
        else:
            store.join(description)

    first_of_all(begin_or_join, StoreError)
    return store
