"""A run of Net, moved away from where it was trained; and Predictors that answer what a test wants."""

import shutil

import pytest
import safetensors.torch
from inference_cases import Answers, Net, train

from aetheria import Predictor, Registry


@pytest.fixture(autouse=True)
def _with_net(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Registry.register_model("Net")(Net)


@pytest.fixture(scope="package")
def original(tmp_path_factory):
    """A run of Net, and the model as it was when the run ended."""
    with Registry.isolated():
        Registry.register_model("Net")(Net)
        return train(
            tmp_path_factory.mktemp("runs"),
            snapshots={"keep_last": 9, "keep_best": {"metric": "val_loss"}},
            log_every=2,
        )


@pytest.fixture
def trained(original, tmp_path):
    folder, model = original
    shutil.copytree(folder, tmp_path / "moved")
    return tmp_path / "moved", model.eval()


@pytest.fixture
def answering(tmp_path):
    """Returns a Predictor whose predict_step is the given function."""

    def build(function, **options):
        model = Answers(function)
        safetensors.torch.save_file(model.state_dict(), tmp_path / "answers.safetensors")
        return Predictor(tmp_path / "answers.safetensors", model=model, **options)

    return build
