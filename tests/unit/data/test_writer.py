"""Writing shards: continued wherever it was interrupted, to the same bytes; added to; refused where it is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from aetheria.data import Shards, verify, write_shards, writer
from aetheria.data.fields import Array, Number, Text
from aetheria.data.manifest import Manifest
from aetheria.errors import DataError

SMALL: dict[str, Any] = {"shard_bytes": 40_000, "block_bytes": 8_000, "uid": 5}


def sample(number: int) -> dict[str, Any]:
    return {"x": np.full(100 + number % 3, number, dtype=np.int64), "text": str(number)}


SAMPLES = [sample(number) for number in range(400)]


class Interrupted(BaseException):
    """Not an exception that anybody would catch."""


def until(end: int) -> Iterator[dict[str, Any]]:
    """Yields samples, and is interrupted."""
    yield from SAMPLES[:end]
    raise Interrupted


class Sequence:
    """The same, to be asked by number; notes what it was asked for."""

    def __init__(self, end: int | None = None) -> None:
        self.end = end
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(SAMPLES)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number == self.end:
            raise Interrupted
        self.asked.append(number)
        return SAMPLES[number]


def content(folder: Path) -> dict[str, bytes]:
    """Returns every file, the manifests without the time."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        raw = path.read_bytes()
        if path.suffix == ".json":
            told = json.loads(raw)
            raw = json.dumps({key: told[key] for key in told if key not in ("created", "seal")}).encode()
        found[path.relative_to(folder).as_posix()] = raw
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "data"
    manifest = write_shards(SAMPLES, folder, **SMALL)
    assert (manifest.rows, manifest.version) == (400, 1)
    assert manifest.parts[0].shards > 8
    return content(folder)


# --- interrupted -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ends", [[0], [100], [399], [260, 260, 300], [280, 330, 390]])
@pytest.mark.parametrize("kind", [until, Sequence])
def test_what_was_interrupted_ends_up_as_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes], ends: list[int], kind: Any
) -> None:
    for end in ends:
        with pytest.raises(Interrupted):
            write_shards(kind(end), tmp_path / "data", **SMALL)
        with pytest.raises(DataError, match="holds no shards"):
            Shards(tmp_path / "data")
        assert not list((tmp_path / "data/.writing").glob("*.arrow")), "nothing unfinished is left"
    write_shards(SAMPLES if kind is Sequence else iter(SAMPLES), tmp_path / "data", **SMALL)
    assert content(tmp_path / "data") == whole
    assert verify(tmp_path / "data") == []


