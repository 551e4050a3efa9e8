"""What a model may say about how its layers are cut, and what is refused. Real ranks, real gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.integration.test_ranks import Data
from tests.integration.test_tensor_parallel import TOGETHER, Model
from tests.ranked import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
)
from torch.nn import functional

from aetheria import AetherModel, Orchestrator, TrainingConfig
from aetheria.accelerator import FSDPAccelerator
from aetheria.accelerator.select import create_accelerator
from aetheria.core.shards import is_sharded, part_of, whole
from aetheria.errors import AetheriaError
from aetheria.plugins import SimpleMLP, TinyGPT


# --- what trains -----------------------------------------------------------------------------------------------------
class InSequence(AetherModel):
    """Between its cut layers each rank has some of the places of a sequence; its loss is left a DTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        self.body[0].bias.requires_grad_(False)

    def tensor_plan(self, ranks: int) -> dict[str, Any]:
        places, all_of_them = Shard(1), Replicate()
        return {
            "body": PrepareModuleInputOutput(
                input_layouts=all_of_them, desired_input_layouts=places,
                output_layouts=places, desired_output_layouts=all_of_them, use_local_output=False,
            ),
            "body.0": SequenceParallel(),
            "body.1": ColwiseParallel(input_layouts=places),
            "body.3": RowwiseParallel(output_layouts=places),
        }  # fmt: skip

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": self.body(batch[0].unflatten(1, (2, 5))).square().mean()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, foreach=True)


