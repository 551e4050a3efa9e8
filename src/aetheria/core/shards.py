"""Tensors of which every rank holds a part: `torch.distributed.tensor.DTensor`.

A part is a block of the whole: a range of rows where ranks share a model; of columns, too, where they share layers.

The type is not named here: to import it takes as long as all of this package, and who has one has imported it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["add_up_over", "as_part_of", "cut_like", "is_sharded", "offsets_of", "part_of", "total_norm", "whole"]


def is_sharded(tensor: Any) -> bool:
    """Returns whether this is a tensor of which every rank holds a part."""
    return hasattr(tensor, "to_local")


def part_of(tensor: Tensor) -> Tensor:
    """Returns what this rank holds of a tensor, sharing its memory; of an ordinary one, all of it."""
    return cast("Tensor", tensor.to_local()) if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor. Of a sharded one every rank must ask, at the same time."""
    return cast("Tensor", tensor.full_tensor()) if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def as_part_of(model: Any, part: Tensor, mesh: Any = None) -> Tensor:
    """Returns this rank's part of a tensor that is cut as another one is.

    Args:
        model: a sharded tensor.
        part: of the shape of this rank's part of it.
        mesh: the same ranks on another device; those of `model` by default.
    """
    layout = {"shape": model.shape, "stride": model.stride(), "run_check": False}
    found = type(model).from_local(part, model.device_mesh if mesh is None else mesh, model.placements, **layout)
    return cast("Tensor", found)


def cut_like(tensor: Tensor, model: Tensor) -> Tensor:
    """Returns a tensor as another one is held: where that is sharded, its part of it.

    Args:
        tensor: a whole one, which every rank has; or a sharded one, which is brought together if it is cut otherwise.
            Then every rank must ask, at the same time.
        model: of the same shape.
    """
    if not is_sharded(model):
        return tensor
    held: Any = model
    if is_sharded(tensor):
        given: Any = tensor
        if (given.device_mesh, given.placements) == (held.device_mesh, held.placements):
            return tensor
        tensor = whole(tensor.detach())
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - loaded where there is such a model

    return distribute_tensor(tensor.to(model.device), held.device_mesh, held.placements, src_data_rank=None)


def offsets_of(tensor: Any) -> tuple[int, ...]:
    """Returns where this rank's part begins in the whole, in each dimension."""
    if not is_sharded(tensor) or not tensor.to_local().numel():
        return (0,) * int(tensor.ndim)
    (block,) = tensor.__create_chunk_list__()
    return tuple(block.offsets)


def add_up_over(tensors: Sequence[Any], values: Tensor) -> Tensor:
    """Returns values, one for each tensor, added up over the ranks that hold its parts.

    What several ranks hold alike is not added up: each of them has its own value, which is that of the others unless
    something is wrong.

    Args:
        tensors: some of them sharded; all ranks have the same.
        values: of this rank's parts.
    """
    shared: dict[Any, list[bool]] = {}
    for index, tensor in enumerate(tensors):
        for dimension, placement in enumerate(tensor.placements if is_sharded(tensor) else ()):
            if not placement.is_replicate():
                group = tensor.device_mesh.get_group(dimension)
                shared.setdefault(group, [False] * len(tensors))[index] = True
    for group, concerned in shared.items():
        chosen = torch.tensor(concerned, device=values.device)
        added = torch.where(chosen, values, torch.zeros_like(values))
        dist.all_reduce(added, group=group)
        values = torch.where(chosen, added, values)
    return values


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the 2-norm of tensors together, a scalar. Where some are sharded every rank must ask at the same time."""
    if not any(map(is_sharded, tensors)):
        return torch.nn.utils.get_total_norm(tensors)
    squares = torch.stack(list(torch._foreach_norm([part_of(tensor) for tensor in tensors]))).square()
    return add_up_over(tensors, squares).sum().sqrt()
