"""Likelihood profiles: how much the criterion rises as one parameter is held off its estimate.

The signed root of the rise, zeta, is nearly a straight line (Bates and Watts 1988, Nonlinear
Regression Analysis and its Applications, chapter 6; Bates, Mächler, Bolker and Walker 2015,
J. Stat. Softw. 67(1), section 5.1).  Limits are where its square is the quantile of chi-squared,
found by Newton's method on zeta, whose slope is exact: by the envelope theorem it is the
criterion's partial derivative.  Each point is a minimum over all other parameters, see
:mod:`lmmax.inference.held`.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from ..characters import Visible
from ..compress import EngineError
from ..frames import as_names
from ..options import alpha_of
from ..rendering import WIDTH, Cells, Frame, format_block, fragment, headings, page, table_lines
from ..solve import Status
from ..zero_scale import check_residual
from .arguments import as_fit
from .charts import Charts, Parameter, Place
from .held import Held, Searches

if TYPE_CHECKING:
    from ..results import Fit

POINTS = 8
"""Rows of the table on each side of an estimate."""
CLOSE = 1e-6
"""Distance in zeta from which one Newton step lands on the limit, to its square."""
MAX_ROUNDS, EXPECTED_ROUNDS = 60, 6
MAX_FAILURES = 8
CHARTS = 8
"""How many charts a search may go through."""
JUMP = 3.0
"""Ratio of a secant to the slope of zeta within it beyond which zeta is no continuous curve."""
STRAIGHT = 1.25
"""Ratio of a limit's distance to that of a Wald limit beyond which other starts are tried."""
CHALLENGES, LOWER = 4, 1e-7
"""How often, and what fall of the criterion counts."""
BETTER = 1e-5
"""Fall of the criterion below that of the fit that is more than rounding and tolerance."""


class ProfileWarning(Visible, UserWarning):
    """A profile that could not be followed to its limit."""


class _At(NamedTuple):
    """A point of a profile: distance from the estimate in the coordinate, and what was found."""

    t: float
    zeta: float
    slope: float
    held: Held


