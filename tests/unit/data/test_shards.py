"""Samples come back as they were written; and nothing that has changed on the disk is ever used."""

from __future__ import annotations

import io
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image as Pictures
from torch.utils.data import DataLoader

from aetheria.data import BlockOrder, Shards, verify, write_shards
from aetheria.data.fields import Array, Bytes, Image, Number, Text
from aetheria.data.manifest import Manifest
from aetheria.data.ragged import Ragged
from aetheria.errors import DataDamagedError, DataError


def sample(number: int) -> dict[str, Any]:
    return {
        "tensor": torch.full((2, 3), float(number)),
        "bfloat16": torch.full((2,), number, dtype=torch.bfloat16),
        "scalar": torch.tensor(number, dtype=torch.float16),
        "array": np.arange(number, number + 4, dtype=np.uint16),
        "flags": np.array([True, number % 2 == 0]),
        "number": number,
        "real": number / 2,
        "yes": number % 3 == 0,
        "text": f"sämple {number}" * (number % 3),
        "bytes": bytes([number % 256]) * (number % 5),
        "long": bytes([number % 256]) * (500 + number),
        "varying": np.arange(number % 6, dtype=np.int32),
        "rows": torch.full((number % 3, 2), number),
        "shape": np.full((number % 3, number % 2 + 1), float(number)),
        "list": [1.5] * (number % 4),
        "nested": {"pair": (number, np.float32(number)), "deep": {"text": str(number)}},
    }


def same(found: Any, wanted: Any) -> bool:
    """Whether two samples are alike, types and dtypes included; a list has become an array."""
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, tuple):
        return type(found) is tuple and all(map(same, found, wanted))
    if isinstance(wanted, torch.Tensor):
        return found.dtype == wanted.dtype and torch.equal(found, wanted)
    if isinstance(wanted, list):
        wanted = np.array(wanted, dtype=np.float64)
    if isinstance(wanted, np.ndarray | np.generic):
        return found.dtype == wanted.dtype and np.array_equal(found, wanted) and found.shape == wanted.shape
    return type(found) is type(wanted) and found == wanted


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "data"
    write_shards([sample(number) for number in range(300)], folder, shard_bytes=60_000, block_bytes=8_000, uid=7)
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copied"))


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


# --- what was written is read ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_samples_come_back_as_they_were(written: Path, tmp_path: Path, compression: Any) -> None:
    folder = written
    if compression:
        folder = tmp_path / "compressed"
        write_shards(
            [sample(number) for number in range(300)], folder,
            shard_bytes=60_000, block_bytes=8_000, compression=compression,
        )  # fmt: skip
    shards = Shards(folder)
    assert len(shards) == 300
    assert shards.manifest.parts[0].shards > 1
    assert shards.manifest.parts[0].blocks > 2 * shards.manifest.parts[0].shards
    for number in (0, 1, 2, 5, 299, 150):
        assert same(shards[number], sample(number))
    assert all(map(same, shards.samples(np.arange(299, -1, -1)), map(sample, range(299, -1, -1))))
    assert verify(folder) == []


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 299), max_size=50))
def test_any_rows_come_in_the_order_in_which_they_are_asked_for(written: Path, rows: list[int]) -> None:
    batch = Shards(written).batch(rows)
    assert batch["number"].tolist() == rows
    assert batch["nested"]["deep"]["text"] == [str(row) for row in rows]
    assert [part.tolist() for part in batch["varying"]] == [list(range(row % 6)) for row in rows]
    assert [len(part) for part in batch["long"]] == [500 + row for row in rows]
    assert batch["tensor"].shape == (len(rows), 2, 3)
    assert batch["tensor"][:, 0, 0].tolist() == rows


def test_batches_are_what_torch_makes_of_samples(written: Path) -> None:
    shards = Shards(written)
    batch = shards.batch([3, 1, 200])
    assert batch["bfloat16"].dtype == torch.bfloat16
    assert batch["scalar"].tolist() == [3, 1, 200]
    assert batch["number"].dtype == torch.int64
    assert batch["yes"].tolist() == [True, False, False]
    assert isinstance(batch["array"], np.ndarray)
    assert batch["array"][2].tolist() == [200, 201, 202, 203]
    batch["tensor"].zero_()
    assert shards[3]["tensor"].sum() == 18, "a batch lies in memory of its own"


