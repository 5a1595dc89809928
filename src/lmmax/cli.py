"""The ``lmmax`` command: a linear mixed model from a formula and a table.

Exit status: 0 converged, 1 a mistake in the input (one line on stderr), 2 a mistake in the
options, 3 not converged (the results are printed all the same), 130 interrupted, 141 the reader of
the output has gone (as in ``| head``; nothing is said).

JSON output, in which ``null`` stands for a value that does not exist or is not finite::

    schema            1; changes when a key changes its meaning or goes away
    version           of lmmax
    formula, data     as given
    method            "REML" or "ML"
    nobs, n_groups    number of rows used; of groups, by grouping factor
    n_dropped         number of rows left out, because values are missing
    engine            form of the likelihood
    scale             residual variance
    criterion         {llf, deviance, aic, bic}
    level             of the confidence intervals
    ddf               method for the degrees of freedom
    coefficients      [{term, estimate, std_error, df, statistic, p, lower, upper}, ...]
    varcorr           rows of Fit.varcorr(), with its column names
    random_effects    with --ranef: [{factor, group, effects: {NAME: value, ...}}, ...]
    convergence       {converged, status, message, singular}
    notes             the sentences below the summary
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .characters import neutral, visible
from .options import DDF_METHODS, DDF_NAMES, DEFAULT_DDF, choose

if TYPE_CHECKING:
    import pandas as pd

# Nothing heavy is imported at the top of this file: --help must answer at once.

__all__ = ["main"]

_CONVERGED, _USER_ERROR, _NOT_CONVERGED = 0, 1, 3
# As a shell reports a program that SIGINT, or SIGPIPE, has ended.
_INTERRUPTED, _NO_READER = 130, 141
_JSON_SCHEMA = 1
_SEPARATORS = (";", "\t", "|")

_EPILOG = """\
DATA is a CSV file (also .tsv, and compressed as .gz, .bz2, .xz or .zip), a Parquet file
(.parquet, .pq), - for CSV on standard input, or the name of a bundled data set.

A formula's expressions are columns, arithmetic and functions of NumPy; --evaluate python runs
them as Python, which a formula from somebody else should not.

exit status:
  0 converged (or printed what was asked for)    1 mistake in the input
  2 mistake in the options                       3 not converged; the results are printed
  130 interrupted                                141 the reader of the output has gone

examples:
  lmmax "Weight ~ Time + (1 | Pig)" dietox
  lmmax "Reaction ~ Days + (Days | Subject)" sleepstudy --ml --json
  lmmax "y ~ x + (1 | site)" trial.csv --weights w --categorical site
  lmmax --list
  lmmax --describe dietox
