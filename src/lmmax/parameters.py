"""The three parameterisations of a model, and their packed vectors.

======== ===================================== ==========================================
form     covariance part                       meaning
======== ===================================== ==========================================
natural  ``Psi = scale * D``                   covariance of the random effects
profile  ``D``                                 covariance relative to the residual scale
sqrt     ``Lambda``, lower, ``D = Lambda Lambda'``  its Cholesky factor
======== ===================================== ==========================================

A packed vector holds the fixed effects (optional), then the lower triangle of the covariance part
row by row.  Unpacking ``sqrt`` multiplies the factor by its transpose; unpacking the other two
reflects the triangle.  The functions work on NumPy and on JAX arrays, traced or not.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

Form = Literal["natural", "profile", "sqrt"]
FORMS: tuple[Form, ...] = ("natural", "profile", "sqrt")


class Parameters(NamedTuple):
    """Fixed effects ``beta`` (p,), relative covariance ``D`` (q, q) and residual ``scale``."""

    beta: Any
    D: Any
    scale: Any


def triangle_size(q: int) -> int:
    """Return the number of entries of a lower triangle of order q."""
    return q * (q + 1) // 2


def triangle_order(size: int) -> int:
    """Return the order q of a lower triangle with ``size`` entries."""
    q = int((np.sqrt(8 * size + 1) - 1) / 2)
    if triangle_size(q) != size:
        raise ValueError(
            f"a lower triangle has 1, 3, 6, 10, ... entries, not {size}; "
            "give the whole triangle, row by row"
        )
    return q


def pack_triangle(matrix: Any) -> Any:
    """Return the lower triangle of ``matrix`` (q, q), row by row."""
    return matrix[np.tril_indices(matrix.shape[0])]


def unpack_lower(packed: Any) -> Any:
    """Return the lower triangular matrix with the given entries, row by row."""
    q = triangle_order(packed.shape[0])
    return packed[_positions(q)] * np.tri(q, dtype=packed.dtype)


def unpack_symmetric(packed: Any) -> Any:
    """Return the symmetric matrix with the given lower triangle, row by row."""
    return packed[_positions(triangle_order(packed.shape[0]))]


@cache
def _positions(q: int) -> np.ndarray:
    """Return, for each entry (i, j), where it or its mirror image is in the packed triangle."""
    # 32 bits: JAX remembers the type of an array that is kept, and 64 bits may not be on later.
    i, j = np.indices((q, q), dtype=np.int32)
    high, low = np.maximum(i, j), np.minimum(i, j)
    return high * (high + 1) // 2 + low


def factor(D: Any) -> np.ndarray:
    """Return the lower Cholesky factor of positive semidefinite ``D``, diagonal non-negative.

    A pivot that is zero to rounding gives a zero column, so singular matrices are factored too.
    """
    D = np.asarray(D, dtype=float)
    q = len(D)
    scale = np.sqrt(np.diag(D).clip(min=0.0))
    L = np.zeros((q, q))
    for j in range(q):
        column = D[j:, j] - L[j:, :j] @ L[j, :j]
        if column[0] > 4.0 * q * np.finfo(float).eps * scale[j] ** 2:
            L[j:, j] = column / np.sqrt(column[0])
    return L


def lower_from_root(root: Any) -> np.ndarray:
    """Return the lower triangular ``L`` with ``L L' = root root'``, diagonal non-negative.

    Unlike ``factor(root @ root.T)`` it loses no digits when the product is nearly singular.
    """
    R = np.asarray(np.linalg.qr(np.asarray(root, dtype=float).T, mode="r"))
    signs = np.where(np.diag(R) < 0.0, -1.0, 1.0)
    return (R * signs[:, None]).T


def pack(parameters: Parameters, form: Form = "sqrt", *, with_beta: bool = False) -> Any:
    """Pack ``parameters`` in the given form.

    Args:
        parameters: fixed effects, relative covariance and scale.
        form: "natural", "profile" or "sqrt".
        with_beta: put the fixed effects in front.

    Returns:
        A vector of length q (q + 1) / 2, plus p with the fixed effects.

    Raises:
        ValueError: if the form is unknown, or ``D`` is not positive semidefinite for "sqrt".

    Example:
        >>> import numpy as np
        >>> from lmmax.parameters import Parameters, pack
        >>> pack(Parameters(np.zeros(1), np.array([[4.0, 2.0], [2.0, 2.0]]), 2.0), "sqrt")
        array([2., 1., 1.])
    """
    _check_form(form)
    beta, D, scale = parameters
    if form == "natural":
        packed = pack_triangle(scale * D)
    elif form == "profile":
        packed = pack_triangle(D)
    else:
        lowest = np.linalg.eigvalsh(np.asarray(D))[0] if len(D) else 0.0
        if lowest < -1e-8 * max(np.max(np.abs(D), initial=0.0), 1.0):
            raise ValueError("D is not positive semidefinite, so it has no Cholesky factor")
        packed = pack_triangle(factor(D))
    if not with_beta:
        return packed
    stack: Any = np if isinstance(packed, np.ndarray) and isinstance(beta, np.ndarray) else jnp
    return stack.concatenate([beta, packed])


def unpack(packed: Any, form: Form = "sqrt", *, n_fixed: int = 0, scale: Any = 1.0) -> Parameters:
    """Undo :func:`pack`: ``n_fixed`` leading entries are fixed effects, the rest a triangle.

    ``scale`` turns the natural form into relative covariances and is handed through.
    """
    _check_form(form)
    beta, triangle = packed[:n_fixed], packed[n_fixed:]
    if form == "sqrt":
        L = unpack_lower(triangle)
        return Parameters(beta, L @ L.T, scale)
    D = unpack_symmetric(triangle)
    return Parameters(beta, D / scale if form == "natural" else D, scale)


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; use one of {', '.join(map(repr, FORMS))}")
