"""Shards of any source: what `aetheria data prepare` does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from aetheria.data.describing import in_words
from aetheria.data.fields import Array, Field, Number
from aetheria.data.importing.choices import Choices
from aetheria.data.importing.kinds import KINDS, files_of, open_rows, recognise
from aetheria.data.importing.rows import Progress, Skipping, Tally, limited
from aetheria.data.importing.text import PackedText, TextColumn, TextFiles, open_tokenizer
from aetheria.data.manifest import MANIFEST, Manifest
from aetheria.data.schema import Schema
from aetheria.data.writer import write_shards
from aetheria.errors import DataError, did_you_mean

__all__ = ["Packing", "Prepared", "prepare"]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How text becomes rows of tokens.

    Args:
        tokenizer: "bytes", a tokenizer.json, or the folder of one.
        length: of a row.
        end: the token that is added to each document, if any.
        separator: what stands between the documents of a text file; None makes one of each file.
    """

    tokenizer: str = "bytes"
    length: int = 1024
    end: str | None = None
    separator: str | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was prepared.

    Attributes:
        manifest: of the data.
        kind: of the source.
        new: False where it had been done before, so that nothing was.
        rows: samples that are there because of this source.
        skipped: bad rows that were left out.
        named: what is wrong with the first thousand of these.
    """

    manifest: Manifest
    kind: str
    new: bool
    rows: int
    skipped: int = 0
    named: tuple[str, ...] = ()


class _First:
    """The first rows of what can only be iterated."""

    def __init__(self, samples: Any, count: int) -> None:
        self._samples, self._count = samples, count
        self.schema: Schema = samples.schema

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._samples), self._count)


def prepare(
    source: Path | str,
    out: Path | str,
    kind: str | None = None,
    choices: Choices | None = None,
    packing: Packing | None = None,
    *,
    workers: int = 0,
    shard_bytes: int = 64 << 20,
    block_bytes: int | None = None,
    compression: Literal["zstd", "lz4"] | None = None,
    key: str | None = None,
    append: str | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Writes shards of a source. The same call continues what was interrupted, and does nothing where all is done.

    Args:
        source: a file, a folder, or a pattern of files such as "data/*.tar".
        out: the folder of the shards.
        kind: of the source, one of `KINDS`; None goes by what is there.
        choices: which columns, of which types, what becomes of bad rows.
        packing: makes rows of tokens of a source of text, or of a column of text of any other source. For text files
            None packs their bytes.
        workers, shard_bytes, block_bytes, compression, key, append: as for `write_shards`.
        progress: is told ("looking", done, total) and ("writing", samples, all of them or None).

    Raises:
        DataError: the source is not what it should be, which is said before anything is written where it can be known;
            what `write_shards` raises.
    """
    choices, out = choices or Choices(), Path(out)
    if kind is not None and kind not in KINDS:
        raise DataError(f"there is no kind of source {kind!r}. {did_you_mean(kind, KINDS)}")
    kind = kind or recognise(source)
    if kind == "text":
        packing = packing or Packing()
    told = _told(source, kind, choices, packing)
    note = "prepared" if append is None else f"prepared/{append}"
    held = Manifest.read(out) if (out / MANIFEST).exists() else None
    if held is not None:
        if (done := _done(held, out, note, told, append)) is not None:
            return done
        choices = dataclasses.replace(choices, classes=held.notes.get("classes", {}))
        key = held.key if key is None else key
    samples, notes, bad = _opened(source, kind, choices, packing, progress)
    if held is not None:
        _check_addition(held, out, samples.schema, notes)
    total = len(samples) if hasattr(samples, "__len__") else None
    manifest = write_shards(
        samples if total is not None else _Counted(samples, told, bad),
        out,
        samples.schema if held is None else None,
        workers=workers,
        shard_bytes=shard_bytes,
        block_bytes=block_bytes,
        compression=compression,
        key=key,
        append=append,
        notes=notes | {note: told},
        progress=None if progress is None else lambda rows, _: progress("writing", rows, total),
    )
    rows = next(part.rows for part in manifest.parts if part.name == (append or ""))
    return Prepared(manifest, kind, True, rows, bad.count, tuple(bad.named))


class _Counted:
    """Samples that, at their end, put it into the note how many were left out: it is read when all is written."""

    def __init__(self, samples: Any, note: dict[str, Any], bad: Tally) -> None:
        self._samples, self._note, self._bad = samples, note, bad

    def __iter__(self) -> Iterator[Any]:
        yield from self._samples
        self._note["skipped"] = self._bad.count


