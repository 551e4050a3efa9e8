"""`aetheria data`: shards made of what there is, looked at, checked, and put right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from aetheria.cli._display import moment, number, text_console
from aetheria.cli._errors import errors_told
from aetheria.cli.runs import AsJson
from aetheria.cli.train import Quiet

app = typer.Typer(help="Make shards of any data; look at them, check them, repair them.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the shards.")]
Count = Annotated[int, typer.Option("-n", metavar="N", min=1, help="How many samples.")]

DAMAGED = 1  # exit code
_SHOWN = 20  # bad rows, and entries of quarantine, that are printed
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


class Kind(StrEnum):
    """What a source is."""

    IMAGES = "images"
    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"
    TEXT = "text"
    HF = "hf"
    WEBDATASET = "webdataset"
    MDS = "mds"


class Compression(StrEnum):
    """How blocks are packed."""

    ZSTD = "zstd"
    LZ4 = "lz4"


class OnError(StrEnum):
    """What becomes of a bad row."""

    RAISE = "raise"
    SKIP = "skip"


class ImageMode(StrEnum):
    """As what images are decoded."""

    RGB = "RGB"
    RGBA = "RGBA"
    L = "L"


def _size(text: str) -> int:
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]?i?)b?\s*", text.lower())
    if found is None or found[2] not in _UNITS or float(found[1]) * _UNITS[found[2]] < 1:
        raise typer.BadParameter(f"found {text!r}, expected a size such as 64MB, 1GiB or 500000.")
    return int(float(found[1]) * _UNITS[found[2]])


def _types(pairs: list[str]) -> dict[str, str]:
    chosen = {}
    for pair in pairs:
        column, equals, kind = pair.rpartition("=")
        if not equals or not column:
            raise typer.BadParameter(f"found {pair!r}, expected COLUMN=TYPE, for instance price=float32.")
        chosen[column] = kind
    return chosen


@app.command()
@errors_told()
def prepare(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A file, a folder, or a pattern such as 'data/*.tar'.")
    ],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder of the shards.")],
    kind: Annotated[
        Kind | None, typer.Option("--as", help="What SOURCE is, if it is not to go by what is there.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="The columns to take, in this order; all, if none.")
    ] = None,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            metavar="COLUMN=TYPE",
            help="Type of a column: a number's, as int64 or float32; bool, text, bytes, json, image. May be repeated.",
        ),
    ] = None,
    delimiter: Annotated[str | None, typer.Option(metavar="CHAR", help="Between the values of a CSV file.")] = None,
    image_mode: Annotated[ImageMode, typer.Option(help="As what images are decoded when they are read.")] = (
        ImageMode.RGB
    ),
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Pack text into rows of N tokens; 1024 for text files. Elsewhere, of one column."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A tokenizer.json, or the folder of one; otherwise tokens are bytes."),
    ] = None,
    end_token: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="A token of the tokenizer that ends each document.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What stands between the documents of a text file.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Take only the first N rows.")] = None,
    on_error: Annotated[
        OnError, typer.Option(help="What becomes of bad rows; those that are skipped are counted and named.")
    ] = OnError.RAISE,
    append: Annotated[
        str | None, typer.Option(metavar="NAME", help="Add to the shards that are there, once under this name.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Whole numbers, each once, that are to be the sample ids.")
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Processes that read and encode.")] = 0,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of a file.")] = "64MiB",
    block_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of what is read and checked at once; 1MiB, or more for large samples."),
    ] = None,
    compression: Annotated[
        Compression | None, typer.Option(help="Of the blocks; none is the quickest to read.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write SOURCE as shards into DIR; interrupted, the same command continues.

    SOURCE is a folder of images (its folders are the classes), CSV, JSONL, Parquet, text, a Hugging Face dataset as
    save_to_disk writes it, WebDataset's tar files, or a folder of MosaicML Streaming.

    aetheria data prepare photos -o data/photos --workers 8

    aetheria data prepare table.csv -o data/table --columns id,price --type price=float32 --key id

    aetheria data prepare docs.jsonl -o data/docs --columns text --length 1024 --tokenizer tokenizer.json

    aetheria data prepare 'shards/*.tar' -o data/web --on-error skip
    """
    from aetheria.data.importing import Choices, Packing
    from aetheria.data.importing import prepare as prepare_shards

    packed = length is not None or tokenizer is not None or end_token is not None or separator is not None
    choices = Choices(
        columns=tuple(columns.split(",")) if columns else None,
        types=_types(types or []),
        image_mode=image_mode.value,
        limit=limit,
        skip=on_error is OnError.SKIP,
        delimiter={"\\t": "\t"}.get(delimiter, delimiter) if delimiter else None,
    )
    with _interruptible(out), _progress(quiet) as progress:
        done = prepare_shards(
            source,
            out,
            None if kind is None else kind.value,
            choices,
            Packing(tokenizer or "bytes", length or 1024, end_token, separator) if packed else None,
            workers=workers,
            shard_bytes=_size(shard_size),
            block_bytes=None if block_size is None else _size(block_size),
            compression=None if compression is None else compression.value,
            key=key,
            append=append,
            progress=progress,
        )
    if as_json:
        told = {"kind": done.kind, "new": done.new, "rows": done.rows, "skipped": done.skipped, "bad": done.named}
        typer.echo(json.dumps({"folder": str(out.absolute()), "version": done.manifest.version} | told, indent=2))
        return
    if not done.new:
        typer.echo(f"{out}: {done.rows:,} samples were prepared already ({moment(done.manifest.created)}).")
        return
    for bad in done.named[:_SHOWN]:
        typer.echo(f"skipped  {bad}", err=True)
    if done.skipped:
        rest = f", {_SHOWN} of which are named above" if done.skipped > _SHOWN else ""
        typer.echo(f"{done.skipped:,} bad rows were skipped{rest}.", err=True)
    typer.echo(f"{out}: {done.rows:,} samples of {done.kind}, version {done.manifest.version}")
    _print_schema(out)


