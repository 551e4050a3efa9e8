"""What steering costs, and how fast it is: commands, the training beside them, a thousand runs at one hub, the peers.

- latency: from a command's call to its applied outcome, through a real hub (`control_latency.py`)
- overhead: what a Weavelet costs a training whose step takes 2 ms (`control_overhead.py`)
- swarm: what is lost, and what the hub needs, when many runs report (`control_swarm.py`)
- peers: the same script with those that also let a training be steered (`control_peers.py`)

With `--only` nothing is saved: a table has one date.

    python -m benchmarks.control [--short] [--only latency overhead swarm peers]
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import control_latency, control_overhead, control_peers, control_swarm
from benchmarks.common import Figure, parser, report
from benchmarks.control_script import BATCH_SIZE, FEATURES, METRICS, WIDTH

PARTS: dict[str, Callable[[bool], list[Figure]]] = {
    "latency": control_latency.measure,
    "overhead": control_overhead.measure,
    "peers": control_peers.measure,
    "swarm": control_swarm.measure,
}


def main() -> None:
    """Measures every part and writes the table."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    chosen = options.parse_args()
    figures = []
    for name in chosen.only:
        for figure in PARTS[name](chosen.short):
            figures.append(figure)
            said = "absent" if figure.median is None else f"{figure.median:,.3g} {figure.unit}"
            print(f"{figure.name}: {said} {figure.note}", flush=True)
    report(
        "control",
        f"Steering a training (MLP {FEATURES}-{WIDTH}-{WIDTH}-{WIDTH}-1, batch {BATCH_SIZE}, Adam, one thread), beside "
        "its peers. Percentages are of a step by hand.",
        figures,
        save=not chosen.no_save and set(chosen.only) == set(PARTS),
        settings={
            "metrics_in_a_step": METRICS,
            "commands": control_latency.COMMANDS_SHORT if chosen.short else control_latency.COMMANDS,
            "steps_in_a_block": control_overhead.BLOCK,
            "pairs": control_overhead.PAIRS_SHORT if chosen.short else control_overhead.PAIRS,
            "steps_in_a_block_of_peers": control_peers.BLOCK,
            "pairs_of_peers": control_peers.PAIRS_SHORT if chosen.short else control_peers.PAIRS,
            "steps_in_a_batch_of_metrics": control_swarm.STEPS,
        },
    )


if __name__ == "__main__":
    main()
