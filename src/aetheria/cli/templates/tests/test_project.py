"""Trains the project for a moment. Run it with `pytest`."""

from __future__ import annotations

from pathlib import Path

import torch

from aetheria import Orchestrator, Registry, TrainingConfig

PROJECT = Path(__file__).parent.parent


def test_the_model_learns_the_data(tmp_path: Path) -> None:
    config = TrainingConfig.from_yaml(PROJECT / "config.yaml", ["epochs=10", f"runs_dir={tmp_path}"])
    Registry.load_plugins(PROJECT / "plugins")
    torch.manual_seed(config.seed)
    model = Registry.build("model", "SpiralClassifier", config.model_params)
    data = Registry.build("data", "Spirals", config.data_params)
    result = Orchestrator(model, data, config).run()
    assert result.metrics["val_accuracy"] > 0.9
