"""`aetheria init`: a small project that trains at once."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

TEMPLATES = Path(__file__).parent / "templates"


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; must not exist yet, or be empty.")],
) -> None:
    """Write a small project into DIR: configuration, model, data, a test."""
    from aetheria.config import TrainingConfig

    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        found = "a directory that is not empty" if directory.is_dir() else "a file"
        typer.echo(f"{directory}: found {found}, expected nothing there. Choose a new directory.", err=True)
        raise typer.Exit(2)
    shutil.copytree(TEMPLATES, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "gitignore").rename(directory / ".gitignore")  # with its dot, it would act on Aetheria's repository
    schema = json.dumps(TrainingConfig.json_schema(), indent=2)
    (directory / "config.schema.json").write_text(schema + "\n", encoding="utf-8")
    typer.echo(
        f"Your project is in {directory}. Type next:\n\n"
        f"  cd {shlex.quote(str(directory))}\n"
        "  aetheria train config.yaml    # trains it; Ctrl-C stops it with a snapshot\n"
        "  aetheria runs                 # what has been trained, and how well\n"
        "  pytest                        # the project's own test\n\n"
        "The model is in plugins/model.py, the data in plugins/data.py, everything else in config.yaml."
    )
