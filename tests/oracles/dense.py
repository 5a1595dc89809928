"""Linear mixed models through their n x n covariance matrix.

    y ~ N(X beta, scale V),   V = diag(1 / weights) + sum over factors of [K of the groups] Z D Z'

with K the identity ("same group") unless a relationship matrix of the levels is given. The
functions of this module take one grouping factor, the class :class:`Model` any number.

Everything is computed from the dense V, so that nothing is shared with the library: no
compression, no profiling identity beyond generalised least squares, no derivative rule.

Arguments of the functions: ``y`` (n,), ``X`` (n, p) of full column rank, ``Z`` (n, q) the row's
random-effects design, ``codes`` (n,) group numbers 0..m-1, ``D`` (q, q) relative to the scale,
``weights`` (n,) inverse variances or None. Matrices may be complex, so that a complex step
through these functions gives derivatives to machine precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Real, or complex in a complex step.
Array: TypeAlias = NDArray[Any]
Scalar: TypeAlias = Any


def vech_pairs(q: int) -> list[tuple[int, int]]:
    """Index pairs of the lower triangle of a q x q matrix, row by row."""
    return [(r, c) for r in range(q) for c in range(r + 1)]


def covariance(
    Z: ArrayLike,
    codes: ArrayLike,
    D: ArrayLike,
    weights: ArrayLike | None = None,
    scale: Scalar = 1.0,
) -> Array:
    """``scale * diag(1 / weights) + [same group] Z D Z'``, shape (n, n)."""
    Z, codes, D = np.asarray(Z), np.asarray(codes), np.asarray(D)
    same = codes[:, None] == codes[None, :]
    residual = np.ones(len(codes)) if weights is None else 1.0 / np.asarray(weights)
    return same * (Z @ D @ Z.T) + np.diag(scale * residual)


def log_det(A: Array) -> Scalar:
    """log|A| of a real positive definite matrix, or its analytic continuation nearby."""
    sign, log_abs = np.linalg.slogdet(A)
    if np.iscomplexobj(A):
        return log_abs + np.log(sign)
    if sign <= 0:
        raise ValueError("matrix is not positive definite")
    return log_abs


def gls(y: ArrayLike, X: ArrayLike, V: Array) -> tuple[Array, Array, Scalar]:
    """Generalised least squares: beta (p,), X'V^-1 X (p, p), weighted residual sum of squares."""
    y, X = np.asarray(y), np.asarray(X)
    W = np.linalg.solve(V, np.column_stack([X, y]))
    A = X.T @ W[:, :-1]
    beta = np.linalg.solve(A, X.T @ W[:, -1])
    r = y - X @ beta
    return beta, A, r @ np.linalg.solve(V, r)


def _normal_m2(r: Array, V: Array) -> Scalar:
    """-2 log density of N(0, V) at r."""
    return len(r) * np.log(2 * np.pi) + log_det(V) + r @ np.linalg.solve(V, r)


def natural_criterion(
    y: ArrayLike,
    X: ArrayLike,
    Z: ArrayLike,
    codes: ArrayLike,
    cov_re: ArrayLike,
    scale: Scalar,
    reml: bool,
    weights: ArrayLike | None = None,
) -> Scalar:
    """-2 logL at natural parameters, maximised over beta alone.

    ML: the normal density of y at the GLS coefficients. REML: the normal density of A'y, with
    A (n, n - p) an orthonormal basis of the complement of X's columns, plus log|X'X|: with this
    constant the value is that of lme4 and statsmodels.
    """
    return criterion_at(y, X, covariance(Z, codes, cov_re, weights, scale), reml)


def criterion_at(y: ArrayLike, X: ArrayLike, V: Array, reml: bool) -> Scalar:
    """-2 logL where y has covariance V (n, n), maximised over beta; constants as above."""
    y, X = np.asarray(y, dtype=float), np.asarray(X, dtype=float)
    p = X.shape[1]
    if not reml:
        beta, _, _ = gls(y, X, V)
        return _normal_m2(y - X @ beta, V)
    Q, R = np.linalg.qr(X, mode="complete")
    A = Q[:, p:]
    return _normal_m2(A.T @ y, A.T @ V @ A) + 2 * np.sum(np.log(np.abs(np.diag(R[:p]))))


def profiled_scale(
    y: ArrayLike,
    X: ArrayLike,
    Z: ArrayLike,
    codes: ArrayLike,
    D: ArrayLike,
    reml: bool,
    weights: ArrayLike | None = None,
) -> Scalar:
    """The residual variance that maximises the likelihood at D: rss / (n - p) or rss / n."""
    n, p = np.shape(X)
    _, _, rss = gls(y, X, covariance(Z, codes, D, weights))
    return rss / (n - p if reml else n)


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
    scale = profiled_scale(y, X, Z, codes, D, reml, weights)
    return natural_criterion(y, X, Z, codes, scale * np.asarray(D), scale, reml, weights)


