"""The values of samples as NumPy sees them: tensors, arrays, and Python's own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["as_array", "described", "holds", "is_bfloat16", "is_tensor"]


def holds(dtype: np.dtype[Any], array: NDArray[Any]) -> bool:
    """Returns whether Python's numbers can become this type without changing what they say."""
    if not array.size or dtype == array.dtype:
        return True
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return array.dtype.kind in "biu" and limits.min <= int(array.min()) and int(array.max()) <= limits.max
    with np.errstate(over="ignore"):
        return dtype.kind == "f" and bool((np.isinf(array.astype(dtype)) == np.isinf(array)).all())


def is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" or hasattr(value, "__torch_function__")


def is_bfloat16(value: Any) -> bool:
    return str(getattr(value, "dtype", "")) == "torch.bfloat16"


def as_array(value: Any) -> NDArray[Any] | None:
    """Returns something as an array, a bfloat16 as the uint16 of its bits; None if it is none."""
    if isinstance(value, np.ndarray):
        return value
    try:
        if is_tensor(value):
            held = value.detach().cpu()
            return held.view(_short()).numpy().view(np.uint16) if is_bfloat16(value) else held.numpy()  # type: ignore[no-any-return]
        return np.asarray(value) if isinstance(value, int | float | list | tuple | np.generic) else None
    except (TypeError, ValueError, RuntimeError):  # sparse, of a type that NumPy lacks, a list of unequal lists
        return None


def _short() -> Any:
    import torch  # noqa: PLC0415 - there is a tensor, so it is there

    return torch.int16


def described(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"
