"""`aetheria runs`, `aetheria show`, `aetheria plot`: what is known about runs, from their folders alone."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from aetheria.cli._display import duration, moment, number, text_console
from aetheria.cli._errors import errors_told

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, any part of a run's name, or @last for the newest.")
]
RunsDir = Annotated[Path, typer.Option("--runs-dir", metavar="DIR", help="The folder of all runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

_STATUS_STYLES = {"completed": "green", "running": "cyan", "failed": "red", "killed": "red", "damaged": "red"}


def runs(runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """List the runs, the newest first."""
    from aetheria.cli.summary import json_text, summarize
    from aetheria.runs import find_runs

    lines = [summarize(run) for run in find_runs(runs_dir)]
    if as_json:
        typer.echo(json_text(lines))
    elif not lines:
        typer.echo(f"There are no runs in {runs_dir.absolute()}. Start one: aetheria train CONFIG")
    else:
        _print_table(lines)


def show(run: RunArgument, runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """Show a run: what it is, how it was configured, how far it came, what happened."""
    from aetheria.cli.summary import describe, json_text
    from aetheria.runs import resolve_run

    with errors_told():
        content = describe(resolve_run(run, runs_dir))
    if as_json:
        typer.echo(json_text(content))
    else:
        _print_run(content)


def plot(
    run: RunArgument,
    metrics: Annotated[
        list[str] | None, typer.Argument(metavar="METRIC", help="What to draw, for instance: loss. All, if none.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option("--compare", metavar="RUN", help="Draw this run too; may be repeated.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A picture: .png, .svg or .pdf.")
    ] = None,
    smooth: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=0.999, help="Weight of the past in the average, 0 for none; else by the number of points."
        ),
    ] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Draw the curves of a run, into a picture with -o, otherwise here in the terminal."""
    from aetheria.cli.curves import read_curves
    from aetheria.cli.plotting import draw_in_terminal, save_figure
    from aetheria.runs import resolve_run

    with errors_told():
        folders = [resolve_run(name, runs_dir) for name in dict.fromkeys([run, *(compare or ())])]
        curves = [read_curves(folder, metrics or ()) for folder in folders]
        if output is not None:
            save_figure(curves, output, smooth)
            typer.echo(output)
            return
    console = text_console()
    color = console.is_terminal and not console.no_color
    width = min(console.width, 160) if console.is_terminal else 100
    typer.echo(draw_in_terminal(curves, width, smooth, color), color=color)


# --- printing --------------------------------------------------------------------------------------------------------


def _print_table(lines: Iterable[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for heading in ("status", "step", "metric", "last", "best", "age"):
        table.add_column(heading, justify="right" if heading in ("step", "age") else "left", no_wrap=True)
    for line in lines:
        best = line["best"] or {}
        last = line["last"].get(best.get("metric"), {})
        table.add_row(
            line["run_id"],
            Text(line["status"], style=_STATUS_STYLES.get(line["status"], "yellow")),
            number(line["global_step"]),
            best.get("metric", ""),
            *(f"{point['value']:.4g}" if "value" in point else "" for point in (last, best)),
            duration(line["age_seconds"]),
        )
    text_console().print(table)
    for line in lines:
        if line["error"]:
            typer.echo(f"{line['run_id']}: {line['error']}", err=True)


def _print_run(content: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = text_console()

    def section(title: str, rows: Iterable[Iterable[str]], *headings: str) -> None:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(headings), header_style="dim")
        for heading in headings:
            table.add_column(heading)
        for row in rows:
            table.add_row(*row)
        if table.rows:
            console.print()
            console.print(Text(title, style="bold"))
            console.print(table)

    console.print(Text(content["run_id"], style="bold"), end="")
    section("", _identity(content))
    section("configuration", ((key, str(value)) for key, value in content["config_changes"].items()))
    rows = ((name, *_point(each["last"]), *_point(each["best"])) for name, each in content["metrics"].items())
    section("metrics", rows, "", "last", "at step", "best", "at step")
    section("snapshots", (_snapshot(each) for each in content["snapshots"]))
    events = ((number(e["step"]), moment(e["time"]), e["kind"], e["message"]) for e in content["events"][-8:])
    section("last events", events, "step", "time", "", "")
    notes = ((number(note["step"]), moment(note["time"]), note["author"], note["text"]) for note in content["notes"])
    section("notes", notes, "step", "time", "", "")


def _identity(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    detail = content.get("status_detail")
    yield "status", content["status"] + (f": {detail}" if detail else "")
    yield "step", number(content.get("global_step"))
    if content["status"] in ("killed", "interrupted"):
        yield "continue", f"aetheria continue {content['run_id']}"
    if created := content.get("created"):
        yield "created", f"{moment(created)} ({duration(content['age_seconds'])} ago)"
    yield "folder", content["folder"]
    if command := content.get("command"):
        yield "command", shlex.join(command) + (f"   in {content['directory']}" if content.get("directory") else "")
    yield "process", f"{content.get('pid')} on {content.get('host')}"
    if len(content["lives"]) > 1:
        steps = ", ".join(number(life["start_step"]) for life in content["lives"][1:])
        yield "resumed", f"{len(content['lives']) - 1} times, at step {steps}"
    if content.get("seed") is not None:
        yield "seed", str(content["seed"])
    yield "versions", ", ".join(f"{name} {version}" for name, version in (content.get("versions") or {}).items())
    if git := content.get("git"):
        yield "code", f"git {git.get('commit')}" + (" with changes" if git.get("changes") else "")
    if lineage := content.get("lineage"):
        yield "lineage", str(lineage)


def _snapshot(snapshot: dict[str, Any]) -> tuple[str, str, str]:
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in snapshot["metrics"].items())
    return snapshot["name"], moment(snapshot["created"]), snapshot.get("error") or metrics


def _point(point: dict[str, Any] | None) -> tuple[str, str]:
    return ("", "") if point is None else (f"{point['value']:.6g}", number(point["step"]))
