"""Cluster-robust covariances: clubSandwich's, the definitions with n x n matrices, closed forms."""

from __future__ import annotations

import functools
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import lmmax
from lmmax.inference import clusters, tree
from lmmax.inference.clusters import ClusterError, find_clusters
from lmmax.inference.robust import TYPES, RobustCovariance, robust
from lmmax.solve import Status
from tests.oracles.dense import Array, Factor, Model
from tests.oracles.designs import Problem, simulate
from tests.reference import load_data, load_record, load_records, matrix

pytestmark = pytest.mark.unoptimised

RECORDS = [
    record["id"]
    for record in load_records(kinds=("lmm",))
    if record["results"].get("cluster_robust") is not None
]


@functools.cache
def reference_fit(identifier: str) -> lmmax.Fit:
    record = load_record(identifier)
    return lmmax.fit(record["formula_py"], load_data(record["dataset"]), reml=record["reml"])


# --- clubSandwich ---------------------------------------------------------------------------


def test_there_are_records() -> None:
    assert len(RECORDS) == 13


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("identifier", RECORDS)
def test_clubsandwich_covariance(identifier: str, type: str) -> None:
    """Stored to 1e-9; in syn_unbalanced_slope_ml the variances themselves agree to 1e-9 only."""
    stored = load_record(identifier)["results"]["cluster_robust"]
    found = robust(reference_fit(identifier), type=type)
    assert found.cluster == stored["cluster"]
    expected = matrix(stored[type])
    unit = np.sqrt(np.diag(expected))
    error = (found.cov.to_numpy() - expected) / np.outer(unit, unit)
    assert np.abs(error).max() < 1e-9
    np.testing.assert_allclose(found.bse, unit, rtol=1e-9)


@pytest.mark.parametrize("identifier", RECORDS)
def test_clubsandwich_tests(identifier: str) -> None:
    stored = load_record(identifier)["results"]["cluster_robust"]["CR2_satterthwaite"]
    found = robust(reference_fit(identifier)).coefficients()
    for column, name, rtol in (
        ("coef", "estimate", 1e-9),
        ("std err", "se", 1e-9),
        ("t", "t", 1e-9),
        ("df", "df", 1e-9),
        ("p", "p", 1e-8),
    ):
        np.testing.assert_allclose(found[column], matrix(stored[name]), rtol=rtol, err_msg=column)


# --- the definitions, with n x n matrices -----------------------------------------------------


class Definition:
    """Pustejovsky and Tipton's formulas as they stand; the target is the working covariance.

    Args:
        model: the dense model.
        covs: natural covariance of each factor.
        scale: residual variance.
        labels: cluster of each row.
        type: estimator.
    """

    def __init__(self, model: Model, covs: list[Array], scale: float, labels: Array, type: str):
        X, n, p = model.X, *model.X.shape
        V = model.covariance(covs, scale)
        W = np.linalg.inv(V)
        self.V, M = V, np.linalg.inv(X.T @ W @ X)
        rest = np.eye(n) - X @ M @ X.T @ W  # I - H
        codes = np.unique(labels, return_inverse=True)[1]
        m = codes.max() + 1
        factor = {
            "CR1": m / (m - 1),
            "CR1p": m / max(m - p, 1),
            "CR1S": m * (n - 1) / ((m - 1) * (n - p)),
        }.get(type, 1.0)
        self.parts = []  # per cluster G (n, p) with sqrt(factor) G'y its part of the estimate
        for i in range(m):
            here = np.flatnonzero(codes == i)
            assert np.all(V[np.ix_(here, np.flatnonzero(codes != i))] == 0.0)
            Phi, Xi = V[np.ix_(here, here)], X[here]
            A = np.eye(len(here))
            if type == "CR2":
                root = np.linalg.cholesky(Phi).T
                values, vectors = np.linalg.eigh(root @ (Phi - Xi @ M @ Xi.T) @ root.T)
                live = values > 1e-10 * values[-1]
                half = vectors[:, live] / np.sqrt(values[live])
                A = root.T @ (half @ vectors[:, live].T) @ root
            elif type == "CR3":
                A = np.linalg.inv(A - Xi @ M @ Xi.T @ W[np.ix_(here, here)])
            self.parts.append(rest[here].T @ A.T @ W[np.ix_(here, here)] @ Xi @ M)
        parts = [part.T @ model.y for part in self.parts]
        self.cov = factor * sum(np.outer(part, part) for part in parts)

    def df(self, c: Array) -> float:
        """2 E^2 / Var of the quadratic form that estimates the variance of c'beta."""
        Q = sum(np.outer(part @ c, part @ c) for part in self.parts)
        QV = Q @ self.V
        return float(np.trace(QV) ** 2 / np.trace(QV @ QV))

    def eta(self, L: Array) -> float:
        """Degrees of freedom of the Wishart distribution with the same total variance."""
        sides = [part @ L.T for part in self.parts]
        omega = sum(side.T @ self.V @ side for side in sides)
        values, vectors = np.linalg.eigh(omega)
        sides = [side @ vectors / np.sqrt(values) for side in sides]
        total = 0.0
        for s in range(len(L)):
            for t in range(len(L)):
                Q = sum(np.outer(side[:, s], side[:, t]) for side in sides)
                QV = 0.5 * (Q + Q.T) @ self.V
                total += 2.0 * np.trace(QV @ QV)
        return float(len(L) * (len(L) + 1) / total)


