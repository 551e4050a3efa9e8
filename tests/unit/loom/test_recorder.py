"""`run.db`: what is written is what is read, over lives, seals, losses and live readers."""

from __future__ import annotations

import math
import os
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from aetheria.errors import RunFolderError
from aetheria.loom import database as database_module
from aetheria.loom.database import SEALED_POINTS, Event, Note, RunDatabase
from aetheria.loom.filesystem import FileSystem
from aetheria.loom.reader import RunReader
from aetheria.loom.recorder import Recorder


def point(step: int, **values: float) -> database_module.MetricRecord:
    return (1000.0 + step, step, tuple(values), tuple(values.values()))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


@pytest.fixture
def database(path: Path) -> Iterator[RunDatabase]:
    database = RunDatabase(path)
    database.begin_life(0, started=1.0)
    yield database
    database.close()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What loguru said, from WARNING on."""
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(sink)


def next_life(path: Path, start_step: int, started: float) -> RunDatabase:
    database = RunDatabase(path)
    database.begin_life(start_step, started=started)
    return database


# --- the database and its reader -------------------------------------------------------------------------------------


def test_what_is_written_is_read(database: RunDatabase, path: Path) -> None:
    event = Event(5.0, 2, "nonfinite", "a window was dropped", {"ids": [3, 1], "loss": math.inf})
    note = Note(6.0, 2, "ada", "too warm")
    database.write([point(1, loss=0.5, accuracy=0.25), point(2, loss=0.25)], [event], [note])
    reader = RunReader(path)
    assert reader.series() == ["accuracy", "loss"]
    curve = reader.metric("loss")
    assert curve.steps.dtype == np.int64
    assert curve.values.dtype == curve.times.dtype == np.float64
    assert curve.steps.tolist() == [1, 2]
    assert curve.values.tolist() == [0.5, 0.25]
    assert curve.times.tolist() == [1001.0, 1002.0]
    assert reader.last() == {"accuracy": (1, 0.25), "loss": (2, 0.25)}
    assert reader.events() == reader.events("nonfinite") == [event._replace(life=1)]
    assert reader.events("stop") == []
    assert reader.notes() == [note._replace(life=1)]
    (life,) = reader.lives()
    assert (life.id, life.started, life.start_step, life.pid) == (1, 1.0, 0, os.getpid())


def test_an_unknown_metric_and_a_missing_file_are_empty(database: RunDatabase, path: Path, tmp_path: Path) -> None:
    assert [column.size for column in RunReader(path).metric("loss")] == [0, 0, 0]
    missing = RunReader(tmp_path / "no" / "run.db")
    assert missing.series() == missing.events() == missing.notes() == missing.lives() == []
    assert missing.last() == {}
    assert missing.best("loss", "min") is None
    assert not (tmp_path / "no").exists()


def test_a_file_that_is_just_being_made_is_empty(path: Path) -> None:
    path.touch()
    assert RunReader(path).series() == []


def test_not_a_number_is_kept_but_never_the_best(database: RunDatabase, path: Path) -> None:
    values = [math.nan, 2.0, -math.inf, math.inf, math.nan]
    database.write([point(step, loss=value) for step, value in enumerate(values)])
    reader = RunReader(path)
    assert np.array_equal(reader.metric("loss").values, values, equal_nan=True)
    assert reader.best("loss", "min") == (2, -math.inf)
    assert reader.best("loss", "max") == (3, math.inf)
    database.write([point(5, accuracy=math.nan)])
    assert reader.best("accuracy", "max") is None
    assert math.isnan(reader.last()["accuracy"][1])


def test_the_first_of_equal_values_is_the_best(database: RunDatabase, path: Path) -> None:
    database.write([point(step, loss=value) for step, value in enumerate([2.0, 1.0, 3.0, 1.0])])
    assert RunReader(path).best("loss", "min") == (1, 1.0)


def test_small_chunks_are_sealed_when_enough_have_come(database: RunDatabase, path: Path) -> None:
    def chunks() -> list[tuple[int, int, int, int, float, float]]:
        with sqlite3.connect(path) as connection:
            query = "SELECT sealed, count, first_step, last_step, minimum, maximum FROM chunks ORDER BY id"
            rows = connection.execute(query).fetchall()
        connection.close()
        return rows

    half = SEALED_POINTS // 2
    database.write([point(step, loss=-step) for step in range(half)])
    assert chunks() == [(0, half, 0, half - 1, 1.0 - half, 0.0)]
    database.write([point(step, loss=-step) for step in range(half, SEALED_POINTS)])
    assert chunks() == [(1, SEALED_POINTS, 0, SEALED_POINTS - 1, 1.0 - SEALED_POINTS, 0.0)]
    database.write([point(SEALED_POINTS, loss=math.nan)])
    assert chunks()[1:] == [(0, 1, SEALED_POINTS, SEALED_POINTS, None, None)]
    curve = RunReader(path).metric("loss")
    assert curve.steps.tolist() == list(range(SEALED_POINTS + 1))
    assert curve.values[:-1].tolist() == [-float(step) for step in range(SEALED_POINTS)]


def test_closing_seals_and_leaves_a_single_file(path: Path) -> None:
    database = next_life(path, 0, 1.0)
    for step in range(3):
        database.write([point(step, loss=step)])
    database.close()
    assert [file.name for file in path.parent.iterdir()] == ["run.db"]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT sealed, count FROM chunks").fetchall() == [(1, 3)]
    connection.close()


def test_closing_while_somebody_reads_keeps_the_log(path: Path) -> None:
    database = next_life(path, 0, 1.0)
    database.write([point(1, loss=1.0)])
    reading = sqlite3.connect(path)
    assert reading.execute("SELECT count(*) FROM chunks").fetchone() == (1,)
    database.close()
    reading.close()
    assert RunReader(path).last() == {"loss": (1, 1.0)}


def test_steps_that_a_later_life_walks_again_are_hidden(path: Path) -> None:
    for start, (begin, end) in enumerate([(0, 10), (4, 8), (6, 9)]):
        database = next_life(path, begin, started=float(start))
        database.write([point(step, loss=100.0 * start + step) for step in range(begin + 1, end + 1)])
        database.write(events=[Event(0.0, end, "stop", "killed")])
        database.close()
    reader = RunReader(path)
    curve = reader.metric("loss")
    assert curve.steps.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert curve.values.tolist() == [1, 2, 3, 4, 105, 106, 207, 208, 209]
    assert reader.last() == {"loss": (9, 209.0)}
    assert reader.best("loss", "max") == (9, 209.0)
    assert [(event.step, event.life) for event in reader.events()] == [(10, 1), (8, 2), (9, 3)]
    assert [life.start_step for life in reader.lives()] == [0, 4, 6]


def test_a_metric_is_unknown_again_when_all_its_points_were_rewound(path: Path) -> None:
    database = next_life(path, 0, started=1.0)
    database.write([point(1, loss=1.0), point(5, val_loss=2.0)])
    database.close()
    next_life(path, 3, started=2.0).close()
    reader = RunReader(path)
    assert reader.series() == ["loss"]
    assert reader.last() == {"loss": (1, 1.0)}
    assert reader.metric("val_loss").steps.size == 0


def test_a_last_chunk_that_is_cut_shows_its_last_visible_point(path: Path) -> None:
    database = next_life(path, 0, started=1.0)
    database.write([point(step, loss=step) for step in range(10)])
    database.close()
    next_life(path, 4, started=2.0).close()
    assert RunReader(path).last() == {"loss": (4, 4.0)}


def test_opening_anew_in_the_same_life_is_no_new_life(path: Path) -> None:
    next_life(path, 0, started=1.0).close()
    database = RunDatabase(path)
    assert database.begin_life(0, started=1.0) == 1
    assert database.begin_life(0, started=2.0) == 2
    database.close()


def test_writing_before_a_life_began_is_refused(path: Path) -> None:
    database = RunDatabase(path)
    with pytest.raises(RunFolderError, match="call begin_life first"):
        database.write([point(1, loss=1.0)])
    database.close()


def test_a_step_that_is_no_step_leaves_nothing_behind(database: RunDatabase, path: Path) -> None:
    with pytest.raises(struct.error):
        database.write([point(1, loss=1.0), (0.0, 2**70, ("loss", "new"), (1.0, 2.0))])
    assert RunReader(path).series() == []
    database.write([point(1, loss=1.0)])
    assert RunReader(path).series() == ["loss"]


def test_a_newer_schema_is_refused_by_name(path: Path) -> None:
    RunDatabase(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(RunFolderError, match=r"run\.db has schema version 7; this version of Aetheria writes 1"):
        RunDatabase(path)
    with pytest.raises(RunFolderError, match=r"run\.db has schema version 7; this version of Aetheria reads 1"):
        RunReader(path).series()


def test_another_file_is_refused_by_name(path: Path) -> None:
    path.write_text("loss,accuracy\n" * 100, encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"run\.db is not a run database.*Move it away"):
        RunDatabase(path)
    with pytest.raises(RunFolderError, match=r"cannot read .*run\.db: file is not a database"):
        RunReader(path).series()


def test_network_file_systems_get_a_rollback_journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "filesystem_of", lambda path: FileSystem("nfs4", Path("/"), network=True))
    database = next_life(path, 0, started=1.0)
    database.write([point(1, loss=1.0)])
    assert [file.name for file in path.parent.iterdir()] == ["run.db"]  # no -wal, no -shm
    assert RunReader(path).last() == {"loss": (1, 1.0)}
    database.close()


def test_a_reader_keeps_up_with_a_live_writer(path: Path) -> None:
    """Every reading is a consistent beginning of what was written, also while chunks are being sealed."""
    total, batch = 6 * SEALED_POINTS, 64
    failures: list[str] = []
    done = threading.Event()

    def read() -> None:
        reader, seen = RunReader(path), 0
        while not done.is_set():
            curve = reader.metric("loss")
            if not np.array_equal(curve.steps, np.arange(curve.steps.size)) or curve.steps.size < seen:
                failures.append(f"after {seen} points: {curve.steps}")
            seen = curve.steps.size

    thread = threading.Thread(target=read)
    thread.start()
    database = next_life(path, 0, started=1.0)
    for start in range(0, total, batch):
        database.write([point(step, loss=step) for step in range(start, start + batch)])
    done.set()
    thread.join()
    database.close()
    assert not failures
    assert RunReader(path).metric("loss").steps.size == total


points = st.tuples(
    st.floats(0, 1e10),
    st.integers(-(2**63), 2**63 - 1),
    st.dictionaries(st.sampled_from(["loss", "val_loss", "ä/ü", "x y"]), st.floats(), max_size=3),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(points, max_size=6), max_size=6))
def test_any_points_in_any_batches_come_back(batches: list[list[tuple[float, int, dict[str, float]]]]) -> None:
    expected: dict[str, list[tuple[int, float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(database_module, "SEALED_POINTS", 5)
        database = next_life(Path(folder) / "run.db", 0, started=1.0)
        for batch in batches:
            database.write([(when, step, tuple(values), tuple(values.values())) for when, step, values in batch])
            for when, step, values in batch:
                for name, value in values.items():
                    expected.setdefault(name, []).append((step, value, when))
        reader = RunReader(Path(folder) / "run.db")
        for _ in range(2):  # before and after everything is sealed
            assert reader.series() == sorted(expected)
            for name, known in expected.items():
                curve = reader.metric(name)
                steps, values, times = zip(*known)
                assert curve.steps.tolist() == list(steps)
                assert curve.values.tobytes() == np.array(values).tobytes()  # NaN too, bit for bit
                assert curve.times.tolist() == list(times)
            database.close() if _ == 0 else None


# --- the recorder ----------------------------------------------------------------------------------------------------


def test_what_was_queued_before_a_flush_is_there_after_it(path: Path) -> None:
    recorder = Recorder(path, run_step=3)
    recorder.metrics({"loss": 0.5, "accuracy": 1}, step=4)
    recorder.event("snapshot", 4, "saved", {"path": "snapshots/step-4", "loss": math.nan})
    recorder.note(4, "so far, so good", author="ada")
    assert recorder.flush()
    reader = RunReader(path)
    assert reader.last() == {"loss": (4, 0.5), "accuracy": (4, 1.0)}
    (event,) = reader.events()
    assert (event.kind, event.step, event.message, event.data["path"]) == ("snapshot", 4, "saved", "snapshots/step-4")
    assert math.isnan(event.data["loss"])
    assert [(note.text, note.author) for note in reader.notes()] == [("so far, so good", "ada")]
    assert [life.start_step for life in reader.lives()] == [3]
    assert recorder.close()
    assert (recorder.dropped, recorder.lost) == (0, 0)


def test_the_caller_may_change_its_dictionary_afterwards(path: Path) -> None:
    recorder = Recorder(path)
    metrics, data = {"loss": 1.0}, {"ids": [1]}
    recorder.metrics(metrics, 1)
    recorder.event("nonfinite", 1, "dropped", data)
    metrics["loss"] = 2.0
    data["ids"].append(2)
    recorder.close()
    assert RunReader(path).last() == {"loss": (1, 1.0)}
    assert RunReader(path).events()[0].data == {"ids": [1]}


def test_what_is_no_number_or_no_json_is_refused_at_once(path: Path) -> None:
    recorder = Recorder(path)
    with pytest.raises(ValueError, match="could not convert string to float"):
        recorder.metrics({"loss": "low"}, 1)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="not JSON serializable"):
        recorder.event("warning", 1, "odd", {"path": object()})
    assert recorder.close()
    assert recorder.lost == 0


def test_closing_writes_everything_and_closing_again_changes_nothing(path: Path) -> None:
    recorder = Recorder(path)
    for step in range(500):
        recorder.metrics({"loss": float(step)}, step)
    assert recorder.close()
    assert recorder.close()
    assert not recorder.flush()
    assert RunReader(path).metric("loss").steps.tolist() == list(range(500))


def test_a_full_queue_drops_the_oldest_metrics_and_says_so(path: Path, warnings: list[str]) -> None:
    path.mkdir()  # in the way: the database cannot be made
    recorder = Recorder(path, capacity=100)
    assert not recorder.flush()
    for step in range(250):
        recorder.metrics({"loss": float(step)}, step)
    recorder.event("nonfinite", 7, "a window was dropped")
    path.rmdir()
    assert recorder.flush()
    assert recorder.dropped == recorder.lost == 150
    reader = RunReader(path)
    assert reader.metric("loss").steps.tolist() == list(range(150, 250))
    dropped, lost = reader.events()
    assert (dropped.kind, dropped.step) == ("nonfinite", 7)
    assert (lost.kind, lost.step, lost.data) == ("lost", 249, {"records": 150})
    recorder.metrics({"loss": 1.0}, 250)
    assert recorder.close()
    assert len(reader.events()) == 2
    (warning,) = warnings
    assert "Cannot write" in warning
    assert "unable to open database file" in warning


def test_metrics_never_push_out_an_event(path: Path) -> None:
    path.mkdir()
    recorder = Recorder(path, capacity=10)
    recorder.event("nonfinite", 0, "first")
    for step in range(1000):
        recorder.metrics({"loss": 0.0}, step)
    path.rmdir()
    assert recorder.flush()
    assert [event.message for event in RunReader(path).events("nonfinite")] == ["first"]
    recorder.close()


def test_an_outage_loses_nothing_as_long_as_there_is_room(path: Path, warnings: list[str]) -> None:
    recorder = Recorder(path)
    recorder.metrics({"loss": 0.0}, 0)
    assert recorder.flush()
    elsewhere = path.parent.with_name("moved")
    path.parent.rename(elsewhere)
    recorder.metrics({"loss": 1.0}, 1)
    assert not recorder.flush()
    recorder.metrics({"loss": 2.0}, 2)
    assert not recorder.flush()
    elsewhere.rename(path.parent)
    assert recorder.flush()
    recorder.metrics({"loss": 3.0}, 3)
    assert recorder.close()
    assert recorder.lost == 0
    assert RunReader(path).metric("loss").steps.tolist() == [0, 1, 2, 3]
    assert len(RunReader(path).lives()) == 1
    (warning,) = warnings  # two attempts failed, one line
    assert "was moved or removed" in warning


def test_what_cannot_be_written_at_the_end_is_counted(tmp_path: Path, warnings: list[str]) -> None:
    recorder = Recorder(tmp_path / "missing" / "run.db")
    recorder.metrics({"loss": 0.0}, 0)
    recorder.event("stop", 0, "ended")
    assert not recorder.close()
    assert recorder.lost == 2
    assert recorder.dropped == 0
    assert "2 records were never written" in warnings[-1]


def test_a_record_that_cannot_be_stored_does_not_stop_the_others(path: Path, warnings: list[str]) -> None:
    recorder = Recorder(path)
    recorder.metrics({"loss": 0.0}, 2**70)
    assert recorder.flush()
    recorder.metrics({"loss": 1.0}, 1)
    assert recorder.close()
    assert recorder.lost == 1
    assert RunReader(path).metric("loss").steps.tolist() == [1]
    assert RunReader(path).events("lost")[0].data == {"records": 1}
    assert "cannot be stored" in warnings[0]


def test_records_of_many_threads_are_all_there(path: Path) -> None:
    recorder = Recorder(path)

    def record(name: str) -> None:
        for step in range(1000):
            recorder.metrics({name: float(step)}, step)

    threads = [threading.Thread(target=record, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recorder.close()
    assert recorder.lost == 0
    for name in "abcd":
        assert RunReader(path).metric(name).steps.tolist() == list(range(1000))


def test_no_torch_is_imported() -> None:
    code = "import sys, aetheria.loom.recorder, aetheria.loom.reader; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
