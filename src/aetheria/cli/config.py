"""`aetheria config`: what may stand in a configuration, and whether a file is one."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aetheria.cli._errors import errors_told

app = typer.Typer(help="Check a configuration, or print its JSON Schema.", no_args_is_help=True)


class Format(StrEnum):
    """How the resolved configuration is printed."""

    YAML = "yaml"
    JSON = "json"


@app.command()
def schema() -> None:
    """Print the JSON Schema with which an editor completes config.yaml."""
    from aetheria.config import TrainingConfig

    typer.echo(json.dumps(TrainingConfig.json_schema(), indent=2))


@app.command()
@errors_told()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value first; may be repeated.")
    ] = None,
    resolved: Annotated[
        Format | None, typer.Option("--resolved", help="Print the whole configuration, defaults included.")
    ] = None,
) -> None:
    """Say whether FILE can be used, or everything that is wrong with it, line by line."""
    from aetheria.config import TrainingConfig
    from aetheria.yaml_source import dump_yaml

    config = TrainingConfig.from_yaml(file, overrides or ())
    typer.echo(f"{file} is valid", err=resolved is not None)  # what is printed then can be piped into a file
    if resolved is Format.JSON:
        typer.echo(json.dumps(config.resolved(), indent=2))
    elif resolved is Format.YAML:
        typer.echo(dump_yaml(config.resolved()), nl=False)
