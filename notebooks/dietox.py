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
# # Growth of pigs: the documented example of statsmodels, explained
#
# 72 pigs were weighed once a week for twelve weeks. The documentation of statsmodels' `MixedLM`
# fits their weight by a common line and a random intercept per pig,
#
# $$y_{ij} = \beta_0 + \beta_1 t_{ij} + b_i + e_{ij}, \qquad
# b_i \sim N(0, \psi), \quad e_{ij} \sim N(0, \sigma^2),$$
#
# and prints
#
# ```text
#          Mixed Linear Model Regression Results
# ========================================================
# Model:            MixedLM Dependent Variable: Weight
# No. Observations: 861     Method:             REML
# No. Groups:       72      Scale:              11.3669
# Min. group size:  11      Log-Likelihood:     -2404.7753
# Max. group size:  12      Converged:          Yes
# Mean group size:  12.0
# --------------------------------------------------------
#              Coef.  Std.Err.    z    P>|z| [0.025 0.975]
# --------------------------------------------------------
# Intercept    15.724    0.788  19.952 0.000 14.179 17.268
# Time          6.943    0.033 207.939 0.000  6.877  7.008
# Group Var    40.394    2.149
# ========================================================
# ```
#
# This page reproduces it with lmmax, says what each number is, and goes on to random slopes,
# residuals, and a fit whose variance is zero. Every claim in numbers is asserted.

# %%
import jax
import numpy as np
import pandas as pd

import lmmax
from lmmax import functional

pigs = lmmax.datasets.load("dietox")
pigs[["Weight", "Time", "Pig"]].head()

# %% [markdown]
# ## The documented fit
#
# The random part, `groups="Pig"` in statsmodels, is a term of the formula, as in lme4.

# %%
growth = lmmax.fit("Weight ~ Time + (1 | Pig)", pigs)
print(growth)

# %%
assert growth.converged
assert growth.nobs == 861
assert growth.n_groups == 72
assert round(growth.scale, 4) == 11.3669
assert round(growth.llf, 4) == -2404.7753
assert growth.params.round(3).to_dict() == {"Intercept": 15.724, "Time": 6.943}
assert growth.bse.round(3).to_dict() == {"Intercept": 0.788, "Time": 0.033}
assert growth.tvalues.round(3).to_dict() == {"Intercept": 19.952, "Time": 207.939}
limits = growth.conf_int(ddf="normal").round(3).to_numpy()  # as statsmodels does
assert limits.tolist() == [[14.179, 17.268], [6.877, 7.008]]
assert round(growth.cov_re.loc["Intercept", "Intercept"], 3) == 40.394

# %% [markdown]
# What is what, for a statsmodels user:
#
# | statsmodels | here | meaning |
# |---|---|---|
# | `Scale`, `result.scale` | `growth.scale` | residual variance $\sigma^2$ |
# | `Group Var`, `result.cov_re` | `growth.cov_re`, `growth.varcorr()` | variance $\psi$ |
# | `result.fe_params`, `bse_fe` | `growth.params`, `growth.bse` | fixed effects, standard errors |
# | `result.cov_params()` | `growth.cov_params()` | theirs: with the variances appended |
# | `Log-Likelihood`, `result.llf` | `growth.llf` | the *restricted* log-likelihood |
# | `result.random_effects` | `growth.random_effects` | theirs a dict, here a data frame |
#
# All agree but one: the standard error of the group variance.

# %%
growth.varcorr()

# %% [markdown]
# ## The standard error of the group variance: 6.94, not 2.149
#
# statsmodels optimises over the *relative* variance $D = \psi / \sigma^2$. The curvature of the
# log-likelihood in $D$ gives a standard error for $D$; statsmodels prints it times
# $\sqrt{\sigma^2}$. The pure layer shows the same curvature. Its criterion is
# $-2 \log L$ as a function of $\theta = \sqrt D$, with everything else profiled out.

# %%
X = np.column_stack([np.ones(len(pigs)), pigs["Time"]])
problem = functional.problem(pigs["Weight"], X, pigs["Pig"])
D = growth.cov_re.iloc[0, 0] / growth.scale


def criterion_of_ratio(ratio):
    return functional.criterion(problem, jax.numpy.sqrt(ratio)[None])


with jax.enable_x64(True):
    curvature = float(jax.hessian(criterion_of_ratio)(jax.numpy.asarray(D)))
ratio_se = np.sqrt(2 / curvature)
print(f"D = {D:.4f}, standard error {ratio_se:.4f}")
print(f"standard error times sqrt(scale): {ratio_se * np.sqrt(growth.scale):.3f}")
assert round(ratio_se * np.sqrt(growth.scale), 3) == 2.149

