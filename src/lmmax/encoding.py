"""Terms -> columns: names in expressions, transforms with state, contrasts.

formulaic evaluates the expressions, decides which factors lose a column and names the columns.
Every use of its internals is here and in formula.py.
"""

from __future__ import annotations

import builtins
import copy
import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from formulaic import ModelSpec as Part
from formulaic.errors import FactorEvaluationError
from formulaic.materializers import PandasMaterializer
from formulaic.materializers.types import EvaluatedFactor, FactorValues
from formulaic.parser.types import Factor
from formulaic.transforms import TRANSFORMS
from formulaic.transforms.contrasts import (
    Contrasts,
    ContrastsRegistry,
    CustomContrasts,
    DiffContrasts,
    HelmertContrasts,
    PolyContrasts,
    SASContrasts,
    SumContrasts,
    TreatmentContrasts,
)
from formulaic.utils.cast import as_columns
from formulaic.utils.layered_mapping import LayeredMapping
from formulaic.utils.stateful_transforms import stateful_eval
from interface_meta import override

from .expressions import ExpressionError, expression_names, is_elementwise
from .formula import R_HINTS, FormulaError, from_r, is_factor_of, parse_terms
from .frames import (
    DataError,
    Table,
    as_numbers,
    beyond_integers,
    is_label,
    is_number,
    listing,
    real_numbers,
    unknown_column,
)
from .levels import as_categories, label_positions, positions
from .safe import UnsafeError, evaluate_safely
from .splines import SPLINES, Spline
from .terms import CodedTerms, Element, Term

__all__ = [
    "Encoder",
    "Factor",
    "Part",
    "contrasts_by_expression",
    "factor_names",
    "formula_part",
    "offset_factor",
    "term_factors",
    "terms_by_factors",
    "used_columns",
]

_LOOKUP, _LITERAL = Factor.EvalMethod.LOOKUP, Factor.EvalMethod.LITERAL

_CONTRASTS: dict[str, type[Contrasts]] = {
    "treatment": TreatmentContrasts,
    "sum": SumContrasts,
    "helmert": HelmertContrasts,
    "poly": PolyContrasts,
    "SAS": SASContrasts,
    "diff": DiffContrasts,
}


@dataclass(frozen=True, eq=False)
class _Categories:
    """A factor: its levels, contrasts if the formula names them, and all levels it was given."""

    values: pd.Categorical
    contrasts: Contrasts | None = None
    declared: pd.Index | None = None


@dataclass(frozen=True)
class ContrastCoding:
    """How a categorical factor was coded; see `lmmax.terms.Coding`.

    Args:
        levels: the levels in order.
        contrasts: their contrasts.
    """

    levels: tuple[Any, ...]
    contrasts: Contrasts

    def is_complete(self, reduced: bool) -> bool:
        """Whether the columns tell all levels apart, if reduced together with a constant."""
        if not isinstance(self.contrasts, CustomContrasts):
            return True
        coding = self.matrix(reduced)
        if reduced:
            coding = np.column_stack([np.ones(len(coding)), coding])
        return bool(np.linalg.matrix_rank(coding) == len(self.levels))

    def matrix(self, reduced: bool) -> np.ndarray:
        """Values of the factor's columns by level, (levels, columns)."""
        if reduced and len(self.levels) == 1:
            return np.zeros((1, 0))
        coding = self.contrasts.get_coding_matrix(list(self.levels), reduced_rank=reduced)
        return np.asarray(coding.to_numpy(np.float64))


