"""What a run folder says about its run, gathered into plain dictionaries: for tables, and for `--json`."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any, Literal

from aetheria.cli.curves import best_mode, family, role
from aetheria.config import TrainingConfig
from aetheria.errors import AetheriaError
from aetheria.loom.reader import RunReader
from aetheria.runs import RunFolder

__all__ = ["describe", "json_text", "list_snapshots", "summarize"]


def summarize(run: RunFolder) -> dict[str, Any]:
    """Returns a line about a run: identity, status, step, last and best metrics.

    A damaged run is told by "error", which is None otherwise; it is never a reason to keep silent about the others.
    """
    line: dict[str, Any] = {"run_id": run.run_id, "folder": str(run.path)}
    line |= {"status": "damaged", "status_detail": "", "global_step": None, "created": None, "age_seconds": None}
    line |= {"last": {}, "best": None, "error": None}
    try:
        content = run.read()
        line |= {key: content.get(key, line[key]) for key in ("status_detail", "global_step", "created")}
        line |= {"status": run.display_status(), "age_seconds": _age(line["created"])}
        reader = RunReader(run.path / "run.db")
        last = reader.last()
        line["last"] = {name: _point(point) for name, point in last.items()}
        line["global_step"] = max([line["global_step"] or 0, *(step for step, _ in last.values())])
        if (chosen := _metric_of_interest(content, list(last))) is not None:
            metric, mode = chosen
            line["best"] = {"metric": metric, "mode": mode} | (_point(reader.best(metric, mode)) or {})
    except (AetheriaError, ValueError) as error:
        line["error"] = str(error)
    return line


def describe(run: RunFolder) -> dict[str, Any]:
    """Returns everything about a run: `run.json`, what it changed in the configuration, metrics, snapshots, events.

    Raises:
        RunFolderError: its `run.json` or `run.db` cannot be read.
    """
    content = run.read()
    reader = RunReader(run.path / "run.db")
    metrics = {
        name: {"last": _point(last), "best": _point(reader.best(name, best_mode(name)) if _is_judged(name) else None)}
        for name, last in reader.last().items()
    }
    return content | {
        "run_id": run.run_id,
        "folder": str(run.path),
        "status": run.display_status(),
        "age_seconds": _age(content.get("created")),
        "config_changes": _changes(content.get("config") or {}),
        "metrics": metrics,
        "snapshots": list_snapshots(run),
        "lives": [life._asdict() for life in reader.lives()],
        "events": [event._asdict() for event in reader.events()],
        "notes": [note._asdict() for note in reader.notes()],
    }


def json_text(value: Any) -> str:
    """Returns strict JSON, in which what is not finite stands as "NaN", "Infinity" or "-Infinity"."""

    def spelled(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
        if isinstance(value, dict):
            return {key: spelled(item) for key, item in value.items()}
        return [spelled(item) for item in value] if isinstance(value, list) else value

    return json.dumps(spelled(value), indent=2, ensure_ascii=False, allow_nan=False)


def _point(point: tuple[int, float] | None) -> dict[str, Any] | None:
    return None if point is None else {"step": point[0], "value": point[1]}


def _age(created: str | None) -> float | None:
    if not created:
        return None
    return (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(created)).total_seconds()


def _metric_of_interest(content: dict[str, Any], known: list[str]) -> tuple[str, Literal["min", "max"]] | None:
    """Returns the metric by which a run is judged, and its mode: those by which it keeps its best snapshots, if any."""
    keep_best = ((content.get("config") or {}).get("snapshots") or {}).get("keep_best") or {}
    if keep_best.get("metric") in known:
        return keep_best["metric"], "max" if keep_best.get("mode") == "max" else "min"
    validated = [name for name in known if role(name) == "validation"]
    for name in ("val_loss", *validated, "loss", *known):
        if name in known:
            return name, best_mode(name)
    return None


def _is_judged(name: str) -> bool:
    """Returns whether a metric says how good a model is, which a learning rate does not."""
    return role(name) != "training" or family(name) == "loss"


def _changes(config: dict[str, Any], default: dict[str, Any] | None = None, prefix: str = "") -> dict[str, Any]:
    """Returns what differs from the default configuration, by key path (`snapshots.every_steps`)."""
    if default is None:
        default = TrainingConfig(epochs=1).resolved() | {"epochs": None}
    changes: dict[str, Any] = {}
    for key, value in config.items():
        known = default.get(key)
        if isinstance(value, dict) and value:
            changes |= _changes(value, known if isinstance(known, dict) else {}, f"{prefix}{key}.")
        elif value != known:
            changes[f"{prefix}{key}"] = value
    return changes


def list_snapshots(run: RunFolder) -> list[dict[str, Any]]:
    """Returns the snapshots of a run, the oldest first, as their manifests describe them; torch is not needed for that.

    "best" marks those that the run's `snapshots.keep_best` keeps. Of one whose manifest cannot be read only the name is
    known, and "error" says why; whether its files are whole, `aetheria snapshot verify` finds out.
    """
    found: list[dict[str, Any]] = []
    for manifest in sorted(run.snapshots.glob("step-*/manifest.json")):
        line: dict[str, Any] = {"name": manifest.parent.name, "step": None, "epoch": None, "created": None}
        line |= {"reason": "", "bytes": None, "metrics": {}, "best": False, "pinned": False}
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            line |= {key: content[key] for key in ("step", "epoch", "created", "reason", "metrics", "pinned")}
            line["bytes"] = sum(file["bytes"] for file in content["files"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            line["error"] = f"its manifest does not read ({error!r})"
        found.append(line)
    if keep_best := ((run.read().get("config") or {}).get("snapshots") or {}).get("keep_best"):
        metric, sign = keep_best["metric"], -1 if keep_best["mode"] == "max" else 1
        measured = [line for line in found if not math.isnan(line["metrics"].get(metric, math.nan))]
        for line in sorted(measured, key=lambda line: sign * line["metrics"][metric])[: keep_best["k"]]:
            line["best"] = True
    return found
