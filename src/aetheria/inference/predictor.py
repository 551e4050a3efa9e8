"""The Predictor: answers, from the first to the last sample, with what a run has learnt."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from aetheria.accelerator.select import best_device
from aetheria.core import AetherModel, recursive_to_device
from aetheria.data.sources import batch_size_of
from aetheria.errors import ConfigError, DataError, ModelError
from aetheria.inference.loading import build_model, load_weights, open_weights
from aetheria.inference.nested import as_tensors, collate, describe, map_leaves, sample_at
from aetheria.runs import RunFolder
from aetheria.snapshot import KeepBest, Snapshot

__all__ = ["Predictor"]


class Predictor:
    """A trained model that answers: in evaluation and inference mode, from as many threads as there are.

    ```python
    predictor = Predictor("runs/digits-20250101-120000-ab12")
    probabilities = predictor.predict(images)         # a batch
    probabilities = predictor.predict_one(image)      # a sample
    for probabilities in predictor.predict_many(samples): ...
    ```

    Inputs are tensors, NumPy arrays, lists of numbers, and dictionaries, lists, tuples and dataclasses of them.
    Floating-point numbers from arrays and lists are converted to the model's type, whole numbers and booleans keep
    theirs; tensors are taken as they are. What the model's `predict_step` returns comes back in host memory, in the
    same nesting, and shares no memory with the model. In it a list stands for one item per sample, whereas a tuple or
    a dictionary stands for several predictions of the whole batch.

    Threads take turns in `predict_step`, so that even a model that writes on itself gives everyone the right answer.

    Args:
        source: a run folder (its newest good snapshot is taken), a snapshot, or a .safetensors file. Hashes are
            checked before anything is used. A damaged snapshot is named in a warning, and the one before it is used.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the fastest one here.
        best: takes, instead of a run's newest snapshot, its best by this metric, for instance "val_loss".
        mode: whether "min" or "max" of that metric is best.
        model: the model itself, or its class, where it was not registered. An instance is taken over: its weights are
            replaced, it is moved to the device and stays in evaluation mode.
        model_name: a registered name, where the source does not say it.
        model_params: constructor arguments that complete or replace the stored ones.
        checkpoint_path: the same as `source`.
        plugins: the folder of the user's plugins. Without it they are looked for beside the configuration that the
            run was trained with, and in the working directory; never in the run folder itself, so that a run folder
            that somebody sends cannot run code.

    Attributes:
        model: the model.
        device: where it computes.
        path: the snapshot or file that the weights are from.
        snapshot: the snapshot, or None where a file was given.

    Raises:
        SnapshotError: the source does not exist, is damaged, or is of another model.
        RegistryError: the model has no name, or nobody registered it.
        ConfigError: arguments are missing, do not fit, or the device is not to be had.
        ModelError: the model cannot predict.
        PluginError: a plugin raised.
    """

    def __init__(
        self,
        source: str | Path | RunFolder | Snapshot | None = None,
        device: str | torch.device = "cpu",
        *,
        best: str | None = None,
        mode: Literal["min", "max"] | None = None,
        model: AetherModel | type[AetherModel] | None = None,
        model_name: str | None = None,
        model_params: Mapping[str, Any] | None = None,
        checkpoint_path: str | Path | None = None,
        plugins: str | Path | None = None,
    ) -> None:
        origin = checkpoint_path if source is None else source
        if origin is None or (source is not None and checkpoint_path is not None):
            raise ConfigError(
                "found neither or both of source and checkpoint_path, expected one: where the weights are."
            )
        if model is not None and model_name is not None:
            raise ConfigError("found both model and model_name, expected one of them. Leave one out.")
        stored = open_weights(origin, _rule(best, mode))
        self.device = torch.device(best_device() if device == "auto" else _device(device))
        self.model = build_model(stored, model, model_name, model_params, None if plugins is None else Path(plugins))
        self.path = stored.path
        self.snapshot = stored.snapshot
        _check_can_predict(self.model)
        load_weights(self.model, stored)
        try:
            self.model.to(self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(
                f"device {str(device)!r} was asked for, but the model cannot be moved there: {error} "
                "'auto' takes the fastest device of this machine; `aetheria doctor` lists them."
            ) from error
        self.model.eval()
        self._lock = threading.Lock()
        self._floating = next(
            (tensor.dtype for tensor in self.model.parameters() if tensor.is_floating_point()),
            torch.get_default_dtype(),
        )

    def __repr__(self) -> str:
        return f"Predictor({type(self.model).__name__} from {self.path} on {self.device})"

    def predict(self, batch: Any) -> Any:
        """Returns the predictions of a batch: what `predict_step` returns, in host memory.

        Args:
            batch: the first dimension of every tensor in it is the batch.

        Raises:
            DataError: the batch cannot be turned into tensors. What the model raises passes through, with a note
                that says what it was given.
        """
        batch = recursive_to_device(as_tensors(batch, self._floating), self.device)
        try:
            with self._lock, torch.inference_mode():
                predictions = self.model.predict_step(batch)
        except Exception as error:
            error.add_note(f"{type(self.model).__name__}.predict_step was given {describe(batch)}")
            raise
        # Copied outside of inference mode: a tensor made within could not be used in anybody's gradient.
        return map_leaves(predictions, lambda leaf: leaf.to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf)

    def predict_one(self, sample: Any) -> Any:
        """Returns the predictions of one sample: the batch dimension is added before and removed after.

        Args:
            sample: an item as a data set holds it, without the batch dimension. A single number in it is a part of
                the sample, and becomes a tensor.

        Raises:
            DataError: the sample cannot be turned into a batch of one.
            ModelError: the predictions have no batch dimension.
        """
        batch = collate([as_tensors(sample, self._floating, numbers=True)])
        return sample_at(self.predict(batch), 0, 1)

    def predict_many(self, source: Any, batch_size: int = 64, progress: bool = True) -> Iterator[Any]:
        """Yields the predictions of each sample, in order, while going through the source batch by batch.

        Args:
            source: an array or a tensor, whose rows are the samples; a dictionary of them; a data set; any iterable
                of samples; or a DataLoader, whose batches are taken as they are.
            batch_size: how many samples are computed at once; a DataLoader has its own.
            progress: whether to show a bar, if there is a terminal to show it on.

        Raises:
            DataError: the samples do not go into batches.
            ModelError: the predictions have not one row for each sample.
        """
        for predictions, size in self.predict_batches(source, batch_size, progress):
            for index in range(size):
                yield sample_at(predictions, index, size)

    def predict_batches(self, source: Any, batch_size: int = 64, progress: bool = True) -> Iterator[tuple[Any, int]]:
        """Yields the predictions of each batch and the number of samples in it; otherwise as `predict_many`."""
        if batch_size < 1:
            raise ConfigError(f"found batch_size={batch_size}, expected 1 or more.")
        console = Console(stderr=True)
        yield from track(
            ((self.predict(batch), size) for batch, size in self._batches(source, batch_size)),
            description="predicting",
            total=_number_of_batches(source, batch_size),
            console=console,
            transient=True,
            disable=not (progress and console.is_terminal),
        )

    def _batches(self, source: Any, batch_size: int) -> Iterator[tuple[Any, int]]:
        if isinstance(source, DataLoader):
            for batch in source:
                yield batch, batch_size_of(batch)
        elif isinstance(source, np.ndarray | Tensor | Mapping):
            length = _common_length(source)
            for start in range(0, length, batch_size):
                yield _rows(source, start, start + batch_size), min(batch_size, length - start)
        else:
            samples = _samples(source)
            while chunk := list(itertools.islice(samples, batch_size)):
                yield collate([as_tensors(sample, self._floating, numbers=True) for sample in chunk]), len(chunk)


def _rule(best: str | None, mode: Literal["min", "max"] | None) -> KeepBest | None:
    if (best is None) != (mode is None) or mode not in (None, "min", "max"):
        raise ConfigError(
            f"found best={best!r} and mode={mode!r}, expected a metric and whether 'min' or 'max' of it is best."
        )
    return None if best is None or mode is None else KeepBest(best, mode)


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"found the device {device!r}, expected 'auto', 'cpu', 'cuda', 'cuda:1', 'mps': {error}"
        ) from None


def _check_can_predict(model: AetherModel) -> None:
    kind = type(model)
    if (
        kind.predict_step is AetherModel.predict_step
        and kind.forward is nn.Module.forward
        and "forward" not in vars(model)
    ):
        raise ModelError(
            f"{kind.__name__} has neither `predict_step` nor `forward`, so it can be trained but not asked. "
            "Add one of them; the weights fit as long as the layers keep their names."
        )


def _samples(source: Any) -> Iterator[Any]:
    if isinstance(source, Iterable) and not isinstance(source, str | bytes):
        return iter(source)
    if isinstance(source, Sized) and hasattr(source, "__getitem__") and not isinstance(source, str | bytes):
        # A data set by index. Python would iterate it until it raises IndexError, which not every one does.
        return (source[index] for index in range(len(source)))
    raise DataError(
        f"found {type(source).__name__} to predict, expected an array, a tensor, a dictionary of them, a data set, an "
        "iterable of samples, or a DataLoader."
    )


def _common_length(source: Any) -> int:
    """Returns the number of rows of arrays and tensors."""
    lengths = set()
    for leaf in source.values() if isinstance(source, Mapping) else [source]:
        if not isinstance(leaf, np.ndarray | Tensor) or leaf.ndim == 0:
            raise DataError(
                f"found {describe(source)}, expected arrays or tensors whose first dimension is the samples."
            )
        lengths.add(int(leaf.shape[0]))
    if len(lengths) != 1:
        raise DataError(f"found arrays of {sorted(lengths)} rows, expected one row for each sample in all of them.")
    return lengths.pop()


def _rows(source: Any, start: int, stop: int) -> Any:
    return map_leaves(source, lambda leaf: leaf[start:stop])


def _number_of_batches(source: Any, batch_size: int) -> float | None:
    try:
        if isinstance(source, DataLoader):
            return len(source)
        length = _common_length(source) if isinstance(source, np.ndarray | Tensor | Mapping) else len(source)
    except TypeError:  # an iterable that does not know its length
        return None
    return -(-length // batch_size)
