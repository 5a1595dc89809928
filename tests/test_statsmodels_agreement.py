"""statsmodels' MixedLM: equal log-likelihoods at equal parameters, equal estimates where it works.

Parameters are shared rather than each package's optimum compared, since statsmodels stops early
by default. Standard errors of variance parameters are not compared: they are wrong there.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
import pytest

import lmmax
from lmmax import functional
from tests.compiled import jit
from tests.reference import load_data
from tests.validation.models import make_model

sm = pytest.importorskip("statsmodels.api")
mixed = pytest.importorskip("statsmodels.regression.mixed_linear_model")
ConvergenceWarning = pytest.importorskip("statsmodels.tools.sm_exceptions").ConvergenceWarning

CRITERION = jit(functional.criterion)
# Unrestricted, unweighted models of the validation matrix: one, two, three, and four effects.
NUMBERS = (0, 11, 1, 23, 4, 26, 6, 39)


def statsmodels_loglike(m: dict[str, Any], D: np.ndarray, reml: bool) -> float:
    """MixedLM's profile log-likelihood at relative covariance D (q, q)."""
    model = sm.MixedLM(m["y"], m["X"], m["codes"], m["Z"])
    # fit() would set these; loglike() reads them.
    model.reml, model.cov_pen, model.fe_pen = reml, None, None
    params = mixed.MixedLMParams.from_components(
        fe_params=np.zeros(m["X"].shape[1]), cov_re=D, vcomp=np.empty(0)
    )
    return float(model.loglike(params, profile_fe=True))


@pytest.mark.parametrize("reml", [True, False], ids=["reml", "ml"])
@pytest.mark.parametrize("number", NUMBERS)
def test_log_likelihood_at_shared_parameters(number: int, reml: bool) -> None:
    model = make_model(number)
    assert model.kind.full and model.weights is None
    m = model.matrices()
    q = m["Z"].shape[1]
    rng = np.random.Generator(np.random.PCG64(number))
    problem = functional.problem(m["y"], m["X"], m["codes"], m["Z"])
    for _ in range(3):
        factor = np.tril(rng.standard_normal((q, q)))
        D = factor @ factor.T
        with jax.enable_x64(True):
            theta = jax.numpy.asarray(factor[np.tril_indices(q)])
            ours = float(CRITERION(problem, theta, reml))
        assert ours == pytest.approx(-2 * statsmodels_loglike(m, D, reml), rel=1e-10, abs=1e-8)


@pytest.mark.parametrize("reml", [True, False], ids=["reml", "ml"])
@pytest.mark.parametrize(
    ("name", "fixed", "effects", "group"),
    [
        ("dietox", "Weight ~ Time", "1", "Pig"),
        ("sleepstudy", "Reaction ~ Days", "1 + Days", "Subject"),
    ],
)
def test_estimates(name: str, fixed: str, effects: str, group: str, reml: bool) -> None:
    data = load_data(name)
    model = sm.MixedLM.from_formula(fixed, data, groups=group, re_formula=f"~ {effects}")
    with warnings.catch_warnings():
        # Rounding may keep its line search from so small a gradient; the estimates are compared.
        warnings.simplefilter("ignore", ConvergenceWarning)
        theirs = model.fit(reml=reml, method="bfgs", gtol=1e-9)
    ours = lmmax.fit(f"{fixed} + ({effects} | {group})", data, reml=reml)
    assert ours.llf == pytest.approx(theirs.llf, abs=1e-8)
    assert ours.scale == pytest.approx(theirs.scale, rel=1e-5)
    np.testing.assert_allclose(ours.params, theirs.fe_params, rtol=1e-6)
    largest = np.abs(np.asarray(theirs.cov_re)).max()
    np.testing.assert_allclose(ours.cov_re, theirs.cov_re, rtol=0, atol=1e-4 * largest)
    # Balanced or nearly so, where statsmodels' cross block does no harm.
    np.testing.assert_allclose(ours.bse, theirs.bse_fe, rtol=1e-4)
