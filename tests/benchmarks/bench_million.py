"""A million mixed models from a file: simulated, fitted, killed, resumed, compared with the truth.

Usage: ``python -m tests.benchmarks.bench_million [--responses K] [--subjects M] [--visits T]
[--chunk C] [--directory DIR]``

A three-dimensional image with known maps is written to a ``.npy`` file in single precision, rows of
the design by voxels; 10^6 voxels of 1,000 rows are 4 GB. It is fitted from that file into a
directory by a process of its own, twice: once without a disturbance, and once killed (SIGKILL) in
the middle and resumed. Both directories must hold the same bytes. Reported are the rate, the
process's memory, what the kill cost, and how estimates relate to the truth. The last part compares
one device with two that are forced upon the same cores. All files are deleted at the end.

How memory is taken: "peak" is VmHWM of the process, of which the parent's readings tell the part
of its own (RssAnon) from pages of the file (RssFile), which the system may take back at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.benchmarks.harness import ROOT, memory

MODULE = "tests.benchmarks.bench_million"
INTERCEPT = "~ dose + group + (1 | subject)"
SLOPE = "~ dose + group + (1 + dose | subject)"
BLOCK = 20_000
PARTS = ("RssAnon", "RssFile")


@dataclass(frozen=True)
class Image:
    """A simulated image: k voxels of a cube, and M subjects with T visits each."""

    responses: int
    subjects: int
    visits: int

    @property
    def design(self) -> pd.DataFrame:
        """The rows: dose varies within, group between subjects."""
        subject = np.repeat(np.arange(self.subjects), self.visits)
        dose = np.tile(np.linspace(0.0, 1.0, self.visits), self.subjects)
        return pd.DataFrame({"subject": subject, "dose": dose, "group": subject % 2})

    def truth(self, voxels: np.ndarray) -> pd.DataFrame:
        """The maps at some voxels.

        ``effect`` of dose, zero outside two patches; ``share`` of the variance between subjects,
        zero in a region; ``kind`` of the voxel: "sound", "constant" outside of the head, "gap"
        where the last row is missing, "infinite" where one value is.
        """
        side = int(np.ceil(self.responses ** (1.0 / 3.0)))
        steps = np.stack(np.unravel_index(voxels, (side, side, side)))
        x, y, z = 2.0 * steps / (side - 1.0) - 1.0
        hills = [
            np.maximum(0.0, 1.0 - ((x - a) ** 2 + y**2 + z**2) / 0.25) ** 1.5 for a in (-0.5, 0.5)
        ]
        share = np.clip(0.3 + 0.45 * np.sin(2.5 * z + x), 0.0, 0.7)
        head = x**4 + y**4 + z**4 < 1.0
        layer = np.abs(y - 0.6) <= 1.0 / (side - 1.0)
        kind = np.select(
            [~head, voxels % 997 == 5, layer], ["constant", "infinite", "gap"], "sound"
        )
        return pd.DataFrame({"effect": 0.5 * (hills[0] - hills[1]), "share": share, "kind": kind})

    def write(self, path: Path) -> None:
        """Write the responses, a block of voxels at a time, each from a seed of its own."""
        design, n = self.design, self.subjects * self.visits
        subject, dose = design["subject"].to_numpy(), design["dose"].to_numpy(dtype=np.float32)
        shape = (n, self.responses)
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        for first in range(0, self.responses, BLOCK):
            voxels = np.arange(first, min(first + BLOCK, self.responses))
            truth, rng = self.truth(voxels), np.random.default_rng([1, first])
            share = truth["share"].to_numpy(dtype=np.float32)
            b = rng.standard_normal((self.subjects, len(voxels)), dtype=np.float32)
            y = rng.standard_normal((n, len(voxels)), dtype=np.float32)
            y *= np.sqrt(1.0 - share)
            y += (b * np.sqrt(share))[subject]
            y += dose[:, None] * truth["effect"].to_numpy(dtype=np.float32)
            y += np.float32(100.0)
            y[:, truth["kind"] == "constant"] = 0.0
            y[-1, truth["kind"] == "gap"] = np.nan
            y[0, truth["kind"] == "infinite"] = np.inf
            # A map of its own for each block, so that what was written does not stay.
            np.load(path, mmap_mode="r+")[:, first : first + BLOCK] = y


# --- in a process of its own ----------------------------------------------------------------------


def work(image: Image, here: Path, out: str, chunk: int | None, resume: bool) -> None:
    """Fit the file into a directory; print seconds and memory, and keep what the truth needs."""
    import lmmax

    before, began = memory("VmRSS"), time.perf_counter()
    batch = lmmax.fit_many(
        INTERCEPT, image.design, here / "image.npy", out=here / out, resume=resume, chunk=chunk
    )
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "before": before, "peak": memory("VmHWM")}), flush=True)
    limits = batch.conf_int("dose").to_numpy()
    np.savez(
        here / f"{out}.npz",
        lower=limits[:, 0],
        upper=limits[:, 1],
        effect=batch.params["dose"],
        p=batch.pvalues["dose"],
        p_group=batch.pvalues["group"],
        share=batch.icc,
        converged=batch.converged,
        singular=batch.record.singular,
        n_obs=batch.n_obs,
    )


def rates(image: Image, here: Path) -> None:
    """Print the seconds of fits of some responses in memory on the devices that there are."""
    import lmmax

    for formula, k in ((INTERCEPT, 100_000), (SLOPE, 8_000)):
        kind = image.truth(np.arange(image.responses))["kind"]
        sound = np.flatnonzero(kind == "sound")[:k]
        y = np.load(here / "image.npy", mmap_mode="r")[:, sound].astype(float)
        found = []
        for _ in range(3):
            began, worked = time.perf_counter(), time.process_time()
            lmmax.fit_many(formula, image.design, y)
            found.append((time.perf_counter() - began, time.process_time() - worked))
        wall, cpu = np.min(found[1:], axis=0)  # the first compiles
        rate = {"formula": formula, "rate": y.shape[1] / wall, "cpu": 1e6 * cpu / y.shape[1]}
        print(json.dumps(rate), flush=True)


# --- in the parent --------------------------------------------------------------------------------


def command(image: Image, here: Path, *more: Any) -> list[str]:
    """How this module is called again."""
    size = (image.responses, image.subjects, image.visits)
    names = ("--responses", "--subjects", "--visits")
    sized = [str(part) for pair in zip(names, size, strict=True) for part in pair]
    return [sys.executable, "-m", MODULE, *sized, "--directory", str(here), *map(str, more)]


def watched(
    image: Image, here: Path, *more: Any, until: Callable[[], bool] | None = None
) -> dict[str, float]:
    """Run `work` and follow its memory; kill it as soon as `until` says so.

    Returns:
        What it printed, the seconds of the whole process, and its largest parts of memory.
    """
    began, largest = time.perf_counter(), dict.fromkeys(PARTS, 0.0)
    process = subprocess.Popen(
        command(image, here, *more), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        for name in PARTS:
            largest[name] = max(largest[name], status(process.pid, name))
        if until is not None and until():
            process.kill()
            break
        time.sleep(0.01)
    text, _ = process.communicate()
    if until is None and process.returncode:
        raise RuntimeError(f"the work ended with code {process.returncode}")
    found = json.loads(text) if text else {}
    return {**found, **largest, "process": time.perf_counter() - began}


def status(pid: int, name: str) -> float:
    """A field of a process's memory in bytes; 0 where it is not to be had."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * float(x.split()[1]) for x in lines if x.startswith(name + ":")), 0.0)


