"""Arrays without a formula -> Design."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lmmax.design import DataError, build_design, design_from_arrays
from lmmax.formula import parse_formula

from .example_data import example


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
