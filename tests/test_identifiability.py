"""What the data do not tell apart is refused or flagged; what they do is fitted."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.constraints import Settings
from lmmax.design import build_design
from lmmax.fit import prepare, unidentified_by_design

Unknown = lmmax.IdentifiabilityWarning


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    """40 schools with 6 rows each, and columns that repeat others."""
    rng = np.random.default_rng(31)
    school = np.repeat(np.arange(40), 6)
    x = rng.normal(size=240)
    y = 1.0 + rng.normal(size=40)[school] + rng.normal(size=240)
    return pd.DataFrame(
        {
            "y": y,
            "z": rng.normal(size=240) + y,
            "x": x,
            "twice": 2.0 * x,
            "near": x + 1e-4 * rng.normal(size=240),
            "school": school,
            "teacher": [f"t{v}" for v in school],
            "three": 3.0,
            "arm": np.where(school < 20, "L", "R"),
            "sign": np.tile([-1.0, 1.0], 120),
            "pair": np.repeat(np.arange(120), 2),
            "couple": np.repeat(np.arange(120), 2) + 1000,
        }
    )


# --- flat likelihoods ------------------------------------------------------------------------

FLAT = [
    # Formula, what is not told apart, a formula with the same identified part, its coefficients.
    (
        "y ~ x + (1 | school) + (1 | teacher)",
        {("school: var(Intercept)", "teacher: var(Intercept)")},
        "y ~ x + (1 | school)",
        ["Intercept", "x"],
    ),
    (
        "y ~ x + arm + (1 | arm) + (1 | school)",
        {("arm: var(Intercept)",)},
        "y ~ x + arm + (1 | school)",
        ["x"],
    ),
    (
        "y ~ x + (1 + three | school)",
        {("school: var(Intercept)", "school: cov(Intercept, three)", "school: var(three)")},
        "y ~ x + (1 | school)",
        ["Intercept", "x"],
    ),
    (
        "y ~ x + (1 + x + twice | school)",
        {
            ("school: cov(Intercept, x)", "school: cov(Intercept, twice)"),
            ("school: var(x)", "school: cov(x, twice)", "school: var(twice)"),
        },
        "y ~ x + (1 + x | school)",
        ["Intercept", "x"],
    ),
    (
        "y ~ x + (0 + arm | school)",
        {("school: cov(arm[L], arm[R])",)},
        "y ~ x + (0 + arm || school)",
        ["Intercept", "x"],
    ),
]


@pytest.mark.parametrize(("formula", "apart", "plain", "kept"), FLAT)
def test_flat_directions(
    data: pd.DataFrame, formula: str, apart: set[tuple[str, ...]], plain: str, kept: list[str]
) -> None:
    with pytest.warns(Unknown, match="not identified: the data"):
        fit = lmmax.fit(formula, data)
    same = lmmax.fit(plain, data)
    assert fit.converged and fit.deviance == pytest.approx(same.deviance, abs=1e-8)
    assert set(fit.convergence.unidentified) == apart
    assert "not identified" in fit.message and "not identified" in str(fit).lower()
    for name in {name for group in apart for name in group}:
        covariance = lmmax.joint_covariance(fit)
        assert np.isnan(covariance.loc[name, name])
    assert fit.scale_se == pytest.approx(same.scale_se, rel=1e-6)
    # The first is of several factors; Kenward and Roger's method is compiled for each model.
    for ddf in ("satterthwaite", "kenward-roger")[: 1 + ("teacher" in formula)]:
        found, right = fit.coefficients(ddf), same.coefficients(ddf)
        np.testing.assert_allclose(found.loc[kept], right.loc[kept], rtol=2e-5, atol=1e-9)
        others = found.index.difference(kept)
        assert found.loc[others, "std err":].isna().all(axis=None)
        assert fit.bse[others].isna().all()


def test_a_level_in_one_group_only() -> None:
    """Its random effect is its coefficient's; the other levels are tested as without it."""
    rng = np.random.default_rng(4)
    rows = [(f"g{g}", f) for g in range(8) for f in "ab" for _ in range(3)] + [("g2", "c")] * 4
    d = pd.DataFrame(rows, columns=["g", "f"])
    u = rng.normal(size=(8, 2))
    d["y"] = [
        rng.normal() + u[int(g[1]), "ab".index(f) if f != "c" else 0] + "abc".index(f)
        for g, f in rows
    ]
    without = lmmax.fit("y ~ f + (0 + f | g)", d[d["f"] != "c"])
    for formula in ("y ~ f + (0 + f | g)", "y ~ f + (f | g)"):
        with pytest.warns(Unknown, match=r"nothing about .*var\(f\[.*c\]\)"):
            fit = lmmax.fit(formula, d)
        for ddf in ("satterthwaite", "kenward-roger"):
            found = fit.coefficients(ddf)
            right = without.coefficients(ddf)
            # Their residual variance has three more degrees of freedom, which matters little.
            np.testing.assert_allclose(found["std err"][:2], right["std err"], rtol=1e-6)
            np.testing.assert_allclose(found["df"][:2], [7.0, 7.0], rtol=1e-4)
            assert np.isnan(found["p"].iloc[2])
        test = fit.f_test("f[T.b] = 0, f[T.c] = 0")
        assert np.isnan(test.statistic) and np.isnan(test.pvalue)


