# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # For statsmodels users
#
# `lmmax.statsmodels` has the mixed models of statsmodels under their names. Existing code changes
# one line,
#
# ```python
# from statsmodels.regression.mixed_linear_model import MixedLM, MixedLMParams, VCSpec  # before
# from lmmax.statsmodels import MixedLM, MixedLMParams, VCSpec  # after
# ```
#
# (`smf.mixedlm` becomes `lmmax.statsmodels.mixedlm`), and runs on as before: the same arguments,
# the same results under the same names, the same printed summary. This page does with both packages
# what the documentation of statsmodels does with `MixedLM`: growth curves, and nested and crossed
# variance components. Then it lists
# [every difference that is there on purpose](#Deliberate-differences), with the reason, and shows
# [what `.native` adds](#What-.native-adds). Nothing needs a network.
#
# A formula is code in both packages: its expressions run as Python. The formulas of
# `lmmax.statsmodels` are read by the engine of statsmodels, which has no other way; for those of
# others (a web form, a configuration file) `lmmax.fit` and `lmmax.fit_many` take `evaluate="safe"`.

# %%
import pickle
import time
import warnings

import numpy as np
import pandas as pd
import statsmodels.regression.mixed_linear_model as theirs
from statsmodels.base._penalties import L2

import lmmax
import lmmax.statsmodels as ours

warnings.filterwarnings("ignore", category=ours.model.estimation.OptimizerNote)

# %% [markdown]
# Below, each analysis is a function of the package, in place of the import line. `in_both` runs it
# with either, prints the two summaries beside each other, and notes the times: of lmmax those of a
# first and a second call, as the first one compiles what it needs for a kind of model, or reads it
# from its cache on disk if an earlier process has compiled it.

# %%
times: dict[str, dict[str, float]] = {}


def timed(title, column, call):
    """Make a call and note its milliseconds."""
    began = time.perf_counter()
    result = call()
    times.setdefault(title, {})[column] = 1e3 * (time.perf_counter() - began)
    return result


def in_both(title, analysis):
    """Fit with statsmodels and with lmmax; return their results."""
    results = [
        timed(title, "statsmodels", lambda: analysis(theirs)),
        timed(title, "lmmax, first call", lambda: analysis(ours)),
    ]
    timed(title, "lmmax, second call", lambda: analysis(ours))
    texts = [
        [heading, *str(result.summary()).splitlines()]
        for heading, result in zip(["statsmodels", "lmmax.statsmodels"], results, strict=True)
    ]
    width, height = max(map(len, texts[0])), max(map(len, texts))
    for text in texts:
        text.extend([""] * (height - len(text)))
    print("\n".join(f"{a:{width}}    {b}".rstrip() for a, b in zip(*texts, strict=True)))
    return results


def agree(before, after):
    """Assert that the results are those of one model, lmmax's not less likely."""
    assert after.converged
    assert after.llf >= before.llf - 1e-9 * abs(before.llf)
    assert type(after.params) is type(before.params)
    if isinstance(before.params, pd.Series):
        assert list(after.params.index) == list(before.params.index)
        assert list(after.cov_re.columns) == list(before.cov_re.columns)
    assert np.allclose(after.fe_params, before.fe_params, rtol=1e-3)
    assert np.allclose(after.params, before.params, rtol=5e-3, atol=1e-4)


# %% [markdown]
# ## Growth of pigs
#
# 72 pigs, weighed once a week for twelve weeks. A random intercept for each pig is what both
# packages take if no random effects are named.

# %%
pigs = lmmax.datasets.load("dietox")


def intercepts(package):
    model = package.MixedLM.from_formula("Weight ~ Time", pigs, groups=pigs["Pig"])
    return model.fit(method=["lbfgs"])


before, growth = in_both("pigs, intercepts", intercepts)
agree(before, growth)

# %% [markdown]
# The numbers are the same, down to the 2.149 beside the variance of the pigs. That is no standard
# error of 40.394, as the note says: in its units it is 6.939. The default output keeps the number
# that existing code and tables have; `summary(re_errors="natural")` prints the other, and
# `bse_re_natural` holds it. [dietox.py](dietox.py) shows where both come from.

