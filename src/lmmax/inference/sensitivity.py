"""How the precision of the data moves with the variance parameters, seen through X and y.

With ``Sigma = sum_c tau_c G_c`` the covariance of the data and tau the lower triangle of the
working ``Psi`` row by row, then the scale, inference needs, for ``W = [X y]``::

    P_c = W' Sigma^-1 G_c Sigma^-1 W      Q_cd = W' Sigma^-1 G_c Sigma^-1 G_d Sigma^-1 W
    t_c = tr(Sigma^-1 G_c)                t_cd = tr(Sigma^-1 G_c Sigma^-1 G_d)

All of them follow from the second-order expansion of the whitened cross-product of W and of
``log|V|`` (:func:`lmmax.likelihood.expand`), whose size does not depend on the number of rows, for
one grouping factor and for several.  Those of the scale follow by homogeneity: the scale times its
G is ``Sigma`` less the other terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np

from ..compilation import Compiled, computing
from ..compilation_cache import compilation_cache
from ..compress import Compression, EngineError
from ..compress.iterative import Rows
from ..estimation import Estimates
from ..frames import DataError
from ..likelihood import block_entries, expand
from ..parameters import pack_triangle
from .denominator import representable

expansion = Compiled(expand)
"""The expansion of any problem, compiled once for all that asks for it."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The quantities above at the estimates.

    There are k = q (q + 1) / 2 + 1 entries; those between two grouping factors are zero.  Psi is in
    working coordinates, so that nothing is lost to the origins of covariates, and in the units of
    y.  X is in coordinates in which its columns are orthonormal, y without a part that X explains;
    ``Q`` holds the symmetric part of each matrix, which is all that enters.

    Attributes:
        precision: ``W' Sigma^-1 W``, (p + 1, p + 1).
        P: (k, p + 1, p + 1).
        Q: (k, k, p + 1, p + 1).
        trace: (k,).
        traces: (k, k).
        v: ``[-beta; 1]``, so that ``W v`` are the residuals, (p + 1,).
        to_x: from these coordinates to the coefficients of the columns of X that were kept, (p, p).
    """

    precision: np.ndarray
    P: np.ndarray
    Q: np.ndarray
    trace: np.ndarray
    traces: np.ndarray
    v: np.ndarray
    to_x: np.ndarray

    @cached_property
    def Phi(self) -> np.ndarray:
        """Covariance of the coefficients, ``(X' Sigma^-1 X)^-1``, (p, p)."""
        return np.linalg.inv(self.precision[:-1, :-1])

    @property
    def P_x(self) -> np.ndarray:
        """The part of P that belongs to X, (k, p, p)."""
        return self.P[:, :-1, :-1]

    @property
    def Q_x(self) -> np.ndarray:
        """The part of Q that belongs to X, (k, k, p, p)."""
        return self.Q[:, :, :-1, :-1]

    @cached_property
    def restricted_traces(self) -> np.ndarray:
        """``tr(R G_c R G_d)`` with ``R = Sigma^-1 - Sigma^-1 X Phi X' Sigma^-1``, (k, k)."""
        moved = self.Phi @ self.P_x
        return np.asarray(
            self.traces
            - 2.0 * np.einsum("xy,cdyx->cd", self.Phi, self.Q_x)
            + np.einsum("cxy,dyx->cd", moved, moved)
        )


class CovarianceSlopes(NamedTuple):
    """The covariance of the coefficients and its first derivatives.

    Those are in the entries of cov_re in working coordinates, and the scale: what they give does
    not depend on the covariates' origins.  Of a narrow model (:func:`lmmax.solve.narrow`), in the
    solver's coordinates.

    Attributes:
        Phi: as in a `Sensitivity`, (p, p).
        P_x: (k, p, p); the derivatives of Phi are ``Phi P_c Phi``.
        to_x: as in a `Sensitivity`, (p, p).
    """

    Phi: np.ndarray
    P_x: np.ndarray
    to_x: np.ndarray


def covariance_slopes(compression: Compression, estimates: Estimates) -> CovarianceSlopes:
    """Return what the solver knows of the coefficients' covariance, whichever the engine."""
    problem, at = compression.problem, estimates.solution.point.at
    p, scale = int(problem.n_fixed), estimates.scale
    unscaled = np.asarray(at.beta_inverse)[:p, :p]
    P = -np.asarray(at.x_slope)[:, :p, :p]
    try:
        information = np.linalg.inv(unscaled)
    except np.linalg.LinAlgError:  # a combination is told without any error
        information = np.full_like(unscaled, np.nan)
    to_x = np.asarray(problem.x_inverse)[:p, :p]
    if estimates.narrow:
        P = P / scale
        P[0] += information / scale
        return CovarianceSlopes(Phi=scale * unscaled, P_x=P, to_x=to_x)
    D = estimates.working_root @ estimates.working_root.T
    of_scale = information - np.tensordot(pack_triangle(D), P, 1)
    return CovarianceSlopes(
        Phi=scale * unscaled,
        P_x=np.concatenate([P, of_scale[None]]) / scale**2,
        to_x=to_x,
    )


def sensitivity(compression: Compression, estimates: Estimates) -> Sensitivity:
    """Evaluate the expansion at the estimates.

    Raises:
        EngineError: for the iterative engine, which knows no traces.
        DataError: for a scale whose powers are no numbers of double precision.
    """
    if isinstance(compression.detail, Rows):
        raise EngineError(
            "the iterative engine has no exact traces, which Kenward-Roger tests and information "
            "matrices need; use ddf='satterthwaite', or engine='crossed' where its dense factor "
            "fits into memory"
        )
    if not representable(estimates.scale, 3):
        raise DataError(
            f"the residual variance, {estimates.scale:.3g}, has no third power in double "
            "precision, which information about the variances needs: measure the response in "
            "other units"
        )
    problem = compression.problem
    root = estimates.working_root
    with computing(), compilation_cache():
        found = jax.tree.map(np.asarray, expansion(problem, root @ root.T))
    p = int(problem.n_fixed)
    kept = np.append(np.arange(p), len(problem.beta_origin))
    unit = np.append(np.ones(p), float(problem.y_scale))

    def seen(A: np.ndarray) -> np.ndarray:
        """Return the entries that are not padding, y in the user's units."""
        return np.asarray(A[..., kept[:, None], kept] * np.outer(unit, unit))

    # Entries between factors, which are no parameters, are zero.
    own = block_entries(problem.slices, len(root))
    n, scale, d = float(problem.n_obs), estimates.scale, pack_triangle(root @ root.T)
    S = seen(found.at.S)
    P, Q = np.zeros((len(d), *S.shape)), np.zeros((len(d), len(d), *S.shape))
    trace, traces = np.zeros(len(d)), np.zeros((len(d), len(d)))
    P[own], Q[own[:, None], own] = -seen(found.at.S_slope), 0.5 * seen(found.S_bend)
    trace[own], traces[own[:, None], own] = found.at.logdet_slope, -found.logdet_bend
    P_scale = S - np.tensordot(d, P, 1)
    Q_cross = P - np.tensordot(d, Q, 1)
    Q_scale = P_scale - np.tensordot(d, Q_cross, 1)
    trace_scale = n - d @ trace
    traces_cross = trace - traces @ d
    return Sensitivity(
        precision=S / scale,
        P=np.concatenate([P, P_scale[None]]) / scale**2,
        Q=_bordered(Q, Q_cross, Q_scale) / scale**3,
        trace=np.append(trace, trace_scale) / scale,
        traces=_bordered(traces, traces_cross, trace_scale - d @ traces_cross) / scale**2,
        v=np.append(-np.asarray(estimates.solution.point.at.beta)[:p] * unit[-1], 1.0),
        to_x=np.asarray(problem.x_inverse)[:p, :p],
    )


def _bordered(A: np.ndarray, border: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Put a row and a column around the first two axes of A."""
    upper = np.concatenate([A, border[:, None]], axis=1)
    lower = np.concatenate([border, np.asarray(corner)[None]])
    return np.concatenate([upper, lower[None]])
