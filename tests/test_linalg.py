"""Kernels against NumPy, for unrolled and looped orders, with and without a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmax.linalg import (
    LEAF,
    UNROLL_LIMIT,
    gls,
    gram_lower,
    inverse_lower,
    ldl,
    solve_unit_lower,
    solve_unit_upper,
)

ORDERS = (1, 2, 3, UNROLL_LIMIT, UNROLL_LIMIT + 1, 12)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def spd(q: int, batch: tuple[int, ...], seed: int = 0) -> np.ndarray:
    A = np.random.default_rng(seed).normal(size=(q, q + 2, *batch))
    return np.einsum("ik...,jk...->ij...", A, A)


@pytest.mark.parametrize("batch", [(), (7,)])
@pytest.mark.parametrize("q", ORDERS)
def test_ldl_reproduces_the_matrix(q: int, batch: tuple[int, ...]) -> None:
    A = spd(q, batch)
    L, d = ldl(jnp.asarray(A))
    assert np.allclose(np.einsum("ik...,k...,jk...->ij...", L, d, L), A, rtol=1e-12, atol=1e-12)
    assert np.all(np.triu(np.moveaxis(np.asarray(L), (0, 1), (-2, -1)), 1) == 0.0)
    assert np.all(np.asarray(d) > 0.0)


@pytest.mark.parametrize("q", ORDERS)
def test_ldl_of_a_semidefinite_matrix(q: int) -> None:
    root = np.random.default_rng(q).normal(size=(q, max(q - 1, 1)))
    if q == 1:
        root[:] = 0.0
    A = root @ root.T
    L, d = ldl(jnp.asarray(A))
    assert np.allclose(L * d @ np.asarray(L).T, A, atol=1e-10)


@pytest.mark.parametrize("q", ORDERS[1:])
def test_ldl_with_a_floor_is_positive_definite_for_any_symmetric_matrix(q: int) -> None:
    A = np.random.default_rng(q).normal(size=(q, q))
    A = A + A.T
    L, d = ldl(jnp.asarray(A), floor=1e-6)
    assert np.all(np.asarray(d) >= 1e-6)
    assert np.linalg.eigvalsh(A)[0] < 0.0 < np.linalg.eigvalsh(L * d @ np.asarray(L).T)[0]


@pytest.mark.parametrize("q", ORDERS)
def test_triangular_solves(q: int) -> None:
    rng = np.random.default_rng(q)
    L = np.tril(rng.normal(size=(q, q)), -1) + np.eye(q)
    B = rng.normal(size=(q, 3))
    assert np.allclose(solve_unit_lower(jnp.asarray(L), jnp.asarray(B)), np.linalg.solve(L, B))
    assert np.allclose(solve_unit_upper(jnp.asarray(L), jnp.asarray(B)), np.linalg.solve(L.T, B))


@pytest.mark.parametrize("p", [0, 1, 3, 8, 70, 300])
def test_gls_against_numpy(p: int) -> None:
    S = spd(p + 1, ())
    beta, inverse, rss, logdet = gls(jnp.asarray(S))
    A, b = S[:p, :p], S[:p, p]
    assert np.allclose(beta, np.linalg.solve(A, b), rtol=1e-10)
    assert np.allclose(inverse, np.linalg.inv(A), rtol=1e-10, atol=1e-12)
    assert np.isclose(rss, S[p, p] - b @ np.linalg.solve(A, b), rtol=1e-10)
    assert np.isclose(logdet, np.linalg.slogdet(A)[1] if p else 0.0, rtol=1e-12)


def test_gls_of_many_coefficients_in_lanes() -> None:
    S = np.stack([spd(71, (), seed) for seed in range(3)])
    together = jax.vmap(gls)(jnp.asarray(S))
    for lane, own in enumerate(S):
        for found, alone in zip(together, gls(jnp.asarray(own)), strict=True):
            assert np.allclose(found[lane], alone, rtol=1e-12)


def test_gls_rule_against_plain_autodiff_to_second_order() -> None:
    S = jnp.asarray(spd(4, ()))

    def with_rule(S: jax.Array) -> jax.Array:
        beta, _, rss, logdet = gls(S)
        return logdet + jnp.log(rss) + jnp.sum(beta**2)

    def plain(S: jax.Array) -> jax.Array:
        A, b, c = S[:3, :3], S[:3, 3], S[3, 3]
        beta = jnp.linalg.solve(A, b)
        return jnp.linalg.slogdet(A)[1] + jnp.log(c - b @ beta) + jnp.sum(beta**2)

    E = jnp.asarray(spd(4, (), seed=1))  # a symmetric direction

    for f, g in ((lambda t: with_rule(S + t * E), lambda t: plain(S + t * E)),):
        assert np.isclose(jax.grad(f)(0.0), jax.grad(g)(0.0), rtol=1e-10)
        assert np.isclose(jax.grad(jax.grad(f))(0.0), jax.grad(jax.grad(g))(0.0), rtol=1e-9)


@pytest.mark.parametrize("n", [5, LEAF, LEAF + 1, 4 * LEAF + 3])
def test_large_triangles_by_halves(n: int) -> None:
    """Orders that are one block, and that are cut into blocks of unequal order."""
    rng = np.random.default_rng(n)
    L = np.tril(rng.normal(size=(n, n))) / np.sqrt(n) + 2.0 * np.eye(n)
    inverse = np.asarray(jax.jit(inverse_lower)(jnp.asarray(L)))
    assert np.allclose(inverse @ L, np.eye(n), rtol=0.0, atol=1e-12)
    assert not np.triu(inverse, 1).any()
    gram = np.asarray(jax.jit(gram_lower)(jnp.asarray(L)))
    assert np.allclose(gram, L.T @ L, rtol=1e-13, atol=1e-13)