def as_contrasts(contrasts: Any, what: str) -> Contrasts:
    """Anything a user may write for contrasts -> formulaic object.

    Raises:
        DataError: for an unknown name or a matrix that is none.
    """
    if isinstance(contrasts, Contrasts):
        return contrasts
    if isinstance(contrasts, str):
        name = contrasts.removeprefix("contr.")
        if name not in _CONTRASTS:
            raise DataError(
                f"unknown contrasts {contrasts!r} for {what}: choose one of "
                f"{', '.join(map(repr, _CONTRASTS))}, or give a formulaic contrasts object; for "
                'another reference level write C(f, ref="b") in the formula'
            )
        return _CONTRASTS[name]()
    if contrasts is builtins.sum:  # `C(f, sum)`, as R users write it
        return SumContrasts()
    if inspect.isclass(contrasts) and issubclass(contrasts, Contrasts):
        return contrasts()
    try:
        labelled = _as_labelled(contrasts)
        if labelled is not None:
            return _LabelledContrasts(labelled, what)
        if not isinstance(contrasts, Mapping):
            contrasts = np.atleast_2d(real_numbers(contrasts, f"the contrasts for {what}"))
        return CustomContrasts(contrasts)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot use {contrasts!r} as contrasts for {what}: {error}") from None


class _LabelledContrasts(CustomContrasts):  # type: ignore[misc]
    """Contrasts whose rows have labels, the levels, by which they are taken.

    Args:
        frame: a row per level, in any order, and a named column per contrast.
        what: the factor, for messages.
    """

    def __init__(self, frame: pd.DataFrame, what: str) -> None:
        values = real_numbers(frame, f"the contrasts for {what}")
        unnamed = isinstance(frame.columns, pd.RangeIndex)
        super().__init__(values, None if unnamed else [str(name) for name in frame.columns])
        self.labels, self._what = frame.index, what

    def aligned(self, levels: Iterable[Any]) -> CustomContrasts:
        """Return contrasts with a row for each of the levels, in their order."""
        wanted = pd.Index(list(levels))
        where = f"the index of the contrasts for {self._what}"
        remedy = "pass contrasts.to_numpy() if its rows are in the order of the levels"
        rows = label_positions(wanted, self.labels, where, remedy)
        return CustomContrasts(self.contrasts[rows], self.contrast_names)


def _as_labelled(contrasts: Any) -> pd.DataFrame | None:
    """Contrasts whose rows have labels as a frame, None for those that have none."""
    if isinstance(contrasts, pd.Series):
        name = contrasts.name
        return contrasts.to_frame() if name is not None else contrasts.to_frame(0)
    if isinstance(contrasts, pd.DataFrame):
        return contrasts
    if isinstance(contrasts, Mapping) and contrasts:
        columns = list(contrasts.values())
        if all(isinstance(column, pd.Series) for column in columns):
            # A level that one of them lacks is missing in the frame.
            return pd.DataFrame(dict(contrasts))
    return None


def _categorical(
    data: Any,
    contrasts: Any = None,
    *,
    ref: Any = None,
    levels: Any = None,
    unused: bool = False,
) -> _Categories:
    """`C(...)` in a formula: take values as categories.

    Args:
        data: (n,) values.
        contrasts: see `as_contrasts`.
        ref: the reference level of treatment contrasts, a short form of ``Treatment("b")``.
        levels: the levels in order; every value must be among them.
        unused: keep levels that do not occur.
    """
    values = as_categories(data, unused=unused)
    if levels is not None:
        levels = pd.Index(list(levels))
        lacking = values.categories.difference(levels)
        if len(lacking):
            raise DataError(f"C(..., levels=...) lacks {listing(map(repr, lacking))}")
        values = values.set_categories(levels, ordered=True)
        values = values if unused else values.remove_unused_categories()
    declared = _declared(data) if levels is None else levels
    coding = None if contrasts is None else as_contrasts(contrasts, "C()")
    if ref is not None:
        if coding is not None:
            raise DataError("C(..., ref=...) names the reference of treatment contrasts: give one")
        if ref not in values.categories:
            raise DataError(
                f"C(..., ref={ref!r}) names no level; the levels are "
                f"{listing(map(repr, values.categories.tolist()))}"
            )
        coding = TreatmentContrasts(base=ref)
    return _Categories(values, coding, declared)


