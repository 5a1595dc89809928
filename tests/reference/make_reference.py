"""Trim the collection of reference fits to what the tests of single-factor models read.

Usage: ``python -m tests.reference.make_reference SOURCE`` where SOURCE holds ``data/``
(one CSV per data set and ``datasets.json``) and ``fits/`` (one JSON per data set).

Kept are the ``lmm`` records whose random part has exactly one grouping factor (several terms
on that factor, and interaction groupings ``a:b``, included), and the ``lme`` records without
residual structure whose one random term is general or diagonal, translated to formula syntax.
Of an ``lme`` record the refined optimum is kept, not the engine's own stopping point.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

Record = dict[str, Any]

HERE = Path(__file__).parent

RECORD_FIELDS = (
    "id", "kind", "tags", "note", "formula", "formula_py", "reml", "weights", "offset", "contrasts",
)  # fmt: skip
CONVERGENCE_FIELDS = (
    "raw_objective_spread", "at_bound", "max_abs_gradient", "null_directions",
    "negative_curvature", "last_newton_step", "estimated_excess_objective",
    "refined_twice_objective_diff", "refined_twice_theta_diff",
)  # fmt: skip
RESULT_FIELDS = (
    "n", "n_dropped", "p", "ngroups", "npar", "criterion", "logLik", "AIC", "BIC", "fixef",
    "fixef_dropped", "vcov", "se", "sigma", "theta", "varcorr", "ranef", "fitted",
    "fitted_population", "residuals", "predict", "objective_at", "wald_ci",
)  # fmt: skip


def _pick(record: Record, fields: tuple[str, ...]) -> Record:
    return {name: record[name] for name in fields if name in record}


def _results(results: Record) -> Record:
    """The result fields the tests read; prediction error covariances of the effects left out."""
    kept = _pick(results, RESULT_FIELDS)
    for block in kept.get("ranef") or []:
        block.pop("pev", None)
    return kept


def trim_lmm(record: Record) -> Record | None:
    """The trimmed record of a mixed model with one grouping factor, else None."""
    if record["kind"] != "lmm" or len(record["results"]["ngroups"]) != 1:
        return None
    checks = _pick(record["checks"], ("dense", "glmmTMB"))
    if "glmmTMB" in checks:
        checks["glmmTMB"] = _pick(checks["glmmTMB"] or {}, ("logLik", "convergence"))
    return {
        **_pick(record, RECORD_FIELDS),
        "convergence": _pick(record["convergence"], CONVERGENCE_FIELDS),
        "checks": checks,
        "results": _results(record["results"]),
    }


def trim_lme(record: Record) -> Record | None:
    """The trimmed record of a plain-residual ``lme`` fit with one ``us`` or ``diag`` term.

    ``us`` becomes ``(terms | group)``, ``diag`` becomes ``(terms || group)``.
    """
    if record["kind"] != "lme":
        return None
    structure = record["structure"]
    residual, terms = structure["residual"], structure["random"]
    if residual["correlation"] or residual["variance"] or len(terms) != 1:
        return None
    term = terms[0]
    if term["cov"] not in ("us", "diag") or len(term["group"]) != 1:
        return None
    bar = "|" if term["cov"] == "us" else "||"
    effects = re.sub(r"^~\s*", "", term["formula"])
    formula = f"{record['fixed']} + ({effects} {bar} {term['group'][0]})"
    engine, refined = record["results"], record["results"]["refined"]
    results = {
        **_results(engine),
        "criterion": -2.0 * refined["logLik"],
        **_pick(refined, ("logLik", "AIC", "sigma", "fixef", "vcov")),
        "varcorr": [
            {"group": t["group"][0], "columns": t["columns"], "cov": t["cov"]}
            for t in refined["random"]
        ],
    }
    # nlme's REML BIC uses log(n - p), and its objective_at is in another parameterisation.
    for name in ("BIC", "objective_at"):
        results.pop(name, None)
    results["se"] = [row[i] ** 0.5 for i, row in enumerate(refined["vcov"]["values"])]
    return {
        **_pick(record, ("id", "kind", "tags", "note")),
        "formula": formula,
        "formula_py": formula,
        "reml": record["reml"],
        "weights": None,
        "offset": None,
        "contrasts": None,
        "convergence": {"last_newton_step": record["checks"]["last_newton_step"]},
        "checks": _pick(record["checks"], ("engine_distance_in_se", "max_abs_gradient")),
        "results": results,
    }


def main() -> None:
    """Write ``fits/*.json``, ``data/*.csv`` and ``datasets.json`` beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    source = parser.parse_args().source
    for folder in ("fits", "data"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
        (HERE / folder).mkdir()
    tables = {
        t["name"]: t for t in json.loads((source / "data/datasets.json").read_text())["datasets"]
    }
    kept = []
    for path in sorted((source / "fits").glob("*.json")):
        trimmed = (trim_lmm(r) or trim_lme(r) for r in json.loads(path.read_text())["models"])
        records = [r for r in trimmed if r is not None]
        if not records:
            continue
        # One record per line: compact, and a change of one record is a change of one line.
        lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
        (HERE / "fits" / path.name).write_text(f"[\n{lines}\n]\n")
        table = tables[path.stem]
        shutil.copyfile(source / table["file"], HERE / "data" / f"{path.stem}.csv")
        (HERE / "data" / f"{path.stem}.csv").chmod(0o644)
        kept.append(
            {
                **_pick(table, ("name", "title", "rows", "source", "licence", "notes")),
                "columns": [_pick(c, ("name", "type", "description")) for c in table["columns"]],
            }
        )
    lines = ",\n".join(json.dumps(t, separators=(",", ":")) for t in kept)
    (HERE / "datasets.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
