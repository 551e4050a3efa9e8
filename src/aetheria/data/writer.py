"""Writing samples as shards: in parallel, to be continued where it was interrupted, to be added to.

What is not finished is in a folder of its own (`.writing`). A shard is written there, fsynced, renamed to its place,
and noted as finished; when all are, the tables and at last the manifest are written. So a folder has the data that its
manifest names, whatever happens; and the same call, made again, goes on behind the last shard that was finished. How
samples are divided into blocks and shards depends on nothing but the samples: so what was interrupted ends up as the
same bytes.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import xxhash

from aetheria.data.encoding import Blocking, Source, as_batch, encoded_blocks
from aetheria.data.fields import Array
from aetheria.data.manifest import (
    MANIFEST,
    MAX_ROWS,
    MAX_SHARDS,
    MAX_UID,
    WRITING,
    Manifest,
    Part,
    hash_of,
)
from aetheria.data.schema import Schema
from aetheria.data.shard_file import FinishedShards, ShardFile
from aetheria.errors import DataError
from aetheria.runs import fsync_directory, write_atomically

__all__ = ["explain_writing", "folder_lock", "write_shards"]

_BEGUN = "begun.json"


def write_shards(
    samples: Any,
    out: Path | str,
    schema: Any = None,
    *,
    workers: int = 0,
    shard_bytes: int = 64 << 20,
    block_bytes: int | None = None,
    compression: Literal["zstd", "lz4"] | None = None,
    append: str | None = None,
    key: str | None = None,
    uid: int | None = None,
    notes: dict[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Manifest:
    """Writes samples into a folder, from which `Shards` reads them.

    A sample is a value, or a dictionary or tuple of values, nested as they like: tensors, arrays, numbers, strings,
    bytes, Pillow images. If the writing is interrupted, by whatever, the same call continues it, with the same samples:
    a sequence at once, an iterable after it has passed over those that are written.

    Args:
        samples: a sequence, a map-style dataset, or any iterable; `packing.PackedTokens` for text.
        out: the folder; made if it is not there.
        schema: a field, or a dictionary or tuple of such, nested as samples are; None looks at the first 256 samples.
        workers: processes that read (of a sequence) and encode. They change nothing in what is written.
        shard_bytes: size of a file; one sample may exceed it.
        block_bytes: size of a block, the unit that is read and checked at once; uncompressed. None for 1 MB, or up to
            4 MB where the samples are large.
        compression: None leaves blocks as they are used, so that they need not be unpacked in memory.
        append: what these samples are called among those that were added; needed where the folder holds data already.
            What was added once under a name is not added again.
        key: path of an integer field whose values, from 0 on and each once, are the sample ids.
        uid: of new data, 1 to 65535, part of their sample ids; None draws one.
        notes: kept in the manifest.
        progress: called with the samples and bytes that are written, after each block.

    Returns:
        The manifest, which is durable.

    Raises:
        DataError: a sample that cannot be read or is not of the schema, a folder that holds data already or an
            interrupted writing of others, a full disk. What was finished stays.
    """
    if not (isinstance(schema, Schema) or schema is None):
        schema = Schema(schema)
    folder = Path(out).absolute()
    try:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        (folder / "tables").mkdir(exist_ok=True)
        with folder_lock(folder):
            held = _existing(folder, append)
            if held is not None and any(part.name == append for part in held.parts):
                return held
            source = Source(samples)
            schema = _schema_for(schema, samples, source, held)
            _check_key(schema, key, held)
            blocking = Blocking.by_probe(schema, source.probe, shard_bytes, block_bytes, key)
            plan = {
                "append": append,
                "schema": schema.state(),
                "block_rows": blocking.rows,
                "block_bytes": blocking.bytes,
                "shard_bytes": shard_bytes,
                "compression": compression,
                "key": key,
                "first_shard": sum(part.shards for part in held.parts) if held else 0,
                "parts": len(held.parts) if held else 0,
                "source": f"{hash_of(*(message for _, message in _probed(blocking, source))):016x}",
            }
            plan["uid"] = _begin(folder, plan, held.uid if held else uid)
            finished = FinishedShards(folder, plan["first_shard"])
            _write(folder, source, blocking, finished, plan, workers, progress)
            return _commit(folder, finished, plan, held, notes or {})
    except OSError as error:
        raise DataError(explain_writing(folder, error)) from error


def _probed(blocking: Blocking, source: Source) -> list[tuple[int, bytes]]:
    return blocking.encode(source.probe, 0) if source.probe else []


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds a folder of shards against other processes that would write into it.

    Raises:
        DataError: one does.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is writing into {folder}. Wait for it, or end it.") from None
        yield
    finally:
        os.close(descriptor)


def _existing(folder: Path, append: str | None) -> Manifest | None:
    """Returns the manifest of what is there; tidies up what was written completely and then interrupted."""
    if not (folder / MANIFEST).exists():
        return None
    held = Manifest.read(folder)
    begun = folder / WRITING / _BEGUN
    if begun.exists() and json.loads(begun.read_bytes())["parts"] < len(held.parts):
        shutil.rmtree(folder / WRITING)
    if append is None:
        raise DataError(
            f"{folder} holds {held.rows:,} samples already. To add to them say append='a name for what is added'; to "
            "write others choose another folder."
        )
    return held


def _schema_for(schema: Schema | None, samples: Any, source: Source, held: Manifest | None) -> Schema:
    if held is not None:
        kept = Schema.from_state(held.schema)
        if schema is not None and schema != kept:
            raise DataError(
                f"the samples that are there have the fields {kept.fields}; these are to have {schema.fields}. What is "
                "added has the same schema: leave it out."
            )
        return kept
    own = getattr(samples, "schema", None)
    if schema is not None or isinstance(own, Schema):
        return schema or own  # type: ignore[return-value]
    if not source.probe:
        raise DataError("there are no samples, and no schema that says what they would be. Check where they come from.")
    return Schema.inferred(source.probe)


def _check_key(schema: Schema, key: str | None, held: Manifest | None) -> None:
    if held is not None and held.key != key:
        raise DataError(f"the samples that are there have the key {held.key!r}; these are to have {key!r}.")
    field = schema.fields.get(key) if key is not None else None
    if key is not None and not (
        isinstance(field, Array) and not field.shape and field.dtype.strip("u").startswith("int")
    ):
        raise DataError(f"the key is the path of a field of single integers; found {key!r}: {field}.")


def _begin(folder: Path, plan: dict[str, Any], uid: int | None) -> int:
    """Begins a writing, or continues the one that was begun, if it is the same; returns the uid."""
    if uid is not None and not 1 <= uid <= MAX_UID:
        raise DataError(f"a uid is from 1 to {MAX_UID}; found {uid}.")
    writing = folder / WRITING
    begun = writing / _BEGUN
    plan = json.loads(json.dumps(plan))  # as it comes back
    if not begun.exists():
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
        uid = uid or 1 + secrets.randbelow(MAX_UID)
        write_atomically(begun, json.dumps(plan | {"uid": uid}).encode())
        fsync_directory(folder)
        fsync_directory(folder.parent)  # the folder itself may be new
        return uid
    before = json.loads(begun.read_bytes())
    chosen: int = before.pop("uid")
    if different := sorted(name for name in plan if plan[name] != before.get(name)):
        raise DataError(
            f"{writing} is an interrupted writing with another {' and '.join(different)}"
            f"{' (the samples begin otherwise)' if 'source' in different else ''}. Make the call that was interrupted, "
            "to continue it; or remove that folder, to begin anew."
        )
    if uid not in (None, chosen):
        raise DataError(f"{writing} is an interrupted writing with the uid {chosen}; {uid} was asked for.")
    for path in writing.glob("*.arrow"):
        path.unlink()
    return chosen


def _write(
    folder: Path,
    source: Source,
    blocking: Blocking,
    finished: FinishedShards,
    plan: dict[str, Any],
    workers: int,
    progress: Callable[[int, int], object] | None,
) -> None:
    arrow, limit, compression = blocking.schema.arrow(), plan["shard_bytes"], plan["compression"]
    shard: ShardFile | None = None
    blocks = encoded_blocks(source, blocking, finished.rows, workers)
    try:
        for run in blocks:
            size, rows = sum(len(message) for _, message in run), sum(count for count, _ in run)
            if shard is not None and (shard.bytes + size > limit or shard.rows + rows > MAX_ROWS):
                finished.add(shard)
                shard = None
            if shard is None:
                if finished.next >= MAX_SHARDS:
                    raise DataError(f"there are at most {MAX_SHARDS:,} shards. Make them larger: shard_bytes.")
                shard = ShardFile(folder, finished.next, arrow, compression)
            for _, message in run:
                shard.add(as_batch(message, arrow))
            if progress is not None:
                progress(finished.rows + shard.rows, finished.bytes + shard.bytes)
        if shard is not None:
            finished.add(shard)
            shard = None
    finally:
        blocks.close()  # type: ignore[attr-defined]
        if shard is not None:
            shard.abandon()


def _commit(
    folder: Path, finished: FinishedShards, plan: dict[str, Any], held: Manifest | None, notes: dict[str, Any]
) -> Manifest:
    entries, tables = finished.entries, finished.tables()
    part = Part(
        name=plan["append"] or "",
        first_shard=plan["first_shard"],
        shards=len(entries),
        blocks=sum(len(entry["blocks"]) for entry in entries),
        rows=finished.rows,
        bytes=finished.bytes,
        compression=plan["compression"],
        tables={kind: xxhash.xxh3_128_hexdigest(content) for kind, content in tables.items()},
        source=plan["source"],
    )
    for kind, content in tables.items():
        write_atomically(folder / part.table(plan["parts"], kind), content)
    manifest = Manifest(
        uid=plan["uid"],
        version=held.version + 1 if held else 1,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        schema=plan["schema"],
        parts=(*(held.parts if held else ()), part),
        key=plan["key"],
        quarantined=held.quarantined if held else (),
        notes=(held.notes if held else {}) | notes,
    )
    manifest.write(folder)
    shutil.rmtree(folder / WRITING)
    return manifest


def explain_writing(folder: Path, error: OSError) -> str:
    """Returns in words why shards cannot be written, and what to do."""
    advice = "What is finished stays; put that right and make the same call again, it continues."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there. "
        except OSError:
            free = ""
        advice = f"{free}What is finished stays: make room and make the same call again, it continues."
    return f"cannot write shards into {folder}: {error}. {advice}"
