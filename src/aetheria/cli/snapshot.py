"""`aetheria snapshot`: which snapshots there are, whether they are whole, and what weights they hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aetheria.cli._display import moment, number, text_console
from aetheria.cli._errors import errors_told
from aetheria.cli.predict import Force
from aetheria.cli.runs import AsJson, RunArgument, RunsDir
from aetheria.cli.steer import take_snapshot

if TYPE_CHECKING:
    from aetheria.snapshot import Snapshot

app = typer.Typer(help="List, verify and compare the snapshots of runs; take one.", no_args_is_help=True)
app.command("take")(take_snapshot)

Sources = Annotated[
    list[str],
    typer.Argument(metavar="RUN|SNAPSHOT...", help="Runs, named as elsewhere, or folders of snapshots."),
]


@app.command()
@errors_told()
def ls(run: RunArgument, runs_dir: RunsDir = Path("runs"), as_json: AsJson = False) -> None:
    """List the snapshots of RUN, the oldest first."""
    from aetheria.cli.summary import json_text, list_snapshots
    from aetheria.runs import resolve_run

    folder = resolve_run(run, runs_dir)
    lines = list_snapshots(folder)
    if as_json:
        typer.echo(json_text(lines))
    elif not lines:
        typer.echo(f"{folder.run_id} has no snapshots yet.")
    else:
        _print_table(lines)


@app.command()
@errors_told()
def verify(sources: Sources, runs_dir: RunsDir = Path("runs")) -> None:
    """Check every file of the snapshots against its hash, and name what is damaged; the exit code is 1 if any is."""
    from aetheria.errors import SnapshotError

    damaged = False
    for snapshot in [snapshot for source in sources for snapshot in _found(source, runs_dir)]:
        try:
            snapshot.verify()
        except SnapshotError as error:
            damaged = True
            typer.echo(f"damaged  {snapshot.path}: {error}")
        else:
            typer.echo(f"whole    {snapshot.path}")
    if damaged:
        raise typer.Exit(1)


@app.command()
@errors_told()
def digest(sources: Sources, runs_dir: RunsDir = Path("runs")) -> None:
    """Print the sha256 of the weights, computed from the files: of a snapshot, or of a run's newest one."""
    for source in sources:
        snapshot = _found(source, runs_dir)[-1]
        snapshot.verify()
        typer.echo(f"{snapshot.digest()}  {snapshot.path}")


@app.command()
@errors_told()
def weights(
    source: Annotated[
        str, typer.Argument(metavar="RUN|SNAPSHOT", help="A run's newest snapshot, or the folder of one.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")],
    runs_dir: RunsDir = Path("runs"),
    force: Force = False,
) -> None:
    """Write the weights of a snapshot into one safetensors file, however many ranks have written them."""
    from aetheria.errors import SnapshotError

    if output.exists() and not force:
        raise SnapshotError(f"{output} exists. Choose another name, or give --force to replace it.")
    snapshot = _found(source, runs_dir)[-1]
    snapshot.verify()
    try:
        snapshot.write_weights(output)
    except OSError as error:
        raise SnapshotError(f"cannot write {output}: {error.strerror}. Nothing is left of it.") from error
    typer.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB, the weights of {snapshot.path}")


def _found(source: str, runs_dir: Path) -> list[Snapshot]:
    """Returns the snapshots of a run, the oldest first, or the one in a folder; at least one.

    Raises:
        RunFolderError: there is no such run.
        SnapshotError: the run has none.
    """
    from aetheria.errors import SnapshotError
    from aetheria.runs import resolve_run
    from aetheria.snapshot import Snapshot

    path = Path(source)
    if path.is_dir() and not (path / "run.json").is_file():
        return [Snapshot(path.absolute())]
    folder = resolve_run(source, runs_dir)
    # By their names: one that has lost its manifest is to be told of, too.
    snapshots = [Snapshot(path) for path in sorted(folder.snapshots.glob("step-*"))]
    if not snapshots:
        raise SnapshotError(f"{folder.run_id} has no snapshots yet.")
    return snapshots


def _print_table(lines: Iterable[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("step", "epoch", "created", "MB", "kept as", "taken for", "metrics"):
        right = heading in ("step", "epoch", "MB")
        table.add_column(heading, justify="right" if right else "left", no_wrap=right)
    for line in lines:
        marks = ", ".join(mark for mark in ("best", "pinned") if line[mark])
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in line["metrics"].items())
        size = "" if line["bytes"] is None else f"{line['bytes'] / 1e6:,.1f}"
        step = number(line["step"]) or line["name"]
        when = moment(line["created"])
        told = line.get("error") or metrics
        table.add_row(step, number(line["epoch"]), when, size, marks, line["reason"], told)
    text_console().print(table)
