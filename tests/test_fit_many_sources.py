"""`fit_many`: what responses may come as, and that it makes no difference.

What a run must equal is the plain run on the same responses in memory; `test_fit_many` says that
this is right.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import lmmax
from lmmax.batch import line_statistics
from lmmax.batch.engines import Record
from lmmax.batch.one_variance import one_variance
from lmmax.batch.reading import read_design
from lmmax.batch.sources import Columns, laid_out
from lmmax.fit import prepare
from tests import streaming
from tests.streaming import K

NAMES = [f"gene{i}" for i in range(K)]


@pytest.fixture(scope="module")
def y() -> np.ndarray:
    return streaming.responses()


@pytest.fixture(scope="module")
def plain(y: np.ndarray) -> lmmax.BatchFit:
    return streaming.fit("intercept", y)


def equal(a: Any, b: Any) -> None:
    for name in Record._fields:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def chunks(y: np.ndarray, *sizes: int) -> Iterator[np.ndarray]:
    """Responses a few at a time, in one buffer that is filled again and again."""
    at, buffer = 0, np.empty((len(y), max(sizes)))
    for c in sizes:
        buffer[:, :c] = y[:, at : at + c]
        yield buffer[:, :c]
        at += c


# --- iterators ------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(K,), (1,) * K, (33, 50, 37)])
def test_an_iterator_gives_the_same_however_it_is_cut(
    plain: lmmax.BatchFit, y: np.ndarray, sizes: tuple[int, ...]
) -> None:
    found = streaming.fit("intercept", chunks(y, *sizes))
    equal(found.record, plain.record)
    assert list(found.names) == list(range(K)) and found.notes == plain.notes
    with pytest.raises(lmmax.DataError, match=r"response 3 came from an iterator.*responses=col"):
        found[3]


class Bar:
    """A progress bar that notes what it is told."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, total: int | None, **_: Any) -> None:
        self.total, self.done = total, 0
        self.made.append(self)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        self.done += count


def test_an_iterator_is_gone_on_with_and_given_to_workers(
    plain: lmmax.BatchFit, y: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=Bar))
    frames = [pd.DataFrame(part.copy(), columns=NAMES[at : at + 30]) for at, part in _cut(y)]
    broken = [*frames[:3], frames[3].iloc[:-1]]
    with pytest.raises(lmmax.DataError, match=r"chunk 4 of responses \(from response 90\) has 80"):
        streaming.fit("intercept", iter(broken), out=tmp_path / "out")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert len(kept) == 9
    with ThreadPoolExecutor(2) as threads:
        options = {"out": tmp_path / "out", "resume": True, "executor": threads}
        found = streaming.fit("intercept", iter(frames), progress=True, **options)
    equal(found.record, plain.record)
    assert list(found.names) == NAMES
    assert [(bar.total, bar.done) for bar in Bar.made] == [(None, K)]
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert len(files) == 12 and kept.items() <= files.items()
    # Where an iterator ended before, the last block was a short one.
    few = streaming.fit("intercept", chunks(y, 15), out=tmp_path / "few")
    more = streaming.fit("intercept", chunks(y, 15, 10), out=tmp_path / "few", resume=True)
    assert (len(few), len(more)) == (15, 25)
    np.testing.assert_array_equal(more.params, plain.params.iloc[:25])


