"""Analysis of variance: types I, II and III against lmerTest and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.inference.anova import anova
from tests.reference import load_data, load_record, load_records
from tests.test_reference import fit_record

RECORDS = [r["id"] for r in load_records(kinds=("lmm",)) if r["results"].get("anova")]
DDF = {"satterthwaite": "satterthwaite", "kenward_roger": "kenward-roger"}
# F, degrees of freedom, and log p relative to 1 + |log p|.  lmerTest differentiates numerically for
# Satterthwaite's degrees of freedom, and rounds the hypotheses of type III to seven digits.
TOLERANCES = {"satterthwaite": (1e-7, 1e-4, 1e-4), "kenward_roger": (1e-7, 1e-8, 1e-6)}

# lmerTest 3.1-3: term, numerator and denominator degrees of freedom, F.  Cakes without the recipe C
# at 225 degrees, cakes without the recipe A at 175 degrees (both first levels), and
# "Weight ~ Cu*Evit*Time + (1 | Pig)" of all pigs, whose treatments differ in size.
LMERTEST = {
    ("empty", "I"): [
        ("recipe", 2, 41.94004587, 0.4889322672),
        ("temperature", 5, 195.9380147, 18.7707708),
        ("recipe:temperature", 9, 195.9380147, 1.058007788),
    ],
    ("empty", "II"): [
        ("recipe", 2, 42.14626896, 0.3175949739),
        ("temperature", 5, 195.9380147, 18.7707708),
        ("recipe:temperature", 9, 195.9380147, 1.058007788),
    ],
    ("empty", "III"): [
        ("recipe", 2, 42.14555679, 0.3175949904),
        ("temperature", 5, 195.9380147, 18.77077133),
        ("recipe:temperature", 9, 195.9380147, 1.058007788),
    ],
    ("reference empty", "I"): [
        ("recipe", 2, 42.15538412, 0.5821969084),
        ("temperature", 5, 196.1528224, 17.30330946),
        ("recipe:temperature", 9, 196.1528224, 1.087747567),
    ],
    ("reference empty", "II"): [
        ("recipe", 2, 42.3703638, 0.2318167384),
        ("temperature", 5, 196.1528224, 17.30330946),
        ("recipe:temperature", 9, 196.1528224, 1.087747567),
    ],
    ("reference empty", "III"): [
        ("recipe", 2, 42.36687852, 0.2318167351),
        ("temperature", 5, 196.1528224, 17.30330977),
        ("recipe:temperature", 9, 196.1528224, 1.087747567),
    ],
    ("three-way", "I"): [
        ("Cu", 2, 63.00360408, 0.9466866907),
        ("Evit", 2, 63.00282505, 1.308775818),
        ("Time", 1, 781.4800408, 43748.26252),
        ("Cu:Evit", 4, 63.00321409, 0.1201029515),
        ("Cu:Time", 2, 780.0312368, 1.321979342),
        ("Evit:Time", 2, 780.0293137, 6.58616302),
        ("Cu:Evit:Time", 4, 780.0304465, 0.5504474491),
    ],
    ("three-way", "II"): [
        ("Cu", 2, 73.12553716, 0.5563571304),
        ("Evit", 2, 73.12263917, 0.2834708394),
        ("Time", 1, 780.0298332, 43785.91503),
        ("Cu:Evit", 4, 73.12424779, 0.05805758517),
        ("Cu:Time", 2, 780.0310161, 1.202284684),
        ("Evit:Time", 2, 780.0293137, 6.58616302),
        ("Cu:Evit:Time", 4, 780.0304473, 0.5504474491),
    ],
    ("three-way", "III"): [
        ("Cu", 2, 73.1236994, 0.5551497001),
        ("Evit", 2, 73.12469967, 0.2812458005),
        ("Time", 1, 780.0307034, 43695.15038),
        ("Cu:Evit", 4, 73.12424779, 0.05805758517),
        ("Cu:Time", 2, 780.0302605, 1.197151766),
        ("Evit:Time", 2, 780.0308395, 6.54363939),
        ("Cu:Evit:Time", 4, 780.0304473, 0.5504474491),
    ],
}
CAKE = "angle ~ recipe * temperature + (1 | recipe:replicate)"
PIGS = "Weight ~ Cu * Evit * Time + (1 | Pig)"


def test_there_are_as_many_records_as_expected() -> None:
    assert len(RECORDS) >= 100


@pytest.mark.parametrize("name", RECORDS)
def test_record(name: str) -> None:
    record = load_record(name)
    fit = fit_record(record)
    for key, stored in record["results"]["anova"].items():
        _, kind, method = key.split("_", 2)
        table = anova(fit, type=kind, ddf=DDF[method]).table
        # lmerTest puts terms without an estimable effect last.
        testable = np.array([F is not None for F in stored["F"]])
        lost = table[table["df_num"] == 0]
        assert set(lost.index) == set(np.array(stored["term"])[~testable])
        assert lost["F"].isna().all()
        table = table[table["df_num"] > 0]
        want = {field: np.array(values)[testable] for field, values in stored.items()}
        if not record["contrasts"]:
            plain = [term for term in want["term"] if term.replace(":", "").isidentifier()]
            assert [term for term in table.index if term in plain] == plain
        assert table["df_num"].to_list() == want["num_df"].tolist()
        rel_F, rel_df, rel_p = TOLERANCES[method]
        close(table["F"], want["F"], rel_F)
        close(table["sum_sq"], want["sum_sq"], rel_F)
        close(table["mean_sq"], want["mean_sq"], rel_F)
        close(table["df_den"], want["den_df"], rel_df)
        tiny = want["p"].astype(float) < 1e-290
        assert np.all(table["p"][tiny] < 1e-280)
        logs = np.log(want["p"][~tiny].astype(float))
        gap = np.abs(np.log(table["p"][~tiny]) - logs)
        assert np.all(gap <= rel_p * (1.0 + np.abs(logs)))


def close(ours: Any, stored: Any, rel: float) -> None:
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(stored, float), rtol=rel)


@pytest.fixture(scope="module")
def fits() -> dict[str, lmmax.Fit]:
    cake = load_data("cake")
    c, a = cake["recipe"] == "C", cake["recipe"] == "A"
    with pytest.warns(lmmax.RankWarning):
        empty = lmmax.fit(CAKE, cake[~(c & (cake["temperature"] == "225"))])
    with pytest.warns(lmmax.RankWarning):
        first = lmmax.fit(CAKE, cake[~(a & (cake["temperature"] == "175"))])
    return {
        "empty": empty,
        "reference empty": first,
        "three-way": lmmax.fit(PIGS, load_data("dietox")),
    }


@pytest.mark.parametrize(("name", "kind"), LMERTEST)
def test_empty_cells_and_higher_interactions(
    fits: dict[str, lmmax.Fit], name: str, kind: Any
) -> None:
    # The optimiser of lme4 stops within 1e-6 of the optimum.
    table = anova(fits[name], type=kind).table
    for term, df_num, df_den, F in LMERTEST[name, kind]:
        row = table.loc[term]
        assert row["df_num"] == df_num
        assert row["df_den"] == pytest.approx(df_den, rel=1e-4)
        assert row["F"] == pytest.approx(F, rel=2e-5)


def test_degrees_of_freedom_of_cake() -> None:
    # lmerTest, which differentiates numerically: good to eight digits.
    fit = lmmax.fit("angle ~ recipe * temp + (1 | recipe:replicate)", load_data("cake"))
    close(anova(fit).table["df_den"], [254.0157612, 222.0, 222.0], 1e-7)


def test_a_note_names_the_empty_cells(fits: dict[str, lmmax.Fit]) -> None:
    (note,) = anova(fits["reference empty"]).notes
    assert "No data in recipe[A]:temperature[175]." in note
    assert anova(fits["reference empty"], type="II").notes == ()
    assert anova(fits["three-way"]).notes == ()


def test_type_three_does_not_depend_on_contrasts(fits: dict[str, lmmax.Fit]) -> None:
    base = anova(fits["three-way"]).table
    for contrasts in ({"Cu": "sum", "Evit": "helmert"}, {"Cu": "SAS", "Evit": "poly"}):
        fit = lmmax.fit(PIGS, load_data("dietox"), contrasts=contrasts)
        table = anova(fit).table
        for column in ("df_num", "df_den", "F", "p"):
            close(table[column], base[column], 1e-7)


def test_type_three_does_not_depend_on_how_cells_are_written() -> None:
    # f * h and f + f:h hold the same cells, so the main effect of f is the same.
    pigs = load_data("dietox")
    crossed = lmmax.fit("Weight ~ Cu * Evit + Time + (1 | Pig)", pigs)
    nested = lmmax.fit("Weight ~ Cu + Cu:Evit + Time + (1 | Pig)", pigs)
    close(anova(nested).table.loc["Cu"], anova(crossed).table.loc["Cu"], 1e-8)


def test_terms_are_tested_alike_without_an_intercept() -> None:
    rng = np.random.default_rng(0)
    n = 60
    data = pd.DataFrame(
        {
            name: rng.choice(list(v), n)
            for name, v in {"f": "abc", "h": "pqr", "g": "ABCDEF"}.items()
        }
    )
    data["y"] = rng.normal(size=n) + (data["f"] == "b") * 0.5 + 2.0 + (data["h"] == "q")
    base = anova(lmmax.fit("y ~ f + h + (1 | g)", data)).table.loc[["f", "h"]]
    assert base["df_num"].to_list() == [2, 2]
    cases = [("0 + f + h", None), ("0 + h + f", {"f": "sum", "h": "poly"})]
    for formula, contrasts in cases:
        fit = lmmax.fit(f"y ~ {formula} + (1 | g)", data, contrasts=contrasts)
        for kind in (2, 3):
            found = anova(fit, type=kind)
            close(found.table.loc[["f", "h"]], base, 1e-6)
            (note,) = found.notes
            first = formula.split(" + ")[1]
            assert note.startswith(f"Estimable functions, as in SAS: {first}. lmerTest tests all")
        assert anova(fit, type=1).table["df_num"].to_list() == [3, 2]
        assert anova(fit, type=1).notes == ()
        # Leaving out a term is leaving out what it adds to the others.
        assert lmmax.drop1(fit).table["df_num"].to_list() == [2, 2]


def test_terms_that_hold_each_other_have_no_test() -> None:
    rng = np.random.default_rng(3)
    data = pd.DataFrame({"x": rng.normal(size=40), "g": np.arange(40) % 6})
    data["z"], data["y"] = 1e-9 * (2.0 * data["x"] + 1.0), rng.normal(size=40)
    with pytest.warns(lmmax.RankWarning):
        fit = lmmax.fit("y ~ x + z + (1 | g)", data)
    assert anova(fit, type=1).table["df_num"].to_list() == [1, 0]
    found = anova(fit)
    assert found.table["df_num"].to_list() == [0, 0]
    assert found.notes[0] == "Not estimable, because the other terms hold all of it: x, z."
    assert lmmax.drop1(fit).table["df_num"].to_list() == [0, 0]
    assert lmmax.drop1(fit, test="chisq").table["df"].to_list()[1:] == [0, 0]


def test_balanced_blocks_are_the_classical_analysis() -> None:
    # Randomised blocks: F is the mean square of types over that of types by subjects.
    stool = load_data("ergostool")
    cells = stool.pivot(index="Subject", columns="Type", values="effort").to_numpy()
    m, k = cells.shape
    means = cells.mean(axis=0)
    left = cells - means - cells.mean(axis=1, keepdims=True) + cells.mean()
    residual = np.sum(left**2) / ((m - 1) * (k - 1))
    square = m * np.sum((means - cells.mean()) ** 2) / (k - 1)
    fit = lmmax.fit("effort ~ Type + (1 | Subject)", stool)
    for kind in (1, 2, 3):
        for ddf in ("satterthwaite", "kenward-roger", "between-within"):
            row = anova(fit, type=kind, ddf=ddf).table.loc["Type"]
            assert row["F"] == pytest.approx(square / residual, rel=1e-9)
            assert row["df_den"] == pytest.approx((m - 1) * (k - 1), rel=1e-7)
            assert row["sum_sq"] == pytest.approx((k - 1) * square, rel=1e-7)


def test_chi_square_tests(dietox_slope: lmmax.Fit) -> None:
    row = anova(dietox_slope, test="chisq").table.loc["Time"]
    z = dietox_slope.params["Time"] / np.sqrt(dietox_slope.cov_params().loc["Time", "Time"])
    assert row["chisq"] == pytest.approx(z**2, rel=1e-12)
    fit = lmmax.fit("angle ~ recipe + (1 | recipe:replicate)", load_data("cake"))
    row = anova(fit, test="chisq").table.loc["recipe"]
    assert row["df"] == 2
    assert row["p"] == pytest.approx(math.exp(-row["chisq"] / 2), rel=1e-12)
    assert row["chisq"] == pytest.approx(2 * anova(fit).table.loc["recipe", "F"], rel=1e-12)


def test_arrays_have_a_term_for_each_column(sleepstudy_slope: lmmax.Fit) -> None:
    sleep = load_data("sleepstudy")
    days = sleep["Days"].to_numpy()
    X = np.column_stack([np.ones(len(sleep)), days, days**2])
    fit = lmmax.fit_arrays(sleep["Reaction"], X, sleep["Subject"], X[:, :2])
    t = fit.params / np.sqrt(np.diag(fit.cov_params()))
    for kind in ("II", "III"):
        table = anova(fit, type=kind).table
        assert table.index.to_list() == ["x2", "x3"]
        close(table["F"], t[1:] ** 2, 1e-9)
    # By their order, x2 alone is what it is without x3 in terms of the same covariance.
    by_formula = lmmax.fit("Reaction ~ Days + I(Days**2) + (1 + Days | Subject)", sleep)
    close(anova(fit, type="I").table, anova(by_formula, type="I").table, 1e-6)


def test_contrasts_that_do_not_tell_all_levels_apart_are_numbers() -> None:
    cake = load_data("cake")
    linear = np.array([-5.0, -3.0, -1.0, 1.0, 3.0, 5.0])[:, None]
    fit = lmmax.fit(
        "angle ~ recipe * temperature + (1 | recipe:replicate)",
        cake,
        contrasts={"temperature": linear},
    )
    same = lmmax.fit("angle ~ recipe * temp + (1 | recipe:replicate)", cake)
    assert len(fit.params) == 6
    table = anova(fit).table
    assert table["df_num"].to_list() == [2, 1, 2]
    # The slopes by recipe are the same in any unit of temperature.
    close(table.loc["recipe:temperature"], anova(same).table.loc["recipe:temp"], 1e-8)
    close(table.loc["temperature"], anova(same).table.loc["temp"], 1e-8)


def test_a_model_of_the_mean_only_has_an_empty_table() -> None:
    fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", load_data("dyestuff"))
    table = anova(fit).table
    assert len(table) == 0
    assert list(table) == ["sum_sq", "mean_sq", "df_num", "df_den", "F", "p"]
    assert "Yield" in str(anova(fit))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "IV"}, "type='IV' is unknown; use 'I', 'II' or 'III'"),
        ({"test": "t"}, "test='t' is unknown"),
        ({"test": "chisq", "ddf": "kenward-roger"}, "ddf='kenward-roger' is for F tests"),
        ({"ddf": "containment"}, "ddf='containment' is unknown"),
    ],
)
def test_unknown_options(
    dietox_intercept: lmmax.Fit, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        anova(dietox_intercept, **options)


def test_other_arguments(dietox_intercept: lmmax.Fit, dietox_slope: lmmax.Fit) -> None:
    with pytest.raises(TypeError, match="fit must be a fit"):
        anova("Weight ~ Time")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ddf is for the F tests of one fit"):
        anova(dietox_intercept, dietox_slope, ddf="residual")


def test_the_table_as_text_and_html() -> None:
    pigs = load_data("dietox").rename(columns={"Cu": "a<b"})
    fit = lmmax.fit("Weight ~ `a<b` + Time + (1 | Pig)", pigs)
    result = anova(fit)
    lines = str(result).split("\n")
    assert lines[0] == "Type III analysis of variance, Satterthwaite's degrees of freedom"
    assert lines[1] == "Weight ~ `a<b` + Time + (1 | Pig)"
    assert lines[3].split() == ["sum_sq", "mean_sq", "df_num", "df_den", "F", "p"]
    assert lines[5].endswith("<0.001")
    assert lines[2] == "-" * len(lines[3])
    assert repr(result) == str(result)
    html = result._repr_html_()
    assert "a&lt;b" in html
    assert "a<b" not in html
    assert "&lt;0.001" in html
    assert isinstance(result.table, pd.DataFrame)
