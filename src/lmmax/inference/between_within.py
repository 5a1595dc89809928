"""Degrees of freedom by counting, coefficient by coefficient, at the level at which it varies.

The inner-outer rule of Pinheiro and Bates (2000, Mixed-Effects Models in S and S-PLUS, section
2.4.2), for one grouping factor the between-within method of SAS, with the conventions of nlme.  Let
``m_i`` be the number of groups of level i, from the coarsest, i = 1, to the rows, i = Q + 1, let
``m_0 = 0``, and let ``p_i`` count the coefficients of level i: those whose columns are constant
within its groups, but not within those of level i - 1.  A coefficient of level i has
``m_i - m_(i-1) - p_i`` degrees of freedom, less one at the coarsest level if there is an intercept
(a constant column) beside other coefficients, and one more at all other levels if there is none.
An intercept has the most that any level has.
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
    level = np.full(p, len(factors))
    for position in range(len(factors) - 1, -1, -1):
        codes = factors[position].codes
        last = np.zeros((factors[position].n_groups, p))
        last[codes] = X
        level[np.all(last[codes] == X, axis=0)] = position
    sizes = [0, *(factor.n_groups for factor in factors), n]
    each = np.diff(sizes) - np.bincount(level[~constant], minlength=len(factors) + 1).astype(float)
    if constant.all():
        pass  # as nlme: nothing is taken off for an intercept alone
    elif constant.any():
        each[0] -= 1.0
    else:
        each[1:] += 1.0
    found = np.where(constant, each.max(), each[level])
    # A level with nothing left over cannot estimate its own noise.
    return np.where(found > 0.0, found, np.nan)
