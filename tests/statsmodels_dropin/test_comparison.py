"""lmmax beside statsmodels: likelihoods at shared parameters, results at the same estimates.

Tolerances are relative to the largest entry.  Both evaluate the same closed forms, so what is
evaluated at shared parameters agrees to rounding.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.regression.mixed_linear_model as theirs
from statsmodels.regression.tests.results import lme_r_results
from statsmodels.tools.numdiff import approx_fprime

import lmmax.statsmodels as ours
from tests.statsmodels_dropin.cases import MODELS, fit, pair, prepared, quiet, their_results

pytestmark = pytest.mark.unoptimised

BOUNDARY = "lme01"
by_model = pytest.mark.parametrize("name", MODELS)
by_criterion = pytest.mark.parametrize("reml", [True, False], ids=["REML", "ML"])


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Assert shapes, and values relative to the largest."""
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    assert found.shape == expected.shape
    size = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=tolerance * size)


def same(what: str, found: Any, expected: Any, tolerance: float = 1e-8) -> None:
    """Assert that two results are of one type, with equal labels, and equal to the tolerance."""
    assert type(found) is type(expected), what
    if isinstance(expected, dict):
        assert list(found) == list(expected), what
        assert [type(key) for key in found] == [type(key) for key in expected], what
        for key, value in expected.items():
            same(f"{what}[{key}]", found[key], value, tolerance)
        return
    if isinstance(expected, pd.Series | pd.DataFrame):
        assert found.index.equals(expected.index), what
        if isinstance(expected, pd.DataFrame):
            assert found.columns.equals(expected.columns), what
        else:
            assert found.name == expected.name, what
    if expected is None or isinstance(expected, str | bool):
        assert found == expected, what
        return
    close(found, expected, tolerance)


@cache
def points(name: str) -> tuple[Any, Any]:
    """A point in the parameter space, and the same with the best coefficients."""
    _, model = pair(name)
    rng = np.random.default_rng(1)
    root = np.eye(model.k_re) + np.tril(0.3 * rng.normal(size=(model.k_re, model.k_re)))
    anywhere = theirs.MixedLMParams.from_components(
        0.1 * rng.normal(size=model.k_fe), root @ root.T, vcomp=rng.uniform(0.3, 2.0, model.k_vc)
    )
    best = anywhere.copy()
    best.fe_params = model.get_fe_params(best.cov_re, best.vcomp)[0]
    return anywhere, best


# --- the model ------------------------------------------------------------------------------


