"""Test statistics of many responses for errors that were rearranged or drawn.

Least squares under the hypothesis, ``L beta = values``, splits a response into ``X beta_0 + e``.
The statistic of a replicate ``X beta_0 + e*`` is that of ``L beta = 0`` for e* alone, so that the
fitted part is never added: only errors are handled here.

A rearrangement leaves the sums of squares as they are, and moves the sums of groups as a whole.
With one variance besides the residual's, a replicate is then two matrix products for its
cross-products with X, and a search on a line.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from ..constraints import Settings
from ..design import DataError
from ..fit import ConvergenceWarning, IdentifiabilityWarning, Prepared, prepare
from ..matrices import Design
from ..results import Fit
from ..solve import is_optimal
from . import line_fits, line_statistics, shared_by_responses, solve_responses
from .engines import (
    Engine,
    GeneralEngine,
    Hypothesis,
    LineEngine,
    engine_of,
    estimable,
    fitted_alone,
)
from .exchange import Rearrangement
from .factors import SharedFactors
from .statistics import SharedDesigns

BLOCK = 64
"""Responses that share a generator of random numbers."""
Replicates = Callable[[Sequence[Rearrangement]], np.ndarray]
"""From rearrangements to statistics, (replicates, lanes)."""


def wald(difference: np.ndarray, V: np.ndarray) -> np.ndarray:
    """Return t of single combinations, F of several, (n,).

    Args:
        difference: estimates of the combinations, (n, r).
        V: their covariance, (n, r, r).
    """
    if difference.shape[1] == 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(difference[:, 0] / np.sqrt(V[:, 0, 0]))
    r = difference.shape[1]
    values, vectors = np.linalg.eigh(np.where(np.isfinite(V), V, 0.0))
    along = np.einsum("nrj,nr->nj", vectors, difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sum(along**2 / values, axis=1) / r)


class Tester(Protocol):
    """Fits errors, a column each, and tests ``L beta = 0``: NaN where a fit did not converge."""

    def statistics(self, errors: np.ndarray) -> np.ndarray:
        """Return the statistics of errors (n, lanes), (lanes,)."""

    def replicates(self, errors: np.ndarray) -> Replicates:
        """Return what gives the statistics of errors (n, lanes) that are rearranged."""


@dataclass(frozen=True, eq=False)
class LineTester:
    """Models with one variance besides the residual's."""

    engine: LineEngine
    L: np.ndarray

    def statistics(self, errors: np.ndarray) -> np.ndarray:
        """See `Tester`."""
        return self._tested(line_statistics.statistics(self.engine.line, errors))

    def _tested(self, stats: line_statistics.Statistics) -> np.ndarray:
        line = self.engine.line
        found = line_fits.fits(line, stats, self.engine.settings.reml)
        unscaled = line.unscaled_covariance(found.variance, self.L)[0]
        tested = wald(found.beta @ self.L.T, found.scale[:, None, None] * unscaled)
        return np.where(is_optimal(found.status), tested, np.nan)

    def replicates(self, errors: np.ndarray) -> Replicates:
        """See `Tester`."""
        from scipy.sparse import csr_array

        line = self.engine.line
        layout = line.layout
        codes, (n, c) = layout.factors[0].codes, errors.shape
        X = layout.X[:, layout.fixed.kept] @ layout.fixed.inverse
        weights = np.ones(n) if layout.weights is None else layout.weights
        X, p = X * weights[:, None], X.shape[1]
        by_group = csr_array((weights, (codes, np.arange(n))), shape=(len(line.groups_X), n))
        sums, squares = line.to_sums @ errors, by_group @ errors**2
        size = squares.sum(axis=0)

        def replicates(moves: Sequence[Rearrangement]) -> np.ndarray:
            b = len(moves)
            back = np.concatenate([move.back(X) for move in moves], axis=1)
            origin = (back.T @ errors).reshape(b, p, c).transpose(1, 0, 2).reshape(p, b * c)
            moved, total = np.empty((len(sums), b, c)), np.empty((b, c))
            for i, move in enumerate(moves):
                groups = _of_groups(move, codes, len(sums))
                moved[:, i] = groups.of(sums)
                total[i] = size if groups.factor is None else groups.factor**2 @ squares
            inside = moved.reshape(len(sums), b * c)
            inside -= line.groups_X @ origin
            left = total.ravel() - np.einsum("ij,ij->j", origin, origin)
            stats = line_statistics.from_sums(line, origin.T, left, inside.T)
            return self._tested(stats).reshape(b, c)

        return replicates


