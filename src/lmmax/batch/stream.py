"""Blocks of responses on their way from a source through workers to a store, in bounded memory.

Reading runs ahead of fitting in a thread of its own; results come in the order of the responses.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from .sources import Columns
from .store import Store
from .subsets import Subsets, SubsetWork
from .work import Done, Work

WINDOW = 8
"""Most blocks that are handed to workers before the first of them is waited for."""

T = TypeVar("T")


class LostWorkerWarning(UserWarning):
    """A worker did not return what it was given, which was then done here."""


def stream(
    work: Work | SubsetWork,
    source: Columns | Subsets,
    size: int,
    store: Store | None,
    executor: Executor | None,
) -> Iterator[Done]:
    """Yield the results of the blocks in order; what is in the store is not fitted again.

    Args:
        work: fits a block.
        source: the responses.
        size: responses in a block.
        store: where results are kept; None for nowhere.
        executor: whose workers fit; None for this thread.

    Warns:
        LostWorkerWarning: if workers are lost.
    """
    k = len(source.names)

    def load(first: int) -> Done | np.ndarray:
        known = None if store is None else store.read(first)
        return source.block(first, min(first + size, k)) if known is None else known

    def begun(first: int, loaded: Done | np.ndarray) -> Callable[[], Done]:
        if isinstance(loaded, tuple):
            return lambda: loaded
        fitted = _here(work, loaded) if executor is None else _there(executor, work, loaded)

        def finished() -> Done:
            done = fitted()
            if store is not None:
                store.write(first, list(source.names[first : first + size]), *done)
            return done

        return finished

    with ThreadPoolExecutor(1) as reader:
        starts = range(0, k, size)
        reading = ((first, reader.submit(load, first)) for first in starts)
        fitting = (begun(first, block.result()) for first, block in _ahead(reading, 1))
        for finished in _ahead(fitting, 0 if executor is None else WINDOW):
            yield finished()


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield items as they are, each after `count` more have been made."""
    made: deque[T] = deque()
    for item in items:
        made.append(item)
        if len(made) > count:
            yield made.popleft()
    yield from made


def _here(work: Work | SubsetWork, y: np.ndarray) -> Callable[[], Done]:
    return lambda: work.done(y)


def _there(executor: Executor, work: Work | SubsetWork, y: np.ndarray) -> Callable[[], Done]:
    """Hand a block to a worker; what it does not return is done here.

    An error of the fit itself is raised again by that.
    """
    try:
        future = executor.submit(work.done, y)
    except Exception as error:
        return _lost(work, y, error)

    def result() -> Done:
        try:
            return future.result()
        except Exception as error:
            return _lost(work, y, error)()

    return result


def _lost(work: Work | SubsetWork, y: np.ndarray, error: Exception) -> Callable[[], Done]:
    warnings.warn(
        f"a worker was lost ({type(error).__name__}: {error}); its responses are fitted here",
        LostWorkerWarning,
        stacklevel=2,
    )
    return _here(work, y)
