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
# # Which limits to believe with nine groups
#
# Confidence limits of level 95% should hold the truth in 95% of the data sets. Here the truth is
# known: data are simulated from a small design, nine plots with four measurements each, and every
# method is counted. `dose` differs between plots, `time` within them:
#
# $$y_{ij} = 10 + 1 \cdot \mathrm{dose}_i + 0.5 \cdot \mathrm{time}_j + b_i + e_{ij}, \qquad
# b_i \sim N(0, 1), \quad e_{ij} \sim N(0, 1).$$
#
# The design is balanced, so theory says what to expect: the coefficient of `dose` over its standard
# error has a t distribution with 9 - 2 = 7 degrees of freedom, that of `time` with
# 36 - 9 - 1 = 26.

# %%
import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

import lmmax

PLOTS, TIMES = 9, 4
DATA_SETS, REPLICATES = 400, 199
TRUTH = {"dose": 1.0, "time": 0.5, "plot: sd(Intercept)": 1.0, "sigma": 1.0}

data = pd.DataFrame(
    {
        "plot": np.repeat(np.arange(PLOTS), TIMES),
        "dose": np.repeat(np.linspace(-1.0, 1.0, PLOTS), TIMES),
        "time": np.tile(np.linspace(-1.0, 1.0, TIMES), PLOTS),
    }
)
rng = np.random.default_rng(2024)


def draw() -> np.ndarray:
    """One response from the true model."""
    plots, rest = rng.normal(size=PLOTS), rng.normal(size=PLOTS * TIMES)
    mean = 10.0 + TRUTH["dose"] * data["dose"] + TRUTH["time"] * data["time"]
    return (mean + plots[data["plot"]] + rest).to_numpy()


data["y"] = draw()
first = lmmax.fit("y ~ dose + time + (1 | plot)", data)
print(first)

# %% [markdown]
# One bootstrap of the first data set. Each replicate is a REML fit of its own; all of them are
# solved together.

# %%
print(lmmax.bootstrap(first, 1999, seed=1))

# %% [markdown]
# ## Counting
#
# Five methods. *Wald* takes normal quantiles, *Satterthwaite* those of a t distribution whose
# degrees of freedom are estimated from the same data. *Percentile* and *basic* limits are quantiles
# of 199 parametric bootstrap replicates. The *studentised* bootstrap takes the quantiles of
# $(\hat\beta^* - \hat\beta) / \mathrm{se}^*$ in place of those of a normal distribution; the
# standard errors of the replicates are in `estimates.bse`.

# %%
names = list(first.design.x_names)
methods = ["Wald", "Satterthwaite", "percentile", "basic", "studentised"]
hits: dict[tuple[str, str], list[bool]] = {}


def count(method: str, limits: pd.DataFrame) -> None:
    """Note which of the parameters lie within their limits."""
    for name, truth in TRUTH.items():
        if name in limits.index:
            lower, upper = limits.loc[name]
            hits.setdefault((method, name), []).append(bool(lower <= truth <= upper))


for number in range(DATA_SETS):
    fit = first.refit(draw())
    result = lmmax.bootstrap(fit, REPLICATES, seed=number)
    count("Wald", fit.conf_int(ddf="normal"))
    count("Satterthwaite", fit.conf_int(ddf="satterthwaite"))
    count("percentile", result.conf_int())
    count("basic", result.conf_int(kind="basic"))
    ratio = (result.estimates.params - fit.params.to_numpy()) / result.estimates.bse
    low, high = np.quantile(ratio, [0.025, 0.975], axis=0, method="weibull")
    studentised = {"lower": fit.params - high * fit.bse, "upper": fit.params - low * fit.bse}
    count("studentised", pd.DataFrame(studentised, index=names))

coverage = pd.Series({key: np.mean(found) for key, found in hits.items()}).unstack()
coverage = coverage.reindex(index=methods, columns=list(TRUTH))
coverage.astype(float).round(3)

# %% [markdown]
# The Monte Carlo error of these numbers, two standard errors of a share of 95% (or 90%):

# %%
error = {share: 2.0 * np.sqrt(share * (1.0 - share) / DATA_SETS) for share in (0.95, 0.90)}
{share: round(float(value), 3) for share, value in error.items()}

# %% [markdown]
# ## Against theory
#
# Limits from normal quantiles hold the truth with the probability that a t variable lies within
# ±1.96: 0.909 for `dose`, 0.939 for `time`. The percentile and basic limits of a coefficient do
# no better: given the data, the replicates are normal with the estimated variance, whose own
# uncertainty nobody has told them. Satterthwaite's and the studentised limits do take it into
# account.

# %%
df = pd.Series({"dose": PLOTS - 2.0, "time": PLOTS * (TIMES - 1.0) - 1.0})
z = stdtrit(np.inf, 0.975)
normal = pd.Series(1.0 - 2.0 * stdtr(df, -z), index=df.index)
expected = pd.DataFrame({method: normal for method in methods}).T
expected.loc[["Satterthwaite", "studentised"]] = 0.95
comparison = coverage[["dose", "time"]].astype(float) - expected
pd.concat({"expected": expected, "counted minus expected": comparison}, axis=1).round(3)

# %%
# Everything within four Monte Carlo standard errors of what theory says, although quantiles of 199
# replicates are noisy and a few of the fits are singular.
spread = np.sqrt(expected * (1.0 - expected) / DATA_SETS)
assert (comparison.abs() < 4.0 * spread).all(axis=None)
# The difference that matters is far outside the error: paired, on the same data sets.
gain = np.mean(hits["Satterthwaite", "dose"]) - np.mean(hits["Wald", "dose"])
differ = np.not_equal(hits["Satterthwaite", "dose"], hits["Wald", "dose"])
assert gain > 3.0 * np.sqrt(differ.mean() / DATA_SETS)
round(gain, 3)

# %% [markdown]
# ## Standard deviations
#
# With nine plots the standard deviation between them is hard to know. Its estimate is biased
# downwards, and so are the replicates around it: percentile limits count that bias twice, basic
# limits take it back, but are not shaped like the parameter, whose lower limit may be negative.
# Neither reaches 95%. That of `sigma`, with 26 degrees of freedom, is held almost as often as it
# should be.

# %%
share = coverage.loc[["percentile", "basic"], ["plot: sd(Intercept)", "sigma"]].astype(float)
assert (share["sigma"] > 0.95 - 4.0 * np.sqrt(0.95 * 0.05 / DATA_SETS) - 0.02).all()
assert (share["sigma"] < 0.95 + 4.0 * np.sqrt(0.95 * 0.05 / DATA_SETS)).all()
assert share["plot: sd(Intercept)"].between(0.80, 0.95).all()
share.round(3)

# %% [markdown]
# So: for coefficients in small samples take t limits, or the studentised bootstrap where the model
# is not balanced and the degrees of freedom are in doubt; use percentile limits for functions of
# the variances that have no others, and do not read the last per cent into them.
