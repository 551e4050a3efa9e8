"""The example of a plain loop: with the line and without it the same training, and a real run folder beside it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.warm import run_warm

from aetheria.loom.reader import RunReader

SCRIPT = Path(__file__).parents[2] / "examples" / "plain_loop" / "train.py"


def start(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    (folder / "plain.py").write_text(source)
    return subprocess.run(
        [sys.executable, "plain.py"], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )


def shortened(source: str) -> str:
    """Returns the script with fewer steps, that says at its end which weights it has."""
    assert "range(1, 5001)" in source
    return source.replace("range(1, 5001)", "range(1, 201)").replace("% 500", "% 100") + (
        "\nimport hashlib\n"
        "content = b''.join(tensor.numpy().tobytes() for tensor in model.state_dict().values())\n"
        "print('digest', hashlib.sha256(content).hexdigest())\n"
    )


def test_the_line_changes_nothing_and_leaves_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shortened(SCRIPT.read_text())
    added = [line for line in source.splitlines() if re.search(r"\bWeavelet\b|\bweavelet\b", line)]
    assert len(added) == 2  # an import, and the line
    (tmp_path / "plain.py").write_text(source)
    with_it = run_warm(["plain.py"], cwd=tmp_path)
    assert with_it.returncode == 0, with_it.stderr
    exec("\n".join(line for line in source.splitlines() if line not in added), {"__name__": "__main__"})
    assert with_it.stdout == capsys.readouterr().out
    assert "digest" in with_it.stdout
    (run,) = (tmp_path / "runs").iterdir()
    content = json.loads((run / "run.json").read_text())
    assert (content["status"], content["global_step"]) == ("completed", 200)
    assert RunReader(run / "run.db").lives()


def test_a_script_that_raises_leaves_a_run_that_failed(tmp_path: Path) -> None:
    source = shortened(SCRIPT.read_text()).replace("    optimizer.step()\n", "    raise RuntimeError('of its own')\n")
    done = start(tmp_path, source)
    assert done.returncode == 1
    assert "of its own" in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
