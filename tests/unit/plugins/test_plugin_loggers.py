"""The loggers, each with the real package where it is installed; every one of them resumes where it was."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import sqlite3
import struct
import sys

import pytest
from loguru import logger

from aetheria.core import RunEvent
from aetheria.errors import MissingDependencyError
from aetheria.plugins import (
    ConsoleLogger,
    CSVLogger,
    MLflowLogger,
    TensorBoardLogger,
    TrackioLogger,
    WandbLogger,
)

CONFIG = {"epochs": 3, "model_params": {"learning_rate": 0.001, "layers": [1, 2]}, "callbacks": []}


def session(make, run, rows, *, config=CONFIG, error=None):
    """One life of a run: opens, logs, closes. Returns the logger."""
    log = make()
    log.context = run
    log.on_train_start()
    if config is not None:
        log.log_hyperparameters(config)
    for step, metrics in rows:
        log.log_metrics(metrics, step)
    if error is not None:
        log.on_exception(error)
    log.teardown()
    return log


# --- console ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines():
    collected = []
    handler = logger.add(lambda line: collected.append(str(line).strip()), format="{level} {message}", level=0)
    yield collected
    logger.remove(handler)


def test_metrics_and_events_as_log_lines(run, lines):
    log = session(ConsoleLogger, run, [(10, {"loss": 0.123456, "val_loss": 1e-9})])
    log.on_event(RunEvent("nonfinite", 11, "dropped {a} window"))
    log.on_event(RunEvent("snapshot", 12, "written"))
    assert lines == [
        "INFO step 10  loss 0.1235  val_loss 1e-09",
        "WARNING step 11  nonfinite: dropped {a} window",
        "INFO step 12  snapshot: written",
    ]


def test_without_metrics_only_what_is_grave_is_left(run, lines):
    log = session(lambda: ConsoleLogger(metrics=False), run, [(10, {"loss": 0.1})])
    log.on_event(RunEvent("snapshot", 12, "written"))
    log.on_event(RunEvent("error", 13, "CSVLogger.log_metrics raised", {"traceback": "File x, line 1"}))
    assert lines == ["WARNING step 13  error: CSVLogger.log_metrics raised\nFile x, line 1"]


def test_events_are_logged_on_the_main_process_only(run, lines):
    run.accelerator.rank = 1
    session(ConsoleLogger, run, []).on_event(RunEvent("warning", 1, "hello"))
    assert not lines


# --- CSV -------------------------------------------------------------------------------------------------------------


def table(run):
    with (run.folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_column_may_appear_later(run):
    session(
        CSVLogger, run, [(1, {"loss": 1.0}), (2, {"loss": 0.5, "val_loss": 0.7}), (3, {"loss": 0.25}), (4, {"x": 1.0})]
    )
    assert table(run) == [
        {"step": "1", "loss": "1.0", "val_loss": "", "x": ""},
        {"step": "2", "loss": "0.5", "val_loss": "0.7", "x": ""},
        {"step": "3", "loss": "0.25", "val_loss": "", "x": ""},
        {"step": "4", "loss": "", "val_loss": "", "x": "1.0"},
    ]
    assert [path.name for path in run.folder.iterdir()] == ["metrics.csv"]


def test_a_continued_run_appends(run):
    session(CSVLogger, run, [(1, {"loss": 1.0}), (2, {"loss": 0.5})])
    session(CSVLogger, run, [(2, {"val_loss": 0.7}), (3, {"loss": 0.25})])
    assert [(row["step"], row["loss"], row["val_loss"]) for row in table(run)] == [
        ("1", "1.0", ""),
        ("2", "0.5", ""),
        ("2", "", "0.7"),
        ("3", "0.25", ""),
    ]


def test_a_row_that_was_cut_off_does_not_spoil_the_next(run):
    (run.folder / "metrics.csv").write_text("step,loss,accuracy\r\n1,1.0,0.5\r\n2,0.")
    session(CSVLogger, run, [(3, {"loss": 0.25}), (4, {"val_loss": 0.5})])
    assert [row["step"] for row in table(run)] == ["1", "2", "3", "4"]
    assert table(run)[2]["loss"] == "0.25"
    assert None not in table(run)[1]


def test_every_row_is_on_disk_at_once(run):
    log = CSVLogger()
    log.context = run
    log.log_metrics({"loss": math.nan}, 1)
    assert table(run) == [{"step": "1", "loss": "nan"}]
    log.teardown()


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def tensorboard_events(folder):
    """Reads the event files (TFRecord: length, checksum, event, checksum) in the order of their making."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content, position = path.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)
            events.append(Event.FromString(content[position + 12 : position + 12 + length]))
            position += length + 16
    return events


