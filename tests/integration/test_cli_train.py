"""`aetheria train` and `aetheria continue` as a person uses them: the real program, real signals, a real terminal."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest
from tests.warm import WarmProcess
from typer.testing import CliRunner

from aetheria.cli import app
from aetheria.orchestrator import Orchestrator  # noqa: F401 - so that its devices outlive an isolated registry
from aetheria.registry import Registry
from aetheria.snapshot import list_snapshots

DEADLINE = 600.0  # seconds after which something is not slow but stuck
MODEL = """
import signal
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aetheria import AetherDataModule, AetherModel, Registry


@Registry.register_model("Tiny")
class Tiny(AetherModel):
    def __init__(self, behaviour="train"):
        super().__init__()
        self.behaviour = behaviour
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch):
        if self.behaviour == "raise":
            raise ZeroDivisionError("on purpose")
        if self.behaviour == "hang":
            handler = signal.getsignal(signal.SIGINT)

            def watched(number, frame):
                handler(number, frame)
                Path("interrupted").touch()

            signal.signal(signal.SIGINT, watched)
            Path("hangs").touch()
            while True:
                time.sleep(0.01)
        return {"loss": self.layers(batch[0]).square().mean()}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@Registry.register_data("Noise")
class Noise(AetherDataModule):
    def __init__(self, workers=0):
        self.workers = workers

    def train_dataloader(self):
        samples = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(samples), batch_size=8, shuffle=True, num_workers=self.workers)
