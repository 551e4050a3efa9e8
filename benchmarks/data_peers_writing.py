"""The data of each contestant, written by its own writer as its documentation shows it, in files of about 64 MB.

    python -m benchmarks.data_peers_writing FORMAT KIND FOLDER COUNT SHARD_BYTES

writes one format into one folder, in a process of its own: writers import, start processes, and print as they like.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.data_peers_samples import KINDS, SHARD_BYTES, SHARD_BYTES_SHORT, SHORT, TOKENS, samples_of

__all__ = ["is_installed", "prepare"]

WHOLE = ".whole.json"  # beside a folder that is finished
_OVERHEAD = {"rows": 2.5, "blobs": 1.05}  # of the largest format: a tar has 1.5 KB more for each sample


def is_installed(package: str) -> bool:
    """Returns whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def prepare(root: Path, format_name: str, kind: str, part: int) -> Path:
    """Returns the folder with the data in a format; writes them if they are not there yet.

    Raises:
        OSError: there is too little room for them.
        RuntimeError: the writer failed; what it had written is removed.
    """
    count = KINDS[kind].samples(part)
    folder = root / f"{format_name}-{kind}-{count}"
    whole = folder.with_name(folder.name + WHOLE)
    if whole.exists() and folder.is_dir():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    needed = int(count * KINDS[kind].sample_bytes * _OVERHEAD[kind]) + (1 << 30)
    if (free := shutil.disk_usage(root).free) < needed:
        raise OSError(f"{root} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} are wanted. Choose another --folder.")
    print(f"writing {folder}", flush=True)
    size = SHARD_BYTES_SHORT if part >= SHORT else SHARD_BYTES
    command = [sys.executable, "-m", "benchmarks.data_peers_writing", format_name, kind, folder, count, size]
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        environment = os.environ | {"LITDATA_DISABLE_VERSION_CHECK": "1", "TMPDIR": temporary}
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        raise RuntimeError(f"writing {folder} failed:\n{done.stderr}")
    whole.write_text(json.dumps({"samples": count}))
    return folder


# --- in a process of its own -----------------------------------------------------------------------------------------


def write_arrow(kind: str, folder: Path, count: int, shard_bytes: int) -> None:
    """Ours; the files that the plain loaders read too."""
    from aetheria.data import write_shards
    from aetheria.data.fields import Array, Bytes

    schema = Array("uint16", (TOKENS,)) if kind == "rows" else Bytes()
    write_shards(samples_of(kind, 0, count), folder, schema, shard_bytes=shard_bytes)


def litdata_samples(kind: str, part: tuple[int, int]) -> Iterator[Any]:
    """Yields the samples of a part: what LitData's processes call."""
    import torch

    for sample in samples_of(kind, *part):
        yield torch.from_numpy(sample) if kind == "rows" else sample


def write_litdata(kind: str, folder: Path, count: int, shard_bytes: int) -> None:
    """LitData: `optimize`; rows of tokens for its `TokensLoader`."""
    import litdata

    step = max(1, count // 64)
    litdata.optimize(
        fn=partial(litdata_samples, kind),
        inputs=[(start, min(count, start + step)) for start in range(0, count, step)],
        output_dir=str(folder),
        chunk_bytes=shard_bytes,
        num_workers=1,  # which keeps the samples in their order, so that the reach of the shuffle can be told
        reorder_files=False,
        item_loader=litdata.TokensLoader(block_size=TOKENS) if kind == "rows" else None,
        verbose=False,
    )


def write_mds(kind: str, folder: Path, count: int, shard_bytes: int) -> None:
    """MosaicML Streaming: `MDSWriter`."""
    from benchmarks.data_peers_contestants import import_streaming

    streaming = import_streaming()
    columns = {"sample": f"ndarray:uint16:{TOKENS}" if kind == "rows" else "bytes"}
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=shard_bytes) as writer:
        for sample in samples_of(kind, 0, count):
            writer.write({"sample": sample})


def write_webdataset(kind: str, folder: Path, count: int, shard_bytes: int) -> None:
    """WebDataset: `ShardWriter`."""
    import webdataset

    folder.mkdir(parents=True)
    pattern = str(folder / "shard-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=10**9, maxsize=shard_bytes, verbose=0) as writer:
        for number, sample in enumerate(samples_of(kind, 0, count)):
            writer.write({"__key__": f"{number:08d}", "bin": sample if isinstance(sample, bytes) else sample.tobytes()})


WRITERS: dict[str, Callable[[str, Path, int, int], None]] = {
    "arrow": write_arrow,
    "litdata": write_litdata,
    "mds": write_mds,
    "webdataset": write_webdataset,
}


def _write_here() -> None:
    """Writes what the command line says, and makes it durable, so that its pages can be dropped from the cache."""
    format_name, kind, folder, count, shard_bytes = sys.argv[1:]
    WRITERS[format_name](kind, Path(folder), int(count), int(shard_bytes))
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


if __name__ == "__main__":
    _write_here()
