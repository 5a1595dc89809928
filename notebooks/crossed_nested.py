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
# # Crossed and nested grouping factors
#
# An observation may belong to several groups at once: a measurement to a plate and to a sample, a
# rating to a student and to a lecturer. Each grouping factor then has random effects of its own,
#
# $$y = X\beta + \sum_f Z_f b_f + e, \qquad b_f \sim N(0, I \otimes \Psi_f), \quad
# e \sim N(0, \sigma^2 I).$$
#
# Two factors are *crossed* where levels of the one meet several levels of the other, and one is
# *nested* in the other where each of its levels lies in a single level of the other. This page
# goes through three designs: Penicillin (crossed), Pastes (nested) and InstEval (both, with 4,114
# levels). They are standard examples of lme4; its published numbers are asserted below.

# %%
import numpy as np
import pandas as pd
from scipy import stats

import lmmax

penicillin = lmmax.datasets.load("penicillin")
pastes = lmmax.datasets.load("pastes")
insteval = lmmax.datasets.load("insteval")

# %% [markdown]
# ## Which is it? Ask the data
#
# Count the pairs of levels that occur. If a factor is nested, it has as many levels as there are
# pairs; if two factors are fully crossed, all pairs occur.


# %%
def relation(data: pd.DataFrame, a: str, b: str) -> dict[str, object]:
    n_a, n_b = data[a].nunique(), data[b].nunique()
    pairs = len(data[[a, b]].drop_duplicates())
    if pairs == n_a:
        words = f"{a} nested in {b}"
    elif pairs == n_b:
        words = f"{b} nested in {a}"
    else:
        words = "fully crossed" if pairs == n_a * n_b else "partly crossed"
    return {"a": a, "b": b, "levels a": n_a, "levels b": n_b, "pairs": pairs, "relation": words}


relations = pd.DataFrame(
    [
        relation(penicillin, "plate", "sample"),
        relation(pastes, "cask", "batch"),
        relation(pastes, "sample", "batch"),
        relation(insteval, "s", "d"),
        relation(insteval, "s", "dept"),
        relation(insteval, "d", "dept"),
    ],
    index=["penicillin", "pastes", "pastes", "insteval", "insteval", "insteval"],
)
assert relations["relation"].tolist() == [
    "fully crossed",
    "fully crossed",
    "sample nested in batch",
    "partly crossed",
    "partly crossed",
    "d nested in dept",
]
relations

# %% [markdown]
# The data cannot tell all. By their labels, casks and batches of the pastes look crossed: there are
# casks a, b and c in every batch. But cask a of batch A is not cask a of batch B. Whether a label
# means the same thing in two groups is known only to whoever collected the data. `sample` holds
# labels that are unique, batch and cask together, and shows the nesting.
#
# ## Crossed: Penicillin
#
# Six samples of penicillin were each tried on 24 plates, and the diameter of the zone in which
# bacteria did not grow was measured. Plates differ, and so do samples.

# %%
plates = lmmax.fit("diameter ~ 1 + (1 | plate) + (1 | sample)", penicillin)
print(plates)
print(plates.engine)

# %%
assert plates.converged
assert not plates.singular
assert plates.n_groups == {"plate": 24, "sample": 6}
assert round(plates.deviance, 4) == 330.8606
assert np.allclose(plates.theta, [1.53967757, 3.51241522], rtol=1e-6)
assert round(plates.params["Intercept"], 4) == 22.9722

# %% [markdown]
# `engine` names the form of the likelihood and the reason for it: the effects of the factor with
# the most of them are eliminated plate by plate, and those of all other factors, here six, go
# through one dense matrix.
#
# In a balanced design such as this the estimates are those of a two-way analysis of variance,
# which is a check by hand:

# %%
table = penicillin.pivot(index="plate", columns="sample", values="diameter").to_numpy()
n_plates, n_samples = table.shape
by_plate, by_sample = table.mean(axis=1, keepdims=True), table.mean(axis=0, keepdims=True)
rest = table - by_plate - by_sample + table.mean()
ms_rest = (rest**2).sum() / ((n_plates - 1) * (n_samples - 1))
by_hand = {
    "plate": by_plate.var(ddof=1) - ms_rest / n_samples,
    "sample": by_sample.var(ddof=1) - ms_rest / n_plates,
    "Residual": ms_rest,
}
variances = plates.varcorr().set_index("group")["vcov"]
assert np.allclose(variances, pd.Series(by_hand)[variances.index], rtol=1e-6)


# %% [markdown]
# ### Shares of the variance
#
# The variances add up to that of a single measurement. The share of a factor is the correlation of
# two measurements that have only this factor in common (intra-class correlation).


# %%
def shares(fit: lmmax.Fit) -> pd.DataFrame:
    table = fit.varcorr().set_index("group")[["vcov", "vcov_se", "sdcor"]]
    table["share"] = table["vcov"] / table["vcov"].sum()
    return table.round(4)


shares(plates)

