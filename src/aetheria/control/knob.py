"""One knob: what its value may be, and how a value is checked. Refused rather than bent."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import to_json, to_jsonable_python

from aetheria.errors import CommandError, ConfigError
from aetheria.protocol import json_numbers

__all__ = ["Knob", "plain"]

_CONSTANTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # as JSON data, which has no such numbers


@dataclass(frozen=True)
class Knob:
    """Something declared steerable.

    Args:
        key: its name, for instance "learning_rate" or "learning_rate.head".
        type: the annotation of its value: numbers, strings, bool, Literal, Enum, Optional, lists, dictionaries,
            dataclasses, pydantic models.
        set: gives it a value that has been checked. What it returns, if it is a string, is said in the outcome.
        get: returns its value as it is now; without one, the value last set is shown.
        ge: the value is not less than this.
        gt: the value is greater than this.
        le: the value is not more than this.
        lt: the value is less than this.
        choices: the value is one of these.
        finite: refuses NaN and infinities, wherever in the value.
        unit: "s", "steps", "1" for a plain number, ...
        help: one line for people.
        scope: "run" for what every run has, else whose it is: "model", "data", a callback's name.
        in_state: whether a snapshot holds it anyway (as optimiser states do); if not, resuming sets it again.
        structural: whether it must be set again before a snapshot's states fit: another optimiser, for instance.
        reset: brings back what was before anybody touched it; by default that value is set.
        keep: returns a function that brings back what is now, exactly; by default the value is set again.

    Raises:
        ConfigError: the type cannot be checked or described, or has no order for the bounds.
    """

    key: str
    type: Any
    set: Callable[[Any], Any]
    get: Callable[[], Any] | None = None
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: Sequence[Any] | None = None
    finite: bool = True
    unit: str = ""
    help: str = ""
    scope: str = "run"
    in_state: bool = False
    structural: bool = False
    reset: Callable[[], None] | None = None
    keep: Callable[[], Callable[[], None]] | None = None

    def __post_init__(self) -> None:  # wrong declarations are told where they are made
        if self._bounds and not _is_number(self.type):
            raise ConfigError(
                f"the knob '{self.key}' is declared with {', '.join(self._bounds)}, but its values are "
                f"{_type_name(self.type)}: only numbers have bounds."
            )
        try:
            whole = self._adapter.pydantic_complete
            self._schema  # noqa: B018
        except (PydanticUserError, TypeError, NameError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"the knob '{self.key}' is declared with a type that cannot be checked: {reason}"
            ) from error
        if not whole:
            raise ConfigError(f"the knob '{self.key}' is declared with the type {self.type!r}, which is not defined.")

    @cached_property
    def _bounds(self) -> dict[str, float]:
        return {name: bound for name in ("ge", "gt", "le", "lt") if (bound := getattr(self, name)) is not None}

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        if not self._bounds:
            return TypeAdapter(self.type)
        bounds: dict[str, Any] = dict(self._bounds)
        bounded: Any = Annotated[self.type, Field(**bounds)]
        return TypeAdapter(bounded)

    @cached_property
    def _schema(self) -> dict[str, Any]:
        return self._adapter.json_schema()

    def check(self, value: Any) -> Any:
        """Returns the value in the knob's own type.

        Args:
            value: plain JSON data. NaN and the infinities, where they are allowed, may be given by their names.

        Raises:
            CommandError: naming the knob, the value and what is allowed.
        """
        try:
            return self._checked(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise self._refusal(value, f"{place}: {first['msg']}" if place else first["msg"]) from error
        except Exception as error:  # a type of the user's may check its values with any code
            raise self._refusal(value, str(error) or type(error).__name__) from error

    def _checked(self, value: Any) -> Any:
        given = to_jsonable_python(value, inf_nan_mode="constants")
        if not self.finite:
            given = _with_constants(given)
        elif not _finite(given):
            raise ValueError("it must be finite")
        checked = self._adapter.validate_json(to_json(given, inf_nan_mode="constants"), strict=True)
        kept = to_jsonable_python(checked, inf_nan_mode="constants", fallback=repr)
        if self.finite and not _finite(kept):
            raise ValueError("it is larger than any number that is computed with")
        if lost := _lost(given, kept):
            raise ValueError(lost)
        if self.choices is not None and checked not in self.choices:
            raise ValueError(f"it must be {self._chosen()}")
        return checked

    def _refusal(self, value: Any, why: str) -> CommandError:
        shown = repr(value) if len(repr(value)) < 200 else repr(value)[:200] + "..."
        return CommandError(f"{self.key} = {shown} is refused: {why}. Allowed: {self.allowed()}.")

    def _chosen(self) -> str:
        return "one of " + ", ".join(str(plain(choice)) for choice in self.choices or ())

    def allowed(self) -> str:
        """Returns in words what it may be."""
        words = [_type_name(self.type)] if self.choices is None else [self._chosen()]
        for sign, bound in ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt)):
            if bound is not None:
                words.append(f"{sign} {bound:g}")
        return ", ".join(words)

    def schema(self, place: str = "#") -> dict[str, Any]:
        """Returns its JSON Schema.

        Args:
            place: where it will stand, as a JSON pointer: what it refers to is found there.
        """
        schema = self._schema
        if place != "#" and "$defs" in schema:
            schema = self._adapter.json_schema(ref_template=place + "/$defs/{model}")
        extra: dict[str, Any] = {
            "title": self.key,
            "description": self.help,
            "unit": self.unit,
            "scope": self.scope,
            "enum": [plain(choice) for choice in self.choices or ()],
        }
        return schema | {name: value for name, value in extra.items() if value}


def plain(value: Any) -> Any:
    """Returns a knob's value as JSON data; NaN and the infinities, which JSON does not have, by their names."""
    return json_numbers(to_jsonable_python(value, inf_nan_mode="constants", fallback=repr))


