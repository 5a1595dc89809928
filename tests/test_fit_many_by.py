"""`fit_many(by=)`: every subset equals a fit of its own rows."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.batch import subsets
from lmmax.fit import RankWarning

N_STORES = 12
ONE_GROUP, FEW, CONSTANT, NO_LEVEL, EXACT_X, INFINITE, EXPLAINED = 4, 5, 6, 7, 8, 9, 10
FAIL = (ONE_GROUP, FEW, CONSTANT, INFINITE, EXPLAINED)
TESTS = {"slope": "x = 0.5", "both": "x = 0, f[T.b] = 0"}


def stores() -> pd.DataFrame:
    """Ragged stores: some singular, some that no model fits, one with a column X depends on."""
    rng = np.random.default_rng(3)
    parts = []
    for store in range(N_STORES):
        m = int(rng.integers(5, 14))
        g = np.repeat(np.arange(m), rng.integers(3, 9, size=m))
        n = len(g)
        x, f = rng.normal(size=n) + store, rng.choice(["a", "b", "c"], size=n)
        sd = np.array([1.0, 0.6]) * (store % 4 != 1)
        b = rng.normal(size=(m, 2)) * sd
        y = 1.0 + 0.5 * x + (f == "b") + b[g, 0] + b[g, 1] * x + rng.normal(size=n)
        if store == ONE_GROUP:
            g = np.zeros(n, dtype=int)
        if store == CONSTANT:
            y = np.full(n, 2.0)
        if store == INFINITE:
            y[3] = -np.inf
        if store == EXPLAINED:
            y = 3.0 - x
        if store == NO_LEVEL:
            f = np.where(f == "c", "a", f)
        if store == EXACT_X:
            x = (f == "b").astype(float)
        part = pd.DataFrame({"store": store + 100, "g": g, "x": x, "f": f, "y": y})
        part["w"], part["o"] = rng.uniform(0.5, 2.0, size=n), rng.normal(size=n)
        parts.append(part.iloc[[0, -1]] if store == FEW else part)
    # Rows in no order, and labels that are no positions.
    return pd.concat(parts, ignore_index=True).sample(frac=1.0, random_state=1)


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    return stores()


def quiet(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)
        return function(*arguments, **options)


def check_lane(batch: lmmax.BatchFit, i: int, alone: lmmax.Fit) -> None:
    """Compare with a fit, at the tolerances that are promised."""
    assert abs(batch.llf.iloc[i] - alone.llf) < 5e-8
    names = alone.params.index
    atol = 1e-6 * float(alone.bse.max())
    np.testing.assert_allclose(batch.params[names].iloc[i], alone.params, rtol=1e-6, atol=atol)
    np.testing.assert_allclose(batch.bse[names].iloc[i], alone.bse, rtol=1e-6)
    np.testing.assert_allclose(batch.df[names].iloc[i], alone.df, rtol=1e-6)
    assert batch.params.iloc[i].drop(names).isna().all()
    size = float(np.abs(alone.cov_re.to_numpy()).max()) + 1e-3 * alone.scale
    np.testing.assert_allclose(batch.cov_re[i], alone.cov_re, atol=1e-5 * size)
    assert batch.scale.iloc[i] == pytest.approx(alone.scale, rel=1e-6)
    assert batch.record.singular[i] == alone.singular
    assert batch.n_obs[i] == alone.nobs


@pytest.fixture(scope="module")
def batch(data: pd.DataFrame) -> lmmax.BatchFit:
    return lmmax.fit_many("y ~ x + f + (1 + x | g)", data, by="store", tests=TESTS)


def test_every_subset_equals_a_fit_of_its_rows(data: pd.DataFrame, batch: lmmax.BatchFit) -> None:
    singular = 0
    for i in [i for i in range(N_STORES) if i not in FAIL]:
        rows = data[data["store"] == 100 + i]
        alone = quiet(lmmax.fit, "y ~ x + f + (1 + x | g)", rows)
        check_lane(batch, i, alone)
        singular += alone.singular
    assert 0 < singular < N_STORES - len(FAIL)
    assert list(batch.names) == list(range(100, 100 + N_STORES))


def test_aliased_coefficients_and_their_tests_are_missing(batch: lmmax.BatchFit) -> None:
    assert batch.params.loc[100 + NO_LEVEL].isna().tolist() == [False, False, False, True]
    assert batch.params.loc[100 + EXACT_X].isna().tolist() == [False, False, True, False]
    # x comes first and stays; f[T.b] is equal to it.
    assert np.isfinite(batch.test("slope").loc[100 + EXACT_X, "p"])
    assert np.isnan(batch.test("both").loc[100 + EXACT_X, "p"])
    both = batch.test("both").loc[100]
    expected = batch[100].f_test(TESTS["both"])
    assert both["F"] == pytest.approx(expected.statistic, rel=1e-6)
    assert both["df_den"] == pytest.approx(expected.df_denom, rel=1e-5)


def test_what_cannot_be_fitted_says_so_and_disturbs_nobody(batch: lmmax.BatchFit) -> None:
    assert list(np.flatnonzero(~batch.converged)) == sorted(FAIL)
    assert batch.params.iloc[list(FAIL)].isna().all(axis=None)
    words = ["too_few", "too_few", "constant", "infinite", "explained"]
    assert batch.certificate["status"].iloc[list(FAIL)].tolist() == words
    for store, message in {
        ONE_GROUP: "'g' has one level in this subset",
        FEW: "2 observations cannot estimate 2",
        CONSTANT: "exact linear combination",
        INFINITE: "column '109' is infinite in 1 row",
        EXPLAINED: "exact linear combination",
    }.items():
        with pytest.raises(lmmax.DataError, match=message):
            quiet(batch.__getitem__, 100 + store)


def test_an_entry_is_the_fit_of_the_subset(data: pd.DataFrame, batch: lmmax.BatchFit) -> None:
    alone = batch[102]
    rows = data[data["store"] == 102]
    assert isinstance(alone, lmmax.Fit)
    assert list(alone.fittedvalues.index) == list(rows.index)
    same = lmmax.fit("y ~ x + f + (1 + x | g)", rows)
    np.testing.assert_allclose(alone.params, same.params, rtol=1e-8)
    with pytest.raises(KeyError, match="3 is no response"):
        batch[3]


@pytest.mark.parametrize(
    ("formula", "options"),
    [
        ("y ~ x + (1 + x | g)", {"reml": False, "weights": "w", "offset": "o"}),
        ("y ~ x + (1 | g) + (0 + x | g)", {}),
        ("y ~ x + cs(1 + x | g)", {}),
    ],
)
def test_other_models(data: pd.DataFrame, formula: str, options: dict[str, Any]) -> None:
    """Weights and offsets, uncorrelated terms; structures, which are fitted one by one."""
    data = data[data["store"] < 103]
    batch = lmmax.fit_many(formula, data, by="store", **options)
    for i in range(3):
        check_lane(batch, i, lmmax.fit(formula, data[data["store"] == 100 + i], **options))
    assert ("in lanes" in batch.engine) == ("cs" not in formula)


def test_the_origin_of_a_covariate_does_not_matter(
    data: pd.DataFrame, batch: lmmax.BatchFit
) -> None:
    """Slopes are the same, and so is what is known of them, at the boundary as well."""
    far = lmmax.fit_many(
        "y ~ x + f + (1 + x | g)", data.assign(x=data["x"] + 1e4), by="store", tests=TESTS
    )
    # Far from its origin x is rounded, and no longer explains what it explained.
    rest = np.delete(np.arange(N_STORES), EXPLAINED)
    slopes = [far.design.x_names.index(name) for name in ("x", "f[T.b]", "f[T.c]")]
    np.testing.assert_array_equal(far.record.singular[rest], batch.record.singular[rest])
    np.testing.assert_allclose(far.llf.iloc[rest], batch.llf.iloc[rest], atol=1e-7)
    for name in ("bse", "df"):
        found, expected = (getattr(b.record, name)[rest][:, slopes] for b in (far, batch))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_subsets_whose_start_fails_are_solved_from_another(
    data: pd.DataFrame, batch: lmmax.BatchFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = sys.modules["lmmax.batch.solve"]
    moments = solver.moment_start
    monkeypatch.setattr(solver, "moment_start", lambda problem: np.nan * moments(problem))
    found = lmmax.fit_many("y ~ x + f + (1 + x | g)", data, by="store", tests=TESTS)
    np.testing.assert_array_equal(found.converged, batch.converged)
    np.testing.assert_allclose(found.llf, batch.llf, rtol=1e-10)


def test_several_columns_and_crossed_factors() -> None:
    penicillin = lmmax.datasets.load("penicillin")
    halves = pd.concat([penicillin.assign(half=h, lab="one") for h in ("u", "v")])
    halves["diameter"] += np.where(halves["half"] == "v", 1.0, 0.0)
    batch = lmmax.fit_many("diameter ~ 1 + (1 | plate) + (1 | sample)", halves, by=["lab", "half"])
    assert list(batch.names) == [("one", "u"), ("one", "v")]
    assert list(batch.names.names) == ["lab", "half"]
    alone = lmmax.fit("diameter ~ 1 + (1 | plate) + (1 | sample)", penicillin)
    check_lane(batch, 0, alone)
    np.testing.assert_allclose(batch.params["Intercept"].diff().iloc[1], 1.0, rtol=1e-9)
    assert batch["one", "v"].llf == pytest.approx(alone.llf, abs=1e-6)


@pytest.mark.parametrize("large", [subsets.LARGE, 100])
def test_subsets_of_many_groups_and_groups_far_apart(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not compressed with others: merged patterns, and a poor centre of least squares.

    And what is fitted alone, because it is large.
    """
    monkeypatch.setattr(subsets, "LARGE", large)
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(200), 3)
    x = rng.normal(size=600)
    many = pd.DataFrame({"s": "many", "g": g, "x": x})
    many["y"] = 0.5 * x + rng.normal(size=200)[g] + rng.normal(size=600)
    h = np.repeat(np.arange(10), 6)
    z = rng.normal(size=60) + 100.0 * h
    far = pd.DataFrame({"s": "far", "g": h, "x": z, "y": 1e3 * (z - 100.0 * h)})
    far["y"] += rng.normal(size=60)
    both = pd.concat([many, far], ignore_index=True)
    batch = lmmax.fit_many("y ~ x + (1 | g)", both, by="s")
    for i, part in enumerate((far, many)):
        check_lane(batch, i, lmmax.fit("y ~ x + (1 | g)", part))


