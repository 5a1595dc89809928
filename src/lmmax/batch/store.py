"""Results on disk, a file for each chunk of responses, so that work that stopped goes on.

A chunk is complete or absent: it is written under another name and then renamed, and carries the
hash of its contents.  The store begins with a description of the work, so that it never mixes two.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .engines import Record


class StoreError(ValueError):
    """A directory of results that is not, or no longer, what is asked for."""


@dataclass(frozen=True)
class Store:
    """A directory of results.

    Attributes:
        path: the directory.
        columns: names of the columns of a chunk, by field of the record.
    """

    path: Path
    columns: tuple[tuple[str, tuple[str, ...]], ...]

    def begin(self, description: dict[str, Any], resume: bool) -> None:
        """Make the directory, or check that it holds the same work.

        Raises:
            StoreError: if it holds results already and `resume` is false, or of other work.
        """
        about = self.path / "work.json"
        text = json.dumps(description, indent=1, sort_keys=True)
        if about.exists():
            if not resume:
                raise StoreError(
                    f"out={str(self.path)!r} holds results already: pass resume=True to go on with "
                    "them, or another directory"
                )
            before = json.loads(about.read_text())
            differs = [key for key in description if before.get(key) != description[key]]
            if differs:
                raise StoreError(
                    f"out={str(self.path)!r} holds results of other work: {', '.join(differs)} "
                    "differ; use another directory"
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        _write(about, text.encode())

    def _chunk(self, first: int) -> Path:
        return self.path / f"chunk-{first:012d}.parquet"

    def write(self, first: int, names: Sequence[Any], record: Record, n_obs: np.ndarray) -> None:
        """Write the results of a chunk that begins with response `first`."""
        import pyarrow as pa
        from pyarrow import parquet

        arrays = {"response": pa.array(list(map(str, names)))}
        flat = self._flat(record, n_obs)
        arrays |= {name: pa.array(values) for name, values in flat.items()}
        table = pa.table(arrays).replace_schema_metadata({b"lmmax.sha256": _hash(flat)})
        buffer = pa.BufferOutputStream()
        parquet.write_table(table, buffer, compression="zstd")
        _write(self._chunk(first), buffer.getvalue().to_pybytes())

    def read(self, first: int) -> tuple[Record, np.ndarray] | None:
        """Return the results of a chunk; None if there is no such file, or it is damaged."""
        import pyarrow as pa
        from pyarrow import parquet

        path = self._chunk(first)
        if not path.exists():
            return None
        try:
            table = parquet.read_table(path)
        except (OSError, ValueError, pa.ArrowException):
            return None
        flat = {
            name: table.column(name).to_numpy() for name in table.column_names if name != "response"
        }
        if (table.schema.metadata or {}).get(b"lmmax.sha256") != _hash(flat):
            return None
        return self._record(flat)

    def _flat(self, record: Record, n_obs: np.ndarray) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for field, names in self.columns:
            values = getattr(record, field)
            values = values.reshape(len(values), -1)
            found |= dict(zip(names, values.T, strict=True))
        return {**found, "n_obs": n_obs}

    def _record(self, flat: dict[str, np.ndarray]) -> tuple[Record, np.ndarray]:
        parts: dict[str, np.ndarray] = {}
        n = len(flat["n_obs"])
        for field, names in self.columns:
            values = np.stack([flat[name] for name in names], axis=1) if names else np.zeros((n, 0))
            if field == "cov_re":
                q = round(len(names) ** 0.5)
                values = values.reshape(n, q, q)
            elif field in ("scale", "llf", "status", "singular", "steps", "gradient"):
                values = values[:, 0]
            parts[field] = values
        return Record(**parts), flat["n_obs"]


def columns_of(coefficients: Sequence[str], q: int, tests: Sequence[str]) -> Any:
    """Return the names of the columns of a chunk, by field of the record."""
    return (
        *(
            (kind, tuple(f"{kind}[{name}]" for name in coefficients))
            for kind in ("params", "bse", "df")
        ),
        ("cov_re", tuple(f"cov_re[{i},{j}]" for i in range(q) for j in range(q))),
        *((name, (name,)) for name in ("scale", "llf", "status", "singular", "steps", "gradient")),
        *(
            (kind, tuple(f"{kind}[{name}]" for name in tests))
            for kind in ("statistic", "df_den", "estimate", "error")
        ),
    )


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


def _hash(flat: dict[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(flat):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(flat[name]).tobytes())
    return digest.hexdigest().encode()


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is complete or absent, whatever happens."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
