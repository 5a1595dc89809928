"""Formula text -> ModelSpec."""

from __future__ import annotations

import pickle

import pytest

from lmmax.covariances import CompoundSymmetry, Diagonal, OrnsteinUhlenbeck
from lmmax.formula import FormulaError, expression_names, parse_formula, parse_terms
from lmmax.spec import ModelSpec, RandomTerm


def us(design, group):
    return RandomTerm(design, group)


def diag(design, group):
    return RandomTerm(design, group, "diag")


def term(covariance, design="0 + f", group="g"):
    return RandomTerm(design, group, covariance)


@pytest.mark.parametrize(
    ("text", "fixed", "random"),
    [
        ("y ~ x + (1|g)", "x", [us("1", "g")]),
        ("y ~ x + (x|g)", "x", [us("x", "g")]),
        ("y~1+x+(1+x|g)", "1 + x", [us("1 + x", "g")]),
        ("y ~ (0 + x | g)", "1", [us("0 + x", "g")]),
        ("y ~ x + (x || g)", "x", [diag("x", "g")]),
        ("y ~ x + (f|g)", "x", [us("f", "g")]),
        ("y ~ x + (1|g) + (0 + x|g)", "x", [us("1", "g"), us("0 + x", "g")]),
        ("y ~ (1|g) + x + z", "x + z", [us("1", "g")]),
        ("y ~ x + (1|g) - 1", "x - 1", [us("1", "g")]),
        ("y ~ (1|g) - 1", "-1", [us("1", "g")]),
        ("y ~ -1 + x + (1|g)", "-1 + x", [us("1", "g")]),
        ("y ~ 0 + (1|g)", "0", [us("1", "g")]),
        ("y ~ + x + (1|g)", "x", [us("1", "g")]),
        ("y ~ a*b + (a:b|g)", "a * b", [us("a:b", "g")]),
        ("y ~ (a + b)**2 + (1|g)", "(a + b)**2", [us("1", "g")]),
        ("y ~ (1|a:b)", "1", [us("1", "a:b")]),
        ("y ~ (1|(a:b))", "1", [us("1", "a:b")]),
        ("y ~ (1|a/b)", "1", [us("1", "a"), us("1", "a:b")]),
        ("y ~ (x||a/b/c)", "1", [diag("x", "a"), diag("x", "a:b"), diag("x", "a:b:c")]),
        ("y ~ (1|a:b/c)", "1", [us("1", "a:b"), us("1", "a:b:c")]),
        ("y ~ ((1|g))", "1", [us("1", "g")]),
        ("y ~ x + (poly(x, 2)|g)", "x", [us("poly(x, 2)", "g")]),
        ("y ~ bs(x, df=4):f + (1 + np.log(x)|g)", "bs(x, df=4):f", [us("1 + np.log(x)", "g")]),
        ("y ~ C(f, contr.sum) + (1|g)", "C(f, contr.sum)", [us("1", "g")]),
        ("y ~ `my x`*z + (`my x`|`my g`:h)", "`my x` * z", [us("`my x`", "`my g`:h")]),
        ("y ~ my.x + (1|my.g)", "my.x", [us("1", "my.g")]),
        ("y ~\n  x\n  + (1|g)", "x", [us("1", "g")]),
        ("y ~ I(a | b) + (1|g)", "I(a | b)", [us("1", "g")]),
        ("y ~ C(f, Treatment('a|b ~')) + (1|g)", "C(f, Treatment('a|b ~'))", [us("1", "g")]),
    ],
)
def test_parts(text, fixed, random):
    spec = parse_formula(text)
    assert spec == ModelSpec("y", fixed, random)
    assert parse_formula(spec.formula) == spec


