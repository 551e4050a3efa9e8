"""Shards that are read from real servers, which fail in every way that servers and networks fail."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loguru import logger
from tests import shard_reader
from tests.file_server import FileServer
from tests.warm import WarmProcess
from torch.utils.data import DataLoader

from aetheria.data import Shards, write_shards
from aetheria.errors import DataDamagedError, DataError

pytest.importorskip("aiohttp", reason="needs: pip install 'aetheria[remote]'")

COUNT, PATIENCE = 400, 60.0  # samples; seconds
ALL = np.arange(COUNT)
FEW = {"retries": 2, "timeout": 20.0}


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.002)
    return found


def sample(number: int) -> dict[str, Any]:
    return {"number": number, "values": np.full(256, number, dtype=np.int32)}


def write(folder: Path, **options: Any) -> Path:
    write_shards([sample(number) for number in ALL], folder, shard_bytes=120_000, block_bytes=16_000, uid=5, **options)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("remote") / "data")


@pytest.fixture
def data(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "data"))


@pytest.fixture
def server(data: Path) -> Iterator[FileServer]:
    with FileServer(data) as running:
        yield running


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logger.add(lambda line: said.append(str(line)), level="WARNING")
    yield said
    logger.remove(handler)


def right(shards: Shards, rows: Any = ALL) -> bool:
    columns: dict[str, Any] = shards.columns(rows)
    return np.array_equal(columns["number"], rows) and bool((columns["values"] == np.asarray(rows)[:, None]).all())


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def taken(cache: Path) -> int:
    """Returns the bytes of everything that counts in a cache, while others work in it."""
    with (cache / ".lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = 0
        for path in [*(cache / "claims").iterdir(), *(cache / "blocks").iterdir()]:
            with suppress(FileNotFoundError):  # moved to its place just now
                found += path.stat().st_size
        return found


# --- as it should be -------------------------------------------------------------------------------------------------
def test_blocks_are_fetched_once_and_as_a_whole(server: FileServer, data: Path, tmp_path: Path) -> None:
    shards = Shards(server.url, cache=tmp_path / "cache", **FEW)
    assert shards.folder == server.url
    assert len(shards) == COUNT
    assert not server.blocks()
    assert right(shards, [3, 399, 7])
    table = Shards(data)._tables.blocks
    ranges = {(int(offset), int(offset + size) - 1) for offset, size in zip(table["offset"], table["bytes"])}
    assert len(server.blocks()) == 2
    assert {request.range for request in server.blocks()} <= ranges
    assert right(shards)
    assert len(server.blocks()) == len(table["rows"])
    before = len(server.requests)
    assert right(Shards(server.url, cache=tmp_path / "cache", **FEW))
    assert [request.path for request in server.requests[before:]] == ["manifest.json"]


def test_many_that_want_the_same_fetch_it_once(server: FileServer, tmp_path: Path) -> None:
    shards = Shards(server.url, cache=tmp_path / "cache", keep=1, **FEW)
    others = [Shards(server.url, cache=tmp_path / "cache", **FEW) for _ in range(2)]
    shards.prefetch(range(len(shards.block_rows)))
    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(right, [shards, *others] * 3))
    assert len(server.blocks()) == len(shards.block_rows)


def test_hints_fetch_ahead_and_say_nothing(server: FileServer, tmp_path: Path) -> None:
    shards = Shards(server.url, cache=tmp_path / "cache", **FEW)
    server.fault = lambda request: 404 if "shard-00000001" in request.path else None
    shards.prefetch([0, 1, 10_000, -1, 1])
    shards.prefetch(shards.blocks_of([COUNT - 1]).tolist())
    wait_for(lambda: len(list((tmp_path / "cache/blocks").iterdir())) == 3, "nothing was fetched ahead")
    before = len(server.requests)
    assert right(shards, [0, COUNT - 1])
    assert len(server.requests) == before
    lost = int(np.flatnonzero(shards._tables.blocks["shard"] == 1)[0])
    shards.prefetch([lost])
    with pytest.raises(DataDamagedError, match=r"http://.*/shards/shard-00000001.arrow is missing"):
        shards.columns([int(shards._tables.block_starts[lost])])


def test_workers_need_nothing_but_the_cache(server: FileServer, tmp_path: Path) -> None:
    shards = Shards(server.url, cache=tmp_path / "cache", **FEW)
    shards.prefetch(range(4))  # threads that a child does not have
    before = len(server.requests)
    loader = DataLoader(
        shards, batch_size=50, num_workers=2, collate_fn=numbers, multiprocessing_context="fork", timeout=PATIENCE
    )
    assert [number for batch in loader for number in batch] == ALL.tolist()
    assert right(pickle.loads(pickle.dumps(shards)))  # what a worker gets that was not forked
    assert "manifest.json" not in [request.path for request in server.requests[before:]]
    assert len(server.blocks()) == len(shards.block_rows), "each was fetched by one of them"


def numbers(samples: list[dict[str, Any]]) -> list[int]:
    return [sample["number"] for sample in samples]


def test_compressed_blocks_are_unpacked_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "packed", compression="zstd")
    with FileServer(folder) as server:
        assert right(Shards(server.url, cache=tmp_path / "cache", **FEW))
        fetched = len(server.blocks())
        again = Shards(server.url, cache=tmp_path / "cache", **FEW)
        assert right(again)
        assert len(server.blocks()) == fetched == len(again.block_rows)
        assert not again._blocks._in_memory, "they are read where they lie"
    packed = sum(path.stat().st_size for path in (folder / "shards").iterdir())
    assert taken(tmp_path / "cache") > 2 * packed
    for number, path in enumerate(sorted((tmp_path / "cache/blocks").iterdir())[:3]):
        content = bytearray(path.read_bytes())
        content[(0, 700, -1)[number]] ^= 8
        path.write_bytes(content)
    with FileServer(folder) as server:
        assert right(Shards(server.url, cache=tmp_path / "cache", **FEW))
        assert len(server.blocks()) == 3


def test_an_s3_server(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("s3fs", reason="needs: pip install 'aetheria[remote]'")
    moto = pytest.importorskip("moto.server", reason="a server that speaks S3")
    import boto3

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=address, **keys)
        client.create_bucket(Bucket="samples")
        for path in files(data):
            client.upload_file(str(path), "samples", f"data/{path.relative_to(data).as_posix()}")
        client.close()
        options = {"key": "key", "secret": "secret", "endpoint_url": address}
        shards = Shards("s3://samples/data", cache=tmp_path / "cache", storage_options=options, **FEW)
        assert right(shards)
        with pytest.raises(DataError, match="s3://samples/nothing holds no shards"):
            Shards("s3://samples/nothing", cache=tmp_path / "cache", storage_options=options, **FEW)
    finally:
        server.stop()


# --- what passes, and what does not ----------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", [500, 503, 429, "short", "cut", "hang", "flipped"])
def test_what_passes_is_not_noticed(server: FileServer, tmp_path: Path, fault: int | str) -> None:
    failed = 1 if fault in ("hang", "flipped") else 2
    timeout = 0.5 if fault == "hang" else 20.0
    chosen = "shard-00000002" if fault != 500 else ""  # of manifest and tables, too
    server.fault = lambda request: fault if chosen in request.path and request.number < failed else None
    assert right(Shards(server.url, cache=tmp_path / "cache", retries=3, timeout=timeout), [0, 250, 251])
    assert max(request.number for request in server.blocks()) == failed


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (500, "the server answers 500"),
        ("short", r"found 7,852 bytes instead of 15,704: the file is cut off, or its transfer was"),
        ("cut", "ClientPayloadError|ClientOSError|ServerDisconnected|ConnectionReset"),
        ("hang", "no answer in time"),
    ],
)
def test_what_does_not_pass_is_told(server: FileServer, tmp_path: Path, fault: int | str, said: str) -> None:
    shards = Shards(server.url, cache=tmp_path / "cache", retries=1, timeout=0.4 if fault == "hang" else 20.0)
    server.fault = lambda _: fault
    with pytest.raises(
        DataError, match=rf"shard-00000000.arrow, block 0 .* cannot read http://.*bytes.*({said})"
    ) as told:
        shards[0]
    assert "Tried 2 times in" in str(told.value)
    assert len(server.blocks()) == 2
    server.fault = lambda _: None
    assert right(shards), "and read when the server is there again"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (404, "shards/shard-00000000.arrow is missing"),
        (403, "the server answers 403"),
        ("whole", "sends whole files where parts of them are asked for"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(server: FileServer, tmp_path: Path, fault: int | str, said: str) -> None:
    shards = Shards(server.url, cache=tmp_path / "cache", **FEW)
    server.fault = lambda _: fault
    with pytest.raises(DataError, match=said) as told:
        shards[0]
    assert server.url in str(told.value)
    assert len(server.blocks()) == 1


def test_a_server_that_is_not_there(server: FileServer, tmp_path: Path) -> None:
    url = server.url
    server.__exit__()
    with pytest.raises(DataError, match=r"cannot read http://.*/manifest.json: .*Connect.*Tried 2 times"):
        Shards(url, cache=tmp_path / "cache", retries=1, timeout=5.0)
    server.__enter__()  # for the fixture


def test_addresses_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read from nothing://here: .*Check the address"):
        Shards("nothing://here", cache=tmp_path)
    with pytest.raises(DataError, match="retries is from 0 on, timeout more than 0 seconds; found -1"):
        Shards("http://here", cache=tmp_path, retries=-1)


# --- damage ----------------------------------------------------------------------------------------------------------
def test_damage_elsewhere_is_named_and_not_kept(server: FileServer, data: Path, tmp_path: Path) -> None:
    shards = Shards(server.url, cache=tmp_path / "cache", **FEW)
    table = shards._tables.blocks
    path = data / "shards/shard-00000001.arrow"
    content = bytearray(path.read_bytes())
    block = int(np.flatnonzero(table["shard"] == 1)[2])
    content[int(table["offset"][block]) + 100] ^= 1
    path.write_bytes(content)
    first, end = (int(start) for start in shards._tables.block_starts[block : block + 2])
    with pytest.raises(
        DataDamagedError, match=rf"{server.url}: .*, block 2 \(samples {first} to {end - 1}\) is damaged"
    ):
        shards.columns(ALL)
    assert right(shards, np.setdiff1d(ALL, np.arange(first, end)))
    assert len(list((tmp_path / "cache/blocks").iterdir())) == len(shards.block_rows) - 1
    path.write_bytes(content[: int(table["offset"][block + 1]) + 100])
    cut = Shards(server.url, cache=tmp_path / "other", retries=0)
    whole = int(shards._tables.shards["bytes"][1])
    for later in (1, 2):  # cut in the middle of it, and before it
        with pytest.raises(DataDamagedError, match=rf"00000001.arrow is damaged: it has [\d,]+ bytes, {whole:,} were"):
            cut.columns([int(shards._tables.block_starts[block + later])])


def test_a_torn_manifest_or_table_elsewhere(server: FileServer, data: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "tables/part-00000.blocks.arrow"):
        content = (data / name).read_bytes()
        for torn in (content[:-5], b"", content[:50] + b"x" + content[51:]):
            (data / name).write_bytes(torn)
            with pytest.raises(DataDamagedError, match=rf"{server.url}/{name} is damaged"):
                Shards(server.url, cache=tmp_path / "cache", **FEW)
        (data / name).unlink()
        with pytest.raises(DataError, match=f"no {name}|{name} is missing"):
            Shards(server.url, cache=tmp_path / "cache", **FEW)
        (data / name).write_bytes(content)
    assert right(Shards(server.url, cache=tmp_path / "cache", **FEW))


def test_what_is_appended_elsewhere_does_not_reach_a_reader(server: FileServer, data: Path, tmp_path: Path) -> None:
    before = Shards(server.url, cache=tmp_path / "cache", **FEW)
    assert right(before, [0])
    write_shards([sample(COUNT + number) for number in range(50)], data, append="more")
    assert len(before) == COUNT
    assert right(before)
    fetched = len(server.blocks())
    after = Shards(server.url, cache=tmp_path / "cache", **FEW)
    assert len(after) == COUNT + 50
    assert right(after, np.arange(COUNT + 50))
    assert len(server.blocks()) == fetched + len(after.block_rows) - len(before.block_rows), "the others are kept"
    assert right(Shards(server.url, 1, cache=tmp_path / "cache", **FEW))
    assert len(after.of_version(1)) == COUNT
    assert len(before.of_version(None)) == COUNT + 50
    with pytest.raises(DataError, match="has no version 3; there are 1 to 2"):
        Shards(server.url, 3, cache=tmp_path / "cache", **FEW)


# --- the cache -------------------------------------------------------------------------------------------------------
def test_damage_in_the_cache_is_put_right(server: FileServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert right(Shards(server.url, cache=cache, **FEW))
    fetched = len(server.blocks())
    kept = sorted((cache / "blocks").iterdir())
    for number, path in enumerate(kept[:6]):
        content = bytearray(path.read_bytes())
        content[(0, 700, -1)[number % 3]] ^= 8
        path.write_bytes(content if number < 5 else b"")
    for path in files(cache / "data"):
        path.write_bytes(path.read_bytes()[:-1])
    assert right(Shards(server.url, cache=cache, **FEW))
    assert len(server.blocks()) == fetched + 5, "all but one, of which only the hash behind it had changed"
    assert taken(cache) == sum(path.stat().st_size for path in kept)


def test_a_cache_that_is_too_small_is_refused(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"largest block has 15,\d{3} bytes, and 8 .* may hold 15,000.*cache_bytes"):
        Shards(server.url, cache=tmp_path / "cache", cache_bytes=15_000, **FEW)
    with pytest.raises(DataError, match=r"5 blocks are in use at a time, of up to 78,\d{3} bytes; .* may hold 70,000"):
        Shards(server.url, cache=tmp_path / "cache", cache_bytes=70_000, keep=5, **FEW)
    shards = Shards(server.url, cache=tmp_path / "cache", cache_bytes=70_000, keep=4, **FEW)
    with pytest.raises(DataError, match="fewer lanes"):
        shards.keep(5)
    assert right(shards)


def test_two_processes_share_a_small_cache(server: FileServer, tmp_path: Path) -> None:
    cache, limit = tmp_path / "cache", 80_000
    wanted = {"place": server.url, "cache": str(cache), "cache_bytes": limit, "passes": 1, "keep": 3}
    readers = [WarmProcess([shard_reader.__file__, json.dumps(wanted | {"seed": seed})]) for seed in (1, 2)]
    most = 0
    while any(reader.poll() is None for reader in readers):
        if (cache / ".lock").exists():
            most = max(most, taken(cache))
        time.sleep(0.005)
    assert [reader.wait() for reader in readers] == [0, 0]
    assert 60_000 < most <= limit + 15_712  # a file that moves while they are counted is counted twice
    assert taken(cache) <= limit
    assert int.from_bytes((cache / ".lock").read_bytes(), "little") == taken(cache)
    assert not list((cache / "claims").iterdir())


def test_two_processes_fetch_each_block_once(server: FileServer, tmp_path: Path) -> None:
    wanted = {"place": server.url, "cache": str(tmp_path / "cache"), "cache_bytes": None, "passes": 1, "seed": 1}
    readers = [WarmProcess([shard_reader.__file__, json.dumps(wanted)]) for _ in range(2)]
    assert [reader.wait() for reader in readers] == [0, 0]
    assert max(request.number for request in server.blocks()) == 0


def test_what_a_killed_reader_leaves_is_cleaned_up(server: FileServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert right(Shards(server.url, cache=cache, **FEW), [0])
    server.requests.clear()
    server.fault = lambda request: "halfway" if request.path.startswith("shards/") else None
    wanted = {"place": server.url, "cache": str(cache), "cache_bytes": None, "passes": 1, "seed": 1}
    reader = WarmProcess([shard_reader.__file__, json.dumps(wanted)])
    wait_for(server.blocks, "it has asked for nothing")
    mapped = Path(f"/proc/{reader.pid}/maps").read_text()
    reader.send_signal(signal.SIGKILL)
    assert reader.wait() == -signal.SIGKILL
    assert not [line for line in mapped.splitlines() if "/dev/shm/" in line and str(tmp_path) not in line]
    assert list((cache / "claims").iterdir())
    server.fault = lambda _: None
    server.go_on.set()
    shards = Shards(server.url, cache=cache, **FEW)
    assert not list((cache / "claims").iterdir())
    assert right(shards)


def test_killed_again_and_again_the_cache_keeps_to_its_limit(server: FileServer, tmp_path: Path) -> None:
    cache, limit = tmp_path / "cache", 80_000
    wanted = {"place": server.url, "cache": str(cache), "cache_bytes": limit, "passes": 1000, "keep": 3}
    for kills in (1, 3):
        before = len(server.blocks())
        readers = [WarmProcess([shard_reader.__file__, json.dumps(wanted | {"seed": seed})]) for seed in range(2)]
        wait_for(lambda before=before, kills=kills: len(server.blocks()) > before + 13 * kills, "nothing is fetched")
        for reader in readers:
            reader.send_signal(signal.SIGKILL)
        assert [reader.wait() for reader in readers] == [-signal.SIGKILL] * 2
        shards = Shards(server.url, cache=cache, cache_bytes=limit, **FEW)
        assert not list((cache / "claims").iterdir())
        assert taken(cache) <= limit
        assert right(shards)
        assert int.from_bytes((cache / ".lock").read_bytes(), "little") == taken(cache) <= limit


def test_whoever_waits_for_a_killed_reader_takes_over(server: FileServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shards = Shards(server.url, cache=cache, **FEW)
    server.fault = lambda request: "halfway" if request.path.startswith("shards/") and not request.number else None
    wanted = {"place": server.url, "cache": str(cache), "cache_bytes": None, "passes": 1, "seed": 1}
    reader = WarmProcess([shard_reader.__file__, json.dumps(wanted)])
    wait_for(server.blocks, "it has asked for nothing")
    claims = list((cache / "claims").iterdir())
    block = next(
        block for block in range(len(shards.block_rows)) if shards._blocks._place._file(block) == claims[0].name
    )  # type: ignore[attr-defined]
    found: list[bool] = []
    waiting = threading.Thread(target=lambda: found.append(right(shards, [int(shards._tables.block_starts[block])])))
    waiting.start()
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    waiting.join(PATIENCE)
    assert found == [True]
    assert max(request.number for request in server.blocks()) == 1


@pytest.mark.parametrize("small_disk", ["200k"], indirect=True)
def test_a_full_disk_is_said_once(server: FileServer, small_disk: Path, warnings: list[str]) -> None:
    shards = Shards(server.url, cache=small_disk / "cache", cache_bytes=1 << 30, **FEW)
    assert right(shards)
    assert right(shards)
    [said] = warnings
    assert "cannot keep blocks: [Errno 28] No space left on device" in said
    assert "Reading goes on" in said
    assert not list((small_disk / "cache/claims").iterdir())
    assert int.from_bytes((small_disk / "cache/.lock").read_bytes(), "little") == taken(small_disk / "cache")
    assert right(Shards(server.url, cache=small_disk / "cache", **FEW), [0]), "without a limit it is what the disk has"


def test_the_default_cache_is_in_the_home(server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert right(Shards(server.url, **FEW), [7])
    assert len(list((tmp_path / "home/aetheria/data/blocks").iterdir())) == 1


def test_a_reader_that_is_forked_while_others_fetch(server: FileServer, tmp_path: Path) -> None:
    """Locks that threads held when the process was forked are not held in the child."""
    shards = Shards(server.url, cache=tmp_path / "cache", keep=2, **FEW)
    server.fault = lambda request: "halfway" if request.path.startswith("shards/") and not request.number else None
    shards.prefetch(range(8))
    wait_for(lambda: len(server.blocks()) == 8, "nothing is fetched")

    def read() -> None:
        raise SystemExit(0 if right(shards, np.arange(200, COUNT)) else 1)

    child = multiprocessing.get_context("fork").Process(target=read)
    server.fault = lambda _: None
    child.start()
    child.join(PATIENCE)
    server.go_on.set()
    assert child.exitcode == 0
    assert right(shards)
