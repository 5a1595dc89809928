"""The criterion of a model whose grouping factors are nested: elimination up a tree.

Level 1 has the finest groups, level L the coarsest; each group of a level lies in one group of the
next.  With ``W = [Z_2 ... Z_L X y]``, the finest level is eliminated as in
:mod:`lmmax.likelihood.grouped`, separately within each group j of level 2::

    S_j = C_j + sum_{i in j} Y_i' H_i^-1 Y_i,      H_i = I + U_i D_1 U_i',    Y_i = Q_i' W_i

and every further level from the cross-products that the level below left it.  With ``a``, ``b``,
``c`` the blocks of ``S_j`` for the level's own effects and for the columns that remain::

    K = a (I + D a)^-1     G = D - D K D = (D^-1 + a)^-1      P = (I + a D)^-1 b     B = D P
    S'_j = c - b' G b      logdet_j = log|I + D a|

The rules of differentiation are closed in these four matrices::

    dS' = dc - db'B - B'db + B' da B - P' dD P                dlogdet = tr(K dD) + tr(G da)
    dK = (I - aG) da (I - Ga) - K dD K                        dG = (I - Ga) dD (I - aG) - G da G
    dP = (I - aG)(db - da B) - K dD P                         dB = (I - Ga) dD P + G (db - da B)

so that D may be singular, and the second derivatives of the whole are a second-order expansion
carried up the tree: no pass over the rows or the finest groups for each pair of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..linalg import ldl, multiply, solve_unit_lower, symmetrize, turn
from . import problem as form
from .problem import (
    Derivatives,
    Expansion,
    Hold,
    Problem,
    Reduction,
    assemble,
    duplication,
    spread,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NestedProblem(Problem):
    """Compressed data of a nested model; a pytree whose leaves are NumPy or JAX arrays.

    Groups of each level are sorted by those of the next.  Padding groups are zero.

    Attributes:
        U: triangular factors of the finest level's columns, (q1, q1, m1).
        Y: projected ``W``, (q1, w, m1) with w = q2 + ... + qL + p + 1.
        C: cross-product of what of W is outside the finest level's columns, per group of level 2,
            (w, w, m2).
        parents: for each level but the last the group of the next that a group lies in, or None
            where each of the next has equally many (with padding), one after the other.
        C_rest: cross-product of ``[X y]`` to add at the end, for padding columns, (p + 1, p + 1).
        sizes: number of groups of levels 2 to L, with padding.
        blocks: columns of D that belong to each level.
    """

    U: Any
    Y: Any
    C: Any
    parents: tuple[Any, ...]
    C_rest: Any
    sizes: tuple[int, ...] = field(metadata={"static": True})
    blocks: tuple[tuple[int, int], ...] = field(metadata={"static": True})

    @property
    def slices(self) -> tuple[slice, ...]:
        """``blocks`` as slices."""
        return tuple(slice(*block) for block in self.blocks)


@jax.custom_jvp
def moments(a: Array, b: Array, D: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Return K, G, P, B and logdet (see the module) for ``a (q, q, m)``, ``b (q, r, m)``, D."""
    q = a.shape[0]
    L, pivots = ldl(D)
    root = L * jnp.sqrt(pivots)[None, :]
    left = multiply(root.T, a)  # L' a
    H = multiply(left, root) + jnp.eye(q, dtype=a.dtype)[..., None]
    factor, size = ldl(H)
    # The whitened L' [a L, a, b]: every result is what it takes away from something.
    both = jnp.concatenate([left, multiply(root.T, b)], axis=1)
    white = solve_unit_lower(factor, both) / jnp.sqrt(size)[:, None]
    white_a, white_b = white[:, :q], white[:, q:]
    K = a - multiply(turn(white_a), white_a)
    P = b - multiply(turn(white_a), white_b)
    eye = jnp.broadcast_to(root.T[..., None], (q, q, a.shape[2]))
    half = solve_unit_lower(factor, eye) / jnp.sqrt(size)[:, None]
    G = multiply(turn(half), half)
    B = multiply(turn(half), white_b)
    return K, G, P, B, jnp.sum(jnp.log(size), axis=0)


@moments.defjvp
def _moments_jvp(primals: Any, tangents: Any) -> Any:
    a, b, D = primals
    da, db, dD = tangents
    K, G, P, B, logdet = moments(a, b, D)
    dD = symmetrize(dD)
    left = jnp.eye(a.shape[0], dtype=a.dtype)[..., None] - multiply(a, G)  # I - a G
    change = db - multiply(da, B)
    push = multiply(dD, P)
    dK = multiply(multiply(left, da), turn(left)) - multiply(multiply(K, dD), K)
    dG = multiply(multiply(turn(left), dD), left) - multiply(multiply(G, da), G)
    dP = multiply(left, change) - multiply(K, push)
    dB = multiply(turn(left), push) + multiply(G, change)
    dlogdet = jnp.sum(K * dD[..., None], axis=(0, 1)) + jnp.sum(G * da, axis=(0, 1))
    return (K, G, P, B, logdet), (dK, dG, dP, dB, dlogdet)


