"""A design on some of its rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..levels import Grouping
from ..matrices import Design


def subset(design: Design, rows: np.ndarray, y: np.ndarray) -> Design:
    """Return a design on some rows, levels of which no row is left taken out.

    Args:
        design: the design.
        rows: positions of the rows, ascending.
        y: their response.
    """
    if len(rows) == len(design.y):
        return replace(design, y=np.ascontiguousarray(y, dtype=float))
    blocks = tuple(replace(block, Z=np.asfortranarray(block.Z[rows])) for block in design.blocks)
    return replace(
        design,
        y=np.ascontiguousarray(y, dtype=float),
        X=np.asfortranarray(design.X[rows]),
        blocks=blocks,
        groupings=tuple(levels_left(grouping, rows) for grouping in design.groupings),
        weights=None if design.weights is None else design.weights[rows],
        offset=None if design.offset is None else design.offset[rows],
        index=design.index[rows],
    )


def levels_left(grouping: Grouping, rows: np.ndarray) -> Grouping:
    """Return a grouping factor on some rows, without the levels that have none of them."""
    codes = grouping.codes[rows]
    if grouping.root is not None:  # related levels stay, with or without rows
        return replace(grouping, codes=codes)
    kept, codes = np.unique(codes, return_inverse=True)
    if len(kept) == len(grouping.levels):
        return replace(grouping, codes=codes.astype(np.int64))
    return replace(grouping, codes=codes.astype(np.int64), levels=grouping.levels[kept])
