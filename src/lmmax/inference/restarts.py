"""A model that fits worse than a special case of it was not maximised, and is fitted again from it.

The likelihood ratio of nested models is not negative at their optima.  If it is negative, the
search for the larger model has ended at another optimum than the highest.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from .nesting import covariances_like

if TYPE_CHECKING:
    from ..results import Fit
    from .submodels import Submodel

TIE = 1e-6
"""Criteria that differ by less are equal: both fits may be the same, on a boundary."""
ROUNDING = 1e-12
"""Rounding in a criterion, relative to its size."""
MONTE_CARLO = 4.0
"""Differences of criteria below this many standard errors of them are noise."""


def below(small: Submodel, large: Submodel) -> bool:
    """Return whether a larger model fits worse than a smaller one, by more than is noise."""
    noise = MONTE_CARLO * float(np.hypot(small.criterion_error, large.criterion_error))
    slack = TIE + ROUNDING * abs(large.criterion) + noise
    return not large.criterion - small.criterion <= slack


def fitted_from(large: Fit, small: Submodel) -> Fit:
    """Fit a larger model again from where a smaller one has its optimum.

    A variance that the smaller model lacks starts at zero, where the search looks for a way up, and
    once more at what it was estimated as.

    Returns:
        The best fit, which may be the one that there was.
    """
    from ..fit import ConvergenceWarning, refit_settings

    origin = covariances_like(small, large)
    found = large
    for Psi in (origin, origin + np.asarray(large.cov_re)):
        start = {"cov_re": Psi, "scale": small.scale}
        with warnings.catch_warnings():
            # It becomes a note of the table.
            warnings.simplefilter("ignore", ConvergenceWarning)
            again = refit_settings(large, start=start)
        if again.deviance < found.deviance - TIE:
            found = again
    return found


def restart_note(name: str, before: Fit, after: Fit, special: str) -> str:
    """Return what a reader should know of a model that was fitted again.

    Args:
        name: of the model.
        before: its fit.
        after: the better fit.
        special: the smaller model that it was fitted again from.
    """
    return (
        f"{name} was not maximised: from the optimum of {special} its log-likelihood reaches "
        f"{after.llf:.4f}, not {before.llf:.4f}.  The better fit is used here; to have it, fit the "
        "model with start= at the covariances of the smaller one."
    )


def lost_note(name: str, special: str, gap: float, certain: bool = True) -> str:
    """Return why there is no test of a model that fits worse than a smaller one.

    Args:
        name: of the model.
        special: the smaller one.
        gap: what the log-likelihood is lower.
        certain: whether the models are known to be nested.
    """
    unless = "" if certain else ", unless the models are not nested"
    return (
        f"{name} was not maximised{unless}: its log-likelihood is {gap:.4g} lower than that of "
        f"{special}, a special case of it, also when fitted again from there.  A likelihood ratio "
        "of the two does not exist."
    )
