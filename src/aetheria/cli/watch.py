"""`aetheria watch`: a run in the terminal, while it trains."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aetheria.cli._display import duration
from aetheria.cli._steering import AsJson, HubRun, command_errors_told, outcome_in_words, shown

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aetheria.client import Event, Run

_POINTS = 40  # of a sparkline
_COMMANDS = 6
_BLOCKS = "▁▂▃▄▅▆▇█"


def watch(
    run: HubRun,
    follow: Annotated[bool, typer.Option("--follow/--once", help="Stay until the run ends, or print and end.")] = True,
    as_json: AsJson = False,
) -> None:
    """Watch RUN: its newest metrics, its knobs, the last commands. Ctrl-C ends it; the run goes on."""
    from aetheria.client import connect

    with command_errors_told(), connect() as hub:
        watched = hub.run(run)
        try:
            if as_json:
                _print_events(watched, follow)
            else:
                _show(watched, follow)
        except KeyboardInterrupt:
            return  # the one way to end it


def _print_events(run: Run, follow: bool) -> None:
    import msgspec

    typer.echo(msgspec.json.encode(run.status))
    if follow:
        for event in _until_ended(run):
            typer.echo(msgspec.json.encode(event))


def _show(run: Run, follow: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(markup=False, highlight=False)
    view = _View(run)
    if not follow:
        console.print(view.drawn())
    elif not console.is_terminal:
        typer.echo(view.headline())
        for event in _until_ended(run):
            view.take(event)
            if line := view.line(event):
                typer.echo(line)
    else:
        with Live(view.drawn(), console=console, auto_refresh=False, transient=False) as live:
            for event in _until_ended(run):
                view.take(event)
                live.update(view.drawn(), refresh=True)


def _until_ended(run: Run) -> Iterator[Event]:
    from aetheria.client.models import ENDED

    begun = run.status
    if begun.status in ENDED:
        return
    for event in run.watch():
        yield event
        if event.type == "status" and event.data["status"] in ENDED:
            return


class _View:
    """What is known of a run that is watched, and how it looks."""

    def __init__(self, run: Run) -> None:
        self.run = run
        status = run.status
        self.status, self.step, self.heard = status.status, status.step, status.last_heartbeat
        self.metrics: dict[str, deque[float]] = {}
        for name, point in status.metrics.items():
            self.metrics[name] = deque(self._history(name), maxlen=_POINTS)
            if not self.metrics[name]:
                self._add(name, point.value)
        known = run.knobs
        self.knobs = dict(known)
        self.revision = known.revision
        self.ops = {command.id: command.op_name for command, _ in run.commands(_COMMANDS)}
        self.commands: dict[str, str] = {}
        for command, outcome in run.commands(_COMMANDS):
            told = outcome_in_words(command.op_name, outcome) if outcome else "sent, not answered yet"
            self.commands[command.id] = _with_author(told, command.author, command.reason)

    def _history(self, name: str) -> list[float]:
        from aetheria.errors import AetheriaError

        try:
            _, values = self.run.metrics(name, points=_POINTS)
            return [float(value) for value in values[-_POINTS:]]
        except AetheriaError:  # its folder is elsewhere, and nothing of it has arrived: the curve begins now
            return []

    def _add(self, name: str, value: float | None) -> None:
        self.metrics.setdefault(name, deque(maxlen=_POINTS)).append(math.nan if value is None else value)

    def take(self, event: Event) -> None:
        """Remembers what an event says."""
        data: Any = event.data
        match event.type:
            case "metrics":
                for name, (step, value) in data.items():
                    self.step = max(self.step, step)
                    self._add(name, value)
            case "beat":
                self.heard, self.step = event.time, max(self.step, data["step"])
            case "status":
                self.status = data["status"]
            case "knobs":
                self.knobs, self.revision = data["values"], data["revision"]
            case "outcome":
                self._take_outcome(data)

    def _take_outcome(self, data: dict[str, Any]) -> None:
        import msgspec

        from aetheria.protocol import Outcome

        outcome = msgspec.convert(data, Outcome)
        if outcome.command not in self.ops:
            self.ops |= {command.id: command.op_name for command, _ in self.run.commands(_COMMANDS)}
        self.commands.pop(outcome.command, None)
        self.commands[outcome.command] = outcome_in_words(self.ops.get(outcome.command, "command"), outcome)
        while len(self.commands) > _COMMANDS:
            del self.commands[next(iter(self.commands))]

    # --- drawing ---------------------------------------------------------------------------------------------------
    def headline(self) -> str:
        """Returns the run and its state in one line."""
        heard = "" if self.heard is None or self.status == "running" else f", heard of {_ago(self.heard)}"
        return f"{self.run.id}: {self.status}, step {self.step:,}{heard}"

    def line(self, event: Event) -> str:
        """Returns an event as one line; nothing for those that only repeat."""
        match event.type:
            case "metrics":
                newest = ", ".join(f"{name} {values[-1]:.6g}" for name, values in self.metrics.items())
                return f"step {self.step:,}  {newest}"
            case "outcome":
                return self.commands.get(event.data["command"], "")
            case "status":
                return self.headline()
            case "event":
                return f"step {event.data.get('step', self.step):,}  {event.data.get('message') or event.data}"
            case "missed":
                return f"{event.data['missed']:,} messages were missed."
        return ""

    def drawn(self) -> RenderableType:
        """Returns everything, for a terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        metrics = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for name, values in self.metrics.items():
            metrics.add_row(name, f"{values[-1]:.6g}" if values else "", Text(sparkline(values), style="cyan"))
        knobs = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for key, value in self.knobs.items():
            knobs.add_row(key, shown(value))
        parts: list[RenderableType] = [Text(self.headline(), style="bold"), metrics]
        if self.knobs:
            parts += [Text(f"\nknobs (revision {self.revision})", style="bold"), knobs]
        if self.commands:
            parts += [Text("\nlast commands", style="bold"), *map(Text, self.commands.values())]
        return Group(*parts)


def sparkline(values: deque[float] | list[float]) -> str:
    """Returns values as a line of blocks; what is no finite number is a gap."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    lowest, highest = min(finite), max(finite)
    span = (highest - lowest) or 1.0
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((value - lowest) / span * top)] if math.isfinite(value) else " " for value in values)


def _with_author(told: str, author: str, reason: str) -> str:
    by = f"  by {author}" if author else ""
    return f"{told}{by}" + (f": {reason}" if reason else "")


def _ago(when: float) -> str:
    return f"{duration(time.time() - when)} ago"
