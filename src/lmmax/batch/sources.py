"""Where responses come from, a block of columns at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from ..design import DataError
from ..frames import Table, as_names, as_numbers, n_rows, read_columns, real_numbers
from .seals import fingerprint, fingerprint_names

TILE_BYTES = 1 << 19
"""Bytes that are laid out anew together: they stay in cache while their order changes."""


class Indexed(Protocol):
    """Responses of which any block can be read at any time."""

    @property
    def names(self) -> pd.Index:
        """Their names."""

    def block(self, first: int, last: int) -> Any:
        """Return some of them, (n, last - first), with what goes with them."""

    def column(self, number: int) -> np.ndarray:
        """Return one of them, (n,)."""


class Piece(NamedTuple):
    """A block of responses that is about to be read.

    Attributes:
        first: number of its first response.
        names: names of its responses.
        read: returns the responses, (n, len(names)), in single or double precision.
    """

    first: int
    names: pd.Index
    read: Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Columns:
    """Responses that are columns of an array, a data frame, or a file of either.

    Attributes:
        names: their names.
        values: array (n_data, k), anything that is sliced like one (memory map, Zarr, HDF5, SciPy
            sparse matrix), data frame, or :class:`ParquetColumns`.
        rows: rows of the design.
        path: of the file, which is opened again where it is needed; None for what is in memory.
    """

    names: pd.Index
    values: Any
    rows: np.ndarray
    path: str | None = None

    def block(self, first: int, last: int) -> np.ndarray:
        """Return responses on the rows of the design, in double precision, (n, last - first)."""
        return np.asarray(self.read(first, last), dtype=float)

    def read(self, first: int, last: int) -> np.ndarray:
        """Return responses like `block`, but in single precision if that is theirs."""
        values = self.values
        if self.path is not None and isinstance(values, np.memmap):
            # A map of its own: what has been read of a file counts as memory while it is mapped.
            values = _open(self.path)
        if isinstance(values, pd.DataFrame):
            part = dense(values.iloc[:, first:last])
        else:
            part = dense(values[:, first:last])
        return laid_out(part, self.rows)

    def column(self, number: int) -> np.ndarray:
        """Return one response on the rows of the design, (n,)."""
        return self.block(number, number + 1)[:, 0]

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.path is not None:
            state["values"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path is not None:
            self.__dict__["values"] = _open(self.path)


@dataclass(eq=False)
class Chunks:
    """Responses that an iterator brings, some at a time, once.

    Attributes:
        coming: the iterator, of arrays (n_data, c) or data frames, any c.
        n_data: rows of each.
        rows: rows of the design.
        given: names of all responses, if they are known.
        table: the data, with whose rows those of a data frame must agree.
    """

    coming: Iterator[Any] | None
    n_data: int
    rows: np.ndarray
    given: pd.Index | None = None
    table: Table | None = None
    path: None = None
    _waiting: list[tuple[np.ndarray, pd.Index]] = field(default_factory=list, repr=False)
    _names: list[pd.Index] = field(default_factory=list, repr=False)
    _seen: set[Any] = field(default_factory=set, repr=False)
    _labelled: bool = False
    _taken: int = 0

    @property
    def names(self) -> pd.Index:
        """Names of the responses that have come so far."""
        k = sum(map(len, self._names))
        if self.given is not None:
            return self.given[:k]
        if not self._labelled:
            return pd.RangeIndex(k)
        return pd.Index(np.concatenate([names.to_numpy(dtype=object) for names in self._names]))

    def head(self, count: int) -> np.ndarray:
        """Return the first responses, which `pieces` returns as well, in double precision."""
        if self._taken:
            raise RuntimeError("the first responses have been handed on")
        while self._held < count and self._pull():
            pass
        if not self._waiting:
            raise DataError("responses is an iterator without any response")
        return np.concatenate([part for part, _ in self._waiting], axis=1, dtype=float)[:, :count]

    def pieces(self, size: int) -> Iterator[Piece]:
        """Yield the responses in blocks of one size, however they come; the last may be smaller."""
        while True:
            while self._held < size and self._pull():
                pass
            if not self._waiting:
                break
            first = self._taken
            block, names = self._take(size)
            self._taken += len(names)
            yield Piece(first, names, partial(_itself, block))
        if self.given is not None and len(self.given) != self._taken:
            raise DataError(
                f"names has {len(self.given)} names, and the iterator ended after "
                f"{self._taken} responses"
            )

    @property
    def _held(self) -> int:
        return sum(len(names) for _, names in self._waiting)

    def _pull(self) -> bool:
        """Take the next chunk from the iterator; return whether there was one."""
        try:
            chunk = next(self.coming or iter(()))
        except StopIteration:
            self.coming = None
            return False
        which = f"chunk {len(self._names) + 1} of responses"
        if isinstance(chunk, pd.DataFrame | pd.Series) and self.table is not None:
            _check_labels(which, chunk.index, self.table)
        values, names = _read_chunk(chunk, which)
        values = dense(values)
        at, c = sum(map(len, self._names)), values.shape[1]
        where = f"{which} (from response {at})"
        if values.shape[0] != self.n_data:
            raise DataError(f"{where} has {values.shape[0]} rows, data has {self.n_data}")
        if self.given is not None:
            if at + c > len(self.given):
                raise DataError(f"names has {len(self.given)} names, and {where} goes beyond them")
            names = self.given[at : at + c]
        elif names is not None:
            again = [name for name in names if name in self._seen]
            if again or not names.is_unique:
                twice = again[0] if again else names[names.duplicated()][0]
                raise DataError(f"{where} has a response {twice!r} that was there before")
            self._seen.update(names)
            self._labelled = True
        else:
            names = pd.RangeIndex(at, at + c)
        self._names.append(names)
        self._waiting.append((laid_out(values, self.rows), names))
        return True

    def _take(self, size: int) -> tuple[np.ndarray, pd.Index]:
        """Return the first responses that wait, `size` of them if there are so many."""
        parts, names, left = [], [], size
        while left and self._waiting:
            values, own = self._waiting.pop(0)
            if len(own) > left:
                self._waiting.insert(0, (values[:, left:], own[left:]))
                values, own = values[:, :left], own[:left]
            parts.append(values)
            names.append(own)
            left -= len(own)
        block = np.concatenate(parts, axis=1) if len(parts) > 1 else np.ascontiguousarray(parts[0])
        return block, names[0].append(names[1:])

    def column(self, number: int) -> np.ndarray:
        """Raise: the response has gone."""
        name = self.names[number]
        raise DataError(
            f"response {name!r} came from an iterator, which is read once and not kept: pass the "
            "column again, fit_many(..., responses=column)[0]"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "coming": None, "_waiting": [], "_seen": set()}


def _itself(block: np.ndarray) -> np.ndarray:
    return block


def pieces(source: Indexed | Chunks, size: int) -> Iterator[Piece]:
    """Yield the responses of a source in blocks of one size, the last one smaller.

    Args:
        source: the responses.
        size: responses in a block.
    """
    if isinstance(source, Chunks):
        yield from source.pieces(size)
        return
    read = source.read if isinstance(source, Columns) else source.block
    for first in range(0, len(source.names), size):
        last = min(first + size, len(source.names))
        yield Piece(first, source.names[first:last], partial(read, first, last))


def head(source: Indexed | Chunks, count: int) -> np.ndarray:
    """Return the first responses of a source, (n, count) or fewer, in double precision."""
    if isinstance(source, Chunks):
        return source.head(count)
    return source.block(0, min(count, len(source.names)))


def total(source: Indexed | Chunks) -> int | None:
    """Return how many responses there are; None if that will be known when they have come."""
    if isinstance(source, Chunks):
        return None if source.given is None else len(source.given)
    return len(source.names)


def identity(source: Indexed | Chunks, *seen: np.ndarray) -> dict[str, str | int | None]:
    """Return what tells at a glance whether a source has other responses than one before.

    Args:
        source: the responses.
        seen: some of them; all others are compared when they are read.
    """
    names = source.given if isinstance(source, Chunks) else source.names
    return {
        "responses": total(source),
        "values": fingerprint(*seen),
        "names": None if names is None else fingerprint_names(names),
    }


def dense(part: Any) -> np.ndarray:
    """Return values that act like a matrix as an array."""
    if isinstance(part, np.ma.MaskedArray):
        kind = np.float32 if part.dtype == np.float32 else float
        return np.ma.filled(part.astype(kind), np.nan)
    if isinstance(part, pd.DataFrame):
        single = all(dtype == np.float32 for dtype in part.dtypes)
        return np.asarray(part.to_numpy(dtype=np.float32 if single else float, na_value=np.nan))
    return np.asarray(part.toarray() if hasattr(part, "toarray") else part)


def laid_out(part: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return some rows, one after the other in memory, in single or double precision.

    A copy, read now and not when used, and laid out in one way: sums round alike whatever the
    source, and an iterator may fill one buffer again and again.

    Args:
        part: the values, (n_data, c); a memory map is read once, from its start to its end.
        rows: which rows, (n,).
    """
    dtype = np.float32 if part.dtype == np.float32 else np.float64
    every = len(part) == len(rows)
    if part.flags.c_contiguous or part.strides[0] >= part.strides[1]:
        return np.array(part if every else part[rows], dtype=dtype, order="C", subok=False)
    part = np.array(part, order="F")  # as it lies in a file
    found = np.empty((len(rows), part.shape[1]), dtype)
    tile = max(1, TILE_BYTES // max(part.itemsize * part.shape[1], 1))
    for first in range(0, len(rows), tile):
        here = slice(first, first + tile)
        found[here] = part[here] if every else part[rows[here]]
    return found


@dataclass(frozen=True, eq=False)
class ParquetColumns:
    """The columns of a Parquet file, read a block at a time."""

    path: str
    names: list[str] = field(default_factory=list)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._file.metadata.num_rows, self._file.metadata.num_columns

    @cached_property
    def _file(self) -> Any:
        try:
            from pyarrow import parquet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "reading Parquet files needs pyarrow: pip install 'lmmax[parquet]'"
            ) from error
        return parquet.ParquetFile(self.path)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: tuple[slice, slice]) -> pd.DataFrame:
        names = self._file.schema_arrow.names[where[1]]
        return self._file.read(columns=names).to_pandas(ignore_metadata=True)


