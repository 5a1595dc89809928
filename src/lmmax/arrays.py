"""Arrays without a formula -> `Design`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .covariances import Covariance, Effects, canonical
from .covariances import covariance as structure_of
from .frames import (
    DataError,
    any_missing,
    as_names,
    check_same_rows,
    complete_rows,
    listing,
    missing_values,
    numeric_column,
    one_dimensional,
    real_numbers,
)
from .levels import GroupKey, group_rows
from .matrices import (
    Design,
    NewDesign,
    RandomBlock,
    Recipe,
    check_groups,
    check_range,
    check_response,
    check_unique,
    needed_offset,
    prior_weights,
)
from .relationship import with_relationships
from .spec import ModelSpec, RandomTerm
from .terms import plain_terms

__all__ = ["design_from_arrays", "plain_names", "quote"]

_GROUP = "Group"


def design_from_arrays(
    y: Any,
    X: Any,
    groups: Any,
    Z: Any = None,
    *,
    weights: Any = None,
    offset: Any = None,
    x_names: Sequence[str] | None = None,
    z_names: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    group_name: str = _GROUP,
    covariance: str | Covariance | Mapping[str, str | Covariance] = "us",
    missing: str = "drop",
    relmat: Mapping[str, pd.DataFrame] | None = None,
) -> Design:
    """A design from arrays, nothing added: X holds its own intercept.

    There is one random term for each grouping factor. Where there are several, `groups` names
    them, and `Z`, `z_names` and `covariance` may be mappings from those names; a factor that is
    not in them has a random intercept, default names and covariance "us".

    Args:
        y: (n,) response.
        X: (n, p) fixed-effects design; the columns of a DataFrame give the names.
        groups: (n,) group labels of any type; for several grouping factors a mapping from their
            names to labels, or a DataFrame with a column for each.
        Z: (n, q) random-effects columns; None for a random intercept.
        weights: (n,) positive prior weights.
        offset: (n,) known part of the linear predictor.
        x_names: (p,) names instead of `x1, x2, ...`.
        z_names: (q,) names instead of `z1, z2, ...`; for covariance "ou" the times, as text.
        group_name: name of the grouping factor, if `groups` does not name it.
        covariance: name or object, see `lmmax.covariances`; the columns of Z are taken to be in
            order where that matters.
        missing: `"drop"` or `"raise"`.
        relmat: as in `build_design`, by name of the grouping factor.

    Returns:
        The design.

    Raises:
        DataError: for lengths or shapes that differ, infinite values, names that are no grouping
            factor, and as in `build_design`.

    Example:
        >>> design = design_from_arrays([1.0, 2.0, 4.0], [[1, 0], [1, 1], [1, 2]], ["a", "b", "a"])
        >>> design.x_names, design.groupings[0].codes.tolist()
        (('x1', 'x2'), [0, 1, 0])
        >>> crossed = {"plate": ["a", "b", "a"], "sample": [1, 1, 2]}
        >>> design_from_arrays([1.0, 2.0, 4.0], [1, 1, 1], crossed).spec.formula
        'y ~ 0 + x1 + (1 | plate) + (1 | sample)'
    """
    check_same_rows(_by_rows(y, X, groups, Z, weights=weights, offset=offset))
    response = str(y.name) if isinstance(y, pd.Series) and y.name is not None else "y"
    index = y.index if isinstance(y, pd.Series) else None
    y = numeric_column(y, "the response y")
    n = len(y)
    if n == 0:
        raise DataError("the data have no rows")
    index = pd.RangeIndex(n) if index is None else index
    X, names = _as_matrix(X, "X", x_names)
    if not isinstance(group_name, str):
        raise DataError(f"group_name must be text, not {type(group_name).__name__}")
    several = _is_several(groups)
    if several:
        terms = _several_terms(groups, Z, z_names, covariance, n)
        if group_name != _GROUP:
            raise DataError("group_name is for one grouping factor: groups names them already")
    else:
        for what, value in (("Z", Z), ("z_names", z_names), ("covariance", covariance)):
            if isinstance(value, Mapping):
                raise DataError(f"{what} is a mapping, so groups must be one too: name its factors")
        terms = [_array_term(group_name, groups, Z, z_names, covariance, n, "")]
    if weights is not None:
        weights = numeric_column(weights, "weights")
    if offset is not None:
        offset = numeric_column(offset, "offset")
    _check_rows("y", n, X=X, weights=weights, offset=offset)
    columns = [(response, y), *zip(names, X.T, strict=True)]
    for term in terms:
        columns += term.columns(several)
    columns += [
        (name, a) for name, a in (("weights", weights), ("offset", offset)) if a is not None
    ]
    rows, dropped_by = complete_rows(missing_values(columns, index), missing)
    index = index[rows]
    check_response(response, y[rows], index)
    if offset is not None:
        check_range(offset[rows][:, None], ["offset"], smallest=0.0)
    random = [
        RandomTerm(plain_names(term.effects), quote(term.name), term.covariance) for term in terms
    ]
    groups = [group_rows(term.name, [term.labels[rows]]) for term in terms]
    blocks = []
    for i, (spec, term) in enumerate(zip(random, terms, strict=True)):
        own = np.array(term.Z[rows], order="F")
        structure, effects = _prepared(spec, term.effects), term.effects
        blocks.append(RandomBlock(spec, i, own, effects, structure, plain_terms(effects, own)))
    check_groups([grouping for grouping, _ in groups], blocks)
    X = np.array(X[rows], order="F")
    return Design(
        spec=ModelSpec(quote(response), plain_names(names), tuple(random)),
        response_name=response,
        y=np.array(y[rows]),
        X=X,
        x_names=names,
        terms=plain_terms(names, X),
        blocks=tuple(blocks),
        groupings=with_relationships([grouping for grouping, _ in groups], relmat),
        weights=None if weights is None else prior_weights(weights[rows], index),
        offset=None if offset is None else np.array(offset[rows]),
        index=index,
        n_dropped=n - len(index),
        dropped_by=dropped_by,
        _recipe=_ArrayRecipe(
            x_names=names,
            factors=tuple(
                _Factor(term.name, term.effects, key, term.intercept)
                for term, (_, key) in zip(terms, groups, strict=True)
            ),
            several=several,
            has_offset=offset is not None,
        ),
    )


@dataclass(frozen=True, eq=False)
class _ArrayTerm:
    """One random term as given.

    Args:
        name: name of its grouping factor.
        labels: (n,) group labels.
        Z: (n, q) random-effects columns.
        effects: (q,) their names.
        intercept: whether a random intercept stood in for Z.
        covariance: the covariance structure.
    """

    name: str
    labels: pd.Series
    Z: np.ndarray
    effects: tuple[str, ...]
    intercept: bool
    covariance: str | Covariance

    def columns(self, several: bool) -> list[tuple[str, Any]]:
        """What may have missing values, named for messages."""
        suffix = f" | {self.name}" if several else ""
        effects = [f"{effect}{suffix}" for effect in self.effects]
        return [*zip(effects, self.Z.T, strict=True), (self.name, self.labels)]


def _array_term(
    name: str, labels: Any, Z: Any, z_names: Any, covariance: Any, n: int, at: str
) -> _ArrayTerm:
    """One random term, checked; `at` follows the names of the arguments in messages."""
    intercept = Z is None
    if intercept:
        given = ["Intercept"] if z_names is None else as_names(z_names, f"z_names{at}")
        Z, effects = np.ones((n, 1)), tuple(map(str, given))
        if len(effects) != 1:
            raise DataError(
                f"z_names{at} needs one name: without Z there is a random intercept only"
            )
    else:
        Z, effects = _as_matrix(Z, "Z", z_names, at)
        if not effects:
            raise DataError(f"Z{at} has no columns: give at least one, or leave Z out")
    labels = one_dimensional(labels, f"groups{at}")
    _check_rows("y", n, **{f"groups{at}": labels, f"Z{at}": Z})
    return _ArrayTerm(name, labels, Z, effects, intercept, canonical(covariance))


def _several_terms(groups: Any, Z: Any, z_names: Any, covariance: Any, n: int) -> list[_ArrayTerm]:
    """One term for each grouping factor."""
    factors = {str(name): groups[name] for name in groups}
    if not factors:
        raise DataError("groups names no grouping factor: give at least one")
    if len(factors) < len(list(groups)):
        raise DataError("groups names a grouping factor more than once: rename its columns")
    if isinstance(covariance, (str, Covariance)):
        covariance = dict.fromkeys(factors, covariance)
    options = {"Z": Z, "z_names": z_names, "covariance": covariance}
    for what, value in options.items():
        if value is None:
            options[what] = {}
        elif not isinstance(value, Mapping):
            raise DataError(
                f"{what} must be a mapping from the names of the grouping factors, as groups is, "
                f"not {type(value).__name__}"
            )
        else:
            options[what] = _by_name(what, value, factors)
    return [
        _array_term(
            name,
            labels,
            options["Z"].get(name),
            options["z_names"].get(name),
            options["covariance"].get(name, "us"),
            n,
            f"[{name!r}]",
        )
        for name, labels in factors.items()
    ]


def _by_rows(y: Any, X: Any, groups: Any, Z: Any, **others: Any) -> dict[str, Any]:
    """All arguments that have a value or more for each row, by what messages call them."""
    found = {"y": y, "X": X}
    for what, given in (("groups", groups), ("Z", Z)):
        if isinstance(given, Mapping):
            found |= {f"{what}[{name!r}]": values for name, values in given.items()}
        else:
            found[what] = given
    return found | others


def _is_several(groups: Any) -> bool:
    return isinstance(groups, (Mapping, pd.DataFrame))


def _by_name(what: str, given: Any, known: Collection[str]) -> dict[str, Any]:
    """A mapping or frame as a dict by the names of grouping factors."""
    found = {str(name): given[name] for name in given}
    for name in found:
        if name not in known:
            raise DataError(
                f"{what} has the name {name!r}, which is no grouping factor; the grouping "
                f"factors: {listing(map(repr, known))}"
            )
    return found


def _prepared(term: RandomTerm, effects: tuple[str, ...]) -> Covariance:
    """The covariance structure of a term; its effects are in the order of the columns."""
    told = Effects(effects, effects, True, str(term), f"Z of {term.group}")
    return structure_of(term.covariance).prepare(told)


@dataclass(frozen=True, eq=False)
class _Factor:
    """One grouping factor of a design made from arrays.

    Args:
        name: its name.
        z_names: names of the columns of Z.
        key: its levels.
        intercept: whether a random intercept stood in for Z.
    """

    name: str
    z_names: tuple[str, ...]
    key: GroupKey
    intercept: bool


@dataclass(frozen=True, eq=False)
class _ArrayRecipe(Recipe):
    """Recipe of a design made from arrays.

    Args:
        x_names: names of the columns of X.
        factors: the grouping factors.
        several: whether groups and Z are mappings by the names of the factors.
        has_offset: whether there was an offset.
    """

    x_names: tuple[str, ...]
    factors: tuple[_Factor, ...]
    several: bool
    has_offset: bool

    def apply(self, data: Any, asked: Sequence[bool], offset: Any) -> NewDesign:
        """See `Design.new_data`."""
        if not isinstance(data, Mapping) or "X" not in data:
            raise TypeError("this design was made from arrays: pass a dict with 'X' (and 'groups')")
        given = (data.get(name) for name in ("y", "X", "groups", "Z"))
        check_same_rows(_by_rows(*given, offset=offset))
        X = _new_matrix(data["X"], "X", self.x_names)
        n = len(X)
        columns = [*zip(self.x_names, X.T, strict=True)]
        Z: list[np.ndarray | None] = []
        codes: list[np.ndarray | None] = []
        for factor, want in zip(self.factors, asked, strict=False):
            if not want:
                Z.append(None)
                codes.append(None)
                continue
            at = f"[{factor.name!r}]" if self.several else ""
            labels = self._given(data, "groups", factor, at)
            columns_of_z = np.ones(n) if factor.intercept else None
            matrix = _new_matrix(
                self._given(data, "Z", factor, at, columns_of_z), f"Z{at}", factor.z_names
            )
            labels = one_dimensional(labels, f"groups{at}").rename(factor.name)
            _check_rows("X", n, **{f"groups{at}": labels, f"Z{at}": matrix})
            columns += [*zip(factor.z_names, matrix.T, strict=True), (factor.name, labels)]
            Z.append(matrix)
            codes.append(factor.key.codes([labels]))
        offset = needed_offset(self.has_offset or None, offset)
        if offset is not None:
            offset = np.array(numeric_column(offset, "offset"))
            _check_rows("X", n, offset=offset)
            columns.append(("offset", offset))
        index = pd.RangeIndex(n)
        missing = any_missing(missing_values(columns, index), n)
        for array in (X, *Z, offset):
            if array is not None:
                array[missing] = np.nan
        return NewDesign(X, tuple(Z), tuple(codes), offset, index, missing)

    def _given(
        self, data: Mapping[str, Any], what: str, factor: _Factor, at: str, default: Any = None
    ) -> Any:
        """`groups` or `Z` of one factor in new data."""
        given = data.get(what)
        if self.several and given is not None:
            if not _is_several(given):
                raise DataError(
                    f"{what!r} of the new data must be a mapping from the names of the grouping "
                    f"factors, not {type(given).__name__}"
                )
            known = [known.name for known in self.factors]
            given = _by_name(what, given, known).get(factor.name)
        given = default if given is None else given
        if given is None:
            raise DataError(f"the new data lack {what!r}{f' of {factor.name!r}' if at else ''}")
        return given


def _new_matrix(values: Any, what: str, names: Sequence[str]) -> np.ndarray:
    matrix, found = _as_matrix(values, what)
    if matrix.shape[1] != len(names):
        raise DataError(f"{what} has {matrix.shape[1]} columns, the model has {len(names)}")
    if isinstance(values, pd.DataFrame) and found != names and not set(found).isdisjoint(names):
        raise DataError(
            f"the columns of {what} are {listing(found)}, and those of the fit {listing(names)}: "
            "reorder them"
        )
    return np.array(matrix)


def _as_matrix(
    values: Any, what: str, names: Sequence[str] | None = None, at: str = ""
) -> tuple[np.ndarray, tuple[str, ...]]:
    """`X` or `Z` as a matrix, and names for its columns."""
    if isinstance(values, pd.DataFrame):
        found = [str(name) for name in values.columns]
        columns = [numeric_column(values.iloc[:, j], name) for j, name in enumerate(found)]
        matrix = np.array(columns).reshape(len(found), len(values)).T
    else:
        try:
            matrix = real_numbers(values, f"{what}{at}")
        except DataError:
            raise
        except (TypeError, ValueError):
            sparse = ": it is sparse, pass .toarray()" if hasattr(values, "toarray") else ""
            raise DataError(f"{what}{at} must be numeric{sparse}") from None
        if matrix.ndim == 1:
            matrix = matrix[:, None]
        if matrix.ndim != 2:
            raise DataError(f"{what}{at} must be two-dimensional, its shape is {matrix.shape}")
        found = [f"{what.lower()}{j + 1}" for j in range(matrix.shape[1])]
    if names is not None:
        names = as_names(names, f"{what.lower()}_names{at}")
        if len(names) != len(found):
            raise DataError(
                f"{what.lower()}_names{at} must hold one name for each of the {len(found)} columns "
                f"of {what}{at}, not {names!r}"
            )
        found = [str(name) for name in names]
    check_unique(found, f"{what}{at}")
    return matrix, tuple(found)


def _check_rows(reference: str, n: int, **arrays: Any) -> None:
    for name, values in arrays.items():
        if values is not None and len(values) != n:
            raise DataError(f"{name} has {len(values)} rows, but {reference} has {n}")


def quote(name: str) -> str:
    """A name as a formula has it: in backticks unless it is a plain word."""
    return name if name.isidentifier() else f"`{name.replace('`', '')}`"


def plain_names(names: Sequence[str]) -> str:
    """Names of columns -> a part of a formula."""
    if not names:
        return "0"
    intercept = "1" if names[0] == "Intercept" else "0"
    return " + ".join([intercept, *(quote(name) for name in names if name != "Intercept")])
