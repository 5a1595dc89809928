"""Times of the same calls in `lmmax.statsmodels` and in statsmodels, in one table.

Usage: ``python -m tests.benchmarks.bench_statsmodels [--quick] [--only PART ...]``

Both are given the same line, ``mixedlm(formula, data, groups=..., ...).fit()``, with its defaults:
from a data frame in memory to the results, among them standard errors and the log-likelihood.

How times are taken:

* Warm rows: in one process, in turns; ours is the median, after an untimed call. statsmodels has
  fewer turns where one takes long, for it has nothing to warm up. Below each row stands how many
  times as fast we are, and after the table how far above the lowest criterion each one stopped.
* Cold rows: a fresh process from its start to its exit, that imports, simulates the data, fits,
  and prints the summary; ours with an empty compilation cache and with a filled one.

``--quick`` leaves out what takes statsmodels more than a few seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.benchmarks.harness import ROOT, check_criteria, criterion, installed, table

MODULE = "tests.benchmarks.bench_statsmodels"
LIBRARIES = ("lmmax", "statsmodels")
SLOW = 5.0  # seconds of a call of statsmodels that is made once only; four times that of a process


def longitudinal(groups: int) -> pd.DataFrame:
    """Groups of five rows, with intercepts and slopes of their own."""
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(groups), 5)
    x = rng.standard_normal(len(g))
    b = rng.standard_normal((groups, 2)) * [1.0, 0.5]
    y = 1.0 + 0.5 * x + b[g, 0] + b[g, 1] * x + rng.standard_normal(len(g))
    return pd.DataFrame({"y": y, "x": x, "g": g})


def nested(groups: int) -> pd.DataFrame:
    """Five sub-groups of four rows in each group, their labels used again in every group."""
    rng = np.random.default_rng(0)
    g, sub = np.repeat(np.arange(groups), 20), np.tile(np.repeat(np.arange(5), 4), groups)
    y = 2.0 * rng.standard_normal(groups)[g] + 3.0 * rng.standard_normal(5 * groups)[5 * g + sub]
    return pd.DataFrame({"y": y + 4.0 * rng.standard_normal(len(g)), "g": g, "sub": sub})


def crossed(levels: int) -> pd.DataFrame:
    """Every pair of the levels of two factors once."""
    rng = np.random.default_rng(0)
    a, b = np.divmod(np.arange(levels**2), levels)
    y = 2.0 * rng.standard_normal(levels)[a] + 3.0 * rng.standard_normal(levels)[b]
    y += 4.0 * rng.standard_normal(len(a))
    return pd.DataFrame({"y": y, "a": a, "b": b, "all": 1})


@dataclass(frozen=True)
class Case:
    """A call, and its row of the table.

    Attributes:
        title: what it is.
        data: makes the data, of a size.
        size: number of groups, or of levels of each factor.
        formula: fixed effects.
        arguments: what else `mixedlm` is given.
        bar: how many times as fast we shall be.
    """

    title: str
    data: Callable[[int], pd.DataFrame]
    size: int
    formula: str
    arguments: dict[str, Any]
    bar: int | None = None


INTERCEPT: dict[str, Any] = {"groups": "g"}
SLOPE = {"groups": "g", "re_formula": "~x"}
NESTED = {"groups": "g", "re_formula": "1", "vc_formula": {"sub": "0 + C(sub)"}}
CROSSED = {"groups": "all", "vc_formula": {"a": "0 + C(a)", "b": "0 + C(b)"}}
CASES = {
    "intercept_1000": Case("intercept, 1,000 groups", longitudinal, 1_000, "y ~ x", INTERCEPT, 20),
    "intercept_5000": Case("intercept, 5,000 groups", longitudinal, 5_000, "y ~ x", INTERCEPT),
    "intercept_20000": Case(
        "intercept, 20,000 groups", longitudinal, 20_000, "y ~ x", INTERCEPT, 300
    ),
    "slope_1000": Case(
        "intercept and slope, 1,000 groups", longitudinal, 1_000, "y ~ x", SLOPE, 20
    ),
    "slope_5000": Case("intercept and slope, 5,000 groups", longitudinal, 5_000, "y ~ x", SLOPE),
    "slope_20000": Case(
        "intercept and slope, 20,000 groups", longitudinal, 20_000, "y ~ x", SLOPE, 300
    ),
    "nested_200": Case("nested component, 200 groups of 5", nested, 200, "y ~ 1", NESTED),
    "crossed_50": Case("crossed components, 50 x 50", crossed, 50, "y ~ 1", CROSSED),
    "crossed_50_sparse": Case(
        "crossed components, 50 x 50, use_sparse",
        crossed,
        50,
        "y ~ 1",
        CROSSED | {"use_sparse": True},
    ),
}
QUICK = ("intercept_1000", "slope_1000", "nested_200", "crossed_50_sparse")
COLD = ("intercept_1000", "slope_1000", "slope_20000")


def fitter(library: str, case: Case, data: pd.DataFrame) -> Callable[[], Any]:
    """A call that makes and fits the model; imports happen here, untimed."""
    if library == "lmmax":
        from lmmax.statsmodels import mixedlm
    else:
        from statsmodels.formula.api import mixedlm
    # Importing statsmodels switches its own warnings on.
    warnings.simplefilter("ignore")
    return lambda: mixedlm(case.formula, data, **case.arguments).fit()


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Time of a call, and what it returned."""
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def warm_rows(present: list[str], names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and criteria of each case and library."""
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        case = CASES[name]
        data = case.data(case.size)
        calls = {library: fitter(library, case, data) for library in present}
        times: dict[str, list[float]] = {library: [] for library in present}
        for library, call in calls.items():
            first, fit = seconds(call)
            rows.setdefault(f"{name}_criterion", {})[library] = criterion(fit)
            if library != "lmmax":
                times[library].append(first)
            del fit
        for _ in range(rounds):
            for library, call in calls.items():
                if library == "lmmax" or times[library][0] < SLOW:
                    times[library].append(seconds(call)[0])
        rows[name] = {library: statistics.median(taken) for library, taken in times.items()}
    return rows


def once(name: str, library: str) -> None:
    """Run in a fresh process: fit one case and print its summary."""
    case = CASES[name]
    print(fitter(library, case, case.data(case.size))().summary())


def cold_rows(present: list[str], names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of whole processes; ours with an empty and with a filled compilation cache."""

    def process(name: str, library: str, cache: str) -> float:
        command = [sys.executable, "-m", MODULE, "--child", name, library]
        environment = {**os.environ, "LMMAX_CACHE_DIR": cache}
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment)
        return time.perf_counter() - began

    times: dict[str, dict[str, list[float]]] = {}
    for name in names:
        empty, filled = f"cold_{name}", f"filled_{name}"
        for _ in range(rounds):
            for library in present:
                known = times.get(empty, {}).get(library, [0.0])
                if library != "lmmax" and known[0] > 4.0 * SLOW:
                    continue
                with tempfile.TemporaryDirectory() as cache:
                    taken = process(name, library, cache)
                    times.setdefault(empty, {}).setdefault(library, []).append(taken)
                    if library == "lmmax":
                        taken = process(name, library, cache)
                    times.setdefault(filled, {}).setdefault(library, []).append(taken)
    return {
        row: {library: statistics.median(taken) for library, taken in found.items()}
        for row, found in times.items()
    }