def reopened(source: Columns) -> Columns:
    """Return responses whose file, if they are in one, is open again."""
    return source if source.path is None else replace(source, values=_open(source.path))


def _open(path: str) -> Any:
    if path.endswith(".npy"):
        return np.load(path, mmap_mode="r")
    if path.endswith(".parquet"):
        return ParquetColumns(path)
    raise DataError(
        f"responses={path!r}: a file of responses ends in .npy or .parquet; open others and pass "
        "the array (Zarr, HDF5) or the AnnData object"
    )


def columns(responses: Any, table: Table, rows: np.ndarray, names: Any = None) -> Columns | Chunks:
    """Read the `responses` argument of `fit_many`.

    Args:
        responses: what the user gave.
        table: the data.
        rows: rows of the design.
        names: names of the responses, in place of their own.

    Raises:
        DataError: if they do not fit the data.
    """
    n = n_rows(table)
    given = None if names is None else _given(names)
    path = None
    if isinstance(responses, str) and responses in table:
        raise DataError(
            f"responses={responses!r} is the path of a file: write responses=[{responses!r}] for "
            "the column of data"
        )
    if isinstance(responses, str | Path):
        path = str(responses)
        responses = _open(path)
    elif isinstance(responses, Iterable) and not hasattr(responses, "shape"):
        if _annotated(responses):
            responses, given = _annotations(responses, table, given)
        elif isinstance(responses, Mapping):
            for name, column in responses.items():
                if isinstance(column, pd.Series):
                    _check_labels(f"responses[{name!r}]", column.index, table)
            responses = read_columns(responses, responses)
            if isinstance(table, pd.DataFrame) and len(responses) == n:
                responses.index = table.index
        elif isinstance(responses, list | tuple):
            responses = _listed(list(responses), table)
        else:
            coming = iter(responses)
            first = next(coming, None)
            if first is not None and hasattr(first, "shape") and len(first.shape):
                return Chunks(chain([first], coming), n, rows, given, table)
            if first is None and isinstance(responses, Iterator):
                return Chunks(coming, n, rows, given, table)
            responses = _listed([] if first is None else [first, *coming], table)
    elif _annotated(responses):
        responses, given = _annotations(responses, table, given)
    if isinstance(responses, pd.DataFrame | pd.Series):
        _check_labels("responses", responses.index, table)
    values, own = _read_chunk(responses, "responses", n)
    if values.shape[0] != n:
        hint = "; they may be transposed" if values.shape[1] == n else ""
        raise DataError(f"responses has {values.shape[0]} rows, data has {n}{hint}")
    k = values.shape[1]
    if not k:
        raise DataError("responses has no column")
    if given is not None and len(given) != k:
        raise DataError(f"names has {len(given)} names for {k} responses")
    if given is None:
        given = pd.RangeIndex(k) if own is None else own
        if not given.is_unique:
            raise DataError(f"responses has several columns named {given[given.duplicated()][0]!r}")
    return Columns(given, values, rows, path)


