"""Writing a snapshot behind the training's back: the step waits for a copy in host memory, the disk is not its concern.

The order of things makes it atomic: every file is written and fsynced in a folder of a temporary name, the manifest
last; then the folder is renamed, then its parent fsynced. Whatever dies in between leaves no snapshot, and the previous
one untouched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from aetheria.core.shards import as_part_of, is_sharded, part_of
from aetheria.errors import SnapshotError
from aetheria.runs import fsync_directory
from aetheria.snapshot.format import (
    FORMAT,
    MANIFEST,
    MODEL,
    REPLACED,
    STATE,
    Manifest,
    find_tied,
    folder_name,
    plain,
    rank_file,
    weights_digest,
)

if TYPE_CHECKING:
    from aetheria.snapshot.sharded import Team

__all__ = ["SnapshotContent", "SnapshotWriter", "encode_state"]

WRITING, REMOVING = ".writing-", ".removing-"
LARGE = 1 << 20  # bytes; smaller tensors come from memory that is there already
_Place = tuple[Any, ...]  # the way to a tensor through nested containers


@dataclasses.dataclass(frozen=True)
class SnapshotContent:
    """What goes into a snapshot, still the live tensors of the run.

    Attributes:
        manifest: everything but digest, tied weights and files, which are found while writing.
        weights: the model's tensors by clean names.
        state: optimiser, schedulers, scaler, callbacks, cursor, loop.
        rank_state: generators, metric sums and loader state of this rank.
        others: the same of the ranks after it, as `encode_state` returns them.
        consolidate: whether sharded weights are also written in one piece, as `model.safetensors`.
    """

    manifest: Manifest
    weights: dict[str, Tensor]
    state: dict[str, Any]
    rank_state: dict[str, Any]
    others: Sequence[bytes] = ()
    consolidate: bool = False


_Visit = Callable[[Tensor, _Place], Any]


class _Staging:
    """Host memory that snapshots are copied into; kept from one to the next, because fresh pages are slow."""

    def __init__(self) -> None:
        self._buffers: dict[_Place, Tensor] = {}
        self._used: set[_Place] = set()

    def copy(self, content: SnapshotContent, synchronize: Callable[[], None]) -> SnapshotContent:
        self._used = set()
        staged = _mapped(content, self._copied)
        synchronize()
        for place in self._buffers.keys() - self._used:
            del self._buffers[place]
        return staged

    def reserve(self, content: SnapshotContent) -> Callable[[Event], None]:
        """Returns what gets the memory for such a content, elsewhere and unless it is told to stop."""
        wanted: list[tuple[_Place, torch.Size, torch.dtype, bool]] = []

        def note(tensor: Tensor, place: _Place) -> None:
            tensor = part_of(tensor)
            if tensor.layout is torch.strided and tensor.nbytes >= LARGE:
                wanted.append((place, tensor.shape, tensor.dtype, tensor.device.type == "cuda"))

        _mapped(content, note)

        def get(stop: Event) -> None:
            for place, shape, dtype, pinned in wanted:
                if stop.is_set():
                    return
                try:
                    # Zeros are written, not promised: it is the first touch of a page that takes long.
                    self._buffers[place] = torch.empty(shape, dtype=dtype, pin_memory=pinned).zero_()
                except RuntimeError:  # no memory: the snapshot itself will say so, if there still is none by then
                    return

        return get

    def _copied(self, tensor: Tensor, place: _Place) -> Tensor:
        if is_sharded(tensor):
            part = self._copied(part_of(tensor), place)
            return as_part_of(tensor, part, _in_host_memory(tensor.device_mesh))  # type: ignore[attr-defined]
        if tensor.layout is not torch.strided:  # sparse: of another size each time
            return tensor.detach().to("cpu", copy=True)
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._buffers[place] = buffer
        self._used.add(place)
        buffer.copy_(tensor.detach(), non_blocking=True)
        return buffer


@lru_cache(maxsize=8)
def _in_host_memory(mesh: Any) -> Any:
    """Returns the same ranks in host memory, where nobody talks over them: they only say whose part is which."""
    return mesh if mesh.device_type == "cpu" else type(mesh)("cpu", mesh.mesh, _init_backend=False)


def _mapped(content: SnapshotContent, visit: _Visit) -> SnapshotContent:
    """Returns the content with what a function makes of each tensor in its place; tied weights count once."""
    tied = find_tied(content.weights)
    weights = {name: tensor for name, tensor in content.weights.items() if name not in tied}
    return SnapshotContent(
        dataclasses.replace(content.manifest, tied=tied, metrics=dict(content.manifest.metrics)),
        _tree(weights, ("weights",), visit),
        _tree(plain(content.state, "state"), ("state",), visit),
        _tree(plain(content.rank_state, "rank"), ("rank",), visit),
        content.others,
        content.consolidate,
    )


def _tree(value: Any, place: _Place, visit: _Visit) -> Any:
    if isinstance(value, Tensor):
        return visit(value, place)
    if isinstance(value, dict):
        return type(value)({key: _tree(item, (*place, key), visit) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_tree(item, (*place, index), visit) for index, item in enumerate(value))
    return value


class SnapshotWriter:
    """Writes snapshots of one run, one at a time, on a thread.

    Args:
        folder: the run's `snapshots/`.
        synchronize: waits until the device has finished its copies.
        before_commit: called on the thread when everything but the rename is done; what it makes durable (the
            metrics) is never behind the snapshot.
        committed: called on the thread once the snapshot is durable.
        team: the ranks that write it together, where each holds a part. All but the first one write their parts, and
            leave the rest to it.
    """

    def __init__(
        self,
        folder: Path,
        synchronize: Callable[[], None] = lambda: None,
        before_commit: Callable[[], object] = lambda: None,
        committed: Callable[[Path], object] = lambda _: None,
        team: Team | None = None,
    ) -> None:
        self.folder = folder
        self._team = team
        self._synchronize = synchronize
        self._before_commit = before_commit
        self._committed = committed
        self._staging = _Staging()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="aetheria-snapshot")
        self._saving: Future[Path] | None = None
        self._reserving: Future[None] | None = None
        self._stop_reserving = Event()

    def reserve(self, content: SnapshotContent) -> None:
        """Gets the host memory for a content like this one, on the thread, so that the first snapshot waits no longer.

        Its tensors are looked at here for shape and dtype; nothing of them is kept.
        """
        self._reserving = self._thread.submit(self._staging.reserve(content), self._stop_reserving)

    def save(self, content: SnapshotContent) -> None:
        """Copies the content to host memory and returns; the rest happens on the thread.

        Waits for the previous snapshot, if that one is still being written.

        Raises:
            SnapshotError: the previous snapshot could not be written, or this state cannot be stored.
        """
        self.wait()
        if self._reserving is not None:
            self._stop_reserving.set()
            self._reserving.result()
            self._reserving = None
        staged = self._staging.copy(content, self._synchronize)
        write = self._write if self._team is None else partial(self._write_together, self._team)
        self._saving = self._thread.submit(write, staged)

    def finished(self) -> Path | None:
        """Returns the snapshot that has become durable since the last call, if any; never waits.

        Raises:
            SnapshotError: it could not be written.
        """
        return self.wait() if self._saving is not None and self._saving.done() else None

    def wait(self) -> Path | None:
        """Waits for the snapshot in progress and returns its folder.

        Raises:
            SnapshotError: it could not be written.
        """
        saving, self._saving = self._saving, None
        return None if saving is None else saving.result()

    def close(self) -> None:
        """Ends the thread, after the snapshot in progress."""
        self._stop_reserving.set()
        self._thread.shutdown(wait=True)

    def clean(self) -> None:
        """Removes what interrupted writes and removals left behind. Only for who holds the run folder."""
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            if path.name.startswith(REPLACED) and not (final := self.folder / path.name[len(REPLACED) :]).exists():
                path.rename(final)
            elif path.name.startswith((WRITING, REMOVING, REPLACED)):
                shutil.rmtree(path)

    def _write_together(self, team: Team, content: SnapshotContent) -> Path:
        """Writes with the other ranks; returns on every rank when it is durable, or raises on every rank."""
        path, failure = self.folder, ""
        try:
            path = self._write(content)
        except SnapshotError as error:
            failure = str(error)
        try:
            said = [part.decode() for part in team.gather(failure.encode())]
        except RuntimeError as error:
            raise SnapshotError(failure or f"the snapshot was not written: a rank is gone ({error}).") from error
        if failure := failure or next(filter(None, said), ""):
            raise SnapshotError(failure)
        return path

    def _write(self, content: SnapshotContent) -> Path:
        name = folder_name(content.manifest.step)
        temporary, final = self.folder / f"{WRITING}{name}", self.folder / name
        leads = self._team is None or self._team.rank == 0
        try:
            if self._team is None:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                files, state = {MODEL: _write_weights(temporary / MODEL, content.weights)}, content.state
                named = content.weights | {
                    alias: content.weights[owner] for alias, owner in content.manifest.tied.items()
                }
                manifest = dataclasses.replace(content.manifest, digest=weights_digest(named))
            else:
                files, state, manifest = self._write_parts(self._team, temporary, content)
                if not leads:
                    return final
            files[STATE] = _write_state(temporary / STATE, state)
            files[rank_file(0)] = _write_state(temporary / rank_file(0), content.rank_state)
            for rank, encoded in enumerate(content.others, 1):
                files[rank_file(rank)] = _write_bytes(temporary / rank_file(rank), encoded)
            manifest = dataclasses.replace(manifest, files=files)
            with (temporary / MANIFEST).open("wb") as file:
                file.write(manifest.encode())
                _fsync(file)
            fsync_directory(temporary)
            self._before_commit()
            _put_in_place(temporary, final)
        except (OSError, RuntimeError, SnapshotError, safetensors.SafetensorError) as error:
            if leads:
                shutil.rmtree(temporary, ignore_errors=True)
            raise SnapshotError(self._explain(final, content, error)) from error
        try:
            self._committed(final)
        except OSError as error:
            raise SnapshotError(
                f"the snapshot {final} is written, but an older one could not be removed: {error}. Put that right, and "
                "continue the run."
            ) from error
        return final

    @staticmethod
    def _write_parts(
        team: Team, temporary: Path, content: SnapshotContent
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any], Manifest]:
        """Writes this rank's parts; on the first rank, looks at all of them when they are there."""
        from aetheria.snapshot import sharded  # noqa: PLC0415 - a second of imports

        state, tensors = sharded.taken_out(content.state)
        files = sharded.write_shards(team, temporary, content.weights, tensors)
        if team.rank != 0:
            return files, state, content.manifest
        tied, written = content.manifest.tied, sharded.ShardFiles(temporary / sharded.WEIGHTS)
        if content.consolidate:
            files[MODEL] = sharded.write_whole(temporary / MODEL, written)
        digest = weights_digest(sharded.WithAliases(written, tied))
        return files, state, dataclasses.replace(content.manifest, digest=digest, format=FORMAT)

    def _explain(self, final: Path, content: SnapshotContent, error: Exception) -> str:
        tensors = [*content.weights.values(), *_tensors_of(content.state)]
        needed = sum(part_of(tensor).nbytes for tensor in tensors)
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError:
            free = 0
        return (
            f"cannot write the snapshot {final}: {error}. It needs about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB "
            "are free there. The snapshots before it are untouched: make room and continue the run."
        )


