"""What estimation sees of a model and its data: matrices, names and groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd

from .characters import visible
from .covariances import Covariance
from .frames import DataError, check_finite, listing, plural, row_text
from .levels import Grouping
from .spec import ModelSpec, RandomTerm
from .terms import CodedTerms

__all__ = ["Design", "NewDesign", "RandomBlock"]


@dataclass(frozen=True, eq=False)
class RandomBlock:
    """The columns of one random term.

    Args:
        term: the term as asked for.
        grouping: position of its grouping factor in `Design.groupings`.
        Z: (n, q) float64, the effects' columns per row (no group indicators).
        names: (q,) names of the effects.
        covariance: the structure of the effects' covariance, ready for these effects.
        terms: the terms that the columns belong to.
    """

    term: RandomTerm
    grouping: int
    Z: np.ndarray
    names: tuple[str, ...]
    covariance: Covariance
    terms: CodedTerms


@dataclass(frozen=True, eq=False)
class NewDesign:
    """The design of a fitted model applied to new rows.

    Args:
        X: (n, p) float64; NaN in rows marked `missing`.
        Z: one (n, q) array per random term, None for a term whose group was not asked for; empty
            if no groups were.
        codes: one (n,) int64 array per grouping factor, -1 for a level that was not in the data
            of the fit or is missing; None for a factor that was not asked for, empty if no groups
            were.
        offset: (n,) or None; NaN in rows marked `missing`.
        index: (n,) row labels.
        missing: (n,) bool, rows that lack a value needed for a prediction.
    """

    X: np.ndarray
    Z: tuple[np.ndarray | None, ...]
    codes: tuple[np.ndarray | None, ...]
    offset: np.ndarray | None
    index: pd.Index
    missing: np.ndarray


class Recipe(Protocol):
    """How a design was made, with all that was learnt from the data, to be applied to new rows."""

    def apply(self, data: Any, asked: Sequence[bool], offset: Any) -> NewDesign:
        """See `Design.new_data`; `asked` has a value per grouping factor, or is empty."""

    def safely(self) -> Recipe:
        """Return the recipe with expressions that are read without running any code.

        Itself where it has none.
        """
        return self


@dataclass(frozen=True, eq=False)
class Design:
    """Matrices, names and groups of one model, rows with missing values left out.

    Args:
        spec: the model.
        response_name: name of the response.
        y: (n,) float64 response.
        X: (n, p) float64 fixed-effects design.
        x_names: (p,) names of its columns.
        terms: the terms that the columns belong to.
        blocks: one `RandomBlock` per random term, in the order of the formula.
        groupings: the grouping factors; terms with the same group share one.
        weights: (n,) positive prior weights, or None.
        offset: (n,) sum of all offsets, or None.
        index: (n,) labels of the rows used: pandas index of the data, else row numbers from 0.
        n_dropped: number of rows left out.
        dropped_by: number of missing values by column, or by term where a transform made them.
        n_zero: number of further rows that are zero throughout: a rotation of the rows left them
            so, and they count as observations only.
        log_weights: sum of the logarithms of weights that the rows were multiplied by the root of.
    """

    spec: ModelSpec
    response_name: str
    y: np.ndarray
    X: np.ndarray
    x_names: tuple[str, ...]
    terms: CodedTerms
    blocks: tuple[RandomBlock, ...]
    groupings: tuple[Grouping, ...]
    weights: np.ndarray | None
    offset: np.ndarray | None
    index: pd.Index
    n_dropped: int
    dropped_by: dict[str, int]
    _recipe: Recipe
    n_zero: int = 0
    log_weights: float = 0.0

    def new_data(
        self, data: Any, *, need_groups: bool | Collection[str] = True, offset: Any = None
    ) -> NewDesign:
        """Apply the same formula, with all it learnt from the data, to new rows.

        Args:
            data: as in `build_design`; the response is not needed. For a design made by
                `design_from_arrays`, a mapping with `"X"`, and `"groups"`, `"Z"` where needed: an
                array each, or mappings by grouping factor if that is what they were.
            need_groups: whether random-effects columns and group codes are wanted; if not, their
                columns may be absent. Names of grouping factors ask for the terms of those only.
            offset: (n,) array or column name; needed if the fit had an offset given as an array.

        Returns:
            The matrices, all rows kept: rows with missing values are NaN and marked.

        Raises:
            DataError: for an absent column, an unseen level of a factor in the design (an unseen
                group is code -1 instead), a value that is infinite, or a name in `need_groups`
                that is no grouping factor.

        Example:
            >>> from lmmax.design import build_design
            >>> data = {"y": [1.0, 2.0, 4.0, 3.0], "x": [1, 2, 3, 4], "g": ["a", "a", "b", "b"]}
            >>> design = build_design("y ~ x + (1 | g)", data)
            >>> new = design.new_data({"x": [5, 6], "g": ["b", "c"]})
            >>> new.X.tolist(), new.codes[0].tolist()
            ([[1.0, 5.0], [1.0, 6.0]], [1, -1])
        """
        return self._recipe.apply(data, self._asked(need_groups), offset)

    def safely(self) -> Design:
        """Return the design with a formula that new data are read by without running any code."""
        spec = replace(self.spec, evaluate="safe")
        return replace(self, spec=spec, _recipe=self._recipe.safely())

    def _asked(self, need_groups: bool | Collection[str]) -> tuple[bool, ...]:
        """Whether each grouping factor is asked for; empty if groups are not asked for at all."""
        if isinstance(need_groups, bool):
            return (True,) * len(self.groupings) if need_groups else ()
        asked = {need_groups} if isinstance(need_groups, str) else set(need_groups)
        names = [grouping.name for grouping in self.groupings]
        unknown = sorted(map(str, asked.difference(names)))
        if unknown:
            raise DataError(
                f"need_groups has the name {unknown[0]!r}, which is no grouping factor of the "
                f"model; its grouping factors: {listing(map(repr, names)) or 'none'}"
            )
        return tuple(name in asked for name in names)

    def __repr__(self) -> str:
        groups = [f"{plural(len(g.levels), 'group')} of {g.name}" for g in self.groupings]
        sizes = [f"{plural(len(self.y), 'row')}, {plural(len(self.x_names), 'fixed effect')}"]
        return visible(f"Design({self.spec.formula!r}: {', '.join(sizes + groups)})")


def lone_group(groupings: Sequence[Grouping], blocks: Sequence[RandomBlock]) -> Grouping | None:
    """The first factor with one level whose terms need several; None if there is no such factor.

    A term with a variance for each effect needs groups to estimate it from. Where effects share
    one, as those of a time series do, they may be enough by themselves.
    """
    for i, grouping in enumerate(groupings):
        own = [block for block in blocks if block.grouping == i]
        alone = len(grouping.levels) < 2 or bool((grouping.codes == grouping.codes[0]).all())
        if alone and any(
            sum(block.covariance.is_sd(q)) >= q
            for block, q in zip(own, [block.Z.shape[1] for block in own], strict=True)
        ):
            return grouping
    return None


def check_groups(groupings: Sequence[Grouping], blocks: Sequence[RandomBlock]) -> None:
    """Raise for a factor with one level whose terms need several."""
    grouping = lone_group(groupings, blocks)
    if grouping is not None:
        terms = [block.term for block in blocks if groupings[block.grouping] is grouping]
        raise DataError(
            f"the grouping factor {grouping.name!r} has one level, {str(grouping.levels[0])!r}: "
            "the variance of random effects cannot be estimated from one group; leave out "
            f"{listing(terms)}"
        )


def check_unique(names: Iterable[str], what: str) -> None:
    """Raise for column names that come twice."""
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise DataError(f"{what} has several columns named {listing(map(repr, repeated))}")


def check_matrix(matrix: np.ndarray, names: Iterable[str], index: pd.Index) -> None:
    """Raise for an infinite value, naming its column."""
    for name, column in zip(names, matrix.T, strict=True):
        check_finite(name, column, index)


# Squares of numbers beyond these, and sums of so many, leave double precision.
_SMALLEST, _LARGEST = 1e-152, 1e152
# A response is divided by its size before it is squared, but not much before.
_SMALLEST_RESPONSE = 1e-160


def check_range(
    matrix: np.ndarray, names: Sequence[str], where: str = "", smallest: float = _SMALLEST
) -> None:
    """Raise for a column whose unit is such that squares of its values are no numbers.

    Args:
        matrix: (n, p).
        names: (p,) of its columns.
        where: what they are part of, for messages.
        smallest: the least size of the largest value.
    """
    if not len(matrix):
        return
    size = np.maximum(matrix.max(axis=0, initial=0.0), -matrix.min(axis=0, initial=0.0))
    for name, largest in zip(names, size, strict=True):
        if 0.0 < largest < smallest or _LARGEST < largest < np.inf:
            raise DataError(
                f"the largest value of {name!r}{where} is {largest:.3g}, whose square is beyond "
                "double precision: use another unit, for instance divide by that number"
            )


def check_response(name: str, y: np.ndarray, index: pd.Index) -> None:
    """Raise for a response that is infinite or constant, or in an impossible unit."""
    check_finite(name, y, index)
    check_range(y[:, None], [name], smallest=_SMALLEST_RESPONSE)
    if y.min() == y.max():
        raise DataError(
            f"response {name!r} is constant (every value is {y[0]:g}): there is nothing to explain"
        )


def prior_weights(weights: np.ndarray, index: pd.Index) -> np.ndarray:
    """A copy of weights without missing values, checked to be positive."""
    if not (weights > 0).all():
        at = int(np.argmin(weights > 0))
        hint = "" if weights[at] else ": remove rows of weight zero, they say nothing"
        raise DataError(
            f"weights must be positive, but the weight of {row_text(index, at)} is "
            f"{weights[at]:g}{hint}"
        )
    return np.array(weights)


def needed_offset(learnt: str | bool | None, given: Any) -> Any:
    """The offset for new rows: as given, else the column that it was in the fit.

    Args:
        learnt: the name of that column, True if the offset was an array, None without offset.
        given: array, column name or None.
    """
    if given is None and learnt is True:
        raise DataError("the model was fitted with an offset: pass offset= for the new rows")
    return learnt if given is None else given