@dataclass
class _Side:
    """One direction of a parameter's profile.

    Attributes:
        parameter: the parameter.
        sign: direction in its coordinate, -1 or 1.
        points: what is known, ascending in t; the estimate first.
        failed: least distance at which a search failed since the last success.
        failures: how many did.
        shown: distances of the points that the table shows.
        checked: distances of points to which zeta jumps, and of which no search found better.
        floor: of a correlation, the least criterion with a variance of its own at zero, where the
            correlation may be anything: no point of its profile is above that.
    """

    parameter: Parameter
    sign: int
    points: list[_At]
    failed: float = math.inf
    failures: int = 0
    shown: set[float] = field(default_factory=set)
    checked: set[float] = field(default_factory=set)
    floor: Held | None = None

    @property
    def end(self) -> float:
        """Largest distance: the boundary of the parameter space."""
        return max(abs(self.parameter.bounds[self.sign > 0] - self.parameter.start), 0.0)

    def coordinate(self, t: float) -> float:
        """Return the coordinate at a distance, the boundary itself at the largest."""
        if t >= self.end:
            return self.parameter.bounds[self.sign > 0]
        return self.parameter.start + self.sign * t

    def nearest(self, t: float) -> _At:
        """Return the known point nearest to a distance."""
        return min(self.points, key=lambda point: abs(point.t - t))

    def add(self, t: float, held: Held, least: float) -> None:
        """Record the end of a search."""
        if held.status != Status.CONVERGED:
            self.failed, self.failures = min(self.failed, t), self.failures + 1
            return
        self.failed = math.inf
        if self.floor is not None and self.floor.value < held.value:
            held = self.floor._replace(slope=0.0)
        if any(point.t == t and point.held.value <= held.value for point in self.points):
            return
        self.points = [point for point in self.points if point.t != t]
        zeta = math.sqrt(max(held.value - least, 0.0))
        slope = self.sign * held.slope / (2.0 * zeta) if zeta > 0.0 else math.nan
        self.points.append(_At(t, zeta, slope, held))
        self.points.sort(key=lambda point: point.t)

    def bracket(self, cutoff: float) -> tuple[_At, _At | None]:
        """Return the furthest point before zeta first passes the cutoff, and the one after it."""
        above = next((i for i, p in enumerate(self.points) if p.zeta >= cutoff), None)
        if above is None:
            return self.points[-1], None
        return self.points[max(above - 1, 0)], self.points[above]

    def doubtful(self, cutoff: float) -> float | None:
        """Return the distance of a point to which zeta jumps: a minimum, but not the least."""
        low, high = self.bracket(cutoff)
        if high is None or high.t in self.checked or not low.slope > 0.0:
            return None
        jump = high.zeta - low.zeta - JUMP * low.slope * (high.t - low.t)
        return high.t if jump > 0.0 else None

    def limit(self, cutoff: float) -> float | None:
        """Return the distance at which zeta is the cutoff; None while it is not known.

        Infinite if zeta stays below it up to the end; NaN if searches fail.
        """
        low, high = self.bracket(cutoff)
        if high is None and low.t >= self.end:
            return math.inf
        for point in (low, high):
            if point is not None and abs(point.zeta - cutoff) <= CLOSE and point.slope > 0.0:
                return point.t + (cutoff - point.zeta) / point.slope
        # Where the profile is flat or bent sharply, the bracket says how well it is known.
        if high is not None and high.t - low.t <= 1e-13 * max(high.t, abs(self.parameter.start)):
            return high.t
        return math.nan if self.failures > MAX_FAILURES else None

    def propose(self, cutoff: float) -> float:
        """Return the distance to try next."""
        low, high = self.bracket(cutoff)
        if math.isfinite(self.failed):
            return 0.5 * (low.t + self.failed)
        if high is None:
            if low.t == 0.0:
                return min(cutoff * self.parameter.step, self.end)
            ahead = low.t + (cutoff - low.zeta) / low.slope if low.slope > 0.0 else math.inf
            return min(max(ahead, 1.1 * low.t), 4.0 * low.t, self.end)
        guess = _inverse(low, high, cutoff)
        width = high.t - low.t
        if not low.t + 1e-3 * width < guess < high.t - 1e-3 * width:
            near = min((low, high), key=lambda point: abs(point.zeta - cutoff))
            if near.slope > 0.0:
                guess = near.t + (cutoff - near.zeta) / near.slope
        return guess if low.t < guess < high.t else 0.5 * (low.t + high.t)

    def at(self, zetas: np.ndarray) -> np.ndarray:
        """Return distances at which zeta has about these values, by interpolation."""
        z = np.array([point.zeta for point in self.points])
        t = np.array([point.t for point in self.points])
        keep = np.append(True, np.diff(np.maximum.accumulate(z)) > 1e-9)
        known = [point for point, kept in zip(self.points, keep, strict=True) if kept]
        z, t = z[keep], t[keep]
        found = np.interp(zetas, z, t)
        for i, zeta in enumerate(zetas):
            after = int(np.searchsorted(z, zeta))
            if 0 < after < len(z):
                low, high = known[after - 1], known[after]
                guess = _inverse(low, high, float(zeta))
                found[i] = guess if low.t < guess < high.t else found[i]
        return found


def _inverse(low: _At, high: _At, zeta: float) -> float:
    """Return t at a zeta between two points: the cubic with the known derivatives of t."""
    width = high.zeta - low.zeta
    if not (width > 0.0 and high.slope > 0.0):
        return math.nan
    w = (zeta - low.zeta) / width
    secant = (high.t - low.t) / width
    right = 1.0 / high.slope
    # At the estimate the slope of zeta is not known: a parabola.
    left = 1.0 / low.slope if low.slope > 0.0 else 2.0 * secant - right
    bend = 3.0 * secant - 2.0 * left - right
    twist = left + right - 2.0 * secant
    return low.t + width * w * (left + w * (bend + w * twist))


