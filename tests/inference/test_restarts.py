"""Models that end below a special case of theirs: fitted again from there, or no test at all."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.covariances import matrix_at
from lmmax.design import build_design
from lmmax.fit import arrange
from lmmax.inference import bootstrap_comparison, comparison
from lmmax.inference.bootstrap_comparison import bootstrap_test
from lmmax.inference.comparison import ComparisonError
from lmmax.inference.nesting import covariances_like
from lmmax.inference.restarts import below
from lmmax.inference.submodels import Submodel

SMALL, LARGE = "y ~ x + f + (1 | g)", "y ~ x + f + (1 + x | g)"


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    rng = np.random.default_rng(5)
    g, h = np.repeat(np.arange(12), 8), np.tile(np.repeat(np.arange(4), 2), 12)
    x, f = rng.normal(size=96), rng.choice(list("uvw"), size=96)
    effects = rng.normal(size=(2, 12))
    y = 1.0 + x + effects[0][g] + 0.5 * effects[1][g] * x + 0.7 * rng.normal(size=96)
    w = rng.uniform(0.5, 2.0, size=96)
    return pd.DataFrame({"y": y, "x": x, "f": f, "g": g, "h": h, "c": h.astype(str), "w": w})


@pytest.fixture(scope="module")
def models(data: pd.DataFrame) -> tuple[lmmax.Fit, lmmax.Fit]:
    return lmmax.fit(SMALL, data, reml=False), lmmax.fit(LARGE, data, reml=False)


def lowered(fit: lmmax.Fit, by: float = 40.0) -> lmmax.Fit:
    """A fit as a search that ended at a lower optimum would leave it."""
    return replace(fit, estimates=replace(fit.estimates, criterion=fit.estimates.criterion + by))


def check(found: Any, wanted: Any, note: str) -> None:
    pd.testing.assert_frame_equal(found.table, wanted.table, rtol=1e-7)
    assert sum(note in each for each in found.notes) == 1
    assert not any("was not maximised" in each for each in wanted.notes)


def test_comparisons_take_the_better_fit(models: tuple[lmmax.Fit, lmmax.Fit]) -> None:
    small, large = models
    reaches = f"its log-likelihood reaches {large.llf:.4f}, not {large.llf - 20.0:.4f}"
    bad = lowered(large)
    note = f"Model 2 was not maximised: from the optimum of model 1 {reaches}"
    check(lmmax.anova(small, bad), lmmax.anova(small, large), note)
    note = f"The model was not maximised: from the optimum of a smaller one {reaches}"
    check(lmmax.ranova(bad), lmmax.ranova(large), note)
    check(lmmax.drop1(bad, test="chisq"), lmmax.drop1(large, test="chisq"), note)
    found, wanted = (bootstrap_test(small, fit, n=19, seed=1) for fit in (bad, large))
    assert found.statistic == pytest.approx(wanted.statistic, rel=1e-7)
    np.testing.assert_allclose(found.replicates, wanted.replicates, atol=1e-5)
    assert found.pvalue == wanted.pvalue and len(found.notes) == len(wanted.notes) + 1


def test_there_is_no_statistic_below_zero(
    models: tuple[lmmax.Fit, lmmax.Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = models
    for module in (comparison, bootstrap_comparison):
        monkeypatch.setattr(module, "fitted_from", lambda fit, _: fit)
    bad = lowered(large)
    for table in (lmmax.anova(small, bad), lmmax.ranova(bad, mixture=True)):
        assert table.table[["chisq", "p"]].iloc[1].isna().all()
        assert any("A likelihood ratio of the two does not exist" in each for each in table.notes)
    left_out = lmmax.drop1(bad, test="chisq").table
    assert left_out[["chisq", "p"]].isna().all().all() and (left_out["df"][1:] > 0).all()
    with pytest.raises(ComparisonError, match="also when fitted again from there"):
        bootstrap_test(small, bad, n=9)


def test_a_likelihood_without_maximum_has_no_ratio(models: tuple[lmmax.Fit, lmmax.Fit]) -> None:
    small, large = models
    unbounded = replace(small, estimates=replace(small.estimates, criterion=-np.inf, scale=0.0))
    for fit in (large, lowered(large, -np.inf)):
        found = lmmax.anova(unbounded, fit)
        assert found.table[["chisq", "p"]].iloc[1].isna().all()
        assert any("has no maximum" in note for note in found.notes)


def test_replicates_take_the_better_fit(
    models: tuple[lmmax.Fit, lmmax.Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = models
    wanted = bootstrap_test(small, large, n=19, seed=1)
    join, calls = bootstrap_comparison.join, [0]

    def worse(parts: Any) -> Any:
        calls[0] += 1
        found = join(parts)
        lower = np.where(np.arange(19) == 3, 50.0, 0.0) if calls[0] == 2 else 0.0
        return replace(found, llf=found.llf - lower)

    monkeypatch.setattr(bootstrap_comparison, "join", worse)
    found = bootstrap_test(small, large, n=19, seed=1)
    np.testing.assert_allclose(found.replicates, wanted.replicates, atol=1e-5)
    assert any("in 1 of 19 replicates" in note for note in found.notes)


def test_rounding_is_no_difference(models: tuple[lmmax.Fit, lmmax.Fit]) -> None:
    model = Submodel.of(models[0])
    assert not below(model, replace(model, criterion=model.criterion + 1e-7))
    assert below(model, replace(model, criterion=model.criterion + 1e-5))
    noisy = replace(model, criterion=model.criterion + 1e-5, criterion_error=1e-4)
    assert not below(model, noisy)
    assert below(model, replace(model, criterion=np.nan))


NESTED = {
    "an effect more": ("(1 | g)", "(1 + x | g)"),
    "a correlation more": ("(1 + x || g)", "(1 + x | g)"),
    "a factor more": ("(1 | g:h)", "(1 | g) + (1 | g:h)"),
    "another basis": ("(1 | g) + (1 | g:c)", "(1 | g) + (0 + c | g)"),
    "a structure": ("homcs(0 + c | g)", "(0 + c | g)"),
    "a structure beside": ("(1 | g)", "(1 | g) + homcs(0 + c | g)"),
}


@pytest.mark.parametrize("what", NESTED)
def test_a_larger_model_can_start_where_a_smaller_one_ends(data: pd.DataFrame, what: str) -> None:
    """The covariance of the rows is the same: compared as dense matrices."""
    small, large = (model(f"y ~ x + {terms}", data) for terms in NESTED[what])
    at = covariances_like(Submodel(0.0, 0, small.scale, fit=small), large)
    wanted = covariance(small, small.cov_re)
    np.testing.assert_allclose(covariance(large, at), wanted, atol=1e-7 * np.abs(wanted).max())
    for term in large.terms:
        assert np.linalg.eigvalsh(at[term.columns, term.columns])[0] > -1e-12


def model(formula: str, data: pd.DataFrame) -> Any:
    """A model at some covariances that it can have, with what a fit of it would know."""
    design = build_design(formula, data, weights="w")
    terms = arrange(design)[1]
    cov_re = np.zeros((sum(term.width for term in terms),) * 2)
    for term in terms:
        q = term.width
        if term.pattern is None:
            theta = np.random.default_rng(0).uniform(0.5, 1.0, term.covariance.n_parameters(q))
            some = np.asarray(matrix_at(term.covariance, theta, q))
        else:
            some = (np.diag(np.arange(1.0, q + 1)) + 0.3) * term.pattern
        cov_re[term.columns, term.columns] = some
    estimates = SimpleNamespace(scale=0.6)
    return SimpleNamespace(
        design=design, terms=terms, cov_re=cov_re, scale=0.6, estimates=estimates
    )


def covariance(fit: Any, Psi: np.ndarray) -> np.ndarray:
    """The covariance of the rows that random effects make, (n, n)."""
    found: Any = 0.0
    for term, block in zip(fit.terms, fit.design.blocks, strict=True):
        codes = fit.design.groupings[block.grouping].codes
        same = codes[:, None] == codes
        found = found + same * (block.Z @ Psi[term.columns, term.columns] @ block.Z.T)
    return np.asarray(found)
