"""Profiles and limits: against lme4's, the n x n likelihood, and fits with a parameter fixed."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

import lmmax
from lmmax.inference.bootstrap import bootstrap
from lmmax.inference.charts import Charts
from lmmax.inference.confint import confint
from lmmax.inference.held import compiled_count
from lmmax.inference.profile import ProfileWarning, Walk, profile, profile_limits, select
from tests.oracles.dense import log_det
from tests.oracles.designs import simulate
from tests.reference import as_in_formula, load_data, load_record, load_records

pytestmark = pytest.mark.unoptimised

CUTOFF = stats.norm.ppf(0.975)
DIRECTIONS = np.random.Generator(np.random.PCG64(0)).standard_normal((2, 20))
ML_RECORDS = [
    record["id"]
    for record in load_records(kinds=("lmm",))
    if "profile_ci" in record["results"] and not record["reml"]
]


@pytest.fixture(scope="module")
def slopes():
    """The random slopes of the sleep study by maximum likelihood."""
    formula = "Reaction ~ Days + (1 + Days | Subject)"
    return lmmax.fit(formula, lmmax.datasets.load("sleepstudy"), reml=False)


@pytest.fixture(scope="module")
def pastes():
    formula = "strength ~ 1 + (1 | batch/cask)"
    return lmmax.fit(formula, lmmax.datasets.load("pastes"), reml=False)


# --- against lme4 ---------------------------------------------------------------------------------


def our_name(parameter, groups):
    """A parameter's name in lme4's profiles -> ours."""
    plain = parameter.replace("(Intercept)", "Intercept")
    if "|" not in plain:
        return plain
    kind, rest = plain.split("_", 1)
    effects, group = rest.split("|")
    group, _ = as_in_formula(group, groups)
    # lme4 names the later effect first.
    effects = ", ".join(reversed(effects.split("."))) if kind == "cor" else effects
    return f"{group}: {kind}({effects})"


@pytest.mark.parametrize("identifier", ML_RECORDS)
def test_limits_are_those_of_the_reference(identifier):
    """Within 1e-7 of the width; the source states 1e-8, and misses the dense criterion by 5e-8."""
    record = load_record(identifier)
    fit = lmmax.fit(record["formula"], load_data(record["dataset"]), reml=False)
    limits = profile_limits(fit)
    reference = record["results"]["profile_ci"]
    names = [our_name(name, fit.group_names) for name in reference["parm"]]
    assert sorted(names) == sorted(limits.index)
    lower, upper = (np.array(reference[side], float) for side in ("lower", "upper"))
    found = limits.loc[names].to_numpy()
    width = upper - lower
    np.testing.assert_allclose(found[:, 0] / width, lower / width, atol=1e-7, rtol=0)
    np.testing.assert_allclose(found[:, 1] / width, upper / width, atol=1e-7, rtol=0)


def test_lme4_profiles_a_reml_fit_by_maximum_likelihood(sleepstudy_slope, slopes):
    limits = confint(sleepstudy_slope.refit_ml())
    np.testing.assert_allclose(limits, profile_limits(slopes), rtol=1e-9)


# --- against the n x n likelihood -----------------------------------------------------------------


def deviance(fit, values, relmat=None):
    """-2 logL (the REML criterion) at values of all parameters, through the n x n matrix."""
    design, n = fit.design, fit.nobs
    V = np.diag(values["sigma"] ** 2 / (np.ones(n) if design.weights is None else design.weights))
    for term, block in zip(fit.terms, design.blocks, strict=True):
        grouping, effects = design.groupings[term.factor], fit.effect_names[term.columns]

        def value(label, group=grouping.name):
            return values.get(f"{group}: {label}", 0.0)

        if term.covariance.name == "homcs":
            rho = value("cor")
            Psi = value("sd") ** 2 * (rho + (1.0 - rho) * np.eye(len(effects)))
        elif term.covariance.name == "ou":
            times = np.array(term.covariance.times)
            gaps = np.abs(times[:, None] - times)
            Psi = value("sd") ** 2 * np.exp(-value("rate") * gaps)
        else:
            C = np.eye(len(effects), dtype=complex)
            for i, later in enumerate(effects):
                for j, earlier in enumerate(effects[:i]):
                    C[i, j] = C[j, i] = value(f"cor({earlier}, {later})")
            sd = np.array([value(f"sd({effect})") for effect in effects])
            Psi = np.outer(sd, sd) * C
        if relmat and grouping.name in relmat:
            K = relmat[grouping.name].loc[list(grouping.levels), list(grouping.levels)].to_numpy()
        else:
            K = np.eye(len(grouping.levels))
        V = V + K[np.ix_(grouping.codes, grouping.codes)] * (block.Z @ Psi @ block.Z.T)
    X, y = design.X, design.y - (0.0 if design.offset is None else design.offset)
    r = y - X @ np.array([values[name] for name in design.x_names])
    found = log_det(V) + r @ np.linalg.solve(V, r)
    if fit.reml:
        found = found + log_det(X.T @ np.linalg.solve(V, X)) - X.shape[1] * np.log(2.0 * np.pi)
    return found + n * np.log(2.0 * np.pi)


def check(fit, relmat=None, parameters=None):
    """The ends of each profile: the criterion there, and that nothing else wants to move.

    A slope of 1e-5 per standard error is 1e-10 in the criterion.
    """
    found = profile(fit, parameters, alpha=0.05)
    limits = found.conf_int()
    names = list(found.table.columns[4:])
    assert (found.status == "converged").all(), found.status
    spread = ((limits["upper"] - limits["lower"]) / 4.0).reindex(names).fillna(1e-3)
    estimates = {name: complex(found.table.loc[_middle(found), name]) for name in names}
    assert deviance(fit, estimates, relmat).real == pytest.approx(fit.deviance, abs=1e-7)
    for name, rows in found.table.groupby("parameter", sort=False):
        assert rows["value"].iloc[[0, -1]].to_numpy() == pytest.approx(
            limits.loc[name].to_numpy(), rel=1e-9
        )
        for row in (rows.iloc[0], rows.iloc[-1]):
            values = {other: complex(row[other]) for other in names}
            rise = deviance(fit, values, relmat).real - fit.deviance
            assert rise == pytest.approx(CUTOFF**2, abs=1e-7), name
            # Along directions at random, in standard errors: no slope vanishes from all of them.
            for direction in DIRECTIONS[:, : len(names)]:
                moved = {
                    other: values[other] + 1e-20j * step * spread[other] * (other != name)
                    for other, step in zip(names, direction, strict=True)
                }
                assert abs(deviance(fit, moved, relmat).imag) < 1e-5 * 1e-20, name
    return found


def _middle(found):
    """The row of the estimates, the first of them."""
    return found.table.index[found.table["zeta"] == 0.0][0]


@pytest.mark.parametrize("reml", [False, True])
def test_correlated_slopes_are_exact(slopes, sleepstudy_slope, reml):
    found = check(sleepstudy_slope if reml else slopes)
    assert list(found.estimates.index) == [
        "Intercept",
        "Days",
        "Subject: sd(Intercept)",
        "Subject: sd(Days)",
        "Subject: cor(Intercept, Days)",
        "sigma",
    ]


@pytest.mark.parametrize(
    ("kind", "seed", "reml"),
    [
        ("nested_slope", 1, True),
        ("crossed_slopes", 0, False),
        ("weights", 0, True),
        ("related", 0, True),
    ],
)
def test_several_factors_are_exact(kind, seed, reml):
    problem = simulate(kind, seed)
    fit = lmmax.fit(
        problem.formula,
        problem.data,
        weights=problem.weights,
        relmat=problem.relmat or None,
        reml=reml,
    )
    check(fit, problem.relmat)


def test_four_correlated_effects_are_exact():
    fit = lmmax.fit("y ~ x1 + x2 + x3 + (x1 + x2 + x3 | g)", load_data("syn_fourdim"))
    found = profile(fit, ["g: cor(x1, x2)", "g: sd(x3)"], alpha=0.05)
    # Only what was asked for is profiled; the other columns are there all the same.
    assert list(found.estimates.index) == ["g: sd(x3)", "g: cor(x1, x2)"]
    spread = fit.varcorr()["sdcor_se"].min()
    for _, row in found.table.iloc[[0, 5, -5, -1]].iterrows():
        values = {name: complex(row[name]) for name in found.table.columns[4:]}
        at = deviance(fit, values).real
        assert at == pytest.approx(row["deviance"], abs=1e-7)
        assert row["zeta"] ** 2 == pytest.approx(at - fit.deviance, abs=1e-7)
        moved = {
            name: values[name] + 1e-20j * step * spread * (name != row["parameter"])
            for name, step in zip(values, DIRECTIONS[0], strict=False)
        }
        assert abs(deviance(fit, moved).imag) < 1e-5 * 1e-20


def test_structures_are_exact():
    machines = lmmax.datasets.load("machines")
    fit = lmmax.fit("score ~ Machine + homcs(0 + Machine | Worker)", machines)
    found = check(fit, parameters="random")
    assert list(found.estimates.index) == ["Worker: sd", "Worker: cor", "sigma"]


def test_rates_are_exact():
    """A value that falls with its parameter: lower and upper are not exchanged."""
    data = load_data("syn_reps").assign(day=lambda d: d["t"].astype(int))
    fit = lmmax.fit("y ~ t + ou(0 + C(day) | id)", data)
    found = check(fit, parameters=["id: rate", "id: sd"])
    rate = found.table[found.table["parameter"] == "id: rate"]
    assert rate["value"].is_monotonic_increasing
    assert rate["zeta"].is_monotonic_increasing


# --- against fits with the parameter fixed --------------------------------------------------------


def test_fits_with_a_standard_deviation_fixed(pastes):
    term = "(1 | batch:cask)"
    for value in profile_limits(pastes, "batch:cask: sd(Intercept)").iloc[0]:
        held = lmmax.fit(
            pastes.formula,
            lmmax.datasets.load("pastes"),
            reml=False,
            fix={"cov_re": {term: [[value**2]]}},
        )
        assert held.deviance - pastes.deviance == pytest.approx(CUTOFF**2, abs=1e-8)


def test_fits_with_the_scale_or_a_coefficient_fixed(slopes):
    data = lmmax.datasets.load("sleepstudy")
    limits = profile_limits(slopes, ["sigma", "Days"])
    for value in limits.loc["sigma"]:
        held = lmmax.fit(slopes.formula, data, reml=False, fix={"scale": value**2})
        assert held.deviance - slopes.deviance == pytest.approx(CUTOFF**2, abs=1e-8)
    for value in limits.loc["Days"]:
        offset = value * data["Days"].to_numpy()
        formula = "Reaction ~ 1 + (1 + Days | Subject)"
        held = lmmax.fit(formula, data, reml=False, offset=offset)
        assert held.deviance - slopes.deviance == pytest.approx(CUTOFF**2, abs=1e-8)


@pytest.mark.parametrize("reml", [False, True])
def test_without_random_variation_the_profiles_are_those_of_a_sample(reml):
    """Closed forms: d log(rss + n (m - mean)^2), and d log s^2 + rss / s^2."""
    data = lmmax.datasets.load("dyestuff2")
    fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", data, reml=reml, fix={"cov_re": [[0.0]]})
    limits = profile_limits(fit)
    assert list(limits.index) == ["Intercept", "sigma"]
    y = data["Yield"].to_numpy()
    n, rss = len(y), np.sum((y - y.mean()) ** 2)
    d = n - reml
    half = np.sqrt(rss / n * np.expm1(CUTOFF**2 / d))
    assert limits.loc["Intercept"].to_numpy() == pytest.approx([y.mean() - half, y.mean() + half])

    def rise(sigma):
        return d * np.log(sigma**2 * d / rss) + rss / sigma**2 - d - CUTOFF**2

    best = np.sqrt(rss / d)
    expected = [optimize.brentq(rise, a, b, xtol=1e-14) for a, b in ((0.3 * best, best), (best, 9))]
    np.testing.assert_allclose(limits.loc["sigma"], expected, rtol=1e-10)


# --- the boundary ---------------------------------------------------------------------------------


def test_a_variance_of_zero_has_an_upper_limit_only():
    data = lmmax.datasets.load("dyestuff2")
    fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", data)
    found = profile(fit, "Batch: sd(Intercept)")
    assert found.estimates.iloc[0] == 0.0
    assert found.status.iloc[0] == "boundary"
    lower, upper = found.conf_int().iloc[0]
    assert lower == 0.0
    held = lmmax.fit("Yield ~ 1 + (1 | Batch)", data, fix={"cov_re": [[upper**2]]})
    assert held.deviance - fit.deviance == pytest.approx(CUTOFF**2, abs=1e-8)
    assert (found.table["value"] >= 0.0).all()
    assert found.table["value"].iloc[0] == 0.0
    assert any("the end of the parameter space" in note for note in found.notes)


def test_a_perfect_correlation_has_one_limit():
    """Beyond the profile's plateau, where the slopes do not vary, no correlation is worse."""
    data = load_data("syn_nearsing")
    perfect = lmmax.fit("y_corr ~ x + (1 + x | g)", data)
    found = profile(perfect, "g: cor(Intercept, x)")
    lower, upper = found.conf_int().iloc[0]
    assert upper == 1.0
    assert 0.0 < lower < 1.0
    for _, row in found.table.iterrows():
        values = {name: complex(row[name]) for name in found.table.columns[4:]}
        assert deviance(perfect, values).real == pytest.approx(row["deviance"], abs=1e-7)
    nothing = lmmax.fit("y_none ~ x + (1 + x | g)", data)
    found = profile(nothing, "random")
    limits = found.conf_int()
    assert limits.loc["g: cor(Intercept, x)"].tolist() == [-1.0, 1.0]
    assert limits.loc["g: sd(x)", "lower"] == 0.0
    plateau = found.table[found.table["parameter"] == "g: cor(Intercept, x)"]["deviance"].max()
    without = lmmax.fit("y_none ~ x + (1 | g)", data)
    assert plateau == pytest.approx(without.deviance, abs=1e-7)


