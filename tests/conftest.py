"""What every test may count on: one thread, no memory of other tests, nothing of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

# Before anything is imported that looks at them, and for the processes that tests start, too.
os.environ |= {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "COLUMNS": "80", "LINES": "25", "NO_COLOR": "1"}
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job; programs would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["AETHERIA_LIVE"] = "off"  # no test starts a hub but those that are about it
for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "CLICOLOR_FORCE"):  # make typer and rich write colours
    os.environ.pop(name, None)

import pytest
import torch
from hypothesis import settings
from loguru import logger

from aetheria.registry import Registry

settings.register_profile("repository", deadline=None, database=None)  # a busy machine is no failure
settings.load_profile("repository")


def pytest_configure(config: pytest.Config) -> None:
    """Gives the tests a home of their own, and log lines that pytest captures."""
    home = tempfile.TemporaryDirectory(prefix="aetheria-home-")
    config.add_cleanup(home.cleanup)
    os.environ["HOME"] = home.name
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "MPLCONFIGDIR"):
        os.environ.pop(name, None)
    logger.remove()
    # Written to the `sys.stderr` of that moment: pytest exchanges it for every test.
    logger.add(lambda line: sys.stderr.write(line), colorize=False)  # noqa: PLW0108


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves coverage to the unit tests: it costs half the time again, and does not see what other processes do."""
    for item in items:
        if "unit" not in item.path.relative_to(Path(__file__).parent).parts:
            item.add_marker("no_cover")


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system that fills up: of 14 MB, or as large as the test's parameter says."""
    place = tmp_path / "small"
    place.mkdir()
    size = f"size={getattr(request, 'param', '14m')}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(autouse=True)
def _on_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Isolates a test: registered names, threads, the settings of torch and the current directory."""
    directory = Path.cwd()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with Registry.isolated():
        yield
    torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled():  # asking torch to change it imports its compiler
        torch.use_deterministic_algorithms(False)
    os.chdir(directory)
    left = [thread for thread in threading.enumerate() if thread.name.startswith("aetheria-")]
    for thread in left:
        thread.join(30.0)  # one that is just ending
    assert not any(thread.is_alive() for thread in left), f"threads left behind: {left}"
