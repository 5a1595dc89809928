"""Blocks of responses on their way from a source through workers to a store, in bounded memory.

Reading runs ahead of fitting in a thread of its own.  Results are stored as they come, and handed
on in the order of the responses.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from .sources import Chunks, Indexed, Piece, pieces
from .store import Store
from .subsets import SubsetWork
from .work import Done, Work

WINDOW = 8
"""Most blocks that are handed to workers before the first of them is waited for."""

T = TypeVar("T")


class LostWorkerWarning(UserWarning):
    """A worker did not return what it was given, which was then done here."""


def stream(
    work: Work | SubsetWork,
    source: Indexed | Chunks,
    size: int,
    store: Store | None,
    executor: Executor | None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Done]:
    """Yield the results of the blocks in order; what is in the store is not fitted again.

    With workers, a block is written to the store when it is done, whatever those before it do.

    Args:
        work: fits a block.
        source: the responses.
        size: responses in a block.
        store: where results are kept; None for nowhere.
        executor: whose workers fit; None for this thread.
        share: which of the blocks are asked for: those from one number on, of every so many.

    Warns:
        LostWorkerWarning: if workers are lost.
    """
    blocks = islice(pieces(source, size), share[0], None, share[1])

    def load() -> tuple[Piece, Done | np.ndarray] | None:
        piece = next(blocks, None)
        if piece is None:
            return None
        known = None if store is None else store.read(piece.first)
        if known is not None and len(known[1]) != len(piece.names):
            known = None  # an iterator ended there before
        return piece, piece.read() if known is None else known

    def begun(piece: Piece, loaded: Done | np.ndarray) -> Callable[[], Done]:
        if isinstance(loaded, tuple):
            return lambda: loaded

        def kept(done: Done) -> Done:
            if store is not None:
                store.write(piece.first, list(piece.names), *done)
            return done

        if executor is None:
            return lambda: kept(work.done(loaded))
        return _there(executor, work, loaded, kept)

    with ThreadPoolExecutor(1) as reader:
        fitting = (begun(*loaded) for loaded in _one_ahead(reader, load))
        for finished in _ahead(fitting, 0 if executor is None else WINDOW):
            yield finished()


def _one_ahead(worker: Executor, call: Callable[[], T | None]) -> Iterator[T]:
    """Yield what a function returns, until that is None, the next being worked out meanwhile."""
    coming = worker.submit(call)
    while (found := coming.result()) is not None:
        coming = worker.submit(call)
        yield found


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield items as they are, each after `count` more have been made."""
    made: deque[T] = deque()
    for item in items:
        made.append(item)
        if len(made) > count:
            yield made.popleft()
    yield from made


def _there(
    executor: Executor, work: Work | SubsetWork, y: np.ndarray, kept: Callable[[Done], Done]
) -> Callable[[], Done]:
    """Hand a block to a worker, and what comes back to `kept` at once; return what waits for it.

    What a worker does not return is done here.  An error of the fit itself is raised again by that.
    """
    stored: Future[Done] = Future()

    def keep(future: Future[Done]) -> None:
        try:
            stored.set_result(kept(future.result()))
        except BaseException as error:
            stored.set_exception(error)

    def lost(error: Exception) -> Done:
        warnings.warn(
            f"a worker was lost ({type(error).__name__}: {error}); its responses are fitted here",
            LostWorkerWarning,
            stacklevel=2,
        )
        return kept(work.done(y))

    try:
        future = executor.submit(work.done, y)
    except Exception as error:
        refused = error
        return lambda: lost(refused)
    future.add_done_callback(keep)

    def result() -> Done:
        try:
            future.result()
        except Exception as error:
            return lost(error)
        return stored.result()

    return result
