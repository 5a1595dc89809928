"""Rows that stand for those of the data, with all responses that have the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ..design import Design
from ..levels import Grouping


@dataclass(frozen=True, eq=False)
class Part:
    """Rotated rows of the responses that have the same rows.

    Attributes:
        lanes: positions of the responses, ascending, (k,).
        X: fixed-effects design, (N, p).
        Z: columns of all random terms, (N, q).
        codes: level of each grouping factor, (factors, N).
        y: what is left of the responses around their origin, (k, N).
        origin: coefficients that were taken out, (k, p).
        n_obs: number of rows of the data that they stand for.
        log_weights: sum of the logarithms of the prior weights.
    """

    lanes: np.ndarray
    X: np.ndarray
    Z: np.ndarray
    codes: np.ndarray
    y: np.ndarray
    origin: np.ndarray
    n_obs: int
    log_weights: float

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What it holds, by name."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return {**found, "sizes": np.array([self.n_obs, self.log_weights])}

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray]) -> Part:
        """Return the part that holds such arrays."""
        rest = dict(arrays)
        n_obs, log_weights = rest.pop("sizes").tolist()
        return Part(**rest, n_obs=int(n_obs), log_weights=log_weights)

    def rows(self, design: Design) -> Design:
        """Return a design without rows with those of the part, levels without rows left out."""
        blocks, at = [], 0
        for block in design.blocks:
            here = slice(at, at + len(block.names))
            blocks.append(replace(block, Z=np.asfortranarray(self.Z[:, here])))
            at = here.stop
        return replace(
            design,
            y=np.zeros(len(self.X)),
            X=np.asfortranarray(self.X),
            blocks=tuple(blocks),
            groupings=tuple(
                _with_rows(grouping, codes)
                for grouping, codes in zip(design.groupings, self.codes, strict=True)
            ),
            index=pd.RangeIndex(len(self.X)),
            n_zero=self.n_obs - len(self.X),
            log_weights=self.log_weights,
        )


def _with_rows(grouping: Grouping, codes: np.ndarray) -> Grouping:
    if grouping.root is not None:  # related levels stay, with or without rows
        return replace(grouping, codes=codes)
    kept, codes = np.unique(codes, return_inverse=True)
    return replace(grouping, codes=codes.astype(np.int64), levels=grouping.levels[kept])
