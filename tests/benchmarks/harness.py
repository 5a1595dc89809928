"""What the benchmarks share: timing in turns, memory, lme4 through Rscript, the table."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIBRARIES = ("lmmax", "statsmodels", "glmm", "lme4")


def installed(libraries: Iterable[str]) -> list[str]:
    """Those of the libraries that are there."""
    return [
        name
        for name in libraries
        if (shutil.which("Rscript") if name == "lme4" else importlib.util.find_spec(name))
    ]


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


def rscript(*arguments: str, timeout: float | None = None) -> dict[str, float]:
    """The measurements that bench_lme4.R prints.

    Raises:
        subprocess.TimeoutExpired: after so many seconds.
    """
    command = ["Rscript", "--vanilla", str(HERE / "bench_lme4.R"), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout)
    return {k: float(v) for k, v in (line.split() for line in done.stdout.splitlines())}


def memory(field: str) -> float:
    """A field of Linux's /proc/self/status in bytes; NaN elsewhere."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    return float("nan")


def reset_peak() -> None:
    """Return freed memory to the system and forget the peak so far (Linux)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def table(
    titles: Mapping[str, tuple[str, str, float, str]],
    rows: dict[str, dict[str, float]],
    present: list[str],
) -> str:
    """One line per row: bar, each library's figure, and ours over each peer's.

    Args:
        titles: per row its title, unit, factor to that unit, and bar.
        rows: per row and library the figure; infinite if it was not reached in time.
        present: the libraries.
    """
    peers = [name for name in present if name != "lmmax"]
    header = ["", "bar", *present, *(f"/ {name}" for name in peers if "lmmax" in present)]
    lines = [header]
    for name, (title, unit, factor, bar) in titles.items():
        if name not in rows:
            continue
        row = rows[name]
        line = [title, bar]
        for library in present:
            line.append(_cell(row.get(library), unit, factor))
        if "lmmax" in present:
            for peer in peers:
                both = "lmmax" in row and 0.0 < row.get(peer, 0.0) < float("inf")
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


def _cell(value: float | None, unit: str, factor: float) -> str:
    if value is None:
        return "-"
    return "not in time" if value == float("inf") else f"{value * factor:.3g} {unit}".rstrip()


def check_criteria(rows: dict[str, dict[str, float]]) -> str:
    """How far above the lowest criterion each library stopped, model by model."""
    notes = []
    for name, found in rows.items():
        if name.endswith("_criterion") and len(found) > 1:
            best = min(found.values())
            gaps = ", ".join(f"{k} +{v - best:.1e}" for k, v in found.items())
            notes.append(f"{name.removesuffix('_criterion')}: criterion {best:.6f}, {gaps}")
    return "\n".join(notes)
