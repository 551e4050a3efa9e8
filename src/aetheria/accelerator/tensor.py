"""Layers that ranks next to one another compute together, as the model's plan says: tensor parallel."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aetheria.core import AetherModel
from aetheria.core.shards import is_sharded
from aetheria.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

__all__ = ["cut_layers", "is_cut", "planned_layers", "prove_alike"]

_EXPECTED = "a dictionary of names of modules (or patterns of them) and styles of torch.distributed.tensor.parallel"
_ALIKE = 1e-3  # by how much of itself a norm may differ between ranks that have computed the same
_NOTHING = 1e-6  # of the largest norm there is: what is smaller is rounding, and proves nothing


def planned_layers(model: AetherModel, ranks: int) -> dict[str, ParallelStyle]:
    """Returns how each module that the model's `tensor_plan` is about is to be cut, by its name.

    Args:
        model: asked for `tensor_plan(ranks)`.
        ranks: that compute together.

    Raises:
        ConfigError: there is no plan, or it is about something else than this model's modules. What the plan itself
            raises passes through.
    """
    from torch.distributed.tensor.parallel import ParallelStyle  # noqa: PLC0415 - a second of imports

    plan = getattr(model, "tensor_plan", None)
    if not callable(plan):
        raise ConfigError(
            f"tensor_parallel: {ranks} needs a plan, and {type(model).__name__} has no method tensor_plan(ranks). Let "
            f"it return {_EXPECTED}, or leave tensor_parallel out."
        )
    said = plan(ranks)
    if not isinstance(said, Mapping) or not said:
        found = "nothing" if not said else f"a {type(said).__name__}"
        raise ConfigError(f"tensor_plan({ranks}) of {type(model).__name__} returned {found}; expected {_EXPECTED}.")
    names = [name for name, _ in model.named_modules() if name]
    styles: dict[str, ParallelStyle] = {}
    about: dict[str, str] = {}
    for pattern, style in said.items():
        if not isinstance(style, ParallelStyle):
            raise ConfigError(f"tensor_plan: found {style!r} for '{pattern}', expected a style, as ColwiseParallel().")
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ConfigError(
                f"tensor_plan: '{pattern}' is the name of no module. There are, for instance: {', '.join(names[:5])}."
            )
        for name in matching:
            if name in about:
                raise ConfigError(
                    f"tensor_plan: '{about[name]}' and '{pattern}' are both about {name}. Let one of them name it."
                )
            about[name], styles[name] = pattern, style
    return styles


def cut_layers(model: AetherModel, styles: Mapping[str, ParallelStyle], mesh: Any) -> None:
    """Cuts modules as a plan says. Every rank has the whole model, and all the same.

    Args:
        model: is changed: what is cut becomes a `DTensor`.
        styles: by names of modules, as `planned_layers` returns them.
        mesh: of one dimension, the ranks that compute together.

    Raises:
        ConfigError: a style does not fit its module; the ranks would have parts of different sizes; one parameter has
            two names, and would become two; or nothing at all is cut.
    """
    from torch.distributed.tensor.parallel import parallelize_module  # noqa: PLC0415

    # Whoever brings such a weight together is told, on every rank, that it takes two exchanges. It does; it is rare.
    logging.getLogger("torch.distributed.tensor._redistribute").addFilter(_says_something_else)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    shared = _shared_parameters(model)
    for name, style in styles.items():
        module = model.get_submodule(name)
        try:
            parallelize_module(module, mesh, style, src_data_rank=None)
        except NotImplementedError as error:
            raise ConfigError(
                f"tensor_plan: {type(style).__name__} does not fit {name}, a {type(module).__name__}: {error}"
            ) from error
    for name, parameter in model.named_parameters():
        # Not every style keeps this; and a parameter with a second name may have lost the first.
        parameter.requires_grad_(trained.get(name, parameter.requires_grad))
    for places in shared:
        if len({id(getattr(module, key)) for module, key, _ in places}) > 1:
            raise ConfigError(
                f"{' and '.join(name for *_, name in places)} are one parameter, and tensor_plan would make two of it. "
                "Leave the modules that share it out of the plan: all ranks then have it whole."
            )
    _check_parts(model, mesh.size())


def _says_something_else(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("While redistributing from")


def _shared_parameters(model: nn.Module) -> list[list[tuple[nn.Module, str, str]]]:
    """Returns, for each parameter in several places, the modules, its names there, and its names in the model."""
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, key, f"{prefix}.{key}" if prefix else key))
    return [found for found in places.values() if len(found) > 1]


def _check_parts(model: nn.Module, ranks: int) -> None:
    cut = False
    for name, parameter in model.named_parameters():
        held: Any = parameter
        for placement in held.placements if is_sharded(held) else ():
            if placement.is_replicate():
                continue
            cut = True
            if parameter.shape[placement.dim] % ranks:
                raise ConfigError(
                    f"{name} has the shape {list(parameter.shape)}, and tensor_plan cuts its dimension "
                    f"{placement.dim} for {ranks} ranks: {parameter.shape[placement.dim]} is no multiple of {ranks}. "
                    "Ranks with parts of different sizes would draw different numbers of random values. Change the "
                    "size, tensor_parallel, or the plan."
                )
    if not cut:
        raise ConfigError(
            "tensor_plan cuts no parameter: every rank would compute all of the model. Let it name what shall be cut, "
            "or leave tensor_parallel out."
        )


def is_cut(parameter: Any) -> bool:
    """Returns whether ranks that compute together have different parts of this, rather than all of it."""
    if not is_sharded(parameter) or parameter.device_mesh.ndim == 1:
        return False
    return not parameter.placements[-1].is_replicate()


def prove_alike(gradients: Mapping[str, Tensor], mesh: Any, largest: Callable[[Tensor], Tensor]) -> bool:
    """Looks whether ranks that compute together have the same gradients of what they all have whole.

    They have not where a plan forgets something: a weight that acts on what is cut, as the norm of one head's queries,
    has on each rank the gradient of that rank's heads. Nothing else would tell; the ranks would drift apart.

    Args:
        gradients: of what is not cut, by name; each rank's own parts.
        mesh: of one dimension, the ranks that compute together.
        largest: returns the maximum of a tensor over all ranks.

    Returns:
        Whether that is known now. It is not if a gradient is not finite.

    Raises:
        ConfigError: they have not; on all ranks.
    """
    if not gradients:
        return True
    norms = torch.stack(list(torch._foreach_norm(list(gradients.values())))).double()
    unknown = torch.isfinite(norms).all().logical_not().double().reshape(1)
    both = torch.cat([norms, -norms]).nan_to_num_(posinf=0.0, neginf=0.0)
    dist.all_reduce(both, dist.ReduceOp.MAX, group=mesh.get_group())
    high, low = both[: len(norms)], -both[len(norms) :]
    apart = (high - low) / (high + _NOTHING * high.max()).clamp_min(torch.finfo(high.dtype).tiny)
    *found, not_known = largest(torch.cat([apart, unknown])).tolist()
    if not_known:
        return False
    if different := [name for name, by in zip(gradients, found, strict=True) if by > _ALIKE]:
        raise ConfigError(
            f"tensor_plan leaves {different[0]} whole, but the ranks that compute together find different gradients of "
            "it: it acts on what is cut between them. Cut it, too, or give its module a style that adds its gradient "
            "up, as SequenceParallel does."
        )
    return True
