"""One piece of work for `fit_many` in several processes.

``python -m tests.streaming DIRECTORY MODEL`` fits a file slowly, so that it can be stopped.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import lmmax
from lmmax.batch.engines import Record

MODELS = {"intercept": "~ x + (1 | g)", "slope": "~ x + (1 + x | g)"}
STORES = {"intercept": "out.zarr", "slope": "out"}
K, CHUNK = 120, 10


def data() -> pd.DataFrame:
    """Unbalanced groups."""
    rng = np.random.default_rng(3)
    codes = np.repeat(np.arange(20), rng.integers(3, 7, size=20))
    return pd.DataFrame({"x": rng.normal(size=len(codes)), "g": codes})


def responses(k: int = K) -> np.ndarray:
    """Responses with two random effects, some of which lack a row, (n, k)."""
    rng = np.random.default_rng(4)
    frame = data()
    u, v = rng.normal(size=(2, 20, k)) * np.array([1.0, 0.8])[:, None, None]
    codes, x = frame["g"].to_numpy(), frame["x"].to_numpy()[:, None]
    y = 3.0 + u[codes] + v[codes] * x + 0.5 * rng.normal(size=(len(codes), k))
    y[4, 5::40] = np.nan
    return y


def fit(model: str, values: Any, **options: Any) -> lmmax.BatchFit:
    """Fit the model, in chunks."""
    return lmmax.fit_many(MODELS[model], data(), values, **{"chunk": CHUNK, **options})


class Sliced:
    """What is sliced like an array and is none, as Zarr is; notes the blocks it is asked for."""

    def __init__(self, values: np.ndarray, seconds: float = 0.0) -> None:
        self.values, self.seconds = values, seconds
        self.shape, self.dtype, self.asked = values.shape, values.dtype, [(0, 0)]

    def __getitem__(self, where: Any) -> np.ndarray:
        time.sleep(self.seconds)
        found = self.values[where]
        self.asked.append(found.shape)
        return found


def fit_file(directory: Path, model: str, resume: bool = False, seconds: float = 0.0) -> None:
    """Fit the responses in a file into a directory beside it; reading a block takes a while."""
    y = Sliced(np.load(directory / "y.npy", mmap_mode="r"), seconds)
    fit(model, y, out=directory / STORES[model], resume=resume)


def on_devices(path: str) -> None:
    """Fit both models on the devices there are, and note results and what was compiled."""
    import jax

    from lmmax.batch import line_fits

    solver = sys.modules["lmmax.batch.solve"]
    y, found, compiled = np.nan_to_num(responses(1500)), {}, []
    compilers = {"intercept": line_fits._compiled, "slope": solver._compiled}
    for model, k in (("intercept", 1500), ("slope", 60)):
        record = fit(model, y[:, :k], chunk=k // 2).record
        found |= {f"{model}.{name}": leaf for name, leaf in record._asdict().items()}
        each = compilers[model]
        compiled += [each._alone.count(), each._shared.count()]
    np.savez(path, devices=jax.local_device_count(), compiled=compiled, **found)


def in_job(number: int, count: int, port: int, directory: str) -> None:
    """Fit both models as one process of a job, and note what it knows in the end."""
    import jax

    jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    here, y = Path(directory), responses()
    found = dict(zip(Record._fields, fit("slope", y[:, :25]).record, strict=True))
    batch = fit("intercept", y, out=here / "out.zarr")
    found |= {"stored": batch.record.params, "rows": batch.n_obs}
    errors = []
    for options in ({"out": here / "out.zarr"}, {"chunk": 7 + number, "out": here / "other"}):
        try:
            fit("intercept", y, **options)
        except ValueError as error:
            errors.append(str(error))
    np.savez(here / f"process-{number}.npz", errors=errors, **found)


if __name__ == "__main__":
    fit_file(Path(sys.argv[1]), sys.argv[2], seconds=0.1)
