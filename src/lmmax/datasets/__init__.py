"""Small published data sets, bundled with their sources.

Each table is a CSV file in ``data/``, the largest gzipped; ``catalogue.json`` holds title, source,
citation and the meaning of every column. Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Column", "Dataset", "describe", "load", "names"]


@dataclass(frozen=True)
class Column:
    """One column of a bundled data set.

    Attributes:
        name: Column name.
        kind: ``"numeric"`` or ``"categorical"``.
        description: Meaning of the column, with its unit.
    """

    name: str
    kind: Literal["numeric", "categorical"]
    description: str


@dataclass(frozen=True)
class Dataset:
    """What is known about a bundled data set; ``str()`` of it is a readable page.

    Attributes:
        name: Name to pass to :func:`load`.
        title: One-line title.
        n_rows: Number of rows.
        source: Where the numbers were taken from.
        citation: The publication they come from.
        licence: Licence of the source.
        notes: Peculiarities to know before use; empty if none.
        columns: The columns, in the order of the table.
    """

    name: str
    title: str
    n_rows: int
    source: str
    citation: str
    licence: str
    notes: str
    columns: tuple[Column, ...]

    def __str__(self) -> str:
        width = max(len(column.name) for column in self.columns)
        lines = [
            f"{self.name}: {self.title}",
            f"{self.n_rows} rows, {len(self.columns)} columns",
            "",
            *(
                f"  {column.name:<{width}}  {column.kind:<11}  {column.description}"
                for column in self.columns
            ),
            "",
        ]
        if self.notes:
            lines.append(f"Notes:    {self.notes}")
        lines += [
            f"Source:   {self.source}",
            f"Citation: {self.citation}",
            f"Licence:  {self.licence}",
        ]
        return "\n".join(lines)


@cache
def _catalogue() -> dict[str, dict[str, Any]]:
    text = (files(__name__) / "catalogue.json").read_text(encoding="utf-8")
    catalogue: dict[str, dict[str, Any]] = json.loads(text)
    return catalogue


def names() -> tuple[str, ...]:
    """Return the names of the bundled data sets, sorted.

    Examples:
        >>> from lmmax import datasets
        >>> "dietox" in datasets.names()
        True
    """
    return tuple(sorted(_catalogue()))


def describe(name: str) -> Dataset:
    """Return title, source, citation, licence and columns of a bundled data set.

    Args:
        name: One of :func:`names`.

    Raises:
        ValueError: If there is no such data set; the message names the nearest ones.

    Examples:
        >>> from lmmax import datasets
        >>> datasets.describe("sleepstudy").columns[0]
        Column(name='Reaction', kind='numeric', description='average reaction time, ms')
    """
    entry = _catalogue().get(name)
    if entry is None:
        near = difflib.get_close_matches(str(name).lower(), names(), n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"there is no bundled data set {name!r}.{hint} Available: {', '.join(names())}"
        )
    return Dataset(
        name=name,
        title=entry["title"],
        n_rows=entry["rows"],
        source=entry["source"],
        citation=entry["citation"],
        licence=entry["licence"],
        notes=entry["notes"] or "",
        columns=tuple(
            Column(column["name"], column["type"], column["description"])
            for column in entry["columns"]
        ),
    )


def load(name: str) -> pd.DataFrame:
    """Load a bundled data set as a new data frame.

    Categorical columns, grouping factors among them, have ``category`` dtype with string levels
    in plain string order, so labels that look like numbers are not mistaken for covariates.

    Args:
        name: One of :func:`names`.

    Returns:
        A data frame that the caller may change freely.

    Raises:
        ValueError: If there is no such data set; the message names the nearest ones.

    Examples:
        >>> from lmmax import datasets
        >>> datasets.load("dietox").shape
        (861, 8)
    """
    # Imported here because --help, names() and describe() have no need of pandas.
    import pandas as pd

    info = describe(name)
    labels = {column.name: str for column in info.columns if column.kind == "categorical"}
    path = files(__name__) / "data" / f"{name}.csv"
    compression: Literal["gzip"] | None = None
    if not path.is_file():
        path, compression = files(__name__) / "data" / f"{name}.csv.gz", "gzip"
    with path.open("rb") as stream:
        frame = pd.read_csv(stream, dtype=labels, compression=compression)
    for label in labels:
        levels = sorted(frame[label].unique())
        frame[label] = pd.Categorical(frame[label], categories=levels)
    return frame
