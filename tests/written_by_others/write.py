"""Writes the files in this folder with the libraries whose formats they are, to test that these can be read.

    pip install datasets webdataset mosaicml-streaming zstd
    python tests/written_by_others/write.py

Run with datasets 5.2.0, webdataset 1.0.2, mosaicml-streaming 0.13.0. `sample` says what is in them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
COUNT = 7


def pixels(number: int) -> Any:
    """Returns the pixels of the picture of a sample, uint8 [3, 4 + number, 3]."""
    return np.full((3, 4 + number, 3), 30 * number, dtype=np.uint8)


def sample(number: int) -> dict[str, Any]:
    """Returns what sample `number` is in all of the files, as far as their formats know such values."""
    return {
        "whole": number - 3,
        "real": number / 4,
        "text": f"sämple {number}" * number,
        "raw": bytes(range(number)),
        "fixed": np.arange(6, dtype=np.int16).reshape(2, 3) * number,
        "varying": np.arange(number % 3, dtype=np.float32),
        "json": {"number": number, "list": [1, None]},
    }


def write_mds(folder: Path, compression: str | None) -> None:
    from PIL import Image
    from streaming.base.format.mds.writer import MDSWriter

    columns = {
        "whole": "int", "real": "float32", "text": "str", "raw": "bytes", "fixed": "ndarray:int16:2,3",
        "varying": "ndarray:float32", "free": "ndarray", "json": "json", "png": "png", "pil": "pil",
        "str_int": "str_int", "str_float": "str_float",
    }  # fmt: skip
    with MDSWriter(
        out=str(folder), columns=columns, compression=compression, hashes=["sha1", "xxh64"], size_limit=1500
    ) as out:
        for number in range(COUNT):
            picture = Image.fromarray(pixels(number))
            varying = np.arange(1 + number % 3, dtype=np.float32)  # it has no arrays without elements
            more = {
                "varying": varying, "free": varying, "png": picture, "pil": picture,
                "str_int": number, "str_float": number / 2,
            }  # fmt: skip
            out.write(sample(number) | more)


def write_datasets(folder: Path) -> None:
    import datasets
    from PIL import Image

    features = datasets.Features(
        {
            "whole": datasets.Value("int32"),
            "real": datasets.Value("float32"),
            "text": datasets.Value("string"),
            "raw": datasets.Value("binary"),
            "fixed": datasets.Array2D((2, 3), "int16"),
            "varying": datasets.List(datasets.Value("float32")),
            "label": datasets.ClassLabel(names=["even", "odd"]),
            "picture": datasets.Image(),
        }
    )

    def rows() -> Any:
        for number in range(COUNT):
            row = {key: value for key, value in sample(number).items() if key != "json"}
            yield row | {"label": number % 2, "picture": Image.fromarray(pixels(number))}

    whole = datasets.Dataset.from_generator(rows, features=features)
    whole.save_to_disk(str(folder / "one"), num_shards=2)
    whole.to_parquet(str(folder / "exported.parquet"))
    shuffled = whole.select([5, 2, 3])
    datasets.DatasetDict({"train": shuffled, "test": whole.select([1])}).save_to_disk(str(folder / "two"))


def write_webdataset(file: Path) -> None:
    import webdataset
    from PIL import Image

    with webdataset.TarWriter(str(file)) as out:
        for number in range(COUNT):
            told = sample(number)
            out.write(
                {
                    "__key__": f"folder/{number:04d}",
                    "cls": told["whole"],
                    "txt": told["text"],
                    "raw": told["raw"],
                    "fixed.npy": told["fixed"],
                    "varying.npy": told["varying"],
                    "json": told["json"],
                    "png": Image.fromarray(pixels(number)),
                }
            )


if __name__ == "__main__":
    for name in ("mds", "mds_zstd", "hf"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    if "mds" in sys.argv[1:] or len(sys.argv) == 1:
        write_mds(HERE / "mds", None)
        write_mds(HERE / "mds_zstd", "zstd:3")
    if "others" in sys.argv[1:] or len(sys.argv) == 1:
        write_datasets(HERE / "hf")
        write_webdataset(HERE / "webdataset.tar.gz")
