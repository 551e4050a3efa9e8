"""A trained model as a file for other programs: safetensors, TorchScript or ONNX, compared with the model itself."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from aetheria.engine.state import describe_model
from aetheria.errors import AetheriaError, MissingDependencyError, ModelError
from aetheria.inference.files import NumberType, prepare_output, write_output
from aetheria.inference.loading import METADATA
from aetheria.inference.nested import as_tensors, describe, map_leaves, named_leaves
from aetheria.inference.predictor import Predictor
from aetheria.snapshot import weights_digest
from aetheria.snapshot.format import find_tied, model_tensors

__all__ = ["ExportFormat", "Exported", "example_of_shape", "export_model"]

ExportFormat = Literal["safetensors", "torchscript", "onnx"]

_ENDINGS: dict[ExportFormat, tuple[str, ...]] = {
    "safetensors": (".safetensors",),
    "torchscript": (".pt", ".pts", ".ts", ".torchscript"),
    "onnx": (".onnx",),
}
_LARGEST_ONNX = 2**31 - 1  # bytes; a protocol buffer holds no more
_RELATIVE_TOLERANCE, _ABSOLUTE_TOLERANCE = 1e-3, 1e-4
Runner = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: the file.
        inputs: the tensors it takes by name, as "float32 [batch, 10]"; empty for safetensors.
        outputs: those it returns, likewise.
        difference: the largest absolute difference between its outputs and the model's; None where nothing was run.
    """

    path: Path
    inputs: dict[str, str]
    outputs: dict[str, str]
    difference: float | None


