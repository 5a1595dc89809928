"""The designs of models with one variance besides the residual, in coordinates that part them.

Let K be the covariance of the random part for a relative variance d of one: ``V = I + d K``.  In
the coordinates in which K is diagonal on what X leaves of the space, with eigenvalues ``l_k`` and
the squared coordinates ``w_k`` of the response, and with the eigenvalues ``m_i`` of K itself::

    rss(d)  = sum_k w_k / (1 + d l_k)
    REML(d) = sum_k log(1 + d l_k) + (n - p) (log(2 pi rss / (n - p)) + 1) + log|X'X|
    ML(d)   = sum_i log(1 + d m_i) + n (log(2 pi rss / n) + 1)

so that a response is K numbers and a fit is a one-dimensional problem (Patterson and Thompson,
1971; Kang et al., 2008, Genetics 178, 1709-1723).  Here the eigenvalues come from the groups:
``K = L L'`` with ``L'L`` diagonal, and what X takes out has rank p.  Groups with equal entries of
``L'L`` share an eigenvalue but for p of them, so that a random intercept in thousands of groups
needs about p numbers for each distinct size of a group.  By Woodbury's identity the coefficients
and their covariance need no factorisation either: with ``L'L - L'X X'L = E diag(l) E'`` and
orthonormal X, ``(X'V^-1 X)^-1 = I + X'L E diag(d / (1 + d l)) E'L'X``.

The numbers of a response are in :mod:`lmmax.batch.line_statistics`, the fits in
:mod:`lmmax.batch.line_fits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..compress.columns import constant
from ..compress.layout import Layout
from ..constraints import Settings, TermColumns
from .grouped_rows import GroupedRows

LARGEST = 3000
"""Most eigenvalues; their decomposition takes seconds then."""
RANK = 1e-10
"""Eigenvalue, relative to the largest, below which a direction has no random part."""
CENTRE_ROWS = 64
"""Rows, spread over the data, around whose mean the others are summed."""


@dataclass(frozen=True, eq=False)
class OneVariance:
    """The designs of such a model, in the coordinates above.

    X has orthonormal columns (weighted, if there are weights); there are R directions of the
    random part that X sees, and U sets of equal eigenvalues beside them, of which each has one
    number per response.

    Attributes:
        layout: the designs by row.
        to_groups: map of the groups' sums to the coordinates in which ``L'L`` is diagonal, (m, m);
            None where they are these.
        members: groups of each set, and the orthonormal basis (m_u, r_u) of what X sees there.
        inside: groups that are no member of a set.
        kappa: entry of ``L'L`` of each direction, (R,).
        X_part: ``X'L`` of each direction, (p, R).
        eigenvalues: ``l_k`` of the directions, (R,), ascending.
        vectors: their eigenvectors, (R, R).
        set_kappa: eigenvalue of each set, (U,).
        set_size: how often it comes, (U,).
        unit: relative variance that is one unit of the grid.
        to_sums: the groups' weighted sums of z times the rows, sparse, (m, n).
        groups_X: the same of X, (m, p).
        ones: coefficients of the constant 1 in X, (p,); None where X does not have it.
        loadings: how the coefficients respond to each direction, (p, R).
    """

    layout: Layout
    to_groups: np.ndarray | None
    members: tuple[tuple[np.ndarray, np.ndarray], ...]
    inside: np.ndarray
    kappa: np.ndarray
    X_part: np.ndarray
    eigenvalues: np.ndarray
    vectors: np.ndarray
    set_kappa: np.ndarray
    set_size: np.ndarray
    unit: float
    to_sums: Any
    groups_X: np.ndarray
    ones: np.ndarray | None
    loadings: np.ndarray

    @cached_property
    def rows(self) -> GroupedRows:
        """The rows in the order of their groups."""
        layout, factor = self.layout, self.layout.factors[0]
        z, weights, kept = factor.blocks[0][:, 0], layout.weights, layout.fixed.kept
        X = layout.X if len(kept) == layout.X.shape[1] else layout.X[:, kept]
        wz = z if weights is None else weights * z
        if not np.any(np.diff(factor.codes) < 0):
            return GroupedRows(None, factor.codes, wz, X, weights)
        order = np.argsort(factor.codes, kind="stable")
        weights = None if weights is None else weights[order]
        return GroupedRows(order, factor.codes[order], wz[order], X[order], weights)

    @property
    def n_fixed(self) -> int:
        """Number of coefficients, p."""
        return len(self.X_part)

    @cached_property
    def random(self) -> np.ndarray:
        """Directions that have a random part beside what X takes out, (R,)."""
        top = max(self.eigenvalues.max(initial=0.0), self.set_kappa.max(initial=0.0))
        return np.asarray(self.eigenvalues > RANK * top)

    @cached_property
    def has_maximum(self) -> bool:
        """Whether the likelihood of every response has a maximum; the restricted one always does.

        Where coefficients and random effects together fit any response, and the effects alone do
        not, ``rss`` goes to zero as ``1 / d``, and ``n log(rss)`` outweighs the determinant.
        Between related levels that begins beyond what anyone means.
        """
        if self.layout.factors[0].root is not None:
            return True
        top = max(self.eigenvalues.max(initial=0.0), self.set_kappa.max(initial=0.0))
        of_sets = int(self.set_size[self.set_kappa > RANK * top].sum())
        n, fitted = self.n_obs, self.n_fixed + int(self.random.sum()) + of_sets
        return fitted < n or int(np.sum(self.kappa > RANK * top)) + of_sets == n

    def gain(self, variance: np.ndarray) -> np.ndarray:
        """Return ``d / (1 + d l_k)`` of each direction at relative variances d (n,), (n, R)."""
        d = variance[:, None]
        return np.asarray(d / (1.0 + d * self.eigenvalues))

    def unscaled_variances(
        self, variance: np.ndarray, contrasts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the diagonals of what `unscaled_covariance` returns, (n, r) each."""
        own = np.sum((contrasts @ self.layout.fixed.inverse) ** 2, axis=1)
        squares = ((contrasts @ self.loadings) ** 2).T
        shrunk = 1.0 / (1.0 + variance[:, None] * self.eigenvalues)
        return own + variance[:, None] * (shrunk @ squares), (shrunk * shrunk) @ squares

    def unscaled_covariance(
        self, variance: np.ndarray, contrasts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ``L (X'V^-1 X)^-1 L'`` and its derivative in the relative variance, (n, r, r).

        Args:
            variance: relative variances d, (n,).
            contrasts: L, on the coefficients that were kept, (r, p).
        """
        r = len(contrasts)
        inner = contrasts @ self.layout.fixed.inverse
        seen = contrasts @ self.loadings
        products = (seen[:, None] * seen).reshape(r * r, -1).T
        gain = self.gain(variance)
        shrunk = 1.0 / (1.0 + variance[:, None] * self.eigenvalues)
        shape = (len(variance), r, r)
        return (
            inner @ inner.T + (gain @ products).reshape(shape),
            ((shrunk * shrunk) @ products).reshape(shape),
        )

    def centre(self, columns: np.ndarray) -> np.ndarray:
        """Return about where columns (n, lanes) lie, if X has the constant; else zero, (lanes,)."""
        if self.ones is None:
            return np.zeros(columns.shape[1])
        some = np.linspace(0, len(columns) - 1, CENTRE_ROWS).astype(np.int64)
        return np.asarray(columns[some].mean(axis=0, dtype=float))

    @property
    def n_obs(self) -> int:
        """Number of rows, n."""
        return self.layout.n_obs


def suits(layout: Layout, terms: Sequence[TermColumns], settings: Settings) -> bool:
    """Return whether a model has one free variance besides the residual's, and no structure.

    Args:
        layout: its designs.
        terms: its random terms.
        settings: how it is to be fitted.
    """
    free = not settings.fix and len(terms) == 1 and terms[0].pattern is not None
    form = settings.engine in ("auto", "grouped")
    return free and form and len(layout.factors) == 1 and layout.factors[0].n_effects == 1


def one_variance(layout: Layout) -> OneVariance | None:
    """Analyse the designs; None if there are too many eigenvalues."""
    from scipy.sparse import csr_array

    factor, weights = layout.factors[0], layout.weights
    m, p = factor.n_groups, len(layout.fixed.kept)
    z = factor.blocks[0][:, 0]
    wz = z if weights is None else weights * z
    diagonal = np.bincount(factor.codes, wz * z, minlength=m)
    X = layout.X[:, layout.fixed.kept] @ layout.fixed.inverse
    C = np.zeros((p, m))
    for row, column in zip(C, X.T, strict=True):
        row[:] = np.bincount(factor.codes, wz * column, minlength=m)
    groups_X, to_groups = C, None
    if factor.root is not None:
        if m > LARGEST:
            return None
        kappa, vectors = np.linalg.eigh(factor.root.T @ (diagonal[:, None] * factor.root))
        kappa = kappa.clip(min=0.0)
        to_groups = vectors.T @ factor.root.T
        C = C @ to_groups.T
    else:
        kappa = diagonal
    # Groups in which z is zero have no random part.
    some = np.flatnonzero(kappa > RANK * kappa.max())
    members, loose = [], np.isin(np.arange(m), some)
    values, which = np.unique(np.round(kappa[some], 12), return_inverse=True)
    for u in np.flatnonzero(np.bincount(which, minlength=len(values)) > 1):
        own = some[which == u]
        left, size, _ = np.linalg.svd(C[:, own].T, full_matrices=False)
        basis = left[:, size > 1e-13]
        if len(own) > basis.shape[1]:
            members.append((own, basis))
            loose[own] = False
    inside = np.flatnonzero(loose)
    parts = [np.full(basis.shape[1], kappa[own[0]]) for own, basis in members] + [kappa[inside]]
    directions = [C[:, own] @ basis for own, basis in members] + [C[:, inside]]
    kappa_R, X_part = np.concatenate(parts), np.concatenate(directions, axis=1)
    if len(kappa_R) > LARGEST:
        return None
    eigenvalues, vectors = np.linalg.eigh(np.diag(kappa_R) - X_part.T @ X_part)
    unit = float(m / kappa.sum())
    ones = constant(layout.X, layout.fixed, weights)
    return OneVariance(
        layout=layout,
        to_groups=to_groups,
        members=tuple(members),
        inside=inside,
        kappa=kappa_R,
        X_part=X_part.reshape(p, len(kappa_R)),
        eigenvalues=eigenvalues.clip(min=0.0),
        vectors=vectors,
        set_kappa=np.array([kappa[own[0]] for own, _ in members]),
        set_size=np.array([len(own) - basis.shape[1] for own, basis in members], dtype=float),
        unit=unit,
        to_sums=csr_array((wz, (factor.codes, np.arange(len(wz)))), shape=(m, len(wz))),
        groups_X=groups_X.T,
        ones=None if ones is None else layout.fixed.R @ ones,
        loadings=layout.fixed.inverse @ X_part.reshape(p, len(kappa_R)) @ vectors,
    )