def _given(names: Any) -> pd.Index:
    found = names if isinstance(names, pd.Index) else pd.Index(as_names(names, "names"))
    if not found.is_unique:
        raise DataError(f"names has {found[found.duplicated()][0]!r} more than once")
    return found


def _read_chunk(responses: Any, what: str, n: int | None = None) -> tuple[Any, pd.Index | None]:
    """Return what is sliced like a matrix, and the names of its columns if it has any.

    Args:
        responses: a matrix, a data frame, or a single response.
        what: how errors call it.
        n: number of rows of the data, by which a response of its own is told.
    """
    if not isinstance(responses, pd.DataFrame | pd.Series) and hasattr(responses, "to_pandas"):
        responses = responses.to_pandas()
    if isinstance(responses, pd.Series):
        responses = responses.to_frame()
        if responses.columns[0] == 0:  # it had no name
            responses.columns = pd.RangeIndex(1)
    if isinstance(responses, pd.DataFrame):
        for name, kind in responses.dtypes.items():
            if kind.kind not in "fiub":
                raise DataError(
                    f"{what}: {name!r} is not numeric, but {kind}: convert it, or leave it out"
                )
        unnamed = isinstance(responses.columns, pd.RangeIndex)
        return responses, None if unnamed else responses.columns
    if isinstance(responses, ParquetColumns):
        return responses, pd.Index(responses._file.schema_arrow.names)
    if not hasattr(responses, "shape"):
        hint = ": pass its collect()" if hasattr(responses, "collect") else ""
        raise DataError(
            f"{what} must be an array or a data frame, not {type(responses).__name__}{hint}"
        )
    if len(responses.shape) == 1 and n in (None, responses.shape[0]):
        responses = np.asarray(responses)[:, None]
    if len(responses.shape) != 2:
        raise DataError(
            f"{what} must be two-dimensional, rows of the data by responses, not of shape "
            f"{tuple(responses.shape)}; of an image take the voxels that count, image[mask].T, or "
            "flatten it with reshape"
        )
    if np.dtype(responses.dtype).kind not in "fiub":
        raise DataError(
            f"{what} must be numeric, not {responses.dtype}: convert with astype(float)"
        )
    if getattr(responses, "format", None) == "csr" and hasattr(responses, "tocsc"):
        responses = responses.tocsc()  # in which columns are cheap
    return responses, None


