"""Results in a directory: of which work, responses and place they are, and who writes them.

What a run must equal is the plain run on the same responses in memory, as in
`test_fit_many_stream`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import zarr
from jax import Array

import lmmax
from lmmax.batch import claim, resampling, store
from lmmax.batch import store as store_module
from lmmax.batch.claim import Claim, ClaimedError
from lmmax.batch.engines import Record
from lmmax.batch.reading import begin
from lmmax.batch.seals import content_of
from lmmax.batch.store import StoreError, StoreWarning
from lmmax.constraints import Settings
from lmmax.covariances import Covariance
from lmmax.known_covariance import PartlyKnown
from tests import streaming
from tests.streaming import CHUNK

FORMATS = {"Parquet": "out", "Zarr": "out.zarr"}
K = 4 * CHUNK
MODEL = "intercept"


@pytest.fixture(scope="module")
def y() -> np.ndarray:
    return streaming.responses()[:, :K]


@pytest.fixture(scope="module")
def corrected(y: np.ndarray) -> np.ndarray:
    """All responses of two chunks, but for the first and the last response of all."""
    found = y.copy()
    found[:, CHUNK : 3 * CHUNK] += 0.3 * np.arange(len(y))[:, None]
    return found


@pytest.fixture(scope="module")
def plain(y: np.ndarray) -> lmmax.BatchFit:
    return streaming.fit(MODEL, y)


@pytest.fixture(scope="module")
def plain_corrected(corrected: np.ndarray) -> lmmax.BatchFit:
    return streaming.fit(MODEL, corrected)


@pytest.fixture(scope="module")
def written(y: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each format."""
    here = tmp_path_factory.mktemp("written")
    for name in FORMATS.values():
        streaming.fit(MODEL, y, out=here / name)
    return here


@pytest.fixture(params=list(FORMATS))
def out(written: Path, tmp_path: Path, request: Any) -> Path:
    """A copy of one of them."""
    name = FORMATS[request.param]
    return Path(shutil.copytree(written / name, tmp_path / name))


def equal(batch: lmmax.BatchFit, other: lmmax.BatchFit) -> None:
    for name, mine, its in zip(Record._fields, batch.record, other.record, strict=True):
        np.testing.assert_array_equal(mine, its, err_msg=name)


def files_of(out: Path, number: int) -> list[Path]:
    """The files of a chunk."""
    if out.suffix == ".zarr":
        # Without tests there are none of their fields.
        fields = [f for f in (*Record._fields, "n_obs", "sha256") if (out / f / "c").exists()]
        return [out / field / "c" / str(number) for field in fields]
    return [out / f"chunk-{number * CHUNK:012d}.parquet"]


def exchange(out: Path, one: int, other: int) -> None:
    """Exchange the files of two chunks."""
    for a, b in zip(files_of(out, one), files_of(out, other), strict=True):
        aside = a.with_name("aside")
        a.rename(aside)
        b.rename(a)
        aside.rename(b)


def copied(source: Path, out: Path, number: int) -> None:
    """Copy the files of a chunk."""
    for a, b in zip(files_of(source, number), files_of(out, number), strict=True):
        if a.is_dir():
            shutil.copytree(a, b, dirs_exist_ok=True)
        else:
            shutil.copy(a, b)


