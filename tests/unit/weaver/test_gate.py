"""The gate's parts that need no network; the whole of it is tried in tests/integration/test_weaver.py."""

from __future__ import annotations

import pytest

from aetheria.weaver import gate
from aetheria.weaver.gate import Tickets, TokenBucket


def test_a_bucket_allows_a_burst_and_then_its_rate() -> None:
    now = [0.0]
    bucket = TokenBucket(rate=10.0, burst=3, clock=lambda: now[0])
    assert [bucket.take() for _ in range(3)] == [0.0, 0.0, 0.0]
    assert bucket.take() == pytest.approx(0.1)
    now[0] = 0.1
    assert bucket.take() == 0.0
    assert bucket.take() > 0.0
    now[0] = 1000.0
    assert [bucket.take() for _ in range(4)].count(0.0) == 3  # it never holds more than the burst


def test_a_ticket_opens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tickets = Tickets()
    viewer, operator = tickets.issue("viewer"), tickets.issue("operator")
    assert tickets.redeem("another") is None
    assert tickets.redeem(operator) == "operator"
    assert tickets.redeem(operator) is None
    assert tickets.redeem(viewer) == "viewer"
    monkeypatch.setattr(gate, "TICKET_SECONDS", -1.0)
    assert tickets.redeem(tickets.issue("viewer")) is None
