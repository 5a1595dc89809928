"""Threads of other libraries are held back for the length of a call, and no longer."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import jax
import numpy as np
import pytest

from lmmax import threads
from lmmax.compilation import Compiled
from lmmax.threads import LAPACK_OF_XLA, NUMPY, _Limit, n_cores, one_blas_thread


class Blas:
    """A library with a number of threads."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get(self) -> int:
        return self.count

    def set_to(self, count: int) -> None:
        self.count = count


@pytest.fixture
def blas(monkeypatch: pytest.MonkeyPatch) -> Blas:
    """A library of four threads in the place of every other."""
    own = Blas(4)
    limit = _Limit(own.get, own.set_to)
    monkeypatch.setattr(threads, "_found", lambda path: limit)
    return own


def test_one_thread_inside_and_what_it_was_outside(blas: Blas) -> None:
    with one_blas_thread():
        assert blas.count == 1
        with one_blas_thread():
            assert blas.count == 1
        assert blas.count == 1
    assert blas.count == 4


def test_an_error_restores_it_too(blas: Blas) -> None:
    with pytest.raises(ZeroDivisionError), one_blas_thread():
        raise ZeroDivisionError
    assert blas.count == 4


def test_what_the_user_sets_meanwhile_stays(blas: Blas) -> None:
    with one_blas_thread():
        blas.set_to(3)
    assert blas.count == 3


def test_the_last_of_several_threads_restores_it(blas: Blas) -> None:
    both = Barrier(2)

    def work(_: int) -> int:
        with one_blas_thread():
            both.wait(timeout=60.0)
            seen = blas.count
            both.wait(timeout=60.0)
        return seen

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [1, 1]
    assert blas.count == 4


def test_compiled_calls_run_inside(blas: Blas) -> None:
    def count(x: jax.Array) -> jax.Array:
        return x + jax.pure_callback(
            lambda: np.float32(blas.count), jax.ShapeDtypeStruct((), x.dtype)
        )

    assert float(Compiled(count)(np.float32(0.0))) == 1.0
    assert blas.count == 4


@pytest.mark.parametrize("of", [LAPACK_OF_XLA, NUMPY])
def test_libraries_of_this_installation(of: str) -> None:
    """Where they are OpenBLAS, as in the wheels of PyPI; otherwise nothing happens."""
    path = sys.modules[of].__file__
    assert path is not None
    limit = threads._found(path)
    if limit is None:
        with one_blas_thread(of):
            return
    before = limit._get()
    limit._set(2)
    try:
        with one_blas_thread(of):
            assert limit._get() == 1
        assert limit._get() == 2
    finally:
        limit._set(before)


def test_unknown_libraries_do_nothing() -> None:
    assert threads._found("/no/such/library.so") is None
    with one_blas_thread("no.such.module"):
        pass


def test_there_is_a_core() -> None:
    assert n_cores() >= 1
