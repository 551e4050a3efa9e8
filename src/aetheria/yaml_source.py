"""Reads a YAML file into plain values, and remembers on which line each of them was written.

YAML 1.2 as ruamel.yaml reads it: `1e-4` is a number, `on`, `off` and dates are strings, a key that comes twice is an
error. Overrides in the form `snapshots.every_steps=100` are laid over the values afterwards.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from aetheria.errors import ConfigError
from aetheria.wording import KeyPath, dotted, found

__all__ = ["UNUSABLE", "Given", "Place", "Problem", "dump_yaml", "lay_over", "read_yaml"]

UNUSABLE = object()
"""Stands among the values where the file has something that is no plain value; a problem says what."""

_TAG = "tag:yaml.org,2002:"
_CONVERTED = {_TAG + name for name in ("null", "bool", "int", "float")}
# YAML 1.2 knows neither dates nor merge keys; ruamel.yaml tags them all the same.
_STRINGS = {_TAG + name for name in ("str", "timestamp", "merge", "value")}


class Place(NamedTuple):
    """Where a value was written: a line of a file, or an override."""

    origin: str
    line: int | None = None

    def __str__(self) -> str:
        return self.origin if self.line is None else f"{self.origin}:{self.line}"


class Problem(NamedTuple):
    """One thing that is wrong: at which key, in a sentence, and where, if that is not where the key was written."""

    path: KeyPath
    text: str
    place: Place | None = None


@dataclass
class Given:
    """What the user gave: the values, where each was written, and what could not be read.

    Attributes:
        values: nested dictionaries, lists, strings, numbers, booleans and None.
        file: the file they come from; None for values from Python.
        places: where each value was written, by its path.
        problems: what is wrong already.
    """

    values: dict[str, Any]
    file: Path | None = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def error(self, problems: Iterable[Problem]) -> ConfigError:
        """Returns one error with a line `FILE:LINE: key.path: what is wrong` for each problem, in the file's order."""
        placed = [(problem.place or self._place(problem.path), problem) for problem in problems]
        placed.sort(key=lambda pair: float("inf") if pair[0] is None or pair[0].line is None else pair[0].line)
        return ConfigError(
            "\n".join(
                ": ".join(part for part in (str(place or ""), dotted(problem.path), problem.text) if part)
                for place, problem in placed
            )
        )

    def _place(self, path: KeyPath) -> Place | None:
        for length in range(len(path), 0, -1):
            if place := self.places.get(path[:length]):
                return place
        return Place(str(self.file)) if self.file else None


class _UnusableError(Exception):
    """A text, or an override, of which nothing can be used; always caught here."""

    def __init__(self, text: str, *, line: int | None = None, path: KeyPath = ()) -> None:
        super().__init__(text)
        self.line = line
        self.path = path


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> Given:
    """Reads a file and lays overrides over it.

    Args:
        path: a YAML file in UTF-8 whose top level is a mapping.
        overrides: `key.path=value`, the value in YAML; mappings that are missing on the way are created.

    Raises:
        ConfigError: there is no mapping to be read from the file. Lesser problems are listed in the result, so that
            they can be reported together with what is wrong with the values.
    """
    path = Path(path)
    try:
        node = _compose(_text(path))
        if node is None:
            raise _UnusableError("found no values in it, expected 'key: value' lines. Write it with: aetheria init DIR")
        if not isinstance(node, MappingNode):
            kind = "a list" if isinstance(node, SequenceNode) else "a single value"
            raise _UnusableError(f"found {kind}, expected 'key: value' lines at the top level. Name the keys.")
    except _UnusableError as error:
        raise ConfigError(f"{Place(str(path), error.line)}: {error}") from error.__cause__
    tree = _Tree(str(path), has_lines=True)
    given = Given(tree.value(node), path.absolute(), tree.places, tree.problems)
    lay_over(given, overrides)
    return given


