"""CSV, JSONL and Parquet as samples: what is read is what stands there, or an error says in which line it is not."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pictures

from aetheria.data import Shards, write_shards
from aetheria.data.fields import Array, Bytes, Image, Number, Text
from aetheria.data.importing import BadRow, Choices, CsvFiles, JsonlFiles, ParquetFiles, Skipping
from aetheria.errors import DataError


def written(tmp_path: Path, name: str, *lines: Any) -> Path:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    path.write_bytes({".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)(text.encode()))
    return path


# --- CSV -------------------------------------------------------------------------------------------------------------
def csv_fields(tmp_path: Path, *values: str, **choices: Any) -> Any:
    """Returns the field of a column of these values, beside another one that makes no line empty."""
    path = written(tmp_path, "t.csv", "a,b", *(f"{value},x" for value in values))
    return CsvFiles(path, Choices(**choices)).schema.fields["a"]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        (["1", "-20", "0"], Number("int64")),
        (["9223372036854775807"], Number("int64")),
        (["9223372036854775808"], Text()),  # no int64, and no float64 either
        (["9007199254740993", "0.5"], Text()),  # float64 would round it
        (["1", "2.5"], Number("float64")),
        (["1e3", ".5", "-2.", "nan", "-inf"], Number("float64")),
        (["1e999"], Text()),
        (["007", "12"], Text()),
        (["+49", "12"], Text()),
        (["1_000"], Text()),
        (["true", "False"], Number("bool")),
        (["true", "1"], Text()),
        (["1"] * 500 + ["a"], Text()),  # all of the file decides, not its beginning
        (["", ""], Text()),
    ],
)
def test_all_values_of_a_column_decide_what_it_is(tmp_path: Path, values: list[str], field: Any) -> None:
    assert csv_fields(tmp_path, *values) == field


def test_what_is_empty_among_numbers_is_asked_about(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t.csv, line 4: column 'a' is empty here, and int64 elsewhere. Choose its ty"):
        csv_fields(tmp_path, "1", "2", "")
    path = tmp_path / "t.csv"
    assert math.isnan(CsvFiles(path, Choices(types={"a": "float64"}))[2]["a"])
    assert CsvFiles(path, Choices(types={"a": "text"}))[2]["a"] == ""
    with pytest.raises(BadRow, match=r"t.csv, line 4: column 'a': the value is missing, and this type has nothing"):
        CsvFiles(path, Choices(types={"a": "int64"}))[2]
    rows = Skipping(CsvFiles(path, Choices(skip=True)))
    assert [row["a"] for row in rows] == [1, 2]
    assert (rows.bad.count, rows.bad.named) == (
        1, [f"{path}, line 4: column 'a': expected int64; the value is empty."]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("int8", "128", "expected int8; found 128"),
        ("int64", "1.0", "expected int64; found '1.0'"),
        ("int64", "1_0", "expected int64; found '1_0'"),
        ("uint8", "-1", "expected uint8; found -1"),
        ("float32", "1e39", "expected float32; found 1e\\+39, which is too large"),
        ("float32", "abc", "expected float32; found 'abc'"),
        ("bool", "2", "expected bool; found '2'"),
        ("image", "no.png", "there is no image .*no.png"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_line(tmp_path: Path, kind: str, text: str, told: str) -> None:
    path = written(tmp_path, "t.csv", "a", "1", text)
    rows = CsvFiles(path, Choices(types={"a": kind}))
    with pytest.raises(BadRow, match=rf"t.csv, line 3: column 'a': {told}"):
        rows[1]
    with pytest.raises(DataError, match=rf"sample \d cannot be read: {path}, line \d: column 'a': "):
        write_shards(rows, tmp_path / "out")


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0")), st.integers(-5, 5)), min_size=1)
)
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, values: list[tuple[str, int]]) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    quoted = [(text.replace('"', '""'), number) for text, number in values]
    path.write_bytes(("text,n\r\n" + "".join(f'"{text}",{number}\r\n' for text, number in quoted)).encode())
    rows = CsvFiles(path, Choices(types={"text": "text"}))
    assert [(row["text"], row["n"]) for row in rows] == values


def test_rows_are_found_again_in_any_order_and_in_other_processes(tmp_path: Path) -> None:
    lines = [f'{number},"a\n{number}"' for number in range(500)]
    files = [
        written(tmp_path, "a.csv", "n,text", *lines[:150]),
        written(tmp_path, "b.csv.gz", "n,text", *lines[150:300]),
        written(tmp_path, "c.csv.bz2", "n,text", "", *lines[300:], ""),
    ]
    rows = CsvFiles(files)
    assert len(rows) == 500
    again = pickle.loads(pickle.dumps(rows))
    for number in np.random.default_rng(0).permutation(500).tolist():
        assert rows[number] == again[number] == {"n": number, "text": f"a\n{number}"}
    assert len(CsvFiles(files, Choices(limit=7))) == 7


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    def refused(*lines: str, **choices: Any) -> str:
        with pytest.raises(DataError) as error:
            CsvFiles(written(tmp_path, "t.csv", *lines), Choices(**choices))
        return str(error.value).removeprefix(str(tmp_path) + "/")

    assert refused("a,b", "1,2", "1,2,3").startswith(
        "t.csv, line 3: expected 2 values, as many as there are columns; f"
    )
    assert refused("a,b", '1,2"x', '1,"2').startswith("t.csv, line 2: it does not read as")
    assert refused("a,b", '1,"2').startswith("t.csv, line 2: it does not read as CSV")
    assert refused("a,a", "1,2").startswith("t.csv, line 1: two columns are called 'a'")
    assert refused("a,", "1,2").startswith("t.csv, line 1: a column is called ''")
    assert refused("1,2", "3,4").startswith("t.csv: found only numbers in the first line")
    assert refused("a;b", "3;4").startswith("t.csv has a single column, 'a;b'. If its values are divided by ';'")
    assert refused("a,b").startswith("t.csv: there are no rows in it")
    assert refused("a,label", "1,2", columns=("lable",)).endswith("no column 'lable'. Did you mean 'label'?")
    assert refused("a,b", "1,2", types={"c": "text"}).endswith("has no column 'c'. Known: a, b.")
    assert refused("a,b", "1,2", types={"a": "integer"}).startswith("column 'a': there is no type 'integer'. Did you m")
    packed = written(tmp_path, "packed.csv.gz", "a,b", *("1,2" for _ in range(9000)))
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cannot read .*packed.csv.gz: Compressed file ended before"):
        CsvFiles(packed)
    (tmp_path / "latin.csv").write_bytes(b"a,b\n1,2\n\xe9,3\n")
    with pytest.raises(BadRow, match=r"latin.csv, line 3: it is no UTF-8: .* Convert the file"):
        CsvFiles(tmp_path / "latin.csv")
    with pytest.raises(DataError, match=r"there is no file .*none.csv"):
        CsvFiles(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"u.csv has the columns \['b'\]; .*v.csv has \['a'\]. They must agree"):
        CsvFiles([written(tmp_path, "v.csv", "a", "x"), written(tmp_path, "u.csv", "b", "x")])


def test_a_table_names_images_and_has_other_delimiters(tmp_path: Path) -> None:
    Pictures.new("RGB", (4, 3), (1, 2, 3)).save(tmp_path / "one.png")
    written(tmp_path, "t.tsv", "\ufefffile\tlabel", "one.png\t3")
    rows = CsvFiles(tmp_path / "t.tsv", Choices(columns=("label", "file"), types={"file": "image"}))
    write_shards(rows, tmp_path / "out")
    assert Shards(tmp_path / "out").schema.fields == {"label": Number("int64"), "file": Image("RGB")}
    assert Shards(tmp_path / "out")[0]["file"].tolist() == [[[1, 2, 3]] * 4] * 3
    path = written(tmp_path, "semi.csv", "a;b", "1,5;2")
    assert CsvFiles(path, Choices(delimiter=";"))[0] == {"a": "1,5", "b": 2}


# --- JSONL -----------------------------------------------------------------------------------------------------------
def test_json_lines_become_what_all_of_them_are(tmp_path: Path) -> None:
    lines = [
        {"n": number, "x": number if number % 2 else 0.5, "yes": True, "text": "é", "fixed": [1, 2],
         "ragged": [1.5] * (number % 3), "table": [[1, 2]] * (1 + number % 2), "deep": {"a": {"b": number}},
         "tags": ["a", None]}
        for number in range(200)
    ]  # fmt: skip
    path = written(tmp_path, "t.jsonl", *lines[:100], "", *lines[100:])
    rows = JsonlFiles(path, Choices(types={"tags": "json"}))
    assert rows.schema.fields == {
        "n": Number("int64"), "x": Number("float64"), "yes": Number("bool"), "text": Text(),
        "fixed": Array("int64", (2,)), "ragged": Array("float64", (None,)), "table": Array("int64", (None, 2)),
        "deep/a/b": Number("int64"), "tags": Text(),
    }  # fmt: skip
    write_shards(rows, tmp_path / "out")
    shards = Shards(tmp_path / "out")
    for number in (0, 99, 100, 199):
        found, wanted = shards[number], lines[number]
        assert (found["n"], found["x"], found["deep"]) == (number, wanted["x"], {"a": {"b": number}})
        assert (found["ragged"].tolist(), found["table"].tolist()) == (wanted["ragged"], wanted["table"])
        assert json.loads(found["tags"]) == ["a", None]
    chosen = JsonlFiles(path, Choices(columns=("deep", "x"), types={"deep/a/b": "float32", "x": "float32"}))
    assert chosen.schema.fields == {"deep/a/b": Number("float32"), "x": Number("float32")}
    assert chosen[3] == {"deep": {"a": {"b": 3.0}}, "x": 3.0}


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([{"a": 1}, "{"], "line 2: it is no JSON"),
        (
            [{"a": 1}, {"a": "x"}],
            r"'a': there is no column for what was found: whole number \(.*line 1\); text \(.*line 2",
        ),
        ([{"a": 1}, {"a": None}], "line 2: 'a' is missing here, and a whole number elsewhere"),
        ([{"a": 1, "b": 1}, {"a": 1}], "line 2: 'b' is missing here"),
        ([{"a": 1}, {"a": 1, "b": 1}], "line 1: 'b' is missing here"),
        ([{"a": None}], "there is a value for 'a' in no line"),
        ([{"a": [1]}, {"a": [[1]]}], r"list \(.*line 1\); list of other dimensions \(.*line 2"),
        ([{"a": [1, "x"]}], "list that is no array of numbers"),
        ([{"a": [1, True]}], "list that is no array of numbers"),
        ([{"a": 2**63}], r"a number that is too large \(.*line 1"),
        ([{"a": 2**53 + 1}, {"a": 0.5}], r"a number that is too large \(.*line 1"),
        ([{"a": 1}, [1]], r"object \(.*line 1\); list \(.*line 2"),
        (["", ""], "there are no rows"),
    ],
)
def test_lines_that_do_not_look_alike_are_named(tmp_path: Path, lines: list[Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        JsonlFiles(written(tmp_path, "t.jsonl", *lines))


def test_a_type_decides_what_the_lines_leave_open(tmp_path: Path) -> None:
    path = written(
        tmp_path, "t.jsonl", {"a": 1, "b": "x", "v": [1, 2]}, {"a": None, "v": [3]}, {"a": "no", "b": "", "v": []}
    )
    rows = Skipping(JsonlFiles(path, Choices(types={"a": "float32", "b": "text", "v": "uint8"}, skip=True)))
    found = list(rows)
    assert found[0]["a"] == 1.0
    assert math.isnan(found[1]["a"])
    assert [row["b"] for row in found] == ["x", ""]
    assert found[1]["v"].dtype == np.uint8
    assert rows.bad.named == [f"{path}, line 3: 'a': expected float32; found 'no'."]
    half = Skipping(JsonlFiles(written(tmp_path, "half.jsonl", '"a"', '"\\ud800"', '"b"')))
    assert list(half) == ["a", "b"]
    assert "half.jsonl, line 2: found a string that is no text: surrogates not allowed" in half.bad.named[0]
    values = JsonlFiles(written(tmp_path, "values.jsonl", [1, 2], [3, 4]))
    assert values.schema.fields == {"value": Array("int64", (2,))}
    with pytest.raises(DataError, match="no objects, so that there are no columns to choose"):
        JsonlFiles(tmp_path / "values.jsonl", Choices(columns=("a",)))
    with pytest.raises(DataError, match="all 1 rows are bad, so that nothing is left"):
        list(Skipping(JsonlFiles(written(tmp_path, "b.jsonl", {"a": "x"}), Choices(types={"a": "int8"}, skip=True))))


# --- Parquet ---------------------------------------------------------------------------------------------------------
def parquet(tmp_path: Path, columns: Any, **options: Any) -> Path:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    count = 1000
    path = parquet(
        tmp_path,
        {
            "i": pa.array(range(count), pa.int32()),
            "f": pa.array(np.arange(count, dtype=np.float16)),
            "yes": [number % 2 == 0 for number in range(count)],
            "text": pa.array([str(number) for number in range(count)]).dictionary_encode(),
            "raw": [b"x" * (number % 3) for number in range(count)],
            "fixed": pa.array([[number, 1] for number in range(count)], pa.list_(pa.int16(), 2)),
            "alike": [[number] * 3 for number in range(count)],
            "ragged": [[0.5] * (number % 4) for number in range(count)],
            "table": [[[1, 2], [3, number]] for number in range(count)],
            "deep": [{"a": number, "b": {"c": [number, 1]}} for number in range(count)],
        },
        row_group_size=170,
    )  # fmt: skip
    rows = ParquetFiles([path, path])
    assert rows.schema.fields == {
        "i": Number("int32"), "f": Number("float16"), "yes": Number("bool"), "text": Text(), "raw": Bytes(),
        "fixed": Array("int16", (2,)), "alike": Array("int64", (3,)), "ragged": Array("float64", (None,)),
        "table": Array("int64", (2, 2)), "deep/a": Number("int64"), "deep/b/c": Array("int64", (2,)),
    }  # fmt: skip
    again = pickle.loads(pickle.dumps(rows))
    for number in [0, 999, 5, 6, 170, 169, 1000, 1999, 1500]:
        found, within = rows[number], number % count
        assert (found["i"], found["text"], found["raw"]) == (within, str(within), b"x" * (within % 3))
        assert found["fixed"].tolist() == [within, 1]
        assert found["ragged"].tolist() == [0.5] * (within % 4)
        assert found["table"].tolist() == [[1, 2], [3, within]]
        assert again[number]["deep"]["b"]["c"].tolist() == [within, 1]
    write_shards(rows, tmp_path / "out")
    assert Shards(tmp_path / "out").columns([1700], ["i", "alike"])["alike"].tolist() == [[700] * 3]


def test_a_large_row_group_is_read_a_little_at_a_time(tmp_path: Path) -> None:
    rows = ParquetFiles(parquet(tmp_path, {"x": [b"x" * 100_000 + bytes([n % 256]) for n in range(300)]}))
    assert rows[299]["x"][-1] == 299 % 256
    assert len(rows._held[1]) < 300


def test_what_parquet_leaves_open_is_asked_about(tmp_path: Path) -> None:
    when = datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC)
    path = parquet(
        tmp_path,
        {"n": [1, None, 3], "x": [0.5, None, 1.0], "when": [when] * 3, "tags": [["a"], [], ["b", "c"]],
         "big": [1, 300, 2**40], "v": [[1], None, [300]]},
    )  # fmt: skip
    with pytest.raises(DataError, match=r"t.parquet, column 'when': there is no field for timestamp.*when=json"):
        ParquetFiles(path)
    with pytest.raises(DataError, match=r"column 'tags': there is no field for list<.*string>"):
        ParquetFiles(path, Choices(columns=("tags",)))
    with pytest.raises(BadRow, match=r"t.parquet, row 1: column 'n': the value is missing \(null\)"):
        ParquetFiles(path, Choices(columns=("n",)))[1]
    with pytest.raises(BadRow, match="row 1: column 'v': the value is missing"):
        ParquetFiles(path, Choices(columns=("v",)))[1]
    types = {"n": "float32", "x": "float64", "when": "int64", "tags": "json"}
    rows = ParquetFiles(path, Choices(columns=tuple(types), types=types))
    assert [math.isnan(rows[1][name]) for name in ("n", "x")] == [True, True]
    assert rows[0]["when"] == int(when.timestamp() * 1e6)
    assert rows[2] == {"n": 3.0, "x": 1.0, "when": rows[0]["when"], "tags": '["b", "c"]'}
    assert ParquetFiles(path, Choices(columns=("when",), types={"when": "text"}))[0]["when"].startswith("2020-01-02")
    skipping = Skipping(ParquetFiles(path, Choices(columns=("big", "v"), types={"big": "int16", "v": "uint8"})))
    assert [row["big"] for row in skipping] == [1]
    assert [text.partition("row ")[2][:40] for text in skipping.bad.named] == [
        "1: column 'v': the value is missing (nul", "2: column 'big': expected int16; found 1"
    ]  # fmt: skip


def test_parquet_files_that_differ_are_refused(tmp_path: Path) -> None:
    first = parquet(tmp_path, {"a": [1], "b": ["x"]}).rename(tmp_path / "one.parquet")
    with pytest.raises(DataError, match=r"t.parquet: column 'a' is double; in .*one.parquet it is int64"):
        ParquetFiles([first, parquet(tmp_path, {"a": [1.0], "b": ["x"]})])
    with pytest.raises(DataError, match=r"t.parquet has no column 'b'"):
        ParquetFiles([first, parquet(tmp_path, {"a": [1]})])
    with pytest.raises(DataError, match=r"t.parquet has a column 'c'"):
        ParquetFiles([first, parquet(tmp_path, {"a": [1], "b": ["x"], "c": [1]})])
    with pytest.raises(DataError, match="there are no rows"):
        ParquetFiles(parquet(tmp_path, {"a": pa.array([], pa.int64())}))
    first.write_bytes(first.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"one.parquet does not read as Parquet"):
        ParquetFiles(first)
