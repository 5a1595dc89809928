"""Files of fits and batches: the same numbers again, nothing executed, damage noticed."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax import Array

import lmmax
from lmmax import saved
from lmmax.archive import ArchiveError
from lmmax.covariances import Covariance
from lmmax.results import Fit


def again(value: Any, objects: Any = None) -> Any:
    """A value, written and read."""
    writer = saved.Writer(saved.classes())
    described = writer.describe(value)
    return saved.Reader(saved.classes(), writer.arrays, objects, "'file'").value(described)


def same(one: Any, other: Any, where: str = "fit") -> None:
    """Assert that two values are the same bit by bit, and in memory."""
    assert type(one) is type(other), where
    if isinstance(one, np.ndarray) and one.dtype != object:
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        contiguous = one.flags.c_contiguous or one.flags.f_contiguous
        assert not contiguous or one.flags.f_contiguous == other.flags.f_contiguous, where
    elif isinstance(one, pd.Index):
        assert one.identical(other) and one.dtype == other.dtype, where
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    elif isinstance(one, pd.Series):
        pd.testing.assert_series_equal(one, other, check_exact=True)
    elif isinstance(one, tuple | list | np.ndarray):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{where}[{i}]")
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            same(one[key], other[key], f"{where}[{key!r}]")
    elif is_dataclass(one):
        for field in fields(one):
            same(getattr(one, field.name), getattr(other, field.name), f"{where}.{field.name}")
    elif type(one).__module__.startswith("formulaic"):
        a, b = saved._state(one), saved._state(other)
        same({k: a[k] for k in sorted(a)}, {k: b[k] for k in sorted(b)}, where)
    else:
        assert one == other or one != one, where


@dataclass(frozen=True)
class Proportional(Covariance):
    """A known matrix times one unknown variance."""

    shape: tuple[tuple[float, ...], ...]
    name = "proportional"

    def n_parameters(self, q: int) -> int:
        return 1

    def matrix(self, theta: Array, q: int) -> Array:
        return theta[0] ** 2 * jnp.asarray(self.shape, theta.dtype)

    def theta_of(self, D: np.ndarray) -> np.ndarray:
        return np.sqrt([np.trace(D) / np.trace(self.shape)])


def double(x: Any) -> Any:
    """A function for formulas."""
    return 2 * x


SLEEP = lmmax.datasets.load("sleepstudy").assign(
    f=pd.Categorical(np.array(list("abc"))[np.arange(180) % 3], categories=list("cabd")),
    v=pd.array(np.where(np.arange(180) % 5, "p", "q"), dtype="string"),
    k=pd.array(np.arange(180) % 4, dtype="Int64"),
)
SUBJECTS = SLEEP["Subject"].unique()
RELATED = pd.DataFrame(np.eye(18) + 0.1, index=SUBJECTS, columns=SUBJECTS)
OBJECTS = {"double": double, "Proportional": Proportional}

FITS: dict[str, Callable[[], Fit]] = {
    "poly": lambda: lmmax.fit("Reaction ~ poly(Days, 2) + (1 + Days | Subject)", SLEEP),
    "splines": lambda: lmmax.fit(
        "Reaction ~ bs(Days, df=3) * f + cr(k, df=2) + (1 | Subject)", SLEEP
    ),
    "contrasts": lambda: lmmax.fit(
        "Reaction ~ C(f, contr.treatment('b')) * v + scale(Days) + (1 | Subject)",
        SLEEP,
        contrasts={"v": "sum"},
        weights=1.0 + np.arange(180) % 3,
        offset="k",
    ),
    "labelled": lambda: lmmax.fit(
        "Reaction ~ Days + f + (1 | Subject)",
        SLEEP,
        contrasts={"f": pd.DataFrame({"u": [1.0, 2.0, 3.0]}, index=list("cab"))},
        relmat={"Subject": RELATED},
    ),
    "ar1": lambda: lmmax.fit("Reaction ~ Days + ar1(0 + C(k) | Subject)", SLEEP, reml=False),
    "nested": lambda: lmmax.fit(
        "Reaction ~ double(Days) + (1 | Subject/f)", SLEEP, context=OBJECTS
    ),
    "crossed": lambda: lmmax.fit("Reaction ~ center(Days) + (1 | Subject) + (1 | f)", SLEEP),
    "iterative": lambda: lmmax.fit(
        "Reaction ~ Days + (1 | Subject) + (1 | k)", SLEEP, engine="iterative"
    ),
    "arrays": lambda: lmmax.fit_arrays(
        SLEEP["Reaction"],
        np.column_stack([np.ones(180), SLEEP["Days"]]),
        SLEEP["Subject"],
        np.column_stack([np.ones(180), SLEEP["Days"]]),
        covariance=Proportional(((500.0, 0.0), (0.0, 30.0))),
    ),
}


@pytest.fixture(scope="module")
def fitted() -> dict[str, Fit]:
    return {}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_is_the_same_when_it_is_read(
    name: str, tmp_path: Path, fitted: dict[str, Fit]
) -> None:
    fit = fitted.setdefault(name, FITS[name]())
    fit.save(tmp_path / "fit")
    found = lmmax.load(tmp_path / "fit", objects=OBJECTS)
    same(fit, found)
    assert str(found.summary()) == str(fit.summary())
    rows = SLEEP.iloc[[0, 3, 50]]
    new: Any = rows
    if name == "arrays":
        Z = np.column_stack([np.ones(3), rows["Days"]])
        new = {"X": Z, "Z": Z, "groups": rows["Subject"].to_numpy()}
    same(found.predict(new), fit.predict(new))
    y = fit.design.y[::-1].copy()
    assert found.refit(y).deviance == fit.refit(y).deviance
    found.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "fit").read_bytes()


def test_inference_on_a_fit_that_was_read(tmp_path: Path, fitted: dict[str, Fit]) -> None:
    fit = fitted.setdefault("poly", FITS["poly"]())
    fit.save(tmp_path / "fit")
    found = lmmax.load(tmp_path / "fit")
    same(found.coefficients("kenward-roger"), fit.coefficients("kenward-roger"))
    same(found.f_test("Intercept = 250").statistic, fit.f_test("Intercept = 250").statistic)
    same(lmmax.bootstrap(found, 5, seed=1).replicates, lmmax.bootstrap(fit, 5, seed=1).replicates)


def test_what_is_the_users_own_is_handed_in(tmp_path: Path, fitted: dict[str, Fit]) -> None:
    fitted.setdefault("arrays", FITS["arrays"]()).save(tmp_path / "own")
    with pytest.raises(ArchiveError, match=r"own' needs the class 'Proportional'.*objects="):
        lmmax.load(tmp_path / "own")
    fitted.setdefault("nested", FITS["nested"]()).save(tmp_path / "function")
    found = lmmax.load(tmp_path / "function")
    assert found.llf == fitted["nested"].llf
    with pytest.raises(lmmax.DataError, match=r"load\(path, objects=\{'double': \.\.\.\}\)"):
        found.predict(SLEEP)
    content = (tmp_path / "own").read_bytes()
    assert b"test_saved" not in content and b"lmmax." not in content  # no places of code


VALUES = [
    float("nan"),
    -0.0,
    2**70,
    1 + 2j,
    np.float32(0.1),
    np.int8(3),
    (1, [2, {"a": None}], {3, 4}),
    slice(1, None),
    date(2020, 1, 2),
    Decimal("1.10"),
    pd.Timestamp("2020-01-01 12:00", tz="Europe/Berlin"),
    pd.Timedelta("3 h"),
    pd.Period("2020-03", "M"),
    pd.Interval(0, 1.5),
    pd.NA,
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array(["2020-01-01", "NaT"], dtype="M8[us]"),
    np.array([1, "a", None], dtype=object),
    pd.RangeIndex(2, 9, 3, name="r"),
    pd.MultiIndex.from_product([[1, 2], ["a", "b"]], names=["x", None]),
    pd.date_range("2020", periods=3, freq="D", tz="UTC"),
    pd.date_range("2020-03-28", periods=3, tz="Europe/Berlin").as_unit("s"),
    pd.period_range("2020", periods=3, freq="Q"),
    pd.interval_range(0, 3),
    pd.CategoricalIndex(["b", "a"], categories=["b", "a"], ordered=True),
    pd.Index(["a", None], dtype=object),
    pd.Index(["a", "b"], dtype="string"),
    pd.Series([1, None, 3], dtype="Int8", name="s"),
    pd.Series([True, None], dtype="boolean"),
    pd.Series([1.5, None], dtype="Float32"),
    pd.DataFrame({"a": [1.0], "b": pd.Categorical(["x"])}, index=["i"]),
    pd.DataFrame(np.ones((1, 2)), columns=["d", "d"]),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values(value: Any) -> None:
    found = again(value)
    if value is pd.NA:
        assert found is pd.NA
    else:
        same(value, found)
        assert str(found) == str(value)


def test_what_is_not_data_is_refused_and_nothing_is_lost(
    tmp_path: Path, fitted: dict[str, Fit]
) -> None:
    good = fitted.setdefault("crossed", FITS["crossed"]())
    path = tmp_path / "fit"
    good.save(path)
    before = path.read_bytes()
    bad = lmmax.fit(
        "Reaction ~ f(Days, o) + (1 | Subject)", SLEEP, context={"f": max_of, "o": Odd()}
    )
    with pytest.raises(ArchiveError, match=r"context\['o'\] is a Odd, which is not data"):
        bad.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["fit"]


class Odd:
    """No data."""


def max_of(x: Any, _: Odd) -> Any:
    """A function for formulas."""
    return x


def test_every_damage_is_noticed(tmp_path: Path, fitted: dict[str, Fit]) -> None:
    path = tmp_path / "fit"
    fitted.setdefault("crossed", FITS["crossed"]()).save(path)
    content = path.read_bytes()
    reference = fitted["crossed"]
    rng = np.random.default_rng(0)
    for trial in range(90):
        changed = bytearray(content)
        if trial % 3 == 0:
            changed = changed[: rng.integers(len(content))]
        else:
            changed[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            found = lmmax.load(path)
        except ArchiveError as error:
            assert str(path) in str(error)
        else:  # in what a ZIP file says of itself, such as the time
            same(found, reference)


def test_a_file_that_was_made_up_is_refused(tmp_path: Path, fitted: dict[str, Fit]) -> None:
    path = tmp_path / "fit"
    fitted.setdefault("crossed", FITS["crossed"]()).save(path)
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    text = content["description"].tobytes()
    content["description"] = np.frombuffer(text.replace(b'"CONVERGED"', b'"Converged"'), np.uint8)
    np.savez(path.with_suffix(".npz"), **content)
    with pytest.raises(ArchiveError, match="do not have the hash"):
        lmmax.load(path.with_suffix(".npz"))
    reader = saved.Reader(saved.classes(), {}, None, "'file'")
    for made in (
        {"of": "subprocess.Popen", "fields": {}},
        {"call": ["os.system", "true"]},
        {"of": "Sum", "fields": {}},
        {"of": "contr.Sum", "fields": {"__class__": 1}},
        {"own": "Proportional", "fields": {}},
        {"of": "Fit", "fields": {}},
        {"enum": ["Status", "nothing"]},
        {"array": "a99"},
        [1, 2],
        {},
    ):
        with pytest.raises(ArchiveError, match="'file'"):
            reader.read(made, Fit)
    with zipfile.ZipFile(path, "w") as other:
        other.writestr("a.txt", "text")
    with pytest.raises(ArchiveError, match="is not a saved lmmax fit"):
        lmmax.load(path)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return print, ("it ran",)


def test_pickles_are_read_where_that_is_asked_for(
    tmp_path: Path, fitted: dict[str, Fit], capsys: pytest.CaptureFixture[str]
) -> None:
    fit = fitted.setdefault("crossed", FITS["crossed"]())
    (tmp_path / "old").write_bytes(pickle.dumps({"lmmax": "0.1.0", "fit": fit}))
    with pytest.raises(ArchiveError, match=r"but a pickle.*lmmax\.load\(path, allow_pickle=True\)"):
        lmmax.load(tmp_path / "old")
    same(lmmax.load(tmp_path / "old", allow_pickle=True), fit)
    (tmp_path / "trap").write_bytes(pickle.dumps(Trap()))
    for read in (lmmax.load, lmmax.BatchFit.load):
        with pytest.raises(ArchiveError, match="but a pickle"):
            read(tmp_path / "trap")
    assert capsys.readouterr().out == ""


def test_a_batch_is_the_same_when_it_is_read(tmp_path: Path) -> None:
    y = SLEEP["Reaction"].to_numpy()[:, None] + np.random.default_rng(0).normal(size=(180, 3))
    frame = pd.DataFrame(y, columns=list("uvw"), index=SLEEP.index)
    batch = lmmax.fit_many("~ Days + (1 | Subject)", SLEEP, frame, tests={"t": "Days = 10"})
    batch.save(tmp_path / "batch")
    found = lmmax.BatchFit.load(tmp_path / "batch")
    same(found.record, batch.record)
    same(found.test("t"), batch.test("t"))
    assert str(found) == str(batch) and "share p < 0.05" in str(batch)
    assert found["v"].llf == batch["v"].llf
    with pytest.raises(ArchiveError, match="batch' is not a saved lmmax fit"):
        lmmax.load(tmp_path / "batch")
    by = lmmax.fit_many("Reaction ~ Days + (1 | f)", SLEEP, by="Subject")
    by.save(tmp_path / "by")
    assert lmmax.BatchFit.load(tmp_path / "by")[2].llf == by[2].llf


def test_responses_are_handed_to_results_again(tmp_path: Path) -> None:
    y = SLEEP["Reaction"].to_numpy()[:, None] + np.random.default_rng(0).normal(size=(180, 3))
    frame = pd.DataFrame(y, columns=list("uvw"), index=SLEEP.index)
    batch = lmmax.fit_many("~ Days + (1 | Subject)", SLEEP, frame, out=tmp_path / "out")
    with pytest.raises(lmmax.DataError, match=r"BatchFit\.open\(path, responses=\.\.\.\)"):
        lmmax.BatchFit.open(tmp_path / "out")["v"]
    for given in (frame, y):
        found = lmmax.BatchFit.open(tmp_path / "out", responses=given)
        assert found["v"].llf == batch["v"].llf
    with pytest.raises(lmmax.DataError, match="there are 2 responses, and results of 3"):
        lmmax.BatchFit.open(tmp_path / "out", responses=y[:, :2])
    with pytest.raises(lmmax.DataError, match=r"put the responses in the order of batch\.names"):
        lmmax.BatchFit.open(tmp_path / "out", responses=frame[["v", "u", "w"]])
    with pytest.raises(lmmax.DataError, match="170 rows, data has 180"):
        lmmax.BatchFit.open(tmp_path / "out", responses=y[:170])


def test_messages_name_the_file_and_what_reads_it(tmp_path: Path) -> None:
    sleep = lmmax.datasets.load("sleepstudy")
    fit = lmmax.fit("Reaction ~ Days + (1 | Subject)", sleep)
    batch = lmmax.fit_many("~ Days + (1 | Subject)", sleep, ["Reaction"])
    fit.save(tmp_path / "fit")
    batch.save(tmp_path / "batch")
    with pytest.raises(ValueError, match=r"but lmmax\.BatchFit\.load reads it"):
        lmmax.load(tmp_path / "batch")
    with pytest.raises(ValueError, match=r"but lmmax\.load reads it"):
        lmmax.BatchFit.load(tmp_path / "fit")
    with pytest.raises(lmmax.StoreError, match=r"is a file; lmmax\.BatchFit\.load"):
        lmmax.BatchFit.open(tmp_path / "batch")
    for path in (tmp_path / "absent" / "fit", tmp_path):
        with pytest.raises(OSError, match=re.escape(repr(str(path)))):
            fit.save(path)
