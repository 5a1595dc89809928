"""Rows to sufficient statistics: after this, no computation depends on the number of rows.

X and each random term are first brought to working coordinates in which their columns are
orthonormal, so that units, offsets and near collinearity cost no digits; see
:class:`lmmax.likelihood.Problem` for the maps.  There is one file for each form of the likelihood.

NumPy on the host, but for the dense matrix of a crossed model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..em import moment_start
from ..likelihood import Problem
from . import crossed, grouped, iterative, nested
from .columns import Factor
from .crossed import Skeleton
from .grouped import Statistics
from .iterative import Rows
from .layout import Engine, EngineError, FactorColumns, Layout, layout
from .nested import Tree
from .scaling import rough_variances

__all__ = [
    "Compression",
    "Engine",
    "EngineError",
    "Factor",
    "FactorColumns",
    "Layout",
    "compress",
    "layout",
]


@dataclass(frozen=True)
class Compression:
    """Sufficient statistics of a model.

    Attributes:
        problem: the optimiser's view, padded, and with one factor merged over equal groups.
        total: sum of squares of the least-squares residuals, relative to that of y.
        start: rough relative variance of each random effect, working coordinates, (q,).
        detail: what finding the conditional effects needs besides the problem: statistics per
            group (one factor), the tree of groups (nested), the designs' analysis (crossed), or
            the rows (iterative).
    """

    problem: Any
    total: float
    start: np.ndarray
    detail: Statistics | Tree | Skeleton | Rows


def compress(
    y: np.ndarray,
    layout: Layout,
    *,
    pad: bool = True,
    earlier: Compression | None = None,
    center: np.ndarray | None = None,
    far_apart: bool = False,
) -> Compression:
    """Compress a response (n,), its offset removed, with the designs of ``layout``.

    Args:
        y: response, (n,).
        layout: the designs.
        pad: round the sizes up to a few values, so that data of similar size share compiled code.
        earlier: the compression of another response, whose work on the designs is used again.
        center: coefficients (working coordinates, units of y) to take out of y first, (p,); None
            for those of least squares.
        far_apart: keep the digits of crossed effects that are far larger than the residual.
    """
    problem: Problem
    detail: Statistics | Tree | Skeleton | Rows
    if layout.engine.name == "grouped":
        problem, detail, scaling = grouped.compress(y, layout, pad=pad, center=center)
        return Compression(problem, scaling.total, np.diag(moment_start(problem)), detail)
    if layout.engine.name == "nested":
        problem, detail, scaling = nested.compress(y, layout, pad=pad, center=center)
    elif layout.engine.name == "iterative":
        problem, detail, scaling = iterative.compress(y, layout)
    else:
        known = earlier.detail if earlier is not None else None
        detail = known if isinstance(known, Skeleton) else crossed.skeleton(layout, pad=pad)
        if far_apart and detail.outside is None and crossed.rotates(layout, detail):
            detail = crossed.rotated(layout, detail)
        problem, scaling = crossed.compress(y, layout, detail, pad=pad, center=center)
    return Compression(problem, scaling.total, rough_variances(y, layout, scaling), detail)
