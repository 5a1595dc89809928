"""Fit crossed factors too large for a dense factor, by Newton steps on estimated gradients.

Given a fixed set of probes, the estimate of the gradient in :mod:`lmmax.likelihood.iterative` is a
smooth function of the covariances, and the estimates are its root.  Steps use the average of
observed and expected information (Gilmour, Thompson and Cullis, 1995), which needs no traces, in
the coordinates of a root of D as in :mod:`lmmax.solve`.  The first steps make do with few probes;
then their number grows until the criterion is known to the error asked for.

The Monte Carlo error has two faces, both reported: that of the criterion at the estimates, and that
of the estimates, which are where another set of probes would not quite have put them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sparse

from .compilation_cache import compilation_cache
from .compress import EngineError
from .compress.iterative import Rows
from .constraints import Guess, Settings, TermColumns
from .likelihood import Derivatives, Problem, iterative
from .likelihood.iterative import (
    Elimination,
    IterativeProblem,
    Meetings,
    Probe,
    quadrature,
    sparse_rows,
)
from .likelihood.problem import spread
from .parameters import pack_triangle, unpack_symmetric
from .solve import (
    TRACE_COLUMNS,
    TRACE_LENGTH,
    Constraints,
    Point,
    Solution,
    Status,
    chart,
    newton_step,
    pivoted_factor,
)

PROBES = 32
"""Columns handled together; a gather of one row of them is a few cache lines."""
BASIS = 8
"""Directions treated exactly, see :func:`lmmax.likelihood.iterative.dominant_basis`."""
KRYLOV_STEPS = 1000
"""Most iterations of conjugate gradients."""
DATA_TOL, PROBE_TOL = 1e-10, 1e-6
"""Relative residuals at which the iterations stop, for ``[X y]`` and for everything else; the
quadrature and the quadratic forms have errors of the order of their squares."""
FLOOR = 1e-10
"""Smallest variance evaluated, relative to the sampling variance of one average level."""
BOUNDARY = 1e-5
"""A variance below this fraction of the sampling variance of one average level is zero."""
MOST_PRODUCTS = 2e9
"""Largest number of multiplications for which the exact mean of ``z'E^2 z`` is worth it."""
DEEP_PRODUCTS, DEEPEST = 1e9, 4
"""Likewise for higher powers of E, which are used where many probes would be needed; and how many
multiplications by E they may take."""
BLOCK_PRODUCTS = 2e7
"""Multiplications of sparse matrices handled together, for the sake of memory."""
SHARE = 0.2
"""Part of the criterion's error that the noise of the estimates may add to it."""

EARLY = 0.01
"""Newton decrement at which the first few probes have served."""
MOST_STEPPING = 16
"""Most chunks of probes that steps use for the sake of the criterion's error alone."""

_eliminate = jax.jit(iterative.eliminate)
_multiply = jax.jit(iterative.multiply)
_solve = jax.jit(iterative.solve, static_argnums=4)
_basis = jax.jit(iterative.dominant_basis)
_probe = jax.jit(iterative.probe, static_argnums=(4, 5))
_damped_step = jax.jit(newton_step)
_pivoted = jax.jit(pivoted_factor)
_signs = jax.jit(iterative.random_signs, static_argnums=2)


class IterativeSolution(NamedTuple):
    """Estimates of an iterative fit, all in the units of the data handed over.

    The k entries of the lower triangles of ``D``, row by row and factor after factor, are its
    *parameters*; ``log scale`` comes last where ``information`` has an entry for it.

    Attributes:
        D: relative covariance of each factor's effects, (q_f, q_f).
        scale: residual variance.
        beta: fixed-effects coefficients, (p,).
        beta_unscaled: ``(X'V^-1X)^-1``, their covariance divided by the scale, (p, p).
        slopes: derivatives of ``X'V^-1X`` in the parameters, (k, p, p).
        criterion: -2 log-likelihood (REML: restricted), an unbiased estimate.
        criterion_error: its Monte Carlo standard error.
        D_error: Monte Carlo standard error of each entry of D, (q_f, q_f).
        information: average information of the log-likelihood in (parameters, log scale),
            (k + 1, k + 1).
        free: which parameters were estimated, (k,).
        gradient: of the criterion, the scale profiled out, (k,).
        gradient_error: its Monte Carlo standard error, (k,).
        modes: conditional modes of each factor's effects, (m_f, q_f).
        boundary: whether each factor's covariance is singular.
        status: how the solve ended.
        steps: covariances evaluated.
        decrement: ``g'H^-1 g``: how far, in units of the criterion, a Newton step still goes.
        krylov_steps: most iterations of conjugate gradients in one solve at the end.
        probes: random probes behind the criterion.
        n_tail: number of effects that were not eliminated.
        trace: a row per evaluation: criterion, its error, decrement, damping, accepted, probes.
    """

    D: tuple[np.ndarray, ...]
    scale: float
    beta: np.ndarray
    beta_unscaled: np.ndarray
    slopes: np.ndarray
    criterion: float
    criterion_error: float
    D_error: tuple[np.ndarray, ...]
    information: np.ndarray
    free: np.ndarray
    gradient: np.ndarray
    gradient_error: np.ndarray
    modes: tuple[np.ndarray, ...]
    boundary: tuple[bool, ...]
    status: Status
    steps: int
    decrement: float
    krylov_steps: int
    probes: int
    n_tail: int
    trace: np.ndarray


class Factor(NamedTuple):
    """One grouping factor: level of each row (n,), design (n, q), and the number of levels."""

    codes: np.ndarray
    Z: np.ndarray
    n_levels: int


