"""Fit every model of the validation matrix with other software and store the best criteria.

Usage: ``python -m tests.validation.make_validation [--only FIRST LAST]``. Needs R with lme4
and jsonlite, and the Python packages glmm and statsmodels. Writes ``lme4_best.json``: per
model the lowest criterion lme4 reaches (see make_lme4.R), and those of glmm and statsmodels
where they can fit it. statsmodels' own log-likelihood is not used, since it is wrong next to a
singular covariance matrix; its estimate is scored by the closed-form oracle instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles import lindstrom_bates
from tests.validation.models import N_MODELS, Model, make_model

HERE = Path(__file__).parent
STORE = HERE / "lme4_best.json"
# statsmodels takes minutes for larger models.
STATSMODELS_ROWS = 1000


def lme4_best(models: list[Model]) -> list[dict[str, Any]]:
    """lme4's best optimum of each model, on one core."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for model in models:
            q = len(model.kind.effects)
            factor = np.linalg.cholesky(model.D + 0.01 * np.eye(q))
            # lme4 takes the lower triangle column by column.
            start = factor.T[np.triu_indices(q)] if model.kind.full else np.diag(factor)
            data = model.data
            if model.kind.name == "far":
                # Shifting the covariate changes neither model nor criterion, and spares lme4
                # the search along a ridge.
                data = data.assign(x1=data["x1"] - 2010)
            path = Path(folder) / f"{model.name}.csv"
            data.to_csv(path, index=False)
            jobs.append(
                {
                    "name": model.name,
                    "file": str(path),
                    "formula": model.formula,
                    "reml": model.reml,
                    "weights": model.weights,
                    "full": model.kind.full,
                    "start": start.tolist(),
                }
            )
        manifest, output = Path(folder) / "manifest.json", Path(folder) / "output.json"
        manifest.write_text(json.dumps(jobs))
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        script = HERE / "make_lme4.R"
        subprocess.run(
            ["Rscript", "--vanilla", str(script), str(manifest), str(output)],
            check=True,
            env=environment,
        )
        return json.loads(output.read_text())


def glmm_best(model: Model) -> float | None:
    """The criterion glmm reports, or None where it cannot fit the model.

    It knows unrestricted covariance matrices that include an intercept. Its log-likelihood is
    defined as lme4's.
    """
    import glmm

    formula = model.formula
    if model.kind.name == "cat0":
        # The same model in another basis: means of three levels, or a mean and two contrasts.
        formula = formula.replace("0 + f", "1 + f")
    elif not model.kind.full or model.kind.effects[0] != "1":
        return None
    weights = None if model.weights is None else model.data[model.weights].to_numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = glmm.fit(model.data, formula, weights=weights, reml=model.reml, satterthwaite=False)
    return -2.0 * float(fit.loglik) if fit.converged and np.isfinite(fit.loglik) else None


def statsmodels_best(model: Model) -> float | None:
    """The lowest criterion at statsmodels' estimates over three optimisers, or None."""
    from statsmodels.regression.mixed_linear_model import MixedLM

    if not model.kind.full or model.weights is not None or len(model.data) > STATSMODELS_ROWS:
        return None
    m = model.matrices()
    values = []
    for method in ("bfgs", "lbfgs", "powell"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                fit = MixedLM(m["y"], m["X"], m["codes"], m["Z"]).fit(
                    reml=model.reml, method=method, gtol=1e-8
                )
                value = lindstrom_bates.criterion(**m, D=fit.cov_re_unscaled, reml=model.reml)
            except (np.linalg.LinAlgError, ValueError):
                continue
        if np.isfinite(value):
            values.append(float(value))
    return min(values) if values else None


def main() -> None:
    """Fit all models, or numbers FIRST to LAST - 1, and update the store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs=2, type=int, default=(0, N_MODELS))
    first, last = parser.parse_args().only
    models = [make_model(number) for number in range(first, last)]
    store = json.loads(STORE.read_text()) if STORE.exists() else {}
    for model, result in zip(models, lme4_best(models), strict=True):
        theta = result["theta"]
        store[result["name"]] = {
            "n": result["n"],
            "lme4": result["value"],
            "glmm": glmm_best(model),
            "statsmodels": statsmodels_best(model),
            "excess_if_singular": result["excess"],
            "singular_lme4": result["singular_lme4"],
            "searches": result["runs"],
            "searches_at_best": result["at_best"],
            "theta": theta if isinstance(theta, list) else [theta],
        }
    lines = ",\n".join(
        f"{json.dumps(name)}:{json.dumps(store[name], separators=(',', ':'))}"
        for name in sorted(store)
    )
    STORE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
