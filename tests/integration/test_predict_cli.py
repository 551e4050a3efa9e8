"""`aetheria predict`: from any kind of file to any other, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
import typer
from tests.warm import run_warm
from typer.testing import CliRunner

from aetheria import AetherModel, Orchestrator, Predictor, Registry, TrainingConfig
from aetheria.cli.predict import predict
from aetheria.plugins import RandomData, SimpleMLP

app = typer.Typer()
app.command()(predict)

FEATURES = np.random.default_rng(0).normal(size=(70, 10))
NAMES = [f"x{index}" for index in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = TrainingConfig(max_steps=5, runs_dir=tmp_path_factory.mktemp("runs"), accelerator="cpu")
    return Orchestrator(SimpleMLP(output_size=2), RandomData(targets=2), config).run().folder


@pytest.fixture
def expected(folder):
    return Predictor(folder).predict(FEATURES).numpy()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Registry.isolated():
        yield


def ask(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def refused(*arguments):
    """Returns what was said on standard error."""
    result = ask(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    return result.stderr


def write(name, features=FEATURES):
    """Writes samples as the name's ending says, and returns the name."""
    match name.partition(".")[2]:
        case "npy":
            np.save(name, features)
        case "npz":
            np.savez(name, anything=features)
        case "csv":
            pyarrow.csv.write_csv(pa.table({n: features[:, i] for i, n in enumerate(NAMES)}), name)
        case "parquet":
            pyarrow.parquet.write_table(pa.table({n: features[:, i] for i, n in enumerate(NAMES)}), name)
        case "lists.parquet":
            pyarrow.parquet.write_table(pa.table({"features": features.tolist()}), name)
        case "jsonl":
            write_lines(name, features.tolist())
        case "objects.jsonl":
            write_lines(name, [{"features": row} for row in features.tolist()])
        case "columns.jsonl":
            write_lines(name, [dict(zip(NAMES, row, strict=True)) for row in features.tolist()])
    return name


def write_lines(name, values):
    with open(name, "w") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def read(name):
    match name.rpartition(".")[2]:
        case "npy":
            return np.load(name)
        case "npz":
            return np.load(name)["prediction"]
        case "csv":
            table = pyarrow.csv.read_csv(name)
            assert table.column_names == ["prediction_0", "prediction_1"]
            return np.column_stack([column.to_numpy() for column in table.columns])
        case "parquet":
            return np.array(pyarrow.parquet.read_table(name)["prediction"].to_pylist())
        case "jsonl":
            return np.array([json.loads(line)["prediction"] for line in Path(name).read_text().splitlines()])


INPUTS = ["npy", "npz", "csv", "parquet", "lists.parquet", "jsonl", "objects.jsonl", "columns.jsonl"]
OUTPUTS = ["npy", "npz", "csv", "parquet", "jsonl"]


