"""The gradient of a window is that of the loss over everything in it, however it is cut into micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aetheria.accelerator import CPUAccelerator
from aetheria.core import AetherModel, Callback, MicroBatch
from aetheria.engine.hooks import Hooks
from aetheria.engine.window import Window, WindowRunner, windows
from aetheria.errors import ModelError


class Regression(AetherModel):
    """Returns the mean over samples, or with `tokens` the mean over unmasked tokens and their number."""

    def __init__(self, tokens: bool = False, device_weight: bool = False) -> None:
        super().__init__()
        self.tokens, self.device_weight = tokens, device_weight
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
        x, y, mask = batch
        losses = (self.net(x).squeeze(-1) - y) ** 2
        if not self.tokens:
            return {"loss": losses.mean()}
        weight = mask.sum()
        return {"loss": (losses * mask).sum() / weight, "weight": weight if self.device_weight else float(weight)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def runner_of(model: AetherModel, *callbacks: Callback, **options: Any) -> WindowRunner:
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    return WindowRunner(
        model, optimizer, CPUAccelerator(), Hooks(callbacks, lambda *_: None), model.training_step, **options
    )


def window_of(data: tuple[Tensor, ...], sizes: list[int]) -> Window:
    parts = zip(*(column.split(sizes) for column in data), strict=True)
    return Window([MicroBatch(part, len(part[0])) for part in parts], sum(sizes))


def gradients(model: AetherModel) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    tokens=st.booleans(),
    device_weight=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_the_gradient_is_that_of_one_big_batch(sizes: list[int], tokens: bool, device_weight: bool, seed: int) -> None:
    torch.manual_seed(seed)
    count = sum(sizes)
    mask = (torch.rand(count, 4) < 0.6).double() if tokens else torch.ones(count, 4).double()
    mask[0, 0] = 1.0  # at least one token in the window; whole micro-batches may well be masked
    data = (torch.randn(count, 4, 3).double(), torch.randn(count, 4).double(), mask)
    model = Regression(tokens, device_weight)
    model.training_step(data)["loss"].backward()
    expected = gradients(model)
    model.zero_grad()

    window = window_of(data, sizes)
    runner_of(model).backward(window)

    for ours, whole in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-12)
    weights = [weight for _, weight in window.metrics]
    assert sum(float(weight) for weight in weights) == pytest.approx(mask.sum().item() if tokens else count)


def test_the_last_window_of_an_epoch_is_short_and_nothing_is_left_over() -> None:
    batches = iter([MicroBatch(number, 2) for number in range(5)])
    assert [[batch.data for batch in window.batches] for window in windows(batches, lambda: 2)] == [[0, 1], [2, 3], [4]]


class WithBatchNorm(AetherModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(batch).square().mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"max_grad_value": 0.1}])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_window_leaves_no_trace(options: dict[str, float], poison: float) -> None:
    torch.manual_seed(0)
    model = WithBatchNorm()
    runner = runner_of(model, **options)

    def step(batch: Tensor) -> bool | object:
        window = Window([MicroBatch(batch, len(batch))], len(batch))
        runner.backward(window)
        runner.step(window)
        runner.zero()
        return window.taken

    assert step(torch.randn(8, 2)) is True
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer_before = repr(runner._optimizer.state_dict())
    assert step(torch.tensor([[poison, 1.0], [0.0, 1.0]])) is False
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert repr(runner._optimizer.state_dict()) == optimizer_before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert step(torch.randn(8, 2)) is True


def test_clipping_by_norm_and_value() -> None:
    torch.manual_seed(0)
    data = (100 * torch.randn(4, 4, 3).double(), 100 * torch.randn(4, 4).double(), torch.ones(4, 4).double())

    class Spy(Callback):
        norm = torch.zeros(())

        def on_before_step(self) -> None:
            self.norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    for options in ({"max_grad_norm": 0.5}, {"max_grad_value": 0.25}):
        model, spy = Regression(), Spy()
        runner = runner_of(model, spy, **options)
        window = window_of(data, [4])
        runner.backward(window)
        runner.step(window)
        after = gradients(model)
        if "max_grad_norm" in options:
            assert window.norm is not None
            assert float(window.norm) == pytest.approx(float(spy.norm))
            assert float(torch.nn.utils.get_total_norm(after)) == pytest.approx(0.5, rel=1e-4)
        else:
            assert max(float(gradient.abs().max()) for gradient in after) == 0.25


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: loss, 'returned a Tensor; expected a dictionary with "loss"'),
        (lambda loss: {"losses": loss}, r"without \"loss\" \(it has \['losses'\]\)"),
        (lambda loss: {"loss": loss.repeat(3)}, r'"loss" of shape \[3\]; expected a scalar. Take its mean'),
        (lambda loss: {"loss": loss.detach()}, '"loss" without a gradient'),
        (lambda loss: {"loss": 1.0}, '"loss" as a float'),
    ],
)
@pytest.mark.parametrize("sizes", [[4], [2, 2]])
def test_a_step_that_breaks_the_contract_is_told_how(returned: Any, message: str, sizes: list[int]) -> None:
    class Wrong(Regression):
        def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Any:
            return returned(super().training_step(batch)["loss"])

    data = (torch.randn(4, 4, 3).double(), torch.randn(4, 4).double(), torch.ones(4, 4).double())
    with pytest.raises(ModelError, match=message):
        runner_of(Wrong()).backward(window_of(data, sizes))


def test_an_error_of_the_models_own_passes_through() -> None:
    class Broken(Regression):
        def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Any:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        runner_of(Broken()).backward(window_of((torch.zeros(2, 4, 3),), [2]))


def test_sparse_gradients_are_guarded_and_clipped() -> None:
    class Sparse(AetherModel):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3, sparse=True)

        def training_step(self, batch: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.table(batch) * 10).sum()}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Sparse()
    runner = runner_of(model, max_grad_norm=1.0)
    window = Window([MicroBatch(torch.tensor([1, 3]), 2)], 2)
    before = model.table.weight.detach().clone()
    runner.backward(window)
    runner.step(window)
    moved = (model.table.weight.detach() - before).norm()
    assert float(moved) == pytest.approx(0.1, rel=1e-4)


class _Watched(Tensor):
    pass


@pytest.mark.parametrize("of", ["plain", "one element", "double", "half", "subclass", "parameter"])
def test_the_short_way_to_the_gradient_and_the_long_one_agree(of: str) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(()) if of == "parameter" else torch.randn(3, 2))
    loss = weight if of == "parameter" else weight.square().mean()
    if of == "one element":
        loss = loss.reshape(1)
    elif of in ("double", "half"):
        loss = loss.to(torch.float64 if of == "double" else torch.bfloat16)
    elif of == "subclass":
        loss = loss.as_subclass(_Watched)  # type: ignore[arg-type]
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    for times in (1, 2):
        CPUAccelerator().backward(loss) if times == 2 else loss.backward(retain_graph=True)
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, times * expected)


def test_an_optimisers_own_zero_grad_is_used() -> None:
    class Own(torch.optim.SGD):
        zeroed = 0

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.zeroed += 1
            super().zero_grad(set_to_none)

    model = Regression()
    optimizer = Own(model.parameters(), lr=0.1)
    runner = WindowRunner(model, optimizer, CPUAccelerator(), Hooks([], lambda *_: None), model.training_step)
    runner.zero()
    assert optimizer.zeroed == 1
    optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]  # as some wrappers do
    assert WindowRunner(
        model, optimizer, CPUAccelerator(), Hooks([], lambda *_: None), model.training_step
    )._own_zero_grad


def test_parameters_that_come_later_are_guarded_and_zeroed_too() -> None:
    model, late = Regression(), nn.Parameter(torch.zeros(()))
    runner = runner_of(model)
    runner._optimizer.add_param_group({"params": [late]})
    late.grad = torch.tensor(float("nan"))
    window = window_of((torch.randn(2, 4, 3).double(), torch.randn(2, 4).double(), torch.ones(2, 4).double()), [2])
    runner.backward(window)
    runner.step(window)
    runner.zero()
    assert window.taken is False
    assert late.grad is None
