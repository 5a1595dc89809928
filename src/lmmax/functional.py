"""The pure layer: models as pytrees, for embedding in larger JAX programs.

Build a problem from arrays once, then evaluate its criterion under ``jit``, ``grad``, ``hessian``
and ``vmap``, or solve it under ``jit`` and ``vmap``.  Functions follow the dtype of the problem's
arrays: enable float64 in JAX for full precision; float32 gives a criterion good to about 1e-6
relative.

Theta is the lower triangle, row by row, of ``Lambda``, with ``D = Lambda Lambda'`` the covariance
of the random effects relative to the residual variance.

Example:
    >>> import jax, numpy as np
    >>> from lmmax import functional
    >>> rng = np.random.default_rng(0)
    >>> groups = np.repeat(np.arange(20), 6)
    >>> X = np.column_stack([np.ones(120), rng.normal(size=120)])
    >>> y = X @ [1.0, 2.0] + rng.normal(size=20)[groups] + rng.normal(size=120)
    >>> problem = functional.problem(y, X, groups)
    >>> optimum = jax.jit(functional.solve)(problem)
    >>> slope = jax.jit(jax.grad(functional.criterion, argnums=1))
    >>> gradient = slope(problem, optimum.theta)
    >>> bool(abs(gradient[0]) < 1e-2)
    True
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from . import likelihood
from .compress import FactorColumns, compress, layout
from .em import moment_start
from .frames import check_same_rows, real_numbers
from .likelihood.grouped import GroupedProblem
from .linalg import gls, ldl
from .parameters import pack_triangle, unpack_lower
from .solve import Options, Solution, Status, newton, newton_step, unstructured

Problem = GroupedProblem
__all__ = ["Optimum", "Problem", "Status", "criterion", "padded_problem", "problem", "solve"]


class Optimum(NamedTuple):
    """A solved problem; every field is differentiable in the problem but the last three.

    Attributes:
        theta: packed factor of the relative covariance, diagonal non-negative, (k,).
        beta: coefficients, (p,).
        beta_cov: their covariance, (p, p).
        scale: residual variance.
        cov_re: covariance of the random effects, natural units, (q, q).
        criterion: -2 log-likelihood, or the REML criterion.
        status: a :class:`Status` as an integer, 1 for converged.
        steps: evaluations of the criterion.
        decrement: distance to the optimum, ``g' H^-1 g``, in units of the criterion.
    """

    theta: Array
    beta: Array
    beta_cov: Array
    scale: Array
    cov_re: Array
    criterion: Array
    status: Array
    steps: Array
    decrement: Array


def problem(y: Any, X: Any, groups: Any, Z: Any = None, *, weights: Any = None) -> Problem:
    """Compress arrays into a problem, on the host.

    Args:
        y: response, shape (n,).
        X: fixed-effects design, shape (n, p), of full column rank.
        groups: group label of each row, shape (n,).
        Z: random-effects design, shape (n, q); a random intercept if None.
        weights: prior weights (inverse variances), shape (n,).

    Raises:
        ValueError: if lengths differ, a value is not finite, or X is rank deficient.
    """
    check_same_rows({"y": y, "X": X, "groups": groups, "Z": Z, "weights": weights})
    y, X = real_numbers(y, "y"), real_numbers(X, "X")
    Z = np.ones((len(y), 1)) if Z is None else real_numbers(Z, "Z")
    codes, levels = pd.factorize(np.asarray(groups), sort=False)
    w = None if weights is None else real_numbers(weights, "weights")
    for name, values in {"y": y, "X": X, "groups": codes, "Z": Z, "weights": w}.items():
        if values is None:
            continue
        if len(values) != len(y):
            raise ValueError(f"{name} has {len(values)} rows, y has {len(y)}")
        if not np.isfinite(values).all() or (name == "groups" and (values < 0).any()):
            raise ValueError(f"{name} has missing or infinite values; remove these rows")
    factor = FactorColumns("groups", codes, len(levels), (Z,), (True,))
    arranged = layout(X, [factor], w)
    if len(arranged.fixed.kept) < X.shape[1]:
        aliased = sorted(set(range(X.shape[1])) - set(arranged.fixed.kept.tolist()))
        raise ValueError(f"columns {aliased} of X are linear combinations of others; drop them")
    return compress(y, arranged, pad=False).problem


def padded_problem(y: Array, X: Array, Z: Array) -> Problem:
    """Compress padded groups inside a JAX program; differentiable in all three.

    Groups shorter than the common height are padded by zero rows in all three arrays, and every
    group has at least q rows with independent columns of Z.  Columns should be of similar size:
    unlike :func:`problem` this applies no scaling.

    Args:
        y: responses, shape (h, m): rows within groups, then groups.
        X: fixed-effects design, shape (p, h, m).
        Z: random-effects design, shape (q, h, m).
    """
    p, q = X.shape[0], Z.shape[0]
    rows = jnp.any(Z != 0.0, axis=0) | jnp.any(X != 0.0, axis=0)
    data = jnp.concatenate([X, y[None]])
    U = [[jnp.zeros_like(y[0])] * q for _ in range(q)]
    parts: list[Array] = []
    basis: list[Array] = []
    for k in range(q):
        column = Z[k]
        for _ in range(2 if k else 0):
            for j in range(k):
                part = jnp.sum(basis[j] * column, axis=0)
                U[j][k] = U[j][k] + part
                column = column - part * basis[j]
        U[k][k] = jnp.sqrt(jnp.sum(column * column, axis=0))
        basis.append(column / U[k][k])
        projection = jnp.sum(data * basis[k], axis=1)
        parts.append(projection)
        data = data - projection[:, None] * basis[k]
    dtype = y.dtype
    return GroupedProblem(
        U=jnp.stack([jnp.stack(row) for row in U]),
        Y=jnp.stack(parts),
        weight=jnp.ones(y.shape[1], dtype),
        C=jnp.einsum("xhm,yhm->xy", data, data),
        n_obs=jnp.sum(rows).astype(dtype),
        n_fixed=jnp.asarray(p, dtype),
        n_groups=jnp.full(q, y.shape[1], dtype),
        z_factor=jnp.eye(q, dtype=dtype),
        z_inverse=jnp.eye(q, dtype=dtype),
        x_inverse=jnp.eye(p, dtype=dtype),
        x_logdet=jnp.zeros((), dtype),
        beta_origin=jnp.zeros(p, dtype),
        y_scale=jnp.ones((), dtype),
        log_weights=jnp.zeros((), dtype),
    )


def criterion(problem: Problem, theta: Array, reml: bool | float = True) -> Array:
    """Return -2 profile log-likelihood (the REML criterion by default) at theta (k,).

    With all constants, as in lme4.  Differentiable to any order in ``theta`` and ``problem``.
    """
    L = unpack_lower(jnp.asarray(theta))
    return likelihood.criterion(problem, L @ L.T, jnp.asarray(reml, L.dtype))


def solve(
    problem: Problem,
    reml: bool | float = True,
    *,
    start: Array | None = None,
    tol: float = 1e-16,
    max_steps: int = 100,
    em_steps: int = 3,
) -> Optimum:
    """Minimise the criterion over theta; works under ``jit``, ``vmap``, ``grad`` and ``jvp``.

    Derivatives of the optimum in the problem come from the implicit function theorem; where a
    variance is zero they are those on the boundary, with that variance staying zero.

    Args:
        problem: a problem, or under ``vmap`` a batch of them.
        reml: restricted maximum likelihood or, if False, maximum likelihood.
        start: theta (k,) to start from, which skips the EM steps; a moment estimate if None.
        tol: largest decrement that counts as converged (never below what rounding allows).
        max_steps: most Newton steps.
        em_steps: most EM steps before them.
    """
    U = jnp.asarray(problem.U)
    dtype = U.dtype
    flag = jnp.asarray(reml, dtype)
    options = Options(
        reml=flag,
        em_steps=em_steps if start is None else 0,
        max_steps=max_steps,
        tol=jnp.asarray(tol, dtype),
    )
    if start is None:
        D0 = jnp.asarray(moment_start(problem), dtype)
    else:
        L = jnp.asarray(problem.z_factor, dtype) @ unpack_lower(jnp.asarray(start, dtype))
        D0 = L @ L.T
    D, status, steps, decrement = _minimiser(problem, flag, options, D0)

    S, logdet = likelihood.reduce(problem, D)
    beta, inverse, rss, _ = gls(S)
    d = likelihood.degrees_of_freedom(problem, flag)
    s = likelihood.profiled_log_scale(rss, d)
    y_scale = jnp.asarray(problem.y_scale, dtype)
    scale = jnp.exp(s) * y_scale**2
    R_inverse = jnp.asarray(problem.x_inverse, dtype)
    A_inverse = jnp.asarray(problem.z_inverse, dtype)
    D = A_inverse @ D @ A_inverse.T
    return Optimum(
        theta=pack_triangle(_cholesky(D)),
        beta=R_inverse @ (beta + problem.beta_origin) * y_scale,
        beta_cov=scale * (R_inverse @ inverse @ R_inverse.T),
        scale=scale,
        cov_re=scale * D,
        criterion=likelihood.objective(S, logdet, s, d, flag) + likelihood.constant(problem, flag),
        status=status,
        steps=steps,
        decrement=decrement,
    )


def _cholesky(D: Array) -> Array:
    L, d = ldl(D)
    positive = d > 0.0
    return L * jnp.where(positive, jnp.sqrt(jnp.where(positive, d, 1.0)), 0.0)[None, :]


def _newton(problem: Problem, reml: Array, options: Options, start: Array) -> Solution:
    none = jnp.zeros(0, start.dtype)
    return newton(problem, unstructured(len(start)), options, start, jnp.zeros_like(reml), none)


@jax.custom_jvp
def _minimiser(
    problem: Problem, reml: Array, options: Options, start: Array
) -> tuple[Array, Array, Array, Array]:
    solution = _newton(problem, reml, options, start)
    return solution.point.D, solution.status, solution.steps, solution.decrement


@_minimiser.defjvp
def _minimiser_jvp(primals: Any, tangents: Any) -> Any:
    problem, reml, options, start = primals
    solution = _newton(problem, reml, options, start)
    point = solution.point

    def gradient(problem: Problem, reml: Array) -> Array:
        def value(root: Array) -> Array:
            S, logdet = likelihood.reduce(problem, root @ root.T)
            d = likelihood.degrees_of_freedom(problem, reml)
            s = likelihood.profiled_log_scale(gls(S)[2], d)
            return likelihood.objective(S, logdet, s, d, reml)

        return jax.grad(value)(point.root)

    _, change = jax.jvp(gradient, (problem, reml), tangents[:2])
    # The joint Hessian's Newton step, with no gradient in the scale, is the profiled one.
    change = jnp.append(jnp.zeros(1, change.dtype), change) * point.free
    step = newton_step(change, point.hessian, jnp.zeros((), change.dtype))[1:]
    half = step.reshape(point.root.shape) @ point.root.T
    none = np.zeros((), jax.dtypes.float0)
    out = (point.D, solution.status, solution.steps, solution.decrement)
    return out, (half + half.T, none, none, jnp.zeros_like(solution.decrement))
