"""What was measured of the contestants, as lines of the results file and as tables for the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.common import Figure
from benchmarks.data_peers_contestants import CONTESTANTS
from benchmarks.data_peers_resume import Resumed

__all__ = ["Cell", "figures_of_cells", "figures_of_resuming", "markdown", "workers_in_words"]

TITLES = {
    "rate": "Samples a second",
    "first": "Milliseconds until the first batch",
    "total": "Memory of all its processes, in MB as PSS",
    "own": "Of that not pages of mapped files, in MB",
    "processor": "Processor seconds for 1,000 samples",
}


@dataclass
class Cell:
    """One contestant, one kind of sample, one page cache, one number of workers.

    Attributes:
        name: of the contestant.
        kind: of the samples, as the tables call it.
        cache: "warm" or "cold".
        workers: how many.
        values: of each round, by the names of `TITLES`.
        note: why there are none.
    """

    name: str
    kind: str
    cache: str
    workers: int
    values: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    def median(self, what: str) -> float | None:
        """Returns the middle one of the rounds; None if there is none."""
        return float(np.median(self.values[what])) if self.values.get(what) else None

    def range(self, what: str) -> tuple[float, float]:
        """Returns the least and the greatest of the rounds."""
        return min(self.values[what]), max(self.values[what])

    def state(self) -> dict[str, Any]:
        """Returns it for the results file."""
        return dict(vars(self))


def workers_in_words(workers: int) -> str:
    """Returns "1 worker", "2 workers"."""
    return f"{workers} worker{'' if workers == 1 else 's'}"


def figures_of_cells(cells: Iterable[Cell]) -> list[Figure]:
    """Returns a line for each cell: the speed, and beside it what else was measured."""
    cells, figures = list(cells), []
    for cell in cells:
        name = f"{cell.kind}, {cell.cache}, {workers_in_words(cell.workers)}: {cell.name}"
        rate = cell.median("rate")
        if rate is None:
            figures.append(Figure(name, "samples/s", note=cell.note))
            continue
        low, high = cell.range("rate")
        said = [
            f"first batch {cell.median('first'):,.0f} ms",
            f"memory {cell.median('total'):,.0f} MB, {cell.median('own'):,.0f} of it not mapped files",
            f"{cell.median('processor'):.3g} processor s for 1,000",
        ]
        if cell.note:
            said.append(f"of the rounds {len(cell.values['rate'])} came to an end; {cell.note}")
        if cell.name.startswith("Aetheria") and (peer := _best_peer(cells, cell)):
            said.append(f"{rate / peer[0]:.2f} times {peer[1]}")
        mean = float(np.mean(cell.values["rate"]))
        figures.append(Figure(name, "samples/s", rate, low, high, mean, len(cell.values["rate"]), note="; ".join(said)))
    return figures


def _best_peer(cells: list[Cell], ours: Cell) -> tuple[float, str] | None:
    place = (ours.kind, ours.cache, ours.workers)
    found = [
        (rate, cell.name)
        for cell in cells
        if (cell.kind, cell.cache, cell.workers) == place and not cell.name.startswith("Aetheria")
        and (rate := cell.median("rate")) is not None
    ]  # fmt: skip
    return max(found, default=None)


def figures_of_resuming(resumed: dict[str, Resumed]) -> list[Figure]:
    """Returns what came of going on at 50 %."""
    figures = []
    for name, result in resumed.items():
        title = f"resumed at 50 % of 100 KB: {name}"
        said = [
            f"{topology}: " + (counts if isinstance(counts, str) else f"{counts[0]:,} again, {counts[1]:,} never")
            for topology, counts in result.counts.items()
        ]
        note = "; ".join(said) or result.note
        if not result.first:
            figures.append(Figure(f"{title}, until its first batch", "ms", note=note))
        for cache, seconds in result.first.items():
            values = [1e3 * value for value in seconds]
            target = 50.0 if name.startswith("Aetheria") else None
            middle, mean = float(np.median(values)), float(np.mean(values))
            line = f"{title}, until its first batch, {cache}"
            figures.append(Figure(line, "ms", middle, min(values), max(values), mean, len(values), target, note))
            note = ""
    return figures


def markdown(cells: Iterable[Cell], reaches: Iterable[Figure], resumed: dict[str, Resumed]) -> str:
    """Returns tables: contestants by samples, page cache and number of workers; medians, the range of speed behind."""
    cells = list(cells)
    measured = {cell.name for cell in cells}
    names = [name for name in CONTESTANTS if name in measured]
    places = list(dict.fromkeys((cell.kind, cell.cache, cell.workers) for cell in cells))
    by_place = {(cell.name, cell.kind, cell.cache, cell.workers): cell for cell in cells}
    lines: list[str] = []
    for what, title in TITLES.items():
        for cache in dict.fromkeys(place[1] for place in places):
            columns = [place for place in places if place[1] == cache]
            lines += [f"**{title}, page cache {cache}**", ""]
            lines.append(
                "| | " + " | ".join(f"{kind}, {workers_in_words(workers)}" for kind, _, workers in columns) + " |"
            )
            lines.append("|---|" + "---:|" * len(columns))
            for name in names:
                shown = [_shown(by_place.get((name, *column)), what) for column in columns]
                if any(shown):
                    lines.append(f"| {name} | " + " | ".join(shown) + " |")
            lines.append("")
    lines += ["**Reach of the shuffle**", "", "| | | |", "|---|---:|---|"]
    for figure in reaches:
        lines.append(
            f"| {figure.name} | {'' if figure.median is None else f'{figure.median:,.0f} MB'} | {figure.note} |"
        )
    lines.append("")
    if resumed:
        lines += ["**Resumed at 50 % of the samples of 100 KB**", "", "| | until its first batch | |", "|---|---:|---|"]
        for figure in figures_of_resuming(resumed):
            name = figure.name.removeprefix("resumed at 50 % of 100 KB: ").replace(", until its first batch", "")
            shown = ""
            if figure.median is not None:
                shown = f"{figure.median:,.0f} ms ({figure.low:,.0f} to {figure.high:,.0f})"
            lines.append(f"| {name} | {shown} | {figure.note} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _shown(cell: Cell | None, what: str) -> str:
    if cell is None:
        return ""
    if (middle := cell.median(what)) is None:
        return cell.note and "failed"
    if what != "rate":
        return f"{middle:.3g}" if middle < 100 else f"{middle:,.0f}"
    low, high = cell.range(what)
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"
