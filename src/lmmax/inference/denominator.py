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

from ..characters import Visible
from ..options import DDF_METHODS, DDF_NAMES, DEFAULT_DDF, Ddf, choose

if TYPE_CHECKING:
    from ..identifiability import Unidentified
    from ..results import Fit

CERTAIN = 1e-14
"""A variance whose own variance, relative to its square, is smaller than this is known: degrees of
freedom beyond that number are rounding, and no test tells them from infinitely many."""
APART = 1e-6
"""Contrasts that leave so much of each other are independent, without a closer look."""


RANGE = 300.0
"""Numbers of more decimal places than this, before or after the point, are not represented."""


class HypothesisError(Visible, ValueError):
    """A hypothesis that does not fit the model's coefficients."""


class AdjustmentWarning(Visible, UserWarning):
    """A method for small samples that has no number for some of what it was asked."""


class JointTest(NamedTuple):
    """A joint test of r contrasts.

    Attributes:
        statistic: the F statistic (for the normal distribution chi-squared over r).
        df_num: r.
        df_den: denominator degrees of freedom, infinite for the chi-squared test.
        pvalue: upper tail probability.
        wald: ``(L beta)' (L cov L')^-1 (L beta)``, of which F is a multiple.
    """

    statistic: float
    df_num: int
    df_den: float
    pvalue: float
    wald: float


class Denominator(ABC):
    """A method for the degrees of freedom, applied to one fit.

    Attributes:
        method: its name.
        to_x: from coordinates in which the columns of X that were kept are orthonormal, or whitened
            ones, to their coefficients, (p, p).
        cov_x: covariance of the coefficients in these coordinates, (p, p).
        limits: why some hypotheses may have no standard error or test (NaN), and the remedy.
    """

    method: str
    to_x: np.ndarray
    cov_x: np.ndarray
    limits: str = ""

    @property
    def cov(self) -> np.ndarray:
        """Covariance of the coefficients of the columns of X that were kept, (p, p)."""
        return self.to_x @ self.cov_x @ self.to_x.T

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
        """Return the standard errors of ``L beta``, (r,); NaN where there is none."""
        variances = self._variances(L @ self.to_x)
        return np.sqrt(np.where(variances >= 0.0, variances, np.nan))

    def _variances(self, x: np.ndarray) -> np.ndarray:
        """Return the variances of contrasts ``x (r, p)``, NaN where there is none."""
        return np.einsum("ij,ij->i", x @ self.cov_x, x)

    def _jointly(self, basis: np.ndarray) -> np.ndarray:
        """Return the covariance of orthonormal contrasts ``(r, p)``, NaN where there is none."""
        return basis @ self.cov_x @ basis.T

    def wald(self, L: np.ndarray, difference: np.ndarray) -> float:
        """Return ``difference' (L cov L')^-1 difference``; NaN unless that is positive definite.

        Raises:
            HypothesisError: if the hypotheses are linearly dependent.
        """
        basis, R, sizes = orthonormal(L @ self.to_x)
        if not np.all(np.abs(np.diag(R)) > APART):
            _check_independent(L)
        V = self._jointly(basis)
        if not np.isfinite(V).all():
            return float("nan")
        unit = np.sqrt(np.where(np.diag(V) > 0.0, np.diag(V), 1.0))
        values, vectors = np.linalg.eigh(V / np.outer(unit, unit))
        if values[0] <= len(V) * np.finfo(float).eps * values[-1]:
            return float("nan")
        along = vectors.T @ (np.linalg.solve(R.T, difference / sizes) / unit)
        return float(np.sum(along**2 / values))


def method_name(ddf: str | None) -> Ddf:
    """Return the name of a method in ``DDF_METHODS``; None for Satterthwaite's.

    Raises:
        ValueError: for an unknown one.
    """
    return DEFAULT_DDF if ddf is None else choose("ddf", ddf, DDF_METHODS, DDF_NAMES)


def representable(scale: float, powers: int) -> bool:
    """Whether a variance to that power, up or down, keeps its digits in double precision."""
    if scale <= 0.0:
        return False
    return not bool(abs(np.log10(scale)) * powers >= RANGE)  # NaN, of fits that failed, stays so


