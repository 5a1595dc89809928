"""The summary of a fit: its numbers, before :mod:`lmmax.rendering` prints them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .constraints import TermColumns
from .inference.denominator import AdjustmentWarning, method_name
from .inference.wald import missing
from .options import Ddf
from .rendering import html, text
from .results import MESSAGES, Fit

ZERO_SCALE = (
    "The residual variance is estimated as zero: the random effects describe the data best "
    "without a residual. This is a legitimate maximum at the boundary, not a failure; no standard "
    "error can be given for it, all others take it as given, and there are no scaled residuals."
)
MANY_PARAMETERS = 4
"""Most parameters of a structure that a note spells out."""
DDF_NOTES = {
    "satterthwaite": "Degrees of freedom by Satterthwaite's method.",
    "kenward-roger": (
        "Degrees of freedom and standard errors of the coefficients by Kenward and Roger's method."
    ),
    "kenward-roger-linear": (
        "Degrees of freedom and standard errors of the coefficients by Kenward and Roger's method, "
        "without second derivatives of the covariance."
    ),
    "between-within": (
        "Degrees of freedom by counting groups and rows (between and within groups); they do not "
        "know how variable the random effects are."
    ),
    "residual": (
        "Degrees of freedom are rows less coefficients, which ignores the grouping: too many for "
        "effects that vary between groups."
    ),
    "normal": "z, P>|z| and the confidence limits are large-sample ones (normal distribution).",
}
"""What the summary says of each method of :mod:`lmmax.inference.denominator`."""


@dataclass(frozen=True, eq=False, repr=False)
class Summary:
    """Summary of a fit; ``print`` shows text, a notebook shows HTML.

    Made by :meth:`lmmax.Fit.summary`.

    Attributes:
        title: what was fitted, and by which method.
        formula: the model.
        tables: numbers before rounding.  The header (index: what; column ``value``); the random
            effects, a row per effect and one for the residual (index: term), with the correlations
            within a term as a triangle in the last columns; the fixed effects (index: coefficient),
            NaN where a coefficient is aliased.
        residuals: quantiles of the scaled residuals ``sqrt(weight) (y - fitted) / sqrt(scale)``.
        warnings: what makes the numbers unusable, shown at the top.
        notes: what a reader should know, shown at the bottom.
        level: of the confidence limits.

    Example:
        >>> import lmmax
        >>> data = lmmax.datasets.load("dietox")
        >>> summary = lmmax.fit("Weight ~ Time + (1 | Pig)", data).summary()
        >>> summary.title
        'Linear mixed model fit by REML'
        >>> summary.tables[2][["coef", "std err"]].round(3).to_dict("index")["Time"]
        {'coef': 6.943, 'std err': 0.033}
    """

    title: str
    formula: str
    tables: tuple[pd.DataFrame, ...]
    residuals: pd.Series
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    level: float = 0.95

    def __str__(self) -> str:
        return text(self)

    def __repr__(self) -> str:
        return text(self)

    def _repr_html_(self) -> str:
        return html(self)


def summarize(fit: Fit, alpha: float = 0.05, ddf: Ddf | None = None) -> Summary:
    """Return the summary of a fit, with confidence limits of level ``1 - alpha``.

    Args:
        fit: the fitted model.
        alpha: one minus the confidence level.
        ddf: the degrees of freedom of the coefficients, as in :meth:`lmmax.Fit.coefficients`.

    Raises:
        ValueError: if alpha does not lie between 0 and 1, or for an unknown ddf.

    Example:
        >>> import lmmax
        >>> fitted = lmmax.fit("Yield ~ 1 + (1 | Batch)", lmmax.datasets.load("dyestuff"))
        >>> round(summarize(fitted, alpha=0.1).level, 2)
        0.9
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdjustmentWarning)  # a note says so
        coefficients = fit.coefficients(ddf, alpha=alpha)
    return Summary(
        title=f"Linear mixed model fit by {'REML' if fit.reml else 'maximum likelihood'}",
        formula=fit.formula,
        tables=(_header(fit), _random_effects(fit), coefficients),
        residuals=_residual_quantiles(fit),
        warnings=_warnings(fit),
        notes=_notes(fit, method_name(ddf)),
        level=1.0 - alpha,
    )