class _Model(NamedTuple):
    """The data in working form: the head first, levels by popularity, columns of unit mean square.

    Attributes:
        problem: the cross-products, on the device.
        cross: ``A_1t`` as a SciPy matrix.
        tail: the blocks of ``A_tt`` between different factors, likewise, or None.
        W: ``Z'[X y]``, (effects, p + 1).
        C: ``[X y]'[X y]``, (p + 1, p + 1).
        n: number of rows.
        reml: whether the criterion is restricted.
        free: 1.0 where an entry of the joint D is estimated, (q, q).
        columns: columns of each factor in the joint D.
        effects: positions of each factor's effects among all.
        z_scale: ``Z = z_scale * Z_working``, (q,).
        noise: sampling variance of one average level's effect, relative to the scale, (q,).
        order: the factors' places in the caller's list.
        ranks: for each factor, the place of each of the caller's levels.
        seed: seed of the probes.
        products: multiplications for ``||E||_F``.
    """

    problem: IterativeProblem
    cross: Any
    tail: Any
    W: np.ndarray
    C: np.ndarray
    n: int
    reml: bool
    free: np.ndarray
    columns: tuple[slice, ...]
    effects: tuple[slice, ...]
    z_scale: np.ndarray
    noise: np.ndarray
    order: tuple[int, ...]
    ranks: tuple[np.ndarray, ...]
    seed: int
    products: float


class _Estimate(NamedTuple):
    """Regression on control variates: mean (k,) and its Monte Carlo covariance (k, k)."""

    mean: np.ndarray
    covariance: np.ndarray


class _Exact(NamedTuple):
    """What solves with the data give, free of Monte Carlo noise.

    Attributes:
        value: the criterion less ``log|V|``.
        gradient: its slope in the entries of the joint D's lower triangle, (k,).
        information: average information of the log-likelihood in those and log scale,
            (k + 1, k + 1); zero between factors' own entries.
        scale: residual variance.
        beta: fixed effects, (p,).
        beta_unscaled: ``(X'V^-1X)^-1``, (p, p).
        slopes: derivatives of ``X'V^-1X`` in the entries of D's lower triangle, (k, p, p).
        modes: conditional modes of all effects, (effects,).
        krylov_steps: most iterations of a solve.
        converged: whether all solves converged.
    """

    value: float
    gradient: np.ndarray
    information: np.ndarray
    scale: float
    beta: np.ndarray
    beta_unscaled: np.ndarray
    slopes: np.ndarray
    modes: np.ndarray
    krylov_steps: int
    converged: bool


class _Point(NamedTuple):
    """The criterion and what a step needs at one covariance, in working units.

    Attributes:
        D: joint relative covariance, (q, q).
        value: the criterion.
        error: its Monte Carlo standard error.
        gradient: slope in the entries of D's lower triangle, the scale profiled out, (k,).
        noise: Monte Carlo covariance of the gradient, (k, k).
        exact: the rest.
        probes: random probes used.
    """

    D: np.ndarray
    value: float
    error: float
    gradient: np.ndarray
    noise: np.ndarray
    exact: _Exact
    probes: int


def solve_iterative(
    factors: Sequence[Factor | tuple[np.ndarray, np.ndarray, int]],
    X: np.ndarray,
    y: np.ndarray,
    *,
    reml: bool = True,
    D0: Sequence[np.ndarray] | None = None,
    patterns: Sequence[np.ndarray] | None = None,
    seed: int = 0,
    target_error: float = 0.05,
    tol: float = 1e-5,
    max_steps: int = 50,
    max_probes: int = 4096,
) -> IterativeSolution:
    """Estimate a model with two or more crossed factors by matrix-free iterations.

    Args:
        factors: codes from 0 to n_levels - 1 (n,), design (n, q_f) and number of levels of each
            grouping factor, rows multiplied by the square roots of prior weights.
        X: fixed-effects design of full column rank, (n, p), preferably orthonormal.
        y: response, (n,), preferably its residual from X and of unit length.
        reml: whether to maximise the restricted likelihood.
        D0: starting values, (q_f, q_f) for each factor; moment estimates if None.
        patterns: 1 where an entry of each ``D_f`` is estimated, 0 where it is zero: all ones for
            an unstructured covariance, the identity for independent effects.  Unstructured if None.
        seed: of the probes: the same seed gives the same numbers.
        target_error: Monte Carlo standard error of the criterion at which no more probes are drawn.
        tol: Newton decrement, in units of the criterion, at which to stop.
        max_steps: most evaluations.
        max_probes: most probes, whatever error is reached.

    Returns:
        The estimates with their Monte Carlo errors.

    Raises:
        ValueError: if there are fewer than two factors.
    """
    if len(factors) < 2:
        raise ValueError("the iterative engine is for two or more grouping factors")
    with jax.enable_x64(True), compilation_cache():
        parts = [Factor(*part) for part in factors]
        model = _prepare(parts, np.asarray(X), np.asarray(y), reml, patterns, seed)
        D = _moments(model) if D0 is None else _join(model, D0)
        return _newton(model, D, target_error, tol, max_steps, max_probes)