@jax.custom_jvp
def eliminate(S: Array, D: Array) -> tuple[Array, Array]:
    """Eliminate the first effects of ``S (w, w, m)`` with covariance ``D (q, q)``.

    Returns:
        What is left, (w - q, w - q, m), and the groups' ``log|I + D a|``, (m,).
    """
    q = D.shape[0]
    a, b, c = S[:q, :q], S[:q, q:], S[q:, q:]
    _, _, _, B, logdet = moments(a, b, D)
    return c - symmetrize(multiply(turn(b), B)), logdet


@eliminate.defjvp
def _eliminate_jvp(primals: Any, tangents: Any) -> Any:
    (S, D), (dS, dD) = primals, tangents
    q = D.shape[0]
    a, b, c = S[:q, :q], S[:q, q:], S[q:, q:]
    da, db, dc = dS[:q, :q], dS[:q, q:], dS[q:, q:]
    K, G, P, B, logdet = moments(a, b, D)
    dD = symmetrize(dD)
    cross = multiply(turn(db), B)
    rest = dc - cross - turn(cross) + multiply(turn(B), multiply(da, B))
    rest = rest - multiply(turn(P), multiply(dD, P))
    dlogdet = jnp.sum(K * dD[..., None], axis=(0, 1)) + jnp.sum(G * da, axis=(0, 1))
    return (c - symmetrize(multiply(turn(b), B)), logdet), (rest, dlogdet)


def gather(x: Array, parent: Array | None, size: int) -> Array:
    """Sum ``x (..., m)`` over the groups of each parent, (..., size)."""
    if parent is None:
        return jnp.sum(x.reshape(*x.shape[:-1], size, -1), axis=-1)
    flat = x.reshape(-1, x.shape[-1]).T
    sums = jnp.zeros((size, flat.shape[1]), x.dtype)
    sums = sums.at[jnp.asarray(parent)].add(flat, indices_are_sorted=True)
    return sums.T.reshape(*x.shape[:-1], size)


def climb(problem: NestedProblem, S: Array, D: Sequence[Array]) -> tuple[Array, Array]:
    """Eliminate levels 2 to L; return ``S (p + 1, p + 1)`` and the sum of their logdets."""
    logdet = jnp.zeros((), S.dtype)
    for level, block in enumerate(D):
        S, parts = eliminate(S, block)
        logdet = logdet + jnp.sum(parts)
        if level + 1 < len(D):
            S = gather(S, problem.parents[level + 1], problem.sizes[level + 1])
    return jnp.sum(S, axis=-1) + problem.C_rest, logdet


def _whiten(problem: NestedProblem, D: Array) -> tuple[Array, Array]:
    """Return ``H_i^(-1/2) [U_i Y_i]`` and ``log|H_i|`` of the finest groups."""
    U, Y = jnp.asarray(problem.U), jnp.asarray(problem.Y)
    q = U.shape[0]
    H = multiply(multiply(U, D), turn(U)) + jnp.eye(q, dtype=U.dtype)[..., None]
    L, pivots = ldl(H)
    white = solve_unit_lower(L, jnp.concatenate([U, Y], axis=1))
    return white / jnp.sqrt(pivots)[:, None], jnp.sum(jnp.log(pivots), axis=0)


@form.reduce.register
def reduce(problem: NestedProblem, D: Array) -> tuple[Array, Array]:
    """Return the whitened cross-product ``S (p+1, p+1)`` and ``log|V|``; differentiable in D."""
    first, *rest = problem.slices
    q = first.stop - first.start
    white, logdet = _whiten(problem, D[first, first])
    white_Y = white[:, q:]
    S = problem.C + gather(multiply(turn(white_Y), white_Y), problem.parents[0], problem.sizes[0])
    S, more = climb(problem, S, [D[here, here] for here in rest])
    return S, jnp.sum(logdet) + more


@form.derivatives.register
def derivatives(
    problem: NestedProblem,
    D: Array,
    reml: Array,
    log_scale: Array,
    profile: Array,
    hold: Hold | None = None,
) -> Derivatives:
    """Evaluate the criterion with its exact gradient and Hessian."""
    found = expand(problem, D)
    result = assemble(problem, found.at, found.curvature, reml, log_scale, profile, hold)
    return spread(result, problem.slices, len(D))


