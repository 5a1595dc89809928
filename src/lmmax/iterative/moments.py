"""Where an iterative fit starts: covariances by the method of moments."""

from __future__ import annotations

import numpy as np

from .model import Model


def moments(model: Model) -> np.ndarray:
    """Start from moments: set quadratic forms of y equal to their expectations.

    The forms are ``y'y`` and, for each factor, the products of the levels' shrunken means
    ``(A_ff + I)^-1 W_f``, which under the model are linear in the covariances (Henderson, 1953).
    The fixed effects, already taken out of y, are ignored.
    """
    q = len(model.free)
    rows, columns = np.nonzero(np.tril(model.free))
    y = model.W[:, -1]
    matrix = np.zeros((1 + len(rows), 1 + len(rows)))
    target = np.zeros(1 + len(rows))
    matrix[0, 0], target[0] = model.n, model.C[-1, -1]
    shrink, forms = [], np.zeros((q, q))
    diagonal = [np.asarray(block) for block in model.problem.diagonal]
    totals = np.zeros((q, q))
    expected = np.zeros((q, q, q, q))
    noise = np.zeros((q, q))
    for here, effects, A in zip(model.columns, model.effects, diagonal, strict=True):
        block = A.transpose(2, 0, 1)
        G = np.linalg.inv(block + np.eye(len(A)))
        shrink.append(G)
        mean = np.einsum("mab,mb->ma", G, y[effects].reshape(-1, len(A)))
        forms[here, here] = mean.T @ mean
        totals[here, here] = A.sum(axis=2)
        GA = G @ block
        noise[here, here] = np.einsum("mab,mcb->ac", GA, G)
        _add_form(expected, here, here, GA)
    for g, meeting in enumerate(model.problem.meetings, start=1):
        head, tail, block = (np.asarray(part) for part in meeting)
        block = block.transpose(2, 0, 1)
        _add_form(expected, model.columns[0], model.columns[g], shrink[0][head] @ block)
        other = shrink[g][tail] @ block.transpose(0, 2, 1)
        _add_form(expected, model.columns[g], model.columns[0], other)
    for e, (i, j) in enumerate(zip(rows, columns, strict=True), start=1):
        direction = np.zeros((q, q))
        direction[i, j] = direction[j, i] = 1.0
        matrix[0, e] = np.sum(totals * direction)
        matrix[e, 0] = noise[i, j]
        target[e] = forms[i, j]
        image = np.einsum("abcd,cd->ab", expected, direction)
        matrix[1:, e] = image[rows, columns]
    solution = np.linalg.lstsq(matrix, target, rcond=None)[0]
    D = np.zeros((q, q))
    D[rows, columns] = D[columns, rows] = solution[1:] / max(solution[0], 1e-12)
    # Three factors or more leave the meetings between tails out, so the start is but a guess.
    for here in model.columns:
        values, vectors = np.linalg.eigh(np.nan_to_num(D[here, here]))
        small = 0.1 * model.noise[here][0]
        D[here, here] = (vectors * np.clip(values, small, 1e4)) @ vectors.T * model.free[here, here]
    return D


def _add_form(expected: np.ndarray, to: slice, of: slice, B: np.ndarray) -> None:
    """Add the map ``D -> sum B D B'`` over blocks ``B (c, a, b)``."""
    _, a, b = B.shape
    flat = B.reshape(len(B), a * b)
    gram = (flat.T @ flat).reshape(a, b, a, b)
    expected[to, to, of, of] += gram.transpose(0, 2, 1, 3)
