"""Lanes on all devices of this process: each works on a share of its own.

The devices do not wait for one another in a loop, as they would if its condition were one for all
lanes: every device runs the whole function on its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ..compilation import Compiled, computing
from ..compilation_cache import compilation_cache
from ..threads import n_cores

AXIS = "lanes"
Chunk = TypeVar("Chunk")


def n_devices() -> int:
    """Return the number of devices that lanes are spread over."""
    return len(jax.local_devices())


def side_by_side(call: Callable[[Chunk], Any], chunks: Iterable[Chunk]) -> list[Any]:
    """Call a function of float64 arrays on each chunk, on as many at a time as there are cores.

    XLA spreads large products over the cores, but the rest, which is most of the work of small
    models, it does on one.  The result is a pytree of NumPy arrays for each chunk.
    """

    def run(chunk: Chunk) -> Any:
        with computing(), compilation_cache():
            return jax.device_get(call(chunk))

    chunks = list(chunks)
    # A call that several devices share has a core for each of them.
    together = max(1, n_cores() // n_devices())
    if len(chunks) < 2 or together < 2 or jax.default_backend() != "cpu":
        return [run(chunk) for chunk in chunks]
    # JAX compiles what they share once: the others wait for it.
    with ThreadPoolExecutor(together) as pool:
        return list(pool.map(run, chunks))


def in_blocks(call: Callable[[Any], Any], n: int, size: int) -> Any:
    """Call a function on n lanes, so many at a time; return its pytree of arrays for all.

    Args:
        call: takes positions of lanes, a slice or numbers.
        n: number of lanes.
        size: lanes of a block; the last one is filled up with its first lane, so that one shape
            is compiled.
    """

    def run(first: int) -> Any:
        if first + size <= n:
            return call(slice(first, first + size))
        local = np.arange(first, first + size)
        return call(np.where(local < n, local, first))

    parts = side_by_side(run, range(0, n, size))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n], *parts)


class OverLanes:
    """A compiled function of lanes, that all local devices share if there are several.

    Args:
        function: of arrays some of which have a leading axis of lanes, as has all that it returns.
        axes: returns, for its arguments, where they have that axis: 0 or -1 for nowhere, in the
            same structure or a prefix of it.
    """

    def __init__(self, function: Callable[..., Any], axes: Callable[..., Any]) -> None:
        self._function, self._axes = function, axes
        self._alone = Compiled(function)
        self._shared = Compiled(self._spread)

    def __call__(self, *arguments: Any) -> Any:
        """Call the function; with several devices, the lanes must be a multiple of their number."""
        return (self._alone if n_devices() == 1 else self._shared)(*arguments)

    def _spread(self, *arguments: Any) -> Any:
        return jax.shard_map(
            self._function,
            mesh=Mesh(jax.local_devices(), (AXIS,)),
            in_specs=jax.tree.map(_spec, self._axes(*arguments)),
            out_specs=PartitionSpec(AXIS),
            check_vma=False,
        )(*arguments)

    def count(self) -> int:
        """Return how many executables have been compiled, one for each set of shapes."""
        return self._alone.count() + self._shared.count()


def _spec(axis: int) -> PartitionSpec:
    return PartitionSpec(AXIS) if axis == 0 else PartitionSpec()
