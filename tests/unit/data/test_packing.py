"""Documents in rows of one length: no token is lost, and attention knows where each of them begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aetheria.data import Shards, write_shards
from aetheria.data.packing import PackedTokens
from aetheria.data.schema import Schema
from aetheria.errors import DataError


def read(packed: PackedTokens) -> list[dict[str, Any]]:
    """Returns the rows as a reader would see them, without a disk between."""
    schema: Schema = packed.schema
    batch = schema.encode(list(packed))
    leaves = {path: field.values(field.column(batch.column(path))) for path, field in schema.fields.items()}
    return [schema.nest({path: values[row] for path, values in leaves.items()}) for row in range(len(batch))]


def test_a_small_example(tmp_path: Path) -> None:
    write_shards(PackedTokens([[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]], 4, padding=99), tmp_path / "data")
    batch = Shards(tmp_path / "data").batch([0, 1, 2])
    assert batch["tokens"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 99, 99]]
    assert batch["boundaries"]["documents"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, -1, -1]]
    assert batch["boundaries"]["positions"].tolist()[:2] == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert batch["boundaries"]["positions"].tolist()[2][:2] == [0, 1]
    assert batch["tokens"].dtype == torch.int32
    raw = Shards(tmp_path / "data").columns([2, 0])["boundaries"]
    assert [raw[0].tolist(), raw[1].tolist()] == [[-4, 2], [0, 3, 4]], "four tokens of it are in the row before"


@given(
    documents=st.lists(st.lists(st.integers(0, 200), max_size=30), min_size=1, max_size=20).filter(any),
    length=st.integers(1, 12),
)
def test_documents_can_be_put_together_again(documents: list[list[int]], length: int) -> None:
    packed = PackedTokens(documents, length, dtype="uint8", padding=255)
    rows = read(packed)
    tokens = [token for row in rows for token in row["tokens"].tolist()]
    total = sum(map(len, documents))
    assert tokens[:total] == [token for document in documents for token in document]
    assert tokens[total:] == [255] * (-total % length)
    rebuilt: list[list[int]] = []
    for row, sample in zip(rows, packed):
        documents_here = row["boundaries"]["documents"].numpy()
        positions = row["boundaries"]["positions"].numpy()
        for number in range(documents_here.max() + 1):
            places = np.flatnonzero(documents_here == number)
            assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
            assert np.array_equal(positions[places], np.arange(len(places)))
            part = row["tokens"][places].tolist()
            if number == 0 and sample["boundaries"][0] < 0:  # goes on from the row before
                assert len(rebuilt[-1]) == -sample["boundaries"][0]
                rebuilt[-1] += part
            else:
                rebuilt.append(part)
    assert rebuilt == [document for document in documents if document]


def test_tokens_may_be_lists_arrays_and_tensors() -> None:
    documents = [[1], np.array([2, 3], dtype=np.uint16), torch.tensor([4])]
    rows = read(PackedTokens(documents, 4, tensor=False))
    assert isinstance(rows[0]["tokens"], np.ndarray)
    assert rows[0]["tokens"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("documents", "options", "said"),
    [
        ([[1], [300]], {"dtype": "uint8"}, "document 1: its tokens go from 300 to 300; uint8 holds 0 to 255"),
        ([[1.5]], {}, "document 0: expected integers"),
        (["text"], {}, "document 0: expected integers of shape .tokens.; found 'text'"),
        ([[[1]]], {}, "document 0: expected integers"),
        ([], {"dtype": "float32"}, "tokens are integers; found dtype 'float32'"),
        ([], {"length": 0}, "at least one token; found length 0"),
    ],
)
def test_what_cannot_be_packed_is_refused(documents: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        list(PackedTokens(documents, **({"length": 4} | options)))
