"""What is said between a run and those who steer it: commands, outcomes, reports. JSON on the wire, checked on arrival.

The major version stands in the subject (`weave.v1.<run>.cmd`); within it fields are only ever added, with a default.
"""

from __future__ import annotations

import math
import time
import uuid
from typing import Any, ClassVar, Literal

import msgspec

from aetheria.errors import CommandError

__all__ = [
    "COMMAND_BYTES",
    "OPERATIONS",
    "VERSION",
    "AnyCommand",
    "Command",
    "Health",
    "Note",
    "Outcome",
    "Pause",
    "Ping",
    "Resume",
    "Rewind",
    "RunFor",
    "Set",
    "Snapshot",
    "Stop",
    "Test",
    "Validate",
    "command_of",
    "decode_command",
    "encode",
    "json_numbers",
]

VERSION = 1
COMMAND_BYTES = 64 * 1024  # an encoded command may not be longer
DEPTH = 32  # nor its values nested deeper

State = Literal["received", "accepted", "rejected", "applied", "failed"]
FINAL: frozenset[State] = frozenset({"rejected", "applied", "failed"})


def _new_id() -> str:
    return uuid.uuid4().hex


class Command(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag_field="op"):
    """A typed request. What every one of them has.

    Attributes:
        run: the run that it is for.
        id: the idempotency key: the same id twice has one effect.
        author: who asks.
        reason: why.
        created: when it was made, in seconds since 1970. For people; nothing is decided by a clock.
        expect_revision: compare and swap: refused unless the run's revision is exactly this.
        not_after_step: refused if the run is past this step when it arrives.
        dry_run: only say whether it would be accepted.
    """

    run: str = ""
    id: str = msgspec.field(default_factory=_new_id)
    author: str = ""
    reason: str = ""
    created: float = msgspec.field(default_factory=time.time)
    expect_revision: int | None = None
    not_after_step: int | None = None
    dry_run: bool = False

    changes_training: ClassVar[bool] = False  # whether a replay must do it again, to get the same weights

    @property
    def op_name(self) -> str:
        """The operation, for instance "set"."""
        return str(self.__struct_config__.tag)


class NoArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing to say beside the operation."""


class SetArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """New values by knob; all are taken, or none."""

    values: dict[str, Any]


class StopArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether to take a snapshot at the end."""

    snapshot: bool = True


class RunForArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far to go before pausing: exactly one of the two."""

    steps: int | None = None
    epochs: int | None = None


class SnapshotArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A name for people, and whether it must be kept for ever."""

    name: str = ""
    pinned: bool = False


class RewindArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The snapshot to go back to, by its step."""

    step: int


class NoteArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Text that is shown on the curves."""

    text: str


class HealthArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to look into."""

    check: Literal["numerics", "activations", "throughput", "determinism", "ranks"] = "numerics"


class Set(Command, tag="set", frozen=True):
    """Gives knobs new values, all or none."""

    args: SetArguments
    changes_training: ClassVar[bool] = True


class Pause(Command, tag="pause", frozen=True):
    """Waits at the next boundary until `Resume`."""

    args: NoArguments = NoArguments()


class Resume(Command, tag="resume", frozen=True):
    """Goes on after a pause."""

    args: NoArguments = NoArguments()


class Stop(Command, tag="stop", frozen=True):
    """Ends the run at the next boundary."""

    args: StopArguments = StopArguments()
    changes_training: ClassVar[bool] = True


class RunFor(Command, tag="run_for", frozen=True):
    """Goes on for so many steps or epochs, and pauses then."""

    args: RunForArguments


class Snapshot(Command, tag="snapshot", frozen=True):
    """Takes a snapshot at this boundary."""

    args: SnapshotArguments = SnapshotArguments()


class Rewind(Command, tag="rewind", frozen=True):
    """Goes back to a snapshot; the journal keeps what was, and what comes."""

    args: RewindArguments
    changes_training: ClassVar[bool] = True


class Validate(Command, tag="validate", frozen=True):
    """Validates at this boundary. Early stopping looks at it, so that a replay must do it too."""

    args: NoArguments = NoArguments()
    changes_training: ClassVar[bool] = True


class Test(Command, tag="test", frozen=True):
    """Evaluates on the test data at this boundary."""

    args: NoArguments = NoArguments()


class Note(Command, tag="note", frozen=True):
    """Writes a note about this step."""

    args: NoteArguments


class Health(Command, tag="health", frozen=True):
    """Looks into the run's health, without changing it."""

    args: HealthArguments = HealthArguments()


