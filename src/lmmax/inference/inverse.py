"""Inverses of information matrices, and the directions that they have no information on.

Parameters must be in steady coordinates (:mod:`lmmax.inference.parameters`), so that which these
directions are does not depend on the units and origins of the data.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RANK = 1e-10
"""Information that is less than this fraction of what there would be without coefficients and
without the other parameters is rounding."""
DEPENDENT = 1e-6
"""A gradient depends on what is unknown if more than this fraction of it lies along there."""


class Inverse(NamedTuple):
    """The inverse of an information matrix where there is information.

    Attributes:
        covariance: zero in the directions without information, (k, k).
        unknown: these directions, (k, r).
        unit: roots of the information that each parameter would have by itself, (k,).
        indefinite: whether information is negative in some of them: the estimates are no maximum
            in the interior there, and nothing is the inverse of a covariance.
    """

    covariance: np.ndarray
    unknown: np.ndarray
    unit: np.ndarray
    indefinite: bool

    def tells(self, gradients: np.ndarray) -> np.ndarray:
        """Return whether the data tell functions with given gradients (..., k)."""
        along = np.linalg.norm(gradients @ self.unknown, axis=-1)
        return np.asarray(along <= DEPENDENT * np.linalg.norm(gradients / self.unit, axis=-1))


def inverted(information: np.ndarray, size: np.ndarray) -> Inverse:
    """Invert an information matrix (k, k).

    Args:
        information: positive definite, but for directions without information, or in which the
            likelihood curves upwards.
        size: the information that each parameter would have by itself, (k,); zero for one that
            moves nothing.
    """
    unit = np.sqrt(np.where(size > 0.0, size, 1.0))
    values, vectors = np.linalg.eigh(information / np.outer(unit, unit))
    rounding = RANK * np.max(np.abs(values), initial=0.0)
    told = values > rounding
    directions = vectors / unit[:, None]
    known = directions[:, told]
    covariance = (known / values[told]) @ known.T
    return Inverse(covariance, directions[:, ~told], unit, bool(np.any(values < -rounding)))
