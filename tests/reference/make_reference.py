"""Trim the collection of reference fits to what the tests read.

Usage: ``python -m tests.reference.make_reference SOURCE`` where SOURCE holds ``data/``
(one CSV per data set and ``datasets.json``) and ``fits/`` (one JSON per data set).

Kept are the ``lmm`` and ``lrt`` records; the ``lme`` records without residual structure,
translated to formula syntax; and the ``glmmTMB`` records.  Of the last two the refined optimum is
kept, not the engine's own stopping point.  Large tables are compressed.
"""

from __future__ import annotations

import argparse
import gzip
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
    "fitted_population", "residuals", "predict", "objective_at", "wald_ci", "ranova",
    "cluster_robust",
)  # fmt: skip
# How a random term of nlme is written here.
LME_STRUCTURES = {"us": "({} | {})", "diag": "({} || {})", "cs": "homcs({} | {})",
                  "ident": "homdiag({} | {})"}  # fmt: skip
# Columns made for glmmTMB, from columns of the data.
TMB_COLUMNS = {"fday": "C(Days)", "tday": "C(Days)", "tf": "C(t)"}
SHOWN_LEVELS = 10  # of the conditional modes in the records of structured random effects
COMPRESS_FROM = 100_000  # bytes


def _pick(record: Record, fields: tuple[str, ...]) -> Record:
    return {name: record[name] for name in fields if name in record}


def _results(results: Record) -> Record:
    """The result fields the tests read; prediction error covariances of the effects left out."""
    kept = _pick(results, RESULT_FIELDS)
    for block in kept.get("ranef") or []:
        block.pop("pev", None)
    return kept


def trim_lmm(record: Record) -> Record | None:
    """The trimmed record of a mixed model fitted by lme4, else None.

    With several grouping factors ``varpar_cov`` is kept, the inverse observed information of
    (theta, sigma).  Of the tests of coefficients the refined Satterthwaite ones, Kenward and
    Roger's, the tables of ``anova``, and the exact profile limits are kept.
    """
    if record["kind"] != "lmm":
        return None
    results = _results(record["results"])
    tests = record["results"].get("satterthwaite_refined") or {}
    if len(results["ngroups"]) > 1 and "varpar_cov" in tests:
        results["varpar_cov"] = tests["varpar_cov"]
    results.update(_inference(record))
    # An empty object of the source is an empty array.
    checks = _pick(record["checks"] or {}, ("dense", "glmmTMB"))
    if "glmmTMB" in checks:
        checks["glmmTMB"] = _pick(checks["glmmTMB"] or {}, ("logLik", "convergence"))
    return {
        **_pick(record, RECORD_FIELDS),
        "convergence": _pick(record["convergence"], CONVERGENCE_FIELDS),
        "checks": checks,
        "results": results,
    }


def _inference(record: Record) -> Record:
    """Degrees of freedom, tests and profile limits; Satterthwaite's where they are reliable."""
    results, kept = record["results"], {}
    for ours, theirs in (("satterthwaite", "satterthwaite_refined"), ("kenward_roger",) * 2):
        if tests := results.get(theirs):
            kept[ours] = _pick(tests, ("names", "se", "df", "t", "p", "vcov_adjusted", "source"))
    if tables := results.get("anova"):
        reliable = (record["checks"] or {}).get("satterthwaite_engine_reliable", True)
        kept["anova"] = {
            name: table for name, table in tables.items() if reliable or "kenward" in name
        }
    if profile := results.get("profile_ci"):
        kept["profile_ci"] = {"level": profile["level"], **profile["exact"]}
    return kept


def trim_lrt(record: Record) -> Record | None:
    """The trimmed record of likelihood-ratio tests between nested models, else None."""
    if record["kind"] != "lrt":
        return None
    fields = ("id", "kind", "tags", "note", "formulas", "reml", "weights", "results")
    return _pick(record, fields)


def _refined(results: Record) -> Record:
    """Estimates and criterion of the independent refinement, named as in an ``lmm`` record."""
    refined = results["refined"]
    return {
        "criterion": -2.0 * refined["logLik"],
        **_pick(refined, ("logLik", "AIC", "sigma", "fixef", "vcov")),
        "varcorr": [
            {"group": ":".join(t["group"]), "columns": t["columns"], "cov": t["cov"]}
            for t in refined["random"]
        ],
        "se": [row[i] ** 0.5 for i, row in enumerate(refined["vcov"]["values"])],
    }


