"""What is asked of a batch: its design, where the responses come from, and the work to be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from ..constraints import Settings
from ..design import DataError, Design, build_design
from ..encoding import Factor, factor_names
from ..fit import warn_of_steps
from ..formula import FormulaError, parse_formula, parse_response
from ..frames import as_table, in_rows_of, listing, n_rows
from ..safe import Evaluate
from ..simulate import check_count
from ..spec import ModelSpec
from .changing import changing, scanned_design, with_column
from .result import hypotheses
from .sources import Chunks, Columns, columns, head
from .varied import Block, Varied, read_columns, read_varied, varying_options
from .varied_work import varied_work
from .work import Work

CHUNK_BYTES = 1 << 27
"""Most bytes of responses, in double precision, that are worked on at once."""
PLACEHOLDER = "(response)"
"""Column that stands for the response where a design is made: no name that data have."""
CANDIDATES = 32
"""Responses among which one is sought that lends the others a start."""


def begin(
    formula: Any,
    data: Any,
    responses: Any,
    settings: Settings,
    tests: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    names: Any = None,
    scan: Mapping[str, Any] | None = None,
) -> tuple[Design, Columns | Chunks | Varied, Work]:
    """Read the design and what each model has of its own, and say what is to be done with them.

    Args:
        formula: the model.
        data: covariates and groups.
        responses: the responses.
        settings: how to fit.
        tests: hypotheses.
        options: of the design.
        names: names of the responses.
        scan: a column of the design that changes from model to model, by name.
    """
    spec, label = _specification(formula, data, options.get("evaluate", "python"))
    table = _placed(data)
    varying, options = varying_options(options, as_table(data))
    columns_changed: tuple[int, ...] = ()
    if scan is None:
        design = build_design(spec, table, **options)
    else:
        name, values = changing(scan)
        changed = read_columns("scan", values, as_table(data), np.arange(n_rows(table)))
        design, columns_changed = scanned_design(
            spec, table, name, lambda own: build_design(spec, own, **options)
        )
        if len(changed.names) == 1:  # the same for all models, as any other
            design = build_design(spec, with_column(table, name, changed.column(0)), **options)
        else:
            varying["scan"] = changed
    warn_of_steps(design)
    design = _labelled(design, label)
    rows = np.asarray(design.index, dtype=np.int64)
    source = columns(responses, as_table(data), rows, names)
    if not varying:
        work = Work(lent(design, source), settings, hypotheses(tests, design.x_names))
        return design, source, work
    if isinstance(source, Chunks):
        raise DataError(
            f"responses is an iterator, which does not go with {listing(varying)} of each: pass an "
            "array, a data frame, or a file"
        )
    parts = {name: replace(part, rows=rows) for name, part in varying.items()}
    varied = read_varied({"responses": source, **parts}, columns_changed)
    asked = hypotheses(tests, design.x_names)
    if set(varying) == {"offset"}:
        return design, varied, Work(lent(design, varied), settings, asked)
    weighted = "weights" in varying
    work = varied_work(lent(design, varied), settings, asked, columns_changed, weighted)
    return design, varied, work


def check_chunk(chunk: Any) -> None:
    """Raise unless it is None or a number of responses."""
    if chunk is not None:
        check_count(chunk, "chunk")


def block_size(chunk: int | None, n: int) -> int:
    """Return how many responses of n rows are worked on at once."""
    return chunk or max(1, min(1 << 16, CHUNK_BYTES // (8 * n)))


def lent(design: Design, source: Columns | Chunks | Varied) -> Design:
    """Return the design with the first response that varies, from which fits may start.

    The same for the same responses, whichever of them are fitted first, and where.
    """
    first: Any = head(source, CANDIDATES)
    for y in (first.y if isinstance(first, Block) else first).T:
        known = np.isfinite(y)
        if 2 * known.sum() > len(y) and y[known].max() > y[known].min():
            return replace(design, y=np.where(known, y, y[known].mean()))
    return design


def _specification(formula: Any, data: Any, evaluate: Evaluate) -> tuple[ModelSpec, str]:
    """Return the model with a placeholder for its response, and the label of that."""
    if isinstance(formula, str):
        label, tilde, rest = formula.partition("~")
        if not tilde:
            parse_formula(formula)  # raises
        spec = parse_formula(f"response ~ {rest}", evaluate=evaluate)
        label = label.strip() or "response"
    elif isinstance(formula, ModelSpec):
        spec, label = formula, formula.response
    else:
        raise TypeError(f"formula must be text or a ModelSpec, not {type(formula).__name__}")
    _check_label(label, data)
    return replace(spec, response=f"`{PLACEHOLDER}`"), label


def _placed(data: Any) -> Any:
    """Return the data with a response that no design explains; positions are the rows' labels."""
    table = as_table(data)
    if PLACEHOLDER in table:
        raise DataError(
            f"data has a column named {PLACEHOLDER!r}, which stands for responses: rename it"
        )
    if isinstance(table, pd.DataFrame):
        table = table.reset_index(drop=True)
    return with_column(table, PLACEHOLDER, np.random.default_rng(0).normal(size=n_rows(table)))


def _labelled(design: Design, label: str) -> Design:
    """Return a design whose response is called what the user calls it."""
    return replace(design, response_name=label, spec=replace(design.spec, response="response"))


def _check_label(label: str, data: Any) -> None:
    """Raise for a label that is an expression in columns of the data: nothing would evaluate it."""
    try:
        factor = parse_response(label)
    except FormulaError:
        return
    columns = [name for name in factor_names(factor)[0] if name in as_table(data)]
    if columns and factor.eval_method is not Factor.EvalMethod.LOOKUP:
        raise FormulaError(
            f"the responses are those of responses=, as they are, and not `{label}`: make columns "
            "of what is meant, and leave the left of `~` empty"
        )


def read_design(formula: Any, data: Any, **options: Any) -> tuple[Design, np.ndarray]:
    """Return the design, its response a placeholder, and the positions of its rows in the data."""
    spec, label = _specification(formula, data, options.get("evaluate", "python"))
    for name in ("weights", "offset"):
        options[name] = in_rows_of(options.get(name), name, as_table(data))
    design = build_design(spec, _placed(data), **options)
    warn_of_steps(design)
    return _labelled(design, label), np.asarray(design.index, dtype=np.int64)
