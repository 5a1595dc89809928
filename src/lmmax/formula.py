"""lme4-style formula text -> `ModelSpec`.

formulaic knows no `( ... | group)` term, so its tokens are cut here: the random terms and offsets
come out, and what is left of each part is handed to formulaic's own parser.
"""

from __future__ import annotations

import ast
import difflib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from formulaic import Formula
from formulaic.errors import FormulaicError
from formulaic.parser.algos.tokenize import tokenize
from formulaic.parser.types import Factor, Term, Token

from .characters import one_wide
from .covariances import NAMES, Covariance, covariance
from .expressions import QUOTED, ExpressionError, expression_names, read_expression
from .operators import PARSER
from .safe import Evaluate, check_evaluate, check_safe
from .spec import ModelSpec, RandomTerm

__all__ = ["FormulaError", "parse_formula"]

_DEEPEST = 60
"""Most brackets inside each other."""
_LONGEST = 200_000
"""Most characters of a formula; one with thousands of columns is a matter of seconds."""
_SHOWN = 70
"""Most characters of a long formula that a message shows on either side of the place."""

# Outside quotes these R spellings have one possible meaning in a formula. `^` is always a power
# there; Python would read it as "exclusive or".
_R_IDIOMS = (
    (re.compile(r"\^"), "**"),
    (re.compile(r"(?<![\w.])TRUE(?![\w.(])"), "True"),
    (re.compile(r"(?<![\w.])FALSE(?![\w.(])"), "False"),
    (re.compile(r"(?<![\w.])(?:as\.)?factor\s*\("), "C("),
)
_FACTOR_OF_NAME = re.compile(r"C\(\s*(`[^`]+`|[^\W\d][\w.]*)\s*\)")

# What to write instead of R functions that have no namesake here.
R_HINTS = {
    "as.numeric": "make a numeric column before fitting",
    "as.integer": "make a numeric column before fitting",
    "as.character": "use C(x)",
    "ordered": "use C(x, contr.poly) for polynomial contrasts",
    "as.ordered": "use C(x, contr.poly) for polynomial contrasts",
    "relevel": "use C(x, contr.treatment('level'))",
    "ns": "use bs(x, df=...) or the natural cubic spline cr(x, df=...)",
    "rcs": "use the natural cubic spline cr(x, df=...)",
    "s": "use bs(x, df=...) or cr(x, df=...)",
    "ifelse": "use np.where(condition, a, b)",
    "c": "write a Python list, [1, 2]",
    "cbind": "fit one response at a time",
    "interaction": "use a:b",
    "lag": "make a column with groupby(group)[x].shift() before fitting",
    "cut": "make a column of categories before fitting",
}


class FormulaError(ValueError):
    """A formula that cannot be read; the message shows the place with a caret."""


@dataclass(frozen=True)
class _Piece:
    """A token with its place in the formula: `text` is as it goes back into a formula."""

    text: str
    kind: Token.Kind
    start: int
    end: int  # exclusive

    def is_op(self, *texts: str) -> bool:
        return self.kind is Token.Kind.OPERATOR and self.text in texts


def _error(message: str, source: str, start: int, end: int) -> FormulaError:
    start = min(start, len(source))
    width = max(1, end - start)
    if len(source) > 2 * _SHOWN:
        # A message with a formula of pages in it hides what it says.
        width = min(width, _SHOWN)
        first, last = max(start - _SHOWN, 0), start + width + _SHOWN
        before, after = "... " * (first > 0), " ..." * (last < len(source))
        source = before + source[first:last] + after
        start += len(before) - first
    return FormulaError(f"{message}\n\n  {one_wide(source)}\n  {' ' * start}{'^' * width}")


def _error_at(message: str, source: str, pieces: list[_Piece]) -> FormulaError:
    return _error(message, source, pieces[0].start, pieces[-1].end)