@by_model
def test_model_attributes(name: str) -> None:
    found, expected = pair(name)
    for attribute in (
        *("k_fe", "k_re", "k_re2", "k_vc", "k_params", "nobs", "n_totobs", "n_groups"),
        *("group_labels", "row_indices", "endog_names", "exog_names", "use_sqrt"),
    ):
        mine, other = getattr(found, attribute), getattr(expected, attribute)
        assert type(mine) is type(other) and mine == other, attribute
    for attribute in (
        *("param_names", "exog_re_names", "exog_re_names_full", "vcomp_names"),
        *("xnames", "ynames"),
    ):
        if hasattr(expected.data, attribute):  # statsmodels leaves some out of some models
            assert getattr(found.data, attribute) == getattr(expected.data, attribute), attribute
    for attribute in ("endog_li", "exog_li", "exog_re_li"):
        mine, other = getattr(found, attribute), getattr(expected, attribute)
        assert (mine is None) == (other is None)
        for a, b in zip(mine or [], other or [], strict=True):
            np.testing.assert_array_equal(a, b)
    assert list(found.exog_vc.names) == list(expected.exog_vc.names)
    for mine, other in zip(found.exog_vc.colnames, expected.exog_vc.colnames, strict=True):
        assert [list(names) for names in mine] == [list(names) for names in other]
    for mine, other in zip(found.exog_vc.mats, expected.exog_vc.mats, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert hasattr(a, "tocsr") == hasattr(b, "tocsr")
            dense = [m.toarray() if hasattr(m, "tocsr") else np.asarray(m) for m in (a, b)]
            np.testing.assert_array_equal(*dense)


@by_model
def test_group_list(name: str) -> None:
    found, expected = pair(name)
    values = np.arange(2.0 * found.nobs).reshape(-1, 2)
    for array in (values, values[:, 0]):
        for a, b in zip(found.group_list(array), expected.group_list(array), strict=True):
            np.testing.assert_array_equal(a, b)


@by_criterion
@by_model
def test_likelihood_at_shared_parameters(name: str, reml: bool) -> None:
    found, expected = (prepared(model, reml) for model in pair(name))
    for point in points(name):
        for profile in (True, False):
            mine = found.loglike(point, profile_fe=profile)
            other = expected.loglike(point, profile_fe=profile)
            assert type(mine) is type(other)
            close(mine, other, 1e-12)
        fe, singular = found.get_fe_params(point.cov_re, point.vcomp)
        close(fe, expected.get_fe_params(point.cov_re, point.vcomp)[0], 1e-11)
        assert singular is False
        scale = found.get_scale(point.fe_params, point.cov_re, point.vcomp)
        other = expected.get_scale(point.fe_params, point.cov_re, point.vcomp)
        assert type(scale) is type(other)
        close(scale, other, 1e-12)
        packed = point.get_packed(use_sqrt=False, has_fe=True)
        for given in (point, packed):
            close(found.predict(given), expected.predict(given), 1e-14)


@pytest.mark.parametrize("use_sqrt", [True, False], ids=["roots", "variances"])
@by_criterion
@by_model
def test_derivatives_at_shared_parameters(name: str, reml: bool, use_sqrt: bool) -> None:
    found, expected = (prepared(model, reml, use_sqrt) for model in pair(name))
    for point in points(name):
        for method in ("score_full", "score_sqrt"):
            for calc_fe in (True, False):
                mine = getattr(found, method)(point, calc_fe=calc_fe)
                other = getattr(expected, method)(point, calc_fe=calc_fe)
                for a, b in zip(mine, other, strict=True):
                    assert np.shape(a) == np.shape(b)
                close(np.concatenate(mine), np.concatenate(other), 1e-10)
        packed = point.get_packed(use_sqrt=use_sqrt)
        for profile in (True, False):
            mine = found.score(point, profile_fe=profile)
            close(mine, expected.score(point, profile_fe=profile), 1e-10)
        close(found.loglike(packed), expected.loglike(packed), 1e-12)
        close(found.score(packed), expected.score(packed), 1e-10)
    # Elsewhere their Hessian lacks terms that vanish at the best coefficients.
    best = points(name)[1]
    close(found.hessian(best)[0], expected.hessian(best)[0], 1e-10)
    whole = best.get_packed(use_sqrt=use_sqrt, has_fe=True)
    close(found.hessian(whole)[0], expected.hessian(whole)[0], 1e-10)
    prepared(found, True), prepared(expected, True)


@by_criterion
@pytest.mark.parametrize("name", ["crossed in groups", "lme07"])
def test_hessian_away_from_the_best_coefficients(name: str, reml: bool) -> None:
    """Against differences of statsmodels' score; central ones of step 1e-5 hold 1e-7."""
    found, expected = (prepared(model, reml) for model in pair(name))
    point = points(name)[0]
    packed = point.get_packed(use_sqrt=False, has_fe=True)

    def score(x: np.ndarray) -> np.ndarray:
        at = theirs.MixedLMParams.from_packed(x, found.k_fe, found.k_re, False, True)
        return np.concatenate(expected.score_full(at, calc_fe=True))

    numeric = approx_fprime(packed, score, epsilon=1e-5, centered=True)
    close(found.hessian(point)[0], numeric, 1e-6)
    prepared(found, True)


# --- results --------------------------------------------------------------------------------


@by_criterion
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("sparse", "lme00")])
def test_estimates_are_at_least_as_good(name: str, reml: bool) -> None:
    """The likelihood is never lower, beyond rounding, and where both found it, so is the rest."""
    model, expected = pair(name)
    result = fit(model, reml=reml)
    with quiet():
        other = expected.fit(reml=reml, gtol=1e-8)
    assert result.converged
    assert result.llf >= other.llf - 1e-11 * abs(other.llf)
    close(result.llf, model.loglike(result.params_object), 1e-11)
    if abs(result.llf - other.llf) < 1e-9 * abs(result.llf):
        close(result.fe_params, other.fe_params, 1e-4)
        close(result.scale, other.scale, 1e-3)


