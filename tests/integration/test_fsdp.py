"""Ranks that share one model: the weights are those of one process, and continue anywhere. Real ranks, real gloo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.integration.test_ranks import TOKENS, Data, Model, assert_close, results_of
from tests.integration.test_ranks_steering import ScriptedLine
from tests.ranked import run_ranks
from torch import Tensor, nn

from aetheria import Callback, Orchestrator, TrainingConfig
from aetheria.accelerator import FSDPAccelerator
from aetheria.core.shards import whole
from aetheria.engine.fingerprint import fingerprint
from aetheria.errors import AetheriaError, SnapshotDamagedError
from aetheria.plugins.callbacks.weight_averaging import ExponentialMovingAverage
from aetheria.protocol import command_of
from aetheria.runs import find_runs
from aetheria.snapshot import Snapshot, list_snapshots, weights_digest

FSDP: dict[str, Any] = {"accelerator": "fsdp"}
WRAPPED: dict[str, Any] = FSDP | {"accelerator_params": {"wrap": ["Linear"]}}


def test_sharded_ranks_train_what_one_process_trains(tmp_path: Path) -> None:
    """Also where a rank has nothing in a window, where nothing of a micro-batch counts, and where norms are clipped."""
    options = [TOKENS | {"epochs": 1}, {"max_grad_norm": 0.1, "epochs": 1}]
    expected = results_of(1, tmp_path / "one", [(12, 1, option) for option in options])
    for ranks, splits in {2: [(3, 2)], 3: [(4, 1)], 4: [(1, 3)]}.items():
        cases = [(*split, option | WRAPPED) for split in splits for option in options]
        for number, result in enumerate(results_of(ranks, tmp_path / str(ranks), cases)):
            assert_close(result, expected[number % len(options)])


def test_precision_and_groups_change_nothing_that_they_should_not(tmp_path: Path) -> None:
    grouped, whole, kept = results_of(
        2,
        tmp_path,
        [
            (6, 1, WRAPPED),
            (6, 1, FSDP),
            (6, 1, FSDP | {"accelerator_params": {"wrap": ["Linear"], "reshard_after_forward": False}}),
        ],
    )
    assert grouped["digest"] == whole["digest"] == kept["digest"]


def fingerprints() -> tuple[str, str, str]:
    torch.manual_seed(0)
    model = Model()
    odd = nn.ParameterList([nn.Parameter(torch.randn(size)) for size in ((1,), (2, 300), (7, 5, 3), (0, 4))])
    model.add_module("odd", odd)
    before = fingerprint(dict(model.named_parameters()))
    accelerator = FSDPAccelerator()
    accelerator.setup(model)
    sharded = dict(model.named_parameters())
    return before, fingerprint(sharded), fingerprint({name: whole(tensor) for name, tensor in sharded.items()})


def test_sharded_weights_have_the_fingerprint_of_the_whole_ones() -> None:
    for before, sharded, gathered in run_ranks(3, fingerprints):
        assert before == sharded == gathered


# --- snapshots -------------------------------------------------------------------------------------------------------
class Stop(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        if self.context.global_step == self.at:
            self.context.request_stop("for now")


class Adam(Model):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def go(runs_dir: str, micro: int, options: dict[str, Any]) -> dict[str, Any]:
    """Trains; stops early, or goes on with what others have begun."""
    torch.manual_seed(0)
    at, resume = options.pop("stop", None), options.pop("resume", None)
    config = TrainingConfig(
        **{"epochs": 3, "log_every": 1, "runs_dir": Path(runs_dir), "live": "off", "max_grad_norm": 0.5} | options
    )
    average = ExponentialMovingAverage(decay=0.9, validate=False)  # it holds copies of the weights
    callbacks = [average] if at is None else [average, Stop(at)]
    result = Orchestrator(Adam(), Data(micro), config, callbacks=callbacks).run(resume)
    return {"folder": str(result.folder), "step": result.global_step, "digest": result.digest}


def on(ranks: int, runs_dir: Path, options: dict[str, Any]) -> dict[str, Any]:
    found = run_ranks(ranks, go, str(runs_dir), 12 // ranks, options)
    assert len({str(each) for each in found}) == 1
    return dict(found[0])


DDP: dict[str, Any] = {"accelerator": "auto"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    cases = {(1, "auto"): DDP, (3, "fsdp"): WRAPPED, (2, "auto"): DDP}
    return {case: on(case[0], folder / f"{case}", options) for case, options in cases.items()}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((3, WRAPPED), (3, WRAPPED)),
        ((3, WRAPPED), (1, DDP)),
        ((1, DDP), (3, WRAPPED)),
        ((3, WRAPPED), (2, DDP)),
    ],
)
def test_a_sharded_run_continues_anywhere(
    tmp_path: Path, uninterrupted: dict[Any, Any], before: tuple[int, Any], after: tuple[int, Any]
) -> None:
    """On as many ranks with the same accelerator, bit for bit; elsewhere, with the same samples."""
    stopped = on(before[0], tmp_path, before[1] | {"stop": 6})
    ended = on(after[0], tmp_path, after[1] | {"resume": stopped["folder"]})
    expected = uninterrupted[after[0], after[1]["accelerator"]]
    assert ended["step"] == expected["step"]
    ours, theirs = (list_snapshots(Path(each["folder"]) / "snapshots")[-1] for each in (ended, expected))
    if before == after:
        assert ended["digest"] == expected["digest"]
    for name, tensor in theirs.weights().items():
        torch.testing.assert_close(ours.weights()[name], tensor, rtol=0, atol=1e-12)
    for index, values in theirs.state()["optimizer"]["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(ours.state()["optimizer"]["state"][index][name], value, rtol=0, atol=1e-12)
    averages = [
        next(state["other"] for name, state in snapshot.state()["callbacks"].items() if "Average" in name)
        for snapshot in (ours, theirs)
    ]
    for name, tensor in averages[1].items():
        torch.testing.assert_close(averages[0][name], tensor, rtol=0, atol=1e-12)


def test_every_rank_writes_its_part_and_no_pickle(tmp_path: Path) -> None:
    run = on(2, tmp_path, WRAPPED | {"snapshots": {"every_steps": 4, "keep_last": 9}})
    *earlier, last = list_snapshots(Path(run["folder"]) / "snapshots")
    assert earlier
    for snapshot in (*earlier, last):
        snapshot.verify()
        names = set(snapshot.manifest.files)
        assert len([name for name in names if name.startswith("sharded/weights/")]) == 2
        assert len([name for name in names if name.startswith("sharded/state/")]) == 2
        assert ("model.safetensors" in names) == (snapshot is last)
        there = {str(path.relative_to(snapshot.path)) for path in snapshot.path.rglob("*") if path.is_file()}
        assert there == names | {"manifest.json"}
        assert {Path(name).suffix for name in there} <= {".safetensors", ".pt", ".json"}
        assert snapshot.digest() == snapshot.manifest.digest
    assert last.manifest.digest == run["digest"]
    last.write_weights(tmp_path / "copied")
    earlier[-1].write_weights(tmp_path / "streamed")
    streamed = safetensors.torch.load_file(tmp_path / "streamed")
    assert weights_digest(streamed) == earlier[-1].manifest.digest
    consolidated = safetensors.torch.load_file(last.path / "model.safetensors")
    assert (tmp_path / "copied").read_bytes() == (last.path / "model.safetensors").read_bytes()
    (last.path / "model.safetensors").rename(tmp_path / "elsewhere")
    last.manifest.files.pop("model.safetensors")
    for name, tensor in last.weights().items():
        assert torch.equal(tensor, consolidated[name])


def test_a_missing_part_is_missed(tmp_path: Path) -> None:
    run = on(2, tmp_path, WRAPPED | {"stop": 3})
    snapshot = list_snapshots(Path(run["folder"]) / "snapshots")[-1]
    part = next(name for name in snapshot.manifest.files if name.startswith("sharded/state/shard-00002"))
    (snapshot.path / part).unlink()
    with pytest.raises(SnapshotDamagedError, match=f"{part} is missing"):
        Snapshot(snapshot.path).verify()


class Large(Adam):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(250, 250).double()  # with the optimiser's state, 1.5 MB in a snapshot


class Touched(Large):
    def training_step(self, batch: Any) -> dict[str, Tensor]:
        outputs = super().training_step(batch)
        outputs["loss"] = outputs["loss"] + self.unused(outputs["loss"].new_ones(250)).mean()
        return outputs


def fill_the_disk(runs_dir: str) -> str:
    config = TrainingConfig(
        epochs=3, log_every=1, runs_dir=Path(runs_dir), live="off", accelerator="fsdp",
        snapshots={"every_steps": 2, "keep_last": 99},
    )  # fmt: skip
    try:
        Orchestrator(Touched(), Data(6), config).run()
    except AetheriaError as error:
        return str(error)
    return "trained"


def test_a_full_disk_ends_all_ranks_with_a_word_and_the_snapshots_before_stay(small_disk: Path) -> None:
    """Five snapshots fit on it, at the most."""
    for said in run_ranks(2, fill_the_disk, str(small_disk / "runs")):
        assert "No space left" in said
    (run,) = find_runs(small_disk / "runs")
    assert run.read()["status"] == "failed"
    assert not list(run.snapshots.glob(".*")), "what was half-written is gone"
    snapshots = list_snapshots(run.snapshots)
    assert len(snapshots) >= 2
    for snapshot in snapshots:
        snapshot.verify()


# --- steering --------------------------------------------------------------------------------------------------------
COMMANDS = {
    2: [("set", {"values": {"learning_rate": 0.02}}), ("snapshot", {"pinned": True})],
    5: [("set", {"values": {"frozen": ["layers.0.*"]}}), ("health", {"check": "numerics"}), ("validate", {})],
    8: [("rewind", {"step": 4})],
    9: [("set", {"values": {"frozen": []}}), ("health", {"check": "ranks"}), ("health", {"check": "determinism"})],
}


class Sender(Callback):
    critical = True

    def __init__(self, line: ScriptedLine) -> None:
        self.line = line
        self.left = dict(COMMANDS)

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        commands = self.left.pop(self.context.global_step, [])
        if self.context.accelerator.is_main_process:
            self.line.put(*(command_of(name, arguments) for name, arguments in commands))


def steered(runs_dir: str, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    line = ScriptedLine()
    config = TrainingConfig(
        **{"epochs": 12, "log_every": 1, "runs_dir": Path(runs_dir), "live": "off"}
        | {"snapshots": {"every_steps": 4, "keep_last": 99}}
        | options
    )
    run = Orchestrator(Adam(), Data(6), config, callbacks=[Sender(line)], line=line)
    outcomes: list[Any] = []
    told = run._note_outcome

    def note(command: Any, outcome: Any) -> None:
        outcomes.append((outcome.step, outcome.state, outcome.message, outcome.result.get("healthy")))
        told(command, outcome)

    run._note_outcome = note  # type: ignore[method-assign]
    result = run.run()
    return {"outcomes": outcomes, "step": result.global_step, "digest": result.digest}


def test_sharded_ranks_are_steered_and_rewound_alike(tmp_path: Path) -> None:
    first, second = run_ranks(2, steered, str(tmp_path), WRAPPED)
    assert first == second
    states = [state for _, state, _, _ in first["outcomes"] if state != "accepted"]
    assert states == ["applied"] * sum(map(len, COMMANDS.values())), first["outcomes"]
    assert all(healthy is not False for *_, healthy in first["outcomes"])


# --- what cannot be --------------------------------------------------------------------------------------------------
class Scalar(Model):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))


class Tied(Model):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
        self.second[0].weight = self.first[0].weight


class Frozen(Model):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


def refused(model: str, options: dict[str, Any], runs_dir: str) -> str:
    config = TrainingConfig(epochs=1, runs_dir=Path(runs_dir), live="off", accelerator="fsdp", **options)
    try:
        Orchestrator({"Model": Model, "Scalar": Scalar, "Tied": Tied, "Frozen": Frozen}[model](), Data(6), config).run()
    except AetheriaError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("Scalar", {}, "scale has none. Give it the shape [1]"),
        ("Tied", {"accelerator_params": {"wrap": ["Linear"]}}, "first.0.weight and second.0.weight are one parameter"),
        ("Frozen", {}, "no parameter of the model requires a gradient"),
        ("Model", {"accelerator_params": {"wrap": ["Blck"]}}, "no module of the model is a Blck. There are: Linear"),
        ("Model", {"precision": "fp16"}, "Write precision: bf16, or accelerator: ddp"),
        ("Model", {"accelerator_params": {"cpu_offload": True}}, "in host memory already"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tmp_path: Path, model: str, options: dict[str, Any], words: str) -> None:
    for said in run_ranks(2, refused, model, options, str(tmp_path)):
        assert words in said


# --- buffers ---------------------------------------------------------------------------------------------------------
class Projected(Model):
    """With buffers that whoever built it has drawn, of a kind that is rare."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(5, 5, dtype=torch.float64))
        self.register_buffer("phases", torch.randn(3, dtype=torch.complex64))

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        features, target, tokens = batch
        return super().training_step((features @ self.projection * self.phases.abs().sum().double(), target, tokens))


def with_buffers(runs_dir: str) -> tuple[list[Any], str, str]:
    found: list[Any] = []

    class Looks(Callback):
        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            found.append(self.context.model.projection.tolist())

    torch.manual_seed(int(os.environ["RANK"]))  # as if unseeded: each rank has drawn something else
    config = TrainingConfig(max_steps=2, val_interval=None, runs_dir=Path(runs_dir), live="off", **FSDP)
    result = Orchestrator(Projected(), Data(6), config, callbacks=[Looks()]).run()
    return found, result.digest, str(result.folder)


def test_buffers_are_those_of_the_first_rank_and_may_be_complex(tmp_path: Path) -> None:
    (ours, digest, folder), (theirs, other, _) = run_ranks(2, with_buffers, str(tmp_path))
    assert len(ours) == 2
    assert ours == theirs
    assert digest == other
    newest = list_snapshots(Path(folder) / "snapshots")[-1]
    newest.verify()
    assert newest.manifest.digest == digest == weights_digest(newest.weights())
    whole = safetensors.torch.load_file(newest.path / "model.safetensors")
    assert whole["phases"].dtype == torch.complex64
    assert whole["projection"].tolist() == ours[-1]
