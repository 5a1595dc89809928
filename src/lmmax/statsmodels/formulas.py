"""Formulas to matrices, by the formula engine of statsmodels, and the rows that they use."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.formula._manager import FormulaManager
from statsmodels.tools.sm_exceptions import MissingDataError

from ..formula import FormulaError, is_arithmetic
from ..frames import DataError, check_same_rows, unknown_column
from .components import Component, FormulaVCSpec, from_matrices

SHOWN = 100
"""Most rows on which the engine is asked how it sees a factor: its matrices are dense."""
_FACTOR = re.compile(r"~?\s*(?:0\s*\+|-\s*1\s*\+)\s*(C\(\s*[^\W\d]\w*\s*\)|[^\W\d]\w*)\s*")


def only_factor(formula: str) -> tuple[str, str] | None:
    """Return the factor of a formula ``0 + C(f)`` or ``0 + x``, and its variable; else None."""
    match = _FACTOR.fullmatch(formula)
    if match is None:
        return None
    text = match[1]
    return text, text[2:-1].strip() if text.startswith("C(") else text


def depth(env: Any, above: int) -> Any:
    """Return where names are looked up, seen from a call that many frames below the user's."""
    if env is None:
        return above
    if isinstance(env, int | np.integer):
        return FormulaManager().get_empty_eval_env() if env == -1 else above + int(env)
    return env


# --- rows -----------------------------------------------------------------------------------


def check_formulas(formula: Any, re_formula: Any, vc_formula: Any) -> None:
    """Raise for what is no formula."""
    if isinstance(formula, str) and not formula.partition("~")[0].strip():
        raise DataError(f"formula={formula!r} has no response: write 'y ~ x'")
    if isinstance(formula, str) and is_arithmetic(left := formula.partition("~")[0].strip()):
        # The engine takes terms away from the left-hand side, or crosses them.
        raise FormulaError(f"the response of formula={formula!r} is arithmetic: write I({left})")
    if re_formula is not None and not isinstance(re_formula, str):
        raise TypeError(f"re_formula={re_formula!r} must be a string, such as '~ x'")
    if vc_formula is None:
        return
    if not isinstance(vc_formula, Mapping):
        raise TypeError("vc_formula must be a dict of names to formulas, {'a': '0 + C(a)'}")
    for name, text in vc_formula.items():
        if not isinstance(text, str):
            raise TypeError(f"vc_formula[{name!r}]={text!r} must be a string, such as '0 + C(a)'")


def select_rows(
    data: Any,
    groups: Any,
    subset: Any,
    missing: str,
    formula: str,
    re_formula: str | None,
    vc_formula: Mapping[str, str] | None,
) -> tuple[Any, np.ndarray]:
    """Return the rows asked for that are complete, and their group labels.

    Raises:
        DataError: if there is no column of the groups' name, or missing values without
            ``missing="drop"``.
    """
    if missing not in ("none", "drop", "raise"):
        raise ValueError(f"missing={missing!r} must be 'none', 'drop' or 'raise'")
    if groups is None:
        raise DataError("groups is None; it needs the name of a column, or labels")
    data = _as_frame(data)
    check_same_rows({"data": data, "groups": groups})
    if isinstance(groups, str):
        if groups not in data.columns:
            raise unknown_column(groups, data.columns, "groups")
        labels = np.asarray(data[groups])
    else:
        labels = np.asarray(groups)
    if len(labels) != len(data):
        raise DataError(f"groups has {len(labels)} labels, data have {len(data)} rows")
    if subset is not None:
        position = pd.Series(np.arange(len(data)), index=data.index)
        rows = np.asarray(position.loc[subset])
        data, labels = data.iloc[rows], labels[rows]
    texts = [formula, *([re_formula] if re_formula else []), *(vc_formula or {}).values()]
    for name in data.columns[[pd.api.types.is_complex_dtype(kind) for kind in data.dtypes]]:
        if name in names(texts):
            raise DataError(f"column {name!r} is complex: take its real part")
    if missing == "drop":
        used = [name for name in names(texts) if name in data.columns]
        complete = data[used].notna().all(axis=1).to_numpy() & pd.notna(labels)
        if not complete.all():
            data, labels = data[complete], labels[complete]
    elif pd.isna(labels).any():
        raise MissingDataError("groups has missing values: use missing='drop'")
    if not len(data):
        raise DataError("no row is left: see subset and missing")
    return data, labels


def _as_frame(data: Any) -> pd.DataFrame:
    if data is None:
        raise DataError("data is None; it needs a data frame")
    if isinstance(data, pd.DataFrame):
        return data
    return data.to_pandas() if hasattr(data, "to_pandas") else pd.DataFrame(data)


def names(texts: Iterable[str]) -> list[str]:
    """Return all names and quoted names in formulas, in order."""
    found: dict[str, None] = {}
    for text in texts:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME:
                found[token.string] = None
            elif token.type == tokenize.STRING:
                found[str(ast.literal_eval(token.string))] = None
    return list(found)


# --- designs --------------------------------------------------------------------------------


def random_effects(
    formula: str, data: pd.DataFrame, group_name: str, env: Any
) -> tuple[np.ndarray, list[str]]:
    """Return the random-effects design, and names in which the intercept is the group's."""
    if formula.strip() in ("1", "~1", "~ 1"):
        return np.ones((len(data), 1)), [group_name]
    env = env + 1 if isinstance(env, int) else env
    found = _evaluate("re_formula", formula, data, env)
    columns = [name.replace("Intercept", group_name) for name in map(str, found.columns)]
    return np.asarray(found, dtype=float), columns


