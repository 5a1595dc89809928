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
# # A mixed model in every voxel
#
# An image of each participant at each visit; one mixed model in every voxel; maps of what was
# found. The same holds for genes, vertices or markers: many responses, one design. Here the truth
# is known, since the image is simulated, and stands beside every map.
#
# `SIDE` makes the image as large as one likes: the numbers in the comment are a million models of a
# thousand rows each, a file of 4 GB, from which a block at a time is read.

# %%
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import betaincinv

import lmmax

try:
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
except ImportError:  # the tables below say the same
    plt = None

SIDE, SUBJECTS, VISITS = 48, 40, 5  # 1000, 100, 10 is a million models of a thousand rows
CHUNK = max(64, SIDE * SIDE // 64)

# %% [markdown]
# ## The design, and a true image
#
# Each participant is measured at five doses. `group` is a label of the participants that has no
# effect anywhere. In voxel $v$
#
# $$y_{ijv} = 100 + \mathrm{effect}_v\,\mathrm{dose}_j + b_{iv} + e_{ijv}, \qquad
# \mathrm{var}(b_{iv}) = \mathrm{share}_v, \quad \mathrm{var}(e_{ijv}) = 1 - \mathrm{share}_v.$$
#
# The effect is zero outside two patches. The share of the variance that lies between participants
# (the intraclass correlation) varies smoothly, and is zero in one part of the brain: there the best
# variance is often zero, a *singular* fit, and must not break anything.

# %%
FORMULA = "~ dose + group + (1 | subject)"
subject = np.repeat(np.arange(SUBJECTS), VISITS)
design = pd.DataFrame(
    {
        "subject": subject,
        "dose": np.tile(np.linspace(0.0, 1.0, VISITS), SUBJECTS),
        "group": np.where(subject % 2, "b", "a"),
    }
)
down, right = np.meshgrid(*[np.linspace(-1.0, 1.0, SIDE)] * 2, indexing="ij")
brain = (right / 0.85) ** 2 + (down / 0.95) ** 2 < 1.0


def patch(x: float, y: float, radius: float) -> np.ndarray:
    """A smooth hill of height one, exactly zero beyond the radius."""
    inside = 1.0 - ((right - x) ** 2 + (down - y) ** 2) / radius**2
    return np.maximum(inside, 0.0) ** 1.5


effect = np.where(brain, 1.4 * patch(-0.35, -0.4, 0.42) - 1.4 * patch(0.35, 0.2, 0.38), np.nan)
share = np.where(brain, 0.7 * np.maximum(0.0, 0.5 - 0.5 * down + 0.25 * right - 0.12), np.nan)
share = np.minimum(share, 0.75)
counts = {"voxels": brain.size, "in the brain": brain.sum(), "share zero": (share == 0.0).sum()}
pd.Series(counts)

# %% [markdown]
# Outside of the brain the image is constant. Two stripes are spoilt: in one the last visit of one
# participant is missing, in the other a broken scanner wrote infinity. The file is written a few
# lines of the image at a time, as numbers of single precision: rows are visits, columns voxels.

# %%
dropout = brain & (np.abs(down - 0.55) < 1.5 / SIDE)
broken = brain & (np.abs(right - 0.6) <= 1.0 / (SIDE - 1)) & (np.abs(down) < 0.3)
directory = tempfile.TemporaryDirectory()
here = Path(directory.name)
rng = np.random.default_rng(7)
design.to_csv(here / "design.csv", index=False)
image = np.lib.format.open_memmap(
    here / "image.npy", mode="w+", dtype=np.float32, shape=(len(design), SIDE * SIDE)
)
LINES = max(1, 20_000 // SIDE)
for top in range(0, SIDE, LINES):
    lines = slice(top, top + LINES)
    truth = {"effect": effect[lines].ravel(), "share": share[lines].ravel()}
    width = len(truth["share"])
    b = rng.normal(size=(SUBJECTS, width)) * np.sqrt(truth["share"])
    e = rng.normal(size=(len(design), width)) * np.sqrt(1.0 - truth["share"])
    y = 100.0 + design["dose"].to_numpy()[:, None] * truth["effect"] + b[subject] + e
    y[:, ~brain[lines].ravel()] = 0.0
    y[-1, dropout[lines].ravel()] = np.nan
    y[3, broken[lines].ravel()] = np.inf
    image[:, top * SIDE : top * SIDE + width] = y
image.flush()
del image
f"{(here / 'image.npy').stat().st_size / 1e6:,.1f} MB"

# %% [markdown]
# ## Beforehand: what will it take?
#
# `plan` fits some voxels and predicts the rest. It raises an error if the work does not fit into
# the memory that is free.

# %%
plan = lmmax.plan(FORMULA, design, here / "image.npy", chunk=CHUNK)
assert plan.responses == SIDE * SIDE
assert plan.chunks == -(-SIDE * SIDE // CHUNK)
print(plan)

# %% [markdown]
# ## Run, killed, and resumed
#
# With `out=` each chunk of results is on the disk as soon as it is done. To show what that is good
# for, the work begins in another process, which gets no chance to clean up: it is killed
# (`SIGKILL`, what a cluster's scheduler or a power failure does) after a few chunks.

# %%
WORK = f"""
import lmmax, pandas as pd
design = pd.read_csv("design.csv")
lmmax.fit_many({FORMULA!r}, design, "image.npy", chunk={CHUNK}, out="results")
"""


def finished() -> list[Path]:
    """The chunks that are on the disk."""
    return sorted((here / "results").glob("chunk-*.parquet"))


process = subprocess.Popen([sys.executable, "-c", WORK], cwd=here)
while process.poll() is None and len(finished()) < plan.chunks // 4:
    time.sleep(0.001)
process.kill()
ended = process.wait()
done = {path.name: path.stat().st_mtime_ns for path in finished()}
print(f"ended with code {ended}; {len(done)} of {plan.chunks} chunks are there")
assert done

# %% [markdown]
# `resume=True` goes on from there. What was complete is not touched; at most the chunk that was
# being fitted is lost.

# %%
batch = lmmax.fit_many(
    FORMULA, design, here / "image.npy", chunk=CHUNK, out=here / "results", resume=True
)
assert len(finished()) == plan.chunks
assert all((here / "results" / name).stat().st_mtime_ns == at for name, at in done.items())
print(batch)

# %% [markdown]
# The results do not depend on where the work stopped, or on the size of the chunks. Here is all of
# it once more in memory, in one go:

# %%
again = lmmax.fit_many(FORMULA, design, np.load(here / "image.npy", mmap_mode="r"))
for name in ("params", "bse", "df"):
    pd.testing.assert_frame_equal(
        getattr(batch, name), getattr(again, name), rtol=1e-12, atol=1e-12
    )

# %% [markdown]
# ## The certificate
#
# Every voxel has one. Nothing was raised for the voxels that cannot be fitted, and they did not
# disturb their neighbours; who reads the map can see which they are. Voxels without variance
# between participants end at the boundary, legitimately, in about half of all cases.

# %%
certificate = batch.certificate
fitted = batch.converged.reshape(SIDE, SIDE)
singular = certificate["singular"].to_numpy(dtype=bool).reshape(SIDE, SIDE)
gaps = (certificate["nobs"].to_numpy() < len(design)).reshape(SIDE, SIDE)
assert (fitted == (brain & ~broken)).all()
assert (gaps == dropout).all()
zero = fitted & (share == 0.0)
pd.DataFrame(
    {
        "voxels": [brain.sum(), (~brain).sum(), broken.sum(), dropout.sum(), zero.sum()],
        "converged": [fitted[at].sum() for at in (brain, ~brain, broken, dropout, zero)],
        "singular": [
            (singular & fitted)[at].sum() for at in (brain, ~brain, broken, dropout, zero)
        ],
    },
    index=["brain", "outside", "broken scanner", "missing visit", "no variance between"],
)

# %%
certificate[batch.converged][["steps", "gradient", "nobs"]].describe().loc[["min", "50%", "max"]]

# %% [markdown]
# ## Maps
#
# The numbers of a column of `batch.params`, `batch.tvalues`, `batch.qvalues()` or of `batch.icc`
# are the image again, in the order in which the voxels were given.


# %%
def as_image(column: pd.Series) -> np.ndarray:
    """The voxels of a column where they belong."""
    return column.to_numpy().reshape(SIDE, SIDE)


found = {
    "effect": as_image(batch.params["dose"]),
    "t": as_image(batch.tvalues["dose"]),
    "q": as_image(batch.qvalues("bh")["dose"]),
    "share": as_image(batch.icc),
}
discovered = fitted & (np.nan_to_num(found["q"], nan=1.0) < 0.05)
active = brain & (effect != 0.0)


def shown(axis, values, title, label, colours, low, high, outline=None) -> None:
    """One map, with its own colour bar; what was not fitted is grey."""
    axis.set_facecolor("0.85")
    drawn = axis.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    if outline is not None:
        axis.contour(outline, levels=[0.5], colors="black", linewidths=0.8)
    axis.set(title=title, xticks=[], yticks=[])
    axis.figure.colorbar(drawn, ax=axis, label=label, shrink=0.8)


def effects() -> object:
    """Maps of the effect; colours of blue and red tell apart for the colour-blind as well."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.4), layout="constrained")
    top, unit = 1.4, "signal per unit of dose"
    shown(axes[0, 0], effect, "true effect of dose", unit, "RdBu_r", -top, top)
    shown(axes[0, 1], found["effect"], "estimated effect", unit, "RdBu_r", -top, top)
    high = float(np.nanmax(np.abs(found["t"])))
    title = "t statistic (outline: true patches)"
    shown(axes[1, 0], found["t"], title, "t", "RdBu_r", -high, high, active)
    discoveries = np.where(discovered, found["t"], np.where(fitted, 0.0, np.nan))
    title = "t where q < 0.05 (outline: true patches)"
    shown(axes[1, 1], discoveries, title, "t", "RdBu_r", -high, high, active)
    plt.close(figure)
    return figure


effects() if plt else None

# %% [markdown]
# Of the voxels with q below 0.05, at most 5% should be false, on average over images. The effect
# tapers off to nothing at the edge of a patch, so that many true voxels are out of reach.

# %%
false = (discovered & ~active).sum() / max(discovered.sum(), 1)
# Twice its standard error above the level, if every discovery is false with that probability.
assert false < 0.05 + 2.0 * np.sqrt(0.05 * 0.95 / discovered.sum())
strong = fitted & (np.nan_to_num(np.abs(effect)) > 0.8)
assert discovered[strong].mean() > 0.8
pd.Series(
    {
        "discoveries": discovered.sum(),
        "false among them": round(false, 3),
        "found of all active": round(discovered[active & fitted].mean(), 3),
        "found of those above 0.8": round(discovered[strong].mean(), 3),
    },
    dtype=object,
)

# %% [markdown]
# The share of the variance that lies between participants, with the certificate as a map:

# %%
status = as_image(certificate["status"])
kinds = np.select([status == "constant", status == "infinite", gaps, singular], [0, 1, 3, 4], 2)
truth_kinds = np.select([~brain, broken, dropout, share == 0.0], [0, 1, 3, 4], 2)
NAMES = ["constant: no fit", "infinite: no fit", "inside", "a visit missing", "variance zero"]
OKABE_ITO = ["#bbbbbb", "#d55e00", "#56b4e9", "#f0e442", "#0072b2"]


def shares() -> object:
    """Maps of the variance share and of the certificate."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.4), layout="constrained")
    unit = "share of the variance (ICC)"
    shown(axes[0, 0], share, "true share between participants", unit, "viridis", 0.0, 0.8)
    shown(axes[0, 1], found["share"], "estimated share", unit, "viridis", 0.0, 0.8)
    for axis, values, title in zip(
        axes[1], (truth_kinds, kinds), ("truth", "certificate: how each fit ended"), strict=True
    ):
        drawn = axis.imshow(
            values, cmap=ListedColormap(OKABE_ITO), vmin=-0.5, vmax=4.5, interpolation="nearest"
        )
        axis.set(title=title, xticks=[], yticks=[])
    bar = figure.colorbar(drawn, ax=axes[1], ticks=range(5), shrink=0.8)
    bar.ax.set_yticklabels(NAMES)
    plt.close(figure)
    return figure


shares() if plt else None

# %% [markdown]
# Is the share estimated without bias? It is nearly, where it is not close to its boundary; where
# the truth is zero no estimate can lie below.

# %%
edges = [-0.01, 0.0, 0.2, 0.4, 0.6, 0.8]
bins = pd.cut(share[fitted], edges, labels=["0", "to 0.2", "to 0.4", "to 0.6", "to 0.8"])
voxels = pd.DataFrame({"true": share[fitted], "estimated": found["share"][fitted]})
voxels["singular"] = singular[fitted]
limits = batch.conf_int("dose").to_numpy().reshape(SIDE, SIDE, 2)[fitted]
voxels["interval holds the effect"] = (limits[:, 0] <= effect[fitted]) & (
    effect[fitted] <= limits[:, 1]
)
table = voxels.groupby(bins, observed=True).mean()
table.insert(0, "voxels", voxels.groupby(bins, observed=True).size())
middle = table.loc[["to 0.4", "to 0.6"]]
assert (np.abs(middle["estimated"] - middle["true"]) < 0.03).all()
table.rename_axis("true share").round(3)

# %%
coverage = voxels["interval holds the effect"].mean()
assert abs(coverage - 0.95) < 4.0 * np.sqrt(0.95 * 0.05 / len(voxels))
print(f"{coverage:.2%} of {len(voxels):,} intervals of level 95% hold the true effect")

# %% [markdown]
# ## Calibration: p-values where there is nothing to be found
#
# `group` has no effect in any voxel, `dose` none outside the patches. p-values must then be
# uniform, down to the small ones that matter in an image. `group` differs between participants, so
# its error depends on the variance between them and its degrees of freedom are near 38; `dose`
# varies within participants and has 159. Satterthwaite's method finds both in every voxel. Where
# the share is nearly zero, its estimate cannot lie as far below as above, and tests between
# participants are a little too cautious; these voxels are counted apart.

# %%
nothing = {
    "group": as_image(batch.pvalues["group[T.b]"])[fitted & (share > 0.2)],
    "dose": as_image(batch.pvalues["dose"])[fitted & ~active],
}


def quantiles() -> object:
    """Observed against expected p-values, on a logarithmic scale, with 95% bands."""
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 4), layout="constrained", sharex=True, sharey=True
    )
    for axis, (name, p) in zip(axes, nothing.items(), strict=True):
        n, rank = len(p), np.arange(1, len(p) + 1)
        expected = -np.log10((rank - 0.5) / n)
        low, high = (-np.log10(betaincinv(rank, n + 1 - rank, c)) for c in (0.975, 0.025))
        axis.fill_between(expected, low, high, color="0.8", label="95% of uniform samples")
        axis.plot(expected, expected, color="black", linewidth=0.8)
        axis.plot(expected, -np.log10(np.sort(p)), ".", color="#0072b2", markersize=3)
        title = f"p-values of {name} where it has no effect ({n:,} voxels)"
        axis.set_title(title, fontsize="medium")
        axis.set(xlabel="expected -log10 p")
    axes[0].set(ylabel="observed -log10 p")
    axes[0].legend(loc="upper left", frameon=False)
    plt.close(figure)
    return figure


quantiles() if plt else None

# %%
levels = [0.05, 0.01]
rates = pd.DataFrame(
    {name: [(p < a).mean() for a in levels] for name, p in nothing.items()}, levels
)
for name, p in nothing.items():
    for a in levels:
        assert abs(rates.loc[a, name] - a) < 4.0 * np.sqrt(a * (1.0 - a) / len(p))
near_zero = as_image(batch.pvalues["group[T.b]"])[fitted & (share <= 0.2)]
rates["group, share below 0.2"] = [(near_zero < a).mean() for a in levels]
rates.rename_axis("p below").round(4)

# %% [markdown]
# ## One voxel
#
# `batch[i]` is an ordinary fit, with everything that it can do, and the numbers are those of the
# map.

# %%
peak = int(np.nanargmax(np.where(discovered, found["t"], np.nan)))
voxel = batch[peak]
assert np.isclose(voxel.tvalues["dose"], batch.tvalues["dose"][peak], rtol=1e-6)
assert np.isclose(voxel.llf, batch.llf[peak], atol=1e-7, rtol=0)
print(f"line {peak // SIDE}, column {peak % SIDE}, true effect {effect.flat[peak]:.2f}")
print(voxel)

# %%
voxel.random_effects.head(3).round(3)

# %% [markdown]
# ## One model for each region
#
# The other kind of "many": `by=` fits the rows of each level on their own, here the mean signal of
# some regions of the brain. Regions may have any number of rows each.

# %%
tiles = (3 * (down + 1.0) / 2.0001).astype(int) * 3 + (3 * (right + 1.0) / 2.0001).astype(int)
image = np.load(here / "image.npy", mmap_mode="r")
parts = []
for number in range(9):
    inside = brain & ~broken & ~dropout & (tiles == number)
    mean = image[:, np.flatnonzero(inside)].mean(axis=1, dtype=float)
    region = design.assign(region=f"region {number}", signal=mean, truth=effect[inside].mean())
    parts.append(region)
del image
long = pd.concat(parts, ignore_index=True)
regions = lmmax.fit_many("signal ~ dose + group + (1 | subject)", long, by="region")
limits = regions.conf_int("dose")
table = regions.frame().query("coefficient == 'dose'").set_index("response")
table = table[["coef", "std err", "df", "t", "q"]].join(limits)
table["truth"] = long.groupby("region")["truth"].first()
assert regions.converged.all()
assert ((table["lower"] <= table["truth"]) & (table["truth"] <= table["upper"])).sum() >= 7
table.round(3)

# %% [markdown]
# Averages over voxels have less noise; the map has shown where in a region the effect lies.

# %%
directory.cleanup()
