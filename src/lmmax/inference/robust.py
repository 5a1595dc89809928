"""Cluster-robust (sandwich) covariance of the fixed effects, with small-sample tests.

Clusters are whitened by the fitted model: ``V_i = E diag(phi) E'`` relative to the scale,
``T_i = diag(phi)^(-1/2) E' X_i N^(-1/2)`` with ``N = X'V^-1 X``, and ``r_i`` the residual alike.
The stacked ``T`` is orthonormal and every estimator is::

    cov = c N^(-1/2) (sum_i u_i u_i') N^(-1/2)'      u_i = J_i' r_i

=====  ====================================  ==========================
type   J_i                                   c
=====  ====================================  ==========================
CR0    T_i                                   1
CR1    T_i                                   m / (m - 1)
CR1p   T_i                                   m / (m - p)
CR1S   T_i                                   m (n - 1) / ((m - 1)(n - p))
CR2    phi H T_i, H = (B B')^(-1/2)          1
CR3    (I - T_i T_i')^-1 T_i                 1
=====  ====================================  ==========================

with ``B = diag(phi) (I - T_i T_i')^(1/2)``: CR2 is unbiased if the fitted model is true.  The
variance of a contrast is then a quadratic form in the residuals.  Its matrix between clusters is
diagonal but for rank p, so that no sum runs over pairs of clusters.

Source: Bell and McCaffrey (2002), Surv. Methodol. 28, 169-181; Pustejovsky and Tipton (2018),
J. Bus. Econ. Stat. 36, 672-683, the working model's covariance being the target and its inverse
the weights; the names of the types are those of the R package clubSandwich.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from ..options import alpha_of, choose
from ..rendering import boxed, html_table, page
from .arguments import as_fit
from .clusters import ClusterError, Clusters, batches, factor_roots, find_clusters, principal_axes
from .denominator import Denominator, HypothesisError, JointTest, f_test, orthonormal
from .tree import Levels, inverse_root_nodes
from .wald import ContrastTable, WaldTest, coefficient_table, linear_hypotheses

if TYPE_CHECKING:
    from ..identifiability import Unidentified
    from ..results import Fit

TYPES = ("CR0", "CR1", "CR1p", "CR1S", "CR2", "CR3")
JOINT_TESTS = ("HTZ", "chi2", "naive-F")
ALONE = 1e-10
"""A cluster is the only one to tell of a direction of X if less than this fraction of the
information remains without it."""


class Moments(NamedTuple):
    """What the covariance of the robust covariance needs, under the working model.

    Attributes:
        square: ``J_i' J_i``, (m, p, p).
        cross: ``T_i' J_i``, (m, p, p).
    """

    square: np.ndarray
    cross: np.ndarray

    def along(self, directions: np.ndarray) -> Moments:
        """Return the moments of linear combinations, given as columns (p, r)."""
        return Moments(directions.T @ self.square @ directions, self.cross @ directions)


class ClusterRobust(Denominator):
    """Tests of contrasts with a robust covariance and degrees of freedom to match.

    Attributes:
        method: type of the covariance.
        to_x: ``N^(-1/2)``, from whitened coordinates to the coefficients that were kept, (p, p).
        cov_x: covariance of the coefficients in whitened coordinates, (p, p).
        n_clusters: number of clusters, m.
        moments: of the covariance, in whitened coordinates.
    """

    def __init__(
        self,
        method: str,
        to_x: np.ndarray,
        cov_x: np.ndarray,
        n_clusters: int,
        moments: Moments,
        unidentified: Unidentified | None = None,
    ) -> None:
        """Take the covariance and its moments, and what the data do not tell apart."""
        self.method, self.to_x, self.cov_x = method, to_x, cov_x
        self.n_clusters, self.moments, self.unidentified = n_clusters, moments, unidentified

    def errors(self, L: np.ndarray) -> np.ndarray:
        """See :class:`Denominator`; NaN where estimates depend on what is not identified."""
        found = super().errors(L)
        if self.unidentified is None:
            return found
        return np.where(self.unidentified.concerns(L), np.nan, found)

    def degrees(self, L: np.ndarray) -> np.ndarray:
        """Return Satterthwaite's degrees of freedom of each contrast on its own, (r,)."""
        return np.array([_satterthwaite_df(self.moments, row) for row in L @ self.to_x])

    def joint(self, L: np.ndarray, difference: np.ndarray) -> JointTest:
        """Test contrasts jointly by Hotelling's T-squared (HTZ)."""
        return self.test(L, difference, "HTZ")

    def test(self, L: np.ndarray, difference: np.ndarray, kind: str) -> JointTest:
        """Test contrasts jointly by one of ``JOINT_TESTS``; see :class:`Denominator`."""
        r = len(L)
        wald = self.wald(L, difference)
        if kind == "chi2":
            return f_test(wald, r, np.inf)
        if kind == "naive-F":
            return f_test(wald, r, self.n_clusters - 1.0)
        eta = _wishart_df(self.moments.along(orthonormal(L @ self.to_x)[0].T))
        df = eta - r + 1.0
        if df <= 0.0:
            return JointTest(np.nan, r, df, np.nan, wald)
        return f_test(wald, r, df, scaling=df / eta)

    def wald(self, L: np.ndarray, difference: np.ndarray) -> float:
        """See :class:`Denominator`.

        Raises:
            HypothesisError: if there are more hypotheses than the clusters can test, too.
        """
        if self.unidentified is not None and self.unidentified.concerns_jointly(L):
            return float("nan")
        found = super().wald(L, difference)
        if np.isnan(found) and np.isfinite(self.cov_x).all():
            raise HypothesisError(
                f"the robust covariance of the {len(L)} hypotheses is singular: "
                f"{self.n_clusters} clusters are too few; test fewer hypotheses at once"
            )
        return found


