"""How certain the variance parameters of many fits are, at the boundary as well.

Over lanes what :class:`lmmax.estimation.Estimates` does for a single fit: the observed information
in the coordinates of a root of D, in which it also holds for a singular covariance, given its rank.
"""

from __future__ import annotations

import numpy as np

from .solve import Ends


def parameter_covariance(
    ends: Ends, D: np.ndarray, blocks: np.ndarray, noise: np.ndarray, scale_free: bool
) -> np.ndarray:
    """Return the covariance of the lower triangle of D and s of fits without structures.

    Args:
        ends: where n lanes ended.
        D: their covariances, exactly singular where they count as such, (n, q, q).
        blocks: 1.0 where an entry of D is free, (q, q).
        noise: standard deviation of one average group's mean, relative to the residual's, (n, q).
        scale_free: whether the scale is estimated.

    Returns:
        The covariances, (n, k + 1, k + 1), zero for what is not free.
    """
    n, q, _ = D.shape
    rows, columns = np.tril_indices(q)
    k = len(rows)
    G = np.zeros((n, q, q))
    G[:, rows, columns] = ends.gradient[:, :-1]
    G = 0.5 * (G + G.transpose(0, 2, 1)) * blocks
    # What convergence left of the gradient outside D's null space would pass for curvature.
    values, vectors = np.linalg.eigh(D)
    null = vectors * (values <= 1e-12 * values[:, -1:])[:, None, :]
    onto = null @ null.transpose(0, 2, 1)
    inward = onto @ G @ onto

    jacobian = np.zeros((n, k + 1, q * q + 1))
    jacobian[:, k, 0] = 1.0
    for entry, (i, j) in enumerate(np.ndindex(q, q)):
        half = np.zeros((n, q, q))
        half[:, i] = ends.root[:, :, j]
        jacobian[:, :k, 1 + entry] = (half + half.transpose(0, 2, 1))[:, rows, columns]
    hessian = jacobian.transpose(0, 2, 1) @ ends.hessian @ jacobian
    bend = 2.0 * np.einsum("nik,jl->nijkl", inward, np.eye(q)).reshape(n, q * q, q * q)
    hessian[:, 1:, 1:] += bend
    free = np.concatenate(
        [np.full((n, 1), bool(scale_free)), inside_root(ends.D, blocks).reshape(n, -1)], axis=1
    )
    hessian = np.where(free[:, :, None] & free[:, None, :], hessian, 0.0)
    # Units in which a real curvature is about one; rounding errors are no curvature.
    size = np.maximum(np.max(ends.root**2, axis=2), noise**2)
    n_groups = noise**2 * ends.hessian[:, -1:, -1]
    least = np.min(n_groups, axis=1, keepdims=True)
    floor = np.concatenate([least, np.repeat(n_groups / size, q, axis=1)], axis=1)
    unit = np.sqrt(np.maximum(np.abs(np.einsum("nii->ni", hessian)), 1e-6 * floor))
    values, vectors = np.linalg.eigh(hessian / (unit[:, :, None] * unit[:, None, :]))
    curved = values > 1e-10 * values[:, -1:]
    weight = np.where(curved, 2.0 / np.where(curved, values, 1.0), 0.0)
    along = (jacobian * (free / unit)[:, None, :]) @ vectors
    return np.asarray((along * weight[:, None, :]) @ along.transpose(0, 2, 1))


def inside_root(D: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Return where the solver's root of D may be other than zero, (n, q, q).

    That root is a factor by Cholesky with pivoting inside each term.
    """
    n, q, _ = D.shape
    rest, left = D.copy(), np.ones((n, q), dtype=bool)
    found = np.zeros((n, q, q), dtype=bool)
    lanes = np.arange(n)
    for j in range(q):
        candidates = left & (blocks[j] > 0.0)
        pivots = np.where(candidates, np.einsum("nii->ni", rest), -np.inf)
        choice = np.argmax(pivots, axis=1)
        size = rest[lanes, choice, choice]
        column = rest[lanes, choice] / np.sqrt(np.where(size > 0.0, size, np.inf))[:, None]
        rest = rest - column[:, :, None] * column[:, None, :]
        left[lanes, choice] = False
        found[:, :, j] = candidates
    return found
