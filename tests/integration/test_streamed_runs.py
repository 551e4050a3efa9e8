"""Runs that train on shards: steered in what they read, killed, continued on other ranks, replayed."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.integration.test_steering import Script, ScriptedLine, outcomes, set_
from tests.ranked import run_ranks
from torch import Tensor, nn

from aetheria import AetherModel, Callback, Orchestrator, TrainingConfig
from aetheria.core import RunResult
from aetheria.core.shards import whole
from aetheria.data import Shards, StreamingDataset, verify, write_selection, write_shards
from aetheria.errors import ConfigError, DataError
from aetheria.loom.reader import RunReader
from aetheria.plugins.data.sharded import ShardedDataModule
from aetheria.registry import Registry
from aetheria.replay import replay_run
from aetheria.snapshot.format import model_tensors

FEATURES = 5
STREAMS = {"web": (400, 0), "books": (150, 10_000)}


class Model(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = (self.layers(batch["x"]).squeeze(1) - batch["x"].sum(1).sin()).square()
        return {"loss": losses.mean(), "from_books": (batch["number"] >= 10_000).double().mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Data(ShardedDataModule):
    def transform(self) -> dict[str, Any]:
        return {"transform": shaken}


def shaken(sample: dict[str, Any]) -> dict[str, Any]:
    """Draws, as an augmentation does."""
    return sample | {"x": torch.as_tensor(sample["x"]) + 0.01 * torch.randn(FEATURES, dtype=torch.float64)}


@pytest.fixture(autouse=True)
def _registered() -> None:
    Registry.register_model("of shards")(Model)
    Registry.register_data("of shards")(Data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for uid, (name, (count, first)) in enumerate(STREAMS.items(), 1):
        folder = tmp_path_factory.mktemp(name)
        generator = np.random.default_rng(uid)
        samples = [{"number": first + number, "x": generator.normal(size=FEATURES)} for number in range(count)]
        write_shards(samples, folder, block_bytes=1000, shard_bytes=6000, uid=uid)
        write_selection(folder, "some", Shards(folder).sample_ids(np.arange(0, count, 2)))
        found[name] = str(folder)
    return found


def options(folders: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"train": folders, "lanes": 4, "window": 16, "horizon": 60} | more


def config(runs: Path, data: dict[str, Any], **more: Any) -> TrainingConfig:
    given: dict[str, Any] = {"snapshots": {"every_steps": 5, "keep_last": 20}, "batch_size": 12, "epochs": 2}
    return TrainingConfig(
        **given | more,
        runs_dir=runs,
        model_name="of shards",
        data_name="of shards",
        data_params=data,
        log_every=1,
        live="off",
    )


def trained(
    settings: TrainingConfig, script: dict[int, Any] | None = None, die_at: int | None = None, resume: Any = None
) -> RunResult | Path:
    line = ScriptedLine()
    plain = Orchestrator.from_config(settings)
    callbacks = [Script(line, script or {}, die_at)]
    orchestrator = Orchestrator(plain.model, plain.data, settings, callbacks=callbacks, line=line)
    try:
        return orchestrator.run(resume_from=resume)
    except KeyboardInterrupt:
        return orchestrator.folder


def shares(result: RunResult) -> dict[int, float]:
    curve = RunReader(result.folder / "run.db").metric("from_books")
    return dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_what_is_read_is_changed_killed_continued_and_replayed(
    tmp_path: Path, folders: dict[str, str], seed: int
) -> None:
    generator = random.Random(seed)
    script = {
        3: [set_(data_weights={"web": 0.25, "books": 0.75})],
        generator.randint(4, 30): [set_(data_selection="web:some")],
        generator.randint(31, 60): [set_(data_weights={"web": 1, "books": 1}), set_(data_selection=None)],
    }
    settings = config(tmp_path / "whole", options(folders), max_steps=75, epochs=None)
    result = trained(settings, script)
    assert isinstance(result, RunResult)
    replayed = replay_run(result.folder)
    assert replayed.equal, replayed.differs_at
    die_at = generator.randint(6, 70)
    folder = trained(config(tmp_path / "killed", options(folders), max_steps=75, epochs=None), script, die_at)
    assert isinstance(folder, Path)
    done = {command for command, states in outcomes(folder).items() if states[-1].is_final}
    late = {
        step: [command for command in commands if command.id not in done]
        for step, commands in script.items()
        if step >= die_at
    }
    settings = TrainingConfig.from_resolved(
        config(tmp_path / "killed", options(folders), max_steps=75, epochs=None).resolved(), None
    )
    continued = trained(settings, late, resume=folder)
    assert isinstance(continued, RunResult)
    assert continued.digest == result.digest


def test_a_change_takes_effect_behind_the_horizon_at_a_known_step(tmp_path: Path, folders: dict[str, str]) -> None:
    command = set_("more books", data_weights={"web": 0, "books": 3})
    result = trained(config(tmp_path, options(folders), max_steps=30, epochs=None), {7: [command]})
    assert isinstance(result, RunResult)
    applied = outcomes(result.folder)[command.id][-1]
    assert (applied.state, applied.step) == ("applied", 7)
    assert applied.result["after"] == {"data_weights": {"web": 0.0, "books": 1.0}}
    assert "place 144" in str(applied)  # 7 steps of 12, and the horizon of 60
    found = shares(result)
    assert max(found[step] for step in range(1, 13)) < 0.5
    assert {found[step] for step in range(13, 31)} == {1.0}


def test_what_cannot_be_read_is_refused_and_the_run_goes_on(tmp_path: Path, folders: dict[str, str]) -> None:
    commands = [
        set_(data_weights={"web": 1.0}),
        set_(data_weights={"web": -1.0, "books": 1.0}),
        set_(data_selection="some"),
        set_(data_selection="web:others"),
    ]
    result = trained(config(tmp_path, options(folders), max_steps=10, epochs=None), {3: commands})
    assert isinstance(result, RunResult)
    found = [outcomes(result.folder)[command.id][-1] for command in commands]
    assert {outcome.state for outcome in found} == {"failed"}
    for outcome, word in zip(found, ("books", "0 or more", "say which one", "others"), strict=True):
        assert word in str(outcome)
    assert result.global_step == 10


def test_a_selection_makes_epochs_shorter(tmp_path: Path, folders: dict[str, str]) -> None:
    data = options({"web": folders["web"]}, selection="some")
    result = trained(config(tmp_path, data, epochs=3))
    assert isinstance(result, RunResult)
    assert result.global_step == 3 * 17  # 200 samples in batches of 12


# --- ranks -----------------------------------------------------------------------------------------------------------


def on_ranks(runs: str, data: dict[str, Any], micro: int, stop_at: int, resume: str | None) -> dict[str, Any]:
    class Stop(Callback):
        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            if self.context.global_step == stop_at:
                self.context.request_stop("for now")

    model = Model()
    settings = TrainingConfig(epochs=2, log_every=1, runs_dir=Path(runs), live="off")
    result = Orchestrator(model, Data(batch_size=micro, **data), settings, callbacks=[Stop()]).run(resume)
    tensors = {name: whole(tensor).tolist() for name, tensor in model_tensors(model)[0].items()}
    return {"weights": tensors, "step": result.global_step, "folder": str(result.folder), "status": result.status}


@pytest.mark.parametrize("mixed", [False, True])
def test_any_number_of_ranks_goes_on_with_the_same_samples(
    tmp_path: Path, folders: dict[str, str], mixed: bool
) -> None:
    data = options(folders if mixed else {"web": folders["web"]})
    (alone,) = run_ranks(1, on_ranks, str(tmp_path / "alone"), data, 12, 1000, None)
    for number, (before, after) in enumerate([(2, 3), (1, 2)]):
        runs = str(tmp_path / str(number))
        stopped = run_ranks(before, on_ranks, runs, data, 12 // before, 40, None)
        assert len({each["step"] for each in stopped}) == 1
        for found in run_ranks(after, on_ranks, runs, data, 12 // after, 1000, stopped[0]["folder"]):
            assert found["step"] == alone["step"]
            for name, values in alone["weights"].items():
                torch.testing.assert_close(
                    torch.tensor(found["weights"][name]), torch.tensor(values), rtol=0, atol=1e-12
                )


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    samples = [{"number": number, "x": np.full(FEATURES, 0.1 * number)} for number in range(100)]
    write_shards(samples, data, block_bytes=1000, shard_bytes=3000, uid=1)
    path = data / "shards" / "shard-00000001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)
    return data


def test_damage_ends_a_run_or_is_told(tmp_path: Path, damaged: Path) -> None:
    data = damaged
    (lost,) = verify(data)
    single = {"train": str(data), "lanes": 4, "window": 8}
    with pytest.raises(DataError, match="shard-00000001"):
        trained(config(tmp_path / "strict", single, epochs=1))
    result = trained(config(tmp_path / "lenient", single | {"damaged": "quarantine"}, epochs=1))
    assert isinstance(result, RunResult)
    assert result.status == "completed"
    told = [event.message for event in RunReader(result.folder / "run.db").events() if event.kind == "data"]
    assert told
    assert all("shard-00000001" in message for message in told)
    assert sum(int(message.split()[0]) for message in told) == lost.rows
    assert StreamingDataset(data).streams.plan.length == 100


def test_what_one_rank_cannot_read_leaves_the_ranks_together(tmp_path: Path, damaged: Path) -> None:
    data = {"train": str(damaged), "lanes": 4, "window": 8, "damaged": "quarantine"}
    first, second = run_ranks(2, on_ranks, str(tmp_path / "runs"), data, 6, 1000, None)
    assert first["weights"] == second["weights"]
    assert first["step"] == second["step"] == 2 * 9
    assert first["status"] == "completed"


# --- a curriculum ----------------------------------------------------------------------------------------------------


def test_a_curriculum_is_gone_through_and_continued(tmp_path: Path, folders: dict[str, str]) -> None:
    stages = [
        {"from_step": 5, "weights": {"web": 0, "books": 1}},
        {"from_epoch": 1, "weights": {"web": 1, "books": 0}, "selection": "web:some"},
    ]
    more: dict[str, Any] = {"callbacks": [{"Curriculum": {"stages": stages}}]}
    result = trained(config(tmp_path / "whole", options(folders), **more))
    assert isinstance(result, RunResult)
    found = shares(result)  # 46 steps an epoch; the horizon is 5 steps
    assert max(found[step] for step in range(1, 11)) < 0.5
    assert {found[step] for step in range(11, 52)} == {1.0}
    assert {share for step, share in found.items() if step >= 52} == {0.0}
    assert replay_run(result.folder).equal
    for die_at in (7, 47, 50):
        folder = trained(config(tmp_path / str(die_at), options(folders), **more), die_at=die_at)
        settings = TrainingConfig.from_resolved(config(tmp_path, options(folders), **more).resolved(), None)
        continued = trained(settings, resume=folder)
        assert isinstance(continued, RunResult)
        assert continued.digest == result.digest


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"weights": {"web": 1}}, "give one of them"),
        ({"from_step": 0, "weights": {"web": 1}}, "1 or later"),
        ({"from_step": 3}, "changes nothing"),
        ({"from_step": 3, "weight": {}}, "weight"),
    ],
)
def test_a_stage_that_says_nothing_is_refused(
    tmp_path: Path, folders: dict[str, str], stage: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(config(tmp_path, options(folders), callbacks=[{"Curriculum": {"stages": [stage]}}]))


# --- processes that die ----------------------------------------------------------------------------------------------


class Deadly(ShardedDataModule):
    """Its worker dies of sample 77."""

    def transform(self) -> dict[str, Any]:
        return {"transform": dies}


def dies(sample: dict[str, Any]) -> dict[str, Any]:
    if sample["number"] == 77:
        os.kill(os.getpid(), signal.SIGKILL)
    return sample


def test_a_worker_that_is_killed_ends_the_run_with_a_message(tmp_path: Path, folders: dict[str, str]) -> None:
    settings = TrainingConfig(epochs=1, runs_dir=tmp_path, live="off")
    data = Deadly(folders["web"], batch_size=8, num_workers=1)
    with pytest.raises(RuntimeError, match=r"worker .* (killed|exited unexpectedly)"):
        Orchestrator(Model(), data, settings).run()
