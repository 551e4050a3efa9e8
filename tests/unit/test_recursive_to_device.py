"""Every kind of batch arrives whole: the same types, the same structure, every tensor on the device."""

from __future__ import annotations

import collections
import dataclasses
import types
from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from aetheria.core import recursive_to_device


def moved(batch: Any) -> Any:
    return recursive_to_device(batch, "meta")


def on_meta(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "meta" for tensor in tensors)


class Pair(NamedTuple):
    image: Tensor
    label: int


Point = collections.namedtuple("Point", "x y")


@dataclass
class Plain:
    x: Tensor
    name: str = "plain"
    parts: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: float = 2.0


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    x: Tensor
    length: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", self.length + 1)  # counts how often it ran


@dataclass(slots=True)
class Late:
    x: Tensor
    found: Tensor = field(init=False)


class Encoding(UserDict[str, Any]):
    """What Transformers' BatchEncoding looks like: a mapping with a `to` of its own."""

    def to(self, device: str) -> Encoding:
        return Encoding({key: value.to(device) for key, value in self.data.items()})


class Tagged(dict[str, Any]):
    tag = "none"


class Labelled(list[Tensor]):
    pass


def test_tensors_in_dictionaries_lists_and_tuples_arrive_in_the_same_structure() -> None:
    batch = {"x": torch.ones(2), "more": [torch.zeros(1), (torch.zeros(3), "text", None)], 7: 1.5}
    found = moved(batch)
    assert list(found) == ["x", "more", 7]
    assert on_meta(found["x"], found["more"][0], found["more"][1][0])
    assert found["more"][1][1:] == ("text", None)
    assert type(found["more"]) is list
    assert type(found["more"][1]) is tuple
    assert batch["x"].device.type == "cpu", "the batch that was given must stay as it is"


@pytest.mark.parametrize("value", ["text", b"bytes", 3, 2.5, True, None, range(3), {1, 2}, object])
def test_what_holds_no_tensor_passes_through(value: Any) -> None:
    assert moved(value) is value
    assert moved([value])[0] is value


def test_a_tensor_that_is_there_already_is_not_copied() -> None:
    tensor = torch.ones(3)
    assert recursive_to_device(tensor, "cpu") is tensor
    assert recursive_to_device([tensor], torch.device("cpu"))[0] is tensor


def test_named_tuples() -> None:
    pair = moved(Pair(torch.ones(2, 3), 4))
    assert type(pair) is Pair
    assert on_meta(pair.image)
    assert pair.label == 4
    point = moved(Point(torch.ones(1), [torch.ones(1)]))
    assert type(point) is Point
    assert on_meta(point.x, point.y[0])
    largest = moved(torch.ones(2, 2).max(0))
    assert type(largest) is torch.return_types.max
    assert on_meta(largest.values, largest.indices)


def test_a_dataclass_keeps_its_type_and_everything_that_is_no_tensor() -> None:
    batch = Plain(torch.ones(2), "mine", [torch.zeros(1)])
    found = moved(batch)
    assert type(found) is Plain
    assert found.name == "mine"
    assert on_meta(found.x, found.parts[0])
    assert batch.x.device.type == batch.parts[0].device.type == "cpu"


def test_a_frozen_dataclass() -> None:
    found = moved(Frozen(torch.ones(2), 3.0))
    assert type(found) is Frozen
    assert on_meta(found.x)
    assert found.scale == 3.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.scale = 1.0


def test_post_init_does_not_run_again() -> None:
    batch = FrozenSlots(torch.ones(2))
    assert batch.length == 0
    found = moved(batch)
    assert on_meta(found.x)
    assert found.length == 0


def test_a_field_that_was_never_set_stays_unset() -> None:
    found = moved(Late(torch.ones(1)))
    assert on_meta(found.x)
    assert not hasattr(found, "found")


def test_a_dataclass_itself_is_not_an_instance() -> None:
    assert moved(Frozen) is Frozen


def test_a_packed_sequence() -> None:
    packed = moved(pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]))
    assert isinstance(packed, PackedSequence)
    assert on_meta(packed.data)


def test_whatever_has_a_to_is_asked() -> None:
    found = moved({"tokens": Encoding(ids=torch.ones(2, 3))})
    assert type(found["tokens"]) is Encoding
    assert on_meta(found["tokens"]["ids"])


def test_mappings_of_other_kinds_stay_what_they_are() -> None:
    ordered = moved(OrderedDict(b=torch.ones(1), a=torch.ones(1)))
    assert type(ordered) is OrderedDict
    assert list(ordered) == ["b", "a"]
    by_default = moved(defaultdict(list, x=torch.ones(1)))
    assert type(by_default) is defaultdict
    assert by_default["new"] == []
    assert on_meta(by_default["x"], ordered["a"])
    proxy = moved(types.MappingProxyType({"x": torch.ones(1)}))
    assert type(proxy) is types.MappingProxyType
    assert on_meta(proxy["x"])
    tagged = Tagged(x=torch.ones(1))
    tagged.tag = "mine"
    found = moved(tagged)
    assert type(found) is Tagged
    assert found.tag == "mine"
    assert tagged["x"].device.type == "cpu"
    assert on_meta(found["x"])


def test_a_list_of_another_kind_stays_what_it_is() -> None:
    found = moved(Labelled([torch.ones(1)]))
    assert type(found) is Labelled
    assert on_meta(found[0])


def test_sparse_tensors() -> None:
    sparse = torch.eye(3).to_sparse()
    assert on_meta(moved(sparse))
    assert moved([sparse])[0].layout is torch.sparse_coo
    assert recursive_to_device(sparse, "cpu") is sparse


def test_a_parameter_keeps_its_gradient() -> None:
    weight = torch.ones(2, requires_grad=True)
    assert recursive_to_device(weight, "cpu") is weight
    assert moved({"w": weight})["w"].requires_grad


def test_a_network_moves_as_a_whole() -> None:
    assert on_meta(*moved([torch.nn.Linear(2, 2)])[0].parameters())
