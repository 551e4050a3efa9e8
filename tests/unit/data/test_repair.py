"""What is damaged is named, goes into quarantine, and comes out of it when it is whole again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from aetheria.data import Shards, repair, verify, write_shards
from aetheria.data.describing import describe, draw, first_rows
from aetheria.data.manifest import Manifest
from aetheria.errors import DataDamagedError, DataError

COUNT = 400


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "data"
    samples = [{"n": number, "x": np.full(100, number)} for number in range(COUNT)]
    write_shards(samples[:300], folder, shard_bytes=60_000, block_bytes=8_000, uid=7)
    write_shards(samples[300:], folder, shard_bytes=60_000, block_bytes=8_000, append="more")
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copied"))


def block_places(folder: Path) -> list[tuple[int, int, int]]:
    """Returns of each block its shard, where it begins, and its rows."""
    table = Shards(folder)._tables.blocks
    return list(zip(*(table[name].tolist() for name in ("shard", "offset", "rows"))))


def flip(folder: Path, block: int) -> None:
    shard, offset, _ = block_places(folder)[block]
    with (folder / f"shards/shard-{shard:08d}.arrow").open("r+b") as file:
        file.seek(offset + 300)
        [byte] = file.read(1)
        file.seek(offset + 300)
        file.write(bytes([byte ^ 4]))


def fill(path: Path) -> None:
    """Writes until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def readable(folder: Path) -> list[int]:
    """Returns the numbers of all samples that can be read, after making sure of what they hold."""
    shards = Shards(folder)
    lost = np.repeat(np.isin(np.arange(len(shards.block_rows)), shards.quarantined), shards.block_rows)
    rows = np.flatnonzero(~lost)
    columns = shards.columns(rows)
    assert np.array_equal(columns["n"], rows)
    assert np.array_equal(columns["x"], np.repeat(rows[:, None], 100, axis=1))
    return list(rows.tolist())


