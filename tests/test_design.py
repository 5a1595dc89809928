"""Data + ModelSpec -> Design."""

from __future__ import annotations

import datetime
import pickle
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from formulaic import Formula

from lmmax.design import DataError, build_design, design_from_arrays
from lmmax.formula import parse_formula
from lmmax.spec import ModelSpec, RandomTerm


@pytest.fixture
def data():
    rng = np.random.default_rng(1)
    n = 24
    return pd.DataFrame(
        {
            "y": rng.normal(size=n),
            "x": rng.normal(size=n),
            "z": rng.uniform(1, 5, n),
            "f": np.tile(list("bcad"), 6),
            "h": np.repeat(["v", "u"], 12),
            "b": rng.random(n) < 0.5,
            "k": np.tile([3, 1, 2], 8),
            "g": np.repeat([30, 10, 20, 5, 7, 8], 4),
            "my v": rng.uniform(1, 2, n),
            "w": rng.uniform(1, 2, n),
            "o": rng.normal(size=n),
        },
        index=[f"row{i}" for i in range(n)],
    )


def same(a, b):
    assert a.x_names == b.x_names
    np.testing.assert_array_equal(a.y, b.y)
    np.testing.assert_array_equal(a.X, b.X)
    assert len(a.blocks) == len(b.blocks)
    for p, q in zip(a.blocks, b.blocks, strict=True):
        assert (p.term, p.grouping, p.names) == (q.term, q.grouping, q.names)
        np.testing.assert_array_equal(p.Z, q.Z)
    for p, q in zip(a.groupings, b.groupings, strict=True):
        assert p.name == q.name
        np.testing.assert_array_equal(p.codes, q.codes)
        assert p.levels.tolist() == q.levels.tolist()
    for name in ("weights", "offset"):
        p, q = getattr(a, name), getattr(b, name)
        assert (p is None) == (q is None)
        if p is not None:
            np.testing.assert_array_equal(p, q)
    assert a.n_dropped == b.n_dropped
    assert a.dropped_by == b.dropped_by


def test_shapes_types_and_values(data):
    d = build_design(parse_formula("y ~ x + (1 + x | g) + (1 | h)"), data)
    assert d.response_name == "y"
    assert d.x_names == ("Intercept", "x")
    np.testing.assert_array_equal(d.X, np.column_stack([np.ones(24), data["x"]]))
    np.testing.assert_array_equal(d.y, data["y"])
    assert d.blocks[0].names == ("Intercept", "x")
    np.testing.assert_array_equal(d.blocks[0].Z, d.X)
    assert [g.name for g in d.groupings] == ["g", "h"]
    assert d.groupings[0].levels.tolist() == [5, 7, 8, 10, 20, 30]
    assert d.groupings[0].levels.dtype == np.int64
    np.testing.assert_array_equal(d.groupings[0].levels.to_numpy()[d.groupings[0].codes], data["g"])
    assert d.groupings[1].levels.tolist() == ["u", "v"]
    for array in (d.y, d.X, *(b.Z for b in d.blocks)):
        assert array.dtype == np.float64
    assert all(g.codes.dtype == np.int64 for g in d.groupings)
    assert d.index.equals(data.index)
    assert (d.n_dropped, d.dropped_by, d.weights, d.offset) == (0, {}, None, None)
    assert not np.shares_memory(d.y, data["y"].to_numpy())


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
        "cr(z, df=4)",
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
        "x %in% f",
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


def test_no_fixed_effects(data):
    d = build_design("y ~ 0 + (1|g)", data)
    assert d.X.shape == (24, 0)
    assert d.new_data(data.iloc[:2]).X.shape == (2, 0)


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


def test_terms_with_one_group_share_a_grouping(data):
    d = build_design("y ~ x + (1|g) + (1|h) + (0 + x|g) + (1|g:h)", data)
    assert [b.grouping for b in d.blocks] == [0, 1, 0, 2]
    assert [g.name for g in d.groupings] == ["g", "h", "g:h"]


