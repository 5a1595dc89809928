"""Every stored fit of lme4, at tolerances stated per quantity."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
import pytest
from scipy.linalg import block_diag

import lmmax
from lmmax import likelihood
from tests.compiled import jit
from tests.reference import (
    as_in_formula,
    effect_name,
    labels_as_in_formula,
    load_data,
    load_records,
    matrix,
)

CRITERION = jit(likelihood.criterion)
RECORDS = {record["id"]: record for record in load_records(kinds=("lmm",), several=False)}
SEVERAL = {record["id"]: record for record in load_records(kinds=("lmm",), several=True)}
OVER_PARAMETRISED = {"orthodont_bysex_reml"}  # only parts of the covariance are identified
# lme4 itself carries noise of 1e-5 in these; the same models in another form are the targets of
# test_ill_conditioned_designs.
ILL_CONDITIONED = {"syn_rankdef_near_reml", "syn_scale_far_reml"}


@pytest.fixture(scope="module", params=sorted(RECORDS.keys() - ILL_CONDITIONED))
def pair(request: pytest.FixtureRequest) -> tuple[dict[str, Any], lmmax.Fit]:
    record = RECORDS[request.param]
    return record, fit_record(record)


_FITS: dict[str, lmmax.Fit] = {}


def fit_record(record: dict[str, Any]) -> lmmax.Fit:
    """The fit of a record, made once for all modules that test it."""
    if record["id"] not in _FITS:
        _FITS[record["id"]] = _fit_record(record)
    return _FITS[record["id"]]


def _fit_record(record: dict[str, Any]) -> lmmax.Fit:
    with warnings.catch_warnings():
        if record["results"]["fixef_dropped"]:
            warnings.simplefilter("ignore", lmmax.RankWarning)
        if "over-parametrised" in record["tags"]:
            warnings.simplefilter("ignore", lmmax.IdentifiabilityWarning)
        return lmmax.fit(
            record["formula_py"],
            load_data(record["dataset"]),
            reml=record["reml"],
            weights=record["weights"],
            contrasts=record["contrasts"] or None,
        )


def test_there_are_as_many_records_as_expected() -> None:
    assert len(RECORDS) >= 123
    assert len(SEVERAL) >= 28


def test_record(pair: tuple[dict[str, Any], lmmax.Fit]) -> None:
    record, fit = pair
    stored = record["results"]
    assert fit.nobs == stored["n"]
    assert fit.design.n_dropped == stored["n_dropped"]
    assert fit.converged
    assert fit.singular == ("singular" in record["tags"])

    # The criterion to 1e-8 relative, and all that follows from it.
    assert fit.deviance == pytest.approx(stored["criterion"], rel=1e-8)
    assert fit.llf == pytest.approx(stored["logLik"], rel=1e-8)
    assert fit.aic == pytest.approx(stored["AIC"], rel=1e-8)
    assert fit.bic == pytest.approx(stored["BIC"], rel=1e-8)

    # Coefficients to 1e-6 relative, or 1e-6 standard errors where one is near zero.
    se = matrix(stored["se"])
    beta = fit.params.dropna().to_numpy()
    assert np.all(np.abs(beta - matrix(stored["fixef"])) <= 1e-6 * np.maximum(np.abs(beta), se))
    assert fit.params.isna().sum() == len(stored["fixef_dropped"] or ())
    assert np.allclose(fit.bse.dropna(), se, rtol=1e-6, atol=0.0)
    vcov = matrix(stored["vcov"])
    ours = fit.cov_params().dropna(how="all").dropna(axis=1, how="all").to_numpy()
    assert np.allclose(ours, vcov, rtol=0.0, atol=2e-6 * np.max(np.diag(vcov)))

    # Variances to 1e-5 of the largest one.
    scale = stored["sigma"] ** 2
    assert fit.scale == pytest.approx(scale, rel=1e-5)
    cov = block_diag(*[matrix(term["cov"]) for term in stored["varcorr"]])
    if record["id"] in OVER_PARAMETRISED:
        assert np.allclose(np.diag(fit.cov_re), np.diag(cov), atol=1e-5 * max(np.max(cov), scale))
        return
    assert np.allclose(fit.cov_re, cov, rtol=0.0, atol=1e-5 * max(np.max(np.abs(cov)), scale))

    # Conditional modes and their covariances to 1e-5 of the largest of their kind.
    spread = np.std(fit.design.y)
    at = 0
    for term in stored["ranef"]:
        values = matrix(term["values"])
        here = slice(at, at + values.shape[1])
        at = here.stop
        modes = fit.random_effects.loc[term["levels"]].to_numpy()[:, here]
        unit = np.max(np.abs(values), axis=0)
        unit = np.where(unit > 0.0, unit, spread)
        assert np.all(np.abs(modes - values) <= 1e-5 * unit)
        condvar = np.array([matrix(m) for m in term["condvar"]])
        rows = fit.random_effects.index.get_indexer(term["levels"])
        ours = fit.random_effects_cov[rows][:, here, here]
        unit = np.sqrt(np.max(np.einsum("mii->mi", condvar), axis=0))
        unit = np.where(unit > 0.0, unit, spread)
        assert np.all(np.abs(ours - condvar) <= 1e-5 * np.outer(unit, unit))

    for ours, key in (
        (fit.fittedvalues, "fitted"),
        (fit.fittedvalues_marginal, "fitted_population"),
        (fit.resid, "residuals"),
    ):
        first = matrix(stored[key]["first"])
        assert np.allclose(ours.to_numpy()[: len(first)], first, rtol=0.0, atol=1e-5 * spread)
        assert ours.sum() == pytest.approx(stored[key]["sum"], abs=1e-5 * spread * fit.nobs)


def check_degrees_of_freedom(record: dict[str, Any], fit: lmmax.Fit) -> None:
    """Satterthwaite's and Kenward and Roger's, their standard errors, t and p.

    The stored Satterthwaite values rest on numerical derivatives, good to 1e-6, or 5e-6 for large
    tables; those of Kenward and Roger are closed forms.
    """
    stored = record["results"]
    tolerance = 5e-6 if {"medium", "big"} & set(record["tags"]) else 1e-6
    for ddf, exact in (("satterthwaite", tolerance), ("kenward-roger", 1e-9)):
        target = stored.get(ddf.replace("-", "_"))
        if target is None:
            continue
        table = fit.coefficients(ddf).dropna(how="all")
        df, t, p = matrix(target["df"]), matrix(target["t"]), matrix(target["p"])
        assert np.allclose(table["df"], df, rtol=exact, atol=0.0), ddf
        # Errors of the coefficients are in units of their standard errors; see above.
        assert np.allclose(table["t"], t, rtol=1e-6, atol=1e-6), ddf
        # The logarithm of a small p moves by t times the error of t, and with df.
        log_p, target_p = (np.log(np.maximum(x, 1e-300)) for x in (table["p"], p))
        assert np.allclose(log_p, target_p, rtol=1e-5, atol=1e-5), ddf
        assert np.allclose(table["std err"], matrix(target["se"]), rtol=1e-6, atol=0.0), ddf
        if "vcov_adjusted" in target:
            adjusted = matrix(target["vcov_adjusted"])
            unit = np.sqrt(np.diag(adjusted))
            ours = fit.denominator(ddf).cov
            assert np.allclose(ours, adjusted, rtol=0.0, atol=2e-6 * np.outer(unit, unit)), ddf


def test_degrees_of_freedom(pair: tuple[dict[str, Any], lmmax.Fit]) -> None:
    check_degrees_of_freedom(*pair)


def test_criterion_at_other_parameters(pair: tuple[dict[str, Any], lmmax.Fit]) -> None:
    """lme4's criterion at stored thetas, its own ordering: column by column, term by term."""
    record, fit = pair
    widths = [len(term["columns"]) for term in record["results"]["varcorr"]]
    for point in record["results"]["objective_at"]:
        theta, factors, at = matrix(point["theta"]), [], 0
        for q in widths:
            L = np.zeros((q, q))
            columns, rows = np.triu_indices(q)
            L[rows, columns] = theta[at : at + len(rows)]
            at += len(rows)
            factors.append(L)
        L = block_diag(*factors)
        with jax.enable_x64(True):
            value = CRITERION(fit.compression.problem, L @ L.T, float(record["reml"]))
        assert float(value) == pytest.approx(point["value"], rel=1e-9)


