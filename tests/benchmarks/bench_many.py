"""Fits a second of one model to many responses, ours and those of peers, in one table.

Usage: ``python -m tests.benchmarks.bench_many [--quick]``

How rates are taken: "statistics" is from the sufficient statistics of the responses to estimates,
standard errors and degrees of freedom; "rows" adds the passes over the responses, in memory;
compiling is left out (every call is made once before).  "wasted" is how many evaluations lanes ran
through for each that they needed: those that are done leave between steps.  Peers fit response
after response in the same process: glmm, and lmmax's own ``Fit.refit``; their rates are of 50
responses.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.benchmarks.harness import installed, rscript

PEER_RESPONSES = 50
SAME = 1e-6
"""Criteria that differ by less are of the same optimum."""


def intercepts(m: int, p: int, k: int, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray, str]:
    """Groups of 2 to 11 rows, half of the covariates between groups; variances of 0 to 2."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(m), rng.integers(2, 12, size=m))
    n = len(codes)
    X = {f"x{j}": rng.normal(size=n) if j % 2 else rng.normal(size=m)[codes] for j in range(1, p)}
    sd = np.sqrt(rng.uniform(0.0, 2.0, size=k)) * (rng.random(k) > 0.1)
    y = sd * rng.normal(size=(m, k))[codes] + rng.normal(size=(n, k))
    return pd.DataFrame({**X, "g": codes}), y, f"~ {' + '.join(X) or '1'} + (1 | g)"


def slopes(m: int, visits: tuple[int, int], p: int, k: int) -> tuple[pd.DataFrame, np.ndarray, str]:
    """Random intercepts and slopes, over equal visits or over times of each row's own."""
    rng = np.random.default_rng(1)
    low, high = visits
    sizes = np.full(m, low) if low == high else rng.integers(low, high + 1, size=m)
    codes = np.repeat(np.arange(m), sizes)
    n = len(codes)
    t = np.tile(np.arange(low), m) if low == high else rng.normal(size=n)
    X = {f"x{j}": rng.normal(size=m)[codes] for j in range(2, p)}
    b = rng.normal(size=(2, m, k)) * np.array([1.0, 0.4])[:, None, None]
    y = b[0][codes] + b[1][codes] * t[:, None] + rng.normal(size=(n, k))
    right = " + ".join(["t", *X])
    return pd.DataFrame({"t": t, **X, "g": codes}), y, f"~ {right} + (1 + t | g)"


