"""How long `aetheria --help` takes, beside an empty Python and beside what it would take with typer's own help page.

Each is a fresh process, and they take turns; the first round, which fills the disk cache, does not count.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.common import parser, report, summarise

ROUNDS, ROUNDS_SHORT = 30, 3
TARGET = 300.0  # milliseconds
COMMANDS = {
    "aetheria --help": ["-m", "aetheria", "--help"],
    "python -c pass": ["-c", "pass"],
    "import typer": ["-c", "import typer"],
    "import typer and what its help page imports": ["-c", "import typer, typer.rich_utils"],
}


def milliseconds(arguments: list[str]) -> float:
    """Returns the wall time of a fresh Python, from its start to its end."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return 1e3 * (time.perf_counter() - begun)


def main() -> None:
    """Measures all commands in turns and writes the table."""
    chosen = parser(__doc__).parse_args()
    rounds = ROUNDS_SHORT if chosen.short else ROUNDS
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_number in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            value = milliseconds(arguments)
            if round_number:
                taken[name].append(value)
    figures = [
        summarise(name, "ms", values, TARGET if name.startswith("aetheria") else None, f"fastest {min(values):.0f} ms")
        for name, values in taken.items()
    ]
    report(
        "startup",
        "Wall time of a fresh process, in milliseconds.",
        figures,
        save=not chosen.no_save,
        settings={"rounds": rounds},
    )


if __name__ == "__main__":
    main()
