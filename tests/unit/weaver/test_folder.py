"""The hub's folder: one hub at a time, its port kept, nothing for others to read."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from aetheria.client.location import find_hub, hub_folder, hub_is_running
from aetheria.errors import HubError
from aetheria.weaver.folder import HubFolder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("AETHERIA_HUB_URL", "AETHERIA_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AETHERIA_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def held(home: Path) -> Iterator[HubFolder]:
    folder = HubFolder(hub_folder())
    yield folder
    folder.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_second_hub_is_told_which_process_holds_the_folder(held: HubFolder) -> None:
    with pytest.raises(HubError, match=f"process {os.getpid()}.*aetheria down"):
        HubFolder(held.path)
    assert hub_is_running(held.path)


def test_tokens_and_port_stay_over_a_restart(held: HubFolder) -> None:
    held.bind().close()
    held.close()
    again = HubFolder(held.path)
    assert (again.operator_token, again.viewer_token, again.port) == (
        held.operator_token,
        held.viewer_token,
        held.port,
    )
    assert len({again.operator_token, again.viewer_token}) == 2
    assert min(len(again.operator_token), len(again.viewer_token)) >= 40
    held._lock = again._lock  # the fixture closes it


def test_a_port_that_is_taken_is_named(held: HubFolder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(HubError, match=rf"cannot use port {port}.*--port"):
            held.bind(port)
    with pytest.raises(HubError, match="cannot use port 70000"):
        held.bind(70000)


def test_files_that_others_could_read_are_closed_to_them(held: HubFolder) -> None:
    held.close()
    held.path.chmod(0o755)
    (held.path / "settings.json").write_text("{}")
    (held.path / "settings.json").chmod(0o644)
    umask = os.umask(0)
    try:
        again = HubFolder(held.path)
        again.bind().close()
        again.announce()
    finally:
        os.umask(umask)
    assert mode(held.path) == 0o700
    assert {mode(path) for path in held.path.iterdir()} == {0o600}
    held._lock = again._lock


@pytest.mark.parametrize("content", ["{", "[]", '{"port": "x"}', '{"operator_token": 1}'])
def test_settings_that_do_not_read_are_told(held: HubFolder, content: str) -> None:
    held.close()
    (held.path / "settings.json").write_text(content)
    with pytest.raises(HubError, match=r"settings\.json.*Remove it"):
        HubFolder(held.path)
    held._lock = os.open(held.path, os.O_RDONLY)


# --- finding it ------------------------------------------------------------------------------------------------------


def test_without_a_hub_it_is_said_how_to_start_one(home: Path) -> None:
    with pytest.raises(HubError, match=r"No hub is running\. Start one with: aetheria up"):
        find_hub()


def test_the_address_left_by_a_hub_that_was_killed_is_not_believed(held: HubFolder) -> None:
    held.bind().close()
    held.announce()
    assert find_hub() == (held.url, held.operator_token)
    os.close(held._lock)  # as the kernel does
    with pytest.raises(HubError, match="No hub is running"):
        find_hub()
    held._lock = os.open(held.path, os.O_RDONLY)


def test_a_token_goes_to_the_hub_that_made_it_only(held: HubFolder) -> None:
    held.bind().close()
    held.announce()
    with pytest.raises(HubError, match=r"no token for http://127\.0\.0\.1:1"):
        find_hub("http://127.0.0.1:1")
    assert find_hub("http://127.0.0.1:1/", "secret") == ("http://127.0.0.1:1", "secret")
    assert find_hub(token="secret") == (held.url, "secret")


def test_environment_variables_come_before_the_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AETHERIA_HUB_URL", "http://127.0.0.1:5")
    with pytest.raises(HubError, match="AETHERIA_HUB_TOKEN"):
        find_hub()
    monkeypatch.setenv("AETHERIA_HUB_TOKEN", "secret")
    assert find_hub() == ("http://127.0.0.1:5", "secret")


def test_a_hub_that_has_not_announced_itself_is_just_starting(held: HubFolder) -> None:
    with pytest.raises(HubError, match="just starting"):
        find_hub()
    (held.path / "hub.json").write_text(json.dumps({"url": "x"}))
    with pytest.raises(HubError, match="aetheria down, aetheria up"):
        find_hub()
