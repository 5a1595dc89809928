"""Models that lmmax and statsmodels fit alike, and results of statsmodels at given estimates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.regression.mixed_linear_model as theirs
from statsmodels.tools.sm_exceptions import SingularMatrixWarning

import lmmax.statsmodels as ours

DATA = Path(theirs.__file__).parent / "tests" / "results"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence statsmodels, which warns of every change of its optimizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def simulated(seed: int = 5) -> pd.DataFrame:
    """15 groups of 6 rows: ``v`` nested (labels used again), ``w`` crossed with it in each group,
    ``h1`` and ``h2`` crossed over all rows; ``ys`` has a slope of ``z3`` in each group besides."""
    rng = np.random.default_rng(seed)
    n = 90
    g = np.repeat(np.arange(15), 6)
    x, z1, z2 = rng.normal(size=(3, n))
    v, w = np.tile([0, 0, 1, 1, 2, 2], 15), np.tile([0, 1], 45)
    y = 1.0 + 0.5 * x + rng.normal(size=15)[g] + rng.normal(size=15)[g] * z1
    y += rng.normal(size=45)[3 * g + v] + 0.7 * rng.normal(size=30)[2 * g + w]
    y += 0.5 * rng.normal(size=n)
    h1, h2 = rng.integers(0, 6, n), rng.integers(0, 5, n)
    yc = 1.0 + 0.5 * x + rng.normal(size=6)[h1] + 0.7 * rng.normal(size=5)[h2]
    yc += 0.8 * rng.normal(size=n)
    columns = {"g": g, "x": x, "z1": z1, "z2": z2, "v": v, "w": w, "one": 1, "y": y}
    z3 = rng.normal(size=n)
    ys = y + rng.normal(size=15)[g] * z3
    return pd.DataFrame({**columns, "h1": h1, "h2": h2, "yc": yc, "z3": z3, "ys": ys})


@cache
def table(name: str) -> pd.DataFrame:
    """A table that statsmodels ships."""
    return pd.read_csv(DATA / f"{name}.csv")


def _formula(formula: str, data: Callable[[], pd.DataFrame], **kwargs: Any) -> Any:
    return lambda MixedLM, **more: MixedLM.from_formula(formula, data(), **kwargs, **more)


def _dietox() -> pd.DataFrame:
    return table("dietox")[["Weight", "Time", "Pig"]]


def _arrays(MixedLM: Any, **more: Any) -> Any:
    data = simulated()
    ones = np.ones(len(data))
    exog, exog_re = np.column_stack([ones, data.x]), np.column_stack([ones, data.z1])
    return MixedLM(data.y.to_numpy(), exog, data.g.to_numpy(), exog_re, **more)


def _pandas(MixedLM: Any, **more: Any) -> Any:
    data = simulated()
    exog = data[["x", "z2"]].assign(const=1.0)
    return MixedLM(data.y, exog, data.g, exog_re=data[["z1"]], **more)


def _spec(MixedLM: Any, **more: Any) -> Any:
    """Components by matrices, of unequal width, in arrays."""
    data = simulated()
    mats, names = [], []
    for i in range(15):
        rows = data[data.g == i]
        mats.append(rows[["z1", "z2"]].to_numpy()[:, : 1 + i % 2])
        names.append(["a", "b"][: 1 + i % 2])
    module = ours if MixedLM is ours.MixedLM else theirs
    spec = module.VCSpec(["q"], [names], [mats])
    exog = np.column_stack([np.ones(len(data)), data.x])
    exog_re = np.ones((len(data), 1))
    return MixedLM(data.y.to_numpy(), exog, data.g.to_numpy(), exog_re, exog_vc=spec, **more)


def _default(MixedLM: Any, **more: Any) -> Any:
    data = simulated()
    return MixedLM(data.y.to_numpy(), data[["x"]].to_numpy(), data.g.to_numpy(), **more)


def _lme(number: int) -> Any:
    def make(MixedLM: Any, **more: Any) -> Any:
        data = table(f"lme{number:02d}")
        exog, exog_re = data.filter(like="exog_fe"), data.filter(like="exog_re")
        arrays = data.endog, exog, data.groups, exog_re
        return MixedLM(*(part.to_numpy() for part in arrays), **more)

    return make


_CROSSED = {"h1": "0 + C(h1)", "h2": "0 + C(h2)"}
MODELS: dict[str, Any] = {
    "dietox": _formula("Weight ~ Time", _dietox, groups="Pig"),
    "dietox slopes": _formula("Weight ~ Time", _dietox, groups="Pig", re_formula="~ Time"),
    "pastes": _formula(
        "strength ~ 1",
        lambda: table("pastes"),
        groups="batch",
        re_formula="1",
        vc_formula={"cask": "0 + cask"},
    ),
    "nested": _formula(
        "y ~ x", simulated, groups="g", re_formula="1", vc_formula={"v": "0 + C(v)"}
    ),
    "crossed in groups": _formula(
        "y ~ x",
        simulated,
        groups="g",
        re_formula="~ z1",
        vc_formula={"w": "0 + C(w)", "v": "0 + C(v)"},
    ),
    "numeric columns": _formula(
        "y ~ x", simulated, groups="g", vc_formula={"z": "0 + z1 + z2", "v": "0 + C(v)"}
    ),
    "crossed": _formula("yc ~ x", simulated, groups="one", vc_formula=_CROSSED),
    "sparse": _formula("yc ~ x", simulated, groups="one", vc_formula=_CROSSED, use_sparse=True),
    "arrays": _arrays,
    "pandas": _pandas,
    "spec": _spec,
    "default": _default,
    "lme00": _lme(0),
    "lme01": _lme(1),
    "lme04": _lme(4),
    "lme07": _lme(7),
    "lme11": _lme(11),
}


@cache
def pair(name: str) -> tuple[Any, Any]:
    """The model in lmmax and in statsmodels; tests that change it put it back."""
    make = MODELS[name] if name in MODELS else _lme(int(name[3:]))
    return make(ours.MixedLM), make(theirs.MixedLM)


def fit(model: Any, **kwargs: Any) -> Any:
    """Fit with lmmax; a maximum on the boundary may be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingularMatrixWarning)
        return model.fit(**kwargs)


