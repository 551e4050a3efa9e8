"""`aetheria train`, `aetheria continue`: from a configuration, or from a run folder, to trained weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aetheria.cli._errors import errors_told, tracebacks_kept
from aetheria.cli.runs import RunArgument, RunsDir

if TYPE_CHECKING:
    from aetheria.config import TrainingConfig
    from aetheria.core import RunResult

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the configuration; may be repeated."),
]
Live = Annotated[
    str | None,
    typer.Option(
        "--live",
        metavar="auto|on|off",
        envvar="AETHERIA_LIVE",
        help="Whether the run can be steered. auto: by the hub, which is started if this is a terminal.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


@errors_told()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The configuration, a YAML file.")],
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="latest|auto|PATH",
            help="Go on with the newest run, with what the same launch has begun (or begin), a run folder, a snapshot.",
        ),
    ] = None,
    live: Live = None,
    quiet: Quiet = False,
) -> None:
    """Train what CONFIG describes. Ctrl-C stops it with a snapshot; a second one stops it at once."""
    from aetheria.config import TrainingConfig

    # Before torch is imported, which takes seconds.
    checked = TrainingConfig.from_yaml(config, _with_live(overrides, live))
    _run(checked, resume, quiet)


@errors_told()
def continue_(
    run: RunArgument,
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    live: Live = None,
    quiet: Quiet = False,
) -> None:
    """Go on with RUN in its folder, from its newest good snapshot, bit for bit as if it had never stopped."""
    from aetheria.runs import resolve_run

    path = resolve_run(run, runs_dir).path

    from aetheria.engine.assembly import config_of_run

    _run(config_of_run(path, _with_live(overrides, live)), path, quiet)


def _with_live(overrides: list[str] | None, live: str | None) -> list[str]:
    return [*(overrides or ()), *([] if live is None else [f"live={live}"])]


def _find_hub(config: TrainingConfig) -> None:
    """Starts a hub where the run asks for one: with `live: on`, and with `auto` on a terminal."""
    import sys

    from aetheria.cli.hub import start_detached
    from aetheria.client.location import hub_folder, hub_is_running
    from aetheria.errors import HubError

    if config.live == "off" or not _is_first() or hub_is_running(hub_folder()):
        return
    if config.live == "on":
        start_detached(hub_folder())
    elif sys.stderr.isatty():
        try:
            start_detached(hub_folder())
        except HubError as error:
            typer.echo(f"This run cannot be steered: {error}", err=True)


def _is_first() -> bool:
    """Returns whether this is the rank that talks to people; known before torch is imported."""
    import os

    return os.environ.get("RANK", "0") == "0"


def _run(config: TrainingConfig, resume_from: str | Path | None, quiet: bool) -> None:
    _find_hub(config)  # while nothing heavy has been imported yet, so that it starts beside that

    from aetheria.orchestrator import Orchestrator
    from aetheria.plugins import ProgressBar

    with tracebacks_kept():
        orchestrator = Orchestrator.from_config(config)
        shown = [callback for callback in orchestrator.callbacks if isinstance(callback, ProgressBar)]
        if quiet:
            orchestrator.callbacks = [callback for callback in orchestrator.callbacks if callback not in shown]
        elif not shown:
            orchestrator.callbacks.append(ProgressBar())
        try:
            result = orchestrator.run(resume_from)
        except KeyboardInterrupt as error:
            if not hasattr(orchestrator, "folder"):
                raise  # there is no run yet that could be continued
            if _is_first():
                typer.echo(f"{error}\n\nContinue with:\n  {_continue_command(orchestrator.folder, config)}", err=True)
            raise typer.Exit(130) from None
    if _is_first():
        _print_result(result, config)
    if result.signal is not None:
        raise typer.Exit(128 + result.signal)


def _print_result(result: RunResult, config: TrainingConfig) -> None:
    from aetheria.cli.summary import summarize
    from aetheria.runs import RunFolder

    run = _shown(result.folder)
    typer.echo(f"\n{result.status}: {result.reason}\n")
    rows = {"run": run, "step": f"{result.global_step:,}"}
    if result.metrics:
        rows["last"] = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    best = summarize(RunFolder(result.folder))["best"]
    if best and "value" in best:
        rows["best"] = f"{best['metric']} {best['value']:.4g} at step {best['step']:,}"
    rows["digest"] = result.digest[:16]
    for name, value in rows.items():
        typer.echo(f"  {name:<8}{value}")
    if result.signal is not None:
        typer.echo(f"\nContinue with:\n  {_continue_command(result.folder, config)}")
        return
    more = "epochs"
    if config.max_steps is not None and result.global_step >= config.max_steps:
        more = "max_steps"
    elif config.max_time is not None and result.status == "completed" and len(result.history) != config.epochs:
        more = "max_time"
    typer.echo(
        "\nNext:\n"
        f"  aetheria show {run}\n"
        f"  aetheria plot {run} -o curves.png\n"
        f"  aetheria predict {run} --input FILE --output FILE\n"
        f"  {_continue_command(result.folder, config)}"
        f" --set {more}=N    # train longer"
    )


def _continue_command(folder: Path, config: TrainingConfig) -> str:
    import os

    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if ranks == "1" or config.source is None:
        return f"aetheria continue {_shown(folder)}"
    return f"aetheria launch --nproc {ranks} {_shown(config.source)} --resume {_shown(folder)}"


def _shown(folder: Path) -> str:
    """Returns a folder as it can be typed here."""
    here = Path.cwd()
    return shlex.quote(str(folder.relative_to(here) if folder.is_relative_to(here) else folder))
