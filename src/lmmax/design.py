"""Data + `ModelSpec` -> `Design`: matrices, names, group codes, and the state for new data.

formulaic supplies the parsed terms, the transforms with memory, the contrast matrices and the
rule that decides which factors lose a column; the columns themselves are assembled here, straight
into one array per part, and group indicators are never built.
"""

from __future__ import annotations

import builtins
import copy
import difflib
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from formulaic import ModelSpec as FormulaicSpec
from formulaic.materializers import PandasMaterializer
from formulaic.materializers.types import EvaluatedFactor, FactorValues
from formulaic.parser.types import Factor
from formulaic.transforms import TRANSFORMS
from formulaic.transforms.contrasts import (
    Contrasts,
    CustomContrasts,
    DiffContrasts,
    HelmertContrasts,
    PolyContrasts,
    SASContrasts,
    SumContrasts,
    TreatmentContrasts,
)
from formulaic.utils.layered_mapping import LayeredMapping
from formulaic.utils.stateful_transforms import stateful_eval

from .formula import R_HINTS, expression_names, from_r, parse_formula, parse_terms
from .spec import ModelSpec, RandomTerm

__all__ = [
    "DataError",
    "Design",
    "Grouping",
    "NewDesign",
    "RandomBlock",
    "build_design",
    "design_from_arrays",
]

_CONTRASTS: dict[str, type[Contrasts]] = {
    "treatment": TreatmentContrasts,
    "sum": SumContrasts,
    "helmert": HelmertContrasts,
    "poly": PolyContrasts,
    "SAS": SASContrasts,
    "diff": DiffContrasts,
}


class DataError(ValueError):
    """Data that do not fit the model; the message names the column, level or row."""


@dataclass(frozen=True, eq=False)
class Grouping:
    """One grouping factor.

    Args:
        name: `"Pig"`, or `"batch:cask"` for the combinations that occur.
        codes: (n,) int64, position in `levels` of each row's group.
        levels: (m,) labels, sorted where they can be (in the order of a pandas categorical, else
            of first appearance); combinations are strings `"A:a"`.
    """

    name: str
    codes: np.ndarray
    levels: pd.Index


@dataclass(frozen=True, eq=False)
class RandomBlock:
    """The columns of one random term.

    Args:
        term: the term as asked for.
        grouping: position of its grouping factor in `Design.groupings`.
        Z: (n, q) float64, the effects' columns per row (no group indicators).
        names: (q,) names of the effects.
    """

    term: RandomTerm
    grouping: int
    Z: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class NewDesign:
    """The design of a fitted model applied to new rows.

    Args:
        X: (n, p) float64; NaN in rows marked `missing`.
        Z: one (n, q) array per random term, empty if groups were not asked for.
        codes: one (n,) int64 array per grouping factor, -1 for a level that was not in the data
            of the fit or is missing; empty if groups were not asked for.
        offset: (n,) or None; NaN in rows marked `missing`.
        index: (n,) row labels.
        missing: (n,) bool, rows that lack a value needed for a prediction.
    """

    X: np.ndarray
    Z: tuple[np.ndarray, ...]
    codes: tuple[np.ndarray, ...]
    offset: np.ndarray | None
    index: pd.Index
    missing: np.ndarray


@dataclass(frozen=True, eq=False)
class _State:
    """What new data need: everything that was learnt from the data of the fit."""

    transforms: dict[str, Any] = field(default_factory=dict)
    encoders: dict[str, Any] = field(default_factory=dict)
    levels: dict[str, pd.Index] = field(default_factory=dict)
    contrasts: dict[str, Contrasts] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()  # data columns among the names in expressions
    parts: tuple[tuple[pd.Index, ...], ...] = ()  # per grouping: levels of each column
    cells: tuple[np.ndarray | None, ...] = ()  # per grouping: combinations present, sorted
    offset: str | bool | None = None  # column name; True for an array
    arrays: bool = False


@dataclass(frozen=True, eq=False)
class Design:
    """Matrices, names and groups of one model, rows with missing values left out.

    Args:
        spec: the model.
        response_name: name of the response.
        y: (n,) float64 response.
        X: (n, p) float64 fixed-effects design.
        x_names: (p,) names of its columns.
        blocks: one `RandomBlock` per random term, in the order of the formula.
        groupings: the grouping factors; terms with the same group share one.
        weights: (n,) positive prior weights, or None.
        offset: (n,) sum of all offsets, or None.
        index: (n,) labels of the rows used: pandas index of the data, else row numbers from 0.
        n_dropped: number of rows left out.
        dropped_by: number of missing values by column, or by term where a transform made them.
    """

    spec: ModelSpec
    response_name: str
    y: np.ndarray
    X: np.ndarray
    x_names: tuple[str, ...]
    blocks: tuple[RandomBlock, ...]
    groupings: tuple[Grouping, ...]
    weights: np.ndarray | None
    offset: np.ndarray | None
    index: pd.Index
    n_dropped: int
    dropped_by: dict[str, int]
    _state: _State = field(repr=False)

    def new_data(self, data: Any, *, need_groups: bool = True, offset: Any = None) -> NewDesign:
        """Apply the same formula, with all it learnt from the data, to new rows.

        Args:
            data: as in `build_design`; the response is not needed. For a design made by
                `design_from_arrays`, a mapping with `"X"`, and `"groups"`, `"Z"` where needed.
            need_groups: whether random-effects columns and group codes are wanted; if not, their
                columns may be absent.
            offset: (n,) array or column name; needed if the fit had an offset given as an array.

        Returns:
            The matrices, all rows kept: rows with missing values are NaN and marked.

        Raises:
            DataError: for an absent column, an unseen level of a factor in the design (an unseen
                group is code -1 instead), or a value that is infinite.

        Example:
            >>> data = {"y": [1.0, 2.0, 4.0, 3.0], "x": [1, 2, 3, 4], "g": ["a", "a", "b", "b"]}
            >>> design = build_design(parse_formula("y ~ x + (1 | g)"), data)
            >>> new = design.new_data({"x": [5, 6], "g": ["b", "c"]})
            >>> new.X.tolist(), new.codes[0].tolist()
            ([[1.0, 5.0], [1.0, 6.0]], [1, -1])
        """
        if self._state.arrays:
            return _new_arrays(self, data, need_groups, offset)
        return _new_data(self, data, need_groups, offset)


class _Frame:
    """Columns of any accepted data container, fetched one at a time."""

    def __init__(self, data: Any) -> None:
        self._kind = "mapping"
        self._index: pd.Index | None = None
        self._length: tuple[str, int] | None = None
        if isinstance(data, pd.DataFrame):
            self._kind, self._index = "pandas", data.index
            self.columns: list[Any] = list(data.columns)
        elif isinstance(data, Mapping):
            self.columns = list(data)
        else:
            data = self._foreign(data)
            self._kind = "narwhals"
            self.columns = list(data.columns)
        self._data = data
        self._names = set(self.columns)

    @staticmethod
    def _foreign(data: Any) -> Any:
        import narwhals.stable.v1 as nw

        frame = nw.from_native(data, pass_through=True)
        if isinstance(frame, nw.LazyFrame):
            raise TypeError("data is a lazy frame: pass data.collect()")
        if not isinstance(frame, nw.DataFrame):
            hint = ""
            if isinstance(data, np.ndarray):
                hint = "; for plain arrays use design_from_arrays()"
            raise TypeError(
                "data must be a pandas or polars DataFrame, a pyarrow Table or a dict of "
                f"columns, not {type(data).__name__}{hint}"
            )
        return frame

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def column(self, name: str) -> Any:
        """One column as a pandas Series or a one-dimensional NumPy array."""
        if self._kind == "pandas":
            values = self._data[name]
            if values.ndim != 1:
                raise DataError(f"data has {values.shape[1]} columns named {name!r}: rename them")
            return values
        if self._kind == "narwhals":
            return _from_narwhals(self._data.get_column(name))
        values = _one_dimensional(self._data[name], f"column {name!r}")
        if self._length is None:
            self._length = (name, len(values))
        elif len(values) != self._length[1]:
            other, n = self._length
            raise DataError(f"columns differ in length: {other!r} has {n}, {name!r} {len(values)}")
        return values

    def __len__(self) -> int:
        if self._kind != "mapping":
            return len(self._data)
        if self._length is None:
            return 0
        return self._length[1]

    @property
    def index(self) -> pd.Index:
        return pd.RangeIndex(len(self)) if self._index is None else self._index