def from_r(text: str) -> str:
    """Rewrite R spellings that Python would read otherwise: `^`, `TRUE`, `FALSE`, `factor()`."""
    parts = QUOTED.split(text)
    for i in range(0, len(parts), 2):
        for pattern, replacement in _R_IDIOMS:
            parts[i] = pattern.sub(replacement, parts[i])
    return "".join(parts)


def _check_balance(source: str) -> None:
    """Point at the first bracket or quote without a partner, which the tokenizer does not."""
    closers = {"(": ")", "[": "]", "{": "}"}
    stack: list[tuple[str, int]] = []
    quote: tuple[str, int] | None = None
    for i, char in enumerate(source):
        if quote is not None:
            if char == quote[0] and not (char != "`" and source[i - 1] == "\\"):
                quote = None
        elif char in "\"'`":
            quote = (char, i)
        elif char in closers:
            stack.append((char, i))
            if len(stack) > _DEEPEST:
                raise _error(f"more than {_DEEPEST} brackets inside each other", source, i, i + 1)
        elif char in closers.values():
            if not stack:
                raise _error(f"unbalanced: this {char!r} closes nothing", source, i, i + 1)
            opener, at = stack.pop()
            if closers[opener] != char:
                raise _error(
                    f"unbalanced: {opener!r} at position {at + 1} is closed by {char!r}",
                    source,
                    i,
                    i + 1,
                )
    if quote is not None:
        raise _error(f"unbalanced: this {quote[0]} is never closed", source, quote[1], quote[1] + 1)
    if stack:
        opener, at = stack[-1]
        raise _error(f"unbalanced: this {opener!r} is never closed", source, at, at + 1)


def _split_operator(source: str, start: int, end: int) -> Iterator[_Piece]:
    """Formulaic runs neighbouring operators together (`~ -` is `~-`): take them apart again."""
    i = start
    while i < end:
        if source[i].isspace():
            i += 1
            continue
        width = 2 if source[i : i + 2] in ("||", "**") else 1
        yield _Piece(source[i : i + width], Token.Kind.OPERATOR, i, i + width)
        i += width


def _pieces(source: str, begin: int = 0, stop: int | None = None) -> list[_Piece]:
    """The tokens of a balanced formula, or of source[begin:stop]."""
    pieces: list[_Piece] = []
    try:
        # Blanks keep the place of what follows them.
        tokens = list(tokenize(" " * begin + source[begin:stop]))
    except FormulaicError as error:
        raise _translate(error, source) from None
    for token in tokens:
        start, last = token.source_loc
        assert token.kind is not None and start is not None and last is not None
        end = last + 1
        opener = source[start]
        if opener in "`{":
            close = "`" if opener == "`" else "}"
            pieces.append(_Piece(f"{opener}{token.token}{close}", token.kind, start, end + 1))
        elif opener == "%":
            pieces.append(_Piece(f"%{token.token}%", token.kind, start, end + 1))
        elif token.kind is Token.Kind.OPERATOR:
            pieces.extend(_split_operator(source, start, end))
        elif token.kind is Token.Kind.CONTEXT and token.token in "[]":
            raise _error("square brackets mean nothing here: use (...)", source, start, end)
        elif token.kind is Token.Kind.PYTHON:
            text = from_r(token.token)
            piece = _Piece(text, token.kind, start, end)
            if not _is_structured(piece, source):
                _check_call(piece, source)
            pieces.append(piece)
        else:
            pieces.append(_Piece(token.token, token.kind, start, end))
    return pieces


def _check_call(piece: _Piece, source: str) -> None:
    name = piece.text.split("(", 1)[0].strip()
    try:
        node = read_expression(piece.text).tree
    except ExpressionError as error:
        hint = f": {R_HINTS[name]}" if name in R_HINTS else ""
        if piece.text.startswith("."):
            hint = ": a call of what a call returns goes inside `I(...)`, as a whole"
        raise _error_at(f"`{_short(piece.text)}` {error}{hint}", source, [piece]) from None
    if isinstance(node, ast.Call) and name != "I" and _has_bar(node):
        raise _no_structure(name, source, [piece])
    for call in ast.walk(node):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        if call.func.id in NAMES and _has_bar(call):
            raise _error_at(
                f"a random term must be a summand of its own, `... + {call.func.id}( ... | group)`",
                source,
                [piece],
            )


