"""From a folder to a model with its weights, and what is said where there is no way."""

import dataclasses
import json
import shutil

import pytest
import torch
from inference_cases import PLUGIN, Answers, Net, X, train
from loguru import logger
from tests.warm import run_warm
from torch import nn

from aetheria import AetherModel, Predictor, Registry
from aetheria.errors import (
    ConfigError,
    ModelError,
    PluginError,
    RegistryError,
    SnapshotDamagedError,
    SnapshotError,
    SnapshotMismatchError,
)
from aetheria.inference.export import export_model
from aetheria.runs import RunFolder
from aetheria.snapshot import Snapshot, list_snapshots
from aetheria.snapshot.format import Manifest


@pytest.fixture
def told():
    """The warnings that were logged."""
    lines: list[str] = []
    handler = logger.add(lambda message: lines.append(str(message.record["message"])), level="WARNING")
    yield lines
    logger.remove(handler)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_every_name_of_the_weights_gives_the_same_answers(trained):
    folder, model = trained
    newest = list_snapshots(folder / "snapshots")[-1]
    with torch.no_grad():
        expected = model(X)
    weights = newest.path / "model.safetensors"
    for source in (folder, str(folder), RunFolder(folder), newest, newest.path, str(newest.path), weights):
        predictor = Predictor(source)
        assert predictor.path == newest.path
        assert torch.equal(predictor.predict(X), expected)
    bare = shutil.copy(weights, folder.parent / "bare.safetensors")
    by_name = Predictor(model_name="Net", model_params={"hidden": 6}, checkpoint_path=bare, device="cpu")
    assert torch.equal(by_name.predict(X), expected)
    assert by_name.snapshot is None


def test_it_evaluates_and_leaves_no_trace(trained):
    folder, _ = trained
    before = torch.get_rng_state()
    predictor = Predictor(folder)
    answers = predictor.predict(X)
    assert torch.equal(predictor.predict(X), answers)  # dropout is off
    assert torch.allclose(predictor.predict(X[:1]), answers[:1])  # batch normalisation takes its running statistics
    assert torch.equal(torch.get_rng_state(), before)
    assert not predictor.model.training
    assert not answers.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (weight * answers).sum().backward()  # not an inference tensor: it may be a target
    assert weight.grad is not None


