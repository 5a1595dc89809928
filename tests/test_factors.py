"""Several grouping factors through the public interface, against the dense oracle."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmmax
from tests.oracles.designs import UNRELATED, Problem, simulate

pytestmark = pytest.mark.unoptimised

SEEDS = st.integers(min_value=0, max_value=2**20)
few = settings(max_examples=3, deadline=None, derandomize=True, database=None)
# Changes of labels and order cost a few units in the last place of a sum over rows.
EXACT = 1e-10


def fit_problem(problem: Problem, *, reml: bool = True, **options: Any) -> lmmax.Fit:
    return lmmax.fit(problem.formula, problem.data, reml=reml, weights=problem.weights, **options)


@functools.cache
def fitted(kind: str, seed: int, reml: bool) -> tuple[Problem, lmmax.Fit]:
    problem = simulate(kind, seed)
    return problem, fit_problem(problem, reml=reml)


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
    """Every entry to the tolerance relative to the largest of the expected ones."""
    got, expected = np.asarray(got, dtype=float), np.asarray(expected, dtype=float)
    assert got.shape == expected.shape
    assert np.max(np.abs(got - expected)) <= tolerance * np.max(np.abs(expected))


def assert_is_model_at(
    fit: lmmax.Fit, problem: Problem, covs: list[np.ndarray], scale: float, tolerance: float
) -> None:
    """Coefficients, effects and fitted values are those of the dense model at these parameters."""
    model = problem.model
    beta, cov = model.coefficients(covs, scale)
    assert_close(fit.params, beta, tolerance)
    assert_close(fit.cov_params(), cov, tolerance)
    assert_close(fit.bse, np.sqrt(np.diag(cov)), tolerance)
    several = len(problem.terms) > 1
    assert isinstance(fit.random_effects, Mapping) == several
    assert isinstance(fit.random_effects_cov, Mapping) == several
    if several:
        assert list(fit.random_effects) == list(problem.terms)
        assert list(fit.random_effects_cov) == list(problem.terms)
    for group, modes, variances in zip(
        problem.terms,
        model.modes(covs, scale),
        model.conditional_covariances(covs, scale),
        strict=True,
    ):
        effects = fit.random_effects[group] if several else fit.random_effects
        ours = fit.random_effects_cov[group] if several else fit.random_effects_cov
        assert sorted(effects.index) == problem.levels[group]
        assert_close(effects.loc[problem.levels[group]], modes, 10.0 * tolerance)
        order = effects.index.get_indexer(problem.levels[group])
        assert_close(ours[order], variances, 10.0 * tolerance)
    assert_close(fit.fittedvalues, model.fitted(covs, scale), tolerance)
    assert_close(fit.resid, model.y - model.fitted(covs, scale), 10.0 * tolerance)


def assert_same_fit(one: lmmax.Fit, two: lmmax.Fit) -> None:
    """Two forms of a model: the criterion to rounding, estimates to the solver's tolerance."""
    assert one.converged
    assert two.converged
    assert one.deviance == pytest.approx(two.deviance, rel=EXACT)
    assert_close(one.params, two.params, 1e-7)
    assert_close(one.bse, two.bse, 1e-7)
    assert one.scale == pytest.approx(two.scale, rel=1e-7)


# --- at given parameters --------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNRELATED)
@few
@given(seed=SEEDS, reml=st.booleans())
def test_fixed_parameters(kind: str, seed: int, reml: bool) -> None:
    problem = simulate(kind, seed)
    fit = fit_problem(problem, reml=reml, fix={"cov_re": problem.covs, "scale": problem.scale})
    covs, scale = problem.by_factor(problem.covs), problem.scale
    expected = problem.model.natural_criterion(covs, scale, reml)
    assert fit.deviance == pytest.approx(expected, rel=1e-10)
    assert fit.scale == pytest.approx(scale, rel=1e-12)
    for label, cov in problem.by_term(fit.cov_re.to_numpy()).items():
        assert_close(cov, problem.covs[label], 1e-12)
    assert_is_model_at(fit, problem, covs, scale, 1e-9)