def test_a_structure_that_another_term_repeats(data: pd.DataFrame) -> None:
    """One correlation for all effects and an intercept of the same groups are one parameter."""
    few = data[data["school"] < 20].assign(f=np.tile(list("abc"), 40))
    with pytest.warns(
        Unknown, match=r"teacher: var\(Intercept\), school: sd and school: cor apart"
    ):
        fit = lmmax.fit("y ~ x + homcs(0 + f | school) + (1 | teacher)", few)
    plain = lmmax.fit("y ~ x + homdiag(0 + f | school) + (1 | teacher)", few)
    assert fit.llf == pytest.approx(plain.llf, abs=1e-8)
    assert fit.structures()["std err"].isna().all()
    np.testing.assert_allclose(fit.coefficients(), plain.coefficients(), rtol=1e-4)
    with pytest.raises(ValueError, match="kenward-roger-linear"):
        fit.coefficients("kenward-roger")


def test_what_is_asked_of_a_flat_fit(data: pd.DataFrame) -> None:
    with pytest.warns(Unknown):
        fit = lmmax.fit("y ~ x + (1 | school) + (1 | teacher)", data)
    table = fit.varcorr().set_index("group")
    assert table.loc[["school", "teacher"], ["vcov_se", "sdcor_se"]].isna().all(axis=None)
    assert np.isfinite(table.loc["Residual", "vcov_se"])
    limits = lmmax.confint(fit, ["teacher: sd(Intercept)"])
    # Those of (1 | school) alone, whose share of the sum may be any.
    np.testing.assert_allclose(limits, [[0.0, 1.27604]], atol=1e-4)
    assert "not identified" in limits.attrs["notes"][0]
    draws = lmmax.bootstrap(fit, 50, seed=1)
    assert draws.hidden == ("school: sd(Intercept)", "teacher: sd(Intercept)")
    assert draws.se[list(draws.hidden)].isna().all() and draws.se[["x", "sigma"]].notna().all()
    assert "no bootstrap distribution" in str(draws)
    total = lmmax.bootstrap(fit, 50, lambda b: b.cov_re.sum(axis=(-2, -1)), seed=1)
    assert total.hidden == () and total.se.notna().all()
    wald = lmmax.confint(fit, method="wald")
    assert wald.iloc[2:4].isna().all(axis=None) and wald.iloc[[0, 1, 4]].notna().all(axis=None)


