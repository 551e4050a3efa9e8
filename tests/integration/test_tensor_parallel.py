"""Ranks that compute a layer together: the weights are those of one process. Real ranks, real gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.test_fsdp import Sender
from tests.integration.test_ranks import Data, assert_close
from tests.integration.test_ranks_steering import ScriptedLine
from tests.ranked import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import DataLoader

from aetheria import AetherModel, Orchestrator, TrainingConfig
from aetheria.accelerator import FSDPAccelerator
from aetheria.accelerator.select import create_accelerator
from aetheria.core.shards import as_part_of, cut_like, offsets_of, part_of, total_norm, whole
from aetheria.data import LoaderDataModule
from aetheria.engine.fingerprint import fingerprint
from aetheria.engine.health import check_health
from aetheria.plugins.callbacks.gradient_health import GradientHealth
from aetheria.plugins.callbacks.weight_averaging import ExponentialMovingAverage
from aetheria.snapshot import list_snapshots
from aetheria.snapshot.format import model_tensors
from aetheria.snapshot.writer import _in_host_memory

SAMPLES = 49  # the last of an epoch's windows has one: a share that has none goes through it all the same
TOGETHER: dict[str, Any] = {"accelerator": "fsdp", "accelerator_params": {"tensor_parallel": 2}}
WRAPPED: dict[str, Any] = {
    "accelerator": "fsdp",
    "accelerator_params": {"tensor_parallel": 2, "wrap": ["Linear"], "reshard_after_forward": False},
}
FSDP: dict[str, Any] = {"accelerator": "fsdp", "accelerator_params": {"wrap": ["Linear"]}}
ALONE: dict[str, Any] = {}
TOKENS = {"model": {"weighted": True}, "grad_accumulation_steps": 2}
CLIPPED = {
    "model": {"optimizer": "AdamW", "frozen": "last.bias"},
    "max_grad_norm": 0.1,
    "snapshots": {"every_steps": 3, "keep_last": 9},
}
LISTED = CLIPPED | {"listed": True}


class Model(AetherModel):
    """Some of its weights are cut by column, some by row, and some not at all; three rows are not shared evenly."""

    def __init__(self, weighted: bool = False, optimizer: str = "SGD", frozen: str = "", dropout: float = 0.0) -> None:
        super().__init__()
        self.weighted, self.optimizer = weighted, optimizer
        self.norm = nn.LayerNorm(5)
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Dropout(dropout), nn.Tanh())
        self.last = nn.Linear(7, 1)
        self.double()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name != frozen)

    def tensor_plan(self, ranks: int) -> dict[str, Any]:
        return {"layers.0": ColwiseParallel(), "layers.2": RowwiseParallel()}

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        features, target, tokens = batch
        losses = (self.last(self.layers(self.norm(features))).squeeze(1) - target).square()
        if not self.weighted:
            return {"loss": losses.mean(), "error": losses.detach().sqrt().mean()}
        weight = tokens.sum()
        return {"loss": (losses * tokens).sum() / weight, "weight": weight}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1, foreach=True)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def train(runs_dir: str, options: dict[str, Any]) -> dict[str, Any]:
    """Trains; from the beginning, or from a snapshot of others."""
    torch.manual_seed(0)
    model = Model(**options.pop("model", {}))
    resume, listed = options.pop("resume", None), options.pop("listed", False)
    config = TrainingConfig(
        **{"epochs": 1, "log_every": 1, "runs_dir": Path(runs_dir), "live": "off"} | options  # type: ignore[arg-type]
    )
    accelerator = create_accelerator(config)
    micro = 12 // config.grad_accumulation_steps // accelerator.data_ranks
    callbacks = [ExponentialMovingAverage(decay=0.9, validate=False), GradientHealth(every=2)]
    data: Any = Data(micro, SAMPLES)
    if listed:  # a loader that knows no position but the number of a batch
        data = LoaderDataModule(list(DataLoader(data.dataset, batch_size=micro)))
    result = Orchestrator(model, data, config, accelerator, callbacks=callbacks).run(resume)
    tensors = {name: whole(tensor).tolist() for name, tensor in model_tensors(model)[0].items()}
    return {"weights": tensors, "metrics": result.metrics, "step": result.global_step, "folder": str(result.folder),
            "digest": result.digest, "status": result.status}  # fmt: skip


def train_all(runs_dir: str, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: train(f"{runs_dir}/{name}", dict(options)) for name, options in cases.items()}


def on(ranks: int, runs_dir: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns what the first rank found, for each case, when all have found the same."""
    first, *others = run_ranks(ranks, train_all, str(runs_dir), cases)
    assert all(other == first for other in others)
    return dict(first)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("trained")
    return {
        1: on(1, folder / "1", {"tokens": TOKENS, "clipped": CLIPPED}),
        2: on(
            2,
            folder / "2",
            {"tokens": TOKENS | TOGETHER, "clipped": CLIPPED | WRAPPED, "fsdp": CLIPPED | FSDP,
             "listed": LISTED | TOGETHER},
        ),
        4: on(4, folder / "4", {"tokens": TOKENS | WRAPPED, "clipped": CLIPPED | TOGETHER}),
    }  # fmt: skip