@dataclass(frozen=True, eq=False, repr=False)
class RobustCovariance:
    """Cluster-robust covariance of the coefficients, and tests with it.

    Made by :func:`lmmax.robust`.  Aliased coefficients are NaN.

    Attributes:
        type: which estimator.
        cluster: name of the clustering variable.
        params: the coefficients.
        kept: positions of those that are not aliased, (p,).
        tests: the covariance with its degrees of freedom, for contrasts of the coefficients that
            were kept.
        notes: what a reader should know.
    """

    type: str
    cluster: str
    params: pd.Series
    kept: np.ndarray
    tests: ClusterRobust
    notes: tuple[str, ...] = ()

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return self.tests.n_clusters

    @cached_property
    def cov(self) -> pd.DataFrame:
        """Robust covariance of the coefficients."""
        names = self.params.index
        values = np.full((len(names), len(names)), np.nan)
        values[np.ix_(self.kept, self.kept)] = self.tests.cov
        if self.tests.unidentified is not None:
            hidden = self.kept[self.tests.unidentified.concerns(np.eye(len(self.kept)))]
            values[hidden, :] = values[:, hidden] = np.nan
        return pd.DataFrame(values, index=names, columns=names)

    @cached_property
    def bse(self) -> pd.Series:
        """Robust standard errors of the coefficients."""
        values = np.sqrt(np.diag(self.cov.to_numpy()))
        return pd.Series(values, index=self.params.index, name="std err")

    @property
    def df(self) -> pd.Series:
        """Satterthwaite's degrees of freedom of each coefficient."""
        return self._coefficients["df"]

    @property
    def tvalues(self) -> pd.Series:
        """Coefficients over their robust standard errors."""
        return self._coefficients["t"]

    @property
    def pvalues(self) -> pd.Series:
        """Two-sided p-values from t distributions with :attr:`df` degrees of freedom."""
        return self._coefficients["p"]

    @cached_property
    def _coefficients(self) -> pd.DataFrame:
        return self.coefficients()

    def coefficients(
        self, level: float | None = None, *, alpha: float | None = None
    ) -> pd.DataFrame:
        """Return the tests of the single coefficients.

        Args:
            level: the level of the confidence limits, as in :meth:`lmmax.Fit.coefficients`.
            alpha: one minus the level, instead of it.

        Returns:
            A row per coefficient: ``coef``, ``std err``, ``df``, ``t``, ``p``, and the limits
            ``lower`` and ``upper``.

        Raises:
            ValueError: if the level does not lie between 0 and 1.
        """
        L, estimate = np.eye(len(self.kept)), self.params.to_numpy()[self.kept]
        one_minus = alpha_of(level, alpha)
        table = coefficient_table(self.tests, L, estimate, np.zeros(len(L)), one_minus)
        return table.set_axis(self.params.index[self.kept]).reindex(self.params.index)

    def conf_int(self, level: float | None = None, *, alpha: float | None = None) -> pd.DataFrame:
        """Confidence limits of the coefficients, t quantiles; see :meth:`coefficients`."""
        return self.coefficients(level, alpha=alpha)[["lower", "upper"]]

    def t_test(
        self, hypothesis: Any, level: float | None = None, *, alpha: float | None = None
    ) -> ContrastTable:
        """Test each linear hypothesis on its own, with Satterthwaite's degrees of freedom.

        Args:
            hypothesis: as in :meth:`lmmax.Fit.t_test`.
            level: the level of the confidence limits, as in :meth:`lmmax.Fit.coefficients`.
            alpha: one minus the level, instead of it.

        Raises:
            HypothesisError: if a name is not a coefficient, or the shape does not fit.
        """
        R, values, names = linear_hypotheses(self.params, hypothesis)
        L = R[:, self.kept]
        estimate = L @ self.params.to_numpy()[self.kept]
        one_minus = alpha_of(level, alpha)
        table = coefficient_table(self.tests, L, estimate, values, one_minus)
        return ContrastTable(table.set_axis(names), 1.0 - one_minus)

    def wald_test(self, hypothesis: Any, test: str = "HTZ") -> WaldTest:
        """Test linear hypotheses jointly.

        Args:
            hypothesis: as in :meth:`lmmax.Fit.t_test`.
            test: "HTZ", Hotelling's T-squared with degrees of freedom that match the total
                variance of the robust covariance (recommended); "chi2", for many clusters; or
                "naive-F", with ``m - 1`` denominator degrees of freedom.

        Returns:
            The test.  With fewer degrees of freedom than hypotheses Hotelling's test does not
            exist, and its statistic and p-value are NaN.

        Raises:
            HypothesisError: if a name is not a coefficient, the shape does not fit, hypotheses
                are redundant, or there are more of them than the clusters can test.
            ValueError: if the test is unknown.

        Example:
            >>> import lmmax
            >>> machines = lmmax.datasets.load("machines")
            >>> fit = lmmax.fit("score ~ Machine + (1 | Worker/Machine)", machines)
            >>> print(lmmax.robust(fit).wald_test("Machine[T.B], Machine[T.C]"))
            Wald test: F(2, 4) = 32.8, p = 0.003

        Source: Pustejovsky and Tipton (2018), J. Bus. Econ. Stat. 36, 672-683, section 3.2.
        """
        test = choose("test", test, JOINT_TESTS)
        R, values, _ = linear_hypotheses(self.params, hypothesis)
        L = R[:, self.kept]
        found = self.tests.test(L, L @ self.params.to_numpy()[self.kept] - values, test)
        if test == "chi2":
            return WaldTest(found.statistic * found.df_num, found.df_num, None, found.pvalue)
        return WaldTest(found.statistic, found.df_num, found.df_den, found.pvalue)

    @property
    def _heading(self) -> str:
        return (
            f"Cluster-robust covariance {self.type}, {self.n_clusters} clusters of {self.cluster}"
        )

    def __str__(self) -> str:
        return page(self._heading, str(ContrastTable(self._coefficients)), *self.notes)

    def __repr__(self) -> str:
        return page(
            f"<lmmax.RobustCovariance {self.type}, {self.n_clusters} clusters of {self.cluster}>"
        )

    def _repr_html_(self) -> str:
        return boxed(
            f'<p class="lmmax-title">{escape(self._heading)}</p>',
            html_table("", ContrastTable(self._coefficients).cells),
            *(f"<p>{escape(note)}</p>" for note in self.notes),
        )


