"""Linear hypotheses: how they are read, and their statistics against matrix algebra and scipy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lmmax.compress.columns import Dependence
from lmmax.inference import wald
from lmmax.inference.denominator import Fixed

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


def fit_of(params: pd.Series = PARAMS, cov: pd.DataFrame = COV, df: float = np.inf) -> Any:
    """What the tests need of a fit: coefficients, their covariance, and degrees of freedom."""
    kept, aliased = np.flatnonzero(params.notna()), np.flatnonzero(params.isna())
    beta = params.to_numpy()[kept]
    name = "normal" if np.isinf(df) else "residual"
    test = Fixed(name, cov.to_numpy()[np.ix_(kept, kept)], np.full(len(kept), df))
    return SimpleNamespace(
        params=params,
        layout=SimpleNamespace(
            fixed=SimpleNamespace(kept=kept),
            dependence=Dependence(kept, aliased, np.zeros((len(kept), len(aliased))), aliased),
        ),
        estimates=SimpleNamespace(beta=beta),
        denominator=lambda ddf: test,
    )


def test_aliased_coefficient() -> None:
    fit = fit_of(PARAMS.where(PARAMS.index != "z"))
    with pytest.raises(wald.HypothesisError, match="'z' is aliased"):
        wald.t_test(fit, "x = z", 0.05, None)
    assert wald.t_test(fit, "x = 2", 0.05, None).table["z"].iloc[0] == 0.0


@pytest.mark.parametrize("df", [np.inf, 7.5])
def test_single_hypotheses(df: float) -> None:
    R, r = np.array([row(x=1, z=1), row(f=2)]), np.array([0.5, -1.0])
    table = wald.t_test(fit_of(df=df), (R, r), 0.1, None).table
    distribution = stats.norm() if np.isinf(df) else stats.t(df)
    estimate, error = R @ PARAMS, np.sqrt(np.diag(R @ COV.to_numpy() @ R.T))
    t = (estimate - r) / error
    half = distribution.ppf(0.95) * error
    p = 2 * distribution.sf(np.abs(t))
    expected = {"coef": estimate, "std err": error, "df": np.full(2, df), "t": t, "p": p}
    if np.isinf(df):
        expected = {"coef": estimate, "std err": error, "z": t, "p": p}
    expected |= {"lower": estimate - half, "upper": estimate + half}
    pd.testing.assert_frame_equal(table.reset_index(drop=True), pd.DataFrame(expected), rtol=1e-12)


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_joint_hypotheses(unit: float) -> None:
    """In any units of a coefficient."""
    units = np.array([1.0, unit, 1.0, 1.0, 1.0, 1.0])
    params, cov = PARAMS * units, COV * np.outer(units, units)
    text = f"x = {unit}, z = -2, f[T.b] = x:f[T.b]"
    R, r = np.array([row(x=1), row(z=1), row(f=1, xf=-1)]), np.array([1.0, -2.0, 0.0])
    difference = R @ PARAMS - r
    statistic = difference @ np.linalg.solve(R @ COV.to_numpy() @ R.T, difference)
    test = wald.joint_test(fit_of(params, cov), text, None)
    assert (test.df_num, test.df_denom) == (3, None)
    assert test.statistic == pytest.approx(statistic, rel=1e-9)
    assert test.pvalue == pytest.approx(stats.chi2.sf(statistic, 3), rel=1e-9)
    assert str(test).startswith("Wald test: chi2(3) = ")
    f = wald.joint_test(fit_of(params, cov, 40.0), text, None)
    assert f.statistic == pytest.approx(statistic / 3, rel=1e-9)
    assert f.pvalue == pytest.approx(stats.f.sf(statistic / 3, 3, 40), rel=1e-9)
    assert str(f).startswith("Wald test: F(3, 40) = ")


@pytest.mark.parametrize("df", [np.inf, 40.0])
def test_dependent_hypotheses(df: float) -> None:
    with pytest.raises(wald.HypothesisError, match=r"3 hypotheses are linearly dependent.*rank 2"):
        wald.joint_test(fit_of(df=df), "x = 1, z = 1, x + z = 2", None)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 5.0, -0.1, np.nan])
def test_alpha_is_checked(alpha: float) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        wald.t_test(fit_of(), "x = 1", alpha, None)
