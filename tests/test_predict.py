"""Predictions of rows whose mean the data do not tell."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.compress.columns import column_factor, dependence
from lmmax.statsmodels import MixedLM

NEW = {"f": ["c", "c", "a"], "h": ["r", "q", "r"], "g": [1, 1, 2]}


@pytest.fixture(scope="module")
def cells() -> pd.DataFrame:
    """Two factors without data in their cell (c, r)."""
    rng = np.random.default_rng(8)
    n = 70
    data = pd.DataFrame(
        {
            "g": rng.integers(0, 8, n),
            "f": rng.choice(list("abc"), n),
            "h": rng.choice(list("pqr"), n),
        }
    )
    data = data[~((data["f"] == "c") & (data["h"] == "r"))].reset_index(drop=True)
    return data.assign(y=rng.normal(size=len(data)) + rng.normal(size=8)[data["g"]])


def fitted(data: pd.DataFrame, f: Sequence[str], h: Sequence[str]) -> lmmax.Fit:
    ordered = data.assign(f=pd.Categorical(data["f"], f), h=pd.Categorical(data["h"], h))
    with pytest.warns(lmmax.RankWarning, match="dropped"):
        return lmmax.fit("y ~ f * h + (1 | g)", ordered)


def test_an_empty_cell_is_nan_whatever_the_order_of_levels(cells: pd.DataFrame) -> None:
    means = []
    for f, h in (("abc", "pqr"), ("cab", "rpq"), ("bac", "qpr")):
        fit = fitted(cells, list(f), list(h))
        with pytest.warns(lmmax.RankWarning, match=r"mean of 1 row of newdata \(the first: row 0"):
            mean = fit.predict_mean(NEW)
        with pytest.warns(lmmax.RankWarning, match=r"cannot be estimated and is NaN: 'f\["):
            values = fit.predict(NEW)
        assert mean.iloc[0].isna().all() and np.isnan(values[0])
        # The same as hypotheses on the coefficients.
        rows = fit.design.new_data(NEW, need_groups=False).X
        np.testing.assert_allclose(fit.t_test(rows[1:]).table.iloc[:, 0], mean.iloc[1:, 0])
        if rows[0, fit.params.isna()].any():
            with pytest.raises(ValueError, match=r"aliased \(not estimable\)"):
                fit.t_test(rows[:1])
        means.append(np.column_stack([mean.iloc[1:], values[1:]]))
        # All rows of the fit can be predicted, as data too.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = fit.predict(cells)
        np.testing.assert_allclose(again, fit.fittedvalues, rtol=1e-10)
    np.testing.assert_allclose(means[1], means[0], rtol=1e-6)
    np.testing.assert_allclose(means[2], means[0], rtol=1e-6)


def test_statsmodels_predictions(cells: pd.DataFrame) -> None:
    with pytest.warns(lmmax.RankWarning):
        result = MixedLM.from_formula("y ~ f * h", cells, groups="g").fit()
    native = fitted(cells, list("abc"), list("pqr"))
    with pytest.warns(lmmax.RankWarning, match="mean of 1 row of exog cannot be estimated"):
        found = result.predict(pd.DataFrame(NEW))
    with pytest.warns(lmmax.RankWarning):
        expected = native.predict_mean(NEW)["predicted"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(result.predict(), native.fittedvalues_marginal, rtol=1e-6)
    result.remove_data()
    with pytest.warns(lmmax.RankWarning, match="1 row of exog"):
        assert np.isnan(result.predict(pd.DataFrame(NEW))[0])


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("origin", [0.0, 2000.0])
def test_what_is_a_combination_does_not_depend_on_units(unit: float, origin: float) -> None:
    rng = np.random.default_rng(1)
    x = unit * (rng.normal(size=40) + origin)
    X = np.column_stack([np.ones(40), x, 2.0 * x + unit, rng.normal(size=40)])
    factor = column_factor(X, None)
    assert factor.kept.tolist() == [0, 1, 3]
    for weights in (None, rng.uniform(0.5, 2.0, 40)):
        found = dependence(X, factor if weights is None else column_factor(X, weights), weights)
        np.testing.assert_allclose(X[:, found.kept] @ found.A, X[:, found.aliased], rtol=1e-12)
        rows = np.repeat(X[:1], 4, axis=0)
        rows[1, 3] = -7.0  # may be anything
        rows[2, 1:3] += unit * np.array([30.0, 60.0])  # on the line, far from the data
        rows[3, 2] += 1e-3 * unit  # off it
        assert found.missed(rows)[:, 0].tolist() == [False, False, False, True]
        assert not found.missed(X).any()
