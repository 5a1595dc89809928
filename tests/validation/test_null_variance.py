"""Data without any group variance: every fit converges to the constrained maximum.

About half of such data sets have their optimum at a variance of exactly zero, where the
likelihood's slope in the variance is not zero, and where software that inverts the covariance
matrix of the random effects breaks down.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.oracles import lindstrom_bates

lmmax = pytest.importorskip("lmmax")

GROUPS, PER_GROUP = 20, 10


def null_data(seed: int) -> pd.DataFrame:
    """Independent unit errors; ``x`` varies between the groups, ``z`` within them."""
    rng = np.random.Generator(np.random.PCG64(seed))
    g = np.repeat(np.arange(GROUPS), PER_GROUP)
    x = np.round(rng.standard_normal(GROUPS), 4)[g]
    z = np.round(rng.standard_normal(len(g)), 4)
    y = np.round(5 + 2 * x + z + rng.standard_normal(len(g)), 6)
    return pd.DataFrame({"y": y, "x": x, "z": z, "g": g})


def constrained_optimum(problem: dict[str, Any], reml: bool) -> tuple[float, float]:
    """The relative group variance and the criterion there, by bisection of the slope.

    With one random effect and nearly balanced groups the criterion has one minimum over
    variances >= 0; it is at zero where the slope there is positive.
    """

    def slope(variance: float) -> float:
        gradient, _ = lindstrom_bates.derivatives_D(**problem, D=[[variance]], reml=reml)
        return float(gradient[0])

    low, high = 0.0, 0.0
    if slope(0.0) < 0:
        high = 1.0
        while slope(high) < 0:
            low, high = high, 2 * high
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return high, float(lindstrom_bates.criterion(**problem, D=[[high]], reml=reml))


@pytest.mark.parametrize("seed", range(60))
def test_converges_to_the_constrained_maximum(seed: int) -> None:
    data, reml = null_data(seed), seed % 2 == 0
    problem = {
        "y": data["y"].to_numpy(),
        "X": np.column_stack([np.ones(len(data)), data["x"], data["z"]]),
        "Z": np.ones((len(data), 1)),
        "codes": data["g"].to_numpy(),
    }
    variance, criterion = constrained_optimum(problem, reml)
    fit = lmmax.fit("y ~ x + z + (1 | g)", data, reml=reml)
    assert fit.converged, fit.status
    assert fit.deviance == pytest.approx(criterion, abs=1e-8)
    assert np.asarray(fit.cov_re)[0, 0] / fit.scale == pytest.approx(variance, abs=1e-6)
    assert fit.singular == (variance == 0)
    parts = lindstrom_bates.parts(**problem, D=[[variance]])
    np.testing.assert_allclose(fit.params, parts.beta, atol=1e-7)
