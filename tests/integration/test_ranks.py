"""Several ranks train what one would have trained: real processes, real gloo."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranked import free_port, launch, run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aetheria import AetherModel, Callback, Orchestrator, TrainingConfig
from aetheria.core import AetherDataModule
from aetheria.core.shards import whole
from aetheria.loom.reader import RunReader
from aetheria.plugins.callbacks.early_stopping import EarlyStopping
from aetheria.runs import RunFolder
from aetheria.snapshot import list_snapshots
from aetheria.snapshot.format import model_tensors

SAMPLES, FEATURES = 50, 5


class Model(AetherModel):
    def __init__(self, weighted: bool = False) -> None:
        super().__init__()
        self.weighted = weighted
        self.layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        features, target, tokens = batch
        losses = (self.layers(features).squeeze(1) - target).square()
        if not self.weighted:
            return {"loss": losses.mean(), "error": losses.detach().sqrt().mean()}
        weight = tokens.sum()
        return {"loss": (losses * tokens).sum() / weight, "weight": weight}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Data(AetherDataModule):
    def __init__(self, batch_size: int, samples: int = SAMPLES) -> None:
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(3)
        features = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64)
        tokens = torch.randint(0, 4, (samples,), generator=generator).double()
        self.dataset = TensorDataset(features, features.sum(1).sin(), tokens)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=self.batch_size)


def train(runs_dir: str, micro: int, accumulation: int, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model(options.pop("weighted", False))
    data = Data(micro, options.pop("samples", SAMPLES))
    resume = options.pop("resume", None)
    config = TrainingConfig(
        **{"epochs": 2, "log_every": 1, "grad_accumulation_steps": accumulation, "runs_dir": Path(runs_dir)}
        | {"live": "off"}
        | options
    )
    result = Orchestrator(model, data, config).run(resume)
    tensors = {name: whole(tensor).tolist() for name, tensor in model_tensors(model)[0].items()}
    return {"weights": tensors, "metrics": result.metrics, "step": result.global_step, "folder": str(result.folder),
            "digest": result.digest, "status": result.status}  # fmt: skip


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-12) -> None:
    for name, values in expected["weights"].items():
        torch.testing.assert_close(
            torch.tensor(found["weights"][name]), torch.tensor(values), rtol=0, atol=tolerance, msg=name
        )
    assert found["step"] == expected["step"]
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-9)


def train_all(runs_dir: str, cases: list[tuple[int, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Trains several times, in the same processes."""
    found = []
    for number, (micro, accumulation, options) in enumerate(cases):
        found.append(train(f"{runs_dir}/{number}", micro, accumulation, dict(options)))
    return found


def results_of(ranks: int, runs_dir: Path, cases: list[tuple[int, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns what the first rank found, for each case, when all have found the same."""
    each = run_ranks(ranks, train_all, str(runs_dir), cases)
    for other in each[1:]:
        for ours, theirs in zip(each[0], other, strict=True):
            assert {**theirs, "folder": ""} == {**ours, "folder": ""}
    return list(each[0])


TOKENS = {"weighted": True}
SPLITS = {  # ranks: (micro-batch, accumulation), 12 samples in a step together
    1: [(12, 1), (4, 3)],
    2: [(6, 1), (3, 2)],
    3: [(2, 2), (4, 1)],
    4: [(3, 1), (1, 3)],
}


def test_any_split_of_a_global_batch_trains_the_same(tmp_path: Path) -> None:
    """50 samples in an epoch leave a last window of 2: fewer than there are ranks."""
    found = {}
    for ranks, splits in SPLITS.items():
        cases = [(*split, options) for split in splits for options in ({}, TOKENS)]
        for (micro, accumulation, options), result in zip(
            cases, results_of(ranks, tmp_path / str(ranks), cases), strict=True
        ):
            found[ranks, micro, accumulation, bool(options)] = result
    for (*_, weighted), result in found.items():
        assert_close(result, found[1, 12, 1, weighted])


class Embedded(Model):
    """With gradients that are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, FEATURES, sparse=True).double()

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        features, target, tokens = batch
        return super().training_step((features + self.table(tokens.long()), target, tokens))


def embedded(runs_dir: str, micro: int) -> dict[str, list[Any]]:
    torch.manual_seed(0)
    model = Embedded()
    Orchestrator(model, Data(micro), TrainingConfig(epochs=2, runs_dir=Path(runs_dir), live="off")).run()
    return {name: tensor.tolist() for name, tensor in model_tensors(model)[0].items()}


def test_sparse_gradients_are_added_up_too(tmp_path: Path) -> None:
    (alone,) = run_ranks(1, embedded, str(tmp_path / "1"), 12)
    for found in run_ranks(2, embedded, str(tmp_path / "2"), 6):
        for name, values in alone.items():
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), rtol=0, atol=1e-12)