@pytest.mark.parametrize(
    ("text", "offsets"),
    [
        ("y ~ x + offset(o) + (1|g)", ("o",)),
        ("y ~ offset(log(n)) + (1|g) + offset(o)", ("log(n)", "o")),
        ("y ~ (1|g) + offset(n^2 + `a b`)", ("n**2 + `a b`",)),
    ],
)
def test_offsets(text, offsets):
    spec = parse_formula(text)
    assert spec.offsets == offsets
    assert "offset" not in spec.fixed
    assert parse_formula(spec.formula) == spec


@pytest.mark.parametrize(
    ("text", "response"),
    [
        ("np.log(Reaction) ~ Days + (1|g)", "np.log(Reaction)"),
        ("I(y + z) ~ (1|g)", "I(y + z)"),
        ("`my y` ~ (1|g)", "`my y`"),
    ],
)
def test_response(text, response):
    assert parse_formula(text).response == response


@pytest.mark.parametrize(
    ("r", "python"),
    [
        ("I(x^2)", "I(x**2)"),
        ("I(2*x^2)", "I(2*x**2)"),
        ("factor(f)", "C(f)"),
        ("as.factor(f)", "C(f)"),
        ("poly(x, 2, raw = TRUE)", "poly(x, 2, raw = True)"),
        ("poly(x, 2, raw=FALSE)", "poly(x, 2, raw=False)"),
        ("np.log(`a^b TRUE factor(`)", "np.log(`a^b TRUE factor(`)"),
        ("C(f, Treatment('x^2'))", "C(f, Treatment('x^2'))"),
        ("my_factor(x)", "my_factor(x)"),
    ],
)
def test_r_spellings(r, python):
    assert parse_formula(f"y ~ {r} + (1|g)").fixed == python
    assert parse_formula(f"y ~ ({r} | g)").random[0].design == python
    assert parse_terms(r) == parse_terms(python)


@pytest.mark.parametrize(
    ("text", "random"),
    [
        ("us(1 + x | g)", [us("1 + x", "g")]),
        ("diag(1 + x | g)", [diag("1 + x", "g")]),
        ("cs(0 + f|g)", [term("cs")]),
        ("csh(0 + f|g)", [term("cs")]),
        ("homcs(0 + f|g)", [term("homcs")]),
        ("cs(0 + f|g, hom=True)", [term("homcs")]),
        ("cs(0 + f|g,hom = FALSE)", [term("cs")]),
        ("diag(0 + f|g, hom = TRUE)", [term("homdiag")]),
        ("id(0 + f|g)", [term("homdiag")]),
        ("ar1(0 + f|g)", [term("ar1")]),
        ("ar1(0 + f|g, hom = FALSE)", [term("hetar1")]),
        ("ar1h(0 + f|g)", [term("hetar1")]),
        ("toep(0 + f|g)", [term("toep")]),
        ("toep(0 + f|g, hom=True)", [term("homtoep")]),
        ("ou(0 + as.factor(t)|g)", [term("ou", "0 + C(t)")]),
        ("cs(0 + f|a/b)", [term("cs", group="a"), term("cs", group="a:b")]),
        ("cs(0 + f|(a/b), hom=True)", [term("homcs", group=g) for g in ("a", "a:b")]),
        ("us(poly(x, 2, raw=TRUE)|a:b)", [us("poly(x, 2, raw=True)", "a:b")]),
        ("us(I(a | b) + `a|b,`|`my g`)", [us("I(a | b) + `a|b,`", "`my g`")]),
        ("us(C(f, Treatment('a|,'))|g)", [us("C(f, Treatment('a|,'))", "g")]),
        ("us((x | g)) + (cs(0 + f|g))", [us("x", "g"), term("cs")]),
        ("us(x|g) + (1|h) + us(1|g)", [us("x", "g"), us("1", "h"), us("1", "g")]),
        ("us( x\n | g\n)", [us("x", "g")]),
    ],
)
def test_named_covariances(text, random):
    spec = parse_formula(f"y ~ x + {text}")
    assert spec == ModelSpec("y", "x", random)
    assert parse_formula(spec.formula) == spec


