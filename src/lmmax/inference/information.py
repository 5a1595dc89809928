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

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..options import choose
from ..parameters import unpack_symmetric
from ..rendering import folded, paragraphs
from ..zero_scale import check_residual
from .arguments import as_fit
from .denominator import AdjustmentWarning
from .inverse import RANK, Inverse, inverted
from .parameters import VarianceParameters

if TYPE_CHECKING:
    from ..results import Fit

KINDS = ("observed", "expected")


def score(fit: Fit) -> np.ndarray:
    """Return the slope of the log-likelihood in (vech of the working Psi, scale)."""
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
    found = joint_information(fit, kind, parameters)
    values = found.forward.T @ found.matrix @ found.forward
    return pd.DataFrame(0.5 * (values + values.T), index=found.names, columns=found.names)


@dataclass(frozen=True, eq=False)
class Information:
    """An information matrix in coordinates whose units and origins are not the user's.

    Attributes:
        names: coefficients that were kept and variance parameters, (k,).
        matrix: in whitened coefficients and steady coordinates, (k, k).
        size: the information that each would have by itself, (k,).
        forward: derivatives of the coordinates in the parameters, (k, k).
        back: those of the parameters in the coordinates, (k, k).
        white: lower triangular, ``white white' = X' Sigma^-1 X`` for orthonormal X, (p, p).
    """

    names: list[str]
    matrix: np.ndarray
    size: np.ndarray
    forward: np.ndarray
    back: np.ndarray
    white: np.ndarray

    @cached_property
    def inverse(self) -> Inverse:
        """The inverse in these coordinates."""
        return inverted(self.matrix, self.size)

    def in_user_units(self, covariance: np.ndarray) -> pd.DataFrame:
        """Return a covariance (k, k) of the parameters; NaN for those that the data do not tell.

        Warns of those that have none because the information is not positive definite.
        """
        values = self.back @ covariance @ self.back.T
        lost = ~self.inverse.tells(self.back)
        if self.inverse.indefinite:
            shown = ", ".join(name for name, none in zip(self.names, lost, strict=True) if none)
            warnings.warn(
                f"no covariance of {shown}: the observed information is not positive definite at "
                "these estimates, as where a variance is zero; cov_params() and varcorr() take "
                "what is zero as given, and kind='expected' is never negative",
                AdjustmentWarning,
                stacklevel=3,
            )
        values[lost] = values[:, lost] = np.nan
        return pd.DataFrame(values, index=self.names, columns=self.names)


def joint_information(fit: Fit, kind: str, parameters: str) -> Information:
    """Return the information of :func:`information` before it is brought to the user's units."""
    kind = choose("kind", kind, KINDS)
    at = fit.sensitivity  # first: it tells of units that have no information
    chosen = _parameters(fit, parameters)
    steady = chosen.steady
    traces = at.restricted_traces if fit.reml else at.traces
    J, p = steady.slope, len(at.to_x)
    # The coefficients whitened, their information is the identity.
    white = np.linalg.cholesky(at.precision[:-1, :-1])
    if kind == "expected":
        own = 0.5 * J.T @ traces @ J
        cross = np.zeros((p, len(own)))
    else:
        forms = at.Q @ at.v @ at.v
        own = J.T @ (forms - 0.5 * traces) @ J - np.tensordot(score(fit), steady.bend, 1)
        cross = np.linalg.solve(white, (at.P @ at.v)[:, :-1].T @ J)
    matrix = np.block([[np.eye(p), cross], [cross.T, own]])
    size = np.concatenate([np.ones(p), 0.5 * np.diag(J.T @ at.traces @ J)])
    nothing = np.zeros((p, len(own)))
    return Information(
        [*(fit.design.x_names[j] for j in fit.layout.fixed.kept), *chosen.names],
        0.5 * (matrix + matrix.T),
        size,
        np.block([[white.T @ fit.layout.fixed.R, nothing], [nothing.T, steady.forward]]),
        np.block([[np.linalg.solve(white, at.to_x.T).T, nothing], [nothing.T, steady.back]]),
        white,
    )