def test_robust_errors_of_a_flat_fit(data: pd.DataFrame) -> None:
    with pytest.warns(Unknown):
        fit = lmmax.fit("y ~ x + arm + (1 | arm)", data)
    robust = lmmax.robust(fit)
    assert robust.bse[["Intercept", "arm[T.R]"]].isna().all() and np.isfinite(robust.bse["x"])
    assert np.isnan(robust.wald_test("x, arm[T.R]").pvalue)
    assert "not identified" in str(robust)
    # The others are those of the model without the variance that nothing is known about.
    held = lmmax.fit("y ~ x + arm + (1 | arm)", data, fix={"cov_re": [[1.0]]})
    plain = lmmax.robust(held)
    np.testing.assert_allclose(robust.cov.loc["x", "x"], plain.cov.loc["x", "x"], rtol=1e-8)
    joint = lmmax.sandwich(fit)
    assert joint.loc["Intercept"].isna().all() and np.isfinite(joint.loc["x", "x"])


@pytest.mark.parametrize("reml", [True, False])
def test_many_fits_are_as_flat_as_single_ones(data: pd.DataFrame, reml: bool) -> None:
    responses = data[["y", "z"]]
    rhs = "x + (1 | school) + (1 | teacher)"
    with pytest.warns(Unknown):
        many = lmmax.fit_many(f"~ {rhs}", data, responses, reml=reml)
    assert any("not identified" in note for note in many.notes)
    for name in responses:
        with pytest.warns(Unknown):
            one = lmmax.fit(f"{name} ~ {rhs}", data, reml=reml)
        np.testing.assert_allclose(many.bse.loc[name], one.bse, rtol=1e-6)
        np.testing.assert_allclose(many.df.loc[name], one.df, rtol=1e-4)


def test_one_variance_that_the_fixed_effects_take(data: pd.DataFrame) -> None:
    """Nothing is random then: tests are those of least squares."""
    with pytest.warns(Unknown):
        many = lmmax.fit_many("~ x + arm + (1 | arm)", data, data[["y", "z"]])
    with pytest.warns(Unknown):
        one = lmmax.fit("y ~ x + arm + (1 | arm)", data)
    assert many.df.loc["y", "x"] == pytest.approx(237.0, rel=1e-6)
    assert one.df["x"] == pytest.approx(237.0, rel=1e-6)
    assert many.bse.loc["y"].isna().tolist() == one.bse.isna().tolist() == [True, False, True]


@pytest.mark.parametrize(
    "formula",
    [
        "y ~ x + (1 + x + near || school)",  # two slopes that differ in one part of 10,000
        "y ~ x + (1 | school) + (0 + sign | pair)",
        "y ~ 1 + (1 | arm)",  # two groups
    ],
)
def test_poorly_determined_is_not_unidentified(data: pd.DataFrame, formula: str) -> None:
    if "near" in formula:  # warnings are errors
        assert lmmax.fit(formula, data).unidentified is None
    prepared = prepare(build_design(formula, data))
    design, layout, terms = prepared.design, prepared.layout, prepared.terms
    assert unidentified_by_design(design, layout, terms, Settings()) is None


@pytest.mark.parametrize("move", [(2000.0, 1.0), (0.0, 1e-6), (0.0, 1e6), (2e9, 1e6)])
def test_origin_and_units_make_nothing_flat(data: pd.DataFrame, move: tuple[float, float]) -> None:
    shift, unit = move
    moved = data.assign(x=shift + unit * data["x"])
    for formula, count in (("y ~ x + (x | school)", 0), ("y ~ x + (x | arm) + (1 | arm)", 1)):
        prepared = prepare(build_design(formula, moved))
        found = unidentified_by_design(
            prepared.design, prepared.layout, prepared.terms, Settings(reml=False)
        )
        assert (0 if found is None else found.directions.shape[1]) == count


# --- the residual variance -------------------------------------------------------------------


