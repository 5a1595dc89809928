"""Streams of refitted replicates, for the bootstrap and for tests that simulate.

A replicate's random numbers depend on the seed and its position only, so that neither the number of
replicates, nor that of processors or devices, nor how they are chunked, changes a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from ..batch import (
    BatchEstimates,
    check_engine,
    refit_responses,
    refit_statistics,
    shared_by_responses,
    vectorises,
)
from ..batch.statistics import Responses, sampler, shared_designs
from ..simulate import draws, generator, spread_effects

if TYPE_CHECKING:
    from ..results import Fit

BLOCK = 64
"""Replicates that share a generator, where statistics are drawn instead of rows."""
STREAM_BYTES = 1 << 28
"""Bytes of data of the replicates that are in memory together."""
TOGETHER, ONE_BY_ONE = 4096, 16
"""Most replicates in one chunk of the stream, in lanes or not."""


def parametric(fit: Fit, n: int, seed: int) -> Iterator[BatchEstimates]:
    """Refit n responses drawn from the fitted model, in chunks.

    With one grouping factor the sufficient statistics are drawn, not the rows; see
    :mod:`lmmax.batch.statistics`.
    """
    if not vectorises(fit):
        yield from by_rows(fit, draws(fit, 0, n, seed), n)
        return
    shared = shared_designs(fit)
    source = sampler(fit, shared)
    Y = shared.problem.Y
    chunk = _fitting(Y.size)
    blocks = range(-(-n // BLOCK))
    for first in range(0, len(blocks), max(chunk // BLOCK, 1)):
        here = blocks[first : first + max(chunk // BLOCK, 1)]
        drawn = [source.draw(generator(seed, block), BLOCK) for block in here]
        whole = Responses(*(np.concatenate(parts) for parts in zip(*drawn, strict=True)))
        count = min(len(whole.C), n - first * BLOCK)
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            yield refit_statistics(fit, shared, Responses(*(x[part] for x in whole)))


def residual(fit: Fit, n: int, seed: int) -> Iterator[BatchEstimates]:
    """Refit n responses made of resampled random effects and residuals, in chunks."""
    yield from by_rows(fit, resampled(fit, n, seed), n)


def by_rows(fit: Fit, responses: Iterable[np.ndarray], n: int) -> Iterator[BatchEstimates]:
    """Refit n responses given by row, in chunks."""
    check_engine(fit)
    shared = shared_by_responses(fit)
    size = fit.nobs if shared is None else max(fit.nobs, shared.numbers)
    chunk = min(_fitting(size), ONE_BY_ONE if shared is None else TOGETHER)
    source = iter(responses)
    for start in range(0, n, chunk):
        rows = np.stack(list(islice(source, min(chunk, n - start))))
        yield refit_responses(fit, rows, shared)


def _fitting(numbers: int) -> int:
    """Return how many replicates of so many numbers each are handled together."""
    return int(np.clip(STREAM_BYTES // (8 * numbers), 1, TOGETHER))


def resampled(fit: Fit, n: int, seed: int) -> Iterator[np.ndarray]:
    """Yield n responses made of resampled conditional modes and residuals, (nobs,).

    The modes of each factor, a level's together, and the residuals are centred and rescaled such
    that their covariance is the estimated one, which shrinkage has made too small; then they are
    drawn with replacement.  Residuals count by the root of their weights; modes of related levels
    are made independent first.

    Source: Carpenter, Goldstein and Rasbash (2003), J. R. Stat. Soc. C 52, 431-443.
    """
    design = fit.design
    mean = fit.fittedvalues_marginal.to_numpy()
    modes = []
    for effects, grouping, here in zip(
        fit._effects, design.groupings, fit.layout.slices, strict=True
    ):
        u = effects.modes
        if grouping.root is not None:
            # Of a singular matrix, as many as there are independent ones.
            root = _columns(grouping.root)
            square = root.shape[1] == len(root)
            u = np.linalg.solve(root, u) if square else np.linalg.lstsq(root, u, rcond=None)[0]
        modes.append(_rescaled(u, fit.cov_re.to_numpy()[here, here]))
    weights = np.ones(fit.nobs) if design.weights is None else design.weights
    errors = fit.resid.to_numpy() * np.sqrt(weights)
    errors = _rescaled(errors[:, None], np.array([[fit.scale]]))[:, 0]
    for position in range(n):
        rng = generator(seed, position)
        effects_drawn = []
        for u, grouping in zip(modes, design.groupings, strict=True):
            drawn = u[rng.integers(len(u), size=len(u))]
            matrix = grouping.root
            effects_drawn.append(drawn if matrix is None else _columns(matrix) @ drawn)
        drawn = errors[rng.integers(len(errors), size=len(errors))] / np.sqrt(weights)
        yield mean + spread_effects(fit, effects_drawn) + drawn


def _columns(root: np.ndarray) -> np.ndarray:
    """Return the columns of a root of a relationship matrix that are not zero, (m, rank)."""
    return root[:, root.any(axis=0)]


def _rescaled(values: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """Centre rows (m, q) and give them the covariance (q, q), as far as their rank allows."""
    centred = values - values.mean(axis=0)
    own = centred.T @ centred / len(centred)
    sizes, vectors = np.linalg.eigh(own)
    kept = sizes > 1e-12 * np.max(sizes, initial=0.0)
    whiten = (vectors[:, kept] / np.sqrt(sizes[kept])) @ vectors[:, kept].T
    sizes, vectors = np.linalg.eigh(cov)
    root = (vectors * np.sqrt(sizes.clip(min=0.0))) @ vectors.T
    return np.asarray(centred @ whiten @ root)
