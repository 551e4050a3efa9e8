"""Making blocks of samples: here, or in other processes; the blocks are the same, in the same order."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from aetheria.data.schema import Schema
from aetheria.errors import DataError

__all__ = ["Blocking", "Source", "as_batch", "encoded_blocks"]

_BLOCK, _LARGE_BLOCK = 1 << 20, 4 << 20  # bytes that are read at once
_FEW = 32  # samples in a block, at which that costs nothing that matters
Message = tuple[int, bytes]  # the rows of a block, and the block as an Arrow message
PROBE, PROBE_BYTES = 256, 1 << 25  # samples by which the rest is judged, and bytes after which fewer will do


class Source:
    """Samples that can be read from a certain one on: a sequence at once, anything else by reading what lies before.

    Args:
        samples: a sequence, a map-style dataset, or anything that is iterated anew each time.

    Attributes:
        probe: the first samples.
        indexed: the sequence; None where the samples can only be iterated.
    """

    def __init__(self, samples: Any) -> None:
        addressed = _is_addressed(samples)
        self.indexed: Any = samples if addressed else None
        if not addressed and not isinstance(samples, Iterable):
            raise DataError(f"samples are a sequence or an iterable; found {type(samples).__name__}.")
        self._rest = iter(()) if addressed else iter(samples)
        self.probe: list[Any] = []
        size = 0
        while len(self.probe) < PROBE and size < PROBE_BYTES:
            found = self._read(len(self.probe), 1)
            if not found:
                break
            size += _size(found[0])
            self.probe += found

    def _read(self, first: int, count: int) -> list[Any]:
        if self.indexed is not None:
            return read_rows(self.indexed, first, min(first + count, len(self.indexed)))
        try:
            return list(islice(self._rest, count))
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"the samples end after about {first} of them: {_said(error)}.") from error

    def runs(self, start: int, count: int) -> Iterator[tuple[int, list[Any] | int]]:
        """Yields runs of `count` samples, the last one shorter, from a sample on: the first one's number, and the rest.

        Of a sequence that is the number behind the last one: who has the sequence reads it there.

        Raises:
            DataError: there are fewer samples than `start`.
        """
        if self.indexed is not None:
            length = len(self.indexed)
            if length < start:
                raise _too_few(length, start)
            yield from ((first, min(first + count, length)) for first in range(start, length, count))
            return
        passed, kept = 0, list(self.probe)
        while passed < start:  # nothing is kept of what has been written
            found = kept[: start - passed] or self._read(passed, min(start - passed, 1024))
            kept = kept[len(found) :]
            if not found:
                raise _too_few(passed, start)
            passed += len(found)
        while True:
            found = kept[:count]
            kept = kept[count:]
            if len(found) < count:
                found += self._read(passed + len(found), count - len(found))
            if not found:
                return
            yield passed, found
            passed += len(found)


def _is_addressed(samples: Any) -> bool:
    data = sys.modules.get("torch.utils.data")
    if isinstance(samples, dict) or (data is not None and isinstance(samples, data.IterableDataset)):
        return False  # torch gives these a __getitem__ that only raises
    return hasattr(samples, "__getitem__") and hasattr(samples, "__len__")


def _too_few(length: int, start: int) -> DataError:
    return DataError(
        f"there are {length} samples; an interrupted writing has {start} of them already. It is continued with the "
        "same samples only."
    )


def read_rows(samples: Any, first: int, end: int) -> list[Any]:
    """Returns samples of a sequence; an exception of its own becomes a DataError that says of which sample."""
    found = []
    for number in range(first, end):
        try:
            found.append(samples[number])
        except Exception as error:
            raise DataError(f"sample {number} cannot be read: {_said(error)}.") from error
    return found


def _said(error: Exception) -> str:
    # What is an error of data says itself what is wrong; of others the type belongs to it.
    return str(error).removesuffix(".") if isinstance(error, DataError) else f"{type(error).__name__}: {error}"


def _size(value: Any) -> int:
    """Returns about how many bytes a value takes."""
    if isinstance(value, dict):
        return sum(_size(item) for item in value.values())
    if isinstance(value, tuple | list):
        return sum(_size(item) for item in value)
    if isinstance(value, bytes | str | bytearray):
        return len(value)
    return 8 * math.prod(getattr(value, "shape", getattr(value, "size", ())))  # about: of any dtype, and of images


class Blocking:
    """How samples become blocks.

    Args:
        schema: of the samples.
        rows: samples in a block.
        bytes: that a block should not exceed by far; where samples are larger than at first, it is cut.
        key: path of the field whose values are ids.
    """

    def __init__(self, schema: Schema, rows: int, bytes: int, key: str | None) -> None:  # noqa: A002
        self.schema = schema
        self.rows = rows
        self.bytes = bytes
        self.key = key

    @classmethod
    def by_probe(
        cls, schema: Schema, probe: Sequence[Any], limit: int, wanted: int | None, key: str | None
    ) -> Blocking:
        """Returns the blocking that suits the first samples.

        Args:
            schema: of the samples.
            probe: the first samples.
            limit: bytes that no block should exceed by far.
            wanted: bytes that a block should have; None for 1 MB, or up to 4 MB where samples are so large that there
                would be few in it, and each would cost the reading of a block.
            key: path of the field whose values are ids.
        """
        each = max(1, schema.encode(probe).nbytes // len(probe)) if probe else 1
        size = min(limit, wanted or max(_BLOCK, min(_LARGE_BLOCK, _FEW * each)))
        return cls(schema, min(max(1, size // each), 1 << 20), size, key)

    def encode(self, samples: Sequence[Any], first: int) -> list[Message]:
        """Returns the blocks of one run of samples.

        Raises:
            DataError: a sample is not of the schema, or its key is none.
        """
        batch = self.schema.encode(samples, first)
        if self.key is not None:
            keys = np.asarray(batch.column(list(self.schema.fields).index(self.key)))
            if keys.min() < 0 or int(keys.max()) > np.iinfo(np.int64).max:
                wrong = int(np.argmax((keys < 0) | (keys > np.iinfo(np.int64).max)))
                raise DataError(f"sample {first + wrong}: a key is from 0 to 2**63 - 1; found {keys[wrong]}.")
        pieces = min(len(samples), max(1, round(batch.nbytes / self.bytes)))
        cuts = [len(samples) * piece // pieces for piece in range(pieces + 1)]
        return [
            (end - begin, batch.slice(begin, end - begin).serialize().to_pybytes()) for begin, end in pairwise(cuts)
        ]


def encoded_blocks(source: Source, blocking: Blocking, start: int, workers: int) -> Iterator[list[Message]]:
    """Yields the blocks of one run of samples after the other.

    Args:
        source: of the samples.
        blocking: how they become blocks.
        start: the first sample.
        workers: processes that make them; 0 makes them here.

    Raises:
        DataError: a sample cannot be read or written, or a worker has died.
    """
    runs = source.runs(start, blocking.rows)
    if not workers:
        for first, run in runs:
            samples = run if isinstance(run, list) else read_rows(source.indexed, first, run)
            yield blocking.encode(samples, first)
        return
    # Not forked from here: this process may have threads, and a fork of it would keep what they hold locked.
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (source.indexed, blocking))
    ahead: deque[Future[list[Message]]] = deque()
    try:
        for first, run in runs:
            ahead.append(_submitted(pool, first, run))
            if len(ahead) >= 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process has died: of too little memory, or because it could not import what the samples are made "
            "of (a script needs `if __name__ == '__main__':`). What is finished stays; the same call continues."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, first: int, run: list[Any] | int) -> Future[list[Message]]:
    try:
        return pool.submit(_in_worker, first, run)
    except (BrokenProcessPool, OSError):
        raise
    except Exception as error:  # whatever a class raises that cannot be sent
        raise DataError(
            f"the samples cannot be sent to worker processes: {_said(error)}. Define their class in a module, or write "
            "with workers=0."
        ) from error


_work: tuple[Any, Blocking] | None = None


def _begin_worker(indexed: Any, blocking: Blocking) -> None:
    global _work
    _work = (indexed, blocking)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(first: int, run: list[Any] | int) -> list[Message]:
    assert _work is not None
    indexed, blocking = _work
    return blocking.encode(run if isinstance(run, list) else read_rows(indexed, first, run), first)


def as_batch(message: bytes, schema: pa.Schema) -> pa.RecordBatch:
    """Returns a block that was made elsewhere."""
    return pa.ipc.read_record_batch(pa.py_buffer(message), schema)