def export_model(
    predictor: Predictor, form: ExportFormat, output: Path, example: Any = None, *, force: bool = False
) -> Exported:
    """Writes a model into one file, in one instant.

    - safetensors: the weights, with name and hyperparameters of the model, so that `Predictor(file)` works.
    - torchscript: `predict_step` as torch.jit.trace records it. It runs without Python; torch calls it deprecated.
    - onnx: `predict_step` as torch.export sees it, for any runtime.

    The last two take any number of samples, but otherwise the shapes of the example. They are read back and compared
    with the model, on the example and on a batch of another size, before the file is written.

    Args:
        predictor: holds the model, on the CPU.
        form: the format.
        output: the file.
        example: a batch such as the model takes in predictions, of tensors or arrays; for safetensors not needed.
        force: whether a file that exists may be replaced.

    Raises:
        DataError: the file cannot be written.
        MissingDependencyError: ONNX was asked for without its packages.
        ModelError: torch cannot export the model, or what it exported does not compute the same.
    """
    prepare_output(output, _ENDINGS[form], force)
    if form == "safetensors":
        write_output(output, _safetensors(predictor))
        return Exported(output, {}, {}, None)
    if example is None:
        raise ModelError(f"{form} records what the model does with an example, and there is none. Give one.")
    try:
        model = _TensorsOnly(predictor, example)
        content, run = (_torchscript if form == "torchscript" else _onnx)(model)
        difference = _difference(model, run)
    except AetheriaError:
        raise
    except Exception as error:
        raise ModelError(
            f"torch cannot export {type(predictor.model).__name__} as {form}, given {describe(example)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    write_output(output, content)
    return Exported(output, _described(model.inputs), _described(model.outputs), difference)


def example_of_shape(shape: Sequence[int], dtype: NumberType = "float32") -> Tensor:
    """Returns a batch of two random samples, the same every time: normally distributed, or zeros and ones for int64.

    Args:
        shape: of one sample, without the batch dimension.
        dtype: "float32" or "int64".
    """
    generator = torch.Generator().manual_seed(0)
    if dtype == "int64":
        return torch.randint(0, 2, (2, *shape), generator=generator)
    return torch.randn(2, *shape, generator=generator)


class _TensorsOnly(nn.Module):
    """The model as exported formats see it: tensors in, a tensor or a tuple of tensors out.

    Attributes:
        batch: an example of two samples, in the nesting that the model takes.
        inputs: its tensors by name.
        outputs: the tensors of its predictions by name.
    """

    def __init__(self, predictor: Predictor, example: Any) -> None:
        super().__init__()
        self.model = predictor.model
        floating = next((each.dtype for each in self.model.parameters() if each.is_floating_point()), torch.float32)
        # Two samples: torch takes what is one in the example for one in every batch.
        self.batch = map_leaves(as_tensors(example, floating), lambda leaf: _rows(leaf, 2))
        self.inputs: dict[str, Tensor] = named_leaves(self.batch, "input")
        self.outputs = named_leaves(predictor.predict(self.batch), "prediction")
        if odd := [name for name, leaf in {**self.inputs, **self.outputs}.items() if not isinstance(leaf, Tensor)]:
            raise ModelError(f"{', '.join(odd)} is no tensor; exported models take and return nothing else.")
        self.eval()

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Returns the predictions as a tensor, or a tuple of them in the order of their names."""
        remaining = iter(tensors)
        predictions = self.model.predict_step(map_leaves(self.batch, lambda _: next(remaining)))
        found = tuple(named_leaves(predictions, "prediction").values())
        return found[0] if len(found) == 1 else found


def _rows(leaf: Any, count: int) -> Any:
    if not isinstance(leaf, Tensor) or leaf.ndim == 0 or not len(leaf):
        raise ModelError(f"found {describe(leaf)} in the example, expected tensors whose first dimension is the batch.")
    return leaf[torch.arange(count) % len(leaf)]


def _difference(model: _TensorsOnly, run: Runner) -> float:
    """Returns the largest absolute difference between what was exported and the model, which must be small."""
    largest = 0.0
    for count in (2, 3):
        tensors = [_rows(leaf, count) for leaf in model.inputs.values()]
        with torch.inference_mode():
            expected = model(*tensors)
        pairs = zip([expected] if isinstance(expected, Tensor) else expected, run(tensors), strict=True)
        for name, (ours, theirs) in zip(model.outputs, pairs, strict=True):
            if ours.shape != theirs.shape:
                raise ModelError(
                    f"the exported model returns {name} of shape {list(theirs.shape)} for {count} samples, the model "
                    f"itself {list(ours.shape)}. Its predict_step depends on the batch size in a way that was not "
                    "recorded: compute shapes from the batch, without Python numbers."
                )
            ours, theirs = ours.double(), theirs.double()
            if not torch.allclose(theirs, ours, _RELATIVE_TOLERANCE, _ABSOLUTE_TOLERANCE, equal_nan=True):
                raise ModelError(
                    f"the exported model's {name} differs from the model's own by up to {_largest(ours, theirs):.3g}. "
                    "Its predict_step does something that was not recorded, such as drawing random numbers or "
                    "deciding on values in Python."
                )
            largest = max(largest, _largest(ours, theirs))
    return largest


def _largest(ours: Tensor, theirs: Tensor) -> float:
    difference = (ours - theirs).abs().nan_to_num(0.0)  # infinities that agree; others were refused
    return float(difference.max()) if difference.numel() else 0.0


def _described(tensors: dict[str, Tensor]) -> dict[str, str]:
    def text(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} [{', '.join(['batch', *map(str, tensor.shape[1:])])}]"

    return {name: text(tensor) for name, tensor in tensors.items()}


# --- formats ---------------------------------------------------------------------------------------------------------


def _safetensors(predictor: Predictor) -> bytes:
    tensors, extra = model_tensors(predictor.model)
    if extra:
        raise ModelError(f"the model keeps extra state ({', '.join(extra)}), which a .safetensors file cannot hold.")
    about: dict[str, Any] = {"model": describe_model(predictor.model), "digest": weights_digest(tensors)}
    if predictor.snapshot is not None:
        manifest = predictor.snapshot.manifest
        about |= {"run_id": manifest.run_id, "step": manifest.step, "metrics": manifest.metrics}
    tied = find_tied(tensors)
    unique = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if name not in tied}
    return safetensors.torch.save(unique, {"format": "pt", METADATA: json.dumps(about)})


def _torchscript(model: _TensorsOnly) -> tuple[bytes, Runner]:
    with _quiet():
        traced = torch.jit.trace(model, tuple(model.inputs.values()), check_trace=False)  # type: ignore[no-untyped-call]
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        loaded = torch.jit.load(io.BytesIO(buffer.getvalue()))  # type: ignore[no-untyped-call]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.inference_mode():
            found = loaded(*tensors)
        return [found] if isinstance(found, Tensor) else list(found)

    return buffer.getvalue(), run


def _onnx(model: _TensorsOnly) -> tuple[bytes, Runner]:
    try:
        import onnx.reference  # noqa: PLC0415 - optional, and slow to import
        import onnxscript  # noqa: F401, PLC0415 - what torch.onnx is written with
    except ImportError as error:
        raise MissingDependencyError.of(str(error.name).split(".")[0], "onnx", "The export to ONNX") from None
    size = sum(tensor.nbytes for tensor in model.state_dict().values() if isinstance(tensor, Tensor))
    if size > _LARGEST_ONNX:
        raise ModelError(f"the model has {size / 1e9:.1f} GB, an ONNX file holds at most 2. Export safetensors.")
    batch = torch.export.Dim("batch")
    with _quiet():
        program = torch.onnx.export(
            model,
            tuple(model.inputs.values()),
            dynamo=True,
            verbose=False,
            input_names=list(model.inputs),
            output_names=list(model.outputs),
            dynamic_shapes=(tuple({0: batch} for _ in model.inputs),),
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    evaluator = onnx.reference.ReferenceEvaluator(onnx.load_model_from_string(content))

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(model.inputs, tensors, strict=True)}
        return [torch.from_numpy(np.array(found)) for found in evaluator.run(None, given)]

    return content, run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what torch says about itself while it exports; what it says about the model is heard."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
            warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name: batch will not be used", UserWarning)
            yield
    finally:
        logging.disable(disabled)