@app.command()
@errors_told()
def info(
    folder: Folder,
    version: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of the data; the newest, if none.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the shards in DIR hold: samples, fields, versions, quarantine, notes."""
    from aetheria.data.describing import describe

    content = describe(folder, version)
    if as_json:
        typer.echo(json.dumps(content, indent=2))
        return
    _print_rows(_facts(content))
    _print_rows(content["schema"].items(), "fields")
    parts = (
        (part["name"] or "(first)", f"{part['rows']:,} samples", _megabytes(part["bytes"]), part["compression"] or "")
        for part in content["parts"]
    )
    if len(content["parts"]) > 1:
        _print_rows(parts, "parts")
    entries = content["quarantined"]["entries"]
    lost = ((f"shard {e['shard']}", f"{e['rows']:,} samples", e["reason"], moment(e["time"])) for e in entries[:_SHOWN])
    _print_rows(lost, "quarantine")
    _print_rows(((name, json.dumps(note)) for name, note in content["notes"].items()), "notes")


@app.command()
@errors_told()
def verify(
    folder: Folder,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Make a version without the blocks that are damaged, and with those that are no longer."
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Read every byte of the shards in DIR, and name what is damaged; the exit code is 1 if anything is.

    With --repair, damaged blocks go into quarantine, and whatever reads the new version leaves them out. Put a shard
    back from a copy and repair again: its blocks are used again.
    """
    from aetheria.data import repair as repair_shards
    from aetheria.data import verify as verify_shards

    with _progress(quiet) as progress:

        def told(done: int, total: int) -> None:
            progress("reading", done, total)

        if not repair:
            damages = verify_shards(folder, progress=told)
        else:
            result = repair_shards(folder, told)
    if repair:
        _print_repair(folder, result, as_json)
        return
    if as_json:
        typer.echo(json.dumps({"damaged": [_damage(damage) for damage in damages]}, indent=2))
    for damage in () if as_json else damages:
        typer.echo(f"damaged  {damage}")
    if damages:
        raise typer.Exit(DAMAGED)
    if not as_json:
        typer.echo(f"whole    {folder}")


@app.command()
@errors_told()
def head(folder: Folder, count: Count = 5, as_json: AsJson = False) -> None:
    """Show the first samples of the shards in DIR."""
    from aetheria.data.describing import first_rows

    _print_samples(first_rows(folder, count), as_json)


@app.command()
@errors_told()
def sample(
    folder: Folder,
    count: Count = 5,
    seed: Annotated[int, typer.Option(metavar="N", help="Another one draws others.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show samples of the shards in DIR, drawn at random."""
    from aetheria.data.describing import draw

    _print_samples(draw(folder, count, seed), as_json)


# --- printing --------------------------------------------------------------------------------------------------------


@contextmanager
def _interruptible(out: Path) -> Iterator[None]:
    """Says, where somebody presses Ctrl-C, that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted. What is finished stays in {out}; the same command continues.", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    """Shows a bar for each thing that is done, if there is a terminal to show it on."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:

        def progress(what: str, done: int, total: int | None) -> None:
            told = f"{done:,} samples" if what == "writing" else ""
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, told=told)
            bars.update(tasks[what], completed=done, total=total, told=told)

        yield progress


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _facts(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "samples", number(content["rows"])
    yield "size", f"{_megabytes(content['bytes'])}, {content['shards']:,} shards, {content['blocks']:,} blocks"
    yield "version", f"{content['version']} of {content['versions']}, {moment(content['created'])}"
    yield "uid", str(content["uid"])
    if content["key"]:
        yield "key", content["key"]
    if packed := {part["compression"] for part in content["parts"]} - {None}:
        yield "compression", ", ".join(packed)
    if lost := content["quarantined"]["blocks"]:
        yield "in quarantine", f"{lost:,} blocks, {content['quarantined']['rows']:,} samples"
    if content["interrupted"]:
        yield "interrupted", "something is being added, or was interrupted: the same command continues it"


def _print_schema(folder: Path) -> None:
    from aetheria.data.describing import describe

    _print_rows(describe(folder)["schema"].items())


def _print_rows(rows: Any, title: str = "") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for row in rows:
        table.add_row(*row)
    if not table.rows:
        return
    console = text_console()
    if title:
        console.print()
        console.print(Text(title, style="bold"))
    console.print(table)


def _damage(damage: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(damage)


def _print_repair(folder: Path, result: Any, as_json: bool) -> None:
    left = [damage for damage in result.damages if not damage.rows and damage.block is None]
    if as_json:
        told = {
            "version": result.manifest.version,
            "quarantined": [_damage(damage) for damage in result.quarantined],
            "released": list(result.released),
            "restored": list(result.restored),
            "damaged": [_damage(damage) for damage in result.damages],
            "lost": result.lost,
        }
        typer.echo(json.dumps(told, indent=2))
        return
    for name in result.restored:
        typer.echo(f"restored     {name}")
    for damage in result.quarantined:
        typer.echo(f"quarantined  {damage}")
    if result.released:
        typer.echo(f"released     {len(result.released):,} blocks, which are whole again")
    for damage in left:
        typer.echo(f"damaged      {damage}")
    lost = f"; {result.lost:,} of {result.manifest.rows:,} samples are in quarantine" if result.lost else ""
    changed = "unchanged" if not (result.quarantined or result.released) else f"version {result.manifest.version}"
    typer.echo(f"{folder}: {changed}{lost}")


def _print_samples(samples: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(samples, indent=2, ensure_ascii=False))
        return
    for each in samples:
        typer.echo(f"sample {each['row']}  (id {each['id']})")
        fields = dict(_flat(each["sample"]))
        _print_rows(
            (f"  {name}", value if isinstance(value, str) else json.dumps(value)) for name, value in fields.items()
        )


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of a sample under the paths of their fields."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{path}/{key}" if path else key)
