"""The bundled data sets hold the published numbers and say where they come from."""

from __future__ import annotations

import json
from importlib.resources import files

import pandas as pd
import pytest

from lmmax import datasets

# name: rows, {numeric column: (min, max, sum)}, {categorical column: number of levels}.
# Written down independently of the bundled files.
FACTS: dict[str, tuple[int, dict[str, tuple[float, float, float]], dict[str, int]]] = {
    "dietox": (
        861,
        {
            "Weight": (15.0, 117.0, 52284.88677),
            "Time": (1, 12, 5580),
            "Start": (15, 35.39999, 22104.1957),
            "Feed": (3.300003, 224.5, 63694.900938),
        },
        {"Pig": 72, "Litter": 21, "Evit": 3, "Cu": 3},
    ),
    "sleepstudy": (
        180,
        {"Reaction": (194.3322, 466.3535, 53731.4205), "Days": (0, 9, 810)},
        {"Subject": 18},
    ),
    "dyestuff": (30, {"Yield": (1440, 1635, 45825)}, {"Batch": 6}),
    "dyestuff2": (30, {"Yield": (-0.892, 13.434, 169.968)}, {"Batch": 6}),
    "penicillin": (144, {"diameter": (18, 27, 3308)}, {"plate": 24, "sample": 6}),
    "pastes": (60, {"strength": (54.2, 66, 3603.2)}, {"batch": 10, "cask": 3, "sample": 30}),
    "orthodont": (
        108,
        {"distance": (16.5, 31.5, 2594.5), "age": (8, 14, 1188)},
        {"Subject": 27, "Sex": 2},
    ),
    "cake": (
        270,
        {"angle": (18, 63, 8673), "temp": (175, 225, 54000)},
        {"recipe": 3, "temperature": 6, "replicate": 15},
    ),
    "machines": (54, {"score": (43, 72.1, 3221.1)}, {"Machine": 3, "Worker": 6}),
    "oxboys": (
        234,
        {"height": (126.2, 174.8, 34987.54), "age": (-1, 1.0055, 5.2965)},
        {"Subject": 26, "Occasion": 9},
    ),
    "rail": (18, {"travel": (26, 100, 1197)}, {"Rail": 6}),
    "ergostool": (36, {"effort": (7, 15, 369)}, {"Type": 4, "Subject": 9}),
    "insteval": (
        73421,
        {"y": (1, 5, 235369)},
        {"s": 2972, "d": 1128, "service": 2, "dept": 14, "studage": 4, "lectage": 6},
    ),
}


def test_names_are_the_sets_checked_here():
    assert datasets.names() == tuple(sorted(FACTS))


@pytest.mark.parametrize("name", FACTS)
def test_facts(name):
    rows, numeric, levels = FACTS[name]
    frame = datasets.load(name)
    assert len(frame) == rows
    assert set(frame.columns) == {*numeric, *levels}
    for column, (low, high, total) in numeric.items():
        assert pd.api.types.is_numeric_dtype(frame[column])
        assert frame[column].min() == low
        assert frame[column].max() == high
        assert frame[column].sum() == pytest.approx(total, rel=1e-13)
    for column, count in levels.items():
        categories = frame[column].cat.categories
        assert len(categories) == count
        assert all(isinstance(level, str) for level in categories)
        assert list(categories) == sorted(categories)
        assert not frame[column].cat.ordered
        assert frame[column].notna().all()


def test_only_dietox_has_missing_values():
    for name in datasets.names():
        missing = datasets.load(name).isna().sum()
        expected = {"Feed": 72} if name == "dietox" else {}
        assert missing[missing > 0].to_dict() == expected


