"""Addresses of data elsewhere, and what is read there without a server; the rest is in test_remote_shards.py."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from aetheria.data import Shards, write_shards
from aetheria.data.remote import Remote, _may_pass, is_url
from aetheria.errors import DataDamagedError, DataError, MissingDependencyError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_shards([{"number": number} for number in range(100)], tmp_path / "data", block_bytes=200, uid=3)
    return tmp_path / "data"


@pytest.mark.parametrize("place", ["http://host/data", "s3://bucket/data", "memory://data", "zip::s3://bucket/a.zip"])
def test_urls_are_told_from_paths(place: str) -> None:
    assert is_url(place)
    for path in ("data/train", "/data", "C:\\data", "a://b", Path(place), "odd:name", "folder/x://y"):
        assert is_url(path) == (path == "a://b")


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_any_storage_that_fsspec_knows(data: Path, tmp_path: Path, kind: str) -> None:
    url = f"file://{data}"
    if kind == "memory":
        url = "memory://samples"
        memory = fsspec.filesystem("memory")
        for path in data.rglob("*"):
            if path.is_file():
                memory.pipe_file(f"/samples/{path.relative_to(data).as_posix()}", path.read_bytes())
    shards = Shards(url, cache=tmp_path / "cache")
    assert shards.folder == url
    assert shards.columns(np.arange(100))["number"].tolist() == list(range(100))  # type: ignore[union-attr]
    with pytest.raises(DataError, match=rf"{url}/nothing holds no shards: there is no manifest.json"):
        Shards(f"{url}/nothing", cache=tmp_path / "cache")


def test_what_is_gone_is_damage_that_names_the_address(data: Path, tmp_path: Path) -> None:
    shards = Shards(f"file://{data}", cache=tmp_path / "cache")
    shutil.rmtree(data / "shards")
    with pytest.raises(DataDamagedError, match=rf"file://{data}/shards/shard-00000000.arrow is missing"):
        shards[0]


def test_a_part_that_is_too_short_is_told_with_how_often_it_was_read(data: Path) -> None:
    remote = Remote(f"file://{data}", retries=1, timeout=5.0)
    size = (data / "manifest.json").stat().st_size
    assert remote.read("manifest.json", 0, size) == (data / "manifest.json").read_bytes()
    with pytest.raises(DataError, match=rf"bytes 10 to {size}: EOFError: found {size - 10} bytes .* Tried 2 times in"):
        remote.read("manifest.json", 10, size - 9)


def test_secrets_are_not_told(tmp_path: Path) -> None:
    remote = Remote(f"file://somebody:secret@{tmp_path}", retries=0, timeout=5.0)
    assert remote.name == f"file://{tmp_path}"


@pytest.mark.parametrize(("scheme", "package"), [("http", "aiohttp"), ("https", "aiohttp"), ("s3", "s3fs")])
def test_a_package_that_is_missing_is_named(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(MissingDependencyError, match=rf"'{package}', .* pip install 'aetheria\[remote\]'"):
        Remote(f"{scheme}://somewhere/data", retries=0, timeout=5.0)


def test_other_packages_are_named_by_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"cannot read from gs://somewhere: .*gcsfs"):
        Remote("gs://somewhere", retries=0, timeout=5.0)
    with pytest.raises(DataError, match=r"cannot read from nothing://here: .*Check the address"):
        Remote("nothing://here", retries=0, timeout=5.0)
    with pytest.raises(DataError, match="retries is from 0 on, timeout more than 0 seconds; found -1 and 5"):
        Remote("memory://here", retries=-1, timeout=5.0)


def test_what_may_pass() -> None:
    class Answer(Exception):
        status = 0

    for status, passes in (
        (500, True),
        (503, True),
        (429, True),
        (408, True),
        (400, False),
        (403, False),
        (416, False),
    ):
        answer = Answer()
        answer.status = status
        assert _may_pass(answer) == passes
    for error in (TimeoutError(), ConnectionResetError(), EOFError(), OSError(errno.EIO, "of the server")):
        assert _may_pass(error)
    for lasting in (PermissionError(errno.EACCES, "no"), OSError(errno.EINVAL, "no such range"), ValueError("odd")):
        assert not _may_pass(lasting)
