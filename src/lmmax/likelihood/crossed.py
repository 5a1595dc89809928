"""The criterion of a model with several grouping factors that cross: a head and a dense tail.

The *head* is one factor, with effects ``b_i`` of its groups i; the *tail* is the effects ``u`` of
all levels of all other factors together, N of them.  Given head and tail, rows are independent::

    y = X beta + Z_1 b + Z_t u + e,    b_i ~ N(0, scale D_1),   u ~ N(0, scale D_t)

The head is eliminated group by group as in :mod:`lmmax.likelihood.grouped`, with the columns of the
tail beside those of X and y.  With ``Z_1i = Q_i U_i``, ``Y_i = Q_i' [Z_t X y]_i``, and C the
cross-product of what is outside the column spaces of the head::

    H_i = I + U_i D_1 U_i'        S = C + sum_i Y_i' H_i^-1 Y_i        logdet_1 = sum_i log|H_i|

Then the tail, through one dense Cholesky factor of order N, with ``D_t = L L'`` (possibly
singular)::

    T = I + L' S_tt L     S <- S_ww - S_wt G S_tw     logdet = logdet_1 + log|T|,    w = [X y]

where ``G = (D_t^-1 + S_tt)^-1 = L T^-1 L'`` is the covariance of u given y relative to the scale.
All derivatives follow from ``M = T^-1`` and the blocks that belong to the head; see
:func:`derivatives`.  The order of elimination is that of Bates et al. (2015), section 5.

Cross-products square what effects are larger than the residual: with standard deviations of r times
its own, T and S keep ``r^-2`` of their digits.  For such data a problem holds rows in their place,
``C_tt``, ``C_tw`` and C as a triangular factor R of what is outside the column spaces of the head,
and the tail is eliminated by one orthogonal triangularisation, which costs r where the squares cost
``r^2``::

    [ H_i^-1/2 Y_it L   H_i^-1/2 Y_iw ]        [ R_tt  R_tw ]
    [     R_t L              R_w      ]  =  Q  [       R_ww ]      T = R_tt' R_tt    S = R_ww' R_ww
    [       I                 0       ]        [        0   ]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..linalg import gram_lower, inverse_lower, ldl, solve_unit_lower
from . import problem as form
from .cells import Cells
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

SINGLE_PRECISION_ORDER = 512
"""Order of the tail from which the largest product of the Hessian is in single precision: six of
its digits serve a Newton step, and standard errors, as well as sixteen."""

INSIDE = 1e-6
"""How far a singular block is moved inside, in sampling variances of its best known level."""


class Tail(NamedTuple):
    """A factor in the tail: its effects are columns ``start + effect * levels + level``."""

    start: int
    effects: int
    levels: int

    @property
    def columns(self) -> slice:
        """Columns of the tail."""
        return slice(self.start, self.start + self.effects * self.levels)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossedProblem(Problem):
    """Compressed data of a crossed model; a pytree whose leaves are NumPy or JAX arrays.

    Padding groups and cells are zero, and so are padding levels of the tail.

    Attributes:
        U: triangular factors of the head's columns, (q1, q1, m); m = 0 without a head.
        cells: projections of the tail's columns on the head's, ``Y_i[t]``.
        Y: projected ``[X y]``, (q1, p + 1, m).
        C_tail: the tail's cross-product outside the head's column spaces, (N, N).
        C_cross: that of the tail and ``[X y]``, (N, p + 1).
        C: that of ``[X y]``, (p + 1, p + 1).
        roots: per factor of the tail the factor ``L`` of a relationship matrix ``L L'`` between its
            levels, (levels, levels), or None where levels are independent.
        precision: per factor of the tail the largest entry of ``Z'Z``'s diagonal (of ``L'Z'Z L``
            with a relationship matrix), (factors,).
        tails: the factors in the tail.
        blocks: columns of D that belong to the head (empty without one), then to each tail factor.
        outside: where effects are far larger than the residual, a triangular factor of what the
            head leaves of ``[Z_t X]``, (k, N + p); None elsewhere.  ``C_tail`` and ``C_cross`` are
            empty with it, and C holds the padding columns of X only.
        outside_y: the column of y beside it, with one more entry for what no column of it has,
            (k + 1,).
    """

    U: Any
    cells: Any
    Y: Any
    C_tail: Any
    C_cross: Any
    C: Any
    roots: tuple[Any, ...]
    precision: Any
    tails: tuple[Tail, ...] = field(metadata={"static": True})
    blocks: tuple[tuple[int, int], ...] = field(metadata={"static": True})
    outside: Any = None
    outside_y: Any = None

    @property
    def slices(self) -> tuple[slice, ...]:
        """``blocks`` as slices."""
        return tuple(slice(*block) for block in self.blocks)

    @property
    def costly(self) -> bool:
        """See :class:`Problem`."""
        return self.outside is None

    @property
    def effect_shapes(self) -> tuple[tuple[int, int], ...]:
        """Effects and groups of the head, if any, and of each factor of the tail."""
        head = ((self.U.shape[0], self.U.shape[2]),) if self.U.shape[0] else ()
        return (*head, *((tail.effects, tail.levels) for tail in self.tails))


class Posterior(NamedTuple):
    """What one evaluation finds, for derivatives and for the conditional effects.

    The tail's effects are *standard* ones here: independent with the residual's variance, before
    ``L`` gives them their covariance, and relationship matrices their correlation between levels.

    Attributes:
        head_P: ``Z_1' V_1^-1 Z_t`` by groups, with V_1 the variance without the tail.
        head_K: ``Z_1' V_1^-1 Z_1``, (q1, q1, m).
        head_w: ``Z_1' V_1^-1 [X y]``, (q1, p + 1, m).
        logdet: ``log|V|``.
        S: whitened cross-product of ``[X y]``, (p + 1, p + 1).
        M: ``T^-1``, covariance of the standard effects given y, relative to the scale, (N, N).
        P: ``(Z_t L)' V^-1 [X y]``, which are their conditional modes too, (N, p + 1).
        root: ``L`` with ``D = L L'``, lower triangular, (q, q).
        root_inverse: its inverse, not finite where D is singular.
    """

    head_P: Cells
    head_K: Array
    head_w: Array
    logdet: Array
    S: Array
    M: Array
    P: Array
    root: Array
    root_inverse: Array


class _Head(NamedTuple):
    """What the head makes of its own columns, of the tail's and of ``[X y]``.

    Attributes:
        U, Y, cells: ``H_i^-1/2`` times those of the problem.
        logdet: ``sum_i log|H_i|``.
    """

    U: Array
    Y: Array
    cells: Any
    logdet: Array


def _whiten_head(problem: CrossedProblem, D: Array) -> _Head:
    here = problem.slices[0]
    U, Y = jnp.asarray(problem.U), jnp.asarray(problem.Y)
    q = U.shape[0]
    if q == 0:
        return _Head(U, Y, problem.cells, jnp.zeros((), D.dtype))
    H = jnp.einsum("abm,bc,dcm->adm", U, D[here, here], U) + jnp.eye(q, dtype=U.dtype)[..., None]
    L, pivots = ldl(H)
    root = jnp.sqrt(pivots)
    white = solve_unit_lower(L, jnp.concatenate([U, Y], axis=1)) / root[:, None]
    cells = problem.cells.whiten(L, root)
    return _Head(white[:, :q], white[:, q:], cells, jnp.sum(jnp.log(pivots)))


def _eliminate_head(problem: CrossedProblem, D: Array) -> tuple[Any, ...]:
    """Return the statistics of tail and ``[X y]`` after the head, and the head's own."""
    head, cells = _whiten_head(problem, D), problem.cells
    q = len(head.U)
    S = (problem.C_tail, problem.C_cross, problem.C)
    S_tail, S_cross, S_ww = map(jnp.asarray, S)
    if q:
        cells = head.cells
        S_tail = S_tail + sum(cells.gram(a, a) for a in range(q))
        S_cross = S_cross + cells.transposed(head.Y)
        S_ww = S_ww + jnp.einsum("axm,aym->xy", head.Y, head.Y)
    return S_tail, S_cross, S_ww, *_head_products(head)


