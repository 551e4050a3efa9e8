"""`aetheria up`, `down`, `status`: the hub through which runs are watched and steered."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aetheria.cli._display import duration, number, text_console
from aetheria.cli._errors import errors_told
from aetheria.cli._steering import NO_HUB, AsJson, command_errors_told

if TYPE_CHECKING:
    from aetheria.client import RunStatus

_START_SECONDS = 30.0
_END_SECONDS = 20.0
_detached: list[
    subprocess.Popen[bytes]
] = []  # they outlive this process; Python would complain about the forgotten ones


@errors_told()
def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Run it in the background.")] = False,
    port: Annotated[
        int | None,
        typer.Option("--port", metavar="PORT", min=1, max=65535, help="On 127.0.0.1; the last one, if none."),
    ] = None,
    nats: Annotated[
        str | None, typer.Option("--nats", metavar="URL", help="Use this NATS server instead of starting one.")
    ] = None,
    creds: Annotated[Path | None, typer.Option("--creds", metavar="FILE", help="The credentials for --nats.")] = None,
    replicas: Annotated[
        int, typer.Option("--replicas", metavar="N", help="How many servers of --nats keep everything; 3 in a cluster.")
    ] = 1,
) -> None:
    """Start the hub: runs on this machine find it, and can be watched and steered from then on."""
    from aetheria.client import connect, hub_folder

    if detach:
        pid = start_detached(hub_folder(), port, nats, creds, replicas, join=False)
        with connect() as hub:
            typer.echo(f"The hub is running: {hub.url}, process {pid}. End it with: aetheria down")
            typer.echo(f"In a browser, once: {hub.browser_url()}")
        return
    from aetheria.weaver.server import serve

    def tell(address: str) -> None:
        typer.echo(f"The hub is running. End it with Ctrl-C.\nIn a browser, once: {address}")

    serve(hub_folder(), port=port, nats=nats, credentials=creds, replicas=replicas, ready=tell)


def start_detached(
    folder: Path,
    port: int | None = None,
    nats: str | None = None,
    creds: Path | None = None,
    replicas: int = 1,
    *,
    join: bool = True,
) -> int:
    """Starts a hub in the background, and returns its process once it can be found.

    Args:
        folder: of the hub.
        port: on 127.0.0.1; the last one, by default.
        nats: use this NATS server instead of starting one.
        creds: the credentials for it.
        replicas: on how many of its servers everything is kept.
        join: where somebody else has started one at this very moment, be content with that.

    Raises:
        HubError: it did not start; the message is what it said.
    """
    from aetheria.client.location import hub_is_running
    from aetheria.errors import HubError
    from aetheria.loom.private_files import private_folder

    private_folder(folder)
    options: dict[str, object] = {"--port": port, "--nats": nats, "--replicas": replicas if replicas != 1 else None}
    options["--creds"] = None if creds is None else creds.absolute()
    given = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    log = folder / "hub.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        begin = os.lseek(descriptor, 0, os.SEEK_END)
        hub = subprocess.Popen(
            [sys.executable, "-m", "aetheria.weaver", "--folder", str(folder), *given],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            cwd=folder,  # whatever folder this was typed in may go away
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    _detached.append(hub)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        ended = hub.poll() is not None
        if ended and not (join and hub_is_running(folder)):
            with log.open("rb") as file:
                file.seek(begin)
                raise HubError(file.read().decode(errors="replace").strip() or f"the hub ended with {hub.returncode}.")
        if (pid := _announced(folder)) is not None and (ended or pid == hub.pid):
            return pid
        time.sleep(0.02)
    raise HubError(f"the hub did not start in {_START_SECONDS:g} seconds. Its log: {log}")


def _announced(folder: Path) -> int | None:
    """Returns the process of the hub that can be found in a folder."""
    import json

    try:
        return int(json.loads((folder / "hub.json").read_text())["pid"])
    except FileNotFoundError:
        return None


def down() -> None:
    """End the hub. Runs go on, and can be steered again when there is one."""
    import signal

    from aetheria.client.location import NOT_RUNNING, hub_folder, hub_is_running
    from aetheria.errors import HubError

    folder = hub_folder()
    with command_errors_told():
        if not hub_is_running(folder):
            raise HubError(NOT_RUNNING)
        pid = int((folder / "hub.lock").read_text())  # of whoever holds the lock, so that it is a hub's for certain
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _END_SECONDS
        while hub_is_running(folder):
            if time.monotonic() > deadline:
                raise HubError(
                    f"the hub, process {pid}, has not ended in {_END_SECONDS:g} seconds. End it: kill -9 {pid}"
                )
            time.sleep(0.02)
    typer.echo("The hub has ended.")


def status(as_json: AsJson = False) -> None:
    """Show the hub: its address, the runs it knows."""
    from aetheria.client import connect

    try:
        with command_errors_told(), connect() as hub:
            about = hub.about()
            runs = hub.runs()
            address = hub.browser_url() if about["role"] == "operator" and not as_json else ""
    except typer.Exit as error:
        if as_json and error.exit_code == NO_HUB:
            _print_json({"running": False})
        raise
    if as_json:
        _print_json({"running": True} | about | {"runs": runs})
        return
    typer.echo(f"The hub is running: {about['url']}, version {about['version']}.")
    if address:
        typer.echo(f"In a browser, once: {address}")
    if runs:
        _print_table(runs)
    else:
        typer.echo("It knows no runs yet. Those that start from now on find it.")


def _print_table(runs: Sequence[RunStatus]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for heading in ("status", "step", "last heard of", "host", "devices"):
        table.add_column(heading, justify="right" if heading == "step" else "left", no_wrap=heading != "devices")
    for run in _together(runs):
        heard = "" if run.last_heartbeat is None else f"{duration(time.time() - run.last_heartbeat)} ago"
        table.add_row(run.id, run.status, number(run.step), heard, run.host, ", ".join(run.devices))
    text_console().print(table)


def _together(runs: Sequence[RunStatus]) -> list[RunStatus]:
    """Returns runs with the replicas of one beside one another, where the newest of them is."""
    groups: dict[str, list[RunStatus]] = {}
    for run in runs:
        groups.setdefault(run.group or run.id, []).append(run)
    return [run for group in groups.values() for run in sorted(group, key=lambda run: run.replica)]


def _print_json(value: Any) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value)).decode())
