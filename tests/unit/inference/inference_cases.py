"""Networks to be asked, and how they are trained."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aetheria import AetherModel, LoaderDataModule, Orchestrator, Registry, TrainingConfig

PLUGIN = """
import torch
from torch import nn
from aetheria import AetherModel, Registry

@Registry.register_model("Net")
class Net(AetherModel):
    def __init__(self, hidden: int = 8, head: nn.Module | None = None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(hidden, 1) if head is None else head

    def forward(self, features):
        return self.head(self.body(features))

    def training_step(self, batch):
        features, targets = batch
        return {"loss": nn.functional.mse_loss(self(features), targets)}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)
"""
namespace: dict = {"__name__": "net_of_the_tests"}
with Registry.isolated():
    exec(PLUGIN, namespace)
Net = namespace["Net"]


class Answers(AetherModel):
    """Does in predict_step what a test tells it to."""

    def __init__(self, answer=lambda batch: batch):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.answer = answer

    def predict_step(self, batch):
        return self.answer(batch)

    def training_step(self, batch):
        return {"loss": self.scale}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(runs_dir, model=None, epochs=3, **options):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 4, generator=generator)
    data = TensorDataset(features, features.sum(1, keepdim=True))
    model = Net(hidden=6) if model is None else model
    config = TrainingConfig(epochs=epochs, runs_dir=runs_dir, accelerator="cpu", **options)
    loaders = LoaderDataModule(DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=20))
    return Orchestrator(model, loaders, config).run().folder, model


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
