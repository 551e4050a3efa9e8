"""The live feed: what happens, in one numbered order, for everybody who watches; whoever was away catches up."""

from __future__ import annotations

import asyncio
import bisect
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from aetheria.weaver.store import Message, Store

__all__ = ["Feed", "message_text"]

_RECENT = 4096  # messages kept in memory; older ones are read from the database
_STATE_INTERVAL = 0.1  # seconds between two showings of what is only ever shown newest


def message_text(message: Message) -> str:
    """Returns a message as it goes over the WebSocket."""
    line = {"seq": message.seq, "run": message.run, "type": message.type, "time": message.time}
    return msgspec.json.encode(line | {"data": msgspec.Raw(message.data.encode())}).decode()


class Feed:
    """Numbered messages, kept; and beside them the newest state of what changes too often to be kept.

    Nothing is queued for a follower: each has a place in the one feed, and one that is slow reads on from there. So no
    follower can fill the hub's memory, and none loses a message that is still kept.
    """

    def __init__(self, store: Store, group_of: Callable[[str], str] = lambda run: "") -> None:
        """Goes on behind what the store has.

        Args:
            store: keeps the messages.
            group_of: returns the run that a replica belongs to; "" for any other run.
        """
        self._store = store
        self._group_of = group_of
        self._first, self.last = store.feed_range()
        self._recent: deque[Message] = deque(store.feed(self.last - _RECENT, _RECENT), maxlen=_RECENT)
        self._states: dict[tuple[str, str], tuple[int, float, Any]] = {}
        self._version = 0
        self._followers: set[asyncio.Event] = set()

    def publish(self, message: Message) -> None:
        """Tells a message that the store has kept."""
        self._recent.append(message)
        self.last = message.seq
        self._wake()

    def say(self, run: str, kind: str, data: Any, when: float | None = None) -> None:
        """Keeps a message, and tells it."""
        text = msgspec.json.encode(data).decode()
        self.publish(self._store.append(run, kind, text, time.time() if when is None else when))

    def show(self, run: str, kind: str, data: Any) -> None:
        """Shows a state: who is slow sees the newest one only. It is written down when somebody looks."""
        self._version += 1
        self._states[run, kind] = self._version, time.time(), data
        self._wake()

    def _wake(self) -> None:
        for follower in self._followers:
            follower.set()

    def after(self, seq: int, limit: int) -> list[Message]:
        """Returns messages behind a sequence number."""
        if seq >= self.last:
            return []
        if self._recent and seq >= self._recent[0].seq - 1:
            start = bisect.bisect_right(self._recent, seq, key=lambda message: message.seq)
            return [self._recent[index] for index in range(start, min(start + limit, len(self._recent)))]
        return self._store.feed(seq, limit)

    def _concerns(self, run: str | None, of: str) -> bool:
        return run in (None, of) or (run != "" and run == self._group_of(of))

    async def follow(self, since: int | None, run: str | None = None) -> AsyncIterator[list[Message]]:
        """Yields messages as they come, and never ends.

        The first one is of type "hello": from which number on the follower is told, and how many messages are missing
        because it was away for too long.

        Args:
            since: the last number that the follower has; without it, the feed begins now.
            run: only what concerns this run, or any of its replicas.
        """
        first, _ = self._store.feed_range()
        cursor = self.last if since is None else max(min(since, self.last), first - 1)
        missed = 0 if since is None else max(cursor - since, 0)
        hello = msgspec.json.encode({"missed": missed}).decode()
        yield [Message(cursor, run or "", "hello", time.time(), hello)]
        wake = asyncio.Event()
        self._followers.add(wake)
        seen, next_states = 0, 0.0
        try:
            while True:
                wake.clear()
                if news := self.after(cursor, 500):
                    cursor = news[-1].seq
                    if wanted := [message for message in news if self._concerns(run, message.run)]:
                        yield wanted
                    continue
                now = time.monotonic()
                if self._version > seen and now >= next_states:
                    wanted = [
                        Message(0, of, kind, when, msgspec.json.encode(data).decode())
                        for (of, kind), (version, when, data) in self._states.items()
                        if version > seen and self._concerns(run, of)
                    ]
                    seen, next_states = self._version, now + _STATE_INTERVAL
                    if wanted:
                        yield wanted
                    continue
                try:
                    async with asyncio.timeout(next_states - now if self._version > seen else None):
                        await wake.wait()
                except TimeoutError:
                    continue  # it is time for the states
        finally:
            self._followers.discard(wake)
