"""What several ranks do together: open the run, compare what they are about to train, and what they have trained."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from aetheria.config import TrainingConfig
from aetheria.core import Accelerator, AetherModel
from aetheria.engine.fingerprint import fingerprint
from aetheria.engine.opening import OpenedRun, open_run
from aetheria.errors import ConfigError, RankError
from aetheria.runs import RunFolder
from aetheria.snapshot import Snapshot

__all__ = ["check_alike", "compare_ranks", "fingerprints", "open_together"]

_OWN = ("runs_dir", "run_name")  # what concerns the first rank alone


class _SeenFolder(RunFolder):
    """The run folder, on a rank that does not write it."""

    def update(self, **fields: Any) -> None:
        pass


def open_together(
    accelerator: Accelerator, config: TrainingConfig, model: AetherModel, resume_from: str | Path | None, new_run: bool
) -> OpenedRun:
    """Opens the run, as `open_run` does, on the first rank; the others are told where it is.

    Raises:
        AetheriaError: as of `open_run`; on the other ranks, that the first one failed.
    """
    opened: OpenedRun | None = None

    def open_it() -> bytes:
        nonlocal opened
        opened = open_run(config, model, resume_from, new_run)
        return json.dumps(
            {
                "folder": str(opened.folder.path.absolute()),
                "snapshot": None if opened.snapshot is None else str(opened.snapshot.path.absolute()),
                "continues": opened.continues,
                "overridden": sorted(opened.overridden),
                "stops_passed": opened.stops_passed,
            }
        ).encode()

    said = json.loads(accelerator.main_says(open_it))
    if opened is not None:
        return opened
    snapshot = None if said["snapshot"] is None else Snapshot(Path(said["snapshot"]))
    folder = _SeenFolder(Path(said["folder"]))
    return OpenedRun(folder, snapshot, [], said["continues"], frozenset(said["overridden"]), said["stops_passed"])


def check_alike(accelerator: Accelerator, config: TrainingConfig, model: AetherModel) -> None:
    """Compares what the ranks are about to train: configuration, parameters, the model's code.

    Raises:
        ConfigError: a rank is about to train something else; it says what.
    """
    if accelerator.world_size == 1:
        return
    shapes = "".join(f"{name}{list(parameter.shape)}" for name, parameter in model.named_parameters())
    own = {key: value for key, value in config.resolved().items() if key not in _OWN}
    own |= {"parameters of the model": _digest(shapes), "code of the model": _digest(_source_of(type(model)))}
    said = [json.loads(part) for part in accelerator.gather(json.dumps(own).encode())]
    for rank, theirs in enumerate(said):
        if different := [key for key in own if theirs.get(key) != said[0].get(key)]:
            found = "; ".join(f"{key} is {theirs.get(key)!r} there, {said[0].get(key)!r} here" for key in different[:3])
            raise ConfigError(
                f"rank {rank} is about to train something else than rank 0: {found}. Give every rank the same "
                "configuration and the same code."
            )


def fingerprints(accelerator: Accelerator, model: AetherModel) -> list[str]:
    """Returns a digest of each rank's weights, which must be the same bits; buffers are the first rank's to say.

    Of sharded weights there is one copy, of which every rank computes the fingerprint from all parts; of what ranks
    that compute together have whole, each has its own.
    """
    with accelerator.shared_weights(model):  # between two exchanges ranks that train apart have others besides
        own = fingerprint(dict(model.named_parameters()))
    return [said.decode() for said in accelerator.gather(own.encode())]


def compare_ranks(accelerator: Accelerator, model: AetherModel, step: int) -> None:
    """Compares what the ranks have trained.

    Raises:
        RankError: they have different weights; on every rank, and it says who.
    """
    digests = fingerprints(accelerator, model)
    usual = max(digests, key=digests.count)
    if others := [rank for rank, digest in enumerate(digests) if digest != usual]:
        raise RankError(
            f"the ranks have different weights at step {step}: {', '.join(f'rank {rank}' for rank in others)} of "
            f"{len(digests)} went another way than the rest. A callback that changes weights on one rank, an operation "
            "that is not deterministic, or faulty hardware may be the cause. Nothing was saved at this step, but a "
            "snapshot from before it may hold the first rank's weights after they had parted. Where ranks are meant to "
            "differ, write compare_ranks_every: null."
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _source_of(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # written into a notebook or a prompt
        return kind.__qualname__
