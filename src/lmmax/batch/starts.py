"""Where many responses of one design start: one scoring step from a common point.

At a common relative covariance ``D_0``, let ``V_0 = I + Z D_0 Z'``, P the projector
``V_0^-1 - V_0^-1 X (X'V_0^-1 X)^-1 X'V_0^-1``, and ``G_c`` the derivative of V in the c-th entry of
D.  The expectations of quadratic forms are linear in the variances; with
``scale D = scale D_0 + delta``::

    E[y' P G_c P y] = scale tr(P G_c) + sum_d tr(P G_c P G_d) delta_d
    E[y' P y]       = scale (n - p)   + sum_d tr(P G_d) delta_d

Solving these (minimum norm quadratic estimation, Rao, 1971; a step of Fisher scoring) needs the
designs once and two passes over the response.  In balanced designs the solution is the restricted
maximum already, elsewhere it is a good start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

from ..compilation import computing
from ..likelihood.shared import SharedProblem
from ..parameters import pack_triangle, unpack_symmetric

if TYPE_CHECKING:
    from ..likelihood.grouped import GroupedProblem

SMALLEST = 0.1
"""Least relative variance of a start, in units of the sampling variance of an average group's
effect: a variance of zero is a stationary point by symmetry."""
FARTHEST = 1e6
"""Largest variance of a start in the same units."""
BLOCK_BYTES = 1 << 23


def scored(
    problem: SharedProblem,
    common: GroupedProblem,
    D: np.ndarray,
    blocks: np.ndarray,
    noise: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return relative covariances and log scales to start from.

    Args:
        problem: the responses.
        common: the designs in the form for one response.
        D: where to step from, (q, q).
        blocks: 1.0 where an entry of D is free, (q, q).
        noise: standard deviation, relative to the residual's, of one average group's mean, (q,).

    Returns:
        ``D`` (n, q, q) and ``s`` (n,), in working coordinates.
    """
    traces, weights = _expectations(common, D, float(common.n_obs) - float(common.n_fixed))
    forms = _quadratic_forms(problem, D)
    free = np.append(pack_triangle(blocks) > 0.0, True)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        found = np.zeros_like(forms)
        found[:, free] = forms[:, free] @ np.linalg.pinv(weights[np.ix_(free, free)]).T
        scale = found[:, -1]
        sound = np.isfinite(found).all(axis=1) & (scale > 0.0)
        relative = np.where(sound[:, None], found[:, :-1] / np.where(sound, scale, 1.0)[:, None], 0)
        total = forms[:, -1] / traces
        s = np.log(np.where(sound, scale, total))
    change = np.moveaxis(unpack_symmetric(relative.T), -1, 0)
    return _inside(D + change, blocks, noise), s


def _expectations(common: GroupedProblem, D: np.ndarray, df: float) -> tuple[float, np.ndarray]:
    """Return ``n - p`` and the matrix of the linear equations above, (k + 1, k + 1)."""
    from ..inference.sensitivity import expansion

    with computing():
        found = jax.device_get(expansion(common, D))
    slopes, p = found.at.S_slope[:, :-1, :-1], found.at.S.shape[0] - 1
    # Singular in doubles where the designs' own response has no maximum and D grew without end.
    inverse = np.linalg.pinv(found.at.S[:p, :p], hermitian=True)
    solved = inverse @ slopes
    first = found.at.logdet_slope + np.einsum("cii->c", solved)
    second = found.logdet_bend + np.einsum("ij,cdij->cd", inverse, found.S_bend[..., :p, :p])
    second = second - np.einsum("cij,dji->cd", solved, solved)
    return df, np.block([[-second, first[:, None]], [first[None], np.full((1, 1), df)]])


def _quadratic_forms(problem: SharedProblem, D: np.ndarray) -> np.ndarray:
    """Return ``y' P G_c P y`` and ``y' P y`` of each response, (n, k + 1)."""
    q, u = problem.U.shape[1:]
    U = np.moveaxis(problem.U, -1, 0)
    inverse = np.linalg.inv(np.eye(q) + U @ D @ U.transpose(0, 2, 1))
    F = inverse @ U
    pattern = np.arange(u) if problem.pattern is None else problem.pattern
    inverse, F = (np.moveaxis(part[pattern], 0, -1) for part in (inverse, F))
    X = problem.X.transpose(0, 2, 1)  # (q, p, m)
    p, m = X.shape[1:]
    whitened = np.einsum("abm,bpm->apm", inverse, X)
    flat = whitened.transpose(1, 0, 2).reshape(p, q * m)
    information = problem.C + flat @ X.transpose(1, 0, 2).reshape(p, q * m).T
    moments = np.einsum("bam,bpm->apm", F, X)
    n, rows = len(problem.y), max(1, BLOCK_BYTES // (8 * q * m))
    parts = []
    for first in range(0, n, rows):
        y = problem.y[first : first + rows, 0]
        cross = problem.cross[first : first + rows, 0]
        right = cross[:, :p] + y.reshape(-1, q * m) @ flat.T
        beta = np.linalg.solve(information, right.T).T
        rss = cross[:, p] - np.einsum("np,np->n", beta, right)
        for a in range(q):
            half = sum(inverse[a, b] * y[:, b] for b in range(q))
            rss += np.einsum("nm,nm->n", y[:, a], half)
        P = [sum(F[b, a] * y[:, b] for b in range(q)) - beta @ moments[a] for a in range(q)]
        squares = [
            np.einsum("nm,nm->n", P[i], P[j]) * (1.0 if i == j else 2.0)
            for i, j in zip(*np.tril_indices(q), strict=True)
        ]
        parts.append(np.stack([*squares, rss], axis=1))
    return np.concatenate(parts)


def _inside(D: np.ndarray, blocks: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return covariances moved inside the cone where they are outside it or at its boundary."""
    unit = noise[:, None] * noise
    relative = D * blocks / unit
    values, vectors = np.linalg.eigh(relative)
    values = values.clip(SMALLEST, FARTHEST)
    return np.asarray((vectors * values[:, None, :]) @ vectors.transpose(0, 2, 1) * unit * blocks)
