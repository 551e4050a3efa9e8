"""`aetheria doctor`: what this machine offers for training, and what it lacks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from aetheria.cli._display import text_console
from aetheria.cli.runs import AsJson, RunsDir

if TYPE_CHECKING:
    from aetheria.doctor import Finding

_STYLES = {"ok": "green", "missing": "dim", "warning": "yellow"}


def doctor(runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """Examine this machine: devices, precisions, packages, limits, disk; each with its remedy."""
    from aetheria.doctor import examine

    findings = examine(runs_dir)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        _print_as_they_come(findings)


def _print_as_they_come(findings: Iterable[Finding]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    console = text_console()
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            console.print(Text(f"\n{topic}", style="bold"))
        status = Text(f"  {finding.status:<9}", style=_STYLES[finding.status])
        console.print(status + Text(f"{finding.name:<16}{finding.found}"), soft_wrap=True)
        if finding.remedy:
            console.print(Padding(Text(finding.remedy, style="italic"), (0, 0, 0, 27), expand=False))