def _head_products(head: _Head) -> tuple[Any, ...]:
    """Return ``log|V_1|`` and what of :class:`Posterior` begins with ``head_``."""
    if not len(head.U):
        return head.logdet, head.cells, jnp.zeros((0, 0, 0), head.logdet.dtype), head.Y
    back = jnp.swapaxes(head.U, 0, 1)
    return (
        head.logdet,
        head.cells.multiply(back),
        jnp.einsum("abm,bcm->acm", back, head.U),
        jnp.einsum("abm,bxm->axm", back, head.Y),
    )


def _over_effects(problem: CrossedProblem, D: Array, x: Array) -> Array:
    """Return ``(D_t (x) I) x`` for ``x (N, r)``: D acts on the effects of each level."""
    if _plain(problem):
        return _diagonal(problem, D)[:, None] * x
    parts = []
    for tail, here in zip(problem.tails, problem.slices[1:], strict=True):
        part = x[tail.columns].reshape(tail.effects, tail.levels, -1)
        block = D[here, here]
        # Sums of multiples fuse with what follows; a product with so small a matrix would not.
        for a in range(tail.effects):
            row = block[a, 0] * part[0]
            for b in range(1, tail.effects):
                row = row + block[a, b] * part[b]
            parts.append(row)
    return jnp.concatenate(parts)


