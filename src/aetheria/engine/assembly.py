"""From names to objects: model, data, loaders and callbacks, as a configuration asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aetheria.config import TrainingConfig
from aetheria.core import Accelerator, AetherDataModule, AetherModel, Callback
from aetheria.data import BatchSource, prepare_loader
from aetheria.data.order import mix
from aetheria.data.randomness import isolated_generators
from aetheria.data.sources import FixedSource
from aetheria.errors import ConfigError, DataError
from aetheria.registry import Registry
from aetheria.runs import RunFolder

__all__ = ["Loaders", "build_callbacks", "build_model_and_data", "config_of_run", "prepare_loaders"]

MODEL_STREAM, DATA_STREAM = 6, 7  # parts of keys, so that no two uses share a stream


def _load_plugins(config: TrainingConfig) -> None:
    Registry.load_plugins(config.source.parent / "plugins" if config.source else None)


def build_model_and_data(config: TrainingConfig, world_size: int = 1) -> tuple[AetherModel, AetherDataModule]:
    """Builds what a configuration names, each on generators seeded for it alone.

    Args:
        config: of the run.
        world_size: the number of ranks that share a global batch.

    Raises:
        ConfigError: it names no model or no data, or a parameter does not fit.
        RegistryError: nobody registered the name.
    """
    _load_plugins(config)
    for key in ("model_name", "data_name"):
        if getattr(config, key) is None:
            known = ", ".join(Registry.names("model" if key == "model_name" else "data"))
            raise ConfigError(f"{key}: found nothing, expected a registered name. Known: {known}.")
    assert config.model_name is not None
    assert config.data_name is not None
    data_params: dict[str, Any] = dict(config.data_params)
    size = config.micro_batch_size(world_size)
    if size is not None and "batch_size" in Registry.parameters("data", config.data_name):
        data_params.setdefault("batch_size", size)
    with isolated_generators(mix(config.seed, DATA_STREAM)):
        data = Registry.build("data", config.data_name, data_params)
    with isolated_generators(mix(config.seed, MODEL_STREAM)):
        model = Registry.build("model", config.model_name, config.model_params)
    if not isinstance(model, AetherModel) or not isinstance(data, AetherDataModule):
        wrong = (
            (config.model_name, "AetherModel")
            if not isinstance(model, AetherModel)
            else (config.data_name, "AetherDataModule")
        )
        raise ConfigError(f"{wrong[0]} is registered, but is no {wrong[1]}. Let its class inherit from it.")
    return model, data


def build_callbacks(config: TrainingConfig, given: Sequence[Callback]) -> list[Callback]:
    """Builds the callbacks and loggers that a configuration names, and puts the given ones behind them."""
    _load_plugins(config)
    callbacks: list[Callback] = [Registry.build("callback", spec.name, spec.params) for spec in config.callbacks]
    callbacks += [Registry.build("logger", spec.name, spec.params) for spec in config.loggers]
    if not any(spec.name == "ConsoleLogger" for spec in config.loggers):
        # Nobody shall miss a warning because no logger was named.
        callbacks.append(Registry.build("logger", "ConsoleLogger", {"metrics": False}))
    return [*callbacks, *given]


def config_of_run(path: Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Returns the configuration that a run folder holds, changed by overrides.

    Raises:
        RunFolderError: there is no run folder.
        ConfigError: an override is wrong.
    """
    folder = RunFolder.open(path)
    values = folder.read()["config"] | {"runs_dir": str(folder.path.parent)}
    return TrainingConfig.from_resolved(values, folder.config_source(), overrides)


@dataclass(frozen=True)
class Loaders:
    """The sources of a run.

    Attributes:
        train: of the training batches.
        val: of the validation batches, or None.
        warnings: what the user should know about resuming them.
    """

    train: BatchSource
    val: BatchSource | None
    warnings: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Ends the worker processes of both."""
        for source in (self.train, self.val):
            if source is not None:
                source.close()


def prepare_loaders(data: AetherDataModule, config: TrainingConfig, accelerator: Accelerator) -> Loaders:
    """Sets a data module up and takes its loaders over.

    Raises:
        DataError: a loader is empty, smaller than a batch, or something else than a loader.
    """
    share = accelerator.data_rank, accelerator.data_ranks
    with isolated_generators(mix(config.seed, DATA_STREAM)):
        accelerator.once_per_node(data.prepare_data)
        data.setup()
        train_loader, val_loader = data.train_dataloader(), data.val_dataloader()

    def prepared(loader: Iterable[Any], role: Literal["train", "val"], **options: Any) -> BatchSource:
        options |= {"seed": config.seed, "seed_samples": config.sample_seeding, "share": share}
        return prepare_loader(loader, role=role, **options)

    if train_loader is None:
        raise DataError("train_dataloader returned None; expected a DataLoader, a list of batches or an iterable.")
    train = prepared(
        train_loader,
        "train",
        window_batches=config.grad_accumulation_steps,
        limit=config.limit_train_batches,
        expected_batch_size=config.micro_batch_size(accelerator.data_ranks),
    )
    warnings = [train.warning] if train.warning else []
    if config.overfit_batches is not None:
        train = FixedSource(train, config.overfit_batches)
        return Loaders(train, None if val_loader is None else train)
    val = None if val_loader is None else prepared(val_loader, "val", limit=config.limit_val_batches)
    return Loaders(train, val, warnings)
