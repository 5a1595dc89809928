"""Covariance structures against formulas written out in NumPy."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmax.covariances import (
    NAMES,
    Covariance,
    Effects,
    OrnsteinUhlenbeck,
    Toeplitz,
    Unstructured,
    bends,
    canonical,
    covariance,
    matrix_at,
    slopes,
    values_at,
)
from lmmax.design import DataError, build_design
from lmmax.spec import ModelSpec, RandomTerm
from tests.compiled import jit

pytestmark = pytest.mark.unoptimised

STRUCTURES = ["us", "diag", "homdiag", "cs", "homcs", "ar1", "hetar1", "toep", "homtoep", "ou"]
TIMES = (0.5, 1.0, 3.0, 4.0, 4.5)
Q = len(TIMES)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def effects(q=Q, levels=TIMES, ordered=True):
    return Effects(
        tuple(f"f[{i}]" for i in range(q)),
        None if levels is None else tuple(levels)[:q],
        ordered,
        "s(0 + f | g)",
        "f",
    )


def make(name, q=Q):
    return covariance(name).prepare(effects(q))


def random_theta(structure, q, seed=0, spread=1.0):
    return np.random.default_rng(seed).normal(0.0, spread, structure.n_parameters(q))


# --- The matrices, one entry at a time -------------------------------------------------------


def by_hand(name, theta, q):
    """D of one structure, from its definition."""
    if name == "us":
        L = np.zeros((q, q))
        k = 0
        for i in range(q):
            for j in range(i + 1):
                L[i, j] = theta[k]
                k += 1
        return L @ L.T
    if name in ("diag", "homdiag"):
        return np.diag(np.resize(theta, q) ** 2)
    one = name in ("homcs", "ar1", "homtoep", "ou")
    sd = np.repeat(abs(theta[0]), q) if one else theta[:q] ** 2
    x = theta[1:] if one else theta[q:]
    C = np.eye(q)
    for i in range(q):
        for j in range(q):
            lag = abs(i - j)
            if lag == 0:
                continue
            if name.endswith("cs"):
                # Logistic with the limits -1/(q-1) and 1, shifted to be zero at x = 0.
                odds = np.exp(2.0 * x[0]) / (q - 1)
                C[i, j] = (odds - 1.0 / (q - 1)) / (odds + 1.0)
            elif name.endswith("ar1"):
                C[i, j] = np.tanh(x[0]) ** lag
            elif name.endswith("toep"):
                C[i, j] = toeplitz_correlation(np.tanh(x), lag)
            else:
                gap = np.median(np.diff(TIMES[:q]))
                at_gap = 1.0 / (1.0 + np.exp(-x[0]))
                C[i, j] = at_gap ** (abs(TIMES[i] - TIMES[j]) / gap)
    return np.outer(sd, sd) * C


def toeplitz_correlation(partial, lag):
    """The correlation at a lag such that the partial one, given all between, is as asked."""
    rho = [1.0]
    for k in range(1, lag + 1):
        if k == 1:
            rho.append(partial[0])
            continue
        between = np.array([[rho[abs(i - j)] for j in range(k - 1)] for i in range(k - 1)])
        first = np.array(rho[1:k])
        last = first[::-1]
        weights = np.linalg.solve(between, first)
        rho.append(weights @ last + partial[k - 1] * (1.0 - weights @ first))
    return rho[lag]


@pytest.mark.parametrize("q", [2, 3, Q])
@pytest.mark.parametrize("name", STRUCTURES)
def test_matrix(name, q):
    structure = make(name, q)
    matrix = jit(structure.matrix, static_argnums=1)
    for seed in range(3):
        theta = random_theta(structure, q, seed)
        D = matrix(jnp.asarray(theta), q)
        np.testing.assert_allclose(D, by_hand(name, theta, q), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("us", 15), ("diag", 5), ("homdiag", 1), ("cs", 6), ("homcs", 2),
        ("ar1", 2), ("hetar1", 6), ("toep", 9), ("homtoep", 5), ("ou", 2),
    ],
)  # fmt: skip
def test_sizes(name, k):
    structure = make(name)
    names = tuple("abcde")
    assert structure.n_parameters(Q) == k
    assert structure.name == name
    assert structure.start(np.ones(Q)).shape == structure.theta_of(np.eye(Q)).shape == (k,)
    assert len(structure.labels(names)) == len(structure.is_sd(Q)) == k
    assert len(set(structure.labels(names))) == k
    assert structure.values(jnp.ones(k), Q).shape == (k,)


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("name", STRUCTURES)
def test_positive_semidefinite_everywhere(name, spread):
    structure = make(name)
    matrix = jit(structure.matrix, static_argnums=1)
    for seed in range(20):
        theta = random_theta(structure, Q, seed, spread)
        D = np.asarray(matrix(jnp.asarray(theta), Q))
        assert np.isfinite(D).all()
        np.testing.assert_allclose(D, D.T, rtol=1e-14)
        assert np.linalg.eigvalsh(D)[0] >= -1e-13 * np.abs(D).max()


@pytest.mark.parametrize("name", STRUCTURES)
def test_derivatives(name):
    structure = make(name)
    matrix = jit(structure.matrix, static_argnums=1)
    first = jit(jax.jacobian(structure.matrix), static_argnums=1)
    step = 1e-6
    for theta in (
        random_theta(structure, Q, 1),
        structure.start(np.arange(1.0, Q + 1)),
        np.zeros(structure.n_parameters(Q)),
    ):
        theta = jnp.asarray(theta)
        for direction in np.eye(len(theta)):
            ahead, back = theta + step * direction, theta - step * direction
            slope = (matrix(ahead, Q) - matrix(back, Q)) / (2 * step)
            np.testing.assert_allclose(first(theta, Q) @ direction, slope, atol=1e-8)
            bend = (first(ahead, Q) - first(back, Q)) / (2 * step)
            np.testing.assert_allclose(bends(structure, theta, Q) @ direction, bend, atol=1e-8)
        # By forward mode what was by reverse mode.
        np.testing.assert_allclose(slopes(structure, theta, Q), first(theta, Q), atol=1e-12)


@pytest.mark.parametrize("name", STRUCTURES)
def test_variance_zero_is_within_reach(name):
    structure = make(name)
    nothing = structure.theta_of(np.zeros((Q, Q)))
    assert np.isfinite(nothing).all()
    assert (np.asarray(structure.matrix(jnp.asarray(nothing), Q)) == 0.0).all()
    if sum(structure.is_sd(Q)) == Q:
        theta = random_theta(structure, Q)
        D = by_hand(name, theta, Q)
        D[2] = D[:, 2] = 0.0
        back = np.asarray(structure.matrix(jnp.asarray(structure.theta_of(D)), Q))
        assert (back[2] == 0.0).all()
        assert (np.delete(np.diag(back), 2) > 0.0).all()


@pytest.mark.parametrize("q", [2, Q])
@pytest.mark.parametrize("name", STRUCTURES)
def test_theta_of_its_own_matrices(name, q):
    structure = make(name, q)
    for seed in range(5):
        D = by_hand(name, random_theta(structure, q, seed), q)
        theta = structure.theta_of(D)
        np.testing.assert_allclose(structure.matrix(jnp.asarray(theta), q), D, rtol=1e-8)
        again = structure.theta_of(np.asarray(structure.matrix(jnp.asarray(theta), q)))
        np.testing.assert_allclose(again, theta, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", STRUCTURES)
def test_theta_of_other_matrices(name):
    rng = np.random.default_rng(4)
    structure = make(name)
    root = rng.normal(size=(Q, Q))
    for D in (
        root @ root.T,
        np.ones((Q, Q)),
        np.outer(root[0], root[0]),
        np.diag([1.0, 0, 0, 2, 0]),
    ):
        theta = structure.theta_of(D)
        assert np.isfinite(theta).all()
        near = np.asarray(structure.matrix(jnp.asarray(theta), Q))
        np.testing.assert_allclose(np.trace(near), np.trace(D), rtol=1e-6)


@pytest.mark.parametrize("name", STRUCTURES)
def test_start(name):
    structure = make(name)
    variances = np.array([1.0, 4.0, 9.0, 0.25, 2.0])
    D = np.asarray(structure.matrix(jnp.asarray(structure.start(variances)), Q))
    if structure.n_parameters(Q) >= Q and name != "homtoep":
        np.testing.assert_allclose(np.diag(D), variances)
    else:
        np.testing.assert_allclose(np.diag(D), np.mean(variances))
    C = D / np.sqrt(np.outer(np.diag(D), np.diag(D)))
    assert (np.abs(C - np.eye(Q)) < 0.9).all()
    # At a standard deviation of zero the slope is zero, whatever the data.
    D = np.asarray(structure.matrix(jnp.asarray(structure.start(np.array([0.0, 0, 1, 0, 0]))), Q))
    assert (np.diag(D) > 0.0).all()
    D = np.asarray(structure.matrix(jnp.asarray(structure.start(np.zeros(Q))), Q))
    assert (np.diag(D) > 0.0).all()


@pytest.mark.parametrize("name", STRUCTURES)
def test_values_are_those_of_the_matrix(name):
    structure = make(name)
    names = tuple("abcde")
    theta = jnp.asarray(random_theta(structure, Q, 3))
    D = matrix_at(structure, theta, Q)
    sd = np.sqrt(np.diag(D))
    C = D / np.outer(sd, sd)
    values = dict(zip(structure.labels(names), values_at(structure, theta, Q), strict=True))
    found = dict(zip(structure.labels(names), structure.is_sd(Q), strict=True))
    for label, value in values.items():
        assert found[label] == label.startswith("sd")
        if label == "sd":
            want = sd[0]
        elif label.startswith("sd("):
            want = sd[names.index(label[3])]
        elif label.startswith("cor(lag"):
            want = C[0, int(label[8])]
        elif label == "cor":
            want = C[0, 1]
        elif label.startswith("cor("):
            want = C[names.index(label[4]), names.index(label[7])]
        else:
            assert label == "rate"
            want = -np.log(C[0, 2]) / (TIMES[2] - TIMES[0])
        np.testing.assert_allclose(value, want, rtol=1e-10)
    gradient = jax.jacobian(structure.values)(theta, Q)
    assert np.isfinite(gradient).all()
    assert np.linalg.matrix_rank(gradient) == len(theta)


def test_values_of_a_variance_of_zero():
    theta = np.array([1.0, 0.0, 0.0])
    np.testing.assert_array_equal(values_at(Unstructured(), theta, 2), [1.0, np.nan, 0.0])
    assert np.isfinite(slopes(Unstructured(), theta, 2, of="values")).all()


@pytest.mark.parametrize("name", STRUCTURES)
def test_patterns(name):
    pattern = make(name).pattern(3)
    if name == "us":
        np.testing.assert_array_equal(pattern, np.ones((3, 3)))
    elif name == "diag":
        np.testing.assert_array_equal(pattern, np.eye(3))
    else:
        assert pattern is None


@pytest.mark.parametrize("q", [2, 3, 8])
def test_limits_of_compound_symmetry(q):
    structure = covariance("homcs")
    low, none, high = (
        float(structure.matrix(jnp.array([1.0, x]), q)[0, 1]) for x in (-20.0, 0.0, 20.0)
    )
    np.testing.assert_allclose([low, none, high], [-1.0 / (q - 1), 0.0, 1.0], atol=1e-14)


def test_toeplitz_of_many_effects_compiles_soon():
    q = 40
    structure = Toeplitz()
    theta = jnp.asarray(structure.start(np.ones(q)))

    def total(theta):
        return jnp.sum(structure.matrix(theta, q) ** 2)

    assert np.isfinite(jax.jit(jax.hessian(total))(theta)).all()


@pytest.mark.parametrize("name", STRUCTURES)
def test_single_precision_stays_single(name):
    structure = make(name)
    theta = jnp.asarray(structure.start(np.ones(Q)), jnp.float32)
    assert structure.matrix(theta, Q).dtype == jnp.float32
    assert structure.values(theta, Q).dtype == jnp.float32


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_are_values(name):
    structure = make(name)
    assert structure == make(name)
    assert hash(structure) == hash(make(name))
    assert pickle.loads(pickle.dumps(structure)) == structure
    field = next(iter(structure.__dataclass_fields__), None)
    if field is not None:
        with pytest.raises(FrozenInstanceError):
            setattr(structure, field, None)


# --- Names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "hom", "name"),
    [
        ("id", None, "homdiag"),
        ("csh", None, "cs"),
        ("ar1h", None, "hetar1"),
        ("toeph", None, "toep"),
        ("diag", True, "homdiag"),
        ("diag", False, "diag"),
        ("cs", True, "homcs"),
        ("cs", False, "cs"),
        ("ar1", True, "ar1"),
        ("ar1", False, "hetar1"),
        ("toep", True, "homtoep"),
        ("toep", False, "toep"),
    ],
)
def test_other_names(asked, hom, name):
    assert covariance(asked, hom=hom) == covariance(name)
    assert RandomTerm("1", "g", covariance(asked, hom=hom)).covariance == name


def test_every_name_is_known():
    assert [covariance(name).name for name in STRUCTURES] == STRUCTURES
    assert set(NAMES) == {*STRUCTURES, "id", "csh", "ar1h", "toeph"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: covariance("spam"), ValueError, "unknown .*'spam': choose one of 'us', 'diag'"),
        (lambda: covariance(3), TypeError, "a name or a Covariance object, not int"),
        (lambda: covariance(Toeplitz), TypeError, "not ABCMeta"),
        (lambda: covariance("us", hom=True), ValueError, "'us' takes no `hom`; 'diag', 'cs'"),
        (lambda: covariance(Toeplitz(), hom=True), ValueError, "not with an object"),
    ],
)
def test_names_that_are_none(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- What suits a term ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ar1", "hetar1", "toep", "homtoep", "ou"])
def test_order_is_needed(name):
    structure = covariance(name)
    with pytest.raises(DataError, match=r"s\(0 \+ f \| g\) is not one factor.*\(0 \+ f \| group\)"):
        structure.prepare(effects(levels=None))
    with pytest.raises(DataError, match=r"'f' \('a', 'b', 'c'\) are only sorted.*pd.Categorical"):
        structure.prepare(effects(3, levels="abc", ordered=False))
    with pytest.raises(DataError, match=r"numbers as text.*to_numeric"):
        structure.prepare(effects(3, levels=["1", "10", "2"], ordered=False))


@pytest.mark.parametrize("name", STRUCTURES)
def test_one_effect(name):
    if name in ("us", "diag", "homdiag"):
        assert make(name, 1).n_parameters(1) == 1
    else:
        with pytest.raises(DataError, match=r"one effect, 'f\[0\]', and .* two or more: write"):
            make(name, 1)


def test_times():
    assert make("ou", 3) == OrnsteinUhlenbeck((0.5, 1.0, 3.0))
    text = effects(3, levels=("1", "2.5", "1e1"))
    assert covariance("ou").prepare(text) == OrnsteinUhlenbeck((1.0, 2.5, 10.0))
    with pytest.raises(DataError, match=r"'f' \('u', 'v'\) are not numbers.*'ar1' needs"):
        covariance("ou").prepare(effects(2, levels="uv"))
    # The unit of time makes no difference to the start, nor does the order of the levels.
    hours = OrnsteinUhlenbeck((0.0, 60.0, 240.0))
    days = OrnsteinUhlenbeck((0.0, 2.5, 10.0))
    theta = jnp.asarray(hours.start(np.ones(3)))
    np.testing.assert_allclose(hours.matrix(theta, 3), days.matrix(theta, 3))
    np.testing.assert_allclose(hours.values(theta, 3)[1] * 24.0, days.values(theta, 3)[1])
    turned = replace(days, times=days.times[::-1])
    np.testing.assert_allclose(turned.matrix(theta, 3), days.matrix(theta, 3)[::-1, ::-1])
    np.testing.assert_allclose(turned.theta_of(turned.matrix(theta, 3)), theta)


# --- A structure of one's own -----------------------------------------------------------------


@dataclass(frozen=True)
class Distance(Covariance):
    """One variance, and correlations exp(-(d / range)^2) for known positions."""

    positions: tuple[float, ...]
    name = "gaussian"

    def n_parameters(self, q):
        return 2

    def matrix(self, theta, q):
        d = np.subtract.outer(self.positions, self.positions)
        return theta[0] ** 2 * jnp.exp(-jnp.exp(theta[1]) * jnp.asarray(d**2, theta.dtype))

    def theta_of(self, D):
        return np.array([np.sqrt(np.mean(np.diag(D))), 0.0])


def test_a_structure_of_ones_own():
    own = Distance((0.0, 1.0, 3.0))
    assert covariance(own) is canonical(own) is own
    assert own.prepare(effects(3)) is own
    assert own.pattern(3) is None
    assert own.start(np.array([4.0, 4.0, 4.0])).tolist() == [2.0, 0.0]
    assert own.labels(("a", "b", "c")) == ("gaussian1", "gaussian2")
    assert own.is_sd(3) == (False, False)
    np.testing.assert_array_equal(own.values(jnp.ones(2), 3), np.ones(2))
    term = RandomTerm("0 + f", "g", own)
    assert str(term) == "gaussian(0 + f | g)"
    assert hash(term) == hash(RandomTerm("0 + f", "g", Distance((0.0, 1.0, 3.0))))


def test_a_structure_of_ones_own_in_a_design():
    data = {"y": np.arange(12.0), "f": list("abc") * 4, "g": np.repeat([1, 2, 3, 4], 3)}
    own = Distance((0.0, 1.0, 3.0))
    design = build_design(ModelSpec("y", "1", [RandomTerm("0 + f", "g", own)]), data)
    assert design.blocks[0].covariance is own
    assert pickle.loads(pickle.dumps(design)).blocks[0].covariance == own


def test_names_of_ones_own():
    class Borrowed(Distance):
        name = "cs"

    class Spaced(Distance):
        name = "my own"

    with pytest.raises(ValueError, match="Borrowed has the name 'cs' of another"):
        covariance(Borrowed((0.0,)))
    with pytest.raises(ValueError, match="'my own' of Spaced is not a plain word"):
        covariance(Spaced((0.0,)))
    with pytest.raises(TypeError, match="abstract"):
        Covariance()
