"""How the high-level calls compile: quickly, and in little memory.

XLA's newer CPU code generator takes twice the time and seven times the memory of the older one for
the solver (measured with jaxlib 0.10.2: 1.4 s and 245 MB against 0.7 s and 35 MB, for equal speed
of the result), and compile time is what a user waits for.  The choice is an option of our own
functions, not a setting of JAX; where XLA no longer knows it, its default serves.

Every executable stays in memory for the next call of its shapes, in about 200 mappings of memory
each on a CPU.  Linux allows a process 65,530 of them, and XLA aborts the process that has no more
(seen with jaxlib 0.10.2), which a long study of differing models would reach.  So our executables
are dropped before that; what is called again is compiled again, or read from the compilation cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import jax

from .threads import one_blas_thread

CPU_OPTIONS: dict[str, bool | int] = {"xla_cpu_use_fusion_emitters": False}
FEW = 64
"""Executables that are always kept: without them little would be gained."""
MAPPINGS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
"""The mappings of this process, a line each, and how many it may have; on Linux only."""

SETTINGS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "jax_enable_x64": (jax.enable_x64, True),
    "jax_disable_jit": (jax.disable_jit, False),
    "jax_debug_nans": (jax.debug_nans, False),
    "jax_debug_infs": (jax.debug_infs, False),
    "jax_numpy_rank_promotion": (jax.numpy_rank_promotion, "allow"),
    "jax_numpy_dtype_promotion": (jax.numpy_dtype_promotion, "standard"),
    "jax_default_matmul_precision": (jax.default_matmul_precision, None),
    "jax_transfer_guard_host_to_device": (jax.transfer_guard_host_to_device, "allow"),
    "jax_transfer_guard_device_to_host": (jax.transfer_guard_device_to_host, "allow"),
    "jax_transfer_guard_device_to_device": (jax.transfer_guard_device_to_device, "allow"),
}
"""What JAX is set to while the high-level calls compute.

Double precision; and not what a user may have set to find faults in programs of their own: NaN and
infinity mark what is not known in ours, arrays of NumPy are handed over, and scalars broadcast.
"""

_every: weakref.WeakSet[Compiled] = weakref.WeakSet()
_lock = Lock()


@contextmanager
def computing() -> Iterator[None]:
    """Set JAX, in this thread and for the time being, to what our computations need."""
    with ExitStack() as stack:
        for name, (setting, value) in SETTINGS.items():
            if getattr(jax.config, name) not in (value, None):  # None: JAX's default
                stack.enter_context(setting(value))
        yield


class Compiled:
    """A jitted function with the compiler options of this module.

    Args:
        function: the function.
        static_argnums: positions of arguments that are constants to the compiler.
    """

    def __init__(self, function: Callable[..., Any], static_argnums: tuple[int, ...] = ()) -> None:
        self._function, self._static = function, static_argnums
        self._default: Any = jax.jit(function, static_argnums=static_argnums)
        self._quick: dict[tuple[tuple[str, bool | int], ...], Any] = {}
        self._quick_works = True
        with _lock:
            _every.add(self)

    def __call__(self, *arguments: Any) -> Any:
        """Call the function, compiled for the arguments' shapes and the options of the moment."""
        before = self.count()
        with one_blas_thread():
            # To the end of the computation, which may go on when the call has returned.
            result = jax.block_until_ready(self._called(*arguments))
        if self.count() > before:
            make_room()
        return result

    def _called(self, *arguments: Any) -> Any:
        if self._quick_works and jax.default_backend() == "cpu":
            try:
                return self._with_options()(*arguments)
            except jax.errors.JaxRuntimeError as error:
                if "No such compile option" not in str(error):
                    raise
                self._quick_works = False
        return self._default(*arguments)

    def _with_options(self) -> Any:
        options = tuple(CPU_OPTIONS.items())
        quick = self._quick.get(options)
        if quick is None:
            jitted = jax.jit(
                self._function, static_argnums=self._static, compiler_options=dict(options)
            )
            quick = self._quick.setdefault(options, jitted)
        return quick

    def count(self) -> int:
        """Return how many executables have been compiled, one for each set of shapes."""
        return sum(int(each._cache_size()) for each in (self._default, *self._quick.values()))

    def clear(self) -> None:
        """Drop the executables."""
        for each in (self._default, *self._quick.values()):
            each.clear_cache()


def make_room() -> None:
    """Drop all executables, if a process has made three quarters of the mappings that it may have.

    Nothing else depends on them: one that runs in another thread goes when it has ended.
    """
    with _lock:
        every = list(_every)
    if sum(each.count() for each in every) < FEW:
        return
    try:
        made, most = (path.read_bytes() for path in MAPPINGS)
    except OSError:
        return
    if 4 * made.count(b"\n") > 3 * int(most):
        for each in every:
            each.clear()
