"""The parts of `gpu.py`. All but one are the same on a CPU; what differs is what one waits for, and where memory lies.

The host runs ahead of a device. So the clock of a turn stops when the host has handed over its work where the host is
what is measured, and when the device has done it where the device is; and no turn begins before the device is idle.
"""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aetheria import AetherModel, OptimizerPlan
from aetheria.plugins.models.tiny_gpt import TinyGPT
from benchmarks import engine_overhead, snapshot_stall, tiny_gpt_overhead
from benchmarks.common import Figure, report, slower_by, summarise
from benchmarks.contestants import Regression, by_hand, network, train_with_aetheria
from benchmarks.pairs import IterableLane, Lane, SequenceLane, alternate

__all__ = ["SynchronisationCount", "has_cuda", "report_all"]

BLOCK, WARM_UP = engine_overhead.BLOCK, 4
PAIRS, PAIRS_SHORT = 100, 3
TOKEN_BLOCK, TOKEN_WARM_UP = 20, 3
TOKEN_BATCHES = {"cuda": (4, 256), "cpu": (4,)}  # sequences in a batch: launches are what takes time, and computing is
TURNS_COUNTED = 2  # blocks of steps in which synchronisations are counted
TARGETS = {"host": 20.0, "tokens": 0.5, "synchronisations": 0.0}  # µs a step, percent of a step, a step

Train = Callable[[Any], object]


def has_cuda() -> bool:
    """Returns whether torch sees a CUDA device."""
    return torch.cuda.is_available()