def test_combinations_hold_only_those_that_occur(data):
    d = build_design("y ~ 1 + (1|h/g)", data)
    assert d.groupings[1].name == "h:g"
    # Sorted part by part, the numbers as numbers.
    want = ["u:5", "u:7", "u:8", "v:10", "v:20", "v:30"]
    assert d.groupings[1].levels.tolist() == want
    labels = [f"{h}:{g}" for h, g in zip(data["h"], data["g"], strict=True)]
    assert d.groupings[1].levels.to_numpy()[d.groupings[1].codes].tolist() == labels


def test_rows_keep_their_order(data):
    shuffled = data.sample(frac=1, random_state=0)
    a, b = build_design("y ~ x*f + (x|g:h)", data), build_design("y ~ x*f + (x|g:h)", shuffled)
    order = data.index.get_indexer(shuffled.index)
    np.testing.assert_array_equal(a.X[order], b.X)
    np.testing.assert_array_equal(a.groupings[0].codes[order], b.groupings[0].codes)
    assert b.index.equals(shuffled.index)


# contr.poly(4) and contr.helmert(3) as R prints them.
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


@pytest.mark.parametrize(
    "convert",
    [
        lambda s: s.astype(object),
        lambda s: s.astype("string"),
        lambda s: s.astype("category"),
        lambda s: s.astype(pd.CategoricalDtype(list("abcdz"))),
        lambda s: s.astype(pd.ArrowDtype(pytest.importorskip("pyarrow").string())),
    ],
)
def test_kinds_of_strings(convert, data):
    want = build_design("y ~ f + (1|g) + (1|f)", data)
    data["f"] = convert(data["f"])
    same(build_design("y ~ f + (1|g) + (1|f)", data), want)


@pytest.mark.parametrize("ordered", [False, True])
def test_categorical_order_is_kept(ordered, data):
    data["f"] = pd.Categorical(data["f"], categories=list("dzcba"), ordered=ordered)
    d = build_design("y ~ f + (1|g) + (1|f)", data)
    assert d.x_names == ("Intercept", "f[T.c]", "f[T.b]", "f[T.a]")
    assert d.groupings[1].levels.tolist() == list("dcba")


@pytest.mark.parametrize("dtype", ["float32", "int16", "uint8", "Int64", "Float64", object])
def test_kinds_of_numbers(dtype, data):
    want = build_design("y ~ k*x + (k|g)", data)
    data["k"] = data["k"].astype(dtype)
    same(build_design("y ~ k*x + (k|g)", data), want)


@pytest.mark.parametrize("dtype", ["Int64", "Float64", object, "boolean"])
def test_missing_in_nullable_columns(dtype, data):
    data["k"] = data["k"].astype(float) if dtype != "boolean" else data["b"]
    data["k"] = data["k"].astype(dtype)
    data.loc[["row2", "row5"], "k"] = None if dtype is object else pd.NA
    d = build_design("y ~ k + (1|g)", data)
    assert d.dropped_by == {"k": 2}
    np.testing.assert_array_equal(d.X[:, 1], data["k"].dropna().astype(float))


FORMULA = "np.log(w) ~ x*f + b + poly(z, 2) + offset(o) + (x + f | g) + (1 | h:g)"


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("kind", ["polars", "pyarrow", "arrays", "lists"])
def test_containers_agree(kind, holes, data):
    data = data.reset_index(drop=True)
    data["cat"] = pd.Categorical(data["h"])
    columns = {name: data[name].tolist() for name in data.columns}
    if holes:
        for i, name in enumerate(["w", "x", "f", "b", "g", "h", "o"]):
            columns[name][i] = None
        data = pd.DataFrame(columns)
    want = build_design(FORMULA, data, weights="w")
    assert want.n_dropped == (7 if holes else 0)
    if kind == "polars":
        pl = pytest.importorskip("polars")
        other = pl.DataFrame(columns)
    elif kind == "pyarrow":
        other = pytest.importorskip("pyarrow").table(columns)
    elif kind == "arrays":
        other = {name: data[name].to_numpy() for name in data.columns}
    else:
        other = columns
    got = build_design(FORMULA, other, weights="w")
    same(got, want)
    assert got.index.tolist() == want.index.tolist()
    np.testing.assert_array_equal(got.new_data(other).X, want.new_data(data).X)