def test_a_correlation_with_nothing_is_undefined():
    """Groups that are alike in every respect: all variances are zero."""
    x = np.tile([-1.0, 0.0, 1.0, 2.0], 6)
    y = np.tile([0.5, -1.0, 1.0, -0.5], 6) + 0.3 * x
    data = pd.DataFrame({"y": y, "x": x, "g": np.repeat(list("abcdef"), 4)})
    fit = lmmax.fit("y ~ x + (1 + x | g)", data)
    found = profile(fit, "random")
    assert found.status["g: cor(Intercept, x)"] == "undefined"
    assert found.conf_int().loc["g: cor(Intercept, x)"].isna().all()
    assert "g: cor(Intercept, x) is undefined, for the variance of" in found.notes[-1]
    limits = found.conf_int()
    assert (limits.loc[["g: sd(Intercept)", "g: sd(x)"], "lower"] == 0.0).all()
    upper = limits.loc["g: sd(x)", "upper"]
    held = lmmax.fit("y ~ x + (1 | g) + (0 + x | g)", data, fix=_only_slope(upper))
    # Independent effects fit no better than correlated ones.
    assert held.deviance - fit.deviance > CUTOFF**2 - 1e-7


def _only_slope(sd):
    return {"cov_re": {"(0 + x | g)": [[sd**2]]}}


