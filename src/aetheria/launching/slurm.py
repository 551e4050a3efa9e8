"""A batch script for Slurm: one torchrun on each node.

https://slurm.schedmd.com/sbatch.html, https://slurm.schedmd.com/srun.html
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from aetheria.errors import LaunchError
from aetheria.launching.job import SAVING_SECONDS, WARNING_SECONDS, Job, refuse_unless

__all__ = ["slurm_script"]

_SCRIPT = """\
set -euo pipefail

# How long torchrun lets its processes take their last snapshot.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={saving}

# The nodes meet on the first one, on a port that no other job there has.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
rendezvous="${{hosts%%$'\\n'*}}:$((20000 + SLURM_JOB_ID % 10000))"

# {warning} seconds before the time is over Slurm tells this script, this script srun, srun torchrun on every node, and
# torchrun its processes, which leave with a snapshot after the step they are in.
step=
ending=no
tell() {{
    ending=yes
    if [ -n "$step" ]; then kill -USR1 "$step" || true; fi
}}
trap tell USR1

# --run-id, --resume=auto: one job is one run, however often it is started; it goes on where it was.
# --wait: so many seconds after the first node has ended the others are ended, too; one may still write a snapshot.
srun --ntasks-per-node=1 --cpu-bind=none --wait=300 \\
    {command} &
step=$!

status=0
wait "$step" || status=$?
if [ "$ending" = yes ]; then
    status=0
    wait "$step" || status=$?  # the wait before was ended by the signal
    if [ "$status" != 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
fi
exit "$status"
"""


def slurm_script(
    job: Job,
    *,
    time: str | None = None,
    partition: str | None = None,
    account: str | None = None,
    directives: Sequence[str] = (),
) -> str:
    """Returns a script for `sbatch`.

    Args:
        job: what is asked for.
        time: after which the job is ended, as Slurm writes it ("12:00:00"). It is put into the queue again then.
        partition: to run in.
        account: to charge.
        directives: further options for sbatch, each beginning with "-".

    Raises:
        LaunchError: something would not stand on one line of the script.
    """
    options: dict[str, str | int | None] = {
        "--job-name": job.name,
        "--nodes": job.nodes,
        "--ntasks-per-node": 1,
        "--gpus-per-node": job.gpus,
        "--cpus-per-task": job.cores,
        "--mem": job.memory,
        "--time": time,
        "--partition": partition,
        "--account": account,
        "--output": "%x-%j.log",
        "--open-mode": "append",
        "--signal": f"B:USR1@{WARNING_SECONDS}",
    }
    lines = []
    for option, value in options.items():
        if value is not None:
            shown = "--memory-per-node" if option == "--mem" else option
            refuse_unless(r"[^\s\"'#\\]+", shown, str(value), "a value without spaces, quotes and #")
            lines.append(f"{option}={value}")
    lines.append("--requeue")
    for directive in directives:
        if not directive.startswith("-") or not directive.isprintable():
            raise LaunchError(
                f"--sbatch: found {directive!r}, expected an option of sbatch on one line, for instance "
                "--sbatch=--constraint=a100."
            )
        lines.append(directive)
    launch = job.launch
    title = f"Trains {launch.config} on {job.nodes} node{'s' * (job.nodes > 1)}."
    if not title.isprintable():
        raise LaunchError(f"CONFIG: found {launch.config!r}, expected a name that stands on one line.")
    command = [
        *map(shlex.quote, job.command_head()),
        '--rendezvous="$rendezvous"',
        '--run-id="$SLURM_JOB_ID"',
        *([f"--max-restarts={launch.max_restarts}"] if launch.max_restarts else []),
        *map(shlex.quote, job.command_tail()),
    ]
    body = _SCRIPT.format(saving=SAVING_SECONDS, warning=WARNING_SECONDS, command=_folded(command))
    head = [
        "#!/bin/bash",
        f"# {title} Written by aetheria launch --slurm; submit it with: sbatch FILE",
        *(f"#SBATCH {line}" for line in lines),
    ]
    return "\n".join(head) + "\n" + body


def _folded(command: Sequence[str]) -> str:
    """Returns a command, already quoted, over several lines."""
    lines, width = [""], 110
    for part in command:
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n    ".join(lines)