def titles() -> dict[str, tuple[str, str, float, str]]:
    """Row: title, unit, factor to that unit, the bar."""
    found = {}
    for name, case in CASES.items():
        found[name] = (case.title, "ms", 1e3, "-")
        bar = "-" if case.bar is None else f"{case.bar} x"
        found[f"{name}_speed"] = ("  times as fast as statsmodels", "x", 1.0, bar)
    for name in COLD:
        title = CASES[name].title
        found[f"cold_{name}"] = (f"cold process, {title}", "s", 1.0, "-")
        found[f"filled_{name}"] = ("  the same, filled cache", "s", 1.0, "-")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only what takes seconds")
    parser.add_argument("--only", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        once(*arguments.child)
        return
    present = installed(arguments.libraries)
    rows: dict[str, dict[str, float]] = {}
    if "warm" in arguments.only:
        names = list(QUICK if arguments.quick else CASES)
        rows |= warm_rows(present, names, 3 if arguments.quick else 7)
        for name in names:
            if {"lmmax", "statsmodels"} <= rows[name].keys():
                rows[f"{name}_speed"] = {"lmmax": rows[name]["statsmodels"] / rows[name]["lmmax"]}
    if "cold" in arguments.only:
        cold = [name for name in COLD if name in QUICK or not arguments.quick]
        rows |= cold_rows(present, cold, 1 if arguments.quick else 3)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(table(titles(), rows, present))
    print(check_criteria(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
