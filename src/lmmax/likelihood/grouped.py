"""The criterion of a model with one grouping factor and independent residuals.

``y_i = X_i beta + Z_i b_i + e_i`` with ``b_i ~ N(0, scale D)`` and ``e_i ~ N(0, scale I)``.  With
the thin QR factorisation ``Z_i = Q_i U_i`` and ``Y_i = Q_i' [X_i y_i]``, every evaluation needs
only ``U_i`` and ``Y_i`` (see :mod:`lmmax.compress`)::

    H_i = I + U_i D U_i'
    S(D) = C + sum_i Y_i' H_i^-1 Y_i            the whitened cross-product of [X y]
    logdet(D) = sum_i log|H_i|

Derivatives with respect to ``D`` flow through ``P_i = U_i' H_i^-1 Y_i`` and
``K_i = U_i' H_i^-1 U_i``::

    dS = -sum_i P_i' dD P_i     dlogdet = tr(dD sum_i K_i)     dP_i = -K_i dD P_i
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..linalg import ldl, multiply, solve_unit_lower, symmetrize, turn
from . import narrow
from . import problem as form
from .problem import Derivatives, Expansion, Hold, Problem, Reduction, assemble, duplication

CHUNK_GROUPS = 2048
"""Groups handled together in one pass, so that intermediates stay in the processor's cache."""

