"""`plan`: what `fit_many` will read, need and take, before it runs."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from ..constraints import Settings
from ..fit import check_reml
from ..spec import ModelSpec
from .many import begin, block_size
from .sources import Columns
from .work import Work, arrays

PILOT, FEW, SECONDS = 512, 16, 1.0
"""Most responses of the pilot; how many come first; seconds that it shall take at most."""

T = TypeVar("T")


class PlanError(ValueError):
    """The fits would not fit into memory."""


@dataclass(frozen=True)
class Plan:
    """What fits of one model to many responses will need; made by :func:`lmmax.plan`.

    Attributes:
        responses: number of responses, k.
        rows: rows of the design, n.
        bytes_to_read: size of the responses.
        engine: how they are fitted, and how many numbers a response is reduced to.
        chunk: responses worked on at once.
        result_bytes: size of the results.
        peak_bytes: most memory at once, besides what is in use already and the compiled programs.
        free_bytes: memory that was free; None where the system does not say.
        pilot: responses that were fitted to measure the times.
        read_seconds: time to read all, at the pilot's rate.
        fit_seconds: time to fit all, at the pilot's rate, without compiling.
    """

    responses: int
    rows: int
    bytes_to_read: int
    engine: str
    chunk: int
    result_bytes: int
    peak_bytes: int
    free_bytes: int | None
    pilot: int
    read_seconds: float
    fit_seconds: float

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.responses // self.chunk)

    @property
    def seconds(self) -> float:
        """Time in all: reading goes on while the chunk before is fitted."""
        return max(self.read_seconds, self.fit_seconds) + (
            min(self.read_seconds, self.fit_seconds) / self.chunks
        )

    @property
    def rate(self) -> float:
        """Responses in a second."""
        return self.responses / self.seconds

    def __str__(self) -> str:
        free = "" if self.free_bytes is None else f"; {_size(self.free_bytes)} are free"
        return "\n".join(
            [
                f"{self.responses:,} responses of {self.rows:,} rows, "
                f"{_size(self.bytes_to_read)} to read",
                f"engine: {self.engine}",
                f"chunks: {self.chunks:,} of {self.chunk:,} responses",
                f"memory: {_size(self.peak_bytes)} at the peak, of which "
                f"{_size(self.result_bytes)} are results{free}",
                f"time:   {self.seconds:.3g} s, {self.rate:,.0f} responses a second "
                f"(reading {self.read_seconds:.3g} s, fitting {self.fit_seconds:.3g} s; "
                f"by a pilot of {self.pilot})",
            ]
        )


def plan(
    formula: str | ModelSpec,
    data: Any,
    responses: Any,
    *,
    memory: int | None = None,
    chunk: int | None = None,
    reml: bool = True,
    tests: Mapping[str, Any] | None = None,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, Any] | None = None,
    relmat: Mapping[str, pd.DataFrame] | None = None,
    missing: str = "drop",
    solver: str = "auto",
    tol: float | None = None,
    max_steps: int | None = None,
    engine: str = "auto",
    context: Mapping[str, Any] | None = None,
) -> Plan:
    """Predict what :func:`lmmax.fit_many` needs on this machine, without an executor.

    The design is analysed and the first responses are fitted, some hundreds if that takes a second
    or so: their time and memory are measured and taken to grow in proportion.  Where later
    responses lack other rows, or a file is read for the first time, it takes longer.

    Args:
        formula: the model, like all that is not named here as in `fit_many`.
        data: the covariates and groups.
        responses: the responses.
        memory: most bytes that may be used; what is free if None.
        chunk: responses worked on at once; by their size if None.
        reml: restricted maximum likelihood.
        tests: hypotheses to test.
        weights: prior weights.
        offset: known part of the mean.
        contrasts: coding per factor.
        relmat: relationship matrices.
        missing: what to do with rows whose covariates are missing.
        solver: "auto", "newton" or "lbfgs".
        tol: when a fit counts as converged.
        max_steps: most solver steps.
        engine: form of the likelihood.
        context: names for use in the formula.

    Returns:
        The plan, which prints as a few lines.

    Raises:
        PlanError: if the fits would need more memory than there is.

    Example:
        >>> import lmmax, numpy as np
        >>> sleep = lmmax.datasets.load("sleepstudy")
        >>> y = np.random.default_rng(0).normal(size=(180, 1000))
        >>> found = lmmax.plan("~ Days + (1 | Subject)", sleep, y, chunk=250)
        >>> found.chunks, found.bytes_to_read
        (4, 1440000)
    """
    settings = Settings(
        reml=check_reml(reml), solver=solver, tol=tol, max_steps=max_steps, engine=engine
    )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a whole number, at least 1")
    options = {
        "weights": weights,
        "offset": offset,
        "contrasts": contrasts,
        "relmat": relmat,
        "missing": missing,
        "context": context,
    }
    design, source, work = begin(formula, data, responses, settings, tests, options)
    n, k = len(design.y), len(source.names)
    size = min(block_size(chunk, n), k)
    measured = _pilot(work, source, min(size, PILOT))

    def peak(lanes: int) -> int:
        # One block is fitted while the next is read.
        held = 8 * n * lanes * (1 if lanes >= k else 2)
        fitting = held + measured.fixed + measured.per_response * lanes
        results = measured.result * k
        # In the end the results of the chunks are put together.
        return int(max(fitting + results, 2 * results)) + sum(
            part.nbytes for part in arrays(design)
        )

    free = free_memory() if memory is None else memory
    if free is not None and peak(size) > free:
        raise PlanError(_refusal(peak, size, free, k))
    return Plan(
        responses=k,
        rows=n,
        bytes_to_read=_bytes(source),
        engine=work.name,
        chunk=size,
        result_bytes=int(measured.result * k),
        peak_bytes=peak(size),
        free_bytes=free,
        pilot=measured.lanes,
        read_seconds=measured.read * k,
        fit_seconds=measured.fit * k,
    )


def _refusal(peak: Callable[[int], int], size: int, free: int, k: int) -> str:
    text = f"the fits need {_size(peak(size))} in chunks of {size:,}, and {_size(free)} are free: "
    if peak(1) > free:
        return text + (
            f"the results and designs alone need {_size(peak(1))}; fit the responses in several "
            "parts, each with an out= of its own"
        )
    largest, too_large = 1, size
    while too_large - largest > 1:
        middle = (largest + too_large) // 2
        largest, too_large = (middle, too_large) if peak(middle) <= free else (largest, middle)
    return text + f"pass chunk={largest} or less"


@dataclass(frozen=True)
class _Measured:
    """What a response takes: seconds to read and to fit, bytes of results and while fitting."""

    lanes: int
    read: float
    fit: float
    result: float
    per_response: float
    fixed: float


def _pilot(work: Work, source: Columns, most: int) -> _Measured:
    """Fit some of the responses, fewer where a fit takes long."""
    few = min(FEW, most)
    read, y = _timed(lambda: source.block(0, most))
    work.done(y[:, :few])  # compiles
    first, _ = _timed(lambda: work.done(y[:, :few]))
    lanes = min(most, max(few, int(few * SECONDS / first)))
    y = np.ascontiguousarray(y[:, :lanes])
    work.done(y)
    fit, (record, _) = _timed(lambda: work.done(y))
    half = max(lanes // 2, 1)
    small, large = (_traced(work, np.ascontiguousarray(y[:, :some])) for some in (half, lanes))
    per_response = (large - small) / (lanes - half) if lanes > half else large
    return _Measured(
        lanes=lanes,
        read=read / most,
        fit=fit / lanes,
        result=sum(leaf.nbytes for leaf in record) / lanes,
        per_response=max(per_response, 0.0),
        fixed=max(large - per_response * lanes, 0.0),
    )


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def _traced(work: Work, y: np.ndarray) -> int:
    """Return the most bytes that are held at once while responses are fitted."""
    running = tracemalloc.is_tracing()
    if not running:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    work.done(y)
    peak = tracemalloc.get_traced_memory()[1]
    if not running:
        tracemalloc.stop()
    return peak - before


def _bytes(source: Columns) -> int:
    if source.path is not None:
        return os.path.getsize(source.path)
    n, k = source.values.shape
    return int(getattr(source.values, "nbytes", 8 * n * k))


def free_memory() -> int | None:
    """Return the bytes that this process may still use; None where the system does not say.

    The system's estimate, or what the limit of a container leaves.
    """
    found = []
    try:
        text = Path("/proc/meminfo").read_text()
        line = next(line for line in text.splitlines() if line.startswith("MemAvailable"))
        found.append(1024 * int(line.split()[1]))
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, StopIteration, ValueError):
        pass
    return min(found, default=None)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000.0:
            return f"{count:.3g} {unit}"
        count /= 1000.0
    return f"{count:.3g} TB"
