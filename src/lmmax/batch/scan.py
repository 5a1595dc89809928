"""Many models with one variance besides the residual's, of which each has some columns of its own.

The columns ``x_1 .. x_r`` that change from model to model, and the response, are vectors in the
coordinates of :mod:`lmmax.batch.one_variance`, in which what the other columns of X leave of
``V = I + d K`` is diagonal.  There their cross-products at any relative variance d are sums::

    A(d) = [xx xy; yx yy],    A(d)_ab = sum_k a_k b_k / (1 + d l_k)

and the model is that without them (Frisch and Waugh, 1933; Zhou and Stephens, 2012, Nature Genetics
44, 821-824) with::

    rss(d)   = yy - yx xx^-1 xy
    REML(d) += log|xx|
    beta_x   = xx^-1 xy,    beta_0 = B(y) - B(x) beta_x

where B(v), the coefficients of the other columns for a response v, is linear in v.  So a model
costs a multiple of what a response does, whatever the other columns are.

Before any product is taken the vectors are freed of the other columns by row, the changing columns
are orthonormalised, and the response is freed of them; A(0) is then the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..solve import Status
from .devices import OverLanes, in_blocks, n_devices
from .line_fits import BOUNDARY, Fits, Spectrum, observed_information, spectrum
from .line_search import minimise, sums_of
from .line_statistics import EXPLAINED, summed
from .one_variance import OneVariance
from .pooled import INDEPENDENT
from .small import cholesky, turned

SEARCH_LANES = 512
"""Models that a device works on together: their arrays stay in cache."""
TILE_LANES = 256
"""Models whose columns are compressed together."""
MOST_COLUMNS = 4
"""Most changing columns for which the small matrices are written out."""


# --- vectors ------------------------------------------------------------------------------------


class Vectors(NamedTuple):
    """Columns in the coordinates of a design, working coordinates for the fitted part.

    Attributes:
        rows: the columns, or what X leaves of them where it explains nearly all, (n, lanes).
        within: least-squares coefficients of ``rows``, (lanes, p).
        origin: those of the columns, (lanes, p).
        size: weighted sums of squares of the columns, (lanes,).
        total: of what X leaves of them, (lanes,).
        rotated: coordinates along the R directions that X sees, (lanes, R).
        left: per set of equal eigenvalues the coordinates that it does not see, (lanes, m_u) each.
    """

    rows: np.ndarray
    within: np.ndarray
    origin: np.ndarray
    size: np.ndarray
    total: np.ndarray
    rotated: np.ndarray
    left: tuple[np.ndarray, ...]


def vectors(line: OneVariance, columns: np.ndarray, residualise: bool = False) -> Vectors:
    """Return the coordinates of columns, (n, lanes).

    Args:
        line: the design.
        columns: the columns, finite.
        residualise: replace all of them by what X leaves, not only those that it nearly explains.
    """
    fixed = line.layout.fixed
    ones = np.zeros(line.n_fixed) if line.ones is None else line.ones
    centre = line.centre(columns)
    around, size, sums = summed(line, columns, centre)
    total = size - np.einsum("ij,ij->j", around, around)
    # The centre is a multiple of the constant, of which X has the coefficients.
    size = size + centre * (2.0 * (ones @ around) + centre * (ones @ ones))
    origin = around + ones[:, None] * centre
    rows, within = columns, origin
    close = np.flatnonzero((total < EXPLAINED * size) | residualise)
    if close.size:
        X = line.layout.X[:, fixed.kept]
        rest = columns[:, close] - X @ (fixed.inverse @ origin[:, close])
        again, squares, sums[:, close] = summed(line, rest, np.zeros(len(close)))
        total[close] = squares - np.einsum("ij,ij->j", again, again)
        around[:, close] = again
        rows, within, origin = np.array(columns, dtype=float), origin.copy(), origin.copy()
        rows[:, close], within[:, close] = rest, again
        origin[:, close] += again
    sums = (sums - line.groups_X @ around).T
    if line.to_groups is not None:
        sums = sums @ line.to_groups.T
    seen, left = [], []
    for groups, basis in line.members:
        here = sums[:, groups]
        seen.append(here @ basis)
        left.append(here - seen[-1] @ basis.T)
    seen.append(sums[:, line.inside])
    rotated = np.concatenate(seen, axis=1) @ line.vectors
    return Vectors(rows, within.T, origin.T, size, total, rotated, tuple(left))


class Coordinates(NamedTuple):
    """Models, in orthonormal coordinates of their changing columns.

    Attributes:
        products: A(d)'s terms by eigenvalue, packed triangles, (lanes, pairs, K).
        to_user: from the coordinates of the changing columns to their coefficients, (lanes, r, r).
        slope: coefficients of the changing columns by least squares, those coordinates, (lanes, r).
        y_scale: root of the residual sum of squares of that, (lanes,).
        origin: coefficients of the other columns for the changing ones, working, (lanes, r, p).
        rotated: coordinates of the changing columns, (lanes, r, R).
        y_origin: of the response, (lanes, p) or (1, p).
        y_rotated: of the response, (lanes, R) or (1, R).
    """

    products: np.ndarray
    to_user: np.ndarray
    slope: np.ndarray
    y_scale: np.ndarray
    origin: np.ndarray
    rotated: np.ndarray
    y_origin: np.ndarray
    y_rotated: np.ndarray


def models(line: OneVariance, y: Vectors, x: list[Vectors]) -> tuple[Coordinates, np.ndarray]:
    """Combine responses and changing columns.

    Args:
        line: the design of the other columns.
        y: the responses, one or as many as there are models.
        x: the r changing columns of each model.

    Returns:
        The models, and which need a closer look: columns that are nearly combinations of others, or
        that explain nearly all.
    """
    n, r = len(x[0].origin), len(x)
    every = [*x, y]
    gram = np.empty((n, r + 1, r + 1))
    for a in range(r + 1):
        gram[:, a, a] = every[a].total
        for b in range(a):
            gram[:, a, b] = gram[:, b, a] = _products(line, every[a], every[b])
    size = np.stack([each.size for each in x], axis=1)
    xx = gram[:, :r, :r]
    left, L = cholesky(xx)
    independent = np.all(left > INDEPENDENT**2 * size, axis=1)
    sound = np.isfinite(gram).all(axis=(1, 2)) & independent
    inverse = np.linalg.inv(np.where(sound[:, None, None], L, np.eye(r)))
    slope = np.einsum("njk,nk->nj", inverse, gram[:, :r, r])
    rest = gram[:, r, r] - np.sum(slope**2, axis=1)
    sound &= rest > EXPLAINED * gram[:, r, r]
    y_scale = np.sqrt(np.where(sound, rest, 1.0))
    # Rows: the orthonormal columns, then the response without them, of length one.
    turn = np.zeros((n, r + 1, r + 1))
    turn[:, :r, :r] = inverse
    turn[:, r, :r] = -np.einsum("nj,njk->nk", slope, inverse) / y_scale[:, None]
    turn[:, r, r] = 1.0 / y_scale
    turn[~sound] = 0.0
    rotated = turned(turn, [each.rotated for each in every])
    lefts = [turned(turn, [each.left[u] for each in every]) for u in range(len(line.set_kappa))]
    inside = line.random
    pairs = [(a, b) for a in range(r + 1) for b in range(a + 1)]
    K = 1 + int(inside.sum()) + len(lefts)
    products = np.empty((n, len(pairs), K))
    for number, (a, b) in enumerate(pairs):
        along = rotated[a][:, inside] * rotated[b][:, inside]
        products[:, number, 1 : K - len(lefts)] = along / line.eigenvalues[inside]
        for u, each in enumerate(lefts):
            own = np.einsum("nm,nm->n", each[a], each[b]) / line.set_kappa[u]
            products[:, number, K - len(lefts) + u] = own
        outside = float(a == b) - products[:, number, 1:].sum(axis=1)
        products[:, number, 0] = outside.clip(min=0.0) if a == b else outside
    # Lanes that are looked at elsewhere go through as harmless ones.
    products[~sound] = 0.0
    products[~sound, :, 0] = [float(a == b) for a, b in pairs]
    origin = np.stack(turned(turn[:, :r, :r], [each.origin for each in x]), axis=1)
    columns = np.stack(rotated[:r], axis=1)
    found = Coordinates(products, inverse, slope, y_scale, origin, columns, y.origin, y.rotated)
    return found, ~sound


def joined(parts: list[Coordinates]) -> Coordinates:
    """Return models one after the other; a response that they share comes once."""
    shared = len(parts[0].y_origin) < len(parts[0].slope)
    return Coordinates(
        *(
            leaves[0]
            if shared and name.startswith("y_") and name != "y_scale"
            else np.concatenate(leaves)
            for name, leaves in zip(Coordinates._fields, zip(*parts, strict=True), strict=True)
        )
    )


def _products(line: OneVariance, a: Vectors, b: Vectors) -> np.ndarray:
    """Return the products of what X leaves of columns, in pairs or with one, (lanes,)."""
    weights = line.layout.weights
    rows = a.rows if weights is None else a.rows * weights[:, None]
    fitted = np.sum(a.within * b.within, axis=1)
    if a.rows.shape[1] == 1:
        return np.asarray(rows[:, 0] @ b.rows - fitted)
    if b.rows.shape[1] == 1:
        return np.asarray(b.rows[:, 0] @ rows - fitted)
    return np.asarray(np.einsum("ij,ij->j", rows, b.rows) - fitted)


# --- the search ---------------------------------------------------------------------------------


class Minimum(NamedTuple):
    """Where the criterion is least; d in units of the grid.

    Attributes:
        d: relative variance, (lanes,).
        value: the criterion's part that depends on d and on the vectors, (lanes,).
        slope: first derivative, (lanes,).
        bend: second derivative, (lanes,).
        rss: residual sum of squares relative to that of least squares, (lanes,).
        rss_slope: its derivative, (lanes,).
        at: A(d), packed, (lanes, pairs).
        at_slope: its derivative, (lanes, pairs).
        steps: steps that the search took, (lanes,).
        converged: whether it arrived, (lanes,).
    """

    d: Any
    value: Any
    slope: Any
    bend: Any
    rss: Any
    rss_slope: Any
    at: Any
    at_slope: Any
    steps: Any
    converged: Any


def _eliminated(pairs: list[Array]) -> tuple[Array, Array]:
    """Return what the last row of a packed triangle leaves after the others, and their logdet."""
    size = isqrt(2 * len(pairs))
    A = dict(zip(((a, b) for a in range(size) for b in range(a + 1)), pairs, strict=True))
    logdet = jnp.zeros_like(pairs[0])
    for j in range(size - 1):
        logdet = logdet + jnp.log(A[j, j])
        for a in range(j + 1, size):
            factor = A[a, j] / A[j, j]
            for b in range(j + 1, a + 1):
                A[a, b] = A[a, b] - factor * A[b, j]
    return A[size - 1, size - 1], logdet


def _at(constants: Spectrum, reml: Array, products: Array, d: Array) -> Minimum:
    """Evaluate lanes (n, pairs, K) at d (n,)."""
    r = 1.0 / (1.0 + d[:, None] * constants.quadratic)
    shrunk = r * constants.quadratic
    pairs = range(products.shape[1])
    powers = (r, r * shrunk, r * shrunk**2)
    sums = sums_of(*(products[:, k] * power for power in powers for k in pairs))
    A, A1, A2 = ([sums[o * len(pairs) + k] for k in pairs] for o in range(len(powers)))
    A1, A2 = [-a for a in A1], [2.0 * a for a in A2]

    # Along d; the derivatives are those of a few numbers.
    def along(t: Array) -> tuple[Array, Array]:
        here = [a + t * (b + 0.5 * t * c) for a, b, c in zip(A, A1, A2, strict=True)]
        rss, logdet = _eliminated(here)
        return constants.d * jnp.log(rss) + reml * logdet, rss

    def first(t: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        return jax.jvp(along, (t,), (jnp.ones_like(t),))

    zero = jnp.zeros_like(d)
    ((value, rss), (slope, rss_slope)), (_, (bend, _)) = jax.jvp(
        first, (zero,), (jnp.ones_like(d),)
    )
    share = constants.logdet / (1.0 + d[:, None] * constants.logdet)
    return Minimum(
        d=d,
        value=value + jnp.log1p(d[:, None] * constants.logdet) @ constants.count,
        slope=slope + share @ constants.count,
        bend=bend - (share * share) @ constants.count,
        rss=rss,
        rss_slope=rss_slope,
        at=jnp.stack(A, axis=1),
        at_slope=jnp.stack(A1, axis=1),
        steps=jnp.zeros(d.shape, jnp.int32),
        converged=jnp.zeros(d.shape, bool),
    )


def _search(constants: Spectrum, reml: Array, products: Array) -> Minimum:
    """Minimise the criterion of lanes (n, pairs, K) over d >= 0."""
    grid = constants.grid
    shrunk = 1.0 / (1.0 + constants.quadratic[:, None] * grid)
    fixed = constants.count @ jnp.log1p(constants.logdet[:, None] * grid)
    rss, logdet = _eliminated([products[:, k] @ shrunk for k in range(products.shape[1])])
    values = fixed + constants.d * jnp.log(rss) + reml * logdet
    found: Minimum = minimise(lambda d: _at(constants, reml, products, d), grid, values)
    return found


_search_compiled = OverLanes(_search, lambda *_: (-1, -1, 0))


# --- fits ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scanned:
    """Fits of models of which each has changing columns; these are the last coefficients.

    Attributes:
        line: the design of the other columns.
        models: what was fitted.
        found: the fits.
        xx_inverse: inverse of ``xx`` at the optimum, orthonormal coordinates, (lanes, r, r).
        xx_slope: derivative of ``xx`` in the relative variance, (lanes, r, r).
    """

    line: OneVariance
    models: Coordinates
    found: Fits
    xx_inverse: np.ndarray
    xx_slope: np.ndarray

    def _seen(self, contrasts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return combinations in the changing columns' coordinates, (n, c, r), and derivatives."""
        line, models, p = self.line, self.models, self.line.n_fixed
        own = np.einsum("cj,nkj->nck", contrasts[:, p:], models.to_user)
        gain = line.gain(self.found.variance)[:, None]
        shrunk = 1.0 / (1.0 + self.found.variance[:, None] * line.eigenvalues)
        to_directions = (contrasts[:, :p] @ line.loadings).T
        inverse = (contrasts[:, :p] @ line.layout.fixed.inverse).T
        through = models.origin @ inverse - (models.rotated * gain) @ to_directions
        slope = (models.rotated * shrunk[:, None] ** 2) @ to_directions
        return own - through.swapaxes(1, 2), slope.swapaxes(1, 2)

    def unscaled_variances(self, contrasts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the diagonals of what `unscaled_covariance` returns, (n, c) each."""
        p = self.line.n_fixed
        base, base_slope = self.line.unscaled_variances(self.found.variance, contrasts[:, :p])
        seen, slope = self._seen(contrasts)
        half = seen @ self.xx_inverse
        bent = half @ self.xx_slope
        own_slope = 2.0 * np.sum(half * slope, axis=2) - np.sum(bent * half, axis=2)
        return base + np.sum(half * seen, axis=2), base_slope + own_slope

    def unscaled_covariance(self, contrasts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ``L (X'V^-1 X)^-1 L'`` and its derivative in the relative variance, (n, c, c).

        Args:
            contrasts: L, on the other columns that were kept and then the changing ones,
                (c, p + r).
        """
        p = self.line.n_fixed
        base, base_slope = self.line.unscaled_covariance(self.found.variance, contrasts[:, :p])
        seen, slope = self._seen(contrasts)
        half = seen @ self.xx_inverse
        cross = half @ slope.swapaxes(1, 2)
        bent = half @ self.xx_slope @ half.swapaxes(1, 2)
        both = cross + cross.swapaxes(1, 2) - bent
        return base + half @ seen.swapaxes(1, 2), base_slope + both


def fits(line: OneVariance, models: Coordinates, reml: bool) -> Scanned:
    """Fit every model to its own optimum."""
    r = models.slope.shape[1]
    unit, fixed = line.unit, line.layout.fixed
    contrasts = float(line.n_obs - reml * (line.n_fixed + r))
    constants = spectrum(line, reml)._replace(d=contrasts)
    at = searched(constants, reml, models.products)
    d = np.where(at.d <= BOUNDARY, 0.0, at.d)
    A, A_slope = _square(at.at), _square(at.at_slope) / unit
    xx_inverse = np.linalg.inv(A[:, :r, :r])
    own = np.einsum("nij,nj->ni", xx_inverse, A[:, :r, r])
    own = models.slope + models.y_scale[:, None] * own
    gain = line.gain(d * unit)
    # B(y - x beta): the coefficients of the other columns.
    origin = models.y_origin - np.einsum("nj,njp->np", own, models.origin)
    rotated = models.y_rotated - np.einsum("nj,njk->nk", own, models.rotated)
    beta = origin @ fixed.inverse.T - (rotated * gain) @ line.loadings.T
    constant = contrasts * (1.0 + np.log(2.0 * np.pi / contrasts))
    constant = constant + 2.0 * contrasts * np.log(models.y_scale)
    constant -= line.layout.log_weights
    if reml:
        constant += 2.0 * np.linalg.slogdet(fixed.R)[1]
        constant -= 2.0 * np.log(np.abs(np.einsum("njj->nj", models.to_user))).sum(axis=1)
    status = np.where(at.converged, Status.CONVERGED, Status.MAX_STEPS)
    found = Fits(
        beta=np.concatenate([beta, np.einsum("nj,njk->nk", own, models.to_user)], axis=1),
        variance=d * unit,
        scale=at.rss * models.y_scale**2 / contrasts,
        criterion=at.value + constant,
        information=observed_information(at, contrasts, unit),
        status=status,
        steps=at.steps,
        gradient=at.slope * (1.0 + at.d),
    )
    return Scanned(line, models, found, xx_inverse, A_slope[:, :r, :r])


def searched(constants: Spectrum, reml: bool, products: np.ndarray) -> Minimum:
    """Run the search block by block."""
    # Designs with nearly as many eigenvalues share compiled code; zeros add nothing.
    products = np.pad(products, [(0, 0), (0, 0), (0, _bucket(products.shape[2]))])
    more = (0, _bucket(len(constants.logdet)))
    constants = constants._replace(
        quadratic=np.pad(constants.quadratic, (0, _bucket(len(constants.quadratic)))),
        logdet=np.pad(constants.logdet, more),
        count=np.pad(constants.count, more),
    )
    call = partial(_search_compiled, constants, float(reml))
    found: Minimum = in_blocks(
        lambda lanes: call(products[lanes]), len(products), SEARCH_LANES * n_devices()
    )
    return found


def _bucket(count: int) -> int:
    """Return how many numbers are missing to a power of two, or one and a half of it."""
    power = max(8, 1 << (count - 1).bit_length())
    return (power if 4 * count > 3 * power else max(8, 3 * power // 4)) - count


def _square(packed: np.ndarray) -> np.ndarray:
    """Return symmetric matrices from packed lower triangles, (n, pairs)."""
    size = isqrt(2 * packed.shape[1])
    full = np.empty((len(packed), size, size))
    rows, columns = np.tril_indices(size)
    full[:, rows, columns] = full[:, columns, rows] = packed
    return full
