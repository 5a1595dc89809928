"""A model of statsmodels as a design of lmmax.

The random effects of a group are a random term on the grouping factor.  A component of which each
row sees one column only, such as indicators of sub-groups, is a term on a factor of its own, whose
levels are the columns of all groups; any other component is a term on the grouping factor, whose
effects share one variance.  So are those of the first kind where they are neither nested nor wide:
group by group is faster than a matrix of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from ..arrays import plain_names, quote
from ..covariances import Covariance, covariance
from ..design import build_design
from ..formula import FormulaError
from ..frames import DataError
from ..levels import Grouping
from ..matrices import Design, NewDesign, RandomBlock, Recipe, check_response
from ..spec import ModelSpec, RandomTerm
from ..terms import plain_terms
from .components import Component
from .formulas import only_factor

if TYPE_CHECKING:
    from .model import MixedLM


WIDE = 10
"""Most effects of one group that are taken together rather than as crossed factors."""


class Effects(NamedTuple):
    """Where the effects of a component are.

    Attributes:
        block: position of its random term.
        level: level of each effect's grouping factor; -1 for one that no row sees.
        column: its column among those of the term.
    """

    block: int
    level: np.ndarray
    column: np.ndarray


@dataclass(frozen=True, eq=False)
class Translation:
    """The design, and where the parts of the model are in it.

    Attributes:
        design: the design.
        components: the effects of each component.
    """

    design: Design
    components: tuple[Effects, ...]


class Groups(NamedTuple):
    """The grouping of the rows.

    Attributes:
        name: its name.
        codes: group of each row, (n,).
        labels: the groups' labels, (m,).
    """

    name: str
    codes: np.ndarray
    labels: Sequence[Any]


@dataclass(frozen=True)
class _NoNewRows(Recipe):
    """Stands for how a design is applied to new rows, which these cannot be."""

    def apply(self, data: Any, asked: Sequence[bool], offset: Any) -> NewDesign:
        """See `Design.new_data`."""
        raise DataError(
            "the native fit of this model was made from matrices and cannot make those of new "
            "rows: use predict(exog=...) of the results, or lmmax.fit with a formula"
        )


def translate(
    endog: np.ndarray,
    exog: np.ndarray,
    exog_names: Sequence[str],
    endog_name: str,
    groups: Groups,
    exog_re: np.ndarray | None,
    re_names: Sequence[str],
    components: Sequence[Component],
    structures: Sequence[str | Covariance | None] | None = None,
    offset: np.ndarray | None = None,
) -> Translation:
    """Translate a model.

    Args:
        endog: response, (n,).
        exog: fixed-effects design, (n, p).
        exog_names: names of its columns.
        endog_name: name of the response.
        groups: the groups.
        exog_re: random-effects design, (n, q), or None.
        re_names: names of its columns.
        components: the variance components.
        structures: covariance of the random effects (where there are any) and of each component;
            None for the ordinary one.
        offset: known part of the mean, (n,).

    Raises:
        DataError: for a response that is constant or infinite, and the like.
    """
    groupings: list[Grouping] = []
    random: list[RandomTerm] = []
    parts: list[tuple[int, np.ndarray, tuple[str, ...], str | Covariance]] = []
    texts: list[str] = []

    def factor(name: str, codes: np.ndarray, labels: Any) -> int:
        for position, known in enumerate(groupings):
            if known.codes is codes or np.array_equal(known.codes, codes):
                return position
        taken = {known.name for known in groupings}
        while name in taken:
            name += "_"
        texts.append(":".join(quote(part) for part in name.split(":")))
        groupings.append(Grouping(name, codes, pd.Index(labels)))
        return len(groupings) - 1

    def add(position: int, Z: np.ndarray, names: Sequence[str], own: str | Covariance) -> None:
        effects = ("Intercept",) if Z.shape[1] == 1 and (Z == 1.0).all() else tuple(names)
        random.append(RandomTerm(plain_names(effects), texts[position], own))
        parts.append((position, Z, effects, own))

    asked = list(structures or [])
    if exog_re is not None:
        own = asked.pop(0) if asked else None
        position = factor(groups.name, groups.codes, groups.labels)
        add(position, np.array(exog_re, order="F"), re_names, "us" if own is None else own)
    places = []
    first, q = len(parts), sum(Z.shape[1] for _, Z, *_ in parts)
    arranged = _arrange_all(components, groups, first, len(endog), q)
    for number, component in enumerate(components):
        own = asked[number] if asked else None
        codes, Z, effects, labels = arranged[number]
        if labels is None:
            position = factor(groups.name, groups.codes, groups.labels)
        else:
            position = factor(f"{groups.name}:{component.name}", codes, labels)
        names = [component.name]
        if Z.shape[1] > 1:
            names = [f"{component.name}[{j}]" for j in range(Z.shape[1])]
        ordinary = covariance("diag", hom=True) if Z.shape[1] > 1 else "us"
        add(position, Z, names, ordinary if own is None else own)
        places.append(effects)

    index = pd.RangeIndex(len(endog))
    check_response(endog_name, endog, index)
    X = np.array(exog, dtype=float, order="F")
    x_names = tuple(map(str, exog_names))
    design = Design(
        spec=ModelSpec(quote(endog_name), plain_names(x_names), tuple(random)),
        response_name=endog_name,
        y=np.array(endog, dtype=float),
        X=X,
        x_names=x_names,
        terms=plain_terms(x_names, X),
        blocks=tuple(
            RandomBlock(term, position, Z, effects, covariance(own), plain_terms(effects, Z))
            for term, (position, Z, effects, own) in zip(random, parts, strict=True)
        ),
        groupings=tuple(groupings),
        weights=None,
        offset=offset,
        index=index,
        n_dropped=0,
        dropped_by={},
        _recipe=_NoNewRows(),
    )
    return Translation(design, tuple(places))


_Arranged = tuple[np.ndarray, np.ndarray, Effects, np.ndarray | None]


def _arrange_all(
    components: Sequence[Component], groups: Groups, first: int, n: int, q: int
) -> list[_Arranged]:
    """Arrange the components, the first of which is random term number `first`.

    Args:
        components: the components.
        groups: the groups.
        first: number of random terms before them.
        n: number of rows.
        q: number of effects that these have.
    """
    found = [_arrange(part, groups, first + k, n, False) for k, part in enumerate(components)]
    m = len(groups.labels)
    own = [(codes, len(labels)) for codes, _, _, labels in found if labels is not None]
    chain = sorted(own, key=lambda factor: -factor[1])
    nested = all(
        _nested(fine, m_fine, coarse)
        for (fine, m_fine), (coarse, _) in pairwise([*chain, (groups.codes, m)])
    )
    width = q + sum(int(np.diff(part.first).max()) for part in components)
    if nested or m == 1 or width > WIDE:
        return found
    return [_arrange(part, groups, first + k, n, True) for k, part in enumerate(components)]


def _nested(fine: np.ndarray, m_fine: int, coarse: np.ndarray) -> bool:
    """Say whether each level of a factor lies in one level of another."""
    owner = np.zeros(m_fine, dtype=coarse.dtype)
    owner[fine] = coarse
    return np.array_equal(owner[fine], coarse)


def _arrange(component: Component, groups: Groups, block: int, n: int, wide: bool) -> _Arranged:
    """Return codes, columns (n, w), effects, and labels of a factor of its own (or None).

    Args:
        component: the component.
        groups: the groups.
        block: number of its random term.
        n: number of rows.
        wide: take its effects as those of the groups.
    """
    if not len(component.value):
        raise DataError(
            f"the variance component {component.name!r} is zero in every row, so its variance "
            "cannot be estimated; leave it out"
        )
    m, total = len(groups.labels), int(component.first[-1])
    group_of = np.repeat(np.arange(m), np.diff(component.first))
    used = np.zeros(total, dtype=bool)
    used[component.effect] = True
    level = np.full(total, -1)
    column = np.zeros(total, dtype=int)
    if np.bincount(group_of[used], minlength=m).max() == 1:
        level[used] = group_of[used]
        Z = np.zeros((n, 1))
        Z[component.row, 0] = component.value
        return groups.codes, Z, Effects(block, level, column), None
    if wide or np.bincount(component.row, minlength=n).max() > 1:
        # Columns that no row of any group sees are nowhere.
        local = component.effect - component.first[groups.codes[component.row]]
        kept, place = np.unique(local, return_inverse=True)
        Z = np.zeros((n, len(kept)), order="F")
        Z[component.row, place] = component.value
        own = np.flatnonzero(used)
        level[own] = group_of[own]
        column[own] = np.searchsorted(kept, own - component.first[group_of[own]])
        return groups.codes, Z, Effects(block, level, column), None
    # Rows that see no column belong to the first level of their group, with a column of zero.
    own = np.flatnonzero(used)
    first = np.full(m, -1)
    first[group_of[own[::-1]]] = own[::-1]
    empty = np.flatnonzero(first < 0)
    first[empty] = total + np.arange(len(empty))
    of_row = first[groups.codes]
    of_row[component.row] = component.effect
    Z = np.zeros((n, 1))
    Z[component.row, 0] = component.value
    levels, codes = np.unique(of_row, return_inverse=True)
    seen = levels < total
    level[levels[seen]] = np.flatnonzero(seen)
    labels = np.arange(len(levels))
    return codes.astype(np.int64), Z, Effects(block, level, column), labels


def native_design(model: MixedLM, design: Design) -> Design | None:
    """Return the same design as lmmax makes it from a formula, None if there is no such formula.

    Args:
        model: a model, from formulas or not.
        design: its design.
    """
    asked = getattr(model, "_formulas", None)
    frame = getattr(model.data, "frame", None)
    # A column given as groups=data["g"] has its name; that it is this column is checked below.
    column = model._group_column
    if asked is None or frame is None or not isinstance(column, str) or column not in frame:
        return None
    formula, re_formula, vc_formula = asked
    group = quote(column)
    terms = []
    if re_formula is not None or vc_formula is None:
        terms.append(f"({(re_formula or '1').strip().lstrip('~')} | {group})")
    for name in sorted(vc_formula or {}):
        factor = only_factor(vc_formula[name])
        if factor is None:
            return None
        text, variable = factor
        if text != variable or not pd.api.types.is_numeric_dtype(frame[variable]):
            terms.append(f"(1 | {group}:{quote(variable)})")
        else:
            terms.append(f"(0 + {quote(variable)} | {group})")
    try:
        found = build_design(f"{formula} + {' + '.join(terms)}", frame)
    except (DataError, FormulaError):
        return None
    same = (
        found.x_names == design.x_names
        and len(found.blocks) == len(design.blocks)
        and len(found.groupings) == len(design.groupings)
        and np.array_equal(found.y, design.y)
        and np.array_equal(found.X, design.X)
        and design.offset is None
        and all(
            a.grouping == b.grouping and a.covariance == b.covariance and np.array_equal(a.Z, b.Z)
            for a, b in zip(found.blocks, design.blocks, strict=True)
        )
        and all(
            np.array_equal(a.codes, b.codes)
            for a, b in zip(found.groupings, design.groupings, strict=True)
        )
    )
    return found if same else None
