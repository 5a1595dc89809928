"""`fit_many`: every lane equals a fit of its own, whatever the others are."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.batch import line_fits, line_statistics
from lmmax.batch.engines import LineEngine, engine_of
from lmmax.batch.multiple import qvalues
from lmmax.batch.reading import read_design
from lmmax.constraints import Settings
from lmmax.fit import prepare
from lmmax.solve import Status

N_RESPONSES = 40
BAD = {3: "constant", 7: "infinite", 11: "too_few", 13: "explained"}
GAPS = (5, 6, 20)
TESTS = {"slope": "Days = 10", "both": "Intercept = 250, Days = 10"}


def simulated(sleep: pd.DataFrame) -> np.ndarray:
    """Responses with all kinds of variances, zero among them, and some that cannot be fitted."""
    rng = np.random.default_rng(5)
    codes, days = pd.factorize(sleep["Subject"])[0], sleep["Days"].to_numpy(dtype=float)
    intercepts = rng.normal(size=(18, N_RESPONSES)) * rng.choice([0.0, 25.0], size=N_RESPONSES)
    slopes = rng.normal(size=(18, N_RESPONSES)) * rng.choice([0.0, 6.0], size=N_RESPONSES)
    y = 250.0 + 10.0 * days[:, None] + intercepts[codes] + slopes[codes] * days[:, None]
    y += 25.0 * rng.normal(size=y.shape)
    y[2, list(GAPS)] = np.nan
    y[17, GAPS[-1]] = np.nan
    y[:, 3], y[:, 11], y[:, 13] = 4.0, np.nan, 5.0 + 0.3 * days
    y[0, 7] = np.inf
    return y


MODELS = {
    "intercept": "~ Days + (1 | Subject)",
    "slope": "~ Days + (0 + Days | Subject)",
    "both": "~ Days + (1 + Days | Subject)",
}


@pytest.fixture(scope="module")
def sleep() -> pd.DataFrame:
    return lmmax.datasets.load("sleepstudy")


@pytest.fixture(scope="module", params=[(m, r) for m in MODELS for r in (True, False)])
def batch(request: Any, sleep: pd.DataFrame) -> lmmax.BatchFit:
    model, reml = request.param
    return lmmax.fit_many(MODELS[model], sleep, simulated(sleep), reml=reml, tests=TESTS)


def test_every_lane_equals_a_fit_of_its_own(batch: lmmax.BatchFit) -> None:
    singular = 0
    for i in [i for i in range(N_RESPONSES) if i not in BAD]:
        alone = batch[i]
        assert abs(batch.llf.iloc[i] - alone.llf) < 5e-8
        np.testing.assert_allclose(
            batch.params.iloc[i], alone.params, atol=1e-6 * float(alone.bse.max())
        )
        np.testing.assert_allclose(batch.bse.iloc[i], alone.bse, rtol=1e-6)
        np.testing.assert_allclose(batch.df.iloc[i], alone.df, rtol=1e-6)
        np.testing.assert_allclose(batch.pvalues.iloc[i], alone.pvalues, rtol=1e-6, atol=1e-12)
        size = float(np.abs(alone.cov_re.to_numpy()).max()) + 1e-3 * alone.scale
        np.testing.assert_allclose(batch.cov_re[i], alone.cov_re, atol=1e-5 * size)
        assert batch.scale.iloc[i] == pytest.approx(alone.scale, rel=1e-6)
        assert batch.record.singular[i] == alone.singular
        slope = alone.t_test(TESTS["slope"]).table.iloc[0]
        mine = batch.test("slope").iloc[i]
        assert mine["t"] == pytest.approx(slope["t"], rel=1e-6, abs=1e-8)
        assert mine["df"] == pytest.approx(slope["df"], rel=1e-6)
        both, joint = alone.f_test(TESTS["both"]), batch.test("both").iloc[i]
        assert joint["F"] == pytest.approx(both.statistic, rel=1e-6)
        assert joint["df_den"] == pytest.approx(both.df_denom, rel=1e-5)
        assert joint["p"] == pytest.approx(both.pvalue, rel=1e-5, abs=1e-14)
        singular += alone.singular
    assert 0 < singular < N_RESPONSES


def test_what_cannot_be_fitted_says_so_and_disturbs_nobody(batch: lmmax.BatchFit) -> None:
    certificate = batch.certificate
    assert list(np.flatnonzero(~batch.converged)) == sorted(BAD)
    assert certificate["status"].iloc[list(BAD)].tolist() == list(BAD.values())
    assert batch.params.iloc[list(BAD)].isna().all(axis=None)
    assert (certificate["gradient"][batch.converged] < 1e-3).all()
    assert certificate["nobs"].iloc[[0, *GAPS]].tolist() == [180, 179, 179, 178]
    assert any("3 responses have missing values" in note for note in batch.notes) or any(
        "4 responses have missing values" in note for note in batch.notes
    )


def test_a_lane_that_has_not_converged_tells_no_certainty(
    sleep: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    y = simulated(sleep)[:, :2]
    original = line_fits.fits

    def stopped(*arguments: Any) -> line_fits.Fits:
        found = original(*arguments)
        status = np.array([Status.MAX_STEPS, Status.CONVERGED])
        return replace(found, status=status)

    monkeypatch.setattr(line_fits, "fits", stopped)
    batch = lmmax.fit_many(MODELS["intercept"], sleep, y, tests=TESTS)
    assert batch.certificate["status"].tolist() == ["max_steps", "converged"]
    for name, df in (("slope", "df"), ("both", "df_den")):
        assert batch.test(name)[[df, "p"]].isna().all(axis=1).tolist() == [True, False]
        assert np.isfinite(batch.test(name)).all(axis=1).tolist() == [False, True]


def test_lanes_that_fail_are_solved_from_other_starts(
    sleep: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start of some is no number, so that nothing can come of it."""
    y = simulated(sleep)[:, [0, 1, 2, 4, 8, 9]]
    batch_module = sys.modules["lmmax.batch"]
    usual, original = lmmax.fit_many(MODELS["both"], sleep, y), batch_module.solve

    def poor(
        lanes: Any, constraints: Any, settings: Any, terms: Any, start: Any, *rest: Any
    ) -> Any:
        D = np.array(start.D)
        D[[1, 4]] = np.nan
        return original(lanes, constraints, settings, terms, start._replace(D=D), *rest)

    solver, again = sys.modules["lmmax.batch.solve"], []
    others = solver.usual_starts

    def noted(lanes: Any, constraints: Any, which: np.ndarray) -> Any:
        again.append(which.tolist())
        return others(lanes, constraints, which)

    monkeypatch.setattr(batch_module, "solve", poor)
    monkeypatch.setattr(solver, "usual_starts", noted)
    found = lmmax.fit_many(MODELS["both"], sleep, y)
    assert found.converged.all()
    np.testing.assert_allclose(found.llf, usual.llf, rtol=1e-10)
    np.testing.assert_allclose(found.bse, usual.bse, rtol=1e-6)
    assert again == [[1, 4]]
    untouched = [0, 2, 3, 5]
    np.testing.assert_array_equal(found.llf.iloc[untouched], usual.llf.iloc[untouched])


