"""Where something is zero, perfectly correlated, negative or known: a right number, or none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import lmmax
from tests.inference.test_denominator import Dense, kenward_roger


def scattered(seed: int, n: int = 60, groups: int = 12) -> pd.DataFrame:
    """Return data of one random intercept, with a factor f that means nothing."""
    rng = np.random.default_rng(seed)
    g = rng.integers(0, groups, n)
    f, x = rng.choice(["a", "b", "c"], n), rng.normal(size=n)
    y = 0.5 * x + 0.5 * rng.normal(size=groups)[g] + rng.normal(size=n)
    return pd.DataFrame({"g": g, "f": f, "x": x, "y": y})


def equal_correlations(data: pd.DataFrame, fit: lmmax.Fit) -> Dense:
    """Return a model with homcs(0 + f | g) by variance, correlation and scale."""
    g, f = data["g"].to_numpy(), pd.factorize(data["f"], sort=True)[0]
    same, other = (g[:, None] == g) * 1.0, np.where(f[:, None] == f, 0.0, 1.0)
    Psi = fit.cov_re.to_numpy()
    v, rho = Psi[0, 0], Psi[0, 1] / Psi[0, 0]
    G = [same * np.where(other > 0.0, rho, 1.0), v * same * other, np.eye(len(data))]
    X = np.column_stack([np.ones(len(data)), data["x"]])
    second = {(0, 1): same * other, (1, 0): same * other}
    return Dense(v * G[0] + fit.scale * G[2], G, second, X, data["y"].to_numpy())


def test_a_correlation_of_one() -> None:
    """Derivatives in the correlation itself, which theta does not have there."""
    seen = {"number": 0, "none": 0}
    for seed in (2, 4, 5, 7, 9, 18, 20):
        data = scattered(seed)
        fit = lmmax.fit("y ~ x + homcs(0 + f | g)", data)
        sd, rho = fit.structures()["estimate"]
        if sd < 0.05 or rho < 1.0 - 1e-6:
            continue
        _, adjusted, _, _ = kenward_roger(equal_correlations(data, fit))
        test = fit.denominator("kenward-roger")
        np.testing.assert_allclose(test.cov, adjusted, rtol=1e-6)
        errors = test.errors(np.eye(2))
        sound = np.isfinite(errors)
        np.testing.assert_allclose(errors[sound] ** 2, np.diag(adjusted)[sound], rtol=1e-6)
        assert (errors[sound] < 3.0 * fit.bse.to_numpy()[sound]).all()
        seen["number"] += int(sound.sum())
        seen["none"] += int((~sound).sum())
    assert seen["number"] >= 4


def regular(seed: int) -> pd.DataFrame:
    """Return data on which second derivatives are large."""
    rng = np.random.default_rng(seed)
    n, groups = 50, 10
    g, f = rng.integers(0, groups, n), rng.choice([1, 2, 3], n)
    data = pd.DataFrame({"g": g, "f": f, "x": rng.normal(size=n)})
    y = rng.normal(size=n) + rng.choice([0, 0.3, 1]) * rng.normal(size=groups)[data["g"]]
    return data.assign(y=y)


def test_a_negative_adjusted_variance_is_none() -> None:
    fit = lmmax.fit("y ~ x + ar1(0 + C(f) | g)", regular(17))
    assert not fit.singular
    variances = np.diag(fit.denominator("kenward-roger").cov)
    assert variances[0] < 0.0 < variances[1]
    reason = r"no standard error or test of Intercept by ddf='kenward-roger'.*-linear' is without"
    with pytest.warns(lmmax.AdjustmentWarning, match=reason):
        table = fit.coefficients("kenward-roger")
    assert table.loc["Intercept", ["std err", "t", "p"]].isna().all()
    assert table.loc["x", "std err"] == pytest.approx(np.sqrt(variances[1]))
    with pytest.warns(lmmax.AdjustmentWarning, match="Intercept, x"):
        assert np.isnan(fit.f_test("Intercept, x", "kenward-roger").statistic)
    with pytest.warns(lmmax.AdjustmentWarning, match="of Intercept by"):
        fit.t_test("x, Intercept", ddf="kenward-roger")
    with pytest.warns(lmmax.AdjustmentWarning, match="of row 0 by"):
        assert np.isnan(fit.predict_mean({"x": [0.0]}, ddf="kenward-roger")["std err"].iloc[0])
    assert "o standard error or test of Intercept" in str(fit.summary(ddf="kenward-roger"))
    assert np.isfinite(fit.coefficients("kenward-roger-linear").to_numpy()).all()
    assert np.isfinite(lmmax.anova(fit, ddf="kenward-roger").table.to_numpy()).all()  # of x alone


@pytest.mark.filterwarnings("ignore::lmmax.AdjustmentWarning")
@pytest.mark.parametrize("structure", ["cs", "hetar1", "toep", "homcs"])
def test_at_limits_errors_are_moderate_or_none(structure: str) -> None:
    for seed in (0, 13, 20, 30):
        fit = lmmax.fit(f"y ~ x + {structure}(0 + C(f) | g)", regular(seed))
        errors = fit.coefficients("kenward-roger")["std err"]
        assert not (errors <= 0.0).any() and not (errors > 3.0 * fit.bse).any()
        linear = fit.coefficients("kenward-roger-linear")["std err"] / fit.bse
        assert ((linear > 1.0 - 1e-9) & (linear < 2.0)).all()


def test_crossed_with_a_variance_of_zero() -> None:
    """The dense formulas hold on the boundary, and the order of the terms means nothing."""
    rng = np.random.default_rng([10, 3])
    n = 36
    g = np.concatenate([np.arange(6), rng.integers(0, 6, n - 6)])
    data = pd.DataFrame({"g": g, "b": rng.integers(0, 4, n), "x": rng.normal(size=n)})
    data["y"] = data["x"] + 1.2 * rng.normal(size=6)[g] + rng.normal(size=n)
    fits = [lmmax.fit(f"y ~ x + {t}", data) for t in ("(1 | g) + (1 | b)", "(1 | b) + (1 | g)")]
    alone = lmmax.fit("y ~ x + (1 | g)", data)
    v = alone.cov_re.iloc[0, 0]
    G = [(data[c].to_numpy()[:, None] == data[c].to_numpy()) * 1.0 for c in ("g", "b")]
    G.append(np.eye(n))
    X = np.column_stack([np.ones(n), data["x"]])
    _, adjusted, W, _ = kenward_roger(
        Dense(v * G[0] + alone.scale * G[2], G, {}, X, data["y"].to_numpy())
    )
    for fit, order in zip(fits, ([0, 1, 2], [1, 0, 2]), strict=True):
        assert fit.singular and fit.engine.name == "crossed"
        np.testing.assert_allclose(fit.denominator("kenward-roger").cov, adjusted, rtol=1e-6)
        own = np.linalg.inv(lmmax.information(fit, "expected").iloc[2:, 2:])
        np.testing.assert_allclose(own, W[np.ix_(order, order)], rtol=1e-6)
        found, expected = lmmax.conditional_aic(fit), lmmax.conditional_aic(alone)
        assert (found.df, found.rho) == pytest.approx((expected.df, expected.rho), rel=1e-6)


def test_no_covariance_where_the_information_is_negative() -> None:
    """At a variance of zero the likelihood may curve upwards: its inverse is no covariance."""
    rng = np.random.default_rng(0)
    g, h, x = np.repeat(np.arange(10), 6), rng.integers(0, 4, 60), rng.normal(size=60)
    seen = 0
    for _ in range(6):
        data = pd.DataFrame({"g": g, "h": h, "x": x, "y": rng.normal(size=60)})
        fit = lmmax.fit("y ~ x + (1 | g) + (1 | h)", data)
        values = np.linalg.eigvalsh(lmmax.information(fit))
        if values[0] > 0.0:
            assert (np.diag(lmmax.joint_covariance(fit)) > 0.0).all()
            continue
        seen += 1
        with pytest.warns(lmmax.AdjustmentWarning, match="no covariance of .*g: var"):
            found = np.diag(lmmax.joint_covariance(fit))
        assert not (found <= 0.0).any()
        assert (np.diag(lmmax.joint_covariance(fit, "expected")) > 0.0).all()
    assert seen


def test_errors_of_structures_whatever_the_sign() -> None:
    """The solver may end at a negative parameter; the errors are those of varcorr()."""
    for seed in (0, 2, 7):
        rng = np.random.default_rng(seed)
        g, t = np.repeat(np.arange(15), 8), np.tile(np.repeat(np.arange(4), 2), 15)
        C = 0.5 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
        b = rng.normal(size=(15, 4)) @ np.linalg.cholesky(C).T
        data = pd.DataFrame({"g": g, "t": t, "y": b[g, t] + rng.normal(size=120)})
        for structure, k in (("ar1", 1), ("hetar1", 4)):
            fit = lmmax.fit(f"y ~ 1 + {structure}(0 + C(t) | g)", data)
            if fit.singular:
                continue
            own, table = fit.structures(), fit.varcorr()
            np.testing.assert_allclose(own["std err"][:k], table["sdcor_se"][:k], rtol=1e-6)
            limits = lmmax.confint(fit, method="wald").filter(like="sd", axis=0)
            half = np.log(limits["upper"] / limits["lower"])[:k] / (2.0 * 1.959963984540054)
            relative = (table["sdcor_se"] / table["sdcor"])[:k]
            np.testing.assert_allclose(half, relative, rtol=1e-6)


def test_a_structure_of_variance_zero() -> None:
    """No error of a standard deviation of zero, no value of its correlation."""
    for seed in range(40):
        data = regular(seed).assign(y=np.random.default_rng(seed).normal(size=50))
        fit = lmmax.fit("y ~ x + homcs(0 + C(f) | g)", data)
        if fit.structures()["estimate"].iloc[0] == 0.0:
            break
    table = fit.structures()
    assert table["std err"].isna().all() and np.isnan(table["estimate"].iloc[1])
    # Nothing of it is left in the model: least squares.
    plain = fit.coefficients("kenward-roger")
    np.testing.assert_allclose(plain["df"], 48.0, rtol=1e-9)
    np.testing.assert_allclose(plain["std err"], fit.bse, rtol=1e-9)


def test_infinite_degrees_of_freedom() -> None:
    """Where no variance is uncertain: known sampling variances, none between studies."""
    rng = np.random.default_rng(7)
    v = rng.uniform(0.02, 0.5, 14)
    data = pd.DataFrame({"study": range(14), "w": 1.0 / v, "x": rng.normal(size=14)})
    data["y"] = 0.4 + np.sqrt(v) * rng.normal(size=14)
    fit = lmmax.fit("y ~ x + (1 | study)", data, weights="w", fix={"scale": 1.0})
    assert fit.cov_re.iloc[0, 0] == 0.0
    assert np.isinf(fit.df).all()
    assert np.isinf(lmmax.anova(fit).table["df_den"]).all()
    np.testing.assert_allclose(fit.pvalues, fit.coefficients("normal")["p"], rtol=1e-12)
    # The variance between groups is uncertain, and means nothing for what varies within them.
    g, x = np.repeat(np.arange(8), 4), np.tile([-1.0, 1.0, 1.0, -1.0], 8)
    y = 2.0 * rng.normal(size=8)[g] + rng.normal(size=32)
    fit = lmmax.fit("y ~ x + (1 | g)", {"y": y, "x": x, "g": g}, fix={"scale": 1.0})
    assert fit.df["Intercept"] < 20.0 and np.isinf(fit.df["x"])
    assert np.isinf(fit.coefficients("kenward-roger")["df"]["x"])
