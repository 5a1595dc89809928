"""Text that is no formula, or asks for too much, is refused at once and without a warning."""

import random
import time
import warnings

import pytest

import lmmax
from lmmax.characters import neutral, one_wide, visible
from lmmax.formula import FormulaError, parse_formula, parse_terms

SUMS = "+".join(f"v{i}" for i in range(40))

REFUSED = {
    "too many terms": [
        f"y ~ ({SUMS})^50 + (1|g)",
        f"y ~ ({SUMS})**3 + (1|g)",
        "y ~ " + "*".join(f"v{i}" for i in range(60)) + " + (1|g)",
        f"y ~ ({SUMS}):({SUMS}):({SUMS}) + (1|g)",
        f"y ~ 1 + (({SUMS})^9 | g)",
    ],
    "exponent": ["y ~ x**0 + (1|g)", "y ~ x^a + (1|g)", "y ~ x^(-1) + (1|g)", "y ~ x^2.5 + (1|g)"],
    "names": ["y ~ x + (1 | 1g)", "y ~ x + (1 | .g)", "y ~ `offset(x)a` + (1 | g)"],
    "nesting": [
        "y ~ " + "(" * 5000 + "x" + ")" * 5000 + " + (1|g)",
        f"y ~ I({'-' * 9000}x) + (1|g)",
    ],
    "characters": ["y ~ I(x\x00) + (1|g)", "y ~ I('\ud800' x) + (1|g)", "y ~ \x1b[2J + (1|g)"],
    "numbers": [f"y ~ I({'9' * 9000}x) + (1|g)", f"y ~ I({'9' * 9000}) + (1|g)"],
    "length": ["y ~ " + "x" * 300_000 + " + (1|g)"],
}


@pytest.mark.parametrize("text", [t for family in REFUSED.values() for t in family])
def test_refused_at_once(text):
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FormulaError, match=r"\^") as caught:
            parse_formula(text)
    assert time.process_time() - start < 1
    message = str(caught.value)
    assert message.count("\n") == 3 and len(message) < 1000 and message == visible(message, True)


@pytest.mark.parametrize("n", [2, 3, 50, 99999])
def test_powers_are_all_interactions(n):
    degree = min(n, 3)
    terms = [str(term) for term in parse_terms(f"(a + b + c)^{n}")]
    assert terms == ["1", "a", "b", "c", "a:b", "a:c", "b:c", *(["a:b:c"] if degree == 3 else [])]


def test_mutations():
    chance = random.Random(1)
    whole = "y ~ x*z + poly(x, 2) + C(f, contr.sum) + I(x > 0) + offset(log(w)) + ar1(0 + f | g/h)"
    bits = "()[]{}'\"`|~+-*/:^%,.\\\n\x00\tλ😀0123 =<>@#$!&;"
    words = [
        "lambda:0",
        "x:=1",
        "[i for i in x]",
        "f'{x}'",
        "None",
        "in",
        "'\\d'",
        "1 is 1",
        "**99",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(1500):
            text = list(whole)
            for _ in range(chance.randint(1, 4)):
                at = chance.randrange(len(text) + 1)
                new = chance.choice(words) if chance.random() < 0.2 else chance.choice(bits)
                text[at : at + chance.randint(0, 3)] = [new]
            try:
                parse_formula("".join(text))
            except FormulaError as error:
                assert "^" in str(error)


@pytest.mark.parametrize(
    "term",
    [
        "I(exit())",
        "I(quit(1))",
        "I(exec('raise SystemExit') or x)",
        "I(exec('raise KeyboardInterrupt'))",
    ],
)
def test_a_formula_does_not_end_the_program(term):
    data = {"y": [1.0, 2, 3, 5], "x": [1.0, 2, 2, 1], "g": [1, 1, 2, 2]}
    with pytest.raises(FormulaError, match="cannot end the program"):
        lmmax.fit(f"y ~ {term} + (1 | g)", data)


def test_characters():
    assert visible("a\x1b[2J\u202eb") == "a\\x1b[2J\\u202eb"
    assert visible("a\nb", lines=True) == "a\nb"
    assert len(one_wide("a\x1bb")) == 3
    assert [neutral(c + "1") for c in "=+-@\t\r"] == ["'" + c + "1" for c in "=+-@\t\r"]