@pytest.mark.parametrize("kind", ["nested_three", "crossed_slopes"])
def test_one_term_without_variance(kind: str) -> None:
    """A covariance held at zero is a term that is not there."""
    problem = simulate(kind, 1)
    covs = dict(problem.covs)
    last = list(covs)[-1]
    covs[last] = np.zeros_like(covs[last])
    fit = fit_problem(problem, fix={"cov_re": covs, "scale": problem.scale})
    expected = problem.model.natural_criterion(problem.by_factor(covs), problem.scale, True)
    assert fit.deviance == pytest.approx(expected, rel=1e-10)
    formula = problem.formula.removesuffix(f" + {last}")
    assert formula != problem.formula
    del covs[last]
    without = lmmax.fit(formula, problem.data, fix={"cov_re": covs, "scale": problem.scale})
    assert fit.deviance == pytest.approx(without.deviance, rel=EXACT)
    assert_close(fit.params, without.params, EXACT)
    assert np.all(fit.random_effects[last[1:-1].split(" | ")[1]].to_numpy() == 0.0)


def test_holding_some_parameters() -> None:
    """With one term held, the rest is at the optimum given it."""
    problem, free = fitted("crossed_slopes", 2, True)
    label = "(1 + x | a)"
    held = 2.0 * problem.by_term(free.cov_re.to_numpy())[label]
    fit = fit_problem(problem, fix={"cov_re": {label: held}})
    assert fit.converged
    assert_close(problem.by_term(fit.cov_re.to_numpy())[label], held, 1e-12)
    assert fit.n_params == free.n_params - 3
    covs = problem.by_factor(problem.by_term(fit.cov_re.to_numpy()))
    assert fit.deviance > free.deviance
    pairs = [[], problem.pairs()[1]]
    score, information = problem.model.score_and_information(covs, fit.scale, True, pairs)
    assert abs(score @ np.linalg.solve(information, score)) < 1e-9


# --- at the optimum -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNRELATED)
@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_optimum(kind: str, reml: bool, seed: int) -> None:
    problem, fit = fitted(kind, seed, reml)
    model = problem.model
    assert fit.converged
    terms = problem.by_term(fit.cov_re.to_numpy())
    covs, scale = problem.by_factor(terms), fit.scale
    value = model.natural_criterion(covs, scale, reml)
    assert fit.deviance == pytest.approx(value, rel=1e-10)
    assert fit.llf == pytest.approx(-0.5 * value, rel=1e-10)
    assert_is_model_at(fit, problem, covs, scale, 1e-8)
    assert scale == pytest.approx(
        model.profiled_scale([cov / scale for cov in covs], reml), rel=1e-8
    )

    # No other parameters do better: near ones, far ones, with less and with more rank.
    rng = np.random.Generator(np.random.PCG64(seed))
    for step in (1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0):
        for _ in range(3):
            other = {}
            for label, cov in terms.items():
                values, vectors = np.linalg.eigh(cov)
                root = vectors * np.sqrt(np.maximum(values, 0.0))
                noise = step * np.sqrt(scale) * rng.standard_normal(root.shape)
                other[label] = (root + noise) @ (root + noise).T
            factor = np.exp(step * rng.standard_normal())
            perturbed = model.natural_criterion(problem.by_factor(other), scale * factor, reml)
            assert perturbed >= value - 1e-10 * abs(value)

    # The gradient is zero in units of the curvature, and the curvature gives standard errors.
    sizes = [max(float(np.trace(cov)), scale) for cov in terms.values()]
    least = min(
        np.linalg.eigvalsh(cov)[0] / size for cov, size in zip(terms.values(), sizes, strict=True)
    )
    assert (least < 1e-8) == fit.singular
    if not fit.singular:
        score, information = model.score_and_information(covs, scale, reml, problem.pairs())
        assert abs(score @ np.linalg.solve(information, score)) < 1e-9
        assert np.linalg.eigvalsh(information)[0] > 0.0
        errors = np.sqrt(np.diag(np.linalg.inv(information)))
        table = fit.varcorr()
        assert table["vcov_se"].iloc[-1] == pytest.approx(errors[-1], rel=1e-5)
        stated = [
            error
            for error, (i, j) in zip(
                errors[:-1], [pair for entries in problem.pairs() for pair in entries], strict=True
            )
            if i == j
        ]
        variances = table.iloc[:-1][[name is None for name in table["var2"].iloc[:-1]]]
        np.testing.assert_allclose(variances["vcov_se"], stated, rtol=1e-5)


def test_most_fits_of_this_file_are_regular() -> None:
    """Otherwise the gradients above would not be looked at."""
    singular = [fitted(kind, 0, True)[1].singular for kind in UNRELATED]
    assert sum(singular) <= len(singular) // 3