def robust(fit: Fit, cluster: Any = None, type: str = "CR2") -> RobustCovariance:
    """Return a covariance of the coefficients that holds whatever the covariance in a cluster is.

    It needs the mean to be right and clusters to be independent.  The coefficients stay those of
    the fitted model.

    Args:
        fit: a fitted model of any random effects, singular or not.
        cluster: name of a grouping factor, or a label for each row used, (n,): an array, or a
            Series with the index of the data.  All grouping factors must be nested within it.  None
            for the outermost grouping factor.
        type: "CR0", the plain sandwich; "CR1", "CR1p", "CR1S", the same times a factor; "CR2",
            unbiased if the fitted model is true; "CR3", close to the jackknife.

    Returns:
        The covariance, with tests.  Where one cluster alone decides a direction of the
        coefficients, CR2 and CR3 leave that direction out, and a note says so.

    Raises:
        ClusterError: if clusters are not independent in the fitted model, do not fit the rows, or
            are too few.
        ValueError: if the type is unknown.

    Example:
        >>> import lmmax
        >>> fit = lmmax.fit("Weight ~ Time + (1 | Pig)", lmmax.datasets.load("dietox"))
        >>> print(lmmax.robust(fit))
        Cluster-robust covariance CR2, 72 clusters of Pig
                      coef  std err       df        t    P>|t|   [0.025   0.975]
        Intercept    15.72   0.5497    71.00   28.603   <0.001    14.63    16.82
        Time         6.943  0.08018    70.84   86.587   <0.001    6.783    7.102

    Source: Pustejovsky and Tipton (2018), J. Bus. Econ. Stat. 36, 672-683.
    """
    as_fit(fit)
    type = choose("type", type, TYPES)
    clusters = find_clusters(fit, cluster)
    m, n, p = len(clusters), fit.nobs, len(fit.estimates.beta)
    if type == "CR1p" and m <= p:
        raise ClusterError(
            f"type='CR1p' needs more clusters than the {p} coefficients; {clusters.name!r} has {m}"
        )
    factor = {
        "CR1": m / (m - 1.0),
        "CR1p": m / (m - p) if m > p else np.nan,
        "CR1S": m * (n - 1.0) / ((m - 1.0) * (n - p)),
    }.get(type, 1.0)
    # Of a likelihood without a maximum nothing may be left of a cluster's covariance: NaN.
    with np.errstate(divide="ignore", invalid="ignore"):
        scores, moments, root, alone = _adjusted(fit, clusters, type)
    notes: tuple[str, ...] = () if fit.converged else (f"the fit: {fit.message}",)
    if len(alone) and type in ("CR2", "CR3"):
        shown = ", ".join(str(clusters.labels[i]) for i in alone[:3])
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        notes += (
            f"coefficients that one cluster of {clusters.name} alone decides ({shown}{more}) have "
            "no adjustment for it; their standard errors are too small",
        )
    if fit.unidentified is not None and fit.unidentified.concerns(np.eye(len(root))).any():
        notes += (f"{fit.unidentified}; coefficients that depend on it have no standard error",)
    tests = ClusterRobust(type, root, factor * (scores.T @ scores), m, moments, fit.unidentified)
    return RobustCovariance(type, clusters.name, fit.params, fit.layout.fixed.kept, tests, notes)