class Walk:
    """Profiles of a fit's parameters, as far as they have been followed."""

    def __init__(self, fit: Fit, charts: Charts, parameters: Sequence[Parameter]) -> None:
        estimates = fit.estimates
        self.charts = charts
        self.parameters = tuple(parameters)
        self.searches = Searches(fit.compression.problem, estimates.constraints, fit.reml)
        self.notes: list[str] = []
        self.refused = _refusal(fit)
        if self.refused:
            self.notes.append(self.refused)
        self.least = float(estimates.solution.point.at.value)
        chart, x = charts.chart(None, 0.0, charts.start)
        base = self.searches.run([chart], x[None], np.zeros(1))[0]
        if base.status == Status.CONVERGED:
            if fit.converged and base.value < self.least - BETTER:
                self._found_better(base.value)
            self.least = base.value
        else:
            base = base._replace(
                value=self.least,
                s=charts.start.s,
                root=charts.start.root,
                theta=charts.start.theta,
                beta=np.asarray(estimates.solution.point.at.beta),
            )
        start = _At(0.0, 0.0, math.nan, base)
        self.sides = {
            parameter.name: (_Side(parameter, -1, [start]), _Side(parameter, 1, [start]))
            for parameter in self.parameters
            if not parameter.note
        }

        self._lay_floors()

    def _lay_floors(self) -> None:
        """Find what the criterion is where the variances of correlations are zero."""
        above: dict[str, list[_Side]] = {}
        tasks = []
        for parameter in self.parameters:
            for of_sd in [] if parameter.note else self.charts.variances(parameter):
                if of_sd.name not in above:
                    side = _Side(of_sd, -1, [])
                    tasks += [(side, side.end, start) for start in self.charts.plain_starts()]
                above.setdefault(of_sd.name, []).extend(self.sides[parameter.name])
        for (of_sd_side, _, _), held in zip(tasks, self.search(tasks), strict=True):
            for side in above[of_sd_side.parameter.name]:
                known = math.inf if side.floor is None else side.floor.value
                if held.status == Status.CONVERGED and held.value < known:
                    side.floor = held

    def _found_better(self, value: float) -> None:
        note = (
            f"the criterion falls {self.least - value:.3g} below that of the fit: it is a local "
            "optimum only; fit again from another start="
        )
        if not any("a local optimum" in known for known in self.notes):
            self.notes.append(note)

    def follow(self, cutoff: float) -> None:
        """Follow all profiles to the cutoff, the sides of all of them together."""
        if self.refused:
            for side in self._all_sides():
                side.failures = MAX_FAILURES + 1
            return
        for _ in range(CHALLENGES):
            self._approach(cutoff)
            if not self._challenge(cutoff):
                return
        self._approach(cutoff)

    def _approach(self, cutoff: float) -> None:
        """Find where zeta is the cutoff, as far as warm starts lead there."""
        for side in self._all_sides():
            side.failures = 0
        for done in range(MAX_ROUNDS):
            sides = [side for side in self._all_sides() if side.limit(cutoff) is None]
            if not sides:
                return
            tasks = []
            for side in sides:
                t = side.propose(cutoff)
                near = side.nearest(t)
                if done >= EXPECTED_ROUNDS:
                    # The points on both sides may be different minima: go on from within.
                    near = side.bracket(cutoff)[0]
                    doubtful = side.doubtful(cutoff)
                    if doubtful is not None:
                        side.checked.add(doubtful)
                        t = doubtful
                tasks.append((side, t, Place.of(near.held)))
            for (side, t, _), held in zip(tasks, self.search(tasks), strict=True):
                side.add(t, held, self.least)
        for side in sides:
            side.failures = MAX_FAILURES + 1

    def _challenge(self, cutoff: float) -> bool:
        """Search from other starts where there may be several minima; return whether it helped."""
        tasks, points = [], []
        for side in self._all_sides():
            t = side.limit(cutoff)
            if t is None or not t < math.inf or not self._suspicious(side, t, cutoff):
                continue
            point = side.nearest(t)
            for start in self.charts.other_starts(side.parameter, Place.of(point.held)):
                tasks.append((side, point.t, start))
                points.append(point)
        best: dict[int, tuple[_Side, _At, Held]] = {}
        for (side, _, _), point, held in zip(tasks, points, self.search(tasks), strict=True):
            known = best[id(side)][2].value if id(side) in best else point.held.value - LOWER
            if held.status == Status.CONVERGED and held.value < known:
                best[id(side)] = (side, point, held)
        for side, point, held in best.values():
            side.points = [known for known in side.points if known.t < point.t]
            side.add(point.t, held, self.least)
            top = side.points[-1].zeta
            side.points = [known for known in side.points if known.zeta <= top]
        return bool(best)

    def _suspicious(self, side: _Side, t: float, cutoff: float) -> bool:
        """Return whether zeta is far from the straight line of a large sample, or the end singular.

        A singular covariance is a corner, beside which there may be other branches.
        """
        ratio = t / (cutoff * side.parameter.step)
        if self.charts.fit.singular or not 1.0 / STRAIGHT < ratio < STRAIGHT:
            return True
        return self.charts.singular(Place.of(side.nearest(t).held))

    def _all_sides(self) -> list[_Side]:
        return [side for pair in self.sides.values() for side in pair]

    def fill(self, cutoff: float) -> None:
        """Add points between the estimates and the cutoff, evenly spaced in zeta."""
        reach = []
        for side in self._all_sides():
            limit, last = side.limit(cutoff), side.points[-1]
            reached = limit is not None and limit < math.inf
            reach.append((side, cutoff if reached else min(cutoff, last.zeta)))
        # One point on the way, for all others are placed by interpolation.
        self._add([(side, float(side.at(np.array([top / 3.0]))[0])) for side, top in reach])
        tasks = []
        for side, top in reach:
            distances = side.at(top * np.arange(1, POINTS + 1) / POINTS)
            if side.limit(cutoff) == math.inf:
                distances[-1] = side.end
            side.shown = {0.0, *(float(t) for t in distances if t > 0.0)}
            tasks += [(side, t) for t in sorted(side.shown - {0.0})]
        self._add(tasks)

    def _add(self, tasks: list[tuple[_Side, float]]) -> None:
        """Add points at these distances, each from its nearest neighbour."""
        runs = [(side, t, Place.of(side.nearest(t).held)) for side, t in tasks if t > 0.0]
        for (side, t, _), held in zip(runs, self.search(runs), strict=True):
            side.add(t, held, self.least)

    def search(self, tasks: list[tuple[_Side, float, Place]]) -> list[Held]:
        """Search at distances t from given starts."""
        found: dict[int, Held] = {}
        left = list(range(len(tasks)))
        for _ in range(CHARTS):
            values, charts, starts = [], [], []
            for i in left:
                side, t, place = tasks[i]
                u = side.coordinate(t)
                start = Place.of(found[i]) if i in found else place
                chart, x = self.charts.chart(side.parameter, u, start)
                values.append(u)
                charts.append(chart)
                starts.append(x)
            found.update(
                zip(
                    left, self.searches.run(charts, np.array(starts), np.array(values)), strict=True
                )
            )
            # Pivots and directions chosen at the start may be poor ones where the search has come.
            left = [i for i in left if found[i].status in (Status.MAX_STEPS, Status.STALLED)]
            if not left:
                break
        for held in found.values():
            if held.status == Status.CONVERGED and held.value < self.least - BETTER:
                self._found_better(held.value)
        return [found[i] for i in range(len(tasks))]

    def limits(self, cutoff: float) -> tuple[np.ndarray, list[str]]:
        """Return limits (k, 2) and the status of each parameter."""
        found, status = np.full((len(self.parameters), 2), np.nan), []
        for i, parameter in enumerate(self.parameters):
            if parameter.note:
                status.append("undefined")
                continue
            words = "converged"
            for side in self.sides[parameter.name]:
                t = side.limit(cutoff)
                column = int((side.sign > 0) == parameter.increasing)
                if t is None or math.isnan(t):
                    words = "failed"
                elif math.isinf(t):
                    found[i, column] = parameter.ends[side.sign > 0]
                    words = words if words == "failed" else "boundary"
                else:
                    found[i, column] = self.charts.value(parameter, side.coordinate(t))
            status.append(words)
        return found, status

    def table(self) -> pd.DataFrame:
        """Return the points that :meth:`fill` added, a row each."""
        every = list(self.charts.parameters)
        rows, labels = [], []
        for parameter in self.parameters:
            if parameter.note:
                continue
            left, right = self.sides[parameter.name]
            line = [(left, p) for p in left.points[:0:-1]] + [(right, p) for p in right.points]
            for side, point in line if parameter.increasing else line[::-1]:
                if point.t not in side.shown:
                    continue
                sign = side.sign if parameter.increasing else -side.sign
                values = self.charts.values(point.held)
                u = side.coordinate(point.t)
                values[every.index(parameter)] = (
                    parameter.estimate if point.t == 0.0 else self.charts.value(parameter, u)
                )
                rise = point.zeta**2 + self.charts.fit.deviance
                labels.append(parameter.name)
                zeta = sign * point.zeta if point.zeta > 0.0 else 0.0
                rows.append([values[every.index(parameter)], zeta, rise, *values])
        own = ["parameter", "value", "zeta", "deviance"]
        names = [parameter.name for parameter in every]
        # A coefficient may be called as one of the table's own columns is.
        names = [f"{name} (coefficient)" if name in own else name for name in names]
        columns = [*own[1:], *names]
        frame = pd.DataFrame(np.reshape(rows, (len(rows), len(columns))), columns=columns)
        frame.insert(0, own[0], labels)
        return frame


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """Likelihood profiles; made by :func:`profile`.

    Attributes:
        table: a row per point of a profile: ``parameter``, ``value``, ``zeta`` (signed root of the
            rise of the criterion), ``deviance`` (the criterion), and the values of all parameters
            there, a column each.
        estimates: the estimates of the parameters.
        status: per parameter "converged"; "boundary" if a limit is that of the parameter space;
            "undefined" for a correlation with an effect of variance zero; "failed".
        notes: what a reader should know.
        alpha: the profiles reach as far as the limits of level ``1 - alpha``.
        fit: the fit.
    """

    table: pd.DataFrame
    estimates: pd.Series
    status: pd.Series
    notes: tuple[str, ...]
    alpha: float
    fit: Fit = field(repr=False)
    _walk: Walk = field(repr=False)

    def conf_int(self, level: float | None = None, *, alpha: float | None = None) -> pd.DataFrame:
        """Return profile-likelihood limits, exact at any level.

        Args:
            level: the level, 0.95 if None; a number below one half is taken as ``alpha``.
            alpha: one minus the level, instead of it.

        Returns:
            A row per parameter, ``lower`` and ``upper``; the ends of the parameter space where the
            criterion does not rise enough before them; NaN where :attr:`status` says why.

        Raises:
            ValueError: if the level does not lie between 0 and 1.
        """
        cutoff = cutoff_of(alpha_of(level, alpha))
        self._walk.follow(cutoff)
        return _frame(self._walk, cutoff)

    def _parts(self) -> tuple[str, Cells]:
        """Return title and table."""
        limits = {a: self.conf_int(alpha=a) for a in dict.fromkeys((0.05, self.alpha))}
        frame = pd.concat([self.estimates, *limits.values()], axis=1)
        names = ["estimate"]
        for alpha, found in limits.items():
            names += headings(found, 1.0 - alpha)
        values = frame.to_numpy(float)
        widths = 0.25 * (values[:, 2] - values[:, 1])
        rows = [
            format_block(row[None, :], np.array([[width]]))[0]
            for row, width in zip(values, widths, strict=True)
        ]
        title = f"Likelihood profiles ({'REML' if self.fit.reml else 'ML'})"
        labels = [[str(name)] for name in frame.index]
        return title, Cells([""], labels, names, rows)

    def __str__(self) -> str:
        title, cells = self._parts()
        lines = table_lines(cells)
        rule = "-" * min(max(map(len, lines)), WIDTH)
        notes = [
            part
            for i, note in enumerate(self.notes, 1)
            for part in textwrap.wrap(f"[{i}] {note}", WIDTH, subsequent_indent="    ")
        ]
        return page(title, f"Formula: {self.fit.formula}", rule, *lines, rule, *notes)

    def __repr__(self) -> str:
        failed = int((self.status == "failed").sum())
        ending = f", {failed} failed" if failed else ""
        return (
            f"<lmmax.Profile {self.fit.formula!r}, {'REML' if self.fit.reml else 'ML'}, "
            f"{len(self.estimates)} parameters{ending}>"
        )

    def _repr_html_(self) -> str:
        title, cells = self._parts()
        return fragment(title, self.fit.formula, cells, self.notes)


