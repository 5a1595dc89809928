"""What the user asked for: the parts of a model formula, without data."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Covariance structures of one random term, and the bar that stands for each in a formula.
COVARIANCES = {"us": "|", "diag": "||"}

_NAME = r"(?:`[^`]+`|[^\W\d][\w.]*)"
_GROUP = re.compile(rf"\s*{_NAME}\s*(?::\s*{_NAME}\s*)*")


def check_covariance(name: str) -> str:
    """Return `name` if it is a known covariance structure, else raise `ValueError`."""
    if name not in COVARIANCES:
        known = ", ".join(repr(c) for c in COVARIANCES)
        raise ValueError(f"unknown covariance structure {name!r}: choose one of {known}")
    return name


def _check_text(owner: str, field: str, value: object, banned: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{owner}.{field} must be a string, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{owner}.{field} is empty")
    plain = re.sub(r"`[^`]*`|\"[^\"]*\"|'[^']*'", "", value)
    calls: list[bool] = []  # open parentheses: does it belong to a call?
    previous = ""
    for char in plain:
        if char in "([{":
            calls.append(previous.isalnum() or previous in ("_", "]", ")"))
        elif char in ")]}" and calls:
            calls.pop()
        # Bars and tildes are Python operators inside a call such as `I(a | b)`.
        elif char in banned and not any(calls):
            raise ValueError(
                f"{owner}.{field} = {value!r} contains {char!r}: it takes one part of a formula; "
                "use parse_formula() for a whole one"
            )
        previous = char


@dataclass(frozen=True)
class RandomTerm:
    """One random term, `(design | group)` in a formula.

    Args:
        design: the effects, as in the left part of the bar: `"1 + Time"`, `"0 + f"`; `"x"` has an
            intercept too, as in lme4.
        group: name of the grouping factor, or names joined by `:` for their combinations; a name
            that is not a plain word goes in backticks.
        covariance: `"us"` (unstructured, the bar `|`) or `"diag"` (independent effects, `||`;
            between the levels of a factor too, unlike lme4).

    Raises:
        TypeError, ValueError: for a part that is not text, is empty or does not belong there.

    Example:
        >>> RandomTerm("1 + Time", "Pig")
        RandomTerm(design='1 + Time', group='Pig', covariance='us')
        >>> str(RandomTerm("1 + Time", "Pig", "diag"))
        '(1 + Time || Pig)'
    """

    design: str
    group: str
    covariance: str = "us"

    def __post_init__(self) -> None:
        _check_text("RandomTerm", "design", self.design, "|~")
        _check_text("RandomTerm", "group", self.group, "|~")
        check_covariance(self.covariance)
        if not _GROUP.fullmatch(self.group):
            hint = ""
            if "/" in self.group:
                hint = "; write `a/b` as two terms, one with group 'a' and one with group 'a:b'"
            raise ValueError(
                f"RandomTerm.group = {self.group!r} must be a column name, or names joined by "
                f"':'{hint}"
            )

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the columns that make the grouping factor, without backticks."""
        return tuple(name.strip("`") for name in re.findall(_NAME, self.group))

    def __str__(self) -> str:
        return f"({self.design} {COVARIANCES[self.covariance]} {self.group})"


@dataclass(frozen=True)
class ModelSpec:
    """A linear mixed model: response, fixed effects, random terms and offsets, all as text.

    Args:
        response: left-hand side, `"Weight"` or `"np.log(Reaction)"`.
        fixed: right-hand side without random terms and offsets; an intercept is included unless
            the text starts with `0 +` or has `- 1`.
        random: the random terms; any sequence of `RandomTerm`.
        offsets: expressions whose sum is added to the linear predictor.

    Raises:
        TypeError, ValueError: for a part that is not text, is empty or does not belong there.

    Example:
        >>> spec = ModelSpec("Weight", "1 + Time", [RandomTerm("1 + Time", "Pig")])
        >>> spec.formula
        'Weight ~ 1 + Time + (1 + Time | Pig)'
    """

    response: str
    fixed: str
    random: tuple[RandomTerm, ...]
    offsets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_text("ModelSpec", "response", self.response, "|~")
        _check_text("ModelSpec", "fixed", self.fixed, "|~")
        if re.search(r"(?<![\w.])offset\s*\(", self.fixed):
            raise ValueError(
                f"ModelSpec.fixed = {self.fixed!r} contains an offset: put its expression into "
                "ModelSpec.offsets"
            )
        if isinstance(self.random, RandomTerm):
            raise TypeError("ModelSpec.random must be a sequence: write (RandomTerm(...),)")
        if isinstance(self.offsets, str):
            raise TypeError(f"ModelSpec.offsets must be a sequence: write ({self.offsets!r},)")
        object.__setattr__(self, "random", tuple(self.random))
        object.__setattr__(self, "offsets", tuple(self.offsets))
        for term in self.random:
            if not isinstance(term, RandomTerm):
                raise TypeError(
                    f"ModelSpec.random must hold RandomTerm objects, not {type(term).__name__}"
                )
        for text in self.offsets:
            _check_text("ModelSpec", "offsets", text, "|~")

    @property
    def formula(self) -> str:
        """The model in lme4's notation; `parse_formula` of it gives an equal specification."""
        parts = [self.fixed, *map(str, self.random), *(f"offset({text})" for text in self.offsets)]
        return f"{self.response} ~ {' + '.join(parts)}"

    def __str__(self) -> str:
        return self.formula