def _of_groups(move: Rearrangement, codes: np.ndarray, m: int) -> Rearrangement:
    """Return what a rearrangement of rows does to m groups."""
    take = factor = None
    if move.take is not None:
        take = np.arange(m)
        take[codes] = codes[move.take]
        if np.array_equal(take, np.arange(m)):
            take = None
    if move.factor is not None:
        factor = np.ones(m)
        factor[codes] = move.factor
    return Rearrangement(take, factor)


@dataclass(frozen=True, eq=False)
class FitTester:
    """Any other model, by rows: in lanes, or one fit after the other.

    Attributes:
        template: a fit of the model, which lends the others a start.
        L: the combinations of the coefficients that were kept, (r, p).
        shared: what lanes share; None if they are fitted one by one.
    """

    template: Fit
    L: np.ndarray
    shared: SharedDesigns | SharedFactors | None

    def statistics(self, errors: np.ndarray) -> np.ndarray:
        """See `Tester`."""
        if self.shared is None:
            return np.array([self._alone(column) for column in errors.T])
        solved = solve_responses(self.template, self.shared, errors.T)
        lanes, kept = np.arange(errors.shape[1]), self.template.layout.fixed.kept
        V, _ = solved.combined(lanes, self.L)
        tested = wald(solved.estimates.params[:, kept] @ self.L.T, V)
        return np.where(solved.estimates.converged, tested, np.nan)

    def _alone(self, errors: np.ndarray) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.simplefilter("ignore", IdentifiabilityWarning)
            try:
                found = self.template.refit(np.ascontiguousarray(errors)).estimates
            except DataError:
                return np.nan
        if not is_optimal(found.status):
            return np.nan
        V = found.scale * self.L @ found.beta_unscaled @ self.L.T
        return float(wald((self.L @ found.beta)[None], V[None])[0])

    def replicates(self, errors: np.ndarray) -> Replicates:
        """See `Tester`."""

        def replicates(moves: Sequence[Rearrangement]) -> np.ndarray:
            moved = np.concatenate([move.of(errors) for move in moves], axis=1)
            return self.statistics(moved).reshape(len(moves), errors.shape[1])

        return replicates


