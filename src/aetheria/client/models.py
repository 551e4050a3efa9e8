"""What a hub's clients hold: the state of a run, its knobs, what happens, and what can go wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import msgspec

from aetheria.errors import CommandError, HubError
from aetheria.protocol import Outcome

__all__ = [
    "ENDED",
    "CommandOptions",
    "CommandRefusedError",
    "Event",
    "KnobValues",
    "LastPoint",
    "NoAnswerError",
    "ReplicaOutcome",
    "ReplicasRefusedError",
    "RunStatus",
    "allowed_in_words",
    "settled",
]

ENDED = frozenset({"completed", "failed", "interrupted", "killed", "stopped"})  # a run of such a status trains no more


class CommandRefusedError(CommandError):
    """A command that the run rejected, or that failed there.

    Attributes:
        outcome: what the run said.
    """

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


class NoAnswerError(HubError, TimeoutError):
    """A command that the run did not finish in time. It stands: the run may still carry it out.

    Attributes:
        command: the id under which to ask again.
        outcome: how far it got; None where the run has not said anything.
    """

    def __init__(self, message: str, command: str, outcome: Outcome | None) -> None:
        super().__init__(message)
        self.command = command
        self.outcome = outcome


class ReplicaOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a command to several replicas, of one of them.

    Attributes:
        replica: its id.
        run: by which name it is addressed alone.
        command: the id of its own command, which follows from that of the request.
        outcome: how far it got; None where the replica has not said anything.
        problem: why it is not known, where that is known.
    """

    replica: str
    run: str
    command: str
    outcome: Outcome | None = None
    problem: str = ""

    def settled(self, dry_run: bool) -> bool:
        """Returns whether nothing more is to be waited for."""
        return self.problem != "" or (self.outcome is not None and settled(self.outcome, dry_run))

    def failure(self, op: str, dry_run: bool) -> str:
        """Returns why it has not been done, in words; "" where it has."""
        if self.problem:
            return self.problem
        if self.outcome is None:
            return f"has not said anything yet. The {op} stands, and takes effect at its next boundary."
        if not settled(self.outcome, dry_run):
            return f"has {self.outcome.state} it, and is not done."
        if self.outcome.state in ("rejected", "failed"):
            return self.outcome.message or f"{op} was {self.outcome.state}."
        return ""


class ReplicasRefusedError(CommandError):
    """A command to several replicas that not all of them have carried out. Those that have, have.

    Attributes:
        command: the id under which to ask again, or to send it again.
        outcomes: what each of them said.
    """

    def __init__(self, message: str, command: str, outcomes: Sequence[ReplicaOutcome]) -> None:
        super().__init__(message)
        self.command = command
        self.outcomes = list(outcomes)


class CommandOptions(TypedDict, total=False):
    """What every command may be given.

    Attributes:
        reason: why; stands in the run's journal.
        author: who; user@host by default.
        expect_revision: refuse it unless the run's revision is exactly this.
        not_after_step: refuse it where the run is past this step.
        dry_run: only find out whether it would be accepted.
        timeout: seconds to wait for the final outcome.
        id: the idempotency key; a new one by default.
        replicas: of a run of several replicas, the ids of those that are meant; all of them by default.
    """

    reason: str
    author: str
    expect_revision: int | None
    not_after_step: int | None
    dry_run: bool
    timeout: float
    id: str
    replicas: Sequence[str]


class LastPoint(msgspec.Struct, frozen=True):
    """The newest point of a metric. What is not a finite number is None."""

    step: int
    value: float | None


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A run as the hub sees it.

    Attributes:
        id: its name: that of its folder.
        status: "running", "paused", "silent" (nothing was heard of it for 15 seconds), "completed", "interrupted", ...
        status_detail: why it ended.
        step: optimiser steps taken.
        metrics: the newest point of each metric.
        folder: where it lives.
        host: the machine.
        pid: the training process.
        created: when it was started, in seconds since 1970.
        last_heartbeat: when it was last heard of, in seconds since 1970.
        connected: whether it can be commanded now.
        dropped: records lost on their way, by kind.
        group: the name that it has in common with the other replicas of a run; "" where it has no others.
        replica: which of them it is.
        devices: what it trains on.
        replicas: where it is a run of several replicas, each of them; otherwise none.
    """

    id: str
    status: str
    name: str = ""
    status_detail: str = ""
    step: int = 0
    metrics: dict[str, LastPoint] = {}
    folder: str | None = None
    host: str = ""
    pid: int | None = None
    created: float | None = None
    last_heartbeat: float | None = None
    connected: bool = False
    dropped: dict[str, int] = {}
    group: str = ""
    replica: str = ""
    devices: list[str] = []
    replicas: list[RunStatus] = []


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One message of the live feed.

    Attributes:
        seq: its number; 0 for what is only shown newest ("metrics", "beat").
        run: which run it is about.
        type: "outcome", "event", "knobs", "status", "metrics", "beat"; "missed" where messages were lost.
        time: seconds since 1970.
        data: JSON data; for "metrics" a pair (step, value) by name.
    """

    seq: int
    run: str
    type: str
    time: float
    data: Any


class KnobValues(Mapping[str, Any]):
    """The knobs of a run when they were asked for: a mapping of their observed values.

    Attributes:
        schema: JSON Schema, an object with a property for each knob; empty where the run has not told it yet.
        observed: what the values are.
        desired: what was asked for last, by knob.
        revision: of the run: how often its training has been changed.
    """

    def __init__(
        self, schema: dict[str, Any] | None, observed: dict[str, Any], desired: dict[str, Any], revision: int | None
    ) -> None:
        self.schema = schema or {}
        self.observed = observed
        self.desired = desired
        self.revision = revision

    def __getitem__(self, key: str) -> Any:
        return self.observed[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.observed)

    def __len__(self) -> int:
        return len(self.observed)

    def __repr__(self) -> str:
        return f"KnobValues({self.observed!r}, revision={self.revision})"

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Returns for each knob: its name, value, what is allowed, its unit and what it does."""
        properties: dict[str, Any] = self.schema.get("properties", {})
        found = []
        for key in dict.fromkeys([*properties, *self.observed]):
            about = properties.get(key, {})
            value = json.dumps(self.observed.get(key), ensure_ascii=False)
            found.append((key, value, allowed_in_words(about), about.get("unit", ""), about.get("description", "")))
        return found

    def describe(self) -> str:
        """Returns a Markdown table of the knobs."""
        lines = ["| knob | value | allowed | unit | what it does |", "|---|---|---|---|---|"]
        for key, value, *others in self.rows():
            cells = (f"`{key}`", f"`{value}`", *others)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(lines)


_TYPES = {
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "string": "a text",
    "null": "null",
    "array": "a list",
    "object": "an object",
}


def allowed_in_words(schema: Mapping[str, Any]) -> str:
    """Returns in words what a JSON Schema allows, as far as few words can say it."""
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if "anyOf" in schema:
        return " or ".join(allowed_in_words(alternative) for alternative in schema["anyOf"])
    kind = schema.get("type")
    words = [_TYPES.get(kind, str(kind))] if isinstance(kind, str) else []
    if kind == "array" and isinstance(schema.get("items"), Mapping):
        words.append("each " + allowed_in_words(schema["items"]))
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    words += [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return ", ".join(words)


def settled(outcome: Outcome, dry_run: bool) -> bool:
    """Returns whether an outcome is the last word on a command: for a dry run that is whether it was accepted."""
    return outcome.is_final or (dry_run and outcome.state == "accepted")
