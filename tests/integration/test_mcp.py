"""An agent, through the Model Context Protocol, against a real hub and a run that answers."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("mcp.server.mcpserver")

import aetheria
from aetheria.errors import CommandError, ConfigError
from aetheria.mcp_server import Limit
from hub_cases import HubProcess, running_hub, running_trainer, wait_for


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with running_hub(tmp_path_factory.mktemp("hub") / "home") as running:
        yield running


@pytest.fixture(scope="module")
def name(hub: HubProcess) -> Iterator[str]:
    with running_trainer(hub) as run_id:
        with aetheria.connect(hub.url, hub.operator) as connection:
            wait_for(
                lambda: run_id in [run.id for run in connection.runs()] and connection.run(run_id).knobs.schema, "it"
            )
        yield run_id


def converse(hub: HubProcess, arguments: list[str], *calls: tuple[str, dict[str, Any]]) -> tuple[set[str], list[Any]]:
    """Returns the names of the tools, and what came of calling some: data, or the text of an error."""
    from mcp.client import Client
    from mcp.client.stdio import StdioServerParameters

    async def talk() -> tuple[set[str], list[Any]]:
        command = StdioServerParameters(
            command=sys.executable, args=["-m", "aetheria", "mcp", *arguments], env=hub.environment
        )
        async with asyncio.timeout(60), Client(command) as client:
            tools = {tool.name for tool in (await client.list_tools()).tools}
            answers = []
            for tool, given in calls:
                answer = await client.call_tool(tool, given)
                text = "".join(getattr(part, "text", "") for part in answer.content)
                answers.append(text if answer.is_error else json.loads(text))
            return tools, answers

    return asyncio.run(talk())


def test_an_agent_looks_by_default(hub: HubProcess, name: str) -> None:
    tools, (run, curve, error) = converse(
        hub,
        [],
        ("get_run", {"run": "@last"}),
        ("get_metric", {"run": "@last", "name": "loss", "points": 4}),
        ("get_run", {"run": "nobody"}),
    )
    assert tools == {"list_runs", "get_run", "get_metric", "get_journal"}
    assert run["run"]["id"] == name
    assert "learning_rate" in run["knobs"]["schema"]["properties"]
    assert len(curve["steps"]) == len(curve["values"])
    assert "no run called 'nobody'" in error


def test_an_agent_steers_within_its_limits_and_budget(hub: HubProcess, name: str) -> None:
    arguments = ["--allow-commands", "--limit", "learning_rate<=1e-3", "--budget", "2", "--name", "claude"]
    reason = {"run": "@last", "reason": "a test"}
    _, (above, head, tried, done, refused, spent) = converse(
        hub,
        arguments,
        ("set_knobs", reason | {"values": {"learning_rate": 0.5}}),
        ("set_knobs", reason | {"values": {"learning_rate.head": 0.5}}),
        ("set_knobs", reason | {"values": {"learning_rate": 5e-4}, "dry_run": True}),
        ("set_knobs", reason | {"values": {"learning_rate": 5e-4}}),
        ("rewind", reason | {"step": 3}),
        ("pause", reason),
    )
    assert "may set it to a number <= 0.001 only" in above
    assert "learning_rate.head = 0.5 is refused" in head
    assert (tried["state"], done["state"]) == ("accepted", "applied")
    assert "no snapshot of step 3" in refused
    assert "budget of 2 commands is used up" in spent
    with aetheria.connect(hub.url, hub.operator) as connection:
        journal = connection.run(name).journal
    commands = [line.command for line in journal if line.command is not None and line.command.id == done["command"]]
    assert commands[0].author.startswith("claude for ")
    assert commands[0].reason == "a test"


def test_limits_are_read() -> None:
    assert Limit.parse(" learning_rate.head >= -1e-3 ") == ("learning_rate.head", ">=", -1e-3)
    for text in ("learning_rate", "a<=b", "<=1", "a=1"):
        with pytest.raises(ConfigError, match=r"KNOB<=NUMBER"):
            Limit.parse(text)
    limit = Limit.parse("a<1")
    limit.check({"a": 0.5, "ab": 3, "b": "x"})
    for value in (1, True, "0.5", float("nan"), None):
        with pytest.raises(CommandError, match="a = "):
            limit.check({"a": value})