def _one_dimensional(values: Any, what: str) -> Any:
    """Array-like -> Series or array; lists keep the types of their elements."""
    if isinstance(values, (pd.Series, np.ndarray)):
        array = values
    elif isinstance(values, (pd.Index, pd.api.extensions.ExtensionArray)):
        array = pd.Series(values)
    elif hasattr(values, "__array__"):
        array = np.asarray(values)
    elif isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise DataError(f"{what} is a single value, {values!r}: give one value per row")
    else:
        items = list(values)
        if any(isinstance(item, tuple) for item in items):
            array = np.empty(len(items), dtype=object)
            array[:] = items
        else:
            array = pd.Series(items) if items else np.empty(0)
    if array.ndim != 1:
        raise DataError(f"{what} must be one-dimensional, its shape is {array.shape}")
    return array


def _from_narwhals(column: Any) -> Any:
    import narwhals.stable.v1 as nw

    native = column.to_native()
    ordered_dictionary = getattr(getattr(native, "type", None), "ordered", False)
    if isinstance(column.dtype, nw.Enum) or ordered_dictionary:
        categories = column.cat.get_categories().to_list()
        text = column.cast(nw.String).to_list()
        return pd.Series(pd.Categorical(text, categories=categories, ordered=True))
    if column.dtype == nw.Categorical:
        column = column.cast(nw.String)
    return column.to_numpy()


def _all_finite(values: np.ndarray) -> bool:
    # The sum takes one pass and no memory; only an overflow makes the second look necessary.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())


def _as_float(raw: Any) -> np.ndarray | None:
    """Column -> float64, NaN for missing, no copy where possible; None if not numeric."""
    dtype = raw.dtype
    if isinstance(dtype, np.dtype):
        if dtype.kind in "fiu":
            return np.asarray(raw, dtype=np.float64)
        if dtype.kind != "O":
            return None
        inferred = pd.api.types.infer_dtype(raw, skipna=True)
        numeric = ("floating", "integer", "mixed-integer-float", "decimal", "empty")
        if inferred not in numeric:
            return None
        return pd.Series(raw).astype(object).where(pd.notna(raw), np.nan).to_numpy(np.float64)
    if pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype):
        try:
            return np.asarray(raw.to_numpy(dtype=np.float64, na_value=np.nan))
        except TypeError:
            return None
    return None


def _factorize(raw: Any) -> tuple[np.ndarray, pd.Index]:
    """Codes (-1 for missing) and levels; only the levels are sorted, never the rows."""
    if isinstance(raw, (pd.Series, pd.Categorical)) and isinstance(raw.dtype, pd.CategoricalDtype):
        codes = np.asarray(raw.cat.codes if isinstance(raw, pd.Series) else raw.codes, np.int64)
        return _drop_unused(codes, raw.dtype.categories)
    if isinstance(raw, np.ndarray) and raw.dtype.kind == "U":
        raw = raw.astype(object)
    codes, uniques = pd.factorize(raw)
    codes = codes.astype(np.int64, copy=False)
    levels = uniques if isinstance(uniques, pd.Index) else pd.Index(uniques, tupleize_cols=False)
    try:
        order = np.argsort(np.asarray(levels), kind="stable")
    except TypeError:  # mixed types: keep the order of appearance
        return codes, levels
    if (order[1:] > order[:-1]).all():
        return codes, levels
    rank = np.empty(len(order) + 1, dtype=np.int64)
    rank[order] = np.arange(len(order))
    rank[-1] = -1
    return rank[codes], levels.take(order)


def _drop_unused(codes: np.ndarray, levels: pd.Index) -> tuple[np.ndarray, pd.Index]:
    used = np.zeros(len(levels) + 1, dtype=bool)
    used[codes] = True
    used = used[:-1]
    if used.all():
        return codes, levels
    rank = np.full(len(levels) + 1, -1, dtype=np.int64)
    rank[:-1][used] = np.arange(int(used.sum()))
    return rank[codes], levels[used]


def _label(level: Any) -> str:
    """Text of a level: a whole number reads as such, also where a missing value made it a float."""
    if isinstance(level, (float, np.floating)) and float(level).is_integer():
        return str(int(level))
    return str(level)


class _Column:
    """One column used by the model, read once: as numbers, as codes, or as it is."""

    __slots__ = ("_codes", "_looked", "_values", "levels", "name", "raw", "rows")

    def __init__(self, name: str, raw: Any) -> None:
        self.name = name
        self.raw = raw
        self.rows: np.ndarray | None = None
        self._looked = False
        self._values: np.ndarray | None = None
        self._codes: np.ndarray | None = None
        self.levels: pd.Index | None = None

    def values(self) -> np.ndarray | None:
        if not self._looked:
            self._looked = True
            self._values = _as_float(self._current())
        return self._values

    def codes(self) -> tuple[np.ndarray, pd.Index]:
        if self._codes is None:
            self._codes, self.levels = _factorize(self._current())
        assert self.levels is not None
        return self._codes, self.levels

    def _current(self) -> Any:
        if self.rows is None:
            return self.raw
        return self.raw.iloc[self.rows] if isinstance(self.raw, pd.Series) else self.raw[self.rows]

    def series(self) -> pd.Series:
        """For use inside expressions."""
        raw = self._current()
        values = raw.array if isinstance(raw, pd.Series) else raw
        if raw.dtype == object and (numbers := self.values()) is not None:
            values = numbers
        return pd.Series(values, copy=False)

    def missing(self, as_group: bool) -> np.ndarray | None:
        """(n,) bool, or None if nothing is missing."""
        values = None if as_group else self.values()
        if values is not None:
            if _all_finite(values):
                return None
            mask = np.isnan(values)
        elif as_group or _is_label(self.raw):
            mask = self.codes()[0] < 0
        else:
            mask = np.asarray(pd.isna(self._current()))
        return mask if mask.any() else None

    def keep(self, rows: np.ndarray) -> None:
        self.rows = rows if self.rows is None else self.rows[rows]
        if self._values is not None:
            self._values = self._values[rows]
        if self._codes is not None:
            assert self.levels is not None
            self._codes, self.levels = _drop_unused(self._codes[rows], self.levels)


def _is_label(raw: Any) -> bool:
    """Whether a column that is not numeric can serve as categories."""
    dtype = raw.dtype
    if isinstance(dtype, np.dtype):
        return dtype.kind in "OUSb"
    return (
        isinstance(dtype, pd.CategoricalDtype)
        or pd.api.types.is_string_dtype(dtype)
        or pd.api.types.is_bool_dtype(dtype)
    )


def _names(values: Iterable[Any], limit: int = 20) -> str:
    items = [str(v) for v in values]
    shown = ", ".join(items[:limit])
    return f"{shown}, ... ({len(items)} in all)" if len(items) > limit else shown


def _absent(name: str, frame: _Frame, where: str) -> DataError:
    close = difflib.get_close_matches(name, [str(c) for c in frame.columns], n=1, cutoff=0.6)
    if not close:
        close = [str(c) for c in frame.columns if str(c).lower() == name.lower()]
    dotted = [c for c in map(str, frame.columns) if c.startswith(name + ".")]
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if dotted:
        hint = f" Inside a call, write the column {dotted[0]!r} in backticks: `{dotted[0]}`."
    elif name in ("T", "F"):
        hint = f" For the logical value write {'True' if name == 'T' else 'False'}."
    return DataError(
        f"no column {name!r} in the data ({where}).{hint} Columns: {_names(frame.columns)}."
    )


