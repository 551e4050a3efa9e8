"""A learning rate that is set rescales the schedule from there on; and whatever an optimiser has can be set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedulers

from aetheria.control.knobs import Knob, Knobs
from aetheria.control.optimizer_knobs import optimizer_knobs, rescale
from aetheria.errors import CommandError

STEPS = 40
SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: schedulers.StepLR(o, 5, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [4, 12, 20], 0.3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.95),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS + 5),
    "CosineAnnealingLR, past its end": lambda o: schedulers.CosineAnnealingLR(o, 21),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 7, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=STEPS + 1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=4, cycle_momentum=False),
    "CyclicLR, exp_range": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 4, mode="exp_range", gamma=0.97),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, 1.0, 20),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 20),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, STEPS + 5, 2.0),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step) ** 0.5),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o,
        [
            schedulers.LinearLR(o, 0.1, 1.0, 8),
            schedulers.CosineAnnealingLR(o, 20),
            schedulers.ExponentialLR(o, 0.9),
        ],
        [8, 28],
    ),
    "SequentialLR of closed forms": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.2, 10), schedulers.StepLR(o, 3, 0.7)], [10]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 12), schedulers.ExponentialLR(o, 0.95)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=2),
}
EVERY_KIND = {name for name in schedulers.__all__ if isinstance(getattr(schedulers, name), type)} - {
    "LRScheduler",
    "SequentialLR",
}


def optimizer(tensor: bool = False, groups: int = 1) -> Optimizer:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(groups)]
    rates: list[Any] = [torch.tensor(0.1 / (1 + index)) if tensor else 0.1 / (1 + index) for index in range(groups)]
    return SGD(
        [{"params": [parameter], "lr": rate} for parameter, rate in zip(parameters, rates, strict=True)], momentum=0.9
    )


def step(scheduler: Any) -> None:
    if isinstance(scheduler, schedulers.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def rates(moved: Optimizer, scheduler: Any, steps: int = STEPS, change: Callable[[int], None] | None = None) -> Any:
    found = []
    for number in range(steps):
        if change is not None:
            change(number)
        found.append([float(group["lr"]) for group in moved.param_groups])
        moved.step()
        step(scheduler)
    return found


def test_every_scheduler_of_torch_is_looked_at() -> None:
    covered = {name.partition(",")[0].partition(" ")[0] for name in SCHEDULES}
    assert covered >= EVERY_KIND - {"SWALR"}, EVERY_KIND - covered


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("at", [0, 1, 6, 13, 30])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_in_proportion(name: str, at: int, tensor: bool) -> None:
    untouched = optimizer(tensor, 2)
    expected = rates(untouched, SCHEDULES[name](untouched))
    moved = optimizer(tensor, 2)
    scheduler = SCHEDULES[name](moved)
    before = [group["lr"] for group in moved.param_groups]
    factor = 1.7
    if expected[at][0] == 0:
        pytest.skip("at zero nothing is in proportion; another test")

    def change(number: int) -> None:
        if number == at:
            value = float(moved.param_groups[0]["lr"]) * factor
            assert "in proportion" in rescale(moved, [scheduler], value, 0)

    found = rates(moved, scheduler, change=change)
    for number in range(STEPS):
        scale = factor if number >= at else 1.0
        assert found[number][0] == pytest.approx(expected[number][0] * scale, rel=1e-4, abs=1e-9), number
        assert found[number][1] == pytest.approx(expected[number][1], rel=1e-4, abs=1e-9), "the other group"
    if tensor:
        for group, rate in zip(moved.param_groups, before, strict=True):
            assert group["lr"] is rate, "compiled and captured steps look at this very tensor"


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_survives_being_saved_and_loaded(name: str) -> None:
    moved = optimizer()
    scheduler = SCHEDULES[name](moved)
    rates(moved, scheduler, 6)
    rescale(moved, [scheduler], 0.033)
    saved = (moved.state_dict(), scheduler.state_dict())
    again = optimizer()
    loaded = SCHEDULES[name](again)
    again.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])
    again._opt_called = True  # type: ignore[attr-defined]
    assert rates(again, loaded, 30) == rates(moved, scheduler, 30)


def test_all_groups_at_once_get_one_rate_and_keep_their_schedules() -> None:
    moved = optimizer(groups=3)
    scheduler = schedulers.StepLR(moved, 1, 0.5)
    rescale(moved, [scheduler], 0.8)
    assert rates(moved, scheduler, 3) == [[0.8] * 3, [0.4] * 3, [0.2] * 3]


def test_groups_that_share_one_tensor_are_told_apart() -> None:
    shared = torch.tensor(0.1)
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    moved = AdamW([{"params": [parameter]} for parameter in parameters], lr=shared, capturable=False, foreach=False)
    scheduler = schedulers.StepLR(moved, 1, 0.5)
    rescale(moved, [scheduler], 0.4, 0)
    assert rates(moved, scheduler, 2) == [pytest.approx([0.4, 0.1]), pytest.approx([0.2, 0.05])]
    rescale(moved, [scheduler], 0.4)
    assert rates(moved, scheduler, 2) == [pytest.approx([0.4, 0.4]), pytest.approx([0.2, 0.2])]


@pytest.mark.parametrize(
    "warming",
    [
        lambda o: schedulers.LambdaLR(o, lambda step: step / 10),
        lambda o: schedulers.SequentialLR(
            o, [schedulers.LambdaLR(o, lambda step: step / 10), schedulers.ExponentialLR(o, 0.9)], [10]
        ),
        lambda o: schedulers.ChainedScheduler([schedulers.LambdaLR(o, lambda step: step / 10)], optimizer=o),
    ],
    ids=["LambdaLR", "SequentialLR", "ChainedScheduler"],
)
def test_at_zero_nothing_is_in_proportion(warming: Callable[[Optimizer], Any]) -> None:
    moved = optimizer()
    scheduler = warming(moved)
    with pytest.raises(CommandError, match=r"at a learning rate of 0 here.*a step later"):
        rescale(moved, [scheduler], 0.1)
    moved.step()
    scheduler.step()
    with pytest.raises(CommandError, match="cannot go on from 0"):
        rescale(moved, [scheduler], 0.0)
    assert rates(moved, scheduler, 3) == [pytest.approx([0.1 * share]) for share in (0.1, 0.2, 0.3)]


def test_without_a_schedule_any_rate_will_do() -> None:
    moved = optimizer()
    for value in (0.0, 0.3, 0.0, 5.0):
        assert rescale(moved, [], value) == ""
        assert moved.param_groups[0]["lr"] == value
    scheduler = schedulers.ReduceLROnPlateau(moved)
    rescale(moved, [scheduler], 0.0)
    rescale(moved, [scheduler], 0.5)
    assert moved.param_groups[0]["lr"] == 0.5


# --- as knobs --------------------------------------------------------------------------------------------------------
def knobs_of(moved: Optimizer, *moving: Any) -> Knobs:
    return Knobs(optimizer_knobs(lambda: moved, lambda: moving))


def test_one_group_has_four_knobs_and_several_have_their_own_besides() -> None:
    single = ["learning_rate", "weight_decay", "momentum", "betas"]
    assert [knob.key for knob in knobs_of(optimizer())] == single
    named = SGD(
        [
            {"params": [torch.nn.Parameter(torch.zeros(1))], "name": "head"},
            {"params": [torch.nn.Parameter(torch.zeros(1))]},
        ],
        lr=0.1,
    )
    keys = [knob.key for knob in knobs_of(named)]
    assert keys == [*single, *(f"{key}.{group}" for group in ("head", "1") for key in single)]


def test_what_groups_do_not_agree_on_is_shown_as_none() -> None:
    moved = optimizer(groups=2)
    knobs = knobs_of(moved)
    assert knobs.observed("learning_rate") is None
    assert knobs.observed("learning_rate.1") == 0.05
    assert knobs.observed("betas") is None
    knobs.apply(knobs.check({"learning_rate": 0.01, "momentum.0": 0.5}))
    assert knobs.observed("learning_rate") == 0.01
    assert [group["momentum"] for group in moved.param_groups] == [0.5, 0.9]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": -0.1}, "greater than or equal to 0"),
        ({"learning_rate": None}, "needs a number"),
        ({"learning_rate": "1e-3"}, "valid number"),
        ({"momentum": 1.0}, "less than 1"),
        ({"weight_decay": None}, "it needs a value"),
        ({"betas": [0.9, 0.99]}, "SGD has no betas"),
        ({"betas": [0.9, 1.0]}, "both must be at least 0 and less than 1"),
    ],
)
def test_refused_nothing_is_changed(values: dict[str, Any], words: str) -> None:
    moved = optimizer(groups=2)
    knobs = knobs_of(moved)
    before = str(moved.param_groups)
    with pytest.raises(CommandError) as told:
        knobs.apply(knobs.check(values))
    assert words in str(told.value)
    assert str(moved.param_groups) == before


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_put_back_the_schedule_is_bit_for_bit_what_it_was(name: str, tensor: bool) -> None:
    """A `set` that fails is not done again by a replay: nothing at all may remain of it."""

    def wrong(value: float) -> None:
        raise RuntimeError("no")

    untouched, moved = optimizer(tensor, 2), optimizer(tensor, 2)
    expected, scheduler = SCHEDULES[name](untouched), SCHEDULES[name](moved)
    knobs = knobs_of(moved, scheduler)
    knobs.add(Knob("wrong", float, wrong))
    assert rates(untouched, expected, 7) == rates(moved, scheduler, 7)
    with pytest.raises(RuntimeError, match="no") as told:
        knobs.apply(
            {"learning_rate": 0.0123, "learning_rate.1": 0.07, "momentum": 0.1, "weight_decay.0": 0.3, "wrong": 1.0}
        )
    assert not any("could not be put back" in note for note in getattr(told.value, "__notes__", ()))
    assert rates(moved, scheduler, 30) == rates(untouched, expected, 30)
    for one, other in zip(moved.param_groups, untouched.param_groups, strict=True):
        assert {key: value for key, value in one.items() if key != "params"} == {
            key: value for key, value in other.items() if key != "params"
        }
