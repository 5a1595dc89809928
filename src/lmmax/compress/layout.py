"""What compressing needs to know of the designs, and which form of the likelihood they call for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import NamedTuple, get_args

import numpy as np

from ..characters import Visible, visible
from ..options import EngineName, choose
from .columns import Dependence, Factor, column_factor, dependence, random_factor
from .rows import SMALLEST_BUCKET

ENGINES: tuple[str, ...] = get_args(EngineName)
DENSE_TAIL_LIMIT = 20_000
"""Most random effects beside the largest factor for which a dense factor is made by default."""
MOST_NESTED = 10_000_000
"""Most entries of the cross-products of ``[Z X y]`` that nested factors need for each group of the
second level: with hundreds of fixed effects a dense factor of these groups takes less."""
COPIES = 9
"""Arrays of the tail's size squared that live at once in an evaluation."""


class EngineError(Visible, ValueError):
    """A form of the likelihood that does not fit the structure of the model, or the machine."""


class Engine(NamedTuple):
    """The form of the likelihood that serves a model, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return visible(f"{self.name} ({self.reason})")


@dataclass(frozen=True)
class FactorColumns:
    """A grouping factor with the columns of its random terms.

    Attributes:
        name: name of the factor.
        codes: group of each row, integers from 0 to n_groups - 1, shape (n,).
        n_groups: number of groups, m.
        blocks: per random term its columns, each of shape (n, q_t).
        mix: per random term whether its columns may be mixed (all covariances are free).
        root: factor (m, m) of a relationship matrix between the groups, or None.
    """

    name: str
    codes: np.ndarray
    n_groups: int
    blocks: tuple[np.ndarray, ...]
    mix: tuple[bool, ...]
    root: np.ndarray | None = None

    @property
    def n_effects(self) -> int:
        """Number of random effects of one group."""
        return sum(block.shape[1] for block in self.blocks)


@dataclass(frozen=True)
class Layout:
    """The designs, analysed once; it serves any number of responses.

    Attributes:
        X: fixed-effects design, (n, p_all).
        factors: the grouping factors, in the order of their columns in D.
        fixed: independent columns of X and their triangular factor.
        A: block-diagonal factor of the random-effects columns, (q, q).
        weights: prior weights of the rows in the data's order, (n,), or None.
        engine: the form of the likelihood.
        chain: positions of the factors in the order of their elimination.
        n_zero: number of further rows, which are zero throughout.
        log_rooted: sum of the logarithms of weights that the rows were multiplied by the root of.
    """

    X: np.ndarray
    factors: tuple[FactorColumns, ...]
    fixed: Factor
    A: np.ndarray
    weights: np.ndarray | None
    engine: Engine
    chain: tuple[int, ...]
    n_zero: int = 0
    log_rooted: float = 0.0

    @property
    def n_obs(self) -> int:
        """Number of observations, n."""
        return len(self.X) + self.n_zero

    @cached_property
    def log_weights(self) -> float:
        """Sum of the logarithms of the prior weights."""
        own = 0.0 if self.weights is None else float(np.sum(np.log(self.weights)))
        return self.log_rooted + own

    @cached_property
    def dependence(self) -> Dependence:
        """How the aliased columns of X follow from those that were kept."""
        return dependence(self.X, self.fixed, self.weights)

    @cached_property
    def A_inverse(self) -> np.ndarray:
        """``A^-1``."""
        return np.linalg.inv(self.A)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Columns of D that belong to each factor."""
        ends = np.cumsum([factor.n_effects for factor in self.factors]).tolist()
        return tuple(slice(a, b) for a, b in zip([0, *ends], ends, strict=False))

    @cached_property
    def n_groups(self) -> np.ndarray:
        """Number of groups that each random effect has, (q,)."""
        return np.concatenate(
            [np.full(factor.n_effects, float(factor.n_groups)) for factor in self.factors]
        )

    @cached_property
    def order(self) -> np.ndarray | None:
        """Positions of the rows sorted by the first factor of the chain, None if in order."""
        codes = self.factors[self.chain[0]].codes
        return None if np.all(codes[1:] >= codes[:-1]) else np.argsort(codes, kind="stable")

    @cached_property
    def sizes(self) -> tuple[np.ndarray, ...]:
        """Number of rows of each group, per factor."""
        return tuple(
            np.bincount(factor.codes, minlength=factor.n_groups) for factor in self.factors
        )

    def random_columns(self, factor: int, take: slice | np.ndarray) -> np.ndarray:
        """Working columns of a factor, unweighted, for some rows, (q_f, rows)."""
        here = self.slices[factor]
        Z = np.concatenate([block[take].T for block in self.factors[factor].blocks])
        return np.asarray(self.A_inverse[here, here].T @ Z)

    def response(self, y: np.ndarray, beta: np.ndarray, take: slice | np.ndarray) -> np.ndarray:
        """Working ``[X, y - X beta]``, unweighted, for some rows, (p + 1, rows)."""
        kept = self.fixed.kept
        X = self.X[take]
        if len(kept) < X.shape[1]:
            X = X[:, kept]
        data = np.empty((len(kept) + 1, len(X)))
        data[:-1] = self.fixed.inverse.T @ X.T
        data[-1] = y[take] - beta @ data[:-1]
        return data

    def least_squares(self, y: np.ndarray) -> np.ndarray:
        """Weighted least-squares coefficients of y in working coordinates, (p,)."""
        weighted = y if self.weights is None else y * self.weights
        return np.asarray(self.fixed.inverse.T @ (self.X.T @ weighted)[self.fixed.kept])


