"""Statistics of many responses: they are the data's, saved, merged and fitted without the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.batch.artifact import write
from lmmax.batch.rotation import rotate, rotation
from lmmax.batch.sufficient import SufficientStatistics, sufficient_statistics
from lmmax.design import DataError
from lmmax.formula import FormulaError
from lmmax.known_covariance import PartlyKnown
from tests.reference import load_data, load_record

pytestmark = pytest.mark.unoptimised

MODEL = "~ Days * group + (1 + Days | Subject)"
SMALLER = {
    "same": (MODEL, {}),
    "intercept": ("~ Days * group + (1 | Subject)", {}),
    "slope": ("~ Days + group + (0 + Days | Subject)", {}),
    "uncorrelated": ("~ Days * group + (1 + Days || Subject)", {}),
    "mean": ("~ 1 + (1 | Subject)", {}),
    "columns": (None, {"columns": ["Intercept", "Days", "Days:group[T.b]"]}),
}
TESTS = {"one": "Intercept = 200", "none": "Intercept = 250"}
BAD = {3: "constant", 4: "infinite", 5: "too_few", 6: "explained"}
GAPS = [0, 7]


def make_data() -> tuple[pd.DataFrame, np.ndarray]:
    """Twelve responses on unbalanced groups; boundary ones, gaps, and some without a fit."""
    rng = np.random.default_rng(3)
    sleep = lmmax.datasets.load("sleepstudy").drop(index=[3, 17, 60, 61]).reset_index(drop=True)
    codes, days = pd.factorize(sleep["Subject"])[0], sleep["Days"].to_numpy(dtype=float)
    sleep["group"] = np.where(codes % 3 == 0, "b", "a")
    sleep["w"] = rng.uniform(0.5, 2.0, len(sleep))
    sd = np.where(np.arange(12) % 4 == 1, 0.0, 20.0)
    y = 250.0 + 10.0 * days[:, None] + (sd * rng.normal(size=(18, 12)))[codes]
    y += (0.3 * sd * rng.normal(size=(18, 12)))[codes] * days[:, None]
    y += 25.0 * rng.normal(size=y.shape)
    y[:, 3], y[9, 4], y[:, 5], y[:, 6] = 4.0, np.inf, np.nan, 3.0 + 2.0 * days
    y[:4, 0] = y[:4, 7] = np.nan
    return sleep, y


DATA, Y = make_data()


def check_same(found: lmmax.BatchFit, expected: lmmax.BatchFit) -> None:
    """Criterion and coefficients 1e-9 relative, degrees of freedom 1e-7."""
    a, b = found.record, expected.record
    np.testing.assert_array_equal(a.status, b.status)
    np.testing.assert_array_equal(a.singular, b.singular)
    np.testing.assert_array_equal(found.n_obs, expected.n_obs)
    np.testing.assert_allclose(a.llf, b.llf, rtol=1e-9)
    some = np.nanmax(b.bse, axis=1, keepdims=True, initial=0.0)
    assert np.nanmax(np.abs(a.params - b.params) / (some + np.abs(b.params))) < 1e-9
    np.testing.assert_allclose(a.bse, b.bse, rtol=5e-9)
    np.testing.assert_allclose(a.df, b.df, rtol=1e-7)
    np.testing.assert_allclose(a.scale, b.scale, rtol=1e-8)
    size = np.abs(b.cov_re).max(axis=(1, 2), keepdims=True) + b.scale[:, None, None]
    assert np.nanmax(np.abs(a.cov_re - b.cov_re) / size) < 1e-7
    np.testing.assert_allclose(a.statistic, b.statistic, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(a.df_den, b.df_den, rtol=1e-7)


@pytest.fixture(scope="module")
def statistics() -> SufficientStatistics:
    return sufficient_statistics(MODEL, DATA, Y, weights="w")


def criterion(X: np.ndarray, Z: np.ndarray, y: np.ndarray, d: float) -> float:
    """Return twice the dense restricted log-likelihood at variances given, constants apart."""
    V = np.eye(len(y)) + Z @ Z.T
    inverse = np.linalg.inv(V)
    inner = X.T @ inverse @ X
    left = y - X @ np.linalg.solve(inner, X.T @ inverse @ y)
    terms = np.linalg.slogdet(V)[1] + np.linalg.slogdet(inner)[1]
    return float(terms + d * np.log(left @ inverse @ left))


def test_rotated_rows_have_the_likelihood_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    n = 60
    codes = np.stack([rng.integers(0, 6, n), rng.integers(0, 3, n)])
    x = 2000.0 + rng.normal(size=n)
    X = np.column_stack([np.ones(n), x, codes[0] > 2])
    Z, weights = np.column_stack([np.ones(n), x - 2000.0, np.ones(n)]), rng.uniform(0.5, 2.0, n)
    y = (
        1e5
        + rng.normal(size=(n, 2))
        + np.array([0.0, 100.0])[None] * rng.normal(size=6)[codes[0], None]
    )
    turned = rotation(X, Z, codes, n, weights)
    found = rotate(turned, y)
    assert len(turned.X) < n - 10  # 36 from 18 cells, 2 from X, one for the rest

    def by_level(Z: np.ndarray, codes: np.ndarray) -> np.ndarray:
        first, second = np.eye(6)[codes[0]], np.eye(3)[codes[1]]
        return np.hstack(
            [1.5 * Z[:, [0]] * first, 0.7 * Z[:, [1]] * first, 0.4 * Z[:, [2]] * second]
        )

    root = np.sqrt(weights)[:, None]
    for lane in range(2):
        mine = criterion(turned.X, by_level(turned.Z, turned.codes), found.y[lane], n - 3)
        expected = criterion(
            root * X, root * by_level(Z, codes), root[:, 0] * (y[:, lane] - y[0, lane]), n - 3
        )
        assert mine == pytest.approx(expected, rel=1e-11)


def test_statistics_of_one_response_give_lme4s_fit() -> None:
    record = load_record("sleepstudy_int_reml")["results"]
    sleep = load_data("sleepstudy")
    fit = sufficient_statistics("~ Days + (1 | Subject)", sleep, ["Reaction"]).fit()
    assert fit.llf.iloc[0] == pytest.approx(record["logLik"], abs=1e-6)
    np.testing.assert_allclose(fit.params.iloc[0], record["fixef"]["values"], rtol=1e-7)
    assert fit.scale.iloc[0] == pytest.approx(record["sigma"] ** 2, rel=1e-5)


@pytest.mark.parametrize("name", SMALLER)
def test_fits_are_those_of_the_rows(statistics: SufficientStatistics, name: str) -> None:
    formula, options = SMALLER[name]
    for reml in (True, False) if name in ("same", "intercept") else (True,):
        found = statistics.fit(formula, reml=reml, tests=TESTS, **options)
        data, whole = DATA, formula
        if formula is None:
            data = DATA.assign(late=np.where(DATA["group"] == "b", DATA["Days"], 0.0))
            whole = "~ Days + late + (1 + Days | Subject)"
        expected = lmmax.fit_many(whole, data, Y, reml=reml, tests=TESTS, weights="w")
        well = np.setdiff1d(np.arange(12), [] if name == "same" else [6])  # exact, but for them all
        for batch in (found, expected):
            record = type(batch.record)(*(leaf[well] for leaf in batch.record))
            object.__setattr__(batch, "record", record)
            object.__setattr__(batch, "n_obs", batch.n_obs[well])
        check_same(found, expected)
        assert list(found.names) == list(expected.names)
        if name == "same":
            assert {i: found.certificate["status"].iloc[i] for i in BAD} == BAD
            assert found.n_obs[GAPS].tolist() == [len(DATA) - 4] * 2
            assert any("3 responses have missing values" in note for note in found.notes)


def test_merged_parts_are_the_whole(statistics: SufficientStatistics, tmp_path: Path) -> None:
    late, backwards = (DATA["Days"] > 4).to_numpy(), np.arange(12)[::-1]
    names = [f"v{i}" for i in range(12)]
    parts = [
        sufficient_statistics(
            MODEL,
            DATA[rows],
            pd.DataFrame(Y, DATA.index, names)[[names[i] for i in order]][rows],
            weights="w",
            chunk=5,
        )
        for rows, order in ((late, np.arange(12)), (~late, backwards))
    ]
    merged = parts[0].merge(parts[1])
    assert merged.n_groups == statistics.n_groups == 18
    np.testing.assert_array_equal(merged.n_obs, statistics.n_obs)
    assert {part.X.shape for part in merged.parts} == {part.X.shape for part in statistics.parts}
    check_same(merged.fit(tests=TESTS), statistics.fit(tests=TESTS))

    apart = parts[0].merge(parts[1], distinct=["Subject"])
    other = DATA.assign(Subject=DATA["Subject"].astype(str) + np.where(late, " [1]", " [2]"))
    assert apart.n_groups == 36
    assert set(apart.design.groupings[0].levels) == set(other["Subject"])
    expected = lmmax.fit_many("~ Days + (1 | Subject)", other, Y, weights="w")
    well = [i for i in range(12) if i != 6]
    found = apart.fit("~ Days + (1 | Subject)")
    np.testing.assert_allclose(found.llf.iloc[well], expected.llf.iloc[well], rtol=1e-9)
    np.testing.assert_allclose(found.bse.iloc[well], expected.bse.iloc[well], rtol=1e-9)

    first, second = tmp_path / "one.npz", tmp_path / "two"
    merged.save(first)
    loaded = SufficientStatistics.load(first)
    loaded.save(second)
    assert first.read_bytes() == second.read_bytes()
    assert repr(loaded) == repr(merged)
    again = loaded.fit(tests=TESTS)
    for mine, yours in zip(again.record, merged.fit(tests=TESTS).record, strict=True):
        np.testing.assert_array_equal(mine, yours)
    check_same(loaded.merge(parts[0]).fit(), merged.merge(parts[0]).fit())


def test_parts_too_small_for_a_fit(tmp_path: Path) -> None:
    """One row, one group, one level of a factor; a covariate far from zero, weights."""
    model = "~ far + group + (1 | Subject)"
    data = DATA.assign(far=DATA["Days"] + 1e5, group=pd.Categorical(DATA["group"], ["a", "b"]))
    site = np.where(data["group"] == "b", 3, 2)
    site[data["Subject"] == data["Subject"].iloc[-1]] = 1
    site[20] = 0
    y = Y + np.array([0.0, 1e5])[np.arange(12) % 2]
    y[:, 2] += 3.0 * data["far"]
    y[:, 6] = 2.0 - 0.5 * data["far"]
    parts = [
        sufficient_statistics(model, data[site == k], y[site == k], weights="w") for k in range(4)
    ]
    assert parts[0].n_groups == 1 and parts[0].n_obs.max() == 1
    assert set(parts[0].fit().certificate["status"]) == {"too_few"}
    merged = parts[0].merge(*parts[1:])
    merged.save(tmp_path / "s.npz")
    for formula in (None, "~ group + (1 | Subject)"):
        fits = SufficientStatistics.load(tmp_path / "s.npz").fit(formula, tests={"b": "group[T.b]"})
        whole = lmmax.fit_many(formula or model, data, y, weights="w", tests={"b": "group[T.b]"})
        check_same(fits, whole)
    with pytest.raises(
        DataError, match=r"it lacks 'group\[T.b\]'; make a factor a pandas\.Categor"
    ):
        parts[0].merge(
            sufficient_statistics(model, data.astype({"group": str})[site == 2], y[site == 2])
        )


def test_a_file_that_is_not_what_was_written(
    statistics: SufficientStatistics, tmp_path: Path
) -> None:
    path = tmp_path / "s.npz"
    statistics.save(path)
    content = bytearray(path.read_bytes())
    at = content.find(np.ascontiguousarray(statistics.parts[0].origin).tobytes()[:64])
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        SufficientStatistics.load(path)
    path.write_text("text")
    with pytest.raises(DataError, match="holds no sufficient statistics"):
        SufficientStatistics.load(path)
    write(path, {"version": 99}, {})
    with pytest.raises(DataError, match="later version"):
        SufficientStatistics.load(path)
    mixed = pd.Index([1, *"bcdefghijkl"], dtype=object)
    with pytest.raises(DataError, match="names of the responses are neither numbers nor text"):
        replace(statistics, responses=mixed).save(path)


def test_other_forms() -> None:
    rng = np.random.default_rng(1)
    penicillin = lmmax.datasets.load("penicillin").assign(x=rng.normal(size=144))
    y = penicillin["diameter"].to_numpy()[:, None] + 0.3 * rng.normal(size=(144, 2))
    crossed = "~ x + (1 | plate) + (1 | sample)"
    found = sufficient_statistics(crossed, penicillin, y.astype(np.float32), offset="x")
    assert found.n_groups == {"plate": 24, "sample": 6}
    assert found.parts[0].n_obs == 144
    single = y[:, 0].astype(np.float32).astype(float)
    alone = lmmax.fit("y ~ x + (1 | plate) + (1 | sample)", penicillin.assign(y=single), offset="x")
    fit = found.fit()
    assert fit.llf.iloc[0] == pytest.approx(alone.llf, rel=1e-9)
    np.testing.assert_allclose(fit.bse.iloc[0], alone.bse, rtol=1e-8)
    check_same(
        found.fit("~ x + (1 | plate)"),
        lmmax.fit_many("~ x + (1 | plate)", penicillin, y.astype(np.float32), offset="x"),
    )

    plates = sorted(penicillin["plate"].unique())
    A = rng.normal(size=(24, 30))
    K = pd.DataFrame(A @ A.T / 30.0 + 0.5 * np.eye(24), plates, plates)
    related = "~ x + (1 | plate)"
    half = np.arange(144) % 2 == 0
    parts = [
        sufficient_statistics(related, penicillin[rows], y[rows], relmat={"plate": K})
        for rows in (half, ~half)
    ]
    whole = lmmax.fit_many(related, penicillin, y, relmat={"plate": K})
    check_same(parts[0].merge(parts[1]).fit(), whole)
    fewer = penicillin[penicillin["plate"] != plates[0]]
    less = sufficient_statistics(related, fewer, y[fewer.index], relmat={"plate": K})
    with pytest.raises(DataError, match="pass relmat="):
        less.merge(parts[1])
    assert less.merge(parts[1], relmat={"plate": K}).n_groups == 24


def test_digits() -> None:
    """A large mean, and rows of groups far apart, cost what they cost in the data."""
    near = sufficient_statistics("~ Days + (1 | Subject)", DATA, Y[:, 8:])
    far = sufficient_statistics("~ Days + (1 | Subject)", DATA, Y[:, 8:] + 2.0**30)
    a, b = near.fit(), far.fit()
    np.testing.assert_allclose(b.scale, a.scale, rtol=1e-6)  # 1e9 leaves seven digits of the noise
    np.testing.assert_allclose(b.params["Days"], a.params["Days"], rtol=1e-6)
    np.testing.assert_allclose(b.params["Intercept"] - 2.0**30, a.params["Intercept"], rtol=1e-7)
    assert near.nbytes < 0.2 * DATA[["Days"]].to_numpy().nbytes * 4 + 8 * 30 * 8


@pytest.mark.parametrize(
    ("formula", "options", "error", "message"),
    [
        ("~ age + (1 | Subject)", {}, DataError, r"no term 'age'; their terms are 'Intercept'"),
        ("~ Days + (1 | Site)", {}, DataError, "'Site' is not in the statistics.*'Subject'"),
        ("~ Days + (age | Subject)", {}, DataError, r"\(age \| Subject\).* no term 'age'"),
        ("~ Days", {}, FormulaError, "no random term"),
        ("~ 0 + group + (1 | Subject)", {}, DataError, "coded beside 'Intercept'.*keep it"),
        ("~ Days + offset(w) + (1 | Subject)", {}, DataError, "offset other than"),
        (None, {"columns": ["day"]}, DataError, "'day'; the columns are 'Intercept', 'Days'"),
        (3, {}, TypeError, "formula must be text"),
        (None, {"reml": "ML"}, TypeError, "reml="),
    ],
)
def test_a_model_that_the_statistics_do_not_have(
    statistics: SufficientStatistics, formula: Any, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        statistics.fit(formula, **options)


def test_parts_that_do_not_belong_together(statistics: SufficientStatistics) -> None:
    def of(model: Any, data: pd.DataFrame, y: Any = Y[:, :2], **options: Any) -> Any:
        return sufficient_statistics(model, data, y, **options)

    first = of("~ group + (1 | Subject)", DATA)
    with pytest.raises(DataError, match=r"part 2 .* its model is .*Days"):
        first.merge(of("~ Days + (1 | Subject)", DATA))
    with pytest.raises(DataError, match=r"columns of X differ: it lacks 'group\[T.b\]' and it has"):
        first.merge(of("~ group + (1 | Subject)", DATA.replace({"group": {"b": "c"}})))
    with pytest.raises(DataError, match="contrasts or levels of 'group' differ"):
        helmert = DATA.replace({"group": {"a": "0"}})
        first.merge(of("~ group + (1 | Subject)", helmert))
    with pytest.raises(DataError, match=r"part 3 .* responses differ: it lacks '1'"):
        first.merge(first, of("~ group + (1 | Subject)", DATA, Y[:, :1]))
    with pytest.raises(DataError, match=r"'Subject' are of different types"):
        first.merge(of("~ group + (1 | Subject)", DATA.astype({"Subject": int})))
    scaled = "~ scale(Days) + (1 | Subject)"
    with pytest.raises(DataError, match=r"'scale\(Days\)' learns from the rows"):
        of(scaled, DATA).merge(of(scaled, DATA[:100], Y[:100, :2]))
    known, other = (
        lmmax.ModelSpec("y", "Days", [lmmax.RandomTerm("1 + Days", "Subject", held)])
        for held in (PartlyKnown([[1.0, 0.0], [0.0, v]], [[True, False]] * 2) for v in (0.1, 0.2))
    )
    with pytest.raises(DataError, match="a covariance structure with other constants"):
        of(known, DATA).merge(of(other, DATA))
    with pytest.raises(DataError, match="distinct has the name 'g'"):
        first.merge(first, distinct="g")
    with pytest.raises(TypeError, match="not int"):
        first.merge(3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"have no rows.*lmmax\.fit"):
        statistics.fit("~ Days + (1 | Subject)")[8]
    with pytest.raises(ValueError, match="chunk=0"):
        of("~ Days + (1 | Subject)", DATA, chunk=0)
