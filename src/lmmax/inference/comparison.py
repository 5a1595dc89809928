"""Comparisons of models by likelihood ratios: nested fits, random terms, single terms left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from ..characters import Visible
from ..options import Ddf
from .arguments import as_fit
from .nesting import RandomNesting, fixed_nesting, random_nesting
from .restarts import MONTE_CARLO, TIE, below, fitted_from, lost_note, restart_note
from .submodels import Submodel, fit_columns, fit_reduced, reductions
from .tables import TestTable

if TYPE_CHECKING:
    from ..results import Fit

NOTABLE_ERROR = 1e-4
"""Least standard error of a criterion that a reader has to know."""


class ComparisonError(Visible, ValueError):
    """Fits that cannot be compared by a likelihood ratio."""


def compare(fits: Sequence[Fit], *, refit: bool = True) -> TestTable:
    """Compare nested fits by likelihood ratios; see :func:`lmmax.anova`."""
    for position, fit in enumerate(fits, 1):
        as_fit(fit, f"argument {position}")
    fits = sorted(fits, key=lambda fit: fit.n_params)
    notes: list[str] = []
    boundary: list[int] = []
    unknown: list[int] = []
    different = False
    for number, (small, large) in enumerate(pairwise(fits), 2):
        check_same_data(small, large)
        fixed = fixed_nesting(small, large)
        if fixed.outside:
            raise ComparisonError(
                f"the models are not nested: {', '.join(map(repr, fixed.outside))} of "
                f"'{small.formula}' is no combination of the fixed effects of '{large.formula}'. A "
                "likelihood-ratio test needs nested models; compare their aic instead (of fits by "
                "maximum likelihood, fit.refit_ml().aic)"
            )
        if small.n_params == large.n_params:
            raise ComparisonError(
                f"'{small.formula}' and '{large.formula}' have the same number of parameters, "
                f"{small.n_params}, so neither is a special case of the other; compare their aic "
                "or llf instead"
            )
        different |= not fixed.same_space or abs(fixed.log_ratio) > 1e-8
        random = random_nesting(small, large)
        if random is RandomNesting.NOT_NESTED:
            raise ComparisonError(
                f"the models are not nested: no covariances of the random effects of "
                f"'{large.formula}' give those of '{small.formula}'. A likelihood-ratio test needs "
                "nested models; compare their aic instead"
            )
        if random is RandomNesting.UNKNOWN:
            unknown.append(number)
        if random is RandomNesting.BOUNDARY:
            boundary.append(number)
    methods = {fit.reml for fit in fits}
    if len(methods) > 1:
        raise ComparisonError(
            "some fits are by REML, others by maximum likelihood, and their likelihoods cannot be "
            "compared: fit all with reml=False, or use fit.refit_ml()"
        )
    reml = methods.pop()
    if reml and different:
        if not refit:
            raise ComparisonError(
                "the fits are by REML and their fixed effects differ, so their likelihoods cannot "
                "be compared: fit them with reml=False, or leave out refit=False"
            )
        fits = [fit.refit_ml() for fit in fits]
        reml = False
        notes.append(
            "Fitted again by maximum likelihood: REML likelihoods of models with different fixed "
            "effects cannot be compared."
        )
    models, fitted_again = _maximised(fits, unknown)
    table = _ratio_table(models, fits[0].nobs, [str(i) for i in range(1, len(fits) + 1)])
    if boundary:
        notes.append(
            f"{_models(boundary)}: under the smaller model a variance is zero, at the boundary of "
            "what it can be. The chi-squared p-value is then too large (for one variance, about "
            "twice)."
        )
    if unknown:
        notes.append(
            f"{_models(unknown)}: whether the random effects of the smaller model are a special "
            "case of the larger one's could not be established; the test is valid only if so."
        )
    notes += fitted_again
    notes += _quality_notes(models, [f"model {label}" for label in table.index])
    method = "REML" if reml else "maximum likelihood"
    heading = [f"Likelihood-ratio tests of nested models, {method}"]
    heading += [f"{i}: {fit.formula}" for i, fit in enumerate(fits, 1)]
    return TestTable("\n".join(heading), table, tuple(notes))


def _maximised(fits: Sequence[Fit], unknown: Sequence[int]) -> tuple[list[Submodel], list[str]]:
    """Return nested models, those that fit worse than the one before fitted again from there.

    Args:
        fits: the fits, the smallest first.
        unknown: numbers, from 1, of those that may not contain the one before.

    Returns:
        The models, and notes on them.
    """
    models, notes = [Submodel.of(fits[0])], []
    for number, fit in enumerate(fits[1:], 2):
        before, model = models[-1], Submodel.of(fit)
        name, special = f"Model {number}", f"model {number - 1}"
        if below(before, model):
            again = fitted_from(fit, before)
            if again is not fit:
                notes.append(restart_note(name, fit, again, special))
            model = Submodel.of(again)
            if below(before, model):
                gap = 0.5 * (model.criterion - before.criterion)
                notes.append(lost_note(name, special, gap, number not in unknown))
        models.append(model)
    return models, notes


def _models(numbers: Sequence[int]) -> str:
    return f"Model{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def check_same_data(one: Fit, other: Fit) -> None:
    """Raise unless two fits are of the same response, rows, weights and offset."""
    a, b = one.design, other.design
    if len(a.y) != len(b.y):
        raise ComparisonError(
            f"the fits are to different rows: '{one.formula}' used {len(a.y)}, '{other.formula}' "
            f"{len(b.y)}. Rows with a missing value were probably dropped from one of them; fit "
            "both to the rows that are complete in all variables, data.dropna(subset=[...])"
        )
    if not np.array_equal(a.y, b.y):
        same = a.response_name == b.response_name
        raise ComparisonError(
            "the fits are to different responses or to rows in another order"
            if same
            else f"the fits have different responses, {a.response_name!r} and {b.response_name!r}, "
            "and likelihoods of different responses cannot be compared"
        )
    for name, default in (("weights", 1.0), ("offset", 0.0)):
        first, second = getattr(a, name), getattr(b, name)
        if first is second:
            continue
        first, second = (np.full(len(a.y), default) if x is None else x for x in (first, second))
        if not np.array_equal(first, second):
            raise ComparisonError(f"the fits have different {name}; fit both with the same")


def _ratio_table(models: Sequence[Submodel], nobs: int, labels: Sequence[str]) -> pd.DataFrame:
    """Return the tests of each model against the one before it."""
    rows = []
    for i, model in enumerate(models):
        test = (np.nan, np.nan, np.nan)
        if i:
            before = models[i - 1]
            test = _ratio(before, model)
        rows.append((*_sizes(model, nobs), *test))
    columns = ["npar", "AIC", "BIC", "llf", "deviance", "chisq", "df", "p"]
    return pd.DataFrame(rows, columns=columns, index=list(labels))


def _sizes(model: Submodel, nobs: int) -> tuple[float, ...]:
    k, criterion = model.n_params, model.criterion
    return (k, criterion + 2 * k, criterion + k * math.log(nobs), -0.5 * criterion, criterion)


def _ratio(small: Submodel, large: Submodel) -> tuple[float, float, float]:
    """Return the likelihood-ratio statistic, its degrees of freedom and the p-value.

    There is no statistic where the larger model was not maximised; of two models that are the same
    but for rounding it is zero.
    """
    df = large.n_params - small.n_params
    if below(small, large):
        return np.nan, df, np.nan
    chisq = max(small.criterion - large.criterion, 0.0)
    return chisq, df, _upper(chisq, df) if df > 0 else np.nan


def _upper(chisq: float, df: int) -> float:
    """Return the upper tail of chi-squared; of the constant zero without degrees of freedom."""
    from scipy import special

    if df == 0:
        return float(chisq <= TIE)
    return float(special.chdtrc(df, chisq))


def _quality_notes(models: Iterable[Submodel], labels: Iterable[str]) -> list[str]:
    models, labels = list(models), list(labels)
    notes = []
    lost = [label for model, label in zip(models, labels, strict=True) if not model.converged]
    if lost:
        notes.append(
            f"Did not converge: {', '.join(lost)}. The likelihood ratios with it cannot be relied "
            "on."
        )
    error = max((model.criterion_error for model in models), default=0.0)
    if error > NOTABLE_ERROR:
        notes.append(
            f"The deviances are estimates with standard errors up to {error:.2g} (iterative "
            f"engine); likelihood ratios smaller than about {MONTE_CARLO * error:.2g} are noise."
        )
    return notes


def ranova(fit: Fit, *, mixture: bool = False) -> TestTable:
    """Test each random effect by leaving it out of its term.

    A correlated term such as ``(1 + Time | Pig)`` is reduced by each of its effects in turn, with
    its correlations; a random intercept, an effect of a ``||`` term and a term with a
    covariance structure are left out as a whole; ``(0 + f | g)`` with a factor f is reduced to
    ``(1 | g)``.  The likelihood-ratio tests use the criterion of the fit, REML or ML.  A fit below
    one of the smaller ones is fitted again from that one's optimum, as a note then says.

    Args:
        fit: the fitted model.
        mixture: whether p-values take into account that a variance cannot be negative.  The null
            distribution for one variance, with k - 1 covariances, is a mixture in equal parts of
            chi-squared with k - 1 and k degrees of freedom.  Other rows keep the plain p-value,
            which is too large, and a note names them.

    Returns:
        ``table`` with the fit itself in the row ``<none>``, then a row per reduction: ``npar``,
        ``llf``, ``AIC``, ``chisq``, ``df`` and ``p``.

    Raises:
        ComparisonError: if the fit holds covariances fixed.

    Example:
        >>> import lmmax
        >>> sleep = lmmax.datasets.load("sleepstudy")
        >>> fit = lmmax.fit("Reaction ~ Days + (1 + Days | Subject)", sleep)
        >>> lmmax.ranova(fit).table.round(3)
                                      npar      llf       AIC   chisq   df    p
        <none>                           6 -871.814  1755.628     NaN  NaN  NaN
        Days in (1 + Days | Subject)     4 -893.233  1794.465  42.837  2.0  0.0

    Source: Stram and Lee (1994), Biometrics 50, 1171-1177; Self and Liang (1987), JASA 82, 605-610,
    for the mixture; Kuznetsova, Brockhoff and Christensen (2017), J. Stat. Softw. 82(13).
    """
    as_fit(fit)
    if "cov_re" in (fit.settings.fix or {}):
        raise ComparisonError(
            "the covariances of the random effects are held fixed, so none of them can be tested: "
            "fit without fix={'cov_re': ...}"
        )
    scope = reductions(fit.design)
    reduced = [fit_reduced(fit, reduction) for reduction in scope]
    full, fitted_again = _full(fit, reduced, [reduction.label for reduction in scope])
    models, labels = [full], ["<none>"]
    rows = [
        (full.n_params, -0.5 * full.criterion, full.criterion + 2 * full.n_params, *[np.nan] * 3)
    ]
    plain = []
    for reduction, smaller in zip(scope, reduced, strict=True):
        chisq, df, p = _ratio(smaller, full)
        if reduction.mixture and mixture and not math.isnan(chisq):
            df_less = int(df) - 1
            p = 0.5 * (_upper(chisq, df_less) + _upper(chisq, int(df)))
        elif not reduction.mixture:
            plain.append(reduction.label)
        models.append(smaller)
        labels.append(reduction.label)
        size = (smaller.n_params, -0.5 * smaller.criterion)
        rows.append((*size, smaller.criterion + 2 * smaller.n_params, chisq, df, p))
    table = pd.DataFrame(
        rows,
        columns=["npar", "llf", "AIC", "chisq", "df", "p"],
        index=pd.Index(labels, dtype=object),
    )
    notes = []
    if mixture:
        notes.append(
            "p from mixtures in equal parts of chi-squared with df - 1 and df degrees of freedom: "
            "under the hypothesis a variance lies on its boundary, zero."
        )
        if plain:
            notes.append(
                f"Plain chi-squared p, which is too large: {', '.join(plain)}. More than one "
                "variance is tested, or one of a structure."
            )
    else:
        notes.append(
            "Under the hypotheses a variance lies on its boundary, zero, and p is too large; see "
            "mixture=True."
        )
    notes += fitted_again
    notes += _quality_notes(models, labels)
    method = "REML" if fit.reml else "maximum likelihood"
    heading = f"Likelihood-ratio tests of the random effects, {method}\n{fit.formula}"
    return TestTable(heading, table, tuple(notes))


def _full(
    fit: Fit, reduced: Sequence[Submodel], labels: Sequence[str]
) -> tuple[Submodel, list[str]]:
    """Return a model, fitted again if it fits worse than one of its special cases; and notes.

    Args:
        fit: its fit.
        reduced: the special cases.
        labels: what each leaves out.
    """
    best, notes = fit, []
    for number in np.argsort([smaller.criterion for smaller in reduced]):
        if below(reduced[number], Submodel.of(best)):
            best = fitted_from(best, reduced[number])
    full = Submodel.of(best)
    if best is not fit:
        notes.append(restart_note("The model", fit, best, "a smaller one"))
    for smaller, label in zip(reduced, labels, strict=True):
        if below(smaller, full):
            gap = 0.5 * (full.criterion - smaller.criterion)
            notes.append(lost_note("The model", f"the one without {label}", gap))
    return full, notes


def drop1(fit: Fit, *, test: Literal["F", "chisq"] = "F", ddf: Ddf | None = None) -> TestTable:
    """Test the fixed-effects terms that may be left out one at a time.

    These are the terms whose factors are not all in another term.  As in :func:`ranova`, a fit that
    is below a smaller one is fitted again from there.

    Args:
        fit: the fitted model.
        test: "F" for Wald tests, "chisq" for likelihood-ratio tests by maximum likelihood, for
            which the model is fitted again without each term.
        ddf: denominator degrees of freedom of the F tests, as in :meth:`Fit.coefficients`.

    Returns:
        For F the columns of :func:`anova`; for chi-square the fit itself in the row ``<none>``,
        then a row per term: ``npar``, ``AIC``, ``BIC``, ``llf``, ``deviance``, ``chisq``,
        ``df``, ``p``.

    Example:
        >>> import lmmax
        >>> cake = lmmax.datasets.load("cake")
        >>> fit = lmmax.fit("angle ~ recipe * temperature + (1 | recipe:replicate)", cake)
        >>> lmmax.drop1(fit).table[["df_num", "df_den", "F"]].round(3)
                            df_num  df_den      F
        recipe:temperature      10   210.0  1.006

    Source: Kuznetsova, Brockhoff and Christensen (2017), J. Stat. Softw. 82(13).
    """
    from .anova import check_test, term_table, untestable_notes
    from .hypotheses import fixed_terms

    as_fit(fit)
    test = check_test(test)
    terms = fixed_terms(fit)
    scope = terms.coded.droppable()
    smaller = {term.label: terms.without(term) for term in scope}
    if test == "F":
        hypotheses = {label: L for label, (L, _) in smaller.items()}
        table, title = term_table(fit, hypotheses, ddf, "F")
        heading = f"Single terms left out, {title}\n{fit.formula}"
        return TestTable(heading, table, tuple(untestable_notes(table)))
    if ddf is not None:
        raise ValueError("ddf is for F tests; leave it out with test='chisq'")
    notes = []
    if fit.reml:
        fit = fit.refit_ml()
        notes.append("Fitted by maximum likelihood, as the fixed effects differ.")
    reduced = {label: fit_columns(fit, B) for label, (L, B) in smaller.items() if len(L)}
    full, fitted_again = _full(fit, list(reduced.values()), list(reduced))
    models = [full]
    rows = [(*_sizes(full, fit.nobs), np.nan, np.nan, np.nan)]
    for label, (L, _) in smaller.items():
        model = reduced.get(label, full)
        models.append(model)
        test_of = _ratio(model, full) if len(L) else (np.nan, 0, np.nan)
        rows.append((*_sizes(model, fit.nobs), *test_of))
    columns = ["npar", "AIC", "BIC", "llf", "deviance", "chisq", "df", "p"]
    labels = ["<none>", *smaller]
    table = pd.DataFrame(rows, columns=columns, index=pd.Index(labels, dtype=object))
    notes += untestable_notes(table)
    notes += fitted_again
    notes += _quality_notes(models, labels)
    heading = f"Single terms left out, likelihood-ratio tests\n{fit.formula}"
    return TestTable(heading, table, tuple(notes))