def test_columns_are_not_made_of_objects(written: Path) -> None:
    columns = Shards(written).columns([7, 4], ["varying", "nested/pair/1"])
    assert isinstance(columns["varying"], Ragged)
    assert columns["varying"].values.tolist() == [0, 0, 1, 2, 3]
    assert columns["varying"].lengths.tolist() == [1, 4]
    assert isinstance(columns["nested/pair/1"], np.ndarray)
    assert list(columns) == ["varying", "nested/pair/1"]


def test_a_data_loader_reads_them(written: Path) -> None:
    def numbers(samples: list[dict[str, Any]]) -> list[int]:
        return [sample["number"] for sample in samples]

    assert list(DataLoader(Shards(written), batch_size=4, collate_fn=numbers))[70] == [280, 281, 282, 283]
    sent = pickle.loads(pickle.dumps(Shards(written)))
    assert same(sent[17], sample(17))


def test_they_are_read_in_the_order_of_their_blocks(written: Path) -> None:
    shards = Shards(written)
    order = BlockOrder(shards.block_rows, 1, lanes=4, window=16)
    read = [shards.batch(order.ids(0, start, min(start + 32, 300)))["number"] for start in range(0, 300, 32)]
    assert sorted(torch.cat(read).tolist()) == list(range(300))


def test_any_program_that_knows_arrow_reads_them(written: Path) -> None:
    numbers: list[int] = []
    for path in sorted((written / "shards").iterdir()):
        numbers += pa.ipc.open_file(path).read_all()["number"].to_pylist()
    assert numbers == list(range(300))


@pytest.mark.parametrize("rows", [[-1], [0, 300]])
def test_there_are_no_other_rows(written: Path, rows: list[int]) -> None:
    with pytest.raises(DataError, match=rf"holds samples 0 to 299; {rows[-1]} was asked for"):
        Shards(written).batch(rows)


def test_samples_that_are_no_dictionaries(tmp_path: Path) -> None:
    write_shards((np.float64(number) for number in range(5)), tmp_path / "numbers")
    assert Shards(tmp_path / "numbers").batch([4, 0]).tolist() == [4, 0]
    write_shards([(torch.ones(2) * number, number) for number in range(5)], tmp_path / "pairs")
    image, label = Shards(tmp_path / "pairs").batch([4, 0])
    assert image.tolist() == [[4, 4], [0, 0]]
    assert label.tolist() == [4, 0]


def test_images_are_stored_as_files_and_decoded_when_read(tmp_path: Path) -> None:
    def picture(number: int) -> Pictures.Image:
        return Pictures.fromarray(np.full((number + 1, 4, 3), number, dtype=np.uint8))

    write_shards([{"image": picture(number)} for number in range(5)], tmp_path / "drawn")
    shards = Shards(tmp_path / "drawn")
    assert shards[3]["image"].shape == (4, 4, 3)
    assert (shards[3]["image"] == 3).all()
    file = io.BytesIO()
    picture(9).save(file, format="JPEG")
    write_shards([{"image": file.getvalue()}] * 3, tmp_path / "encoded", {"image": Image("L")})
    read = Shards(tmp_path / "encoded")
    assert bytes(read.columns([1])["image"][0]) == file.getvalue(), "nothing is encoded twice"  # type: ignore[arg-type]
    assert read.batch([0, 2])["image"][1].shape == (10, 4)


def test_an_image_that_cannot_be_decoded_names_its_sample(tmp_path: Path) -> None:
    file = io.BytesIO()
    Pictures.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(file, format="PNG")
    cut = file.getvalue()[:200]  # begins as an image does
    write_shards([{"image": file.getvalue()}, {"image": cut}], tmp_path / "data", {"image": Image()}, uid=3)
    identity = (3 << 47) + 1
    with pytest.raises(DataError, match=rf"sample 1 \(id {identity}\), field 'image': the image cannot be decoded"):
        Shards(tmp_path / "data").batch([0, 1])