# --- the objects ----------------------------------------------------------------------------------


def test_the_table(slopes):
    found = profile(slopes, alpha=0.01)
    assert list(found.table.columns[:4]) == ["parameter", "value", "zeta", "deviance"]
    assert list(found.table.columns[4:]) == list(found.estimates.index)
    reach = stats.norm.ppf(0.995)
    for name, rows in found.table.groupby("parameter"):
        assert len(rows) == 17
        assert rows["value"].is_monotonic_increasing
        assert rows["zeta"].iloc[[0, 8, 16]].to_numpy() == pytest.approx([-reach, 0, reach])
        np.testing.assert_allclose(np.diff(rows["zeta"]), reach / 8, rtol=0.1)
        assert rows["value"].iloc[8] == found.estimates[name]
        assert (rows[name] == rows["value"]).all()
    rise = found.table["deviance"] - slopes.deviance
    np.testing.assert_allclose(rise, found.table["zeta"] ** 2, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 0.05, 1e-4])
def test_limits_are_exact_at_any_level(slopes, alpha):
    """Also beyond the reach of the table."""
    found = profile(slopes, "Subject: sd(Days)", alpha=0.01)
    limits = found.conf_int(alpha)
    np.testing.assert_allclose(
        limits, profile_limits(slopes, "Subject: sd(Days)", alpha), rtol=1e-9
    )
    if alpha == 1e-4:
        assert limits["upper"].iloc[0] > found.table["value"].max()


