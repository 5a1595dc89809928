"""Data frame + `ModelSpec` -> `Design`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from .arrays import design_from_arrays
from .covariances import Covariance, Effects, covariance
from .encoding import (
    Encoder,
    Factor,
    Part,
    contrasts_by_expression,
    factor_names,
    formula_part,
    offset_factor,
    term_factors,
    used_columns,
)
from .formula import parse_formula, parse_response, with_evaluate
from .frames import (
    DataError,
    any_missing,
    as_table,
    broadcast,
    check_finite,
    complete_rows,
    missing_values,
    plural,
    read_columns,
    row_text,
    side_column,
    unknown_column,
)
from .levels import Grouping, GroupKey, group_rows, has_order
from .matrices import (
    Design,
    NewDesign,
    RandomBlock,
    check_groups,
    check_matrix,
    check_range,
    check_response,
    check_unique,
    needed_offset,
    prior_weights,
)
from .relationship import with_relationships
from .safe import Evaluate
from .spec import ModelSpec, RandomTerm
from .terms import CodedTerms

__all__ = [
    "DataError",
    "Design",
    "Grouping",
    "NewDesign",
    "RandomBlock",
    "build_design",
    "design_from_arrays",
]

# Names that no column has, for the arguments of that name, as in R's model frame.
_WEIGHTS, _OFFSET = "(weights)", "(offset)"


def build_design(
    spec: ModelSpec | str,
    data: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, Any] | None = None,
    missing: str = "drop",
    context: Mapping[str, Any] | None = None,
    relmat: Mapping[str, pd.DataFrame] | None = None,
    whole: bool = True,
    evaluate: Evaluate = "python",
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
            the calling code are not.
        relmat: by name of a grouping factor, the known relationship matrix of its levels, as of
            animals with common ancestors: a DataFrame with the levels as index and columns,
            symmetric and positive semidefinite. Effects of levels i and j then have covariance
            ``relmat[i, j] * D`` with the D of their term. Levels that do not occur may be in it.
        whole: whether there will be no other rows; else one group, or one row, is enough, and
            levels of a categorical that do not occur stay.
        evaluate: "python" or "safe", see `ModelSpec`; a specification that is safe stays so.

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
    if context is not None and not isinstance(context, Mapping):
        raise DataError(
            "context must be a mapping from names to what they stand for, not "
            f"{type(context).__name__}"
        )
    spec = with_evaluate(spec, evaluate)
    context = {} if context is None else dict(context)
    table = as_table(data)
    factors = _factors(spec, spec.random)
    columns = used_columns(factors, table, context)
    frame = read_columns(table, _with_groups(columns, spec.random, table))
    n = len(frame)
    if n == 0:
        raise DataError("the data have no rows")
    # Under names that no column can have, as in R's model frame.
    labels = {}
    for name, values in ((_WEIGHTS, weights), (_OFFSET, offset)):
        if values is not None:
            what = name.strip("()")
            if name in frame:
                raise DataError(f"a column named {name!r} does not go with {what}=: rename it")
            frame[name] = side_column(values, what, table, frame.index)
            labels[name] = values if isinstance(values, str) else what
    masks = missing_values(
        ((labels.get(str(c), c), values) for c, values in frame.items()), frame.index
    )
    rows, dropped_by = complete_rows(masks, missing)
    frame = frame[rows] if dropped_by else frame

    encoder, undefined = _evaluate(frame, factors, context, missing, whole, spec.evaluate == "safe")
    frame = encoder.data
    for name, (count, first) in undefined.items():
        dropped_by[name] = dropped_by.get(name, 0) + count
        warnings.warn(
            f"`{name}` is not a number in {plural(count, 'row')} (first: {first}), which "
            f"{'was' if count == 1 else 'were'} dropped",
            stacklevel=2,
        )
    index = frame.index
    y = encoder.numbers(parse_response(spec.response), "the response")
    schemes = contrasts_by_expression(contrasts, factors, encoder.levels)
    asked = formula_part(spec.fixed, schemes)
    of_fixed = _matrix(encoder, asked, "the fixed-effects design")
    X, fixed, terms = of_fixed
    # Most random terms repeat the fixed effects, or each other.
    made = {} if schemes else {_expressions(asked): of_fixed}
    blocks, parts = [], [fixed]
    for term in spec.random:
        asked = formula_part(term.design)
        same = _expressions(asked)
        if same not in made:
            made[same] = _matrix(encoder, asked, f"the random term {term}")
        Z, effects, own = made[same]
        if Z.shape[1] == 0:
            raise DataError(f"the random term {term} has no column: its design is empty")
        names = tuple(effects.column_names)
        structure = _prepared(term, names, encoder)
        Z = _shared(Z, names, X, fixed.column_names)
        blocks.append(RandomBlock(term, spec.grouping_of(term), Z, names, structure, own))
        parts.append(effects)
    groups = [
        group_rows(
            factor_name,
            [frame[name] for name in names],
        )
        for names, factor_name in zip(spec.group_columns, spec.factor_names, strict=True)
    ]
    if whole:
        check_groups([grouping for grouping, _ in groups], blocks)
        check_response(spec.response, y, index)
        _warn_of_lone_levels(encoder.levels, spec, fixed.column_names)
    used = {name for factor in factors for names in factor_names(factor) for name in names}
    return Design(
        spec=spec,
        response_name=spec.response,
        # A copy, because a plain column would otherwise stay a view of the user's data.
        y=np.array(y),
        X=X,
        x_names=tuple(fixed.column_names),
        terms=terms,
        blocks=tuple(blocks),
        groupings=with_relationships([grouping for grouping, _ in groups], relmat),
        weights=None if weights is None else prior_weights(frame[_WEIGHTS].to_numpy(), index),
        offset=_total_offset(encoder, spec) if spec.offsets or offset is not None else None,
        index=index,
        n_dropped=n - len(frame),
        dropped_by=dropped_by,
        _recipe=_FormulaRecipe(
            spec=spec,
            keys=tuple(key for _, key in groups),
            offset=offset if isinstance(offset, str) or offset is None else True,
            columns=tuple(columns),
            context={name: context[name] for name in sorted(used - {*columns}) if name in context},
            transforms=encoder.transforms,
            levels=encoder.levels,
            parts=tuple(parts),
            of_other_rows=encoder.of_other_rows(_factors(spec, spec.random, response=False)),
        ),
    )


def _warn_of_lone_levels(
    levels: Mapping[str, pd.Index], spec: ModelSpec, x_names: Sequence[str]
) -> None:
    """Warn of factors of the fixed effects that have one level, and so no column beside it."""
    for expression in {factor.expr for factor in term_factors(spec.fixed)}:
        found = levels.get(expression)
        if (
            found is not None
            and len(found) == 1
            and not any(expression in name for name in x_names)
        ):
            warnings.warn(
                f"{expression!r} has one level, {str(found[0])!r}, in the rows used, so it adds "
                "nothing to the fixed effects: leave it out",
                stacklevel=4,
            )


@dataclass(frozen=True, eq=False)
class _FormulaRecipe:
    """Recipe of a design made from a formula.

    Args:
        spec: the model.
        keys: one per grouping factor.
        offset: name of the column that `offset=` was, True if it was an array.
        columns: the data columns that expressions use.
        context: the names of `context` that they use.
        transforms: state of the transforms.
        levels: levels of the categorical factors, by expression.
        parts: the fixed effects, then each random term, with their coding.
        of_other_rows: expressions whose values depend on other rows, which new rows cannot have.
    """

    spec: ModelSpec
    keys: tuple[GroupKey, ...]
    offset: str | bool | None
    columns: tuple[str, ...]
    context: Mapping[str, Any]
    transforms: dict[str, Any]
    levels: dict[str, pd.Index]
    parts: tuple[Part, ...]
    of_other_rows: tuple[str, ...] = ()

    def safely(self) -> _FormulaRecipe:
        """See `Design.safely`."""
        return replace(self, spec=replace(self.spec, evaluate="safe"))

    def apply(self, data: Any, asked: Sequence[bool], offset: Any) -> NewDesign:
        """See `Design.new_data`."""
        spec = self.spec
        table = broadcast(as_table(data))
        wanted = [bool(asked) and asked[spec.grouping_of(term)] for term in spec.random]
        terms = [term for term, want in zip(spec.random, wanted, strict=True) if want]
        factors = _factors(spec, terms, response=False)
        for factor in factors:
            if factor.expr in self.of_other_rows:
                raise DataError(
                    f"the term `{factor.expr}` has no values in new data, because it depends on "
                    "other rows of the data of the fit: use scale(), center() or another transform "
                    "that keeps what it learnt, or make a column of it in both"
                )
        columns = {}
        for factor, where in factors.items():
            for name in factor_names(factor)[0]:
                if name in self.columns:
                    if name not in table:
                        raise unknown_column(name, table, where)
                    columns[name] = where
        frame = read_columns(table, _with_groups(columns, terms, table))
        index = frame.index
        offset = needed_offset(self.offset, offset)
        if offset is not None:
            frame[_OFFSET] = side_column(offset, "offset", table, index)
        missing = any_missing(missing_values(frame.items(), index), len(frame))
        codes = tuple(
            self.keys[i].codes([frame[name] for name in spec.group_columns[i]]) if want else None
            for i, want in enumerate(asked)
        )

        parts = [part for part, want in zip(self.parts, [True, *wanted], strict=True) if want]
        matrices = [np.full((len(frame), len(part.column_names)), np.nan) for part in parts]
        total = np.full(len(frame), np.nan) if spec.offsets or offset is not None else None
        rows = np.flatnonzero(~missing)
        if len(rows):
            # The transforms and encoders of formulaic are handed the state itself.
            transforms, parts = copy.deepcopy((self.transforms, parts))
            safe = spec.evaluate == "safe"
            encoder = Encoder(frame.iloc[rows], self.context, transforms, self.levels, safe=safe)
            encoder.evaluate(factors)
            defined = ~any_missing(encoder.undefined(), len(rows))
            missing[rows[~defined]] = True
            rows = rows[defined]
            for matrix, part in zip(matrices, parts, strict=True):
                values, _ = encoder.matrix(part)
                check_matrix(values, part.column_names, encoder.data.index)
                matrix[rows] = values[defined]
            if total is not None:
                total[rows] = _total_offset(encoder, spec)[defined]
        rest = iter(matrices[1:])
        Z = tuple(next(rest) if want else None for want in wanted) if asked else ()
        return NewDesign(matrices[0], Z, codes, total, index, missing)


def _factors(
    spec: ModelSpec, terms: Iterable[RandomTerm], *, response: bool = True
) -> dict[Factor, str]:
    """The factors of a model with these random terms, each with its part, for messages."""
    where = {parse_response(spec.response): "response"} if response else {}
    parts = [(spec.fixed, "fixed effects")]
    parts += [(term.design, f"random term {term}") for term in terms]
    for text, name in parts:
        for factor in term_factors(text):
            where.setdefault(factor, name)
    for text in spec.offsets:
        where.setdefault(offset_factor(text), "offset")
    return where


def _with_groups(
    columns: Iterable[str], terms: Iterable[RandomTerm], table: Iterable[Any]
) -> list[str]:
    """Columns and those of the terms' grouping factors, each once."""
    groups = [name for term in terms for name in term.group_names]
    for name in groups:
        if name not in table:
            raise unknown_column(name, table, "grouping factor")
    return list(dict.fromkeys([*columns, *groups]))