@pytest.mark.parametrize(
    ("identifier", "equivalent", "column", "factor"),
    [
        ("syn_rankdef_near_reml", "syn_rankdef_near_equiv_reml", "x4", 1e-5),
        ("syn_scale_far_reml", "syn_scale_plain_int_reml", "x_far", 1.0),
    ],
)
def test_ill_conditioned_designs(
    identifier: str, equivalent: str, column: str, factor: float
) -> None:
    """Nearly collinear columns equal the well-conditioned form of the same model."""
    fit = fit_record(RECORDS[identifier])
    target = RECORDS[equivalent]["results"]
    expected = target["criterion"] + 2.0 * np.log(factor)
    assert fit.deviance == pytest.approx(expected, rel=1e-10)
    assert fit.scale == pytest.approx(target["sigma"] ** 2, rel=1e-8)
    position = fit.params.index.get_loc(column)
    assert fit.params.iloc[position] * factor == pytest.approx(
        matrix(target["fixef"])[position], rel=1e-7
    )
    assert fit.bse.iloc[position] * factor == pytest.approx(
        matrix(target["se"])[position], rel=1e-7
    )


# --- several grouping factors ---------------------------------------------------------------

# Of the intercept and the two columns of service per department only the two sums are identified.
IDENTIFIED = {("insteval_slopes_ml", "dept"): np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])}


