"""`aetheria launch`: real torchrun, real processes; what is trained is put in by torchrun's own PYTHON_EXEC."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML
from typer.testing import CliRunner, Result

from aetheria.cli import app
from aetheria.errors import LaunchError
from aetheria.launching import Job, Launch, job_set
from aetheria.launching.torchrun import threads_each, usable_cores

_SECONDS = 600.0  # for what takes five, on a machine that does ten other things

WORKER = f"""#!{sys.executable}
# Stands where Python would that trains: says what it was given, and does what the test wants.
import json, os, signal, sys, time
from pathlib import Path

folder, rank = Path(os.environ["WORKER_FOLDER"]), os.environ["RANK"]
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
said = {{"arguments": sys.argv[1:], "environment": dict(os.environ)}}

def write(name, value):
    (folder / (name + ".new")).write_text(json.dumps(value))
    (folder / (name + ".new")).rename(folder / (name + ".json"))

match os.environ["WORKER_DOES"]:
    case "say":
        pass
    case "add":
        import torch
        import torch.distributed as distributed
        distributed.init_process_group("gloo")
        number = torch.tensor(float(rank) + 1)
        distributed.all_reduce(number)
        distributed.destroy_process_group()
        said["sum"] = number.item()
    case "fail":
        write(f"rank-{{rank}}-{{attempt}}", said)
        sys.exit(7)
    case "fail once" if attempt == "0":
        write(f"rank-{{rank}}-{{attempt}}", said)
        while rank == "1":
            if (folder / "rank-0-0.json").exists():
                sys.exit(7)
            time.sleep(0.02)
        time.sleep(600)  # until torchrun ends it
    case "wait for a signal":
        received = []
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: received.append(number))
        write(f"ready-{{rank}}", said)
        deadline = time.monotonic() + 600
        while not received and time.monotonic() < deadline:
            time.sleep(0.02)
        said["received"] = received
        write(f"rank-{{rank}}-{{attempt}}", said)
        sys.exit(128 + received[0])
write(f"rank-{{rank}}-{{attempt}}", said)
"""


class Place:
    """A folder with a configuration, and processes that are started and ended there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "config.yaml").write_text("epochs: 1\nmodel_name: Net\nrun_name: My_Run\n")
        (folder / "worker").write_text(WORKER)
        (folder / "worker").chmod(0o700)
        self.said = folder / "said"
        self.said.mkdir()
        self.started: list[subprocess.Popen[str]] = []

    def start(
        self, command: list[str], does: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=inherited
            | {"PYTHON_EXEC": str(self.folder / "worker"), "WORKER_FOLDER": str(self.said), "WORKER_DOES": does}
            | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def launch(self, *arguments: str, does: str) -> subprocess.Popen[str]:
        return self.start([sys.executable, "-m", "aetheria", "launch", *arguments], does)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}: {self.names()}"
            time.sleep(0.02)

    def names(self) -> list[str]:
        return sorted(path.stem for path in self.said.glob("*.json"))

    def ranks(self) -> list[dict[str, Any]]:
        return [json.loads((self.said / f"{name}.json").read_text()) for name in self.names() if name[:4] == "rank"]

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.terminate()  # torchrun ends its processes, then itself
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.end()


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["launch", *arguments])


def of(ranks: list[dict[str, Any]], variable: str) -> list[str | None]:
    return [rank["environment"].get(variable) for rank in ranks]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# --- on one node -----------------------------------------------------------------------------------------------------


