"""Ranks that train apart and come together now and then: real processes, real gloo."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.ranked import launch, run_ranks
from tests.ranked_apart import DILOCO, MEAN, Data, Model, Watch, assert_close, by_case, train
from torch import Tensor

from aetheria import Callback, Orchestrator, TrainingConfig
from aetheria.accelerator import create_accelerator
from aetheria.control.line import NoLine
from aetheria.errors import ConfigError
from aetheria.protocol import command_of, encode
from aetheria.registry import Registry
from aetheria.runs import RunFolder
from aetheria.snapshot import list_snapshots


# --- what it computes ------------------------------------------------------------------------------------------------
def simulate(
    seen: list[list[list[float]]],
    sync_every: int,
    outer: dict[str, float],
    poisoned: Any = None,
    *,
    weighted: bool = False,
    samples: int = 50,
) -> dict[str, Any]:
    """DiLoCo, written down plainly in one process: `seen[rank][window]` are the numbers of the samples."""
    rate, momentum = outer["outer_learning_rate"], outer["outer_momentum"]
    torch.manual_seed(0)
    shared = Model()
    features, target, _ = Data(1, samples).dataset.tensors
    ranks = [copy.deepcopy(shared) for _ in seen]
    optimizers = [rank.configure_optimizers() for rank in ranks]
    names = [name for name, _ in shared.named_parameters()]
    velocity = {name: torch.zeros_like(shared.get_parameter(name)) for name in names}
    windows = len(seen[0])
    for window in range(windows):
        taken: set[float] = set()
        for rank, (model, optimizer) in reversed(list(enumerate(zip(ranks, optimizers, strict=True)))):
            numbers = seen[rank][window]
            tokens = torch.tensor(numbers) % 3 if weighted else None
            loss = model.loss_of(features[numbers], target[numbers], tokens)
            if set(numbers) <= taken:  # this rank was left without samples, and given the next one's
                loss = loss * 0
            taken |= set(numbers)
            if poisoned != (rank, window + 1):
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        if (window + 1) % sync_every and window + 1 != windows:
            continue
        with torch.no_grad():
            for name in names:
                parameter = shared.get_parameter(name)
                mean = torch.stack([parameter - rank.get_parameter(name) for rank in ranks]).mean(0)
                velocity[name] = momentum * velocity[name] + mean
                parameter -= rate * (mean + momentum * velocity[name])
                for rank in ranks:
                    rank.get_parameter(name).copy_(parameter)
    return {name: parameter.tolist() for name, parameter in shared.named_parameters()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_it_trains_what_the_papers_say(tmp_path: Path, ranks: int) -> None:
    """50 samples leave a last window of 2: with three ranks, one of them has none."""
    poisoned = (1, 6)
    cases = [
        {"samples": 48, "model": {"inner": "sgd"}},  # DDP
        {"samples": 48, "model": {"inner": "sgd"}, "local": {"sync_every": 1, **MEAN}},
        {"samples": 48, "model": {"inner": "sgd"}, "local": {"sync_every": 1, **MEAN}, "micro": 6 // ranks,
         "grad_accumulation_steps": 2},
        {"local": {"sync_every": 4, **DILOCO}},
        {"local": {"sync_every": 4, **MEAN}},
        {"local": {"sync_every": 4, **DILOCO}, "model": {"poisoned": poisoned}},
        {"local": {"sync_every": 3, **DILOCO}, "model": {"weighted": True}, "micro": 6 // ranks,
         "grad_accumulation_steps": 2, "samples": 48},
    ]  # fmt: skip
    ddp, *others, weighted = by_case(ranks, tmp_path, cases)
    for found in others[:2]:
        assert_close(found[0]["weights"], ddp[0]["weights"])
        assert found[0]["metrics"] == pytest.approx(ddp[0]["metrics"], abs=1e-9)
    for found, options, poison in zip(others[2:], (DILOCO, MEAN, DILOCO), (None, None, poisoned), strict=True):
        assert found[0]["together"] == [4, 8, 11]  # the last one, after ten steps, when the run ended
        assert_close(found[0]["weights"], simulate([each["seen"] for each in found], 4, options, poison))
    # A rank's window is weighted by its own tokens.
    windows = [[first + second for first, second in zip(each["seen"][::2], each["seen"][1::2], strict=True)]
               for each in weighted]  # fmt: skip
    assert_close(weighted[0]["weights"], simulate(windows, 3, DILOCO, weighted=True, samples=48))


def test_a_window_that_one_rank_drops_is_recorded_on_the_first(tmp_path: Path) -> None:
    common = {"local": {"sync_every": 4}, "samples": 60}
    noisy = {**common, "model": {"noisy": True, "poisoned": (1, 9)}, "snapshots": {"every_steps": 9, "keep_last": 9}}
    (first, second, third), (whole, *_) = by_case(3, tmp_path, [{**common, "model": {"poisoned": (1, 6)}}, noisy])
    assert first["step"] == 10
    told = "NaN or infinite gradients on rank 1: it dropped 1 of its last 4 windows; the other ranks went on"
    assert [message for kind, message in first["events"] if kind == "nonfinite"] == [told]
    assert [message for kind, message in third["events"] if kind == "nonfinite"] == [told]
    (own,) = [message for kind, message in second["events"] if kind == "nonfinite"]
    assert "after step 5, 1 in a row: the window was dropped" in own
    assert second["dropped"] == [second["seen"][5]]  # its own samples, and nobody else's
    # Right after an exchange a dropped window leaves what was exchanged: weights, and what batch norm has seen.
    (after,) = [each for each in list_snapshots(Path(whole["folder"]) / "snapshots") if each.manifest.step == 9]
    shared, own = after.weights(), after.rank_state(1)["accelerator"]
    assert_close({**own["weights"], **own["buffers"]}, shared)


def test_weights_that_are_not_finite_do_not_reach_the_others(tmp_path: Path) -> None:
    options = {"local": {"sync_every": 3}, "watch": {"broken_at": 4}, "nonfinite": "skip"}
    for rank in launch(2, train, str(tmp_path), options):
        with pytest.raises(RuntimeError, match="NonFiniteError: the weights of rank 1 are NaN or infinite, after 3"):
            rank.result()
    (folder,) = tmp_path.iterdir()
    assert RunFolder(folder).read()["status"] == "failed"


# --- snapshots -------------------------------------------------------------------------------------------------------
NOISY = {"model": {"noisy": True}, "epochs": 3, "samples": 60, "local": {"sync_every": 7, **DILOCO}}


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, ranks: int) -> None:
    """Batch norm and dropout; exchanges after 7 and 14 steps, and the signal between them."""
    whole, stopped = by_case(
        ranks, tmp_path / "1", [{**NOISY, "snapshots": {"every_steps": 2, "keep_last": 9}},
                                {**NOISY, "watch": {"signalled_at": 8}}],
    )  # fmt: skip
    assert stopped[0]["status"] == "interrupted"
    assert stopped[0]["step"] in (8, 9, 10)
    assert whole[0]["together"] == [7, 14, 16]
    snapshots = {each.manifest.step: each for each in list_snapshots(Path(whole[0]["folder"]) / "snapshots")}
    again, continued, unwatched = by_case(
        ranks, tmp_path / "2", [{**NOISY, "resume": str(snapshots[4].path)}, {**NOISY, "resume": stopped[0]["folder"]},
                                NOISY],
    )  # fmt: skip
    for found in (again, continued, unwatched):  # not even the snapshots themselves leave a trace
        assert found[0]["digest"] == whole[0]["digest"]
    for rank in range(ranks):
        own = snapshots[10].rank_state(rank)["accelerator"]
        assert own["windows"] == 3
        assert ("optimizer" in own) == (rank > 0)


def test_another_number_of_ranks_takes_up_what_each_has_done(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"local": {"sync_every": 7, **DILOCO}, "epochs": 3}
    cases = [{**plain, "snapshots": {"every_steps": 9, "keep_last": 9}}, {**plain, "max_steps": 9}]
    (whole, *_), (ended, *_) = by_case(3, tmp_path / "three", cases)
    assert ended["together"] == [7, 10]  # once more at its end
    (between,) = [each for each in list_snapshots(Path(whole["folder"]) / "snapshots") if each.manifest.step == 9]
    plain["resume"] = str(between.path)
    (found, _), (goes_on, _) = by_case(2, tmp_path / "two", [{**plain, "max_steps": 9}, plain])
    assert_close(found["weights"], ended["weights"])
    assert goes_on["step"] == whole["step"] == 15
    # DDP begins from the shared weights, and says what it leaves out.
    ((ddp, *_),) = by_case(3, tmp_path / "ddp", [{"epochs": 3, "resume": plain["resume"]}])
    assert ddp["step"] == 15
    left_out = "ranks that trained apart, 2 windows after they had last come together"
    assert any(left_out in message for kind, message in ddp["events"] if kind == "warning")


def test_validations_are_of_the_weights_that_are_saved(tmp_path: Path) -> None:
    options = {"local": {"sync_every": 4}, "snapshots": {"every_steps": 3, "keep_last": 9}}
    (first, _), (last, _) = by_case(
        2, tmp_path, [{**options, "val_every_steps": 3}, {**options, "val_interval": 1, "samples": 60}]
    )
    snapshots = {each.manifest.step: each for each in list_snapshots(Path(first["folder"]) / "snapshots")}
    found, model, (features, target, _) = {}, Model(), Data(1).dataset.tensors
    for step in (3, 6, 9):
        model.load_state_dict(snapshots[step].weights())
        found[step] = float(model.loss_of(features, target).detach())
        assert snapshots[step].manifest.metrics["val_loss"] == pytest.approx(found[step], abs=1e-12)
    torch.manual_seed(0)
    first_loss = float(Model().loss_of(features, target).detach())
    assert found[3] == pytest.approx(first_loss, abs=1e-12)  # nothing was exchanged yet
    assert found[6] != found[9]
    # The last exchange comes before the last validation.
    features, target, _ = Data(1, 60).dataset.tensors
    model.load_state_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in last["weights"].items()})
    assert last["validated"][-1] == pytest.approx(float(model.loss_of(features, target).detach()), abs=1e-12)


# --- steering --------------------------------------------------------------------------------------------------------
class ScriptedLine(NoLine):
    """Brings what is put in."""

    def __init__(self) -> None:
        super().__init__()
        self.word = memoryview(bytearray(8)).cast("Q")
        self.waiting: list[bytes] = []

    def put(self, command: Any) -> None:
        self.waiting.append(encode(command))
        self.word[0] += 1

    def take(self) -> list[bytes]:
        taken, self.waiting = self.waiting, []
        return taken


class Operator(Callback):
    """Sends commands from the first rank, each at its step."""

    critical = True

    def __init__(self, line: ScriptedLine, commands: dict[int, list[Any]]) -> None:
        self.line, self.commands = line, commands

    def on_batch_end(self, batch_idx: int, metrics: dict[str, Tensor]) -> None:
        if self.context.accelerator.is_main_process:
            for command in self.commands.pop(self.context.global_step, ()):
                self.line.put(command)


def steered(runs_dir: str) -> dict[str, Any]:
    torch.manual_seed(0)

    def change(**values: Any) -> Any:
        return command_of("set", {"values": values})

    line, watch = ScriptedLine(), Watch()
    commands = {
        11: [change(sync_every=3), command_of("health", {"check": "ranks"})],
        21: [change(sync_every=wrong) for wrong in (0, -1, 2.5, "often", None)],
        32: [change(frozen=["layers.0.*"])],  # the first layer has changed since the last exchange
        43: [change(frozen=[]), change(sync_every=1000)],
    }
    config = TrainingConfig(
        epochs=11, runs_dir=Path(runs_dir), live="off", accelerator="local_sgd", accelerator_params={"sync_every": 8}
    )
    model = Model()
    run = Orchestrator(model, Data(6), config, callbacks=[watch, Operator(line, commands)], line=line)
    outcomes: list[Any] = []
    told = run._note_outcome

    def note(command: Any, outcome: Any) -> None:
        if outcome.state != "accepted":
            outcomes.append((outcome.step, outcome.state, outcome.message, msgspec.to_builtins(outcome.result)))
        told(command, outcome)

    run._note_outcome = note  # type: ignore[method-assign]
    result = run.run()
    return {"together": watch.together, "outcomes": outcomes, "digest": result.digest, "step": result.global_step}


def test_sync_every_is_changed_at_the_same_step_on_all_ranks(tmp_path: Path) -> None:
    found = run_ranks(2, steered, str(tmp_path))
    assert found[1] == found[0]
    (changed, *_), (looked, *_) = found[0]["outcomes"][:2]
    assert found[0]["outcomes"][0][1] == "applied"
    assert looked == changed
    assert found[0]["outcomes"][1][3]["healthy"]
    refused = found[0]["outcomes"][2:7]
    assert [state for _, state, _, _ in refused] == ["rejected"] * 5
    assert all("sync_every" in message for _, _, message, _ in refused)
    (frozen, frozen_state, *_), (thawed, *_), (rare, *_) = found[0]["outcomes"][7:]
    assert frozen_state == "applied"
    assert thawed == rare
    # Every 8 steps, from the change on every 3; once more when parameters are frozen, thawed, and at the end.
    expected, since = [], 0
    for step in range(1, found[0]["step"] + 1):
        since += 1
        due = 8 if step <= changed else 3 if step <= rare else 1000
        if since >= due:
            expected.append(step)
            since = 0
        if since and step in (frozen, thawed):
            expected.append(step + 1)  # at the boundary after it
            since = 0
    assert found[0]["together"] == [*expected, found[0]["step"] + 1]


# --- how much is said ------------------------------------------------------------------------------------------------
def test_fewer_collectives_are_made(tmp_path: Path) -> None:
    steps = 96
    cases = [{}, {"local": {"sync_every": 8}}, {"local": {"sync_every": 48}}]
    common = {"epochs": 1, "log_every": 1000, "micro": 1, "samples": 2 * steps}
    found = by_case(2, tmp_path, [common | options for options in cases])
    ddp, often, rarely = (of_ranks[0]["collectives"] for of_ranks in found)
    # One in every step; two in every exchange: how the ranks have fared, and how far they have come.
    assert often - rarely == 2 * steps // 8 - 2 * steps // 48
    assert ddp - often == pytest.approx(steps - 2 * steps // 8, abs=10)  # DDP compares models, and arranges buckets


# --- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_every": 0}, "sync_every: found 0, expected a number of steps, 1 or more"),
        ({"sync_every": 2.5}, "sync_every"),
        ({"sync_every": "often"}, "sync_every"),
        ({"outer_learning_rate": 0.0}, "outer_learning_rate: found 0.0, expected more than 0"),
        ({"outer_momentum": 1.0}, "outer_momentum: found 1.0, expected 0 or more, and less than 1"),
        ({"sinc_every": 3}, "sinc_every"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Registry.build("accelerator", "local_sgd", options)


def test_one_process_has_nobody_to_train_apart_from() -> None:
    config = TrainingConfig(epochs=1, accelerator="local_sgd")
    with pytest.raises(ConfigError, match="accelerator local_sgd is for several ranks"):
        create_accelerator(config)
