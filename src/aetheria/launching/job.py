"""What a scheduler is asked for, whichever it is."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace

from aetheria.errors import LaunchError
from aetheria.launching.torchrun import Launch

__all__ = ["PORT", "SAVING_SECONDS", "WARNING_SECONDS", "Job", "refuse_unless"]

PORT = 29500
"""Where the nodes meet, if nobody else is on them."""

WARNING_SECONDS = 120
"""How long before the end of its time a job is told of it."""

SAVING_SECONDS = 100
"""How much of that the processes have for the step they are in and a last snapshot; torchrun alone gives them 30."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A launch, and what each of its nodes needs.

    Attributes:
        launch: what is started; the scheduler chooses the rendezvous and the run's name.
        name: what the job is called: lower-case letters, digits and "-", beginning with a letter.
        gpus: on each node.
        cores: on each node.
        memory: of each node, as the scheduler writes it ("64G" for Slurm, "64Gi" for Kubernetes).
        python: the command that starts Python there.

    Raises:
        LaunchError: this cannot be asked for; the message says why.
    """

    launch: Launch
    name: str
    gpus: int | None = None
    cores: int | None = None
    memory: str | None = None
    python: str = "python"

    def __post_init__(self) -> None:
        given = {"--rendezvous": self.launch.rendezvous, "--run-id": self.launch.run_id}
        given["--node-rank"] = None if self.launch.node_rank is None else str(self.launch.node_rank)
        for option, value in given.items():
            if value is not None:
                raise LaunchError(f"{option}: found {value!r}, expected nothing: the job script chooses it.")
        if ":" in self.launch.nnodes:
            raise LaunchError(f"--nnodes: found {self.launch.nnodes!r}, expected the number of nodes to ask for.")
        # What both schedulers, and the host names that Kubernetes makes of it, can bear.
        refuse_unless(r"[a-z]([a-z0-9-]*[a-z0-9])?", "--name", self.name, "letters from a to z, digits and -")
        expected = "expected the command that starts Python on the nodes."
        try:
            words = shlex.split(self.python)
        except ValueError as error:
            raise LaunchError(f"--python: found {self.python!r} ({error}), {expected}") from error
        if not words:
            raise LaunchError(f"--python: found nothing, {expected}")

    @classmethod
    def name_from(cls, text: str) -> str:
        """Returns a name for a job that is as much like a text as it may be."""
        name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
        return name if name[:1].isalpha() else f"run-{name}".strip("-")

    @property
    def nodes(self) -> int:
        """How many nodes."""
        return int(self.launch.nnodes)

    @property
    def processes(self) -> int | None:
        """How many processes on each node: one for each GPU that was asked for, or what was said; None: as many as
        torchrun counts there.
        """
        return self.gpus if self.launch.nproc == "auto" and self.gpus else self.launch.processes

    def command_head(self) -> list[str]:
        """Returns how the command of each node begins; what follows are the options by which the nodes meet."""
        return [
            *shlex.split(self.python),
            *("-m", "aetheria", "launch"),
            f"--nproc={self.processes or self.launch.nproc}",
            f"--nnodes={self.nodes}",
        ]

    def command_tail(self) -> list[str]:
        """Returns how that command ends. What a scheduler has ended or started again goes on with its run."""
        launch = replace(self.launch, resume=self.launch.resume or "auto")
        return [*launch.training_arguments(), *(["--", *launch.torchrun_options] if launch.torchrun_options else [])]


def refuse_unless(pattern: str, option: str, value: str, expected: str) -> None:
    """Raises a LaunchError unless the whole value looks like a pattern."""
    if re.fullmatch(pattern, value, re.ASCII) is None:
        raise LaunchError(f"{option}: found {value!r}, expected {expected}.")
