"""The knobs that every run has: what they reach into and refuse, and how optimisers and schedules are exchanged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aetheria.accelerator import CPUAccelerator
from aetheria.config import TrainingConfig
from aetheria.control.knobs import Knobs, controllable
from aetheria.core import AetherModel, Callback, OptimizerPlan, Schedule
from aetheria.engine.knobs import builtin_knobs
from aetheria.engine.schedules import Schedules, as_plan
from aetheria.errors import CommandError, ConfigError


class Net(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.head.bias.requires_grad_(False)
        self.loss_weights = {"main": 1.0, "extra": 0.1}

    def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.head(self.body(batch)).square().mean()}

    def configure_optimizers(self) -> OptimizerPlan:
        optimizer = torch.optim.SGD(
            [{"params": [*self.body.parameters()], "name": "body"}, {"params": [*self.head.parameters()]}],
            lr=0.1,
            momentum=0.9,
            weight_decay=0.01,
        )
        return OptimizerPlan(optimizer, [Schedule(torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "step")])


class Patience(Callback):
    patience = 3

    @controllable("patience", get="patience", ge=1)
    def set_patience(self, value: int) -> None:
        self.patience = value


class Run:
    """As much of an Orchestrator as the knobs reach into."""

    def __init__(self, **options: Any) -> None:
        self.model, self.data, self.callbacks = Net(), SimpleNamespace(), [Patience()]
        self.config = TrainingConfig(**{"epochs": 2} | options)
        self.accelerator = CPUAccelerator()
        self._schedules = Schedules(as_plan(self.model.configure_optimizers()))
        self.knobs: Knobs = builtin_knobs(self)  # type: ignore[arg-type]

    def _reconfigure(self, **changes: Any) -> None:
        self.config = self.config.model_copy(update=changes)

    def _replan(self, plan: OptimizerPlan) -> None:
        self._schedules.follow(plan)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._schedules.plan.optimizer

    def set(self, **values: Any) -> list[str]:
        checked = self.knobs.check({key.replace("__", "."): value for key, value in values.items()})
        return self.knobs.apply(checked).remarks

    def train(self, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            rates.append(float(self.optimizer.param_groups[0]["lr"]))
            self.model.training_step(torch.ones(2, 3))["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._schedules.step()
        return rates


def test_the_configuration_is_replaced_and_not_changed() -> None:
    run = Run()
    before = run.config
    run.set(log_every=7, snapshots__every_steps=9, epochs=5)
    assert (run.config.log_every, run.config.snapshots.every_steps, run.config.epochs) == (7, 9, 5)
    assert (before.epochs, before.snapshots.every_steps) == (2, TrainingConfig(epochs=1).snapshots.every_steps)
    assert run.knobs.observed("snapshots.every_steps") == 9


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"grad_accumulation_steps": 0}, "greater than or equal to 1"),
        ({"log_every": None}, "valid integer"),
        ({"snapshots__keep_last": 1}, "greater than or equal to 2"),
        ({"max_grad_norm": 0}, "greater than 0"),
        ({"max_grad_norm": float("inf")}, "finite"),
        ({"loss_weights__other": 1.0}, "there is no knob 'loss_weights.other'"),
        ({"optimizer": {"name": "torch.optim.SGD"}}, "torch.optim.SGD"),
        ({"optimizer": {"name": "os.system", "params": {"command": "true"}}}, "os.system"),
        ({"optimizer": {"name": "adamw", "params": {"nonsense": 1}}}, "nonsense"),
        ({"optimizer": "adamw"}, "Allowed: an object: name"),
        ({"scheduler": "any"}, "Allowed: 'none' or an object"),
        ({"scheduler": {"name": "step", "interval": "hour"}}, "interval"),
        ({"frozen": ["body.*", "nowhere"]}, "'nowhere' is the name of no parameter. There are, for instance: body"),
        ({"frozen": "body.*"}, "valid array"),
    ],
)
def test_refused_nothing_is_changed(values: dict[str, Any], words: str) -> None:
    run = Run()
    before = (run.config, run._schedules.plan, run.knobs.values())
    with pytest.raises((CommandError, LookupError, ConfigError)) as told:
        run.set(**values)
    assert words in str(told.value)
    assert (run.config, run._schedules.plan, run.knobs.values()) == before


def test_parts_of_the_loss_can_be_weighted() -> None:
    run = Run()
    run.set(loss_weights__extra=0.7)
    assert run.model.loss_weights == {"main": 1.0, "extra": 0.7}


def test_what_callbacks_declare_is_there_under_their_name() -> None:
    run = Run()
    run.set(patience=9)
    assert run.callbacks[0].patience == 9
    assert run.knobs["patience"].scope == "Patience"


def test_frozen_is_not_trained_and_thawed_it_is_what_it_was() -> None:
    run = Run()
    assert run.set(frozen=["body.*", "head.bias"]) == ["3 of 4 parameters are frozen"]
    body = run.model.body.weight.detach().clone()
    run.train(2)
    assert torch.equal(run.model.body.weight, body)
    run.set(frozen=[])
    trained = {name: parameter.requires_grad for name, parameter in run.model.named_parameters()}
    assert trained == {"body.weight": True, "body.bias": True, "head.weight": True, "head.bias": False}


def test_another_optimiser_takes_over_groups_rates_and_schedule() -> None:
    run = Run()
    run.train(3)
    run.set(learning_rate__body=0.2)
    assert run.set(optimizer={"name": "adamw"}) == ["state carried over, but for 3 of them, which begin anew"]
    assert isinstance(run.optimizer, torch.optim.AdamW)
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.2, 0.05]
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.01, 0.01]
    assert run.optimizer.param_groups[0]["name"] == "body"
    assert run.train(4) == pytest.approx([0.2, 0.1, 0.1, 0.05]), "the schedule goes on where it was"
    assert run.knobs.observed("optimizer") == {"name": "adamw", "params": {}}
    assert run.knobs.observed("betas") == [0.9, 0.999]


def test_state_is_carried_over_where_names_agree() -> None:
    run = Run()
    run.train(2)
    momentum = run.optimizer.state[run.model.body.weight]["momentum_buffer"].clone()
    remarks = run.set(optimizer={"name": "sgd", "params": {"momentum": 0.5, "nesterov": True, "weight_decay": 0.2}})
    assert remarks == ["state carried over"]
    assert torch.equal(run.optimizer.state[run.model.body.weight]["momentum_buffer"], momentum)
    assert run.knobs.observed("weight_decay") == 0.2
    assert run.knobs.observed("momentum") == 0.5


def test_a_schedule_is_handed_over_and_begun_anew() -> None:
    run = Run()
    assert run.train(3) == pytest.approx([0.1, 0.1, 0.05])
    assert run.set(scheduler="none") == ["the learning rate stays where it is until it is set"]
    assert run.train(3) == pytest.approx([0.05] * 3)
    run.set(learning_rate=0.0)
    run.set(learning_rate=0.4)
    run.set(scheduler={"name": "exponential", "params": {"gamma": 0.5}, "interval": "step"})
    assert run.train(3) == pytest.approx([0.4, 0.2, 0.1])
    assert run.knobs.observed("scheduler") == {
        "name": "exponential", "params": {"gamma": 0.5}, "interval": "step", "monitor": None
    }  # fmt: skip


def test_reset_the_first_plan_is_back() -> None:
    run = Run()
    first = run._schedules.plan
    run.set(optimizer={"name": "adamw"}, scheduler="none", frozen=["body.*"])
    assert run.knobs.restore({}, structural=True) == []
    assert run.optimizer is first.optimizer
    assert [item.scheduler for item in run._schedules.plan.schedules] == [item.scheduler for item in first.schedules]
    assert first.schedules[0].scheduler.optimizer is first.optimizer
    assert all(parameter.requires_grad for parameter in run.model.body.parameters())
    assert run.knobs.observed("optimizer") == {"name": "sgd"}


def test_what_was_set_is_remembered_and_set_again_elsewhere() -> None:
    run = Run()
    run.set(optimizer={"name": "adamw"}, log_every=3, learning_rate=0.5, patience=7)
    remembered = run.knobs.touched()
    assert set(remembered) == {"optimizer", "log_every", "patience"}, "the learning rate is in the optimiser's state"
    other = Run()
    assert other.knobs.restore(remembered, structural=True) == []
    assert isinstance(other.optimizer, torch.optim.AdamW)
    assert other.config.log_every != 3
    assert other.knobs.restore(remembered, structural=False) == []
    assert (other.config.log_every, other.callbacks[0].patience) == (3, 7)
