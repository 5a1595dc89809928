"""A point in the parameter space of a model, and its packed vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..parameters import factor, unpack_lower, unpack_symmetric


class MixedLMParams:
    """Parameters of a mixed model, covariances relative to the residual variance.

    Args:
        k_fe: number of coefficients, p.
        k_re: number of random effects, q, without those of variance components.
        k_vc: number of variance components.

    Attributes:
        fe_params: coefficients, (p,).
        cov_re: relative covariance of the random effects, (q, q).
        vcomp: relative variances of the components, (k_vc,).

    There are three packed forms: ``use_sqrt=True`` has the lower Cholesky factor of `cov_re`, row
    by row, and the roots of `vcomp`; ``use_sqrt=False`` their own entries; either with the
    coefficients before them (``has_fe=True``) or without.

    Example:
        >>> import numpy as np
        >>> point = MixedLMParams.from_components([1.0], cov_re=np.array([[4.0]]), vcomp=[9.0])
        >>> point.get_packed(use_sqrt=True, has_fe=True).tolist()
        [1.0, 2.0, 3.0]
        >>> MixedLMParams.from_packed([2.0, 3.0], 1, 1, use_sqrt=True, has_fe=False).vcomp.tolist()
        [9.0]
    """

    fe_params: np.ndarray
    cov_re: np.ndarray
    vcomp: np.ndarray

    def __init__(self, k_fe: int, k_re: int, k_vc: int) -> None:
        self.k_fe = k_fe
        self.k_re = k_re
        self.k_re2 = k_re * (k_re + 1) // 2
        self.k_vc = k_vc
        self.k_tot = self.k_fe + self.k_re2 + self.k_vc
        self._ix = np.tril_indices(k_re)

    @staticmethod
    def from_packed(
        params: Any, k_fe: int, k_re: int, use_sqrt: bool, has_fe: bool
    ) -> MixedLMParams:
        """Unpack a vector; the number of variance components follows from its length.

        Args:
            params: packed parameters.
            k_fe: number of coefficients; they are zero where the vector has none.
            k_re: number of random effects.
            use_sqrt: whether the covariances are given by their roots.
            has_fe: whether the vector begins with the coefficients.

        Raises:
            ValueError: if the vector is too short.
        """
        packed = np.asarray(params, dtype=float)
        first = k_fe if has_fe else 0
        size = k_re * (k_re + 1) // 2
        if packed.ndim != 1 or len(packed) < first + size:
            raise ValueError(
                f"params has shape {packed.shape}; with k_fe={k_fe}, k_re={k_re}, "
                f"has_fe={bool(has_fe)} it needs at least {first + size} entries"
            )
        found = MixedLMParams(k_fe, k_re, len(packed) - first - size)
        found.fe_params = packed[:first].copy() if has_fe else np.zeros(k_fe)
        triangle, rest = packed[first : first + size], packed[first + size :]
        if k_re == 0:
            found.cov_re = np.zeros((0, 0))
        elif use_sqrt:
            lower = unpack_lower(triangle)
            found.cov_re = lower @ lower.T
        else:
            found.cov_re = unpack_symmetric(triangle)
        found.vcomp = rest**2 if use_sqrt else rest.copy()
        return found

    @staticmethod
    def from_components(
        fe_params: Any = None, cov_re: Any = None, cov_re_sqrt: Any = None, vcomp: Any = None
    ) -> MixedLMParams:
        """Put parameters together from their parts; what is not given is empty.

        Args:
            fe_params: coefficients, (p,).
            cov_re: relative covariance of the random effects, (q, q).
            cov_re_sqrt: its lower Cholesky factor, which counts where both are given.
            vcomp: relative variances of the components.
        """
        fe = np.empty(0) if fe_params is None else np.asarray(fe_params)
        vc = np.empty(0) if vcomp is None else np.asarray(vcomp)
        if cov_re_sqrt is not None:
            root = np.asarray(cov_re_sqrt)
            cov = root @ root.T
        else:
            cov = np.empty((0, 0)) if cov_re is None else np.asarray(cov_re)
        found = MixedLMParams(len(fe), len(cov), len(vc))
        found.fe_params, found.cov_re, found.vcomp = fe, cov, vc
        return found

    def copy(self) -> MixedLMParams:
        """Return a copy that shares nothing."""
        found = MixedLMParams(self.k_fe, self.k_re, self.k_vc)
        found.fe_params = np.array(self.fe_params)
        found.cov_re = np.array(self.cov_re)
        found.vcomp = np.array(self.vcomp)
        return found

    def get_packed(self, use_sqrt: bool, has_fe: bool = False) -> np.ndarray:
        """Pack into one vector.

        Args:
            use_sqrt: give covariances by their roots; a `cov_re` that is not positive semidefinite
                has none, and the roots of its diagonal serve.
            has_fe: begin with the coefficients.
        """
        cov, vcomp = np.asarray(self.cov_re, dtype=float), np.asarray(self.vcomp, dtype=float)
        if use_sqrt:
            vcomp = np.sqrt(vcomp)
            if self.k_re:
                diagonal = np.diag(cov)
                semidefinite = np.linalg.eigvalsh(cov)[0] >= -1e-12 * max(diagonal.max(), 0.0)
                cov = factor(cov) if semidefinite else np.diag(np.sqrt(diagonal))
        parts = [cov[self._ix] if self.k_re else np.zeros(0), vcomp]
        if has_fe:
            parts.insert(0, np.asarray(self.fe_params, dtype=float))
        return np.concatenate(parts)

    def __repr__(self) -> str:
        return (
            f"MixedLMParams(fe_params={self.fe_params!r}, cov_re={self.cov_re!r}, "
            f"vcomp={self.vcomp!r})"
        )
