"""Fits of nlme with plain residuals: one grouping factor or nested ones.

``(0 + f || g)`` with a factor drops all correlations here, as nlme's ``pdDiag`` does and lme4
does not. ``pdCompSymm`` is ``homcs``, ``pdIdent`` is ``homdiag``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.linalg import block_diag

import lmmax
from tests.reference import grouping_factors, load_data, load_records, matrix


@pytest.mark.parametrize("record", load_records(kinds=("lme",)), ids=lambda r: r["id"])
def test_nlme(record: dict[str, Any]) -> None:
    results = record["results"]
    fit = lmmax.fit(record["formula_py"], load_data(record["dataset"]), reml=record["reml"])
    assert fit.converged
    assert fit.deviance == pytest.approx(results["criterion"], rel=1e-8)
    assert fit.n_params == results["npar"]
    np.testing.assert_allclose(fit.params, matrix(results["fixef"]), rtol=1e-6)
    np.testing.assert_allclose(fit.bse, matrix(results["se"]), rtol=1e-6)
    inner_outer = fit.coefficients("between-within")["df"]
    np.testing.assert_array_equal(inner_outer, results["inner_outer"]["df"])
    assert math.sqrt(fit.scale) == pytest.approx(results["sigma"], rel=1e-6)
    # The terms stand outer factor first, in the record as in the formula.
    cov = block_diag(*[matrix(term["cov"]) for term in results["varcorr"]])
    np.testing.assert_allclose(fit.cov_re.to_numpy(), cov, rtol=0, atol=1e-5 * cov.max())
    # Modes, fitted values and residuals are nlme's, which stops a little short of its optimum.
    several = len(grouping_factors(record)) > 1
    for block in results["ranef"]:
        effects = fit.random_effects[block["group"]] if several else fit.random_effects
        modes = matrix(block["values"])
        values = effects.loc[block["levels"]].to_numpy()
        np.testing.assert_allclose(values, modes, rtol=0, atol=1e-4 * np.abs(modes).max())
    spread = math.sqrt(results["residuals"]["sumsq"] / results["n"])
    for series, key in ((fit.fittedvalues, "fitted"), (fit.resid, "residuals")):
        first = matrix(results[key]["first"])
        assert np.max(np.abs(series.to_numpy()[: len(first)] - first)) < 1e-4 * spread