# %%
assert growth.summary().tables[1].loc["Group Var"].tolist()[:2] == ["40.394", "2.149"]
assert growth.bse_re.round(3).to_dict() == {"Group Var": 2.149}
assert growth.bse_re_natural.round(3).to_dict() == {"Group Var": 6.939}
growth.summary(re_errors="natural").tables[1]

# %% [markdown]
# Let every pig have its own rate of growth as well:


# %%
def slopes(package):
    model = package.MixedLM.from_formula(
        "Weight ~ Time", pigs, groups=pigs["Pig"], re_formula="~Time"
    )
    return model.fit(method=["lbfgs"])


before, growing = in_both("pigs, intercepts and slopes", slopes)
agree(before, growing)

# %% [markdown]
# Here the third digit of a variance differs: 19.503 and 19.493. The second is right (lme4 has
# 19.4935): statsmodels stops when the gradient per observation is small, lmmax goes on to the
# optimum. (`method=["lbfgs"]` is there for statsmodels, whose default methods do not converge on
# this model. lmmax accepts whatever steers statsmodels' optimizers, and has no use for it.)

# %%
assert round(growing.cov_re.iloc[0, 0], 4) == 19.4935
print(f"log-likelihood gained: {growing.llf - before.llf:.1e}")

# %% [markdown]
# Intercepts and slopes are hardly correlated. `free` holds their covariance at its starting value,
# zero:


# %%
def uncorrelated(package):
    model = package.MixedLM.from_formula(
        "Weight ~ Time", pigs, groups=pigs["Pig"], re_formula="~Time"
    )
    free = package.MixedLMParams.from_components(np.ones(2), np.eye(2))
    return model.fit(free=free, method=["lbfgs"])


before, independent = in_both("pigs, uncorrelated", uncorrelated)
agree(before, independent)
print(f"\nlikelihood ratio statistic {2 * (growing.llf - independent.llf):.3f}, one parameter")

# %% [markdown]
# ## Arrays and profiles
#
# Matrices in place of formulas. The documentation uses sizes of trees, which it downloads; the
# growth of 27 children does as well. Column names of data frames are kept.

# %%
children = lmmax.datasets.load("orthodont")
exog = children.assign(Intercept=1.0)[["Intercept", "age"]]


def arrays(package):
    return package.MixedLM(
        children["distance"], exog, groups=children["Subject"], exog_re=exog["Intercept"]
    ).fit()


before, distance = in_both("children, arrays", arrays)
agree(before, distance)

# %% [markdown]
# `profile_re` refits the model with a variance held at values around its estimate. statsmodels
# holds the ratio to the residual variance, and reports it times the new residual variance; so its
# values are not those asked for, and its log-likelihoods are a little too low. In lmmax the
# variance itself is held, which is the profile likelihood.

# %%
request = dict(re_ix=0, vtype="re", num_low=2, dist_low=2.0, num_high=2, dist_high=2.0)
profiles = {"statsmodels": before.profile_re(**request), "lmmax": distance.profile_re(**request)}
columns = ["variance", "log-likelihood"]
profiles = {name: pd.DataFrame(found, columns=columns) for name, found in profiles.items()}
variance = distance.cov_re.iloc[0, 0]
assert np.allclose(profiles["lmmax"]["variance"], variance + np.linspace(-2.0, 2.0, 5))
pd.concat(profiles, axis=1).round(4)

# %%
# Holding the variance in a fit of its own gives the same.
lowest = profiles["lmmax"].iloc[0]
held = lmmax.fit("distance ~ age + (1 | Subject)", children, fix={"cov_re": [[lowest["variance"]]]})
assert np.isclose(held.llf, lowest["log-likelihood"], rtol=1e-9)

# %% [markdown]
# ## Variance components
#
# ### Nested
#
# Schools in districts: 50 districts, ten schools in each, five pupils from each school. Labels of
# schools are used again in every district; `vc_formula` is evaluated district by district, so that
# they are other schools. The standard deviations are 2, 3 and 4. (The notebook of statsmodels is of
# 40,000 rows. These are fewer so that it is quick with both.)