def _declared(data: Any) -> pd.Index | None:
    """The categories of a categorical, with those that do not occur; None for other data."""
    dtype = getattr(data, "dtype", None)
    return dtype.categories if isinstance(dtype, pd.CategoricalDtype) else None


def _log(x: Any, base: float | None = None) -> Any:
    return np.log(x) if base is None else np.log(x) / np.log(base)


def _custom(contrasts: Any, names: Sequence[Any] | None = None) -> Contrasts:
    """`contr.custom(...)`: contrasts as numbers, or as a frame, whose rows are taken by label."""
    frame = _as_labelled(contrasts)
    if frame is None:
        return CustomContrasts(contrasts, names)
    return _LabelledContrasts(
        frame if names is None else frame.set_axis(list(names), axis=1), "C()"
    )


class _Registry(ContrastsRegistry):  # type: ignore[misc]
    """`contr` in a formula."""

    custom = staticmethod(_custom)


_FUNCTIONS: dict[str, Any] = {
    **TRANSFORMS,
    **SPLINES,
    "contr": _Registry,
    **{
        name: getattr(np, name)
        for name in ("sqrt", "abs", "sin", "cos", "tan", "log1p", "expm1", "floor", "tanh")
    },
    "ceiling": np.ceil,
    "C": _categorical,
    "log": _log,
    "exp10": lambda x: np.power(10.0, x),  # formulaic's own is x**10
}
# It would reach across groups and over rows left out.
del _FUNCTIONS["lag"]
_FUNCTIONS_OF_PARTS = {**_FUNCTIONS, "C": partial(_categorical, unused=True)}


def term_factors(text: str) -> list[Factor]:
    """The factors of a part of a formula, each a column name or an expression, or a literal."""
    return [factor for term in parse_terms(text) for factor in term.factors]


def terms_by_factors(text: str) -> dict[frozenset[str], str]:
    """The terms of a part of a formula as text, by the factors that each is made of."""
    return {
        frozenset(f.expr for f in term.factors if f.eval_method is not _LITERAL): str(term)
        for term in parse_terms(text)
    }


def offset_factor(text: str) -> Factor:
    """An offset as one factor: it is arithmetic, not a sum of terms."""
    text = from_r(text)
    quoted = text[0] == "`" == text[-1] and text.count("`") == 2
    if quoted or text.isidentifier():
        return Factor(text.strip("`"), eval_method=_LOOKUP)
    return Factor(text, eval_method=Factor.EvalMethod.PYTHON)


