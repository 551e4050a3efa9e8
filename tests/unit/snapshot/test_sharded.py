"""Files of sharded weights: read a few tensors at a time, and written in one piece. How ranks write them: test_fsdp."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from aetheria.snapshot import sharded
from aetheria.snapshot.format import weights_digest
from aetheria.snapshot.sharded import MARK, ShardFiles, WithAliases, put_back, taken_out, write_whole

TENSORS = {
    "a.weight": torch.randn(5, 3),
    "b": torch.tensor(7),
    "c.empty": torch.empty(0, 4, dtype=torch.float16),
    "d": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    "e.mask": torch.tensor([True, False]),
    "f": torch.randn(3).to(torch.bfloat16),
    "g": torch.randn(2, 2, dtype=torch.float64),
}


@pytest.fixture
def files(tmp_path: Path) -> ShardFiles:
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")
    return ShardFiles(tmp_path)


@pytest.mark.parametrize("at_once", [1, 40, 1 << 20])
def test_tensors_are_read_a_few_at_a_time(files: ShardFiles, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(sharded, "_AT_ONCE", at_once)
    assert list(files) == sorted(TENSORS)
    for name, expected in TENSORS.items():
        assert torch.equal(files[name], expected)
        held = sum(tensor.nbytes for tensor in files._held.values())
        assert held <= max(at_once, expected.nbytes)
    assert weights_digest(files) == weights_digest(TENSORS)


def test_each_is_read_into_the_place_that_is_given(files: ShardFiles) -> None:
    places = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    read = files.read(lambda name, shape, dtype: places[name].view(shape).to(dtype))
    for name, tensor in TENSORS.items():
        assert read[name].data_ptr() == places[name].data_ptr()
        assert torch.equal(places[name], tensor)


def test_one_file_holds_them_all(files: ShardFiles, tmp_path: Path) -> None:
    path = tmp_path / "whole" / "model.safetensors"
    path.parent.mkdir()
    about = write_whole(path, files)
    assert about["bytes"] == path.stat().st_size
    found = safetensors.torch.load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_second_name_is_the_same_tensor() -> None:
    tied = WithAliases(TENSORS, {"head": "a.weight"})
    assert len(tied) == len(TENSORS) + 1
    assert weights_digest(tied) == weights_digest(TENSORS | {"head": TENSORS["a.weight"]})


def test_marks_are_replaced_wherever_they_stand() -> None:
    state = {"optimizer": {"state": {0: {"average": {MARK: "x"}, "step": 3}}}, "rest": [({MARK: "y"},), "text"]}
    x, y = torch.ones(1), torch.ones(2)
    assert put_back(state, {"x": x, "y": y}) == {
        "optimizer": {"state": {0: {"average": x, "step": 3}}},
        "rest": [(y,), "text"],
    }
    assert taken_out(state) == (state, {})
