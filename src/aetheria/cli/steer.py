"""`aetheria set`, `get`, `knobs`, `pause`, `resume`, ...: a run is steered through the hub, while it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from aetheria.cli._steering import (
    AsJson,
    HubRun,
    Reason,
    Replicas,
    Timeout,
    command_errors_told,
    parse_values,
    print_outcome,
    print_outcomes,
    shown,
    those_meant,
)

if TYPE_CHECKING:
    from aetheria.client import KnobValues


def set_(
    run: HubRun,
    pairs: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="All are taken, or none.")],
    reason: Reason = "",
    expect_revision: Annotated[
        int | None, typer.Option("--expect-revision", metavar="N", help="Refuse unless the run is at this revision.")
    ] = None,
    not_after_step: Annotated[
        int | None, typer.Option("--not-after-step", metavar="STEP", help="Refuse where the run is past this step.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say whether it would be accepted.")] = False,
    timeout: Timeout = 30.0,
    replicas: Replicas = None,
    as_json: AsJson = False,
) -> None:
    """Give knobs of RUN new values; they take effect together, between two steps."""
    values = parse_values(pairs)
    options = {"expect_revision": expect_revision, "not_after_step": not_after_step, "dry_run": dry_run}
    _command(run, "set", {"values": values}, reason, timeout, as_json, replicas, values=values, **options)


def get(
    run: HubRun,
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY...", help="Which knobs; all, if none.")] = None,
    replicas: Replicas = None,
    as_json: AsJson = False,
) -> None:
    """Print the values that knobs of RUN have now."""
    from aetheria.client import connect
    from aetheria.errors import RunFolderError, did_you_mean

    with command_errors_told(), connect() as hub:
        found = {}
        for told, steered in those_meant(hub.run(run), replicas):
            known = steered.knobs
            for key in keys or ():
                if key not in known:
                    raise RunFolderError(f"{told}there is no knob '{key}'. {did_you_mean(key, known)}")
            found[told] = {key: known[key] for key in keys or known}
    if as_json:
        _print_json(found[""] if "" in found else {told.removesuffix(": "): values for told, values in found.items()})
        return
    for told, values in found.items():
        if keys is not None and len(keys) == 1:
            typer.echo(f"{told}{shown(values[keys[0]])}")
        else:
            for key, value in values.items():
                typer.echo(f"{told}{key}={shown(value)}")


def knobs(
    run: HubRun,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    replicas: Replicas = None,
    as_json: AsJson = False,
) -> None:
    """List what may be changed in RUN while it trains: values, what is allowed, what it does."""
    from aetheria.client import connect

    with command_errors_told(), connect() as hub:
        found = {told: (steered.id, steered.knobs) for told, steered in those_meant(hub.run(run), replicas)}
    if as_json:
        content = {
            told.removesuffix(": "): {
                "schema": known.schema,
                "observed": known.observed,
                "desired": known.desired,
                "revision": known.revision,
            }
            for told, (_, known) in found.items()
        }
        _print_json(content.get("", content))
        return
    for number, (name, known) in enumerate(found.values()):
        if len(found) > 1:
            typer.echo(f"{chr(10) if number else ''}{'# ' if markdown else ''}{name}")
        _print_knobs(name, known, markdown)


def _print_knobs(name: str, known: KnobValues, markdown: bool) -> None:
    if markdown:
        typer.echo(known.describe())
    elif not known.rows():
        typer.echo(f"{name} has not told its knobs yet.")
    else:
        from rich.table import Table

        from aetheria.cli._display import text_console

        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for heading in ("knob", "value", "allowed", "unit", "what it does"):
            table.add_column(heading, overflow="fold")
        for row in known.rows():
            table.add_row(*row)
        text_console().print(table)


def pause(
    run: HubRun, reason: Reason = "", timeout: Timeout = 30.0, replicas: Replicas = None, as_json: AsJson = False
) -> None:
    """Let RUN wait at its next boundary, for as long as you like."""
    _command(run, "pause", {}, reason, timeout, as_json, replicas)


def resume(
    run: HubRun, reason: Reason = "", timeout: Timeout = 30.0, replicas: Replicas = None, as_json: AsJson = False
) -> None:
    """Let a paused RUN go on."""
    _command(run, "resume", {}, reason, timeout, as_json, replicas)


def stop(
    run: HubRun,
    snapshot: Annotated[bool, typer.Option("--snapshot/--no-snapshot", help="Take a snapshot at the end.")] = True,
    reason: Reason = "",
    timeout: Timeout = 120.0,
    replicas: Replicas = None,
    as_json: AsJson = False,
) -> None:
    """End RUN at its next boundary."""
    _command(run, "stop", {"snapshot": snapshot}, reason, timeout, as_json, replicas)


def run_for(
    run: HubRun,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="So many steps.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="N", min=1, help="So many epochs.")] = None,
    reason: Reason = "",
    timeout: Timeout = 30.0,
    replicas: Replicas = None,
    as_json: AsJson = False,
) -> None:
    """Let RUN go on for so many steps or epochs, and pause then."""
    if (steps is None) == (epochs is None):
        raise typer.BadParameter("found both or none of them, expected --steps N or --epochs N.")
    _command(run, "run_for", {"steps": steps, "epochs": epochs}, reason, timeout, as_json, replicas)


def rewind(
    run: HubRun,
    step: Annotated[int, typer.Argument(metavar="STEP", min=0, help="Of the snapshot to go back to.")],
    reason: Reason = "",
    timeout: Timeout = 120.0,
    replicas: Replicas = None,
    as_json: AsJson = False,
) -> None:
    """Take RUN back to the snapshot of STEP; the journal keeps what was."""
    _command(run, "rewind", {"step": step}, reason, timeout, as_json, replicas)


def validate(
    run: HubRun, reason: Reason = "", timeout: Timeout = 3600.0, replicas: Replicas = None, as_json: AsJson = False
) -> None:
    """Validate RUN now."""
    _command(run, "validate", {}, reason, timeout, as_json, replicas)


def note(
    run: HubRun,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Shown on the curves, at this step.")],
    timeout: Timeout = 30.0,
    replicas: Replicas = None,
    as_json: AsJson = False,
) -> None:
    """Write a note about this step of RUN."""
    _command(run, "note", {"text": text}, "", timeout, as_json, replicas)


def health(
    run: HubRun,
    check: Annotated[
        str, typer.Option("--check", metavar="WHAT", help="numerics, activations, throughput, determinism or ranks.")
    ] = "numerics",
    timeout: Timeout = 120.0,
    replicas: Replicas = None,
    as_json: AsJson = False,
) -> None:
    """Look into RUN's health, changing nothing."""
    _command(run, "health", {"check": check}, "", timeout, as_json, replicas)


