"""`aetheria launch`: one run, several processes. A thin front of torchrun, and scripts that start it on a cluster."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from aetheria.cli._errors import errors_told
from aetheria.cli.train import Overrides, Quiet

if TYPE_CHECKING:
    from aetheria.launching import Launch

_JOB, _SLURM, _KUBERNETES = "Job scripts", "Slurm", "Kubernetes"


@errors_told()
def launch(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The configuration, a YAML file.")],
    torchrun_options: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- TORCHRUN OPTIONS", help="What torchrun is given besides, as it is."),
    ] = None,
    nproc: Annotated[
        str,
        typer.Option(
            metavar="N|auto|gpu|cpu",
            help="Processes on each node; auto: one for each GPU, or each core where there is none. For a number, "
            "OMP_NUM_THREADS becomes cores // N, at least 1, and otherwise 1; one that is set stays.",
        ),
    ] = "auto",
    nnodes: Annotated[
        str, typer.Option("--nnodes", "--nodes", metavar="M|MIN:MAX", help="How many nodes take part.")
    ] = "1",
    rendezvous: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where the nodes meet, alike on all of them; HOST is one of them."),
    ] = None,
    run_id: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="What this launch is called, alike on all nodes. With --resume auto, a later one so called goes on.",
        ),
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(
            metavar="R", min=0, help="Number of this node: 0 hosts the rendezvous. Found out by HOST if none."
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="K", min=0, help="Start all processes again, so often, when one fails; --resume is auto then."
        ),
    ] = 0,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|latest|PATH", help="As for train; auto: go on with the run of this launch, if there is one."
        ),
    ] = None,
    live: Annotated[
        str | None, typer.Option(metavar="auto|on|off", help="Whether the run can be steered, as for train.")
    ] = None,
    quiet: Quiet = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", rich_help_panel=_JOB, help="Print a script for sbatch; start nothing.")
    ] = False,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", rich_help_panel=_JOB, help="Print a JobSet for kubectl; start nothing.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=_JOB, help="Of the job; the run's, if none.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(metavar="N", min=1, rich_help_panel=_JOB, help="To ask for; --nproc auto is N then.")
    ] = None,
    cores_per_node: Annotated[
        int | None, typer.Option(metavar="N", min=1, rich_help_panel=_JOB, help="To ask for.")
    ] = None,
    memory_per_node: Annotated[
        str | None,
        typer.Option(metavar="SIZE", rich_help_panel=_JOB, help="To ask for: 64G for Slurm, 64Gi for Kubernetes."),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            rich_help_panel=_JOB,
            help="Starts Python there; this one for Slurm, python for Kubernetes.",
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(metavar="D-HH:MM:SS", rich_help_panel=_SLURM, help="Longest time before it is requeued."),
    ] = None,
    partition: Annotated[str | None, typer.Option(metavar="NAME", rich_help_panel=_SLURM, help="To run in.")] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", rich_help_panel=_SLURM, help="To charge.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", rich_help_panel=_SLURM, help="One more #SBATCH line; may be repeated."),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(metavar="IMAGE", rich_help_panel=_KUBERNETES, help="With the project in its working directory."),
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=_KUBERNETES, help="Of the JobSet.")
    ] = None,
    volumes: Annotated[
        list[str] | None,
        typer.Option(
            "--volume",
            metavar="CLAIM:PATH",
            rich_help_panel=_KUBERNETES,
            help="A volume claim to mount; may be repeated.",
        ),
    ] = None,
) -> None:
    """Train CONFIG with several processes, through torchrun; or print the script that does so on a cluster."""
    from aetheria.config import TrainingConfig
    from aetheria.errors import LaunchError
    from aetheria.launching import Job, Launch

    wanted = Launch(
        config=str(config),
        overrides=tuple(overrides or ()),
        resume=resume,
        live=live,
        quiet=quiet,
        nproc=nproc,
        nnodes=nnodes,
        rendezvous=rendezvous,
        run_id=run_id,
        node_rank=node_rank,
        max_restarts=max_restarts,
        torchrun_options=tuple(torchrun_options or ()),
    )
    job_options = {
        "--name": name,
        "--gpus-per-node": gpus_per_node,
        "--cores-per-node": cores_per_node,
        "--memory-per-node": memory_per_node,
        "--python": python,
    }
    slurm_options = {"--time": time, "--partition": partition, "--account": account, "--sbatch": sbatch}
    kubernetes_options = {"--image": image, "--namespace": namespace, "--volume": volumes}
    _refuse_what_is_for_others(slurm, kubernetes, job_options, slurm_options, kubernetes_options)
    # Here once, with the line that is wrong; not in every process after it has imported torch.
    checked = TrainingConfig.from_yaml(config, [*wanted.overrides, *([] if live is None else [f"live={live}"])])
    if not (slurm or kubernetes):
        _become(wanted)
    job = Job(
        launch=wanted,
        name=name or Job.name_from("-".join(filter(None, (checked.run_name or config.stem, checked.replica_id)))),
        gpus=gpus_per_node,
        cores=cores_per_node,
        memory=memory_per_node,
        python=python or (shlex.quote(sys.executable) if slurm else "python"),
    )
    if slurm:
        from aetheria.launching import slurm_script

        script = slurm_script(job, time=time, partition=partition, account=account, directives=sbatch or ())
    else:
        from aetheria.launching import job_set_manifest

        if image is None:
            raise LaunchError(
                "--kubernetes: found no --image, expected one that holds Python, Aetheria and the project."
            )
        if not volumes:
            typer.echo("No --volume: the run folder lies in a pod, and is gone with it.", err=True)
        script = job_set_manifest(job, image=image, namespace=namespace, volumes=volumes or ())
    typer.echo(script, nl=False)


def _become(wanted: Launch) -> NoReturn:
    """Turns this process into torchrun, so that signals reach that and its exit code is this one's."""
    command = wanted.command()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, wanted.environment(os.environ))


def _refuse_what_is_for_others(
    slurm: bool,
    kubernetes: bool,
    job_options: dict[str, Any],
    slurm_options: dict[str, Any],
    kubernetes_options: dict[str, Any],
) -> None:
    """Raises a LaunchError where an option was given that would do nothing."""
    from aetheria.errors import LaunchError

    if slurm and kubernetes:
        raise LaunchError("found both --slurm and --kubernetes, expected one of them.")
    for used, wanted_by, options in (
        (slurm or kubernetes, "--slurm and --kubernetes", job_options),
        (slurm, "--slurm", slurm_options),
        (kubernetes, "--kubernetes", kubernetes_options),
    ):
        given = [option for option, value in options.items() if value]
        if given and not used:
            raise LaunchError(f"found {', '.join(given)}, which only {wanted_by} use{'s' * (' ' not in wanted_by)}.")