def _told(source: Path | str, kind: str, choices: Choices, packing: Packing | None) -> dict[str, Any]:
    """Returns what the manifest says of where samples come from, and how they were made."""
    made = {name: value for name, value in dataclasses.asdict(choices).items() if name != "classes" and value}
    packed = {} if packing is None else {"packing": dataclasses.asdict(packing)}
    found: dict[str, Any] = json.loads(
        json.dumps({"source": str(Path(source).absolute()), "kind": kind, "choices": made} | packed)
    )
    return found


def _done(held: Manifest, out: Path, note: str, told: dict[str, Any], append: str | None) -> Prepared | None:
    """Returns what was prepared by the same call; None if that is still to be done.

    Raises:
        DataError: something else has been done there.
    """
    part = next((part for part in held.parts if part.name == append), None)
    if append is not None and part is None:
        return None
    before = dict(held.notes.get(note) or {})
    skipped = before.pop("skipped", 0)
    if before == told:
        rows = (part or held.parts[0]).rows
        return Prepared(held, told["kind"], False, rows, skipped)
    made_of = f", of {before['source']}" if "source" in before else ""
    if append is not None:
        raise DataError(f"{out}: other samples were added under the name {append!r}{made_of}. Choose another name.")
    same = " with other choices" if before.get("source") == told["source"] else ""
    raise DataError(
        f"{out} holds {held.rows:,} samples already{made_of}{same}. To add to them say under which name (append); to "
        "write others choose another folder."
    )


def _opened(
    source: Path | str, kind: str, choices: Choices, packing: Packing | None, progress: Progress | None
) -> tuple[Any, dict[str, Any], Tally]:
    """Returns the samples, notes on them, and the tally of those that are left out while they are read."""
    if kind == "text":
        assert packing is not None
        if choices.columns is not None or choices.types:
            raise DataError("text files have no columns to choose. Leave columns and types out.")
        documents: Any = TextFiles(files_of(source, kind), packing.separator, choices.skip)
        samples, bad, notes = documents, documents.bad, {}
    else:
        if packing is not None and packing.separator is not None:
            raise DataError(
                f"the separator is for text files; in a source of the kind {kind!r} each row is a document."
            )
        rows = open_rows(source, kind, choices, progress)
        notes = dict(rows.notes)
        samples = rows = limited(rows, choices)
        bad = Tally()
        if choices.skip:
            samples = skipping = Skipping(rows)
            bad = skipping.bad
        if packing is not None:
            documents = TextColumn(samples, rows.schema)
    if packing is None:
        return samples, notes, bad
    packed = PackedText(documents, open_tokenizer(packing.tokenizer), packing.length, packing.end)
    if kind == "text" and choices.limit is not None:
        return _First(packed, choices.limit), packed.notes, bad
    return packed, notes | packed.notes, bad


def _check_addition(held: Manifest, out: Path, schema: Schema, notes: dict[str, Any]) -> None:
    """Makes sure that samples are like those that they are added to.

    Raises:
        DataError: they are not.
    """
    if notes.get("tokenizer") != held.notes.get("tokenizer"):
        raise DataError(
            f"{out} has tokens of {held.notes.get('tokenizer')}; these would be of {notes.get('tokenizer')}. They "
            "do not go together."
        )
    before, classes = held.notes.get("classes"), notes.get("classes")
    if classes is not None and before != classes:
        raise DataError(f"{out} has the classes {before}; these have {classes}. Labels are numbers of these names.")
    kept = Schema.from_state(held.schema).fields
    if kept.keys() != schema.fields.keys():
        raise DataError(f"{out} has the columns {', '.join(kept)}; these are {', '.join(schema.fields)}.")
    for path, field in schema.fields.items():
        if not _holds(kept[path], field):
            raise DataError(
                f"{out}: column {path!r} is {in_words(kept[path])} there; here it would be {in_words(field)}. Choose "
                "its type, if that is what differs."
            )


def _holds(kept: Field, field: Field) -> bool:
    """Returns whether every value of one field is a value of another."""
    if isinstance(kept, Number) and isinstance(field, Number):
        return kept == field or (kept.dtype, field.dtype) == ("float64", "int64")
    if type(kept) is Array and type(field) is Array:
        return (kept.dtype, len(kept.shape)) == (field.dtype, len(field.shape)) and all(
            size in (None, found) for size, found in zip(kept.shape, field.shape)
        )
    return kept == field
