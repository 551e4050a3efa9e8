"""Batches and predictions are nestings: dictionaries, lists, tuples and dataclasses, with tensors as their leaves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from aetheria.errors import DataError, ModelError

__all__ = ["as_tensors", "check_rows", "collate", "describe", "map_leaves", "named_leaves", "sample_at"]


def map_leaves(value: Any, function: Callable[[Any], Any], is_leaf: Callable[[Any], bool] = lambda _: False) -> Any:
    """Returns the same nesting with every leaf replaced by what the function returns for it.

    Args:
        value: dictionaries, lists, tuples, named tuples and dataclasses are gone through; all else is a leaf.
        function: called with each leaf.
        is_leaf: asked first; what it says yes to is a leaf, whatever it is.
    """
    if is_leaf(value):
        return function(value)
    if isinstance(value, Mapping):
        mapped = {key: map_leaves(item, function, is_leaf) for key, item in value.items()}
        return mapped if type(value) is dict else type(value)(mapped)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(item, function, is_leaf) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(item, function, is_leaf) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)  # not dataclasses.replace: that would run __post_init__ again
        for field in dataclasses.fields(value):
            object.__setattr__(changed, field.name, map_leaves(getattr(value, field.name), function, is_leaf))
        return changed
    return function(value)


def named_leaves(value: Any, name: str, is_leaf: Callable[[Any], bool] = lambda _: False) -> dict[str, Any]:
    """Returns the leaves by name: keys and fields joined with dots, positions behind an underscore.

    Args:
        value: a nesting.
        name: what a leaf is called that has neither key nor field.
        is_leaf: as in `map_leaves`.
    """

    def found(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            value = dict(zip(value._fields, value, strict=True))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if is_leaf(value) or not isinstance(value, Mapping | list | tuple):
            yield path or name, value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from found(item, f"{path}.{key}" if path else str(key))
        else:
            for index, item in enumerate(value):
                yield from found(item, f"{path or name}_{index}")

    return dict(found(value, ""))


# --- into tensors ----------------------------------------------------------------------------------------------------


def as_tensors(value: Any, floating: torch.dtype, *, numbers: bool = False) -> Any:
    """Returns the nesting with every array, and every list of numbers, as one tensor.

    Floating-point numbers take the type `floating`; whole numbers and booleans keep theirs. Tensors stay as they are.

    Args:
        value: a batch or a sample.
        floating: the model's own type.
        numbers: whether single numbers become tensors too.

    Raises:
        DataError: a list of numbers is ragged, or an array holds something else than numbers.
    """

    def is_leaf(item: Any) -> bool:
        return isinstance(item, list) and _begins_with_a_number(item)

    def converted(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic | list) or (numbers and isinstance(leaf, int | float)):
            return _tensor(leaf, floating)
        return leaf

    return map_leaves(value, converted, is_leaf)


def _begins_with_a_number(value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, int | float | np.generic)


def _tensor(value: Any, floating: torch.dtype) -> Tensor:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"found a ragged list of numbers, expected rows of one length ({error}).") from None
    if array.dtype.kind not in "biufc":
        raise DataError(
            f"found {'a list' if isinstance(value, list) else 'an array'} of NumPy type {array.dtype}, expected "
            "numbers. Turn it into numbers first."
        )
    # torch takes no foreign byte order, no negative strides, and warns of memory that it may not write.
    tensor = torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    return tensor.to(floating) if tensor.is_floating_point() else tensor


def collate(samples: Sequence[Any]) -> Any:
    """Returns samples as one batch, put together as a DataLoader does it by default.

    Raises:
        DataError: they do not go together.
    """
    try:
        return default_collate(list(samples))
    except (TypeError, RuntimeError, KeyError) as error:
        raise DataError(
            f"these samples do not go into one batch: {error}. Give them one shape, or put them through a DataLoader "
            "with a collate_fn."
        ) from error


# --- out of batches --------------------------------------------------------------------------------------------------


def sample_at(predictions: Any, index: int, size: int) -> Any:
    """Returns one sample's part of a batch of predictions, in the same nesting, without the batch dimension.

    Args:
        predictions: of a batch; a list in them holds one item for each sample.
        index: of the sample.
        size: of the batch.

    Raises:
        ModelError: a part of the predictions has not as many rows as there are samples.
    """

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor | np.ndarray | list):
            return leaf
        check_rows(leaf, size)
        return leaf[index]

    return map_leaves(predictions, part, lambda value: isinstance(value, list))


def check_rows(leaf: Tensor | NDArray[Any] | list[Any], size: int) -> None:
    """Raises a `ModelError` unless there is one row, or one item of a list, for each sample of a batch."""
    if isinstance(leaf, list):
        if len(leaf) != size:
            raise ModelError(
                f"predict_step returned a list of {len(leaf)} for a batch of {size}; a list holds one item for each "
                "sample. Return several predictions of a sample as a tuple or a dictionary."
            )
    elif leaf.ndim == 0 or leaf.shape[0] != size:
        raise ModelError(
            f"predict_step returned the shape {list(leaf.shape)} for a batch of {size}, expected {size} rows. "
            "Let the first dimension be the batch; for the prediction as a whole call predict(batch)."
        )


def describe(batch: Any) -> str:
    """Returns types and shapes in a batch, for messages: "float32 [32, 10]", or by name where there are several."""

    def described(leaf: Any) -> str:
        if isinstance(leaf, Tensor | np.ndarray):
            return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
        return type(leaf).__name__

    leaves = {name: described(leaf) for name, leaf in named_leaves(batch, "batch").items()}
    return leaves["batch"] if list(leaves) == ["batch"] else ", ".join(f"{n}: {text}" for n, text in leaves.items())
