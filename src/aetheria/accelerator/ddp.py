"""Several processes, each with a whole model: gradients are averaged while they are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from aetheria.accelerator.cpu import CPUAccelerator
from aetheria.accelerator.cuda import GPUAccelerator
from aetheria.accelerator.device import DeviceAccelerator, Precision
from aetheria.accelerator.ranks import Ranks
from aetheria.core import Accelerator, AetherModel, LateAnswer, MicroBatch, Reading
from aetheria.errors import ConfigError
from aetheria.registry import Registry

__all__ = ["DDPAccelerator", "RankedAccelerator", "Steps", "own_accelerator"]


class RankedAccelerator(Accelerator):
    """One of several processes. What concerns its own device, it leaves to the accelerator of that.

    Args:
        own: of this rank's device.
        timeout: seconds that a rank waits for the others in a collective.
    """

    def __init__(self, own: DeviceAccelerator, timeout: float | None = None) -> None:
        self.own = own
        self.ranks: Ranks = Ranks.join("gloo" if own.device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout)
        where = self.ranks.where
        self.rank, self.local_rank, self.world_size = where.rank, where.local_rank, where.world_size
        self.node_rank = where.node_rank

    # --- its own device --------------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        return self.own.device

    def process_batch(self, batch: Any) -> Any:
        return self.own.process_batch(batch)

    def prepare_dataloader(self, batches: Iterator[MicroBatch], ahead: int = 1) -> Iterator[MicroBatch]:
        return self.own.prepare_dataloader(batches, ahead)

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.own.forward_context()

    def backward(self, loss: Tensor) -> None:
        self.own.backward(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        self.own.unscale(optimizer)

    def check_finite(self, gradients: list[Tensor], norm: Tensor | None = None) -> Tensor:
        return self.own.check_finite(gradients, norm)

    def clip_grad_norm(self, gradients: list[Tensor], max_norm: float, norm: Tensor) -> None:
        self.own.clip_grad_norm(gradients, max_norm, norm)

    def step(self, optimizer: Optimizer, nonfinite: Tensor) -> bool | LateAnswer:
        return self.own.step(optimizer, nonfinite)

    def overflow_expected(self) -> bool:
        return self.own.overflow_expected()

    def read(self, tensor: Tensor) -> Reading:
        return self.own.read(tensor)

    def send(self, tensor: Tensor) -> Tensor:
        return self.own.send(tensor)

    def synchronize(self) -> None:
        self.own.synchronize()

    def memory_in_use(self) -> int | None:
        return self.own.memory_in_use()

    def state_dict(self) -> dict[str, Any]:
        return self.own.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.own.load_state_dict(state)

    def generator_state(self) -> Tensor | None:
        return self.own.generator_state()

    def seed_generator(self, key: int) -> None:
        self.own.seed_generator(key)

    def set_generator_state(self, state: Tensor) -> None:
        self.own.set_generator_state(state)

    # --- the others ------------------------------------------------------------------------------------------------
    def reduce_metric(self, value: Tensor, operation: Literal["sum", "max"] = "sum") -> Tensor:
        reduced = value.clone()
        group = self.ranks.group if value.device.type == "cpu" else None
        dist.all_reduce(reduced, dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM, group=group)
        return reduced

    def sum_later(self, tensor: Tensor) -> Callable[[], Tensor]:
        if tensor.device.type == "cpu":
            return self.ranks.sum_later(tensor)
        work = dist.all_reduce(tensor, async_op=True)

        def arrived() -> Tensor:
            if work is not None:
                work.wait()  # on the device's stream; the host goes on
            return tensor

        return arrived

    def barrier(self) -> None:
        self.ranks.barrier()

    def main_says(self, function: Callable[[], bytes]) -> bytes:
        return self.ranks.main_says(function)

    def gather(self, data: bytes) -> list[bytes]:
        return self.ranks.gather(data)

    def once_per_node(self, function: Callable[[], object]) -> None:
        self.ranks.once_per_node(function)

    def explain(self, error: BaseException) -> BaseException:
        return self.ranks.explain(error)

    def share_buffers(self, model: AetherModel) -> None:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0, group=self.ranks.group if buffer.device.type == "cpu" else None)

    def cleanup(self) -> None:
        self.ranks.leave()
        self.own.cleanup()


_TOUCH = ""  # in place of a method's name: a loss of zero that every parameter is part of


class Steps(nn.Module):
    """Makes a forward pass of whatever method of the model is called: only a forward pass exchanges gradients."""

    def __init__(self, model: AetherModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, name: str, batch: Any) -> dict[str, Tensor]:
        if name == _TOUCH:
            sparse = {id(module.weight) for module in self.model.modules() if getattr(module, "sparse", False)}
            touched = [
                _row_of(parameter).mul(0).sum() if id(parameter) in sparse else parameter.mul(0).sum()
                for parameter in self.model.parameters()
                if parameter.requires_grad
            ]
            return {"loss": torch.stack([part.float() for part in touched]).sum()}
        outputs: dict[str, Tensor] = getattr(self.model, name)(batch)
        return outputs


def _row_of(table: Tensor) -> Tensor:
    """Returns a row whose gradient is sparse, as an embedding's that was made to have sparse ones."""
    return nn.functional.embedding(torch.zeros(1, dtype=torch.long, device=table.device), table, sparse=True)


