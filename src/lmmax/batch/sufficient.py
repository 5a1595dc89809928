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

from ..constraints import Settings
from ..design import DataError, Design
from ..fit import check_enough, check_reml, prepare
from ..frames import as_table, listing, plural
from ..levels import Grouping, other_type
from ..relationship import with_relationships
from ..solve import Status
from ..spec import ModelSpec
from . import artifact
from .engines import Engine, Hypothesis, Record, empty, engine_of, stacked
from .progress import progress_bar
from .reading import block_size, read_design
from .reasons import failed
from .result import BatchFit, hypotheses
from .rotation import ROUNDING, Rotated, Rotation, rotate, rotation
from .selection import selected
from .sources import Chunks, columns, pieces
from .work import PATTERNS


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
        groups = ", ".join(
            f"{plural(len(g.levels), 'group')} of {g.name}" for g in self.design.groupings
        )
        return (
            f"<lmmax.SufficientStatistics {self.design.spec.formula!r}: {len(self)} responses, "
            f"{rows} rows, {groups}; {self.nbytes / 1e6:.1f} MB>"
        )

    # --- fits -------------------------------------------------------------------------------

    def fit(
        self,
        formula: str | ModelSpec | None = None,
        *,
        columns: Collection[str] | None = None,
        reml: bool = True,
        tests: Mapping[str, Any] | None = None,
        solver: str = "auto",
        tol: float | None = None,
        max_steps: int | None = None,
        engine: str = "auto",
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
            The fits.  ``batch[i]`` raises, as there are no rows.

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
        with progress_bar(len(self), progress) as bar:
            for part in self.parts:
                whole = part.rows(self.design)
                own = self._engine(selected(whole, formula, columns), part, rest, settings, asked)
                names.append("nothing can be fitted" if own is None else own.name)
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
            notes=(*self.notes, "fitted from sufficient statistics"),
            source=NoRows(),
        )

    def _fitted(
        self, engine: Engine, part: Part, here: slice, kept: list[int], rest: np.ndarray
    ) -> Record:
        """Fit some responses of a part; those that cannot be fitted have a status that says why."""
        y = _around(part, here, rest)
        record = engine.fit(y.T, part.origin[here][:, kept])
        infinite = np.isinf(part.y[here]).any(axis=1)
        explained = ~y.any(axis=1)
        level, intercept = ~part.y[here].any(axis=1), self.design.terms.intercept
        if intercept is not None:
            others = np.delete(np.arange(len(self.design.x_names)), intercept.columns)
            level &= ~_left(part, here, others).any(axis=1)
            if level.any():
                record = failed(record, np.flatnonzero(level), Status.CONSTANT)
            explained &= ~level
        for lanes, why in ((infinite, Status.INFINITE), (explained, Status.EXPLAINED)):
            if lanes.any():
                record = failed(record, np.flatnonzero(lanes), why)
        return record

    def _engine(
        self,
        design: Design,
        part: Part,
        rest: np.ndarray,
        settings: Settings,
        asked: tuple[Hypothesis, ...],
    ) -> Engine | None:
        """Return what fits the responses of a part; None if nothing can."""
        if not part.n_obs or any(len(np.unique(g.codes)) < 2 for g in design.groupings):
            return None
        lead = _lead(part)
        y = _around(part, slice(lead, lead + 1), rest)[0]
        y = y + part.X @ np.where(np.isin(np.arange(part.X.shape[1]), rest), 0, part.origin[lead])
        try:
            prepared = prepare(replace(design, y=y), settings.engine)
            check_enough(design, prepared.layout, prepared.terms, settings)
            return engine_of(prepared, settings, asked)
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
            _check_alike(self, other, number)
        design, moves = _joined([each.design for each in every], distinct, relmat)
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
            parts.append(_merged(lanes, pieces, self.parts[combination[0]]))
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
            <lmmax.SufficientStatistics 'response ~ Days + (1 | Subject)': 1 responses, 180 rows, \