@pytest.mark.parametrize("model", MODELS)
def test_a_chunk_of_constants_only_is_no_error(sleep: pd.DataFrame, model: str) -> None:
    y = simulated(sleep)[:, [0, 3, 3, 1]]
    found = lmmax.fit_many(MODELS[model], sleep, y, chunk=1)
    assert found.converged.tolist() == [True, False, False, True]
    assert found.params.iloc[1:3].isna().all(axis=None)


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_results_do_not_depend_on_the_chunks(sleep: pd.DataFrame, chunk: int) -> None:
    y = simulated(sleep)[:, :14]
    whole = lmmax.fit_many(MODELS["intercept"], sleep, y)
    parts = lmmax.fit_many(MODELS["intercept"], sleep, y, chunk=chunk)
    for name in ("params", "bse", "df", "scale", "llf", "cov_re"):
        a, b = getattr(whole.record, name), getattr(parts.record, name)
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_results_do_not_depend_on_the_number_of_cores(
    sleep: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    k = 2 * line_fits.SEARCH_LANES + 76
    y = 25.0 * np.random.default_rng(3).normal(size=(len(sleep), k)) + simulated(sleep)[:, [0]]
    found = {}
    for cores in (1, 3):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
        found[cores] = lmmax.fit_many(MODELS["intercept"], sleep, y).record
    for mine, other in zip(found[1], found[3], strict=True):
        np.testing.assert_array_equal(mine, other)
    assert 0.1 < found[1].singular.mean() < 0.9


def test_groups_in_which_z_is_zero_have_no_random_part() -> None:
    """Their eigenvalues are zero, so that nothing may be divided by them."""
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(12), 5)
    x = rng.normal(size=60) * (codes > 3)
    y = rng.normal(size=(60, 2)) + rng.normal(size=(12, 2))[codes] * x[:, None]
    data, snp = pd.DataFrame({"x": x, "g": codes, "y": y[:, 0]}), rng.normal(size=60)
    batch = lmmax.fit_many("~ x + (0 + x | g)", data, y)
    scan = lmmax.fit_many("~ x + snp + (0 + x | g)", data, ["y"], scan={"snp": snp[:, None]})
    scanned = lmmax.fit("y ~ x + snp + (0 + x | g)", data.assign(snp=snp))
    for many, i, alone in ((batch, 0, batch[0]), (batch, 1, batch[1]), (scan, 0, scanned)):
        assert abs(many.llf.iloc[i] - alone.llf) < 1e-11
        np.testing.assert_allclose(many.params.iloc[i], alone.params, rtol=1e-8)
        np.testing.assert_allclose(many.bse.iloc[i], alone.bse, rtol=1e-8)


