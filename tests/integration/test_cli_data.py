"""`aetheria data`: what it says, how it ends, and that a preparation survives kills, workers and a full disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pexpect
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.warm import WarmProcess
from typer.testing import CliRunner, Result

from aetheria.cli import app
from aetheria.data import Shards, verify, write_shards
from aetheria.data.importing import Choices, Prepared, prepare
from aetheria.errors import DataError

PATIENCE = 60.0  # seconds
COUNT = 4000
SMALL = ("--shard-size", "40kB", "--block-size", "8kB")


def command(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def told(*arguments: Any, code: int = 0) -> str:
    """Returns what a command prints, on one line where it was folded."""
    result = command(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    return re.sub(r" +", " ", result.output)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.002)
    return found


def content(folder: Path) -> dict[str, bytes]:
    """Returns every file but the manifests, which say when they were written."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".json"
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "t.jsonl"
    path.write_text("".join(json.dumps({"n": n, "v": [n] * 8, "text": f"row {n}"}) + "\n" for n in range(COUNT)))
    return path


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, bytes]:
    assert told("prepare", source, "-o", source.parent / "whole", *SMALL).startswith(
        f"{source.parent}/whole: {COUNT:,} samples of jsonl, version 1\nn int64 \nv int64 [8] \ntext text"
    )
    return content(source.parent / "whole")


def finished(folder: Path) -> int:
    return len(list((folder / ".writing").glob("shard-*.json")))


