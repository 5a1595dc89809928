"""Confidence limits of all parameters of a model: by profile, by standard errors, by simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from ..options import Ddf, alpha_of, choose
from ..rendering import Frame
from .arguments import as_fit
from .charts import Charts, Parameter
from .profile import cutoff_of, profile_limits, select

if TYPE_CHECKING:
    from ..results import Fit

Method = Literal["profile", "wald", "bootstrap"]
METHODS: tuple[Method, ...] = get_args(Method)


def confint(
    fit: Fit,
    parameters: str | Sequence[str] | None = None,
    method: Method = "profile",
    level: float | None = None,
    *,
    alpha: float | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Return confidence limits of coefficients and variance parameters.

    Args:
        fit: the fitted model.
        parameters: names, "fixed", "random", a sequence of these, or None for all; see
            :func:`lmmax.profile`.
        method: "profile", limits of the likelihood profile; "wald", coefficients by
            :meth:`lmmax.Fit.conf_int`, and for variance parameters a normal quantile times the
            standard error on a scale without ends: the logarithm of standard deviations and rates,
            Fisher's z of correlations; "bootstrap", percentiles of the parametric bootstrap.
        level: the level, 0.95 if None; a number below one half is taken as ``alpha``.
        alpha: one minus the level, instead of it.
        **options: for "wald" ``ddf`` of :meth:`lmmax.Fit.conf_int`; for "bootstrap" those of
            :func:`lmmax.bootstrap` and ``kind`` of its limits.

    Returns:
        A row per parameter, ``lower`` and ``upper``; NaN where there is no limit, such as Wald
        limits at the boundary of the parameter space.  Profile limits end at that boundary where
        the criterion rises too little before it; ``frame.attrs["notes"]`` says where, and why
        others are missing.

    Raises:
        ValueError: for an unknown name or method, or a level outside (0, 1).
        TypeError: for an option that the method does not take, or both ``level`` and ``alpha``.
        EngineError: for profiles of a fit by the iterative engine.

    Example:
        >>> import lmmax
        >>> fit = lmmax.fit("strength ~ 1 + (1 | batch/cask)", lmmax.datasets.load("pastes"))
        >>> lmmax.confint(fit).round(3)
                                    lower   upper
        Intercept                  58.572  61.535
        batch: sd(Intercept)        0.000   3.287
        batch:cask: sd(Intercept)   2.158   4.100
        sigma                       0.652   1.085
        >>> lmmax.confint(fit, "random", method="wald").round(3)
                                   lower  upper
        batch: sd(Intercept)       0.321  5.165
        batch:cask: sd(Intercept)  2.103  4.009
        sigma                      0.639  1.060
    """
    as_fit(fit)
    alpha = alpha_of(level, alpha)
    method = choose("method", method, METHODS, {"boot": "bootstrap"})
    allowed = {"profile": (), "wald": ("ddf",)}.get(method)
    if allowed is not None and set(options) - set(allowed):
        name = next(iter(set(options) - set(allowed)))
        takes = f"takes only {', '.join(allowed)}" if allowed else "takes no options"
        raise TypeError(f"confint(method={method!r}) does not take {name!r}: it {takes}")
    if method == "profile":
        return profile_limits(fit, parameters, alpha)
    if method == "wald":
        return _wald(fit, parameters, alpha, **options)
    return _bootstrap(fit, parameters, alpha, **options)


def _wald(
    fit: Fit, parameters: str | Sequence[str] | None, alpha: float, ddf: Ddf | None = None
) -> pd.DataFrame:
    charts = Charts(fit)
    chosen = select(charts, parameters)
    quantile = cutoff_of(alpha)
    coefficients = fit.conf_int(alpha=alpha, ddf=ddf) if any(map(_is_coefficient, chosen)) else None
    rows, notes = [], []
    for parameter in chosen:
        if coefficients is not None and _is_coefficient(parameter):
            rows.append(coefficients.loc[parameter.name].to_numpy(float))
            continue
        found = transformed_limits(
            parameter.estimate,
            parameter.error,
            quantile,
            (min(parameter.ends), max(parameter.ends)),
        )
        rows.append(found)
        if np.isnan(found).any():
            notes.append(f"{parameter.name} has no Wald limits: {_reason(parameter)}.")
    names = [parameter.name for parameter in chosen]
    frame = Frame(np.reshape(rows, (-1, 2)), index=names, columns=["lower", "upper"])
    frame.attrs["notes"] = tuple(notes)
    return frame


def transformed_limits(
    estimate: float, error: float, quantile: float, ends: tuple[float, float]
) -> np.ndarray:
    """Return Wald limits (2,) by a scale on which a parameter has no ends.

    The standard error moves to the scale by the delta method: the logarithm of the distance to a
    single end, and Fisher's z, the inverse hyperbolic tangent, between two.

    Args:
        estimate: of the parameter.
        error: its standard error.
        quantile: of the normal distribution.
        ends: of the values that the parameter can take.

    Returns:
        The limits, within the ends; NaN at an end, where the scale has no number.

    Example:
        >>> transformed_limits(0.9, 0.05, 1.96, (-1.0, 1.0)).round(3).tolist()
        [0.743, 0.963]
    """
    low, high = ends
    side = np.array([-1.0, 1.0])
    if not (np.isfinite(estimate) and np.isfinite(error) and low < estimate < high):
        return np.full(2, np.nan)
    if np.isfinite([low, high]).all():
        centre, half = 0.5 * (low + high), 0.5 * (high - low)
        at = (estimate - centre) / half
        return np.asarray(
            centre + half * np.tanh(np.arctanh(at) + side * quantile * error / half / (1 - at**2))
        )
    if np.isfinite(low):
        return np.asarray(
            low + (estimate - low) * np.exp(side * quantile * error / (estimate - low))
        )
    if np.isfinite(high):
        return np.asarray(
            high - (high - estimate) * np.exp(-side * quantile * error / (high - estimate))
        )
    return estimate + side * quantile * error


def _reason(parameter: Parameter) -> str:
    if parameter.note:
        return f"it is {parameter.note}"
    if np.isnan(parameter.estimate):
        return "it is undefined"
    if parameter.estimate in parameter.ends:
        return (
            f"its estimate, {parameter.estimate:g}, lies at the boundary of the parameter space; "
            "use method='profile'"
        )
    return "it has no standard error"


def _is_coefficient(parameter: Parameter) -> bool:
    return parameter.kind == "coefficient"


def _bootstrap(
    fit: Fit,
    parameters: str | Sequence[str] | None,
    alpha: float,
    kind: Any = "percentile",
    **options: Any,
) -> pd.DataFrame:
    from ..batch import estimates_of
    from .bootstrap import all_parameters, bootstrap  # here, since it brings the batch solver

    names = list(all_parameters(fit)(estimates_of(fit)))
    asked = [parameters] if isinstance(parameters, str) else parameters
    chosen = names
    if asked is not None:
        coefficients = set(fit.design.x_names)
        groups = {"fixed", "random"}.intersection(asked).difference(names)
        for name in asked:
            if name not in (*names, "fixed", "random"):
                raise ValueError(
                    f"{name!r} is no parameter of the model; use 'fixed', 'random', or some of "
                    + ", ".join(map(repr, names))
                )
        chosen = [
            name
            for name in names
            if name in asked or ("fixed" if name in coefficients else "random") in groups
        ]
    return bootstrap(fit, **options).conf_int(alpha=alpha, kind=kind).loc[chosen]