def same(one: Path, other: Path) -> bool:
    """Whether two directories hold the same results, byte for byte."""
    names = [sorted(path.name for path in each.glob("chunk-*")) for each in (one, other)]
    return names[0] == names[1] and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names[0]
    )


def run(image: Image, here: Path, chunk: int | None) -> Iterator[str]:
    """Do all of it, and tell what was found as it comes."""
    k, path = image.responses, here / "image.npy"
    began = time.perf_counter()
    image.write(path)
    size = path.stat().st_size
    yield f"simulated: {size / 1e9:.2f} GB, {time.perf_counter() - began:.0f} s"
    chunked = [] if chunk is None else ["--chunk", chunk]
    whole = watched(image, here, *chunked, "--work", "whole")
    chunks = len(list((here / "whole").glob("chunk-*")))
    yield (
        f"fitted: {k:,} responses in {whole['seconds']:.0f} s, "
        f"{k / whole['seconds']:,.0f} a second, {chunks} chunks "
        f"(process from start to end {whole['process']:.0f} s)"
    )
    yield (
        f"memory: peak {whole['peak'] / 1e9:.2f} GB (bar 2), of its own "
        f"{whole['RssAnon'] / 1e9:.2f}, of the file {whole['RssFile'] / 1e9:.2f}; "
        f"before the fits {whole['before'] / 1e9:.2f}"
    )

    def complete() -> dict[str, int]:
        found = (here / "killed").glob("chunk-*.parquet")
        return {each.name: each.stat().st_mtime_ns for each in found}

    half = watched(
        image, here, *chunked, "--work", "killed", until=lambda: len(complete()) >= chunks // 2
    )
    before = complete()
    rest = watched(image, here, *chunked, "--work", "killed", "--resume")
    after = complete()
    again = sum(after[name] != stamp for name, stamp in before.items())
    yield (
        f"killed after {half['process']:.0f} s with {len(before)} chunks, resumed in "
        f"{rest['process']:.0f} s: {again} complete ones fitted again, at most "
        f"{again + 1} lost; the same bytes: {same(here / 'whole', here / 'killed')}"
    )
    yield from compared(image, dict(np.load(here / "killed.npz")))
    by_devices: dict[str, dict[int, list[tuple[float, float]]]] = {INTERCEPT: {}, SLOPE: {}}
    for devices in (1, 2, 1, 2):
        flags = f"--xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            command(image, here, "--rates"),
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in map(json.loads, done.stdout.splitlines()):
            by_devices[line["formula"]].setdefault(devices, []).append((line["rate"], line["cpu"]))
    for formula, found in by_devices.items():
        one, two = (max(rate for rate, _ in found[n]) for n in (1, 2))
        less, more = (min(cpu for _, cpu in found[n]) for n in (1, 2))
        yield (
            f"devices, {formula}: {one:,.0f} a second on one, {two:,.0f} on two forced on the "
            f"same cores, {one / two:.2f} times as long (bar 1.2); processor time per fit "
            f"{less:.0f} and {more:.0f} us"
        )


