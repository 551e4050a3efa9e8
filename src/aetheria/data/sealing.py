"""JSON that carries its own hash, so that no byte of it changes unnoticed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from aetheria.errors import DataDamagedError, DataError

__all__ = ["seal", "unseal"]


def seal(content: dict[str, Any], indent: int | None = None) -> bytes:
    """Returns sorted JSON, ending with a line's end, whose key "seal" is the sha256 of the rest.

    Args:
        content: in JSON's types.
        indent: of the lines; None puts all of it into one.
    """
    return _dump(content | {"seal": hashlib.sha256(_dump(content, indent)).hexdigest()}, indent)


def unseal(raw: bytes, what: str, where: str, newest: int, indent: int | None = None) -> dict[str, Any]:
    """Returns what was sealed, without its seal.

    Args:
        raw: what `seal` returned.
        what: it is, for the error.
        where: it is from, for the error.
        newest: the newest format that can be read; the content says its own under the key "format".
        indent: with which it was sealed.

    Raises:
        DataError: it is of a newer format.
        DataDamagedError: a byte of it changed.
    """
    try:
        content: dict[str, Any] = json.loads(raw)
        del content["seal"]
        found_format = content["format"]
        whole = seal(content, indent) == raw
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataDamagedError(f"{where} is damaged: it does not read as {what} ({error}).") from error
    # The seal comes first, in every format there will be: a flipped bit must not pass for a newer format.
    if not whole:
        raise DataDamagedError(f"{where} is damaged: its content does not match its seal.")
    if found_format > newest:
        raise DataError(
            f"{where} is in format {found_format}; this version of Aetheria reads up to {newest}. Upgrade Aetheria."
        )
    return content


def _dump(content: dict[str, Any], indent: int | None) -> bytes:
    return json.dumps(content, indent=indent, sort_keys=True).encode() + b"\n"