def _cut(y: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    return ((30 * number, part) for number, part in enumerate(chunks(y, 30, 30, 30, 30)))


# --- names and labels -----------------------------------------------------------------------


class Annotated:
    """What acts like an AnnData object."""

    def __init__(self, X: Any, obs: pd.DataFrame, layers: dict[str, Any]) -> None:
        self.X, self.obs, self.layers, self.shape = X, obs, layers, (len(obs), K)
        self.obs_names, self.var_names = obs.index, pd.Index(NAMES)


def test_annotated_matrices(plain: lmmax.BatchFit, y: np.ndarray) -> None:
    obs = streaming.data().set_index(pd.Index([f"cell{i}" for i in range(len(y))]))
    whole = Annotated(y, obs, {"counts": sparse.csr_matrix(y)})

    def fit(responses: Any, data: Any = obs, **options: Any) -> lmmax.BatchFit:
        return lmmax.fit_many(streaming.MODELS["intercept"], data, responses, chunk=10, **options)

    for found in (
        fit(whole),
        fit((whole, "counts")),
        fit(whole.layers["counts"], names=whole.var_names),
        fit(chunks(y, 70, 50), names=NAMES),
    ):
        equal(found.record, plain.record)
        assert list(found.names) == NAMES
    np.testing.assert_array_equal(fit(whole)["gene7"].params, plain[7].params)
    with pytest.raises(lmmax.DataError, match="no layer 'spliced'; it has counts"):
        fit((whole, "spliced"))
    with pytest.raises(lmmax.DataError, match="AnnData object and data differ in the labels"):
        fit(whole, data=obs.iloc[::-1])
    with pytest.raises(lmmax.DataError, match="responses and data differ in the labels"):
        fit(pd.DataFrame(y))
    for names, message in (
        (NAMES[:3], "names has 3 names for 120 responses"),
        (["a"] * K, "names has 'a' more than once"),
        ("gene", "names must be a list of names, not 'gene'"),
    ):
        with pytest.raises(lmmax.DataError, match=message):
            fit(y, names=names)
    for count, message in ((5, "chunk 1 .* goes beyond them"), (13, "ended after 12 responses")):
        with pytest.raises(lmmax.DataError, match=message):
            fit(chunks(y, 12), names=NAMES[:count])
    with pytest.raises(ValueError, match="subsets are named by the levels"):
        lmmax.fit_many("x ~ 1 + (1 | g)", streaming.data(), by="g", names=NAMES)


def test_a_single_response(plain: lmmax.BatchFit, y: np.ndarray) -> None:
    for responses, name in ((y[:, 0], 0), (pd.Series(y[:, 0]), 0), (pd.Series(y[:, 0]), "voxel")):
        if name:
            responses = responses.rename(name)
        found = streaming.fit("intercept", responses)
        assert list(found.names) == [name]
        np.testing.assert_allclose(found.params.iloc[0], plain.params.iloc[0], rtol=1e-12)


def test_masked_values_are_missing_and_columns_may_come_by_name(
    plain: lmmax.BatchFit, y: np.ndarray
) -> None:
    masked = np.ma.MaskedArray(np.nan_to_num(y, nan=1e6), np.isnan(y))
    by_name = dict(zip(NAMES, y.T, strict=True))
    for responses in (masked, by_name):
        found = streaming.fit("intercept", responses)
        np.testing.assert_array_equal(found.n_obs, plain.n_obs)
        np.testing.assert_array_equal(found.params.to_numpy(), plain.params.to_numpy())
    assert list(found.names) == NAMES


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        (lambda y: iter([]), "iterator without any response"),
        (lambda y: iter([y, None, y]), "chunk 2 of responses must be an array .* not NoneType"),
        (lambda y: iter([y, y[:, 0, None, None]]), "chunk 2 of responses must be two-dim"),
        (lambda y: iter([y.astype(str)]), "chunk 1 of responses must be numeric"),
        (
            lambda y: iter([pd.DataFrame(y, columns=NAMES)] * 2),
            r"chunk 2 .* has a response 'gene0' that was there before",
        ),
        (lambda y: y.reshape(9, 9, -1), r"two-dimensional.*image\[mask\].T"),
        (lambda y: np.zeros(7), "two-dimensional.*not of shape"),
        (lambda y: "y.h5ad", "ends in .npy or .parquet; open others and pass"),
        (lambda y: [None, "x"], "an array, a data frame, column names, a file, or an iterator"),
    ],
)
def test_what_is_wrong_is_named(y: np.ndarray, responses: Any, message: str) -> None:
    with pytest.raises(lmmax.DataError, match=message):
        streaming.fit("intercept", responses(y))


# --- reading --------------------------------------------------------------------------------


