"""Methods of the results, above all where statsmodels fails or gives other numbers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api
import statsmodels.regression.mixed_linear_model as theirs
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from statsmodels.iolib.summary2 import summary_col
from statsmodels.tools.numdiff import approx_hess

from lmmax.statsmodels import MixedLM, MixedLMResults, mixedlm
from tests.statsmodels_dropin.cases import fit, pair, prepared, simulated, their_results

pytestmark = pytest.mark.unoptimised

DATA = simulated()


@pytest.fixture(scope="module")
def result() -> Any:
    """Two random effects and a component; coefficients of a factor."""
    return mixedlm(
        "ys ~ x + C(w)", DATA, groups="g", re_formula="~ z1", vc_formula={"s": "0 + z3"}
    ).fit()


@pytest.fixture(scope="module")
def dietox() -> Any:
    return fit(pair("dietox")[0])


def natural_log_likelihood(model: Any, cov_re: Any, vcomp: Any, scale: float) -> float:
    """REML log-likelihood at a scale that is not profiled out, from statsmodels' profiled one."""
    prepared(model, True)
    point = theirs.MixedLMParams.from_components(
        np.zeros(model.k_fe), np.asarray(cov_re) / scale, None, np.asarray(vcomp) / scale
    )
    fe, _ = model.get_fe_params(point.cov_re, point.vcomp)
    d = model.nobs - model.k_fe
    best = model.get_scale(fe, point.cov_re, point.vcomp)
    logdet = -2.0 * model.loglike(point) - d * (np.log(2.0 * np.pi * best) + 1.0)
    return -0.5 * float(logdet + d * (np.log(2.0 * np.pi * scale) + best / scale))


# --- standard errors ------------------------------------------------------------------------


def test_errors_of_variances(dietox: Any) -> None:
    """2.149 as statsmodels prints it; 6.939 from the information in variance and scale."""
    at = np.array([dietox.cov_re.iloc[0, 0], dietox.scale])

    def log_likelihood(x: np.ndarray) -> float:
        return natural_log_likelihood(pair("dietox")[1], [[x[0]]], [], x[1])

    expected = np.sqrt(np.diag(np.linalg.inv(-approx_hess(at, log_likelihood))))
    np.testing.assert_allclose(dietox.bse_re_natural, expected[:1], rtol=1e-4)
    assert f"{dietox.bse_re_natural.iloc[0]:.3f}" == "6.939"
    assert f"{dietox.bse_re.iloc[0]:.3f}" == "2.149"
    summary = dietox.summary()
    assert list(summary.tables[1].loc["Pig Var"][:2]) == ["40.394", "2.149"]
    assert "Pig Var 6.939" in " ".join(summary.as_text().split())
    assert "6.939" in str(dietox.summary(re_errors="natural").tables[1])
    with pytest.raises(ValueError, match="re_errors='lme4'"):
        dietox.summary(re_errors="lme4")


def test_errors_of_variances_with_components(result: Any) -> None:
    """statsmodels fails at `bse_re` of any model with components."""
    names = ["g Var", "g x z1 Cov", "z1 Var", "s Var"]
    for errors in (result.bse_re, result.bse_re_natural):
        assert list(errors.index) == names and np.isfinite(errors).all()
    np.testing.assert_allclose(result.bse_re, np.sqrt(result.scale) * result.bse[names], rtol=1e-14)


# --- variances over their range -------------------------------------------------------------


