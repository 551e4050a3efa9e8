"""How metrics are put together for drawing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aetheria.cli.curves import RunCurves, best_mode, families, family, role, smoothed, wants_log_scale
from aetheria.loom.reader import Curve


def curves(**values: list[float]) -> list[RunCurves]:
    made = {name: Curve(np.arange(len(row)), np.array(row), np.zeros(len(row))) for name, row in values.items()}
    return [RunCurves("a", made)]


def test_names_say_what_was_measured_and_on_what() -> None:
    assert [family(name) for name in ("loss", "val_loss", "epoch_loss", "learning_rate.head", "value")] == [
        *("loss", "loss", "loss", "learning_rate", "value")
    ]
    assert [role(name) for name in ("loss", "epoch_loss", "val_loss", "test_loss", "value")] == [
        *("training", "epoch mean", "validation", "test", "training")
    ]


def test_families_come_in_the_order_in_which_one_reads_them() -> None:
    names = ["learning_rate.1", "grad_norm", "val_accuracy", "epoch_loss", "loss", "learning_rate.0", "val_loss"]
    assert list(families(names).items()) == [
        ("loss", ["loss", "val_loss"]),  # the epoch's mean says nothing that the intervals' do not
        ("accuracy", ["val_accuracy"]),
        ("grad_norm", ["grad_norm"]),
        ("learning_rate", ["learning_rate.0", "learning_rate.1"]),
    ]
    assert families(["epoch_loss", "val_loss"]) == {"loss": ["epoch_loss", "val_loss"]}


@pytest.mark.parametrize(
    ("name", "mode"),
    [("val_loss", "min"), ("val_accuracy", "max"), ("top5_acc", "max"), ("val_f1", "max"), ("perplexity", "min")],
)
def test_the_better_direction_goes_by_name(name: str, mode: str) -> None:
    assert best_mode(name) == mode


def test_smoothing_starts_at_the_first_value_and_leaves_gaps() -> None:
    values = np.array([2.0, 4.0, math.nan, 4.0, math.inf])
    result = smoothed(values, 0.5)
    assert result[0] == 2.0
    assert result[1] == pytest.approx(10 / 3)
    assert np.isnan(result[[2, 4]]).all()
    assert result[3] == pytest.approx((0.125 * 2 + 0.25 * 4 + 0.5 * 4) / 0.875)
    assert np.array_equal(smoothed(values[:2], 0.0), values[:2])


def test_only_long_curves_are_smoothed_by_themselves() -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    assert np.array_equal(smoothed(noise[:99], None), noise[:99])
    assert smoothed(noise, None).std() < 0.4 * noise.std()


def test_a_logarithmic_axis_is_for_losses_and_norms_over_decades() -> None:
    decades = [10.0**-exponent for exponent in range(5)]
    assert wants_log_scale("loss", curves(loss=decades))
    assert wants_log_scale("grad_norm", curves(grad_norm=decades))
    assert not wants_log_scale("loss", curves(loss=[1.0, 0.5, 0.2]))
    assert not wants_log_scale("loss", curves(loss=[*decades, 0.0]))
    assert not wants_log_scale("loss", curves(loss=[math.nan]))
    assert not wants_log_scale("learning_rate", curves(learning_rate=decades))
