"""What `aetheria launch` becomes: one torchrun for each node, and what it starts.

https://docs.pytorch.org/docs/stable/elastic/run.html
"""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from aetheria.errors import LaunchError

__all__ = ["FORWARDED_SIGNALS", "LAUNCH_ID", "Launch"]

LAUNCH_ID = "AETHERIA_LAUNCH_ID"
"""The environment variable by which processes that are started again find the run that their launch began."""

FORWARDED_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What torchrun passes on to its processes: its own four, and the one that schedulers send before they take a node."""

_COUNTED_BY_TORCHRUN = ("auto", "cpu", "gpu", "xpu")
# By default torchrun's agents keep the address of the first round's store. Seen with torch 2.13: a node that comes
# later asks the new round for it, where nobody has written it, and after a minute all end with "wait timeout".
_STORE_OF_ITS_OWN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
_HOST_SECONDS = 600  # until node 0 must be there: its image may have to be fetched first


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What is trained, and by how many processes on how many nodes.

    Attributes:
        config: path of the configuration, as `aetheria train` gets it.
        overrides: `key=value`, as for `aetheria train --set`.
        resume: as for `aetheria train --resume`; None means "auto" where torchrun may start the processes again, and
            otherwise a new run.
        live: as for `aetheria train --live`.
        quiet: as for `aetheria train --quiet`.
        nproc: processes on each node: a number, or "auto", "cpu", "gpu", "xpu", which torchrun counts.
        nnodes: a number of nodes, or "MIN:MAX" of them.
        rendezvous: "HOST:PORT" at which the nodes meet, HOST being one of them. None on one node.
        run_id: the name that all nodes of one launch give to it. A launch on one node need not have one; a later launch
            of the same name goes on with its run, if `resume` is "auto".
        node_rank: number of this node: node 0 hosts the rendezvous, the others wait for it. None where torchrun is to
            find out by HOST who hosts it.
        max_restarts: how often torchrun starts all processes again when one has failed.
        torchrun_options: what torchrun is given besides, as it is.

    Raises:
        LaunchError: this cannot be launched; the message says why.
    """

    config: str
    overrides: tuple[str, ...] = ()
    resume: str | None = None
    live: str | None = None
    quiet: bool = False
    nproc: str = "auto"
    nnodes: str = "1"
    rendezvous: str | None = None
    run_id: str | None = None
    node_rank: int | None = None
    max_restarts: int = 0
    torchrun_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.config.startswith("-"):
            raise LaunchError(
                f"CONFIG: found {self.config!r}, expected a YAML file. What torchrun is given comes after the file: "
                "aetheria launch CONFIG -- OPTIONS"
            )
        if self.nproc not in _COUNTED_BY_TORCHRUN and not _is_count(self.nproc):
            raise LaunchError(
                f"--nproc: found {self.nproc!r}, expected 1 or more, or one of {', '.join(_COUNTED_BY_TORCHRUN)}."
            )
        if not _is_count(self.nnodes) and not _is_range(self.nnodes):
            raise LaunchError(
                f"--nnodes: found {self.nnodes!r}, expected a number of nodes (2), or the fewest and the most (2:4)."
            )
        if self.torchrun_options and not self.torchrun_options[0].startswith("-"):
            raise LaunchError(
                f"after CONFIG: found {self.torchrun_options[0]!r}, expected nothing, or -- and options of torchrun. "
                "Change values of the configuration with --set KEY=VALUE."
            )
        if self.rendezvous is not None and not _is_endpoint(self.rendezvous):
            raise LaunchError(
                f"--rendezvous: found {self.rendezvous!r}, expected HOST:PORT with a port from 1 to 65535, the same on "
                "every node, and HOST being one of them."
            )

    def check_meeting(self) -> None:
        """Checks that nodes which are started one by one will find one another.

        Raises:
            LaunchError: they will not.
        """
        given = {"--rendezvous HOST:PORT": self.rendezvous, "--run-id ID": self.run_id}
        missing = [option for option, value in given.items() if value is None]
        if self.nnodes != "1" and missing:
            raise LaunchError(
                f"--nnodes {self.nnodes}: found no {' and no '.join(missing)}, by which the nodes find one another. "
                "Give both, alike on every node; or let --slurm or --kubernetes write a script that does."
            )
        if self.rendezvous is None and self.node_rank is not None:
            raise LaunchError("--node-rank: found no --rendezvous. On a single node, leave --node-rank out.")
        if self.rendezvous is not None and self.run_id is None:
            raise LaunchError(
                "--rendezvous: found no --run-id, expected a name of this launch, alike on every node. On a single "
                "node, leave both out."
            )

    @property
    def processes(self) -> int | None:
        """The number of processes on each node; None where torchrun counts."""
        return int(self.nproc) if _is_count(self.nproc) else None

    def training_arguments(self) -> list[str]:
        """Returns what stands behind `aetheria train` in every process."""
        # A node that comes later lets torchrun start all processes anew, too.
        resume = self.resume or ("auto" if self.max_restarts or ":" in self.nnodes else None)
        return [
            self.config,
            *(f"--set={override}" for override in self.overrides),
            *([] if resume is None else [f"--resume={resume}"]),
            *([] if self.live is None else [f"--live={self.live}"]),
            *(["--quiet"] if self.quiet else []),
        ]

    def command(self) -> list[str]:
        """Returns the command that this node runs: torchrun, of the Python that runs now.

        Raises:
            LaunchError: the nodes would not find one another.
        """
        self.check_meeting()
        return [
            sys.executable,
            *("-m", "torch.distributed.run"),
            f"--nproc-per-node={self.nproc}",
            *self._meeting(),
            *([f"--max-restarts={self.max_restarts}"] if self.max_restarts else []),
            *self.torchrun_options,
            *("-m", "aetheria", "train"),
            *self.training_arguments(),
        ]

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Returns the environment of that command.

        Args:
            inherited: the environment of this process. What it says already is left as it is, but for the launch's
                own name.
        """
        return {
            # Where it is missing, torchrun takes 1 and warns, however many cores there are for each process.
            "OMP_NUM_THREADS": str(threads_each(self.processes, usable_cores())),
            # The option of this name by torchrun's own variable: a version that does not know it goes without.
            "PET_SIGNALS_TO_HANDLE": FORWARDED_SIGNALS,
            **({} if self.rendezvous is None else _STORE_OF_ITS_OWN),
            **inherited,
            LAUNCH_ID: self.run_id or uuid.uuid4().hex,
        }

    def _meeting(self) -> list[str]:
        if self.rendezvous is None:
            return ["--standalone"]
        meeting = [
            f"--nnodes={self.nnodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.rendezvous}",
            f"--rdzv-id={self.run_id}",
        ]
        if self.node_rank is not None:
            is_host = str(self.node_rank == 0).lower()
            meeting.append(f"--rdzv-conf=is_host={is_host},read_timeout={_HOST_SECONDS}")
        return meeting


def threads_each(processes: int | None, cores: int) -> int:
    """Returns how many threads each process computes with, so that together they have no more than there are cores."""
    return 1 if processes is None else max(1, cores // processes)


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_count(text: str) -> bool:
    return re.fullmatch(r"[1-9][0-9]*", text, re.ASCII) is not None


def _is_range(text: str) -> bool:
    fewest, _, most = text.partition(":")
    return _is_count(fewest) and _is_count(most) and int(fewest) <= int(most)


def _is_endpoint(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and _is_count(port) and int(port) <= 65535
