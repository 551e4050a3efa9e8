"""`examples/text`, as its README says: prepared, trained on, killed, and continued on one rank and on two."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from tests.ranked import run_ranks
from tests.warm import WarmProcess, run_warm
from typer.testing import CliRunner

from aetheria import Orchestrator, TrainingConfig
from aetheria.cli import app
from aetheria.snapshot import list_snapshots

EXAMPLE = Path(__file__).parents[2] / "examples" / "text"
DEADLINE = 120.0
SMALL = (
    "max_steps=40", "model_params.layers=1", "model_params.width=16", "model_params.heads=2", "val_every_steps=null",
    "snapshots.every_steps=4", "callbacks=[]", "limit_val_batches=2", "model_params.schedule_steps=40",
)  # fmt: skip


def settings(home: Path) -> list[str]:
    return [*SMALL, f"data_params.train={home}/shards/train", f"data_params.val={home}/shards/val"]


def prepared(home: Path) -> None:
    found = run_warm([str(EXAMPLE / "topics.py"), str(home / "topics")])
    assert "topics" in found.stdout
    for part in ("train", "val"):
        words = ["data", "prepare", str(home / "topics" / part), "-o", str(home / "shards" / part), "--length", "129"]
        result = CliRunner().invoke(app, [*words, "--block-size", "8KiB", "--shard-size", "64KiB"])
        assert result.exit_code == 0, result.output
        assert CliRunner().invoke(app, ["data", "verify", str(home / "shards" / part)]).exit_code == 0


def trained(home: Path, runs: Path, resume: str | None = None) -> dict[str, object]:
    """Trains here, on as many ranks as there are."""
    overrides = [*settings(home), f"runs_dir={runs}", "live=off"]
    config = TrainingConfig.from_yaml(EXAMPLE / "config.yaml", overrides)
    orchestrator = Orchestrator.from_config(config)
    result = orchestrator.run(resume_from=resume)
    weights = {name: tensor.tolist() for name, tensor in orchestrator.model.state_dict().items()}
    return {"digest": result.digest, "step": result.global_step, "weights": weights}


def trained_by(home: str, runs: str, resume: str) -> dict[str, object]:
    return trained(Path(home), Path(runs), resume)


def test_killed_in_the_middle_of_an_epoch_it_goes_on_with_what_is_left(tmp_path: Path) -> None:
    prepared(tmp_path)
    whole = trained(tmp_path, tmp_path / "whole")
    overrides = [word for one in settings(tmp_path) for word in ("--set", one)]
    command = ["-m", "aetheria", "train", str(EXAMPLE / "config.yaml"), "--live", "off", *overrides]
    with WarmProcess([*command, "--set", f"runs_dir={tmp_path}/killed"]) as process:
        deadline = time.monotonic() + DEADLINE
        while not list((tmp_path / "killed").glob("*/snapshots/step-*8/manifest.json")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    (killed,) = (tmp_path / "killed").iterdir()
    left_off = list_snapshots(killed / "snapshots")[-1].manifest.step
    assert 8 <= left_off < 40
    shutil.copytree(killed, tmp_path / "two" / killed.name)

    alone = trained(tmp_path, tmp_path / "killed", str(killed))
    assert alone["digest"] == whole["digest"]

    first, second = run_ranks(2, trained_by, str(tmp_path), str(tmp_path / "two"), str(tmp_path / "two" / killed.name))
    assert first["digest"] == second["digest"]
    assert first["step"] == whole["step"] == 40
    for name, values in whole["weights"].items():  # type: ignore[attr-defined]
        torch.testing.assert_close(
            torch.tensor(first["weights"][name]), torch.tensor(values), rtol=1e-3, atol=1e-4, msg=name
        )
