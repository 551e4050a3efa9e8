"""The options that all benchmarks take. Imports nothing that takes time."""

from __future__ import annotations

import argparse

__all__ = ["parser"]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that all benchmarks take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--short", action="store_true", help="few samples: shows that it runs, not how fast")
    made.add_argument("--no-save", action="store_true", help="print the table only")
    return made
