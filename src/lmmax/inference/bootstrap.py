"""Bootstrap of a fitted model: bias, standard errors and confidence limits by refitting."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from ..batch import BatchEstimates, check_engine, estimates_of, join
from ..characters import Visible
from ..options import alpha_of, choose
from ..parameters import unpack_symmetric
from ..rendering import WIDTH, Cells, Frame, format_block, fragment, headings, page, table_lines
from ..simulate import check_count, check_seed
from ..solve import Status
from .arguments import as_fit
from .jackknife import JackknifeError, leave_out_groups
from .parameters import apart
from .resampling import parametric, residual

if TYPE_CHECKING:
    from ..results import Fit

Kind = Literal["percentile", "basic", "bca", "normal"]
KINDS: tuple[Kind, ...] = ("percentile", "basic", "bca", "normal")
METHODS = {"parametric": parametric, "residual": residual}
Statistic = Callable[[BatchEstimates], Any]
MOVED = 1e-3
"""Part of the residual variance by which covariances are moved along what is not identified."""


class BootstrapError(Visible, ValueError):
    """A bootstrap result that cannot give what was asked for."""


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Replicates of a statistic; made by :func:`bootstrap`.

    Attributes:
        observed: the statistic at the fit, (k,).
        replicates: the statistic at the replicates, (n, k); rows of NaN where a fit failed.
        estimates: all estimates of the replicates.
        method: "parametric" or "residual".
        fit: the fit.
        statistic: the function of the estimates.
        hidden: values that depend on what the data do not identify: NaN in all replicates.
    """

    observed: pd.Series
    replicates: pd.DataFrame
    estimates: BatchEstimates = field(repr=False)
    method: str
    fit: Fit = field(repr=False)
    statistic: Statistic = field(repr=False)
    hidden: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """Number of replicates, failed ones included."""
        return len(self.replicates)

    @property
    def status(self) -> dict[str, int]:
        """How many replicates ended in each way, and how many of them are singular.

        Those that did not converge are in no quantile, bias or standard error; singular ones are.
        """
        codes, counts = np.unique(self.estimates.status, return_counts=True)
        found = {
            Status(int(code)).name.lower(): int(count)
            for code, count in zip(codes, counts, strict=True)
        }
        found.setdefault("converged", 0)
        found["singular"] = int(np.sum(self.estimates.singular & self.estimates.converged))
        return found

    @property
    def bias(self) -> pd.Series:
        """Mean of the replicates minus the observed value."""
        return (self.replicates.mean() - self.observed).rename("bias")

    @property
    def se(self) -> pd.Series:
        """Standard deviation of the replicates."""
        return self.replicates.std().rename("std err")

    def conf_int(
        self,
        level: float | None = None,
        kind: Kind = "percentile",
        *,
        alpha: float | None = None,
    ) -> pd.DataFrame:
        """Return confidence limits.

        Args:
            level: the level, 0.95 if None; a number below one half is taken as ``alpha``.
            kind: "percentile", quantiles of the replicates; "basic", twice the observed value minus
                the opposite quantiles; "normal", the observed value minus the bias, and normal
                quantiles times the standard error; "bca", percentiles corrected for bias and
                acceleration, the latter from leaving out one group of the coarsest factor at a
                time (one of 200 parts, if there are more groups).
            alpha: one minus the level, instead of it.

        Returns:
            Columns ``lower`` and ``upper``, a row per statistic.  A quantile is the order statistic
            at ``(n + 1)`` times its level, interpolated.

        Raises:
            BootstrapError: if there are too few replicates, or the model cannot be fitted without
                one of its groups (BCa).

        Warns:
            UserWarning: if a BCa limit lies beyond the replicates; it is NaN.

        Source: Davison and Hinkley (1997), Bootstrap Methods and their Application, chapter 5;
        Efron (1987), JASA 82, 171-185, for BCa.
        """
        kind, tail = choose("kind", kind, KINDS), 0.5 * alpha_of(level, alpha)
        levels = np.array([tail, 1.0 - tail])
        observed, used = self.observed.to_numpy(), self.status["converged"]
        if kind == "normal":
            from scipy.special import ndtri

            half = ndtri(levels)[:, None] * self.se.to_numpy()
            lower, upper = observed - self.bias.to_numpy() + half
        elif not _reaches(np.arange(used), levels[0]):
            raise BootstrapError(
                f"{used} replicates do not reach as far as the quantiles {levels[0]:.4g} and "
                f"{levels[1]:.4g}; use more replicates (n=), a lower level, or kind='normal'"
            )
        elif kind == "bca":
            lower, upper = self._quantiles(self._corrected(levels))
            beyond = self.observed.index[np.isnan(lower + upper)].difference(
                list(self.hidden), sort=False
            )
            if len(beyond):
                warnings.warn(
                    f"the BCa limits of {', '.join(map(repr, beyond))} lie beyond the replicates, "
                    "and are NaN; use more replicates, or kind='percentile'",
                    stacklevel=2,
                )
        else:
            lower, upper = self._quantiles(np.tile(levels[:, None], len(observed)))
            if kind == "basic":
                lower, upper = 2.0 * observed - upper, 2.0 * observed - lower
        return pd.DataFrame({"lower": lower, "upper": upper}, index=self.observed.index)

    def _quantiles(self, levels: np.ndarray) -> np.ndarray:
        """Return quantiles at levels (2, k) of each statistic, (2, k); NaN beyond replicates."""
        found = np.full(levels.shape, np.nan)
        for j, name in enumerate(self.replicates):
            values = np.sort(_finite(self.replicates[name]))
            for side, level in enumerate(levels[:, j]):
                if _reaches(values, level):
                    found[side, j] = np.quantile(values, level, method="weibull")
        return found

    def _corrected(self, levels: np.ndarray) -> np.ndarray:
        """Return the levels (2, k) of the BCa limits."""
        from scipy.special import ndtr, ndtri

        try:
            without = leave_out_groups(self.fit)
        except JackknifeError as error:
            raise BootstrapError(
                f"no BCa limits: {error}; use kind='percentile' or kind='basic'"
            ) from error
        values = _table(self.statistic(without), len(without.scale)).to_numpy()
        found = np.full((2, values.shape[1]), np.nan)
        for j, name in enumerate(self.replicates):
            own = values[np.isfinite(values[:, j]), j]
            replicates, observed = _finite(self.replicates[name]), self.observed.iloc[j]
            if not len(own) or not len(replicates) or not np.isfinite(observed):
                continue
            influence = own.mean() - own
            spread = np.sum(influence**2)
            skew = np.sum(influence**3) / (6.0 * spread**1.5) if spread > 0.0 else 0.0
            # Replicates equal to the estimate, on a boundary, count half.
            below = np.mean(replicates < observed) + 0.5 * np.mean(replicates == observed)
            if 0.0 < below < 1.0:
                z = ndtri(below) + ndtri(levels)
                found[:, j] = ndtr(ndtri(below) + z / (1.0 - skew * z))
        return found

    def summary(self, level: float | None = None, *, alpha: float | None = None) -> pd.DataFrame:
        """Return observed values, bias, standard errors and percentile limits."""
        limits = self.conf_int(level, alpha=alpha)
        return Frame(
            {
                "observed": self.observed,
                "bias": self.bias,
                "std err": self.se,
                "lower": limits["lower"],
                "upper": limits["upper"],
            }
        )

    def _parts(self) -> tuple[str, Cells, list[str]]:
        """Return title, table and notes."""
        table = pd.DataFrame({"observed": self.observed, "bias": self.bias, "std err": self.se})
        try:
            table = self.summary()
            notes = ["Limits are percentiles of the replicates."]
        except BootstrapError:
            notes = ["There are too few replicates for limits of level 95%."]
        values = table.to_numpy(float)
        rows = [format_block(row[None, :], row[None, 2:3])[0] for row in values]
        status = self.status
        failed = self.n - status["converged"]
        if status["singular"]:
            notes.append(f"{_count(status['singular'])} singular.")
        if failed:
            ways = ", ".join(
                f"{count} {name}"
                for name, count in status.items()
                if name not in ("converged", "singular")
            )
            notes.append(f"{_count(failed)} did not converge and are left out ({ways}).")
        if self.hidden:
            notes.append(
                f"{_sentence(str(self.fit.unidentified))} So {', '.join(self.hidden)} "
                f"{'have' if len(self.hidden) > 1 else 'has'} no bootstrap distribution."
            )
        defined = self.observed.index[self.observed.notna()].difference(
            list(self.hidden), sort=False
        )  # not aliased
        undefined = self.replicates.loc[self.estimates.converged, defined].isna().sum()
        for name, count in undefined[undefined > 0].items():
            notes.append(f"{name} is undefined in {_count(int(count))}, left out there.")
        method = "REML" if self.fit.reml else "ML"
        title = f"{self.method.capitalize()} bootstrap, {_count(self.n)} ({method})"
        labels = [[str(name)] for name in table.index]
        return title, Cells([""], labels, headings(table, 0.95), rows), notes

    def __str__(self) -> str:
        title, cells, notes = self._parts()
        lines = table_lines(cells)
        rule = "-" * min(max(map(len, lines)), WIDTH)
        formula = f"Formula: {self.fit.formula}"
        return page(title, formula, rule, *lines, rule, *notes)

    def __repr__(self) -> str:
        status = self.status
        return (
            f"<lmmax.Bootstrap {self.fit.formula!r}, {self.method}, n={self.n}, "
            f"converged={status['converged']}, singular={status['singular']}>"
        )

    def _repr_html_(self) -> str:
        title, cells, notes = self._parts()
        return fragment(title, self.fit.formula, cells, notes)


