"""The user's configuration: what is in `config.yaml`, checked before anything heavy is imported.

Nothing here is guessed: an unknown key, a wrong type or an impossible combination is refused, and all problems come in
one `ConfigError`, each with its file, line and key.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from aetheria.durations import Seconds
from aetheria.errors import ConfigError, did_you_mean
from aetheria.replicas import ID_IN_WORDS, is_replica_id
from aetheria.wording import KeyPath, expected, found, mismatches
from aetheria.yaml_source import UNUSABLE, Given, Problem, lay_over, read_yaml

__all__ = ["CompileConfig", "KeepBestConfig", "PluginSpec", "Precision", "SnapshotsConfig", "TrainingConfig"]

Precision = Literal["fp32", "bf16", "fp16"]
Count = Annotated[int, Field(ge=1)]
PositiveNumber = Annotated[float, Field(gt=0)]
Parameters = dict[str, JsonValue]
"""Constructor arguments by name: plain values only, so that they can be written into `run.json`."""


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name):
        words = "a folder name of letters, digits, '.', '_' and '-' (no '.' or '-' in front, 128 characters at most)"
        raise PydanticCustomError("expected", words)
    return name


def _replica_id(text: str) -> str:
    if not is_replica_id(text):
        raise PydanticCustomError("expected", f"a text of {ID_IN_WORDS}")
    return text


def _registered_name(name: str) -> str:
    if not name or name != name.strip():
        raise PydanticCustomError("expected", "a registered name, without spaces around it")
    return name


Name = Annotated[str, AfterValidator(_registered_name)]


_ENDS = ("epochs", "max_steps", "max_time")  # one of them must be given: otherwise a run would never end


class _Section(BaseModel):
    """What all parts of the configuration have in common: nothing is converted, unknown keys are refused."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class KeepBestConfig(_Section):
    """Which snapshots are kept for their metric, besides the newest ones."""

    metric: Name
    """An epoch metric, for instance val_loss."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value is the best."""
    k: Count = 1
    """How many of the best are kept."""


class SnapshotsConfig(_Section):
    """When snapshots are taken, and which are kept. One is always taken when a run ends."""

    every_steps: Count | None = None
    """A snapshot after every so many optimiser steps."""
    every_epochs: Count | None = 1
    """A snapshot after every so many epochs."""
    every_seconds: PositiveNumber | None = 600.0
    """A snapshot when the last one is so many seconds old."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """How many of the newest are kept; two at least, so that one is left when one is damaged."""
    keep_best: KeepBestConfig | None = None
    """Which are kept for their metric."""
    consolidate: Literal["end", "always", "never"] = "end"
    """Whether sharded weights (accelerator fsdp) are written in one piece, too: in the last snapshot, each, or none."""


class CompileConfig(_Section):
    """Arguments of `torch.compile`; what fits together is torch's to say."""

    backend: str = "inductor"
    """The compiler."""
    mode: str | None = None
    """For instance default, reduce-overhead or max-autotune."""
    dynamic: bool | None = None
    """Whether shapes may change without another compilation; null lets torch find out."""
    fullgraph: bool = False
    """Whether a break in the graph is an error."""


