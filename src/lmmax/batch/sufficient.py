"""The statistics of many responses as an object of its own: saved, merged, and fitted again.

They are rows, fewer than those of the data, whose likelihood is that of the data for the model and
all models of fewer terms (:mod:`lmmax.batch.rotation`); so whatever fits rows fits them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..characters import visible
from ..constraints import Settings
from ..design import DataError, Design
from ..fit import check_reml, prepare
from ..frames import as_table, plural
from ..matrices import lone_group
from ..options import EngineName, Missing, Solver
from ..safe import Evaluate
from ..solve import Status
from ..spec import ModelSpec
from . import artifact
from .engines import Engine, Hypothesis, Record, as_identified, empty, engine_of, stacked
from .merging import check_alike, joined, merged
from .parts import Part
from .progress import progress_bar
from .reading import block_size, check_chunk, read_design
from .reasons import failed, reasons, suspects
from .result import BatchFit, hypotheses
from .rotation import ROUNDING, Rotated, Rotation, rotate, rotation
from .selection import selected
from .sources import Chunks, columns, pieces
from .work import PATTERNS, left_out, not_identified


class NoRows:
    """In place of responses by row."""

    def column(self, number: int) -> np.ndarray:
        """Raise, since they are not there.

        Raises:
            DataError: always.
        """
        raise DataError(
            "sufficient statistics have no rows, which a fit of one response with its residuals "
            "and predictions needs: fit the data of that response with lmmax.fit"
        )


@dataclass(frozen=True, eq=False)
class SufficientStatistics:
    """Statistics of many responses, enough to fit them; made by :func:`sufficient_statistics`.

    Attributes:
        responses: names of the responses.
        design: the model, without rows.
        parts: the statistics, one for each set of rows that responses have.
        learnt: by expression of the formula, a hash of what it learnt from the data.
        notes: what a reader should know.
    """

    responses: pd.Index
    design: Design
    parts: tuple[Part, ...]
    learnt: Mapping[str, str]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def n_obs(self) -> np.ndarray:
        """Number of rows that each response has, (n,)."""
        found = np.zeros(len(self), dtype=np.int64)
        for part in self.parts:
            found[part.lanes] = part.n_obs
        return found

    @property
    def n_groups(self) -> int | dict[str, int]:
        """Number of levels of the grouping factor; by name if there are several."""
        sizes = {grouping.name: len(grouping.levels) for grouping in self.design.groupings}
        return sizes if len(sizes) > 1 else next(iter(sizes.values()))

    @property
    def nbytes(self) -> int:
        """Size in memory, and about that of the file, in bytes."""
        roots = [g.root.nbytes for g in self.design.groupings if g.root is not None]
        return sum(sum(a.nbytes for a in part.arrays.values()) for part in self.parts) + sum(roots)

    def __repr__(self) -> str:
        rows = max((part.n_obs for part in self.parts), default=0)
        bytes_ = self.nbytes
        size = f"{bytes_ / 1e6:.1f} MB" if bytes_ >= 1e5 else f"{bytes_ / 1e3:.1f} kB"
        groups = ", ".join(
            f"{plural(len(g.levels), 'group')} of {g.name}" for g in self.design.groupings
        )
        return visible(
            f"<lmmax.SufficientStatistics {self.design.spec.formula!r}: "
            f"{plural(len(self), 'response')}, {plural(rows, 'row')}, {groups}; {size}>"
        )

    # --- fits -------------------------------------------------------------------------------

    def fit(
        self,
        formula: str | ModelSpec | None = None,
        *,
        columns: Collection[str] | None = None,
        reml: bool = True,
        tests: Mapping[str, Any] | None = None,
        solver: Solver = "auto",
        tol: float | None = None,
        max_steps: int | None = None,
        engine: EngineName = "auto",
        progress: bool = False,
    ) -> BatchFit:
        """Fit the responses, as `fit_many` does.

        Args:
            formula: the model, of terms of that of the statistics: fewer fixed effects, fewer
                random terms or effects, another covariance structure; None for the same model.
            columns: names of the columns of X to keep, of all if None.
            reml: as in :func:`lmmax.fit_many`, like all that follow.
            tests: hypotheses.
            solver: "auto", "newton" or "lbfgs".
            tol: largest Newton decrement that counts as converged.
            max_steps: most solver steps.
            engine: form of the likelihood.
            progress: show a progress bar.

        Returns:
            The fits.  ``batch[i]`` raises, as there are no rows.  Without an intercept, a constant
            response is called ``explained``.

        Raises:
            DataError: for a term or column that the statistics do not have.

        Example:
            >>> import lmmax
            >>> sleep = lmmax.datasets.load("sleepstudy")
            >>> model = "~ Days + (1 + Days | Subject)"
            >>> statistics = lmmax.sufficient_statistics(model, sleep, ["Reaction"])
            >>> statistics.fit().params.round(3)
                      Intercept    Days
            Reaction    251.405  10.467
            >>> statistics.fit("~ Days + (1 | Subject)").llf.round(3)
            Reaction   -893.233
            Name: llf, dtype: float64
        """
        settings = Settings(
            reml=check_reml(reml), solver=solver, tol=tol, max_steps=max_steps, engine=engine
        )
        model = selected(self.design, formula, columns)
        asked = hypotheses(tests, model.x_names)
        width = sum(len(block.names) for block in model.blocks)
        kept = [self.design.x_names.index(name) for name in model.x_names]
        rest = np.setdiff1d(np.arange(len(self.design.x_names)), kept)
        records, lanes, names = [], [], []
        apart: tuple[str, ...] = ()
        with progress_bar(len(self), progress) as bar:
            for part in self.parts:
                whole = part.rows(self.design)
                own = self._engine(selected(whole, formula, columns), part, rest, settings, asked)
                names.append("nothing can be fitted" if own is None else own.name)
                apart += not_identified(own)
                size = block_size(None, max(len(part.X), 1))
                for first in range(0, len(part.lanes), size):
                    here = slice(first, first + size)
                    count = len(part.lanes[here])
                    if own is None:
                        none = empty(count, len(kept), width, len(asked))
                        records.append(failed(none, np.arange(count), Status.TOO_FEW))
                    else:
                        records.append(self._fitted(own, part, here, kept, rest))
                    lanes.append(part.lanes[here])
                    bar.update(count)
        order = np.argsort(np.concatenate(lanes), kind="stable")
        record = Record(*(leaf[order] for leaf in stacked(records)))
        largest = int(np.argmax([len(part.lanes) for part in self.parts]))
        return BatchFit(
            names=self.responses,
            record=record,
            design=model,
            settings=settings,
            hypotheses=asked,
            n_obs=self.n_obs,
            engine=names[largest],
            notes=(*self.notes, *dict.fromkeys(apart), "fitted from sufficient statistics"),
            source=NoRows(),
        )

    def _fitted(
        self, engine: Engine, part: Part, here: slice, kept: list[int], rest: np.ndarray
    ) -> Record:
        """Fit some responses of a part; those that cannot be fitted have a status that says why."""
        record = engine.fit(_around(part, here, rest).T, part.origin[here][:, kept])
        lanes = suspects(record, part.X[:, kept])
        if not lanes.size:
            return record
        own = replace(part, y=part.y[here][lanes], origin=part.origin[here][lanes])
        why = reasons((own.y + own.origin @ part.X.T).T, part.X[:, kept])
        intercept = self.design.terms.intercept
        if intercept is not None:
            others = np.delete(np.arange(len(self.design.x_names)), intercept.columns)
            varies = own.y.any(axis=1) | _left(own, slice(None), others).any(axis=1)
            why[~varies] = Status.CONSTANT
        unfit = why != Status.NOT_FINITE
        return failed(record, lanes[unfit], why[unfit])

    def _engine(
        self,
        design: Design,
        part: Part,
        rest: np.ndarray,
        settings: Settings,
        asked: tuple[Hypothesis, ...],
    ) -> Engine | None:
        """Return what fits the responses of a part; None if nothing can."""
        if not part.n_obs or lone_group(design.groupings, design.blocks) is not None:
            return None
        lead = _lead(part)
        y = _around(part, slice(lead, lead + 1), rest)[0]
        y = y + part.X @ np.where(np.isin(np.arange(part.X.shape[1]), rest), 0, part.origin[lead])
        try:
            prepared = prepare(replace(design, y=y), settings.engine, settings)
            return as_identified(engine_of(prepared, settings, asked), prepared, settings, asked)
        except DataError:
            if len(self.parts) == 1:
                raise
            return None

    # --- merging ----------------------------------------------------------------------------

    def merge(
        self,
        *others: SufficientStatistics,
        distinct: bool | Collection[str] = False,
        relmat: Mapping[str, pd.DataFrame] | None = None,
    ) -> SufficientStatistics:
        """Return the statistics of all rows together, of cohorts or sites.

        Levels with one label are the same group wherever they occur; the others are new groups.

        Args:
            others: statistics of the same model and responses, in any order of these.
            distinct: True, or names of grouping factors, where equal labels mean different groups:
                they become ``"label [1]"``, ``"label [2]"`` and so on, by position.
            relmat: relationship matrices of the levels of all together, of factors that have one.

        Returns:
            The statistics that the data would have given in one piece.

        Raises:
            DataError: if models, columns, codings or responses differ; the message says in what.

        Example:
            >>> import lmmax
            >>> pigs = lmmax.datasets.load("dietox")
            >>> late = pigs["Time"] > 6
            >>> parts = [
            ...     lmmax.sufficient_statistics("~ Time + (1 | Pig)", pigs[rows], ["Weight"])
            ...     for rows in (late, ~late)
            ... ]
            >>> merged = parts[0].merge(parts[1])
            >>> merged.n_groups, merged.n_obs.tolist()
            (72, [861])
            >>> merged.fit().llf.round(4).item()
            -2404.7753
        """
        every = (self, *others)
        for number, other in enumerate(others, start=2):
            if not isinstance(other, SufficientStatistics):
                raise TypeError(
                    f"merge takes SufficientStatistics, not {type(other).__name__} (number "
                    f"{number})"
                )
            check_alike(self, other, number)
        design, moves = joined([each.design for each in every], distinct, relmat)
        positions = [each.responses.get_indexer(self.responses) for each in every]
        which = np.stack(
            [each._part_of()[at] for each, at in zip(every, positions, strict=True)], axis=1
        )
        parts = []
        for combination in np.unique(which, axis=0):
            lanes = np.flatnonzero((which == combination).all(axis=1))
            pieces = []
            for each, at, move, number in zip(every, positions, moves, combination, strict=True):
                part = each.parts[number]
                codes = np.stack([new[old] for new, old in zip(move, part.codes, strict=True)])
                mine = np.searchsorted(part.lanes, at[lanes])
                if part.n_obs:
                    pieces.append((replace(part, codes=codes), mine))
            parts.append(merged(lanes, pieces, self.parts[combination[0]]))
        notes = [f"part {i}: {note}" for i, each in enumerate(every, 1) for note in each.notes]
        notes.insert(0, f"merged from {len(every)} parts")
        return SufficientStatistics(self.responses, design, tuple(parts), self.learnt, tuple(notes))

    def _part_of(self) -> np.ndarray:
        """Return the part that each response is in, (n,)."""
        found = np.zeros(len(self), dtype=np.int64)
        for number, part in enumerate(self.parts):
            found[part.lanes] = number
        return found

    # --- files ------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the statistics to a file, arrays and names only; `load` reads it anywhere.

        Args:
            path: name of the file, ``.npz`` by custom.

        Raises:
            DataError: for what such a file cannot hold: labels that are neither numbers nor text,
                a covariance structure of your own.
        """
        about, arrays = artifact.described(self.design)
        about |= {"learnt": dict(self.learnt), "notes": self.notes, "parts": len(self.parts)}
        arrays["responses"] = artifact.labels_array(self.responses, "the names of the responses")
        for number, part in enumerate(self.parts):
            arrays |= {f"{name}_{number}": array for name, array in _prefixed(part)}
        artifact.write(path, about, arrays)

    @staticmethod
    def load(path: str | Path) -> SufficientStatistics:
        """Read statistics that `save` wrote; nothing in the file is executed.

        Args:
            path: name of the file.

        Raises:
            DataError: if it is another file, damaged, or of a later version.

        Example:
            >>> import lmmax, pathlib, tempfile
            >>> sleep = lmmax.datasets.load("sleepstudy")
            >>> model = "~ Days + (1 | Subject)"
            >>> statistics = lmmax.sufficient_statistics(model, sleep, ["Reaction"])
            >>> with tempfile.TemporaryDirectory() as here:
            ...     statistics.save(pathlib.Path(here) / "sleep.npz")
            ...     again = lmmax.SufficientStatistics.load(pathlib.Path(here) / "sleep.npz")
            >>> again
            <lmmax.SufficientStatistics 'response ~ Days + (1 | Subject)': 1 response, 180 rows, \
18 groups of Subject; 0.8 kB>
        """
        about, arrays = artifact.read(path)
        names = [*list(Part.__dataclass_fields__)[:-2], "sizes"]
        return SufficientStatistics(
            artifact.labels_index(arrays["responses"]),
            artifact.rebuilt(about, arrays),
            tuple(
                Part.of({name: arrays[f"part_{name}_{number}"] for name in names})
                for number in range(about["parts"])
            ),
            about["learnt"],
            tuple(about["notes"]),
        )


