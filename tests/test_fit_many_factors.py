"""`fit_many` and bootstraps with several grouping factors: lanes equal fits of their own."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.batch import factors, refit_responses
from lmmax.compilation import Compiled
from lmmax.design import build_design
from lmmax.fit import prepare
from lmmax.formula import parse_formula
from lmmax.likelihood import criterion

_criterion = Compiled(criterion)
pytestmark = pytest.mark.unoptimised

N_RESPONSES = 14
BAD = {3: "constant", 7: "explained"}
GAP = 5
MODELS = {
    "nested": ("pastes", "~ x + (1 | batch/cask)", ("batch", "sample")),
    "crossed": ("penicillin", "~ x + (1 | plate) + (1 | sample)", ("plate", "sample")),
}
TESTS = {"slope": "x = 0.5", "both": "Intercept = 3, x = 0"}


def data_of(model: str) -> tuple[pd.DataFrame, np.ndarray]:
    """Responses with all kinds of variances, zero among them, and some that cannot be fitted."""
    name, _, groupings = MODELS[model]
    data, rng = lmmax.datasets.load(name), np.random.default_rng(4)
    data["x"] = rng.normal(size=len(data))
    y = 3.0 + rng.normal(size=(len(data), N_RESPONSES))
    for grouping in groupings:
        codes = pd.factorize(data[grouping])[0]
        sd = rng.choice([0.0, 0.5, 2.0], size=N_RESPONSES)
        y += (sd * rng.normal(size=(codes.max() + 1, N_RESPONSES)))[codes]
    y[:, 3], y[:, 7] = 4.0, 2.0 - 0.7 * data["x"]
    y[11, GAP] = np.nan
    return data, y


@pytest.fixture(scope="module", params=MODELS)
def case(request: Any) -> tuple[str, pd.DataFrame, np.ndarray, lmmax.BatchFit]:
    data, y = data_of(request.param)
    formula = MODELS[request.param][1]
    return formula, data, y, lmmax.fit_many(formula, data, y, tests=TESTS)


def test_every_lane_equals_a_fit_of_its_own(case: Any) -> None:
    formula, data, y, batch = case
    assert "in lanes" in batch.engine
    certificate, singular = batch.certificate, 0
    assert certificate["status"].iloc[list(BAD)].tolist() == list(BAD.values())
    assert list(np.flatnonzero(~batch.converged)) == sorted(BAD)
    assert (certificate["gradient"][batch.converged] < 1e-3).all()
    for i in [i for i in range(N_RESPONSES) if i not in BAD]:
        alone = lmmax.fit("y " + formula, data.assign(y=y[:, i]).dropna())
        assert abs(batch.llf.iloc[i] - alone.llf) < 1e-10
        assert batch.record.singular[i] == alone.singular
        error = float(alone.bse.max())
        np.testing.assert_allclose(batch.params.iloc[i], alone.params, atol=1e-6 * error)
        np.testing.assert_allclose(batch.bse.iloc[i], alone.bse, rtol=1e-6)
        np.testing.assert_allclose(batch.df.iloc[i], alone.df, rtol=2e-6)
        size = float(np.abs(alone.cov_re.to_numpy()).max()) + 1e-3 * alone.scale
        np.testing.assert_allclose(batch.cov_re[i], alone.cov_re, atol=2e-6 * size)
        slope, mine = alone.t_test(TESTS["slope"]).table.iloc[0], batch.test("slope").iloc[i]
        np.testing.assert_allclose(mine[["t", "df"]], slope[["t", "df"]], rtol=2e-6)
        joint, both = alone.f_test(TESTS["both"]), batch.test("both").iloc[i]
        assert both["F"] == pytest.approx(joint.statistic, rel=1e-6)
        assert both["df_den"] == pytest.approx(joint.df_denom, rel=1e-5)
        singular += alone.singular
    assert 0 < singular < N_RESPONSES - len(BAD)


def test_results_depend_on_neither_chunks_nor_starts(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts that are no number fail; the usual ones of a fit take their place."""
    formula, data, y, batch = case
    whole = np.delete(np.arange(N_RESPONSES), GAP)[:9]
    found = lmmax.fit_many(formula, data, y[:, whole], chunk=4)
    for name in ("params", "bse", "df", "scale", "llf", "cov_re"):
        mine, theirs = getattr(found.record, name), getattr(batch.record, name)[whole]
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12, err_msg=name)

    module, lost = sys.modules["lmmax.batch"], []
    original, rough = module.solve, factors.rough

    def poor(
        lanes: Any, constraints: Any, settings: Any, terms: Any, start: Any, *rest: Any
    ) -> Any:
        start.D[[1, 4]] = np.nan
        return original(lanes, constraints, settings, terms, start, *rest)

    def noted(*arguments: Any) -> np.ndarray:
        lost.append(arguments[-1].tolist())
        return rough(*arguments)

    monkeypatch.setattr(module, "solve", poor)
    monkeypatch.setattr(factors, "rough", noted)
    again = lmmax.fit_many(formula, data, y[:, whole])
    assert lost[0] == [1, 4]
    np.testing.assert_allclose(again.llf, found.llf, rtol=1e-10)
    np.testing.assert_allclose(again.bse, found.bse, rtol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_refits_in_lanes_equal_refits(model: str) -> None:
    """What bootstraps of several factors do, with weights, an offset and unequal groups."""
    data, y = data_of(model)
    rng = np.random.default_rng(8)
    keep = np.sort(rng.permutation(len(data))[: len(data) - 7])
    data, y = data.iloc[keep].assign(w=rng.uniform(0.5, 2.0, len(keep)), y=y[keep, 0]), y[keep]
    fit = lmmax.fit("y " + MODELS[model][1], data, weights="w", offset="x", reml=False)
    found = refit_responses(fit, y[:, [1, 2, 4]].T)
    for i, column in enumerate((1, 2, 4)):
        alone = fit.refit(y[:, column])
        assert abs(found.llf[i] - alone.llf) < 1e-10
        np.testing.assert_allclose(found.bse[i], alone.bse, rtol=1e-6)
        np.testing.assert_allclose(found.scale[i], alone.scale, rtol=1e-6)
        assert found.singular[i] == alone.singular


@pytest.mark.parametrize("skewed", [False, True])
def test_groups_are_put_where_sums_over_them_need_no_index(skewed: bool) -> None:
    """Three levels, unequal groups: the criterion stays the same; not if one group has most."""
    rng, rows = np.random.default_rng(6), np.arange(48)
    a = np.repeat(np.arange(4), [9, 12, 15, 12])
    b = 100 * a + np.where((a == 2) & skewed, rows, rows // 6)
    c = 100 * b + rows // 3 + 20 * (rows % 7 == 3)
    data = pd.DataFrame({"y": rng.normal(size=48) + rng.normal(size=4)[a], "a": a, "b": b, "c": c})
    design = build_design(parse_formula("y ~ 1 + (1 | a) + (1 | b) + (1 | c)"), data)
    _, layout, compression, *_ = prepare(design)
    shared = factors.shared_factors(layout, compression)
    assert [parent is None for parent in shared.problem.parents] == 2 * [not skewed]
    found = factors.project(shared, design.y[None])
    own = replace(
        found.problem, **{name: getattr(found.problem, name)[0] for name in found.varying}
    )
    D = np.diag([0.3, 0.0, 1.5])
    with jax.enable_x64(True):
        values = [float(_criterion(each, D)) for each in (own, compression.problem)]
    assert values[0] == pytest.approx(values[1], abs=1e-10)
