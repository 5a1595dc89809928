"""Data containers -> columns; missing values."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lmmax.design import DataError, build_design

from .example_data import FORMULA, example, same


@pytest.fixture
def data():
    return example()


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
    with pytest.raises(ValueError, match="missing='omit' is unknown; use 'drop' or 'raise'"):
        build_design("y ~ x + (1|g)", data, missing="omit")


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (3, TypeError, "pandas or polars DataFrame, a pyarrow Table or a dict of columns, not int"),
        (np.ones((3, 3)), TypeError, r"fit_arrays\(\)"),
        ({"y": [1.0, 2.0], "g": [1]}, DataError, "'y' 2, 'g' 1"),
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


def test_row_labels_may_repeat(data):
    data.index = [0] * len(data)
    data.iloc[3, data.columns.get_loc("x")] = np.nan
    d = build_design("y ~ scale(x) + f + (x|g:h)", data)
    assert d.index.tolist() == [0] * 23
    same(d, build_design("y ~ scale(x) + f + (x|g:h)", data.reset_index(drop=True)))
