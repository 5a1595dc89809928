"""Test of two nested models by simulating the likelihood-ratio statistic."""

from __future__ import annotations

import textwrap
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ..batch import check_engine, join
from ..rendering import format_pvalue, page, paragraphs
from ..simulate import check_count, check_seed, draws
from .arguments import as_fit
from .comparison import ComparisonError, check_same_data
from .nesting import RandomNesting, fixed_nesting, random_nesting
from .resampling import by_rows
from .restarts import TIE, below, fitted_from, restart_note
from .submodels import Submodel

if TYPE_CHECKING:
    from ..results import Fit


@dataclass(frozen=True, eq=False, repr=False)
class BootstrapTest:
    """A parametric bootstrap test of a model against a larger one.

    Attributes:
        statistic: likelihood-ratio statistic of the data, by maximum likelihood.
        df: parameters that the larger model has more.
        pvalue: ``(1 + #{replicates at least as large}) / (n + 1)``.
        pvalue_bartlett: upper tail of chi-squared at the statistic times df over the replicates'
            mean; of no use where a variance is tested to be zero.
        pvalue_chi2: upper tail of chi-squared at the statistic itself.
        replicates: the statistic of the simulated responses, NaN where a fit failed, (n,).
        formulas: of the smaller and the larger model.
        notes: what a reader should know.
    """

    statistic: float
    df: int
    pvalue: float
    pvalue_bartlett: float
    pvalue_chi2: float
    replicates: np.ndarray = field(repr=False)
    formulas: tuple[str, str]
    notes: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """Number of replicates, failed ones included."""
        return len(self.replicates)

    @property
    def n_failed(self) -> int:
        """Number of replicates in which a fit did not converge; they are left out."""
        return int(np.sum(~np.isfinite(self.replicates)))

    @property
    def pvalue_se(self) -> float:
        """Monte Carlo standard error of :attr:`pvalue`."""
        used = self.n - self.n_failed
        return float(np.sqrt(self.pvalue * (1.0 - self.pvalue) / used)) if used else np.nan

    def __str__(self) -> str:
        small, large = self.formulas
        failed = f", {self.n_failed} failed and left out" if self.n_failed else ""
        return page(
            *[
                f"Parametric bootstrap likelihood-ratio test, {self.n:,} replicates{failed}",
                f"small: {small}",
                f"large: {large}",
                f"LRT = {self.statistic:.4f} on {self.df} degree{'s' * (self.df != 1)} of freedom",
                f"  bootstrap   p = {format_pvalue(self.pvalue)}  (Monte Carlo std err "
                f"{self.pvalue_se:.4f})",
                f"  Bartlett    p = {format_pvalue(self.pvalue_bartlett)}",
                f"  chi-squared p = {format_pvalue(self.pvalue_chi2)}",
                *(textwrap.fill(f"Note: {note}", 80) for note in self.notes),
            ]
        ).replace("p = <", "p < ")

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return paragraphs(str(self))


