"""Trainings of other frameworks, each in two processes of the framework's own, with a Weavelet whose commands are set.

python framework_ranks.py FOLDER lightning
torchrun --nproc-per-node 2 framework_ranks.py FOLDER transformers accelerate

Every rank writes what it has seen into FOLDER.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from aetheria import TrainingStopped, Weavelet, controllable
from aetheria.control import agreement
from aetheria.protocol import command_of
from scripted import ScriptedLine, set_, weights

STEPS, SNAPSHOT, END = 400, 30, 40
COMMANDS = {
    3: [set_(learning_rate=0.002), set_(sharpness=1.5)],
    8: [set_(learning_rate=-1.0), set_(sharpness=9.0), set_(sharpness=3.0)],
    12: [command_of("validate")],
    14: [command_of("pause")],
    SNAPSHOT: [command_of("snapshot")],
    END: [command_of("stop", {"snapshot": False}, author="ana")],
}
WHEN_PAUSED = [command_of("ping"), set_(weight_decay=0.01), command_of("resume")]


class Numbers(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.full((4,), index / 32.0).sin()
        return {"x": x, "labels": x.sum(-1, keepdim=True)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.sharpness = 2.0

    @controllable("sharpness", get="sharpness", gt=0.0, le=4.0)
    def set_sharpness(self, value: float) -> None:
        self.sharpness = value
        if value == 3.0 and torch.distributed.get_rank() == 1:
            raise RuntimeError("three is not to rank 1's taste")

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        return {"loss": ((out - labels).abs() ** self.sharpness).mean(), "logits": out}


def woven(folder: Path) -> tuple[Weavelet, ScriptedLine]:
    """Returns a Weavelet and its line; the commands come over the first rank's, and nothing over the others'."""
    agreement._INTERVAL = 0.01  # not half a second: these trainings are over by then
    line = ScriptedLine(COMMANDS, WHEN_PAUSED)
    line.weavelet = Weavelet(run="woven", runs_dir=folder / "runs", line=line)
    return line.weavelet, line


def train_lightning(folder: Path) -> dict[str, Any]:
    import lightning.pytorch as lightning

    from aetheria.integrations.lightning import attach_lightning

    class Model(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        @controllable("sharpness", gt=0.0, le=4.0)
        def set_sharpness(self, value: float) -> None:
            self.inner.set_sharpness(value)

        def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
            return self.inner(**batch)["loss"]  # type: ignore[no-any-return]

        def validation_step(self, batch: dict[str, Tensor], _index: int) -> None:
            self.log("val_loss", self.inner(**batch)["loss"], sync_dist=True)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=4, enable_checkpointing=False, num_sanity_val_steps=0,
        limit_val_batches=2, check_val_every_n_epoch=100, default_root_dir=folder, **silent,
    )  # fmt: skip
    weavelet, line = woven(folder)
    attach_lightning(trainer, weavelet=weavelet)
    model = Model()
    trainer.fit(model, DataLoader(Numbers(), batch_size=4, shuffle=True), DataLoader(Numbers(), batch_size=4))
    return report(weavelet, line, model.inner, trainer.optimizers[0]) | {"step": trainer.global_step}


def train_transformers(folder: Path) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    from aetheria.integrations.transformers import attach_transformers

    arguments = TrainingArguments(
        output_dir=str(folder / "output"), num_train_epochs=4, per_device_train_batch_size=4, learning_rate=0.01,
        lr_scheduler_type="constant", save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        ddp_backend="gloo", dataloader_pin_memory=False, optim="sgd", max_grad_norm=0.0, logging_steps=50,
    )  # fmt: skip
    few = torch.utils.data.Subset(Numbers(), range(8))
    trainer = Trainer(Net(), arguments, train_dataset=Numbers(), eval_dataset=few)
    weavelet, line = woven(folder)
    attach_transformers(trainer, weavelet=weavelet)
    trainer.train()
    return report(weavelet, line, trainer.model, trainer.optimizer) | {"step": trainer.state.global_step}


def train_accelerate(folder: Path) -> dict[str, Any]:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    weavelet, line = woven(folder)
    model: Any = Net()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(Numbers(), batch_size=4, shuffle=True)

    @weavelet.action("validate")
    def validate() -> dict[str, float]:
        return {"val_loss": 0.5}

    model, optimizer, loader = weavelet.prepare(accelerator, model, optimizer, loader)
    try:
        for _ in range(4):
            for batch in loader:
                loss = model(**batch)["loss"]
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.is_main_process and weavelet.global_step % 7 == 0:
                    with torch.no_grad():  # one process alone, between two steps
                        model(**batch)
    except TrainingStopped:
        pass
    weavelet.stop()
    return report(weavelet, line, accelerator.unwrap_model(model), optimizer) | {"step": weavelet.global_step}


def report(weavelet: Weavelet, line: ScriptedLine, net: nn.Module, optimizer: Any) -> dict[str, Any]:
    said = [each for each in line.told if each["as"] == "ack"]
    group = optimizer.param_groups[0]
    return {
        "outcomes": [(each["step"], each["command"], each["state"], each.get("message", "")) for each in said],
        "statuses": line.statuses,
        "weights": weights(net),
        "values": [group["lr"], group["weight_decay"], getattr(net, "sharpness", None)],
        "folder": str(weavelet.folder),
        "ranks": weavelet.world_size,
        "asked": {step: [command.id for command in commands] for step, commands in COMMANDS.items()},
        "asked_when_paused": [command.id for command in WHEN_PAUSED],
    }


def main(folder: Path, names: list[str]) -> None:
    trainings: dict[str, Callable[[Path], dict[str, Any]]] = {
        "lightning": train_lightning,
        "transformers": train_transformers,
        "accelerate": train_accelerate,
    }
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the frameworks' own
    for name in names:
        found = trainings[name](folder / name)
        rank = torch.distributed.get_rank()
        (folder / f"{name}-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
