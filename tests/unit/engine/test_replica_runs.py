"""A run that is one replica of several: its folder, and how it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aetheria.config import TrainingConfig
from aetheria.core import Accelerator, AetherModel, RunResult
from aetheria.engine.assembly import config_of_run
from aetheria.engine.live import devices_of
from aetheria.errors import ConfigError, RunFolderError
from aetheria.loom.hub_file import host_name
from aetheria.orchestrator import Orchestrator
from aetheria.registry import Registry
from aetheria.replay import replay_run


class Line(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(batch).square().mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder: Path, resume_from: Any = None, **values: Any) -> RunResult:
    given = {"max_steps": 3, "run_name": "pretrain", "replica_id": "a", "live": "off", "accelerator": "cpu"}
    config = TrainingConfig(runs_dir=folder / "runs", **(given | values))
    batches = torch.arange(16.0).reshape(8, 2).split(2)
    torch.manual_seed(0)
    return Orchestrator(Line(), list(batches), config).run(resume_from)


def test_it_has_the_folder_of_its_name(tmp_path: Path) -> None:
    result = train(tmp_path)
    assert (result.run_id, result.folder) == ("pretrain@a", tmp_path / "runs" / "pretrain@a")
    assert train(tmp_path, replica_id="b").run_id == "pretrain@b"
    with pytest.raises(
        RunFolderError, match=r"replica 'a' of pretrain has been trained, and is completed\. Go on with"
    ):
        train(tmp_path)
    assert train(tmp_path, replica_id=None).run_id.startswith("pretrain-2")


def test_auto_begins_it_and_goes_on_with_it(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"there is no pretrain@a in .* to resume"):
        train(tmp_path, "latest")
    first = train(tmp_path, "auto")
    train(tmp_path, "auto", replica_id="b")
    for resume_from in ("auto", "latest"):
        again = train(tmp_path, resume_from, max_steps=5)
        assert (again.folder, again.global_step) == (first.folder, 5)
    assert train(tmp_path / "whole", max_steps=5).digest == again.digest


def test_the_folder_of_another_one_is_refused(tmp_path: Path) -> None:
    first = train(tmp_path)
    with pytest.raises(ConfigError, match=r"found 'b' of pretrain, but .* is that of replica 'a' of pretrain"):
        train(tmp_path, first.folder, replica_id="b")
    alone = train(tmp_path, replica_id=None)
    with pytest.raises(ConfigError, match="is that of a run that is no replica"):
        train(tmp_path, alone.folder)
    assert train(tmp_path, first.folder, replica_id=None, max_steps=4).run_id == "pretrain@a"
    moved = first.folder.rename(tmp_path / "runs" / "elsewhere")
    assert train(tmp_path, moved, max_steps=5).run_id == "elsewhere"


def test_it_is_replayed_in_a_folder_of_its_own(tmp_path: Path) -> None:
    class Batches:
        def __init__(self) -> None:
            self.batches = torch.arange(16.0).reshape(8, 2).split(2)

    from aetheria.data import LoaderDataModule

    class Data(LoaderDataModule):
        def __init__(self) -> None:
            super().__init__(list(Batches().batches))

    Registry.register_model("line")(Line)
    Registry.register_data("line")(Data)
    names = {"model_name": "line", "data_name": "line", "run_name": "pretrain", "replica_id": "a", "live": "off"}
    config = TrainingConfig(max_steps=3, runs_dir=tmp_path / "runs", accelerator="cpu", **names)
    result = Orchestrator.from_config(config).run()
    replay = replay_run(result.folder)
    assert replay.equal
    assert replay.result.folder.parent.name == "replays"
    assert config_of_run(result.folder).replica_id == "a"


def test_the_devices_of_all_ranks_are_known() -> None:
    class Ranks(Accelerator):
        device = torch.device("cuda", 0)

        def gather(self, data: bytes) -> list[bytes]:
            host, _, device = data.decode().partition("\n")
            assert (host, device) == (host_name(), "cuda:0")
            return [data, f"{host}\ncuda:1".encode(), b"node-b\ncuda:0"]

    assert devices_of(object.__new__(Ranks)) == ["cuda:0", "cuda:1", "node-b/cuda:0"]
