"""Times of fits with several grouping factors, ours and those of other software, in one table.

Usage: ``python -m tests.benchmarks.bench_factors [--rows NAME ...] [--libraries NAME ...]``

Peers are measured in the same run where they are present: glmm, and lme4 through Rscript, which
``--libraries lmmax glmm`` leaves out. A peer has ``--limit`` seconds for a model.

How times are taken:

* Penicillin and Pastes: median over rounds in one process; in each round every package has its
  turn. lme4's are taken inside R. The solve alone is the compiled solver on data that are already
  compressed, and lme4's optimiser on a model that is already parsed; glmm has no such entrance.
* The other models: each package in a fresh process, from the data frame in memory to the result;
  ours with an empty compilation cache. The second call has data of similar size: the same
  simulation from another seed, or all but a few rows. It shall compile nothing, so executables
  made meanwhile are counted. What the first call takes longer than the second counts as compiling.
  Memory is the peak of the whole process.

Criteria are compared on the first data set. The iterative engine has a Monte Carlo error, stated
beside its difference to the exact criterion.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.benchmarks.harness import (
    ROOT,
    check_criteria,
    criterion,
    installed,
    interleaved,
    memory,
    rscript,
    table,
)
from tests.reference import load_data

MODULE = "tests.benchmarks.bench_factors"
LIBRARIES = ("lmmax", "glmm", "lme4")
NOT_IN_TIME = float("inf")
SMALL = {
    "penicillin": "diameter ~ 1 + (1 | plate) + (1 | sample)",
    "pastes": "strength ~ 1 + (1 | batch) + (1 | batch:cask)",
}


@dataclass(frozen=True)
class Simulated:
    """A simulated table and its model: intercepts of ``levels`` groups per factor, and a slope.

    Args:
        n: number of rows.
        levels: number of groups by factor; of nested ones the finest first.
        nested: whether the groups of each factor lie in those of the next.
        peers: the packages worth waiting for.
    """

    n: int
    levels: Mapping[str, int]
    nested: bool = False
    peers: tuple[str, ...] = ("glmm", "lme4")
    reml: bool = True

    @property
    def formula(self) -> str:
        return "y ~ x + " + " + ".join(f"(1 | {name})" for name in self.levels)

    @property
    def factors(self) -> list[str]:
        return list(self.levels)

    def data(self, seed: int) -> pd.DataFrame:
        """Groups of unequal size in random order; unit residual variance."""
        rng = np.random.Generator(np.random.PCG64(seed))
        x = rng.standard_normal(self.n)
        y = 1.0 + 0.5 * x + rng.standard_normal(self.n)
        codes: dict[str, np.ndarray] = {}
        finer: tuple[np.ndarray, int] | None = None
        for name, size in self.levels.items():
            if self.nested and finer is not None:
                code = finer[0] * size // finer[1]
            else:
                code = rng.integers(0, size, self.n)
            y += (1.0 - 0.2 * len(codes)) * rng.standard_normal(size)[code]
            codes[name], finer = code, (code, size)
        return pd.DataFrame({"y": y, "x": x, **codes})


@dataclass(frozen=True)
class InstEval:
    """The ratings of lecturers, with the model of the references."""

    formula: str = "y ~ 1 + service + (1 | s) + (1 | d) + (1 | dept)"
    peers: tuple[str, ...] = ("glmm", "lme4")
    reml: bool = False

    @property
    def factors(self) -> list[str]:
        return ["s", "d", "dept", "service"]

    def data(self, seed: int) -> pd.DataFrame:
        """All rows, or with another seed than one all but some 0.2 percent."""
        data = load_data("insteval")[["y", *self.factors]]
        if seed == 1:
            return data
        rows = np.random.Generator(np.random.PCG64(seed)).random(len(data)) < 0.998
        return data[rows].reset_index(drop=True)


MODELS: dict[str, Simulated | InstEval] = {
    "insteval": InstEval(),
    "crossed": Simulated(500_000, {"a": 20_000, "b": 5_000}),
    "nested": Simulated(1_000_000, {"a": 100_000, "b": 5_000, "c": 200}, nested=True),
    "iterative": Simulated(1_000_000, {"a": 100_000, "b": 100_000}, peers=()),
}
# Our fits of each model, by engine; the first stands in the rows beside the peers.
ENGINES = {"crossed": ("crossed", "iterative"), "iterative": ("iterative",)}


def fitter(
    library: str, formula: str, data: pd.DataFrame, reml: bool, engine: str = "auto"
) -> Callable[[], Any]:
    """A call that fits the model from the data frame; imports happen here, untimed."""
    if library == "lmmax":
        import lmmax

        return lambda: lmmax.fit(formula, data, reml=reml, engine=engine)
    import glmm

    # glmm takes a column of numbers in a grouping place as labels.
    return lambda: glmm.fit(data, formula, satterthwaite=False, reml=reml)


def solve_alone(fit: Any) -> Callable[[], Any]:
    """The compiled solver on the compressed data of a fit: no formula, no results."""
    import jax

    from lmmax import estimation
    from lmmax.constraints import read_constraints
    from lmmax.solve import Options, Starts

    problem, start = fit.compression.problem, fit.compression.start
    constraints, guess = read_constraints(problem, fit.terms, fit.settings)
    options = Options(
        reml=1.0,
        em_steps=fit.settings.em_steps,
        max_steps=estimation.MAX_STEPS["newton"],
        tol=estimation.tolerance(problem),
    )
    # As a fit does: one start, and room for more.
    D = np.broadcast_to(np.diag(start), (estimation.TOGETHER, *np.shape(start) * 2)).copy()
    starts = Starts(
        D=D,
        s=np.full(len(D), float(guess.s)),
        theta=np.zeros((len(D), 0)),
        count=1,
        far=False,
    )
    solve = estimation._compiled["newton"]
    with jax.enable_x64(True):
        problem = jax.device_put(problem)

    def call() -> None:
        with jax.enable_x64(True):
            jax.block_until_ready(solve(problem, constraints, options, starts))

    return call


def small_rows(
    names: Iterable[str], present: list[str], rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds and criteria of the small data sets."""
    rows: dict[str, dict[str, float]] = {}
    python = [name for name in present if name != "lme4"]
    data = {name: load_data(name) for name in names}
    for name, frame in data.items():
        calls = {library: fitter(library, SMALL[name], frame, True) for library in python}
        fits = {library: call() for library, call in calls.items()}
        rows[f"{name}_criterion"] = {library: criterion(fit) for library, fit in fits.items()}
        solves = {"lmmax": solve_alone(fits["lmmax"])} if "lmmax" in fits else {}
        rows[f"{name}_solve"] = interleaved(solves, rounds)
        rows[f"{name}_fit"] = interleaved(calls, rounds)
    if data and "lme4" in present:
        with tempfile.TemporaryDirectory() as folder:
            for name in SMALL:
                load_data(name).to_csv(Path(folder) / f"{name}.csv", index=False)
            for row, value in rscript("factors", folder, str(rounds)).items():
                if row in rows:
                    rows[row]["lme4"] = value
    return rows


