"""Snapshots on disk: nothing is lost, nothing damaged is believed, nothing half-written is a snapshot."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aetheria.errors import SnapshotDamagedError, SnapshotError, SnapshotVersionError
from aetheria.snapshot import (
    KeepBest,
    Manifest,
    Snapshot,
    SnapshotContent,
    SnapshotWriter,
    list_snapshots,
    newest_good,
    superfluous,
    weights_digest,
)
from aetheria.snapshot.format import model_tensors, plain


def manifest_of(step: int = 1, **fields: Any) -> Manifest:
    given: dict[str, Any] = {
        "run_id": "run", "step": step, "epoch": 0, "created": "", "reason": "", "metrics": {}, "model": {},
        "optimizer": {}, "world_size": 1, "versions": {},
    }  # fmt: skip
    return Manifest(**given | fields)


def write(folder: Path, weights: dict[str, Tensor], step: int = 1, **state: Any) -> Snapshot:
    writer = SnapshotWriter(folder)
    writer.save(SnapshotContent(manifest_of(step), weights, state, {"rank": torch.arange(3)}))
    path = writer.wait()
    writer.close()
    assert path is not None
    return Snapshot(path)


def unusual() -> dict[str, Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "plain": base,
        "transposed": base.t(),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "tied": base,
        "overlapping": base[1:3],
        "strided": base[:, ::2],
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "bfloat16": torch.randn(3).bfloat16(),
        "half": torch.randn(3).half(),
        "double": torch.randn(3).double(),
        "bool": torch.tensor([True, False]),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    weights = unusual()
    snapshot = write(tmp_path, weights)
    snapshot.verify()
    found = snapshot.weights()
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8) if name == "nan" else found[name],
                           tensor.view(torch.uint8) if name == "nan" else tensor), name  # fmt: skip
    assert snapshot.manifest.tied == {"tied": "plain"}
    assert snapshot.digest() == snapshot.manifest.digest == weights_digest(weights)


def test_the_digest_sees_names_types_shapes_and_bytes() -> None:
    base = weights_digest({"a": torch.zeros(4)})
    others = [
        {"b": torch.zeros(4)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},
        {"a": torch.zeros(4), "b": torch.zeros(0)},
    ]
    assert len({base, *map(weights_digest, others)}) == 6
    assert base == weights_digest({"a": torch.zeros(8)[::2]})


def test_names_are_clean_of_what_a_compiler_wraps() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    assert set(model_tensors(model)[0]) == {"0.weight", "0.bias"}


OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.Adam, {"amsgrad": True}),
    *((getattr(torch.optim, name), {}) for name in
      ("AdamW", "Adamax", "Adadelta", "Adagrad", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "Adafactor")),
]  # fmt: skip
SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("StepLR", {"step_size": 2}),
    ("MultiStepLR", {"milestones": [2, 4]}),
    ("ConstantLR", {}),
    ("LinearLR", {}),
    ("ExponentialLR", {"gamma": 0.9}),
    ("PolynomialLR", {}),
    ("CosineAnnealingLR", {"T_max": 9}),
    ("CosineAnnealingWarmRestarts", {"T_0": 3}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5}),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 20}),
    ("LambdaLR", {"lr_lambda": lambda step: 0.9**step}),
    ("MultiplicativeLR", {"lr_lambda": lambda step: 0.9}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_optimiser_goes_on_as_if_nothing_had_been(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    def step(model: nn.Module, optimizer: Any) -> None:
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = kind(model.parameters(), **options)
    for _ in range(3):
        step(model, optimizer)
    snapshot = write(tmp_path, dict(model.state_dict()), optimizer=optimizer.state_dict())
    twin = nn.Linear(4, 3)
    twin.load_state_dict(snapshot.weights())
    other = kind(twin.parameters(), **options)
    other.load_state_dict(snapshot.state()["optimizer"])
    for _ in range(3):
        step(model, optimizer)
        step(twin, other)
    assert weights_digest(model.state_dict()) == weights_digest(twin.state_dict())


@pytest.mark.parametrize(("name", "options"), SCHEDULERS, ids=[name for name, _ in SCHEDULERS])
def test_every_scheduler_goes_on_as_if_nothing_had_been(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    def make() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3, momentum=0.9)
        return optimizer, getattr(torch.optim.lr_scheduler, name)(optimizer, **options)

    def rates(optimizer: Any, scheduler: Any) -> list[float]:
        found = []
        for _ in range(5):
            optimizer.step()
            scheduler.step()
            found.append(float(optimizer.param_groups[0]["lr"]))
        return found

    optimizer, scheduler = make()
    rates(optimizer, scheduler)
    state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    snapshot = write(tmp_path, {"w": torch.zeros(1)}, **state)
    other, twin = make()
    other.load_state_dict(snapshot.state()["optimizer"])
    twin.load_state_dict(snapshot.state()["scheduler"])
    assert rates(other, twin) == rates(optimizer, scheduler)


def test_what_cannot_be_stored_is_named() -> None:
    with pytest.raises(SnapshotError, match=r"state.callbacks.Mine.when\[1\] holds a builtins.object"):
        plain({"callbacks": {"Mine": {"when": [1, object()]}}}, "state")
    with pytest.raises(SnapshotError, match=r"has the key \(1, 2\) of type tuple"):
        plain({(1, 2): 3}, "state")


def test_what_happens_after_save_does_not_leak_into_it(tmp_path: Path) -> None:
    weights = {"w": torch.zeros(3_000_000)}
    writer = SnapshotWriter(tmp_path)
    paths = []
    for step in range(1, 4):  # the staging memory of one is used again by the next
        writer.save(SnapshotContent(manifest_of(step), weights, {"s": weights["w"]}, {}))
        weights["w"] += 1  # while it is being written
        paths.append(tmp_path / f"step-{step:08d}")
    writer.wait()
    writer.close()
    for number, path in enumerate(paths):
        snapshot = Snapshot(path)
        snapshot.verify()
        assert torch.equal(snapshot.weights()["w"], torch.full((3_000_000,), float(number)))
        assert torch.equal(snapshot.state()["s"], torch.full((3_000_000,), float(number)))


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "rank-0000.pt", "manifest.json"])
def test_one_flipped_bit_anywhere_is_noticed_and_named(tmp_path: Path, name: str) -> None:
    snapshot = write(tmp_path, {"w": torch.randn(5)}, epoch=3)
    file = snapshot.path / name
    whole = file.read_bytes()
    chance = random.Random(0)
    places = range(len(whole)) if name == "manifest.json" else [chance.randrange(len(whole)) for _ in range(60)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(SnapshotDamagedError, match=name):
            Snapshot(snapshot.path).verify()
    file.write_bytes(whole)
    Snapshot(snapshot.path).verify()


def test_the_newest_good_one_is_found_and_the_others_are_reported(tmp_path: Path) -> None:
    for step in range(1, 5):
        write(tmp_path, {"w": torch.full((3,), float(step))}, step)
    (tmp_path / "step-00000004" / "state.pt").unlink()
    with (tmp_path / "step-00000003" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    (tmp_path / "step-00000009").mkdir()  # no manifest: no snapshot
    reports: list[str] = []
    found = newest_good(tmp_path, reports.append)
    assert found is not None
    assert found.manifest.step == 2
    assert "state.pt is missing" in reports[0]
    assert "model.safetensors has" in reports[1]
    assert "bytes instead of" in reports[1]


def test_a_newer_format_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.zeros(1)}, 1)
    newest = write(tmp_path, {"w": torch.zeros(1)}, 2)
    fields = {key: value for key, value in vars(newest.manifest).items() if key != "format"}
    (newest.path / "manifest.json").write_bytes(Manifest(**fields, format=3).encode())
    with pytest.raises(SnapshotVersionError, match=r"format 3.*reads up to 2.*Upgrade"):
        newest_good(tmp_path, lambda _: None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="writers are forked")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_writer_killed_at_any_instant_leaves_only_whole_snapshots(tmp_path: Path) -> None:
    chance = random.Random(4)
    write(tmp_path, {"w": torch.zeros(200_000)}, 0)
    interrupted = 0
    for _ in range(25):
        before = {snapshot.path.name for snapshot in list_snapshots(tmp_path)}
        if not (pid := os.fork()):
            writer = SnapshotWriter(tmp_path)
            for step in range(1, 1000):
                writer.save(SnapshotContent(manifest_of(step), {"w": torch.full((200_000,), float(step))}, {}, {}))
        deadline = time.monotonic() + 30
        while {path.name for path in tmp_path.glob("step-*")} == before and time.monotonic() < deadline:
            pass  # until it is really writing
        time.sleep(chance.uniform(0, 0.03))  # not to wait for anything: the instant of the kill
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for snapshot in list_snapshots(tmp_path):
            snapshot.verify()
            assert torch.equal(snapshot.weights()["w"], torch.full((200_000,), float(snapshot.manifest.step)))
        leftovers = list(tmp_path.glob(".*"))
        interrupted += bool(leftovers)
        writer = SnapshotWriter(tmp_path)
        writer.clean()
        writer.close()
        assert not list(tmp_path.glob(".*"))
        for path in tmp_path.glob("step-*"):
            if path.name != "step-00000000":
                shutil.rmtree(path)
    assert interrupted, "no kill hit a write: the test proves nothing"


def test_a_folder_that_cannot_be_written_says_so_and_keeps_what_is_there(tmp_path: Path) -> None:
    first = write(tmp_path, {"w": torch.zeros(3)}, 1)
    writer = SnapshotWriter(tmp_path)
    (tmp_path / ".writing-step-00000002").write_text("in the way")
    writer.save(SnapshotContent(manifest_of(2), {"w": torch.zeros(3)}, {}, {}))
    with pytest.raises(SnapshotError, match=r"cannot write the snapshot .*step-00000002.*are free there.*untouched"):
        writer.wait()
    writer.close()
    first.verify()


def test_retention() -> None:
    manifests = [manifest_of(step, metrics={"loss": abs(step - 3.0)}, pinned=step == 1) for step in range(1, 9)]
    gone = [manifest.step for manifest in superfluous(manifests, 2, [KeepBest("loss", "min", 2)], 8)]
    assert gone == [4, 5, 6]
    gone = [manifest.step for manifest in superfluous(manifests, 1, [KeepBest("loss", "max", 1)], 8)]
    assert gone == [2, 3, 4, 5, 6], "two stay whatever is asked for"
    assert superfluous(manifests, 99, [], 8) == []


def test_what_is_among_the_best() -> None:
    rule = KeepBest("loss", "min", 2)
    manifests = [manifest_of(1, metrics={"loss": 1.0}), manifest_of(2), manifest_of(3, metrics={"loss": float("nan")})]
    assert rule.admits(5.0, manifests), "there is room"
    manifests.append(manifest_of(4, metrics={"loss": 2.0}))
    assert rule.admits(1.5, manifests)
    assert not rule.admits(2.0, manifests), "the earlier one wins a tie"
    assert not rule.admits(float("nan"), manifests)


def test_memory_got_beforehand_is_what_the_first_snapshot_is_copied_into(tmp_path: Path) -> None:
    weights = {"large": torch.randn(512, 1024), "small": torch.randn(3)}
    content = SnapshotContent(manifest_of(), weights, {"moments": [torch.ones(1 << 19)]}, {})
    writer = SnapshotWriter(tmp_path)
    writer.reserve(content)
    assert writer._reserving is not None
    writer._reserving.result(timeout=30)
    reserved = {place: buffer.data_ptr() for place, buffer in writer._staging._buffers.items()}
    assert sorted(reserved) == [("state", "moments", 0), ("weights", "large")]
    writer.save(content)
    path = writer.wait()
    assert {place: writer._staging._buffers[place].data_ptr() for place in reserved} == reserved
    writer.close()
    assert path is not None
    assert Snapshot(path).weights()["large"].equal(weights["large"])


def test_a_snapshot_does_not_wait_for_memory_that_is_still_being_got(tmp_path: Path) -> None:
    content = SnapshotContent(manifest_of(), {f"layer.{index}": torch.ones(1 << 18) for index in range(8)}, {}, {})
    writer = SnapshotWriter(tmp_path)
    begin = Event()
    writer._thread.submit(begin.wait)  # the thread has something else to do first
    writer.reserve(content)
    threading.Timer(0.05, begin.set).start()
    writer.save(content)
    assert Snapshot(writer.wait() or Path()).weights()["layer.7"].sum() == 1 << 18
    writer.close()