def test_balanced_crossed_data_have_closed_form_estimates() -> None:
    """REML in a balanced two-way layout is the analysis of variance."""
    rng = np.random.Generator(np.random.PCG64(4))
    A, B, r = 9, 6, 2
    a, b = (grid.ravel() for grid in np.meshgrid(np.arange(A), np.arange(B), indexing="ij"))
    a, b = np.repeat(a, r), np.repeat(b, r)
    y = 5.0 + 2.0 * rng.standard_normal(A)[a] + 1.5 * rng.standard_normal(B)[b]
    y = y + rng.standard_normal(len(a))
    data = pd.DataFrame({"y": y, "a": a, "b": b})
    fit = lmmax.fit("y ~ 1 + (1 | a) + (1 | b)", data)
    mean_a = data.groupby("a")["y"].mean().to_numpy()
    mean_b = data.groupby("b")["y"].mean().to_numpy()
    ms_a, ms_b = B * r * np.var(mean_a, ddof=1), A * r * np.var(mean_b, ddof=1)
    rest = y - mean_a[a] - mean_b[b] + y.mean()
    mse = rest @ rest / (len(y) - A - B + 1)
    assert min(ms_a, ms_b) > mse
    assert fit.scale == pytest.approx(mse, rel=1e-7)
    expected = [(ms_a - mse) / (B * r), (ms_b - mse) / (A * r)]
    np.testing.assert_allclose(np.diag(fit.cov_re), expected, rtol=1e-7)
    assert fit.params.iloc[0] == pytest.approx(y.mean(), rel=1e-12)
    assert fit.bse.iloc[0] ** 2 == pytest.approx((ms_a + ms_b - mse) / len(y), rel=1e-7)


def test_balanced_nested_data_have_closed_form_estimates() -> None:
    rng = np.random.Generator(np.random.PCG64(5))
    A, B, r = 9, 4, 3
    a, b = np.repeat(np.arange(A), B * r), np.tile(np.repeat(np.arange(B), r), A)
    cell = a * B + b
    y = 1.0 + 2.0 * rng.standard_normal(A)[a] + 1.2 * rng.standard_normal(A * B)[cell]
    y = y + rng.standard_normal(len(a))
    data = pd.DataFrame({"y": y, "a": a, "b": b})
    fit = lmmax.fit("y ~ 1 + (1 | a/b)", data)
    means = pd.Series(y).groupby(cell).mean().to_numpy().reshape(A, B)
    ms_a = B * r * np.var(means.mean(axis=1), ddof=1)
    ms_b = r * np.sum((means - means.mean(axis=1, keepdims=True)) ** 2) / (A * (B - 1))
    mse = np.sum((y - means.ravel()[cell]) ** 2) / (len(y) - A * B)
    assert ms_a > ms_b > mse
    assert fit.scale == pytest.approx(mse, rel=1e-7)
    expected = [(ms_a - ms_b) / (B * r), (ms_b - mse) / r]
    np.testing.assert_allclose(np.diag(fit.cov_re), expected, rtol=1e-7)
    assert fit.bse.iloc[0] ** 2 == pytest.approx(ms_a / len(y), rel=1e-7)


# --- what does not matter -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nested_three", "crossed_slopes", "terms_of_one_factor"])
def test_order_of_rows(kind: str) -> None:
    problem, fit = fitted(kind, 0, True)
    shuffled = problem.data.sample(frac=1.0, random_state=3)
    other = lmmax.fit(problem.formula, shuffled)
    assert_same_fit(other, fit)
    assert_close(other.cov_re, fit.cov_re, 1e-7)
    assert_close(other.fittedvalues.loc[problem.data.index], fit.fittedvalues, 1e-7)
    for group, effects in fit.random_effects.items():
        assert list(other.random_effects[group].index) == list(effects.index)
        assert_close(other.random_effects[group], effects, 1e-6)
        assert_close(other.random_effects_cov[group], fit.random_effects_cov[group], 1e-6)


@pytest.mark.parametrize(
    ("kind", "seed"), [("nested_three", 0), ("crossed_slopes", 0), ("crossed_nested", 1)]
)
def test_order_of_terms(kind: str, seed: int) -> None:
    problem, fit = fitted(kind, seed, True)
    labels = list(problem.covs)[::-1]
    other = lmmax.fit(f"y ~ x + {' + '.join(labels)}", problem.data)
    assert_same_fit(other, fit)
    assert list(other.random_effects) == list(problem.terms)[::-1]
    for group, effects in fit.random_effects.items():
        assert_close(other.random_effects[group], effects, 1e-6)
        block = fit.cov_re.loc[group, group]
        assert_close(other.cov_re.loc[group, group], block, 1e-7)
    assert_close(other.fittedvalues, fit.fittedvalues, 1e-7)


