"""Many responses of a model with one variance besides the residual: one search on a line each.

Let K be the covariance of the random part for a relative variance d of one: ``V = I + d K``.  In
the coordinates in which K is diagonal on what X leaves of the space, with eigenvalues ``l_k`` and
the squared coordinates ``w_k`` of the response, and with the eigenvalues ``m_i`` of K itself::

    rss(d)  = sum_k w_k / (1 + d l_k)
    REML(d) = sum_k log(1 + d l_k) + (n - p) (log(2 pi rss / (n - p)) + 1) + log|X'X|
    ML(d)   = sum_i log(1 + d m_i) + n (log(2 pi rss / n) + 1)

so that a response is K numbers and a fit is a one-dimensional problem (Patterson and Thompson,
1971; Kang et al., 2008, Genetics 178, 1709-1723).  Here the eigenvalues come from the groups:
``K = L L'`` with ``L'L`` diagonal, and what X takes out has rank p.  Groups with equal entries of
``L'L`` share an eigenvalue but for p of them, so that a random intercept in thousands of groups
needs about p numbers for each distinct size of a group.  By Woodbury's identity the coefficients
and their covariance need no factorisation either: with ``L'L - L'X X'L = E diag(l) E'`` and
orthonormal X, ``(X'V^-1 X)^-1 = I + X'L E diag(d / (1 + d l)) E'L'X``.

The criterion is evaluated for all lanes on one grid of d, a matrix product; the best cell of it
holds the search.  So the minimum does not depend on a start, and is the least of several.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..compilation_cache import compilation_cache
from ..compress.layout import Layout
from ..solve import Status
from .devices import OverLanes, n_devices

LARGEST = 3000
"""Most eigenvalues; their decomposition takes seconds then."""
EXPLAINED = 1e-3
"""Share of a response's sum of squares below which what X leaves is taken from its residuals."""
RANK = 1e-10
"""Eigenvalue, relative to the largest, below which a direction has no random part."""
GRID = np.concatenate([[0.0], 10.0 ** np.linspace(-3.0, 9.0, 37)])
"""Values of d, in units of the sampling variance of an average group's effect, that are tried."""
STEPS = 60
DECREMENT = 1e-16
"""Newton decrement that counts as converged, as for a single fit."""
BOUNDARY = 1e-8
"""A relative variance below this, in the units of the grid, is zero, as for a single fit."""
BLOCK_BYTES, BLOCK_LANES = 1 << 23, 128
"""Bytes of responses that are compressed together, but at least so many responses."""
SEARCH_LANES = 512
"""Lanes that a device works on together: their arrays stay in cache."""


