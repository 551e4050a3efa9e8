"""What goes into a Predictor and what comes out, from one thread and from many."""

import dataclasses
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from inference_cases import X
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from aetheria import Predictor
from aetheria.errors import ConfigError, DataError, ModelError

Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Record:
    features: object
    name: str = "a"


def test_arrays_and_lists_become_tensors_of_the_models_type(answering):
    seen = []
    predictor = answering(seen.append)
    readonly = np.arange(4.0)
    readonly.setflags(write=False)
    predictor.predict(
        {
            "float64": np.ones((2, 3)),
            "float16": np.ones(2, np.float16),
            "int32": np.ones(2, np.int32),
            "bool": np.array([True]),
            "big_endian": np.array([1.0, 2.0], ">f4"),
            "readonly": readonly,
            "reversed": np.arange(3)[::-1],
            "scalar": np.float64(2.0),
            "numbers": [[1, 2.5], [3, 4]],
            "indices": [1, 2, 3],
            "tensor": torch.ones(2, dtype=torch.float64),
            "text": "kept",
            "option": 0.5,
            "none": None,
            "list": [np.zeros(2), torch.zeros(1)],
            "pair": Pair(np.zeros(1), [0.0]),
            "record": Record([1.0]),
        }
    )
    batch = seen[0]
    types = {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)}
    floats = dict.fromkeys(["float64", "float16", "big_endian", "readonly", "scalar", "numbers"], torch.float32)
    assert types == floats | {
        "int32": torch.int32,
        "bool": torch.bool,
        "reversed": torch.int64,
        "indices": torch.int64,
        "tensor": torch.float64,
    }
    assert batch["big_endian"].tolist() == [1.0, 2.0]
    assert batch["reversed"].tolist() == [2, 1, 0]
    assert batch["numbers"].tolist() == [[1.0, 2.5], [3.0, 4.0]]
    assert (batch["text"], batch["option"], batch["none"]) == ("kept", 0.5, None)
    assert all(isinstance(item, torch.Tensor) for item in batch["list"])
    assert isinstance(batch["pair"], Pair)
    assert isinstance(batch["pair"].second, torch.Tensor)
    assert isinstance(batch["record"], Record)
    assert batch["record"].features.tolist() == [1.0]


def test_what_is_no_batch_is_refused(trained):
    predictor = Predictor(trained[0])
    with pytest.raises(DataError, match="ragged list"):
        predictor.predict([[1.0, 2.0], [3.0]])
    with pytest.raises(DataError, match="expected numbers"):
        predictor.predict([1.0, "two"])
    with pytest.raises(DataError, match="NumPy type object"):
        predictor.predict(np.array([None]))


def test_what_the_model_raises_passes_with_a_note(trained):
    with pytest.raises(RuntimeError) as raised:
        Predictor(trained[0]).predict(np.ones((2, 3)))
    assert raised.value.__notes__ == ["Net.predict_step was given float32 [2, 3]"]


def test_predictions_keep_their_nesting_and_share_no_memory(answering):
    predictor = answering(lambda batch: {"same": batch, "pair": Pair(batch, [batch]), "text": "a"})
    batch = torch.zeros(2)
    found = predictor.predict(batch)
    assert isinstance(found["pair"], Pair)
    assert found["text"] == "a"
    found["same"] += 1
    assert batch.tolist() == [0, 0]
    assert found["pair"].second[0].tolist() == [0, 0]


def test_one_sample(trained, answering):
    predictor = Predictor(trained[0])
    assert torch.equal(predictor.predict_one(X[0]), predictor.predict(X[:1])[0])
    assert torch.equal(predictor.predict_one(X[0].tolist()), predictor.predict(X[:1])[0])
    seen = []

    def answer(batch):
        seen.append(batch)
        return {"score": batch["x"].sum(1), "both": (batch["x"], batch["index"]), "labels": ["one"], "note": None}

    found = answering(answer).predict_one({"x": np.arange(3.0), "index": 7, "rate": 0.5})
    assert seen[0]["x"].shape == (1, 3)
    assert seen[0]["index"].tolist() == [7]
    assert seen[0]["rate"].dtype == torch.float32
    assert found["score"].item() == 3.0
    assert [part.tolist() for part in found["both"]] == [[0.0, 1.0, 2.0], 7]
    assert (found["labels"], found["note"]) == ("one", None)
    with pytest.raises(ModelError, match=r"returned the shape \[\] for a batch of 1, expected 1 rows"):
        answering(torch.sum).predict_one([1.0, 2.0])
    with pytest.raises(ModelError, match="a list of 2 for a batch of 1"):
        answering(lambda batch: [batch, batch]).predict_one([1.0, 2.0])


