"""The configuration: what is accepted, and what every refusal says."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from aetheria.config import CompileConfig, PluginSpec, TrainingConfig
from aetheria.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refusal(*arguments, **values) -> list[str]:
    """Returns the lines of the error, for a file (with overrides) or for values from Python."""
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.from_yaml(*arguments) if arguments else TrainingConfig(**values)
    return str(caught.value).splitlines()


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_defaults_resolve_to_plain_values_and_back():
    config = TrainingConfig(epochs=3)
    resolved = json.loads(json.dumps(config.resolved()))
    assert resolved["precision"] == "fp32"
    assert resolved["val_interval"] == 1
    assert resolved["snapshots"]["every_seconds"] == 600.0
    assert resolved["runs_dir"] == "runs"
    assert TrainingConfig(**resolved) == config


@pytest.mark.parametrize(
    "values",
    [
        {"max_steps": 10, "val_every_steps": 5},
        {"max_time": "1d6h30m"},
        {"epochs": 1, "mixed_precision": True},
        {"epochs": 1, "mixed_precision": True, "precision": "bf16"},
        {"epochs": 1, "val_interval": None},
        {"epochs": 1, "compile": {"mode": "max-autotune"}},
        {"epochs": 1, "callbacks": ["A", {"B": {"x": [1, {"y": None}]}}]},
        {"epochs": 1, "batch_size": 4, "data_name": "d", "data_params": {"batch_size": 4}},
        {"epochs": 1, "accelerator": "my_tpu", "runs_dir": Path("/data/runs")},
    ],
)
def test_what_was_resolved_can_be_given_again(values):
    config = TrainingConfig(**values)
    assert TrainingConfig(**json.loads(json.dumps(config.resolved()))) == config


def test_values_from_a_file(write):
    path = write(
        """
        epochs: 3
        max_grad_norm: 1
        run_name: 2024-05-01
        model_name: Net
        model_params: {learning_rate: 1e-4, mode: on, widths: [8, 8]}
        callbacks:
          - EarlyStopping
          - EarlyStopping: {monitor: val_loss}
          - {name: EarlyStopping, params: {monitor: val_accuracy}}
          - ProgressBar:
        compile: {backend: eager}
        """
    )
    config = TrainingConfig.from_yaml(path)
    assert config.model_params == {"learning_rate": 1e-4, "mode": "on", "widths": [8, 8]}
    assert config.max_grad_norm == 1.0
    assert config.run_name == "2024-05-01"
    assert config.callbacks == [
        PluginSpec(name="EarlyStopping"),
        PluginSpec(name="EarlyStopping", params={"monitor": "val_loss"}),
        PluginSpec(name="EarlyStopping", params={"monitor": "val_accuracy"}),
        PluginSpec(name="ProgressBar"),
    ]
    assert config.compile == CompileConfig(backend="eager")
    assert config.source == path
    assert "source" not in str(config.resolved())


def test_anchors_are_followed(write):
    path = write("epochs: 1\ncallbacks:\n  - A: &settings {x: 1}\n  - B: *settings\n")
    assert [spec.params for spec in TrainingConfig.from_yaml(path).callbacks] == [{"x": 1}, {"x": 1}]


def test_validation_interval_and_precision_follow_their_alternatives():
    assert TrainingConfig(epochs=1, val_every_steps=5).val_interval is None
    assert TrainingConfig(epochs=1, mixed_precision=True).precision is None


def test_micro_batch_size():
    assert TrainingConfig(epochs=1).micro_batch_size(4) is None
    assert TrainingConfig(epochs=1, batch_size=8).micro_batch_size(4) == 8
    config = TrainingConfig(epochs=1, global_batch_size=24, grad_accumulation_steps=3)
    assert config.micro_batch_size(4) == 2
    with pytest.raises(ConfigError, match=r"found 24, expected a multiple of 15 \(5 ranks x 3.*Nearest: 15 or 30"):
        config.micro_batch_size(5)


def test_a_config_is_frozen_and_can_be_copied_and_sent_to_another_process(write):
    config = TrainingConfig.from_yaml(write("epochs: 1"))
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 2
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_importing_the_config_does_not_import_torch():
    code = "import sys, aetheria.config, aetheria.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_lie_over_the_file(write):
    path = write("epochs: 3\nmodel_params:\ncallbacks: [EarlyStopping: {patience: 1}, ProgressBar]\n")
    config = TrainingConfig.from_yaml(
        path,
        [
            "epochs=5",
            "model_name=Net",
            "model_params.optimizer.learning_rate=3e-4",
            "snapshots.keep_best={metric: val_loss}",
            "snapshots.keep_best.mode=max",
            "callbacks.0.EarlyStopping.patience=7",
            "callbacks.1=Throughput",
            "run_name=",
        ],
    )
    assert config.epochs == 5
    assert config.model_params == {"optimizer": {"learning_rate": 3e-4}}
    assert config.snapshots.keep_best is not None
    assert config.snapshots.keep_best.mode == "max"
    assert config.callbacks == [PluginSpec(name="EarlyStopping", params={"patience": 7}), PluginSpec(name="Throughput")]
    assert config.run_name is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "--set epochs: found no equals sign, expected key.path=value, for instance "),
        ("=3", "--set =3: found no key, expected key.path=value"),
        ("snapshots..k=3", "--set snapshots..k=3: found no key"),
        ("epochs=ten", "--set epochs=ten: epochs: found 'ten' (a string), expected a whole number. Correct it"),
        ("epohcs=3", "--set epohcs=3: epohcs: found an unknown key, expected a known one. Did you mean 'epochs'?"),
        (
            "snapshots.keep=3",
            "--set snapshots.keep=3: snapshots.keep: found an unknown key, expected a known one. Did ",
        ),
        ("epochs=[1", "--set epochs=[1: found text that is not YAML (while parsing a flow sequence, expected ',' or"),
        ("epochs.x=1", "--set epochs.x=1: epochs: found 3, expected a mapping to set 'x' in. Set the whole of it."),
        ("loggers.1=A", "--set loggers.1=A: loggers: found no item '1' in a list of 1, expected a position counted"),
        ("loggers.x=A", "--set loggers.x=A: loggers: found no item 'x' in a list of 1, expected a position counted"),
        ("model_params={a: 1, a: 2}", "--set model_params={a: 1, a: 2}: model_params.a: found the key twice, expected"),
    ],
)
def test_a_bad_override_is_named(write, override, message):
    lines = refusal(write("epochs: 3\nloggers: [csv]\nmodel_name: Net\n"), [override])
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_an_override_is_to_blame_for_what_it_replaced(write):
    path = write("epochs: 3\nsnapshots:\n  keep_best:\n    metric: loss\n")
    [line] = refusal(path, ["snapshots={keep_best: {k: 2}}"])
    assert line.startswith("--set snapshots={keep_best: {k: 2}}: snapshots.keep_best.metric: found nothing, expected")


# --- files that cannot be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": found no values in it, expected 'key: value' lines. Write it with: aetheria init DIR"),
        ("# nothing\n", ": found no values in it, expected 'key: value' lines."),
        ("- epochs: 3\n", ": found a list, expected 'key: value' lines at the top level. Name the keys."),
        ("epochs\n", ": found a single value, expected 'key: value' lines at the top level. Name the keys."),
        ("epochs: 3\nseed: 1: 2\n", ":2: found text that is not YAML (mapping values are not allowed here). Check its"),
        ("epochs: 3\n\tseed: 1\n", ":2: found text that is not YAML (while scanning for the next token, found char"),
        ("epochs: [3\n", ":2: found text that is not YAML (while parsing a flow sequence, expected ',' or ']'"),
        ("epochs: 3\n---\nepochs: 4\n", ":2: found text that is not YAML (expected a single document in the stream"),
        ("epochs: *three\n", ":1: found text that is not YAML (found undefined alias 'three')."),
        (b"epochs: 3\n# caf\xe9\n", ":2: found the byte 0xe9, expected UTF-8 text. Save the file as UTF-8."),
        (b"epochs: \x00\n", ": found text that is not YAML (unacceptable character"),
    ],
)
def test_a_file_that_is_no_mapping(write, content, message):
    path = write(content)
    [line] = refusal(path)
    assert line.startswith(f"{path}{message}")


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "config.yml"
    assert refusal(path) == [
        f"{path}: found no such file, expected a YAML file. Check the path, or write one with: aetheria init DIR"
    ]
    assert refusal(tmp_path) == [f"{tmp_path}: found a directory, expected a YAML file. Name the file in it."]
    (tmp_path / "file").touch()
    [line] = refusal(tmp_path / "file" / "config.yaml")
    assert line.endswith("found a file that cannot be read (Not a directory), expected a YAML file. Check its path and "
                         "permissions.")  # fmt: skip


def test_a_byte_order_mark_is_no_part_of_the_first_key(write):
    assert TrainingConfig.from_yaml(write(b"\xef\xbb\xbfepochs: 3\n")).epochs == 3


# --- values that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epohcs: 3", "2: epohcs: found an unknown key, expected a known one. Did you mean 'epochs'?"),
        ("learning_rate: 3", "2: learning_rate: found an unknown key, expected a known one. "),
        ("snapshots: {every_step: 3}", "2: snapshots.every_step: found an unknown key, expected a known one. Did you"),
        (
            "seed: '3'",
            "2: seed: found '3' (a string), expected a whole number. Correct it, or leave it out for the def",
        ),
        ("seed: true", "2: seed: found true, expected a whole number."),
        ("seed: 3.7", "2: seed: found 3.7, expected a whole number."),
        ("seed: 3.0", "2: seed: found 3.0, expected a whole number."),
        ("seed:", "2: seed: found null, expected a whole number. Correct it, or leave it out for the default, 0."),
        ("seed: -1", "2: seed: found -1, expected 0 or more."),
        ("seed: 9223372036854775808", "2: seed: found 9223372036854775808, expected less than 9223372036854775808."),
        ("batch_size: 0", "2: batch_size: found 0, expected 1 or more. Correct it, or leave it out."),
        ("max_grad_norm: 0", "2: max_grad_norm: found 0, expected more than 0."),
        ("max_grad_norm: .inf", "2: max_grad_norm: found inf, expected a finite number."),
        ("max_grad_norm: .nan", "2: max_grad_norm: found nan, expected a finite number."),
        ("max_grad_norm: true", "2: max_grad_norm: found true, expected a number."),
        ("deterministic: yes", "2: deterministic: found 'yes' (a string), expected true or false."),
        ("precision: fp8", "2: precision: found 'fp8' (a string), expected 'fp32', 'bf16' or 'fp16'."),
        ("nonfinite: ignore", "2: nonfinite: found 'ignore' (a string), expected 'skip', 'stop' or 'raise'."),
        ("snapshots:", "2: snapshots: found null, expected a mapping. Correct it, or leave it out."),
        ("snapshots: {keep_last: 1}", "2: snapshots.keep_last: found 1, expected 2 or more. Correct it, or leave it o"),
        ("snapshots: {keep_best: {k: 1}}", "2: snapshots.keep_best.metric: found nothing, expected a value. Add it."),
        ("compile: 3", "2: compile: found 3, expected true or false or a mapping."),
        ("compile: {backend: 3}", "2: compile.backend: found 3, expected a string."),
        ("compile: {bakcend: x}", "2: compile.bakcend: found an unknown key, expected a known one. Did you mean 'back"),
        ("callbacks: Progress", "2: callbacks: found 'Progress' (a string), expected a list."),
        ("callbacks: [3]", "2: callbacks.0: found 3, expected a name, one name with its parameters indented below it,"),
        ("callbacks: [{A: 1, x: 2}]", "2: callbacks.0: found the mapping {'A': 1, 'x': 2}, expected a name, one name "),
        ("callbacks: [A: 3]", "2: callbacks.0: found 3, expected a mapping."),
        ("loggers: [{name: A, parms: {}}]", "2: loggers.0.parms: found an unknown key, expected a known one. Did you "),
        ("model_params: 3", "2: model_params: found 3, expected a mapping."),
        ("model_params: {a: [.nan]}", "2: model_params.a.0: found nan, expected a finite number."),
        ("run_name: a/b", "2: run_name: found 'a/b' (a string), expected a folder name of letters, digits, '.', '_' a"),
        ("run_name: ..", "2: run_name: found '..' (a string), expected a folder name"),
        ("accelerator: ''", "2: accelerator: found '' (a string), expected a registered name, without spaces around"),
        ("runs_dir: 3", "2: runs_dir: found 3, expected a path, written as a string."),
        # not YAML values
        ("seed: 1\nseed: 2", "3: seed: found the key twice (the first time on line 2), expected it once. Remove one o"),
        ("model_params: {1: x}", "2: model_params: found 1 as a key, expected a string. Put it in quotes."),
        ("seed: !odd 3", "2: seed: found the tag !odd, expected a plain value. Remove the tag."),
        ("seed: !!int three", "2: seed: found the tag !!int, expected a plain value. Remove the tag."),
        ("loggers: &all [*all]", "2: loggers.0: found an alias of the value it lies in. Write the value out."),
        # combinations
        (
            "batch_size: 2\nglobal_batch_size: 4",
            "3: global_batch_size: found together with batch_size, expected one of",
        ),
        ("max_grad_norm: 1\nmax_grad_value: 1", "3: max_grad_value: found together with max_grad_norm, expected one "),
        ("val_interval: 1\nval_every_steps: 1", "3: val_every_steps: found together with val_interval, expected one "),
        ("limit_train_batches: 1\noverfit_batches: 1", "3: overfit_batches: found together with limit_train_batches, "),
        (
            "grad_accumulation_steps: 3\nglobal_batch_size: 8",
            "3: global_batch_size: found 8, expected a multiple of grad_accumulation_steps (3). Change one of them.",
        ),
        ("model_params: {a: 1}", "2: model_params: found parameters without a name, expected model_name too. Add it, "),
        ("data_params: {a: 1}", "2: data_params: found parameters without a name, expected data_name too. Add it, "),
        (
            "batch_size: 4\ndata_name: d\ndata_params:\n  batch_size: 8",
            "5: data_params.batch_size: found 8, but batch_size is 4; expected one size. Remove one of them.",
        ),
        (
            "global_batch_size: 4\ndata_name: d\ndata_params:\n  batch_size: 4",
            "5: data_params.batch_size: found 4, but global_batch_size is 4; expected one size. Remove one of them.",
        ),
        (
            "mixed_precision: true\nprecision: fp32",
            "2: mixed_precision: found true together with precision: fp32, expected bf16, fp16 or no precision.",
        ),
        (
            "mixed_precision: false\nprecision: bf16",
            "2: mixed_precision: found false together with precision: bf16, expected fp32.",
        ),
        ("precision:", "2: precision: found null without mixed_precision: true, expected 'fp32', 'bf16' or 'fp16'."),
    ],
)
def test_a_refused_value_is_named_with_its_line(write, content, message):
    path = write(f"epochs: 3\n{content}\n")
    lines = refusal(path)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{path}:{message}")


def test_a_run_needs_an_end(write):
    path = write("seed: 1\n")
    assert refusal(path) == [
        f"{path}: epochs: found none of epochs, max_steps and max_time, expected at least one. Add it."
    ]


def test_all_problems_come_at_once_in_the_order_of_the_file(write):
    path = write("epochs: ten\nseed: -1\nseed: 2\nbatch_size: 1\nbathc: 2\nglobal_batch_size: 2\n")
    starts = [":1: epochs", ":2: seed", ":3: seed", ":5: bathc", ":6: global_batch_size"]
    lines = refusal(path, ["log_every=0"])
    assert [line.split(": found")[0] for line in lines] == [
        *(f"{path}{start}" for start in starts),
        "--set log_every=0: log_every",
    ]


def test_problems_from_python_are_told_by_key():
    assert refusal(epochs=0, model_name="Net", model_params={"net": object}) == [
        "epochs: found 0, expected 1 or more. Correct it, or leave it out.",
        "model_params.net: found <class 'object'> (of type type), expected a plain value (null, true, false, a number, "
        "a string, a list or a mapping). Correct it.",
    ]


# --- the schema -------------------------------------------------------------------------------------------------------


def test_the_schema_documents_every_key_and_every_spelling():
    schema = TrainingConfig.json_schema()
    json.dumps(schema)
    for name in TrainingConfig.model_fields:
        entry = schema["properties"][name]
        assert entry.get("description"), name
    assert schema["additionalProperties"] is False
    assert schema["properties"]["val_interval"]["default"] == 1
    assert [branch["type"] for branch in schema["$defs"]["PluginSpec"]["anyOf"]] == ["string", "object", "object"]
