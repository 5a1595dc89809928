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
# # Which p-value to believe
#
# A coefficient over its standard error has no t distribution in a mixed model: the standard error
# rests on estimated variances, and how well they are known depends on the design. A package has
# to say what distribution it takes, and the choices differ most where it matters, with few groups.
#
# * `"normal"` takes the variances as known. With few groups its p-values are too small.
# * `"residual"` counts rows, and is far off for effects that vary between groups.
# * `"between-within"` counts groups or rows, by where a column varies (nlme, SAS). Random slopes
#   and unbalanced data are beyond it, and crossed factors have no such count.
# * `"satterthwaite"`, the default, asks how uncertain the estimated variance of this contrast is
#   (lmerTest, SAS). It leaves the standard error as it is, which is a little too small.
# * `"kenward-roger"` corrects the standard error too, for REML (pbkrtest, SAS). With variances near
#   zero it can overdo it.
#
# Two designs, and then a simulation in which the truth is known.

# %%
import numpy as np
import pandas as pd

import lmmax

# %% [markdown]
# ## Cake: a split plot
#
# Three recipes, 15 batches of batter from each, one cake from every batch at each of six baking
# temperatures. Recipes are compared between batches, temperatures within them.

# %%
cake = lmmax.datasets.load("cake")
fit = lmmax.fit("angle ~ recipe * temp + (1 | recipe:replicate)", cake)
print(lmmax.anova(fit))

# %% [markdown]
# Each row asks its own question, so each has its own denominator: lmerTest prints the same degrees
# of freedom. (Those of recipe are large because, next to its interaction, it is tested at `temp` =
# 0, far outside the data. Nobody asked that; centre the temperature.) Type I takes the terms in
# order and has the textbook's 42 for recipes: 45 batches less three means.

# %%
degrees = lmmax.anova(fit).table["df_den"]
assert np.allclose(degrees, [254.0157612, 222.0, 222.0], rtol=1e-6)
centred = cake.assign(temp=cake["temp"] - cake["temp"].mean())
within = lmmax.anova(lmmax.fit("angle ~ recipe * temp + (1 | recipe:replicate)", centred))
print(within)
assert np.allclose(within.table["df_den"], [42.0, 222.0, 222.0], rtol=1e-6)

# %% [markdown]
# In a balanced split plot all methods that know the grouping agree, and the two that do not are
# wrong about the recipes only: they count 264 cakes where 45 batches were made.

# %%
plots = lmmax.fit("angle ~ recipe + temp + (1 | recipe:replicate)", centred)
methods = ["normal", "residual", "between-within", "satterthwaite", "kenward-roger"]


def compare(fit: lmmax.Fit, hypothesis: str) -> pd.DataFrame:
    rows = {}
    for ddf in methods:
        test = fit.f_test(hypothesis, ddf=ddf)
        df = np.inf if test.df_denom is None else test.df_denom
        F = test.statistic / (test.df_num if test.df_denom is None else 1)
        rows[ddf] = {"F": F, "df_denom": df, "p": test.pvalue}
    return pd.DataFrame(rows).T


recipes = compare(plots, "recipe[T.B] = 0, recipe[T.C] = 0")
print(recipes.round(4))
assert np.allclose(recipes.loc["between-within":, "df_denom"], 42.0, rtol=1e-6)

# %% [markdown]
# ## Sleepstudy: random slopes
#
# Eighteen people over ten days. Between-within counts 161 degrees of freedom for `Days`, since it
# varies within people. But its slope is estimated from 18 slopes, and cannot be known better than
# their mean: 17 degrees of freedom. Satterthwaite and Kenward-Roger see that.

# %%
sleep = lmmax.datasets.load("sleepstudy")
days = lmmax.fit("Reaction ~ Days + (1 + Days | Subject)", sleep)
print(compare(days, "Days = 9").round(4))
assert np.allclose(days.df, 17.0, rtol=1e-4)
assert days.coefficients("between-within")["df"].tolist() == [161.0, 161.0]

