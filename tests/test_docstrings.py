"""Every example in a public docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import io
import pkgutil

import pytest

import lmmax


def public_modules() -> list[str]:
    names = [info.name for info in pkgutil.walk_packages(lmmax.__path__, "lmmax.")]
    return ["lmmax", *(n for n in names if not any(p.startswith("_") for p in n.split(".")))]


def is_public(name: str) -> bool:
    return not any(p.startswith("_") and not p.endswith("__") for p in name.split("."))


def examples() -> list[doctest.DocTest]:
    found = []
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in public_modules():
        tests = finder.find(importlib.import_module(name), name)
        found += [test for test in tests if test.examples and is_public(test.name)]
    return found


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_docstring(example: doctest.DocTest) -> None:
    report = io.StringIO()
    result = doctest.DocTestRunner(verbose=False).run(example, out=report.write)
    assert result.attempted
    assert not result.failed, report.getvalue()


@pytest.mark.parametrize("name", ["lmmax.fit.fit", "lmmax.fit.fit_arrays", "lmmax.results.Fit"])
def test_the_main_entry_points_have_examples(name: str) -> None:
    assert name in {example.name for example in examples()}
