"""A JobSet for Kubernetes: one pod for each node, one torchrun in each pod.

https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
"""

from __future__ import annotations

import io
import re
import uuid
from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from aetheria.errors import LaunchError
from aetheria.launching.job import PORT, SAVING_SECONDS, WARNING_SECONDS, Job, refuse_unless
from aetheria.launching.torchrun import threads_each

__all__ = ["job_set", "job_set_manifest"]

_JOB = "nodes"
_RANK = "POD_INDEX"
_INDEX = "batch.kubernetes.io/job-completion-index"
_LONGEST_NAME = 63
_NAME = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?"


def job_set(
    job: Job,
    *,
    image: str,
    namespace: str | None = None,
    volumes: Sequence[str] = (),
    run_id: str | None = None,
) -> dict[str, Any]:
    """Returns a JobSet: an Indexed Job whose pod 0 hosts the rendezvous under its stable name.

    Args:
        job: what is asked for. `max_restarts` is how often all pods are made anew; torchrun restarts nothing.
        image: of the containers; it holds Python, Aetheria and the project, and its working directory is where the
            configuration's path begins.
        namespace: of all of it.
        volumes: "CLAIM:PATH": persistent volume claims, and where they are mounted. The run folder belongs on one that
            all nodes see: a pod's own files are gone with the pod.
        run_id: the launch's name; a new one when not given. One manifest is one launch: applied again, it goes on.

    Raises:
        LaunchError: Kubernetes would not take it; the message says what.
    """
    _check_names(job, image, namespace)
    mounts = [_mount(volume, f"volume-{number}") for number, volume in enumerate(volumes)]
    environment: list[dict[str, Any]] = [
        # The Job's controller says which pod this is; pod 0 hosts the rendezvous, whatever its name resolves to yet.
        {"name": _RANK, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{_INDEX}']"}}},
        {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(SAVING_SECONDS)},
    ]
    if job.cores and job.processes:  # a limit is not seen from inside: there, all cores of the machine are counted
        threads = threads_each(job.processes, job.cores)
        environment.append({"name": "OMP_NUM_THREADS", "value": str(threads)})
    asked = {"nvidia.com/gpu": job.gpus, "cpu": job.cores, "memory": job.memory}
    container = {
        "name": "train",
        "image": image,
        "command": _command(job, run_id or uuid.uuid4().hex),
        "env": environment,
        "resources": {"limits": {name: str(value) for name, value in asked.items() if value is not None}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}, *(mount for _, mount in mounts)],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": WARNING_SECONDS,
        "containers": [container],
        # The 64 MB that a container has there otherwise are too few for data-loading workers and for NCCL.
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}, *(volume for volume, _ in mounts)],
    }
    indexed_job = {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": 0,  # one pod alone cannot come back: the others would wait for the one that is gone
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, **({} if namespace is None else {"namespace": namespace})},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": job.launch.max_restarts},
            "replicatedJobs": [{"name": _JOB, "replicas": 1, "template": {"spec": indexed_job}}],
        },
    }


def job_set_manifest(
    job: Job,
    *,
    image: str,
    namespace: str | None = None,
    volumes: Sequence[str] = (),
    run_id: str | None = None,
) -> str:
    """Returns that JobSet as YAML, for `kubectl apply --filename`; the arguments are those of `job_set`.

    Strings are quoted throughout: Kubernetes reads YAML 1.1, in which `off` and `1:30` are no strings.
    """
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 4096  # a folded string is hard to read and to change
    yaml.dump(_quoted(job_set(job, image=image, namespace=namespace, volumes=volumes, run_id=run_id)), stream)
    return (
        "# Written by aetheria launch --kubernetes; submit it with: kubectl apply --filename FILE\n" + stream.getvalue()
    )


def _command(job: Job, run_id: str) -> list[str]:
    def literally(parts: Sequence[str]) -> list[str]:
        return [part.replace("$(", "$$(") for part in parts]  # Kubernetes puts variables in for $(NAME)

    # <JobSet>-<job>-<which of it>-<pod>.<headless service>; the service is called as the JobSet.
    host = f"{job.name}-{_JOB}-0-0.{job.name}"
    # Without --max-restarts: the restarts are JobSet's, for a node that is gone takes its torchrun with it.
    meeting = [f"--rendezvous={host}:{PORT}", f"--run-id={run_id}", f"--node-rank=$({_RANK})"]
    return [*literally(job.command_head()), *meeting, *literally(job.command_tail())]


def _mount(volume: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a volume of a pod, under a name, and its mount in the container."""
    claim, _, path = volume.partition(":")
    if not re.fullmatch(_NAME, claim) or not path.startswith("/") or ":" in path:
        raise LaunchError(f"--volume: found {volume!r}, expected CLAIM:PATH, for instance runs:/work/runs.")
    return {"name": name, "persistentVolumeClaim": {"claimName": claim}}, {"name": name, "mountPath": path}


def _check_names(job: Job, image: str, namespace: str | None) -> None:
    """Raises a LaunchError where a name is not one for Kubernetes."""
    pod = f"{job.name}-{_JOB}-0-{job.nodes - 1}-abcde"  # with the five letters that tell it from those before it
    if len(pod) > _LONGEST_NAME:
        longest = len(job.name) - len(pod) + _LONGEST_NAME
        raise LaunchError(f"--name: found {len(job.name)} characters ({job.name}), expected {longest} or fewer.")
    refuse_unless(r"[^\s]+", "--image", image, "the name of an image")
    if namespace is not None:
        refuse_unless(
            r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "--namespace", namespace, "letters from a to z, digits and -"
        )


def _quoted(value: Any) -> Any:
    """Returns a value in which strings are quoted when they are dumped; the keys stay as they are."""
    match value:
        case str():
            return DoubleQuotedScalarString(value)
        case dict():
            return {key: _quoted(item) for key, item in value.items()}
        case list():
            return [_quoted(item) for item in value]
        case _:
            return value