def test_polars_categories(data):
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame(data[["y", "x", "f", "g"]].to_dict("list"))
    want = build_design("y ~ f + (1|g)", data)
    same(build_design("y ~ f + (1|g)", frame.with_columns(pl.col("f").cast(pl.Categorical))), want)
    enum = frame.with_columns(pl.col("f").cast(pl.Enum(list("dzcba"))))
    d = build_design("y ~ f + (1|f)", enum)
    assert d.x_names == ("Intercept", "f[T.c]", "f[T.b]", "f[T.a]")
    assert d.groupings[0].levels.tolist() == list("dcba")


def test_arrow_dictionaries(data):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"y": data["y"], "g": data["g"], "f": pa.array(data["f"]).dictionary_encode()})
    same(build_design("y ~ f + (1|g)", table), build_design("y ~ f + (1|g)", data))
    ordered = pa.DictionaryArray.from_arrays([0, 1, 2, 3] * 6, list("dcba"), ordered=True)
    d = build_design("y ~ f + (1|g)", pa.table({"y": data["y"], "g": data["g"], "f": ordered}))
    assert d.x_names == ("Intercept", "f[T.c]", "f[T.b]", "f[T.a]")


def test_missing_rows_are_left_out_before_anything_is_learnt(data):
    data.loc["row3", "x"] = np.nan  # would poison scale()
    data.loc[data["f"] == "d", "y"] = np.nan  # the level d must go
    data.loc["row20", "g"] = np.nan
    d = build_design("y ~ scale(x) + f + (1|g)", data)
    kept = data.dropna()
    assert d.n_dropped == 24 - len(kept)
    assert d.dropped_by == {"y": 6, "x": 1, "g": 1}
    assert d.index.equals(kept.index)
    x = kept["x"].to_numpy()
    np.testing.assert_allclose(d.X[:, 1], (x - x.mean()) / x.std(ddof=1), atol=1e-14)
    assert d.x_names == ("Intercept", "scale(x)", "f[T.b]", "f[T.c]")
    clean = build_design("y ~ scale(x) + f + (1|g)", kept)
    np.testing.assert_array_equal(d.X, clean.X)
    np.testing.assert_array_equal(d.groupings[0].codes, clean.groupings[0].codes)


def test_levels_of_a_group_that_lost_its_rows_are_gone(data):
    data.loc[data["g"] == 10, "x"] = np.nan
    d = build_design("y ~ x + (1|g)", data)
    assert d.groupings[0].levels.tolist() == [5, 7, 8, 20, 30]
    assert set(d.groupings[0].codes) == set(range(5))


def test_missing_in_weights_and_offset(data):
    weights = data["w"].to_numpy().copy()
    weights[2] = np.nan
    data.loc["row4", "o"] = np.nan
    d = build_design("y ~ x + (1|g)", data, weights=weights, offset="o")
    assert d.dropped_by == {"weights": 1, "o": 1}
    np.testing.assert_array_equal(d.weights, np.delete(weights, [2, 4]))
    np.testing.assert_array_equal(d.offset, data["o"].dropna().drop("row2"))


def test_unused_columns_do_not_matter(data):
    data["unused"] = np.nan
    data["odd"] = [object()] * 24
    assert build_design("y ~ x + (1|g)", data).n_dropped == 0


def test_missing_raise(data):
    data.loc["row3", "x"] = np.nan
    data.loc[["row3", "row4"], "g"] = np.nan
    with pytest.raises(DataError, match=r"in 'x' \(1\), 'g' \(2\); 2 rows affected"):
        build_design("y ~ x + (1|g)", data, missing="raise")
    with pytest.raises(ValueError, match="missing='omit': choose 'drop' or 'raise'"):
        build_design("y ~ x + (1|g)", data, missing="omit")


