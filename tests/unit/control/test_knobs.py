"""All knobs of a run: declared by classes, set together or not at all, put back by snapshots, described."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel

from aetheria.control.knobs import Knob, Knobs, controllable, declared, knob_of, weavelet_controllable
from aetheria.errors import CommandError, ConfigError


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Window:
    size: int
    overlap: float = 0.5


class Warmup(BaseModel):
    steps: int
    kind: Literal["linear", "cosine"] = "linear"


class Held:
    """Something with knobs, as plain as can be."""

    def __init__(self, **values: Any) -> None:
        self.values = values
        self.calls: list[tuple[str, Any]] = []

    def knob(self, key: str, kind: Any = float, readable: bool = True, wrong: Any = None, **options: Any) -> Knob:
        def put(value: Any) -> None:
            self.calls.append((key, value))
            self.values[key] = value
            if wrong is not None and value == wrong:
                raise RuntimeError(f"{key} cannot be {value}")

        return Knob(key, kind, put, (lambda: self.values[key]) if readable else None, **options)


# --- declarations ----------------------------------------------------------------------------------------------------
class Model:
    rate = 0.5

    @controllable("rate", get="rate", ge=0.0, lt=1.0, unit="1")
    def set_rate(self, value: float) -> None:
        """Share of the units that are silenced.

        More about it.
        """
        self.rate = value

    @weavelet_controllable("doubled", get=lambda model: model.rate * 2, help="twice as much", scope="elsewhere")
    def set_doubled(self, value: float, unused: int = 0) -> str:
        self.rate = value / 2
        return "halved"

    def plain_method(self, value: float) -> None: ...


def test_what_a_class_declares_becomes_knobs_of_its_objects() -> None:
    model, other = Model(), Model()
    knobs = Knobs(declared(model, "model"))
    assert [(one.key, one.scope, one.help, one.unit) for one in knobs] == [
        ("doubled", "elsewhere", "twice as much", ""),
        ("rate", "model", "Share of the units that are silenced.", "1"),
    ]
    change = knobs.apply(knobs.check({"rate": 0.25}))
    assert (change.before, change.after) == ({"rate": 0.5}, {"rate": 0.25})
    assert knobs.values() == {"doubled": 0.5, "rate": 0.25}
    assert knobs.apply(knobs.check({"doubled": 1})).remarks == ["halved"]
    assert (model.rate, other.rate) == (0.5, 0.5)


def test_a_subclass_inherits_knobs_and_may_replace_or_end_them() -> None:
    class Child(Model):
        @controllable("rate", get="rate", le=0.1)
        def set_rate(self, value: float) -> None:
            self.rate = value

        def set_doubled(self, value: float, unused: int = 0) -> str:
            return ""

        @controllable("more")
        def set_more(self, value: int) -> None: ...

    knobs = Knobs(declared(Child(), "model"))
    assert {one.key for one in knobs} == {"rate", "more"}
    with pytest.raises(CommandError, match=r"<= 0\.1"):
        knobs.check({"rate": 0.2})
    assert {one.key for one in declared(Model(), "model")} == {"rate", "doubled"}


def test_a_getter_that_is_misspelt_is_told_at_once() -> None:
    class Misspelt:
        @controllable("rate", get="raet")
        def set_rate(self, value: float) -> None: ...

    with pytest.raises(ConfigError, match="the attribute 'raet', which this Misspelt does not have"):
        declared(Misspelt(), "model")


def test_a_setter_takes_one_annotated_value() -> None:
    def none() -> None: ...
    def two(one: float, other: float) -> None: ...
    def named(*, value: float) -> None: ...
    def bare(value) -> None: ...  # type: ignore[no-untyped-def]
    def unknown(value: NowhereDefined) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    for function, words in (
        (none, "must take exactly one value, by position; it takes none"),
        (two, "it takes one, other"),
        (named, "by position"),
        (bare, "Add one, such as value: float"),
        (unknown, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=words):
            knob_of(function, key="it")

    def with_rest(value: float, *rest: float, **options: float) -> None: ...
    def with_default(value: float = 1.0) -> None: ...

    assert knob_of(with_rest, key="it").type is float
    assert knob_of(with_default, key="it").type is float


def test_two_knobs_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two knobs are called 'rate': one of model, one of Other"):
        Knobs([*declared(Model(), "model"), knob_of(Model().plain_method, key="rate", scope="Other")])


def test_an_unknown_knob_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(CommandError, match=r"there is no knob 'raet'\. Did you mean 'rate'"):
        Knobs(declared(Model(), "model")).check({"raet": 1})


# --- all or none -----------------------------------------------------------------------------------------------------
def test_one_wrong_value_refuses_all_and_every_refusal_is_told() -> None:
    held = Held(a=1.0, b=2.0)
    knobs = Knobs([held.knob("a"), held.knob("b", ge=0)])
    with pytest.raises(CommandError, match=r"b = -1 is refused.*there is no knob 'c'"):
        knobs.check({"a": 5, "b": -1, "c": 1})
    assert held.calls == []


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "a", "c")])
def test_a_setter_that_raises_half_way_leaves_nothing_changed(order: tuple[str, ...]) -> None:
    held = Held(a=1.0, b=2.0, c=3.0)
    knobs = Knobs([held.knob("a"), held.knob("b", wrong=7.0), held.knob("c")])
    knobs.apply(knobs.check({"a": 1.5}))
    with pytest.raises(RuntimeError, match=r"b cannot be 7\.0") as told:
        knobs.apply(knobs.check(dict.fromkeys(order, 7)))
    assert held.values == {"a": 1.5, "b": 2.0, "c": 3.0}
    assert knobs.touched() == {"a": 1.5}, "what was rolled back is not set again by whoever resumes"
    assert not getattr(told.value, "__notes__", [])


def test_a_getter_that_raises_after_the_change_undoes_it() -> None:
    held = Held(a=1.0)

    def get() -> float:
        if held.values["a"] == 2.0:
            raise OSError("gone")
        return float(held.values["a"])

    def put(value: float) -> None:
        held.values["a"] = value

    knobs = Knobs([Knob("a", float, put, get)])
    with pytest.raises(OSError, match="gone") as told:
        knobs.apply({"a": 2.0})
    assert "besides, a could not be put back to 1.0: gone" in told.value.__notes__


def test_what_cannot_be_put_back_is_said() -> None:
    held = Held(a=None, b=None)
    knobs = Knobs([held.knob("a", readable=False), held.knob("b", readable=False, wrong=7.0)])
    with pytest.raises(RuntimeError) as told:
        knobs.apply({"a": 1.0, "b": 7.0})
    assert told.value.__notes__ == [
        f"besides, {key} may have changed: what it was is not known, for it has no getter" for key in "ba"
    ]
    knobs.apply({"a": 1.0, "b": 2.0})
    with pytest.raises(RuntimeError) as told:
        knobs.apply({"a": 5.0, "b": 7.0})
    assert held.values == {"a": 1.0, "b": 2.0}, "what was set before is known"
    assert not hasattr(told.value, "__notes__")


def test_keep_puts_back_exactly_what_setting_again_could_not() -> None:
    inner = {"a": 1.0, "hidden": 0.1}

    def put(value: float) -> None:
        inner["a"], inner["hidden"] = value, inner["hidden"] * value

    def keep() -> Callable[[], None]:
        now = dict(inner)
        return lambda: inner.update(now)

    held = Held(b=1.0)
    knobs = Knobs([Knob("a", float, put, lambda: inner["a"], keep=keep), held.knob("b", wrong=7.0)])
    with pytest.raises(RuntimeError):
        knobs.apply({"a": 3.0, "b": 7.0})
    assert inner == {"a": 1.0, "hidden": 0.1}


def test_the_order_in_which_knobs_are_named_does_not_matter() -> None:
    state: dict[str, int | None] = {"epochs": 4, "steps": None}

    def setter(name: str) -> Callable[[Any], None]:
        def put(value: Any) -> None:
            if all(one is None for one in (state | {name: value}).values()):
                raise CommandError("one of the two must stay")
            state[name] = value

        return put

    def getter(name: str) -> Callable[[], Any]:
        return lambda: state[name]

    for values in ({"epochs": None, "steps": 10}, {"steps": 10, "epochs": None}):
        state |= {"epochs": 4, "steps": None}
        knobs = Knobs([Knob(name, int | None, setter(name), getter(name)) for name in state])
        knobs.apply(knobs.check(values))
        assert state == {"epochs": None, "steps": 10}
        assert knobs.restore({}, structural=False) == []
        assert state == {"epochs": 4, "steps": None}, "and back, whichever comes first"
    with pytest.raises(CommandError, match="must stay"):
        knobs.apply({"epochs": None, "steps": None})
    assert state == {"epochs": 4, "steps": None}


# --- snapshots -------------------------------------------------------------------------------------------------------
def test_restored_is_what_had_been_set_then_and_reset_what_had_not() -> None:
    held = Held(a=1.0, b=2.0, c=None, d=4.0)
    knobs = Knobs([held.knob("a"), held.knob("b"), held.knob("c", readable=False), held.knob("d", in_state=True)])
    knobs.apply({"a": 1.5, "d": 4.5})
    then = json.loads(json.dumps(knobs.touched()))
    assert then == {"a": 1.5}, "what a snapshot holds anyway is not remembered twice"
    knobs.apply({"a": 9.0, "b": 9.0, "c": 9.0})
    assert knobs.restore(then, structural=False) == []
    assert (held.values["a"], held.values["b"]) == (1.5, 2.0)
    assert knobs.touched() == {"a": 1.5}
    assert held.values["d"] == 4.5, "left to the snapshot"


def test_restoring_takes_the_two_kinds_in_turn_and_goes_on_after_one_that_fails() -> None:
    held = Held(a=1.0, b=2.0, s=3.0)
    knobs = Knobs([held.knob("a", wrong=7.0), held.knob("b", ge=0), held.knob("s", structural=True)])
    values = {"a": 7.0, "b": 5.0, "s": 6.0, "gone": 1}
    assert knobs.restore(values, structural=True) == []
    assert held.values == {"a": 1.0, "b": 2.0, "s": 6.0}
    assert knobs.restore(values, structural=False) == [
        "a was 7.0 at that step, and cannot be put back: RuntimeError: a cannot be 7.0",
        "gone was 1 at that step, but this run has no such knob",
    ]
    assert held.values == {"a": 1.0, "b": 5.0, "s": 6.0}


def test_reset_is_the_knobs_own_where_it_has_one() -> None:
    resets = []
    held = Held(a=1.0)
    knobs = Knobs([held.knob("a", reset=lambda: resets.append("a"))])
    assert knobs.restore({}, structural=False) == []
    assert not resets, "nobody touched it"
    knobs.apply({"a": 2.0})
    knobs.restore({}, structural=False)
    assert resets == ["a"]
    assert knobs.touched() == {}


# --- shown -----------------------------------------------------------------------------------------------------------
def test_a_getter_that_raises_does_not_hide_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    held = Held(a=1.0)

    def broken() -> float:
        raise ZeroDivisionError("no")

    knobs = Knobs([held.knob("a"), Knob("b", float, lambda value: None, broken)])
    assert knobs.values() == {"a": 1.0, "b": None}
    assert knobs.values() == {"a": 1.0, "b": None}
    assert capsys.readouterr().err.count("the knob b cannot be read: ZeroDivisionError: no") == 1
    assert "| `b` | `null` |" in knobs.describe()


def test_the_schema_of_all_is_a_json_schema_that_decides_like_check() -> None:
    class Nested(BaseModel):
        warmup: Warmup
        window: Window

    kinds: dict[str, Any] = {
        "int": int,
        "literal": Literal["a", "b"],
        "colour": Colour,
        "list": list[float],
        "nested/with~odd name": Nested | None,
        "again": list[Nested],
    }
    knobs = Knobs([Knob(key, kind, lambda value: None, help=f"about {key}") for key, kind in kinds.items()])
    knobs.add(Knob("bounded", float | None, lambda value: None, gt=0, le=1, unit="s", scope="model"))
    knobs.add(Knob("chosen", Colour, lambda value: None, choices=[Colour.RED]))
    schema = json.loads(json.dumps(knobs.schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    nested = {"warmup": {"steps": 1}, "window": {"size": 2}}
    for values, good in (
        ({"int": 3, "literal": "a", "colour": "red", "bounded": 0.5, "chosen": "red"}, True),
        ({"nested/with~odd name": nested, "again": [nested]}, True),
        ({"nested/with~odd name": {"warmup": {"steps": "x"}, "window": {"size": 2}}}, False),
        ({"again": [{"warmup": {"steps": 1}}]}, False),
        ({"int": 3.5}, False),
        ({"bounded": 0}, False),
        ({"bounded": None}, True),
        ({"literal": "c"}, False),
        ({"chosen": "blue"}, False),
        ({"unknown": 1}, False),
    ):
        assert validator.is_valid(values) is good, values
        try:
            knobs.check(values)
        except CommandError:
            assert not good, values
        else:
            assert good, values
    assert schema["properties"]["bounded"]["unit"] == "s"
    assert schema["properties"]["int"]["title"] == "int"
    for knob in knobs:
        jsonschema.Draft202012Validator.check_schema(knob.schema())


def test_described_they_are_a_table() -> None:
    held = Held(a=math.inf, b="x|y")
    knobs = Knobs([held.knob("a", unit="s", ge=0, help="first\nline"), held.knob("b", str, help="either | or")])
    assert knobs.describe().splitlines()[2:] == [
        '| `a` | `"Infinity"` | a number, >= 0 | s | first line |',
        '| `b` | `"x\\|y"` | a text |  | either \\| or |',
    ]