def several_params() -> list[Any]:
    """Identifiers of the records; those of large tables are marked slow."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if "big" in record["tags"] else [])
        for name, record in sorted(SEVERAL.items())
    ]


@pytest.fixture(scope="module", params=several_params())
def several(request: pytest.FixtureRequest) -> tuple[dict[str, Any], lmmax.Fit]:
    record = SEVERAL[request.param]
    return record, fit_record(record)


def factor_covariances(record: dict[str, Any], fit: lmmax.Fit) -> dict[str, np.ndarray]:
    """The record's covariance of each factor's effects, in the order of the fit's columns.

    lme4 orders terms by the number of levels, and within a factor not always as the formula does.
    """
    expected = {}
    for name, effects in fit.random_effects.items():
        columns = [effect_name(column) for column in effects.columns]
        cov = np.zeros((len(columns), len(columns)))
        for term in record["results"]["varcorr"]:
            if as_in_formula(term["group"], fit.random_effects)[0] == name:
                at = [columns.index(effect_name(column)) for column in term["columns"]]
                cov[np.ix_(at, at)] = matrix(term["cov"])
        expected[name] = cov
    return expected


def test_several_factors(several: tuple[dict[str, Any], lmmax.Fit]) -> None:
    record, fit = several
    stored = record["results"]
    assert fit.nobs == stored["n"]
    assert fit.converged
    if record["id"] not in {name for name, _ in IDENTIFIED}:
        assert fit.singular == ("singular" in record["tags"])

    # The criterion to 1e-8 relative, and all that follows from it.
    assert fit.deviance == pytest.approx(stored["criterion"], rel=1e-8)
    assert fit.llf == pytest.approx(stored["logLik"], rel=1e-8)
    assert fit.aic == pytest.approx(stored["AIC"], rel=1e-8)
    assert fit.bic == pytest.approx(stored["BIC"], rel=1e-8)
    assert fit.n_params == stored["npar"]

    # Coefficients to 1e-6 relative or 1e-6 standard errors, standard errors to 1e-6.
    se = matrix(stored["se"])
    beta = fit.params.to_numpy()
    assert np.all(np.abs(beta - matrix(stored["fixef"])) <= 1e-6 * np.maximum(np.abs(beta), se))
    assert np.allclose(fit.bse, se, rtol=1e-6, atol=0.0)
    vcov = matrix(stored["vcov"])
    assert np.allclose(fit.cov_params(), vcov, rtol=0.0, atol=2e-6 * np.max(np.diag(vcov)))
    assert fit.scale == pytest.approx(stored["sigma"] ** 2, rel=1e-5)


def test_covariances_of_several_factors(several: tuple[dict[str, Any], lmmax.Fit]) -> None:
    """To 1e-5 of the largest variance; nothing between factors or independent terms."""
    record, fit = several
    expected = factor_covariances(record, fit)
    groups = {as_in_formula(g, fit.random_effects)[0] for g in record["results"]["ngroups"]}
    assert set(fit.random_effects) == groups
    cov = block_diag(*expected.values())
    size = max(np.max(np.abs(cov)), fit.scale)
    got = fit.cov_re
    assert got.shape == cov.shape
    labels = [(name, c) for name in expected for c in fit.random_effects[name].columns]
    assert list(got.index) == labels
    assert list(got.columns) == labels
    combine = block_diag(
        *[IDENTIFIED.get((record["id"], name), np.eye(len(c))) for name, c in expected.items()]
    )
    ours = combine @ got.to_numpy() @ combine.T
    assert np.allclose(ours, combine @ cov @ combine.T, rtol=0.0, atol=1e-5 * size)

    # The table of variances says the same.
    table = fit.varcorr()
    residual = table.iloc[-1]
    assert residual["vcov"] == pytest.approx(fit.scale, rel=1e-12)
    assert residual["sdcor"] == pytest.approx(record["results"]["sigma"], rel=1e-5)
    for row in table.iloc[:-1].itertuples():
        second = row.var1 if row.var2 is None else row.var2
        entry = got.loc[(row.group, row.var1), (row.group, second)]
        assert row.vcov == pytest.approx(entry, rel=1e-12, abs=1e-300)
    variances = table.iloc[:-1][[name is None for name in table["var2"].iloc[:-1]]]
    assert list(zip(variances["group"], variances["var1"], strict=True)) == labels
    assert np.allclose(variances["sdcor"] ** 2, np.diag(got), rtol=1e-12, atol=0.0)


def test_degrees_of_freedom_of_several_factors(several: tuple[dict[str, Any], lmmax.Fit]) -> None:
    check_degrees_of_freedom(*several)


@pytest.mark.parametrize(
    "several",
    [
        pytest.param(name, marks=[pytest.mark.slow] if "big" in record["tags"] else [])
        for name, record in sorted(SEVERAL.items())
        if "varpar_cov" in record["results"] and "singular" not in record["tags"]
    ],
    indirect=True,
)
def test_errors_of_variances(several: tuple[dict[str, Any], lmmax.Fit]) -> None:
    """The delta method from lme4's observed information of (theta, sigma), to 1e-5 relative."""
    record, fit = several
    stored = record["results"]
    sigma, theta = stored["sigma"], matrix(stored["theta"])
    information = matrix(stored["varpar_cov"])

    def vech(parameters: np.ndarray) -> np.ndarray:
        """Lower triangles of the covariances in lme4's order of terms, and the scale."""
        out, at, scale = [], 0, parameters[-1] ** 2
        for term in stored["varcorr"]:
            q = len(term["columns"])
            L = np.zeros((q, q), dtype=parameters.dtype)
            rows, columns = np.triu_indices(q)
            L[columns, rows] = parameters[at : at + len(rows)]
            at += len(rows)
            out.append((scale * L @ L.T)[np.tril_indices(q)])
        return np.concatenate([*out, [scale]])

    h = 1e-30
    point = np.append(theta, sigma).astype(complex)
    jacobian = np.stack([np.imag(vech(point + 1j * h * e)) / h for e in np.eye(len(point))], axis=1)
    errors = np.sqrt(np.diag(jacobian @ information @ jacobian.T))
    table = fit.varcorr()
    assert table["vcov_se"].iloc[-1] == pytest.approx(errors[-1], rel=1e-5)
    assert table["sdcor_se"].iloc[-1] == pytest.approx(errors[-1] / (2.0 * sigma), rel=1e-5)
    at = 0
    for term in stored["varcorr"]:
        name, _ = as_in_formula(term["group"], fit.random_effects)
        rows, columns = np.tril_indices(len(term["columns"]))
        for i, j in zip(rows, columns, strict=True):
            pair = {effect_name(term["columns"][i]), effect_name(term["columns"][j])}
            found = [
                row.vcov_se
                for row in table[table["group"] == name].itertuples()
                if {effect_name(c) for c in (row.var1, row.var2 or row.var1)} == pair
            ]
            assert found == [pytest.approx(errors[at], rel=1e-5)]
            at += 1