@form.expand.register
def expand(problem: NestedProblem, D: Array) -> Expansion:
    """Return the reduction at ``D`` to second order.

    The finest level's expansion is in closed form, summed over the groups of each parent::

        S_c = -sum P' E_c P     S_cd = sum P' (E_c K E_d + E_d K E_c) P

    and then carried up: derivatives along a pair of directions at a time.
    """
    first, *rest = problem.slices
    q1 = first.stop - first.start
    dtype = D.dtype
    white, logdets = _whiten(problem, D[first, first])
    white_Y = white[:, q1:]
    product = multiply(turn(white[:, :q1]), white)
    K, P = product[:, :q1], product[:, q1:]
    parent, size = problem.parents[0], problem.sizes[0]
    upper = [D[here, here] for here in rest]

    E1 = np.moveaxis(duplication(q1), -1, 0)
    k1 = len(E1)
    # One pass per sum: per pair (a, b) of effects P_a' P_b, per four K_ab P_c' P_d.
    squares = {
        (a, b): gather(_outer(P, a, b), parent, size) for a in range(q1) for b in range(a + 1)
    }
    slopes = jnp.stack([-_contract(E, squares) for E in E1])
    S = problem.C + gather(multiply(turn(white_Y), white_Y), parent, size)
    KE = jnp.einsum("abm,cbd->cadm", K, jnp.asarray(E1, dtype))
    total_K = jnp.sum(K, axis=-1)
    logdet_slope = jnp.einsum("ab,cab->c", total_K, jnp.asarray(E1, dtype))
    logdet_bend = -jnp.einsum("cabm,dbam->cd", KE, KE)

    # A basis of all entries: of the finest level first, then of each level above.
    basis: list[list[Any]] = []
    for level, here in enumerate(rest):
        for E in np.moveaxis(duplication(here.stop - here.start), -1, 0):
            basis.append([E if at == level else None for at in range(len(rest))])
    k = k1 + len(basis)
    directions = [
        jnp.stack(
            [jnp.zeros_like(block)] * k1
            + [
                jnp.zeros_like(block) if part[level] is None else jnp.asarray(part[level], dtype)
                for part in basis
            ]
        )
        for level, block in enumerate(upper)
    ]
    S_directions = jnp.concatenate([slopes, jnp.zeros((k - k1, *S.shape), dtype)])
    pairs = np.array([(c, d) for c in range(k) for d in range(c + 1)], dtype=np.int32)

    def second(c: Array, d: Array) -> Array:
        """Second derivative of the first sums along entries c and d of the finest level."""
        Ec, Ed = (jnp.asarray(E1, dtype)[jnp.minimum(at, k1 - 1)] for at in (c, d))
        bent = multiply(multiply(Ec, K), Ed)
        moved = multiply(bent, P)
        sums = gather(multiply(turn(P), moved), parent, size)
        return sums + turn(sums)

    def along(pair: Array) -> tuple[Any, Any, Any]:
        c, d = pair[0], pair[1]
        step_c = (S_directions[c], [block[c] for block in directions])
        step_d = (S_directions[d], [block[d] for block in directions])
        bend = lax.cond((c < k1) & (d < k1), second, lambda c, d: jnp.zeros_like(S), c, d)

        def at(t: Array, u: Array) -> tuple[Array, Array]:
            here = S + t * step_c[0] + u * step_d[0] + t * u * bend
            blocks = [
                block + t * x + u * y
                for block, x, y in zip(upper, step_c[1], step_d[1], strict=True)
            ]
            return climb(problem, here, blocks)

        zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)

        def slope(t: Array) -> Any:
            return jax.jvp(lambda u: at(t, u), (zero,), (one,))

        (value, first_order), (_, second_order) = jax.jvp(slope, (zero,), (one,))
        return value, first_order, second_order

    values, by_d, both = lax.map(along, jnp.asarray(pairs))
    position = np.zeros((k, k), dtype=np.int32)
    position[pairs[:, 0], pairs[:, 1]] = position[pairs[:, 1], pairs[:, 0]] = np.arange(len(pairs))
    diagonal = position[np.arange(k), np.arange(k)]
    none = jnp.zeros(k - k1, dtype)
    at_D = Reduction(
        S=values[0][0],
        logdet=jnp.sum(logdets) + values[1][0],
        S_slope=by_d[0][diagonal],
        logdet_slope=by_d[1][diagonal] + jnp.concatenate([logdet_slope, none]),
    )
    S_bend, bends = both[0][position], both[1][position]
    bends = bends.at[:k1, :k1].add(logdet_bend)
    return Expansion(at_D, S_bend, bends)


def _outer(P: Array, a: int, b: int) -> Array:
    """Symmetric part of the products of the rows ``P[a]'`` and ``P[b]``, (w, w, m)."""
    product = P[a][:, None] * P[b][None]
    return product if a == b else 0.5 * (product + turn(product))


def _contract(E: np.ndarray, squares: dict[tuple[int, int], Array]) -> Array:
    """Return ``sum_ab E[a, b] P_a' P_b`` for symmetric 0/1 ``E`` from the sums of its pairs."""
    terms = [pair * (1.0 if a == b else 2.0) for (a, b), pair in squares.items() if E[a, b] != 0.0]
    return sum(terms[1:], terms[0])
