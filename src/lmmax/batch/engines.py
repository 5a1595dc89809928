"""How responses that share one design are fitted: by the fastest form that the model has.

An engine takes responses as columns and returns a :class:`Record` of arrays, one entry for each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..constraints import Settings
from ..design import DataError
from ..fit import (
    ConvergenceWarning,
    IdentifiabilityWarning,
    Prepared,
    RankWarning,
    fit_prepared,
    prepare,
    unidentified_by_design,
)
from ..identifiability import Unidentified
from ..inference.denominator import combined, matched_degrees
from ..matrices import Design
from ..results import Fit
from ..solve import Status
from . import Solved, line_fits, line_statistics, shared_by_responses, solve_responses
from .factors import SharedFactors
from .one_variance import OneVariance, one_variance, suits
from .statistics import SharedDesigns

FLAT = 1e-10
"""Curvature of the criterion in the logarithm of a variance that is rounding."""


class Hypothesis(NamedTuple):
    """Linear combinations of the coefficients, tested against values.

    Attributes:
        name: its name.
        L: the combinations, on all columns of X, (r, p).
        values: what they are under the hypothesis, (r,).
    """

    name: str
    L: np.ndarray
    values: np.ndarray


class Record(NamedTuple):
    """Fits of n responses.

    Attributes:
        params: coefficients, NaN for aliased columns, (n, p).
        bse: their standard errors, (n, p).
        df: their Satterthwaite degrees of freedom, (n, p).
        cov_re: covariance of the random effects, natural units, (n, q, q).
        scale: residual variance, (n,).
        llf: log-likelihood, restricted under REML, (n,).
        status: a :class:`lmmax.solve.Status` each, (n,).
        singular: whether a covariance lies on the boundary, (n,).
        steps: steps of the search, (n,).
        gradient: norm of the gradient of the criterion where the search ended, (n,).
        statistic: of each hypothesis, t for one combination and F for several, (n, h).
        df_den: its denominator degrees of freedom, (n, h).
        estimate: first combination of each hypothesis, (n, h).
        error: its standard error, (n, h).
    """

    params: np.ndarray
    bse: np.ndarray
    df: np.ndarray
    cov_re: np.ndarray
    scale: np.ndarray
    llf: np.ndarray
    status: np.ndarray
    singular: np.ndarray
    steps: np.ndarray
    gradient: np.ndarray
    statistic: np.ndarray
    df_den: np.ndarray
    estimate: np.ndarray
    error: np.ndarray


class Engine(Protocol):
    """Fits responses of one design."""

    @property
    def name(self) -> str:
        """What it is, for a reader."""

    def fit(self, y: np.ndarray, origin: np.ndarray | None = None) -> Record:
        """Fit responses, a column each, offset included, (n, lanes).

        Args:
            y: the responses.
            origin: coefficients that were taken out of them before, (lanes, p); None for none.
        """


class Uncertainty(NamedTuple):
    """How the covariance of combinations of the coefficients depends on the variance parameters.

    Attributes:
        V: covariance of the combinations, (n, r, r).
        slopes: its derivatives in k variance parameters, (n, k, r, r).
        C: covariance of these parameters, (n, k, k).
    """

    V: np.ndarray
    slopes: np.ndarray
    C: np.ndarray


def degrees(of: Uncertainty) -> np.ndarray:
    """Return Satterthwaite's degrees of freedom of each combination on its own, (n, r)."""
    return satterthwaite(np.einsum("nrr->nr", of.V), np.einsum("nkrr->nkr", of.slopes), of.C)


def satterthwaite(V: np.ndarray, slopes: np.ndarray, C: np.ndarray) -> np.ndarray:
    """Return the degrees of freedom of combinations, (n, r), each on its own.

    Args:
        V: their variances, (n, r).
        slopes: derivatives of these in the variance parameters, (n, k, r).
        C: covariance of the parameters, (n, k, k).
    """
    return matched_degrees(V, np.einsum("nkr,nkl,nlr->nr", slopes, C, slopes, optimize=True))


