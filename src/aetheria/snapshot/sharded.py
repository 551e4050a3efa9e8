"""Snapshots of sharded weights: every rank writes its parts, through `torch.distributed.checkpoint`, as safetensors.

step-00001200/
    sharded/weights/    the model's tensors by clean names: one file for each rank
    sharded/state/      what is sharded of the rest (the optimiser's state); `state.pt` says what stood where

Its own format keeps what lies where in a pickle, and nothing here is ever read from one; the headers of safetensors say
the same. Any number of ranks reads them again, also one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save

from aetheria.core.shards import is_sharded
from aetheria.errors import SnapshotError
from aetheria.runs import fsync_directory
from aetheria.snapshot.format import tensor_bytes

__all__ = [
    "MARK",
    "STATE_TENSORS",
    "WEIGHTS",
    "Place",
    "ShardFiles",
    "Team",
    "WithAliases",
    "put_back",
    "taken_out",
    "write_shards",
    "write_whole",
]

WEIGHTS, STATE_TENSORS = "sharded/weights", "sharded/state"
MARK = "sharded tensor"  # the key of a dictionary that stands in the place of one
_AT_ONCE = 256 << 20  # bytes of tensors that are read together
_DTYPES = {  # as safetensors calls them
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}

Place = Callable[[str, torch.Size, torch.dtype], Tensor]
"""`place(name, shape, dtype)` returns the memory that a tensor is read into: all of it, or this rank's part."""


class Team(Protocol):
    """The ranks that write a snapshot together, on threads of theirs.

    Attributes:
        rank: of this one.
        group: their process group, on which nobody else talks.
    """

    rank: int
    group: Any

    def gather(self, data: bytes) -> list[bytes]:
        """Returns what every rank gives, by rank."""
        ...