def test_transform_that_makes_nan(data):
    data["x"] = np.abs(data["x"])
    data.loc[["row3", "row7"], "x"] = -1.0
    with pytest.warns(UserWarning, match=r"`np.log\(x\)` is not a number in 2 rows .*'row3'"):
        d = build_design("y ~ np.log(x) + f + (1|g)", data)
    assert d.dropped_by == {"np.log(x)": 2}
    assert d.n_dropped == 2
    np.testing.assert_array_equal(d.X[:, 1], np.log(data["x"].drop(["row3", "row7"])))
    with pytest.raises(DataError, match=r"'np.log\(x\)' \(2\)"):
        build_design("y ~ np.log(x) + f + (1|g)", data, missing="raise")
    with pytest.raises(DataError, match="not a number in any row"):
        build_design("y ~ scale(np.log(x)) + f + (1|g)", data)
    with pytest.raises(DataError, match="its values depend on other rows"):
        build_design("y ~ x.shift() + (1|g)", data)


def test_offsets_add_up(data):
    d = build_design("y ~ x + offset(o) + offset(log(w)) + (1|g)", data, offset=np.arange(24))
    want = data["o"] + np.log(data["w"]) + np.arange(24)
    np.testing.assert_allclose(d.offset, want, rtol=1e-15)
    new = d.new_data(data.iloc[:3], offset=[0, 1, 2])
    np.testing.assert_allclose(new.offset, want[:3], rtol=1e-15)
    with pytest.raises(DataError, match="pass offset= for the new rows"):
        d.new_data(data.iloc[:3])


def test_offset_by_name_is_needed_again(data):
    d = build_design("y ~ x + (1|g)", data, offset="o", weights="w")
    np.testing.assert_array_equal(d.new_data(data.iloc[:3]).offset, data["o"][:3])
    np.testing.assert_array_equal(d.weights, data["w"])
    with pytest.raises(DataError, match="no column 'o'"):
        d.new_data(data[["x", "g"]])


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


def test_spec_by_hand_without_random_terms(data):
    d = build_design(ModelSpec("y", "x", ()), data)
    assert (d.blocks, d.groupings) == ((), ())


def bad_rows(data, **columns):
    data = data.copy()
    for name, values in columns.items():
        data[name] = values
    return data


