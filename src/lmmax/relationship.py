"""Known relationship matrices of the levels of a grouping factor -> their triangular roots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from .frames import DataError, listing
from .levels import Grouping, label_positions

__all__ = ["semidefinite_root", "with_relationships"]

# Relative to the largest entry: what rounding leaves in a matrix that is symmetric otherwise.
_ASYMMETRY = 1e-8
# Likewise: what a singular matrix may differ from one without negative eigenvalues.
_ROUNDING = 1e-8


def with_relationships(groupings: Sequence[Grouping], relmat: Any) -> tuple[Grouping, ...]:
    """Grouping factors, with the root of the relationship matrix where one is given.

    The effects of a factor with levels 1 to m and relationship matrix A have covariance
    ``A[i, j] D`` between levels i and j; without a matrix, ``A = I``.

    Args:
        groupings: the grouping factors of a design.
        relmat: by name of a factor, a DataFrame with the levels as index and as columns: symmetric
            and positive semidefinite for the levels that occur. It may have more levels than
            those, and in another order. None for no matrix.

    Returns:
        The same factors; `root` is the root of the matrix for the levels that occur, in their
        order, as :func:`semidefinite_root` makes it. Factors without a matrix are the same objects.

    Raises:
        DataError: for a matrix that does not fit; the message names the factor.
        TypeError: if `relmat` is not a mapping.

    Example:
        >>> sires = Grouping("sire", np.array([0, 0, 1]), pd.Index(["a", "b"]))
        >>> A = pd.DataFrame([[4.0, 2.0], [2.0, 2.0]], ["a", "b"], ["a", "b"])
        >>> with_relationships([sires], {"sire": A})[0].root.tolist()
        [[2.0, 0.0], [1.0, 1.0]]
    """
    if relmat is None:
        return tuple(groupings)
    if not isinstance(relmat, Mapping):
        raise TypeError(
            "relmat must be a dict from the names of grouping factors to DataFrames, not "
            f"{type(relmat).__name__}"
        )
    names = [grouping.name for grouping in groupings]
    for name in relmat:
        if name not in names:
            raise DataError(
                f"relmat has the name {name!r}, which is no grouping factor of the model; its "
                f"grouping factors: {listing(map(repr, names)) or 'none'}"
            )
    return tuple(
        replace(grouping, root=_root(grouping, relmat[grouping.name]))
        if grouping.name in relmat
        else grouping
        for grouping in groupings
    )


def _root(grouping: Grouping, matrix: Any) -> np.ndarray:
    """The root (m, m) of a matrix for the levels that occur, in their order."""
    what = f"the relationship matrix of {grouping.name!r}"
    if not isinstance(matrix, pd.DataFrame):
        raise DataError(
            f"{what} must be a pandas DataFrame whose index and columns are the levels, not "
            f"{type(matrix).__name__}: write pd.DataFrame(A, index=levels, columns=levels)"
        )
    rows = label_positions(grouping.levels, matrix.index, f"the index of {what}", "")
    columns = label_positions(grouping.levels, matrix.columns, f"the columns of {what}", "")
    part = matrix.iloc[rows, columns]
    if any(pd.api.types.is_complex_dtype(kind) for kind in part.dtypes):
        raise DataError(
            f"{what} holds complex numbers: pass the real part, np.real(A), if that is meant"
        )
    try:
        A = part.to_numpy(np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        raise DataError(f"{what} must be numeric") from None
    if not np.isfinite(A).all():
        i, j = np.argwhere(~np.isfinite(A))[0]
        raise DataError(
            f"{what} is {A[i, j]} for {_pair(grouping, i, j)}: every entry must be a finite number"
        )
    difference = np.abs(A - A.T)
    if difference.max() > _ASYMMETRY * np.abs(A).max():
        i, j = np.unravel_index(np.argmax(difference), A.shape)
        raise DataError(
            f"{what} is not symmetric: {A[i, j]:g} for {_pair(grouping, i, j)}, but {A[j, i]:g} "
            "the other way round; if only one triangle was filled, copy it to the other"
        )
    A = (A + A.T) / 2.0
    if not A.any():
        raise DataError(
            f"{what} is zero for all levels that occur, so their effects would not vary; leave the "
            "term out, or give another matrix"
        )
    root = semidefinite_root(A)
    if root is None:
        lowest = np.linalg.eigvalsh(A)[0]
        raise DataError(
            f"{what} is not positive semidefinite: for the levels that occur its smallest "
            f"eigenvalue is {lowest:.3g}, and no effects have such covariances; if the matrix was "
            f"estimated or rounded, add {-lowest:.2g} to its diagonal, or give the nearest matrix "
            "without negative eigenvalues"
        )
    return root


def semidefinite_root(A: np.ndarray) -> np.ndarray | None:
    """Return a root R of a symmetric matrix, ``A = R R'``, None if it has negative eigenvalues.

    That is the lower Cholesky factor (m, m) if the matrix is positive definite.  If it is singular,
    as with identical twins or after centring, it is the factor by Cholesky with pivoting: the
    column of each pivot stands at the place of that level, so that entries are zero between
    unrelated levels, and columns beyond the rank are zero.

    Source: Higham (2002), Accuracy and Stability of Numerical Algorithms, section 10.3.
    """
    size, m = float(np.abs(A).max()), len(A)
    try:
        root = np.linalg.cholesky(A)
        # A pivot that is zero to rounding may come out positive.
        if np.diag(root).min() ** 2 > m * np.finfo(float).eps * size:
            return root
    except np.linalg.LinAlgError:
        pass
    from scipy.linalg.lapack import dpstrf

    packed, pivots, rank, _ = dpstrf(A, lower=1, tol=10.0 * m * np.finfo(float).eps * size)
    pivots = pivots - 1
    root = np.zeros_like(A)
    root[np.ix_(pivots, pivots[:rank])] = np.tril(packed)[:, :rank]
    return root if np.abs(A - root @ root.T).max() <= _ROUNDING * size else None


def _pair(grouping: Grouping, i: Any, j: Any) -> str:
    levels = grouping.levels.tolist()
    return f"({levels[int(i)]!r}, {levels[int(j)]!r})"
