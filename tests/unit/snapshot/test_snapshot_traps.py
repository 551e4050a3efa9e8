"""States that look harmless and are not: what a snapshot must not lose, mix up, or write over."""

from __future__ import annotations

import collections
import enum
import os
import random
import resource
import shutil
import signal
import stat
import time
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from aetheria.core import AetherModel
from aetheria.engine.state import restore_model
from aetheria.errors import SnapshotDamagedError, SnapshotError, SnapshotMismatchError
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
from aetheria.snapshot.writer import remove_snapshot


def manifest_of(step: int = 1, **fields: Any) -> Manifest:
    given: dict[str, Any] = dict.fromkeys(("run_id", "created", "reason"), "")
    given |= {name: {} for name in ("metrics", "model", "optimizer", "versions")}
    return Manifest(**given | {"step": step, "epoch": 0, "world_size": 1} | fields)


def content_of(step: int = 1, weights: dict[str, Tensor] | None = None, **state: Any) -> SnapshotContent:
    return SnapshotContent(manifest_of(step), {"w": torch.zeros(2)} if weights is None else weights, state, {})


def write(folder: Path, content: SnapshotContent, **options: Any) -> Snapshot:
    writer = SnapshotWriter(folder, **options)
    try:
        writer.save(content)
        path = writer.wait()
    finally:
        writer.close()
    assert path is not None
    return Snapshot(path)


def stored(folder: Path, **state: Any) -> dict[str, Any]:
    snapshot = write(folder, content_of(**state))
    snapshot.verify()
    return snapshot.state()


# --- what a state may hold -------------------------------------------------------------------------------------------
class Mode(enum.StrEnum):
    FAST = "fast"


class Former(str, enum.Enum):  # noqa: UP042 - as it was written before there was StrEnum
    OLD = "old"


class Level(enum.IntEnum):
    HIGH = 3


Pair = collections.namedtuple("Pair", "x y")

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.sampled_from([torch.float32, torch.device("cpu"), float("inf")])
)
keys = st.text() | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()
states = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.tuples(inner, inner) | st.sets(st.integers()),
    max_leaves=12,
)


@settings(max_examples=30)  # most of the time goes into inventing them
@given(state=st.dictionaries(st.text(), states, max_size=4))
def test_every_plain_state_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    folder = tmp_path_factory.mktemp("state")
    assert stored(folder, nested=state)["nested"] == state
    shutil.rmtree(folder)


def test_what_only_looks_plain_becomes_plain(tmp_path: Path) -> None:
    state = {
        "numbers": [
            np.float64(0.1),
            np.int64(3),
            np.bool_(True),
            np.float32(0.5),
            np.str_("text"),
            Mode.FAST,
            Level.HIGH,
            Former.OLD,
        ],
        "keys": {np.float64(0.5): 1, np.int64(7): 2, np.str_("k"): 3, Mode.FAST: 4, Level.HIGH: 5, Former.OLD: 6},
        "kinds": [OrderedDict(a=1), defaultdict(list, b=2), Pair(1, 2), torch.Size([3, 4]), frozenset({1})],
    }
    found = stored(tmp_path, state=state)["state"]
    assert found["numbers"] == [0.1, 3, True, 0.5, "text", "fast", 3, "old"]
    assert [type(number) for number in found["numbers"]] == [float, int, bool, float, str, str, int, str]
    assert found["keys"] == {0.5: 1, 7: 2, "k": 3, "fast": 4, 3: 5, "old": 6}
    assert {type(key) for key in found["keys"]} == {float, int, str}
    assert found["kinds"] == [{"a": 1}, {"b": 2}, (1, 2), (3, 4), {1}]