def joint_covariance(fit: Fit, kind: str = "observed", parameters: str = "natural") -> pd.DataFrame:
    """Return the covariance of the estimates of coefficients and variance parameters together.

    The inverse of :func:`information`, whose arguments it has.  Parameters that the data do not
    identify, and coefficients that depend on them, are NaN; so is, with an
    :class:`lmmax.AdjustmentWarning`, what depends on directions in which the observed information
    is negative, as it may be where a variance is zero.  At a singular fit prefer
    :meth:`lmmax.Fit.varcorr`, whose errors take the rank of the covariance as given.

    Example:
        >>> import lmmax
        >>> fit = lmmax.fit("Weight ~ Time + (1 | Pig)", lmmax.datasets.load("dietox"))
        >>> cov = lmmax.joint_covariance(fit)
        >>> round(float(cov.loc["Pig: var(Intercept)", "Pig: var(Intercept)"] ** 0.5), 3)
        6.939
    """
    as_fit(fit)
    found = joint_information(fit, kind, parameters)
    return as_identified(fit, found.in_user_units(found.inverse.covariance))


def as_identified(fit: Fit, covariance: pd.DataFrame) -> pd.DataFrame:
    """Return a joint covariance, NaN for coefficients that depend on what is not identified."""
    if fit.unidentified is not None:
        hidden = np.zeros(len(covariance), dtype=bool)
        p = len(fit.estimates.beta)
        hidden[:p] = fit.unidentified.concerns(np.eye(p))
        covariance.loc[hidden, :] = covariance.loc[:, hidden] = np.nan
    return covariance


def _parameters(fit: Fit, which: str) -> VarianceParameters:
    if choose("parameters", which, ("natural", "theta")) == "natural":
        return fit.natural_parameters
    return fit.theta_parameters


@dataclass(frozen=True, repr=False)
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
        return folded(
            f"Conditional AIC {self.caic:.4f}: conditional log-likelihood {self.llf:.4f}, "
            f"{self.df:.2f} effective degrees of freedom ({self.rho:.2f} with known variances)"
        )

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return paragraphs(str(self))


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
    at, scale, n = fit.sensitivity, fit.estimates.scale, float(fit.nobs)
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

    With A the covariance of the estimates of tau, R as above and ``r_c = R G_c R y``, the slopes of
    tau in y are ``A r``.  The fitted values are y less the residuals ``e = scale N R y``, whose
    slopes in tau are ``-scale N r_c``, and ``e / scale`` more in the scale; N are inverse weights.
    ``scale N R`` leaves the residuals of any response at the variances of the fit.
    """
    from ..fit import residuals_given_variances

    estimates, scale = fit.estimates, fit.estimates.scale
    values, vectors = np.linalg.eigh(estimates.working_variance_cov)
    kept = values > RANK * np.max(values, initial=0.0)
    # Rows of R y, and by group of Z'R y.
    smooth = weights * residuals / scale
    sums = []
    for at, factor in enumerate(fit.layout.factors):
        Z, m = fit.layout.random_columns(at, slice(None)), factor.n_groups
        sums.append((Z, np.stack([np.bincount(factor.codes, z * smooth, m) for z in Z])))
    total = 0.0
    for direction in (vectors[:, kept] * np.sqrt(values[kept])).T:
        change = unpack_symmetric(direction[:-1])
        moved = direction[-1] * residuals / scale
        for here, factor, (Z, by_group) in zip(
            fit.layout.slices, fit.layout.factors, sums, strict=True
        ):
            effects = change[here, here] @ by_group
            if factor.root is not None:
                effects = effects @ factor.root @ factor.root.T
            moved = moved + np.sum(Z * effects[:, factor.codes], axis=0)
        left = residuals_given_variances(fit, moved)
        influence = weights * left / scale
        total += float(influence @ (left - direction[-1] * residuals / scale))
    return total