def test_results_do_not_depend_on_chunks_workers_or_the_store(
    data: pd.DataFrame, batch: lmmax.BatchFit, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"by": "store", "tests": TESTS, "chunk": 5, "out": tmp_path / "r"}
    with ThreadPoolExecutor(2) as pool:
        there = lmmax.fit_many("y ~ x + f + (1 + x | g)", data, executor=pool, **options)
    again = lmmax.fit_many("y ~ x + f + (1 + x | g)", data, resume=True, **options)
    for mine, other, stored in zip(batch.record, there.record, again.record, strict=True):
        np.testing.assert_allclose(other, mine, rtol=1e-12)
        np.testing.assert_array_equal(stored, other)
    other_rows = data.assign(store=data["store"].to_numpy()[::-1])
    with pytest.raises(ValueError, match="rows"):
        lmmax.fit_many("y ~ x + f + (1 + x | g)", other_rows, resume=True, **options)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as workers:
        elsewhere = lmmax.fit_many("y ~ x + f + (1 + x | g)", data, by="store", executor=workers)
    np.testing.assert_allclose(elsewhere.params, batch.params, rtol=1e-12)
    loaded = pickle.loads(pickle.dumps(batch))
    np.testing.assert_array_equal(loaded.params, batch.params)


def test_rows_with_missing_values_are_left_out(data: pd.DataFrame) -> None:
    data = data[data["store"] < 103]
    gappy = data.astype({"store": float})
    gappy.iloc[0, 0], gappy.iloc[1, 2] = np.nan, np.nan
    extra = gappy.iloc[[2]].assign(store=999.0, y=np.nan)
    found = lmmax.fit_many("y ~ x + (1 | g)", pd.concat([gappy, extra]), by="store")
    same = lmmax.fit_many("y ~ x + (1 | g)", data.iloc[2:], by="store")
    assert list(found.names) == [100, 101, 102, 999]
    np.testing.assert_allclose(found.params[:3], same.params, rtol=1e-10)
    assert found.n_obs[3] == 0 and not found.converged[3]
    text = " ".join(found.notes)
    assert "store 1" in text and "x 1" in text and "1 subset without complete rows" in text
    with pytest.raises(lmmax.DataError, match="no rows"):
        found[999]
    with pytest.raises(lmmax.DataError, match="by='store' has missing values"):
        lmmax.fit_many("y ~ x + (1 | g)", gappy, by="store", missing="raise")


def test_wrong_arguments(data: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="one of responses= "):
        lmmax.fit_many("y ~ x + (1 | g)", data)
    with pytest.raises(ValueError, match="one of responses= "):
        lmmax.fit_many("y ~ x + (1 | g)", data, ["y"], by="store")
    with pytest.raises(lmmax.DataError, match="by='shop'"):
        lmmax.fit_many("y ~ x + (1 | g)", data, by="shop")
    for by, message in (
        ([], "names no column"),
        (["store", "store"], "names 'store' more than once"),
        (data["store"], "by must be the name of a column of data, .* hold a Series"),
    ):
        with pytest.raises(lmmax.DataError, match=message):
            lmmax.fit_many("y ~ x + (1 | g)", data, by=by)
