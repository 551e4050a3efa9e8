"""Text as tokens: files, or a column of any other source, document after document, packed into rows of one length."""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from aetheria.data.fields import Text
from aetheria.data.importing.rows import READ_ERRORS, BadRow, Rows, Tally, existing, open_file
from aetheria.data.packing import PackedTokens
from aetheria.data.schema import Schema
from aetheria.errors import DataError, MissingDependencyError

__all__ = ["ByteTokenizer", "PackedText", "TextColumn", "TextFiles", "Tokenizer", "open_tokenizer"]

TEXTS = (".txt", ".md", ".rst", ".text", ".py")
_AT_ONCE = 1 << 24  # bytes of a document that are encoded at once; one that is larger is cut at the ends of lines
_TOGETHER = 1 << 20  # characters of small documents that are encoded together, by all threads there are


class TextFiles:
    """Documents: each file is one, or several with a separator between them. May be iterated again.

    Args:
        files: one or more; of .gz, .bz2 and .xz what is in them.
        separator: between the documents of a file, of which it is no part; None makes one of each file.
        skip: leave out documents that are no UTF-8, instead of ending with the first one.

    Attributes:
        bad: those that were left out.
    """

    kind: ClassVar[str] = "text"

    def __init__(self, files: Sequence[Path | str] | Path | str, separator: str | None = None, skip: bool = False):
        self._files = existing(files)
        self._separator = (separator or "").encode()
        self._skip = skip
        self.bad = Tally()
        if not any(path.stat().st_size for path in self._files):
            raise DataError(f"{self._files[0]}: there is no text in it. Check the source.")

    def __iter__(self) -> Iterator[Iterator[str] | str]:
        """Yields documents; one that is large as an iterator of its pieces."""
        self.bad.clear()
        for path in self._files:
            if self._separator:
                yield from self._divided(path)
            elif path.stat().st_size <= _AT_ONCE and path.suffix not in (".gz", ".bz2", ".xz"):
                yield from self._whole(path, path.read_bytes(), "")
            elif self._is_text(path):
                yield (str(piece, "utf-8") for piece in _pieces(path))

    def _whole(self, path: Path, content: bytes, place: str) -> Iterator[str]:
        try:
            yield str(content, "utf-8")
        except UnicodeDecodeError as error:
            self._refuse(f"{path}{place}: it is no UTF-8: {error.reason} at byte {error.start}. Convert it to UTF-8.")

    def _divided(self, path: Path) -> Iterator[str]:
        rest, number = b"", 0
        with open_file(path) as file:
            while piece := _read(file, path, 1 << 20):
                *documents, rest = (rest + piece).split(self._separator)
                for document in documents:
                    yield from self._whole(path, document, f", document {number}")
                    number += 1
        if rest.strip():
            yield from self._whole(path, rest, f", document {number}")

    def _is_text(self, path: Path) -> bool:
        """Reads a large file once to see whether it is UTF-8: half a document is not to be in the data."""
        line = 1
        for piece in _pieces(path):
            try:
                str(piece, "utf-8")
            except UnicodeDecodeError as error:
                line += piece.count(b"\n", 0, error.start)
                self._refuse(f"{path}, line {line}: it is no UTF-8: {error.reason}. Convert it to UTF-8.")
                return False
            line += piece.count(b"\n")
        return True

    def _refuse(self, message: str) -> None:
        if not self._skip:
            raise BadRow(message)
        self.bad.add(message)


def _pieces(path: Path) -> Iterator[bytes]:
    """Yields a file in pieces that end with a line; a longer line is cut where a character ends."""
    rest = b""
    with open_file(path) as file:
        while piece := _read(file, path, _AT_ONCE - len(rest)):
            rest += piece
            end = rest.rfind(b"\n") + 1 or _between_characters(rest)
            if end:
                yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _read(file: BinaryIO, path: Path, size: int) -> bytes:
    try:
        return file.read(size)
    except READ_ERRORS as error:
        raise DataError(f"cannot read {path}: {error}.") from error


def _between_characters(text: bytes) -> int:
    """Returns how much of some bytes of UTF-8 are whole characters."""
    end = len(text)
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte & 0xC0 != 0x80:  # where the last character begins
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return end if length <= back else end - back
    return end


class TextColumn:
    """The texts in the rows of a source, as documents. May be iterated again.

    Args:
        rows: whose only column is text; or the same without the bad ones.

    Raises:
        DataError: there is another column.
    """

    def __init__(self, rows: Rows | Iterable[Any], schema: Schema) -> None:
        if [type(field) for field in schema.fields.values()] != [Text]:
            raise DataError(
                f"rows of tokens are made of one column of text; found {', '.join(schema.fields)}. Choose it: columns."
            )
        self._rows = rows
        self._name = next(iter(schema.fields)) if isinstance(schema.tree, dict) else None

    def __iter__(self) -> Iterator[str]:
        return (row if self._name is None else row[self._name] for row in self._rows)


