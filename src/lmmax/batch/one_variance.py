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
holds the search.  So the minimum does not depend on a start, and is the least of several.  All of
a fit, from its statistics to the variances of its coefficients, is one compiled function of a block
of lanes, whose arrays stay in cache; the blocks run side by side.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..compress.layout import Layout
from ..constraints import Settings, TermColumns
from ..solve import Status
from .devices import OverLanes, in_blocks, n_devices
from .line_search import minimise, sums_of

LARGEST = 3000
"""Most eigenvalues; their decomposition takes seconds then."""
EXPLAINED = 1e-3
"""Share of a response's sum of squares below which what X leaves is taken from its residuals."""
RANK = 1e-10
"""Eigenvalue, relative to the largest, below which a direction has no random part."""
GRID = np.concatenate([[0.0], 10.0 ** np.linspace(-3.0, 9.0, 37)])
"""Values of d, in units of the sampling variance of an average group's effect, that are tried."""
BOUNDARY = 1e-8
"""A relative variance below this, in the units of the grid, is zero, as for a single fit."""
SUM_BYTES, LEAST_LANES, MOST_LANES = 1 << 26, 16, 512
"""Bytes of the groups' sums of responses that are compressed together; bounds of their number."""
TILE_BYTES = 1 << 19
"""Bytes of the rows that are summed together: they stay in cache from one sum to the next."""
CENTRE_ROWS = 64
"""Rows, spread over the data, around whose mean the others are summed."""
SEARCH_LANES, BLOCK_BYTES = 512, 1 << 21
"""Most lanes of a block, and most bytes of their numbers: the arrays of a block stay in cache."""


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

    @cached_property
    def rows(self) -> GroupedRows:
        """The rows in the order of their groups."""
        layout, factor = self.layout, self.layout.factors[0]
        z, weights, kept = factor.blocks[0][:, 0], layout.weights, layout.fixed.kept
        X = layout.X if len(kept) == layout.X.shape[1] else layout.X[:, kept]
        wz = z if weights is None else weights * z
        if not np.any(np.diff(factor.codes) < 0):
            return GroupedRows(None, factor.codes, wz, X, weights)
        order = np.argsort(factor.codes, kind="stable")
        weights = None if weights is None else weights[order]
        return GroupedRows(order, factor.codes[order], wz[order], X[order], weights)

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
        return own + variance[:, None] * (shrunk @ squares), (shrunk * shrunk) @ squares

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

    def centre(self, columns: np.ndarray) -> np.ndarray:
        """Return about where columns (n, lanes) lie, if X has the constant; else zero, (lanes,)."""
        if self.ones is None:
            return np.zeros(columns.shape[1])
        some = np.linspace(0, len(columns) - 1, CENTRE_ROWS).astype(np.int64)
        return np.asarray(columns[some].mean(axis=0, dtype=float))

    @property
    def n_obs(self) -> int:
        """Number of rows, n."""
        return self.layout.n_obs


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


def suits(layout: Layout, terms: Sequence[TermColumns], settings: Settings) -> bool:
    """Return whether a model has one free variance besides the residual's, and no structure.

    Args:
        layout: its designs.
        terms: its random terms.
        settings: how it is to be fitted.
    """
    free = not settings.fix and len(terms) == 1 and terms[0].pattern is not None
    form = settings.engine in ("auto", "grouped")
    return free and form and len(layout.factors) == 1 and layout.factors[0].n_effects == 1


