"""Centre and unit of the response, and the padding of the number of fixed effects."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .layout import Layout


class Scaling(NamedTuple):
    """Where the working response has its origin, and its unit.

    Attributes:
        beta: coefficients (working coordinates) taken out of y, (p,).
        y_scale: root of the sum of squares that was left.
        total: that sum of squares relative to the one of y.
    """

    beta: np.ndarray
    y_scale: float
    total: float

    def coordinates(self, layout: Layout, extra: int = 0) -> dict[str, Any]:
        """Return the fields of a :class:`lmmax.likelihood.Problem`, ``extra`` columns padded."""
        x_inverse, origin = pad_coordinates(layout.fixed.inverse, self.beta / self.y_scale, extra)
        return {
            "n_obs": float(layout.n_obs),
            "n_fixed": float(len(self.beta)),
            "n_groups": layout.n_groups,
            "z_factor": layout.A,
            "z_inverse": layout.A_inverse,
            "x_inverse": x_inverse,
            "x_logdet": float(np.sum(np.log(np.diag(layout.fixed.R)))),
            "beta_origin": origin,
            "y_scale": self.y_scale,
            "log_weights": layout.log_weights,
        }


def scaled(y: np.ndarray, layout: Layout, beta: np.ndarray, total: float) -> Scaling:
    """Return the scaling for a response whose residuals have the sum of squares ``total``."""
    weighted = y if layout.weights is None else y * layout.weights
    squares = max(float(weighted @ y), np.finfo(float).tiny)
    return Scaling(beta, float(np.sqrt(total)) if total > 0.0 else 1.0, float(total) / squares)


def padding(n_fixed: int) -> int:
    """Return how many columns to add to X: data with a few more then share compiled code."""
    return -n_fixed % 4 if n_fixed > 2 else 2 - n_fixed


def pad_fixed(C: np.ndarray, extra: int) -> np.ndarray:
    """Put ``extra`` columns that are nothing but themselves between X and y in ``C``."""
    p = len(C) - 1
    padded = np.eye(p + 1 + extra)
    padded[:p, :p], padded[:p, -1], padded[-1, :p], padded[-1, -1] = (
        C[:p, :p],
        C[:p, p],
        C[p, :p],
        C[p, p],
    )
    return padded


def pad_columns(data: np.ndarray, extra: int, axis: int) -> np.ndarray:
    """Put ``extra`` zero columns before the last one, y, along an axis."""
    if not extra:
        return data
    shape = list(data.shape)
    shape[axis] = extra
    before, y = np.split(data, [data.shape[axis] - 1], axis=axis)
    return np.concatenate([before, np.zeros(shape), y], axis=axis)


def pad_coordinates(
    x_inverse: np.ndarray, beta_origin: np.ndarray, extra: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pad what a problem holds per fixed effect."""
    p = len(x_inverse)
    padded = np.zeros((p + extra, p + extra))
    padded[:p, :p] = x_inverse
    return padded, np.concatenate([beta_origin, np.zeros(extra)])


def rough_variances(y: np.ndarray, layout: Layout, scaling: Scaling) -> np.ndarray:
    """Return a rough relative variance of each random effect, in working coordinates, (q,).

    The sums ``Z_f'r`` over the residuals r have an expected sum of squares that is linear in all
    variances: ``sum_g |Z_f'Z_g|^2 scale D_g + tr(Z_f'Z_f) scale``, but for the few coefficients
    that were estimated.  With ``r'r`` these are as many equations as variances (the quadratic
    forms of Henderson's method, or MINQUE at zero; Rao, 1971).  Never below a tenth of the sampling
    noise of one effect, so that no search starts at a boundary.
    """
    residual = layout.response(y, scaling.beta, slice(None))[-1] / scaling.y_scale
    n = len(residual)
    weights = np.ones(n) if layout.weights is None else layout.weights
    columns, codes, sizes = [], [], []
    for position, factor in enumerate(layout.factors):
        for z in layout.random_columns(position, slice(None)):
            columns.append(z)
            codes.append(factor.codes)
            sizes.append(factor.n_groups)
    q = len(columns)
    left, right = np.zeros((q + 1, q + 1)), np.zeros(q + 1)
    for i in range(q):
        squares = np.bincount(codes[i], weights * columns[i] ** 2, sizes[i])
        sums = np.bincount(codes[i], weights * columns[i] * residual, sizes[i])
        left[i, q] = left[q, i] = squares.sum()
        right[i] = sums @ sums
        for j in range(i + 1):
            products = weights * columns[i] * columns[j]
            if codes[i] is codes[j]:
                meet = np.bincount(codes[i], products, sizes[i])
            else:
                key = codes[i] * sizes[j] + codes[j]
                cells = sizes[i] * sizes[j]
                if cells > 8 * n:
                    key, cells = pd.factorize(key)[0], n
                meet = np.bincount(key, products, cells)
            left[i, j] = left[j, i] = meet @ meet
    left[q, q], right[q] = layout.n_obs, 1.0
    unit = np.sqrt(np.diag(left))
    scaled_left = left / np.outer(unit, unit)
    variances = np.linalg.lstsq(scaled_left, right / unit, rcond=1e-10)[0] / unit
    scale = max(variances[q], 0.1 / layout.n_obs)
    floor = 0.1 * left[:q, q] / np.diag(left)[:q]
    return np.asarray(np.maximum(variances[:q] / scale, floor))