def _header(fit: Fit) -> pd.DataFrame:
    groups: dict[str, Any] = {
        f"No. groups ({grouping.name})": len(grouping.levels) for grouping in fit.design.groupings
    }
    if len(groups) == 1:
        (sizes,) = fit.layout.sizes
        groups["Min. group size"] = int(sizes.min())
        groups["Mean group size"] = float(sizes.mean())
        groups["Max. group size"] = int(sizes.max())
    entries: dict[str, Any] = {
        "Dependent variable": fit.design.response_name,
        "Method": "REML" if fit.reml else "ML",
        "No. observations": fit.nobs,
        **groups,
        "Log-likelihood": fit.llf,
        "REML criterion" if fit.reml else "Deviance": fit.deviance,
        "AIC": fit.aic,
        "BIC": fit.bic,
        "Scale": fit.scale,
        "Converged": fit.converged,
        "Singular fit": fit.singular,
        "Steps": int(fit.estimates.solution.steps),
    }
    return pd.DataFrame({"value": pd.Series(entries, dtype=object)})


def _random_effects(fit: Fit) -> pd.DataFrame:
    Psi, errors = fit.cov_re.to_numpy(), fit.cov_re_se.to_numpy()
    sd = np.sqrt(np.diag(Psi))
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = Psi / np.outer(sd, sd)
    structured = set(fit.structures()["term"])
    free = [term for term in fit.terms if term.correlated and term.label not in structured]
    n_correlations = max((term.width - 1 for term in free), default=0)
    rows: list[list[Any]] = []
    labels: list[str] = []
    for term in fit.terms:
        group = fit.group_names[term.factor]
        if term.label in structured:
            found = _structure_rows(fit, term)
            rows += [[group, *row, *[math.nan] * n_correlations] for row in found]
            labels += [term.label] * len(found)
            continue
        start = term.columns.start
        for j in range(start, term.columns.stop):
            before = correlation[j, start:j].tolist() if term.correlated else []
            padding = [math.nan] * (n_correlations - len(before))
            row = [fit.effect_names[j], term.correlated, Psi[j, j], errors[j, j], sd[j]]
            rows.append([group, *row, *before, *padding])
            labels.append(term.label)
    sigma = math.sqrt(fit.scale) if fit.scale >= 0.0 else math.nan
    rows.append(
        ["Residual", "", False, fit.scale, fit.scale_se, sigma, *[math.nan] * n_correlations]
    )
    return pd.DataFrame(
        rows,
        index=pd.Index([*labels, "Residual"], name="term"),
        columns=["group", "name", "correlated", "variance", "std err", "std dev"]
        + [f"corr {j + 1}" for j in range(n_correlations)],
    )


def _structure_rows(fit: Fit, term: TermColumns) -> list[list[Any]]:
    """Return name, whether correlations follow, variance, its standard error, and deviation."""
    table = fit.structures()
    table = table[table["term"] == term.label]
    is_sd = np.asarray(term.covariance.is_sd(term.width))
    rows = []
    for label, sd, se in table.loc[is_sd, ["parameter", "estimate", "std err"]].itertuples(
        index=False
    ):
        name = label.removeprefix("sd(").removesuffix(")") if "(" in label else "each effect"
        rows.append([name, False, sd**2, 2.0 * sd * se, sd])
    if len(rows) != term.width and not any(row[0] == "each effect" for row in rows):
        # Some variances are no parameters: held, or of a structure of the user's own.
        rows = []
        variances = np.diag(fit.cov_re.to_numpy())[term.columns]
        errors = np.diag(fit.cov_re_se.to_numpy())[term.columns]
        names = fit.effect_names[term.columns]
        for name, variance, error in zip(names, variances, errors, strict=True):
            rows.append([name, False, variance, error, math.sqrt(variance)])
    return rows


def _residual_quantiles(fit: Fit) -> pd.Series:
    names = ["Min", "1Q", "Median", "3Q", "Max"]
    if fit.estimates.zero_scale:  # zeros, and nothing to scale them by
        return pd.Series(np.nan, index=names)
    values = fit.design.y - fit.fittedvalues.to_numpy()
    if fit.design.weights is not None:
        values = values * np.sqrt(fit.design.weights)
    # Not finite only where the fit failed; the summary must still print.
    with np.errstate(divide="ignore", invalid="ignore"):
        values = values / np.sqrt(fit.scale)
    return pd.Series(np.quantile(values, [0.0, 0.25, 0.5, 0.75, 1.0]), index=names)


