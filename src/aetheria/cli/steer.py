"""`aetheria set`, `get`, `knobs`, `pause`, `resume`, ...: a run is steered through the hub, while it trains."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from aetheria.cli._steering import (
    AsJson,
    HubRun,
    Reason,
    Timeout,
    command_errors_told,
    parse_values,
    print_outcome,
    shown,
)


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
    as_json: AsJson = False,
) -> None:
    """Give knobs of RUN new values; they take effect together, between two steps."""
    values = parse_values(pairs)
    options = {"expect_revision": expect_revision, "not_after_step": not_after_step, "dry_run": dry_run}
    _command(run, "set", {"values": values}, reason, timeout, as_json, values=values, **options)


def get(
    run: HubRun,
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY...", help="Which knobs; all, if none.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the values that knobs of RUN have now."""
    from aetheria.client import connect
    from aetheria.errors import RunFolderError, did_you_mean

    with command_errors_told(), connect() as hub:
        known = hub.run(run).knobs
        for key in keys or ():
            if key not in known:
                raise RunFolderError(f"there is no knob '{key}'. {did_you_mean(key, known)}")
        values = {key: known[key] for key in keys or known}
    if as_json:
        _print_json(values)
    elif keys is not None and len(keys) == 1:
        typer.echo(shown(values[keys[0]]))
    else:
        for key, value in values.items():
            typer.echo(f"{key}={shown(value)}")


def knobs(
    run: HubRun,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what may be changed in RUN while it trains: values, what is allowed, what it does."""
    from aetheria.client import connect

    with command_errors_told(), connect() as hub:
        steered = hub.run(run)
        known = steered.knobs
    if as_json:
        fields = {"schema": known.schema, "observed": known.observed, "desired": known.desired}
        _print_json(fields | {"revision": known.revision})
    elif markdown:
        typer.echo(known.describe())
    elif not known.rows():
        typer.echo(f"{steered.id} has not told its knobs yet.")
    else:
        from rich.table import Table

        from aetheria.cli._display import text_console

        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for heading in ("knob", "value", "allowed", "unit", "what it does"):
            table.add_column(heading, overflow="fold")
        for row in known.rows():
            table.add_row(*row)
        text_console().print(table)


def pause(run: HubRun, reason: Reason = "", timeout: Timeout = 30.0, as_json: AsJson = False) -> None:
    """Let RUN wait at its next boundary, for as long as you like."""
    _command(run, "pause", {}, reason, timeout, as_json)


def resume(run: HubRun, reason: Reason = "", timeout: Timeout = 30.0, as_json: AsJson = False) -> None:
    """Let a paused RUN go on."""
    _command(run, "resume", {}, reason, timeout, as_json)


def stop(
    run: HubRun,
    snapshot: Annotated[bool, typer.Option("--snapshot/--no-snapshot", help="Take a snapshot at the end.")] = True,
    reason: Reason = "",
    timeout: Timeout = 120.0,
    as_json: AsJson = False,
) -> None:
    """End RUN at its next boundary."""
    _command(run, "stop", {"snapshot": snapshot}, reason, timeout, as_json)


def run_for(
    run: HubRun,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="So many steps.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", metavar="N", min=1, help="So many epochs.")] = None,
    reason: Reason = "",
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Let RUN go on for so many steps or epochs, and pause then."""
    if (steps is None) == (epochs is None):
        raise typer.BadParameter("found both or none of them, expected --steps N or --epochs N.")
    _command(run, "run_for", {"steps": steps, "epochs": epochs}, reason, timeout, as_json)


def rewind(
    run: HubRun,
    step: Annotated[int, typer.Argument(metavar="STEP", min=0, help="Of the snapshot to go back to.")],
    reason: Reason = "",
    timeout: Timeout = 120.0,
    as_json: AsJson = False,
) -> None:
    """Take RUN back to the snapshot of STEP; the journal keeps what was."""
    _command(run, "rewind", {"step": step}, reason, timeout, as_json)


def validate(run: HubRun, reason: Reason = "", timeout: Timeout = 3600.0, as_json: AsJson = False) -> None:
    """Validate RUN now."""
    _command(run, "validate", {}, reason, timeout, as_json)


def note(
    run: HubRun,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Shown on the curves, at this step.")],
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Write a note about this step of RUN."""
    _command(run, "note", {"text": text}, "", timeout, as_json)


def health(
    run: HubRun,
    check: Annotated[
        str, typer.Option("--check", metavar="WHAT", help="numerics, activations, throughput or determinism.")
    ] = "numerics",
    timeout: Timeout = 120.0,
    as_json: AsJson = False,
) -> None:
    """Look into RUN's health, changing nothing."""
    _command(run, "health", {"check": check}, "", timeout, as_json)


def ping(run: HubRun, timeout: Timeout = 10.0, as_json: AsJson = False) -> None:
    """Ask RUN for a sign of life."""
    _command(run, "ping", {}, "", timeout, as_json)


def take_snapshot(
    run: HubRun,
    name: Annotated[str, typer.Option("--name", metavar="TEXT", help="For people.")] = "",
    pinned: Annotated[bool, typer.Option("--pinned", help="Keep it for ever.")] = False,
    reason: Reason = "",
    timeout: Timeout = 120.0,
    as_json: AsJson = False,
) -> None:
    """Take a snapshot of RUN at its next boundary, while it trains."""
    _command(run, "snapshot", {"name": name, "pinned": pinned}, reason, timeout, as_json)


def _command(
    run: str,
    op: str,
    args: dict[str, Any],
    reason: str,
    timeout: float,
    as_json: bool,
    values: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    from aetheria.client import connect

    with command_errors_told(as_json), connect() as hub:
        outcome = hub.run(run).command(op, args, reason=reason, timeout=timeout, **options)
    print_outcome(op, outcome, as_json, values)


def _print_json(value: Any) -> None:
    from aetheria.cli.summary import json_text

    typer.echo(json_text(value))
