"""Standard errors of the variance parameters, by the delta method from the full information.

The parameters are the entries of the natural covariance ``Psi`` (lower triangle, row by row), the
scale, and the parameters of covariance structures; see :meth:`Estimates.standard_errors`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..constraints import TermColumns
from ..covariances import slopes, undefined, values_at
from ..estimation import Estimates
from ..rendering import Frame

BLOCK = 512
"""Entries of the covariance whose errors are found together."""


def scale_error(estimates: Estimates) -> float:
    """Return the standard error of the residual variance, NaN if it was fixed."""
    return float(estimates.standard_errors(np.eye(_size(estimates))[-1:])[0])


def matrix_errors(estimates: Estimates) -> np.ndarray:
    """Return standard errors of the entries of ``Psi``, (q, q); NaN where there is none."""
    q = len(estimates.root)
    rows, columns = np.tril_indices(q)
    size = _size(estimates)
    # Some entries at a time: of many effects the identity matrix would be large.
    errors = np.concatenate(
        [
            estimates.standard_errors(np.eye(min(BLOCK, size - 1 - first), size, first))
            for first in range(0, size - 1, BLOCK)
        ]
    )
    errors = np.where(
        _at_boundary(estimates)[rows] | _at_boundary(estimates)[columns], np.nan, errors
    )
    matrix = np.empty((q, q))
    matrix[rows, columns] = matrix[columns, rows] = errors
    return matrix


def _size(estimates: Estimates) -> int:
    """Return the number of covariances and the scale."""
    q = len(estimates.root)
    return q * (q + 1) // 2 + 1


def _at_boundary(estimates: Estimates) -> np.ndarray:
    """Return which effects have variance zero, (q,)."""
    return np.diag(estimates.D) == 0.0


def table(
    estimates: Estimates,
    terms: Sequence[TermColumns],
    names: Sequence[str],
    groups: Sequence[str],
) -> pd.DataFrame:
    """Return the table documented at :meth:`lmmax.Fit.varcorr`.

    Args:
        estimates: the solved model.
        terms: the random terms.
        names: names of the effects, (q,).
        groups: names of the grouping factors.
    """
    q = len(estimates.root)
    Psi = estimates.scale * estimates.D
    sd = np.sqrt(np.diag(Psi))
    vcov_se = matrix_errors(estimates)
    records: list[tuple[str, str | None, str | None, float, float, float, float]] = []

    def entry(i: int, j: int) -> int:
        return max(i, j) * (max(i, j) + 1) // 2 + min(i, j)

    def error(gradient: dict[int, float]) -> float:
        row = np.zeros((1, _size(estimates)))
        for position, value in gradient.items():
            row[0, position] = value
        return float(estimates.standard_errors(row)[0])

    for term in terms:
        group = groups[term.factor]
        here = range(q)[term.columns]
        for i in here:
            se = vcov_se[i, i] / (2.0 * sd[i]) if sd[i] > 0.0 else np.nan
            records.append((group, names[i], None, Psi[i, i], vcov_se[i, i], sd[i], se))
        for i, j in term.pairs:
            i, j = here[i], here[j]
            defined = sd[i] > 0.0 and sd[j] > 0.0
            r = Psi[i, j] / (sd[i] * sd[j]) if defined else np.nan
            se = np.nan
            if defined and 1.0 - abs(r) > 1e-12:
                se = error(
                    {
                        entry(i, j): 1.0 / (sd[i] * sd[j]),
                        entry(i, i): -0.5 * r / Psi[i, i],
                        entry(j, j): -0.5 * r / Psi[j, j],
                    }
                )
            records.append((group, names[j], names[i], Psi[i, j], vcov_se[i, j], r, se))
    scale, scale_se = estimates.scale, scale_error(estimates)
    if estimates.zero_scale:
        scale = 0.0
    sigma = float(np.sqrt(scale))
    sigma_se = scale_se / (2.0 * sigma) if sigma > 0.0 else np.nan
    records.append(("Residual", None, None, scale, scale_se, sigma, sigma_se))
    columns = ["group", "var1", "var2", "vcov", "vcov_se", "sdcor", "sdcor_se"]
    # Objects first: a column of strings would turn None into NaN.
    frame = Frame(records, columns=columns, dtype=object)
    return frame.astype(dict.fromkeys(columns[3:], float))


def structure_table(
    estimates: Estimates, terms: Sequence[TermColumns], names: Sequence[str]
) -> pd.DataFrame:
    """Return the table documented at :meth:`lmmax.Fit.structures`."""
    sigma = float(np.sqrt(estimates.scale))
    k = _size(estimates)
    records: list[tuple[str, str, float, float]] = []
    for part in estimates.constraints.structures:
        here, at = slice(*part.columns), slice(*part.parameters)
        term = next(term for term in terms if term.columns == here)
        theta = estimates.structure_theta[at]
        values = values_at(part.covariance, theta, term.width)
        values = np.where(undefined(part.covariance, values, term.width), np.nan, values)
        slope_of = slopes(part.covariance, theta, term.width, of="values")
        labels = part.covariance.labels(tuple(names[here]))
        for label, is_sd, value, slope in zip(
            labels, part.covariance.is_sd(term.width), values, slope_of, strict=True
        ):
            row = np.zeros((1, k + len(estimates.structure_theta)))
            row[0, k + at.start : k + at.stop] = slope * (sigma if is_sd else 1.0)
            if is_sd:
                row[0, k - 1] = 0.5 * value / sigma
            exists = np.isfinite(value) and not (is_sd and value == 0.0)
            se = float(estimates.standard_errors(row)[0]) if exists else np.nan
            size = float(value) * (sigma if is_sd else 1.0)
            records.append((term.label, label, size, se))
    return Frame(records, columns=["term", "parameter", "estimate", "std err"])
