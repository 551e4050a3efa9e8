"""Several processes for one run: the command of torchrun, and scripts for schedulers that start it on every node.

There is no launcher here: torchrun starts the processes, watches them and starts them again.
"""

from __future__ import annotations

from aetheria.launching.job import Job
from aetheria.launching.kubernetes import job_set, job_set_manifest
from aetheria.launching.slurm import slurm_script
from aetheria.launching.torchrun import Launch

__all__ = ["Job", "Launch", "job_set", "job_set_manifest", "slurm_script"]