def conditional_modes(
    y: ArrayLike,
    X: ArrayLike,
    Z: ArrayLike,
    codes: ArrayLike,
    D: ArrayLike,
    weights: ArrayLike | None = None,
) -> Array:
    """E(b_i | y) = D Z_i' V_i^-1 (y_i - X_i beta) at the GLS coefficients, shape (m, q)."""
    y, X, Z, codes, D = map(np.asarray, (y, X, Z, codes, D))
    V = covariance(Z, codes, D, weights)
    beta, _, _ = gls(y, X, V)
    rows = Z * np.linalg.solve(V, y - X @ beta)[:, None]
    sums = np.zeros((codes.max() + 1, Z.shape[1]), dtype=rows.dtype)
    np.add.at(sums, codes, rows)
    return sums @ D


def conditional_covariance(
    Z: ArrayLike,
    codes: ArrayLike,
    D: ArrayLike,
    scale: float,
    weights: ArrayLike | None = None,
) -> Array:
    """cov(b_i | y, beta) = scale (D - D Z_i' V_i^-1 Z_i D), shape (m, q, q)."""
    Z, codes, D = map(np.asarray, (Z, codes, D))
    V = covariance(Z, codes, D, weights)
    out = np.empty((codes.max() + 1, *D.shape))
    for i in range(len(out)):
        rows = codes == i
        Zi = Z[rows]
        out[i] = scale * (D - D @ Zi.T @ np.linalg.solve(V[np.ix_(rows, rows)], Zi) @ D)
    return out


def score_and_information(
    y: ArrayLike,
    X: ArrayLike,
    Z: ArrayLike,
    codes: ArrayLike,
    cov_re: ArrayLike,
    scale: Scalar,
    reml: bool,
    weights: ArrayLike | None = None,
    pairs: list[tuple[int, int]] | None = None,
) -> tuple[Array, Array]:
    """Score and observed information of the natural variance parameters.

    The parameters tau are the entries ``pairs`` of cov_re (default: the lower triangle row by
    row), then the scale. V is linear in tau; with G_a = dV/dtau_a,
    P = V^-1 - V^-1 X (X'V^-1 X)^-1 X'V^-1, and T = P (REML) or V^-1 (ML),

        dlogL/dtau_a           = -1/2 tr(T G_a) + 1/2 y'P G_a P y
        -d2logL/dtau_a dtau_b  = -1/2 tr(T G_a T G_b) + y'P G_a P G_b P y

    The ML form is that of the likelihood maximised over beta, so that the inverse of the matrix
    is the variance-parameter block of the inverse of the full (beta, tau) information.
    Returns shapes (k + 1,) and (k + 1, k + 1).
    """
    y, X, Z, codes = map(np.asarray, (y, X, Z, codes))
    n, q = Z.shape
    same = codes[:, None] == codes[None, :]
    G = []
    for r, c in vech_pairs(q) if pairs is None else pairs:
        outer = np.outer(Z[:, r], Z[:, c])
        G.append(same * (outer if r == c else outer + outer.T))
    G.append(np.diag(np.ones(n) if weights is None else 1.0 / np.asarray(weights)))
    return _score_and_information(y, X, covariance(Z, codes, cov_re, weights, scale), G, reml)


def _score_and_information(
    y: Array, X: Array, V: Array, G: Sequence[Array], reml: bool
) -> tuple[Array, Array]:
    """The formulas above for any V that is linear in its parameters, G[a] = dV/dtau_a."""
    V_inv = np.linalg.inv(V)
    VX = V_inv @ X
    P = V_inv - VX @ np.linalg.solve(X.T @ VX, VX.T)
    T = P if reml else V_inv
    Py = P @ y
    TG = [T @ g for g in G]
    GPy = np.array([g @ Py for g in G])
    # sum(A * B.T) is tr(A B) without forming the product.
    trace = np.array([[np.sum(a * b.T) for b in TG] for a in TG])
    score = 0.5 * (GPy @ Py - np.array([np.trace(a) for a in TG]))
    return score, GPy @ P @ GPy.T - 0.5 * trace


@dataclass(frozen=True, eq=False)
class Factor:
    """The random effects of one grouping factor: b (m, q) ~ N(0, K kron D).

    Args:
        codes: group number of each row, 0..m-1, (n,).
        Z: the row's random-effects design, all terms of the factor side by side, (n, q).
        K: relationship matrix of the levels, (m, m); independent levels if None.
    """

    codes: Array
    Z: Array
    K: Array | None = None

    @property
    def levels(self) -> int:
        """Number of levels m."""
        return int(self.codes.max()) + 1 if self.K is None else len(self.K)

    @property
    def wide(self) -> Array:
        """The design of the stacked effects b_1, ..., b_m, (n, m q)."""
        n, q = self.Z.shape
        out = np.zeros((n, self.levels * q))
        for j in range(q):
            out[np.arange(n), self.codes * q + j] = self.Z[:, j]
        return out

    def related(self) -> Array:
        """The entry of K for each pair of rows, (n, n)."""
        if self.K is None:
            return (self.codes[:, None] == self.codes[None, :]).astype(float)
        return self.K[np.ix_(self.codes, self.codes)]

    def prior(self, D: Array) -> Array:
        """Covariance of the stacked effects, K kron D, (m q, m q)."""
        return np.kron(np.eye(self.levels) if self.K is None else self.K, D)