def test_terms_of_one_factor_stand_together() -> None:
    """Between them the other factor's term: the same model, the same table."""
    problem, fit = fitted("terms_of_one_factor", 0, True)
    other = lmmax.fit("y ~ x + (1 | a) + (1 | b) + (0 + x | a)", problem.data)
    assert_same_fit(other, fit)
    assert list(other.random_effects) == ["a", "b"]
    assert list(other.random_effects["a"].columns) == ["Intercept", "x"]
    assert list(other.cov_re.index) == [("a", "Intercept"), ("a", "x"), ("b", "Intercept")]
    assert_close(other.cov_re, fit.cov_re, 1e-7)
    assert_close(other.random_effects["a"], fit.random_effects["a"], 1e-6)
    both = lmmax.fit("y ~ x + (1 + x || a) + (1 | b)", problem.data)
    assert_same_fit(both, fit)
    assert_close(both.cov_re, fit.cov_re, 1e-7)


@pytest.mark.parametrize("kind", ["nested", "crossed_slopes"])
def test_names_of_levels(kind: str) -> None:
    """Other labels in another order, of other types."""
    problem, fit = fitted(kind, 0, True)
    data = problem.data.copy()
    a, b = sorted(set(data["a"])), sorted(set(data["b"]))
    data["a"] = data["a"].map({label: 100 - i for i, label in enumerate(a)})
    data["b"] = data["b"].map({label: f"B{len(b) - i}" for i, label in enumerate(b)})
    data["b"] = data["b"].astype("category")
    other = lmmax.fit(problem.formula, data)
    assert_same_fit(other, fit)
    assert_close(other.cov_re, fit.cov_re, 1e-7)
    assert_close(other.fittedvalues, fit.fittedvalues, 1e-7)
    effects = other.random_effects["a"].loc[[100 - i for i in range(len(a))]]
    assert_close(effects, fit.random_effects["a"].loc[a], 1e-6)


def test_implicit_nesting() -> None:
    """Unique labels need no interaction."""
    problem, fit = fitted("nested", 0, True)
    data = problem.data.assign(ab=problem.data["a"] + ":" + problem.data["b"])
    for formula in ("y ~ x + (1 | a) + (1 | ab)", "y ~ x + (1 | a/b)", "y ~ x + (1 | a/ab)"):
        other = lmmax.fit(formula, data)
        assert_same_fit(other, fit)
        np.testing.assert_allclose(np.diag(other.cov_re), np.diag(fit.cov_re), rtol=1e-6)
        inner = list(other.random_effects)[-1]
        effects = other.random_effects[inner].to_numpy()
        assert_close(effects, fit.random_effects["a:b"].to_numpy(), 1e-6)
    wrong = lmmax.fit("y ~ x + (1 | a) + (1 | b)", data)
    assert abs(wrong.deviance - fit.deviance) > 1e-3


@pytest.mark.parametrize("kind", ["nested", "crossed_slopes"])
def test_units(kind: str) -> None:
    """Units of the response, and of a covariate with random effects."""
    problem, fit = fitted(kind, 0, True)
    data = problem.data.assign(
        y=1e6 * problem.data["y"], x=1e-4 * problem.data["x"], z=1e3 * problem.data["z"]
    )
    other = lmmax.fit(problem.formula, data)
    n, p = len(data), 2
    shift = 2.0 * ((n - p) * np.log(1e6) + np.log(1e-4))
    assert other.converged
    assert other.deviance == pytest.approx(fit.deviance + shift, rel=1e-9)
    assert other.scale == pytest.approx(1e12 * fit.scale, rel=1e-7)
    assert_close(other.params * [1e-6, 1e-10], fit.params, 1e-7)
    assert_close(1e-6 * other.fittedvalues, fit.fittedvalues, 1e-7)


# --- weights, offset, missing rows ----------------------------------------------------------


