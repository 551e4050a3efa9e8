"""Checks the parameters of a configuration against the constructor that will be called with them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from aetheria.errors import ConfigError, nearest
from aetheria.wording import dotted, expected, found, mismatches

__all__ = ["checked_parameters", "constructor_parameters"]

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def constructor_parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function, or of a class's `__init__` without `self`, in order."""
    function = _function(target)
    if function is object.__init__:  # its signature claims to take anything
        return {}
    parameters = list(inspect.signature(function).parameters.items())
    return dict(parameters[1:] if isinstance(target, type) else parameters)


def _function(target: Callable[..., Any]) -> Callable[..., Any]:
    # Not the class itself: its signature is that of the metaclass, where that has a __call__ of its own.
    return target.__init__ if isinstance(target, type) else target  # type: ignore[misc]


def checked_parameters(
    name: str, target: Callable[..., Any], given: Mapping[str, Any], leading: int = 0
) -> dict[str, Any]:
    """Returns the given parameters, turned into what the constructor is annotated with.

    Args:
        name: how the class or function is called in messages.
        target: the class or function.
        given: values by parameter name, as a configuration holds them.
        leading: how many positional arguments are filled otherwise.

    Raises:
        ConfigError: one line for each parameter that is unknown, missing, or of the wrong type.
    """
    parameters = dict(list(constructor_parameters(target).items())[leading:])
    accepted = {key: parameter for key, parameter in parameters.items() if parameter.kind in _BY_NAME}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    checked: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in given.items():
        if key in accepted:
            try:
                checked[key] = _converted(target, accepted[key], value)
            except _MismatchError as error:
                problems += [f"{key}{text}. Correct it." for text in error.args]
        elif takes_any:
            checked[key] = value
        else:
            near = nearest(key, accepted)
            hint = "Did you mean " + " or ".join(map(repr, near)) + "?" if near else "Remove it."
            problems.append(f"{key}: found an unknown parameter, expected a known one. {hint}")
    for key, parameter in accepted.items():
        if parameter.default is parameter.empty and key not in given:
            problems.append(f"{key}: found no value, expected one, for there is no default. Add it.")
    if problems:
        takes = "; ".join(_described(parameter) for parameter in accepted.values()) or "no parameters"
        raise ConfigError("\n".join(f"{name}: {problem}" for problem in problems) + f"\n{name} takes: {takes}")
    return checked


class _MismatchError(Exception):
    """A value that is not what a parameter is annotated with; `args` says why, one text for each place."""


def _converted(target: Callable[..., Any], parameter: inspect.Parameter, value: Any) -> Any:
    adapter = _adapter(target, parameter)
    if adapter is None or (value is None and parameter.default is None):
        return value
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # handed in from Python, not from a configuration
        return value
    try:
        # As JSON, strictness still lets a list be a tuple and a string be a path or a member of an enumeration.
        converted = adapter.validate_json(text, strict=True)
        # For an Iterable pydantic returns an iterator that checks as it goes, and is empty the second time.
        return list(converted) if isinstance(converted, Iterator) else converted
    except ValidationError as error:
        raise _MismatchError(*_texts(error, value)) from None


def _texts(error: ValidationError, value: Any) -> Iterator[str]:
    for path, details in mismatches(error, value).items():
        wanted = " or ".join(dict.fromkeys(expected(detail) for detail in details))
        inside = f".{dotted(path)}" if path else ""
        yield f"{inside}: found {found(details[0]['input'])}, expected {wanted}"


def _adapter(target: Callable[..., Any], parameter: inspect.Parameter) -> TypeAdapter[Any] | None:
    """Returns what checks one parameter; None where it is not annotated, or with something pydantic does not know."""
    if parameter.annotation is parameter.empty:
        return None
    # One parameter at a time: a name that is imported for type checkers only must not exempt the others.
    holder = type("Annotated", (), {"__annotations__": {parameter.name: parameter.annotation}})
    try:
        hints = get_type_hints(holder, getattr(_function(target), "__globals__", None), include_extras=True)
        return TypeAdapter(hints[parameter.name])
    except (NameError, AttributeError, TypeError, SyntaxError, PydanticUserError):
        return None


def _described(parameter: inspect.Parameter) -> str:
    text, annotation = parameter.name, parameter.annotation
    if annotation is not parameter.empty:
        text += f": {annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)}"
    return text if parameter.default is parameter.empty else f"{text} = {parameter.default!r}"
