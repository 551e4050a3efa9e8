"""How things are called on the message server: subjects, streams, consumers, and who may do what with them.

Everything that is said lies under `weave.v1.<run>.`: `cmd` goes to the run, all others come from it. A run's folder may
be called anything; what a subject cannot hold is written as `=` and two hex digits.
"""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import quote, unquote

from aetheria.errors import HubError
from aetheria.protocol import VERSION

__all__ = [
    "ACK_WAIT",
    "COMMANDS",
    "COMMANDS_ON_THE_WAY",
    "METRICS",
    "MIRRORS",
    "PREFIX",
    "REPORTS",
    "consumer_of",
    "inbox_of",
    "permissions_of",
    "subject",
    "token_of",
    "which",
]

PREFIX = f"weave.v{VERSION}"

# One stream for each way of keeping things.
COMMANDS = "WEAVE_COMMANDS"  # on disk, nothing is pushed out
REPORTS = "WEAVE_REPORTS"  # outcomes and events: on disk, the oldest go first
METRICS = "WEAVE_METRICS"  # in memory: run.db has them for good
MIRRORS = "WEAVE_MIRRORS"  # parts of run folders: on disk, the oldest go first; what is missing is sent again

COMMANDS_ON_THE_WAY = 16  # commands that a run may have got and not answered; the region has as many slots
ACK_WAIT = 2.0  # seconds after which a command that nobody speaks for is delivered again

_SUBJECT = re.compile(re.escape(PREFIX) + r"\.([^.]+)\.([a-z]+)")
_LONGEST_TOKEN = 200  # a consumer is kept in a folder that is called like it


def token_of(run: str) -> str:
    """Returns a run's name as one token of a subject.

    Raises:
        HubError: it is empty, or too long.
    """
    # quote leaves [A-Za-z0-9_.~-] alone; a dot separates tokens, and a percent sign is not for every shell and log.
    token = quote(run, safe="", errors="surrogateescape").replace(".", "%2E").replace("~", "%7E").replace("%", "=")
    if not 1 <= len(token) <= _LONGEST_TOKEN:
        raise HubError(
            f"the run's name {run[:40]!r} takes {len(token)} characters on the message server; 1 to {_LONGEST_TOKEN} "
            "are possible. Give its folder a shorter name."
        )
    return token


def subject(run: str, kind: str) -> str:
    """Returns `weave.v1.<run>.<kind>`."""
    return f"{PREFIX}.{token_of(run)}.{kind}"


@lru_cache(maxsize=8192)
def which(name: str) -> tuple[str, str]:
    """Returns the run and the kind that a subject speaks of.

    Raises:
        ValueError: it is none of ours.
    """
    found = _SUBJECT.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is not a subject of {PREFIX}.")
    return unquote(found[1].replace("=", "%"), errors="surrogateescape"), found[2]


def consumer_of(run: str) -> str:
    """Returns the name of the consumer through which a run gets its commands. The hub makes it, the run uses it."""
    return f"run-{token_of(run)}"


def inbox_of(run: str) -> str:
    """Returns where a run gets its answers: nobody else may listen there."""
    return f"_INBOX_{token_of(run)}"


def permissions_of(token: str) -> dict[str, list[str]]:
    """Returns what a run may do: `publish` and `subscribe`, lists of subjects. Everything else is refused.

    It may not make its consumer itself: whoever makes one may have commands delivered to a subject of his choice, such
    as that of another run's commands.

    Args:
        token: of the run, see `token_of`.
    """
    consumer = f"run-{token}"
    return {
        "publish": [
            *(f"{PREFIX}.{token}.{kind}" for kind in ("ack", "metric", "event", "mirror", "hb", "ask")),
            f"$JS.API.CONSUMER.INFO.{COMMANDS}.{consumer}",
            f"$JS.API.CONSUMER.MSG.NEXT.{COMMANDS}.{consumer}",
            f"$JS.ACK.{COMMANDS}.{consumer}.>",
        ],
        "subscribe": [f"_INBOX_{token}.>", f"{PREFIX}.{token}.cmd"],
    }