class _Coded(NamedTuple):
    """A categorical factor, coded."""

    codes: np.ndarray
    levels: pd.Index
    contrasts: Contrasts | None


class _Columns(NamedTuple):
    """A numeric term with several columns: `poly`, `bs`, a two-dimensional array."""

    fields: dict[Any, np.ndarray]
    format: str
    spans_intercept: bool
    drop_field: Any


class _Encoded(NamedTuple):
    """A value that brings its own encoder, such as formulaic's `hashed`."""

    values: Any
    encoder: Callable[..., Any]
    spans_intercept: bool


_Value = np.ndarray | _Coded | _Columns | _Encoded


def _as_contrasts(contrasts: Any, what: str) -> Contrasts | None:
    """Anything a user may write for contrasts -> formulaic object."""
    if contrasts is None or isinstance(contrasts, Contrasts):
        return contrasts
    if isinstance(contrasts, str):
        name = contrasts.removeprefix("contr.")
        if name not in _CONTRASTS:
            raise DataError(
                f"unknown contrasts {contrasts!r} for {what}: choose one of "
                f"{', '.join(map(repr, _CONTRASTS))}, or give a formulaic contrasts object"
            )
        return _CONTRASTS[name]()
    if contrasts is builtins.sum:  # `C(f, sum)`, as R users write it
        return SumContrasts()
    if inspect.isclass(contrasts) and issubclass(contrasts, Contrasts):
        return contrasts()
    try:
        return CustomContrasts(contrasts)
    except Exception as error:
        raise DataError(f"cannot use {contrasts!r} as contrasts for {what}: {error}") from None


def _categorical(data: Any, contrasts: Any = None, *, levels: Any = None) -> _Coded:
    """`C(...)` in a formula: take values as categories.

    Args:
        data: (n,) values.
        contrasts: name ("treatment", "sum", "helmert", "poly", "SAS", "diff"), formulaic object
            such as `contr.sum`, or a matrix with a row per level.
        levels: the levels in order; every value must be among them.
    """
    if isinstance(data, _Coded):
        codes, labels, inner = data
        contrasts = inner if contrasts is None else contrasts
    else:
        if isinstance(data, FactorValues):
            data = data.__wrapped__
        codes, labels = _factorize(data if isinstance(data, pd.Series) else np.asarray(data))
    if levels is not None:
        wanted = pd.Index(list(levels))
        position = wanted.get_indexer(labels)
        if (position < 0).any():
            raise DataError(f"C(..., levels=...) lacks {_names(map(repr, labels[position < 0]))}")
        codes, labels = _drop_unused(np.append(position, -1)[codes], wanted)
    return _Coded(codes, labels, _as_contrasts(contrasts, "C()"))


def _log(x: Any, base: float | None = None) -> Any:
    return np.log(x) if base is None else np.log(x) / np.log(base)


def _exp10(x: Any) -> Any:
    return np.power(10.0, x)


_FUNCTIONS: dict[str, Any] = {
    **TRANSFORMS,
    **{
        name: getattr(np, name)
        for name in ("sqrt", "abs", "sin", "cos", "tan", "log1p", "expm1", "floor", "tanh")
    },
    "ceiling": np.ceil,
    "C": _categorical,
    "log": _log,
    "exp10": _exp10,  # formulaic's own is x**10
}
# It would reach across groups and over rows left out.
del _FUNCTIONS["lag"]


def _evaluate(
    expression: str,
    columns: Mapping[str, _Column],
    context: Mapping[str, Any],
    state: dict[str, Any],
    n: int,
) -> _Value:
    """Value of a Python expression over the current rows."""
    used = expression_names(expression)[0]
    data = {name: columns[name].series() for name in used if name in columns}
    scope = LayeredMapping(
        LayeredMapping(data, name="data"),
        LayeredMapping(context, name="context"),
        LayeredMapping(_FUNCTIONS, name="transforms"),
    )
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            # Not-a-number results are reported with their row by the caller.
            warnings.simplefilter("ignore", RuntimeWarning)
            value = stateful_eval(expression, scope, {}, state, FormulaicSpec([], output="numpy"))
    except DataError as error:
        raise DataError(f"in the term `{expression}`: {error}") from None
    except Exception as error:
        raise DataError(
            f"cannot evaluate the term `{expression}`: {type(error).__name__}: {error}"
        ) from error
    return _standard(expression, value, n)


def _standard(expression: str, value: Any, n: int) -> _Value:
    """What an expression gave -> numbers, codes or several columns."""
    if isinstance(value, _Coded):
        return value
    fmt, spans, drop_field, names = "{name}[{field}]", False, None, None
    kind = Factor.Kind.UNKNOWN
    if isinstance(value, FactorValues):
        meta = value.__formulaic_metadata__
        value = value.__wrapped__
        if meta.encoder is not None:
            return _Encoded(value, meta.encoder, meta.spans_intercept)
        fmt, spans, drop_field, kind = meta.format, meta.spans_intercept, meta.drop_field, meta.kind
        names = meta.column_names
    if isinstance(value, pd.DataFrame):
        value = {name: value[name] for name in value.columns}
    if isinstance(value, dict):
        fields = {k: v for k, v in value.items() if not (isinstance(k, str) and k[:2] == "__")}
    elif np.ndim(value) == 2:
        array = np.asarray(value)
        fields = {k: array[:, i] for i, k in enumerate(names or range(array.shape[1]))}
    else:
        if np.ndim(value) != 1:
            raise DataError(f"the term `{expression}` gives one value, not one per row")
        if len(value) != n:
            raise DataError(f"the term `{expression}` gives {len(value)} values for {n} rows")
        if not isinstance(value, (pd.Series, np.ndarray)):
            value = pd.Series(value)
        numbers = None if kind is Factor.Kind.CATEGORICAL else _as_float(value)
        if numbers is not None:
            return numbers
        if not (_is_label(value) or kind is Factor.Kind.CATEGORICAL):
            raise DataError(f"the term `{expression}` gives {value.dtype}, not numbers")
        return _categorical(value)
    numeric = {k: np.asarray(v, dtype=np.float64) for k, v in fields.items()}
    for array in numeric.values():
        if array.shape != (n,):
            raise DataError(f"the term `{expression}` gives {len(array)} values for {n} rows")
    return _Columns(numeric, fmt, spans, drop_field)


def _spans_intercept(value: _Value) -> bool:
    return not isinstance(value, np.ndarray) and (
        isinstance(value, _Coded) or value.spans_intercept
    )


def _numbers(value: _Value) -> Iterable[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, _Columns):
        yield from value.fields.values()


class _Expression(NamedTuple):
    text: str
    is_name: bool
    values: tuple[str, ...]
    functions: tuple[str, ...]
    where: str


class _Plan(NamedTuple):
    response: _Expression
    fixed_expressions: tuple[_Expression, ...]
    random_expressions: tuple[_Expression, ...]  # those not among the fixed ones
    offsets: tuple[_Expression, ...]
    groups: tuple[tuple[str, tuple[str, ...]], ...]  # (name, columns)
    block_groups: tuple[int, ...]


def _expression(factor: Factor, where: str) -> _Expression:
    if factor.eval_method is Factor.EvalMethod.LOOKUP:
        return _Expression(factor.expr, True, (factor.expr,), (), where)
    return _Expression(factor.expr, False, *expression_names(factor.expr), where)


def _one_expression(text: str, where: str) -> _Expression:
    terms = parse_terms(f"0 + {text}")
    if len(terms) == 1 and len(terms[0].factors) == 1:
        return _expression(terms[0].factors[0], where)
    raise DataError(f"the {where} must be one variable or one call, not `{text}`: use I({text})")


