"""What the engine costs on a GPU: one command, one table, one JSON with the machine's description.

- host: host time of a step (MLP 10-64-1, batch 32, fused Adam) beside the same loop by hand
- synchronisations: how often a step waits for the device
- tokens: of TinyGPT a second, beside the same loop by hand
- snapshot: how long the step that takes one waits, beside one copy of the state into host memory

Where there is no CUDA it says so, and ends with code 2. `--device cpu` runs the same code there, except the counting of
synchronisations, and saves nothing: figures of a CPU are what the other benchmarks are for.

    python -m benchmarks.gpu [--short] [--only host synchronisations tokens snapshot] [--device cpu]
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from benchmarks.options import parser

PARTS = ("host", "synchronisations", "tokens", "snapshot")
ABSENT = 2  # exit code: `make bench` goes on


def has_driver() -> bool:
    """Returns whether there is a driver of a GPU that torch may know. Found out without torch, which takes seconds."""
    if Path("/dev/kfd").exists():  # AMD, which torch calls CUDA too
        return True
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False


def without_cuda(found: str) -> int:
    """Says so, and returns the exit code."""
    print(
        f"benchmarks.gpu: {found}. Nothing was measured. It needs a CUDA device; --device cpu --short runs the same "
        "code on the CPU, to see that it works.",
        file=sys.stderr,
    )
    return ABSENT


def main() -> int:
    """Measures every part and writes the table; returns the exit code."""
    options = parser(__doc__)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what to compute on")
    options.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART")
    options.add_argument("--folder", help="where the snapshots go; the folder for temporary files by default")
    chosen = options.parse_args()
    if chosen.device == "cuda" and not has_driver():
        return without_cuda("found no driver of a GPU")
    from benchmarks import gpu_parts

    if chosen.device == "cuda" and not gpu_parts.has_cuda():
        return without_cuda("found a driver, but torch sees no CUDA device (`aetheria doctor` says more)")
    complete = chosen.device == "cuda" and not chosen.short and chosen.only == list(PARTS)
    gpu_parts.report_all(chosen.only, chosen.device, chosen.short, chosen.folder, save=complete and not chosen.no_save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
