"""Characters that are not text: what a terminal or a spreadsheet would take as a command."""

from __future__ import annotations

import re

__all__ = ["Visible", "neutral", "one_wide", "visible"]

# Controls of both blocks, line and paragraph separators, marks that turn the direction of writing,
# and halves of characters, which no encoding takes.
_CONTROLS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_CONTROLS_OF_A_LINE = re.compile(_CONTROLS.pattern.replace(r"\x00-\x1f", r"\x00-\x09\x0b-\x1f"))


def visible(text: str, lines: bool = False) -> str:
    r"""Return a text with its control characters written out.

    Args:
        text: any text.
        lines: whether line breaks are part of it.

    Example:
        >>> visible("a\x1b[2Jb\n")
        'a\\x1b[2Jb\\n'
    """
    pattern = _CONTROLS_OF_A_LINE if lines else _CONTROLS
    return pattern.sub(lambda match: repr(match[0])[1:-1], text)


class Visible:
    """An error or a warning that quotes labels of data: its text has no control characters."""

    def __str__(self) -> str:
        return visible(super().__str__(), lines=True)


def one_wide(text: str) -> str:
    """Return a text as long as before, with a sign in place of each control character."""
    return _CONTROLS.sub("\ufffd", text)


def neutral(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula: with an apostrophe before it.

    Source: OWASP, CSV injection.

    Example:
        >>> neutral("=1+1"), neutral("x = 1")
        ("'=1+1", 'x = 1')
    """
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text
