"""Analysis of variance of one fit, and of several nested ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from ..options import Ddf, choose
from .arguments import as_fit
from .comparison import compare
from .denominator import method_name
from .hypotheses import FixedTerms, SumsOfSquares, fixed_terms
from .tables import TestTable

if TYPE_CHECKING:
    from ..results import Fit
    from .denominator import Denominator
from .wald import warn_of_missing

Test = Literal["F", "chisq"]
TESTS: tuple[Test, ...] = get_args(Test)

TITLES = {
    "satterthwaite": "Satterthwaite's degrees of freedom",
    "kenward-roger": "Kenward and Roger's degrees of freedom",
    "kenward-roger-linear": "Kenward and Roger's degrees of freedom (linear)",
    "between-within": "between-within degrees of freedom",
    "residual": "residual degrees of freedom",
    "normal": "infinite degrees of freedom",
}
MANY = 8
"""Most cells that a note names."""


def anova(
    fit: Fit,
    *others: Fit,
    type: SumsOfSquares | Literal[1, 2, 3] = "III",
    ddf: Ddf | None = None,
    test: Test = "F",
    refit: bool = True,
) -> TestTable:
    """Test the fixed-effects terms of a fit, or compare nested fits by likelihood ratios.

    For one fit, each row tests that a term has no effect:

    * type "I" adds the terms in their order, each adjusted for those before it;
    * type "II" adjusts each for all terms that do not contain it (a term is contained in one with
      the same numeric and more categorical factors);
    * type "III" tests the marginal means of a term's factors averaged with equal weights over
      all others: hypotheses in the cells' means, orthogonal to those of the terms that contain it.

    These are estimable functions as SAS defines them, with as many degrees of freedom as the term
    adds to the rank of those it is adjusted for, whatever contrasts the fit used, with an intercept
    or without, and whichever columns were dropped as aliased.  Where lmerTest tests another
    hypothesis, on the coefficients that were kept, a note in the table says so.  (Satterthwaite's
    degrees of freedom of a joint test depend on the rows that stand for it; they are those of
    treatment coding, as in lmerTest, or orthonormal ones where these are no basis.)

    For several fits, each row tests the fit against the next smaller one.  Fits by REML whose fixed
    effects differ are fitted again by maximum likelihood, as a note in the table says.  One that
    ends below a special case of it is fitted again from that one's optimum, likewise; if it stays
    below, the statistic is NaN.

    Args:
        fit: the fitted model.
        others: more fits to the same data, each nested in the next larger one, in any order.
        type: sums of squares for one fit: "I", "II", "III", or 1, 2, 3.
        ddf: denominator degrees of freedom for one fit, as in :meth:`Fit.coefficients`;
            Satterthwaite's by default.
        test: "F", or "chisq" for Wald chi-square tests.
        refit: whether to fit again by maximum likelihood where that is needed; if False, it is an
            error.

    Returns:
        ``table`` has a row per term, with columns ``sum_sq``, ``mean_sq``, ``df_num``, ``df_den``,
        ``F``, ``p`` (``chisq``, ``df``, ``p`` for chi-square tests).  Sums of squares are those
        that give F over the residual variance, ``mean_sq = F * scale`` (with Kenward and Roger's
        method, F before it is scaled).  A term of which the others hold all is NaN.  For several
        fits a row per fit: ``npar``, ``AIC``, ``BIC``, ``llf``, ``deviance``, ``chisq``, ``df``,
        ``p``.

    Raises:
        ValueError: for an unknown option, degrees of freedom that the fit does not allow, or fits
            that cannot be compared.

    Example:
        >>> import lmmax
        >>> cake = lmmax.datasets.load("cake")
        >>> fit = lmmax.fit("angle ~ recipe * temperature + (1 | recipe:replicate)", cake)
        >>> lmmax.anova(fit).table[["df_num", "df_den", "F"]].round(3)
                            df_num  df_den       F
        recipe                   2    42.0   0.249
        temperature              5   210.0  20.520
        recipe:temperature      10   210.0   1.006

    Source: SAS/STAT User's Guide, "The Four Types of Estimable Functions"; Kuznetsova, Brockhoff
    and Christensen (2017), J. Stat. Softw. 82(13).
    """
    as_fit(fit)
    if others:
        if ddf is not None:
            raise ValueError(
                "ddf is for the F tests of one fit; several fits are compared by likelihood ratios"
            )
        return compare([fit, *others], refit=refit)
    kind = sums_of_squares(type)
    test = check_test(test)
    terms = fixed_terms(fit)
    table, title = term_table(fit, terms.test(kind), ddf, test)
    notes = _notes(terms, table, kind)
    if fit.unidentified is not None:
        notes += (f"{fit.unidentified}; tests that depend on it are left out.",)
    return TestTable(f"Type {kind} analysis of variance, {title}\n{fit.formula}", table, notes)


def sums_of_squares(type: Any) -> SumsOfSquares:
    """Return a type of sums of squares by its name."""
    names: dict[Any, SumsOfSquares] = {}
    for number, name in enumerate(get_args(SumsOfSquares), 1):
        names |= {number: name, str(number): name, name: name}
    if isinstance(type, str):
        type = type.strip().upper()
    if type not in names:
        raise ValueError(f"type={type!r} is unknown; use 'I', 'II' or 'III'")
    return names[type]


def check_test(test: Any) -> Test:
    """Return the test that a word stands for, or raise."""
    return choose("test", test, TESTS, {"chi2": "chisq", "chisquare": "chisq"})


def term_table(
    fit: Fit, hypotheses: dict[str, np.ndarray], ddf: Ddf | None, test: str
) -> tuple[pd.DataFrame, str]:
    """Return Wald tests of hypotheses by their names, and how they were made in words.

    Args:
        fit: the fitted model.
        hypotheses: matrices L of full row rank, (r, p) each.
        ddf: denominator degrees of freedom.
        test: "F" or "chisq".
    """
    names = list(hypotheses)
    index = pd.Index(names, dtype=object)
    if test == "chisq":
        if ddf is not None and method_name(ddf) != "normal":
            raise ValueError(f"ddf={ddf!r} is for F tests; leave it out, or use test='F'")
        normal = fit.denominator("normal")
        chisq: list[tuple[float, int, float]] = []
        for L in hypotheses.values():
            if len(L):
                found = normal.joint(L, L @ fit.estimates.beta)
                chisq.append((found.statistic * len(L), len(L), found.pvalue))
            else:
                chisq.append((np.nan, 0, np.nan))
        table = pd.DataFrame(chisq, columns=["chisq", "df", "p"], index=index)
        return table.astype({"df": int}), "Wald chi-square tests"
    denominator = fit.denominator(ddf)
    rows = [_f_row(fit, denominator, L) for L in hypotheses.values()]
    columns = ["sum_sq", "mean_sq", "df_num", "df_den", "F", "p"]
    table = pd.DataFrame(rows, columns=columns, index=index).astype({"df_num": int})
    tested = table["df_num"] > 0
    warn_of_missing(denominator, table.index[tested], table["F"][tested])
    return table, TITLES.get(denominator.method, denominator.method)


def _f_row(fit: Fit, denominator: Denominator, L: np.ndarray) -> tuple[float, ...]:
    r = len(L)
    if not r:
        return (np.nan, np.nan, 0, np.nan, np.nan, np.nan)
    difference = L @ fit.estimates.beta
    found = denominator.joint(L, difference)
    # Without the factor by which Kenward and Roger scale F.
    square = found.wald * fit.scale
    return (square, square / r, r, found.df_den, found.statistic, found.pvalue)


def _notes(terms: FixedTerms, table: pd.DataFrame, kind: SumsOfSquares) -> tuple[str, ...]:
    notes = untestable_notes(table)
    empty = terms.empty if kind == "III" else ()
    if empty:
        shown = ", ".join(empty[:MANY]) + (", ..." if len(empty) > MANY else "")
        notes.append(
            f"No data in {shown}. Type III hypotheses then depend on which cells are empty: "
            "interpret them with care."
        )
    elsewhere = (
        [] if kind == "I" else [t.label for t in terms.coded.named if not terms.by_coefficients(t)]
    )
    if elsewhere:
        notes.append(
            f"Estimable functions, as in SAS: {', '.join(elsewhere)}. lmerTest tests all "
            "coefficients of the columns that were kept, another hypothesis there, which depends "
            "on the order of the terms and levels."
        )
    apart = (
        [] if kind == "I" else [label for label in terms.lacking(kind) if label not in elsewhere]
    )
    if apart:
        notes.append(
            f"Estimable functions, as in SAS: {', '.join(apart)}. These are parts of "
            "interactions whose parts are not all in the model; lmerTest tests another hypothesis "
            "there."
        )
    return tuple(notes)


def untestable_notes(table: pd.DataFrame) -> list[str]:
    """Return a note on the terms that could not be tested, if there are any."""
    size = table["df_num"] if "df_num" in table else table["df"]
    lost = [str(name) for name in table.index[size == 0]]
    if not lost:
        return []
    return [f"Not estimable, because the other terms hold all of it: {', '.join(lost)}."]