def test_published_group_means():
    """Batch means of Davies and Goldsmith's dyestuff data, machine means of Milliken and
    Johnson's, and the average reaction on days 0 and 9 of the sleep study."""
    dyestuff = datasets.load("dyestuff").groupby("Batch", observed=True)["Yield"].mean()
    assert dyestuff.to_dict() == {
        "A": 1505,
        "B": 1528,
        "C": 1564,
        "D": 1498,
        "E": 1600,
        "F": 1470,
    }
    machines = datasets.load("machines").groupby("Machine", observed=True)["score"].mean()
    assert machines.round(3).to_dict() == {"A": 52.356, "B": 60.322, "C": 66.272}
    days = datasets.load("sleepstudy").groupby("Days")["Reaction"].mean()
    assert days[0] == pytest.approx(256.6518, abs=5e-5)
    assert days[9] == pytest.approx(350.8512, abs=5e-5)


def test_labels_of_insteval_are_those_of_the_package():
    """Lecturers go up to 2160 and departments lack 13, both as in R."""
    frame = datasets.load("insteval")
    assert frame["d"].astype(int).max() == 2160
    assert set(frame["dept"].cat.categories) == {str(i) for i in range(1, 16)} - {"13"}
    assert frame["studage"].cat.categories.tolist() == ["2", "4", "6", "8"]
    assert frame["service"].value_counts().to_dict() == {"0": 41638, "1": 31783}


def test_designs_of_the_examples():
    """Every plate meets every sample once; casks lie in batches, two assays each; students cross
    lecturers, each of whom lies in one department."""
    penicillin = datasets.load("penicillin")
    assert (penicillin.groupby(["plate", "sample"], observed=True).size() == 1).all()
    pastes = datasets.load("pastes")
    assert (pastes.groupby(["batch", "cask"], observed=True).size() == 2).all()
    assert (pastes.groupby("sample", observed=True)["batch"].nunique() == 1).all()
    insteval = datasets.load("insteval")
    assert not insteval.duplicated(["s", "d"]).any()
    assert (insteval.groupby("d", observed=True)["s"].nunique() >= 10).all()
    assert (insteval.groupby("d", observed=True)["dept"].nunique() == 1).all()


def test_sleepstudy_has_no_made_up_columns():
    assert list(datasets.load("sleepstudy").columns) == ["Reaction", "Days", "Subject"]


def test_load_returns_a_fresh_copy():
    first = datasets.load("rail")
    first.loc[:, "travel"] = 0
    first["Rail"] = "x"
    pd.testing.assert_frame_equal(datasets.load("rail"), datasets.load("rail"))
    assert datasets.load("rail")["travel"].sum() == 1197


@pytest.mark.parametrize("name", FACTS)
def test_describe(name):
    info = datasets.describe(name)
    frame = datasets.load(name)
    assert [column.name for column in info.columns] == list(frame.columns)
    assert info.n_rows == len(frame)
    assert all((info.title, info.source, info.citation, info.licence))
    assert all(column.description for column in info.columns)
    page = str(info)
    for piece in (name, info.citation, info.source, *frame.columns):
        assert piece in page


@pytest.mark.parametrize(
    ("wrong", "near"), [("diettox", "dietox"), ("SleepStudy", "sleepstudy"), ("pens", "pastes")]
)
def test_unknown_name_gives_near_ones_and_the_list(wrong, near):
    with pytest.raises(ValueError, match="no bundled data set") as caught:
        datasets.load(wrong)
    message = str(caught.value)
    assert repr(wrong) in message
    assert near in message
    assert all(name in message for name in datasets.names())


def test_names_that_are_paths_are_refused():
    with pytest.raises(ValueError, match="no bundled data set"):
        datasets.load("../datasets/data/rail")


def test_no_file_without_a_catalogue_entry():
    folder = files("lmmax.datasets") / "data"
    stems = sorted(item.name.removesuffix(".gz").removesuffix(".csv") for item in folder.iterdir())
    assert tuple(stems) == datasets.names()
    json.loads((files("lmmax.datasets") / "catalogue.json").read_text(encoding="utf-8"))
