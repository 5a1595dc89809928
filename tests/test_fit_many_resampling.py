"""`resample`: every replicate is the fit that a plain loop makes, and what is counted of them."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.batch import resampling
from lmmax.batch.exchange import (
    Exchange,
    ExchangeError,
    Rearrangement,
    blocks_of,
    cells,
    exchange_of,
    independent_blocks,
)
from lmmax.batch.replicates import Drawer, LineTester, Model
from lmmax.batch.resampling import Resampled, resample
from lmmax.constraints import Settings
from lmmax.design import Design, build_design
from lmmax.inference.denominator import HypothesisError
from lmmax.simulate import generator

pytestmark = pytest.mark.unoptimised

GROUPS, VISITS = 6, 4
EXACT = 1e-8


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    """Six groups in three sizes of design, a covariate in each direction, weights."""
    rng = np.random.default_rng(1)
    g = np.repeat(np.arange(GROUPS), VISITS)
    order = rng.permutation(GROUPS * VISITS)
    frame = pd.DataFrame(
        {
            "g": g,
            "t": np.tile(np.arange(VISITS, dtype=float), GROUPS),
            "x": np.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])[g],
            "u": rng.normal(size=len(g)),
            "w": np.array([1.0, 1.0, 2.0, 2.0, 3.0, 1.0])[g],
        }
    )
    return frame.iloc[order].reset_index(drop=True)


def responses(data: pd.DataFrame, k: int, seed: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    g, t = pd.factorize(data["g"])[0], data["t"].to_numpy()
    y = 5.0 + rng.normal(size=(len(g), k)) + rng.normal(size=(g.max() + 1, k))[g]
    return np.asarray(y + 0.4 * t[:, None] * (np.arange(k) == 0))


def null_parts(X: np.ndarray, w: np.ndarray, y: np.ndarray, column: int, value: float) -> Any:
    """Fitted values and residuals of weighted least squares with one coefficient held."""
    others = np.delete(X, column, axis=1)
    held = value * X[:, column]
    root = np.sqrt(w)[:, None]
    beta = np.linalg.lstsq(others * root, (y - held) * root[:, 0], rcond=None)[0]
    fitted = others @ beta + held
    return fitted, y - fitted


def t_of(formula: str, data: pd.DataFrame, y: np.ndarray, name: str, value: float, w: Any) -> float:
    fit = lmmax.fit(f"y {formula}", data.assign(y=y), weights=w)
    return float((fit.params[name] - value) / fit.bse[name])


def moved(kind: str, e: np.ndarray, data: pd.DataFrame, keys: np.ndarray, w: np.ndarray) -> Any:
    """Rearrange errors as the documentation says, one row or group after the other."""
    g = data["g"].to_numpy()
    found = e.copy()
    if kind == "within":
        for group in np.unique(g):
            rows = np.flatnonzero(g == group)
            found[rows] = e[rows[np.argsort(keys[rows])]]
        return found
    labels = list(dict.fromkeys(g))  # numbered as they come
    if kind == "flip":
        return e * keys[[labels.index(group) for group in g]]
    for weight in np.unique(w):
        own = [i for i, group in enumerate(labels) if w[g == group][0] == weight]
        for place, comes in zip(own, sorted(own, key=lambda i: keys[i]), strict=True):
            found[g == labels[place]] = e[g == labels[comes]]
    return found


CASES = [
    ("within", "~ t + x + (1 | g)", "t", 0.1, False),
    ("whole", "~ t + x + (1 | g)", "x", 0.0, True),
    ("flip", "~ t + x + (1 | g)", "x", 0.0, True),
    ("flip", "~ t + (1 + t | g)", "t", 0.0, False),
]


def slopes() -> pd.DataFrame:
    """Eighteen groups of ten rows, the shapes of which other tests compile too."""
    sleep = lmmax.datasets.load("sleepstudy")
    return sleep.rename(columns={"Subject": "g", "Days": "t"})


@pytest.mark.parametrize(("kind", "formula", "name", "value", "weighted"), CASES)
def test_replicates_are_those_of_a_plain_loop(
    data: pd.DataFrame, kind: str, formula: str, name: str, value: float, weighted: bool
) -> None:
    data = slopes() if "1 + t" in formula else data
    y, seed, n = responses(data, 3), 4, 3
    groups = data["g"].nunique()
    w = data["w"].to_numpy() if weighted else np.ones(len(data))
    batch = lmmax.fit_many(formula, data, y, weights=w if weighted else None)
    found = resample(
        batch, {"test": f"{name} = {value}"}, n=n, seed=seed, exchange=kind if weighted else "auto"
    )
    assert f"exchange={kind!r}" in found.notes[0]
    j = batch.design.x_names.index(name)
    expected = np.empty((n + 1, 3))
    for lane, column in enumerate(y.T):
        fitted, e = null_parts(batch.design.X, w, column, j, value)
        for r in range(n + 1):
            star = column
            if r:
                rng = generator(seed, r - 1)
                keys = (
                    rng.choice([-1.0, 1.0], size=groups)
                    if kind == "flip"
                    else rng.random(len(data) if kind == "within" else groups)
                )
                star = fitted + moved(kind, e, data, keys, w)
            weights = w if weighted else None
            expected[r, lane] = t_of(formula, data, star, name, value, weights)
    np.testing.assert_allclose(found.statistic[:, 0], expected[0], rtol=EXACT, atol=EXACT)
    largest = np.abs(expected[1:]).max(axis=1)
    np.testing.assert_allclose(found.maxima[0], largest, rtol=EXACT, atol=EXACT)
    count = (np.abs(expected[1:]) >= np.abs(expected[0])).sum(axis=0)
    assert found.exceeded[:, 0].tolist() == count.tolist()
    assert found.test()["p"].tolist() == ((1 + count) / (n + 1)).tolist()


def test_few_rearrangements_are_all_used(data: pd.DataFrame) -> None:
    y = responses(data, 2)
    formula = "~ t + x + (1 | g)"
    batch = lmmax.fit_many(formula, data, y)
    found = resample(batch, ["x"], exchange="flip", n=99)
    t = np.empty((2**GROUPS, 2))
    g = data["g"].to_numpy()
    for lane, column in enumerate(y.T):
        fitted, e = null_parts(batch.design.X, np.ones(len(data)), column, 2, 0.0)
        signs = np.array(list(itertools.product([1.0, -1.0], repeat=GROUPS)))
        every = lmmax.fit_many(formula, data, fitted[:, None] + e[:, None] * signs[:, g].T)
        t[:, lane] = np.abs(every.tvalues["x"])
    table = found.test("x")
    least = t[0] * (1.0 - 1e-6)
    assert table["p"].tolist() == (t >= least).mean(axis=0).tolist()
    assert table["p_fwe"].tolist() == (t.max(axis=1)[:, None] >= least).mean(axis=0).tolist()
    assert found.notes == (
        "x: exchange='flip' (as asked for), all 63 other rearrangements; no p-value is below "
        "0.0156",
    )
    # All rearrangements and the observed one: five percent of 64 are three.
    assert found.critical("x") == pytest.approx(np.sort(t.max(axis=1))[-4], rel=EXACT)
    whole = resample(batch, ["x"], n=719)
    assert "exchange='whole'" in whole.notes[0] and "all 719 other" in whole.notes[0]
    # Of 6! orders of two groups of three, each division into two comes 36 times.
    assert ((whole.exceeded[:, 0] + 1) % 36 == 0).all()


@pytest.fixture(scope="module")
def long() -> Resampled:
    """Responses without any effect, whose p-values are uniform."""
    return resample(null_batch(400), ["x"], n=19, seed=1)


def null_batch(k: int, formula: str = "~ x + (1 | g)") -> lmmax.BatchFit:
    rng = np.random.default_rng(3)
    g = np.repeat(np.arange(16), 3)
    y = rng.normal(size=(48, k)) + rng.normal(size=(16, k))[g]
    return lmmax.fit_many(
        formula, pd.DataFrame({"g": g, "x": g % 2.0, "t": rng.normal(size=48)}), y
    )


def test_level_under_the_null(long: Resampled) -> None:
    p = long.test("x")["p"]
    assert "exchange='whole'" in long.notes[0]
    assert not long.failed.any()
    # A binomial number of 400 at 5 %: 20, with a standard deviation of 4.4; of 50 %: 200, 10.
    assert 7 <= (p <= 0.05).sum() <= 33
    assert 170 <= (p <= 0.5).sum() <= 230


@pytest.mark.parametrize("method", ["wild", "parametric"])
def test_level_of_the_bootstraps(method: str) -> None:
    found = resample(null_batch(400), ["x"], method=method, n=19)
    p = found.test()["p"]
    assert 7 <= (p <= 0.05).sum() <= 33
    assert 170 <= (p <= 0.5).sum() <= 230


def test_over_all_responses(long: Resampled) -> None:
    table = long.test("x")
    assert (table["p_fwe"] >= table["p"]).all()
    scores = table["t"].abs()
    assert ((table["p_fwe"] <= 0.2) == (scores > long.critical("x", 0.2))).all()
    assert long.critical("x", 0.04) == max(long.maxima[0].max(), scores.max())
    frame = long.frame()
    assert list(frame.columns) == ["response", "test", "statistic", "p", "p_fwe", "failed"]
    assert len(frame) == 400 and "whole" in str(long) and "whole" in long._repr_html_()


def test_results_do_not_depend_on_the_chunks(data: pd.DataFrame) -> None:
    y = responses(data, 9)
    y[3, 4] = np.nan
    y[:, 6] = 1.0
    y[0, 7] = np.inf
    tests = {"x": "x", "both": "x = 0, t = 0.1"}
    batch = lmmax.fit_many("~ t + x + (1 | g)", data, y, tests=tests)
    for options in ({"method": "parametric"}, {"method": "wild"}, {"exchange": "flip"}):
        whole = resample(batch, n=5, **options)
        parts = resample(batch, n=5, chunk=2, **options)
        assert np.flatnonzero(np.isnan(whole.test("x")["p"])).tolist() == [6, 7]
        np.testing.assert_allclose(whole.statistic, batch.record.statistic, rtol=1e-6)
        for one, other in zip(whole.maxima, parts.maxima, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)
        assert (whole.exceeded == parts.exceeded).all()
        if "method" in options:
            how = {"wild": "webb multipliers for 6 groups", "parametric": "reduced model (REML)"}
            assert how[options["method"]] in whole.notes[0]


def test_lanes_do_not_depend_on_the_chunks() -> None:
    data = slopes()
    y, tests = responses(data, 3), {"both": "Intercept = 4, t = 0.1"}
    batch = lmmax.fit_many("~ t + (1 + t | g)", data, y, tests=tests)
    whole = resample(batch, n=5, method="wild")
    parts = resample(batch, n=5, method="wild", chunk=2)
    np.testing.assert_allclose(whole.statistic, batch.record.statistic, rtol=1e-6)
    np.testing.assert_allclose(whole.maxima[0], parts.maxima[0], rtol=1e-9)
    assert "rademacher multipliers for 18 groups" in whole.notes[0]


def test_draws_have_the_covariance_of_the_model() -> None:
    """Against the closed form, at four standard errors of an empirical covariance."""
    frame = pd.DataFrame({"g": [0, 0, 1, 1, 1], "t": [0.0, 1, 0, 1, 2], "h": list("aabbc")})
    w, lanes = np.array([1.0, 2.0, 1.0, 0.5, 1.0]), 20_000
    formula = "~ 1 + (1 + t | g) + (1 | h)"
    K = pd.DataFrame([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]], list("abc"), list("abc"))
    y = np.random.default_rng(0).normal(size=(5, 1))
    spec: dict[str, Any] = {"weights": w, "relmat": {"h": K}}
    design = build_design("y " + formula, frame.assign(y=y), **spec)
    psi = np.array([[2.0, 0.6], [0.6, 0.5]])
    rows = np.array([0, 2, 3, 4])
    roots = (np.tile(np.linalg.cholesky(psi), (lanes, 1, 1)), np.full((lanes, 1, 1), 1.5))
    drawn = Drawer(design, rows, roots, np.full(lanes, 0.7), np.arange(lanes)).draw(0, 0)
    Z = np.column_stack([np.ones(5), frame["t"]])
    same = frame["g"].to_numpy()[:, None] == frame["g"].to_numpy()
    h = pd.factorize(frame["h"])[0]
    V = same * (Z @ psi @ Z.T) + 2.25 * K.to_numpy()[np.ix_(h, h)] + np.diag(0.49 / w)
    V = V[np.ix_(rows, rows)]
    error = np.sqrt((np.outer(np.diag(V), np.diag(V)) + V**2) / lanes)
    assert (np.abs(drawn @ drawn.T / lanes - V) < 4.0 * error).all()
    some = Drawer(design, rows, tuple(r[70:75] for r in roots), np.full(5, 0.7), np.arange(70, 75))
    assert (some.draw(0, 0) == drawn[:, 70:75]).all()


def test_one_that_stops_goes_on(data: pd.DataFrame, tmp_path: Path, monkeypatch: Any) -> None:
    batch = lmmax.fit_many("~ t + x + (1 | g)", data, responses(data, 6))
    whole = resample(batch, ["x", "t"], n=5)
    out = tmp_path / "found.npz"
    add, calls = resampling.Run.add, []

    def stops(self: Any, state: Any, y: np.ndarray, told: Any) -> None:
        calls.append(state.done)
        if calls == [0, 2]:
            raise KeyboardInterrupt
        add(self, state, y, told)

    monkeypatch.setattr(resampling.Run, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        resample(batch, ["x", "t"], n=5, chunk=2, out=out)
    with pytest.raises(lmmax.DataError, match="resume=True"):
        resample(batch, ["x", "t"], n=5, out=out)
    with pytest.raises(lmmax.DataError, match="other work"):
        resample(batch, ["x", "t"], n=6, out=out, resume=True)
    found = resample(batch, ["x", "t"], n=5, chunk=2, out=out, resume=True)
    assert calls == [0, 2, 2, 4]
    assert (found.exceeded == whole.exceeded).all()
    np.testing.assert_allclose(np.array(found.maxima), np.array(whole.maxima), rtol=1e-9)


def test_responses_times_replicates_are_not_kept(monkeypatch: Any) -> None:
    batch, peaks = null_batch(1024), []
    monkeypatch.setattr(resampling, "TOGETHER", 512)
    for n in (4, 68):
        tracemalloc.start()
        resample(batch, ["x"], n=n, chunk=128, exchange="flip")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 64 more replicates of 1,024 responses would be 512 KiB.
    assert peaks[1] - peaks[0] < 1 << 18


def test_missing_values_leave_the_other_rows(data: pd.DataFrame) -> None:
    y = responses(data, 2)
    y[5, 1] = y[11, 1] = np.nan
    there = np.isfinite(y[:, 1])
    for method, exchange in (("permutation", "flip"), ("wild", "auto")):
        options: dict[str, Any] = {"method": method, "exchange": exchange, "n": 20}
        both = resample(lmmax.fit_many("~ t + x + (1 | g)", data, y), ["x"], **options)
        alone = resample(
            lmmax.fit_many("~ t + x + (1 | g)", data[there], y[there, 1:]), ["x"], **options
        )
        assert both.exceeded[1, 0] == alone.exceeded[0, 0]
        assert both.statistic[1, 0] == pytest.approx(alone.statistic[0, 0], rel=EXACT)


def one_by_one(found: Resampled, alone: list[Resampled]) -> None:
    """Each response as by itself, and the largest statistic that of all of them."""
    assert found.exceeded.tolist() == [each.exceeded[0].tolist() for each in alone]
    np.testing.assert_allclose(
        found.statistic[:, 0], [each.statistic[0, 0] for each in alone], rtol=EXACT
    )
    largest = np.max([each.maxima[0] for each in alone], axis=0)
    np.testing.assert_allclose(found.maxima[0], largest, rtol=EXACT)


def test_designs_that_differ_by_response(data: pd.DataFrame) -> None:
    rng, formula = np.random.default_rng(5), "~ t + x + (1 | g)"
    y = responses(data, 2)
    y[4, 1] = np.nan
    weights, offset = rng.uniform(0.5, 2.0, size=(2, *y.shape))
    varied = lmmax.fit_many(formula, data, y, weights=weights, offset=offset)
    for options in ({"exchange": "flip"}, {"method": "wild"}):
        alone = [
            resample(
                lmmax.fit_many(
                    formula, data, y[:, [j]], weights=weights[:, j], offset=offset[:, j]
                ),
                ["t"],
                n=5,
                **options,
            )
            for j in range(2)
        ]
        one_by_one(resample(varied, ["t"], n=5, **options), alone)
    with pytest.raises(ExchangeError, match=r"weights differ by response.*flip"):
        resample(varied, ["t"], exchange="within")
    drawn = [resample(varied, ["t"], n=5, method="parametric", chunk=c) for c in (1, 2)]
    assert (drawn[0].maxima[0] == drawn[1].maxima[0]).all()
    assert len(np.unique(drawn[0].maxima[0])) == 5

    of_offset = resample(lmmax.fit_many(formula, data, y, offset=offset), ["x"], n=5)
    plain = resample(lmmax.fit_many(formula, data, y - offset), ["x"], n=5)
    assert (of_offset.exceeded == plain.exceeded).all()
    np.testing.assert_allclose(of_offset.maxima[0], plain.maxima[0], rtol=EXACT)

    columns, model = rng.normal(size=y.shape), "~ t + s + (1 | g)"
    scan = lmmax.fit_many(model, data, y[:, :1], scan={"s": columns})
    alone = [
        resample(lmmax.fit_many(model, data.assign(s=s), y[:, :1]), ["s"], n=5, exchange="within")
        for s in columns.T
    ]
    one_by_one(resample(scan, ["s"], n=5, exchange="within"), alone)

    frame = data.assign(y=y[:, 0], half=data["g"] < 3)
    by = resample(lmmax.fit_many(f"y {formula}", frame, by="half"), ["t"], n=99, exchange="flip")
    assert "all 63 other" in by.notes[0]
    for half, p in by.test()["p"].items():
        part = frame[frame["half"] == half]
        few = resample(lmmax.fit_many(formula, part, ["y"]), ["t"], n=99, exchange="flip")
        assert "all 7 other" in few.notes[0] and few.test()["p"].iloc[0] == p


def test_one_sided(data: pd.DataFrame) -> None:
    batch = lmmax.fit_many("~ t + x + (1 | g)", data, responses(data, 3))
    two, up, down = (
        resample(batch, ["t"], n=30, alternative=a) for a in ("two-sided", "greater", "less")
    )
    assert (up.exceeded + down.exceeded == 30).all()  # no ties
    np.testing.assert_allclose(np.maximum(up.maxima[0], down.maxima[0]), two.maxima[0], rtol=EXACT)


def test_a_replicate_without_a_fit_counts_against_its_response(
    data: pd.DataFrame, monkeypatch: Any
) -> None:
    batch = lmmax.fit_many("~ t + x + (1 | g)", data, responses(data, 3))
    sound = resample(batch, ["t"], n=10)
    tested = LineTester._tested

    def first_lane_fails(self: LineTester, stats: Any) -> np.ndarray:
        found = tested(self, stats)
        if len(found) > 3:  # not the observed ones
            found[::3] = np.nan
        return found

    monkeypatch.setattr(LineTester, "_tested", first_lane_fails)
    found = resample(batch, ["t"], n=10)
    assert found.failed[:, 0].tolist() == [10, 0, 0]
    assert found.test()["p"].tolist() == [1.0, *sound.test()["p"][1:]]
    assert found.test()["p_fwe"].iloc[0] == 1.0
    assert found.notes[-1].startswith("10 fits of replicates did not converge")
    assert np.isfinite(found.maxima[0]).all()


def test_statistics_of_rearranged_sums_are_those_of_rearranged_rows(data: pd.DataFrame) -> None:
    related = pd.DataFrame(np.kron(np.eye(3), [[1.0, 0.4], [0.4, 1.0]]))
    errors = responses(data, 4) - 5.0
    for relmat, weights in ((None, data["w"].to_numpy()), ({"g": related}, None)):
        design = build_design(
            "u ~ t + x + (1 | g)", data, relmat=relmat, weights=weights, missing="raise"
        )
        tester = Model(design, Settings()).tester(np.array([[0.0, 1.0, 0.0]]))
        assert isinstance(tester, LineTester)
        element = independent_blocks(design)
        assert element.max() + 1 == (GROUPS if relmat is None else 3)
        multipliers = resampling.MULTIPLIERS["webb"]
        moves = [Rearrangement(None, multipliers[[j, -2, 0, 4, 2, 5]][element]) for j in range(3)]
        if relmat is None:
            kind = blocks_of(design, element).kind
            keys = np.random.default_rng(5).random(GROUPS)
            on = Exchange("whole", element, kind, "").on(design, np.arange(len(data)))
            moves.append(on.of(keys))
        found = tester.replicates(errors)(moves)
        by_rows = [tester.statistics(move.of(errors)) for move in moves]
        np.testing.assert_allclose(found, by_rows, rtol=1e-9, atol=1e-10)


def test_blocks_and_cells() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "a": [0, 0, 0, 1, 1, 1, 2, 2, 2, 2],
            "b": [0, 0, 1, 2, 3, 3, 4, 4, 5, 5],
            "c": [0, 1, 2, 1, 0, 2, 0, 1, 2, 3],
            "z": [1.0, 1, 2, 1, 1, 2, 1, 1, 2, 2],
            "u": rng.normal(size=10),
            "y": rng.normal(size=10),
        }
    )

    def design(random: str) -> Design:
        return build_design(f"y ~ 1 + {random}", frame)

    nested = design("(1 | a) + (1 | b)")
    assert independent_blocks(nested).tolist() == frame["a"].tolist()
    assert cells(nested).tolist() == frame["b"].tolist()
    # The first two consist of a pair and a single row, but in another order.
    kinds = blocks_of(nested, independent_blocks(nested)).kind
    assert kinds[2] not in kinds[:2]
    slopes = design("(0 + z | a)")
    kinds = blocks_of(slopes, independent_blocks(slopes)).kind
    assert kinds[0] == kinds[1] != kinds[2]
    crossed = design("(1 | a) + (1 | c)")
    assert not independent_blocks(crossed).any()
    some = np.ones((10, 1))
    with pytest.raises(ExchangeError, match="use method='parametric'"):
        exchange_of(crossed, "flip", some)
    with pytest.raises(ExchangeError, match="no two rows have the same groups"):
        exchange_of(crossed, "within", some)
    with pytest.raises(ExchangeError, match="no two independent groups"):
        exchange_of(design("(0 + u | a)"), "whole", some)
    with pytest.raises(ExchangeError, match="no statistic would change"):
        exchange_of(slopes, "whole", some)
    assert exchange_of(nested, "auto", some).kind == "flip"
    among = np.array([1.0, -1, 0, 0, 1, -1, 1, -1, 1, -1])[:, None]
    assert exchange_of(nested, "auto", among).kind == "within"
    assert (
        exchange_of(slopes, "auto", np.repeat([1.0, -1.0, 0.0], [3, 3, 4])[:, None]).kind == "whole"
    )


def test_several_factors_one_after_the_other() -> None:
    pastes = lmmax.datasets.load("pastes")
    formula = "~ 1 + (1 | batch) + (1 | cask:batch)"
    y = pastes[["strength"]].to_numpy()
    found = resample(lmmax.fit_many(formula, pastes, y), {"mean": "Intercept = 59"}, n=1)
    assert "exchange='flip'" in found.notes[0]
    batches, e = pd.factorize(pastes["batch"])[0], y[:, 0] - 59.0
    star = 59.0 + e * generator(0, 0).choice([-1.0, 1.0], size=10)[batches]
    t = t_of(formula, pastes, star, "Intercept", 59.0, None)
    assert found.maxima[0][0] == pytest.approx(abs(t), rel=1e-6)


def test_mistakes_are_named(data: pd.DataFrame, tmp_path: Path) -> None:
    y = responses(data, 1)
    batch = lmmax.fit_many("~ t + x + (1 | g)", data, y)
    for options, words in (
        ({}, "nothing to test"),
        ({"tests": ["t"], "method": "jackknife"}, "method='jackknife'"),
        ({"tests": ["t"], "exchange": "all"}, "exchange='all'"),
        ({"tests": ["t"], "alternative": "up"}, "alternative='up'"),
        ({"tests": ["t"], "n": 0}, "n=0"),
        ({"tests": {"a": "t, x"}, "alternative": "less"}, "single combination"),
    ):
        with pytest.raises(ValueError, match=words):
            resample(batch, **options)
    with pytest.raises(KeyError, match="no coefficient"):
        resample(batch, ["z"])
    with pytest.raises(HypothesisError, match="not independent"):
        resample(batch, {"a": "t = 0, t = 1"})
    with pytest.raises(lmmax.DataError, match="read again"):
        resample(replace(batch, source=None), ["t"])
    with pytest.raises(ValueError, match="exchange='flip' is for method='permutation', not 'wild'"):
        resample(batch, ["t"], method="wild", exchange="flip")
    with pytest.raises(TypeError, match="not int"):
        resample(3, ["t"])  # type: ignore[arg-type]
    with pytest.raises(lmmax.DataError, match="directory that does not exist"):
        resample(batch, ["t"], out=tmp_path / "no" / "such.npz")
    np.savez(tmp_path / "other.npz", a=1)
    with pytest.raises(lmmax.DataError, match="holds no replicates"):
        resample(batch, ["t"], out=tmp_path / "other.npz", resume=True)
