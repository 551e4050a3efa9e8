"""EarlyStopping and ModelCheckpoint: what they ask of the run, and what they refuse."""

from __future__ import annotations

import math

import pytest

from aetheria.config import TrainingConfig
from aetheria.errors import ConfigError
from aetheria.plugins import EarlyStopping, ModelCheckpoint


def stopping(run, **arguments):
    callback = EarlyStopping(**arguments)
    callback.context = run
    return callback


def looks(callback, values):
    for value in values:
        callback.on_validation_end({callback.monitor: value})
        if callback.context.stops:
            return True
    return False


def test_stops_after_patience_looks_without_improvement(run):
    callback = stopping(run, patience=2)
    assert not looks(callback, [1.0, 0.9, 0.95])
    assert looks(callback, [0.92])
    assert run.stops == ["val_loss did not improve in 2 looks: now 0.92, at best 0.9"]


def test_an_improvement_starts_the_count_again(run):
    assert not looks(stopping(run, patience=2), [1.0, 1.1, 0.9, 1.1, 0.8, 0.9])


def test_max_mode(run):
    assert looks(stopping(run, monitor="val_accuracy", mode="max", patience=1), [0.5, 0.6, 0.55])
    assert "at best 0.6" in run.stops[0]


def test_an_improvement_must_exceed_min_delta(run):
    assert looks(stopping(run, min_delta=0.1, patience=2), [1.0, 0.95, 0.91])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_no_improvement(run, value):
    callback = stopping(run, patience=1)
    assert looks(callback, [value])
    assert callback.best is None


def test_an_interrupted_validation_is_passed_over(run):
    callback = stopping(run, patience=1)
    callback.on_validation_end({})
    assert callback.waited == 0


def test_a_training_metric_is_looked_at_when_the_epoch_ends(run):
    callback = stopping(run, monitor="loss", patience=1)
    callback.on_validation_end({"val_loss": 9.0})
    for loss in (1.0, 2.0):
        callback.on_epoch_end({"loss": loss, "val_loss": 9.0})
    assert len(run.stops) == 1


def test_a_continued_run_stops_where_the_uninterrupted_one_does(run):
    first = stopping(run, patience=3)
    looks(first, [1.0, 1.1, 1.2])
    second = stopping(run, patience=3)
    second.load_state_dict(first.state_dict())
    assert looks(second, [1.3])


def test_a_metric_that_is_not_there_is_named_with_the_nearest(run):
    with pytest.raises(ConfigError, match=r"'val_los'.*val_accuracy, val_loss.*Did you mean 'val_loss'"):
        stopping(run, monitor="val_los").on_validation_end({"val_loss": 1.0, "val_accuracy": 0.5})
    with pytest.raises(ConfigError, match=r"'accuracy'.*the epoch: loss"):
        stopping(run, monitor="accuracy").on_epoch_end({"loss": 1.0})


def test_a_validation_that_never_came_is_missed_at_the_end_of_the_epoch(run):
    with pytest.raises(ConfigError, match=r"epoch 0 ended without a validation.*val_dataloader"):
        stopping(run).on_epoch_end({"loss": 1.0})


@pytest.mark.parametrize(
    ("options", "missed_at"),
    [({"val_interval": 2}, 1), ({"val_every_steps": 25}, 2), ({"val_interval": None}, 0)],
)
def test_a_validation_is_missed_only_when_it_was_due(run, options, missed_at):
    run.config = TrainingConfig(epochs=3, **options)
    callback = stopping(run)
    for run.epoch in range(missed_at):
        run.global_step = 10 * (run.epoch + 1)
        callback.on_epoch_end({"loss": 1.0})
    run.epoch, run.global_step = missed_at, 10 * (missed_at + 1)
    with pytest.raises(ConfigError, match="without a validation"):
        callback.on_epoch_end({"loss": 1.0})


@pytest.mark.parametrize("arguments", [{"mode": "most"}, {"min_delta": -1.0}, {"patience": 0}])
def test_early_stopping_refuses(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        EarlyStopping(**arguments)


def test_model_checkpoint_asks_for_the_best_and_the_last(run):
    callback = ModelCheckpoint(monitor="val_accuracy", mode="max", save_top_k=3)
    callback.context = run
    callback.on_train_start()
    callback.on_epoch_end({})
    assert run.best == [("val_accuracy", "max", 3)]
    assert len(run.snapshots) == 1


def test_model_checkpoint_asks_for_nothing_it_was_not_told_to(run):
    callback = ModelCheckpoint(save_top_k=0, save_last=False)
    callback.context = run
    callback.on_train_start()
    callback.on_epoch_end({})
    assert not run.best
    assert not run.snapshots


@pytest.mark.parametrize("arguments", [{"mode": "most"}, {"save_top_k": -1}])
def test_model_checkpoint_refuses(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        ModelCheckpoint(**arguments)
