"""A file of arrays and names: NumPy's ``.npz`` with a description in JSON, and nothing to execute.

The same content gives the same bytes.  A hash of all of it is checked when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .. import archive
from ..archive import ArchiveError, NoArchiveError
from ..covariances import Covariance
from ..frames import DataError
from ..levels import Grouping
from ..matrices import Design, NewDesign, RandomBlock, Recipe
from ..spec import ModelSpec, RandomTerm
from ..terms import CodedTerms, Coding, Element, Term
from .selection import structure_of

FORMAT, VERSION = "lmmax sufficient statistics", 1


@dataclass(frozen=True, eq=False)
class WrittenCoding:
    """How a categorical factor was coded; see `lmmax.terms.Coding`.

    Attributes:
        levels: the levels in order.
        full: its columns' values by level with all levels, (levels, levels).
        reduced: the same beside an intercept, (levels, columns).
    """

    levels: tuple[Any, ...]
    full: np.ndarray
    reduced: np.ndarray

    def matrix(self, reduced: bool) -> np.ndarray:
        """See `lmmax.terms.Coding`."""
        return self.reduced if reduced else self.full


class NoRecipe(Recipe):
    """In place of how a design was made, which a file does not hold."""

    def apply(self, data: Any, asked: Any, offset: Any) -> NewDesign:
        """Raise, since there is nothing to apply."""
        raise DataError(
            "sufficient statistics do not know how their columns are made from data; fit the rows "
            "with lmmax.fit for predictions"
        )


def write(path: str | Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file, complete or not at all.

    Args:
        path: its name.
        about: what JSON can hold.
        arrays: arrays of numbers or text.
    """
    archive.write(path, {"format": FORMAT, "version": VERSION, **about}, arrays)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a file that `write` wrote.

    Raises:
        DataError: if it is another file, damaged, or of a later version.
    """
    try:
        return archive.read(path, FORMAT, VERSION, "file of sufficient statistics")
    except NoArchiveError as error:
        raise DataError(f"{str(path)!r} holds no sufficient statistics") from error
    except ArchiveError as error:
        raise DataError(str(error)) from error


def labels_array(labels: pd.Index, what: str) -> np.ndarray:
    """Return labels as an array of numbers, dates or text.

    Raises:
        DataError: for labels of other or several types.
    """
    values = labels.to_numpy()
    if values.dtype.kind in "iufbmM":
        return np.asarray(values)
    if all(isinstance(label, str) for label in values):
        return np.array(list(values), dtype=np.str_)
    raise DataError(
        f"{what} are neither numbers nor text ({labels[0]!r}): convert them to text before the "
        "statistics are made, to write them to a file"
    )


def labels_index(values: np.ndarray) -> pd.Index:
    """Return labels from such an array."""
    if values.dtype.kind == "U":
        return pd.Index(values.tolist(), dtype=object)
    if values.dtype.kind == "i" and np.array_equal(values, np.arange(len(values))):
        return pd.RangeIndex(len(values))
    return pd.Index(values)


# --- designs without rows -----------------------------------------------------------------------


def described(design: Design) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a design without its rows, as a description and arrays."""
    spec, arrays = design.spec, {}
    for i, grouping in enumerate(design.groupings):
        arrays[f"levels_{i}"] = labels_array(grouping.levels, f"the levels of {grouping.name!r}")
        if grouping.root is not None:
            arrays[f"root_{i}"] = grouping.root
    about = {
        "response": design.response_name,
        "spec": {
            "response": spec.response,
            "fixed": spec.fixed,
            "offsets": spec.offsets,
            "evaluate": spec.evaluate,
            "random": [_term(term) for term in spec.random],
        },
        "columns": design.x_names,
        "terms": _terms(design.terms),
        "blocks": [
            {"names": b.names, "grouping": b.grouping, "terms": _terms(b.terms)}
            for b in design.blocks
        ],
        "groupings": [grouping.name for grouping in design.groupings],
        "n_dropped": design.n_dropped,
    }
    return about, arrays


def rebuilt(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Design:
    """Return the design that `described` was given, without rows."""
    of = about["spec"]
    random = tuple(RandomTerm(**term) for term in of["random"])
    how = of.get("evaluate", "python")
    spec = ModelSpec(of["response"], of["fixed"], random, tuple(of["offsets"]), how)
    blocks = []
    for term, block in zip(random, about["blocks"], strict=True):
        names, terms = tuple(block["names"]), _read_terms(block["terms"])
        structure = structure_of(term, names, terms, ordered=True)
        empty = np.zeros((0, len(names)))
        blocks.append(RandomBlock(term, block["grouping"], empty, names, structure, terms))
    none = np.zeros(0, dtype=np.int64)
    return Design(
        spec=spec,
        response_name=about["response"],
        y=np.zeros(0),
        X=np.zeros((0, len(about["columns"]))),
        x_names=tuple(about["columns"]),
        terms=_read_terms(about["terms"]),
        blocks=tuple(blocks),
        groupings=tuple(
            Grouping(name, none, labels_index(arrays[f"levels_{i}"]), arrays.get(f"root_{i}"))
            for i, name in enumerate(about["groupings"])
        ),
        weights=None,
        offset=None,
        index=pd.RangeIndex(0),
        n_dropped=about["n_dropped"],
        dropped_by={},
        _recipe=NoRecipe(),
    )


def _term(term: RandomTerm) -> dict[str, str]:
    if isinstance(term.covariance, Covariance):
        raise DataError(
            f"the covariance structure of {term} is an object of your own, which a file cannot "
            "hold: make the statistics with a structure that has a name"
        )
    return {"design": term.design, "group": term.group, "covariance": term.covariance}


def _terms(terms: CodedTerms) -> dict[str, Any]:
    return {
        "terms": [
            {
                "label": term.label,
                "factors": term.factors,
                "columns": [term.columns.start, term.columns.stop],
                "elements": term.elements,
            }
            for term in terms.terms
        ],
        "codings": {name: coding(each) for name, each in terms.codings.items()},
    }


def coding(of: Coding) -> dict[str, Any]:
    """Return the coding of a categorical factor as what JSON can hold."""
    return {
        "levels": [_plain(level) for level in of.levels],
        "full": of.matrix(False).tolist(),
        "reduced": of.matrix(True).tolist(),
    }


def _plain(level: Any) -> Any:
    level = level.item() if isinstance(level, np.generic) else level
    return level if isinstance(level, bool | int | float | str) else str(level)


def _read_terms(about: Mapping[str, Any]) -> CodedTerms:
    terms = tuple(
        Term(
            term["label"],
            tuple(term["factors"]),
            slice(*term["columns"]),
            tuple(tuple(Element(*element) for element in column) for column in term["elements"]),
        )
        for term in about["terms"]
    )
    codings = {
        name: WrittenCoding(
            tuple(each["levels"]),
            np.array(each["full"], dtype=float).reshape(len(each["levels"]), -1),
            np.array(each["reduced"], dtype=float).reshape(len(each["levels"]), -1),
        )
        for name, each in about["codings"].items()
    }
    return CodedTerms(terms, codings)
