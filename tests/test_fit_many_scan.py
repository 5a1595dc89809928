"""`fit_many` with a column, weights or an offset of each model: every model equals its own fit."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
import lmmax.batch.varied_work
from lmmax.batch.engines import Record
from lmmax.batch.store import StoreError
from tests.oracles import dense

pytestmark = pytest.mark.unoptimised

K = 8
MISSING, CONSTANT, ZERO, ALIASED, INFINITE = 2, 4, 5, 6, 7
TESTS = {"one": "snp = 0.1", "both": "snp = 0, age = 0.2"}


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    """Unbalanced groups, with a response that they explain in part."""
    rng = np.random.default_rng(1)
    codes = rng.permutation(np.repeat(np.arange(20), rng.integers(2, 7, size=20)))
    n = len(codes)
    frame = pd.DataFrame(
        {"g": codes, "h": codes % 3, **dict(zip("ot", rng.normal(size=(2, n)), strict=True))}
    )
    frame["age"] = rng.normal(40.0, 5.0, size=n)
    frame["y"] = 3.0 + rng.normal(size=20)[codes] + 0.1 * frame["age"] + rng.normal(size=n)
    return frame


@pytest.fixture(scope="module")
def columns(data: pd.DataFrame) -> np.ndarray:
    """Columns that vary within and between groups, and some that are special, (n, K)."""
    rng = np.random.default_rng(2)
    x = rng.integers(0, 3, size=(20, K))[data["g"]] + 0.3 * rng.normal(size=(len(data), K))
    x[3, MISSING] = np.nan
    x[:, CONSTANT], x[:, ZERO], x[:, ALIASED] = 1.5, 0.0, 2.0 * data["age"] - 1.0
    x[0, INFINITE] = np.inf
    return x


def alone(formula: str, data: pd.DataFrame, **options: Any) -> lmmax.Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmmax.RankWarning)
        return lmmax.fit(f"y {formula}", data, **options)


def check(batch: lmmax.BatchFit, i: int, fit: lmmax.Fit, rtol: float = 1e-8) -> None:
    """The model of a batch equals a fit, coefficients that have none among the equals."""
    assert abs(batch.llf.iloc[i] - fit.llf) < 1e-9 * abs(fit.llf)
    errors = fit.bse.fillna(1.0)
    np.testing.assert_allclose(batch.params.iloc[i] / errors, fit.params / errors, atol=rtol)
    np.testing.assert_allclose(batch.bse.iloc[i], fit.bse, rtol=rtol)
    np.testing.assert_allclose(batch.df.iloc[i], fit.df, rtol=max(rtol, 1e-6))
    assert batch.record.singular[i] == fit.singular
    assert batch.n_obs[i] == fit.nobs


SCANS = {
    "REML": ("~ age + snp + (1 | g)", True),
    "ML, interaction": ("~ snp * age + (1 | g)", False),
    "two effects": ("~ age + snp + (1 + t | g)", True),
}


@pytest.fixture(scope="module", params=list(SCANS))
def scanned(request: Any, data: pd.DataFrame, columns: np.ndarray) -> Any:
    formula, reml = SCANS[request.param]
    options: dict[str, Any] = {"scan": {"snp": columns}, "reml": reml, "tests": TESTS}
    return formula, reml, lmmax.fit_many(formula, data, ["y"], **options)


def test_every_column_equals_a_fit_of_its_own(
    scanned: Any, data: pd.DataFrame, columns: np.ndarray
) -> None:
    formula, reml, batch = scanned
    assert ("search on a line" in batch.engine) == ("1 + t" not in formula)
    assert batch.design.x_names == alone(formula, data.assign(snp=columns[:, 0])).design.x_names
    for i in range(K):
        if i == INFINITE:
            assert batch.certificate["status"].iloc[i] == "infinite"
            assert np.isnan(batch.params.iloc[i]).all()
            continue
        fit = alone(formula, data.assign(snp=columns[:, i]), reml=reml)
        check(batch, i, fit)
        if i in (CONSTANT, ZERO, ALIASED):
            assert np.isnan(batch.params.iloc[i]).sum() == 1 + ("*" in formula and i != ALIASED)
            assert np.isnan(batch.test("both")["F"].iloc[i])
            continue
        one, both = fit.t_test(TESTS["one"]).table.iloc[0], fit.f_test(TESTS["both"])
        assert batch.test("one")["t"].iloc[i] == pytest.approx(one["t"], rel=1e-7, abs=1e-8)
        assert batch.test("one")["df"].iloc[i] == pytest.approx(one["df"], rel=1e-6)
        assert batch.test("both")["F"].iloc[i] == pytest.approx(both.statistic, rel=1e-7)
        assert batch.test("both")["df_den"].iloc[i] == pytest.approx(both.df_denom, rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lmmax.RankWarning)
        for i in (MISSING, CONSTANT):
            check(batch, i, batch[i])
    assert batch.notes == ("1 model has missing values; each is fitted to the rows that it has",)


def test_a_scan_against_the_dense_model(scanned: Any, data: pd.DataFrame) -> None:
    _, reml, batch = scanned
    fit = batch[0]
    X, Z, y = fit.design.X, np.hstack([b.Z for b in fit.design.blocks]), data["y"].to_numpy()
    scale, cov_re = batch.scale.iloc[0], batch.cov_re[0]
    V = dense.covariance(Z, data["g"], cov_re, scale=scale)
    beta, A, _ = dense.gls(y, X, V)
    assert -2.0 * batch.llf.iloc[0] == pytest.approx(dense.criterion_at(y, X, V, reml), rel=1e-11)
    np.testing.assert_allclose(batch.params.iloc[0], beta, rtol=1e-8)
    np.testing.assert_allclose(batch.bse.iloc[0], np.sqrt(np.diag(np.linalg.inv(A))), rtol=1e-9)
    # At the optimum: no nearby covariance is more likely.
    nearby = [1.0 + 1e-3, 1.0 - 1e-3]
    for by in nearby:
        D = cov_re * by / scale
        assert dense.criterion(y, X, Z, data["g"], D, reml) > -2.0 * batch.llf.iloc[0] - 1e-9


def test_chunks_workers_and_directories_change_nothing(
    data: pd.DataFrame, columns: np.ndarray, tmp_path: Path
) -> None:
    formula, out = SCANS["REML"][0], tmp_path / "out"
    np.save(tmp_path / "x.npy", columns)
    whole = lmmax.fit_many(formula, data, ["y"], scan={"snp": columns})
    options: dict[str, Any] = {"scan": {"snp": tmp_path / "x.npy"}, "out": out, "chunk": 3}
    with ThreadPoolExecutor(2) as threads:
        parts = lmmax.fit_many(formula, data, ["y"], executor=threads, **options)
    (out / "chunk-000000000003.parquet").unlink()
    resumed = lmmax.fit_many(formula, data, ["y"], resume=True, **options)
    for name in Record._fields:
        np.testing.assert_allclose(
            getattr(parts.record, name), getattr(whole.record, name), rtol=1e-11, atol=1e-11
        )
        np.testing.assert_array_equal(getattr(resumed.record, name), getattr(parts.record, name))
    # The same responses, and other columns.
    options["scan"] = {"snp": np.roll(columns, 1, axis=1)}
    with pytest.raises(StoreError, match="models differ"):
        lmmax.fit_many(formula, data, ["y"], resume=True, **options)
    planned = lmmax.plan(formula, data, ["y"], scan={"snp": columns})
    assert planned.responses == K and planned.bytes_to_read == 8 * len(data) * (K + 1)


def test_a_relationship_matrix(data: pd.DataFrame, columns: np.ndarray) -> None:
    half = np.random.default_rng(3).normal(size=(20, 30))
    kinship = pd.DataFrame(half @ half.T / 30 + 0.1 * np.eye(20))
    formula, relmat = SCANS["REML"][0], {"g": kinship}
    frame = pd.DataFrame(columns[:, :2], columns=["a", "b"])
    weights = np.linspace(0.5, 2.0, len(data))
    batch = lmmax.fit_many(
        formula, data, ["y"], scan={"snp": frame}, relmat=relmat, weights=weights
    )
    assert "search on a line" in batch.engine and list(batch.names) == ["a", "b"]
    y, K_rows = data["y"].to_numpy(), kinship.to_numpy()[np.ix_(data["g"], data["g"])]
    for i in range(2):
        X = np.column_stack([np.ones(len(y)), data["age"], columns[:, i]])

        def criterion(ratio: float, X: np.ndarray = X) -> float:
            V = np.diag(1.0 / weights) + ratio * K_rows
            scale = dense.gls(y, X, V)[2] / (len(y) - 3)
            return float(dense.criterion_at(y, X, scale * V, True))

        scale, ratio = batch.scale.iloc[i], batch.cov_re[i, 0, 0] / batch.scale.iloc[i]
        V = scale * (np.diag(1.0 / weights) + ratio * K_rows)
        beta, A, rss = dense.gls(y, X, V)
        assert rss == pytest.approx(len(y) - 3, rel=1e-10)
        assert -2.0 * batch.llf.iloc[i] == pytest.approx(criterion(ratio), rel=1e-11)
        np.testing.assert_allclose(batch.params.iloc[i], beta, rtol=1e-9)
        np.testing.assert_allclose(batch.bse.iloc[i], np.sqrt(np.diag(np.linalg.inv(A))), rtol=1e-9)
        # The slope by central differences: rounding of the criterion over twice the step.
        step = 1e-4 * ratio
        assert abs(criterion(ratio + step) - criterion(ratio - step)) < 1e-9


def test_columns_are_paired_with_responses(data: pd.DataFrame, columns: np.ndarray) -> None:
    formula, rng = SCANS["REML"][0], np.random.default_rng(4)
    y = pd.DataFrame(data[["y"]].to_numpy() + rng.normal(size=(len(data), 3)), columns=list("abc"))
    y.loc[5, "b"] = np.nan
    y["c"] = 1e6 * columns[:, 3] + y["c"]  # a column that explains nearly all
    paired = lmmax.fit_many(formula, data, y, scan={"snp": columns[:, 1:4]})
    assert list(paired.names) == list("abc")
    one = lmmax.fit_many(formula, data, y, scan={"snp": columns[:, MISSING]})
    assert "of" not in one.engine.split(":")[0]  # as any other column
    for i, name in enumerate("abc"):
        own = data.assign(y=y[name])
        check(paired, i, alone(formula, own.assign(snp=columns[:, 1 + i])))
        check(one, i, alone(formula, own.assign(snp=columns[:, MISSING])))


@pytest.mark.parametrize("random", ["1", "1 + t"])
def test_models_that_lack_rows_of_their_own(
    data: pd.DataFrame, columns: np.ndarray, random: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and whole groups; in company, and with a design for each pattern."""
    formula, rng = f"~ age + snp + ({random} | g)", np.random.default_rng(7)
    x = columns[:, [0, 1, 3, 0, 1, 3]].copy()
    x[data["g"] == 3, 0], x[[0, 9, 10], 1], x[5, 2] = np.nan, np.nan, np.nan
    x[rng.random(len(x)) < 0.5, 3] = np.nan
    x[2:, 4] = np.nan
    own = data.assign(y=data["y"].where(data.index != 5))
    weights = np.linspace(0.5, 2.0, len(data))
    options: dict[str, Any] = {"scan": {"snp": x}, "weights": weights}
    batch = lmmax.fit_many(formula, own, ["y"], **options)
    for i in (0, 1, 2, 3, 5):
        check(batch, i, alone(formula, own.assign(snp=x[:, i]), weights=weights))
    assert batch.certificate["status"].iloc[4] == "too_few"
    monkeypatch.setattr(lmmax.batch.varied_work, "COMPANY", 1)
    each = lmmax.fit_many(formula, own, ["y"], **options)
    for name in ("params", "bse", "df", "llf", "cov_re"):
        values = [getattr(of.record, name) for of in (batch, each)]
        np.testing.assert_allclose(*values, rtol=1e-7, atol=1e-10, err_msg=name)
    assert each.record.status.tolist() == batch.record.status.tolist()