def compared(image: Image, found: dict[str, np.ndarray]) -> Iterator[str]:
    """Compare the estimates with the truth."""
    truth = image.truth(np.arange(image.responses))
    fitted, kind = found["converged"], truth["kind"].to_numpy()
    fits = np.isin(kind, ("sound", "gap"))
    gaps = found["n_obs"] < image.subjects * image.visits
    yield (
        f"certificates: {fitted.sum():,} converged, {(fitted & found['singular']).sum():,} of them "
        f"at the boundary; not fitted as they should be: {(fits & ~fitted).sum()}; fitted as they "
        f"should not be: {(~fits & fitted).sum()}; wrong number of rows: "
        f"{(gaps != (kind == 'gap')).sum()}"
    )
    effect, share = truth["effect"].to_numpy()[fits], truth["share"].to_numpy()[fits]
    own = {name: values[fits] for name, values in found.items()}
    held = (own["lower"] <= effect) & (effect <= own["upper"])
    table = pd.DataFrame(
        {
            "true share": share,
            "bias of share": own["share"] - share,
            "singular": own["singular"],
            "95% holds dose": held,
            "bias of dose": own["effect"] - effect,
            "p group < 0.05": own["p_group"] < 0.05,
            "p group < 0.001": own["p_group"] < 0.001,
        }
    )
    zones = pd.cut(share, [-1.0, 0.0, 0.1, 0.3, 0.5, 0.7], labels=["0", ".1", ".3", ".5", ".7"])
    means = table.groupby(zones, observed=True).mean()
    means.insert(0, "voxels", table.groupby(zones, observed=True).size())
    means.loc["all"] = [len(table), *table.mean()]
    yield means.rename_axis("share to").to_string(float_format="{:.5f}".format)
    none = own["p"][effect == 0.0]
    shares = ", ".join(f"{(none < a).mean():.6f} below {a}" for a in (0.05, 0.01, 0.001, 0.0001))
    yield f"p of dose where it has no effect ({len(none):,} voxels): {shares}"
    yield f"two standard errors of 0.95 of {len(table):,}: {2 * (0.0475 / len(table)) ** 0.5:.5f}"


def main() -> None:
    """Measure everything, or do what a child is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=1_000_000)
    parser.add_argument("--subjects", type=int, default=100)
    parser.add_argument("--visits", type=int, default=10)
    parser.add_argument("--chunk", type=int, help="responses worked on at once")
    parser.add_argument("--directory", type=Path, help="where there is space for the file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rates", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    image = Image(asked.responses, asked.subjects, asked.visits)
    if asked.work:
        work(image, asked.directory, asked.work, asked.chunk, asked.resume)
    elif asked.rates:
        rates(image, asked.directory)
    else:
        if asked.directory is not None:
            Path(asked.directory).mkdir(parents=True, exist_ok=True)
        here = Path(tempfile.mkdtemp(dir=asked.directory))
        try:
            for line in run(image, here, asked.chunk):
                print(line, flush=True)
        finally:
            shutil.rmtree(here)


if __name__ == "__main__":
    main()
