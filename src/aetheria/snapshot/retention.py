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


def superfluous(
    manifests: Sequence[Manifest], keep_last: int, keep_best: Sequence[KeepBest], written: int
) -> list[Manifest]:
    """Returns the snapshots that no rule keeps.

    Those of later steps than the one just written are damaged: otherwise the run would have gone on from them. They
    do not count, and they go, unless they are pinned.

    Args:
        manifests: of all snapshots of a run.
        keep_last: how many of the newest stay; at least two always do.
        keep_best: further rules. Pinned ones stay in any case.
        written: the step of the snapshot that was written last.
    """
    reached = sorted((manifest for manifest in manifests if manifest.step <= written), key=lambda each: each.step)
    kept = {manifest.step for manifest in reached[-max(keep_last, 2) :]}
    kept |= {manifest.step for manifest in manifests if manifest.pinned}
    for rule in keep_best:
        kept |= {manifest.step for manifest in rule.best(reached)}
    return [manifest for manifest in manifests if manifest.step not in kept]
