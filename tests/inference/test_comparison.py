"""Likelihood-ratio tests: nested fits, random terms, single terms left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.inference.anova import anova
from lmmax.inference.comparison import ComparisonError, drop1, ranova
from lmmax.inference.nesting import RandomNesting, random_nesting
from tests.reference import load_data, load_record, load_records
from tests.test_reference import fit_record

pytestmark = pytest.mark.unoptimised

CHAINS = [r["id"] for r in load_records(kinds=("lrt",))]
RANDOM = [r["id"] for r in load_records(kinds=("lmm",)) if "ranova" in r["results"]]
# Criteria agree to 1e-8 relative, so their differences to 1e-8 of the criteria.
CRITERION = 1e-8

# ranova of lmerTest 3.1-3 for models that the stored records lack: term, npar, log-likelihood.
LMERTEST = {
    ("machines", "score ~ Machine + (0 + Machine | Worker)", True, None): [
        ("<none>", 10, -104.155609158),
        ("Machine in (0 + Machine | Worker)", 5, -143.439100989),
    ],
    ("syn_fourdim", "y ~ x1 + x2 + x3 + (x1 + x2 + x3 | g)", True, None): [
        ("<none>", 15, -1068.51628236),
        ("x1 in (x1 + x2 + x3 | g)", 11, -1078.46019718),
        ("x2 in (x1 + x2 + x3 | g)", 11, -1184.76960332),
        ("x3 in (x1 + x2 + x3 | g)", 11, -1141.02305633),
    ],
    ("syn_weights", "y ~ x + cl + (1 | g)", True, "w"): [
        ("<none>", 6, -661.014058198),
        ("(1 | g)", 5, -684.326034008),
    ],
    ("syn_weights", "y ~ x + cl + (1 | g)", False, "w"): [
        ("<none>", 6, -660.696824425),
        ("(1 | g)", 5, -683.580873525),
    ],
}


@pytest.fixture(scope="module")
def fit() -> Callable[..., lmmax.Fit]:
    """Fits of reference data, each made once."""
    made: dict[Any, lmmax.Fit] = {}

    def make(name: str, formula: str, reml: bool = True, **options: Any) -> lmmax.Fit:
        key = (name, formula, reml, str(options))
        if key not in made:
            made[key] = lmmax.fit(formula, load_data(name), reml=reml, **options)
        return made[key]

    return make


def sleep(fit: Callable[..., lmmax.Fit], *terms: str, **options: Any) -> list[lmmax.Fit]:
    return [fit("sleepstudy", f"Reaction ~ {term}", **options) for term in terms]


# --- several fits ---------------------------------------------------------------------------------


def test_there_are_as_many_records_as_expected() -> None:
    assert len(CHAINS) == 7
    assert len(RANDOM) >= 16


@pytest.mark.parametrize("name", CHAINS)
def test_chain_of_records(fit: Callable[..., lmmax.Fit], name: str) -> None:
    record = load_record(name)
    stored = record["results"]
    fits = [
        fit(record["dataset"], text.replace("^", "**"), reml=record["reml"])
        for text in record["formulas"]
    ]
    result = anova(*reversed(fits))
    table = result.table
    assert table["npar"].to_list() == stored["npar"]
    size = CRITERION * max(stored["deviance"])
    for ours, theirs in (
        ("AIC", "AIC"),
        ("BIC", "BIC"),
        ("llf", "logLik"),
        ("deviance", "deviance"),
    ):
        np.testing.assert_allclose(table[ours], stored[theirs], rtol=0.0, atol=size)
    np.testing.assert_allclose(table["chisq"][1:], stored["chisq"][1:], rtol=0.0, atol=2 * size)
    assert table["df"][1:].to_list() == stored["df"][1:]
    np.testing.assert_allclose(table["p"][1:], np.array(stored["p"][1:]), rtol=1e-4)
    assert not any("Fitted again" in note for note in result.notes)


def test_reml_fits_with_different_means_are_fitted_again(fit: Callable[..., lmmax.Fit]) -> None:
    stored = load_record("cake_lrt_fixed")
    fits = [fit("cake", text) for text in stored["formulas"]]
    result = anova(*fits)
    assert result.heading.startswith("Likelihood-ratio tests of nested models, maximum likelihood")
    assert result.notes[0].startswith("Fitted again by maximum likelihood")
    np.testing.assert_allclose(
        result.table["llf"], stored["results"]["logLik"], rtol=0.0, atol=1e-5
    )
    with pytest.raises(ComparisonError, match="leave out refit=False"):
        anova(*fits, refit=False)


def test_reml_criteria_depend_on_units_of_the_fixed_effects(fit: Callable[..., lmmax.Fit]) -> None:
    small, large = sleep(fit, "Days + (1 | Subject)", "Days + (1 + Days | Subject)")
    (hours,) = sleep(fit, "I(24 * Days) + (1 | Subject)")
    assert not any("Fitted again" in note for note in anova(small, large).notes)
    mixed = anova(hours, large)
    assert mixed.notes[0].startswith("Fitted again")
    # By maximum likelihood units do not matter.
    again = anova(small.refit_ml(), large.refit_ml())
    np.testing.assert_allclose(mixed.table, again.table, rtol=1e-7)


def test_the_boundary_is_noted_where_a_variance_is_tested(fit: Callable[..., lmmax.Fit]) -> None:
    formulas = load_record("machines_lrt_random")["formulas"]
    fits = [fit("machines", text) for text in formulas]
    # The third model holds the second one in its inside: a common covariance and equal variances.
    (note,) = anova(*fits).notes
    assert note.startswith("Model 2: under the smaller model a variance is zero")


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        ("(1 + Days | Subject)", "(1 + Days | Subject)", RandomNesting.SAME),
        ("(1 | Subject)", "(1 + Days | Subject)", RandomNesting.BOUNDARY),
        ("(1 + Days || Subject)", "(1 + Days | Subject)", RandomNesting.INSIDE),
        ("(1 + Days | Subject)", "(1 + I(Days / 1e5) | Subject)", RandomNesting.INSIDE),
        ("(1 + Days || Subject)", "(1 + I(Days - 5) | Subject)", RandomNesting.INSIDE),
        ("(1 + Days | Subject)", "(1 + I(Days - 5) || Subject)", RandomNesting.NOT_NESTED),
        ("(1 | Subject)", "(0 + Days + I(Days**2) | Subject)", RandomNesting.NOT_NESTED),
        ("(1 + Days | Subject)", "(1 | Subject)", RandomNesting.NOT_NESTED),
    ],
)
def test_nesting_of_linear_covariances(
    fit: Callable[..., lmmax.Fit], small: str, large: str, expected: RandomNesting
) -> None:
    one, other = sleep(fit, f"Days + {small}", f"Days + {large}")
    assert random_nesting(one, other) is expected


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        ("(1 | id)", "homcs(0 + C(t) | id)", RandomNesting.BOUNDARY),
        ("homcs(0 + C(t) | id)", "us(0 + C(t) | id)", RandomNesting.INSIDE),
        ("ar1(0 + C(t) | id)", "us(0 + C(t) | id)", RandomNesting.INSIDE),
        ("homdiag(0 + C(t) | id)", "diag(0 + C(t) | id)", RandomNesting.INSIDE),
        ("homdiag(0 + C(t) | id)", "(1 | id) + (1 | id:t)", RandomNesting.BOUNDARY),
        ("ar1(0 + C(t) | id)", "ar1(0 + C(t) | id) + (1 | id)", RandomNesting.BOUNDARY),
        ("(1 | id)", "ar1(0 + C(t) | id) + (1 | id)", RandomNesting.BOUNDARY),
        ("homdiag(0 + C(t) | id)", "ar1(0 + C(t) | id)", RandomNesting.UNKNOWN),
        (
            "ar1(0 + C(t) | id) + (1 + t || id)",
            "(1 + t | id) + ar1(0 + C(t) | id)",
            RandomNesting.INSIDE,
        ),
        ("ar1(0 + C(t) | id)", "(1 | id) + (1 | id:t)", RandomNesting.NOT_NESTED),
    ],
)
def test_nesting_of_structures(
    fit: Callable[..., lmmax.Fit], small: str, large: str, expected: RandomNesting
) -> None:
    one, other = (fit("syn_reps", f"y ~ t + {term}") for term in (small, large))
    assert random_nesting(one, other) is expected


def test_an_undecided_nesting_is_noted(fit: Callable[..., lmmax.Fit]) -> None:
    fits = [fit("syn_reps", f"y ~ t + {s}(0 + C(t) | id)") for s in ("homdiag", "ar1")]
    (note,) = anova(*fits).notes
    assert "could not be established" in note


def test_related_levels_are_another_factor(fit: Callable[..., lmmax.Fit]) -> None:
    dyestuff = load_data("dyestuff")
    levels = sorted(dyestuff["Batch"].unique())
    m = len(levels)
    K = 0.5 * np.eye(m) + 0.5
    K[0, 1] = K[1, 0] = 0.9
    frame = pd.DataFrame(K, index=levels, columns=levels)
    plain = fit("dyestuff", "Yield ~ 1 + (1 | Batch)")
    related = lmmax.fit("Yield ~ 1 + (1 | Batch)", dyestuff, relmat={"Batch": frame})
    assert random_nesting(plain, related) is RandomNesting.NOT_NESTED
    again = lmmax.fit("Yield ~ 1 + (1 | Batch)", dyestuff, relmat={"Batch": frame.copy()})
    assert random_nesting(related, again) is RandomNesting.SAME


def test_fits_that_cannot_be_compared(fit: Callable[..., lmmax.Fit]) -> None:
    linear, slope = sleep(fit, "Days + (1 | Subject)", "Days + (1 + Days | Subject)")
    (square,) = sleep(fit, "I(Days**2) + (1 + Days || Subject)")
    with pytest.raises(ComparisonError, match=r"not nested: 'Days' of .* compare their aic"):
        anova(linear, square)
    (other,) = sleep(fit, "Days + (0 + Days + I(Days**2) | Subject)")
    with pytest.raises(ComparisonError, match="no covariances of the random effects"):
        anova(linear, other)
    (alone,) = sleep(fit, "Days + (0 + Days | Subject)")
    with pytest.raises(ComparisonError, match="the same number of parameters, 4"):
        anova(linear, alone)
    with pytest.raises(ComparisonError, match=r"some fits are by REML, .* fit.refit_ml"):
        anova(linear, slope.refit_ml())
    with pytest.raises(ComparisonError, match=r"different weights"):
        anova(linear, *sleep(fit, "Days + (1 + Days | Subject)", weights="w"))
    with pytest.raises(ComparisonError, match=r"different offset"):
        anova(linear, *sleep(fit, "Days + (1 + Days | Subject)", offset="off"))
    logs = fit("sleepstudy", "np.log(Reaction) ~ Days + (1 + Days | Subject)")
    with pytest.raises(ComparisonError, match=r"different responses, 'Reaction' and 'np.log"):
        anova(linear, logs)
    y = linear.design.y[::-1]
    with pytest.raises(ComparisonError, match="rows in another order"):
        anova(linear.refit(y), slope)
    pigs = [fit("dietox", f"Weight ~ Time{x} + (1 | Pig)") for x in ("", " + Feed")]
    with pytest.raises(ComparisonError, match=r"used 861, .* 789\. Rows with a missing value"):
        anova(*pigs)
    with pytest.raises(TypeError, match="argument 2 must be a fit"):
        anova(linear, "Days")  # type: ignore[arg-type]


def test_unit_weights_are_no_weights(fit: Callable[..., lmmax.Fit]) -> None:
    small, large = sleep(fit, "Days + (1 | Subject)", "Days + (1 + Days | Subject)")
    ones = np.ones(180)
    weighted = fit("sleepstudy", large.formula, weights=ones)
    np.testing.assert_allclose(anova(small, weighted).table, anova(small, large).table, rtol=1e-7)


def test_a_solve_that_stopped_early_is_noted() -> None:
    with pytest.warns(lmmax.ConvergenceWarning):
        fit = lmmax.fit(
            "Reaction ~ Days + (1 + Days | Subject)", load_data("sleepstudy"), max_steps=1
        )
    notes = ranova(fit).notes
    assert any(note.startswith("Did not converge: <none>") for note in notes)


# --- random terms ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    # Each of their reduced models is compiled for itself.
    [pytest.param(r, marks=[pytest.mark.slow] if "nested" in r else []) for r in RANDOM],
)
def test_random_terms_of_records(name: str) -> None:
    record = load_record(name)
    stored = record["results"]["ranova"]
    fit = fit_record(record)
    table = ranova(fit).table
    order = [_row(label, list(table.index)) for label in stored["term"]]
    assert sorted(order) == list(range(len(table)))
    table = table.iloc[order]
    assert table["npar"].to_list() == stored["npar"]
    size = CRITERION * fit.deviance
    np.testing.assert_allclose(table["llf"], stored["logLik"], rtol=0.0, atol=size)
    np.testing.assert_allclose(table["AIC"], stored["AIC"], rtol=0.0, atol=2 * size)
    np.testing.assert_allclose(table["chisq"][1:], stored["LRT"][1:], rtol=0.0, atol=4 * size)
    assert table["df"][1:].to_list() == stored["df"][1:]
    np.testing.assert_allclose(table["p"][1:], stored["p"][1:], rtol=1e-4)


def _row(label: str, known: list[str]) -> int:
    """Our row for lmerTest's label.

    It takes a ``||`` term apart and turns nested factors round; of a slope without an intercept it
    leaves out the slope, which is the whole term.
    """
    for name in (label, label.split(" in ")[-1], label.replace("d:a", "a:d")):
        if name in known:
            return known.index(name)
    raise AssertionError(f"{label!r} is not among {known}")


@pytest.mark.parametrize("case", LMERTEST)
def test_random_terms_of_other_models(fit: Callable[..., lmmax.Fit], case: Any) -> None:
    name, formula, reml, weights = case
    table = ranova(fit(name, formula, reml, weights=weights)).table
    assert table.index.to_list() == [term for term, _, _ in LMERTEST[case]]
    for (_, npar, llf), (_, row) in zip(LMERTEST[case], table.iterrows(), strict=True):
        assert row["npar"] == npar
        assert row["llf"] == pytest.approx(llf, abs=2e-8 * abs(llf))


def test_an_offset_belongs_to_the_model_without_random_terms(
    fit: Callable[..., lmmax.Fit],
) -> None:
    data = load_data("sleepstudy")
    with_offset = lmmax.fit("Reaction ~ Days + (1 | Subject)", data, offset="off")
    data["Reaction"] -= data["off"]
    moved = lmmax.fit("Reaction ~ Days + (1 | Subject)", data)
    np.testing.assert_allclose(ranova(with_offset).table, ranova(moved).table, rtol=1e-9)


def test_mixtures(fit: Callable[..., lmmax.Fit]) -> None:
    one, two = sleep(fit, "Days + (1 | Subject)", "Days + (1 + Days | Subject)")
    row = ranova(one, mixture=True).table.iloc[1]
    assert row["p"] == pytest.approx(0.5 * math.erfc(math.sqrt(row["chisq"] / 2)), rel=1e-10)
    # Half and half of one and two degrees of freedom.
    row = ranova(two, mixture=True).table.iloc[1]
    x = row["chisq"]
    expected = 0.5 * math.erfc(math.sqrt(x / 2)) + 0.5 * math.exp(-x / 2)
    assert row["p"] == pytest.approx(expected, rel=1e-10)
    plain = ranova(two)
    assert plain.table["p"].iloc[1] == pytest.approx(math.exp(-x / 2), rel=1e-10)
    assert "mixture=True" in plain.notes[0]
    # Where the variance is estimated as zero there is no evidence for it.
    zero = ranova(fit("dyestuff2", "Yield ~ 1 + (1 | Batch)"), mixture=True).table.iloc[1]
    assert zero["chisq"] == pytest.approx(0.0, abs=1e-9)
    assert zero["p"] == pytest.approx(1.0, abs=1e-4)


def test_rows_without_a_known_mixture_keep_the_plain_p(fit: Callable[..., lmmax.Fit]) -> None:
    machines = fit("machines", "score ~ Machine + (0 + Machine | Worker)")
    mixed, plain = ranova(machines, mixture=True), ranova(machines)
    assert mixed.table["p"].iloc[1] == plain.table["p"].iloc[1]
    assert any("Machine in (0 + Machine | Worker)" in note for note in mixed.notes)


def test_terms_with_a_structure_are_left_out_whole(fit: Callable[..., lmmax.Fit]) -> None:
    both = fit("syn_reps", "y ~ t + ar1(0 + C(t) | id) + (1 | id)")
    table = ranova(both).table
    assert table.index.to_list() == ["<none>", "ar1(0 + C(t) | id)", "(1 | id)"]
    assert table["df"][1:].to_list() == [2, 1]
    alone = fit("syn_reps", "y ~ t + (1 | id)")
    assert table["llf"].iloc[1] == pytest.approx(alone.llf, rel=1e-8)


def test_effects_are_left_out_as_a_formula_would(fit: Callable[..., lmmax.Fit]) -> None:
    whole = fit("cake", "angle ~ temp + (1 + recipe + temp | replicate)", False)
    table = ranova(whole).table
    for left, label in (("temp", "recipe"), ("recipe", "temp")):
        smaller = fit("cake", f"angle ~ temp + (1 + {left} | replicate)", False)
        row = table.loc[f"{label} in (1 + recipe + temp | replicate)"]
        assert row["npar"] == smaller.n_params
        assert row["llf"] == pytest.approx(smaller.llf, rel=1e-7)


def test_held_covariances_cannot_be_tested() -> None:
    fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", load_data("dyestuff"), fix={"cov_re": [[1764.0]]})
    with pytest.raises(ComparisonError, match="held fixed"):
        ranova(fit)


def test_a_held_scale_is_held_without_random_terms() -> None:
    # Without random terms: n (log(2 pi s) + (y - Xb)'(y - Xb) / (n s)).
    data = load_data("dyestuff")
    y = data["Yield"].to_numpy()
    fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", data, reml=False, fix={"scale": 2500.0})
    row = ranova(fit).table.iloc[1]
    criterion = len(y) * math.log(2 * math.pi * 2500.0) + np.sum((y - y.mean()) ** 2) / 2500.0
    assert row["llf"] == pytest.approx(-0.5 * criterion, rel=1e-12)
    assert row["npar"] == 1


# --- single terms left out ------------------------------------------------------------------------


def test_single_terms_by_likelihood_ratios(fit: Callable[..., lmmax.Fit]) -> None:
    # lme4 1.1-31, drop1(test = "Chisq").
    pigs = fit("dietox", "Weight ~ Cu * Time + Evit + (1 + Time | Pig)")
    result = drop1(pigs, test="chisq")
    table = result.table
    assert table.index.to_list() == ["<none>", "Evit", "Cu:Time"]
    assert result.notes[0].startswith("Fitted by maximum likelihood")
    aic = [4451.12345341, 4448.57170889, 4447.53756179]
    np.testing.assert_allclose(table["AIC"], aic, rtol=1e-8)
    np.testing.assert_allclose(table["chisq"][1:], [1.448255479012, 0.414108383292], atol=1e-5)
    assert table["df"][1:].to_list() == [2, 2]
    np.testing.assert_allclose(table["p"][1:], np.exp(-table["chisq"][1:] / 2), rtol=1e-12)


def test_single_terms_by_F(fit: Callable[..., lmmax.Fit]) -> None:
    # lmerTest 3.1-3, drop1.
    pigs = fit("dietox", "Weight ~ Cu * Time + Evit + (1 + Time | Pig)")
    table = drop1(pigs).table
    for label, df_num, df_den, F in (
        ("Evit", 2, 67.03781568, 0.6937362666),
        ("Cu:Time", 2, 69.05657416, 0.1989389581),
    ):
        row = table.loc[label]
        assert row["df_num"] == df_num
        assert row["df_den"] == pytest.approx(df_den, rel=1e-4)
        assert row["F"] == pytest.approx(F, rel=2e-5)
    kenward = drop1(pigs, ddf="kenward-roger").table
    same = anova(pigs, type="II", ddf="kenward-roger").table
    np.testing.assert_allclose(kenward, same.loc[kenward.index], rtol=1e-9)


def test_the_rest_is_coded_as_a_formula_without_the_term(fit: Callable[..., lmmax.Fit]) -> None:
    # Without an intercept Cu has a column for each level, and Evit would have if Cu were not there.
    pigs = fit("dietox", "Weight ~ 0 + Cu + Evit + Time + (1 | Pig)", False)
    table = drop1(pigs, test="chisq").table
    for label, rest in (("Cu", "Evit + Time"), ("Evit", "Cu + Time"), ("Time", "Cu + Evit")):
        smaller = fit("dietox", f"Weight ~ 0 + {rest} + (1 | Pig)", False)
        assert table.loc[label, "npar"] == smaller.n_params
        assert table.loc[label, "llf"] == pytest.approx(smaller.llf, rel=1e-8)
    assert drop1(pigs).table["df_num"].to_list() == [2, 2, 1]


def test_terms_that_others_hold_cannot_be_left_out() -> None:
    fit = fit_record(load_record("syn_rankdef_exact_ml"))
    for test in ("F", "chisq"):
        result = drop1(fit, test=test)  # type: ignore[arg-type]
        statistic = result.table["F" if test == "F" else "chisq"]
        # x3 = x1 + 2 x2, and the levels of h are levels of f merged.
        assert statistic[["x1", "x2", "x3", "h"]].isna().all()
        assert statistic["f"] > 0.0
        assert any("x1, x2, x3, h" in note for note in result.notes)
    assert result.table.loc["f", "df"] == 2


def test_the_last_term_may_go(fit: Callable[..., lmmax.Fit]) -> None:
    (only,) = sleep(fit, "0 + Days + (1 + Days | Subject)", reml=False)
    (none,) = sleep(fit, "0 + (1 + Days | Subject)", reml=False)
    row = drop1(only, test="chisq").table.loc["Days"]
    assert row["llf"] == pytest.approx(none.llf, rel=1e-9)


def test_options_of_single_terms(dietox_intercept: lmmax.Fit) -> None:
    with pytest.raises(ValueError, match="test='LRT' is unknown"):
        drop1(dietox_intercept, test="LRT")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ddf is for F tests"):
        drop1(dietox_intercept, test="chisq", ddf="residual")
    with pytest.raises(TypeError, match="fit must be a fit"):
        ranova("Weight ~ Time")  # type: ignore[arg-type]
