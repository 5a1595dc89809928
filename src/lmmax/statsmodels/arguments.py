"""Arguments that are arrays: what is wrong with them, complete rows, and the groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from statsmodels.tools.sm_exceptions import MissingDataError

from ..frames import DataError, plural, row_text
from .components import FormulaVCSpec, VCSpec, checked_length


def check_groups(groups: Any) -> None:
    """Raise if there are none."""
    if groups is None:
        raise DataError("groups is None; it needs the label of each row's group")


def check_spec(exog_vc: Any) -> None:
    """Raise for what is no specification of variance components."""
    # To ask one that came from formulas for its matrices would make them.
    if exog_vc is None or isinstance(exog_vc, FormulaVCSpec):
        return
    if not all(hasattr(exog_vc, name) for name in ("names", "colnames", "mats")):
        raise DataError("exog_vc must be a VCSpec, or a dict of dicts: a matrix by name and group")
    sizes = len(exog_vc.names), len(exog_vc.colnames), len(exog_vc.mats)
    if len(set(sizes)) > 1:
        raise DataError(f"exog_vc has {sizes} names, colnames and mats; give as many of each")


def check_numbers(name: str, values: Any, groups: Any) -> None:
    """Raise unless an argument has a row of finite numbers for each label."""
    if values is None:
        if name == "exog_re":
            return
        hint = ": np.ones((n, 1)) is a constant alone" if name == "exog" else ""
        raise DataError(f"{name} is None; it needs numbers{hint}")
    if len(values) != len(groups):
        raise DataError(f"{name} has {len(values)} rows, but groups has {len(groups)} labels")
    if not len(values):
        raise DataError(f"{name} has no rows")
    if np.ndim(values) == 2 and not np.shape(values)[1] and name == "exog_re":
        raise DataError("exog_re has no columns; leave it out")
    frame = values if isinstance(values, pd.DataFrame) else pd.DataFrame(np.asarray(values))
    index = frame.index if frame is values else getattr(values, "index", frame.index)
    for j, column in enumerate(frame.columns):
        here = frame.iloc[:, j]
        label = f"column {column} of {name}" if np.ndim(values) == 2 else name
        if not pd.api.types.is_numeric_dtype(here.dtype):
            raise DataError(
                f"{label} has the type {here.dtype}, not numbers; convert it with .astype(float), "
                "or use from_formula, which makes indicators of labels"
            )
        if pd.api.types.is_complex_dtype(here.dtype):
            raise DataError(f"{label} is complex: pass its real part if that is what is meant")
        bad = ~np.isfinite(here.to_numpy(dtype=float))
        if bad.any():
            raise MissingDataError(
                f"{label} is missing or infinite in {plural(bad.sum(), 'row')}, first in "
                f"{row_text(index, np.argmax(bad))}: use missing='drop', or leave out the rows"
            )


def as_column(matrix: Any) -> Any:
    """Return a vector as a matrix of one column; pandas objects are left to statsmodels."""
    if matrix is None or isinstance(matrix, (pd.DataFrame, pd.Series)):
        return matrix.to_frame() if isinstance(matrix, pd.Series) else matrix
    array = np.asarray(matrix)
    return array[:, None] if array.ndim == 1 else array


def re_names(exog_re: Any) -> list[Any]:
    """Return the names of the random effects."""
    if isinstance(exog_re, pd.DataFrame):
        # A Series without a name became a column named 0.
        if exog_re.columns.equals(pd.RangeIndex(1)):
            return ["x_re1"]
        return exog_re.columns.tolist()
    return [f"x_re{j + 1}" for j in range(np.asarray(exog_re).shape[1])]


def grouping(groups: Any, n: int) -> tuple[np.ndarray, Any]:
    """Return the codes (n,) and the sorted labels of the groups."""
    labels = np.asarray(groups)
    if labels.shape != (n,):
        raise DataError(f"groups has shape {labels.shape}; it needs one label for each of {n} rows")
    if pd.isna(labels).any():
        raise MissingDataError("groups has missing values: use missing='drop'")
    try:
        codes, found = pd.factorize(labels, sort=True)
    except TypeError:
        codes, found = pd.factorize(labels)
        # Labels of several types have no order of their own.
        order = sorted(range(len(found)), key=lambda i: (type(found[i]).__name__, str(found[i])))
        codes, found = np.argsort(order)[codes], found[order]
    return codes.astype(np.int64), found


def own_labels(groups: Any, codes: np.ndarray) -> list[Any]:
    """Return the labels of the groups as the user's object has them: a Series has Python's."""
    first = np.unique(codes, return_index=True)[1]
    if hasattr(groups, "iloc"):
        return list(groups.iloc[first].tolist())
    return [groups[i] for i in first]


def drop_rows(
    endog: Any, exog: Any, groups: Any, exog_re: Any, exog_vc: VCSpec | None
) -> tuple[Any, Any, Any, Any, VCSpec | None]:
    """Leave out rows with a missing value in any of the arrays."""
    labels = np.asarray(groups)
    n = len(labels)
    complete = pd.notna(labels)
    for name, values in (("endog", endog), ("exog", exog), ("exog_re", exog_re)):
        if values is None:
            continue
        present = pd.notna(np.asarray(values)).reshape(len(values), -1)
        if len(present) != n:
            raise DataError(f"{name} has {len(present)} rows, groups has {n}")
        complete &= present.all(axis=1)
    in_group: list[np.ndarray] = []
    if exog_vc is not None:
        labelled = np.flatnonzero(pd.notna(labels))
        codes, found = grouping(labels[labelled], len(labelled))
        order = labelled[np.argsort(codes, kind="stable")]
        in_group = np.split(order, np.cumsum(np.bincount(codes))[:-1])
        for name, mats in zip(exog_vc.names, exog_vc.mats, strict=True):
            for rows, matrix in zip(in_group, checked_length(name, mats, len(found)), strict=True):
                dense = matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)
                complete[rows] &= pd.notna(dense).reshape(len(rows), -1).all(axis=1)
    if complete.all():
        return endog, exog, groups, exog_re, exog_vc
    if exog_vc is not None:
        left = [i for i, rows in enumerate(in_group) if complete[rows].any()]
        exog_vc = VCSpec(
            exog_vc.names,
            [[names[i] for i in left] for names in exog_vc.colnames],
            [[_take(mats[i], complete[in_group[i]]) for i in left] for mats in exog_vc.mats],
        )
    parts = [None if v is None else _take(v, complete) for v in (endog, exog, exog_re)]
    return parts[0], parts[1], _take(groups, complete), parts[2], exog_vc


def _take(values: Any, mask: np.ndarray) -> Any:
    if isinstance(values, pd.DataFrame | pd.Series) or hasattr(values, "tocsr"):
        return values[mask]
    return np.asarray(values)[mask]
