"""A column of the design that changes from model to model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..design import DataError, Design
from ..encoding import factor_names, offset_factor, term_factors
from ..frames import Table, n_rows
from ..spec import ModelSpec

ROUNDING = 1e-9
"""Relative error within which a column of X is linear in the changing one."""

PROBES = (-2.0, 0.5, 3.0)
"""Values that the changing column takes to see whether the design is linear in it; not the one
that the design itself is made with, so that every row tells."""
SEED = 812_657
"""Of the values: one that the data are not likely to be drawn with as well."""


def changing(scan: Any) -> tuple[str, Any]:
    """Read the `scan` argument of `fit_many`: the name and the values of a column."""
    if not isinstance(scan, Mapping) or len(scan) != 1:
        raise DataError(
            "scan must be a mapping with one entry, the changing column's name in the formula and "
            "its values: scan={'snp': genotypes}"
        )
    ((name, values),) = scan.items()
    return str(name), values


def scanned_design(
    spec: ModelSpec, table: Table, name: str, build: Callable[[Any], Design]
) -> tuple[Design, tuple[int, ...]]:
    """Return the design with ones for the changing column, and which columns of X it changes.

    Args:
        spec: the model.
        table: the data.
        name: name of the changing column in the formula.
        build: makes the design of a table.

    Raises:
        DataError: unless the column is in the formula, in the fixed effects only, and these are
            linear in it.
    """
    fixed = [names for factor in term_factors(spec.fixed) for names in factor_names(factor)[0]]
    for term in spec.random:
        parts = [*term_factors(term.design), *(offset_factor(g) for g in term.group_names)]
        if any(name in factor_names(factor)[0] for factor in parts):
            raise DataError(
                f"scan={name!r} is in the random term {term}: only columns of the fixed effects "
                "can change from model to model"
            )
    for text in spec.offsets:
        if name in factor_names(offset_factor(text))[0]:
            raise DataError(f"scan={name!r} is in offset({text}): pass offset= a column per model")
    if name not in fixed:
        raise DataError(
            f"scan={name!r} is not in the formula, {spec.fixed!r}: add it where the changing "
            "column belongs"
        )
    values = np.random.default_rng(SEED).choice(PROBES, size=n_rows(table))
    with warnings.catch_warnings():
        # Of logarithms of what is negative here.
        warnings.simplefilter("ignore")
        probe = build(with_column(table, name, values))
    own = [factor.expr for factor in term_factors(spec.fixed) if name in factor_names(factor)[0]]
    for expression in own:
        if expression in probe.terms.codings:
            raise _not_linear(name, expression)
    transformed = next((expression for expression in own if expression != name), name)
    try:
        design = build(with_column(table, name, np.ones(len(values))))
    except DataError:
        raise _not_linear(name, transformed) from None
    x = values[np.asarray(probe.index, dtype=np.int64)]
    if len(x) != len(design.y):
        raise _not_linear(name, transformed)
    columns = np.flatnonzero((probe.X != design.X).any(axis=0))
    for j in columns:
        size = np.abs(design.X[:, j]).max() + np.abs(probe.X[:, j]).max()
        if np.abs(probe.X[:, j] - x * design.X[:, j]).max() > ROUNDING * size:
            raise _not_linear(name, design.x_names[j])
    return design, tuple(columns.tolist())


def _not_linear(name: str, term: str) -> DataError:
    return DataError(
        f"{term!r} is not linear in scan={name!r}: the changing column may be multiplied "
        "by others, but not transformed; transform its values before"
    )


def with_column(table: Any, name: str, values: np.ndarray) -> Any:
    """Return a table with one column more, or another in its place."""
    if isinstance(table, pd.DataFrame):
        return table.assign(**{name: values})
    return {**table, name: values}
