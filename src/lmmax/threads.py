"""Threads of other libraries that would work against those of XLA.

XLA spreads its work over the cores by a pool of its own, and calls LAPACK through SciPy, whose BLAS
brings another pool with as many threads.  These wait for each other by spinning: where the cores
are busy already, in workers of joblib or on a shared server, a thread that spins takes the core
from the one that it waits for, and calls take several times as long.  The matrices that LAPACK sees
here are small, or one leaf of many of a large one, so that its own threads gain nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

LAPACK_OF_XLA = "scipy.linalg.cython_lapack"
"""The module whose LAPACK XLA calls on a CPU; JAX imports it."""
NUMPY = "numpy.linalg._umath_linalg"
"""The module that NumPy's own BLAS, for products and decompositions, can be found by."""
_PREFIXES = "scipy_openblas", "openblas"
_SUFFIXES = "", "64_"


def n_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Limit:
    """One thread for a BLAS as long as any of our threads asks for it.

    Args:
        get: returns the number of threads of the BLAS.
        set_to: sets it.
    """

    def __init__(self, get: Any, set_to: Any) -> None:
        self._get, self._set = get, set_to
        self._lock, self._holders, self._before = Lock(), 0, 1

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the number of threads at one; the last to leave restores what it was."""
        with self._lock:
            self._holders += 1
            if self._holders == 1:
                self._before = self._get()
                if self._before > 1:
                    self._set(1)
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                # A number that somebody else has set meanwhile stays.
                if not self._holders and self._before > 1 and self._get() == 1:
                    self._set(self._before)


@cache
def _found(path: str) -> _Limit | None:
    """Return the limit of the OpenBLAS that a library is linked with, if it is one."""
    try:
        library = ctypes.CDLL(path)
    except OSError:
        return None
    for prefix in _PREFIXES:
        for suffix in _SUFFIXES:
            get = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
            set_to = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
            if get is not None and set_to is not None:
                return _Limit(get, set_to)
    return None


@contextmanager
def one_blas_thread(of: str = LAPACK_OF_XLA) -> Iterator[None]:
    """Let a BLAS work on one thread, for the length of a ``with`` block.

    The number of threads is what it was afterwards.  Blocks may be nested, and entered by several
    threads at a time.  Where the BLAS is no OpenBLAS, nothing happens.

    Args:
        of: the module that is linked with it, `LAPACK_OF_XLA` or `NUMPY`.

    Example:
        >>> with one_blas_thread():
        ...     pass
    """
    module = sys.modules.get(of)
    path = None if module is None else module.__file__
    limit = None if path is None else _found(path)
    if limit is None:
        yield
        return
    with limit.held():
        yield