@pytest.mark.parametrize("source", INPUTS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_every_format_to_every_other(folder, expected, source, output):
    result = ask(folder, "--input", write(f"in.{source}"), "--output", f"out.{output}", "--batch-size", 32)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout == f"out.{output}: prediction [70, 2]\n"
    assert f"weights of {folder}/snapshots/step-00000005" in result.stderr
    np.testing.assert_allclose(read(f"out.{output}"), expected, atol=1e-6)
    assert {path.name for path in Path().iterdir()} == {f"in.{source}", f"out.{output}"}  # nothing temporary is left


def test_from_the_command_line_of_a_fresh_process(folder, expected, tmp_path):
    moved = tmp_path / "moved"
    folder.rename(moved)
    try:
        done = run_warm(["-m", "aetheria", "predict", "moved", "--input", write("in.npy"), "--output", "o.npy"])
        assert done.returncode == 0, done.stderr
    finally:
        moved.rename(folder)
    np.testing.assert_allclose(np.load("o.npy"), expected, atol=1e-6)


def test_a_run_by_its_name_a_snapshot_by_its_path_and_the_best(folder, expected):
    write("in.npy")
    Path("SimpleMLP").mkdir()  # a folder that is only called like the run
    snapshot = folder / "snapshots" / "step-00000005"
    for arguments in (
        ["SimpleMLP", "--runs-dir", folder.parent],
        ["@last", "--runs-dir", folder.parent, "--best", "val_loss"],
        [snapshot],
        [snapshot / "model.safetensors", "--device", "cpu"],
    ):
        result = ask(*arguments, "-i", "in.npy", "-o", "out.npy", "--force")
        assert result.exit_code == 0, (result.output, result.exception)
        best = ", with the smallest val_loss" if "--best" in arguments else ""
        assert f"weights of {snapshot}{best} (val_loss " in result.stderr
        np.testing.assert_allclose(np.load("out.npy"), expected, atol=1e-6)


def test_columns_are_chosen_in_order_and_others_left_out(folder, expected):
    columns = {"name": ["a"] * 70, "label": np.zeros(70)} | {n: FEATURES[:, i] for i, n in enumerate(NAMES)}
    table = pa.table(columns)
    pyarrow.csv.write_csv(table, "in.csv")
    pyarrow.parquet.write_table(table, "in.parquet")
    write_lines("in.jsonl", table.to_pylist())
    np.savez("in.npz", features=FEATURES, labels=np.zeros(70))
    for name in ("in.csv", "in.parquet", "in.jsonl"):
        assert ask(folder, "-i", name, "-o", "out.npy", "--force", "--columns", ",".join(NAMES)).exit_code == 0
        np.testing.assert_allclose(np.load("out.npy"), expected, atol=1e-6)
        assert "float32 [64, 11]" in refused(
            folder, "-i", name, "-o", "out.npy", "--force"
        )  # the label too, the name not
        assert "no column 'x10'. It has: name, label, x0" in refused(
            folder, "-i", name, "-o", "o.npy", "--columns", "x10"
        )
        message = refused(folder, "-i", name, "-o", "o.npy", "--columns", "name")
        assert "expected numbers" in message
    assert ask(folder, "-i", "in.npz", "-o", "out.npy", "--force", "--columns", "features").exit_code == 0
    np.testing.assert_allclose(np.load("out.npy"), expected, atol=1e-6)


def test_text_holds_measurements_and_other_files_what_they_say(folder):
    whole = np.arange(20).reshape(2, 10)
    for source in ("csv", "jsonl"):
        assert ask(folder, "-i", write(f"in.{source}", whole), "-o", f"out.{source}").exit_code == 0
    message = refused(folder, "-i", write("in.npy", whole), "-o", "out.npy")
    assert "the model cannot take what is in it: RuntimeError" in message
    assert "SimpleMLP.predict_step was given int64 [2, 10]" in message
    assert ask(folder, "-i", "in.npy", "-o", "out.npy", "--dtype", "float32").exit_code == 0
    assert "int64" in refused(folder, "-i", "in.csv", "-o", "o.npy", "--dtype", "int64")
    assert "not whole, which int64 cannot hold" in refused(
        folder, "-i", write("x.csv"), "-o", "o.npy", "--dtype", "int64"
    )


def test_an_output_that_exists_is_never_replaced_unasked(folder, tmp_path):
    write("in.npy")
    (tmp_path / "out.npy").write_text("precious")
    assert "out.npy exists already. Choose another name, or use --force." in refused(
        folder, "-i", "in.npy", "-o", "out.npy"
    )
    assert (tmp_path / "out.npy").read_text() == "precious"
    (tmp_path / "folder.npy").mkdir()
    assert "folder.npy exists already" in refused(folder, "-i", "in.npy", "-o", "folder.npy", "--force")
    assert "there is no folder" in refused(folder, "-i", "in.npy", "-o", "nowhere/out.npy")
    assert "expected one of .npy, .npz, .csv" in refused(folder, "-i", "in.npy", "-o", "out.txt")


BROKEN = {
    "missing.npy": (None, "there is no file missing.npy"),
    "a.txt": (b"1", "found the ending '.txt', expected one of .npy"),
    "text.npy": (b"no array", "text.npy does not read as .npy"),
    "half.npz": (b"PK\x03\x04", "half.npz does not read as .npz"),
    "empty.csv": (b"", "empty.csv does not read as .csv"),
    "header.csv": (b"a,b\n", "expected at least one sample"),
    "headless.csv": (b"1.5,2\n3,4\n", "found only numbers in the first line (1.5, 2, ...)"),
    "holes.csv": (b"a,b\n1,2\n3,\n", "found 1 empty cells in column b"),
    "twice.csv": (b"a,a\n1,2\n", "found the columns a twice"),
    "words.csv": (b"a,b\nx,y\n", "found no column of numbers, expected at least one. It has: a, b"),
    "no.parquet": (b"PAR1", "no.parquet does not read as .parquet"),
    "blank.jsonl": (b"\n\n", "found no lines"),
    "broken.jsonl": (b"[1, 2]\n[1,\n", "broken.jsonl, line 2: found something else than JSON"),
    "ragged.jsonl": (
        b"[1, 2]\n\n[1]\n",
        "ragged.jsonl, line 3: found numbers of shape [1], expected numbers of shape [2]",
    ),
    "null.jsonl": (b"[1, 2]\n[1, null]\n", "null.jsonl, line 2: found something else than numbers"),
    "keys.jsonl": (
        b'{"a": 1}\n{"b": 1}\n',
        "keys.jsonl, line 2: expected an object with the keys of the first line: a",
    ),
    "mixed.jsonl": (b'{"a": 1}\n[1]\n', "mixed.jsonl, line 2: expected an object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read(folder, tmp_path, name):
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refused(folder, "-i", name, "-o", "out.npy")
    assert not (tmp_path / "out.npy").exists()


def test_more_that_cannot_be_read(folder):
    np.save("pickled.npy", np.array([{"a": 1}]), allow_pickle=True)
    assert "Object arrays cannot be loaded when allow_pickle=False" in refused(
        folder, "-i", "pickled.npy", "-o", "o.npy"
    )
    np.save("text.npy", np.array(["a"]))
    assert "found values of NumPy type <U1, expected numbers" in refused(folder, "-i", "text.npy", "-o", "o.npy")
    np.save("scalar.npy", np.array(1.0))
    assert "expected at least one sample" in refused(folder, "-i", "scalar.npy", "-o", "o.npy")
    Path("renamed.npz").write_bytes(Path("scalar.npy").read_bytes())
    assert "renamed.npz does not read as .npz: File is not a zip file" in refused(
        folder, "-i", "renamed.npz", "-o", "o.npy"
    )
    np.savez("nothing.npz")
    assert "found nothing in it" in refused(folder, "-i", "nothing.npz", "-o", "o.npy")
    np.savez("uneven.npz", a=np.ones((2, 3)), b=np.ones((3, 3)))
    assert "found arrays of a [2, 3], b [3, 3]" in refused(folder, "-i", "uneven.npz", "-o", "o.npy")
    pyarrow.parquet.write_table(pa.table({"a": [[1, 2], [3]]}), "ragged.parquet")
    assert "lists of different lengths" in refused(folder, "-i", "ragged.parquet", "-o", "o.npy")
    pyarrow.parquet.write_table(pa.table({"a": [None, None]}), "null.parquet")
    assert "2 empty cells in column a" in refused(folder, "-i", "null.parquet", "-o", "o.npy")
    write("in.npy")
    assert "a .npy file names none" in refused(folder, "-i", "in.npy", "-o", "o.npy", "--columns", "a")
    assert "its lines are no objects" in refused(folder, "-i", write("in.jsonl"), "-o", "o.npy", "--columns", "a")
    assert "no run called 'nothing'" in refused("nothing", "-i", "in.npy", "-o", "o.npy")
    assert "found the device 'warp'" in refused(folder, "-i", "in.npy", "-o", "o.npy", "--device", "warp")


@Registry.register_model("ManyAnswers")
class ManyAnswers(AetherModel):
    """Returns a dictionary of everything that a file may be asked to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch):
        return {"loss": self.scale * batch[0].mean()}

    def predict_step(self, batch):
        features = batch["features"] if isinstance(batch, dict) else batch
        return {
            "half": features.bfloat16(),
            "image": features.reshape(-1, 2, 5),
            "parts": {"sign": features[:, 0] > 0, "file": features[:, 0].long()},
            "label": ["up" if x > 0 else "down" for x in features[:, 0].tolist()],
        }

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.fixture
def many(tmp_path):
    Registry.register_model("ManyAnswers")(ManyAnswers)
    config = TrainingConfig(max_steps=1, runs_dir=tmp_path / "runs", accelerator="cpu")
    return Orchestrator(ManyAnswers(), RandomData(), config).run().folder


def test_several_predictions_have_their_names(many):
    np.savez("in.npz", features=FEATURES, other=FEATURES)
    result = ask(many, "-i", "in.npz", "-o", "o.npz")
    assert result.stdout == (
        "o.npz: half [70, 10], image [70, 2, 5], parts.sign [70], parts.file [70], label [70]\n"
    ), result.exception
    found = np.load("o.npz")
    assert found["half"].dtype == np.float32
    assert found["label"].tolist() == ["up" if x > 0 else "down" for x in FEATURES[:, 0]]
    image = found["image"]
    for output in ("csv", "parquet", "jsonl"):
        assert ask(many, "-i", "in.npz", "-o", f"o.{output}").exit_code == 0
    table = pyarrow.csv.read_csv("o.csv")
    assert [name for name in table.column_names if name.startswith("image")][:6] == [
        *(f"image_0_{index}" for index in range(5)),
        "image_1_0",
    ]
    np.testing.assert_allclose(table["image_1_3"].to_numpy(), image[:, 1, 3])
    np.testing.assert_allclose(np.array(pyarrow.parquet.read_table("o.parquet")["image"].to_pylist()), image)
    line = json.loads(Path("o.jsonl").read_text().splitlines()[3])
    assert list(line) == ["half", "image", "parts.sign", "parts.file", "label"]
    assert line["parts.sign"] is bool(FEATURES[3, 0] > 0)
    message = refused(many, "-i", "in.npz", "-o", "o.npy")
    assert "makes several predictions (half, image, parts.sign, parts.file, label), a .npy file holds one" in message
    # What was written can be read again: lists beside numbers stay apart, by name.
    assert ask(many, "-i", "in.npz", "-o", "again.npz").exit_code == 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x.sum(), "the shape [] for a batch of 64"),
        (lambda x: x[:3], "the shape [3, 10] for a batch of 64"),
        (lambda x: "text", "prediction is a str"),
        (lambda x: x.to(torch.complex64), "prediction has the type complex64"),
        (lambda x: {"a": x} if len(x) == 64 else {"b": x}, "returned a at first, and then b"),
        (lambda x: x[:, : len(x)], "different batches have different shapes"),
        (lambda x: x[len(x) + 5], "IndexError"),
    ],
)
def test_predictions_that_no_file_can_hold(many, monkeypatch, answer, message):
    write("in.npy")
    monkeypatch.setattr(ManyAnswers, "predict_step", lambda self, batch: answer(batch))
    assert message in refused(many, "-i", "in.npy", "-o", "o.npy")


def test_a_disk_that_is_full(folder, tmp_path, monkeypatch):
    write("in.npy")
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr("aetheria.inference.files.write_atomically", full)
    assert "cannot write closed/o.npy: No space left on device" in refused(folder, "-i", "in.npy", "-o", "closed/o.npy")


def full(path, content):
    raise OSError(28, "No space left on device")
