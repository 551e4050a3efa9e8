"""What a snapshot looks like on disk. No pickle: tensors, and plain containers of plain values.

step-00001200/
    model.safetensors   weights by clean names
    state.pt            optimiser, schedulers, loss scaler, callbacks, cursor
    rank-0000.pt        generators and loader state of each rank
    sharded/            of a run whose ranks hold parts of the weights: these, see `sharded`; model.safetensors is then
                        there if it was asked for
    manifest.json       what it is, and size and sha256 of every file; written last, sealed with its own sha256
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aetheria.core.shards import is_sharded, part_of, whole
from aetheria.errors import SnapshotDamagedError, SnapshotError, SnapshotVersionError

__all__ = [
    "FORMAT",
    "Manifest",
    "clean_name",
    "folder_name",
    "model_tensors",
    "plain",
    "tensor_bytes",
    "weights_digest",
]

FORMAT = 2
WHOLE_FORMAT = 1  # of snapshots whose tensors lie in one piece, which older versions can read
MODEL, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
REPLACED = ".replaced-"  # before the name of a snapshot while another one of the same step takes its place


def folder_name(step: int) -> str:
    """Returns the name of the snapshot taken at a step."""
    return f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """Returns the name of a rank's own file."""
    return f"rank-{rank:04d}.pt"


def clean_name(name: str) -> str:
    """Returns a weight's name without what wrappers put into it (`torch.compile`'s "_orig_mod.")."""
    return name.replace("_orig_mod.", "")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a snapshot says about itself.

    Attributes:
        run_id: the run that took it.
        step: optimiser steps taken before it.
        epoch: the epoch it lies in, from 0.
        created: time in UTC, ISO 8601.
        reason: why it was taken.
        metrics: the latest metrics at that moment, by which the best are kept.
        model: "name" it is registered under (or None), "class", "hyperparameters", and "unstored": the constructor
            arguments that could not be stored.
        optimizer: "class" and the number of parameters in each of its "groups".
        world_size: number of ranks.
        versions: of Python, torch, NumPy, Aetheria.
        digest: of the weights, see `weights_digest`.
        tied: weights that share the memory of another one, by name.
        pinned: True for snapshots that retention must not touch.
        files: size in bytes and sha256 of every other file.
        format: of this folder.
    """

    run_id: str
    step: int
    epoch: int
    created: str
    reason: str
    metrics: dict[str, float]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    world_size: int
    versions: dict[str, str]
    digest: str = ""
    tied: dict[str, str] = dataclasses.field(default_factory=dict)
    pinned: bool = False
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    format: int = WHOLE_FORMAT

    def encode(self) -> bytes:
        """Returns the file's content: sorted JSON whose key "seal" is the sha256 of the rest."""
        content = dataclasses.asdict(self)
        return _dump(content | {"seal": hashlib.sha256(_dump(content)).hexdigest()})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and checks a manifest.

        Raises:
            SnapshotDamagedError: it is missing, or a byte of it changed.
            SnapshotVersionError: its format is newer than this version reads.
        """
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
            content = json.loads(raw)
            seal, found_format = content.pop("seal"), content["format"]
        except FileNotFoundError:
            raise SnapshotDamagedError(f"{folder} is not a snapshot: it has no {MANIFEST}.") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise SnapshotDamagedError(f"{path} is damaged: it does not read as a manifest ({error}).") from error
        # The seal comes first, in every format there will be: a flipped bit must not pass for a newer format.
        if hashlib.sha256(_dump(content)).hexdigest() != seal or _dump(content | {"seal": seal}) != raw:
            raise SnapshotDamagedError(f"{path} is damaged: its content does not match its seal.")
        if isinstance(found_format, int) and found_format > FORMAT:
            raise SnapshotVersionError(
                f"{folder} is in snapshot format {found_format}; this version of Aetheria reads up to {FORMAT}. "
                "Upgrade Aetheria to read it."
            )
        return cls(**content)


def _dump(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass") + b"\n"  # a path need not be text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor in host memory, in the order of its elements."""
    plain_bits = tensor.detach().resolve_conj().resolve_neg()  # such views are made of other bytes than they stand for
    return plain_bits.contiguous().reshape(-1).view(torch.uint8).numpy().data


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the sha256, in hexadecimal, over the names, dtypes, shapes and bytes of weights, sorted by name.

    Of sharded weights it is that of the whole ones; every rank asks, at the same time.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = whole(tensors[name].detach()).to("cpu")
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns a model's dense weights and buffers by clean names, and whatever else its `state_dict` holds.

    The rest is extra state, which may be a tensor too, of a shape that changes, and sparse buffers.
    """
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        is_extra_state = name.rpartition(".")[2] == "_extra_state"
        dense = isinstance(value, Tensor) and value.layout is torch.strided
        (tensors if dense and not is_extra_state else extra)[clean_name(name)] = value
    return tensors, extra


def find_tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns which names are other names' memory, all of it: {"head.weight": "embedding.weight"}."""
    owners: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        # The part of a sharded tensor may be empty, and then lies nowhere; the memory that it was cut from does not.
        address = part_of(tensor).untyped_storage().data_ptr() if is_sharded(tensor) else tensor.data_ptr()
        place = (tensor.device, address, tensor.dtype, tuple(tensor.shape), tensor.stride())
        owner = owners.setdefault(place, name)
        if owner != name:
            tied[name] = owner
    return tied


def plain(value: Any, where: str) -> Any:
    """Returns a copy of a nested state in plain containers, which `torch.load(..., weights_only=True)` accepts.

    Dictionaries, lists and tuples of any kind become the plain ones (but a `Counter` stays one: schedulers hold them);
    NumPy scalars, enumerations and other subclasses of numbers and strings become what they stand for. Tensors are not
    copied.

    Args:
        value: the state.
        where: its name, for the error.

    Raises:
        SnapshotError: something in it is neither a container, a tensor nor a plain value; the message says where.
    """
    try:
        return _plain(value, where)
    except RecursionError:
        raise SnapshotError(f"{where} is nested without an end: something in it holds itself.") from None


_SCALARS: dict[type, Callable[[Any], Any]] = {
    bool: bool,
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: bytes.__bytes__,
}


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in _SCALARS or isinstance(value, torch.dtype | torch.device):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        items = {_plain_key(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
        return Counter(items) if type(value) is Counter else items
    if isinstance(value, list):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return tuple(_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(value, set | frozenset):
        return {_plain(item, where) for item in value}
    if (scalar := _plain_scalar(value)) is not None:
        return scalar
    raise SnapshotError(
        f"{where} holds a {type(value).__module__}.{type(value).__qualname__}, which a snapshot cannot store. "
        "Use numbers, strings, lists, dictionaries and tensors."
    )


def _plain_scalar(value: Any) -> Any:
    """Returns the number, string or bytes that a subclass of these, or of NumPy's, stands for; None for the rest."""
    if isinstance(value, np.generic):
        value = value.item()
    kind = next((kind for kind in _SCALARS if isinstance(value, kind)), None)
    return None if kind is None else _SCALARS[kind](value)


def _plain_key(key: Any, where: str) -> Any:
    plain_key = _plain_scalar(key)
    if plain_key is None and key is not None:
        raise SnapshotError(
            f"{where} has the key {key!r} of type {type(key).__name__}; use strings or numbers as keys."
        )
    return plain_key
