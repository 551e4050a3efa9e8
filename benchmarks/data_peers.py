"""Reading shuffled samples from files, beside LitData, MosaicML Streaming, WebDataset, and the loaders of torch.

2 million samples of 1 KB, and 30,000 of 100 KB, written by each contestant's own writer (kept in --folder). Each
measurement is a fresh process that has imported before its time begins; contestants take turns in each of five rounds.
All give the same batches (a tensor of uint16 [64, 512]; a list of 16 bytes objects), every byte of them is added up,
and all of them shuffle. After the first batch each is read for a bounded time, or to the end of the epoch if that is
sooner: so the figures are those of the beginning of an epoch.

Cold: every file of the data is dropped from the page cache (posix_fadvise) before the process starts, and looked at
whether that has happened. Warm: all files are read before. Memory is the sum of the proportional set sizes of the
process and its workers, at its most while it reads; pages of files that are mapped count there, though the system takes
them back when it needs room; so what is not such pages stands beside it.

All of it takes about an hour, and once the writing of 23 GB before. Less: --part 4 --rounds 3 --seconds 1.5.

The peers live in an environment of their own; whoever is missing is left out, and named, and nothing is saved:

    python3 -m venv /tmp/peers
    /tmp/peers/bin/pip install -c constraints.txt torch -e .
    /tmp/peers/bin/pip install -c constraints.txt --no-deps -r benchmarks/data_peers_requirements.txt
    /tmp/peers/bin/python -m benchmarks.data_peers [--short] [--folder FOLDER] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.common import Figure, parser, report
from benchmarks.data_peers_contestants import CONTESTANTS
from benchmarks.data_peers_drive import run
from benchmarks.data_peers_process import Task
from benchmarks.data_peers_resume import KIND as RESUMED
from benchmarks.data_peers_resume import Resumed, resume
from benchmarks.data_peers_samples import KINDS, SHARD_BYTES, SHARD_BYTES_SHORT, SHORT, reach
from benchmarks.data_peers_table import Cell, figures_of_cells, figures_of_resuming, markdown, workers_in_words
from benchmarks.data_peers_tree import STILL_CACHED, drop, fill
from benchmarks.data_peers_writing import is_installed, prepare

ROUNDS, ROUNDS_SHORT = 5, 1
SECONDS, SECONDS_SHORT = 2.0, 0.5
HUNDREDTH = 100
CACHES, WORKERS = ("warm", "cold"), (0, 1, 2)


def say(text: str) -> None:
    """Prints how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def measure(cell: Cell, kind: str, folder: Path, seconds: float) -> None:
    """Adds one round to a cell."""
    where = f"{cell.kind}, {cell.cache}, {workers_in_words(cell.workers)}: {cell.name}"
    if cell.cache == "warm":
        fill(folder)
    elif (left := drop(folder)) > STILL_CACHED:
        cell.note = f"{100 * left:.0f} % of the files stayed in the page cache"
        say(f"{where}: not measured, {cell.note}")
        return
    found = run([Task(cell.name, kind, str(folder), cell.workers, KINDS[kind].batch_size, seconds)])[0]
    if found.failure:
        cell.note = f"failed: {found.failure}"
        say(f"{where}: {cell.note}")
        return
    values = found.values
    rate = values["samples"] / values["seconds"] if values["samples"] else 0.0
    now = {
        "rate": rate,
        "first": 1e3 * values["first"],
        "total": found.total,
        "own": found.own,
        "processor": 1e3 * values["processor"] / max(1, values["samples"]),
    }
    for name, value in now.items():
        cell.values.setdefault(name, []).append(value)
    say(f"{where}: {rate:,.0f}/s, first batch {now['first']:,.0f} ms, {now['total']:,.0f} MB")


def measure_reach(name: str, kind: str, folder: Path, count: int) -> Figure:
    """Returns from how much of the data the first hundredth of an epoch comes."""
    of = KINDS[kind]
    line = f"{of.name}, from how much of the data the first hundredth of an epoch comes: {name}"
    batches = max(1, count // HUNDREDTH // of.batch_size)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "numbers.npy"
        task = Task(name, kind, str(folder), 0, of.batch_size, collect=str(out), batches=batches)
        if (found := run([task])[0]).failure:
            return Figure(line, "MB", note=f"failed: {found.failure}")
        numbers = np.load(out)
    anywhere = np.random.default_rng(0).permutation(count)[: len(numbers)]
    whole = count * of.sample_bytes / 1e6
    note = f"{len(numbers):,} samples; drawn from all {whole:,.0f} MB: {reach(anywhere, of, count):,.0f} MB"
    return Figure(line, "MB", reach(numbers, of, count), samples=1, note=note)


def choices() -> argparse.Namespace:
    """Returns what the command line says, with what it leaves out filled in."""
    options = parser(__doc__)
    usual = Path(tempfile.gettempdir()) / "aetheria-data-peers"
    options.add_argument("--folder", default=str(usual), help=f"of the data, which are kept; {usual} by default")
    options.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS), metavar="NAME")
    options.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    options.add_argument("--caches", nargs="+", default=list(CACHES), choices=CACHES)
    options.add_argument("--workers", nargs="+", type=int, default=list(WORKERS), choices=WORKERS)
    options.add_argument("--part", type=int, help="only so much of the samples: 4 for a quarter; 1 by default")
    options.add_argument("--rounds", type=int, help=f"{ROUNDS} by default")
    options.add_argument("--seconds", type=float, help=f"of reading after the first batch; {SECONDS:g} by default")
    options.add_argument("--no-resume", action="store_true", help="does not measure going on in the middle")
    options.add_argument("--markdown", help="file for the tables, as the documentation has them")
    chosen = options.parse_args()
    chosen.part = chosen.part or (SHORT if chosen.short else 1)
    chosen.rounds = chosen.rounds or (ROUNDS_SHORT if chosen.short else ROUNDS)
    chosen.seconds = chosen.seconds or (SECONDS_SHORT if chosen.short else SECONDS)
    return chosen


