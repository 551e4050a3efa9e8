"""The training process's end of the line to whoever steers it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from aetheria.loom.messages import Point

__all__ = ["Line", "NoLine"]


class Line(Protocol):
    """What a run says through, and is told through: `aetheria.loom.link.Link`, or nobody."""

    word: memoryview

    def take(self) -> list[bytes]:
        """Returns the commands that have arrived."""
        ...

    def tell(self, kind: Any, data: bytes) -> None:
        """Says something: "ack", "event" or "status", in JSON."""
        ...

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Says the metrics of a step."""
        ...

    def hand_over(self, points: list[Point]) -> None:
        """Says the metrics in a list, and takes them out of it; another thread may append to it meanwhile."""
        ...

    def beat(self, step: int) -> None:
        """Says that the training is alive, and so far."""
        ...

    def tend(self) -> None:
        """Looks after whatever is at the other end."""
        ...

    def close(self, timeout: float = 5.0) -> int:
        """Delivers what is queued; returns how much could not be."""
        ...


class NoLine:
    """Nobody is at the other end."""

    def __init__(self) -> None:
        self.word = memoryview(bytes(8)).cast("Q")

    def take(self) -> list[bytes]:
        return []

    def tell(self, kind: Any, data: bytes) -> None:
        pass

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def hand_over(self, points: list[Point]) -> None:
        points.clear()

    def beat(self, step: int) -> None:
        pass

    def tend(self) -> None:
        pass

    def close(self, timeout: float = 5.0) -> int:
        return 0
