"""What the order of samples costs, and reading them out of shards in that order, in one process.

The order: of 10^9 samples in 3 million blocks (the blocks' sizes only, no samples), construction with the first batch
of an epoch, which arranges the blocks; then batches from anywhere; then many steps at once; of a mixture of four keyed
orders, 32 steps at a time. The memory is what NumPy has at most while that happens.

The shards: 512 tokens of two bytes in a sample, and blobs of 100 KB, written and then read from the page cache, in
shuffled order with several lanes, a batch of 64 at a time and 32 batches at a time; every byte is copied. A block's
hash is checked when it is first used; the first epoch is shown by itself.

    python -m benchmarks.data [--short] [--folder FOLDER]
"""

from __future__ import annotations

import tempfile
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from aetheria.data import BlockOrder, KeyedOrder, MixedOrder, Shards, verify, write_shards
from aetheria.data.fields import Array, Bytes
from benchmarks.common import Figure, parser, report, summarise

BLOCKS, ROWS = 3_000_000, 333
LANES, WINDOW, BATCH, TOGETHER = 16, 2048, 64, 32
ROUNDS, ROUNDS_SHORT = 9, 2
SMALL, SMALL_SHORT = 200_000, 10_000
LARGE, LARGE_SHORT = 5_000, 200

Samples = defaultdict[str, list[float]]


def measure_order(found: Samples, rounds: int) -> float:
    """Measures the order of a billion samples; returns the megabytes that it takes."""
    rows = np.full(BLOCKS, ROWS, dtype=np.int32)
    rows[::3] += 1
    draw = np.random.default_rng(0)
    keyed = KeyedOrder(int(rows.sum()), 1)
    four = [KeyedOrder(1_000_000 * (number + 1), number) for number in range(4)]
    mixture = MixedOrder(four, [0.4, 0.3, 0.2, 0.1])
    for number in range(rounds):
        begun, used = perf_counter(), process_time()
        order = BlockOrder(rows, 1, lanes=LANES, window=WINDOW)
        constructed = perf_counter()
        order.ids(number, 500_000_000, 500_000_000 + BATCH)
        found["constructed, ms"].append(1e3 * (constructed - begun))
        found["first, ms"].append(1e3 * (perf_counter() - constructed))
        found["both, ms"].append(1e3 * (perf_counter() - begun))
        found["processor, ms"].append(1e3 * (process_time() - used))
        for start in draw.integers(0, order.length - BATCH, 5).tolist():
            begun = perf_counter()
            order.ids(number, start, start + BATCH)
            found["anywhere, ms"].append(1e3 * (perf_counter() - begun))
        for name, kind in (("blocks, µs", order), ("keyed, µs", keyed)):
            count, start = 1 << 18, 1 << 20
            begun = perf_counter()
            kind.ids(number, start, start + count)
            found[name].append(1e6 * (perf_counter() - begun) / count)
        for name, ask in (("streams, µs", mixture.streams), ("mixed, µs", mixture.rows)):
            begun = perf_counter()
            for start in range(1 << 20, (1 << 20) + count, TOGETHER * BATCH):
                ask(start, start + TOGETHER * BATCH)
            found[name].append(1e6 * (perf_counter() - begun) / count)
    tracemalloc.start()
    BlockOrder(rows, 1, lanes=LANES, window=WINDOW).ids(0, 500_000_000, 500_000_000 + BATCH)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def tokens(count: int) -> Iterator[Any]:
    """Yields samples of 1 KB."""
    row = np.arange(512, dtype=np.uint16)
    return (row + np.uint16(number % 60_000) for number in range(count))


def blobs(count: int) -> Iterator[bytes]:
    """Yields samples of 100 KB."""
    blob = np.random.default_rng(0).bytes(100_000)
    return (blob for _ in range(count))


def measure_shards(found: Samples, folder: Path, name: str, samples: Iterator[Any], field: Any, rounds: int) -> None:
    """Writes samples, reads them for some epochs, and verifies them."""
    begun = perf_counter()
    manifest = write_shards(samples, folder, field)
    size = manifest.parts[0].bytes / 1e6
    found[f"{name}: write, MB/s"].append(size / (perf_counter() - begun))
    shards: Shards | None = None
    for epoch in range(rounds + 1):
        for together in (1, TOGETHER):
            opened = perf_counter()
            if shards is None:
                shards = Shards(folder)
            order = BlockOrder(shards.block_rows, 1, lanes=LANES, window=min(WINDOW, max(1, len(shards) // LANES)))
            for start in range(0, order.length, BATCH * together):
                shards.batch(order.ids(epoch, start, min(start + BATCH * together, order.length)))
                if start == 0 and epoch == 0 and together == 1:
                    found[f"{name}: opened, first batch, ms"].append(1e3 * (perf_counter() - opened))
            taken = 1e6 * (perf_counter() - opened) / len(shards)
            kind = "first epoch" if epoch == 0 and together == 1 else f"{together} batches at a time"
            found[f"{name}: {kind}, µs"].append(taken)
    begun = perf_counter()
    assert verify(folder) == []
    found[f"{name}: verify, MB/s"].append(size / (perf_counter() - begun))


def main() -> None:
    """Measures, and writes the table."""
    options = parser(__doc__)
    options.add_argument("--folder", help="where the shards go; the folder for temporary files by default")
    chosen = options.parse_args()
    rounds = ROUNDS_SHORT if chosen.short else ROUNDS
    small, large = (SMALL_SHORT, LARGE_SHORT) if chosen.short else (SMALL, LARGE)
    found: Samples = defaultdict(list)
    megabytes = measure_order(found, rounds)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        field = Array("uint16", (512,))
        measure_shards(found, Path(folder) / "small", "1 KB", tokens(small), field, rounds)
        measure_shards(found, Path(folder) / "large", "100 KB", blobs(large), Bytes(), rounds)
    order = "order of 10^9 samples"
    figures = [
        summarise(f"{order}: construction", "ms", found.pop("constructed, ms")),
        summarise(f"{order}: the first batch of an epoch", "ms", found.pop("first, ms")),
        summarise(f"{order}: both", "ms", found["both, ms"], 100.0, f"fastest {min(found.pop('both, ms')):.0f} ms"),
        summarise(f"{order}: both, processor time", "ms", found.pop("processor, ms")),
        summarise(f"{order}: a batch from anywhere", "ms", found.pop("anywhere, ms"), 100.0),
        Figure(f"{order}: memory", "MB", megabytes, samples=1, target=100.0),
        summarise("ids of many steps, each: by blocks", "µs", found.pop("blocks, µs"), 0.5),
        summarise("ids of many steps, each: any sample next to any", "µs", found.pop("keyed, µs"), 0.5),
        summarise("streams of many steps, each: a mixture of four", "µs", found.pop("streams, µs"), 0.3),
        summarise("ids of many steps, each: a mixture of four", "µs", found.pop("mixed, µs"), 0.5),
    ]
    for name, values in found.items():
        figure, _, unit = name.rpartition(", ")
        note = f"{1e6 / float(np.median(values)):,.0f} samples/s" if unit == "µs" else ""
        figures.append(summarise(figure, unit, values, note=note))
    report(
        "data",
        "The order of samples, and samples read from shards in the page cache, in one process and thread.",
        figures,
        save=not chosen.no_save,
        settings={"lanes": LANES, "window": WINDOW, "batch": BATCH, "samples": [small, large], "blocks": BLOCKS},
    )


if __name__ == "__main__":
    main()
