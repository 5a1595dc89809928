"""Degrees of freedom by counting, coefficient by coefficient, at the level at which it varies.

The inner-outer rule of Pinheiro and Bates (2000, Mixed-Effects Models in S and S-PLUS, section
2.4.2), for one grouping factor the between-within method of SAS: a coefficient whose column is
constant within the groups of level i, but not within those of level i - 1, has
``m_i - m_(i-1) - p_i`` degrees of freedom, where ``m_i`` is the number of groups of level i,
``m_0`` is 1 with an intercept and 0 without, and ``p_i`` counts the coefficients of the level.  The
rows are the last level, and the intercept belongs to it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..compress.layout import parent_codes

if TYPE_CHECKING:
    from ..results import Fit


def degrees(fit: Fit) -> np.ndarray:
    """Return the degrees of freedom of each coefficient that was kept, (p,).

    Raises:
        ValueError: if grouping factors cross: then there are no levels to count.
    """
    factors = sorted(fit.layout.factors, key=lambda factor: factor.n_groups)
    for coarse, fine in pairwise(factors):
        if parent_codes(fine, coarse) is None:
            raise ValueError(
                f"ddf='between-within' counts within nested groups, and {coarse.name!r} crosses "
                f"{fine.name!r}; use ddf='satterthwaite' or 'kenward-roger'"
            )
    X = fit.design.X[:, fit.layout.fixed.kept]
    n, p = X.shape
    constant = np.all(X[0] == X, axis=0)
    intercept = bool(constant.any())
    level = np.full(p, len(factors))
    for position in range(len(factors) - 1, -1, -1):
        codes = factors[position].codes
        last = np.zeros((factors[position].n_groups, p))
        last[codes] = X
        level[np.all(last[codes] == X, axis=0)] = position
    level[constant] = len(factors)
    sizes = [int(intercept), *(factor.n_groups for factor in factors), n]
    counts = np.bincount(level[~constant], minlength=len(factors) + 1)
    each = np.array(
        [sizes[i + 1] - sizes[i] - counts[i] for i in range(len(factors) + 1)], dtype=float
    )
    # A level with nothing left over cannot estimate its own noise.
    return np.where(each > 0.0, each, np.nan)[level]