def stamps(out: Path) -> dict[Path, int]:
    """When chunks were written."""
    return {
        path: path.stat().st_mtime_ns
        for number in range(K // CHUNK)
        for top in files_of(out, number)
        for path in (top, *top.rglob("*"))
        if path.is_file()
    }


# --- responses ------------------------------------------------------------------------------


def test_what_was_fitted_to_other_responses_is_fitted_again(
    out: Path, corrected: np.ndarray, plain_corrected: lmmax.BatchFit
) -> None:
    before, old = stamps(out), lmmax.BatchFit.open(out)
    with pytest.warns(StoreWarning, match=f"responses from {CHUNK} on is of other responses"):
        found = streaming.fit(MODEL, corrected, out=out, resume=True)
    equal(found, plain_corrected)
    equal(lmmax.BatchFit.open(out), plain_corrected)
    kept = {path for path in before if before[path] == path.stat().st_mtime_ns}
    chunks = [{path for path in before if _within(path, out, number)} for number in range(4)]
    assert chunks[0] | chunks[3] <= kept and not (chunks[1] | chunks[2]) & kept
    # Who had the results that were there does not get others instead, or a mixture.
    with pytest.raises(StoreError, match=f"from {CHUNK} on .* of other responses than these"):
        _ = old.params


def _within(path: Path, out: Path, number: int) -> bool:
    return any(path == each or each in path.parents for each in files_of(out, number))


def test_a_resumed_run_that_stops_leaves_no_mixture(
    out: Path, y: np.ndarray, corrected: np.ndarray, plain: lmmax.BatchFit
) -> None:
    stopped = np.array(corrected)
    with pytest.raises(ZeroDivisionError), pytest.warns(StoreWarning):
        streaming.fit(MODEL, Stopping(stopped, 2 * CHUNK), out=out, resume=True)
    with pytest.raises(StoreError, match=f"from {CHUNK} on .* of other responses than these"):
        _ = lmmax.BatchFit.open(out).params
    with pytest.warns(StoreWarning, match="of other responses"):
        equal(streaming.fit(MODEL, y, out=out, resume=True), plain)
    equal(lmmax.BatchFit.open(out), plain)


class Stopping(streaming.Sliced):
    """Responses of which those from one number on cannot be read, but for the last."""

    def __init__(self, values: np.ndarray, until: int) -> None:
        super().__init__(values)
        self.until = until

    def __getitem__(self, where: Any) -> np.ndarray:
        if where[1].start >= self.until and where[1].stop - where[1].start > 1:
            raise ZeroDivisionError
        return super().__getitem__(where)


def test_names_and_precision_belong_to_the_responses(
    tmp_path: Path, y: np.ndarray, plain: lmmax.BatchFit
) -> None:
    names = [f"v{i}" for i in range(K)]
    frames = [pd.DataFrame(y[:, :20], columns=names[:20])]
    streaming.fit(MODEL, iter(frames), out=tmp_path / "out")
    frames = [pd.DataFrame(y[:, :20], columns=[*names[:15], "a", "b", "c", "d", "e"])]
    with pytest.warns(StoreWarning, match="from 10 on is of other responses"):
        found = streaming.fit(MODEL, iter(frames), out=tmp_path / "out", resume=True)
    np.testing.assert_array_equal(found.params, plain.params.iloc[:20])
    assert list(lmmax.BatchFit.open(tmp_path / "out").names) == list(frames[0].columns)
    single, values = y.astype(np.float32), [y, y.astype(np.float32).astype(float)]
    hashes = {content_of(range(K), each) for each in (single, *values)}
    assert len(hashes) == 3


def test_an_iterator_that_ends_sooner(tmp_path: Path, y: np.ndarray, plain: Any) -> None:
    for name in FORMATS.values():
        streaming.fit(MODEL, iter([y]), out=tmp_path / name)
        few = streaming.fit(MODEL, iter([y[:, :25]]), out=tmp_path / name, resume=True)
        assert len(few) == 25
        np.testing.assert_array_equal(few.params, plain.params.iloc[:25])
        equal(lmmax.BatchFit.open(tmp_path / name), few)


def test_models_of_their_own_are_compared_as_a_whole(tmp_path: Path, y: np.ndarray) -> None:
    data = streaming.data()
    x = np.random.default_rng(0).normal(size=(len(data), 6))
    formula, options = "~ s + (1 | g)", {"chunk": 2, "out": tmp_path / "out"}
    data["y"] = np.nan_to_num(y[:, 0])
    lmmax.fit_many(formula, data, ["y"], scan={"s": x}, **options)
    other = x.copy()
    other[3, 2] += 1.0
    with pytest.warns(StoreWarning, match="from 2 on is of other responses"):
        found = lmmax.fit_many(
            "~ s + (1 | g)", data, ["y"], scan={"s": other}, resume=True, **options
        )
    equal(found, lmmax.fit_many("~ s + (1 | g)", data, ["y"], scan={"s": other}, chunk=2))


# --- work and place -------------------------------------------------------------------------


def test_what_was_moved_is_not_taken_for_what_stood_there(
    out: Path, y: np.ndarray, plain: lmmax.BatchFit
) -> None:
    exchange(out, 1, 2)
    with pytest.raises(StoreError, match=r"from 10 on .* of another place in it"):
        _ = lmmax.BatchFit.open(out).params
    with pytest.warns(StoreWarning, match="from 10 on is of other"):
        equal(streaming.fit(MODEL, y, out=out, resume=True), plain)
    equal(lmmax.BatchFit.open(out), plain)


@pytest.mark.parametrize("what", ["responses", "work"])
def test_what_was_copied_is_not_taken_for_what_stood_there(
    out: Path, tmp_path: Path, y: np.ndarray, corrected: np.ndarray, what: str, plain: Any
) -> None:
    other = tmp_path / f"other{out.suffix}"
    if what == "responses":
        streaming.fit(MODEL, corrected, out=other)
    else:
        streaming.fit(MODEL, y, out=other, reml=False)
    copied(other, out, 1)
    with pytest.raises(StoreError, match=f"from 10 on .* of other {what}"):
        _ = lmmax.BatchFit.open(out).params
    with pytest.warns(StoreWarning, match=f"from 10 on is of other {what}"):
        equal(streaming.fit(MODEL, y, out=out, resume=True), plain)


def test_what_says_how_to_read_results_belongs_to_them(
    written: Path, tmp_path: Path, y: np.ndarray
) -> None:
    out = Path(shutil.copytree(written / "out", tmp_path / "out"))
    streaming.fit(MODEL, y, out=tmp_path / "other", reml=False)
    shutil.copy(tmp_path / "other" / "batch.npz", out)
    with pytest.raises(StoreError, match="holds results of two works"):
        lmmax.BatchFit.open(out)


@pytest.mark.parametrize("damage", ["lost", "cut off"])
def test_results_without_a_description_are_told_by_their_seals(
    written: Path, tmp_path: Path, y: np.ndarray, corrected: np.ndarray, damage: str, plain: Any
) -> None:
    out = Path(shutil.copytree(written / "out", tmp_path / "out"))
    before, about = stamps(out), (out / "work.json").read_bytes()

    def lose() -> None:
        (out / "work.json").unlink() if damage == "lost" else (out / "work.json").write_bytes(
            about[:50]
        )

    lose()
    with pytest.raises(StoreError, match="of which work they are is damaged"):
        lmmax.BatchFit.open(out)
    equal(streaming.fit(MODEL, y, out=out), plain)
    assert stamps(out) == before and (out / "work.json").read_bytes() == about
    lose()
    with pytest.warns(StoreWarning, match="4 files are now called"):
        found = streaming.fit(MODEL, y, out=out, reml=False)
    equal(found, streaming.fit(MODEL, y, reml=False))
    assert len(list(out.glob("chunk-*.parquet.unknown"))) == 4


def test_results_of_two_versions_are_not_mixed(
    out: Path, y: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmmax, "__version__", "99.0")
    with pytest.raises(StoreError, match=r"was begun by lmmax .*, and this is 99\.0"):
        streaming.fit(MODEL, y, out=out, resume=True)


def test_directories_of_an_earlier_format_are_refused(out: Path, y: np.ndarray) -> None:
    if out.suffix == ".zarr":
        group = zarr.open_group(out)
        group.attrs["lmmax"] = {**group.attrs["lmmax"], "format": 2}
    else:
        about = json.loads((out / "work.json").read_text())
        (out / "work.json").write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(StoreError, match=r"written by another version .* use another directory"):
        streaming.fit(MODEL, y, out=out, resume=True)
    with pytest.raises(StoreError, match="written by another version"):
        lmmax.BatchFit.open(out)


def test_the_last_subset_need_not_be_one_that_can_be_fitted(tmp_path: Path) -> None:
    data = streaming.data()
    data["y"], data["s"] = np.random.default_rng(0).normal(size=len(data)), "a"
    data.loc[data["g"] == 19, "s"] = "b"  # one group
    found = lmmax.fit_many("y ~ x + (1 | g)", data, by="s", out=tmp_path / "out")
    assert found.certificate["status"].tolist() == ["converged", "too_few"]


@dataclass(frozen=True)
class Scaled(Covariance):
    """A multiple of a matrix, which its name does not tell."""

    of: Any

    @property
    def name(self) -> str:
        return "scaled"

    def n_parameters(self, q: int) -> int:
        return 1

    def matrix(self, theta: Array, q: int) -> Array:
        return theta[0] ** 2 * jnp.asarray(self.of)

    def theta_of(self, D: np.ndarray) -> np.ndarray:
        return np.array([np.sqrt(np.trace(D) / np.trace(self.of))])


def test_works_with_the_same_arrays_and_formula_are_told_apart() -> None:
    """Workers keep works by their keys, directories by what they say: either must tell them."""
    data = streaming.data()
    data["t"] = np.tile([1.0, 2.0, 4.0], len(data))[: len(data)]
    data["u"] = data["t"].replace(4.0, 8.0)
    w, responses = np.linspace(1.0, 2.0, len(data)), streaming.responses()[:, :3]
    eye, ones = np.eye(2), np.full((2, 2), 0.5) + np.eye(2)

    def with_structure(structure: Covariance) -> lmmax.ModelSpec:
        return lmmax.ModelSpec("y", "x", (lmmax.RandomTerm("1 + x", "g", structure),))

    def held(value: float) -> lmmax.ModelSpec:
        return with_structure(PartlyKnown([[1.0, 0.0], [0.0, value]], [[True, False]] * 2))

    def key(formula: Any, table: pd.DataFrame = data, **options: Any) -> str:
        given = {"missing": "drop", **options}
        return begin(formula, table, responses, Settings(), None, given)[2].key

    simple, times = "~ x + (1 | g)", "~ x + ou(0 + C(t) | g)"
    keys = [
        key(simple),
        key(simple, weights=w),
        key(simple, offset=w),
        key(held(0.1)),
        key(held(0.2)),
        key(with_structure(Scaled(eye))),
        key(with_structure(Scaled(ones))),
        key(times),
        key(times, data.assign(t=data["u"])),
    ]
    assert len(set(keys)) == len(keys)
    assert key(with_structure(Scaled(eye.copy()))) == keys[5]
    assert key(simple, data.copy()) == keys[0]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "of something else": lambda path: path.write_text('{"format": 3, "attributes": [1]}'),
    "a list": lambda path: path.write_text("[1]"),
    "missing": Path.unlink,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a loop": lambda path: (path.unlink(), path.symlink_to(path)),
}
DAMAGED = [
    "work.json",
    "batch.npz",
    "chunk-000000000000.parquet",
    "zarr.json",
    "params/zarr.json",
    "sha256/zarr.json",
    "batch/zarr.json",
    "response/zarr.json",
]
STAY = [(name, "a directory") for name in (*DAMAGED[:4],)]
STAY += [("work.json", "a loop"), ("zarr.json", "a loop")]
"""What is not ours to remove."""


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_said_and_mended(
    written: Path, tmp_path: Path, y: np.ndarray, plain: lmmax.BatchFit, name: str, damage: str
) -> None:
    zarrs = "zarr" in name
    out = Path(shutil.copytree(written / ("out.zarr" if zarrs else "out"), tmp_path / "o.zarr"))
    out = out if zarrs else out.rename(tmp_path / "out")
    DAMAGES[damage](out / name)
    try:
        found = lmmax.BatchFit.open(out)
        np.testing.assert_array_equal(found.params, plain.params)
        equal(found, plain)
    except StoreError as error:
        assert str(out) in str(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        if (name, damage) in STAY:
            with pytest.raises(StoreError, match=name if damage == "a directory" else "work"):
                streaming.fit(MODEL, y, out=out, resume=True)
            return
        equal(streaming.fit(MODEL, y, out=out, resume=True), plain)
    equal(lmmax.BatchFit.open(out), plain)


@pytest.mark.parametrize("store", ["out", "out.zarr"])
def test_a_full_disk_is_said(
    written: Path, tmp_path: Path, y: np.ndarray, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.ZarrStore, "_put", full)
    monkeypatch.setattr(store_module.ParquetStore, "_put", full)
    with pytest.raises(StoreError, match=r"cannot be written to; resume=True .*No space left"):
        streaming.fit(MODEL, y, out=tmp_path / store)


def test_what_differs_is_said(written: Path, y: np.ndarray) -> None:
    with pytest.raises(
        StoreError, match=r"chunk differ \(chunk=, which was \d+ and is 3\): pass chunk="
    ):
        streaming.fit(MODEL, y, out=written / "out", resume=True, chunk=3)
    with pytest.raises(
        StoreError,
        match=r"settings differ \(the options of the fits: reml=True is now reml=False\)",
    ):
        streaming.fit(MODEL, y, out=written / "out", resume=True, reml=False)


# --- one run at a time ----------------------------------------------------------------------


HOLD = """
import sys
from pathlib import Path
from lmmax.batch.claim import Claim
held = Claim(Path(sys.argv[1]))
held.take()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_claim_is_of_one_process_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    mine = Claim(path)
    with pytest.raises(ClaimedError, match=rf"process {holder.pid} on .*, since \d"):
        mine.take(0.1)
    holder.kill()
    with holder:
        mine.take(30.0)
    assert path.exists()  # the one that was left
    with pytest.raises(ClaimedError, match="another run in this process"):
        Claim(path).take()
    assert mine.exclusive
    mine.release()
    assert not path.exists()
    mine.release()
    again = Claim(path)
    again.take()
    del again  # as an error might
    Claim(path).take()


def test_without_locks_runs_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuses(*_: Any) -> None:
        raise OSError(next(iter(claim.WITHOUT_LOCKS)), "no locks")

    monkeypatch.setattr(fcntl, "lockf", refuses)
    mine = Claim(tmp_path / "claim")
    mine.take()
    assert not mine.exclusive
    mine.release()


class Waiting(streaming.Sliced):
    """Responses whose second chunk comes when it is let."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__(values)
        self.begun, self.go = Event(), Event()

    def __getitem__(self, where: Any) -> np.ndarray:
        if where[1].start == CHUNK and where[1].stop > CHUNK + 1:
            self.begun.set()
            assert self.go.wait(60.0)
        return super().__getitem__(where)


@pytest.mark.parametrize("name", FORMATS.values())
def test_two_runs_do_not_write_to_one_directory(
    name: str, tmp_path: Path, y: np.ndarray, plain: lmmax.BatchFit, monkeypatch: Any
) -> None:
    out, slow = tmp_path / name, Waiting(y)
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(streaming.fit, MODEL, slow, out=out)
        assert slow.begun.wait(60.0)
        monkeypatch.setattr(store, "PATIENCE", 0.1)
        with pytest.raises(StoreError, match=r"is being written to by .*: wait .* delete .*claim"):
            streaming.fit(MODEL, y, out=out, resume=True)
        with pytest.raises(StoreError, match="holds results already"):
            streaming.fit(MODEL, y, out=out)
        monkeypatch.setattr(store, "PATIENCE", 60.0)
        other = threads.submit(streaming.fit, MODEL, y, out=out, resume=True)
        slow.go.set()
        equal(one.result(), plain)
        equal(other.result(), plain)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_run_of_unknown_length_is_waited_for(
    tmp_path: Path, y: np.ndarray, plain: lmmax.BatchFit
) -> None:
    out, begun, go = tmp_path / "out.zarr", Event(), Event()

    def coming() -> Iterator[np.ndarray]:
        yield y[:, :35]  # more than are looked at beforehand
        begun.set()
        assert go.wait(60.0)
        yield y[:, 35:]

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(streaming.fit, MODEL, coming(), out=out)
        assert begun.wait(60.0)
        other = threads.submit(streaming.fit, MODEL, iter([y]), out=out, resume=True)
        go.set()
        equal(one.result(), plain)
        written = stamps(out)
        equal(other.result(), plain)
    assert stamps(out) == written


# --- replicates -----------------------------------------------------------------------------


def test_replicates_go_on_with_the_same_responses_only(
    tmp_path: Path, y: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, values = streaming.data(), np.nan_to_num(y[:, :6])
    out = tmp_path / "found.npz"

    def run(values: np.ndarray, table: pd.DataFrame = data, **options: Any) -> lmmax.Resampled:
        batch = lmmax.fit_many(streaming.MODELS[MODEL], table, values)
        return lmmax.resample(batch, ["x"], n=5, chunk=2, method="wild", out=out, **options)

    first = run(values)
    np.testing.assert_array_equal(run(values, resume=True).exceeded, first.exceeded)
    other = values.copy()
    other[:, 2:4] += np.arange(len(values))[:, None]
    with pytest.raises(lmmax.DataError, match="holds replicates of other work"):
        run(other, resume=True)
    moved = data.assign(g=np.roll(data["g"], 1))  # all that the columns are is the same
    with pytest.raises(lmmax.DataError, match="holds replicates of other work"):
        run(values, moved, resume=True)
    held = Claim(out.with_name("found.npz.claim.partial"))
    held.take()
    monkeypatch.setattr(resampling, "PATIENCE", 0.0)
    with pytest.raises(lmmax.DataError, match="is being written to by another run in this"):
        run(values, resume=True)
    held.release()
    monkeypatch.setattr(lmmax, "__version__", "99.0")
    with pytest.raises(lmmax.DataError, match=r"was begun by lmmax .*, and this is 99\.0"):
        run(values, resume=True)


# --- responses that change afterwards -------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
def test_a_response_that_is_another_by_now_is_not_passed_off(
    tmp_path: Path, y: np.ndarray, corrected: np.ndarray, stored: bool, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("y.npy", y)
    options = {"out": "out"} if stored else {}
    batch = streaming.fit(MODEL, "y.npy", **options)
    assert batch[CHUNK].llf == pytest.approx(batch.llf[CHUNK], rel=1e-9)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    np.save("y.npy", corrected)
    if stored:
        batch = lmmax.BatchFit.open("../out")
        monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.warns(lmmax.ChangedWarning, match="have changed since"):
        _ = batch[CHUNK]
    assert batch[0].llf == pytest.approx(batch.llf[0], rel=1e-9)
