"""Confidence limits of all parameters of a model: by profile, by standard errors, by simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .arguments import as_fit
from .charts import Charts, Parameter
from .profile import cutoff_of, profile_limits, select

if TYPE_CHECKING:
    from ..results import Fit

METHODS = ("profile", "wald", "bootstrap")


def confint(
    fit: Fit,
    parameters: str | Sequence[str] | None = None,
    method: str = "profile",
    alpha: float = 0.05,
    **options: Any,
) -> pd.DataFrame:
    """Return confidence limits of coefficients and variance parameters.

    Args:
        fit: the fitted model.
        parameters: names, "fixed", "random", a sequence of these, or None for all; see
            :func:`lmmax.profile`.
        method: "profile", limits of the likelihood profile; "wald", coefficients by
            :meth:`lmmax.Fit.conf_int`, and for variance parameters the estimate minus and plus a
            normal quantile times the standard error, on the scale of standard deviations and
            correlations (symmetric, so that they may leave the parameter space); "bootstrap",
            percentiles of the parametric bootstrap.
        alpha: one minus the level.
        **options: for "wald" ``ddf`` of :meth:`lmmax.Fit.conf_int`; for "bootstrap" those of
            :func:`lmmax.bootstrap` and ``kind`` of its limits.

    Returns:
        A row per parameter, ``lower`` and ``upper``; NaN where there is no limit.  Profile limits
        end at the boundary of the parameter space where the criterion rises too little before it;
        ``frame.attrs["notes"]`` says where, and why others are missing.

    Raises:
        ValueError: for an unknown name or method, or alpha outside (0, 1).
        TypeError: for an option that the method does not take.
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
        batch: sd(Intercept)      -0.501  3.076
        batch:cask: sd(Intercept)  1.967  3.841
        sigma                      0.615  1.032
    """
    as_fit(fit)
    cutoff_of(alpha)
    allowed = {"profile": (), "wald": ("ddf",)}.get(method)
    if method not in METHODS:
        raise ValueError(
            f"method={method!r} is unknown; use one of {', '.join(map(repr, METHODS))}"
        )
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
    fit: Fit, parameters: str | Sequence[str] | None, alpha: float, ddf: str | None = None
) -> pd.DataFrame:
    charts = Charts(fit)
    chosen = select(charts, parameters)
    quantile = cutoff_of(alpha)
    coefficients = fit.conf_int(alpha, ddf) if any(map(_is_coefficient, chosen)) else None
    rows = []
    for parameter in chosen:
        if coefficients is not None and _is_coefficient(parameter):
            rows.append(coefficients.loc[parameter.name].to_numpy(float))
        else:
            half = quantile * parameter.error
            rows.append(np.array([parameter.estimate - half, parameter.estimate + half]))
    names = [parameter.name for parameter in chosen]
    return pd.DataFrame(np.reshape(rows, (-1, 2)), index=names, columns=["lower", "upper"])


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
    return bootstrap(fit, **options).conf_int(alpha, kind=kind).loc[chosen]