@pytest.mark.parametrize(
    ("formula", "change", "options", "message"),
    [
        ("y ~ X + (1|g)", {}, {}, r"no column 'X'.*fixed effects.*mean 'x'\?.*Columns: y, x, z"),
        ("y ~ x + (1|gg)", {}, {}, "no column 'gg'.*grouping factor.*mean 'g'"),
        ("yy ~ x + (1|g)", {}, {}, "no column 'yy'.*response"),
        ("y ~ x + (xx|g)", {}, {}, r"no column 'xx'.*random term \(xx \| g\)"),
        ("y ~ np.log(zz) + (1|g)", {}, {}, r"no column 'zz'.*term `np.log\(zz\)`.*mean 'z'"),
        ("y ~ offset(oo) + (1|g)", {}, {}, r"no column 'oo' in the data \(offset\)"),
        ("y ~ log(a.b) + (1|g)", {"a.b": 1.0}, {}, "in backticks: `a.b`"),
        ("y ~ poly(x, 2, raw=T) + (1|g)", {}, {}, "write True"),
        ("y ~ sqr(x) + (1|g)", {}, {}, r"unknown function sqr\(\).*did you mean sqrt\(\).*context"),
        ("y ~ ns(x, 3) + (1|g)", {}, {}, r"unknown function ns\(\).*use bs\(x, df="),
        ("y ~ lag(x) + (1|g)", {}, {}, "groupby"),
        ("f ~ x + (1|g)", {}, {}, r"response 'f' is not numeric \(values such as 'a', 'b'"),
        ("b ~ x + (1|g)", {}, {}, r"response 'b' is True/False.*astype\(float\)"),
        ("y ~ x + (1|g)", {"y": 2.0}, {}, "response 'y' is constant .every value is 2."),
        ("y ~ x + (1|g)", {"g": "one"}, {}, "factor 'g' has one level, 'one'.*variance"),
        ("y ~ x + (1|g)", {"x": np.nan}, {}, r"no row is left.*24.*'x' \(24\)"),
        ("y ~ x + (1|g)", {"x": [np.inf] + [0.0] * 23}, {}, "'x' is infinite in 1 row.*'row0'"),
        ("y ~ log(x) + (1|g)", {"x": [1.0, 0.0] * 12}, {}, r"'log\(x\)' is infinite.*12.*'row1'"),
        ("y ~ x:z + (1|g)", {"x": 1e200, "z": 1e200}, {}, "column 'x:z' is infinite"),
        ("y ~ x + (1|g)", {"x": pd.Timestamp("2020-01-01")}, {}, "'x' holds datetime.*days since"),
        ("y ~ x + (1|g)", {"x": 1j}, {}, "'x' holds complex128"),
        ("y ~ poly(f, 2) + (1|g)", {}, {}, r"cannot evaluate the term `poly\(f, 2\)`"),
        ("y ~ I(3) + (1|g)", {}, {}, r"`I\(3\)` gives one value, not one per row"),
        ("y ~ C(f, levels=['a', 'b']) + (1|g)", {}, {}, "lacks 'c', 'd'"),
        ("y ~ f + (1|g)", {}, {"contrasts": {"x": "sum"}}, "contrasts for 'x'.*factors: 'f'"),
        ("y ~ f + (1|g)", {}, {"contrasts": {"f": "sun"}}, "unknown contrasts 'sun' for 'f'"),
        ("y ~ f + (1|g)", {}, {"contrasts": {"f": np.eye(3)}}, "3 rows.*4 levels: a, b, c, d"),
        ("y ~ x + (1|g)", {}, {"weights": np.r_[1, 0, np.ones(22)]}, "'row1' is 0: remove rows"),
        ("y ~ x + (1|g)", {}, {"weights": np.r_[1, -2, np.ones(22)]}, "'row1' is -2"),
        ("y ~ x + (1|g)", {}, {"weights": np.r_[np.inf, np.ones(23)]}, "'weights' is infinite"),
        ("y ~ x + (1|g)", {}, {"weights": np.ones(3)}, "weights has 3 values for 24 rows"),
        ("y ~ x + (1|g)", {}, {"weights": "ww"}, "no column 'ww'.*mean 'w'"),
        ("y ~ x + (1|g)", {}, {"weights": ["a"] * 24}, "weights must be numeric"),
        ("y ~ x + (1|g)", {}, {"weights": np.ones((24, 1))}, "weights must be one-dimensional"),
        ("y ~ x + (1|g)", {}, {"offset": pd.Series(np.ones(24))}, r"index differs.*to_numpy\(\)"),
        ("y ~ `f[T.b]` + f + (1|g)", {"f[T.b]": 1.0}, {}, r"several columns named 'f\[T.b\]'"),
    ],
)
def test_errors(formula, change, options, message, data):
    with pytest.raises(DataError, match=message):
        build_design(formula, bad_rows(data, **change), **options)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (3, TypeError, "pandas or polars DataFrame, a pyarrow Table or a dict of columns, not int"),
        (np.ones((3, 3)), TypeError, r"design_from_arrays\(\)"),
        ({"y": [1.0, 2.0], "g": [1]}, DataError, "'y' has 2, 'g' 1"),
        ({"y": 1.0, "g": [1]}, DataError, "'y' is a single value, 1.0"),
        ({"y": [], "g": []}, DataError, "no rows"),
        ({"y": np.ones((2, 2)), "g": [1, 2]}, DataError, "'y' must be one-dimensional"),
    ],
)
def test_bad_containers(bad, error, message):
    with pytest.raises(error, match=message):
        build_design("y ~ 1 + (1|g)", bad)


def test_lazy_frame():
    pl = pytest.importorskip("polars")
    with pytest.raises(TypeError, match=r"pass data.collect\(\)"):
        build_design("y ~ 1 + (1|g)", pl.DataFrame({"y": [1.0]}).lazy())


