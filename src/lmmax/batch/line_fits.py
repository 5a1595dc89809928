"""Fits of models with one variance besides the residual: one search on a line for each response.

The criterion, see :mod:`lmmax.batch.one_variance`, is evaluated for all lanes on one grid of the
relative variance d, a matrix product; the best cell of it holds the search.  So the minimum does
not depend on a start, and is the least of several.  All of a fit, from its statistics to the
variances of its coefficients, is one compiled function of a block of lanes, whose arrays stay in
cache; the blocks run side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..solve import Status
from .devices import OverLanes, in_blocks, n_devices
from .line_search import minimise, sums_of
from .line_statistics import Statistics
from .one_variance import OneVariance

GRID = np.concatenate([[0.0], 10.0 ** np.linspace(-3.0, 9.0, 37)])
"""Values of d, in units of the sampling variance of an average group's effect, that are tried."""
FAR_APART = 1e5
"""A relative variance beyond this, in the same units, leaves too few digits for what varies within
groups, which is here the difference of the total and what varies between them."""
BOUNDARY = 1e-8
"""A relative variance below this, in the units of the grid, is zero, as for a single fit."""
SEARCH_LANES, BLOCK_BYTES = 512, 1 << 21
"""Most lanes of a block, and most bytes of their numbers: the arrays of a block stay in cache."""


# --- the search -------------------------------------------------------------------------------