def _prefixed(part: Part) -> Iterable[tuple[str, np.ndarray]]:
    return ((f"part_{name}", array) for name, array in part.arrays.items())


def _around(part: Part, here: slice, rest: np.ndarray) -> np.ndarray:
    """Return some responses around the part of their origin that a smaller model has.

    Args:
        part: the statistics.
        here: which of its responses.
        rest: positions of the columns of X that the model lacks.
    """
    return part.y[here] + _left(part, here, rest) if rest.size else part.y[here]


def _left(part: Part, here: slice, columns: np.ndarray) -> np.ndarray:
    """Return what some columns of X contribute to the origin of responses, zero if rounding."""
    origin = part.origin[here]
    own = origin[:, columns] @ part.X[:, columns].T
    whole = np.abs(origin) @ np.linalg.norm(part.X, axis=0)
    return np.where((np.linalg.norm(own, axis=1) <= ROUNDING * whole)[:, None], 0.0, own)


def _lead(part: Part) -> int:
    """Return the first response that varies, which lends the others a start; else the first."""
    for lane, y in enumerate(part.y):
        if np.isfinite(y[-1:]).all() and y.any():
            return lane
    return 0


def sufficient_statistics(
    formula: str | ModelSpec,
    data: Any,
    responses: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, Any] | None = None,
    relmat: Mapping[str, pd.DataFrame] | None = None,
    missing: Missing = "drop",
    chunk: int | None = None,
    progress: bool = False,
    context: Mapping[str, Any] | None = None,
    evaluate: Evaluate = "python",
) -> SufficientStatistics:
    """Reduce many responses to what their fits need, to be saved, merged and fitted again.

    A formula is code: its expressions run as Python.  For text of others use ``evaluate="safe"``.

    Each group keeps as many numbers of a response as it has random effects, or each combination of
    levels that occurs with several grouping factors; the number of rows does not matter.  Fits from
    the statistics are those of the rows, to rounding, also of models with fewer terms and by
    maximum likelihood.  No row can be told from them where groups have more rows than effects.

    Args:
        formula: the largest model, ``"~ age * sex + (1 + age | subject)"``.
        data: the covariates and groups, n rows.  For parts that are to be merged, a factor of which
            some part lacks a level must be a pandas categorical with the levels of all.
        responses: the responses, as in :func:`lmmax.fit_many`, read a block at a time.  Those that
            lack the same rows share the designs' part of the statistics.
        weights: prior weights, as in :func:`lmmax.fit`; like all that follow.
        offset: known part of the mean.
        contrasts: coding per factor.
        relmat: relationship matrices by grouping factor.
        missing: "drop" rows whose covariates are missing, or "raise".
        chunk: responses worked on at once; by their size if None.
        progress: show a progress bar (needs tqdm).
        context: names for use in the formula.
        evaluate: "python", for which a formula is code, or "safe" for formulas of others: only
            columns, arithmetic, elementwise functions of NumPy and the transforms.

    Returns:
        The statistics.

    Raises:
        DataError: if the responses have another number of rows than the data, and as for
            :func:`lmmax.fit`.

    Example:
        >>> import lmmax
        >>> sleep = lmmax.datasets.load("sleepstudy")
        >>> model = "~ Days + (1 + Days | Subject)"
        >>> statistics = lmmax.sufficient_statistics(model, sleep, ["Reaction"])
        >>> statistics.fit(reml=False, tests={"steep": "Days = 10"}).test("steep").round(3)
                  estimate  std err    df      t      p
        Reaction    10.467    1.502  18.0  0.311  0.759

    Source: for the rows that a group shrinks to, Pinheiro and Bates (2000), Mixed-Effects Models in
    S and S-PLUS, section 2.2.3.
    """
    check_chunk(chunk)
    options = {
        "weights": weights,
        "offset": offset,
        "contrasts": contrasts,
        "relmat": relmat,
        "missing": missing,
        "context": context,
        "evaluate": evaluate,
        "whole": False,  # what is too little to be fitted may be merged with more
    }
    design, rows = read_design(formula, data, **options)
    source = columns(responses, as_table(data), rows)
    found = _Reduced(design)
    with progress_bar(None if isinstance(source, Chunks) else len(source.names), progress) as bar:
        for piece in pieces(source, block_size(chunk, len(design.y))):
            found.add(piece.first, piece.read())
            bar.update(len(piece.names))
    parts = found.parts()
    n_obs = np.concatenate([np.full(len(part.lanes), part.n_obs) for part in parts])
    notes = left_out(design, n_obs, "response")
    return SufficientStatistics(source.names, _without_rows(design), parts, _learnt(design), notes)


