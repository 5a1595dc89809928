"""Draws of the response from a model at given parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from statsmodels.tools.rng_qrng import check_random_state

from ..parameters import factor

if TYPE_CHECKING:
    from .model import MixedLM
    from .params import MixedLMParams


class Distribution:
    """The distribution of the response of a model; made by ``MixedLM.get_distribution``.

    Args:
        model: the model.
        point: coefficients, and covariances relative to the scale.
        scale: residual variance.
        exog: fixed-effects design, (n, p).
    """

    def __init__(self, model: MixedLM, point: MixedLMParams, scale: float, exog: Any) -> None:
        self.model = model
        self.exog = np.asarray(exog)
        if len(self.exog) != model.nobs:
            raise ValueError(
                f"exog has {len(self.exog)} rows; it needs {model.nobs}, those of the groups"
            )
        self._mean = model.predict(point, self.exog)
        # Columns without a coefficient are linear combinations of others.
        self.fe_params = np.nan_to_num(np.asarray(point.fe_params))
        self.cov_re = scale * np.asarray(point.cov_re)
        self.vcomp = scale * np.asarray(point.vcomp)
        self.scale = scale
        self.group_idx = model._codes

    def rvs(self, n: Any = None, rng: Any = None, random_state: Any = None) -> np.ndarray:
        """Draw a response.

        Random numbers are drawn in the order of statsmodels, so that a seed gives the same values.

        Args:
            n: not used, there are as many values as rows.
            rng: seed, NumPy generator or RandomState.
            random_state: older name of `rng`.
        """
        rng = check_random_state(rng if rng is not None else random_state)
        model = self.model
        y = self._mean
        if model.k_re:
            u = rng.normal(size=(model.n_groups, model.k_re)) @ factor(self.cov_re).T
            y = y + np.einsum("ij,ij->i", u[self.group_idx], model.exog_re)
        for variance, component in zip(self.vcomp, model._components, strict=True):
            effects = rng.normal(size=int(component.first[-1]))
            part = np.sqrt(variance) * component.value * effects[component.effect]
            y = y + np.bincount(component.row, part, minlength=len(y))
        return np.asarray(y + np.sqrt(self.scale) * rng.normal(size=len(y)))
