"""What is no fit is told so, by every function that takes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import lmmax


@pytest.mark.parametrize(
    "function",
    [
        lmmax.anova,
        lmmax.bootstrap,
        lmmax.conditional_aic,
        lmmax.confint,
        lmmax.drop1,
        lmmax.information,
        lmmax.joint_covariance,
        lmmax.profile,
        lmmax.ranova,
        lmmax.robust,
        lmmax.sandwich,
        lmmax.scores,
        lmmax.simulate,
    ],
)
def test_a_fit_is_expected(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"must be a fit, as lmmax\.fit returns it, not str"):
        function("y ~ x + (1 | g)")


def test_two_fits_are_expected(sleepstudy_slope: lmmax.Fit) -> None:
    with pytest.raises(TypeError, match="argument 2 must be a fit"):
        lmmax.anova(sleepstudy_slope, "y ~ x + (1 | g)")
    with pytest.raises(TypeError, match="large must be a fit"):
        lmmax.bootstrap_test(sleepstudy_slope, "y ~ x + (1 | g)")
