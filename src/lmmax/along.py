"""Second derivatives of the criterion along chosen directions of D, where it holds no others."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compilation import Compiled, computing
from .compilation_cache import compilation_cache
from .likelihood import Problem, derivatives
from .solve import Point

__all__ = ["hessian_along"]

_along = Compiled(derivatives)


def hessian_along(problem: Problem, point: Point, reml: bool, changes: np.ndarray) -> np.ndarray:
    """Return the criterion's second derivatives along changes of D, then s, (c + 1, c + 1).

    Args:
        problem: compressed data.
        point: where.
        reml: whether the criterion is the restricted one.
        changes: the directions, (c, q, q).
    """
    at: tuple[Any, ...] = (point.D, float(reml), point.s, False, None, changes)
    with computing(), compilation_cache():
        return np.asarray(_along(problem, *at).hessian)