@dataclass(eq=False)
class _Reduced:
    """Statistics in the making, by pattern of missing values.

    Attributes:
        design: the design.
        rotations: how the rows of some patterns are rotated.
        done: per pattern, its responses, block by block.
        shared: per pattern, what they share.
    """

    design: Design
    rotations: dict[bytes, Rotation | None] = field(default_factory=dict)
    done: dict[bytes, list[tuple[np.ndarray, Rotated]]] = field(default_factory=dict)
    shared: dict[bytes, dict[str, Any]] = field(default_factory=dict)

    def add(self, first: int, y: np.ndarray) -> None:
        """Reduce a block of responses, of which the first is number `first`."""
        if self.design.offset is not None:
            y = y - self.design.offset[:, None]
        gone = np.isnan(y)
        if not gone.any():
            self._add(b"", np.arange(len(y)), first + np.arange(y.shape[1]), y)
            return
        packed = np.packbits(gone, axis=0)
        keys, which = np.unique(packed, axis=1, return_inverse=True)
        for number in range(keys.shape[1]):
            lanes = np.flatnonzero(which.reshape(-1) == number)
            rows = np.flatnonzero(~gone[:, lanes[0]])
            key = keys[:, number].tobytes() if len(rows) < len(y) else b""
            self._add(key, rows, first + lanes, y[np.ix_(rows, lanes)])

    def _add(self, key: bytes, rows: np.ndarray, lanes: np.ndarray, y: np.ndarray) -> None:
        turned = self._rotation(key, rows)
        if turned is None:
            p = self.design.X.shape[1]
            found = Rotated(np.zeros((len(lanes), 0)), np.zeros((len(lanes), p)))
        else:
            found = rotate(turned, y)
        self.done.setdefault(key, []).append((lanes, found))

    def _rotation(self, key: bytes, rows: np.ndarray) -> Rotation | None:
        if key not in self.rotations:
            if len(self.rotations) >= PATTERNS:
                self.rotations.pop(next(iter(self.rotations)))
            self.rotations[key] = self._analysed(key, rows)
        return self.rotations[key]

    def _analysed(self, key: bytes, rows: np.ndarray) -> Rotation | None:
        design, weights = self.design, self.design.weights
        Z = np.concatenate([block.Z[rows] for block in design.blocks], axis=1)
        codes = np.stack([grouping.codes[rows] for grouping in design.groupings])
        X, own = design.X[rows], None if weights is None else weights[rows]
        found = rotation(X, Z, codes, len(rows), own) if len(rows) else None
        self.shared[key] = {
            "X": X if found is None else found.X,
            "Z": Z if found is None else found.Z,
            "codes": codes if found is None else found.codes,
            "n_obs": len(rows),
            "log_weights": 0.0 if own is None else float(np.log(own).sum()),
        }
        return found

    def parts(self) -> tuple[Part, ...]:
        """Return the statistics; the complete responses first."""
        found = []
        for key in sorted(self.done):
            blocks = self.done.pop(key)
            found.append(
                Part(
                    lanes=np.concatenate([lanes for lanes, _ in blocks]),
                    y=np.concatenate([block.y for _, block in blocks]),
                    origin=np.concatenate([block.origin for _, block in blocks]),
                    **self.shared[key],
                )
            )
        return tuple(found)


