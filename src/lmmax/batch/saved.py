"""Batches of fits as a file of data, and back; see :mod:`lmmax.saved`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .. import archive, saved
from ..archive import ArchiveError
from ..frames import DataError
from .artifact import NoRecipe, WrittenCoding
from .engines import Hypothesis, Record
from .result import BatchFit, NotKept, Source
from .sources import Chunks, Columns, reopened
from .store import Field, Store, StoredRecord, StoreError, store_at
from .subsets import Subsets
from .varied import Varied

FORMAT, VERSION, WHAT = "lmmax batch", 1, "saved batch of fits"
"""Of the files that batches are saved to."""


@cache
def classes() -> dict[str, type]:
    """Return the classes whose objects a batch is made of, by their names in files."""
    own: dict[str, type] = {
        "BatchFit": BatchFit,
        "Record": Record,
        "Hypothesis": Hypothesis,
        "Columns": Columns,
        "Varied": Varied,
        "Subsets": Subsets,
        "NotKept": NotKept,
        "NoRecipe": NoRecipe,
        "WrittenCoding": WrittenCoding,
        "Field": Field,
    }
    return {**saved.classes(), **own}


def described(batch: BatchFit) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a batch as a description and arrays; of results in a directory, where they are in it.

    Raises:
        ArchiveError: for what is not data.
    """
    from .. import __version__

    writer = saved.Writer(classes())
    record, about = batch.record, {"format": FORMAT, "version": VERSION, "lmmax": __version__}
    if isinstance(record, StoredRecord):
        store = record.store
        about["stored"] = writer.describe(
            {
                "fields": store.fields,
                "work": store.work,
                "total": record.total,
                "size": record.size,
                "contents": record.contents,
            }
        )
        batch = replace(batch, record=None)  # type: ignore[arg-type]
    about["batch"] = writer.describe(replace(batch, source=_as_data(batch.source)), "the batch")
    return {**about, "objects": sorted(writer.own)}, writer.arrays


def write(path: str | Path, batch: BatchFit) -> None:
    """Write a batch, with all its results, to a file."""
    record = batch.record.load() if isinstance(batch.record, StoredRecord) else batch.record
    archive.write(path, *described(replace(batch, record=record)))


def to_bytes(batch: BatchFit) -> bytes:
    """Return what is kept with results in a directory: the batch without them and its responses."""
    kept = replace(batch, source=_without_memory(batch.source))
    return archive.to_bytes(*described(kept))


def read(path: str | Path, objects: Mapping[str, Any] | None, allow_pickle: bool) -> BatchFit:
    """Read what `write` wrote; see :meth:`BatchFit.load`."""
    if allow_pickle and not archive.is_archive(path):
        return archive.pickled(path, BatchFit)
    try:
        about, arrays = archive.read(path, FORMAT, VERSION, WHAT)
    except archive.NoArchiveError:
        archive.refuse_pickle(path, WHAT, "lmmax.BatchFit.load")
        raise
    reader = saved.Reader(classes(), arrays, objects, repr(str(path)))
    return _whole(reader.read(about.get("batch"), BatchFit))


def opened(path: Path, objects: Mapping[str, Any] | None, allow_pickle: bool) -> BatchFit:
    """Return the results in a directory; see :meth:`BatchFit.open`."""
    if path.is_file():
        raise StoreError(f"{str(path)!r} is a file; lmmax.BatchFit.load reads those of save()")
    store = store_at(path)
    try:
        content = store.opened()
    except StoreError:
        pickled = store.pickled() if allow_pickle else None
        if pickled is None:
            raise
        return _unpickled(path, store, pickled)
    try:
        about, arrays = archive.read(BytesIO(content), FORMAT, VERSION, WHAT)
        reader = saved.Reader(classes(), arrays, objects, repr(str(path)))
        found = reader.read(about.get("batch"), BatchFit)
        kept = reader.read(about.get("stored"), dict)
        there = store_at(path, tuple(kept["fields"]), store.work)
        record = StoredRecord(there, kept["total"], kept["size"], kept["contents"])
    except archive.MissingObjectError as error:
        raise StoreError(str(error)) from None
    except (ArchiveError, LookupError, TypeError) as error:
        raise store.damaged(str(error)) from error
    _check_work(path, kept["work"], store)
    return _whole(replace(found, record=record))