def _evaluate(
    frame: pd.DataFrame,
    factors: Iterable[Factor],
    context: Mapping[str, Any],
    missing: str,
    whole: bool,
    safe: bool,
) -> tuple[Encoder, dict[str, tuple[int, str]]]:
    """Evaluate all factors on complete rows, leaving out rows in which one is not a number.

    Returns:
        The encoder, with the rows that stay, and the number of rows each term lost and the first.
    """
    encoder = Encoder(frame, context, whole=whole, safe=safe)
    encoder.evaluate(factors)
    masks = encoder.undefined()
    if not masks:
        return encoder, {}
    for name, mask in masks.items():
        if mask.all():
            raise DataError(
                f"the term `{name}` is not a number in any row, though its variables are: check "
                "for the logarithm or root of a negative number"
            )
    rows, counts = complete_rows(masks, missing)
    lost = {
        name: (count, row_text(frame.index, np.argmax(masks[name])))
        for name, count in counts.items()
    }
    # Levels, means and knots are learnt from the rows that stay, so all starts again.
    encoder = Encoder(frame[rows], context, whole=whole, safe=safe)
    encoder.evaluate(factors)
    for name, mask in encoder.undefined().items():
        raise DataError(
            f"the term `{name}` is not a number in {row_text(encoder.data.index, np.argmax(mask))} "
            "again, though rows were left out for it: its values depend on other rows, so make a "
            "column"
        )
    return encoder, lost


