"""What the commands that talk to a hub share: how they find a run, what they print, how they end."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from aetheria.client import Group, ReplicaOutcome, Run
    from aetheria.protocol import Outcome

__all__ = [
    "AsJson",
    "HubRun",
    "Reason",
    "Replicas",
    "Timeout",
    "command_errors_told",
    "outcome_in_words",
    "parse_values",
    "print_outcome",
    "print_outcomes",
    "shown",
    "those_meant",
]

HubRun = Annotated[
    str, typer.Argument(metavar="RUN", help="Any part of a run's name, or @last for the newest; RUN@ID is one replica.")
]
Reason = Annotated[str, typer.Option("--reason", "-r", metavar="TEXT", help="Why; stands in the run's journal.")]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="How long to wait for the run.")]
Replicas = Annotated[
    list[str] | None,
    typer.Option("--replica", metavar="ID", help="Of a run of several replicas, this one; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

REFUSED, WRONG_USAGE, NO_HUB = 1, 2, 3  # exit codes

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_DONE = {
    "pause": "paused",
    "resume": "resumed",
    "stop": "stopped",
    "run_for": "goes on, to pause then; asked",
    "snapshot": "snapshot taken",
    "rewind": "went back",
    "validate": "validated",
    "test": "tested",
    "note": "noted",
    "health": "looked into",
    "ping": "alive",
}


@contextmanager
def command_errors_told(as_json: bool = False) -> Iterator[None]:
    """Ends the command with a sentence on standard error.

    The exit code is 1 where the run refused or did not answer, 3 where there is no hub to ask, 2 for what the user can
    put right. With `as_json`, an outcome that is a refusal is printed, too.
    """
    from aetheria.client import CommandRefusedError, NoAnswerError
    from aetheria.errors import AetheriaError, CommandError, HubError

    try:
        yield
    except AetheriaError as error:
        if as_json and isinstance(error, CommandRefusedError):
            _print_json(error.outcome)
        for line in (error, *getattr(error, "__notes__", ())):
            typer.echo(line, err=True)
        refused = isinstance(error, CommandError | NoAnswerError)
        code = REFUSED if refused else NO_HUB if isinstance(error, HubError) else WRONG_USAGE
        raise typer.Exit(code) from None


def parse_values(pairs: list[str]) -> dict[str, Any]:
    """Returns the values of `key=value` pairs: JSON where it is some, else a text.

    Raises:
        typer.BadParameter: one has no `=`, or a key is there twice.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"found {pair!r}, expected KEY=VALUE, for instance learning_rate=1e-4.")
        if key in values:
            raise typer.BadParameter(f"{key} is given twice.")
        values[key] = _value(text)
    return values


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return float(text) if _NUMBER.fullmatch(text) else text
    return text if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any) -> str:
    """Returns a value as it could be typed after `key=`, numbers to six digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def print_outcome(op: str, outcome: Outcome, as_json: bool, values: dict[str, Any] | None = None) -> None:
    """Prints what came of a command, in one sentence or as JSON."""
    if as_json:
        _print_json(outcome)
    else:
        typer.echo(outcome_in_words(op, outcome, values))


def print_outcomes(
    op: str, outcomes: Sequence[ReplicaOutcome], as_json: bool, dry_run: bool, values: dict[str, Any] | None = None
) -> None:
    """Prints what came of a command to several replicas, in a line for each; what was not done, on standard error.

    Raises:
        typer.Exit: it was not done by all of them.
    """
    if as_json:
        _print_json(outcomes)
    failed = False
    for each in outcomes:
        failure = each.failure(op, dry_run)
        failed = failed or failure != ""
        if failure:
            typer.echo(f"{each.replica}: {failure}", err=True)
        elif each.outcome is not None and not as_json:
            typer.echo(f"{each.replica}: {outcome_in_words(op, each.outcome, values)}")
    if failed:
        raise typer.Exit(REFUSED)


def those_meant(run: Run | Group, replicas: list[str] | None) -> list[tuple[str, Run]]:
    """Returns each run that is meant, with what to write before what is said of it: a replica's id, or nothing.

    Args:
        run: as it was named.
        replicas: of a run of several, the ids of those that are meant; all of them by default.

    Raises:
        RunFolderError: there is no such replica.
    """
    from aetheria.client import Group
    from aetheria.errors import RunFolderError

    if not isinstance(run, Group):
        for replica in replicas or ():
            run.replica(replica)  # says that there is none
        return [("", run)]
    known = [each.replica for each in run.replicas]
    for replica in replicas or ():
        if replica not in known:
            raise RunFolderError(f"{run.id} has no replica {replica!r}. It has: {', '.join(known)}.")
    return [(f"{replica}: ", run.replica(replica)) for replica in replicas or known]


def _print_json(value: Any) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


def outcome_in_words(op: str, outcome: Outcome, values: dict[str, Any] | None = None) -> str:
    """Returns what came of a command, in one sentence: "learning_rate 0.001 -> 0.0001 at step 1,240 (revision 3)"."""
    where = f"at step {outcome.step:,} (revision {outcome.revision})"
    more = f": {outcome.message}" if outcome.message else ""
    if outcome.state not in ("applied", "accepted"):
        return f"{op} {outcome.state} {where}{more}"
    if outcome.state == "accepted":
        asked = ", ".join(f"{key} = {shown(value)}" for key, value in (values or {}).items())
        return f"{asked or op} would be accepted {where}{more}"
    if op == "set":
        before, after = outcome.result.get("before", {}), outcome.result.get("after", {})
        changes = ", ".join(f"{key} {shown(before.get(key))} -> {shown(value)}" for key, value in after.items())
        return f"{changes or 'set'} {where}{more}"
    numbers = ", ".join(f"{key} {value:.6g}" for key, value in outcome.result.items() if isinstance(value, int | float))
    found = f": {numbers}" if numbers and not more else ""
    return f"{_DONE.get(op, op)} {where}{more}{found}"