def profile(
    fit: Fit,
    parameters: str | Sequence[str] | None = None,
    level: float | None = None,
    *,
    alpha: float | None = None,
) -> Profile:
    """Profile the likelihood of a fit.

    The fit's own criterion is profiled.  Under REML a coefficient is held in the residual sum of
    squares, so that its profile has its minimum at the estimate; lme4's profiles are always by
    maximum likelihood, ``profile(fit.refit_ml())``.

    Args:
        fit: the fitted model.
        parameters: names as in the result, "fixed" (coefficients), "random" (standard deviations,
            correlations, parameters of covariance structures and sigma), a sequence of these, or
            None for all.  Names are those of the coefficients, ``"Subject: sd(Days)"``,
            ``"Subject: cor(Intercept, Days)"``, and ``"sigma"``, the residual standard deviation.
        level: how far to go: to the limits of this level, 0.99 if None; a number below one half is
            taken as ``alpha``.
        alpha: one minus the level, instead of it.

    Returns:
        The profiles.  Parameters that the fit held fixed have none.

    Raises:
        ValueError: for an unknown name, or a level outside (0, 1).
        EngineError: for a fit by the iterative engine.

    Example:
        >>> import lmmax
        >>> rail = lmmax.fit("travel ~ 1 + (1 | Rail)", lmmax.datasets.load("rail"), reml=False)
        >>> found = lmmax.profile(rail, "random")
        >>> found.conf_int(0.95).round(3)
                              lower   upper
        Rail: sd(Intercept)  13.929  45.547
        sigma                 2.825   6.378
        >>> len(found.table)
        34
    """
    as_fit(fit)
    alpha = alpha_of(level, alpha, default=0.01)
    cutoff = cutoff_of(alpha)
    walk = follow(fit, parameters, cutoff)
    walk.fill(cutoff)
    _, status = walk.limits(cutoff)
    names = [parameter.name for parameter in walk.parameters]
    values = [parameter.estimate for parameter in walk.parameters]
    return Profile(
        table=walk.table(),
        estimates=pd.Series(values, index=names, name="estimate"),
        status=pd.Series(status, index=names, name="status", dtype=object),
        notes=_notes(walk, status, fit),
        alpha=alpha,
        fit=fit,
        _walk=walk,
    )