def _annotated(responses: Any) -> bool:
    """Return whether it is an AnnData object, or one with the name of a layer."""
    if isinstance(responses, tuple):
        return len(responses) == 2 and isinstance(responses[1], str) and _annotated(responses[0])
    return all(hasattr(responses, name) for name in ("X", "layers", "obs_names", "var_names"))


def _annotations(responses: Any, table: Table, names: pd.Index | None) -> tuple[Any, pd.Index]:
    """Return the matrix of an AnnData object or of one of its layers, and the names."""
    whole, layer = responses if isinstance(responses, tuple) else (responses, None)
    if layer is not None and layer not in whole.layers:
        raise DataError(f"responses has no layer {layer!r}; it has {', '.join(whole.layers)}")
    _check_labels("the AnnData object", pd.Index(whole.obs_names), table)
    values = whole.X if layer is None else whole.layers[layer]
    if values is None:
        raise DataError("responses has no X: pass one of its layers, responses=(adata, 'counts')")
    return values, pd.Index(whole.var_names) if names is None else names


def _check_labels(what: str, index: pd.Index, table: Table) -> None:
    """Raise if rows of the responses have other labels than those of the data."""
    if not isinstance(table, pd.DataFrame):
        return
    if len(index) == len(table) and not index.equals(table.index):
        raise DataError(
            f"{what} and data differ in the labels of their rows: reorder one of them, or if their "
            "rows are in the same order pass an array, responses.to_numpy() or adata.X"
        )


def _listed(found: list[Any], table: Table) -> Any:
    """Read a list: names of columns of the data, or numbers."""
    if not found:
        raise DataError("responses is empty: give at least one")
    if all(isinstance(name, str) for name in found):
        absent = [name for name in found if name not in table]
        if absent:
            raise DataError(f"responses names {absent[0]!r}, which is no column of data")
        if len(set(found)) < len(found):
            twice = next(name for name in found if found.count(name) > 1)
            raise DataError(f"responses names {twice!r} more than once")
        return read_columns(table, found).apply(as_numbers)
    try:
        return real_numbers(found, "responses")
    except DataError:
        raise
    except (TypeError, ValueError):
        raise DataError(
            "responses must be an array, a data frame, column names, a file, or an iterator of "
            "arrays or data frames"
        ) from None