MANY_EFFECTS = 10
"""Random effects of a group beyond which a Hessian in all entries of D, at q^4 for each group, is
most of the work; see :mod:`lmmax.likelihood.narrow` for what does without it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupedProblem(Problem):
    """Compressed data of a one-factor model; a pytree whose leaves are NumPy or JAX arrays.

    Groups that share ``U`` may have been merged into fewer pseudo-groups with the same
    ``sum Y' H^-1 Y``, hence ``weight``: how many groups' log-determinants an entry stands for.
    Padding groups have ``U = Y = weight = 0``; padding columns of X are zero with a one on the
    diagonal of ``C``.  Neither changes the criterion.  Working coordinates: see :class:`Problem`.

    Attributes:
        U: triangular factors of the random-effects design, shape (q, q, m).
        Y: projected ``[X y]``, shape (q, p + 1, m).
        weight: multiplicity of each group's log-determinant, shape (m,).
        C: cross-product of the part of ``[X y]`` outside the column spaces of Z, (p + 1, p + 1).
        patterns: for many effects where each different factor comes first, (u,), and the factor
            of each group, (m,); None where each group counts as having its own.
    """

    U: Any
    Y: Any
    weight: Any
    C: Any
    patterns: tuple[Any, Any] | None = None

    @property
    def contracts(self) -> bool:
        """Whether few directions of many effects are worth going along."""
        return len(self.n_groups) > MANY_EFFECTS


@form.reduce.register
def reduce(problem: GroupedProblem, D: Array) -> tuple[Array, Array]:
    """Sum over groups: the whitened cross-product ``S (p+1, p+1)`` and ``sum_i log|H_i|``.

    ``D`` is in working coordinates.  Differentiable to any order in ``D`` and the data; the rule
    for ``D`` costs two small matrices per group instead of a pass through their factorisation.
    """
    if problem.patterns is not None:
        return narrow.reduce(problem, D)
    return _reduce(problem.U, problem.Y, problem.weight, problem.C, D)


@jax.custom_jvp
def _reduce(U: Array, Y: Array, weight: Array, C: Array, D: Array) -> tuple[Array, Array]:
    q = U.shape[0]
    white, logdet = _whiten(U, Y, D)
    Y_white = white[:, q:]
    return C + jnp.einsum("axm,aym->xy", Y_white, Y_white), jnp.sum(weight * logdet)


@_reduce.defjvp
def _reduce_jvp(primals: Any, tangents: Any) -> Any:
    U, Y, weight, C, D = primals
    dU, dY, dweight, dC, dD = tangents
    q = U.shape[0]
    white, logdet = _whiten(U, Y, D)
    Y_white = white[:, q:]
    P, K = _moments(white)
    # The residual of the whitened regression on U: H^-1 = I - U (D - D K D) U' without H^-1.
    DP = multiply(D, P)
    fitted = Y - multiply(U, DP)  # H^-1 Y
    dDP = multiply(symmetrize(dD), P)
    half = jnp.einsum("axm,aym->xy", dY, fitted) - jnp.einsum(
        "axm,aym->xy", multiply(dU, DP), fitted
    )
    dS = dC + half + half.T - jnp.einsum("axm,aym->xy", P, dDP)
    UD = multiply(U, D)
    H_inverse_U = U - multiply(UD, K)
    dlogdet = (
        jnp.sum(dweight * logdet)
        + jnp.sum(dD * jnp.einsum("abm,m->ab", K, weight))
        + 2.0 * jnp.sum(weight * jnp.sum(H_inverse_U * multiply(dU, D), axis=(0, 1)))
    )
    S = C + jnp.einsum("axm,aym->xy", Y_white, Y_white)
    return (S, jnp.sum(weight * logdet)), (dS, dlogdet)


def _whiten(U: Array, Y: Array, D: Array) -> tuple[Array, Array]:
    """Return ``H_i^(-1/2) [U_i Y_i]``, shape (q, q + p + 1, m), and ``log|H_i|`` (m,)."""
    q = U.shape[0]
    H = multiply(multiply(U, D), turn(U)) + jnp.eye(q, dtype=U.dtype)[..., None]
    L, pivots = ldl(H)
    white = solve_unit_lower(L, jnp.concatenate([U, Y], axis=1))
    return white / jnp.sqrt(pivots)[:, None], jnp.sum(jnp.log(pivots), axis=0)


def _moments(white: Array) -> tuple[Array, Array]:
    """Return ``P_i = U_i' H_i^-1 Y_i`` (q, p + 1, m) and ``K_i = U_i' H_i^-1 U_i`` (q, q, m)."""
    q = white.shape[0]
    product = multiply(turn(white[:, :q]), white)
    return product[:, q:], product[:, :q]


@form.derivatives.register
def derivatives(
    problem: GroupedProblem,
    D: Array,
    reml: Array,
    log_scale: Array,
    profile: Array,
    hold: Hold | None = None,
    directions: Array | None = None,
) -> Derivatives:
    """Evaluate the criterion with its exact gradient and Hessian in one pass over the groups.

    To second order in a step ``E`` of D the reduction is ``S - sum P'EP + sum P'EKEP`` and
    ``logdet + tr(E sum K) - sum tr(KEKE) / 2``.  With ``M_c = sum P' E_c P`` for the c-th entry of
    the triangle and ``B_i = P_i outer P_i'``::

        S_c = -M_c                 logdet_c = tr(E_c sum K)
        logdet_cd + tr(outer S_cd) = sum_i tr((2 B_i - K_i) E_c K_i E_d)

    Autodiff of the criterion gives the same numbers and is the test's oracle, but visits the
    groups once per direction, and compiles for twice as long.
    """
    if directions is not None:
        return narrow.derivatives(problem, D, reml, log_scale, profile, hold, directions)
    q, width, _ = problem.Y.shape

    def first_pass(U: Array, Y: Array, weight: Array) -> tuple[Any, tuple[Array, Array]]:
        white, logdets = _whiten(U, Y, D)
        P, K = _moments(white)
        Y_white, P_flat = white[:, q:], P.reshape(q * width, -1)
        sums = (
            jnp.einsum("axm,aym->xy", Y_white, Y_white),
            jnp.sum(weight * logdets),
            P_flat @ P_flat.T,
            K.reshape(q * q, -1) @ weight,
        )
        return sums, (P, K)

    data = (jnp.asarray(problem.U), jnp.asarray(problem.Y), jnp.asarray(problem.weight))
    (S, logdet, M, K_sum), (P, K) = _over_chunks(first_pass, data)
    twice = jnp.asarray(duplication(q).reshape(q * q, -1), S.dtype)
    M = M.reshape(q, width, q, width).transpose(0, 2, 1, 3).reshape(q * q, -1)
    M = (twice.T @ M).reshape(-1, width, width)

    def curvature(outer: Array) -> Array:
        def second_pass(P: Array, K: Array, weight: Array) -> tuple[Array, tuple[()]]:
            B = jnp.einsum("axm,bxm->abm", jnp.einsum("axm,xy->aym", P, outer), P)
            return (2.0 * B - weight * K).reshape(q * q, -1) @ K.reshape(q * q, -1).T, ()

        T, _ = _over_chunks(second_pass, (P, K, data[2]))  # indices da, bc
        T = T.reshape(q, q, q, q).transpose(1, 2, 3, 0).reshape(q * q, q * q)  # tr(. E_ab K E_cd)
        T = twice.T @ T @ twice
        return 0.5 * (T + T.T)

    at = Reduction(S + problem.C, logdet, -M, twice.T @ K_sum)
    return assemble(problem, at, curvature, reml, log_scale, profile, hold)


@form.expand.register
def expand(problem: GroupedProblem, D: Array, directions: Array | None = None) -> Expansion:
    """Return the reduction at ``D`` to second order, in one pass over the groups.

    The second derivatives of S are kept apart here, which the solver has no use for:
    ``S_cd = sum P' (E_c K E_d + E_d K E_c) P``, from ``sum K_ab P P'`` for each pair of effects.
    """
    if directions is not None:
        return narrow.expand(problem, D, directions)
    q, width, _ = problem.Y.shape
    pairs = [(a, b) for a in range(q) for b in range(a + 1)]

    def one_pass(U: Array, Y: Array, weight: Array) -> tuple[Any, tuple[()]]:
        white, logdets = _whiten(U, Y, D)
        P, K = _moments(white)
        Y_white, P_flat, K_flat = white[:, q:], P.reshape(q * width, -1), K.reshape(q * q, -1)
        sums = (
            jnp.einsum("axm,aym->xy", Y_white, Y_white),
            jnp.sum(weight * logdets),
            P_flat @ P_flat.T,
            K_flat @ weight,
            (weight * K_flat) @ K_flat.T,
            jnp.stack([(K[a, b] * P_flat) @ P_flat.T for a, b in pairs]),
        )
        return sums, ()

    data = (jnp.asarray(problem.U), jnp.asarray(problem.Y), jnp.asarray(problem.weight))
    (S, logdet, M, K_sum, KK, KM), _ = _over_chunks(one_pass, data)
    E = jnp.asarray(duplication(q), S.dtype)
    M = M.reshape(q, width, q, width)
    KK = KK.reshape(q, q, q, q)
    to = np.zeros((q, q), dtype=np.int32)
    for i, (a, b) in enumerate(pairs):
        to[a, b] = to[b, a] = i
    KM = KM[to].reshape(q, q, q, width, q, width)
    half = jnp.einsum("dac,abdxey,bef->cfxy", E, KM, E, optimize=True)
    at = Reduction(
        S=S + problem.C,
        logdet=logdet,
        S_slope=-jnp.einsum("abc,axby->cxy", E, M),
        logdet_slope=jnp.einsum("abc,ab->c", E, K_sum.reshape(q, q)),
    )
    return Expansion(
        at=at,
        S_bend=half + half.transpose(1, 0, 2, 3),
        logdet_bend=-jnp.einsum("abc,bgha,ghf->cf", E, KK, E, optimize=True),
    )


def _over_chunks(
    function: Callable[..., tuple[Any, Any]], data: tuple[Array, ...]
) -> tuple[Any, Any]:
    """Call ``function`` on chunks of the groups: sum its first result, join its second.

    A chunk's intermediates stay in the cache, and memory does not grow with the number of groups.
    """
    m = data[0].shape[-1]
    if m % CHUNK_GROUPS or m == CHUNK_GROUPS:
        return function(*data)

    def chunk(i: Array | int) -> tuple[Any, Any]:
        at = i * CHUNK_GROUPS
        return function(*(lax.dynamic_slice_in_dim(x, at, CHUNK_GROUPS, -1) for x in data))

    def body(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        sums, joined = carry
        new_sums, parts = chunk(i)
        joined = jax.tree.map(
            lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, i * CHUNK_GROUPS, -1),
            joined,
            parts,
        )
        return jax.tree.map(jnp.add, sums, new_sums), joined

    sums, parts = jax.eval_shape(chunk, 0)
    start = (
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums),
        jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], m), x.dtype), parts),
    )
    return lax.fori_loop(0, m // CHUNK_GROUPS, body, start)