class PluginSpec(_Section):
    """A registered name with its parameters. Three spellings in YAML:

    ```yaml
    callbacks:
      - EarlyStopping
      - EarlyStopping: {monitor: val_loss}
      - {name: EarlyStopping, params: {monitor: val_loss}}
    ```
    """

    name: Name
    """The registered name."""
    params: Parameters = {}
    """The constructor's arguments."""

    @model_validator(mode="before")
    @classmethod
    def _from_any_spelling(cls, value: Any) -> Any:
        match value:
            case str():
                return {"name": value}
            case {"name": _} | PluginSpec():
                return value
            case dict() if len(value) == 1:
                [(name, params)] = value.items()
                return {"name": name, "params": {} if params is None else params}
        raise PydanticCustomError(
            "expected",
            "a name, one name with its parameters indented below it, or {name: ..., params: ...}",
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describes all three spellings, so that an editor completes each of them."""
        spelled_out = handler(schema)
        handler.resolve_ref_schema(spelled_out)
        return {
            "anyOf": [
                {"type": "string", "description": "A registered name."},
                spelled_out,
                {
                    "type": "object",
                    "description": "A registered name with its parameters.",
                    "minProperties": 1,
                    "maxProperties": 1,
                    "propertyNames": {"not": {"enum": ["name", "params"]}},
                    "additionalProperties": {"type": ["object", "null"]},
                },
            ]
        }


class TrainingConfig(_Section):
    """How a run is trained. `epochs`, `max_steps` or `max_time` must be given; everything else has a default.

    From a file with `TrainingConfig.from_yaml("config.yaml")`, or from Python with `TrainingConfig(epochs=3)`.

    Raises:
        ConfigError: one line for each thing that is wrong.
    """

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": [key]} for key in _ENDS]})

    epochs: Count | None = None
    """Passes over the training data. With max_steps or max_time, whichever is reached first ends the run."""
    max_steps: Count | None = None
    """Optimiser steps."""
    max_time: Seconds | None = None
    """Time of training over all lives of the run: seconds, or for instance 90m, 12h, 1d6h30m. Pauses do not count."""
    batch_size: Count | None = None
    """Samples in a micro-batch on each rank. Without it and global_batch_size the data module decides."""
    global_batch_size: Count | None = None
    """Samples in an optimiser step, over all ranks and accumulated micro-batches."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Where all randomness of the run comes from."""
    accelerator: Name = Field(default="auto", json_schema_extra={"examples": ["auto", "cpu", "cuda", "mps"]})
    """auto (the best device of this machine), cpu, cuda, mps, or the name of a registered accelerator."""
    accelerator_params: Parameters = {}
    """The constructor's arguments of the accelerator, besides its precision."""
    mixed_precision: bool | None = None
    """true: bf16 where the device computes in it, else fp16 on CUDA. precision need not be given then."""
    precision: Precision | None = Field(
        default_factory=lambda given: None if given.get("mixed_precision") else "fp32",
        json_schema_extra={"default": "fp32"},
    )
    """What the forward pass computes in. null only with mixed_precision: true, which leaves it to the device."""
    grad_accumulation_steps: Count = 1
    """Micro-batches in an optimiser step."""
    max_grad_norm: PositiveNumber | None = None
    """Gradients are scaled down to this total norm."""
    max_grad_value: PositiveNumber | None = None
    """Every component of the gradients is clipped to this magnitude."""
    nonfinite: Literal["skip", "stop", "raise"] = "skip"
    """What happens when a gradient is NaN or infinite: the step is dropped, the run ends with a snapshot, or fails."""
    max_skipped_in_a_row: Count = 25
    """With nonfinite: skip, the run fails after so many dropped steps in a row."""
    val_every_steps: Count | None = None
    """A validation after every so many optimiser steps."""
    val_interval: Count | None = Field(
        default_factory=lambda given: None if given.get("val_every_steps") else 1,
        json_schema_extra={"default": 1},
    )
    """A validation after every so many epochs. null without val_every_steps: none at all."""
    compare_ranks_every: Count | None = 1000
    """Several ranks compare their weights after every so many optimiser steps; the run fails where they differ."""
    log_every: Count = 10
    """Metrics are read from the device and logged every so many optimiser steps."""
    snapshots: SnapshotsConfig = SnapshotsConfig()
    """When snapshots are taken, and which are kept."""
    compile: bool | CompileConfig = False
    """Whether the model's steps are compiled with torch.compile, or the arguments for it."""
    deterministic: bool = False
    """Whether operations without a deterministic implementation are errors."""
    limit_train_batches: Count | None = None
    """Only so many micro-batches of each epoch."""
    limit_val_batches: Count | None = None
    """Only so many batches of each validation."""
    overfit_batches: Count | None = None
    """Only the first so many micro-batches, the same ones in every epoch: can the model learn them by heart?"""
    sample_seeding: bool = True
    """Whether the random generators are seeded for each sample while it is read, which makes any dataset resumable."""
    model_name: Name | None = None
    """The registered name of the model."""
    model_params: Parameters = {}
    """The constructor's arguments of the model."""
    data_name: Name | None = None
    """The registered name of the data module."""
    data_params: Parameters = {}
    """The constructor's arguments of the data module."""
    callbacks: list[PluginSpec] = []
    """What observes or controls the run."""
    loggers: list[PluginSpec] = []
    """Where the metrics go, besides the run folder."""
    live: Literal["auto", "on", "off"] = "auto"
    """Whether the run can be steered: on, off, or auto: if a hub has been started on this machine (aetheria up)."""
    runs_dir: Annotated[Path, Field(strict=False)] = Path("runs")
    """The directory that the run folder is made in."""
    run_name: Annotated[str, AfterValidator(_folder_name)] | None = None
    """The beginning of the run folder's name."""
    replica_id: Annotated[str, AfterValidator(_replica_id)] | None = None
    """Which replica this is of the run called run_name: trainings that belong together, each with its own folder."""

    _source: Path | None = PrivateAttr(default=None)

    if not TYPE_CHECKING:  # type checkers know the arguments from the fields

        def __init__(self, /, **values: Any) -> None:
            self._fill(Given(values))

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a YAML file.

        Args:
            path: the file.
            overrides: `key.path=value` with the value in YAML, for instance `model_params.learning_rate=3e-4`; a part
                of the path may be a position in a list.

        Raises:
            ConfigError: one line `FILE:LINE: key.path: found X, expected Y. What to do` for each thing that is wrong.
        """
        config = cls.__new__(cls)
        config._fill(read_yaml(path, overrides))
        return config

    @classmethod
    def from_resolved(cls, values: dict[str, Any], source: Path | None, overrides: Sequence[str] = ()) -> Self:
        """Takes back what `resolved` returned, out of a `run.json`.

        Args:
            values: the resolved configuration.
            source: the file that it once was read from; `plugins/` lies beside it.
            overrides: as in `from_yaml`.

        Raises:
            ConfigError: one line for each thing that is wrong.
        """
        given = Given(copy.deepcopy(values), source)
        lay_over(given, overrides)
        config = cls.__new__(cls)
        config._fill(given)
        return config

    def _fill(self, given: Given) -> None:
        """Initialises the fields; raises one error for all that is wrong with what was given."""
        problems = list(given.problems)
        checked = self
        try:
            super().__init__(**given.values)
        except ValidationError as error:
            problems += _problems(error, given.values)
        wrong = {problem.path[0] for problem in problems if problem.path}
        if wrong:  # what is right must still go together: all problems are reported at once
            checked = self.model_construct(**{key: given.values[key] for key in given.values.keys() - wrong})
        problems += [problem for keys, problem in _combinations(checked) if not wrong & keys]
        if problems:
            raise given.error(problems)
        self._source = given.file

    @property
    def source(self) -> Path | None:
        """The absolute path of the file this was read from; None from Python. `plugins/` lies beside it."""
        return self._source

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Returns the JSON Schema with which an editor completes and checks the YAML file."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}

    def resolved(self) -> dict[str, Any]:
        """Returns everything, defaults included, in JSON types; `TrainingConfig(**resolved)` is the same again."""
        return self.model_dump(mode="json")

    def micro_batch_size(self, world_size: int) -> int | None:
        """Returns the samples in a micro-batch on each rank, or None where the data module decides.

        Args:
            world_size: the number of ranks.

        Raises:
            ConfigError: `global_batch_size` cannot be divided evenly.
        """
        if self.global_batch_size is None:
            return self.batch_size
        shares = world_size * self.grad_accumulation_steps
        size, rest = divmod(self.global_batch_size, shares)
        if rest:
            raise ConfigError(
                f"global_batch_size: found {self.global_batch_size}, expected a multiple of {shares} "
                f"({world_size} ranks x {self.grad_accumulation_steps} accumulated micro-batches). "
                f"Nearest: {size * shares or shares} or {(size + 1) * shares}."
            )
        return size


# --------------------------------------------------------------------------------------------------------------------
# What does not go together
# --------------------------------------------------------------------------------------------------------------------

_ALTERNATIVES = (
    ("batch_size", "global_batch_size"),
    ("max_grad_norm", "max_grad_value"),
    ("val_interval", "val_every_steps"),
    ("limit_train_batches", "overfit_batches"),
)


def _combinations(config: TrainingConfig) -> Iterator[tuple[set[str], Problem]]:
    """Yields what does not go together, and the keys concerned, so that a rule with a broken value is left out."""

    def clash(*keys: str, text: str) -> tuple[set[str], Problem]:
        return {key.split(".")[0] for key in keys}, Problem(tuple(keys[0].split(".")), text)

    if all(getattr(config, key) is None for key in _ENDS):
        yield clash(*_ENDS, text="found none of epochs, max_steps and max_time, expected at least one. Add it.")
    for first, second in _ALTERNATIVES:
        if getattr(config, first) is not None and getattr(config, second) is not None:
            yield clash(second, first, text=f"found together with {first}, expected one of the two. Remove the other.")
    total, steps = config.global_batch_size, config.grad_accumulation_steps
    if total is not None and total % steps:
        text = f"found {total}, expected a multiple of grad_accumulation_steps ({steps}). Change one of them."
        yield clash("global_batch_size", "grad_accumulation_steps", text=text)
    if config.replica_id is not None and config.run_name is None:
        text = "found without run_name, expected the name that all replicas of the run are given. Add run_name."
        yield clash("replica_id", "run_name", text=text)
    for kind in ("model", "data"):
        if getattr(config, f"{kind}_params") and getattr(config, f"{kind}_name") is None:
            text = f"found parameters without a name, expected {kind}_name too. Add it, or remove the parameters."
            yield clash(f"{kind}_params", f"{kind}_name", text=text)
    own = config.data_params.get("batch_size")
    for key in ("batch_size", "global_batch_size"):
        outer = getattr(config, key)
        if own is not None and outer is not None and (own != outer or key == "global_batch_size"):
            text = f"found {found(own)}, but {key} is {outer}; expected one size. Remove one of them."
            yield clash("data_params.batch_size", key, text=text)
    if config.mixed_precision and config.precision == "fp32":
        text = "found true together with precision: fp32, expected bf16, fp16 or no precision. Remove one of them."
        yield clash("mixed_precision", "precision", text=text)
    if config.mixed_precision is False and config.precision in ("bf16", "fp16"):
        text = f"found false together with precision: {config.precision}, expected fp32. Remove one of them."
        yield clash("mixed_precision", "precision", text=text)
    if not config.mixed_precision and config.precision is None:
        text = (
            "found null without mixed_precision: true, expected 'fp32', 'bf16' or 'fp16'. Correct it or leave it out."
        )
        yield clash("precision", "mixed_precision", text=text)


# --------------------------------------------------------------------------------------------------------------------
# What pydantic found, in our words
# --------------------------------------------------------------------------------------------------------------------


def _problems(error: ValidationError, values: dict[str, Any]) -> Iterator[Problem]:
    for path, details in mismatches(error, values).items():
        first = details[0]
        if first["type"] == "default_factory_not_called" or first["input"] is UNUSABLE:
            continue  # a consequence of what is reported elsewhere
        if first["type"] == "extra_forbidden":
            yield Problem(path, _unknown_key(path))
        elif first["type"] == "missing":
            yield Problem(path, "found nothing, expected a value. Add it.")
        else:
            wanted = " or ".join(dict.fromkeys(expected(detail) for detail in details))
            yield Problem(path, f"found {found(first['input'])}, expected {wanted}. {_remedy(path)}")


def _unknown_key(path: KeyPath) -> str:
    section = _section(path[:-1])
    hint = did_you_mean(str(path[-1]), section.model_fields if section else ())
    if section is TrainingConfig:
        hint += " What a model or data module takes belongs under model_params or data_params."
    return f"found an unknown key, expected a known one. {hint}"


def _remedy(path: KeyPath) -> str:
    section = _section(path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    if field is None or field.is_required():
        return "Correct it."
    if isinstance(field.default, str | int | float):
        return f"Correct it, or leave it out for the default, {json.dumps(field.default)}."
    return "Correct it, or leave it out."


def _section(path: KeyPath) -> type[_Section] | None:
    """Returns the class of the section at a path; None inside parameters, which are the user's own."""
    section: type[_Section] | None = TrainingConfig
    for part in path:
        if section is None or isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        section = next(_sections_in(field.annotation), None) if field else None
    return section


def _sections_in(annotation: Any) -> Iterator[type[_Section]]:
    if isinstance(annotation, type) and issubclass(annotation, _Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)
