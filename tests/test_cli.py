"""The command line: options, tables, output forms and exit status.

Up to the marked line a stand-in takes the place of ``fit``: what is tested there is what the
command makes of any result, converged or not.
"""

from __future__ import annotations

import enum
import io
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax import datasets
from lmmax.cli import main

FORMULA = "Weight ~ Time + (1 | Pig)"


class FakeSummary(str):
    """What the command prints, and the sentences below it."""

    notes = ("3 rows dropped for missing values (Weight 3).",)


class FakeFit:
    """The part of Fit's interface that the command uses."""

    nobs, n_groups, group_names = np.int64(861), 72, ("Pig",)
    design = SimpleNamespace(n_dropped=3)
    engine = SimpleNamespace(name="grouped", reason="one grouping factor, Pig")
    llf, deviance, aic, bic, scale = -2404.7753, 4809.5505, 4817.5505, 4836.58, 11.3669
    converged, singular, status, message = True, False, "converged", "gradient is zero"

    def __init__(self) -> None:
        names = ["Intercept", "Time"]
        self.params = pd.Series([15.724, 6.943], names)
        self.bse = pd.Series([0.788, 0.033], names)
        self.random_effects = pd.DataFrame(
            {"Intercept": [1.5, -2.25]}, index=pd.Index(["4601", "4602"], name="Pig")
        )

    def coefficients(self, ddf: str, alpha: float) -> pd.DataFrame:
        columns = {"coef": self.params, "std err": self.bse, "df": [83.0, np.inf]}
        if ddf == "normal":
            del columns["df"]
        columns |= {"t": self.params / self.bse, "p": [0.0, np.nan]}
        return pd.DataFrame(columns | {"low": self.params - alpha, "high": self.params + alpha})

    def varcorr(self) -> pd.DataFrame:
        return pd.DataFrame({"name": ["Intercept"], "variance": [40.394], "corr": [np.nan]})

    def summary(self, alpha: float, ddf: str) -> FakeSummary:
        return FakeSummary(f"the summary at {alpha} by {ddf}\n")


class FakeFactors(FakeFit):
    """The same with two grouping factors, whose effects differ."""

    n_groups, group_names = {"Pig": 2, "Litter": np.int64(3)}, ("Pig", "Litter")
    engine = SimpleNamespace(name="crossed", reason="Pig eliminated first")

    def __init__(self) -> None:
        super().__init__()
        litters = pd.DataFrame(
            {"Intercept": [0.5, -0.25, 0.0], "Time": [0.125, np.nan, 1.0]},
            index=pd.Index([9, 10, 11], name="Litter"),
        )
        self.random_effects: Any = {"Pig": self.random_effects, "Litter": litters}


@pytest.fixture
def several(monkeypatch):
    """A result with several grouping factors."""
    result = FakeFactors()
    monkeypatch.setattr(lmmax, "fit", lambda *_, **__: result)
    return result


@pytest.fixture
def calls(monkeypatch):
    """Put the stand-in in place of fit; collect what it is called with."""
    record: list[dict] = []

    def fit(formula, data, **options):
        record.append({"formula": formula, "data": data, **options})
        return record[0].get("result") or FakeFit()

    monkeypatch.setattr(lmmax, "fit", fit, raising=False)
    return record


@pytest.fixture
def fake(monkeypatch, calls):
    """A result for the test to change before the command gets it."""
    result = FakeFit()
    monkeypatch.setattr(lmmax, "fit", lambda *_, **__: result)
    return result


def test_summary_by_default(calls, capsys):
    assert main([FORMULA, "dietox"]) == 0
    assert capsys.readouterr() == ("the summary at 0.05 by satterthwaite\n", "")
    (call,) = calls
    data = call.pop("data")
    pd.testing.assert_frame_equal(data, datasets.load("dietox"))
    assert call == {
        "formula": FORMULA,
        "reml": True,
        "weights": None,
        "offset": None,
        "missing": "drop",
        "evaluate": "safe",
        "verbose": False,
    }


def test_other_names_of_methods(calls, capsys):
    assert main([FORMULA, "dietox", "--ddf", "Kenward Roger"]) == 0
    assert "by kenward-roger\n" in capsys.readouterr().out


def test_options_reach_fit(calls, capsys):
    options = ["--ml", "--weights", "w", "--offset", "o", "--missing", "raise", "--verbose"]
    assert main([FORMULA, "dietox", *options, "--level", "0.9", "--ddf", "residual"]) == 0
    passed = {name: calls[0][name] for name in ("reml", "weights", "offset", "missing", "verbose")}
    assert passed == dict(reml=False, weights="w", offset="o", missing="raise", verbose=True)
    assert "at 0.1 by residual\n" in capsys.readouterr().out