"""


class _UserError(Exception):
    """A mistake that the user can mend; the message says how."""


def _level(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1, such as 0.95")
    return value


def _ddf(text: str) -> str:
    try:
        return choose("ddf", text, DDF_METHODS, DDF_NAMES)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmmax",
        description="Fit a linear mixed-effects model and print its summary.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("formula", nargs="?", help='such as "y ~ x + (1 + x | group)"')
    parser.add_argument("data", nargs="?", metavar="DATA", help="a file, -, or a bundled data set")
    model = parser.add_argument_group("model")
    model.add_argument("--ml", action="store_true", help="maximum likelihood; default: REML")
    model.add_argument("--weights", metavar="COL", help="column of inverse-variance weights")
    model.add_argument("--offset", metavar="COL", help="column added to the linear predictor")
    model.add_argument(
        "--missing",
        choices=("drop", "raise"),
        default="drop",
        help="rows with missing values: leave them out (default), or stop",
    )
    model.add_argument(
        "--evaluate",
        choices=("safe", "python"),
        default="safe",
        help="safe (default): columns, arithmetic, NumPy's elementwise functions and transforms; "
        "python: the formula's expressions are code and run as such",
    )
    table = parser.add_argument_group("reading the data")
    table.add_argument("--encoding", default="utf-8", help="of a CSV file; default: utf-8")
    table.add_argument(
        "--decimal", metavar="SIGN", default=".", help="decimal sign of a CSV file; default: ."
    )
    table.add_argument(
        "--na", metavar="TEXT", action="append", help="stands for a missing value; may be repeated"
    )
    table.add_argument(
        "--sep",
        help="separator of a CSV file; default: tab for .tsv, else the one that its first line "
        "has of comma, semicolon, tab, | and blanks",
    )
    table.add_argument(
        "--categorical",
        metavar="COL",
        nargs="+",
        action="extend",
        default=[],
        help="columns of numbers to be taken as labels (grouping factors need no mention); "
        "write it after DATA",
    )
    output = parser.add_argument_group("output")
    form = output.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all results as JSON")
    form.add_argument("--csv", action="store_true", help="the table of coefficients as CSV")
    output.add_argument(
        "--ranef",
        action="store_true",
        help="add the predicted random effects; with --csv: print them instead",
    )
    output.add_argument(
        "--spreadsheet",
        action="store_true",
        help="with --csv: an apostrophe before text that a spreadsheet would run as a formula, "
        "which begins with =, +, -, @ or a control character",
    )
    output.add_argument(
        "--level", type=_level, default=0.95, help="of confidence intervals; default: 0.95"
    )
    output.add_argument(
        "--ddf",
        metavar="METHOD",
        type=_ddf,
        default=DEFAULT_DDF,
        help="degrees of freedom of the coefficients: "
        f"{', '.join(DDF_METHODS)}; default: {DEFAULT_DDF}",
    )
    output.add_argument("--output", metavar="FILE", type=Path, help="write there, not to stdout")
    output.add_argument(
        "--verbose", action="store_true", help="trace of the iterations; traceback of errors"
    )
    about = parser.add_argument_group("about")
    about.add_argument("--list", action="store_true", help="list the bundled data sets")
    about.add_argument("--describe", metavar="NAME", help="columns and source of a bundled set")
    about.add_argument("--version", action="store_true", help="print the version")
    return parser


def _read_table(arguments: argparse.Namespace) -> pd.DataFrame:
    """Read DATA: an existing path wins over a bundled set of the same name."""
    from lmmax import datasets

    data, categorical = arguments.data, arguments.categorical
    if data == "-" or Path(data).exists():
        frame = _read_file(arguments)
    elif data in datasets.names():
        frame = datasets.load(data)
    else:
        raise _UserError(
            f"there is no file {data!r}, and no bundled data set of that name; "
            f"bundled: {', '.join(datasets.names())}"
        )
    for column in categorical:
        if column not in frame.columns:
            raise _UserError(
                f"--categorical: there is no column {column!r}; "
                f"columns: {', '.join(map(str, frame.columns))}"
            )
        present = frame[column].notna()
        # Strings, so that the levels sort as labels and print as they were written.
        frame[column] = frame[column].astype(str).where(present).astype("category")
    return frame


def _separator(line: str) -> str:
    """Return the separator of a table whose first line this is; a comma wins.

    Example:
        >>> _separator('y;"a,b";g')
        ';'
    """
    bare = re.sub(r'"[^"]*"', "", line)
    if "," in bare:
        return ","
    best = max(_SEPARATORS, key=bare.count)
    if best in bare:
        return best
    return r"\s+" if " " in bare.strip() else ","


def _read_file(arguments: argparse.Namespace) -> pd.DataFrame:
    import pandas as pd

    data, categorical = arguments.data, arguments.categorical
    path = Path(data)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if path.is_dir():
        raise _UserError(f"{data!r} is a directory; name a CSV or Parquet file")
    if suffixes[-1:] in ([".parquet"], [".pq"]):
        try:
            return pd.read_parquet(path)
        except ImportError:
            raise _UserError(
                'reading Parquet needs pyarrow; install it with: pip install "lmmax[parquet]"'
            ) from None
        except (ValueError, OSError) as error:
            raise _UserError(f"cannot read {data!r} as Parquet: {error}") from error
    # A label such as 007 would lose its zeros if it were read as a number first.
    labels: dict[Any, Any] = dict.fromkeys(categorical, str)
    try:
        opened = (lambda: path) if data != "-" and path.is_file() else _copies(data)
        if arguments.sep:
            separator = arguments.sep.replace("\\t", "\t")
        elif ".tsv" in suffixes:
            separator = "\t"
        else:
            # One row of one field, which no separator that is text can split.
            first = pd.read_csv(
                opened(),
                sep="\x1f",
                quoting=csv.QUOTE_NONE,
                header=None,
                nrows=1,
                dtype=str,
                encoding=arguments.encoding,
            )
            separator = _separator(str(first.iat[0, 0]))
        frame = pd.read_csv(
            opened(),
            sep=separator,
            dtype=labels,
            encoding=arguments.encoding,
            decimal=arguments.decimal,
            na_values=arguments.na,
        )
    except UnicodeError as error:
        raise _UserError(
            f"cannot read {data!r} as {arguments.encoding}: {_one_line(error)}; name its encoding "
            "with --encoding, such as latin-1, and its separator with --sep"
        ) from error
    except LookupError as error:
        raise _UserError(f"--encoding: {_one_line(error)}") from error
    except (ValueError, OSError) as error:
        raise _UserError(
            f"cannot read {data!r} as CSV: {_one_line(error)}; name its separator with --sep"
        ) from error
    if separator != "," and arguments.decimal != ",":
        _refuse_decimal_commas(frame.drop(columns=categorical, errors="ignore"))
    return frame


def _copies(data: str) -> Callable[[], io.BytesIO | io.StringIO]:
    """Read standard input or a pipe, once, and return what opens a copy of it."""
    if data != "-":
        return partial(io.BytesIO, Path(data).read_bytes())
    if hasattr(sys.stdin, "buffer"):
        return partial(io.BytesIO, sys.stdin.buffer.read())
    return partial(io.StringIO, sys.stdin.read())


def _refuse_decimal_commas(frame: pd.DataFrame) -> None:
    """Numbers such as 1,5 would be taken as labels."""
    for name, column in frame.select_dtypes(["object", "string"]).items():
        texts = column.dropna().astype(str)
        commas = texts[texts.str.contains(",")]
        if len(commas) and texts.str.fullmatch(r"\s*[-+]?\d*(,\d+)?([eE][-+]?\d+)?\s*").all():
            raise _UserError(
                f"column {name!r} has numbers with a decimal comma, such as "
                f"{commas.iloc[0].strip()}: add --decimal , (or, for labels, --categorical {name})"
            )


def _coefficients(fit: Any, arguments: argparse.Namespace) -> pd.DataFrame:
    table = fit.coefficients(arguments.ddf, alpha=_alpha(arguments.level))
    if "df" not in table:
        table.insert(2, "df", math.inf)
    names = ["estimate", "std_error", "df", "statistic", "p", "lower", "upper"]
    return table.set_axis(names, axis=1).rename_axis("term")


def _alpha(level: float) -> float:
    # Rounded, because 1 - 0.95 is not 0.05.
    return round(1 - level, 15)


def _random_effects(fit: Any) -> pd.DataFrame:
    """Return a row per group; with several factors the index has the factor's name in front."""
    effects = fit.random_effects
    if isinstance(effects, dict):
        import pandas as pd

        return pd.concat(effects, names=["factor", "group"])
    table: pd.DataFrame = effects.rename_axis(index="group")
    return table