# --- another number of ranks -----------------------------------------------------------------------------------------
def stop_early(runs_dir: str, micro: int, at: int) -> dict[str, Any]:
    class Stop(Callback):
        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            if self.context.global_step == at:
                self.context.request_stop("for now")

    torch.manual_seed(0)
    model = Model()
    config = TrainingConfig(epochs=3, log_every=1, runs_dir=Path(runs_dir), live="off")
    result = Orchestrator(model, Data(micro), config, callbacks=[Stop()]).run()
    return {"folder": str(result.folder), "step": result.global_step, "digest": result.digest}


def test_another_number_of_ranks_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    (whole,) = results_of(1, tmp_path / "whole", [(12, 1, {"epochs": 3})])
    for number, (before, after) in enumerate([(2, 3), (4, 1), (1, 2), (3, 3)]):
        folder = tmp_path / str(number)
        stopped = run_ranks(before, stop_early, str(folder), 12 // before, 7)
        assert len({each["step"] for each in stopped}) == 1
        (found,) = results_of(after, folder, [(12 // after, 1, {"epochs": 3, "resume": stopped[0]["folder"]})])
        assert_close(found, whole)


def test_a_snapshot_holds_every_rank(tmp_path: Path) -> None:
    folder = Path(run_ranks(3, stop_early, str(tmp_path), 4, 3)[0]["folder"])
    newest = list_snapshots(folder / "snapshots")[-1]
    newest.verify()
    assert {f"rank-{rank:04d}.pt" for rank in range(3)} <= set(newest.manifest.files)
    states = [newest.rank_state(rank)["generators"]["torch"] for rank in range(3)]
    assert not states[0].equal(states[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


# --- what one rank meets ---------------------------------------------------------------------------------------------
class Poisoned(Model):
    """Its gradients are NaN on one rank, at one step; it says a metric on one rank only."""

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        outputs = super().training_step(batch)
        self.calls = getattr(self, "calls", 0) + 1
        if os.environ["RANK"] == "1":
            outputs["of rank 1"] = torch.tensor(5.0)
            if self.calls == 3:
                outputs["loss"] = outputs["loss"] * float("nan")
        return outputs


def poisoned(runs_dir: str, accelerator: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Poisoned()
    events: list[Any] = []

    class Listener(Callback):
        def on_event(self, event: Any) -> None:
            events.append((event.kind, dict(event.data)))

    config = TrainingConfig(epochs=1, log_every=2, runs_dir=Path(runs_dir), live="off", accelerator=accelerator)
    result = Orchestrator(model, Data(6), config, callbacks=[Listener()]).run()
    return {"digest": result.digest, "events": events, "metrics": result.metrics, "step": result.global_step}


@pytest.mark.parametrize("accelerator", ["auto", "fsdp"])
def test_a_nan_on_one_rank_drops_the_window_on_all(tmp_path: Path, accelerator: str) -> None:
    found = run_ranks(2, poisoned, str(tmp_path), accelerator)
    assert found[0]["digest"] == found[1]["digest"]
    assert [each["step"] for each in found] == [4, 4]
    for each in found:
        (dropped,) = [data for kind, data in each["events"] if kind == "nonfinite"]
        assert len(dropped["sample_ids"]) == 12  # those of both ranks
        assert each["metrics"]["of rank 1"] == 5.0


def drifts(runs_dir: str) -> None:
    torch.manual_seed(0)
    model = Model()

    class Meddles(Callback):
        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            if self.context.accelerator.rank == 1 and self.context.global_step == 5:
                with torch.no_grad():
                    model.layers[0].bias[2] += 1e-15

    config = TrainingConfig(
        max_steps=12,
        runs_dir=Path(runs_dir),
        live="off",
        compare_ranks_every=4,
        snapshots={"every_steps": 4},  # type: ignore[arg-type]
    )
    Orchestrator(model, Data(6), config, callbacks=[Meddles()]).run()


def test_ranks_whose_weights_differ_are_found(tmp_path: Path) -> None:
    for rank in launch(3, drifts, str(tmp_path)):
        with pytest.raises(RuntimeError, match=r"different weights at step 8: rank 1 of 3"):
            rank.result()
    (folder,) = tmp_path.iterdir()
    assert RunFolder(folder).read()["status"] == "failed"
    steps = [snapshot.manifest.step for snapshot in list_snapshots(folder / "snapshots")]
    assert 4 in steps
    assert 8 not in steps


def logs(runs_dir: str, resume: str | None, breaks: bool) -> str:
    class Breaks(Callback):
        critical = True

        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            if breaks and self.context.global_step == 4:  # the step after a snapshot
                raise ValueError("stumbled")

    torch.manual_seed(0)
    config = TrainingConfig(
        max_steps=12,
        log_every=1,
        runs_dir=Path(runs_dir),
        live="off",
        snapshots={"every_steps": 3},  # type: ignore[arg-type]
    )
    return str(Orchestrator(Model(), Data(6), config, callbacks=[Breaks()]).run(resume).folder)


def test_what_was_logged_before_a_crash_is_on_the_curve_once(tmp_path: Path) -> None:
    whole_run, *_ = run_ranks(2, logs, str(tmp_path / "whole"), None, False)
    for rank in launch(2, logs, str(tmp_path / "broken"), None, True):
        with pytest.raises(RuntimeError, match="stumbled"):
            rank.result()
    (folder,) = (tmp_path / "broken").iterdir()
    run_ranks(2, logs, str(tmp_path / "broken"), str(folder), False)
    expected, found = (RunReader(Path(place) / "run.db").metric("loss") for place in (whole_run, folder))
    assert found.steps.tolist() == expected.steps.tolist() == list(range(1, 13))
    assert found.values.tolist() == expected.values.tolist()


def raises(runs_dir: str, who: int, where: str) -> None:
    class Breaks(Callback):
        critical = True

        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            if self.context.accelerator.rank == who and self.context.global_step == 3:
                if where == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("the cat sat on the keyboard")

    class Unprepared(Data):
        def prepare_data(self) -> None:
            if where == "prepare":
                raise OSError("the download is gone")

    config = TrainingConfig(epochs=2, runs_dir=Path(runs_dir), live="off")
    Orchestrator(Model(), Unprepared(6), config, callbacks=[Breaks()]).run()


@pytest.mark.parametrize(
    ("who", "where", "word"),
    [(0, "step", "the cat sat"), (1, "step", "the cat sat"), (1, "killed", "is gone"), (0, "prepare", "the download")],
)
@pytest.mark.parametrize("store", ["of an agent", "of rank 0"])
def test_a_rank_that_fails_takes_the_others_down(tmp_path: Path, who: int, where: str, word: str, store: str) -> None:
    environment = {}
    if store == "of rank 0":
        environment = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port())}
    begun = time.monotonic()
    ranks = launch(2, raises, str(tmp_path), who, where, **environment)
    for number, rank in enumerate(ranks):
        with pytest.raises((RuntimeError, ChildProcessError)) as raised:
            rank.result()
        if number != who:
            assert "RankError" in str(raised.value)
            assert word in str(raised.value)
    assert time.monotonic() - begun < 30
    (folder,) = tmp_path.iterdir()
    content = RunFolder(folder).read()
    assert content["status"] == "failed"
    assert word in content["status_detail"]


# --- before the first step -------------------------------------------------------------------------------------------
def unlike(runs_dir: str) -> None:
    config = TrainingConfig(epochs=1, seed=int(os.environ["RANK"]), runs_dir=Path(runs_dir), live="off")
    Orchestrator(Model(), Data(2), config).run()


def too_small(runs_dir: str) -> None:
    train(runs_dir, 20, 1, {})


def uneven(runs_dir: str) -> None:
    Orchestrator(
        Model(), Data(2), TrainingConfig(epochs=1, global_batch_size=7, runs_dir=Path(runs_dir), live="off")
    ).run()


def rounded(runs_dir: str) -> None:
    options = {"accelerator_params": {"compress": "bf16"}}
    Orchestrator(Model(), Data(2), TrainingConfig(epochs=1, runs_dir=Path(runs_dir), live="off", **options)).run()


def on_cuda(runs_dir: str) -> None:
    options = {"accelerator": "ddp", "accelerator_params": {"device": "cuda"}}
    Orchestrator(Model(), Data(2), TrainingConfig(epochs=1, runs_dir=Path(runs_dir), live="off", **options)).run()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(
            on_cuda,
            "torch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
        (rounded, "compress: bf16 is not among what gloo adds up on a CPU. Write compress: fp16"),
        (unlike, "rank 1 is about to train something else than rank 0: seed is 1 there, 0 here"),
        (too_small, "batch_size 20 x 3 ranks = 60 is larger than the data: train_dataloader has 50 samples"),
        (uneven, "global_batch_size: found 7, expected a multiple of 3"),
    ],
)
def test_what_cannot_be_trained_together_is_said_before_the_first_step(
    tmp_path: Path, function: Any, message: str
) -> None:
    for rank in launch(3, function, str(tmp_path)):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            rank.result()


def alone(runs_dir: str) -> None:
    train(runs_dir, 4, 1, {})


def test_a_rank_that_is_missing_is_named(tmp_path: Path) -> None:
    (rank,) = launch(1, alone, str(tmp_path), WORLD_SIZE="2", AETHERIA_RENDEZVOUS_TIMEOUT="1")
    with pytest.raises(
        RuntimeError, match=r"rank 0 of 2 did not find the others at 127.0.0.1:\d+ .*rank 1 of 2 is missing"
    ):
        rank.result()


def test_a_master_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    (rank,) = launch(
        1, alone, str(tmp_path), RANK="1", WORLD_SIZE="2", AETHERIA_RENDEZVOUS_TIMEOUT="1", MASTER_PORT="9"
    )
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 did not find the others at 127\.0\.0\.1"):
        rank.result()


# --- the end ---------------------------------------------------------------------------------------------------------
def ends(runs_dir: str, how: str) -> tuple[str, int, str, str]:
    class Tires(Callback):
        def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
            if self.context.accelerator.rank == 1 and self.context.global_step == 3:
                self.context.request_stop("rank 1 is tired")  # a clock of its own, for instance

    torch.manual_seed(0)
    callbacks = [Tires()] if how == "one rank" else [EarlyStopping("val_error", patience=1, min_delta=1e9)]
    config = TrainingConfig(epochs=40, runs_dir=Path(runs_dir), live="off")
    result = Orchestrator(Watched(), Data(6), config, callbacks=callbacks).run()
    return result.status, result.global_step, result.digest, str(result.folder)


class Watched(Model):
    def validation_step(self, batch: Any) -> dict[str, Tensor]:
        return {"error": self.training_step(batch)["error"]}


@pytest.mark.parametrize("how", ["early stopping", "one rank"])
def test_whoever_wants_the_end_all_leave_at_the_same_step_with_one_snapshot(tmp_path: Path, how: str) -> None:
    first, *others = run_ranks(3, ends, str(tmp_path), how)
    assert others == [first] * 2
    status, step, digest, folder = first
    assert status == "stopped"
    assert step < 40 * 3
    snapshots = list_snapshots(Path(folder) / "snapshots")
    assert [snapshot.manifest.digest for snapshot in snapshots if snapshot.manifest.step == step] == [digest]