def test_slopes_over_equal_visits() -> None:
    """Groups with the same design are merged, whatever changes from model to model."""
    rng, k = np.random.default_rng(6), 3
    codes, visit = np.repeat(np.arange(30), 4), np.tile(np.arange(4.0), 30)
    frame = pd.DataFrame({"g": codes, "t": visit, "o": rng.normal(size=120)})
    b = rng.normal(size=(2, 30)) * [[1.0], [0.5]]
    frame["y"] = 9.0 + b[0][codes] + b[1][codes] * visit + frame["o"] + rng.normal(size=120)
    x = rng.integers(0, 3, size=(30, k))[codes].astype(float)
    x[:, 1] = 1e5 + rng.normal(size=120)
    x[:, 2] = 1.0
    weights = 1.0 + 0.5 * visit
    one = "~ t * snp + offset(o) + (1 + t | g)"
    options: dict[str, Any] = {"weights": weights, "reml": False}
    batch = lmmax.fit_many(one, frame, ["y"], scan={"snp": x}, **options)
    assert "in lanes" in batch.engine
    # Levels that probing values might follow; more columns than a search on a line takes.
    frame["h"] = np.random.default_rng(0).integers(0, 5, size=120)
    levels = lmmax.plan("~ snp:C(h) + (1 | g)", frame, ["y"], scan={"snp": x[:, :2]})
    assert "5 of 6 columns of X change: Newton's method in lanes" in levels.engine
    y = frame["y"].to_numpy()[:, None] + rng.normal(size=(120, k))
    y[:, 0] += 1e3 * x[:, 0]
    two = "~ t + snp + (1 + t || g)"
    paired = lmmax.fit_many(two, frame, y, scan={"snp": x})
    for i in range(k):
        own = frame.assign(snp=x[:, i])
        check(batch, i, alone(one, own, **options))
        check(paired, i, alone(two, own.assign(y=y[:, i])))


