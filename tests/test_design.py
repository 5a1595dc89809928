"""Data + ModelSpec -> Design, and the design of new data."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest

from lmmax.covariances import OrnsteinUhlenbeck, Toeplitz
from lmmax.design import DataError, build_design
from lmmax.formula import parse_formula
from lmmax.spec import ModelSpec, RandomTerm

from .example_data import FORMULA, example, same


@pytest.fixture
def data():
    return example()


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


def test_no_fixed_effects(data):
    d = build_design("y ~ 0 + (1|g)", data)
    assert d.X.shape == (24, 0)
    assert d.new_data(data.iloc[:2]).X.shape == (2, 0)


def test_terms_with_one_group_share_a_grouping(data):
    d = build_design("y ~ x + (1|g) + (1|h) + (0 + x|g) + (1|g:h)", data)
    assert [b.grouping for b in d.blocks] == [0, 1, 0, 2]
    assert [g.name for g in d.groupings] == ["g", "h", "g:h"]


def test_combinations_in_another_order_share_a_grouping(data):
    d = build_design("y ~ x + (1|g:h) + (0 + x|h:g) + (1|h)", data)
    assert [b.grouping for b in d.blocks] == [0, 0, 1]
    assert [g.name for g in d.groupings] == ["g:h", "h"]
    new = d.new_data({"x": [1.0], "g": [30], "h": ["v"]})
    assert [codes.tolist() for codes in new.codes] == [[5], [1]]
    assert [len(Z) for Z in new.Z] == [1, 1, 1]


def test_covariances_are_ready(data):
    data["t"] = np.tile([0.0, 1.0, 4.0], 8)
    formula = "y ~ (x|g) + (x||h) + cs(0 + f|g) + ar1(0 + C(t)|g:h) + ou(0 + C(t)|h)"
    d = build_design(formula, data)
    names = ["us", "diag", "cs", "ar1", "ou"]
    assert [block.covariance.name for block in d.blocks] == names
    assert d.blocks[4].covariance == OrnsteinUhlenbeck((0.0, 1.0, 4.0))
    assert d.blocks[3].names == ("C(t)[0]", "C(t)[1]", "C(t)[4]")
    np.testing.assert_array_equal(d.blocks[3].Z @ [0.0, 1.0, 4.0], data["t"])


FACTORS = {
    "ordered": pd.Categorical(list("abc") * 8, categories=list("abc"), ordered=True),
    "unordered": pd.Categorical(list("abc") * 8, categories=list("cab")),
    "more categories": pd.Categorical(list("abc") * 8, categories=list("zabc")),
    "numbers as text": ["1", "2", "9"] * 8,
    "number categories": pd.Categorical([3, 1, 2] * 8, categories=[3, 1, 2]),
    "dates": pd.Categorical(pd.to_datetime(["2020-01-01", "2021-01-01", "2020-02-01"] * 8)),
}


@pytest.mark.parametrize("kind", FACTORS)
def test_levels_in_order(kind):
    data = {"y": np.arange(24.0) % 5, "t": FACTORS[kind], "g": np.repeat([1, 2], 12)}
    d = build_design("y ~ toep(0 + t|g)", data)
    assert d.blocks[0].covariance == Toeplitz()
    assert len(d.blocks[0].names) == 3
    build_design("y ~ ar1(0 + C(t)|g)", data)
    if kind == "number categories":
        ou = build_design("y ~ ou(0 + t|g)", data).blocks[0].covariance
        assert ou == OrnsteinUhlenbeck((3.0, 1.0, 2.0))


def test_polars_enum_is_in_order():
    t = pl.Series(list("abc") * 8, dtype=pl.Enum(list("abc")))
    data = pl.DataFrame({"y": np.arange(24.0) % 5, "t": t, "g": np.repeat([1, 2], 12)})
    assert build_design("y ~ ar1(0 + t|g)", data).blocks[0].covariance.name == "ar1"
    with pytest.raises(DataError, match="only sorted as text"):
        build_design("y ~ ar1(0 + t|g)", data.cast({"t": pl.String}))


def test_order_given_in_the_formula():
    data = {"y": np.arange(24.0) % 5, "t": list("abc") * 8, "g": np.repeat([1, 2], 12)}
    d = build_design("y ~ ar1(0 + C(t, levels=['c', 'a', 'b'])|g)", data)
    assert [name[-3:] for name in d.blocks[0].names] == ["[c]", "[a]", "[b]"]


@pytest.mark.parametrize(
    ("formula", "t", "message"),
    [
        ("ar1(0 + t|g)", list("abc") * 8, r"'t' \('a', 'b', 'c'\) are only .* pd.Categorical"),
        ("toep(0 + t|g)", pd.Categorical(list("abc") * 8), "only sorted as text"),
        ("ar1(0 + t|g)", ["1", "2", "10"] * 8, "numbers as text.*to_numeric"),
        ("ar1(0 + t|g)", [1, 2, 3] * 8, r"write `ar1\(0 \+ f \| group\)`, with `C\(f\)`"),
        ("ar1(C(t)|g)", [1, 2, 3] * 8, r"ar1\(C\(t\) \| g\) is not one factor without intercept"),
        ("hetar1(0 + C(t):x|g)", [1, 2, 3] * 8, "is not one factor without intercept"),
        ("ou(0 + C(t, levels=['c', 'a', 'b'])|g)", list("abc") * 8, "are not numbers"),
        ("cs(0 + x|g)", list("abc") * 8, "has one effect, 'x', and 'cs' correlates two or more"),
    ],
)
def test_terms_that_do_not_suit_a_covariance(formula, t, message):
    data = {"y": np.arange(24.0) % 5, "x": np.sin(np.arange(24.0)), "t": t}
    with pytest.raises(DataError, match=message):
        build_design(f"y ~ {formula}", {**data, "g": np.repeat([1, 2], 12)})


def test_rows_keep_their_order(data):
    shuffled = data.sample(frac=1, random_state=0)
    a, b = build_design("y ~ x*f + (x|g:h)", data), build_design("y ~ x*f + (x|g:h)", shuffled)
    order = data.index.get_indexer(shuffled.index)
    np.testing.assert_array_equal(a.X[order], b.X)
    np.testing.assert_array_equal(a.groupings[0].codes[order], b.groupings[0].codes)
    assert b.index.equals(shuffled.index)


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
        ("y ~ x + (1|g)", {"g": "one"}, {}, r"'g' has one level, 'one'.*leave out \(1 \| g\)"),
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
    d = build_design("y ~ 1 + (x|g)", data)
    assert d.new_data({"g": [5, 7]}, need_groups=False).X.tolist() == [[1.0], [1.0]]


def test_new_data_for_some_groups(data):
    d = build_design("y ~ f + (1|g) + (x|h) + (0 + z|g)", data)
    new = d.new_data({"f": ["c", "a"], "h": ["v", "?"], "x": [2.0, np.nan]}, need_groups=["h"])
    assert new.codes[0] is new.Z[0] is new.Z[2] is None
    assert new.codes[1].tolist() == [1, -1]
    np.testing.assert_array_equal(new.Z[1], [[1.0, 2.0], [np.nan, np.nan]])
    assert new.missing.tolist() == [False, True]
    both = d.new_data(data, need_groups={"h", "g"})
    for a, b in zip(both.Z, d.new_data(data).Z, strict=True):
        np.testing.assert_array_equal(a, b)
    none = d.new_data({"f": ["c"]}, need_groups=())
    assert (none.Z, none.codes) == ((None, None, None), (None, None))
    assert d.new_data(data, need_groups="g").codes[1] is None
    with pytest.raises(DataError, match=r"no column 'h'.*grouping factor"):
        d.new_data({"f": ["c"], "x": [1.0]}, need_groups=["h"])
    with pytest.raises(DataError, match=r"name 'k', which is no grouping factor.*'g', 'h'"):
        d.new_data(data, need_groups=["h", "k"])


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
    before = pickle.dumps(d._recipe)
    d.new_data(data.iloc[2:5])
    assert pickle.dumps(d._recipe) == before
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


def test_hand_made_term_with_backticks(data):
    spec = ModelSpec("y", "`my v`", [RandomTerm("`my v`", "g", "diag")], ["o^2"])
    d = build_design(spec, data)
    assert d.x_names == ("Intercept", "my v")
    np.testing.assert_array_equal(d.offset, data["o"] ** 2)


def test_repr_is_short(data):
    d = build_design("y ~ x + (x|g) + (1|h)", data)
    sizes = "24 rows, 2 fixed effects, 6 groups of g, 2 groups of h"
    assert repr(d) == f"Design('y ~ x + (x | g) + (1 | h)': {sizes})"
