"""Arrays without a formula -> `Design`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .frames import (
    DataError,
    any_missing,
    complete_rows,
    missing_values,
    numeric_column,
    one_dimensional,
)
from .levels import GroupKey, group_rows
from .matrices import (
    Design,
    NewDesign,
    RandomBlock,
    check_response,
    check_unique,
    needed_offset,
    prior_weights,
)
from .spec import ModelSpec, RandomTerm

__all__ = ["design_from_arrays"]


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
    response = str(y.name) if isinstance(y, pd.Series) and y.name is not None else "y"
    index = y.index if isinstance(y, pd.Series) else None
    y = numeric_column(y, "the response y")
    n = len(y)
    if n == 0:
        raise DataError("the data have no rows")
    index = pd.RangeIndex(n) if index is None else index
    X, names = _as_matrix(X, "X", x_names)
    intercept = Z is None
    if intercept:
        Z, effects = np.ones((n, 1)), tuple(z_names or ("Intercept",))
        if len(effects) != 1:
            raise DataError("z_names needs one name: without Z there is a random intercept only")
    else:
        Z, effects = _as_matrix(Z, "Z", z_names)
        if not effects:
            raise DataError("Z has no columns: give at least one, or leave Z out")
    labels = one_dimensional(groups, "groups")
    if weights is not None:
        weights = numeric_column(weights, "weights")
    if offset is not None:
        offset = numeric_column(offset, "offset")
    _check_rows("y", n, X=X, groups=labels, Z=Z, weights=weights, offset=offset)
    columns = [
        (response, y),
        *zip(names, X.T, strict=True),
        *zip(effects, Z.T, strict=True),
        (group_name, labels),
        *((name, a) for name, a in (("weights", weights), ("offset", offset)) if a is not None),
    ]
    rows, dropped_by = complete_rows(missing_values(columns, index), missing)
    index = index[rows]
    check_response(response, y[rows], index)
    grouping, key = group_rows(group_name, [labels[rows]])
    term = RandomTerm(_plain_names(effects), _quote(group_name), covariance)
    return Design(
        spec=ModelSpec(_quote(response), _plain_names(names), (term,)),
        response_name=response,
        y=np.array(y[rows]),
        X=np.array(X[rows], order="F"),
        x_names=names,
        blocks=(RandomBlock(term, 0, np.array(Z[rows], order="F"), effects),),
        groupings=(grouping,),
        weights=None if weights is None else prior_weights(weights[rows], index),
        offset=None if offset is None else np.array(offset[rows]),
        index=index,
        n_dropped=n - len(index),
        dropped_by=dropped_by,
        _recipe=_ArrayRecipe(names, effects, group_name, key, intercept, offset is not None),
    )


@dataclass(frozen=True, eq=False)
class _ArrayRecipe:
    """Recipe of a design made from arrays.

    Args:
        x_names: names of the columns of X.
        z_names: names of the columns of Z.
        group_name: name of the grouping factor.
        key: its levels.
        intercept: whether a random intercept stood in for Z.
        has_offset: whether there was an offset.
    """

    x_names: tuple[str, ...]
    z_names: tuple[str, ...]
    group_name: str
    key: GroupKey
    intercept: bool
    has_offset: bool

    def apply(self, data: Any, need_groups: bool, offset: Any) -> NewDesign:
        """See `Design.new_data`."""
        if not isinstance(data, Mapping) or "X" not in data:
            raise TypeError("this design was made from arrays: pass a dict with 'X' (and 'groups')")
        X = self._matrix(data["X"], "X", self.x_names)
        n = len(X)
        columns = [*zip(self.x_names, X.T, strict=True)]
        Z: tuple[np.ndarray, ...] = ()
        codes: tuple[np.ndarray, ...] = ()
        if need_groups:
            given = np.ones(n) if self.intercept else None
            for name, default in (("groups", None), ("Z", given)):
                if data.get(name, default) is None:
                    raise DataError(f"the new data lack {name!r}")
            Z = (self._matrix(data.get("Z", given), "Z", self.z_names),)
            labels = one_dimensional(data["groups"], "groups").rename(self.group_name)
            _check_rows("X", n, groups=labels, Z=Z[0])
            columns += [*zip(self.z_names, Z[0].T, strict=True), (self.group_name, labels)]
            codes = (self.key.codes([labels]),)
        offset = needed_offset(self.has_offset or None, offset)
        if offset is not None:
            offset = np.array(numeric_column(offset, "offset"))
            _check_rows("X", n, offset=offset)
            columns.append(("offset", offset))
        index = pd.RangeIndex(n)
        missing = any_missing(missing_values(columns, index), n)
        for array in (X, *Z, *([] if offset is None else [offset])):
            array[missing] = np.nan
        return NewDesign(X, Z, codes, offset, index, missing)

    @staticmethod
    def _matrix(values: Any, what: str, names: Sequence[str]) -> np.ndarray:
        matrix = np.array(_as_matrix(values, what)[0])
        if matrix.shape[1] != len(names):
            raise DataError(f"{what} has {matrix.shape[1]} columns, the model has {len(names)}")
        return matrix


def _as_matrix(
    values: Any, what: str, names: Sequence[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """`X` or `Z` as a matrix, and names for its columns."""
    if isinstance(values, pd.DataFrame):
        found = [str(name) for name in values.columns]
        columns = [numeric_column(values.iloc[:, j], name) for j, name in enumerate(found)]
        matrix = np.array(columns).reshape(len(found), len(values)).T
    else:
        try:
            matrix = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError):
            raise DataError(f"{what} must be numeric") from None
        if matrix.ndim == 1:
            matrix = matrix[:, None]
        if matrix.ndim != 2:
            raise DataError(f"{what} must be two-dimensional, its shape is {matrix.shape}")
        found = [f"{what.lower()}{j + 1}" for j in range(matrix.shape[1])]
    if names is not None:
        if isinstance(names, str) or len(names) != len(found):
            raise DataError(
                f"{what.lower()}_names must hold one name for each of the {len(found)} columns of "
                f"{what}, not {names!r}"
            )
        found = [str(name) for name in names]
    check_unique(found, what)
    return matrix, tuple(found)


def _check_rows(reference: str, n: int, **arrays: Any) -> None:
    for name, values in arrays.items():
        if values is not None and len(values) != n:
            raise DataError(f"{name} has {len(values)} rows, but {reference} has {n}")


def _quote(name: str) -> str:
    return name if name.isidentifier() else f"`{name.replace('`', '')}`"


def _plain_names(names: Sequence[str]) -> str:
    """Names of columns -> a part of a formula."""
    if not names:
        return "0"
    intercept = "1" if names[0] == "Intercept" else "0"
    return " + ".join([intercept, *(_quote(name) for name in names if name != "Intercept")])