# --- ids -------------------------------------------------------------------------------------------------------------
def test_every_sample_has_an_id_that_stays(written: Path, copied: Path) -> None:
    before = Shards(copied)
    ids = before.sample_ids(np.arange(300))
    assert len(np.unique(ids)) == 300
    assert ids.min() > 0
    assert np.array_equal(ids, Shards(written).sample_ids(range(300)))
    write_shards([sample(1)] * 10, copied, append="more")
    after = Shards(copied)
    assert len(after) == 310
    assert np.array_equal(after.sample_ids(range(300)), ids)
    assert len(before) == 300, "a reader keeps the version that it has opened"
    assert len(Shards(copied, version=1)) == 300
    assert np.array_equal(after.rows_of(after.sample_ids([309, 0, 17])), [309, 0, 17])
    with pytest.raises(DataError, match="no sample with the id"):
        before.rows_of(after.sample_ids([305]))
    with pytest.raises(DataError, match="no sample with the id 5"):
        before.rows_of([5])


def test_a_key_of_their_own(tmp_path: Path) -> None:
    write_shards([{"id": 100 - number, "x": float(number)} for number in range(50)], tmp_path / "data", key="id")
    shards = Shards(tmp_path / "data")
    assert shards.sample_ids([0, 49]).tolist() == [100, 51]
    assert shards.rows_of([51, 100]).tolist() == [49, 0]
    with pytest.raises(DataError, match="no sample with the id 3"):
        shards.rows_of([3])
    write_shards([{"id": 5}, {"id": 5}], tmp_path / "twice", key="id")
    with pytest.raises(DataError, match=r"samples 0 and 1 have the same key, 5"):
        Shards(tmp_path / "twice").rows_of([5])


# --- whatever changes on the disk is noticed -------------------------------------------------------------------------
def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def read_all(folder: Path) -> None:
    Shards(folder).columns(np.arange(300))


def damaged_files(folder: Path) -> set[str]:
    """Returns what is named, be it in an error or in a list."""
    try:
        return {damage.file for damage in verify(folder)}
    except DataDamagedError as error:
        return {path.relative_to(folder).as_posix() for path in files(folder) if str(path) in str(error)}


