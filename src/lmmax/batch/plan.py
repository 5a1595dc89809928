"""`plan`: what `fit_many` will read, need and take, before it runs."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from ..characters import Visible
from ..constraints import Settings
from ..design import DataError
from ..fit import check_reml
from ..options import EngineName, Missing, Solver
from ..rendering import folded, paragraphs
from ..safe import Evaluate
from ..spec import ModelSpec
from .devices import n_devices
from .reading import begin, block_size, check_chunk
from .result import hypotheses
from .sources import Chunks, Columns, pieces
from .stream import WINDOW
from .subsets import SUBSETS, Subsets, SubsetWork, read_subsets
from .varied import Varied
from .work import Work, arrays

PILOT, FEW, SECONDS = 512, 16, 1.0
"""Most responses of the pilot; how many come first; seconds that it shall take at most."""

T = TypeVar("T")


class PlanError(Visible, ValueError):
    """The fits would not fit into memory."""


@dataclass(frozen=True, repr=False)
class Plan:
    """What fits of one model to many responses will need; made by :func:`lmmax.plan`.

    Attributes:
        responses: number of responses, or of subsets, k.
        rows: rows of the design, n.
        bytes_to_read: size of the responses.
        engine: how they are fitted, and how many numbers a response is reduced to.
        chunk: responses worked on at once.
        result_bytes: size of the results.
        peak_bytes: most memory of this process at once, besides what is in use already and the
            compiled programs.
        worker_bytes: the same of each process of an executor; zero if there are none.
        free_bytes: memory that was free; None where the system does not say.
        pilot: responses that were fitted to measure the times.
        read_seconds: time to read all, at the pilot's rate.
        fit_seconds: time to fit all, at the pilot's rate, without compiling.
        compile_seconds: time to compile, as the pilot took; little where compiled code is at hand.
        workers: how many blocks are fitted at a time.
        devices: how many devices share the lanes of a block.
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
    worker_bytes: int = 0
    workers: int = 1
    devices: int = 1
    compile_seconds: float = 0.0

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.responses // self.chunk)

    @property
    def seconds(self) -> float:
        """Time in all: reading goes on while the chunk before is fitted, once compiled."""
        return (
            self.compile_seconds
            + max(self.read_seconds, self.fit_seconds)
            + (min(self.read_seconds, self.fit_seconds) / self.chunks)
        )

    @property
    def rate(self) -> float:
        """Responses in a second."""
        return self.responses / self.seconds

    def __str__(self) -> str:
        free = "" if self.free_bytes is None else f"; {_size(self.free_bytes)} are free"
        each = f" and {_size(self.worker_bytes)} in each worker" if self.worker_bytes else ""
        compiling = f", compiling {self.compile_seconds:.3g} s" if self.compile_seconds else ""
        spread = [f"{self.workers} workers"] * (self.workers > 1)
        spread += [f"{self.devices} devices"] * (self.devices > 1)
        text = "\n".join(
            [
                f"{self.responses:,} responses of {self.rows:,} rows, "
                f"{_size(self.bytes_to_read)} to read",
                f"engine: {self.engine}",
                ", on ".join([f"chunks: {self.chunks:,} of {self.chunk:,} responses", *spread]),
                f"memory: {_size(self.peak_bytes)} at the peak{each}, of which "
                f"{_size(self.result_bytes)} are results{free}",
                f"time:   {self.seconds:.3g} s, {self.rate:,.0f} responses a second "
                f"(reading {self.read_seconds:.3g} s, fitting {self.fit_seconds:.3g} s{compiling}; "
                f"by a pilot of {self.pilot})",
            ]
        )
        return folded(text)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return paragraphs(str(self))


