"""What every form of the likelihood shares: coordinates, criterion, and its derivatives.

A form of the likelihood reduces the data, at relative covariance ``D`` of the random effects, to
``S (p + 1, p + 1)``, the cross-product of the whitened ``[X y]``, and to ``logdet = log|V|``.  Then

    -2 logL = logdet + [REML: log|S_XX|] + d (log 2 pi + s) + rss exp(-s)

where ``s = log scale``, ``rss`` is the Schur complement of ``S_XX`` in ``S``, and ``d = n - p``
(REML) or ``n`` (ML).  Profiling out the scale sets ``s = log(rss / d)`` (Lindstrom and Bates, 1988;
Bates et al., 2015).

Each form is a problem type with its own ``reduce`` and ``derivatives``, which are generic
functions here: the solver and everything behind it do not know which form they work with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..linalg import gls
from ..parameters import pack_triangle


@dataclass(frozen=True)
class Problem:
    """Working coordinates of a model; the data are in the subclasses, which are pytrees.

    D is block diagonal over the grouping factors, with q effects in all.  Its working coordinates
    make the random-effects columns of a factor orthonormal in the mean; X and y are orthonormal.

    Attributes:
        n_obs: number of observations, n.
        n_fixed: number of fixed-effects coefficients, p (without padding).
        n_groups: number of groups that each random effect has, (q,).
        z_factor: ``A`` with ``Z = Z_working A``; ``D_working = A D A'``, shape (q, q).
        z_inverse: ``A^-1``, shape (q, q).
        x_inverse: ``R^-1`` with ``X = X_working R``, shape (p, p).
        x_logdet: ``log|R|``.
        beta_origin: coefficients (working coordinates and units) already taken out of y, (p,).
        y_scale: ``y = y_scale * y_working`` (after removing ``beta_origin``).
        log_weights: sum of the logarithms of the prior weights.
    """

    n_obs: Any
    n_fixed: Any
    n_groups: Any
    z_factor: Any
    z_inverse: Any
    x_inverse: Any
    x_logdet: Any
    beta_origin: Any
    y_scale: Any
    log_weights: Any

    @property
    def slices(self) -> tuple[slice, ...]:
        """Columns of D that belong to each grouping factor, in the order of elimination."""
        return (slice(0, len(self.n_groups)),)

    @property
    def costly(self) -> bool:
        """Whether an evaluation may take seconds."""
        return False

    @property
    def effect_shapes(self) -> tuple[tuple[int, int], ...]:
        """Effects and groups of each factor whose modes :class:`Derivatives` holds."""
        return ()

    @property
    def contracts(self) -> bool:
        """Whether :func:`derivatives` and :func:`expand` take directions."""
        return False


class Derivatives(NamedTuple):
    """The criterion at one ``(D, s)`` in working coordinates, with exact derivatives.

    ``gradient`` (q2 + 1,) and ``hessian`` (q2 + 1, q2 + 1) are with respect to the lower triangle
    of D row by row (a step moves both symmetric entries), then ``s = log scale``; q2 = q (q + 1)/2.
    Entries between two grouping factors, where D is always zero, have zero derivatives.

    ``beta_inverse`` is ``(X'V^-1 X)^-1``, and ``x_slope`` (q2, p, p) holds the derivatives of
    ``X'V^-1 X`` in D: how certain the coefficients are, and how that depends on the covariance.

    Along c ``directions`` in the place of the entries, ``hessian`` is (c + 1, c + 1) and
    ``x_slope`` (c, p, p); the gradient is in the entries all the same.

    ``effects`` holds, where they come for free, per factor of the elimination the conditional modes
    (q, m) of the random effects, and their covariance relative to the scale (q, q, m).
    """

    value: Array
    gradient: Array
    hessian: Array
    log_scale: Array
    beta: Array
    beta_inverse: Array
    x_slope: Array
    effects: tuple[tuple[Array, Array], ...] = ()


@singledispatch
def reduce(problem: Any, D: Array) -> tuple[Array, Array]:
    """Return ``S (p + 1, p + 1)`` and ``log|V|`` at ``D`` in working coordinates.

    Differentiable to any order in ``D``; the derivative rules are those of each form.
    """
    raise TypeError(f"{type(problem).__name__} is not a form of the likelihood")


class Hold(NamedTuple):
    """A linear combination of the coefficients held at a value, in working coordinates.

    Attributes:
        contrast: its coefficients, (p,); all zero to hold nothing.
        value: what it is held at.
    """

    contrast: Array
    value: Array


@singledispatch
def derivatives(
    problem: Any,
    D: Array,
    reml: Array,
    log_scale: Array,
    profile: Array,
    hold: Hold | None = None,
    directions: Array | None = None,
) -> Derivatives:
    """Evaluate the criterion with its exact gradient and Hessian.

    Args:
        problem: compressed data.
        D: relative covariance in working coordinates, shape (q, q).
        reml: 1.0 for REML, 0.0 for ML.
        log_scale: value of ``s`` where it is not profiled out.
        profile: whether ``s`` is set to its minimiser given D.
        hold: a combination of the coefficients that is held, for likelihood profiles.
        directions: symmetric matrices along which D moves, (c, q, q), if not in each entry; only
            of problems that contract.
    """
    raise TypeError(f"{type(problem).__name__} is not a form of the likelihood")


@singledispatch
def expand(problem: Any, D: Array, directions: Array | None = None) -> Expansion:
    """Return the reduction at ``D (q, q)`` with its first and second derivatives.

    They are in the triangles of D's diagonal blocks, one for each grouping factor, one after the
    other, see :func:`block_entries`; or along ``directions (c, q, q)``, of problems that contract.
    """
    raise TypeError(f"{type(problem).__name__} is not a form of the likelihood")


def degrees_of_freedom(problem: Problem, reml: Array | float) -> Array:
    """Return ``d``: n for ML, n - p for REML."""
    return jnp.asarray(problem.n_obs - reml * problem.n_fixed)


def constant(problem: Problem, reml: Array | float) -> Array:
    """Return what the change from data to working coordinates adds to the criterion."""
    d = degrees_of_freedom(problem, reml)
    return 2.0 * (d * jnp.log(problem.y_scale) + reml * problem.x_logdet) - problem.log_weights


def objective(S: Array, logdet: Array, s: Array, d: Array, reml: Array | float) -> Array:
    """Return -2 log-likelihood from the reduction ``(S, logdet)`` and ``s = log scale``."""
    _, _, rss, logdet_x = gls(S)
    return logdet + reml * logdet_x + d * (jnp.log(2.0 * jnp.pi) + s) + rss * jnp.exp(-s)


def profiled_log_scale(rss: Array, d: Array) -> Array:
    """Return the logarithm of the scale that minimises the criterion, ``log(rss / d)``."""
    tiny = jnp.finfo(rss.dtype).tiny
    return jnp.log(jnp.maximum(rss, tiny) / d)


def criterion(problem: Problem, D: Array, reml: Array | float = 1.0) -> Array:
    """Return -2 profile log-likelihood at relative covariance ``D (q, q)`` in the user's units."""
    A = jnp.asarray(problem.z_factor)
    S, logdet = reduce(problem, A @ D @ A.T)
    d = degrees_of_freedom(problem, reml)
    s = profiled_log_scale(gls(S)[2], d)
    return objective(S, logdet, s, d, reml) + constant(problem, reml)


class Reduction(NamedTuple):
    """The reduction at one D, with its first derivatives in k entries of D.

    Attributes:
        S: whitened cross-product of ``[X y]``, (p + 1, p + 1).
        logdet: ``log|V|``.
        S_slope: derivatives of S, (k, p + 1, p + 1).
        logdet_slope: derivatives of logdet, (k,).
    """

    S: Array
    logdet: Array
    S_slope: Array
    logdet_slope: Array


class Expansion(NamedTuple):
    """A reduction to second order in k entries of D.

    All that inference on coefficients needs of the data, whatever their number: the blocks of
    ``S_slope`` and ``S_bend`` that belong to X are ``-X'V^-1 G_c V^-1 X`` and
    ``X'V^-1 (G_c V^-1 G_d + G_d V^-1 G_c) V^-1 X``, with ``G_c`` the derivative of V.

    Attributes:
        at: value and slopes.
        S_bend: second derivatives of S, (k, k, p + 1, p + 1).
        logdet_bend: second derivatives of logdet, ``-tr(V^-1 G_c V^-1 G_d)``, (k, k).
    """

    at: Reduction
    S_bend: Array
    logdet_bend: Array

    def curvature(self, outer: Array) -> Array:
        """Return ``logdet_cd + tr(outer S_cd)``, (k, k)."""
        return self.logdet_bend + jnp.einsum("cdxy,xy->cd", self.S_bend, outer)

    def shifted(self, change: Array) -> Expansion:
        """Return the expansion around the point ``change (k,)`` away, to second order."""
        at, S_move = self.at, jnp.tensordot(change, self.S_bend, 1)
        logdet_move = self.logdet_bend @ change
        moved = Reduction(
            S=at.S + jnp.tensordot(change, at.S_slope + 0.5 * S_move, 1),
            logdet=at.logdet + change @ (at.logdet_slope + 0.5 * logdet_move),
            S_slope=at.S_slope + S_move,
            logdet_slope=at.logdet_slope + logdet_move,
        )
        return self._replace(at=moved)


def assemble(
    problem: Problem,
    at: Reduction,
    curvature: Callable[[Array], Array],
    reml: Array,
    log_scale: Array,
    profile: Array,
    hold: Hold | None = None,
) -> Derivatives:
    """Assemble the criterion's derivatives from those of the reduction.

    With ``v = [-beta; 1]``, ``A = S_XX`` and ``S_c`` the derivative of S in the c-th entry of D::

        g_c  = logdet_c + reml tr(A^-1 S_c) + exp(-s) v' S_c v
        h_cd = logdet_cd + tr(outer S_cd) - reml tr(A^-1 S_c A^-1 S_d)
               - 2 exp(-s) (S_c v)_X' A^-1 (S_d v)_X,    outer = reml A^-1 + exp(-s) v v'

    Where ``c'beta`` is held at b, beta moves by ``a (b - c'beta) / c'a`` with ``a = A^-1 c``, rss
    grows by ``(b - c'beta)^2 / c'a``, and ``A^-1 - a a' / c'a`` takes the place of ``A^-1`` in
    what comes from rss.  ``log|S_XX|`` stays as it is: the restricted criterion has its minimum
    over b at the estimate.

    Args:
        problem: the problem.
        at: value and slope of the reduction in k entries of D.
        curvature: maps ``outer (p + 1, p + 1)`` to ``logdet_cd + tr(outer S_cd)``, (k, k).
        reml: 1.0 for REML, 0.0 for ML.
        log_scale: value of ``s`` where it is not profiled out.
        profile: whether ``s`` is set to its minimiser given D.
        hold: a combination of the coefficients that is held.

    Returns:
        The derivatives in these k entries and s.
    """
    here = regression(problem, at.S, reml, log_scale, profile, hold)
    return assembled(problem, at, here, curvature(here.outer), reml)


class Regression(NamedTuple):
    """Coefficients and scale at one D, in the notation of :func:`assemble`.

    Attributes:
        beta: coefficients, (p,).
        inverse: ``A^-1``, (p, p).
        free: the same without the direction that is held, (p, p).
        rss: weighted residual sum of squares.
        logdet_x: ``log|A|``.
        log_scale: ``s``.
        outer: weights of the second derivatives of S, (p + 1, p + 1).
    """

    beta: Array
    inverse: Array
    free: Array
    rss: Array
    logdet_x: Array
    log_scale: Array
    outer: Array


def regression(
    problem: Problem,
    S: Array,
    reml: Array,
    log_scale: Array,
    profile: Array,
    hold: Hold | None = None,
) -> Regression:
    """Return what a reduction ``S (p + 1, p + 1)`` says of coefficients and scale."""
    p = S.shape[0] - 1
    beta, inverse, rss, logdet_x = gls(S)
    free = inverse
    if hold is not None:
        a = inverse @ hold.contrast
        size = hold.contrast @ a
        weight = jnp.where(size > 0.0, 1.0 / jnp.where(size > 0.0, size, 1.0), 0.0)
        gap = hold.value - hold.contrast @ beta
        beta = beta + a * (gap * weight)
        rss = rss + gap**2 * weight
        free = inverse - weight * jnp.outer(a, a)
    d = degrees_of_freedom(problem, reml).astype(S.dtype)
    s = jnp.where(profile, profiled_log_scale(rss, d), log_scale)
    v = jnp.concatenate([-beta, jnp.ones(1, S.dtype)])
    outer = jnp.exp(-s) * jnp.outer(v, v)
    outer = outer.at[:p, :p].add(reml * inverse)
    return Regression(beta, inverse, free, rss, logdet_x, s, outer)


def assembled(
    problem: Problem, at: Reduction, here: Regression, curvature: Array, reml: Array
) -> Derivatives:
    """Return what :func:`assemble` does, ``curvature (k, k)`` at ``here.outer`` being known."""
    S, p, s = at.S, at.S.shape[0] - 1, here.log_scale
    d = degrees_of_freedom(problem, reml).astype(S.dtype)
    precision = jnp.exp(-s)
    rest = here.rss * precision
    value = at.logdet + reml * here.logdet_x + d * (jnp.log(2.0 * jnp.pi) + s) + rest
    v = jnp.concatenate([-here.beta, jnp.ones(1, S.dtype)])
    slope_v = at.S_slope @ v
    rho = slope_v @ v
    solved = jnp.einsum("ij,cjk->cik", here.inverse, at.S_slope[:, :p, :p])
    # Not from the diagonals of ``solved``: who has no use for the Hessian needs no such products.
    traces = jnp.einsum("ij,cij->c", here.inverse, at.S_slope[:, :p, :p])
    gradient = at.logdet_slope + reml * traces + precision * rho
    hessian = curvature - reml * jnp.einsum("cij,dji->cd", solved, solved)
    hessian = hessian - 2.0 * precision * (slope_v[:, :p] @ here.free @ slope_v[:, :p].T)
    cross = -precision * rho
    return Derivatives(
        value=value,
        gradient=jnp.append(gradient, d - rest),
        hessian=jnp.block([[hessian, cross[:, None]], [cross[None, :], rest[None, None]]]),
        log_scale=s,
        beta=here.beta,
        beta_inverse=here.inverse,
        x_slope=at.S_slope[:, :p, :p],
    )


def duplication(q: int) -> np.ndarray:
    """Return the 0/1 matrix (q, q, k) that maps a lower triangle (row by row) to a full matrix."""
    rows, columns = np.tril_indices(q)
    matrix = np.zeros((q, q, len(rows)))
    matrix[rows, columns, np.arange(len(rows))] = 1.0
    matrix[columns, rows, np.arange(len(rows))] = 1.0
    return matrix


def block_entries(blocks: tuple[slice, ...], q: int) -> np.ndarray:
    """Return the positions, in the triangle of D (q, q), of those of its diagonal blocks."""
    positions = {pair: i for i, pair in enumerate(zip(*np.tril_indices(q), strict=True))}
    place = [
        positions[here.start + row, here.start + column]
        for here in blocks
        for row, column in zip(*np.tril_indices(here.stop - here.start), strict=True)
    ]
    return np.asarray(place, dtype=np.int32)


def user_entries(problem: Problem) -> np.ndarray:
    """Return how entries of the user's D move those of D in working coordinates, (q2, q2).

    A matrix from the triangle of the one to that of the other.
    """
    A = np.asarray(problem.z_factor)
    columns = []
    for i, j in zip(*np.tril_indices(len(A)), strict=True):
        E = np.zeros_like(A)
        E[i, j] = E[j, i] = 1.0
        columns.append(pack_triangle(A @ E @ A.T))
    return np.stack(columns, axis=1)


def spread(at: Derivatives, blocks: tuple[slice, ...], q: int) -> Derivatives:
    """Put derivatives in the triangles of D's diagonal blocks in their places in that of D.

    Args:
        at: derivatives in the triangles of the blocks, one after the other, and s.
        blocks: columns of each block, in that order.
        q: order of D.
    """
    size = q * (q + 1) // 2 + 1
    own = block_entries(blocks, q)
    to = np.append(own, np.int32(size - 1))
    p = at.x_slope.shape[-1]
    return at._replace(
        gradient=jnp.zeros(size, at.gradient.dtype).at[to].set(at.gradient),
        hessian=jnp.zeros((size, size), at.hessian.dtype)
        .at[to[:, None], to[None, :]]
        .set(at.hessian),
        x_slope=jnp.zeros((size - 1, p, p), at.x_slope.dtype).at[own].set(at.x_slope),
    )
