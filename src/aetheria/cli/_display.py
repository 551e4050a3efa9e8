"""How tables, numbers and times look in a terminal."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["duration", "moment", "number", "text_console"]


def text_console() -> Console:
    """Returns a console that takes text as it is; piped output is not folded to a terminal nobody looks at."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=160)


def number(value: int | None) -> str:
    """Returns a whole number with its thousands apart; nothing where there is none."""
    return "" if value is None else f"{value:,}"


def moment(when: float | str | None) -> str:
    """Returns the local time of a moment, given in seconds since 1970 or as ISO 8601 with its zone."""
    if when is None:
        return ""
    utc = (
        datetime.datetime.fromisoformat(when)
        if isinstance(when, str)
        else datetime.datetime.fromtimestamp(when, datetime.UTC)
    )
    return utc.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float | None) -> str:
    """Returns a length of time in its largest unit."""
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
