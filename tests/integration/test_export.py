"""`aetheria export`: what other programs get computes what the model computes."""

import re
import sys
import warnings

import numpy as np
import pytest
import safetensors
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from aetheria import AetherModel, Orchestrator, Predictor, Registry, TrainingConfig
from aetheria.cli.export import export
from aetheria.errors import ModelError
from aetheria.inference.export import _difference, _TensorsOnly, example_of_shape, export_model
from aetheria.plugins import DigitsClassifier, RandomData, SimpleMLP, TextData, TinyGPT

app = typer.Typer()
app.command()(export)


def train(runs_dir, model, data):
    config = TrainingConfig(max_steps=3, runs_dir=runs_dir, accelerator="cpu", limit_val_batches=1)
    return Orchestrator(model, data, config).run().folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"), SimpleMLP(output_size=2), RandomData(targets=2))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Registry.isolated():
        yield


def ask(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def refused(*arguments):
    """Returns what was said on standard error, without the box that typer draws around it."""
    result = ask(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    return " ".join(result.stderr.replace("│", " ").split())


X = torch.randn(5, 10, generator=torch.Generator().manual_seed(2))


def test_safetensors_hold_all_that_a_predictor_needs(folder, tmp_path):
    result = ask(folder, "--format", "safetensors", "-o", "net.safetensors")
    assert (result.exit_code, result.stdout) == (0, "net.safetensors: safetensors, 0.0 MB\n"), result.output
    assert torch.equal(Predictor("net.safetensors").predict(X), Predictor(folder).predict(X))
    with safetensors.safe_open("net.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(Predictor(folder).model.state_dict())
    again = ask("net.safetensors", "--format", "safetensors", "-o", "again.safetensors")
    assert again.exit_code == 0
    assert torch.equal(Predictor("again.safetensors").predict(X), Predictor(folder).predict(X))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_torchscript_runs_without_aetheria(folder):
    result = ask(folder, "--format", "torchscript", "-o", "net.pt", "--input-shape", "10")
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout.splitlines()[1:] == [
        "  takes   input: float32 [batch, 10]",
        "  returns prediction: float32 [batch, 2]",
        "  differs from the model by 0 at most",
    ]
    assert torch.allclose(script("net.pt")(X), Predictor(folder).predict(X), atol=1e-6)


def script(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path)


def test_an_example_may_come_from_a_file(folder):
    np.save("in.npy", X.numpy()[:1].astype(np.float64))
    assert ask(folder, "--format", "torchscript", "-o", "net.pt", "--example", "in.npy").exit_code == 0
    assert torch.allclose(script("net.pt")(X), Predictor(folder).predict(X), atol=1e-6)


class TwoInputs(AetherModel):
    """Takes a dictionary and returns one; what it does is up to the test."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.drop = nn.Dropout(0.5)

    def training_step(self, batch):
        return {"loss": self.layer(batch[0]).mean()}

    def predict_step(self, batch):
        scores = self.drop(self.layer(batch["features"])) + batch["offset"][:, None]
        return {"scores": scores, "parts": {"best": scores.argmax(1)}}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def two(tmp_path):
    folder = train(tmp_path / "runs", TwoInputs(), RandomData(features=3))
    return Predictor(folder, model=TwoInputs)


EXAMPLE = {"features": np.eye(3), "offset": np.array([1.0, 2.0, 3.0])}


def test_several_inputs_and_outputs_have_their_names(two, tmp_path):
    exported = export_model(two, "torchscript", tmp_path / "two.pt", EXAMPLE)
    assert exported.inputs == {"features": "float32 [batch, 3]", "offset": "float32 [batch]"}
    assert exported.outputs == {"scores": "float32 [batch, 2]", "parts.best": "int64 [batch]"}
    scores, best = script(tmp_path / "two.pt")(torch.eye(3), torch.tensor([1.0, 2.0, 3.0]))
    expected = two.predict(EXAMPLE)
    assert torch.allclose(scores, expected["scores"])
    assert torch.equal(best, expected["parts"]["best"])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda batch: torch.zeros(len(batch["features"].tolist()), 2), "returns prediction of shape"),
        (lambda batch: batch["features"] * torch.rand(1).item(), "differs from the model's own"),
        (lambda batch: {"a": batch["features"], "text": "b"}, "text is no tensor"),
        (
            lambda batch: batch["features"] @ torch.ones(7, 7),
            "cannot export TwoInputs as torchscript, given features: float64 [3, 3]",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_recorded_wrongly_is_not_written(two, tmp_path, monkeypatch, answer, message):
    monkeypatch.setattr(TwoInputs, "predict_step", lambda self, batch: answer(batch))
    with pytest.raises(ModelError, match=re.escape(message)):
        export_model(two, "torchscript", tmp_path / "two.pt", EXAMPLE)
    assert not (tmp_path / "two.pt").exists()


def test_a_difference_is_noticed(two):
    model = _TensorsOnly(two, EXAMPLE)

    def nearly(tensors):
        scores, best = model(*tensors)
        return [scores.detach() + 1e-5, best]

    def wrong(tensors):
        scores, best = model(*tensors)
        return [scores.detach() + 1e-2, best]

    assert _difference(model, nearly) == pytest.approx(1e-5, rel=0.1)
    with pytest.raises(ModelError, match=r"scores differs from the model's own by up to 0\.01"):
        _difference(model, wrong)


def test_what_is_refused(folder, tmp_path):
    assert "give either --input-shape or --example" in refused(folder, "--format", "onnx", "-o", "a.onnx")
    assert "such as 1,8,8" in refused(folder, "--format", "onnx", "-o", "a.onnx", "--input-shape", "1xx8")
    assert "expected one of .onnx" in refused(folder, "--format", "onnx", "-o", "a.pt", "--input-shape", "10")
    assert "mat1 and mat2" in refused(folder, "--format", "torchscript", "-o", "a.pt", "--input-shape", "9")
    (tmp_path / "a.safetensors").write_text("precious")
    assert "use --force" in refused(folder, "--format", "safetensors", "-o", "a.safetensors")
    assert ask(folder, "--format", "safetensors", "-o", "a.safetensors", "--force").exit_code == 0
    with pytest.raises(ModelError, match="there is none"):
        export_model(Predictor(folder), "torchscript", tmp_path / "a.pt")
    with pytest.raises(ModelError, match="first dimension is the batch"):
        export_model(Predictor(folder), "torchscript", tmp_path / "a.pt", {"x": torch.tensor(1.0)})


def test_onnx_without_its_packages(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = refused(folder, "--format", "onnx", "-o", "a.onnx", "--input-shape", "10")
    assert "needs the package 'onnx', which is not installed. Install it with: pip install 'aetheria[onnx]'" in message


@pytest.mark.slow
def test_onnx_takes_any_number_of_samples(folder, tmp_path):
    onnx_reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    result = ask(folder, "--format", "onnx", "-o", "net.onnx", "--input-shape", "10")
    assert result.exit_code == 0, (result.output, result.exception)
    lines = result.stdout.splitlines()
    assert lines[1:3] == ["  takes   input: float32 [batch, 10]", "  returns prediction: float32 [batch, 2]"]
    assert float(lines[3].split()[-3]) < 1e-5
    evaluator = onnx_reference.ReferenceEvaluator("net.onnx")
    for rows in (X, X[:1]):
        (found,) = evaluator.run(None, {"input": rows.numpy()})
        np.testing.assert_allclose(found, Predictor(folder).predict(rows), atol=1e-6)


@pytest.mark.slow
def test_onnx_of_two_inputs(two, tmp_path):
    pytest.importorskip("onnxscript")
    exported = export_model(two, "onnx", tmp_path / "two.onnx", EXAMPLE)
    assert exported.inputs == {"features": "float32 [batch, 3]", "offset": "float32 [batch]"}
    assert exported.outputs == {"scores": "float32 [batch, 2]", "parts.best": "int64 [batch]"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of a check of shapes, which stay as they are
@pytest.mark.parametrize("form", ["torchscript", "onnx"])
@pytest.mark.parametrize("name", ["digits", "text"])
def test_the_models_that_ship_with_the_package(tmp_path, form, name):
    if form == "onnx":
        pytest.importorskip("onnxscript")
    if name == "digits":
        data = pytest.importorskip("aetheria.plugins").DigitsData()
        pytest.importorskip("sklearn")
        model, example = DigitsClassifier(channels=4), example_of_shape([1, 8, 8])
    else:
        data = TextData(block_size=16)
        model, example = TinyGPT(block_size=16, layers=1, heads=2, width=16), example_of_shape([16], "int64")
    predictor = Predictor(train(tmp_path / "runs", model, data))
    ending = {"torchscript": "pt", "onnx": "onnx"}[form]
    assert export_model(predictor, form, tmp_path / f"model.{ending}", example).difference < 1e-5
