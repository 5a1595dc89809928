"""Sufficient statistics of several sites, put together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..design import DataError, Design
from ..frames import listing
from ..levels import Grouping, other_type
from ..relationship import with_relationships
from . import artifact
from .parts import Part
from .reading import block_size
from .rotation import rotate, rotation

if TYPE_CHECKING:
    from .sufficient import SufficientStatistics


def check_alike(first: SufficientStatistics, other: SufficientStatistics, number: int) -> None:
    """Raise if statistics are not of the same model and responses."""
    here, there = first.design, other.design
    where = f"part {number} cannot be merged with the first: "
    if there.spec.formula.partition("~")[2] != here.spec.formula.partition("~")[2]:
        raise DataError(f"{where}its model is {there.spec.formula}, not {here.spec.formula}")
    _same_names(here.x_names, there.x_names, f"{where}columns of X", "make a factor a")
    for block, other_block in zip(here.blocks, there.blocks, strict=True):
        what = f"{where}effects of {block.term}"
        _same_names(block.names, other_block.names, what, "make a factor a")
        if block.covariance != other_block.covariance:
            raise DataError(f"{where}{block.term} has a covariance structure with other constants")
    for mine, yours in zip(
        [here.terms, *(block.terms for block in here.blocks)],
        [there.terms, *(block.terms for block in there.blocks)],
        strict=True,
    ):
        for name in mine.codings:
            if artifact.coding(mine.codings[name]) != artifact.coding(yours.codings[name]):
                raise DataError(f"{where}the contrasts or levels of {name!r} differ")
    for text in {**first.learnt, **other.learnt}:
        if first.learnt.get(text) != other.learnt.get(text):
            raise DataError(
                f"{where}{text!r} learns from the rows of each part, and learnt something else "
                "there: transform the column beforehand, with the same numbers for all parts"
            )
    _same_names(
        list(map(str, first.responses)),
        list(map(str, other.responses)),
        f"{where}responses",
        "give all parts the same",
        order=False,
    )
    if (other.responses.get_indexer(first.responses) < 0).any():
        raise DataError(f"{where}the names of the responses are of another type")


def _same_names(
    mine: Collection[str], yours: Collection[str], what: str, remedy: str, *, order: bool = True
) -> None:
    if (list(mine) == list(yours)) if order else (set(mine) == set(yours)):
        return
    lacks = [name for name in mine if name not in set(yours)]
    more = [name for name in yours if name not in set(mine)]
    found = [f"it lacks {listing(map(repr, lacks), 5)}"] if lacks else []
    found += [f"it has {listing(map(repr, more), 5)} besides"] if more else []
    levels = "pandas.Categorical with the levels of all parts before the statistics are made"
    end = levels if "factor" in remedy else "responses"
    raise DataError(
        f"{what} differ: {' and '.join(found) or 'their order is another'}; {remedy} {end}"
    )


def joined(
    designs: list[Design], distinct: bool | Collection[str], relmat: Any
) -> tuple[Design, list[list[np.ndarray]]]:
    """Return the design with the levels of all parts, and per part and factor their new codes."""
    first = designs[0]
    names = [grouping.name for grouping in first.groupings]
    if isinstance(distinct, bool):
        apart = set(names) if distinct else set()
    else:
        if not isinstance(distinct, Collection):
            raise TypeError(
                "distinct must be True, False or names of grouping factors, not "
                f"{type(distinct).__name__}"
            )
        apart = {distinct} if isinstance(distinct, str) else set(distinct)
    for name in sorted(apart.difference(names)):
        raise DataError(
            f"distinct has the name {name!r}, which is no grouping factor; there are "
            f"{listing(map(repr, names))}"
        )
    groupings, moves = [], []
    for at, name in enumerate(names):
        each = [design.groupings[at] for design in designs]
        levels = [
            pd.Index([f"{label} [{part}]" for label in grouping.levels], dtype=object)
            if name in apart
            else grouping.levels
            for part, grouping in enumerate(each, start=1)
        ]
        every = _union(levels, name)
        moves.append([every.get_indexer(own) for own in levels])
        root = _root(each, every, name, relmat)
        groupings.append(Grouping(name, np.zeros(0, dtype=np.int64), every, root))
    groupings_of_all = with_relationships(groupings, relmat)
    n_dropped = sum(design.n_dropped for design in designs)
    design = replace(first, groupings=groupings_of_all, n_dropped=n_dropped)
    return design, [list(own) for own in zip(*moves, strict=True)]


def _union(levels: list[pd.Index], name: str) -> pd.Index:
    found = levels[0]
    for more in levels[1:]:
        alike = other_type(more, found)
        if alike is not None:
            raise DataError(
                f"the labels of {name!r} are of different types in the parts ({alike!r} in one): "
                "convert them before the statistics are made"
            )
        found = found.append(more.difference(found, sort=False))
    return found


def _root(each: list[Grouping], levels: pd.Index, name: str, relmat: Any) -> np.ndarray | None:
    """Return the root of the relationship matrix that the parts have in common, if there is one."""
    roots = [grouping.root for grouping in each]
    first = roots[0]
    if all(root is None for root in roots) or name in (relmat or {}):
        return None
    if first is None or any(
        root is None or len(root) != len(levels) or not np.array_equal(root, first)
        for root in roots
    ):
        raise DataError(
            f"the relationship matrices of {name!r} differ between the parts, or have other "
            f"levels: pass relmat={{{name!r}: ...}} with that of all levels together"
        )
    return first


def merged(lanes: np.ndarray, pieces: list[tuple[Part, np.ndarray]], none: Part) -> Part:
    """Return the statistics of responses whose rows are in several parts.

    Args:
        lanes: the responses.
        pieces: parts with rows, codes those of all together, and where the responses are in each.
        none: a part without rows, if there is no other.
    """
    if not pieces:
        empty_y = np.zeros((len(lanes), 0))
        return replace(none, lanes=lanes, y=empty_y, origin=np.zeros((len(lanes), none.X.shape[1])))
    n_obs = sum(part.n_obs for part, _ in pieces)
    turned = rotation(
        np.concatenate([part.X for part, _ in pieces]),
        np.concatenate([part.Z for part, _ in pieces]),
        np.concatenate([part.codes for part, _ in pieces], axis=1),
        n_obs,
    )
    size = block_size(None, turned.inside.shape[1])
    found, origins = [], []
    for first in range(0, len(lanes), size):
        here = slice(first, first + size)
        origin = pieces[0][0].origin[pieces[0][1][here]]
        rows, known = [], np.zeros(len(lanes[here]))
        for part, mine in pieces:
            own = part.origin[mine[here]]
            rows.append(part.y[mine[here]] + (own - origin) @ part.X.T)
            known += np.einsum("ij,ij->i", own @ part.X.T, own @ part.X.T)
        done = rotate(turned, np.concatenate(rows, axis=1).T, known)
        found.append(done.y)
        origins.append(done.origin + origin)
    return Part(
        lanes=lanes,
        X=turned.X,
        Z=turned.Z,
        codes=turned.codes,
        y=np.concatenate(found),
        origin=np.concatenate(origins),
        n_obs=n_obs,
        log_weights=sum(part.log_weights for part, _ in pieces),
    )