18 groups of Subject; 0.0 MB>
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
    missing: str = "drop",
    chunk: int | None = None,
    progress: bool = False,
    context: Mapping[str, Any] | None = None,
) -> SufficientStatistics:
    """Reduce many responses to what their fits need, to be saved, merged and fitted again.

    Each group keeps as many numbers of a response as it has random effects, or each combination of
    levels that occurs with several grouping factors; the number of rows does not matter.  Fits from
    the statistics are those of the rows, to rounding, also of models with fewer terms and by
    maximum likelihood.  No row can be told from them where groups have more rows than effects.

    Args:
        formula: the largest model, ``"~ age * sex + (1 + age | subject)"``.
        data: the covariates and groups, n rows.
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
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a whole number, at least 1")
    options = {
        "weights": weights,
        "offset": offset,
        "contrasts": contrasts,
        "relmat": relmat,
        "missing": missing,
        "context": context,
    }
    design, rows = read_design(formula, data, **options)
    source = columns(responses, as_table(data), rows)
    found = _Reduced(design)
    with progress_bar(None if isinstance(source, Chunks) else len(source.names), progress) as bar:
        for piece in pieces(source, block_size(chunk, len(design.y))):
            found.add(piece.first, piece.read())
            bar.update(len(piece.names))
    notes = []
    if design.n_dropped:
        notes.append(f"{plural(design.n_dropped, 'row')} dropped for missing covariates")
    parts = found.parts()
    gaps = sum(len(part.lanes) for part in parts if part.n_obs < len(design.y))
    if gaps:
        notes.append(f"{gaps} responses have missing values; each has the rows that it has")
    return SufficientStatistics(
        source.names, _without_rows(design), parts, _learnt(design), tuple(notes)
    )


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
    """Return a hash of what each expression of a formula learnt from the data, as `scale(x)`."""
    state = getattr(design._recipe, "transforms", {})
    return {
        str(text): sha256(repr(_plain(value)).encode()).hexdigest()
        for text, value in state.items()
        if value
    }


def _plain(state: Any) -> Any:
    """Return nested values as lists and numbers, of which equal ones read alike everywhere."""
    if isinstance(state, Mapping):
        return sorted((str(name), _plain(value)) for name, value in state.items())
    if isinstance(state, list | tuple):
        return [_plain(value) for value in state]
    return state.tolist() if isinstance(state, np.ndarray | np.generic) else str(state)


# --- merging --------------------------------------------------------------------------------------


def _check_alike(first: SufficientStatistics, other: SufficientStatistics, number: int) -> None:
    """Raise if statistics are not of the same model and responses."""
    here, there = first.design, other.design
    where = f"part {number} cannot be merged with the first: "
    if there.spec.formula.partition("~")[2] != here.spec.formula.partition("~")[2]:
        raise DataError(f"{where}its model is {there.spec.formula}, not {here.spec.formula}")
    _same_names(here.x_names, there.x_names, f"{where}columns of X", "give all parts a factor's")
    for block, other_block in zip(here.blocks, there.blocks, strict=True):
        what = f"{where}effects of {block.term}"
        _same_names(block.names, other_block.names, what, "give all parts a factor's")
    for mine, yours in zip(
        [here.terms, *(block.terms for block in here.blocks)],
        [there.terms, *(block.terms for block in there.blocks)],
        strict=True,
    ):
        for name in mine.codings:
            if artifact.coding(mine.codings[name]) != artifact.coding(yours.codings[name]):
                raise DataError(f"{where}the contrasts or levels of {name!r} differ")
    for text in {**first.learnt, **other.learnt}:
        if first.learnt.get(text) != other.learnt.get(text):
            raise DataError(
                f"{where}{text!r} learns from the rows of each part, and learnt something else "
                "there: transform the column beforehand, with the same numbers for all parts"
            )
    _same_names(
        list(map(str, first.responses)),
        list(map(str, other.responses)),
        f"{where}responses",
        "give all parts the same",
        order=False,
    )
    if (other.responses.get_indexer(first.responses) < 0).any():
        raise DataError(f"{where}the names of the responses are of another type")


def _same_names(
    mine: Collection[str], yours: Collection[str], what: str, remedy: str, *, order: bool = True
) -> None:
    if (list(mine) == list(yours)) if order else (set(mine) == set(yours)):
        return
    lacks = [name for name in mine if name not in set(yours)]
    more = [name for name in yours if name not in set(mine)]
    found = [f"it lacks {listing(map(repr, lacks), 5)}"] if lacks else []
    found += [f"it has {listing(map(repr, more), 5)} besides"] if more else []
    end = "levels in their data, or merge the data" if "factor" in remedy else "responses"
    raise DataError(
        f"{what} differ: {' and '.join(found) or 'their order is another'}; {remedy} {end}"
    )


def _joined(
    designs: list[Design], distinct: bool | Collection[str], relmat: Any
) -> tuple[Design, list[list[np.ndarray]]]:
    """Return the design with the levels of all parts, and per part and factor their new codes."""
    first = designs[0]
    names = [grouping.name for grouping in first.groupings]
    if isinstance(distinct, bool):
        apart = set(names) if distinct else set()
    else:
        apart = {distinct} if isinstance(distinct, str) else set(distinct)
    for name in sorted(apart.difference(names)):
        raise DataError(
            f"distinct has the name {name!r}, which is no grouping factor; there are "
            f"{listing(map(repr, names))}"
        )
    groupings, moves = [], []
    for at, name in enumerate(names):
        each = [design.groupings[at] for design in designs]
        levels = [
            pd.Index([f"{label} [{part}]" for label in grouping.levels], dtype=object)
            if name in apart
            else grouping.levels
            for part, grouping in enumerate(each, start=1)
        ]
        every = _union(levels, name)
        moves.append([every.get_indexer(own) for own in levels])
        root = _root(each, every, name, relmat)
        groupings.append(Grouping(name, np.zeros(0, dtype=np.int64), every, root))
    joined = with_relationships(groupings, relmat)
    n_dropped = sum(design.n_dropped for design in designs)
    design = replace(first, groupings=joined, n_dropped=n_dropped)
    return design, [list(own) for own in zip(*moves, strict=True)]


def _union(levels: list[pd.Index], name: str) -> pd.Index:
    found = levels[0]
    for more in levels[1:]:
        alike = other_type(more, found)
        if alike is not None:
            raise DataError(
                f"the labels of {name!r} are of different types in the parts ({alike!r} in one): "
                "convert them before the statistics are made"
            )
        found = found.append(more.difference(found, sort=False))
    return found


def _root(each: list[Grouping], levels: pd.Index, name: str, relmat: Any) -> np.ndarray | None:
    """Return the root of the relationship matrix that the parts have in common, if there is one."""
    roots = [grouping.root for grouping in each]
    first = roots[0]
    if all(root is None for root in roots) or name in (relmat or {}):
        return None
    if first is None or any(
        root is None or len(root) != len(levels) or not np.array_equal(root, first)
        for root in roots
    ):
        raise DataError(
            f"the relationship matrices of {name!r} differ between the parts, or have other "
            f"levels: pass relmat={{{name!r}: ...}} with that of all levels together"
        )
    return first


def _merged(lanes: np.ndarray, pieces: list[tuple[Part, np.ndarray]], none: Part) -> Part:
    """Return the statistics of responses whose rows are in several parts.

    Args:
        lanes: the responses.
        pieces: parts with rows, codes those of all together, and where the responses are in each.
        none: a part without rows, if there is no other.
    """
    if not pieces:
        empty_y = np.zeros((len(lanes), 0))
        return replace(none, lanes=lanes, y=empty_y, origin=np.zeros((len(lanes), none.X.shape[1])))
    n_obs = sum(part.n_obs for part, _ in pieces)
    turned = rotation(
        np.concatenate([part.X for part, _ in pieces]),
        np.concatenate([part.Z for part, _ in pieces]),
        np.concatenate([part.codes for part, _ in pieces], axis=1),
        n_obs,
    )
    size = block_size(None, turned.inside.shape[1])
    found, origins = [], []
    for first in range(0, len(lanes), size):
        here = slice(first, first + size)
        origin = pieces[0][0].origin[pieces[0][1][here]]
        rows, known = [], np.zeros(len(lanes[here]))
        for part, mine in pieces:
            own = part.origin[mine[here]]
            rows.append(part.y[mine[here]] + (own - origin) @ part.X.T)
            known += np.einsum("ij,ij->i", own @ part.X.T, own @ part.X.T)
        done = rotate(turned, np.concatenate(rows, axis=1).T, known)
        found.append(done.y)
        origins.append(done.origin + origin)
    return Part(
        lanes=lanes,
        X=turned.X,
        Z=turned.Z,
        codes=turned.codes,
        y=np.concatenate(found),
        origin=np.concatenate(origins),
        n_obs=n_obs,
        log_weights=sum(part.log_weights for part, _ in pieces),
    )
