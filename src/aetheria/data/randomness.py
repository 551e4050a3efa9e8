"""Randomness that is keyed rather than carried: torch's, NumPy's and Python's generators, seeded, saved, borrowed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["GeneratorStates", "GeneratorStream", "isolated_generators", "kept_generators", "seed_generators"]


def seed_generators(key: int) -> None:
    """Seeds the global CPU generators of torch, NumPy and Python from one 64-bit key.

    Devices are left alone: `torch.manual_seed` would also seed CUDA, which a data-loading worker must not touch.
    """
    torch.default_generator.manual_seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    random.seed(key)


@dataclass(frozen=True)
class GeneratorStates:
    """The states of the three global CPU generators at one moment."""

    torch_state: Tensor
    numpy_state: tuple[Any, ...]
    python_state: tuple[Any, ...]

    @classmethod
    def capture(cls) -> GeneratorStates:
        """Returns the states as they are now."""
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate())  # type: ignore[arg-type]

    def restore(self) -> None:
        """Puts the generators back to where they were."""
        torch.set_rng_state(self.torch_state)
        np.random.set_state(self.numpy_state)
        random.setstate(self.python_state)

    def to_plain(self) -> dict[str, Any]:
        """Returns the states as plain containers and tensors, which load with `weights_only=True`."""
        name, keys, position, has_gauss, cached = self.numpy_state
        version, internal, gauss = self.python_state
        return {
            "torch": self.torch_state,
            "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
            "python": [version, list(internal), gauss],
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> GeneratorStates:
        """Takes back what `to_plain` returned."""
        name, keys, position, has_gauss, cached = plain["numpy"]
        version, internal, gauss = plain["python"]
        numpy_state = (name, keys.numpy().astype(np.uint32), position, has_gauss, cached)
        return cls(plain["torch"].clone(), numpy_state, (version, tuple(internal), gauss))


@contextmanager
def kept_generators() -> Iterator[None]:
    """Runs a block that may do with the global generators what it likes: afterwards they are as they were."""
    before = GeneratorStates.capture()
    try:
        yield
    finally:
        before.restore()


@contextmanager
def isolated_generators(key: int) -> Iterator[None]:
    """Runs a block on generators seeded by `key`, and leaves the global ones as they were."""
    with kept_generators():
        seed_generators(key)
        yield


class GeneratorStream:
    """A stream of randomness of its own, for code that draws from the global generators a little at a time."""

    def __init__(self, key: int) -> None:
        with isolated_generators(key):
            self.states = GeneratorStates.capture()

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Runs a block on this stream; the global generators are not moved by it."""
        with kept_generators():
            self.states.restore()
            try:
                yield
            finally:
                self.states = GeneratorStates.capture()