# %% [markdown]
# Look at the standard errors before reading much into the shares: six samples say little about the
# variance of samples.
#
# ### Conditional modes
#
# With several factors `random_effects` and `random_effects_cov` are dicts by factor: the modes (the
# predicted effects) and their covariance given the data, the coefficients taken as known.


# %%
def modes(fit: lmmax.Fit, factor: str) -> pd.DataFrame:
    mode = fit.random_effects[factor]["Intercept"]
    sd = np.sqrt(fit.random_effects_cov[factor][:, 0, 0])
    table = pd.DataFrame({"mode": mode, "sd": sd})
    table["lower"], table["upper"] = mode - 1.96 * sd, mode + 1.96 * sd
    return table.sort_values("mode")


modes(plates, "sample").round(3)

# %% [markdown]
# If matplotlib is there (it comes with the extra `plot`), both factors as a picture; otherwise the
# table of the plates.

# %%
try:
    import matplotlib.pyplot as plt
except ImportError:
    picture = modes(plates, "plate").round(3)
else:
    picture, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, factor in zip(axes, plates.group_names, strict=True):
        found = modes(plates, factor)
        axis.errorbar(found["mode"], found.index, xerr=1.96 * found["sd"], fmt="o", markersize=3)
        axis.axvline(0.0, color="grey", linewidth=0.8)
        axis.set(xlabel="mode, mm", ylabel=factor)
    plt.close(picture)
picture

# %% [markdown]
# ### New levels
#
# A level that was not in the data has an effect of zero, if it is asked for by
# `new_levels="population"`; otherwise it is an error, as it may be a slip. This holds for each
# factor on its own: the new plate below still has the effect of its sample.

# %%
new = pd.DataFrame({"plate": ["a", "new", "new"], "sample": ["A", "A", "new"]})
predicted = plates.predict(new, new_levels="population")
effects = plates.random_effects
mean = plates.params["Intercept"]
assert np.isclose(predicted[1], mean + effects["sample"].loc["A", "Intercept"])
assert np.isclose(predicted[2], mean)
new.assign(predicted=predicted.round(3))

# %%
try:
    plates.predict(new)
except lmmax.DataError as error:
    print(error)

# %% [markdown]
# Or leave a factor out on purpose, by naming those that count; the columns of the others need not
# be there.

# %%
plates.predict({"sample": ["A", "F"]}, random_effects=["sample"])

# %% [markdown]
# ## Nested: Pastes
#
# Ten batches of a chemical paste were delivered in casks; three casks of each batch were sampled
# and each sample was assayed twice. `(1 | batch/cask)` stands for
# `(1 | batch) + (1 | batch:cask)`: an effect of the batch, and one of the cask within it.

# %%
nested = lmmax.fit("strength ~ 1 + (1 | batch/cask)", pastes)
print(nested)
print(nested.engine)
assert round(nested.deviance, 4) == 246.9907
assert nested.n_groups == {"batch": 10, "batch:cask": 30}

# %% [markdown]
# This is *explicit* nesting: the formula says what a cask is. With labels that are unique, it is
# *implicit*, and the terms need not say anything. The fit is the same:

# %%
implicit = lmmax.fit("strength ~ 1 + (1 | batch) + (1 | sample)", pastes)
assert np.isclose(implicit.deviance, nested.deviance, rtol=1e-10)
assert np.allclose(implicit.varcorr()["vcov"], nested.varcorr()["vcov"], rtol=1e-6)
assert np.allclose(
    implicit.random_effects["sample"], nested.random_effects["batch:cask"], rtol=1e-6
)
print(implicit.engine)

# %% [markdown]
# ### What `cask` alone does
#
# `(1 | cask)` makes three groups of all casks that carry the same letter, and `(1 | batch) +
# (1 | cask)` crosses three such groups with the batches. Both are fits without an error or a
# warning, and both answer a question that nobody asked. The effects of the true casks have nowhere
# to go but to the residual:

# %%
letters = lmmax.fit("strength ~ 1 + (1 | cask)", pastes)
crossed = lmmax.fit("strength ~ 1 + (1 | batch) + (1 | cask)", pastes)
comparison = pd.DataFrame(
    {
        fit.formula: {
            "REML criterion": fit.deviance,
            "scale": fit.scale,
            "std err of the mean": fit.bse["Intercept"],
            "engine": fit.engine.name,
            "singular": fit.singular,
        }
        for fit in (letters, crossed, nested)
    }
).T
assert letters.deviance > crossed.deviance + 8 > nested.deviance + 60
assert crossed.scale > 10 * nested.scale
comparison

# %% [markdown]
# Signs of the mistake: fewer groups in the summary than there are casks (3 instead of 30), the
# engine `crossed` for a design that is nested, and a residual variance of 7.3 where two assays of
# one sample differ with a variance of 0.68:

# %%
within = pastes.groupby("sample", observed=True)["strength"].var().mean()
assert np.isclose(within, nested.scale, rtol=1e-6)
shares(nested)

