"""Where training is in its data. Only what has been consumed counts, never what has been fetched ahead."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Cursor"]


@dataclass(slots=True)
class Cursor:
    """A position in the stream of training samples.

    Attributes:
        epoch: the epoch that is being read, from 0.
        batches: micro-batches of this rank consumed in this epoch.
        samples: samples consumed in this epoch, by all ranks together.
        windows: windows consumed in this epoch, dropped ones included.
        total_samples: samples consumed since the run began, by all ranks together.
        position: places in the order of this epoch that were passed, by all ranks together: the samples that were
            consumed, and those that were passed over, because they are not selected.
    """

    epoch: int = 0
    batches: int = 0
    samples: int = 0
    windows: int = 0
    total_samples: int = 0
    position: int = 0

    def advance(self, batches: int, samples: int, positions: int | None = None) -> None:
        """Counts one window as consumed."""
        self.batches += batches
        self.samples += samples
        self.windows += 1
        self.total_samples += samples
        self.position += samples if positions is None else positions

    def next_epoch(self) -> None:
        """Moves to the start of the following epoch."""
        self.epoch += 1
        self.batches = self.samples = self.windows = self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Cursor:
        """Takes back what `state_dict` returned."""
        return cls(**{"position": state["samples"], **state})  # older snapshots know no other position
