"""Awkward data: the right answer where there is one, else an error that names cause and remedy.

Where a change of the data changes the model in a known way (units, origin, order of rows, basis of
the random effects, weights), results must be those of the plain fit after conversion. Elsewhere
they are held against the dense and closed-form oracles, which share no code with the library.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from tests.oracles import dense, lindstrom_bates

FORMULA = "y ~ x + z + (1 + x | g)"
INTERCEPT = "y ~ x + z + (1 | g)"
GROUPS, PER_GROUP = 18, 8
# Conversions of units and orders of rows cost a few units in the last place of a sum over rows.
EXACT = 1e-10
# An origin at 2^20 leaves 52 - 20 bits of a covariate, 2e-10.
FAR = float(2**20)


def simulate(seed: int = 1, groups: int = GROUPS, per_group: int = PER_GROUP) -> pd.DataFrame:
    """Intercept and slope per group; columns are multiples of 2^-20, so adding FAR is exact."""
    rng = np.random.Generator(np.random.PCG64(seed))
    g = np.repeat(np.arange(groups), per_group)
    x, z = rng.standard_normal((2, len(g)))
    b = rng.standard_normal((groups, 2)) @ np.array([[1.0, 0.4], [0.0, 0.6]])
    x = np.round(x * FAR) / FAR
    y = 3 + 2 * x - z + b[g, 0] + b[g, 1] * x + 0.7 * rng.standard_normal(len(g))
    return pd.DataFrame({"y": np.round(y * FAR) / FAR, "x": x, "z": z, "g": g})


def matrices(data: pd.DataFrame, effects: tuple[str, ...] = ("1", "x")) -> dict[str, Any]:
    """Arguments of the oracles for ``y ~ x + z``."""
    one = np.ones(len(data))
    Z = np.column_stack([one if name == "1" else data[name] for name in effects])
    return {
        "y": data["y"].to_numpy(float),
        "X": np.column_stack([one, data["x"], data["z"]]),
        "Z": Z,
        "codes": pd.factorize(data["g"])[0],
    }


def assert_optimal(fit: lmmax.Fit, problem: dict[str, Any], tolerance: float = 1e-6) -> None:
    """First-order conditions over positive semidefinite D, by the closed-form gradient.

    ``G`` is positive semidefinite and ``D G = 0``, relative to the terms ``G`` is a difference of.
    """
    D = fit.cov_re.to_numpy() / fit.scale
    q = len(D)
    value = lindstrom_bates.criterion(**problem, D=D, reml=fit.reml)
    assert fit.deviance == pytest.approx(value, rel=1e-9, abs=1e-8)
    gradient, _ = lindstrom_bates.derivatives_D(**problem, D=D, reml=fit.reml)
    G = np.zeros((q, q))
    G[np.tril_indices(q)] = gradient
    G = 0.5 * (G + G.T)
    unit = np.sqrt(np.diag(sum(lindstrom_bates.parts(**problem, D=D).K)))
    G = G / np.outer(unit, unit)
    assert fit.converged, fit.message
    assert np.linalg.eigvalsh(G)[0] > -tolerance
    np.testing.assert_allclose((unit * D * unit[:, None]) @ G, 0.0, atol=tolerance)


def sums_criterion(
    y: np.ndarray, X: np.ndarray, Z: np.ndarray, codes: np.ndarray, D: np.ndarray, reml: bool
) -> float:
    """-2 logL from sums over groups (Woodbury), for data too large for the dense oracles."""
    (n, p), q, m = X.shape, Z.shape[1], codes.max() + 1
    Xy = np.column_stack([X, y])

    def sums(A: np.ndarray) -> np.ndarray:
        products = [
            [np.bincount(codes, Z[:, a] * A[:, b], m) for b in range(A.shape[1])] for a in range(q)
        ]
        return np.moveaxis(np.array(products), 2, 0)

    ZZ, ZXy = sums(Z), sums(Xy)
    H = np.eye(q) + ZZ @ D
    S = Xy.T @ Xy - np.einsum("max,mab,mby->xy", ZXy, D @ np.linalg.inv(H), ZXy, optimize=True)
    beta = np.linalg.solve(S[:p, :p], S[:p, p])
    rss, d = S[p, p] - S[p, :p] @ beta, n - p * reml
    value = np.linalg.slogdet(H)[1].sum() + d * (1 + np.log(2 * np.pi * rss / d))
    return float(value + reml * np.linalg.slogdet(S[:p, :p])[1])


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    return simulate()


@pytest.fixture(scope="module", params=[True, False], ids=["reml", "ml"])
def plain(request: pytest.FixtureRequest, data: pd.DataFrame) -> lmmax.Fit:
    return lmmax.fit(FORMULA, data, reml=request.param)


def assert_same(fit: lmmax.Fit, plain: lmmax.Fit, x: float = 1.0, y: float = 1.0) -> None:
    """Equal after conversion: ``fit`` has x in units of 1 / x and y in units of 1 / y."""
    beta_unit, b_unit = y / np.array([1.0, x, 1.0]), y / np.array([1.0, x])
    degrees = fit.nobs - 3 * fit.reml
    jump = 2 * degrees * np.log(y) + 2 * fit.reml * np.log(x)
    assert fit.status == plain.status == "converged"
    assert fit.singular == plain.singular
    assert fit.deviance - jump == pytest.approx(plain.deviance, rel=EXACT)
    assert fit.scale / y**2 == pytest.approx(plain.scale, rel=EXACT)
    assert fit.scale_se / y**2 == pytest.approx(plain.scale_se, rel=EXACT)
    close = {"rtol": EXACT, "atol": 0.0}
    np.testing.assert_allclose(fit.params / beta_unit, plain.params, **close)
    np.testing.assert_allclose(fit.bse / beta_unit, plain.bse, **close)
    units = np.outer(b_unit, b_unit)
    np.testing.assert_allclose(fit.cov_re / units, plain.cov_re, **close)
    np.testing.assert_allclose(fit.cov_re_se / units, plain.cov_re_se, **close)
    modes = plain.random_effects.to_numpy()
    np.testing.assert_allclose(fit.random_effects / b_unit, modes, rtol=0, atol=EXACT)
    np.testing.assert_allclose(
        fit.random_effects_cov / units, plain.random_effects_cov, rtol=0, atol=EXACT
    )
    fitted = fit.fittedvalues[plain.fittedvalues.index]
    np.testing.assert_allclose(fitted / y, plain.fittedvalues, rtol=0, atol=10 * EXACT)


# --- units, origins, collinearity ------------------------------------------------------------


@pytest.mark.parametrize("y", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("x", [1e-8, 1.0, 1e8])
def test_units(data: pd.DataFrame, plain: lmmax.Fit, x: float, y: float) -> None:
    scaled = data.assign(x=x * data["x"], y=y * data["y"])
    assert_same(lmmax.fit(FORMULA, scaled, reml=plain.reml), plain, x, y)


def test_predictors_on_opposite_scales(data: pd.DataFrame, plain: lmmax.Fit) -> None:
    scaled = data.assign(x=1e8 * data["x"], z=1e-8 * data["z"])
    fit = lmmax.fit(FORMULA, scaled, reml=plain.reml)
    np.testing.assert_allclose(fit.params * [1, 1e8, 1e-8], plain.params, rtol=EXACT)
    np.testing.assert_allclose(fit.bse * [1, 1e8, 1e-8], plain.bse, rtol=EXACT)
    assert fit.deviance == pytest.approx(plain.deviance, rel=EXACT)


def test_predictor_far_from_its_origin(data: pd.DataFrame, plain: lmmax.Fit) -> None:
    """In fixed and random part; 20 bits are lost, and more would be without centring."""
    fit = lmmax.fit(FORMULA, data.assign(x=data["x"] + FAR), reml=plain.reml)
    assert fit.converged and not fit.singular
    assert fit.deviance == pytest.approx(plain.deviance, rel=1e-9)
    assert fit.scale == pytest.approx(plain.scale, rel=1e-9)
    np.testing.assert_allclose(fit.params[["x", "z"]], plain.params[["x", "z"]], rtol=1e-9)
    np.testing.assert_allclose(fit.bse[["x", "z"]], plain.bse[["x", "z"]], rtol=1e-9)
    assert fit.params["Intercept"] == pytest.approx(
        plain.params["Intercept"] - FAR * plain.params["x"], rel=1e-9
    )
    assert fit.cov_re.loc["x", "x"] == pytest.approx(plain.cov_re.loc["x", "x"], rel=1e-8)
    assert fit.cov_re_se.loc["x", "x"] == pytest.approx(plain.cov_re_se.loc["x", "x"], rel=1e-8)
    np.testing.assert_allclose(fit.random_effects["x"], plain.random_effects["x"], atol=1e-8)
    np.testing.assert_allclose(fit.fittedvalues, plain.fittedvalues, rtol=0, atol=1e-8)


def test_response_far_from_zero(data: pd.DataFrame, plain: lmmax.Fit) -> None:
    fit = lmmax.fit(FORMULA, data.assign(y=data["y"] + FAR), reml=plain.reml)
    assert fit.deviance == pytest.approx(plain.deviance, rel=1e-9)
    np.testing.assert_allclose(fit.params - [FAR, 0, 0], plain.params, rtol=1e-9)
    np.testing.assert_allclose(fit.cov_re, plain.cov_re, rtol=1e-8)
    np.testing.assert_allclose(fit.random_effects, plain.random_effects, atol=1e-8)


def test_many_rows_of_a_response_far_from_zero() -> None:
    """As a time stamp may be: its variation is small against it, but far above rounding."""
    data = simulate(2, 1000, 100)
    plain = lmmax.fit(INTERCEPT, data)
    fit = lmmax.fit(INTERCEPT, data.assign(y=data["y"] + 2.0**30))
    assert fit.converged
    assert fit.scale == pytest.approx(plain.scale, rel=1e-7)
    assert fit.cov_re.iloc[0, 0] == pytest.approx(plain.cov_re.iloc[0, 0], rel=1e-7)
    assert fit.deviance == pytest.approx(plain.deviance, rel=1e-7)


@pytest.mark.parametrize("distance", [1e-3, 1e-6])
def test_near_collinear_columns(data: pd.DataFrame, plain: lmmax.Fit, distance: float) -> None:
    """``z`` replaced by ``x + distance z``: the same model in other coordinates."""
    fit = lmmax.fit(FORMULA, data.assign(z=data["x"] + distance * data["z"]), reml=plain.reml)
    lost = np.finfo(float).eps / distance
    jump = 2 * fit.reml * np.log(distance)
    assert fit.deviance - jump == pytest.approx(plain.deviance, abs=1e3 * lost)
    gamma = plain.params["z"] / distance
    assert fit.params["z"] == pytest.approx(gamma, rel=1e2 * lost)
    assert fit.params["x"] == pytest.approx(plain.params["x"] - gamma, rel=1e2 * lost)
    assert fit.bse["z"] == pytest.approx(plain.bse["z"] / distance, rel=1e2 * lost)
    np.testing.assert_allclose(fit.fittedvalues, plain.fittedvalues, rtol=0, atol=1e3 * lost)


@pytest.mark.parametrize("unit", [1.0, 1e-9])
def test_aliased_column(data: pd.DataFrame, plain: lmmax.Fit, unit: float) -> None:
    formula = "y ~ x + z + w + (1 + x | g)"
    aliased = data.assign(w=unit * (2 * data["x"] - 3 * data["z"] + 1))
    with pytest.warns(lmmax.RankWarning, match=r"linear combination.*: w\b"):
        fit = lmmax.fit(formula, aliased, reml=plain.reml)
    assert_same_but_aliased(fit, plain, ["w"])
    newdata = aliased.iloc[:3]
    np.testing.assert_allclose(fit.predict(newdata), plain.predict(newdata), rtol=EXACT)
    with pytest.raises(ValueError, match="'w' is aliased"):
        fit.t_test("w = 0")
    np.testing.assert_allclose(fit.t_test("x = 2").table, plain.t_test("x = 2").table, rtol=1e-8)


def assert_same_but_aliased(fit: lmmax.Fit, plain: lmmax.Fit, aliased: list[str]) -> None:
    kept = [name for name in fit.params.index if name not in aliased]
    assert fit.params[aliased].isna().all() and fit.bse[aliased].isna().all()
    assert fit.conf_int().loc[aliased].isna().all(axis=None)
    assert fit.df_resid == plain.df_resid
    assert fit.deviance == pytest.approx(plain.deviance, rel=EXACT)
    np.testing.assert_allclose(fit.params[kept], plain.params, rtol=EXACT)
    np.testing.assert_allclose(fit.bse[kept], plain.bse, rtol=EXACT)
    np.testing.assert_allclose(fit.cov_re, plain.cov_re, rtol=1e-9)


def test_several_aliased_columns_are_all_named(data: pd.DataFrame, plain: lmmax.Fit) -> None:
    columns = {"v": 0.0, "w": data["x"] - data["z"]}
    with pytest.warns(lmmax.RankWarning, match=r"linear combinations.*: v, w\b"):
        fit = lmmax.fit("y ~ v + x + z + w + (1 + x | g)", data.assign(**columns), reml=plain.reml)
    assert_same_but_aliased(fit, plain, ["v", "w"])


def test_basis_of_the_random_effects(data: pd.DataFrame, plain: lmmax.Fit) -> None:
    """``Z -> Z B`` leaves the criterion alone and takes Psi to ``B^-1 Psi B^-T``."""
    B = np.array([[2.0, 1.0], [-1.0, 3.0]])
    problem = matrices(data)
    fit = lmmax.fit_arrays(
        problem["y"], problem["X"], problem["codes"], problem["Z"] @ B, reml=plain.reml
    )
    assert fit.deviance == pytest.approx(plain.deviance, rel=EXACT)
    np.testing.assert_allclose(fit.params, plain.params, rtol=EXACT)
    np.testing.assert_allclose(B @ fit.cov_re @ B.T, plain.cov_re, rtol=1e-9)
    np.testing.assert_allclose(fit.random_effects.to_numpy() @ B.T, plain.random_effects, atol=1e-9)


def test_categorical_effects_with_and_without_intercept(data: pd.DataFrame) -> None:
    data = data.assign(f=np.where(np.arange(len(data)) % 2, "a", "b"))
    one = lmmax.fit("y ~ x + z + (1 + f | g)", data)
    other = lmmax.fit("y ~ x + z + (0 + f | g)", data)
    B = np.array([[1.0, 0.0], [1.0, 1.0]])
    assert one.deviance == pytest.approx(other.deviance, rel=EXACT)
    np.testing.assert_allclose(B @ one.cov_re @ B.T, other.cov_re, rtol=1e-7)
    np.testing.assert_allclose(one.fittedvalues, other.fittedvalues, atol=1e-8)


# --- order and labels ------------------------------------------------------------------------


def test_order_of_rows(data: pd.DataFrame, plain: lmmax.Fit) -> None:
    rows = np.random.Generator(np.random.PCG64(2)).permutation(len(data))
    fit = lmmax.fit(FORMULA, data.iloc[rows], reml=plain.reml)
    assert list(fit.fittedvalues.index) == list(data.index[rows])
    assert_same(fit, plain)


LABELS = {
    "strings": [f"pig {i}" for i in range(GROUPS)],
    "negative integers": [7 - i for i in range(GROUPS)],
    "floats": [i / 3 for i in range(GROUPS)],
    "tuples": [("farm", i) for i in range(GROUPS)],
    "mixed": [i if i % 2 else f"pig {i}" for i in range(GROUPS)],
    "mixed with tuples": [i if i % 3 else (i, "pig") for i in range(GROUPS)],
    "dates": list(pd.date_range("2020-01-01", periods=GROUPS)),
    "not ascii": [chr(0x3B1 + i) for i in range(GROUPS)],
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_groups(data: pd.DataFrame, plain: lmmax.Fit, kind: str) -> None:
    labels = LABELS[kind]
    columns = {name: data[name].to_numpy() for name in "yxz"}
    columns["g"] = [labels[code] for code in data["g"]]
    fit = lmmax.fit(FORMULA, columns, reml=plain.reml)
    assert fit.deviance == pytest.approx(plain.deviance, rel=EXACT)
    modes = dict(zip(fit.random_effects.index, fit.random_effects.to_numpy(), strict=True))
    for code, label in enumerate(labels):
        np.testing.assert_allclose(modes[label], plain.random_effects.iloc[code], atol=1e-9)
    last = {name: values[-2:] for name, values in columns.items()}
    np.testing.assert_allclose(fit.predict(last), plain.predict(data.iloc[-2:]), rtol=1e-9)


# --- sizes of groups -------------------------------------------------------------------------


@pytest.mark.parametrize("reml", [True, False], ids=["reml", "ml"])
def test_singleton_groups_beside_others(data: pd.DataFrame, reml: bool) -> None:
    codes = np.r_[np.repeat(np.arange(5), 20), np.arange(5, 5 + len(data) - 100)]
    data = data.assign(g=codes)
    fit = lmmax.fit(INTERCEPT, data, reml=reml)
    assert fit.n_groups == 49
    problem = matrices(data, ("1",))
    assert_optimal(fit, problem)
    D = fit.cov_re.to_numpy() / fit.scale
    modes = dense.conditional_modes(**problem, D=D)
    np.testing.assert_allclose(fit.random_effects, modes, atol=1e-9)
    cov = dense.conditional_covariance(problem["Z"], problem["codes"], D, fit.scale)
    np.testing.assert_allclose(fit.random_effects_cov, cov, atol=1e-9)


def test_as_many_groups_as_rows(data: pd.DataFrame) -> None:
    alone = data.assign(g=np.arange(len(data)))
    with pytest.raises(
        lmmax.DataError, match=r"no group of 'g' has more than 1 row,.*\(1 \| g\).*fix=\{'scale'"
    ):
        lmmax.fit(INTERCEPT, alone)
    with pytest.raises(lmmax.DataError, match=r"residual variance is not identified.*\(1 \+ x"):
        lmmax.fit(FORMULA, alone)
    # With one variance known, what remains is the variance of independent rows.
    fit = lmmax.fit(INTERCEPT, alone, fix={"scale": 0.5})
    X, y = matrices(alone)["X"], alone["y"].to_numpy()
    rss = float(np.linalg.lstsq(X, y, rcond=None)[1][0])
    assert fit.converged and fit.scale == pytest.approx(0.5, rel=1e-14)
    # A fit may stop 1e-7 standard errors away, 1e-8 of this variance.
    assert fit.cov_re.iloc[0, 0] + 0.5 == pytest.approx(rss / (len(y) - 3), rel=1e-8)
    for cov_re in (0.5, {"(1 | g)": 0.5}):
        fit = lmmax.fit(INTERCEPT, alone, fix={"cov_re": cov_re})
        assert fit.converged and fit.scale + 0.5 == pytest.approx(rss / (len(y) - 3), rel=1e-8)


def test_every_group_alone_but_slopes_differ(data: pd.DataFrame) -> None:
    """``(0 + x | g)`` is heteroscedasticity in x, which single rows do tell apart."""
    alone = data.assign(g=np.arange(len(data)))
    alone["y"] += (
        2 * alone["x"] * np.random.Generator(np.random.PCG64(9)).standard_normal(len(data))
    )
    fit = lmmax.fit("y ~ x + z + (0 + x | g)", alone)
    assert not fit.singular
    assert_optimal(fit, matrices(alone, ("x",)))


def test_more_effects_than_rows_in_every_group(data: pd.DataFrame) -> None:
    pairs = data.assign(g=np.arange(len(data)) // 2)
    fit = lmmax.fit("y ~ x + z + (1 + x + z | g)", pairs)
    assert_optimal(fit, matrices(pairs, ("1", "x", "z")))


def test_more_effects_than_rows_not_identified(data: pd.DataFrame) -> None:
    """With the same two rows in each group, intercept and slope can make any residual."""
    pairs = data.assign(g=np.arange(len(data)) // 2, x=np.arange(len(data)) % 2)
    with pytest.raises(lmmax.DataError, match=r"no group of 'g' has more than 2 rows.*\(1 \+ x"):
        lmmax.fit(FORMULA, pairs)
    # Without the correlation three moments are left for three variances.
    fit = lmmax.fit("y ~ x + z + (1 + x || g)", pairs)
    assert fit.converged


def test_a_huge_group_beside_singletons() -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    codes = np.r_[np.zeros(100_000, int), np.arange(1, 20), np.repeat(np.arange(20, 50), 4)]
    x, z = rng.standard_normal((2, len(codes)))
    y = 1 + x + z + rng.standard_normal(50)[codes] + rng.standard_normal(len(codes))
    rows = rng.permutation(len(codes))
    data = pd.DataFrame({"y": y, "x": x, "z": z, "g": codes}).iloc[rows]
    assert_at_optimum(lmmax.fit(INTERCEPT, data), data, ("1",))
    assert_at_optimum(lmmax.fit(FORMULA, data), data, ("1", "x"))


@pytest.mark.parametrize("effects", ["1", "1 + x"])
def test_a_hundred_thousand_groups(effects: str) -> None:
    rng = np.random.Generator(np.random.PCG64(4))
    codes = np.repeat(np.arange(100_000), rng.integers(1, 4, 100_000))
    x, z = rng.standard_normal((2, len(codes)))
    b = 0.8 * rng.standard_normal((100_000, 2))
    y = 1 + x + z + b[codes, 0] + ("x" in effects) * b[codes, 1] * x
    data = pd.DataFrame({"y": y + rng.standard_normal(len(codes)), "x": x, "z": z, "g": codes})
    fit = lmmax.fit(f"y ~ x + z + ({effects} | g)", data)
    assert_at_optimum(fit, data, tuple(effects.split(" + ")))
    assert fit.random_effects.shape == (100_000, len(fit.cov_re))
    # Six standard errors.
    np.testing.assert_allclose(np.diag(fit.cov_re), 0.64, atol=6 * np.diag(fit.cov_re_se).max())


def assert_at_optimum(fit: lmmax.Fit, data: pd.DataFrame, effects: tuple[str, ...]) -> None:
    """Equal to the criterion by sums, and no neighbour is better."""
    problem = matrices(data, effects)
    D = fit.cov_re.to_numpy() / fit.scale
    q = len(D)
    assert fit.converged and not fit.singular

    def value(D: np.ndarray) -> float:
        return sums_criterion(**problem, D=D, reml=fit.reml)

    best = value(D)
    assert fit.deviance == pytest.approx(best, rel=1e-11)
    sd = np.sqrt(np.diag(D))
    for i, j in zip(*np.tril_indices(q), strict=True):
        E = np.zeros((q, q))
        E[i, j] = E[j, i] = 1e-3 * sd[i] * sd[j]
        plus, minus = value(D + E) - best, value(D - E) - best
        assert plus > 0 and minus > 0
        assert abs(plus - minus) < 0.02 * (plus + minus)


def test_coefficients_and_groups_that_span_all_rows(data: pd.DataFrame) -> None:
    """Maximum likelihood has no maximum: without a residual V is singular, and fits exactly."""
    few = data.iloc[[0, 1, 9, 10, 17]]
    with pytest.warns(lmmax.ConvergenceWarning, match="no maximum"):
        fit = lmmax.fit(INTERCEPT, few, reml=False)
    assert fit.status == "unbounded"
    problem = matrices(few, ("1",))
    at = [dense.criterion(**problem, D=np.array([[D]]), reml=False) for D in (1e7, 1e8, 1e9)]
    # Of five ranks, two are missing in Z D Z'.
    np.testing.assert_allclose(np.diff(at), -2.0 * np.log(10.0), rtol=1e-2)


@pytest.mark.parametrize(("rows", "reml"), [(5, True), (6, True), (6, False)])
def test_hardly_more_rows_than_coefficients(data: pd.DataFrame, rows: int, reml: bool) -> None:
    few = data.iloc[[0, 1, 9, 10, 17, 18][:rows]]
    fit = lmmax.fit(INTERCEPT, few, reml=reml)
    assert fit.df_resid == rows - 3
    assert_optimal(fit, matrices(few, ("1",)))


def test_as_many_coefficients_as_rows(data: pd.DataFrame) -> None:
    with pytest.raises(
        lmmax.DataError, match=r"3 observations cannot estimate 3 fixed-effects.*fewer terms"
    ):
        lmmax.fit(INTERCEPT, data.iloc[[0, 1, 9]])


def test_one_residual_degree_of_freedom_identifies_one_variance(data: pd.DataFrame) -> None:
    """Under REML one contrast is left: its variance is a sum of which no part is identified."""
    few = data.iloc[[0, 1, 9, 10]]
    with pytest.warns(lmmax.IdentifiabilityWarning, match=r"var\(Intercept\) and scale apart"):
        fit = lmmax.fit(INTERCEPT, few)
    problem = matrices(few, ("1",))
    for D in (0.0, 0.5):
        value = dense.criterion(**problem, D=np.array([[D]]), reml=True)
        assert fit.deviance == pytest.approx(value, abs=1e-9)
    assert np.isnan(fit.scale_se) and np.isnan(fit.cov_re_se.iloc[0, 0])


# --- responses without variation -------------------------------------------------------------


def test_constant_response(data: pd.DataFrame) -> None:
    with pytest.raises(lmmax.DataError, match="response 'y' is constant"):
        lmmax.fit(FORMULA, data.assign(y=2.5))


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_response_linear_in_the_predictors(data: pd.DataFrame, unit: float) -> None:
    linear = unit * (2 + 3 * data["x"] - data["z"] / 7)
    with pytest.raises(lmmax.DataError, match="response 'y' is an exact linear combination"):
        lmmax.fit(FORMULA, data.assign(y=linear))
    plain = lmmax.fit(FORMULA, data)
    with pytest.raises(lmmax.DataError, match="response 'y' is an exact linear combination"):
        plain.refit(linear)


@pytest.mark.parametrize("reml", [True, False], ids=["reml", "ml"])
def test_random_effects_that_fit_exactly(data: pd.DataFrame, reml: bool) -> None:
    """The likelihood has no maximum: the residual variance goes to zero, and we say so."""
    b = np.random.Generator(np.random.PCG64(5)).standard_normal(GROUPS)
    exact = data.assign(y=2 + 3 * data["x"] + b[data["g"]])
    with pytest.warns(lmmax.ConvergenceWarning, match="no maximum"):
        fit = lmmax.fit(INTERCEPT, exact, reml=reml)
    assert fit.status == "unbounded" and not fit.converged
    np.testing.assert_allclose(fit.params, [2 + b.mean(), 3, 0], atol=1e-9)
    np.testing.assert_allclose(fit.random_effects["Intercept"], b - b.mean(), atol=1e-8)


@pytest.mark.parametrize("sd", [1e-3, 1e-5, 1e-7])
def test_huge_variance_ratio(data: pd.DataFrame, sd: float) -> None:
    """Group variance one, residual variance down to 1e-14: the within-group estimates."""
    rng = np.random.Generator(np.random.PCG64(6))
    b = rng.standard_normal(GROUPS)
    data = data.assign(y=2 + 3 * data["x"] + b[data["g"]] + sd * rng.standard_normal(len(data)))
    fit = lmmax.fit(INTERCEPT, data)
    assert fit.converged and not fit.singular
    within = data - data.groupby("g").transform("mean").reindex(columns=data.columns)
    X = within[["x", "z"]].to_numpy()
    beta, rss = np.linalg.lstsq(X, within["y"].to_numpy(), rcond=None)[:2]
    scale = float(rss[0]) / (len(data) - GROUPS - 2)
    # Between-group information about beta is a fraction sd^2 of all.
    np.testing.assert_allclose(fit.params[["x", "z"]], beta, rtol=0, atol=10 * sd**2)
    assert fit.scale == pytest.approx(scale, rel=10 * sd)
    np.testing.assert_allclose(fit.bse[["x", "z"]], errors_of(X, scale), rtol=10 * sd)
    if sd > 1e-5:  # what is left of the dense oracle's digits
        value = dense.natural_criterion(
            **matrices(data, ("1",)), cov_re=fit.cov_re.to_numpy(), scale=fit.scale, reml=True
        )
        assert fit.deviance == pytest.approx(value, abs=1e-6)


def errors_of(X: np.ndarray, scale: float) -> np.ndarray:
    return np.asarray(np.sqrt(scale * np.diag(np.linalg.inv(X.T @ X))))


def test_tiny_variance_is_not_taken_for_zero() -> None:
    """Balanced one-way data made so that the estimate is 1e-6 of the residual variance."""
    rng = np.random.Generator(np.random.PCG64(7))
    groups, size, ratio = 18, 8, 1e-6
    g = np.repeat(np.arange(groups), size)
    within = rng.standard_normal((groups, size))
    within -= within.mean(axis=1, keepdims=True)
    msw = (within**2).sum() / (groups * (size - 1))
    means = rng.standard_normal(groups)
    means -= means.mean()
    means *= np.sqrt((groups - 1) * msw * (1 / size + ratio) / (means @ means))
    data = {"y": (within + means[:, None]).ravel(), "g": g}
    # By default the fit ends at a decrement of 1e-14, here 1e-3 of the estimate.
    fit = lmmax.fit("y ~ 1 + (1 | g)", data, tol=1e-22)
    assert fit.converged and not fit.singular
    assert fit.scale == pytest.approx(msw, rel=1e-9)
    assert fit.cov_re.iloc[0, 0] == pytest.approx(ratio * msw, rel=1e-6)


# --- random-effects columns without information ----------------------------------------------


@pytest.mark.parametrize("bar", ["|", "||"])
def test_random_column_of_zeros(data: pd.DataFrame, bar: str) -> None:
    formula = f"y ~ x + z + (1 + w {bar} g)"
    with pytest.raises(lmmax.DataError, match=rf"'w'.*\(1 \+ w \{bar[0]}.*zero.*leave it out"):
        lmmax.fit(formula, data.assign(w=0.0))


def test_duplicate_random_columns(data: pd.DataFrame, plain: lmmax.Fit) -> None:
    """The sum of both slopes is identified, their parts are not: no standard error for these."""
    with pytest.warns(lmmax.IdentifiabilityWarning, match=r"var\(x\), .*and g: var\(w\) apart"):
        fit = lmmax.fit("y ~ x + z + (1 + x + w | g)", data.assign(w=data["x"]), reml=plain.reml)
    assert fit.converged
    assert fit.deviance == pytest.approx(plain.deviance, abs=1e-8)
    np.testing.assert_allclose(fit.params, plain.params, rtol=1e-7)
    np.testing.assert_allclose(fit.fittedvalues, plain.fittedvalues, atol=1e-7)
    T = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    np.testing.assert_allclose(T @ fit.cov_re @ T.T, plain.cov_re, rtol=1e-6)
    errors = fit.cov_re_se
    assert errors.loc["Intercept", "Intercept"] == pytest.approx(
        plain.cov_re_se.loc["Intercept", "Intercept"], rel=1e-6
    )
    assert np.isnan(errors.loc["x", "x"]) and np.isnan(errors.loc["w", "w"])
    assert np.isnan(errors.loc["w", "x"]) and np.isnan(errors.loc["x", "Intercept"])
    assert fit.scale_se == pytest.approx(plain.scale_se, rel=1e-6)


def test_duplicate_uncorrelated_random_columns(data: pd.DataFrame) -> None:
    """The sum of the variances of both slopes is identified, neither of them is."""
    with pytest.warns(lmmax.IdentifiabilityWarning, match=r"g: var\(x\) and g: var\(w\) apart"):
        fit = lmmax.fit("y ~ x + z + (1 + x + w || g)", data.assign(w=data["x"]))
    plain = lmmax.fit("y ~ x + z + (1 + x || g)", data)
    assert fit.converged
    assert fit.deviance == pytest.approx(plain.deviance, abs=1e-8)
    total = fit.cov_re.loc["x", "x"] + fit.cov_re.loc["w", "w"]
    assert total == pytest.approx(plain.cov_re.loc["x", "x"], rel=1e-6)
    assert np.isnan(fit.cov_re_se.loc["x", "x"]) and np.isnan(fit.cov_re_se.loc["w", "w"])
    error = plain.cov_re_se.loc["Intercept", "Intercept"]
    assert fit.cov_re_se.loc["Intercept", "Intercept"] == pytest.approx(error, rel=1e-6)


# --- values that cannot be used --------------------------------------------------------------


@pytest.mark.parametrize("column", ["y", "x", "z"])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_value(data: pd.DataFrame, column: str, value: float) -> None:
    bad = data.assign(**{column: data[column].where(data.index != 5, value)})
    with pytest.raises(lmmax.DataError, match=f"column '{column}' is infinite in 1 row.*row 5"):
        lmmax.fit(FORMULA, bad)


@pytest.mark.parametrize("column", ["y", "x", "z", "g"])
def test_missing_value(data: pd.DataFrame, column: str) -> None:
    bad = data.astype(float).assign(**{column: data[column].where(data.index != 5)})
    fit = lmmax.fit(FORMULA, bad)
    rest = lmmax.fit(FORMULA, data.drop(index=5))
    assert fit.nobs == len(data) - 1 and 5 not in fit.fittedvalues.index
    assert fit.deviance == pytest.approx(rest.deviance, rel=EXACT)
    assert any(f"1 row dropped for missing values ({column} 1)" in note for note in fit.notes)
    with pytest.raises(lmmax.DataError, match=f"missing values in '{column}'.*missing='drop'"):
        lmmax.fit(FORMULA, bad, missing="raise")


def test_nothing_but_missing_values(data: pd.DataFrame) -> None:
    with pytest.raises(lmmax.DataError, match=r"no row is left.*'x' \(144\)"):
        lmmax.fit(FORMULA, data.assign(x=np.nan))


@pytest.mark.parametrize("empty", [pd.DataFrame({c: [] for c in "yxzg"}), {c: [] for c in "yxzg"}])
def test_no_data(empty: Any) -> None:
    with pytest.raises(lmmax.DataError, match="the data have no rows"):
        lmmax.fit(FORMULA, empty)


def test_one_group(data: pd.DataFrame) -> None:
    with pytest.raises(lmmax.DataError, match=r"grouping factor 'g' has one level, '0'.*leave"):
        lmmax.fit(FORMULA, data.assign(g=0))


def test_missing_column(data: pd.DataFrame) -> None:
    with pytest.raises(lmmax.DataError, match=r"no column 'z' in the data.*Columns: y, x, g"):
        lmmax.fit(FORMULA, data.drop(columns="z"))
    with pytest.raises(lmmax.DataError, match=r"no column 'g' in the data \(grouping factor\)"):
        lmmax.fit(FORMULA, data.drop(columns="g"))


@pytest.mark.parametrize("formula", ["Yield ~ x + (1 | g)", "y ~ x + dosis + (1 | g)"])
def test_misspelt_variable(data: pd.DataFrame, formula: str) -> None:
    data = data.rename(columns={"z": "dose"}).assign(yield_=data["y"])
    with pytest.raises(lmmax.DataError, match=r"no column '(Yield|dosis)'.*Did you mean"):
        lmmax.fit(formula, data)


# --- weights and offset ----------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.5, 8.0])
def test_weights_are_scaled_rows(data: pd.DataFrame, plain: lmmax.Fit, spread: float) -> None:
    """Rows times sqrt(w), and ``- sum log w`` for the density of y; w from 1e-8 to 1e8."""
    rng = np.random.Generator(np.random.PCG64(8))
    w = 10.0 ** rng.uniform(-spread, spread, len(data))
    fit = lmmax.fit(FORMULA, data.assign(w=w), weights="w", reml=plain.reml)
    problem, root = matrices(data), np.sqrt(w)
    scaled = lmmax.fit_arrays(
        problem["y"] * root,
        problem["X"] * root[:, None],
        problem["codes"],
        problem["Z"] * root[:, None],
        reml=plain.reml,
    )
    assert fit.deviance == pytest.approx(scaled.deviance - np.log(w).sum(), rel=1e-9)
    assert fit.scale == pytest.approx(scaled.scale, rel=1e-8)
    np.testing.assert_allclose(fit.params, scaled.params, rtol=1e-8)
    np.testing.assert_allclose(fit.bse, scaled.bse, rtol=1e-8)
    np.testing.assert_allclose(fit.cov_re, scaled.cov_re, rtol=1e-7)
    np.testing.assert_allclose(fit.random_effects, scaled.random_effects, atol=1e-7)
    value = lindstrom_bates.criterion(
        **problem, D=fit.cov_re.to_numpy() / fit.scale, reml=plain.reml, weights=w
    )
    assert fit.deviance == pytest.approx(value, rel=1e-8)


def test_weight_two_is_two_rows(data: pd.DataFrame) -> None:
    """With the variances known, a row of weight two says what two equal rows say."""
    twice = np.arange(len(data)) % 3 == 0
    fix = {"cov_re": [[1.0, 0.2], [0.2, 0.5]], "scale": 0.6}
    weighted = lmmax.fit(FORMULA, data, weights=1.0 + twice, fix=fix)
    repeated = lmmax.fit(FORMULA, pd.concat([data, data[twice]]), fix=fix)
    np.testing.assert_allclose(weighted.params, repeated.params, rtol=EXACT)
    np.testing.assert_allclose(weighted.bse, repeated.bse, rtol=EXACT)
    np.testing.assert_allclose(weighted.random_effects, repeated.random_effects, atol=EXACT)
    np.testing.assert_allclose(weighted.random_effects_cov, repeated.random_effects_cov, atol=EXACT)


@pytest.mark.parametrize("weight", [1e-8, 3.0, 1e8])
def test_equal_weights_change_the_scale_alone(
    data: pd.DataFrame, plain: lmmax.Fit, weight: float
) -> None:
    fit = lmmax.fit(FORMULA, data, weights=np.full(len(data), weight), reml=plain.reml)
    assert fit.scale / weight == pytest.approx(plain.scale, rel=EXACT)
    assert fit.deviance == pytest.approx(plain.deviance, rel=EXACT)
    np.testing.assert_allclose(fit.params, plain.params, rtol=EXACT)
    np.testing.assert_allclose(fit.bse, plain.bse, rtol=EXACT)
    np.testing.assert_allclose(fit.cov_re, plain.cov_re, rtol=EXACT)
    np.testing.assert_allclose(fit.cov_re_se, plain.cov_re_se, rtol=EXACT)


def test_offset(data: pd.DataFrame, plain: lmmax.Fit) -> None:
    offset = 5 * np.sin(np.arange(len(data)))
    shifted = data.assign(y=data["y"] + offset, o=offset)
    fits = {
        "array": lmmax.fit(FORMULA, shifted, offset=offset, reml=plain.reml),
        "column": lmmax.fit(FORMULA, shifted, offset="o", reml=plain.reml),
        "formula": lmmax.fit(FORMULA + " + offset(o)", shifted, reml=plain.reml),
    }
    for fit in fits.values():
        assert fit.deviance == pytest.approx(plain.deviance, rel=EXACT)
        np.testing.assert_allclose(fit.params, plain.params, rtol=EXACT)
        np.testing.assert_allclose(fit.cov_re, plain.cov_re, rtol=1e-9)
        np.testing.assert_allclose(fit.fittedvalues, plain.fittedvalues + offset, atol=1e-9)
        np.testing.assert_allclose(fit.resid, plain.resid, atol=1e-9)
    with pytest.raises(lmmax.DataError, match="fitted with an offset: pass offset="):
        fits["array"].predict(shifted)


@pytest.mark.parametrize("weights", ["zero", "negative", "missing", "short"])
def test_weights_that_make_no_sense(data: pd.DataFrame, weights: str) -> None:
    values = np.ones(len(data))
    values[5] = {"zero": 0.0, "negative": -2.0, "missing": np.nan, "short": 1.0}[weights]
    if weights == "short":
        with pytest.raises(lmmax.DataError, match="weights has 10 values for 144 rows"):
            lmmax.fit(FORMULA, data, weights=values[:10])
    elif weights == "missing":
        fit = lmmax.fit(FORMULA, data, weights=values)
        rest = lmmax.fit(FORMULA, data.drop(index=5))
        assert fit.deviance == pytest.approx(rest.deviance, rel=EXACT)
    else:
        with pytest.raises(lmmax.DataError, match=r"weights must be positive.*row 5 is (0|-2)"):
            lmmax.fit(FORMULA, data, weights=values)


# --- options that are not what they seem -----------------------------------------------------


@pytest.mark.parametrize("reml", ["ML", "REML", None, 2])
def test_reml_is_true_or_false(data: pd.DataFrame, reml: Any) -> None:
    """``reml="ML"`` is true in Python: it must not silently mean REML."""
    with pytest.raises(TypeError, match=r"reml=.*True.*False"):
        lmmax.fit(INTERCEPT, data, reml=reml)


def test_no_warning_from_a_plain_fit(data: pd.DataFrame) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = lmmax.fit(FORMULA, data)
        fit.varcorr(), fit.random_effects, fit.fittedvalues, fit.resid_marginal, str(fit)


# --- statsmodels, on ragged groups with singletons -------------------------------------------


@pytest.mark.parametrize("reml", [True, False], ids=["reml", "ml"])
def test_statsmodels_at_our_estimates(data: pd.DataFrame, reml: bool) -> None:
    mixed = pytest.importorskip("statsmodels.regression.mixed_linear_model")
    alone = data.index % 12 == 0
    data = data.assign(g=np.where(alone, GROUPS + data.index, data["g"]))
    assert data.groupby("g").size().min() == 1
    fit = lmmax.fit(FORMULA, data, reml=reml)
    assert not fit.singular
    assert_optimal(fit, matrices(data))
    problem = matrices(data)
    model = mixed.MixedLM(problem["y"], problem["X"], problem["codes"], problem["Z"])
    model.reml, model.cov_pen, model.fe_pen = reml, None, None  # fit() would set these
    params = mixed.MixedLMParams.from_components(
        fe_params=fit.params.to_numpy(),
        cov_re=fit.cov_re.to_numpy() / fit.scale,
        vcomp=np.empty(0),
    )
    assert model.loglike(params, profile_fe=True) == pytest.approx(fit.llf, rel=1e-9)