def test_a_flipped_bit_anywhere_is_noticed(copied: Path) -> None:
    draw = np.random.default_rng(0)
    for path in files(copied):
        size = path.stat().st_size
        for place in {0, 5, size // 2, size - 1, *draw.integers(0, size, 12).tolist()}:
            flip(path, place)
            assert damaged_files(copied) == {path.relative_to(copied).as_posix()}, place
            flip(path, place)
    assert verify(copied) == []


def test_a_damaged_block_is_named_before_anything_of_it_is_used(copied: Path) -> None:
    shards = Shards(copied)
    table = shards._tables.blocks
    for block in range(0, len(table["rows"]), 5):
        path = copied / f"shards/shard-{table['shard'][block]:08d}.arrow"
        first, rows = int(shards._tables.block_starts[block]), int(table["rows"][block])
        for place in (table["offset"][block], table["offset"][block] + table["bytes"][block] - 1):
            flip(path, int(place))
            reader = Shards(copied)
            with pytest.raises(
                DataDamagedError, match=rf"{path.name}, block \d+ \(samples {first} to {first + rows - 1}\)"
            ):
                reader.batch([(first + rows) % 300, first])
            [damage] = verify(copied)
            assert (damage.block, damage.first_row, damage.rows) == (block, first, rows)
            others = np.setdiff1d(np.arange(300), np.arange(first, first + rows))
            assert reader.columns(others, ["number"])["number"].tolist() == others.tolist()  # type: ignore[union-attr]
            flip(path, int(place))
            assert reader.batch([first])["number"].tolist() == [first], "and read again when it is whole again"


def test_verify_names_every_damaged_block(copied: Path) -> None:
    table = Shards(copied)._tables.blocks
    chosen = [0, 3, 4, len(table["rows"]) - 1]
    for block in chosen:
        flip(copied / f"shards/shard-{table['shard'][block]:08d}.arrow", int(table["offset"][block]) + 9)
    assert [damage.block for damage in verify(copied)] == chosen
    assert "block 0 is damaged (samples 0 to " in str(verify(copied)[0])


def test_a_shard_that_is_cut_off_or_missing_is_named(copied: Path) -> None:
    path = copied / "shards/shard-00000001.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataDamagedError, match=rf"shard-00000001.arrow is damaged: it has {len(content) - 1:,} bytes"):
        read_all(copied)
    assert [str(damage) for damage in verify(copied)] == [
        f"shards/shard-00000001.arrow: {len(content) - 1:,} bytes instead of {len(content):,}: none of it is read"
    ]
    path.write_bytes(content[: len(content) // 2])
    assert "is cut off" in str(verify(copied)[0])
    path.write_bytes(b"")
    with pytest.raises(DataDamagedError, match="it has 0 bytes"):
        read_all(copied)
    path.unlink()
    with pytest.raises(DataDamagedError, match=r"1 of \d+ shards are missing: shard-00000001.arrow"):
        Shards(copied)
    assert [damage.what for damage in verify(copied)] == ["missing"]


def test_a_torn_manifest_or_table_is_refused(copied: Path) -> None:
    for path in (copied / "manifest.json", copied / "tables/part-00000.blocks.arrow"):
        content = path.read_bytes()
        for torn in (content[:-1], content[: len(content) // 2], b"", b"{}", b"[]", b"null"):
            path.write_bytes(torn)
            with pytest.raises(DataDamagedError, match=rf"{path.name} is damaged"):
                Shards(copied)
        path.write_bytes(content)
    path.unlink()
    with pytest.raises(DataDamagedError, match=r"blocks.arrow is missing"):
        Shards(copied)


def test_other_versions(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no version 2; there are 1 to 1"):
        Shards(copied, version=2)
    with pytest.raises(DataError, match=r"holds no shards.*aetheria data prepare SOURCE -o nothing"):
        Shards(tmp_path / "nothing")
    raw = Manifest.read(copied)
    object.__setattr__(raw, "format", 99)
    (copied / "manifest.json").write_bytes(raw.encode())
    with pytest.raises(DataError, match="is in format 99; this version of Aetheria reads up to 1"):
        Shards(copied)


def test_a_block_in_quarantine_is_not_read(copied: Path) -> None:
    manifest = Manifest.read(copied)
    entry = {"part": 0, "block": 1, "reason": "damaged", "time": "2026-01-01T00:00:00Z"}
    object.__setattr__(manifest, "quarantined", [entry])
    object.__setattr__(manifest, "version", 2)
    manifest.write(copied)
    shards = Shards(copied)
    assert shards.quarantined == (1,)
    first = int(shards.block_rows[0])
    assert shards.batch([first - 1])["number"].tolist() == [first - 1]
    with pytest.raises(DataError, match=r"block 1 \(samples .*\) is in quarantine"):
        shards.batch([first])


def test_many_blocks_and_shards_are_not_all_kept(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aetheria.data import places

    monkeypatch.setattr(places, "_MAPS", 1)
    monkeypatch.setattr(places, "_KEPT", 2)
    shards = Shards(written)
    rows: NDArray[np.int64] = np.random.default_rng(0).permutation(300)
    assert np.array_equal(shards.columns(rows, ["number"])["number"], rows)
    assert len(shards._blocks._place._maps) == 1
    assert len(shards._blocks._kept) == 2


def test_several_threads_read_at_once(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aetheria.data import places

    monkeypatch.setattr(places, "_MAPS", 1)
    monkeypatch.setattr(places, "_KEPT", 2)
    shards = Shards(written)

    def read(seed: int) -> bool:
        rows = np.random.default_rng(seed).integers(0, 300, 200)
        columns = shards.columns(rows, ["number", "nested/deep/text"])
        return np.array_equal(columns["number"], rows)  # type: ignore[arg-type]

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(60)))


# --- fields ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (Number("int64"), 1.5, "expected int64; found 1.5"),
        (Number("int64"), "1", "expected numbers .int64.; found str '1'"),
        (Number("uint8"), 256, "expected uint8; found 256"),
        (Number("uint8"), -1, "expected uint8; found -1"),
        (Number("int8"), True, None),
        (Number("float32"), 3, None),
        (Number("float32"), 1e300, "expected float32; found 1e.300"),
        (Number("float32"), float("inf"), None),
        (Number("bool"), 1, "expected bool; found 1"),
        (Number("uint64"), 2**64 - 1, None),
        (Number("int64"), 2**63, "expected int64; found 9223372036854775808"),
        (Number("int64"), None, "found NoneType None"),
        (Array("float32", (2,)), torch.zeros(2, dtype=torch.float64), "expected float32; found float64"),
        (Array("float32", (2,)), torch.zeros(3), r"expected the shape \(2,\); found \(3,\)"),
        (Array("float32", (2,)), torch.zeros(2, 1), r"expected the shape \(2,\); found \(2, 1\)"),
        (Array("uint16", (1,)), torch.zeros(1, dtype=torch.bfloat16), "expected uint16; found bfloat16"),
        (Array("bfloat16", (1,)), np.zeros(1, np.uint16), "expected bfloat16; found uint16"),
        (Array("float32", (None,)), [[1.0], [2.0, 3.0]], "expected numbers .float32.; found list"),
        (Array("float32", (None,)), torch.zeros(2, dtype=torch.complex64), "expected numbers"),
        (Array("float32", (2,)), torch.zeros(2).to_sparse(), "expected numbers"),
        (Array("float32", (None, 2)), [[1.0, 2.0]], None),
        (Text(), b"x", "expected a string; found bytes"),
        (Text(), "\ud800", "found a string that is no text"),
        (Bytes(), "x", "expected bytes; found str"),
        (Image(), b"not an image", "expected the bytes of an image file"),
    ],
)
def test_a_value_is_refused_not_bent(tmp_path: Path, field: Any, value: Any, said: str | None) -> None:
    folder = tmp_path / "data"
    if said is None:
        write_shards([{"x": value}], folder, {"x": field})
        assert np.array_equal(np.asarray(Shards(folder)[0]["x"]), np.asarray(value))
        return
    with pytest.raises(DataError, match=rf"sample 0, field 'x': .*{said}"):
        write_shards([{"x": value}], folder, {"x": field})


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([{"a": 1}, {"b": 1}], r"sample 1, 'value': it does not look like the first one: \{'b': 1\}"),
        ([{"a": 1}, 3], "sample 1, 'value'"),
        ([(1, 2), (1,)], "sample 1"),
        ([{"a": {"b": (1, 2)}}, {"a": {"b": (1,)}}], "sample 1, 'a/b'"),
        ([{"a": 1}, {"a": "1"}], "sample 0, field 'a': there is no column for int 1|sample 1, field 'a'"),
        ([{"a": None}], "sample 0, field 'a': there is no column for NoneType None: convert it"),
        ([{"a": np.zeros(2)}, {"a": np.zeros((2, 2))}], "sample 1, field 'a': expected 1 dimensions.*found 2"),
        ([{"a/b": 1}], "a string without a slash; found 'a/b'"),
        ([{1: 1}], "a string without a slash; found 1"),
        ([{}], "at least one field"),
        ([], "there are no samples, and no schema"),
    ],
)
def test_samples_that_do_not_look_alike_are_refused(tmp_path: Path, samples: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        write_shards(samples, tmp_path / "data")


def test_a_sample_behind_the_first_ones_that_differs_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sample 400, field 'x': expected the shape \(2,\); found \(3,\)"):
        write_shards(({"x": np.zeros(3 if n == 400 else 2)} for n in range(500)), tmp_path / "shape")
    with pytest.raises(
        DataError, match=r"sample 400, in 'a': expected a dictionary with the keys \['b'\]; found \['c'\]"
    ):
        write_shards(({"a": {"c" if n == 400 else "b": 1}} for n in range(500)), tmp_path / "keys")
    with pytest.raises(DataError, match=r"sample 400: expected a tuple of 2; found one of 1"):
        write_shards(((1,) if n == 400 else (1, 2) for n in range(500)), tmp_path / "tuple")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Array("complex64"), "there are no columns of 'complex64'"),
        (lambda: Array("bfloat16", (1,), tensor=False), "'bfloat16' as NumPy arrays"),
        (lambda: Array("int8", (0,)), "at least one element"),
    ],
)
def test_there_are_no_such_fields(make: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        make()
