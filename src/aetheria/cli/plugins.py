"""`aetheria plugins`: the names that a configuration can use."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, get_args

import typer

from aetheria.cli._display import text_console
from aetheria.cli._errors import errors_told


@errors_told()
def plugins(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER", help="A folder of plugins; ./plugins where there is one.", exists=True, file_okay=False
        ),
    ] = None,
) -> None:
    """List what can be named in a configuration: models, data, callbacks, loggers and the like."""
    from rich.table import Table
    from rich.text import Text

    import aetheria.accelerator  # noqa: F401 - registers the devices
    from aetheria.registry import Kind, Registry

    Registry.load_plugins(folder or Path("plugins"))
    console = text_console()
    for kind in get_args(Kind):
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for name in Registry.names(kind):
            table.add_row(name, Text((inspect.getdoc(Registry.get(kind, name)) or "").partition("\n")[0], style="dim"))
        if table.rows:
            console.print(Text(kind, style="bold"))
            console.print(table)