class Spectrum(NamedTuple):
    """The criterion's constants, d in units of the grid.

    Attributes:
        quadratic: eigenvalues of the quadratic form, (K,).
        logdet: eigenvalues of the determinant, (J,); for a search None where they are the same.
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
    logdet = spectrum.logdet
    share = shrunk if logdet is None else logdet / (1.0 + d[:, None] * logdet)
    trace = spectrum.count * share
    if logdet is None:
        sums = sums_of(first, second, second * shrunk, trace, trace * share)
    else:
        sums = *sums_of(first, second, second * shrunk), *sums_of(trace, trace * share)
    rss, slope, bend = sums[0], -sums[1], 2.0 * sums[2]
    relative = slope / rss
    return Minimum(
        d=d,
        value=jnp.zeros_like(d),
        slope=sums[3] + spectrum.d * relative,
        bend=spectrum.d * (bend / rss - relative**2) - sums[4],
        rss=rss,
        rss_slope=slope,
        steps=jnp.zeros(d.shape, jnp.int32),
        converged=jnp.zeros(d.shape, bool),
    )


def _search(spectrum: Spectrum, w: Array) -> Minimum:
    """Minimise the criterion of lanes (n, K) over d >= 0."""
    grid, logdet = spectrum.grid, spectrum.logdet
    eigenvalues = spectrum.quadratic if logdet is None else logdet
    shrunk = 1.0 / (1.0 + spectrum.quadratic[:, None] * grid)
    fixed = spectrum.count @ jnp.log1p(eigenvalues[:, None] * grid)
    values = fixed + spectrum.d * jnp.log(w @ shrunk)
    at: Minimum = minimise(lambda d: _at(spectrum, w, d), grid, values)
    determinant = jnp.log1p(at.d[:, None] * eigenvalues) @ spectrum.count
    return at._replace(value=determinant + spectrum.d * jnp.log(at.rss))


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


# --- fits -------------------------------------------------------------------------------------


class Directions(NamedTuple):
    """What the fits of a design need of it beside its spectrum; see :class:`OneVariance`.

    Attributes:
        eigenvalues: ``l_k`` of the directions, (R,).
        vectors: their eigenvectors, (R, R).
        inverse: ``1 / l_k``, zero of those without a random part beside X, (R,).
        set_inverse: the same of the sets, (U,).
        loadings: how the coefficients respond to each direction, (p, R).
        x_inverse: from working coefficients to the user's, (p, p).
        unit: relative variance that is one unit of the grid.
    """

    eigenvalues: Any
    vectors: Any
    inverse: Any
    set_inverse: Any
    loadings: Any
    x_inverse: Any
    unit: Any


class Solution(NamedTuple):
    """Where the criterion is least, and the coefficients there.

    Attributes:
        at: the minimum.
        beta: coefficients, (lanes, p).
        unscaled: diagonal of ``(X'V^-1 X)^-1``, (lanes, p).
        unscaled_slope: its derivative in the relative variance, (lanes, p).
    """

    at: Minimum
    beta: Any
    unscaled: Any
    unscaled_slope: Any


def _solve(spectrum: Spectrum, directions: Directions, sound: Array, stats: Statistics) -> Solution:
    """Fit lanes.

    One that is not sound, without variation or with values that are not finite, goes through as a
    harmless one.
    """
    own = directions
    rotated = jnp.where(sound[:, None], stats.inside, 0.0) @ own.vectors
    along = jnp.concatenate([rotated**2 * own.inverse, stats.sets * own.set_inverse], axis=1)
    rest = jnp.maximum(stats.total - along.sum(axis=1), 0.0)
    w = jnp.concatenate([rest[:, None], along], axis=1) / stats.total[:, None]
    at = _search(spectrum, jnp.where(sound[:, None] & jnp.isfinite(w), w, 1.0))
    at = at._replace(d=jnp.where(at.d <= BOUNDARY, 0.0, at.d))
    variance = (at.d * own.unit)[:, None]
    shrunk = 1.0 / (1.0 + variance * own.eigenvalues)
    squares = (own.loadings**2).T
    return Solution(
        at,
        stats.origin @ own.x_inverse.T - variance * ((rotated * shrunk) @ own.loadings.T),
        (own.x_inverse**2).sum(axis=1) + variance * (shrunk @ squares),
        (shrunk * shrunk) @ squares,
    )


_compiled = OverLanes(_solve, lambda *_: (-1, -1, 0, 0))


def _constants(design: OneVariance, reml: bool) -> tuple[Spectrum, Directions]:
    """Return the constants of the fits; a direction without a random part has eigenvalue zero."""
    random = design.random
    inverse = np.divide(1.0, design.eigenvalues, out=np.zeros(len(random)), where=random)
    quadratic = np.concatenate([[0.0], design.eigenvalues * random, design.set_kappa])
    found = spectrum(design, reml)._replace(quadratic=quadratic * design.unit)
    if reml:
        # The determinant has the eigenvalues of the quadratic form.
        count = np.concatenate([[0.0], random, design.set_size])
        found = found._replace(logdet=None, count=count)
    x_inverse = design.layout.fixed.inverse
    return found, Directions(
        design.eigenvalues,
        design.vectors,
        inverse,
        1.0 / design.set_kappa,
        design.loadings,
        x_inverse,
        design.unit,
    )


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


@dataclass(frozen=True, eq=False)
class OwnFits(Fits):
    """Fits with what their standard errors come from.

    Attributes:
        unscaled: diagonals of ``(X'V^-1 X)^-1``, (lanes, p).
        unscaled_slope: their derivatives in the relative variance, (lanes, p).
    """

    unscaled: np.ndarray
    unscaled_slope: np.ndarray


def observed_information(at: Any, contrasts: float, unit: float) -> np.ndarray:
    """Return the information on the relative variance and the logarithm of the scale, (n, 2, 2).

    Args:
        at: the profile at the minimum: `bend`, and `rss` with `rss_slope`, (n,) each.
        contrasts: degrees of freedom of the residual sum of squares.
        unit: relative variance that is one unit of d.
    """
    # With the scale in it: the profiled curvature, and the slope of rss / scale.
    cross = at.rss_slope / at.rss * contrasts
    information = np.empty((len(cross), 2, 2))
    information[:, 0, 0] = (at.bend + cross**2 / contrasts) / unit**2
    information[:, 0, 1] = information[:, 1, 0] = -cross / unit
    information[:, 1, 1] = contrasts
    return 0.5 * information


def fits(design: OneVariance, stats: Statistics, reml: bool) -> OwnFits:
    """Fit every response to its own optimum."""
    n = len(stats.total)
    sound = np.isfinite(stats.total) & (stats.total > 0.0) & np.isfinite(stats.origin).all(axis=1)
    constants, directions = _constants(design, reml)
    numbers = stats.inside.shape[1] + stats.sets.shape[1] + 1
    fitting = max(BLOCK_BYTES // (8 * numbers), 1)

    def solved(lanes: Any) -> Solution:
        own = Statistics(*(part[lanes] for part in stats))
        found: Solution = _compiled(constants, directions, sound[lanes], own)
        return found

    size = min(SEARCH_LANES, 1 << (fitting.bit_length() - 1)) * n_devices()
    at, beta, unscaled, slope = in_blocks(solved, n, size)
    contrasts = constants.d
    scale = at.rss * stats.total / contrasts
    constant = contrasts * (1.0 + np.log(2.0 * np.pi / contrasts)) + contrasts * np.log(
        np.where(sound, stats.total, np.nan)
    )
    constant = constant - design.layout.log_weights
    if reml:
        constant = constant + 2.0 * np.linalg.slogdet(design.layout.fixed.R)[1]
    status = np.where(at.converged, Status.CONVERGED, Status.MAX_STEPS)
    rounding = (10.0 * np.finfo(float).eps) ** 2 / design.n_obs
    vanishes = not (reml or design.has_maximum)
    status = np.where((at.rss / contrasts <= rounding) | vanishes, Status.UNBOUNDED, status)
    status = np.where(sound, status, Status.NOT_FINITE)
    lost = ~sound
    found = OwnFits(
        beta=beta,
        variance=at.d * design.unit,
        scale=scale,
        criterion=at.value + constant,
        information=observed_information(at, contrasts, design.unit),
        status=status,
        steps=at.steps,
        gradient=at.slope * (1.0 + at.d),
        unscaled=unscaled,
        unscaled_slope=slope,
    )
    for values in (found.beta, found.variance, found.scale, found.criterion):
        values[lost] = np.nan
    return found