def _plain(problem: CrossedProblem) -> bool:
    """Return whether each factor of the tail has one effect, so that D acts by multiples."""
    return all(tail.effects == 1 for tail in problem.tails)


def _diagonal(problem: CrossedProblem, D: Array) -> Array:
    """Return D's diagonal for each of the tail's effects, (N,), where each factor has one."""
    return jnp.concatenate(
        [
            jnp.broadcast_to(D[here.start, here.start], (tail.levels,))
            for tail, here in zip(problem.tails, problem.slices[1:], strict=True)
        ]
    )


def _over_levels(problem: CrossedProblem, x: Array, transpose: bool) -> Array:
    """Return ``L x`` or ``L' x`` for ``x (N, r)``, L the factor of the relationship matrices."""
    if all(root is None for root in problem.roots):
        return x
    parts = []
    for tail, root in zip(problem.tails, problem.roots, strict=True):
        part = x[tail.columns]
        if root is not None:
            root = jnp.asarray(root).T if transpose else jnp.asarray(root)
            part = jnp.einsum("lk,akr->alr", root, part.reshape(tail.effects, tail.levels, -1))
        parts.append(part.reshape(tail.effects * tail.levels, -1))
    return jnp.concatenate(parts)


def _both_levels(problem: CrossedProblem, A: Array, transpose: bool) -> Array:
    """Return ``L' A L`` (``transpose``) or ``L A L'`` for ``A (N, N)``."""
    return _over_levels(problem, _over_levels(problem, A, transpose).T, transpose).T


def evaluate(problem: CrossedProblem, D: Array) -> Posterior:
    """Eliminate head and tail at ``D`` (working coordinates), regular in the tail's blocks."""
    unit, pivots = ldl(D)
    root = unit * jnp.sqrt(pivots)[None, :]
    if problem.outside is None:
        S_tail, S_cross, S, logdet, head_P, head_K, head_w = _eliminate_head(problem, D)
        T = _standard(problem, root, _both_levels(problem, S_tail, True))
        T = T + jnp.eye(len(T), dtype=T.dtype)
        factor = lax.linalg.cholesky(T, symmetrize_input=False)
        M = gram_lower(inverse_lower(factor))
        S_cross = _over_effects(problem, root.T, _over_levels(problem, S_cross, True))
        P = M @ S_cross
        S = S - S_cross.T @ P
    else:
        head = _whiten_head(problem, D)
        logdet, head_P, head_K, head_w = _head_products(head)
        factor, R_cross, R = _triangularise(problem, head, root)
        inverse = inverse_lower(factor)
        M = gram_lower(inverse)
        P = inverse.T @ R_cross
        S = R.T @ R
    eye = jnp.eye(len(D), dtype=D.dtype)
    return Posterior(
        head_P=head_P,
        head_K=head_K,
        head_w=head_w,
        logdet=logdet + 2.0 * jnp.sum(jnp.log(jnp.abs(jnp.diagonal(factor)))),
        S=S,
        M=M,
        P=P,
        root=root,
        root_inverse=solve_unit_lower(unit, eye) / jnp.sqrt(pivots)[:, None],
    )


