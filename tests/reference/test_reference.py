"""Every stored fit with one grouping factor, reproduced from its formula and data.

Tolerances: criterion 1e-8 relative; fixed effects and their standard errors 1e-6 relative (a
coefficient next to zero: of its standard error); covariances 1e-5 of the largest, each effect
taken in units in which its variance is one where columns have extreme units; random effects
1e-5 of the largest of their column. Two ill-conditioned records, where lme4's cross-products
leave noise of 2e-5 in the criterion, are compared with a well-conditioned form of their model.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

import lmmax
from tests.reference import load_data, load_record, load_records, matrix

RECORDS = {record["id"]: record for record in load_records()}
# Record: the same model in a well-conditioned form.
ILL_CONDITIONED = {
    "syn_rankdef_near_reml": "syn_rankdef_near_equiv_reml",
    "syn_scale_far_reml": "syn_scale_plain_int_reml",
}
# The covariance of effects that never meet in a group does not enter the likelihood.
UNIDENTIFIED = {"orthodont_bysex_reml"}
IDS = [name for name in RECORDS if name not in ILL_CONDITIONED]


def fit_record(record: dict[str, Any], formula: str) -> lmmax.Fit:
    contrasts = {k: v.removeprefix("contr.") for k, v in (record["contrasts"] or {}).items()}
    return lmmax.fit(
        record[formula],
        load_data(record["dataset"]),
        reml=record["reml"],
        weights=record["weights"],
        contrasts=contrasts or None,
    )


@functools.cache
def fitted(name: str) -> lmmax.Fit:
    record = RECORDS[name]
    if record["results"].get("fixef_dropped"):
        with pytest.warns(lmmax.RankWarning):
            return fit_record(record, "formula")
    return fit_record(record, "formula")


def covariance(record: dict[str, Any]) -> np.ndarray:
    """The terms' covariance matrices as one, (q, q)."""
    blocks = [matrix(term["cov"]) for term in record["results"]["varcorr"]]
    q = sum(len(block) for block in blocks)
    out, at = np.zeros((q, q)), 0
    for block in blocks:
        out[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return out


def spread(record: dict[str, Any]) -> float:
    """Standard deviation of the fitted values: the unit of the response."""
    results = record["results"]
    n, fit = results["n"], results["fitted"]
    return math.sqrt(fit["sumsq"] / n - (fit["sum"] / n) ** 2 + results["sigma"] ** 2)


@pytest.mark.parametrize("name", IDS)
def test_criterion(name: str) -> None:
    fit, results = fitted(name), RECORDS[name]["results"]
    assert fit.converged
    assert fit.nobs == results["n"]
    assert fit.deviance == pytest.approx(results["criterion"], rel=1e-8)
    assert fit.llf == pytest.approx(results["logLik"], rel=1e-8)
    assert fit.aic == pytest.approx(results["AIC"], rel=1e-8)
    if "BIC" in results:
        assert fit.bic == pytest.approx(results["BIC"], rel=1e-8)
    if RECORDS[name]["kind"] == "lmm":
        assert fit.singular == ("singular" in RECORDS[name]["tags"])
        assert [fit.n_groups] == list(results["ngroups"].values())


@pytest.mark.parametrize("name", IDS)
def test_fixed_effects(name: str) -> None:
    fit, results = fitted(name), RECORDS[name]["results"]
    expected, se = matrix(results["fixef"]), matrix(results["se"])
    kept = fit.params.notna().to_numpy()
    assert (~kept).sum() == len(results.get("fixef_dropped") or [])
    np.testing.assert_array_less(
        np.abs(fit.params[kept] - expected), 1e-6 * np.maximum(np.abs(expected), se)
    )
    np.testing.assert_allclose(fit.bse[kept], se, rtol=1e-6)
    vcov = fit.cov_params().to_numpy()[np.ix_(kept, kept)]
    np.testing.assert_array_less(np.abs(vcov - matrix(results["vcov"])), 2e-6 * np.outer(se, se))
    if "wald_ci" in results:
        limits = fit.conf_int().to_numpy()[kept]
        expected = matrix(results["wald_ci"])
        assert np.max(np.abs(limits - expected) / se[:, None]) < 1e-5


@pytest.mark.parametrize("name", IDS)
def test_covariance_parameters(name: str) -> None:
    record = RECORDS[name]
    fit, expected = fitted(name), covariance(record)
    assert math.sqrt(fit.scale) == pytest.approx(record["results"]["sigma"], rel=1e-6)
    got = np.asarray(fit.cov_re)
    assert got.shape == expected.shape
    unit = np.sqrt(np.diag(expected))
    if "extreme units" not in record["tags"]:
        unit = np.full(len(unit), unit.max() or record["results"]["sigma"])
    compare = np.ones_like(expected, dtype=bool)
    if name in UNIDENTIFIED:
        compare = np.eye(len(expected), dtype=bool)
    difference = np.abs(got - expected) / np.outer(unit, unit)
    assert difference[compare].max() < 1e-5


@pytest.mark.parametrize("name", IDS)
def test_random_effects(name: str) -> None:
    if name in UNIDENTIFIED:
        pytest.skip("modes of an effect outside its groups depend on an unidentified covariance")
    fit, at = fitted(name), 0
    modes, covariances = fit.random_effects, fit.random_effects_cov
    for block in RECORDS[name]["results"]["ranef"]:
        width = len(block["columns"])
        shown = block["levels"][: block.get("levels_shown", block["n_levels"])]
        rows = modes.index.astype(str).get_indexer(shown)
        assert (rows >= 0).all()
        values = modes.to_numpy()[:, at : at + width]
        expected = matrix(block["values"])
        # A column of zeros (a variance of zero) is measured by its covariance's noise instead.
        size = np.abs(expected).max(axis=0)
        size = np.where(size > 0, size, math.sqrt(fit.scale))
        np.testing.assert_array_less(np.abs(values[rows] - expected) / size, 1e-5)
        np.testing.assert_allclose(
            np.sum(values**2, axis=0), matrix(block["sumsq"]), rtol=1e-5, atol=1e-10 * fit.scale
        )
        if "condvar" in block:
            expected = matrix(block["condvar"])
            got = covariances[np.ix_(rows, range(at, at + width), range(at, at + width))]
            sd = np.sqrt(np.abs(np.einsum("iaa->ia", expected)).max(axis=0))
            sd = np.where(sd > 0, sd, math.sqrt(fit.scale))
            assert np.max(np.abs(got - expected) / np.outer(sd, sd)) < 1e-5
        at += width
    assert at == modes.shape[1]


@pytest.mark.parametrize("name", IDS)
def test_fitted_values_and_predictions(name: str) -> None:
    record, fit = RECORDS[name], fitted(name)
    results = record["results"]
    unit = spread(record)
    # The first rows of a record are those of the data, missing ones left out.
    for key, values in {
        "fitted": fit.fittedvalues,
        "fitted_population": fit.fittedvalues_marginal,
        "residuals": fit.resid,
    }.items():
        stored = results[key]
        first = matrix(stored["first"])
        np.testing.assert_array_less(np.abs(values.to_numpy()[: len(first)] - first), 1e-5 * unit)
        assert np.sum(values) == pytest.approx(stored["sum"], abs=1e-6 * unit * fit.nobs)
        assert np.sum(values**2) == pytest.approx(stored["sumsq"], rel=1e-6)
    new = {k: np.array(v) for k, v in results["predict"]["newdata"].items()}
    marginal = fit.predict(new, random_effects=False)
    expected = matrix(results["predict"]["population"])
    np.testing.assert_array_less(np.abs(marginal - expected), 1e-5 * unit)
    conditional = fit.predict(new, new_levels="population")
    expected = matrix(results["predict"]["conditional"])
    np.testing.assert_array_less(np.abs(conditional - expected), 1e-5 * unit)


@pytest.mark.parametrize(
    "name", [name for name, r in RECORDS.items() if r["formula"] != r["formula_py"]]
)
def test_python_formula(name: str) -> None:
    """The same model in Python's spelling."""
    fit = fit_record({**RECORDS[name], "contrasts": None}, "formula_py")
    expected = RECORDS[name]["results"]
    assert fit.deviance == pytest.approx(expected["criterion"], rel=1e-8)
    np.testing.assert_allclose(fit.bse, matrix(expected["se"]), rtol=1e-6)


def test_nearly_collinear_columns() -> None:
    """x4 = x1 + 1e-5 x5: the model with x5 itself, up to the units of a coefficient."""
    fit = fitted("syn_rankdef_near_reml")
    well = load_record(ILL_CONDITIONED["syn_rankdef_near_reml"])["results"]
    assert fit.converged
    # Columns shrink by 1e-5, and REML's log|X'V^-1 X| with them.
    shift = 2 * math.log(1e5)
    assert fit.deviance == pytest.approx(well["criterion"] - shift, abs=1e-6)
    assert math.sqrt(fit.scale) == pytest.approx(well["sigma"], rel=1e-6)
    assert np.asarray(fit.cov_re)[0, 0] == pytest.approx(
        matrix(well["varcorr"][0]["cov"])[0, 0], rel=1e-5
    )
    position = well["fixef"]["names"].index("x5")
    assert fit.params["x4"] * 1e-5 == pytest.approx(matrix(well["fixef"])[position], rel=1e-6)
    assert fit.bse["x4"] * 1e-5 == pytest.approx(matrix(well["se"])[position], rel=1e-6)


def test_covariate_far_from_zero() -> None:
    """x + 1e5: the slope and the criterion of x itself."""
    fit = fitted("syn_scale_far_reml")
    well = load_record(ILL_CONDITIONED["syn_scale_far_reml"])["results"]
    assert fit.converged
    assert fit.deviance == pytest.approx(well["criterion"], rel=1e-8)
    assert math.sqrt(fit.scale) == pytest.approx(well["sigma"], rel=1e-6)
    assert np.asarray(fit.cov_re)[0, 0] == pytest.approx(
        matrix(well["varcorr"][0]["cov"])[0, 0], rel=1e-5
    )
    assert fit.params["x_far"] == pytest.approx(matrix(well["fixef"])[1], rel=1e-6)
    assert fit.bse["x_far"] == pytest.approx(matrix(well["se"])[1], rel=1e-6)
