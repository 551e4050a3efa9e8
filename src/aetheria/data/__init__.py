"""Where samples come from, and in which order: a function of (seed, epoch, position).

The names are imported when they are first used: a process that encodes samples does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aetheria.core import AetherDataModule as AetherDataModule
    from aetheria.data.cursor import Cursor as Cursor
    from aetheria.data.loader import prepare_loader as prepare_loader
    from aetheria.data.mixing import MixedOrder as MixedOrder
    from aetheria.data.module import LoaderDataModule as LoaderDataModule
    from aetheria.data.order import BlockOrder as BlockOrder
    from aetheria.data.order import KeyedOrder as KeyedOrder
    from aetheria.data.packing import PackedTokens as PackedTokens
    from aetheria.data.repairing import Damage as Damage
    from aetheria.data.repairing import Repair as Repair
    from aetheria.data.repairing import repair as repair
    from aetheria.data.repairing import verify as verify
    from aetheria.data.selecting import Selection as Selection
    from aetheria.data.selecting import read_selection as read_selection
    from aetheria.data.selecting import write_selection as write_selection
    from aetheria.data.shards import Shards as Shards
    from aetheria.data.sources import BatchSource as BatchSource
    from aetheria.data.streaming import StreamingDataset as StreamingDataset
    from aetheria.data.writer import write_shards as write_shards

_HOMES = {
    "AetherDataModule": "aetheria.core",
    "BatchSource": "aetheria.data.sources",
    "BlockOrder": "aetheria.data.order",
    "Damage": "aetheria.data.repairing",
    "Cursor": "aetheria.data.cursor",
    "KeyedOrder": "aetheria.data.order",
    "LoaderDataModule": "aetheria.data.module",
    "MixedOrder": "aetheria.data.mixing",
    "PackedTokens": "aetheria.data.packing",
    "Repair": "aetheria.data.repairing",
    "Selection": "aetheria.data.selecting",
    "Shards": "aetheria.data.shards",
    "StreamingDataset": "aetheria.data.streaming",
    "repair": "aetheria.data.repairing",
    "prepare_loader": "aetheria.data.loader",
    "read_selection": "aetheria.data.selecting",
    "verify": "aetheria.data.repairing",
    "write_selection": "aetheria.data.selecting",
    "write_shards": "aetheria.data.writer",
}

__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
