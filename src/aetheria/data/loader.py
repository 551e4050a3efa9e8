"""What a user's loader becomes: the same data, at a position that can be found again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from aetheria.data.keyed import KeyedBatchSampler, KeyedDataset, ReplayedSampler, WorkerStart, draws_nothing
from aetheria.data.order import KeyedOrder, mix
from aetheria.data.sources import BatchSource, DatasetSource, IterableSource, SequenceSource
from aetheria.errors import DataError

__all__ = ["prepare_loader"]

SAMPLE_STREAM = 4  # part of the keys that samples are read with


def prepare_loader(
    loader: Iterable[Any],
    *,
    role: Literal["train", "val", "test"],
    seed: int,
    seed_samples: bool = True,
    window_batches: int = 1,
    limit: int | None = None,
    expected_batch_size: int | None = None,
) -> BatchSource:
    """Takes over a user's loader, as `docs/determinism.md` tells.

    The dataset, the collate function, the workers and all options stay. A random sampler becomes the keyed order, a
    sequential one the identity; any other sampler is kept and replayed; iterables are resumed through their
    `state_dict`, or skipped forward.

    Args:
        loader: a DataLoader, a sequence of batches, or any iterable of batches.
        role: what it is for; a training loader must hold at least one whole window.
        seed: of the run.
        seed_samples: whether to seed the global generators for each sample that is read.
        window_batches: micro-batches in a window; with `drop_last`, short windows are dropped.
        limit: micro-batches in an epoch at most.
        expected_batch_size: what the configuration says, to be compared with the loader.

    Raises:
        DataError: the loader is empty, smaller than a batch, of another batch size, or not iterable.
    """
    name = f"{role}_dataloader"
    if not isinstance(loader, DataLoader):
        return _not_a_dataloader(loader, name, seed, limit)
    if isinstance(loader.dataset, IterableDataset) or _iterates_its_own_way(loader):
        return _iterable(loader, seed, limit)

    if not (length := len(loader.dataset)):  # type: ignore[arg-type]
        raise DataError(f"{name} is empty: its dataset has no samples. Check the path and the split.")
    batched = loader.batch_sampler is not None
    dataset = KeyedDataset(loader.dataset, mix(seed, SAMPLE_STREAM), seed_samples and not draws_nothing(loader.dataset))
    if (shuffle := _standard_order(loader)) is None:
        chosen: Any = loader.batch_sampler if batched else loader.sampler
        replayed = ReplayedSampler(chosen, _samplers(loader), seed, limit, batched)
        return DatasetSource(_rebuilt(loader, dataset, replayed), replayed, seed, batched)

    size = loader.batch_size if batched else None
    if role == "train":
        _check_size(name, length, size, window_batches, expected_batch_size)
    stop = length - length % ((size or 1) * window_batches) if loader.drop_last else length
    if limit is not None:
        stop = min(stop, limit * (size or 1))
    # Validation keeps one order for ever: an order by epoch would compare different samples under a limit.
    sampler = KeyedBatchSampler(KeyedOrder(length, seed, shuffle), size, stop)
    return DatasetSource(_rebuilt(loader, dataset, sampler), sampler, seed, batched)


def _check_size(name: str, length: int, size: int | None, window_batches: int, expected: int | None) -> None:
    if size is not None and expected is not None and size != expected:
        raise DataError(
            f"{name} has batch_size {size}, the configuration says {expected}. Pass the data module's batch_size on "
            "to the DataLoader, or leave batch_size out of the configuration."
        )
    window = (size or 1) * window_batches
    if window > length:
        unit = "samples" if size else "batches"
        parts = f"batch_size {size}" if size else "one batch"
        if window_batches > 1:
            parts += f" x grad_accumulation_steps {window_batches} = {window}"
        raise DataError(f"{parts} is larger than the data: {name} has {length} {unit}. Lower it, or add data.")


def _not_a_dataloader(loader: Any, name: str, seed: int, limit: int | None) -> BatchSource:
    if isinstance(loader, Sequence) and not isinstance(loader, str | bytes):
        if not len(loader):
            raise DataError(f"{name} is empty: it is a {type(loader).__name__} without a batch.")
        return SequenceSource(loader, limit)
    if not hasattr(loader, "__iter__"):
        raise DataError(
            f"{name} returned a {type(loader).__name__}; expected a DataLoader, a list of batches or an iterable."
        )
    return IterableSource(loader, seed, limit, loader if _is_stateful(loader) else None)


def _iterable(loader: DataLoader[Any], seed: int, limit: int | None) -> BatchSource:
    if _is_stateful(loader):  # torchdata's StatefulDataLoader, for one
        return IterableSource(loader, seed, limit, loader)
    if _iterates_its_own_way(loader):
        return IterableSource(loader, seed, limit)
    stateful = loader.dataset if loader.num_workers == 0 and _is_stateful(loader.dataset) else None
    rebuilt: DataLoader[Any] = DataLoader(
        loader.dataset, batch_size=loader.batch_size, drop_last=loader.drop_last, **_options(loader)
    )
    return IterableSource(rebuilt, seed, limit, stateful, reads_here=loader.num_workers == 0)


def _is_stateful(part: Any) -> bool:
    return all(callable(getattr(part, name, None)) for name in ("state_dict", "load_state_dict"))


def _iterates_its_own_way(loader: DataLoader[Any]) -> bool:
    methods = ("__iter__", "_get_iterator")
    return any(getattr(type(loader), name) is not getattr(DataLoader, name) for name in methods)


def _standard_order(loader: DataLoader[Any]) -> bool | None:
    """Returns True for a plain random sampler, False for a sequential one, None for anything of the user's own."""
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        return None
    if type(loader.sampler) is SequentialSampler:
        return False
    sampler = loader.sampler
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset):  # type: ignore[arg-type]
        return True
    return None


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    if loader.batch_sampler is None:
        return [loader.sampler]
    if type(loader.batch_sampler) is BatchSampler:
        return [loader.batch_sampler.sampler]
    return [getattr(loader.batch_sampler, "sampler", None), loader.batch_sampler]


def _options(loader: DataLoader[Any]) -> dict[str, Any]:
    workers = loader.num_workers > 0
    return {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory and torch.accelerator.is_available(),
        "timeout": loader.timeout,
        "worker_init_fn": WorkerStart(loader.worker_init_fn) if workers else None,
        "multiprocessing_context": loader.multiprocessing_context if workers else None,
        "prefetch_factor": loader.prefetch_factor if workers else None,
        "persistent_workers": loader.persistent_workers,
    }


def _rebuilt(loader: DataLoader[Any], dataset: KeyedDataset, sampler: Any) -> DataLoader[Any]:
    place = {"batch_size": None, "sampler": sampler} if loader.batch_sampler is None else {"batch_sampler": sampler}
    return DataLoader(dataset, generator=torch.Generator(), **place, **_options(loader))