def _short(text: str) -> str:
    """Return a text as messages quote it."""
    return one_wide(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _has_bar(call: ast.Call) -> bool:
    return any(isinstance(a, ast.BinOp) and isinstance(a.op, ast.BitOr) for a in call.args)


def _no_structure(name: str, source: str, pieces: list[_Piece]) -> FormulaError:
    close = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"did you mean `{close[0]}( ... | group)`? Else " if close else ""
    return _error_at(
        f"a random term cannot stand inside `{name}()`, which names no covariance structure: "
        f"{hint}write `( ... | group)`, `( ... || group)` for independent effects, or one of "
        f"{', '.join(NAMES)} before the parentheses",
        source,
        pieces,
    )


_CALL = re.compile(r"([^\W\d][\w.]*)\s*\(")


def _arguments(source: str, start: int, end: int) -> tuple[str, list[tuple[int, int]]]:
    """A call source[start:end] -> its name, and the place of each argument.

    No argument for an expression that is not just one call.
    """
    call = _CALL.match(source, start, end)
    if call is None or source[end - 1] != ")":
        return "", []
    cuts = [call.end() - 1]
    for i, char, depth in _outside_quotes(source, start, end):
        if char == "," and depth == 1:
            cuts.append(i)
        elif char == ")" and depth == 0 and i < end - 1:
            return "", []
    cuts.append(end - 1)
    return call[1], [(a + 1, b) for a, b in pairwise(cuts)]


def _outside_quotes(source: str, start: int, end: int) -> Iterator[tuple[int, str, int]]:
    """Characters of balanced text that are not quoted: place, character, depth after it."""
    depth = 0
    i = start
    while i < end:
        if quoted := QUOTED.match(source, i, end):
            i = quoted.end()
            continue
        depth += (source[i] in "([{") - (source[i] in ")]}")
        yield i, source[i], depth
        i += 1


def _trimmed(source: str, start: int, end: int) -> tuple[int, int]:
    """A place without the blanks and parentheses around it."""
    while True:
        while start < end and source[start].isspace():
            start += 1
        while start < end and source[end - 1].isspace():
            end -= 1
        closed = [i for i, char, depth in _outside_quotes(source, start, end) if depth == 0]
        if not (start < end and source[start] == "(" and closed == [end - 1]):
            return start, end
        start, end = start + 1, end - 1


def _is_structured(piece: _Piece, source: str) -> bool:
    """Whether a piece is a random term with a named covariance, `cs( ... | group)`.

    Raises:
        FormulaError: if it looks like one, but the name is unknown.
    """
    if piece.kind is not Token.Kind.PYTHON:
        return False
    name, arguments = _arguments(source, piece.start, piece.end)
    if not arguments or name == "I":
        return False
    start, end = _trimmed(source, *arguments[0])
    if not any(c == "|" and depth == 0 for _, c, depth in _outside_quotes(source, start, end)):
        return False
    if name not in NAMES:
        raise _no_structure(name, source, [piece])
    return True


_HOM = re.compile(r"hom\s*=\s*(TRUE|True|FALSE|False)")


def _structured_terms(piece: _Piece, source: str) -> list[RandomTerm]:
    """A piece `cs( ... | group, hom=True)` -> random terms."""
    name, arguments = _arguments(source, piece.start, piece.end)
    hom = None
    for start, end in arguments[1:]:
        start, end = _trimmed(source, start, end)
        match = _HOM.fullmatch(source, start, end)
        if match is None or hom is not None:
            raise _error(
                f"`{name}()` takes a random term and, at most, `hom=True` or `hom=False`",
                source,
                start,
                end,
            )
        hom = match[1].upper() == "TRUE"
    try:
        structure = covariance(name, hom=hom)
    except ValueError as error:
        raise _error(str(error), source, *_trimmed(source, *arguments[1])) from None
    return _random_terms(_pieces(source, *_trimmed(source, *arguments[0])), source, structure)


def _render(pieces: list[_Piece]) -> str:
    """Pieces -> text with canonical spacing: `a:b`, `x**2`, `-1`, otherwise ` + `."""
    out = ""
    previous: _Piece | None = None
    for piece in pieces:
        if piece.kind is Token.Kind.OPERATOR:
            unary = previous is None or previous.is_op("+", "-") or previous.text == "("
            tight = piece.text in (":", "**", "^", "/") or unary
            out += piece.text if tight else f" {piece.text} "
        else:
            # Two operands side by side: keep them apart, so that formulaic sees the mistake.
            apart = previous is not None and (
                previous.kind not in (Token.Kind.OPERATOR, Token.Kind.CONTEXT)
                or previous.text == ")"
            )
            out += f" {piece.text}" if apart and piece.text != ")" else piece.text
        previous = piece
    return out


def _inside(pieces: list[_Piece]) -> list[_Piece] | None:
    """The pieces inside a pair of parentheses that encloses them all, else None."""
    if len(pieces) < 2 or pieces[0].text != "(" or pieces[-1].text != ")":
        return None
    depth = 0
    for piece in pieces[:-1]:
        if piece.kind is Token.Kind.CONTEXT:
            depth += 1 if piece.text == "(" else -1
        if depth == 0:
            return None
    return pieces[1:-1]


def _depths(pieces: list[_Piece]) -> Iterator[tuple[_Piece, int]]:
    depth = 0
    for piece in pieces:
        if piece.kind is Token.Kind.CONTEXT:
            depth += 1 if piece.text == "(" else -1
        yield piece, depth


def _summands(pieces: list[_Piece], source: str) -> Iterator[tuple[list[_Piece], list[_Piece]]]:
    """Cut at top-level `+` and `-`; yields (signs, summand)."""
    signs: list[_Piece] = []
    summand: list[_Piece] = []
    for piece, depth in _depths(pieces):
        if depth == 0 and piece.is_op("+", "-") and not (summand and summand[-1].is_op()):
            if summand:
                yield signs, summand
                signs, summand = [], []
            signs.append(piece)
        else:
            summand.append(piece)
    if not summand:
        raise _error_at("nothing follows this operator", source, (signs or pieces)[-1:])
    yield signs, summand


def _group_names(pieces: list[_Piece], source: str) -> list[str]:
    """Grouping part of a random term -> grouping factors: `a/b` gives `a` and `a:b`."""
    inner = _inside(pieces)
    if inner:
        pieces = inner
    nested: list[list[str]] = [[]]
    for i, piece in enumerate(pieces):
        if i % 2:
            ok = piece.is_op(":", "/")
            if piece.text == "/":
                nested.append([])
        else:
            # Any grouping column is taken as categories, so `factor(g)` is `g`.
            call = _FACTOR_OF_NAME.fullmatch(piece.text)
            name = call[1] if call else piece.text
            ok = piece.kind is Token.Kind.NAME or call is not None
            nested[-1].append(name)
        if not ok:
            break
    else:
        if len(pieces) % 2:
            flat: list[str] = []
            groups = []
            for names in nested:
                flat += names
                groups.append(":".join(flat))
            return groups
    hint = "for anything else, make a column first"
    if any(piece.is_op("+", "*") for piece in pieces):
        hint = "for several grouping factors write one term for each, `(1 | a) + (1 | b)`"
    raise _error_at(
        f"the grouping part `{_render(pieces)}` must be names joined by `:` or `/`; {hint}",
        source,
        pieces,
    )


def _random_terms(
    inner: list[_Piece], source: str, structure: Covariance | None = None
) -> list[RandomTerm]:
    """The pieces inside `( ... | group)` or `cs( ... | group)` -> random terms."""
    bars = [i for i, (piece, _) in enumerate(_depths(inner)) if piece.is_op("|", "||")]
    if len(bars) > 1:
        raise _error_at(
            "a bar inside a bar: each random term has one bar, `( ... | group)`",
            source,
            [inner[bars[1]]],
        )
    bar = inner[bars[0]]
    if structure is not None and bar.text == "||":
        raise _error_at(
            "two bars stand for independent effects, but the covariance has a name already: "
            "write one bar",
            source,
            [bar],
        )
    for piece in inner:
        if _is_structured(piece, source):
            raise _error_at(
                "a bar inside a bar: each random term has one bar, `( ... | group)`",
                source,
                [piece],
            )
    left, right = inner[: bars[0]], inner[bars[0] + 1 :]
    if not left:
        raise _error_at(
            f"nothing stands left of the bar: write `(1 {bar.text} group)` for a random intercept",
            source,
            [bar],
        )
    if not right:
        raise _error_at(
            f"nothing stands right of the bar: write the grouping factor, `(... {bar.text} group)`",
            source,
            [bar],
        )
    for piece in left:
        if _is_offset(piece):
            raise _error_at("an offset cannot be part of a random term", source, [piece])
    design = _render(left)
    if not parse_terms(design):
        raise _error_at(
            f"`{design}` leaves the random term without any effect: write `1` or a variable",
            source,
            left,
        )
    if structure is None:
        structure = covariance("diag" if bar.text == "||" else "us")
    return [RandomTerm(design, group, structure) for group in _group_names(right, source)]


def _outer_bar_groups(pieces: list[_Piece]) -> list[_Piece]:
    """The innermost parenthesised group around the first bar, or that bar alone."""
    opened: list[int] = []
    start = None
    for i, piece in enumerate(pieces):
        if piece.text == "(":
            opened.append(i)
        elif piece.text == ")":
            at = opened.pop()
            if start is not None and at == start:
                return pieces[at : i + 1]
        elif piece.is_op("|", "||") and start is None:
            if not opened:
                return [piece]
            start = opened[-1]
    return pieces


def parse_formula(text: str, *, evaluate: Evaluate = "python") -> ModelSpec:
    """Read a model formula in lme4's notation.

    A formula is code: its expressions run as Python when the model meets data, though not here. For
    text of others use ``evaluate="safe"``.

    Besides what formulaic reads (`a*b`, `a:b`, `poly()`, `bs()`, `C()`, any Python expression in
    a call), the right-hand side takes random terms `(design | group)`, `(design || group)` and
    `offset(expression)`. `(1 | a/b)` stands for `(1 | a) + (1 | a:b)`. The name of a covariance
    structure may stand before a random term, `ar1(0 + f | group)`, with `hom=True` or `hom=False`
    after the group, `cs(0 + f | group, hom=True)`; see `lmmax.covariances` for the names. Names
    that are not plain words go in backticks. The R spellings `I(x^2)`, `TRUE`, `FALSE` and
    `factor(x)` are understood.

    Args:
        text: the formula, for instance `"Reaction ~ Days + (Days | Subject)"`.
        evaluate: how expressions are evaluated later, "python" or "safe"; see `ModelSpec`.

    Returns:
        The model specification; equal text gives the same object.

    Raises:
        FormulaError: for text that is not such a formula; the message points at the place.

    Example:
        >>> parse_formula("Weight ~ Time + (1 | Litter/Pig)").random
        (RandomTerm(design='1', group='Litter', covariance='us'), \
RandomTerm(design='1', group='Litter:Pig', covariance='us'))
    """
    if not isinstance(text, str):
        raise TypeError(f"a formula must be a string, not {type(text).__name__}")
    check_evaluate(evaluate)
    return _parse_formula(text, evaluate)


def with_evaluate(formula: str | ModelSpec, evaluate: Evaluate) -> ModelSpec:
    """A formula or specification as a specification; one that is safe stays so."""
    if isinstance(formula, ModelSpec):
        check_evaluate(evaluate)
        return formula if evaluate == "python" else replace(formula, evaluate=evaluate)
    return parse_formula(formula, evaluate=evaluate)


@lru_cache(maxsize=1024)
def _parse_formula(text: str, evaluate: Evaluate) -> ModelSpec:
    source = re.sub(r"\s", " ", text).rstrip()
    if len(source) > _LONGEST:
        raise _error(f"a formula has at most {_LONGEST} characters", source, _LONGEST, len(source))
    try:
        with warnings.catch_warnings():
            # Of Python about the text of expressions.
            warnings.simplefilter("ignore")
            return replace(_read_formula(source, evaluate), evaluate=evaluate)
    except FormulaError:
        raise
    except (RecursionError, MemoryError):
        raise _error("nested too deeply", source, 0, len(source)) from None
    # Parts that the specification refuses, and what the tokenizer makes of odd characters.
    except (SyntaxError, ValueError) as error:
        raise _error(str(error).partition("\n")[0], source, 0, len(source)) from None
    except (LookupError, TypeError, AttributeError, AssertionError):
        raise _error("this is not a formula", source, 0, len(source)) from None


def _read_formula(source: str, evaluate: Evaluate) -> ModelSpec:
    _check_balance(source)
    for i, char, _ in _outside_quotes(source, 0, len(source)):
        if char == "#":
            raise _error("a formula has no comments: leave this out", source, i, len(source))
    pieces = _pieces(source)
    if evaluate == "safe":
        for piece in pieces:
            if piece.kind is Token.Kind.PYTHON and not _is_structured(piece, source):
                text = _offset_expression(piece, source) if _is_offset(piece) else piece.text
                try:
                    check_safe(text[1:-1] if text.startswith("{") else text)
                except ExpressionError as error:
                    raise _error_at(f"`{_short(text)}` {error}", source, [piece]) from None
    tildes = [i for i, piece in enumerate(pieces) if piece.is_op("~")]
    if not tildes:
        raise _error(
            "no `~` in the formula: write `response ~ fixed effects + ( ... | group)`",
            source,
            0,
            len(source),
        )
    if len(tildes) > 1:
        raise _error_at("a formula has one `~`, this is the second", source, [pieces[tildes[1]]])
    left, right = pieces[: tildes[0]], pieces[tildes[0] + 1 :]
    tilde = pieces[tildes[0]]
    if not left:
        raise _error_at("no response: a variable must stand left of `~`", source, [tilde])
    for piece in left:
        if _is_structured(piece, source):
            raise _error_at("a random term belongs to the right of `~`", source, [piece])
    _response(left, source)
    _check_notation(pieces, source)
    if not right:
        raise _error_at("nothing stands right of `~`", source, [tilde])

    fixed: list[_Piece] = []
    random: list[RandomTerm] = []
    offsets: list[str] = []
    for signs, summand in _summands(right, source):
        minus = [sign for sign in signs if sign.text == "-"]
        inner = _inside(summand)
        while inner is not None and (deeper := _inside(inner)) is not None:
            inner = deeper
        bars = [(piece, depth) for piece, depth in _depths(summand) if piece.is_op("|", "||")]
        core = inner or summand
        structured = [piece for piece in summand if _is_structured(piece, source)]
        barred = inner and any(d == 0 and p.is_op("|", "||") for p, d in _depths(inner))
        if barred or (structured and len(core) == 1):
            if minus:
                raise _error_at(
                    "a random term can be added but not taken away: leave it out instead",
                    source,
                    [minus[0], *summand],
                )
            terms = _random_terms(core, source) if barred else _structured_terms(core[0], source)
            for term in terms:
                if any(_same_term(term, other) for other in random):
                    raise _error_at(f"the random term `{term}` comes twice", source, summand)
                random.append(term)
        elif structured and not bars:
            raise _error_at(
                "a random term must be a summand of its own, `... + name( ... | group)`",
                source,
                structured[:1],
            )
        elif bars and bars[0][1] == 0:
            whole = _render(summand)
            raise _error_at(f"a random term needs parentheses: write `({whole})`", source, summand)
        elif bars:
            raise _error_at(
                "a random term must be a summand of its own, `... + ( ... | group)`",
                source,
                _outer_bar_groups(summand),
            )
        elif any(_is_offset(piece) for piece in summand):
            if len(summand) > 1 or minus:
                raise _error_at(
                    "an offset must be a summand of its own, `... + offset(...)`; put any "
                    "arithmetic inside its parentheses",
                    source,
                    summand,
                )
            expression = _offset_expression(summand[0], source)
            if expression in offsets:
                raise _error_at(f"the offset `{expression}` comes twice", source, summand)
            offsets.append(expression)
        else:
            if fixed or minus:
                fixed += signs
            fixed += summand
    if not random:
        raise _error(
            "no random term in the formula: `fit` needs at least one `( ... | group)`, for "
            "instance `(1 | group)`",
            source,
            len(source),
            len(source) + 1,
        )
    spec = ModelSpec(_render(left), _render(fixed) or "1", tuple(random), tuple(offsets))
    parse_terms(spec.fixed)
    return spec


def _check_notation(pieces: list[_Piece], source: str) -> None:
    """Raise for notation that R, or Python, reads in another way than a formula does here."""
    for piece, following in pairwise([*pieces, *pieces[-1:]]):
        if piece.text == ".":
            raise _error_at("`.` is not supported: name the variables", source, [piece])
        if piece.text == "%in%":
            raise _error_at("`%in%` is not supported: write `a:b`, or `a/b`", source, [piece])
        if piece.kind is not Token.Kind.OPERATOR and piece.text == "1" and following.is_op("/"):
            raise _error_at(
                "`/` in a formula nests and does not divide: write `I(1/x)` for a reciprocal",
                source,
                [piece, following],
            )
        if piece.kind is Token.Kind.OPERATOR and piece.text == "=":
            raise _error_at("`=` is no operator: a model is written with `~`", source, [piece])
        if piece.kind is Token.Kind.OPERATOR and set(piece.text) & set("<>=!&"):
            raise _error_at(
                "comparisons go inside `I(...)`, for instance `I(x > 0)`", source, [piece]
            )


def _same_term(a: RandomTerm, b: RandomTerm) -> bool:
    return (
        a.design == b.design
        and a.covariance == b.covariance
        and set(a.group_names) == set(b.group_names)
    )


def _is_offset(piece: _Piece) -> bool:
    return piece.kind is Token.Kind.PYTHON and re.match(r"offset\s*\(", piece.text) is not None


def _offset_expression(piece: _Piece, source: str) -> str:
    expression = piece.text.split("(", 1)[1].rstrip()[:-1].strip()
    if not expression:
        raise _error_at("this offset is empty", source, [piece])
    return expression


# What stands between the operands of a response that is arithmetic: on the right of `~` all of
# these take terms away or cross them, and read so on the left they would leave a variable as it is.
_ARITHMETIC = ("-", "**", "^")


@lru_cache(maxsize=4096)
def parse_response(text: str) -> Factor:
    """The left-hand side of a formula as one factor.

    Differences and powers are arithmetic, as in R: `y - base`, `y^2`. Sums, products, quotients
    and interactions would be several variables to some, so they must be calls, `I(a + b)`.

    Raises:
        FormulaError: for what is neither one variable, nor one call, nor such arithmetic.

    Example:
        >>> parse_response("y^2").expr, parse_response("log(y)").expr
        ('y**2', 'log(y)')
    """
    source = re.sub(r"\s", " ", text).rstrip()
    _check_balance(source)
    return _response(_pieces(source), source)


def is_arithmetic(text: str) -> bool:
    """Whether a left-hand side has operators outside of calls.

    Example:
        >>> is_arithmetic("(y - base)"), is_arithmetic("I(y - base)"), is_arithmetic("y")
        (True, False, False)
    """
    try:
        _check_balance(text)
        pieces = _pieces(text)
    except FormulaError:
        return False
    return len(pieces) > 1 and any(piece.kind is Token.Kind.OPERATOR for piece in pieces)


def _response(pieces: list[_Piece], source: str) -> Factor:
    """The pieces left of `~` -> one factor; see `parse_response`."""
    core = pieces
    while (inner := _inside(core)) is not None:
        core = inner
    operators = [piece for piece in core if piece.kind is Token.Kind.OPERATOR]
    if len(core) == 1 and not operators:
        try:
            factors = [
                factor for term in parse_terms(f"0 + {core[0].text}") for factor in term.factors
            ]
        except FormulaError:
            factors = []
        if len(factors) == 1 and factors[0].eval_method is not Factor.EvalMethod.LITERAL:
            return factors[0]
    elif (
        operators and core[0] is not operators[0] and all(o.is_op(*_ARITHMETIC) for o in operators)
    ):
        expression = from_r(_render([replace(piece, text=_operand(piece)) for piece in core]))
        if _is_expression(expression) and any(expression_names(expression)):
            return Factor(expression, eval_method=Factor.EvalMethod.PYTHON)
    raise _error_at(
        "the response must be one variable or one call"
        + (f": write `I({_render(pieces)})` for arithmetic" if len(pieces) > 1 else ""),
        source,
        pieces,
    )


def _operand(piece: _Piece) -> str:
    """A piece as Python reads it: a name with a dot in it would be an attribute, `{x}` a set."""
    if piece.kind is Token.Kind.NAME and not piece.text.startswith("`"):
        return piece.text if piece.text.isidentifier() else f"`{piece.text}`"
    return f"({piece.text[1:-1]})" if piece.text.startswith("{") else piece.text


def _is_expression(text: str) -> bool:
    """Whether Python can read a text in which names may stand in backticks."""
    try:
        read_expression(text)
    except ExpressionError:
        return False
    return True


def _translate(error: Exception, source: str) -> FormulaError:
    """Formulaic's own syntax error -> ours: same words, a caret in place of colours."""
    message, _, context = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).partition("\n\n")
    message = message[:1].lower() + message[1:].rstrip(".")
    start = context.find("⧛")
    if start < 0:
        return _error(message, source, 0, len(source))
    length = context.find("⧚") - start - 1
    return _error(message, context.replace("⧛", "").replace("⧚", ""), start, start + length)


