"""Metrics as a table that every program reads."""

from __future__ import annotations

import csv
from typing import TextIO

from aetheria.core import Logger
from aetheria.registry import Registry

__all__ = ["CSVLogger"]


@Registry.register_logger("CSVLogger")
class CSVLogger(Logger):
    """Writes `metrics.csv` in the run folder: a row for every set of metrics, a column for every name, "step" first.

    A name that appears later becomes one more column; the file is then written anew beside the old one and put in its
    place in one move, so that nothing is lost whenever the process dies. A continued run appends: rows after the
    snapshot it continued from stay, and their steps come twice.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._columns: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Writes one row; it is in the system's hands when this returns."""
        file = self._file or self._open()
        if not metrics.keys() <= set(self._columns):
            file = self._with_columns([*self._columns, *(name for name in metrics if name not in self._columns)])
        row = {"step": step, **metrics}
        csv.writer(file).writerow([row.get(name, "") for name in self._columns])
        file.flush()

    def _open(self) -> TextIO:
        """Opens the file, or continues the one that is there."""
        path = self.context.folder / "metrics.csv"
        present = path.read_text() if path.exists() else ""
        if not present.endswith("\n"):  # a new file, or one whose last row was cut off with the power
            with path.open("a") as file:
                file.write("step\n" if not present else "\n")
        with path.open(newline="") as file:
            self._columns = next(csv.reader(file))
        self._file = path.open("a", newline="")
        return self._file

    def _with_columns(self, columns: list[str]) -> TextIO:
        """Rewrites the file with more columns at its end; rows that have no value there are filled up."""
        assert self._file is not None
        self._file.close()
        path = self.context.folder / "metrics.csv"
        wider = path.with_suffix(".csv.tmp")
        with path.open(newline="") as old, wider.open("w", newline="") as new:
            writer = csv.writer(new)
            rows = csv.reader(old)
            next(rows)
            writer.writerow(columns)
            writer.writerows(row + [""] * (len(columns) - len(row)) for row in rows)
        wider.replace(path)
        self._columns = columns
        self._file = path.open("a", newline="")
        return self._file

    def teardown(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
