"""Blocks of responses on their way from a source through workers to a store, in bounded memory.

Reading runs ahead of fitting in a thread of its own, and hashing beside it in another.  Results are
stored as they come, and handed on in the order of the responses.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..characters import Visible
from .seals import content_of
from .sources import Chunks, Indexed, Piece, pieces
from .store import Store, StoreWarning
from .subsets import SubsetWork
from .work import Done, Work

WINDOW = 8
"""Most blocks that are handed to workers before the first of them is waited for."""

T = TypeVar("T")


class Loaded(NamedTuple):
    """A block that was read.

    Attributes:
        piece: which.
        y: the responses, with what goes with them.
        content: returns the hash of that, which is made meanwhile.
        known: its results, if the store has them.
        strange: whether the store has some of other responses, or else of other work or another
            place; None if it has neither.
    """

    piece: Piece
    y: Any
    content: Callable[[], bytes] = bytes
    known: Done | None = None
    strange: bool | None = None


class LostWorkerWarning(Visible, UserWarning):
    """A worker did not return what it was given, which was then done here."""


def check_forks(executor: Any) -> None:
    """Raise for an executor whose processes are forks of this one.

    JAX runs threads, which hold locks that a fork inherits without the threads: its processes
    wait for ever.
    """
    context = getattr(executor, "_mp_context", None) or getattr(executor, "_context", None)
    method = getattr(context, "get_start_method", lambda: None)()
    if method == "fork":
        raise ValueError(
            f"executor={type(executor).__name__}(...) starts its processes by fork, which JAX's "
            "threads do not survive: they would wait for ever. Use "
            'ProcessPoolExecutor(..., mp_context=multiprocessing.get_context("spawn")), in a '
            'script under `if __name__ == "__main__":`'
        )


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
    What the store has of a block counts if it is of the very responses that are read here.

    Args:
        work: fits a block.
        source: the responses.
        size: responses in a block.
        store: where results are kept; None for nowhere.
        executor: whose workers fit; None for this thread.
        share: which of the blocks are asked for: those from one number on, of every so many.

    Warns:
        LostWorkerWarning: if workers are lost.
        StoreWarning: if the store has results of other responses, work, or places.
    """
    blocks = islice(pieces(source, size), share[0], None, share[1])

    def load() -> Loaded | None:
        piece = next(blocks, None)
        if piece is None:
            return None
        known, y = None if store is None else store.read(piece.first), piece.read()
        if store is None:
            return Loaded(piece, y)
        content = hasher.submit(content_of, piece.names, y).result
        if known is None or len(known.n_obs) != len(piece.names):
            return Loaded(piece, y, content)  # an iterator may have ended there before
        if store.keeps(piece.first, known, content()):
            return Loaded(piece, y, content, known=(known.record, known.n_obs))
        return Loaded(piece, y, content, strange=known.content != content())

    warned = False

    def begun(loaded: Loaded) -> Callable[[], Done]:
        nonlocal warned
        piece, y, content = loaded[:3]
        if loaded.known is not None:
            found = loaded.known
            return lambda: found
        if store is not None and loaded.strange is not None and not warned:
            warned = True
            of = "other responses" if loaded.strange else "other work, or of another place in it"
            warnings.warn(
                f"out={str(store.path)!r}: what is there for the responses from {piece.first} on "
                f"is of {of}; they are fitted again, and so is whatever else is not of this work",
                StoreWarning,
                stacklevel=2,
            )

        def kept(done: Done) -> Done:
            if store is not None:
                store.write(piece.first, list(piece.names), *done, content())
            return done

        if executor is None:
            return lambda: kept(work.done(y))
        return _there(executor, work, y, kept)

    with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as reader:
        fitting = (begun(loaded) for loaded in _one_ahead(reader, load))
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
