"""Several processes that train apart, and bring together now and then what they have changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import SGD, Optimizer

from aetheria.accelerator.ddp import RankedAccelerator, own_accelerator
from aetheria.accelerator.device import Precision
from aetheria.core import AetherModel, LateAnswer
from aetheria.errors import ConfigError, NonFiniteError
from aetheria.registry import Registry

__all__ = ["LocalSGDAccelerator"]

_PORTION = 64 << 20  # bytes that are exchanged at once: what is flattened for it is needed once more


@Registry.register_accelerator("local_sgd")
class LocalSGDAccelerator(RankedAccelerator):
    """A whole model on every rank, which takes its own steps with its own optimiser.

    After every `sync_every` windows the ranks add up how far each has come from the weights that they began with
    together. The mean of it is the gradient of an outer optimiser, SGD with Nesterov momentum, which moves those shared
    weights; everybody goes on from there. That is DiLoCo: Douillard et al., arXiv:2311.08105. With
    `outer_learning_rate` 1 and `outer_momentum` 0 it is Local SGD, the mean of the weights: Stich, arXiv:1805.09767.

    Validations, snapshots and digests are of the shared weights.

    Args:
        sync_every: windows from one exchange to the next; a knob.
        outer_learning_rate: of the outer optimiser.
        outer_momentum: of the outer optimiser, from 0 to less than 1.
        precision: as for a single device.
        device: "cuda" exchanges with NCCL, "cpu" with gloo; "auto" takes CUDA where there is one.
        timeout: seconds that a rank waits for the others in a collective; `AETHERIA_RANK_TIMEOUT`, or 30 minutes.

    Raises:
        ConfigError: an option is out of its bounds, the device is not there, or the ranks do not find one another.
    """

    sync_every: int

    def __init__(
        self,
        sync_every: int = 50,
        outer_learning_rate: float = 0.7,
        outer_momentum: float = 0.9,
        precision: Precision | Literal["mixed"] = "fp32",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        timeout: float | None = None,
    ) -> None:
        _check(sync_every, outer_learning_rate, outer_momentum)
        super().__init__(own_accelerator(precision, device), timeout)
        self.sync_every = sync_every
        self._options: dict[str, Any] = {
            "lr": outer_learning_rate,
            "momentum": outer_momentum,
            "nesterov": outer_momentum > 0,
        }
        self._windows = 0  # since the last exchange
        self._dropped = torch.zeros((), dtype=torch.int64, device=self.device)  # of those
        self._remarks: list[str] = []

    # --- the model -------------------------------------------------------------------------------------------------
    def setup(self, model: AetherModel) -> None:
        if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
            raise ConfigError(
                f"{lazy[0]} has no shape yet, and ranks that train apart must begin with the same weights. Run one "
                "batch through the model before it is trained, or give the layer its sizes."
            )
        self.own.setup(model)
        self._model = model
        for parameter in model.parameters():  # as DDP does: whoever built the model unseeded trains the first rank's
            dist.broadcast(parameter.detach(), 0, group=self._group)
        self._share_bytes_of(list(model.buffers()))
        self.follow(model)
        self._begin_with_own_weights()

    @property
    def _group(self) -> Any:
        return self.ranks.group if self.device.type == "cpu" else None

    def _begin_with_own_weights(self) -> None:
        """Takes the model as it is, on all ranks alike, for what they have in common."""
        model = self._model
        self._shared = {name: nn.Parameter(value.detach().clone(), False) for name, value in model.named_parameters()}
        self._shared_buffers = {name: value.detach().clone() for name, value in model.named_buffers()}
        self._outer = SGD(self._shared.values(), **self._options)
        self._windows = 0
        self._dropped.zero_()

    def setup_optimizer(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def follow(self, model: AetherModel) -> None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not trained:
            raise ConfigError("no parameter of the model requires a gradient: there is nothing that ranks could share.")
        self.come_together()  # what was trained until now, and may not be from here on
        self._portions = list(_portions(trained))

    def share_buffers(self, model: AetherModel) -> None:
        """Does nothing: what ranks have in common is in `shared_weights`."""

    # --- the window ------------------------------------------------------------------------------------------------
    def step(self, optimizer: Optimizer, nonfinite: Tensor) -> bool | LateAnswer:
        taken = self.own.step(optimizer, nonfinite)
        if taken is not True:  # or not known yet
            self._dropped += nonfinite > 0
            optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask, and count this step like the others
        return taken

    def end_window(self) -> bool:
        self._windows += 1
        if self._windows < self.sync_every:
            return False
        self.come_together()
        return True

    # --- the exchange ----------------------------------------------------------------------------------------------
    def come_together(self) -> None:
        if not self._windows:
            return
        own = dict(self._model.named_parameters())
        with torch.no_grad():
            moved = [
                torch.cat([(self._shared[name] - own[name]).reshape(-1) for name in names]) for names in self._portions
            ]
            self._compare(moved)
            arriving = [self.sum_later(part) for part in moved]
            means: dict[str, Tensor] = {}
            for names, arrived in zip(self._portions, arriving, strict=True):
                parts = torch.split(arrived().div_(self.world_size), [own[name].numel() for name in names])
                means |= {name: part.view_as(own[name]) for name, part in zip(names, parts, strict=True)}
            self._move(means)
            self._share_bytes_of([buffer for _, buffer in self._model.named_buffers()])
            for name, buffer in self._model.named_buffers():
                self._shared_buffers[name] = buffer.detach().clone()
        self._windows = 0

    def _compare(self, moved: list[Tensor]) -> None:
        """Tells one another, before anything is added up, how the ranks have fared since the last exchange.

        Raises:
            NonFiniteError: the weights of a rank are not finite; it raises on all of them.
        """
        told = torch.zeros(2, self.world_size, dtype=torch.float64, device=self.device)
        told[0, self.rank] = self._dropped
        told[1, self.rank] = self.own.check_finite(moved)
        dropped, broken = self.sum_later(told)().tolist()
        self._dropped.zero_()
        if lost := [rank for rank, found in enumerate(broken) if found]:
            raise NonFiniteError(
                f"the weights of rank {', '.join(map(str, lost))} are NaN or infinite, after {self._windows} windows "
                "by itself; the shared weights are not touched. Continue the run from its newest snapshot, with a "
                "lower learning rate, max_grad_norm, or a smaller sync_every."
            )
        for rank, count in enumerate(dropped):
            if count and rank != self.rank:  # what happened here is known here
                self._remarks.append(
                    f"NaN or infinite gradients on rank {rank}: it dropped {count:.0f} of its last {self._windows} "
                    "windows; the other ranks went on"
                )

    def _move(self, means: Mapping[str, Tensor]) -> None:
        """Takes a step of the outer optimiser, and goes on from where it leads to."""
        for name, mean in means.items():
            self._shared[name].grad = mean
        self._outer.step()
        self._outer.zero_grad()
        own = dict(self._model.named_parameters())
        with torch.no_grad():
            torch._foreach_copy_([own[name] for name in means], [self._shared[name] for name in means])

    def _share_bytes_of(self, buffers: Sequence[Tensor]) -> None:
        """Gives every rank the first one's, exactly: whatever their types, in one message."""
        if not buffers:
            return
        said = torch.cat([buffer.detach().contiguous().view(-1).view(torch.uint8) for buffer in buffers])
        dist.broadcast(said, 0, group=self._group)
        with torch.no_grad():
            for buffer, part in zip(buffers, torch.split(said, [buffer.nbytes for buffer in buffers]), strict=True):
                # Copied once more: a part may begin where a number of its type must not.
                buffer.copy_(part.clone().view(buffer.dtype).view_as(buffer))

    @contextmanager
    def shared_weights(self, model: AetherModel) -> Iterator[None]:
        if not self._windows:  # they are the model's own
            yield
            return
        self._exchange_memory(model)
        try:
            yield
        finally:
            self._exchange_memory(model)

    def _exchange_memory(self, model: AetherModel) -> None:
        # Not copied: a snapshot holds on to what it was given until it has been copied, which comes later.
        for name, parameter in model.named_parameters():
            shared = self._shared[name]
            parameter.data, shared.data = shared.data, parameter.data
        for name, buffer in model.named_buffers():
            shared_buffer = self._shared_buffers[name]
            buffer.data, shared_buffer.data = shared_buffer.data, buffer.data

    def remarks(self) -> list[str]:
        told, self._remarks = self._remarks, []
        return told

    # --- a snapshot ------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        momentum = {
            name: state["momentum_buffer"]
            for name, shared in self._shared.items()
            if (state := self._outer.state.get(shared))
        }
        return {**self.own.state_dict(), "outer_momentum": momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.own.load_state_dict(state)
        self._begin_with_own_weights()
        for name, momentum in state.get("outer_momentum", {}).items():
            shared = self._shared[name]
            self._outer.state[shared] = {"momentum_buffer": momentum.to(shared.device, copy=True)}

    def own_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"windows": self._windows, "device": self.own.state_dict()}
        if self.rank:  # the first rank's is in the snapshot anyway
            state["optimizer"] = self._optimizer.state_dict()
        if self._windows:
            model = self._model
            stored = model.state_dict().keys()
            state["dropped"] = int(self._dropped)
            state["weights"] = {name: value.detach() for name, value in model.named_parameters()}
            state["buffers"] = {name: value.detach() for name, value in model.named_buffers() if name in stored}
        return state

    def combined(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"windows": 0, "left": [state["weights"] for state in states if state.get("windows")]}

    def load_own_state(self, state: dict[str, Any]) -> list[str]:
        if left := state.get("left"):
            # There are not as many ranks to go on from where each one was: they exchange what they had done by then.
            with torch.no_grad():
                names = [name for names in self._portions for name in names]
                means = {
                    name: sum(self._shared[name] - weights[name].to(self.device) for weights in left) / len(left)
                    for name in names
                }
            self._move(means)
            return []
        self.own.load_state_dict(state.get("device", {}))
        if "optimizer" in state:
            self._optimizer.load_state_dict(state["optimizer"])
        self._windows = state.get("windows", 0)
        if self._windows:
            self._dropped.fill_(state["dropped"])
            with torch.no_grad():
                for kind in ("weights", "buffers"):
                    for name, value in state[kind].items():
                        named = self._model.get_parameter if kind == "weights" else self._model.get_buffer
                        named(name).copy_(value)
        return []


def _check(sync_every: int, outer_learning_rate: float, outer_momentum: float) -> None:
    for name, value, fits, expected in (
        ("sync_every", sync_every, sync_every >= 1, "a number of steps, 1 or more"),
        ("outer_learning_rate", outer_learning_rate, 0 < outer_learning_rate < float("inf"), "more than 0"),
        ("outer_momentum", outer_momentum, 0 <= outer_momentum < 1, "0 or more, and less than 1"),
    ):
        if not fits:
            raise ConfigError(f"{name}: found {value!r}, expected {expected}.")


def _portions(parameters: Mapping[str, nn.Parameter]) -> Iterator[list[str]]:
    """Groups names, in their order, into portions of one type and of a size that can be flattened."""
    portion: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        if portion and (size + parameter.nbytes > _PORTION or parameters[portion[0]].dtype != parameter.dtype):
            yield portion
            portion, size = [], 0
        portion.append(name)
        size += parameter.nbytes
    yield portion
