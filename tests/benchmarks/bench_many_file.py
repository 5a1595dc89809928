"""From a file of responses to results, beside reading the file and multiplying it once by X.

Usage: ``python -m tests.benchmarks.bench_many_file [--quick] [--directory DIRECTORY]``

10,000 subjects with two visits each, 20,000 responses, single precision, 1.6 GB; random intercepts.
Each way runs in a process of its own, in turns, with the file in the page cache and what it
compiles on disk; the least time of each counts.  "read" is ``np.load``, "X'y" is ``X.T @ y`` in
single precision of what was read; "blocks" is the same through one small buffer, each block turned
to double precision before it is multiplied, as sums are to be.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from tests.benchmarks.harness import ROOT

ROUNDS, BUFFER_BYTES = 3, 1 << 20


def write(path: Path, m: int, k: int) -> None:
    """Write responses of m subjects, in the order of the subjects, some without their variance."""
    rng = np.random.default_rng(0)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(2 * m, k))
    sd = np.sqrt(rng.uniform(0.0, 2.0, size=k) * (rng.random(k) > 0.1)).astype(np.float32)
    step = 500
    for first in range(0, 2 * m, 2 * step):
        u = sd * rng.standard_normal((step, k), dtype=np.float32)
        file[first : first + 2 * step] = 100.0 + np.repeat(u, 2, axis=0)
        file[first : first + 2 * step] += rng.standard_normal((2 * step, k), dtype=np.float32)
    file.flush()


def whole(path: Path, m: int) -> None:
    """Read the file as a whole, and multiply it by X."""
    y = np.load(path)
    np.ones((2 * m, 1), np.float32).T @ y


def blocks(path: Path, m: int) -> None:
    """Read the file block by block, and multiply each by X in double precision."""
    head = np.load(path, mmap_mode="r")
    n, k = head.shape
    rows = max(BUFFER_BYTES // (4 * k), 1)
    found, buffer, X = np.zeros((1, k)), np.empty((rows, k), np.float32), np.ones((2 * m, 1))
    with open(path, "rb", buffering=0) as file:
        file.seek(head.offset)
        for first in range(0, n, rows):
            part = buffer[: n - first]
            file.readinto(memoryview(part).cast("B"))
            found += X[first : first + rows].T @ part.astype(float)


def fits(path: Path, m: int) -> None:
    """From the file to coefficients, errors, degrees of freedom and certificates."""
    import lmmax

    table = pd.DataFrame({"subject": np.repeat(np.arange(m), 2)})
    batch = lmmax.fit_many("~ 1 + (1 | subject)", table, path)
    assert batch.converged.all()


WAYS: dict[str, Callable[[Path, int], None]] = {"whole": whole, "blocks": blocks, "fits": fits}


def run(way: str, path: Path, m: int) -> tuple[float, float]:
    """Return the seconds of one way, of the clock and of the processors, in a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_many_file"]
    command += ["--way", way, "--directory", str(path.parent), "--subjects", str(m)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    seconds, processor = out.split()[-2:]
    return float(seconds), float(processor)


def timed(way: str, path: Path, m: int) -> None:
    """Time one way in this process, what it imports and compiles left out."""
    if way == "fits":  # the last block has a size of its own, so all of it
        fits(path, m)
    began, cpu = time.perf_counter(), time.process_time()
    WAYS[way](path, m)
    print(time.perf_counter() - began, time.process_time() - cpu)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the responses")
    parser.add_argument("--directory", type=Path, help="where the file is made, or is")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--subjects", type=int, default=10_000, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        timed(asked.way, asked.directory / "responses.npy", asked.subjects)
        return
    with tempfile.TemporaryDirectory(dir=asked.directory) as directory:
        path, m = Path(directory) / "responses.npy", asked.subjects
        k = 2_000 if asked.quick else 20_000
        write(path, m, k)
        best = {way: (np.inf, np.inf) for way in WAYS}
        for _ in range(ROUNDS):
            for way in WAYS:
                clock, cpu = run(way, path, m)
                best[way] = (min(best[way][0], clock), min(best[way][1], cpu))
    print(f"{m:,} subjects, {2 * m:,} rows, {k:,} responses, {8 * m * k / 1e9:.2g} GB")
    print(f"{'':34}{'seconds':>9}{'processor':>11}")
    names = {"whole": "read, X'y", "blocks": "blocks, X'y in double precision"}
    for way, label in {
        **names,
        "fits": f"file to results, {k / best['fits'][0]:,.0f} a second",
    }.items():
        print(f"{label:34}{best[way][0]:9.2f}{best[way][1]:11.2f}")
    for way, label in names.items():
        clock, cpu = (best["fits"][i] / best[way][i] for i in (0, 1))
        print(f"{'ratio to ' + label:44}{clock:5.2f} (of processor seconds {cpu:.2f})")


if __name__ == "__main__":
    main()
