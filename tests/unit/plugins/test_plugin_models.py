"""The bundled models and optimisers: shapes, contracts, and that they learn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from aetheria.core import AetherModel
from aetheria.errors import ConfigError, ModelError, RegistryError
from aetheria.plugins import DigitsClassifier, RandomData, SimpleMLP, TinyGPT
from aetheria.plugins.optimizers import OPTIMIZERS, SCHEDULERS, warmup_cosine
from aetheria.registry import Registry


def small_gpt(**arguments):
    torch.manual_seed(0)
    return TinyGPT(**{"block_size": 16, "layers": 2, "heads": 2, "width": 16} | arguments)


def batch_for(model):
    generator = torch.Generator().manual_seed(0)
    match model:
        case SimpleMLP():
            return torch.randn(8, 10, generator=generator), torch.randn(8, 1, generator=generator)
        case DigitsClassifier():
            return torch.rand(8, 1, 8, 8, generator=generator), torch.arange(8)
        case TinyGPT():
            tokens = torch.randint(0, 256, (8, 17), generator=generator)
            return tokens[:, :-1], tokens[:, 1:]


def steps(model, count):
    """Trains on one batch; returns the losses."""
    plan = model.configure_optimizers()
    optimizer = getattr(plan, "optimizer", plan)
    losses = []
    for _ in range(count):
        loss = model.training_step(batch_for(model))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", [SimpleMLP, DigitsClassifier, small_gpt])
def test_a_model_keeps_its_contract_and_learns_a_batch(make):
    torch.manual_seed(0)
    model = make()
    assert isinstance(model, AetherModel)
    for metrics in (model.training_step(batch_for(model)), model.validation_step(batch_for(model))):
        assert metrics["loss"].requires_grad
        assert all(value.ndim == 0 for value in metrics.values())
    losses = steps(model, 30)
    assert losses[-1] < 0.9 * losses[0]
    assert type(model)(**model.hyperparameters).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(("make", "shape"), [(SimpleMLP, (8, 1)), (DigitsClassifier, (8, 10)), (small_gpt, (8, 256))])
def test_predictions_of_inputs_with_or_without_targets(make, shape):
    model = make().eval()
    inputs, targets = batch_for(model)
    predictions = model.predict_step(inputs)
    assert predictions.shape == shape
    assert torch.equal(predictions, model.predict_step([inputs, targets]))


def test_simple_mlp_learns_the_random_data():
    torch.manual_seed(0)
    data = RandomData(samples=512)
    data.setup()
    model = SimpleMLP(learning_rate=1e-2)
    optimizer = model.configure_optimizers()
    for _ in range(10):
        for batch in data.train_dataloader():
            model.training_step(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.inference_mode():
        losses = [model.validation_step(batch)["loss"] for batch in data.val_dataloader()]
    assert torch.stack(losses).mean() < 0.1  # variance 1, of which 0.01 is noise


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 8, 8), (3, 64)])
def test_digits_may_come_flat_or_square(shape):
    model = DigitsClassifier(channels=4).eval()
    images = torch.rand(3, 64)
    assert torch.equal(model(images.reshape(shape)), model(images))


def test_digits_probabilities_sum_to_one():
    model = DigitsClassifier(channels=4).eval()
    assert torch.allclose(model.predict_step(torch.rand(5, 64)).sum(dim=1), torch.ones(5))


def test_digits_decays_weights_but_not_biases_and_normalisation():
    plan = DigitsClassifier(weight_decay=0.5, schedule_steps=100).configure_optimizers()
    matrices, vectors = plan.optimizer.param_groups
    assert (matrices["name"], matrices["weight_decay"]) == ("matrices", 0.5)
    assert (vectors["name"], vectors["weight_decay"]) == ("vectors", 0.0)
    assert all(parameter.ndim == 1 for parameter in vectors["params"])
    [schedule] = plan.schedules
    assert schedule.interval == "step"


def test_digits_with_another_optimiser_by_name():
    plan = DigitsClassifier(optimizer="sgd", learning_rate=0.1).configure_optimizers()
    assert isinstance(plan.optimizer, torch.optim.SGD)
    assert not plan.schedules
    with pytest.raises(RegistryError, match="adamw"):
        DigitsClassifier(optimizer="adamww").configure_optimizers()


# --- TinyGPT ---------------------------------------------------------------------------------------------------------


def test_the_first_loss_is_that_of_a_uniform_guess():
    model = small_gpt()
    assert model.training_step(batch_for(model))["loss"].item() == pytest.approx(math.log(256), abs=0.1)


def test_the_weight_of_a_step_is_its_number_of_tokens():
    model = small_gpt()
    assert model.training_step(batch_for(model))["weight"] == 8 * 16
    assert model.weight_unit == "tokens"
    assert model.weight_per_sample == 16


def test_no_position_sees_what_comes_after_it():
    model = small_gpt().eval()
    tokens, _ = batch_for(model)
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 256
    with torch.inference_mode():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_positions_are_seen():
    model = small_gpt().eval()
    tokens = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]])
    with torch.inference_mode():
        logits = model(tokens)[:, -1]
    assert not torch.allclose(logits[0], logits[1])


def test_the_embedding_is_the_head():
    model = small_gpt()
    assert sum(tensor.shape[0] == 256 for tensor in model.state_dict().values()) == 1


def test_generation_is_a_function_of_the_generator():
    model = small_gpt().eval()
    texts = [model.generate(b"The ", 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(b"The ") and len(text) == 24 for text in texts)


def test_temperature_zero_takes_the_likeliest_byte():
    model = small_gpt().eval()
    prompt = b"a prompt that is longer than the sixteen bytes of context"
    [following] = model.generate(prompt, 1, temperature=0)[len(prompt) :]
    assert following == model.predict_step(torch.tensor([list(prompt[-16:])])).argmax().item()


def test_tiny_gpt_refuses_what_it_cannot_do():
    with pytest.raises(ConfigError, match=r"width=20 and heads=4.*multiple of 8"):
        TinyGPT(width=20, heads=4)
    with pytest.raises(ModelError, match=r"17 tokens.*block_size=16"):
        small_gpt()(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="0 bytes"):
        small_gpt().generate(b"")
    with pytest.raises(ValueError, match="temperature -1"):
        small_gpt().generate(b"a", temperature=-1)


# --- optimisers and schedules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_by_name_takes_a_step(name):
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = Registry.build("optimizer", name, {"lr": 0.1}, layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


ARGUMENTS = {
    "cosine": {"T_max": 10},
    "cosine_restarts": {"T_0": 10},
    "exponential": {"gamma": 0.9},
    "multistep": {"milestones": [2, 4]},
    "onecycle": {"max_lr": 0.1, "total_steps": 10},
    "step": {"step_size": 3},
    "swa": {"swa_lr": 0.01},
    "warmup_cosine": {"total_steps": 10},
}


@pytest.mark.parametrize("name", [*SCHEDULERS, "warmup_cosine"])
def test_a_scheduler_by_name(name):
    optimizer = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1, momentum=0.9)
    scheduler = Registry.build("scheduler", name, ARGUMENTS.get(name, {}), optimizer)
    assert isinstance(scheduler, LRScheduler | ReduceLROnPlateau)


def test_warm_up_then_cosine_then_the_minimum_for_ever():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0)
    scheduler = warmup_cosine(optimizer, total_steps=14, warmup_steps=4, minimum_factor=0.1)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[9] == pytest.approx(1.1)  # half-way down
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:15]))
    assert rates[14:] == pytest.approx([0.2] * 6)


@pytest.mark.parametrize("warmup_steps", [-1, 10, 11])
def test_a_warm_up_must_leave_room(warmup_steps):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    with pytest.raises(ConfigError, match="total_steps=10"):
        warmup_cosine(optimizer, total_steps=10, warmup_steps=warmup_steps)