def test_a_process_that_knows_nothing_of_the_model_finds_it_beside_the_configuration(tmp_path, trained):
    folder, model = trained
    (tmp_path / "project" / "plugins").mkdir(parents=True)
    (tmp_path / "project" / "plugins" / "net.py").write_text(PLUGIN)
    RunFolder(folder).update(config_source=str(tmp_path / "project" / "config.yaml"))
    code = (
        "import json, sys; from aetheria import Predictor\n"
        f"print(json.dumps(Predictor({str(folder)!r}).predict({X.tolist()!r}).tolist()))"
    )
    done = run_warm(["-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.allclose(torch.tensor(json.loads(done.stdout)), model(X), atol=1e-6)


def test_a_model_is_found_where_the_user_says_or_stands(tmp_path, monkeypatch, trained):
    folder, _ = trained
    here = tmp_path / "here"
    (here / "plugins").mkdir(parents=True)
    (here / "plugins" / "net.py").write_text(PLUGIN)
    Registry._targets["model"].pop("Net")
    with Registry.isolated(), pytest.raises(RegistryError, match=r"unknown model 'Net'.* from no folder"):
        Predictor(folder)
    with Registry.isolated():
        assert type(Predictor(folder, plugins=here / "plugins").model).__name__ == "Net"
    monkeypatch.chdir(here)
    with Registry.isolated():
        assert type(Predictor(folder).model).__name__ == "Net"
    with pytest.raises(RegistryError, match=r"unknown model 'Nett'.* Plugins were imported from .*/here/plugins"):
        Predictor(folder, model_name="Nett")


@pytest.mark.parametrize("way", ["inside", "link", "process", "relative"])
def test_a_run_folder_that_somebody_sends_cannot_run_code(tmp_path, monkeypatch, trained, way):
    folder, _ = trained
    evil = folder / "project" / "plugins"
    evil.mkdir(parents=True)
    (evil / "net.py").write_text("raise SystemExit('code of a stranger ran')")
    link = tmp_path / "link"
    source = {
        "inside": f"{folder}/project/config.yaml",
        "link": f"{link}/config.yaml",
        "process": "/proc/self/cwd/outside/config.yaml",
        "relative": "outside/config.yaml",
    }[way]
    if way == "link":
        link.symlink_to(folder / "project")
    elif way in ("process", "relative"):
        (folder / "project").rename(tmp_path / "outside")
    RunFolder(folder).update(config_source=source)
    Registry._targets["model"].pop("Net")
    with pytest.raises(RegistryError, match="unknown model 'Net'"):
        Predictor(folder)
    monkeypatch.chdir(folder)
    (folder / "plugins").mkdir()
    (folder / "plugins" / "net.py").write_text("raise SystemExit('code of a stranger ran')")
    with pytest.raises(RegistryError, match="plugins=PATH"):
        Predictor(".")
    with pytest.raises(SystemExit):
        Predictor(".", plugins="plugins")  # asked for by name


def test_a_damaged_snapshot_is_named_and_the_one_before_is_used(trained, told):
    folder, _ = trained
    *_, before, newest = list_snapshots(folder / "snapshots")
    flip_a_byte(newest.path / "model.safetensors")
    assert Predictor(folder).path == before.path
    assert len(told) == 1
    assert f"{newest.path} is damaged: the bytes of model.safetensors do not match their sha256" in told[0]
    with pytest.raises(SnapshotDamagedError, match=r"model\.safetensors"):
        Predictor(newest.path)
    for snapshot in list_snapshots(folder / "snapshots"):
        (snapshot.path / "state.pt").unlink(missing_ok=True)
    with pytest.raises(SnapshotError, match=r"every snapshot of .* is damaged"):
        Predictor(folder)


def test_the_best_by_a_metric(trained, told):
    folder, _ = trained
    snapshots = list_snapshots(folder / "snapshots")
    for snapshot, value in zip(snapshots, (0.3, 0.1, 0.2), strict=True):
        manifest = dataclasses.replace(snapshot.manifest, metrics={"val_loss": value})
        (snapshot.path / "manifest.json").write_bytes(manifest.encode())
    assert Predictor(folder, best="val_loss", mode="min").path == snapshots[1].path
    assert Predictor(folder, best="val_loss", mode="max").path == snapshots[0].path
    flip_a_byte(snapshots[1].path / "state.pt")
    assert Predictor(folder, best="val_loss", mode="min").path == snapshots[2].path
    assert "state.pt" in told[0]
    with pytest.raises(SnapshotError, match=r"'val_los'\. Did you mean 'val_loss'\?"):
        Predictor(folder, best="val_los", mode="min")
    with pytest.raises(ConfigError, match="whether 'min' or 'max'"):
        Predictor(folder, best="val_loss")
    with pytest.raises(ConfigError, match="not a run folder"):
        Predictor(snapshots[0].path, best="val_loss", mode="min")
    (snapshots[2].path / "manifest.json").write_text("{}")
    flip_a_byte(snapshots[0].path / "manifest.json")
    with pytest.raises(SnapshotError, match=r"every snapshot .* is damaged"):
        Predictor(folder, best="val_loss", mode="min")


def test_a_run_without_a_snapshot_and_places_without_anything(tmp_path):
    run = RunFolder.create(tmp_path, "young")
    with pytest.raises(SnapshotError, match="has no snapshot yet"):
        Predictor(run)
    with pytest.raises(SnapshotError, match="there is no run, no snapshot"):
        Predictor(tmp_path / "nowhere")
    with pytest.raises(SnapshotDamagedError, match=r"has no manifest\.json"):
        Predictor(tmp_path)
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(SnapshotDamagedError, match=r"does not read as a \.safetensors file"):
        Predictor(tmp_path / "text.safetensors", model_name="Net")
    with pytest.raises(ConfigError, match="neither or both"):
        Predictor(model_name="Net")


def test_a_model_that_was_not_registered_is_passed(tmp_path, trained):
    class Unnamed(Net):
        pass

    folder, model = train(tmp_path, Unnamed(hidden=5), epochs=1)
    with pytest.raises(RegistryError, match=r"was not registered when it was trained: .*Unnamed.* Pass model="):
        Predictor(folder)
    with torch.no_grad():
        expected = model.eval()(X)
    assert torch.equal(Predictor(folder, model=Unnamed).predict(X), expected)
    instance = Unnamed(hidden=5)
    assert Predictor(folder, model=instance).model is instance
    assert torch.equal(Predictor(folder, model_name="Net").predict(X), expected)  # the same layers
    with pytest.raises(ConfigError, match="both model and model_name"):
        Predictor(folder, model=Unnamed, model_name="Net")
    with pytest.raises(ConfigError, match="built already"):
        Predictor(folder, model=instance, model_params={"hidden": 5})
    with pytest.raises(ModelError, match="found Linear as the model"):
        Predictor(folder, model=nn.Linear(4, 1))
    with pytest.raises(SnapshotMismatchError, match=r"step-00000005: the snapshot is of another model"):
        Predictor(folder, model=Net(hidden=7))


def test_arguments_that_were_not_stored_are_asked_for(tmp_path):
    folder, model = train(tmp_path, Net(hidden=5, head=nn.Linear(5, 1)), epochs=1)
    with pytest.raises(ConfigError, match=r"does not say which head .* model_params=\{'head': \.\.\.\}"):
        Predictor(folder)
    predictor = Predictor(folder, model_params={"head": nn.Linear(5, 1)})
    with torch.no_grad():
        assert torch.equal(predictor.predict(X), model.eval()(X))
    with pytest.raises(ConfigError, match="head_: found an unknown parameter"):
        Predictor(folder, model_params={"head": nn.Linear(5, 1), "head_": 1})


def test_a_name_that_nobody_registered(trained):
    folder, _ = trained
    with pytest.raises(RegistryError, match=r"unknown model 'Nett'.*Did you mean 'Net'"):
        Predictor(folder, model_name="Nett")
    with pytest.raises(PluginError, match="there is no folder"):
        Predictor(folder, plugins="nowhere")
    Registry.register_model("Function")(lambda **_: nn.Linear(4, 1))
    with pytest.raises(ModelError, match="is a Linear, expected an AetherModel"):
        Predictor(folder, model_name="Function")


def test_a_file_of_weights_alone_must_be_told_the_model(tmp_path, trained):
    folder, _ = trained
    bare = shutil.copy(list_snapshots(folder / "snapshots")[-1].path / "model.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(RegistryError, match=r"weights alone .* Pass model_name="):
        Predictor(bare)
    with pytest.raises(SnapshotMismatchError, match="of another model"):
        Predictor(bare, model_name="Net", model_params={"hidden": 7})


def test_an_exported_file_says_its_model_and_notices_damage(tmp_path, trained):
    folder, model = trained
    path = tmp_path / "net.safetensors"
    export_model(Predictor(folder), "safetensors", path)
    with torch.no_grad():
        assert torch.equal(Predictor(path).predict(X), model(X))
    flip_a_byte(path)
    with pytest.raises(SnapshotDamagedError, match="do not match their digest"):
        Predictor(path)


def test_shared_weights_are_stored_once_and_loaded_twice(tmp_path):
    class Tied(Answers):
        def __init__(self):
            super().__init__(lambda batch: self.second(self.first(batch)))
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

    folder, model = train(tmp_path / "runs", Tied(), epochs=1)
    batch = torch.eye(3)
    assert torch.equal(Predictor(folder, model=Tied).predict(batch), model.eval().predict_step(batch).detach())
    weights = list_snapshots(folder / "snapshots")[-1].path / "model.safetensors"
    bare = Predictor(shutil.copy(weights, tmp_path / "b.safetensors"), model=Tied)
    assert torch.equal(bare.predict(batch), model.predict_step(batch).detach())


def test_extra_state_comes_from_the_snapshot(tmp_path):
    class Counting(Net):
        calls = 0

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state):
            self.calls = state["calls"]

        def training_step(self, batch):
            self.calls += 1
            return super().training_step(batch)

    folder, model = train(tmp_path / "runs", Counting(), epochs=1)
    predictor = Predictor(folder, model=Counting)
    assert predictor.model.calls == model.calls > 0
    weights = predictor.path / "model.safetensors"
    with pytest.raises(SnapshotMismatchError, match="lacks the extra state"):
        Predictor(shutil.copy(weights, tmp_path / "b.safetensors"), model=Counting)
    with pytest.raises(ModelError, match="extra state"):
        export_model(predictor, "safetensors", tmp_path / "c.safetensors")


def test_a_snapshot_of_a_newer_format(trained):
    folder, _ = trained
    newest = list_snapshots(folder / "snapshots")[-1]
    manifest = dataclasses.replace(Manifest.read(newest.path), format=99)
    (newest.path / "manifest.json").write_bytes(manifest.encode())
    with pytest.raises(SnapshotError, match="Upgrade Aetheria"):
        Predictor(folder)
    with pytest.raises(SnapshotError, match="Upgrade Aetheria"):
        Predictor(Snapshot(newest.path))


def test_a_model_that_can_be_trained_but_not_asked(tmp_path):
    class Mute(Answers):
        predict_step = AetherModel.predict_step

    with pytest.raises(ModelError, match="Mute has neither `predict_step` nor `forward`"):
        Predictor(train(tmp_path, Mute(), epochs=1)[0], model=Mute())


def test_devices(trained):
    folder, _ = trained
    for device in ("cpu", torch.device("cpu"), "auto"):
        assert Predictor(folder, device).predict(X).device.type == "cpu"  # the answers, wherever they are computed
    with pytest.raises(ConfigError, match="found the device 'gpu', expected"):
        Predictor(folder, "gpu")
    if torch.cuda.is_available():
        found, expected = Predictor(folder, "cuda").predict(X), Predictor(folder, "cpu").predict(X)
        assert torch.allclose(found, expected, atol=1e-4)
    else:
        with pytest.raises(ConfigError, match="device 'cuda' was asked for, but the model cannot be moved there"):
            Predictor(folder, "cuda")
