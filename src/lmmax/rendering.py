"""A summary as plain text and as HTML; both share the formatting of numbers into cells."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from .characters import visible

if TYPE_CHECKING:
    from .summary import Summary

WIDTH = 80
"""Most columns of the text, unless a single name is longer."""
CONTINUED = "\n    "
"""Where a line of text that is too long for the page goes on."""
MANY_ROWS = 20
"""Most rows of a frame that is one of several on a page."""
MISSING = "-"
"""Stands for a number that does not exist, such as the standard error of a variance of zero."""


class Frame(pd.DataFrame):
    """A data frame that prints all its columns, in as many lines as that takes, and never "...".

    Control characters in labels are written out.
    """

    @property
    def _constructor(self) -> type[Frame]:
        return Frame

    def __repr__(self) -> str:
        with pd.option_context("display.max_columns", None):
            shown = super().__repr__()
            if len(shown.partition("\n")[0].rstrip(" \\")) < len(shown.partition("\n")[0]):
                # Folded, which fewer digits may save.
                with pd.option_context("display.precision", 4):
                    shown = super().__repr__()
        return page(shown)


class ByFactor(dict[str, Any]):
    """Results by the name of a grouping factor: a dict that prints frames one below the other."""

    def __repr__(self) -> str:
        if not any(isinstance(value, pd.DataFrame) for value in self.values()):
            return super().__repr__()
        return page("\n\n".join(f"{name}:\n{value!r}" for name, value in self.items()))

    def _repr_html_(self) -> str | None:
        if not any(isinstance(value, pd.DataFrame) for value in self.values()):
            return None
        return "".join(
            f"<p><strong>{escape(name)}</strong></p>{value.to_html(max_rows=MANY_ROWS)}"
            for name, value in self.items()
        )


class Cells(NamedTuple):
    """One table as text: labels on the left, numbers on the right."""

    label_headers: list[str]
    labels: list[list[str]]
    headers: list[str]
    rows: list[list[str]]


def page(*lines: str) -> str:
    """Return lines as one text for a terminal, in which control characters are written out."""
    return visible("\n".join(lines), lines=True)


def format_pvalue(p: float) -> str:
    """Return a p-value with three decimals, honest about small ones."""
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


def headings(names: Iterable[Any], level: float) -> list[str]:
    """Return the columns of a table of tests as a reader of regression output knows them.

    Example:
        >>> headings(["coef", "t", "p", "lower", "upper"], 0.95)
        ['coef', 't', 'P>|t|', '[0.025', '0.975]']
    """
    names = [str(name) for name in names]
    tail = 0.5 * round(1.0 - level, 12)
    shown = {
        "p": "P>|z|" if "z" in names else "P>|t|",
        "lower": f"[{tail:.10g}",
        "upper": f"{1.0 - tail:.10g}]",
    }
    return [shown.get(name, name) for name in names]


def _exponent(value: float) -> int:
    return math.floor(math.log10(value)) if value > 0.0 else 0


def _decimals(largest: float, smallest: float) -> int | None:
    """Return how many decimals show both sizes, or None if only an exponent does.

    Three where there is room, more if the smallest needs them for two significant digits.
    """
    digits = max(_exponent(largest) + 1, 1)
    needed = 1 - _exponent(smallest)
    decimals = max(needed, min(3, max(7 - digits, 0)))
    return decimals if digits <= 7 and digits + decimals <= 9 else None


def _sizes(values: np.ndarray) -> np.ndarray:
    """Return the sizes that matter for formatting: finite and not zero."""
    sizes = np.abs(values[np.isfinite(values)])
    return sizes[sizes > 0.0]


def format_block(values: np.ndarray, precision: np.ndarray) -> list[list[str]]:
    """Format columns of one unit, with common decimals if the sizes allow, else row by row.

    Args:
        values: numbers, (r, c).
        precision: per row the numbers of which two digits must be seen, (r, d).
    """
    ranges = []
    for row, small in zip(values, precision, strict=True):
        sizes, smalls = _sizes(row), _sizes(small)
        largest = float(sizes.max()) if sizes.size else 0.0
        ranges.append((largest, float(smalls.min()) if smalls.size else largest))
    known = [pair for pair in ranges if pair[0] > 0.0]
    common = None
    if known:
        common = _decimals(max(large for large, _ in known), min(small for _, small in known))
    spread = max((_exponent(large) - _exponent(small) for large, small in known), default=0)
    mantissa = min(max(spread + 1, 3), 6)

    formatted = []
    for row, (large, small) in zip(values, ranges, strict=True):
        decimals = common if common is not None else _decimals(large, small)
        code = f".{mantissa}e" if decimals is None else f".{decimals}f"
        formatted.append([_format(value, code) for value in row])
    return formatted


def _format(value: float, code: str) -> str:
    if math.isnan(value):
        return MISSING
    text = format(value, code)
    # A rounded "-0.000" says nothing that "0.000" does not.
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def _format_df(df: float) -> str:
    if math.isnan(df):
        return MISSING
    if math.isinf(df):
        return "inf"
    return f"{df:.1f}" if df < 1e5 else f"{df:.3g}"


def _format_z(value: float) -> str:
    return _format(value, ".3f" if abs(value) < 1e5 else ".3e")


def _format_p(value: float) -> str:
    return MISSING if math.isnan(value) else format_pvalue(value)


def _format_correlation(value: float) -> str:
    """Two decimals, but more where two would claim a perfect correlation that is not one."""
    if abs(value) < 1.0 - 1e-8:
        for code in (".2f", ".3f", ".4f"):
            if abs(float(format(value, code))) < 1.0:
                return _format(value, code)
    return _format(value, ".2f")


def _header_cells(header: pd.DataFrame) -> list[tuple[str, str]]:
    entries = header["value"].to_dict()
    steps = entries.pop("Steps")
    cells = []
    for key, value in entries.items():
        if key == "Converged":
            text = f"{'yes' if value else 'NO'} ({steps} step{'s' * (steps != 1)})"
        elif isinstance(value, bool):
            text = "yes" if value else "no"
        elif key == "Scale":
            text = _format(value, ".6g")
        elif key == "Mean group size":
            text = _format(value, ".2f")
        elif isinstance(value, float):
            text = _format(value, ".4f")
        else:
            text = str(value)
        cells.append((str(key), text))
    return cells


def _residual_cells(residuals: pd.Series) -> Cells:
    row = [_format(value, ".4f" if abs(value) < 1e5 else ".3e") for value in residuals.to_numpy()]
    return Cells([], [[]], [str(name) for name in residuals.index], [row])


def _random_cells(table: pd.DataFrame) -> tuple[Cells, list[list[str]]]:
    """Return the cells without correlations, and the correlations, a list per row."""
    variances = table[["variance", "std err"]].to_numpy(float)
    sds = table[["std dev"]].to_numpy(float)
    numbers = [
        [*left, *right]
        for left, right in zip(
            format_block(variances, variances), format_block(sds, sds), strict=True
        )
    ]
    corr = table.filter(like="corr ").to_numpy(float)
    labels: list[list[str]] = []
    correlations: list[list[str]] = []
    for _, term in groupby(range(len(table)), key=lambda i: table.index[i]):
        # The group is named once per term, as in lme4.
        for j, i in enumerate(term):
            labels.append(
                [str(table["group"].iloc[i]) if j == 0 else "", str(table["name"].iloc[i])]
            )
            shown: list[float] = corr[i, :j].tolist() if table["correlated"].iloc[i] else []
            correlations.append([_format_correlation(value) for value in shown])
    return (
        Cells(["Groups", "Name"], labels, ["Variance", "Std.Err.", "Std.Dev."], numbers),
        correlations,
    )


def _fixed_cells(table: pd.DataFrame, level: float) -> Cells:
    names = list(table.columns)
    letter = "z" if "z" in names else "t"
    estimates = table[["coef", "std err", "lower", "upper"]].to_numpy(float)
    # Where nothing at all was estimated, it is the fit that failed.
    failed = bool(np.isnan(estimates[:, 0]).all())
    rows = []
    degrees = [[_format_df(df)] for df in table["df"]] if "df" in names else [[]] * len(table)
    for block, df, t, p in zip(
        format_block(estimates, estimates[:, 1:2]),
        degrees,
        table[letter],
        table["p"],
        strict=True,
    ):
        coef, se, low, high = block
        if coef == MISSING and not failed:
            coef = "aliased"
        rows.append([coef, se, *df, _format_z(t), _format_p(p), low, high])
    labels = [[str(name)] for name in table.index]
    return Cells([""], labels, headings(names, level), rows)


def text(summary: Summary) -> str:
    """Return the summary as text, at most ``WIDTH`` columns wide where names allow."""
    header, random, fixed = summary.tables
    random_cells, correlations = _random_cells(random)
    whole = _with_correlations(random_cells, correlations)
    separate = max(map(len, table_lines(whole, gap=1, fold=False, least=5))) > WIDTH
    blocks = {
        "Scaled residuals:": table_lines(_residual_cells(summary.residuals)),
        "Random effects:": table_lines(random_cells if separate else whole, least=5),
        "Correlations of the random effects:": (
            _correlation_lines(random_cells, correlations) if separate else []
        ),
        "Fixed effects:": table_lines(_fixed_cells(fixed, summary.level)),
    }
    pairs = _header_cells(header)
    # A name longer than the page sticks out of it; nothing else does.
    longest = max(len(line) for lines in blocks.values() for line in lines)
    width = min(max(72, longest), WIDTH)
    double, single = "=" * width, "-" * width

    lines = [summary.title.center(width).rstrip(), double]
    for warning in summary.warnings:
        lines += [*_wrap(f"WARNING: {warning}", width), single]
    lines += [*_wrap(f"Formula: {summary.formula}", width, indent=" " * 9), single]
    lines += _header_lines(pairs, width)
    for heading, block in blocks.items():
        if block:
            lines += [single, heading, *block]
    lines.append(double)
    if summary.notes:
        lines.append("Notes:")
        for number, note in enumerate(summary.notes, 1):
            mark = f"[{number}] "
            lines += _wrap(mark + note, width, indent=" " * len(mark))
    return page(*lines)


def folded(text: str) -> str:
    """Return text whose lines fit the page; the rest of a long one is indented below it."""
    indent = CONTINUED.strip("\n")
    lines = page(text).split("\n")
    return "\n".join(part for line in lines for part in _wrap(line, WIDTH, indent))


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _header_lines(pairs: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Set keys and values in two columns, or in one if they do not fit."""
    half = (width - 3) // 2
    if any(len(key) + len(value) + 2 > half for key, value in pairs):
        left = max(len(key) for key, _ in pairs) + 1
        return [f"{key + ':':<{left}}  {value}" for key, value in pairs]
    cells = [f"{key}:{value:>{half - len(key) - 1}}" for key, value in pairs]
    rows = (len(cells) + 1) // 2
    right = [*cells[rows:], ""][:rows]
    gap = " " * (width - 2 * half)
    return [f"{a}{gap}{b}".rstrip() for a, b in zip(cells[:rows], right, strict=True)]