def _plain(value: Any) -> Any:
    """Return the value as JSON knows it: NumPy scalars unwrapped, what is not finite null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def _json(fit: Any, arguments: argparse.Namespace) -> str:
    import json

    import lmmax

    content: dict[str, Any] = {
        "schema": _JSON_SCHEMA,
        "version": lmmax.__version__,
        "formula": arguments.formula,
        "data": arguments.data,
        "method": "ML" if arguments.ml else "REML",
        "nobs": fit.nobs,
        "n_groups": fit.n_groups
        if isinstance(fit.n_groups, dict)
        else {fit.group_names[0]: fit.n_groups},
        "n_dropped": fit.design.n_dropped,
        "engine": fit.engine.name,
        "scale": fit.scale,
        "criterion": {name: getattr(fit, name) for name in ("llf", "deviance", "aic", "bic")},
        "level": arguments.level,
        "ddf": arguments.ddf,
        "coefficients": _coefficients(fit, arguments).reset_index().to_dict("records"),
        "varcorr": fit.varcorr().to_dict("records"),
    }
    if arguments.ranef:
        effects = fit.random_effects
        by_factor = effects if isinstance(effects, dict) else {fit.group_names[0]: effects}
        content["random_effects"] = [
            {"factor": name, "group": label, "effects": row}
            for name, frame in by_factor.items()
            for label, row in frame.to_dict("index").items()
        ]
    content["convergence"] = {
        "converged": bool(fit.converged),
        # A word, not the number behind it: numbers tell a reader of the JSON nothing.
        "status": getattr(fit.status, "name", str(fit.status)).lower(),
        "message": fit.message,
        "singular": bool(fit.singular),
    }
    content["notes"] = list(fit.summary(ddf=arguments.ddf, alpha=_alpha(arguments.level)).notes)
    return json.dumps(_plain(content), indent=2, allow_nan=False) + "\n"


def _neutral(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with its texts, those of index and names too, as no formulas."""

    def cell(value: Any) -> Any:
        return neutral(value) if isinstance(value, str) else value

    table = table.reset_index().map(cell).rename(columns=cell)
    return table.set_index(table.columns[0])


def _text(fit: Any, arguments: argparse.Namespace) -> str:
    if arguments.json:
        return _json(fit, arguments)
    if arguments.csv:
        table = _random_effects(fit) if arguments.ranef else _coefficients(fit, arguments)
        return (_neutral(table) if arguments.spreadsheet else table).to_csv(lineterminator="\n")
    text = str(fit.summary(ddf=arguments.ddf, alpha=_alpha(arguments.level))).rstrip("\n") + "\n"
    if arguments.ranef:
        text += "\nRandom effects\n" + _random_effects(fit).to_string() + "\n"
    return text


def _write(text: str, target: Path | None) -> None:
    if target is None:
        # Labels of the data must not command a terminal; a pipe is another program's.
        # It is None where the shell has closed it.
        terminal = sys.stdout is not None and sys.stdout.isatty()
        print(visible(text, lines=True) if terminal else text, end="", flush=True)
        return
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _UserError(f"cannot write --output {str(target)!r}: {error.strerror}") from error