def bootstrap(
    fit: Fit,
    n: int = 1000,
    statistic: Statistic | None = None,
    method: str = "parametric",
    seed: int = 0,
    progress: bool = False,
) -> Bootstrap:
    """Bootstrap a fitted model.

    Every replicate is fitted to its own optimum with the criterion of the fit (REML or ML).  With
    one grouping factor all of them are solved together, and the parametric bootstrap draws their
    sufficient statistics instead of their rows; with several factors they are fitted one by one.

    Args:
        fit: the fitted model.
        n: number of replicates.
        statistic: function of the estimates, a record of arrays with a leading axis of replicates:
            ``params (n, p)``, ``bse (n, p)``, ``cov_re (n, q, q)``, ``sd (n, q)``,
            ``corr (n, q, q)``, ``scale (n,)``, ``sigma (n,)``, ``llf (n,)``; the columns of the
            random effects in the order of ``fit.cov_re``.  It returns an array ``(n, ...)``, or a
            mapping of names to such arrays, and is also called for the fit itself, without the
            leading axis: index from the end, ``b.cov_re[..., 0, 0]``.  By default all parameters:
            coefficients, standard deviations, correlations, and sigma.
        method: "parametric" draws random effects and residuals from their normal distributions;
            "residual" resamples the conditional modes, by level, and the residuals, both centred
            and rescaled to the estimated variances.
        seed: of the random numbers.  The first replicates are the same for every ``n``.
        progress: show a progress bar (needs tqdm).

    Returns:
        The replicates, with bias, standard errors, and confidence limits.

    Raises:
        EngineError: if the fit is by the iterative engine.
        ValueError: for an unknown method, or a statistic of another shape.

    Example:
        >>> import lmmax
        >>> fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", lmmax.datasets.load("dyestuff"))
        >>> def icc(b):
        ...     return b.cov_re[..., 0, 0] / (b.cov_re[..., 0, 0] + b.scale)
        >>> result = lmmax.bootstrap(fit, n=200, statistic=icc, seed=1)
        >>> result.observed.round(3).to_dict()
        {'icc': 0.418}
        >>> result.conf_int(kind="basic").shape
        (1, 2)

    Source: Davison and Hinkley (1997), Bootstrap Methods and their Application; Carpenter,
    Goldstein and Rasbash (2003), J. R. Stat. Soc. C 52, 431-443, for the residual bootstrap.
    """
    as_fit(fit)
    check_count(n, "n")
    check_seed(seed)
    method = choose("method", method, METHODS)
    check_engine(fit)
    if statistic is not None and not callable(statistic):
        raise TypeError(f"statistic must be a function of estimates, not {statistic!r}")
    chosen = all_parameters(fit) if statistic is None else statistic
    observed = _table(chosen(estimates_of(fit)), None, chosen).iloc[0]
    parts = METHODS[method](fit, n, seed)
    estimates = join(list(_with_progress(parts, n) if progress else parts))
    replicates = _table(chosen(estimates), n, chosen)
    if list(replicates.columns) != list(observed.index):
        raise ValueError(
            f"statistic gives {len(observed)} values for the fit and {replicates.shape[1]} for "
            "each replicate; write it with ... for the leading axis of replicates: "
            "b.cov_re[..., 0, 0], not b.cov_re[0, 0]"
        )
    replicates.loc[~estimates.converged] = np.nan
    hidden = _not_identified(fit, chosen, observed)
    if hidden:
        replicates[list(hidden)] = np.nan
    return Bootstrap(
        observed.rename("observed"), replicates, estimates, method, fit, chosen, hidden
    )


