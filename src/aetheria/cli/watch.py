"""`aetheria watch`: a run in the terminal, while it trains."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aetheria.cli._display import duration
from aetheria.cli._steering import AsJson, HubRun, Replicas, command_errors_told, outcome_in_words, shown, those_meant

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aetheria.client import Event, Group, Run

_POINTS = 40  # of a sparkline
_COMMANDS = 6
_BLOCKS = "▁▂▃▄▅▆▇█"


def watch(
    run: HubRun,
    follow: Annotated[bool, typer.Option("--follow/--once", help="Stay until the run ends, or print and end.")] = True,
    replicas: Replicas = None,
    as_json: AsJson = False,
) -> None:
    """Watch RUN: its newest metrics, its knobs, the last commands. Ctrl-C ends it; the run goes on."""
    from aetheria.client import connect

    with command_errors_told(), connect() as hub:
        watched = hub.run(run)
        meant = {each.id: told for told, each in those_meant(watched, replicas)}
        events = _Events(watched, None if replicas is None else set(meant))
        try:
            if as_json:
                _print_events(watched, events if follow else ())
            else:
                _show(_view_of(watched, list(meant)), events, follow)
        except KeyboardInterrupt:
            return  # the one way to end it


class _Events:
    """What happens in a run, or in several replicas, until all of them have ended."""

    def __init__(self, run: Run | Group, only: set[str] | None) -> None:
        self._run = run
        self._only = only

    def __iter__(self) -> Iterator[Event]:
        from aetheria.client.models import ENDED

        status = self._run.status
        alive = {each.id for each in status.replicas or [status] if each.status not in ENDED and self._meant(each.id)}
        if not alive:
            return
        for event in self._run.watch():
            if not self._meant(event.run):
                continue
            yield event
            if event.type == "status":
                (alive.discard if event.data["status"] in ENDED else alive.add)(event.run)
                if not alive:
                    return

    def _meant(self, run: str) -> bool:
        return self._only is None or run in self._only


def _print_events(run: Run | Group, events: Iterable[Event]) -> None:
    import msgspec

    typer.echo(msgspec.json.encode(run.status))
    for event in events:
        typer.echo(msgspec.json.encode(event))


def _show(view: _View | _Replicas, events: Iterable[Event], follow: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(markup=False, highlight=False)
    if not follow:
        console.print(view.drawn())
    elif not console.is_terminal:
        typer.echo(view.headline())
        for event in events:
            view.take(event)
            if line := view.line(event):
                typer.echo(line)
    else:
        with Live(view.drawn(), console=console, auto_refresh=False, transient=False) as live:
            for event in events:
                view.take(event)
                live.update(view.drawn(), refresh=True)


def _view_of(run: Run | Group, names: list[str]) -> _View | _Replicas:
    from aetheria.client import Group

    return _Replicas(run, names) if isinstance(run, Group) else _View(run)


class _Replicas:
    """What is known of several replicas that are watched: of each of them a line, and of all the last commands."""

    def __init__(self, group: Group, names: list[str]) -> None:
        self._group = group
        self._views = {name: _View(self._replica(name)) for name in names}

    def _replica(self, name: str) -> Run:
        return self._group.replica(_short(name))

    def take(self, event: Event) -> None:
        """Remembers what an event says; one from a replica that has just come, too."""
        if event.run in self._views:
            self._views[event.run].take(event)
        elif event.run.startswith(f"{self._group.id}@"):
            self._views[event.run] = _View(self._replica(event.run))

    def headline(self) -> str:
        """Returns each replica and its state in a line."""
        return "\n".join(view.headline() for view in self._views.values())

    def line(self, event: Event) -> str:
        """Returns an event as one line; nothing for those that only repeat."""
        if event.run not in self._views:
            return f"{event.data['missed']:,} messages were missed." if event.type == "missed" else ""
        line = self._views[event.run].line(event)
        return line and f"{_short(event.run)}: {line}"

    def drawn(self) -> RenderableType:
        """Returns everything, for a terminal."""
        from rich.console import Group as Parts
        from rich.table import Table
        from rich.text import Text

        replicas = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        commands = []
        for name, view in self._views.items():
            newest = ", ".join(f"{metric} {values[-1]:.6g}" for metric, values in view.metrics.items() if values)
            replicas.add_row(Text(view.headline(), style="bold"), f"revision {view.revision or 0}", newest)
            commands += [f"{_short(name)}: {told}" for told in view.commands.values()]
        parts: list[RenderableType] = [replicas]
        if commands:
            parts += [Text("\nlast commands", style="bold"), *map(Text, commands)]
        return Parts(*parts)


def _short(name: str) -> str:
    return name.rpartition("@")[2]


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
