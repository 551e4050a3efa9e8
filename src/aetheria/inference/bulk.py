"""A file of samples in, a file of predictions out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aetheria.errors import AetheriaError, DataError, ModelError
from aetheria.inference.files import FORMATS, NumberType, prepare_output, read_inputs, write_predictions
from aetheria.inference.nested import check_rows, named_leaves
from aetheria.inference.predictor import Predictor

__all__ = ["predict_file"]


def predict_file(
    predictor: Predictor,
    source: Path,
    output: Path,
    *,
    columns: Sequence[str] = (),
    dtype: NumberType | None = None,
    batch_size: int = 64,
    force: bool = False,
    progress: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Predicts every sample of a file, and writes the predictions in the same order into another.

    Inputs and predictions are held in memory. For the formats see `aetheria.inference.files`.

    Args:
        predictor: who is asked.
        source: the samples.
        output: the predictions. A single one is called "prediction", those of a dictionary by its keys.
        columns: of the source, if not all that hold numbers.
        dtype: what the source's numbers are converted to.
        batch_size: samples that are computed at once.
        force: whether an output that exists may be replaced.
        progress: whether a terminal is shown a bar.

    Returns:
        The shapes of the predictions by name, [samples, ...] each.

    Raises:
        DataError: a file cannot be read or written, or the model cannot take what is in it.
        ModelError: the predictions are no rows of numbers or strings, one for each sample.
    """
    prepare_output(output, FORMATS, force)
    inputs = read_inputs(source, columns, dtype)
    parts: dict[str, list[NDArray[Any]]] = {}
    try:
        for predictions, size in predictor.predict_batches(inputs, batch_size, progress):
            found = named_leaves(predictions, "prediction", lambda value: isinstance(value, list))
            if parts and found.keys() != parts.keys():
                raise ModelError(f"predict_step returned {', '.join(parts)} at first, and then {', '.join(found)}.")
            for name, leaf in found.items():
                parts.setdefault(name, []).append(_array(name, leaf, size))
    except AetheriaError:
        raise
    except Exception as error:
        details = "; ".join(getattr(error, "__notes__", ()))
        raise DataError(
            f"{source}: the model cannot take what is in it: {type(error).__name__}: {error} ({details}). "
            "Choose the right columns, or the type that it takes: float32, or int64 for indices."
        ) from error
    try:
        arrays = {name: np.concatenate(rows) for name, rows in parts.items()}
    except ValueError as error:
        raise ModelError(f"the predictions of different batches have different shapes: {error}.") from error
    write_predictions(output, arrays)
    return {name: array.shape for name, array in arrays.items()}


def _array(name: str, leaf: Any, size: int) -> NDArray[Any]:
    if not isinstance(leaf, Tensor | np.ndarray | list):
        raise ModelError(f"{name} is a {type(leaf).__name__}; a file holds tensors, arrays, and lists of strings.")
    check_rows(leaf, size)
    if isinstance(leaf, Tensor):
        # NumPy knows no bfloat16, and few programs read half precision from a file.
        leaf = leaf.float() if leaf.dtype in (torch.bfloat16, torch.float16) else leaf
        array: NDArray[Any] = leaf.numpy()
    else:
        array = np.asarray(leaf)
    if array.dtype.kind not in "biufU":
        raise ModelError(f"{name} has the type {array.dtype}; a file holds real numbers and strings.")
    return array
