"""Data and formulas mean what they say: labels, units and arithmetic survive the way in."""

import re
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pytest
from formulaic.transforms.cubic_spline import natural_cubic_spline

import lmmax
from lmmax import DataError, FormulaError, ModelSpec, RandomTerm
from lmmax.design import build_design, design_from_arrays
from lmmax.statsmodels import MixedLM

N = 60


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(10), 6)
    x, base = rng.normal(size=(2, N))
    y = 3.0 + x + base + rng.normal(size=10)[g] + rng.normal(size=N)
    return pd.DataFrame({"y": y, "x": x, "base": base, "g": g, "y.a": y, "my y": y})


# --- the response ---------------------------------------------------------------------------

ARITHMETIC = {
    "y - base": lambda d: d.y - d.base,
    "(y - base)": lambda d: d.y - d.base,
    "y-base-x": lambda d: d.y - d.base - d.x,
    "y - (base - x)": lambda d: d.y - d.base + d.x,
    "y - 1": lambda d: d.y - 1.0,
    "y^2": lambda d: d.y**2,
    "y**2 - base": lambda d: d.y**2 - d.base,
    "(y - base)^2": lambda d: (d.y - d.base) ** 2,
    "2^y": lambda d: 2.0**d.y,
    "y.a - x": lambda d: d.y - d.x,
    "`my y` - x": lambda d: d.y - d.x,
    "{y} - x": lambda d: d.y - d.x,
    "np.exp(y) - base": lambda d: np.exp(d.y) - d.base,
    "(y)": lambda d: d.y,
    "I(y^2)": lambda d: d.y**2,
}


@pytest.mark.parametrize("text", ARITHMETIC)
def test_differences_and_powers_are_arithmetic(text, data):
    want = ARITHMETIC[text](data)
    for spec in (f"{text} ~ x + (1 | g)", ModelSpec(text, "x", [RandomTerm("1", "g")])):
        np.testing.assert_allclose(build_design(spec, data).y, want, rtol=1e-14)


REFUSED = ["y + base", "y*base", "y:base", "y/base", "y*y", "y:y", "y + 0", "0 + y", "-y", "+y"]


@pytest.mark.parametrize("text", [*REFUSED, "y - 2*base", "y - base + x", "y %in% base", "1 - 2"])
def test_other_arithmetic_is_refused_with_the_remedy(text, data):
    with pytest.raises(FormulaError, match=r"write `I\("):
        build_design(f"{text} ~ x + (1 | g)", data)
    with pytest.raises(FormulaError, match=r"write `I\("):
        build_design(ModelSpec(text, "x", [RandomTerm("1", "g")]), data)


def test_no_door_takes_the_variable_for_the_expression(data):
    data["half"] = np.arange(N) % 2
    model = "x + (1 | g)"
    got = lmmax.fit_many(f"y - base ~ {model}", data, by="half").params
    want = lmmax.fit_many(f"z ~ {model}", data.assign(z=data.y - data.base), by="half").params
    np.testing.assert_allclose(got, want, rtol=1e-12)
    with pytest.raises(FormulaError, match=re.escape("`y - base`")):
        lmmax.fit_many(f"y - base ~ {model}", data, ["y"])
    for text in ("y - base", "y**2", "y:base", "y + base"):
        with pytest.raises(FormulaError, match="write I"):
            MixedLM.from_formula(f"{text} ~ x", data, groups="g")
    assert lmmax.parse_formula("y - base ~ x + (1 | g)").formula == "y - base ~ x + (1 | g)"


def test_a_factor_within_itself_comes_twice():
    with pytest.raises(FormulaError, match="comes twice"):
        lmmax.parse_formula("y ~ x + (1 | g/g)")


# --- labels ---------------------------------------------------------------------------------