def relatives(kind: str, m: int = 60) -> pd.DataFrame:
    """A relationship matrix of m individuals in families of three."""
    family = np.arange(m) // 3
    K = np.where(family[:, None] == family, 0.5, 0.0) + 0.5 * np.eye(m)
    if kind == "twins":
        for i in range(0, m, 6):
            K[i + 1], K[:, i + 1] = K[i], K[:, i]
            K[i, i + 1] = K[i + 1, i] = K[i + 1, i + 1] = 1.0
    if kind == "centred":
        centre = np.eye(m) - 1.0 / m
        K = centre @ K @ centre
    labels = [f"a{i:02d}" for i in range(m)]
    return pd.DataFrame(K, labels, labels)


def criterion(K: np.ndarray, d: pd.DataFrame, reml: bool, variances: np.ndarray) -> float:
    """-2 log-likelihood of one record per individual, from the dense covariance."""
    V = variances[0] * K + variances[1] * np.eye(len(d))
    X, y = np.column_stack([np.ones(len(d)), d["x"]]), d["y"].to_numpy()
    inverse = np.linalg.inv(V)
    A = X.T @ inverse @ X
    r = y - X @ np.linalg.solve(A, X.T @ inverse @ y)
    n = len(y) - 2 * reml
    rest = np.linalg.slogdet(A)[1] if reml else 0.0
    return float(np.linalg.slogdet(V)[1] + rest + r @ inverse @ r + n * np.log(2.0 * np.pi))


@pytest.mark.parametrize("kind", ["sibs", "twins", "centred"])
@pytest.mark.parametrize("reml", [True, False])
def test_one_record_per_individual(kind: str, reml: bool) -> None:
    """The variances are those of the dense likelihood, whichever way they are asked for."""
    kin = relatives(kind)
    K, rng = kin.to_numpy(), np.random.default_rng(5)
    values, vectors = np.linalg.eigh(K)
    d = pd.DataFrame({"id": kin.index, "x": rng.normal(size=60)})
    breeding = vectors @ (np.sqrt(values.clip(0.0)) * rng.normal(size=60))
    d["y"] = 1.5 * breeding + rng.normal(size=60)
    relmat = {"id": kin}
    fit = lmmax.fit("y ~ x + (1 | id)", d, relmat=relmat, reml=reml)
    assert fit.converged and not fit.singular
    at = np.array([fit.cov_re.iloc[0, 0], fit.scale])
    best = criterion(K, d, reml, at)
    assert fit.deviance == pytest.approx(best, abs=1e-8)
    slope = [
        (criterion(K, d, reml, at * (1.0 + h)) - criterion(K, d, reml, at * (1.0 - h))) / 2e-4
        for h in 1e-4 * np.eye(2)
    ]
    np.testing.assert_allclose(slope, 0.0, atol=1e-5)
    X = np.column_stack([np.ones(60), d["x"]])
    V = at[0] * K + at[1] * np.eye(60)
    modes = at[0] * K @ np.linalg.solve(V, d["y"] - X @ fit.params)
    np.testing.assert_allclose(fit.random_effects["Intercept"], modes, atol=1e-8)

    arrays = lmmax.fit_arrays(
        d["y"], X, d["id"], group_name="id", relmat=relmat, reml=reml, x_names=["1", "x"]
    )
    spec = lmmax.ModelSpec("y", "x", [lmmax.RandomTerm("1", "id")])
    assert arrays.llf == pytest.approx(fit.llf, abs=1e-9)
    assert lmmax.fit(spec, d, relmat=relmat, reml=reml).llf == pytest.approx(fit.llf, abs=1e-9)
    many = lmmax.fit_many("~ x + (1 | id)", d, ["y"], relmat=relmat, reml=reml)
    assert many.llf["y"] == pytest.approx(fit.llf, abs=1e-7)
    np.testing.assert_allclose(many.bse.loc["y"], fit.bse, rtol=1e-5)


