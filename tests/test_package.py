"""The public names, and that those imported late are there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lmmax


def test_every_name_is_there() -> None:
    names = [name for name in dir(lmmax) if not name.startswith("_")]
    assert {"fit", "anova", "confint", "bootstrap", "robust", "profile", "simulate"} <= set(names)
    for name in names:
        assert getattr(lmmax, name) is not None
    with pytest.raises(AttributeError, match="module 'lmmax' has no attribute 'anovas'"):
        _ = lmmax.anovas


def test_inference_is_imported_when_it_is_used() -> None:
    """In any order, and functions stay functions although modules bear their names."""
    code = """
import sys
import lmmax
assert "lmmax.inference.robust" not in sys.modules
assert "lmmax.batch" not in sys.modules
assert callable(lmmax.bootstrap) and "lmmax.batch" in sys.modules
for name in ("simulate", "fit", "bootstrap", "profile", "robust", "anova", "information"):
    assert callable(getattr(lmmax, name)), name
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