def _containers(labels, dtype):
    rest = {"y": np.arange(float(len(labels))) % 7}
    frame = pl.DataFrame({**rest, "g": pl.Series(labels, dtype=getattr(pl, dtype))})
    return {
        "pandas": pd.DataFrame({**rest, "g": pd.array(labels, dtype=dtype)}),
        "objects": pd.DataFrame({**rest, "g": pd.Series(labels, dtype=object)}),
        "polars": frame,
        "arrow": frame.to_arrow(),
        "list": {**rest, "g": labels},
        "series": {**rest, "g": frame["g"]},
        "decimals": {**rest, "g": [None if v is None else Decimal(v) for v in labels]},
        "categories": pd.DataFrame({**rest, "g": pd.Categorical(pd.array(labels, dtype=dtype))}),
        "128 bits": frame.with_columns(pl.col("g").cast(pl.Int128)),
    }


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(("first", "dtype"), [(10**18, "Int64"), (2**63, "UInt64")])
def test_long_labels_are_told_apart(first, dtype, missing):
    m = 12
    labels = [first + i // 4 for i in range(4 * m)]
    labels[0] = None if missing else labels[0]
    for kind, data in _containers(labels, dtype).items():
        design = build_design("y ~ 1 + (1 | g)", data)
        assert len(design.groupings[0].levels) == m, kind
        codes = design.new_data(data).codes[0]
        assert codes[-1] == m - 1 and (codes[0] == -1) == missing, kind
        new = design.new_data({"g": [first + 3, first + m]}).codes[0]
        assert new.tolist() == [3, -1], kind
        columns = {"y": data["y"], "g": data["g"], "h": np.arange(4 * m) % 5}
        assert build_design("y ~ C(g) + (1 | h)", columns).X.shape[1] == m, kind
        arrays = design_from_arrays(data["y"], np.ones(4 * m), data["g"])
        assert len(arrays.groupings[0].levels) == m, kind


def test_labels_that_are_one_to_python_are_refused(data):
    mixed = [[True, 1, 0, "a"][i % 4] for i in range(N)]
    with pytest.raises(DataError, match="'g' hold both 1 and True"):
        build_design("y ~ x + (1 | g)", data.assign(g=pd.Series(mixed, dtype=object)))
    with pytest.warns(UserWarning, match="'g' are floating-point numbers beyond"):
        build_design("y ~ x + (1 | g)", data.assign(g=1e18 + 1e5 * data.g))


def test_labels_and_names_of_combinations_do_not_collide(data):
    data["a"], data["b"] = np.tile(["p", "p:q"], 30), np.tile(["q:r", "r"], 30)
    levels = build_design("y ~ 1 + (1 | a:b)", data).groupings[0].levels
    assert levels.tolist() == ["'p':'q:r'", "'p:q':'r'"]
    data["i"] = pd.Series([[1, "1"][k % 2] for k in range(N)], dtype=object)
    levels = build_design("y ~ 1 + (1 | i:g)", data).groupings[0].levels
    assert levels.is_unique and {"1:0", "'1':1"} <= {*levels}
    data = data.rename(columns={"a": "p", "b": "q:r", "i": "p:q", "g": "r"})
    spec = lmmax.parse_formula("y ~ 1 + (1 | p:`q:r`) + (1 | `p:q`:r)")
    assert [g.name for g in build_design(spec, data).groupings] == ["p:`q:r`", "`p:q`:r"]


# --- rows that disagree ---------------------------------------------------------------------


def test_rows_of_arrays_must_have_the_same_labels(data):
    X, order = data[["x"]].assign(one=1.0), np.random.default_rng(1).permutation(N)
    given = {
        "y": data["y"],
        "X": X,
        "groups": data["g"],
        "Z": X[["one"]],
        "weights": data["x"] ** 2 + 1.0,
        "offset": data["base"],
    }
    together = {name: values.iloc[order] for name, values in given.items()}
    a, b = design_from_arrays(**given), design_from_arrays(**together)
    np.testing.assert_array_equal(a.y[order], b.y)
    for name in given:
        with pytest.raises(DataError, match=rf"\b{name}\b.* labels of their rows"):
            design_from_arrays(**{**given, name: given[name].iloc[order]})
        design_from_arrays(**{**given, name: given[name].iloc[order].to_numpy()})
    with pytest.raises(DataError, match=re.escape("groups['b'] and")):
        several = {"a": data["g"], "b": data["g"].iloc[order]}
        design_from_arrays(data["y"], np.ones(N), several)
    with pytest.raises(DataError, match="column 'x'"):
        build_design("y ~ x + (1 | g)", {**data[["y", "g"]], "x": data["x"].iloc[order]})
    with pytest.raises(DataError, match="groups and X"):
        a.new_data({"X": X, "groups": data["g"].iloc[order], "Z": X[["one"]]}, offset=data["base"])
    with pytest.raises(DataError, match="reorder them"):
        a.new_data(
            {"X": X[["one", "x"]], "groups": data["g"], "Z": X[["one"]]}, offset=data["base"]
        )


def test_rows_of_many_responses_must_have_the_same_labels(data):
    other = data.sample(frac=1.0, random_state=1)
    plain = pd.Series(np.ones(N))  # the labels 0 to n - 1, which are those of other rows
    model = "~ x + (1 | g)"
    for options in ({"weights": plain}, {"offset": plain}):
        with pytest.raises(DataError, match="Series whose index differs"):
            lmmax.fit_many(model, other, ["y"], **options)
        with pytest.raises(DataError, match="Series whose index differs"):
            lmmax.fit_many(f"y {model}", other.assign(b=other.g % 2), by="b", **options)
        with pytest.raises(DataError, match="Series whose index differs"):
            lmmax.sufficient_statistics(model, other, ["y"], **options)
    for responses in (data["y"], {"q": data["y"]}, iter([data[["y"]]])):
        with pytest.raises(DataError, match="labels of their rows"):
            lmmax.fit_many(model, other, responses)
    with pytest.raises(DataError, match="another order"):
        weights = pd.DataFrame({"base": np.ones(N), "y": np.ones(N)})
        lmmax.fit_many(model, data, data[["y", "base"]], weights=weights)


def test_hypotheses_are_taken_by_the_names_of_their_columns():
    fit = lmmax.fit("Yield ~ 1 + x + (1 | Batch)", _dyestuff())
    want = str(fit.t_test([[0.0, 1.0]]))
    for matrix in (
        pd.DataFrame([[1.0, 0.0]], columns=["x", "Intercept"]),
        pd.Series({"x": 1.0, "Intercept": 0.0}),
    ):
        assert str(fit.t_test(matrix)) == want
    with pytest.raises(ValueError, match="labels of a hypothesis matrix"):
        fit.t_test(pd.DataFrame([[1.0, 0.0]], columns=["x", "constant"]))


def _dyestuff():
    data = lmmax.datasets.load("dyestuff")
    return data.assign(x=np.random.default_rng(3).normal(size=len(data)))


# --- contrasts ------------------------------------------------------------------------------


def test_contrasts_are_taken_by_their_labels(data):
    data["f"] = np.tile(list("abc"), N // 3)
    frame = pd.DataFrame(
        {"late": [-1 / 3, -1 / 3, 2 / 3], "early": [-0.5, 0.5, 0.0]}, index=list("abc")
    )
    want = build_design("y ~ f + (1 | g)", data, contrasts={"f": frame.to_numpy()})
    for given in (frame, frame.loc[list("cab")], frame.loc[list("cab")].to_dict("series")):
        design = build_design("y ~ f + (1 | g)", data, contrasts={"f": given})
        assert design.x_names == ("Intercept", "f[late]", "f[early]")
        np.testing.assert_array_equal(design.X, want.X)
        np.testing.assert_array_equal(design.new_data(data.iloc[3:7]).X, want.X[3:7])
    for text in ("C(f, K)", "C(f, contr.custom(K))"):
        design = build_design(f"y ~ {text} + (1 | g)", data, context={"K": frame.iloc[::-1]})
        np.testing.assert_array_equal(design.X, want.X)
    for index in (list("xyz"), range(3), list("aab")):
        with pytest.raises(DataError, match="index of the contrasts for 'f'"):
            wrong = frame.set_axis(index)
            build_design("y ~ f + (1 | g)", data, contrasts={"f": wrong})


# --- numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("imaginary", [0.0, 1.0])
def test_complex_numbers_are_refused_by_name(data, imaginary):
    i = 1j * imaginary
    arrays = {"y": data["y"], "X": data[["x"]].to_numpy(), "groups": data["g"]}
    arrays |= {"Z": np.ones(N), "weights": np.ones(N), "offset": np.ones(N)}
    for name in ("y", "X", "Z", "weights", "offset"):
        given = {**arrays, name: arrays[name] + i}
        with pytest.raises(DataError, match=rf"{name}\b.*complex"):
            design_from_arrays(**given)
    for formula in ("y ~ x + (1 | g)", "x ~ 1 + (1 | g)", "y ~ k(base) + (1 | g)"):
        with pytest.raises(DataError, match=r"complex|numbers"):
            twice = {"k": lambda v: np.column_stack([v, v**2]) + i}
            build_design(formula, data.assign(x=data.x + i), context=twice)
    relmat = pd.DataFrame(np.eye(10) + i)
    with pytest.raises(DataError, match="'g' holds complex"):
        build_design("y ~ x + (1 | g)", data, relmat={"g": relmat})
    with pytest.raises(DataError, match="complex"):
        MixedLM(data["y"], data[["x"]].to_numpy() + i, groups=data["g"])
    with pytest.raises(DataError, match="complex"):
        MixedLM.from_formula("y ~ x", data.assign(x=data.x + i), groups="g")


@pytest.mark.parametrize("unit", [1e-300, 1e-200, 1e200, 1e300])
def test_units_beyond_double_precision_are_named(data, unit):
    for column, formula in {"x": "y ~ x + (x | g)", "y": "y ~ x + (1 | g)"}.items():
        with pytest.raises(DataError, match=rf"'{column}'.*another unit"):
            lmmax.fit(formula, data.assign(**{column: unit * data[column]}))


# --- names ----------------------------------------------------------------------------------


def test_names_of_covariates_do_not_matter(data):
    plain = lmmax.fit("y ~ x + (1 | g)", data)

    def answers(fit):
        return {
            "profile": lmmax.confint(fit),
            "wald": lmmax.confint(fit, method="wald"),
            "information": lmmax.information(fit),
            "theta": lmmax.joint_covariance(fit, parameters="theta"),
            "sandwich": lmmax.sandwich(fit),
            "bootstrap": lmmax.bootstrap(fit, 10, seed=1).observed,
            "points": lmmax.profile(fit, [fit.design.x_names[1]]).table.iloc[:, 1:],
        }

    want = answers(plain)
    for name in ("sigma", "scale", "value", "g: sd(Intercept)"):
        fit = lmmax.fit(f"y ~ `{name}` + (1 | g)", data.rename(columns={"x": name}))
        for what, found in answers(fit).items():
            np.testing.assert_allclose(found, want[what], rtol=1e-7, err_msg=f"{name} {what}")
            assert what == "points" or found.index.is_unique
    with pytest.raises(DataError, match=re.escape("'(response)'")):
        lmmax.fit_many("~ x + (1 | g)", data.rename(columns={"base": "(response)"}), ["y"])
    with pytest.raises(DataError, match=re.escape("'(weights)'")):
        other = data.rename(columns={"base": "(weights)"})
        build_design("y ~ `(weights)` + (1 | g)", other, weights=np.ones(N))


# --- splines --------------------------------------------------------------------------------


@pytest.mark.parametrize("spline", ["cr", "cc"])
@pytest.mark.parametrize(
    ("rhs", "columns"),
    [
        ("{s}", 4),
        ("0 + {s}", 3),
        ("f * {s}", 12),
        ("f + f:{s}", 12),
        ("{s} + f:{s}", 10),
        ("f:{s}", 10),
        ("0 + f:{s}", 9),
        ("0 + f + {s}", 6),
        ("0 + {s} + f", 6),
        ("x * {s}", 8),
        ("x:{s}", 4),
        ("{s} + {s2}", 7),
        ("0 + {s} + {s2}", 6),
        ("{s} * {s2}", 16),
    ],
)
def test_splines_have_no_aliased_column(spline, rhs, columns, data):
    data["f"] = np.random.default_rng(5).choice(list("abc"), N)
    text = rhs.format(s=f"{spline}(base, df=3)", s2=f"{spline}(y, df=3)")
    design = build_design(f"y ~ {text} + (1 | g)", data)
    assert np.linalg.matrix_rank(design.X) == design.X.shape[1] == columns
    np.testing.assert_allclose(design.new_data(data.iloc[5:9]).X, design.X[5:9], atol=1e-13)


def test_a_spline_beside_an_intercept_is_the_centred_one(data):
    design = build_design("y ~ cr(x, df=4) + (0 + cr(x, df=4) | g) + (cr(x, df=4) | y)", data)
    centred = natural_cubic_spline(data["x"], df=4, constraints="center")
    whole = natural_cubic_spline(data["x"], df=4)
    np.testing.assert_array_equal(design.X[:, 1:].T, [*centred.values()])
    np.testing.assert_array_equal(design.blocks[0].Z.T, [*whole.values()])
    np.testing.assert_array_equal(design.blocks[1].Z[:, 1:].T, [*centred.values()])
    with pytest.raises(DataError, match="is a line"):
        build_design("y ~ cr(x, df=1) + (1 | g)", data)


# --- expressions that look at other rows ----------------------------------------------------

OF_OTHER_ROWS = (
    "I(x - x.mean())",
    "I(x / np.max(x))",
    "I(x - x.min())",
    "I(x > np.median(x))",
    "x.rank()",
    "np.cumsum(x)",
    "I(x - x.iloc[0])",
    "own(x)",
    "x + offset(x - x.mean())",
)
BY_ROW = (
    "scale(x)",
    "poly(x, 2)",
    "I(scale(x) ** 2)",
    "np.where(x > 0, 1, 2)",
    "round(x)",
    "own_row(x)",
)
CONTEXT = {"own": lambda x: x - x.mean(), "own_row": lambda x: x**2}


@pytest.mark.parametrize("rhs", OF_OTHER_ROWS)
def test_values_that_depend_on_other_rows_are_refused_in_new_data(rhs, data):
    """The mean of the new rows is not the mean that the model was fitted to."""
    design = build_design(f"y ~ {rhs} + (1 | g)", data, context=CONTEXT)
    with pytest.raises(DataError, match=r"has no values in new data.* scale\(\), center\(\)"):
        design.new_data(data[:9])


@pytest.mark.parametrize("rhs", BY_ROW)
def test_values_of_their_own_row_are_the_same_in_new_data(rhs, data):
    design = build_design(f"y ~ {rhs} + (1 | g)", data, context=CONTEXT)
    got = design.new_data(data[7:12]).X
    np.testing.assert_allclose(got, design.X[7:12], rtol=0, atol=1e-14)


def test_random_slopes_on_values_of_other_rows_are_left_out_of_means(data):
    design = build_design("y ~ x + (0 + I(x - x.mean()) | g)", data)
    got = design.new_data(data[7:12], need_groups=False).X
    np.testing.assert_allclose(got, design.X[7:12], rtol=1e-14)
    with pytest.raises(DataError, match=r"`I\(x - x.mean\(\)\)` has no values in new data"):
        design.new_data(data[7:12])


def test_parts_centred_each_by_itself_do_not_merge(data):
    first, other = (
        lmmax.sufficient_statistics("~ I(x - x.mean()) + (1 | g)", part, ["y"])
        for part in (data[:30], data[30:])
    )
    with pytest.raises((DataError, lmmax.ExchangeError), match=r"I\(x - x.mean\(\)\)"):
        first.merge(other)


@pytest.mark.parametrize("name", ["1", "~"])
@pytest.mark.parametrize(
    "model", ["y ~ {} + (1 | g)", "y ~ base + (0 + {} | g)", "y ~ base * {} + (1 | g)"]
)
def test_a_column_named_as_the_intercept_is_refused_and_not_left_out(name, model, data):
    data = data.rename(columns={"x": name})
    with pytest.raises(FormulaError, match=rf"a column named '{name}' cannot be a term by itself"):
        lmmax.fit(model.format(f"`{name}`"), data)
    design = build_design(model.format(f"I(`{name}`)"), data)
    want = build_design(model.format("x"), data.rename(columns={name: "x"}))
    np.testing.assert_array_equal(design.X, want.X)
    np.testing.assert_array_equal(design.blocks[0].Z, want.blocks[0].Z)


@pytest.mark.parametrize("name", ["0", "2", "1.5", "-1", "1e5", "01"])
def test_columns_named_as_other_numbers_are_columns(name, data):
    got = build_design(f"y ~ base * `{name}` + (`{name}` | g)", data.rename(columns={"x": name}))
    want = build_design("y ~ base * x + (x | g)", data)
    np.testing.assert_array_equal(got.X, want.X)
    np.testing.assert_array_equal(got.blocks[0].Z, want.blocks[0].Z)
