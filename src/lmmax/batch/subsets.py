"""One model for each subset of the rows: what ``fit_many(..., by=)`` fits.

The design is that of all rows, so that subsets share columns, names and contrasts.  With one
grouping factor, and without structures, subsets are compressed together (:mod:`lmmax.batch.pooled`)
and solved side by side; other models are fitted one subset after the other.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd

from ..compress import compress, layout
from ..compress.rows import SMALLEST_BUCKET
from ..constraints import Settings, TermColumns, read_constraints
from ..design import DataError, Design, build_design
from ..far_apart import unclear_lanes
from ..fit import (
    arrange,
    check_identified,
    warn_of_steps,
    without_offset,
)
from ..formula import parse_formula
from ..frames import Table, as_table, in_rows_of, plural, read_columns, unknown_column
from ..levels import as_categories
from ..matrices import lone_group
from ..parameters import pack_triangle
from ..results import Fit
from ..solve import NEWTON_LIMIT, Status
from ..spec import ModelSpec
from . import Solved
from .engines import Hypothesis, Record, empty, fitted_alone, put, record_of, record_of_lanes
from .pooled import FIELDS, Pooled, Rows, alone, joined, pooled
from .reasons import failed, reasons
from .rows import subset
from .seals import fingerprint, parts_of
from .solve import Ends, Lanes, in_user_units, snapped, solve
from .work import dropped_columns, remembered

SUBSETS = 4096
"""Most subsets that are worked on at once."""
PASS_NUMBERS = 1 << 21
"""Most numbers in an array of one pass over the rows of several subsets."""
LARGE = 2048
"""Subsets of more groups gain nothing from company."""
CURVED = 1e-8
"""Smallest curvature, in units of the diagonal, that is no rounding error."""
STEADY = 1e-4
"""Smallest root of a curvature in natural units, in which a real one is about one, that is none."""


@dataclass(frozen=True, eq=False)
class Subsets:
    """The response, subset by subset; stands where :class:`lmmax.batch.sources.Columns` does.

    Attributes:
        names: names of the subsets.
        rows: number of the subset that each row of the design belongs to, (n,).
        design: the design of all rows.
    """

    names: pd.Index
    rows: np.ndarray
    design: Design

    def block(self, first: int, last: int) -> np.ndarray:
        """Return the numbers of some subsets."""
        return np.arange(first, last)

    def column(self, number: int) -> np.ndarray:
        """Return the response of one subset, NaN elsewhere, (n,).

        Raises:
            DataError: if a subset cannot be fitted at all.
        """
        here = self.rows == number
        check_groups(subset(self.design, np.flatnonzero(here), self.design.y[here]))
        return np.where(here, self.design.y, np.nan)


def read_subsets(
    formula: str | ModelSpec, data: Any, by: Any, missing: str, **options: Any
) -> tuple[Design, Subsets]:
    """Build the design of all rows, and tell which subset each belongs to.

    Args:
        formula: the model.
        data: the data.
        by: name of a column, or a list of names.
        missing: "drop" or "raise".
        options: for :func:`lmmax.design.build_design`.

    Raises:
        DataError: if the columns are not there, or have missing values that raise.
    """
    spec = formula if isinstance(formula, ModelSpec) else parse_formula(formula)
    table = as_table(data)
    columns = list(by) if isinstance(by, list | tuple) else [by]
    codes, names = _levels(table, columns)
    lacking = codes < 0
    if lacking.any():
        if missing == "raise":
            raise DataError(
                f"by={by!r} has missing values, in row {int(np.argmax(lacking))} for one: fill "
                "them, or pass missing='drop'"
            )
        if lacking.all():
            raise DataError(f"by={by!r} has missing values only")
    for name in ("weights", "offset"):
        options[name] = in_rows_of(options.get(name), name, table)
    # Rows keep their positions as labels, and get their own back.
    if isinstance(table, pd.DataFrame):
        labels: pd.Index = table.index
        table = table.reset_index(drop=True)
    else:
        labels = pd.RangeIndex(len(codes))
    table, infinite = _made_finite(table, spec.response)
    design = build_design(spec, table, missing=missing, **options)
    warn_of_steps(design)
    design.y[np.isin(design.index, infinite)] = np.inf
    at = np.asarray(design.index, dtype=np.int64)
    kept = np.flatnonzero(~lacking[at])
    if len(kept) < len(at):
        design = subset(design, kept, design.y[kept])
        at = at[kept]
    design = _relabelled(design, labels[at], int(lacking.sum()), columns)
    return design, Subsets(names, codes[at], design)


def _made_finite(table: Table, response: str) -> tuple[Table, np.ndarray]:
    """Return the data without infinite values of the response, and where they were.

    They are the affair of the subset that they are in.
    """
    if response not in table:
        return table, np.zeros(0, dtype=int)
    values = pd.Series(np.asarray(table[response]))
    if values.dtype.kind != "f" or not np.isinf(values).any():
        return table, np.zeros(0, dtype=int)
    infinite = np.isinf(values.to_numpy())
    finite = np.where(infinite, 0.0, values)
    if isinstance(table, pd.DataFrame):
        return table.assign(**{response: finite}), np.flatnonzero(infinite)
    return {**table, response: finite}, np.flatnonzero(infinite)


def _relabelled(design: Design, labels: pd.Index, n_lacking: int, columns: list[Any]) -> Design:
    dropped = dict(design.dropped_by)
    if n_lacking:
        name = ", ".join(map(str, columns))
        dropped[name] = dropped.get(name, 0) + n_lacking
    return replace(design, index=labels, dropped_by=dropped)


def _levels(table: Table, columns: list[Any]) -> tuple[np.ndarray, pd.Index]:
    """Return the number of each row's combination, -1 where one is missing, and the labels."""
    if not columns:
        raise DataError("by=[] names no column")
    for name in columns:
        if not isinstance(name, Hashable):
            raise DataError(
                f"by must be the name of a column of data, or a list of names, and not hold a "
                f"{type(name).__name__}: make it a column of data first"
            )
        if columns.count(name) > 1:
            raise DataError(f"by={columns!r} names {name!r} more than once")
        if name not in table:
            raise unknown_column(str(name), table, f"by={name!r}")
    frame = read_columns(table, columns)
    parts = [as_categories(frame[name]) for name in columns]
    if len(parts) == 1:
        names = parts[0].categories.rename(columns[0])
        return np.asarray(parts[0].codes, dtype=np.int64), names
    cell = np.zeros(len(frame), dtype=np.int64)
    known = np.ones(len(frame), dtype=bool)
    for part in parts:
        cell = cell * len(part.categories) + part.codes
        known &= part.codes >= 0
    codes, found = pd.factorize(np.where(known, cell, -1), sort=True, use_na_sentinel=False)
    if len(found) and found[0] < 0:
        codes, found = codes - 1, found[1:]
    digits = np.unravel_index(np.asarray(found), [len(part.categories) for part in parts])
    levels = [part.categories[digit] for part, digit in zip(parts, digits, strict=True)]
    return codes.astype(np.int64), pd.MultiIndex.from_arrays(levels, names=columns)


