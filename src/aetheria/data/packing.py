"""Packing documents of any length into rows of one, keeping where each of them begins and ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aetheria.data.fields import Array, Boundaries
from aetheria.data.schema import Schema
from aetheria.data.values import as_array
from aetheria.errors import DataError

__all__ = ["PackedTokens"]

_LEAST = int(np.iinfo(np.int32).min)  # a document that began farther back than this began that far back


class PackedTokens:
    """Documents as rows of one length, ready to be written: no token is lost, and only the last row is filled up.

    A document that does not fit into the rest of a row goes on in the next one. A sample has two fields: "tokens", of
    shape [length], and "boundaries", which is read as the positions of the tokens in their documents, and the numbers
    of these (`fields.Boundaries`).

        write_shards(PackedTokens(documents, 1024, dtype="uint16"), "text")

    Args:
        documents: the tokens of each, integers of shape [tokens]: lists, arrays or tensors; of one that is larger than
            memory an iterator of its pieces. Iterated anew each time.
        length: of a row.
        dtype: in which tokens are stored, by NumPy's name.
        padding: the token that fills up the last row.

    Attributes:
        schema: what `write_shards` takes where it is given no other.
    """

    def __init__(
        self, documents: Iterable[Any], length: int, *, dtype: str = "int32", padding: int = 0, tensor: bool = True
    ) -> None:
        if length < 1:
            raise DataError(f"a row has at least one token; found length {length}.")
        self.documents = documents
        self.length = length
        self.dtype = np.dtype(dtype)
        self.padding = padding
        if self.dtype.kind not in "iu":
            raise DataError(f"tokens are integers; found dtype {dtype!r}.")
        self.schema = Schema(
            {"tokens": Array(dtype, (length,), tensor=tensor), "boundaries": Boundaries(length=length)}
        )

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        row = np.empty(self.length, dtype=self.dtype)
        begins: list[int] = []
        filled = 0
        for number, document in enumerate(self.documents):
            before, begun = 0, False  # tokens of the document in earlier pieces; whether it has begun in this row
            for piece in document if isinstance(document, Iterator) else (document,):
                tokens = self._checked(number, piece)
                taken = 0
                while taken < len(tokens):
                    if not begun:
                        begins.append(max(filled - before - taken, _LEAST))
                        begun = True
                    count = min(self.length - filled, len(tokens) - taken)
                    row[filled : filled + count] = tokens[taken : taken + count]
                    filled, taken = filled + count, taken + count
                    if filled == self.length:
                        yield {"tokens": row.copy(), "boundaries": np.array([*begins, filled], dtype=np.int32)}
                        begins, filled, begun = [], 0, False
                before += len(tokens)
        if filled:
            row[filled:] = self.padding
            yield {"tokens": row, "boundaries": np.array([*begins, filled], dtype=np.int32)}

    def _checked(self, number: int, document: Any) -> NDArray[Any]:
        tokens = as_array(document)
        if tokens is not None and not tokens.size:
            return np.empty(0, self.dtype)
        if tokens is None or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(f"document {number}: expected integers of shape [tokens]; found {document!r:.80}.")
        limits = np.iinfo(self.dtype)
        if tokens.min() < limits.min or tokens.max() > limits.max:
            raise DataError(
                f"document {number}: its tokens go from {tokens.min()} to {tokens.max()}; {self.dtype} holds "
                f"{limits.min} to {limits.max}. Choose a larger dtype."
            )
        return tokens
