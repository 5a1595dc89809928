"""Whether a factor with one level, a single time series, tells the parameters of its terms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .compress import Layout
from .constraints import TermColumns, directions
from .frames import DataError
from .levels import Grouping

__all__ = ["check_lone_groups"]

# More quadratic forms than parameters, so that chance does not make them look alike.
_SPARE = 20
# Relative to the largest: what rounding leaves of a direction that follows from the others.
_ROUNDING = 1e-9


def check_lone_groups(
    layout: Layout, groupings: Sequence[Grouping], terms: Sequence[TermColumns], scale: bool
) -> None:
    """Raise if factors with one level leave covariance parameters that the data do not tell.

    The covariance of the data that the coefficients leave over moves by ``K' Z E Z' K`` with a
    parameter whose direction in D is E, and by ``K' W^-1 K`` with the scale. These must be linearly
    independent, and are if the quadratic forms of random vectors are: ``w' Z E Z' w``.

    Args:
        layout: the designs.
        groupings: the grouping factors.
        terms: the random terms whose covariance is estimated.
        scale: whether the residual variance is estimated.

    Raises:
        DataError: naming the factor and the remedy.
    """
    lone = [i for i, factor in enumerate(layout.factors) if factor.n_groups == 1]
    concerned = [term for term in terms if term.factor in lone]
    if not concerned:
        return
    root = np.ones(layout.n_obs) if layout.weights is None else np.sqrt(layout.weights)
    moves = [directions(term) for term in terms]
    count = sum(map(len, moves)) + scale + _SPARE
    w = np.random.default_rng(0).standard_normal((layout.n_obs, count))
    Q = np.linalg.qr(root[:, None] * layout.X[:, layout.fixed.kept])[0]
    w -= Q @ (Q.T @ w)
    forms = [np.sum(w * w, axis=0)] if scale else []
    for term, move in zip(terms, moves, strict=True):
        factor, start = layout.factors[term.factor], layout.slices[term.factor].start
        Z = np.concatenate([block for block in factor.blocks], axis=1)
        Z = Z[:, term.columns.start - start : term.columns.stop - start]
        sums = np.zeros((factor.n_groups, Z.shape[1], count))
        for j, column in enumerate(Z.T):
            np.add.at(sums[:, j], factor.codes, (root * column)[:, None] * w)
        forms += list(np.einsum("gac,kab,gbc->kc", sums, move, sums, optimize=True))
    matrix = np.array(forms)
    sizes = np.linalg.norm(matrix, axis=1, keepdims=True)
    singular = np.linalg.svd(matrix / np.where(sizes > 0.0, sizes, 1.0), compute_uv=False)
    if not sizes.all() or singular[-1] < _ROUNDING * singular[0]:
        grouping = groupings[concerned[0].factor]
        named = " + ".join(term.label for term in concerned)
        raise DataError(
            f"the grouping factor {grouping.name!r} has one level, {str(grouping.levels[0])!r}, "
            f"which does not tell the parameters of {named} from each other and from the residual "
            "variance: leave the term out, take a structure with fewer parameters, or fix some "
            "with fix="
        )
