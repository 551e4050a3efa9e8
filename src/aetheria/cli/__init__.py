"""The command line. It has no logic of its own, and `aetheria --help` waits for nothing heavy.

Each file holds a command or a group of them. What a command needs is imported when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from aetheria import __version__
from aetheria.cli import (
    config,
    data,
    doctor,
    export,
    hub,
    init,
    journal,
    launch,
    mcp,
    plugins,
    predict,
    runs,
    snapshot,
    steer,
    train,
    watch,
)
from aetheria.cli._help import QuickHelp

__all__ = ["app", "main"]

app = typer.Typer(
    name="aetheria",
    cls=QuickHelp,
    help="Train PyTorch models: reproducible, crash-safe, and easy to look into.",
    epilog="First steps: aetheria init DIR, then in DIR: aetheria train config.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # what the user's code raises is shown by Python, in full
    context_settings={"help_option_names": ["-h", "--help"]},
)

TRAIN, STEER, LOOK, USE, SET_UP = "Train", "Steer", "Look", "Use", "Set up"

app.command("train", rich_help_panel=TRAIN)(train.train)
app.command("continue", rich_help_panel=TRAIN)(train.continue_)
app.command("launch", rich_help_panel=TRAIN)(launch.launch)
app.command("up", rich_help_panel=STEER)(hub.up)
app.command("down", rich_help_panel=STEER)(hub.down)
app.command("status", rich_help_panel=STEER)(hub.status)
app.command("watch", rich_help_panel=STEER)(watch.watch)
app.command("set", rich_help_panel=STEER)(steer.set_)
app.command("get", rich_help_panel=STEER)(steer.get)
app.command("knobs", rich_help_panel=STEER)(steer.knobs)
app.command("pause", rich_help_panel=STEER)(steer.pause)
app.command("resume", rich_help_panel=STEER)(steer.resume)
app.command("run-for", rich_help_panel=STEER)(steer.run_for)
app.command("stop", rich_help_panel=STEER)(steer.stop)
app.command("rewind", rich_help_panel=STEER)(steer.rewind)
app.command("validate", rich_help_panel=STEER)(steer.validate)
app.command("note", rich_help_panel=STEER)(steer.note)
app.command("health", rich_help_panel=STEER)(steer.health)
app.command("ping", rich_help_panel=STEER)(steer.ping)
app.command("undo", rich_help_panel=STEER)(journal.undo)
app.command("mcp", rich_help_panel=STEER)(mcp.mcp)
app.command("journal", rich_help_panel=LOOK)(journal.journal)
app.command("replay", rich_help_panel=LOOK)(journal.replay)
app.command("runs", rich_help_panel=LOOK)(runs.runs)
app.command("show", rich_help_panel=LOOK)(runs.show)
app.command("plot", rich_help_panel=LOOK)(runs.plot)
app.add_typer(snapshot.app, name="snapshot", rich_help_panel=LOOK)
app.add_typer(data.app, name="data", rich_help_panel=USE)
app.command("predict", rich_help_panel=USE)(predict.predict)
app.command("export", rich_help_panel=USE)(export.export)
app.command("init", rich_help_panel=SET_UP)(init.init)
app.add_typer(config.app, name="config", rich_help_panel=SET_UP)
app.command("plugins", rich_help_panel=SET_UP)(plugins.plugins)
app.command("doctor", rich_help_panel=SET_UP)(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aetheria {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Holds the options that come before the command."""


def main() -> None:
    """Runs the command that the process was started with."""
    app()