class _White(NamedTuple):
    """Clusters in units of their covariance.

    Attributes:
        clusters: their positions, (b,).
        phi: eigenvalues of ``V_i``, (b, r).
        X: whitened, (b, r, p).
        residual: whitened, (b, r).
    """

    clusters: np.ndarray
    phi: np.ndarray
    X: np.ndarray
    residual: np.ndarray


def _adjusted(
    fit: Fit, clusters: Clusters, type: str
) -> tuple[np.ndarray, Moments, np.ndarray, np.ndarray]:
    """Return ``u`` (m, p), the moments, ``N^(-1/2)`` (p, p), and clusters that stand alone."""
    m, p = len(clusters), len(fit.estimates.beta)
    # CR2 depends on what an observation is: with weights, rows must stay as they are.
    by_row = type == "CR2" and (fit.design.weights is not None)
    levels: Levels | None = None
    whitened: list[_White] = []
    if Levels.serve(fit, clusters, by_row=by_row):
        levels = Levels(fit, clusters, by_row=by_row)
        parts = levels.products().S[:, :p]
    else:
        parts = np.empty((m, p, p + 1))
        whitened = list(_whiten(fit, clusters, rotate=type != "CR2"))
        for here, _, X, residual in whitened:
            data = np.concatenate([X, residual[:, :, None]], axis=2)
            parts[here] = np.swapaxes(X, 1, 2) @ data
    root = np.linalg.inv(np.linalg.cholesky(np.sum(parts[:, :, :p], axis=0))).T
    gram, u = root.T @ parts[:, :, :p] @ root, parts[:, :, p] @ root
    share, axes = np.linalg.eigh(gram)
    left = np.where(1.0 - share > ALONE, 1.0 - share, 0.0)
    is_alone = np.any(left == 0.0, axis=1)
    moments = Moments(gram, gram)
    if type == "CR3":
        inverse = np.divide(1.0, left, out=np.zeros_like(left), where=left > 0.0)
        adjustment = (axes * inverse[:, None]) @ np.swapaxes(axes, 1, 2)
        u = (adjustment @ u[:, :, None])[:, :, 0]
        moments = Moments(adjustment @ gram @ adjustment, gram @ adjustment)
    elif type == "CR2":
        moments = Moments(np.empty_like(gram), np.empty_like(gram))
        if levels is not None:
            low = float(np.min(1.0 - share[~is_alone, -1], initial=1.0))
            u, moments = _by_resolvents(levels, root, gram, low)
            alone = np.flatnonzero(is_alone)
            whitened = _whiten(fit, clusters, rotate=False, members=alone) if len(alone) else []
        for here, phi, X, residual in whitened:
            T = X @ root
            J = _bias_reduced(T, phi, T @ axes[here], left[here])
            transposed = np.swapaxes(J, 1, 2)
            u[here] = (transposed @ residual[:, :, None])[:, :, 0]
            moments.square[here] = transposed @ J
            moments.cross[here] = np.swapaxes(T, 1, 2) @ J
    return u, moments, fit.layout.fixed.inverse @ root, np.flatnonzero(is_alone)


