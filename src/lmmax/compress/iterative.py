"""Many crossed levels: the rows themselves in working coordinates, for matrix-free iterations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..likelihood.problem import Problem
from .layout import Layout
from .scaling import Scaling, scaled


@dataclass(frozen=True)
class Rows:
    """The data in working coordinates, multiplied by the roots of prior weights.

    Attributes:
        X: orthonormal fixed-effects design, (n, p).
        y: residual of the response, of unit length, (n,).
        factors: per factor the group of each row (n,), its columns (n, q_f), and the number of
            groups.
    """

    X: np.ndarray
    y: np.ndarray
    factors: tuple[tuple[np.ndarray, np.ndarray, int], ...]


def compress(y: np.ndarray, layout: Layout) -> tuple[Problem, Rows, Scaling]:
    """Bring a response (n,), its offset removed, and the designs to working coordinates."""
    beta = layout.least_squares(y)
    data = layout.response(y, beta, slice(None))
    Z = [layout.random_columns(at, slice(None)) for at in range(len(layout.factors))]
    if layout.weights is not None:
        root = np.sqrt(layout.weights)
        data *= root
        Z = [z * root for z in Z]
    scaling = scaled(y, layout, beta, float(data[-1] @ data[-1]))
    factors = tuple(
        (factor.codes, z.T, factor.n_groups) for factor, z in zip(layout.factors, Z, strict=True)
    )
    rows = Rows(data[:-1].T, data[-1] / scaling.y_scale, factors)
    return Problem(**scaling.coordinates(layout)), rows, scaling
