"""Objects as a description and arrays, and back: what files hold in place of pickles.

A file of :mod:`lmmax.archive` says what each object is by a name of its own, `Design`, `us`, ...,
from the tables here, never by the place of its class in the library; reading it makes objects of
these classes, of NumPy and of pandas, field by field, and calls nothing else.  What is code of the
user's, functions in `context=` and classes of covariance structures, is kept by name alone: who
reads the file hands it in.

Numbers are kept bit by bit, and matrices in their order in memory, on which rounding depends.
"""

from __future__ import annotations

import datetime
import decimal
import fractions
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from .archive import ArchiveError, MissingObjectError

T = TypeVar("T")

__all__ = ["Absent", "Reader", "Writer", "classes"]


class Absent:
    """Stands for a function of the user's that a file names and that was not handed in.

    Args:
        name: its name in formulas.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Raise, since it is not there."""
        from .frames import DataError

        raise DataError(
            f"`{self.name}` was given in context=, which a file does not hold: read the fit with "
            f"lmmax.load(path, objects={{{self.name!r}: ...}}) to evaluate its formula"
        )


@cache
def classes() -> dict[str, type]:
    """Return the classes whose objects a fit is made of, by their names in files."""
    from formulaic import ModelSpec as Part
    from formulaic.formula import SimpleFormula
    from formulaic.materializers.base import EncodedTermStructure
    from formulaic.materializers.types import EvaluatedFactor, ScopedFactor, ScopedTerm
    from formulaic.parser.types import Factor, Term, Token
    from formulaic.transforms import contrasts

    from . import (
        arrays,
        compress,
        constraints,
        covariances,
        design,
        encoding,
        estimation,
        identifiability,
        levels,
        matrices,
        results,
        solve,
        spec,
        terms,
    )
    from .compress import columns, crossed, grouped, iterative, nested, scaling
    from .compress.layout import Engine, FactorColumns, Layout
    from .iterative import evaluation, exact, solution, traces
    from .known_covariance import PartlyKnown
    from .likelihood import cells, problem, shared
    from .likelihood import crossed as crossed_problem
    from .likelihood import grouped as grouped_problem
    from .likelihood import iterative as iterative_problem
    from .likelihood import nested as nested_problem

    return {
        "Fit": results.Fit,
        "Settings": constraints.Settings,
        "TermColumns": constraints.TermColumns,
        "Design": matrices.Design,
        "RandomBlock": matrices.RandomBlock,
        "Grouping": levels.Grouping,
        "GroupKey": levels.GroupKey,
        "ModelSpec": spec.ModelSpec,
        "RandomTerm": spec.RandomTerm,
        "CodedTerms": terms.CodedTerms,
        "CodedTerm": terms.Term,
        "Element": terms.Element,
        "FormulaRecipe": design._FormulaRecipe,
        "ArrayRecipe": arrays._ArrayRecipe,
        "ArrayFactor": arrays._Factor,
        "ArrayTerm": arrays._ArrayTerm,
        "ContrastCoding": encoding.ContrastCoding,
        "LabelledContrasts": encoding._LabelledContrasts,
        "Part": Part,
        "Formula": SimpleFormula,
        "TermStructure": EncodedTermStructure,
        "EvaluatedFactor": EvaluatedFactor,
        "ScopedFactor": ScopedFactor,
        "ScopedTerm": ScopedTerm,
        "Factor": Factor,
        "Term": Term,
        "Token": Token,
        **{
            f"contr.{name}": getattr(contrasts, f"{name}Contrasts")
            for name in ("Treatment", "Sum", "Helmert", "Poly", "SAS", "Diff", "Custom")
        },
        "Unstructured": covariances.Unstructured,
        "Diagonal": covariances.Diagonal,
        "CompoundSymmetry": covariances.CompoundSymmetry,
        "Autoregressive": covariances.Autoregressive,
        "Toeplitz": covariances.Toeplitz,
        "OrnsteinUhlenbeck": covariances.OrnsteinUhlenbeck,
        "PartlyKnown": PartlyKnown,
        "Estimates": estimation.Estimates,
        "Constraints": solve.Constraints,
        "Structured": solve.Structured,
        "Point": solve.Point,
        "Solution": solve.Solution,
        "IterativeSolution": solution.IterativeSolution,
        "Evaluation": evaluation.Evaluation,
        "Estimate": traces.Estimate,
        "Exact": exact.Exact,
        "Derivatives": problem.Derivatives,
        "Unidentified": identifiability.Unidentified,
        "Directions": identifiability.Directions,
        "MovingStructure": identifiability.Structure,
        "Layout": Layout,
        "Engine": Engine,
        "FactorColumns": FactorColumns,
        "FixedColumns": columns.Factor,
        "Dependence": columns.Dependence,
        "Scaling": scaling.Scaling,
        "Compression": compress.Compression,
        "GroupedStatistics": grouped.Statistics,
        "CrossedSkeleton": crossed.Skeleton,
        "CrossedOutside": crossed.Outside,
        "NestedTree": nested.Tree,
        "IterativeRows": iterative.Rows,
        "Problem": problem.Problem,
        "SharedProblem": shared.SharedProblem,
        "Exchanged": shared.Exchanged,
        "GroupedProblem": grouped_problem.GroupedProblem,
        "CrossedProblem": crossed_problem.CrossedProblem,
        "Tail": crossed_problem.Tail,
        "SparseCells": cells.SparseCells,
        "DenseCells": cells.DenseCells,
        "NestedProblem": nested_problem.NestedProblem,
        "IterativeProblem": iterative_problem.IterativeProblem,
        "SparseRows": iterative_problem.SparseRows,
        "Meetings": iterative_problem.Meetings,
    }