def test_float32_responses_are_summed_in_float64(sleep: pd.DataFrame) -> None:
    y = simulated(sleep)[:, [0, 1, 2]].astype(np.float32)
    found = lmmax.fit_many(MODELS["intercept"], sleep, y)
    same = lmmax.fit_many(MODELS["intercept"], sleep, y.astype(float))
    assert (found.llf == same.llf).all()


def test_an_enormous_mean_costs_no_digits(sleep: pd.DataFrame) -> None:
    y = simulated(sleep)[:, [0]]
    near = lmmax.fit_many(MODELS["intercept"], sleep, y)
    far = lmmax.fit_many(MODELS["intercept"], sleep, y + 1e9)
    # 1e9 itself has lost all but seven digits of the noise.
    np.testing.assert_allclose(far.scale, near.scale, rtol=1e-6)
    np.testing.assert_allclose(far.params["Days"], near.params["Days"], rtol=1e-6)


@pytest.mark.parametrize("reml", [True, False])
def test_groups_that_are_far_apart_cost_no_digits(sleep: pd.DataFrame, reml: bool) -> None:
    """Beyond the grid of the search on a line, and far beyond the digits of a difference."""
    rng = np.random.default_rng(3)
    apart = rng.normal(size=18)[pd.factorize(sleep["Subject"])[0]]
    y = rng.normal(size=(180, 1)) + apart[:, None] * 10.0 ** np.array([1, 3, 5, 7])
    batch = lmmax.fit_many(MODELS["intercept"], sleep, y, reml=reml)
    assert batch.converged.all()
    for i, alone in enumerate(batch):
        # One unit of rounding of a response is 1e-9 of its noise in the end.
        assert abs(batch.llf.iloc[i] - alone.llf) < 1e-7
        np.testing.assert_allclose(batch.scale.iloc[i], alone.scale, rtol=1e-8)
        np.testing.assert_allclose(batch.bse.iloc[i], alone.bse, rtol=1e-7)
        np.testing.assert_allclose(batch.df.iloc[i], alone.df, rtol=1e-5)


def test_a_minimum_beyond_the_grid_is_not_called_converged(sleep: pd.DataFrame) -> None:
    """What has statistics only, and no rows for a closer look, says so."""
    design, _ = read_design(MODELS["intercept"], sleep)
    engine = engine_of(prepare(design), Settings(), ())
    assert isinstance(engine, LineEngine)
    apart = np.eye(18)[pd.factorize(sleep["Subject"])[0], :2] * 1e7
    y = apart * [1.0, 0.0] + np.random.default_rng(0).normal(size=(180, 2))
    found = engine.of_statistics(line_statistics.statistics(engine.line, y))
    assert found.status.tolist() == [Status.MAX_STEPS, Status.CONVERGED]