def written(chosen: argparse.Namespace) -> tuple[dict[tuple[str, str], Path], dict[str, str]]:
    """Returns the folders with the data, by contestant and kind; and why which contestant is left out."""
    root = Path(chosen.folder).absolute()
    folders: dict[tuple[str, str], Path] = {}
    absent: dict[str, str] = {}
    for name in chosen.only:
        contestant = CONTESTANTS[name]
        if not is_installed(contestant.package):
            absent[name] = "not installed: the docstring of benchmarks/data_peers.py says how"
            continue
        try:
            for kind in chosen.kinds:
                folders[name, kind] = prepare(root, contestant.format, kind, chosen.part)
        except RuntimeError as error:  # of its writer; the others are measured nevertheless
            absent[name] = f"its data could not be written: {error}"
    return folders, absent


def measure_kind(chosen: argparse.Namespace, kind: str, folders: dict[str, Path]) -> tuple[list[Cell], list[Figure]]:
    """Returns what was measured with samples of one kind.

    Args:
        chosen: on the command line.
        kind: of the samples.
        folders: with them, by contestant.
    """
    called, count = KINDS[kind].name, KINDS[kind].samples(chosen.part)
    reaches = []
    for name, folder in folders.items():
        if 0 in CONTESTANTS[name].workers:  # ours has the same order in whatever way it is read
            reaches.append(found := measure_reach(name, kind, folder, count))
            say(f"{found.name}: {found.median or 0:,.0f} MB; {found.note}")
    cells: list[Cell] = []
    for cache in chosen.caches:
        here = [
            Cell(name, called, cache, workers)
            for workers in chosen.workers
            for name in folders
            if workers in CONTESTANTS[name].workers
        ]
        for number in range(chosen.rounds):
            # Each round begins with another one, so that nobody always comes behind the same neighbour.
            first = number % max(1, len(here))
            for cell in here[first:] + here[:first]:
                measure(cell, kind, folders[cell.name], chosen.seconds)
        cells += here
    return cells, reaches


def main() -> None:
    """Writes the data, measures every contestant, and writes the tables."""
    chosen = choices()
    folders, absent = written(chosen)
    names = [name for name in chosen.only if name not in absent]
    for name, why in absent.items():
        say(f"{name} is left out, {why}")
    cells: list[Cell] = []
    reaches: list[Figure] = []
    for kind in chosen.kinds:
        found = measure_kind(chosen, kind, {name: folders[name, kind] for name in names})
        cells += found[0]
        reaches += found[1]
    resumed: dict[str, Resumed] = {}
    if not chosen.no_resume and RESUMED in chosen.kinds:
        count = KINDS[RESUMED].samples(chosen.part)
        resumed = {name: resume(name, folders[name, RESUMED], count, chosen.rounds, say) for name in names}
    tables = markdown(cells, reaches, resumed)
    if chosen.markdown:
        Path(chosen.markdown).write_text(tables + "\n")
    else:
        print(tables)
    everything = list(CONTESTANTS), list(KINDS), list(CACHES), list(WORKERS)
    whole = (names, chosen.kinds, chosen.caches, chosen.workers) == everything and bool(resumed)
    if not chosen.no_save and (chosen.short or not whole):
        say("nothing is saved: that was not all of it")
    report(
        "data_peers",
        f"Shuffled samples from files, read for {chosen.seconds:g} s after the first batch by a fresh process: "
        f"{' and '.join(f'{KINDS[kind].samples(chosen.part):,} of {KINDS[kind].name}' for kind in chosen.kinds)}; "
        f"median of {chosen.rounds} rounds, and as interval their whole range.",
        [
            *(Figure(name, "samples/s", note=why.splitlines()[0]) for name, why in absent.items()),
            *figures_of_cells(cells),
            *reaches,
            *figures_of_resuming(resumed),
        ],
        save=whole and not chosen.short and not chosen.no_save,
        settings={
            "rounds": chosen.rounds,
            "seconds_after_the_first_batch": chosen.seconds,
            "shard_bytes": SHARD_BYTES_SHORT if chosen.part >= SHORT else SHARD_BYTES,
            "samples": {kind: KINDS[kind].samples(chosen.part) for kind in chosen.kinds},
            "batch_sizes": {kind: KINDS[kind].batch_size for kind in chosen.kinds},
            "contestants": {name: f"{_version(name)}; {CONTESTANTS[name].settings}" for name in names},
            "cells": [cell.state() for cell in cells],
            "resumed": {name: asdict(result) for name, result in resumed.items()},
        },
    )


def _version(name: str) -> str:
    return f"{CONTESTANTS[name].distribution} {importlib.metadata.version(CONTESTANTS[name].distribution)}"


if __name__ == "__main__":
    main()
