"""What the user asked for: the parts of a model formula, without data."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .covariances import Covariance, canonical
from .safe import Evaluate, check_evaluate

# Covariance structures with a bar of their own in a formula; the others stand before the term.
_BARS = {"us": "|", "diag": "||"}

_NAME = r"(?:`[^`]+`|[^\W\d][\w.]*)"
_GROUP = re.compile(rf"\s*{_NAME}\s*(?::\s*{_NAME}\s*)*")


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
    """One random term, `(design | group)` or `cs(design | group)` in a formula.

    Args:
        design: the effects, as in the left part of the bar: `"1 + Time"`, `"0 + f"`; `"x"` has an
            intercept too, as in lme4.
        group: name of the grouping factor, or names joined by `:` for their combinations; a name
            that is not a plain word goes in backticks.
        covariance: name of the structure of the effects' covariance: `"us"` (unstructured, the bar
            `|`), `"diag"` (independent effects, `||`; between the levels of a factor too, unlike
            lme4), or one of the others in `lmmax.covariances`; or an object for a structure of
            your own. Another spelling of a name, and an object that a name stands for, become
            that name.

    Raises:
        TypeError, ValueError: for a part that is not text, is empty or does not belong there, and
            an unknown covariance structure.

    Example:
        >>> RandomTerm("1 + Time", "Pig")
        RandomTerm(design='1 + Time', group='Pig', covariance='us')
        >>> str(RandomTerm("1 + Time", "Pig", "diag"))
        '(1 + Time || Pig)'
        >>> str(RandomTerm("0 + Visit", "Patient", "toeph"))
        'toep(0 + Visit | Patient)'
    """

    design: str
    group: str
    covariance: str | Covariance = "us"

    def __post_init__(self) -> None:
        _check_text("RandomTerm", "design", self.design, "|~")
        _check_text("RandomTerm", "group", self.group, "|~")
        object.__setattr__(self, "covariance", canonical(self.covariance))
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
        name = self.covariance if isinstance(self.covariance, str) else self.covariance.name
        if name in _BARS:
            return f"({self.design} {_BARS[name]} {self.group})"
        return f"{name}({self.design} | {self.group})"


@dataclass(frozen=True)
class ModelSpec:
    """A linear mixed model: response, fixed effects, random terms and offsets, all as text.

    The text is code: its expressions run as Python when the model meets data. For text of others
    use ``evaluate="safe"``.

    Args:
        response: left-hand side, `"Weight"` or `"np.log(Reaction)"`.
        fixed: right-hand side without random terms and offsets; an intercept is included unless
            the text starts with `0 +` or has `- 1`.
        random: the random terms; any sequence of `RandomTerm`. Terms whose groups are made of the
            same columns, in any order, share a grouping factor.
        offsets: expressions whose sum is added to the linear predictor.
        evaluate: "python", or "safe": only columns, numbers, arithmetic, comparisons, elementwise
            functions of NumPy and the transforms, all of bounded size.

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
    evaluate: Evaluate = "python"

    def __post_init__(self) -> None:
        check_evaluate(self.evaluate)
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
    def group_columns(self) -> tuple[tuple[str, ...], ...]:
        """The columns of each grouping factor, in the order in which they come first."""
        found: dict[frozenset[str], tuple[str, ...]] = {}
        for term in self.random:
            found.setdefault(frozenset(term.group_names), term.group_names)
        return tuple(found.values())

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Names of the grouping factors, `"batch:cask"` for combinations, no two of them alike."""
        names = tuple(":".join(columns) for columns in self.group_columns)
        if len(set(names)) == len(names):
            return names
        # A column may have a colon in its own name.
        return tuple(
            ":".join(f"`{name}`" if ":" in name else name for name in columns)
            for columns in self.group_columns
        )

    def grouping_of(self, term: RandomTerm) -> int:
        """Position in `group_columns` of a term's grouping factor: `b:a` is `a:b`."""
        return [*map(set, self.group_columns)].index(set(term.group_names))

    @property
    def formula(self) -> str:
        """The model in lme4's notation.

        `parse_formula` of it gives an equal specification, unless a covariance structure is an
        object: that shows by its name.
        """
        parts = [self.fixed, *map(str, self.random), *(f"offset({text})" for text in self.offsets)]
        return f"{self.response} ~ {' + '.join(parts)}"

    def __str__(self) -> str:
        return self.formula
