"""The parameters that have a likelihood profile, and the charts in which each of them is held.

Each parameter has a coordinate u in which its profile is smooth up to the boundary: a standard
deviation relative to the residual one, the angle whose sine is a correlation, the logarithm of the
scale, an entry of theta, a coefficient's distance from its estimate in standard errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ..constraints import TermColumns
from ..covariances import slopes, values_at
from ..parameters import lower_from_root
from ..solve import Structured
from .held import Chart, Held
from .parameters import apart

if TYPE_CHECKING:
    from ..results import Fit

Kind = Literal["coefficient", "sd", "correlation", "sigma", "structure"]
FAR = 1e6
"""How far, in standard errors, a limit is looked for before it counts as infinite."""
SATURATED = 20.0
"""Entry of theta at which a correlation is 1 to rounding; logarithm by which a scale is zero."""
PERFECT = 1e-12
VANISHING = 0.01
PARALLEL = (-3.0, -1.0, -0.3, 0.3, 1.0, 3.0)
"""Multiples of an effect, in working units, that others are tried as."""
TURNED = 1.5
"""The parameters of structures but standard deviations that are tried, both signs: a correlation of
0.9, where there is a branch towards a perfect one."""
NEAR_ZERO, LIFT = 1e-3, 0.01
"""A column of the root smaller than the first, relative to the sampling noise of one group, is
raised to the second: at zero it would not move, by symmetry."""


@dataclass(frozen=True)
class Parameter:
    """A parameter with a profile.

    Attributes:
        name: as in the tables.
        kind: what it is.
        estimate: its value; NaN if it is undefined.
        start: coordinate of the estimate.
        bounds: range of the coordinate.
        ends: values at the bounds.
        step: rough standard error of the coordinate.
        increasing: whether the value grows with the coordinate.
        error: standard error of the value, NaN if it has none.
        where: the coefficient (among those kept), the effects, or the entry of theta.
        group: position of the block of effects, or of the structure.
        note: why it is undefined.
        kappa: power of the scale that keeps the value of a structure's parameter as it is.
    """

    name: str
    kind: Kind
    estimate: float
    start: float
    bounds: tuple[float, float]
    ends: tuple[float, float]
    step: float
    error: float
    where: tuple[int, ...] = ()
    group: int = 0
    increasing: bool = True
    note: str = ""
    kappa: float = 0.0


class Place(NamedTuple):
    """Where a search starts.

    Attributes:
        root: root of the natural covariance relative to the scale of the fit, working coordinates,
            without structures, (q, q).
        s: logarithm of the scale, working units.
        theta: parameters of structures.
    """

    root: np.ndarray
    s: float
    theta: np.ndarray

    @classmethod
    def of(cls, held: Held) -> Place:
        """Return where a search ended."""
        return cls(held.root, held.s, held.theta)


class Charts:
    """The parameters of a fit, their values, and the charts that hold them.

    Args:
        fit: the fitted model.
    """

    def __init__(self, fit: Fit) -> None:
        estimates, problem = fit.estimates, fit.compression.problem
        self.fit = fit
        self.constraints = estimates.constraints
        self.z_inverse = np.asarray(estimates.z_inverse)
        self.sigma = float(np.sqrt(estimates.scale))
        self.y_scale = float(problem.y_scale)
        self.origin = 2.0 * float(np.log(self.sigma / self.y_scale))
        self.noise = np.asarray(estimates.noise)
        self.blocks = tuple(self._find_blocks())
        root = estimates.working_root
        inside = np.zeros(len(root))
        for block in self.blocks:
            inside[block] = 1.0
        self.start = Place(
            root * inside[:, None], self.origin, np.asarray(estimates.structure_theta)
        )
        self.left_out: dict[str, str] = {}
        self.parameters = tuple(self._find_parameters())

    # --- parameters -------------------------------------------------------------------------

    def _find_blocks(self) -> Iterator[np.ndarray]:
        """Yield the columns of each set of effects with a free covariance."""
        held = np.diag(np.asarray(self.constraints.held))
        for term in self.fit.terms:
            pattern = term.pattern
            if pattern is None or held[term.columns.start] > 0.0:
                continue
            for positions in term.sets:
                yield term.columns.start + positions

    def _find_parameters(self) -> Iterator[Parameter]:
        yield from self._coefficients()
        found: list[tuple[str, Parameter]] = []
        for number, block in enumerate(self.blocks):
            found += self._of_block(number, block)
        for number, part in enumerate(self.constraints.structures):
            found += self._of_structure(number, part)
        # In the order of the model's terms; two terms of a factor may have parameters of one name.
        found.sort(key=lambda pair: self._position(pair[1]))
        names = [parameter.name for _, parameter in found]
        names = apart([*names, "sigma"], self.fit.design.x_names, [label for label, _ in found])
        for name, (_, parameter) in zip(names, found, strict=False):
            yield replace(parameter, name=name)
        if self.constraints.scale_free:
            error = self.fit.scale_se / (2.0 * self.sigma)
            step = 2.0 * error / self.sigma if np.isfinite(error) else 0.5
            yield Parameter(
                names[-1],
                "sigma",
                self.sigma,
                self.origin,
                (self.origin - 2.0 * SATURATED, self.origin + 2.0 * SATURATED),
                (0.0, np.inf),
                step,
                error,
            )

    def _position(self, parameter: Parameter) -> int:
        if parameter.kind == "structure":
            return self.constraints.structures[parameter.group].columns[0]
        return int(self.blocks[parameter.group][0])

    def _coefficients(self) -> Iterator[Parameter]:
        names = list(self.fit.design.x_names)
        errors, unknown = self.fit.bse.to_numpy(), self.fit.unidentified
        p = len(self.fit.estimates.beta)
        for j, column in enumerate(self.fit.layout.fixed.kept):
            estimate = float(self.fit.estimates.beta[j])
            error = float(errors[column])
            yield Parameter(
                names[column],
                "coefficient",
                estimate,
                0.0,
                (-FAR, FAR),
                (-np.inf, np.inf),
                1.0,
                error,
                where=(j,),
                note=""
                if unknown is None or not unknown.concerns(np.eye(p)[[j]])[0]
                else "without limits, for its error depends on variances that are not identified",
            )

    def _of_block(self, number: int, block: np.ndarray) -> Iterator[tuple[str, Parameter]]:
        term = self._term_of(int(block[0]))
        group, effects = self.fit.group_names[term.factor], self.fit.effect_names
        Psi = self.sigma**2 * self.fit.estimates.D
        sd = np.sqrt(np.diag(Psi))
        errors = self._errors()
        for i in block:
            unit = self._unit(int(i))
            error = errors.get((int(i), int(i)), np.nan)
            scale = error if np.isfinite(error) else self.noise[block].mean() * unit
            yield (
                term.label,
                Parameter(
                    f"{group}: sd({effects[i]})",
                    "sd",
                    float(sd[i]),
                    float(sd[i] / unit),
                    (0.0, float(sd[i] / unit + FAR * scale / unit)),
                    (0.0, np.inf),
                    scale / unit,
                    error,
                    where=(int(i),),
                    group=number,
                ),
            )
        for a, i in enumerate(block):
            for j in block[:a]:
                defined = sd[i] > 0.0 and sd[j] > 0.0
                r = float(np.clip(Psi[i, j] / (sd[i] * sd[j]), -1.0, 1.0)) if defined else np.nan
                error = errors.get((int(j), int(i)), np.nan)
                # Rounding keeps a perfect correlation from being exactly so.
                r = float(np.sign(r)) if abs(r) > 1.0 - PERFECT else r
                step = error / np.sqrt(1.0 - r * r) if np.isfinite(error) and abs(r) < 1.0 else 0.3
                zero = effects[i] if sd[i] == 0.0 else effects[j]
                yield (
                    term.label,
                    Parameter(
                        f"{group}: cor({effects[j]}, {effects[i]})",
                        "correlation",
                        r,
                        float(np.arcsin(r)),
                        (-0.5 * np.pi, 0.5 * np.pi),
                        (-1.0, 1.0),
                        min(step, 0.5),
                        error,
                        where=(int(j), int(i)),
                        group=number,
                        note="" if defined else f"undefined, for the variance of {zero} is zero",
                    ),
                )

    def _errors(self) -> dict[tuple[int, int], float]:
        """Return standard errors of standard deviations and correlations, by columns."""
        table = self.fit.varcorr()
        errors: dict[tuple[int, int], float] = {}
        at = 0
        values = table["sdcor_se"].to_numpy(float)
        for term in self.fit.terms:
            here = range(term.columns.start, term.columns.stop)
            pairs = [(i, i) for i in here]
            pairs += [(here[j], here[i]) for i, j in term.pairs]
            errors.update(zip(pairs, values[at : at + len(pairs)].tolist(), strict=True))
            at += len(pairs)
        return errors

    def _of_structure(self, number: int, part: Structured) -> Iterator[tuple[str, Parameter]]:
        term = self._term_of(part.columns[0])
        q, group = term.width, self.fit.group_names[term.factor]
        own = slice(*part.parameters)
        theta = self.start.theta[own]
        labels = part.covariance.labels(self.fit.effect_names[term.columns])
        table = self.fit.structures()
        errors = table.loc[table["term"] == term.label, "std err"].to_numpy(float)
        generic = np.random.default_rng(0).uniform(0.5, 1.5, len(theta))
        involved = np.abs(slopes(part.covariance, generic, q, of="values")) > 1e-12
        gradients = slopes(part.covariance, theta, q, of="values")
        is_sd = part.covariance.is_sd(q)
        vanished = not np.any(np.diag(self.fit.estimates.D)[term.columns])
        for j, label in enumerate(labels):
            name = f"{group}: {label}"
            if np.count_nonzero(involved[j]) != 1:
                self.left_out[name] = (
                    "it depends on several parameters of the structure at once; use "
                    "confint(method='bootstrap')"
                )
                continue
            entry = int(np.argmax(involved[j]))
            unit = self.sigma if is_sd[j] else 1.0
            here, one, two, low, high = (
                _structure_value(part, theta, entry, j, x)
                for x in (float(theta[entry]), 1.0, 2.0, -np.inf, np.inf)
            )
            slope = float(gradients[j, entry])
            usable = np.isfinite(errors[j]) and abs(slope) > 0.0
            step = abs(errors[j] / (slope * unit)) if usable else 0.3
            start, kappa = float(theta[entry]), 0.0
            if is_sd[j]:
                # A power m of theta; with the scale, theta^m e^(s / 2), it is a natural one.
                start, low, high = abs(start), 0.0, np.inf
                kappa = 0.5 / float(np.log2(two / one))
                bounds = (0.0, start + FAR * step)
            else:
                reach = SATURATED if np.isfinite([low, high]).any() else FAR * step
                bounds = (min(-reach, start), max(reach, start))
            undefined = vanished and not is_sd[j]
            yield (
                term.label,
                Parameter(
                    name,
                    "structure",
                    np.nan if undefined else here * unit,
                    start,
                    bounds,
                    (low, high),
                    min(step, 0.5 * SATURATED),
                    float(errors[j]),
                    where=(own.start + entry, j),
                    group=number,
                    increasing=not high < low,
                    note="undefined, for the variance of its term is zero" if undefined else "",
                    kappa=kappa,
                ),
            )

    def _term_of(self, column: int) -> TermColumns:
        return next(
            term for term in self.fit.terms if term.columns.start <= column < term.columns.stop
        )

    def _unit(self, i: int) -> float:
        """Return the standard deviation of effect i whose coordinate is one."""
        return float(self.sigma * np.linalg.norm(self.z_inverse[i]))

    def value(self, parameter: Parameter, u: float) -> float:
        """Return a parameter's value from its coordinate."""
        if parameter.kind == "coefficient":
            return parameter.estimate + parameter.error * u
        if parameter.kind == "sd":
            return u * self._unit(parameter.where[0])
        if parameter.kind == "correlation":
            return float(np.sin(u))
        if parameter.kind == "sigma":
            return float(np.exp(0.5 * u) * self.y_scale)
        part = self.constraints.structures[parameter.group]
        entry, j = parameter.where
        theta = self.start.theta[slice(*part.parameters)]
        found = _structure_value(part, theta, entry - part.parameters[0], j, u)
        return found * self.sigma if parameter.kappa else found

    def coordinate(self, parameter: Parameter, value: float) -> float:
        """Return the coordinate of a standard deviation, which is proportional to it."""
        return value / self.value(parameter, 1.0)

    def standard_deviation(self, effect: int) -> Parameter | None:
        """Return the parameter that is the standard deviation of an effect, if there is one.

        Where effects share one, it is that.
        """
        for parameter in self.parameters:
            if parameter.kind == "sd" and parameter.where == (effect,):
                return parameter
        for number, part in enumerate(self.constraints.structures):
            is_sd = part.covariance.is_sd(part.columns[1] - part.columns[0])
            if part.columns[0] <= effect < part.columns[1] and len(is_sd) == 1 and is_sd[0]:
                own = (p for p in self.parameters if p.kind == "structure" and p.group == number)
                return next(own, None)
        return None

    def variances(self, parameter: Parameter) -> list[Parameter]:
        """Return the standard deviations without which a correlation is undefined."""
        if parameter.kind == "correlation":
            return [
                other
                for other in self.parameters
                if other.kind == "sd" and other.where[0] in parameter.where
            ]
        if parameter.kind == "structure" and not parameter.kappa:
            part = self.constraints.structures[parameter.group]
            first = self.standard_deviation(part.columns[0])
            return [] if first is None else [first]
        return []

    def values(self, held: Held) -> np.ndarray:
        """Return the values of all parameters where a search ended."""
        p = len(self.fit.estimates.beta)
        problem = self.fit.compression.problem
        R_inverse = np.asarray(problem.x_inverse)[:p, :p]
        beta = R_inverse @ (held.beta[:p] + np.asarray(problem.beta_origin)[:p]) * self.y_scale
        root = self.z_inverse @ held.root
        Psi = self.sigma**2 * root @ root.T
        sd = np.sqrt(np.diag(Psi))
        scale = float(np.exp(0.5 * held.s) * self.y_scale)
        of_parts = []
        for part in self.constraints.structures:
            own = _structure_values(part, held.theta[slice(*part.parameters)])
            is_sd = part.covariance.is_sd(part.columns[1] - part.columns[0])
            of_parts.append(np.where(is_sd, own * scale, own))
        found = []
        for parameter in self.parameters:
            where = parameter.where
            if parameter.kind == "coefficient":
                found.append(beta[where[0]])
            elif parameter.kind == "sd":
                found.append(sd[where[0]])
            elif parameter.kind == "correlation":
                i, j = where
                size = sd[i] * sd[j]
                found.append(Psi[i, j] / size if size > 0.0 else np.nan)
            elif parameter.kind == "sigma":
                found.append(scale)
            else:
                found.append(of_parts[parameter.group][where[1]])
        return np.array(found)

    # --- charts -----------------------------------------------------------------------------

    def chart(self, parameter: Parameter | None, u: float, at: Place) -> tuple[Chart, np.ndarray]:
        """Return the chart that holds a parameter at u (None for none), and where to start in it.

        Args:
            parameter: what is held.
            u: coordinate at which it is held.
            at: the start, as near to the solution as is known.
        """
        q, problem = len(at.root), self.fit.compression.problem
        k = sum(len(block) * (len(block) + 1) // 2 for block in self.blocks)
        kind = parameter.kind if parameter is not None else None
        axes = np.eye(q)
        place = np.full((q, q), k, dtype=np.int32)
        square, sine, cosine, length = np.zeros(k), np.zeros((q, q)), np.zeros((q, q)), np.zeros(q)
        z, movable, first = np.zeros(k), np.ones(k), 0
        for number, block in enumerate(self.blocks):
            here = slice(first, first + len(block) * (len(block) + 1) // 2)
            first = here.stop
            held: list[int] = []
            if parameter is not None and kind in ("sd", "correlation"):
                held = list(parameter.where) if parameter.group == number else []
            part = _root_chart(
                at.root[block],
                self.z_inverse[np.ix_(np.array(held, int), block)],
                float(self.noise[block].mean()),
                u,
            )
            axes[np.ix_(block, block)] = part.axes
            within = np.where(part.place >= 0, part.place + here.start, k)
            place[np.ix_(block, block)] = within
            z[here], movable[here], square[here] = part.z, part.free, part.square
            if len(held) == 1:
                length[block[0]] = 1.0
            elif len(held) == 2:
                sine[block[1], block[0]] = cosine[block[1], block[1]] = 1.0
        theta, held_theta, kappa = self._lifted(at.theta), np.zeros(len(at.theta)), 0.0
        contrast, centre, unit = np.zeros(len(problem.beta_origin)), 0.0, 0.0
        if parameter is not None and kind == "structure":
            held_theta[parameter.where[0]] = 1.0
            kappa = parameter.kappa
        elif parameter is not None and kind == "coefficient":
            contrast = np.array(np.asarray(problem.x_inverse)[parameter.where[0]])
            beta = np.asarray(self.fit.estimates.solution.point.at.beta)
            centre, unit = float(contrast @ beta), parameter.error / self.y_scale
        scale_free = float(self.constraints.scale_free and kind != "sigma")
        chart = Chart(
            axes=axes,
            place=place,
            square=square,
            sine=sine,
            cosine=cosine,
            length=length,
            scale=np.float64(kind == "sigma"),
            theta=held_theta,
            kappa=np.float64(kappa),
            origin=np.float64(self.origin),
            contrast=contrast,
            centre=np.float64(centre),
            unit=np.float64(unit),
            free=np.concatenate([[scale_free], movable, 1.0 - held_theta]),
        )
        return chart, np.concatenate([[at.s], z, theta])

    def plain_starts(self) -> list[Place]:
        """Return the estimates, the same without correlations, and effects of two sizes.

        These sizes are the sampling noise of one group and the residual standard deviation.
        """
        at = self.start
        sizes = np.linalg.norm(self.z_inverse @ at.root, axis=1)
        starts = [at, at._replace(root=np.linalg.inv(self.z_inverse) @ np.diag(sizes))]
        noise = float(self.noise.mean())
        return starts + [self._spread(at, range(len(self.blocks)), x) for x in (noise, 1.0)]

    def other_starts(self, parameter: Parameter, found: Place) -> list[Place]:
        """Return starts for whoever doubts a minimum.

        The plain ones; each other set of effects raised, and nearly without variance; and in the
        parameter's own set (for a coefficient in each) every effect turned round, so that its
        correlations are, and nearly without variance; two at random; beside a standard deviation
        that is held, the other effects as multiples of its own: the branches on which correlations
        are perfect; and structures with correlations far to either side, which the estimates do
        not tell where a variance is zero.

        Args:
            parameter: what is held.
            found: the minimum.
        """
        at, starts = self.start, self.plain_starts()
        user, working = self.z_inverse @ at.root, np.linalg.inv(self.z_inverse)
        own = range(len(self.blocks))
        if parameter.kind in ("sd", "correlation"):
            own = range(parameter.group, parameter.group + 1)
        if len(self.blocks) > 1:
            for number in range(len(self.blocks)):
                starts += [self._spread(at, [number], x) for x in (VANISHING**2, 1.0)]
        for number in own:
            block = self.blocks[number]
            for i, factor in [*((i, -1.0) for i in block[1:]), *((i, VANISHING) for i in block)]:
                changed = user.copy()
                changed[i] *= factor
                starts.append(at._replace(root=working @ changed))
        rng = np.random.default_rng(0)
        size = max(float(np.abs(at.root).max()), float(self.noise.mean()))
        inside = np.zeros((len(at.root), 1))
        inside[np.concatenate([[], *(self.blocks[number] for number in own)]).astype(int)] = 1.0
        if inside.any():
            starts += [
                at._replace(root=at.root + 0.5 * size * inside * rng.standard_normal(at.root.shape))
                for _ in range(2)
            ]
        if parameter.kind == "sd":
            starts += self._parallel(parameter, found)
        if len(at.theta):
            every, noise = range(len(self.blocks)), float(self.noise.mean())
            starts += [self._spread(at, every, noise, turn) for turn in (-TURNED, TURNED)]
        return starts

    def _parallel(self, parameter: Parameter, found: Place) -> Iterator[Place]:
        """Yield a place with one effect a multiple of another, which stays what it is."""
        block = self.blocks[parameter.group]
        axes, along = _held_first(self.z_inverse[np.ix_(np.array(parameter.where), block)])
        rows = along @ found.root[block]
        for j in range(1, len(block)):
            for multiple in PARALLEL:
                changed, root = rows.copy(), np.array(found.root)
                changed[j] = multiple * rows[0]
                root[block] = axes @ changed
                yield found._replace(root=root)

    def _spread(
        self, at: Place, numbers: Iterable[int], size: float, turn: float | None = None
    ) -> Place:
        """Return a place with some sets of effects uncorrelated, of a size in working units.

        The other parameters of structures stay, or all have the value ``turn``.
        """
        root = np.array(at.root)
        for number in numbers:
            block = self.blocks[number]
            root[block] = size * np.eye(len(root))[block]
        theta = np.array(at.theta)
        for part in self.constraints.structures:
            q, here = part.columns[1] - part.columns[0], slice(*part.columns)
            unit = float(np.abs(np.diag(self.z_inverse)[here]).mean())
            is_sd = np.asarray(part.covariance.is_sd(q))
            own = theta[slice(*part.parameters)]
            own[is_sd] = size * unit
            if turn is not None:
                own[~is_sd] = turn
        return at._replace(root=root, theta=theta)

    def singular(self, place: Place) -> bool:
        """Return whether the covariance of some effects is singular, or next to it."""
        for block in self.blocks:
            root = place.root[block]
            lower = lower_from_root(root[_pivots(root, [])])
            if np.min(np.abs(np.diag(lower))) < NEAR_ZERO * float(self.noise[block].mean()):
                return True
        return bool(np.any(self._lifted(place.theta) != place.theta))

    def _lifted(self, theta: np.ndarray) -> np.ndarray:
        """Return theta with standard deviations next to zero a little above it."""
        theta = np.array(theta)
        for part in self.constraints.structures:
            q, here = part.columns[1] - part.columns[0], slice(*part.columns)
            own = theta[slice(*part.parameters)]
            size = float((self.noise[here] * np.abs(np.diag(self.z_inverse)[here])).mean())
            small = np.asarray(part.covariance.is_sd(q)) & (np.abs(own) < NEAR_ZERO * size)
            own[small] = LIFT * size
        return theta


def _structure_values(part: Structured, theta: np.ndarray) -> np.ndarray:
    """Return the values of a structure at theta, relative to the residual's."""
    return values_at(part.covariance, theta, part.columns[1] - part.columns[0])


def _structure_value(part: Structured, theta: np.ndarray, entry: int, j: int, x: float) -> float:
    """Return value j of a structure with one entry of theta at x."""
    theta = np.array(theta)
    theta[entry] = x
    return float(_structure_values(part, theta)[j])


class _RootChart(NamedTuple):
    axes: np.ndarray
    place: np.ndarray
    z: np.ndarray
    free: np.ndarray
    square: np.ndarray


def _root_chart(root: np.ndarray, functionals: np.ndarray, noise: float, u: float) -> _RootChart:
    """Return how the root of one block of effects follows from its variables.

    Args:
        root: rows of the root at the start, (w, q).
        functionals: rows that map working coordinates to the effects that are held: none, one for
            a standard deviation or two for a correlation, (h, w).
        noise: size that counts as small.
        u: value of the coordinate.
    """
    w, h = len(root), len(functionals)
    axes, along = _held_first(functionals) if h else (np.eye(w),) * 2
    root = along @ root
    size = root.copy()
    if h == 1:
        norm = float(np.linalg.norm(root[0]))
        size[0] *= u / norm if norm > 0.0 else 0.0
    order = _pivots(size, list(range(h)) if h == 2 else [])
    L = lower_from_root(root[order])
    direction = L[order.index(0)].copy()
    small = np.abs(np.diag(L)) < NEAR_ZERO * noise
    L[small, small] = LIFT * noise
    rows, columns = _triangle(w)
    free, square = np.ones(len(rows)), np.zeros(len(rows))
    place = np.full((w, w), -1)
    place[np.asarray(order)[rows], columns] = np.arange(len(rows))
    z = L[rows, columns]
    if h == 1:
        at = order.index(0)
        own = rows == at
        norm = float(np.linalg.norm(direction))
        direction = direction / norm if norm > 0.0 else np.eye(w)[0]
        if at and abs(direction[at]) < NEAR_ZERO:
            direction[at] = LIFT
        z[own] = direction[: at + 1]
        # The length says nothing: the largest entry stays.
        free[np.flatnonzero(own)[int(np.argmax(np.abs(z[own])))]] = 0.0
    elif h == 2:
        z[0], z[2] = np.sqrt(np.maximum([np.linalg.norm(L[0]), np.linalg.norm(L[1])], 0.0))
        square[[0, 2]] = 1.0
        z[1] = free[1] = 0.0
        place[1, 0] = 2
    return _RootChart(axes, place, z, free, square)


def _held_first(functionals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return axes (w, w) in which functionals (h, w) come first, and their inverse.

    Functionals count by their directions.  A profile asks for the same ones again and again.
    """
    return _axes(functionals.shape, functionals.tobytes())


@lru_cache(maxsize=64)
def _axes(shape: tuple[int, ...], functionals: bytes) -> tuple[np.ndarray, np.ndarray]:
    f = np.frombuffer(functionals).reshape(shape)
    f = f / np.linalg.norm(f, axis=1)[:, None]
    rest = np.linalg.qr(f.T, mode="complete")[0][:, len(f) :]
    along = np.vstack([f, rest.T])
    return np.linalg.inv(along), along


@lru_cache(maxsize=64)
def _triangle(w: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the lower triangle of a matrix (w, w)."""
    return np.tril_indices(w)


def _pivots(root: np.ndarray, first: Sequence[int]) -> list[int]:
    """Return the rows of a root in the order of a Cholesky factor with pivoting.

    Args:
        root: (w, q).
        first: rows that come first.
    """
    rest, order = root.copy(), list(first)
    for row in order:
        rest = _without(rest, row)
    while len(order) < len(root):
        sizes = np.einsum("ij,ij->i", rest, rest)
        sizes[order] = -1.0
        order.append(int(np.argmax(sizes)))
        rest = _without(rest, order[-1])
    return order


def _without(rows: np.ndarray, row: int) -> np.ndarray:
    """Return rows without their parts along one of them."""
    direction = rows[row]
    square = float(direction @ direction)
    return rows - np.outer(rows @ direction, direction / square) if square > 0.0 else rows
