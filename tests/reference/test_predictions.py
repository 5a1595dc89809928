"""Predictions for new rows, and formulas in Python's spelling, against the lme4 records."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

import lmmax
from tests.reference import load_data, load_records, matrix

RECORDS = {record["id"]: record for record in load_records(kinds=("lmm",), several=False)}
# lme4's own coefficients carry noise here; see the records' notes.
ILL_CONDITIONED = {"syn_rankdef_near_reml", "syn_scale_far_reml"}
EXTREME_UNITS = [name for name, r in RECORDS.items() if "extreme units" in r["tags"]]


def fit_record(record: dict[str, Any], formula: str = "formula") -> lmmax.Fit:
    contrasts = None
    if formula == "formula" and record["contrasts"]:
        contrasts = {k: v.removeprefix("contr.") for k, v in record["contrasts"].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmmax.RankWarning)
        if "over-parametrised" in record["tags"]:
            warnings.simplefilter("ignore", lmmax.IdentifiabilityWarning)
        return lmmax.fit(
            record[formula],
            load_data(record["dataset"]),
            reml=record["reml"],
            weights=record["weights"],
            contrasts=contrasts,
        )


@pytest.mark.parametrize("name", [name for name in RECORDS if name not in ILL_CONDITIONED])
def test_new_rows(name: str) -> None:
    """Known groups, and a new one with effects of zero; errors in the unit of the response."""
    record = RECORDS[name]
    fit, results = fit_record(record), record["results"]
    n, values = results["n"], results["fitted"]
    unit = math.sqrt(
        values["sumsq"] / n - (values["sum"] / n) ** 2 + results["residuals"]["sumsq"] / n
    )
    new = {k: np.array(v) for k, v in results["predict"]["newdata"].items()}
    # lme4 takes the coefficients of dropped columns for zero, also in rows whose mean cannot be
    # estimated: those are off the line on which the column was another's multiple.
    known = np.ones(len(matrix(results["predict"]["population"])), dtype=bool)
    if name.startswith("syn_rankdef_exact"):
        known = np.isclose(new["x3"], new["x1"] + 2.0 * new["x2"])
        assert not known.all()
    for values, expected in (
        ({"random_effects": False}, results["predict"]["population"]),
        ({"new_levels": "population"}, results["predict"]["conditional"]),
    ):
        if known.all():
            found = fit.predict(new, **values)
        else:
            with pytest.warns(lmmax.RankWarning, match="cannot be estimated"):
                found = fit.predict(new, **values)
        assert np.max(np.abs(found - matrix(expected))[known]) < 1e-5 * unit
        assert found[~known].isna().all()


@pytest.mark.parametrize(
    "name", [name for name, r in RECORDS.items() if r["formula"] != r["formula_py"]]
)
def test_python_formula(name: str) -> None:
    """The same model as R spells it and as Python does, contrasts in the formula."""
    fit, expected = fit_record(RECORDS[name], "formula_py"), RECORDS[name]["results"]
    assert fit.deviance == pytest.approx(expected["criterion"], rel=1e-8)
    np.testing.assert_allclose(fit.bse, matrix(expected["se"]), rtol=1e-6)


@pytest.mark.parametrize("name", EXTREME_UNITS)
def test_covariance_in_extreme_units(name: str) -> None:
    """Every entry to 1e-5 of its own standard deviations, however small the effect's unit."""
    record = RECORDS[name]
    blocks = [matrix(term["cov"]) for term in record["results"]["varcorr"]]
    got, at = fit_record(record).cov_re.to_numpy(), 0
    for expected in blocks:
        here = slice(at, at + len(expected))
        unit = np.sqrt(np.diag(expected))
        error = np.abs(got[here, here] - expected) / np.outer(unit, unit)
        assert error.max() < 1e-5
        at = here.stop
    assert at == len(got)
