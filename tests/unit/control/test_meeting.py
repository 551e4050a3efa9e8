"""Whether a process is one of several ranks: what the environment says, and what torch's process group says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aetheria.control.meeting import Place, launched_place


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, Place(3, 4)),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0"}, Place(1, 2)),  # started by Lightning
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, None),  # which of the two that is, nobody says
        ({"WORLD_SIZE": "two", "RANK": "0"}, None),
        ({"WORLD_SIZE": "2"}, None),
    ],
)
def test_what_the_environment_says(environment: dict[str, str], place: Place | None) -> None:
    assert launched_place(environment) == place


def test_a_loop_without_torch_is_steered_without_torch() -> None:
    """Whoever has one process pays nothing for there being others elsewhere."""
    program = (
        "import sys, tempfile\n"
        "from aetheria import Weavelet\n"
        "with Weavelet(hub='off', runs_dir=tempfile.mkdtemp()) as weavelet:\n"
        "    for _ in range(3):\n"
        "        weavelet.step()\n"
        "    assert weavelet.world_size == 1\n"
        "found = {'torch', 'aetheria.control.joined_ranks', 'aetheria.control.agreement'} & set(sys.modules)\n"
        "sys.exit(', '.join(found) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