def _prepared(term: RandomTerm, names: tuple[str, ...], encoder: Encoder) -> Covariance:
    """The covariance structure of a term, told about the order of its effects."""
    told = Effects(names, None, False, str(term))
    found = encoder.one_factor(term.design)
    if found is not None and len(found[1].categories) == len(names):
        factor, values, places = found
        told = Effects(
            names,
            tuple(values.categories),
            has_order(values),
            str(term),
            factor,
            places,
            declared=bool(values.ordered),
        )
    return covariance(term.covariance).prepare(told)


def _shared(
    Z: np.ndarray, names: Sequence[str], X: np.ndarray, x_names: Sequence[str]
) -> np.ndarray:
    """Return the columns of X in place of an equal Z: most random terms repeat fixed effects."""
    if names[0] in x_names:
        first = list(x_names).index(names[0])
        same = X[:, first : first + len(names)]
        if tuple(x_names[first : first + len(names)]) == tuple(names) and np.array_equal(same, Z):
            return same
    return Z


def _matrix(encoder: Encoder, asked: Part, what: str) -> tuple[np.ndarray, Part, CodedTerms]:
    """The columns of a part of the formula, the part with what it learnt, and its terms."""
    matrix, learnt = encoder.matrix(asked)
    check_unique(learnt.column_names, what)
    check_matrix(matrix, learnt.column_names, encoder.data.index)
    return matrix, learnt, encoder.terms(learnt)


def _expressions(part: Part) -> tuple[tuple[str, ...], ...]:
    """The expressions in each term of a part: alike without contrasts, they make one matrix."""
    return tuple(tuple(factor.expr for factor in term.factors) for term in part.formula)


def _total_offset(encoder: Encoder, spec: ModelSpec) -> np.ndarray:
    """Sum of the offsets in the formula and the argument."""
    total = np.zeros(len(encoder.data))
    with np.errstate(all="ignore"):
        for text in spec.offsets:
            total += encoder.numbers(offset_factor(text), "the offset")
        if _OFFSET in encoder.data:
            total += encoder.data[_OFFSET].to_numpy()
    check_finite("offset", total, encoder.data.index)
    check_range(total[:, None], ["offset"], smallest=0.0)
    return total