def covariances(fit: lmmax.Fit) -> list[Array]:
    cov = fit.cov_re.to_numpy()
    return [cov[here, here] for here in fit.layout.slices]


def three_columns(problem: Problem) -> Problem:
    """The same with ``z`` among the fixed effects."""
    X = np.column_stack([problem.model.X, problem.data["z"]])
    formula = problem.formula.replace("y ~ x", "y ~ x + z")
    return replace(problem, formula=formula, model=replace(problem.model, X=X))


def weighted(problem: Problem, constant: bool) -> Problem:
    """Prior weights; of two levels of a factor, constant in all."""
    rng = np.random.Generator(np.random.PCG64(1))
    w = rng.uniform(0.4, 2.5, len(problem.data))
    code = problem.model.factors[0].codes
    equal = (code > -1) if constant else (code < 2)
    w[equal] = rng.uniform(0.4, 2.5, code.max() + 1)[code[equal]]
    return replace(
        problem,
        data=problem.data.assign(w=w),
        weights="w",
        model=replace(problem.model, weights=w),
    )


def schools(first: Problem, second: Problem) -> tuple[Problem, Array]:
    """Two designs with crossed factors side by side, and to which a row belongs."""
    data = pd.concat(
        [first.data.assign(school="s1"), second.data.assign(school="s2")], ignore_index=True
    )
    for name in "ab":
        data[name] = data["school"] + data[name]
    factors = []
    for one, two in zip(first.model.factors, second.model.factors, strict=True):
        codes = np.concatenate([one.codes, two.codes + one.levels])
        factors.append(Factor(codes, np.concatenate([one.Z, two.Z])))
    model = Model(
        np.concatenate([first.model.y, second.model.y]),
        np.concatenate([first.model.X, second.model.X]),
        tuple(factors),
    )
    return replace(first, data=data, model=model), data["school"].to_numpy()


@functools.cache
def case(name: str) -> tuple[lmmax.Fit, Model, Any, Array]:
    """Fit, dense model, what to pass as cluster, and the cluster of each row."""
    cluster: Any = None
    if name == "crossed within":
        problem, labels = schools(simulate("crossed", 1), simulate("crossed", 2))
        cluster = labels
    else:
        kind = name if name in ("nested_three", "nested_slope") else "nested"
        problem = three_columns(simulate(kind, 4))
        labels = problem.data["a"].to_numpy()
        if name == "coarser":
            labels = np.array([f"c{int(label[1:]) % 5}" for label in labels])
            cluster = pd.Series(labels, index=problem.data.index, name="county")
        elif name.endswith("weights"):
            problem = weighted(problem, name.startswith("constant"))
    fit = lmmax.fit(problem.formula, problem.data, weights=problem.weights)
    return fit, problem.model, cluster, labels


CASES = (
    "nested",
    "nested_three",
    "nested_slope",
    "coarser",
    "crossed within",
    "weights",
    "constant weights",
)


