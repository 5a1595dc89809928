"""Why a response has no fit."""

from __future__ import annotations

import numpy as np

from ..fit import ROUNDING
from ..solve import Status
from .engines import Record

SUSPECT = 1e-20
"""Residual variance, relative to the square of the fit, below which the response is looked at."""

RANK = 1e-10
"""Singular value, relative to the largest, below which columns depend on one another."""


def reasons(y: np.ndarray, X: np.ndarray) -> np.ndarray:
    """Return why responses cannot be fitted; NOT_FINITE for those with which nothing is wrong.

    Args:
        y: responses without missing values, offset removed, a column each, (n, lanes).
        X: the fixed effects, (n, p).
    """
    found = np.full(y.shape[1], int(Status.NOT_FINITE))
    found[np.isinf(y).any(axis=0)] = Status.INFINITE
    at = np.flatnonzero(found == Status.NOT_FINITE)
    if not len(y) or not at.size:
        return found
    level = (y[:, at] == y[0, at]).all(axis=0)
    found[at[level]] = Status.CONSTANT
    at = at[~level]
    # In units in which no square overflows.
    own = y[:, at].astype(float)
    own /= np.abs(own).max(axis=0)
    size = np.linalg.norm(X, axis=0)
    unit = X / np.where(size > 0.0, size, 1.0)
    values = np.linalg.svd(unit, compute_uv=False)
    values = values[values > RANK * values.max(initial=0.0)]
    if len(y) <= len(values):
        found[at] = Status.TOO_FEW
        return found
    rest, total = own, np.linalg.norm(own, axis=0)
    for _ in range(2):
        rest = rest - unit @ np.linalg.lstsq(unit, rest, rcond=RANK)[0]
    condition = values[0] / values[-1] if len(values) else 1.0
    rounding = ROUNDING * np.finfo(float).eps * condition
    found[at[np.linalg.norm(rest, axis=0) <= rounding * total]] = Status.EXPLAINED
    return found


def with_reasons(
    record: Record, y: np.ndarray, X: np.ndarray, offset: np.ndarray | None = None
) -> Record:
    """Return fits with the reason in the status of what cannot be fitted.

    A response that X explains may look like a fit, to its rounding errors.

    Args:
        record: the fits.
        y: the responses, (n, lanes).
        X: the fixed effects, (n, p).
        offset: known part of the mean, (n,).
    """
    lanes = suspects(record, X)
    if not lanes.size:
        return record
    why = reasons(y[:, lanes].astype(float) - (0.0 if offset is None else offset[:, None]), X)
    unfit = why != Status.NOT_FINITE
    return failed(record, lanes[unfit], why[unfit])


def suspects(record: Record, X: np.ndarray) -> np.ndarray:
    """Return the lanes whose response may be such that nothing can be fitted.

    Args:
        record: the fits.
        X: the fixed effects, (n, p).
    """
    squares = np.nan_to_num(record.params) ** 2 * np.mean(X**2, axis=0)
    with np.errstate(invalid="ignore", over="ignore"):
        explained = record.scale <= SUSPECT * squares.max(axis=1, initial=0.0)
    return np.flatnonzero(explained | (record.status == Status.NOT_FINITE))


def failed(record: Record, lanes: np.ndarray, status: np.ndarray | Status) -> Record:
    """Return a record in which some lanes have no fit, and a status that says why."""
    changed = {}
    for name, leaf in record._asdict().items():
        changed[name] = leaf = np.array(leaf)
        if name == "status":
            leaf[lanes] = status
        else:
            leaf[lanes] = np.nan if leaf.dtype.kind == "f" else 0
    return Record(**changed)
