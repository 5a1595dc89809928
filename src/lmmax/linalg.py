"""Small dense kernels that run over many matrices at once, batch axes last.

A matrix argument has shape ``(q, q, ...)``; everything behind the first two axes is batch.  With
the batch last, every scalar operation of a factorisation is one vector operation over the batch,
on a CPU as on a GPU.  ``jnp.linalg`` is not used on batches: on CPU it is slow, and in jaxlib
0.10 its thread pool can deadlock for batches of tens of thousands of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap

UNROLL_LIMIT = 6
"""Largest order whose factorisation is unrolled; beyond it a loop keeps the graph small."""

LEAF = 256
"""Least order of a triangle that LAPACK solves as a whole."""

SUBSTITUTED = 64
"""Largest order whose triangles are inverted by substitution in a loop.  LAPACK takes as long, but
starts threads from order 32 on; they and those of XLA wait for each other, for milliseconds on
busy processors."""


def symmetrize(A: Array) -> Array:
    """Return ``(A + A') / 2`` over the first two axes."""
    return 0.5 * (A + jnp.swapaxes(A, 0, 1))


def multiply(A: Array, B: Array) -> Array:
    """Product over the first two axes, ``(a, b, ...)`` by ``(b, c, ...)``.

    One of the factors may lack the one batch axis of the other.
    """
    A = A if A.ndim == 3 else A[..., None]
    B = B if B.ndim == 3 else B[..., None]
    # A sum of outer products fuses into one loop over the batch; a batched dot does not.
    product = A[:, 0, None] * B[0][None]
    for j in range(1, A.shape[1]):
        product = product + A[:, j, None] * B[j][None]
    return product


def turn(A: Array) -> Array:
    """Return the transpose over the first two axes."""
    return jnp.swapaxes(A, 0, 1)


def ldl(A: Array, floor: Array | float | None = None) -> tuple[Array, Array]:
    """Factor symmetric ``A = L diag(d) L'`` with unit lower triangular ``L``.

    Args:
        A: symmetric, shape ``(q, q, ...)``.
        floor: if given, each pivot is replaced by ``max(|pivot|, floor)``, so that the product is
            a positive definite matrix that equals ``A`` where ``A`` is safely positive definite
            (a descent direction for any Hessian).  Without it, pivots that are not positive give
            zero columns, which factors positive *semi*definite matrices.

    Returns:
        ``L`` of shape ``(q, q, ...)`` and ``d`` of shape ``(q, ...)``.
    """
    q = A.shape[0]
    if q <= UNROLL_LIMIT:
        return _ldl_unrolled(A, floor)

    rows = jnp.arange(q).reshape((q,) + (1,) * (A.ndim - 2))

    def eliminate(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        A, L, d = carry
        column = lax.dynamic_index_in_dim(A, j, 1, keepdims=False)
        pivot = _pivot(lax.dynamic_index_in_dim(column, j, 0, keepdims=False), floor)
        below = jnp.where(rows > j, _divide(column, pivot), 0.0)
        A = A - pivot * below[:, None] * below[None, :]
        L = lax.dynamic_update_index_in_dim(L, below + (rows == j), j, 1)
        return A, L, lax.dynamic_update_index_in_dim(d, pivot, j, 0)

    zeros = jnp.zeros_like(A)
    _, L, d = lax.fori_loop(0, q, eliminate, (A, zeros, zeros[0]))
    return L, d


def _ldl_unrolled(A: Array, floor: Array | float | None) -> tuple[Array, Array]:
    q = A.shape[0]
    zero, one = jnp.zeros_like(A[0, 0]), jnp.ones_like(A[0, 0])
    L = [[one if i == j else zero for j in range(q)] for i in range(q)]
    d: list[Array] = []
    for j in range(q):
        pivot = A[j, j]
        for k in range(j):
            pivot = pivot - L[j][k] * L[j][k] * d[k]
        pivot = _pivot(pivot, floor)
        d.append(pivot)
        for i in range(j + 1, q):
            entry = A[i, j]
            for k in range(j):
                entry = entry - L[i][k] * L[j][k] * d[k]
            L[i][j] = _divide(entry, pivot)
    return jnp.stack([jnp.stack(row) for row in L]), jnp.stack(d)


def _pivot(value: Array, floor: Array | float | None) -> Array:
    return jnp.maximum(value, 0.0) if floor is None else jnp.maximum(jnp.abs(value), floor)


def _divide(a: Array, pivot: Array) -> Array:
    """``a / pivot``, or zero for a zero pivot, with finite derivatives in either case."""
    positive = pivot > 0.0
    return jnp.where(positive, a / jnp.where(positive, pivot, 1.0), 0.0)


def solve_unit_lower(L: Array, B: Array) -> Array:
    """Solve ``L X = B`` for unit lower triangular ``L (q, q, ...)`` and ``B (q, r, ...)``."""
    q = L.shape[0]
    if q == 0:
        return B
    if q <= UNROLL_LIMIT:
        rows: list[Array] = []
        for i in range(q):
            row = B[i]
            for j in range(i):
                row = row - L[i, j] * rows[j]
            rows.append(row)
        return jnp.stack(rows)

    index = jnp.arange(q).reshape((q,) + (1,) * (L.ndim - 2))

    def substitute(j: Array, X: Array) -> Array:
        column = lax.dynamic_index_in_dim(L, j, 1, keepdims=False)
        below = jnp.where(index > j, column, 0.0)
        return X - below[:, None] * lax.dynamic_index_in_dim(X, j, 0, keepdims=True)

    return lax.fori_loop(0, q, substitute, B)


def solve_unit_upper(L: Array, B: Array) -> Array:
    """Solve ``L' X = B`` for unit lower triangular ``L (q, q, ...)`` and ``B (q, r, ...)``."""
    flipped = jnp.flip(jnp.swapaxes(L, 0, 1), (0, 1))
    return jnp.flip(solve_unit_lower(flipped, jnp.flip(B, 0)), 0)


def inverse_lower(L: Array, leaf: int | None = None) -> Array:
    """Return the inverse of one large lower triangular ``L (n, n)``.

    By halves down to blocks of order ``leaf``, so that nearly all the work is in matrix products;
    LAPACK's triangular solve with the identity takes three times as long.
    """
    n = L.shape[0]
    if n <= SUBSTITUTED:
        diagonal = jnp.diagonal(L)
        return solve_unit_lower(L / diagonal, jnp.eye(n, dtype=L.dtype)) / diagonal[:, None]
    leaf = _leaf(n) if leaf is None else leaf
    if n <= leaf:
        eye = jnp.eye(n, dtype=L.dtype)
        return lax.linalg.triangular_solve(L, eye, left_side=True, lower=True)
    half = _half(n)
    upper, lower = inverse_lower(L[:half, :half], leaf), inverse_lower(L[half:, half:], leaf)
    corner = -lower @ (L[half:, :half] @ upper)
    right = jnp.zeros((half, n - half), L.dtype)
    return jnp.concatenate(
        [jnp.concatenate([upper, right], axis=1), jnp.concatenate([corner, lower], axis=1)]
    )


def gram_lower(X: Array) -> Array:
    """Return ``X' X`` for one large lower triangular ``X (n, n)``, without most of its zeros."""
    # The transpose as an array of its own: in double precision on a CPU, a product whose first
    # factor is read transposed takes twice as long.
    return _gram(lax.optimization_barrier(X.T), X, 2 * _leaf(len(X)))


def _gram(T: Array, X: Array, leaf: int) -> Array:
    """Return ``T X`` for lower triangular X and its transpose T."""
    n = X.shape[0]
    if n <= leaf:
        return T @ X
    half = _half(n)
    corner = X[half:, :half]
    first = _gram(T[:half, :half], X[:half, :half], leaf) + T[:half, half:] @ corner
    across = T[half:, half:] @ corner
    return jnp.concatenate(
        [
            jnp.concatenate([first, across.T], axis=1),
            jnp.concatenate([across, _gram(T[half:, half:], X[half:, half:], leaf)], axis=1),
        ]
    )


def _leaf(n: int) -> int:
    """Return the order of blocks at which halving ends: three halvings, or fewer for a small n."""
    return max(LEAF, n // 7)


def _half(n: int) -> int:
    """Return about half of n, a multiple of 64."""
    return -(-n // 128) * 64


@jax.custom_jvp
def gls(S: Array) -> tuple[Array, Array, Array, Array]:
    """Generalised least squares from the cross-product of the whitened ``[X y]``.

    Args:
        S: ``[X y]' V^-1 [X y]``, shape ``(p + 1, p + 1, ...)``.

    Returns:
        ``beta`` (p, ...), ``(X' V^-1 X)^-1`` (p, p, ...), the residual sum of squares (...), and
        ``log|X' V^-1 X|`` (...).  The derivative rule is closed in these four, so derivatives of
        any order cost a few products of p x p matrices and never pass through a factorisation.
    """
    p = S.shape[0] - 1
    if p > SUBSTITUTED and S.ndim == 2:
        return _gls_large(S)
    L, d = ldl(S)
    # The last row of L holds the coefficients in the coordinates of the factor.
    eye = jnp.broadcast_to(jnp.eye(p).reshape((p, p) + (1,) * (S.ndim - 2)), S[:p, :p].shape)
    half = solve_unit_lower(L[:p, :p], eye.astype(S.dtype))
    inverse = jnp.sum(half[:, :, None] * half[:, None, :] / d[:p, None, None], axis=0)
    beta = jnp.sum(half * L[p, :p, None], axis=0)
    return beta, inverse, d[p], jnp.sum(jnp.log(d[:p]), axis=0)


def _gls_of_one(S: Array) -> tuple[Array, Array, Array, Array]:
    """Return what :func:`gls` does for many coefficients: nearly all of it products of matrices."""
    p = S.shape[0] - 1
    half = inverse_lower(lax.linalg.cholesky(S[:p, :p], symmetrize_input=False))
    onto = half @ S[:p, p]
    rss = jnp.maximum(S[p, p] - onto @ onto, 0.0)
    return half.T @ onto, gram_lower(half), rss, -2.0 * jnp.sum(jnp.log(jnp.diagonal(half)))


# One matrix after the other under `vmap`: a batch of LAPACK's factors may hang.
_gls_large: Callable[[Array], tuple[Array, Array, Array, Array]] = sequential_vmap(_gls_of_one)


@gls.defjvp
def _gls_jvp(primals: Any, tangents: Any) -> Any:
    (S,), (dS,) = primals, tangents
    p = S.shape[0] - 1
    beta, inverse, rss, logdet = gls(S)
    dA, db, dc = dS[:p, :p], dS[:p, p], dS[p, p]
    dA_beta = jnp.einsum("ij...,j...->i...", dA, beta)
    dbeta = jnp.einsum("ij...,j...->i...", inverse, db - dA_beta)
    dinverse = -jnp.einsum("ij...,jk...,kl...->il...", inverse, dA, inverse)
    drss = dc - 2.0 * jnp.sum(beta * db, axis=0) + jnp.sum(beta * dA_beta, axis=0)
    dlogdet = jnp.einsum("ij...,ij...->...", inverse, dA)
    return (beta, inverse, rss, logdet), (dbeta, dinverse, drss, dlogdet)