def _warnings(fit: Fit) -> tuple[str, ...]:
    if fit.converged:
        return ()
    return (
        f"the fit did not converge: {MESSAGES[fit.estimates.status]}. "
        "Do not use the numbers below as estimates.",
    )


def _notes(fit: Fit, ddf: Ddf) -> tuple[str, ...]:
    notes = [_sentence(note) for note in fit.notes]
    if not fit.converged:
        record = fit.convergence
        notes.append(
            f"Not converged (status {record.status}): Newton decrement {record.decrement:.3g}, "
            f"gradient norm {record.gradient_norm:.3g}; see fit.convergence."
        )
    if fit.unidentified is not None:
        notes.append(
            f"{_sentence(str(fit.unidentified))} Other values fit as well, so they have no "
            "standard errors, nor do coefficients that depend on them; all other tests are right."
        )
    if fit.estimates.zero_scale:
        notes.append(ZERO_SCALE)
    notes += [_singular_note(fit, label) for label in fit.estimates.boundary]
    notes += _structure_notes(fit)
    if fit.settings.fix:
        notes.append(
            f"Held fixed, so without standard errors: {', '.join(_held(fit.settings.fix))}."
        )
    related = [g.name for g in fit.design.groupings if g.root is not None]
    if related:
        notes.append(f"The levels of {', '.join(related)} are related by a known matrix.")
    if fit.design.weights is not None:
        notes.append("Prior weights were used: the scale is the residual variance at weight 1.")
    if fit.design.offset is not None:
        notes.append("The mean includes an offset.")
    if fit.engine.name == "iterative":
        notes.append(
            f"The log-likelihood is a Monte Carlo estimate from {fit.estimates.probes} probes "
            f"(seed {fit.settings.seed}): the standard error of -2 log-likelihood is "
            f"{fit.criterion_error:.2g}. Standard errors of variances are from the average "
            "information."
        )
    if fit.reml:
        notes.append("Under REML, AIC and BIC compare only models with the same fixed effects.")
    notes.append(DDF_NOTES[ddf])
    test, kept = fit.denominator(ddf), fit.layout.fixed.kept
    names = [fit.design.x_names[j] for j in kept]
    lost = missing(test, names, test.errors(np.eye(len(kept))))
    if lost:
        notes.append(_sentence(lost))
    return tuple(notes)


def _structure_notes(fit: Fit) -> list[str]:
    """Correlations and rates of structures, which the table of variances does not show."""
    notes = []
    table = fit.structures()
    for term in fit.terms:
        rows = table[table["term"] == term.label]
        if not len(rows):
            continue
        shown = rows[~np.asarray(term.covariance.is_sd(term.width))]
        parts = [
            f"{label} {value:.4g}" + (f" (std. err. {se:.3g})" if math.isfinite(se) else "")
            for label, value, se in shown[["parameter", "estimate", "std err"]].itertuples(
                index=False
            )
        ]
        if len(parts) > MANY_PARAMETERS:
            notes.append(
                f"{term.label}: {len(parts)} correlation parameters, see fit.structures()."
            )
        elif parts:
            notes.append(f"{term.label}: {', '.join(parts)}.")
    return notes


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _held(fix: Mapping[str, Any]) -> list[str]:
    names = []
    for name, value in fix.items():
        parts = [f"{name} of {label}" for label in value] if isinstance(value, Mapping) else [name]
        names += parts
    return names


def _singular_note(fit: Fit, label: str) -> str:
    here = next(term.columns for term in fit.terms if term.label == label)
    variances = np.diag(fit.cov_re.to_numpy())[here]
    names = fit.effect_names[here]
    zero = [name for name, variance in zip(names, variances, strict=True) if variance == 0.0]
    if zero:
        several = len(zero) > 1
        found = (
            f"the variance{'s' * several} of {', '.join(zero)} {'are' if several else 'is'} "
            f"estimated as zero, and no standard error{'s' * several} can be given for "
            f"{'them' if several else 'it'}."
        )
    elif len(names) == 2:
        found = "its correlation is estimated as +1 or -1; the standard errors take that as given."
    else:
        found = (
            "some combination of its effects has an estimated variance of zero; the standard "
            "errors take that as given."
        )
    text = f"Singular fit: {label} lies on the boundary: {found}"
    if fit.converged:
        text += (
            f" This is a legitimate maximum of the {'restricted ' * fit.reml}likelihood, not a "
            "failure: in that direction the groups differ no more than the residual variance "
            "alone makes them, and a simpler term fits as well."
        )
    return text