@cache
def _enums() -> dict[str, type[Enum]]:
    from formulaic.formula import OrderingMethod
    from formulaic.materializers.types import ClusterBy, NAAction
    from formulaic.parser.types import Factor, Token
    from formulaic.utils.sentinels import Sentinel

    from .solve import Status

    return {
        "Status": Status,
        "ordering": OrderingMethod,
        "cluster": ClusterBy,
        "missing": NAAction,
        "evaluation": Factor.EvalMethod,
        "kind": Factor.Kind,
        "token": Token.Kind,
        "unset": Sentinel,
    }


_PLAIN: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "timestamp": (pd.Timestamp, lambda t: f"{t.value} {t.unit} {t.tz or ''}", lambda s: _stamp(s)),
    "timedelta": (pd.Timedelta, lambda t: f"{t.value} {t.unit}", lambda s: _delta(s)),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "fraction": (fractions.Fraction, str, fractions.Fraction),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
}
"""Values that are text in a file; the first class that suits is taken."""


def _stamp(text: str) -> pd.Timestamp:
    value, unit, zone = text.split(" ", 2)
    found = pd.Timestamp(int(value), unit="ns").as_unit(unit)  # type: ignore[arg-type]
    return found.tz_localize("UTC").tz_convert(zone) if zone else found


def _delta(text: str) -> pd.Timedelta:
    value, unit = text.split(" ")
    return pd.Timedelta(int(value), unit="ns").as_unit(unit)  # type: ignore[arg-type]


