"""p-values of many tests: false discovery rates."""

from __future__ import annotations

import numpy as np

from ..options import choose

METHODS = ("bh", "by", "storey")
LAMBDA = 0.5
"""p-values above this are taken to be of true null hypotheses by Storey's method."""


def qvalues(p: np.ndarray, method: str = "bh") -> np.ndarray:
    """Return the least false discovery rate at which each test is called.

    Args:
        p: p-values, (n,); NaN stays NaN and counts for nothing.
        method: "bh" (Benjamini and Hochberg, 1995), "by" (Benjamini and Yekutieli, 2001: any
            dependence), or "storey" (Storey, 2002, J. R. Stat. Soc. B 64, 479-498: times the
            estimated share of true null hypotheses).

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> import numpy as np
        >>> qvalues(np.array([0.01, 0.02, 0.03, 0.5])).round(6).tolist()
        [0.04, 0.04, 0.04, 0.5]
    """
    from scipy.stats import false_discovery_control

    method = choose("method", method, METHODS)
    p = np.asarray(p, dtype=float)
    found = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    if not known.any():
        return found
    values = false_discovery_control(p[known], method="by" if method == "by" else "bh")
    if method == "storey":
        null = (1.0 + np.sum(p[known] > LAMBDA)) / ((1.0 - LAMBDA) * known.sum())
        values = values * min(null, 1.0)
    found[known] = values
    return found
