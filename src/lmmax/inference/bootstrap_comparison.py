"""Test of two nested models by simulating the likelihood-ratio statistic."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..batch import check_engine, join
from ..simulate import check_count, check_seed, draws
from .arguments import as_fit
from .comparison import ComparisonError, check_same_data
from .nesting import RandomNesting, fixed_nesting, random_nesting
from .resampling import by_rows
from .wald import format_pvalue

if TYPE_CHECKING:
    from ..results import Fit

TIE = 1e-6
"""Statistics that differ by less are equal: both fits may be the same, on a boundary."""


@dataclass(frozen=True, eq=False)
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
        return "\n".join(
            [
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
        The test.

    Raises:
        ComparisonError: if the models were fitted to different data, or are not nested.
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
    statistic = 2.0 * (large.llf - small.llf)
    if statistic < -TIE:
        raise ComparisonError(
            f"the large model has a lower log-likelihood ({large.llf:.4f}) than the small one "
            f"({small.llf:.4f}): they are not nested, or a fit has not found its optimum"
        )
    below, above = (join(list(by_rows(fit, draws(small, 0, n, seed), n))) for fit in (small, large))
    drawn = 2.0 * (above.llf - below.llf)
    drawn = np.where(above.converged & below.converged, drawn, np.nan)
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
