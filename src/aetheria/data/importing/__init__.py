"""Shards of what there is already: images, tables, text, and the formats of others.

`prepare` does what `aetheria data prepare` does. Each kind of source is a class of its own, a sequence of samples with
their schema, that `write_shards` takes as it is:

    write_shards(CsvFiles("measurements.csv", Choices(types={"id": "text"})), "data/measurements")

The names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aetheria.data.importing.choices import Choices as Choices
    from aetheria.data.importing.csv_files import CsvFiles as CsvFiles
    from aetheria.data.importing.hugging_face import HuggingFaceDataset as HuggingFaceDataset
    from aetheria.data.importing.images import ImageFolder as ImageFolder
    from aetheria.data.importing.jsonl_files import JsonlFiles as JsonlFiles
    from aetheria.data.importing.kinds import KINDS as KINDS
    from aetheria.data.importing.kinds import recognise as recognise
    from aetheria.data.importing.mds import MdsFolder as MdsFolder
    from aetheria.data.importing.parquet_files import ParquetFiles as ParquetFiles
    from aetheria.data.importing.preparing import Packing as Packing
    from aetheria.data.importing.preparing import Prepared as Prepared
    from aetheria.data.importing.preparing import prepare as prepare
    from aetheria.data.importing.rows import BadRow as BadRow
    from aetheria.data.importing.rows import Rows as Rows
    from aetheria.data.importing.rows import Skipping as Skipping
    from aetheria.data.importing.tar_files import TarFiles as TarFiles
    from aetheria.data.importing.text import PackedText as PackedText
    from aetheria.data.importing.text import TextFiles as TextFiles
    from aetheria.data.importing.text import open_tokenizer as open_tokenizer

_HOMES = {
    "KINDS": "kinds",
    "BadRow": "rows",
    "Choices": "choices",
    "CsvFiles": "csv_files",
    "HuggingFaceDataset": "hugging_face",
    "ImageFolder": "images",
    "JsonlFiles": "jsonl_files",
    "MdsFolder": "mds",
    "PackedText": "text",
    "Packing": "preparing",
    "ParquetFiles": "parquet_files",
    "Prepared": "preparing",
    "Rows": "rows",
    "Skipping": "rows",
    "TarFiles": "tar_files",
    "TextFiles": "text",
    "open_tokenizer": "text",
    "prepare": "preparing",
    "recognise": "kinds",
}

__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
