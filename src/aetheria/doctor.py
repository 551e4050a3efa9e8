"""What this machine offers for training and what it lacks, each with its remedy.

What can be tried is tried: precisions are computed in, the disk is written to, plugins are loaded.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import resource
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from aetheria.errors import RunFolderError
from aetheria.loom.filesystem import filesystem_of
from aetheria.registry import ENTRY_POINTS
from aetheria.runs import find_runs, versions

__all__ = ["Finding", "examine"]

_OPTIONAL_PACKAGES = {  # module: (distributions that have it, extra of ours, what for)
    "sklearn": (("scikit-learn",), "examples", "the digits example"),
    "tensorboardX": (("tensorboardX",), "tensorboard", "TensorBoardLogger"),
    "wandb": (("wandb",), "wandb", "WandbLogger"),
    "mlflow": (("mlflow-skinny", "mlflow"), "mlflow", "MLflowLogger"),
    "trackio": (("trackio",), "trackio", "TrackioLogger"),
    "onnx": (("onnx",), "onnx", "aetheria export --format onnx"),
    "onnxscript": (("onnxscript",), "onnx", "aetheria export --format onnx"),
}
_BACKENDS = {  # back-end: what to do without it
    "gloo": "Install torch from https://pytorch.org: its builds have it. Training on several processes needs it.",
    "nccl": "It comes with torch for CUDA; several NVIDIA GPUs need it.",
    "mpi": "Only a torch that was built from source against an MPI has it. Hardly anybody needs it.",
    "ucc": "Only a torch that was built from source against UCC has it. Hardly anybody needs it.",
}
_TRIAL_BYTES = 64 * 2**20
_SHARED_MEMORY = Path("/dev/shm")
_ENOUGH_SHARED_MEMORY = 2**30  # bytes; containers often have 2**26 only
_ENOUGH_OPEN_FILES = 1024
_ENOUGH_DISK = 5 * 2**30  # bytes
_SLOW_DISK = 50e6  # bytes per second
_SLOW_PRECISION = 1.5  # times as long as fp32: computed in software, or hardly better
_CLOCK_TOLERANCE = 2.0  # seconds


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        topic: what it belongs to, for instance "devices".
        name: what was looked at, for instance "cuda:0".
        status: "ok", "missing", or "warning": it is there, but not as it should be.
        found: what was found.
        remedy: what to do about it; empty where there is nothing to be done.
    """

    topic: str
    name: str
    status: Literal["ok", "missing", "warning"]
    found: str
    remedy: str = ""


def examine(runs_dir: Path) -> Iterator[Finding]:
    """Yields the findings one by one, as they come.

    Args:
        runs_dir: where runs are, or will be; nothing that is written there for a trial stays.
    """
    yield from _versions()
    try:
        yield from _devices()
        yield from _back_ends()
    except (ImportError, OSError) as error:  # a missing shared library is an OSError
        remedy = "Install it anew, as https://pytorch.org/get-started says."
        yield Finding("versions", "torch import", "missing", f"{type(error).__name__}: {error}", remedy)
    yield from _compiler()
    yield from _optional_packages()
    yield from _plugins()
    yield from _limits()
    yield from _runs_dir(runs_dir)


# --- the software ----------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    for name, version in versions().items():
        if version == "unknown":
            yield Finding("versions", name, "missing", "not installed", "Install it: pip install aetheria")
        else:
            yield Finding("versions", name, "ok", version)


def _devices() -> Iterator[Finding]:
    from aetheria.accelerator.survey import survey_devices  # noqa: PLC0415 - the rest works where torch does not

    devices = survey_devices()
    for device in devices:
        yield Finding("devices", device.name, "ok" if device.present else "missing", device.description, device.remedy)
    for device in devices:
        full = next((trial.milliseconds for trial in device.precisions if trial.precision == "fp32"), None)
        for trial in device.precisions:
            name = f"{device.name} {trial.precision}"
            if trial.milliseconds is None:
                yield Finding("precisions", name, "missing", trial.problem, f"Choose another one on {device.name}.")
            elif full is None or trial.precision == "fp32":
                yield Finding("precisions", name, "ok", "works")
            else:
                slow = trial.milliseconds > _SLOW_PRECISION * full
                speed = f"works, at {full / trial.milliseconds:.2g} times the speed of fp32"
                remedy = "Train in fp32 here: this precision saves memory, not time." if slow else ""
                yield Finding("precisions", name, "warning" if slow else "ok", speed, remedy)


def _back_ends() -> Iterator[Finding]:
    import torch.distributed  # noqa: PLC0415

    built = torch.distributed.is_available()
    for name, remedy in _BACKENDS.items():
        if built and torch.distributed.is_backend_available(name):
            yield Finding("distributed", name, "ok", "available")
        else:
            yield Finding("distributed", name, "missing", "torch is built without it", remedy)


def _compiler() -> Iterator[Finding]:
    wanted = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    path = shutil.which(wanted)
    if path is None:
        remedy = "Install it (Debian: apt install g++), or name another in CXX. Only `compile: true` needs it."
        yield Finding("torch.compile", "C++ compiler", "missing", f"no {wanted} on the path", remedy)
    else:
        yield Finding("torch.compile", "C++ compiler", "ok", path)
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if header.is_file():
        yield Finding("torch.compile", "Python.h", "ok", str(header))
    else:
        remedy = "Install Python's headers (Debian: apt install python3-dev). Only `compile: true` needs them."
        yield Finding("torch.compile", "Python.h", "missing", f"not at {header}", remedy)