_TAKEN = ("`1`", "`~`")
"""Names that formulaic takes for the intercept, and for a formula of two sides."""


@lru_cache(maxsize=4096)
def parse_terms(text: str) -> tuple[Term, ...]:
    """Right-hand side without random terms -> formulaic terms, main effects first.

    Raises:
        FormulaError: if formulaic cannot read the text, or reads a name as what it means without
            its backticks.
    """
    if any(name in text for name in _TAKEN):
        for piece in _pieces(text):
            if piece.text in _TAKEN:
                raise _error_at(
                    f"a column named {piece.text[1:-1]!r} cannot be a term by itself: rename it, "
                    f"or write `I({piece.text})`",
                    text,
                    [piece],
                )
    try:
        with warnings.catch_warnings():
            # Of Python about the text of expressions.
            warnings.simplefilter("ignore")
            return tuple(Formula(from_r(text), _parser=PARSER))
    except FormulaicError as error:
        raise _translate(error, text) from None
    except (RecursionError, MemoryError):
        raise _error("nested too deeply", text, 0, len(text)) from None
    # formulaic lets through what Python and its own algorithms raise for text that is no formula.
    except (SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        raise _error("this is not a formula", text, 0, len(text)) from None


def is_factor_of(expression: str, name: str) -> bool:
    """Whether an expression is `C(...)` of a name."""
    call = re.match(r"C\(\s*(`[^`]+`|[^\W\d]\w*)\s*[,)]", expression)
    return call is not None and call[1].strip("`") == name
