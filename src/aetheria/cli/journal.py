"""`aetheria journal`, `aetheria replay`, `aetheria undo`: what was commanded, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aetheria.cli._errors import errors_told, tracebacks_kept
from aetheria.cli._steering import (
    REFUSED,
    AsJson,
    HubRun,
    Reason,
    Replicas,
    Timeout,
    command_errors_told,
    outcome_in_words,
    print_outcome,
    shown,
    those_meant,
)
from aetheria.cli.runs import RunArgument, RunsDir

if TYPE_CHECKING:
    from aetheria.client import Run
    from aetheria.control.journal import Entry
    from aetheria.protocol import AnyCommand, Outcome

DIFFERENT = 1  # exit code


def journal(run: RunArgument, runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """List the commands that RUN has been given, and what came of them."""
    import json

    from aetheria.control.journal import read_journal
    from aetheria.protocol import encode
    from aetheria.runs import resolve_run

    with errors_told():
        folder = resolve_run(run, runs_dir)
        entries = read_journal(folder.path / "journal.jsonl")
    if as_json:
        typer.echo(json.dumps([json.loads(encode(entry)) for entry in entries], indent=1))
    elif not entries:
        typer.echo(f"{folder.run_id} has been given no command.")
    else:
        _print_journal(entries)


def _print_journal(entries: list[Entry]) -> None:
    from rich.table import Table

    from aetheria.cli._display import text_console

    table = Table("id", "step", "rev", "what", "by", "why", "became", box=None, pad_edge=False)
    for accepted, latest, command in _by_command(entries):
        became = latest.state if latest.state != "accepted" else "unfinished"
        table.add_row(
            command.id[:8],
            f"{accepted.step:,}",
            str(latest.revision),
            _what(command, latest),
            command.author,
            command.reason,
            f"{became}: {latest.message}" if latest.message else became,
        )
    text_console().print(table)


def _by_command(entries: list[Entry]) -> list[tuple[Outcome, Outcome, AnyCommand]]:
    """Returns for each command where it was accepted or refused, how far it got, and the command."""
    latest = {entry.outcome.command: entry.outcome for entry in entries}
    return [(entry.outcome, latest[entry.command.id], entry.command) for entry in entries if entry.command is not None]


def _what(command: AnyCommand, latest: Outcome) -> str:
    from aetheria.protocol import Set, encode

    if isinstance(command, Set):
        before, after = latest.result.get("before", {}), latest.result.get("after", {})
        return ", ".join(
            f"{key} {shown(before[key])} -> {shown(after[key])}" if key in after else f"{key} = {shown(value)}"
            for key, value in command.args.values.items()
        )
    arguments = encode(command.args).decode()
    return command.op_name if arguments == "{}" else f"{command.op_name} {arguments}"


def replay(
    run: RunArgument,
    until: Annotated[int | None, typer.Option("--until", metavar="STEP", help="Stop after this step.")] = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="ID", help="Leave this command out: what if? May be repeated."),
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Train RUN again from its configuration and its journal, in a folder of its own, and compare the weights."""
    import json

    from aetheria.runs import resolve_run

    with errors_told():
        path = resolve_run(run, runs_dir).path

    from aetheria.replay import replay_run

    with errors_told(), tracebacks_kept():
        found = replay_run(path, until, without or ())
    content: dict[str, Any] = {
        "run": path.name,
        "replay": str(found.result.folder),
        "equal": found.equal,
        "compared": found.compared,
        "differs_at": found.differs_at,
        "without": found.left_out,
        "digest": found.result.digest,
        "metrics": found.result.metrics,
    }
    if as_json:
        typer.echo(json.dumps(content, indent=1))
    else:
        _print_replay(content)
    if not found.equal and not found.left_out:
        raise typer.Exit(DIFFERENT)


def _print_replay(content: dict[str, Any]) -> None:
    steps = content["compared"]
    if content["differs_at"] is not None:
        typer.echo(f"DIFFERENT from step {content['differs_at']:,} on.")
    elif steps:
        typer.echo(f"EQUAL: the same weights at {len(steps)} steps, the last of them {steps[-1]:,}.")
    else:
        typer.echo("Nothing to compare with: the run has neither a snapshot nor a command in this stretch.")
    if content["metrics"]:
        typer.echo("metrics  " + "  ".join(f"{name} {value:.4g}" for name, value in content["metrics"].items()))
    typer.echo(f"replay   {content['replay']}")


def undo(
    run: HubRun,
    command: Annotated[
        str, typer.Argument(metavar="ID", help="The command, or the beginning of its id; the last change if none.")
    ] = "",
    reason: Reason = "",
    timeout: Timeout = 30.0,
    replicas: Replicas = None,
    as_json: AsJson = False,
) -> None:
    """Give knobs back the values they had before a command: by a new one, which stands in the journal, too."""
    from aetheria.client import connect

    with command_errors_told(as_json), connect() as hub:
        meant = those_meant(hub.run(run), replicas)
        if len(meant) == 1:
            print_outcome("set", _undo(meant[0][1], command, reason, timeout), as_json)
            return
        _undo_each(meant, command, reason, timeout, as_json)


def _undo(run: Run, command: str, reason: str, timeout: float) -> Outcome:
    from aetheria.errors import CommandError
    from aetheria.protocol import Set

    changes = [
        (latest, given)
        for _, latest, given in _by_command(run.journal)
        if isinstance(given, Set) and latest.state == "applied" and given.id.startswith(command)
    ]
    if not changes:
        raise CommandError("there is no change that could be undone." if not command else f"no change is {command}.")
    latest, given = changes[-1]
    if command and len(changes) > 1:
        raise CommandError(f"{len(changes)} changes have an id that begins with '{command}'; give more of it.")
    before = latest.result["before"]
    outcome: Outcome = run.set(before, reason=reason or f"undo {given.id[:8]}", timeout=timeout)
    return outcome


def _undo_each(meant: list[tuple[str, Run]], command: str, reason: str, timeout: float, as_json: bool) -> None:
    """Each replica gets its own values back: they need not have been the same."""
    import msgspec

    from aetheria.errors import AetheriaError

    outcomes: dict[str, Outcome | None] = {}
    for told, run in meant:
        try:
            outcome = _undo(run, command, reason, timeout)
        except AetheriaError as error:
            outcomes[told.removesuffix(": ")] = None
            typer.echo(f"{told}{error}", err=True)
        else:
            outcomes[told.removesuffix(": ")] = outcome
            if not as_json:
                typer.echo(f"{told}{outcome_in_words('set', outcome)}")
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(outcomes)).decode())
    if None in outcomes.values():
        raise typer.Exit(REFUSED)
