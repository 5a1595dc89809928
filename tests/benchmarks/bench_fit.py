"""Times of fits with one grouping factor, ours and those of other software, in one table.

Usage: ``python -m tests.benchmarks.bench_fit [--quick] [--all] [--rows NAME ...]``

Peers are measured in the same run where they are present: the Python packages statsmodels and
glmm, and lme4 through Rscript. ``--quick`` leaves out the rows with a million observations;
``--all`` adds the peers that take minutes there.

How times are taken:

* Warm rows: median over rounds in one process; in each round every package has its turn, so
  that a busy moment of the machine meets all of them. lme4's are taken inside R.
* Rows with a million observations: each package in a fresh process, from the data frame in
  memory to the result; the first call (ours with an empty compilation cache and, in another
  process, with a filled one) and the second. Memory is the process's peak during the call above
  what it held after the imports and before the data, over the size of the data, which is part
  of it.
* Cold rows: a fresh process from its start to its exit, that reads dietox, fits, and prints
  the summary; median of five.

The formula for glmm and lme4 is ours; statsmodels gets the same model in its own terms. glmm
is told to leave out its degrees of freedom, which the others do not compute.
"""

from __future__ import annotations

import argparse
import gc
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

from tests.benchmarks.harness import (
    HERE,
    LIBRARIES,
    ROOT,
    check_criteria,
    criterion,
    installed,
    interleaved,
    memory,
    reset_peak,
    rscript,
    table,
)
from tests.reference import load_data

MODULE = "tests.benchmarks.bench_fit"
DIETOX = HERE.parent / "reference" / "data" / "dietox.csv"


@dataclass(frozen=True)
class Large:
    """A simulated table of a million rows, and its model."""

    n: int
    groups: int
    covariates: int
    effects: int
    slow: tuple[str, ...]  # packages that take minutes, or far more

    @property
    def formula(self) -> str:
        fixed = [f"x{j}" for j in range(1, self.covariates + 1)]
        return f"y ~ {' + '.join(fixed)} + (1 + {' + '.join(fixed[: self.effects - 1])} | g)"

    def data(self) -> pd.DataFrame:
        """Groups of unequal size in random order; unit residual variance."""
        rng = np.random.Generator(np.random.PCG64(1))
        codes = rng.integers(0, self.groups, self.n)
        x = rng.standard_normal((self.n, self.covariates))
        b = rng.standard_normal((self.groups, self.effects))
        b *= np.linspace(1.0, 0.4, self.effects)
        y = 1.0 + 0.5 * x.sum(axis=1) + b[codes, 0] + rng.standard_normal(self.n)
        for j in range(1, self.effects):
            y += b[codes, j] * x[:, j - 1]
        columns = {"y": y, **{f"x{j + 1}": x[:, j].copy() for j in range(self.covariates)}}
        return pd.DataFrame({**columns, "g": codes})


LARGE = {
    "many_groups": Large(1_000_000, 100_000, 3, 2, slow=("statsmodels",)),
    "few_groups": Large(1_000_000, 500, 9, 4, slow=("statsmodels", "lme4")),
}


def _statsmodels_terms(formula: str) -> tuple[str, str, str]:
    """Fixed formula, random formula, and group of ``fixed + (effects | group)``."""
    fixed, _, random = formula.partition(" + (")
    effects, _, group = random.rstrip(")").partition(" | ")
    return fixed, f"~ {effects}", group


def fitter(library: str, formula: str, data: pd.DataFrame) -> Callable[[], Any]:
    """A call that fits the model from the data frame; imports happen here, untimed."""
    if library == "lmmax":
        import lmmax

        return lambda: lmmax.fit(formula, data)
    if library == "glmm":
        import glmm

        # glmm takes a column of numbers in a grouping place as labels.
        return lambda: glmm.fit(data, formula, satterthwaite=False)
    import statsmodels.formula.api as smf

    warnings.simplefilter("ignore")  # importing statsmodels switches its own warnings on
    fixed, random, group = _statsmodels_terms(formula)
    return lambda: smf.mixedlm(fixed, data, groups=group, re_formula=random).fit()


