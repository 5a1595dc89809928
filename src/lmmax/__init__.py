"""Linear mixed-effects models in JAX."""

from . import datasets as datasets
from . import functional as functional
from .compress import EngineError as EngineError
from .constraints import ConstraintError as ConstraintError
from .design import DataError as DataError
from .fit import ConvergenceWarning as ConvergenceWarning
from .fit import RankWarning as RankWarning
from .fit import fit as fit
from .fit import fit_arrays as fit_arrays
from .formula import FormulaError as FormulaError
from .formula import parse_formula as parse_formula
from .inference.denominator import HypothesisError as HypothesisError
from .inference.information import conditional_aic as conditional_aic
from .inference.information import information as information
from .inference.information import joint_covariance as joint_covariance
from .results import Fit as Fit
from .results import load as load
from .spec import ModelSpec as ModelSpec
from .spec import RandomTerm as RandomTerm

__version__ = "0.1.0"