def test_a_counter_stays_a_counter(tmp_path: Path) -> None:
    """`MultiStepLR` keeps one, and asks it for its elements."""
    found = stored(tmp_path, milestones=Counter([2, 2, 5]))["milestones"]
    assert type(found) is Counter
    assert sorted(found.elements()) == [2, 2, 5]


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": [{"b": object()}]}, r"state\.a\[0\]\.b holds a builtins\.object"),
        ({"a": np.ones(2)}, r"state\.a holds a numpy\.ndarray"),
        ({"a": (1, lambda: 2)}, r"state\.a\[1\] holds a builtins\.function"),
        ({"a": 1j}, r"state\.a holds a builtins\.complex"),
        ({"a": np.datetime64("2026-01-01")}, r"state\.a holds a numpy\.datetime64"),
        ({"a": np.longdouble(1)}, r"state\.a holds a numpy\.longdouble"),
        ({"a": {(1, 2): 3}}, r"state\.a has the key \(1, 2\) of type tuple"),
        ({"a": {torch.ones(1): 3}}, r"state\.a has the key"),
        ({"a": np.random.default_rng(0)}, r"state\.a holds a numpy\.random"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_its_place(tmp_path: Path, state: Any, where: str) -> None:
    with pytest.raises(SnapshotError, match=where):
        plain(state, "state")
    with pytest.raises(SnapshotError, match=where):
        write(tmp_path, content_of(**state))
    assert not list(tmp_path.iterdir())


def test_a_state_that_holds_itself_is_refused() -> None:
    state: list[Any] = []
    state.append(state)
    with pytest.raises(SnapshotError, match="holds itself"):
        plain(state, "state")


def test_keys_that_look_alike_do_not_share_memory(tmp_path: Path) -> None:
    """Places in a state were once told apart by their joined names, and these are joined alike."""
    state = {
        "a/b": torch.tensor([1.0]),
        "a": {"b": torch.tensor([2.0])},
        "n": {1: torch.tensor([3.0]), "1": torch.tensor([4.0])},
        "n/1": torch.tensor([5.0]),
    }
    found = stored(tmp_path, **state)
    assert found == state
    assert [found["a/b"].item(), found["a"]["b"].item(), found["n"][1].item(), found["n"]["1"].item()] == [1, 2, 3, 4]


def test_weights_and_state_of_the_same_names_do_not_share_memory(tmp_path: Path) -> None:
    content = SnapshotContent(
        manifest_of(), {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}, {"w": torch.tensor([3.0])}
    )
    snapshot = write(tmp_path, content)
    assert [snapshot.weights()["w"], snapshot.state()["w"], snapshot.rank_state()["w"]] == [1, 2, 3]


TENSORS = {
    "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "strided": torch.arange(12.0)[::3],
    "expanded": torch.arange(3.0).expand(4, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "inference": None,
    "gradient": nn.Parameter(torch.randn(3)),
    "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "negative": torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
    "complex": torch.tensor([1 + 2j], dtype=torch.complex64),
    "bool": torch.tensor([True, False]),
    **{
        str(dtype): torch.tensor([1, 2, 3]).to(dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int64,
                      torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.float8_e5m2)
    },
}  # fmt: skip


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", TENSORS)
def test_every_tensor_comes_back_from_weights_and_from_state(tmp_path: Path, kind: str) -> None:
    tensor = TENSORS[kind]
    if tensor is None:
        with torch.inference_mode():
            tensor = torch.randn(3)
    snapshot = write(tmp_path, content_of(weights={"w": tensor}, s=tensor))
    snapshot.verify()
    for found in (snapshot.weights()["w"], snapshot.state()["s"]):
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(bits(found), bits(tensor))
    assert snapshot.digest() == snapshot.manifest.digest == weights_digest({"w": tensor})


def test_a_view_is_stored_without_the_memory_that_it_looks_at(tmp_path: Path) -> None:
    snapshot = write(tmp_path, content_of(s=torch.zeros(1_000_000)[:3]))
    assert snapshot.manifest.files["state.pt"]["bytes"] < 10_000


def test_sparse_state_comes_back(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    for step in (1, 2):
        found = stored(tmp_path, s=sparse, step=step)["s"]
        assert found.layout is torch.sparse_coo
        assert torch.equal(found.to_dense(), torch.eye(3))


# --- models ----------------------------------------------------------------------------------------------------------
class Model(AetherModel):
    def training_step(self, batch: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        raise NotImplementedError


class Remembering(nn.Module):
    """Has a state of its own beside its weights; as a tensor that grows, or as a dictionary."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.seen: list[float] = []

    def get_extra_state(self) -> Any:
        return torch.tensor(self.seen) if self.kind == "tensor" else {"seen": list(self.seen)}

    def set_extra_state(self, state: Any) -> None:
        self.seen = (state if self.kind == "tensor" else torch.tensor(state["seen"])).tolist()


class WithExtra(Model):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.remembering = Remembering(kind)


class Graph(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("adjacency", torch.zeros(3, 3).to_sparse())


class Views(Model):
    """Weights that share memory: wholly, partly, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("everything", torch.arange(8.0))
        self.register_buffer("first", self.everything[:5])
        self.register_buffer("last", self.everything[3:])
        self.register_buffer("square", self.everything.reshape(2, 4).t())


class Lazy(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(2)


def through_a_snapshot(folder: Path, source: Model, target: Model) -> Snapshot:
    weights, extra = model_tensors(source)
    snapshot = write(folder, content_of(weights=weights, model_extra=extra))
    restore_model(target, snapshot.weights(), snapshot.state()["model_extra"])
    return snapshot


@pytest.mark.parametrize("kind", ["tensor", "dictionary"])
def test_extra_state_of_any_size_comes_back(tmp_path: Path, kind: str) -> None:
    source, target = WithExtra(kind), WithExtra(kind)
    source.remembering.seen = [1.0, 2.0, 3.0]
    through_a_snapshot(tmp_path, source, target)
    assert target.remembering.seen == [1.0, 2.0, 3.0]
    assert torch.equal(target.layer.weight, source.layer.weight)


def test_a_sparse_buffer_comes_back(tmp_path: Path) -> None:
    source, target = Graph(), Graph()
    source.adjacency = torch.eye(3).to_sparse()
    through_a_snapshot(tmp_path, source, target)
    assert torch.equal(target.adjacency.to_dense(), torch.eye(3))


def test_weights_that_share_memory_share_it_afterwards(tmp_path: Path) -> None:
    source, target = Views(), Views()
    with torch.no_grad():
        source.everything.copy_(torch.randn(8))
    snapshot = through_a_snapshot(tmp_path, source, target)
    assert snapshot.manifest.tied == {"head.weight": "embedding.weight"}
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name
    with torch.no_grad():
        target.embedding.weight.zero_()
        target.everything.zero_()
    assert not target.head.weight.any()
    assert not target.first.any()
    assert not target.square.any()


def test_a_lazy_layer_gets_its_weights(tmp_path: Path) -> None:
    source, target = Lazy(), Lazy()
    source.layer(torch.ones(1, 5))
    through_a_snapshot(tmp_path, source, target)
    assert torch.equal(target.layer.weight, source.layer.weight)


def test_compiled_parts_have_clean_names_wherever_they_are(tmp_path: Path) -> None:
    class Nested(Model):
        def __init__(self, compiled: bool) -> None:
            super().__init__()
            inner: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
            self.net = nn.ModuleDict({"a": torch.compile(inner, backend="eager") if compiled else inner})

    source, target = Nested(True), Nested(False)
    through_a_snapshot(tmp_path, source, target)
    assert weights_digest(model_tensors(source)[0]) == weights_digest(target.state_dict())


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (WithExtra("tensor"), Views(), r"it lacks everything, first, last and 3 more; it has layer\."),
        (
            Graph(),
            WithExtra("tensor"),
            r"it lacks remembering\._extra_state; it has adjacency, which the model does not",
        ),
        (
            WithExtra("tensor"),
            Graph(),
            r"it lacks adjacency; it has remembering\._extra_state, which the model does not",
        ),
    ],
)
def test_another_model_is_told_by_its_names(tmp_path: Path, source: Model, target: Model, message: str) -> None:
    with pytest.raises(SnapshotMismatchError, match=message):
        through_a_snapshot(tmp_path, source, target)


def test_another_model_is_told_by_shapes_and_types(tmp_path: Path) -> None:
    source, target = Graph(), Graph()
    source.layer = nn.Linear(2, 3).double()
    before = weights_digest(target.layer.state_dict())
    with pytest.raises(SnapshotMismatchError, match=r"layer\.(weight|bias) is .* torch\.float64 there and .*32 here"):
        through_a_snapshot(tmp_path, source, target)
    assert weights_digest(target.layer.state_dict()) == before, "nothing was written"


# --- schedulers of schedulers -----------------------------------------------------------------------------------------
def sequential(optimizer: Any) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.MultiStepLR(optimizer, [2, 4, 4], 0.5),
             lr_scheduler.CosineAnnealingLR(optimizer, 8)]  # fmt: skip
    return lr_scheduler.SequentialLR(optimizer, parts, [3, 9])


def chained(optimizer: Any) -> Any:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(optimizer), lr_scheduler.MultiStepLR(optimizer, [2, 7])], optimizer
    )