def test_a_response_that_x_explains_nearly_is_residualised_first(sleep: pd.DataFrame) -> None:
    y = simulated(sleep)[:, [0]]
    steep = y + 1e7 * sleep["Days"].to_numpy()[:, None]
    near, far = (lmmax.fit_many(MODELS["intercept"], sleep, each) for each in (y, steep))
    np.testing.assert_allclose(far.scale, near.scale, rtol=1e-7)
    np.testing.assert_allclose(far.llf, near.llf, atol=1e-6)


def test_weights_and_offset_and_unbalanced_groups() -> None:
    rng = np.random.default_rng(1)
    codes = np.repeat(np.arange(30), rng.integers(1, 8, size=30))
    n = len(codes)
    data = pd.DataFrame({"x": rng.normal(size=n), "g": codes, "w": rng.uniform(0.5, 2.0, size=n)})
    offset = rng.normal(size=n)
    y = 1.0 + rng.normal(size=(30, 6))[codes] + rng.normal(size=(n, 6)) + offset[:, None]
    batch = lmmax.fit_many("~ x + (1 | g)", data, y, weights="w", offset=offset)
    for i in range(6):
        frame = data.assign(y=y[:, i])
        alone = lmmax.fit("y ~ x + (1 | g)", frame, weights="w", offset=offset)
        assert abs(batch.llf.iloc[i] - alone.llf) < 5e-8
        np.testing.assert_allclose(batch.df.iloc[i], alone.df, rtol=1e-6)
        np.testing.assert_allclose(batch[i].params, alone.params, rtol=1e-10)


def test_a_relationship_matrix_is_one_decomposition() -> None:
    rng = np.random.default_rng(2)
    m, k = 40, 5
    half = rng.normal(size=(m, 60))
    kinship = half @ half.T / 60 + 0.05 * np.eye(m)
    labels = [f"a{i:02d}" for i in range(m)]
    codes = np.concatenate([np.arange(m), rng.integers(0, m, size=30)])
    data = pd.DataFrame({"x": rng.normal(size=len(codes)), "id": np.array(labels)[codes]})
    u = np.linalg.cholesky(kinship) @ rng.normal(size=(m, k)) * np.array([0.0, 0.5, 1, 2, 3])
    y = u[codes] + rng.normal(size=(len(codes), k))
    relmat = {"id": pd.DataFrame(kinship, index=labels, columns=labels)}
    batch = lmmax.fit_many("~ x + (1 | id)", data, y, relmat=relmat)
    assert "search on a line" in batch.engine
    for i in range(k):
        frame = data.assign(y=y[:, i])
        alone = lmmax.fit("y ~ x + (1 | id)", frame, relmat=relmat)
        assert abs(batch.llf.iloc[i] - alone.llf) < 5e-8
        np.testing.assert_allclose(batch.bse.iloc[i], alone.bse, rtol=1e-6)


def test_tables(batch: lmmax.BatchFit) -> None:
    frame = batch.frame()
    assert len(frame) == N_RESPONSES * 2
    assert list(frame.columns[:3]) == ["response", "coefficient", "coef"]
    days = frame[frame["coefficient"] == "Days"].set_index("response")
    np.testing.assert_array_equal(days["q"], batch.qvalues()["Days"])
    assert "40 fits of" in str(batch) and "36 converged" in str(batch)
    limits = batch.conf_int("Days")
    assert (limits["lower"] < batch.params["Days"])[batch.converged].all()


def test_data_frames_and_names(sleep: pd.DataFrame) -> None:
    y = simulated(sleep)[:, :2]
    wide = sleep.assign(a=y[:, 0], b=y[:, 1])
    by_name = lmmax.fit_many(MODELS["intercept"], wide, ["a", "b"])
    by_frame = lmmax.fit_many(MODELS["intercept"], sleep, wide[["a", "b"]])
    assert list(by_name.names) == ["a", "b"] == list(by_frame.names)
    np.testing.assert_array_equal(by_name.params, by_frame.params)
    assert by_name["b"].params["Days"] == pytest.approx(by_name.params.loc["b", "Days"], rel=1e-9)
    assert by_name["b"].design.response_name == "b"
    assert "a" in by_name and "c" not in by_name
    assert [fit.llf for fit in by_name] == [by_name["a"].llf, by_name[-1].llf]
    with pytest.raises(KeyError, match="'c' is no response"):
        by_name["c"]
    with pytest.raises(TypeError, match=r"not by slice: .* use params\.loc"):
        by_name[:1]


