"""Whether maximum likelihood has a maximum at all, by the ranks of the designs.

Let the relative covariance of the effects in a set S grow without end, and the residual variance
shrink with it.  Then ``log|V|`` falls by the logarithm of the scale ``n - rank(Z_S)`` times, and
the rest stays bounded if y lies in the span of ``[X Z_S]``.  So there is no maximum if for one set

    y in span [X Z_S]   and   rank Z_S < n.

Where the columns of ``[X Z_S]`` span all rows that holds for any response.  Sets are those that a
covariance may be large on by itself: all effects of a term or none, any effects that are
uncorrelated with the others, and any number of combinations of correlated ones.  Different rates
of growth add nothing.

Under REML the coefficients count with the effects, and no response but one that lies in a smaller
span has that; it is told by its digits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from .compress import Layout
from .constraints import TermColumns
from .solve import Constraints

RANK = 1e-9
"""What is left of a column by the others, less than this fraction of it, is nothing."""
MOST_SETS = 256
"""Most sets that are looked at; of models with more, all effects together only."""
SEED = 20251


def without_maximum(
    layout: Layout,
    terms: Sequence[TermColumns],
    constraints: Constraints,
    y: np.ndarray | None = None,
) -> bool:
    """Return whether the likelihood of a model by maximum likelihood rises without end.

    For designs of few rows: all columns are written out.

    Args:
        layout: the designs.
        terms: the random terms.
        constraints: what is free.
        y: the response, (n,), or None for any response.
    """
    if not constraints.scale_free:
        return False
    root = np.sqrt(layout.weights)[:, None] if layout.weights is not None else 1.0
    X = _units(root * (layout.X[:, layout.fixed.kept] @ layout.fixed.inverse))
    n = len(X)
    if n != layout.n_obs:
        return False
    choices = [list(_choices(layout, term, constraints)) for term in terms]
    everything = tuple(each[-1] for each in choices)
    count = int(np.prod([float(len(each)) for each in choices]))
    for chosen in itertools.product(*choices) if count <= MOST_SETS else [everything]:
        Z = _units(root * np.concatenate(chosen, axis=1))
        both = np.concatenate([X, Z], axis=1)
        if (both.shape[1] < n and y is None) or _rank(Z) >= n:
            continue
        if y is None:
            if _rank(both) == n:
                return True
        elif _is_spanned(both, np.sqrt(layout.weights) * y if layout.weights is not None else y):
            return True
    return False


def _choices(layout: Layout, term: TermColumns, constraints: Constraints) -> Iterator[np.ndarray]:
    """Yield columns (n, c) of the effects of a term that may be large, all of them last."""
    factor = layout.factors[term.factor]
    begin = layout.slices[term.factor].start
    blocks = np.concatenate(factor.blocks, axis=1)
    Z = blocks[:, term.columns.start - begin : term.columns.stop - begin]
    indicators = np.zeros((len(Z), factor.n_groups))
    indicators[np.arange(len(Z)), factor.codes] = 1.0

    def by_group(columns: np.ndarray) -> np.ndarray:
        return (indicators[:, :, None] * columns[:, None, :]).reshape(len(Z), -1)

    held = np.asarray(constraints.held)[term.columns, term.columns]
    if not held.any():
        yield np.zeros((len(Z), 0))
        if term.pattern is not None:
            own = [[*_parts(Z[:, block])] for block in term.sets]
            for parts in itertools.product(*own):
                columns = np.concatenate(parts, axis=1)
                if 0 < columns.shape[1] < term.width:
                    yield by_group(columns)
    yield by_group(Z)


def _parts(Z: np.ndarray) -> Iterator[np.ndarray]:
    """Yield combinations of correlated effects, of each number of them (n, d); generic ones."""
    w = Z.shape[1]
    directions = np.random.default_rng(SEED).normal(size=(w, w))
    for d in range(w):
        yield Z @ directions[:, :d]
    yield Z


def _units(columns: np.ndarray) -> np.ndarray:
    """Return the columns that are not zero, each of unit length."""
    sizes = np.linalg.norm(columns, axis=0)
    return np.asarray(columns[:, sizes > 0.0] / sizes[sizes > 0.0])


def _rank(columns: np.ndarray) -> int:
    if not columns.shape[1]:
        return 0
    return int(np.sum(np.linalg.svd(columns, compute_uv=False) > RANK))


def _is_spanned(columns: np.ndarray, y: np.ndarray) -> bool:
    left = y - columns @ np.linalg.lstsq(columns, y, rcond=RANK)[0]
    return bool(np.linalg.norm(left) <= RANK * np.linalg.norm(y))
