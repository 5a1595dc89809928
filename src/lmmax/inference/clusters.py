"""Independent clusters of rows, in batches of equal shape, for sums over clusters.

A cluster holds whole groups of every grouping factor, so that the covariance of the response is
block diagonal over clusters.  Relative to the scale a block is ``V_i = N_i + F_i F_i'`` with
``F_i = Z_i root`` and ``N_i`` the inverse weights.  With ``N_i = I`` an orthogonal rotation of the
rows changes nothing, and one that makes ``[Z_i X_i residual]`` triangular leaves no more rows than
there are columns; no matrix is larger than that, however many rows a cluster has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from ..characters import Visible

if TYPE_CHECKING:
    from ..compress import FactorColumns
    from ..results import Fit

BATCH_ENTRIES = 1 << 19
"""Most numbers of the data handled together: they stay in the processor's cache."""


class ClusterError(Visible, ValueError):
    """Clusters that are not independent, or do not fit the rows."""


@dataclass(frozen=True)
class Clusters:
    """A partition of the rows into independent clusters.

    Attributes:
        name: name of the clustering variable.
        labels: the clusters' labels, (m,).
        codes: cluster of each row, (n,).
        parents: per grouping factor the cluster of each group.
    """

    name: str
    labels: pd.Index
    codes: np.ndarray
    parents: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of rows of each cluster, (m,)."""
        return np.bincount(self.codes, minlength=len(self))


def find_clusters(fit: Fit, cluster: Any = None) -> Clusters:
    """Return the clusters that the user asked for.

    Args:
        fit: the fitted model.
        cluster: name of a grouping factor, or a label for each row used, (n,), as an array or as a
            Series with the index of the data; None for the outermost grouping factor.

    Raises:
        ClusterError: if a grouping factor is not nested within the clusters, if a relationship
            matrix connects them, or if the labels do not fit the rows.
    """
    for factor in fit.layout.factors:
        if factor.root is not None:
            raise ClusterError(
                f"the levels of {factor.name!r} are related by a relationship matrix, so that no "
                "rows are independent of the others; fit without relmat for clusters"
            )
    if cluster is None:
        cluster = min(fit.layout.factors, key=lambda factor: factor.n_groups).name
        remedy = (
            "so that they are crossed; pass cluster= a label for each row such that every "
            "grouping factor is nested within the clusters"
        )
    else:
        remedy = "choose coarser clusters, or leave that term out of the model"
    if isinstance(cluster, str):
        names = [factor.name for factor in fit.layout.factors]
        if cluster not in names:
            raise ClusterError(
                f"cluster={cluster!r} is no grouping factor of the model ({', '.join(names)}); "
                "pass the labels of the rows themselves, for example data[column]"
            )
        grouping = fit.design.groupings[names.index(cluster)]
        name, labels, codes = cluster, grouping.levels, grouping.codes
    else:
        name, labels, codes = _from_labels(fit, cluster)
    if len(labels) < 2:
        raise ClusterError(f"all rows are in one cluster of {name!r}; at least two are needed")
    parents: list[np.ndarray] = []
    for factor in fit.layout.factors:
        parent = np.zeros(factor.n_groups, dtype=codes.dtype)
        parent[factor.codes] = codes
        astray = np.flatnonzero(parent[factor.codes] != codes)
        if len(astray):
            level = fit.design.groupings[len(parents)].levels[factor.codes[astray[0]]]
            raise ClusterError(
                f"{factor.name!r} is not nested within {name!r}: its level {level!r} has rows in "
                f"several clusters, {remedy}"
            )
        parents.append(parent)
    return Clusters(name, labels, codes, tuple(parents))


def _from_labels(fit: Fit, cluster: Any) -> tuple[str, pd.Index, np.ndarray]:
    """Return name, labels and codes of a clustering given row by row."""
    name = "cluster"
    if isinstance(cluster, pd.Series):
        name = str(cluster.name) if cluster.name is not None else name
        index = fit.design.index
        if not cluster.index.equals(index):
            if not cluster.index.is_unique or not index.isin(cluster.index).all():
                raise ClusterError(
                    f"cluster={name!r} is a Series whose index is not that of the data; pass "
                    "an array with a label for each row used in the fit"
                )
            cluster = cluster.loc[index]
    values = pd.Series(cluster) if np.ndim(cluster) == 1 else None
    if values is None or len(values) != fit.nobs:
        raise ClusterError(
            f"cluster has shape {np.shape(cluster)}; it needs one label for each of the "
            f"{fit.nobs} rows used in the fit, or is the name of a grouping factor"
        )
    codes, labels = pd.factorize(values, sort=False)
    if np.any(codes < 0):
        row = fit.design.index[int(np.argmax(codes < 0))]
        raise ClusterError(f"cluster has no label for row {row!r}; every row used needs one")
    return name, pd.Index(labels), codes


class Batch(NamedTuple):
    """Clusters of one shape, relative to the scale.

    Attributes:
        clusters: their positions, (b,).
        X: fixed effects in the working coordinates of the layout, (b, r, p).
        Z: per factor the working columns of the groups within the cluster, (b, r, k, q).
        residual: ``y - X beta``, (b, r).
        rest: squared length of the residual outside the r rows, (b,).
        noise: residual variance of the rows, (b, r).
    """

    clusters: np.ndarray
    X: np.ndarray
    Z: tuple[np.ndarray, ...]
    residual: np.ndarray
    rest: np.ndarray
    noise: np.ndarray


def batches(
    fit: Fit, clusters: Clusters, *, rotate: bool = True, members: np.ndarray | None = None
) -> Iterator[Batch]:
    """Yield the clusters, batch by batch.

    Args:
        fit: the fitted model.
        clusters: the partition.
        rotate: divide rows by their residual standard deviations and rotate them.  If False, that
            is done only where all weights of a cluster are equal.
        members: positions of the clusters that are wanted; all if None.
    """
    layout, weights = fit.layout, fit.design.weights
    resid = fit.resid_marginal.to_numpy()
    order = np.argsort(clusters.codes, kind="stable")
    starts = np.cumsum(clusters.sizes) - clusters.sizes
    counts = [np.bincount(parent, minlength=len(clusters)) for parent in clusters.parents]
    places = [_positions(*each) for each in zip(clusters.parents, counts, strict=True)]
    even = np.ones(len(clusters), dtype=bool)
    if weights is not None and not rotate:
        in_order = weights[order]
        even = np.maximum.reduceat(in_order, starts) == np.minimum.reduceat(in_order, starts)
    members = np.arange(len(clusters)) if members is None else members
    shapes = pd.MultiIndex.from_arrays([each[members] for each in (clusters.sizes, *counts, even)])
    codes, keys = pd.factorize(shapes, sort=False)
    by_shape = np.split(
        members[np.argsort(codes, kind="stable")], np.cumsum(np.bincount(codes))[:-1]
    )
    effects = [layout.random_columns(at, slice(None)) for at in range(len(layout.factors))]
    p = len(layout.fixed.kept)
    for (n, *groups, scaled), alike in zip(keys, by_shape, strict=True):
        widths = [k * factor.n_effects for k, factor in zip(groups, layout.factors, strict=True)]
        c = sum(widths)
        step = max(1, BATCH_ENTRIES // (n * (c + p + 1)))
        for here in np.split(alike, np.arange(step, len(alike), step)):
            rows = order[starts[here][:, None] + np.arange(n)]
            data = np.zeros((len(here), n, c + p + 1))
            _fill_effects(data, rows, layout.factors, effects, places, widths)
            data[:, :, c:-1] = layout.X[rows][:, :, layout.fixed.kept] @ layout.fixed.inverse
            data[:, :, -1] = resid[rows]
            noise = np.ones((len(here), n))
            if weights is not None and scaled:
                data *= np.sqrt(weights[rows])[:, :, None]
            elif weights is not None:
                noise = 1.0 / weights[rows]
            rest = np.zeros(len(here))
            if scaled and n > c + p:
                data = np.asarray(np.linalg.qr(data, mode="r"))
                rest = data[:, -1, -1] ** 2
                data, noise = data[:, :-1], noise[:, : c + p]
            parts = np.split(data[:, :, :c], np.cumsum(widths)[:-1], axis=2)
            Z = tuple(
                part.reshape(*part.shape[:2], k, factor.n_effects)
                for part, k, factor in zip(parts, groups, layout.factors, strict=True)
            )
            yield Batch(here, data[:, :, c:-1], Z, data[:, :, -1], rest, noise)


def _fill_effects(
    data: np.ndarray,
    rows: np.ndarray,
    factors: Sequence[FactorColumns],
    effects: Sequence[np.ndarray],
    places: Sequence[np.ndarray],
    widths: Sequence[int],
) -> None:
    """Put the random-effects columns of rows (b, n) into ``data`` (b, n, ...), from the left.

    Args:
        data: zeros.
        rows: positions of the rows.
        factors: the grouping factors.
        effects: per factor the columns of its effects, (q, n).
        places: per factor the position of each group in its cluster.
        widths: per factor the number of columns.
    """
    at = 0
    for factor, own, place, width in zip(factors, effects, places, widths, strict=True):
        columns = at + place[factor.codes[rows]][:, :, None] * factor.n_effects
        at += width
        for column in own:
            np.put_along_axis(data, columns, column[rows][:, :, None], axis=2)
            columns = columns + 1


def _positions(parent: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the position of each group among those of its cluster."""
    order = np.argsort(parent, kind="stable")
    position = np.empty(len(parent), dtype=np.int64)
    position[order] = np.arange(len(parent)) - np.repeat(np.cumsum(count) - count, count)
    return position


def principal_axes(batch: Batch, roots: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues (b, r) and eigenvectors (b, r, r) of ``V_i``, relative to the scale.

    Args:
        batch: clusters.
        roots: per factor a square root of the working covariance of its effects, (q, q).
    """
    V = np.zeros((*batch.noise.shape, batch.noise.shape[1]))
    diagonal = np.arange(V.shape[1])
    V[:, diagonal, diagonal] = batch.noise
    for Z, root in zip(batch.Z, roots, strict=True):
        F = (Z @ root).reshape(*Z.shape[:2], -1)
        V += F @ np.swapaxes(F, 1, 2)
    values, vectors = np.linalg.eigh(V)
    # What is below the smallest variance of a residual is rounding.
    return np.maximum(values, batch.noise.min(axis=1, keepdims=True)), vectors


def factor_roots(fit: Fit) -> tuple[np.ndarray, ...]:
    """Return per factor the square root of the relative working covariance of its effects."""
    return tuple(fit.estimates.working_root[here, here] for here in fit.layout.slices)