# %%
rng = np.random.default_rng(3123)
district = np.repeat(np.arange(50), 50)
school = np.tile(np.repeat(np.arange(10), 5), 50)
score = (
    2.0 * rng.normal(size=50)[district]
    + 3.0 * rng.normal(size=500)[10 * district + school]
    + 4.0 * rng.normal(size=len(district))
)
pupils = pd.DataFrame({"score": score, "district": district, "school": school})


def nested(package):
    return package.MixedLM.from_formula(
        "score ~ 1",
        groups="district",
        re_formula="1",
        vc_formula={"school": "0 + C(school)"},
        data=pupils,
    ).fit()


before, schools = in_both("schools in districts", nested)
agree(before, schools)

# %% [markdown]
# The same from matrices, one for each district, in a `VCSpec`:


# %%
def indicators(labels):
    """A column for each label, and their names."""
    levels = np.unique(labels)
    return np.equal.outer(labels, levels).astype(float), [str(level) for level in levels]


designs = [indicators(rows["school"].to_numpy()) for _, rows in pupils.groupby("district")]
ones = np.ones((len(pupils), 1))


def nested_arrays(package):
    mats, colnames = [design for design, _ in designs], [names for _, names in designs]
    components = package.VCSpec(["school"], [colnames], [mats])
    return package.MixedLM(
        pupils["score"], ones, exog_re=ones, groups=pupils["district"], exog_vc=components
    ).fit()


before, by_hand = in_both("schools, arrays", nested_arrays)
agree(before, by_hand)
assert np.isclose(by_hand.llf, schools.llf, rtol=1e-12)

# %% [markdown]
# ### Crossed
#
# 25 machines and 25 operators, each operator once at each machine. `MixedLM` has one grouping
# factor, so all rows are one group, and machines and operators are variance components of it.

# %%
rng = np.random.default_rng(3124)
machine, operator = np.divmod(np.arange(625), 25)
output = 2.0 * rng.normal(size=25)[machine] + 3.0 * rng.normal(size=25)[operator]
output += 4.0 * rng.normal(size=625)
shifts = pd.DataFrame({"output": output, "machine": machine, "operator": operator})


def crossed(package):
    return package.MixedLM.from_formula(
        "output ~ 1",
        groups=np.ones(len(shifts)),
        vc_formula={"machine": "0 + C(machine)", "operator": "0 + C(operator)"},
        data=shifts,
    ).fit()


before, shop = in_both("machines x operators", crossed)
agree(before, shop)


# %%
def crossed_arrays(package):
    factors = [indicators(machine), indicators(operator)]
    components = package.VCSpec(
        ["machine", "operator"],
        [[names] for _, names in factors],
        [[design] for design, _ in factors],
    )
    ones = np.ones(len(shifts))
    return package.MixedLM(shifts["output"], ones, groups=ones, exog_vc=components).fit()


before, by_hand = in_both("machines x operators, arrays", crossed_arrays)
agree(before, by_hand)
assert np.isclose(by_hand.llf, shop.llf, rtol=1e-10)

# %% [markdown]
# ## Times
#
# Milliseconds for model and fit, on the machine that ran this page. The designs are small, and the
# first fit of a kind compiles for a second or more: whoever fits one small model gains nothing by
# changing. Whoever fits many, or large ones, does: the last column grows with the data
# (`tests/benchmarks/bench_statsmodels.py` has 20,000 groups, and whole processes from their start).

# %%
table = pd.DataFrame(times).T
table["times as fast"] = table["statsmodels"] / table["lmmax, second call"]
table.round(1)