# %% [markdown]
# Drop some observations and the counts become fractions. The rows that are left do not say how many
# degrees of freedom there are; the variances do.

# %%
rng = np.random.default_rng(1)
ragged = sleep[rng.random(len(sleep)) < 0.35]
few = lmmax.fit("Reaction ~ Days + (1 + Days | Subject)", ragged)
print(compare(few, "Days = 9").round(4))

# %% [markdown]
# ## A small sample, and the truth known
#
# Eight groups, four of them treated, with two to six rows each. Neither the treatment nor the
# covariate does anything, so that a test at level 5% should reject in 5% of the samples,
# give or take: a thousand samples give that rate a standard error of 0.7%.
#
# Beside the five methods stands the likelihood-ratio test, which compares two fits by maximum
# likelihood with a chi-squared distribution.

# %%
SAMPLES = 1000
sizes = np.array([2, 6, 3, 5, 4, 2, 6, 4])
group = np.repeat(np.arange(8), sizes)
design = pd.DataFrame({"group": group, "treated": (group % 2).astype(float)})
design["x"] = np.random.default_rng(0).normal(size=len(group))
design["y"] = np.random.default_rng(1).normal(size=len(group))
formula = "y ~ treated + x + (1 | group)"
start = lmmax.fit(formula, design)
full = start.refit_ml()
without = {
    "treated": lmmax.fit("y ~ x + (1 | group)", design, reml=False),
    "x": lmmax.fit("y ~ treated + (1 | group)", design, reml=False),
}

rng = np.random.default_rng(2)
rejections = {name: pd.Series(0.0, index=[*methods, "likelihood ratio"]) for name in without}
L = np.eye(3)
for _ in range(SAMPLES):
    y = rng.normal(size=8)[group] + rng.normal(size=len(group))
    sample = start.refit(y)
    beta = sample.params.to_numpy()
    for ddf in methods:
        test = sample.denominator(ddf)
        for j, name in enumerate(["treated", "x"], start=1):
            found = test.joint(L[j : j + 1], beta[j : j + 1])
            rejections[name][ddf] += found.pvalue < 0.05
    deviance = full.refit(y).deviance
    for name, smaller in without.items():
        ratio = smaller.refit(y).deviance - deviance
        rejections[name]["likelihood ratio"] += ratio > 3.841458820694124

rates = 100 * pd.DataFrame(rejections) / SAMPLES
error = 100 * np.sqrt(0.05 * 0.95 / SAMPLES)
print(rates.round(1))
print(f"Monte Carlo error of a rate of 5%: {error:.1f}")

# %% [markdown]
# For the treatment, which varies between groups, the large-sample tests reject about twice too
# often. All that know the grouping hold the level; Kenward-Roger is on the safe side.
#
# The covariate varies within groups and between them, and there the standard error is the problem:
# it takes the estimated variances as true, and weights both sources of information as if it knew
# how. No degrees of freedom can mend that. Kenward-Roger's larger standard error goes about half
# of the way.

# %%
treated, covariate = rates["treated"], rates["x"]
for method in ("normal", "residual", "likelihood ratio"):
    assert treated[method] > 5 + 4 * error
for method in ("between-within", "satterthwaite", "kenward-roger"):
    assert abs(treated[method] - 5) < 3 * error
assert covariate["kenward-roger"] < covariate["satterthwaite"] < covariate["normal"]
assert abs(covariate["kenward-roger"] - 5) < 3 * error

# %% [markdown]
# ## What to do
#
# * Leave the default. `summary()`, `anova`, `t_test` and `conf_int` use Satterthwaite's degrees of
#   freedom.
# * With a handful of groups, fit by REML and ask for `ddf="kenward-roger"`; it costs nothing here.
# * With thousands of groups, everything agrees with `"normal"`.
# * If the model of the variances may be wrong, use `lmmax.robust(fit)`: standard errors from the
#   clusters themselves, with degrees of freedom that know how few clusters there are.
# * For variances look at profile limits, `lmmax.confint(fit, method="profile")`: their sampling
#   distribution is skewed, and ends at zero.
