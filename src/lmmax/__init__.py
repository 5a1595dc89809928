"""Linear mixed-effects models in JAX."""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# Nothing is imported before it is used: JAX and pandas take ten times as long to import as the
# command line has to answer --help.
if _TYPE_CHECKING:
    from . import compilation_cache as compilation_cache
    from . import covariances as covariances
    from . import datasets as datasets
    from . import functional as functional
    from .batch.exchange import ExchangeError as ExchangeError
    from .batch.many import fit_many as fit_many
    from .batch.plan import Plan as Plan
    from .batch.plan import PlanError as PlanError
    from .batch.plan import plan as plan
    from .batch.resampled import Resampled as Resampled
    from .batch.resampling import resample as resample
    from .batch.result import BatchFit as BatchFit
    from .batch.result import ChangedWarning as ChangedWarning
    from .batch.store import StoreError as StoreError
    from .batch.store import StoreWarning as StoreWarning
    from .batch.stream import LostWorkerWarning as LostWorkerWarning
    from .batch.sufficient import SufficientStatistics as SufficientStatistics
    from .batch.sufficient import sufficient_statistics as sufficient_statistics
    from .compress import EngineError as EngineError
    from .constraints import ConstraintError as ConstraintError
    from .design import DataError as DataError
    from .fit import ConvergenceWarning as ConvergenceWarning
    from .fit import IdentifiabilityWarning as IdentifiabilityWarning
    from .fit import RankWarning as RankWarning
    from .fit import fit as fit
    from .fit import fit_arrays as fit_arrays
    from .formula import FormulaError as FormulaError
    from .formula import parse_formula as parse_formula
    from .inference.anova import anova as anova
    from .inference.bootstrap import BootstrapError as BootstrapError
    from .inference.bootstrap import bootstrap as bootstrap
    from .inference.bootstrap_comparison import bootstrap_test as bootstrap_test
    from .inference.clusters import ClusterError as ClusterError
    from .inference.comparison import ComparisonError as ComparisonError
    from .inference.comparison import drop1 as drop1
    from .inference.comparison import ranova as ranova
    from .inference.confint import confint as confint
    from .inference.denominator import AdjustmentWarning as AdjustmentWarning
    from .inference.denominator import HypothesisError as HypothesisError
    from .inference.information import conditional_aic as conditional_aic
    from .inference.information import information as information
    from .inference.information import joint_covariance as joint_covariance
    from .inference.profile import ProfileWarning as ProfileWarning
    from .inference.profile import profile as profile
    from .inference.robust import robust as robust
    from .inference.scores import sandwich as sandwich
    from .inference.scores import scores as scores
    from .results import Fit as Fit
    from .results import load as load
    from .simulate import simulate as simulate
    from .spec import ModelSpec as ModelSpec
    from .spec import RandomTerm as RandomTerm

__all__ = [
    "AdjustmentWarning",
    "BatchFit",
    "BootstrapError",
    "ChangedWarning",
    "ClusterError",
    "ComparisonError",
    "ConstraintError",
    "ConvergenceWarning",
    "DataError",
    "EngineError",
    "ExchangeError",
    "Fit",
    "FormulaError",
    "HypothesisError",
    "IdentifiabilityWarning",
    "LostWorkerWarning",
    "ModelSpec",
    "Plan",
    "PlanError",
    "ProfileWarning",
    "RandomTerm",
    "RankWarning",
    "Resampled",
    "StoreError",
    "StoreWarning",
    "SufficientStatistics",
    "__version__",
    "anova",
    "bootstrap",
    "bootstrap_test",
    "compilation_cache",
    "conditional_aic",
    "confint",
    "covariances",
    "datasets",
    "drop1",
    "fit",
    "fit_arrays",
    "fit_many",
    "functional",
    "information",
    "joint_covariance",
    "load",
    "parse_formula",
    "plan",
    "profile",
    "ranova",
    "resample",
    "robust",
    "sandwich",
    "scores",
    "simulate",
    "sufficient_statistics",
]

__version__ = "0.1.0"

_NAMES = {
    "batch.exchange": ("ExchangeError",),
    "batch.many": ("fit_many",),
    "batch.plan": ("Plan", "PlanError", "plan"),
    "batch.resampled": ("Resampled",),
    "batch.resampling": ("resample",),
    "batch.result": ("BatchFit", "ChangedWarning"),
    "batch.store": ("StoreError", "StoreWarning"),
    "batch.stream": ("LostWorkerWarning",),
    "batch.sufficient": ("SufficientStatistics", "sufficient_statistics"),
    "compress": ("EngineError",),
    "constraints": ("ConstraintError",),
    "design": ("DataError",),
    "fit": ("ConvergenceWarning", "IdentifiabilityWarning", "RankWarning", "fit", "fit_arrays"),
    "formula": ("FormulaError", "parse_formula"),
    "inference.anova": ("anova",),
    "inference.bootstrap": ("BootstrapError", "bootstrap"),
    "inference.bootstrap_comparison": ("bootstrap_test",),
    "inference.clusters": ("ClusterError",),
    "inference.comparison": ("ComparisonError", "drop1", "ranova"),
    "inference.confint": ("confint",),
    "inference.denominator": ("AdjustmentWarning", "HypothesisError"),
    "inference.information": ("conditional_aic", "information", "joint_covariance"),
    "inference.profile": ("ProfileWarning", "profile"),
    "inference.robust": ("robust",),
    "inference.scores": ("sandwich", "scores"),
    "results": ("Fit", "load"),
    "simulate": ("simulate",),
    "spec": ("ModelSpec", "RandomTerm"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


class _Package(_ModuleType):
    """The package, in which a function keeps its name although a module bears it too."""

    def __setattr__(self, name: str, value: _Any) -> None:
        # Whoever imports lmmax.fit, the module, has the import system put it here as "fit".
        if not (name in _HOME and isinstance(value, _ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[_Any, ...]:
        # What pickles functions with the modules they use knows only modules of the plain class.
        return _import_module, (self.__name__,)


if not _TYPE_CHECKING:
    import sys as _sys

    _sys.modules[__name__].__class__ = _Package

    def __getattr__(name: str) -> _Any:
        if name in _HOME:
            value = getattr(_import_module(f".{_HOME[name]}", __name__), name)
            globals()[name] = value
            return value
        if name in __all__:
            return _import_module(f".{name}", __name__)
        raise AttributeError(f"module 'lmmax' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Without the modules that the names come from, which importing leaves here too.
    return list(__all__)