def test_a_structure_without_a_bar_is_a_function():
    spec = parse_formula("y ~ cs(x, df=3) + id(z) + (1 + cs(x, 3)|g)")
    assert (spec.fixed, spec.random) == ("cs(x, df=3) + id(z)", (us("1 + cs(x, 3)", "g"),))


def test_several_grouping_factors():
    spec = parse_formula("y ~ (x|a) + (1|b:c) + (1|d) + (0 + x|c:b) + (0 + z|a)")
    assert spec.group_columns == (("a",), ("b", "c"), ("d",))
    assert [spec.grouping_of(term) for term in spec.random] == [0, 1, 2, 1, 0]


def test_factor_of_a_grouping_column_is_the_column():
    assert parse_formula("y ~ (1|factor(g)/as.factor(h))") == parse_formula("y ~ (1|g/h)")


REFERENCE = """
weight ~ Time * Diet + (Time | Rat)
angle ~ C(recipe, contr.sum) * C(temperature, contr.sum) + (1 | recipe:replicate)
angle ~ recipe + temp + (1 | replicate) + (0 + temp | replicate) + (1 | recipe:replicate)
Weight ~ Cu * Time + Evit + (1 | Litter/Pig)
Weight ~ Time + I(Time**2) + (1 + Time + I(Time**2) | Pig)
Weight ~ poly(Time, degree=2, raw=True) + (1 + Time | Pig)
y ~ 1 + service + (1 | s) + (1 | d) + (1 | dept) + (0 + service | dept)
distance ~ I(age - 11) * Sex + (I(age - 11) || Subject)
height ~ age + I(age**2) + (age + I(age**2) || Subject)
np.log(Reaction) ~ Days + (Days | Subject)
Reaction ~ Days + offset(off) + (1 | Subject)
y ~ x1 + x2 + x3 + (x1 + x2 + x3 || g)
""".strip().splitlines()


@pytest.mark.parametrize("text", REFERENCE)
def test_canonical_text_is_stable(text):
    spec = parse_formula(text)
    assert parse_formula(spec.formula) == spec
    if "/" not in text and "offset" not in text:
        assert spec.formula.replace(" ", "") == text.replace(" ", "")