class Writer:
    """Makes a description of objects, and collects their arrays.

    Args:
        known: the classes, by their names in files.

    Attributes:
        arrays: the arrays so far, by the names that descriptions have for them.
        own: names of what is the user's code, and must be handed in again.
    """

    def __init__(self, known: Mapping[str, type]) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.own: set[str] = set()
        self._names = {kind: name for name, kind in known.items()}
        self._seen: dict[int, tuple[Any, str]] = {}

    def describe(self, value: Any, where: str = "it") -> Any:
        """Return what JSON can hold of a value.

        Args:
            value: the value.
            where: what it is part of, for messages.

        Raises:
            ArchiveError: for what is not data.
        """
        if value is None or (isinstance(value, bool | str) and type(value) in (bool, str)):
            return value
        if type(value) is int:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, list):
            if all(type(each) is str for each in value):
                return value
            return [self.describe(each, f"{where}[{i}]") for i, each in enumerate(value)]
        kind = type(value)
        if isinstance(value, Enum):
            for name, enum in _enums().items():
                if kind is enum:
                    return {"enum": [name, value.name]}
        if kind in self._names:
            return self._object(value, {"of": self._names[kind]})
        return self._data(value, where) or self._own(value, where)

    def _data(self, value: Any, where: str) -> Any:
        """Return the description of containers and of what NumPy and pandas have."""
        kind = type(value)
        if kind is tuple:
            return {"tuple": self.describe(list(value), where)}
        if isinstance(value, Mapping) and not isinstance(value, type):
            pairs = [
                [self.describe(k), self.describe(v, f"{where}[{k!r}]")] for k, v in value.items()
            ]
            return {"mapping": pairs}
        if isinstance(value, set | frozenset):
            return {"set": [self.describe(each) for each in sorted(value, key=repr)]}
        if kind is slice:
            return {"slice": [self.describe(x) for x in (value.start, value.stop, value.step)]}
        if kind is complex:
            return {"complex": [self.describe(value.real), self.describe(value.imag)]}
        if isinstance(value, np.generic):
            return {"scalar": self._array(np.asarray(value), where)}
        if isinstance(value, np.ndarray):
            return {"array": self._array(value, where)}
        if value is pd.NA or value is pd.NaT:
            return {"missing": "NA" if value is pd.NA else "NaT"}
        for name, (of, text, _) in _PLAIN.items():
            if isinstance(value, of):
                return {name: text(value)}
        if isinstance(value, pd.Period):
            return {"period": [value.ordinal, value.freqstr]}
        if isinstance(value, pd.Interval):
            ends = [self.describe(value.left), self.describe(value.right)]
            return {"interval": [*ends, value.closed]}
        if isinstance(value, pd.Index):
            return {"index": self._index(value, where)}
        if isinstance(value, pd.Series):
            parts = [self._values(value.array, where), self.describe(value.index, where)]
            return {"series": [*parts, self.describe(value.name)]}
        if isinstance(value, pd.DataFrame):
            columns = [self._values(value.iloc[:, j].array, where) for j in range(value.shape[1])]
            return {"frame": [columns, self.describe(value.index), self.describe(value.columns)]}
        if isinstance(value, pd.api.extensions.ExtensionArray):
            return {"values": self._values(value, where)}
        if hasattr(value, "__array__") and hasattr(value, "dtype"):  # of JAX
            return {"array": self._array(np.asarray(value), where)}
        return None

    def _object(self, value: Any, head: dict[str, Any]) -> dict[str, Any]:
        """Return the description of an object by its fields."""
        name = head.get("of", "")
        parts = {
            field: self._context(part) if name == "FormulaRecipe" and field == "context" else part
            for field, part in _state(value).items()
        }
        described = {
            field: part if isinstance(part, _Described) else self.describe(part, field)
            for field, part in parts.items()
        }
        return {**head, "fields": described}

    def _context(self, context: Mapping[str, Any]) -> Any:
        """Return the description of what formulas use by name; code by its name alone."""
        pairs = []
        for name, value in context.items():
            if callable(value) or isinstance(value, Absent):
                self.own.add(name)
                pairs.append([name, {"given": name}])
            else:
                pairs.append([name, self.describe(value, f"context[{name!r}]")])
        return _Described({"mapping": pairs})

    def _own(self, value: Any, where: str) -> Any:
        """Return the description of an object of a class of the user's."""
        from formulaic.transforms.contrasts import Contrasts

        from .covariances import Covariance

        kind = type(value)
        if isinstance(value, Covariance | Contrasts):
            self.own.add(kind.__name__)
            return self._object(value, {"own": kind.__name__})
        raise ArchiveError(
            f"{where} is a {kind.__name__}, which is not data and cannot be kept in a file: "
            "make it numbers, text or a data frame"
        )

    def _array(self, values: np.ndarray, where: str) -> Any:
        """Keep an array, once; return what stands for it."""
        if values.dtype == object or values.dtype.kind == "T" or values.dtype.hasobject:
            items = self.describe(values.ravel().tolist(), where)
            text = str(values.dtype) if values.dtype == object else "text"
            return {"items": items, "shape": list(values.shape), "dtype": text}
        known = self._seen.get(id(values))
        if known is None:
            name = f"a{len(self.arrays)}"
            plain = np.asarray(values)
            self.arrays[name] = plain
            known = self._seen[id(values)] = (values, name)  # which keeps its id its own
        return known[1]

    def _values(self, values: Any, where: str) -> dict[str, Any]:
        """Return the description of a one-dimensional array of pandas."""
        dtype = values.dtype
        if isinstance(dtype, np.dtype):
            return {"numpy": self._array(np.asarray(values), where)}
        if isinstance(dtype, pd.CategoricalDtype):
            parts = [self._array(np.asarray(values.codes), where)]
            return {"categories": [*parts, self.describe(values.categories, where), values.ordered]}
        if isinstance(dtype, pd.DatetimeTZDtype):
            stamps = values.astype("int64")
            return {"zoned": [self._array(np.asarray(stamps), where), str(dtype)]}
        if isinstance(dtype, pd.PeriodDtype):
            return {"periods": [self._array(values.asi8, where), str(dtype)[len("period[") : -1]]}
        if isinstance(dtype, pd.IntervalDtype):
            ends = [self.describe(values.left, where), self.describe(values.right, where)]
            return {"intervals": [*ends, values.closed]}
        if isinstance(dtype, pd.StringDtype):
            missing = np.asarray(values.isna())
            items = [None if gone else x for x, gone in zip(values, missing, strict=True)]
            nan = dtype.na_value is not pd.NA
            return {"strings": [items, dtype.storage, nan]}
        if hasattr(values, "_mask") and hasattr(dtype, "numpy_dtype"):  # numbers that may lack
            mask = np.asarray(values.isna())
            known = values.to_numpy(dtype.numpy_dtype, na_value=dtype.numpy_dtype.type(0))
            return {"masked": [self._array(known, where), self._array(mask, where), str(dtype)]}
        items = self.describe([None if x is pd.NA else x for x in values], where)
        return {"extension": [items, str(dtype)]}

    def _index(self, index: pd.Index, where: str) -> Any:
        names = [self.describe(name) for name in index.names]
        if isinstance(index, pd.RangeIndex):
            return {"range": [index.start, index.stop, index.step], "names": names}
        if isinstance(index, pd.MultiIndex):
            levels = [self._index(level, where) for level in index.levels]
            codes = [self._array(np.asarray(code), where) for code in index.codes]
            return {"levels": levels, "codes": codes, "names": names}
        found = {"plain": self._values(index.array, where), "names": names}
        freq = getattr(index, "freqstr", None)
        kept = freq is None or isinstance(index, pd.PeriodIndex)  # which has it by its type
        return found if kept else {**found, "freq": freq}