def profile_at(fit: Fit, effect: int, values: np.ndarray) -> np.ndarray:
    """Return the criterion where the standard deviation of an effect is held at values.

    Args:
        fit: the fitted model.
        effect: position of the effect among the columns of its covariance.
        values: what it is held at, (k,), positive.

    Returns:
        Minima of -2 log-likelihood over all other parameters, (k,); NaN where a search failed.

    Raises:
        ValueError: for an effect whose standard deviation has no profile, or if the residual
            variance went to zero.
    """
    check_residual(fit.estimates, "a likelihood profile")
    charts = Charts(fit)
    parameter = charts.standard_deviation(effect)
    if parameter is None:
        raise ValueError(f"the variance of {fit.effect_names[effect]!r} was not estimated")
    walk = Walk(fit, charts, [parameter])
    sides, found = walk.sides[parameter.name], np.full(len(values), np.nan)
    coordinates = np.array([charts.coordinate(parameter, value) for value in values])
    distance = np.abs(coordinates - parameter.start)
    # From the estimate outwards, so that each search starts next to where one ended.
    for i in np.argsort(distance):
        side, t = sides[int(coordinates[i] > parameter.start)], float(distance[i])
        if t <= 1e-12 * abs(parameter.start):
            found[i] = fit.deviance
            continue
        held = walk.search([(side, t, Place.of(side.nearest(t).held))])[0]
        side.add(t, held, walk.least)
        if held.status == Status.CONVERGED:
            found[i] = held.value - walk.least + fit.deviance
    return found


