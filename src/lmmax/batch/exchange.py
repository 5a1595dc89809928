"""Which rearrangements of the errors leave their covariance as it is, and all of them or some.

A mixed model says which rows are alike: with ``V = I + sum_f Z_f D_f Z_f'``, exchanging two rows
that belong to the same groups and have equal columns in every Z changes nothing, nor does
exchanging two independent blocks of rows with equal designs, nor the sign of a whole block.

Source: Winkler, Webster, Vidaurre, Nichols and Smith (2015), NeuroImage 123, 253-268.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..design import DataError
from ..matrices import Design

KINDS = ("within", "whole", "flip")
MOST = 1 << 62
"""Rearrangements are counted up to this number."""
ALIKE = 0.9
"""Share of what is tested that an exchange must move to be chosen."""
UNMOVED = 1e-8
"""Share below which it moves nothing."""


class ExchangeError(DataError):
    """Rows of which none can be exchanged in the way that was asked for."""


class Rearrangement(NamedTuple):
    """What becomes of errors e: ``factor * e[take]``.

    Attributes:
        take: row that comes to each place, (n,); None if all stay.
        factor: what it is multiplied with, (n,); None for 1.
    """

    take: np.ndarray | None
    factor: np.ndarray | None

    def of(self, errors: np.ndarray) -> np.ndarray:
        """Return errors by row, (n, ...), rearranged."""
        moved = errors if self.take is None else errors[self.take]
        if self.factor is None:
            return moved
        return np.asarray(moved * self.factor.reshape(-1, *[1] * (errors.ndim - 1)))

    def back(self, columns: np.ndarray) -> np.ndarray:
        """Return columns c, (n, r), such that their products with e are those with ``of(e)``."""
        scaled = columns if self.factor is None else columns * self.factor[:, None]
        if self.take is None:
            return scaled
        found = np.empty_like(scaled)
        found[self.take] = scaled
        return found


def independent_blocks(design: Design) -> np.ndarray:
    """Return the independent block of each row, numbered from 0, (n,).

    Blocks have no group, nor related groups, in common.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    groupings = design.groupings
    if len(groupings) == 1 and groupings[0].root is None:
        return pd.factorize(groupings[0].codes)[0]
    starts = np.cumsum([0, *(len(g.levels) for g in groupings)])
    ends: list[tuple[np.ndarray, np.ndarray]] = []
    for grouping, start in zip(groupings, starts[:-1], strict=True):
        ends.append((groupings[0].codes, grouping.codes + start))
        if grouping.root is not None:
            row, column = np.nonzero(grouping.root)  # of a factor: it fills in no further
            ends.append((row + start, column + start))
    rows, columns = (np.concatenate(side) for side in zip(*ends, strict=True))
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(starts[-1], starts[-1]))
    component = connected_components(graph.tocsr(), directed=False)[1]
    return pd.factorize(component[groupings[0].codes])[0]


def _numbered(columns: Iterable[np.ndarray], n: int) -> np.ndarray:
    """Return the same number for rows that are equal in all columns, (n,)."""
    found = np.zeros(n, dtype=np.int64)
    for column in columns:
        codes = pd.factorize(column)[0]
        found = pd.factorize(found * (codes.max(initial=0) + 1) + codes)[0]
    return np.asarray(found, dtype=np.int64)


def _random_columns(design: Design) -> list[np.ndarray]:
    columns = [column for block in design.blocks for column in block.Z.T]
    return columns if design.weights is None else [*columns, design.weights]


def cells(design: Design) -> np.ndarray:
    """Return the cell of each row: rows of a cell are alike in all of the random part, (n,)."""
    codes = [grouping.codes for grouping in design.groupings]
    return _numbered([*codes, *_random_columns(design)], len(design.y))


@dataclass(frozen=True, eq=False)
class Blocks:
    """Independent blocks of rows, and which of them have equal designs.

    Attributes:
        order: rows sorted by block, and in each such that equal designs match, (n,).
        start: where each block begins in that order, (b,).
        size: number of its rows, (b,).
        kind: blocks of the same kind may be exchanged, (b,).
        element: what was said to be the block of each row, numbered as in the whole design, (b,).
    """

    order: np.ndarray
    start: np.ndarray
    size: np.ndarray
    kind: np.ndarray
    element: np.ndarray


