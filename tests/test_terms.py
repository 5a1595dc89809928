"""Terms: which columns are theirs, what these are products of, and what contains what."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest

from lmmax.design import build_design, design_from_arrays
from lmmax.inference.hypotheses import cells
from lmmax.terms import CodedTerms

FORMULAS = [
    "y ~ x * f + (1 | g)",
    "y ~ 0 + f + h + (1 | g)",
    "y ~ f + f:h + (1 | g)",
    "y ~ f:h + (1 | g)",
    "y ~ 0 + f:h + (1 | g)",
    "y ~ f * h * k + np.exp(x):f + (1 | g)",
    "y ~ C(f, contr.sum) * C(h, contr.helmert) + k:x + (1 | g)",
    "y ~ b * x + poly(x, 2):h + (1 | g)",
    "y ~ f:h + f:k + (1 | g)",
]


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    n = 90
    frame = pd.DataFrame({"y": rng.normal(size=n), "x": rng.uniform(-1, 1, n)})
    for name, levels in (("f", "abc"), ("h", "uvw"), ("k", "pq")):
        frame[name] = rng.choice(list(levels), n)
    frame["b"] = rng.random(n) < 0.5
    frame["g"] = np.arange(n) % 9
    return frame


def values_of(factor: str, data: pd.DataFrame) -> np.ndarray:
    """A factor's values, by means other than the library's where that is easy."""
    for name in ("f", "h", "k", "b"):
        if factor in (name, f"C({name}, contr.sum)", f"C({name}, contr.helmert)"):
            return data[name].to_numpy()
    if factor == "poly(x, 2)":
        # Orthogonal polynomials: of the columns' span by QR, with signs of the leading terms.
        Q, R = np.linalg.qr(np.vander(data["x"], 3, increasing=True))
        return (Q * np.sign(np.diag(R)))[:, 1:]
    return {"x": data["x"], "np.exp(x)": np.exp(data["x"])}[factor].to_numpy()[:, None]


@pytest.mark.parametrize("formula", FORMULAS)
def test_columns_are_products_of_their_elements(formula: str, data: pd.DataFrame) -> None:
    design = build_design(formula, data)
    coded = design.terms
    ends = [term.columns.stop for term in coded.terms]
    assert [term.columns.start for term in coded.terms] == [0, *ends[:-1]]
    assert ends[-1] == design.X.shape[1]
    for term in coded.terms:
        for j, elements in zip(range(*term.columns.indices(ends[-1])), term.elements, strict=True):
            column = np.ones(len(data))
            for element in elements:
                values = values_of(element.factor, data)
                if element.factor in coded.codings:
                    coding = coded.codings[element.factor]
                    position = pd.Index(coding.levels).get_indexer(values)
                    column *= coding.matrix(element.reduced)[position, element.column]
                else:
                    column *= values[:, element.column]
            np.testing.assert_allclose(column, design.X[:, j], atol=1e-12)


@pytest.mark.parametrize("formula", FORMULAS)
def test_cells_are_indicators_of_levels(formula: str, data: pd.DataFrame) -> None:
    design = build_design(formula, data)
    found = cells(design.terms)
    ours = design.X @ found.M
    at = 0
    for term in design.terms.terms:
        expected = [np.ones(len(data))]
        for factor in term.factors:
            values = values_of(factor, data)
            if factor in design.terms.codings:
                parts = [values == level for level in design.terms.codings[factor].levels]
            else:
                parts = list(values.T)
            # Numbers run fastest, then the levels of the first factor.
            expected = (
                [part * column for part in parts for column in expected]
                if factor in design.terms.codings
                else [column * part for column in expected for part in parts]
            )
        here = found.slices[term.label if term.factors else ""]
        assert here == slice(at, at + len(expected))
        at = here.stop
        np.testing.assert_allclose(ours[:, here], np.array(expected).T, atol=1e-10)


def containing(coded: CodedTerms) -> dict[str, list[str]]:
    return {t.label: [other.label for other in coded.containing(t)] for t in coded.named}


def test_containment_counts_numeric_factors(data: pd.DataFrame) -> None:
    coded = build_design("y ~ x * f * h + (1 | g)", data).terms
    assert containing(coded) == {
        "x": ["x:f", "x:h", "x:f:h"],
        "f": ["f:h"],
        "h": ["f:h"],
        "x:f": ["x:f:h"],
        "x:h": ["x:f:h"],
        "f:h": [],
        "x:f:h": [],
    }
    assert [term.label for term in coded.droppable()] == ["x:f:h"]
    assert coded.intercept is not None
    assert coded.intercept.columns == slice(0, 1)


def test_truth_values_are_categories(data: pd.DataFrame) -> None:
    coded = build_design("y ~ 0 + b * f + x + (1 | g)", data).terms
    assert containing(coded)["b"] == ["b:f"]
    assert [term.label for term in coded.droppable()] == ["x", "b:f"]
    assert coded.intercept is None


def test_random_terms_have_terms_too(data: pd.DataFrame) -> None:
    block = build_design("y ~ x + (1 + x * f | g)", data).blocks[0]
    assert [term.label for term in block.terms.terms] == ["1", "x", "f", "x:f"]
    assert [term.columns for term in block.terms.terms] == [
        slice(0, 1),
        slice(1, 2),
        slice(2, 4),
        slice(4, 6),
    ]


def test_columns_of_arrays_are_terms(data: pd.DataFrame) -> None:
    X = np.column_stack([np.r_[np.ones(89), 2.0], np.ones(90), data["x"]])
    coded = design_from_arrays(data["y"], X, data["g"], x_names=["a", "b", "c"]).terms
    assert [term.label for term in coded.named] == ["a", "c"]
    assert coded.intercept is not None
    assert coded.intercept.label == "b"


def test_terms_are_saved_with_a_design(data: pd.DataFrame) -> None:
    design = build_design(FORMULAS[6], data)
    again = pickle.loads(pickle.dumps(design))
    np.testing.assert_array_equal(cells(again.terms).M, cells(design.terms).M)
