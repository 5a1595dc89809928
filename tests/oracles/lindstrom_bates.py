"""Closed-form derivatives of the profiled -2 log-likelihood, with loops over groups.

After Lindstrom & Bates (1988), "Newton-Raphson and EM algorithms for linear mixed-effects
models for repeated-measures data", JASA 83, 1014-1022. With V_i = R_i + Z_i D Z_i',
R_i = diag(1 / weights), and

    K_i = Z_i' V_i^-1 Z_i    P_i = Z_i' V_i^-1 X_i    g_i = Z_i' V_i^-1 (y_i - X_i beta)
    A = sum_i X_i' V_i^-1 X_i    rss = sum_i (y_i - X_i beta)' V_i^-1 (y_i - X_i beta)

the criterion

    f(D) = sum_i log|V_i| + [REML: log|A|] + d (1 + log(2 pi rss / d)),   d = n or n - p

has, for symmetric directions E and F,

    D logdet[E] = sum tr(E K_i)             D2 logdet[E, F] = -sum tr(E K_i F K_i)
    D A[E]      = -sum P_i' E P_i           D2 A[E, F]      = sum P_i' (E K_i F + F K_i E) P_i
    D rss[E]    = -sum g_i' E g_i
    D2 rss[E, F] = 2 sum g_i' E K_i F g_i - 2 h(E)' A^-1 h(F),   h(E) = sum P_i' E g_i

Arguments as in ``dense``; D may be singular, since only V_i is inverted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .dense import Array, Scalar, log_det, vech_pairs


class Parts(NamedTuple):
    """The sums and per-group matrices that the criterion and its derivatives are made of."""

    logdet: Scalar
    A: Array  # (p, p)
    beta: Array  # (p,)
    rss: Scalar
    K: list[Array]  # per group (q, q)
    P: list[Array]  # per group (q, p)
    g: list[Array]  # per group (q,)
    n: int


def parts(
    y: ArrayLike,
    X: ArrayLike,
    Z: ArrayLike,
    codes: ArrayLike,
    D: ArrayLike,
    weights: ArrayLike | None = None,
) -> Parts:
    """One pass over the groups at D."""
    y, X, Z, codes, D = map(np.asarray, (y, X, Z, codes, D))
    w = np.ones(len(y)) if weights is None else np.asarray(weights)
    p = X.shape[1]
    logdet: Scalar = 0.0
    S = np.zeros((p + 1, p + 1), dtype=np.result_type(D, float))
    K, ZVXy = [], []
    for i in range(int(codes.max()) + 1):
        rows = codes == i
        Xy, Zi = np.column_stack([X[rows], y[rows]]), Z[rows]
        V = np.diag(1.0 / w[rows]) + Zi @ D @ Zi.T
        VXy = np.linalg.solve(V, Xy)
        logdet = logdet + log_det(V)
        S = S + Xy.T @ VXy
        K.append(Zi.T @ np.linalg.solve(V, Zi))
        ZVXy.append(Zi.T @ VXy)
    A = S[:p, :p]
    beta = np.linalg.solve(A, S[:p, p])
    rss = S[p, p] - S[p, :p] @ beta
    P = [M[:, :p] for M in ZVXy]
    g = [M[:, p] - M[:, :p] @ beta for M in ZVXy]
    return Parts(logdet, A, beta, rss, K, P, g, len(y))


def criterion(
    y: ArrayLike,
    X: ArrayLike,
    Z: ArrayLike,
    codes: ArrayLike,
    D: ArrayLike,
    reml: bool,
    weights: ArrayLike | None = None,
) -> Scalar:
    """-2 logL at D, maximised over beta and the scale."""
    s = parts(y, X, Z, codes, D, weights)
    d = s.n - len(s.beta) if reml else s.n
    value = s.logdet + d * (1 + np.log(2 * np.pi * s.rss / d))
    return value + log_det(s.A) if reml else value


def _directional(s: Parts, directions: list[Array], reml: bool) -> tuple[Array, Array]:
    """Gradient (k,) and Hessian (k, k) of f along symmetric q x q directions."""
    k, p = len(directions), len(s.beta)
    d = s.n - p if reml else s.n
    dtype = np.result_type(s.A, *directions)
    d_logdet, d_rss = np.zeros(k, dtype), np.zeros(k, dtype)
    d_A, h = np.zeros((k, p, p), dtype), np.zeros((k, p), dtype)
    d2_logdet, d2_rss = np.zeros((k, k), dtype), np.zeros((k, k), dtype)
    d2_A = np.zeros((k, k, p, p), dtype)
    for K, P, g in zip(s.K, s.P, s.g, strict=True):
        for a, E in enumerate(directions):
            d_logdet[a] += np.trace(E @ K)
            d_rss[a] -= g @ E @ g
            d_A[a] -= P.T @ E @ P
            h[a] += P.T @ E @ g
            for b, F in enumerate(directions):
                d2_logdet[a, b] -= np.trace(E @ K @ F @ K)
                d2_rss[a, b] += 2 * g @ E @ K @ F @ g
                d2_A[a, b] += P.T @ (E @ K @ F + F @ K @ E) @ P
    A_inv = np.linalg.inv(s.A)
    d2_rss -= 2 * h @ A_inv @ h.T
    gradient = d_logdet + d * d_rss / s.rss
    hessian = d2_logdet + d * (d2_rss / s.rss - np.outer(d_rss, d_rss) / s.rss**2)
    if reml:
        B = A_inv @ d_A
        gradient = gradient + np.trace(B, axis1=1, axis2=2)
        hessian = hessian + np.einsum("ij,abji->ab", A_inv, d2_A)
        hessian = hessian - np.einsum("aij,bji->ab", B, B)
    return gradient, hessian


def _unit(q: int, r: int, c: int) -> Array:
    E = np.zeros((q, q))
    E[r, c] = 1.0
    return E


def derivatives_D(
    y: ArrayLike,
    X: ArrayLike,
    Z: ArrayLike,
    codes: ArrayLike,
    D: ArrayLike,
    reml: bool,
    weights: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Gradient (k,) and Hessian (k, k) with respect to the lower triangle of D, row by row.

    An off-diagonal parameter moves both of its entries of D.
    """
    q = np.shape(D)[0]
    units = [_unit(q, r, c) for r, c in vech_pairs(q)]
    directions = [E if np.trace(E) else E + E.T for E in units]
    return _directional(parts(y, X, Z, codes, D, weights), directions, reml)


