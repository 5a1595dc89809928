"""Known relationship matrices of grouping factors."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest

from lmmax.design import DataError, build_design, design_from_arrays
from lmmax.relationship import with_relationships

# Two parents, their two children, and a child of those two.
ANIMALS = ["dam", "sire", "son", "sis", "inbred"]
A = pd.DataFrame(
    [
        [1.0, 0.0, 0.5, 0.5, 0.5],
        [0.0, 1.0, 0.5, 0.5, 0.5],
        [0.5, 0.5, 1.0, 0.5, 0.75],
        [0.5, 0.5, 0.5, 1.0, 0.75],
        [0.5, 0.5, 0.75, 0.75, 1.25],
    ],
    ANIMALS,
    ANIMALS,
)


@pytest.fixture
def data():
    animals = ["son", "sis", "inbred", "son", "sire", "sis", "inbred", "sire"]
    return pd.DataFrame(
        {"y": np.arange(8.0) ** 2, "animal": animals, "pen": list("uvuvvuvu"), "tag": [7, 8] * 4}
    )


def test_root_of_the_levels_that_occur(data):
    d = build_design("y ~ 1 + (1|animal) + (1|pen)", data, relmat={"animal": A})
    animal, pen = d.groupings
    assert animal.levels.tolist() == ["inbred", "sire", "sis", "son"]
    want = A.loc[animal.levels, animal.levels].to_numpy()
    np.testing.assert_allclose(animal.root @ animal.root.T, want, rtol=1e-14)
    np.testing.assert_array_equal(animal.root, np.tril(animal.root))
    assert (np.diag(animal.root) > 0.0).all()
    assert animal.root.dtype == np.float64
    assert pen.root is None
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(d)).groupings[0].root, animal.root)


def test_order_of_labels_makes_no_difference(data):
    d = build_design("y ~ 1 + (1|animal)", data, relmat={"animal": A})
    shuffled = A.loc[ANIMALS[::-1], ["son", "dam", "inbred", "sis", "sire"]]
    e = build_design("y ~ 1 + (1|animal)", data, relmat={"animal": shuffled})
    np.testing.assert_array_equal(d.groupings[0].root, e.groupings[0].root)


def test_levels_lost_with_their_rows(data):
    data.loc[data["animal"] == "sire", "y"] = np.nan
    d = build_design("y ~ 1 + (1|animal)", data, relmat={"animal": A})
    assert d.groupings[0].root.shape == (3, 3)


def test_none_and_empty(data):
    for relmat in (None, {}):
        d = build_design("y ~ 1 + (1|animal)", data, relmat=relmat)
        assert d.groupings[0].root is None
    assert with_relationships(d.groupings, None)[0] is d.groupings[0]


def test_numbers_combinations_and_arrays(data):
    tags = pd.DataFrame([[1, 0.5], [0.5, 1]], [8, 7], [8, 7])
    d = build_design("y ~ 1 + (1|tag)", data.astype({"tag": float}), relmat={"tag": tags})
    np.testing.assert_allclose(d.groupings[0].root, [[1.0, 0.0], [0.5, np.sqrt(0.75)]])
    cells = ["7:u", "7:v", "8:u", "8:v"]
    pairs = pd.DataFrame(np.eye(4) + 1.0, cells, cells)
    d = build_design("y ~ 1 + (1|tag:pen)", data, relmat={"tag:pen": pairs})
    np.testing.assert_allclose(d.groupings[0].root, np.linalg.cholesky(np.eye(4) + 1.0))
    d = design_from_arrays(data["y"], np.ones(8), data["tag"], relmat={"Group": tags})
    assert d.groupings[0].root.shape == (2, 2)
    groups = data[["animal", "tag"]]
    d = design_from_arrays(data["y"], np.ones(8), groups, relmat={"tag": tags})
    assert [g.root is None for g in d.groupings] == [True, False]


def changed(i, j, value, both=True):
    B = A.copy()
    B.loc[i, j] = value
    if both:
        B.loc[j, i] = value
    return B


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (A.to_numpy(), r"must be a pandas DataFrame whose index.*not ndarray: write pd.DataFrame"),
        (A.reset_index(drop=True), "index of .*'animal' lacks 4 levels of the data: 'inbred', 's"),
        (A.drop(columns="son"), "columns of the relationship .* lacks 1 level of the data: 'son'"),
        (A.drop(["sis", "son"]), "index of .* lacks 2 levels of the data: 'sis', 'son'$"),
        (A.rename(index={"dam": "son"}), "index of .*more than once: 'son'"),
        (A.rename(columns={"dam": "son"}), "columns of .*more than once: 'son'"),
        (changed("son", "sis", 0.7, both=False), r"not symmetric: .*\('sis', 'son'\)|\('son', 'si"),
        (changed("son", "sis", np.nan), r"is nan for \('sis', 'son'\)"),
        (changed("son", "son", np.inf), r"is inf for \('son', 'son'\)"),
        (changed("son", "sis", 2.0), "not positive semidef.*smallest eigenvalue is -1.*diagonal"),
        (A.astype(object).replace({0.75: "a"}), "must be numeric"),
        (pd.DataFrame(np.zeros((5, 5)), ANIMALS, ANIMALS), "is zero for all levels that occur"),
    ],
)
def test_errors(matrix, message, data):
    with pytest.raises(DataError, match=message) as caught:
        build_design("y ~ 1 + (1|animal)", data, relmat={"animal": matrix})
    assert "relationship matrix of 'animal'" in str(caught.value)


def test_singular_matrices(data):
    """Identical twins, all alike, centred: roots that give them back, zero between strangers."""
    twins = A.copy()
    twins.loc["son", "sis"] = twins.loc["sis", "son"] = 1.0 - 1e-16
    centre = np.eye(5) - 0.2
    alone = np.kron(np.eye(2), np.ones((3, 3)))[:5, :5]
    for matrix in (twins.to_numpy(), np.ones((5, 5)), centre @ A.to_numpy() @ centre, alone):
        frame = pd.DataFrame(matrix, ANIMALS, ANIMALS)
        design = build_design("y ~ 1 + (1|animal)", data, relmat={"animal": frame})
        levels = design.groupings[0].levels
        root = design.groupings[0].root
        np.testing.assert_allclose(root @ root.T, frame.loc[levels, levels], atol=1e-12)
        unrelated = frame.loc[levels, levels].to_numpy() == 0.0
        assert not root[unrelated].any()


def test_what_does_not_occur_is_not_looked_at(data):
    build_design("y ~ 1 + (1|animal)", data, relmat={"animal": changed("dam", "son", np.nan)})


def test_labels_of_another_type(data):
    tags = pd.DataFrame(np.eye(2), ["7", "8"], ["7", "8"])
    with pytest.raises(DataError, match=r"lacks 2 levels.*another type \('7'\).*\(7\): convert"):
        build_design("y ~ 1 + (1|tag)", data, relmat={"tag": tags})


def test_unknown_factor(data):
    with pytest.raises(DataError, match=r"'sire', which is no grouping factor.*'animal', 'pen'"):
        build_design("y ~ 1 + (1|animal) + (1|pen)", data, relmat={"sire": A})
    with pytest.raises(TypeError, match=r"relmat must be a dict.*not DataFrame"):
        build_design("y ~ 1 + (1|animal)", data, relmat=A)
