"""Fit a model: formula or arrays in, :class:`Fit` out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .characters import Visible
from .compress import Compression, FactorColumns, Layout, compress, layout
from .constraints import Settings, TermColumns
from .design import DataError, Design, RandomBlock, build_design, design_from_arrays
from .estimation import estimate_given, free_terms
from .far_apart import estimate_closely
from .formula import with_evaluate
from .frames import listing, real_numbers
from .identifiability import Unidentified, check_residual, unidentified
from .matrices import check_range
from .options import EngineName, Missing, Solver
from .results import Fit
from .safe import Evaluate
from .spec import ModelSpec

ROUNDING = 100.0
"""Residuals this many units of rounding above zero, relative to the response, are not real."""


class ConvergenceWarning(Visible, UserWarning):
    """The solver stopped before the optimum."""


class RankWarning(Visible, UserWarning):
    """Columns of the fixed-effects design were dropped as linear combinations of others."""


class IdentifiabilityWarning(Visible, UserWarning):
    """The data do not tell some of the variance parameters apart."""


def fit(
    formula: str | ModelSpec,
    data: Any,
    *,
    reml: bool = True,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, Any] | None = None,
    relmat: Mapping[str, pd.DataFrame] | None = None,
    missing: Missing = "drop",
    start: Any = None,
    fix: Mapping[str, Any] | None = None,
    solver: Solver = "auto",
    tol: float | None = None,
    max_steps: int | None = None,
    em_steps: int = 3,
    engine: EngineName = "auto",
    seed: int = 0,
    verbose: bool = False,
    context: Mapping[str, Any] | None = None,
    evaluate: Evaluate = "python",
) -> Fit:
    """Fit a linear mixed model.

    A formula is code: its expressions run as Python.  For text of others use ``evaluate="safe"``.

    Args:
        formula: lme4-style text such as ``"Weight ~ Time + (1 + Time | Pig)"``, with any number of
            random terms on nested or crossed factors, or a :class:`ModelSpec`.
        data: pandas or polars data frame, pyarrow table, or mapping of columns.
        reml: restricted maximum likelihood (default) or, if False, maximum likelihood.
        weights: prior weights (inverse variances, as in lme4), array (n,) or column name.
        offset: known part of the mean, array (n,) or column name; adds to ``offset(...)`` terms.
        contrasts: coding per factor, e.g. ``{"recipe": "sum"}``; treatment coding by default, whose
            reference is the first level: ``C(recipe, ref="b")`` in the formula, short for
            ``C(recipe, Treatment("b"))``, takes another.
        relmat: known relationships between the levels of grouping factors, as a mapping from the
            factor's name to a symmetric positive semidefinite frame whose index and columns are
            levels: pedigree, kinship, phylogeny.  It may have levels that are not in the data.
        missing: "drop" rows with missing values (default) or "raise".
        start: an earlier fit, ``{"cov_re": ..., "scale": ...}`` or theta; a moment estimate by
            default.
        fix: hold ``{"cov_re": matrix or {term: matrix}, "scale": number}`` (either or both) at
            values in natural units.  A data frame counts by its labels, an array by position.
        solver: "newton" (exact Hessian), "lbfgs", or "auto" by the number of parameters.
        tol: largest Newton decrement, in units of -2 log-likelihood, that counts as converged; None
            for 1e-16, and for 1e-13 with crossed factors.
        max_steps: most solver steps; None for 100 of Newton or 3000 of L-BFGS.
        em_steps: most EM steps before the solver's first.
        engine: form of the likelihood: "grouped" (one factor), "nested", "crossed" (one dense
            factor for all but the largest factor) or "iterative"; "auto" by the structure of the
            model.  :attr:`Fit.engine` says which it was, and why.
        seed: of the random probes of the iterative engine, whose log-likelihood has a Monte Carlo
            error, :attr:`Fit.criterion_error`.
        verbose: print the trace of the solve.
        context: names for use in the formula besides NumPy's ``np`` and the transforms.
        evaluate: "python" runs the formula's expressions as Python; "safe" evaluates columns,
            arithmetic, comparisons, NumPy's elementwise functions and the transforms, and nothing
            else, with ``context`` unused.  A :class:`ModelSpec` that is safe stays so.

    Returns:
        The fit.  A singular covariance is a legitimate result, reported by ``fit.singular``; a
        solve that did not converge is reported by ``fit.converged`` and a warning.

    Raises:
        FormulaError: if the formula cannot be read.
        DataError: if the data do not fit the formula, or cannot identify the model.
        ConstraintError: if ``start`` or ``fix`` does not fit the model.
        EngineError: if the engine does not fit the model, or its memory is not there.

    Example:
        >>> import lmmax
        >>> data = lmmax.datasets.load("sleepstudy")
        >>> result = lmmax.fit("Reaction ~ Days + (1 + Days | Subject)", data)
        >>> result.params.round(4).to_dict()
        {'Intercept': 251.4051, 'Days': 10.4673}

    Source: Bates, Maechler, Bolker and Walker (2015), J. Stat. Softw. 67(1), for the model and
    its criterion; Lindstrom and Bates (1988), JASA 83, 1014-1022, for Newton and EM.
    """
    settings = Settings(
        reml=check_reml(reml),
        start=start,
        fix=fix,
        solver=solver,
        tol=tol,
        max_steps=max_steps,
        em_steps=em_steps,
        engine=engine,
        seed=seed,
    )
    spec = with_evaluate(formula, evaluate)
    design = build_design(
        spec,
        data,
        weights=weights,
        offset=offset,
        contrasts=contrasts,
        relmat=relmat,
        missing=missing,
        context=context,
    )
    return fit_design(design, settings, verbose=verbose)


def fit_arrays(
    y: Any,
    X: Any,
    groups: Any,
    Z: Any = None,
    *,
    reml: bool = True,
    weights: Any = None,
    offset: Any = None,
    x_names: Any = None,
    z_names: Any = None,
    group_name: str = "Group",
    covariance: Any = "us",
    relmat: Mapping[str, pd.DataFrame] | None = None,
    missing: Missing = "drop",
    start: Any = None,
    fix: Mapping[str, Any] | None = None,
    solver: Solver = "auto",
    tol: float | None = None,
    max_steps: int | None = None,
    em_steps: int = 3,
    engine: EngineName = "auto",
    seed: int = 0,
    verbose: bool = False,
) -> Fit:
    """Fit a linear mixed model from arrays, without a formula.

    Args:
        y: response, shape (n,).
        X: fixed-effects design, shape (n, p), with its column of ones if there is an intercept.
        groups: group label of each row, shape (n,), of any type, in any order.  For several
            grouping factors a mapping from name to labels, or a data frame with a column for each.
        Z: random-effects design, shape (n, q); a random intercept if None.  For several factors a
            mapping from name to design.
        weights: prior weights, (n,).
        offset: known part of the mean, (n,).
        x_names: names of the columns of X; from the data frame, or x1, x2, ... if None.
        z_names: names of the columns of Z, likewise; a mapping for several factors.
        group_name: name of the grouping factor, if it is the only one.
        covariance: "us" (correlated effects), "diag", another structure of
            :mod:`lmmax.covariances`, or a mapping by factor.
        relmat: relationship matrices by factor, as in :func:`fit`.
        reml: as in :func:`fit`, like all that follow.
        missing: "drop" or "raise".
        start: an earlier fit, ``{"cov_re": ..., "scale": ...}`` or theta.
        fix: ``{"cov_re": ..., "scale": ...}`` to hold fixed.
        solver: "auto", "newton" or "lbfgs".
        tol: largest Newton decrement that counts as converged.
        max_steps: most solver steps; None for 100 of Newton or 3000 of L-BFGS.
        em_steps: most EM steps before them.
        engine: form of the likelihood.
        seed: of the iterative engine's random probes.
        verbose: print the trace of the solve.

    Returns:
        The fit.

    Raises:
        DataError: if the arrays do not fit together, or cannot identify the model.

    Example:
        >>> import numpy as np, lmmax
        >>> rng = np.random.default_rng(1)
        >>> groups = np.repeat(np.arange(30), 5)
        >>> X = np.column_stack([np.ones(150), rng.normal(size=150)])
        >>> y = X @ [1.0, 2.0] + rng.normal(size=30)[groups] + rng.normal(size=150)
        >>> lmmax.fit_arrays(y, X, groups).converged
        True
    """
    settings = Settings(
        reml=check_reml(reml),
        start=start,
        fix=fix,
        solver=solver,
        tol=tol,
        max_steps=max_steps,
        em_steps=em_steps,
        engine=engine,
        seed=seed,
    )
    design = design_from_arrays(
        y,
        X,
        groups,
        Z,
        weights=weights,
        offset=offset,
        x_names=x_names,
        z_names=z_names,
        group_name=group_name,
        covariance=covariance,
        relmat=relmat,
        missing=missing,
    )
    return fit_design(design, settings, verbose=verbose)


def check_reml(reml: Any) -> bool:
    """Return ``reml``, or raise if it is no logical value."""
    # Text such as "ML" is true in Python, and would mean the opposite.
    if not isinstance(reml, bool | np.bool_):
        raise TypeError(
            f"reml={reml!r} must be True (restricted maximum likelihood) or False (maximum "
            "likelihood)"
        )
    return bool(reml)


class Prepared(NamedTuple):
    """A design with all that estimation needs and that does not depend on its settings.

    Attributes:
        design: the design.
        layout: its matrices, analysed.
        compression: sufficient statistics.
        terms: the random terms' places.
        notes: what a reader should know.
    """

    design: Design
    layout: Layout
    compression: Compression
    terms: tuple[TermColumns, ...]
    notes: tuple[str, ...]


def prepare(design: Design, engine: str = "auto", settings: Settings | None = None) -> Prepared:
    """Compress a design for the form of the likelihood asked for.

    Args:
        design: the design.
        engine: the form of the likelihood.
        settings: if given, designs that cannot tell the parameters apart are refused before
            anything is compressed, which may take long for them.
    """
    factors, terms = arrange(design)
    arranged = layout(
        design.X,
        factors,
        design.weights,
        engine,
        n_zero=design.n_zero,
        log_rooted=design.log_weights,
    )
    if settings is not None:
        check_enough(design, arranged, terms, settings)
    compressed = compress(without_offset(design), arranged)
    return Prepared(design, arranged, compressed, terms, _notes(design, arranged))


def fit_design(design: Design, settings: Settings, *, verbose: bool = False) -> Fit:
    """Fit a design; the common end of :func:`fit` and :func:`fit_arrays`."""
    warn_of_steps(design, stacklevel=4)
    found = _fit_checked(prepare(design, settings.engine, settings), settings, verbose)
    if found.unidentified is None:
        warn_of_slopes(design, stacklevel=4)
    return found


def warn_of_steps(design: Design, stacklevel: int = 3) -> None:
    """Warn of structures that count steps between levels which are numbers unevenly spaced."""
    for block in design.blocks:
        uneven = getattr(block.covariance, "uneven", "")
        if uneven:
            warnings.warn(uneven, stacklevel=stacklevel)


def warn_of_slopes(design: Design, stacklevel: int = 3) -> None:
    """Warn of random slopes of variables that have one value in each group.

    They are no slopes: the effect of such a variable is another intercept of the group, whose
    variance depends on the variable.  Indicators without an intercept beside them are left alone,
    for they are variances by kind of group, which is what such terms are written for.
    """
    for block in design.blocks:
        grouping = design.groupings[block.grouping]
        n, codes = len(block.Z), grouping.codes
        first = np.zeros(len(grouping.levels), dtype=np.int64)
        first[codes[::-1]] = np.arange(n)[::-1]
        if len(grouping.levels) >= n or np.bincount(codes).max() < 2:
            continue
        varies = [not (z == z[0]).all() for z in block.Z.T]
        between = [
            name
            for name, z, changes in zip(block.names, block.Z.T, varies, strict=True)
            if changes
            and (z == z[first[codes]]).all()
            and not (all(varies) and np.isin(z, (0.0, 1.0)).all())
        ]
        if between:
            names = listing(map(repr, between))
            many = len(between) > 1
            warnings.warn(
                f"{names} {'do' if many else 'does'} not vary within any group of "
                f"{grouping.name!r}, so {block.term} has no slope to estimate: what it fits is an "
                f"intercept whose variance depends on {names}; leave {'them' if many else 'it'} "
                "out of the term unless that is meant",
                IdentifiabilityWarning,
                stacklevel=stacklevel,
            )


def fit_prepared(prepared: Prepared, settings: Settings, *, verbose: bool = False) -> Fit:
    """Fit what :func:`prepare` made; any number of times."""
    check_enough(prepared.design, prepared.layout, prepared.terms, settings)
    return _fit_checked(prepared, settings, verbose)


def _fit_checked(prepared: Prepared, settings: Settings, verbose: bool) -> Fit:
    """Fit designs that can tell the parameters apart."""
    design, arranged, compressed, terms, notes = prepared
    _check_response(design, arranged, compressed)
    if len(arranged.fixed.kept) < len(design.x_names):
        warnings.warn(notes[-1], RankWarning, stacklevel=4)
    return _solve(design, settings, arranged, compressed, terms, notes, verbose, depth=5)


def arrange(design: Design) -> tuple[tuple[FactorColumns, ...], tuple[TermColumns, ...]]:
    """Gather the random terms by grouping factor; the terms stay in the order of the formula."""
    check_range(design.X, design.x_names)
    by_factor: list[list[RandomBlock]] = [[] for _ in design.groupings]
    for block in design.blocks:
        _check_columns(block)
        check_range(block.Z, block.names, f" of {block.term}")
        by_factor[block.grouping].append(block)
    factors, places, at = [], {}, 0
    for position, (grouping, blocks) in enumerate(zip(design.groupings, by_factor, strict=True)):
        mix = []
        for block in blocks:
            width = block.Z.shape[1]
            pattern = block.covariance.pattern(width)
            mix.append(pattern is not None and bool(pattern.all()))
            places[id(block)] = TermColumns(
                str(block.term),
                slice(at, at + width),
                block.covariance,
                position,
                tuple((grouping.name, name) for name in block.names),
            )
            at += width
        factors.append(
            FactorColumns(
                name=grouping.name,
                codes=grouping.codes,
                n_groups=len(grouping.levels),
                blocks=tuple(block.Z for block in blocks),
                mix=tuple(mix),
                root=grouping.root,
            )
        )
    return tuple(factors), tuple(places[id(block)] for block in design.blocks)


def _check_columns(block: RandomBlock) -> None:
    """Raise for a random effect that no row sees."""
    for j in np.flatnonzero(block.Z[0] == 0.0):
        if not block.Z[:, j].any():
            raise DataError(
                f"the random effect {block.names[j]!r} of {block.term} is zero in every row, so "
                "its variance cannot be estimated; leave it out"
            )


def refit_response(fitted: Fit, y: Any) -> Fit:
    """Fit the model of ``fitted`` to another response; see :meth:`lmmax.Fit.refit`."""
    same_length = isinstance(y, pd.Series) and len(y) == fitted.nobs
    if same_length and not y.index.equals(fitted.design.index):
        raise DataError(
            "y is a Series whose index differs from that of the rows used in the fit: reorder it, "
            "or pass y.to_numpy() if its rows are in that order"
        )
    try:
        y = real_numbers(y, "y")
    except DataError:
        raise
    except (TypeError, ValueError):
        raise DataError("y must be numeric, one value for each row used in the fit") from None
    if y.shape != (fitted.nobs,):
        raise DataError(
            f"y has shape {y.shape}; refit needs one value for each of the {fitted.nobs} rows "
            "used in the fit"
        )
    if not np.isfinite(y).all():
        raise DataError(
            f"y is not finite at position {int(np.argmin(np.isfinite(y)))}; refit takes complete "
            "responses only, fit the data without these rows instead"
        )
    design = replace(fitted.design, y=y)
    compressed = compress(without_offset(design), fitted.layout, earlier=fitted.compression)
    _check_response(design, fitted.layout, compressed)
    return _solve(
        design,
        fitted.settings,
        fitted.layout,
        compressed,
        fitted.terms,
        fitted.notes,
        False,
        # Without structures that is a matter of the designs, whatever the response.
        identified=fitted.converged
        and fitted.unidentified is None
        and not fitted.estimates.constraints.structures,
    )


def refit_settings(fitted: Fit, **changes: Any) -> Fit:
    """Fit the same data with some settings changed."""
    return _solve(
        fitted.design,
        replace(fitted.settings, **changes),
        fitted.layout,
        fitted.compression,
        fitted.terms,
        fitted.notes,
        False,
    )


def residuals_given_variances(fitted: Fit, y: np.ndarray) -> np.ndarray:
    """Return the residuals of another response (nobs,), the variances being those of a fit."""
    design = replace(fitted.design, y=y, offset=None)
    compressed = compress(y, fitted.layout, earlier=fitted.compression)
    estimates = estimate_given(compressed, fitted.terms, fitted.settings, fitted.estimates)
    return replace(
        fitted, design=design, compression=compressed, estimates=estimates
    ).resid.to_numpy()


def _solve(
    design: Design,
    settings: Settings,
    arranged: Layout,
    compressed: Compression,
    terms: tuple[TermColumns, ...],
    notes: tuple[str, ...],
    verbose: bool,
    depth: int = 4,
    identified: bool = False,
) -> Fit:
    # `depth`: how far up the stack the user's call is, for the warning.
    y = without_offset(design)
    arranged, compressed, estimates = estimate_closely(y, arranged, compressed, terms, settings)
    result = Fit(design, settings, estimates, arranged, compressed, terms, notes)
    asked = not identified and estimates.suspect
    if asked and (unknown := unidentified_by(result)) is not None:
        result = replace(
            result, estimates=replace(estimates, flat=unknown.directions), unidentified=unknown
        )
    if verbose:
        print(result.convergence.history.to_string())
        print(f"{result.message} ({result.convergence.steps} evaluations)")
    if not result.converged:
        message = f"{result.message}; see fit.convergence"
        warnings.warn(message, ConvergenceWarning, stacklevel=depth)
    if result.unidentified is not None:
        warnings.warn(
            f"{result.unidentified}; they have no standard errors, nor do coefficients that "
            "depend on them",
            IdentifiabilityWarning,
            stacklevel=depth,
        )
    return result


def unidentified_by(fitted: Fit) -> Unidentified | None:
    """Return what the designs of a fit cannot tell apart, None if that is nothing."""
    estimates = fitted.estimates
    constraints = estimates.constraints
    parts = {part.columns: slice(*part.parameters) for part in constraints.structures}
    return unidentified(
        fitted.layout,
        [term for term, _ in free_terms(fitted.terms, constraints)],
        fitted.effect_names,
        fitted.group_names,
        reml=fitted.reml,
        scale=bool(constraints.scale_free),
        theta={
            term.label: estimates.structure_theta[parts[term.columns.start, term.columns.stop]]
            for term in fitted.terms
            if (term.columns.start, term.columns.stop) in parts
        },
    )


def without_offset(design: Design) -> np.ndarray:
    """Return the response less the known part of the mean, (n,)."""
    return design.y if design.offset is None else design.y - design.offset


def _notes(design: Design, arranged: Layout) -> tuple[str, ...]:
    notes = []
    if design.n_dropped:
        by = ", ".join(f"{name} {count}" for name, count in design.dropped_by.items())
        rows = "row" if design.n_dropped == 1 else "rows"
        notes.append(f"{design.n_dropped} {rows} dropped for missing values ({by})")
    return (*notes, *aliased(design.x_names, arranged.fixed.kept))


def aliased(names: Sequence[str], kept: np.ndarray) -> tuple[str, ...]:
    """Return a note on the fixed-effects columns that were dropped, if any were."""
    lost = sorted(set(range(len(names))) - set(kept.tolist()))
    if not lost:
        return ()
    return (
        "fixed-effects columns dropped as linear combinations of the columns before them: "
        + ", ".join(names[j] for j in lost),
    )


def check_identified(
    design: Design,
    arranged: Layout,
    compressed: Compression,
    terms: Sequence[TermColumns],
    settings: Settings,
) -> None:
    """Raise if the data cannot tell the parameters apart, before anything is traced."""
    check_enough(design, arranged, terms, settings)
    _check_response(design, arranged, compressed)


def check_enough(
    design: Design, arranged: Layout, terms: Sequence[TermColumns], settings: Settings
) -> None:
    """Raise if the designs cannot tell the parameters apart, whatever the response is."""
    n, p = arranged.n_obs, len(arranged.fixed.kept)
    if n <= p:
        raise DataError(
            f"{n} observations cannot estimate {p} fixed-effects coefficients and the variances; "
            "use fewer terms or more data"
        )
    free, scale = _free(terms, settings)
    lone = [i for i, factor in enumerate(arranged.factors) if factor.n_groups == 1]
    concerned = [term for term in free if term.factor in lone]
    if concerned and _unidentified(design, arranged, terms, settings, reml=True) is not None:
        grouping = design.groupings[concerned[0].factor]
        raise DataError(
            f"the grouping factor {grouping.name!r} has one level, {str(grouping.levels[0])!r}, "
            "which does not tell the parameters of "
            f"{' + '.join(term.label for term in concerned)} from each other and from the residual "
            "variance: leave the term out, take a structure with fewer parameters, or fix some "
            "with fix="
        )
    if not scale or not free:
        return
    check_residual(arranged, free, settings.reml)


def _free(terms: Sequence[TermColumns], settings: Settings) -> tuple[list[TermColumns], bool]:
    """Return the terms whose covariance is not fixed, and whether the residual variance is not."""
    fix = settings.fix or {}
    held, scale = fix.get("cov_re"), fix.get("scale") is None
    if isinstance(held, Mapping):
        return [term for term in terms if term.label not in held], scale
    return ([] if held is not None else list(terms)), scale


def unidentified_by_design(
    design: Design, arranged: Layout, terms: Sequence[TermColumns], settings: Settings
) -> Unidentified | None:
    """Return what designs cannot tell apart, whatever the response is; None if that is nothing."""
    return _unidentified(design, arranged, terms, settings, settings.reml)


def _unidentified(
    design: Design,
    arranged: Layout,
    terms: Sequence[TermColumns],
    settings: Settings,
    reml: bool,
) -> Unidentified | None:
    effects = [""] * len(arranged.A)
    for term, block in zip(terms, design.blocks, strict=True):
        effects[term.columns] = block.names
    free, scale = _free(terms, settings)
    groups = [grouping.name for grouping in design.groupings]
    return unidentified(arranged, free, effects, groups, reml=reml, scale=scale)


def _check_response(design: Design, arranged: Layout, compressed: Compression) -> None:
    # Residuals of an exact fit are rounding errors, as large as the coefficients are uncertain.
    R = arranged.fixed.R
    condition = np.linalg.norm(R, axis=0) * np.linalg.norm(arranged.fixed.inverse, axis=1)
    rounding = ROUNDING * np.finfo(float).eps * np.max(condition, initial=1.0)
    if compressed.total <= rounding**2:
        raise DataError(
            f"the response {design.response_name!r} is an exact linear combination of the fixed "
            "effects (or constant), so nothing is left to estimate variances from"
        )