def prepared(model: Any, reml: bool, use_sqrt: bool = True) -> Any:
    """Set what statsmodels sets in `fit` alone, without which its likelihood fails."""
    model.reml, model.use_sqrt = reml, use_sqrt
    model.cov_pen = model.fe_pen = model._freepat = None
    return model


def their_results(model: Any, result: Any) -> Any:
    """Results of statsmodels at the estimates of lmmax, put together as its `fit` does."""
    prepared(model, result.reml)
    point = result.params_object
    params = theirs.MixedLMParams.from_components(point.fe_params, point.cov_re, vcomp=point.vcomp)
    scale = model.get_scale(params.fe_params, params.cov_re, params.vcomp)
    cov = np.linalg.inv(-model.hessian(params)[0])
    found = theirs.MixedLMResults(model, params.get_packed(False, True), cov / scale)
    given = {
        "params_object": params,
        "fe_params": params.fe_params,
        "cov_re": scale * params.cov_re,
        "cov_re_unscaled": params.cov_re,
        "vcomp": scale * params.vcomp,
        "scale": scale,
        "method": result.method,
        "converged": result.converged,
        "hist": None,
        "reml": result.reml,
        "cov_pen": None,
        "use_sqrt": model.use_sqrt,
        "freepat": None,
        "k_fe": model.k_fe,
        "k_re": model.k_re,
        "k_re2": model.k_re2,
        "k_vc": model.k_vc,
    }
    for name, value in given.items():
        setattr(found, name, value)
    return theirs.MixedLMResultsWrapper(found)