def _prepare(
    parts: list[Factor],
    X: np.ndarray,
    y: np.ndarray,
    reml: bool,
    patterns: Sequence[np.ndarray] | None,
    seed: int,
) -> _Model:
    """Form the cross-products."""
    given = [np.atleast_2d(np.asarray(part.Z, dtype=float).T).T for part in parts]
    order = sorted(range(len(parts)), key=lambda f: -parts[f].n_levels * given[f].shape[1])
    scales = [np.sqrt(np.mean(Z**2, axis=0)) for Z in given]
    scales = [np.where(size > 0.0, size, 1.0) for size in scales]
    Z = [given[f] / scales[f] for f in order]
    m = [parts[f].n_levels for f in order]
    q = [part.shape[1] for part in Z]
    XY = np.column_stack([X, y])
    n = len(y)

    # Popular levels first, so that rows of the sparse matrices that are stored together are of
    # similar length.
    ranks, codes = [], []
    for f, levels in zip(order, m, strict=True):
        count = np.bincount(parts[f].codes, minlength=levels)
        rank = np.empty(levels, dtype=np.int64)
        rank[np.argsort(-count, kind="stable")] = np.arange(levels)
        ranks.append(rank)
        codes.append(rank[parts[f].codes])

    diagonal, W = [], []
    for levels, code, part in zip(m, codes, Z, strict=True):
        diagonal.append(_block_sums(code, part, part, levels))
        W.append(_block_sums(code, part, XY, levels).transpose(2, 0, 1).reshape(-1, XY.shape[1]))

    ends = np.cumsum([levels * size for levels, size in zip(m, q, strict=True)])
    starts = ends - [levels * size for levels, size in zip(m, q, strict=True)]
    n_head, n_tail = int(ends[0]), int(ends[-1] - ends[0])
    meetings: list[Meetings] = []
    head_tail: list[tuple[np.ndarray, ...]] = []
    tail_tail: list[tuple[np.ndarray, ...]] = []
    for g in range(1, len(m)):
        for f in range(g):
            # By level of g first: that is the order in which the head's meetings are summed.
            key, pair = np.unique(codes[g] * m[f] + codes[f], return_inverse=True)
            block = _block_sums(pair, Z[f], Z[g], len(key))
            level_g, level_f = np.divmod(key, m[f])
            rows = (level_f * q[f])[None, None] + np.arange(q[f])[:, None, None]
            columns = (level_g * q[g])[None, None] + np.arange(q[g])[None, :, None]
            rows, columns, block_ = np.broadcast_arrays(
                rows + (starts[f] - n_head * (f > 0)), columns + starts[g] - n_head, block
            )
            entries = (rows.ravel(), columns.ravel(), block_.ravel())
            kept = entries[2] != 0.0
            entries = (entries[0][kept], entries[1][kept], entries[2][kept])
            if f == 0:
                meetings.append(Meetings(level_f.astype(np.int32), level_g.astype(np.int32), block))
                head_tail.append(entries)
            else:
                tail_tail += [entries, (entries[1], entries[0], entries[2])]
    row, column, weight = (np.concatenate(part) for part in zip(*head_tail, strict=True))
    cross = sparse.csr_matrix((weight, (row, column)), shape=(n_head, n_tail))
    products = float(np.sum(np.diff(cross.indptr).astype(float) ** 2))
    between, tail = None, None
    if tail_tail:
        r, c, w = (np.concatenate(part) for part in zip(*tail_tail, strict=True))
        between = sparse_rows(r, c, w, n_tail)
        tail = sparse.csr_matrix((w, (r, c)), shape=(n_tail, n_tail))

    widths = np.cumsum(q)
    columns_ = tuple(slice(int(e - size), int(e)) for e, size in zip(widths, q, strict=True))
    free = np.zeros((sum(q), sum(q)))
    for f, here in zip(order, columns_, strict=True):
        free[here, here] = 1.0 if patterns is None else np.asarray(patterns[f], dtype=float)
    problem = IterativeProblem(
        diagonal=tuple(diagonal),
        meetings=tuple(meetings),
        head_tail=sparse_rows(row, column, weight, n_head),
        tail_head=sparse_rows(column, row, weight, n_tail),
        tail_tail=between,
    )
    return _Model(
        problem=jax.device_put(problem),
        cross=cross,
        tail=tail,
        W=np.concatenate(W),
        C=XY.T @ XY,
        n=n,
        reml=reml,
        free=free,
        columns=columns_,
        effects=tuple(slice(int(a), int(b)) for a, b in zip(starts, ends, strict=True)),
        z_scale=np.concatenate([scales[f] for f in order]),
        noise=np.repeat(np.array(m) / n, q),
        order=tuple(order),
        ranks=tuple(ranks),
        seed=seed,
        products=products,
    )


def _block_sums(code: np.ndarray, A: np.ndarray, B: np.ndarray, m: int) -> np.ndarray:
    """Return ``sum A_i' B_i`` over the rows i of each code, (a, b, m)."""
    out = np.empty((A.shape[1], B.shape[1], m))
    for a, b in np.ndindex(A.shape[1], B.shape[1]):
        out[a, b] = np.bincount(code, A[:, a] * B[:, b], minlength=m)
    return out


def _join(model: _Model, D: Sequence[np.ndarray]) -> np.ndarray:
    """Return the joint covariance in working units from the caller's."""
    joint = np.zeros_like(model.free)
    for f, here in zip(model.order, model.columns, strict=True):
        joint[here, here] = np.asarray(D[f])
    return joint * model.free * np.outer(model.z_scale, model.z_scale)


