"""Folders of images, and what other libraries have written: the files in `tests/written_by_others` are theirs."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pictures
from tests.written_by_others.write import COUNT, HERE, pixels, sample

from aetheria.data import Shards, write_shards
from aetheria.data.fields import Array, Bytes, Image, Number, Text
from aetheria.data.importing import (
    BadRow,
    Choices,
    HuggingFaceDataset,
    ImageFolder,
    MdsFolder,
    ParquetFiles,
    Rows,
    Skipping,
    TarFiles,
    recognise,
)
from aetheria.errors import DataError


def imported(tmp_path: Path, rows: Rows) -> list[Any]:
    """Returns the samples of a source after they were written and read."""
    write_shards(rows, tmp_path / "imported")
    shards = Shards(tmp_path / "imported")
    return [shards[number] for number in range(len(shards))]


# --- written by others -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mds", "mds_zstd"])
def test_mds(tmp_path: Path, name: str) -> None:
    rows = MdsFolder(HERE / name)
    found = imported(tmp_path, rows)
    assert len(found) == COUNT
    assert len(list((HERE / name).glob("shard*"))) > 1
    for number, read in enumerate(found):
        wanted = sample(number)
        assert [read[key] for key in ("whole", "real", "text", "raw")] == [
            wanted[key] for key in ("whole", "real", "text", "raw")
        ]
        assert (read["str_int"], read["str_float"], json.loads(read["json"])) == (number, number / 2, wanted["json"])
        assert np.array_equal(read["fixed"].numpy(), wanted["fixed"])
        assert read["varying"].tolist() == read["free"].tolist() == list(range(1 + number % 3))
        assert np.array_equal(read["png"], pixels(number))
        assert np.array_equal(read["pil"], pixels(number))
    assert rows.schema.fields["fixed"] == Array("int16", (2, 3))
    assert rows.schema.fields["free"] == Array("float32", (None,))
    assert pickle.loads(pickle.dumps(rows))[5]["text"] == sample(5)["text"]


def test_mds_that_is_not_what_its_index_says_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(HERE / "mds", tmp_path / "mds"))
    shards = sorted(folder.glob("*.mds"))
    content = bytearray(shards[0].read_bytes())
    content[-3] ^= 1
    shards[0].write_bytes(content)
    with pytest.raises(DataError, match=r"shard.00000.mds is damaged: its sha1 is"):
        MdsFolder(folder, Choices(columns=("text",)))[0]
    shards[0].write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"shard.00000.mds is damaged: it has"):
        MdsFolder(folder, Choices(columns=("text",)))[0]
    unhashed = json.loads((folder / "index.json").read_bytes())
    for shard in unhashed["shards"]:
        shard["raw_data"]["hashes"] = {}
    (folder / "index.json").write_text(json.dumps(unhashed))
    for place in (5, 8, int.from_bytes(content[4:8], "little")):  # where samples begin, and how long their columns are
        shards[0].write_bytes(content[:place] + b"\xff\xff" + content[place + 2 :])
        with pytest.raises(DataError, match=r"shard.00000.mds, sample \d: its columns do not make up the sample"):
            list(MdsFolder(folder, Choices(columns=("text",))))
    shards[-1].unlink()
    with pytest.raises(DataError, match=rf"the shard {shards[-1].name} is missing"):
        MdsFolder(folder)
    index = json.loads((folder / "index.json").read_bytes())
    for shard in index["shards"]:
        shard["column_encodings"] = ["pkl"] * len(shard["column_encodings"])
    shutil.copytree(HERE / "mds", folder, dirs_exist_ok=True)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"column 'fixed' is 'pkl': it may run any code when it is read"):
        MdsFolder(folder)


@pytest.mark.parametrize("kind", ["one", "exported.parquet"])
def test_datasets_of_hugging_face(tmp_path: Path, kind: str) -> None:
    rows = HuggingFaceDataset(HERE / "hf" / kind) if kind == "one" else ParquetFiles(HERE / "hf" / kind)
    assert rows.notes == {"classes": {"label": ["even", "odd"]}}
    assert rows.schema.fields == {
        "whole": Number("int32"), "real": Number("float32"), "text": Text(), "raw": Bytes(),
        "fixed": Array("int16", (2, 3)), "varying": Array("float32", (None,)), "label": Number("int64"),
        "picture": Image("RGB"),
    }  # fmt: skip
    found = imported(tmp_path, rows)
    assert len(found) == COUNT
    for number, read in enumerate(found):
        wanted = sample(number)
        assert [read[key] for key in ("whole", "real", "text", "raw", "label")] == [
            *(wanted[key] for key in ("whole", "real", "text", "raw")),
            number % 2,
        ]
        assert np.array_equal(read["fixed"].numpy(), wanted["fixed"])
        assert read["varying"].tolist() == list(range(number % 3))
        assert np.array_equal(read["picture"], pixels(number))
    again = pickle.loads(pickle.dumps(rows))
    assert again[COUNT - 1]["text"] == sample(COUNT - 1)["text"]


def test_a_dictionary_of_datasets_is_several() -> None:
    with pytest.raises(DataError, match=r"holds several datasets, train, test. Give the folder of one of them"):
        HuggingFaceDataset(HERE / "hf/two")
    rows = HuggingFaceDataset(HERE / "hf/two/train", Choices(columns=("whole",), types={"whole": "float32"}))
    assert [row["whole"] for row in rows] == [sample(number)["whole"] for number in (5, 2, 3)]
    with pytest.raises(DataError, match=r"hf is no dataset of `save_to_disk`: it has no state.json"):
        HuggingFaceDataset(HERE / "hf")


def test_the_real_library_agrees(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"a": number, "b": [[number]] * 2} for number in range(3000)]
    datasets.Dataset.from_list(rows).filter(lambda row: row["a"] % 3 == 0).save_to_disk(str(tmp_path / "d"))
    found = HuggingFaceDataset(tmp_path / "d")
    assert [row["a"] for row in found] == list(range(0, 3000, 3))


def test_a_dataset_whose_file_is_missing_or_cut_off_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(HERE / "hf/one", tmp_path / "one"))
    file = folder / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:-900])
    with pytest.raises(DataError, match=r"cannot read .*data-00001-of-00002.arrow"):
        HuggingFaceDataset(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"cannot read .*data-00001-of-00002.arrow"):
        HuggingFaceDataset(folder)


def test_webdataset(tmp_path: Path) -> None:
    rows = TarFiles(HERE / "webdataset.tar.gz")
    assert rows.schema.fields["fixed.npy"] == Array("int16", (2, 3))
    assert rows.schema.fields["varying.npy"] == Array("float32", (None,))
    for number, read in enumerate(imported(tmp_path, rows)):
        wanted = sample(number)
        assert (read["__key__"], read["cls"]) == (f"folder/{number:04d}", wanted["whole"])
        assert (read["txt"], read["raw"], json.loads(read["json"])) == (wanted["text"], wanted["raw"], wanted["json"])
        assert np.array_equal(read["fixed.npy"].numpy(), wanted["fixed"])
        assert read["varying.npy"].tolist() == list(range(number % 3))
        assert np.array_equal(read["png"], pixels(number))
    assert rows[5]["cls"] == 2, "in any order"
    assert rows[1]["cls"] == -2


# --- tar files -------------------------------------------------------------------------------------------------------
def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_samples_of_several_tar_files(tmp_path: Path) -> None:
    long = "a" * 150  # whose header takes several blocks
    files = [
        tar_of(tmp_path / f"{part}.tar", [
            member
            for number in range(part * 100, part * 100 + 100)
            for member in (
                (f"{long}/{number:05d}.cls", b"%d\n" % number), (f"{long}/{number:05d}.X.TXT", b"x" * number)
            )
        ] + [("README", b"of no sample"), (f"{part}/.hidden.txt", b"")])
        for part in range(3)
    ]  # fmt: skip
    rows = TarFiles(files)
    assert len(rows) == 300
    for number in [0, 299, 100, 99, 7, 8]:
        assert rows[number] == {"__key__": f"{long}/{number:05d}", "cls": number, "x.txt": "x" * number}
    assert [len(TarFiles(files, Choices(limit=limit))) for limit in (1, 150)] == [1, 150]


def test_tar_files_that_are_cut_off_or_uneven_are_refused(tmp_path: Path) -> None:
    members = [
        ("a.cls", b"1"),
        ("a.txt", b"x"),
        ("b.cls", b"no"),
        ("b.txt", b"x"),
        ("c.cls", b"2"),
        ("d.cls", b"3"),
        ("d.txt", b""),
    ]
    path = tar_of(tmp_path / "t.tar", members)
    with pytest.raises(BadRow, match=r"t.tar, sample 'c': it has no .txt; it has .cls"):
        TarFiles(path)
    rows = Skipping(TarFiles(path, Choices(skip=True)))
    assert [row["cls"] for row in rows] == [1, 3]
    assert [text.partition("sample ")[2][:30] for text in rows.bad.named] == [
        "'b': .cls: invalid literal for",
        "'c': it has no .txt; it has .c",
    ]
    assert len(TarFiles(path, Choices(columns=("cls", "__key__"), types={"cls": "text"}))) == 4
    content = path.read_bytes()
    for cut in (512 * 3, 512 * 4 - 1, 512 * 13, 512 * 7 + 9):  # between members, and within
        path.write_bytes(content[:cut])
        with pytest.raises(DataError, match=r"t.tar does not read as a tar file, or is cut off"):
            TarFiles(path, Choices(skip=True))
    path.write_bytes(content + content)
    with pytest.raises(DataError, match="there is something else behind byte"):
        TarFiles(path, Choices(skip=True))
    with pytest.raises(DataError, match="column 'pkl' is a pickle, which may run any code"):
        TarFiles(tar_of(path, [("a.pkl", b"x")]))
    with pytest.raises(DataError, match=r"sample 'a': it has two files .txt"):
        TarFiles(tar_of(path, [("a.txt", b"x"), ("a.txt", b"y")]))
    with pytest.raises(DataError, match="there are no samples"):
        TarFiles(tar_of(path, [("readme", b"x")]))
    raw = io.BytesIO()
    np.save(raw, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BadRow, match=r"sample 'a': an array cannot be read: Object arrays"):
        TarFiles(tar_of(path, [("a.npy", raw.getvalue())]))


# --- images ----------------------------------------------------------------------------------------------------------
def images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Pictures.fromarray(pixels(number)).save(folder / name)
    return folder


def test_folders_of_images_are_classes(tmp_path: Path) -> None:
    folder = images(tmp_path / "photos", "dog/1.png", "cat/deep/2.JPEG", "cat/1.png", "bird/x.webp")
    (folder / ".hidden").mkdir()
    (folder / "cat/.thumb.png").write_bytes(b"")
    rows = ImageFolder(folder)
    assert rows.notes == {"classes": {"label": ["bird", "cat", "dog"]}}
    read = imported(tmp_path, rows)
    assert [(row["name"], row["label"]) for row in read] == [
        ("bird/x.webp", 0), ("cat/1.png", 1), ("cat/deep/2.JPEG", 1), ("dog/1.png", 2)
    ]  # fmt: skip
    assert np.array_equal(read[3]["image"], pixels(0))
    gray = ImageFolder(folder, Choices(columns=("label", "image"), image_mode="L"))
    assert gray.schema.fields == {"label": Number("int64"), "image": Image("L")}
    flat = ImageFolder(folder / "dog")
    assert list(flat.schema.fields) == ["image", "name"]
    settled = ImageFolder(folder, Choices(classes={"label": ["dog", "cat", "cow", "bird"]}))
    assert [row["label"] for row in settled] == [3, 1, 1, 0]
    with pytest.raises(DataError, match=r"have no class 'bird'; they have dog, cat. .* a new class needs new data"):
        ImageFolder(folder, Choices(classes={"label": ["dog", "cat"]}))


def test_folders_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"folders train, val look like parts of a dataset .* Give one of them: .*train"
    ):
        ImageFolder(images(tmp_path / "split", "train/cat/1.png", "val/cat/1.png"))
    with pytest.raises(DataError, match=r"there are images beside folders of images \(1.png, cat/\)"):
        ImageFolder(images(tmp_path / "mixed", "cat/1.png", "1.png"))
    with pytest.raises(DataError, match=r"no column 'labels'. Did you mean 'label'"):
        ImageFolder(images(tmp_path / "a", "cat/1.png"), Choices(columns=("labels",)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"there are no images in it"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(DataError, match="there is no folder"):
        ImageFolder(tmp_path / "nowhere")


def test_an_image_that_is_cut_off_is_named(tmp_path: Path) -> None:
    folder = images(tmp_path / "photos", "a/1.png", "a/2.jpg", "a/3.png")
    Pictures.effect_noise((64, 64), 50).save(folder / "a/2.jpg")
    content = (folder / "a/2.jpg").read_bytes()
    (folder / "a/2.jpg").write_bytes(content[: len(content) // 2])
    (folder / "a/3.png").write_bytes(b"<html>not found</html>")
    rows = Skipping(ImageFolder(folder))
    assert [row["name"] for row in rows] == ["a/1.png"]
    assert rows.bad.named[0].startswith(f"{folder}/a/2.jpg: the image cannot be decoded: image file is truncated")
    assert rows.bad.named[1] == f"{folder}/a/3.png: the image cannot be decoded: it is no image file that can be read."


# --- which kind ------------------------------------------------------------------------------------------------------
def test_the_kind_goes_by_what_is_there(tmp_path: Path) -> None:
    for name in ("a.csv", "b.tsv.gz", "c.jsonl", "d.parquet", "e.txt", "f.tar", "g.tar.gz", "h.tgz"):
        (tmp_path / name).write_bytes(b"x")
    kinds = [recognise(path) for path in sorted(tmp_path.iterdir())]
    assert kinds == ["csv", "csv", "jsonl", "parquet", "text", "webdataset", "webdataset", "webdataset"]
    assert recognise(f"{tmp_path}/*.tar*") == "webdataset"
    assert [recognise(HERE / name) for name in ("mds", "mds_zstd", "hf/one", "hf/two")] == ["mds", "mds", "hf", "hf"]
    assert recognise(images(tmp_path / "i", "cat/1.png")) == "images"
    (tmp_path / "i/LICENSE").write_text("of no known kind")
    assert recognise(tmp_path / "i") == "images"


def test_what_is_unclear_is_asked_about(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", "c.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(
        DataError, match=r"unclear what this is: there are files 2 of csv, 1 of text.*Say which kind. images: a"
    ):
        recognise(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"x.bin: it is unclear what this is: 1 files of no known ending"):
        recognise(tmp_path / "x.bin")
    with pytest.raises(DataError, match=r"single image. Give the folder"):
        recognise(images(tmp_path / "i", "1.png") / "1.png")
    with pytest.raises(DataError, match="no file matches"):
        recognise(f"{tmp_path}/*.tar")
    with pytest.raises(DataError, match=r"there is no .*nowhere"):
        recognise(tmp_path / "nowhere")
    write_shards([1, 2], tmp_path / "shards")
    with pytest.raises(DataError, match="holds shards already"):
        recognise(tmp_path / "shards")