@dataclass(frozen=True, eq=False)
class OneVariance:
    """The designs of such a model, in the coordinates above.

    X has orthonormal columns (weighted, if there are weights); there are R directions of the
    random part that X sees, and U sets of equal eigenvalues beside them, of which each has one
    number per response.

    Attributes:
        layout: the designs by row.
        to_groups: map of the groups' sums to the coordinates in which ``L'L`` is diagonal, (m, m);
            None where they are these.
        members: groups of each set, and the orthonormal basis (m_u, r_u) of what X sees there.
        inside: groups that are no member of a set.
        kappa: entry of ``L'L`` of each direction, (R,).
        X_part: ``X'L`` of each direction, (p, R).
        eigenvalues: ``l_k`` of the directions, (R,), ascending.
        vectors: their eigenvectors, (R, R).
        set_kappa: eigenvalue of each set, (U,).
        set_size: how often it comes, (U,).
        unit: relative variance that is one unit of the grid.
        to_sums: the groups' weighted sums of z times the rows, sparse, (m, n).
        groups_X: the same of X, (m, p).
        ones: coefficients of the constant 1 in X, (p,); None where X does not have it.
        loadings: how the coefficients respond to each direction, (p, R).
    """

    layout: Layout
    to_groups: np.ndarray | None
    members: tuple[tuple[np.ndarray, np.ndarray], ...]
    inside: np.ndarray
    kappa: np.ndarray
    X_part: np.ndarray
    eigenvalues: np.ndarray
    vectors: np.ndarray
    set_kappa: np.ndarray
    set_size: np.ndarray
    unit: float
    to_sums: Any
    groups_X: np.ndarray
    ones: np.ndarray | None
    loadings: np.ndarray

    @property
    def n_fixed(self) -> int:
        """Number of coefficients, p."""
        return len(self.X_part)

    @cached_property
    def random(self) -> np.ndarray:
        """Directions that have a random part beside what X takes out, (R,)."""
        top = max(self.eigenvalues.max(initial=0.0), self.set_kappa.max(initial=0.0))
        return np.asarray(self.eigenvalues > RANK * top)

    def gain(self, variance: np.ndarray) -> np.ndarray:
        """Return ``d / (1 + d l_k)`` of each direction at relative variances d (n,), (n, R)."""
        d = variance[:, None]
        return np.asarray(d / (1.0 + d * self.eigenvalues))

    def unscaled_variances(
        self, variance: np.ndarray, contrasts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the diagonals of what `unscaled_covariance` returns, (n, r) each."""
        own = np.sum((contrasts @ self.layout.fixed.inverse) ** 2, axis=1)
        squares = ((contrasts @ self.loadings) ** 2).T
        shrunk = 1.0 / (1.0 + variance[:, None] * self.eigenvalues)
        return own + (variance[:, None] * shrunk) @ squares, (shrunk * shrunk) @ squares

    def unscaled_covariance(
        self, variance: np.ndarray, contrasts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ``L (X'V^-1 X)^-1 L'`` and its derivative in the relative variance, (n, r, r).

        Args:
            variance: relative variances d, (n,).
            contrasts: L, on the coefficients that were kept, (r, p).
        """
        r = len(contrasts)
        inner = contrasts @ self.layout.fixed.inverse
        seen = contrasts @ self.loadings
        products = (seen[:, None] * seen).reshape(r * r, -1).T
        gain = self.gain(variance)
        shrunk = 1.0 / (1.0 + variance[:, None] * self.eigenvalues)
        shape = (len(variance), r, r)
        return (
            inner @ inner.T + (gain @ products).reshape(shape),
            ((shrunk * shrunk) @ products).reshape(shape),
        )

    @property
    def n_obs(self) -> int:
        """Number of rows, n."""
        return len(self.layout.X)


class Statistics(NamedTuple):
    """What a fit needs of each response; additive in nothing, small.

    Attributes:
        origin: least-squares coefficients in working coordinates, (lanes, p).
        total: residual sum of squares of least squares, (lanes,).
        inside: coordinates of the groups' sums of residuals, (lanes, R).
        sets: sums of squares of those coordinates that X does not see, per set, (lanes, U).
    """

    origin: np.ndarray
    total: np.ndarray
    inside: np.ndarray
    sets: np.ndarray


def suits(layout: Layout, free: bool) -> bool:
    """Return whether a model has one free variance besides the residual's.

    Args:
        layout: its designs.
        free: whether the variance is estimated, and no structure.
    """
    return free and len(layout.factors) == 1 and layout.factors[0].n_effects == 1


def one_variance(layout: Layout) -> OneVariance | None:
    """Analyse the designs; None if there are too many eigenvalues."""
    from scipy.sparse import csr_array

    factor, weights = layout.factors[0], layout.weights
    m, p = factor.n_groups, len(layout.fixed.kept)
    z = factor.blocks[0][:, 0]
    wz = z if weights is None else weights * z
    diagonal = np.bincount(factor.codes, wz * z, minlength=m)
    X = layout.X[:, layout.fixed.kept] @ layout.fixed.inverse
    C = np.stack([np.bincount(factor.codes, wz * column, minlength=m) for column in X.T])
    groups_X, to_groups = C, None
    if factor.root is not None:
        if m > LARGEST:
            return None
        kappa, vectors = np.linalg.eigh(factor.root.T @ (diagonal[:, None] * factor.root))
        kappa = kappa.clip(min=0.0)
        to_groups = vectors.T @ factor.root.T
        C = C @ to_groups.T
    else:
        kappa = diagonal
    members, loose = [], np.ones(m, dtype=bool)
    values, which = np.unique(np.round(kappa, 12), return_inverse=True)
    for u in np.flatnonzero(np.bincount(which, minlength=len(values)) > 1):
        own = np.flatnonzero(which == u)
        left, size, _ = np.linalg.svd(C[:, own].T, full_matrices=False)
        basis = left[:, size > 1e-13]
        if len(own) > basis.shape[1]:
            members.append((own, basis))
            loose[own] = False
    inside = np.flatnonzero(loose)
    parts = [np.full(basis.shape[1], kappa[own[0]]) for own, basis in members] + [kappa[inside]]
    directions = [C[:, own] @ basis for own, basis in members] + [C[:, inside]]
    kappa_R, X_part = np.concatenate(parts), np.concatenate(directions, axis=1)
    if len(kappa_R) > LARGEST:
        return None
    eigenvalues, vectors = np.linalg.eigh(np.diag(kappa_R) - X_part.T @ X_part)
    unit = float(m / kappa.sum())
    ones: np.ndarray | None = X.T @ (np.ones(len(X)) if weights is None else weights)
    if np.max(np.abs(X @ ones - 1.0), initial=0.0) > 1e-9:
        ones = None
    return OneVariance(
        layout=layout,
        to_groups=to_groups,
        members=tuple(members),
        inside=inside,
        kappa=kappa_R,
        X_part=X_part.reshape(p, len(kappa_R)),
        eigenvalues=eigenvalues.clip(min=0.0),
        vectors=vectors,
        set_kappa=np.array([kappa[own[0]] for own, _ in members]),
        set_size=np.array([len(own) - basis.shape[1] for own, basis in members], dtype=float),
        unit=unit,
        to_sums=csr_array((wz, (factor.codes, np.arange(len(wz)))), shape=(m, len(wz))),
        groups_X=groups_X.T,
        ones=ones,
        loadings=layout.fixed.inverse @ X_part.reshape(p, len(kappa_R)) @ vectors,
    )


def statistics(design: OneVariance, y: np.ndarray) -> Statistics:
    """Compress responses, offset removed, a column each, (n, lanes); sums are in float64.

    Each is centred before anything is squared; where X explains nearly all of it, its residuals
    are taken first.
    """
    # Some columns at a time, which stay near from one pass over them to the next.
    lanes = max(BLOCK_LANES, BLOCK_BYTES // (8 * len(y)))
    parts = [
        _statistics(design, y[:, first : first + lanes]) for first in range(0, y.shape[1], lanes)
    ]
    return Statistics(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


def _statistics(design: OneVariance, y: np.ndarray) -> Statistics:
    layout, weights = design.layout, design.layout.weights
    kept = layout.fixed.kept
    X = layout.X[:, kept] if len(kept) < layout.X.shape[1] else layout.X
    y = np.ascontiguousarray(y, dtype=float)
    with np.errstate(invalid="ignore", over="ignore"):
        centre = y.mean(axis=0) if design.ones is not None else np.zeros(y.shape[1])
        around = y - centre if design.ones is not None else y
        both = around if weights is None else around * weights[:, None]
        origin = layout.fixed.inverse.T @ (X.T @ both)
        size = np.einsum("ij,ij->j", both, around)
        total = size - np.einsum("ij,ij->j", origin, origin)
        close = np.flatnonzero(total < EXPLAINED * size)
        if close.size:
            own = around[:, close] - X @ (layout.fixed.inverse @ origin[:, close])
            weighted = own if weights is None else own * weights[:, None]
            again = layout.fixed.inverse.T @ (X.T @ weighted)
            total[close] = np.einsum("ij,ij->j", weighted, own)
            total[close] -= np.einsum("ij,ij->j", again, again)
        sums = design.to_sums @ around - design.groups_X @ origin
        if design.ones is not None:
            origin += design.ones[:, None] * centre
    return from_sums(design, origin.T, total, sums.T)


def from_sums(
    design: OneVariance, origin: np.ndarray, total: np.ndarray, sums: np.ndarray
) -> Statistics:
    """Return the statistics from the groups' sums of weighted residuals times z, (lanes, m)."""
    if design.to_groups is not None:
        sums = sums @ design.to_groups.T
    inside, sets = [], []
    for own, basis in design.members:
        here = sums[:, own]
        seen = here @ basis
        left = here - seen @ basis.T
        inside.append(seen)
        sets.append(np.einsum("ij,ij->i", left, left))
    inside.append(sums[:, design.inside])
    return Statistics(
        origin,
        total,
        np.concatenate(inside, axis=1),
        np.stack(sets, axis=1) if sets else np.zeros((len(sums), 0)),
    )


# --- the search -------------------------------------------------------------------------------


class Spectrum(NamedTuple):
    """The criterion's constants, d in units of the grid.

    Attributes:
        quadratic: eigenvalues of the quadratic form, (K,).
        logdet: eigenvalues of the determinant, (J,).
        count: how often each comes, (J,).
        d: degrees of freedom of the residual sum of squares.
        grid: values of d to try, (G,).
    """

    quadratic: Any
    logdet: Any
    count: Any
    d: Any
    grid: Any


class Minimum(NamedTuple):
    """Where the criterion is least, and its derivatives there in d (units of the grid).

    Attributes:
        d: relative variance, (lanes,).
        value: the criterion's part that depends on d, (lanes,).
        slope: first derivative, (lanes,).
        bend: second derivative, (lanes,).
        rss: residual sum of squares, (lanes,).
        rss_slope: its derivative, (lanes,).
        steps: steps that the search took, (lanes,).
        converged: whether it arrived, (lanes,).
    """

    d: Any
    value: Any
    slope: Any
    bend: Any
    rss: Any
    rss_slope: Any
    steps: Any
    converged: Any


def _at(spectrum: Spectrum, w: Array, d: Array) -> Minimum:
    """Evaluate the slopes of lanes (n, K) at d (n,); the value is left at zero."""
    r = 1.0 / (1.0 + d[:, None] * spectrum.quadratic)
    first = w * r
    shrunk = r * spectrum.quadratic
    second = first * shrunk
    rss, slope = jnp.sum(first, 1), -jnp.sum(second, 1)
    bend = 2.0 * jnp.sum(second * shrunk, 1)
    share = spectrum.logdet / (1.0 + d[:, None] * spectrum.logdet)
    relative = slope / rss
    return Minimum(
        d=d,
        value=jnp.zeros_like(d),
        slope=share @ spectrum.count + spectrum.d * relative,
        bend=spectrum.d * (bend / rss - relative**2) - (share * share) @ spectrum.count,
        rss=rss,
        rss_slope=slope,
        steps=jnp.zeros(d.shape, jnp.int32),
        converged=jnp.zeros(d.shape, bool),
    )


def _search(spectrum: Spectrum, w: Array) -> Minimum:
    """Minimise the criterion of lanes (n, K) over d >= 0."""
    grid = spectrum.grid
    shrunk = 1.0 / (1.0 + spectrum.quadratic[:, None] * grid)
    fixed = spectrum.count @ jnp.log1p(spectrum.logdet[:, None] * grid)
    values = fixed + spectrum.d * jnp.log(w @ shrunk)
    best = jnp.argmin(values, axis=1)
    low = jnp.log1p(grid[jnp.maximum(best - 1, 0)])
    high = jnp.log1p(grid[jnp.minimum(best + 1, len(grid) - 1)])

    # In t = log(1 + d) a variance near zero and a huge one are equally easy.
    def judge(t: Array, at: Minimum) -> tuple[Array, Array, Array]:
        inner = at.d + 1.0
        slope, bend = at.slope * inner, at.bend * inner**2 + at.slope * inner
        stays = (t <= 0.0) & (slope >= 0.0)
        near = (bend > 0.0) & (slope**2 <= DECREMENT * jnp.where(bend > 0.0, bend, 1.0))
        return slope, bend, stays | near

    def go_on(state: tuple[Any, ...]) -> Array:
        return jnp.any(~state[1].converged & (state[1].steps < STEPS))

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        t, at, low, high = state
        slope, bend, _ = judge(t, at)
        high = jnp.where(slope > 0.0, t, high)
        low = jnp.where(slope > 0.0, low, t)
        newton = t - slope / jnp.where(bend > 0.0, bend, 1.0)
        # Downhill and inside the bracket; else in its middle, or at the boundary.
        inside = (bend > 0.0) & (newton < high) & (newton > low)
        at_zero = (bend > 0.0) & (newton <= 0.0) & (low <= 0.0)
        new = jnp.where(inside, newton, jnp.where(at_zero, 0.0, 0.5 * (low + high)))
        new = jnp.where(at.converged, t, new)
        after = _at(spectrum, w, jnp.expm1(new))
        done = at.converged | judge(new, after)[2] | (high - low <= 1e-14 * high)
        steps = at.steps + (~at.converged & (at.steps < STEPS))
        return new, after._replace(steps=steps, converged=done), low, high

    t = jnp.log1p(grid[best])
    at = _at(spectrum, w, grid[best])
    finite = jnp.isfinite(at.slope)
    at = at._replace(converged=judge(t, at)[2] | ~finite)
    _, at, _, _ = lax.while_loop(go_on, step, (t, at, low, high))
    logdet = jnp.log1p(at.d[:, None] * spectrum.logdet) @ spectrum.count
    return at._replace(value=logdet + spectrum.d * jnp.log(at.rss), converged=at.converged & finite)


_search_compiled = OverLanes(_search, lambda *_: (-1, 0))


def spectrum(design: OneVariance, reml: bool) -> Spectrum:
    """Return the constants of the criterion."""
    inside = design.random
    quadratic = np.concatenate([[0.0], design.eigenvalues[inside], design.set_kappa])
    if reml:
        logdet = quadratic
        count = np.concatenate([[0.0], np.ones(inside.sum()), design.set_size])
    else:
        logdet = np.concatenate([design.kappa, design.set_kappa])
        count = np.concatenate([np.ones(len(design.kappa)), design.set_size])
    d = float(design.n_obs - reml * design.n_fixed)
    unit = design.unit
    return Spectrum(quadratic * unit, logdet * unit, count, d, GRID)


def coordinates(design: OneVariance, stats: Statistics, rotated: np.ndarray) -> np.ndarray:
    """Return the squared coordinates of the responses relative to their total, (lanes, K).

    Args:
        design: the designs.
        stats: statistics of the responses.
        rotated: their inside coordinates along the eigenvectors, (lanes, R).
    """
    inside = design.random
    along = rotated[:, inside] ** 2 / design.eigenvalues[inside]
    parts = np.concatenate([along, stats.sets / design.set_kappa], axis=1)
    rest = (stats.total - parts.sum(axis=1)).clip(min=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.concatenate([rest[:, None], parts], axis=1) / stats.total[:, None]


# --- fits -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fits:
    """Fits of many responses.

    Attributes:
        beta: coefficients of the columns that were kept, (lanes, p).
        variance: relative variance of the random effect, user's units, (lanes,).
        scale: residual variance, (lanes,).
        criterion: -2 log-likelihood, (lanes,).
        information: observed information on (relative variance, log scale), (lanes, 2, 2).
        status: a :class:`Status` each, (lanes,).
        steps: steps of the search, (lanes,).
        gradient: slope of the criterion in the logarithm of one plus the variance in units of the
            sampling variance of a group's effect, (lanes,).
    """

    beta: np.ndarray
    variance: np.ndarray
    scale: np.ndarray
    criterion: np.ndarray
    information: np.ndarray
    status: np.ndarray
    steps: np.ndarray
    gradient: np.ndarray


def fits(design: OneVariance, stats: Statistics, reml: bool) -> Fits:
    """Fit every response to its own optimum."""
    n = len(stats.total)
    constants = spectrum(design, reml)
    # A lane without variation, or with values that are not finite, goes through as a harmless one.
    sound = np.isfinite(stats.total) & (stats.total > 0.0) & np.isfinite(stats.origin).all(axis=1)
    rotated = np.where(sound[:, None], stats.inside, 0.0) @ design.vectors
    w = coordinates(design, stats, rotated)
    w = np.where(sound[:, None] & np.isfinite(w), w, 1.0)
    with jax.enable_x64(True), compilation_cache():
        at = Minimum(
            *_in_chunks(partial(_search_compiled, constants), (w,), SEARCH_LANES * n_devices())
        )
    d = np.where(at.d <= BOUNDARY, 0.0, at.d)
    gain = design.gain(d * design.unit)
    beta = stats.origin @ design.layout.fixed.inverse.T - (rotated * gain) @ design.loadings.T
    contrasts = constants.d
    scale = at.rss * stats.total / contrasts
    weights = design.layout.weights
    constant = contrasts * (1.0 + np.log(2.0 * np.pi / contrasts)) + contrasts * np.log(
        np.where(sound, stats.total, np.nan)
    )
    constant = constant - (0.0 if weights is None else float(np.log(weights).sum()))
    if reml:
        constant = constant + 2.0 * np.linalg.slogdet(design.layout.fixed.R)[1]
    # With the scale in it: the profiled curvature, and the slope of rss / scale.
    cross = at.rss_slope / at.rss * contrasts
    bend = at.bend + cross**2 / contrasts
    information = np.empty((n, 2, 2))
    information[:, 0, 0] = bend / design.unit**2
    information[:, 0, 1] = information[:, 1, 0] = -cross / design.unit
    information[:, 1, 1] = contrasts
    status = np.where(at.converged, Status.CONVERGED, Status.MAX_STEPS)
    rounding = (10.0 * np.finfo(float).eps) ** 2 / design.n_obs
    status = np.where(at.rss / contrasts <= rounding, Status.UNBOUNDED, status)
    status = np.where(sound, status, Status.NOT_FINITE)
    lost = ~sound
    found = Fits(
        beta=beta,
        variance=d * design.unit,
        scale=scale,
        criterion=at.value + constant,
        information=0.5 * information,
        status=status,
        steps=at.steps,
        gradient=at.slope * (1.0 + at.d),
    )
    for values in (found.beta, found.variance, found.scale, found.criterion):
        values[lost] = np.nan
    return found


def _in_chunks(function: Any, arrays: tuple[np.ndarray, ...], size: int) -> list[np.ndarray]:
    """Run a function on lanes, chunk by chunk; the last one is filled up with its first lane."""
    n = len(arrays[0])
    parts = []
    for first in range(0, n, size):
        local = np.arange(first, first + size)
        local = np.where(local < n, local, first)
        parts.append(function(*(array[local] for array in arrays)))
    parts = jax.device_get(parts)
    return [np.concatenate(leaves)[:n].copy() for leaves in zip(*parts, strict=True)]
