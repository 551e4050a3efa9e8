"""The hub's database and its live feed."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aetheria.errors import HubError
from aetheria.protocol import AnyCommand, Outcome, command_of
from aetheria.weaver import schema
from aetheria.weaver import store as store_module
from aetheria.weaver.feed import Feed
from aetheria.weaver.store import KnobState, Message, Part, Request, Store, StoredRun


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "hub.db")
    yield opened
    opened.close()


def command(op: str = "ping", args: dict[str, Any] | None = None, **fields: Any) -> AnyCommand:
    return command_of(op, args, run="digits", **fields)


def outcome(of: AnyCommand, state: Any, **fields: Any) -> Outcome:
    return Outcome(command=of.id, state=state, run="digits", **fields)


def test_everything_is_there_again_when_it_is_opened_anew(store: Store) -> None:
    run = StoredRun("digits@a", "/runs/digits@a", "here", 7, 1.0, 2.0, 3, "digits", "a", ["cpu", "cuda:0"])
    sent = command("set", {"values": {"learning_rate": 0.5, "name": "ä"}})
    store.register(run)
    store.seen([run._replace(step=9, last_seen=5.0)])
    store.set_knobs("digits", KnobState({"type": "object"}, {"learning_rate": None}, 3, 6.0))
    store.accept(sent, 1.0)
    store.delivered(sent.id, "published")
    store.add_outcome("digits", outcome(sent, "applied", step=4, result={"after": {"learning_rate": 0.5}}))
    other = Store(store.path)
    assert other.runs() == [run._replace(step=9, last_seen=5.0)]
    assert other.knobs("digits") == KnobState({"type": "object"}, {"learning_rate": None}, 3, 6.0)
    assert other.knobs("nobody") is None
    assert other.desired("digits") == {"learning_rate": 0.5, "name": "ä"}
    assert other.command(sent.id) == sent
    assert other.delivery(sent.id) == "published"
    assert other.commands("digits", 5) == [sent]
    answer = other.outcome("digits", sent.id)
    assert answer is not None
    assert (answer.state, answer.step) == ("applied", 4)
    assert other.feed_range() == (1, 1)
    other.close()


def test_a_request_to_several_replicas_is_kept_whole_or_not_at_all(store: Store) -> None:
    request = Request(command(), ["a", "b"], [Part("a", "digits@a", "a" * 8), Part("b", "digits@b", "b" * 8)])
    sent = command_of("ping", run="digits@a", id="a" * 8)
    refused = Outcome(command="b" * 8, state="rejected", run="digits@b")
    [message] = store.accept_all(request, [sent], [refused], 1.0)
    assert (message.run, message.type) == ("digits@b", "outcome")
    assert store.request(request.command.id) == request
    assert store.request("c" * 8) is None
    assert store.unanswered() == [sent]
    assert store.outcome("digits@b", "b" * 8) == refused
    assert store.commands_of(["digits@a", "digits@b"], 5) == store.commands("digits@a", 5) == [sent]
    other = Request(command(), [], [Part("a", "digits@a", "a" * 8)])
    with pytest.raises(sqlite3.IntegrityError):
        store.accept_all(other, [sent], [], 1.0)
    assert store.request(other.command.id) is None


def test_a_file_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "hub.db") as connection:
        connection.executescript(schema._FIRST)
        connection.execute("PRAGMA user_version = 1")
        connection.execute("INSERT INTO runs VALUES ('digits', '/runs/digits', 'here', 7, 1.0, 2.0, 3)")
        connection.execute("INSERT INTO runs VALUES ('other', '/runs/other', 'here', 8, 0.5, 2.0, 3)")
        connection.execute("INSERT INTO replicas VALUES ('digits', 'digits', 'here', 7, '[\"cuda:0\"]', 2.0)")
    connection.close()
    for _ in range(2):
        store = Store(tmp_path / "hub.db")
        assert store.runs() == [
            StoredRun("digits", "/runs/digits", "here", 7, 1.0, 2.0, 3, "", "", ["cuda:0"]),
            StoredRun("other", "/runs/other", "here", 8, 0.5, 2.0, 3, "", "", []),
        ]
        store.close()


def test_a_refused_value_is_not_desired(store: Store) -> None:
    first, second = (command("set", {"values": {"a": value}}) for value in (1, 2))
    for sent in (first, second):
        store.accept(sent, 1.0)
    store.add_outcome("digits", outcome(first, "rejected"))
    assert store.desired("digits") == {"a": 2}
    store.add_outcome("digits", outcome(second, "failed"))
    assert store.desired("digits") == {}
    store.accept(command("set", {"values": {"a": 3}}, dry_run=True), 1.0)
    assert store.desired("digits") == {}


def test_an_outcome_that_comes_twice_is_told_once(store: Store) -> None:
    sent = command()
    accepted = outcome(sent, "accepted")
    assert store.add_outcome("digits", accepted) is not None
    assert store.add_outcome("digits", accepted) is None
    store.add_outcome("digits", outcome(sent, "applied"))
    store.add_outcome("digits", outcome(sent, "accepted", step=1))  # late: what is final stays so
    newest = store.outcome("digits", sent.id)
    assert newest is not None
    assert newest.state == "applied"


def test_what_nobody_answered_is_known_in_its_order(store: Store) -> None:
    sent = [command() for _ in range(4)]
    for each in sent:
        store.accept(each, time.time())
    store.delivered(sent[1].id, "unconfirmed")
    store.delivered(sent[2].id, "published")
    store.add_outcome("digits", outcome(sent[3], "accepted"))
    assert store.unanswered() == [sent[0], sent[2]]


def test_the_feed_is_bounded_and_its_numbers_never_come_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FEED_LENGTH", 100)
    for index in range(2000):
        store.append("digits", "event", f"{index}", 0.0)
    assert store.feed_range() == (1901, 2000)
    assert [message.data for message in store.newest("digits", "event", 2)] == ["1998", "1999"]


def test_a_file_of_a_newer_version_and_one_that_is_none_are_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "newer.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(HubError, match="newer version"):
        Store(tmp_path / "newer.db")
    (tmp_path / "none.db").write_bytes(b"this is not a database, and long enough to be seen as none" * 20)
    with pytest.raises(HubError, match="Move it away"):
        Store(tmp_path / "none.db")


# --- the live feed ---------------------------------------------------------------------------------------------------


async def take(feed: Feed, count: int, since: int | None = None, run: str | None = None) -> list[Message]:
    found: list[Message] = []
    async with asyncio.timeout(30.0):
        follower = feed.follow(since, run)
        async for messages in follower:
            found += messages
            if len(found) >= count:
                await follower.aclose()  # type: ignore[attr-defined]
                break
    return found


def test_a_follower_gets_what_comes_and_what_it_missed(store: Store) -> None:
    async def scenario() -> None:
        feed = Feed(store)
        for index in range(5):
            feed.say("digits", "event", {"index": index})
        assert [message.seq for message in await take(feed, 4, since=2)] == [2, 3, 4, 5]
        waiting = asyncio.create_task(take(feed, 2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        feed.say("other", "event", {})
        assert [message.type for message in await waiting] == ["hello", "event"]
        assert [message.run for message in await take(feed, 2, since=0, run="other")] == ["other", "other"]

    asyncio.run(scenario())


def test_a_follower_that_was_away_for_too_long_is_told_how_much_it_missed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "FEED_LENGTH", 10)

    async def scenario() -> None:
        feed = Feed(store)
        for _ in range(1000):
            feed.say("digits", "event", {})
        hello, first, *_ = await take(feed, 2, since=900)
        assert hello.data == '{"missed":90}'
        assert first.seq == 991
        assert (await take(feed, 1, since=5000))[0].seq == 1000  # of another hub's numbers: it begins now

    asyncio.run(scenario())


def test_a_slow_follower_sees_the_newest_state_only(store: Store) -> None:
    async def scenario() -> None:
        feed = Feed(store)
        for step in range(100):
            feed.show("digits", "metrics", {"loss": (step, float("nan"))})
        _, state = await take(feed, 2)
        assert (state.seq, state.data) == (0, '{"loss":[99,null]}')

    asyncio.run(scenario())


def test_messages_too_old_for_the_memory_come_from_the_database(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(30):
        store.append("digits", "event", "{}", 0.0)
    monkeypatch.setattr("aetheria.weaver.feed._RECENT", 10)
    feed = Feed(store)
    assert [message.seq for message in feed.after(5, 100)] == list(range(6, 31))
    assert [message.seq for message in feed.after(25, 3)] == [26, 27, 28]
