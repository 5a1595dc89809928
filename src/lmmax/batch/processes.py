"""Several processes of one ``jax.distributed`` job: which chunks are whose, and what all know.

Each process fits a share of the chunks on its own devices.  Nothing is exchanged until all are
done; then results go round chunk by chunk, or are in a directory that all processes see.  Numbers
travel as bytes, which no device rounds.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

import jax
import numpy as np

from .engines import Record

MESSAGE = 2048
"""Most bytes of an error that is told to other processes."""

Done = tuple[Record, np.ndarray]


def share() -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    return jax.process_index(), jax.process_count()


def alone() -> bool:
    """Return whether this is the only process."""
    return jax.process_count() == 1


def wait() -> None:
    """Wait until all processes have come here."""
    if not alone():
        _gathered(np.zeros(1, dtype="u1"))


def first_of_all(call: Callable[[], None], error: type[ValueError]) -> None:
    """Call a function in the first process, and then, if it raised nothing there, in the others.

    Args:
        call: the function.
        error: an error of it, which is raised in all processes.
    """
    first, text = jax.process_index() == 0, ""
    if first:
        try:
            call()
        except error as raised:
            if alone():
                raise
            text = str(raised)
    if alone():
        return
    text = _said(text)[0]
    if text:
        raise error(text)
    if not first:
        call()


def check_same(key: str, what: str) -> None:
    """Raise in all processes unless they were given the same.

    Args:
        key: the same in all processes if that is so.
        what: what it is.
    """
    if not alone() and len(set(_said(key))) > 1:
        raise ValueError(f"the processes of this job were given different {what}")


def put_together(mine: Sequence[Done], chunks: int) -> list[Done]:
    """Return the results of all chunks, in order, from those of each process.

    Args:
        mine: results of every P-th chunk, P the number of processes, from this one's number on.
        chunks: number of chunks of all of them.
    """
    _, count = share()
    found: list[Done] = []
    for at in range(-(-chunks // count)):
        # The last round may be shorter: who has nothing more goes along with what it had.
        own = mine[min(at, len(mine) - 1)] if mine else None
        found += _round(own)
    return found[:chunks]


def _round(done: Done | None) -> list[Done]:
    """Return what each process has."""
    leaves = [] if done is None else [*done[0], done[1]]
    head = [(leaf.dtype.str, leaf.shape) for leaf in leaves]
    heads = _said(repr(head))
    content = b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in leaves)
    sizes = _gathered(np.array([len(content)]).view("u1")).view(np.int64)[:, 0]
    room = np.zeros(int(sizes.max()), dtype="u1")
    room[: len(content)] = np.frombuffer(content, dtype="u1")
    found = []
    for text, row in zip(heads, _gathered(room), strict=True):
        at, parts = 0, []
        for kind, shape in ast.literal_eval(text):
            size = np.dtype(kind).itemsize * int(np.prod(shape))
            part = np.frombuffer(row[at : at + size].tobytes(), dtype=kind)
            parts.append(part.reshape(shape))
            at += size
        if parts:
            found.append((Record(*parts[:-1]), parts[-1]))
    return found


def _said(text: str) -> list[str]:
    """Return a short text of each process."""
    room = np.zeros(MESSAGE, dtype="u1")
    content = text.encode()[:MESSAGE]
    room[: len(content)] = np.frombuffer(content, dtype="u1")
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in _gathered(room)]


def _gathered(values: np.ndarray) -> np.ndarray:
    """Return an array of each process, of one shape in all, one after the other."""
    from jax.experimental.multihost_utils import process_allgather

    return np.ascontiguousarray(process_allgather(values))
