"""Stored reference fits of mixed models, and their data.

See README.md here for the sources, and ``make_reference.py`` for how they were trimmed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HERE = Path(__file__).parent
KINDS = ("lmm", "lme", "glmmTMB")


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    return {t["name"]: t for t in json.loads((HERE / "datasets.json").read_text())}


def load_data(name: str) -> pd.DataFrame:
    """The data set ``name``; categorical columns are strings (many labels look like numbers).

    Empty fields are missing: NaN in numeric columns, None-like in categorical ones.
    """
    columns = _tables()[name]["columns"]
    dtype = {c["name"]: "float64" if c["type"] == "numeric" else "str" for c in columns}
    path = HERE / "data" / f"{name}.csv"
    if not path.exists():
        path = path.with_name(f"{name}.csv.gz")
    return pd.read_csv(path, dtype=dtype, keep_default_na=False, na_values=[""])


@functools.cache
def _records() -> list[dict[str, Any]]:
    return [
        {**record, "dataset": path.stem}
        for path in sorted((HERE / "fits").glob("*.json"))
        for record in json.loads(path.read_text())
    ]


def load_records(
    *, kinds: tuple[str, ...] = ("lmm", "lme"), several: bool | None = None
) -> list[dict[str, Any]]:
    """All stored records of these kinds, each with its data set's name under ``dataset``.

    ``several`` takes only those with several grouping factors (True) or with one (False).
    """
    return [
        record
        for record in _records()
        if record["kind"] in kinds
        and (several is None or several == (len(grouping_factors(record)) > 1))
    ]


def load_record(identifier: str) -> dict[str, Any]:
    """The record with this id."""
    return next(record for record in _records() if record["id"] == identifier)


def grouping_factors(record: dict[str, Any]) -> list[str]:
    """Names of the grouping factors as the engine spells them, in its order."""
    return list(dict.fromkeys(term["group"] for term in record["results"]["varcorr"]))


def as_in_formula(group: str, names: Iterable[str]) -> tuple[str, list[int]]:
    """The name among ``names`` of an engine's grouping factor, and the order of its parts.

    lme4 turns the nested factor of ``a/b`` round: ``b:a``, with labels to match.
    """
    parts = group.split(":")
    name = next(name for name in names if sorted(name.split(":")) == sorted(parts))
    return name, [parts.index(part) for part in name.split(":")]


def labels_as_in_formula(labels: Iterable[str], order: list[int]) -> list[str]:
    """Labels of an engine's combined factor, their parts put in the order of the formula."""
    if len(order) == 1:
        return list(labels)
    return [":".join(label.split(":")[i] for i in order) for label in labels]


def effect_name(column: str) -> str:
    """A name that an engine's column and ours share: ``(Intercept)``, ``f[A]`` and ``fA``."""
    return re.sub(r"[()\[\]]", "", column)


def matrix(entry: dict[str, Any] | list[Any]) -> np.ndarray:
    """A stored matrix or vector as float64; ``"NaN"``, ``"Inf"`` and null become floats.

    ``entry`` is an array of rows, or an object with ``values``.
    """
    values = entry["values"] if isinstance(entry, dict) else entry
    return np.array(values, dtype=object).astype(np.float64)
