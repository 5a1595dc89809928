"""Times of inference on fitted models, ours and those of R, in one table.

Usage: ``python -m tests.benchmarks.bench_inference [--libraries NAME ...] [--quick]``

R's lmerTest, pbkrtest and lme4 are measured in the same run where Rscript finds them.

How times are taken: what is asked of a fit, on a fit that has not been asked before, without the
fit itself; the median over rounds. The first call includes compiling, with an empty compilation
cache, in a process of its own. R's ``bootMer`` has fewer replicates, and its time is scaled up.

With a million rows the time of the fit stands beside that of the tests, and the memory is what they
take beyond what the fit has left.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from tests.benchmarks.harness import HERE, ROOT, memory, reset_peak, table
from tests.reference import load_data

MODULE = "tests.benchmarks.bench_inference"
LIBRARIES = ("lmmax", "R")
BOOTSTRAPS, R_BOOTSTRAPS = 10_000, 300
SLEEP = "Reaction ~ Days + (1 + Days | Subject)"


def slopes() -> pd.DataFrame:
    """2,000 rows in 200 groups, with a factor between groups."""
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(200), 10)
    x = rng.standard_normal(2000)
    b = rng.standard_normal((200, 2)) * [1.0, 0.5]
    y = 1.0 + x + b[g, 0] + b[g, 1] * x + rng.standard_normal(2000)
    return pd.DataFrame({"y": y, "x": x, "f": np.array(list("abc"))[g % 3], "g": g})


def million() -> pd.DataFrame:
    """10^6 rows in 10^5 groups of unequal size."""
    rng = np.random.default_rng(0)
    n, m = 1_000_000, 100_000
    g = rng.integers(0, m, n)
    x, w = rng.standard_normal((2, n))
    b = rng.standard_normal((m, 2)) * [1.0, 0.5]
    y = 1.0 + x + b[g, 0] + b[g, 1] * x + rng.standard_normal(n)
    return pd.DataFrame({"y": y, "x": x, "w": w, "g": g})


def calls() -> dict[str, Callable[[], Any]]:
    """What is timed; each on a fit without anything remembered."""
    import lmmax

    large = lmmax.fit("y ~ x * f + (1 + x | g)", slopes())
    cake = lmmax.fit(
        "angle ~ recipe * temperature + (1 | recipe:replicate)", lmmax.datasets.load("cake")
    )
    sleep = lmmax.fit(SLEEP, lmmax.datasets.load("sleepstudy"))
    return {
        "satterthwaite": lambda: replace(large).coefficients(),
        "kenward_roger": lambda: replace(large).coefficients("kenward-roger"),
        "anova": lambda: lmmax.anova(replace(cake), ddf="kenward-roger"),
        "profile": lambda: lmmax.confint(replace(sleep), method="profile"),
        "bootstrap": lambda: lmmax.bootstrap(replace(sleep), n=BOOTSTRAPS),
        "robust": lambda: lmmax.robust(replace(large)).coefficients(),
    }


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def ours(rounds: int) -> dict[str, float]:
    """First and later times of each call in this process."""
    figures = {}
    for name, call in calls().items():
        figures[f"{name}_first"] = timed(call)
        figures[name] = median(timed(call) for _ in range(rounds))
    return figures


def ours_large() -> dict[str, float]:
    """A million rows: seconds of the fit and of tests, and the memory beyond the fit's."""
    import lmmax

    data, figures = million(), {}
    for name in ("first", "second"):
        began = time.perf_counter()
        fit = lmmax.fit("y ~ x + w + (1 + x | g)", data)
        figures[f"large_fit_{name}"] = time.perf_counter() - began
        reset_peak()
        before = memory("VmRSS")
        tests: dict[str, Callable[[Any], Any]] = {
            "satterthwaite": lambda fit: fit.coefficients(),
            "kenward_roger": lambda fit: replace(fit).coefficients("kenward-roger"),
            "robust": lambda fit: lmmax.robust(fit).coefficients(),
        }
        for test, call in tests.items():
            figures[f"large_{test}_{name}"] = timed(partial(call, fit))
        figures[f"large_memory_{name}"] = memory("VmHWM") - before
    return figures


def child(what: str, rounds: int) -> dict[str, float]:
    """The figures of a fresh process with an empty compilation cache."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", MODULE, "--child", what, "--rounds", str(rounds)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "LMMAX_CACHE_DIR": cache},
        )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def in_r(rounds: int) -> dict[str, float]:
    """R's figures."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("sleepstudy", "cake"):
            load_data(name).to_csv(Path(folder) / f"{name}.csv", index=False)
        slopes().to_csv(Path(folder) / "slopes.csv", index=False)
        script = str(HERE / "bench_inference.R")
        command = ["Rscript", "--vanilla", script, folder, str(rounds), str(R_BOOTSTRAPS)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = {k: float(v) for k, v in (line.split() for line in done.stdout.splitlines())}
    figures["bootstrap"] *= BOOTSTRAPS / R_BOOTSTRAPS
    return figures


def _titles(name: str, title: str, bar: str) -> dict[str, tuple[str, str, float, str]]:
    return {
        name: (title, "ms", 1e3, bar),
        f"{name}_first": ("  first call", "s", 1.0, "-"),
    }


ROWS = {
    **_titles("satterthwaite", "Satterthwaite, 2,000 rows, 200 groups, p = 6", "-"),
    **_titles("kenward_roger", "Kenward-Roger, the same", "R / 20"),
    **_titles("anova", "anova, type III, Kenward-Roger, cake", "-"),
    **_titles("robust", "CR2 with Satterthwaite, 2,000 rows", "-"),
    **_titles("profile", "profile limits, sleepstudy (Days | Subject)", "R / 20"),
    **_titles("bootstrap", f"{BOOTSTRAPS:,} parametric bootstrap fits, the same", "1000 ms"),
    "large_fit_second": ("10^6 rows, 10^5 groups: the fit", "s", 1.0, "-"),
    "large_satterthwaite_first": ("  Satterthwaite, first call", "s", 1.0, "-"),
    "large_satterthwaite_second": ("  Satterthwaite", "s", 1.0, "2 fits"),
    "large_kenward_roger_second": ("  Kenward-Roger", "s", 1.0, "2 fits"),
    "large_robust_second": ("  CR2 with Satterthwaite", "s", 1.0, "-"),
    "large_memory_second": ("  memory beyond the fit's", "GB", 1e-9, "2 GB"),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="without the million rows")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.child:
        print(json.dumps(ours(arguments.rounds) if arguments.child == "small" else ours_large()))
        return
    rows: dict[str, dict[str, float]] = {}
    present = [n for n in arguments.libraries if n == "lmmax" or shutil.which("Rscript")]
    for library in present:
        if library == "R":
            figures = in_r(arguments.rounds)
        else:
            figures = child("small", arguments.rounds)
            if not arguments.quick:
                figures |= child("large", 1)
        for name, value in figures.items():
            rows.setdefault(name, {})[library] = value
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(table(ROWS, rows, present))


if __name__ == "__main__":
    main()
