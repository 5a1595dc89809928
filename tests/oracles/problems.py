"""Small problems for the oracles and for the library's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.oracles.lindstrom_bates import unpack_factor


def simulate(seed: int, q: int, weighted: bool) -> dict[str, Any]:
    """Ragged groups, some smaller than q, with an unstructured D."""
    rng = np.random.Generator(np.random.PCG64(seed))
    sizes = np.array([1, 1, 2, 3, 5, 8, 4])
    codes = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    n = len(codes)
    X = np.column_stack([np.ones(n), rng.standard_normal((n, 2))])
    Z = np.column_stack([np.ones(n), rng.standard_normal((n, 3))])[:, :q]
    y = X @ [1.0, -0.5, 2.0] + (Z * rng.standard_normal((len(sizes), q))[codes]).sum(1)
    y = y + rng.standard_normal(n)
    weights = rng.uniform(0.5, 2.0, n) if weighted else None
    return {"y": y, "X": X, "Z": Z, "codes": codes, "weights": weights}


def unpack_symmetric(vech: np.ndarray, q: int) -> np.ndarray:
    """A symmetric matrix from its lower triangle, row by row."""
    L = unpack_factor(vech, q)
    return L + L.T - np.diag(np.diag(L))