def test_cached_and_picklable():
    spec = parse_formula("y ~ x + (1|g)")
    assert parse_formula("y ~ x + (1|g)") is spec
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message", "marked"),
    [
        ("y + x", "no `~`", "y + x"),
        ("", "no `~`", ""),
        ("~ x + (1|g)", "no response", "~"),
        ("y ~", "nothing stands right of `~`", "~"),
        ("y ~ x", r"`fit` needs at least one `\( \.\.\. \| group\)`", ""),
        ("y ~ x*(1|g)", "a summand of its own", "(1|g)"),
        ("y ~ x + (1|g):x", "a summand of its own", "(1|g)"),
        ("y ~ x (1|g)", "a summand of its own", "(1|g)"),
        ("y ~ (x + (1|g))", "a summand of its own", "(1|g)"),
        ("y ~ x - (1|g)", "leave it out instead", "- (1|g)"),
        ("y ~ x + (1|g", r"'\(' is never closed", "("),
        ("y ~ (1|g) + log(x", r"'\(' is never closed", "("),
        ("y ~ x + 1|g)", r"'\)' closes nothing", ")"),
        ("y ~ x[0) + (1|g)", r"'\[' at position 6 is closed by '\)'", ")"),
        ("y ~ `x + (1|g)", "` is never closed", "`"),
        ("y ~ x + (|g)", r"write `\(1 \| group\)`", "|"),
        ("y ~ x + (1||)", "write the grouping factor", "||"),
        ("y ~ x + 1|g", r"needs parentheses: write `\(1 \| g\)`", "1|g"),
        ("y ~ (1 + (x|g) | h)", "a bar inside a bar", "|"),
        ("y ~ (1|g|h)", "a bar inside a bar", "|"),
        ("y ~ (0|g)", "without any effect", "0"),
        ("y ~ (1|a+b)", r"one term for each, `\(1 \| a\) \+ \(1 \| b\)`", "a+b"),
        ("y ~ (1|np.floor(x))", "make a column first", "np.floor(x)"),
        ("y ~ (1|1)", "must be names joined by `:` or `/`", "1"),
        ("y ~ (1|a:)", "must be names joined by `:` or `/`", "a:"),
        ("y ~ spam(1 + x|g)", r"inside `spam\(\)`, which names no .* us, diag", "spam(1 + x|g)"),
        ("y ~ spam(1 || g)", r"inside `spam\(\)`, which names no", "spam(1 || g)"),
        ("y ~ toepl(0 + f|g)", r"did you mean `toep\(", "toepl(0 + f|g)"),
        ("y ~ log(1|g)", r"cannot stand inside `log\(\)`", "log(1|g)"),
        ("y ~ log(cs(1|g))", "a summand of its own", "log(cs(1|g))"),
        ("y ~ cs(1||g) + x", "one bar", "||"),
        ("y ~ cs(1|g, hom=2)", "at most, `hom=True` or `hom=False`", "hom=2"),
        ("y ~ cs(1|g, TRUE)", "at most, `hom=True` or `hom=False`", "TRUE"),
        ("y ~ cs(1|g, hom=True, hom=True)", "at most", "hom=True"),
        ("y ~ us(1|g, hom=True)", "'us' takes no `hom`; 'diag'", "hom=True"),
        ("y ~ csh(1|g, hom=True)", "'csh' takes no `hom`", "hom=True"),
        ("y ~ cs(1|g):x", "a summand of its own", "cs(1|g)"),
        ("y ~ (x + cs(1|g))", "a summand of its own", "cs(1|g)"),
        ("y ~ x - cs(1|g)", "leave it out instead", "- cs(1|g)"),
        ("y ~ (cs(1|g)|h)", "a bar inside a bar", "cs(1|g)"),
        ("y ~ cs(x|us(1|g))", "a bar inside a bar", "us(1|g)"),
        ("y ~ cs(x|g|h)", "a bar inside a bar", "|"),
        ("y ~ cs(|g)", "nothing stands left", "|"),
        ("y ~ cs(x|)", "nothing stands right", "|"),
        ("y ~ cs(0|g)", "without any effect", "0"),
        ("y ~ cs(x|a + b)", "for several grouping factors", "a + b"),
        ("y ~ cs(f(x y)|g)", "is not a Python expression", "f(x y)"),
        ("y ~ cs([x]|g)", "square brackets", "["),
        ("cs(1|g) ~ x + (1|g)", "to the right of `~`", "cs(1|g)"),
        ("y ~ as.numeric(x) + (1|g)", "make a numeric column", "as.numeric(x)"),
        ("y ~ f(x, ) ) + (1|g)", r"'\)' closes nothing", ")"),
        ("y ~ f(x y) + (1|g)", "is not a Python expression", "f(x y)"),
        ("y ~ x z + (1|g)", "missing operator between `x` and `z`", "x z"),
        ("y ~ x + (1|g) +", "nothing follows this operator", "+"),
        ("y ~ x ~ z + (1|g)", "one `~`", "~"),
        ("y + z ~ (1|g)", r"write `I\(y \+ z\)`", "y + z"),
        ("1 ~ (1|g)", "one variable or one call", "1"),
        ("y ~ . + (1|g)", "name the variables", "."),
        ("y ~ [x] + (1|g)", "square brackets", "["),
        ("y ~ x:offset(o) + (1|g)", "an offset must be a summand", "x:offset(o)"),
        ("y ~ x - offset(o) + (1|g)", "an offset must be a summand", "offset(o)"),
        ("y ~ (x + offset(o)|g)", "cannot be part of a random term", "offset(o)"),
        ("y ~ offset() + (1|g)", "offset is empty", "offset()"),
        ("y ~ (1|g) + (1|g)", "comes twice", "(1|g)"),
        ("y ~ (1|g) + us(1|g)", "comes twice", "us(1|g)"),
        ("y ~ (1|a:b) + (1|b:a)", r"`\(1 \| b:a\)` comes twice", "(1|b:a)"),
        ("y ~ 3 + (1|g)", "numeric literals other than `1`", "3"),
        ("y ~ 'a' + (1|g)", "string literals", "'a'"),
    ],
)
def test_errors_point_at_the_place(text, message, marked):
    with pytest.raises(FormulaError, match=message) as caught:
        parse_formula(text)
    shown, caret = str(caught.value).split("\n")[-2:]
    start = caret.index("^")
    assert shown[start : start + caret.count("^")].strip() == marked
    assert set(caret) <= {" ", "^"}


