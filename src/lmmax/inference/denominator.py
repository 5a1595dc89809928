"""Degrees of freedom and covariances for tests of the coefficients in small samples.

For a single contrast ``l'beta`` with variance ``f(tau) = l' Phi(tau) l``, Satterthwaite's (1946)
degrees of freedom are ``2 f^2 / (g' A g)`` with g the gradient of f and A the covariance of the
variance parameters, here the inverse of their observed information, as in lmerTest (Kuznetsova,
Brockhoff and Christensen, 2017, J. Stat. Softw. 82(13)).  Kenward and Roger (1997, Biometrics 53,
983-997) inflate Phi by the bias that estimating tau gives it, and choose scale and degrees of
freedom of an F distribution by two moments of the Wald statistic, with the expected information, as
in pbkrtest (Halekoh and Hojsgaard, 2014, J. Stat. Softw. 59(9)).

At a boundary Satterthwaite's method takes the rank of a singular covariance as known: a variance of
zero, at which f has no slope, adds nothing.  Kenward and Roger's needs no optimum in tau, only the
expected information, and counts every natural parameter, those at the boundary too.  Both are what
lmerTest and pbkrtest do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ..results import Fit

METHODS = (
    "satterthwaite",
    "kenward-roger",
    "kenward-roger-linear",
    "between-within",
    "residual",
    "normal",
)
DEFAULT = "satterthwaite"


class HypothesisError(ValueError):
    """A hypothesis that does not fit the model's coefficients."""


class JointTest(NamedTuple):
    """A joint test of r contrasts.

    Attributes:
        statistic: the F statistic (for the normal distribution chi-squared over r).
        df_num: r.
        df_den: denominator degrees of freedom, infinite for the chi-squared test.
        pvalue: upper tail probability.
    """

    statistic: float
    df_num: int
    df_den: float
    pvalue: float


class Denominator(ABC):
    """A method for the degrees of freedom, applied to one fit.

    Attributes:
        method: its name.
        cov: covariance of the coefficients of the columns of X that were kept, (p, p).
    """

    method: str
    cov: np.ndarray

    @abstractmethod
    def degrees(self, L: np.ndarray) -> np.ndarray:
        """Return the degrees of freedom of each contrast, a row of ``L (r, p)``, on its own."""

    @abstractmethod
    def joint(self, L: np.ndarray, difference: np.ndarray) -> JointTest:
        """Test ``L beta`` jointly.

        Args:
            L: contrasts, (r, p), linearly independent.
            difference: ``L beta`` less its hypothetical value, (r,).
        """

    def errors(self, L: np.ndarray) -> np.ndarray:
        """Return the standard errors of ``L beta``, (r,)."""
        return np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", L, self.cov, L), 0.0))


def denominator(fit: Fit, ddf: str | None = None) -> Denominator:
    """Return a method for the degrees of freedom, ready for contrasts of the coefficients.

    Args:
        fit: the fitted model.
        ddf: one of ``METHODS``; None for Satterthwaite's.

    Raises:
        ValueError: for an unknown method, or one that the model does not allow.

    Example:
        >>> import lmmax
        >>> cake = lmmax.datasets.load("cake")
        >>> fit = lmmax.fit("angle ~ recipe + temp + (1 | recipe:replicate)", cake)
        >>> denominator(fit).degrees(np.eye(4)).round(2).tolist()
        [257.81, 42.0, 42.0, 224.0]
    """
    from . import between_within, kenward_roger

    name = DEFAULT if ddf is None else ddf
    if name not in METHODS:
        raise ValueError(f"ddf={ddf!r} is unknown; use one of {', '.join(map(repr, METHODS))}")
    beta_cov = fit.estimates.scale * fit.estimates.beta_unscaled
    if not np.isfinite(beta_cov).all():
        # The fit failed; its tables print all the same.
        return Fixed(name, beta_cov, np.full(len(beta_cov), np.nan))
    if name == "satterthwaite":
        return Satterthwaite(fit)
    if name in ("kenward-roger", "kenward-roger-linear"):
        return kenward_roger.KenwardRoger(fit, linear=name.endswith("linear"))
    if name == "between-within":
        return Fixed(name, beta_cov, between_within.degrees(fit))
    if name == "residual":
        return Fixed(name, beta_cov, np.full(len(beta_cov), float(fit.df_resid)))
    return Fixed(name, beta_cov, np.full(len(beta_cov), np.inf))


class Fixed(Denominator):
    """Degrees of freedom that each coefficient has by itself; the least of a contrast's count."""

    def __init__(self, method: str, cov: np.ndarray, each: np.ndarray) -> None:
        """Take the degrees of freedom of each coefficient, (p,)."""
        self.method, self.cov, self.each = method, cov, each

    def degrees(self, L: np.ndarray) -> np.ndarray:
        """See :class:`Denominator`."""
        return np.min(np.where(L != 0.0, self.each, np.inf), axis=1)

    def joint(self, L: np.ndarray, difference: np.ndarray) -> JointTest:
        """See :class:`Denominator`."""
        F = wald_form(L @ self.cov @ L.T, difference) / len(L)
        return f_test(F, len(L), float(np.min(self.degrees(L))))