# %% [markdown]
# That is where 2.149 comes from, and it is a standard error of nothing: $\psi = \sigma^2 D$, so a
# standard error of $D$ has to be multiplied by $\sigma^2$, not by its root. Measured in grams
# instead of kilograms, $\psi$ grows by $10^6$, but this figure by $10^3$ only. Even
# $\sigma^2 \cdot \mathrm{se}(D) = 7.245$ is not it, since $\sigma^2$ is estimated as well, and the
# errors of the two are correlated. lmmax inverts the information matrix of $(\psi, \sigma^2)$
# jointly.
#
# Two ways to see that the result is right. First, hold $\psi$ fixed at values near the estimate and
# fit all else: the curvature of the profiled $-2 \log L$ is $2 / \mathrm{se}^2$.

# %%
psi, psi_se = growth.cov_re.iloc[0, 0], growth.cov_re_se.iloc[0, 0]
h = 0.5
around = [
    lmmax.fit("Weight ~ Time + (1 | Pig)", pigs, fix={"cov_re": [[value]]}).deviance
    for value in (psi - h, psi, psi + h)
]
profile_se = np.sqrt(2 / (np.diff(around, 2)[0] / h**2))
print(f"from the information matrix {psi_se:.3f}, from the profile {profile_se:.3f}")
assert round(psi_se, 3) == 6.939
assert abs(profile_se / psi_se - 1) < 0.01

# %% [markdown]
# Second, simulate: draw new weights from the fitted model, estimate $\psi$ again, and look how much
# it varies. `refit` takes a new response and costs about a millisecond.

# %%
rng = np.random.default_rng(20)
codes = pigs["Pig"].cat.codes.to_numpy()
mean = growth.fittedvalues_marginal.to_numpy()
estimates = []
for _ in range(400):
    intercepts = rng.normal(scale=np.sqrt(psi), size=growth.n_groups)
    noise = rng.normal(scale=np.sqrt(growth.scale), size=growth.nobs)
    estimates.append(growth.refit(mean + intercepts[codes] + noise).cov_re.iloc[0, 0])
print(f"mean {np.mean(estimates):.2f}, standard deviation {np.std(estimates):.2f}")
assert 6.0 < np.std(estimates) < 8.0

# %% [markdown]
# (The distribution of a variance estimate is skewed, so `estimate ± 2 se` is a rough guide even
# with the right standard error. A variance at zero has none: it is reported as missing.)
#
# ## The likelihood
#
# Under REML, `llf` is the log-likelihood of what is left of the data after the fixed effects have
# been taken out; it compares models with the same fixed effects. The ordinary log-likelihood is
# that of `refit_ml()`, and it is just a sum of multivariate normal log-densities, one per pig:

# %%
ml = growth.refit_ml()
psi_ml, scale_ml = ml.cov_re.iloc[0, 0], ml.scale
by_hand = 0.0
for _, r in ml.resid_marginal.groupby(pigs["Pig"], observed=True):
    V = scale_ml * np.eye(len(r)) + psi_ml
    by_hand -= 0.5 * (
        len(r) * np.log(2 * np.pi) + np.linalg.slogdet(V)[1] + r @ np.linalg.solve(V, r)
    )
print(f"fit {ml.llf:.6f}, by hand {by_hand:.6f}")
assert abs(ml.llf - by_hand) < 1e-8 * abs(by_hand)
pd.DataFrame(
    {"REML": [growth.scale, psi, growth.llf], "ML": [scale_ml, psi_ml, ml.llf]},
    index=["scale", "variance of Pig", "llf"],
)

# %% [markdown]
# ## Predicted random effects
#
# A pig's intercept is predicted by the mean of its residuals from the common line, shrunken towards
# zero by $n_i \psi / (n_i \psi + \sigma^2)$: here by only two per cent, because twelve weighings
# tell much about a pig. The table has the prediction and its standard deviation given the data.

# %%
residuals = growth.resid_marginal.groupby(pigs["Pig"], observed=True)
n, shrinkage = residuals.size(), residuals.size() * psi / (residuals.size() * psi + growth.scale)
predicted = growth.random_effects["Intercept"]
assert np.allclose(predicted, shrinkage * residuals.mean(), rtol=1e-8)
pd.DataFrame(
    {
        "weighings": n,
        "mean residual": residuals.mean(),
        "shrinkage": shrinkage,
        "prediction": predicted,
        "sd": np.sqrt(growth.random_effects_cov[:, 0, 0]),
    }
).round(3).head()

# %% [markdown]
# ## A look at the residuals
#
# If a random intercept were enough, the residuals would spread alike in every week. They fan out at
# both ends: pigs grow at different rates.

# %%
growth.resid.groupby(pigs["Time"]).agg(["mean", "std"]).round(2).T

