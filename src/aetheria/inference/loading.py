"""From a place on disk to a model with its weights. Nothing on disk can make this run code.

A snapshot names a model; the class comes from what is registered here. A plugins folder is imported only from where
the run was configured or where the process stands, and never from inside the folder that is opened.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from loguru import logger
from torch import Tensor

from aetheria.core import AetherModel
from aetheria.data.randomness import isolated_generators
from aetheria.engine.state import restore_model
from aetheria.errors import (
    ConfigError,
    ModelError,
    PluginError,
    RegistryError,
    SnapshotDamagedError,
    SnapshotError,
    SnapshotMismatchError,
    did_you_mean,
)
from aetheria.parameters import checked_parameters, constructor_parameters
from aetheria.registry import Registry
from aetheria.runs import RunFolder
from aetheria.snapshot import KeepBest, Manifest, Snapshot, list_snapshots, newest_good, weights_digest
from aetheria.snapshot.format import MANIFEST, find_tied, model_tensors

__all__ = ["METADATA", "StoredWeights", "build_model", "load_weights", "open_weights"]

METADATA = "aetheria"
"""The key in an exported .safetensors file's metadata under which it says what its weights belong to."""


@dataclass(frozen=True)
class StoredWeights:
    """Weights on disk whose bytes have been checked, and what is known about their model.

    Attributes:
        path: the snapshot's folder, or the .safetensors file.
        model: as in `Manifest.model`; empty where a file does not say.
        digest: what the weights' digest must still be; empty where the bytes have been checked, or cannot be.
        snapshot: the snapshot, if it is one.
        run: the run folder around it, if there is one.
    """

    path: Path
    model: Mapping[str, Any]
    digest: str = ""
    snapshot: Snapshot | None = None
    run: RunFolder | None = None


# --- finding ---------------------------------------------------------------------------------------------------------


def open_weights(source: str | Path | RunFolder | Snapshot, best: KeepBest | None = None) -> StoredWeights:
    """Finds the weights that a source stands for, and checks their bytes.

    Args:
        source: a run folder (its newest good snapshot is taken), a snapshot, or a .safetensors file.
        best: takes the best snapshot of a run by a metric instead of the newest.

    Raises:
        SnapshotError: there is none, or none that is undamaged.
        ConfigError: the best was asked for of something else than a run.
    """
    path = source.path if isinstance(source, RunFolder | Snapshot) else Path(source).absolute()
    if path.name == "model.safetensors" and (path.parent / MANIFEST).is_file():
        path = path.parent  # the weights of a snapshot, whose manifest knows their hash
    if (path / "run.json").is_file():
        run = RunFolder.open(path)
        return _of_snapshot(_newest(run) if best is None else _best(run, best))
    if best is not None:
        raise ConfigError(
            f"the best by {best.metric} was asked for of {path}, which is not a run folder. Name the run."
        )
    if path.suffix == ".safetensors" and path.is_file():
        return _of_file(path)
    if not path.is_dir():
        raise SnapshotError(
            f"there is no run, no snapshot and no .safetensors file at {path}. `aetheria runs` lists the runs."
        )
    snapshot = Snapshot(path)
    snapshot.verify()
    return _of_snapshot(snapshot)


def _newest(run: RunFolder) -> Snapshot:
    problems: list[str] = []

    def report(problem: str) -> None:
        problems.append(problem)
        logger.warning(problem)

    if (snapshot := newest_good(run.snapshots, report)) is not None:
        return snapshot
    if problems:
        raise SnapshotError(f"every snapshot of {run.path} is damaged:\n" + "\n".join(problems))
    raise SnapshotError(f"{run.path} has no snapshot yet. Wait for its first one, or train longer.")


def _best(run: RunFolder, rule: KeepBest) -> Snapshot:
    snapshots: dict[int, Snapshot] = {}
    for snapshot in list_snapshots(run.snapshots):
        try:
            snapshots[snapshot.manifest.step] = snapshot
        except SnapshotDamagedError as error:
            logger.warning(f"{error} It is left out.")
    manifests = [snapshot.manifest for snapshot in snapshots.values()]
    ranked: list[Manifest] = dataclasses.replace(rule, k=len(manifests)).best(manifests)
    if not ranked:
        known = {name for manifest in manifests for name in manifest.metrics}
        raise SnapshotError(
            f"no snapshot of {run.path} was taken with the metric '{rule.metric}'. {did_you_mean(rule.metric, known)}"
        )
    for manifest in ranked:
        try:
            snapshots[manifest.step].verify()
        except SnapshotDamagedError as error:
            logger.warning(f"{error} The next best is used.")
        else:
            return snapshots[manifest.step]
    raise SnapshotError(f"every snapshot of {run.path} with the metric '{rule.metric}' is damaged.")


def _of_snapshot(snapshot: Snapshot) -> StoredWeights:
    around = snapshot.path.absolute().parent.parent
    run = RunFolder(around) if (around / "run.json").is_file() else None
    return StoredWeights(snapshot.path, snapshot.manifest.model, snapshot=snapshot, run=run)


def _of_file(path: Path) -> StoredWeights:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        about: dict[str, Any] = json.loads(metadata.get(METADATA, '{"model": {}, "digest": ""}'))
        return StoredWeights(path, dict(about["model"]), str(about["digest"]))
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise SnapshotDamagedError(f"{path} does not read as a .safetensors file: {error}") from error


# --- building --------------------------------------------------------------------------------------------------------