def _list_datasets() -> str:
    from lmmax import datasets

    pages = [datasets.describe(name) for name in datasets.names()]
    width = max(len(page.name) for page in pages)
    return "".join(f"{page.name:<{width}}  {page.n_rows:>5} rows  {page.title}\n" for page in pages)


def _fit_and_print(arguments: argparse.Namespace) -> int:
    target: Path | None = arguments.output
    # Found out now, not after a long fit.
    if target is not None and not target.absolute().parent.is_dir():
        raise _UserError(f"--output: there is no directory {str(target.parent)!r}")
    if "~" in arguments.data and "~" not in arguments.formula:
        raise _UserError("the formula comes first and DATA second: swap the two")
    frame = _read_table(arguments)

    import warnings

    import lmmax

    with warnings.catch_warnings():
        # A warning's file and line mean nothing to somebody at a shell.
        warnings.showwarning = lambda message, *_, **__: print(
            f"lmmax: warning: {_one_line(message)}", file=sys.stderr
        )
        # Said once, at the end, with the exit status.
        warnings.simplefilter("ignore", lmmax.ConvergenceWarning)
        result = lmmax.fit(
            arguments.formula,
            frame,
            reml=not arguments.ml,
            weights=arguments.weights,
            offset=arguments.offset,
            missing=arguments.missing,
            evaluate=arguments.evaluate,
            verbose=arguments.verbose,
        )
        _write(_text(result, arguments), target)
    if result.converged:
        return _CONVERGED
    print(f"lmmax: not converged: {_one_line(result.message)}", file=sys.stderr)
    return _NOT_CONVERGED


AS_OPTIONS = {
    "evaluate='safe' does not evaluate:": "needs --evaluate python; without it the command line "
    "runs no code:",
    "use missing='drop'": "use --missing drop",
    "fit with reml=True": "leave out --ml",
    "ddf='": "--ddf '",
}
"""How the command line has what messages of the library advise."""


def _said(error: Exception) -> str:
    """Return an error as one line, or as three below it where a caret shows the place."""
    from .formula import FormulaError

    text = str(error) if isinstance(error, FormulaError) else _one_line(error)
    for argument, option in AS_OPTIONS.items():
        text = text.replace(argument, option)
    return visible(text, lines=True)


def _one_line(message: object) -> str:
    # str() of a KeyError is the repr of its message.
    if isinstance(message, KeyError) and message.args:
        message = message.args[0]
    return " ".join(str(message).split())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: The arguments; ``None`` means those of the process.

    Returns:
        0 if the fit converged, 1 after a mistake in the input, 3 if the fit did not converge, 130
        after Ctrl-C, 141 if the reader of the output has gone.

    Raises:
        SystemExit: With status 2 after a mistake in the options, 0 after ``--help``.

    Examples:
        >>> from lmmax.cli import main
        >>> main(["--describe", "rail"])  # doctest: +ELLIPSIS
        rail: Travel time of ultrasonic waves in rails
        ...
        0
    """
    arguments = argparse.Namespace(verbose=False)
    try:
        try:
            return _run(argv, arguments)
        finally:
            # What argparse has written too, while there is somebody to catch the error.
            print(end="", flush=True)
    except BrokenPipeError:
        # The reader (head, less) has gone; without this Python complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NO_READER
    except KeyboardInterrupt:
        print("lmmax: interrupted", file=sys.stderr)
        return _INTERRUPTED
    # What the library raises for a mistake in formula or data is one of these.
    except (_UserError, ValueError, LookupError, TypeError, OSError) as error:
        if arguments.verbose:
            traceback.print_exc()
        print(f"lmmax: error: {_said(error) or type(error).__name__}", file=sys.stderr)
        return _USER_ERROR


def _run(argv: Sequence[str] | None, arguments: argparse.Namespace) -> int:
    parser = _parser()
    parser.parse_args(argv, arguments)
    if arguments.version:
        from . import __version__

        _write(f"lmmax {__version__}\n", None)
    elif arguments.list:
        _write(_list_datasets(), arguments.output)
    elif arguments.describe is not None:
        from . import datasets

        _write(f"{datasets.describe(arguments.describe)}\n", arguments.output)
    elif arguments.formula is None or arguments.data is None:
        parser.error(
            'a formula and DATA are needed, such as: lmmax "Weight ~ Time + (1 | Pig)" dietox'
        )
    elif arguments.spreadsheet and not arguments.csv:
        parser.error("--spreadsheet is about the text in --csv: give both")
    else:
        return _fit_and_print(arguments)
    return _CONVERGED


if __name__ == "__main__":
    sys.exit(main())
