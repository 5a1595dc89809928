"""The criterion of one-factor models that share their designs but for a few columns each.

In the notation of :mod:`lmmax.likelihood.grouped`, ``H_i``, ``K_i = U_i' H_i^-1 U_i`` and
``F_i = H_i^-1 U_i`` of group i depend on D and ``U_i`` only; groups with the same ``U`` form a
pattern u.  The part of the reduction that belongs to X is therefore linear in a few entries for
each pattern, with the same coefficients for all lanes::

    X'V^-1 X  = C + sum_u sum_ab (H_u^-1)_ab XX_u[a, b]            XX_u[a, b] = sum_i X_i[a]' X_i[b]
    its slope =   - sum_u sum_ab (F_u E_c F_u')_ab XX_u[a, b]

and so are the weights ``X_i outer X_i'`` of its second derivatives, which are needed contracted
with a matrix of each lane only.  Over all lanes these are products with one large matrix, where a
lane by itself would need many small ones.

What a lane has of its own is mostly the response.  Where a column of X is, such as the genotype of
a scan, the shared columns are those of X without it, and the response if there is but one: the
form does not tell the columns apart until ``[X y]`` is put together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..linalg import ldl
from ..parameters import pack_triangle, unpack_symmetric
from .grouped import GroupedProblem
from .problem import Derivatives, Problem, Reduction, assembled, duplication, regression

MOST_EFFECTS = 4
"""Most random effects for which this form pays: the weights grow with their fourth power."""
MOST_BYTES = 1 << 26
"""Most bytes of the shared matrix."""


class Exchanged(NamedTuple):
    """What tells lanes apart that lack some rows: groups that leave, and others in their place.

    The coordinates are those of ``[X y]`` of the :class:`SharedProblem`, w + c in number.

    Attributes:
        U: triangular factors, (n, q, q, g).
        Y: projected columns, (n, q, w + c, g).
        sign: 1.0 for groups that come, -1.0 for those that go, 0.0 for none, (n, g).
        C: change of the cross-product outside the column spaces of Z, (n, w + c, w + c).
    """

    U: Any
    Y: Any
    sign: Any
    C: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedProblem(Problem):
    """Compressed data of n lanes of a one-factor model; a pytree of NumPy or JAX arrays.

    The w shared columns are called X, the c columns that each lane has of its own y; they are those
    of X and the response where ``order`` is not given.

    Attributes:
        U: triangular factors of the patterns, (q, q, u).
        weight: number of groups of each, (u,).
        XX: for each pair of effects ``a <= b``, and each pattern, the lower triangle of
            ``XX_u[a, b]``, the symmetric part of it twice where a and b differ, (k u, w (w + 1)/2).
        X: projected X of the pseudo-groups, (q, m, w); see :mod:`lmmax.batch.statistics`.
        pattern: the pattern of each pseudo-group, (m,); None where each is its own.
        C: cross-product of X outside the column spaces of Z, (w, w).
        y: projected columns of the lanes, (n, c, q, m).
        cross: cross-products of these with X, then with one another, outside, (n, c, w + c).
        order: the position among ``[X y]``, first the shared columns, of each column of the fixed
            effects, and last that of the response; None for the positions that they are in.
        exchanged: groups that lanes have in place of others; the numbers of observations and
            groups are those of each lane then.
    """

    U: Any
    weight: Any
    XX: Any
    X: Any
    pattern: Any
    C: Any
    y: Any
    cross: Any
    order: tuple[int, ...] | None = field(default=None, metadata={"static": True})
    exchanged: Exchanged | None = None

    def by_group(self) -> GroupedProblem:
        """Return the pseudo-groups without X, for moments of the responses; of NumPy arrays."""
        pattern = np.arange(len(self.weight)) if self.pattern is None else self.pattern
        count = np.bincount(pattern, minlength=len(self.weight))
        w, c = self.X.shape[2], self.y.shape[1]
        last = w + c - 1 if self.order is None else self.order[-1]
        if last < w:  # the same for all lanes
            y, outside = self.X[:, :, last], np.asarray(self.C[last, last])
        else:
            y, outside = self.y[:, last - w], self.cross[:, last - w, last]
        return GroupedProblem(
            **{each.name: getattr(self, each.name) for each in fields(Problem)},
            U=self.U[:, :, pattern],
            Y=y[..., None, :],
            weight=(self.weight / count.clip(min=1))[pattern],
            C=outside[..., None, None],
        )


def pays(q: int, p: int, n_patterns: int) -> bool:
    """Return whether the form pays for q random effects and p coefficients."""
    size = 8 * (q * (q + 1) // 2) * n_patterns * (p * (p + 1) // 2)
    return q <= MOST_EFFECTS and size <= MOST_BYTES


def shared_matrix(X: np.ndarray, pattern: np.ndarray, n_patterns: int) -> np.ndarray:
    """Return ``XX`` of :class:`SharedProblem` from the rows ``X (q, m, p)``."""
    q, _, p = X.shape
    parts = []
    for a, b in _triangle(q):
        squares = np.zeros((n_patterns, p, p))
        np.add.at(squares, pattern, X[a][:, :, None] * X[b][:, None, :])
        if a != b:
            squares = squares + squares.transpose(0, 2, 1)
        parts.append(pack_triangle(squares.transpose(1, 2, 0)).T)
    return np.concatenate(parts)


def derivatives_of_lanes(
    problem: SharedProblem, D: Array, reml: Array, log_scale: Array, profile: Array
) -> Derivatives:
    """Evaluate the criterion of all lanes with its exact gradient and Hessian.

    With ``v = y V^-1`` and the like by rows, and ``B_i = F_i' [X y]_i outer [X y]_i' F_i``, the
    curvature that :func:`lmmax.likelihood.problem.assemble` asks for is
    ``sum_i tr((2 B_i - K_i) E_c K_i E_d)``.

    Args:
        problem: compressed data.
        D: relative covariances in working coordinates, (n, q, q).
        reml: 1.0 for REML, 0.0 for ML.
        log_scale: values of ``s`` where it is not profiled out, (n,).
        profile: whether ``s`` is set to its minimiser given D.

    Returns:
        The derivatives, with a leading axis of lanes.
    """
    n, c, q, m = problem.y.shape
    w, n_patterns = problem.X.shape[-1], problem.U.shape[-1]
    entries = _triangle(q)
    k = len(entries)
    XX, weight = jnp.asarray(problem.XX), jnp.asarray(problem.weight)
    X = jnp.moveaxis(jnp.asarray(problem.X), -1, 0).reshape(w, q * m).T
    own, cross = jnp.asarray(problem.y), jnp.asarray(problem.cross)
    each = range(c)
    patterns = jnp.asarray(problem.U)
    inverse, F, K, logdets = _whitened([[x[None] for x in row] for row in patterns], D)
    K_packed = _packed(K)
    inverse_rows, F_rows, K_rows = (_by_row(problem, part) for part in (inverse, F, K))

    # The value and its k slopes side by side, in one product each for XX, Xy and yy.
    slopes = [-_packed(part) for part in _slopes(F, F)]
    weights = jnp.stack([_packed(inverse), *slopes], axis=1)
    S_XX = (weights.reshape(n * (k + 1), -1) @ XX).reshape(n, k + 1, -1)
    P, moved = [], []
    for j in each:
        y = [[own[:, j, a]] for a in range(q)]
        P.append(_product(_turned(F_rows), y))
        parts = [_column(_product(inverse_rows, y))]
        parts += [-_column(part) for part in _slopes(F_rows, _turned(P[j]))]
        moved.append(jnp.stack(parts, axis=1).reshape(n, k + 1, q * m))
    y_moved = jnp.stack(moved, axis=1)
    S_Xy = (y_moved.reshape(n * c * (k + 1), q * m) @ X).reshape(n, c, k + 1, w)
    flat = own.reshape(n, c, q * m)
    S_yy = jnp.stack([_traces(y_moved[:, j], flat) for j in each], axis=1)
    S = jax.vmap(jax.vmap(_bordered))(
        S_XX.at[:, 0].add(pack_triangle(jnp.asarray(problem.C))),
        jnp.swapaxes(S_Xy.at[:, :, 0].add(cross[:, :, :w]), 1, 2),
        jnp.swapaxes(S_yy.at[:, :, 0].add(cross[:, :, w:]), 1, 2),
    )
    logdet, logdet_slope = logdets @ weight, K_packed @ weight
    if problem.exchanged is not None:
        change = _exchange(problem.exchanged, D)
        S = S + change.S
        logdet, logdet_slope = logdet + change.logdet, logdet_slope + change.logdet_slope
    to = np.arange(w + c) if problem.order is None else np.array(problem.order)
    S = S[:, :, to[:, None], to]
    at = Reduction(S[:, 0], logdet, S[:, 1:], logdet_slope * _multiples(q))
    n_obs = jnp.broadcast_to(jnp.asarray(problem.n_obs), (n,))
    here = jax.vmap(
        lambda S, s, n_obs: regression(replace(problem, n_obs=n_obs), S, reml, s, profile)
    )(at.S, log_scale, n_obs)

    back = np.argsort(to)
    outer = here.outer[:, back[:, None], back]
    packed = jax.vmap(pack_triangle)(outer[:, :w, :w] * (2.0 - jnp.eye(w))) @ XX.T
    packed = packed.reshape(n, k, n_patterns) / _multiples(q)[:, None]
    B = _product(_turned(F), _product(_unpacked(packed, q), F))
    curvature = _traces(2.0 * _packed(B) - weight * K_packed, K_packed)
    shared = (outer[:, w:, :w].reshape(n * c, w) @ X.T).reshape(n, c, q, m)
    P_half = []
    for j in each:
        half = shared[:, j]
        for i in each:
            half = half + 0.5 * outer[:, w + j, w + i, None, None] * own[:, i]
        P_half.append(_product(_turned(F_rows), [[half[:, a]] for a in range(q)]))
    B_rows = [
        [
            reduce(add, (P_half[j][a][0] * P[j][b][0] + P[j][a][0] * P_half[j][b][0] for j in each))
            for b in range(q)
        ]
        for a in range(q)
    ]
    curvature = curvature + _traces(2.0 * _packed(B_rows), _packed(K_rows))
    if problem.exchanged is not None:
        curvature = curvature + change.curvature(outer)
    return jax.vmap(
        lambda at, here, curvature, n_obs: assembled(
            replace(problem, n_obs=n_obs), at, here, curvature, reml
        )
    )(at, here, (curvature.reshape(n, k * k) @ _contraction(q)).reshape(n, k, k), n_obs)


class _Change(NamedTuple):
    """What groups of each lane add to the reduction, slopes behind the value: (n, k + 1, ...).

    ``P``, by effect, and ``K``, a packed triangle, are those of the groups, (n, w + c, g) and
    (n, k, g).
    """

    S: Array
    logdet: Array
    logdet_slope: Array
    P: list[Array]
    K: Array
    sign: Array

    def curvature(self, outer: Array) -> Array:
        """Return what they add to the sums over products of entries, (n, k, k)."""
        half = [jnp.einsum("nxy,nyg->nxg", outer, part) for part in self.P]
        B = [[jnp.sum(a * b, axis=1) for b in self.P] for a in half]
        return _traces((2.0 * _packed(B) - self.K) * self.sign[:, None], self.K)


def _exchange(own: Exchanged, D: Array) -> _Change:
    """Return what the groups of lanes add, not much else than :func:`grouped.derivatives` does."""
    q = D.shape[1]
    U, Y, sign = (jnp.asarray(leaf) for leaf in (own.U, own.Y, own.sign))
    inverse, F, K, logdets = _whitened([[U[:, i, j] for j in range(q)] for i in range(q)], D)

    def times(A: Matrix) -> list[Array]:
        """Return the rows of ``A Y``, (n, w + c, g) each."""
        return [reduce(add, (x[:, None] * Y[:, b] for b, x in enumerate(row))) for row in A]

    def summed(x: Array, y: Array) -> Array:
        return jnp.einsum("nxg,nyg->nxy", x * sign[:, None], y)

    P, white = times(_turned(F)), times(inverse)
    parts = [jnp.asarray(own.C) + reduce(add, (summed(white[a], Y[:, a]) for a in range(q)))]
    for i, j in _triangle(q):
        both = summed(P[i], P[j])
        parts.append(-both if i == j else -(both + jnp.swapaxes(both, 1, 2)))
    K_packed = _packed(K)
    return _Change(
        S=jnp.stack(parts, axis=1),
        logdet=jnp.sum(sign * logdets, axis=1),
        logdet_slope=jnp.einsum("nkg,ng->nk", K_packed, sign),
        P=P,
        K=K_packed,
        sign=sign,
    )


Matrix = list[list[Array]]
"""Matrices for lanes and patterns at once, an array (n, u) for each entry: loops over it have no
branches, as those over an array of all entries would."""


def _whitened(factors: Matrix, D: Array) -> tuple[Matrix, Matrix, Matrix, Array]:
    """Return ``H^-1``, ``H^-1 U`` and ``U' H^-1 U`` by lane and pattern, and ``log|H|`` (n, u).

    Args:
        factors: U, the same for all lanes, (1, u), or not, (n, u).
        D: relative covariances, (n, q, q).
    """
    q = len(factors)
    each = range(q)
    half = _product(factors, [[D[:, i, j, None] for j in each] for i in each])
    H = _product(half, _turned(factors))
    L, pivots = ldl(jnp.stack([jnp.stack(row) for row in H]) + jnp.eye(q)[..., None, None])
    # Few numbers that are dear, which many that are cheap are made of, each where it is needed.
    below, shares = lax.optimization_barrier(
        ([[L[i, j] for j in range(i)] for i in each], [1.0 / pivots[i] for i in each])
    )
    zero, one = jnp.zeros(()), jnp.ones(())
    eye = [[one if i == j else zero for j in each] for i in each]
    of_U, of_eye = (_solved(below, B) for B in (factors, eye))
    shared_U, shared_eye = (
        [[share * x for x in row] for share, row in zip(shares, part, strict=True)]
        for part in (of_U, of_eye)
    )
    logdets = -jnp.log(math.prod(shares[1:], start=shares[0]))
    transposed = _turned(of_eye)
    return (
        _product(transposed, shared_eye),
        _product(transposed, shared_U),
        _product(_turned(of_U), shared_U),
        logdets,
    )


def _solved(below: Matrix, B: Matrix) -> Matrix:
    """Solve ``L X = B`` for unit lower triangular L, given what is below its diagonal."""
    rows: Matrix = []
    for i, row in enumerate(B):
        new = list(row)
        for j in range(i):
            new = [x - below[i][j] * done for x, done in zip(new, rows[j], strict=True)]
        rows.append(new)
    return rows


def _by_row(problem: SharedProblem, by_pattern: Matrix) -> Matrix:
    """Return what belongs to patterns for each pseudo-group, (n, m) for (n, u)."""
    if problem.pattern is None or problem.U.shape[-1] == 1:
        return by_pattern
    take = jnp.asarray(problem.pattern)
    return [[entry[:, take] for entry in row] for row in by_pattern]


def _slopes(F: Matrix, G: Matrix) -> list[Matrix]:
    """Return ``F E_c G'`` for each entry c of the triangle of D, by the rows of F and of G."""
    return [
        [[x[i] * y[j] if i == j else x[i] * y[j] + x[j] * y[i] for y in G] for x in F]
        for i, j in _triangle(len(F))
    ]


