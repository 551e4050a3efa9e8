"""Several processes that share one model: each holds a part of every weight, its gradient and the optimiser's state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from aetheria.accelerator.ddp import RankedAccelerator, Steps, own_accelerator
from aetheria.accelerator.device import Precision
from aetheria.accelerator.ranks import launched_ranks
from aetheria.accelerator.tensor import cut_layers, is_cut, planned_layers, prove_alike
from aetheria.core import AetherModel
from aetheria.core.shards import whole
from aetheria.errors import ConfigError
from aetheria.registry import Registry

__all__ = ["FSDPAccelerator"]


@Registry.register_accelerator("fsdp")
class FSDPAccelerator(RankedAccelerator):
    """Weights, gradients and optimiser state cut along their first dimension; `torch.distributed.fsdp.fully_shard`.

    A group of weights is brought together for the time it is computed with: each module that is named in `wrap`, or in
    the list that the model's `shard_plan()` returns, is a group, and what is left of the model is one more.

    With `tensor_parallel`, ranks next to one another compute the same samples together: the layers that the model's
    `tensor_plan()` names are cut between them, and the parts of all weights between the groups of such ranks.

    Zhao et al., "PyTorch FSDP", arXiv:2304.11277; Rajbhandari et al., "ZeRO", arXiv:1910.02054; Shoeybi et al.,
    "Megatron-LM", arXiv:1909.08053.

    Args:
        precision: "bf16" computes and sends weights in bf16, and adds gradients up in fp32; the weights stay fp32.
        device: "cuda" exchanges with NCCL, "cpu" with gloo; "auto" takes CUDA where there is one.
        wrap: names of classes of modules, for instance "Block".
        reshard_after_forward: gives a group's weights back between forward and backward: less memory, one more
            exchange.
        cpu_offload: keeps the parts in host memory while they are not computed with.
        tensor_parallel: how many ranks compute a layer together; a divisor of the number of ranks.
        timeout: seconds that a rank waits for the others in a collective; `AETHERIA_RANK_TIMEOUT`, or 30 minutes.

    Raises:
        ConfigError: the device is not there, the ranks do not find one another, or the options do not go together.
    """

    sharded = True

    def __init__(
        self,
        precision: Precision | Literal["mixed"] = "fp32",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        wrap: Sequence[str] = (),
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        tensor_parallel: int = 1,
        timeout: float | None = None,
    ) -> None:
        own = own_accelerator(precision, device)
        if own.precision == "fp16":
            raise ConfigError(
                "precision fp16 needs a loss scale that all ranks share, which accelerator fsdp does not have. Write "
                "precision: bf16, or accelerator: ddp."
            )
        if cpu_offload and own.device.type == "cpu":
            raise ConfigError("cpu_offload: the weights are in host memory already. Leave it out, or train on CUDA.")
        if tensor_parallel < 1 or launched_ranks() % tensor_parallel:
            raise ConfigError(
                f"tensor_parallel: found {tensor_parallel}, expected a divisor of the number of ranks, which is "
                f"{launched_ranks()}. Launch a multiple of it, or change it."
            )
        super().__init__(own, timeout)
        # Here, not above: a second of imports that only those shall wait for who shard.
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy  # noqa: PLC0415

        self.team = self.ranks.team
        self._wrap = tuple(wrap)
        self.tensor_parallel = tensor_parallel
        mesh, self._tensor_mesh = self.ranks.meshes(own.device.type, tensor_parallel)
        self._alike = tensor_parallel == 1  # whether what is not cut is known to have the same gradients
        self._counting: dict[tuple[bool, ...], Tensor] = {}
        # Autocast decides in which precision each operation is computed; the policy only how weights travel.
        lower = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if own.precision == "bf16" else {}
        self._options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(**lower, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
            "reshard_after_forward": reshard_after_forward,
        }

    def setup(self, model: AetherModel) -> None:
        self.own.setup(model)
        styles = planned_layers(model, self.tensor_parallel) if self.tensor_parallel > 1 else {}
        modules = self._groups(model)
        _check_parameters(model, modules)
        for parameter in model.parameters():  # as DDP does: whoever built his model unseeded trains the first rank's
            dist.broadcast(parameter.detach(), 0, group=self.ranks.group if self.device.type == "cpu" else None)
        self.share_buffers(model)
        if styles:
            cut_layers(model, styles, self._tensor_mesh)
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

        for module in modules:
            fully_shard(module, **self._options)
        self._wrapper: Any = fully_shard(Steps(model), **self._options)
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def setup_optimizer(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def follow(self, model: AetherModel) -> None:
        self._alike = self.tensor_parallel == 1  # what was frozen has not been compared

    def _groups(self, model: AetherModel) -> list[nn.Module]:
        """Returns the modules that are groups of their own, inner ones first."""
        plan = getattr(model, "shard_plan", None)
        planned = {id(module) for module in (plan() if callable(plan) else ())}
        named = set(self._wrap)
        inside = [module for name, module in model.named_modules() if name]
        if missing := named - {type(module).__name__ for module in inside}:
            there = ", ".join(sorted({type(module).__name__ for module in inside}))
            raise ConfigError(f"wrap: no module of the model is a {', '.join(sorted(missing))}. There are: {there}.")
        if foreign := planned - {id(module) for module in inside}:
            raise ConfigError(f"shard_plan() of the model returns {len(foreign)} modules that are not inside it.")
        # `named_modules` gives parents before their children.
        return [module for module in inside if id(module) in planned or type(module).__name__ in named][::-1]

    def step_function(self, model: AetherModel, name: str) -> Callable[[Any], dict[str, Tensor]]:
        def step(batch: Any) -> dict[str, Tensor]:
            outputs: dict[str, Tensor] = self._wrapper(name, batch)
            if not torch.is_grad_enabled():
                self._wrapper.reshard()  # no backward pass will: and only parts are what everything else expects
            if self.tensor_parallel > 1 and isinstance(outputs, dict):
                return {name: whole(value) for name, value in outputs.items()}  # a plan may leave them cut
            return outputs

        return step

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self._wrapper.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._wrapper.set_requires_gradient_sync(True)

    # --- gradients: this rank's parts ------------------------------------------------------------------------------
    def _trained(self) -> list[nn.Parameter]:
        """Returns the parameters whose gradients a window has, in their order."""
        groups = self._optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"] if parameter.grad is not None]

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        if self.tensor_parallel == 1:
            squared = torch.nn.utils.get_total_norm(gradients).square()
        else:
            squares = torch.stack(list(torch._foreach_norm(gradients))).square()
            if self.rank % self.tensor_parallel:  # what each of them has whole counts once
                cut = tuple(is_cut(parameter) for parameter in self._trained())
                if cut not in self._counting:
                    self._counting = {cut: torch.tensor(cut, dtype=squares.dtype, device=squares.device)}
                squares = squares * self._counting[cut]  # a NaN stays one
            squared = squares.sum()
        return self.reduce_metric(squared).sqrt_()

    def check_finite(self, gradients: list[Tensor], norm: Tensor | None = None) -> Tensor:
        if not self._alike:
            trained = zip(self._trained(), gradients, strict=True)
            uncut = {self._names[id(parameter)]: gradient for parameter, gradient in trained if not is_cut(parameter)}
            self._alike = prove_alike(uncut, self._tensor_mesh, lambda told: self.reduce_metric(told, "max"))
        found = self.own.check_finite(gradients, norm)
        # A norm is that of all parts. Otherwise one rank may have met what the others have not.
        return found if norm is not None else self.reduce_metric(found, "max")

    # --- tensors ---------------------------------------------------------------------------------------------------
    def new_shard(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        from torch.distributed.tensor import Shard, empty  # noqa: PLC0415

        return empty(*shape, dtype=dtype, device_mesh=self._options["mesh"], placements=[Shard(0)])

    def state_dict(self) -> dict[str, Any]:
        arranged = {"tensor_parallel": self.tensor_parallel} if self.tensor_parallel > 1 else {}
        return self.own.state_dict() | arranged

    def cleanup(self) -> None:
        self.__dict__.pop("_wrapper", None)
        super().cleanup()


def _check_parameters(model: AetherModel, modules: Sequence[nn.Module]) -> None:
    """Raises a ConfigError for what cannot be cut."""
    parameters = dict(model.named_parameters())
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("no parameter of the model requires a gradient: there is nothing that ranks could share.")
    if scalars := [name for name, parameter in parameters.items() if not parameter.ndim]:
        raise ConfigError(
            f"accelerator fsdp cuts parameters along their first dimension, and {scalars[0]} has none. Give it the "
            "shape [1], or write accelerator: ddp."
        )
    group_of: dict[int, tuple[int, str]] = {}
    owners = {id(inner): index for index, module in reversed(list(enumerate(modules))) for inner in module.modules()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        group = owners.get(id(model.get_submodule(name.rpartition(".")[0])), -1)
        first, known = group_of.setdefault(id(parameter), (group, name))
        if first != group:
            raise ConfigError(
                f"{known} and {name} are one parameter, and lie in two groups of modules: accelerator fsdp brings "
                "groups together one by one. Leave the modules that share it out of wrap (or shard_plan), or write "
                "accelerator: ddp."
            )
