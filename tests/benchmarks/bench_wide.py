"""Times of models with many columns: structures over many times, hundreds of fixed effects.

Usage: ``python -m tests.benchmarks.bench_wide [--rows NAME ...] [--libraries NAME ...]``

Peers, through Rscript where it is there: glmmTMB for the structures, lme4 for the fixed effects.
Each of our rows is a fresh process with an empty compilation cache: the first call compiles, the
second has another response. Memory is how far the process grew over both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tests.benchmarks.harness import HERE, ROOT, check_criteria, installed, memory, table

MODULE = "tests.benchmarks.bench_wide"
LIBRARIES = ("lmmax", "glmmTMB", "lme4")


@dataclass(frozen=True)
class Times:
    """Autoregressive series over q times for m subjects."""

    q: int
    m: int
    peer: str = "glmmTMB"
    formula: str = "y ~ 1 + ar1(0 + C(t) | g)"
    in_r: str = "y ~ 1 + ar1(0 + t | g)"
    mode: str = "times"

    def data(self) -> pd.DataFrame:
        rng = np.random.default_rng(3)
        lags = np.abs(np.subtract.outer(np.arange(self.q), np.arange(self.q)))
        series = 2.0 * rng.normal(size=(self.m, self.q)) @ np.linalg.cholesky(0.7**lags).T
        return pd.DataFrame(
            {
                "t": np.tile(np.arange(self.q), self.m),
                "g": np.repeat(np.arange(self.m), self.q),
                "y": series.ravel() + 0.5 * rng.normal(size=self.q * self.m),
            }
        )


@dataclass(frozen=True)
class Columns:
    """A dummy variable for each of many firms, and random years that cross them."""

    firms: int
    peer: str = "lme4"
    formula: str = "y ~ x + firm + (1 | year)"
    in_r: str = "y ~ x + firm + (1 | year)"
    mode: str = "columns"

    def data(self) -> pd.DataFrame:
        rng = np.random.default_rng(131)
        firm, year = np.repeat(np.arange(self.firms), 10), np.tile(np.arange(10), self.firms)
        x = rng.normal(size=len(firm))
        y = rng.normal(size=self.firms)[firm] + 0.3 * rng.normal(size=10)[year]
        y += 0.5 * x + rng.normal(size=len(firm))
        return pd.DataFrame({"y": y, "x": x, "firm": firm.astype(str), "year": year})


MODELS = {
    "times_30": Times(30, 80),
    "times_40": Times(40, 12),
    "times_100": Times(100, 80),
    "columns_400": Columns(400),
    "columns_800": Columns(800),
}


def measure(name: str) -> None:
    """Run in a fresh process: fit two responses, print each figure as soon as it is known."""
    import lmmax

    model = MODELS[name]
    warnings.simplefilter("ignore")
    data = model.data()
    before = memory("VmRSS")
    for which, shift in (("first", 0.0), ("second", 1.0)):
        began = time.perf_counter()
        fit = lmmax.fit(model.formula, data.assign(y=data["y"] + shift))
        print(json.dumps({which: time.perf_counter() - began}), flush=True)
    print(json.dumps({"criterion": fit.deviance, "memory": memory("VmHWM") - before}), flush=True)


def ours(name: str) -> dict[str, float]:
    """``measure`` in a fresh process with an empty compilation cache."""
    with tempfile.TemporaryDirectory() as cache:
        text = subprocess.run(
            [sys.executable, "-m", MODULE, "--child", name],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "LMMAX_CACHE_DIR": cache},
        ).stdout
    figures: dict[str, float] = {}
    for line in text.splitlines():
        figures |= json.loads(line)
    return figures


def theirs(name: str, limit: float) -> dict[str, float]:
    """The peer's figures, a time that is infinite beyond the limit."""
    model = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.csv"
        model.data().to_csv(path, index=False)
        command = ["Rscript", "--vanilla", str(HERE / "bench_wide.R")]
        command += [model.mode, str(path), model.in_r]
        try:
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return {"second": float("inf")}
    return {k: float(v) for k, v in (line.split() for line in done.stdout.splitlines())}


def _titles(name: str, title: str, bar: str, most: str) -> dict[str, tuple[str, str, float, str]]:
    return {
        f"{name}_first": (f"{title}, first call", "s", 1.0, "-"),
        f"{name}_second": (f"{title}, second call", "s", 1.0, bar),
        f"{name}_memory": ("  memory", "GB", 1e-9, most),
    }


ROWS = {
    **_titles("times_30", "ar1, 30 times of 80", "glmmTMB", "-"),
    **_titles("times_40", "ar1, 40 times of 12", "glmmTMB", "-"),
    **_titles("times_100", "ar1, 100 times of 80", "5 s", "-"),
    **_titles("columns_400", "400 firms, 4,000 rows", "lme4 / 2", "0.26 GB"),
    **_titles("columns_800", "800 firms, 8,000 rows", "lme4 / 2", "1 GB"),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a peer has for a model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments.child)
        return
    in_r = bool(installed(["lme4"]))
    present = [name for name in arguments.libraries if name == "lmmax" or in_r]
    rows: dict[str, dict[str, float]] = {}
    for name in arguments.rows:
        found = {"lmmax": ours(name)} if "lmmax" in present else {}
        if (peer := MODELS[name].peer) in present:
            found[peer] = theirs(name, arguments.limit)
        for library, figures in found.items():
            for key, value in figures.items():
                rows.setdefault(f"{name}_{key}", {})[library] = value
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(table(ROWS, rows, present))
    print(check_criteria(rows))


if __name__ == "__main__":
    main()