def table_lines(
    cells: Cells, *, gap: int | None = None, fold: bool = True, least: int = 7
) -> list[str]:
    """Align labels left and numbers right; a label that does not fit has a line of its own.

    Args:
        cells: the table.
        gap: spaces between columns; by default two, or one where only that fits.
        fold: whether long labels may have lines of their own.
        least: width of the narrowest column of numbers.
    """
    # As wide as they will be.
    cells = cells._replace(
        labels=[[visible(part) for part in row] for row in cells.labels],
        headers=[visible(name) for name in cells.headers],
    )
    label_rows = [cells.label_headers, *cells.labels] if cells.label_headers else cells.labels
    widths = [max(map(len, column)) for column in zip(*label_rows, strict=True)]
    labels = [
        "  ".join(part.ljust(w) for part, w in zip(row, widths, strict=True)).rstrip()
        for row in (cells.label_headers, *cells.labels)
    ]
    rows = [cells.headers, *cells.rows]
    numbers = [max(least, *map(len, column)) for column in zip(*rows, strict=True)]
    longest = max(map(len, labels))
    if gap is None:
        # One space only where that saves folding.
        left = WIDTH - longest - sum(numbers)
        gap = 1 if len(numbers) <= left < 2 * len(numbers) else 2
    room = max(WIDTH - sum(numbers) - gap * len(numbers), 8) if fold else longest
    room = max((len(label) for label in labels if len(label) <= room), default=0)
    lines = []
    for label, row in zip(labels, rows, strict=True):
        right = "".join(" " * gap + cell.rjust(w) for cell, w in zip(row, numbers, strict=True))
        if len(label) > room:
            lines.append(label)
            label = ""
        lines.append(f"{label:<{room}}{right}".rstrip())
    return lines


