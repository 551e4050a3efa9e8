"""A Lightning training, steered through a real hub and a real sidecar: the whole way, once."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Lightning's, about the packages that it imports
    lightning = pytest.importorskip("lightning.pytorch", reason="needs: pip install 'aetheria[lightning]'")

from aetheria.client import Hub, Run, connect
from aetheria.errors import RunFolderError
from aetheria.integrations.lightning import attach_lightning
from hub_cases import running_hub, wait_for


class Model(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def validation_step(self, batch: list[Tensor], _index: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def steer(hub: Hub) -> int:
    """Gives one command after the other, each when the one before has taken effect; returns the step of the stop."""

    def run_with_knobs() -> Run | None:
        try:
            run = hub.run("endless")
        except RunFolderError:
            return None
        return run if "learning_rate" in run.knobs else None

    run = wait_for(run_with_knobs, "the run and its knobs", 60.0)
    assert run is not None
    applied = run.set(learning_rate=0.01, reason="plateau")
    assert (applied.state, applied.result["after"]) == ("applied", {"learning_rate": 0.01})
    assert run.knobs["learning_rate"] == 0.01
    paused = run.pause()
    ping = run.ping()
    assert (ping.message, ping.step) == ("paused", paused.step)
    run.resume()
    validated = run.validate()
    wait_for(lambda: run.metrics("val_loss")[0].size, "what the validation found")
    assert run.metrics("val_loss")[0].tolist() == [validated.step]
    assert Path(run.snapshot().result["path"]).is_file()
    step: int = run.stop(snapshot=False, reason="enough").step
    return step


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
def test_a_lightning_training_is_steered_through_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"max_epochs": -1, "check_val_every_n_epoch": 1_000_000, "num_sanity_val_steps": 0}
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", enable_model_summary=False, **settings, **silent)
    callback = attach_lightning(trainer, run="endless", runs_dir=tmp_path / "runs")
    loader = DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=4)

    def operator(hub: Hub) -> int:
        try:
            return steer(hub)
        finally:
            trainer.should_stop = True  # whatever failed: the training below must end

    with running_hub(tmp_path / "home") as process, connect(process.url, process.operator) as hub:
        monkeypatch.setenv("AETHERIA_HOME", str(process.home))  # where the sidecar looks for the hub
        with ThreadPoolExecutor(1) as threads:
            stopped_at = threads.submit(operator, hub)
            trainer.fit(Model(), loader, loader)
            assert stopped_at.result(60) == trainer.global_step
        run = hub.run("endless")
        wait_for(lambda: run.status.status == "stopped", "the hub to know that it has ended")
        assert run.metrics("loss")[0].size
        assert [entry.outcome.state for entry in run.journal][-1] == "applied"
        assert callback.weavelet is not None
        assert callback.weavelet.run_id == run.id