def _with_constants(value: Any) -> Any:
    if isinstance(value, str):
        return _CONSTANTS.get(value, value)
    if isinstance(value, Mapping):
        return {key: _with_constants(item) for key, item in value.items()}
    return [_with_constants(item) for item in value] if isinstance(value, list) else value


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, list) else True


def _lost(given: Any, kept: Any) -> str:
    """Returns what of a value would not survive its conversion, in words; nothing if nothing."""
    if isinstance(given, Mapping) and isinstance(kept, Mapping):
        for key, value in given.items():
            if key not in kept:
                return f"it has no '{key}'"
            if lost := _lost(value, kept[key]):
                return f"{key}: {lost}"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return next(filter(None, map(_lost, given, kept)), "")
    elif isinstance(given, int | float) and isinstance(kept, int | float):
        same = given == kept or (given != given and kept != kept)
        if not same or isinstance(given, bool) != isinstance(kept, bool):
            return f"it would become {kept!r}"
    return ""


def _is_number(kind: Any) -> bool:
    """Returns whether all values of a type are numbers, or absent."""
    if get_origin(kind) is Annotated:
        return _is_number(get_args(kind)[0])
    parts = _alternatives(kind)
    if len(parts) > 1:
        return all(part is type(None) or _is_number(part) for part in parts)
    return isinstance(kind, type) and issubclass(kind, int | float) and not issubclass(kind, bool | Enum)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _type_name(kind: Any) -> str:
    names: dict[Any, str] = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
        Any: "anything",
    }
    parts, origin, arguments = _alternatives(kind), get_origin(kind), get_args(kind)
    if origin is None and kind in names:
        return names[kind]
    if len(parts) > 1:
        return " or ".join(_type_name(part) for part in parts)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments)) if len(arguments) > 1 else repr(arguments[0])
    if origin is list:
        return f"a list, each {_type_name(arguments[0])}"
    if origin is dict:
        return f"an object, each value {_type_name(arguments[1])}"
    if origin is tuple:
        return f"a list: {', '.join(_type_name(part) for part in arguments if part is not ...)}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"an object: {', '.join(kind.model_fields)}"
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return f"an object: {', '.join(kind.__dataclass_fields__)}"
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
