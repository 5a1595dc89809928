"""What `*`, `:`, `/`, `%in%` and powers make of terms: formulaic's results, with an end in sight.

formulaic multiplies out `(a + b)^n` as a product of n sums, 2^n tuples. Here powers grow by one sum
at a time, until they no longer do, and what would not fit any model is refused before it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from functools import reduce
from itertools import chain, product
from typing import Any, TypeAlias

from formulaic.errors import FormulaParsingError
from formulaic.parser import DefaultFormulaParser, DefaultOperatorResolver
from formulaic.parser.types import Operator, OrderedSet, Term, Token

__all__ = ["MOST_TERMS", "PARSER"]

MOST_TERMS = 2048
"""Most terms that one operator may make: all interactions of eleven variables."""
_MOST_PRODUCTS = 150_000
"""Most products of terms in one part of a formula, half a second's work."""
_SPENT = "__lmmax_products__"

Terms: TypeAlias = "OrderedSet[Term]"


def _products(left: Iterable[Term], right: Iterable[Term], context: Any) -> Terms:
    """All products of two sums, each once, where its first occurrence stands."""
    left, right = list(left), list(right)
    _spend(len(left) * len(right), context)
    return _limited(OrderedSet(a * b for a, b in product(left, right)))


def _spend(products: int, context: MutableMapping[str, Any]) -> None:
    context[_SPENT] = context.get(_SPENT, 0) + products
    if context[_SPENT] > _MOST_PRODUCTS:
        raise FormulaParsingError(
            f"The products and powers of sums stand for more than {MOST_TERMS} terms: name the "
            "interactions that are meant."
        )


def _limited(terms: Terms) -> Terms:
    if len(terms) > MOST_TERMS:
        raise FormulaParsingError(
            f"A product or power of sums stands for more than {MOST_TERMS} terms: name the "
            "interactions that are meant."
        )
    return terms


def _interactions(left: Terms, right: Terms, *, context: Any) -> Terms:
    return _products(left, right, context)


def _crossed(left: Terms, right: Terms, *, context: Any) -> Terms:
    crossed = _products(left, right, context)
    return _limited(OrderedSet(chain(left, right, crossed)))


def _nested(parents: Terms, nested: Terms, *, context: Any) -> Terms:
    common = reduce(lambda a, b: a * b, parents, Term([]))
    return _limited(OrderedSet(chain(parents, _products([common], nested, context))))


def _in(nested: Terms, parents: Terms, *, context: Any) -> Terms:
    return _nested(parents, nested, context=context)


def _power(terms: Terms, power: Terms, *, context: Any) -> Terms:
    """`(a + b)^n`: a term times itself is itself, so beyond some n there is nothing new."""
    exponent: tuple[Any, ...] = next(iter(power)).factors if len(power) == 1 else ()
    text = exponent[0].expr if len(exponent) == 1 else ""
    token = exponent[0].token if len(exponent) == 1 else None
    number = token is not None and token.kind is Token.Kind.VALUE
    digits = text.lstrip("0")
    if not (number and text.isascii() and text.isdigit() and digits):
        raise FormulaParsingError(
            "The right-hand argument of a power must be a positive integer: write `I(x**p)` for "
            "arithmetic."
        )
    most = int(digits[:9])
    found = terms
    for _ in range(most - 1):
        larger = _products(found, terms, context)
        if len(larger) == len(found):
            break
        found = larger
    return found


_BOUNDED: dict[str, Callable[..., Terms]] = {
    ":": _interactions,
    "*": _crossed,
    "/": _nested,
    "in": _in,
    "**": _power,
    "^": _power,
}


class _Operators(DefaultOperatorResolver):  # type: ignore[misc]
    @property
    def operators(self) -> list[Operator]:
        return [
            Operator(
                operator.symbol,
                arity=operator.arity,
                precedence=operator.precedence,
                associativity=operator.associativity,
                to_terms=_BOUNDED[operator.symbol],
            )
            if operator.symbol in _BOUNDED
            else operator
            for operator in super().operators
        ]


PARSER = DefaultFormulaParser(operator_resolver=_Operators(), feature_flags={"TWOSIDED"})
"""Reads a part of a formula that has no random terms."""
