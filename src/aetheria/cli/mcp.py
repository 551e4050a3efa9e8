"""`aetheria mcp`: an agent looks at runs, and steers them where it may."""

from __future__ import annotations

from typing import Annotated

import typer

from aetheria.cli._errors import errors_told


@errors_told()
def mcp(
    allow_commands: Annotated[
        bool, typer.Option("--allow-commands", help="Let the agent command runs, not only look.")
    ] = False,
    limits: Annotated[
        list[str] | None,
        typer.Option("--limit", metavar="KNOB<=NUMBER", help="What it may set a knob to; may be repeated."),
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", metavar="N", min=0, help="How many commands it may send.")
    ] = None,
    name: Annotated[str, typer.Option("--name", metavar="TEXT", help="Who it is, for the journal.")] = "agent",
) -> None:
    """Serve an agent through standard input and output (Model Context Protocol)."""
    from aetheria.mcp_server import Agent, Limit, make_server

    agent = Agent(
        allow_commands=allow_commands, limits=[Limit.parse(text) for text in limits or ()], budget=budget, name=name
    )
    make_server(agent).run()
