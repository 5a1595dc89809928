"""`plan`: what it predicts is what happens."""

from __future__ import annotations

import os
import tracemalloc
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.batch.plan import Plan, PlanError, free_memory, plan

N = 2000
MODELS = {"~ x + (1 | g)": 2000, "~ x + (1 + x | g)": 1000}


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"g": np.repeat(np.arange(100), 20), "x": rng.normal(size=N)})


@pytest.fixture(scope="module")
def path(data: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Responses with both effects, none at the boundary, in single precision."""
    rng, found = np.random.default_rng(1), tmp_path_factory.mktemp("plan") / "y.npy"
    codes, x = data["g"].to_numpy(), data["x"].to_numpy()[:, None]
    u, v = rng.standard_normal((2, 100, 2000), dtype=np.float32)
    y = u[codes] + v[codes] * x + rng.standard_normal((N, 2000), dtype=np.float32)
    np.save(found, y.astype(np.float32))
    return found


def peak(call: Any) -> int:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    call()
    found = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return found


@pytest.mark.parametrize("formula", MODELS)
@pytest.mark.parametrize("share", [1, 5])
def test_peak_memory(
    data: pd.DataFrame, path: Path, formula: str, share: int, tmp_path: Path
) -> None:
    y = np.load(path, mmap_mode="r")[:, : MODELS[formula]]
    chunk = y.shape[1] // share
    ways: list[dict[str, Any]] = [{}]
    with ThreadPoolExecutor(2) as threads:
        if share > 1 and "x |" not in formula:
            ways += [{"out": tmp_path / "out"}, {"executor": threads}]
        for way in ways:
            predicted = plan(formula, data, y, chunk=chunk, **way)
            measured = peak(
                lambda way=way: lmmax.fit_many(formula, data, y, chunk=chunk, **way)  # type: ignore[misc]
            )
            assert 1 / 1.5 < predicted.peak_bytes / measured < 1.5, way
            assert predicted.chunk == chunk and predicted.chunks == share
            assert predicted.bytes_to_read == y.nbytes
            assert predicted.workers == (2 if "executor" in way else 1)
            assert predicted.worker_bytes == 0


def test_subsets_and_processes(data: pd.DataFrame, path: Path) -> None:
    y = np.load(path, mmap_mode="r")
    stores = np.repeat(np.arange(250), 8)
    table = data.assign(y=y[:, 0], g=np.tile(np.arange(4), 500), store=stores)
    formula, options = "y ~ x + (1 | g)", {"by": "store", "chunk": 125}
    found = plan(formula, table, **options)  # type: ignore[arg-type]
    measured = peak(lambda: lmmax.fit_many(formula, table, **options))  # type: ignore[arg-type]
    assert 1 / 1.5 < found.peak_bytes / measured < 1.5
    assert (found.responses, found.chunks, found.rows, found.bytes_to_read) == (250, 2, N, 0)
    # Those of a pool have a block each, and this process those that wait.
    with ProcessPoolExecutor(3) as processes:
        shared = plan("~ x + (1 | g)", data, path, chunk=100, executor=processes)
        alone = plan("~ x + (1 | g)", data, path, chunk=100)
        assert (shared.workers, shared.chunks) == (3, 20)
        block = 4 * N * 100
        # X, Z and the groups of each row are there as well.
        assert shared.peak_bytes == 10 * block + alone.result_bytes + 32 * N
        assert shared.worker_bytes > block
        with pytest.raises(PlanError, match="pass chunk="):
            plan("~ x + (1 | g)", data, path, executor=processes, memory=shared.peak_bytes)
    with pytest.raises(ValueError, match="give one of responses= and by="):
        plan(formula, table)


def test_what_is_known_before(data: pd.DataFrame, path: Path) -> None:
    found = plan("~ x + (1 | g)", data, path, chunk=300, tests={"slope": "x = 1"})
    batch = lmmax.fit_many("~ x + (1 | g)", data, path, tests={"slope": "x = 1"})
    assert (found.responses, found.rows, found.chunks) == (2000, N, 7)
    assert found.engine == batch.engine
    assert found.bytes_to_read == path.stat().st_size
    assert found.result_bytes == sum(leaf.nbytes for leaf in batch.record)
    assert found.read_seconds > 0.0 and found.fit_seconds > 0.0
    assert found.rate == pytest.approx(2000 / found.seconds)


def test_it_prints() -> None:
    numbers = (10_000, 10**8, 5 * 10**8, 2 * 10**10, 512, 4, 20)
    found = Plan(1_000_000, 1000, 8 * 10**9, "E", *numbers)
    assert str(found).splitlines() == [
        "1,000,000 responses of 1,000 rows, 8 GB to read",
        "engine: E",
        "chunks: 100 of 10,000 responses",
        "memory: 500 MB at the peak, of which 100 MB are results; 20 GB are free",
        "time:   20 s, 49,900 responses a second (reading 4 s, fitting 20 s; by a pilot",
        "    of 512)",
    ]
    spread = Plan(1_000_000, 1000, 8 * 10**9, "E", *numbers, 10**7, 4, 2)
    assert str(spread).splitlines()[2:5] == [
        "chunks: 100 of 10,000 responses, on 4 workers, on 2 devices",
        "memory: 500 MB at the peak and 10 MB in each worker, of which 100 MB are",
        "    results; 20 GB are free",
    ]


def test_what_cannot_fit_is_refused(data: pd.DataFrame, path: Path) -> None:
    fits = plan("~ x + (1 | g)", data, path, chunk=100).peak_bytes
    with pytest.raises(PlanError, match=r"in chunks of 2,000, and .* are free: pass chunk=\d+ or"):
        plan("~ x + (1 | g)", data, path, memory=fits)
    with pytest.raises(PlanError, match="in several parts, each with an out= of its own"):
        plan("~ x + (1 | g)", data, path, memory=10_000)
    with pytest.raises(ValueError, match="chunk=0 must be a whole number"):
        plan("~ x + (1 | g)", data, path, chunk=0)


def test_free_memory_is_part_of_the_machine() -> None:
    found = free_memory()
    assert found is None or 0 < found < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
