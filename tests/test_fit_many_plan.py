"""`plan`: what it predicts is what happens."""

from __future__ import annotations

import os
import tracemalloc
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
def test_peak_memory_is_within_a_factor_of_two(
    data: pd.DataFrame, path: Path, formula: str, share: int
) -> None:
    y = np.load(path, mmap_mode="r")[:, : MODELS[formula]]
    chunk = y.shape[1] // share
    predicted = plan(formula, data, y, chunk=chunk)
    measured = peak(lambda: lmmax.fit_many(formula, data, y, chunk=chunk))
    assert 0.5 < predicted.peak_bytes / measured < 2.0
    assert predicted.chunk == chunk and predicted.chunks == share
    assert predicted.bytes_to_read == y.nbytes


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
    found = Plan(1_000_000, 1000, 8 * 10**9, "E", 10_000, 10**8, 5 * 10**8, 2 * 10**10, 512, 4, 20)
    assert str(found).splitlines() == [
        "1,000,000 responses of 1,000 rows, 8 GB to read",
        "engine: E",
        "chunks: 100 of 10,000 responses",
        "memory: 500 MB at the peak, of which 100 MB are results; 20 GB are free",
        "time:   20 s, 49,900 responses a second (reading 4 s, fitting 20 s; by a pilot of 512)",
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