def test_symmetric_about_the_estimate_where_the_design_is_balanced():
    fit = lmmax.fit("travel ~ 1 + (1 | Rail)", lmmax.datasets.load("rail"))
    lower, upper = profile_limits(fit, "Intercept").iloc[0]
    assert (lower + upper) / 2 == pytest.approx(fit.params.iloc[0], rel=1e-9)


def test_other_data_of_the_same_shape_compile_nothing(slopes):
    profile(slopes)
    before = compiled_count()
    y = slopes.design.y[::-1].copy()
    profile(lmmax.fit(slopes.formula, lmmax.datasets.load("sleepstudy").assign(Reaction=y)))
    profile_limits(slopes, alpha=0.2)
    assert compiled_count() == before


def test_what_is_fixed_has_no_profile(slopes):
    data = lmmax.datasets.load("sleepstudy")
    fit = lmmax.fit(slopes.formula, data, fix={"scale": 600.0})
    assert "sigma" not in profile_limits(fit, "random").index
    with pytest.raises(ValueError, match="'sigma' is no parameter of the model"):
        profile(fit, "sigma")


def test_two_terms_with_parameters_of_one_name():
    machines = lmmax.datasets.load("machines")
    fit = lmmax.fit("score ~ homdiag(0 + Machine | Worker) + id(1 | Worker)", machines)
    names = [name for name in confint(fit, method="wald").index if "sd" in name]
    assert names == ["homdiag(0 + Machine | Worker): sd", "homdiag(1 | Worker): sd"]


