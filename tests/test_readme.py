"""The README does what it says: its Python is run, and its outputs compared."""

from __future__ import annotations

import doctest
import io
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmmax
from lmmax.cli import main
from lmmax.design import build_design

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_COMMAND = 'pip install . && lmmax "Weight ~ Time + (1 | Pig)" dietox'
TEST_COMMAND = 'pip install -e ".[test]" && pytest'


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


class Checker(doctest.OutputChecker):
    """Exact, but for spaces at the ends of lines, which pandas prints and editors remove."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        def plain(text: str) -> str:
            return "\n".join(line.rstrip() for line in text.splitlines())

        return super().check_output(plain(want), plain(got), optionflags)


def test_python_blocks() -> None:
    """In order and in one namespace, as a reader would type them."""
    namespace: dict[str, Any] = {}
    report = io.StringIO()
    parser = doctest.DocTestParser()
    runner = doctest.DocTestRunner(Checker(), verbose=False)
    for block in blocks("python"):
        line = README[: README.index(block)].count("\n")
        test = parser.get_doctest(block, namespace, "README", "README.md", line)
        assert test.examples, f"no example in the block at line {line}"
        runner.run(test, out=report.write, clear_globs=False)
        namespace = test.globs
    assert runner.tries > 20
    assert not runner.failures, report.getvalue()


def test_the_tour_shows_the_documented_example() -> None:
    tour = blocks("python")[0]
    for number in ("11.3669", "-2404.7753", "15.724", "6.943", "40.394", "6.939"):
        assert number in tour


def test_commands() -> None:
    assert f"{FIRST_COMMAND}\n" in blocks("bash")
    assert f"{TEST_COMMAND}\n" in blocks("bash")


def test_the_first_command_prints_what_the_tour_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["Weight ~ Time + (1 | Pig)", "dietox"]) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert printed in blocks("python")[0]


def test_links_and_extras_exist() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        headings = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
        assert anchor in {h.lower().replace(" ", "-") for h in headings}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for extra in ("parquet", "plot", "bench", "all", "test"):
        assert extra in extras
        assert f"`{extra}`" in README or f"[{extra}]" in README


def table_rows(heading: str) -> list[list[str]]:
    """Cells of the rows of all tables below a heading; cell 0 is empty."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = []
    for table in re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE):
        lines = table.splitlines()[2:]
        rows += [re.split(r"(?<!\\)\|", line) for line in lines]
    return rows


@pytest.mark.parametrize(
    "text",
    [code for row in table_rows("Formulas") for code in re.findall(r"`([^`]*)`", row[1])],
)
def test_formulas_of_the_tables(text: str) -> None:
    rng = np.random.default_rng(1)
    data: dict[str, Any] = {name: rng.uniform(1.0, 2.0, 60) for name in ("y", "x", "o")}
    data |= {"f": list("uvw") * 20, "g": np.arange(60) // 6, "a": np.arange(60) % 4}
    data["b"] = data["g"]
    text = text.replace("\\|", "|")
    formula = f"y ~ {text}" + ("" if "|" in text else " + (1 | g)")
    spec = lmmax.parse_formula(formula)
    design = build_design(spec, data)
    assert np.isfinite(design.X).all()
    assert all(np.isfinite(block.Z).all() for block in design.blocks)


def test_every_name_in_the_table_exists() -> None:
    """What the table calls lmmax's name for a thing is an attribute of a fit or of the package."""
    names = {
        name
        for row in table_rows("Coming from lme4 or statsmodels")
        for code in re.findall(r"`([^`]*)`", row[4])
        if (match := re.match(r"(\w+)(?:\(|$)", code)) and (name := match[1]) != "_marginal"
    }
    assert len(names) > 20
    for name in names:
        assert hasattr(lmmax, name) or name in dir(lmmax.Fit), name
