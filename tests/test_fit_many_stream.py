"""`fit_many` on files, with workers and devices: what is lost, what is kept, how much memory.

What a run must equal is the plain run on the same responses in memory; `test_fit_many` says that
this is right.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

import lmmax
from lmmax.batch.engines import Record
from lmmax.batch.store import StoreError
from lmmax.batch.stream import LostWorkerWarning, stream
from lmmax.solve import Status
from tests import streaming
from tests.streaming import CHUNK, MODELS, STORES, K

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def y() -> np.ndarray:
    return streaming.responses()


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: Any) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(model: str, y: np.ndarray) -> lmmax.BatchFit:
    return streaming.fit(model, y)


@pytest.fixture(scope="module")
def files(
    model: str, y: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, bytes]]:
    """A directory with the responses, and the results of a run that nothing stops."""
    here = tmp_path_factory.mktemp(model)
    np.save(here / "y.npy", y)
    streaming.fit_file(here, model)
    return here, contents(here / STORES[model])


def contents(directory: Path) -> dict[str, bytes]:
    """All files, but for what reads results back: the pickle, and the names for other readers."""
    found = {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*")) if p.is_file()}
    added = ("batch", "response")
    return {name: p.read_bytes() for name, p in found.items() if not name.startswith(added)}


def number_of(name: str) -> int | None:
    """The chunk that a file belongs to; None for what describes the work."""
    parts = Path(name).parts
    if name.endswith(".parquet"):
        return int(name[6:18]) // CHUNK
    return int(parts[2]) if parts[1:2] == ("c",) and not name.endswith(".partial") else None


def complete(written: Any) -> set[int | None]:
    """Numbers of the chunks that are there: their files of hashes come last."""
    return {number_of(name) for name in written if name.startswith(("chunk", "sha256/c/"))} - {None}


def equal(a: Record, b: Record) -> None:
    for name, mine, other in zip(Record._fields, a, b, strict=True):
        np.testing.assert_array_equal(mine, other, err_msg=name)


# --- files ----------------------------------------------------------------------------------


def test_a_file_gives_the_same_as_memory(
    plain: lmmax.BatchFit, files: tuple[Path, dict[str, bytes]], model: str
) -> None:
    here, written = files
    assert complete(written) == set(range(K // CHUNK))
    out = here / STORES[model]
    again = streaming.fit(model, here / "y.npy", out=out, resume=True)
    equal(again.record, plain.record)
    np.testing.assert_array_equal(again.n_obs, plain.n_obs)
    assert again.engine == plain.engine
    assert plain.notes == (
        "3 responses have missing values; each is fitted to the rows that it has",
    )
    # Any other reader of the format finds the numbers.
    if out.suffix == ".zarr":
        group = zarr.open_group(out, mode="r")
        np.testing.assert_array_equal(group["params"][:], plain.params)
        assert group["params"].attrs["labels"] == ["params[Intercept]", "params[x]"]
        assert group["response"][:].tolist() == list(map(str, range(K)))
    else:
        table = pd.read_parquet(out / f"chunk-{CHUNK:012d}.parquet")
        np.testing.assert_array_equal(table["params[x]"], plain.params["x"].iloc[CHUNK : 2 * CHUNK])


def test_results_are_read_back_without_the_responses(
    plain: lmmax.BatchFit, files: tuple[Path, dict[str, bytes]], model: str, tmp_path: Path
) -> None:
    moved = tmp_path / STORES[model]
    shutil.copytree(files[0] / STORES[model], moved)
    found = lmmax.BatchFit.open(moved)
    equal(found.record, plain.record)
    pd.testing.assert_frame_equal(found.frame(), plain.frame())
    pd.testing.assert_frame_equal(found.variances, plain.variances)
    assert (str(found), found.notes) == (str(plain), plain.notes)
    found.save(tmp_path / "one.lmmax")
    shutil.rmtree(moved)
    equal(lmmax.BatchFit.load(tmp_path / "one.lmmax").record, plain.record)
    with pytest.raises(StoreError, match="holds no results of fit_many"):
        lmmax.BatchFit.open(moved)


def test_a_file_of_responses_is_read_again(y: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", y[:, :3])
    whole = streaming.fit("intercept", tmp_path / "y.npy", out=tmp_path / "out")
    assert lmmax.BatchFit.open(tmp_path / "out")[2].llf == whole[2].llf
    streaming.fit("intercept", y[:, :3], out=tmp_path / "out", resume=True)
    with pytest.raises(lmmax.DataError, match="the responses were not kept"):
        lmmax.BatchFit.open(tmp_path / "out")[2]
    (tmp_path / "out" / "batch.npz").unlink()
    with pytest.raises(StoreError, match=r"is not finished: fit_many\(\.\.\., out=, resume=True"):
        lmmax.BatchFit.open(tmp_path / "out")
    (tmp_path / "out" / "chunk-000000000000.parquet").unlink()
    with pytest.raises(StoreError, match="lacks the results of the responses from 0 on"):
        _ = whole.params


def test_after_kill_9_one_chunk_at_most_is_lost(
    files: tuple[Path, dict[str, bytes]], model: str, tmp_path: Path, y: np.ndarray
) -> None:
    _, written = files
    np.save(tmp_path / "y.npy", y)
    out = tmp_path / STORES[model]
    command = [sys.executable, "-m", "tests.streaming", str(tmp_path), model]
    process = subprocess.Popen(command, cwd=ROOT)
    pattern = "sha256/c/*/0/0" if out.suffix == ".zarr" else "*.parquet"
    while process.poll() is None and len(list(out.glob(pattern))) < 3:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = contents(out)
    there = complete(before)
    assert 3 <= len(there) < K // CHUNK
    # All that is complete is right, and comes first; a part may be left of one more.
    assert there == set(range(len(there)))
    kept = {name for name in before if number_of(name) in there}
    assert kept == {name for name in written if number_of(name) in there}
    assert all(before[name] == written[name] for name in kept)
    assert {number_of(name) for name in before} <= there | {None, len(there)}
    stamps = {name: (out / name).stat().st_mtime_ns for name in kept}
    streaming.fit_file(tmp_path, model, resume=True)
    for name in set(before) - set(written):  # what the killed process was writing
        assert "partial" in name
        (out / name).unlink(missing_ok=True)
    assert contents(out) == written
    assert stamps == {name: (out / name).stat().st_mtime_ns for name in kept}


DAMAGES = {
    "cut off": lambda old: old[: len(old) // 2],
    "empty": lambda old: b"",
    "a bit": lambda old: old[:100] + bytes([old[100] ^ 1]) + old[101:],
    "no file": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_chunk_is_fitted_again(
    files: tuple[Path, dict[str, bytes]], model: str, damage: str
) -> None:
    here, written = files
    out, change = here / STORES[model], DAMAGES[damage]
    name = "params/c/3/0" if out.suffix == ".zarr" else f"chunk-{3 * CHUNK:012d}.parquet"
    path = out / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(written[name]))
    streaming.fit_file(here, model, resume=True)
    assert contents(out) == written


OTHER_WORK: dict[str, dict[str, Any]] = {
    "settings": {"reml": False},
    "tests": {"tests": {"slope": "x = 1"}},
    "chunk": {"chunk": 7},
    "design": {"weights": np.linspace(1.0, 2.0, len(streaming.data()))},
}


@pytest.mark.parametrize("what", OTHER_WORK)
def test_a_directory_holds_one_work(files: tuple[Path, dict[str, bytes]], what: str) -> None:
    here, written = files
    model = here.name[:-1]
    options = {"out": here / STORES[model], "resume": True, **OTHER_WORK[what]}
    with pytest.raises(StoreError, match=rf"other work: .*{what}"):
        streaming.fit(model, here / "y.npy", **options)
    with pytest.raises(StoreError, match="holds results already: pass resume=True"):
        streaming.fit_file(here, model)
    assert contents(here / STORES[model]) == written


def test_other_responses_of_the_same_shape_are_other_work(
    files: tuple[Path, dict[str, bytes]], model: str, y: np.ndarray
) -> None:
    out = files[0] / STORES[model]
    with pytest.raises(StoreError, match="other work: values differ"):
        streaming.fit(model, y + 1.0, out=out, resume=True)


def test_what_is_no_result_is_not_written_over(tmp_path: Path, y: np.ndarray) -> None:
    zarr.create_array(store=str(tmp_path / "own.zarr"), data=y)
    for resume in (False, True):
        with pytest.raises(StoreError, match=r"own.zarr' cannot be made .*use another"):
            streaming.fit("intercept", y, out=tmp_path / "own.zarr", resume=resume)
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "own.zarr"))[:], y)
    assert [path.name for path in tmp_path.iterdir()] == ["own.zarr"]


# --- sources --------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["intercept"], indirect=True)
def test_all_sources_give_the_same(
    plain: lmmax.BatchFit, model: str, y: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "fortran.npy", np.asfortranarray(y))
    frame = pd.DataFrame(y, columns=[f"v{i}" for i in range(K)])
    frame.to_parquet(tmp_path / "y.parquet")
    sliced = streaming.Sliced(y)
    sources: list[Any] = [
        tmp_path / "fortran.npy",
        np.load(tmp_path / "fortran.npy", mmap_mode="r"),
        str(tmp_path / "y.parquet"),
        sparse.csc_array(y),
        sparse.csr_matrix(y),
        sliced,
    ]
    for source in sources:
        found = streaming.fit(model, source)
        equal(found.record, plain.record)
        np.testing.assert_array_equal(found[7].params, plain[7].params)
    assert list(streaming.fit(model, sources[2]).names) == list(frame.columns)
    # The first few, one at the end, and then a block each: nothing is read as a whole.
    assert max(columns for _, columns in sliced.asked) < K // 2


# --- workers --------------------------------------------------------------------------------


def test_threads_give_the_same(plain: lmmax.BatchFit, model: str, y: np.ndarray) -> None:
    with ThreadPoolExecutor(3) as threads:
        equal(streaming.fit(model, y, executor=threads).record, plain.record)


@pytest.mark.parametrize("model", ["intercept"], indirect=True)
def test_processes_give_the_same(plain: lmmax.BatchFit, model: str, y: np.ndarray) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        equal(streaming.fit(model, y, executor=processes).record, plain.record)


class Killing(Executor):
    """Kills one of its workers when the third block has been handed to them."""

    def __init__(self, executor: Any, pid: Callable[[], int]) -> None:
        self.executor, self.pid, self.count = executor, pid, 0

    def submit(self, *arguments: Any) -> Any:  # type: ignore[override]
        self.count += 1
        future = self.executor.submit(*arguments)
        if self.count == 3:
            os.kill(self.pid(), signal.SIGKILL)
        return future


def test_a_killed_worker_loses_nothing(
    files: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    here, written = files
    model = here.name[:-1]
    out = tmp_path / STORES[model]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        killing = Killing(pool, lambda: next(iter(pool._processes)))
        with pytest.warns(LostWorkerWarning, match="its responses are fitted here"):
            streaming.fit(model, here / "y.npy", out=out, executor=killing)
    assert contents(out) == written
    assert killing.count > 3


@pytest.mark.parametrize("model", ["intercept"], indirect=True)
def test_dask_goes_on_without_a_killed_worker(
    files: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    import distributed

    here, written = files
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            local_directory=str(tmp_path / "dask"),
            silence_logs="CRITICAL",
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = list(client.run(os.getpid).values())
        killing = Killing(client.get_executor(), lambda: pids[0])
        streaming.fit("intercept", here / "y.npy", out=tmp_path / "o.zarr", executor=killing)
        left = list(client.run(os.getpid).values())
    assert pids[0] not in left
    assert killing.count == K // CHUNK
    assert contents(tmp_path / "o.zarr") == written


def test_an_error_of_a_fit_is_not_taken_for_a_lost_worker() -> None:
    class Wrong:
        def done(self, y: np.ndarray) -> Any:
            raise ZeroDivisionError("of the fit")

    class Source:
        names = pd.RangeIndex(3)

        def block(self, first: int, last: int) -> np.ndarray:
            return np.zeros((4, last - first))

    with ThreadPoolExecutor(1) as threads, warnings.catch_warnings():
        warnings.simplefilter("ignore", LostWorkerWarning)
        with pytest.raises(ZeroDivisionError, match="of the fit"):
            list(stream(Wrong(), Source(), 1, None, threads))  # type: ignore[arg-type]


# --- several processes ----------------------------------------------------------------------


@pytest.mark.parametrize("model", ["intercept"], indirect=True)
def test_two_processes_of_a_job_do_the_same_as_one(
    files: tuple[Path, dict[str, bytes]], tmp_path: Path, y: np.ndarray
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    calls = [
        f"from tests.streaming import in_job; in_job({i}, 2, {port}, {str(tmp_path)!r})"
        for i in range(2)
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, env=environment) for call in calls
    ]
    alone = streaming.fit("slope", y[:, :25])
    assert [process.wait() for process in running] == [0, 0]
    assert contents(tmp_path / "out.zarr") == files[1]
    stored = lmmax.BatchFit.open(tmp_path / "out.zarr")
    for i in range(2):
        found = np.load(tmp_path / f"process-{i}.npz")
        for field, mine in zip(Record._fields, alone.record, strict=True):
            np.testing.assert_array_equal(found[field], mine, err_msg=field)
        np.testing.assert_array_equal(found["stored"], stored.params)
        np.testing.assert_array_equal(found["rows"], np.where(np.isnan(y).any(0), 80, 81))
        # What goes wrong in one goes wrong in both, and none waits for the other.
        held, other = found["errors"]
        assert "holds results already" in held
        assert "were given different work" in other


# --- memory and order -----------------------------------------------------------------------


class Slow:
    """Work that returns its responses, later ones sooner."""

    def done(self, y: np.ndarray) -> Any:
        time.sleep(0.02 if int(y[0, 0]) % 3 == 0 else 0.001)
        return y[0].copy(), np.full(y.shape[1], len(y))


class Numbers:
    """A source whose blocks are made when asked for, and counted."""

    def __init__(self, rows: int, k: int) -> None:
        self.rows, self.names, self.made = rows, pd.RangeIndex(k), 0

    def block(self, first: int, last: int) -> np.ndarray:
        self.made += 1
        return np.ones((self.rows, 1)) * np.arange(first, last)


@pytest.mark.parametrize("workers", [0, 4])
def test_results_come_in_order_and_little_is_read_ahead(workers: int) -> None:
    size, rows, k = 5, 20_000, 200
    source, done = Numbers(rows, k), 0
    with ThreadPoolExecutor(max(workers, 1)) as threads:
        tracemalloc.start()
        executor = threads if workers else None
        for record, n_obs in stream(Slow(), source, size, None, executor):  # type: ignore[arg-type]
            np.testing.assert_array_equal(record, np.arange(done, done + size))
            done += len(n_obs)
            assert source.made <= done // size + (11 if workers else 2)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert done == k
    # 40 blocks go through.
    assert peak < (14 if workers else 5) * 8 * rows * size


def test_what_is_done_is_stored_while_an_earlier_block_is_not() -> None:
    class Kept:
        def __init__(self) -> None:
            self.written: list[int] = []
            self.five = Event()

        def read(self, first: int) -> None:
            return None

        def write(self, first: int, *_: Any) -> None:
            self.written.append(first)
            if len(self.written) == 5:
                self.five.set()

    class First:
        def done(self, y: np.ndarray) -> Any:
            if y[0, 0] == 0:
                assert kept.five.wait(60.0)
            return y[0].copy(), np.full(y.shape[1], len(y))

    kept = Kept()
    with ThreadPoolExecutor(2) as threads:
        arguments: Any = (First(), Numbers(1, 12), 1, kept, threads)
        found = [int(record[0]) for record, _ in stream(*arguments)]
    assert found == list(range(12))
    assert sorted(kept.written) == found
    assert 0 not in kept.written[:5]


def test_results_in_a_directory_are_not_held_in_memory(tmp_path: Path) -> None:
    k, chunk = 20_000, 200
    y = np.nan_to_num(streaming.responses(k))
    # Compiles, and imports what writes.
    streaming.fit("intercept", y[:, :400], chunk=chunk, out=tmp_path / "warm")
    tracemalloc.start()
    batch = streaming.fit("intercept", y, chunk=chunk, out=tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    results = sum(leaf.nbytes for leaf in batch.record)
    assert peak < 5 * y[:, :chunk].nbytes + 3 * batch.n_obs.nbytes < 0.6 * results
    # One array at a time, when it is asked for.
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    assert np.isfinite(batch.params.to_numpy()).all()
    assert tracemalloc.get_traced_memory()[1] - before < 0.5 * results
    tracemalloc.stop()


def test_memory_is_bounded_by_the_chunk(tmp_path: Path) -> None:
    """Of a file of ten chunks; a second chunk is read while one is fitted."""
    rng = np.random.default_rng(0)
    n, chunk = 4000, 100
    table = pd.DataFrame({"g": np.repeat(np.arange(400), 10), "x": rng.normal(size=n)})
    held = np.lib.format.open_memmap(
        tmp_path / "y.npy", mode="w+", dtype=np.float32, shape=(n, 10 * chunk)
    )
    for first in range(0, 10 * chunk, chunk):
        held[:, first : first + chunk] = rng.normal(size=(n, chunk))
    del held

    def peak(**options: Any) -> int:
        tracemalloc.start()
        lmmax.fit_many("~ x + (1 | g)", table, tmp_path / "y.npy", **options)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(chunk=chunk)  # compiles
    block = 4 * n * chunk
    assert peak(chunk=chunk) < 5 * block
    assert peak(chunk=5 * chunk) > 5 * block


# --- devices --------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_devices(tmp_path: Path) -> None:
    running = []
    for count in (2, 4):  # which share the cores of one
        flags = f"--xla_force_host_platform_device_count={count}"
        call = f"from tests.streaming import on_devices; on_devices({str(tmp_path / str(count))!r})"
        command = [sys.executable, "-c", call]
        running.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}))
    streaming.on_devices(str(tmp_path / "here"))
    one = np.load(tmp_path / "here.npz")
    for count, process in zip((2, 4), running, strict=True):
        assert process.wait() == 0
        found = np.load(tmp_path / f"{count}.npz")
        # Compiled for all of them, and once.
        assert found["devices"] == count and found["compiled"].tolist() == [0, 1, 0, 1]
        for model in MODELS:
            assert (found[f"{model}.status"] == Status.CONVERGED).all()
            for field in Record._fields:
                # What is zero at a minimum has no digits.
                atol = 1e-9 if field == "gradient" else 1e-12
                name = f"{model}.{field}"
                np.testing.assert_allclose(found[name], one[name], 1e-12, atol, err_msg=name)


def test_forked_processes_are_refused(y: np.ndarray) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as forked:
        with pytest.raises(ValueError, match=r"by fork.*get_context\(\"spawn\"\)"):
            streaming.fit("intercept", y, executor=forked)
        assert not forked._processes

    class Own:
        """An executor of one's own."""

        def submit(self, call: Any, *given: Any) -> Any:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(call, *given)

    own: Any = Own()
    equal(
        streaming.fit("intercept", y[:, :20], executor=own).record,
        streaming.fit("intercept", y[:, :20]).record,
    )