@pytest.mark.parametrize("vtype", ["re", "vc"])
def test_profile_of_a_variance(vtype: str, dietox: Any) -> None:
    """The variance itself is held, and the scale maximised by SciPy."""
    if vtype == "re":
        found, other, which, reach = dietox, pair("dietox")[1], 0, 9.0
        estimate = found.cov_re.iloc[0, 0]
    else:
        found, other = (
            each.from_formula("y ~ x", DATA, groups="g", vc_formula={"z": "0 + z1"})
            for each in (MixedLM, theirs.MixedLM)
        )
        found, which, reach = found.fit(), "z", 0.3
        estimate = found.vcomp[0]
    profile = found.profile_re(which, vtype, num_low=1, dist_low=reach, num_high=2, dist_high=reach)
    grid = estimate + reach * np.array([-1.0, 0.0, 0.5, 1.0])
    np.testing.assert_allclose(profile[:, 0], grid, rtol=1e-12)
    np.testing.assert_allclose(profile[1, 1], found.llf, rtol=1e-11)

    def best(variance: float) -> float:
        given = ([[variance]], []) if vtype == "re" else (np.zeros((0, 0)), [variance])
        return -minimize_scalar(
            lambda scale: -natural_log_likelihood(other, *given, scale),
            bounds=(found.scale / 2.0, found.scale * 2.0),
            method="bounded",
            options={"xatol": 1e-6},
        ).fun

    np.testing.assert_allclose(profile[[0, 3], 1], [best(v) for v in grid[[0, 3]]], atol=1e-7)


def test_wrong_profiles(result: Any) -> None:
    for args, message in (
        ((5, "re"), "re_ix=5 must be 0 to 1"),
        (("g", "re"), "re_ix='g' must be 0 to 1"),
        (("q", "vc"), r"re_ix='q' is no variance component; use one of \['s'\]"),
        ((0, "fe"), "vtype='fe' must be"),
    ):
        with pytest.raises(ValueError, match=message):
            result.profile_re(*args)
    with pytest.raises(ValueError, match="dist_low=100 reaches a negative variance"):
        result.profile_re(0, "re", dist_low=100)


# --- tests ----------------------------------------------------------------------------------


def test_hypotheses_in_all_forms(result: Any) -> None:
    """Text, one dimension, and matrices of pandas, at which statsmodels' t_test fails."""
    z = result.fe_params["x"] / result.bse_fe["x"]
    forms = ("x = 0", [0, 0, 1], np.array([0.0, 0, 1]), np.array([[0.0, 0, 1]]), {"x": 0})
    for form in (*forms, pd.DataFrame([[0.0, 0.0, 1.0]]), ["x = 0"]):
        test = result.t_test(form)
        np.testing.assert_allclose(np.squeeze(test.tvalue), z, rtol=1e-12)
        np.testing.assert_allclose(np.squeeze(test.pvalue), 2 * norm.sf(abs(z)), rtol=1e-9)
        np.testing.assert_allclose(result.wald_test(form, scalar=True).statistic, z**2)
        np.testing.assert_allclose(result.f_test(form).fvalue, z**2)
    shifted = result.t_test((np.eye(3), [0.0, 0.0, 0.5]))
    np.testing.assert_allclose(
        shifted.tvalue[2], (result.fe_params["x"] - 0.5) / result.bse_fe["x"]
    )
    doubled = result.t_test("x = 0", cov_p=4.0 * result.cov_params())
    np.testing.assert_allclose(np.squeeze(doubled.tvalue), z / 2)
    assert result.t_test("x = 0", True).df_denom == result.df_resid
    with pytest.raises(ValueError, match="r_matrix for t-test should have 3 columns"):
        result.t_test(np.eye(4))
    with pytest.raises(ValueError, match=r"r_matrix should have 3 columns.*\(or 7, one for each"):
        result.wald_test(np.eye(5))


def test_pairwise_tests(result: Any) -> None:
    frame = result.t_test_pairwise("C(w)").result_frame
    np.testing.assert_allclose(frame.loc["1-0", "coef"], result.fe_params["C(w)[T.1]"])
    np.testing.assert_allclose(frame.loc["1-0", "std err"], result.bse_fe["C(w)[T.1]"])


