"""Lengths of time: what is taken, and what could mean two things."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from aetheria.config import TrainingConfig
from aetheria.durations import duration_in_words
from aetheria.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (90, 90.0),
        (0.25, 0.25),
        ("45s", 45.0),
        ("90m", 5400.0),
        ("12h", 43200.0),
        ("1h30m", 5400.0),
        ("1d6h30m", 109800.0),
        ("2d1s", 172801.0),
        ("0h5s", 5.0),
    ],
)
def test_seconds_or_whole_units_are_taken(given: Any, seconds: float) -> None:
    assert TrainingConfig(max_time=given).max_time == seconds
    assert TrainingConfig(max_time=given).resolved()["max_time"] == seconds


@pytest.mark.parametrize(
    "given",
    ["", "60", "12:30", "00:12:00:00", "1.5h", "30m1h", "1h1h", "1H", "1 h", " 1h", "1h\n", "1w", "-1h", "0s", "h",
     "\u0661h", "9999999999h", True, [1], {"hours": 1}],
)  # fmt: skip
def test_what_could_mean_two_things_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"max_time: found .*, expected seconds as a number, or a text of whole days"):
        TrainingConfig(max_time=given)


@pytest.mark.parametrize("given", [0, -1, -0.5, math.inf, math.nan, 10**400])
def test_numbers_that_are_no_time_are_refused(given: float) -> None:
    with pytest.raises(ConfigError, match=r"max_time: found .*, expected (more than 0|a finite number|a number)"):
        TrainingConfig(max_time=given)


def test_a_wrong_time_is_named_with_its_line_and_a_right_one_alone_is_an_end(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed: 1\nmax_time: 12:30\n")
    with pytest.raises(ConfigError) as raised:
        TrainingConfig.from_yaml(file)
    assert str(raised.value) == (
        f"{file}:2: max_time: found '12:30' (a string), expected seconds as a number, or a text of whole days, hours, "
        "minutes and seconds such as 90m, 12h or 1d6h30m. Correct it, or leave it out."
    )
    assert TrainingConfig.from_yaml(file, ["max_time=12h30m"]).max_time == 45000.0
    assert TrainingConfig.from_yaml(file, ["max_time=45000"]).max_time == 45000.0


def test_an_editor_knows_both_forms() -> None:
    number, text, null = TrainingConfig.json_schema()["properties"]["max_time"]["anyOf"]
    assert number == {"type": "number", "exclusiveMinimum": 0}
    assert text["type"] == "string"
    assert null == {"type": "null"}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(45, "45s"), (5400.0, "1h30m"), (109800, "1d6h30m"), (2.5, "2.5s"), (0, "0s"), (90061.5, "90061.5s")],
)
def test_in_words(seconds: float, words: str) -> None:
    assert duration_in_words(seconds) == words
