"""Rows in the order of their groups, in tiles that stay in cache while they are summed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Tile(NamedTuple):
    """Rows that are summed together.

    Attributes:
        at: their positions in the order of the groups.
        rows: their positions in the data.
        groups: the groups that they belong to.
        group_size: rows of each group, if each is there as a whole with as many, and its sum is a
            plain one; else zero.
        to_sums: the groups' weighted sums of z times the rows, sparse.
    """

    at: slice
    rows: Any
    groups: slice
    group_size: int
    to_sums: Any


@dataclass(frozen=True, eq=False)
class GroupedRows:
    """Rows in the order of their groups.

    Attributes:
        order: their positions in the data; None if these have that order.
        codes: group of each, ascending, (n,).
        wz: weight times z of each, (n,).
        X: columns of X that were kept, (n, p).
        weights: prior weights, (n,), or None.
    """

    order: np.ndarray | None
    codes: np.ndarray
    wz: np.ndarray
    X: np.ndarray
    weights: np.ndarray | None
    _made: dict[int, list[Tile]] = field(default_factory=dict)

    def tiles(self, size: int) -> list[Tile]:
        """Return all rows in tiles of about `size`, of whole groups where these are smaller."""
        size = 1 << (size.bit_length() - 1)  # few sizes are kept
        if size not in self._made:
            self._made[size] = list(self._tiles(size))
        return self._made[size]

    def _tiles(self, size: int) -> Iterator[Tile]:
        from scipy.sparse import csr_array

        n, plain, first = len(self.codes), bool(np.all(self.wz == 1.0)), 0
        starts = np.append(np.flatnonzero(np.diff(self.codes, prepend=-1)), n)
        while first < n:
            last = min(first + size, n)
            whole = starts[np.searchsorted(starts, last, side="right") - 1]
            last = int(whole) if whole > first else last
            at = slice(first, last)
            inner = starts[slice(*np.searchsorted(starts, [first, last + 1]))]
            sizes = np.diff(inner)
            whole = len(inner) > 1 and inner[0] == first and inner[-1] == last
            low, high = int(self.codes[first]), int(self.codes[last - 1]) + 1
            equal = plain and whole and len(set(sizes.tolist())) == 1 and len(sizes) == high - low
            local = self.codes[at] - low
            yield Tile(
                at,
                at if self.order is None else self.order[at],
                slice(low, high),
                int(sizes[0]) if equal else 0,
                None
                if equal
                else csr_array(
                    (self.wz[at], (local, np.arange(last - first))),
                    shape=(high - low, last - first),
                ),
            )
            first = last


def as_range(positions: np.ndarray) -> np.ndarray | slice:
    """Return ascending positions as a slice, which copies nothing, if they are one."""
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions
