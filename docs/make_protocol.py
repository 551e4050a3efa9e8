"""Writes what is generated in `docs/protocol.md` and `docs/knobs.md` anew, from the code that they are about.

    python docs/make_protocol.py

A test fails while they differ.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import torch
from torch import Tensor

from aetheria.config import TrainingConfig
from aetheria.control.knobs import Knobs
from aetheria.core import AetherModel, OptimizerPlan
from aetheria.engine.knobs import builtin_knobs
from aetheria.engine.schedules import Schedules
from aetheria.loom.messages import Event, MetricBatch
from aetheria.protocol import OPERATIONS, Command, Outcome, command_of, encode

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- from here on written by docs/make_protocol.py -->", "<!-- to here -->"
EXAMPLES: dict[str, dict[str, Any]] = {
    "set": {"values": {"learning_rate": 1e-4, "max_grad_norm": 1.0}},
    "run_for": {"steps": 500},
    "rewind": {"step": 12000},
    "note": {"text": "new data from here on"},
}


def protocol() -> str:
    """Returns the reference of all messages, in Markdown."""
    parts = ["### Every command", "", *_table(Command), ""]
    for op, kind in OPERATIONS.items():
        arguments = _hints(kind)["args"]
        parts += [f"### `{op}`", "", _about(kind), ""]
        fields = msgspec.structs.fields(arguments)
        if len(fields) == 1:
            parts += [*_table(arguments, _about(arguments)), ""]
        elif fields:
            parts += [_about(arguments), "", *_table(arguments), ""]
        example = command_of(
            op, EXAMPLES.get(op), id="4f1c0d6a8b9e4c7d", run="digits-20260314-1", author="ana", created=1773446400.0
        )
        parts += ["```json", encode(example).decode(), "```", ""]
    for kind, where in ((Outcome, "ack"), (Event, "event"), (MetricBatch, "metric")):
        parts += [f"### {kind.__name__} (`{where}`)", "", _about(kind), "", *_table(kind), ""]
    return "\n".join(parts)


def knobs() -> str:
    """Returns the table of the knobs that every run has, in Markdown."""
    rows = [f"| `{knob.key}` | {knob.allowed()} | {knob.unit} | {knob.help} |" for knob in _of_a_run()]
    return "\n".join(["| knob | allowed | unit | what it does |", "|---|---|---|---|", *rows])


class _Plain(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layer(batch).mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def _of_a_run() -> Knobs:
    model = _Plain()
    schedules = Schedules(OptimizerPlan(model.configure_optimizers()))
    run: Any = SimpleNamespace(
        config=TrainingConfig(epochs=1), model=model, data=None, callbacks=[], _schedules=schedules,
        accelerator=SimpleNamespace(sync_every=50),  # of ranks that train apart; others lack that knob
    )  # fmt: skip
    return builtin_knobs(run)


def _about(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")


def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _table(kind: type, about: str = "") -> list[str]:
    """Returns a row for each field of a struct, with what its docstring says about it."""
    said = dict(re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", inspect.getdoc(kind) or "", re.MULTILINE))
    rows = []
    for field in msgspec.structs.fields(kind):
        default = "required"
        if field.default_factory is not msgspec.NODEFAULT:
            default = {"_new_id": "a new one", "time": "now"}.get(field.default_factory.__name__, "empty")
        elif field.default is not msgspec.NODEFAULT:
            default = f"`{msgspec.json.encode(field.default).decode()}`"
        words = " ".join(said.get(field.name, about).split())
        rows.append(f"| `{field.name}` | {_kind(_hints(kind)[field.name])} | {default} | {words} |")
    return ["| field | type | default | |", "|---|---|---|---|", *rows]


def _kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    if kind in names:
        return names[kind]
    if get_origin(kind) is dict:
        return "object"
    if get_origin(kind) is None:
        return getattr(kind, "__name__", str(kind))
    parts = [part for part in get_args(kind) if part is not ...]
    if get_origin(kind) in (list, tuple) or getattr(get_origin(kind), "__name__", "") == "Sequence":
        return "list of " + ", ".join(_kind(part) for part in parts)
    return " or ".join(_kind(part) for part in parts)


def page_with(page: str, text: str) -> str:
    """Returns a page with what is generated in the place of what was."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{rest.split(END)[1]}"


PAGES = {"protocol.md": protocol, "knobs.md": knobs}

if __name__ == "__main__":
    for name, written in PAGES.items():
        path = FOLDER / name
        path.write_text(page_with(path.read_text(encoding="utf-8"), written()), encoding="utf-8")
        print(f"wrote {path}")