def measure(name: str, library: str, engine: str) -> None:
    """Run in a fresh process: fit two data sets, print each figure as soon as it is known."""
    import jax

    compiled: list[str] = []

    def note(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    model = MODELS[name]
    warnings.simplefilter("ignore")
    for seed, which in ((1, "first"), (2, "second")):
        call = fitter(library, model.formula, model.data(seed), model.reml, engine)
        gc.collect()
        before = len(compiled)
        began = time.perf_counter()
        fit = call()
        figures = {which: time.perf_counter() - began}
        if which == "first":
            figures["criterion"] = criterion(fit)
            figures["memory"] = memory("VmHWM")
        if library == "lmmax":
            if which == "second":
                figures["compiled"] = float(len(compiled) - before)
            elif engine == "iterative":
                figures["error"] = fit.criterion_error
        print(json.dumps(figures), flush=True)
        # Or the second data set would be there while the first fit still is.
        del call, fit


def child(name: str, library: str, engine: str, limit: float | None) -> dict[str, float]:
    """``measure`` in a fresh process with an empty compilation cache."""
    command = [sys.executable, "-m", MODULE, "--child", name, library, engine]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "LMMAX_CACHE_DIR": cache}
        try:
            text = subprocess.run(
                command,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment,
                timeout=limit,
            ).stdout
        except subprocess.TimeoutExpired as late:
            text = (late.stdout or b"").decode()
    figures: dict[str, float] = {"first": NOT_IN_TIME}
    for line in text.splitlines():
        figures |= {k: float(v) for k, v in json.loads(line).items()}
    return figures


