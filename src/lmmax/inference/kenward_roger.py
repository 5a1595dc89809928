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

from .denominator import Denominator, JointTest, f_test, forms, matched_degrees, orthonormal
from .inverse import inverted

if TYPE_CHECKING:
    from ..results import Fit

LARGEST = 4.0
"""Second derivatives that change a variance by more than this multiple of it correct nothing: they
grow without bounds towards a variance of zero, where the expansion that they belong to ends."""


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
        at, steady = fit.sensitivity, fit.natural_parameters.steady
        J = steady.slope
        self.to_x, self.Phi = at.to_x, at.Phi
        self.P = np.tensordot(J.T, at.P_x, 1)
        Q = np.tensordot(J, np.tensordot(J, at.Q_x, (0, 0)), (0, 1))
        self.inverse = inverted(
            0.5 * J.T @ at.restricted_traces @ J, 0.5 * np.diag(J.T @ at.traces @ J)
        )
        self.W = self.inverse.covariance
        weighted = np.tensordot(self.W, self.P, 1)
        middle = np.tensordot(self.W, Q, 2) - (self.P @ self.Phi @ weighted).sum(axis=0)
        adjusted = self.Phi + 2.0 * self.Phi @ middle @ self.Phi
        self.cov_x = self.linear = 0.5 * (adjusted + adjusted.T)
        if not linear and np.any(steady.bend):
            curved = np.tensordot(np.einsum("ij,cij->c", self.W, steady.bend), at.P_x, 1)
            self.cov_x = self.linear - 0.5 * self.Phi @ curved @ self.Phi
            self.limits = (
                "the second derivatives of the covariance structure leave no positive variance, do "
                "not exist, or change it several times over; ddf='kenward-roger-linear' is without "
                "them"
            )

    def _variances(self, x: np.ndarray) -> np.ndarray:
        """See :class:`Denominator`."""
        variances = super()._variances(x)
        linear = np.einsum("ij,ij->i", x @ self.linear, x)
        sound = (variances > 0.0) & (np.abs(variances - linear) <= LARGEST * linear)
        return np.where(sound, variances, np.nan)

    def _jointly(self, basis: np.ndarray) -> np.ndarray:
        """See :class:`Denominator`."""
        V, linear = super()._jointly(basis), basis @ self.linear @ basis.T
        if np.isfinite(V).all():
            white = np.linalg.inv(np.linalg.cholesky(linear))
            values = np.linalg.eigvalsh(white @ V @ white.T)
            if values[0] > 0.0 and values[-1] <= 1.0 + LARGEST:
                return V
        return np.full_like(V, np.nan)

    def degrees(self, L: np.ndarray) -> np.ndarray:
        """See :class:`Denominator`; for one contrast the two moments give ``2 f^2 / (g'Wg)``."""
        x = L @ self.to_x @ self.Phi
        f = np.einsum("ix,ix->i", x, L @ self.to_x)
        g = forms(self.P, x)
        df = matched_degrees(f, np.einsum("ic,ic->i", g @ self.W, g))
        return np.where(self.inverse.tells(g), df, np.nan)

    def joint(self, L: np.ndarray, difference: np.ndarray) -> JointTest:
        """See :class:`Denominator`; the F statistic is scaled by lambda."""
        r = len(L)
        wald = self.wald(L, difference)
        if r == 1:
            return f_test(wald, 1, float(self.degrees(L)[0]))
        scaling, df = self._moments(orthonormal(L @ self.to_x)[0])
        return f_test(wald, r, df, scaling)

    def _moments(self, x: np.ndarray) -> tuple[float, float]:
        """Return lambda and the denominator degrees of freedom for contrasts x (r, p).

        Kenward and Roger (1997), section 3: the moments are matched so that both are exact where
        the statistic has an exact F distribution.
        """
        r = len(x)
        V = x @ self.Phi @ x.T
        half = np.linalg.solve(np.linalg.cholesky(V), x @ self.Phi)
        # Theta Phi P_i Phi in the coordinates of the contrasts, (k, r, r).
        M = half @ self.P @ half.T
        first = np.einsum("caa->c", M)
        A1 = float(first @ self.W @ first)
        A2 = float(np.vdot(np.tensordot(self.W, M, 1), M.swapaxes(1, 2)))
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
