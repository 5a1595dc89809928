"""Inference does not depend on origins, units and order: every method on every form."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.statsmodels import MixedLM

TOLERANCE = 1e-6
N, GROUPS = 120, 15
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grouped": ("y ~ x + z + (1 + x | g)", "y ~ z + x + (0 + x + 1 | g)", {"weights": "w"}),
    "nested": (
        "y ~ x + z + (1 + x | s) + (1 | s:g)",
        "y ~ z + x + (1 | s:g) + (1 + x | s)",
        {},
    ),
    "crossed": ("y ~ x + z + (1 + x | g) + (1 | h)", "y ~ z + x + (1 | h) + (1 + x | g)", {}),
    "structured": ("y ~ x + z + hetar1(0 + C(t) | g)", "y ~ z + x + hetar1(0 + C(t) | g)", {}),
    "relmat": ("y ~ x + z + (1 + x | g)", "y ~ z + x + (1 + x | g)", {}),
    "iterative": (
        "y ~ x + z + (1 + x | g) + (1 | h)",
        "y ~ z + x + (1 + x | g) + (1 | h)",
        {"engine": "iterative"},
    ),
    "singular": ("v ~ x + z + (1 + x | g)", "v ~ z + x + (1 + x | g)", {}),
}
"""Each form as a formula, the same with its terms the other way round, and options."""


def frame() -> pd.DataFrame:
    """Return data of a random slope, nested and crossed factors; v has no random effects."""
    rng = np.random.Generator(np.random.PCG64(3))
    g = np.repeat(np.arange(GROUPS), N // GROUPS)
    h, s = np.arange(N) % 5, g // 3
    x, z, v = rng.normal(size=(3, N))
    y = 1.0 + 0.5 * x + rng.normal(size=GROUPS)[g] + 0.7 * rng.normal(size=GROUPS)[g] * x
    y = y + rng.normal(size=5)[h] + rng.normal(size=5)[s] + rng.normal(size=N)
    w = np.exp(0.3 * rng.normal(size=N))
    t = np.tile(np.arange(3), N // 3)
    return pd.DataFrame({"y": y, "v": v, "x": x, "z": z, "g": g, "h": h, "s": s, "w": w, "t": t})


def fitted(form: str, data: pd.DataFrame, order: bool = False) -> lmmax.Fit:
    """Return the fit of a form, its terms the other way round if ``order``."""
    formula, other, options = FORMS[form]
    if form == "relmat":
        labels = np.unique(data["g"])
        distance = np.abs(np.subtract.outer(np.arange(GROUPS), np.arange(GROUPS)))
        options = {"relmat": {"g": pd.DataFrame(0.5**distance, index=labels, columns=labels)}}
    return lmmax.fit(other if order else formula, data, **options)


def numbers(
    fit: lmmax.Fit, shift: float = 0.0, x: float = 1.0, y: float = 1.0
) -> dict[Hashable, float]:
    """Return what does not depend on the units x and y and the origin shift, in units of one."""
    found: dict[Hashable, float] = {}
    exact = fit.engine.name != "iterative"
    methods = ["satterthwaite", "residual"]
    methods += ["kenward-roger", "kenward-roger-linear"] * exact
    units = {"x": y / x, "z": y, "scale": y**2}
    for ddf in methods:
        table = fit.coefficients(ddf)
        for name in ("x", "z"):
            row = table.loc[name]
            found[ddf, name, "error"] = row["std err"] / units[name]
            for column in ("df", "t", "p"):
                found[ddf, name, column] = row[column]
        mean = fit.predict_mean({"x": [(0.3 + shift) * x], "z": [0.2]}, ddf=ddf).iloc[0]
        found[ddf, "mean"], found[ddf, "mean", "error"] = mean.iloc[:2] / y
        found[ddf, "mean", "df"] = mean["df"]
        joint = fit.f_test("Intercept, x, z", ddf)
        found[ddf, "F"] = joint.statistic
        if ddf != "satterthwaite":  # its principal axes, as lmerTest's, are those of the units
            assert joint.df_denom is not None
            found[ddf, "F", "df"] = joint.df_denom
    for _, row in fit.varcorr().iterrows():
        if row["group"] == "Residual" or (row["var1"] == "x" and row["var2"] is None):
            unit = y if row["group"] == "Residual" else y / x
            found["sd", row["var1"]] = row["sdcor"] / unit
            found["sd", row["var1"], "error"] = row["sdcor_se"] / unit
    for _, row in fit.structures().iterrows():
        unit = y if "sd" in row["parameter"] else 1.0
        found["structure", row["parameter"]] = row["estimate"] / unit
        found["structure", row["parameter"], "error"] = row["std err"] / unit
    if not exact:
        return found
    matrices = {kind: lmmax.joint_covariance(fit, kind) for kind in ("observed", "expected")}
    effective = lmmax.conditional_aic(fit)
    found["effective"], found["known"] = effective.df, effective.rho
    if fit.engine.name in ("grouped", "nested"):
        matrices["sandwich"] = lmmax.sandwich(fit)
        found["score"] = float(lmmax.scores(fit)["scale"].abs().sum()) * units["scale"]
        for kind in ("CR0", "CR2", "CR3"):
            robust = lmmax.robust(fit, type=kind)
            found[kind] = robust.bse["x"] / units["x"]
            found[kind, "df"] = robust.df["x"]
            found[kind, "F"] = robust.wald_test("Intercept, x, z").statistic
    for kind, matrix in matrices.items():
        for name in matrix.index:
            if name in units or "var(x)" in name:
                unit = units.get(name, (y / x) ** 2)
                found[kind, name] = float(np.sqrt(matrix.loc[name, name])) / unit
    return found


def check(found: dict[Hashable, float], expected: dict[Hashable, float]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=TOLERANCE, err_msg=str(key))


@pytest.mark.parametrize("form", FORMS)
def test_origin_units_and_order(form: str) -> None:
    data = frame()
    expected = numbers(fitted(form, data))
    far = 2000.0 * float(data["x"].std())
    for shift, x, y in ((far, 1e-6, 1e6), (0.0, 1e6, 1e-6)):
        moved = data.assign(x=(data["x"] + shift) * x, y=data["y"] * y, v=data["v"] * y)
        check(numbers(fitted(form, moved), shift, x, y), expected)
    mixed = data.sample(frac=1.0, random_state=1)
    if form not in ("relmat", "iterative"):  # random probes belong to levels in their order
        mixed = mixed.assign(g=(mixed["g"] * 7) % GROUPS, h=-mixed["h"])
    check(numbers(fitted(form, mixed, order=True)), expected)


def test_quadratic_growth() -> None:
    """Years, squared: errors of cov_re's entries are those of a covariate near zero."""
    rng = np.random.Generator(np.random.PCG64(5))
    g, t = np.repeat(np.arange(25), 10), np.tile(np.arange(10.0), 25)
    b = rng.normal(size=(25, 3)) * [1.0, 0.3, 0.05]
    y = 1.0 + 0.2 * t + b[g, 0] + b[g, 1] * t + b[g, 2] * t**2 + rng.normal(size=250)
    found = []
    for origin in (0.0, 2000.0):
        data = pd.DataFrame({"y": y, "t": t + origin, "g": g})
        fit = lmmax.fit("y ~ t + I(t**2) + (1 + t + I(t**2) | g)", data)
        own = []
        for ddf in ("kenward-roger", "satterthwaite"):
            own += fit.coefficients(ddf).iloc[2][["std err", "df"]].tolist()
            own.append(fit.predict_mean({"t": [origin + 3.0]}, ddf=ddf)["std err"].iloc[0])
        own.append(fit.f_test(np.eye(3), "kenward-roger").statistic)
        last = fit.natural_parameters.names[5]
        matrices = lmmax.joint_covariance(fit), lmmax.sandwich(fit)
        own += [matrix.loc[last, last] for matrix in matrices]
        own += [lmmax.conditional_aic(fit).df, lmmax.robust(fit).bse.iloc[2]]
        found.append(own)
    assert found[0][1] == pytest.approx(24.0, rel=1e-9)  # a balanced design: a t test of 25 numbers
    np.testing.assert_allclose(found[1], found[0], rtol=TOLERANCE)


