"""Linear hypotheses: how they are read, and their statistics against matrix algebra and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lmmax.inference import wald

NAMES = ["Intercept", "x", "z", "f[T.b]", "x:f[T.b]", "bs(x, df=4, knots=(1, 2))[1]"]
PARAMS = pd.Series([1.0, 2.0, -1.0, 0.5, 0.25, -3.0], index=NAMES)
_ROOT = np.tril(np.random.Generator(np.random.PCG64(0)).standard_normal((6, 6)))
COV = pd.DataFrame(_ROOT @ _ROOT.T, index=NAMES, columns=NAMES)


def row(**weights: float) -> list[float]:
    """x, z, f, xf, bs and one (the intercept) -> a row of R."""
    order = ["one", "x", "z", "f", "xf", "bs"]
    return [weights.get(name, 0.0) for name in order]


@pytest.mark.parametrize(
    ("text", "R", "r"),
    [
        ("x", [row(x=1)], [0.0]),
        ("x = 2", [row(x=1)], [2.0]),
        ("x == 2", [row(x=1)], [2.0]),
        ("z = -1", [row(z=1)], [-1.0]),
        ("-x = -2.5e-1", [row(x=-1)], [-0.25]),
        ("x - z = 0", [row(x=1, z=-1)], [0.0]),
        ("x = z", [row(x=1, z=-1)], [0.0]),
        ("x + 1 = 2*z - 3", [row(x=1, z=-2)], [-4.0]),
        ("(x + z) / 2 = Intercept", [row(x=0.5, z=0.5, one=-1)], [0.0]),
        ("2 * (x - 3)", [row(x=2)], [6.0]),
        ("f[T.b] = 1", [row(f=1)], [1.0]),
        ("`f[T.b]` = 1", [row(f=1)], [1.0]),
        ("x + x:f[T.b] = 0", [row(x=1, xf=1)], [0.0]),
        ("bs(x, df=4, knots=(1, 2))[1] = z, x = 1", [row(bs=1, z=-1), row(x=1)], [0.0, 1.0]),
        ("x = 1, z = -1,", [row(x=1), row(z=1)], [1.0, -1.0]),
        (["x = 1", "z"], [row(x=1), row(z=1)], [1.0, 0.0]),
        (np.eye(6)[1:3], [row(x=1), row(z=1)], [0.0, 0.0]),
        ((np.eye(6)[1:3], [5.0, 6.0]), [row(x=1), row(z=1)], [5.0, 6.0]),
        ((np.eye(6)[1], 2.0), [row(x=1)], [2.0]),
    ],
)
def test_reading(text: Any, R: list[list[float]], r: list[float]) -> None:
    found, values, labels = wald.linear_hypotheses(PARAMS, text)
    np.testing.assert_array_equal(found, R)
    np.testing.assert_array_equal(values, r)
    assert len(labels) == len(r)


def test_labels_are_what_was_written() -> None:
    _, _, labels = wald.linear_hypotheses(PARAMS, "x:f[T.b]=1, z - x = -2")
    assert labels == ["x:f[T.b]=1", "z - x = -2"]
    _, _, labels = wald.linear_hypotheses(PARAMS, ([row(x=1, z=-2)], [3.0]))
    assert labels == ["x - 2*z = 3"]


@pytest.mark.parametrize(
    ("hypothesis", "message"),
    [
        ("xx = 0", "'xx' in the hypothesis is no coefficient; .* Intercept, x, z"),
        ("`x y` = 0", "'x y' in the hypothesis is no coefficient"),
        ("x * z = 0", r"cannot read the hypothesis 'x \* z = 0'; write a linear one"),
        ("x / z = 0", "cannot read the hypothesis"),
        ("x / 0 = 0", "cannot read the hypothesis"),
        ("x ** 2 = 0", "cannot read the hypothesis"),
        ("x > 2", "cannot read the hypothesis 'x > 2'"),
        ("x = 1 = z", "cannot read the hypothesis 'x = 1 = z'"),
        ("x = ", "cannot read the hypothesis 'x ='"),
        ("x:f[T.b] + = 1", r"cannot read the hypothesis 'x:f\[T.b\] \+ = 1'"),
        ("x = 'a'", "cannot read the hypothesis"),
        ("x = True", "cannot read the hypothesis"),
        ("", "the hypothesis is empty"),
        (" , ", "the hypothesis is empty"),
        ("1 = 1", "hypothesis 1 involves no coefficient"),
        ("x, z = z", "hypothesis 2 involves no coefficient"),
        (np.zeros((1, 6)), "hypothesis 1 involves no coefficient"),
        (np.eye(5), r"one column for each of the 6 coefficients .*got shape \(5, 5\)"),
        ([1.0, np.nan, 0.0, 0.0, 0.0, 0.0], "must be finite"),
        ((np.eye(6), [1.0, 2.0]), r"6 hypotheses need 6 values, got shape \(2,\)"),
        ([["a"] * 6], "a hypothesis is text such as"),
        ({"x": 1.0}, "a hypothesis is text such as"),
    ],
)
def test_hypotheses_that_cannot_be_read(hypothesis: Any, message: str) -> None:
    with pytest.raises(wald.HypothesisError, match=message):
        wald.linear_hypotheses(PARAMS, hypothesis)


def test_aliased_coefficient() -> None:
    params = PARAMS.where(PARAMS.index != "z")
    with pytest.raises(wald.HypothesisError, match="'z' is aliased"):
        wald.t_test(params, COV, "x = z")
    assert wald.t_test(params, COV, "x = 2").table["z"].iloc[0] == 0.0


def test_single_hypotheses() -> None:
    R, r = np.array([row(x=1, z=1), row(f=2)]), np.array([0.5, -1.0])
    table = wald.t_test(PARAMS, COV, (R, r), alpha=0.1).table
    estimate, error = R @ PARAMS, np.sqrt(np.diag(R @ COV.to_numpy() @ R.T))
    z = (estimate - r) / error
    half = stats.norm.ppf(0.95) * error
    expected = [estimate, error, z, 2 * stats.norm.sf(np.abs(z)), estimate - half, estimate + half]
    np.testing.assert_allclose(table.to_numpy().T, expected, rtol=1e-12)
    assert list(table.columns) == ["coef", "std err", "z", "P>|z|", "[0.05", "0.95]"]


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_joint_hypotheses(unit: float) -> None:
    """In any units of a coefficient."""
    units = np.array([1.0, unit, 1.0, 1.0, 1.0, 1.0])
    params, cov = PARAMS * units, COV * np.outer(units, units)
    text = f"x = {unit}, z = -2, f[T.b] = x:f[T.b]"
    R, r = np.array([row(x=1), row(z=1), row(f=1, xf=-1)]), np.array([1.0, -2.0, 0.0])
    difference = R @ PARAMS - r
    statistic = difference @ np.linalg.solve(R @ COV.to_numpy() @ R.T, difference)
    test = wald.wald_test(params, cov, text)
    assert (test.df_num, test.df_denom) == (3, None)
    assert test.statistic == pytest.approx(statistic, rel=1e-9)
    assert test.pvalue == pytest.approx(stats.chi2.sf(statistic, 3), rel=1e-9)
    assert str(test).startswith("Wald test: chi2(3) = ")
    f = wald.wald_test(params, cov, text, 40)
    assert f.statistic == pytest.approx(statistic / 3, rel=1e-9)
    assert f.pvalue == pytest.approx(stats.f.sf(statistic / 3, 3, 40), rel=1e-9)
    assert str(f).startswith("Wald test: F(3, 40) = ")


def test_dependent_hypotheses() -> None:
    with pytest.raises(wald.HypothesisError, match=r"3 hypotheses are linearly dependent.*rank 2"):
        wald.wald_test(PARAMS, COV, "x = 1, z = 1, x + z = 2")


@pytest.mark.parametrize("statistic", [0.0, 1e-8, 1.0, 30.0, 700.0])
def test_tail_probabilities(statistic: float) -> None:
    for df in (1, 2, 7):
        expected = stats.chi2.sf(statistic, df)
        assert wald.chi2_upper(statistic, df) == pytest.approx(expected, rel=1e-9)
        expected = stats.f.sf(statistic, df, 25)
        assert wald.f_upper(statistic, df, 25) == pytest.approx(expected, rel=1e-9)
    expected = 2 * stats.norm.sf(np.sqrt(statistic))
    np.testing.assert_allclose(wald.normal_pvalues(np.sqrt([statistic])), expected, rtol=1e-12)


def test_quantile() -> None:
    assert wald.normal_quantile(0.05) == pytest.approx(stats.norm.ppf(0.975), rel=1e-14)
    for alpha in (0.0, 1.0, 5.0, -0.1, np.nan):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            wald.normal_quantile(alpha)
