"""`python -m aetheria.weaver`: the hub's process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loguru import logger

from aetheria.client.location import hub_folder
from aetheria.errors import AetheriaError


def main() -> None:
    """Runs the hub; ends with 2 and a sentence where it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m aetheria.weaver", description="Runs the hub of this machine.")
    parser.add_argument("--folder", type=Path, default=None, help="of the hub; in ~/.aetheria by default")
    parser.add_argument("--port", type=int, default=None, help="on 127.0.0.1; the last one by default")
    parser.add_argument("--nats", default=None, metavar="URL", help="of a NATS server that is there already")
    parser.add_argument("--creds", type=Path, default=None, metavar="FILE", help="to log in there with")
    parser.add_argument("--replicas", type=int, default=1, help="servers of it that keep everything; 3 in a cluster")
    given = parser.parse_args()

    logger.remove()
    logger.add(sys.stderr, level="INFO")
    from aetheria.weaver.server import serve  # noqa: PLC0415 - `--help` waits for nothing

    try:
        serve(
            given.folder or hub_folder(),
            port=given.port,
            nats=given.nats,
            credentials=given.creds,
            replicas=given.replicas,
        )
    except AetheriaError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
