"""Which kinds of sources there are, and of which one something is."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aetheria.data.importing.choices import Choices
from aetheria.data.importing.csv_files import CsvFiles
from aetheria.data.importing.hugging_face import HuggingFaceDataset
from aetheria.data.importing.images import IMAGES, ImageFolder
from aetheria.data.importing.jsonl_files import JsonlFiles
from aetheria.data.importing.mds import MdsFolder
from aetheria.data.importing.parquet_files import ParquetFiles
from aetheria.data.importing.rows import Progress, Rows
from aetheria.data.importing.tar_files import TarFiles
from aetheria.data.importing.text import TEXTS
from aetheria.errors import DataError, did_you_mean

__all__ = ["KINDS", "files_of", "open_rows", "recognise"]

KINDS: dict[str, str] = {
    "images": "a folder of images, in folders of classes or not",
    "csv": "CSV or TSV",
    "jsonl": "JSON, one value a line",
    "parquet": "Parquet",
    "text": "text files, to tokens",
    "hf": "a Hugging Face dataset, as save_to_disk writes it",
    "webdataset": "tar files of WebDataset",
    "mds": "a folder of MosaicML Streaming",
}
_ENDINGS: dict[str, tuple[str, ...]] = {
    "csv": (".csv", ".tsv"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet", ".pq"),
    "webdataset": (".tar", ".tgz"),
    "text": TEXTS,
    "images": IMAGES,
}
_PACKED = (".gz", ".bz2", ".xz")
_OPENED: dict[str, Callable[[Any, Choices, Progress | None], Rows]] = {
    "csv": CsvFiles,
    "hf": HuggingFaceDataset,
    "images": ImageFolder,
    "jsonl": JsonlFiles,
    "mds": MdsFolder,
    "parquet": ParquetFiles,
    "webdataset": TarFiles,
}
_OF_FILES = ("csv", "jsonl", "parquet", "text", "webdataset")


def recognise(source: Path | str) -> str:
    """Returns the kind of a source: a file, a folder, or a pattern of files such as "data/*.tar".

    Raises:
        DataError: there is nothing, or it is unclear what it is.
    """
    path = Path(source)
    if not path.exists() and glob.has_magic(str(source)):
        return _by_endings(source, Counter(_kind_of(file) for file in _matching(source)))
    if not path.exists():
        raise DataError(f"there is no {path}. Correct the path.")
    if path.is_file():
        kind = _kind_of(path)
        if kind == "images":
            raise DataError(f"{path} is a single image. Give the folder of the images.")
        return _by_endings(source, Counter([kind]))
    if (path / "manifest.json").is_file() and (path / "versions").is_dir():
        raise DataError(f"{path} holds shards already: it can be read as it is.")
    if (path / "dataset_dict.json").is_file() or {"state.json", "dataset_info.json"} <= set(os.listdir(path)):
        return "hf"
    if (path / "index.json").is_file() and _is_mds(path / "index.json"):
        return "mds"
    return _by_endings(source, Counter(_kind_of(file) for file in _walked(path)))


def files_of(source: Path | str, kind: str) -> list[Path]:
    """Returns the files of a source, in the order of their names.

    Args:
        source: a file, a folder, or a pattern.
        kind: one of those whose sources are files; of a folder only files of that kind are taken.

    Raises:
        DataError: there are none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    found = [file for file in _walked(path) if _kind_of(file) == kind] if path.is_dir() else sorted(_matching(source))
    if not found:
        raise DataError(
            f"{source}: there are no files of the kind {kind!r} ({', '.join(_ENDINGS[kind])}) in it. If they are "
            f"called otherwise, give a pattern of them, such as '{path}/*'."
        )
    return found


def open_rows(source: Path | str, kind: str, choices: Choices, progress: Progress | None = None) -> Rows:
    """Returns the rows of a source of any kind but text.

    Raises:
        DataError: there is no such kind, or the source is none of it.
    """
    if kind not in _OPENED:
        raise DataError(f"there is no kind of source {kind!r}. {did_you_mean(kind, KINDS)}")
    return _OPENED[kind](files_of(source, kind) if kind in _OF_FILES else source, choices, progress)


def _by_endings(source: Path | str, kinds: Counter[str | None]) -> str:
    unknown = kinds.pop(None, 0)
    if len(kinds) == 1:  # files of no known kind stand beside others: a licence, a list of names
        return str(next(iter(kinds)))
    listed = "; ".join(f"{name}: {what}" for name, what in KINDS.items())
    if kinds:
        found = ", ".join(f"{count:,} of {name}" for name, count in kinds.most_common())
        raise DataError(f"{source}: it is unclear what this is: there are files {found}. Say which kind. {listed}.")
    raise DataError(
        f"{source}: it is unclear what this is: {unknown:,} files of no known ending. Say which kind. {listed}."
    )


def _kind_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    ending = suffixes[-1] if suffixes else ""
    return next((kind for kind, endings in _ENDINGS.items() if ending in endings), None)


def _walked(folder: Path) -> list[Path]:
    found = []
    for place, below, files in os.walk(folder, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _matching(pattern: Path | str) -> list[Path]:
    found = [Path(name) for name in glob.glob(str(pattern), recursive=True) if os.path.isfile(name)]
    if not found:
        raise DataError(f"no file matches {pattern}. Correct the pattern.")
    return found


def _is_mds(index: Path) -> bool:
    try:
        return isinstance(json.loads(index.read_bytes())["shards"], list)
    except (ValueError, KeyError, TypeError):  # somebody else's index.json
        return False