def test_two_processes_of_one_run(place: Place) -> None:
    process = place.launch(
        *("--nproc", "2", "config.yaml", "--set", "epochs=3", "--set", "model_params.title=a b", "--live", "off", "-q"),
        *("--", "--monitor-interval", "0.1", "--role", "trainer"),
        does="say",
    )
    output, _ = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0, output
    assert "OMP_NUM_THREADS" not in output
    first, second = place.ranks()
    arguments = ["config.yaml", "--set=epochs=3", "--set=model_params.title=a b", "--live=off", "--quiet"]
    assert first["arguments"] == second["arguments"] == ["-u", "-m", "aetheria", "train", *arguments]
    assert of([first, second], "RANK") == ["0", "1"]
    assert of([first, second], "ROLE_NAME") == ["trainer"] * 2
    assert of([first, second], "OMP_NUM_THREADS") == [str(max(1, usable_cores() // 2))] * 2
    launches = of([first, second], "AETHERIA_LAUNCH_ID")
    assert launches[0]
    assert launches[0] == launches[1]


def test_processes_that_are_started_again_go_on_with_the_run_of_their_launch(place: Place) -> None:
    process = place.launch(
        "--nproc=2", "--max-restarts=1", "config.yaml", "--", "--monitor-interval=0.1", does="fail once"
    )
    output, _ = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0, output
    assert place.names() == ["rank-0-0", "rank-0-1", "rank-1-0", "rank-1-1"]
    assert {tuple(rank["arguments"][-2:]) for rank in place.ranks()} == {("config.yaml", "--resume=auto")}
    assert len(set(of(place.ranks(), "AETHERIA_LAUNCH_ID"))) == 1


def test_a_signal_reaches_every_process(place: Place) -> None:
    process = place.launch("--nproc=2", "config.yaml", does="wait for a signal")
    place.wait(lambda: place.names() == ["ready-0", "ready-1"], "the processes")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=_SECONDS)
    assert process.returncode != 0
    assert [rank["received"] for rank in place.ranks()] == [[signal.SIGTERM], [signal.SIGTERM]]


def test_a_node_that_comes_later_takes_part(place: Place) -> None:
    common = ("--nproc=1", "--nnodes=1:2", f"--rendezvous=localhost:{free_port()}", "--run-id=seven", "config.yaml")
    quickly = ("--", "--rdzv-conf=last_call_timeout=1", "--monitor-interval=0.1")
    first = place.launch(*common, *quickly, does="wait for a signal")
    place.wait(lambda: place.names() == ["ready-0"], "the only process")
    (place.said / "ready-0.json").unlink()
    second = place.launch(*common, *quickly, does="wait for a signal")
    place.wait(lambda: {"ready-0", "ready-1"} <= set(place.names()), "both processes")
    for process in (first, second):
        process.send_signal(signal.SIGTERM)
    for process in (first, second):
        process.communicate(timeout=_SECONDS)
    assert of(place.ranks(), "WORLD_SIZE") == ["2", "2"]
    assert of(place.ranks(), "AETHERIA_LAUNCH_ID") == ["seven", "seven"]
    assert {rank["arguments"][-1] for rank in place.ranks()} == {"--resume=auto"}


def test_a_wrong_configuration_is_told_once_before_anything_is_started(place: Place) -> None:
    (place.folder / "config.yaml").write_text("epochs: 1\nbatchsize: 3\n")
    code = (
        "import sys; from aetheria.cli import app\n"
        "try: app(['launch', '--nproc=2', 'config.yaml'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    process = place.start([sys.executable, "-c", code], does="add")
    output, _ = process.communicate(timeout=_SECONDS)
    assert process.returncode == 2
    assert output.startswith("config.yaml:2: batchsize: found an unknown key")
    assert output.count("\n") == 1
    assert place.names() == []


@pytest.mark.parametrize(("processes", "cores", "threads"), [(1, 8, 8), (2, 8, 4), (3, 8, 2), (16, 8, 1), (None, 8, 1)])
def test_the_processes_have_no_more_threads_than_there_are_cores(processes: int, cores: int, threads: int) -> None:
    assert threads_each(processes, cores) == threads


@pytest.mark.parametrize(
    ("nnodes", "max_restarts", "ends"), [("2", 0, "c"), ("2", 1, "--resume=auto"), ("1:2", 0, "--resume=auto")]
)
def test_what_torchrun_may_start_again_goes_on(nnodes: str, max_restarts: int, ends: str) -> None:
    launch = Launch(config="c", nnodes=nnodes, rendezvous="node1:1", run_id="a", max_restarts=max_restarts)
    assert launch.command()[-1] == ends
    assert f"--nnodes={nnodes}" in launch.command()


def test_what_is_set_already_stays() -> None:
    environment = Launch(config="c", nproc="1").environment(
        {"OMP_NUM_THREADS": "5", "AETHERIA_LAUNCH_ID": "outer", "A": "b"}
    )
    assert (environment["OMP_NUM_THREADS"], environment["A"]) == ("5", "b")
    assert environment["AETHERIA_LAUNCH_ID"] != "outer"
    alone = Launch(config="c", run_id="seven")
    assert "--standalone" in alone.command()
    assert alone.environment({})["AETHERIA_LAUNCH_ID"] == "seven"


@pytest.mark.parametrize("nproc", ["auto", "gpu", "cpu"])
def test_what_torchrun_counts_is_passed_on(nproc: str) -> None:
    command = Launch(config="c", nproc=nproc).command()
    assert command[1:5] == ["-m", "torch.distributed.run", f"--nproc-per-node={nproc}", "--standalone"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "0"], "--nproc: found '0', expected 1 or more, or one of auto, cpu, gpu, xpu."),
        (
            ["--nnodes", "4:2"],
            "--nnodes: found '4:2', expected a number of nodes (2), or the fewest and the most (2:4).",
        ),
        (["--nnodes", "2"], "--nnodes 2: found no --rendezvous HOST:PORT and no --run-id ID, by which the nodes"),
        (["--nnodes", "2", "--run-id", "a"], "--nnodes 2: found no --rendezvous HOST:PORT, by which"),
        (
            ["--rendezvous", "node1:29500"],
            "--rendezvous: found no --run-id, expected a name of this launch, alike on every node.",
        ),
        (["--rendezvous", "node1", "--run-id", "a"], "--rendezvous: found 'node1', expected HOST:PORT"),
        (["--rendezvous", "node1:66000", "--run-id", "a"], "--rendezvous: found 'node1:66000', expected HOST:PORT"),
        (
            ["--node-rank", "1"],
            "--node-rank: found no --rendezvous. On a single node, leave --node-rank out.",
        ),
        (["--slurm", "--kubernetes"], "found both --slurm and --kubernetes, expected one of them."),
        (["--time", "1:00", "--image", "i"], "found --time, which only --slurm uses."),
        (["--slurm", "--image", "i"], "found --image, which only --kubernetes uses."),
        (
            ["--gpus-per-node", "1", "--name", "a"],
            "found --name, --gpus-per-node, which only --slurm and --kubernetes use.",
        ),
        (["--slurm", "--run-id", "a"], "--run-id: found 'a', expected nothing: the job script chooses it."),
        (["--slurm", "--nnodes", "2:4"], "--nnodes: found '2:4', expected the number of nodes to ask for."),
        (["--slurm", "--name", "A b"], "--name: found 'A b', expected letters from a to z, digits and -."),
        (
            ["--slurm", "--python", " "],
            "--python: found nothing, expected the command that starts Python on the nodes.",
        ),
        (["--slurm", "--python", "a 'b"], """--python: found "a 'b" (No closing quotation), expected the command"""),
        (["--slurm", "--partition", "a b"], "--partition: found 'a b', expected a value without spaces, quotes and #."),
        (["--slurm", "--sbatch", "constraint=a"], "--sbatch: found 'constraint=a', expected an option of sbatch"),
        (
            ["--slurm", "--sbatch", "--comment=a\nrm"],
            "--sbatch: found '--comment=a\\nrm', expected an option of sbatch",
        ),
        (["--kubernetes"], "--kubernetes: found no --image, expected one that holds Python, Aetheria and the project."),
        (["--kubernetes", "--image", "i", "--namespace", "A"], "--namespace: found 'A', expected letters from a to z"),
        (["--kubernetes", "--image", "i", "--volume", "a"], "--volume: found 'a', expected CLAIM:PATH, for instance"),
        (["--kubernetes", "--image", "i", "--name", "a" * 49], "--name: found 49 characters ("),
    ],
)
def test_what_cannot_be_launched_is_refused(place: Place, arguments: list[str], message: str) -> None:
    result = call(str(place.folder / "config.yaml"), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_options_of_torchrun_stand_behind_the_configuration(place: Place) -> None:
    assert "aetheria launch CONFIG -- OPTIONS" in call("--", "--tee", "3", "config.yaml").stderr
    assert "after CONFIG: found 'epochs=3'" in call("config.yaml", "epochs=3").stderr


# --- Slurm -----------------------------------------------------------------------------------------------------------

SRUN = """#!/bin/bash
# Runs a step's command on this machine, as the only node. Like srun, it passes signals on: it becomes the command.
printf '%s\\n' "$@" > srun.arguments
while [[ "$1" == -* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo localhost; else echo "$@" >> scontrol.log; fi
"""


def free_job() -> str:
    """Returns the number of a job whose port nobody uses here."""
    for number in range(470000 + os.getpid() % 10000, 480000 + os.getpid() % 10000):
        try:
            socket.create_server(("", 20000 + number % 10000)).close()
        except OSError:
            continue
        return str(number)
    raise AssertionError("10,000 ports, and none is free")


def slurm(place: Place, *arguments: str, does: str) -> subprocess.Popen[str]:
    """Starts, with `srun` and `scontrol` of this machine alone, what `aetheria launch --slurm` prints."""
    result = call(str(place.folder / "config.yaml"), "--slurm", *arguments)
    assert result.exit_code == 0, result.stderr
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "script": result.stdout}.items():
        (place.folder / name).write_text(text)
        (place.folder / name).chmod(0o700)
    subprocess.run(["bash", "-n", place.folder / "script"], check=True)
    given = {"SLURM_JOB_ID": free_job(), "SLURM_JOB_NODELIST": "node[1-1]"}
    given["PATH"] = f"{place.folder}:{os.environ['PATH']}"
    return place.start(["bash", "script"], does, given)


