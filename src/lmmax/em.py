"""The EM warm start of Lindstrom and Bates (1988), in terms of the criterion's gradient.

With ``G`` the gradient of the profiled -2 log-likelihood with respect to the relative covariance
``D`` and m groups, the EM update for an unstructured covariance is

    D+ = (1/m) sum_i E[b_i b_i' | y] / scale = D - D G D / m

for ML and REML alike, which needs no second look at the groups.  With several uncorrelated terms
the update is that of their diagonal blocks.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from .likelihood.grouped import GroupedProblem


def em_step(D: Array, gradient: Array, n_groups: Array, blocks: Array) -> Array:
    """Return the next relative covariance (q, q).

    Args:
        D: relative covariance, block diagonal.
        gradient: symmetric gradient of the criterion with respect to D, (q, q).
        n_groups: number of groups that each effect has, (q,).
        blocks: 1 where an entry of D belongs to a term, else 0, (q, q).
    """
    return (D - D @ (gradient * blocks) @ D / n_groups[:, None]) * blocks


def moment_start(problem: GroupedProblem) -> Any:
    """Return a diagonal relative covariance (q, q) from the groups' sums of squares.

    Column a's sums ``u_i' r_i`` over a group's least-squares residuals have expected square
    ``scale (U'U)_aa + scale D_aa (U'U)_aa^2``, ignoring the other columns.  Never below a tenth of
    the noise in such an estimate, so that EM does not start at a boundary.  A problem of NumPy
    arrays gives a NumPy array.  Leading axes of the problem's leaves are those of the result.
    """
    U, Y, weight = problem.U, problem.Y, problem.weight
    xp: Any = np if isinstance(U, np.ndarray) else jnp
    q = U.shape[-2]
    squares = (U * U).sum(-3)
    sums = (U * Y[..., -1, :][..., None, :]).sum(-3)
    residual_df = problem.n_obs - problem.n_fixed - q * weight.sum(-1)
    # With few rows per group nothing may be left outside Z; then the total variance stands in.
    enough = residual_df > 0.1 * problem.n_obs
    outside = problem.C[..., -1, -1]
    total = outside + (Y[..., -1, :] ** 2).sum((-2, -1))
    inside = outside / xp.where(enough, residual_df, 1.0)
    scale = xp.where(enough & (inside > 0.0), inside, 0.5 * total / problem.n_obs)
    weighted = weight[..., None, :] * squares
    noise = weighted.sum(-1)
    signal = (weighted * squares).sum(-1)
    estimate = ((sums * sums).sum(-1) / scale[..., None] - noise) / signal
    return xp.maximum(estimate, 0.1 * noise / signal)[..., None] * xp.eye(q)
