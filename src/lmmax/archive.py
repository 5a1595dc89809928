"""A file of arrays with a description: NumPy's ``.npz`` and JSON, and nothing to execute.

The same content gives the same bytes.  A hash of all of it is checked when it is read, so that a
file is what was written or an error; it is no signature, which would tell by whom.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from .characters import Visible
from .files import whole

T = TypeVar("T")

DESCRIPTION, HASH = "description", "hash"
"""Names of the arrays that are the description, as bytes of JSON, and the hash of all others."""


class ArchiveError(Visible, ValueError):
    """A file that is not what was to be read, or is damaged; the message says which."""


class MissingObjectError(ArchiveError):
    """A file that needs what is the reader's own; the message says what."""


class NoArchiveError(ArchiveError):
    """A file of another kind."""


READERS = {"lmmax fit": "lmmax.load", "lmmax batch": "lmmax.BatchFit.load"}
"""What reads the files of each format."""


def write(path: str | Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file, complete or not at all; one that is there stays as it is if that fails.

    Args:
        path: its name.
        about: what JSON can hold, with a `format` and a `version`.
        arrays: arrays of numbers or text.
    """
    try:
        with whole(Path(path)) as file:
            _write(file, about, arrays)
    except OSError as error:
        # The file that was asked for, not the one beside it.
        raise OSError(error.errno, error.strerror, str(path)) from error


def to_bytes(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the bytes of such a file."""
    file = BytesIO()
    _write(file, about, arrays)
    return file.getvalue()


def read(
    file: str | Path | BinaryIO, kind: str, version: int, what: str, remedy: str = ""
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what `write` wrote.

    Args:
        file: its name, or the file.
        kind: its `format`.
        version: the latest `version` that can be read.
        what: such a file holds, for messages.
        remedy: for a damaged file.

    Raises:
        ArchiveError: if it is another file, damaged, or of a later version.
        OSError: if it cannot be opened.
    """
    name = repr(str(file)) if isinstance(file, str | Path) else "it"
    damaged = f"{name} is damaged: its contents do not have the hash they carry{remedy}"
    # What is no file at all is an error of the system.
    if isinstance(file, str | Path) and not is_archive(file):
        raise NoArchiveError(f"{name} is not a {what}{remedy}")
    try:
        # Opened here, since NumPy leaves damaged files open.
        with (
            open(file, "rb") if isinstance(file, str | Path) else nullcontext(file) as opened,
            np.load(opened, allow_pickle=False) as found,
        ):
            content = {each: found[each] for each in found.files}
        about = json.loads(content[DESCRIPTION].tobytes())
        known = about["format"] == kind
        carried, later = content.pop(HASH), about["version"] > version
    except zipfile.BadZipFile as error:
        raise ArchiveError(f"{name} is damaged or not complete ({error}){remedy}") from error
    except Exception as error:  # whatever damaged files make NumPy raise
        raise ArchiveError(f"{name} is not a {what}, or is damaged{remedy}") from error
    if not known:
        reader = READERS.get(about["format"])
        hint = f", but {reader} reads it" if reader else remedy
        raise NoArchiveError(f"{name} is not a {what}{hint}")
    if later:
        raise ArchiveError(
            f"{name} was written by a later version of lmmax (format {about['version']}, "
            f"this one reads {version}): update lmmax"
        )
    if not np.array_equal(carried, _digest(content)):
        raise ArchiveError(damaged)
    del content[DESCRIPTION]
    return about, content


def is_archive(path: str | Path) -> bool:
    """Return whether a file begins as such files do."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def refuse_pickle(path: str | Path, what: str, function: str) -> None:
    """Raise if a file begins as those do that earlier versions of lmmax wrote.

    Args:
        path: the file.
        what: such a file holds.
        function: what reads it if told to.
    """
    with open(path, "rb") as file:
        head = file.read(2)
    if len(head) == 2 and head[0] == 0x80 and head[1] <= 5:
        raise ArchiveError(
            f"{str(path)!r} is not a {what}, but a pickle, as earlier versions wrote: it can run "
            f"anything when it is read. If you trust where it comes from, {function}(path, "
            "allow_pickle=True) reads it; saved again, it is a file of data"
        )


def pickled(path: str | Path, kind: type[T]) -> T:
    """Read a file of an earlier version of lmmax, which runs whatever its writer wanted.

    Raises:
        ArchiveError: if it holds no object of a kind, or is damaged.
    """
    import pickle

    with open(path, "rb") as file:
        try:
            found = pickle.load(file)
        except Exception as error:  # anything that the objects in it raise
            raise ArchiveError(
                f"{str(path)!r} is not a pickle that this version reads "
                f"({type(error).__name__}: {error})"
            ) from error
    if isinstance(found, dict):
        found = found.get("fit")
    if not isinstance(found, kind):
        raise ArchiveError(f"{str(path)!r} holds no {kind.__name__}")
    return found


def _write(file: BinaryIO, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    text = json.dumps(about, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    content = {DESCRIPTION: np.frombuffer(text, dtype=np.uint8), **arrays}
    np.savez(file, **content, **{HASH: _digest(content)})  # type: ignore[arg-type]


def _digest(content: Mapping[str, np.ndarray]) -> np.ndarray:
    digest = hashlib.sha256()
    for name in sorted(content):
        array = np.ascontiguousarray(content[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        if array.size:
            digest.update(array.reshape(-1).view(np.uint8).data)
    return np.frombuffer(digest.digest(), dtype=np.uint8)