class Ping(Command, tag="ping", frozen=True):
    """Asks for a sign of life."""

    args: NoArguments = NoArguments()


AnyCommand = Set | Pause | Resume | Stop | RunFor | Snapshot | Rewind | Validate | Test | Note | Health | Ping
OPERATIONS: dict[str, type[Command]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (Set, Pause, Resume, Stop, RunFor, Snapshot, Rewind, Validate, Test, Note, Health, Ping)
}


class Outcome(msgspec.Struct, kw_only=True, frozen=True):
    """What became of a command, so far. The last state of a command is "rejected", "applied" or "failed".

    Attributes:
        command: the command's id.
        run: the run.
        state: how far it got.
        step: the optimiser steps taken when it got there; for "applied" the step at which it took effect.
        epoch: the epoch then, from 0.
        window: the windows of that epoch that lay behind, dropped ones included. Epoch and window name a boundary:
            a step alone does not, for a dropped window and the end of an epoch do not move it.
        revision: of the run, afterwards: it grows by one with everything that changes the training.
        message: why it was rejected or failed; what else there is to know.
        result: what it found out or changed: `before` and `after` of a set, the metrics of a validation.
        digest: a fingerprint of the weights at that step, where the command changed the training.
        time: when, in seconds since 1970.
    """

    command: str
    state: State
    run: str = ""
    step: int = 0
    epoch: int = 0
    window: int = 0
    revision: int = 0
    message: str = ""
    result: dict[str, Any] = {}
    digest: str = ""
    time: float = msgspec.field(default_factory=time.time)

    @property
    def is_final(self) -> bool:
        """Whether this is the last word on the command."""
        return self.state in FINAL


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(AnyCommand)


def encode(message: Any) -> bytes:
    """Returns a message as JSON."""
    return _encoder.encode(message)


def decode_command(data: bytes) -> AnyCommand:
    """Returns the command that the bytes say.

    Raises:
        CommandError: oversized, malformed, an unknown operation, or arguments that do not belong together.
    """
    if len(data) > COMMAND_BYTES:
        raise CommandError(f"the command has {len(data):,} bytes; at most {COMMAND_BYTES:,} are allowed.")
    try:
        command = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CommandError(f"this is not a command of version {VERSION}: {error}.") from error
    return _checked(command)


def command_of(op: str, args: dict[str, Any] | None = None, **fields: Any) -> AnyCommand:
    """Builds a command, with the same checks as when one arrives.

    Args:
        op: the operation, for instance "set".
        args: its arguments, for instance `{"values": {"learning_rate": 1e-4}}`.
        **fields: of `Command`: run, author, reason, ...

    Raises:
        CommandError: unknown operation, unknown or missing arguments.
    """
    if op not in OPERATIONS:
        raise CommandError(f"there is no operation '{op}'. There are: {', '.join(OPERATIONS)}.")
    try:
        return _checked(msgspec.convert({"op": op, **fields} | ({"args": args} if args else {}), AnyCommand))
    except msgspec.ValidationError as error:
        raise CommandError(f"{op}: {error}.") from error


def _checked(command: AnyCommand) -> AnyCommand:
    if not 8 <= len(command.id) <= 64 or not command.id.replace("-", "").isalnum():
        raise CommandError(f"the id {command.id!r} is not one: 8 to 64 letters, digits and dashes are expected.")
    if not math.isfinite(command.created):
        raise CommandError("created must be a time in seconds since 1970.")
    if isinstance(command, RunFor):
        given = [count for count in (command.args.steps, command.args.epochs) if count is not None]
        if len(given) != 1 or given[0] <= 0:
            raise CommandError("run_for takes either steps or epochs, a number greater than 0.")
    if isinstance(command, Set):
        if not command.args.values:
            raise CommandError("set needs at least one knob and its value.")
        _check_depth(command.args.values)
        if (named := json_numbers(command.args.values)) != command.args.values:
            return msgspec.structs.replace(command, args=SetArguments(named))
    if isinstance(command, Note) and not command.args.text.strip():
        raise CommandError("note needs a text.")
    return command


def json_numbers(value: Any) -> Any:
    """Returns JSON data with NaN and the infinities by their names; JSON would make null of them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: json_numbers(item) for key, item in value.items()}
    return [json_numbers(item) for item in value] if isinstance(value, list | tuple) else value


def _check_depth(value: Any, left: int = DEPTH) -> None:
    if left < 0:
        raise CommandError(f"a value is nested deeper than {DEPTH} levels, which nothing that can be set is.")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _check_depth(item, left - 1)
