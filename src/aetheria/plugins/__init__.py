"""What ships with the package but could have been written by a user. Importing this module registers all of it."""

from aetheria.plugins import optimizers
from aetheria.plugins.callbacks.curriculum import Curriculum
from aetheria.plugins.callbacks.early_stopping import EarlyStopping
from aetheria.plugins.callbacks.gradient_health import GradientHealth
from aetheria.plugins.callbacks.learning_rate_monitor import LearningRateMonitor
from aetheria.plugins.callbacks.model_checkpoint import ModelCheckpoint
from aetheria.plugins.callbacks.progress_bar import ProgressBar
from aetheria.plugins.callbacks.throughput import Throughput
from aetheria.plugins.callbacks.weight_averaging import ExponentialMovingAverage, StochasticWeightAverage
from aetheria.plugins.data.digits import DigitsData
from aetheria.plugins.data.random_data import RandomData
from aetheria.plugins.data.sharded import ShardedDataModule, ShardedTextData
from aetheria.plugins.data.text import TextData
from aetheria.plugins.loggers.console import ConsoleLogger
from aetheria.plugins.loggers.csv_file import CSVLogger
from aetheria.plugins.loggers.mlflow import MLflowLogger
from aetheria.plugins.loggers.tensorboard import TensorBoardLogger
from aetheria.plugins.loggers.trackio import TrackioLogger
from aetheria.plugins.loggers.wandb import WandbLogger
from aetheria.plugins.models.digits import DigitsClassifier
from aetheria.plugins.models.simple_mlp import SimpleMLP
from aetheria.plugins.models.tiny_gpt import TinyGPT

__all__ = [
    "CSVLogger",
    "ConsoleLogger",
    "Curriculum",
    "DigitsClassifier",
    "DigitsData",
    "EarlyStopping",
    "ExponentialMovingAverage",
    "GradientHealth",
    "LearningRateMonitor",
    "MLflowLogger",
    "ModelCheckpoint",
    "ProgressBar",
    "RandomData",
    "ShardedDataModule",
    "ShardedTextData",
    "SimpleMLP",
    "StochasticWeightAverage",
    "TensorBoardLogger",
    "TextData",
    "Throughput",
    "TinyGPT",
    "TrackioLogger",
    "WandbLogger",
    "optimizers",
]