def warm_rows(present: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds per row and library for the small data sets."""
    sleepstudy = load_data("sleepstudy")[["Reaction", "Days", "Subject"]]
    dietox = load_data("dietox")[["Weight", "Time", "Pig"]]
    slope = "Reaction ~ Days + (1 + Days | Subject)"
    python = [name for name in present if name != "lme4"]

    def calls(formula: str, data: pd.DataFrame) -> dict[str, Callable[[], Any]]:
        return {name: fitter(name, formula, data) for name in python}

    response = sleepstudy["Reaction"].to_numpy()[::-1].copy()
    other = sleepstudy.assign(Reaction=response)
    refit: dict[str, Callable[[], Any]] = {}
    solve: dict[str, Callable[[], Any]] = {}
    if "lmmax" in python:
        import lmmax

        fitted = lmmax.fit(slope, sleepstudy)
        refit["lmmax"] = lambda: fitted.refit(response)
        solve["lmmax"] = solve_alone(sleepstudy)
    if "glmm" in python:
        refit["glmm"] = fitter("glmm", slope, other)
    if "statsmodels" in python:
        import statsmodels.api as sm

        exog = sm.add_constant(sleepstudy["Days"].to_numpy())
        groups = sleepstudy["Subject"].to_numpy()
        model = sm.MixedLM(sleepstudy["Reaction"].to_numpy(), exog, groups, exog)
        solve["statsmodels"] = model.fit
        refit["statsmodels"] = lambda: sm.MixedLM(response, exog, groups, exog).fit()
    rows = {
        f"{name}_criterion": {k: criterion(call()) for k, call in calls(formula, data).items()}
        for name, formula, data in (
            ("sleepstudy_slope", slope, sleepstudy),
            ("dietox_int", "Weight ~ Time + (1 | Pig)", dietox),
            ("dietox_slope", "Weight ~ Time + (1 + Time | Pig)", dietox),
        )
    }
    rows |= {
        "sleepstudy_solve": interleaved(solve, rounds),
        "sleepstudy_slope": interleaved(calls(slope, sleepstudy), rounds),
        "sleepstudy_refit": interleaved(refit, rounds),
        "dietox_int": interleaved(calls("Weight ~ Time + (1 | Pig)", dietox), rounds),
        "dietox_slope": interleaved(calls("Weight ~ Time + (1 + Time | Pig)", dietox), rounds),
    }
    if "lme4" in present:
        with tempfile.TemporaryDirectory() as folder:
            sleepstudy.to_csv(Path(folder) / "sleepstudy.csv", index=False)
            dietox.to_csv(Path(folder) / "dietox.csv", index=False)
            for name, value in rscript("warm", folder, str(rounds)).items():
                rows[name]["lme4"] = value
    return rows


def solve_alone(data: pd.DataFrame) -> Callable[[], Any]:
    """The compiled solver on arrays that are already compressed: no formula, no results."""
    import jax

    from lmmax import functional

    X = np.column_stack([np.ones(len(data)), data["Days"]])
    problem = functional.problem(data["Reaction"], X, data["Subject"], X)
    solve = jax.jit(functional.solve)
    with jax.enable_x64(True):
        problem = jax.device_put(problem)

    def call() -> None:
        with jax.enable_x64(True):
            jax.block_until_ready(solve(problem))

    return call


def measure_large(name: str, library: str) -> dict[str, float]:
    """Run in a fresh process: first and second call in seconds, memory over data size."""
    large = LARGE[name]
    if library == "lme4":
        with tempfile.TemporaryDirectory() as folder:
            data = large.data()
            for column in data:
                data[column].to_numpy(float).tofile(Path(folder) / f"{column}.f64")
            (Path(folder) / "columns.txt").write_text("\n".join(data.columns) + "\n")
            del data
            return rscript("large", folder, large.formula)
    tiny = Large(10, 2, large.covariates, large.effects, ()).data()
    fitter(library, large.formula, tiny)
    before = memory("VmRSS")
    data = large.data()
    size = float(data.memory_usage(index=False).sum())
    call = fitter(library, large.formula, data)
    result: dict[str, float] = {}
    fit: Any = None
    for which in ("first", "second"):
        fit = None
        gc.collect()
        reset_peak()
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = call()
        result[which] = time.perf_counter() - began
        result[f"memory_{which}"] = (memory("VmHWM") - before) / size
    result["criterion"] = criterion(fit)
    return result


def child(name: str, library: str, cache: str) -> dict[str, float]:
    """``measure_large`` in a fresh process, with this compilation cache."""
    command = [sys.executable, "-m", MODULE, "--child", name, library]
    environment = {**os.environ, "LMMAX_CACHE_DIR": cache}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment
    )
    return {k: float(v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}


def large_rows(present: list[str], slow: bool) -> dict[str, dict[str, float]]:
    """Seconds, memory, and criteria of the million-row models."""
    rows: dict[str, dict[str, float]] = {}
    for name, large in LARGE.items():
        for library in present:
            if library in large.slow and not slow:
                continue
            with tempfile.TemporaryDirectory() as cache:
                for key, value in child(name, library, cache).items():
                    rows.setdefault(f"{name}_{key}", {})[library] = value
                # Again, with what the first process compiled; for the others just again.
                filled = child(name, library, cache) if library != "lme4" else {}
            if filled:
                rows.setdefault(f"{name}_filled", {})[library] = filled["first"]
                rows.setdefault(f"{name}_memory_filled", {})[library] = filled["memory_first"]
    return rows


COLD = {
    "lmmax": (
        "import lmmax, pandas as pd\n"
        "data = pd.read_csv({path!r})\n"
        "print(lmmax.fit('Weight ~ Time + (1 | Pig)', data).summary())\n"
    ),
    "statsmodels": (
        "import statsmodels.formula.api as smf, pandas as pd\n"
        "data = pd.read_csv({path!r})\n"
        "print(smf.mixedlm('Weight ~ Time', data, groups='Pig').fit().summary())\n"
    ),
    "glmm": (
        "import glmm, pandas as pd\n"
        "data = pd.read_csv({path!r})\n"
        "glmm.fit(data, 'Weight ~ Time + (1 | Pig)').summary()\n"
    ),
    "lme4": (
        "suppressPackageStartupMessages(library(lme4))\n"
        "data <- read.csv('{path}')\n"
        "print(summary(lmer(Weight ~ Time + (1 | Pig), data)))\n"
    ),
}


def cold_rows(present: list[str], repetitions: int) -> dict[str, dict[str, float]]:
    """Seconds of whole processes; ours with an empty and with a filled compilation cache."""

    def once(library: str, cache: str) -> float:
        code = COLD[library].format(path=str(DIETOX))
        command = ["Rscript", "--vanilla", "-e", code]
        if library != "lme4":
            command = [sys.executable, "-c", code]
        environment = {**os.environ, "LMMAX_CACHE_DIR": cache}
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment, cwd=ROOT)
        return time.perf_counter() - began

    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as filled:
        for library in present:
            once(library, filled)  # also reads the files of the package into memory
        for _ in range(repetitions):
            for library in present:
                with tempfile.TemporaryDirectory() as empty:
                    if library == "lmmax":
                        times.setdefault(("cold_empty", library), []).append(once(library, empty))
                    times.setdefault(("cold_filled", library), []).append(once(library, filled))
    rows: dict[str, dict[str, float]] = {"cold_empty": {}, "cold_filled": {}}
    for (row, library), seconds in times.items():
        rows[row][library] = statistics.median(seconds)
        if library != "lmmax":
            rows["cold_empty"][library] = rows[row][library]
    return rows


# Row: title, unit, factor to that unit, the bar.
ROWS = {
    "sleepstudy_solve": ("sleepstudy (Days | Subject), solve alone", "ms", 1e3, "0.5 ms"),
    "sleepstudy_slope": ("sleepstudy (Days | Subject), fit", "ms", 1e3, "5 ms"),
    "sleepstudy_refit": ("sleepstudy (Days | Subject), new response", "ms", 1e3, "1 ms"),
    "dietox_int": ("dietox (1 | Pig), fit", "ms", 1e3, "5 ms"),
    "dietox_slope": ("dietox (Time | Pig), fit", "ms", 1e3, "5 ms"),
    "many_groups_first": ("10^6 rows, 10^5 groups, first call", "s", 1.0, "glmm"),
    "many_groups_filled": ("10^6 rows, 10^5 groups, first, filled cache", "s", 1.0, "glmm"),
    "many_groups_second": ("10^6 rows, 10^5 groups, second call", "s", 1.0, "glmm"),
    "many_groups_memory_first": ("  peak memory / data, first call", "x", 1.0, "6 x"),
    "many_groups_memory_filled": ("  peak memory / data, first, filled cache", "x", 1.0, "6 x"),
    "many_groups_memory_second": ("  peak memory / data, second call", "x", 1.0, "6 x"),
    "few_groups_first": ("10^6 rows, 500 groups, p = 10, first call", "s", 1.0, "glmm"),
    "few_groups_filled": ("10^6 rows, 500 groups, p = 10, first, filled cache", "s", 1.0, "glmm"),
    "few_groups_second": ("10^6 rows, 500 groups, p = 10, second call", "s", 1.0, "glmm"),
    "few_groups_memory_first": ("  peak memory / data, first call", "x", 1.0, "6 x"),
    "few_groups_memory_filled": ("  peak memory / data, first, filled cache", "x", 1.0, "6 x"),
    "few_groups_memory_second": ("  peak memory / data, second call", "x", 1.0, "6 x"),
    "cold_empty": ("cold process, dietox, empty cache", "s", 1.0, "3 x statsmodels"),
    "cold_filled": ("cold process, dietox, filled cache", "s", 1.0, "1.3 x statsmodels"),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no million-row models, fewer rounds")
    parser.add_argument("--all", action="store_true", help="peers that take minutes, too")
    parser.add_argument("--only", nargs="+", choices=("warm", "large", "cold"))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure_large(*arguments.child)))
        return
    warnings.simplefilter("ignore")
    parts = arguments.only or (["warm", "cold"] if arguments.quick else ["warm", "large", "cold"])
    present = installed(arguments.libraries)
    rows: dict[str, dict[str, float]] = {}
    if "warm" in parts:
        rows.update(warm_rows(present, 5 if arguments.quick else 15))
    if "large" in parts:
        rows.update(large_rows(present, arguments.all))
    if "cold" in parts:
        rows.update(cold_rows(present, 3 if arguments.quick else 5))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(table(ROWS, rows, present))
    print(check_criteria(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