def own_accelerator(
    precision: Precision | Literal["mixed"], device: Literal["auto", "cpu", "cuda"]
) -> DeviceAccelerator:
    """Returns the accelerator of this rank's own device.

    Raises:
        ConfigError: there is no such device, or not the precision on it.
    """
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return GPUAccelerator(precision)
    return CPUAccelerator(precision)


@Registry.register_accelerator("ddp")
class DDPAccelerator(RankedAccelerator):
    """A whole model on every rank; `torch.nn.parallel.DistributedDataParallel` averages the gradients.

    Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020.

    Args:
        precision: as for a single device.
        device: "cuda" exchanges gradients with NCCL, "cpu" with gloo; "auto" takes CUDA where there is one.
        find_unused_parameters: for models of which a step does not use every parameter; costs a walk each step.
        static_graph: every step uses the same parameters, in the same order.
        compress: what gradients are exchanged as: "fp16", "bf16", or of low rank, "powersgd" (Vogels et al.,
            arXiv:1905.13727); None sends them as they are.
        bucket_megabytes: gradients are exchanged in portions of this size.
        timeout: seconds that a rank waits for the others in a collective; `AETHERIA_RANK_TIMEOUT`, or 30 minutes.

    Raises:
        ConfigError: the device is not there, or the ranks do not find one another.
    """

    def __init__(
        self,
        precision: Precision | Literal["mixed"] = "fp32",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        compress: Literal["fp16", "bf16", "powersgd"] | None = None,
        bucket_megabytes: float = 25.0,
        timeout: float | None = None,
    ) -> None:
        super().__init__(own_accelerator(precision, device), timeout)
        if compress == "bf16" and self.device.type == "cpu":
            raise ConfigError("compress: bf16 is not among what gloo adds up on a CPU. Write compress: fp16, or none.")
        self._compress = compress
        self._options: dict[str, Any] = {
            "find_unused_parameters": find_unused_parameters,
            "static_graph": static_graph,
            "bucket_cap_mb": bucket_megabytes,
            "gradient_as_bucket_view": True,  # else every gradient is copied, and held twice
        }

    def setup(self, model: AetherModel) -> None:
        self.own.setup(model)
        self.follow(model)

    def follow(self, model: AetherModel) -> None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("no parameter of the model requires a gradient: there is nothing that ranks could share.")
        self._wrapper = DistributedDataParallel(Steps(model), **self._options)
        if self._compress == "powersgd":
            state = powerSGD_hook.PowerSGDState(None)
            self._wrapper.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif self._compress is not None:
            hook = default_hooks.fp16_compress_hook if self._compress == "fp16" else default_hooks.bf16_compress_hook
            self._wrapper.register_comm_hook(None, hook)
        self._settle_buckets(model)

    def _settle_buckets(self, model: AetherModel) -> None:
        """Has the gradients arranged for good, by a step that changes nothing.

        After the first step DDP arranges its buckets anew, in the order in which gradients arrived. Where three ranks
        or more add up, the place in a bucket decides who is added to whom first, and so the last bit: a run that is
        continued would differ from one that was not interrupted.
        """
        self._wrapper(_TOUCH, None)["loss"].backward()
        for parameter in model.parameters():
            parameter.grad = None

    def step_function(self, model: AetherModel, name: str) -> Callable[[Any], dict[str, Tensor]]:
        if name != "training_step":
            return super().step_function(model, name)  # without gradients there is nothing to exchange

        def step(batch: Any) -> dict[str, Tensor]:
            outputs: dict[str, Tensor] = self._wrapper(name, batch)
            return outputs

        return step

    def cleanup(self) -> None:
        self.__dict__.pop("_wrapper", None)  # which holds on to the process group
        super().cleanup()

    def no_sync(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._wrapper.no_sync()
        return context