def lay_over(given: Given, overrides: Sequence[str]) -> None:
    """Puts the values of overrides, `key.path=value`, into what was given; what is wrong joins its problems."""
    for override in overrides:
        place = Place(f"--set {override}")
        try:
            _lay_over(given, override, place)
        except _UnusableError as error:
            given.problems.append(Problem(error.path, str(error), place))


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Returns the values as YAML, in their order."""
    stream = io.StringIO()
    YAML().dump(dict(values), stream)
    return stream.getvalue()


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        hint = "Check the path, or write one with: aetheria init DIR"
        raise _UnusableError(f"found no such file, expected a YAML file. {hint}") from error
    except IsADirectoryError as error:
        raise _UnusableError("found a directory, expected a YAML file. Name the file in it.") from error
    except OSError as error:
        reason = f"found a file that cannot be read ({error.strerror}), expected a YAML file."
        raise _UnusableError(f"{reason} Check its path and permissions.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"found the byte 0x{content[error.start]:02x}, expected UTF-8 text. Save the file as UTF-8."
        raise _UnusableError(reason, line=content.count(b"\n", 0, error.start) + 1) from error


def _compose(text: str) -> Node | None:
    """Returns the YAML nodes of a text; None where there are none."""
    try:
        node: Node | None = _yaml().compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise _UnusableError(
            f"found text that is not YAML ({reason}). Check its indentation, colons, brackets and quotes.",
            line=mark.line + 1 if mark else None,
        ) from error
    except YAMLError as error:
        reason = str(error).splitlines()[0]
        raise _UnusableError(f"found text that is not YAML ({reason}). Remove the control characters.") from error
    return node


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)


class _Tree:
    """Turns YAML nodes into plain values, noting where each was written and which of them cannot be used."""

    def __init__(self, origin: str, *, has_lines: bool) -> None:
        self.places: dict[KeyPath, Place] = {}
        self.problems: list[Problem] = []
        self._origin = origin
        self._has_lines = has_lines
        self._constructor = _yaml().constructor

    def value(self, node: Node, path: KeyPath = (), around: tuple[Node, ...] = ()) -> Any:
        """Returns what the node says; `UNUSABLE`, and a problem noted, where that is no plain value."""
        if any(node is outer for outer in around):
            return self._refuse(node, path, "found an alias of the value it lies in. Write the value out.")
        match node:
            case MappingNode(tag="tag:yaml.org,2002:map"):
                return self._mapping(node, path, (*around, node))
            case SequenceNode(tag="tag:yaml.org,2002:seq"):
                for index, item in enumerate(node.value):
                    self.places[(*path, index)] = self._place(item)
                return [self.value(item, (*path, index), (*around, node)) for index, item in enumerate(node.value)]
            case ScalarNode(tag=tag) if tag in _STRINGS:
                return node.value
            case ScalarNode(tag=tag) if tag in _CONVERTED:
                try:
                    return self._constructor.construct_object(node)
                except (ValueError, KeyError):  # only with an explicit tag: !!int ten
                    pass
        tag = str(node.tag).replace(_TAG, "!!")
        return self._refuse(node, path, f"found the tag {tag}, expected a plain value. Remove the tag.")

    def _mapping(self, node: MappingNode, path: KeyPath, around: tuple[Node, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.value(key_node, path, around)
            if key is UNUSABLE:
                continue
            if not isinstance(key, str):
                self._refuse(key_node, path, f"found {found(key)} as a key, expected a string. Put it in quotes.")
                continue
            inside = (*path, key)
            if key in values:
                first = self.places[inside]
                again = f" (the first time on line {first.line})" if first.line else ""
                self._refuse(key_node, inside, f"found the key twice{again}, expected it once. Remove one of them.")
                continue
            self.places[inside] = self._place(key_node)
            values[key] = self.value(value_node, inside, around)
        return values

    def _place(self, node: Node) -> Place:
        return Place(self._origin, node.start_mark.line + 1 if self._has_lines else None)

    def _refuse(self, node: Node, path: KeyPath, text: str) -> object:
        self.problems.append(Problem(path, text, self._place(node)))
        return UNUSABLE


def _lay_over(given: Given, override: str, place: Place) -> None:
    """Puts the value of one override into the values."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or "" in parts:
        form = "expected key.path=value, for instance model_params.learning_rate=3e-4."
        raise _UnusableError(f"found no {'key' if equals else 'equals sign'}, {form}")
    node = _compose(text)
    holder: Any = given.values
    path: KeyPath = ()
    for part in parts[:-1]:
        path = (*path, _key_in(holder, part, path))
        if isinstance(holder, dict) and holder.get(part) is None:
            holder[part] = {}
        holder = holder[path[-1]]
    path = (*path, _key_in(holder, parts[-1], path))
    tree = _Tree(place.origin, has_lines=False)
    holder[path[-1]] = None if node is None else tree.value(node, path)
    untouched = {known: where for known, where in given.places.items() if known[: len(path)] != path}
    given.places = {**untouched, path: place, **tree.places}
    given.problems += tree.problems


def _key_in(holder: Any, part: str, path: KeyPath) -> str | int:
    """Returns one part of an override's path as the key or the index that it is in the value at `path`."""
    if isinstance(holder, dict):
        return part
    if not isinstance(holder, list):
        reason = f"found {found(holder)}, expected a mapping to set {part!r} in. Set the whole of it."
        raise _UnusableError(reason, path=path)
    if not part.isdecimal() or int(part) >= len(holder):
        reason = f"found no item {part!r} in a list of {len(holder)}, expected a position counted from 0."
        raise _UnusableError(f"{reason} Set the whole list.", path=path)
    return int(part)
