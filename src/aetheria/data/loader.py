"""What a user's loader becomes: the same data, at a position that can be found again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
    default_convert,
)

from aetheria.data.ahead import Processes, Threads
from aetheria.data.iterables import IterableSource, StatefulSource, WatchedIterable
from aetheria.data.keyed import KeyedBatchSampler, KeyedDataset, ReplayedSampler, draws_nothing
from aetheria.data.order import KeyedOrder, mix
from aetheria.data.ranked import RankedSource
from aetheria.data.sources import BatchSource, DatasetSource, SequenceSource, length_of
from aetheria.data.stream_source import StreamSource
from aetheria.data.streaming import StreamingDataset
from aetheria.data.workers import WorkerStart
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
    share: tuple[int, int] = (0, 1),
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
        limit: micro-batches in an epoch at most, of each rank.
        expected_batch_size: what the configuration says, to be compared with the loader.
        share: which rank this is, and of how many.

    Raises:
        DataError: the loader is empty, smaller than a window, of another batch size, or not iterable.
    """
    name = f"{role}_dataloader"
    ranks = share[1]
    whole = None if limit is None else limit * ranks

    def shared(source: BatchSource) -> BatchSource:
        return source if ranks == 1 else RankedSource(source, *share)

    if isinstance(data := getattr(loader, "dataset", loader), StreamingDataset):
        return _stream(loader, data, role, name, seed, window_batches, limit, expected_batch_size, share)
    if not isinstance(loader, DataLoader):
        return shared(_not_a_dataloader(loader, name, seed, seed_samples, whole))
    batches = loader.batch_sampler
    size = batches.batch_size if type(batches) is BatchSampler else None
    if role == "train":
        _check_batch_size(name, size, expected_batch_size)
    if isinstance(loader.dataset, IterableDataset) or _iterates_its_own_way(loader):
        return shared(_iterable(loader, seed, seed_samples, whole))

    dataset = KeyedDataset(
        loader.dataset,
        loader.collate_fn,
        mix(seed, SAMPLE_STREAM),
        seed_samples=seed_samples and not draws_nothing(loader.dataset),
        seed_collate=seed_samples and loader.collate_fn not in (default_collate, default_convert),
    )
    batched = batches is not None
    if (shuffle := _standard_order(loader)) is None:
        uncopied = None if role == "train" else loader.dataset
        chosen: Iterable[Any] = loader.sampler if batches is None else batches
        replayed = ReplayedSampler(chosen, _samplers(loader), seed, whole, batched, uncopied)
        return shared(DatasetSource(_rebuilt(loader, dataset, replayed), replayed, seed, batched))

    length = _checked_length(loader.dataset, name)
    window = (size or 1) * window_batches
    if role == "train":
        _check_window(name, length, size, window_batches, ranks)
        window *= ranks
    drop_last = type(batches) is BatchSampler and batches.drop_last
    stop = length - length % window if drop_last else length
    if whole is not None:
        stop = min(stop, whole * (size or 1))
    # Validation keeps one order for ever: an order by epoch would compare different samples under a limit.
    sampler = KeyedBatchSampler(KeyedOrder(length, seed, shuffle), size, stop, share if batched else (0, 1))
    source = DatasetSource(_rebuilt(loader, dataset, sampler), sampler, seed, batched)
    return source if batched else shared(source)


def _checked_length(dataset: Any, name: str) -> int:
    length = length_of(dataset)
    if length is None:
        raise DataError(
            f"the dataset of {name}, a {type(dataset).__name__}, has no __len__. Give it one, or the DataLoader a "
            "sampler; or derive it from IterableDataset, if it is to be iterated."
        )
    if not length:
        raise DataError(f"{name} is empty: its dataset has no samples. Check the path and the split.")
    return length


def _check_batch_size(name: str, size: int | None, expected: int | None) -> None:
    if None not in (size, expected) and size != expected:
        raise DataError(
            f"{name} has batch_size {size}, the configuration says {expected}. Pass the data module's batch_size on to "
            "the DataLoader, or leave batch_size out of the configuration."
        )


def _check_window(name: str, length: int, size: int | None, window_batches: int, ranks: int) -> None:
    window = (size or 1) * window_batches * ranks
    if window > length:
        unit = "samples" if size else "batches"
        parts = f"batch_size {size}" if size else "one batch"
        if window_batches > 1:
            parts += f" x grad_accumulation_steps {window_batches}"
        if ranks > 1:
            parts += f" x {ranks} ranks"
        if window_batches * ranks > 1:
            parts += f" = {window}"
        raise DataError(f"{parts} is larger than the data: {name} has {length} {unit}. Lower it, or add data.")