def _not_identified(fit: Fit, statistic: Statistic, observed: pd.Series) -> tuple[str, ...]:
    """Return the values that are others at estimates that fit as well: those that then change."""
    if fit.unidentified is None:
        return ()
    estimates = estimates_of(fit)
    null, size = fit.estimates.flat_in_user_units, fit.estimates.sizes[:, None]
    null = null / np.max(size * np.abs(null), axis=0)
    mixed = null @ np.random.default_rng(0).uniform(0.5, 1.0, null.shape[1])
    k = len(fit.cov_re) * (len(fit.cov_re) + 1) // 2
    params = np.array(estimates.params)
    kept = fit.layout.fixed.kept
    params[..., kept[fit.unidentified.concerns(np.eye(len(kept)))]] = np.nan
    moved = replace(
        estimates,
        params=params,
        cov_re=estimates.cov_re + MOVED * fit.scale * unpack_symmetric(mixed[:k]),
    )
    there = _table(statistic(moved), None, statistic).iloc[0]
    with np.errstate(invalid="ignore"):
        same = np.abs(there - observed) <= 1e-3 * MOVED * np.abs(observed)
    return tuple(observed.index[~same & observed.notna()])


def all_parameters(fit: Fit) -> Statistic:
    """Return the default statistic: coefficients, standard deviations, correlations, sigma."""
    names, effects = list(fit.design.x_names), fit.effect_names
    places: list[tuple[int, int]] = []
    own: list[str] = []
    owners: list[str] = []
    for term in fit.terms:
        group = fit.group_names[term.factor]
        columns = range(term.columns.start, term.columns.stop)
        pairs = [(columns[i], columns[j]) for i, j in term.pairs]
        places += [*((i, i) for i in columns), *pairs]
        own += [f"{group}: sd({effects[i]})" for i in columns]
        own += [f"{group}: cor({effects[j]}, {effects[i]})" for i, j in pairs]
        owners += [term.label] * (len(columns) + len(pairs))
    own = apart([*own, "sigma"], names, owners)

    def parameters(b: BatchEstimates) -> dict[str, np.ndarray]:
        sd, corr = b.sd, b.corr
        found = [sd[..., i] if i == j else corr[..., i, j] for i, j in places]
        values = [b.params[..., j] for j in range(len(names))] + [*found, b.sigma]
        return dict(zip([*names, *own], values, strict=True))

    return parameters