def test_caret_in_a_formula_over_several_lines():
    with pytest.raises(FormulaError, match="never closed") as caught:
        parse_formula("y ~ x\n  + (1|g")
    shown, caret = str(caught.value).split("\n")[-2:]
    assert shown[caret.index("^")] == "("


def test_not_a_string():
    with pytest.raises(TypeError, match="must be a string, not int"):
        parse_formula(3)


def test_spec_by_hand():
    spec = ModelSpec("y", "1 + x", [RandomTerm("x", "`my g`:h", "diag")], ["log(n)"])
    assert isinstance(spec.random, tuple)
    assert spec.random[0].group_names == ("my g", "h")
    assert spec.formula == "y ~ 1 + x + (x || `my g`:h) + offset(log(n))"
    assert parse_formula(spec.formula) == spec
    assert hash(spec) == hash(parse_formula(spec.formula))


def test_covariance_by_hand():
    assert term("id") == term("homdiag") == term(Diagonal(hom=True))
    assert term("csh").covariance == term(CompoundSymmetry()).covariance == "cs"
    # An object that has learnt from data is not what its name stands for.
    ou = OrnsteinUhlenbeck((1.0, 2.0))
    assert term(ou).covariance is ou
    assert str(term(ou)) == "ou(0 + f | g)"
    assert pickle.loads(pickle.dumps(term(ou))) == term(ou)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RandomTerm("1", "g", "spam"), ValueError, "unknown .* 'spam': choose one of 'us'"),
        (lambda: RandomTerm("1", "g", None), TypeError, "a name or a Covariance object"),
        (lambda: RandomTerm("", "g"), ValueError, "design is empty"),
        (lambda: RandomTerm("1", "a/b"), ValueError, "write `a/b` as two terms"),
        (lambda: RandomTerm("1", "a + b"), ValueError, "names joined by ':'"),
        (lambda: RandomTerm("1 | g", "g"), ValueError, r"contains '\|'"),
        (lambda: RandomTerm(1, "g"), TypeError, "design must be a string, not int"),
        (lambda: ModelSpec("y ~ x", "1", ()), ValueError, "contains '~'"),
        (lambda: ModelSpec("y", "x + (1|g)", ()), ValueError, r"contains '\|'"),
        (lambda: ModelSpec("y", "x + 1|g", ()), ValueError, r"contains '\|'"),
        (lambda: ModelSpec("y", "x + offset(o)", ()), ValueError, "into ModelSpec.offsets"),
        (lambda: ModelSpec("y", "x", RandomTerm("1", "g")), TypeError, "must be a sequence"),
        (lambda: ModelSpec("y", "x", ["(1|g)"]), TypeError, "RandomTerm objects, not str"),
        (lambda: ModelSpec("y", "x", (), "o"), TypeError, r"write \('o',\)"),
    ],
)
def test_spec_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_expression_names():
    assert expression_names("np.log(x) + f(`my y`, z=w)") == (("np", "x", "my y", "w"), ("f",))
    assert expression_names("Q('a b')") == (("a b",), ("Q",))
    assert expression_names("sum(v for v in x)") == (("x",), ("sum",))