def _triangularise(problem: CrossedProblem, head: _Head, root: Array) -> tuple[Array, ...]:
    """Return ``R_tt' (N, N)``, ``R_tw`` and ``R_ww`` of the module's last equation.

    Args:
        problem: a problem with ``outside``.
        head: its head.
        root: ``L`` with ``D = L L'``, (q, q).
    """
    outside, outside_y = jnp.asarray(problem.outside), jnp.asarray(problem.outside_y)
    n = sum(tail.effects * tail.levels for tail in problem.tails)
    rows = jnp.concatenate([head.cells.dense(), jnp.pad(outside[:, :n], ((0, 1), (0, 0)))])
    rows = _over_effects(problem, root.T, _over_levels(problem, rows.T, True)).T
    beside = jnp.concatenate(
        [jnp.pad(outside[:, n:], ((0, 1), (0, 0))), outside_y[:, None]], axis=1
    )
    head_Y = jnp.swapaxes(head.Y, 1, 2).reshape(-1, head.Y.shape[1])
    whole = jnp.concatenate([rows, jnp.concatenate([head_Y, beside])], axis=1)
    prior = jnp.eye(n, whole.shape[1], dtype=whole.dtype)
    padding = jnp.pad(jnp.asarray(problem.C), ((0, 0), (n, 0)))  # its own root: ones and zeros
    R = jnp.linalg.qr(jnp.concatenate([whole, prior, padding]), mode="r")
    return R[:n, :n].T, R[:n, n:], R[n:, n:]


def _standard(problem: CrossedProblem, root: Array, A: Array) -> Array:
    """Return ``L' A L`` for symmetric ``A (N, N)``, L acting on the effects of each level."""
    if _plain(problem):
        scale = _diagonal(problem, root)
        return A * scale[:, None] * scale[None, :]
    return _over_effects(problem, root.T, _over_effects(problem, root.T, A).T)


@form.reduce.register
def reduce(problem: CrossedProblem, D: Array) -> tuple[Array, Array]:
    """Return the whitened cross-product ``S (p+1, p+1)`` and ``log|V|``.

    Differentiable by plain autodiff, at singular D too: through an LU factor of ``I + S_tt D_t``;
    with ``outside``, at regular D.
    """
    if problem.outside is not None:
        unit, pivots = ldl(D)
        head = _whiten_head(problem, D)
        factor, _, R = _triangularise(problem, head, unit * jnp.sqrt(pivots)[None, :])
        logdet = head.logdet + 2.0 * jnp.sum(jnp.log(jnp.abs(jnp.diagonal(factor))))
        return R.T @ R, logdet
    S_tail, S_cross, S, logdet, *_ = _eliminate_head(problem, D)
    S_tail = _both_levels(problem, S_tail, True)
    S_cross = _over_levels(problem, S_cross, True)
    T = jnp.eye(len(S_tail), dtype=D.dtype) + _over_effects(problem, D, S_tail).T
    solved = _over_effects(problem, D, jnp.linalg.solve(T, S_cross))
    return S - S_cross.T @ solved, logdet + jnp.linalg.slogdet(T)[1]


@form.derivatives.register
def derivatives(
    problem: CrossedProblem,
    D: Array,
    reml: Array,
    log_scale: Array,
    profile: Array,
    hold: Hold | None = None,
) -> Derivatives:
    """Evaluate the criterion with its exact gradient and Hessian, and the conditional effects."""
    inside, moved, at, own, head_w = _expand(problem, D)
    found = inside.shifted(-moved)
    result = assemble(problem, found.at, found.curvature, reml, log_scale, profile, hold)
    # The Hessian as a whole is that a little inside, where its parts belong together.
    whole = assemble(problem, inside.at, inside.curvature, reml, log_scale, profile, hold)
    effects = _effects(problem, at, D, own, result.beta, head_w)
    result = result._replace(hessian=whole.hessian, effects=effects)
    return spread(result, problem.slices, len(D))