def test_csv_is_the_coefficient_table(calls, capsys):
    assert main([FORMULA, "dietox", "--csv", "--level", "0.5"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "term,estimate,std_error,df,statistic,p,lower,upper"
    table = pd.read_csv(io.StringIO(out), index_col="term")
    assert table.loc["Time", "estimate"] == 6.943
    assert table.loc["Time", "upper"] == pytest.approx(7.443)
    assert np.isnan(table.loc["Time", "p"])


def test_csv_of_random_effects(calls, capsys):
    assert main([FORMULA, "dietox", "--csv", "--ranef"]) == 0
    assert capsys.readouterr().out == "group,Intercept\n4601,1.5\n4602,-2.25\n"


def test_csv_for_a_spreadsheet(fake, capsys):
    """Text that a spreadsheet would run as a formula is text; numbers stay numbers."""
    fake.random_effects = pd.DataFrame(
        {"Intercept": [1.5, -2.25, 0.0, 0.5, 1.0], "+x": [0.0, 0.0, 0.0, 0.0, 0.0]},
        index=pd.Index(["=1+1", "-2", "@SUM(A1)", "\tx", "a=1"], name="Pig"),
    )
    assert main([FORMULA, "dietox", "--csv", "--ranef", "--spreadsheet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "group,Intercept,'+x"
    assert [line.split(",")[0] for line in lines[1:]] == [
        "'=1+1",
        "'-2",
        "'@SUM(A1)",
        "'\tx",
        "a=1",
    ]
    assert lines[2].split(",")[1] == "-2.25"
    assert main([FORMULA, "dietox", "--csv", "--ranef"]) == 0
    assert "\n=1+1,1.5" in capsys.readouterr().out


def test_csv_for_a_spreadsheet_of_several_factors(several, capsys):
    assert main([FORMULA, "dietox", "--csv", "--ranef"]) == 0
    plain = capsys.readouterr().out
    assert main([FORMULA, "dietox", "--csv", "--ranef", "--spreadsheet"]) == 0
    assert capsys.readouterr().out == plain


def test_text_with_random_effects(calls, capsys):
    assert main([FORMULA, "dietox", "--ranef"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("the summary")
    assert "-2.25" in out


def test_json(calls, capsys):
    assert main([FORMULA, "dietox", "--json", "--ranef", "--ml"]) == 0
    content = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert list(content) == [
        "schema",
        "version",
        "formula",
        "data",
        "method",
        "nobs",
        "n_groups",
        "n_dropped",
        "engine",
        "scale",
        "criterion",
        "level",
        "ddf",
        "coefficients",
        "varcorr",
        "random_effects",
        "convergence",
        "notes",
    ]
    assert content["schema"] == 1
    assert content["formula"] == FORMULA
    assert content["data"] == "dietox"
    assert content["method"] == "ML"
    assert content["nobs"] == 861
    assert content["n_groups"] == {"Pig": 72}
    assert content["n_dropped"] == 3
    assert content["notes"] == ["3 rows dropped for missing values (Weight 3)."]
    assert content["engine"] == "grouped"
    assert content["criterion"]["llf"] == -2404.7753
    first, second = content["coefficients"]
    assert first["term"] == "Intercept"
    assert first["estimate"] == 15.724
    keys = ["term", "estimate", "std_error", "df", "statistic", "p", "lower", "upper"]
    assert list(first) == keys
    assert (first["df"], second["df"]) == (83.0, None)
    assert second["p"] is None
    assert content["varcorr"][0]["variance"] == 40.394
    assert content["varcorr"][0]["corr"] is None
    assert content["random_effects"][1] == {
        "factor": "Pig",
        "group": "4602",
        "effects": {"Intercept": -2.25},
    }
    assert content["convergence"] == {
        "converged": True,
        "status": "converged",
        "message": "gradient is zero",
        "singular": False,
    }


def test_json_with_several_factors(several, capsys):
    """The keys are those of one factor; each level has its own factor's effects only."""
    assert main([FORMULA, "dietox", "--json", "--ranef"]) == 0
    content = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert content["n_groups"] == {"Pig": 2, "Litter": 3}
    assert content["engine"] == "crossed"
    assert content["random_effects"] == [
        {"factor": "Pig", "group": "4601", "effects": {"Intercept": 1.5}},
        {"factor": "Pig", "group": "4602", "effects": {"Intercept": -2.25}},
        {"factor": "Litter", "group": 9, "effects": {"Intercept": 0.5, "Time": 0.125}},
        {"factor": "Litter", "group": 10, "effects": {"Intercept": -0.25, "Time": None}},
        {"factor": "Litter", "group": 11, "effects": {"Intercept": 0.0, "Time": 1.0}},
    ]


def test_csv_of_random_effects_of_several_factors(several, capsys):
    """Where a factor lacks an effect, the field is empty."""
    assert main([FORMULA, "dietox", "--csv", "--ranef"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "factor,group,Intercept,Time",
        "Pig,4601,1.5,",
        "Pig,4602,-2.25,",
        "Litter,9,0.5,0.125",
        "Litter,10,-0.25,",
        "Litter,11,0.0,1.0",
    ]


def test_text_with_random_effects_of_several_factors(several, capsys):
    assert main([FORMULA, "dietox", "--ranef"]) == 0
    _, _, out = capsys.readouterr().out.partition("Random effects\n")
    for piece in ("factor", "Pig", "4602", "-2.25", "Litter", "11"):
        assert piece in out


def test_csv_of_coefficients_does_not_depend_on_the_factors(several, capsys):
    assert main([FORMULA, "dietox", "--csv"]) == 0
    assert capsys.readouterr().out.startswith("term,estimate,")


def test_json_leaves_out_random_effects(calls, capsys):
    assert main([FORMULA, "dietox", "--json"]) == 0
    assert "random_effects" not in json.loads(capsys.readouterr().out)


def test_json_gives_the_name_of_a_status_code(fake, capsys):
    fake.status = enum.IntEnum("Status", {"MAX_STEPS": 2}).MAX_STEPS
    assert main([FORMULA, "dietox", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["convergence"]["status"] == "max_steps"


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
def test_not_converged_prints_and_exits_with_3(fake, capsys, form):
    fake.converged, fake.status, fake.message = False, "max_steps", "stopped after\n5 steps"
    assert main([FORMULA, "dietox", *form]) == 3
    captured = capsys.readouterr()
    assert captured.out
    assert captured.err == "lmmax: not converged: stopped after 5 steps\n"


def test_output_file(calls, capsys, tmp_path):
    target = tmp_path / "out.json"
    assert main([FORMULA, "dietox", "--json", "--output", str(target)]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(target.read_text())["nobs"] == 861


def test_output_directory_is_checked_before_the_fit(calls, capsys, tmp_path):
    assert main([FORMULA, "dietox", "--output", str(tmp_path / "none" / "x")]) == 1
    assert "none" in capsys.readouterr().err
    assert not calls


def test_warnings_are_one_line_each(monkeypatch, fake, capsys):
    def fit(*_, **__):
        warnings.warn("column x3 was dropped:\nit is aliased", UserWarning, stacklevel=1)
        return fake

    monkeypatch.setattr(lmmax, "fit", fit)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main([FORMULA, "dietox"]) == 0
    assert capsys.readouterr().err == "lmmax: warning: column x3 was dropped: it is aliased\n"


# Reading tables.


@pytest.fixture
def frame():
    return pd.DataFrame({"y": [1.5, 2.5, np.nan], "g": [7, 7, 10], "f": ["007", "x", "NA"]})


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.tsv", "t.tsv.gz", "T.CSV", "t.dat"])
def test_text_tables(calls, tmp_path, monkeypatch, name, frame):
    path = tmp_path / name
    frame.to_csv(path, index=False, sep="\t" if ".tsv" in name else ",")
    assert main(["y ~ 1 + (1 | g)", str(path)]) == 0
    data = calls[0]["data"]
    assert list(data.columns) == ["y", "g", "f"]
    assert pd.api.types.is_integer_dtype(data["g"])
    assert data["y"].isna().sum() == 1


@pytest.mark.parametrize("sep", ["|", "\\t", ";"])
def test_separator(calls, tmp_path, frame, sep):
    path = tmp_path / "t.csv"
    frame.to_csv(path, index=False, sep=sep.replace("\\t", "\t"))
    assert main(["y ~ 1 + (1 | g)", str(path), "--sep", sep]) == 0
    assert list(calls[0]["data"].columns) == ["y", "g", "f"]


@pytest.mark.parametrize("sep", [",", ";", "\t", "|", " "])
@pytest.mark.parametrize("standard_input", [False, True])
def test_the_separator_is_found(calls, tmp_path, monkeypatch, frame, sep, standard_input):
    path = tmp_path / "t.csv"
    frame.rename(columns={"f": "an f"}).to_csv(path, index=False, sep=sep, na_rep="NA")
    with path.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert main(["y ~ 1 + (1 | g)", "-" if standard_input else str(path)]) == 0
    assert list(calls[0]["data"].columns) == ["y", "g", "an f"]
    assert calls[0]["data"]["g"].tolist() == [7, 7, 10]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name")
def test_a_pipe_is_read_once(calls, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(path.write_text, "y;g\n1;2\n")
        assert main(["y ~ 1 + (1 | g)", str(path)]) == 0
        written.result()
    assert calls[0]["data"].to_dict("list") == {"y": [1], "g": [2]}


def test_decimal_commas_are_not_labels(calls, capsys, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("y;g\n1,5;1\n2;2\n")
    assert main(["y ~ 1 + (1 | g)", str(path)]) == 1
    assert "column 'y' has numbers with a decimal comma, such as 1,5: add --decimal ," in (
        capsys.readouterr().err
    )
    assert main(["y ~ 1 + (1 | g)", str(path), "--decimal", ","]) == 0
    assert calls[0]["data"]["y"].tolist() == [1.5, 2.0]
    assert main(["y ~ 1 + (1 | g)", str(path), "--categorical", "y"]) == 0
    path.write_text('y,g\n1.5,"1,5"\n')
    assert main(["y ~ 1 + (1 | g)", str(path)]) == 0
    assert calls[-1]["data"]["g"].tolist() == ["1,5"]


def test_standard_input(calls, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y,g\n1,2\n"))
    assert main(["y ~ 1 + (1 | g)", "-"]) == 0
    assert calls[0]["data"].shape == (1, 2)


def test_parquet(calls, tmp_path, frame):
    pytest.importorskip("pyarrow")
    path = tmp_path / "t.parquet"
    frame.to_parquet(path)
    assert main(["y ~ 1 + (1 | g)", str(path), "--categorical", "g"]) == 0
    assert list(calls[0]["data"]["g"].cat.categories) == ["10", "7"]


def test_parquet_without_pyarrow(calls, capsys, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Unable to find a usable engine")

    monkeypatch.setattr(pd, "read_parquet", missing)
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1")
    assert main(["y ~ 1", str(path)]) == 1
    assert 'pip install "lmmax[parquet]"' in capsys.readouterr().err


def test_categorical_columns_keep_their_labels(calls, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("y,a,b\n1,007,3\n2,,1\n3,01,2\n")
    assert main(["y ~ 1", str(path), "--categorical", "a", "--categorical", "b"]) == 0
    data = calls[0]["data"]
    assert list(data["a"].cat.categories) == ["007", "01"]
    assert data["a"].isna().tolist() == [False, True, False]
    assert list(data["b"].cat.categories) == ["1", "2", "3"]


def test_a_file_wins_over_a_bundled_set(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rail").write_text("travel,Rail\n1,a\n")
    assert main(["travel ~ 1 + (1 | Rail)", "rail"]) == 0
    assert len(calls[0]["data"]) == 1


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        (["nowhere.csv"], ["nowhere.csv", "sleepstudy"]),
        (["."], ["directory"]),
        (["rail", "--categorical", "Rial"], ["'Rial'", "travel, Rail"]),
    ],
)
def test_mistakes_in_the_data_argument(calls, capsys, arguments, pieces):
    assert main(["travel ~ 1 + (1 | Rail)", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lmmax: error: ")
    assert captured.err.count("\n") == 1
    assert all(piece in captured.err for piece in pieces)
    assert not calls


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"a,b\n1,2,3\n1,2,3,4\n"])
def test_unreadable_files(calls, capsys, tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    assert main(["y ~ 1", str(path)]) == 1
    err = capsys.readouterr().err
    assert "--sep" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, OSError])
@pytest.mark.parametrize("verbose", [False, True])
def test_errors_of_the_library(calls, capsys, monkeypatch, error, verbose):
    def fit(*_, **__):
        raise error("no column 'Wieght';\n did you mean 'Weight'?")

    monkeypatch.setattr(lmmax, "fit", fit)
    assert main([FORMULA, "dietox", *(["--verbose"] if verbose else [])]) == 1
    err = capsys.readouterr().err
    assert err.endswith("lmmax: error: no column 'Wieght'; did you mean 'Weight'?\n")
    assert ("Traceback" in err) == verbose


# Everything but fitting.


def test_list(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(datasets.names())


def test_describe(capsys):
    assert main(["--describe", "dietox"]) == 0
    assert "Lauridsen" in capsys.readouterr().out
    assert main(["--describe", "diettox"]) == 1
    assert "'dietox'" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lmmax ")


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_answers_at_once(option):
    """Without the imports that take seconds, and without a traceback where nobody listens."""
    code = (
        "import sys\nfrom lmmax.cli import main\n"
        f"try: main([{option!r}])\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'pandas', 'jax', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("\n[]\n"), done.stderr
    assert done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="pipes and exit statuses of POSIX")
@pytest.mark.parametrize("option", ["--version", "--help", "--list"])
def test_the_reader_of_the_output_has_gone(option):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lmmax", option]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    # argparse takes no notice of what it cannot print.
    assert done.returncode in ((0, 141) if option == "--help" else (141,))
    assert done.stderr == b""


def test_exit_statuses_are_documented(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out.partition("exit status:")[2]
    for status in ("0 converged", "1 mistake", "2 mistake", "3 not", "130 inter", "141 the reader"):
        assert status in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [FORMULA],
        [FORMULA, "dietox", "--json", "--csv"],
        [FORMULA, "dietox", "--level", "95"],
        [FORMULA, "dietox", "--level", "high"],
        [FORMULA, "dietox", "--missing", "impute"],
        [FORMULA, "dietox", "--ddf", "welch"],
        [FORMULA, "dietox", "--spreadsheet"],
    ],
)
def test_mistakes_in_the_options(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


# With the real fit.

needs_fit = pytest.mark.skipif(not hasattr(lmmax, "fit"), reason="there is no fit yet")


@needs_fit
def test_documented_dietox_example():
    done = subprocess.run(
        [sys.executable, "-m", "lmmax.cli", FORMULA, "dietox", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    content = json.loads(done.stdout)
    assert content["criterion"]["llf"] == pytest.approx(-2404.7753, abs=5e-5)
    assert content["scale"] == pytest.approx(11.3669, abs=5e-5)
    estimates = {row["term"]: row["estimate"] for row in content["coefficients"]}
    assert list(estimates.values()) == pytest.approx([15.724, 6.943], abs=5e-4)


@needs_fit
def test_crossed_factors(capsys):
    formula = "diameter ~ 1 + (1 | plate) + (1 | sample)"
    assert main([formula, "penicillin", "--json", "--ranef"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["n_groups"] == {"plate": 24, "sample": 6}
    assert content["engine"] == "crossed"
    # The REML criterion of lme4's documentation.
    assert content["criterion"]["deviance"] == pytest.approx(330.86, abs=5e-3)
    factors = [row["factor"] for row in content["random_effects"]]
    assert factors == ["plate"] * 24 + ["sample"] * 6
    assert content["random_effects"][-1]["group"] == "F"
    assert [row["group"] for row in content["varcorr"]] == ["plate", "sample", "Residual"]

    assert main([formula, "penicillin", "--csv", "--ranef"]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(table.columns) == ["factor", "group", "Intercept"]
    effects = [row["effects"]["Intercept"] for row in content["random_effects"]]
    assert list(table["Intercept"]) == pytest.approx(effects, rel=1e-12)

    assert main([formula, "penicillin"]) == 0
    out = capsys.readouterr().out
    assert "No. groups (plate):" in out
    assert "No. groups (sample):" in out


@needs_fit
def test_nested_factors(capsys):
    assert main(["strength ~ 1 + (1 | batch/cask)", "pastes", "--json", "--ranef"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["engine"] == "nested"
    assert content["n_groups"] == {"batch": 10, "batch:cask": 30}
    last = content["random_effects"][-1]
    assert (last["factor"], last["group"]) == ("batch:cask", "J:c")


@needs_fit
def test_misspelt_variable(capsys):
    assert main(["Wieght ~ Time + (1 | Pig)", "dietox"]) == 1
    err = capsys.readouterr().err
    assert "Wieght" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["Reaction ~ I(Days.clip(0, 5)) + (1 | Subject)"], "needs --evaluate python"),
        (
            ["Reaction ~ Days + (1 | Subject)", "--ml", "--ddf", "KR"],
            "leave out --ml, or use --ddf",
        ),
    ],
)
def test_remedies_are_options_of_the_command_line(capsys, arguments, remedy):
    formula, *options = arguments
    assert main([formula, "sleepstudy", *options]) == 1
    assert remedy in capsys.readouterr().err