def test_weights_are_replicates() -> None:
    """k copies of a row are one row of weight k, but for constants of the normal density."""
    problem = simulate("partly_crossed", 6)
    rng = np.random.Generator(np.random.PCG64(6))
    k = rng.integers(1, 4, len(problem.data))
    fix = {"cov_re": problem.covs, "scale": problem.scale}
    data = problem.data.assign(k=k)
    weighted = lmmax.fit(problem.formula, data, weights="k", fix=fix)
    copies = data.loc[np.repeat(data.index, k)].reset_index(drop=True)
    replicated = lmmax.fit(problem.formula, copies, fix=fix)
    constant = np.sum((k - 1) * np.log(2.0 * np.pi * problem.scale) + np.log(k))
    assert replicated.deviance == pytest.approx(weighted.deviance + constant, rel=EXACT)
    assert_close(replicated.params, weighted.params, 1e-9)
    assert_close(replicated.bse, weighted.bse, 1e-9)
    for group, effects in weighted.random_effects.items():
        assert_close(replicated.random_effects[group], effects, 1e-8)
        assert_close(replicated.random_effects_cov[group], weighted.random_effects_cov[group], 1e-8)


def test_common_factor_of_weights() -> None:
    """Tripled weights triple the scale and change nothing else but a constant."""
    problem, fit = fitted("weights", 0, True)
    other = lmmax.fit(problem.formula, problem.data, weights=3.0 * problem.data["w"].to_numpy())
    assert other.scale == pytest.approx(3.0 * fit.scale, rel=1e-7)
    assert other.deviance == pytest.approx(fit.deviance, rel=EXACT)
    assert_close(other.params, fit.params, 1e-7)
    assert_close(other.cov_re, fit.cov_re, 1e-6)


def test_offset() -> None:
    problem, fit = fitted("crossed_slopes", 0, True)
    offset = np.linspace(-3.0, 4.0, len(problem.data))
    data = problem.data.assign(y=problem.data["y"] + offset, o=offset)
    for other in (
        lmmax.fit(problem.formula, data, offset="o"),
        lmmax.fit(f"{problem.formula} + offset(o)", data),
    ):
        assert_same_fit(other, fit)
        assert_close(other.fittedvalues, fit.fittedvalues + offset, 1e-7)
        assert_close(other.resid, fit.resid, 1e-6)


def test_missing_rows() -> None:
    """Rows with a gap in any variable go, and with them a level that has no other row."""
    problem = simulate("crossed_slopes", 0)
    data = problem.data.copy()
    data.loc[3, "y"] = np.nan
    data.loc[10, "x"] = np.nan
    data.loc[20, "z"] = np.nan
    data.loc[30, "b"] = None
    single = data.index[data["a"] == "a08"]
    assert len(single) == 1
    data.loc[single, "a"] = None
    fit = lmmax.fit(problem.formula, data)
    complete = lmmax.fit(problem.formula, data.dropna(subset=["y", "x", "z", "a", "b"]))
    dropped = len({3, 10, 20, 30, *single})
    assert fit.nobs == complete.nobs == len(data) - dropped
    assert_same_fit(fit, complete)
    assert "a08" not in fit.random_effects["a"].index
    assert list(fit.fittedvalues.index) == list(complete.fittedvalues.index)
    # The missing values of a column that the model does not use cost nothing.
    data.loc[[1, 2], "c"] = None
    assert lmmax.fit(problem.formula, data).nobs == fit.nobs


# --- fitting again, and prediction ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["nested", "crossed_slopes"])
def test_refit(kind: str) -> None:
    _, fit = fitted(kind, 0, True)
    problem = simulate(kind, 0)
    other = fit.resid.to_numpy()[::-1] + problem.model.y
    again = fit.refit(other)
    fresh = lmmax.fit(problem.formula, problem.data.assign(y=other))
    assert_same_fit(again, fresh)
    assert_close(again.cov_re, fresh.cov_re, 1e-6)
    assert_same_fit(fit.refit(problem.model.y), fit)


@pytest.mark.parametrize("kind", ["nested", "crossed_slopes"])
def test_refit_ml(kind: str) -> None:
    _, reml = fitted(kind, 0, True)
    _, ml = fitted(kind, 0, False)
    again = reml.refit_ml()
    assert not again.reml
    assert_same_fit(again, ml)
    assert abs(ml.deviance - reml.deviance) > 1e-3
    assert again.refit_ml() is again


