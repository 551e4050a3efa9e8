"""Turns pydantic's errors into sentences of the form "found X, expected Y", in the words of a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

__all__ = ["KeyPath", "dotted", "expected", "found", "mismatches"]

KeyPath = tuple[str | int, ...]
"""Where a value lies in nested mappings and lists: `("callbacks", 0, "params")`."""

_PLAIN = "a plain value (null, true, false, a number, a string, a list or a mapping)"
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "path_type": "a path, written as a string",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "null",
    "missing": "a value",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "invalid-json-value": _PLAIN,
}
_LONGEST_VALUE = 60  # characters of a found value that are quoted in a message


def dotted(path: KeyPath) -> str:
    """Returns the path as it is written in a message or after `--set`: `callbacks.0.params`."""
    return ".".join(str(part) for part in path)


def found(value: Any) -> str:
    """Returns how a value is named in a message: as YAML spells it, with its type where that may surprise."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"{_shortened(repr(value))} (a string)"
        case int() | float():
            return repr(value)
        case list():
            return f"the list {_shortened(str(value))}"
        case dict():
            return f"the mapping {_shortened(str(value))}"
        case _:
            return f"{_shortened(repr(value))} (of type {type(value).__name__})"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def expected(error: ErrorDetails) -> str:
    """Returns what one of pydantic's errors wanted instead, for instance "a whole number"."""
    template = _EXPECTED.get(error["type"])
    return error["msg"] if template is None else template.format(**error.get("ctx", {}))


def mismatches(error: ValidationError, values: Any) -> dict[KeyPath, list[ErrorDetails]]:
    """Groups pydantic's errors by the place in the user's values that they complain about.

    Several errors at one place are the alternatives of a union. Where one alternative fits further than the others,
    only what is wrong deeper inside it is kept.

    Args:
        error: what pydantic raised.
        values: what was validated.
    """
    places: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        places.setdefault(_within(values, detail), []).append(detail)
    return {
        path: details
        for path, details in places.items()
        if not any(len(other) > len(path) and other[: len(path)] == path for other in places)
    }


def _within(values: Any, detail: ErrorDetails) -> KeyPath:
    """Returns the error's location without the names of types and alternatives that pydantic mixes into it."""
    path: list[str | int] = []
    location: Sequence[str | int] = detail["loc"]
    for part in location:
        try:
            values = values[part]
        except (LookupError, TypeError):
            continue
        path.append(part)
    if detail["type"] == "missing":
        path.append(location[-1])
    return tuple(path)
