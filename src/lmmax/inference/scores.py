"""Score contributions: what each independent cluster adds to the slope of the log-likelihood.

With ``V_i`` the covariance of a cluster relative to the scale s, ``r_i = y_i - X_i beta``, and
``p_g = Z_g' V_i^-1 r_i``, ``K_g = Z_g' V_i^-1 Z_g``, ``B_g = Z_g' V_i^-1 X_i`` per group::

    beta    X_i' V_i^-1 r_i / s
    Psi     tr(E S) / 2,   S = sum_g [p_g p_g' / s - K_g + B_g (X'V^-1 X)^-1 B_g'] / s

for a direction E of the random effects' covariance Psi.  The last part of S belongs to REML, as do
its like for the scale: ``tr(P dV)`` is itself a sum over clusters, so that REML has contributions
too.  Each has expectation zero where the model is true, and over clusters they add up to the
gradient of the criterion that was maximised.

The scale follows from the others, since multiplying s and Psi by 1 + t multiplies the covariance
of the data.

Source: Wang and Merkle (2018), J. Stat. Softw. 87 (Code Snippet 1), for maximum likelihood; Searle,
Casella and McCulloch (1992), Variance Components, ch. 6, for ``tr(P dV)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from ..parameters import pack_triangle
from .arguments import as_fit
from .clusters import Batch, Clusters, batches, factor_roots, find_clusters, principal_axes
from .information import as_identified, joint_information
from .tree import Levels

if TYPE_CHECKING:
    from ..results import Fit

STEP = 1e-30
"""Imaginary: nothing is subtracted, so that the step may be so small that its square is nothing."""


def scores(fit: Fit, cluster: Any = None, *, reml: bool | None = None) -> pd.DataFrame:
    """Return the contribution of each cluster to the gradient of the log-likelihood.

    For sandwich estimators, tests of parameter stability, and tests of non-nested models.

    Args:
        fit: a fitted model.
        cluster: as in :func:`lmmax.robust`: None for the outermost grouping factor.
        reml: contributions to the restricted log-likelihood (True) or to the log-likelihood
            (False), at the estimates; None for the one that was maximised.

    Returns:
        A row per cluster; columns for the coefficients (NaN where aliased) and for the variance
        parameters that were estimated, with the names and units of ``fit.natural_parameters``.
        At a maximum in the interior they sum to zero; at the boundary the sum for a variance of
        zero is negative or zero.

    Raises:
        ClusterError: if clusters are not independent in the fitted model (crossed factors), or do
            not fit the rows.

    Example:
        >>> import lmmax
        >>> fit = lmmax.fit("Weight ~ Time + (1 | Pig)", lmmax.datasets.load("dietox"))
        >>> lmmax.scores(fit).iloc[0].round(4).to_dict()
        {'Intercept': -0.03, 'Time': -1.3853, 'Pig: var(Intercept)': -0.0115, 'scale': -0.2464}
        >>> bool((lmmax.scores(fit).sum().abs() < 1e-6).all())
        True
    """
    as_fit(fit)
    clusters = find_clusters(fit, cluster)
    steady = fit.natural_parameters.steady
    parts = _contributions(fit, clusters, fit.reml if reml is None else reml)
    of_beta = np.full((len(clusters), len(fit.design.x_names)), np.nan)
    of_beta[:, fit.layout.fixed.kept] = parts.beta @ fit.layout.fixed.R
    values = np.hstack([of_beta, parts.of_entries(fit) @ steady.slope @ steady.forward])
    names = [*fit.design.x_names, *fit.natural_parameters.names]
    return pd.DataFrame(values, index=clusters.labels.rename(clusters.name), columns=names)


def sandwich(fit: Fit, cluster: Any = None) -> pd.DataFrame:
    """Return the robust covariance of coefficients and variance parameters together.

    ``H^-1 (sum_i s_i s_i') H^-1`` with the scores of the clusters and the observed information H:
    what the estimates vary by if random effects and errors are not normal.  It is for many
    clusters; for the coefficients alone :func:`lmmax.robust` is better with few.

    Args:
        fit: a fitted model, not singular.
        cluster: as in :func:`lmmax.robust`.

    Returns:
        A square data frame with the parameters of :func:`lmmax.joint_covariance`; NaN for those
        that the data do not identify, and for coefficients that depend on them.

    Raises:
        ClusterError: as :func:`scores`.

    Example:
        >>> import lmmax
        >>> import numpy as np
        >>> fit = lmmax.fit("Weight ~ Time + (1 | Pig)", lmmax.datasets.load("dietox"))
        >>> np.sqrt(np.diag(lmmax.sandwich(fit))).round(3).tolist()
        [0.546, 0.08, 8.3, 1.615]

    Source: White (1982), Econometrica 50, 1-25.
    """
    as_fit(fit)
    clusters = find_clusters(fit, cluster)
    parts = _contributions(fit, clusters, fit.reml)
    found = joint_information(fit, "observed", "natural")
    of_beta = np.linalg.solve(found.white, parts.beta.T).T
    values = np.hstack([of_beta, parts.of_entries(fit) @ fit.natural_parameters.steady.slope])
    half = found.inverse.covariance @ values.T
    return as_identified(fit, found.in_user_units(half @ half.T))


def _contributions(fit: Fit, clusters: Clusters, restricted: bool) -> _Parts:
    """Return what each cluster adds, in working coordinates."""
    p = len(fit.estimates.beta)
    # ``(X'V^-1 X)^-1``, or nothing.
    inverse = np.asarray(fit.estimates.solution.point.at.beta_inverse)[:p, :p] * restricted
    large = Levels.serve(fit, clusters, by_row=False)
    return (_by_level if large else _by_batch)(fit, clusters, inverse)


class _Parts(NamedTuple):
    """Contributions in the coordinates in which they are found.

    Attributes:
        beta: for the working coordinates of X, (m, p).
        vech: for the lower triangle of the working Psi row by row, (m, q (q + 1) / 2).
        size: for a factor of the covariance of the data, near one, (m,).
    """

    beta: np.ndarray
    vech: np.ndarray
    size: np.ndarray

    def of_entries(self, fit: Fit) -> np.ndarray:
        """Return those for (vech of the working Psi, scale), (m, q (q + 1) / 2 + 1)."""
        root = fit.estimates.working_root
        d = pack_triangle(root @ root.T)
        return np.column_stack([self.vech, self.size / fit.estimates.scale - self.vech @ d])


def _by_level(fit: Fit, clusters: Clusters, inverse: np.ndarray) -> _Parts:
    """Take complex steps through the elimination of nested factors."""
    p, q, scale = len(inverse), len(fit.estimates.root), fit.estimates.scale
    blocks = [root @ root.T for root in factor_roots(fit)]
    levels = Levels(fit, clusters, by_row=False)
    at = levels.products(blocks)

    def quadratic(S: np.ndarray) -> np.ndarray:
        return S[:, p, p] / scale + np.einsum("ij,mji->m", inverse, S[:, :p, :p])

    vech = np.zeros((len(clusters), q * (q + 1) // 2))
    for factor, own in enumerate(fit.layout.slices):
        for i, j in zip(*np.tril_indices(own.stop - own.start), strict=True):
            Ds = [D.astype(complex) if f == factor else D for f, D in enumerate(blocks)]
            Ds[factor][i, j] += 1j * STEP
            if i != j:
                Ds[factor][j, i] += 1j * STEP
            moved = levels.products(Ds)
            slope = np.imag(moved.logdet + quadratic(moved.S)) / STEP
            row, column = own.start + i, own.start + j
            vech[:, row * (row + 1) // 2 + column] = -0.5 * slope / scale
    return _Parts(at.S[:, :p, p] / scale, vech, 0.5 * (quadratic(at.S) - clusters.sizes))


def _by_batch(fit: Fit, clusters: Clusters, inverse: np.ndarray) -> _Parts:
    """Whiten the rows of each cluster."""
    p, q, scale = len(inverse), len(fit.estimates.root), fit.estimates.scale
    root = np.linalg.cholesky(inverse) if inverse.any() else np.zeros((p, 0))
    of_beta, size = np.empty((len(clusters), p)), np.empty(len(clusters))
    of_Psi = np.zeros((len(clusters), q, q))
    roots = factor_roots(fit)
    for batch in batches(fit, clusters):
        X, Z, residual = _whiten(batch, roots)
        here = batch.clusters
        of_beta[here] = (np.swapaxes(X, 1, 2) @ residual)[:, :, 0] / scale
        T = X @ root
        squares = np.sum(residual[:, :, 0] ** 2, axis=1) + batch.rest
        size[here] = 0.5 * (squares / scale - clusters.sizes[here] + np.sum(T * T, axis=(1, 2)))
        for own, part in zip(fit.layout.slices, Z, strict=True):
            of_Psi[here, own, own] = _covariance_score(part, residual, T, scale)
    rows, columns = np.tril_indices(q)
    # Off the diagonal E has two entries.
    vech = of_Psi[:, rows, columns] * np.where(rows == columns, 0.5, 1.0)
    return _Parts(of_beta, vech, size)


def _whiten(
    batch: Batch, roots: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray]:
    """Return X (b, r, p), Z and the residual (b, r, 1) in units of their covariance."""
    phi, axes = principal_axes(batch, roots)
    to_white = np.swapaxes(axes, 1, 2) / np.sqrt(phi)[:, :, None]
    Z = tuple(
        (to_white @ part.reshape(*part.shape[:2], -1)).reshape(part.shape) for part in batch.Z
    )
    return to_white @ batch.X, Z, to_white @ batch.residual[:, :, None]


def _covariance_score(
    Z: np.ndarray, residual: np.ndarray, T: np.ndarray, scale: float
) -> np.ndarray:
    """Return ``S`` of one factor, (b, q, q).

    Args:
        Z: whitened columns of each group, (b, r, k, q).
        residual: whitened, (b, r, 1).
        T: whitened X times a root of ``(X'V^-1 X)^-1``, or no columns, (b, r, p).
        scale: residual variance.
    """
    b, r, k, q = Z.shape
    onto = np.concatenate([residual / np.sqrt(scale), T], axis=2)
    products = (np.swapaxes(Z.reshape(b, r, k * q), 1, 2) @ onto).reshape(b, k, q, -1)
    products = np.swapaxes(products, 1, 2).reshape(b, q, -1)
    flat = np.swapaxes(Z, 2, 3).swapaxes(1, 2).reshape(b, q, r * k)
    gram = products @ np.swapaxes(products, 1, 2) - flat @ np.swapaxes(flat, 1, 2)
    return np.asarray(gram / scale)