def ping(run: HubRun, timeout: Timeout = 10.0, replicas: Replicas = None, as_json: AsJson = False) -> None:
    """Ask RUN for a sign of life."""
    _command(run, "ping", {}, "", timeout, as_json, replicas)


def take_snapshot(
    run: HubRun,
    name: Annotated[str, typer.Option("--name", metavar="TEXT", help="For people.")] = "",
    pinned: Annotated[bool, typer.Option("--pinned", help="Keep it for ever.")] = False,
    reason: Reason = "",
    timeout: Timeout = 120.0,
    replicas: Replicas = None,
    as_json: AsJson = False,
) -> None:
    """Take a snapshot of RUN at its next boundary, while it trains."""
    _command(run, "snapshot", {"name": name, "pinned": pinned}, reason, timeout, as_json, replicas)


def _command(
    run: str,
    op: str,
    args: dict[str, Any],
    reason: str,
    timeout: float,
    as_json: bool,
    replicas: list[str] | None,
    values: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    from aetheria.client import Group, connect

    with command_errors_told(as_json), connect() as hub:
        steered = hub.run(run)
        given = {"reason": reason, "timeout": timeout, "replicas": replicas or (), **options}
        if isinstance(steered, Group):
            _, outcomes = steered.ask(op, args, **given)
        else:
            outcome = steered.command(op, args, **given)
    if isinstance(steered, Group):
        print_outcomes(op, outcomes, as_json, options.get("dry_run", False), values)
    else:
        print_outcome(op, outcome, as_json, values)


def _print_json(value: Any) -> None:
    from aetheria.cli.summary import json_text

    typer.echo(json_text(value))
