"""One grouping factor with many random effects whose covariance moves along few directions.

Of a covariance structure over q levels (times, positions), D has q (q + 1) / 2 entries and few
parameters: two for a first-order autoregression.  The Hessian in all entries, as in
:mod:`lmmax.likelihood.grouped`, costs q^4 for each group; along c directions ``E_c``, contracted
before anything is summed, c q^3::

    S_c = -sum_i P_i' E_c P_i                      logdet_c = tr(E_c sum_i K_i)
    logdet_cd + tr(outer S_cd) = sum_i tr((2 B_i - K_i) E_c K_i E_d),    B_i = P_i outer P_i'

``K_i`` depends on the factor ``U_i`` alone, so groups with the same one (as many rows at the same
levels) share its factorisation, and ``B_i`` enters by its sum over them.  The gradient in all
entries of D is no more than ``sum_i (K_i - B_i)``.

Groups come first here: products of large matrices, one group after the other, are what a processor
does best.  A batched Cholesky factor would be slow, and may hang; see :mod:`lmmax.linalg`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..linalg import inverse_lower, symmetrize
from ..parameters import pack_triangle
from .problem import Derivatives, Expansion, Hold, Reduction, assembled, regression

if TYPE_CHECKING:
    from .grouped import GroupedProblem


class Whitened(NamedTuple):
    """One evaluation; u different factors, m groups.

    Attributes:
        of: the factor of each group, (m,).
        weight: multiplicity of the log-determinant of each factor, (u,).
        logdet: ``sum_i log|H_i|``.
        S: whitened cross-product of ``[X y]``, (p + 1, p + 1).
        K: ``U' H^-1 U`` of each factor, (u, q, q).
        P: ``U_i' H_i^-1 Y_i`` of each group, (q, m, p + 1).
    """

    of: Array
    weight: Array
    logdet: Array
    S: Array
    K: Array
    P: Array


def whiten(problem: GroupedProblem, D: Array) -> Whitened:
    """Evaluate the reduction at ``D (q, q)`` in working coordinates."""
    U, Y, weight = (jnp.asarray(x) for x in (problem.U, problem.Y, problem.weight))
    q, width, m = Y.shape
    if problem.patterns is None:
        of = jnp.arange(m, dtype=jnp.int32)
    else:
        first, of = (jnp.asarray(x) for x in problem.patterns)
        U = U[:, :, first]
    U, Y = jnp.moveaxis(U, -1, 0), jnp.moveaxis(Y, -1, 0)
    eye = jnp.eye(q, dtype=D.dtype)

    def factor(U: Array) -> tuple[Array, Array, Array]:
        L = lax.linalg.cholesky(eye + U @ D @ U.T, symmetrize_input=False)
        inverse = inverse_lower(L)
        return inverse, inverse @ U, 2.0 * jnp.sum(jnp.log(jnp.diagonal(L)))

    inverse, F, logdets = lax.map(factor, U)
    back = jnp.swapaxes(F, 1, 2)
    white = inverse[of] @ Y
    flat = white.reshape(m * q, width)
    multiple = jnp.zeros(len(U), D.dtype).at[of].add(weight)
    return Whitened(
        of=of,
        weight=multiple,
        logdet=multiple @ logdets,
        S=problem.C + flat.T @ flat,
        K=back @ F,
        P=jnp.swapaxes(back[of] @ white, 0, 1),
    )


@jax.custom_jvp
def reduce(problem: GroupedProblem, D: Array) -> tuple[Array, Array]:
    """Return ``S (p + 1, p + 1)`` and ``sum_i log|H_i|``; differentiable in D, not in the data."""
    at = whiten(problem, D)
    return at.S, at.logdet


@reduce.defjvp
def _reduce_jvp(primals: Any, tangents: Any) -> Any:
    (problem, D), dD = primals, tangents[1]
    at = whiten(problem, D)
    q, m, width = at.P.shape
    moved = (symmetrize(dD) @ at.P.reshape(q, m * width)).reshape(q * m, width)
    dlogdet = jnp.sum(jnp.tensordot(at.weight, at.K, 1) * dD)
    return (at.S, at.logdet), (-(at.P.reshape(q * m, width).T @ moved), dlogdet)


def slopes(at: Whitened, E: Array) -> Reduction:
    """Return the reduction with its slopes along ``E (c, q, q)``."""
    q, m, width = at.P.shape
    flat, tall = at.P.reshape(q, m * width), at.P.reshape(q * m, width)

    def moved(E: Array) -> Array:
        return -(tall.T @ (E @ flat).reshape(q * m, width))

    K = jnp.tensordot(at.weight, at.K, 1)
    return Reduction(
        S=at.S,
        logdet=at.logdet,
        S_slope=lax.map(moved, E),
        logdet_slope=E.reshape(len(E), -1) @ K.reshape(-1),
    )


def derivatives(
    problem: GroupedProblem,
    D: Array,
    reml: Array,
    log_scale: Array,
    profile: Array,
    hold: Hold | None,
    directions: Array,
) -> Derivatives:
    """Evaluate the criterion with its exact derivatives along ``directions (c, q, q)``.

    See :func:`lmmax.likelihood.problem.derivatives`.
    """
    at = whiten(problem, D)
    found = slopes(at, directions)
    here = regression(problem, at.S, reml, log_scale, profile, hold)
    q, m, width = at.P.shape
    P = jnp.swapaxes(at.P, 0, 1)
    if len(at.K) == 1:
        B = (at.P @ here.outer).reshape(q, m * width) @ at.P.reshape(q, m * width).T
        B = B[None]
    else:
        B = jnp.zeros_like(at.K).at[at.of].add((P @ here.outer) @ jnp.swapaxes(P, 1, 2))
    K = at.weight[:, None, None] * at.K
    size = len(directions)

    def curvature(of_factor: tuple[Array, Array]) -> Array:
        T, K = of_factor
        left = (T @ directions).reshape(size, -1)
        return left @ jnp.swapaxes(K @ directions, 1, 2).reshape(size, -1).T

    bends = jnp.sum(lax.map(curvature, (2.0 * B - K, at.K)), axis=0)
    result = assembled(problem, found, here, 0.5 * (bends + bends.T), reml)
    G = jnp.sum(K - B, axis=0) * (2.0 - jnp.eye(q, dtype=D.dtype))
    return result._replace(gradient=jnp.append(pack_triangle(G), result.gradient[-1]))


def expand(problem: GroupedProblem, D: Array, directions: Array) -> Expansion:
    """Return the reduction at ``D`` to second order along ``directions (c, q, q)``."""
    at = whiten(problem, D)
    size, width = len(directions), at.P.shape[2]
    P = jnp.swapaxes(at.P, 0, 1)

    def of_factor(carry: Array, K: tuple[Array, Array]) -> tuple[Array, None]:
        weight, K_u = K
        KE = (K_u @ directions).reshape(size, -1)
        EK = jnp.swapaxes(K_u @ directions, 1, 2).reshape(size, -1)
        return carry - weight * (KE @ EK.T), None

    def of_group(carry: Array, group: tuple[Array, Array]) -> tuple[Array, None]:
        P, of = group
        EP = directions @ P  # (c, q, w)
        moved = at.K[of] @ EP
        return carry + jnp.einsum("cax,day->cdxy", EP, moved), None

    none = jnp.zeros((size, size), D.dtype)
    bend, _ = lax.scan(of_factor, none, (at.weight, at.K))
    half, _ = lax.scan(of_group, jnp.zeros((size, size, width, width), D.dtype), (P, at.of))
    return Expansion(
        at=slopes(at, directions),
        S_bend=half + half.transpose(1, 0, 2, 3),
        logdet_bend=bend,
    )
