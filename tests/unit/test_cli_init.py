"""`aetheria init`: the project it writes, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import typer
from tests.warm import run_warm
from typer.testing import CliRunner

from aetheria.cli.init import TEMPLATES, init
from aetheria.config import TrainingConfig


def run(directory: Path):
    app = typer.Typer()
    app.command()(init)
    return CliRunner().invoke(app, [str(directory)])


def test_a_project_is_written_and_what_to_type_next_is_said(tmp_path):
    project = tmp_path / "my project"
    result = run(project)
    assert result.exit_code == 0, result.output
    assert f"cd '{project}'\n  aetheria train config.yaml" in result.stdout
    assert {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()} == {
        ".gitignore",
        "README.md",
        "config.schema.json",
        "config.yaml",
        "plugins/data.py",
        "plugins/model.py",
        "tests/test_project.py",
    }
    assert json.loads((project / "config.schema.json").read_text()) == TrainingConfig.json_schema()


def test_the_configuration_is_valid_and_so_are_the_keys_in_its_comments(tmp_path):
    run(tmp_path)
    config = TrainingConfig.from_yaml(tmp_path / "config.yaml")
    assert config.model_name == "SpiralClassifier"
    commented_out = re.findall(r"^#(\w+):", (tmp_path / "config.yaml").read_text(), flags=re.MULTILINE)
    assert "max_steps" in commented_out
    assert set(commented_out) <= TrainingConfig.model_fields.keys()


def test_an_empty_directory_is_taken(tmp_path):
    assert run(tmp_path).exit_code == 0


def test_a_directory_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    result = run(tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"{tmp_path}: found a directory that is not empty, expected nothing there. Choose a new directory.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_a_file_is_left_alone(tmp_path):
    (tmp_path / "file").touch()
    result = run(tmp_path / "file")
    assert result.exit_code == 2
    assert "found a file, expected nothing there" in result.stderr


def test_the_templates_are_part_of_the_package():
    assert (TEMPLATES / "gitignore").is_file()


@pytest.mark.slow
def test_the_projects_own_test_passes(tmp_path):
    run(tmp_path)
    result = run_warm(["-m", "pytest", "-q", "-W", "error"], cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