# %% [markdown]
# ## Deliberate differences
#
# Everything here is on purpose. Where nothing is said, results are meant to be the same, and it is
# a bug if they are not. "There" is statsmodels 0.15.
#
# ### Estimates
#
# * **The optimum.** There, a search stops where the gradient per observation is below 1e-5. Here it
#   is found to rounding. The likelihood is never lower, and digits that differ are better here.
# * **A variance of zero** is a value like others. There, the likelihood below 1e-10 is that of an
#   infinite variance, because the inverse of the covariance is replaced by zero, and at zero it is
#   infinite: fits fail, or end near zero. `random_effects` of such a fit are zeros here, which is
#   what they are; there they are small numbers, or an error.
# * **The warning at the boundary** comes here if the covariance is singular
#   (`SingularMatrixWarning`). There it comes if a variance is below 0.01, in whatever units: a
#   variance in kg² is a millionth of one in g².
# * **Penalties on coefficients**, `fit(fe_pen=)` and `fit_regularized` with a penalty object,
#   maximise the penalised likelihood over all parameters. There the coefficients are not penalised,
#   and only the variances react.
# * **`fit_regularized("l1")`** minimises $r'V^{-1}r + \sum_j \alpha_j |b_j|$, with $V$ that of the
#   fit without penalty, as there; but to the minimum, and `llf` and standard errors are those of
#   the parameters that it returns. There covariances are read as their roots on the way, and data
#   frames end in a `KeyError`.
# * **`free` on coefficients** holds them at their starting values. There it sets their standard
#   errors to zero and estimates them all the same.
# * **`use_sqrt=False`** says how parameters are packed, and no more. There it also lets covariances
#   be indefinite.
#
# ### Standard errors and tests
#
# * **Variances.** `bse_re` and the summary have the numbers of statsmodels, so that output stays
#   the same, and a note. They are √scale times the standard error of the ratio to the scale, in
#   the units of nothing. `bse_re_natural` and `summary(re_errors="natural")` have those of the
#   variances.
# * **Coefficients.** Here generalised least squares, as in lme4, nlme and SAS. There the joint
#   Hessian with the variances is inverted; what couples them is zero in expectation, and in small
#   unbalanced data noise that moves standard errors by a per cent or two.
#   `fit(fe_cov="hessian")` gives those.
# * **`cov_params()`** is therefore zero between coefficients and variances. It is NaN for variances
#   on the boundary, where no normal approximation holds.
# * **`hessian`** is the second derivative at any coefficients. There only at the best ones.
# * **`profile_re`** holds the variance. There it holds the ratio to the scale, see above.
# * **`bootstrap`** is parametric: responses are drawn from the fitted model. There it fails, and
#   would draw rows, which tears groups apart.
# * **Contrasts** may be words, `t_test("Time = 7")`, or vectors, and `t_test_pairwise` works.
#   `wald_test` and `f_test` take a column for each coefficient or for each parameter.
# * **Results are final.** There, fitting a model again changes what earlier results of it say.
#
# ### Data
#
# * **`subset`** selects rows. There it is ignored.
# * **`missing="drop"`** works with arrays, too, and with quoted names, `Q("a b")`; `exog_vc` loses
#   the same rows.
# * **Columns that are linear combinations** of those before them have the coefficient NaN, with a
#   warning. There, `LinAlgError`.
# * **As many groups as rows** are an error with a random intercept: it cannot be told from the
#   residual. There it is a fit whose variances mean nothing.
# * **Labels of several types** in one grouping factor are sorted by type. There they are an error.
# * **Index labels may repeat** with `vc_formula`. There rows are looked up by them, and the fit
#   fails.
# * **Formulas** are read as there, by the engine that statsmodels is set to (patsy), so columns,
#   names and the variables of the caller are the same. It is `lmmax.fit` that has formulas in
#   lme4's notation, read by formulaic.
#
# ### The interface
#
# * **The optimizer.** `method`, `niter_sa` and options such as `gtol` or `maxiter` are taken, and a
#   note says once that they have no effect. `"newton"` and `"ncg"` are refused, and unknown
#   arguments are reported, as there. `start_params` is a hint, and the value of what `free` holds.
# * **`remove_data()`** works at any time and leaves the model alone. The result keeps estimates,
#   tests, the summary, and of the data the columns that the formula names. There it fails before
#   anything was looked at, and takes the data away from the model too.
# * **What fails there and works here:** `bse_re` with variance components, `cov_params(r_matrix=)`,
#   `resid` and the like with `use_sparse=True`, `loglike` and `score` before `fit`,
#   `fit(do_cg=False)`, `rvs` with variance components only. `hessv` is a matrix, not a tuple.
#   `mle_retvals` tells how the solve went.
# * **What is not there:** `score_obsv`, `bsejac` and their kin. A row of a mixed model has no score
#   of its own, and statsmodels fails as well. `lmmax.scores(result.native)` has those of groups.
#
# Some of this in numbers. First `llf` of a REML fit, after the model was fitted again by maximum
# likelihood:

