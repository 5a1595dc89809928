"""Stored reference fits of mixed models with one grouping factor, and their data.

See README.md here for the sources, and ``make_reference.py`` for how they were trimmed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HERE = Path(__file__).parent


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    return {t["name"]: t for t in json.loads((HERE / "datasets.json").read_text())}


def load_data(name: str) -> pd.DataFrame:
    """The data set ``name``; categorical columns are strings (many labels look like numbers).

    Empty fields are missing: NaN in numeric columns, None-like in categorical ones.
    """
    columns = _tables()[name]["columns"]
    dtype = {c["name"]: "float64" if c["type"] == "numeric" else "str" for c in columns}
    return pd.read_csv(
        HERE / "data" / f"{name}.csv", dtype=dtype, keep_default_na=False, na_values=[""]
    )


def load_records(*, kinds: tuple[str, ...] = ("lmm", "lme")) -> list[dict[str, Any]]:
    """All stored records, each with its data set's name under ``dataset``."""
    records = []
    for path in sorted((HERE / "fits").glob("*.json")):
        for record in json.loads(path.read_text()):
            if record["kind"] in kinds:
                records.append({**record, "dataset": path.stem})
    return records


def load_record(identifier: str) -> dict[str, Any]:
    """The record with this id."""
    return next(r for r in load_records() if r["id"] == identifier)


def matrix(entry: dict[str, Any] | list[Any]) -> np.ndarray:
    """A stored matrix or vector as float64; ``"NaN"``, ``"Inf"`` and null become floats.

    ``entry`` is an array of rows, or an object with ``values``.
    """
    values = entry["values"] if isinstance(entry, dict) else entry
    return np.array(values, dtype=object).astype(np.float64)
