"""A drop-in replacement for the mixed models of statsmodels.

Change the import, and existing code runs on lmmax::

    from lmmax.statsmodels import MixedLM, MixedLMParams, VCSpec, mixedlm

The classes take the arguments and give the results that they do in statsmodels, which must be
installed; this package only translates, and :attr:`MixedLMResults.native` is the lmmax fit with
all that statsmodels does not have.  What differs on purpose is listed in the notebook
``for_statsmodels_users``.

A formula is code, here as in statsmodels, whose engine runs its expressions as Python and has no
safe way: formulas of others are for :func:`lmmax.fit` with ``evaluate="safe"``.

Example:
    >>> import lmmax
    >>> from lmmax.statsmodels import mixedlm
    >>> data = lmmax.datasets.load("dietox")
    >>> result = mixedlm("Weight ~ Time", data, groups="Pig").fit()
    >>> result.fe_params.round(3).to_dict()
    {'Intercept': 15.724, 'Time': 6.943}
    >>> float(result.cov_re.iloc[0, 0].round(3)), round(result.native.llf, 3)
    (40.394, -2404.775)
"""

from importlib.util import find_spec as _find_spec

if _find_spec("statsmodels") is None:
    raise ModuleNotFoundError(
        "lmmax.statsmodels speaks the language of statsmodels, which is not installed: "
        "pip install 'lmmax[statsmodels]'",
        name="statsmodels",
    )

from .components import VCSpec as VCSpec
from .model import MixedLM as MixedLM
from .model import mixedlm as mixedlm
from .params import MixedLMParams as MixedLMParams
from .results import MixedLMResults as MixedLMResults
from .results import MixedLMResultsWrapper as MixedLMResultsWrapper

__all__ = [
    "MixedLM",
    "MixedLMParams",
    "MixedLMResults",
    "MixedLMResultsWrapper",
    "VCSpec",
    "mixedlm",
]