def test_effects_of_several_factors(several: tuple[dict[str, Any], lmmax.Fit]) -> None:
    """Conditional modes to 1e-5 of their spread, their covariances to 1e-4."""
    record, fit = several
    spread = np.std(fit.fittedvalues + fit.resid)
    covariances = fit.random_effects_cov
    assert list(covariances) == list(fit.random_effects)
    seen = set()
    for term in record["results"]["ranef"]:
        name, order = as_in_formula(term["group"], fit.random_effects)
        effects = fit.random_effects[name]
        assert len(effects) == term["n_levels"]
        assert len(covariances[name]) == term["n_levels"]
        if (record["id"], name) in IDENTIFIED:
            continue
        levels = labels_as_in_formula(term["levels"], order)
        columns = [effect_name(column) for column in effects.columns]
        at = [columns.index(effect_name(column)) for column in term["columns"]]
        seen.update((name, column) for column in at)
        rows = effects.index.get_indexer(levels)
        assert np.all(rows >= 0)
        values = matrix(term["values"])
        unit = np.max(np.abs(values), axis=0)
        unit = np.where(unit > 0.0, unit, spread)
        assert np.all(np.abs(effects.to_numpy()[np.ix_(rows, at)] - values) <= 1e-5 * unit)
        # Over all levels, also those that are not stored.
        squares = np.sum(effects.to_numpy()[:, at] ** 2, axis=0)
        assert np.allclose(squares, term["sumsq"], rtol=2e-5, atol=1e-10 * spread**2)
        condvar = np.array([matrix(m) for m in term["condvar"]])
        ours = covariances[name][np.ix_(rows, at, at)]
        unit = np.sqrt(np.max(np.einsum("mii->mi", condvar), axis=0))
        unit = np.where(unit > 0.0, unit, spread)
        assert np.all(np.abs(ours - condvar) <= 1e-4 * np.outer(unit, unit))
    expected = {
        (name, i)
        for name, effects in fit.random_effects.items()
        for i in range(effects.shape[1])
        if (record["id"], name) not in IDENTIFIED
    }
    assert seen == expected


