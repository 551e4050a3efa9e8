"""The command line. It has no logic of its own, and `aetheria --help` waits for nothing heavy.

Each file holds a command or a group of them. What a command needs is imported when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from aetheria import __version__
from aetheria.cli import config, doctor, export, init, plugins, predict, runs, snapshot, train
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

TRAIN, LOOK, USE, SET_UP = "Train", "Look", "Use", "Set up"

app.command("train", rich_help_panel=TRAIN)(train.train)
app.command("continue", rich_help_panel=TRAIN)(train.continue_)
app.command("runs", rich_help_panel=LOOK)(runs.runs)
app.command("show", rich_help_panel=LOOK)(runs.show)
app.command("plot", rich_help_panel=LOOK)(runs.plot)
app.add_typer(snapshot.app, name="snapshot", rich_help_panel=LOOK)
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