def factor_names(factor: Factor) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that a factor uses, as values and as functions."""
    if factor.eval_method is _LITERAL:
        return (), ()
    if factor.eval_method is _LOOKUP:
        return (factor.expr,), ()
    try:
        return expression_names(factor.expr)
    except ExpressionError as error:
        raise FormulaError(f"`{factor.expr}` {error}") from None


def used_columns(
    factors: Mapping[Factor, str], table: Table, context: Mapping[str, Any]
) -> list[str]:
    """Columns that the factors need.

    Args:
        factors: the factors, each with the part of the model it stands in, for messages.
        table: the data.
        context: names that are known besides the columns.

    Raises:
        DataError: for a name that is neither a column nor known.
    """
    columns: dict[str, None] = {}
    for factor, where in factors.items():
        values, functions = factor_names(factor)
        is_name = factor.eval_method is _LOOKUP
        if not is_name:
            where = f"term `{factor.expr}`, {where}"
        for name in values:
            if name in table:
                columns[name] = None
            elif is_name or not _is_known(name, context):
                if name in R_HINTS and not is_name:
                    raise DataError(f"unknown name {name!r} ({where}): {R_HINTS[name]}")
                raise unknown_column(name, table, where)
        for name in functions:
            if not _is_known(name, context):
                close = difflib.get_close_matches(name, [*_FUNCTIONS, *context], n=1)
                meant = f"did you mean {close[0]}()? " if close else ""
                own = "pass functions of your own in context={'name': function}"
                raise DataError(
                    f"unknown function {name}() ({where}): {R_HINTS.get(name, meant + own)}"
                )
    return list(columns)


def _is_known(name: str, context: Mapping[str, Any]) -> bool:
    return name in context or name in _FUNCTIONS or hasattr(builtins, name)


class Encoder(PandasMaterializer):  # type: ignore[misc]
    """Columns of a model over complete rows: formulaic's materialiser, but strict.

    An expression sees only the columns it names, every factor has one value per row, and levels
    in new data must be known; formulaic makes zeros of those that are not.

    Args:
        frame: complete rows of the columns in use.
        context: names that expressions may use besides the columns.
        transforms: state of the transforms; None learns it.
        levels: levels of the categorical factors, by expression; None learns them.
        whole: whether there will be no other rows; else categories that do not occur are levels.
        safe: whether expressions are evaluated by `lmmax.safe` and not as Python.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        context: Mapping[str, Any],
        transforms: dict[str, Any] | None = None,
        levels: dict[str, pd.Index] | None = None,
        whole: bool = True,
        safe: bool = False,
    ) -> None:
        super().__init__(frame, context)
        self.transforms = {} if transforms is None else transforms
        self.levels: dict[str, pd.Index] = {} if levels is None else levels
        self._learning, self._whole, self._safe = levels is None, whole, safe
        self._widths: list[tuple[int, ...]] = []
        self._centred: set[str] = set()

    def evaluate(self, factors: Iterable[Factor]) -> None:
        """Evaluate factors, which must come before the matrices they are part of."""
        settings = Part([], na_action="ignore", output="numpy", transform_state=self.transforms)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            # Results that are not numbers are reported by `undefined` and by the caller.
            warnings.simplefilter("ignore", RuntimeWarning)
            # Of Python about the text of expressions.
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            for factor in factors:
                try:
                    self._evaluate_factor(factor, settings, set())
                except FactorEvaluationError as error:
                    cause = error.__cause__
                    if isinstance(cause, DataError):
                        raise cause from None
                    if isinstance(cause, UnsafeError):
                        raise FormulaError(f"`{factor.expr}` {cause}") from None
                    raise DataError(
                        f"cannot evaluate the term `{factor.expr}`: {type(cause).__name__}: {cause}"
                    ) from cause
                except (SystemExit, GeneratorExit, KeyboardInterrupt) as error:
                    # A user's own Ctrl-C goes through, what the text itself raises does not.
                    name = type(error).__name__
                    if isinstance(error, KeyboardInterrupt) and name not in factor.expr:
                        raise
                    raise FormulaError(
                        f"the term `{factor.expr}` raises {name}: a formula cannot end the program"
                    ) from None

    def undefined(self) -> dict[str, np.ndarray]:
        """Rows, (n,) bool, in which an expression gave NaN from complete columns."""
        masks = {}
        for text, factor in self.factor_cache.items():
            if factor.factor.eval_method in (_LOOKUP, _LITERAL):
                continue
            if isinstance(factor.values, _Categories):
                mask = factor.values.values.isna()
            else:
                columns = _columns(factor.values)
                mask = np.logical_or.reduce([pd.isna(np.asarray(c)) for c in columns])
            if mask.any():
                masks[text] = np.asarray(mask)
        return masks

    def of_other_rows(self, factors: Iterable[Factor]) -> tuple[str, ...]:
        """The expressions whose values depend on other rows, so that new rows have none.

        `scale(x)` learns what it needs, but `x - x.mean()` takes the mean of whatever rows there
        are.  What is not elementwise by its text is evaluated on parts of the rows again, those
        with the smaller and those with the larger values: one of them lacks the greatest, the
        least, the mean and the ranks of all.
        """
        found = []
        for factor in factors:
            if factor.eval_method in (_LOOKUP, _LITERAL):
                continue
            names, _ = factor_names(factor)
            plain = not any(name in self.context and name not in self.data for name in names)
            if plain and is_elementwise(factor.expr, self._is_elementwise):
                continue
            value = self.factor_cache[factor.expr].values
            if isinstance(value, FactorValues) and value.__formulaic_metadata__.encoder:
                continue  # it learns what it needs when it is encoded
            values = _as_numbers(value)
            order = np.argsort(values[:, 0], kind="stable")
            for part in np.array_split(order, 2):
                rows = np.sort(part)
                if len(rows) and not self._stays(factor, rows, values[rows]):
                    found.append(factor.expr)
                    break
        return tuple(found)

    def _stays(self, factor: Factor, rows: np.ndarray, values: np.ndarray) -> bool:
        """Whether a factor has the same values where only some of the rows are there."""
        encoder = Encoder(
            self.data.iloc[rows],
            self.context,
            copy.deepcopy(self.transforms),
            self.levels,
            self._whole,
            self._safe,
        )
        try:
            encoder.evaluate([factor])
        except (DataError, FormulaError):
            return False
        again = _as_numbers(encoder.factor_cache[factor.expr].values)
        size = np.abs(values).max(initial=0.0)
        return again.shape == values.shape and np.allclose(
            again, values, rtol=1e-12, atol=1e-12 * float(size)
        )

    def _is_elementwise(self, function: str) -> bool:
        """Whether a function gives each row its own value, with what it learnt."""
        if function in self.context or function in self.data:
            return False
        if function.startswith("np."):
            return isinstance(getattr(np, function.removeprefix("np."), None), np.ufunc)
        return function in _FUNCTIONS or function.startswith("contr.")

    def numbers(self, factor: Factor, what: str) -> np.ndarray:
        """The values of a factor that must be one numeric column, a response or offset."""
        value = self.factor_cache[factor.expr].values
        if isinstance(value, _Categories):
            categories = value.values.categories
            raise DataError(
                f"{what} {factor.expr!r} is True/False, a linear mixed model needs a numeric one: "
                "convert it with .astype(float) if 0 and 1 are meant as numbers"
                if pd.api.types.is_bool_dtype(categories.dtype)
                else f"{what} {factor.expr!r} is not numeric (values such as "
                f"{listing(map(repr, categories[:3]))}): convert it with pandas.to_numeric"
            )
        if np.ndim(value) != 1:
            raise DataError(f"{what} {factor.expr!r} must be one numeric column")
        return np.asarray(value, dtype=np.float64)

    def one_factor(self, text: str) -> tuple[str, pd.Categorical, tuple[int, ...] | None] | None:
        """The factor that a part of the formula consists of, `0 + f`: expression, values, places.

        The places are those of its levels among all that were declared, None if none were.  None
        altogether if there is an intercept or anything else beside it.
        """
        terms = parse_terms(text)
        if len(terms) == 1 and len(terms[0].factors) == 1:
            expression = terms[0].factors[0].expr
            value = self.factor_cache[expression].values
            if isinstance(value, _Categories):
                places = None
                if value.declared is not None:
                    places = tuple(positions(value.declared, value.values.categories).tolist())
                return expression, value.values, places
        return None

    def matrix(self, part: Part) -> tuple[np.ndarray, Part]:
        """One part of the formula -> (n, columns) float64, and the part with what it learnt."""
        # formulaic shares it between parts, but their contrasts and splines may differ.
        self.encoded_cache.clear()
        self._widths.clear()
        self._centred = self._centred_splines(part)
        with np.errstate(all="ignore"):
            built = self._build_model_matrix(part, drop_rows=())
        return built.__wrapped__, built.model_spec

    def _centred_splines(self, part: Part) -> set[str]:
        """The splines that must not span constants, because terms beside theirs do.

        A term with a spline spans what it spans without it, if the spline has the constants: that
        is one column too many where another term with the same numeric factors is there, such as
        the intercept, or `f` beside `f:cr(x)`.
        """
        spline, category = (
            {e for e, value in self.factor_cache.items() if isinstance(value.values, kind)}
            for kind in (Spline, _Categories)
        )
        if not spline:
            return set()
        terms = [
            [f.expr for f in term.factors if f.eval_method is not _LITERAL] for term in part.formula
        ]
        centred: set[str] = set()
        whole = set(category)
        for name in dict.fromkeys(name for term in terms for name in term if name in spline):
            beside = [set(term) - whole for term in terms if name not in term]
            if any(set(term) - {name} - whole in beside for term in terms if name in term):
                centred.add(name)
            else:
                whole.add(name)
        return centred

    def terms(self, part: Part) -> CodedTerms:
        """The terms of the part of which the matrix was made last, as it was learnt."""
        found, codings, at = [], {}, 0
        widths = iter(self._widths)
        for term, scoped_terms, columns in part.structure:
            elements: list[tuple[Element, ...]] = []
            for scoped in scoped_terms:
                factors = [(each.factor.expr, each.reduced) for each in scoped.factors]
                # The first factor's columns run fastest, as in R.
                shape = next(widths) if factors else ()
                for index in np.ndindex(*reversed(shape)):
                    elements.append(
                        tuple(
                            Element(name, i, reduced)
                            for (name, reduced), i in zip(factors, index[::-1], strict=True)
                        )
                    )
            names = []
            for factor in term.factors:
                value = self.factor_cache[factor.expr].values
                if factor.eval_method is not _LITERAL:
                    names.append(factor.expr)
                if isinstance(value, _Categories):
                    codings[factor.expr] = ContrastCoding(
                        tuple(value.values.categories), self._contrasts(factor.expr, value, part)
                    )
            here = slice(at, at + len(columns))
            at = here.stop
            found.append(Term(str(term), tuple(names), here, tuple(elements)))
        used = {element for term in found for column in term.elements for element in column}
        ways = {(element.factor, element.reduced) for element in used}
        # Contrasts that do not tell all levels apart are just numbers.
        numbers = {
            name
            for name, reduced in ways
            if name in codings and not codings[name].is_complete(reduced)
        }
        return CodedTerms(
            tuple(found), {name: codings[name] for name in codings if name not in numbers}
        )

    @staticmethod
    def _contrasts(expression: str, value: _Categories, spec: Part) -> Contrasts:
        found = value.contrasts or spec.encoder_state.get(expression, TreatmentContrasts())
        if isinstance(found, _LabelledContrasts):
            return found.aligned(value.values.categories)
        return found

    @override
    def _lookup(self, name: str) -> tuple[Any, set[Any]]:
        return self._checked(name, self.data[name]), set()

    @override
    def _evaluate(self, expr: str, metadata: Any, spec: Part) -> tuple[Any, set[Any]]:
        # Not all columns: one may bear the name of a function.
        names = (name for name in expression_names(expr)[0] if name in self.data)
        scope = LayeredMapping(
            LayeredMapping({name: self._values(name, expr) for name in names}, name="data"),
            LayeredMapping(self.context, name="context"),
            LayeredMapping(_FUNCTIONS if self._whole else _FUNCTIONS_OF_PARTS, name="transforms"),
        )
        if self._safe:
            functions = _FUNCTIONS if self._whole else _FUNCTIONS_OF_PARTS
            state = spec.transform_state

            def column(name: str) -> Any:
                if name not in self.data:
                    raise UnsafeError(f"has `{name}`, which is not a column")
                return self._values(name, expr)

            value = evaluate_safely(expr, column, functions, state, self.nrows)
            return self._checked(expr, value), set()
        try:
            value = stateful_eval(expr, scope, {}, spec.transform_state, spec)
        except DataError as error:
            raise DataError(f"in the term `{expr}`: {error}") from None
        return self._checked(expr, value), set()

    def _values(self, name: str, expression: str) -> pd.Series:
        """A column as an expression sees it: numbers, but labels too large to be floats as such."""
        column = self.data[name]
        numbers = as_numbers(column)
        if (
            numbers.dtype == np.float64
            and column.dtype != np.float64
            and beyond_integers(numbers)
            and is_factor_of(expression, name)
        ):
            return column
        return numbers

    def _checked(self, text: str, value: Any) -> Any:
        """A value with one row per row of data: numbers, columns of them, or known categories."""
        if isinstance(value, _Categories):
            return self._known(text, value)
        if isinstance(value, Spline):
            self._checked(text, value.either)
            return FactorValues(value, kind="numerical", spans_intercept=False)
        for column in _columns(value):
            if np.ndim(column) != 1:
                raise DataError(f"the term `{text}` gives one value, not one per row")
            if len(column) != self.nrows:
                raise DataError(
                    f"the term `{text}` gives {len(column)} values for {self.nrows} rows"
                )
        if isinstance(value, FactorValues) and value.__formulaic_metadata__.encoder:
            return value
        if isinstance(value, (dict, pd.DataFrame)) or np.ndim(value) == 2:
            return value
        bare = value.__wrapped__ if isinstance(value, FactorValues) else value
        series = as_numbers(bare if isinstance(bare, pd.Series) else pd.Series(bare))
        if is_number(series.dtype):
            if text in self.levels:
                raise DataError(
                    f"{text!r} is numeric in the new data, but the model was fitted to "
                    f"categories: {listing(map(repr, self.levels[text]))}"
                )
            return series.to_numpy(np.float64)
        if is_label(series.dtype) and pd.api.types.infer_dtype(series) != "complex":
            values = as_categories(series, unused=not self._whole)
            return self._known(text, _Categories(values, declared=_declared(series)))
        dates = series.dtype.kind in "mM"
        hint = ": turn dates into numbers, for instance days since the first" if dates else ""
        raise DataError(f"{text!r} holds {series.dtype}, not numbers{hint}")

    def _known(self, text: str, value: _Categories) -> Any:
        categories = value.values.categories
        if self._learning:
            self.levels[text] = categories
        elif text not in self.levels:
            raise DataError(
                f"{text!r} was numeric in the data of the fit, but holds "
                f"{listing(map(repr, categories[:3]))} in the new data"
            )
        else:
            known = self.levels[text]
            position = positions(known, categories)
            unseen = categories[position < 0]
            if len(unseen):
                raise DataError(
                    f"{text!r} has the level{'s' if len(unseen) > 1 else ''} "
                    f"{listing(map(repr, unseen))} in the new data, which the model was not fitted "
                    f"to; known levels: {listing(map(repr, known))}"
                )
            codes = np.append(position, -1)[value.values.codes]
            values = pd.Categorical.from_codes(codes, known, ordered=value.values.ordered)
            value = replace(value, values=values)
        return FactorValues(value, kind="categorical", spans_intercept=True)

    @override
    def _encode_evaled_factor(
        self,
        factor: EvaluatedFactor,
        spec: Part,
        drop_rows: Sequence[int],
        reduced_rank: bool = False,
    ) -> dict[str, Any]:
        value = factor.values
        if isinstance(value, Spline):
            try:
                columns = value.columns(factor.expr in self._centred)
            except ValueError as error:
                raise DataError(f"cannot evaluate the term `{factor.expr}`: {error}") from None
            return {f"{factor.expr}[{field}]": column for field, column in columns.items()}
        if not isinstance(value, _Categories):
            return super()._encode_evaled_factor(factor, spec, drop_rows, reduced_rank)
        levels = list(value.values.categories)
        if reduced_rank and len(levels) == 1:
            return {}
        contrasts = self._contrasts(factor.expr, value, spec)
        if isinstance(contrasts, CustomContrasts) and len(contrasts.contrasts) != len(levels):
            raise DataError(
                f"the contrasts for {factor.expr!r} have {len(contrasts.contrasts)} rows, but the "
                f"factor has {len(levels)} levels: {listing(levels)}"
            )
        try:
            coding = contrasts.get_coding_matrix(levels, reduced_rank=reduced_rank)
        except Exception as error:
            raise DataError(
                f"cannot use {type(contrasts).__name__} for {factor.expr!r} with levels "
                f"{listing(levels)}: {error}"
            ) from None
        name = contrasts.get_factor_format(levels, reduced_rank=reduced_rank)
        return {
            name.format(name=factor.expr, field=field): column[value.values.codes]
            for field, column in zip(coding.columns, coding.to_numpy(np.float64).T, strict=True)
        }

    @override
    def _get_columns_for_term(
        self, factors: list[dict[str, Any]], spec: Part, scale: float = 1
    ) -> dict[str, Any]:
        self._widths.append(tuple(map(len, factors)))
        return super()._get_columns_for_term(factors, spec, scale)

    @override
    def _combine_columns(
        self, cols: Sequence[tuple[str, Any]], spec: Part, drop_rows: Sequence[int]
    ) -> np.ndarray:
        matrix = np.empty((self.nrows, len(cols)), order="F")
        for j, (_, values) in enumerate(cols):
            if np.iscomplexobj(values):
                raise DataError(f"the column {cols[j][0]!r} is complex: take its real part")
            matrix[:, j] = values
        return matrix