# %%
table = {}
for name, package in {"statsmodels": theirs, "lmmax": ours}.items():
    model = package.MixedLM.from_formula("Weight ~ Time", pigs, groups="Pig")
    reml, ml = model.fit(), model.fit(reml=False)
    table[name] = {"REML fit": reml.llf, "ML fit": ml.llf}
assert round(table["lmmax"]["REML fit"], 4) == -2404.7753
pd.DataFrame(table).T.round(4)

# %% [markdown]
# The likelihood near a variance of zero. In the data `dyestuff2` it is the best value; the argument
# is the variance over the scale.

# %%
batches = lmmax.datasets.load("dyestuff2")
table = {}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name, package in {"statsmodels": theirs, "lmmax": ours}.items():
        model = package.MixedLM.from_formula("Yield ~ 1", batches, groups="Batch")
        singular = model.fit()
        for ratio in (1e-3, 1.1e-10, 0.9e-10, 0.0):
            point = package.MixedLMParams.from_components(np.zeros(1), np.array([[ratio]]))
            table.setdefault(f"{ratio:g}", {})[name] = model.loglike(point)
        table.setdefault("fitted", {})[name] = singular.llf
assert singular.converged
assert singular.cov_re.iloc[0, 0] == 0.0
assert all((effects == 0.0).all() for effects in singular.random_effects.values())
pd.DataFrame(table).T.round(4)

# %% [markdown]
# A ridge penalty on the slope, `fit(fe_pen=)`, of growing weight:

# %%
table = {}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name, package in {"statsmodels": theirs, "lmmax": ours}.items():
        for alpha in (0.0, 10.0, 100.0):
            model = package.MixedLM.from_formula("Weight ~ Time", pigs, groups="Pig")
            ridge = model.fit_regularized(method=L2(weights=np.array([0.0, 1.0])), alpha=alpha)
            table.setdefault(alpha, {})[name] = ridge.fe_params["Time"]
table = pd.DataFrame(table).T
assert table["lmmax"].is_monotonic_decreasing
table.round(3)

# %% [markdown]
# Second derivatives at coefficients that are not the best ones, and differences of the gradient:

# %%
table = {}
for name, package in {"statsmodels": theirs, "lmmax": ours}.items():
    model = package.MixedLM.from_formula("Weight ~ Time", pigs, groups="Pig")
    model.fit()

    def gradient(x, model=model, package=package):
        point = package.MixedLMParams.from_packed(x, 2, 1, use_sqrt=False, has_fe=True)
        return np.concatenate(model.score_full(point, calc_fe=True))

    x = np.array([15.0, 7.0, 3.0])
    point = package.MixedLMParams.from_packed(x, 2, 1, use_sqrt=False, has_fe=True)
    steps = 1e-5 * np.eye(3)
    differences = np.array([gradient(x + h) - gradient(x - h) for h in steps]) / 2e-5
    found = model.hessian(point)[0]
    table[name] = {
        "d2 / dTime2": found[1, 1],
        "by differences": differences[1, 1],
        "largest error / largest entry": np.abs(found - differences).max() / np.abs(found).max(),
    }
assert table["lmmax"]["largest error / largest entry"] < 1e-7
pd.DataFrame(table).T

# %% [markdown]
# What failed or was ignored, and works now:

# %%
young = ours.mixedlm("Weight ~ Time", pigs, groups="Pig", subset=pigs["Time"] < 6).fit()
held = ours.MixedLMParams.from_components(np.array([1.0, 0.0]), np.eye(1))  # 0: not estimated
at = ours.MixedLMParams.from_components(np.array([0.0, 7.0]), np.eye(1))
seven = ours.mixedlm("Weight ~ Time", pigs, groups="Pig").fit(free=held, start_params=at)
gaps = pigs["Weight"].where(pigs["Time"] != 3)
columns = pigs.assign(Intercept=1.0)[["Intercept", "Time"]]
dropped = ours.MixedLM(gaps, columns, groups=pigs["Pig"], missing="drop").fit()
assert young.nobs == (pigs["Time"] < 6).sum()
assert seven.fe_params["Time"] == 7.0
assert dropped.nobs == gaps.notna().sum()
print(growing.t_test("Time = 7"))

