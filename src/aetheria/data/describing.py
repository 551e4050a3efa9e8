"""What a folder of shards holds, for people and for programs: in all, and a few samples of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aetheria.data.fields import Array, Boundaries, Field, Image
from aetheria.data.manifest import WRITING, Manifest
from aetheria.data.order import KeyedOrder
from aetheria.data.repairing import quarantined_blocks
from aetheria.data.schema import Schema
from aetheria.errors import DataError

__all__ = ["describe", "draw", "first_rows", "in_words", "look_at"]

_TEXT, _VALUES = 200, 8  # characters, and numbers, that are shown


def describe(folder: Path | str, version: int | None = None) -> dict[str, Any]:
    """Returns what a folder of shards holds, in JSON's types. No shard is read.

    Args:
        folder: of the data.
        version: of the manifest; None for the newest.

    Raises:
        DataError: there are no shards here, or no such version.
        DataDamagedError: the manifest is damaged.
    """
    folder = Path(folder).absolute()
    manifest = Manifest.read(folder, version)
    return {
        "folder": str(folder),
        "uid": manifest.uid,
        "version": manifest.version,
        "versions": Manifest.read(folder).version,
        "created": manifest.created,
        "rows": manifest.rows,
        "bytes": sum(part.bytes for part in manifest.parts),
        "shards": sum(part.shards for part in manifest.parts),
        "blocks": sum(part.blocks for part in manifest.parts),
        "schema": {path: in_words(field) for path, field in Schema.from_state(manifest.schema).fields.items()},
        "key": manifest.key,
        "parts": [
            {
                "name": part.name,
                "rows": part.rows,
                "bytes": part.bytes,
                "shards": part.shards,
                "blocks": part.blocks,
                "compression": part.compression,
            }
            for part in manifest.parts
        ],
        "quarantined": {
            "blocks": len(quarantined_blocks(manifest)),
            "rows": sum(entry["rows"] for entry in manifest.quarantined),
            "entries": list(manifest.quarantined),
        },
        "interrupted": (folder / WRITING).is_dir(),
        "notes": manifest.notes,
    }


def in_words(field: Field) -> str:
    """Returns what a field holds: "float32 [3, any]", "text", "image, RGB"."""
    match field:
        case Boundaries():
            return f"boundaries of documents in {field.length} tokens"
        case Array() if field.shape:
            shape = ", ".join("any" if size is None else str(size) for size in field.shape)
            return f"{field.dtype} [{shape}]{'' if field.tensor else ', NumPy'}"
        case Array():
            return f"{field.dtype}{'' if field.tensor else ', NumPy'}"
        case Image():
            return f"image, {field.mode}"
        case _:
            return field.kind


def first_rows(folder: Path | str, count: int) -> list[dict[str, Any]]:
    """Returns the first samples that can be read, as `look_at` shows them.

    Raises:
        DataError: there are no shards here.
        DataDamagedError: a block that is needed is damaged.
    """
    return _shown(folder, count, None)


def draw(folder: Path | str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Returns some samples drawn at random, none of them twice, as `look_at` shows them; raises as `first_rows`.

    Args:
        folder: of the data.
        count: of samples; if there are fewer, all of them.
        seed: another one draws others.
    """
    return _shown(folder, count, seed)


def _shown(folder: Path | str, count: int, seed: int | None) -> list[dict[str, Any]]:
    from aetheria.data.shards import Shards  # noqa: PLC0415 - it imports torch, which `describe` does not need

    if count < 1:
        raise DataError(f"at least one sample is shown; found {count}.")
    shards = Shards(folder)
    lost = np.zeros(len(shards.block_rows), dtype=bool)
    lost[list(shards.quarantined)] = True
    readable = np.where(lost, 0, shards.block_rows)
    starts = np.concatenate([[0], np.cumsum(shards.block_rows, dtype=np.int64)])
    held = np.concatenate([[0], np.cumsum(readable, dtype=np.int64)])
    count = min(count, int(held[-1]))
    if not count:
        return []
    order = KeyedOrder(int(held[-1]), seed or 0, shuffle=seed is not None)
    wanted = order.ids(0, 0, count)
    blocks = np.searchsorted(held, wanted, side="right") - 1
    rows = starts[blocks] + wanted - held[blocks]
    is_bytes = shards.manifest.notes.get("tokenizer", {}).get("name") == "bytes"
    return [
        {"row": row, "id": int(identity), "sample": look_at(_with_text(sample) if is_bytes else sample)}
        for row, identity, sample in zip(rows.tolist(), shards.sample_ids(rows), shards.samples(rows))
    ]


def _with_text(sample: Any) -> Any:
    """Returns a row of tokens that are bytes with the text that they are."""
    if not isinstance(sample, dict) or "tokens" not in sample:
        return sample
    return sample | {"tokens": bytes(sample["tokens"].tolist()).decode(errors="replace")}


def look_at(value: Any) -> Any:
    """Returns a value as it can be read: numbers as they are, of arrays type, shape and first values, of text a part.

    What is returned is of JSON's types.
    """
    if isinstance(value, dict):
        return {key: look_at(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [look_at(item) for item in value]
    if isinstance(value, str):
        return value if len(value) <= _TEXT else f"{value[:_TEXT]}... ({len(value):,} characters)"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes: {value[:16].hex(' ')}{' ...' if len(value) > 16 else ''}"
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    if hasattr(value, "shape"):
        return _array(value)
    return str(value)


def _array(value: Any) -> str:
    shape: Sequence[int] = tuple(value.shape)
    first = value.reshape(-1)[:_VALUES].tolist()
    shown = " ".join(f"{number:.6g}" if isinstance(number, float) else str(number) for number in first)
    more = " ..." if int(np.prod(shape)) > _VALUES else ""
    return f"{str(value.dtype).removeprefix('torch.')} {list(shape)}: {shown}{more}"
