"""What is said on the wire: every command there and back, and whatever else arrives is refused in words."""

from __future__ import annotations

import importlib.util
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aetheria.errors import CommandError
from aetheria.protocol import (
    COMMAND_BYTES,
    OPERATIONS,
    AnyCommand,
    Outcome,
    Set,
    command_of,
    decode_command,
    encode,
)

ARGUMENTS: dict[str, dict[str, Any]] = {
    "set": {"values": {"learning_rate": 1e-4}},
    "run_for": {"steps": 5},
    "rewind": {"step": 5},
    "note": {"text": "hello"},
    "health": {"check": "activations"},
    "snapshot": {"name": "mine", "pinned": True},
    "stop": {"snapshot": False},
}
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def some(op: str, **fields: Any) -> AnyCommand:
    return command_of(op, ARGUMENTS.get(op), **fields)


def raw(**fields: Any) -> bytes:
    return json.dumps({"op": "set", "id": "0123456789abcdef", "args": {"values": {"a": 1}}} | fields).encode()


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_command_comes_back_as_it_was(op: str) -> None:
    command = some(op, run="a-run", author="ana", reason="plateau", expect_revision=3, not_after_step=100, dry_run=True)
    assert decode_command(encode(command)) == command
    assert command.op_name == op
    assert json.loads(encode(command))["op"] == op


def test_every_command_has_an_id_of_its_own() -> None:
    assert len({some("ping").id for _ in range(100)}) == 100


def test_what_a_replay_must_do_again_is_said_by_the_command() -> None:
    assert {op for op, kind in OPERATIONS.items() if kind.changes_training} == {"set", "stop", "rewind", "validate"}


@settings(max_examples=50)  # most of the time goes into inventing them
@given(values=st.dictionaries(st.text(min_size=1), json_values, min_size=1, max_size=4))
def test_values_come_back_as_they_were(values: dict[str, Any]) -> None:
    command = decode_command(encode(command_of("set", {"values": values})))
    assert isinstance(command, Set)
    assert command.args.values == values


@given(data=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_whatever_arrives_is_a_command_or_is_refused(data: bytes) -> None:
    with pytest.raises(CommandError, match="not a command of version 1"):
        decode_command(data)


@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_flipped_byte_is_still_a_command_or_is_refused(place: int, byte: int) -> None:
    data = bytearray(raw(reason="why", created=1.5))
    data[place % len(data)] = byte
    with suppress(CommandError):  # and nothing else
        decode_command(bytes(data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (raw(op="explode"), "explode"),
        (raw(args={"values": {}}), "at least one knob"),
        (raw(args={"values": {"a": 1}, "value": 2}), "value"),
        (raw(args=[]), "array"),
        (raw(colour="red"), "unknown field `colour`"),
        (raw(id="short"), "8 to 64 letters, digits and dashes"),
        (raw(id="x" * 65), "8 to 64"),
        (raw(id="../../../etc"), "8 to 64"),
        (raw(id=12345678), "Expected `str`"),
        (raw(expect_revision=1.5), "expect_revision"),
        (raw(dry_run="yes"), "dry_run"),
        (raw(reason="x" * COMMAND_BYTES), "at most 65,536 are allowed"),
        (raw() + raw(), "trailing characters"),
        (raw()[:-1], "truncated"),
        (raw().replace(b"1}", b"NaN}"), "malformed"),
        (raw().replace(b"1}", b"1e999}"), "out of range"),
        (raw().replace(b"1}", b"[" * 30_000 + b"]" * 30_000 + b"}"), "recursion"),
        (raw().replace(b"1}", b"[" * 100 + b"]" * 100 + b"}"), "deeper than 32 levels"),
        (raw(op="run_for", args={"steps": 0}), "greater than 0"),
        (raw(op="run_for", args={}), "either steps or epochs"),
        (raw(op="run_for", args={"steps": 1, "epochs": 1}), "either steps or epochs"),
        (raw(op="note", args={"text": " \n"}), "needs a text"),
        (raw(op="health", args={"check": "mood"}), "mood"),
        (raw(op="rewind", args={}), "step"),
        (b"", "truncated"),
        (b"[]", "Expected `object`"),
        (b"\xff\xfe", "version 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(data: bytes, message: str) -> None:
    with pytest.raises(CommandError) as told:
        decode_command(data)
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("op", "args", "fields", "message"),
    [
        ("sett", {}, {}, "there is no operation 'sett'. There are: set, pause"),
        ("set", None, {}, "args"),
        ("set", {"values": {"a": 1}}, {"author": 5}, "author"),
        ("set", {"values": {"a": 1}}, {"nonsense": 5}, "nonsense"),
        ("ping", None, {"created": math.nan}, "seconds since 1970"),
    ],
)
def test_building_one_is_checked_alike(
    op: str, args: dict[str, Any] | None, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(CommandError) as told:
        command_of(op, args, **fields)
    assert message in str(told.value)


@pytest.mark.parametrize(("value", "name"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_what_json_has_no_number_for_does_not_become_null(value: float, name: str) -> None:
    command = command_of("set", {"values": {"max_grad_norm": value, "list": [1.0, {"inner": value}]}})
    assert isinstance(command, Set)
    assert command.args.values == {"max_grad_norm": name, "list": [1.0, {"inner": name}]}
    assert decode_command(encode(command)) == command


def test_an_outcome_says_whether_it_is_the_last_word() -> None:
    last = {
        state
        for state in ("received", "accepted", "rejected", "applied", "failed")
        if Outcome(command="x", state=state).is_final
    }
    assert last == {"rejected", "applied", "failed"}


def test_the_documents_say_what_the_code_says() -> None:
    folder = Path(__file__).parents[2] / "docs"
    spec = importlib.util.spec_from_file_location("make_protocol", folder / "make_protocol.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, written in module.PAGES.items():
        page = (folder / name).read_text(encoding="utf-8")
        assert module.page_with(page, written()) == page, "run: make docs"


def test_a_newer_hub_may_tell_more_in_an_outcome() -> None:
    content = {"command": "12345678", "state": "applied", "a_field_of_tomorrow": 1}
    assert msgspec.json.decode(json.dumps(content), type=Outcome).state == "applied"