def test_a_sequence_is_continued_without_reading_what_is_written(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with pytest.raises(Interrupted):
        write_shards(Sequence(395), tmp_path / "data", **SMALL)
    again = Sequence()
    write_shards(again, tmp_path / "data", **SMALL)
    assert sorted(set(again.asked) - set(range(256)))[0] > 350, "the first 256 are looked at, to know them again"
    assert content(tmp_path / "data") == whole


def test_a_shard_that_was_not_noted_is_written_anew(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with pytest.raises(Interrupted):
        write_shards(until(380), tmp_path / "data", **SMALL)
    notes = sorted((tmp_path / "data/.writing").glob("shard-*.json"))
    notes[-1].unlink()  # killed after the shard, before its note
    shard = tmp_path / "data/shards/shard-00000003.arrow"
    shard.write_bytes(shard.read_bytes()[:-5])  # and one that was cut off since
    (tmp_path / "data/.writing/shard-00000009.arrow").write_bytes(b"half")
    write_shards(iter(SAMPLES), tmp_path / "data", **SMALL)
    assert content(tmp_path / "data") == whole


def test_a_writing_is_continued_only_as_it_was_begun(tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder = tmp_path / "data"
    with pytest.raises(Interrupted):
        write_shards(until(390), folder, **SMALL)
    others = [sample(number + 1) for number in range(400)]
    with pytest.raises(DataError, match=r"with another source \(the samples begin otherwise\).*remove that folder"):
        write_shards(others, folder, **SMALL)
    with pytest.raises(DataError, match="with another compression and shard_bytes"):
        write_shards(SAMPLES, folder, shard_bytes=50_000, block_bytes=8_000, compression="zstd")
    with pytest.raises(DataError, match="with the uid 5; 6 was asked for"):
        write_shards(SAMPLES, folder, **(SMALL | {"uid": 6}))
    with pytest.raises(DataError, match="another append"):
        write_shards(SAMPLES, folder, append="x", **SMALL)
    for fewer in (SAMPLES[:270], iter(SAMPLES[:270])):
        with pytest.raises(DataError, match=r"there are 270 samples; an interrupted writing has \d+ of them"):
            write_shards(fewer, folder, **SMALL)
    write_shards(SAMPLES, folder, **SMALL)
    assert content(folder) == whole


def test_interrupted_at_the_very_end(tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_commit", end)
        with pytest.raises(Interrupted):
            write_shards(SAMPLES, tmp_path / "data", **SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "write", end)
        with pytest.raises(Interrupted):
            write_shards(SAMPLES, tmp_path / "data", **SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(writer.shutil, "rmtree", end)
        with pytest.raises(Interrupted):
            write_shards(SAMPLES, tmp_path / "data", **SMALL)
    assert len(Shards(tmp_path / "data")) == 400, "it is written, and only not tidied up"
    with pytest.raises(DataError, match="holds 400 samples already"):
        write_shards(SAMPLES, tmp_path / "data", **SMALL)
    assert content(tmp_path / "data") == whole


# --- added to --------------------------------------------------------------------------------------------------------
def test_what_is_added_is_added_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_shards(SAMPLES[:300], folder, **SMALL, notes={"from": "here"})
    before = content(folder)
    with pytest.raises(Interrupted):
        write_shards(until(290), folder, append="more", shard_bytes=20_000, block_bytes=5_000)
    assert len(Shards(folder)) == 300
    for _ in range(2):
        manifest = write_shards(
            SAMPLES[:290] + SAMPLES[:1], folder, append="more", shard_bytes=20_000, block_bytes=5_000
        )
        assert (manifest.version, manifest.rows, manifest.uid) == (2, 591, 5)
    write_shards(iter([]), folder, append="nothing")
    manifest = write_shards(SAMPLES[:1], folder, append="last", compression="zstd", notes={"more": 1})
    assert (manifest.version, manifest.rows) == (4, 592)
    assert manifest.notes == {"from": "here", "more": 1}
    shards = Shards(folder)
    assert shards.batch([0, 299, 300, 589, 590, 591])["text"] == ["0", "299", "0", "289", "0", "0"]
    assert verify(folder) == []
    after = content(folder)
    assert all(after[name] == before[name] for name in before if name != "manifest.json")


def test_what_is_added_fits(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_shards([{"n": 1, "k": 1}], folder, key="k")
    with pytest.raises(DataError, match=r"holds 1 samples already\. To add to them say append="):
        write_shards([{"n": 1, "k": 1}], folder, key="k")
    with pytest.raises(DataError, match="have the key 'k'; these are to have None"):
        write_shards([{"n": 1, "k": 1}], folder, append="more")
    with pytest.raises(DataError, match="same schema: leave it out"):
        write_shards(
            [{"n": 1.0, "k": 1}], folder, {"n": Number("float64"), "k": Number("int64")}, append="more", key="k"
        )
    with pytest.raises(DataError, match=r"sample 0, field 'n': expected int64; found 1\.5"):
        write_shards([{"n": 1.5, "k": 1}], folder, append="more", key="k")
    assert len(Shards(folder)) == 1


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    def meddling() -> Iterator[dict[str, Any]]:
        with pytest.raises(DataError, match="another process is writing into"):
            write_shards(SAMPLES, tmp_path / "data")
        yield from SAMPLES

    assert write_shards(meddling(), tmp_path / "data").rows == 400


# --- blocks and shards -----------------------------------------------------------------------------------------------
def test_blocks_and_shards_are_about_as_large_as_they_should_be(tmp_path: Path) -> None:
    write_shards(SAMPLES, tmp_path / "data", **SMALL)
    tables = Shards(tmp_path / "data")._tables
    assert (tables.blocks["bytes"][:-1] > 6_000).all()
    assert (tables.blocks["bytes"] < 11_000).all()
    assert (tables.shards["bytes"] < 42_000).all()
    assert (tables.shards["bytes"][:-1] > 30_000).all()


def test_samples_that_grow_are_cut_into_more_blocks(tmp_path: Path) -> None:
    samples = [np.zeros(10 if number < 256 else 10_000, dtype=np.uint8) for number in range(600)]
    write_shards(samples, tmp_path / "data", Array("uint8", (None,), tensor=False), block_bytes=10_000)
    shards = Shards(tmp_path / "data")
    assert shards._tables.blocks["bytes"].max() < 21_000
    assert all(np.array_equal(shards[number], samples[number]) for number in range(600))


def test_one_sample_may_be_larger_than_a_shard(tmp_path: Path) -> None:
    samples = [torch.full((5000,), number, dtype=torch.uint8) for number in range(4)]
    manifest = write_shards(samples, tmp_path / "data", shard_bytes=1000)
    assert manifest.parts[0].shards == 4
    assert torch.equal(Shards(tmp_path / "data").batch([3, 0])[:, 0], torch.tensor([3, 0], dtype=torch.uint8))


def test_no_samples_at_all(tmp_path: Path) -> None:
    manifest = write_shards([], tmp_path / "data", {"text": Text(), "x": Array("float32", (2, None))})
    assert manifest.rows == 0
    shards = Shards(tmp_path / "data")
    assert len(shards) == 0
    assert shards.batch([])["text"] == []
    assert verify(tmp_path / "data") == []
    assert write_shards([{"text": "a", "x": torch.ones(2, 1)}], tmp_path / "data", append="one").rows == 1


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    manifest = write_shards(SAMPLES, tmp_path / "data", **SMALL, progress=lambda rows, size: told.append((rows, size)))
    assert [rows for rows, _ in told] == sorted({rows for rows, _ in told})
    assert told[-1][0] == 400
    assert 0.95 * manifest.parts[0].bytes < told[-1][1] <= manifest.parts[0].bytes


def test_an_iterable_dataset_of_torch_is_iterated(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __len__(self) -> int:
            return len(SAMPLES)

        def __iter__(self) -> Iterator[dict[str, Any]]:
            return iter(SAMPLES)

    assert write_shards(Stream(), tmp_path / "data").rows == 400


# --- refused ---------------------------------------------------------------------------------------------------------
def test_a_sample_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    class Broken(Sequence):
        def __getitem__(self, number: int) -> dict[str, Any]:
            return SAMPLES[number] if number < 300 else {"x": SAMPLES[1000]}

    with pytest.raises(DataError, match="sample 300 cannot be read: IndexError: list index out of range"):
        write_shards(Broken(), tmp_path / "data", **SMALL)

    def broken() -> Iterator[dict[str, Any]]:
        yield from SAMPLES[:270]
        raise OSError("the cable was pulled")

    with pytest.raises(DataError, match=r"the samples end after about 2.. of them: OSError: the cable was pulled"):
        write_shards(broken(), tmp_path / "other", **SMALL)


@pytest.mark.parametrize(
    ("samples", "options", "said"),
    [
        (3, {}, "a sequence or an iterable; found int"),
        ([{"n": 1}], {"schema": {"n": int}}, "made of fields, dictionaries and tuples; found type"),
        ([{"n": 1}], {"schema": {"m": Number("int64")}}, r"sample 0: expected .* the keys \['m'\]; found \['n'\]"),
        ([{"n": 1}], {"key": "m"}, "path of a field of single integers; found 'm'"),
        ([{"n": 1.0}], {"key": "n"}, "path of a field of single integers; found 'n'"),
        ([{"n": 1}, {"n": -1}], {"key": "n"}, "sample 1: a key is from 0 to .*; found -1"),
        ([{"n": 1}], {"uid": 0}, "a uid is from 1 to 65535; found 0"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, samples: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        write_shards(samples, tmp_path / "data", **options)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write shards into .*file"):
        write_shards(SAMPLES, tmp_path / "file")


def test_writing_anew_after_removing_what_was_begun(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with pytest.raises(Interrupted):
        write_shards(until(390), tmp_path / "data", shard_bytes=10_000)
    shutil.rmtree(tmp_path / "data/.writing")
    write_shards(SAMPLES, tmp_path / "data", **SMALL)
    found = content(tmp_path / "data")
    assert {name: found[name] for name in whole} == whole


def test_writing_does_not_wait_for_torch() -> None:
    script = (
        "import sys; from aetheria.data import write_shards, BlockOrder, PackedTokens; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