def test_print(slopes):
    found = profile(slopes, ["sigma", "Subject: cor(Intercept, Days)"])
    lines = str(found).split("\n")
    assert lines[0] == "Likelihood profiles (ML)"
    values = [25.592, *found.conf_int(0.05).loc["sigma"], *found.conf_int(0.01).loc["sigma"]]
    assert lines[-2].split() == ["sigma", *(f"{value:.3f}" for value in values)]
    assert max(map(len, lines)) <= 80
    page = found._repr_html_()
    assert "<td>25.592</td>" in page
    assert page.count("<tr>") == 3
    assert "ML, 2 parameters>" in repr(found)


# --- other methods --------------------------------------------------------------------------------


def test_wald_limits(sleepstudy_slope):
    limits = confint(sleepstudy_slope, method="wald", alpha=0.1, ddf="normal")
    table = sleepstudy_slope.varcorr()
    center, se = table["sdcor"].to_numpy(), table["sdcor_se"].to_numpy()
    z = stats.norm.ppf(0.95)
    assert list(limits.index[2:4]) == ["Subject: sd(Intercept)", "Subject: sd(Days)"]
    # Logarithms of standard deviations, Fisher's z of the correlation, by the delta method.
    is_sd = table["var2"].isna().to_numpy()
    to = np.where(is_sd, np.log(center), np.arctanh(np.where(is_sd, 0.0, center)))
    half = z * se / np.where(is_sd, center, 1.0 - center**2)
    for name, side in (("lower", -1.0), ("upper", 1.0)):
        back = np.where(is_sd, np.exp(to + side * half), np.tanh(to + side * half))
        np.testing.assert_allclose(limits[name].iloc[2:], back, rtol=1e-12)
    np.testing.assert_allclose(
        limits.iloc[:2], sleepstudy_slope.conf_int(0.1, "normal"), rtol=1e-12
    )
    t_limits = confint(sleepstudy_slope, "fixed", method="wald")
    np.testing.assert_allclose(t_limits, sleepstudy_slope.conf_int(), rtol=1e-12)