def test_new_rows() -> None:
    """A known level adds its effects, an unknown one nothing, each factor on its own."""
    problem, fit = fitted("crossed_slopes", 0, True)
    a, b = fit.random_effects["a"], fit.random_effects["b"]
    new = pd.DataFrame(
        {
            "x": [0.5, 0.5, -1.0, 2.0],
            "z": [1.5, -0.5, 1.0, 0.0],
            "a": ["a02", "a02", "new", "new"],
            "b": ["b03", "new", "b03", "new"],
        }
    )
    fixed = fit.params.iloc[0] + fit.params.iloc[1] * new["x"]
    ours = a.loc["a02"].to_numpy() @ np.vstack([np.ones(4), new["x"]])
    theirs = b.loc["b03"].to_numpy() @ np.vstack([np.ones(4), new["z"]])
    expected = fixed + ours * [1, 1, 0, 0] + theirs * [1, 0, 1, 0]
    assert_close(fit.predict(new, new_levels="population"), expected, 1e-12)
    assert_close(fit.predict(new, random_effects=False), fixed, 1e-12)
    assert_close(fit.predict(problem.data), fit.fittedvalues, 1e-12)
    with pytest.raises(lmmax.DataError, match="new"):
        fit.predict(new)


def test_new_combinations_of_known_levels() -> None:
    """A cell that was not seen adds nothing; its outer level still does."""
    problem, fit = fitted("nested", 0, True)
    seen = set(problem.data["a"] + ":" + problem.data["b"])
    outer = next(a for a in sorted(set(problem.data["a"])) if f"{a}:b03" not in seen)
    new = pd.DataFrame({"x": [0.0], "a": [outer], "b": ["b03"]})
    expected = fit.params.iloc[0] + fit.random_effects["a"].loc[outer].iloc[0]
    assert fit.predict(new, new_levels="population").iloc[0] == pytest.approx(expected, rel=1e-12)


# --- boundaries and labels ------------------------------------------------------------------


@pytest.mark.parametrize("reml", [True, False])
def test_singular_term(reml: bool) -> None:
    """Means of b that differ by less than chance: a variance of zero, the rest as without b."""
    problem = simulate("crossed", 1)
    data = problem.data.copy()
    data[["y", "x"]] -= data.groupby("b")[["y", "x"]].transform("mean")
    fit = lmmax.fit(problem.formula, data, reml=reml)
    assert fit.converged
    assert fit.singular
    assert "(1 | b)" in fit.message
    assert "(1 | a)" not in fit.message
    without = lmmax.fit("y ~ x + (1 | a)", data, reml=reml)
    assert fit.deviance == pytest.approx(without.deviance, rel=1e-9)
    assert fit.scale == pytest.approx(without.scale, rel=1e-6)
    cov = np.diag(fit.cov_re)
    assert cov[0] == pytest.approx(without.cov_re.iloc[0, 0], rel=1e-6)
    assert 0.0 <= cov[1] <= 1e-8 * fit.scale
    assert_close(fit.params, without.params, 1e-6)
    assert np.max(np.abs(fit.random_effects["b"].to_numpy())) < 1e-6 * np.std(data["y"])
    table = fit.varcorr()
    assert np.isnan(table.loc[table["group"] == "b", "vcov_se"]).all()
    assert table["vcov_se"].iloc[0] == pytest.approx(without.varcorr()["vcov_se"].iloc[0], rel=1e-5)


def test_labels() -> None:
    problem, fit = fitted("crossed_slopes", 0, True)
    names = [("a", "Intercept"), ("a", "x"), ("b", "Intercept"), ("b", "z")]
    assert list(fit.cov_re.index) == list(fit.cov_re.columns) == names
    table = fit.varcorr()
    assert list(table["group"]) == ["a"] * 3 + ["b"] * 3 + ["Residual"]
    assert np.all(fit.cov_re.loc["a", "b"].to_numpy() == 0.0)
    correlation = table["sdcor"][[name is not None for name in table["var2"]]]
    cov = fit.cov_re.to_numpy()
    expected = [cov[i + 1, i] / np.sqrt(cov[i, i] * cov[i + 1, i + 1]) for i in (0, 2)]
    np.testing.assert_allclose(correlation, expected, rtol=1e-12)
    assert fit.n_params == 2 + 6 + 1
    text = str(fit.summary())
    for group in ("a", "b"):
        assert str(len(problem.levels[group])) in text


def test_nested_names() -> None:
    _, fit = fitted("nested_three", 0, True)
    assert list(fit.random_effects) == ["a", "a:b", "a:b:c"]
    assert list(fit.varcorr()["group"]) == ["a", "a:b", "a:b:c", "Residual"]
    assert "a02:b01:c01" in fit.random_effects["a:b:c"].index
