"""`aetheria doctor`: what it finds here, and what it says about a machine that lacks something."""

import errno
import importlib.metadata
import json
import resource
import shutil
import sys

import pytest
from typer.testing import CliRunner

import aetheria.doctor
from aetheria.accelerator import CPUAccelerator
from aetheria.accelerator.survey import survey_devices, try_precision
from aetheria.cli import app
from aetheria.doctor import examine
from aetheria.errors import ConfigError
from aetheria.runs import RunFolder


@pytest.fixture(scope="module")
def devices():
    return survey_devices()


@pytest.fixture
def finding(devices, monkeypatch):
    """Returns a finding by its name; the devices are looked at once for all tests."""
    monkeypatch.setattr("aetheria.accelerator.survey.survey_devices", lambda: devices)

    def look_up(name, runs_dir):
        return next(finding for finding in examine(runs_dir) if finding.name == name)

    return look_up


# --- devices ---------------------------------------------------------------------------------------------------------


def test_the_processor_computes_in_full_precision(devices):
    cpu = devices[0]
    assert (cpu.name, cpu.present) == ("cpu", True)
    assert "cores" in cpu.description
    [full] = [trial for trial in cpu.precisions if trial.precision == "fp32"]
    assert full.milliseconds > 0
    assert {trial.precision for trial in cpu.precisions} == {"fp32", "bf16", "fp16"}


def test_every_device_is_there_or_has_a_remedy(devices):
    assert {device.name.partition(":")[0] for device in devices} == {"cpu", "cuda", "mps"}
    for device in devices:
        assert device.present == bool(device.precisions) == (not device.remedy)


def test_a_precision_that_a_device_refuses_is_reported_in_its_words():
    def refuse(precision):
        raise ConfigError(f"no {precision} here\nand more")

    trial = try_precision(refuse, "bf16")
    assert (trial.milliseconds, trial.problem) == (None, "no bf16 here")


def test_a_device_that_computes_wrongly_is_noticed():
    class Wrong(CPUAccelerator):
        def synchronize(self):
            import torch

            torch.set_grad_enabled(True)

        def forward_context(self):
            import torch

            return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor + 1, lambda tensor: tensor)

    assert try_precision(Wrong, "fp32").problem == "the results are wrong"


# --- all of it -------------------------------------------------------------------------------------------------------


def test_a_look_at_everything(devices, tmp_path, monkeypatch):
    monkeypatch.setattr("aetheria.accelerator.survey.survey_devices", lambda: devices)
    findings = list(examine(tmp_path / "runs"))
    topics = ["versions", "devices", "precisions", "distributed", "torch.compile", "optional packages", "plugins"]
    assert list(dict.fromkeys(finding.topic for finding in findings)) == [*topics, "limits", "runs_dir", "clock"]
    assert {finding.status for finding in findings} <= {"ok", "missing", "warning"}
    for finding in findings:
        assert finding.found
        assert bool(finding.remedy) == (finding.status != "ok"), finding
    assert list(tmp_path.iterdir()) == []  # neither trials nor the folder itself stay


def test_the_command_prints_lines_or_json(devices, tmp_path, monkeypatch):
    monkeypatch.setattr("aetheria.accelerator.survey.survey_devices", lambda: devices)
    text = CliRunner().invoke(app, ["doctor", "--runs-dir", str(tmp_path)])
    assert text.exit_code == 0, text.output
    assert "\nversions\n  ok       python" in text.stdout
    listed = json.loads(CliRunner().invoke(app, ["doctor", "--runs-dir", str(tmp_path), "--json"]).stdout)
    assert listed[0] == {
        "topic": "versions",
        "name": "python",
        "status": "ok",
        "found": sys.version.split()[0],
        "remedy": "",
    }


# --- what may be wrong -----------------------------------------------------------------------------------------------


def test_a_torch_that_cannot_be_imported_does_not_hide_the_rest(finding, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "aetheria.accelerator.survey", None)
    found = finding("torch import", tmp_path)
    assert found.status == "missing"
    assert "pytorch.org" in found.remedy
    assert finding("disk speed", tmp_path).found


def test_a_plugin_that_cannot_be_loaded_is_named(finding, tmp_path, monkeypatch):
    broken = importlib.metadata.EntryPoint("broken", "no_such_module_anywhere", "aetheria.plugins")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [broken])
    found = finding("broken", tmp_path)
    assert found.status == "warning"
    assert "no_such_module_anywhere raised ModuleNotFoundError" in found.found


def test_a_missing_compiler_is_named(finding, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = finding("C++ compiler", tmp_path)
    assert (found.status, found.found) == ("missing", "no no-such-compiler on the path")


def test_a_missing_package_is_named_with_the_command_that_installs_it(finding, tmp_path, monkeypatch):
    monkeypatch.setitem(aetheria.doctor._OPTIONAL_PACKAGES, "no_such_package", (("none",), "wandb", "WandbLogger"))
    found = finding("no_such_package", tmp_path)
    assert (found.status, found.remedy) == ("missing", "For WandbLogger: pip install 'aetheria[wandb]'")


def test_a_low_limit_of_open_files(finding, tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4000))
    found = finding("open files", tmp_path)
    assert (found.status, found.found) == ("warning", "256")
    assert "ulimit -n 4000" in found.remedy


def test_a_small_disk_and_little_shared_memory(finding, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))(total=2**26, used=0, free=2**26)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(aetheria.doctor, "_SHARED_MEMORY", tmp_path)
    assert finding("free space", tmp_path).status == "warning"
    found = finding("shared memory", tmp_path)
    assert (found.status, found.found) == ("warning", "0.1 GiB")
    assert "--shm-size" in found.remedy


def test_a_folder_that_cannot_be_written_to(finding, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(aetheria.doctor.tempfile, "mkdtemp", refuse)
    found = finding("writing", tmp_path)
    assert (found.status, found.found) == ("missing", f"cannot write in {tmp_path}: Read-only file system")


def test_a_file_where_the_folder_should_be(finding, tmp_path):
    (tmp_path / "runs").touch()
    assert finding("folder", tmp_path / "runs").found == f"{tmp_path / 'runs'} is a file"


def test_a_file_system_without_locks(finding, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(aetheria.doctor.fcntl, "lockf", refuse)
    found = finding("record locks", tmp_path)
    assert (found.status, found.found) == ("missing", "No locks available")


def test_a_clock_that_went_back(finding, tmp_path):
    run = RunFolder.create(tmp_path, "early")
    assert finding("time", tmp_path).status == "ok"
    run.update(created="2999-01-01T00:00:00+00:00")
    found = finding("time", tmp_path)
    assert found.status == "warning"
    assert run.run_id in found.found