@dataclass(eq=False)
class Model:
    """A design on some of the rows, analysed for any number of hypotheses.

    Attributes:
        design: the design, without offset.
        settings: how to fit.
        prepared: the design, compressed.
    """

    design: Design
    settings: Settings
    prepared: Prepared = field(init=False)

    def __post_init__(self) -> None:
        self.design = replace(self.design, offset=None)
        self.prepared = prepare(self.design, self.settings.engine)

    @cached_property
    def engine(self) -> Engine:
        """What fits responses."""
        return engine_of(self.prepared, self.settings, ())

    @cached_property
    def X(self) -> np.ndarray:
        """Columns of X that were kept, orthonormal in the metric of the weights, (n, p)."""
        fixed = self.prepared.layout.fixed
        return np.asarray(self.design.X[:, fixed.kept] @ fixed.inverse)

    @cached_property
    def _weighted(self) -> np.ndarray:
        weights = self.design.weights
        return self.X if weights is None else self.X * weights[:, None]

    @cached_property
    def template(self) -> Fit:
        """A fit to the response of the design, or to noise if that has none to be fitted."""
        if isinstance(self.engine, GeneralEngine) and self.engine.template is not None:
            return self.engine.template
        noise = np.random.default_rng(0).normal(size=len(self.design.y))
        return fitted_alone(replace(self.design, y=noise), self.settings)

    @cached_property
    def _shared(self) -> SharedDesigns | SharedFactors | None:
        return shared_by_responses(self.template)

    def combinations(self, test: Hypothesis) -> np.ndarray | None:
        """Return L on the columns that were kept, (r, p); None if it involves others."""
        kept = self.prepared.layout.fixed.kept
        return test.L[:, kept] if estimable(test, kept) else None

    def tester(self, L: np.ndarray) -> Tester:
        """Return what tests ``L beta = 0``."""
        if isinstance(self.engine, LineEngine):
            return LineTester(self.engine, L)
        return FitTester(self.template, L, self._shared)

    def directions(self, L: np.ndarray) -> np.ndarray:
        """Return an orthonormal basis of what is tested, in coordinates of `X`, (p, r).

        The other directions are those of the reduced model.
        """
        return np.linalg.qr((L @ self.prepared.layout.fixed.inverse).T)[0]

    def residuals(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return residuals of least squares, (n, lanes), and coefficients of `X`, (p, lanes)."""
        origin = self._weighted.T @ y
        left = y - self.X @ origin
        again = self._weighted.T @ left  # a large mean costs no digits
        return left - self.X @ again, origin + again

    def errors(
        self, residuals: tuple[np.ndarray, np.ndarray], L: np.ndarray, values: np.ndarray
    ) -> np.ndarray:
        """Return the residuals of the reduced model, ``L beta = values``, (n, lanes).

        Args:
            residuals: what `residuals` returned.
            L: the combinations, (r, p).
            values: what they are under the hypothesis, (r,).
        """
        left, origin = residuals
        working = L @ self.prepared.layout.fixed.inverse
        basis = self.directions(L)
        apart = np.linalg.solve(working @ basis, working @ origin - values[:, None])
        return np.asarray(left + self.X @ (basis @ apart))

    def reduced(self, L: np.ndarray) -> Model:
        """Return the model under the hypothesis, which explains the errors' mean."""
        basis = self.directions(L)
        others = np.linalg.qr(basis, mode="complete")[0][:, basis.shape[1] :]
        names = tuple(f"reduced {j + 1}" for j in range(others.shape[1]))
        design = replace(self.design, X=np.asfortranarray(self.X @ others), x_names=names)
        return Model(design, self.settings)


@dataclass(frozen=True, eq=False)
class Drawer:
    """Draws errors from fitted models, independent for every response.

    Attributes:
        design: the design on all rows.
        rows: rows that are wanted, (n,).
        roots: per grouping factor roots of the covariances of the random effects, (lanes, q, q).
        sd: standard deviation of the residual of weight one, (lanes,).
        lanes: numbers of the responses among all, ascending, (lanes,).
    """

    design: Design
    rows: np.ndarray
    roots: tuple[np.ndarray, ...]
    sd: np.ndarray
    lanes: np.ndarray

    def draw(self, seed: int, replicate: int) -> np.ndarray:
        """Return errors, (n, lanes), that depend on nothing but these and the response's number."""
        design, n = self.design, len(self.design.y)
        widths = [n]
        for grouping, root in zip(design.groupings, self.roots, strict=True):
            widths.append(len(grouping.levels) * root.shape[1])
        ends = np.cumsum(widths)
        z = np.empty((len(self.lanes), ends[-1]))
        for block in np.unique(self.lanes // BLOCK):
            own = self.lanes // BLOCK == block
            key = np.random.SeedSequence(seed, spawn_key=(replicate, int(block)))
            inside = self.lanes[own] - block * BLOCK
            whole = np.random.default_rng(key).standard_normal((inside[-1] + 1, ends[-1]))
            z[own] = whole[inside]
        found = np.ascontiguousarray(z[:, self.rows].T) * self.sd
        if design.weights is not None:
            found /= np.sqrt(design.weights[self.rows])[:, None]
        for number, (grouping, root) in enumerate(zip(design.groupings, self.roots, strict=True)):
            mine = z[:, ends[number] : ends[number + 1]]
            effects = mine.reshape(len(z), len(grouping.levels), -1)
            if grouping.root is not None:
                effects = np.einsum("ij,ljq->liq", grouping.root, effects, optimize=True)
            effects = effects @ root.transpose(0, 2, 1)
            found += self._Z[number] @ np.ascontiguousarray(effects.reshape(len(z), -1).T)
        return found

    @cached_property
    def _Z(self) -> list[Any]:
        """Per grouping factor its random-effects design, sparse, (n, levels q)."""
        from scipy.sparse import csr_array

        found = []
        for number, grouping in enumerate(self.design.groupings):
            blocks = [block.Z for block in self.design.blocks if block.grouping == number]
            Z, codes = np.concatenate(blocks, axis=1)[self.rows], grouping.codes[self.rows]
            n, q = Z.shape
            at = codes[:, None] * q + np.arange(q)
            ends = np.arange(n + 1) * q
            found.append(csr_array((Z.ravel(), at.ravel(), ends), (n, len(grouping.levels) * q)))
        return found


def drawer(
    design: Design, rows: np.ndarray, null: Model, errors: np.ndarray, lanes: np.ndarray
) -> Drawer:
    """Fit the reduced model to the errors of each response, to draw from it.

    Where that does not converge, errors are NaN.

    Args:
        design: the design on all rows.
        rows: those that the responses have, (n,).
        null: the reduced model on these rows.
        errors: the residuals, (n, lanes).
        lanes: numbers of the responses, (lanes,).
    """
    record = null.engine.fit(errors)
    usable = is_optimal(record.status)
    cov = np.where(usable[:, None, None], record.cov_re, 0.0)
    roots = []
    for here in null.prepared.layout.slices:
        values, vectors = np.linalg.eigh(cov[:, here, here])
        roots.append(vectors * np.sqrt(values.clip(min=0.0))[:, None, :])
    return Drawer(
        design, rows, tuple(roots), np.sqrt(np.where(usable, record.scale, np.nan)), lanes
    )