@lru_cache(maxsize=1024)
def _plan(spec: ModelSpec) -> _Plan:
    seen: set[str] = set()

    def collect(text: str, where: str) -> list[_Expression]:
        found = []
        for factor in itertools.chain.from_iterable(term.factors for term in parse_terms(text)):
            if factor.eval_method is not Factor.EvalMethod.LITERAL and factor.expr not in seen:
                seen.add(factor.expr)
                found.append(_expression(factor, where))
        return found

    fixed_expressions = collect(spec.fixed, "fixed effects")
    random_expressions = []
    for term in spec.random:
        random_expressions += collect(term.design, f"random term {term}")
    groups: dict[tuple[str, ...], str] = {}
    for term in spec.random:
        groups.setdefault(term.group_names, ":".join(term.group_names))
    order = list(groups)
    offsets = []
    for text in map(from_r, spec.offsets):
        # An offset is arithmetic, not a sum of terms, so it is one Python expression.
        is_name = text.isidentifier() or (text[0] == "`" == text[-1] and text.count("`") == 2)
        name = text.strip("`")
        names = ((name,), ()) if is_name else expression_names(text)
        offsets.append(_Expression(name if is_name else text, is_name, *names, "offset"))
    return _Plan(
        _one_expression(spec.response, "response"),
        tuple(fixed_expressions),
        tuple(random_expressions),
        tuple(offsets),
        tuple((groups[columns], columns) for columns in order),
        tuple(order.index(term.group_names) for term in spec.random),
    )


@lru_cache(maxsize=4096)
def _coding(
    text: str, spans: frozenset[str]
) -> tuple[tuple[float, tuple[tuple[str, bool], ...]], ...]:
    """Formulaic's rank rule: the products to build, as (scale, ((expression, reduced), ...)).

    Args:
        text: one part of the formula.
        spans: expressions whose columns span the intercept (categorical factors).
    """
    terms = parse_terms(text)
    rule = PandasMaterializer.__new__(PandasMaterializer)
    rule.factor_cache = {}
    for factor in itertools.chain.from_iterable(term.factors for term in terms):
        if factor.eval_method is Factor.EvalMethod.LITERAL:
            values = FactorValues(float(factor.expr), kind=Factor.Kind.CONSTANT)
        elif factor.expr in spans:
            values = FactorValues(0, kind=Factor.Kind.CATEGORICAL, spans_intercept=True)
        else:
            values = FactorValues(0, kind=Factor.Kind.NUMERICAL)
        rule.factor_cache[factor.expr] = EvaluatedFactor(factor=factor, values=values)
    return tuple(
        (float(scoped.scale), tuple((f.factor.expr, f.reduced) for f in scoped.factors))
        for _, scoped_terms in rule._get_scoped_terms(terms)
        for scoped in scoped_terms
    )


def _encode(
    expression: str,
    value: _Value,
    reduced: bool,
    contrasts: Contrasts | None,
    encoders: dict[str, Any],
) -> list[tuple[str, np.ndarray]]:
    """Columns of one factor."""
    if isinstance(value, np.ndarray):
        return [(expression, value)]
    if isinstance(value, _Columns):
        drop = value.drop_field if reduced and value.spans_intercept else None
        return [
            (value.format.format(name=expression, field=k), v)
            for k, v in value.fields.items()
            if drop is None or k != drop
        ]
    if isinstance(value, _Encoded):
        state = encoders.setdefault(expression, {})
        encoded = value.encoder(
            value.values,
            reduced_rank=reduced,
            drop_rows=[],
            encoder_state=state,
            model_spec=FormulaicSpec([], output="numpy"),
        )
        meta = encoded.__formulaic_metadata__
        matrix = np.asarray(encoded.__wrapped__, dtype=np.float64)
        return [
            (meta.format.format(name=expression, field=k), matrix[:, i])
            for i, k in enumerate(meta.column_names)
        ]
    scheme = value.contrasts or contrasts or TreatmentContrasts()
    levels = list(value.levels)
    if reduced and len(levels) == 1:
        return []
    if isinstance(scheme, CustomContrasts) and len(scheme.contrasts) != len(levels):
        raise DataError(
            f"the contrasts for {expression!r} have {len(scheme.contrasts)} rows, but the factor "
            f"has {len(levels)} levels: {_names(levels)}"
        )
    try:
        matrix = scheme.get_coding_matrix(levels, reduced_rank=reduced).to_numpy(np.float64)
        fields = scheme.get_coding_column_names(levels, reduced_rank=reduced)
    except Exception as error:
        raise DataError(
            f"cannot use {type(scheme).__name__} for {expression!r} with levels "
            f"{_names(levels)}: {error}"
        ) from None
    fmt = scheme.get_factor_format(levels, reduced_rank=reduced)
    return [
        (fmt.format(name=expression, field=_label(f)), column[value.codes])
        for f, column in zip(fields, np.ascontiguousarray(matrix.T), strict=True)
    ]


def _matrix(
    text: str,
    values: Mapping[str, _Value],
    n: int,
    contrasts: Mapping[str, Contrasts],
    encoders: dict[str, Any],
) -> tuple[np.ndarray, tuple[str, ...]]:
    """One part of the formula -> (n, columns) float64 in column order, and the columns' names."""
    spans = frozenset(e for e, value in values.items() if _spans_intercept(value))
    products: list[tuple[str, float, list[np.ndarray]]] = []
    for scale, factors in _coding(text, spans):
        if not factors:
            products.append(("Intercept", scale, []))
            continue
        encoded = [
            _encode(e, values[e], reduced, contrasts.get(e), encoders) for e, reduced in factors
        ]
        # As in R, the first factor of an interaction varies fastest.
        for combination in itertools.product(*reversed(encoded)):
            pairs = combination[::-1]
            products.append((":".join(p[0] for p in pairs), scale, [p[1] for p in pairs]))
    matrix = np.empty((n, len(products)), order="F")
    with np.errstate(all="ignore"):
        for j, (_, scale, columns) in enumerate(products):
            out = matrix[:, j]
            if not columns:
                out[:] = scale
                continue
            if len(columns) == 1:
                out[:] = columns[0]
            else:
                np.multiply(columns[0], columns[1], out=out)
                for column in columns[2:]:
                    out *= column
            if scale != 1:
                out *= scale
    return matrix, tuple(name for name, _, _ in products)


def _row(index: pd.Index, position: Any) -> str:
    label = index[int(position)]
    return f"row {label!r}" if isinstance(label, str) else f"row {label}"


def _check_finite(name: str, values: np.ndarray, index: pd.Index, source: str) -> None:
    """Raise for an infinite value."""
    if _all_finite(values):
        return
    infinite = np.flatnonzero(np.isinf(values))
    if len(infinite):
        raise DataError(
            f"{source} {name!r} is infinite in {len(infinite)} "
            f"row{'s' if len(infinite) > 1 else ''}, first in {_row(index, infinite[0])}"
        )


def _check_matrix(matrix: np.ndarray, names: Sequence[str], index: pd.Index) -> None:
    if not _all_finite(matrix):
        for j, name in enumerate(names):
            _check_finite(name, matrix[:, j], index, "the column")


def _missing_mask(n: int, masks: Iterable[np.ndarray]) -> np.ndarray:
    total = np.zeros(n, dtype=bool)
    for mask in masks:
        total |= mask
    return total


def _resolve(
    expressions: Iterable[_Expression], frame: _Frame, context: Mapping[str, Any]
) -> dict[str, None]:
    """Data columns that the expressions need, or an error that names what is unknown."""
    columns: dict[str, None] = {}
    for expression in expressions:
        where = expression.where
        if not expression.is_name:
            where = f"term `{expression.text}`, {where}"
        for name in expression.values:
            if name in frame:
                columns[name] = None
            elif expression.is_name or not (
                name in context or name in _FUNCTIONS or hasattr(builtins, name)
            ):
                hint = R_HINTS.get(name)
                raise (
                    DataError(f"unknown name {name!r} ({where}): {hint}")
                    if hint and not expression.is_name
                    else _absent(name, frame, where)
                )
        for name in expression.functions:
            if name not in context and name not in _FUNCTIONS and not hasattr(builtins, name):
                hint = R_HINTS.get(name)
                if hint is None:
                    close = difflib.get_close_matches(name, [*_FUNCTIONS, *context], n=1)
                    hint = f"did you mean {close[0]}()? " if close else ""
                    hint += "pass functions of your own in context={'name': function}"
                raise DataError(f"unknown function {name}() ({where}): {hint}")
    return columns


