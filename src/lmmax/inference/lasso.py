"""Coefficients with an L1 penalty, for a quadratic loss."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

TOLERANCE = 1e-12
"""Largest violation of the optimality conditions, relative to the size of the gradient."""


class Lasso(NamedTuple):
    """The minimum.

    Attributes:
        coefficients: (p,); exactly zero where the penalty keeps them there.
        converged: whether the optimality conditions hold.
    """

    coefficients: np.ndarray
    converged: bool


def lasso(
    A: np.ndarray, c: np.ndarray, weights: np.ndarray, start: np.ndarray, max_rounds: int = 200
) -> Lasso:
    """Minimise ``b'A b - 2 c'b + sum_j weights_j |b_j|`` over b.

    Rounds of coordinate descent find which coefficients are zero and the signs of the others; then
    the equations of the latter are solved.  The minimum is accepted where the subgradient contains
    zero, so the result does not depend on the path.

    Args:
        A: positive definite matrix, (p, p).
        c: (p,).
        weights: not negative, (p,).
        start: coefficients to start from, (p,).
        max_rounds: most rounds.

    Source: Friedman, Hastie and Tibshirani (2010), J. Stat. Softw. 33(1), section 2.
    """
    b = np.array(start, dtype=float)
    half = 0.5 * np.asarray(weights, dtype=float)
    size = np.max(np.abs(c), initial=0.0) + np.max(half, initial=0.0)
    for _ in range(max_rounds):
        for j in range(len(b)):
            rest = c[j] - A[j] @ b + A[j, j] * b[j]
            b[j] = np.sign(rest) * max(abs(rest) - half[j], 0.0) / A[j, j]
        active = b != 0.0
        solved = np.zeros_like(b)
        signed = c - half * np.sign(b)
        solved[active] = np.linalg.solve(A[np.ix_(active, active)], signed[active])
        if (np.sign(solved) == np.sign(b)).all():
            slope = np.abs(c - A @ solved)
            if (slope[~active] <= half[~active] + TOLERANCE * size).all():
                return Lasso(solved, True)
    return Lasso(b, False)
