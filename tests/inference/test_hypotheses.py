"""Hypotheses of terms against dense algebra on indicators: by rank, whatever the coding."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.compress.columns import column_factor, dependence
from lmmax.design import build_design
from lmmax.inference.hypotheses import FixedTerms, SumsOfSquares, terms_of_columns

Term = tuple[str, ...]

MODELS: dict[str, tuple[Term, ...]] = {
    "f + h": (("f",), ("h",)),
    "f * h": (("f",), ("h",), ("f", "h")),
    "f * h * k": tuple(
        each for size in (1, 2, 3) for each in itertools.combinations(("f", "h", "k"), size)
    ),
    "f + f:h": (("f",), ("f", "h")),
    "f:h + f:k": (("f", "h"), ("f", "k")),
    "f * x": (("f",), ("x",), ("f", "x")),
    "f * x + h": (("f",), ("x",), ("h",), ("f", "x")),
    "f * h * x": tuple(
        each for size in (1, 2, 3) for each in itertools.combinations(("f", "h", "x"), size)
    ),
    "x + z + h:x": (("x",), ("z",), ("h", "x")),
}
CONTRASTS = ("treatment", "sum", "helmert", "poly", "SAS", "diff")


def frame(seed: int) -> pd.DataFrame:
    """Few rows, so that cells are empty, some with one row only; numbers far from zero."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(14, 40))
    data = pd.DataFrame({"x": rng.normal(size=n), "g": np.arange(n) % 4})
    data["x"] = data["x"] * 10.0 ** rng.integers(-4, 5) + rng.choice([0.0, 5.0])
    data["z"] = rng.normal(size=n) if seed % 3 else 2.0 * data["x"] + 1.0
    for name, levels in (("f", "abc"), ("h", "pqrs"), ("k", "uv")):
        values = rng.choice(list(levels), n)
        order = rng.permutation(np.unique(values))
        data[name] = pd.Categorical(values, order)
    data["y"] = rng.normal(size=n)
    return data


def indicators(data: pd.DataFrame, term: Term) -> np.ndarray:
    """Return a column for each cell of a term, times its numbers, (n, cells)."""
    block = np.ones((len(data), 1))
    for name in term:
        values = data[name]
        columns = (
            [values == level for level in values.cat.categories] if name in "fhk" else [values]
        )
        block = np.hstack([block * np.asarray(column, float)[:, None] for column in columns])
    return block


def contains(large: Term, small: Term) -> bool:
    numbers = {name for name in (*large, *small) if name not in "fhk"}
    return set(small) < set(large) and numbers & set(small) == numbers & set(large)


def span(columns: np.ndarray, tol: float = 1e-9) -> np.ndarray:
    sizes = np.linalg.norm(columns, axis=0)
    left, values, _ = np.linalg.svd(columns[:, sizes > 0] / sizes[sizes > 0], full_matrices=False)
    return left[:, values > tol]


def null(columns: np.ndarray, tol: float = 1e-9) -> np.ndarray:
    """Return a basis of what columns are orthogonal to."""
    left, values, _ = np.linalg.svd(columns)
    return left[:, int(np.sum(values > tol)) :]


def expected(
    data: pd.DataFrame, terms: tuple[Term, ...], intercept: bool, term: Term, kind: SumsOfSquares
) -> np.ndarray:
    """Return an orthonormal basis, in the rows, of what a hypothesis says of the means, (n, r)."""
    every: list[Term] = [*([()] if intercept else []), *terms]
    if kind == "I":
        last = [other for other in terms[terms.index(term) + 1 :]]
    else:
        last = [other for other in terms if contains(other, term)]
    others = [other for other in every if other != term and other not in last]
    blocks = {other: indicators(data, other) for other in every}
    for name in "xz":  # units say nothing; those of a term and of what contains it are the same
        size = np.linalg.norm(data[name])
        for other in every:
            blocks[other] = blocks[other] / (size if name in other else 1.0)
    n = len(data)
    rest = span(np.hstack([np.zeros((n, 1)), *(blocks[other] for other in others)]))
    if kind != "III":
        own = blocks[term] / np.maximum(np.linalg.norm(blocks[term], axis=0), 1e-300)
        left, values, _ = np.linalg.svd(own - rest @ (rest.T @ own), full_matrices=False)
        return left[:, values > 1e-9]
    # Means c'mu with c in the span of the design, whose function c'W has none of the others.
    whole = span(np.hstack([blocks[other] for other in every]))
    free = whole @ null(whole.T @ rest)
    own = np.hstack([blocks[term], *(blocks[other] for other in last)])
    of_last = slice(blocks[term].shape[1], None)
    coefficients = own.T @ free
    pure = free @ null(coefficients[: of_last.start].T)
    both = (own.T @ pure).T @ coefficients  # orthogonal to functions of those that contain it
    return span(free @ null(both.T)) if pure.shape[1] else span(free)