def joint(of: Uncertainty, difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return F and its denominator degrees of freedom for joint tests, (n,) each.

    As for a single fit: in coordinates in which the combinations are uncorrelated, with the
    degrees of freedom that give F the expectation of the mean of r squared t statistics.

    Args:
        of: the combinations.
        difference: their estimates less the hypothetical values, (n, r).
    """
    r = difference.shape[1]
    sound = np.isfinite(of.V).all(axis=(1, 2))
    values, vectors = np.linalg.eigh(np.where(sound[:, None, None], of.V, np.eye(r)))
    turned = np.einsum("nrj,nkrs,nsl->nkjl", vectors, of.slopes, vectors, optimize=True)
    own = degrees(Uncertainty(values[:, :, None] * np.eye(r), turned, of.C))
    with np.errstate(divide="ignore", invalid="ignore"):
        # In the combinations' own units, which may be far apart.
        unit = np.sqrt(np.einsum("nrr->nr", of.V))
        scaled = of.V / (unit[:, :, None] * unit[:, None, :])
        scaled = np.where(np.isfinite(scaled), scaled, np.eye(r))
        values, vectors = np.linalg.eigh(scaled)
        along = np.einsum("nrj,nr->nj", vectors, difference / unit)
        F = np.sum(along**2 / values, axis=1) / r
    return np.where(sound, F, np.nan), np.where(sound, combined(own), np.nan)


def tested(of: Uncertainty, difference: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """Return statistic, degrees of freedom, first estimate and its error of a test, (n,) each."""
    error = np.sqrt(of.V[:, 0, 0])
    if difference.shape[1] == 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            statistic, df = difference[:, 0] / error, degrees(of)[:, 0]
    else:
        statistic, df = joint(of, difference)
    return [statistic, df, difference[:, 0] + values[0], error]


def engine_of(prepared: Prepared, settings: Settings, tests: Sequence[Hypothesis]) -> Engine:
    """Return the fastest engine for a design."""
    if suits(prepared.layout, prepared.terms, settings):
        found = one_variance(prepared.layout)
        if found is not None:
            return LineEngine(prepared, found, settings, tuple(tests))
    return GeneralEngine(prepared, settings, tuple(tests))


@dataclass(frozen=True, eq=False)
class PartialEngine:
    """An engine for designs that do not tell some variance parameters apart.

    Errors and tests that depend on them are NaN, as those of a single fit are.

    Attributes:
        inner: what fits the responses.
        unidentified: what is not told apart.
        kept: positions of the columns of X that were kept.
        tests: hypotheses on the coefficients.
    """

    inner: Engine
    unidentified: Unidentified
    kept: np.ndarray
    tests: tuple[Hypothesis, ...]

    @property
    def name(self) -> str:
        """See `Engine`."""
        return self.inner.name

    def fit(self, y: np.ndarray, origin: np.ndarray | None = None) -> Record:
        """See `Engine`."""
        found = self.inner.fit(y, origin)
        hidden = self.kept[self.unidentified.concerns(np.eye(len(self.kept)))]
        found.bse[:, hidden] = found.df[:, hidden] = np.nan
        for h, asked in enumerate(self.tests):
            if not estimable(asked, self.kept):
                continue
            L = asked.L[:, self.kept]
            if self.unidentified.concerns_jointly(L):
                found.statistic[:, h] = found.df_den[:, h] = np.nan
            if self.unidentified.concerns(L[:1])[0]:
                found.error[:, h] = np.nan
        return found


def as_identified(
    engine: Engine, prepared: Prepared, settings: Settings, tests: Sequence[Hypothesis]
) -> Engine:
    """Return an engine that leaves out what the design does not identify."""
    found = unidentified_by_design(prepared.design, prepared.layout, prepared.terms, settings)
    kept = prepared.layout.fixed.kept
    return engine if found is None else PartialEngine(engine, found, kept, tuple(tests))


def _without_offset(design: Design, y: np.ndarray) -> np.ndarray:
    return y if design.offset is None else y - design.offset[:, None]


def _in_working_units(prepared: Prepared, origin: np.ndarray) -> np.ndarray:
    fixed = prepared.layout.fixed
    return np.asarray(origin[:, fixed.kept] @ fixed.R.T)


@dataclass(frozen=True, eq=False)
class LineEngine:
    """Models with one variance besides the residual's."""

    prepared: Prepared
    line: OneVariance
    settings: Settings
    tests: tuple[Hypothesis, ...]

    @property
    def name(self) -> str:
        """See `Engine`."""
        count = len(self.line.eigenvalues) + len(self.line.set_kappa)
        return f"one variance: a search on a line, {count} numbers per response"

    def fit(self, y: np.ndarray, origin: np.ndarray | None = None) -> Record:
        """See `Engine`."""
        stats = line_statistics.statistics(self.line, _without_offset(self.prepared.design, y))
        if origin is not None:
            moved = stats.origin + _in_working_units(self.prepared, origin)
            stats = stats._replace(origin=moved)
        record = self.of_statistics(stats)
        variance = record.cov_re[:, 0, 0]
        far = np.flatnonzero(variance > line_fits.FAR_APART * self.line.unit * record.scale)
        # Without a maximum there is nothing that more digits would show.
        if far.size and (self.settings.reml or self.line.has_maximum):
            put(record, far, self._general.fit(y[:, far], None if origin is None else origin[far]))
        return record

    @cached_property
    def _general(self) -> GeneralEngine:
        """What fits responses whose groups are too far apart for a search on a line."""
        return GeneralEngine(self.prepared, self.settings, self.tests)

    def of_statistics(self, stats: line_statistics.Statistics) -> Record:
        """Fit from statistics."""
        found = line_fits.fits(self.line, stats, self.settings.reml)
        return record_on_line(
            found,
            len(self.prepared.design.x_names),
            self.prepared.layout.fixed.kept,
            self.tests,
            (found.unscaled, found.unscaled_slope),
            partial(self.line.unscaled_covariance, found.variance),
        )


@dataclass(eq=False)
class GeneralEngine:
    """Any other model: in lanes where they need no random probes and few parameters.

    Attributes:
        prepared: the design.
        settings: how to estimate.
        tests: hypotheses on the coefficients.
        template: a fit to the response of the design, which lends the others a start; if that
            cannot be fitted, to the first that can.
    """

    prepared: Prepared
    settings: Settings
    tests: tuple[Hypothesis, ...]
    template: Fit | None = None

    def __post_init__(self) -> None:
        self.template = self._single(self.prepared.design.y)

    @property
    def name(self) -> str:
        """See `Engine`."""
        how = "one after the other" if self.shared is None else "in lanes"
        return f"{self.prepared.layout.engine.name}: Newton's method {how}"

    def fit(self, y: np.ndarray, origin: np.ndarray | None = None) -> Record:
        """See `Engine`."""
        y = np.asarray(y, dtype=float)
        around = _without_offset(self.prepared.design, y)
        with np.errstate(over="ignore", invalid="ignore"):
            spread = np.ptp(around, axis=0)
        sound = np.flatnonzero(np.isfinite(spread) & (spread > 0.0))
        found = self._empty(y.shape[1])
        for lane in sound:
            if self.template is not None:
                break
            self.template = self._single(self._whole(y, origin, lane))
        if self.template is None or not sound.size:
            return found
        if self.shared is not None:
            parts = self._lanes(y[:, sound], None if origin is None else origin[sound])
        else:
            fits = [self._single(self._whole(y, origin, lane)) for lane in sound]
            parts = stacked([self._row(fit) for fit in fits])
        put(found, sound, parts)
        return found

    def _whole(
        self, y: np.ndarray, origin: np.ndarray | None, lane: int | np.integer
    ) -> np.ndarray:
        """Return one response with what was taken out of it."""
        X = self.prepared.design.X
        return np.asarray(y[:, lane] if origin is None else y[:, lane] + X @ origin[lane])

    def _empty(self, n: int) -> Record:
        design, layout = self.prepared.design, self.prepared.layout
        return empty(n, len(design.x_names), len(layout.A), len(self.tests))

    def _single(self, y: np.ndarray, start: Any = None) -> Fit | None:
        """Fit one response, from ``start`` if given; None if it cannot identify its variances."""
        design = replace(self.prepared.design, y=np.ascontiguousarray(y, dtype=float))
        try:
            if self.template is None:
                return fitted_alone(design, self.settings)
            template = self.template
            if start is not None:
                template = replace(template, settings=replace(template.settings, start=start))
            with quiet():
                return template.refit(design.y)
        except DataError:
            return None

    def _row(self, fit: Fit | None) -> Record:
        """Return the record of one fit."""
        return self._empty(1) if fit is None else record_of(fit, self.tests)

    def _lanes(self, y: np.ndarray, origin: np.ndarray | None) -> Record:
        """Fit responses side by side."""
        template = self.template
        assert template is not None and self.shared is not None
        moved = 0.0 if origin is None else _in_working_units(self.prepared, origin)
        around = _without_offset(template.design, y).T
        solved = solve_responses(template, self.shared, around, moved)
        own = solved.estimates

        def alone(lane: int) -> Record:
            # All optima have been looked for: the fit is the lane's own end.
            ended = own.status[lane] == Status.CONVERGED
            start = {"cov_re": own.cov_re[lane], "scale": own.scale[lane]} if ended else None
            return self._row(self._single(self._whole(y, origin, lane), start))

        return record_of_lanes(solved, template.layout.fixed.kept, self.tests, alone)

    @cached_property
    def _shared(self) -> SharedDesigns | SharedFactors | None:
        assert self.template is not None
        return shared_by_responses(self.template)

    @property
    def shared(self) -> SharedDesigns | SharedFactors | None:
        """What responses share that run in lanes; None if they are fitted one by one."""
        return None if self.template is None else self._shared


def record_on_line(
    found: line_fits.Fits,
    p: int,
    kept: np.ndarray,
    tests: Sequence[Hypothesis],
    unscaled: tuple[np.ndarray, np.ndarray],
    covariance: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Record:
    """Return the record of fits with one variance besides the residual's.

    Args:
        found: the fits.
        p: number of columns of X.
        kept: positions of the columns of X that the coefficients of the fits belong to.
        tests: hypotheses on the coefficients.
        unscaled: diagonal of ``(X'V^-1 X)^-1`` and its derivative in the relative variance,
            (n, kept) each.
        covariance: returns ``L (X'V^-1 X)^-1 L'`` of combinations L (r, kept) of these, and its
            derivative in the relative variance, (n, r, r) each.
    """
    n = len(found.scale)
    record = empty(n, p, 1, len(tests))
    singular = found.variance == 0.0
    usable = found.status == Status.CONVERGED
    # Where the criterion is flat in the variance, the scale alone is estimated.
    with np.errstate(invalid="ignore"):
        flat = found.information[:, 0, 0] * found.variance**2 <= FLAT
    # The parameters are the relative variance and the log of the scale.
    C = np.full((n, 2, 2), np.nan)
    C[usable] = 0.0
    inside, at_zero = usable & ~(singular | flat), usable & (singular | flat)
    C[inside] = np.linalg.inv(found.information[inside])
    C[at_zero, 1, 1] = 1.0 / found.information[at_zero, 1, 1]
    record.params[:, kept] = found.beta
    V, slope = (found.scale[:, None] * part for part in unscaled)
    record.bse[:, kept] = np.sqrt(V)
    slopes = np.stack([slope, V], axis=1)
    record.df[:, kept] = np.where(usable[:, None], satterthwaite(V, slopes, C), np.nan)
    for h, asked in enumerate(tests):
        if not estimable(asked, kept):
            continue
        L = asked.L[:, kept]
        inner, slope = covariance(L)
        V = found.scale[:, None, None] * inner
        of = Uncertainty(V, np.stack([found.scale[:, None, None] * slope, V], axis=1), C)
        values = tested(of, found.beta @ L.T - asked.values, asked.values)
        for name, value in zip(("statistic", "df_den", "estimate", "error"), values, strict=True):
            getattr(record, name)[:, h] = value
    return record._replace(
        cov_re=(found.variance * found.scale)[:, None, None],
        scale=found.scale,
        llf=-0.5 * found.criterion,
        status=found.status,
        singular=singular,
        steps=found.steps,
        gradient=np.abs(np.where(singular, 0.0, found.gradient)),
    )


def record_of(fit: Fit, tests: Sequence[Hypothesis]) -> Record:
    """Return the record of one fit."""
    found = empty(1, len(fit.design.x_names), len(fit.layout.A), len(tests))
    kept, test = fit.layout.fixed.kept, fit.denominator()
    found.params[0], found.bse[0] = fit.params, fit.bse
    found.df[0, kept] = test.degrees(np.eye(len(kept)))
    found.cov_re[0], found.scale[0], found.llf[0] = fit.cov_re, fit.scale, fit.llf
    found.status[0], found.singular[0] = int(fit.estimates.status), fit.singular
    found.steps[0] = int(fit.estimates.solution.steps)
    found.gradient[0] = fit.convergence.gradient_norm
    for h, asked in enumerate(tests):
        if not estimable(asked, kept):
            continue
        L = asked.L[:, kept]
        difference = L @ fit.estimates.beta - asked.values
        found.estimate[0, h] = difference[0] + asked.values[0]
        found.error[0, h] = test.errors(L)[0]
        if len(L) == 1:
            found.statistic[0, h] = difference[0] / found.error[0, h]
            found.df_den[0, h] = test.degrees(L)[0]
        else:
            joint_test = test.joint(L, difference)
            found.statistic[0, h] = joint_test.statistic
            found.df_den[0, h] = joint_test.df_den
    return found


def record_of_lanes(
    solved: Solved,
    kept: np.ndarray,
    tests: Sequence[Hypothesis],
    alone: Callable[[int], Record],
) -> Record:
    """Return the record of fits that were solved side by side.

    Args:
        solved: the fits.
        kept: positions of the columns of X that were kept.
        tests: hypotheses on the coefficients.
        alone: the record of a lane's own fit, which a lane takes its inference from that has a
            structure, or too few data to tell how certain its variances are.
    """
    own, ends = solved.estimates, solved.ends
    (n, p), q = own.params.shape, own.cov_re.shape[1]
    found = empty(n, p, q, len(tests))
    for name in ("params", "bse", "cov_re", "scale", "llf", "status", "singular"):
        getattr(found, name)[...] = getattr(own, name)
    found.steps[:] = ends.steps
    found.gradient[:] = solved.gradient
    plain = solved.uncertain & own.converged
    at = np.flatnonzero(plain)
    C = solved.parameter_covariance(at)
    for j, row in zip(kept, np.eye(len(kept)), strict=True):
        found.df[at, j] = degrees(Uncertainty(*solved.combined(at, row[None]), C))[:, 0]
    for h, asked in enumerate(tests):
        if not estimable(asked, kept):
            continue
        L = asked.L[:, kept]
        difference = own.params[at][:, kept] @ L.T - asked.values
        values = tested(Uncertainty(*solved.combined(at, L), C), difference, asked.values)
        for name, value in zip(("statistic", "df_den", "estimate", "error"), values, strict=True):
            getattr(found, name)[at, h] = value
    for lane in np.flatnonzero(~plain & own.converged):
        by_itself = alone(int(lane))
        for name in ("df", "statistic", "df_den", "estimate", "error"):
            getattr(found, name)[lane] = getattr(by_itself, name)[0]
        found.bse[lane, np.isnan(by_itself.bse[0])] = np.nan  # not identified
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Fit without a word: what there is to say stands in the record."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", RankWarning)
        warnings.simplefilter("ignore", IdentifiabilityWarning)
        yield


def fitted_alone(design: Design, settings: Settings) -> Fit:
    """Fit one model without a word."""
    with quiet():
        return fit_prepared(prepare(design, settings.engine), settings)


def estimable(asked: Hypothesis, kept: np.ndarray) -> bool:
    """Return whether a hypothesis is about coefficients that were kept only."""
    return not np.delete(asked.L, kept, axis=1).any()


def empty(n: int, p: int, q: int, n_tests: int) -> Record:
    """Return a record of n responses that were not fitted.

    Args:
        n: number of responses.
        p: number of columns of X.
        q: number of random effects.
        n_tests: number of hypotheses.
    """
    nan = np.full
    return Record(
        params=nan((n, p), np.nan),
        bse=nan((n, p), np.nan),
        df=nan((n, p), np.nan),
        cov_re=nan((n, q, q), np.nan),
        scale=nan(n, np.nan),
        llf=nan(n, np.nan),
        status=nan(n, int(Status.NOT_FINITE)),
        singular=nan(n, False),
        steps=nan(n, 0),
        gradient=nan(n, np.nan),
        statistic=nan((n, n_tests), np.nan),
        df_den=nan((n, n_tests), np.nan),
        estimate=nan((n, n_tests), np.nan),
        error=nan((n, n_tests), np.nan),
    )


def put(found: Record, lanes: Any, record: Record) -> None:
    """Put the results of some lanes in their places."""
    for mine, part in zip(found, record, strict=True):
        mine[lanes] = part


def stacked(rows: Sequence[Record]) -> Record:
    """Return records one after the other as one."""
    return Record(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))
