"""The examples' configurations are valid and name things that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from aetheria.config import TrainingConfig
from aetheria.registry import Registry

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*/config.yaml"))


def test_there_are_examples():
    assert {path.parent.name for path in EXAMPLES} >= {"hello_world", "digits", "tiny_gpt"}


# Not "text", whose data must be written before: tests/integration/test_example_text.py does it all.
@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.parent.name != "text"], ids=lambda path: path.parent.name
)
def test_an_example_can_be_built_and_takes_a_step(path):
    if path.parent.name == "digits":
        pytest.importorskip("sklearn")
    config = TrainingConfig.from_yaml(path)
    Registry.load_plugins()
    model = Registry.build("model", config.model_name, config.model_params)
    data = Registry.build("data", config.data_name, {"batch_size": config.batch_size, **config.data_params})
    data.setup()
    loader = data.train_dataloader()
    assert isinstance(loader, DataLoader)
    model.training_step(next(iter(loader)))["loss"].backward()
    model.configure_optimizers()
    for callback in config.callbacks:
        Registry.build("callback", callback.name, callback.params)
    for logger in config.loggers:
        Registry.build("logger", logger.name, logger.params)


def test_the_digits_schedule_ends_with_the_run():
    pytest.importorskip("sklearn")
    config = TrainingConfig.from_yaml(next(path for path in EXAMPLES if path.parent.name == "digits"))
    data = Registry.build("data", config.data_name, {"batch_size": config.batch_size, **config.data_params})
    data.setup()
    assert config.model_params["schedule_steps"] == config.epochs * len(data.train_dataloader())