def _moments(model: _Model) -> np.ndarray:
    """Start from moments: set quadratic forms of y equal to their expectations.

    The forms are ``y'y`` and, for each factor, the products of the levels' shrunken means
    ``(A_ff + I)^-1 W_f``, which under the model are linear in the covariances (Henderson, 1953).
    The fixed effects, already taken out of y, are ignored.
    """
    q = len(model.free)
    rows, columns = np.nonzero(np.tril(model.free))
    y = model.W[:, -1]
    matrix = np.zeros((1 + len(rows), 1 + len(rows)))
    target = np.zeros(1 + len(rows))
    matrix[0, 0], target[0] = model.n, model.C[-1, -1]
    shrink, forms = [], np.zeros((q, q))
    diagonal = [np.asarray(block) for block in model.problem.diagonal]
    totals = np.zeros((q, q))
    expected = np.zeros((q, q, q, q))
    noise = np.zeros((q, q))
    for here, effects, A in zip(model.columns, model.effects, diagonal, strict=True):
        block = A.transpose(2, 0, 1)
        G = np.linalg.inv(block + np.eye(len(A)))
        shrink.append(G)
        mean = np.einsum("mab,mb->ma", G, y[effects].reshape(-1, len(A)))
        forms[here, here] = mean.T @ mean
        totals[here, here] = A.sum(axis=2)
        GA = G @ block
        noise[here, here] = np.einsum("mab,mcb->ac", GA, G)
        _add_form(expected, here, here, GA)
    for g, meeting in enumerate(model.problem.meetings, start=1):
        head, tail, block = (np.asarray(part) for part in meeting)
        block = block.transpose(2, 0, 1)
        _add_form(expected, model.columns[0], model.columns[g], shrink[0][head] @ block)
        other = shrink[g][tail] @ block.transpose(0, 2, 1)
        _add_form(expected, model.columns[g], model.columns[0], other)
    for e, (i, j) in enumerate(zip(rows, columns, strict=True), start=1):
        direction = np.zeros((q, q))
        direction[i, j] = direction[j, i] = 1.0
        matrix[0, e] = np.sum(totals * direction)
        matrix[e, 0] = noise[i, j]
        target[e] = forms[i, j]
        image = np.einsum("abcd,cd->ab", expected, direction)
        matrix[1:, e] = image[rows, columns]
    solution = np.linalg.lstsq(matrix, target, rcond=None)[0]
    D = np.zeros((q, q))
    D[rows, columns] = D[columns, rows] = solution[1:] / max(solution[0], 1e-12)
    # Three factors or more leave the meetings between tails out, so the start is but a guess.
    for here in model.columns:
        values, vectors = np.linalg.eigh(np.nan_to_num(D[here, here]))
        small = 0.1 * model.noise[here][0]
        D[here, here] = (vectors * np.clip(values, small, 1e4)) @ vectors.T * model.free[here, here]
    return D


def _add_form(expected: np.ndarray, to: slice, of: slice, B: np.ndarray) -> None:
    """Add the map ``D -> sum B D B'`` over blocks ``B (c, a, b)``."""
    _, a, b = B.shape
    flat = B.reshape(len(B), a * b)
    gram = (flat.T @ flat).reshape(a, b, a, b)
    expected[to, to, of, of] += gram.transpose(0, 2, 1, 3)


def _power_traces(model: _Model, at: Elimination, depth: int) -> list[float]:
    """Return the traces of the powers of E up to ``2 depth``, or as many as are worth their time.

    Rows of the powers are formed by blocks: with ``R_k`` the rows of ``E^k``, a block adds
    ``<R_{k-1}, R_k>`` to the trace of ``E^{2k-1}`` and ``|R_k|^2`` to that of ``E^{2k}``.
    """
    if model.products > MOST_PRODUCTS:
        return [0.0]
    root, rest = _off_diagonal(model, at)
    left = root.T.tocsr()
    step = max(1, int(BLOCK_PRODUCTS * left.shape[0] / max(model.products, 1.0)))
    traces = np.zeros(2 * depth)
    if depth == 1:
        for first in range(0, left.shape[0], step):
            rows = left[first : first + step] @ root - rest[first : first + step]
            traces[1] += float(rows.data @ rows.data)
        return list(traces)
    E = (left @ root - rest).tocsr()
    step = max(1, int(E.shape[0] * BLOCK_PRODUCTS / _work(E, depth)))
    for first in range(0, E.shape[0], step):
        rows = E[first : first + step]
        traces[1] += float(rows.data @ rows.data)
        for k in range(2, depth + 1):
            after = rows @ E
            traces[2 * k - 2] += float(rows.multiply(after).sum())
            traces[2 * k - 1] += float(after.data @ after.data)
            rows = after
    return list(traces)


def _off_diagonal(model: _Model, at: Elimination) -> tuple[Any, Any]:
    """Return sparse ``G`` (head effects, tail effects) and ``O`` with ``E = G'G - O``."""
    scaled = sparse.block_diag([_block_diagonal(np.asarray(b)) for b in at.scaled], format="csr")
    rest = sparse.block_diag([_block_diagonal(np.asarray(b)) for b in at.fill], format="csr")
    if model.tail is not None:
        rest = (rest + scaled.T @ model.tail @ scaled).tocsr()
    return (_block_diagonal(np.asarray(at.half)) @ model.cross @ scaled).tocsr(), rest


def _work(E: Any, depth: int) -> float:
    """Estimate from some rows the multiplications for all rows of ``E^2, ..., E^depth``."""
    length = np.diff(E.indptr).astype(float)
    sample = np.linspace(0, E.shape[0] - 1, min(64, E.shape[0])).astype(int)
    rows, work = E[sample], 0.0
    for k in range(2, depth + 1):
        work += float(np.sum(length[rows.indices])) * E.shape[0] / len(sample)
        if k < depth and work <= MOST_PRODUCTS:
            rows = rows @ E
    return max(work, 1.0)


def _depth(model: _Model, at: Elimination) -> int:
    """Return for how many powers of E exact traces are worth their time."""
    if model.products > BLOCK_PRODUCTS * 5:
        return 1
    root, rest = _off_diagonal(model, at)
    E = (root.T.tocsr() @ root - rest).tocsr()
    worth = [depth for depth in range(2, DEEPEST + 1) if _work(E, depth) <= DEEP_PRODUCTS]
    return max([1, *worth])


def _block_diagonal(block: np.ndarray) -> Any:
    """Return the sparse block diagonal matrix of blocks (q, q, m)."""
    q, _, m = block.shape
    data = np.ascontiguousarray(block.transpose(2, 0, 1))
    shape = (q * m, q * m)
    return sparse.bsr_matrix((data, np.arange(m), np.arange(m + 1)), shape=shape).tocsr()