def compute(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Takes three steps with a model, on the samples of this rank's share."""
    torch.manual_seed(0)
    kind = {"TinyGPT": TinyGPT, "SimpleMLP": SimpleMLP, "InSequence": InSequence}[model]
    built: Any = kind(**options).double()
    accelerator = FSDPAccelerator(tensor_parallel=2)
    accelerator.setup(built)
    return {"losses": _three_steps(built, accelerator), "weights": _whole_of(built)}


def _three_steps(model: Any, accelerator: Any) -> list[float]:
    optimizer = model.configure_optimizers()
    optimizer = getattr(optimizer, "optimizer", optimizer)
    step = model.training_step if accelerator is None else accelerator.step_function(model, "training_step")
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(3):
        if isinstance(model, TinyGPT):
            text = torch.randint(0, 256, (2, 9), generator=generator)
            batch = text[:, :-1], text[:, 1:]
        else:
            batch = (torch.randn(4, 10, generator=generator).double(), torch.randn(4, 1, generator=generator).double())
        loss = step(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _whole_of(model: nn.Module) -> dict[str, Any]:
    return {name: whole(tensor.detach()).tolist() for name, tensor in model.named_parameters()}


def compute_all() -> list[dict[str, Any]]:
    return [compute("TinyGPT", GPT), compute("SimpleMLP", {}), compute("InSequence", {})]


GPT = {"block_size": 8, "layers": 1, "heads": 2, "width": 8}


def test_models_that_come_with_it_have_a_plan() -> None:
    found = run_ranks(2, compute_all)
    for index, build in enumerate((lambda: TinyGPT(**GPT), SimpleMLP, InSequence)):
        torch.manual_seed(0)
        model: Any = build().double()
        expected = {"losses": _three_steps(model, None), "weights": _whole_of(model)}
        for each in found:
            torch.testing.assert_close(
                torch.tensor(each[index]["losses"]), torch.tensor(expected["losses"]), rtol=0, atol=1e-12
            )
            for name, values in expected["weights"].items():
                torch.testing.assert_close(
                    torch.tensor(each[index]["weights"][name]), torch.tensor(values), rtol=0, atol=1e-12, msg=name
                )


# --- what cannot be --------------------------------------------------------------------------------------------------
class Unplanned(Model):
    tensor_plan = None  # type: ignore[assignment]


class Planned(Model):
    def __init__(self, plan: Any) -> None:
        super().__init__()
        self.tensor_plan = lambda ranks: plan  # type: ignore[method-assign]


class Tied(Model):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(5, 6).double()
        self.other.weight = self.layers[0].weight


class PerHead(Model):
    """The gradient of its scale is that of the half of the units that a rank has; the plan forgets to add it up."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        hidden = self.layers[0](batch[0])
        hidden = (hidden.view(len(hidden), -1, 3) * self.scale).flatten(1)
        return {"loss": functional.mse_loss(self.last(self.layers[2](hidden)).squeeze(1), batch[1])}


def build(name: str) -> Model:
    plans: dict[str, Any] = {
        "nothing": {},
        "a list": ["layers.0"],
        "no module": {"layers.9": ColwiseParallel()},
        "no style": {"layers.0": "colwise"},
        "twice": {"layers.0": ColwiseParallel(), "layers.*": RowwiseParallel()},
        "a tanh": {"layers.1": ColwiseParallel()},
        "uneven": {"layers.2": ColwiseParallel()},
        "cuts nothing": {"norm": PrepareModuleInput(input_layouts=(), desired_input_layouts=())},
    }
    if name in plans:
        return Planned(plans[name])
    return {"unplanned": Unplanned, "tied": Tied}[name]()


REFUSED = {
    "unplanned": "Unplanned has no method tensor_plan(ranks)",
    "nothing": "tensor_plan(2) of Planned returned nothing; expected a dictionary",
    "a list": "tensor_plan(2) of Planned returned a list",
    "no module": "'layers.9' is the name of no module. There are, for instance: norm, layers, layers.0",
    "no style": "found 'colwise' for 'layers.0', expected a style",
    "twice": "'layers.0' and 'layers.*' are both about layers.0",
    "a tanh": "ColwiseParallel does not fit layers.1, a Tanh",
    "uneven": "layers.2.weight has the shape [7, 6], and tensor_plan cuts its dimension 0 for 2 ranks",
    "cuts nothing": "tensor_plan cuts no parameter",
    "tied": "layers.0.weight and other.weight are one parameter, and tensor_plan would make two of it",
}


def refused() -> dict[str, str]:
    said = {}
    for name in REFUSED:
        try:
            FSDPAccelerator(tensor_parallel=2).setup(build(name))
        except AetheriaError as error:
            said[name] = str(error)
    said["heads"] = said["ranks"] = said["local_sgd"] = "trained"
    try:
        FSDPAccelerator(tensor_parallel=2).setup(TinyGPT(heads=3, width=12))
    except AetheriaError as error:
        said["heads"] = str(error)
    for name, options in {
        "ranks": {"accelerator": "fsdp", "accelerator_params": {"tensor_parallel": 3}},
        "local_sgd": {"accelerator": "local_sgd", "accelerator_params": {"tensor_parallel": 2}},
    }.items():
        try:
            create_accelerator(TrainingConfig(epochs=1, **options))
        except AetheriaError as error:
            said[name] = str(error)
    return said


def test_what_cannot_be_cut_is_refused() -> None:
    expected = REFUSED | {
        "heads": "TinyGPT has 3 heads, which 2 ranks cannot share",
        "ranks": "tensor_parallel: found 3, expected a divisor of the number of ranks, which is 2",
        "local_sgd": "tensor_parallel",
    }
    for said in run_ranks(2, refused):
        assert said.keys() == expected.keys()
        for name, words in expected.items():
            assert words in said[name], name


def forgets(runs_dir: str) -> str:
    config = TrainingConfig(epochs=1, runs_dir=Path(runs_dir), live="off", **TOGETHER)
    model = PerHead()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        Orchestrator(model, Data(6), config).run()
    except AetheriaError as error:
        after = dict(model.named_parameters())
        assert all(is_sharded(parameter) for parameter in after.values())
        assert torch.equal(part_of(after["last.bias"].detach()), before["last.bias"]), "no step was taken"
        return str(error)
    return "trained"


def test_a_plan_that_forgets_a_gradient_is_found_before_the_first_step(tmp_path: Path) -> None:
    for said in run_ranks(2, forgets, str(tmp_path)):
        assert "tensor_plan leaves scale whole, but the ranks that compute together find different gradients" in said
