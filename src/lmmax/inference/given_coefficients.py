"""The log-likelihood at any coefficients and relative covariance, with exact derivatives.

The solver only ever sees the coefficients that are best given the covariance.  Here both are free
and the residual variance alone is profiled out::

    -2 logL(beta, u) = log|V| + [REML: log|X'V^-1 X|] + d (log 2 pi + 1 + log(q / d)),
    q = (y - X beta)' V^-1 (y - X beta),    D = sum_c u_c G_c

with V relative to the residual variance and ``d = n - p`` (REML) or n (ML).  Everything follows
from the second-order expansion of the whitened cross-product of ``[X y]``
(:func:`lmmax.likelihood.expand`), so nothing here depends on the number of rows.

Source: Lindstrom and Bates (1988), JASA 83, 1014-1022, section 3, for the profiled criterion.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np

from ..compilation import computing
from ..compilation_cache import compilation_cache
from ..compress import Compression
from ..likelihood import block_entries
from ..parameters import pack_triangle
from .sensitivity import expansion


@dataclass(frozen=True, eq=False)
class GivenCovariance:
    """The data seen through one relative covariance, to second order in u.

    X (its p independent columns) and y are in working coordinates: orthonormal columns, y of unit
    length and less a part that X explains.

    Attributes:
        S: whitened cross-product of ``[X y]``, (p + 1, p + 1).
        S_slope: its derivatives in u, (k, p + 1, p + 1).
        S_bend: its second derivatives, (k, k, p + 1, p + 1).
        logdet: ``log|V|``.
        logdet_slope: (k,).
        logdet_bend: (k, k).
        to_working: from the user's coefficients to working ones, (p, p).
        origin: working coefficients that are already out of y, (p,).
        y_scale: length of the user's y in units of the working one.
        n_obs: number of observations, n.
        x_logdet: what the change of X's coordinates adds to ``log|X'V^-1 X| / 2``.
        log_weights: sum of the logarithms of the prior weights.
    """

    S: np.ndarray
    S_slope: np.ndarray
    S_bend: np.ndarray
    logdet: float
    logdet_slope: np.ndarray
    logdet_bend: np.ndarray
    to_working: np.ndarray
    origin: np.ndarray
    y_scale: float
    n_obs: float
    x_logdet: float
    log_weights: float

    @cached_property
    def _inverse(self) -> np.ndarray:
        return np.linalg.inv(self.S[:-1, :-1])

    @cached_property
    def coefficients(self) -> np.ndarray:
        """The generalised least-squares coefficients, (p,)."""
        best = self._inverse @ self.S[:-1, -1] + self.origin
        return np.asarray(np.linalg.solve(self.to_working, best) * self.y_scale)

    @property
    def precision(self) -> np.ndarray:
        """``X'V^-1 X``, (p, p)."""
        return np.asarray(self.to_working.T @ self.S[:-1, :-1] @ self.to_working)

    def cross_product(self, beta: np.ndarray) -> np.ndarray:
        """Return ``X'V^-1 (y - X beta)``, (p,)."""
        residual = (self.S @ self._v(beta))[:-1]
        return np.asarray(self.to_working.T @ residual * self.y_scale)

    def _v(self, beta: np.ndarray) -> np.ndarray:
        """Return v with ``[X y] v`` the residuals, working units."""
        return np.append(self.origin - self.to_working @ beta / self.y_scale, 1.0)

    def _contrasts(self, reml: bool) -> float:
        return self.n_obs - reml * len(self.origin)

    def scale(self, beta: np.ndarray, reml: bool) -> float:
        """Return the residual variance that is best at these coefficients (p,)."""
        v = self._v(beta)
        return float(v @ self.S @ v) * self.y_scale**2 / self._contrasts(reml)

    def log_likelihood(self, beta: np.ndarray, reml: bool) -> float:
        """Return the log-likelihood (restricted if ``reml``) at coefficients (p,)."""
        d = self._contrasts(reml)
        x_logdet = np.linalg.slogdet(self.S[:-1, :-1])[1] + 2.0 * self.x_logdet
        spread = d * (np.log(2.0 * np.pi * self.scale(beta, reml)) + 1.0)
        return -0.5 * float(self.logdet + reml * x_logdet + spread - self.log_weights)

    def score(self, beta: np.ndarray, reml: bool) -> np.ndarray:
        """Return the gradient of the log-likelihood in (beta, u), (p + k,)."""
        d, v = self._contrasts(reml), self._v(beta)
        q = v @ self.S @ v
        x = self.to_working.T @ (self.S @ v)[:-1] / self.y_scale
        u = self.logdet_slope + d * (self.S_slope @ v @ v) / q
        if reml:
            u = u + np.einsum("xy,cyx->c", self._inverse, self.S_slope[:, :-1, :-1])
        return np.append(d * x / q, -0.5 * u)

    def hessian(self, beta: np.ndarray, reml: bool) -> np.ndarray:
        """Return the second derivatives of the log-likelihood in (beta, u), (p + k, p + k)."""
        d, v = self._contrasts(reml), self._v(beta)
        to = self.to_working / self.y_scale
        q, x = v @ self.S @ v, (self.S @ v)[:-1]
        moved = self.S_slope @ v
        slopes = moved @ v
        bend = self.logdet_bend + d * (self.S_bend @ v @ v / q - np.outer(slopes, slopes) / q**2)
        if reml:
            solved = self._inverse @ self.S_slope[:, :-1, :-1]
            bend = bend + np.einsum("xy,cdyx->cd", self._inverse, self.S_bend[..., :-1, :-1])
            bend = bend - np.einsum("cxy,dyx->cd", solved, solved)
        fixed = d * to.T @ (2.0 * np.outer(x, x) / q**2 - self.S[:-1, :-1] / q) @ to
        cross = d * (moved[:, :-1] / q - np.outer(slopes, x) / q**2) @ to
        return np.block([[fixed, cross.T], [cross, -0.5 * bend]])


def given_covariance(
    compression: Compression, D: np.ndarray, directions: np.ndarray
) -> GivenCovariance:
    """Look at the data through a relative covariance.

    Args:
        compression: sufficient statistics; not of the iterative engine.
        D: relative covariance of the random effects, user's units, (q, q).
        directions: the derivatives ``G_c`` of D in u, (k, q, q).
    """
    problem = compression.problem
    A = np.asarray(problem.z_factor)
    with computing(), compilation_cache():
        found = jax.tree.map(np.asarray, expansion(problem, A @ D @ A.T))
    p = int(problem.n_fixed)
    kept = np.append(np.arange(p), len(problem.beta_origin))
    own = block_entries(problem.slices, len(A))
    to = np.array([pack_triangle(A @ G @ A.T)[own] for G in directions]).reshape(-1, len(own)).T

    def seen(matrices: np.ndarray) -> np.ndarray:
        return np.asarray(matrices[..., kept[:, None], kept])

    return GivenCovariance(
        S=seen(found.at.S),
        S_slope=np.tensordot(to.T, seen(found.at.S_slope), 1),
        S_bend=np.einsum("wc,wuxy,ud->cdxy", to, seen(found.S_bend), to, optimize=True),
        logdet=float(found.at.logdet),
        logdet_slope=to.T @ found.at.logdet_slope,
        logdet_bend=to.T @ found.logdet_bend @ to,
        to_working=np.linalg.inv(np.asarray(problem.x_inverse)[:p, :p]),
        origin=np.asarray(problem.beta_origin)[:p],
        y_scale=float(problem.y_scale),
        n_obs=float(problem.n_obs),
        x_logdet=float(problem.x_logdet),
        log_weights=float(problem.log_weights),
    )
