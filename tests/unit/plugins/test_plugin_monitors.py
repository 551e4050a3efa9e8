"""LearningRateMonitor, Throughput and GradientHealth: what they measure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aetheria.config import TrainingConfig
from aetheria.errors import ConfigError
from aetheria.plugins import (
    DigitsClassifier,
    GradientHealth,
    LearningRateMonitor,
    SimpleMLP,
    Throughput,
    TinyGPT,
)


def attached(callback, run, model=None):
    if model is not None:
        run.model = model
        run.__post_init__()
    callback.context = run
    callback.on_train_start()
    return callback


# --- LearningRateMonitor ---------------------------------------------------------------------------------------------


def test_momentum_and_weight_decay_of_each_group(run):
    callback = attached(LearningRateMonitor(), run, DigitsClassifier(weight_decay=0.02))
    callback.on_batch_end(0, {})
    assert run.logged == {
        "momentum.matrices": 0.9,
        "weight_decay.matrices": 0.02,
        "momentum.vectors": 0.9,
        "weight_decay.vectors": 0.0,
    }


def test_one_group_has_no_suffix_and_unnamed_ones_their_index(run):
    callback = attached(LearningRateMonitor(), run)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.8)
    callback.on_batch_end(0, {})
    assert run.logged == {"momentum": 0.8, "weight_decay": 0}
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "momentum": 0.7})
    callback.on_batch_end(0, {})
    assert run.logged["momentum.1"] == 0.7


def test_groups_are_read_once_in_a_log_interval(run):
    run.config = TrainingConfig(epochs=1, log_every=5)
    callback = attached(LearningRateMonitor(), run)
    run.global_step = 4
    callback.on_batch_end(3, {})
    assert not run.logged


# --- Throughput ------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    times = [100.0]
    monkeypatch.setattr("aetheria.plugins.callbacks.throughput.time.perf_counter", lambda: times[0])
    return times


def test_samples_per_second_without_the_time_of_validations(run, clock):
    callback = attached(Throughput(every=10), run)
    clock[0] += 1.0
    callback.on_validation_start()
    clock[0] += 7.0
    callback.on_validation_end({})
    clock[0] += 1.0
    run.global_step, run.samples_seen = 10, 320
    callback.on_batch_end(9, {})
    assert run.logged["samples_per_second"] == pytest.approx(160.0)
    assert run.logged["host_memory_bytes"] > 1e7
    assert "device_memory_bytes" not in run.logged  # nobody counts it on the host
    clock[0] += 1.0
    run.global_step, run.samples_seen = 20, 640
    callback.on_batch_end(9, {})
    assert run.logged["samples_per_second"] == pytest.approx(320.0)


def test_tokens_per_second_of_a_language_model(run, clock):
    callback = attached(Throughput(every=1), run, TinyGPT(block_size=16, layers=1, heads=1, width=8))
    clock[0] += 2.0
    run.global_step, run.samples_seen = 1, 4
    callback.on_batch_end(0, {})
    assert run.logged["tokens_per_second"] == pytest.approx(32.0)


def test_throughput_measures_only_every_so_often(run, clock):
    callback = attached(Throughput(every=10), run)
    run.global_step = 9
    callback.on_batch_end(8, {})
    assert not run.logged


# --- GradientHealth --------------------------------------------------------------------------------------------------


def one_step(callback, run, batch):
    run.model.zero_grad()
    run.model.training_step(batch)["loss"].backward()
    callback.on_before_step()
    run.global_step += 1


def regression_batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 10, generator=generator), torch.randn(32, 1, generator=generator)


def test_norms_in_total_and_by_part(run):
    callback = attached(GradientHealth(every=1), run, DigitsClassifier(channels=4))
    one_step(callback, run, (torch.rand(8, 1, 8, 8), torch.arange(8)))
    for kind in ("gradient_norm", "weight_norm"):
        parts = {"features", "classifier"}
        assert {name for name in run.logged if name.startswith(kind)} == {
            f"{kind}.{name}" for name in parts | {"total"}
        }
        squares = sum(run.logged[f"{kind}.{part}"] ** 2 for part in parts)
        assert torch.allclose(squares.sqrt(), run.logged[f"{kind}.total"])
    expected = torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]).norm()
    assert torch.allclose(run.logged["weight_norm.total"], expected)


def test_dead_activations_are_those_that_no_sample_wakes(run):
    model = SimpleMLP(hidden_size=8)
    with torch.no_grad():
        model.layers[0].bias[:2] = -1e6
        model.layers[0].bias[2:] = 1e6
    callback = attached(GradientHealth(every=2), run, model)
    one_step(callback, run, regression_batch())
    assert run.logged.pop("dead_activations.layers.1") == 0.25
    run.logged.clear()
    one_step(callback, run, regression_batch())
    assert not run.logged
    one_step(callback, run, regression_batch())
    assert "dead_activations.layers.1" in run.logged


def test_hooks_are_there_only_for_the_step_that_is_measured(run):
    callback = attached(GradientHealth(every=3), run)
    hooks = run.model.layers[1]._forward_hooks
    before_each_forward = []
    for _ in range(7):
        before_each_forward.append(len(hooks))
        one_step(callback, run, regression_batch())
    assert before_each_forward == [1, 0, 0, 1, 0, 0, 1]
    callback._prepare(9)
    callback.teardown()
    assert not hooks


def test_a_window_that_was_dropped_before_the_measured_one_is_not_counted(run):
    callback = attached(GradientHealth(every=2), run)
    one_step(callback, run, regression_batch())
    for run.global_step in (1, 1):  # the first is dropped: the counter stays
        run.model.training_step(regression_batch())["loss"].backward()
        callback.on_before_step()
    run.global_step = 2
    run.model.training_step(regression_batch())["loss"].backward()
    assert [len(shares) for shares in callback._dead.values()] == [1]


def test_a_validation_between_two_steps_is_not_counted(run):
    callback = attached(GradientHealth(every=1), run)
    run.model.eval()
    run.model.validation_step(regression_batch())
    run.model.train()
    assert not callback._dead


def test_a_compiled_model_is_not_looked_into(run):
    run.config = TrainingConfig(epochs=1, compile=True)
    attached(GradientHealth(every=1), run)
    assert not run.model.layers[1]._forward_hooks


@pytest.mark.parametrize("callback", [Throughput, GradientHealth])
def test_an_interval_of_nothing_is_refused(callback):
    with pytest.raises(ConfigError, match="every=0"):
        callback(every=0)
