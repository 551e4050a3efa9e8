"""The bundled data modules: what a batch holds, and that the same arguments give the same samples."""

from __future__ import annotations

import sys

import pytest
import torch

from aetheria.errors import ConfigError, MissingDependencyError
from aetheria.plugins import DigitsData, RandomData, TextData


def ready(data):
    data.prepare_data()
    data.setup()
    return data


# --- RandomData ------------------------------------------------------------------------------------------------------


def test_random_data_is_a_linear_map_and_noise():
    data = ready(RandomData(samples=2000, features=5, targets=2, noise=0.1))
    features, targets = data.training.tensors
    assert features.shape == (2000, 5)
    assert targets.shape == (2000, 2)
    assert len(data.validation) == 500
    residual = targets - features @ torch.linalg.lstsq(features, targets).solution
    assert residual.std().item() == pytest.approx(0.1, rel=0.1)


def test_random_data_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = ready(RandomData(seed=3)).training.tensors[0]
    torch.manual_seed(2)
    assert torch.equal(ready(RandomData(seed=3)).training.tensors[0], first)
    assert not torch.equal(ready(RandomData(seed=4)).training.tensors[0], first)


# --- DigitsData ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return ready(DigitsData(batch_size=32))


def test_digits_batches(digits):
    images, labels = next(iter(digits.train_dataloader()))
    assert images.shape == (32, 1, 8, 8)
    assert images.dtype == torch.float32
    assert 0.0 <= images.min() <= images.max() <= 1.0
    assert labels.shape == (32,)
    assert labels.dtype == torch.int64


def test_the_split_is_whole_stratified_and_fixed(digits):
    assert (len(digits.training), len(digits.validation)) == (1437, 360)
    shares = digits.validation.labels.bincount() / (
        digits.validation.labels.bincount() + digits.training.labels.bincount()
    )
    assert shares.sub(0.2).abs().max() < 0.01
    assert torch.equal(ready(DigitsData()).validation.images, digits.validation.images)
    assert not torch.equal(ready(DigitsData(seed=1)).validation.images, digits.validation.images)


def test_augmentation_shifts_by_the_global_generator(digits):
    def read(seed):
        torch.manual_seed(seed)
        return digits.training[0][0]

    assert torch.equal(read(0), read(0))
    shifts = {tuple(read(seed).flatten().tolist()) for seed in range(60)}
    assert len(shifts) == 9
    assert tuple(digits.training.images[0].flatten().tolist()) in shifts
    assert torch.equal(digits.validation[0][0], digits.validation.images[0])
    assert torch.equal(ready(DigitsData(augment=False)).training[0][0], digits.training.images[0])


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"DigitsData needs .*aetheria\[examples\]"):
        DigitsData().setup()


# --- TextData --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text():
    return ready(TextData(block_size=64, batch_size=4))


def test_text_batches_hold_bytes_and_the_bytes_that_follow(text):
    tokens, targets = next(iter(text.val_dataloader()))
    assert tokens.shape == targets.shape == (4, 64)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(tokens[1:, 0], targets[:-1, -1])  # the windows lie end to end


def test_the_text_is_english_and_split_once(text):
    training, validation = (bytes(part.text.tolist()) for part in (text.training, text.validation))
    assert b" the " in training
    assert len(validation) == pytest.approx(0.1 * len(training + validation), rel=0.01)
    assert len(text.training) == (len(training) - 1) // 64
    last = text.training[len(text.training) - 1]
    assert len(last[1]) == 64


def test_a_window_longer_than_the_text_is_refused():
    with pytest.raises(ConfigError, match="block_size=1000000"):
        ready(TextData(block_size=1_000_000))
    with pytest.raises(ConfigError, match="0 for validation"):
        ready(TextData(validation_fraction=0.0))