class Endless(Dataset):
    """Ten samples by index; never raises IndexError."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return np.full(4, index % 10, dtype=np.float64)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Endless()[index] for index in range(10))


def test_many_samples_from_anywhere_in_order(trained):
    predictor = Predictor(trained[0])
    samples = [np.full(4, float(index)) for index in range(10)]
    expected = predictor.predict(np.stack(samples))
    loader = DataLoader(TensorDataset(torch.tensor(np.stack(samples)).float()), batch_size=3)
    asked = {
        "array": np.stack(samples),
        "tensor": torch.tensor(np.stack(samples)).float(),
        "list": samples,
        "lists": [sample.tolist() for sample in samples],
        "generator": (sample for sample in samples),
        "data set": Endless(),
        "stream": Stream(),
        "loader": DataLoader(torch.tensor(np.stack(samples)).float(), batch_size=3),
    }
    for name, source in asked.items():
        found = torch.stack(list(predictor.predict_many(source, batch_size=3)))
        assert torch.allclose(found, expected, atol=1e-6), name
    unpacking = Predictor(trained[0])
    unpacking.model.predict_step = lambda batch: unpacking.model(*batch)
    assert torch.allclose(torch.stack(list(unpacking.predict_many(loader))), expected, atol=1e-6)


def test_many_samples_are_computed_as_they_are_asked_for(answering):
    sizes = []

    def answer(batch):
        sizes.append(len(batch["x"]))
        return {"twice": 2 * batch["x"], "labels": [str(int(x)) for x in batch["x"]]}

    predictor = answering(answer)
    source = {"x": np.arange(10.0)}
    found = predictor.predict_many(source, batch_size=4)
    assert sizes == []
    assert next(found)["labels"] == "0"
    assert sizes == [4]
    rest = list(found)
    assert sizes == [4, 4, 2]
    assert [item["twice"].item() for item in rest] == [2.0 * x for x in range(1, 10)]
    assert list(predictor.predict_many(np.zeros((0, 2)))) == []
    assert list(predictor.predict_many([])) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("text", "found str to predict"),
        (3, "found int to predict"),
        (np.array(3.0), "first dimension is the samples"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, r"arrays of \[2, 3\] rows"),
        ({"a": [1.0]}, "expected arrays or tensors"),
        ({}, "one row for each sample"),
        ([np.zeros(2), np.zeros(3)], "do not go into one batch"),
        ([Record(1.0)], "do not go into one batch"),
    ],
)
def test_what_are_no_samples_is_refused(answering, source, message):
    with pytest.raises(DataError, match=message):
        list(answering(lambda batch: batch).predict_many(source))


def test_a_batch_size_of_nothing(answering):
    with pytest.raises(ConfigError, match="batch_size=0"):
        list(answering(lambda batch: batch).predict_many([], batch_size=0))


def test_the_bar_is_for_terminals_only(trained, capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    predictor = Predictor(trained[0])
    list(predictor.predict_many(X))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    list(predictor.predict_many(X, progress=False))
    assert capsys.readouterr() == ("", "")
    list(predictor.predict_many(X))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "predicting" in captured.err


# --- many threads ----------------------------------------------------------------------------------------------------


def in_threads(count, function):
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(function, range(count)))


def test_many_threads_get_right_answers(trained):
    predictor = Predictor(trained[0])
    batches = [torch.full((index + 1, 4), float(index)) for index in range(8)]
    expected = [predictor.predict(batch) for batch in batches]

    def ask(index):
        for _ in range(50):
            assert torch.equal(predictor.predict(batches[index]), expected[index])
        assert torch.allclose(torch.stack(list(predictor.predict_many(batches[index], 3))), expected[index])

    in_threads(8, ask)


def test_even_from_a_model_that_writes_on_itself(answering):
    def answer(batch):
        predictor.model.memory = batch
        time.sleep(0.001)  # long enough for any other thread
        return predictor.model.memory + 1

    predictor = answering(answer)
    in_threads(8, lambda index: [check(predictor, float(index + round_ * 8)) for round_ in range(5)])


def check(predictor, value):
    assert predictor.predict([value]).tolist() == [value + 1]