def test_bootstrap_limits(sleepstudy_slope):
    limits = confint(sleepstudy_slope, "random", method="bootstrap", n=199, seed=3, kind="basic")
    expected = bootstrap(sleepstudy_slope, n=199, seed=3).conf_int(kind="basic")
    assert list(limits.index) == list(profile_limits(sleepstudy_slope, "random").index)
    np.testing.assert_array_equal(limits, expected.iloc[2:])


def test_several_minima():
    """The minimum over the rest may lie on a branch to which no warm start leads.

    Limits of 48 rows with six covariances, checked by searches from twenty starts each.
    """
    rng = np.random.default_rng(5)
    g, x, w = np.repeat(np.arange(8), 6), rng.normal(size=48), rng.normal(size=48)
    b = rng.normal(size=(8, 3)) @ np.diag([0.3, 1.0, 0.3])
    y = 1.0 + b[g, 0] + b[g, 1] * x + b[g, 2] * w + rng.normal(size=48)
    data = pd.DataFrame({"y": y, "x": x, "w": w, "g": g})
    fit = lmmax.fit("y ~ x + (x + w | g)", data)
    charts = Charts(fit)
    walk = Walk(fit, charts, select(charts, "random"))
    walk.follow(CUTOFF)
    _, status = walk.limits(CUTOFF)
    assert "failed" not in status
    tasks = [
        (side, side.limit(CUTOFF), start)
        for pair in walk.sides.values()
        for side in pair
        if side.limit(CUTOFF) < np.inf
        for start in _starts(charts, rng)
    ]
    assert len(tasks) >= 100
    for (side, t, _), held in zip(tasks, walk.search(tasks), strict=True):
        assert held.value - walk.least > CUTOFF**2 - 1e-6, (side.parameter.name, t)


def _starts(charts, rng):
    at = charts.start
    noise = rng.standard_normal((20, *at.root.shape))
    return [at._replace(root=at.root + 0.7 * change) for change in noise]


# --- branches -------------------------------------------------------------------------------------


def some_groups(seed, skip):
    """A few rows in some groups, the last of a stream of data sets."""
    rng = np.random.default_rng(seed)
    for _ in range(skip + 1):
        n, m, k = int(rng.integers(12, 36)), int(rng.integers(2, 6)), int(rng.integers(2, 5))
        x = rng.normal(size=n) + rng.choice([0, 3])
        g, s = rng.integers(0, m, n), rng.integers(0, k, n)
        y = rng.normal(size=n) + rng.choice([0, 0.3, 2]) * rng.normal(size=m)[g]
        y += rng.choice([0, 0.5, 2]) * rng.normal(size=k)[s]
        y += rng.choice([0, 0.5]) * rng.normal(size=m)[g] * x
        rng.integers(2)
        rng.integers(3)
    return pd.DataFrame({"y": y, "x": x, "g": g})


def least(criterion, starts):
    """Return the least minimum of a search from each start."""
    options = {"xatol": 1e-8, "fatol": 1e-10, "maxiter": 4000}
    found = [optimize.minimize(criterion, z, method="Nelder-Mead", options=options) for z in starts]
    return min(each.fun for each in found)


