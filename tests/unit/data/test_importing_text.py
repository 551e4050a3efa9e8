"""Text as rows of tokens: no token is lost, none is added, documents keep their ends, however large they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aetheria.data import PackedTokens, Shards
from aetheria.data.describing import first_rows
from aetheria.data.importing import Choices, PackedText, Packing, TextFiles, open_tokenizer, prepare, text
from aetheria.errors import DataError

DOCUMENTS = ["Größe ☃\n" * 40, "", "two\n\nthree " * 30, "x" * 300, "end"]


def folder_of(tmp_path: Path, documents: list[str] = DOCUMENTS) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, document in enumerate(documents):
        raw = document.encode()
        name = f"{number}.txt"
        (folder / (f"{name}.gz" if number == 2 else name)).write_bytes(gzip.compress(raw) if number == 2 else raw)
    return folder


def documents_of(shards: Shards) -> list[bytes]:
    """Returns the documents whose bytes were packed, put together again."""
    found: list[list[int]] = []
    for row in (shards[number] for number in range(len(shards))):
        tokens, numbers = row["tokens"].tolist(), row["boundaries"]["documents"].tolist()
        for place, (token, number) in enumerate(zip(tokens, numbers)):
            if number < 0:
                break
            if place and number != numbers[place - 1]:
                found.append([])
            if not found:
                found.append([])
            found[-1].append(token)
    return [bytes(document) for document in found]


@pytest.mark.parametrize("at_once", [1 << 24, 100, 7])
@pytest.mark.parametrize("length", [7, 64])
def test_bytes_are_packed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, length: int) -> None:
    monkeypatch.setattr(text, "_AT_ONCE", at_once)  # bytes from which on a document is encoded piece by piece
    prepare(folder_of(tmp_path), tmp_path / "out", packing=Packing(length=length))
    shards = Shards(tmp_path / "out")
    assert b"".join(documents_of(shards)) == "".join(DOCUMENTS).encode()
    begins = [0, *np.cumsum([len(document.encode()) for document in DOCUMENTS if document]).tolist()]
    whole = PackedTokens([list(document.encode()) for document in DOCUMENTS], length, dtype="uint8")
    for row, wanted in zip((shards[number] for number in range(len(shards))), whole, strict=True):
        boundaries = wanted["boundaries"][:-1]
        starts = np.flatnonzero(row["boundaries"]["positions"].numpy() == 0)
        assert set(boundaries[boundaries >= 0].tolist()) <= set(starts.tolist())
        assert np.array_equal(row["tokens"].numpy(), wanted["tokens"])
    assert len(begins) == 5
    assert shards.manifest.notes["tokenizer"] == {"name": "bytes", "vocabulary": 256}


def test_pieces_of_a_document_are_one_document() -> None:
    document = np.arange(50)
    whole = list(PackedTokens([document, [7], document[:3]], 8))
    pieces = list(PackedTokens([iter(np.split(document, [1, 8, 9, 30, 30])), iter([[7]]), iter([[], document[:3]])], 8))
    for one, other in zip(whole, pieces, strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in one)


def test_documents_of_one_file_end_at_a_separator(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("<|end|>".join(["one", "zwei ☃", "", "three\n"]))
    assert list(TextFiles(tmp_path / "t.txt", "<|end|>")) == ["one", "zwei ☃", "", "three\n"]
    prepare(tmp_path / "t.txt", tmp_path / "out", packing=Packing(length=4, separator="<|end|>"))
    assert Shards(tmp_path / "out")[0]["boundaries"]["documents"].tolist() == [0, 0, 0, 1]


def test_text_that_is_none_is_refused_or_left_out_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, ["good", "bad", "unused", "good, too\n"])
    (folder / "1.txt").write_bytes(b"line\n" * 10 + b"\xff\n")
    (folder / "2.txt.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"1.txt: it is no UTF-8: invalid start byte at byte 50"):
        prepare(folder, tmp_path / "out", packing=Packing(length=4))
    monkeypatch.setattr(text, "_AT_ONCE", 20)
    with pytest.raises(DataError, match=r"1.txt, line 11: it is no UTF-8: invalid start byte"):
        prepare(folder, tmp_path / "out", packing=Packing(length=4))
    done = prepare(folder, tmp_path / "other", choices=Choices(skip=True), packing=Packing(length=4))
    assert (done.skipped, len(done.named)) == (1, 1)
    assert b"".join(documents_of(Shards(tmp_path / "other"))) == b"goodgood, too\n"
    assert Shards(tmp_path / "other").manifest.notes["prepared"]["skipped"] == 1
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    with pytest.raises(DataError, match=r"cannot read .*cut.txt.gz: Compressed file ended before"):
        prepare(tmp_path / "cut.txt.gz", tmp_path / "cut")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError, match="there is no text in it"):
        prepare(tmp_path / "empty.txt", tmp_path / "none")
    with pytest.raises(DataError, match="text files have no columns to choose"):
        prepare(folder, tmp_path / "none", choices=Choices(columns=("a",)))
    assert not (tmp_path / "none").exists()


# --- tokenizers ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = pytest.importorskip("tokenizers")
    trained = library.ByteLevelBPETokenizer()
    trained.train_from_iterator(DOCUMENTS, vocab_size=300, special_tokens=["<end>"], show_progress=False)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return path


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_tokenizer_of_a_file(tmp_path: Path, tokenizer: Path, whole_folder: bool) -> None:
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tokenizer))
    name = str(tokenizer.parent if whole_folder else tokenizer)
    prepare(folder_of(tmp_path), tmp_path / "out", packing=Packing(name, 16, "<end>"))
    shards = Shards(tmp_path / "out")
    wanted = [token for document in DOCUMENTS for token in [*library.encode(document).ids, 0]]
    found = shards.columns(np.arange(len(shards)), ["tokens"])["tokens"]
    assert found.dtype == np.uint16
    assert found.reshape(-1)[: len(wanted)].tolist() == wanted
    notes = shards.manifest.notes["tokenizer"]
    assert (notes["vocabulary"], notes["end"], len(notes["sha256"])) == (library.get_vocab_size(), 0, 64)


def test_rows_of_a_table_are_documents(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"n": n, "text": document}) + "\n" for n, document in enumerate(DOCUMENTS)))
    packing = Packing(length=32)
    prepare(path, tmp_path / "out", None, Choices(columns=("text",)), packing)
    assert b"".join(documents_of(Shards(tmp_path / "out"))) == "".join(DOCUMENTS).encode()
    with pytest.raises(DataError, match=r"rows of tokens are made of one column of text; found n, text"):
        prepare(path, tmp_path / "none", packing=packing)
    with pytest.raises(DataError, match="They do not go together"):
        prepare(path, tmp_path / "out", None, Choices(columns=("text",)), Packing(str(tokenizer), 32), append="more")
    assert prepare(path, tmp_path / "out", None, Choices(columns=("text",)), packing, append="more").rows > 10


def test_tokenizers_that_are_none_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(DataError, match="there is no tokenizer"):
        open_tokenizer(tmp_path / "none")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="does not read as a tokenizer"):
        open_tokenizer(tmp_path / "bad.json")
    with pytest.raises(DataError, match="the tokenizer bytes has no token '<end>'"):
        PackedText(["x"], open_tokenizer("bytes"), 4, "<end>")
    assert open_tokenizer(tokenizer).dtype == "uint16"


def test_only_the_first_rows_are_packed(tmp_path: Path) -> None:
    done: Any = prepare(folder_of(tmp_path), tmp_path / "out", choices=Choices(limit=3), packing=Packing(length=8))
    assert done.rows == 3
    [shown] = first_rows(tmp_path / "out", 1)
    assert shown["sample"]["tokens"] == "Größe " == DOCUMENTS[0].encode()[:8].decode(), "bytes are shown as text"
