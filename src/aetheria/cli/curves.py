"""What there is to draw of a run: its curves, in families, and the moments worth a mark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aetheria.errors import RunFolderError, did_you_mean
from aetheria.loom.reader import Curve, RunReader
from aetheria.runs import RunFolder

__all__ = ["RunCurves", "best_mode", "families", "family", "read_curves", "role", "smoothed", "wants_log_scale"]

Role = Literal["training", "epoch mean", "validation", "test"]
_ROLES: tuple[Role, ...] = ("training", "epoch mean", "validation", "test")
_PREFIXES: dict[str, Role] = {"epoch_": "epoch mean", "val_": "validation", "test_": "test"}
_BETTER_WHEN_HIGHER = re.compile(r"acc|auc|\bf1|f1_|precision|recall|score|bleu|rouge|r2|iou|dice|reward|correct")


@dataclass(frozen=True)
class RunCurves:
    """What is drawn of one run.

    Attributes:
        name: the run's name.
        curves: the points by metric.
        resumed: the steps at which later lives of the run began.
        dropped: the steps at which a window was dropped, because its gradients were not finite.
    """

    name: str
    curves: dict[str, Curve]
    resumed: Sequence[int] = ()
    dropped: Sequence[int] = ()


def role(name: str) -> Role:
    """Returns what a metric was measured on, which its prefix says."""
    return next((role for prefix, role in _PREFIXES.items() if name.startswith(prefix)), "training")


def family(name: str) -> str:
    """Returns what a metric measures, whatever on: "loss" for "loss", "epoch_loss" and "val_loss".

    What comes after a dot names a part (`learning_rate.head`) and is left out.
    """
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name.split(".")[0]


def families(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the metrics by family: the loss first, then what is validated too, the learning rate last.

    Means over epochs are left out of a family that holds the same at every interval.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(set(names), key=lambda name: (_ROLES.index(role(name)), name)):
        members = found.setdefault(family(name), [])
        if role(name) != "epoch mean" or not any(role(member) == "training" for member in members):
            members.append(name)

    def place(title: str) -> tuple[bool, bool, bool, str]:
        validated = any(role(name) == "validation" for name in found[title])
        return title != "loss", title == "learning_rate", not validated, title

    return {title: found[title] for title in sorted(found, key=place)}


def best_mode(name: str) -> Literal["min", "max"]:
    """Returns whether a metric is better when it is smaller or larger, going by its name: "max" for accuracies."""
    return "max" if _BETTER_WHEN_HIGHER.search(family(name)) else "min"


def read_curves(run: RunFolder, metrics: Sequence[str] = ()) -> RunCurves:
    """Reads the curves of a run.

    Args:
        run: the run.
        metrics: names of metrics, or of families of them; all metrics, when empty.

    Raises:
        RunFolderError: there is no such metric, or none at all.
    """
    reader = RunReader(run.path / "run.db")
    known = reader.series()
    if not known:
        raise RunFolderError(f"{run.run_id} has no metrics yet. They come every `log_every` steps.")
    chosen = dict.fromkeys(name for metric in metrics or known for name in _matching(metric, known, run.run_id))
    return RunCurves(
        name=run.run_id,
        curves={name: reader.metric(name) for name in chosen},
        resumed=[life.start_step for life in reader.lives()[1:]],
        dropped=[event.step for event in reader.events("nonfinite")],
    )


def _matching(metric: str, known: Sequence[str], run_id: str) -> list[str]:
    if metric in known:
        return [metric]
    members = [name for name in known if family(name) == metric]
    if not members:
        raise RunFolderError(f"{run_id} has no metric called '{metric}'. {did_you_mean(metric, known)}")
    return members


def smoothed(values: NDArray[np.float64], weight: float | None) -> NDArray[np.float64]:
    """Returns the exponential moving average, with its start corrected, of values of shape [points].

    Args:
        values: values that are not finite are left out of the average, and stay gaps.
        weight: of the past, from 0 (no smoothing) to below 1; None chooses one by the number of points: 0 below 100,
            then such that about a fiftieth of them are averaged.
    """
    if weight is None:
        weight = 1 - 2 / (values.size / 50 + 1) if values.size >= 100 else 0.0
    result = np.full(values.shape, np.nan)
    average = total = 0.0
    for index in np.flatnonzero(np.isfinite(values)):
        average = weight * average + (1 - weight) * values[index]
        total = weight * total + (1 - weight)
        result[index] = average / total
    return result


def wants_log_scale(title: str, runs: Sequence[RunCurves]) -> bool:
    """Returns whether a family is read better on a logarithmic axis: a loss or a norm that spans a factor of 30."""
    if not re.search("loss|error|norm|perplexity", title):
        return False
    curves = [curve for run in runs for name, curve in run.curves.items() if family(name) == title]
    values = np.concatenate([curve.values for curve in curves])
    values = values[np.isfinite(values)]
    if not values.size or values.min() <= 0:
        return False
    low, high = np.quantile(values, [0.01, 0.99])  # one spike is no reason
    return bool(high / low > 30)