# %% [markdown]
# ### Is there a difference between batches?
#
# Most of the variance lies between casks, and the variance of batches has a standard error larger
# than itself. Compare with the model without it, by maximum likelihood (under REML it would do as
# well, since the fixed effects are equal).

# %%
ml = nested.refit_ml()
without = lmmax.fit("strength ~ 1 + (1 | batch:cask)", pastes, reml=False)
statistic = without.deviance - ml.deviance
p = stats.chi2.sf(statistic, df=1)
print(f"difference of deviances {statistic:.4f}, p {p:.3f}, halved {p / 2:.3f}")
assert round(ml.deviance, 4) == 247.9945
assert round(without.deviance, 4) == 248.4017
assert round(p, 4) == 0.5234  # as lme4's anova

# %% [markdown]
# The chi-squared distribution is not quite the right one: under the hypothesis the variance lies on
# the boundary of its range, half of all samples would give the statistic zero, and p is too large.
# For one variance, independent of the rest, half of it is about right. Here neither finds a
# difference, which with ten batches is not to say that there is none.
#
# ### Singular fits
#
# Suppose that the letter of a cask meant something after all, such as its place in the truck. Then
# it is a third factor, crossed with the batches, beside the casks within batches:

# %%
places = lmmax.fit("strength ~ 1 + (1 | batch/cask) + (1 | cask)", pastes)
print(places.message)
assert places.converged
assert places.singular
assert places.convergence.boundary == ("(1 | cask)",)
assert np.isclose(places.deviance, nested.deviance, rtol=1e-8)
shares(places)

# %% [markdown]
# The best variance of the letters is zero: a result, not a failure. The other estimates are those
# of the model without the term. A singular fit is worth a second look where the term is there for
# a reason; many of them are models with more terms than the data can bear.
#
# ## Both, and large: InstEval
#
# Students of ETH Zurich rated the lectures that they had heard, from 1 to 5: 73,421 ratings by
# 2,972 students of 1,128 lecturers. A student rates several lecturers and a lecturer is rated by
# many students; lecturers lie in 14 departments. `service` marks lectures held for another
# department.

# %%
formula = "y ~ 1 + service + (1 | s) + (1 | d) + (1 | dept)"
ratings = lmmax.fit(formula, insteval, reml=False)
print(ratings)
print(ratings.engine)
assert ratings.converged
assert round(ratings.deviance, 4) == 237721.7688

# %% [markdown]
# Lecturers lie in departments, but students cross both, so this is one `crossed` model: students
# are eliminated one by one, and the 1,142 effects of lecturers and departments go through a dense
# matrix of that order.

# %%
shares(ratings)

# %% [markdown]
# Most of the variance is in the single rating; lecturers differ more than students do, and
# departments hardly. The effects of lecturers range over more than two points of the scale of five,
# and the intervals tell how well each is known:

# %%
lecturers = modes(ratings, "d")
lecturers["ratings"] = insteval["d"].value_counts()
pd.concat([lecturers.head(3), lecturers.tail(3)]).round(3)

# %% [markdown]
# ## The iterative engine, beside the exact one
#
# The dense matrix grows with the square of the number of effects beside the largest factor. Beyond
# 20,000 of them (memory: 9 x 8 x 20,000², 29 GB) the engine `iterative` takes over. It needs
# memory in proportion to the data, solves its systems by conjugate gradients, and estimates the
# log-determinant from random probes. Estimates and criterion then have a Monte Carlo error, and the
# one of the criterion is reported. Asked for here, where the exact answer is known:

# %%
probed = lmmax.fit(formula, insteval, reml=False, engine="iterative", seed=1)
error = probed.deviance - ratings.deviance
print(f"exact {ratings.deviance:.4f}, iterative {probed.deviance:.4f}")
print(f"difference {error:.4f}, its standard error as reported {probed.criterion_error:.4f}")
assert ratings.criterion_error == 0.0
assert 0.0 < probed.criterion_error < 0.1
assert abs(error) < 4 * probed.criterion_error

# %%
both = pd.DataFrame(
    {
        "exact": ratings.varcorr().set_index("group")["vcov"],
        "iterative": probed.varcorr().set_index("group")["vcov"],
        "std err": ratings.varcorr().set_index("group")["vcov_se"],
    }
)
both["difference / std err"] = (both["iterative"] - both["exact"]) / both["std err"]
assert (both["difference / std err"].abs() < 0.1).all()
both.round(5)

# %% [markdown]
# The Monte Carlo error of the variances is a small part of their standard errors. It is no help to
# compare models whose deviances differ by about the criterion's error; that takes more probes, or
# the exact engine. Conditional covariances are not to be had from the iterative engine:

# %%
try:
    probed.random_effects_cov
except ValueError as error_message:
    print(error_message)
agreement = np.abs(probed.random_effects["d"] - ratings.random_effects["d"]).max().item()
print(f"largest difference of the modes of lecturers {agreement:.4f}")
assert agreement < 0.01
