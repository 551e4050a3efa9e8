"""Writes Python's own reference manual as text files, one for each topic: nine tenths to train on, the others to check.

    python examples/text/topics.py data/topics

The text comes with Python (`pydoc_data.topics`), so that nothing has to be downloaded; it differs a little from one
version of Python to the next.
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics


def main(folder: Path) -> None:
    """Writes `train/NAME.txt` and `val/NAME.txt`: every tenth topic, by name, is for validation."""
    for number, name in enumerate(sorted(topics)):
        path = folder / ("val" if number % 10 == 6 else "train") / f"{name.replace('/', '-')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(topics[name], encoding="utf-8")
    print(f"{folder}: {len(topics)} topics, {sum(map(len, topics.values())):,} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