def _stream(
    loader: Any,
    data: StreamingDataset,
    role: str,
    name: str,
    seed: int,
    window_batches: int,
    limit: int | None,
    expected_batch_size: int | None,
    share: tuple[int, int],
) -> BatchSource:
    """Returns what reads shards; the loader, if there is one around them, says how, but does not read."""
    batched = isinstance(loader, DataLoader) and loader.batch_size is not None
    if batched and data.batch_size is not None:
        raise DataError(
            f"{name} makes batches of {loader.batch_size} of the batches of {data.batch_size} that its "
            "StreamingDataset gives. Give batch_size to one of them; to the DataLoader batch_size=None."
        )
    size = loader.batch_size if batched else data.batch_size
    if size is None:
        raise DataError(f"{name} gives single samples. Give its StreamingDataset a batch_size.")
    if role == "train":
        _check_batch_size(name, size, expected_batch_size)
    if not data.streams.plan.length:
        held = data.streams.shards.values()
        folders, lost = ", ".join(str(one.folder) for one in held), sum(len(one) for one in held)
        why = (
            f"all {lost:,} samples are in quarantine, or in shards that were not chosen"
            if lost
            else "it has no samples"
        )
        raise DataError(f"{name} is empty: {folders}: {why}.")
    if data.seed is None:
        data.streams.arrange(seed)
    ranks = share[1]
    window = size * ranks
    if role == "train":
        window *= window_batches
        _check_window(name, data.streams.plan.length, size, window_batches, ranks)
    by: Threads | Processes = Threads(data.readers)
    collate = None
    if isinstance(loader, DataLoader):
        if loader.num_workers:
            options = _options(loader) | {"persistent_workers": False}
            by = Processes(options.pop("num_workers"), options)
        if batched and loader.collate_fn not in (default_collate, default_convert):
            collate = loader.collate_fn
        data.drop_last = data.drop_last or (batched and loader.drop_last)
    return StreamSource(data, size, window=window, share=share, limit=limit, collate=collate, by=by)


def _not_a_dataloader(loader: Any, name: str, seed: int, seed_samples: bool, limit: int | None) -> BatchSource:
    if isinstance(loader, Sequence) and not isinstance(loader, str | bytes):
        if not len(loader):
            raise DataError(f"{name} is empty: it is a {type(loader).__name__} without a batch.")
        return SequenceSource(loader, seed, seed_samples and type(loader) not in (list, tuple), limit)
    if not hasattr(loader, "__iter__"):
        raise DataError(
            f"{name} returned a {type(loader).__name__}; expected a DataLoader, a list of batches or an iterable."
        )
    if _is_stateful(loader):
        return StatefulSource(loader, loader, seed, limit, seed_samples)
    return IterableSource(loader, seed, limit, seed_samples)


def _iterable(loader: DataLoader[Any], seed: int, seed_samples: bool, limit: int | None) -> BatchSource:
    if _is_stateful(loader):  # torchdata's StatefulDataLoader, for one
        source = StatefulSource(loader, loader, seed, limit, seed_samples)
        if loader.num_workers:
            source.warning = (
                f"the workers of {type(loader).__name__} keep their random generators to themselves: resuming finds "
                "the place again, but an augmentation draws anew. A DataLoader around a map-style dataset is exact."
            )
        return source
    if _iterates_its_own_way(loader):
        return IterableSource(loader, seed, limit, seed_samples)
    reads_here = loader.num_workers == 0
    stateful = WatchedIterable(loader.dataset) if reads_here and _is_stateful(loader.dataset) else None
    rebuilt: DataLoader[Any] = DataLoader(
        loader.dataset if stateful is None else stateful,
        batch_size=loader.batch_size,
        drop_last=loader.drop_last,
        collate_fn=loader.collate_fn,
        # A worker that outlives an epoch would carry its generators into the next, and never hear of `set_epoch`.
        **_options(loader) | {"persistent_workers": False},
    )
    if stateful is not None:
        return StatefulSource(rebuilt, stateful, seed, limit, seed_samples)
    return IterableSource(rebuilt, seed, limit, reads_here and seed_samples)


def _is_stateful(part: Any) -> bool:
    return all(callable(getattr(part, name, None)) for name in ("state_dict", "load_state_dict"))


def _iterates_its_own_way(loader: DataLoader[Any]) -> bool:
    methods = ("__iter__", "_get_iterator")
    return any(getattr(type(loader), name) is not getattr(DataLoader, name) for name in methods)


def _standard_order(loader: DataLoader[Any]) -> bool | None:
    """Returns True for a plain random sampler, False for a sequential one, None for anything of the user's own."""
    batches, sampler = loader.batch_sampler, loader.sampler
    if batches is not None:
        if type(batches) is not BatchSampler:
            return None
        sampler = batches.sampler  # not the loader's, which knows nothing of a BatchSampler that was handed in
    if type(sampler) is SequentialSampler and length_of(sampler.data_source) == length_of(loader.dataset):
        return False
    if type(sampler) is RandomSampler and not sampler.replacement:
        whole = sampler.num_samples == length_of(sampler.data_source) == length_of(loader.dataset)
        return True if whole else None
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
        "pin_memory": loader.pin_memory and torch.accelerator.is_available(),
        "timeout": loader.timeout,
        "worker_init_fn": WorkerStart(loader.worker_init_fn) if workers else None,
        "multiprocessing_context": loader.multiprocessing_context if workers else None,
        "prefetch_factor": loader.prefetch_factor if workers else None,
        "persistent_workers": loader.persistent_workers,
    }


def _rebuilt(loader: DataLoader[Any], dataset: KeyedDataset, sampler: Any) -> DataLoader[Any]:
    """Returns a loader to which a whole batch is one item: the dataset collates it."""
    return DataLoader(
        dataset, batch_size=None, sampler=sampler, collate_fn=_as_it_is, generator=torch.Generator(), **_options(loader)
    )


def _as_it_is(batch: Any) -> Any:
    return batch
