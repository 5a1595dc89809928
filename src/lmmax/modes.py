"""Conditional modes of the random effects and their covariance.

With ``G_i = U_i Lambda`` and ``r_i = Y_i [-beta; 1]``, per group and in working coordinates::

    b_i = Lambda (I + G_i' G_i)^-1 G_i' r_i
    cov(b_i | y) = scale Lambda (I + G_i' G_i)^-1 Lambda'

which never inverts Lambda, so singular covariances are as good as any.  NumPy: it runs once.
"""

from __future__ import annotations

import numpy as np

from .compress import Compression
from .estimation import Estimates


def conditional_modes(compression: Compression, estimates: Estimates) -> np.ndarray:
    """Return the conditional modes in the user's units, shape (m, q)."""
    problem = compression.problem
    p = compression.Y.shape[1] - 1
    gamma = estimates.solution.point.at.beta[:p]
    r = compression.Y[:, p] - np.einsum("kpm,p->km", compression.Y[:, :p], gamma)
    L = _working_root(estimates)
    G = np.einsum("ijm,jk->mik", compression.U, L)
    u = np.linalg.solve(_gram(G), np.einsum("mik,im->mk", G, r)[..., None])[..., 0]
    return (u @ estimates.root.T) * float(problem.y_scale)


def conditional_covariances(compression: Compression, estimates: Estimates) -> np.ndarray:
    """Return the covariance of each group's effects given data and coefficients, (m, q, q)."""
    G = np.einsum("ijm,jk->mik", compression.U, _working_root(estimates))
    inverse = np.linalg.inv(_gram(G))
    root = estimates.root
    return estimates.scale * np.einsum("ij,mjk,lk->mil", root, inverse, root, optimize=True)


def _working_root(estimates: Estimates) -> np.ndarray:
    return np.linalg.solve(estimates.z_inverse, estimates.root)


def _gram(G: np.ndarray) -> np.ndarray:
    return np.eye(G.shape[2]) + np.swapaxes(G, 1, 2) @ G
