"""`evaluate="safe"`: the same numbers as Python's, and nothing that is not a number."""

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.design import DataError, build_design
from lmmax.formula import FormulaError, parse_formula

RNG = np.random.default_rng(0)
DATA = {
    "y": RNG.normal(size=40),
    "x": RNG.uniform(1, 5, 40),
    "f": np.array(["a", "b", "c", "d"] * 10),
    "g": np.repeat(np.arange(8), 5),
}


@pytest.mark.parametrize(
    "term",
    [
        *(
            "x",
            "log(x)",
            "np.log(x)",
            "log(x, 2)",
            "I(x**2)",
            "I(x^2 + 1)",
            "I(x > 2)",
            "f",
            "C(f)",
        ),
        *("poly(x, 2)", "bs(x, df=4)", "cr(x, df=4)", "center(x)", "scale(x)", "standardize(x)"),
        *("np.where(x > 2, x, 0)", "np.sin(2 * np.pi * x)", "C(f, contr.sum)", "C(f, Sum)"),
        *(
            "C(f, contr.treatment('b'))",
            "C(f, Treatment('b'))",
            "C(f, levels=['b', 'a', 'c', 'd'])",
        ),
        *("I((x > 2) & (x < 3))", "I(f == 'a')", "np.maximum(x, 2)", "`x`:f", "Q('x')", "{x + 1}"),
    ],
)
def test_as_python(term):
    formula = f"y ~ {term} + offset(log(x)) + (1 | g)"
    python, safe = (
        build_design(parse_formula(formula, evaluate=how), DATA) for how in ("python", "safe")
    )
    assert safe.x_names == python.x_names
    np.testing.assert_array_equal(safe.X, python.X)
    new = {name: values[:20] for name, values in DATA.items()}
    np.testing.assert_array_equal(safe.new_data(new).X, python.new_data(new).X)


@pytest.mark.parametrize(
    "term",
    [
        *("I(__import__('os'))", "I(exit())", "np.load('x')", "I(x.values)", "I([v for v in x])"),
        *("I((lambda: 1)())", "I(f * 1000000000)", "I('a' * 10**9)", "np.log(x, x)", "I(open)"),
        *(
            "np.log(x, out=x)",
            "poly(x, 2, _state=x)",
            "poly(x, 10000)",
            "bs(x, df=10**6)",
            "I(x[0])",
        ),
        *("{__import__('os')}", "offset(exit())", "I(f'{x}')", "I((z := 1))", "I(x.__class__)"),
        *(
            "I(np.pi.real)",
            "contr.mro()",
            "I(x if 1 else 2)",
            "I(*x)",
            "I(**{'a': x})",
            "I(1 << 99)",
        ),
        *("np.ndarray(5)", "np.add.outer(x, x)", "I(b'a')", "I(...)", "hashed(x)", "I(eval)('1')"),
        *("I(poly(x, 1) - x)", "C(f, open)", "I(__builtins__)", "I(x @ x)", "I(9**9**9)"),
    ],
)
def test_refused(term):
    with pytest.raises((FormulaError, DataError)):
        build_design(parse_formula(f"y ~ {term} + (1 | g)", evaluate="safe"), DATA)


def test_remembered():
    spec = parse_formula("y ~ x + (1 | g)", evaluate="safe")
    result = lmmax.fit(spec, DATA)
    assert result.design.spec.evaluate == "safe"
    with pytest.raises(ValueError, match="evaluate='fast' must be"):
        parse_formula("y ~ x + (1 | g)", evaluate="fast")
    with pytest.raises(FormulaError, match=r"\^\^\^"):
        parse_formula("y ~ I(exit()) + (1 | g)", evaluate="safe")


CODE = "~ I(exit()) + (1 | g)"
MODEL = "~ log(x) + (1 | g)"


def test_statistics(tmp_path):
    """From the data to a file, and in every model fitted to them."""
    responses = DATA["y"][:, None]
    with pytest.raises(FormulaError, match=r"\^\^\^"):
        lmmax.sufficient_statistics(CODE, DATA, responses, evaluate="safe")
    statistics = lmmax.sufficient_statistics(MODEL, DATA, responses, evaluate="safe")
    plain = lmmax.sufficient_statistics(MODEL, DATA, responses)
    assert statistics.design.spec.evaluate == "safe"
    pd.testing.assert_frame_equal(statistics.fit().params, plain.fit().params)

    statistics.save(tmp_path / "statistics.npz")
    loaded = lmmax.SufficientStatistics.load(tmp_path / "statistics.npz")
    assert loaded.design.spec.evaluate == "safe"
    # Columns are found by their names: no text is run, not even where it may be.
    for each in (loaded, plain):
        with pytest.raises(ValueError):
            each.fit(CODE)


@pytest.mark.filterwarnings("ignore::lmmax.fit.ConvergenceWarning")
def test_batches_in_files(tmp_path):
    responses = DATA["y"][:, None] + [0.0, 1.0]
    with pytest.raises(FormulaError, match=r"\^\^\^"):
        lmmax.fit_many(CODE, DATA, responses, evaluate="safe")
    batch = lmmax.fit_many(MODEL, DATA, responses, evaluate="safe", out=tmp_path / "results")
    batch.save(tmp_path / "batch.npz")
    for each in (
        batch,
        lmmax.BatchFit.load(tmp_path / "batch.npz"),
        lmmax.BatchFit.open(tmp_path / "results"),
    ):
        assert each.design.spec.evaluate == "safe"


def test_saved_fits(tmp_path):
    fit = lmmax.fit("y ~ log(x) + (1 | g)", DATA, evaluate="safe")
    fit.save(tmp_path / "fit.npz")
    loaded = lmmax.load(tmp_path / "fit.npz")
    assert loaded.design.spec.evaluate == loaded.refit(DATA["y"] + 1).design.spec.evaluate == "safe"
    np.testing.assert_array_equal(loaded.predict(DATA), fit.predict(DATA))


def test_fits_of_others_are_read_without_running_code(tmp_path):
    sleep = lmmax.datasets.load("sleepstudy")
    fit = lmmax.fit("Reaction ~ poly(Days, 2) * C(Days > 4) + (1 | Subject)", sleep)
    fit.save(tmp_path / "fit")
    safe = lmmax.load(tmp_path / "fit", evaluate="safe")
    assert safe.design.spec.evaluate == "safe"
    pd.testing.assert_series_equal(safe.predict(sleep), fit.predict(sleep), rtol=1e-12)
    lmmax.fit("Reaction ~ I(Days.clip(0, 5)) + (1 | Subject)", sleep).save(tmp_path / "fit")
    safe = lmmax.load(tmp_path / "fit", evaluate="safe")
    with pytest.raises(lmmax.FormulaError, match="does not evaluate"):
        safe.predict(sleep)
    with pytest.raises(ValueError, match="must be 'python' or 'safe'"):
        lmmax.load(tmp_path / "fit", evaluate="sure")
