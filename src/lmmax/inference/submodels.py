"""Smaller models of the same data, made from the design of a fit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..covariances import covariance
from ..matrices import Design, RandomBlock
from ..spec import ModelSpec, RandomTerm
from ..terms import CodedTerms, Term
from .hypotheses import FixedTerms

if TYPE_CHECKING:
    from ..results import Fit


@dataclass(frozen=True)
class Submodel:
    """What a comparison needs of a model.

    Attributes:
        criterion: -2 log-likelihood (REML criterion), with the constants of the fit's own.
        n_params: number of estimated parameters.
        scale: residual variance.
        converged: whether the optimum was reached.
        criterion_error: Monte Carlo standard error of the criterion.
        fit: the fit; None without random effects.
    """

    criterion: float
    n_params: int
    scale: float
    converged: bool = True
    criterion_error: float = 0.0
    fit: Fit | None = None

    @staticmethod
    def of(fit: Fit) -> Submodel:
        """Return what is needed of a fit."""
        return Submodel(
            fit.deviance, fit.n_params, fit.scale, fit.converged, fit.criterion_error, fit
        )


@dataclass(frozen=True)
class Reduction:
    """A random term made smaller.

    Attributes:
        label: as lmerTest has it: ``Time in (1 + Time | Pig)``, or the term that is left out.
        position: of the term among the random terms.
        block: what replaces it, None if nothing does.
        mixture: whether half of the likelihood ratio's null distribution has one degree of freedom
            less: one effect with a variance of its own was taken out, with all its covariances.
    """

    label: str
    position: int
    block: RandomBlock | None
    mixture: bool


def reductions(design: Design) -> list[Reduction]:
    """Return the single reductions of each random term."""
    found: list[Reduction] = []
    for position, block in enumerate(design.blocks):
        found += _reductions(design, position, block)
    return found


def _reductions(design: Design, position: int, block: RandomBlock) -> list[Reduction]:
    term, coded = block.term, block.terms
    width = block.Z.shape[1]
    whole = Reduction(str(term), position, None, mixture=width == 1)
    pattern = block.covariance.pattern(width)
    correlated = pattern is None or bool(np.tril(pattern, -1).any())
    if pattern is None or (correlated and not pattern.all()):
        # Fewer effects would mean another structure, not a smaller one.
        return [whole]
    if width > 1 and not correlated:
        if len(coded.terms) == 1:
            return [whole]
        return [
            Reduction(
                str(RandomTerm(_left_side([each]), term.group)),
                position,
                _part(block, [other for other in coded.terms if other is not each]),
                mixture=each.columns.stop - each.columns.start == 1,
            )
            for each in coded.terms
        ]
    scope = coded.droppable()
    if not scope:
        return [whole]
    found = []
    for each in scope:
        rest = [other for other in coded.terms if other is not each]
        if rest:
            smaller: RandomBlock | None = _part(block, rest, dropped=each)
        elif _is_numeric(coded, each) or _has_intercept(design, block):
            return [whole]
        else:
            smaller = _intercept(block)
        left = 0 if smaller is None else smaller.Z.shape[1]
        found.append(
            Reduction(
                f"{each.label} in {term}", position, smaller, bool(rest) and width - left == 1
            )
        )
    return found


def _is_numeric(coded: CodedTerms, term: Term) -> bool:
    return bool(coded.numeric(term))


def _has_intercept(design: Design, block: RandomBlock) -> bool:
    """Return whether another term on the same factor has a random intercept."""
    return any(
        other is not block and other.grouping == block.grouping and other.terms.intercept
        for other in design.blocks
    )


def _left_side(terms: Sequence[Term]) -> str:
    """Return terms as the text on the left of a random term's bar."""
    intercept = "0" if all(term.factors for term in terms) else "1"
    return " + ".join([intercept, *(term.label for term in terms if term.factors)])


def _part(block: RandomBlock, rest: Sequence[Term], dropped: Term | None = None) -> RandomBlock:
    """Return a block with some of its terms, coded as a formula without the dropped one would."""
    q = block.Z.shape[1]
    names: tuple[str, ...]
    if dropped is None:
        B = np.eye(q)[:, np.concatenate([np.arange(q)[term.columns] for term in rest])]
    else:
        _, B = FixedTerms(block.terms, np.arange(q), np.eye(q), np.eye(q)).without(dropped)
    units = np.flatnonzero(np.sum(B != 0.0, axis=0) == 1)
    if len(units) == B.shape[1]:
        at = np.argmax(B != 0.0, axis=0)
        Z, names = block.Z[:, at], tuple(block.names[j] for j in at)
    else:
        Z, names = block.Z @ B, tuple(f"effect {j + 1}" for j in range(B.shape[1]))
    term = RandomTerm(_left_side(rest), block.term.group, block.term.covariance)
    return replace(block, term=term, Z=np.asfortranarray(Z), names=names)