def lme4_figures(name: str, limit: float) -> dict[str, float]:
    """Lme4's time and criterion on the first data set; in R nothing is compiled."""
    model = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        data = model.data(1)
        for column in data:
            data[column].to_numpy(float).tofile(Path(folder) / f"{column}.f64")
        (Path(folder) / "columns.txt").write_text("\n".join(data.columns) + "\n")
        method = "REML" if model.reml else "ML"
        try:
            return rscript("large", folder, model.formula, method, *model.factors, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"first": NOT_IN_TIME}


def model_rows(
    names: Iterable[str], present: list[str], limit: float
) -> dict[str, dict[str, float]]:
    """Seconds, memory, criteria, and executables of the other models."""
    rows: dict[str, dict[str, float]] = {}

    def add(prefix: str, library: str, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            rows.setdefault(f"{prefix}_{key}", {})[library] = value

    for name in names:
        if "lmmax" in present:
            exact: float | None = None
            for engine in ENGINES.get(name, ("auto",)):
                figures = child(name, "lmmax", engine, None)
                if engine == "iterative" and exact is not None:
                    # Not a criterion to compare to the last digits, but with its error.
                    figures["difference"] = abs(figures.pop("criterion") - exact)
                exact = figures.get("criterion")
                figures["compile"] = figures["first"] - figures["second"]
                second = engine == "iterative" and name != "iterative"
                add(f"{name}_iterative" if second else name, "lmmax", figures)
        for library in present:
            if library in MODELS[name].peers:
                lme4 = library == "lme4"
                figures = lme4_figures(name, limit) if lme4 else child(name, library, "", limit)
                if lme4 and "first" in figures:
                    figures["second"] = figures["first"]
                add(name, library, figures)
    return rows


def _titles(name: str, title: str, first: str, second: str) -> dict[str, Any]:
    return {
        f"{name}_first": (f"{title}, first call", "s", 1.0, first),
        f"{name}_compile": ("  of it compiling", "s", 1.0, "10 s" if name == "insteval" else "-"),
        f"{name}_second": (f"{title}, similar data", "s", 1.0, second),
        f"{name}_compiled": ("  executables compiled for them", "", 1.0, "0"),
        f"{name}_memory": (
            "  peak memory of the process",
            "GB",
            1e-9,
            "8 GB" if name == "iterative" else "-",
        ),
        f"{name}_error": ("  standard error of the criterion", "", 1.0, "0.1"),
        f"{name}_difference": ("  difference to the exact criterion", "", 1.0, "4 errors"),
    }


# Row: title, unit, factor to that unit, the bar.
ROWS = {
    "penicillin_solve": ("Penicillin, crossed, solve alone", "ms", 1e3, "1 ms"),
    "penicillin_fit": ("Penicillin, crossed, fit", "ms", 1e3, "-"),
    "pastes_solve": ("Pastes, nested, solve alone", "ms", 1e3, "1 ms"),
    "pastes_fit": ("Pastes, nested, fit", "ms", 1e3, "-"),
    **_titles("insteval", "InstEval, ML", "-", "glmm"),
    **_titles("crossed", "20,000 x 5,000 crossed, 500,000 rows", "-", "glmm / 2"),
    **_titles("crossed_iterative", "  the same, iterative", "-", "14 s"),
    **_titles("nested", "100,000 in 5,000 in 200, 10^6 rows", "-", "glmm"),
    **_titles("iterative", "100,000 x 100,000, iterative, 10^6 rows", "-", "-"),
}


def main() -> None:
    """Measure and print."""
    names = [*SMALL, *MODELS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--rounds", type=int, default=15, help="of the small data sets")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a peer has for a model")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(*arguments.child)
        return
    warnings.simplefilter("ignore")
    present = installed(arguments.libraries)
    rows = small_rows([n for n in SMALL if n in arguments.rows], present, arguments.rounds)
    rows |= model_rows([n for n in MODELS if n in arguments.rows], present, arguments.limit)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(table(ROWS, rows, present))
    print(check_criteria(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
