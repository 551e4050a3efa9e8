"""Which snapshots may go. Decided on manifests alone, and only after a newer one is durable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aetheria.snapshot.format import Manifest

__all__ = ["KeepBest", "superfluous"]


@dataclass(frozen=True)
class KeepBest:
    """Keeps the k best snapshots by a metric.

    Attributes:
        metric: its name, for instance "val_loss".
        mode: whether "min" or "max" is best.
        k: how many.
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    k: int = 1

    def best(self, manifests: Sequence[Manifest]) -> list[Manifest]:
        """Returns the k best, the best first; an earlier one wins a tie. Those without the metric do not count."""
        ranked = [manifest for manifest in manifests if not math.isnan(manifest.metrics.get(self.metric, math.nan))]
        sign = 1.0 if self.mode == "min" else -1.0
        ranked.sort(key=lambda manifest: (sign * manifest.metrics[self.metric], manifest.step))
        return ranked[: self.k]

    def admits(self, value: float, manifests: Sequence[Manifest]) -> bool:
        """Returns whether a snapshot with this value would be among the k best."""
        if math.isnan(value):
            return False
        best = self.best(manifests)
        if len(best) < self.k:
            return True
        worst = best[-1].metrics[self.metric]
        return value < worst if self.mode == "min" else value > worst


def superfluous(manifests: Sequence[Manifest], keep_last: int, keep_best: Sequence[KeepBest]) -> list[Manifest]:
    """Returns the snapshots that no rule keeps.

    Args:
        manifests: of all snapshots of a run.
        keep_last: how many of the newest stay; at least two always do.
        keep_best: further rules. Pinned ones stay in any case.
    """
    newest = sorted(manifests, key=lambda manifest: manifest.step)[-max(keep_last, 2) :]
    kept = {manifest.step for manifest in newest} | {manifest.step for manifest in manifests if manifest.pinned}
    for rule in keep_best:
        kept |= {manifest.step for manifest in rule.best(manifests)}
    return [manifest for manifest in manifests if manifest.step not in kept]