def on_plateau(optimizer: Any) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, cooldown=1)


def averaging(optimizer: Any) -> Any:
    return SWALR(optimizer, swa_lr=0.01, anneal_epochs=9, anneal_strategy="linear")


class Falling:
    """A callable with a state: `LambdaLR` stores its attributes."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 1 / self.calls


def falling(optimizer: Any) -> Any:
    return lr_scheduler.LambdaLR(optimizer, Falling())


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("stop", range(1, 12, 2))
@pytest.mark.parametrize("make", [sequential, chained, on_plateau, averaging, falling])
def test_compound_schedulers_go_on_as_if_nothing_had_been(tmp_path: Path, make: Any, stop: int) -> None:
    def rates(optimizer: Any, scheduler: Any, steps: range) -> list[float]:
        found = []
        for step in steps:
            optimizer.step()
            scheduler.step(*([1.0 + step // 3 * 0.0] if make is on_plateau else []))
            found.append(float(optimizer.param_groups[0]["lr"]))
        return found

    def made() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.4)
        return optimizer, make(optimizer)

    whole = rates(*made(), range(14))
    optimizer, scheduler = made()
    begun = rates(optimizer, scheduler, range(stop))
    state = stored(tmp_path, optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict())
    optimizer, scheduler = made()
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    optimizer._opt_called = True
    assert begun + rates(optimizer, scheduler, range(stop, 14)) == whole


CONSTRUCTED = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_no_optimiser_is_forgotten(tmp_path: Path, name: str) -> None:
    """Whatever optimisers torch has: those that take plain parameters are stored, and continue."""
    torch.manual_seed(0)
    weight, options = torch.randn(4, 4), {"lr": 0.05}

    def made() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(weight.clone())
        return parameter, CONSTRUCTED[name]([parameter], **options)

    def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> None:
        def closure() -> float:
            optimizer.zero_grad()
            loss = (parameter**2).sum() + parameter.prod()
            loss.backward()
            if name == "SparseAdam":
                assert parameter.grad is not None
                parameter.grad = parameter.grad.to_sparse()
            return float(loss.detach())

        for _ in range(count):
            optimizer.step(closure)

    parameter, optimizer = made()
    step(parameter, optimizer, 3)
    snapshot = write(tmp_path, content_of(weights={"w": parameter}, optimizer=optimizer.state_dict()))
    other, twin = made()
    with torch.no_grad():
        other.copy_(snapshot.weights()["w"])
    twin.load_state_dict(snapshot.state()["optimizer"])
    step(parameter, optimizer, 3)
    step(other, twin, 3)
    assert torch.equal(parameter, other)


# --- writing over -----------------------------------------------------------------------------------------------------
def test_what_changes_after_save_does_not_reach_the_disk(tmp_path: Path) -> None:
    weights, nested, metrics = {"w": torch.zeros(2_000_000)}, {"list": [1], "t": torch.zeros(3)}, {"loss": 1.0}
    writer = SnapshotWriter(tmp_path)
    writer.save(SnapshotContent(manifest_of(metrics=metrics), weights, nested, {}))
    weights["w"] += 1
    nested["list"].append(2)
    nested["t"] += 1
    nested["new"] = 3
    metrics["loss"] = 2.0
    path = writer.wait()
    writer.close()
    assert path is not None
    snapshot = Snapshot(path)
    assert not snapshot.weights()["w"].any()
    assert {**snapshot.state(), "t": snapshot.state()["t"].tolist()} == {"list": [1], "t": [0, 0, 0]}
    assert snapshot.manifest.metrics == {"loss": 1.0}


def test_staging_follows_a_state_that_changes_its_shape(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path)
    shapes = [(3,), (5,), (3,), (), (2, 3)]
    for step, shape in enumerate(shapes):
        extra = {"only": torch.ones(1)} if step == 2 else {}
        writer.save(content_of(step, {"w": torch.full(shape, float(step)), **extra}, t=[torch.ones(step)] * step))
    writer.wait()
    writer.close()
    for step, shape in enumerate(shapes):
        snapshot = Snapshot(tmp_path / f"step-{step:08d}")
        snapshot.verify()
        assert torch.equal(snapshot.weights()["w"], torch.full(shape, float(step)))
        assert ("only" in snapshot.weights()) == (step == 2)
        assert [len(tensor) for tensor in snapshot.state()["t"]] == [step] * step


def test_a_snapshot_of_the_same_step_takes_the_place_of_the_one_that_is_there(tmp_path: Path) -> None:
    write(tmp_path, content_of(3, {"w": torch.zeros(2)}))
    seen: list[str] = []

    def look() -> None:  # everything but the renaming is done
        snapshot = Snapshot(tmp_path / "step-00000003")
        snapshot.verify()
        seen.append(snapshot.digest())

    new = write(tmp_path, content_of(3, {"w": torch.ones(2)}), before_commit=look)
    new.verify()
    assert seen == [weights_digest({"w": torch.zeros(2)})], "the old one goes only after the new one is there"
    assert new.weights()["w"].all()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_kill_while_one_takes_the_place_of_another_leaves_the_old_one(tmp_path: Path) -> None:
    old = write(tmp_path, content_of(3))
    old.path.rename(tmp_path / ".replaced-step-00000003")
    [found] = list_snapshots(tmp_path)
    found.verify()
    writer = SnapshotWriter(tmp_path)
    writer.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    shutil.copytree(old.path, tmp_path / ".replaced-step-00000003")
    assert [found.path for found in list_snapshots(tmp_path)] == [old.path]
    writer.clean()
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_writer_killed_at_any_instant_while_it_replaces_a_snapshot_leaves_a_good_one(tmp_path: Path) -> None:
    chance = random.Random(5)
    write(tmp_path, content_of(3))
    hit = kills = 0
    while kills < 40 or (not hit and kills < 300):
        kills += 1
        if not (pid := os.fork()):
            writer = SnapshotWriter(tmp_path)
            for number in range(100_000):
                writer.save(content_of(3, {"w": torch.full((100,), float(number))}))
        time.sleep(chance.uniform(0.01, 0.05))  # not to wait for anything: the instant of the kill
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        hit += any(path.name.startswith(".replaced-") for path in tmp_path.iterdir())
        [snapshot] = list_snapshots(tmp_path)
        snapshot.verify()
        writer = SnapshotWriter(tmp_path)
        writer.clean()
        writer.close()
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
        Snapshot(tmp_path / "step-00000003").verify()
    if not hit:
        pytest.skip(f"none of {kills} kills hit a replacement: every snapshot was whole, but that proves little")


def test_what_fails_before_the_commit_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    write(tmp_path, content_of(3))

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(SnapshotError, match="No space left on device"):
        write(tmp_path, content_of(3, {"w": torch.ones(2)}), before_commit=fail)
    Snapshot(tmp_path / "step-00000003").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_file_that_may_not_grow_is_an_error_with_a_name(tmp_path: Path) -> None:
    """A limit on the size of files, at every size: no error is lost, and nothing half-written looks whole."""
    write(tmp_path, content_of(1))
    weights = {"w": torch.randn(3000)}
    for limit in [0, 1, 100, 1000, 5000, 11_900, 12_000, 12_050, 12_200]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(SnapshotError, match=r"cannot write the snapshot .*step-00000002.*[Ff]ile too large"):
                write(tmp_path, content_of(2, weights, s=torch.randn(4000)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    write(tmp_path, content_of(2, weights)).verify()


def test_a_failed_snapshot_does_not_spoil_the_next(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path)
    (tmp_path / ".writing-step-00000001").write_text("in the way")
    writer.save(content_of(1))
    with pytest.raises(SnapshotError):
        writer.save(content_of(2))
    writer.save(content_of(2, {"w": torch.ones(2)}))
    assert writer.wait() == tmp_path / "step-00000002"
    assert writer.finished() is None
    writer.close()
    assert Snapshot(tmp_path / "step-00000002").weights()["w"].all()


def test_old_ones_that_cannot_be_removed_are_told_of_and_the_new_one_stays(tmp_path: Path) -> None:
    write(tmp_path, content_of(1))

    def tidy(path: Path) -> None:
        raise PermissionError(13, "Permission denied", "step-00000001")

    with pytest.raises(SnapshotError, match=r"step-00000002 is written, but an older one could not .*step-00000001"):
        write(tmp_path, content_of(2), committed=tidy)
    Snapshot(tmp_path / "step-00000002").verify()


def test_removing_what_is_gone_already_is_no_error(tmp_path: Path) -> None:
    remove_snapshot(tmp_path / "step-00000001")
    write(tmp_path, content_of(1))
    remove_snapshot(tmp_path / "step-00000001")
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_was_copied_without_its_empty_folders(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path / "snapshots")
    writer.clean()
    writer.save(content_of())
    assert writer.wait() is not None
    writer.close()


# --- finding ----------------------------------------------------------------------------------------------------------
def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 7):
        write(tmp_path, content_of(step))
    assert [snapshot.manifest.step for snapshot in list_snapshots(tmp_path)] == [7, 99_999_999, 100_000_000]


def test_a_copy_under_another_name_is_not_the_runs_own(tmp_path: Path) -> None:
    snapshot = write(tmp_path, content_of(7))
    for name in ("step-00000007-copy", "best", ".writing-step-00000009"):
        shutil.copytree(snapshot.path, tmp_path / name)
    (tmp_path / "step-00000008").write_text("a file")
    assert [found.path.name for found in list_snapshots(tmp_path)] == ["step-00000007"]
    assert list_snapshots(tmp_path / "nowhere") == []


def test_further_files_in_a_snapshot_do_no_harm(tmp_path: Path) -> None:
    snapshot = write(tmp_path, content_of())
    (snapshot.path / ".DS_Store").write_text("left by a file manager")
    snapshot.verify()


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "rank-0000.pt"])
def test_a_file_cut_off_anywhere_missing_or_replaced_is_named(tmp_path: Path, name: str) -> None:
    snapshot = write(tmp_path, content_of())
    file = snapshot.path / name
    whole = file.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(SnapshotDamagedError, match=f"{name} has {length} bytes instead of {len(whole)}"):
            snapshot.verify()
    file.unlink()
    with pytest.raises(SnapshotDamagedError, match=f"{name} is missing"):
        snapshot.verify()
    file.mkdir()
    with pytest.raises(SnapshotDamagedError, match=name):
        snapshot.verify()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"3", b"null", b'"text"', b"{", b"\xff\xfe", b'{"seal": 1}'])
def test_what_is_no_manifest_is_damaged(tmp_path: Path, content: bytes) -> None:
    snapshot = write(tmp_path, content_of())
    (snapshot.path / "manifest.json").write_bytes(content)
    with pytest.raises(SnapshotDamagedError, match=r"manifest\.json is damaged"):
        Snapshot(snapshot.path).verify()


def test_every_name_can_be_a_hyperparameter(tmp_path: Path) -> None:
    told = {"path": os.fsdecode(b"caf\xe9"), "name": "straße\u2028\x00", "nan": float("nan"), "big": 2**80}
    manifest = manifest_of(model={"hyperparameters": told}, metrics={"loss": float("inf")})
    snapshot = write(tmp_path, SnapshotContent(manifest, {"w": torch.zeros(1)}, {}, {}))
    found = Snapshot(snapshot.path).manifest
    assert {**found.model["hyperparameters"], "nan": None} == {**told, "nan": None}
    assert found.metrics == {"loss": float("inf")}


def test_the_report_of_damage_promises_nothing(tmp_path: Path) -> None:
    snapshot = write(tmp_path, content_of())
    (snapshot.path / "state.pt").unlink()
    reports: list[str] = []
    assert newest_good(tmp_path, reports.append) is None
    assert len(reports) == 1
    assert "state.pt is missing" in reports[0]
    assert "before it is used" not in reports[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    snapshot = write(tmp_path, content_of())
    (snapshot.path / "state.pt").chmod(stat.S_IWUSR)
    with pytest.raises(SnapshotDamagedError, match=r"state.pt cannot be read \(Permission denied\)"):
        snapshot.verify()


# --- keeping ----------------------------------------------------------------------------------------------------------
def gone(manifests: list[Manifest], keep_last: int, rules: list[KeepBest], written: int | None = None) -> list[int]:
    newest = max(manifest.step for manifest in manifests)
    found = superfluous(manifests, keep_last, rules, written=newest if written is None else written)
    return [manifest.step for manifest in found]


def test_damaged_ones_of_a_future_that_never_came_do_not_push_out_the_good_ones() -> None:
    """Steps 20 and 30 were damaged, the run went on from 10 and has just written 15: that is what must stay."""
    manifests = [manifest_of(step) for step in (5, 10, 15, 20, 30)]
    assert gone(manifests, 2, [], written=15) == [5, 20, 30]
    pinned = [*manifests[:4], manifest_of(30, pinned=True)]
    assert gone(pinned, 2, [], written=15) == [5, 20]
    best = [manifest_of(step, metrics={"loss": 1 / step}) for step in (5, 10, 15, 20, 30)]
    assert gone(best, 2, [KeepBest("loss")], written=15) == [5, 20, 30]


@given(
    steps=st.lists(st.integers(0, 40), unique=True, min_size=1, max_size=12),
    keep_last=st.integers(1, 5),
    k=st.integers(1, 4),
    mode=st.sampled_from(["min", "max"]),
    data=st.data(),
)
def test_retention_keeps_what_it_says(steps: list[int], keep_last: int, k: int, mode: Any, data: st.DataObject) -> None:
    values = st.sampled_from([None, float("nan"), float("inf"), -1.0, 0.0, 1.0, 2.0])
    manifests = []
    for step in steps:
        value = data.draw(values)
        metrics = {} if value is None else {"score": value}
        manifests.append(manifest_of(step, metrics=metrics, pinned=data.draw(st.booleans())))
    removed = set(gone(manifests, keep_last, [KeepBest("score", mode, k)]))
    kept = [manifest for manifest in manifests if manifest.step not in removed]
    assert set(sorted(steps)[-max(keep_last, 2) :]) <= {manifest.step for manifest in kept}
    assert all(manifest.step not in removed for manifest in manifests if manifest.pinned)
    scored = [m.metrics["score"] for m in manifests if m.metrics.get("score", float("nan")) == m.metrics.get("score")]
    best = sorted(scored, reverse=mode == "max")[:k]
    held = sorted((m.metrics["score"] for m in kept if m.metrics.get("score") in scored), reverse=mode == "max")
    assert held[: len(best)] == best