class OnlySlices(streaming.Sliced):
    """What can be sliced, and not indexed by arrays: as a file, where that would be slow."""

    def __getitem__(self, where: Any) -> np.ndarray:
        assert all(isinstance(part, slice) and part.step is None for part in where)
        return super().__getitem__(where)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_blocks_are_read_whole_and_laid_out_alike(order: Any, dtype: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-9, 9, size=(3000, 40)).astype(dtype)
    rows = np.delete(np.arange(3000), [0, 17])
    np.save(tmp_path / "y.npy", np.asarray(values, order=order))
    single = np.float32 if dtype == np.float32 else np.float64
    for held in (np.load(tmp_path / "y.npy", mmap_mode="r"), OnlySlices(values)):
        for some in (rows, np.arange(3000)):
            source = Columns(pd.RangeIndex(40), held, some)
            found = source.read(7, 31)
            assert found.dtype == single and found.flags.c_contiguous
            assert not isinstance(found, np.memmap)
            np.testing.assert_array_equal(found, values[some, 7:31])
            assert source.block(7, 31).dtype == np.float64
    np.testing.assert_array_equal(laid_out(values.T, np.arange(3)), values.T[:3])


# --- statistics -----------------------------------------------------------------------------


def test_statistics_of_tiles_are_those_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums by group, in any order of the rows, whatever the tiles, against sums by hand."""
    rng = np.random.default_rng(1)
    codes = np.repeat(np.arange(30), rng.integers(1, 40, size=30))
    n, lanes = len(codes), 11
    data = pd.DataFrame({"x": rng.normal(size=n), "g": codes, "w": rng.uniform(0.5, 2, size=n)})
    y = 1e3 + rng.normal(size=(30, lanes))[codes] + rng.normal(size=(n, lanes))
    y[:, 4] += 1e5 * data["x"]
    shuffled = rng.permutation(n)
    for weights, formula, z in (
        (None, "~ x + (1 | g)", np.ones(n)),
        ("w", "~ x + (1 | g)", np.ones(n)),
        (None, "~ x + (0 + x | g)", data["x"].to_numpy()),
    ):
        w = np.ones(n) if weights is None else data[weights].to_numpy()
        X = np.stack([np.ones(n), data["x"]], axis=1)
        beta = np.linalg.lstsq(np.sqrt(w)[:, None] * X, np.sqrt(w)[:, None] * y)[0]
        rest = y - X @ beta
        sums = np.stack([np.bincount(codes, w * z * column) for column in rest.T])
        for order in (np.arange(n), shuffled):
            for size in (8 * lanes, 8 * lanes * 50, 1 << 19):
                monkeypatch.setattr(line_statistics, "TILE_BYTES", size)
                design, _ = read_design(formula, data.iloc[order], weights=weights)
                line = one_variance(prepare(design).layout)
                assert line is not None
                found = line_statistics.statistics(line, y[order])
                mapped = found.origin @ line.layout.fixed.inverse.T
                np.testing.assert_allclose(mapped, beta.T, rtol=1e-9)
                total = np.sum(w[:, None] * rest**2, axis=0)
                np.testing.assert_allclose(found.total, total, rtol=1e-9)
                # The squares of the sums, in whatever coordinates of theirs.
                squares = np.sum(found.inside**2, axis=1) + np.sum(found.sets, axis=1)
                np.testing.assert_allclose(squares, np.sum(sums**2, axis=1), rtol=1e-8)


def test_results_do_not_depend_on_the_blocks(y: np.ndarray) -> None:
    """Neither on their size nor on the precision and order in which they lie in memory."""
    single = y[:, :40].astype(np.float32)
    for model in streaming.MODELS:
        whole = streaming.fit(model, single.astype(float)).record
        found = streaming.fit(model, np.asfortranarray(single), chunk=7).record
        for field in Record._fields:
            # What is zero at a minimum has no digits.
            atol = 1e-9 if field == "gradient" else 1e-12
            a, b = getattr(found, field), getattr(whole, field)
            np.testing.assert_allclose(a, b, 1e-12, atol, err_msg=f"{model} {field}")


def test_plan_says_why_an_iterator_cannot_be_planned(y: np.ndarray) -> None:
    with pytest.raises(lmmax.DataError, match=r"plan cannot look at an iterator.*pass one of its"):
        lmmax.plan(streaming.MODELS["intercept"], streaming.data(), chunks(y, K))