def profile_limits(
    fit: Fit, parameters: str | Sequence[str] | None = None, alpha: float = 0.05
) -> pd.DataFrame:
    """Return profile-likelihood limits; as :meth:`Profile.conf_int`, without the table."""
    cutoff = cutoff_of(alpha)
    return _frame(follow(fit, parameters, cutoff), cutoff)


def follow(fit: Fit, parameters: str | Sequence[str] | None, cutoff: float) -> Walk:
    """Follow the profiles of a fit's parameters to the cutoff."""
    if fit.engine.name == "iterative":
        raise EngineError(
            "the iterative engine has a Monte Carlo error in the log-likelihood, which leaves no "
            "profiles; use method='wald' or method='bootstrap', or engine='crossed' where its "
            "dense factor fits into memory"
        )
    charts = Charts(fit)
    walk = Walk(fit, charts, select(charts, parameters))
    walk.follow(cutoff)
    return walk


def _refusal(fit: Fit) -> str:
    """Return why a fit has no profiles; empty if it has."""
    if not fit.converged:
        return f"the fit has not converged ({fit.message}): it has no profiles"
    if fit.estimates.zero_scale:
        return (
            "the residual variance is estimated as zero, and away from the estimates it would not "
            "stay there: there are no profiles; use method='wald' or method='bootstrap'"
        )
    return ""


