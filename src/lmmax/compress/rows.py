"""Passes over the rows, group by group, in chunks that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CHUNK_ROWS = 1 << 13
"""Most rows handled together; fewer with many columns."""
CHUNK_WORK = 1 << 18
"""Most multiplications in a product over a chunk: beyond it BLAS starts threads, which on busy
processors wait for each other longer than they compute."""
DEPENDENT_TOLERANCE = 1e-12
"""A column of Z_i is dependent within its group below this fraction of its norm: rounding."""
SMALLEST_BUCKET = 64
"""Groups are padded to at least this number; merging fewer would gain nothing."""


def chunk_rows(columns: int) -> int:
    """Return how many rows to handle together."""
    return min(CHUNK_ROWS, max(CHUNK_WORK // columns**2, 2048))


def chunks(starts: np.ndarray, sizes: np.ndarray, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of whole groups, and of their rows, of about ``chunk`` rows each."""
    ends = starts + sizes
    first, m = 0, len(starts)
    while first < m:
        last = int(np.searchsorted(ends, starts[first] + chunk, side="right"))
        last = max(last, first + 1)
        yield slice(first, last), slice(int(starts[first]), int(ends[last - 1]))
        first = last


def orthonormalise(Q: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Replace the columns of Z, given as rows of ``Q (q, rows)``, by orthonormal ones per group.

    Modified Gram-Schmidt, each column orthogonalised twice, which is orthonormal to rounding
    (Giraud et al., 2005).  A column that depends on earlier ones within a group becomes zero.
    Returns the triangular factors, shape (q, q, groups).
    """
    q = len(Q)
    U = np.zeros((q, q, len(starts)))
    for k in range(q):
        norm = np.sqrt(np.add.reduceat(Q[k] * Q[k], starts))
        for _ in range(2 if k else 0):
            for j in range(k):
                part = np.add.reduceat(Q[j] * Q[k], starts)
                U[j, k] += part
                Q[k] -= np.repeat(part, sizes) * Q[j]
        left = np.sqrt(np.add.reduceat(Q[k] * Q[k], starts)) if k else norm
        left = np.where(left > DEPENDENT_TOLERANCE * norm, left, 0.0)
        inverse = np.divide(1.0, left, out=np.zeros_like(left), where=left > 0.0)
        U[k, k] = left
        Q[k] *= np.repeat(inverse, sizes)
    return U


def project_out(
    Q: np.ndarray, data: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Take the projection on ``Q`` out of ``data (r, rows)`` in place; return ``Q' data``."""
    parts = np.empty((len(Q), len(data), len(starts)))
    for k, column in enumerate(Q):
        parts[k] = np.add.reduceat(data * column, starts, axis=1)
        data -= np.repeat(parts[k], sizes, axis=1) * column
    return parts


def bucket(size: int) -> int:
    """Round a number of groups up: powers of four while small, then four values per octave."""
    if size <= SMALLEST_BUCKET:
        return SMALLEST_BUCKET
    if size <= 4 * SMALLEST_BUCKET:
        return 4 * SMALLEST_BUCKET
    step = 1 << (size.bit_length() - 3)
    return -(-size // step) * step