def variance_components(
    formulas: Mapping[str, str],
    data: pd.DataFrame,
    codes: np.ndarray,
    labels: Sequence[Any],
    sparse: bool,
    env: Any,
) -> FormulaVCSpec:
    """Evaluate the formulas of variance components in each group by itself.

    A formula of one factor, ``0 + C(f)`` or ``0 + x``, which is nearly all of them, is evaluated
    for all groups at once; rows of the first group tell whether the engine sees it in the same way.
    """
    env = env + 1 if isinstance(env, int) else env
    rows = np.split(
        np.argsort(codes, kind="stable"),
        np.cumsum(np.bincount(codes, minlength=len(labels)))[:-1],
    )
    components, columns = [], []
    for name in sorted(formulas):
        found = _one_factor(str(name), formulas[name], data, codes, rows, env)
        if found is None:
            found = _by_group(str(name), formulas[name], data, rows, labels, env)
        components.append(found[0])
        columns.append(found[1])
    return FormulaVCSpec(components, rows, columns, sparse)


def _evaluate(what: str, formula: str, data: pd.DataFrame, env: Any) -> pd.DataFrame:
    env = env + 1 if isinstance(env, int) else env
    found = FormulaManager().get_matrices(formula, data, eval_env=env, pandas=True)
    if not isinstance(found, pd.DataFrame):
        raise DataError(f"{what} {formula!r} has a response; write one side only, '~ x'")
    if len(found) != len(data):
        raise MissingDataError(f"{what} {formula!r} has missing values: use missing='drop'")
    if any(map(pd.api.types.is_complex_dtype, found.dtypes)):
        raise DataError(f"{what} {formula!r} gives complex numbers: take their real part")
    return found


def _by_group(
    name: str,
    formula: str,
    data: pd.DataFrame,
    rows: Sequence[np.ndarray],
    labels: Sequence[Any],
    env: Any,
) -> tuple[Component, list[list[str]]]:
    env = env + 1 if isinstance(env, int) else env
    designs = []
    for here in rows:  # no comprehension, which would be one more frame below the user's
        designs.append(_evaluate(f"vc_formula of {name!r}", formula, data.iloc[here], env))
    columns = [list(map(str, design.columns)) for design in designs]
    mats = [np.asarray(design, dtype=float) for design in designs]
    return from_matrices(name, mats, rows, labels), columns


def _one_factor(
    name: str,
    formula: str,
    data: pd.DataFrame,
    codes: np.ndarray,
    rows: Sequence[np.ndarray],
    env: Any,
) -> tuple[Component, Sequence[Sequence[str]]] | None:
    """Return the component of a formula of one factor, None if it is another formula."""
    factor = only_factor(formula)
    if factor is None:
        return None
    text, variable = factor
    if variable not in data.columns:
        return None
    values, what = data[variable], f"vc_formula of {name!r}"
    if values.isna().any():
        return None
    env = env + 1 if isinstance(env, int) else env
    m, n = len(rows), len(data)
    numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    if numeric and text == variable:
        number, shown = values.to_numpy(dtype=float), rows[0][:SHOWN]
        first = _evaluate(what, formula, data.iloc[shown], env)
        if first.shape[1] != 1 or not np.array_equal(first.to_numpy()[:, 0], number[shown]):
            return None
        seen = np.flatnonzero(number)
        part = Component(name, seen, codes[seen], number[seen], np.arange(m + 1))
        return part, [list(map(str, first.columns))] * m
    if pd.api.types.is_bool_dtype(values):
        # The engine gives such a variable both columns in every group.
        values = values.astype(pd.CategoricalDtype([False, True]))
    try:
        level, known = pd.factorize(values, sort=True)
    except TypeError:
        return None
    if isinstance(values.dtype, pd.CategoricalDtype):
        known = values.cat.categories
        level, cells = values.cat.codes.to_numpy().astype(np.int64), None
        width = np.full(m, len(known))
        effect = codes * len(known) + level
    else:
        cells, effect = np.unique(codes * len(known) + level, return_inverse=True)
        width = np.bincount(cells // len(known), minlength=m)
    start = np.concatenate([[0], np.cumsum(width)])
    texts = [f"{text}[{label}]" for label in known]
    # Does the engine name and order the columns so, with these entries?
    seen, at = np.unique(level[rows[0]], return_index=True)
    shown = rows[0][np.sort(at[:SHOWN])]
    first = _evaluate(what, formula, data.iloc[shown], env)
    local = np.arange(len(known)) if cells is None else seen[:SHOWN]
    own = [texts[j] for j in local]
    indicator = np.zeros(first.shape)
    if first.shape[1] != len(own) or list(map(str, first.columns)) != own:
        return None
    indicator[np.arange(len(shown)), np.searchsorted(local, level[shown])] = 1.0
    if not np.array_equal(first.to_numpy(dtype=float), indicator):
        return None
    part = Component(name, np.arange(n), effect, np.ones(n), start)
    if cells is None:
        return part, [texts] * m
    every = np.array(texts, dtype=object)[cells % len(known)]
    return part, [part_names.tolist() for part_names in np.split(every, start[1:-1])]