def test_ranks_that_compute_together_train_what_one_process_trains(trained: dict[int, dict[str, Any]]) -> None:
    """Two that share a layer, and two times two; also where norms are clipped, and where a share has no sample."""
    for ranks in (2, 4):
        for case in ("tokens", "clipped"):
            assert_close(trained[ranks][case], trained[1][case])


@pytest.fixture(scope="module")
def continued(
    trained: dict[int, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("continued")

    def case(ranks: int, name: str, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
        key = f"{ranks} {name}, {'together' if options is TOGETHER else options.get('accelerator', 'alone')}"
        snapshots = list_snapshots(Path(trained[ranks][name]["folder"]) / "snapshots")
        (begun,) = [snapshot.path for snapshot in snapshots if snapshot.manifest.step == 3]  # of 5
        return {key: (LISTED if name == "listed" else CLIPPED) | options | {"resume": str(begun)}}

    return (
        on(4, folder, case(4, "clipped", TOGETHER) | case(1, "clipped", TOGETHER))
        | on(2, folder, case(4, "clipped", FSDP) | case(2, "fsdp", TOGETHER) | case(2, "listed", TOGETHER))
        | on(1, folder, case(4, "clipped", ALONE))
    )


def test_such_a_run_continues_anywhere(trained: dict[int, Any], continued: dict[str, dict[str, Any]]) -> None:
    """With as many ranks arranged alike, bit for bit; elsewhere with the same samples, and the optimiser's state."""
    assert len(continued) == 6
    for ranks, name in ((4, "clipped"), (2, "listed")):
        assert continued[f"{ranks} {name}, together"]["digest"] == trained[ranks][name]["digest"]
        assert continued[f"{ranks} {name}, together"]["metrics"] == trained[ranks][name]["metrics"]
    expected = trained[1]["clipped"]
    whole_run = list_snapshots(Path(expected["folder"]) / "snapshots")[-1].state()
    for name, result in continued.items():
        if "listed" in name:
            continue
        assert_close(result, expected)
        found = list_snapshots(Path(result["folder"]) / "snapshots")[-1].state()
        for index, values in whole_run["optimizer"]["state"].items():
            for key, value in values.items():
                torch.testing.assert_close(found["optimizer"]["state"][index][key], value, rtol=0, atol=1e-12, msg=name)
        for callback, state in whole_run["callbacks"].items():
            for key, value in (state["other"] if "Average" in callback else {}).items():
                torch.testing.assert_close(found["callbacks"][callback]["other"][key], value, rtol=0, atol=1e-12)


def test_a_snapshot_is_one_model(trained: dict[int, Any]) -> None:
    snapshot = list_snapshots(Path(trained[4]["clipped"]["folder"]) / "snapshots")[-1]
    snapshot.verify()
    names = set(snapshot.manifest.files)
    assert len([name for name in names if name.startswith("sharded/weights/")]) == 4
    consolidated = snapshot.weights()
    assert snapshot.digest() == trained[4]["clipped"]["digest"]
    del snapshot.manifest.files["model.safetensors"]
    for name, tensor in snapshot.weights().items():
        assert torch.equal(tensor, consolidated[name])


# --- what is cut twice -----------------------------------------------------------------------------------------------
def cut_twice() -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model()
    model.wide = nn.Sequential(nn.Linear(40, 250), nn.Linear(250, 38), nn.Linear(3, 9)).double()  # many rows of 251
    model.tensor_plan = lambda ranks: {"wide.0": ColwiseParallel(), "wide.1": RowwiseParallel()}  # type: ignore[method-assign]
    model.odd = nn.ParameterList([nn.Parameter(torch.randn(size)) for size in ((1,), (2, 300), (7, 5, 3), (0, 4))])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    accelerator = FSDPAccelerator(tensor_parallel=2)
    accelerator.setup(model)
    now = {name: parameter.detach() for name, parameter in model.named_parameters()}
    one = now["wide.0.weight"]
    gathered = {name: whole(tensor) for name, tensor in now.items()}
    shards = {name: accelerator.new_shard(tensor.shape, tensor.dtype) for name, tensor in before.items()}
    rows = {name: cut_like(tensor, shards[name]) for name, tensor in before.items()}
    cut = {name: cut_like(tensor, now[name]) for name, tensor in before.items()}
    recut = {name: cut_like(tensor, now[name]) for name, tensor in rows.items()}
    same = all(
        torch.equal(part_of(found[name]), part_of(tensor)) for found in (cut, recut) for name, tensor in now.items()
    )
    prints = [fingerprint(found) for found in (before, now, gathered)]
    norms = [float(total_norm(list(found.values()))) for found in (before, now)]
    # A snapshot of a CUDA device is copied into host memory, where its parts must say the same of where they lie.
    on_device = type(one.device_mesh)("cuda", one.device_mesh.mesh, _init_backend=False)  # type: ignore[attr-defined]
    copied: Any = as_part_of(one, part_of(one), _in_host_memory(on_device))
    if accelerator.rank == 1:
        part_of(now["norm.weight"]).add_(1.0)  # of which the rank that computes with it has the same part
    drifted = fingerprint(now)
    return {
        "placements": [str(placement) for placement in one.placements],
        "equal": all(torch.equal(before[name], tensor) for name, tensor in gathered.items()),
        "same": same,
        "prints": prints,
        "drifted": drifted,
        "norms": norms,
        "copied": copied.device_mesh.device_type == "cpu" and offsets_of(copied) == offsets_of(one),
        "offsets": offsets_of(one),
    }


def test_weights_that_are_cut_twice_are_put_together_again() -> None:
    found = run_ranks(4, cut_twice)
    for each in found:
        assert each["placements"] == ["_S(0, 2)", "S(0)"], "rows that are not next to one another"
        assert each["equal"]
        assert each["same"]
        assert each["copied"]
        assert len(set(each["prints"])) == 1
        assert each["norms"][1] == pytest.approx(each["norms"][0], rel=1e-6)
    assert [each["offsets"] for each in found] == [(0, 0), (125, 0), (63, 0), (188, 0)]
    assert len({each["drifted"] for each in found}) == 2, "ranks of which each has the whole have drifted apart"


# --- while it trains -------------------------------------------------------------------------------------------------
COMMANDS = {
    2: [("set", {"values": {"learning_rate": 0.02}}), ("snapshot", {"pinned": True})],
    5: [("set", {"values": {"frozen": ["layers.0.*"]}}), ("health", {"check": "numerics"}), ("validate", {})],
    7: [("set", {"values": {"optimizer": {"name": "adamw", "params": {"lr": 0.001}}}})],
    8: [("rewind", {"step": 4})],
    9: [("set", {"values": {"frozen": []}})],
    10: [("health", {"check": check}) for check in ("ranks", "determinism", "activations", "throughput")],
}


class Commands(Sender):
    def __init__(self, line: ScriptedLine) -> None:
        super().__init__(line)
        self.left = dict(COMMANDS)


class Poisoned(Model):
    """Its loss is NaN on one rank, at one step; its dropout acts on what all of a group have whole."""

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        outputs = super().training_step(batch)
        self.calls = getattr(self, "calls", 0) + self.training
        if self.calls == 3 and torch.distributed.get_rank() == 3:
            outputs["loss"] = outputs["loss"] * float("nan")
        return outputs


def steered(runs_dir: str) -> dict[str, Any]:
    torch.manual_seed(0)
    line = ScriptedLine()
    config = TrainingConfig(
        epochs=3, log_every=1, runs_dir=Path(runs_dir), live="off", snapshots={"every_steps": 4, "keep_last": 99},
        **TOGETHER,
    )  # fmt: skip
    data = Data(6, SAMPLES)
    run = Orchestrator(Poisoned(optimizer="AdamW", dropout=0.5), data, config, callbacks=[Commands(line)], line=line)
    outcomes: list[Any] = []
    told = run._note_outcome

    def note(command: Any, outcome: Any) -> None:
        outcomes.append((outcome.step, outcome.state, outcome.message, outcome.result.get("healthy")))
        told(command, outcome)

    run._note_outcome = note  # type: ignore[method-assign]
    result = run.run()
    healthy = check_health("ranks", run)
    return {"outcomes": outcomes, "step": result.global_step, "digest": result.digest, "healthy": healthy["healthy"]}


def test_they_are_steered_and_guarded_alike(tmp_path: Path) -> None:
    first, *others = run_ranks(4, steered, str(tmp_path))
    assert all(other == first for other in others)
    states = [state for _, state, _, _ in first["outcomes"] if state != "accepted"]
    assert states == ["applied"] * sum(map(len, COMMANDS.values())), first["outcomes"]
    assert all(healthy is not False for *_, healthy in first["outcomes"]), first["outcomes"]
    assert first["healthy"]
    assert first["step"] == 3 * 5 - 1, "one window was dropped, before the step that is gone back to"