def test_a_slurm_script_asks_for_what_was_said(place: Place) -> None:
    result = call(
        *("--slurm", "--nodes", "2", "--gpus-per-node", "4", "--cores-per-node", "32", "--memory-per-node", "64G"),
        *("--time", "1-12:00:00", "--partition", "gpu", "--account", "physics", "--max-restarts", "3"),
        *("--sbatch=--constraint=a100", "--sbatch=--mail-type=END", "--python", "srun-python -X dev"),
        *(str(place.folder / "config.yaml"), "--set", "model_params.title=it's $HOME", "--", "--tee", "3"),
    )
    head = [line for line in result.stdout.splitlines() if line.startswith("#SBATCH")]
    assert head == [
        "#SBATCH --job-name=my-run",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --cpus-per-task=32",
        "#SBATCH --mem=64G",
        "#SBATCH --time=1-12:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=physics",
        "#SBATCH --output=%x-%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR1@120",
        "#SBATCH --requeue",
        "#SBATCH --constraint=a100",
        "#SBATCH --mail-type=END",
    ]
    script = place.folder / "script"
    script.write_text(result.stdout.replace("srun-python -X dev -m aetheria", "printf '<%s>'"))
    (place.folder / "srun").write_text(SRUN)
    (place.folder / "scontrol").write_text(SCONTROL.replace("localhost", "node7; echo node8"))
    for name in ("srun", "scontrol"):
        (place.folder / name).chmod(0o700)
    environment = {
        "PATH": f"{place.folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "n[7-8]",
    }
    shown = subprocess.run(
        ["bash", script], cwd=place.folder, env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout == (
        "<launch><--nproc=4><--nnodes=2><--rendezvous=node7:22345><--run-id=12345><--max-restarts=3>"
        f"<{place.folder}/config.yaml><--set=model_params.title=it's $HOME><--resume=auto><--><--tee><3>"
    )


def test_a_slurm_script_trains(place: Place) -> None:
    process = slurm(place, "--nproc", "2", "--set", "model_params.title=a b", does="add")
    output, _ = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0, output
    assert [rank["sum"] for rank in place.ranks()] == [3, 3]
    job = (place.ranks()[0]["environment"])["SLURM_JOB_ID"]
    assert of(place.ranks(), "AETHERIA_LAUNCH_ID") == [job, job]
    assert place.ranks()[0]["arguments"][-2:] == ["--set=model_params.title=a b", "--resume=auto"]
    assert (place.folder / "srun.arguments").read_text().splitlines()[:2] == ["--ntasks-per-node=1", "--cpu-bind=none"]
    assert not (place.folder / "scontrol.log").exists()


def test_a_slurm_job_whose_time_is_over_saves_and_is_put_into_the_queue_again(place: Place) -> None:
    process = slurm(place, "--nproc", "2", does="wait for a signal")
    place.wait(lambda: place.names() == ["ready-0", "ready-1"], "the processes")
    process.send_signal(signal.SIGUSR1)  # to the script alone, as with --signal=B:USR1
    output, _ = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0, output
    assert [rank["received"] for rank in place.ranks()] == [[signal.SIGUSR1], [signal.SIGUSR1]]
    job = (place.ranks()[0]["environment"])["SLURM_JOB_ID"]
    assert (place.folder / "scontrol.log").read_text() == f"requeue {job}\n"


def test_a_slurm_job_that_fails_has_failed(place: Place) -> None:
    process = slurm(place, "--nproc", "1", does="fail")
    output, _ = process.communicate(timeout=_SECONDS)
    assert process.returncode == 1
    assert "exitcode  : 7" in output
    assert not (place.folder / "scontrol.log").exists()


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def complaints(manifest: dict[str, Any]) -> str:
    """Returns what the types of JobSet and Job, generated from their specification, have against a manifest."""
    # Thousands of types: imported here, and not by every process that only collects the tests.
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    try:
        read = JobsetV1alpha2JobSet.from_dict(manifest)
    except ValidationError as error:
        return str(error)
    assert read is not None
    return "" if read.to_dict() == manifest else "something is in it that they do not know"


def full_manifest(place: Place, *arguments: str) -> str:
    result = call(
        *(str(place.folder / "config.yaml"), "--kubernetes", "--nodes", "2", "--nproc", "2", "--cores-per-node", "5"),
        *(
            "--gpus-per-node",
            "2",
            "--memory-per-node",
            "64Gi",
            "--image",
            "registry/digits:1",
            "--namespace",
            "physics",
        ),
        *("--volume", "runs:/work/runs", "--volume", "data:/data", "--max-restarts", "3", "--live", "off", *arguments),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def test_a_job_set_is_one_for_kubernetes(place: Place) -> None:
    text = full_manifest(place, "--set", "model_params.title=a $(HOME)", "--", "--tee", "3")
    manifest = YAML(typ="safe").load(text)
    assert complaints(manifest) == ""
    older = YAML(typ="safe")
    older.version = (1, 1)  # what Kubernetes reads
    assert older.load(text) == manifest
    assert manifest["metadata"] == {"name": "my-run", "namespace": "physics"}
    assert manifest["spec"]["network"]["enableDNSHostnames"] is True
    assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 3}
    (nodes,) = manifest["spec"]["replicatedJobs"]
    indexed = nodes["template"]["spec"]
    assert [indexed[key] for key in ("completionMode", "completions", "parallelism")] == ["Indexed", 2, 2]
    pod = indexed["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "2", "cpu": "5", "memory": "64Gi"}}
    assert {"name": "OMP_NUM_THREADS", "value": "2"} in container["env"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert "--rendezvous=my-run-nodes-0-0.my-run:29500" in container["command"]
    assert container["command"][-6:] == [
        *("--set=model_params.title=a $$(HOME)", "--resume=auto", "--live=off", "--", "--tee", "3"),
    ]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.replicatedJobs.0.template.spec.completions", "two"),
        ("spec.replicatedJobs.0.template.spec.completionMod", "Indexed"),
        ("spec.replicatedJobs.0.template.spec.template.spec.restartPolicy", "Sometimes"),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.command", "python"),
        ("spec.failurePolicy.maxRestart", 3),
    ],
)
def test_those_types_do_complain(path: str, value: object) -> None:
    manifest = job_set(Job(launch=Launch(config="c"), name="a"), image="i")
    assert complaints(manifest) == ""
    *parents, last = path.split(".")
    place: Any = manifest
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    place[last] = value
    assert complaints(manifest) != ""


def test_the_pods_of_a_job_set_train_together(place: Place) -> None:
    manifest = YAML(typ="safe").load(full_manifest(place, "--nproc", "1", "--python", sys.executable))
    container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    port = free_port()

    def pod(index: int) -> subprocess.Popen[str]:
        """Starts a pod's command here, with what a cluster would put in: its index, and where pod 0 is."""
        there = {"my-run-nodes-0-0.my-run:29500": f"localhost:{port}", "$(POD_INDEX)": str(index), "$$(": "$("}
        command = list(container["command"])
        for name, value in there.items():
            command = [part.replace(name, value) for part in command]
        return place.start(command, "add")

    second = pod(1)  # the one that waits for the other
    first = pod(0)
    for process in (first, second):
        output, _ = process.communicate(timeout=_SECONDS)
        assert process.returncode == 0, output
    assert [rank["sum"] for rank in place.ranks()] == [3, 3]
    assert len(set(of(place.ranks(), "AETHERIA_LAUNCH_ID"))) == 1
    assert sorted(of(place.ranks(), "GROUP_RANK")) == ["0", "1"]


def test_without_a_volume_it_is_said_what_will_be_lost(place: Place) -> None:
    result = call("--kubernetes", "--image", "i", str(place.folder / "config.yaml"))
    assert result.exit_code == 0
    assert "the run folder lies in a pod, and is gone with it" in result.stderr
    assert complaints(YAML(typ="safe").load(result.stdout)) == ""


@pytest.mark.parametrize(("text", "name"), [("My_Run", "my-run"), ("3d", "run-3d"), ("--", "run"), ("a.b", "a-b")])
def test_a_job_is_named_after_its_run(text: str, name: str) -> None:
    assert Job.name_from(text) == name
    Job(launch=Launch(config="c"), name=name)


def test_a_launch_from_python_is_checked_alike() -> None:
    with pytest.raises(LaunchError, match="--nproc: found 'many'"):
        Launch(config="c", nproc="many")