def test_column_twice(data):
    data.columns = ["x" if c == "o" else c for c in data.columns]
    with pytest.raises(DataError, match="2 columns named 'x'"):
        build_design("y ~ x + (1|g)", data)


def test_bad_spec(data):
    with pytest.raises(TypeError, match="must be a ModelSpec or a formula, not dict"):
        build_design({}, data)


def test_new_data_levels_and_missing(data):
    d = build_design("y ~ f + x + (x|g) + (1|g:h)", data)
    new = d.new_data(
        {"f": ["a", "d", None, "b"], "x": [1, 2, 3, np.nan], "g": [30, 99, 5, 7], "h": list("vvuu")}
    )
    np.testing.assert_array_equal(new.missing, [False, False, True, True])
    np.testing.assert_array_equal(new.X[:2], [[1, 0, 0, 0, 1], [1, 0, 0, 1, 2]])
    np.testing.assert_array_equal(new.Z[0][:2], [[1, 1], [1, 2]])
    assert np.isnan(new.X[2:]).all()
    assert np.isnan(new.Z[0][2:]).all()
    assert new.codes[0].tolist() == [5, -1, 0, 1]
    assert new.codes[1].tolist() == [5, -1, 0, 1]
    # Both parts known, the combination not.
    assert d.new_data({"f": ["a"], "x": [1], "g": [30], "h": ["u"]}).codes[1].tolist() == [-1]


def test_new_data_missing_group(data):
    d = build_design("y ~ x + (1|g)", data)
    new = d.new_data({"x": [1.0, 2.0], "g": [30, np.nan]})
    assert new.codes[0].tolist() == [5, -1]
    assert new.missing.tolist() == [False, True]


def test_new_data_without_groups(data):
    d = build_design("y ~ f + (x|g)", data)
    new = d.new_data({"f": ["c", "a"]}, need_groups=False)
    np.testing.assert_array_equal(new.X, [[1, 0, 1, 0], [1, 0, 0, 0]])
    assert (new.Z, new.codes) == ((), ())
    with pytest.raises(DataError, match=r"no column 'x'.*random term"):
        d.new_data({"f": ["c"], "g": [5]})
    with pytest.raises(DataError, match=r"no column 'g'.*grouping factor"):
        d.new_data({"f": ["c"], "x": [5]})


def test_new_data_single_level_and_all_missing(data):
    d = build_design("y ~ f*poly(x, 2) + (f|g)", data)
    new = d.new_data(data.iloc[[7]])
    np.testing.assert_allclose(new.X, d.X[[7]], atol=1e-13)
    new = d.new_data(bad_rows(data.iloc[:2], x=np.nan))
    assert new.missing.all()
    assert new.X.shape == (2, len(d.x_names))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"f": ["zz"], "x": [1.0], "g": [5]}, "'f' has the level 'zz'.*known levels: 'a', 'b'"),
        ({"f": [1], "x": [1.0], "g": [5]}, "'f' is numeric in the new data.*categories: 'a'"),
        ({"f": ["a"], "x": ["u"], "g": [5]}, "'x' was numeric.*'u'"),
        ({"f": ["a"], "x": [np.inf], "g": [5]}, "'x' is infinite"),
        ({"f": ["a"], "x": [1.0], "g": ["5"]}, "labels of 'g' are of another type.*'5'.*convert"),
    ],
)
def test_new_data_errors(new, message, data):
    d = build_design("y ~ f + x + (f|g)", data)
    with pytest.raises(DataError, match=message):
        d.new_data(new)


def test_new_data_created_nan(data):
    d = build_design("y ~ np.log(z) + (1|g)", data)
    new = d.new_data({"z": [1.0, -1.0], "g": [5, 7]})
    assert new.missing.tolist() == [False, True]
    np.testing.assert_array_equal(new.X, [[1, 0], [np.nan, np.nan]])


def test_new_data_changes_nothing(data):
    d = build_design("y ~ scale(x) + bs(z, df=4) + hashed(f, levels=3) + (1|g)", data)
    before = pickle.dumps(d._state.transforms)
    d.new_data(data.iloc[2:5])
    assert pickle.dumps(d._state.transforms) == before
    np.testing.assert_array_equal(d.new_data(data).X, d.X)


