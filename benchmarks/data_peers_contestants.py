"""Who reads the data: each contestant as its own documentation recommends for speed, all with the same batches.

A batch of rows is a tensor, uint16 [batch, 512]; a batch of blobs a list of bytes. All of them shuffle. Shards, chunks
and tar files have about 64 MB each. Everything else is at its default where nothing else is said.
"""

from __future__ import annotations

import importlib
import sys
import types
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from benchmarks.data_peers_samples import TOKENS, Batch

__all__ = ["CONTESTANTS", "Contestant", "Opened", "import_streaming"]

SEED = 1


@dataclass
class Opened:
    """Data that are being read.

    Attributes:
        batches: of one epoch, from where it was opened.
        state: returns what opening it again there needs, after some batches were taken; None if there is no such thing.
    """

    batches: Iterator[Batch]
    state: Callable[[int], Any] | None = None


Opener = Callable[[str, Path, int, int, Any], Opened]  # kind, folder, workers, batch size, state


@dataclass(frozen=True)
class Contestant:
    """One way to read.

    Attributes:
        name: in the tables.
        format: of its data.
        package: that must be installed.
        distribution: as which it is installed.
        open: opens the data.
        modules: imported before anything is measured.
        settings: how it is configured, in words.
        workers: with how many it is measured.
        saves: whether it can be opened again in the middle.
        ranks: whether it is asked to go on there on more ranks.
    """

    name: str
    format: str
    package: str
    distribution: str
    open: Opener
    modules: tuple[str, ...]
    settings: str
    workers: tuple[int, ...] = (0, 1, 2)
    saves: bool = True
    ranks: bool = True


# --- ours ------------------------------------------------------------------------------------------------------------


def _aetheria(kind: str, folder: Path, batch_size: int, state: Any, readers: int, workers: int) -> Opened:
    from aetheria.data import StreamingDataset

    dataset = StreamingDataset(folder, batch_size, seed=SEED, readers=readers)
    if state is not None:
        dataset.load_state_dict(state["dataset"])
    before = 0 if state is None else state["batches"]
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)

    def said(batches: int) -> Any:
        return {"dataset": dataset.state_dict(before + batches), "batches": before + batches}

    return Opened(iter(loader), said)


def aetheria_threads(kind: str, folder: Path, workers: int, batch_size: int, state: Any) -> Opened:
    """Ours, with threads that read ahead; they are what the others have processes for."""
    return _aetheria(kind, folder, batch_size, state, workers, 0)


def aetheria_processes(kind: str, folder: Path, workers: int, batch_size: int, state: Any) -> Opened:
    """Ours, in the worker processes of a DataLoader."""
    return _aetheria(kind, folder, batch_size, state, 0, workers)


# --- LitData ---------------------------------------------------------------------------------------------------------


def _bytes_of(samples: list[Any]) -> list[bytes]:
    """LitData gives views of its mapped files, which do not pass between processes; what is wanted are bytes."""
    return [bytes(sample) for sample in samples]


def litdata(kind: str, folder: Path, workers: int, batch_size: int, state: Any) -> Opened:
    """LitData: rows through its `TokensLoader`, blobs through its usual loader."""
    import litdata as package

    loads = package.TokensLoader(block_size=TOKENS) if kind == "rows" else None
    dataset = package.StreamingDataset(str(folder), item_loader=loads, shuffle=True, seed=SEED, drop_last=False)
    collate = torch.stack if kind == "rows" else _bytes_of
    loader = package.StreamingDataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)
    if state is not None:
        loader.load_state_dict(state)
    return Opened(iter(loader), lambda batches: loader.state_dict())


# --- MosaicML Streaming ----------------------------------------------------------------------------------------------


def import_streaming() -> Any:
    """Returns the package `streaming`.

    Its import needs torchvision, for data sets of pictures that are not read here. Where that is missing (it has no
    build beside torch 2.13 without CUDA) something stands in for the three names that are imported from it.
    """
    if importlib.util.find_spec("torchvision") is None:
        names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
        made = {name: types.ModuleType(name) for name in names}
        for name, module in made.items():
            module.__spec__ = ModuleSpec(name, None, is_package=True)
            module.__path__ = []
        made["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
        made["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
        sys.modules.update(made)
    return importlib.import_module("streaming")


def _named_rows(samples: list[Any]) -> dict[str, torch.Tensor]:
    return {"sample": torch.from_numpy(np.stack([sample["sample"] for sample in samples]))}


def _named_blobs(samples: list[Any]) -> dict[str, list[bytes]]:
    return {"sample": [sample["sample"] for sample in samples]}


def streaming(kind: str, folder: Path, workers: int, batch_size: int, state: Any) -> Opened:
    """MosaicML Streaming, of local shards."""
    package = import_streaming()
    dataset = package.StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=batch_size)
    collate = _named_rows if kind == "rows" else _named_blobs
    loader = package.StreamingDataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)
    if state is not None:
        loader.load_state_dict(state)
    return Opened((batch["sample"] for batch in loader), lambda batches: loader.state_dict())


# --- WebDataset ------------------------------------------------------------------------------------------------------


def _collated(samples: list[bytes]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray().join(samples), np.uint16).reshape(-1, TOKENS))


def _content(sample: dict[str, Any]) -> bytes:
    return sample["bin"]  # type: ignore[no-any-return]


