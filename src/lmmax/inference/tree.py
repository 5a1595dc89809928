"""Products of X and the residual through the inverse covariance, per cluster of nested factors.

The groups of each level are eliminated in turn, as in :mod:`lmmax.likelihood.nested`, which takes
no matrix larger than the effects of one group.  All of it is analytic in the covariances and in a
variance added to the residual's, so that complex ones give derivatives and resolvents::

    S_i(D, z) = [X_i r_i]' (V_i + z I)^-1 [X_i r_i]     V_i = N_i + sum over levels of Z_i D Z_i'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..compress.nested import Tree
from .clusters import Clusters, factor_roots

if TYPE_CHECKING:
    from ..results import Fit

LARGE = 100
"""Largest order of a cluster's matrices for which these are no slower than passes by level."""


class Products(NamedTuple):
    """Products of each cluster, relative to the scale.

    Attributes:
        S: ``[X r]' (V + z I)^-1 [X r]``, X in working coordinates, (m, p + 1, p + 1).
        logdet: ``log|V + z I| - log|N + z I|``, (m,).
    """

    S: np.ndarray
    logdet: np.ndarray


class Levels:
    """Nested factors, or a single one, ready to be eliminated.

    Args:
        fit: the fitted model.
        clusters: the partition.
        by_row: keep the rows as they are.  If False they are divided by the roots of their
            variances, and the statistics of the fit serve.
    """

    def __init__(self, fit: Fit, clusters: Clusters, *, by_row: bool) -> None:
        layout, detail = fit.layout, fit.compression.detail
        self._fit, self._clusters = fit, clusters
        self._tree = detail if isinstance(detail, Tree) else _single(len(fit.layout.sizes[0]))
        self._p = len(fit.estimates.beta)
        self._rows: _Rows | None = None
        if by_row:
            finest = self._tree.levels[0]
            rank = np.empty(len(finest), dtype=np.int64)
            rank[finest] = np.arange(len(finest))
            order = np.argsort(rank[layout.factors[layout.chain[0]].codes], kind="stable")
            sizes = layout.sizes[layout.chain[0]][finest]
            X = layout.X[order][:, layout.fixed.kept] @ layout.fixed.inverse
            columns = [
                *(layout.random_columns(at, order) for at in layout.chain),
                X.T,
                fit.resid_marginal.to_numpy()[order][None],
            ]
            weights = fit.design.weights
            noise = np.ones(fit.nobs) if weights is None else 1.0 / weights[order]
            self._rows = _Rows(np.concatenate(columns), noise, np.cumsum(sizes) - sizes)

    @staticmethod
    def serve(fit: Fit, clusters: Clusters, *, by_row: bool) -> bool:
        """Return whether factors are nested, and dense matrices of some cluster large."""
        nested = isinstance(fit.compression.detail, Tree)
        if not nested and not (by_row and len(fit.layout.factors) == 1):
            return False
        order = clusters.sizes
        if not by_row:
            effects = sum(
                np.bincount(parent, minlength=len(clusters)) * factor.n_effects
                for factor, parent in zip(fit.layout.factors, clusters.parents, strict=True)
            )
            order = np.minimum(order, effects)
        return bool(np.max(order) > LARGE)

    def products(self, Ds: Sequence[np.ndarray] | None = None, shift: complex = 0.0) -> Products:
        """Return the products of each cluster.

        Args:
            Ds: per factor the relative covariance of its effects in working coordinates, (q, q);
                the estimates if None.
            shift: z, added to the variances of the residual relative to the scale.
        """
        layout, p = self._fit.layout, self._p
        if Ds is None:
            roots = factor_roots(self._fit)
            Ds = [root @ root.T for root in roots]
        working = [Ds[at] for at in layout.chain]
        if self._rows is None:
            working = [D / (1.0 + shift) for D in working]
            rest, logdet = self._first(working[0])
        else:
            rest, logdet = _eliminated(self._rows.grams(shift), working[0])
        for level, D in enumerate(working[1:]):
            starts = np.searchsorted(
                self._tree.parents[level], np.arange(len(self._tree.levels[level + 1]))
            )
            rest, logdet = np.add.reduceat(rest, starts), np.add.reduceat(logdet, starts)
            if level == 0 and self._rows is None:
                rest = rest + self._outside
            rest, more = _eliminated(rest, D)
            logdet = logdet + more
        if self._rows is None:
            to_residual = np.eye(p + 1)
            to_residual[:p, p] = -self._fit.estimates.solution.point.at.beta[:p]
            to_residual[:, p] *= float(self._fit.compression.problem.y_scale)
            rest = to_residual.T @ rest @ to_residual / (1.0 + shift)
        m = len(self._clusters)
        found = Products(np.zeros((m, p + 1, p + 1), rest.dtype), np.zeros(m, rest.dtype))
        parent = self._clusters.parents[layout.chain[-1]]
        np.add.at(found.S, parent, rest)
        np.add.at(found.logdet, parent, logdet)
        return found

    @property
    def _columns(self) -> list[int]:
        """Columns of the problem's statistics without padding."""
        layout = self._fit.layout
        effects = sum(layout.factors[at].n_effects for at in layout.chain[1:])
        return [*range(effects + self._p), -1]

    @property
    def _outside(self) -> np.ndarray:
        """Cross-products, per group of the second level, of what the finest groups leave."""
        C = np.asarray(self._fit.compression.problem.C)[np.ix_(self._columns, self._columns)]
        return np.moveaxis(C, -1, 0)[: len(self._tree.levels[1])]

    def _first(self, D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Eliminate the finest groups by the statistics of the fit."""
        problem, m = self._fit.compression.problem, len(self._tree.levels[0])
        U = np.moveaxis(np.asarray(problem.U), -1, 0)[:m]
        Y = np.moveaxis(np.asarray(problem.Y)[:, self._columns], -1, 0)[:m]
        H = np.eye(len(D)) + U @ D @ np.swapaxes(U, 1, 2)
        return np.swapaxes(Y, 1, 2) @ np.linalg.solve(H, Y), _log_det(H)

    def variance_bounds(self) -> tuple[float, float]:
        """Return bounds of the eigenvalues of the ``V_i``, relative to the scale."""
        fit = self._fit
        noise = np.ones(1) if self._rows is None else self._rows.noise
        high = float(np.max(noise))
        for at, (factor, root) in enumerate(
            zip(fit.layout.factors, factor_roots(fit), strict=True)
        ):
            Z = fit.layout.random_columns(at, slice(None)).T
            sizes = np.sum((Z @ root) ** 2, axis=1)
            high += float(np.max(np.bincount(factor.codes, weights=sizes)))
        return float(np.min(noise)), high


class _Rows(NamedTuple):
    """Rows sorted by the finest groups.

    Attributes:
        data: columns of all levels, X and the residual, (c, n).
        noise: residual variances relative to the scale, (n,).
        starts: first row of each group.
    """

    data: np.ndarray
    noise: np.ndarray
    starts: np.ndarray

    def grams(self, shift: complex) -> np.ndarray:
        """Return the cross-products of each group, rows divided by their variances, (m, c, c)."""
        c, weighted = len(self.data), self.data / (self.noise + shift)
        found = np.empty((len(self.starts), c, c), dtype=weighted.dtype)
        for j in range(c):
            part = np.add.reduceat(weighted[j] * self.data[j:], self.starts, axis=1)
            found[:, j, j:] = part.T
            found[:, j:, j] = part.T
        return found


def _single(m: int) -> Tree:
    """Return the tree of one factor."""
    return Tree((np.arange(m),), ())


def _eliminated(products: np.ndarray, D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eliminate the effects in front; return what is left and ``log|I + D a|``."""
    q = len(D)
    a, b, c = products[:, :q, :q], products[:, :q, q:], products[:, q:, q:]
    inner = np.eye(q) + D @ a
    return c - np.swapaxes(b, 1, 2) @ np.linalg.solve(inner, D @ b), _log_det(inner)


def _log_det(matrices: np.ndarray) -> np.ndarray:
    """Return logarithms of determinants near the positive real axis."""
    sign, size = np.linalg.slogdet(matrices)
    return size + np.log(sign) if np.iscomplexobj(sign) else size


def inverse_root_nodes(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes tau (k,) and weights (k,) of ``x^(-1/2) = sum_j w_j / (x + tau_j^2)``.

    Relative error 1e-13 for x between low and high.

    Source: Hale, Higham and Trefethen (2008), SIAM J. Numer. Anal. 46, 2505-2523, method 3.
    """
    # The error falls by exp(-2 pi^2 / (log(high / low) + 6)) with each node; pairs of nodes.
    k = 2 * int(np.ceil(16.0 * (np.log(high / low) + 6.0) / (2.0 * np.pi**2)))
    ratio = np.sqrt(low / high)
    mean, geometric = 1.0, ratio
    steps: list[tuple[float, float, float]] = []
    while not steps or steps[-1][2] > 1e-16:
        arithmetic, difference = 0.5 * (mean + geometric), 0.5 * (mean - geometric)
        mean, geometric = arithmetic, np.sqrt(mean * geometric)
        steps.append((mean, geometric, difference))
    # Jacobi's amplitude at the complementary modulus, by the arithmetic-geometric mean.
    quarter = 0.5 * np.pi / mean
    angle = 2.0 ** len(steps) * 0.5 * np.pi * (np.arange(k // 2) + 0.5) / k
    for mean, geometric, difference in reversed(steps):
        sine, cosine = np.sin(angle), np.cos(angle)
        other = np.arctan2(difference * sine, np.hypot(mean * cosine, geometric * sine))
        angle = 0.5 * (angle + other)
    sn, cn = np.sin(angle), np.cos(angle)
    dn = np.sqrt(cn**2 + ratio**2 * sn**2)
    factor = 2.0 * quarter / (np.pi * k) * dn
    # The upper half mirrors the lower one.
    tau = np.concatenate([np.sqrt(low) * sn / cn, np.sqrt(high) * cn / sn])
    weights = np.concatenate([np.sqrt(low) / cn**2, np.sqrt(high) / sn**2]) * np.tile(factor, 2)
    return tau, weights
