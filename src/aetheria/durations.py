"""Lengths of time as people write them: 90m, 12h, 1d6h30m. Nothing that could mean two things."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

__all__ = ["Seconds", "SecondsOrText", "duration_in_words", "seconds_of"]

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_PATTERN = "^" + "".join(f"(?:([0-9]{{1,9}}){unit})?" for unit in _UNITS) + "$"
_EXPECTED = "seconds as a number, or a text of whole days, hours, minutes and seconds such as 90m, 12h or 1d6h30m"


def seconds_of(given: Any) -> float:
    """Returns a length of time in seconds.

    Texts like 12:30, which are hours and minutes to one and minutes and seconds to another, are refused; so are numbers
    without a unit in a text.

    Args:
        given: a number of seconds, or a text: `90m`, `1h30m`, `1d12h`.

    Raises:
        PydanticCustomError: it is neither; what pydantic, while it validates, turns into its own error.
    """
    if isinstance(given, int | float) and not isinstance(given, bool):
        return given
    if isinstance(given, str) and (parts := re.fullmatch(_PATTERN, given)):
        counts = [int(part or 0) for part in parts.groups()]
        if any(counts):
            return float(sum(count * size for count, size in zip(counts, _UNITS.values(), strict=True)))
    raise PydanticCustomError("expected", _EXPECTED)


def duration_in_words(seconds: float) -> str:
    """Returns a length of time as a person would write it: `1d6h30m`, or `2.5s`."""
    if seconds != int(seconds):
        return f"{seconds:.10g}s"
    rest, words = int(seconds), ""
    for unit, size in _UNITS.items():
        count, rest = divmod(rest, size)
        words += f"{count}{unit}" if count else ""
    return words or "0s"


_positive = Field(gt=0, allow_inf_nan=False)
_AsText = Annotated[str, Field(pattern=_PATTERN, min_length=2)]
_Given = Annotated[float, Field(gt=0)] | _AsText


def _seconds_of_a_knob(given: Any) -> float:
    try:
        return seconds_of(given)
    except PydanticCustomError as error:  # a configuration's sentence says "expected" by itself
        raise PydanticCustomError("expected", f"expected {_EXPECTED}") from error


Seconds = Annotated[float, _positive, BeforeValidator(seconds_of, json_schema_input_type=_Given)]
"""A field of a configuration: given in either form, held as seconds."""
SecondsOrText = Annotated[float | str, _positive, BeforeValidator(_seconds_of_a_knob, json_schema_input_type=_Given)]
"""The same for a knob, which says by its type what it takes."""