def taken_out(state: Any, key: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Returns a nested state with marks in the place of its sharded tensors, and these by the keys in the marks."""
    found: dict[str, Tensor] = {}

    def visit(value: Any, key: str) -> Any:
        if is_sharded(value):
            found[key] = value
            return {MARK: key}
        if isinstance(value, dict):
            return type(value)({name: visit(item, f"{key}/{name}") for name, item in value.items()})
        if isinstance(value, list | tuple):
            return type(value)(visit(item, f"{key}/{index}") for index, item in enumerate(value))
        return value

    return visit(state, key), found


def put_back(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Returns a state with the tensors in the place of their marks."""
    if isinstance(state, dict):
        if state.keys() == {MARK}:
            return tensors[state[MARK]]
        return type(state)({name: put_back(item, tensors) for name, item in state.items()})
    if isinstance(state, list | tuple):
        return type(state)(put_back(item, tensors) for item in state)
    return state


def write_shards(
    team: Team, temporary: Path, weights: dict[str, Tensor], state: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Writes this rank's parts into a folder that is to become a snapshot. Every rank calls it, at the same time.

    Args:
        team: all ranks.
        temporary: the folder, made anew.
        weights: the model's tensors by clean names.
        state: other sharded tensors.

    Returns:
        Size and sha256 of what all ranks have written, by name, as a manifest holds them.

    Raises:
        SnapshotError: a rank could not write its parts; every rank is told.
    """
    folders = {temporary / WEIGHTS: weights, temporary / STATE_TENSORS: state}

    def prepare() -> dict[str, Any]:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in folders:
            folder.mkdir(parents=True)
        return {}

    _everywhere(team, prepare if team.rank == 0 else dict)
    for folder, tensors in folders.items():
        if tensors:
            _save(team, folder, tensors)

    def own_files() -> dict[str, Any]:
        found = {}
        for folder in folders:
            for path in folder.glob(f"shard-{team.rank + 1:05d}-*.safetensors"):
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                found[str(path.relative_to(temporary))] = {"bytes": path.stat().st_size, "sha256": digest}
            fsync_directory(folder)
        for parent in {folder.parent for folder in folders}:  # the folder that they lie in is itself new
            fsync_directory(parent)
        return found

    files: dict[str, dict[str, Any]] = {}
    for part in _everywhere(team, own_files):
        files |= part
    return files


def _save(team: Team, folder: Path, tensors: dict[str, Tensor]) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(tensors, storage_writer=writer, planner=DefaultSavePlanner(), process_group=team.group)
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise SnapshotError(f"rank {rank} could not write its part: {type(reason).__name__}: {reason}") from error


def _everywhere(team: Team, function: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what a function returns on each rank; where one raises, every rank does."""
    failure: Exception | None = None
    said: dict[str, Any] = {}
    try:
        said["returned"] = function()
    except (OSError, SnapshotError) as error:
        failure, said["failed"] = error, f"{type(error).__name__}: {error}"
    parts = [json.loads(part) for part in team.gather(json.dumps(said).encode())]
    if failure is not None:
        raise failure
    for rank, part in enumerate(parts):
        if "failed" in part:
            raise SnapshotError(f"rank {rank} could not write its part: {part['failed']}")
    return [part["returned"] for part in parts]


@dataclass(frozen=True)
class _Described:
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class ShardFiles(Mapping[str, Tensor]):
    """The tensors in a folder of safetensors, sharded or not, in host memory.

    Looked up one after the other in the order of their names they are read a few at a time: never all of a model.

    Args:
        folder: with the files.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = HuggingFaceStorageReader(str(folder))
        self._held: dict[str, Tensor] = {}

    @cached_property
    def _metadata(self) -> Any:
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        return metadata

    @cached_property
    def described(self) -> dict[str, _Described]:
        """Shape and dtype of each, sorted by name."""
        found = self._metadata.state_dict_metadata
        return {name: _Described(found[name].size, found[name].properties.dtype) for name in sorted(found)}

    def read(self, place: Place | None = None) -> dict[str, Tensor]:
        """Returns all of them, each in the memory that `place` returns for it."""
        into = _whole if place is None else place
        return self._filled({name: into(name, about.shape, about.dtype) for name, about in self.described.items()})

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._held:
            names = list(self.described)
            wanted = [name]
            for following in names[names.index(name) + 1 :]:
                if sum(self.described[each].bytes for each in (*wanted, following)) > _AT_ONCE:
                    break
                wanted.append(following)
            self._held = {}  # before the next ones are there
            self._held = self._filled({each: _whole(each, *self._shape(each)) for each in wanted})
        return self._held[name]

    def _shape(self, name: str) -> tuple[torch.Size, torch.dtype]:
        return self.described[name].shape, self.described[name].dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)

    def _filled(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # What `torch.distributed.checkpoint.load` does for one process, without its warning that it is one.
        planner = DefaultLoadPlanner()
        planner.set_up_planner(dict(tensors), self._metadata, is_coordinator=True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        self._reader.read_data(planner.finish_plan(plan), planner).wait()
        return tensors


def _whole(_name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


class WithAliases(Mapping[str, Tensor]):
    """Tensors, and those of them that have a second name."""

    def __init__(self, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._aliases = aliases

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._aliases.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(self._tensors, self._aliases)

    def __len__(self) -> int:
        return len(self._tensors) + len(self._aliases)


def write_whole(path: Path, tensors: ShardFiles) -> dict[str, Any]:
    """Writes tensors into one file of safetensors, a few of them in memory at a time.

    The format: eight bytes with the length of the header, the header as JSON, the bytes of the tensors.
    https://huggingface.co/docs/safetensors/index

    Args:
        path: of the file.
        tensors: to be written.

    Returns:
        Its size and sha256.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, about in tensors.described.items():
        offsets = [position, position + about.bytes]
        header[name] = {"dtype": _DTYPES[about.dtype], "shape": list(about.shape), "data_offsets": offsets}
        position = offsets[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        contents = (tensor_bytes(tensor) for tensor in tensors.values() if tensor.numel())
        content: Any
        for content in itertools.chain((struct.pack("<Q", len(encoded)), encoded), contents):
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}