def build_model(
    stored: StoredWeights,
    model: AetherModel | type[AetherModel] | None = None,
    model_name: str | None = None,
    model_params: Mapping[str, Any] | None = None,
    plugins: Path | None = None,
) -> AetherModel:
    """Builds the model that weights belong to, without a trace in the global random generators.

    Args:
        stored: says name and hyperparameters.
        model: an instance, which is taken as it is, or a class, instead of the registered one.
        model_name: a registered name instead of the stored one.
        model_params: constructor arguments that complete or replace the stored ones.
        plugins: a folder to import first.

    Raises:
        RegistryError: the model has no name, or nobody registered it.
        ConfigError: constructor arguments are missing or do not fit.
        ModelError: what was given or registered is not an `AetherModel`.
        PluginError: the plugins folder does not exist, or a file in it raised.
    """
    if model is not None and not isinstance(model, type):
        if not isinstance(model, AetherModel):
            raise ModelError(f"found {type(model).__name__} as the model, expected an AetherModel, or a class of them.")
        if model_params:
            raise ConfigError("model_params were given together with a model that is built already. Leave one out.")
        return model
    if model is not None:
        name, target = model.__name__, model
    else:
        name = model_name or stored.model.get("name") or _unnamed(stored)
        target = _registered(name, stored, plugins)
    given = {**stored.model.get("hyperparameters", {}), **(model_params or {})}
    _refuse_missing(stored, name, target, given)
    arguments = checked_parameters(f"model {name!r}", target, given)
    with isolated_generators(0):  # the weights it begins with are about to be replaced
        built = target(**arguments)
    if not isinstance(built, AetherModel):
        raise ModelError(
            f"{name!r} is a {type(built).__name__}, expected an AetherModel. Let its class inherit from it."
        )
    return built


def _unnamed(stored: StoredWeights) -> str:
    if not stored.model:
        raise RegistryError(
            f"{stored.path} holds weights alone and does not say of which model. Pass model_name= and model_params=, "
            "or model=."
        )
    raise RegistryError(
        f"{stored.path} is of a model that was not registered when it was trained: {stored.model.get('class')}. "
        "Pass model=, the class or an instance of it; next time put @Registry.register_model('a name') above the class."
    )


def _registered(name: str, stored: StoredWeights, plugins: Path | None) -> Any:
    if plugins is not None and not plugins.is_dir():
        raise PluginError(f"there is no folder {plugins.absolute()} to import plugins from. Correct the path.")
    folders = _plugin_folders(stored)
    Registry.load_plugins(plugins)
    looked_in = [] if plugins is None else [plugins.absolute()]
    while name not in Registry.names("model") and (folder := next(folders, None)) is not None:
        Registry.load_plugins(folder)
        looked_in.append(folder)
    try:
        return Registry.get("model", name)
    except RegistryError as error:
        places = " and ".join(str(folder) for folder in looked_in) or "no folder, for none was found"
        raise RegistryError(
            f"{error} Plugins were imported from {places}. Say where the model is: plugins=PATH (--plugins PATH), or "
            "pass model=, the class or an instance of it."
        ) from None


def _plugin_folders(stored: StoredWeights) -> Iterator[Path]:
    """Yields the folders that the user, not the run folder, vouches for.

    What is opened may have come from somebody else: see `RunFolder.config_source`.
    """
    brought_along = (stored.run.path if stored.run else stored.path).resolve()
    source = stored.run.config_source() if stored.run else None
    for folder in ([source.parent / "plugins"] if source else []) + [Path.cwd() / "plugins"]:
        if folder.is_dir() and not folder.resolve().is_relative_to(brought_along):
            yield folder


def _refuse_missing(stored: StoredWeights, name: str, target: Any, given: Mapping[str, Any]) -> None:
    parameters = constructor_parameters(target)
    required = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if missing := [key for key in dict.fromkeys([*stored.model.get("unstored", []), *required]) if key not in given]:
        arguments = ", ".join(f"{key!r}: ..." for key in missing)
        raise ConfigError(
            f"{stored.path} does not say which {', '.join(missing)} the model {name!r} was built with: only plain "
            f"values are stored, and what save_hyperparameters ignores is not. Pass model_params={{{arguments}}}, or "
            f"the model itself: model={name}(...)."
        )


# --- loading ---------------------------------------------------------------------------------------------------------


def load_weights(model: AetherModel, stored: StoredWeights) -> None:
    """Puts stored weights into a model, in place.

    Raises:
        SnapshotDamagedError: they cannot be read, or are not what they were when they were written.
        SnapshotMismatchError: they are of another model.
    """
    own, own_extra = model_tensors(model)
    tensors, extra = _read(stored, wants_extra=bool(own_extra))
    for alias, owner in find_tied(own).items():  # a file holds shared memory once, under either name
        for absent, present in ((alias, owner), (owner, alias)):
            if absent not in tensors and present in tensors:
                tensors[absent] = tensors[present]
    if lacking := [name for name in own_extra if name not in extra]:
        raise SnapshotMismatchError(
            f"{stored.path} lacks the extra state {', '.join(lacking)} of the model. Load the snapshot itself."
        )
    if stored.digest and weights_digest(tensors) != stored.digest:
        raise SnapshotDamagedError(f"{stored.path} is damaged: the weights do not match their digest.")
    try:
        restore_model(model, tensors, extra)
    except SnapshotMismatchError as error:
        raise SnapshotMismatchError(f"{stored.path}: {error}") from None


def _read(stored: StoredWeights, wants_extra: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        if stored.snapshot is None:
            return safetensors.torch.load_file(stored.path), {}
        # state.pt holds the optimiser too, and is read only where something in it is needed.
        return stored.snapshot.weights(), stored.snapshot.state()["model_extra"] if wants_extra else {}
    except (OSError, safetensors.SafetensorError) as error:  # retention may have removed it since it was checked
        raise SnapshotDamagedError(
            f"{stored.path} could be found, but no longer be read: {error}. Try again."
        ) from error