@dataclass(frozen=True, eq=False)
class Model:
    """A mixed model with any grouping factors, at parameters that are given in each call.

    ``covs`` is a list with the natural covariance (q, q) of each factor, ``Ds`` the same relative
    to the scale; terms of a factor that are independent have zeros between them.

    Args:
        y: response, (n,).
        X: fixed-effects design, (n, p).
        factors: the grouping factors.
        weights: inverse variances, (n,), or None.
    """

    y: Array
    X: Array
    factors: tuple[Factor, ...]
    weights: Array | None = None

    def covariance(self, covs: Sequence[Array], scale: Scalar = 1.0) -> Array:
        """Covariance of the response, (n, n)."""
        n = len(self.y)
        residual = np.ones(n) if self.weights is None else 1.0 / self.weights
        V = np.diag(scale * residual)
        for factor, cov in zip(self.factors, covs, strict=True):
            V = V + factor.related() * (factor.Z @ np.asarray(cov) @ factor.Z.T)
        return V

    def natural_criterion(self, covs: Sequence[Array], scale: Scalar, reml: bool) -> Scalar:
        """-2 logL at natural parameters, maximised over beta alone."""
        return criterion_at(self.y, self.X, self.covariance(covs, scale), reml)

    def profiled_scale(self, Ds: Sequence[Array], reml: bool) -> Scalar:
        """The residual variance that maximises the likelihood at Ds."""
        n, p = self.X.shape
        return gls(self.y, self.X, self.covariance(Ds))[2] / (n - p if reml else n)

    def criterion(self, Ds: Sequence[Array], reml: bool) -> Scalar:
        """-2 logL at Ds, maximised over beta and the scale."""
        scale = self.profiled_scale(Ds, reml)
        return self.natural_criterion([scale * np.asarray(D) for D in Ds], scale, reml)

    def coefficients(self, covs: Sequence[Array], scale: float) -> tuple[Array, Array]:
        """Generalised least squares: beta (p,) and its covariance (X'V^-1 X)^-1 (p, p)."""
        beta, A, _ = gls(self.y, self.X, self.covariance(covs, scale))
        return beta, np.linalg.inv(A)

    def modes(self, covs: Sequence[Array], scale: float) -> list[Array]:
        """E(b | y) at the GLS coefficients: per factor (m, q)."""
        V = self.covariance(covs, scale)
        beta, _, _ = gls(self.y, self.X, V)
        r = np.linalg.solve(V, self.y - self.X @ beta)
        return [
            (factor.prior(cov) @ factor.wide.T @ r).reshape(factor.levels, -1)
            for factor, cov in zip(self.factors, covs, strict=True)
        ]

    def conditional_covariances(self, covs: Sequence[Array], scale: float) -> list[Array]:
        """cov(b_i | y, beta) of each level i: per factor (m, q, q)."""
        V, out = self.covariance(covs, scale), []
        for factor, cov in zip(self.factors, covs, strict=True):
            G, q = factor.prior(cov), factor.Z.shape[1]
            W = factor.wide @ G
            full = (G - W.T @ np.linalg.solve(V, W)).reshape(factor.levels, q, factor.levels, q)
            out.append(np.einsum("iaib->iab", full))
        return out

    def fitted(self, covs: Sequence[Array], scale: float) -> Array:
        """X beta + Z b at the conditional modes, (n,)."""
        beta, _ = self.coefficients(covs, scale)
        out = self.X @ beta
        for factor, b in zip(self.factors, self.modes(covs, scale), strict=True):
            out = out + np.einsum("ij,ij->i", factor.Z, b[factor.codes])
        return out

    def score_and_information(
        self,
        covs: Sequence[Array],
        scale: Scalar,
        reml: bool,
        pairs: Sequence[Sequence[tuple[int, int]]],
    ) -> tuple[Array, Array]:
        """Score and observed information of entries of the covariances, then the scale.

        ``pairs`` lists for each factor the entries (row, column) that are parameters. Formulas in
        :func:`score_and_information`.
        """
        G = []
        for factor, entries in zip(self.factors, pairs, strict=True):
            related = factor.related()
            for r, c in entries:
                outer = np.outer(factor.Z[:, r], factor.Z[:, c])
                G.append(related * (outer if r == c else outer + outer.T))
        G.append(np.diag(np.ones(len(self.y)) if self.weights is None else 1.0 / self.weights))
        return _score_and_information(self.y, self.X, self.covariance(covs, scale), G, reml)