def _put_in_place(temporary: Path, final: Path) -> None:
    """Gives a finished snapshot its name. One of the same step, if there is one, goes when the new one is durable."""
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    fsync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # what cannot be removed now is by the next life


def remove_snapshot(path: Path) -> None:
    """Removes a snapshot in one instant: renamed first, so that a half-removed one is never taken for whole."""
    doomed = path.with_name(f"{REMOVING}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return  # somebody was quicker
    shutil.rmtree(doomed)


def _tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors_of(item)] if isinstance(value, list | tuple) else []


def _fsync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_weights(path: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


class _HashingFile:
    """A file that hashes what goes through it, so that it need not be read again.

    It also keeps what the disk said: torch, closing its archive, covers that with an error of its own.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.bytes += written
        return written

    def flush(self) -> None:
        self._file.flush()


def encode_state(state: dict[str, Any]) -> bytes:
    """Returns a rank's state as the bytes of its file, for the rank that writes it."""
    buffer = io.BytesIO()
    torch.save(plain(state, "rank"), buffer)
    return buffer.getvalue()


def _write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    with path.open("wb") as file:
        file.write(content)
        _fsync(file)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_state(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]  # it asks for no more than write and flush
        except RuntimeError as error:
            raise hashing.error or error from None
        _fsync(file)
    return {"bytes": hashing.bytes, "sha256": hashing.sha256.hexdigest()}