def test_scan_with_one_record_per_individual() -> None:
    kin = relatives("twins")
    rng = np.random.default_rng(6)
    d = pd.DataFrame({"id": kin.index, "y": rng.normal(size=60)})
    d["y"] += np.linalg.svd(kin)[0][:, :9] @ (2.0 * rng.normal(size=9))
    markers = rng.normal(size=(60, 2))
    scan = lmmax.fit_many(
        "~ marker + (1 | id)", d, ["y"], relmat={"id": kin}, scan={"marker": markers}
    )
    for j in range(2):
        one = lmmax.fit("y ~ m + (1 | id)", d.assign(m=markers[:, j]), relmat={"id": kin})
        assert scan.llf.iloc[j] == pytest.approx(one.llf, abs=1e-6)


def test_replicates_in_cells_identify_the_residual() -> None:
    rng = np.random.default_rng(17)
    rows = [(g, f) for g in range(30) for f in rng.choice(8, 2, replace=False) for _ in range(4)]
    d = pd.DataFrame(rows, columns=["g", "f"])
    cell = pd.factorize(d["g"] * 100 + d["f"])[0]
    d["y"] = rng.normal(size=cell.max() + 1)[cell] + rng.normal(size=len(d))
    d["f"] = [f"L{v:02d}" for v in d["f"]]
    cells = lmmax.fit("y ~ 1 + (1 | g:f)", d)
    fit = lmmax.fit("y ~ 1 + homdiag(0 + f | g)", d)
    assert fit.llf == pytest.approx(cells.llf, abs=1e-8)
    assert fit.scale == pytest.approx(cells.scale, rel=1e-6)


def test_what_imitates_the_residual_is_refused(data: pd.DataFrame) -> None:
    """By one factor, by two together, and by related levels that are not."""
    alone = r"no group of 'row' has more than 1 row.*\(1 \| row\).*fix=\{'scale'"
    numbered = data.assign(row=range(240))
    with pytest.raises(lmmax.DataError, match=alone):
        lmmax.fit("y ~ x + (1 | row)", numbered)
    with pytest.raises(lmmax.DataError, match=alone):
        lmmax.fit_many("~ x + (1 | row)", numbered, ["y"])
    with pytest.raises(lmmax.DataError, match=r"not identified.* of 'pair' and 'couple' together"):
        lmmax.fit("y ~ x + (1 | pair) + (0 + sign | couple)", data)
    few = pd.DataFrame(np.eye(240), range(240), range(240))
    message = r"residual variance is not identified.*relationship matrix of 'row'.*unrelated"
    for matrix in (few, few - 1.0 / 240):
        with pytest.raises(lmmax.DataError, match=message):
            lmmax.fit("y ~ x + (1 | row)", numbered, relmat={"row": 2.0 * matrix})
    held = lmmax.fit("y ~ x + (1 | row)", numbered, fix={"scale": 0.5})
    assert held.converged


def test_many_levels_are_refused_at_once() -> None:
    """Neither the check nor what comes before it makes arrays of the square of the levels."""
    rng = np.random.default_rng(21)
    d = pd.DataFrame({"g": rng.integers(0, 16, 160), "x": rng.normal(size=160).round(3)})
    d["y"] = d["x"] + rng.normal(size=160)
    start = time.perf_counter()
    with pytest.raises(lmmax.DataError, match=r"effects per group of 'g'.*numbers read as text"):
        lmmax.fit("y ~ 1 + (x | g)", d.assign(x=d["x"].astype(str)))
    items = pd.DataFrame([(s, i) for s in range(100) for i in range(40)], columns=["s", "i"])
    items["y"] = rng.normal(size=4000)
    with pytest.raises(lmmax.DataError, match="residual variance is not identified: no group"):
        lmmax.fit("y ~ 1 + (0 + C(i) | s)", items)
    assert time.perf_counter() - start < 20.0