def bootstrap_test(small: Fit, large: Fit, n: int = 1000, seed: int = 0) -> BootstrapTest:
    """Test a model against a larger one by parametric bootstrap.

    Both models are fitted by maximum likelihood, to the data and to n responses simulated from the
    smaller one.

    Args:
        small: the model of the null hypothesis.
        large: a model that contains it, fitted to the same rows.
        n: number of replicates.
        seed: of the random numbers.

    Returns:
        The test.  Where the larger model ends below the smaller one it is fitted again from that
        one's optimum, for the data and for each replicate, and a note says so; a replicate that
        stays below counts as failed.

    Raises:
        ComparisonError: if the models were fitted to different data, are not nested, or the larger
            one stays below the smaller one.
        EngineError: if a fit is by the iterative engine.

    Example:
        >>> import lmmax
        >>> data = lmmax.datasets.load("sleepstudy")
        >>> small = lmmax.fit("Reaction ~ Days + (1 | Subject)", data)
        >>> large = lmmax.fit("Reaction ~ Days + I(Days**2) + (1 | Subject)", data)
        >>> test = lmmax.bootstrap_test(small, large, n=99, seed=1)
        >>> test.df, round(test.statistic, 3), test.pvalue > 0.05
        (1, 1.135, True)

    Source: Halekoh and Hojsgaard (2014), J. Stat. Softw. 59(9), section 4 (PBmodcomp of the R
    package pbkrtest, which leaves out replicates that are not positive; here they count).
    """
    as_fit(small, "small")
    as_fit(large, "large")
    from scipy.special import chdtrc

    check_count(n, "n")
    check_seed(seed)
    check_same_data(small, large)
    notes = _check_nested(small, large)
    for fit in (small, large):
        check_engine(fit)
    small, large = small.refit_ml(), large.refit_ml()
    df = large.n_params - small.n_params
    null = Submodel.of(small)
    if below(null, Submodel.of(large)):
        again = fitted_from(large, null)
        if again is not large:
            notes = (*notes, restart_note("The large model", large, again, "the small one"))
        # Replicates start as they would have, or at the estimates.
        large = replace(again, settings=large.settings)
    statistic = 2.0 * (large.llf - small.llf)
    if below(null, Submodel.of(large)):
        raise ComparisonError(
            f"the large model has a lower log-likelihood ({large.llf:.4f}) than the small one "
            f"({small.llf:.4f}), also when fitted again from there: they are not nested, or the "
            "large one has not found its optimum"
        )
    ends = [join(list(by_rows(fit, draws(small, 0, n, seed), n))) for fit in (small, large)]
    drawn = 2.0 * (ends[1].llf - ends[0].llf)
    drawn = np.where(ends[0].converged & ends[1].converged, drawn, np.nan)
    lost = _below(drawn)
    if random_nesting(small, large) is RandomNesting.UNKNOWN:
        lost = lost[:0]  # which may be right
    for number in lost:
        drawn[number] = _replicated(small, large, number, seed)
    if len(lost):
        notes = (
            *notes,
            f"in {len(lost)} of {n} replicates the larger model ended below the smaller one and "
            "was fitted again from there.",
        )
    used = drawn[np.isfinite(drawn)]
    mean = float(np.mean(used)) if used.size else np.nan
    corrected = max(statistic, 0.0) * df / mean if mean > 0.0 else np.nan
    return BootstrapTest(
        statistic=statistic,
        df=df,
        pvalue=float((1 + np.sum(used >= statistic - TIE)) / (used.size + 1)),
        pvalue_bartlett=float(chdtrc(df, corrected)),
        pvalue_chi2=float(chdtrc(df, max(statistic, 0.0))),
        replicates=drawn,
        formulas=(small.formula, large.formula),
        notes=notes,
    )


def _below(drawn: np.ndarray) -> np.ndarray:
    """Return the numbers of the replicates whose statistic is negative."""
    return np.flatnonzero(np.nan_to_num(drawn) < -TIE)


def _replicated(small: Fit, large: Fit, number: int, seed: int) -> float:
    """Return the statistic of one replicate, the larger model fitted from the smaller one too."""
    from ..fit import ConvergenceWarning

    y = next(draws(small, number, number + 1, seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        null = Submodel.of(small.refit(y))
        best = fitted_from(large.refit(y), null)
    return np.nan if below(null, Submodel.of(best)) else null.criterion - best.deviance


def _check_nested(small: Fit, large: Fit) -> tuple[str, ...]:
    """Raise unless the small model is a special case of the large one; return notes."""
    if large.n_params <= small.n_params:
        raise ComparisonError(
            f"the large model has {large.n_params} parameters and the small one {small.n_params}: "
            "pass the model of the null hypothesis first"
        )
    outside = fixed_nesting(small, large).outside
    if outside:
        raise ComparisonError(
            f"the models are not nested: {', '.join(map(repr, outside))} of the small model is no "
            "combination of the fixed effects of the large one"
        )
    random = random_nesting(small, large)
    if random is RandomNesting.NOT_NESTED:
        raise ComparisonError(
            "the models are not nested: no covariances of the random effects of the large model "
            "give those of the small one"
        )
    if random is RandomNesting.BOUNDARY:
        return (
            "a variance is zero under the smaller model, at the boundary: the statistic is not "
            "about chi-squared, and the bootstrap p-value is the one to read.",
        )
    if random is RandomNesting.UNKNOWN:
        return (
            "whether the random effects of the smaller model are a special case of the larger "
            "one's could not be established; the test is valid only if so.",
        )
    return ()