@form.expand.register
def expand(problem: CrossedProblem, D: Array) -> Expansion:
    """Return the reduction at ``D`` to second order.

    Second derivatives a little inside are off by as much as that is.  From once and from twice as
    far inside a line leads back to D, with errors of the square of that.
    """
    twice = jnp.any(_inside(problem, D) > 0.0)

    def add(i: Array, total: Expansion) -> Expansion:
        inside, moved, *_ = _expand(problem, D, i + 1.0)
        weight = jnp.where(twice, jnp.where(i == 0, 2.0, -1.0), 1.0)
        return jax.tree.map(lambda a, b: a + weight * b, total, inside.shifted(-moved))

    shapes = jax.eval_shape(lambda: _expand(problem, D)[0])
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return lax.fori_loop(0, jnp.where(twice, 2, 1), add, nothing)


def _expand(
    problem: CrossedProblem, D: Array, far: Array | float = 1.0
) -> tuple[Expansion, Array, Posterior, Any, Any]:
    """Return the expansion a little inside from ``D``, and how far that is, in its entries (k,).

    Where D is singular that is ``far`` times the step of :func:`_inside`.

    Besides, for the conditional effects: the evaluation, the head's own blocks of ``Z'V^-1 Z``,
    and its ``Z'V^-1 [X y]``.

    For all effects together, with ``K = Z' V^-1 Z``, ``P = Z' V^-1 [X y]``, and ``E_c`` the
    derivative of ``D (x) I`` in its c-th entry::

        S_c = -P' E_c P        S_cd = P' (E_c K E_d + E_d K E_c) P
        logdet_c = tr(E_c K)   logdet_cd = -tr(E_c K E_d K)

    For the tail in terms of standard effects, ``Z_t L``, whose entries are ``L^-1 E_c L^-T``, the
    dense block of K is ``I - M``.  The blocks of the head follow from ``P_i``, its
    ``Z_1' V_1^-1 Z_t L``, and its own ``K_i``::

        K_1t = P_i M           K_11 = diag(K_i) - P_i M P_j'

    so sums over pairs of groups become products of tail-sized matrices, ``sum_i P_i' E_c P_i``.
    Singular blocks of the tail are evaluated a little inside, see :func:`_inside`.
    """
    q1 = problem.U.shape[0]
    moved = far * _inside(problem, D)
    at = evaluate(problem, D + jnp.diag(moved))
    M, P, head_P, head_K = at.M, at.P, at.head_P, at.head_K
    width, dtype = P.shape[1], D.dtype

    def to_head(x: Array) -> Array:
        """Return ``P_i x`` for ``x (N, r)``."""
        return head_P.apply(_over_levels(problem, _over_effects(problem, at.root, x), False))

    def from_head(u: Array) -> Array:
        """Return ``sum_i P_i' u_i`` for ``u (q1, r, m)``."""
        z = _over_levels(problem, head_P.transposed(u), True)
        return _over_effects(problem, at.root.T, z)

    # Per block of D: slopes, and the directions E_c P of the quadratic forms.
    S_slope, logdet_slope, directions = [], [], []
    own: Any = None
    head_w: Any = None
    u_head: Any = None
    if q1:
        head_w = at.head_w - to_head(P)
        own = head_K - head_P.quadratic(_covariance(problem, at))  # K_11's diagonal
        E = jnp.asarray(duplication(q1), dtype)
        u_head = jnp.einsum("abc,bxm->acxm", E, head_w)
        S_slope.append(-jnp.einsum("axm,acym->cxy", head_w, u_head))
        logdet_slope.append(jnp.einsum("abm,abc->c", own, E))
    for tail, E in zip(problem.tails, _entries(problem, at), strict=True):
        here = P[tail.columns].reshape(tail.effects, tail.levels, width)
        u = jnp.einsum("abc,bmx->amcx", E, here)
        S_slope.append(-jnp.einsum("amx,amcy->cxy", here, u))
        eye = jnp.eye(tail.effects, dtype=dtype)[..., None]
        gap = jnp.sum(eye - jnp.einsum("ambm->abm", _block(M, tail, tail)), axis=-1)
        logdet_slope.append(jnp.einsum("ab,abc->c", gap, E))
        directions.append(u.reshape(tail.effects * tail.levels, -1, width))

    # P' E_c K E_d P between the blocks.
    grid: list[list[Any]] = []
    offset = min(q1, 1)
    if q1:
        z = from_head(u_head.reshape(q1, -1, u_head.shape[-1]))
        out = jnp.einsum("abm,bcxm->acxm", head_K, u_head) - to_head(M @ z).reshape(u_head.shape)
        grid.append([jnp.einsum("acxm,adym->cdxy", u_head, out)])
    for i, (f, u) in enumerate(zip(problem.tails, directions, strict=True)):
        outward = u.reshape(len(u), -1)
        product = M[:, f.columns] @ outward
        row = []
        if q1:
            out = to_head(product).reshape(q1, -1, width, u_head.shape[-1])
            across = jnp.einsum("acxm,adym->cdxy", u_head, out)
            grid[0].append(across)
            row.append(across.transpose(1, 0, 3, 2))
        product = (-product).at[f.columns].add(outward)  # K = I - M
        for j, (g, v) in enumerate(zip(problem.tails, directions, strict=True)):
            if j < i:
                row.append(grid[offset + j][offset + i].transpose(1, 0, 3, 2))
            else:
                out = product[g.columns].reshape(len(v), -1, width)
                row.append(jnp.einsum("ncx,ndy->cdxy", out, v))
        grid.append(row)
    half = jnp.concatenate([jnp.concatenate(row, axis=1) for row in grid])
    reduction = Reduction(at.S, at.logdet, jnp.concatenate(S_slope), jnp.concatenate(logdet_slope))
    found = Expansion(
        at=reduction,
        S_bend=half + half.transpose(1, 0, 2, 3),
        logdet_bend=_logdet_hessian(problem, at, own),
    )
    return found, _diagonal_entries(problem, moved), at, own, head_w