def _check_independent(L: np.ndarray) -> None:
    """Raise unless contrasts (r, p) are linearly independent, each coefficient in its own units."""
    sizes = np.max(np.abs(L), axis=0, initial=0.0)
    scaled = L / np.where(sizes > 0.0, sizes, 1.0)
    rank = int(np.linalg.matrix_rank(scaled / np.linalg.norm(scaled, axis=1, keepdims=True)))
    if rank < len(L):
        raise HypothesisError(
            f"the {len(L)} hypotheses are linearly dependent (rank {rank}); leave out the "
            "redundant ones"
        )


def denominator(fit: Fit, ddf: str | None = None) -> Denominator:
    """Return a method for the degrees of freedom, ready for contrasts of the coefficients.

    Args:
        fit: the fitted model.
        ddf: one of ``DDF_METHODS``; None for Satterthwaite's.

    Raises:
        ValueError: for an unknown method, or one that the model does not allow.

    Example:
        >>> import lmmax
        >>> cake = lmmax.datasets.load("cake")
        >>> fit = lmmax.fit("angle ~ recipe + temp + (1 | recipe:replicate)", cake)
        >>> denominator(fit).degrees(np.eye(4)).round(2).tolist()
        [257.81, 42.0, 42.0, 224.0]
    """
    name = method_name(ddf)
    p = len(fit.estimates.beta)
    to_x = fit.layout.fixed.inverse
    cov_x = fit.estimates.scale * np.asarray(fit.estimates.solution.point.at.beta_inverse)[:p, :p]
    if not np.isfinite(cov_x).all():
        # The fit failed; its tables print all the same.
        return Fixed(name, cov_x, np.full(p, np.nan), to_x)
    if name == "satterthwaite" or name.startswith("kenward-roger"):
        powers = 2 if name == "satterthwaite" else 3
        if not representable(fit.estimates.scale, powers):
            unknown = Fixed(name, cov_x, np.full(p, np.nan), to_x)
            unknown.limits = (
                f"the residual variance, {fit.estimates.scale:.3g}, has no powers in double "
                "precision, which the degrees of freedom need: measure the response in other units"
            )
            return unknown
    found = _denominator(fit, name, cov_x)
    return found if fit.unidentified is None else Partial(found, fit.unidentified)


def _denominator(fit: Fit, name: str, cov_x: np.ndarray) -> Denominator:
    """Return a method as if all variances were identified."""
    from . import between_within, kenward_roger

    p, to_x = len(cov_x), fit.layout.fixed.inverse
    if name == "satterthwaite":
        return Satterthwaite(fit)
    if name in ("kenward-roger", "kenward-roger-linear"):
        return kenward_roger.KenwardRoger(fit, linear=name.endswith("linear"))
    if name == "between-within":
        return Fixed(name, cov_x, between_within.degrees(fit), to_x)
    if name == "residual":
        return Fixed(name, cov_x, np.full(p, float(fit.df_resid)), to_x)
    return Fixed(name, cov_x, np.full(p, np.inf), to_x)


class Partial(Denominator):
    """A method for a fit some of whose variances are not identified.

    Tests of coefficients that depend on them have no number, NaN; the others are the method's own.
    """

    def __init__(self, inner: Denominator, unidentified: Unidentified) -> None:
        """Take the method and what is not identified."""
        self.inner, self.unidentified = inner, unidentified
        self.method, self.limits = inner.method, inner.limits
        self.to_x, self.cov_x = inner.to_x, inner.cov_x

    def errors(self, L: np.ndarray) -> np.ndarray:
        """See :class:`Denominator`."""
        return np.where(self.unidentified.concerns(L), np.nan, self.inner.errors(L))

    def degrees(self, L: np.ndarray) -> np.ndarray:
        """See :class:`Denominator`."""
        return np.where(self.unidentified.concerns(L), np.nan, self.inner.degrees(L))

    def joint(self, L: np.ndarray, difference: np.ndarray) -> JointTest:
        """See :class:`Denominator`."""
        if self.unidentified.concerns_jointly(L):
            return JointTest(np.nan, len(L), np.nan, np.nan, np.nan)
        return self.inner.joint(L, difference)

    def wald(self, L: np.ndarray, difference: np.ndarray) -> float:
        """See :class:`Denominator`."""
        if self.unidentified.concerns_jointly(L):
            return float("nan")
        return self.inner.wald(L, difference)