def test_a_covariate_may_be_called_response(sleep: pd.DataFrame) -> None:
    y, data = simulated(sleep)[:, :2], sleep.rename(columns={"Days": "response"})
    found = lmmax.fit_many("~ response + (1 | Subject)", data, y)
    same = lmmax.fit_many(MODELS["intercept"], sleep, y)
    np.testing.assert_array_equal(found.params, same.params)
    with pytest.raises(lmmax.DataError, match=r"no column 'response' .* Columns: [^(]*\.$"):
        lmmax.fit_many("~ response + (1 | Subject)", sleep, y)


def test_rows_with_missing_covariates_are_left_out(sleep: pd.DataFrame) -> None:
    y = simulated(sleep)[:, :2]
    gappy = sleep.assign(Days=sleep["Days"].astype(float))
    gappy.loc[gappy.index[4], "Days"] = np.nan
    found = lmmax.fit_many(MODELS["intercept"], gappy, y)
    keep = np.arange(180) != 4
    same = lmmax.fit_many(MODELS["intercept"], sleep[keep], y[keep])
    np.testing.assert_allclose(found.params, same.params, rtol=1e-10)


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        (np.zeros((5, 2)), "responses has 5 rows, data has 180"),
        (np.zeros((2, 180)), "they may be transposed"),
        (np.zeros((180, 2, 2)), r"two-dimensional.*image\[mask\]"),
        (["nowhere"], "'nowhere', which is no column of data"),
        (["Reaction", "Reaction"], "names 'Reaction' more than once"),
        ("Reaction", r"write responses=\['Reaction'\] for the column"),
        ([], "responses is empty"),
        (np.zeros((180, 0)), "no column"),
        (np.zeros((180, 2), dtype=object), r"not object: convert with astype\(float\)"),
        (3.0, "an array or a data frame, not float"),
    ],
)
def test_wrong_responses(sleep: pd.DataFrame, responses: Any, message: str) -> None:
    with pytest.raises(lmmax.DataError, match=message):
        lmmax.fit_many(MODELS["intercept"], sleep, responses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 1.5}, "chunk=1.5 must be a whole number"),
        ({"chunk": "auto"}, "chunk='auto' must be a whole number"),
        ({"tests": "Days = 10"}, "tests='Days = 10' must be a mapping"),
        ({"executor": "dask"}, "executor='dask' must be an executor"),
        ({"executor": ThreadPoolExecutor}, "must be an executor"),
        ({"out": 3}, "out=3 must be the path of a directory"),
        ({"resume": True}, "resume=True goes with out="),
        ({"out": ""}, "out='' must be the path of a directory"),
        ({"out": Path(__file__)}, r"test_fit_many.py' cannot be made .* \(File exists\)"),
    ],
)
def test_wrong_options(sleep: pd.DataFrame, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        lmmax.fit_many(MODELS["intercept"], sleep, ["Reaction"], **options)


def test_qvalues_of_benjamini_and_hochberg() -> None:
    # Table 1 of Benjamini and Hochberg (1995): 15 p-values, four of them called at 0.05.
    low = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344]
    p = np.array([*low, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0])
    assert int(np.sum(qvalues(p) <= 0.05)) == 4
    harmonic = np.sum(1.0 / np.arange(1, 16))
    np.testing.assert_allclose(qvalues(p, "by"), np.minimum(qvalues(p) * harmonic, 1.0))
    assert np.isnan(qvalues(np.append(p, np.nan))[-1])
    null = (1.0 + 4) / (0.5 * 15)
    np.testing.assert_allclose(qvalues(p, "storey"), qvalues(p) * min(null, 1.0))
    with pytest.raises(ValueError, match="method='fdr'"):
        qvalues(p, "fdr")


def test_columns_that_are_dropped_are_named() -> None:
    sleep = lmmax.datasets.load("sleepstudy").assign(z=1.0)
    with pytest.warns(lmmax.RankWarning, match="columns before them: z"):
        batch = lmmax.fit_many("~ Days + z + (1 | Subject)", sleep, ["Reaction"])
    assert batch.params["z"].isna().all() and np.isnan(batch.summary().loc["z", "share p < 0.05"])
    assert batch.notes[0].endswith("columns before them: z")
    assert str(batch).startswith("1 fit of")
