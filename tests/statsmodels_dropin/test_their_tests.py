"""The tests that statsmodels has for its MixedLM, run with the import replaced.

They are taken from the installed statsmodels: nothing of them is here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import statsmodels.formula.api
import statsmodels.regression.mixed_linear_model as original

import lmmax.statsmodels

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.unoptimised]

NAMES = ("MixedLM", "MixedLMParams", "MixedLMResults", "MixedLMResultsWrapper", "VCSpec")


def _with_replaced_imports() -> ModuleType:
    """Load their module afresh, with the names that it imports replaced."""
    spec = importlib.util.find_spec("statsmodels.regression.tests.test_lme")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for each in NAMES:
            patch.setattr(original, each, getattr(lmmax.statsmodels, each))
        spec.loader.exec_module(module)
    assert module.MixedLM is lmmax.statsmodels.MixedLM
    return module


@pytest.fixture(autouse=True)
def _formula_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what they import while they run, too."""
    monkeypatch.setattr(statsmodels.formula.api, "mixedlm", lmmax.statsmodels.mixedlm)


class _JointHessian(lmmax.statsmodels.MixedLM):
    """Standard errors of coefficients as statsmodels has them, which it does on request."""

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        return super().fit(*args, fe_cov="hessian", **kwargs)


@pytest.fixture
def _their_standard_errors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_theirs, "MixedLM", _JointHessian)
    yield


MARKS = {
    # It asserts printed standard errors that have the cross block with the variances.
    "test_summary_col": pytest.mark.usefixtures("_their_standard_errors"),
    # It asserts the warning that goes with an infinite log-likelihood.
    "test_singular": pytest.mark.xfail(
        strict=True, reason="statsmodels #10239: an infinite likelihood at a variance near zero"
    ),
}
_theirs = _with_replaced_imports()
for _name, _value in list(vars(_theirs).items()):
    if _name.startswith(("test_", "Test")):
        globals()[_name] = MARKS[_name](_value) if _name in MARKS else _value