def _as_numbers(value: Any) -> np.ndarray:
    """What an expression gave as numbers, (n, columns): of categories, their positions."""
    if isinstance(value, _Categories):
        return np.asarray(value.values.codes, dtype=np.float64)[:, None]
    return np.column_stack([np.asarray(column, dtype=np.float64) for column in _columns(value)])


def _columns(value: Any) -> list[Any]:
    """The columns of what an expression gave: one, or those of a spline basis."""
    if isinstance(value, Spline):
        return list(value.either.values())
    columns = as_columns(value)
    if not isinstance(columns, dict):
        return [columns]
    return [v for k, v in columns.items() if not (isinstance(k, str) and k.startswith("__"))]


def formula_part(text: str, contrasts: Mapping[str, Contrasts] | None = None) -> Part:
    """One part of a formula, for `Encoder.matrix`, with contrasts by expression."""
    # formulaic hands on the encoder state; for categorical factors it is ours to define.
    return Part(list(parse_terms(text)), output="numpy", encoder_state=dict(contrasts or {}))


def contrasts_by_expression(
    contrasts: Mapping[str, Any] | None, factors: Iterable[Factor], levels: Mapping[str, Any]
) -> dict[str, Contrasts]:
    """`contrasts=` by name of a column or expression -> by expression.

    Args:
        contrasts: what the user asked for.
        factors: the factors of the model.
        levels: levels of those that are categorical, by expression.

    Raises:
        DataError: for a name that is no categorical factor, or contrasts that are none.
        TypeError: if they are not a mapping.
    """
    if contrasts is None:
        return {}
    if not isinstance(contrasts, Mapping):
        raise TypeError("contrasts must be a dict such as {'recipe': 'sum'}")
    expressions: dict[str, list[str]] = {}
    for factor in factors:
        if factor.expr in levels:
            names = {name for name in factor_names(factor)[0] if name not in _FUNCTIONS}
            for name in sorted({factor.expr, *names}):
                expressions.setdefault(name, []).append(factor.expr)
    unknown = [name for name in contrasts if name not in expressions]
    if unknown:
        raise DataError(
            f"contrasts for {unknown[0]!r}: no such factor in the model; its factors: "
            f"{listing(map(repr, expressions)) or 'none'}"
        )
    return {
        text: as_contrasts(scheme, repr(name))
        for name, scheme in contrasts.items()
        for text in expressions[name]
    }
