"""Where samples come from, and in which order: a function of (seed, epoch, position)."""

from aetheria.core import AetherDataModule
from aetheria.data.cursor import Cursor
from aetheria.data.loader import prepare_loader
from aetheria.data.module import LoaderDataModule
from aetheria.data.order import KeyedOrder
from aetheria.data.sources import BatchSource

__all__ = ["AetherDataModule", "BatchSource", "Cursor", "KeyedOrder", "LoaderDataModule", "prepare_loader"]