def test_tensorboard(run):
    pytest.importorskip("tensorboardX")
    session(TensorBoardLogger, run, [(1, {"loss": 1.0}), (2, {"loss": 0.5, "val_loss": 0.7})])
    run.global_step = 1
    session(TensorBoardLogger, run, [(2, {"loss": 0.25})])
    events = tensorboard_events(run.folder / "tensorboard")
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]
    assert [(step, tag) for step, tag, _ in scalars] == [(1, "loss"), (2, "loss"), (2, "val_loss"), (2, "loss")]
    assert [value for *_, value in scalars] == pytest.approx([1.0, 0.5, 0.7, 0.25])
    texts = [str(value.tensor) for event in events for value in event.summary.value if value.HasField("tensor")]
    assert any("learning_rate" in text for text in texts)
    # what was logged after the snapshot is forgotten, what was logged at its step is not
    assert [event.step for event in events if event.session_log.status] == [2]


# --- Weights & Biases ------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    return pytest.importorskip("wandb")


def test_wandb_offline(run, wandb):
    log = WandbLogger(mode="offline")
    log.context = run
    log.log_hyperparameters(CONFIG)
    log.log_metrics({"loss": 1.0}, 5)
    log.log_metrics({"loss": 0.5}, 3)  # back at the snapshot's step: W&B's own step would refuse
    external = log._run
    assert external.id == "quiet-otter"
    assert external.config["model_params"]["learning_rate"] == 0.001
    assert dict(external.summary)["loss"] == 0.5
    assert dict(external.summary)["global_step"] == 3
    log.teardown()
    assert list((run.folder / "wandb").glob("offline-run-*-quiet-otter/run-quiet-otter.wandb"))


def test_wandb_resumes_with_a_changed_configuration(run, wandb):
    session(lambda: WandbLogger(mode="offline"), run, [(1, {"loss": 1.0})], error=RuntimeError("killed"))
    log = session(lambda: WandbLogger(mode="offline"), run, [(2, {"loss": 0.5})], config={"epochs": 4})
    assert log._run is None


# --- MLflow ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("alembic")
    package = pytest.importorskip("mlflow")
    return package.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning")  # MLflow 3.17 with SQLAlchemy 2.1
def test_mlflow_resumes_the_same_run(run, mlflow):
    client, uri = mlflow

    def make():
        return MLflowLogger(tracking_uri=uri)

    session(make, run, [(1, {"loss": 1.0})], error=RuntimeError("boom"))
    experiment = client.get_experiment_by_name("aetheria").experiment_id
    [external] = client.search_runs([experiment])
    assert external.info.status == "FAILED"
    assert external.info.run_name == "quiet-otter"
    session(make, run, [(2, {"loss": 0.5, "val_loss": 0.7})], config={"epochs": 4, "seed": 1})
    [external] = client.search_runs([experiment])
    assert external.info.status == "FINISHED"
    assert external.data.params == {
        "epochs": "3",
        "model_params.learning_rate": "0.001",
        "model_params.layers": "[1, 2]",
        "callbacks": "[]",
        "seed": "1",
    }
    history = client.get_metric_history(external.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]


# --- Trackio ---------------------------------------------------------------------------------------------------------


def test_trackio_resumes_the_same_run(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported, which is here
    trackio = pytest.importorskip("trackio")
    session(TrackioLogger, run, [(1, {"loss": 1.0})])
    session(TrackioLogger, run, [(2, {"loss": 0.5})])
    [external] = trackio.Api().runs("aetheria")
    assert external.name == "quiet-otter"
    [database] = (tmp_path / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(step, json.loads(metrics)) for step, metrics in rows] == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]


# --- what is missing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "package", "extra"),
    [
        (TensorBoardLogger, "tensorboardX", "tensorboard"),
        (WandbLogger, "wandb", "wandb"),
        (MLflowLogger, "mlflow", "mlflow"),
        (TrackioLogger, "trackio", "trackio"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(make, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # what Python does for a module that must not be imported
    with pytest.raises(MissingDependencyError, match=rf"{make.__name__} needs .*aetheria\[{extra}\]"):
        make()
