"""The public names, and that those imported late are there."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types

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
assert not {"jax", "numpy", "pandas"} & set(sys.modules)
import lmmax.fit, lmmax.simulate
from lmmax.fit import prepare
assert callable(lmmax.bootstrap) and "lmmax.batch" in sys.modules
for name in ("simulate", "fit", "bootstrap", "profile", "robust", "anova", "information"):
    assert callable(getattr(lmmax, name)), name
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_package_is_a_module_like_others() -> None:
    """For what asks for its class, and for cloudpickle, which pickles modules by their name."""
    assert isinstance(lmmax, types.ModuleType)
    assert pickle.loads(pickle.dumps(lmmax)) is lmmax
    assert isinstance(lmmax.datasets, types.ModuleType)
    assert set(dir(lmmax)) == set(lmmax.__all__)


def test_names_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    original = lmmax.fit
    monkeypatch.setattr(lmmax, "fit", len)
    assert lmmax.fit is len
    monkeypatch.undo()
    assert lmmax.fit is original