# --- prepare ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("workers", "kills"), [(0, [signal.SIGKILL, signal.SIGINT]), (2, [signal.SIGKILL])])
def test_killed_and_called_again_it_ends_up_as_if_nothing_had_been(
    tmp_path: Path, source: Path, whole: dict[str, bytes], workers: int, kills: list[signal.Signals]
) -> None:
    out = tmp_path / "out"
    arguments = ["-m", "aetheria", "data", "prepare", source, "-o", out, *SMALL, "--workers", workers]
    for kind, least in zip(kills, (2, 5)):
        program = WarmProcess(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for(lambda least=least: finished(out) >= least, "no shard was finished")
        program.send_signal(kind)
        _, said = program.communicate()
        if kind is signal.SIGKILL:
            assert program.returncode == -signal.SIGKILL
        else:
            assert program.returncode == 130
            assert said == f"interrupted. What is finished stays in {out}; the same command continues.\n"
    told(*arguments[3:])
    assert content(out) == whole
    assert verify(out) == []
    again = json.loads(told(*arguments[3:], "--json"))
    assert (again["new"], again["rows"], again["version"]) == (False, COUNT, 1)
    assert told(*arguments[3:]).startswith(f"{out}: {COUNT:,} samples were prepared already (")


def test_a_full_disk_is_told_and_continued_from(small_disk: Path, source: Path, whole: dict[str, bytes]) -> None:
    (small_disk / "taken").write_bytes(bytes(14_280_000))
    said = told("prepare", source, "-o", small_disk / "out", *SMALL, code=2)
    assert re.search(r"cannot write shards into .*No space left.* make room and make the same call again", said)
    (small_disk / "taken").unlink()
    told("prepare", source, "-o", small_disk / "out", *SMALL)
    assert content(small_disk / "out") == whole


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b\n1,x\n2\n3,y\n")
    for arguments, said in (
        ([bad], f"{bad}, line 3: expected 2 values, as many as there are columns; found 1."),
        ([source, "--columns", "n,txt"], f"{source} has no column 'txt'. Did you mean 'text'?"),
        ([source, "--type", "n=int7"], "column 'n': there is no type 'int7'. Did you mean 'int"),
        ([source, "--as", "parquet"], f"{source} does not read as Parquet"),
        ([tmp_path / "none"], f"there is no {tmp_path}/none. Correct the path."),
        ([source, "--type", "n"], "found 'n', expected COLUMN=TYPE"),
        ([source, "--shard-size", "many"], "found 'many', expected a size such as 64MB"),
        ([source, "--length", "8"], "rows of tokens are made of one column of text; found n, v, text. Choose it: col"),
    ):
        assert said in re.sub(r"\s*│?\n│?\s*", " ", told("prepare", *arguments, "-o", out, code=2)), arguments
    assert not out.exists()
    told("prepare", bad, "-o", out, "--on-error", "skip")
    assert Shards(out)[1] == {"a": 3, "b": "y"}
    assert Shards(out).manifest.notes["prepared"]["skipped"] == 1
    said = told("prepare", bad, "-o", tmp_path / "other", "--on-error", "skip")
    assert said.startswith(
        f"skipped {bad}, line 3: expected 2 values, as many as there are columns; found 1.\n1 bad rows"
    )
    assert "with other choices. To add" in told("prepare", bad, "-o", out, "--on-error", "skip", "--limit", 1, code=2)
    assert f"holds 2 samples already, of {bad}. To add" in told("prepare", source, "-o", out, code=2)


def test_options_are_taken(tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_text("id\tprice\tname\n" + "".join(f"{n + 5}\t{n}\tx\n" for n in range(40)))
    out = tmp_path / "out"
    options = ["--columns", "price,id", "--type", "price=float32", "--key", "id", "--compression", "zstd"]
    told("prepare", table, "-o", out, *options, "--limit", "30")
    shards = Shards(out)
    assert (len(shards), shards.manifest.parts[0].compression, shards.manifest.key) == (30, "zstd", "id")
    assert shards.sample_ids([0, 29]).tolist() == [5, 34]
    table.write_text("id\tprice\tname\n100\t0.5\ty\n")
    told("prepare", table, "-o", out, "--columns", "price,id", "--type", "price=float32", "--append", "more")
    assert Shards(out)[30] == {"price": 0.5, "id": 100}
    assert "1 samples were prepared already" in told(
        "prepare", table, "-o", out, "--columns", "price,id", "--type", "price=float32", "--append", "more"
    )
    assert "other samples were added under the name 'more'" in told(
        "prepare", table, "-o", out, "--append", "more", code=2
    )
    wrong = told("prepare", table, "-o", out, "--columns", "price,id", "--append", "x", code=2)
    assert "column 'price' is float32 there; here it would be float64. Choose its type" in wrong
    assert len(Shards(out)) == 31


def test_python_does_the_same(tmp_path: Path, source: Path, whole: dict[str, bytes]) -> None:
    seen: list[tuple[str, int, int | None]] = []
    done = prepare(
        source, tmp_path / "out", shard_bytes=40_000, block_bytes=8_000, progress=lambda *told: seen.append(told)
    )
    assert isinstance(done, Prepared)
    assert (done.kind, done.new, done.rows, done.skipped) == ("jsonl", True, COUNT, 0)
    assert content(tmp_path / "out") == whole
    assert seen[-1] == ("writing", COUNT, COUNT)
    with pytest.raises(DataError, match=r"there is no kind of source 'json'. Did you mean 'jsonl'"):
        prepare(source, tmp_path / "other", "json")
    with pytest.raises(DataError, match="the limit is at least one row"):
        Choices(limit=0)


def test_a_source_of_one_large_piece_is_not_held_in_memory(tmp_path: Path) -> None:
    table = pa.table({"raw": [np.random.default_rng(n).bytes(8000) for n in range(15_000)]})
    pq.write_table(table, tmp_path / "t.parquet", compression="none", use_dictionary=False, write_batch_size=100)
    del table
    (tmp_path / "t.txt").write_bytes(b"some text, again and again\n" * 2_000_000)
    code = (
        "import re, sys\nfrom pathlib import Path\nimport pyarrow.parquet\n"
        "from aetheria.data.importing import Packing, ParquetFiles, prepare, text\n"
        "def peak(): return int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before, text._AT_ONCE = peak(), 1 << 20\n"
        "prepare(sys.argv[1], sys.argv[2], packing=Packing(length=16384) if sys.argv[1].endswith('txt') else None)\n"
        "print((peak() - before) // 1024)\n"
    )
    for name in ("t.txt", "t.parquet"):
        arguments = [sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / f"out-{name}")]
        kept_by_nobody = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # others keep what is given back
        done = subprocess.run(arguments, env=kept_by_nobody, capture_output=True, text=True, check=True)
        grown, size = int(done.stdout), (tmp_path / name).stat().st_size / 2**20
        assert grown < 0.75 * size, f"{name} of {size:.0f} MB: grew by {grown} MB"
        shutil.rmtree(tmp_path / f"out-{name}")


def test_a_terminal_shows_how_far_it_is(tmp_path: Path, source: Path) -> None:
    arguments = ["-m", "aetheria", "data", "prepare", str(source), "-o", str(tmp_path / "out"), *SMALL]
    terminal = pexpect.spawn(sys.executable, arguments, timeout=PATIENCE, encoding="utf-8", dimensions=(40, 120))
    terminal.expect("writing")
    terminal.expect(r"[\d,]+ samples")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


# --- looking ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    from PIL import Image

    samples = [
        {"image": Image.new("RGB", (4, 3 + n)), "x": np.arange(20, dtype=np.float32) + n, "text": "t" * 500,
         "raw": b"ab" * 20, "nested": {"n": n, "r": n / 2}}
        for n in range(30)
    ]  # fmt: skip
    write_shards(samples, tmp_path / "data", uid=3, shard_bytes=8000, block_bytes=2000, notes={"from": "a test"})
    return tmp_path / "data"


def test_info_head_and_sample(mixed: Path) -> None:
    said = told("info", mixed)
    for line in ("samples 30\n", "version 1 of 1, ", "uid 3\n", "image image, RGB\n", 'from "a test"'):
        assert line in said.replace(" \n", "\n"), said
    facts = json.loads(told("info", mixed, "--json"))
    assert (facts["rows"], facts["uid"], facts["notes"], facts["interrupted"]) == (30, 3, {"from": "a test"}, False)
    assert list(facts["schema"]) == ["image", "x", "text", "raw", "nested/n", "nested/r"]
    shown = json.loads(told("head", mixed, "-n", 2, "--json"))
    assert [each["row"] for each in shown] == [0, 1]
    assert [each["id"] for each in shown] == Shards(mixed).sample_ids([0, 1]).tolist()
    assert shown[1]["sample"] == {
        "image": "uint8 [4, 4, 3]: 0 0 0 0 0 0 0 0 ...",
        "x": "float32 [20]: 1 2 3 4 5 6 7 8 ...",
        "text": f"{'t' * 200}... (500 characters)",
        "raw": "40 bytes: 61 62 61 62 61 62 61 62 61 62 61 62 61 62 61 62 ...",
        "nested": {"n": 1, "r": 0.5},
    }
    said = told("head", mixed, "-n", 1)
    assert said.startswith("sample 0 (id ")
    assert "image uint8 [3, 4, 3]: 0 0" in said
    drawn = [each["row"] for each in json.loads(told("sample", mixed, "-n", 99, "--json"))]
    assert sorted(drawn) == list(range(30))
    assert told("sample", mixed, "--seed", 1) != told("sample", mixed)
    assert "holds no shards" in told("info", mixed / "shards", code=2)


def test_verify_names_what_is_damaged_and_repairs(mixed: Path, tmp_path: Path) -> None:
    assert told("verify", mixed) == f"whole {mixed}\n"
    kept = Path(shutil.copytree(mixed, tmp_path / "kept"))
    (mixed / "shards/shard-00000001.arrow").unlink()
    with (mixed / "shards/shard-00000000.arrow").open("r+b") as file:
        file.seek(1500)
        file.write(b"????")
    said = told("verify", mixed, code=1)
    assert re.search(r"^damaged shards/shard-00000000.arrow: block \d is damaged \(samples \d+ to \d+\)\n", said)
    assert re.search(r"^damaged shards/shard-00000001.arrow: missing \(samples \d+ to \d+\)$", said, re.MULTILINE)
    assert len(json.loads(told("verify", mixed, "--json", code=1))["damaged"]) == 2
    said = told("verify", mixed, "--repair")
    lost = int(re.search(r"version 2; (\d+) of 30 samples are in quarantine", said)[1])
    assert said.count("quarantined shards/") >= 2
    assert told("verify", mixed) == f"whole {mixed}\n"
    assert f"{lost} samples\n" in told("info", mixed).replace(" \n", "\n")
    assert len(json.loads(told("sample", mixed, "-n", 99, "--json"))) == 30 - lost
    for shard in (kept / "shards").iterdir():
        shutil.copy(shard, mixed / "shards")
    result = json.loads(told("verify", mixed, "--repair", "--json"))
    assert (result["version"], result["lost"], result["quarantined"]) == (3, 0, [])
    assert len(result["released"]) >= 2
    assert told("verify", mixed, "--repair") == f"{mixed}: unchanged\n"
    (mixed / "manifest.json").write_bytes(b"")
    assert "manifest.json is damaged" in told("verify", mixed, code=2)
    assert told("verify", mixed, "--repair").startswith("restored manifest.json\n")


def test_what_needs_no_torch_does_not_wait_for_it(mixed: Path, source: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom aetheria.cli import app\n"
        "for command in sys.argv[1:]:\n    app(['data', *command.split()], standalone_mode=False)\n"
        "sys.exit(', '.join({'torch', 'matplotlib'} & sys.modules.keys()) or 0)"
    )
    commands = [f"info {mixed}", f"verify {mixed}", f"prepare {source} -o {tmp_path}/out --quiet"]
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