def _entries(problem: CrossedProblem, at: Posterior) -> list[Array]:
    """Return, per factor of the tail, the derivatives of D in standard terms, (q_f, q_f, k_f)."""
    entries = []
    for tail, here in zip(problem.tails, problem.slices[1:], strict=True):
        inverse = at.root_inverse[here, here]
        E = jnp.asarray(duplication(tail.effects), inverse.dtype)
        entries.append(jnp.einsum("ab,bdc,ed->aec", inverse, E, inverse))
    return entries


def _covariance(problem: CrossedProblem, at: Posterior) -> Array:
    """Return the covariance of the tail's effects given y, relative to the scale, (N, N)."""
    return _both_levels(problem, _standard(problem, at.root.T, at.M), False)


def _inside(problem: CrossedProblem, D: Array) -> Array:
    """Return what to add to D's diagonal for regular blocks of the tail, (q,); mostly zeros.

    A block that is singular, or nearly, is moved by a millionth of the sampling variance of its
    best known level.  A second-order expansion leads back from there, with errors of the third
    power of that; and ``I - M``, of the order of a millionth there, keeps ten digits.
    """
    moved = jnp.zeros(len(D), D.dtype)
    for size, here in zip(problem.precision, problem.slices[1:], strict=True):
        step = INSIDE / size
        _, pivots = ldl(D[here, here])
        moved = moved.at[here].set(jnp.where(jnp.min(pivots) < step, step, 0.0))
    return moved


def _diagonal_entries(problem: CrossedProblem, diagonal: Array) -> Array:
    """Return a diagonal (q,) of D in the triangles of its blocks, (k,)."""
    parts = []
    for here in problem.slices:
        rows, columns = np.tril_indices(here.stop - here.start)
        on = jnp.asarray(rows == columns, diagonal.dtype)
        parts.append(diagonal[here][rows] * on if len(rows) else diagonal[:0])
    return jnp.concatenate(parts)


def conditional_effects(
    problem: CrossedProblem, D: Array, beta: Array
) -> tuple[tuple[Array, Array], ...]:
    """Return ``Derivatives.effects`` at ``D``, singular or not, and coefficients (p,).

    Args:
        problem: compressed data.
        D: relative covariance in working coordinates, (q, q).
        beta: coefficients in working coordinates.
    """
    at = evaluate(problem, D)
    if not problem.U.shape[0]:
        return _effects(problem, at, D, None, beta, None)
    u = _over_levels(problem, _over_effects(problem, at.root, at.P), False)
    own = at.head_K - at.head_P.quadratic(_covariance(problem, at))
    return _effects(problem, at, D, own, beta, at.head_w - at.head_P.apply(u))


