"""`aetheria` itself: its help, its version, and how its commands end when something goes wrong."""

import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from aetheria import __version__
from aetheria.cli import app
from aetheria.cli._errors import errors_told, tracebacks_kept
from aetheria.errors import AetheriaError

COMMANDS = {
    "Train": ["train", "continue", "launch"],
    "Steer": [
        *("up", "down", "status", "watch", "set", "get", "knobs", "pause", "resume", "run-for", "stop", "rewind"),
        *("validate", "note", "health", "ping", "undo", "mcp"),
    ],
    "Look": ["journal", "replay", "runs", "show", "plot", "snapshot"],
    "Use": ["data", "predict", "export"],
    "Set up": ["init", "config", "plugins", "doctor"],
}


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_all_commands_in_groups(arguments):
    output = run(*arguments).output
    places = [output.index(f"─ {group} ─") for group in COMMANDS]
    assert places == sorted(places)
    for group, begin, end in zip(COMMANDS, places, [*places[1:], len(output)], strict=True):
        listed = [line.split()[1] for line in output[begin:end].splitlines() if line[:3] == "│ " + line[2:3] != "│  "]
        assert sorted(listed) == sorted(COMMANDS[group])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["snapshot", "ls", "--help"], ["--version"]])
def test_nothing_heavy_is_imported_for_help(arguments):
    heavy = {"torch", "numpy", "pyarrow", "matplotlib", "loguru", "sqlite3"}
    if len(arguments) == 1:
        heavy.add("pydantic")  # typer needs it for the arguments of a command
    code = (
        "import sys\nfrom aetheria.cli import main\n"
        f"sys.argv = {['aetheria', *arguments]}\n"
        f"try: main()\nexcept SystemExit: sys.exit(', '.join({heavy} & sys.modules.keys()) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_looking_at_runs_does_not_import_torch(tmp_path):
    code = (
        "import sys\nfrom aetheria.cli import app\n"
        "for command in ('runs', 'config schema', 'show nobody', 'snapshot ls nobody', 'plot nobody'):\n"
        "    try: app(command.split())\n"
        "    except SystemExit: assert 'torch' not in sys.modules, command"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_package_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "aetheria", "--version"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, f"aetheria {__version__}\n")


def test_a_command_that_is_not_there_is_answered_with_the_nearest():
    result = run("trian")
    assert result.exit_code == 2
    assert "Did you mean 'train'?" in result.stderr


# --- plugins ---------------------------------------------------------------------------------------------------------


def test_plugins_lists_names_with_a_line_about_each():
    lines = run("plugins").stdout.splitlines()
    assert "model" in lines
    assert any(line.split()[0] == "SimpleMLP" and len(line.split()) > 3 for line in lines)
    assert any(line.split()[0] == "cpu" for line in lines)


def test_plugins_refuses_a_folder_that_is_not_there(tmp_path):
    assert run("plugins", str(tmp_path / "nothing")).exit_code == 2


# --- errors ----------------------------------------------------------------------------------------------------------


def ending_with(error):
    """Returns how a command ends whose work raises an error."""
    commands = typer.Typer(pretty_exceptions_enable=False)

    @commands.command()
    @errors_told()
    def fail():
        with tracebacks_kept():
            raise error

    return CliRunner().invoke(commands, [])


def test_what_the_user_can_put_right_is_told_without_a_traceback():
    error = AetheriaError("found this, expected that.")
    error.add_note("Besides: it is late.")
    result = ending_with(error)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "found this, expected that.\nBesides: it is late.\n"


@pytest.mark.parametrize("error", [EOFError("half a file"), BrokenPipeError(32, "worker"), FileNotFoundError("data")])
def test_what_typer_would_hide_is_shown_with_its_traceback(error):
    result = ending_with(error)
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert f"{os.path.basename(__file__)}" in result.stderr
    assert result.stderr.rstrip().endswith(f"{type(error).__name__}: {error}")


def test_everything_else_passes_through():
    error = ZeroDivisionError("on purpose")
    assert ending_with(error).exception is error
