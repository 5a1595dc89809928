"""Traces of functions of a large matrix by random probes, with control variates of known mean.

The controls are quadratic forms of the probes in powers of the matrix E, whose means are traces
that products of sparse matrices give exactly, as far as these are worth their time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sparse

from ..likelihood.iterative import Elimination, Probe, quadrature
from .model import Model

MOST_PRODUCTS = 2e9
"""Largest number of multiplications for which the exact mean of ``z'E^2 z`` is worth it."""
DEEP_PRODUCTS, DEEPEST = 1e9, 4
"""Likewise for higher powers of E, which are used where many probes would be needed; and how many
multiplications by E they may take."""
BLOCK_PRODUCTS = 2e7
"""Multiplications of sparse matrices handled together, for the sake of memory."""


class Estimate(NamedTuple):
    """Regression on control variates: mean (k,) and its Monte Carlo covariance (k, k)."""

    mean: np.ndarray
    covariance: np.ndarray


def estimated_traces(
    model: Model, at: Elimination, probes: list[Probe], rank: int
) -> tuple[Estimate, np.ndarray]:
    """Estimate ``log|T|`` and ``dlog|H|/dD`` from probes.

    The first ``rank`` columns are the orthonormal basis, counted in full; the others are drawn
    orthogonal to it and averaged.

    Returns:
        Estimates of (log|T|, slope in each entry of the joint D's triangle), and the exact part of
        the slopes.
    """
    q = len(model.free)
    triangle = np.tril_indices(q)
    logs = np.concatenate([quadrature(probe.krylov, np.asarray(probe.norm)) for probe in probes])
    norm = np.concatenate([np.asarray(probe.norm) for probe in probes])
    powers = np.concatenate([np.asarray(probe.powers) for probe in probes], axis=1)
    values = np.zeros((q, q, len(logs)))
    forms = np.zeros((q, q, len(logs)))
    form_means = np.zeros((q, q))
    for f, here in enumerate(model.columns):
        name, index = ("head", 0) if f == 0 else ("tail", f - 1)
        value, form = (
            np.concatenate(
                [
                    np.asarray(part if f == 0 else part[index])
                    for part in (getattr(probe, field) for probe in probes)
                ],
                axis=2,
            )
            for field in (name, f"{name}_form")
        )
        sign = -1.0 if f == 0 else 1.0
        values[here, here] = sign * value
        forms[here, here] = sign * form
        centre = at.head_mean if f == 0 else at.tail_mean[index]
        form_means[here, here] = sign * np.asarray(centre)

    def by_entry(array: np.ndarray) -> np.ndarray:
        # A step of an entry moves its mirror image too.
        both = array + np.swapaxes(array, 0, 1)
        both[np.arange(q), np.arange(q)] *= 0.5
        return both[triangle]

    values, forms, form_means = by_entry(values), by_entry(forms), by_entry(form_means)
    known, drawn = slice(0, rank), slice(rank, None)
    n_tail = model.W.shape[0] - model.effects[0].stop
    traces = power_traces(model, at, len(powers) // 2)
    controls = [norm, *powers[: len(traces)]]
    means = [n_tail, *traces] - np.array([control[known].sum() for control in controls])
    shared = np.stack(controls, axis=1)

    estimates, residuals, inflations = [], [], []
    for entry in range(1 + len(values)):
        sample = logs if entry == 0 else values[entry - 1]
        own, own_means = shared, means
        if entry:
            control = forms[entry - 1]
            own = np.column_stack([shared, control])
            own_means = np.append(means, form_means[entry - 1] - control[known].sum())
        mean, residual, inflation = _controlled(sample[drawn], own[drawn], own_means)
        estimates.append(mean + sample[known].sum())
        residuals.append(residual)
        inflations.append(np.sqrt(inflation))
    left = np.stack(residuals) * np.array(inflations)[:, None]
    slope = np.zeros((q, q))
    slope[model.columns[0], model.columns[0]] = np.asarray(at.head_slope)
    return Estimate(np.array(estimates), left @ left.T), by_entry(slope)


def _controlled(
    samples: np.ndarray, controls: np.ndarray, means: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Regress samples on control variates of known mean.

    Args:
        samples: values, (N,).
        controls: control variates, (N, c).
        means: their means, (c,).

    Returns:
        The estimated mean, residuals (N,), and the factor that turns their sum of squares into the
        variance of the estimate.
    """
    centre = controls.mean(axis=0)
    away = controls - centre
    size = np.sqrt(np.sum(away**2, axis=0))
    used = size > 1e-9 * (1.0 + np.abs(centre)) * np.sqrt(len(samples))
    left, values, right = np.linalg.svd(away[:, used] / size[used], full_matrices=False)
    kept = values > 1e-6
    left = left[:, kept]
    coefficient = left.T @ samples
    gap = right[kept] @ ((means - centre)[used] / size[used]) / values[kept]
    residual = samples - samples.mean() - left @ coefficient
    freedom = max(1, len(samples) - 1 - int(kept.sum()))
    inflation = (1.0 / len(samples) + float(gap @ gap)) / freedom
    return np.asarray(samples.mean() + gap @ coefficient), residual, inflation


def power_traces(model: Model, at: Elimination, depth: int) -> list[float]:
    """Return the traces of the powers of E up to ``2 depth``, or as many as are worth their time.

    Rows of the powers are formed by blocks: with ``R_k`` the rows of ``E^k``, a block adds
    ``<R_{k-1}, R_k>`` to the trace of ``E^{2k-1}`` and ``|R_k|^2`` to that of ``E^{2k}``.
    """
    if model.products > MOST_PRODUCTS:
        return [0.0]
    root, rest = _off_diagonal(model, at)
    left = root.T.tocsr()
    step = max(1, int(BLOCK_PRODUCTS * left.shape[0] / max(model.products, 1.0)))
    traces = np.zeros(2 * depth)
    if depth == 1:
        for first in range(0, left.shape[0], step):
            rows = left[first : first + step] @ root - rest[first : first + step]
            traces[1] += float(rows.data @ rows.data)
        return list(traces)
    E = (left @ root - rest).tocsr()
    step = max(1, int(E.shape[0] * BLOCK_PRODUCTS / _work(E, depth)))
    for first in range(0, E.shape[0], step):
        rows = E[first : first + step]
        traces[1] += float(rows.data @ rows.data)
        for k in range(2, depth + 1):
            after = rows @ E
            traces[2 * k - 2] += float(rows.multiply(after).sum())
            traces[2 * k - 1] += float(after.data @ after.data)
            rows = after
    return list(traces)


def worthwhile_depth(model: Model, at: Elimination) -> int:
    """Return for how many powers of E exact traces are worth their time."""
    if model.products > BLOCK_PRODUCTS * 5:
        return 1
    root, rest = _off_diagonal(model, at)
    E = (root.T.tocsr() @ root - rest).tocsr()
    worth = [depth for depth in range(2, DEEPEST + 1) if _work(E, depth) <= DEEP_PRODUCTS]
    return max([1, *worth])


def _work(E: Any, depth: int) -> float:
    """Estimate from some rows the multiplications for all rows of ``E^2, ..., E^depth``."""
    length = np.diff(E.indptr).astype(float)
    sample = np.linspace(0, E.shape[0] - 1, min(64, E.shape[0])).astype(int)
    rows, work = E[sample], 0.0
    for k in range(2, depth + 1):
        work += float(np.sum(length[rows.indices])) * E.shape[0] / len(sample)
        if k < depth and work <= MOST_PRODUCTS:
            rows = rows @ E
    return max(work, 1.0)


def _off_diagonal(model: Model, at: Elimination) -> tuple[Any, Any]:
    """Return sparse ``G`` (head effects, tail effects) and ``O`` with ``E = G'G - O``."""
    scaled = sparse.block_diag([_block_diagonal(np.asarray(b)) for b in at.scaled], format="csr")
    rest = sparse.block_diag([_block_diagonal(np.asarray(b)) for b in at.fill], format="csr")
    if model.tail is not None:
        rest = (rest + scaled.T @ model.tail @ scaled).tocsr()
    return (_block_diagonal(np.asarray(at.half)) @ model.cross @ scaled).tocsr(), rest


def _block_diagonal(block: np.ndarray) -> Any:
    """Return the sparse block diagonal matrix of blocks (q, q, m)."""
    q, _, m = block.shape
    data = np.ascontiguousarray(block.transpose(2, 0, 1))
    shape = (q * m, q * m)
    return sparse.bsr_matrix((data, np.arange(m), np.arange(m + 1)), shape=shape).tocsr()