# statsmodels fails at these, as the facts about it say; what is right is in the other modules.
BROKEN = {
    "sparse": {"fittedvalues", "resid", "random_effects_cov"},
    **{
        name: {"bse_re"}
        for name in ("pastes", "nested", "crossed in groups", "numeric columns", "crossed")
    },
}
OTHER_CLASSES = {"model", "params_object"}
NOT_FOR_MIXED_MODELS = {"bsejac", "bsejhj", "covjac", "covjhj", "score_obsv"}


@by_criterion
@pytest.mark.parametrize("name", [name for name in MODELS if name != BOUNDARY])
def test_results_at_the_same_estimates(name: str, reml: bool) -> None:
    model, expected = pair(name)
    result = model.fit(reml=reml, fe_cov="hessian")
    other = their_results(expected, result)
    broken = BROKEN.get(name, set()) | ({"bse_re"} if name == "sparse" else set())
    left_out = broken | OTHER_CLASSES | NOT_FOR_MIXED_MODELS | {"hessv"}
    compared = set()
    for attribute in dir(other):
        if attribute.startswith("_") or attribute in left_out:
            continue
        value = getattr(other, attribute)
        if not callable(value):
            same(attribute, getattr(result, attribute), value)
            compared.add(attribute)
    assert {"bse", "cov_re", "llf", "pvalues", "random_effects", "aic", "df_resid"} <= compared
    for attribute in broken:
        with pytest.raises(ValueError):
            getattr(other, attribute)
    # statsmodels reads the parameters, which are no roots, as roots.
    close(result.hessv, expected.hessian(other.params_object)[0], 1e-9)
    for method, args in (
        ("conf_int", (0.1,)),
        ("cov_params", ()),
        ("predict", ()),
    ):
        same(method, getattr(result, method)(*args), getattr(other, method)(*args))
    if "bse_re" not in broken:
        mine, table = result.summary(alpha=0.1), other.summary(alpha=0.1)
        assert mine.tables[0].equals(table.tables[0])
        assert mine.tables[1].equals(table.tables[1])


@pytest.mark.parametrize("name", ["pandas", "arrays", "nested"])
def test_tests_at_the_same_estimates(name: str) -> None:
    model, expected = pair(name)
    result = model.fit(reml=False, fe_cov="hessian")
    other = their_results(expected, result)
    p, k = model.k_fe, len(result.params)
    for method, matrix, fields in (
        ("t_test", np.eye(p), ("effect", "sd", "tvalue", "pvalue")),
        ("f_test", np.eye(k)[:p], ("fvalue", "pvalue", "df_num", "df_denom")),
        ("wald_test", np.eye(k)[:p], ("statistic", "pvalue", "df_denom")),
    ):
        kwargs = {"scalar": True} if method == "wald_test" else {}
        mine = getattr(result, method)(matrix, **kwargs)
        their = getattr(other, method)(matrix, **kwargs)
        assert type(mine) is type(their) and mine.distribution == their.distribution
        for field in fields:
            same(f"{method}.{field}", getattr(mine, field), getattr(their, field))
    mine, their = result.t_test(np.eye(p), True), other.t_test(np.eye(p), True)
    same("use_t", mine.pvalue, their.pvalue)
    same("conf_int", mine.conf_int(), their.conf_int())
    assert str(mine.summary()) == str(their.summary())
    if name == "nested":
        mine, their = result.wald_test_terms(scalar=True), other.wald_test_terms(scalar=True)
        same("terms", mine.summary_frame(), their.summary_frame())
        for method in ("wald_test", "f_test"):
            mine, their = getattr(result, method)("x = 0.1"), getattr(other, method)("x = 0.1")
            close(mine.statistic, their.statistic, 1e-9)


