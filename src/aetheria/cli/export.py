"""`aetheria export`: a trained model as a file for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from aetheria.cli._errors import errors_told
from aetheria.cli.predict import Best, BestMode, Force, NumberType, Plugins, Source, open_predictor
from aetheria.cli.runs import RunsDir


class Form(StrEnum):
    """What a model is exported as."""

    SAFETENSORS = "safetensors"
    TORCHSCRIPT = "torchscript"
    ONNX = "onnx"


def _shape(text: str) -> list[int]:
    try:
        return [int(length) for length in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"found {text!r}, expected whole numbers such as 1,8,8.") from None


@errors_told()
def export(
    run: Source,
    form: Annotated[Form, typer.Option("--format", help="The weights, or the whole model for another runtime.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")],
    input_shape: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="Shape of one sample, without the batch: 10, or 1,8,8. Not for safetensors."
        ),
    ] = None,
    input_dtype: Annotated[NumberType, typer.Option(help="Type of its numbers.")] = NumberType.FLOAT32,
    example: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Samples to try, instead of a shape; as for aetheria predict.")
    ] = None,
    best: Best = None,
    mode: BestMode = None,
    plugins: Plugins = None,
    runs_dir: RunsDir = Path("runs"),
    force: Force = False,
) -> None:
    """Write the model that RUN has trained into one file, and check that it computes the same."""
    if form is not Form.SAFETENSORS and (input_shape is None) == (example is None):
        raise typer.BadParameter("give either --input-shape or --example: the model is recorded at work.")
    shape = None if input_shape is None else _shape(input_shape)

    from aetheria.inference.export import example_of_shape, export_model
    from aetheria.inference.files import read_inputs

    predictor = open_predictor(run, runs_dir, "cpu", best, mode, plugins)
    batch: Any = None if example is None else read_inputs(example)
    if shape is not None:
        batch = example_of_shape(shape, input_dtype.value)
    exported = export_model(predictor, form.value, output, batch, force=force)
    typer.echo(f"{exported.path}: {form.value}, {exported.path.stat().st_size / 1e6:.1f} MB")
    for title, tensors in (("takes", exported.inputs), ("returns", exported.outputs)):
        for name, described in tensors.items():
            typer.echo(f"  {title:<8}{name}: {described}")
    if exported.difference is not None:
        typer.echo(f"  differs from the model by {exported.difference:.2g} at most")