# Clusters of nested factors with many effects take a way of their own, level by level.
BY_LEVEL = [(name, 0) for name in CASES if name != "crossed within"]
WAYS = [(name, tree.LARGE) for name in CASES] + BY_LEVEL


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(("name", "large"), WAYS)
def test_definition(name: str, large: int, type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "LARGE", large)
    fit, model, cluster, labels = case(name)
    by_row = type == "CR2" and fit.design.weights is not None
    found_clusters = find_clusters(fit, cluster)
    assert tree.Levels.serve(fit, found_clusters, by_row=by_row) == (large == 0)
    if name == "crossed within" and type == "CR1p":
        with pytest.raises(ClusterError, match=r"more clusters than the 2 coefficients; .* has 2"):
            robust(fit, cluster, type)
        return
    definition = Definition(model, covariances(fit), fit.scale, labels, type)
    found = robust(fit, cluster, type)
    unit = np.sqrt(np.diag(definition.cov))
    error = (found.cov.to_numpy() - definition.cov) / np.outer(unit, unit)
    assert np.abs(error).max() < 1e-9
    p = len(unit)
    contrasts = np.vstack([np.eye(p), np.arange(1.0, p + 1.0)])
    table = found.t_test((contrasts, np.arange(p + 1.0))).table
    np.testing.assert_allclose(table["df"], [definition.df(c) for c in contrasts], rtol=1e-9)
    estimate = contrasts @ fit.params.to_numpy()
    errors = np.sqrt(np.einsum("ij,jk,ik->i", contrasts, definition.cov, contrasts))
    np.testing.assert_allclose(table["std err"], errors, rtol=1e-9)
    t = (estimate - np.arange(p + 1.0)) / errors
    np.testing.assert_allclose(table["t"], t, rtol=1e-8)
    half = stats.t(table["df"]).ppf(0.975) * errors
    np.testing.assert_allclose(table["lower"], estimate - half, rtol=1e-8)
    np.testing.assert_allclose(table["p"], 2.0 * stats.t(table["df"]).sf(abs(t)), rtol=1e-7)


@pytest.mark.parametrize("type", ["CR0", "CR2", "CR3"])
@pytest.mark.parametrize(("name", "large"), [way for way in WAYS if way[0] != "crossed within"])
def test_joint_definition(
    name: str, large: int, type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "LARGE", large)
    fit, model, cluster, labels = case(name)
    definition = Definition(model, covariances(fit), fit.scale, labels, type)
    found = robust(fit, cluster, type)
    for L in (np.eye(3)[1:], np.array([[0.0, 1.0, -1.0]]), np.eye(3)):
        q, difference = len(L), L @ fit.params.to_numpy() - 1.0
        Q = difference @ np.linalg.solve(L @ definition.cov @ L.T, difference)
        eta = definition.eta(L)
        htz = found.wald_test((L, np.ones(q)))
        assert htz.df_num == q
        assert htz.df_denom == pytest.approx(eta - q + 1.0, rel=1e-9)
        if eta - q + 1.0 <= 0.0:
            assert np.isnan(htz.statistic) and np.isnan(htz.pvalue)
        else:
            F = Q * (eta - q + 1.0) / (eta * q)
            assert htz.statistic == pytest.approx(F, rel=1e-8)
            assert htz.pvalue == pytest.approx(stats.f(q, eta - q + 1.0).sf(F), rel=1e-7)
        chi2 = found.wald_test((L, np.ones(q)), test="chi2")
        assert (chi2.df_num, chi2.df_denom) == (q, None)
        assert chi2.statistic == pytest.approx(Q, rel=1e-8)
        assert chi2.pvalue == pytest.approx(stats.chi2(q).sf(Q), rel=1e-6)
        naive = found.wald_test((L, np.ones(q)), test="naive-F")
        assert naive.df_denom == found.n_clusters - 1
        assert naive.statistic == pytest.approx(Q / q, rel=1e-8)
        assert naive.pvalue == pytest.approx(stats.f(q, naive.df_denom).sf(Q / q), rel=1e-6)


def test_one_hypothesis_is_the_t_test() -> None:
    found = robust(case("nested")[0])
    test, row = found.wald_test("x - z = 0.5"), found.t_test("x - z = 0.5").table.iloc[0]
    assert test.statistic == pytest.approx(row["t"] ** 2, rel=1e-11)
    assert test.df_denom == pytest.approx(row["df"], rel=1e-11)
    assert test.pvalue == pytest.approx(row["p"], rel=1e-9)