def test_pickle(data):
    d = build_design(
        "np.log(w) ~ C(f, contr.poly)*h + bs(z, df=4) + (poly(x, 2)|g/h)",
        data,
        contrasts={"h": "sum"},
    )
    copy = pickle.loads(pickle.dumps(d))
    same(copy, d)
    a, b = copy.new_data(data.iloc[3:7]), d.new_data(data.iloc[3:7])
    np.testing.assert_array_equal(a.X, b.X)
    np.testing.assert_array_equal(a.codes[1], b.codes[1])


def test_no_warnings_and_no_change_to_the_data(data):
    before = data.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_design(FORMULA, data, weights="w", contrasts={"f": "poly"})
    pd.testing.assert_frame_equal(data, before)


def test_arrays_agree_with_a_formula(data):
    d = build_design("y ~ x + z + (x||g)", data, weights="w", offset="o")
    X = np.column_stack([np.ones(24), data["x"], data["z"]])
    a = design_from_arrays(
        data["y"],
        X,
        data["g"],
        X[:, :2],
        weights=data["w"].to_numpy(),
        offset=list(data["o"]),
        x_names=["Intercept", "x", "z"],
        z_names=["Intercept", "x"],
        group_name="g",
        covariance="diag",
    )
    assert (a.x_names, a.response_name) == (d.x_names, "y")
    assert a.spec.formula == "y ~ 1 + x + z + (1 + x || g)"
    np.testing.assert_array_equal(a.X, d.X)
    np.testing.assert_array_equal(a.blocks[0].Z, d.blocks[0].Z)
    np.testing.assert_array_equal(a.groupings[0].codes, d.groupings[0].codes)
    np.testing.assert_array_equal(a.weights, d.weights)
    np.testing.assert_array_equal(a.offset, d.offset)
    assert a.index.equals(data.index)
    assert not np.shares_memory(a.X, X)


def test_arrays_random_intercept_and_frames(data):
    a = design_from_arrays(data["y"].to_numpy(), data[["x", "my v"]], data["f"])
    assert a.x_names == ("x", "my v")
    assert a.blocks[0].names == ("Intercept",)
    assert a.spec.formula == "y ~ 0 + x + `my v` + (1 | Group)"
    assert parse_formula(a.spec.formula) == a.spec
    assert a.groupings[0].levels.tolist() == list("abcd")


@pytest.mark.parametrize(
    ("labels", "levels"),
    [
        ([3, 1, 2], [1, 2, 3]),
        (["b", "a", "c"], ["a", "b", "c"]),
        ([(2, "x"), (1, "y"), (1, "x")], [(1, "x"), (1, "y"), (2, "x")]),
        (["b", 1, (2, 3)], ["b", 1, (2, 3)]),
        ([2.5, 1.5, 0.5], [0.5, 1.5, 2.5]),
        ([datetime.date(2020, 1, 2), datetime.date(2020, 1, 1)], None),
        ([True, False, True], [False, True]),
    ],
)
def test_group_labels_of_any_type(labels, levels):
    n = 4 * len(labels)
    d = design_from_arrays(np.arange(n), np.ones(n), labels * 4)
    want = sorted(labels) if levels is None else levels
    assert d.groupings[0].levels.tolist() == want
    assert [d.groupings[0].levels[c] for c in d.groupings[0].codes] == labels * 4


def test_arrays_missing():
    y = [1.0, np.nan, 3.0, 4.0, 5.0, 6.0]
    X = np.array([[1, 1], [1, 2], [1, np.nan], [1, 4], [1, 5], [1, 6.0]])
    d = design_from_arrays(y, X, ["a", "b", "a", None, "b", "a"])
    assert d.dropped_by == {"y": 1, "x2": 1, "Group": 1}
    assert d.n_dropped == 3
    assert d.index.tolist() == [0, 4, 5]
    np.testing.assert_array_equal(d.X, [[1, 1], [1, 5], [1, 6]])
    with pytest.raises(DataError, match=r"'y' \(1\), 'x2' \(1\), 'Group' \(1\); 3 rows"):
        design_from_arrays(y, X, ["a", "b", "a", None, "b", "a"], missing="raise")


