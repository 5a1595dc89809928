"""Where responses come from, a block of columns at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..design import DataError
from ..frames import Table, n_rows


@dataclass(frozen=True, eq=False)
class Columns:
    """Responses that are columns of an array, a data frame, or a file of either.

    Attributes:
        names: their names.
        values: array (n_data, k), anything that is sliced like one (memory map, Zarr, SciPy sparse
            matrix), data frame, or :class:`ParquetColumns`.
        rows: rows of the design.
        path: of the file, which is opened again where it is needed; None for what is in memory.
    """

    names: pd.Index
    values: Any
    rows: np.ndarray
    path: str | None = None

    def block(self, first: int, last: int) -> np.ndarray:
        """Return responses on the rows of the design, in double precision, (n, last - first).

        Read now, not when used, and laid out in one way: sums round alike whatever the source.
        """
        if isinstance(self.values, pd.DataFrame):
            part = self.values.iloc[:, first:last].to_numpy(dtype=float, na_value=np.nan)
        else:
            part = self.values[:, first:last]
            part = part.toarray() if hasattr(part, "toarray") else part
        part = part if len(part) == len(self.rows) else part[self.rows]
        return np.ascontiguousarray(part, dtype=float)

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

    def __getitem__(self, where: tuple[slice, slice]) -> np.ndarray:
        names = self._file.schema_arrow.names[where[1]]
        return np.asarray(self._file.read(columns=names).to_pandas().to_numpy(dtype=float))


def _open(path: str) -> Any:
    if path.endswith(".npy"):
        return np.load(path, mmap_mode="r")
    if path.endswith(".parquet"):
        return ParquetColumns(path)
    raise DataError(f"responses={path!r}: a file of responses ends in .npy or .parquet")


def columns(responses: Any, table: Table, rows: np.ndarray) -> Columns:
    """Read the `responses` argument of `fit_many`.

    Args:
        responses: what the user gave.
        table: the data.
        rows: rows of the design.

    Raises:
        DataError: if they do not fit the data.
    """
    n = n_rows(table)
    path = None
    if isinstance(responses, str | Path):
        path = str(responses)
        responses = _open(path)
    elif isinstance(responses, Iterable) and not hasattr(responses, "shape"):
        responses = _listed(list(responses), table)
    if not isinstance(responses, pd.DataFrame) and hasattr(responses, "to_pandas"):
        responses = responses.to_pandas()
    names: pd.Index
    if isinstance(responses, pd.DataFrame):
        names = responses.columns
        wrong = [name for name, kind in responses.dtypes.items() if kind.kind not in "fiub"]
        if wrong:
            raise DataError(f"the response {wrong[0]!r} is not numeric")
    elif isinstance(responses, ParquetColumns):
        names = pd.Index(responses._file.schema_arrow.names)
    else:
        if len(responses.shape) != 2:
            raise DataError(
                f"responses must be two-dimensional, a column each, not of shape {responses.shape}"
            )
        if np.dtype(responses.dtype).kind not in "fiub":
            raise DataError(f"responses must be numeric, not {responses.dtype}")
        names = pd.Index(range(responses.shape[1]))
    if responses.shape[0] != n:
        hint = "; they may be transposed" if names.size == n else ""
        raise DataError(f"responses has {responses.shape[0]} rows, data has {n}{hint}")
    if not names.size:
        raise DataError("responses has no column")
    if not names.is_unique:
        raise DataError(f"responses has several columns named {names[names.duplicated()][0]!r}")
    return Columns(names, responses, rows, path)


def _listed(found: list[Any], table: Table) -> Any:
    """Read a list: names of columns of the data, or numbers."""
    if found and all(isinstance(name, str) for name in found):
        absent = [name for name in found if name not in table]
        if absent:
            raise DataError(f"responses names {absent[0]!r}, which is no column of data")
        return pd.DataFrame({name: np.asarray(table[name]) for name in found})
    try:
        return np.asarray(found, dtype=float)
    except (TypeError, ValueError):
        raise DataError(
            "responses must be an array, a data frame, column names or a file"
        ) from None
