"""Predictions from a snapshot alone: its name, its hyperparameters and its weights are all it takes."""

from aetheria.inference.predictor import Predictor

__all__ = ["Predictor"]