class Satterthwaite(Denominator):
    """Satterthwaite's method, from the exact derivatives of the coefficients' covariance."""

    method = "satterthwaite"

    def __init__(self, fit: Fit) -> None:
        """Take what is needed from a fit."""
        Phi, P, to_x = fit.covariance_slopes
        self.to_x, self.Phi = to_x, Phi
        self.cov = to_x @ Phi @ to_x.T
        self.slopes = np.einsum("xy,cyz,zw->cxw", Phi, P, Phi, optimize=True)
        self.variance_cov = fit.estimates.working_variance_cov
        self.known = fit.estimates.n_free <= fit.estimates.contrasts

    def degrees(self, L: np.ndarray) -> np.ndarray:
        """See :class:`Denominator`."""
        x = L @ self.to_x
        f = np.einsum("ix,xy,iy->i", x, self.Phi, x)
        g = np.einsum("ix,cxy,iy->ic", x, self.slopes, x, optimize=True)
        variance = np.einsum("ic,cd,id->i", g, self.variance_cov, g)
        if not self.known:
            return np.full(len(L), np.nan)
        # Without any free variance parameter the variance is known, and the test is the normal one.
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(variance > 0.0, 2.0 * f**2 / variance, np.inf)

    def joint(self, L: np.ndarray, difference: np.ndarray) -> JointTest:
        """See :class:`Denominator`.

        The F statistic is the mean of squares of r uncorrelated t statistics, each with its own
        degrees of freedom; those of F give it the expectation of that mean.
        """
        V = L @ self.cov @ L.T
        F = wald_form(V, difference) / len(L)
        # Principal axes of L beta as it is given: of the choices that one has, that of lmerTest.
        _, vectors = np.linalg.eigh(V)
        return f_test(F, len(L), float(combined(self.degrees(vectors.T @ L))))


def combined(nu: np.ndarray) -> np.ndarray:
    """Return the degrees of freedom of a mean of r squared t statistics with nu (..., r) each."""
    first = nu[..., :1]
    with np.errstate(divide="ignore", invalid="ignore"):
        equal = (np.abs(nu - first) < 1e-8 * first).all(-1) | ~np.isfinite(nu).any(-1)
        excess = np.sum(2.0 / (nu - 2.0), axis=-1)
        found = np.where(excess > 0.0, 2.0 * (1.0 + nu.shape[-1] / excess), np.inf)
    found = np.where((nu <= 2.0).any(-1), 2.0, found)
    return np.asarray(np.where(equal | (nu.shape[-1] == 1), nu[..., 0], found))


def wald_form(V: np.ndarray, difference: np.ndarray) -> float:
    """Return ``difference' V^-1 difference``.

    Raises:
        HypothesisError: if V is singular.
    """
    unit = np.sqrt(np.diag(V))
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = V / np.outer(unit, unit)
    if not np.isfinite(scaled).all():
        return float("nan")
    rank = int(np.linalg.matrix_rank(scaled, hermitian=True))
    if rank < len(V):
        raise HypothesisError(
            f"the {len(V)} hypotheses are linearly dependent (rank {rank}); leave out the "
            "redundant ones"
        )
    scaled_difference = difference / unit
    return float(scaled_difference @ np.linalg.solve(scaled, scaled_difference))


def f_test(F: float, df_num: int, df_den: float) -> JointTest:
    """Return the test of an F statistic; chi-squared where df_den is infinite."""
    p = float(f_pvalues(np.asarray(F), df_num, np.asarray(df_den)))
    return JointTest(float(F), df_num, float(df_den), p)


def f_pvalues(F: np.ndarray, df_num: int, df_den: np.ndarray) -> np.ndarray:
    """Return upper tails of F statistics; of chi-squared ones where df_den is infinite."""
    from scipy import special

    finite = np.where(np.isinf(df_den), 1.0, df_den)
    return np.where(
        np.isinf(df_den),
        special.chdtrc(df_num, df_num * F),
        special.fdtrc(df_num, finite, F),
    )


def t_pvalues(t: np.ndarray, df: np.ndarray) -> np.ndarray:
    """Return two-sided p-values of t statistics; of normal ones where df is infinite."""
    from scipy import special

    finite = np.where(np.isinf(df), 1.0, df)
    t = np.abs(t)
    return np.where(np.isinf(df), 2.0 * special.ndtr(-t), 2.0 * special.stdtr(finite, -t))


def t_quantiles(alpha: float, df: np.ndarray) -> np.ndarray:
    """Return the upper ``alpha / 2`` quantiles of t distributions.

    Raises:
        ValueError: if alpha does not lie between 0 and 1.
    """
    from scipy import special

    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha={alpha!r} must lie between 0 and 1 (0.05 for 95% limits)")
    finite = np.where(np.isinf(df), 1.0, df)
    normal = special.ndtri(1.0 - 0.5 * alpha)
    return np.where(np.isinf(df), normal, special.stdtrit(finite, 1.0 - 0.5 * alpha))