def trim_lme(record: Record) -> Record | None:
    """The trimmed record of a plain-residual ``lme`` fit, else None.

    ``us`` becomes ``(terms | group)``, ``diag`` becomes ``(terms || group)``, ``cs`` and ``ident``
    become ``homcs`` and ``homdiag``; an inner factor becomes its interaction with the outer one.
    """
    if record["kind"] != "lme":
        return None
    structure = record["structure"]
    residual, terms = structure["residual"], structure["random"]
    if residual["correlation"] or residual["variance"]:
        return None
    formula = record["fixed"]
    for term in terms:
        effects = re.sub(r"^~\s*", "", term["formula"])
        written = LME_STRUCTURES[term["cov"]].format(effects, ":".join(term["group"]))
        formula += f" + {written}"
    engine = record["results"]
    results = {**_results(engine), **_refined(engine)}
    # nlme's degrees of freedom depend on the design alone.
    results["inner_outer"] = _pick(engine["coef_tests"], ("names", "df"))
    # nlme's REML BIC uses log(n - p), and its objective_at is in another parameterisation.
    for name in ("BIC", "objective_at"):
        results.pop(name, None)
    # nlme names an inner factor alone, and joins the labels by a slash.
    names = {t["group"][-1]: ":".join(t["group"]) for t in terms}
    for block in results["ranef"]:
        block["group"] = names[block["group"]]
        if ":" in block["group"]:
            block["levels"] = [label.replace("/", ":") for label in block["levels"]]
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


def trim_tmb(record: Record) -> Record | None:
    """The trimmed record of a ``glmmTMB`` fit, else None; the first conditional modes only.

    Structures that go by the distance of two times get times that are numbers, not labels.
    """
    if record["kind"] != "glmmTMB":
        return None
    formula = record["formula"]
    if record["structure"]["random"][0]["cov"] in ("ar1", "toep"):
        formula = re.sub(r"\btime\b", "C(t)", formula)
    for name, here in TMB_COLUMNS.items():
        formula = re.sub(rf"\b{name}\b", here, formula)
    engine = record["results"]
    point = engine["objective_at"]
    results = {
        **_pick(engine, ("n", "p", "npar")),
        **_refined(engine),
        "ranef": [
            {
                **_pick(block, ("group", "columns", "n_levels")),
                "levels": block["levels"][:SHOWN_LEVELS],
                "values": block["values"][:SHOWN_LEVELS],
            }
            for block in engine["ranef"]
        ],
        "objective_at": {
            "criterion": point["criterion"],
            "sigma": point["at"]["sigma"],
            "cov": [t["cov"] for t in point["at"]["random"]],
        },
    }
    return {
        **_pick(record, ("id", "kind", "tags", "note", "formula")),
        "formula_py": formula,
        "reml": record["reml"],
        "weights": None,
        "offset": None,
        "contrasts": None,
        "convergence": {"last_newton_step": record["checks"]["last_newton_step"]},
        "checks": _pick(record["checks"], ("engine_distance_in_se", "max_abs_gradient")),
        "results": results,
    }


def _copy_table(source: Path, name: str) -> None:
    """Write the table under ``data/``, compressed if it is large and the same bytes each time."""
    content = source.read_bytes()
    if source.suffix == ".gz":
        content = gzip.decompress(content)
    target = HERE / "data" / f"{name}.csv"
    if len(content) > COMPRESS_FROM:
        (target.parent / f"{name}.csv.gz").write_bytes(gzip.compress(content, 9, mtime=0))
    else:
        target.write_bytes(content)


def main() -> None:
    """Write ``fits/*.json``, ``data/*.csv[.gz]`` and ``datasets.json`` beside this file."""
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
        records = [
            trimmed
            for record in json.loads(path.read_text())["models"]
            for trim in (trim_lmm, trim_lme, trim_tmb, trim_lrt)
            if (trimmed := trim(record)) is not None
        ]
        if not records:
            continue
        # One record per line: compact, and a change of one record is a change of one line.
        lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
        (HERE / "fits" / path.name).write_text(f"[\n{lines}\n]\n")
        table = tables[path.stem]
        _copy_table(source / table["file"], path.stem)
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