def _controlled(
    samples: np.ndarray, controls: np.ndarray, means: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Regress samples on control variates of known mean.

    Args:
        samples: values, (N,).
        controls: control variates, (N, c).
        means: their means, (c,).

    Returns:
        The estimated mean, residuals (N,), and the factor that turns their sum of squares into the
        variance of the estimate.
    """
    centre = controls.mean(axis=0)
    away = controls - centre
    size = np.sqrt(np.sum(away**2, axis=0))
    used = size > 1e-9 * (1.0 + np.abs(centre)) * np.sqrt(len(samples))
    left, values, right = np.linalg.svd(away[:, used] / size[used], full_matrices=False)
    kept = values > 1e-6
    left = left[:, kept]
    coefficient = left.T @ samples
    gap = right[kept] @ ((means - centre)[used] / size[used]) / values[kept]
    residual = samples - samples.mean() - left @ coefficient
    freedom = max(1, len(samples) - 1 - int(kept.sum()))
    inflation = (1.0 / len(samples) + float(gap @ gap)) / freedom
    return np.asarray(samples.mean() + gap @ coefficient), residual, inflation


def _traces(
    model: _Model, at: Elimination, probes: list[Probe], rank: int
) -> tuple[_Estimate, np.ndarray]:
    """Estimate ``log|T|`` and ``dlog|H|/dD`` from probes.

    The first ``rank`` columns are the orthonormal basis, counted in full; the others are drawn
    orthogonal to it and averaged.

    Returns:
        Estimates of (log|T|, slope in each entry of the joint D's triangle), and the exact part of
        the slopes.
    """
    q = len(model.free)
    triangle = np.tril_indices(q)
    logs = np.concatenate([quadrature(probe.krylov, np.asarray(probe.norm)) for probe in probes])
    norm = np.concatenate([np.asarray(probe.norm) for probe in probes])
    powers = np.concatenate([np.asarray(probe.powers) for probe in probes], axis=1)
    values = np.zeros((q, q, len(logs)))
    forms = np.zeros((q, q, len(logs)))
    form_means = np.zeros((q, q))
    for f, here in enumerate(model.columns):
        name, index = ("head", 0) if f == 0 else ("tail", f - 1)
        value, form = (
            np.concatenate(
                [
                    np.asarray(part if f == 0 else part[index])
                    for part in (getattr(probe, field) for probe in probes)
                ],
                axis=2,
            )
            for field in (name, f"{name}_form")
        )
        sign = -1.0 if f == 0 else 1.0
        values[here, here] = sign * value
        forms[here, here] = sign * form
        centre = at.head_mean if f == 0 else at.tail_mean[index]
        form_means[here, here] = sign * np.asarray(centre)

    def by_entry(array: np.ndarray) -> np.ndarray:
        # A step of an entry moves its mirror image too.
        both = array + np.swapaxes(array, 0, 1)
        both[np.arange(q), np.arange(q)] *= 0.5
        return both[triangle]

    values, forms, form_means = by_entry(values), by_entry(forms), by_entry(form_means)
    known, drawn = slice(0, rank), slice(rank, None)
    n_tail = model.W.shape[0] - model.effects[0].stop
    traces = _power_traces(model, at, len(powers) // 2)
    controls = [norm, *powers[: len(traces)]]
    means = [n_tail, *traces] - np.array([control[known].sum() for control in controls])
    shared = np.stack(controls, axis=1)

    estimates, residuals, inflations = [], [], []
    for entry in range(1 + len(values)):
        sample = logs if entry == 0 else values[entry - 1]
        own, own_means = shared, means
        if entry:
            control = forms[entry - 1]
            own = np.column_stack([shared, control])
            own_means = np.append(means, form_means[entry - 1] - control[known].sum())
        mean, residual, inflation = _controlled(sample[drawn], own[drawn], own_means)
        estimates.append(mean + sample[known].sum())
        residuals.append(residual)
        inflations.append(np.sqrt(inflation))
    left = np.stack(residuals) * np.array(inflations)[:, None]
    slope = np.zeros((q, q))
    slope[model.columns[0], model.columns[0]] = np.asarray(at.head_slope)
    return _Estimate(np.array(estimates), left @ left.T), by_entry(slope)


def _quadratic_forms(model: _Model, at: Elimination) -> _Exact:
    """Solve with ``[X y]``, and evaluate everything but ``log|V|`` and its slope.

    With ``pi = Z'V^-1(y - X beta)`` and ``E_c`` the c-th entry of the triangle, the average
    information is ``(Z E_a pi)'P (Z E_b pi) / scale / 2``, where P is the projection that takes the
    fixed effects out.
    """
    q, p = len(model.free), model.W.shape[1] - 1
    U, steps, converged = _solve_columns(model, at, model.W, DATA_TOL)
    score = model.W - _multiply_columns(model, U)
    S = model.C - model.W.T @ U
    S = 0.5 * (S + S.T)
    inverse = np.linalg.inv(S[:p, :p])
    beta = inverse @ S[:p, p]
    rss = float(S[p, p] - S[:p, p] @ beta)
    d = model.n - model.reml * p
    scale = rss / d
    v = np.append(-beta, 1.0)
    pi, modes = score @ v, U @ v

    slope = np.zeros((q, q))
    directions, entries = [], []
    slopes = np.zeros((q * (q + 1) // 2, p, p))
    for here, effects in zip(model.columns, model.effects, strict=True):
        size = here.stop - here.start
        seen = score[effects, :p].reshape(-1, size, p)
        own = pi[effects].reshape(-1, size)
        slope[here, here] -= own.T @ own / scale
        if model.reml:
            slope[here, here] -= np.einsum("max,xy,mby->ab", seen, inverse, seen, optimize=True)
        for i, j in zip(*np.tril_indices(size), strict=True):
            direction = np.zeros_like(pi)
            part = direction[effects].reshape(-1, size)
            part[:, i] = own[:, j]
            part[:, j] = own[:, i]
            directions.append(direction)
            product = seen[:, i].T @ seen[:, j]
            i, j = i + here.start, j + here.start
            entries.append(i * (i + 1) // 2 + j)
            slopes[entries[-1]] = -product if i == j else -(product + product.T)
    G = np.stack(directions, axis=1)
    image = _multiply_columns(model, G)
    solved, more, also = _solve_columns(model, at, image, PROBE_TOL)
    fixed = score[:, :p].T @ G
    K = G.T @ image - image.T @ solved - fixed.T @ inverse @ fixed
    cross = G.T @ pi
    k = q * (q + 1) // 2
    information = np.zeros((k + 1, k + 1))
    index = np.array([*entries, k])
    information[np.ix_(index, index)] = (
        np.block([[K, cross[:, None]], [cross[None], np.array([[rss]])]]) / scale / 2.0
    )
    slope = slope * (2.0 - np.eye(q))
    return _Exact(
        value=model.reml * np.linalg.slogdet(S[:p, :p])[1]
        + d * (1.0 + np.log(2.0 * np.pi * scale)),
        gradient=pack_triangle(slope),
        information=0.5 * (information + information.T),
        scale=scale,
        beta=beta,
        beta_unscaled=inverse,
        slopes=slopes,
        modes=modes,
        krylov_steps=max(steps, more),
        converged=converged and also,
    )


def _pad(v: np.ndarray) -> np.ndarray:
    """Pad columns to a multiple of eight, so that compiled code is shared."""
    return np.pad(v, ((0, 0), (0, -v.shape[1] % 8)))


def _multiply_columns(model: _Model, v: np.ndarray) -> np.ndarray:
    return np.asarray(_multiply(model.problem, _pad(v)))[:, : v.shape[1]]


def _solve_columns(
    model: _Model, at: Elimination, W: np.ndarray, tol: float
) -> tuple[np.ndarray, int, bool]:
    U, steps, converged = _solve(model.problem, at, _pad(W), tol, KRYLOV_STEPS)
    return np.asarray(U)[:, : W.shape[1]], int(steps.max()), bool(converged.all())


class _Evaluator:
    """Evaluates the criterion of one model, and keeps the probes of the last covariance."""

    def __init__(self, model: _Model) -> None:
        self.model = model
        self.n_tail = model.W.shape[0] - model.effects[0].stop
        self.rank = min(BASIS, self.n_tail // 4)
        self.key = jax.random.key(model.seed)
        self.basis: Any = None
        self.depth = 1
        self.last: tuple[np.ndarray, Elimination, _Exact] | None = None
        self.probes: list[Probe] = []

    def __call__(self, D: np.ndarray, chunks: int) -> _Point:
        """Evaluate at the joint covariance ``D`` with a number of chunks of probes."""
        model = self.model
        if self.last is None or not np.array_equal(D, self.last[0]):
            at = self._eliminate(D)
            self.last, self.probes = (D, at, _quadratic_forms(model, at)), []
        _, at, exact = self.last
        if self.basis is None:
            # Kept from then on, so that the estimates are smooth in the covariance.
            start = jax.random.normal(self.key, (self.n_tail, self.rank), np.float64)
            self.basis = _basis(model.problem, at, start)
        for chunk in range(len(self.probes), chunks):
            # The basis takes the place of the first probes.
            lead = self.basis if chunk == 0 else self.basis[:, :0]
            key = jax.random.fold_in(self.key, chunk + 1)
            signs = _signs(key, self.basis, PROBES - lead.shape[1])
            z = jnp.concatenate([lead, signs], axis=1)
            probe = _probe(model.problem, at, z, PROBE_TOL, KRYLOV_STEPS, self.depth)
            self.probes.append(jax.tree.map(np.asarray, probe))
        estimate, slope = _traces(model, at, self.probes, self.rank)
        steps = [int(probe.krylov.steps.max()) for probe in self.probes]
        solved = [bool(probe.krylov.converged.all()) for probe in self.probes]
        return _Point(
            D=D,
            value=exact.value + float(at.logdet) + float(estimate.mean[0]),
            error=float(np.sqrt(estimate.covariance[0, 0])),
            gradient=exact.gradient + slope + estimate.mean[1:],
            noise=estimate.covariance[1:, 1:],
            exact=exact._replace(
                krylov_steps=max(exact.krylov_steps, *steps),
                converged=exact.converged and all(solved),
            ),
            probes=PROBES * len(self.probes) - self.rank,
        )

    def deepen(self) -> bool:
        """Use more powers of E as control variates, if that is possible."""
        assert self.last is not None
        before, self.depth = self.depth, max(self.depth, _depth(self.model, self.last[1]))
        if self.depth > before:
            self.probes = []
        return self.depth > before

    def _eliminate(self, D: np.ndarray) -> Elimination:
        roots = [
            np.linalg.cholesky(D[here, here] + FLOOR * np.diag(self.model.noise[here]))
            for here in self.model.columns
        ]
        inverses = [np.linalg.inv(root) for root in roots]
        return _eliminate(self.model.problem, tuple(roots), tuple(inverses))


class _Step(NamedTuple):
    """A Newton step from a point, in the coordinates of a pivoted root of D.

    Attributes:
        root: ``R`` with ``D = R R'``, (q, q).
        step: its change, (q, q).
        decrement: ``g'H^-1 g``.
        predicted: decrease of the criterion that the quadratic model promises.
        noise: what the gradient's noise adds to the criterion at the root, on average.
        escape: 1.0 where a zero variance should be left in the direction of negative curvature.
        D_covariance: Monte Carlo covariance of D's triangle.
    """

    root: np.ndarray
    step: np.ndarray
    decrement: float
    predicted: float
    noise: float
    escape: np.ndarray
    D_covariance: np.ndarray


def _newton_step(model: _Model, point: _Point, damping: float) -> _Step:
    q = len(model.free)
    root, pivot, inside = (np.asarray(x) for x in _pivoted(point.D, model.free))
    rows, columns = np.tril_indices(q)
    row, column = np.eye(q)[rows], np.eye(q)[columns]
    jacobian = (
        row[:, :, None] * (column @ root)[:, None] + column[:, :, None] * (row @ root)[:, None]
    ).reshape(-1, q * q) * inside.reshape(-1)
    # A diagonal entry was counted from both sides: both are its derivative.
    G = unpack_symmetric(point.gradient) * (0.5 + 0.5 * np.eye(q)) * model.free
    information = point.exact.information
    profile = 2.0 * (
        information[:-1, :-1]
        - np.outer(information[:-1, -1], information[-1, :-1]) / information[-1, -1]
    )
    free = inside.reshape(-1)
    hessian = jacobian.T @ profile @ jacobian
    hessian += np.kron(2.0 * G, np.eye(q)) * np.outer(free, free) + np.diag(1.0 - free)
    gradient = jacobian.T @ point.gradient
    step = np.asarray(_damped_step(gradient, hessian, damping))
    decrement = -float(gradient @ step) * (1.0 + damping)
    length = max(float(np.linalg.norm(step)), 1e-300)
    limit = (1.0 + float(np.linalg.norm(root))) / (1.0 + 10.0 * damping)
    bent = step @ hessian @ step < 0.0
    step = step * (limit / length if bent else min(1.0, limit / length))
    predicted = -float(gradient @ step) - 0.5 * float(step @ hessian @ step)
    # A root has columns that vanish, where the noise moves nothing.
    unit = np.sqrt(np.abs(np.diag(hessian)))
    unit = np.where(unit > 0.0, unit, 1.0)
    inverse = np.linalg.pinv(hessian / np.outer(unit, unit), hermitian=True, rcond=1e-10)
    reach = jacobian @ (inverse / np.outer(unit, unit))
    noise = jacobian.T @ point.noise @ jacobian
    curvature = np.diag(hessian)
    escape = (curvature < -1e-6 * np.max(np.abs(curvature))).reshape(q, q) * pivot
    return _Step(
        root=root,
        step=step.reshape(q, q),
        decrement=decrement,
        predicted=predicted,
        noise=0.5 * float(np.sum(inverse / np.outer(unit, unit) * noise)),
        escape=escape,
        D_covariance=reach @ noise @ reach.T,
    )


def _newton(
    model: _Model,
    D: np.ndarray,
    target_error: float,
    tol: float,
    max_steps: int,
    max_probes: int,
) -> IterativeSolution:
    """Find the root of the estimated gradient."""
    evaluate = _Evaluator(model)
    most = max(1, (max_probes + evaluate.rank) // PROBES)
    chunks, damping, status, promised = 1, 0.0, Status.MAX_STEPS, 0.0
    deepened = False
    point: _Point | None = None
    step: _Step | None = None
    trial = D
    trace = []
    for _ in range(max_steps):
        new = evaluate(trial, chunks)
        usable = new.exact.scale > 0.0 and bool(np.isfinite(new.value))
        if point is None:
            accept, good = usable, True
        else:
            # Where the gain is of the size of its noise, the gradient alone decides.
            slack = 3.0 * float(np.hypot(new.error, point.error)) + 1e-9 * abs(new.value)
            gain = point.value - new.value
            accept = usable and gain >= -slack
            good = accept and gain >= 0.25 * promised - slack
        if not accept and point is None:
            point, step, status = new, _newton_step(model, new, 0.0), Status.NOT_FINITE
            break
        if accept:
            point = new
            damping = damping if good else max(2.0 * damping, 1e-3)
            damping = 0.0 if good and damping < 1e-3 else 0.1 * damping if good else damping
        else:
            damping = max(8.0 * damping, 1e-2)
        assert point is not None
        step = _newton_step(model, point, damping)
        row = (point.value, point.error, step.decrement, damping, float(accept), point.probes)
        trace.append(row)
        if not point.exact.converged or damping > 1e8:
            status = Status.STALLED
            break
        stuck = accept and step.decrement <= tol and bool(step.escape.any())
        if accept and not stuck and step.decrement <= max(tol, EARLY if chunks <= 4 else 0.0):
            wanted = _chunks(point.probes, step.noise / (SHARE * target_error), evaluate.rank)
            error = _chunks(point.probes, (point.error / target_error) ** 2, evaluate.rank)
            if error > MOST_STEPPING and not deepened:
                deepened = True
                if evaluate.deepen():
                    chunks, trial, promised = min(4, most), point.D, 0.0
                    continue
            wanted = max(wanted, min(error, MOST_STEPPING))
            wanted = min(wanted, most)
            if wanted > chunks:
                # The same covariance again, with more probes beside those it has.
                chunks, trial, promised = wanted, point.D, 0.0
                continue
            if step.decrement <= tol:
                status = Status.CONVERGED
                break
        move = 0.1 * step.escape * np.sqrt(model.noise)[:, None] if stuck else step.step
        moved = step.root + move
        trial, promised = moved @ moved.T * model.free, 0.0 if stuck else step.predicted

    assert point is not None and step is not None
    if status != Status.NOT_FINITE:
        # The step's noise is that of the probes which chose the covariance.
        error = _chunks(point.probes, (point.error / target_error) ** 2, evaluate.rank)
        if error > MOST_STEPPING and not deepened and evaluate.deepen():
            chunks = max(chunks, min(4, most))
        if len(evaluate.probes) != chunks:
            point = evaluate(point.D, chunks)
        while point.error > target_error and chunks < most:
            wanted = _chunks(point.probes, (point.error / target_error) ** 2, evaluate.rank)
            chunks = min(max(wanted, chunks + 1), most)
            point = evaluate(point.D, chunks)
    return _solution(model, point, step, status, np.array(trace).reshape(-1, 6))


def _chunks(probes: int, times: float, rank: int) -> int:
    """Return how many chunks hold ``times`` as many probes, and a few more."""
    return int(np.ceil((1.1 * times * probes + rank) / PROBES)) if times > 1.0 else 1


def _solution(
    model: _Model, point: _Point, step: _Step, status: Status, trace: np.ndarray
) -> IterativeSolution:
    """Return the solution in the caller's units and order."""
    D, modes = point.D.copy(), point.exact.modes
    q = len(D)
    error = unpack_symmetric(np.sqrt(np.diag(step.D_covariance).clip(min=0.0)))
    boundary = []
    for here in model.columns:
        size = np.sqrt(model.noise[here])
        values, vectors = np.linalg.eigh(D[here, here] / np.outer(size, size))
        zero = values <= BOUNDARY
        boundary.append(bool(zero.any()))
        if zero.any():
            kept = (vectors * np.where(zero, 0.0, values)) @ vectors.T
            D[here, here] = kept * np.outer(size, size) * model.free[here, here]
    unit = model.z_scale
    D = D / np.outer(unit, unit)
    error = error / np.outer(unit, unit)

    back = np.argsort(model.order)
    entries, free = [], []
    for f in back:
        here = model.columns[f]
        for i, j in zip(*np.tril_indices(here.stop - here.start), strict=True):
            i, j = i + here.start, j + here.start
            entries.append(i * (i + 1) // 2 + j)
            free.append(model.free[i, j] > 0.0)
    rows, columns = np.tril_indices(q)
    factor = (unit[rows] * unit[columns])[entries]
    index = np.array([*entries, q * (q + 1) // 2])
    scaling = np.append(factor, 1.0)
    information = point.exact.information[np.ix_(index, index)] * np.outer(scaling, scaling)
    effects = []
    for f in back:
        here = model.columns[f]
        modes_f = modes[model.effects[f]].reshape(-1, here.stop - here.start)
        effects.append(modes_f[model.ranks[f]] / unit[here])
    return IterativeSolution(
        D=tuple(D[model.columns[f], model.columns[f]] for f in back),
        scale=point.exact.scale,
        beta=point.exact.beta,
        beta_unscaled=point.exact.beta_unscaled,
        slopes=point.exact.slopes[entries] * factor[:, None, None],
        criterion=point.value,
        criterion_error=point.error,
        D_error=tuple(error[model.columns[f], model.columns[f]] for f in back),
        information=information,
        free=np.array(free),
        gradient=point.gradient[entries] * factor,
        gradient_error=np.sqrt(np.diag(point.noise)[entries].clip(min=0.0)) * factor,
        modes=tuple(effects),
        boundary=tuple(boundary[f] for f in back),
        status=status,
        steps=len(trace),
        decrement=step.decrement,
        krylov_steps=point.exact.krylov_steps,
        probes=point.probes,
        n_tail=model.W.shape[0] - model.effects[0].stop,
        trace=trace,
    )


def probed(
    problem: Problem,
    rows: Rows,
    constraints: Constraints,
    guess: Guess,
    settings: Settings,
    terms: Sequence[TermColumns],
) -> tuple[Solution, IterativeSolution]:
    """Estimate a model in working coordinates, with a record in the form of the other solvers'.

    The Hessian of the record is that of the average information, in place of the observed one.

    Raises:
        EngineError: for what this engine does not do.
    """
    if settings.fix or constraints.structures:
        what = "fix= argument" if settings.fix else "covariance structures"
        remedy = "use engine='crossed'"
        if settings.engine != "iterative":
            remedy = f"this model is too large for any other, so leave out the {what}"
        raise EngineError(f"engine='iterative' does not take {what}; {remedy}")
    factors = sorted({term.factor for term in terms})
    blocks = []
    for factor in factors:
        own = [term.columns for term in terms if term.factor == factor]
        blocks.append(slice(min(c.start for c in own), max(c.stop for c in own)))
    found = solve_iterative(
        rows.factors,
        rows.X,
        rows.y,
        reml=settings.reml,
        D0=None if guess.D is None else [guess.D[here, here] for here in blocks],
        patterns=[np.asarray(constraints.blocks)[here, here] for here in blocks],
        seed=settings.seed,
        max_steps=settings.max_steps or 50,
    )
    D = np.zeros_like(constraints.blocks)
    for here, block in zip(blocks, found.D, strict=True):
        D[here, here] = block
    with jax.enable_x64(True):
        point = _record(problem, constraints, found, blocks, D)
    trace = np.full((TRACE_LENGTH, TRACE_COLUMNS), np.nan)
    shown = found.trace[:TRACE_LENGTH]
    # Criterion, decrement, damping, accepted; and no EM steps.
    trace[: len(shown), :4] = shown[:, [0, 2, 3, 4]]
    trace[: len(shown), 4] = 0.0
    as_array: Any = np.asarray  # the record of a solve is in NumPy
    solution = Solution(
        point=point,
        status=as_array(int(found.status)),
        steps=as_array(found.steps),
        decrement=as_array(found.decrement),
        trace=as_array(trace),
    )
    return solution, found


def _record(
    problem: Problem,
    constraints: Constraints,
    found: IterativeSolution,
    blocks: Sequence[slice],
    D: np.ndarray,
) -> Point:
    """Return the solution as a point of the exact solvers."""
    own_at = Derivatives(
        value=jnp.asarray(found.criterion),
        gradient=jnp.append(found.gradient, 0.0),
        hessian=jnp.asarray(2.0 * found.information),
        log_scale=jnp.log(found.scale),
        beta=jnp.asarray(found.beta),
        beta_inverse=jnp.asarray(found.beta_unscaled),
        x_slope=jnp.asarray(found.slopes),
    )
    theta = jnp.zeros(0)
    at = spread(own_at, tuple(blocks), len(D))
    point = chart(problem, constraints, at, jnp.asarray(D), jnp.asarray(D), theta)
    none = np.zeros((1, 1, 0))
    effects = tuple((modes.T, none) for modes in found.modes)
    point = jax.tree.map(np.asarray, point._replace(at=point.at._replace(effects=())))
    return point._replace(at=point.at._replace(effects=effects))