class _Described(dict[str, Any]):
    """What is a description already."""


def _state(value: Any) -> dict[str, Any]:
    """Return what an object is made of, by name; nothing that was derived from it."""
    from formulaic.parser.types import Term

    kind = type(value)
    if hasattr(kind, "_fields"):
        return {name: getattr(value, name) for name in kind._fields}
    if isinstance(value, Term):  # whose hash of text is of this process
        return {"factors": value.factors, "origin": value.origin}
    if is_dataclass(kind):
        names = [field.name for field in fields(kind)]
    else:
        names = [name for base in kind.__mro__ for name in vars(base).get("__slots__", ())]
    found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    rest = {
        name: part
        for name, part in getattr(value, "__dict__", {}).items()
        if not isinstance(getattr(kind, name, None), cached_property)
    }
    return {**found, **rest}


class Reader:
    """Makes objects of a description and arrays.

    Args:
        known: the classes, by their names in files.
        arrays: the arrays.
        objects: the user's functions and classes, by name.
        file: its name, for messages.
    """

    def __init__(
        self,
        known: Mapping[str, type],
        arrays: Mapping[str, np.ndarray],
        objects: Mapping[str, Any] | None,
        file: str,
    ) -> None:
        self._known, self._arrays, self._file = known, arrays, file
        self._objects = {} if objects is None else objects
        self._forms: dict[str, Callable[[Any], Any]] = {
            "float": float,
            "tuple": lambda of: tuple(self.value(of)),
            "mapping": lambda of: {self.value(k): self.value(v) for k, v in of},
            "set": lambda of: set(map(self.value, of)),
            "slice": lambda of: slice(*map(self.value, of)),
            "complex": lambda of: complex(*map(self.value, of)),
            "enum": lambda of: _enums()[of[0]][of[1]],
            "scalar": lambda of: self._array(of)[()],
            "array": self._array,
            "missing": lambda of: {"NA": pd.NA, "NaT": pd.NaT}[of],
            "period": lambda of: pd.Period(ordinal=of[0], freq=of[1]),
            "interval": lambda of: pd.Interval(self.value(of[0]), self.value(of[1]), of[2]),
            "index": self._index,
            "series": self._series,
            "frame": self._frame,
            "values": self._values,
            "given": lambda of: self._objects[of] if of in self._objects else Absent(of),
            **{name: read for name, (_, _, read) in _PLAIN.items()},
        }

    def read(self, described: Any, kind: type[T]) -> T:
        """Return the object of a kind that is described.

        Raises:
            ArchiveError: as `value` does, and if the description is of something else.
        """
        try:
            found = self.value(described)
        except ArchiveError:
            raise
        except Exception as error:  # a file that someone made up
            raise ArchiveError(
                f"{self._file} is damaged: it says what cannot be ({type(error).__name__}: {error})"
            ) from error
        if not isinstance(found, kind):
            raise ArchiveError(f"{self._file} holds no {kind.__name__}")
        return found

    def value(self, described: Any) -> Any:
        """Return the value of a description.

        Raises:
            ArchiveError: if it was none of this library's, or needs what was not handed in.
        """
        if isinstance(described, list):
            return [self.value(each) for each in described]
        if not isinstance(described, dict):
            return described
        if "fields" in described:
            return self._object(described)
        ((form, of),) = described.items()
        if form not in self._forms:
            raise ArchiveError(
                f"{self._file} holds a {form!r}, which this version of lmmax does not know: update "
                "lmmax"
            )
        return self._forms[form](of)

    def _object(self, described: dict[str, Any]) -> Any:
        if "own" in described:
            kind = self._own(described["own"])
        elif described["of"] in self._known:
            kind = self._known[described["of"]]
        else:
            raise ArchiveError(
                f"{self._file} holds a {described['of']!r}, which this version of lmmax does not "
                "know: update lmmax"
            )
        parts = {name: self.value(part) for name, part in described["fields"].items()}
        if is_dataclass(kind):
            lacking = self._defaults(kind, parts)
            parts = {**lacking, **parts}
        elif hasattr(kind, "_fields") or described.get("of") == "Term":
            return kind(**parts)
        found: Any = object.__new__(kind)
        for name, part in parts.items():
            if not name.isidentifier() or name.startswith("__"):
                raise ArchiveError(f"{self._file} is damaged: {name!r} is no field")
            # Frozen, and not checked again: it was when it was made.
            object.__setattr__(found, name, part)
        return found

    def _own(self, name: str) -> type:
        """Return a class of the user's."""
        kind = self._objects.get(name)
        if kind is None:
            raise MissingObjectError(
                f"{self._file} needs the class {name!r}, which is not part of lmmax and is never "
                f"looked for: pass it, objects={{{name!r}: {name}}}"
            )
        if not isinstance(kind, type):
            raise ArchiveError(f"objects[{name!r}] must be the class, not an object of it")
        return kind

    def _defaults(self, kind: type, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of fields that a file of an earlier version lacks."""
        from formulaic.transforms.contrasts import Contrasts

        known = {field.name: field for field in fields(kind)}
        strange = sorted(set(parts) - set(known))
        if strange and kind in self._known.values() and not issubclass(kind, Contrasts):
            raise ArchiveError(
                f"{self._file} has {strange[0]!r} in a {kind.__name__}, which this version of "
                "lmmax does not know: update lmmax"
            )
        found = {}
        for name in known.keys() - parts.keys():
            field = known[name]
            if field.default_factory is not MISSING:
                found[name] = field.default_factory()
            elif field.default is not MISSING:
                found[name] = field.default
            else:
                raise ArchiveError(
                    f"{self._file} lacks {name!r} of a {kind.__name__}: it was written by an "
                    "earlier version of lmmax; fit the model again"
                )
        return found

    def _array(self, of: Any) -> np.ndarray:
        if isinstance(of, str):
            return self._arrays[of]
        items = self.value(of["items"])
        shape = tuple(of["shape"])
        if of["dtype"] == "text":
            return np.array(items, dtype=np.dtypes.StringDType()).reshape(shape)
        found = np.empty(len(items), dtype=object)
        found[:] = items
        return found.reshape(shape)

    def _values(self, described: dict[str, Any]) -> Any:
        ((form, of),) = described.items()
        dtype: Any
        if form == "numpy":
            return self._array(of)
        if form == "categories":
            dtype = pd.CategoricalDtype(self.value(of[1]), of[2])
            return pd.Categorical.from_codes(self._array(of[0]), dtype=dtype)
        if form == "zoned":
            dtype = pd.api.types.pandas_dtype(of[1])
            stamps = self._array(of[0]).view(f"M8[{dtype.unit}]")
            return pd.DatetimeIndex(stamps).tz_localize("UTC").tz_convert(dtype.tz).array
        if form == "periods":
            periods: Any = pd.PeriodIndex
            return periods.from_ordinals(self._array(of[0]), freq=of[1]).array
        if form == "intervals":
            ends = self.value(of[0]), self.value(of[1])
            return pd.arrays.IntervalArray.from_arrays(*ends, closed=of[2])
        if form == "strings":
            missing = np.nan if of[2] else pd.NA
            dtype = pd.StringDtype(of[1], na_value=missing)
            return pd.array(of[0], dtype=dtype)
        if form == "masked":
            dtype = pd.api.types.pandas_dtype(of[2])
            return dtype.construct_array_type()(self._array(of[0]), self._array(of[1]))
        if form == "extension":
            return pd.array(self.value(of[0]), dtype=of[1])
        raise ArchiveError(f"{self._file} holds {form!r} values, which are unknown: update lmmax")

    def _index(self, of: dict[str, Any]) -> pd.Index:
        names = [self.value(name) for name in of["names"]]
        if "range" in of:
            start, stop, step = of["range"]
            return pd.RangeIndex(start, stop, step, name=names[0])
        if "levels" in of:
            levels: Any = [self._index(level) for level in of["levels"]]
            codes: Any = [self._array(code) for code in of["codes"]]
            return pd.MultiIndex(levels=levels, codes=codes, names=names)
        values = self._values(of["plain"])
        found: Any = pd.Index(values, dtype=values.dtype, name=names[0])
        if "freq" in of:
            found.freq = of["freq"]
        return found

    def _series(self, of: list[Any]) -> pd.Series:
        values = self._values(of[0])
        return pd.Series(values, self.value(of[1]), name=self.value(of[2]), dtype=values.dtype)

    def _frame(self, of: list[Any]) -> pd.DataFrame:
        columns, index, names = of[0], self.value(of[1]), self.value(of[2])
        found = pd.DataFrame({j: self._values(each) for j, each in enumerate(columns)}, index=index)
        return found.set_axis(names, axis=1)
