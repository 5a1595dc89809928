"""Data of similar size reuse compiled code: no retrace, few buckets."""

from __future__ import annotations

import numpy as np
import pytest

import lmmax
from lmmax import estimation
from tests.simulate import simulate


def test_similar_data_options_and_criteria_share_one_executable() -> None:
    solve = estimation._compiled["newton"]

    def fit(seed: int, *, groups: int, p: int, **options: object) -> lmmax.Fit:
        sizes = np.random.default_rng(seed).integers(2, 9, groups)
        case = simulate(seed, p=p, sizes=sizes)
        return lmmax.fit_arrays(case["y"], case["X"], case["codes"], case["Z"], **options)

    first = fit(0, groups=15, p=3)
    before = solve._cache_size()
    fit(1, groups=40, p=4, reml=False)
    fit(2, groups=64, p=3, tol=1e-8, max_steps=50, em_steps=1)
    fit(3, groups=15, p=3, covariance="diag")
    fit(4, groups=15, p=3, fix={"scale": 1.0})
    fit(5, groups=15, p=3, start=first)
    first.refit_ml()
    first.refit(first.design.y[::-1].copy())
    assert solve._cache_size() == before


@pytest.mark.parametrize("groups", [2000, 2300, 2500])
def test_thousands_of_unequal_groups_share_a_bucket(groups: int) -> None:
    case = simulate(groups, sizes=np.full(groups, 3))
    fit = lmmax.fit_arrays(case["y"], case["X"], case["codes"], case["Z"])
    assert fit.converged
    assert fit.compression.problem.U.shape[2] in (2048, 2560)