# %% [markdown]
# A result without its data is smaller, and leaves the model as it was:

# %%
model = ours.mixedlm("Weight ~ Time", pigs, groups="Pig")
light, full = model.fit(), model.fit()
light.remove_data()
sizes = {"with data": len(pickle.dumps(full)), "without": len(pickle.dumps(light))}
assert sizes["without"] < sizes["with data"] / 5
assert str(light.summary()) == str(full.summary())
assert model.fit().llf == full.llf
sizes

# %% [markdown]
# ## What `.native` adds
#
# `result.native` is the fit as lmmax itself has it, `lmmax.Fit`, at no further cost. Its summary
# has t tests with honest degrees of freedom, and standard errors of variances in their units:

# %%
fit = growing.native
print(fit)

# %% [markdown]
# Predictions for new rows: with the random effects of a pig that is known, for the population, and
# with a standard error. (`predict` of `MixedLMResults` has the fixed part only, as in statsmodels.)

# %%
weeks = pd.DataFrame({"Time": [6, 13], "Pig": ["4601", "4601"]})
known, average = fit.predict(weeks), fit.predict(weeks, random_effects=False)
assert np.allclose(average, growing.predict(weeks))
print(pd.DataFrame({"pig 4601": known, "population": average}).round(2))
print(fit.predict_mean(weeks, ddf="kenward-roger").round(2))

# %% [markdown]
# Degrees of freedom matter with few groups. The growth of the children differs between girls and
# boys; how sure is that? (The design is balanced, and Satterthwaite's test is Kenward and Roger's.)

# %%
sexes = ours.mixedlm("distance ~ Sex * age", children, groups="Subject", re_formula="~age").fit()
differ = "Sex[T.Male]:age"
honest = sexes.native.coefficients(ddf="kenward-roger").loc[differ]
assert np.isclose(sexes.native.df[differ], honest["df"])
print(f"normal, as in statsmodels  p = {sexes.pvalues[differ]:.3f}")
print(f"Kenward-Roger, {honest['df']:.0f} df       p = {honest['p']:.3f}")

# %%
print(lmmax.anova(sexes.native, ddf="kenward-roger"))

# %% [markdown]
# Does the slope vary between children? The likelihood-ratio test, with the mixture of chi-squared
# distributions that holds for a variance at zero:

# %%
print(lmmax.ranova(sexes.native, mixture=True))

# %% [markdown]
# Profile limits of every parameter, variances too, on the scale of standard deviations:

# %%
limits = lmmax.confint(distance.native, method="profile")
assert (limits["lower"] < limits["upper"]).all()
limits.round(3)

# %% [markdown]
# Standard errors that hold whatever the covariance within a child is:

# %%
print(lmmax.robust(sexes.native).coefficients().iloc[:, :4].round(3))

# %% [markdown]
# Crossed factors need no group of all rows. The names of the factors stand in the formula, and
# predictions know them:

# %%
direct = lmmax.fit("output ~ 1 + (1 | machine) + (1 | operator)", shifts)
assert np.isclose(direct.llf, shop.llf, rtol=1e-9)
print(direct.varcorr()[["group", "vcov", "vcov_se"]].round(3))
direct.predict({"machine": [3, 3], "operator": [0, 24]}).round(2).to_list()

# %% [markdown]
# | `MixedLM` | `lmmax.fit` |
# |---|---|
# | `"y ~ x", groups="g"` | `"y ~ x + (1 \| g)"` |
# | `re_formula="~x"` | `"y ~ x + (x \| g)"` |
# | `re_formula="~x"`, covariance held at zero by `free` | `"y ~ x + (x \|\| g)"` |
# | `re_formula="1", vc_formula={"h": "0 + C(h)"}` | `"y ~ x + (1 \| g/h)"` |
# | `groups=ones, vc_formula={"a": "0 + C(a)", "b": "0 + C(b)"}` | `"y ~ x + (1 \| a) + (1 \| b)"` |
#
# Beyond these there are other covariance structures, known relationships, prior weights, parametric
# bootstrap, and the likelihood as a differentiable function: see the README.
