"""How a command ends when something goes wrong: told in a sentence, or with the traceback of the user's own code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from aetheria.errors import AetheriaError

__all__ = ["errors_told", "tracebacks_kept"]


@contextmanager
def errors_told() -> Iterator[None]:
    """Ends the command with the error's message on standard error and exit code 2. Also a decorator of commands.

    Only an `AetheriaError` is told so: its message was written for the user. Everything else passes through.
    """
    try:
        yield
    except AetheriaError as error:
        for line in (error, *getattr(error, "__notes__", ())):
            typer.echo(line, err=True)
        raise typer.Exit(2) from None


@contextmanager
def tracebacks_kept() -> Iterator[None]:
    """Shows the traceback of what the user's model, data or callback raised, and ends the command with exit code 1.

    Python does the same for most exceptions. But typer takes an `EOFError` for a closed terminal and a broken pipe for
    a reader that has left, and would end without a word; from a data set or a worker process they mean something else.
    """
    try:
        yield
    except (EOFError, OSError) as error:
        sys.excepthook(type(error), error, error.__traceback__)
        raise typer.Exit(1) from error