def test_covariance_of_contrasts(result: Any) -> None:
    """statsmodels' wrapper fails at them."""
    cov, R = result.cov_params(), np.eye(7)[:2] - np.eye(7)[2]
    np.testing.assert_allclose(result.cov_params(r_matrix=R), R @ cov.to_numpy() @ R.T, rtol=1e-12)
    np.testing.assert_allclose(result.cov_params(column=1), cov.iloc[1, 1])
    assert list(cov.index) == list(cov.columns) == list(result.params.index)


def test_bootstrap(result: Any) -> None:
    """40 replicates: the mean within five of its errors, the spread within its own."""
    mean, spread, replicates = result.bootstrap(nrep=40, rng=3)
    assert replicates.shape == (40, 7)
    np.testing.assert_array_equal(replicates, result.bootstrap(40, "nm", 0, 1, 3)[2])
    np.testing.assert_array_equal(replicates, result.bootstrap_results)
    np.testing.assert_allclose(mean, np.nanmean(replicates, axis=0))
    fe, errors = result.fe_params, result.bse_fe
    assert (np.abs(mean[:3] - fe) <= 5 * errors / np.sqrt(40)).all()
    assert (np.abs(np.log(spread[:3] / errors)) <= 0.5).all()


# --- random effects -------------------------------------------------------------------------


def test_sparse_components_have_all_results() -> None:
    """statsmodels fails at them; they are those of dense matrices."""
    (sparse, _), (dense, other) = pair("sparse"), pair("crossed")
    found, expected = fit(sparse), their_results(other, fit(dense))
    np.testing.assert_allclose(found.fittedvalues, expected.fittedvalues, rtol=1e-9)
    np.testing.assert_allclose(found.resid, expected.resid, rtol=0, atol=1e-9)
    pd.testing.assert_frame_equal(
        found.random_effects_cov[1], expected.random_effects_cov[1], atol=1e-9
    )


def test_residuals_are_conditional(result: Any) -> None:
    model = result.model
    np.testing.assert_allclose(result.resid, model.endog - result.fittedvalues, atol=1e-12)
    fitted = model.exog @ result.fe_params
    for i, (label, effects) in enumerate(result.random_effects.items()):
        rows = model.row_indices[label]
        Z = np.hstack([model.exog_re_li[i], model.exog_vc.mats[0][i]])
        fitted[rows] += Z @ effects
    np.testing.assert_allclose(result.fittedvalues, fitted, atol=1e-12)
    np.testing.assert_array_equal(result.predict(), model.exog @ result.fe_params)


# --- output ---------------------------------------------------------------------------------


def test_summary_takes_names(result: Any) -> None:
    summary = result.summary(
        yname="Q", xname_fe=list("abc"), xname_re=list("1234"), title="T", alpha=0.1
    )
    assert list(summary.tables[1].index) == [*"abc", *"1234"]
    assert list(summary.tables[1].columns[-2:]) == ["[0.05", "0.95]"]
    assert "Q" in summary.tables[0].to_numpy() and summary.title == "T"
    half = norm.ppf(0.95) * result.bse_fe.iloc[0]
    assert summary.tables[1].iloc[0, 4] == f"{result.fe_params.iloc[0] - half:.3f}"
    with pytest.raises(ValueError, match="xname_fe should be a list of length 3"):
        result.summary(xname_fe=["a"])


def test_summary_col(result: Any) -> None:
    columns = summary_col([result], float_format="%.6f").tables[0]
    assert columns.loc["x"].iloc[0] == f"{result.params['x']:.6f}"
    assert f"({result.bse['x']:.6f})" in columns.to_numpy()


def test_numbers_round(result: Any) -> None:
    """They are NumPy's, as in statsmodels: those of Python have no `round` method."""
    for value in (result.scale, result.llf, result.model.loglike(result.params_object)):
        assert isinstance(value.round(2), np.float64)


def test_what_is_not_there(result: Any) -> None:
    for attribute in ("bsejac", "covjac", "score_obsv"):
        with pytest.raises(NotImplementedError, match="scores by group"):
            getattr(result, attribute)


