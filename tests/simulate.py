"""Small simulated designs for tests of the numerics."""

from __future__ import annotations

from typing import Any

import numpy as np


def simulate(
    seed: int, *, q: int = 2, p: int = 3, sizes: Any = None, weighted: bool = False
) -> dict[str, Any]:
    """Arrays ``y, X, Z, codes, weights`` of a ragged one-factor model, rows shuffled."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, 15) if sizes is None else np.asarray(sizes)
    codes = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    n = len(codes)
    X = np.column_stack([np.ones(n), rng.normal(size=(n, p - 1))]) if p else np.empty((n, 0))
    Z = np.column_stack([np.ones(n), rng.normal(size=(n, q - 1))])
    weights = rng.uniform(0.5, 2.0, n) if weighted else None
    root = np.tril(rng.normal(size=(q, q)))
    effects = rng.normal(size=(len(sizes), q)) @ root.T
    noise = rng.normal(size=n) / (1.0 if weights is None else np.sqrt(weights))
    y = X.sum(axis=1) + np.einsum("ij,ij->i", Z, effects[codes]) + noise
    return {"y": y, "X": X, "Z": Z, "codes": codes, "weights": weights}