def test_predictions_of_several_factors(several: tuple[dict[str, Any], lmmax.Fit]) -> None:
    """Fitted values, residuals and new rows (with unknown levels) to 1e-5 of the spread."""
    record, fit = several
    stored = record["results"]
    spread = np.std(fit.fittedvalues + fit.resid)
    for ours, key in (
        (fit.fittedvalues, "fitted"),
        (fit.fittedvalues_marginal, "fitted_population"),
        (fit.resid, "residuals"),
    ):
        first = matrix(stored[key]["first"])
        assert np.allclose(ours.to_numpy()[: len(first)], first, rtol=0.0, atol=1e-5 * spread)
        assert ours.sum() == pytest.approx(stored[key]["sum"], abs=1e-5 * spread * fit.nobs)
        # Squares, because a sum is blind to an exchange of levels.
        size = max(stored[key]["sumsq"], spread**2)
        assert np.sum(ours**2) == pytest.approx(stored[key]["sumsq"], abs=1e-5 * size)
    new = {name: np.array(values) for name, values in stored["predict"]["newdata"].items()}
    marginal = fit.predict(new, random_effects=False)
    expected = matrix(stored["predict"]["population"])
    assert np.max(np.abs(marginal - expected)) < 1e-5 * spread
    conditional = fit.predict(new, new_levels="population")
    expected = matrix(stored["predict"]["conditional"])
    assert np.max(np.abs(conditional - expected)) < 1e-5 * spread


