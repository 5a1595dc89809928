"""Data containers -> columns: one pandas frame of what a model uses, its missing values found."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import narwhals.stable.v1 as nw
import numpy as np
import pandas as pd

from .characters import Visible
from .options import Missing, choose

__all__ = ["DataError"]


class DataError(Visible, ValueError):
    """Data that do not fit the model; the message names the column, level or row."""


# A table is looked up by column name and iterates over the names; nothing in it is converted yet.
Table = pd.DataFrame | Mapping[Any, Any]


def as_table(data: Any) -> Table:
    """Any accepted container -> table.

    Raises:
        TypeError: for a container of another kind.
    """
    if isinstance(data, (pd.DataFrame, Mapping)):
        return data
    if type(data).__module__ == "pyarrow.lib" and type(data).__name__ == "RecordBatch":
        # One of the batches that tables consist of, whose columns narwhals does not read.
        return dict(zip(data.schema.names, data.columns, strict=True))
    frame = nw.from_native(data, pass_through=True)
    if isinstance(frame, nw.DataFrame):
        return {name: frame.get_column(name) for name in frame.columns}
    if isinstance(frame, nw.LazyFrame):
        raise TypeError("data is a lazy frame: pass data.collect()")
    hint = ""
    if isinstance(data, np.ndarray):
        hint = "; for plain arrays use fit_arrays()"
        if data.dtype.names:
            hint = "; for an array with named fields pass pandas.DataFrame.from_records(data)"
    raise TypeError(
        "data must be a pandas or polars DataFrame, a pyarrow Table or a dict of columns, not "
        f"{type(data).__name__}{hint}"
    )


def broadcast(table: Table) -> Table:
    """A mapping whose single values stand for every row, as `predict` takes it -> whole columns.

    Text is a single value, and an array without dimensions; with single values only there is one
    row.
    """
    if isinstance(table, pd.DataFrame):
        return table
    single = {name for name, values in table.items() if _is_single(values)}
    if not single:
        return table
    n = n_rows({name: values for name, values in table.items() if name not in single}) or 1
    labels = [
        values.index for values in table.values() if isinstance(values, (pd.Series, pd.DataFrame))
    ]
    index = labels[0] if labels else None
    return {
        name: pd.Series([_item(values)] * n, index=index) if name in single else values
        for name, values in table.items()
    }


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, np.ndarray) else value


def _is_single(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return values.ndim == 0
    return isinstance(values, str | bytes) or not isinstance(values, Iterable)


def n_rows(table: Table) -> int:
    """Number of rows; of a mapping without columns none."""
    if isinstance(table, pd.DataFrame):
        return len(table)
    first = next(iter(table.values()), ())
    return len(first) if hasattr(first, "__len__") else 0


def read_columns(table: Table, names: Iterable[str]) -> pd.DataFrame:
    """The named columns as they are, with the row labels of the data.

    Raises:
        DataError: for a name that comes twice, or columns that differ in length or shape.
    """
    if isinstance(table, pd.DataFrame):
        columns = {}
        for name in names:
            column = table[name]
            if column.ndim != 1:
                raise DataError(f"data has {column.shape[1]} columns named {name!r}: rename them")
            columns[name] = column.array
        return pd.DataFrame(columns, index=table.index, copy=False)
    given = {name: table[name] for name in names}
    for name, values in given.items():
        if isinstance(values, Iterator):
            raise DataError(
                f"column {name!r} is an iterator, which can be read only once: pass list() of it"
            )
    check_same_rows({f"column {name!r}": values for name, values in given.items()})
    read = {name: one_dimensional(values, f"column {name!r}") for name, values in given.items()}
    lengths = {name: len(values) for name, values in read.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
        raise DataError(f"columns differ in length: {listed}")
    n = next(iter(lengths.values()), n_rows(table))
    # Their arrays, because a dict of Series would be aligned by label.
    arrays = {name: values.array for name, values in read.items()}
    return pd.DataFrame(arrays, index=pd.RangeIndex(n), copy=False)


def one_dimensional(values: Any, what: str) -> pd.Series:
    """Array-like -> Series; lists keep the types of their elements, whole numbers their digits."""
    if not isinstance(values, (pd.Series, pd.Index)):
        # A column of a frame of another library, or such a column by itself.
        values = nw.from_native(values, series_only=True, pass_through=True)
    if isinstance(values, nw.Series):
        values = _from_narwhals(values)
    elif hasattr(values, "to_pylist"):  # an array of pyarrow, which NumPy would read as floats
        values = values.to_pylist()
    elif isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise DataError(f"{what} is a single value, {values!r}: give one value per row")
    elif hasattr(values, "__array__") and not isinstance(
        values, (pd.Series, pd.Index, pd.api.extensions.ExtensionArray)
    ):
        values = np.asarray(values)
    shape = getattr(values, "shape", (0,))
    if len(shape) != 1:
        raise DataError(f"{what} must be one-dimensional, its shape is {shape}")
    if str(getattr(values, "dtype", "")) == "float16":  # of which pandas makes no index
        values = values.astype(np.float64)
    column = pd.Series(values)
    if not hasattr(values, "dtype") and column.dtype == np.float64 and beyond_integers(column):
        # Python's own numbers, among which a missing one made floats of the others.
        given = pd.Series(values, dtype=object)
        if pd.api.types.infer_dtype(given, skipna=True) != "floating":
            return given
    return column


EXACT = 2.0**53
"""The number from which on neighbouring whole numbers are one in double precision."""


def beyond_integers(values: Any) -> bool:
    """Whether any of the floats (n,) is so large that it may stand for several whole numbers."""
    return bool((np.abs(np.asarray(values)) >= EXACT).any())


def _from_narwhals(column: nw.Series[Any]) -> Any:
    arrow_type = getattr(column.to_native(), "type", None)
    if column.dtype == nw.Enum or getattr(arrow_type, "ordered", False):
        categories = column.cat.get_categories().to_list()
        labels = column.cast(nw.String).to_list()
        return pd.Categorical(labels, categories=categories, ordered=True)
    if column.dtype == nw.Categorical:
        column = column.cast(nw.String)
    if column.dtype in (nw.Int128, nw.UInt128):
        return np.array(column.to_list(), dtype=object)
    if column.dtype.is_integer() and column.null_count():
        # NumPy has no missing integers: those of 64 bits would become floats of 53.
        wide = np.uint64 if column.dtype == nw.UInt64 else np.int64
        known = column.fill_null(0).to_numpy().astype(wide)
        return pd.arrays.IntegerArray(known, column.is_null().to_numpy())
    return column.to_numpy()


_NUMERIC_OBJECTS = ("floating", "integer", "mixed-integer-float", "decimal", "empty")


def as_numbers(values: pd.Series) -> pd.Series:
    """Numeric values as float64 or int64 with NaN for missing; other values as they are."""
    dtype = values.dtype
    if isinstance(dtype, np.dtype) and dtype.kind in "fiu":
        wide = np.result_type(dtype, np.int64)  # narrow integers would overflow in expressions
        if dtype == np.uint64 and not (values > np.iinfo(np.int64).max).any():
            wide = np.dtype(np.int64)
        return values if dtype == wide else values.astype(wide)
    if pd.api.types.is_object_dtype(dtype):
        kind = pd.api.types.infer_dtype(values, skipna=True)
        if kind == "integer" and not values.hasnans:
            found = values.infer_objects()
            return values.astype(np.float64) if found.dtype == values.dtype else as_numbers(found)
        if kind in _NUMERIC_OBJECTS:
            return values.where(values.notna(), np.nan).astype(np.float64)
    elif pd.api.types.is_numeric_dtype(dtype) and not isinstance(dtype, np.dtype):
        if pd.api.types.is_bool_dtype(dtype):
            return values
        if pd.api.types.is_integer_dtype(dtype) and not values.hasnans:
            return as_numbers(pd.Series(values.to_numpy(), values.index))
        return pd.Series(values.to_numpy(np.float64, na_value=np.nan), values.index)
    return values


def is_number(dtype: Any) -> bool:
    """Whether values that went through `as_numbers` are numbers."""
    return isinstance(dtype, np.dtype) and dtype.kind in "fi"


def is_label(dtype: Any) -> bool:
    """Whether values that are not numbers can serve as categories."""
    return (
        isinstance(dtype, pd.CategoricalDtype)
        or pd.api.types.is_object_dtype(dtype)
        or pd.api.types.is_bool_dtype(dtype)
        or pd.api.types.is_string_dtype(dtype)
    )


def check_same_rows(given: Mapping[str, Any]) -> None:
    """Raise unless all pandas objects have the same row labels, in the same order.

    Args:
        given: by what messages call it; what has no labels passes.

    Raises:
        DataError: naming the first that disagrees.
    """
    labelled = [
        (what, values.index)
        for what, values in given.items()
        if isinstance(values, (pd.Series, pd.DataFrame))
    ]
    for what, index in labelled[1:]:
        first, known = labelled[0]
        if index is not known and not index.equals(known):
            raise DataError(
                f"{what} and {first} differ in the labels of their rows: reorder one of them, or "
                f"pass NumPy arrays, with to_numpy(), if their rows are in the same order"
            )


def real_numbers(values: Any, what: str) -> np.ndarray:
    """Array-like -> float64 of the same shape.

    Raises:
        DataError: for complex numbers, of which a conversion would drop the imaginary part.
        TypeError, ValueError: for what is not numeric.
    """
    array = np.asarray(values)
    if np.iscomplexobj(array):
        raise DataError(
            f"{what} holds complex numbers: pass the real part, `.real`, if that is what is meant"
        )
    return array.astype(np.float64, copy=False)


def in_rows_of(values: Any, what: str, table: Table) -> Any:
    """`weights=` or `offset=` without the labels of its rows, which must be those of the data.

    What is done with the data may give their rows other labels.
    """
    if not isinstance(values, pd.Series):
        return values
    if not values.index.equals(row_labels(table)):
        raise other_labels(what)
    return values.to_numpy() if isinstance(values.dtype, np.dtype) else values.array


def row_labels(table: Table) -> pd.Index:
    """Labels of the rows of a table."""
    return table.index if isinstance(table, pd.DataFrame) else pd.RangeIndex(n_rows(table))


def other_labels(what: str) -> DataError:
    """The error for a Series whose index is not that of the data."""
    return DataError(
        f"{what} is a Series whose index differs from that of the data: reorder it, or pass "
        f"{what}.to_numpy() if its rows are in the order of the data"
    )


def numeric_column(values: Any, what: str) -> np.ndarray:
    """Array-like -> (n,) float64, NaN for missing."""
    column = as_numbers(one_dimensional(values, what))
    if not is_number(column.dtype):
        kind = "True/False" if pd.api.types.is_bool_dtype(column.dtype) else column.dtype
        raise DataError(f"{what} must be numeric, not {kind}")
    return column.to_numpy(np.float64)


def side_column(values: Any, what: str, table: Table, index: pd.Index) -> np.ndarray:
    """`weights=` or `offset=`, an array or a column name -> (n,) float64, NaN for missing."""
    named = isinstance(values, str)
    if named:
        if values not in table:
            raise unknown_column(values, table, f"{what}={values!r}")
        values = table[values]
    numbers = numeric_column(values, what)
    if len(numbers) != len(index):
        raise DataError(f"{what} has {len(numbers)} values for {len(index)} rows of data")
    if not named and isinstance(values, pd.Series) and not values.index.equals(index):
        raise other_labels(what)
    return numbers


def missing_values(columns: Iterable[tuple[Any, Any]], index: pd.Index) -> dict[str, np.ndarray]:
    """Rows in which columns lack a value, by name; an infinite value is an error."""
    masks: dict[str, np.ndarray] = {}
    for name, column in columns:
        values = column
        if isinstance(column, pd.Series):
            numbers = as_numbers(column)
            plain = isinstance(numbers.dtype, np.dtype)
            values = numbers.to_numpy() if plain else numbers.array
        if is_number(values.dtype):
            if np.isfinite(values).all():
                continue
            check_finite(name, values, index)
        mask = np.asarray(pd.isna(values))
        if mask.any():
            masks[name] = masks[name] | mask if name in masks else mask
    return masks


def any_missing(masks: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """Rows, (n,) bool, that lack any value."""
    return np.logical_or.reduce([np.zeros(n, dtype=bool), *masks.values()])


def complete_rows(
    masks: Mapping[str, np.ndarray], missing: str
) -> tuple[np.ndarray | slice, dict[str, int]]:
    """Masks of missing values -> the rows to keep, and the number of missing values by name.

    Args:
        masks: (n,) bool by name, each with a missing value.
        missing: `"drop"` or `"raise"`.

    Raises:
        DataError: if no row is complete, or `missing` is `"raise"` and there are masks.
        ValueError: for another `missing`.
    """
    missing = choose("missing", missing, get_args(Missing))
    if not masks:
        return slice(None), {}
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    listed = ", ".join(f"{name!r} ({count})" for name, count in counts.items())
    bad = np.logical_or.reduce(list(masks.values()))
    if missing == "raise":
        raise DataError(
            f"missing values in {listed}; {plural(bad.sum(), 'row')} affected. Fill or remove "
            "them, or use missing='drop'"
        )
    if bad.all():
        raise DataError(
            f"no row is left: every one of the {len(bad)} has a missing value, in {listed}"
        )
    return ~bad, counts


def check_finite(name: str, values: Any, index: pd.Index) -> None:
    """Raise for an infinite value; NaN passes."""
    infinite = np.isinf(np.asarray(values))
    if infinite.any():
        raise DataError(
            f"column {name!r} is infinite in {plural(infinite.sum(), 'row')}, first in "
            f"{row_text(index, np.argmax(infinite))}"
        )


def unknown_column(name: str, table: Iterable[Any], where: str) -> DataError:
    """The error for a name that is no column, with the likeliest remedy."""
    # Columns of our own stand in parentheses.
    if isinstance(getattr(table, "columns", None), pd.MultiIndex):
        return DataError(
            f"no column {name!r} in the data ({where}): its columns have several levels; give them "
            'one name each, for instance data.columns = ["_".join(map(str, c)) for c in '
            "data.columns]"
        )
    columns = [str(column) for column in table if not str(column).startswith("(")]
    close = difflib.get_close_matches(name, columns, n=1)
    close = close or [column for column in columns if column.lower() == name.lower()]
    dotted = [column for column in columns if column.startswith(name + ".")]
    hint = ""
    if dotted:
        hint = f" Inside a call, write the column {dotted[0]!r} in backticks: `{dotted[0]}`."
    elif name in ("T", "F"):
        hint = f" For the logical value write {'True' if name == 'T' else 'False'}."
    elif close:
        hint = f" Did you mean {close[0]!r}?"
    return DataError(
        f"no column {name!r} in the data ({where}).{hint} Columns: {listing(columns)}."
    )


def listing(values: Iterable[Any], limit: int = 20) -> str:
    """Values for a message, cut short if there are many."""
    items = [str(value) for value in values]
    shown = ", ".join(items[:limit])
    return f"{shown}, ... ({len(items)} in all)" if len(items) > limit else shown


def as_names(values: Any, what: str) -> list[Any]:
    """Names that a caller gave, one after the other.

    Raises:
        DataError: for one text, or what is no sequence of labels.
    """
    try:
        names = None if isinstance(values, str | bytes | Mapping) else list(values)
        if names is not None and all(isinstance(hash(name), int) for name in names):
            return names
    except TypeError:
        pass
    raise DataError(f"{what} must be a list of names, not {values!r}")


def plural(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def row_text(index: pd.Index, position: Any) -> str:
    """A row for a message, by its label."""
    label = index[int(position)]
    return f"row {label!r}" if isinstance(label, str) else f"row {label}"
