"""Arrays without a formula -> Design."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pandas as pd
import pytest

from lmmax.covariances import OrnsteinUhlenbeck
from lmmax.design import DataError, build_design, design_from_arrays
from lmmax.formula import parse_formula

from .example_data import example, same


@pytest.fixture
def data():
    return example()


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
        ((Y4, X4, G4), {"weights": "w"}, "weights is a single value, 'w'"),
        (([], [], []), {}, "no rows"),
    ],
)
def test_arrays_errors(arguments, options, message):
    with pytest.raises(DataError, match=message):
        design_from_arrays(*arguments, **options)


def test_arrays_covariance():
    with pytest.raises(ValueError, match="unknown covariance structure 'spam'"):
        design_from_arrays(Y4, X4, G4, covariance="spam")
    with pytest.raises(DataError, match="one effect, 'Intercept', and 'cs' correlates two"):
        design_from_arrays(Y4, X4, G4, covariance="cs")
    d = design_from_arrays(Y4, X4, G4, np.eye(4)[:, :3], covariance="toeph")
    assert d.spec.random[0].covariance == d.blocks[0].covariance.name == "toep"
    d = design_from_arrays(Y4, X4, G4, np.eye(4)[:, :3], covariance="ou", z_names=[0, 1.5, 4])
    assert d.blocks[0].covariance == OrnsteinUhlenbeck((0.0, 1.5, 4.0))
    assert parse_formula(d.spec.formula) == d.spec
    with pytest.raises(DataError, match="for arrays give the times as z_names"):
        design_from_arrays(Y4, X4, G4, np.eye(4)[:, :3], covariance="ou")


SEVERAL = {"g": G4, "my h": [1, 1, 2, 2]}


def test_arrays_several_groups_agree_with_a_formula(data):
    d = build_design("y ~ x + (1 + x||g) + (1|h) + homcs(0 + f|k)", data.assign(k=data["g"] % 3))
    dummies = np.array(data["f"].to_numpy()[:, None] == list("abcd"), dtype=float)
    a = design_from_arrays(
        data["y"],
        d.X,
        pd.DataFrame({"g": data["g"], "h": data["h"], "k": data["g"] % 3}),
        {"g": d.X, "k": dummies},
        x_names=d.x_names,
        z_names={"g": d.x_names},
        covariance={"g": "diag", "k": "homcs"},
    )
    assert a.spec.formula == (
        "y ~ 1 + x + (1 + x || g) + (1 | h) + homcs(0 + z1 + z2 + z3 + z4 | k)"
    )
    for ours, theirs in zip(a.blocks, d.blocks, strict=True):
        np.testing.assert_array_equal(ours.Z, theirs.Z)
        assert ours.grouping == theirs.grouping
        assert ours.covariance == theirs.covariance
    for ours, theirs in zip(a.groupings, d.groupings, strict=True):
        assert ours.name == theirs.name
        np.testing.assert_array_equal(ours.codes, theirs.codes)


def test_arrays_several_groups_missing():
    groups = {"a": ["u", None, "v", "u", "v"], "b": [1, 2, 1, 2, 1]}
    Z = {"b": [1.0, 2.0, np.nan, 4.0, 5.0]}
    d = design_from_arrays([1.0, 2, 3, 4, 5], np.ones(5), groups, Z)
    assert d.dropped_by == {"a": 1, "z1 | b": 1}
    assert d.index.tolist() == [0, 3, 4]
    assert d.spec.formula == "y ~ 0 + x1 + (1 | a) + (0 + z1 | b)"


def test_arrays_several_groups_new_data():
    d = design_from_arrays(Y4, X4 * [1, 2], SEVERAL, {"my h": [1.0, 2.0, 3.0, 4.0]})
    new = d.new_data(
        {
            "X": [[1, 2], [1, 3]],
            "groups": {"g": ["b", "zz"], "my h": [2, 1]},
            "Z": {"my h": [7.0, np.nan]},
        }
    )
    assert [codes.tolist() for codes in new.codes] == [[1, -1], [1, 0]]
    np.testing.assert_array_equal(new.Z[0], [[1.0], [np.nan]])
    np.testing.assert_array_equal(new.Z[1], [[7.0], [np.nan]])
    some = d.new_data({"X": [[1, 2]], "groups": {"g": ["a"]}}, need_groups=["g"])
    assert (some.codes[0].tolist(), some.codes[1], some.Z[1]) == ([0], None, None)
    assert d.new_data({"X": [[1, 2]]}, need_groups=False).codes == ()
    ok = {"g": ["a"], "my h": [1]}
    for bad, message in [
        ({}, "lack 'groups' of 'g'"),
        ({"groups": {"g": ["a"]}, "Z": {"my h": [1.0]}}, "lack 'groups' of 'my h'"),
        ({"groups": ok}, "lack 'Z' of 'my h'"),
        ({"groups": ["a"]}, "'groups' of the new data must be a mapping"),
        ({"groups": {**ok, "k": [1]}}, "groups has the name 'k', which is no grouping factor"),
        ({"groups": ok, "Z": {"my h": [1.0, 2.0]}}, "Z['my h'] has 2 rows, but X has 1"),
        ({"groups": ok, "Z": {"my h": [[1.0, 2.0]]}}, "Z['my h'] has 2 columns, the model has 1"),
    ]:
        with pytest.raises(DataError, match=re.escape(message)):
            d.new_data({"X": [[1, 2]], **bad})
    same(pickle.loads(pickle.dumps(d)), d)


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ({}, {}, "names no grouping factor"),
        ({"g": G4[:3]}, {}, "groups['g'] has 3 rows, but y has 4"),
        ({"g": ["a"] * 4}, {}, "grouping factor 'g' has one level"),
        (SEVERAL, {"Z": {"g": X4[:1]}}, "Z['g'] has 1 rows, but y has 4"),
        (SEVERAL, {"Z": {"g": X4[:, :0]}}, "Z['g'] has no columns"),
        (SEVERAL, {"Z": {"g": [["a"]] * 4}}, "Z['g'] must be numeric"),
        (SEVERAL, {"Z": {"k": X4}}, "Z has the name 'k', which is no grouping factor; the"),
        (SEVERAL, {"Z": X4}, "Z must be a mapping from the names of the grouping factors"),
        (SEVERAL, {"z_names": ["u"]}, "z_names must be a mapping"),
        (SEVERAL, {"z_names": {"g": ["u", "v"]}}, "z_names['g'] needs one name"),
        (SEVERAL, {"Z": {"g": X4}, "z_names": {"g": ["u"]}}, "z_names['g'] must hold one name"),
        (SEVERAL, {"covariance": {"k": "us"}}, "covariance has the name 'k'"),
        (SEVERAL, {"group_name": "Pig"}, "groups names them already"),
        (pd.DataFrame([[1, 2]] * 4, columns=["g", "g"]), {}, "more than once"),
        (G4, {"Z": {"g": X4}}, "Z is a mapping, so groups must be one too"),
        (G4, {"covariance": {"g": "us"}}, "covariance is a mapping, so groups must be one too"),
    ],
)
def test_arrays_several_groups_errors(groups, options, message):
    with pytest.raises(DataError, match=re.escape(message)):
        design_from_arrays(Y4, X4, groups, **options)


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
