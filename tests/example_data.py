"""Data for the tests of designs, and a comparison of designs."""

from __future__ import annotations

import numpy as np
import pandas as pd

FORMULA = "np.log(w) ~ x*f + b + poly(z, 2) + offset(o) + (x + f | g) + (1 | h:g)"


def example():
    rng = np.random.default_rng(1)
    n = 24
    return pd.DataFrame(
        {
            "y": rng.normal(size=n),
            "x": rng.normal(size=n),
            "z": rng.uniform(1, 5, n),
            "f": np.tile(list("bcad"), 6),
            "h": np.repeat(["v", "u"], 12),
            "b": rng.random(n) < 0.5,
            "k": np.tile([3, 1, 2], 8),
            "g": np.repeat([30, 10, 20, 5, 7, 8], 4),
            "my v": rng.uniform(1, 2, n),
            "w": rng.uniform(1, 2, n),
            "o": rng.normal(size=n),
        },
        index=[f"row{i}" for i in range(n)],
    )


def same(a, b):
    assert a.x_names == b.x_names
    np.testing.assert_array_equal(a.y, b.y)
    np.testing.assert_array_equal(a.X, b.X)
    assert len(a.blocks) == len(b.blocks)
    for p, q in zip(a.blocks, b.blocks, strict=True):
        assert (p.term, p.grouping, p.names) == (q.term, q.grouping, q.names)
        np.testing.assert_array_equal(p.Z, q.Z)
    for p, q in zip(a.groupings, b.groupings, strict=True):
        assert p.name == q.name
        np.testing.assert_array_equal(p.codes, q.codes)
        assert p.levels.tolist() == q.levels.tolist()
    for name in ("weights", "offset"):
        p, q = getattr(a, name), getattr(b, name)
        assert (p is None) == (q is None)
        if p is not None:
            np.testing.assert_array_equal(p, q)
    assert a.n_dropped == b.n_dropped
    assert a.dropped_by == b.dropped_by