def layout(
    X: np.ndarray,
    factors: Sequence[FactorColumns],
    weights: np.ndarray | None = None,
    engine: str = "auto",
    *,
    n_zero: int = 0,
    log_rooted: float = 0.0,
) -> Layout:
    """Analyse the designs once.

    Args:
        X: fixed-effects design, shape (n, p).
        factors: grouping factors with their columns.
        weights: prior weights (inverse variances), shape (n,).
        engine: one of ``ENGINES``.
        n_zero: number of further rows, which are zero throughout.
        log_rooted: sum of the logarithms of weights that the rows were multiplied by the root of.

    Raises:
        EngineError: if the engine asked for does not fit the structure.
    """
    factors = tuple(factors)
    chosen, chain = choose_engine(factors, engine, X.shape[1])
    q = sum(factor.n_effects for factor in factors)
    A, at = np.zeros((q, q)), 0
    for factor in factors:
        here = slice(at, at + factor.n_effects)
        A[here, here] = random_factor(factor.blocks, factor.mix, weights, len(X) + n_zero)
        at = here.stop
    fixed = column_factor(X, weights)
    return Layout(X, factors, fixed, A, weights, chosen, chain, n_zero, log_rooted)


def turned(layout: Layout, turn: np.ndarray) -> Layout:
    """Return the layout with working columns ``Z_working turn``, turn orthogonal, (q, q)."""
    return replace(layout, A=turn.T @ layout.A)


def choose_engine(
    factors: tuple[FactorColumns, ...], asked: str = "auto", n_fixed: int = 0
) -> tuple[Engine, tuple[int, ...]]:
    """Return the form of the likelihood for a structure, and the order of elimination.

    Args:
        factors: the grouping factors.
        asked: one of ``ENGINES``.
        n_fixed: number of columns of X.
    """
    asked = choose("engine", asked, ENGINES, error=EngineError)
    # Largest first; among equals the one with more columns, so that the tail is small.
    by_size = sorted(range(len(factors)), key=lambda i: -factors[i].n_groups * factors[i].n_effects)
    related = [factor.name for factor in factors if factor.root is not None]
    chain = tuple(sorted(by_size, key=lambda i: -factors[i].n_groups))
    nested = not related and all(
        parent_codes(factors[a], factors[b]) is not None for a, b in pairwise(chain)
    )
    names = [factor.name for factor in factors]
    if len(factors) == 1 and not related and asked in ("auto", "grouped"):
        return Engine("grouped", f"one grouping factor, {names[0]}"), chain
    if asked == "grouped":
        raise EngineError(
            "engine='grouped' needs one grouping factor with independent levels; this model has "
            f"{_named(factors)}"
        )
    if nested and asked == "auto" and len(factors) > 1:
        upper = [factors[i] for i in chain[1:]]
        width = sum(factor.n_effects for factor in upper) + n_fixed + 1
        entries = width**2 * max(upper[0].n_groups, SMALLEST_BUCKET)
        dense = COPIES * sum(factor.n_groups * factor.n_effects for factor in upper) ** 2
        nested = entries <= max(MOST_NESTED, dense)
    if nested and asked in ("auto", "nested") and len(factors) > 1:
        steps = " in ".join(names[i] for i in chain)
        return Engine("nested", f"{steps}, level by level"), chain
    if asked == "nested":
        raise EngineError(
            "engine='nested' needs two or more factors, each nested in the next, with independent "
            f"levels; this model has {_named(factors)}"
        )
    if len(factors) == 1 and (asked == "iterative" or not related):
        raise EngineError(
            f"engine={asked!r} is for several grouping factors; this model has one, {names[0]}"
        )
    order = tuple([i for i in by_size if factors[i].root is None][:1])
    order += tuple(i for i in by_size if i not in order)
    headless = factors[order[0]].root is not None
    tail = sum(factors[i].n_groups * factors[i].n_effects for i in order[0 if headless else 1 :])
    limit = dense_tail_limit()
    if asked == "iterative" or (asked == "auto" and tail > limit and not related):
        why = (
            f"{tail} effects beside {names[order[0]]}, more than a dense factor should hold here, "
            f"{limit}"
        )
        if related:
            raise EngineError(
                f"engine='iterative' does not take relationship matrices (of {', '.join(related)})"
            )
        return Engine("iterative", why if tail > limit else "as asked for"), order
    if headless:
        return Engine("crossed", f"a dense factor for the {tail} related effects"), order
    why = f"{names[order[0]]} eliminated first, a dense factor for the other {tail} effects"
    return Engine("crossed", why), order


def _named(factors: Sequence[FactorColumns]) -> str:
    """Return the factors by name, and which have related levels."""
    return ", ".join(
        factor.name + (" (with a relationship matrix)" if factor.root is not None else "")
        for factor in factors
    )


def dense_tail_limit() -> int:
    """Return the most effects of the tail that a dense factor should hold on this machine."""
    fitting = np.sqrt(0.8 * memory() / (COPIES * 8.0))
    return int(min(DENSE_TAIL_LIMIT, fitting))


@cache
def memory() -> float:
    """Return the physical memory in bytes, infinite where it is unknown."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def parent_codes(fine: FactorColumns, coarse: FactorColumns) -> np.ndarray | None:
    """Return the coarse group of each fine group, or None if a fine group lies in several."""
    parent = np.zeros(fine.n_groups, dtype=coarse.codes.dtype)
    parent[fine.codes] = coarse.codes
    return parent if np.array_equal(parent[fine.codes], coarse.codes) else None