def unpack_factor(theta: ArrayLike, q: int) -> Array:
    """The lower Cholesky factor Lambda (q, q) from its lower triangle, row by row."""
    theta = np.asarray(theta)
    factor = np.zeros((q, q), dtype=np.result_type(theta, float))
    for value, (r, c) in zip(theta, vech_pairs(q), strict=True):
        factor[r, c] = value
    return factor


def derivatives_theta(
    y: ArrayLike,
    X: ArrayLike,
    Z: ArrayLike,
    codes: ArrayLike,
    theta: ArrayLike,
    reml: bool,
    weights: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Gradient (k,) and Hessian (k, k) with respect to theta, where D = Lambda Lambda'.

    With D_a = E_a Lambda' + Lambda E_a' and D_ab = E_a E_b' + E_b E_a',
    df/dtheta_a = Df[D_a] and d2f/dtheta_a dtheta_b = D2f[D_a, D_b] + Df[D_ab].
    """
    q = np.shape(Z)[1]
    factor = unpack_factor(theta, q)
    s = parts(y, X, Z, codes, factor @ factor.T, weights)
    units = [_unit(q, r, c) for r, c in vech_pairs(q)]
    gradient, hessian = _directional(s, [E @ factor.T + factor @ E.T for E in units], reml)
    for a, E in enumerate(units):
        for b, F in enumerate(units):
            hessian[a, b] += _directional(s, [E @ F.T + F @ E.T], reml)[0][0]
    return gradient, hessian