"""
CONFIG = """
model_name: Tiny
data_name: Noise
max_steps: 20
accelerator: cpu
snapshots: {every_epochs: 1}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's project, as the current directory."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "model.py").write_text(MODEL)
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def start(*arguments):
    return WarmProcess(["-m", "aetheria", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_cold(*arguments):
    """Starts a Python that has imported nothing yet."""
    return subprocess.Popen(
        [sys.executable, "-m", "aetheria", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    output, errors = process.communicate(timeout=DEADLINE)
    return process.returncode, output, errors


def inside(*arguments):
    """Runs a command in this process, which has torch imported already."""
    with Registry.isolated():
        return CliRunner().invoke(app, list(arguments))


def wait_for(condition, process):
    """Returns the condition's value as soon as it is true."""
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        if isinstance(process, WarmProcess):
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
    return value


def first_snapshot():
    return list(Path("runs").glob("*/snapshots/step-*"))


def the_run():
    [folder] = Path("runs").iterdir()
    return folder


def told(folder):
    return json.loads((folder / "run.json").read_text())


def digest_in(output):
    return re.search(r"digest +([0-9a-f]{16})\n", output)[1]


def continue_command(output):
    """Returns the arguments of the command that the program says continues the run."""
    return shlex.split(re.search(r"Continue with:\s+aetheria (continue .+?)\s*$", output, re.MULTILINE)[1])


# --- it trains -------------------------------------------------------------------------------------------------------


def test_a_configuration_is_trained_and_what_to_type_next_is_said(project):
    code, output, errors = finish(start_cold("train", "config.yaml"))
    assert code == 0, errors
    run = the_run()
    assert told(run)["status"] == "completed"
    assert output.startswith("\ncompleted: ")
    assert re.search(rf"^  run +{run}$", output, re.MULTILINE)
    assert re.search(r"^  last +loss [0-9.e-]+", output, re.MULTILINE)
    for command in ("show", "plot", "predict", "continue"):
        assert f"aetheria {command} {run}" in output
    assert list_snapshots(run / "snapshots")[-1].digest().startswith(digest_in(output))
    assert "step 16/20" in errors  # the progress bar, which the configuration does not name


def test_quiet_shows_no_progress_even_where_the_configuration_names_it(project):
    result = inside("train", "config.yaml", "--quiet", "--set", "callbacks=[ProgressBar]")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout.startswith("\ncompleted: ")


def test_the_progress_bar_of_the_configuration_is_not_doubled(project):
    result = inside("train", "config.yaml", "--set", "callbacks=[ProgressBar]")
    assert result.stderr.count("step 16/20") == 1


def test_resume_latest_goes_on_in_the_same_folder(project):
    inside("train", "config.yaml", "-q")
    result = inside("train", "config.yaml", "-q", "--resume", "latest", "--set", "max_steps=30")
    assert result.exit_code == 0, result.output
    assert told(the_run())["global_step"] == 30
    assert [life["step"] for life in told(the_run())["lives"]] == [0, 20]
    straight = inside("train", "config.yaml", "-q", "--set", "max_steps=30", "--set", "runs_dir=straight")
    assert digest_in(result.stdout) == digest_in(straight.stdout)


def test_resume_from_a_run_folder(project):
    inside("train", "config.yaml", "-q")
    result = inside("train", "config.yaml", "-q", "--resume", str(the_run()), "--set", "max_steps=30")
    assert (result.exit_code, told(the_run())["global_step"]) == (0, 30)


# --- it is interrupted -----------------------------------------------------------------------------------------------


def test_after_sigterm_the_printed_command_ends_where_an_uninterrupted_run_does(project):
    process = start("train", "config.yaml", "--set", "max_steps=100000000")
    wait_for(first_snapshot, process)
    process.send_signal(signal.SIGTERM)
    code, output, errors = finish(process)
    assert code == 128 + signal.SIGTERM, errors
    folder = the_run()
    assert told(folder)["status"] == "interrupted"
    step = told(folder)["global_step"]
    assert list_snapshots(folder / "snapshots")[-1].manifest.step == step

    steps = f"max_steps={step + 13}"
    code, output, errors = finish(start(*continue_command(output), "--set", steps))
    assert code == 0, errors
    assert told(folder)["global_step"] == step + 13
    straight = inside("train", "config.yaml", "-q", "--set", steps, "--set", "runs_dir=straight")
    assert digest_in(output) == digest_in(straight.stdout)


def test_control_c_in_a_terminal_reaches_the_workers_too_and_all_is_saved(project):
    arguments = ["-m", "aetheria", "train", "config.yaml", "--set", "epochs=100000000"]
    arguments += ["--set", "max_steps=null", "--set", "data_params.workers=2", "--set", "log_every=1"]
    terminal = pexpect.spawn(sys.executable, arguments, timeout=DEADLINE, encoding="utf-8", dimensions=(40, 120))
    terminal.expect("samples/s")  # the bars are drawn
    wait_for(first_snapshot, terminal)
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 128 + signal.SIGINT, terminal.before
    assert "Traceback" not in terminal.before
    assert continue_command(terminal.before.replace("\r\n", "\n"))[0] == "continue"
    assert told(the_run())["status"] == "interrupted"
    assert list_snapshots(the_run() / "snapshots")[-1].manifest.step == told(the_run())["global_step"]


def test_a_second_control_c_stops_at_once(project):
    process = start("train", "config.yaml", "--set", "model_params.behaviour=hang")
    wait_for(Path("hangs").exists, process)
    process.send_signal(signal.SIGINT)
    wait_for(Path("interrupted").exists, process)
    process.send_signal(signal.SIGINT)
    code, _output, errors = finish(process)
    assert code == 128 + signal.SIGINT
    assert "second Ctrl-C: stopped at once" in errors
    assert continue_command(errors) == ["continue", str(the_run())]
    assert told(the_run())["status"] == "interrupted"
    assert first_snapshot() == []


# --- something is wrong ----------------------------------------------------------------------------------------------


def test_a_wrong_configuration_is_refused_before_torch_is_imported(project):
    code = (
        "import sys\nfrom aetheria.cli import app\n"
        "try: app(['train', 'config.yaml', '--set', 'sede=1'])\n"
        "except SystemExit as end: sys.exit(99 if 'torch' in sys.modules else end.code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Did you mean 'seed'?" in result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("runs").exists()


def test_a_model_that_raises_is_shown_with_its_own_traceback(project):
    code, output, errors = finish(start_cold("train", "config.yaml", "--set", "model_params.behaviour=raise"))
    assert (code, output) == (1, "")
    assert errors.rstrip().endswith("ZeroDivisionError: on purpose")
    line = MODEL.splitlines().index('            raise ZeroDivisionError("on purpose")') + 1
    assert f'File "{project}/plugins/model.py", line {line}, in training_step' in errors
    assert 'raise ZeroDivisionError("on purpose")' in errors
    assert told(the_run())["status"] == "failed"
    assert told(the_run())["status_detail"] == "ZeroDivisionError: on purpose"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nothing.yaml"], ["nothing.yaml"]),
        (["train", "config.yaml", "--set", "model_name=Tyni"], ["'Tyni'", "Did you mean 'Tiny'"]),
        (["train", "config.yaml", "--set", "runs_dir=config.yaml/runs"], ["cannot make a run folder", "runs_dir"]),
        (["train", "config.yaml", "--resume", "latest"], ["no run to resume", "Train without --resume"]),
        (["train", "config.yaml", "--resume", "nowhere"], ["no run and no snapshot at", "nowhere"]),
        (["continue", "nobody"], ["no run called 'nobody'"]),
    ],
)
def test_what_the_user_can_put_right_is_told_in_a_sentence(project, arguments, words):
    result = inside(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_continue_refuses_a_run_that_somebody_else_trains(project):
    process = start("train", "config.yaml", "--set", "model_params.behaviour=hang")
    wait_for(Path("hangs").exists, process)
    try:
        result = inside("continue", "@last")
        assert result.exit_code == 2
        assert the_run().name in result.stderr
    finally:
        process.kill()
        process.communicate()
    assert inside("continue", "@last", "-q", "--set", "model_params.behaviour=train").exit_code == 0