def check_groups(design: Design) -> None:
    """Raise if a subset has no rows, or a grouping factor of it one level only."""
    if not len(design.y):
        raise DataError("this subset has no rows, or all of them have missing values")
    grouping = lone_group(design.groupings, design.blocks)
    if grouping is not None:
        raise DataError(
            f"the grouping factor {grouping.name!r} has one level in this subset, from which "
            "no variance can be estimated"
        )


@dataclass(eq=False)
class SubsetWork:
    """Fits blocks of subsets; stands where :class:`lmmax.batch.work.Work` does.

    Attributes:
        design: the design of all rows.
        settings: how to fit.
        tests: what is tested.
        subsets: which rows belong to which subset.
        most_groups: of a subset that is compressed in company; larger ones are compressed one by
            one, which merges groups with the same design.
        terms: the random terms' places; None for those of the design.
    """

    design: Design
    settings: Settings
    tests: tuple[Hypothesis, ...]
    subsets: Subsets
    most_groups: int = SMALLEST_BUCKET
    terms: tuple[TermColumns, ...] | None = None

    @property
    def rows(self) -> np.ndarray:
        """Number of the subset that each row belongs to, (n,)."""
        return self.subsets.rows

    @property
    def n_subsets(self) -> int:
        """Their number."""
        return len(self.subsets.names)

    @property
    def name(self) -> str:
        """How the subsets are fitted."""
        how = "side by side: Newton's method in lanes" if self.together else "one after the other"
        return f"subsets {how}"

    @property
    def width(self) -> int:
        """Number of random effects, q."""
        return sum(block.Z.shape[1] for block in self.design.blocks)

    @cached_property
    def key(self) -> str:
        """The same for the same work, wherever it is done."""
        design, subsets = self.design, self.subsets
        return fingerprint(*parts_of(design), design.y, subsets.rows, self.settings, self.tests)

    @cached_property
    def aliased(self) -> tuple[str, ...]:
        """What no subset has a coefficient of, in words."""
        return dropped_columns(self.design)

    def notes(self, n_obs: np.ndarray) -> tuple[str, ...]:
        """Return what a reader of the results should know.

        Args:
            n_obs: number of rows of each subset.
        """
        found, design = [], self.design
        if design.dropped_by:
            by = ", ".join(f"{name} {count}" for name, count in design.dropped_by.items())
            found.append(f"rows dropped for missing values ({by})")
        gone = int(np.sum(n_obs == 0))
        if gone:
            found.append(f"{plural(gone, 'subset')} without complete rows")
        return tuple(found)

    @cached_property
    def together(self) -> bool:
        """Whether subsets are solved side by side."""
        groupings, settings = self.design.groupings, self.settings
        return (
            len(groupings) == 1
            and groupings[0].root is None
            and settings.engine in ("auto", "grouped")
            and settings.solver in ("auto", "newton")
            and self.width <= NEWTON_LIMIT
            and all(term.pattern is not None for term in self._terms)
        )

    @cached_property
    def _terms(self) -> tuple[TermColumns, ...]:
        return arrange(self.design)[1] if self.terms is None else self.terms

    @cached_property
    def _order(self) -> np.ndarray:
        """Rows by subset, and by group within it."""
        return np.lexsort((self.design.groupings[0].codes, self.rows))

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.bincount(self.rows, minlength=self.n_subsets)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum(self._sizes) - self._sizes

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Number of groups of each subset, and of the rows of its largest."""
        own, codes = self.rows[self._order], self.design.groupings[0].codes[self._order]
        first = np.flatnonzero(np.diff(own, prepend=-1) | np.diff(codes, prepend=codes[:1] - 1))
        largest = np.zeros(self.n_subsets, dtype=np.int64)
        np.maximum.at(largest, own[first], np.diff(first, append=len(own)))
        return np.bincount(own[first], minlength=self.n_subsets), largest

    def _rows(self, number: int) -> np.ndarray:
        start = self._starts[number]
        return np.sort(self._order[start : start + self._sizes[number]])

    def done(self, numbers: np.ndarray) -> tuple[Record, np.ndarray]:
        """Fit some subsets and count their rows."""
        found = empty(len(numbers), len(self.design.x_names), self.width, len(self.tests))
        place = {int(number): i for i, number in enumerate(numbers)}
        asked, numbers = numbers, numbers[self._finite[numbers]]
        if self.together:
            parts, single = self._compressed(numbers)
            for part in joined(parts):
                records, unclear = self._solved(part)
                for at, record in records:
                    where = [place[int(number)] for number in part.numbers[at]]
                    put(found, where, record)
                single += part.numbers[unclear].tolist()
        else:
            single = [int(number) for number in numbers]
        for number in single:
            try:
                row = record_of(self._fit(number), self.tests)
            except DataError:
                self._refused.add(number)
                continue
            put(found, [place[number]], row)
        return self._with_reasons(found, asked), self._sizes[asked]

    @cached_property
    def _finite(self) -> np.ndarray:
        """Which subsets have finite responses."""
        infinite = self.rows[~np.isfinite(self.design.y)]
        return np.bincount(infinite, minlength=self.n_subsets) == 0

    def _with_reasons(self, found: Record, numbers: np.ndarray) -> Record:
        """Say in the status of subsets that have no fit why."""
        unfit = np.flatnonzero(found.status == Status.NOT_FINITE)
        why = np.empty(unfit.size, dtype=int)
        for i, lane in enumerate(unfit):
            rows = self._rows(numbers[lane])
            own = self.design.y[rows]
            if self.design.offset is not None:
                own = own - self.design.offset[rows]
            why[i] = reasons(own[:, None], self.design.X[rows])[0]
            if why[i] == Status.NOT_FINITE and int(numbers[lane]) in self._refused:
                why[i] = Status.TOO_FEW
        return failed(found, unfit, why) if unfit.size else found

    @cached_property
    def _refused(self) -> set[int]:
        """Subsets that a fit of their own was refused to."""
        return set()

    def _design(self, number: int) -> Design:
        rows = self._rows(number)
        design = subset(self.design, rows, self.design.y[rows])
        check_groups(design)
        return design

    def _fit(self, number: int) -> Fit:
        """Fit one subset on its own."""
        return fitted_alone(self._design(number), self.settings)

    # --- side by side -----------------------------------------------------------------------

    def _compressed(self, numbers: np.ndarray) -> tuple[list[Pooled], list[int]]:
        """Compress subsets; return what can be solved side by side, and what is fitted alone."""
        p, q = self.design.X.shape[1], self.width
        n, (m, largest) = self._sizes, self._groups
        # With groups no larger than this the residual variance may not be identified.
        plain = (n > p) & (m > 1) & (m <= self.most_groups) & (largest > q)
        easy = numbers[plain[numbers]]
        parts: list[Pooled] = []
        passes = np.cumsum(n[easy] * max(p + 1, q) ** 2) // PASS_NUMBERS
        for here in np.split(easy, np.flatnonzero(np.diff(passes)) + 1) if easy.size else []:
            parts += [
                part._replace(numbers=here[part.numbers])
                for part in pooled(self._gathered(here), self._mixed)
            ]
        served = np.concatenate([part.numbers for part in parts]) if parts else easy[:0]
        single = []
        for number in np.setdiff1d(numbers, served).tolist():
            try:
                part = self._alone(number)
            except DataError:
                self._refused.add(number)
                continue
            if part is None:
                single.append(number)
            else:
                parts.append(part)
        return parts, single

    @cached_property
    def _mixed(self) -> list[tuple[slice, bool]]:
        return [
            (term.columns, term.pattern is not None and bool(term.pattern.all()))
            for term in self._terms
        ]

    @cached_property
    def _y(self) -> np.ndarray:
        return without_offset(self.design)

    def _gathered(self, numbers: np.ndarray) -> Rows:
        """Return the rows of some subsets."""
        design, sizes = self.design, self._sizes[numbers]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        take = self._order[np.repeat(self._starts[numbers], sizes) + within]
        return Rows(
            X=design.X[take],
            Z=np.concatenate([block.Z[take] for block in design.blocks], axis=1),
            y=self._y[take],
            weights=None if design.weights is None else design.weights[take],
            groups=design.groupings[0].codes[take],
            sizes=sizes,
        )

    def _alone(self, number: int) -> Pooled | None:
        """Compress one subset as a fit of its own does; None if it is large.

        Raises:
            DataError: if it cannot be fitted.
        """
        design = self._design(number)
        if len(design.groupings[0].levels) > LARGE:
            return None
        factors, terms = arrange(design)
        arranged = layout(design.X, factors, design.weights, self.settings.engine)
        compressed = compress(without_offset(design), arranged, pad=False)
        check_identified(design, arranged, compressed, terms, self.settings)
        self._kept[number] = arranged.fixed.kept
        return alone(number, compressed.problem, compressed.total)

    @cached_property
    def _kept(self) -> dict[int, np.ndarray]:
        """Columns of X that were kept, of subsets that were looked at closely."""
        return {}

    def _solved(self, part: Pooled) -> tuple[list[tuple[np.ndarray, Record]], np.ndarray]:
        """Solve subsets of one shape; return records with their positions among them.

        And the positions of those that other coordinates would show more digits of.
        """
        n, q, every = len(part.numbers), self.width, np.arange(self.design.X.shape[1])
        lanes = Lanes(part.problem, np.zeros((n, q, q)), FIELDS)
        constraints, _ = read_constraints(lanes.one(0), self._terms, self.settings)
        ends = solve(lanes, constraints, self.settings, self._terms, None)
        unclear = unclear_lanes(ends, constraints, self._terms, part.problem.n_obs)
        free = np.append(pack_triangle(np.asarray(constraints.blocks)) > 0.0, True)
        by_columns: dict[tuple[int, ...], list[int]] = {}
        for lane, number in enumerate(part.numbers.tolist()):
            kept = tuple(self._kept.get(number, every).tolist())
            by_columns.setdefault(kept, []).append(lane)
        found = []
        for columns, which in by_columns.items():
            at: np.ndarray = np.array(which)
            kept_columns: np.ndarray = np.array(columns, dtype=int)
            own, mine, p = lanes.take(at), Ends(*(leaf[at] for leaf in ends)), len(columns)
            y_scale = own.values("y_scale")
            origin = own.problem.beta_origin[:, :p] * y_scale[:, None]
            estimates = in_user_units(
                own,
                constraints,
                self.settings,
                self._terms,
                mine,
                origin,
                y_scale,
                kept_columns,
                len(every),
                part.total[at],
            )
            contrasts = own.values("n_obs") - self.settings.reml * p
            enough = np.sum(free) <= contrasts
            natural = _natural_units(mine.D, own.noise)[:, free]
            certain = enough & _curved(mine.hessian[:, free][:, :, free], natural)
            to_user = own.problem.x_inverse[:, :p, :p]
            solved = Solved(
                estimates,
                mine,
                free,
                to_user,
                certain | estimates.singular & enough,
                y_scale,
                snapped(mine, constraints, self._terms, own.noise)[0],
                own.noise,
                np.asarray(constraints.blocks),
            )
            own_record = partial(self._own_record, part.numbers[at])
            found.append((at, record_of_lanes(solved, kept_columns, self.tests, own_record)))
        return found, unclear

    def _own_record(self, numbers: np.ndarray, lane: int) -> Record:
        return record_of(self._fit(int(numbers[lane])), self.tests)

    def __reduce__(self) -> Any:
        parts = (self.design, self.settings, self.tests, self.subsets)
        return remembered, (self.key, SubsetWork, *parts)


def _natural_units(D: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return a natural size of each entry of D's lower triangle, and of s, (n, k + 1)."""
    sd = np.sqrt(np.maximum(np.einsum("nii->ni", D), noise**2))
    rows, columns = np.tril_indices(D.shape[1])
    return np.concatenate([sd[:, rows] * sd[:, columns], np.ones((len(D), 1))], axis=1)


def _curved(hessian: np.ndarray, natural: np.ndarray) -> np.ndarray:
    """Return where the criterion is curved in all directions, (n,).

    Args:
        hessian: its second derivatives, (n, k, k).
        natural: a natural size of each parameter, (n, k), in which rounding is no curvature.
    """
    size = np.sqrt(np.abs(np.einsum("nii->ni", hessian)))
    usable = np.isfinite(hessian).all(axis=(1, 2)) & (size * natural > STEADY).all(axis=1)
    size = np.where(usable[:, None], size, 1.0)
    unit = hessian / (size[:, :, None] * size[:, None, :])
    unit = np.where(usable[:, None, None], unit, np.eye(hessian.shape[1]))
    return usable & (np.linalg.eigvalsh(unit)[:, 0] > CURVED)