@pytest.mark.parametrize("type", ["CR2", "CR3"])
@pytest.mark.parametrize("name", ["nested_slope", "weights"])
def test_batches_do_not_matter(name: str, type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, _, cluster, _ = case(name)
    whole = robust(fit, cluster, type)
    monkeypatch.setattr(clusters, "BATCH_ENTRIES", 1)
    single = robust(fit, cluster, type)
    np.testing.assert_allclose(single.cov, whole.cov, rtol=1e-11)
    np.testing.assert_allclose(single.df, whole.df, rtol=1e-11)


@pytest.mark.parametrize("ratio", [1.2, 1e3, 1e8, 1e12])
def test_inverse_root_nodes(ratio: float) -> None:
    low = 0.03
    x = np.geomspace(low, low * ratio, 500)
    tau, weights = tree.inverse_root_nodes(low, low * ratio)
    found = np.sum(weights / (x[:, None] + tau**2), axis=1)
    np.testing.assert_allclose(found, x**-0.5, rtol=1e-12)


@pytest.mark.parametrize("name", ["nested_three", "nested_slope", "weights"])
def test_variance_bounds(name: str) -> None:
    fit, model, _, _ = case(name)
    values = np.linalg.eigvalsh(model.covariance(covariances(fit), fit.scale) / fit.scale)
    levels = tree.Levels(fit, find_clusters(fit), by_row=True)
    low, high = levels.variance_bounds()
    assert low <= values[0] * (1.0 + 1e-12) < 10.0 * low
    assert 0.1 * high < values[-1] <= high


@pytest.mark.parametrize(("levels", "is_weighted"), [(1, False), (1, True), (2, False)])
def test_no_matrix_of_the_size_of_a_cluster(levels: int, is_weighted: bool) -> None:
    """Two clusters of 10,000 rows: a matrix between the rows of one would take 800 MB."""
    rng = np.random.Generator(np.random.PCG64(0))
    n, m = 20_000, 2_000
    fine, coarse = np.arange(n) % m, np.arange(n) % 2
    X = np.column_stack([np.ones(n), rng.standard_normal(n)])
    y = X[:, 1] + rng.standard_normal(2)[coarse] + rng.standard_normal(n)
    groups: Any = coarse
    if levels == 2:
        y = y + rng.standard_normal(m)[fine]
        groups = {"coarse": coarse, "fine": fine}
    weights = rng.uniform(0.5, 2.0, n) if is_weighted else None
    fit = lmmax.fit_arrays(y, X, groups, weights=weights)
    tracemalloc.start()
    found = robust(fit)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.isfinite(found.bse).all()
    assert peak < 30e6


# --- closed forms ---------------------------------------------------------------------------


def test_balanced_one_way() -> None:
    """The mean of m group means: its variance by CR2 is the usual one, with m - 1 df."""
    data = load_data("dyestuff")
    fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", data)
    means = data.groupby("Batch")["Yield"].mean()
    squares, m = np.sum((means - means.mean()) ** 2), len(means)
    for type, variance in {
        "CR0": squares / m**2,
        "CR1": squares / (m * (m - 1)),
        "CR2": squares / (m * (m - 1)),
        "CR3": squares / (m - 1) ** 2,
    }.items():
        found = robust(fit, type=type)
        assert found.cov.iloc[0, 0] == pytest.approx(variance, rel=1e-11)
        assert found.df.iloc[0] == pytest.approx(m - 1, rel=1e-11)
    limits = stats.t.interval(0.9, m - 1, means.mean(), stats.sem(means))
    np.testing.assert_allclose(robust(fit).conf_int(0.1).iloc[0], limits, rtol=1e-10)


def test_singular_fit_is_least_squares() -> None:
    """With variances of zero the sandwich is that of ordinary least squares."""
    data = load_data("dyestuff2")
    fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", data)
    assert fit.singular
    means = data.groupby("Batch")["Yield"].mean()
    assert robust(fit).bse.iloc[0] == pytest.approx(stats.sem(means), rel=1e-11)


@pytest.mark.parametrize("shift", [0.0, 1e3, 1e5])
def test_hotelling(shift: float) -> None:
    """Balanced random slopes: coefficients are means of the subjects' own, and HTZ is Hotelling's.

    However far from zero the covariate of the random effects is: at 1e5 the variances of a
    subject's data, in units of the residual's, reach 1e9 before they cancel.
    """
    data = load_data("sleepstudy")
    data["Late"] = data["Days"] + shift
    fit = lmmax.fit("Reaction ~ Days + (1 + Late | Subject)", data)
    own = np.array(
        [np.polyfit(part["Days"], part["Reaction"], 1)[::-1] for _, part in data.groupby("Subject")]
    )
    m, cov = len(own), np.cov(own.T) / len(own)
    found = robust(fit)
    np.testing.assert_allclose(found.cov, cov, rtol=1e-9)
    np.testing.assert_allclose(found.df, m - 1, rtol=1e-9)
    test = found.wald_test("Days = 10, Intercept = 260")
    difference = own.mean(axis=0) - [260.0, 10.0]
    F = difference @ np.linalg.solve(cov, difference) * (m - 2) / (2 * (m - 1))
    assert test.df_denom == pytest.approx(m - 2, rel=1e-9)
    assert test.statistic == pytest.approx(F, rel=1e-8)
    assert test.pvalue == pytest.approx(stats.f(2, m - 2).sf(F), rel=1e-7)


@pytest.mark.parametrize("large", [tree.LARGE, 0])
def test_weighted_single_factor(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "LARGE", large)
    data = load_data("sleepstudy")
    fit = lmmax.fit("Reaction ~ Days + (1 + Days | Subject)", data, weights="w")
    X = np.column_stack([np.ones(180), data["Days"]])
    codes = np.unique(data["Subject"], return_inverse=True)[1]
    model = Model(data["Reaction"].to_numpy(), X, (Factor(codes, X),), data["w"].to_numpy())
    definition = Definition(model, covariances(fit), fit.scale, codes, "CR2")
    found = robust(fit)
    np.testing.assert_allclose(found.cov, definition.cov, rtol=1e-9)
    np.testing.assert_allclose(found.df, [definition.df(c) for c in np.eye(2)], rtol=1e-9)


# --- coefficients that cannot be had ----------------------------------------------------------


@pytest.mark.parametrize("large", [tree.LARGE, 0])
def test_aliased_and_alone(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a column is left out; an indicator of one cluster has no adjustment there."""
    monkeypatch.setattr(tree, "LARGE", large)
    problem = simulate("nested", 4)
    data = problem.data.assign(
        twice=2.0 * problem.data["x"], one=(problem.data["a"] == "a02").astype(float)
    )
    with pytest.warns(lmmax.RankWarning):
        fit = lmmax.fit("y ~ x + twice + one + (1 | a) + (1 | a:b)", data)
    X = np.column_stack([np.ones(len(data)), data["x"], data["one"]])
    model = replace(problem.model, X=X)
    labels = data["a"].to_numpy()
    for type in ("CR0", "CR2"):
        found = robust(fit, type=type)
        definition = Definition(model, covariances(fit), fit.scale, labels, type)
        kept = found.cov.drop(index="twice", columns="twice").to_numpy()
        unit = np.sqrt(np.diag(definition.cov))
        assert np.abs((kept - definition.cov) / np.outer(unit, unit)).max() < 1e-8
        df = found.df.drop("twice")
        np.testing.assert_allclose(df, [definition.df(c) for c in np.eye(3)], rtol=1e-7)
        assert found.cov.loc["twice"].isna().all() and found.cov["twice"].isna().all()
        assert found.coefficients().loc["twice"].isna().all()
        assert bool(found.notes) == (type == "CR2")
    assert "one cluster of a alone decides (a02)" in str(found)
    assert "(a02)" in robust(fit, type="CR3").notes[0]
    with pytest.raises(lmmax.HypothesisError, match="'twice' is aliased"):
        found.t_test("twice")


def test_fit_without_a_result() -> None:
    """No solution to build on: NaN with the reason."""
    fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", load_data("dyestuff"))
    lost = replace(
        fit.estimates,
        status=Status.NOT_FINITE,
        beta=np.full_like(fit.estimates.beta, np.nan),
        beta_unscaled=np.full_like(fit.estimates.beta_unscaled, np.nan),
    )
    fit = replace(fit, estimates=lost)
    assert fit.status == "not_finite"
    found = robust(fit)
    assert np.isnan(found.cov.to_numpy()).all() and found.pvalues.isna().all()
    assert "the criterion is not finite" in str(found)


# --- clusters -------------------------------------------------------------------------------


def test_clusters_by_name_labels_and_series() -> None:
    fit, _, _, labels = case("nested")
    by_default = robust(fit)
    shuffled = pd.Series(labels, index=fit.design.index, name="a").sample(frac=1, random_state=1)
    extra = pd.concat([shuffled, pd.Series(["a01"], index=[10**6])])
    for cluster in ("a", labels, labels.tolist(), shuffled, extra, pd.Categorical(labels)):
        found = robust(fit, cluster)
        np.testing.assert_allclose(found.cov, by_default.cov, rtol=1e-11)
    assert (by_default.cluster, by_default.n_clusters) == ("a", 9)
    assert robust(fit, labels).cluster == "cluster"
    assert set(find_clusters(fit, labels).labels) == set(labels)


def test_rows_that_were_dropped() -> None:
    """A Series of all rows of the data is matched to those used by its index."""
    data = load_data("sleepstudy").assign(team=lambda d: d["Subject"].str[1])
    missing = data.assign(Reaction=data["Reaction"].mask(np.arange(180) % 7 == 0))
    formula = "Reaction ~ Days + (1 | Subject)"
    by_drop = robust(lmmax.fit(formula, missing), missing["team"])
    without = missing.dropna().reset_index(drop=True)
    expected = robust(lmmax.fit(formula, without), without["team"].to_numpy())
    np.testing.assert_allclose(by_drop.cov, expected.cov, rtol=1e-11)
    assert by_drop.cluster == "team"


@functools.cache
def penicillin() -> lmmax.Fit:
    return lmmax.fit("diameter ~ 1 + (1 | plate) + (1 | sample)", load_data("penicillin"))


def test_crossed_factors_have_no_clusters() -> None:
    with pytest.raises(ClusterError, match=r"'plate' is not nested within 'sample'.*are crossed"):
        robust(penicillin())
    with pytest.raises(ClusterError, match=r"'sample' is not nested within 'plate'.*coarser"):
        robust(penicillin(), "plate")


def test_related_levels_have_no_clusters() -> None:
    problem = simulate("related_alone", 3)
    fit = lmmax.fit(problem.formula, problem.data, relmat=problem.relmat)
    with pytest.raises(ClusterError, match="'a' are related by a relationship matrix"):
        robust(fit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: "c", r"cluster='c' is no grouping factor of the model \(a, a:b\)"),
        (lambda labels: "a:b", "'a' is not nested within 'a:b'"),
        (lambda labels: labels[:-1], r"shape \(\d+,\); it needs one label for each of the"),
        (lambda labels: labels[:, None], "it needs one label for each"),
        (lambda labels: np.where(labels == "a03", None, labels), "no label for row"),
        (lambda labels: np.full(len(labels), "all"), "all rows are in one cluster of 'cluster'"),
        (lambda labels: pd.Series(labels, index=np.arange(len(labels)) + 7), "is a Series whose"),
    ],
)
def test_bad_clusters(change: Any, message: str) -> None:
    fit, _, _, labels = case("nested")
    with pytest.raises(ClusterError, match=message):
        robust(fit, change(labels))


def test_bad_requests() -> None:
    fit, _, _, labels = case("nested")
    with pytest.raises(ValueError, match="type='HC1' is unknown; use one of 'CR0'"):
        robust(fit, type="HC1")
    found = robust(fit)
    with pytest.raises(ValueError, match="test='F' is unknown; use one of 'HTZ'"):
        found.wald_test("x", test="F")
    with pytest.raises(ValueError, match=r"level=5 must lie between 0 and 1"):
        found.conf_int(5)
    with pytest.raises(lmmax.HypothesisError, match=r"linearly dependent \(rank 1\)"):
        found.wald_test("x = 0, 2*x = 0")
    halves = np.where(np.isin(labels, ["a01", "a02", "a03", "a04"]), "left", "right")
    with pytest.raises(lmmax.HypothesisError, match="2 clusters are too few"):
        robust(fit, halves).wald_test("x, z, Intercept")


# --- output ---------------------------------------------------------------------------------


def test_printed(dietox_intercept: lmmax.Fit) -> None:
    found: RobustCovariance = robust(dietox_intercept)
    assert str(found).splitlines() == [
        "Cluster-robust covariance CR2, 72 clusters of Pig",
        "              coef  std err       df        t    P>|t|   [0.025   0.975]",
        "Intercept    15.72   0.5497    71.00   28.603   <0.001    14.63    16.82",
        "Time         6.943  0.08018    70.84   86.587   <0.001    6.783    7.102",
    ]
    assert repr(found) == "<lmmax.RobustCovariance CR2, 72 clusters of Pig>"
    html = found._repr_html_()
    assert "<td>86.587</td>" in html and "72 clusters of Pig" in html
    assert "86.587" in str(found.t_test("Time"))
