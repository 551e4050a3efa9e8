"""`aetheria config`: what it prints, where, and its exit codes."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from aetheria.cli.config import app
from aetheria.config import TrainingConfig


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("epochs: 3\nmodel_name: Net\n")
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_a_valid_file(config):
    result = run("check", config)
    assert (result.exit_code, result.stdout) == (0, f"{config} is valid\n")


def test_the_resolved_configuration_alone_goes_to_standard_output(config, tmp_path):
    result = run("check", config, "--set", "epochs=5", "--set", "model_params.rate=1e-4", "--resolved", "json")
    values = json.loads(result.stdout)
    assert values["epochs"] == 5
    assert values["model_params"] == {"rate": 1e-4}
    assert result.stderr == f"{config} is valid\n"


def test_the_resolved_configuration_in_yaml_is_a_configuration(config, tmp_path):
    again = tmp_path / "again.yaml"
    again.write_text(run("check", config, "--set", "model_params.rate=1e-10", "--resolved", "yaml").stdout)
    resolved = TrainingConfig.from_yaml(again).resolved()
    assert resolved["model_params"] == {"rate": 1e-10}
    assert resolved == TrainingConfig.from_yaml(config, ["model_params.rate=1e-10"]).resolved()


def test_what_is_wrong_goes_to_standard_error(config):
    result = run("check", config, "--set", "epochs=0", "--set", "sede=1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "--set epochs=0: epochs: found 0, expected 1 or more. Correct it, or leave it out.",
        "--set sede=1: sede: found an unknown key, expected a known one. Did you mean 'seed'? "
        "What a model or data module takes belongs under model_params or data_params.",
    ]


def test_the_schema_is_json():
    assert json.loads(run("schema").stdout) == TrainingConfig.json_schema()


def test_checking_does_not_import_torch(config):
    code = (
        "import sys; from aetheria.cli.config import app\n"
        f"app(['check', {config!r}], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
