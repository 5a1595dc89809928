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
import ctypes
import gc
import importlib.util
import json
import os
import platform
import shutil
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

from tests.reference import load_data

HERE = Path(__file__).parent
MODULE = "tests.benchmarks.bench_fit"
ROOT = HERE.parents[1]
DIETOX = HERE.parent / "reference" / "data" / "dietox.csv"
LIBRARIES = ("lmmax", "statsmodels", "glmm", "lme4")


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


def criterion(fit: Any) -> float:
    """-2 log-likelihood of any Python library's result."""
    return -2.0 * float(fit.llf if hasattr(fit, "llf") else fit.loglik)


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call; every call once untimed, then in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        began = time.perf_counter()
        call()
        # Short calls are repeated, so that a turn takes about 20 ms.
        repeats[name] = max(1, min(50, int(0.02 / (time.perf_counter() - began))))
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - began) / repeats[name])
    return {name: statistics.median(t) for name, t in times.items()}


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


def rscript(*arguments: str) -> dict[str, float]:
    """The measurements that bench_lme4.R prints."""
    command = ["Rscript", "--vanilla", str(HERE / "bench_lme4.R"), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {k: float(v) for k, v in (line.split() for line in done.stdout.splitlines())}


def _memory(field: str) -> float:
    """A field of Linux's /proc/self/status in bytes; NaN elsewhere."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    return float("nan")


def _reset_peak() -> None:
    """Return freed memory to the system and forget the peak so far (Linux)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


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
    before = _memory("VmRSS")
    data = large.data()
    size = float(data.memory_usage(index=False).sum())
    call = fitter(library, large.formula, data)
    result: dict[str, float] = {}
    fit: Any = None
    for which in ("first", "second"):
        fit = None
        gc.collect()
        _reset_peak()
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = call()
        result[which] = time.perf_counter() - began
        result[f"memory_{which}"] = (_memory("VmHWM") - before) / size
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


def table(rows: dict[str, dict[str, float]], present: list[str]) -> str:
    """One line per row: bar, each library's figure, and ours over each peer's."""
    peers = [name for name in present if name != "lmmax"]
    header = ["", "bar", *present, *(f"/ {name}" for name in peers if "lmmax" in present)]
    lines = [header]
    for name, (title, unit, factor, bar) in ROWS.items():
        if name not in rows:
            continue
        row = rows[name]
        line = [title, bar]
        for library in present:
            line.append(f"{row[library] * factor:.3g} {unit}" if library in row else "-")
        if "lmmax" in present:
            for peer in peers:
                both = "lmmax" in row and peer in row
                line.append(f"{row['lmmax'] / row[peer]:.2f}" if both else "-")
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def check_criteria(rows: dict[str, dict[str, float]]) -> str:
    """How far above the lowest criterion each library stopped, model by model."""
    notes = []
    for name, found in rows.items():
        if name.endswith("_criterion") and len(found) > 1:
            best = min(found.values())
            gaps = ", ".join(f"{k} +{v - best:.1e}" for k, v in found.items())
            notes.append(f"{name.removesuffix('_criterion')}: criterion {best:.6f}, {gaps}")
    return "\n".join(notes)


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
    present = [
        name
        for name in arguments.libraries
        if (shutil.which("Rscript") if name == "lme4" else importlib.util.find_spec(name))
    ]
    rows: dict[str, dict[str, float]] = {}
    if "warm" in parts:
        rows.update(warm_rows(present, 5 if arguments.quick else 15))
    if "large" in parts:
        rows.update(large_rows(present, arguments.all))
    if "cold" in parts:
        rows.update(cold_rows(present, 3 if arguments.quick else 5))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(table(rows, present))
    print(check_criteria(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