class Fixed(Denominator):
    """Degrees of freedom that each coefficient has by itself; the least of a contrast's count."""

    def __init__(
        self, method: str, cov_x: np.ndarray, each: np.ndarray, to_x: np.ndarray | None = None
    ) -> None:
        """Take the degrees of freedom of each coefficient, (p,); without to_x cov_x is theirs."""
        self.method, self.cov_x, self.each = method, cov_x, each
        self.to_x = np.eye(len(cov_x)) if to_x is None else to_x

    def degrees(self, L: np.ndarray) -> np.ndarray:
        """See :class:`Denominator`."""
        return np.min(np.where(L != 0.0, self.each, np.inf), axis=1, initial=np.inf)

    def joint(self, L: np.ndarray, difference: np.ndarray) -> JointTest:
        """See :class:`Denominator`."""
        wald = self.wald(L, difference)
        return f_test(wald, len(L), float(np.min(self.degrees(L))))


class Satterthwaite(Denominator):
    """Satterthwaite's method, from the exact derivatives of the coefficients' covariance."""

    method = "satterthwaite"

    def __init__(self, fit: Fit) -> None:
        """Take what is needed from a fit."""
        Phi, P, to_x = fit.covariance_slopes
        self.to_x, self.cov_x = to_x, Phi
        self.slopes = Phi @ P @ Phi
        self.variance_cov = fit.estimates.slope_cov
        self.known = fit.estimates.n_free <= fit.estimates.contrasts

    def degrees(self, L: np.ndarray) -> np.ndarray:
        """See :class:`Denominator`."""
        x = L @ self.to_x
        f = np.einsum("ix,ix->i", x @ self.cov_x, x)
        g = forms(self.slopes, x)
        variance = np.einsum("ic,ic->i", g @ self.variance_cov, g)
        if not self.known:
            return np.full(len(L), np.nan)
        return matched_degrees(f, variance)

    def joint(self, L: np.ndarray, difference: np.ndarray) -> JointTest:
        """See :class:`Denominator`.

        The F statistic is the mean of squares of r uncorrelated t statistics, each with its own
        degrees of freedom; those of F give it the expectation of that mean.
        """
        wald = self.wald(L, difference)
        x = L @ self.to_x
        V = x @ self.cov_x @ x.T
        # Principal axes of L beta as it is given: of the choices that one has, that of lmerTest.
        _, vectors = np.linalg.eigh(V)
        return f_test(wald, len(L), float(combined(self.degrees(vectors.T @ L))))


def forms(A: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the quadratic forms ``x_i' A_c x_i`` (i, c) of rows x (i, p) in matrices (c, p, p)."""
    return np.asarray(((x @ A) * x).sum(axis=-1).T)


def matched_degrees(f: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return the degrees of freedom ``2 f^2 / variance`` of variances f that are uncertain by that.

    Infinite where f is known, as without any free variance parameter: the test is the normal one.
    What is not known either (NaN), of fits that stopped before they converged, stays so.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(variance <= CERTAIN * f**2, np.inf, 2.0 * f**2 / variance)


def combined(nu: np.ndarray) -> np.ndarray:
    """Return the degrees of freedom of a mean of r squared t statistics with nu (..., r) each."""
    first = nu[..., :1]
    with np.errstate(divide="ignore", invalid="ignore"):
        equal = (np.abs(nu - first) < 1e-8 * first).all(-1) | ~np.isfinite(nu).any(-1)
        excess = np.sum(2.0 / (nu - 2.0), axis=-1)
        found = np.where(excess > 0.0, 2.0 * (1.0 + nu.shape[-1] / excess), np.inf)
    found = np.where((nu <= 2.0).any(-1), 2.0, found)
    found = np.where(equal | (nu.shape[-1] == 1), nu[..., 0], found)
    return np.asarray(np.where(np.isnan(nu).any(-1), np.nan, found))


def orthonormal(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an orthonormal basis (r, p) of rows ``x (r, p)``, and R and sizes (r,) of the rows.

    ``x = sizes R' basis``: contrasts of covariates far from zero are nearly parallel, and this
    loses none of the digits that tell them apart.
    """
    sizes = np.linalg.norm(x, axis=1)
    Q, R = np.linalg.qr((x / sizes[:, None]).T)
    return Q.T, R, sizes


def f_test(wald: float, df_num: int, df_den: float, scaling: float = 1.0) -> JointTest:
    """Return the F test of a Wald form; chi-squared where df_den is infinite."""
    F = scaling * wald / df_num
    p = float(f_pvalues(np.asarray(F), df_num, np.asarray(df_den)))
    return JointTest(float(F), df_num, float(df_den), p, float(wald))


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