# %% [markdown]
# ## Random slopes
#
# `(1 + Time | Pig)` gives every pig its own intercept and slope, with a covariance between them
# (`re_formula="~Time"` in statsmodels).

# %%
slopes = lmmax.fit("Weight ~ Time + (1 + Time | Pig)", pigs)
print(slopes)
assert slopes.converged
assert not slopes.singular
assert round(slopes.llf, 4) == -2217.0475

# %% [markdown]
# The standard error of `Time` more than doubles, from 0.033 to 0.080: with the slopes of pigs
# varying, 72 pigs carry less information on their mean slope than 861 independent weighings would.
# This, and not the better fit alone, is why a random slope matters.
#
# Both fits have the same fixed effects, so their restricted likelihoods can be compared. Twice the
# difference is 375 for two parameters more (a variance and a covariance). As a variance cannot be
# negative, the chi-squared distribution with two degrees of freedom is conservative here; the
# answer does not hang on that.

# %%
print(f"likelihood ratio statistic {2 * (slopes.llf - growth.llf):.2f}")
assert slopes.bse["Time"] > 2 * growth.bse["Time"]
pd.DataFrame(
    {
        "parameters": [growth.n_params, slopes.n_params],
        "llf": [growth.llf, slopes.llf],
        "AIC": [growth.aic, slopes.aic],
        "BIC": [growth.bic, slopes.bic],
    },
    index=["intercepts", "intercepts and slopes"],
).round(2)

# %%
slopes.random_effects.head()

# %% [markdown]
# The spread of the residuals is smaller and more even now. Their means still differ from week to
# week, in both models alike: growth is not a straight line, which no random effect of `Time` mends.
# A polynomial in the fixed effects is the next thing to try; as the fixed effects change, the
# comparison is by maximum likelihood.

# %%
slopes.resid.groupby(pigs["Time"]).agg(["mean", "std"]).round(2).T

# %%
curved = lmmax.fit("Weight ~ poly(Time, 3) + (1 + Time | Pig)", pigs, reml=False)
print(f"AIC straight {slopes.refit_ml().aic:.1f}, curved {curved.aic:.1f}")
assert curved.aic < slopes.refit_ml().aic - 100
curved.resid.groupby(pigs["Time"]).agg(["mean", "std"]).round(2).T

# %% [markdown]
# Predictions follow a pig that is known, or the population:

# %%
weeks = pd.DataFrame({"Time": [6, 12], "Pig": ["4601", "4601"]})
pd.DataFrame(
    {
        "pig 4601": slopes.predict(weeks),
        "population": slopes.predict(weeks, random_effects=False),
    }
).round(2)

# %% [markdown]
# Hypotheses about the fixed effects are written in words, as in statsmodels:

# %%
print(slopes.t_test("Time = 7"))

# %% [markdown]
# ## When the variance is zero
#
# The data `dyestuff2` were made up so that batches differ less than the residual variance alone
# would make them. The best variance of batches is zero. That is the maximum of the likelihood, on
# the boundary of what is allowed, and not a failure; the fit says which term it concerns.

# %%
dyestuff = lmmax.datasets.load("dyestuff2")
batches = lmmax.fit("Yield ~ 1 + (1 | Batch)", dyestuff)
print(batches)
assert batches.converged
assert batches.singular
assert batches.cov_re.iloc[0, 0] == 0.0
assert np.isnan(batches.cov_re_se.iloc[0, 0])

# %% [markdown]
# With no variance between batches the model is an ordinary sample: the residual variance is the
# sample variance, and all predicted random effects are zero.

# %%
assert np.isclose(batches.scale, dyestuff["Yield"].var())
assert (batches.random_effects["Intercept"] == 0.0).all()

# %% [markdown]
# Zero is the best value, as holding the variance at others shows: -2 log-likelihood rises.

# %%
variances = [0.0, 0.5, 1.0, 2.0, 4.0]
criteria = [
    lmmax.fit("Yield ~ 1 + (1 | Batch)", dyestuff, fix={"cov_re": [[v]]}).deviance
    for v in variances
]
assert criteria == sorted(criteria)
pd.DataFrame({"variance": variances, "-2 log-likelihood": criteria}).round(4)

# %% [markdown]
# ## How the optimum was found
#
# The record of the solve: status, the Newton decrement (how far, in units of -2 log-likelihood, the
# optimum is still away), the gradient, and the eigenvalues of the Hessian, all positive at a proper
# minimum. The first rows of the history are EM steps, which are robust and slow; then Newton steps,
# which double the number of correct digits each.

# %%
record = slopes.convergence
print(record.status, record.steps, record.decrement, record.gradient_norm)
print(record.hessian_eigenvalues)
assert record.decrement < 1e-10
assert record.gradient_norm < 1e-4
assert (record.hessian_eigenvalues > 0).all()
record.history
