"""What one knob may be set to: accepted exactly, or refused in words; wrong declarations are told at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, field_validator

from aetheria.control.knobs import Knob, plain
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


class Even(BaseModel):
    number: int

    @field_validator("number")
    @classmethod
    def _is_even(cls, value: int) -> int:
        if value % 2:
            raise KeyError("odd")  # not what pydantic expects of a validator
        return value


class Clamped(BaseModel):
    share: float

    @field_validator("share")
    @classmethod
    def _clamp(cls, value: float) -> float:
        return min(max(value, 0.0), 1.0)


def knob(kind: Any, **options: Any) -> Knob:
    return Knob("it", kind, lambda value: None, **options)


# --- one value -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "given", "checked"),
    [
        (int, 3, 3),
        (int, 10**30, 10**30),
        (float, 3, 3.0),
        (float, 0.1, 0.1),
        (bool, True, True),
        (str, "", ""),
        (Literal["sgd", "adamw"], "sgd", "sgd"),
        (Literal[1, "one"], 1, 1),
        (Colour, "blue", Colour.BLUE),
        (Colour, Colour.BLUE, Colour.BLUE),
        (Optional[float], None, None),  # noqa: UP045
        (float | None, 2, 2.0),
        (list[float], [1, 2.5], [1.0, 2.5]),
        (list[int], [], []),
        (dict[str, float], {"a": 1}, {"a": 1.0}),
        (tuple[float, float], [0.9, 0.999], (0.9, 0.999)),
        (Window, {"size": 2}, Window(2)),
        (Warmup, {"steps": 3, "kind": "cosine"}, Warmup(steps=3, kind="cosine")),
        (Warmup | Literal["none"], "none", "none"),
        (Annotated[int, "counted"], 3, 3),
    ],
)
def test_accepted_in_the_knobs_own_type(kind: Any, given: Any, checked: Any) -> None:
    found = knob(kind).check(given)
    assert found == checked
    assert type(found) is type(checked)


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (int, 3.7, "it = 3.7 is refused: Input should be a valid integer. Allowed: a whole number."),
        (int, 3.0, "valid integer"),
        (int, True, "valid integer"),
        (int, "3", "valid integer"),
        (int, None, "valid integer"),
        (float, "0.1", "valid number. Allowed: a number."),
        (float, True, "valid number"),
        (float, 2**53 + 1, "it would become 9007199254740992.0"),
        (float, 10**400, "larger than any number"),
        (bool, 1, "valid boolean. Allowed: true or false."),
        (bool, "true", "valid boolean"),
        (str, 1, "valid string. Allowed: a text."),
        (Literal["sgd", "adamw"], "adam", "'sgd' or 'adamw'. Allowed: one of sgd, adamw."),
        (Literal[1, "one"], True, "it would become 1"),
        (Colour, "RED", "Allowed: one of red, blue."),
        (float | None, "", "Allowed: a number or null."),
        (list[float], [1, "x"], "1: Input should be a valid number. Allowed: a list, each a number."),
        (list[float], 1.0, "valid array"),
        (list[int], [1, True], "1: Input should be a valid integer"),
        (dict[str, float], {"a": "x"}, "a: Input should be a valid number. Allowed: an object, each value a number."),
        (tuple[float, float], [0.9], "Allowed: a list: a number, a number."),
        (tuple[float, float], [0.9, 0.9, 0.9], "at most 2 items"),
        (Window, {"size": 2.5}, "size: Input should be a valid integer. Allowed: an object: size, overlap."),
        (Window, {"size": 2, "sise": 3}, "it has no 'sise'"),
        (Warmup, {"steps": 1, "kind": "fast"}, "kind: Input should be 'linear' or 'cosine'"),
        (Warmup, {"steps": 1, "stops": 1}, "it has no 'stops'. Allowed: an object: steps, kind."),
        (Warmup, {}, "steps: Field required"),
        (Even, {"number": 3}, "odd"),
        (Clamped, {"share": 3}, "share: it would become 1.0"),
        (float, object(), "refused"),
    ],
)
def test_refused_in_words(kind: Any, given: Any, words: str) -> None:
    with pytest.raises(CommandError) as told:
        knob(kind).check(given)
    assert words in str(told.value)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        ({"ge": 0.0}, [0, 1e300], [-1e-300]),
        ({"gt": 0.0}, [5e-324], [0, -0.0]),
        ({"le": 1.0}, [1, -5], [1.0000000000000002]),
        ({"lt": 1.0}, [0.9999999999999999], [1]),
        ({"choices": [0.1, 0.2]}, [0.1], [0.3, 0]),
        ({"ge": 0, "choices": [1, 2]}, [2], [3]),
    ],
)
def test_bounds_are_exact(bounds: dict[str, Any], inside: list[float], outside: list[float]) -> None:
    bounded = knob(float | None, **bounds) if "choices" not in bounds else knob(float, **bounds)
    for value in inside:
        assert bounded.check(value) == value
    for value in outside:
        with pytest.raises(CommandError, match="is refused"):
            bounded.check(value)


def test_a_refusal_says_what_is_allowed() -> None:
    with pytest.raises(CommandError, match=r"Allowed: a number or null, >= 0, < 1\."):
        knob(float | None, ge=0, lt=1).check(2)
    with pytest.raises(CommandError, match=r"it must be one of red\. Allowed: one of red\."):
        knob(Colour, choices=[Colour.RED]).check("blue")
    with pytest.raises(CommandError, match=r"it = '(x+)\.\.\. is refused") as told:
        knob(int).check("x" * 10_000)
    assert len(str(told.value)) < 400


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "NaN", "Infinity", "-Infinity"])
def test_what_is_not_finite_is_refused_unless_declared(value: Any) -> None:
    for kind, offered in ((float, value), (list[float], [1.0, value]), (dict[str, float], {"a": value})):
        with pytest.raises(CommandError, match="is refused"):
            knob(kind).check(offered)
    free = knob(float, finite=False).check(value)
    assert str(free) == str(float(value))
    assert str(knob(float, finite=False).check(plain(free))) == str(free), "shown and set again it is the same"
    assert json.dumps(plain(free), allow_nan=False)


def test_a_text_may_be_called_nan() -> None:
    assert knob(str).check("NaN") == "NaN"


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53))
def test_a_number_stays_the_number_that_it_is(value: float) -> None:
    assert knob(float).check(value) == value


# --- declarations ----------------------------------------------------------------------------------------------------
class Undefined(BaseModel):
    what: "NowhereDefined"  # type: ignore[name-defined]  # noqa: F821, UP037


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (str, {"ge": 3}, "only numbers have bounds"),
        (list[float], {"ge": 0}, "its values are a list, each a number: only numbers have bounds"),
        (bool, {"lt": 1}, "only numbers"),
        (Colour, {"gt": 0}, "only numbers"),
        (Undefined, {}, "cannot be checked"),
        ("NowhereDefined", {}, "the knob 'it' is declared with"),
        (object(), {}, "cannot be checked"),
        (Callable[[], int], {}, "cannot be checked"),
    ],
)
def test_a_wrong_declaration_is_told_where_it_is_made(kind: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        knob(kind, **options)
