"""The criterion of a small model in 50 digits: dense, and without any of the library's algebra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal, getcontext
from typing import Any

import numpy as np

DIGITS = 50
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620900")


def exactly(A: Any) -> np.ndarray:
    """Return an array of floats as one of decimals that are equal to them."""
    getcontext().prec = DIGITS
    A = np.asarray(A, dtype=float)
    return np.array([Decimal(float(x)) for x in A.ravel()], dtype=object).reshape(A.shape)


def criterion(
    y: np.ndarray, X: np.ndarray, V: np.ndarray, reml: bool
) -> tuple[Decimal, np.ndarray, np.ndarray]:
    """Return -2 log-likelihood given V (n, n) in decimals, coefficients, and their covariance."""
    n, p = X.shape
    L = cholesky(V)
    S = exactly(np.column_stack([X, y]))
    for i in range(n):
        S[i] = (S[i] - L[i, :i] @ S[:i]) / L[i, i]
    R = cholesky(S.T @ S)  # the last pivot is the root of the residual sum of squares
    value = 2 * sum(L[i, i].ln() for i in range(n)) + R[p, p] ** 2
    value += 2 * sum(R[i, i].ln() for i in range(p)) if reml else 0
    d = n - p if reml else n
    half = np.linalg.inv(R[:p, :p].astype(float))
    beta = half.T @ R[p, :p].astype(float)
    return value + d * (2 * PI).ln(), beta, half.T @ half


def cholesky(A: np.ndarray) -> np.ndarray:
    """Return the lower Cholesky factor of decimals."""
    n = len(A)
    L = np.full((n, n), Decimal(0), dtype=object)
    for j in range(n):
        column = A[j:, j] - L[j:, :j] @ L[j, :j]
        L[j, j] = column[0].sqrt()
        L[j + 1 :, j] = column[1:] / L[j, j]
    return L


def covariance(fit: Any) -> Callable[[Sequence[Decimal]], np.ndarray]:
    """Return V of a fit as a function of changes of its covariance parameters.

    In units in which all of them are of the same size: with ``Psi = R R'`` the estimate of a term,
    ``R (I + E)(I + E)' R'``, E lower triangular, term after term; and ``scale exp(e)``.
    """
    design, root = fit.design, fit.estimates.root * np.sqrt(fit.scale)
    weights = np.ones(len(design.y)) if design.weights is None else design.weights
    parts, at = [], 0
    for block in design.blocks:
        q, grouping = block.Z.shape[1], design.groupings[block.grouping]
        same = np.eye(len(grouping.levels)) if grouping.root is None else grouping.root
        same = exactly(same) @ exactly(same).T
        between = same[np.ix_(grouping.codes, grouping.codes)]
        ZR = exactly(block.Z) @ exactly(root[at : at + q, at : at + q])
        parts.append((ZR, between, q))
        at += q
    residual = exactly(np.diag(fit.scale / weights))

    def at_change(change: Sequence[Decimal]) -> np.ndarray:
        left = list(change)
        V = residual * left.pop().exp()
        for ZR, between, q in parts:
            E = exactly(np.eye(q))
            for i, j in zip(*np.tril_indices(q), strict=True):
                E[i, j] += left.pop(0)
            half = ZR @ E
            V = V + between * (half @ half.T)
        return V

    return at_change


def check(fit: Any) -> tuple[float, float]:
    """Return the relative error of a fit's criterion, and how far its optimum is.

    The latter is the largest entry of a Newton step by differences, in the units of
    :func:`covariance`: relative errors of standard deviations.
    """
    getcontext().prec = DIGITS
    V, X = covariance(fit), fit.design.X[:, fit.layout.fixed.kept]
    widths = [block.Z.shape[1] for block in fit.design.blocks]
    k, step = sum(q * (q + 1) // 2 for q in widths) + 1, Decimal(10) ** -12

    def value(*moves: int) -> Decimal:
        change = [Decimal(0)] * k
        for move in moves:
            change[abs(move) - 1] += step.copy_sign(Decimal(move))
        return criterion(fit.design.y, X, V(change), fit.reml)[0]

    here = value()
    up, down = ([value(sign * (i + 1)) for i in range(k)] for sign in (1, -1))
    gradient = np.array([float((a - b) / (2 * step)) for a, b in zip(up, down, strict=True)])
    hessian = np.zeros((k, k))
    for i in range(k):
        hessian[i, i] = float((up[i] + down[i] - 2 * here) / step**2)
        for j in range(i):
            both = value(i + 1, j + 1)
            hessian[i, j] = hessian[j, i] = float((both - up[i] - up[j] + here) / step**2)
    error = float((Decimal(float(-2.0 * fit.llf)) - here) / abs(here))
    return error, float(np.max(np.abs(np.linalg.solve(hessian, gradient))))
