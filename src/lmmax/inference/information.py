"""Information about coefficients and variance parameters together, and the conditional AIC.

With r the residuals and in the notation of :mod:`lmmax.inference.sensitivity`, the observed
information of the log-likelihood in (beta, tau) has the blocks::

    X' Sigma^-1 X      X' Sigma^-1 G_c Sigma^-1 r
                       r' Sigma^-1 G_c Sigma^-1 G_d Sigma^-1 r - t_cd / 2

and the expected one ``X' Sigma^-1 X``, zero, and ``t_cd / 2``.  Under REML ``tr(R G_c R G_d)``
takes the place of ``t_cd``: that is the restricted likelihood with beta in its residual sum of
squares, which has its maximum at the estimates; with beta profiled out it is the restricted
likelihood itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..parameters import unpack_symmetric
from ..zero_scale import check_residual
from .arguments import as_fit
from .parameters import VarianceParameters

if TYPE_CHECKING:
    from ..results import Fit

KINDS = ("observed", "expected")
STEP = 1e-4
"""Step of differences in the variance parameters, in standard errors."""


def score(fit: Fit) -> np.ndarray:
    """Return the slope of the log-likelihood in (vech Psi, scale), (q (q + 1) / 2 + 1,)."""
    at = fit.sensitivity
    total = np.einsum("x,cxy,y->c", at.v, at.P, at.v) - at.trace
    if fit.reml:
        total = total + np.einsum("xy,cyx->c", at.Phi, at.P_x)
    return np.asarray(0.5 * total)


def information(fit: Fit, kind: str = "observed", parameters: str = "natural") -> pd.DataFrame:
    """Return the information matrix of coefficients and variance parameters.

    Twice the observed one is the Hessian of the criterion, -2 log-likelihood.

    Args:
        fit: the fitted model.
        kind: "observed" or "expected".
        parameters: "natural" (variances, covariances, scale) or "theta" (relative factors, scale).

    Returns:
        A square data frame: the coefficients that were kept, then the variance parameters that were
        estimated.

    Raises:
        ValueError: for an unknown kind or unknown parameters.
        EngineError: for the iterative engine.

    Example:
        >>> import lmmax
        >>> fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", lmmax.datasets.load("dyestuff"))
        >>> lmmax.information(fit, "expected").index.tolist()
        ['Intercept', 'Batch: var(Intercept)', 'scale']

    Source: Lindstrom and Bates (1988), JASA 83, 1014-1022; Harville (1977), JASA 72, 320-338.
    """
    as_fit(fit)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; use 'observed' or 'expected'")
    chosen, at = _parameters(fit, parameters), fit.sensitivity
    to_own = np.linalg.inv(at.to_x)
    traces = at.restricted_traces if fit.reml else at.traces
    J = chosen.slope
    if kind == "expected":
        own = 0.5 * J.T @ traces @ J
        cross = np.zeros((len(to_own), len(own)))
    else:
        forms = np.einsum("x,cdxy,y->cd", at.v, at.Q, at.v, optimize=True)
        own = J.T @ (forms - 0.5 * traces) @ J - np.tensordot(score(fit), chosen.bend, 1)
        cross = to_own.T @ (at.P @ at.v)[:, :-1].T @ J
    fixed = to_own.T @ at.precision[:-1, :-1] @ to_own
    names = [*(fit.design.x_names[j] for j in fit.layout.fixed.kept), *chosen.names]
    values = np.block([[fixed, cross], [cross.T, own]])
    return pd.DataFrame(0.5 * (values + values.T), index=names, columns=names)


def joint_covariance(fit: Fit, kind: str = "observed", parameters: str = "natural") -> pd.DataFrame:
    """Return the covariance of the estimates of coefficients and variance parameters together.

    The inverse of :func:`information`, whose arguments it has.  Directions in which it has no
    curvature (over-parametrised models) are left out; at a singular fit prefer
    :meth:`lmmax.Fit.varcorr`, whose errors take the rank of the covariance as given.

    Example:
        >>> import lmmax
        >>> fit = lmmax.fit("Weight ~ Time + (1 | Pig)", lmmax.datasets.load("dietox"))
        >>> cov = lmmax.joint_covariance(fit)
        >>> round(float(cov.loc["Pig: var(Intercept)", "Pig: var(Intercept)"] ** 0.5), 3)
        6.939
    """
    matrix = information(fit, kind, parameters)
    unit = np.sqrt(np.maximum(np.abs(np.diag(matrix)), np.finfo(float).tiny))
    inverse = np.linalg.pinv(matrix / np.outer(unit, unit), rcond=1e-10, hermitian=True)
    return pd.DataFrame(inverse / np.outer(unit, unit), index=matrix.index, columns=matrix.columns)


def _parameters(fit: Fit, which: str) -> VarianceParameters:
    if which == "natural":
        return fit.natural_parameters
    if which == "theta":
        return fit.theta_parameters
    raise ValueError(f"parameters={which!r} is unknown; use 'natural' or 'theta'")


@dataclass(frozen=True)
class ConditionalAIC:
    """The AIC for predictions within the groups at hand.

    Attributes:
        caic: ``-2 llf + 2 (df + 1)``, one for the scale.
        llf: conditional log-likelihood, given the predicted random effects.
        df: effective degrees of freedom, with the correction.
        rho: the same with the variances taken as known: the trace of the matrix that maps the
            response to its fitted values.
    """

    caic: float
    llf: float
    df: float
    rho: float

    def __str__(self) -> str:
        return (
            f"Conditional AIC {self.caic:.4f}: conditional log-likelihood {self.llf:.4f}, "
            f"{self.df:.2f} effective degrees of freedom ({self.rho:.2f} with known variances)"
        )


def conditional_aic(fit: Fit, correction: bool = True) -> ConditionalAIC:
    """Return the conditional AIC of a fit.

    The usual AIC asks how a model does for new groups; this one for new observations of the groups
    in the data.  A variance of zero costs nothing, so that it can decide about random effects.

    Args:
        fit: the fitted model.
        correction: count that the variances were estimated (Greven and Kneib, 2010); otherwise
            they are taken as known (Vaida and Blanchard, 2005), which favours random effects.

    Raises:
        EngineError: for the iterative engine.
        ValueError: if the residual variance went to zero, where that likelihood is infinite.

    Example:
        >>> import lmmax
        >>> sleep = lmmax.datasets.load("sleepstudy")
        >>> fit = lmmax.fit("Reaction ~ Days + (1 + Days | Subject)", sleep)
        >>> found = lmmax.conditional_aic(fit)
        >>> round(found.caic, 2), round(found.df, 2), round(found.rho, 2)
        (1711.52, 30.25, 29.02)

    Source: Vaida and Blanchard (2005), Biometrika 92, 351-370; Greven and Kneib (2010), Biometrika
    97, 773-789, whose correction is ``tr(d fitted / d y)``.
    """
    as_fit(fit)
    check_residual(fit.estimates, "the conditional likelihood")
    at, scale, n = fit.sensitivity, fit.scale, float(fit.nobs)
    rho = n - scale * (at.trace[-1] - float(np.sum(at.Phi * at.P_x[-1])))
    weights = np.ones(fit.nobs) if fit.design.weights is None else fit.design.weights
    residuals = fit.resid.to_numpy()
    llf = -0.5 * (
        n * np.log(2.0 * np.pi * scale)
        - np.sum(np.log(weights))
        + np.sum(weights * residuals**2) / scale
    )
    df = rho + (_estimation(fit, weights, residuals) if correction else 0.0)
    return ConditionalAIC(float(-2.0 * llf + 2.0 * (df + 1.0)), float(llf), float(df), float(rho))


def _estimation(fit: Fit, weights: np.ndarray, residuals: np.ndarray) -> float:
    """Return what estimating the variances adds to ``tr(d fitted / d y)``.

    With A the covariance of the estimates of tau and R as above, ``d tau / dy = A (R G R y)``, and
    the fitted values are y less ``e = scale G_scale R y``, the residuals.  Along the columns of a
    root of A, e is differenced.
    """
    from ..fit import refit_settings

    values, vectors = np.linalg.eigh(fit.estimates.variance_cov)
    kept = values > 1e-14 * max(values[-1], np.finfo(float).tiny)
    total, Psi = 0.0, fit.cov_re.to_numpy()
    inside = np.zeros_like(Psi)
    for term in fit.terms:
        inside[term.columns, term.columns] = 1.0 if term.pattern is None else term.pattern
    for direction in (vectors[:, kept] * np.sqrt(values[kept])).T:
        change, of_scale = unpack_symmetric(direction[:-1]), direction[-1]
        ends = []
        for step in (STEP, -STEP):
            moved = _nearest(Psi + step * change) * inside
            fix = {"cov_re": moved, "scale": fit.scale + step * of_scale}
            ends.append(refit_settings(fit, fix=fix, start=None).resid.to_numpy())
        slope = (ends[0] - ends[1]) / (2.0 * STEP)  # of e
        # R G R y in this direction, from e = scale R0 R y.
        influence = weights * (of_scale * residuals / fit.scale - slope) / fit.scale
        total -= float(influence @ slope)
    return total


def _nearest(Psi: np.ndarray) -> np.ndarray:
    """Return the nearest positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(Psi)
    return np.asarray((vectors * np.maximum(values, 0.0)) @ vectors.T)