def blocks_of(design: Design, element: np.ndarray) -> Blocks:
    """Compare the designs of blocks.

    Args:
        design: the design.
        element: the independent block of each row, (n,).
    """
    n = len(element)
    alike = _numbered(_random_columns(design), n)
    order = np.lexsort((alike, element))
    sorted_element = element[order]
    start = np.flatnonzero(np.r_[True, sorted_element[1:] != sorted_element[:-1]])
    size = np.diff(np.r_[start, n])
    own_start = np.repeat(start, size)
    features = [alike[order]]
    for grouping in design.groupings:
        codes = grouping.codes[order]
        # A group is named by where in its block it comes first.
        first = np.full(len(grouping.levels), n)
        np.minimum.at(first, codes, np.arange(n))
        features.append(first[codes] - own_start)
        if grouping.root is not None:
            # Blocks of several related levels count as unlike any other.
            variance = np.einsum("ij,ij->i", grouping.root, grouping.root)[codes]
            several = np.maximum.reduceat(features[-1], start) > 0
            features.append(np.round(variance, 12))
            features.append(np.repeat(np.where(several, np.arange(len(start)) + 1, 0), size))
    row = _numbered(features, n)
    kind, found = np.empty(len(start), dtype=np.int64), 0
    for length in np.unique(size):
        own = np.flatnonzero(size == length)
        rows = row[start[own][:, None] + np.arange(length)]
        kinds, which = np.unique(rows, axis=0, return_inverse=True)
        kind[own] = found + which.reshape(-1)
        found += len(kinds)
    return Blocks(order, start, size, kind, sorted_element[start])


@dataclass(frozen=True, eq=False)
class Exchange:
    """How the errors of a design are rearranged.

    Attributes:
        kind: "within" exchanges rows of a cell, "whole" blocks with equal designs, "flip" changes
            the signs of whole blocks.
        element: what is moved that each row belongs to, a row of its own or a block, (n,).
        among: elements with the same number may be exchanged; all the same for "flip", (e,).
        why: how the kind was chosen, for a reader.
    """

    kind: str
    element: np.ndarray
    among: np.ndarray
    why: str

    @cached_property
    def count(self) -> int:
        """Number of rearrangements, with the one that leaves all in place; at most `MOST`."""
        if self.kind == "flip":
            return min(2 ** min(len(self.among), 62), MOST)
        found = 1
        for size in np.bincount(self.among):
            found *= math.factorial(min(int(size), 20))
            if found >= MOST:
                return MOST
        return found

    def numbered(self, number: int) -> np.ndarray:
        """Return the key of each element in one of all rearrangements; number 0 moves nothing."""
        e = len(self.among)
        if self.kind == "flip":
            return np.array([-1.0 if number >> j & 1 else 1.0 for j in range(e)])
        keys = np.arange(e, dtype=float)
        for among in np.flatnonzero(np.bincount(self.among) > 1):
            left = np.flatnonzero(self.among == among).tolist()
            places = list(left)
            for place in places:
                number, at = divmod(number, len(left))
                keys[left.pop(at)] = place
        return keys

    def drawn(self, rng: np.random.Generator) -> np.ndarray:
        """Return the key of each element in a random rearrangement."""
        e = len(self.among)
        return rng.choice([-1.0, 1.0], size=e) if self.kind == "flip" else rng.random(e)

    def on(self, design: Design, rows: np.ndarray) -> ExchangeOn:
        """Return the same for some of the rows.

        Args:
            design: the design on these rows.
            rows: their positions, ascending.
        """
        element = self.element[rows]
        if self.kind == "within":
            return ExchangeOn(self.kind, element, self.among[element], None)
        return ExchangeOn(self.kind, element, self.among, blocks_of(design, element))


