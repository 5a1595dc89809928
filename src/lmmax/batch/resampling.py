"""p-values of many fits by permutation and bootstrap, over all responses together as well.

Every replicate estimates the variance components of every response again.  Chunks of responses are
the outer loop and replicates the inner one; a replicate moves the rows of all responses in the
same way, so that their dependence shows in its largest statistic.  What is kept are counts for
each response, and one maximum for each replicate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..design import DataError
from ..files import whole
from ..inference.denominator import HypothesisError
from ..matrices import Design
from ..simulate import check_count, check_seed, generator
from .claim import PATIENCE, Claim, ClaimedError
from .engines import Hypothesis
from .exchange import (
    Exchange,
    ExchangeError,
    ExchangeOn,
    check_blocks,
    exchange_of,
    independent_blocks,
)
from .progress import progress_bar
from .reading import CANDIDATES, block_size, check_chunk, lent
from .replicates import BLOCK, Model, Tester, drawer
from .resampled import TIES, Resampled, score
from .result import BatchFit, hypotheses
from .rows import subset
from .seals import content_of, fingerprint, parts_of
from .sources import Columns
from .subsets import Subsets
from .varied import Varied

METHODS = ("permutation", "wild", "parametric")
ALTERNATIVES = ("two-sided", "greater", "less")
MULTIPLIERS = {
    "rademacher": np.array([-1.0, 1.0]),
    "webb": np.sqrt([0.5, 1.0, 1.5])[[0, 1, 2, 0, 1, 2]] * np.repeat([-1.0, 1.0], 3),
}
FEW_BLOCKS = 12
"""Blocks below which two signs make too few samples for the wild bootstrap."""
CHUNK, TOGETHER = 2048, 8192
"""Responses worked on at once; responses times replicates that are fitted together."""
BLOCK_BYTES = 1 << 26
"""Most bytes of errors that are rearranged together."""
PATTERNS = 64
"""Designs on some of the rows that are kept."""


def resample(
    batch: BatchFit,
    tests: Any = None,
    *,
    method: str = "permutation",
    n: int = 999,
    exchange: str = "auto",
    multipliers: str = "auto",
    alternative: str = "two-sided",
    seed: int = 0,
    chunk: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Resampled:
    """Test hypotheses in every fit of a batch by permutation or bootstrap.

    Each replicate is a response from the reduced model, in which the hypothesis holds, and is
    fitted anew, variance components included.  p-values count the replicates whose statistic is at
    least the observed one, ``(1 + count) / (1 + n)``; those over all responses (family-wise error)
    count the replicates whose largest statistic over the responses is.

    The methods are

    - "permutation" exchanges the residuals of the reduced model, by least squares, in a way that
      leaves the covariance of the model as it is (Freedman and Lane).  If there are few
      rearrangements, each is used once.
    - "wild" multiplies the residuals of each independent group with a random number of mean zero
      and variance one.  It holds for many groups, whatever the covariance in a group.
    - "parametric" draws random effects and residuals from the reduced model, with the variance
      components that each response has there.  Responses are drawn independently: if they depend
      on one another positively, as neighbours in an image do, p-values over all responses are too
      large rather than too small.

    Args:
        batch: the fits, of responses that can be read again.  With ``by=``, ``scan=`` or weights
            that differ by response, each model is analysed by itself, in milliseconds; "all
            responses" are then all subsets, or all models.
        tests: names of coefficients that are zero under the hypothesis, a test for each; or
            hypotheses by name, as in :func:`lmmax.fit_many`.  Those of the batch if None.
        method: "permutation", "wild" or "parametric".
        n: number of replicates.
        exchange: for permutations.  "within" exchanges rows that belong to the same groups and
            have equal random-effects columns; "whole" exchanges independent groups with equal
            designs; "flip" changes the signs of independent groups, whose errors must be
            symmetric.  "auto" takes "within" if nearly all that is tested varies among such rows,
            "whole" if it varies between such groups, "flip" otherwise; the result's notes say which
            and why.  Weights count as part of the design; if they differ by response, only signs
            can be changed.  With ``scan=``, the first model that can be tested decides.
        multipliers: for the wild bootstrap, "rademacher" (a sign), "webb" (six points), or "auto":
            the latter for fewer than 12 groups.
        alternative: "two-sided", "greater" or "less"; the latter two for single combinations.
        seed: of the random numbers.
        chunk: responses worked on at once.  Results do not depend on it.
        out: a file, ``.npz``, that is brought up to date after every chunk.
        resume: go on with what is in `out`, if that is the same work on the same responses by the
            same version of lmmax; all responses are compared.
        progress: show a progress bar (needs tqdm).

    Returns:
        p-values of each response and hypothesis.  A replicate whose fit does not converge counts as
        if it were at least the observed statistic, in both p-values of that response; it takes no
        part in the maximum.  A response that cannot be fitted has NaN, and takes no part either.
        One with missing values keeps them: what is exchanged are the rows that it has.

    Raises:
        ValueError: for an unknown method or option, or one of another method.
        HypothesisError: for a hypothesis that cannot be tested.
        ExchangeError: if the model leaves nothing to be exchanged.
        DataError: if the responses of the batch are not at hand by row, if `out` holds other work,
            or if another run writes to it.

    Example:
        >>> import lmmax, numpy as np
        >>> sleep = lmmax.datasets.load("sleepstudy")
        >>> noise = np.random.default_rng(0).normal(size=(180, 3))
        >>> y = noise + np.outer(sleep["Days"], [0.1, 0.0, 0.0])
        >>> batch = lmmax.fit_many("~ Days + (1 | Subject)", sleep, y)
        >>> found = lmmax.resample(batch, ["Days"], n=199)
        >>> found.test("Days")[["p", "p_fwe"]].round(3)
               p  p_fwe
        0  0.005  0.005
        1  0.025  0.080
        2  0.970  1.000
        >>> found.notes[0]
        "Days: exchange='within' (what is tested varies within groups), 199 random rearrangements"

    Source: Freedman and Lane (1983), J. Bus. Econ. Stat. 1, 292-298; Winkler, Ridgway, Webster,
    Smith and Nichols (2014), NeuroImage 92, 381-397, and (2015) 123, 253-268; Cameron, Gelbach and
    Miller (2008), Rev. Econ. Stat. 90, 414-427, with the null imposed; Webb (2023), Can. J. Econ.
    56, 839-858; Westfall and Young (1993), Resampling-Based Multiple Testing, for maxima.
    """
    if not isinstance(batch, BatchFit):
        raise TypeError(f"resample takes the fits of fit_many, not {type(batch).__name__}")
    _check(method, alternative, exchange, multipliers)
    check_count(n, "n")
    check_seed(seed)
    check_chunk(chunk)
    path = None if out is None else Path(out)
    if path is not None and not path.absolute().parent.is_dir():
        raise DataError(f"out={str(path)!r} is in a directory that does not exist")
    source = batch.source
    if not isinstance(source, Columns | Varied | Subsets):
        raise DataError(
            "resample needs the responses by row, and those of this batch cannot be read again: "
            "fit_many took them from an iterator, or from statistics, or the results were opened "
            "without them; pass it an array or a file, and its result to resample"
        )
    own = _own_designs(batch)
    asked = _asked(batch, tests)
    if alternative != "two-sided" and any(len(test.L) > 1 for test in asked):
        raise ValueError(f"alternative={alternative!r} is for tests of a single combination")
    model = _model_of_all(batch, asked)
    design = model.design
    if isinstance(source, Varied) and source.weights is not None and method == "permutation":
        exchange = _of_other_weights(exchange)
    plans = tuple(
        _plan(model, test, method, n, exchange, multipliers, batch.settings.reml) for test in asked
    )
    run = Run(model, batch.design.offset, plans, alternative, seed)
    size = chunk or min(CHUNK, block_size(None, len(design.y)))
    state = State.empty(len(batch), [plan.n for plan in plans])
    with _claimed(path, resume):
        key = ""
        if path is not None:
            key = _key(batch, asked, method, n, exchange, multipliers, alternative, seed)
            state = state.resumed(path, key, resume)
        total = sum(plan.n + 1 for plan in plans) * (len(batch) - state.done)
        with progress_bar(total, progress) as bar:
            while state.done < len(batch):
                last = min(state.done + size, len(batch))
                if own is None:
                    block = source.block(state.done, last)
                    assert isinstance(block, np.ndarray)
                    run.add(state, run.of_block(block), bar.update)
                else:
                    run.add(state, run.of_models(own, range(state.done, last)), bar.update)
                state.done = last
                if path is not None:
                    state.save(path, key)
    failed = int(state.failed.sum())
    notes = [plan.note for plan in plans]
    if failed:
        notes.append(
            f"{failed} fits of replicates did not converge; each counts as at least the observed"
        )
    return Resampled(
        names=batch.names,
        hypotheses=asked,
        statistic=state.statistic,
        exceeded=state.exceeded,
        failed=state.failed,
        maxima=tuple(state.maxima),
        method=method,
        alternative=alternative,
        notes=tuple(notes),
    )


def _key(batch: BatchFit, asked: Sequence[Hypothesis], *options: Any) -> str:
    """Return a hash of all that the replicates depend on, every response included.

    Args:
        batch: the fits.
        asked: what is tested.
        options: of the resampling.
    """
    source, design = batch.source, batch.design
    contents = []
    if isinstance(source, Columns | Varied):
        # In blocks that do not depend on how many are worked on at once.
        size = block_size(None, len(design.y))
        for first in range(0, len(batch), size):
            last = min(first + size, len(batch))
            contents.append(content_of(batch.names[first:last], source.block(first, last)))
    return fingerprint(
        *parts_of(design),
        design.y,
        getattr(source, "rows", None),
        getattr(source, "columns", None),
        contents,
        *(part for test in asked for part in test),
        repr((batch.settings, *options)),
    )


@contextmanager
def _claimed(path: Path | None, resume: bool) -> Iterator[None]:
    """Let no other run write to a file meanwhile."""
    if path is None:
        yield
        return
    claim = Claim(path.with_name(path.name + ".claim.partial"))
    try:
        claim.take(PATIENCE if resume else 0.0)
    except ClaimedError as error:
        raise DataError(
            f"out={str(path)!r} is being written to by {error}: wait for it to end, or end it; if "
            f"there is no such run, delete {str(claim.path)!r}"
        ) from None
    except OSError as error:
        raise DataError(f"out={str(path)!r} cannot be written to ({error.strerror})") from error
    try:
        yield
    finally:
        claim.release()


def _check(method: str, alternative: str, exchange: str, multipliers: str) -> None:
    for name, value, known in (
        ("method", method, METHODS),
        ("alternative", alternative, ALTERNATIVES),
        ("multipliers", multipliers, ("auto", *MULTIPLIERS)),
    ):
        if value not in known:
            one = ", ".join(map(repr, known))
            raise ValueError(f"{name}={value!r} is unknown; use one of {one}")
    for name, value, of in (
        ("exchange", exchange, "permutation"),
        ("multipliers", multipliers, "wild"),
    ):
        if value != "auto" and method != of:
            raise ValueError(f"{name}={value!r} is for method={of!r}, not {method!r}")


Own = Callable[[int], tuple[np.ndarray, Design]]
"""Returns the response of a model, NaN where it has none, and its design, on all rows."""


def _own_designs(batch: BatchFit) -> Own | None:
    """Return what gives each model its design; None if all have the same."""
    source, design = batch.source, batch.design
    if isinstance(source, Subsets):
        return lambda number: (source.column(number), design)
    if isinstance(source, Varied) and (source.x is not None or source.weights is not None):
        return lambda number: (source.column(number), source.design_of(design, number))
    return None


def _model_of_all(batch: BatchFit, asked: Sequence[Hypothesis]) -> Model:
    """Return the model on all rows, by which it is decided how hypotheses are resampled."""
    source, design = batch.source, batch.design
    if isinstance(source, Subsets):
        return Model(replace(design, y=np.nan_to_num(design.y, posinf=0.0)), batch.settings)
    assert isinstance(source, Columns | Varied)
    design = lent(design, source)
    if not isinstance(source, Varied) or source.x is None:
        return Model(design, batch.settings)
    for number in range(min(len(batch), CANDIDATES)):
        own = source.design_of(design, number)
        X = np.where(np.isnan(own.X), np.nanmean(own.X, axis=0), own.X)
        model = Model(replace(own, X=np.asfortranarray(X), weights=None), batch.settings)
        if all(model.combinations(test) is not None for test in asked):
            break
    return model


def _of_other_weights(exchange: str) -> str:
    """Return how errors are exchanged where weights differ from response to response."""
    if exchange in ("within", "whole"):
        raise ExchangeError(
            f"exchange={exchange!r}: the weights differ by response, so that no rows or groups are "
            "alike for all of them; use exchange='flip', or method='parametric'"
        )
    return "flip"


def _asked(batch: BatchFit, tests: Any) -> tuple[Hypothesis, ...]:
    """Read the `tests` argument."""
    if tests is None:
        found = batch.hypotheses
    elif isinstance(tests, Mapping):
        found = hypotheses(tests, batch.design.x_names)
    elif isinstance(tests, Sequence | pd.Index):
        names = [tests] if isinstance(tests, str) else list(tests)
        rows = np.eye(len(batch.design.x_names))
        found = tuple(
            Hypothesis(str(name), rows[[batch._column(name)]], np.zeros(1)) for name in names
        )
    else:
        raise TypeError(
            "tests must be names of coefficients or a mapping of names to hypotheses, not "
            f"{type(tests).__name__}"
        )
    if not found:
        raise ValueError(
            f"nothing to test: give tests=, such as tests=[{batch.design.x_names[-1]!r}]"
        )
    return found


class Plan(NamedTuple):
    """How one hypothesis is resampled.

    Attributes:
        test: the hypothesis.
        exchange: how errors are rearranged; None if they are drawn from the reduced model.
        values: what groups are multiplied with; None where `exchange` says it.
        every: whether each rearrangement is used once.
        n: number of replicates.
        note: all of that in words.
    """

    test: Hypothesis
    exchange: Exchange | None
    values: np.ndarray | None
    every: bool
    n: int
    note: str

    def keys(self, seed: int, replicate: int) -> np.ndarray:
        """Return the key of each element in one replicate."""
        assert self.exchange is not None
        if self.every:
            return self.exchange.numbered(replicate + 1)  # number 0 moves nothing
        rng = generator(seed, replicate)
        if self.values is None:
            return self.exchange.drawn(rng)
        return rng.choice(self.values, size=len(self.exchange.among))


def _plan(
    model: Model,
    test: Hypothesis,
    method: str,
    n: int,
    exchange: str,
    multipliers: str,
    reml: bool,
) -> Plan:
    """Decide how a hypothesis is resampled, on all rows."""
    L, design = model.combinations(test), model.design
    if L is None:
        raise HypothesisError(
            f"the hypothesis {test.name!r} is about a coefficient that is aliased (not estimable)"
        )
    if np.linalg.matrix_rank(L) < len(L):
        raise HypothesisError(f"the rows of the hypothesis {test.name!r} are not independent")
    if method == "parametric":
        how = f"{n} draws from the reduced model ({'REML' if reml else 'ML'})"
        return Plan(test, None, None, False, n, f"{test.name}: {how}")
    if method == "wild":
        element = independent_blocks(design)
        check_blocks(element)
        count = int(element.max()) + 1
        if multipliers == "auto":
            multipliers = "webb" if count < FEW_BLOCKS else "rademacher"
        values = MULTIPLIERS[multipliers]
        found = Exchange("flip", element, np.zeros(count, dtype=np.int64), "")
        note = f"{test.name}: {n} draws of {multipliers} multipliers for {count} groups"
        return Plan(test, found, values, False, n, note)
    tested = model.X @ model.directions(L)
    found = exchange_of(design, exchange, tested)
    every = found.count <= n + 1
    n = found.count - 1 if every else n
    how = f"all {n} other rearrangements" if every else f"{n} random rearrangements"
    note = f"{test.name}: exchange={found.kind!r} ({found.why}), {how}"
    if every:
        note += f"; no p-value is below {1.0 / (1.0 + n):.3g}"
    return Plan(test, found, None, every, n, note)


@dataclass(eq=False)
class State:
    """What is known after some of the responses.

    Attributes:
        done: number of responses.
        statistic: observed statistics, (k, h).
        exceeded: number of replicates that were at least that, (k, h).
        failed: number of replicates whose fit failed, (k, h).
        maxima: per hypothesis the largest of the responses' statistics in each replicate, (n,).
    """

    done: int
    statistic: np.ndarray
    exceeded: np.ndarray
    failed: np.ndarray
    maxima: list[np.ndarray]

    @staticmethod
    def empty(k: int, n: Sequence[int]) -> State:
        """Return what is known of k responses, before the first."""
        count = np.zeros((k, len(n)), dtype=np.int64)
        maxima = [np.full(number, -np.inf) for number in n]
        return State(0, np.full(count.shape, np.nan), count, count.copy(), maxima)

    def save(self, path: Path, key: str) -> None:
        """Write to a file that is whole at any time."""
        from .. import __version__

        maxima = {f"maxima{h}": values for h, values in enumerate(self.maxima)}
        arrays: dict[str, Any] = {
            "lmmax": np.array(__version__),
            "key": np.array(key),
            "done": np.array(self.done),
            "statistic": self.statistic,
            "exceeded": self.exceeded,
            "failed": self.failed,
            **maxima,
        }
        with whole(path) as file:
            np.savez(file, **arrays)

    def resumed(self, path: Path, key: str, resume: bool) -> State:
        """Return what a file holds of the same work; this if there is none.

        Raises:
            DataError: if the file is there and shall not, or cannot, be gone on with.
        """
        if not path.exists():
            return self
        if not resume:
            raise DataError(f"out={str(path)!r} exists; pass resume=True to go on with it")
        from .. import __version__

        try:
            with np.load(path) as opened:
                file = {name: opened[name] for name in opened.files}
            known, version = str(file["key"]), str(file.get("lmmax", "an earlier version"))
            found = State(
                int(file["done"]),
                file["statistic"],
                file["exceeded"],
                file["failed"],
                [file[f"maxima{h}"] for h in range(len(self.maxima))],
            )
        except Exception as error:  # whatever damaged files make NumPy raise
            raise DataError(
                f"out={str(path)!r} holds no replicates, or is damaged: delete it, or use another "
                "file"
            ) from error
        if version != __version__:
            raise DataError(
                f"out={str(path)!r} was begun by lmmax {version}, and this is {__version__}: "
                "replicates of two versions are not mixed; go on with that version, or use "
                "another file"
            )
        if known != key:
            raise DataError(f"out={str(path)!r} holds replicates of other work: use another file")
        return found


class Part(NamedTuple):
    """Lanes of one hypothesis that have the same rows.

    Attributes:
        number: position of the hypothesis.
        lanes: numbers of the responses, (lanes,).
        observed: their observed statistics, all finite, (lanes,).
        errors: their residuals of the reduced model, (n, lanes).
    """

    number: int
    lanes: np.ndarray
    observed: np.ndarray
    errors: np.ndarray


class Run:
    """Resamples chunks of responses.

    Args:
        model: the model on all rows.
        offset: known part of the mean, (n,), or None.
        plans: how each hypothesis is resampled.
        alternative: which statistics speak against a hypothesis.
        seed: of the random numbers.
    """

    def __init__(
        self,
        model: Model,
        offset: np.ndarray | None,
        plans: Sequence[Plan],
        alternative: str,
        seed: int,
    ) -> None:
        self._model, self._offset, self._plans, self._seed = model, offset, plans, seed
        self._alternative = alternative
        self._parts: dict[bytes, OnRows | None] = {}

    @cached_property
    def _whole(self) -> OnRows:
        return OnRows(np.arange(len(self._model.design.y)), self._model, self._plans)

    def of_block(self, y: np.ndarray) -> Iterator[Lanes]:
        """Yield responses of one design, (n, lanes), with offset, by the rows that they have."""
        if self._offset is not None:
            y = y - self._offset[:, None]
        with np.errstate(invalid="ignore", over="ignore"):
            usable = np.flatnonzero(~np.isinf(y).any(axis=0))
        for own, here in self._by_rows(y[:, usable]):
            if here is not None:
                yield usable[own], y[np.ix_(here.rows, usable[own])], here

    def of_models(self, own: Own, numbers: range) -> Iterator[Lanes]:
        """Yield the responses of models that have designs of their own, one after the other."""
        for at, number in enumerate(numbers):
            try:
                y, design = own(number)
            except DataError:  # a subset that cannot be fitted
                continue
            rows = np.flatnonzero(~np.isnan(y))
            values = y[rows] if design.offset is None else y[rows] - design.offset[rows]
            if np.isfinite(values).all():
                here = self._on(rows, replace(design, offset=None, y=y))
                if here is not None:
                    here.alone = True
                    yield np.array([at]), values[:, None], here

    def add(self, state: State, found: Iterator[Lanes], told: Any) -> None:
        """Add the next responses to what is known.

        Args:
            state: what is known.
            found: the responses.
            told: called with numbers of fits, as they are done.
        """
        for lanes, values, here in found:
            varied = np.ptp(values, axis=0) > 0.0
            lanes, values = lanes[varied], values[:, varied]
            if not lanes.size:
                continue
            residuals = here.model.residuals(values)
            for h, plan in enumerate(self._plans):
                L = here.L[h]
                if L is None:
                    continue
                errors = here.model.errors(residuals, L, plan.test.values)
                observed = here.tester(h).statistics(errors)
                known = np.isfinite(observed)
                if not known.any():
                    continue
                numbers = state.done + lanes[known]
                state.statistic[numbers, h] = observed[known]
                part = Part(h, numbers, observed[known], np.ascontiguousarray(errors[:, known]))
                told(len(numbers))
                self._replicate(state, here, part, told)

    def _replicate(self, state: State, here: OnRows, part: Part, told: Any) -> None:
        """Run all replicates of some lanes."""
        h, lanes = part.number, part.lanes
        joint = len(self._plans[h].test.L) > 1
        judged = partial(score, alternative="greater" if joint else self._alternative)
        observed = judged(part.observed)
        least = observed - TIES * np.abs(observed)
        for first, statistics in self._statistics(here, part):
            scores = judged(statistics)
            lost = ~np.isfinite(scores)
            scores = np.where(lost, -np.inf, scores)
            state.exceeded[lanes, h] += np.sum(scores >= least, axis=0)
            state.failed[lanes, h] += np.sum(lost, axis=0)
            mine = state.maxima[h][first : first + len(scores)]
            np.maximum(mine, scores.max(axis=1), out=mine)
            told(scores.size)

    def _statistics(self, here: OnRows, part: Part) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first number, and the statistics, of some replicates at a time."""
        plan, errors = self._plans[part.number], part.errors
        rows, c = errors.shape
        together = max(1, min(TOGETHER // c, BLOCK_BYTES // (8 * rows * c)))
        blocks = [range(a, min(a + together, plan.n)) for a in range(0, plan.n, together)]
        tester, on = here.tester(part.number), here.exchanges[part.number]
        if on is None:
            if here.alone:  # a generator of its own
                design, every, lanes = here.model.design, np.arange(rows), part.lanes * BLOCK
            else:
                design, every, lanes = self._model.design, here.rows, part.lanes
            draws = drawer(design, every, here.null(part.number), errors, lanes)
            for block in blocks:
                drawn = np.concatenate([draws.draw(self._seed, r) for r in block], axis=1)
                yield block[0], tester.statistics(drawn).reshape(len(block), c)
            return
        replicates = tester.replicates(errors)
        for block in blocks:
            yield block[0], replicates([on.of(plan.keys(self._seed, r)) for r in block])

    def _by_rows(self, y: np.ndarray) -> Iterator[tuple[np.ndarray, OnRows | None]]:
        """Yield positions of responses that lack the same rows, with the model on the others."""
        gone = np.isnan(y)
        if not gone.any():
            yield np.arange(y.shape[1]), self._whole
            return
        keys, which = np.unique(np.packbits(gone, axis=0), axis=1, return_inverse=True)
        for number in range(keys.shape[1]):
            own = np.flatnonzero(which.reshape(-1) == number)
            rows = np.flatnonzero(~gone[:, own[0]])
            if len(rows) == len(y):
                yield own, self._whole
                continue
            key = keys[:, number].tobytes()
            if key not in self._parts:
                while len(self._parts) >= PATTERNS:
                    self._parts.pop(next(iter(self._parts)))
                self._parts[key] = self._on(rows, self._model.design)
            yield own, self._parts[key]

    def _on(self, rows: np.ndarray, design: Design) -> OnRows | None:
        """Return a model on some of the rows; None if it cannot be fitted there."""
        if not rows.size:
            return None
        design = subset(design, rows, design.y[rows])
        if any(len(np.unique(grouping.codes)) < 2 for grouping in design.groupings):
            return None
        try:
            return OnRows(rows, Model(design, self._model.settings), self._plans)
        except DataError:
            return None


Lanes = tuple[np.ndarray, np.ndarray, "OnRows"]
"""Positions of responses, (lanes,), their values, offset removed, (n, lanes), and their model."""


class OnRows:
    """The model on some of the rows, and its hypotheses.

    Attributes:
        rows: positions of the rows, ascending, (n,).
        model: the model on them.
        L: the hypotheses' combinations of the coefficients that were kept; None where not all are.
        exchanges: how errors are rearranged; None if they are drawn.
        alone: whether the model is that of one response.
    """

    def __init__(self, rows: np.ndarray, model: Model, plans: Sequence[Plan]) -> None:
        self.rows, self.model, self.alone = rows, model, False
        self.L = [model.combinations(plan.test) for plan in plans]
        self.exchanges: list[ExchangeOn | None] = [
            None if plan.exchange is None else plan.exchange.on(model.design, rows)
            for plan in plans
        ]
        self._testers: dict[int, Tester] = {}
        self._nulls: dict[int, Model] = {}

    def tester(self, number: int) -> Tester:
        """Return what tests a hypothesis."""
        L = self.L[number]
        assert L is not None
        if number not in self._testers:
            self._testers[number] = self.model.tester(L)
        return self._testers[number]

    def null(self, number: int) -> Model:
        """Return the reduced model of a hypothesis."""
        L = self.L[number]
        assert L is not None
        if number not in self._nulls:
            self._nulls[number] = self.model.reduced(L)
        return self._nulls[number]
