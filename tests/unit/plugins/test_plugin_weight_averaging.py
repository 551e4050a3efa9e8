"""The averages: right, harmless to training, and lossless across a resume."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from aetheria.core import AetherModel
from aetheria.errors import ConfigError, SnapshotMismatchError
from aetheria.plugins import DigitsClassifier, ExponentialMovingAverage, SimpleMLP, StochasticWeightAverage


def attached(callback, run, model=None):
    if model is not None:
        run.model = model
        run.__post_init__()
    callback.context = run
    callback.on_train_start()
    return callback


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def step(run, *callbacks):
    batch = torch.rand(8, 1, 8, 8), torch.arange(8)
    run.model.training_step(batch)["loss"].backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.global_step += 1
    for callback in callbacks:
        callback.on_batch_end(0, {})


@pytest.fixture
def digits(run):
    run.model = DigitsClassifier(channels=4)
    run.__post_init__()
    return run


def test_the_exponential_average_is_that_of_torch(digits):
    callback = attached(ExponentialMovingAverage(decay=0.9), digits)
    reference = AveragedModel(digits.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(5):
        step(digits, callback)
        reference.update_parameters(digits.model)
    callback.on_train_end()
    expected = reference.module.state_dict()
    for name, tensor in digits.model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, expected[name]), name
        else:
            assert tensor == 5, name  # counters are counted, not averaged


def test_the_stochastic_average_is_the_mean_of_what_was_taken(digits):
    digits.max_epochs, digits.steps_per_epoch = 4, 2  # from step 6 on, every second one
    callback = attached(StochasticWeightAverage(), digits)
    taken = []
    for _ in range(12):
        step(digits, callback)
        if digits.global_step in (8, 10, 12):
            taken.append(weights(digits.model))
    callback.on_train_end()
    for name, tensor in digits.model.state_dict().items():
        if tensor.is_floating_point():
            mean = torch.stack([each[name] for each in taken]).mean(dim=0)
            assert torch.allclose(tensor, mean, atol=1e-6), name


def test_the_average_begins_after_start_step(digits):
    callback = attached(ExponentialMovingAverage(start_step=2), digits)
    for _ in range(3):
        step(digits, callback)
    last = weights(digits.model)
    callback.on_train_end()
    assert same(weights(digits.model), last)  # of one set of weights only


def test_validation_runs_on_the_average_and_training_goes_on_with_its_own_weights(digits):
    callback = attached(ExponentialMovingAverage(decay=0.5), digits)
    for _ in range(3):
        step(digits, callback)
    trained = weights(digits.model)
    callback.on_validation_start()
    assert not same(weights(digits.model), trained)
    callback.on_validation_end({})  # an interrupted one, too
    assert same(weights(digits.model), trained)


def test_validation_on_the_trained_weights(digits):
    callback = attached(ExponentialMovingAverage(validate=False), digits)
    step(digits, callback)
    step(digits, callback)
    trained = weights(digits.model)
    callback.on_validation_start()
    assert same(weights(digits.model), trained)
    callback.on_validation_end({})
    assert same(weights(digits.model), trained)


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def validation(callback):
    callback.on_validation_start()
    callback.on_validation_end({})


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_continued_run_is_the_uninterrupted_one(digits, at_the_end, validate):
    """Interrupted half-way, or ended (the averaged weights lie in the model then) and made longer."""
    callback = attached(ExponentialMovingAverage(decay=0.8, validate=validate), digits)
    for _ in range(4):
        step(digits, callback)
    if at_the_end:
        callback.on_train_end()
    snapshot = through_a_file(
        {
            "model": digits.model.state_dict(),
            "optimizer": digits.optimizer.state_dict(),
            "callback": callback.state_dict(),
            "generator": torch.get_rng_state(),
        }
    )
    if at_the_end:
        callback._exchange()  # the same process goes on: the uninterrupted run
        callback._exchanged = False
    for _ in range(4):
        step(digits, callback)
        validation(callback)
    callback.on_train_end()
    uninterrupted, other = weights(digits.model), callback.state_dict()["other"]

    digits.model = DigitsClassifier(channels=4)
    digits.model.load_state_dict(snapshot["model"])
    digits.__post_init__()
    digits.optimizer.load_state_dict(snapshot["optimizer"])
    continued = ExponentialMovingAverage(decay=0.8, validate=validate)
    continued.load_state_dict(snapshot["callback"])
    attached(continued, digits)
    torch.set_rng_state(snapshot["generator"])
    for _ in range(4):
        step(digits, continued)
        validation(continued)
    continued.on_train_end()
    assert same(weights(digits.model), uninterrupted)
    assert same(continued.state_dict()["other"], other)


class Tied(AetherModel):
    """Two layers that share one weight, and a mask."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("mask", torch.tensor([True, False]))

    def training_step(self, batch):
        return {"loss": self.second(self.first(batch)).mean()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_shared_weights_are_kept_once_and_stay_shared(run):
    callback = attached(ExponentialMovingAverage(decay=0.5), run, Tied())
    for run.global_step in (1, 2):
        with torch.no_grad():
            run.model.first.weight.add_(1.0)
        callback.on_batch_end(0, {})
    assert "second.weight" not in callback.state_dict()["other"]
    expected = run.model.first.weight.detach() - 0.5
    callback.on_train_end()
    assert torch.allclose(run.model.second.weight, expected)
    assert run.model.second.weight is run.model.first.weight


def test_a_run_that_ended_too_early_says_so(digits):
    callback = attached(ExponentialMovingAverage(start_step=100), digits)
    step(digits, callback)
    trained = weights(digits.model)
    callback.on_train_end()
    assert same(weights(digits.model), trained)
    assert digits.events[0][0] == "warning"
    assert "averaged nothing" in digits.events[0][1]


def test_two_averages_of_one_model_are_refused(digits):
    first = attached(ExponentialMovingAverage(), digits)
    with pytest.raises(ConfigError, match="keep one of"):
        attached(StochasticWeightAverage(start_step=0, every_steps=1), digits)
    first.teardown()
    attached(ExponentialMovingAverage(), digits).teardown()


def test_averages_of_another_model_are_refused(run):
    callback = attached(ExponentialMovingAverage(), run)
    callback.on_batch_end(0, {})
    run.global_step = 1
    callback.on_batch_end(0, {})
    other = ExponentialMovingAverage()
    other.load_state_dict(callback.state_dict())
    with pytest.raises(SnapshotMismatchError, match=r"mask"):
        attached(other, run, Tied())


def test_the_weights_that_are_trained_do_not_depend_on_the_callback(run):
    def trained(*callbacks):
        torch.manual_seed(0)
        run.model, run.global_step = DigitsClassifier(channels=4), 0
        run.__post_init__()
        for callback in callbacks:
            attached(callback, run)
        for _ in range(3):
            step(run, *callbacks)
            for callback in callbacks:
                callback.on_validation_start()
                callback.on_validation_end({"val_loss": 1.0})
        return weights(run.model)

    assert same(trained(), trained(ExponentialMovingAverage(decay=0.5)))


def test_a_loader_of_unknown_length_needs_numbers(run):
    run.steps_per_epoch = None
    with pytest.raises(ConfigError, match="start_step and every_steps"):
        attached(StochasticWeightAverage(), run)
    attached(StochasticWeightAverage(start_step=10, every_steps=5), run).teardown()


@pytest.mark.parametrize(
    ("callback", "arguments"),
    [
        (ExponentialMovingAverage, {"decay": 1.0}),
        (ExponentialMovingAverage, {"start_step": -1}),
        (StochasticWeightAverage, {"start_step": -1}),
        (StochasticWeightAverage, {"every_steps": 0}),
    ],
)
def test_averages_refuse(callback, arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        callback(**arguments)


def test_hyperparameters_of_the_model_are_untouched(run):
    model = SimpleMLP(hidden_size=7)
    attached(ExponentialMovingAverage(), run, model).teardown()
    assert model.hyperparameters["hidden_size"] == 7
