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
    ``R (I + E)(I + E)' R'``, E lower triangular, term after term; and ``scale exp(e)``.  Of a
    structure, standard deviations are multiplied by ``1 + e``, and e is added to other parameters.
    """
    design, root = fit.design, fit.estimates.root * np.sqrt(fit.scale)
    weights = np.ones(len(design.y)) if design.weights is None else design.weights
    parts, at, theta = [], 0, list(exactly(fit.estimates.structure_theta))
    for term, block in zip(fit.terms, design.blocks, strict=True):
        q, grouping = block.Z.shape[1], design.groupings[block.grouping]
        same = np.eye(len(grouping.levels)) if grouping.root is None else grouping.root
        same = exactly(same) @ exactly(same).T
        between = same[np.ix_(grouping.codes, grouping.codes)]
        Z, move = exactly(block.Z), _unstructured(root[at : at + q, at : at + q])
        if term.pattern is None:
            k = term.covariance.n_parameters(q)
            move = _structured(term.covariance, theta[:k], q, fit.scale)
            theta = theta[k:]
        parts.append((Z, between, move))
        at += q
    residual = exactly(np.diag(fit.scale / weights))

    def at_change(change: Sequence[Decimal]) -> np.ndarray:
        left = list(change)
        V = residual * left.pop().exp()
        for Z, between, move in parts:
            V = V + between * (Z @ move(left) @ Z.T)
        return V

    return at_change


def _unstructured(root: np.ndarray) -> Callable[[list[Decimal]], np.ndarray]:
    """Return a function that takes changes off a list, and returns ``R (I + E)(I + E)' R'``."""

    def move(left: list[Decimal]) -> np.ndarray:
        E = exactly(np.eye(len(root)))
        for i, j in zip(*np.tril_indices(len(root)), strict=True):
            E[i, j] += left.pop(0)
        half = exactly(root) @ E
        return half @ half.T

    return move


def _structured(
    structure: Any, theta: list[Decimal], q: int, scale: float
) -> Callable[[list[Decimal]], np.ndarray]:
    """Return the same for a structure; its formulas are those of its docstring."""
    common = len([sd for sd in structure.is_sd(q) if sd]) == 1

    def move(left: list[Decimal]) -> np.ndarray:
        changes = [left.pop(0) for _ in theta]
        moved = [
            value * (1 + change) if is_sd else value + change
            for value, change, is_sd in zip(theta, changes, structure.is_sd(q), strict=True)
        ]
        sd = np.array([abs(moved[0])] * q if common else [value**2 for value in moved[:q]])
        C = _correlations(structure, moved[1 if common else q :], q)
        return Decimal(float(scale)) * sd[:, None] * sd * C

    return move


def _correlations(structure: Any, x: list[Decimal], q: int) -> np.ndarray:
    """Return the correlation matrix of a structure over q equal steps."""
    kind = structure.name.removeprefix("hom").removeprefix("het")
    if kind == "cs":
        low, centre = Decimal(-1) / (q - 1), Decimal(float(np.arctanh(2.0 / q - 1.0)))
        rho = [low + (1 - low) * (1 + _tanh(x[0] + centre)) / 2] * (q - 1)
    elif kind == "ar1":
        rho = [_tanh(x[0]) ** lag for lag in range(1, q)]
    elif kind == "ou":  # times one unit apart
        rho = [(1 + (-x[0]).exp()) ** -lag for lag in range(1, q)]
    else:
        rho = _autocorrelations([_tanh(value) for value in x])
    whole = [Decimal(1), *rho]
    return np.array([[whole[abs(i - j)] for j in range(q)] for i in range(q)])


def _autocorrelations(partial: list[Decimal]) -> list[Decimal]:
    """Return autocorrelations from partial ones, by the definition of the latter."""
    rho: list[Decimal] = []
    for p in partial:
        k = len(rho)
        if not k:
            rho.append(p)
            continue
        whole = [Decimal(1), *rho]
        R = np.array([[whole[abs(i - j)] for j in range(k)] for i in range(k)])
        L = cholesky(R)
        one, other = np.array(rho), np.array(rho[::-1])
        for i in range(k):
            one[i] = (one[i] - L[i, :i] @ one[:i]) / L[i, i]
            other[i] = (other[i] - L[i, :i] @ other[:i]) / L[i, i]
        # The correlation of the two ends given all between, whose variances given these are equal.
        rho.append(one @ other + p * (1 - one @ one))
    return rho


def _tanh(x: Decimal) -> Decimal:
    e = (2 * x).exp()
    return (e - 1) / (e + 1)


def check(fit: Any) -> tuple[float, float]:
    """Return the relative error of a fit's criterion, and how far its optimum is.

    The latter is the largest entry of a Newton step by differences, in the units of
    :func:`covariance`: relative errors of standard deviations.
    """
    getcontext().prec = DIGITS
    V, X = covariance(fit), fit.design.X[:, fit.layout.fixed.kept]
    entries = [
        term.width * (term.width + 1) // 2
        if term.pattern is not None
        else term.covariance.n_parameters(term.width)
        for term in fit.terms
    ]
    k, step = sum(entries) + 1, Decimal(10) ** -12

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