def _whiten(
    fit: Fit, clusters: Clusters, rotate: bool, members: np.ndarray | None = None
) -> list[_White]:
    """Return clusters in units of their covariance, batch by batch."""
    roots, found = factor_roots(fit), []
    for batch in batches(fit, clusters, rotate=rotate, members=members):
        phi, axes = principal_axes(batch, roots)
        data = np.swapaxes(axes, 1, 2) @ np.concatenate([batch.X, batch.residual[..., None]], 2)
        data /= np.sqrt(phi)[:, :, None]
        found.append(_White(batch.clusters, phi, data[:, :, :-1], data[:, :, -1]))
    return found


def _bias_reduced(
    T: np.ndarray, phi: np.ndarray, columns: np.ndarray, left: np.ndarray
) -> np.ndarray:
    """Return ``phi H T`` of CR2, (b, r, p).

    ``H`` comes from singular values of ``B``, not from eigenvalues of ``B B'``, whose range is the
    square of that of phi.

    Args:
        T: whitened X, (b, r, p).
        phi: eigenvalues of V_i, (b, r).
        columns: T times the eigenvectors of T'T, (b, r, p).
        left: one minus the eigenvalues of T'T, zero where a cluster stands alone, (b, p).
    """
    # (I - T T')^(1/2) = I - sum of t t' / (1 + left^(1/2)) over the columns t.
    root = -(columns / (1.0 + np.sqrt(left))[:, None]) @ np.swapaxes(columns, 1, 2)
    r = phi.shape[1]
    root[:, np.arange(r), np.arange(r)] += 1.0
    U, sizes, _ = np.linalg.svd(phi[:, :, None] * root)
    live = np.arange(r) < r - np.sum(left == 0.0, axis=1, keepdims=True)
    inverse = np.divide(1.0, sizes, out=np.zeros_like(sizes), where=live)
    return phi[:, :, None] * ((U * inverse[:, None]) @ (np.swapaxes(U, 1, 2) @ T))