@dataclass(frozen=True, eq=False)
class ExchangeOn:
    """An exchange of some of the rows; those that are not there are passed over.

    Attributes:
        kind: as in `Exchange`.
        element: element of each row, (n,).
        cell: cell of each row for "within", (n,).
        blocks: for other kinds.
    """

    kind: str
    element: np.ndarray
    cell: np.ndarray
    blocks: Blocks | None

    def of(self, keys: np.ndarray) -> Rearrangement:
        """Return the rearrangement that has these keys."""
        if self.kind == "flip":
            return Rearrangement(None, keys[self.element])
        if self.blocks is None:
            take = np.empty(len(self.element), dtype=np.int64)
            take[self._by_cell] = np.lexsort((keys[self.element], self.cell))
            return Rearrangement(take, None)
        blocks = self.blocks
        place = np.argsort(blocks.kind, kind="stable")
        comes = np.lexsort((keys[blocks.element], blocks.kind))
        size = blocks.size[place]
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        take = np.empty(len(self.element), dtype=np.int64)
        take[blocks.order[np.repeat(blocks.start[place], size) + within]] = blocks.order[
            np.repeat(blocks.start[comes], size) + within
        ]
        return Rearrangement(take, None)

    @cached_property
    def _by_cell(self) -> np.ndarray:
        return np.argsort(self.cell, kind="stable")


def exchange_of(design: Design, asked: str, tested: np.ndarray) -> Exchange:
    """Return how errors are exchanged.

    Args:
        design: the design.
        asked: one of `KINDS`, or "auto".
        tested: what is tested of X, less what the reduced model explains of it, (n, r).

    Raises:
        ExchangeError: if nothing can be exchanged in that way, or that would change no statistic.
    """
    if asked not in ("auto", *KINDS):
        known = ", ".join(map(repr, ("auto", *KINDS)))
        raise ValueError(f"exchange={asked!r} is unknown; use one of {known}")
    n = len(design.y)
    if asked in ("auto", "within"):
        cell = cells(design)
        moved = _share_within(tested, cell)
        found = Exchange("within", np.arange(n), cell, "what is tested varies within groups")
        if asked == "within" or moved >= ALIKE:
            return _possible(found, asked, moved)
    element = independent_blocks(design)
    if asked in ("auto", "whole"):
        blocks = blocks_of(design, element)
        place = np.empty(n, dtype=np.int64)
        within = np.arange(n) - np.repeat(blocks.start, blocks.size)
        place[blocks.order] = np.repeat(blocks.kind, blocks.size) * n + within
        moved = _share_within(tested, pd.factorize(place)[0])
        why = "what is tested varies between groups with equal designs"
        found = Exchange("whole", element, blocks.kind, why)
        if asked == "whole" or moved >= ALIKE:
            return _possible(found, asked, moved)
    why = "what is tested does not only vary where rows or groups are exchangeable"
    signs = np.zeros(element.max() + 1, dtype=np.int64)
    return _possible(Exchange("flip", element, signs, why), asked, 1.0)


def check_blocks(element: np.ndarray) -> None:
    """Raise if all rows are one block."""
    if element.max(initial=0) == 0:
        raise ExchangeError(
            "the grouping factors are crossed, or all levels related, so that no rows are "
            "independent of the others; use method='parametric'"
        )


def _possible(found: Exchange, asked: str, moved: float) -> Exchange:
    """Return an exchange; raise if it does nothing.

    Args:
        found: the exchange.
        asked: what the user asked for.
        moved: share of what is tested that it moves.
    """
    remedy = "use exchange='flip', or method='parametric'"
    if found.kind == "flip":
        check_blocks(found.element)
    elif found.count == 1:
        what = {
            "within": "no two rows have the same groups and equal random-effects columns (and "
            "weights)",
            "whole": "no two independent groups have the same size and equal random-effects "
            "columns (and weights)",
        }[found.kind]
        raise ExchangeError(
            f"exchange={found.kind!r}: {what}, so nothing can be exchanged; {remedy}"
        )
    elif moved < UNMOVED:
        raise ExchangeError(
            f"exchange={found.kind!r}: what is tested is equal in all that is exchanged, so that "
            f"no statistic would change; {remedy}"
        )
    return found if asked == "auto" else replace(found, why="as asked for")


def _share_within(tested: np.ndarray, cell: np.ndarray) -> float:
    """Return the share of the sum of squares of columns that lies within cells."""
    count = np.bincount(cell)
    between = sum(float(np.sum(np.bincount(cell, column) ** 2 / count)) for column in tested.T)
    return 1.0 - between / float(np.sum(tested**2))
