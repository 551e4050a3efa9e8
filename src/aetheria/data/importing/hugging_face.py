"""Datasets of Hugging Face as `save_to_disk` leaves them: files of Arrow's stream format, and JSON that names them.

The files are mapped, so that nothing is read but what is asked for; their library is not needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from aetheria.data.importing.arrow_columns import ArrowColumns
from aetheria.data.importing.choices import Choices
from aetheria.data.importing.rows import BadRow, Progress, Rows
from aetheria.errors import DataError

__all__ = ["HuggingFaceDataset"]

_AT_ONCE = 256  # rows


class HuggingFaceDataset(Rows):
    """Rows of a dataset on disk. The names of its classes go into the notes.

    Args:
        folder: with state.json in it; of a dictionary of datasets, the folder of one of them.
        choices: of the user.
        progress: is told how far the lengths of lists have been looked at, where it is not said.

    Raises:
        DataError: it is none, a file is missing or damaged, there are no rows, or a column has no field.
    """

    kind: ClassVar[str] = "hf"

    def __init__(self, folder: Path | str, choices: Choices | None = None, progress: Progress | None = None) -> None:
        self._folder = Path(folder)
        choices = choices or Choices()
        if (self._folder / "dataset_dict.json").is_file():
            splits = _json(self._folder / "dataset_dict.json").get("splits", [])
            raise DataError(f"{folder} holds several datasets, {', '.join(splits)}. Give the folder of one of them.")
        state = _json(self._folder / "state.json")
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise DataError(f"{folder} was saved by a version before 2.0, with its indices apart. Save it anew.")
        try:
            self._files = [str(entry["filename"]) for entry in state["_data_files"]]
        except (KeyError, TypeError) as error:
            raise DataError(f"{self._folder / 'state.json'} names no files of data. Save the dataset anew.") from error
        info = _json(self._folder / "dataset_info.json")
        self._batches = self._mapped()
        self._starts = np.concatenate([[0], np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)])
        if not len(self):
            raise DataError(f"{folder}: there are no rows in it. Check the source.")
        self._columns = ArrowColumns(self._batches[0].schema, choices, folder, info.get("features") or {})
        for number, batch in enumerate(self._batches if self._columns.lists else ()):
            self._columns.measure(batch)
            if progress is not None:
                progress("looking", number + 1, len(self._batches))
        self.schema = self._columns.schema()
        self.notes = {"classes": self._columns.classes} if self._columns.classes else {}
        self._held: tuple[int, list[Any], dict[int, str]] = (0, [], {})

    def _mapped(self) -> list[pa.RecordBatch]:
        batches = []
        for name in self._files:
            try:
                with pa.ipc.open_stream(pa.memory_map(str(self._folder / name))) as stream:
                    found = list(stream)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"cannot read {self._folder / name}: {error}.") from error
            batches += [batch for batch in found if len(batch)]
        return batches

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_batches", "_held")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._batches, self._held = self._mapped(), (0, [], {})

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        first, samples, bad = self._held
        if not first <= row < first + len(samples):
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            within = (row - int(self._starts[number])) // _AT_ONCE * _AT_ONCE
            first = int(self._starts[number]) + within
            samples, bad = self._columns.samples(self._batches[number].slice(within, _AT_ONCE))
            self._held = first, samples, bad
        if row - first in bad:
            raise BadRow(f"{self._folder}, row {row}: {bad[row - first]}.")
        return samples[row - first]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path.parent} is no dataset of `save_to_disk`: it has no {path.name}.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}.") from error
    return found if isinstance(found, dict) else {}
