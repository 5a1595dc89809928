"""Variance components: matrices per group, and the same as one sparse design.

A component's columns multiply independent effects of one common variance.  Each group has columns
of its own, so that the effects of two groups are never the same, whatever the columns' names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from ..frames import DataError, real_numbers


class VCSpec:
    """The designs of variance components.

    Args:
        names: names of the components.
        colnames: ``colnames[k][i]`` names the columns of ``mats[k][i]``.
        mats: ``mats[k][i]`` is the design of component k in the i-th group, groups sorted: dense
            or SciPy sparse, a row for each of the group's rows.
    """

    def __init__(self, names: Any, colnames: Any, mats: Any) -> None:
        self.names = names
        self.colnames = colnames
        self.mats = mats


class FormulaVCSpec(VCSpec):
    """The designs of variance components that came from formulas; matrices made on demand."""

    def __init__(
        self,
        components: Sequence[Component],
        rows: Sequence[np.ndarray],
        columns: Sequence[Sequence[Sequence[str]]],
        sparse: bool,
    ) -> None:
        self.names = [component.name for component in components]
        self.colnames = columns
        self.components = tuple(components)
        self._rows = tuple(rows)
        self._sparse = sparse

    @cached_property
    def mats(self) -> list[list[Any]]:
        """Designs by component and group."""
        return [part.matrices(self._rows, self._sparse) for part in self.components]


@dataclass(frozen=True, eq=False)
class Component:
    """One component over all rows of the data.

    Attributes:
        name: its name.
        row: row of each entry that is not zero.
        effect: the effect that it multiplies, numbered group by group.
        value: the entry.
        first: number of the first effect of each group, and the number of effects, (m + 1,).
    """

    name: str
    row: np.ndarray
    effect: np.ndarray
    value: np.ndarray
    first: np.ndarray

    def matrices(self, rows: Sequence[np.ndarray], sparse: bool) -> list[Any]:
        """Return the design of each group, its rows (ascending) given."""
        from scipy.sparse import csr_array

        n = sum(map(len, rows))
        whole = csr_array((self.value, (self.row, self.effect)), shape=(n, int(self.first[-1])))
        parts = []
        for i, here in enumerate(rows):
            part = whole[here][:, int(self.first[i]) : int(self.first[i + 1])]
            parts.append(part if sparse else part.toarray())
        return parts


def from_matrices(
    name: str, mats: Sequence[Any], rows: Sequence[np.ndarray], labels: Sequence[Any]
) -> Component:
    """Read the designs of one component.

    Args:
        name: its name.
        mats: a design for each group.
        rows: rows of each group, in the order of those of its design.
        labels: labels of the groups, for messages.

    Raises:
        DataError: for a missing group, another number of rows, or a value that is not finite.
    """
    found_rows, found_effects, found_values, widths = [], [], [], []
    offset = 0
    for matrix, here, label in zip(
        checked_length(name, mats, len(rows)), rows, labels, strict=True
    ):
        i, j, values, shape = _entries(matrix)
        if shape[0] != len(here):
            raise DataError(
                f"exog_vc has {shape[0]} rows for the component {name!r} in group {label}, "
                f"which has {len(here)}"
            )
        found_rows.append(here[i])
        found_effects.append(j + offset)
        found_values.append(values)
        widths.append(shape[1])
        offset += shape[1]
    value = np.concatenate(found_values)
    if not np.isfinite(value).all():
        raise DataError(
            f"exog_vc has missing or infinite values in the component {name!r}; leave out the rows"
        )
    return Component(
        name,
        np.concatenate(found_rows),
        np.concatenate(found_effects),
        value,
        np.concatenate([[0], np.cumsum(widths)]).astype(np.int64),
    )


def checked_length(name: str, mats: Sequence[Any], m: int) -> Sequence[Any]:
    """Return the designs of a component if there is one for each of m groups."""
    if len(mats) != m:
        raise DataError(
            f"exog_vc has {len(mats)} designs for the component {name!r}, but there are {m} "
            "groups; give one for each group, in sorted order"
        )
    return mats


def _entries(matrix: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    """Return rows, columns and values of the entries that are not zero, and the shape."""
    if hasattr(matrix, "tocoo"):
        found = matrix.tocoo()
        return found.row, found.col, real_numbers(found.data, "a matrix of exog_vc"), matrix.shape
    dense = real_numbers(matrix, "a matrix of exog_vc")
    dense = dense[:, None] if dense.ndim == 1 else dense
    i, j = np.nonzero(dense)
    return i, j, dense[i, j], dense.shape


def from_mapping(exog_vc: Mapping[Any, Mapping[Any, Any]]) -> VCSpec:
    """Convert the older form, a matrix by name and group; names and groups are sorted."""
    groups = sorted({group for parts in exog_vc.values() for group in parts})
    names = sorted(exog_vc)
    columns, mats = [], []
    for name in names:
        missing = [group for group in groups if group not in exog_vc[name]]
        if missing:
            raise DataError(
                f"exog_vc[{name!r}] lacks the group {missing[0]!r}; give a matrix for each group"
            )
        parts = [exog_vc[name][group] for group in groups]
        columns.append([_column_names(part) for part in parts])
        mats.append(parts)
    return VCSpec(names, columns, mats)


def _column_names(matrix: Any) -> list[Any]:
    if isinstance(matrix, pd.DataFrame):
        return list(matrix.columns)
    return [str(j) for j in range(1 if np.ndim(matrix) == 1 else matrix.shape[1])]
