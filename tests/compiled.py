"""``jax.jit`` for tests: compiling, not computing, is what their time goes to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from lmmax.compilation import CPU_OPTIONS

jit: Callable[..., Any] = partial(jax.jit, compiler_options=dict(CPU_OPTIONS))
"""As the library compiles its own calls, in half the time of JAX's default."""

UNOPTIMISED = {**CPU_OPTIONS, "xla_backend_optimization_level": 0}
"""For code that runs a few times only, on small data: LLVM optimises nothing."""

oracle: Callable[..., Any] = partial(jax.jit, compiler_options=UNOPTIMISED)
"""In a quarter of the time of JAX's default."""