def test_offsets_and_weights_of_each_response(data: pd.DataFrame) -> None:
    rng = np.random.default_rng(5)
    n, k = len(data), 3
    y = data[["y"]].to_numpy() + rng.normal(size=(n, k))
    offset, weights = rng.normal(size=(n, k)), rng.uniform(0.5, 2.0, size=(n, k))
    y[4, 1], weights[4, 1], weights[6, 2], offset[7, 2] = np.nan, 0.0, np.nan, np.nan
    one, two = "~ age + offset(o) + (1 | g)", "~ age + offset(o) + (1 + t | g)"
    around = lmmax.fit_many(one, data, y, offset=offset)
    both = lmmax.fit_many(two, data, y, offset=offset, weights=pd.DataFrame(weights), chunk=2)
    weights[4, 1] = 1.0  # where there is no response
    for i in range(k):
        own = data.assign(y=y[:, i])
        check(around, i, alone(one, own, offset=offset[:, i]))
        check(both, i, alone(two, own, offset=offset[:, i], weights=weights[:, i]))
    check(both, 2, both[2])
    assert both.n_obs.tolist() == [n, n - 1, n - 2]


@pytest.mark.parametrize("what", ["weights", "scan"])
def test_models_that_lack_whole_groups_or_all_rows(
    data: pd.DataFrame, columns: np.ndarray, what: str
) -> None:
    """In a chunk of their own a group of which no row is left is not there."""
    y = np.repeat(data[["y"]].to_numpy(), 5, axis=1)
    y[data["g"] == 7, 0] = y[:, 1] = np.nan
    y[0, 2], y[:, 3] = np.inf, data["age"]
    own: dict[str, Any] = {"weights": np.tile(np.linspace(0.5, 2.0, len(y))[:, None], 5)}
    formula = "~ age + (1 | g)"
    if what == "scan":
        own, formula = {"scan": {"snp": columns[:, [0, 0, 0, 0, 1]]}}, "~ age + snp + (1 | g)"
    batch = lmmax.fit_many(formula, data, y, chunk=1, **own)
    ends = ["converged", "too_few", "infinite", "explained", "converged"]
    assert batch.certificate["status"].tolist() == ends
    for i in (0, 4):
        frame = data.assign(y=y[:, i], snp=columns[:, i // 4])
        weights = own["weights"][:, i] if what == "weights" else None
        check(batch, i, alone(formula, frame, weights=weights))


def test_a_model_that_lacks_a_random_effect_is_refused_alone(data: pd.DataFrame) -> None:
    y = np.repeat(data[["y"]].to_numpy(), 2, axis=1)
    y[data["h"] == 0, 1] = np.nan
    frame, options = data.assign(t=data["t"] * (data["h"] == 0)), {"weights": np.ones_like(y)}
    for chunk in (1, 2):
        batch = lmmax.fit_many("~ age + (1 + t | g)", frame, y, chunk=chunk, **options)
        assert batch.certificate["status"].tolist() == ["converged", "too_few"]


def test_groups_far_apart_in_a_scan(data: pd.DataFrame, columns: np.ndarray) -> None:
    apart = data.assign(y=data["y"] + 1e5 * np.sin(data["g"]))
    formula = "~ age + snp + (1 | g)"
    batch = lmmax.fit_many(formula, apart, ["y"], scan={"snp": columns[:, :2]})
    for i in range(2):
        check(batch, i, alone(formula, apart.assign(snp=columns[:, i])), rtol=1e-6)


@pytest.mark.parametrize(
    ("formula", "scan", "message"),
    [
        ("~ age", {"snp": K}, "scan='snp' is not in the formula"),
        ("~ I(snp**2)", {"snp": K}, r"I\(snp \*\* 2\)' is not linear in scan='snp'"),
        ("~ snp + np.log(snp)", {"snp": K}, r"np.log\(snp\)' is not linear"),
        ("~ scale(snp)", {"snp": K}, r"scale\(snp\)' is not linear"),
        ("~ age * C(snp)", {"snp": K}, r"C\(snp\)' is not linear"),
        ("~ snp + (0 + snp | h)", {"snp": K}, r"in the random term \(0 \+ snp \| h\)"),
        ("~ snp + offset(2 * snp)", {"snp": K}, "pass offset= a column per model"),
        ("~ snp", {"snp": 3}, "responses has 2 columns and scan has 3: model i takes column i"),
        ("~ snp", {"snp": 2, "age": 2}, "mapping with one entry"),
    ],
)
def test_wrong_scans(
    data: pd.DataFrame, columns: np.ndarray, formula: str, scan: dict[str, int], message: str
) -> None:
    y = data[["y", "t"]].to_numpy()
    given = {name: columns[:, :k] for name, k in scan.items()}
    with pytest.raises(lmmax.DataError, match=message):
        lmmax.fit_many(f"{formula} + (1 | g)", data, y, scan=given)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, r"response 't' in row 9 is 0: a row that says nothing may have a missing weight"),
        (-2.0, r"weights must be positive and finite, but that of response 't' in row 9 is -2"),
        (np.inf, r"response 't' in row 9 is inf"),
    ],
)
def test_wrong_weights(data: pd.DataFrame, value: float, message: str) -> None:
    weights = np.ones((len(data), 2))
    weights[9, 1] = value
    with pytest.raises(lmmax.DataError, match=message):
        lmmax.fit_many("~ age + (1 | g)", data, ["y", "t"], weights=weights)


def test_what_does_not_go_together(data: pd.DataFrame, columns: np.ndarray) -> None:
    with pytest.raises(ValueError, match="not with by="):
        lmmax.fit_many("y ~ snp + (1 | g)", data, by="h", scan={"snp": columns})
    with pytest.raises(lmmax.DataError, match="scan has 5 rows, data has"):
        lmmax.fit_many("~ snp + (1 | g)", data, ["y"], scan={"snp": columns[:5]})
    chunks = (data[["y"]].to_numpy() for _ in range(2))
    with pytest.raises(lmmax.DataError, match="responses is an iterator"):
        lmmax.fit_many("~ snp + (1 | g)", data, chunks, scan={"snp": columns})