def _optional_packages() -> Iterator[Finding]:
    for module, (distributions, extra, purpose) in _OPTIONAL_PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            remedy = f"For {purpose}: pip install 'aetheria[{extra}]'"
            yield Finding("optional packages", module, "missing", "not installed", remedy)
        else:
            yield Finding("optional packages", module, "ok", _version_of(distributions))


def _version_of(distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of an unknown version"


def _plugins() -> Iterator[Finding]:
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:  # noqa: BLE001 - it is somebody else's package, and the finding says what it raised
            remedy = "Update it or uninstall it; without it, its names are missing."
            found = f"{point.value} raised {type(error).__name__}: {error}"
            yield Finding("plugins", point.name, "warning", found, remedy)
        else:
            yield Finding("plugins", point.name, "ok", f"{point.value} is loaded")


# --- the system ------------------------------------------------------------------------------------------------------


def _limits() -> Iterator[Finding]:
    if _SHARED_MEMORY.is_dir():  # Linux; elsewhere there is no such limit
        total = shutil.disk_usage(_SHARED_MEMORY).total
        enough = total >= _ENOUGH_SHARED_MEMORY
        yield Finding(
            "limits",
            "shared memory",
            "ok" if enough else "warning",
            _size(total),
            ""
            if enough
            else "DataLoader workers send batches through it: docker run --shm-size=8g, or num_workers: 0.",
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= _ENOUGH_OPEN_FILES
    yield Finding(
        "limits",
        "open files",
        "ok" if enough else "warning",
        "unlimited" if soft == resource.RLIM_INFINITY else str(soft),
        "" if enough else f"DataLoader workers hold many: ulimit -n {_ENOUGH_OPEN_FILES * 4 if hard < 0 else hard}",
    )


def _runs_dir(runs_dir: Path) -> Iterator[Finding]:
    runs_dir = runs_dir.absolute()
    if runs_dir.exists() and not runs_dir.is_dir():
        yield Finding("runs_dir", "folder", "missing", f"{runs_dir} is a file", "Move it away, or set runs_dir.")
        return
    place = next(folder for folder in (runs_dir, *runs_dir.parents) if folder.is_dir())
    system = filesystem_of(place)
    shared = ", shared with other machines" if system.network else ""
    yield Finding("runs_dir", "file system", "ok", f"{system.type} at {system.mount_point}{shared}")
    free = shutil.disk_usage(place).free
    enough = free >= _ENOUGH_DISK
    remedy = "" if enough else "Make room, or set runs_dir to a larger disk: a run needs three snapshots at least."
    yield Finding("runs_dir", "free space", "ok" if enough else "warning", _size(free), remedy)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
            for trial in (_locks, _disk_speed, _clock_of_disk):
                yield from trial(Path(folder))
    except OSError as error:
        remedy = "Choose a folder you may write to, with room in it: runs_dir in the config, or --set runs_dir=PATH."
        yield Finding("runs_dir", "writing", "missing", f"cannot write in {place}: {error.strerror or error}", remedy)
    yield from _clock_of_runs(runs_dir)


def _locks(folder: Path) -> Iterator[Finding]:
    with (folder / "lock").open("wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            remedy = "Set runs_dir to another disk: without locks two processes may train in one run folder."
            yield Finding("runs_dir", "record locks", "missing", error.strerror or str(error), remedy)
        else:
            yield Finding("runs_dir", "record locks", "ok", "work")


def _disk_speed(folder: Path) -> Iterator[Finding]:
    content = os.urandom(2**20)  # not zeros, which some file systems do not store

    def write(name: str, times: int) -> float:
        begun = time.perf_counter()
        with (folder / name).open("wb") as file:
            for _ in range(times):
                file.write(content if times > 1 else b"x")
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - begun

    small = statistics.median(write(f"small-{number}", 1) for number in range(5))
    speed = _TRIAL_BYTES / write("large", _TRIAL_BYTES // len(content))
    slow = speed < _SLOW_DISK
    yield Finding(
        "runs_dir",
        "disk speed",
        "warning" if slow else "ok",
        f"{speed / 1e6:,.0f} MB/s written and fsynced; {1e3 * small:.1f} ms for one byte",
        "Snapshots take long here: set runs_dir to a faster disk, or take fewer of them." if slow else "",
    )


def _clock_of_disk(folder: Path) -> Iterator[Finding]:
    (folder / "now").touch()
    difference = (folder / "now").stat().st_mtime - time.time()
    agrees = abs(difference) <= _CLOCK_TOLERANCE
    yield Finding(
        "clock",
        "disk",
        "ok" if agrees else "warning",
        "agrees with this machine" if agrees else f"{difference:+.0f} s from this machine",
        "" if agrees else "Set both clocks by NTP; until then, ages of runs are off.",
    )


def _clock_of_runs(runs_dir: Path) -> Iterator[Finding]:
    now = datetime.now(UTC)
    ahead = []
    for run in find_runs(runs_dir):
        try:
            created = datetime.fromisoformat(run.read()["created"])
        except (RunFolderError, KeyError, ValueError):
            continue  # `aetheria runs` says what is wrong with it
        if (created - now).total_seconds() > _CLOCK_TOLERANCE:
            ahead.append(run.run_id)
    yield Finding(
        "clock",
        "time",
        "warning" if ahead else "ok",
        f"{now:%Y-%m-%d %H:%M:%S} UTC" + (f"; {ahead[0]} was begun later than that" if ahead else ""),
        "Set the clock by NTP; until then, the newest run is not what `latest` and `@last` stand for." if ahead else "",
    )


def _size(number_of_bytes: int) -> str:
    return f"{number_of_bytes / 2**30:,.1f} GiB"