def _traces(Q: Array, K: Array) -> Array:
    """Return the sums over the last axis of the products of rows, (n, k, l)."""
    if K.shape[-1] < Q.shape[-1]:
        Q = jnp.sum(Q, axis=-1, keepdims=True)
    return jnp.einsum("nau,nbu->nab", Q, K)


def _product(A: Matrix, B: Matrix) -> Matrix:
    return [
        [
            sum((x * y for x, y in zip(row[1:], column[1:], strict=True)), row[0] * column[0])
            for column in zip(*B, strict=True)
        ]
        for row in A
    ]


def _turned(A: Matrix) -> Matrix:
    return [list(column) for column in zip(*A, strict=True)]


def _column(A: Matrix) -> Array:
    """Return a matrix of one column by lanes, (n, q, m)."""
    return jnp.stack([row[0] for row in A], axis=1)


def _packed(A: Matrix) -> Array:
    """Return the lower triangle of a symmetric matrix by lanes, (n, k, u)."""
    return jnp.stack([A[i][j] for i, j in _triangle(len(A))], axis=1)


def _unpacked(packed: Array, q: int) -> Matrix:
    """Undo `_packed`."""
    at = {pair: packed[:, c] for c, pair in enumerate(_triangle(q))}
    return [[at[max(i, j), min(i, j)] for j in range(q)] for i in range(q)]


def _bordered(XX: Array, yX: Array, yy: Array) -> Array:
    """Return the cross-product of [X y] from its parts, that of X as a triangle."""
    return jnp.block([[unpack_symmetric(XX), yX.T], [yX, 0.5 * (yy + yy.T)]])


def _triangle(q: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(q) for j in range(i + 1)]


def _multiples(q: int) -> np.ndarray:
    """Return how often each entry of a triangle is in the full matrix, (k,)."""
    return np.array([1.0 if i == j else 2.0 for i, j in _triangle(q)])


def _contraction(q: int) -> np.ndarray:
    """Return the map of products of entries to ``tr(Q E_c K E_d)``, (k k, k k)."""
    E = duplication(q)
    k = E.shape[2]
    return np.einsum("ija,jkc,klb,lid->abcd", E, E, E, E).reshape(k * k, k * k)
