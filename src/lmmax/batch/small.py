"""Small matrices of many lanes, on the host."""

from __future__ import annotations

import numpy as np


def turned(turn: np.ndarray, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Return combinations of arrays (lanes or 1, m), by lower triangles (lanes, r, r)."""
    return [
        np.asarray(sum(turn[:, a, b, None] * rows[b] for b in range(a + 1)))
        for a in range(len(rows))
    ]


def cholesky(A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return squared pivots (n, r) and lower factors (n, r, r), with no limits on A."""
    r = A.shape[1]
    L = np.zeros_like(A)
    left = np.empty(A.shape[:2])
    for j in range(r):
        column = A[:, j:, j] - np.einsum("nik,nk->ni", L[:, j:, :j], L[:, j, :j])
        left[:, j] = column[:, 0]
        L[:, j:, j] = column / np.sqrt(np.where(column[:, :1] > 0.0, column[:, :1], 1.0))
    return left, L
