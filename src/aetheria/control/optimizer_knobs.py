"""The knobs of any optimiser of torch's shape: learning rate and the like, of all groups or of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from aetheria.control.knobs import Knob
from aetheria.errors import CommandError

__all__ = ["keep_groups", "optimizer_knobs", "rescale"]

_OF_GROUPS: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "weight_decay": ("weight_decay", float | None, {"ge": 0}, "Decay of the weights, where the optimiser has it."),
    "momentum": ("momentum", float | None, {"ge": 0, "lt": 1}, "Momentum, where the optimiser has it."),
    "betas": (
        "betas",
        tuple[float, float] | None,
        {},
        "Decay rates of the running averages, where the optimiser has them.",
    ),
}


def optimizer_knobs(optimizer: Callable[[], Any], schedulers: Callable[[], Sequence[Any]]) -> Iterator[Knob]:
    """Yields the knobs of the parameter groups.

    Args:
        optimizer: returns the optimiser as it is now; anything with `param_groups`.
        schedulers: returns the learning-rate schedulers that move it, possibly none.
    """

    def groups() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = optimizer().param_groups
        return found

    def group_names() -> list[str]:
        return [str(group.get("name", index)) for index, group in enumerate(groups())]

    def get(name: str, index: int | None) -> Any:
        values = [_plain(group.get(name)) for group in (groups() if index is None else [groups()[index]])]
        return values[0] if all(value == values[0] for value in values) else None

    def keep() -> Callable[[], None]:
        return keep_groups(optimizer(), schedulers())

    def learning_rate(key: str, index: int | None) -> Knob:
        return Knob(
            key,
            float | None,
            lambda value: rescale(optimizer(), schedulers(), value, index),
            lambda: get("lr", index),
            ge=0,
            unit="1",
            help="Learning rate. A schedule goes on from there, in proportion.",
            in_state=True,
            keep=keep,
        )

    def other(key: str, name: str, index: int | None) -> Knob:
        _, kind, bounds, about = _OF_GROUPS[name]

        def put(value: Any) -> None:
            if name == "betas" and value is not None and not all(0 <= beta < 1 for beta in value):
                raise CommandError(f"betas = {value} is refused: both must be at least 0 and less than 1.")
            chosen = groups() if index is None else [groups()[index]]
            if value is None or any(name not in group for group in chosen):
                kind_name = type(optimizer()).__name__
                has = "it needs a value" if value is None else f"{kind_name} has no {name}"
                raise CommandError(f"{key} = {value} is refused: {has}.")
            for group in chosen:
                group[name] = value

        return Knob(key, kind, put, lambda: get(name, index), help=about, in_state=True, keep=keep, **bounds)

    yield learning_rate("learning_rate", None)
    for name in _OF_GROUPS:  # all of them: another optimiser may come to have them
        yield other(name, name, None)
    if len(groups()) > 1:
        for index, group_name in enumerate(group_names()):
            yield learning_rate(f"learning_rate.{group_name}", index)
            for name in _OF_GROUPS:
                yield other(f"{name}.{group_name}", name, index)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value  # a learning rate may be a tensor


def rescale(optimizer: Any, schedulers: Sequence[Any], value: float | None, index: int | None = None) -> str:
    """Gives parameter groups a learning rate; a schedule goes on from there, in proportion.

    Everything that a scheduler remembers in units of a learning rate is multiplied by the same factor: where it would
    have fallen to a tenth, it falls to a tenth of the new one.

    Args:
        optimizer: anything with `param_groups`.
        schedulers: what moves its learning rates.
        value: the new learning rate; None, which stands for groups that differ, is refused.
        index: of the group; None for all.

    Returns:
        What was done to the schedule, for people.

    Raises:
        CommandError: the schedule is at zero, so that nothing can be in proportion to it.
    """
    if value is None:
        raise CommandError("learning_rate needs a number; the groups have different ones at the moment.")
    groups = optimizer.param_groups
    chosen = range(len(groups)) if index is None else [index]
    if any(map(_has_base, schedulers)):
        if any(float(groups[number]["lr"]) == 0 for number in chosen):
            raise CommandError(
                "the schedule is at a learning rate of 0 here, to which nothing is in proportion. Set it a step "
                'later, or take over with scheduler="none" first.'
            )
        if value == 0:
            raise CommandError('a schedule cannot go on from 0. Take over with scheduler="none" first.')
    before = [float(group["lr"]) for group in groups]  # all first: groups may share one tensor
    for number in chosen:
        group, factor = groups[number], value / before[number] if before[number] else 1.0
        for name in ("initial_lr", "max_lr", "min_lr"):
            if name in group:
                group[name] = group[name] * factor
        if not hasattr(group["lr"], "fill_"):
            group["lr"] = value
        else:
            others = [other for place, other in enumerate(groups) if place not in chosen]
            if any(other["lr"] is group["lr"] for other in others):
                group["lr"] = group["lr"].clone()
            group["lr"].fill_(value)
        for scheduler in schedulers:
            _rescale_scheduler(scheduler, number, factor)
    return "the schedule goes on from there, in proportion" if schedulers else ""


def _has_base(scheduler: Any) -> bool:
    """Returns whether a schedule is computed from a learning rate that it remembers."""
    return hasattr(scheduler, "base_lrs") or any(map(_has_base, getattr(scheduler, "_schedulers", ())))


def _rescale_scheduler(scheduler: Any, group: int, factor: float) -> None:
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        _rescale_scheduler(inner, group, factor)
    for values in _remembered(scheduler).values():
        if group < len(values):
            values[group] = values[group] * factor


def _remembered(scheduler: Any) -> dict[str, list[Any]]:
    """Returns the lists in which a scheduler has a learning rate for each group."""
    found = {name: getattr(scheduler, name, None) for name in ("base_lrs", "max_lrs", "_last_lr")}
    return {name: values for name, values in found.items() if isinstance(values, list)}


def keep_groups(optimizer: Any, schedulers: Sequence[Any] = ()) -> Callable[[], None]:
    """Returns a function that puts the options of all groups back, exactly, and what schedulers remember of them.

    To divide by the factor by which a schedule was multiplied would not do: the last bit would differ.

    Args:
        optimizer: anything with `param_groups`.
        schedulers: what moves its learning rates.
    """
    groups = list(optimizer.param_groups)
    options = [{name: _kept(value) for name, value in group.items() if name != "params"} for group in groups]
    inside = list(_all_of(schedulers))
    lists = [(values, list(values)) for one in inside for values in _remembered(one).values()]

    def put_back() -> None:
        for group, saved in zip(groups, options, strict=True):
            for name in group.keys() - saved.keys() - {"params"}:
                del group[name]
            for name, (value, content) in saved.items():
                group[name] = value if content is None else value.copy_(content)
        for values, content in lists:
            values[:] = content

    return put_back


def _kept(value: Any) -> tuple[Any, Any]:
    """Returns a value, and if it is a tensor, which may be changed in place, a copy of what is in it."""
    return value, value.clone() if hasattr(value, "copy_") else None


def _all_of(schedulers: Sequence[Any]) -> Iterator[Any]:
    for scheduler in schedulers:
        yield scheduler
        yield from _all_of(getattr(scheduler, "_schedulers", ()))