def select(charts: Charts, parameters: str | Sequence[str] | None) -> list[Parameter]:
    """Return the parameters that were asked for, in the order of the model.

    Raises:
        ValueError: for a name that is none of theirs.
    """
    if parameters is None:
        return list(charts.parameters)
    asked = [parameters] if isinstance(parameters, str) else as_names(parameters, "parameters")
    known = {parameter.name: parameter for parameter in charts.parameters}
    chosen: set[str] = set()
    for name in asked:
        if name in known:
            chosen.add(name)
        elif name in ("fixed", "random"):
            chosen |= {
                p.name for p in charts.parameters if (p.kind == "coefficient") == (name == "fixed")
            }
        elif name in charts.left_out:
            raise ValueError(f"{name!r} has no profile: {charts.left_out[name]}")
        else:
            raise ValueError(
                f"{name!r} is no parameter of the model; use 'fixed', 'random', or some of "
                + ", ".join(map(repr, known))
            )
    return [parameter for parameter in charts.parameters if parameter.name in chosen]


def cutoff_of(alpha: float) -> float:
    """Return the root of the quantile ``1 - alpha`` of chi-squared with one degree of freedom."""
    from scipy.special import ndtri

    return float(-ndtri(0.5 * alpha_of(None, alpha)))


def _frame(walk: Walk, cutoff: float) -> pd.DataFrame:
    """Return limits as a data frame, and warn of those that were not found."""
    found, status = walk.limits(cutoff)
    names = [parameter.name for parameter in walk.parameters]
    failed = [name for name, word in zip(names, status, strict=True) if word == "failed"]
    if failed:
        warnings.warn(
            f"no profile limits for {', '.join(failed)}: "
            + "; ".join(walk.notes or ["the search did not converge there; they are NaN"]),
            ProfileWarning,
            stacklevel=3,
        )
    frame = Frame(found, index=names, columns=["lower", "upper"])
    frame.attrs["notes"] = _notes(walk, status, walk.charts.fit)
    return frame


def _notes(walk: Walk, status: Sequence[str], fit: Fit) -> tuple[str, ...]:
    notes = list(walk.notes)
    if fit.unidentified is not None:
        notes.append(f"{fit.unidentified}; limits enclose all values that fit as well.")
    for parameter, word in zip(walk.parameters, status, strict=True):
        if parameter.note:
            notes.append(f"{parameter.name} is {parameter.note}.")
        elif word == "boundary":
            notes.append(
                f"{parameter.name}: the criterion rises too little before the end of the parameter "
                "space, which is the limit."
            )
        elif word == "failed" and fit.converged and not fit.estimates.zero_scale:
            notes.append(
                f"{parameter.name}: the search did not converge everywhere; its limits are NaN "
                "where it did not."
            )
    notes += [f"{name} has no profile: {why}." for name, why in walk.charts.left_out.items()]
    return tuple(notes)


__all__ = ["Profile", "ProfileWarning", "profile", "profile_limits"]
