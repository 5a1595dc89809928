"""``jax.jit`` for tests: compiling, not computing, is what their time goes to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from lmmax.compilation import CPU_OPTIONS

jit: Callable[..., Any] = partial(jax.jit, compiler_options=dict(CPU_OPTIONS))
"""As the library compiles its own calls, in half the time of JAX's default."""

oracle: Callable[..., Any] = partial(
    jax.jit, compiler_options={**CPU_OPTIONS, "xla_backend_optimization_level": 0}
)
"""For what is called a few times on small data: a quarter of JAX's default, unoptimised code."""