def webdataset(kind: str, folder: Path, workers: int, batch_size: int, state: Any) -> Opened:
    """WebDataset: tar files in shuffled order, a buffer of 1,000 samples, batches made where they are read."""
    import webdataset as package

    files = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = package.WebDataset(files, shardshuffle=100, seed=SEED).shuffle(1000).map(_content)
    dataset = dataset.batched(batch_size, collation_fn=_collated if kind == "rows" else list)
    return Opened(iter(package.WebLoader(dataset, batch_size=None, num_workers=workers)))


# --- loaders of torch over our Arrow files ---------------------------------------------------------------------------


class ArrowRows(Dataset[Any]):
    """Samples of Arrow files, mapped into memory: what anybody would write for a map-style dataset.

    Args:
        folder: with the files.
        kind: of the samples.
        arrays: whether rows come as arrays, for a collate function that wants these; tensors otherwise.
    """

    def __init__(self, folder: Path, kind: str, arrays: bool = False) -> None:
        self._columns: list[Any] = []
        self._starts = [0]
        for path in sorted((folder / "shards").glob("*.arrow")):
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            for number in range(file.num_record_batches):
                column = file.get_batch(number).column(0)
                self._starts.append(self._starts[-1] + len(column))
                if kind == "rows":
                    column = column.values.to_numpy(zero_copy_only=True).reshape(-1, TOKENS)
                self._columns.append(column)
        self._get = self._blob if kind == "blobs" else self._array if arrays else self._row

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Any:
        place = bisect_right(self._starts, index) - 1
        return self._get(self._columns[place], index - self._starts[place])

    @staticmethod
    def _array(column: Any, index: int) -> Any:
        return column[index]

    @staticmethod
    def _row(column: Any, index: int) -> Any:
        return torch.from_numpy(column[index])

    @staticmethod
    def _blob(column: Any, index: int) -> bytes:
        return column[index].as_py()  # type: ignore[no-any-return]


def _stacked(rows: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows))


def plain(kind: str, folder: Path, workers: int, batch_size: int, state: Any) -> Opened:
    """torch's own DataLoader, as it comes."""
    return Opened(iter(_plain(ArrowRows(folder, kind), workers, batch_size, default_collate)))


def stacked(kind: str, folder: Path, workers: int, batch_size: int, state: Any) -> Opened:
    """torch's own DataLoader, with a collate function made for such rows."""
    collate = _stacked if kind == "rows" else list
    return Opened(iter(_plain(ArrowRows(folder, kind, arrays=True), workers, batch_size, collate)))


def _plain(dataset: ArrowRows, workers: int, batch_size: int, collate: Any) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(SEED)
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, collate_fn=collate, generator=draw)


def stateful(kind: str, folder: Path, workers: int, batch_size: int, state: Any) -> Opened:
    """torchdata's StatefulDataLoader, as it comes."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    draw = torch.Generator().manual_seed(SEED)
    dataset = ArrowRows(folder, kind)
    loader = StatefulDataLoader(dataset, batch_size, shuffle=True, num_workers=workers, generator=draw)
    if state is not None:
        loader.load_state_dict(state)
    return Opened(iter(loader), lambda batches: loader.state_dict())


_TORCH = ("torch.utils.data", "pyarrow", "multiprocessing.popen_fork")
_OURS = ("aetheria.data.streaming", *_TORCH)

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(
            "Aetheria", "arrow", "aetheria", "aetheria", aetheria_threads, _OURS,
            "StreamingDataset(folder, batch, readers=workers) in DataLoader(batch_size=None): the workers are threads",
        ),
        Contestant(
            "Aetheria in worker processes", "arrow", "aetheria", "aetheria", aetheria_processes, _OURS,
            "the same with readers=0 in DataLoader(batch_size=None, num_workers=workers)", workers=(1, 2),
        ),
        Contestant(
            "LitData", "litdata", "litdata", "litdata", litdata, ("litdata", *_TORCH),
            "optimize(chunk_bytes=64 MB); rows with TokensLoader; StreamingDataset(shuffle=True) in its "
            "StreamingDataLoader; collate_fn torch.stack, or bytes of each",
        ),
        Contestant(
            "MosaicML Streaming", "mds", "streaming", "mosaicml-streaming", streaming, ("streaming", *_TORCH),
            "MDSWriter(size_limit=64 MB), columns ndarray:uint16:512 or bytes; StreamingDataset(local, shuffle=True, "
            "batch_size) in its StreamingDataLoader; collate_fn with one np.stack; torchvision replaced by a stand-in",
        ),
        Contestant(
            "WebDataset", "webdataset", "webdataset", "webdataset", webdataset, ("webdataset", *_TORCH),
            "ShardWriter(maxsize=64 MB); WebDataset(shardshuffle=100).shuffle(1000).batched(batch), not decoded, in "
            "WebLoader(batch_size=None)", saves=False, ranks=False,
        ),
        Contestant(
            "StatefulDataLoader over Arrow", "arrow", "torchdata", "torchdata", stateful,
            ("torchdata.stateful_dataloader", *_TORCH),
            "a map-style dataset over our mapped Arrow files, shuffle=True", ranks=False,
        ),
        Contestant(
            "DataLoader over Arrow", "arrow", "torch", "torch", plain, _TORCH,
            "the same in torch's own DataLoader", saves=False, ranks=False,
        ),
        Contestant(
            "DataLoader over Arrow, np.stack", "arrow", "torch", "torch", stacked, _TORCH,
            "the same with collate_fn of one np.stack for rows, and of list for blobs", saves=False, ranks=False,
        ),
    )
}  # fmt: skip
