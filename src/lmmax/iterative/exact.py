"""What solves with the data give of the criterion, free of Monte Carlo noise."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..compilation import Compiled
from ..likelihood import iterative
from ..likelihood.iterative import Elimination
from ..parameters import pack_triangle
from .model import Model

KRYLOV_STEPS = 1000
"""Most iterations of conjugate gradients."""
DATA_TOL, PROBE_TOL = 1e-10, 1e-6
"""Relative residuals at which the iterations stop, for ``[X y]`` and for everything else; the
quadrature and the quadratic forms have errors of the order of their squares."""

_multiply = Compiled(iterative.multiply)
_solve = Compiled(iterative.solve, (4,))


class Exact(NamedTuple):
    """What solves with the data give, free of Monte Carlo noise.

    Attributes:
        value: the criterion less ``log|V|``.
        gradient: its slope in the entries of the joint D's lower triangle, (k,).
        information: average information of the log-likelihood in those and log scale,
            (k + 1, k + 1); zero between factors' own entries.
        scale: residual variance.
        beta: fixed effects, (p,).
        beta_unscaled: ``(X'V^-1X)^-1``, (p, p).
        slopes: derivatives of ``X'V^-1X`` in the entries of D's lower triangle, (k, p, p).
        modes: conditional modes of all effects, (effects,).
        krylov_steps: most iterations of a solve.
        converged: whether all solves converged.
    """

    value: float
    gradient: np.ndarray
    information: np.ndarray
    scale: float
    beta: np.ndarray
    beta_unscaled: np.ndarray
    slopes: np.ndarray
    modes: np.ndarray
    krylov_steps: int
    converged: bool


def quadratic_forms(model: Model, at: Elimination) -> Exact:
    """Solve with ``[X y]``, and evaluate everything but ``log|V|`` and its slope.

    With ``pi = Z'V^-1(y - X beta)`` and ``E_c`` the c-th entry of the triangle, the average
    information is ``(Z E_a pi)'P (Z E_b pi) / scale / 2``, where P is the projection that takes the
    fixed effects out.
    """
    q, p = len(model.free), model.W.shape[1] - 1
    U, steps, converged = _solve_columns(model, at, model.W, DATA_TOL)
    score = model.W - _multiply_columns(model, U)
    S = model.C - model.W.T @ U
    S = 0.5 * (S + S.T)
    inverse = np.linalg.inv(S[:p, :p])
    beta = inverse @ S[:p, p]
    rss = float(S[p, p] - S[:p, p] @ beta)
    d = model.n - model.reml * p
    scale = rss / d
    v = np.append(-beta, 1.0)
    pi, modes = score @ v, U @ v

    slope = np.zeros((q, q))
    directions, entries = [], []
    slopes = np.zeros((q * (q + 1) // 2, p, p))
    for here, effects in zip(model.columns, model.effects, strict=True):
        size = here.stop - here.start
        seen = score[effects, :p].reshape(-1, size, p)
        own = pi[effects].reshape(-1, size)
        slope[here, here] -= own.T @ own / scale
        if model.reml:
            slope[here, here] -= np.einsum("max,xy,mby->ab", seen, inverse, seen, optimize=True)
        for i, j in zip(*np.tril_indices(size), strict=True):
            direction = np.zeros_like(pi)
            part = direction[effects].reshape(-1, size)
            part[:, i] = own[:, j]
            part[:, j] = own[:, i]
            directions.append(direction)
            product = seen[:, i].T @ seen[:, j]
            i, j = i + here.start, j + here.start
            entries.append(i * (i + 1) // 2 + j)
            slopes[entries[-1]] = -product if i == j else -(product + product.T)
    G = np.stack(directions, axis=1)
    image = _multiply_columns(model, G)
    solved, more, also = _solve_columns(model, at, image, PROBE_TOL)
    fixed = score[:, :p].T @ G
    K = G.T @ image - image.T @ solved - fixed.T @ inverse @ fixed
    cross = G.T @ pi
    k = q * (q + 1) // 2
    information = np.zeros((k + 1, k + 1))
    index = np.array([*entries, k])
    information[np.ix_(index, index)] = (
        np.block([[K, cross[:, None]], [cross[None], np.array([[rss]])]]) / scale / 2.0
    )
    slope = slope * (2.0 - np.eye(q))
    return Exact(
        value=model.reml * np.linalg.slogdet(S[:p, :p])[1]
        + d * (1.0 + np.log(2.0 * np.pi * scale)),
        gradient=pack_triangle(slope),
        information=0.5 * (information + information.T),
        scale=scale,
        beta=beta,
        beta_unscaled=inverse,
        slopes=slopes,
        modes=modes,
        krylov_steps=max(steps, more),
        converged=converged and also,
    )


def _pad(v: np.ndarray) -> np.ndarray:
    """Pad columns to a multiple of eight, so that compiled code is shared."""
    return np.pad(v, ((0, 0), (0, -v.shape[1] % 8)))


def _multiply_columns(model: Model, v: np.ndarray) -> np.ndarray:
    return np.asarray(_multiply(model.problem, _pad(v)))[:, : v.shape[1]]


def _solve_columns(
    model: Model, at: Elimination, W: np.ndarray, tol: float
) -> tuple[np.ndarray, int, bool]:
    U, steps, converged = _solve(model.problem, at, _pad(W), tol, KRYLOV_STEPS)
    return np.asarray(U)[:, : W.shape[1]], int(steps.max()), bool(converged.all())
