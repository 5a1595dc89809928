"""Tables of tests: numbers in a data frame, with a heading and notes for the reader."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from ..rendering import WIDTH, Cells, boxed, format_pvalue, html_table, page, table_lines

_WHOLE = ("npar", "df", "df_num")
_DECIMALS = {"F": 3, "chisq": 3, "AIC": 2, "BIC": 2, "llf": 3, "deviance": 3, "df_den": 2}


@dataclass(frozen=True, repr=False)
class TestTable:
    """A table of tests; ``print`` shows text, a notebook shows HTML.

    Attributes:
        heading: what was tested, and how.
        table: numbers before rounding, NaN where there is none.
        notes: what a reader should know.

    Example:
        >>> import lmmax
        >>> fit = lmmax.fit("Weight ~ Time + (1 | Pig)", lmmax.datasets.load("dietox"))
        >>> lmmax.anova(fit).table["df_num"].to_dict()
        {'Time': 1}
    """

    __test__ = False  # a table, not a test case for pytest to collect

    heading: str
    table: pd.DataFrame
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = table_lines(self._cells, least=0)
        rule = "-" * min(max(map(len, lines)), WIDTH)
        text = [part for line in self.heading.split("\n") for part in _wrapped(line, WIDTH, "  ")]
        text += [rule, *lines]
        if self.notes:
            text.append(rule)
        for number, note in enumerate(self.notes, 1):
            mark = f"[{number}] "
            text += _wrapped(mark + note, WIDTH, " " * len(mark))
        return page(*text)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        title, *rest = self.heading.split("\n")
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return boxed(
            f'<p class="lmmax-title">{escape(title)}</p>',
            *(f"<p><code>{escape(line)}</code></p>" for line in rest),
            html_table("", self._cells),
            *([f"<ol>{notes}</ol>"] if notes else []),
        )

    @property
    def _cells(self) -> Cells:
        """The table as text, empty where there is no number."""
        columns = [_column(str(name), self.table[name]) for name in self.table]
        labels = [[str(label)] for label in self.table.index]
        rows = (
            [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in labels]
        )
        return Cells([""], labels, [str(name) for name in self.table], rows)


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _column(name: str, values: pd.Series) -> list[str]:
    if not pd.api.types.is_numeric_dtype(values.dtype):
        return [str(value) for value in values]
    numbers = values.to_numpy(dtype=float, na_value=np.nan)

    def show(value: Any) -> str:
        if np.isnan(value):
            return ""
        if name == "p":
            return format_pvalue(value)
        if np.isinf(value):
            return "inf"
        if name in _WHOLE:
            return f"{value:.0f}"
        return f"{value:.{decimals}f}" if abs(value) < 1e7 else f"{value:.4e}"

    decimals = _DECIMALS.get(name, 3)
    if name not in _DECIMALS:
        sizes = np.abs(numbers[np.isfinite(numbers) & (numbers != 0.0)])
        # Four digits of the smallest, but not of numbers that are nothing beside the largest.
        if len(sizes):
            smallest = max(float(sizes.min()), 1e-4 * float(sizes.max()))
            decimals = int(np.clip(3 - np.floor(np.log10(smallest)), 0, 12))
    return [show(value) for value in numbers]
