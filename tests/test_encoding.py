"""Terms -> columns: transforms, contrasts, names in expressions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from formulaic import Formula

from lmmax.design import DataError, build_design

from .example_data import example


@pytest.fixture
def data():
    return example()


@pytest.mark.parametrize(
    "rhs",
    [
        "1",
        "x + f",
        "0 + f",
        "f*h",
        "f:h",
        "h:f + f",
        "f:x",
        "x*f*h",
        "f/h",
        "(x + f + h)**2",
        "poly(z, 3)",
        "poly(z, 2, raw=True)",
        "bs(z, df=5)*f",
        "bs(z, df=6, include_intercept=True)",
        "0 + cr(z, df=4)",
        "cr(z, df=4, constraints='center')",
        "scale(x) + center(z):f",
        "C(k)*x",
        "C(k, contr.poly)",
        "C(f, contr.sum)*C(h, contr.helmert)",
        "0 + C(f, contr.sum) + h",
        "C(f, contr.treatment('c'))",
        "C(f, contr.SAS)",
        "C(k, contr.custom(np.array([[1, 0], [0, 1], [-1, -1]])))",
        "log(z)*h + I(x**2)",
        "2:x",
        "`my v`*x + np.log(`my v`**2)",
        "hashed(f, levels=3)",
        "standardize(x) + Q('my v')",
    ],
)
def test_matrix_equals_formulaic_and_survives_new_data(rhs, data):
    want = Formula(rhs).get_model_matrix(data, output="pandas")
    d = build_design(f"y ~ {rhs} + (1|g)", data)
    assert d.x_names == tuple(want.columns)
    np.testing.assert_array_equal(d.X, want.to_numpy(float))
    new = d.new_data(data.iloc[5:11].drop(columns="y"))
    np.testing.assert_allclose(new.X, d.X[5:11], rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(new.codes[0], d.groupings[0].codes[5:11])
    assert not new.missing.any()


def test_names_of_levels(data):
    d = build_design("y ~ f + b + C(k) + I(x > 0) + (1|g)", data)
    assert d.x_names == (
        *("Intercept", "f[T.b]", "f[T.c]", "f[T.d]", "b[T.True]"),
        *("C(k)[T.2]", "C(k)[T.3]", "I(x > 0)[T.True]"),
    )
    np.testing.assert_array_equal(d.X[:, 4], data["b"])
    np.testing.assert_array_equal(d.X[:, 7], data["x"] > 0)


def test_whole_number_levels_stay_whole_beside_missing_values(data):
    data["k"] = data["k"].astype(float)
    data.loc["row0", "k"] = np.nan
    d = build_design("y ~ C(k) + (1|k:h)", data)
    assert d.x_names == ("Intercept", "C(k)[T.2]", "C(k)[T.3]")
    assert d.groupings[0].levels.tolist() == ["1:u", "1:v", "2:u", "2:v", "3:u", "3:v"]


def test_random_coding_is_its_own(data):
    both = build_design("y ~ 1 + f + (0 + f | g)", data)
    assert both.x_names == ("Intercept", "f[T.b]", "f[T.c]", "f[T.d]")
    assert both.blocks[0].names == ("f[a]", "f[b]", "f[c]", "f[d]")
    np.testing.assert_array_equal(both.blocks[0].Z, pd.get_dummies(data["f"]).to_numpy(float))
    slopes = build_design("y ~ 0 + f + (f | g)", data)
    assert slopes.x_names == ("f[a]", "f[b]", "f[c]", "f[d]")
    assert slopes.blocks[0].names == ("Intercept", "f[T.b]", "f[T.c]", "f[T.d]")


# contr.poly(4) as R prints it; the others are R's by definition.
POLY4 = [
    [-0.6708204, 0.5, -0.2236068],
    [-0.2236068, -0.5, 0.6708204],
    [0.2236068, -0.5, -0.6708204],
    [0.6708204, 0.5, 0.2236068],
]
HELMERT4 = [[-1, -1, -1], [1, -1, -1], [0, 2, -1], [0, 0, 3]]
SUM4 = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]]
SAS4 = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "matrix"),
    [("poly", POLY4), ("contr.helmert", HELMERT4), ("sum", SUM4), ("SAS", SAS4)],
)
@pytest.mark.parametrize("inside", [False, True])
def test_contrasts_equal_those_of_r(name, matrix, inside, data):
    if inside:
        d = build_design(f"y ~ C(f, {name!r}) + (1|g)", data)
    else:
        d = build_design("y ~ f + (1|g)", data, contrasts={"f": name})
    want = np.array(matrix, float)[pd.Categorical(data["f"]).codes]
    np.testing.assert_allclose(d.X[:, 1:], want, atol=5e-8)
    np.testing.assert_array_equal(d.new_data(data[:3]).X, d.X[:3])


def test_contrasts_apply_to_the_fixed_effects_only(data):
    d = build_design("y ~ f + (f|g)", data, contrasts={"f": "sum"})
    assert d.x_names[1] == "f[S.a]"
    assert d.blocks[0].names[1] == "f[T.b]"
    d = build_design("y ~ C(f) + (C(f, sum)|g)", data, contrasts={"f": "helmert"})
    assert d.x_names[1] == "C(f)[H.b]"
    assert d.blocks[0].names[1] == "C(f, sum)[S.a]"


def test_contrasts_as_matrix(data):
    d = build_design("y ~ f + (1|g)", data, contrasts={"f": SUM4})
    assert d.x_names == ("Intercept", "f[1]", "f[2]", "f[3]")
    np.testing.assert_array_equal(d.X[:, 1:], np.array(SUM4)[pd.Categorical(data["f"]).codes])


def test_context(data):
    def half(v):
        return v / 2

    d = build_design("y ~ half(x) + I(z - x0) + (1|g)", data, context={"half": half, "x0": 3})
    np.testing.assert_array_equal(d.X[:, 1], data["x"] / 2)
    np.testing.assert_array_equal(d.X[:, 2], data["z"] - 3)
    np.testing.assert_array_equal(d.new_data(data[:2]).X, d.X[:2])


def test_callers_variables_are_not_seen(data):
    x0 = 3.0
    with pytest.raises(DataError, match="no column 'x0'"):
        build_design("y ~ I(x - x0) + (1|g)", data)
    assert x0 == 3.0


def test_columns_named_like_functions(data):
    data["scale"], data["log"], data["C"] = data["z"], data["x"], data["f"]
    d = build_design("y ~ scale + scale(x) + log(z) + C(f) + log + (1|g)", data)
    np.testing.assert_array_equal(d.X[:, d.x_names.index("log(z)")], np.log(data["z"]))
    np.testing.assert_array_equal(d.X[:, d.x_names.index("log")], data["x"])


def test_functions_r_users_expect(data):
    d = build_design("y ~ sqrt(z) + log(z, 2) + log1p(z) + exp10(x) + I(x^2) + (1|g)", data)
    z, x = data["z"], data["x"]
    want = [np.sqrt(z), np.log2(z), np.log1p(z), 10.0**x, x**2]
    np.testing.assert_allclose(d.X[:, 1:], np.column_stack(want), rtol=1e-13)


def test_narrow_integers_do_not_overflow(data):
    data["k"] = data["k"].astype("uint8")
    d = build_design("y ~ I(k - 3) + I(k**9) + (1|g)", data)
    k = data["k"].to_numpy(float)
    np.testing.assert_array_equal(d.X[:, 1:], np.column_stack([k - 3, k**9]))


def test_bad_contrasts_name_the_term(data):
    with pytest.raises(DataError, match=r"in the term `C\(f, 'zz'\)`: unknown contrasts 'zz'"):
        build_design("y ~ C(f, 'zz') + (1|g)", data)
    with pytest.raises(DataError, match=r"contr.treatment\('q'\).*levels a, b, c, d: .*`'q'`"):
        build_design("y ~ C(f, contr.treatment('q')) + (1|g)", data)
    with pytest.raises(DataError, match="as contrasts for 'f'"):
        build_design("y ~ f + (1|g)", data, contrasts={"f": object()})