Y4, X4, G4 = [1.0, 2.0, 3.0, 5.0], np.ones((4, 2)), ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Y4, X4, G4[:3]), {}, "groups has 3 rows, but y has 4"),
        ((Y4, X4[:2], G4), {}, "X has 2 rows, but y has 4"),
        ((Y4, X4, G4, X4[:1]), {}, "Z has 1 rows, but y has 4"),
        (([Y4], X4, G4), {}, "y must be .*numeric|y must be one-dimensional"),
        ((np.array([Y4]).T, X4, G4), {}, r"y must be one-dimensional, its shape is \(4, 1\)"),
        ((list("abcd"), X4, G4), {}, "response y must be numeric"),
        (([True, False] * 2, X4, G4), {}, "must be numeric, not True/False"),
        (([1.0] * 4, X4, G4), {}, "response 'y' is constant"),
        ((Y4, [["a"]] * 4, G4), {}, "X must be numeric"),
        ((Y4, np.ones((4, 1, 1)), G4), {}, "X must be two-dimensional"),
        ((Y4, np.full((4, 1), np.inf), G4), {}, "'x1' is infinite"),
        ((Y4, X4, ["a"] * 4), {}, "one level, 'a'"),
        ((Y4, X4, G4), {"x_names": ["u"]}, "one name for each of the 2 columns of X"),
        ((Y4, X4, G4), {"x_names": ["u", "u"]}, "several columns named 'u'"),
        ((Y4, X4, G4), {"z_names": ["u", "v"]}, "z_names needs one name"),
        ((Y4, X4, G4), {"weights": [1, 1, 1, 0]}, "weight of row 3 is 0: remove"),
        ((Y4, X4, G4), {"weights": [1]}, "weights has 1 rows"),
        ((Y4, X4, G4), {"weights": "w"}, "without a data frame, give an array"),
        (([], [], []), {}, "no rows"),
    ],
)
def test_arrays_errors(arguments, options, message):
    with pytest.raises(DataError, match=message):
        design_from_arrays(*arguments, **options)


def test_arrays_covariance():
    with pytest.raises(ValueError, match="unknown covariance structure 'cs'"):
        design_from_arrays(Y4, X4, G4, covariance="cs")


def test_arrays_new_data():
    d = design_from_arrays(Y4, X4 * [1, 2], G4, [1.0, 2.0, 3.0, 4.0])
    new = d.new_data({"X": [[1, 2], [1, np.nan]], "Z": [3.0, 4.0], "groups": ["b", "zz"]})
    np.testing.assert_array_equal(new.missing, [False, True])
    np.testing.assert_array_equal(new.Z[0], [[3.0], [np.nan]])
    assert new.codes[0].tolist() == [1, -1]
    assert d.new_data({"X": [[1, 2]]}, need_groups=False).Z == ()
    for bad, message in [
        ({"X": [[1, 2]]}, "lack 'groups'"),
        ({"X": [[1, 2]], "groups": ["a"]}, "lack 'Z'"),
        ({"X": [[1]], "groups": ["a"], "Z": [1.0]}, "X has 1 columns, the model has 2"),
        ({"X": [[1, 2]], "groups": ["a", "b"], "Z": [1.0]}, "groups has 2 rows, but X has 1"),
    ]:
        with pytest.raises(DataError, match=re.escape(message)):
            d.new_data(bad)
    with pytest.raises(TypeError, match="pass a dict with 'X'"):
        d.new_data([[1, 2]])


def test_hand_made_term_with_backticks(data):
    spec = ModelSpec("y", "`my v`", [RandomTerm("`my v`", "g", "diag")], ["o^2"])
    d = build_design(spec, data)
    assert d.x_names == ("Intercept", "my v")
    np.testing.assert_array_equal(d.offset, data["o"] ** 2)