def _by_resolvents(
    levels: Levels, root: np.ndarray, gram: np.ndarray, low: float
) -> tuple[np.ndarray, Moments]:
    """Return ``u`` and the moments of CR2 without a matrix of the size of a cluster.

    In other axes ``B B' = V^2 - W W'``, ``W = V^(1/2) X N^(-1/2)``.  Its inverse root is a sum of
    ``(V^2 + tau^2 - W W')^-1``, in which W has low rank, and ``(V^2 + tau^2)^-1`` is the imaginary
    part of ``-(V + i tau)^-1 / tau``.  Products of the latter with X and the residual are all it
    takes, as ``J'J = T'T + (T'J)'(T'J)`` where no cluster stands alone.

    Args:
        levels: the clusters.
        root: ``N^(-1/2)``, (p, p).
        gram: ``T_i' T_i``, (m, p, p).
        low: smallest of one minus their eigenvalues.
    """
    p = len(root)
    total = np.zeros((len(gram), p, p + 1))
    smallest, largest = levels.variance_bounds()
    nodes = inverse_root_nodes(low * smallest**2, largest**2)
    for tau, weight in zip(*nodes, strict=True):
        S = root.T @ levels.products(shift=1j * tau).S[:, :p]
        S[:, :, :p] = S[:, :, :p] @ root
        squares, mixed = -S.imag / tau, S.real
        inner = np.eye(p) - mixed[:, :, :p]
        total += weight * (squares + squares[:, :, :p] @ np.linalg.solve(inner, mixed))
    cross = np.swapaxes(total[:, :, :p], 1, 2)
    return total[:, :, p], Moments(gram + np.swapaxes(cross, 1, 2) @ cross, cross)


def _satterthwaite_df(moments: Moments, direction: np.ndarray) -> float:
    """Return ``(tr P)^2 / tr P^2`` for ``P = diag(d) - A A'``, a row of A per cluster.

    Args:
        moments: of all clusters.
        direction: contrast in whitened coordinates, (p,).
    """
    A = moments.cross @ direction
    d = (moments.square @ direction) @ direction
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(*_traces(d, A)))


def _traces(d: np.ndarray, A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return squared trace and sum of squares of ``diag(d) - A A'``."""
    lengths = np.einsum("mi,mi->m", A, A)
    trace = np.sum(d - lengths)
    return trace**2, np.sum(d * (d - 2.0 * lengths)) + np.sum((A.T @ A) ** 2)


def _wishart_df(moments: Moments) -> float:
    """Return the degrees of freedom of the Wishart distribution with the same total variance.

    Args:
        moments: along the q hypotheses: squares (m, q, q), crosses (m, p, q).
    """
    D, A = moments
    m, p, q = A.shape
    omega = np.sum(D - np.swapaxes(A, 1, 2) @ A, axis=0)
    # In units in which the expected covariance of the hypotheses is the identity.
    try:
        unit = np.linalg.inv(np.linalg.cholesky(omega))
    except np.linalg.LinAlgError:
        return np.nan
    D, A = unit @ D @ unit.T, A @ unit.T
    # Over pairs of clusters, with P_ij = [i = j] D_i - A_i'A_j: sum of (tr P_ij)^2 + tr P_ij^2.
    square = np.swapaxes(A, 1, 2) @ A
    flat = A.reshape(m, p * q)
    pairs = flat.T @ flat
    turned = pairs.reshape(p, q, p, q).swapaxes(1, 3).reshape(p * q, p * q)
    trace_D, trace_A = np.einsum("mss->m", D), np.einsum("mss->m", square)
    total = np.sum(trace_D * (trace_D - 2.0 * trace_A)) + np.sum(pairs**2)
    total += np.einsum("mst,mts->", D, D - 2.0 * square) + np.sum(pairs * turned)
    return float(q * (q + 1) / total)