@pytest.mark.parametrize("name", several_params())
def test_criterion_of_several_factors_at_other_parameters(name: str) -> None:
    """lme4's criterion at stored thetas, to 1e-9 relative.

    With the covariances in proportion to the scale s, the criterion is c + d log s + r / s, with
    d the degrees of freedom: two fits with everything held give c and r, and so its minimum.
    """
    record = SEVERAL[name]
    stored, data = record["results"], load_data(record["dataset"])
    d = stored["n"] - stored["p"] * record["reml"]
    point = next(entry for entry in stored["objective_at"] if entry["label"] == "perturbed")
    labels = [str(term) for term in lmmax.parse_formula(record["formula_py"]).random]
    relative, theta, at = {}, matrix(point["theta"]), 0
    for term in stored["varcorr"]:
        q = len(term["columns"])
        L = np.zeros((q, q))
        rows, columns = np.triu_indices(q)
        L[columns, rows] = theta[at : at + len(rows)]
        at += len(rows)
        relative[label_of(term, labels)] = L @ L.T
    assert set(relative) == set(labels)

    def held(scale: float) -> float:
        fix = {"cov_re": {k: scale * D for k, D in relative.items()}, "scale": scale}
        return float(lmmax.fit(record["formula_py"], data, reml=record["reml"], fix=fix).deviance)

    s = 0.7 * stored["sigma"] ** 2
    r = (held(s) - held(2.0 * s) + d * np.log(2.0)) * 2.0 * s
    c = held(s) - d * np.log(s) - r / s
    assert c + d * np.log(r / d) + d == pytest.approx(point["value"], rel=1e-9)


def label_of(term: dict[str, Any], labels: list[str]) -> str:
    """The label of the formula's term that this term of lme4 is."""
    columns = {effect_name(column) for column in term["columns"]}

    def matches(label: str) -> bool:
        design, group = label[1:-1].split(" | ")
        if sorted(group.split(":")) != sorted(term["group"].split(":")):
            return False
        names = set(design.split(" + "))
        if "0" in names:
            names.remove("0")
        else:
            names = names - {"1"} | {"Intercept"}
        # A factor's columns carry its name in front.
        return all(any(c.startswith(n) for n in names) for c in columns) and len(names) <= len(
            columns
        )

    (label,) = [label for label in labels if matches(label)]
    return label


@pytest.mark.slow
@pytest.mark.parametrize(
    ("formula", "criterion"),
    [
        ("y ~ 1 + service + (1 | s) + (1 | d) + (1 | dept)", 237721.768775),
        ("y ~ service*dept + (1 | s) + (1 | d)", 237585.553415),
    ],
)
def test_insteval(formula: str, criterion: float) -> None:
    """ML fits of 73421 ratings whose published criterion has six decimals."""
    fit = lmmax.fit(formula, load_data("insteval"), reml=False)
    assert fit.converged
    assert fit.deviance == pytest.approx(criterion, abs=2e-6)