def test_batches() -> None:
    """Errors, degrees of freedom and joint tests of lanes, those at the boundary among them."""
    data = frame()
    responses = data[["y", "v"]].assign(far=data["y"] + 100.0 * (data["g"] % 4))
    tests = {"joint": "x = 0, z = 0"}
    far = 2000.0 * float(data["x"].std())
    for formula in ("y ~ x + z + (1 + x | g)", "y ~ x + z + (1 + x | g) + (1 | h)"):
        own = lmmax.fit_many(formula, data, responses, tests=tests)
        for name in responses:
            single = lmmax.fit(formula, data.assign(y=responses[name]))
            np.testing.assert_allclose(own.df.loc[name], single.df, rtol=1e-5)
        for shift, x, y in ((far, 1.0, 1.0), (0.0, 1e-6, 1e6)):
            moved = data.assign(x=(data["x"] + shift) * x)
            there = lmmax.fit_many(formula, moved, responses * y, tests=tests)
            np.testing.assert_allclose(there.df[["x", "z"]], own.df[["x", "z"]], rtol=TOLERANCE)
            errors = there.bse[["x", "z"]] / y * [x, 1.0]
            np.testing.assert_allclose(errors, own.bse[["x", "z"]], rtol=TOLERANCE)
            np.testing.assert_allclose(
                there.test("joint").iloc[:, 0], own.test("joint").iloc[:, 0], rtol=TOLERANCE
            )


def test_drop_in() -> None:
    data, found = frame(), []
    for origin in (0.0, 2000.0):
        X = np.column_stack([np.ones(N), data["x"] + origin])
        for fe_cov in ("gls", "hessian"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = MixedLM(data["y"].to_numpy(), X, data["g"].to_numpy(), X)
                result = model.fit(fe_cov=fe_cov)
            found.append([result.bse[1], result.bse[-1], np.asarray(result.bse_re)[-1]])
    assert not np.allclose(found[0][0], found[1][0], rtol=1e-3)
    np.testing.assert_allclose(found[2:], found[:2], rtol=TOLERANCE)
