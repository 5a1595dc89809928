"""Kenward and Roger's adjusted covariance and F tests.

In the notation of :mod:`lmmax.inference.sensitivity`, with ``W`` the inverse of the expected
information ``tr(R G_i R G_j) / 2`` of the restricted likelihood::

    Phi_A = Phi + 2 Phi [sum_ij W_ij (Q_ij - P_i Phi P_j - R_ij / 4)] Phi

where ``R_ij = X' Sigma^-1 (d^2 Sigma / dtau_i dtau_j) Sigma^-1 X`` is zero but for covariance
structures; "kenward-roger-linear" leaves it out, as the first-order method of SAS does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .denominator import Denominator, JointTest, f_test, wald_form

if TYPE_CHECKING:
    from ..results import Fit


class KenwardRoger(Denominator):
    """The method applied to one fit by REML.

    Raises:
        ValueError: for a fit by maximum likelihood.
        EngineError: for the iterative engine.
    """

    def __init__(self, fit: Fit, linear: bool = False) -> None:
        """Compute the adjusted covariance; ``linear`` leaves out second derivatives of Sigma."""
        self.method = "kenward-roger-linear" if linear else "kenward-roger"
        if not fit.reml:
            raise ValueError(
                f"ddf={self.method!r} is defined for REML fits, whose bias it corrects, and this "
                "one is by maximum likelihood; fit with reml=True, or use ddf='satterthwaite'"
            )
        known = fit.unidentified
        if known is not None and not linear and known.directions[known.n_entries + 1 :].any():
            raise ValueError(
                f"ddf={self.method!r} depends on the parameters of covariance structures, of which "
                "the data do not identify all; use ddf='kenward-roger-linear', or 'satterthwaite'"
            )
        at, parameters = fit.sensitivity, fit.natural_parameters
        J = parameters.slope
        self.to_x, self.Phi = at.to_x, at.Phi
        self.P = np.tensordot(J.T, at.P_x, 1)
        Q = np.einsum("ci,cdxy,dj->ijxy", J, at.Q_x, J, optimize=True)
        self.W = _inverse(0.5 * J.T @ at.restricted_traces @ J, parameters.free)
        middle = np.einsum("ij,ijxy->xy", self.W, Q)
        middle = middle - np.einsum("ij,ixy,yz,jzw->xw", self.W, self.P, self.Phi, self.P,
                                    optimize=True)  # fmt: skip
        if not linear:
            curved = np.einsum("ij,cij->c", self.W, parameters.bend)
            middle = middle - 0.25 * np.tensordot(curved, at.P_x, 1)
        adjusted = self.Phi + 2.0 * self.Phi @ middle @ self.Phi
        self.cov = at.to_x @ (0.5 * (adjusted + adjusted.T)) @ at.to_x.T

    def degrees(self, L: np.ndarray) -> np.ndarray:
        """See :class:`Denominator`; for one contrast the two moments give ``2 f^2 / (g'Wg)``."""
        x = L @ self.to_x @ self.Phi
        f = np.einsum("ix,ix->i", x, L @ self.to_x)
        g = np.einsum("ix,cxy,iy->ic", x, self.P, x, optimize=True)
        variance = np.einsum("ic,cd,id->i", g, self.W, g)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(variance > 0.0, 2.0 * f**2 / variance, np.inf)

    def joint(self, L: np.ndarray, difference: np.ndarray) -> JointTest:
        """See :class:`Denominator`; the F statistic is scaled by lambda."""
        r = len(L)
        F = wald_form(L @ self.cov @ L.T, difference) / r
        if r == 1:
            return f_test(F, 1, float(self.degrees(L)[0]))
        scaling, df = self._moments(L @ self.to_x)
        return f_test(scaling * F, r, df)

    def _moments(self, x: np.ndarray) -> tuple[float, float]:
        """Return lambda and the denominator degrees of freedom for contrasts x (r, p).

        Kenward and Roger (1997), section 3: the moments are matched so that both are exact where
        the statistic has an exact F distribution.
        """
        r = len(x)
        V = x @ self.Phi @ x.T
        half = np.linalg.solve(np.linalg.cholesky(V), x @ self.Phi)
        # Theta Phi P_i Phi in the coordinates of the contrasts, (k, r, r).
        M = np.einsum("ax,cxy,by->cab", half, self.P, half, optimize=True)
        first = np.einsum("caa->c", M)
        A1 = float(first @ self.W @ first)
        A2 = float(np.einsum("cd,cab,dba->", self.W, M, M))
        if A2 <= 0.0:
            return 1.0, np.inf
        B = (A1 + 6.0 * A2) / (2.0 * r)
        g = ((r + 1.0) * A1 - (r + 4.0) * A2) / ((r + 2.0) * A2)
        common = 3.0 * r + 2.0 * (1.0 - g)
        c1, c2, c3 = g / common, (r - g) / common, (r + 2.0 - g) / common
        expectation = 1.0 / (1.0 - A2 / r)
        variance = 2.0 / r * (1.0 + c1 * B) / ((1.0 - c2 * B) ** 2 * (1.0 - c3 * B))
        rho = variance / (2.0 * expectation**2)
        df = 4.0 + (r + 2.0) / (r * rho - 1.0)
        return df / (expectation * (df - 2.0)), df


def _inverse(information: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Return a (pseudo-)inverse of the information, whatever the parameters' units.

    Args:
        information: the matrix, (k, k).
        free: parameters that are enough to describe what is identified, (k,): with the others
            held it is a generalised inverse, and all of these serve what is identified alike.
    """
    inside = np.ix_(free, free)
    unit = np.sqrt(np.maximum(np.diag(information)[free], np.finfo(float).tiny))
    inverse = np.zeros_like(information)
    inverse[inside] = np.linalg.pinv(
        information[inside] / np.outer(unit, unit), rcond=1e-10, hermitian=True
    ) / np.outer(unit, unit)
    return inverse