def _with_correlations(cells: Cells, correlations: list[list[str]]) -> Cells:
    count = max(map(len, correlations))
    return cells._replace(
        headers=[*cells.headers, *["Corr", *[""] * (count - 1)][:count]],
        rows=[
            [*row, *corr, *[""] * (count - len(corr))]
            for row, corr in zip(cells.rows, correlations, strict=True)
        ],
    )


def _correlation_lines(cells: Cells, correlations: list[list[str]]) -> list[str]:
    """Set the triangle of each term apart, effects numbered, in as many pieces as fit."""
    lines: list[str] = []
    starts = [i for i, (group, _) in enumerate(cells.labels) if group]
    for start, end in zip(starts, [*starts[1:], len(correlations)], strict=True):
        triangle = correlations[start:end]
        names = [[f"({j})", cells.labels[start + j - 1][1]] for j in range(1, end - start + 1)]
        # Eight columns of seven characters leave room for a name.
        for first in range(0, len(triangle[-1]), 8):
            columns = range(first, min(first + 8, len(triangle[-1])))
            piece = Cells(
                ["", ""],
                names[first + 1 :],
                [f"({j + 1})" for j in columns],
                [
                    [row[j] if j < len(row) else "" for j in columns]
                    for row in triangle[first + 1 :]
                ],
            )
            lines += table_lines(piece, least=5)
    return lines


