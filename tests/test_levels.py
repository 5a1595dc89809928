"""Grouping factors: labels, levels, combinations."""

from __future__ import annotations

import datetime

import numpy as np
import pandas as pd
import pytest

from lmmax.design import build_design, design_from_arrays

from .example_data import example


@pytest.fixture
def data():
    return example()


def test_combinations_hold_only_those_that_occur(data):
    d = build_design("y ~ 1 + (1|h/g)", data)
    assert d.groupings[1].name == "h:g"
    # Sorted part by part, the numbers as numbers.
    want = ["u:5", "u:7", "u:8", "v:10", "v:20", "v:30"]
    assert d.groupings[1].levels.tolist() == want
    labels = [f"{h}:{g}" for h, g in zip(data["h"], data["g"], strict=True)]
    assert d.groupings[1].levels.to_numpy()[d.groupings[1].codes].tolist() == labels


def test_levels_of_a_group_that_lost_its_rows_are_gone(data):
    data.loc[data["g"] == 10, "x"] = np.nan
    d = build_design("y ~ x + (1|g)", data)
    assert d.groupings[0].levels.tolist() == [5, 7, 8, 20, 30]
    assert set(d.groupings[0].codes) == set(range(5))


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


def test_combinations_whose_names_would_be_equal_read_apart():
    data = pd.DataFrame({"y": [1.0, 2.0, 4.0], "a": ["p:q", "p", "p:q"], "b": ["r", "q:r", "r"]})
    d = build_design("y ~ 1 + (1|a:b)", data)
    assert d.groupings[0].levels.tolist() == ["'p':'q:r'", "'p:q':'r'"]
    assert d.groupings[0].codes.tolist() == d.new_data(data).codes[0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("dtype", [float, "Int64", object])
def test_whole_numbers_stay_whole_beside_missing_values(dtype, data):
    data["g"] = data["g"].astype(dtype)
    data.loc["row0", "g"] = None
    d = build_design("y ~ 1 + (1|g) + (1|g:h)", data)
    assert [str(level) for level in d.groupings[0].levels] == ["5", "7", "8", "10", "20", "30"]
    assert d.groupings[1].levels[0] == "5:u"
    new = d.new_data({"g": [7.0, 9.0, np.nan], "h": list("uuu")})
    assert [codes.tolist() for codes in new.codes] == [[1, -1, -1], [1, -1, -1]]


def test_integers_too_large_for_a_machine_word_are_labels(data):
    data["g"] = [10**30 + g for g in data["g"]]
    d = build_design("y ~ 1 + (1|g)", data)
    assert d.groupings[0].levels[0] == 10**30 + 5


@pytest.mark.parametrize("dtype", ["uint64", "Int64"])
def test_large_integers_stay_apart(dtype, data):
    data["g"] = (data["g"].astype("int64") + 2**60).astype(dtype)
    if dtype == "Int64":
        data.loc["row0", "g"] = pd.NA
    d = build_design("y ~ 1 + (1|g)", data)
    assert d.groupings[0].levels.tolist() == [2**60 + g for g in (5, 7, 8, 10, 20, 30)]
    a = design_from_arrays(data["y"], np.ones(24), data["g"])
    assert a.groupings[0].levels.tolist() == d.groupings[0].levels.tolist()