def _effects(
    problem: CrossedProblem, at: Posterior, D: Array, own: Any, beta: Array, head_w: Any
) -> tuple[tuple[Array, Array], ...]:
    """Return modes and relative covariances of the effects of head and tail."""
    v = jnp.concatenate([-beta, jnp.ones(1, beta.dtype)])
    found = []
    if own is not None:
        here = problem.slices[0]
        block = D[here, here]
        modes = jnp.einsum("ab,bxm,x->am", block, head_w, v)
        spread_out = jnp.einsum("ab,bcm,cd->adm", block, own, block)
        found.append((modes, block[..., None] - spread_out))
    u = _over_levels(problem, _over_effects(problem, at.root, (at.P @ v)[:, None]), False)[:, 0]
    related = any(root is not None for root in problem.roots)
    M = _covariance(problem, at) if related else at.M
    for tail, here in zip(problem.tails, problem.slices[1:], strict=True):
        modes = u[tail.columns].reshape(tail.effects, tail.levels)
        own_M = jnp.einsum("ambm->abm", _block(M, tail, tail))
        if not related:
            own_M = jnp.einsum("ab,bcm,dc->adm", at.root[here, here], own_M, at.root[here, here])
        found.append((modes, own_M))
    return tuple(found)


def _block(A: Array, f: Tail, g: Tail) -> Array:
    """Return ``A (N, N)`` between two factors as (effects, levels, effects, levels)."""
    return A[f.columns, g.columns].reshape(f.effects, f.levels, g.effects, g.levels)


def _logdet_hessian(problem: CrossedProblem, at: Posterior, own: Any) -> Array:
    """Return ``-tr(E_c K E_d K)`` over the entries of head and tail, (k, k)."""
    M, head_P, head_K = at.M, at.head_P, at.head_K
    dtype, q1 = M.dtype, head_K.shape[0]
    K = jnp.eye(len(M), dtype=dtype) - M
    entries = _entries(problem, at)
    grid: list[list[Any]] = []

    if q1:
        E = jnp.asarray(duplication(q1), dtype)
        # sum_i P_i' E_c P_i M
        precision = jnp.float32 if len(M) >= SINGLE_PRECISION_ORDER else dtype
        root = at.root.astype(precision)
        middle = M.astype(precision)
        products = [
            _standard(problem, root, _both_levels(problem, head_P.gram(a, b, precision), True))
            @ (middle if a == b else 2.0 * middle)
            for a in range(q1)
            for b in range(a + 1)
        ]
        # diag(K_i) - P_i M P_j': squares of the first, twice its product with the second, ...
        EK = jnp.einsum("abc,bdm->cadm", E, head_K)
        EQ = jnp.einsum("abc,bdm->cadm", E, head_K - own)
        mixed = jnp.einsum("cabm,dbam->cd", EK, EQ)
        corner = jnp.einsum("cabm,dbam->cd", EK, EK) - mixed - mixed.T
        row = [
            corner + jnp.stack([jnp.stack([jnp.sum(x * y.T) for y in products]) for x in products])
        ]
        for g, Eg in zip(problem.tails, entries, strict=True):
            left = middle[:, g.columns].reshape(-1, g.effects, g.levels)
            pieces = []
            for product in products:
                # The levels' own blocks of M (sum_i P_i' E_c P_i) M.
                right = product[:, g.columns].reshape(-1, g.effects, g.levels)
                sums = [
                    [jnp.sum(left[:, a] * right[:, b], dtype=dtype) for b in range(g.effects)]
                    for a in range(g.effects)
                ]
                pieces.append(jnp.einsum("ab,abc->c", jnp.array(sums), Eg))
            row.append(jnp.stack(pieces))
        grid.append(row)
    for i, (f, Ef) in enumerate(zip(problem.tails, entries, strict=True)):
        row = [grid[0][1 + i].T] if q1 else []
        for g, Eg in zip(problem.tails, entries, strict=True):
            here = _block(K, f, g)
            if f.effects == g.effects == 1:
                row.append(jnp.sum(here**2) * Ef[0] * Eg[0])
            else:
                squares = jnp.einsum("aibj,cidj->abcd", here, here)
                row.append(jnp.einsum("abcd,acx,bdy->xy", squares, Ef, Eg))
        grid.append(row)
    return -jnp.block(grid)
