"""What the embedded message server is told: its configuration file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from aetheria.loom.subjects import permissions_of

__all__ = ["MEGABYTE", "configuration"]

MEGABYTE = 1 << 20


def configuration(folder: Path, *, port: int, disk: int, memory: int, hub: str, runs: Iterable[tuple[str, str]]) -> str:
    """Returns the text of a nats-server configuration.

    Args:
        folder: where its files lie.
        port: on 127.0.0.1.
        disk: the most bytes of the store.
        memory: the most bytes of streams in memory.
        hub: the public key of the user who may do everything.
        runs: the token and the public key of every run.
    """
    users = [f"    {{nkey: {hub}}}"]
    for token, key in runs:
        permissions = json.dumps(permissions_of(token) | {"allow_responses": False})
        users.append(f"    {{nkey: {key}, permissions: {permissions}}}")
    # json.dumps writes strings as this format reads them.
    return f"""# Written by Aetheria; changes are lost.
server_name: aetheria
listen: "127.0.0.1:{port}"
pid_file: {json.dumps(str(folder / "nats.pid"))}
log_file: {json.dumps(str(folder / "nats.log"))}
logfile_size_limit: 8MB
logfile_max_num: 2
max_payload: 1MB
ping_interval: "5s"
ping_max: 2
write_deadline: "5s"
jetstream {{
  store_dir: {json.dumps(str(folder / "store"))}
  max_file_store: {disk}
  max_memory_store: {memory}
  # What was acknowledged is on the disk: the default is to sync every two minutes.
  sync_interval: always
}}
authorization {{
  users: [
{chr(10).join(users)}
  ]
}}
"""