def test_native(result: Any, dietox: Any) -> None:
    assert result.native.llf == result.llf
    np.testing.assert_allclose(dietox.native.params, dietox.fe_params)
    new = pd.DataFrame({"Time": [1.0, 2.0], "Pig": [4601, -1]})
    values = np.asarray(dietox.native.predict(new, new_levels="population"))
    effect = dietox.random_effects[4601].iloc[0]
    expected = dietox.predict(new) + np.array([effect, 0.0])
    np.testing.assert_allclose(values, expected, rtol=1e-12)


# --- files and data -------------------------------------------------------------------------


def test_remove_data() -> None:
    kwargs: dict[str, Any] = {"re_formula": "~ z1", "vc_formula": {"s": "0 + z3"}}
    model = mixedlm("ys ~ x + C(w)", DATA, groups="g", **kwargs)
    found, other = model.fit(), model.fit()
    text, before = other.summary().as_text(), len(pickle.dumps(found))
    found.remove_data()
    # Before anything was read; statsmodels fails at all of these.
    assert found.summary().as_text() == text
    assert len(pickle.dumps(found)) < before / 4
    pd.testing.assert_series_equal(found.bse, other.bse)
    pd.testing.assert_series_equal(found.bse_re_natural, other.bse_re_natural)
    np.testing.assert_array_equal(found.conf_int(), other.conf_int())
    assert found.t_test("x = 0").pvalue == other.t_test("x = 0").pvalue
    assert found.llf == other.llf and found.vcomp == other.vcomp
    pd.testing.assert_series_equal(found.predict(DATA[:3]), other.predict(DATA[:3]))
    for attribute in ("fittedvalues", "resid", "random_effects", "random_effects_cov", "hessv"):
        with pytest.raises(ValueError, match=r"remove_data\(\) took away"):
            getattr(found, attribute)
    with pytest.raises(AttributeError, match=r"remove_data\(\) took it away"):
        found.native  # noqa: B018
    with pytest.raises(AttributeError, match=r"remove_data\(\) took it away"):
        found.bootstrap(2)
    with pytest.raises(ValueError, match="exog is needed"):
        found.predict()
    # Other results and the model are as they were.
    assert np.isfinite(other.resid).all() and model.fit().llf == other.llf


@pytest.mark.parametrize("remove", [False, True])
def test_saved_results(remove: bool, tmp_path: Path) -> None:
    model = mixedlm("ys ~ x + C(w)", DATA, groups="g")
    found = model.fit()
    file = tmp_path / "fit.pickle"
    found.save(file, remove_data=remove)
    for load in (MixedLMResults.load, statsmodels.api.load):
        loaded = load(file)
        pd.testing.assert_series_equal(loaded.params, found.params)
        assert loaded.summary().as_text() == found.summary().as_text()
        pd.testing.assert_series_equal(loaded.predict(DATA[:4]), found.predict(DATA[:4]))
        if not remove:
            pd.testing.assert_series_equal(loaded.random_effects[3], found.random_effects[3])
            assert loaded.model.fit().llf == found.llf


def test_pickle_with_arrays_and_components() -> None:
    model = pair("spec")[0]
    found = fit(model)
    loaded = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(loaded.random_effects[1], found.random_effects[1])
    assert loaded.model.fit().llf == found.llf


def test_results_made_by_hand() -> None:
    """The constructor takes what that of statsmodels takes."""
    model = pair("arrays")[0]
    found = fit(model)
    cov = np.asarray(found.normalized_cov_params)
    made = MixedLMResults(model, np.asarray(found.params), cov)
    np.testing.assert_allclose(made.llf, found.llf, rtol=1e-12)
    np.testing.assert_allclose(made.scale, found.scale, rtol=1e-10)
    np.testing.assert_allclose(made.fittedvalues, found.fittedvalues, rtol=1e-8, atol=1e-10)
    assert MixedLM is type(made.model)