def one_variance(layout: Layout) -> OneVariance | None:
    """Analyse the designs; None if there are too many eigenvalues."""
    from scipy.sparse import csr_array

    factor, weights = layout.factors[0], layout.weights
    m, p = factor.n_groups, len(layout.fixed.kept)
    z = factor.blocks[0][:, 0]
    wz = z if weights is None else weights * z
    diagonal = np.bincount(factor.codes, wz * z, minlength=m)
    X = layout.X[:, layout.fixed.kept] @ layout.fixed.inverse
    C = np.zeros((p, m))
    for row, column in zip(C, X.T, strict=True):
        row[:] = np.bincount(factor.codes, wz * column, minlength=m)
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
    # Groups in which z is zero have no random part.
    some = np.flatnonzero(kappa > RANK * kappa.max())
    members, loose = [], np.isin(np.arange(m), some)
    values, which = np.unique(np.round(kappa[some], 12), return_inverse=True)
    for u in np.flatnonzero(np.bincount(which, minlength=len(values)) > 1):
        own = some[which == u]
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

    One pass over them, tile by tile in cache, around the mean of a few rows.  Where that or X
    explains nearly all of a response, its residuals are taken before anything is squared.
    """
    k = y.shape[1]
    lanes = min(max(SUM_BYTES // (8 * len(design.groups_X)), LEAST_LANES), MOST_LANES)
    ends = np.linspace(0, k, -(-k // lanes) + 1).astype(np.int64)
    blocks = [y[:, first:last] for first, last in pairwise(ends.tolist())]
    if len(blocks) == 1:
        return _statistics(design, y)
    # NumPy lets other threads run meanwhile.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        parts = list(threads.map(partial(_statistics, design), blocks))
    return Statistics(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


def _statistics(design: OneVariance, y: np.ndarray) -> Statistics:
    fixed = design.layout.fixed
    with np.errstate(invalid="ignore", over="ignore"):
        centre = design.centre(y)
        origin, size, sums = summed(design, y, centre)
        total = size - np.einsum("ij,ij->j", origin, origin)
        fitted = origin.copy()
        close = np.flatnonzero(total < EXPLAINED * size)
        if close.size:
            X = design.layout.X[:, fixed.kept]
            rest = y[:, close] - centre[close] - X @ (fixed.inverse @ origin[:, close])
            again, size, sums[:, close] = summed(design, rest, np.zeros(len(close)))
            total[close] = size - np.einsum("ij,ij->j", again, again)
            fitted[:, close] = again
            origin[:, close] += again
        if design.ones is not None:
            origin += design.ones[:, None] * centre
        return _of_sums(design, fitted, total, sums)._replace(origin=origin.T)


def summed(
    design: OneVariance, y: np.ndarray, centre: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return least-squares coefficients, sums of squares and the groups' sums around a centre.

    Args:
        design: the designs.
        y: the responses, (n, lanes).
        centre: what is taken from each, (lanes,).

    Returns:
        Working coefficients (p, lanes), sums of squares (lanes,), weighted sums of z times the
        responses (m, lanes).
    """
    rows, lanes = design.rows, len(centre)
    products, size = np.zeros((rows.X.shape[1], lanes)), np.zeros(lanes)
    sums = np.zeros((len(design.groups_X), lanes))
    tiles = rows.tiles(max(TILE_BYTES // (8 * lanes), 1))
    buffer = np.empty((max((tile.at.stop - tile.at.start for tile in tiles), default=0), lanes))
    for tile in tiles:
        around = buffer[: tile.at.stop - tile.at.start]
        np.copyto(around, y[tile.rows])
        around -= centre
        both = around if rows.weights is None else around * rows.weights[tile.at, None]
        products += rows.X[tile.at].T @ both
        size += np.einsum("ij,ij->j", both, around)
        if tile.group_size:
            each = around.reshape(-1, tile.group_size, lanes)
            np.add.reduce(each, axis=1, out=sums[tile.groups])
        else:
            sums[tile.groups] += tile.to_sums @ around
    return design.layout.fixed.inverse.T @ products, size, sums


def from_sums(
    design: OneVariance, origin: np.ndarray, total: np.ndarray, sums: np.ndarray
) -> Statistics:
    """Return the statistics from the groups' sums of weighted residuals times z, (lanes, m)."""
    found = _of_sums(design, np.zeros_like(origin.T), total, np.ascontiguousarray(sums.T))
    return found._replace(origin=origin)


def _of_sums(
    design: OneVariance, origin: np.ndarray, total: np.ndarray, sums: np.ndarray
) -> Statistics:
    """Return the statistics from sums from which the fitted part is still to be taken.

    Args:
        design: the designs.
        origin: working coefficients of that part, (p, lanes).
        total: residual sums of squares, (lanes,).
        sums: the groups' weighted sums of z times the responses, (m, lanes).
    """
    groups_X = design.groups_X
    if design.to_groups is not None:
        sums = design.to_groups @ (sums - groups_X @ origin)
        groups_X, origin = np.zeros_like(groups_X), np.zeros_like(origin)
    inside, sets = [], []
    for own, basis in design.members:
        here = sums[as_range(own)]
        # The basis spans what X does there: what it leaves of the sums is free of the fitted part.
        seen = basis.T @ here
        squares = np.einsum("ij,ij->j", here, here)
        left = squares - np.einsum("ij,ij->j", seen, seen)
        seen -= (basis.T @ groups_X[own]) @ origin
        close = np.flatnonzero(left < EXPLAINED * squares)
        if close.size:
            rest = here[:, close] - groups_X[own] @ origin[:, close]
            seen[:, close] = basis.T @ rest
            rest -= basis @ seen[:, close]
            left[close] = np.einsum("ij,ij->j", rest, rest)
        inside.append(seen.T)
        sets.append(left)
    loose = sums[design.inside] - groups_X[design.inside] @ origin
    inside.append(loose.T)
    return Statistics(
        origin.T,
        total,
        np.concatenate(inside, axis=1),
        np.stack(sets, axis=1) if sets else np.zeros((len(total), 0)),
    )


def as_range(positions: np.ndarray) -> np.ndarray | slice:
    """Return ascending positions as a slice, which copies nothing, if they are one."""
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions


class Tile(NamedTuple):
    """Rows that are summed together.

    Attributes:
        at: their positions in the order of the groups.
        rows: their positions in the data.
        groups: the groups that they belong to.
        group_size: rows of each group, if each is there as a whole with as many, and its sum is a
            plain one; else zero.
        to_sums: the groups' weighted sums of z times the rows, sparse.
    """

    at: slice
    rows: Any
    groups: slice
    group_size: int
    to_sums: Any


@dataclass(frozen=True, eq=False)
class GroupedRows:
    """Rows in the order of their groups.

    Attributes:
        order: their positions in the data; None if these have that order.
        codes: group of each, ascending, (n,).
        wz: weight times z of each, (n,).
        X: columns of X that were kept, (n, p).
        weights: prior weights, (n,), or None.
    """

    order: np.ndarray | None
    codes: np.ndarray
    wz: np.ndarray
    X: np.ndarray
    weights: np.ndarray | None
    _made: dict[int, list[Tile]] = field(default_factory=dict)

    def tiles(self, size: int) -> list[Tile]:
        """Return all rows in tiles of about `size`, of whole groups where these are smaller."""
        size = 1 << (size.bit_length() - 1)  # few sizes are kept
        if size not in self._made:
            self._made[size] = list(self._tiles(size))
        return self._made[size]

    def _tiles(self, size: int) -> Iterator[Tile]:
        from scipy.sparse import csr_array

        n, plain, first = len(self.codes), bool(np.all(self.wz == 1.0)), 0
        starts = np.append(np.flatnonzero(np.diff(self.codes, prepend=-1)), n)
        while first < n:
            last = min(first + size, n)
            whole = starts[np.searchsorted(starts, last, side="right") - 1]
            last = int(whole) if whole > first else last
            at = slice(first, last)
            inner = starts[slice(*np.searchsorted(starts, [first, last + 1]))]
            sizes = np.diff(inner)
            whole = len(inner) > 1 and inner[0] == first and inner[-1] == last
            low, high = int(self.codes[first]), int(self.codes[last - 1]) + 1
            equal = plain and whole and len(set(sizes.tolist())) == 1 and len(sizes) == high - low
            local = self.codes[at] - low
            yield Tile(
                at,
                at if self.order is None else self.order[at],
                slice(low, high),
                int(sizes[0]) if equal else 0,
                None
                if equal
                else csr_array(
                    (self.wz[at], (local, np.arange(last - first))),
                    shape=(high - low, last - first),
                ),
            )
            first = last


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
    found = OwnFits(
        beta=beta,
        variance=at.d * design.unit,
        scale=scale,
        criterion=at.value + constant,
        information=0.5 * information,
        status=status,
        steps=at.steps,
        gradient=at.slope * (1.0 + at.d),
        unscaled=unscaled,
        unscaled_slope=slope,
    )
    for values in (found.beta, found.variance, found.scale, found.criterion):
        values[lost] = np.nan
    return found