def _without_rows(design: Design) -> Design:
    """Return a design with names and levels, but no row, and nothing that remembers the data."""
    none = np.zeros(0, dtype=np.int64)
    return replace(
        design,
        y=np.zeros(0),
        X=np.zeros((0, len(design.x_names))),
        blocks=tuple(replace(b, Z=np.zeros((0, len(b.names)))) for b in design.blocks),
        groupings=tuple(replace(grouping, codes=none) for grouping in design.groupings),
        weights=None,
        offset=None,
        index=pd.RangeIndex(0),
        _recipe=artifact.NoRecipe(),
    )


def _learnt(design: Design) -> dict[str, str]:
    """Return a hash of what each expression of a formula learnt from the data, as `scale(x)`.

    What `x - x.mean()` takes from the rows is not known, so its hash is that of all it gave.
    """
    state = getattr(design._recipe, "transforms", {})
    told = {str(text): repr(_plain(value)) for text, value in state.items() if value}
    for text in getattr(design._recipe, "of_other_rows", ()):
        told[text] = repr([block.tolist() for block in (design.X, *(b.Z for b in design.blocks))])
    return {text: sha256(value.encode()).hexdigest() for text, value in told.items()}


def _plain(state: Any) -> Any:
    """Return nested values as lists and numbers, of which equal ones read alike everywhere."""
    if isinstance(state, Mapping):
        return sorted((str(name), _plain(value)) for name, value in state.items())
    if isinstance(state, list | tuple):
        return [_plain(value) for value in state]
    return state.tolist() if isinstance(state, np.ndarray | np.generic) else str(state)
