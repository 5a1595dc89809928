"""What ties results to the work, the responses and the place that they are of.

The results of a block of responses carry a hash of the responses themselves, all of them, and a
*seal*: the hash of the work, of the place of the block, and of that.  The hashes of the results
include the seal, so that results which were moved, renamed, or copied from elsewhere do not agree
with themselves, and those of other responses do not agree with the responses at hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..matrices import Design

DIGEST = 32
"""Bytes of a hash."""
NAMES = 4096
"""Names that are made text at once."""

Names = Sequence[Any] | pd.Index
"""Names of responses."""


def fingerprint(*parts: Any) -> str:
    """Return a hash of arrays and settings: the same for the same work."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            _add(digest, part)
        else:
            digest.update(_canonical(part).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def fingerprint_names(names: Names) -> str:
    """Return a hash of names, some of which at a time are made text."""
    digest = hashlib.sha256()
    for first in range(0, len(names), NAMES):
        digest.update("\0".join(map(str, names[first : first + NAMES])).encode() + b"\0")
    return digest.hexdigest()


def parts_of(design: Design) -> list[Any]:
    """Return all that makes a design, its response apart, each part with what it is.

    Two designs may have the same arrays, in other roles.
    """
    found: list[Any] = [str(design.spec), "X", design.X]
    for block in design.blocks:
        found += ["Z", block.grouping, block.Z, _canonical(block.covariance)]
    for grouping in design.groupings:
        found += ["codes", grouping.codes, "root", grouping.root]
    rest = ["weights", design.weights, "offset", design.offset]
    return found + rest + ["rotated", design.n_zero, design.log_weights]


def content_of(names: Names, block: Any) -> bytes:
    """Return the hash of some responses with all that goes with each.

    Args:
        names: their names.
        block: an array, or a :class:`lmmax.batch.varied.Block` of several.
    """
    digest = hashlib.sha256(fingerprint_names(names).encode())
    for part in getattr(block, "parts", (block,)):
        if part is None:
            digest.update(b"none")
        else:
            _add(digest, part)
    return digest.digest()


def work_of(description: Mapping[str, Any]) -> bytes:
    """Return the hash of a description of work, of what JSON can hold."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).digest()


def seal_of(work: bytes, first: int, content: bytes) -> bytes:
    """Return the seal of the results of a block.

    Args:
        work: hash of the work.
        first: number of the first response.
        content: hash of the responses.
    """
    return hashlib.sha256(work + first.to_bytes(8, "little") + content).digest()


def sealed(seal: bytes, name: str, values: np.ndarray) -> bytes:
    """Return the hash of one array of results under a seal."""
    digest = hashlib.sha256(seal + name.encode())
    _add(digest, values)
    return digest.digest()


def _add(digest: Any, values: np.ndarray) -> None:
    """Add the kind, the shape and the bytes of an array, without a copy of it."""
    digest.update(str((values.dtype.str, values.shape)).encode())
    values = np.ascontiguousarray(values)
    digest.update(values.reshape(-1).view(np.uint8) if values.size else b"")


def _canonical(value: Any) -> str:
    """Return a text that is the same, in any process, for structures that are the same."""
    of: Callable[[Any], str] = _canonical
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "__array__") and getattr(value, "dtype", None) is not None:
        return f"{kind} {fingerprint(np.asarray(value))}"
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return f"{kind} {of(named)}"
    if isinstance(value, Mapping):
        return f"{kind} {{{', '.join(f'{of(k)}: {of(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"{kind} [{', '.join(map(of, value))}]"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{kind} {value.__module__}.{value.__qualname__}"
    plain: Any = object.__repr__
    if type(value).__repr__ is plain:  # which has an address
        return f"{kind} {of(vars(value)) if hasattr(value, '__dict__') else ''}"
    return f"{kind} {value!r}"