class Tokenizer(ABC):
    """What makes tokens of text.

    Attributes:
        vocabulary: how many tokens there are; each is less than that.
        notes: for the manifest: which tokenizer it is.
    """

    vocabulary: int
    notes: dict[str, Any]

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Returns the tokens of each text, integers of shape [tokens]; none are added for its begin or end."""

    def identify(self, token: str) -> int | None:
        """Returns the number of a token, if there is one that is called so."""
        return None

    @property
    def dtype(self) -> str:
        """The smallest type that holds every token, by NumPy's name."""
        return next(name for name in ("uint8", "uint16", "int32", "int64") if self.vocabulary - 1 <= np.iinfo(name).max)


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 as tokens, 0 to 255."""

    def __init__(self) -> None:
        self.vocabulary = 256
        self.notes = {"name": "bytes", "vocabulary": 256}

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]


class _FastTokenizer(Tokenizer):
    """A tokenizer.json, as the library `tokenizers` reads it."""

    def __init__(self, path: Path) -> None:
        try:
            library = importlib.import_module("tokenizers")
        except ImportError as error:
            raise MissingDependencyError.of("tokenizers", "transformers", f"the tokenizer {path}") from error
        content = path.read_bytes()
        try:
            self._tokenizer: Any = library.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more special
            raise DataError(f"{path} does not read as a tokenizer: {error}.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocabulary = self._tokenizer.get_vocab_size()
        self.notes = {
            "name": path.name if path.parent.name == "" else f"{path.parent.name}/{path.name}",
            "vocabulary": self.vocabulary,
            "sha256": hashlib.sha256(content).hexdigest(),
        }

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(each.ids, dtype=np.int64) for each in encoded]

    def identify(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found


class _SlowTokenizer(Tokenizer):
    """A folder that only `transformers` can read."""

    def __init__(self, path: Path) -> None:
        try:
            library = importlib.import_module("transformers")
        except ImportError as error:
            raise MissingDependencyError.of("transformers", "transformers", f"the tokenizer {path}") from error
        try:
            self._tokenizer: Any = library.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} does not read as a tokenizer: {error}.") from error
        self.vocabulary = len(self._tokenizer)
        digest = hashlib.sha256(json.dumps(sorted(self._tokenizer.get_vocab().items())).encode()).hexdigest()
        self.notes = {"name": path.name, "vocabulary": self.vocabulary, "sha256": digest}

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int64) for text in texts]

    def identify(self, token: str) -> int | None:
        found: int | None = self._tokenizer.get_vocab().get(token)
        return found


def open_tokenizer(name: Path | str) -> Tokenizer:
    """Returns a tokenizer: "bytes", a tokenizer.json, or a folder of `transformers` that holds one.

    Raises:
        DataError: there is none.
        MissingDependencyError: the library that reads it is not installed.
    """
    if str(name) == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        return _FastTokenizer(path / "tokenizer.json") if (path / "tokenizer.json").is_file() else _SlowTokenizer(path)
    if not path.is_file():
        raise DataError(f"there is no tokenizer {path}. Expected 'bytes', a tokenizer.json, or a folder with one.")
    return _FastTokenizer(path)


class PackedText:
    """Rows of tokens, ready to be written: documents packed into rows of one length (`packing.PackedTokens`).

    Args:
        documents: texts; a large one as an iterator of its pieces. Iterated anew each time.
        tokenizer: that makes tokens of them.
        length: of a row.
        end: the token with which each document ends, if it does with one.

    Attributes:
        schema: of a row.
        notes: for the manifest: the tokenizer, and how many tokens it knows.

    Raises:
        DataError: the tokenizer has no such token.
    """

    def __init__(
        self, documents: Iterable[Iterator[str] | str], tokenizer: Tokenizer, length: int, end: str | None = None
    ) -> None:
        self._documents = documents
        self._tokenizer = tokenizer
        number = None if end is None else tokenizer.identify(end)
        if end is not None and number is None:
            raise DataError(f"the tokenizer {tokenizer.notes['name']} has no token {end!r} to end documents with.")
        self._end = np.array([] if number is None else [number], dtype=np.int64)
        self._packed = PackedTokens(self._tokens(), length, dtype=tokenizer.dtype)
        self.schema = self._packed.schema
        self.notes = {"tokenizer": tokenizer.notes | ({} if number is None else {"end": number})}

    def __iter__(self) -> Iterator[Any]:
        self._packed.documents = self._tokens()
        rows = 0
        for row in self._packed:
            rows += 1
            yield row
        if not rows:
            raise DataError("there is no text in the source, so that there are no tokens. Check the source.")

    def _tokens(self) -> Iterator[Any]:
        together: list[str] = []
        size = 0
        for document in self._documents:
            if not isinstance(document, str):
                yield from self._encoded(together)
                together, size = [], 0
                yield self._piecewise(document)
                continue
            together.append(document)
            size += len(document)
            if size >= _TOGETHER:
                yield from self._encoded(together)
                together, size = [], 0
        yield from self._encoded(together)

    def _encoded(self, texts: list[str]) -> Iterator[NDArray[Any]]:
        for tokens in self._tokenizer.encode(texts) if texts else ():
            yield np.concatenate([tokens, self._end]) if len(self._end) else tokens

    def _piecewise(self, pieces: Iterator[str]) -> Iterator[NDArray[Any]]:
        for piece in pieces:
            yield from self._tokenizer.encode([piece])
        yield self._end