def wait_for(device: str) -> Callable[[], object]:
    """Returns what waits until the device has done all that it was given."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def pinned(batches: Sequence[Any], device: str) -> list[Any]:
    """Returns the batches in memory that a device can copy from while the host goes on."""
    return [tuple(part.pin_memory() for part in batch) for batch in batches] if device == "cuda" else list(batches)


def moved(batches: Iterable[Any], device: str) -> Iterator[Any]:
    """Yields the batches on the device, as a loop by hand would move them."""
    for batch in batches:
        yield tuple(part.to(device, non_blocking=True) for part in batch)


# --- host time -------------------------------------------------------------------------------------------------------


def host(device: str, short: bool, _folder: str | None) -> list[Figure]:
    """Returns the time that the host spends on a step of the small MLP."""
    pairs = PAIRS_SHORT if short else PAIRS
    turns = pairs + WARM_UP + 1
    batches = pinned(engine_overhead.batches(), device)
    hand, ours = IterableLane(batches, BLOCK, turns), SequenceLane(batches, BLOCK, turns)
    hand.start(functools.partial(_mlp_by_hand, device=device))
    ours.start(functools.partial(_mlp_with_aetheria, device=device, progress_bar=True))
    taken = np.array(alternate(hand, ours, pairs, WARM_UP, ready=wait_for(device))) / BLOCK * 1e6
    beyond = taken[:, 1] - taken[:, 0]
    step, processor_step = np.median(taken[:, 0], axis=0)
    target = TARGETS["host"]
    return [
        summarise("host time of a step, by hand", "µs", taken[:, 0, 0]),
        summarise("host time of a step, beyond by hand", "µs", beyond[:, 0], target, f"by hand {step:,.0f} µs"),
        summarise("in processor time", "µs", beyond[:, 1], target, f"by hand {processor_step:,.0f} µs"),
    ]


def _mlp_by_hand(batches: Iterable[Any], device: str) -> None:
    by_hand(moved(batches, device), lambda: network().to(device))


def _mlp_with_aetheria(
    batches: Lane, device: str, progress_bar: bool = False, kind: type[AetherModel] = Regression
) -> None:
    train_with_aetheria(kind(), batches, progress_bar, device, live="off")


# --- synchronisations ------------------------------------------------------------------------------------------------


class SynchronisationCount:
    """Counts, while it is entered, how often the host waits for the device.

    torch warns of operations that do (`torch.cuda.set_sync_debug_mode`), but not of events that are waited for; those
    are counted by hand, if the device has not reached them yet.

    Attributes:
        operations: that synchronised.
        events: that were waited for.
    """

    def __init__(self) -> None:
        self.operations = self.events = 0
        self._synchronize = torch.cuda.Event.synchronize

    def __enter__(self) -> SynchronisationCount:
        self._warnings = warnings.catch_warnings(record=True)
        self._caught = self._warnings.__enter__()
        warnings.simplefilter("always")
        torch.cuda.Event.synchronize = self._counted  # type: ignore[method-assign]
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.Event.synchronize = self._synchronize  # type: ignore[method-assign]
        self._warnings.__exit__(None, None, None)
        self.operations += sum("synchronizing CUDA operation" in str(said.message) for said in self._caught)

    @property
    def _counted(self) -> Callable[[torch.cuda.Event], None]:
        def synchronize(event: torch.cuda.Event) -> None:
            self.events += not event.query()
            self._synchronize(event)

        return synchronize


class _NotFused(Regression):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def synchronisations(device: str, short: bool, _folder: str | None) -> list[Figure]:
    """Returns how often a step waits for the device; nothing where there is none."""
    if device != "cuda":
        return []
    contestants: dict[str, Train] = {
        "by hand": functools.partial(_mlp_by_hand, device=device),
        "Aetheria": functools.partial(_mlp_with_aetheria, device=device),
        "Aetheria, optimiser not fused": functools.partial(_mlp_with_aetheria, device=device, kind=_NotFused),
    }
    figures = []
    for name, train in contestants.items():
        counted = _count(train, IterableLane if name == "by hand" else SequenceLane, device)
        target = TARGETS["synchronisations"] if name == "Aetheria" else None
        note = f"{BLOCK * TURNS_COUNTED} steps; events that were waited for: {counted.events}"
        a_step = counted.operations / (BLOCK * TURNS_COUNTED)
        figures.append(Figure(f"synchronisations of a step, {name}", "", a_step, samples=1, target=target, note=note))
    return figures


def _count(train: Train, kind: type[Lane], device: str) -> SynchronisationCount:
    lane = kind(pinned(engine_overhead.batches(), device), BLOCK, 1 + TURNS_COUNTED + 1)
    lane.start(train)
    lane.turn()
    wait_for(device)()
    with SynchronisationCount() as counted:
        for _ in range(TURNS_COUNTED):
            lane.turn()
    lane.finish()
    return counted


# --- tokens ----------------------------------------------------------------------------------------------------------


class FusedGPT(TinyGPT):
    """TinyGPT with its AdamW in one kernel, as one writes it for a GPU."""

    def configure_optimizers(self) -> OptimizerPlan:
        """Returns the same optimiser, fused."""
        usual = super().configure_optimizers().optimizer
        groups = [{key: group[key] for key in ("name", "params", "weight_decay")} for group in usual.param_groups]
        return OptimizerPlan(torch.optim.AdamW(groups, **{**_shared(usual), "fused": True}))


def _shared(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {key: optimizer.defaults[key] for key in ("lr", "betas", "eps")}


def gpt() -> FusedGPT:
    """Returns the model, with the same weights for both."""
    torch.manual_seed(0)
    return FusedGPT()


def tokens(device: str, short: bool, _folder: str | None) -> list[Figure]:
    """Returns the tokens a second of both, and by how much ours are slower."""
    pairs = PAIRS_SHORT if short else PAIRS
    figures = []
    for size in TOKEN_BATCHES[device]:
        batches = pinned(tiny_gpt_overhead.text(size), device)
        block = 2 if device == "cpu" else TOKEN_BLOCK
        taken = _gpt_pairs(batches, device, block, pairs)
        name = f"TinyGPT, batch {size}"
        rate = batches[0][0].numel() * block / taken[:, :, 0]  # [pairs, (by hand, ours)], tokens a second
        figures += [
            summarise(f"{name}: by hand", "tokens/s", rate[:, 0]),
            summarise(f"{name}: Aetheria", "tokens/s", rate[:, 1]),
            slower_by(f"{name}: Aetheria", taken, block, TARGETS["tokens"]),
        ]
    return figures


def _gpt_pairs(batches: list[Any], device: str, block: int, pairs: int) -> NDArray[np.float64]:
    wait = wait_for(device)
    turns = pairs + TOKEN_WARM_UP + 1
    hand, ours = (kind(batches, block, turns, drain=wait) for kind in (IterableLane, SequenceLane))
    hand.start(lambda lane: tiny_gpt_overhead.by_hand(moved(lane, device), lambda: gpt().to(device)))
    ours.start(lambda lane: train_with_aetheria(gpt(), lane, True, device, live="off"))
    return np.array(alternate(hand, ours, pairs, TOKEN_WARM_UP, ready=wait))


# --- snapshots -------------------------------------------------------------------------------------------------------


def snapshot(device: str, short: bool, folder: str | None) -> list[Figure]:
    """Returns how long a snapshot keeps the loop, beside a copy of the state into host memory."""
    layers, rounds = snapshot_stall.size(short)
    samples: snapshot_stall.Samples = defaultdict(list)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            snapshot_stall.train(layers, place, samples, device)
    return snapshot_stall.figures_of(samples, "snapshot: ")


# --- all of them -----------------------------------------------------------------------------------------------------

_PARTS = {"host": host, "synchronisations": synchronisations, "tokens": tokens, "snapshot": snapshot}


def _measure(part: str, device: str, short: bool, folder: str | None) -> list[Figure]:
    torch.set_num_threads(1)
    return _PARTS[part](device, short, folder)


def report_all(parts: Sequence[str], device: str, short: bool, folder: str | None, save: bool) -> None:
    """Measures every part in a fresh process, prints the table, and writes it.

    Args:
        parts: their names.
        device: "cuda" or "cpu".
        short: few samples.
        folder: where snapshots go.
        save: whether to write the results file.
    """
    figures = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for part in parts:
            found = processes.submit(_measure, part, device, short, folder).result()
            for figure in found:
                print(f"{figure.name}: {figure.median:,.4g} {figure.unit} {figure.note}", flush=True)
            if not found:
                print(f"{part}: not on a {device}", flush=True)
            figures += found
    report(
        "gpu",
        f"One process on one device ({device}): host time, synchronisations, TinyGPT, snapshots.",
        figures,
        save=save,
        settings={
            "device": device,
            "steps_in_a_block": BLOCK,
            "pairs": PAIRS_SHORT if short else PAIRS,
            "parameters_of_the_snapshot": snapshot_stall.parameters(snapshot_stall.size(short)[0]),
        },
    )