def _check_work(path: Path, work: bytes, store: Store) -> None:
    """Raise unless what reads results back is of the work that they are of."""
    if work != store.work:
        raise StoreError(
            f"{str(path)!r} holds results of two works: files were copied into it; "
            "fit_many(..., out=, resume=True) fits them again"
        )


def _unpickled(path: Path, store: Store, content: bytes) -> BatchFit:
    """Return what an earlier version kept, which runs whatever its writer wanted."""
    import pickle

    try:
        found = pickle.loads(content)
        kept = found.record
        there = store_at(path, kept.store.fields, kept.store.work)
        record = StoredRecord(there, len(found), kept.size, kept.contents)
    except Exception as error:  # anything that the objects in it raise
        raise store.damaged(f"{type(error).__name__}: {error}") from error
    return replace(found, record=record)


def _without_memory(source: Source) -> Source:
    """Return where responses are read again in another process: the source, if that is a file."""
    by_rows = isinstance(source, Subsets)  # the design has them
    if by_rows or getattr(source, "path", None) is not None:
        return source
    return _not_kept(source)


def _not_kept(source: Source) -> NotKept:
    """Return what is left of responses that are not kept: which rows of how many were used."""
    if isinstance(source, Columns):
        return NotKept(source.rows, int(source.values.shape[0]))
    if isinstance(source, Chunks):
        return NotKept(source.rows, source.n_data)
    return source if isinstance(source, NotKept) else NotKept()


def _as_data(source: Source) -> Source:
    """Return a source whose parts are data: of a file, its name."""
    if isinstance(source, Columns):
        if source.path is not None:
            return replace(source, values=None)
        return source if isinstance(source.values, np.ndarray | pd.DataFrame) else _not_kept(source)
    if isinstance(source, Varied):
        parts: list[Any] = [part if part is None else _as_data(part) for part in source.parts]
        if any(isinstance(part, NotKept) for part in parts):
            return NotKept()
        y, offset, x, weights = parts
        return replace(source, y=y, offset=offset, x=x, weights=weights)
    return source if isinstance(source, Subsets) else _not_kept(source)


def _whole(batch: BatchFit) -> BatchFit:
    """Return a batch whose files of responses are open again, if they are there."""
    source = batch.source
    try:
        if isinstance(source, Columns):
            source = reopened(source)
        elif isinstance(source, Varied):
            parts: list[Any] = [part and reopened(part) for part in source.parts]
            y, offset, x, weights = parts
            source = replace(source, y=y, offset=offset, x=x, weights=weights)
    except (OSError, ValueError) as error:
        rows = source.rows if isinstance(source, Columns) else None
        source = NotKept(rows, why=f"{type(error).__name__}: {error}")
    return replace(batch, source=source)


def with_responses(batch: BatchFit, responses: Any) -> BatchFit:
    """Return a batch that reads its responses from somewhere; see :meth:`BatchFit.open`.

    Raises:
        DataError: if they do not fit it.
    """
    from .sources import columns

    source: Any = batch.source
    if isinstance(source, Subsets | Varied) or getattr(source, "rows", None) is None:
        raise DataError(
            "responses= goes with the results of one model for many responses; of subsets, and of "
            "models whose weights, offsets or columns differ, fit one with lmmax.fit"
        )
    n = source.n_data if isinstance(source, NotKept) else len(source.values)
    index = getattr(responses, "index", None)
    if n is None:
        n = len(responses) if index is None else len(index)
    labelled = isinstance(responses, pd.DataFrame | pd.Series) and len(responses) == n
    table = pd.DataFrame(index=index if labelled else pd.RangeIndex(n))
    found = columns(responses, table, source.rows)
    if isinstance(found, Chunks):
        raise DataError("responses is an iterator: pass an array, a data frame, or a file")
    if len(found.names) != len(batch):
        raise DataError(f"there are {len(found.names)} responses, and results of {len(batch)}")
    unnamed = isinstance(found.names, pd.RangeIndex) or isinstance(batch.names, pd.RangeIndex)
    if not unnamed and not found.names.equals(batch.names):
        at = int(np.argmax(np.asarray(found.names != batch.names)))
        raise DataError(
            f"response {at} is called {found.names[at]!r}, and the results there are of "
            f"{batch.names[at]!r}: put the responses in the order of batch.names"
        )
    return replace(batch, source=replace(found, names=batch.names))