def _group_codes(
    columns: Sequence[_Column],
) -> tuple[np.ndarray, pd.Index, tuple[pd.Index, ...], np.ndarray | None]:
    """Group codes of the current rows; see `_State.parts` and `_State.cells`."""
    coded = [column.codes() for column in columns]
    parts = tuple(levels for _, levels in coded)
    if len(coded) == 1:
        return coded[0][0], parts[0], parts, None
    cell = coded[0][0]
    for codes, levels in coded[1:]:
        cell = cell * len(levels) + codes
    codes, cells = pd.factorize(cell, sort=True)
    labels: list[list[str]] = []
    rest = cells
    for levels in reversed(parts):
        rest, position = np.divmod(rest, len(levels))
        text = [_label(level) for level in levels]
        labels.insert(0, [text[i] for i in position])
    names = pd.Index([":".join(label) for label in zip(*labels, strict=True)], dtype=object)
    return codes.astype(np.int64, copy=False), names, parts, cells


def _side_column(values: Any, what: str, frame: _Frame, n: int | None) -> np.ndarray:
    """`weights=` or `offset=` -> (n,) float64 with NaN for missing."""
    if isinstance(values, str):
        if values not in frame:
            raise _absent(values, frame, f"{what}={values!r}")
        raw = frame.column(values)
    else:
        raw = _one_dimensional(values, what)
        same_length = isinstance(values, pd.Series) and len(values) == n
        if same_length and not values.index.equals(frame.index):
            raise DataError(
                f"{what} is a Series whose index differs from that of the data: reorder it, "
                f"or pass {what}.to_numpy() if its rows are in the order of the data"
            )
    numbers = _as_float(raw)
    if numbers is None:
        raise DataError(f"{what} must be numeric, not {raw.dtype}")
    if n is not None and len(numbers) != n:
        raise DataError(f"{what} has {len(numbers)} values for {n} rows of data")
    return numbers


def _check_weights(weights: np.ndarray, index: pd.Index) -> None:
    if (weights > 0).all():
        return
    at = int(np.argmin(weights > 0))
    if weights[at] == 0:
        raise DataError(
            f"weights must be positive, but the weight of {_row(index, at)} is 0: remove rows of "
            "weight zero from the data, they say nothing about the model"
        )
    raise DataError(
        f"weights must be positive, but the weight of {_row(index, at)} is {weights[at]:g}"
    )


def _check_missing_argument(missing: str) -> None:
    if missing not in ("drop", "raise"):
        raise ValueError(f"missing={missing!r}: choose 'drop' or 'raise'")


def _raise_missing(counts: Mapping[str, int], rows: int) -> None:
    listed = ", ".join(f"{name!r} ({count})" for name, count in counts.items())
    raise DataError(
        f"missing values in {listed}; {rows} row{'s' if rows > 1 else ''} affected. Fill or "
        "remove them, or use missing='drop'"
    )


def _no_rows(counts: Mapping[str, int], n: int) -> DataError:
    listed = ", ".join(f"{name!r} ({count})" for name, count in counts.items())
    return DataError(f"no row is left: every one of the {n} has a missing value, in {listed}")


def _check_response(name: str, y: np.ndarray) -> None:
    if y.min() == y.max():
        raise DataError(
            f"response {name!r} is constant (every value is {y[0]:g}): there is nothing to explain"
        )


def _check_one_level(name: str, levels: pd.Index) -> None:
    if len(levels) < 2:
        raise DataError(
            f"the grouping factor {name!r} has one level, {_label(levels[0])!r}: the variance of "
            "random effects cannot be estimated from one group; leave its random terms out"
        )


