"""`aetheria predict`: a file of samples in, a file of predictions out."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aetheria.cli._errors import errors_told
from aetheria.cli.runs import RunsDir

if TYPE_CHECKING:
    from aetheria.inference import Predictor


class Mode(StrEnum):
    """Which value of a metric is best."""

    MIN = "min"
    MAX = "max"


class NumberType(StrEnum):
    """What numbers are converted to before the model gets them."""

    FLOAT32 = "float32"
    INT64 = "int64"


Source = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run as elsewhere (its newest good snapshot), a snapshot's folder, or a .safetensors file.",
    ),
]
Best = Annotated[
    str | None, typer.Option(metavar="METRIC", help="Take the best snapshot by this metric, for instance val_loss.")
]
BestMode = Annotated[
    Mode | None, typer.Option("--mode", help="Which value of it is best; going by its name if not given.")
]
Plugins = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where the model is registered, if it is not found by itself.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]


@errors_told()
def predict(
    run: Source,
    source: Annotated[
        Path, typer.Option("--input", "-i", metavar="FILE", help="Samples: .npy, .npz, .csv, .parquet or .jsonl.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Predictions, likewise.")],
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="The columns to take, instead of all that hold numbers.")
    ] = None,
    dtype: Annotated[
        NumberType | None, typer.Option(help="Convert the numbers first; int64 for indices from .csv and .jsonl.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples that are computed at once.")] = 64,
    best: Best = None,
    mode: BestMode = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto: the fastest one here.")] = "auto",
    plugins: Plugins = None,
    runs_dir: RunsDir = Path("runs"),
    force: Force = False,
) -> None:
    """Predict every sample of a file with what RUN has learnt."""
    from aetheria.inference.bulk import predict_file

    predictor = open_predictor(run, runs_dir, device, best, mode, plugins)
    shapes = predict_file(
        predictor,
        source,
        output,
        columns=columns.split(",") if columns else (),
        dtype=None if dtype is None else dtype.value,
        batch_size=batch_size,
        force=force,
    )
    described = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    typer.echo(f"{output}: {described}")


def open_predictor(
    text: str, runs_dir: Path, device: str, best: str | None, mode: Mode | None, plugins: Path | None
) -> Predictor:
    """Returns the Predictor of a run, a snapshot or a file, and says which weights it took."""
    from aetheria.cli.curves import best_mode
    from aetheria.inference import Predictor
    from aetheria.runs import resolve_run

    path = Path(text)
    is_path = os.sep in text or path.is_file() or (path / "manifest.json").is_file()
    wanted = mode.value if mode else (best_mode(best) if best else None)
    predictor = Predictor(
        path if is_path else resolve_run(text, runs_dir), device, best=best, mode=wanted, plugins=plugins
    )
    told = f"weights of {predictor.path}"
    if best:
        told += f", with the {'smallest' if wanted == 'min' else 'largest'} {best}"
    if predictor.snapshot and (metrics := predictor.snapshot.manifest.metrics):
        told += f" ({', '.join(f'{name} {value:.4g}' for name, value in metrics.items())})"
    typer.echo(told, err=True)
    return predictor