# Colours come from the page, so that light and dark themes both work.  The class stands twice where
# JupyterLab's own rule, which aligns all cells on the right, would win otherwise.
_CSS = """
.lmmax-summary { color: inherit; max-width: 60em; line-height: 1.4; }
.lmmax-summary p { margin: 0.3em 0; }
.lmmax-summary .lmmax-title { font-weight: bold; font-size: 1.15em; }
.lmmax-summary .lmmax-warning { border-left: 4px solid #d9480f; padding: 0.2em 0.7em; }
.lmmax-summary .lmmax-scroll { overflow-x: auto; margin: 0.6em 0; }
.lmmax-summary table { border-collapse: collapse; margin: 0; table-layout: auto;
  font-variant-numeric: tabular-nums; border: none; }
.lmmax-summary caption { text-align: left; font-weight: bold; padding: 0.2em 0; color: inherit; }
.lmmax-summary tr { background: transparent !important; border: none; }
.lmmax-summary th, .lmmax-summary td { padding: 0.15em 0.7em; text-align: right;
  white-space: nowrap; border: none; color: inherit; }
.lmmax-summary th { font-weight: 600; }
.lmmax-summary.lmmax-summary tbody th { text-align: left; font-weight: normal; }
.lmmax-summary thead th { border-bottom: 1px solid; }
.lmmax-summary.lmmax-summary thead th.lmmax-label { text-align: left; }
.lmmax-summary table { border-top: 1px solid; border-bottom: 1px solid; }
.lmmax-summary ol { margin: 0.3em 0; padding-left: 1.8em; font-size: 0.92em; }
"""


def boxed(*parts: str) -> str:
    """Return pieces of HTML as one fragment, with the style that they share."""
    return "\n".join(['<div class="lmmax-summary">', f"<style>{_CSS}</style>", *parts, "</div>"])


def paragraphs(text: str) -> str:
    """Return text as a fragment of HTML, its first line as the title, everything escaped."""
    title, *rest = text.replace(CONTINUED, " ").split("\n")
    return boxed(
        f'<p class="lmmax-title">{escape(title)}</p>',
        *(f"<p>{escape(line)}</p>" for line in rest if line.strip()),
    )


def fragment(title: str, formula: str, cells: Cells, notes: Sequence[str]) -> str:
    """Return one table with its title and notes as a fragment of HTML, everything escaped."""
    return boxed(
        f'<p class="lmmax-title">{escape(title)}</p>',
        f"<p><code>{escape(formula)}</code></p>",
        html_table("", cells),
        *(f"<p>{escape(note)}</p>" for note in notes),
    )


def html(summary: Summary) -> str:
    """Return the summary as a fragment of HTML, everything escaped."""
    header, random, fixed = summary.tables
    parts = [
        f'<p class="lmmax-title">{escape(summary.title)}</p>',
        *(
            f'<p class="lmmax-warning"><strong>Warning:</strong> {escape(warning)}</p>'
            for warning in summary.warnings
        ),
        f"<p><code>{escape(summary.formula)}</code></p>",
        _html_header(_header_cells(header)),
        html_table("Scaled residuals", _residual_cells(summary.residuals)),
        html_table("Random effects", _with_correlations(*_random_cells(random))),
        html_table("Fixed effects", _fixed_cells(fixed, summary.level)),
    ]
    if summary.notes:
        parts.append(f"<ol>{''.join(f'<li>{escape(note)}</li>' for note in summary.notes)}</ol>")
    return boxed(*parts)


def _html_header(pairs: Sequence[tuple[str, str]]) -> str:
    half = (len(pairs) + 1) // 2
    body = ""
    for i in range(half):
        row = [pairs[i], *pairs[half + i : half + i + 1]]
        body += "<tr>" + "".join(f"{_th(key)}{_td(value)}" for key, value in row) + "</tr>"
    return f'<div class="lmmax-scroll"><table><tbody>{body}</tbody></table></div>'


def html_table(caption: str, cells: Cells) -> str:
    """Return a table as HTML, everything escaped."""
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    head = "".join(
        f'<th scope="col" class="lmmax-label">{escape(text)}</th>' for text in cells.label_headers
    ) + "".join(f'<th scope="col">{escape(text)}</th>' for text in cells.headers)
    body = "".join(
        f"<tr>{''.join(map(_th, labels))}{''.join(map(_td, row))}</tr>"
        for labels, row in zip(cells.labels, cells.rows, strict=True)
    )
    return (
        f'<div class="lmmax-scroll"><table>{title}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _th(text: str) -> str:
    return f'<th scope="row">{escape(text)}</th>'


def _td(text: str) -> str:
    return f"<td>{escape(text)}</td>"
