"""Results on disk, chunk by chunk of responses, so that work that stopped goes on.

A chunk is complete or absent: its hashes, one for each field, come last or with it, and what does
not agree with them counts as absent.  They say as well of which work, which responses and which
place the chunk is (:mod:`lmmax.batch.seals`): what is of others is never read as if it were asked
for.  The store begins with a description of the work, so that it never mixes two, and one run at a
time writes to it.  Two formats share all of that: a directory of Parquet files, and a Zarr group of
arrays.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from ..characters import Visible
from ..files import partial_beside, whole
from .claim import PATIENCE, Claim, ClaimedError
from .engines import Record
from .seals import DIGEST, NAMES, Names, fingerprint_names, seal_of, sealed, work_of

FORMAT = 3
"""Number of the way in which results are laid out."""
WRITING = "cannot be written to; resume=True goes on with what is there"
CONTENT, SEAL = "content", "seal"
"""Hashes of a chunk besides those of its fields: of the responses, and what binds all to them."""

Parts = dict[str, np.ndarray]
"""Arrays of a chunk by field."""


class StoreError(Visible, ValueError):
    """A directory of results that is not, or no longer, what is asked for."""


class StoreWarning(Visible, UserWarning):
    """A directory of results holds some that are of something else."""


class Stored(NamedTuple):
    """Results of a chunk, which agree with the hashes that they carry.

    Attributes:
        parts: arrays by field.
        content: hash of the responses that they say they are of.
        seal: what they say they are bound to.
    """

    parts: Parts
    content: bytes
    seal: bytes

    @property
    def record(self) -> Record:
        """All but the numbers of rows."""
        return Record(**{name: part for name, part in self.parts.items() if name != "n_obs"})

    @property
    def n_obs(self) -> np.ndarray:
        """Number of rows of each response."""
        return self.parts["n_obs"]


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

    In a ``with`` statement, what :meth:`begin` claimed is free again at its end.

    Attributes:
        path: the directory.
        fields: arrays of results.
        work: hash of the work that they are of.
    """

    def __init__(self, path: Path, fields: tuple[Field, ...], work: bytes = b"") -> None:
        self.path, self.fields, self.work = path, fields, work
        self._claim = Claim(self._claim_path())
        self._contents: dict[int, bytes] = {}

    def __reduce__(self) -> Any:
        return type(self), (self.path, self.fields, self.work)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._claim.release()

    def begin(self, description: dict[str, Any], resume: bool) -> None:
        """Claim the directory, and make it or check that it holds the same work.

        Args:
            description: of the work; ``chunk`` is the number of responses in one, ``responses`` the
                number of all, None if that is not known, and ``lmmax`` the version.
            resume: whether there may be results already.

        Raises:
            StoreError: if it holds results already and `resume` is false, or of other work, or if
                another run writes to it.

        Warns:
            StoreWarning: if there are results without a description of their work.
        """
        self._need()
        self._check(description, resume)  # before a run is waited for
        try:
            with self._written("cannot be made a directory of results; use another"):
                self._take_claim(PATIENCE if resume else 0.0)
                if not self._check(description, resume):
                    self._make(description)
                self._mend(description)
            if self._claim.exclusive:  # or another run may be writing them
                self._clear()
        except BaseException:
            self._claim.release()
            raise

    def _need(self) -> None:
        """Raise ModuleNotFoundError, before anything is made, without the package that writes."""
        raise NotImplementedError

    def join(self, description: dict[str, Any]) -> None:
        """Take part in work that another process of the same job has begun; see `begin`."""
        if self._check(description, resume=True):
            self._look()
        else:
            raise StoreError(
                f"out={str(self.path)!r} holds nothing here: it must be a directory that all "
                "processes of the job see"
            )

    def _check(self, description: dict[str, Any], resume: bool) -> bool:
        """Return whether the directory holds this work; raise if it holds what it should not."""
        self.work = work_of(description)
        before = self._described()
        if before is None:
            return False
        here = f"out={str(self.path)!r}"
        if not resume:
            raise StoreError(
                f"{here} holds results already: pass resume=True to go on with them, or another "
                "directory"
            )
        _check_format(here, before)
        if before["lmmax"] != description["lmmax"]:
            raise StoreError(
                f"{here} was begun by lmmax {before['lmmax']}, and this is {description['lmmax']}: "
                "results of two versions are not mixed; go on with that version, or use another "
                "directory"
            )
        differs = [key for key in description if before.get(key) != description[key]]
        if differs:
            raise StoreError(
                f"{here} holds results of other work: {_difference(differs, before, description)}"
            )
        return True

    def _take_claim(self, patience: float) -> None:
        self._claim.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._claim.take(patience)
        except ClaimedError as error:
            raise StoreError(
                f"out={str(self.path)!r} is being written to by {error}: wait for it to end, or "
                f"end it; if there is no such run, delete {str(self._claim.path)!r}"
            ) from None

    def write(
        self, first: int, names: Names, record: Record, n_obs: np.ndarray, content: bytes
    ) -> None:
        """Write the results of a chunk.

        Args:
            first: number of its first response.
            names: of its responses.
            record: the results.
            n_obs: number of rows of each response.
            content: hash of the responses.
        """
        values = {**record._asdict(), "n_obs": n_obs}
        parts = {f.name: np.ascontiguousarray(values[f.name], dtype=f.kind) for f in self.fields}
        seal = seal_of(self.work, first, content)
        digests = {name: sealed(seal, name, part) for name, part in parts.items()}
        with self._written(WRITING):
            self._put(first, names, parts, {**digests, CONTENT: content, SEAL: seal})
        self._contents[first] = content

    @contextmanager
    def _written(self, trouble: str) -> Iterator[None]:
        """Say which directory it is that cannot be written."""
        try:
            yield
        except OSError as error:
            name = error.filename2 or error.filename
            at = "" if name is None or str(name) == str(self.path) else f", {str(name)!r}"
            why = f"{error.strerror or str(error)}{at}"
            raise StoreError(f"out={str(self.path)!r} {trouble} ({why})") from error

    def read(self, first: int) -> Stored | None:
        """Return the results of a chunk; None if there is no such chunk, or it is damaged.

        What they are of is for the caller to compare, by :meth:`keeps`.
        """
        return self._checked(first, self.fields)

    def keeps(self, first: int, stored: Stored, content: bytes) -> bool:
        """Return whether results are of this work, this place, and these responses."""
        same = stored.seal == seal_of(self.work, first, content)
        if same:
            self._contents[first] = content
        return same

    def contents(self, total: int, size: int) -> np.ndarray:
        """Return the hashes of the responses of all chunks, (chunks, bytes).

        Those of chunks which other processes of the job wrote are as the directory has them.

        Args:
            total: number of responses.
            size: responses in a chunk.
        """
        found = np.zeros((-(-total // size), DIGEST), dtype=np.uint8)
        (rows,) = (field for field in self.fields if field.name == "n_obs")
        for number, first in enumerate(range(0, total, size)):
            content = self._contents.get(first)
            if content is None:
                stored = self._checked(first, (rows,), total)
                content = self._there(first, stored, None).content
            found[number] = np.frombuffer(content, dtype=np.uint8)
        return found

    def field(self, name: str, total: int, size: int, contents: np.ndarray) -> np.ndarray:
        """Return one array of results, of all responses.

        Args:
            name: of the field.
            total: number of responses.
            size: responses in a chunk.
            contents: hashes of the responses of all chunks.

        Raises:
            StoreError: if a chunk is absent or damaged, or is of something else.
        """
        (field,) = (field for field in self.fields if field.name == name)
        values = np.empty((total, *field.shape), dtype=field.kind)
        for number, first in enumerate(range(0, total, size)):
            stored = self._checked(first, (field,), total)
            content = contents[number].tobytes()
            part = self._there(first, stored, content).parts[name]
            if part.shape != values[first : first + size].shape:
                raise StoreError(
                    f"the results of the responses from {first} on in {str(self.path)!r} are of "
                    f"{len(part)} responses and not {len(values[first : first + size])}; "
                    "fit_many(..., out=, resume=True) fits them again"
                )
            values[first : first + size] = part
        return values

    def chunk(self, first: int, total: int, content: bytes) -> Record:
        """Return the results of a chunk.

        Args:
            first: number of its first response.
            total: number of all responses.
            content: hash of its responses.

        Raises:
            StoreError: as `field` does.
        """
        return self._there(first, self._checked(first, self.fields, total), content).record

    def _there(self, first: int, stored: Stored | None, content: bytes | None) -> Stored:
        """Return the results of a chunk if they are what they must be.

        Args:
            first: number of its first response.
            stored: what was read.
            content: hash of the responses; None if that is not known.
        """
        again = "fit_many(..., out=, resume=True) fits them again"
        lead = f"the results of the responses from {first} on"
        if stored is None:
            raise StoreError(f"{str(self.path)!r} lacks {lead}, or they are damaged; {again}")
        if stored.seal != seal_of(self.work, first, stored.content):
            raise StoreError(
                f"{lead} in {str(self.path)!r} are of other work, or of another place in it: their "
                f"files were copied, moved or renamed; {again}"
            )
        if content not in (None, stored.content):
            raise StoreError(
                f"{lead} in {str(self.path)!r} are of other responses than these results: the "
                f"directory was gone on with, or files were copied into it; {again}"
            )
        return stored

    def _checked(self, first: int, fields: Sequence[Field], total: int = -1) -> Stored | None:
        """Return some arrays of a chunk, if they are what was written.

        Args:
            first: number of its first response.
            fields: which arrays.
            total: number of all responses, if that is known.
        """
        try:
            found = self._get(first, fields, total)
        except ModuleNotFoundError:
            raise
        except Exception:  # whatever damaged files make the formats' libraries raise
            return None
        if found is None:
            return None
        parts, digests = found
        if not {CONTENT, SEAL} <= set(digests):
            return None
        seal = digests[SEAL]
        sound = all(digests.get(name) == sealed(seal, name, part) for name, part in parts.items())
        return Stored(parts, digests[CONTENT], seal) if sound else None

    def finish(self, names: Names, content: bytes) -> None:
        """Keep what reads the results back without the data.

        Args:
            names: of the responses.
            content: it, as a file of :mod:`lmmax.archive`.
        """
        with self._written(WRITING):
            self._keep(content, names)

    def opened(self) -> bytes:
        """Return what `finish` kept; the work is that of this store from then on.

        Raises:
            StoreError: if the work is not finished, or there is none.
        """
        here = repr(str(self.path))
        description = self._described()
        if description is None:
            raise StoreError(
                f"{here} holds no results of fit_many, or what says of which work they are is "
                "damaged; if it is, fit_many(..., out=, resume=True) repairs it"
            )
        _check_format(here, description)
        try:
            content = self._kept()
        except ModuleNotFoundError:
            raise
        except Exception as error:  # whatever damaged files make the formats' libraries raise
            raise self.damaged(f"{type(error).__name__}: {error}") from error
        if content is None and self.pickled() is not None:
            raise StoreError(
                f"{here} was finished by an earlier version of lmmax, whose file is a pickle, "
                "which can run anything when it is read: fit_many(..., out=, resume=True) makes "
                "one of data; BatchFit.open(path, allow_pickle=True) reads it, if you trust where "
                "it comes from"
            )
        if content is None:
            raise StoreError(
                f"the work in {here} is not finished: fit_many(..., out=, resume=True) goes on "
                "with it"
            )
        self.work = work_of(description)
        return content

    def damaged(self, why: str) -> StoreError:
        """Return the error for what `finish` kept if that is damaged."""
        return StoreError(
            f"what reads the results in {str(self.path)!r} back is damaged ({why}); "
            "fit_many(..., out=, resume=True) makes it again"
        )

    def pickled(self) -> bytes | None:
        """Return what an earlier version kept, which is a pickle; None if there is none."""
        raise NotImplementedError

    # What a format does.

    def _described(self) -> dict[str, Any] | None:
        """Return the description of the work; None if there is none that can be read."""
        raise NotImplementedError

    def _make(self, description: dict[str, Any]) -> None:
        """Begin an empty store; the description comes last."""
        raise NotImplementedError

    def _put(self, first: int, names: Names, parts: Parts, digests: dict[str, bytes]) -> None:
        """Write a chunk."""
        raise NotImplementedError

    def _get(
        self, first: int, fields: Sequence[Field], total: int
    ) -> tuple[Parts, dict[str, bytes]] | None:
        """Read some arrays of a chunk, and its hashes."""
        raise NotImplementedError

    def _look(self) -> None:
        """Look anew at what another run may have changed."""

    def _mend(self, description: dict[str, Any]) -> None:
        """Make anew what chunks cannot be read or written without, if it is damaged."""

    def _claim_path(self) -> Path:
        """Return the file that is there while a run writes."""
        raise NotImplementedError

    def _clear(self) -> None:
        """Remove what runs that were killed left half written."""

    def _keep(self, content: bytes, names: Names) -> None:
        raise NotImplementedError

    def _kept(self) -> bytes | None:
        raise NotImplementedError


_NOTE = "sha256 of "


class ParquetStore(Store):
    """A directory with a Parquet file for each chunk, a column for each number of a response."""

    _CHUNKS, _ASIDE = "chunk-*.parquet", ".unknown"

    def _need(self) -> None:
        _parquet()

    def _described(self) -> dict[str, Any] | None:
        return _description(_json(self.path / "work.json"))

    def _make(self, description: dict[str, Any]) -> None:
        self._set_aside()
        text = json.dumps(description, indent=1, sort_keys=True)
        about = self.path / "work.json"
        # One that cannot be read is replaced.
        with whole(about, replace=about.exists()) as file:
            file.write(text.encode())

    def _set_aside(self) -> None:
        """Rename chunks that are there without a description, but for those of this work."""
        strange = []
        for path in sorted(self.path.glob(self._CHUNKS)):
            number = path.stem.removeprefix("chunk-")
            first = int(number) if number.isdecimal() else -1
            stored = self.read(first) if self._chunk(first) == path else None
            if stored is None or not self.keeps(first, stored, stored.content):
                strange.append(path)
        self._contents.clear()
        if not strange:
            return
        for path in strange:
            path.replace(path.with_name(path.name + self._ASIDE))
        warnings.warn(
            f"out={str(self.path)!r} holds results without work.json, which says of which work "
            f"they are: {len(strange)} files are now called *{self._ASIDE}, and are not used",
            StoreWarning,
            stacklevel=2,
        )

    def _claim_path(self) -> Path:
        return self.path / "claim.partial"

    def _clear(self) -> None:
        for name in ("chunk-*", "work.json*", "batch.npz*"):
            for left in self.path.glob(f"{name}.partial"):
                left.unlink(missing_ok=True)

    def _chunk(self, first: int) -> Path:
        return self.path / f"chunk-{first:012d}.parquet"

    def _put(self, first: int, names: Names, parts: Parts, digests: dict[str, bytes]) -> None:
        pa, parquet = _parquet()
        columns = {"response": pa.array(list(map(str, names)))}
        for field in self.fields:
            flat = parts[field.name].reshape(len(names), -1)
            columns |= {label: pa.array(flat[:, j]) for j, label in enumerate(field.labels)}
        notes = {_NOTE + name: digest.hex() for name, digest in digests.items()}
        notes[_NOTE + "response"] = fingerprint_names(names)
        table = pa.table(columns).replace_schema_metadata(notes)
        with whole(self._chunk(first)) as file:
            parquet.write_table(table, file, compression="zstd")

    def _get(
        self, first: int, fields: Sequence[Field], total: int
    ) -> tuple[Parts, dict[str, bytes]] | None:
        _, parquet = _parquet()
        path = self._chunk(first)
        if not path.exists():
            return None
        labels = [label for field in fields for label in field.labels]
        every = len(fields) == len(self.fields)
        labels += ["response"] if every else []
        with parquet.ParquetFile(path) as file:
            table, notes = file.read(columns=labels), file.schema_arrow.metadata
            n = file.metadata.num_rows
        noted = {
            name.decode().removeprefix(_NOTE): note.decode()
            for name, note in notes.items()
            if name.decode().startswith(_NOTE)
        }
        named = noted.pop("response")
        if every and named != fingerprint_names(table.column("response").to_pylist()):
            return None
        parts = {}
        for field in fields:
            values = np.empty((n, len(field.labels)), dtype=field.kind)
            for j, label in enumerate(field.labels):
                values[:, j] = table.column(label).to_numpy()
            parts[field.name] = values.reshape(n, *field.shape)
        return parts, {name: bytes.fromhex(note) for name, note in noted.items()}

    def _keep(self, content: bytes, names: Names) -> None:
        with whole(self.path / "batch.npz") as file:
            file.write(content)

    def _kept(self) -> bytes | None:
        return _bytes(self.path / "batch.npz")

    def pickled(self) -> bytes | None:
        """See `Store`."""
        return _bytes(self.path / "batch.pickle")


class ZarrStore(Store):
    """A Zarr group of arrays, whose chunks along the responses are the chunks of the work.

    The array ``sha256`` holds the hashes of each chunk, in the order of the fields, and then those
    of the responses and the seal; the chunk is there once they are.
    """

    _SHA, _BATCH, _NAMES, _PICKLED = "sha256", "batch", "response", "batch_pickle"

    @property
    def _hashed(self) -> tuple[str, ...]:
        """What there is a hash of, in order."""
        return (*(field.name for field in self.fields), CONTENT, SEAL)

    @cached_property
    def _growing(self) -> Lock:
        return Lock()

    def _need(self) -> None:
        _ = self._zarr

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
        # Of a group, or of something that is none of ours.
        attributes = (_json(self.path / "zarr.json") or {}).get("attributes")
        return _description(attributes.get("lmmax") if isinstance(attributes, dict) else None)

    def _look(self) -> None:
        self.__dict__.pop("_arrays", None)  # another run may have made them longer

    def _mend(self, description: dict[str, Any]) -> None:
        self._look()
        group, damaged = self._group, []
        for name, layout in self._layouts(description).items():
            try:
                found = group[name]
                sound = (found.shape[1:], found.dtype) == (layout["shape"][1:], layout["dtype"])
                # Of an unknown number of responses they grow.
                sound &= not description["responses"] or found.shape[0] == layout["shape"][0]
                sound &= found.chunks == layout["chunks"]
            except Exception:  # as in `_checked`
                sound = False
            if not sound:
                damaged.append(name)
        for name in damaged:
            self._remove(name)
            group.create_array(name, **self._layouts(description)[name])
        if damaged:
            self._look()
            warnings.warn(
                f"out={str(self.path)!r} was damaged: {', '.join(damaged)} cannot be read; what "
                "was lost is fitted again",
                StoreWarning,
                stacklevel=2,
            )

    def _claim_path(self) -> Path:
        return self.path.with_name(self.path.name + ".claim.partial")  # beside what is Zarr's

    def _make(self, description: dict[str, Any]) -> None:
        if (self.path / self._SHA).is_dir():
            # Ours, without a description: seals tell what is of this work.
            self._remove("zarr.json")
            self._zarr.create_group(str(self.path), attributes={"lmmax": description})
            return
        # Whole at once, and never over something else, which opening it for writing would delete.
        if self.path.is_dir():
            self.path.rmdir()
        begun = partial_beside(self.path)
        try:
            group = self._zarr.open_group(str(begun), mode="w")
            for name, layout in self._layouts(description).items():
                group.create_array(name, **layout)
            group.attrs["lmmax"] = description
            begun.rename(self.path)
        finally:
            shutil.rmtree(begun, ignore_errors=True)

    def _layouts(self, description: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return how each array is laid out."""
        total, size = description["responses"] or 0, description["chunk"]
        found: dict[str, dict[str, Any]] = {}
        for field in self.fields:
            # Zarr has no chunks of length zero; without tests these arrays stay empty.
            own = tuple(max(length, 1) for length in field.shape)
            found[field.name] = {
                "shape": (total, *field.shape),
                "chunks": (min(size, total or size), *own),
                "dtype": np.dtype(field.kind),
                "fill_value": np.nan if field.kind == "f8" else 0,
                "dimension_names": ("response", *field.axes),
                "attributes": {"labels": list(field.labels)},
            }
        shape = (-(-total // size), len(self._hashed), DIGEST)
        found[self._SHA] = {
            "shape": shape,
            "chunks": (1, *shape[1:]),
            "dtype": np.dtype("u1"),
            "fill_value": 0,
        }
        return found

    @cached_property
    def _size(self) -> int:
        """Responses in a chunk."""
        return int(self._group.attrs["lmmax"]["chunk"])

    def _put(self, first: int, names: Names, parts: Parts, digests: dict[str, bytes]) -> None:
        arrays, number = self._arrays, first // self._size
        with self._growing:
            # Of an unknown number of responses they grow.
            for name, length in {
                **dict.fromkeys(parts, first + len(names)),
                self._SHA: number + 1,
            }.items():
                if arrays[name].shape[0] < length:
                    arrays[name].resize((length, *arrays[name].shape[1:]))
        for name, part in parts.items():
            if part.size:
                arrays[name][first : first + len(part)] = part
        digest = b"".join(digests[name] for name in self._hashed)
        arrays[self._SHA][number] = np.frombuffer(digest, dtype="u1").reshape(-1, DIGEST)

    def _get(
        self, first: int, fields: Sequence[Field], total: int
    ) -> tuple[Parts, dict[str, bytes]] | None:
        size = self._size
        if first >= self._arrays["n_obs"].shape[0]:
            return None
        digest = self._arrays[self._SHA][first // size]
        if not digest.any():
            return None
        last = first + size if total < 0 else min(first + size, total)
        parts = {
            field.name: np.ascontiguousarray(self._arrays[field.name][first:last])
            for field in fields
        }
        digests = [each.tobytes() for each in digest]
        return parts, dict(zip(self._hashed, digests, strict=True))

    def _keep(self, content: bytes, names: Names) -> None:
        values = np.frombuffer(content, dtype="u1")
        group = self._group
        with warnings.catch_warnings():
            # Zarr's text is not in its specification yet; it is for other readers.
            warnings.simplefilter("ignore")
            self._remove(self._NAMES, self._BATCH)
            text = group.create_array(
                self._NAMES,
                shape=(len(names),),
                chunks=(min(NAMES, len(names)),),
                dtype=np.dtypes.StringDType(),
                dimension_names=("response",),
            )
        for first in range(0, len(names), NAMES):
            text[first : first + NAMES] = np.array(
                list(map(str, names[first : first + NAMES])), dtype=np.dtypes.StringDType()
            )
        group.create_array(self._BATCH, data=values)

    def _kept(self) -> bytes | None:
        return self._bytes(self._BATCH)

    def pickled(self) -> bytes | None:
        """See `Store`."""
        return self._bytes(self._PICKLED)

    def _bytes(self, name: str) -> bytes | None:
        there = (self.path / name).exists()
        return self._group[name][:].tobytes() if there else None

    def _remove(self, *names: str) -> None:
        """Remove arrays, whatever state they are in."""
        for name in names:
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
            else:
                (self.path / name).unlink(missing_ok=True)


def store_at(path: Path, fields: tuple[Field, ...] = (), work: bytes = b"") -> Store:
    """Return the store at a path: Zarr's if its name ends in ``.zarr``, else Parquet's."""
    return (ZarrStore if path.suffix == ".zarr" else ParquetStore)(path, fields, work)


class StoredRecord:
    """Results that stay on disk; stands where a :class:`lmmax.batch.engines.Record` does.

    Each of its fields is read when it is asked for, and not kept.

    Attributes:
        store: where they are.
        total: number of responses.
        size: responses in a chunk.
        contents: hashes of the responses of all chunks, (chunks, bytes).
    """

    def __init__(self, store: Store, total: int, size: int, contents: np.ndarray) -> None:
        self.store, self.total, self.size, self.contents = store, total, size, contents

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in Record._fields:
            raise AttributeError(name)
        return self.store.field(name, self.total, self.size, self.contents)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (getattr(self, name) for name in Record._fields)

    def around(self, number: int) -> Record:
        """Return the results of the chunk that a response is in."""
        first = number - number % self.size
        content = self.contents[number // self.size].tobytes()
        return self.store.chunk(first, self.total, content)

    def load(self) -> Record:
        """Return the results, read into memory."""
        return Record(*self)


_WHAT = {
    "formula": "the formula",
    "design": "the data or options of the designs (columns, weights, offset, contrasts, relmat)",
    "rows": "which rows have missing values",
    "settings": "the options of the fits",
    "tests": "the hypotheses in tests=",
    "responses": "the number of responses",
    "values": "the first response that varies, or the last",
    "names": "the names of the responses",
    "models": "the weights, offsets or columns of scan= of the first model or the last",
    "chunk": "chunk=",
}
"""What the parts of a description of work are, for messages."""


def _difference(differs: list[str], before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return what differs between two works, and the remedy."""
    parts = []
    for key in differs:
        what = _WHAT.get(key, key)
        if key == "settings":
            was, here = (
                str(of.get(key, "")).removeprefix("Settings(").removesuffix(")").split(", ")
                for of in (before, now)
            )
            what += f": {', '.join(x for x in was if x not in here)} is now "
            what += ", ".join(x for x in here if x not in was)
        elif key in ("formula", "responses", "chunk") and key in before:
            what += f", which was {before[key]} and is {now[key]}"
        parts.append(what)
    own = differs == ["chunk"] and "chunk" in before
    again = f"pass chunk={before['chunk']}" if own else "go on with what it was begun with"
    return f"{', '.join(differs)} differ ({'; '.join(parts)}): {again}, or use another directory"


def _check_format(here: str, description: dict[str, Any]) -> None:
    """Raise for a directory that another version laid out in its own way."""
    if description.get("format") != FORMAT:
        raise StoreError(
            f"{here} was written by another version of lmmax, in a format in which results do not "
            "say of which responses they are: use another directory; other programs read the "
            "numbers"
        )


def _description(found: Any) -> dict[str, Any] | None:
    """Return a description of work if it is one, or one that another version wrote."""
    if not isinstance(found, dict):
        return None
    return found if "lmmax" in found or found.get("format") != FORMAT else None


def _json(path: Path) -> dict[str, Any] | None:
    """Return what a file holds; None if there is none, or it is damaged.

    Raises:
        StoreError: if it cannot be read at all.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        why = error.strerror or str(error)
        raise StoreError(
            f"{str(path)!r}, which says of which work results are, cannot be read ({why}): remove "
            "what is in its place, or use another directory"
        ) from error
    return found if isinstance(found, dict) else None


def _bytes(path: Path) -> bytes | None:
    """Return the contents of a file, None if there is none."""
    return path.read_bytes() if path.exists() else None


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "results in Parquet files need pyarrow: pip install 'lmmax[parquet]'"
        ) from error
    return pyarrow, parquet