def _intercept(block: RandomBlock) -> RandomBlock:
    term = RandomTerm("1", block.term.group)
    ones = np.ones((len(block.Z), 1))
    return replace(block, term=term, Z=ones, names=("Intercept",), covariance=covariance("us"))


def fit_reduced(fit: Fit, reduction: Reduction) -> Submodel:
    """Fit the model with one random term reduced, by the criterion of the fit."""
    blocks = list(fit.design.blocks)
    if reduction.block is None:
        del blocks[reduction.position]
    else:
        blocks[reduction.position] = reduction.block
    if not blocks:
        return without_random(fit)
    used = sorted({block.grouping for block in blocks})
    blocks = [replace(block, grouping=used.index(block.grouping)) for block in blocks]
    spec = fit.design.spec
    design = replace(
        fit.design,
        blocks=tuple(blocks),
        groupings=tuple(fit.design.groupings[i] for i in used),
        spec=ModelSpec(
            spec.response, spec.fixed, tuple(b.term for b in blocks), spec.offsets, spec.evaluate
        ),
    )
    return _solved(_kept_only(design, fit), fit)


def fit_columns(fit: Fit, B: np.ndarray) -> Submodel:
    """Fit the model with other fixed effects, ``X_kept B``, by the criterion of the fit.

    Args:
        fit: the fit of the larger model.
        B: (p, p0) combinations of the columns of X that were kept.
    """
    design, kept = fit.design, fit.layout.fixed.kept
    if np.all(np.sum(B != 0.0, axis=0) == 1) and np.all(B[B != 0.0] == 1.0):
        X = design.X[:, kept[np.argmax(B != 0.0, axis=0)]]
    else:
        X = design.X[:, kept] @ B
    names = tuple(f"x{j + 1}" for j in range(B.shape[1]))
    terms = CodedTerms(())  # not needed for a solve
    return _solved(replace(design, X=np.asfortranarray(X), x_names=names, terms=terms), fit)


def _kept_only(design: Design, fit: Fit) -> Design:
    """Return a design without the aliased columns, which were warned about already."""
    kept = fit.layout.fixed.kept
    if len(kept) == design.X.shape[1]:
        return design
    names = tuple(design.x_names[j] for j in kept)
    return replace(design, X=np.asfortranarray(design.X[:, kept]), x_names=names)


def _solved(design: Design, fit: Fit) -> Submodel:
    from ..fit import ConvergenceWarning, IdentifiabilityWarning, fit_design

    settings = fit.settings
    same_random = len(design.blocks) == len(fit.design.blocks) and all(
        a is b for a, b in zip(design.blocks, fit.design.blocks, strict=True)
    )
    if not same_random:
        settings = replace(settings, start=None)
    engine = settings.engine if same_random else "auto"
    with warnings.catch_warnings():
        # It becomes a note of the table; what is not identified changes no likelihood.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", IdentifiabilityWarning)
        return Submodel.of(fit_design(design, replace(settings, engine=engine)))


def without_random(fit: Fit) -> Submodel:
    """Return the linear model with the same fixed effects, in closed form."""
    design, factor = fit.design, fit.layout.fixed
    n, p = len(design.y), len(factor.kept)
    y = design.y if design.offset is None else design.y - design.offset
    weights = np.ones(n) if design.weights is None else design.weights
    residual = y
    X = design.X if p == design.X.shape[1] else design.X[:, factor.kept]
    for _ in range(2):  # the second time takes out what rounding left
        residual = residual - X @ (
            factor.inverse @ (factor.inverse.T @ (X.T @ (weights * residual)))
        )
    rss = float(np.sum(weights * residual**2))
    d = n - fit.reml * p
    fixed = (fit.settings.fix or {}).get("scale")
    scale = rss / d if fixed is None else float(fixed)
    criterion = d * float(np.log(2.0 * np.pi * scale)) + rss / scale
    criterion -= float(np.sum(np.log(weights)))
    if fit.reml:
        criterion += 2.0 * float(np.sum(np.log(np.abs(np.diag(factor.R)))))
    return Submodel(criterion, p + (fixed is None), scale)
