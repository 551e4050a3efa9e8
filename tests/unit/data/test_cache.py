"""A cache has a limit, keeps what was used last, and survives whoever works in it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aetheria.data.blocks import Message
from aetheria.data.cache import SEAL, Cache, _Claim, default_cache
from aetheria.data.manifest import hash_of
from aetheria.errors import DataError

SIZE = 100 - SEAL


def content(name: str, size: int = SIZE) -> bytes:
    return (name.encode() * size)[:size]


def get(cache: Cache, name: str, size: int = SIZE) -> Message:
    return cache.obtain(name, lambda: content(name, size), 10.0)


def names(cache: Cache) -> set[str]:
    return set(os.listdir(cache.folder / "blocks"))


def taken(cache: Cache) -> int:
    return sum(path.stat().st_size for path in (cache.folder / "blocks").iterdir())


def noted(cache: Cache) -> int:
    return int.from_bytes((cache.folder / ".lock").read_bytes(), "little")


def test_what_is_kept_is_made_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1000)
    made = get(cache, "a")
    assert bytes(made.content) == content("a")
    assert made.hash is None, "it has just been checked"
    found = cache.obtain("a", lambda: pytest.fail("it is there"), 10.0)
    assert bytes(found.content) == content("a")
    assert found.hash == hash_of(content("a"))
    assert made.mapped
    assert found.mapped
    assert cache.use("a")
    assert not cache.use("b")


def test_those_go_that_were_not_used_for_longest(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 300)
    for name in "abc":
        get(cache, name)
    held = get(cache, "a")
    assert cache.use("b")
    get(cache, "d")
    assert names(cache) == {"a", "b", "d"}
    get(cache, "e")
    get(cache, "f")
    assert names(cache) == {"d", "e", "f"}
    assert bytes(held.content) == content("a"), "whoever has it mapped keeps it"


@settings(max_examples=60)
@given(
    wanted=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 400)), max_size=40), limit=st.integers(1, 900)
)
def test_the_limit_is_never_exceeded(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[tuple[str, int]], limit: int
) -> None:
    cache = Cache(tmp_path_factory.mktemp("cache"), limit)
    for name, size in wanted:
        found = get(cache, f"{name}-{size}", size + 1)
        assert bytes(found.content) == content(f"{name}-{size}", size + 1)
        assert found.mapped == (size + 1 + SEAL <= limit)
        assert taken(cache) == noted(cache) <= limit
    shutil.rmtree(cache.folder)


def test_several_threads_make_it_once(tmp_path: Path) -> None:
    made: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def make() -> bytes:
        made.append(1)
        begun.set()
        assert go_on.wait(30.0)
        return content("a")

    found: list[bytes] = []
    caches = [Cache(tmp_path, 1000) for _ in range(2)]  # as two processes would
    readers = [
        threading.Thread(target=lambda cache=cache: found.append(bytes(cache.obtain("a", make, 30.0).content)))
        for cache in caches * 2
    ]
    for reader in readers:
        reader.start()
    assert begun.wait(30.0)
    go_on.set()
    for reader in readers:
        reader.join(30.0)
    assert found == [content("a")] * 4
    assert len(made) == 1


def test_who_waits_too_long_makes_it_without_keeping_it(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    claim = _Claim.on(tmp_path / "claims" / "a")
    assert claim is not None
    found = cache.obtain("a", lambda: content("a"), 0.01)
    assert bytes(found.content) == content("a")
    assert not found.mapped
    claim.give_up()
    assert get(cache, "a").mapped
    assert not os.listdir(tmp_path / "claims")


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)

    def fail() -> bytes:
        raise DataError("no server")

    with pytest.raises(DataError, match="no server"):
        cache.obtain("a", fail, 1.0)
    assert not os.listdir(tmp_path / "claims")
    assert noted(cache) == 0
    assert get(cache, "a").mapped


def test_what_a_killed_process_left_is_removed_and_not_what_a_living_one_writes(tmp_path: Path) -> None:
    get(Cache(tmp_path, 1000), "a")
    (tmp_path / "claims" / "dead").write_bytes(bytes(100))  # nobody has locked it
    (tmp_path / ".lock").write_bytes((200).to_bytes(8, "little"))
    claim = _Claim.on(tmp_path / "claims" / "living")
    assert claim is not None
    os.ftruncate(claim.descriptor, 50)
    cache = Cache(tmp_path, 1000)
    assert os.listdir(tmp_path / "claims") == ["living"]
    assert noted(cache) == 150
    claim.give_up()


def test_a_count_that_is_lost_is_counted_anew(tmp_path: Path) -> None:
    get(Cache(tmp_path, 1000), "a")
    (tmp_path / ".lock").write_bytes(b"")
    assert noted(Cache(tmp_path, 1000)) == 100
    (tmp_path / ".lock").write_bytes((900).to_bytes(8, "little"))  # too much, as after a kill
    cache = Cache(tmp_path, 950)
    get(cache, "b")
    assert noted(cache) == 200
    assert names(cache) == {"a", "b"}, "nothing had to go"


def test_what_is_damaged_is_discarded(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    get(cache, "a")
    cache.discard("a")
    cache.discard("a")
    assert noted(cache) == 0
    get(cache, "a")
    (tmp_path / "blocks" / "a").write_bytes(b"cut")
    assert cache.find("a") is None
    assert not cache.use("a")


@pytest.mark.parametrize("small_disk", ["40k"], indirect=True)
def test_a_full_disk_gives_back_what_was_counted(small_disk: Path) -> None:
    cache = Cache(small_disk / "cache", 1 << 30)
    for number in range(20):
        name = f"{number:02d}"
        assert bytes(get(cache, name, 5000).content) == content(name, 5000)
    assert 0 < len(names(cache)) < 10
    assert taken(cache) == noted(cache)
    assert not os.listdir(cache.folder / "claims")


def test_a_folder_that_vanishes_does_not_stop_anybody(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1000)
    get(cache, "a")
    shutil.rmtree(tmp_path / "cache")
    assert bytes(get(cache, "a").content) == content("a")


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot use .*/file/cache as a cache: .*cache='...'"):
        Cache(tmp_path / "file/cache", 1000)


def test_without_a_limit_it_is_what_the_disk_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert Cache(tmp_path, None).limit == pytest.approx(free * 3 / 4, rel=0.2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "aetheria/data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache/aetheria/data"


def test_a_file_that_does_not_count(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    path = tmp_path / "data" / "set" / "table"
    made = []

    def make() -> bytes:
        made.append(time.monotonic())
        return b"whole"

    def is_whole(found: Path) -> bool:
        return found.read_bytes() == b"whole"

    cache.ensure(path, is_whole, make, 10.0)
    cache.ensure(path, is_whole, make, 10.0)
    assert len(made) == 1
    path.write_bytes(b"torn")
    cache.ensure(path, is_whole, make, 10.0)
    assert path.read_bytes() == b"whole"
    assert len(made) == 2
    assert noted(cache) == 0