def _check_unique(names: Sequence[str], what: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{what} has several columns named {_names(map(repr, repeated))}")


def _numeric_column(expression: _Expression, value: _Value, what: str) -> np.ndarray:
    """A response or offset: one numeric column."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, _Coded):
        if pd.api.types.is_bool_dtype(value.levels.dtype):
            raise DataError(
                f"{what} {expression.text!r} is True/False, a linear mixed model needs a numeric "
                "one: convert it with .astype(float) if 0 and 1 are meant as numbers"
            )
        raise DataError(
            f"{what} {expression.text!r} is not numeric (values such as "
            f"{_names(map(repr, value.levels[:3]))}): convert it with pandas.to_numeric"
        )
    raise DataError(f"{what} {expression.text!r} must be one numeric column")


def _dtype_error(name: str, raw: Any, where: str) -> DataError:
    hint = ""
    if getattr(raw.dtype, "kind", "") in "mM":
        hint = ": turn dates into numbers, for instance days since the first"
    return DataError(f"column {name!r} holds {raw.dtype} ({where}){hint}")


def _evaluate_all(
    expressions: Iterable[_Expression],
    columns: Mapping[str, _Column],
    context: Mapping[str, Any],
    transforms: dict[str, Any],
    n: int,
) -> dict[str, _Value]:
    values: dict[str, _Value] = {}
    for expression in expressions:
        if not expression.is_name:
            values[expression.text] = _evaluate(expression.text, columns, context, transforms, n)
            continue
        column = columns[expression.text]
        numbers = column.values()
        if numbers is not None:
            values[expression.text] = numbers
        elif _is_label(column.raw):
            values[expression.text] = _Coded(*column.codes(), None)
        else:
            raise _dtype_error(expression.text, column.raw, expression.where)
    return values


def _created_missing(
    expressions: Iterable[_Expression], values: Mapping[str, _Value], index: pd.Index
) -> dict[str, np.ndarray]:
    """Rows in which a transform of complete values gave NaN; infinite results are errors."""
    created = {}
    for expression in expressions:
        if expression.is_name:
            continue
        value = values[expression.text]
        bad: np.ndarray | None = None
        if isinstance(value, _Coded):
            bad = value.codes < 0
        else:
            for numbers in _numbers(value):
                _check_finite(expression.text, numbers, index, "the term")
                if not _all_finite(numbers):
                    bad = np.isnan(numbers) if bad is None else bad | np.isnan(numbers)
        if bad is not None and bad.any():
            created[expression.text] = bad
    return created


def _factor_contrasts(
    contrasts: Mapping[str, Any] | None, plan: _Plan, values: Mapping[str, _Value]
) -> dict[str, Contrasts]:
    """`contrasts=` by column name -> by expression."""
    if not contrasts:
        return {}
    if not isinstance(contrasts, Mapping):
        raise TypeError("contrasts must be a dict such as {'recipe': 'sum'}")
    factors: dict[str, list[str]] = {}
    for expression in (*plan.fixed_expressions, *plan.random_expressions):
        if isinstance(values[expression.text], _Coded):
            for name in {expression.text, *expression.values}:
                if name == expression.text or name not in _FUNCTIONS:
                    factors.setdefault(name, []).append(expression.text)
    found: dict[str, Contrasts] = {}
    for name, scheme in contrasts.items():
        if name not in factors:
            listed = _names(map(repr, factors)) if factors else "none"
            raise DataError(
                f"contrasts for {name!r}: no such factor in the model; its factors: {listed}"
            )
        coded = _as_contrasts(scheme, repr(name))
        if coded is not None:
            found.update({expression: coded for expression in factors[name]})
    return found


def _learn(
    expressions: Sequence[_Expression],
    columns: Mapping[str, _Column],
    side: dict[str, np.ndarray],
    index: pd.Index,
    context: Mapping[str, Any],
    missing: str,
    dropped_by: dict[str, int],
) -> tuple[dict[str, _Value], dict[str, Any], pd.Index, list[str]]:
    """Evaluate all expressions on complete rows, leaving out rows where a transform gives NaN.

    Returns:
        Values, state of the transforms, labels of the rows that stay, and a warning per term that
        lost rows. `columns`, `side` and `dropped_by` are updated.
    """
    reports: list[str] = []
    for attempt in range(2):
        # Levels, means and knots are learnt from the rows that stay, so a transform that drops
        # more of them starts the evaluation again.
        transforms: dict[str, Any] = {}
        values = _evaluate_all(expressions, columns, context, transforms, len(index))
        created = _created_missing(expressions, values, index)
        if not created:
            return values, transforms, index, reports
        counts = {name: int(mask.sum()) for name, mask in created.items()}
        bad = _missing_mask(len(index), created.values())
        if missing == "raise":
            _raise_missing(counts, int(bad.sum()))
        if bad.all() or attempt:
            rows_affected = "any row" if bad.all() else f"{_row(index, np.argmax(bad))} again"
            reason = (
                "its variables are: check for the logarithm or root of a negative number"
                if bad.all()
                else "rows were left out for it: its values depend on other rows, so make a column"
            )
            raise DataError(
                f"the term `{next(iter(created))}` is not a number in {rows_affected}, though "
                f"{reason}"
            )
        for name, count in counts.items():
            first = _row(index, np.argmax(created[name]))
            reports.append(
                f"`{name}` is not a number in {count} row{'s' if count > 1 else ''} (first: "
                f"{first}), which {'were' if count > 1 else 'was'} dropped"
            )
            dropped_by[name] = dropped_by.get(name, 0) + count
        index = _keep(np.flatnonzero(~bad), columns, side, index)

    raise AssertionError("unreachable: the second attempt returns or raises")


def build_design(
    spec: ModelSpec | str,
    data: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, Any] | None = None,
    missing: str = "drop",
    context: Mapping[str, Any] | None = None,
) -> Design:
    """Evaluate a model specification on data.

    Columns of strings, categories and logical values are factors, coded by treatment contrasts
    against their first level. Levels are in sorted order, or in that of a pandas categorical or
    polars Enum; levels that do not occur are left out.

    Args:
        spec: the model, or a formula.
        data: n rows: pandas or polars DataFrame, pyarrow Table, or dict of columns. Only columns
            that the model uses are converted.
        weights: (n,) positive prior weights, or the name of their column: the residual variance
            of row i is `scale / weights[i]`.
        offset: (n,) known part of the linear predictor, or the name of its column; adds to any
            `offset()` of the formula.
        contrasts: per factor `"treatment"`, `"sum"`, `"helmert"`, `"poly"`, `"SAS"`, `"diff"`, a
            formulaic contrasts object or a matrix with a row per level. They apply to the fixed
            effects, as in lme4; inside a random term write `C(f, contr.sum)`.
        missing: `"drop"` leaves out rows with a missing value in any variable used, `"raise"`
            makes them an error. Rows in which a transform gives NaN (`np.log` of a negative
            number) count as missing and are reported by a warning.
        context: names that formulas may use besides the columns, for instance functions of your
            own. `np`, formulaic's transforms and common functions are always there; variables of
            the calling code are not. A design with functions in it pickles if they do.

    Returns:
        The design.

    Raises:
        DataError: for data that do not fit the model (unknown names, infinite values, a response
            that is not numeric or constant, one group only, ...).
        TypeError: for a data container of another kind.

    Example:
        >>> data = {"y": [1.0, 2.0, 4.0, 3.0], "f": list("baba"), "g": [7, 7, 8, 8]}
        >>> design = build_design(parse_formula("y ~ f + (1 | g)"), data)
        >>> design.x_names, design.X.tolist()
        (('Intercept', 'f[T.b]'), [[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
        >>> design.groupings[0].codes.tolist(), design.groupings[0].levels.tolist()
        ([0, 0, 1, 1], [7, 8])
    """
    if isinstance(spec, str):
        spec = parse_formula(spec)
    if not isinstance(spec, ModelSpec):
        raise TypeError(f"spec must be a ModelSpec or a formula, not {type(spec).__name__}")
    _check_missing_argument(missing)
    plan = _plan(spec)
    context = {} if context is None else dict(context)
    frame = _Frame(data)
    expressions = (
        plan.response,
        *plan.fixed_expressions,
        *plan.random_expressions,
        *plan.offsets,
    )
    used = _resolve(expressions, frame, context)
    group_columns = dict.fromkeys(name for _, names in plan.groups for name in names)
    for name in group_columns:
        if name not in frame:
            raise _absent(name, frame, "grouping factor")
    columns = {name: _Column(name, frame.column(name)) for name in {**used, **group_columns}}
    n = len(frame)
    if n == 0:
        raise DataError("the data have no rows")
    index = frame.index
    side: dict[str, np.ndarray] = {}
    if weights is not None:
        side["weights"] = _side_column(weights, "weights", frame, n)
    if offset is not None:
        side["offset"] = _side_column(offset, "offset", frame, n)

    masks = {}
    for name, column in columns.items():
        mask = column.missing(as_group=name not in used)
        if name in used and (numbers := column.values()) is not None:
            _check_finite(name, numbers, index, "column")
        if mask is not None:
            masks[name] = mask
    for name, numbers in side.items():
        label = {"weights": weights, "offset": offset}[name]
        label = label if isinstance(label, str) else name
        _check_finite(label, numbers, index, "column" if label != name else "the argument")
        if not _all_finite(numbers) and label not in masks:
            masks[label] = np.isnan(numbers)

    dropped_by = {name: int(mask.sum()) for name, mask in masks.items()}
    if masks:
        bad = _missing_mask(n, masks.values())
        if missing == "raise":
            _raise_missing(dropped_by, int(bad.sum()))
        if bad.all():
            raise _no_rows(dropped_by, n)
        index = _keep(np.flatnonzero(~bad), columns, side, index)

    values, transforms, index, reports = _learn(
        expressions, columns, side, index, context, missing, dropped_by
    )
    for report in reports:
        warnings.warn(report, stacklevel=2)
    rows = len(index)
    y = _numeric_column(plan.response, values[plan.response.text], "the response")
    _check_response(spec.response, y)
    if "weights" in side:
        _check_weights(side["weights"], index)
    by_expression = _factor_contrasts(contrasts, plan, values)
    encoders: dict[str, Any] = {}
    X, x_names = _matrix(spec.fixed, values, rows, by_expression, encoders)
    _check_unique(x_names, "the fixed-effects design")
    _check_matrix(X, x_names, index)

    groupings, parts, cells = [], [], []
    for name, names in plan.groups:
        codes, levels, part, cell = _group_codes([columns[c] for c in names])
        _check_one_level(name, levels)
        groupings.append(Grouping(name, codes, levels))
        parts.append(part)
        cells.append(cell)

    blocks = []
    for term, grouping in zip(spec.random, plan.block_groups, strict=True):
        Z, z_names = _matrix(term.design, values, rows, {}, encoders)
        if not z_names:
            raise DataError(f"the random term {term} has no column: its design is empty")
        _check_unique(z_names, f"the random term {term}")
        _check_matrix(Z, z_names, index)
        blocks.append(RandomBlock(term, grouping, Z, z_names))

    state = _State(
        transforms=transforms,
        encoders=encoders,
        levels={e: v.levels for e, v in values.items() if isinstance(v, _Coded)},
        contrasts=by_expression,
        context=_used_context(expressions, context, used),
        columns=tuple(used),
        parts=tuple(parts),
        cells=tuple(cells),
        offset=offset if isinstance(offset, str) else (True if offset is not None else None),
    )
    return Design(
        spec=spec,
        response_name=spec.response,
        # A copy, because a plain column would otherwise stay a view of the user's data.
        y=np.array(y),
        X=X,
        x_names=x_names,
        blocks=tuple(blocks),
        groupings=tuple(groupings),
        weights=np.array(side["weights"]) if "weights" in side else None,
        offset=_total_offset(plan, values, side.get("offset"), index),
        index=index,
        n_dropped=n - rows,
        dropped_by=dropped_by,
        _state=state,
    )


def _keep(
    rows: np.ndarray,
    columns: Mapping[str, _Column],
    side: dict[str, np.ndarray],
    index: pd.Index,
) -> pd.Index:
    """Restrict everything to some rows, in place; returns the shorter index."""
    for column in columns.values():
        column.keep(rows)
    for name in side:
        side[name] = side[name][rows]
    return index.take(rows)


def _used_context(
    expressions: Iterable[_Expression], context: Mapping[str, Any], columns: Iterable[str]
) -> dict[str, Any]:
    names = {name for e in expressions for name in (*e.values, *e.functions)} - set(columns)
    return {name: context[name] for name in sorted(names) if name in context}


def _total_offset(
    plan: _Plan, values: Mapping[str, _Value], argument: np.ndarray | None, index: pd.Index
) -> np.ndarray | None:
    parts = [_numeric_column(e, values[e.text], "the offset") for e in plan.offsets]
    if argument is not None:
        parts.append(argument)
    if not parts:
        return None
    with np.errstate(all="ignore"):
        total: np.ndarray = np.sum(parts, axis=0)
    _check_finite("offset", total, index, "the sum of")
    return total


def _recode(name: str, value: _Coded, known: pd.Index) -> _Coded:
    position = known.get_indexer(value.levels)
    unseen = value.levels[position < 0]
    if len(unseen):
        raise DataError(
            f"{name!r} has the level{'s' if len(unseen) > 1 else ''} {_names(map(repr, unseen))} "
            "in the new data, which the model was not fitted to; known levels: "
            f"{_names(map(repr, known))}"
        )
    return _Coded(np.append(position, -1)[value.codes], known, value.contrasts)


def _new_codes(
    columns: Sequence[_Column], parts: tuple[pd.Index, ...], cells: np.ndarray | None
) -> np.ndarray:
    """Group codes of new rows in terms of the levels of the fit, -1 where there is none."""
    total: np.ndarray | None = None
    for column, known in zip(columns, parts, strict=True):
        codes, levels = column.codes()
        found = known.get_indexer(levels)
        if len(levels) and (found < 0).all():
            texts = {_label(level) for level in known}
            alike = [level for level in levels if _label(level) in texts]
            if alike:
                raise DataError(
                    f"the labels of {column.name!r} are of another type in the new data "
                    f"({alike[0]!r}) than in the data of the fit ({known[0]!r}): convert them"
                )
        position = np.append(found, -1)[codes]
        if total is None:
            total = position
        else:
            total = np.where((total < 0) | (position < 0), -1, total * len(known) + position)
    assert total is not None
    if cells is not None:
        at = np.minimum(np.searchsorted(cells, total), len(cells) - 1)
        total = np.where(cells[at] == total, at, -1)
    return total.astype(np.int64, copy=False)


def _new_offset_needed(state: _State, offset: Any) -> Any:
    if offset is None and state.offset is True:
        raise DataError("the model was fitted with an offset: pass offset= for the new rows")
    return state.offset if offset is None else offset


def _new_data(design: Design, data: Any, need_groups: bool, offset: Any) -> NewDesign:
    spec, state = design.spec, design._state
    plan = _plan(spec)
    frame = _Frame(data)
    expressions = (*plan.fixed_expressions, *plan.offsets)
    if need_groups:
        expressions += plan.random_expressions
    trained = set(state.columns)
    for expression in expressions:
        for name in expression.values:
            if name in trained and name not in frame:
                raise _absent(name, frame, expression.where)
    used = {name: None for e in expressions for name in e.values if name in trained}
    groups = plan.groups if need_groups else ()
    group_columns = dict.fromkeys(name for _, names in groups for name in names)
    for name in group_columns:
        if name not in frame:
            raise _absent(name, frame, "grouping factor")
    columns = {name: _Column(name, frame.column(name)) for name in {**used, **group_columns}}
    argument = _new_offset_needed(state, offset)
    side = {}
    if argument is not None:
        n = len(frame) if columns else None
        side["offset"] = _side_column(argument, "offset", frame, n)
    n = len(frame) if len(frame) or not side else len(side["offset"])
    index = frame.index if len(frame) else pd.RangeIndex(n)

    bad = np.zeros(n, dtype=bool)
    for name, column in columns.items():
        mask = column.missing(as_group=name not in used)
        if name in used and (numbers := column.values()) is not None:
            _check_finite(name, numbers, index, "column")
        if mask is not None:
            bad |= mask
    for numbers in side.values():
        _check_finite("offset", numbers, index, "the argument")
        bad |= np.isnan(numbers)
    codes = tuple(
        _new_codes([columns[c] for c in names], state.parts[i], state.cells[i])
        for i, (_, names) in enumerate(groups)
    )

    rows = np.flatnonzero(~bad)
    kept = _keep(rows, columns, side, index) if len(rows) < n else index
    p = len(design.x_names)
    X = np.full((n, p), np.nan)
    Z = tuple(np.full((n, len(b.names)), np.nan) for b in design.blocks) if need_groups else ()
    total = np.full(n, np.nan) if plan.offsets or side else None
    if len(rows):
        # The state is read only, but the transforms are handed the very dictionaries.
        transforms, encoders = copy.deepcopy((state.transforms, state.encoders))
        values = _evaluate_all(expressions, columns, state.context, transforms, len(rows))
        created = _created_missing(expressions, values, kept)
        for text, value in values.items():
            if (known := state.levels.get(text)) is not None:
                if not isinstance(value, _Coded):
                    raise DataError(
                        f"{text!r} is numeric in the new data, but the model was fitted to "
                        f"categories: {_names(map(repr, known))}"
                    )
                values[text] = _recode(text, value, known)
            elif isinstance(value, _Coded):
                raise DataError(
                    f"{text!r} was numeric in the data of the fit, but holds "
                    f"{_names(map(repr, value.levels[:3]))} in the new data"
                )
        Xr, names = _matrix(spec.fixed, values, len(rows), state.contrasts, encoders)
        assert names == design.x_names
        _check_matrix(Xr, names, kept)
        X[rows] = Xr
        for block, full in zip(design.blocks, Z, strict=False):
            Zr, names = _matrix(block.term.design, values, len(rows), {}, encoders)
            _check_matrix(Zr, names, kept)
            full[rows] = Zr
            assert names == block.names
        if total is not None:
            part = _total_offset(plan, values, side.get("offset"), kept)
            total[rows] = part
        for mask in created.values():
            bad[rows[mask]] = True
        if created:
            for array in (X, *Z):
                array[bad] = np.nan
            if total is not None:
                total[bad] = np.nan
    return NewDesign(X, Z, codes, total, index, bad)


def _as_matrix(
    values: Any, what: str, names: Sequence[str] | None, stem: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    if isinstance(values, pd.DataFrame):
        found = tuple(map(str, values.columns))
        matrix = np.empty(values.shape, order="F")
        for j, name in enumerate(found):
            column = _as_float(values.iloc[:, j])
            if column is None:
                raise DataError(f"column {name!r} of {what} is not numeric")
            matrix[:, j] = column
    else:
        try:
            matrix = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError):
            raise DataError(f"{what} must be numeric") from None
        if matrix.ndim == 1:
            matrix = matrix[:, None]
        if matrix.ndim != 2:
            raise DataError(f"{what} must be two-dimensional, its shape is {matrix.shape}")
        found = tuple(f"{stem}{j + 1}" for j in range(matrix.shape[1]))
    if names is not None:
        if isinstance(names, str) or len(names) != matrix.shape[1]:
            raise DataError(
                f"{stem}_names must hold one name for each of the {matrix.shape[1]} columns of "
                f"{what}, not {names!r}"
            )
        found = tuple(map(str, names))
    _check_unique(found, what)
    return matrix, found


def _quote(name: str) -> str:
    return name if name.isidentifier() else f"`{name.replace('`', '')}`"


def _plain_names(names: Sequence[str]) -> str:
    if not names:
        return "0"
    intercept = "1" if names[0] == "Intercept" else "0"
    return " + ".join([intercept, *(_quote(name) for name in names if name != "Intercept")])


def design_from_arrays(
    y: Any,
    X: Any,
    groups: Any,
    Z: Any = None,
    *,
    weights: Any = None,
    offset: Any = None,
    x_names: Sequence[str] | None = None,
    z_names: Sequence[str] | None = None,
    group_name: str = "Group",
    covariance: str = "us",
    missing: str = "drop",
) -> Design:
    """A design with one random term from arrays, nothing added: X holds its own intercept.

    Args:
        y: (n,) response.
        X: (n, p) fixed-effects design; the columns of a DataFrame give the names.
        groups: (n,) group labels of any type.
        Z: (n, q) random-effects columns; None for a random intercept.
        weights: (n,) positive prior weights.
        offset: (n,) known part of the linear predictor.
        x_names: (p,) names instead of `x1, x2, ...`.
        z_names: (q,) names instead of `z1, z2, ...`.
        group_name: name of the grouping factor.
        covariance: `"us"` or `"diag"`.
        missing: `"drop"` or `"raise"`.

    Returns:
        The design.

    Raises:
        DataError: for lengths or shapes that differ, infinite values, and as in `build_design`.

    Example:
        >>> design = design_from_arrays([1.0, 2.0, 4.0], [[1, 0], [1, 1], [1, 2]], ["a", "b", "a"])
        >>> design.x_names, design.groupings[0].codes.tolist()
        (('x1', 'x2'), [0, 1, 0])
    """
    _check_missing_argument(missing)
    raw_y = _one_dimensional(y, "y")
    response = str(raw_y.name) if isinstance(raw_y, pd.Series) and raw_y.name is not None else "y"
    numbers = _as_float(raw_y)
    if numbers is None:
        kind = "True/False" if raw_y.dtype == bool else str(raw_y.dtype)
        raise DataError(f"the response y must be numeric, not {kind}")
    n = len(numbers)
    if n == 0:
        raise DataError("the data have no rows")
    matrix, names = _as_matrix(X, "X", x_names, "x")
    if Z is None:
        if z_names is not None and len(z_names) != 1:
            raise DataError("z_names needs one name: without Z there is a random intercept only")
        effects, effect_names = np.ones((n, 1)), tuple(z_names or ("Intercept",))
    else:
        effects, effect_names = _as_matrix(Z, "Z", z_names, "z")
    if not effect_names:
        raise DataError("Z has no columns: give at least one, or leave Z out")
    group = _Column(group_name, _one_dimensional(groups, "groups"))
    side = {}
    if weights is not None:
        side["weights"] = _side_column_array(weights, "weights")
    if offset is not None:
        side["offset"] = _side_column_array(offset, "offset")
    sizes = {"X": len(matrix), "groups": len(group.raw), "Z": len(effects)}
    sizes.update({name: len(values) for name, values in side.items()})
    for name, size in sizes.items():
        if size != n:
            raise DataError(f"{name} has {size} rows, but y has {n}")
    index = raw_y.index if isinstance(raw_y, pd.Series) else pd.RangeIndex(n)

    columns: dict[str, np.ndarray] = {response: numbers}
    columns.update({name: matrix[:, j] for j, name in enumerate(names)})
    columns.update({name: effects[:, j] for j, name in enumerate(effect_names)})
    columns.update(side)
    masks = {}
    for name, values in columns.items():
        _check_finite(name, values, index, "column")
        if not _all_finite(values):
            masks[name] = np.isnan(values)
    if (mask := group.missing(as_group=True)) is not None:
        masks[group_name] = mask
    dropped_by = {name: int(mask.sum()) for name, mask in masks.items()}
    if masks:
        bad = _missing_mask(n, masks.values())
        if missing == "raise":
            _raise_missing(dropped_by, int(bad.sum()))
        if bad.all():
            raise _no_rows(dropped_by, n)
        rows = np.flatnonzero(~bad)
        numbers, matrix, effects = numbers[rows], matrix[rows], effects[rows]
        index = _keep(rows, {group_name: group}, side, index)
    _check_response(response, numbers)
    if "weights" in side:
        _check_weights(side["weights"], index)
    codes, levels = group.codes()
    _check_one_level(group_name, levels)

    term = RandomTerm(_plain_names(effect_names), _quote(group_name), covariance)
    return Design(
        spec=ModelSpec(_quote(response), _plain_names(names), (term,)),
        response_name=response,
        y=np.array(numbers),
        X=np.array(matrix, order="F"),
        x_names=names,
        blocks=(RandomBlock(term, 0, np.array(effects, order="F"), effect_names),),
        groupings=(Grouping(group_name, codes, levels),),
        weights=np.array(side["weights"]) if "weights" in side else None,
        offset=np.array(side["offset"]) if "offset" in side else None,
        index=index,
        n_dropped=n - len(index),
        dropped_by=dropped_by,
        _state=_State(
            parts=((levels,),),
            cells=(None,),
            offset=True if offset is not None else None,
            arrays=True,
        ),
    )


def _side_column_array(values: Any, what: str) -> np.ndarray:
    if isinstance(values, str):
        raise DataError(f"{what}={values!r}: without a data frame, give an array")
    return _side_column(values, what, _Frame({}), None)


def _new_arrays(design: Design, data: Any, need_groups: bool, offset: Any) -> NewDesign:
    if not isinstance(data, Mapping) or "X" not in data:
        raise TypeError("this design was made from arrays: pass a dict with 'X' (and 'groups')")
    block = design.blocks[0]
    X, names = _as_matrix(data["X"], "X", None, "x")
    n = len(X)
    if len(names) != len(design.x_names):
        raise DataError(f"X has {len(names)} columns, the model has {len(design.x_names)}")
    Z: tuple[np.ndarray, ...] = ()
    codes: tuple[np.ndarray, ...] = ()
    bad = np.isnan(X).any(axis=1)
    if need_groups:
        if "groups" not in data:
            raise DataError("the new data lack 'groups'")
        if "Z" in data and data["Z"] is not None:
            effects, z_names = _as_matrix(data["Z"], "Z", None, "z")
            if len(z_names) != len(block.names):
                raise DataError(f"Z has {len(z_names)} columns, the model has {len(block.names)}")
        elif block.term.design == "1":
            effects = np.ones((n, 1))
        else:
            raise DataError("the new data lack 'Z'")
        group = _Column(design.groupings[0].name, _one_dimensional(data["groups"], "groups"))
        for name, size in (("groups", len(group.raw)), ("Z", len(effects))):
            if size != n:
                raise DataError(f"{name} has {size} rows, but X has {n}")
        codes = (_new_codes([group], (design.groupings[0].levels,), None),)
        bad |= np.isnan(effects).any(axis=1)
        if (mask := group.missing(as_group=True)) is not None:
            bad |= mask
        Z = (np.array(effects),)
    argument = _new_offset_needed(design._state, offset)
    total = None if argument is None else np.array(_side_column_array(argument, "offset"))
    if total is not None:
        if len(total) != n:
            raise DataError(f"offset has {len(total)} rows, but X has {n}")
        bad |= np.isnan(total)
        total[bad] = np.nan
    X = np.array(X)
    index = pd.RangeIndex(n)
    for array, labels in ((X, design.x_names), *((z, block.names) for z in Z)):
        _check_matrix(array, labels, index)
        array[bad] = np.nan
    return NewDesign(X, Z, codes, total, index, bad)