def test_what_is_whole_stays_as_it_is(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    seen: list[tuple[int, int]] = []
    result = repair(folder, lambda done, total: seen.append((done, total)))
    assert (result.damages, result.quarantined, result.released, result.restored, result.lost) == ((), (), (), (), 0)
    assert (folder / "manifest.json").read_bytes() == before
    assert seen[-1][0] == seen[-1][1] == describe(folder)["bytes"]


def test_a_damaged_block_is_left_out_until_it_is_whole_again(folder: Path) -> None:
    places = block_places(folder)
    parts = Manifest.read(folder).parts
    blocks = [1, parts[0].blocks + 2]  # of both parts
    for block in blocks:
        flip(folder, block)
    assert [damage.block for damage in verify(folder)] == blocks
    result = repair(folder)
    assert [damage.block for damage in result.quarantined] == blocks
    assert result.manifest.version == 3
    assert [(entry["part"], entry["block"], entry["shard"]) for entry in result.manifest.quarantined] == [
        (0, 1, places[blocks[0]][0]), (1, 2, places[blocks[1]][0])
    ]  # fmt: skip
    assert result.lost == sum(places[block][2] for block in blocks)
    assert verify(folder) == [], "what is in quarantine is known"
    assert Shards(folder).quarantined == tuple(blocks)
    assert len(readable(folder)) == COUNT - result.lost
    with pytest.raises(DataError, match="is in quarantine"):
        Shards(folder)[places[0][2]]
    assert Shards(folder, 2).quarantined == ()
    with pytest.raises(DataDamagedError):
        Shards(folder, 2)[places[0][2]]
    again = repair(folder)
    assert again.manifest.digest == result.manifest.digest, "nothing new, no new version"
    assert again.quarantined == ()
    flip(folder, 20)
    flip(folder, 1)  # back
    third = repair(folder)
    assert ([damage.block for damage in third.quarantined], third.released) == ([20], (1,))
    assert third.manifest.quarantined[1]["time"] == result.manifest.quarantined[1]["time"]
    for block in (20, blocks[1]):
        flip(folder, block)
    assert repair(folder).released == (20, blocks[1])
    assert readable(folder) == list(range(COUNT))
    assert Manifest.read(folder).version == 5


@pytest.mark.parametrize("how", ["missing", "cut off", "longer", "both"])
def test_a_shard_that_is_not_read_goes_into_quarantine_as_a_whole(folder: Path, written: Path, how: str) -> None:
    path = folder / "shards/shard-00000002.arrow"
    content = path.read_bytes()
    blocks = [number for number, place in enumerate(block_places(folder)) if place[0] == 2]
    if how == "both":
        flip(folder, blocks[0])
        flip(folder, 0)
        path.write_bytes(path.read_bytes()[:-700])
    elif how == "missing":
        path.unlink()
        with pytest.raises(DataDamagedError, match=r"1 of \d+ shards are missing"):
            Shards(folder)
    else:
        path.write_bytes(content[:-700] if how == "cut off" else content + b"\0")
    result = repair(folder)
    lost = ([0] if how == "both" else []) + blocks
    assert [damage.block for damage in result.quarantined] == lost
    assert verify(folder) == []
    assert len(readable(folder)) == COUNT - result.lost
    path.unlink(missing_ok=True)
    assert len(readable(folder)) == COUNT - result.lost, "nobody asks for its file"
    assert verify(folder) == []
    (folder / "shards/shard-00000003.arrow").rename(folder / "moved")
    with pytest.raises(DataDamagedError, match=r"shards are missing: shard-00000003.arrow"):
        Shards(folder)
    (folder / "moved").rename(folder / "shards/shard-00000003.arrow")
    shutil.copy(written / "shards/shard-00000002.arrow", path)
    assert repair(folder).released == tuple(blocks)


def test_what_stands_around_the_blocks_is_named_and_harmless(folder: Path) -> None:
    path = folder / "shards/shard-00000001.arrow"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    result = repair(folder)
    assert [damage.what for damage in result.damages] == ["damaged before or behind its blocks, which are whole"]
    assert (result.quarantined, result.manifest.version) == ((), 2)
    assert readable(folder) == list(range(COUNT))


def test_the_manifest_and_its_copy_restore_each_other(folder: Path) -> None:
    manifest, copy = folder / "manifest.json", folder / "versions/00000002.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content[:100])
    with pytest.raises(DataDamagedError):
        verify(folder)
    assert repair(folder).restored == ("manifest.json",)
    assert manifest.read_bytes() == content
    copy.write_bytes(b"")
    assert [damage.file for damage in verify(folder)] == ["versions/00000002.json"]
    assert repair(folder).restored == ("versions/00000002.json",)
    assert copy.read_bytes() == content
    manifest.write_bytes(b"")
    copy.write_bytes(b"")
    with pytest.raises(DataDamagedError, match=r"manifest.json is damaged") as error:
        repair(folder)
    assert "Its copy is no better" in error.value.__notes__[0]
    manifest.write_bytes(content)
    (folder / "versions/00000001.json").write_bytes(b"")
    assert [damage.file for damage in repair(folder).damages] == ["versions/00000001.json"]


def test_quarantine_stays_when_data_are_added(folder: Path) -> None:
    flip(folder, 3)
    lost = repair(folder).lost
    write_shards([{"n": COUNT, "x": np.full(100, COUNT)}], folder, append="last")
    assert Shards(folder).quarantined == (3,)
    assert len(readable(folder)) == COUNT + 1 - lost


def test_nobody_repairs_what_is_being_written(folder: Path, tmp_path: Path) -> None:
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing into"):
            repair(folder)
    with pytest.raises(DataError, match="holds no shards"):
        repair(tmp_path / "none")
    (folder / "tables/part-00000.blocks.arrow").write_bytes(b"x")
    with pytest.raises(DataDamagedError, match=r"part-00000.blocks.arrow is damaged"):
        repair(folder)


@pytest.mark.parametrize("small_disk", ["2m"], indirect=True)
def test_a_disk_that_is_full_loses_nothing(written: Path, small_disk: Path) -> None:
    folder = Path(shutil.copytree(written, small_disk / "data"))
    flip(folder, 0)
    before = (folder / "manifest.json").read_bytes()
    fill(small_disk / "filling")
    with pytest.raises(DataError, match=r"cannot write shards into .* make room"):
        repair(folder)
    assert (folder / "manifest.json").read_bytes() == before
    (small_disk / "filling").unlink()
    assert [damage.block for damage in repair(folder).quarantined] == [0]


def test_samples_are_shown_without_those_in_quarantine(folder: Path) -> None:
    rows = block_places(folder)[0][2]
    flip(folder, 0)
    with pytest.raises(DataDamagedError):
        first_rows(folder, 2)
    repair(folder)
    assert [(each["row"], each["sample"]["n"]) for each in first_rows(folder, 3)] == [
        (rows + n, rows + n) for n in range(3)
    ]
    drawn = [each["row"] for each in draw(folder, COUNT)]
    assert sorted(drawn) == list(range(rows, COUNT))
    assert drawn != sorted(drawn)
    assert [each["row"] for each in draw(folder, 5)] == drawn[:5] != [each["row"] for each in draw(folder, 5, seed=1)]
    told = describe(folder)
    assert (told["quarantined"]["blocks"], told["quarantined"]["rows"]) == (1, rows)
    assert json.loads(json.dumps(told)) == told