PRIVATE_TO_THEIR_LOOPS = {"exog_re2_li"}
"""Of statsmodels' public names: what only its own likelihood uses."""


def test_no_public_name_is_missing() -> None:
    mine, other = pair("nested")
    results = mine.fit()
    wrapped = their_results(other, results)
    for a, b in (
        (mine, other),
        (mine.data, other.data),
        (results, wrapped),
        (results._results, wrapped._results),
        (results.params_object, wrapped.params_object),
    ):
        missing = {name for name in dir(b) if not name.startswith("_")} - set(dir(a))
        assert missing <= PRIVATE_TO_THEIR_LOOPS


@pytest.mark.parametrize("kind", ["MixedLM", "MixedLMResults", "MixedLMParams", "VCSpec"])
def test_arguments_have_the_same_names_order_and_defaults(kind: str) -> None:
    """What is added comes after all that statsmodels has, or before its ``**kwargs``."""
    for name, method in inspect.getmembers(getattr(theirs, kind), inspect.isfunction):
        if name.startswith("_") and name != "__init__":
            continue
        known = inspect.signature(method).parameters.values()
        found = inspect.signature(getattr(getattr(ours, kind), name)).parameters.values()
        if (kind, name) == ("MixedLMResults", "wald_test"):
            continue  # takes all arguments as *args and passes them on
        fixed = [p for p in known if p.kind is not p.VAR_KEYWORD]
        for theirs_, mine in zip(fixed, found, strict=False):
            assert theirs_.name == mine.name, (name, theirs_.name)
            if (name, mine.name) in (("bootstrap", "method"), ("get_distribution", "exog")):
                continue  # the optimizer is not theirs; the model's own design may be left out
            assert theirs_.default == mine.default, (name, mine.name)
        assert len(found) >= len(fixed), name


# --- lme4, as shipped with statsmodels ------------------------------------------------------


LME = [(number, "drf") for number in range(12)] + [(number, "irf") for number in range(6, 12)]


@pytest.mark.parametrize("method", ["reml", "ml"])
@pytest.mark.parametrize(("number", "effects"), LME)
def test_lme4(number: int, effects: str, method: str) -> None:
    """lme4's numbers have seven digits, and so agree to half a unit in the last, or little more."""

    def stored(what: str) -> np.ndarray:
        return np.asarray(getattr(lme_r_results, f"{what}_{method}_{effects}_{number}"))

    model = pair(f"lme{number:02d}")[0]
    free = None
    if effects == "irf":
        free = ours.MixedLMParams.from_components(
            np.ones(model.k_fe), np.eye(model.k_re), vcomp=np.zeros(0)
        )
    result = fit(model, reml=method == "reml", free=free)
    p = model.k_fe
    close(result.fe_params, stored("coef"), 6e-7)
    close(result.cov_params()[:p, :p], stored("vcov"), 6e-7)
    cov_re = stored("cov_re")
    np.testing.assert_allclose(result.cov_re, cov_re, rtol=0.0, atol=6e-7 * max(cov_re.max(), 0.1))
    close(result.scale, stored("scale")[0], 6e-7)
    close(result.llf, stored("loglike")[0], 2e-7)
    if effects == "drf":
        first = result.random_effects[model.group_labels[0]]
        np.testing.assert_allclose(first, stored("ranef_mean"), rtol=0.0, atol=2e-7)
        covariance = result.random_effects_cov[model.group_labels[0]]
        expected = stored("ranef_condvar").reshape(covariance.shape)
        np.testing.assert_allclose(covariance, expected, rtol=0.0, atol=1e-6)