def relatives(q: int, p: int, k: int) -> tuple[pd.DataFrame, np.ndarray, str, Any]:
    """One record of each of q related individuals, and a second of some."""
    rng = np.random.default_rng(2)
    half = rng.normal(size=(q, 2 * q))
    kinship = half @ half.T / (2 * q)
    labels = [f"a{i:04d}" for i in range(q)]
    codes = np.concatenate([np.arange(q), rng.integers(0, q, size=q // 2)])
    X = {f"x{j}": rng.normal(size=len(codes)) for j in range(1, p)}
    u = np.linalg.cholesky(kinship) @ rng.normal(size=(q, k))
    y = u[codes] + rng.normal(size=(len(codes), k))
    data = pd.DataFrame({**X, "id": np.array(labels)[codes]})
    return (
        data,
        y,
        f"~ {' + '.join(X)} + (1 | id)",
        {"id": pd.DataFrame(kinship, index=labels, columns=labels)},
    )


def factors(first: np.ndarray, second: np.ndarray, k: int) -> tuple[pd.DataFrame, np.ndarray, str]:
    """Two grouping factors, with variances of zero to four."""
    rng = np.random.default_rng(4)
    y = rng.normal(size=(len(first), k))
    for codes in (first, second):
        y += (rng.choice([0.0, 0.3, 2.0], size=k) * rng.normal(size=(codes.max() + 1, k)))[codes]
    return pd.DataFrame({"f": first, "g": second}), y, "~ 1 + (1 | f) + (1 | g)"


def genotypes(
    data: pd.DataFrame, y: np.ndarray, formula: str, k: int, missing: float = 0.0
) -> dict[str, Any]:
    """Return models a second of a scan of one response over k genotypes of the groups.

    Args:
        data: covariates and groups.
        y: responses, of which the first is taken.
        formula: the model without the genotype.
        k: number of genotypes.
        missing: share of the groups whose genotype is missing, others for each.
    """
    import lmmax

    rng, codes = np.random.default_rng(6), data["g"].to_numpy()
    x = rng.binomial(2, 0.3, size=(codes.max() + 1, k)).astype(float)
    x[rng.random(x.shape) < missing] = np.nan
    scan, model = {"snp": x[codes]}, formula.replace("~", "~ snp +")
    frame = data.assign(response=y[:, 0])
    few = [frame.assign(snp=each) for each in scan["snp"].T[:PEER_RESPONSES]]
    alone = partial(lmmax.fit, f"response {model}")
    return {
        "rows": k / seconds(lambda: lmmax.fit_many(model, frame, ["response"], scan=scan)),
        "refit": len(few) / seconds(lambda: [alone(each) for each in few], 1),
    }


def seconds(call: Callable[[], Any], rounds: int = 3) -> float:
    """Return the least seconds of a few calls, after one that is not counted."""
    call()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)


def measure(data: pd.DataFrame, y: np.ndarray, formula: str, relmat: Any = None) -> dict[str, Any]:
    """Return fits a second by each way, and how much work lanes waste."""
    import lmmax
    from lmmax.batch import line_statistics, solve_responses, solve_statistics
    from lmmax.batch.engines import LineEngine, engine_of
    from lmmax.batch.reading import read_design
    from lmmax.batch.solve import Effort
    from lmmax.batch.statistics import SharedDesigns, project
    from lmmax.constraints import Settings
    from lmmax.fit import prepare

    k = y.shape[1]
    design, _ = read_design(formula, data, relmat=relmat)
    # The response that lends the others a start.
    design = replace(design, y=np.ascontiguousarray(y[:, 0]))
    work = engine_of(prepare(design), Settings(), ())
    found: dict[str, Any] = {}
    if isinstance(work, LineEngine):
        stats = line_statistics.statistics(work.line, y)
        found["statistics"] = k / seconds(lambda: work.of_statistics(stats))
    else:
        work.fit(y[:, :64])
        template, shared, effort = work.template, work.shared, Effort()
        if isinstance(shared, SharedDesigns):
            responses = project(shared, y.T)
            found["statistics"] = k / seconds(lambda: solve_statistics(template, shared, responses))
        solve_responses(template, shared, y.T, effort=effort)
        found["wasted"] = effort.run / effort.needed
    found["rows"] = k / seconds(lambda: lmmax.fit_many(formula, data, y, relmat=relmat))
    frame = data.assign(response=y[:, 0])
    single = lmmax.fit(f"response {formula}", frame, relmat=relmat)
    few = y[:, :PEER_RESPONSES].T
    found["refit"] = len(few) / seconds(lambda: [single.refit(each) for each in few], 1)
    if importlib.util.find_spec("glmm") and relmat is None:
        import glmm

        frames = [data.assign(response=each) for each in few]
        text = f"response {formula}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of every singular fit
            found["glmm"] = len(few) / seconds(
                lambda: [glmm.fit(frame, text, satterthwaite=True) for frame in frames], 1
            )
    return found


def mixed(k: int, slope: bool, seed: int = 3) -> tuple[pd.DataFrame, np.ndarray, str]:
    """Unbalanced groups; responses of all kinds of variances, of which a third or so are zero."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(30), rng.integers(3, 9, size=30))
    n, t = len(codes), rng.normal(size=len(codes))
    x = rng.normal(size=30)[codes]
    sd = rng.choice([0.0, 0.1, 0.3, 1.0, 3.0], size=(2, k))
    b = rng.normal(size=(2, 30, k)) * sd[:, None]
    y = 5.0 + b[0][codes] + slope * b[1][codes] * t[:, None] + rng.normal(size=(n, k))
    data = pd.DataFrame({"t": t, "x": x, "g": codes})
    return data, y, f"~ t + x + ({'1 + t' if slope else '1'} | g)"


def differences(mine: Any, params: Any, bse: Any, criterion: Any) -> str:
    """The largest differences from estimates of the same responses by something else.

    Those of estimates are relative (to the error of a coefficient that is smaller), of responses
    in which both found the same optimum; of the others it says how far the worse one is above.
    """
    mine_params, mine_bse = mine.params.to_numpy(), mine.bse.to_numpy()
    above = -2.0 * mine.llf.to_numpy() - criterion
    same = np.abs(above) < SAME
    size = np.maximum(np.abs(params), bse)
    found = (
        np.max(np.abs(above[same])),
        np.max((np.abs(mine_params - params) / size)[same]),
        np.max((np.abs(mine_bse - bse) / bse)[same]),
    )
    text = "criterion {:.1e}, coefficients {:.1e}, errors {:.1e}".format(*found)
    for which, by in ((above >= SAME, above), (above <= -SAME, -above)):
        if which.any():
            whose = "here" if by is above else "there"
            text += f"; {which.sum()} stopped short {whose}, by {by[which].max():.1e} at most"
    return text


def against_single(k: int) -> None:
    """Print how far lanes are from fits of their own."""
    import lmmax

    for slope in (False, True):
        data, y, formula = mixed(k, slope)
        batch = lmmax.fit_many(formula, data, y)
        alone = [batch[i] for i in range(k)]
        gaps = differences(
            batch,
            np.array([fit.params for fit in alone]),
            np.array([fit.bse for fit in alone]),
            np.array([-2.0 * fit.llf for fit in alone]),
        )
        print(f"{k:,} lanes less single fits, {formula}, {int(batch.record.singular.sum())} at the "
              f"boundary: {gaps} (bars 1e-7, 1e-6, 1e-6)", flush=True)  # fmt: skip


def against_lme4(k: int, many: int) -> None:
    """Print how far lanes are from lme4's estimates, and how much faster.

    Args:
        k: responses that lme4 fits.
        many: responses that are fitted here to measure the rate.
    """
    import lmmax

    for slope in (False, True):
        data, y, formula = mixed(many, slope)
        batch = lmmax.fit_many(formula, data, y[:, :k])
        rate = many / seconds(partial(lmmax.fit_many, formula, data, y))
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            columns = [f"y{i}" for i in range(k)]
            frame = pd.concat([data, pd.DataFrame(y[:, :k], columns=columns)], axis=1)
            frame.to_csv(here / "data.csv", index=False, float_format="%.17g")
            theirs = rscript("many", folder, formula)
            table = pd.read_csv(here / "estimates.csv")
        names = list(batch.design.x_names)
        gaps = differences(
            batch,
            table[[f"params{j}" for j in range(len(names))]].to_numpy(),
            table[[f"bse{j}" for j in range(len(names))]].to_numpy(),
            table["criterion"].to_numpy(),
        )
        lmer, refit = k / theirs["lmer"], k / theirs["refit"]
        print(f"{k} lanes less lme4, {formula}, {int(batch.record.singular.sum())} at the "
              f"boundary: {gaps}; fits a second {rate:,.0f} (of {many:,}), lmer {lmer:,.0f}, its "
              f"refit {refit:,.0f}: {rate / lmer:,.0f} and {rate / refit:,.0f} times as fast",
              flush=True)  # fmt: skip


def cases(quick: bool) -> dict[str, tuple[float, Callable[[], dict[str, Any]]]]:
    """Bars (fits a second from statistics) and measurements."""
    k = 2_000 if quick else 20_000
    crossing = np.random.default_rng(5)
    return {
        "intercept, 200 groups, p = 2": (50_000, lambda: measure(*intercepts(200, 2, k))),
        "intercept, 1,000 groups, p = 10": (
            50_000,
            lambda: measure(*intercepts(1_000, 10, k // 2)),
        ),
        "intercept, 5,000 groups, p = 25": (
            50_000,
            lambda: measure(*intercepts(5_000, 25, k // 10)),
        ),
        "slope, 50 groups of 8 equal visits, p = 3": (
            20_000,
            lambda: measure(*slopes(50, (8, 8), 3, k)),
        ),
        "slope, 1,000 groups of 2 to 8, p = 10": (
            1_000,
            lambda: measure(*slopes(1_000, (2, 8), 10, k // 20)),
        ),
        "relationship matrix, q = 259, p = 49": (
            5_000,
            lambda: measure(*relatives(259, 49, k // 2)),
        ),
        # No bars: fits a second from rows; of scans, single fits in place of refits.
        "scan, intercept, 1,000 groups, p = 5": (
            0,
            lambda: genotypes(*intercepts(1_000, 4, 1), k // 2),
        ),
        "scan, the same, 1% of groups missing": (
            0,
            lambda: genotypes(*intercepts(1_000, 4, 1), k // 10, 0.01),
        ),
        "scan, slope, 1,000 groups of 5 visits, p = 4": (
            0,
            lambda: genotypes(*slopes(1_000, (5, 5), 3, 1), k // 2),
        ),
        "scan of slopes, 1% of groups missing": (
            0,
            lambda: genotypes(*slopes(1_000, (5, 5), 3, 1), k // 10, 0.01),
        ),
        "scan, slope, 1,000 groups of 2 to 8, p = 5": (
            0,
            lambda: genotypes(*slopes(1_000, (2, 8), 4, 1), k // 5),
        ),
        "nested, 10 x 3 x 2 rows": (
            0,
            lambda: measure(*factors(np.arange(60) // 6, np.arange(60) // 2, k // 20)),
        ),
        "nested, 200 x 5 x 4 rows": (
            0,
            lambda: measure(*factors(np.arange(4000) // 20, np.arange(4000) // 4, k // 80)),
        ),
        "crossed, 24 x 6, one row each": (
            0,
            lambda: measure(*factors(np.arange(144) // 6, np.arange(144) % 6, k // 20)),
        ),
        "crossed, 300 x 60, 6,000 rows": (
            0,
            lambda: measure(*factors(*crossing.integers(0, (300, 60), (6_000, 2)).T, k // 80)),
        ),
    }


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer responses")
    quick = parser.parse_args().quick
    head = f"{'fits a second':44}{'bar':>9}{'statistics':>12}{'rows':>10}{'refit':>8}{'glmm':>8}"
    head += f"{'wasted':>8}"
    print(head)
    for name, (bar, run) in cases(quick).items():
        found = run()
        cells = [f"{found[key]:,.0f}" if key in found else "-" for key in
                 ("statistics", "rows", "refit", "glmm")]  # fmt: skip
        cells.append(f"{found['wasted']:.2f}" if "wasted" in found else "-")
        widths = (12, 10, 8, 8, 8)
        line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"{name:44}{bar:>9,}{line}", flush=True)
    print()
    against_single(200 if quick else 2_000)
    if installed(["lme4"]):
        against_lme4(40, 2_000 if quick else 20_000)


if __name__ == "__main__":
    main()
