"""Options that are words or levels: one reading, and one message, for all functions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args

Ddf = Literal[
    "satterthwaite",
    "kenward-roger",
    "kenward-roger-linear",
    "between-within",
    "residual",
    "normal",
]
DDF_METHODS: tuple[Ddf, ...] = get_args(Ddf)
DEFAULT_DDF: Ddf = "satterthwaite"
DDF_NAMES: dict[str, Ddf] = {
    "satt": "satterthwaite",
    "satterth": "satterthwaite",
    "satterthwaites": "satterthwaite",
    "kr": "kenward-roger",
    "kenwardrogers": "kenward-roger",
    "kr2": "kenward-roger",
    "krlinear": "kenward-roger-linear",
    "bw": "between-within",
    "betwithin": "between-within",
    "resid": "residual",
    "z": "normal",
    "gaussian": "normal",
    "asymptotic": "normal",
    "inf": "normal",
}
"""Names that other software and users have for the methods."""
EngineName = Literal["auto", "grouped", "nested", "crossed", "iterative"]
Solver = Literal["auto", "newton", "lbfgs"]
Missing = Literal["drop", "raise"]

Word = TypeVar("Word", bound=str)


def choose(
    name: str,
    value: Any,
    choices: Iterable[Word],
    others: Mapping[str, Word] | None = None,
    error: type[ValueError] = ValueError,
) -> Word:
    """Return the choice that a word stands for; case, blanks and punctuation do not matter.

    Args:
        name: the argument, for the message.
        value: what was given.
        choices: the words that it may be.
        others: further words for some of the choices, without blanks and punctuation, lower case.
        error: the class of the error.

    Raises:
        ValueError: for a word that is none of them, with the nearest.

    Example:
        >>> choose("ddf", "Kenward-Roger", ["satterthwaite", "kenward-roger"])
        'kenward-roger'
    """
    words = {_plain(choice): choice for choice in choices}
    known = words | dict(others or {})
    if isinstance(value, str) and _plain(value) in known:
        return known[_plain(value)]
    one, *rest = map(repr, words.values())
    listed = f"one of {', '.join([one, *rest])}" if len(rest) != 1 else f"{one} or {rest[0]}"
    message = f"{name}={value!r} is unknown; use {listed}"
    if isinstance(value, str):
        near = difflib.get_close_matches(_plain(value), known, 1, cutoff=0.65)
        message += f". Did you mean {known[near[0]]!r}?" if near else ""
    raise error(message)


def _plain(word: str) -> str:
    return "".join(letter for letter in word.casefold() if letter.isalnum())


def alpha_of(level: float | None, alpha: float | None = None, default: float = 0.05) -> float:
    """Return one minus the level of intervals, which may be given as either.

    A level below one half is taken as one minus the level, as a user of statsmodels means it: the
    limits of ``conf_int(0.05)`` and ``conf_int(0.95)`` are the same.

    Args:
        level: the level, such as 0.95.
        alpha: one minus the level, such as 0.05.
        default: ``alpha``, where neither is given.

    Raises:
        TypeError: if both are given, or one is no number.
        ValueError: for what does not lie between 0 and 1.

    Example:
        >>> [round(alpha_of(level), 3) for level in (0.9, 0.1, None)]
        [0.1, 0.1, 0.05]
    """
    if level is not None and alpha is not None:
        raise TypeError(
            f"level={level!r} and alpha={alpha!r} say the same: give one of them (alpha is one "
            "minus the level)"
        )
    if level is None:
        return default if alpha is None else _fraction("alpha", alpha, "0.05")
    level = _fraction("level", level, "0.95")
    # Decimals such as 0.95 have no exact complement: 1 - 0.95 is 0.050000000000000044.
    return level if level < 0.5 else round(1.0 - level, 15) or 1.0 - level


def _fraction(name: str, value: Any, example: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}={value!r} must be a number between 0 and 1 ({example} for 95% limits)"
        ) from None
    if isinstance(value, str) or not 0.0 < number < 1.0:
        raise ValueError(f"{name}={value!r} must lie between 0 and 1 ({example} for 95% limits)")
    return number