def found_terms(
    data: pd.DataFrame, formula: str, contrasts: dict[str, str]
) -> tuple[FixedTerms, np.ndarray]:
    design = build_design(f"y ~ {formula} + (1 | g)", data, contrasts=contrasts)
    factor = column_factor(design.X, None)
    dependent = dependence(design.X, factor, None)
    return terms_of_columns(design.terms, factor.R, dependent), design.X


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_hypotheses_are_those_of_estimable_functions(model: str, intercept: bool) -> None:
    for seed in range(6):
        data = frame(seed)
        rng = np.random.default_rng(seed)
        terms = MODELS[model]
        shuffled = [
            tuple(rng.permutation(term).tolist())
            for term in rng.permutation(np.array([*terms, None], dtype=object)[:-1])
        ]
        formula = " + ".join([str(int(intercept)), *map(":".join, shuffled)])
        used = {name for term in terms for name in term if name in "fhk"}
        contrasts = {name: str(rng.choice(CONTRASTS)) for name in used}
        found, X = found_terms(data, formula, contrasts)
        pinv = np.linalg.pinv(X[:, found.kept] / np.linalg.norm(X[:, found.kept], axis=0))
        order = tuple(tuple(sorted(term.factors)) for term in found.coded.named)
        kinds: tuple[SumsOfSquares, ...] = ("I", "II", "III")
        for kind in kinds:
            tested = {tuple(sorted(k.split(":"))): L for k, L in found.test(kind).items()}
            for term in terms:
                want = expected(data, order, intercept, term, kind)
                L = tested[term] / np.linalg.norm(X[:, found.kept], axis=0)
                assert len(L) == want.shape[1], (formula, seed, kind, term)
                if len(L):
                    ours = span((L @ pinv).T)
                    assert ours.shape == want.shape
                    np.testing.assert_allclose(
                        ours @ ours.T,
                        want @ want.T,
                        atol=1e-6,
                        err_msg=f"{formula} {seed} {kind} {term}",
                    )


@pytest.mark.parametrize(
    ("right", "noted"),
    [
        ("f / h", {"II": "f", "III": "f"}),
        ("x + x:f", {"II": "x", "III": "x"}),
        ("0 + x:f + h", {"II": "x:f", "III": None}),
        ("f * h", {"II": None, "III": None}),
        ("f * x", {"II": None, "III": None}),
        ("0 + f + x", {"II": None, "III": None}),
    ],
)
def test_a_note_where_lmertest_tests_another_hypothesis(right, noted):
    rng = np.random.default_rng(0)
    g = rng.integers(0, 12, 120)
    data = pd.DataFrame({"f": np.array(list("abc"))[rng.integers(0, 3, 120)]})
    data["h"], data["x"] = np.array(list("uv"))[rng.integers(0, 2, 120)], rng.normal(size=120)
    data["y"], data["g"] = rng.normal(size=12)[g] + rng.normal(size=120), g
    fit = lmmax.fit(f"y ~ {right} + (1 | g)", data)
    for kind, label in noted.items():
        notes = lmmax.anova(fit, type=kind).notes
        assert [f"as in SAS: {label}." in note for note in notes] == [True] * (label is not None)