def dense(data, reml, sds, r, sigma, shift=0.0, columns=("1", "x")):
    """The n x n criterion of (1 + x | g), the coefficients of some columns at their best."""
    ones, x = np.ones(len(data)), data["x"].to_numpy()
    same = data["g"].to_numpy()[:, None] == data["g"].to_numpy()
    Z = np.column_stack([ones, x])
    Psi = np.outer(sds, sds) * np.array([[1.0, r], [r, 1.0]])
    V = same * (Z @ Psi @ Z.T) + sigma**2 * np.eye(len(x))
    X = Z[:, [("1", "x").index(column) for column in columns]]
    W, y = np.linalg.solve(V, X), data["y"].to_numpy() - shift
    e = y - X @ np.linalg.solve(X.T @ W, W.T @ y)
    found = np.linalg.slogdet(V)[1] + e @ np.linalg.solve(V, e)
    found += np.linalg.slogdet(X.T @ W)[1] if reml else 0.0
    return found + (len(x) - reml * X.shape[1]) * np.log(2.0 * np.pi)


def both_limits(fit, name):
    """Limits, the same whether the curve was asked for or not."""
    limits = confint(fit, name).loc[name].to_numpy()
    np.testing.assert_allclose(profile(fit, name).conf_int().loc[name], limits, rtol=1e-6)
    return limits


@pytest.mark.parametrize(("seed", "effect"), [(22, "1"), (51, "x")])
def test_a_correlation_may_be_anything_where_a_variance_may_be_zero(seed, effect):
    rng = np.random.default_rng(seed)
    m, per = int(rng.integers(5, 25)), int(rng.integers(3, 8))
    g, n = np.repeat(np.arange(m), per), m * per
    x, sd = rng.normal(size=n) + rng.choice([0, 0, 2]), rng.choice([0.1, 0.3, 0.6])
    b = rng.normal(size=m)
    slope = 0.5 * b + rng.normal(size=m) * 0.85
    data = pd.DataFrame({"g": g, "x": x, "y": b[g] + sd * slope[g] * x + rng.normal(size=n)})
    fit = lmmax.fit("y ~ x + (1 + x | g)", data)
    assert not fit.singular
    # Without the other effect the correlation means nothing, and the criterion is below the cutoff.
    smaller = lmmax.fit(f"y ~ x + (0 + {effect} | g)", data)
    assert smaller.deviance - fit.deviance < CUTOFF**2
    assert both_limits(fit, "g: cor(Intercept, x)").tolist() == [-1.0, 1.0]


def test_a_standard_deviation_beside_a_perfect_correlation_of_the_other_sign():
    data = some_groups(11, 11)
    fit = lmmax.fit("y ~ x + (1 + x | g)", data)
    assert fit.varcorr()["sdcor"].iloc[2] == pytest.approx(1.0)
    lower, upper = both_limits(fit, "g: sd(x)")
    assert lower == 0.0

    def criterion(z):
        return dense(data, True, (np.exp(z[0]), upper), np.tanh(z[1]), np.exp(z[2]))

    found = least(criterion, [(0.0, 3.0, 0.0), (0.0, -3.0, 0.0), (1.5, -3.0, 0.0)])
    assert found - fit.deviance == pytest.approx(CUTOFF**2, abs=1e-3)


def test_a_coefficient_where_a_variance_comes_off_zero():
    data = some_groups(12, 14)
    fit = lmmax.fit("y ~ x + (1 | g)", data, reml=False)
    assert fit.singular
    lower, _ = both_limits(fit, "Intercept")

    def criterion(z):
        return dense(data, False, (np.exp(z[0]), 0.0), 0.0, np.exp(z[1]), lower, ("x",))

    found = least(criterion, [(0.0, 0.0), (1.0, 0.0), (-9.0, 0.0)])
    assert found - fit.deviance == pytest.approx(CUTOFF**2, abs=1e-3)


# --- bad requests and failures --------------------------------------------------------------------


