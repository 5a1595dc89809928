"""The rows of a sparse matrix, group by group: products that the crossed form needs.

A group of the head factor meets few levels of the other factors.  Its projected columns
``Y_i (q, N)`` are therefore zero but for some cells, and a sum over groups of ``Y_i' Y_i`` needs
the pairs of cells within a group only.  Where most cells are taken, one dense matrix product is
faster; both kinds have the same operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from ..linalg import solve_unit_lower


class Cells(Protocol):
    """Matrices ``Y_i (q, N)`` for the groups i of the head factor."""

    def whiten(self, L: Array, root: Array) -> Any:
        """Return ``root_i^-1 L_i^-1 Y_i`` for ``L (q, q, m)`` unit lower and ``root (q, m)``."""

    def multiply(self, A: Array) -> Any:
        """Return ``A_i Y_i`` for ``A (q, q, m)``."""

    def gram(self, a: int, b: int, dtype: Any = None) -> Array:
        """Return the symmetric part of ``sum_i Y_i[a]' Y_i[b]``, shape (N, N)."""

    def transposed(self, u: Array) -> Array:
        """Return ``sum_i Y_i' u_i``, shape (N, r), for ``u (q, r, m)``."""

    def apply(self, x: Array) -> Array:
        """Return ``Y_i x``, shape (q, r, m), for ``x (N, r)``."""

    def quadratic(self, G: Array) -> Array:
        """Return ``Y_i G Y_i'``, shape (q, q, m), for symmetric ``G (N, N)``."""

    def dense(self) -> Array:
        """Return all rows, effect by effect and group by group, shape (q m, N)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseCells:
    """Cells as lists.

    Attributes:
        value: entries, shape (q, c).
        head: group of each cell, (c,), integers.
        column: column of each cell, (c,), integers.
        first, second: the pairs of cells within a group, each once and with itself, (pairs,).
        n_groups: number of groups, m.
        n_columns: number of columns, N.
    """

    value: Any
    head: Any
    column: Any
    first: Any
    second: Any
    n_groups: int = field(metadata={"static": True})
    n_columns: int = field(metadata={"static": True})

    def whiten(self, L: Array, root: Array) -> SparseCells:
        """See :class:`Cells`."""
        head = jnp.asarray(self.head)
        white = solve_unit_lower(L[:, :, head], jnp.asarray(self.value)[:, None])[:, 0]
        return replace(self, value=white / root[:, head])

    def multiply(self, A: Array) -> SparseCells:
        """See :class:`Cells`."""
        at = A[:, :, jnp.asarray(self.head)]
        return replace(self, value=jnp.sum(at * jnp.asarray(self.value)[None], axis=1))

    def gram(self, a: int, b: int, dtype: Any = None) -> Array:
        """See :class:`Cells`."""
        first, second, n = jnp.asarray(self.first), jnp.asarray(self.second), self.n_columns
        x, y, column = jnp.asarray(self.value[a]), jnp.asarray(self.value[b]), self.column
        both = x[first] * y[second]
        if a != b:
            both = 0.5 * (both + y[first] * x[second])
        column = jnp.asarray(column)
        # A pair of a cell with itself is met twice below.
        both = jnp.where(first == second, 0.5 * both, both).astype(dtype or both.dtype)
        i, j = column[first], column[second]
        half = jnp.zeros(n * n, both.dtype).at[i * n + j].add(both)
        if n * n > 4 * len(first):
            # The transpose of a large matrix costs more than a few pairs.
            return half.at[j * n + i].add(both).reshape(n, n)
        half = half.reshape(n, n)
        return half + half.T

    def transposed(self, u: Array) -> Array:
        """See :class:`Cells`."""
        total = jnp.zeros((self.n_columns, u.shape[1]), u.dtype)
        head, column = jnp.asarray(self.head), jnp.asarray(self.column)
        # One term of the sum over q at a time, (c, r), keeps the intermediate small.
        for value, part in zip(self.value, u, strict=True):
            total = total.at[column].add(value[:, None] * part.T[head])
        return total

    def apply(self, x: Array) -> Array:
        """See :class:`Cells`."""
        at = x[jnp.asarray(self.column)]
        rows = [
            jnp.zeros((self.n_groups, x.shape[1]), x.dtype)
            .at[jnp.asarray(self.head)]
            .add(value[:, None] * at)
            for value in self.value
        ]
        return jnp.stack([row.T for row in rows])

    def quadratic(self, G: Array) -> Array:
        """See :class:`Cells`."""
        first, second = jnp.asarray(self.first), jnp.asarray(self.second)
        column, q = jnp.asarray(self.column), len(self.value)
        g = G[column[first], column[second]]
        g = jnp.where(first == second, 0.5 * g, g)
        group = jnp.asarray(self.head)[first]
        zero = jnp.zeros(self.n_groups, G.dtype)
        rows: list[list[Any]] = [[None] * q for _ in range(q)]
        for a in range(q):
            for b in range(a + 1):
                x, y = jnp.asarray(self.value[a]), jnp.asarray(self.value[b])
                both = x[first] * y[second] + y[first] * x[second]
                rows[a][b] = rows[b][a] = zero.at[group].add(g * both)
        return jnp.stack([jnp.stack(row) for row in rows])

    def dense(self) -> Array:
        """See :class:`Cells`."""
        value, m, n = jnp.asarray(self.value), self.n_groups, self.n_columns
        head, column = jnp.asarray(self.head), jnp.asarray(self.column)
        whole = jnp.zeros((len(value), m, n), value.dtype).at[:, head, column].add(value)
        return whole.reshape(-1, n)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseCells:
    """Cells as one array.

    Attributes:
        value: entries, shape (q, m, N).
    """

    value: Any

    def whiten(self, L: Array, root: Array) -> DenseCells:
        """See :class:`Cells`."""
        white = solve_unit_lower(L[..., None], jnp.asarray(self.value)[:, None])[:, 0]
        return DenseCells(white / root[..., None])

    def multiply(self, A: Array) -> DenseCells:
        """See :class:`Cells`."""
        return DenseCells(jnp.sum(A[..., None] * jnp.asarray(self.value)[None], axis=1))

    def gram(self, a: int, b: int, dtype: Any = None) -> Array:
        """See :class:`Cells`."""
        value = jnp.asarray(self.value, dtype)
        product = value[a].T @ value[b]
        return product if a == b else 0.5 * (product + product.T)

    def transposed(self, u: Array) -> Array:
        """See :class:`Cells`."""
        return jnp.einsum("amn,arm->nr", self.value, u)

    def apply(self, x: Array) -> Array:
        """See :class:`Cells`."""
        return jnp.stack([(jnp.asarray(value) @ x).T for value in self.value])

    def quadratic(self, G: Array) -> Array:
        """See :class:`Cells`."""
        rotated = [jnp.asarray(value) @ G for value in self.value]
        return jnp.stack(
            [jnp.stack([jnp.sum(x * value, axis=1) for value in self.value]) for x in rotated]
        )

    def dense(self) -> Array:
        """See :class:`Cells`."""
        value = jnp.asarray(self.value)
        return value.reshape(-1, value.shape[2])
