"""Results on disk, chunk by chunk of responses, so that work that stopped goes on.

A chunk is complete or absent: its hashes, one for each field, come last or with it, and what does
not agree with them counts as absent.  The store begins with a description of the work, so that it
never mixes two.  Two formats share all of that: a directory of Parquet files, and a Zarr group of
arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .engines import Record

DIGEST = 32
"""Bytes of a hash."""
WRITING = "cannot be written to; resume=True goes on with what is there"
NAMES = 4096
"""Names that are made text at once."""

Names = Sequence[Any] | pd.Index
"""Names of responses."""
Parts = dict[str, np.ndarray]
"""Arrays of a chunk by field."""


class StoreError(ValueError):
    """A directory of results that is not, or no longer, what is asked for."""


class Field(NamedTuple):
    """An array of results.

    Attributes:
        name: of the field of the record, or ``n_obs``.
        kind: of its numbers.
        axes: what its axes besides that of the responses are.
        shape: their lengths.
        labels: names of its entries, one response's in order.
    """

    name: str
    kind: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    labels: tuple[str, ...]


def fields_of(coefficients: Sequence[str], q: int, tests: Sequence[str]) -> tuple[Field, ...]:
    """Return the arrays of results: those of a record, and the number of rows of each response.

    Args:
        coefficients: names of the columns of X.
        q: number of random effects.
        tests: names of the hypotheses.
    """

    def along(names: Sequence[str], axis: str, *fields: str) -> list[Field]:
        return [
            Field(f, "f8", (axis,), (len(names),), tuple(f"{f}[{name}]" for name in names))
            for f in fields
        ]

    def single(kind: str, *fields: str) -> list[Field]:
        return [Field(f, kind, (), (), (f,)) for f in fields]

    pairs = tuple(f"cov_re[{i},{j}]" for i in range(q) for j in range(q))
    return (
        *along(coefficients, "coefficient", "params", "bse", "df"),
        Field("cov_re", "f8", ("effect", "other_effect"), (q, q), pairs),
        *single("f8", "scale", "llf"),
        *single("i8", "status"),
        *single("?", "singular"),
        *single("i8", "steps"),
        *single("f8", "gradient"),
        *along(tests, "test", "statistic", "df_den", "estimate", "error"),
        *single("i8", "n_obs"),
    )


class Store:
    """A directory of results; :func:`store_at` chooses the format.

    Attributes:
        path: the directory.
        fields: arrays of results.
    """

    def __init__(self, path: Path, fields: tuple[Field, ...]) -> None:
        self.path, self.fields = path, fields

    def __reduce__(self) -> Any:
        return type(self), (self.path, self.fields)

    def begin(self, description: dict[str, Any], resume: bool) -> None:
        """Make the directory, or check that it holds the same work.

        Args:
            description: of the work; ``chunk`` is the number of responses in one, and
                ``responses`` the number of all, None if that is not known.
            resume: whether there may be results already.

        Raises:
            StoreError: if it holds results already and `resume` is false, or of other work.
        """
        before = self._described()
        if before is None:
            with self._written("cannot be made a directory of results; use another"):
                self._make(description)
            return
        if not resume:
            raise StoreError(
                f"out={str(self.path)!r} holds results already: pass resume=True to go on with "
                "them, or another directory"
            )
        differs = [key for key in description if before.get(key) != description[key]]
        if differs:
            raise StoreError(
                f"out={str(self.path)!r} holds results of other work: {', '.join(differs)} "
                "differ; use another directory"
            )

    def write(self, first: int, names: Names, record: Record, n_obs: np.ndarray) -> None:
        """Write the results of a chunk that begins with response `first`."""
        values = {**record._asdict(), "n_obs": n_obs}
        parts = {f.name: np.ascontiguousarray(values[f.name], dtype=f.kind) for f in self.fields}
        digests = {name: _digest(part) for name, part in parts.items()}
        with self._written(WRITING):
            self._put(first, names, parts, digests)

    @contextmanager
    def _written(self, trouble: str) -> Iterator[None]:
        """Say which directory it is that cannot be written."""
        try:
            yield
        except OSError as error:
            why = error.strerror or str(error)
            raise StoreError(f"out={str(self.path)!r} {trouble} ({why})") from error

    def read(self, first: int) -> tuple[Record, np.ndarray] | None:
        """Return the results of a chunk; None if there is no such chunk, or it is damaged."""
        found = self._checked(first, self.fields)
        if found is None:
            return None
        n_obs = found.pop("n_obs")
        return Record(**found), n_obs

    def field(self, name: str, total: int, size: int) -> np.ndarray:
        """Return one array of results, of all responses.

        Args:
            name: of the field.
            total: number of responses.
            size: responses in a chunk.

        Raises:
            StoreError: if a chunk is absent or damaged.
        """
        (field,) = (field for field in self.fields if field.name == name)
        values = np.empty((total, *field.shape), dtype=field.kind)
        for first in range(0, total, size):
            found = self._checked(first, (field,))
            if found is None:
                raise StoreError(
                    f"{str(self.path)!r} lacks the results of the responses from {first} on, or "
                    "they are damaged; fit_many(..., out=, resume=True) fits them again"
                )
            values[first : first + size] = found[name]
        return values

    def _checked(self, first: int, fields: Sequence[Field]) -> Parts | None:
        """Return some arrays of a chunk, if they are what was written."""
        try:
            found = self._get(first, fields)
        except Exception:  # whatever damaged files make the formats' libraries raise
            return None
        if found is None:
            return None
        parts, digests = found
        sound = all(digests.get(name) == _digest(part) for name, part in parts.items())
        return parts if sound else None

    def finish(self, names: Names, batch: Any) -> str:
        """Keep what reads the results back without the data; return why not if that fails."""
        try:
            content = pickle.dumps(batch)
        except Exception as error:  # what a pickle cannot hold is up to each object
            return f"{type(error).__name__}: {error}"
        with self._written(WRITING):
            self._keep(content, names)
        return ""

    def opened(self) -> Any:
        """Return what `finish` kept.

        Raises:
            StoreError: if the work is not finished, or there is none.
        """
        if self._described() is None:
            raise StoreError(f"{str(self.path)!r} holds no results of fit_many")
        content = self._kept()
        if content is None:
            raise StoreError(
                f"the work in {str(self.path)!r} is not finished: fit_many(..., out=, "
                "resume=True) goes on with it"
            )
        return pickle.loads(content)

    # What a format does.

    def _described(self) -> dict[str, Any] | None:
        """Return the description of the work; None if there is none."""
        raise NotImplementedError

    def _make(self, description: dict[str, Any]) -> None:
        """Begin an empty store; the description comes last."""
        raise NotImplementedError

    def _put(self, first: int, names: Names, parts: Parts, digests: dict[str, bytes]) -> None:
        """Write a chunk."""
        raise NotImplementedError

    def _get(self, first: int, fields: Sequence[Field]) -> tuple[Parts, dict[str, bytes]] | None:
        """Read some arrays of a chunk, and their hashes."""
        raise NotImplementedError

    def _keep(self, content: bytes, names: Names) -> None:
        raise NotImplementedError

    def _kept(self) -> bytes | None:
        raise NotImplementedError


class ParquetStore(Store):
    """A directory with a Parquet file for each chunk, a column for each number of a response."""

    def _described(self) -> dict[str, Any] | None:
        about = self.path / "work.json"
        return json.loads(about.read_text()) if about.exists() else None

    def _make(self, description: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(description, indent=1, sort_keys=True)
        _write(self.path / "work.json", text.encode())

    def _chunk(self, first: int) -> Path:
        return self.path / f"chunk-{first:012d}.parquet"

    def _put(self, first: int, names: Names, parts: Parts, digests: dict[str, bytes]) -> None:
        pa, parquet = _parquet()
        columns = {"response": pa.array(list(map(str, names)))}
        for field in self.fields:
            flat = parts[field.name].reshape(len(names), -1)
            columns |= {label: pa.array(flat[:, j]) for j, label in enumerate(field.labels)}
        notes = {f"sha256 of {name}": digest.hex() for name, digest in digests.items()}
        notes["sha256 of response"] = fingerprint_names(names)
        table = pa.table(columns).replace_schema_metadata(notes)
        buffer = pa.BufferOutputStream()
        parquet.write_table(table, buffer, compression="zstd")
        _write(self._chunk(first), buffer.getvalue().to_pybytes())

    def _get(self, first: int, fields: Sequence[Field]) -> tuple[Parts, dict[str, bytes]] | None:
        _, parquet = _parquet()
        path = self._chunk(first)
        if not path.exists():
            return None
        labels = [label for field in fields for label in field.labels]
        whole = len(fields) == len(self.fields)
        labels += ["response"] if whole else []
        with parquet.ParquetFile(path) as file:
            table, notes = file.read(columns=labels), file.schema_arrow.metadata
            n = file.metadata.num_rows
        if whole and notes[b"sha256 of response"].decode() != fingerprint_names(
            table.column("response").to_pylist()
        ):
            return None
        parts, digests = {}, {}
        for field in fields:
            values = np.empty((n, len(field.labels)), dtype=field.kind)
            for j, label in enumerate(field.labels):
                values[:, j] = table.column(label).to_numpy()
            parts[field.name] = values.reshape(n, *field.shape)
            note = notes[f"sha256 of {field.name}".encode()]
            digests[field.name] = bytes.fromhex(note.decode())
        return parts, digests

    def _keep(self, content: bytes, names: Names) -> None:
        _write(self.path / "batch.pickle", content)
        for left in self.path.glob("*.partial"):  # by processes that were killed
            left.unlink(missing_ok=True)

    def _kept(self) -> bytes | None:
        about = self.path / "batch.pickle"
        return about.read_bytes() if about.exists() else None


class ZarrStore(Store):
    """A Zarr group of arrays, whose chunks along the responses are the chunks of the work.

    The array ``sha256`` holds the hashes of each chunk, in the order of the fields; the chunk is
    there once they are.
    """

    _SHA, _BATCH = "sha256", "batch_pickle"

    @cached_property
    def _growing(self) -> Lock:
        return Lock()

    @cached_property
    def _zarr(self) -> Any:
        try:
            import zarr
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "results in Zarr need zarr: pip install 'lmmax[zarr]'"
            ) from error
        return zarr

    @property
    def _group(self) -> Any:
        return self._zarr.open_group(str(self.path), mode="r+")

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        group = self._group
        return {name: group[name] for name in (*(f.name for f in self.fields), self._SHA)}

    def _described(self) -> dict[str, Any] | None:
        about = self.path / "zarr.json"  # of a group, or of something that is none of ours
        found = json.loads(about.read_text()) if about.exists() else {}
        description: dict[str, Any] | None = found.get("attributes", {}).get("lmmax")
        return description

    def _make(self, description: dict[str, Any]) -> None:
        # Whole at once, and never over something else, which opening it for writing would delete.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_dir():
            self.path.rmdir()
        begun = _partial(self.path)
        try:
            self._begin(begun, description)
            begun.rename(self.path)
        finally:
            shutil.rmtree(begun, ignore_errors=True)

    def _begin(self, path: Path, description: dict[str, Any]) -> None:
        """Make a group with the arrays."""
        total, size = description["responses"] or 0, description["chunk"]
        group = self._zarr.open_group(str(path), mode="w")
        for field in self.fields:
            # Zarr has no chunks of length zero; without tests these arrays stay empty.
            own = tuple(max(length, 1) for length in field.shape)
            group.create_array(
                field.name,
                shape=(total, *field.shape),
                chunks=(min(size, total or size), *own),
                dtype=np.dtype(field.kind),
                fill_value=np.nan if field.kind == "f8" else 0,
                dimension_names=("response", *field.axes),
                attributes={"labels": list(field.labels)},
            )
        shape = (-(-total // size), len(self.fields), DIGEST)
        group.create_array(self._SHA, shape=shape, chunks=(1, *shape[1:]), dtype="u1", fill_value=0)
        group.attrs["lmmax"] = description

    @cached_property
    def _size(self) -> int:
        """Responses in a chunk."""
        return int(self._group.attrs["lmmax"]["chunk"])

    def _put(self, first: int, names: Names, parts: Parts, digests: dict[str, bytes]) -> None:
        arrays, number = self._arrays, first // self._size
        with self._growing:
            if arrays["n_obs"].shape[0] < first + len(names):  # of an unknown number of responses
                for name in parts:
                    arrays[name].resize((first + len(names), *arrays[name].shape[1:]))
                arrays[self._SHA].resize((number + 1, *arrays[self._SHA].shape[1:]))
        for name, part in parts.items():
            if part.size:
                arrays[name][first : first + len(part)] = part
        digest = b"".join(digests[field.name] for field in self.fields)
        arrays[self._SHA][number] = np.frombuffer(digest, dtype="u1").reshape(-1, DIGEST)

    def _get(self, first: int, fields: Sequence[Field]) -> tuple[Parts, dict[str, bytes]] | None:
        size = self._size
        if first >= self._arrays["n_obs"].shape[0]:
            return None
        digest = self._arrays[self._SHA][first // size]
        if not digest.any():
            return None
        parts, digests = {}, {}
        for number, field in enumerate(self.fields):
            if field in fields:
                values = np.asarray(self._arrays[field.name][first : first + size])
                parts[field.name] = np.ascontiguousarray(values)
                digests[field.name] = digest[number].tobytes()
        return parts, digests

    def _keep(self, content: bytes, names: Names) -> None:
        values = np.frombuffer(content, dtype="u1")
        group = self._group
        with warnings.catch_warnings():
            # Zarr's text is not in its specification yet; it is for other readers.
            warnings.simplefilter("ignore")
            text = group.create_array(
                "response",
                shape=(len(names),),
                chunks=(min(NAMES, len(names)),),
                dtype=np.dtypes.StringDType(),
                dimension_names=("response",),
                overwrite=True,
            )
        for first in range(0, len(names), NAMES):
            text[first : first + NAMES] = np.array(
                list(map(str, names[first : first + NAMES])), dtype=np.dtypes.StringDType()
            )
        group.create_array(self._BATCH, data=values, overwrite=True)

    def _kept(self) -> bytes | None:
        group = self._group
        return group[self._BATCH][:].tobytes() if self._BATCH in group else None


def store_at(path: Path, fields: tuple[Field, ...] = ()) -> Store:
    """Return the store at a path: Zarr's if its name ends in ``.zarr``, else Parquet's."""
    return (ZarrStore if path.suffix == ".zarr" else ParquetStore)(path, fields)


class StoredRecord:
    """Results that stay on disk; stands where a :class:`lmmax.batch.engines.Record` does.

    Each of its fields is read when it is asked for, and not kept.

    Attributes:
        store: where they are.
        total: number of responses.
        size: responses in a chunk.
    """

    def __init__(self, store: Store, total: int, size: int) -> None:
        self.store, self.total, self.size = store, total, size

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in Record._fields:
            raise AttributeError(name)
        return self.store.field(name, self.total, self.size)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (getattr(self, name) for name in Record._fields)

    def load(self) -> Record:
        """Return the results, read into memory."""
        return Record(*self)


def fingerprint(*parts: Any) -> str:
    """Return a hash of arrays and settings: the same for the same work."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(str((part.dtype, part.shape)).encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(pickle.dumps(part))
    return digest.hexdigest()


def fingerprint_names(names: Names) -> str:
    """Return a hash of names, some of which at a time are made text."""
    digest = hashlib.sha256()
    for first in range(0, len(names), NAMES):
        digest.update("\0".join(map(str, names[first : first + NAMES])).encode() + b"\0")
    return digest.hexdigest()


def _digest(part: np.ndarray) -> bytes:
    digest = hashlib.sha256(str((part.dtype.str, part.shape)).encode())
    digest.update(np.ascontiguousarray(part).tobytes())
    return digest.digest()


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "results in Parquet files need pyarrow: pip install 'lmmax[parquet]'"
        ) from error
    return pyarrow, parquet


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is complete or absent, whatever happens."""
    partial = _partial(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """Return where this process alone makes what is to stand at a path."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")
