"""Data in shards, streamed: larger than memory, mixed and selected while the run goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch.utils.data import DataLoader

from aetheria.control.knobs import controllable
from aetheria.core import AetherDataModule
from aetheria.data import StreamingDataset
from aetheria.errors import CommandError, ConfigError, DataError
from aetheria.registry import Registry

__all__ = ["ShardedDataModule", "ShardedTextData"]


@Registry.register_data("ShardedDataModule")
class ShardedDataModule(AetherDataModule):
    """Batches out of shards, as `aetheria data prepare` and `write_shards` make them.

    Two knobs change what is read while a run goes on: `data_weights`, how streams are mixed, and `data_selection`,
    which samples are read. A change takes effect behind what may have been read ahead (`horizon`), at the same sample
    on every rank, and again when the run is replayed.

    Args:
        train: folder or URL of the training data; or several, by the names of streams that are mixed.
        val: of the validation data; None for none.
        test: of the test data; None for none.
        batch_size: samples in a batch of one rank.
        num_workers: processes that read; 0 reads with threads, which is quicker unless samples are transformed in
            Python.
        readers: threads that read ahead.
        shuffle: whether the training data are.
        lanes: how many places are read from at once; see `StreamingDataset`.
        window: samples within which a lane is shuffled.
        buffer_size: instead of `window`, how many samples are shuffled among one another.
        drop_last: leaves out training samples at the end of an epoch that do not make up a batch on every rank.
        weights: how much of each stream is read, by name.
        repeat: how many times each sample of a stream comes in an epoch, by name.
        choose: how many samples of a stream come in an epoch, by name.
        selection: the name of a selection: only its samples are trained on.
        horizon: how many samples beyond those that are consumed may be read.
        damaged: what is done where samples are damaged or cannot be decoded: "raise" or "quarantine".
        version: of the training data; None takes the newest when the run begins.
        cache: folder in which blocks from elsewhere are kept.
        cache_bytes: size of it, in bytes.
        storage_options: of the file system that a URL names.
    """

    def __init__(
        self,
        train: str | dict[str, str],
        val: str | dict[str, str] | None = None,
        test: str | dict[str, str] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        readers: int = 1,
        shuffle: bool = True,
        lanes: int = 16,
        window: int | None = None,
        buffer_size: int | None = None,
        drop_last: bool = False,
        weights: dict[str, float] | None = None,
        repeat: dict[str, float] | None = None,
        choose: dict[str, int] | None = None,
        selection: str | None = None,
        horizon: int | None = None,
        damaged: Literal["raise", "quarantine"] = "raise",
        version: int | None = None,
        cache: str | None = None,
        cache_bytes: int | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        if num_workers < 0:
            raise ConfigError(f"{type(self).__name__} got num_workers={num_workers}; it must be 0 or more.")
        self.train, self.val, self.test = train, val, test
        self.num_workers = num_workers
        self._shared: dict[str, Any] = {
            "batch_size": batch_size,
            "readers": readers,
            "lanes": lanes,
            "horizon": horizon,
            "damaged": damaged,
            "cache": cache,
            "cache_bytes": cache_bytes,
            "storage_options": storage_options,
        }
        self._of_training: dict[str, Any] = {
            "shuffle": shuffle,
            "window": window,
            "buffer_size": buffer_size,
            "drop_last": drop_last,
            "weights": weights,
            "repeat": repeat,
            "choose": choose,
            "selection": selection,
            "version": version,
        }

    def transform(self) -> dict[str, Any]:
        """Returns what becomes of samples: `transform`, `collate_fn` or `batch_transform` of a `StreamingDataset`.

        A subclass says so here.
        """
        return {}

    def setup(self) -> None:
        """Opens the data: what is missing or damaged from the beginning is named here."""
        self.training = self._opened(self.train, **self._of_training)
        self.validation = None if self.val is None else self._opened(self.val, shuffle=False)
        self.testing = None if self.test is None else self._opened(self.test, shuffle=False)

    def _opened(self, source: str | dict[str, str], **options: Any) -> StreamingDataset:
        return StreamingDataset(source, **self._shared, **self.transform(), **options)

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the training batches."""
        return self._loader(self.training)

    def val_dataloader(self) -> DataLoader[Any] | None:
        """Returns the validation batches, in the order in which they were written."""
        return None if self.validation is None else self._loader(self.validation)

    def test_dataloader(self) -> DataLoader[Any] | None:
        """Returns the test batches, in the order in which they were written."""
        return None if self.testing is None else self._loader(self.testing)

    def _loader(self, data: StreamingDataset) -> DataLoader[Any]:
        return DataLoader(data, batch_size=None, num_workers=self.num_workers)

    @property
    def weights(self) -> dict[str, float]:
        """How much of each stream is trained on; all together are 1."""
        return self.training.weights

    @property
    def selection(self) -> str | None:
        """What is selected to be trained on."""
        return self.training.selection

    @controllable("data_weights", get="weights")
    def set_weights(self, weights: dict[str, float]) -> str:
        """How much of each stream of data is trained on: all their names, and shares of any sum."""
        for name, weight in weights.items():
            if not weight >= 0:
                raise CommandError(f"data_weights: the share of {name!r} is 0 or more; found {weight}.")
        total = sum(weights.values())
        now = self.weights
        if (
            weights.keys() == now.keys()
            and total
            and all(math.isclose(weights[name] / total, now[name], rel_tol=1e-12) for name in now)
        ):
            return ""
        with _refusals():
            return _told(self.training.set_weights(weights))

    @controllable("data_selection", get="selection")
    def set_selection(self, selection: str | None) -> str:
        """Which samples are trained on: the name of a selection ("stream:name" where there are several), or none."""
        if selection == self.selection:
            return ""
        with _refusals():
            return _told(self.training.set_selection(selection))


@contextmanager
def _refusals() -> Iterator[None]:
    """What the data refuse is the answer to the command, not a fault."""
    try:
        yield
    except DataError as error:
        raise CommandError(str(error)) from error


def _told(place: int) -> str:
    return f"takes effect from place {place:,} in the order of the data on, behind what may have been read ahead"


@Registry.register_data("ShardedTextData")
class ShardedTextData(ShardedDataModule):
    """Batches of (tokens [batch, length - 1], the tokens that follow), int64, out of shards of packed tokens.

    The shards are those of `aetheria data prepare TEXT --length N`, or of `PackedTokens`.
    """

    def transform(self) -> dict[str, Any]:
        """Returns what cuts rows of tokens into what is seen and what is to be predicted."""
        return {"batch_transform": _shifted}


def _shifted(batch: dict[str, Any]) -> tuple[Any, Any]:
    tokens = batch["tokens"].long()
    return tokens[:, :-1], tokens[:, 1:]