def test_bad_requests(slopes):
    for call in (profile, confint):
        with pytest.raises(ValueError, match=r"'days' is no parameter .* 'Subject: sd\(Days\)'"):
            call(slopes, ["sigma", "days"])
        with pytest.raises(ValueError, match="alpha=5 must lie between 0 and 1"):
            call(slopes, alpha=5)
    with pytest.raises(ValueError, match="'days' is no parameter of the model"):
        confint(slopes, "days", method="bootstrap")
    with pytest.raises(ValueError, match="method='profil' is unknown; use one of 'profile'"):
        confint(slopes, method="profil")
    with pytest.raises(TypeError, match="does not take 'ddf': it takes no options"):
        confint(slopes, ddf="normal")
    with pytest.raises(TypeError, match="does not take 'n': it takes only ddf"):
        confint(slopes, method="wald", n=10)


def test_correlations_that_depend_on_several_parameters():
    data = load_data("syn_reps").assign(day=lambda d: d["t"].astype(int))
    fit = lmmax.fit("y ~ t + homtoep(0 + C(day) | id)", data)
    with pytest.raises(ValueError, match=r"'id: cor\(lag 2\)' has no profile: .*bootstrap"):
        profile(fit, "id: cor(lag 2)")
    assert list(confint(fit, "random", method="wald").index) == [
        "id: sd",
        "id: cor(lag 1)",
        "sigma",
    ]


def test_engine_with_monte_carlo_error(slopes):
    iterative = slopes.engine._replace(name="iterative", reason="as asked for")
    fit = replace(slopes, layout=replace(slopes.layout, engine=iterative))
    with pytest.raises(lmmax.EngineError, match=r"no profiles; use method='wald'"):
        profile(fit)


def test_a_fit_that_did_not_converge_has_no_limits(slopes):
    data = lmmax.datasets.load("sleepstudy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmmax.ConvergenceWarning)
        fit = lmmax.fit(slopes.formula, data, max_steps=1, em_steps=0)
    with pytest.warns(ProfileWarning, match=r"no profile limits for .*has not converged"):
        limits = confint(fit)
    assert limits.isna().all(axis=None)
    assert (profile(fit).status == "failed").all()


def test_a_correlation_that_the_estimates_do_not_tell() -> None:
    """From a variance of zero a structure may go on with a correlation of either sign."""
    rng = np.random.default_rng(20)
    n = 48
    g, h, x = rng.integers(0, 8, n), rng.integers(0, 4, n), rng.normal(size=n)
    f, sd = rng.choice(list("ab"), n), rng.choice([0.0, 0.3, 1.0, 3.0], 3)
    y = rng.normal(size=n) + sd[0] * rng.normal(size=8)[g] + sd[1] * rng.normal(size=8)[g] * x
    y = y + sd[2] * rng.normal(size=4)[h]
    data = pd.DataFrame({"g": g, "x": x, "f": f, "y": y})
    fit = lmmax.fit("y ~ x + homcs(0 + f | g)", data, reml=False)
    assert fit.singular
    limits = confint(fit, ["Intercept", "sigma"])

    same = (g[:, None] == g) * 1.0
    other = np.where(f[:, None] == f, 0.0, 1.0)

    def deviance(free: np.ndarray, intercept: float | None, sigma: float | None) -> float:
        variance, rho = free[:2]
        scale = free[2] if sigma is None else sigma**2
        V = variance * same * (1.0 - other + rho * other) + scale * np.eye(n)
        X = np.column_stack([np.ones(n), x])[:, int(intercept is not None) :]
        L = np.linalg.cholesky(V)
        white, left = np.linalg.solve(L, X), np.linalg.solve(L, y - (intercept or 0.0))
        residual = left - white @ np.linalg.lstsq(white, left, rcond=None)[0]
        return log_det(V) + float(residual @ residual) + n * np.log(2.0 * np.pi)

    for held, row in ((0, "Intercept"), (1, "sigma")):
        for limit in limits.loc[row]:
            given = (limit, None) if held == 0 else (None, limit)
            ends = [
                optimize.minimize(
                    deviance, [v, r, 10.0], given, "L-BFGS-B", bounds=[(0, 50), (-1, 1), (0.1, 90)]
                ).fun
                for v in (0.0, 0.5)
                for r in (-0.9, 0.9)
            ]
            assert min(ends) - fit.deviance == pytest.approx(CUTOFF**2, abs=1e-3)