def plan(
    formula: str | ModelSpec,
    data: Any,
    responses: Any = None,
    *,
    memory: int | None = None,
    chunk: int | None = None,
    by: Any = None,
    scan: Mapping[str, Any] | None = None,
    out: Any = None,
    executor: Executor | None = None,
    reml: bool = True,
    tests: Mapping[str, Any] | None = None,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, Any] | None = None,
    relmat: Mapping[str, pd.DataFrame] | None = None,
    missing: Missing = "drop",
    solver: Solver = "auto",
    tol: float | None = None,
    max_steps: int | None = None,
    engine: EngineName = "auto",
    context: Mapping[str, Any] | None = None,
    evaluate: Evaluate = "python",
) -> Plan:
    """Predict what :func:`lmmax.fit_many` needs on this machine.

    A formula is code: its expressions run as Python.  For text of others use ``evaluate="safe"``.

    The design is analysed and the first responses are fitted, some hundreds if that takes a second
    or so: their time and memory are measured and taken to grow in proportion, that of subsets with
    their rows.  Where later responses lack other rows, or a file is read for the first time, it
    takes longer.  Workers are taken to be as fast as this process, threads together as fast as one.

    Args:
        formula: the model, like all that is not named here as in `fit_many`.
        data: the covariates and groups.
        responses: the responses.
        memory: most bytes that may be used; what is free if None.
        chunk: responses worked on at once; by their size if None.
        by: in place of `responses`, the column whose levels are the subsets.
        scan: a column of the design that changes from model to model.
        out: whether results are written as they come, and not held; nothing is written here.
        executor: the executor that will fit the chunks; it is not used here.
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
        evaluate: "python", for which a formula is code, or "safe" for formulas of others: only
            columns, arithmetic, elementwise functions of NumPy and the transforms.

    Returns:
        The plan, which prints as a few lines.

    Raises:
        PlanError: if the fits would need more memory than there is.
        DataError: for responses from an iterator, which a pilot would use up.

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
    check_chunk(chunk)
    options = {
        "weights": weights,
        "offset": offset,
        "contrasts": contrasts,
        "relmat": relmat,
        "missing": missing,
        "context": context,
        "evaluate": evaluate,
    }
    if (responses is None) == (by is None):
        raise ValueError("give one of responses= and by=")
    source: Columns | Chunks | Varied | Subsets
    work: Work | SubsetWork
    if by is None:
        design, source, work = begin(formula, data, responses, settings, tests, options, scan=scan)
        size = block_size(chunk, len(design.y))
    else:
        design, source = read_subsets(formula, data, by, **options)
        work = SubsetWork(design, settings, hypotheses(tests, design.x_names), source)
        size = chunk or SUBSETS
    if isinstance(source, Chunks):
        raise DataError(
            "plan cannot look at an iterator, which can be read only once: pass one of its chunks "
            "as an array; time and results grow with the number of responses, chunk=None takes "
            f"{block_size(None, len(design.y)):,} at once"
        )
    k = len(source.names)
    size = min(size, k)
    measured = _pilot(work, source, min(size, PILOT))
    count = 1 if executor is None else int(getattr(executor, "_max_workers", 1))
    threads = isinstance(executor, ThreadPoolExecutor)

    def fitting(lanes: int) -> float:
        return measured.fixed + measured.per_response * lanes

    def peak(lanes: int) -> int:
        # One block is fitted while the next is read; workers have more of them before them.
        chunks = -(-k // lanes)
        held = measured.block * lanes * min(chunks, 2 if executor is None else WINDOW + 2)
        here = 1 if executor is None else min(count, chunks) if threads else 0
        at_once = held + here * fitting(lanes)
        if out is not None:
            # Of each response the number of rows; of a chunk what is written.
            own = 8 * k + 2 * measured.result * lanes
            return int(at_once + own) + shared
        # In the end the results of the chunks are put together.
        return int(max(at_once + measured.result * k, 2 * measured.result * k)) + shared

    shared = sum(part.nbytes for part in arrays(design))
    free = free_memory() if memory is None else memory
    of_workers = (
        0 if executor is None or threads else int(measured.block * size + fitting(size) + shared)
    )
    if free is not None and peak(size) + count * of_workers > free:
        raise PlanError(
            _refusal(lambda lanes: peak(lanes) + count * of_workers * lanes // size, size, free)
        )
    return Plan(
        responses=k,
        rows=len(design.y),
        bytes_to_read=_bytes(source),
        engine=work.name,
        chunk=size,
        result_bytes=int(measured.result * k),
        peak_bytes=peak(size),
        free_bytes=free,
        pilot=measured.lanes,
        read_seconds=measured.read * k,
        fit_seconds=measured.fit * k / (1 if threads else count),
        # The last chunk may have a shape of its own.
        compile_seconds=measured.compile * (2 if k > size and k % size else 1),
        worker_bytes=of_workers,
        workers=count,
        devices=n_devices(),
    )


def _refusal(peak: Callable[[int], int], size: int, free: int) -> str:
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
    """What a response takes: seconds to read and to fit, bytes to hold, of results, to fit.

    And seconds to compile for a number of responses.
    """

    lanes: int
    read: float
    fit: float
    compile: float
    block: float
    result: float
    per_response: float
    fixed: float


def _pilot(work: Work | SubsetWork, source: Columns | Varied | Subsets, most: int) -> _Measured:
    """Fit some of the responses, fewer where a fit takes long."""
    if isinstance(source, Subsets):
        return _pilot_of_subsets(work, source, most)
    few = min(FEW, most)

    def block(count: int) -> Any:
        return next(pieces(source, count)).read()

    read, _ = _timed(lambda: block(most))
    cold, _ = _timed(lambda: work.done(block(few)))  # compiles
    first, _ = _timed(lambda: work.done(block(few)))
    lanes = min(most, max(few, int(few * SECONDS / first)))
    half = max(lanes // 2, 1)
    y = block(lanes)
    return _measured(work, y, block(half), lanes, half, lanes, read / most, cold - first)


def _pilot_of_subsets(work: Work | SubsetWork, source: Subsets, most: int) -> _Measured:
    """Fit some of the subsets, spread over all of them."""
    k, few = len(source.names), min(FEW, most)
    sizes = np.bincount(source.rows, minlength=k)

    def some(count: int) -> np.ndarray:
        return np.unique(np.linspace(0, k - 1, count).astype(np.int64))

    def like(numbers: np.ndarray) -> float:
        """Return how many average subsets have as many rows."""
        return float(max(sizes[numbers].sum(), 1) / sizes.mean())

    cold, _ = _timed(lambda: work.done(some(few)))
    first, _ = _timed(lambda: work.done(some(few)))
    many = some(min(most, max(few, int(few * SECONDS / first))))
    half = many[::2]
    return _measured(work, many, half, like(many), like(half), len(many), 0.0, cold - first)


def _measured(
    work: Work | SubsetWork,
    y: Any,
    part: Any,
    lanes: float,
    half: float,
    pilot: int,
    read: float,
    compiling: float,
) -> _Measured:
    """Measure what fitting a block takes, and from a part of it what of that is by response.

    Args:
        work: fits a block.
        y: the block.
        part: about half of it.
        lanes: how many average responses the block counts for.
        half: the same for the part.
        pilot: responses of the block.
        read: seconds to read a response.
        compiling: seconds that a smaller block took to compile.
    """
    cold, _ = _timed(lambda: work.done(y))
    fit, (record, _) = _timed(lambda: work.done(y))
    small, large = (_traced(work, block) for block in (part, y))
    per_response = (large - small) / (lanes - half) if lanes > half else large / lanes
    return _Measured(
        lanes=pilot,
        read=read,
        fit=fit / lanes,
        compile=max(compiling, cold - fit, 0.0),
        block=_held(y) / pilot,
        result=sum(leaf.nbytes for leaf in record) / pilot,
        per_response=max(per_response, 0.0),
        fixed=max(large - per_response * lanes, 0.0),
    )


def _held(block: Any) -> int:
    """Return the bytes of a block of responses and of what goes with them."""
    parts = (block,) if isinstance(block, np.ndarray) else vars(block).values()
    return sum(part.nbytes for part in parts if isinstance(part, np.ndarray))


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def _traced(work: Work | SubsetWork, y: Any) -> int:
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


def _bytes(source: Columns | Varied | Subsets) -> int:
    """Return the size of the responses where they are; subsets have theirs in memory."""
    if isinstance(source, Subsets):
        return 0
    if isinstance(source, Varied):
        return source.nbytes
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
