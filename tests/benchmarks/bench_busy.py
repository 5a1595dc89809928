"""Times of warm calls where the cores are busy: other processes, and several of our own.

Usage: ``python -m tests.benchmarks.bench_busy [--rows NAME ...] [--repeats N]``

Each model is fitted in a fresh process, once to compile, then some times: on a quiet machine,
beside one busy process for each core, and in four processes at once, as in workers of joblib (whose
limits on threads in other libraries are not set here). The figure is the median, and in brackets
its multiple of the quiet one; where processes share cores, the time of each grows by the sharing
alone. Meaningful on an otherwise quiet machine only, and without OPENBLAS_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd

from tests.benchmarks.bench_factors import InstEval, Simulated
from tests.benchmarks.harness import ROOT

MODULE = "tests.benchmarks.bench_busy"
WORKERS = 4
BAR = 2.5
"""Most times the quiet figure with one busy process for each core."""


def _rows(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    g, x = rng.integers(0, n // 20, n), rng.normal(size=n)
    y = rng.normal(size=n // 20)[g] * (1.0 + x) + rng.normal(size=n)
    return pd.DataFrame({"y": y, "x": x, "g": g})


def _fit(formula: str, data: pd.DataFrame, **options: object) -> Callable[[], object]:
    import lmmax

    return lambda: lmmax.fit(formula, data, **options)


def _grouped() -> Callable[[], object]:
    return _fit("y ~ x + (1 + x | g)", _rows(200_000))


def _crossed() -> Callable[[], object]:
    model = InstEval()
    return _fit(model.formula, model.data(1), reml=model.reml)


def _nested() -> Callable[[], object]:
    model = Simulated(200_000, {"a": 20_000, "b": 1_000, "c": 50}, nested=True)
    return _fit(model.formula, model.data(1))


def _iterative() -> Callable[[], object]:
    model = Simulated(100_000, {"a": 10_000, "b": 10_000})
    return _fit(model.formula, model.data(1), engine="iterative")


def _many() -> Callable[[], object]:
    import lmmax

    data = _rows(2_000)
    responses = np.random.default_rng(1).normal(size=(len(data), 5_000))
    return lambda: lmmax.fit_many("~ x + (1 + x | g)", data, responses)


MODELS = {
    "grouped": ("random slopes, 200,000 rows", _grouped),
    "crossed": ("InstEval, three factors", _crossed),
    "nested": ("three nested factors, 200,000 rows", _nested),
    "iterative": ("10,000 x 10,000, iterative", _iterative),
    "many": ("5,000 responses with random slopes", _many),
}


def measure(name: str, repeats: int) -> None:
    """Run in a fresh process: print the median seconds of a warm call."""
    warnings.simplefilter("ignore")
    call = MODELS[name][1]()
    call()
    print("ready", flush=True)
    sys.stdin.readline()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    print(statistics.median(seconds), flush=True)


def median_of(name: str, repeats: int, workers: int = 1) -> float:
    """Return the median seconds in so many processes, which begin together when all are warm."""
    command = [sys.executable, "-m", MODULE, "--child", name, "--repeats", str(repeats)]
    pipe = subprocess.PIPE
    each = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        for _ in range(workers)
    ]
    for process in each:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the fit of {name!r} failed; see above")
    for process in each:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return statistics.median(float(process.communicate()[0]) for process in each)


@contextmanager
def busy() -> Iterator[None]:
    """Keep a process busy for each core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores or 1)
    ]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments.child, arguments.repeats)
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{'':40}{'quiet':>10}{f'busy (at most {BAR})':>24}{f'{WORKERS} at once':>20}")
    for name in arguments.rows:
        quiet = median_of(name, arguments.repeats)
        with busy():
            loaded = median_of(name, arguments.repeats)
        together = median_of(name, arguments.repeats, WORKERS)
        print(
            f"{MODELS[name][0]:40}{quiet:>8.3f} s"
            f"{f'{loaded:.3f} s ({loaded / quiet:.2f})':>24}"
            f"{f'{together:.3f} s ({together / quiet:.2f})':>20}",
            flush=True,
        )


if __name__ == "__main__":
    main()