def _table(values: Any, n: int | None, statistic: Any = None) -> pd.DataFrame:
    """Return the values of a statistic as columns, (n, k); one row for n None."""
    if not isinstance(values, Mapping):
        name = getattr(statistic, "__name__", "statistic")
        values = {"statistic" if name == "<lambda>" else name: values}
    columns = {}
    for name, value in values.items():
        array = np.asarray(value, dtype=float)
        array = array[None] if n is None else array
        if array.shape[:1] != (1 if n is None else n,):
            raise ValueError(
                f"statistic returned an array of shape {array.shape} for {n} replicates; its first "
                "axis must be that of the replicates: index from the end, b.cov_re[..., 0, 0]"
            )
        for index in np.ndindex(array.shape[1:]):
            label = f"{name}[{', '.join(map(str, index))}]" if index else str(name)
            columns[label] = array[:, *index]
    return pd.DataFrame(columns)


def _reaches(values: np.ndarray, level: float) -> bool:
    """Return whether sorted values tell their quantile: there is one beyond it, or a tie."""
    if not len(values) or not np.isfinite(level):
        return False
    at = min(level, 1.0 - level) * (len(values) + 1)
    end = values[:2] if level < 0.5 else values[-2:]
    return bool(at >= 1.0 - 1e-9 or (len(end) > 1 and end[0] == end[1]))


def _finite(values: pd.Series) -> np.ndarray:
    array = values.to_numpy(float)
    return array[np.isfinite(array)]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _count(n: int) -> str:
    return "1 replicate" if n == 1 else f"{n:,} replicates"


def _with_progress(parts: Iterator[BatchEstimates], n: int) -> Iterator[BatchEstimates]:
    """Show how many replicates are done."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "progress=True needs tqdm, which is not installed: pip install 'lmmax[progress]'"
        ) from error
    with tqdm(total=n, unit="replicate") as bar:
        for part in parts:
            yield part
            bar.update(len(part.scale))
