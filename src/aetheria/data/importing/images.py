"""Folders of images: a folder for each class, or images alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from aetheria.data.fields import Field, Image, Number, Text
from aetheria.data.importing.choices import Choices, Unfit
from aetheria.data.importing.rows import BadRow, Progress, Rows, check_image
from aetheria.data.schema import Schema
from aetheria.errors import DataError

__all__ = ["IMAGES", "ImageFolder"]

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


class ImageFolder(Rows):
    """Images, in the order of their names: "image", "label" where they lie in folders, "name" (the path).

    The label is the number of the folder right below the source, by name; the names go into the notes. Each image is
    decoded once, and refused if that fails; its file is stored as it is.

    Args:
        folder: of the folders, or of the images.
        choices: of the user.
        progress: is not needed.

    Raises:
        DataError: there are no images; some lie beside the folders of others; or the folders are parts of a dataset,
            such as "train" and "val", and no classes.
    """

    kind: ClassVar[str] = "images"

    def __init__(self, folder: Path | str, choices: Choices | None = None, progress: Progress | None = None) -> None:
        choices = choices or Choices()
        self._folder = Path(folder)
        names = _found(self._folder)
        tops = [name.partition("/")[0] if "/" in name else "" for name in names]
        classes = sorted(set(tops))
        if not names:
            raise DataError(f"{folder}: there are no images in it ({', '.join(IMAGES)}). Check the source.")
        if "" in classes and len(classes) > 1:
            raise DataError(
                f"{folder}: there are images beside folders of images ({names[tops.index('')]}, {classes[1]}/). Put "
                "each image into the folder of its class, or all of them into one."
            )
        if parts := sorted(_SPLITS.intersection(name.lower() for name in classes)):
            raise DataError(
                f"{folder}: the folders {', '.join(classes[:5])} look like parts of a dataset ({parts[0]}), not like "
                f"classes. Give one of them: {self._folder / classes[0]}."
            )
        fields: dict[str, Field] = {"image": Image(choices.image_mode)}
        self.notes: dict[str, Any] = {}
        if classes != [""]:
            fields["label"] = Number("int64")
            classes = _settled(classes, choices.classes.get("label"), folder)
            self.notes["classes"] = {"label": classes}
            numbers = {name: number for number, name in enumerate(classes)}
            self._labels = np.array([numbers[top] for top in tops], dtype=np.int32)
        fields["name"] = Text()
        wanted = choices.selected(fields, folder)
        if choices.types:
            raise DataError(f"the types of a folder of images are settled; found {dict(choices.types)}.")
        self.schema = Schema({name: fields[name] for name in wanted})
        self._names = pa.array(names, pa.large_string())  # a tenth of the memory that a list of strings takes

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, row: int) -> Any:
        name = self._names[row].as_py()
        sample: dict[str, Any] = {}
        for field in self.schema.fields:
            if field == "image":
                sample[field] = self._image(self._folder / name)
            else:
                sample[field] = int(self._labels[row]) if field == "label" else name
        return sample

    def _image(self, path: Path) -> bytes:
        try:
            return check_image(path.read_bytes())
        except (Unfit, OSError) as error:
            raise BadRow(f"{path}: {error}.") from error


def _found(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}. Correct the path.")
    names = []
    for place, below, files in os.walk(folder, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        inside = Path(place).relative_to(folder).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        names += [prefix + name for name in files if not name.startswith(".") and Path(name).suffix.lower() in IMAGES]
    return sorted(names)


def _settled(classes: list[str], before: list[str] | None, folder: Path | str) -> list[str]:
    """Returns the names of the labels: those that were settled, where data are added to."""
    if before is None:
        return classes
    if unknown := [name for name in classes if name not in before]:
        raise DataError(
            f"{folder}: the data that are added to have no class {unknown[0]!r}; they have {', '.join(before[:10])}. "
            "Labels are their numbers: a new class needs new data."
        )
    return before
