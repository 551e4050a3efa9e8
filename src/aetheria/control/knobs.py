"""All knobs of a run: what may be changed while it trains; set together or not at all, and put back by snapshots."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints
from urllib.parse import quote

import msgspec
from loguru import logger

from aetheria.control.knob import Knob, plain
from aetheria.errors import CommandError, ConfigError, did_you_mean

__all__ = [
    "Change",
    "Knob",
    "Knobs",
    "controllable",
    "declared",
    "knob_of",
    "plain",
    "weavelet_controllable",
    "weavelet_handler",
]

Method = TypeVar("Method", bound=Callable[..., Any])
_MARK = "__aetheria_knob__"


@dataclass(frozen=True)
class Change:
    """What a `set` did.

    Attributes:
        before: the values until then, by knob.
        after: the values since then, as the knobs themselves tell.
        remarks: what the setters had to say.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    remarks: list[str] = field(default_factory=list)


class Knobs:
    """All knobs of a run."""

    def __init__(self, knobs: Iterable[Knob] = ()) -> None:
        self._knobs: dict[str, Knob] = {}
        self._last: dict[str, Any] = {}
        self._first: dict[str, Any] = {}  # as they were before anybody touched them
        self._unreadable: set[str] = set()
        for knob in knobs:
            self.add(knob)

    def add(self, knob: Knob) -> None:
        """Declares one more.

        Raises:
            ConfigError: there is one of that key already.
        """
        if knob.key in self._knobs:
            raise ConfigError(
                f"two knobs are called '{knob.key}': one of {self._knobs[knob.key].scope}, one of {knob.scope}. "
                "Give one of them another key."
            )
        self._knobs[knob.key] = knob

    def __iter__(self) -> Iterator[Knob]:
        return iter(self._knobs.values())

    def __len__(self) -> int:
        return len(self._knobs)

    def __contains__(self, key: str) -> bool:
        return key in self._knobs

    def __getitem__(self, key: str) -> Knob:
        try:
            return self._knobs[key]
        except KeyError:
            raise CommandError(f"there is no knob '{key}'. {did_you_mean(key, self._knobs)}") from None

    def observed(self, key: str) -> Any:
        """Returns a knob's value as it is now, as JSON data; None where nobody knows."""
        knob = self[key]
        return plain(self._last.get(key) if knob.get is None else knob.get())

    def values(self) -> dict[str, Any]:
        """Returns all values as they are now, as JSON data; None where a getter raises, which is said."""
        return {key: self._observed_or_none(key) for key in self._knobs}

    def _observed_or_none(self, key: str) -> Any:
        try:
            value = self.observed(key)
        except Exception as error:  # noqa: BLE001 - a look at a run must not end it
            if key not in self._unreadable:
                logger.warning("The value of the knob {} cannot be read: {}: {}", key, type(error).__name__, error)
            self._unreadable.add(key)
            return None
        self._unreadable.discard(key)
        return value

    def check(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns all values in the knobs' own types; refuses all of them if one is wrong.

        Raises:
            CommandError: naming every knob that refuses.
        """
        checked, refusals = {}, []
        for key, value in values.items():
            try:
                checked[key] = self[key].check(value)
            except CommandError as error:
                refusals.append(str(error))
        if refusals:
            raise CommandError(" ".join(refusals))
        return checked

    def apply(self, checked: Mapping[str, Any], vote: Callable[[str], str] = lambda problem: problem) -> Change:
        """Gives knobs their new values; if one setter raises, all get their old values back.

        Their order does not matter: a setter that refuses is asked again after the others, for it may only have
        refused what one of them changes.

        Args:
            checked: what `check` returned.
            vote: is told the problem, or that there is none, before the new values stand, and returns whose problem is
                everybody's: several ranks get their new values all of them, or none.

        Raises:
            Exception: whatever the setter raised; its notes say what could not be put back.
            CommandError: somebody else's setter did.
        """
        before = {key: self.observed(key) for key in checked}
        kept = {key: keep() for key in checked if (keep := self._knobs[key].keep) is not None}
        last, first = dict(self._last), dict(self._first)
        done: list[str] = []
        remarks: list[str] = []

        def put(key: str) -> None:
            if key not in done:
                done.append(key)
            remark = self._knobs[key].set(checked[key])
            if isinstance(remark, str) and remark:
                remarks.append(remark)
            self._first.setdefault(key, before[key])
            self._last[key] = checked[key]

        def undo(error: Exception) -> None:
            self._last, self._first = last, first
            for key in reversed(done):
                self._put_back(key, before[key], kept.get(key), error)

        try:
            for error in _in_any_order(checked, put).values():
                raise error
            after = {key: self.observed(key) for key in checked}
        except Exception as error:
            own = f"{type(error).__name__}: {error}"
            problem = vote(own)
            undo(error)
            if problem != own:
                raise CommandError(problem) from error
            raise
        if problem := vote(""):
            refused = CommandError(problem)
            undo(refused)
            raise refused
        return Change(before, after, remarks)

    def _put_back(self, key: str, value: Any, put_back: Callable[[], None] | None, error: Exception) -> None:
        knob = self._knobs[key]
        try:
            if put_back is not None:
                put_back()
            elif knob.get is not None and self.observed(key) == value:
                pass  # the setter that raised has not changed it
            elif knob.get is not None or key in self._last:
                knob.set(knob.check(value))
            else:
                error.add_note(f"besides, {key} may have changed: what it was is not known, for it has no getter")
        except Exception as second:  # noqa: BLE001 - reported with the first one, which matters more
            error.add_note(f"besides, {key} could not be put back to {value!r}: {second}")

    def touched(self) -> dict[str, Any]:
        """Returns the last value set, as JSON data, of all knobs that a snapshot does not hold anyway."""
        return {key: plain(value) for key, value in self._last.items() if not self._knobs[key].in_state}

    def restore(self, values: Mapping[str, Any], structural: bool) -> list[str]:
        """Sets again what `touched` returned at another moment of the run, and resets what was not touched then.

        Args:
            values: the values then.
            structural: which of the two kinds of knobs; the structural ones come before the states are loaded.

        Returns:
            Warnings, for what cannot be.
        """
        mine = [key for key, knob in self._knobs.items() if knob.structural == structural and not knob.in_state]

        def put(key: str) -> None:
            try:
                if key in values:
                    self.apply(self.check({key: values[key]}))
                else:
                    self._reset(key)
            except CommandError:
                raise
            except Exception as error:  # the run goes on, and says so
                raise CommandError(f"{type(error).__name__}: {error}") from error

        warnings = []
        for key, error in _in_any_order([key for key in mine if key in values or key in self._last], put).items():
            was = f"was {values[key]!r} at that step" if key in values else "had not been set by then"
            warnings.append(f"{key} {was}, and cannot be put back: {error}")
        if not structural:
            gone = values.keys() - self._knobs.keys()
            warnings += [
                f"{key} was {values[key]!r} at that step, but this run has no such knob" for key in sorted(gone)
            ]
        return warnings

    def _reset(self, key: str) -> None:
        knob, first = self._knobs[key], self._first[key]
        if knob.reset is not None:
            knob.reset()
        elif knob.get is not None or first is not None:
            knob.set(knob.check(first))
        del self._last[key], self._first[key]

    def schema(self) -> dict[str, Any]:
        """Returns one JSON Schema for all: an object with a property for each knob."""
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {knob.key: knob.schema(f"#/properties/{_pointer(knob.key)}") for knob in self},
            "additionalProperties": False,
        }

    def describe(self) -> str:
        """Returns a Markdown table of all knobs."""
        lines = ["| knob | value | allowed | unit | what it does |", "|---|---|---|---|---|"]
        values = self.values()
        for knob in self:
            value = msgspec.json.encode(values[knob.key]).decode()
            cells = (f"`{knob.key}`", f"`{value}`", knob.allowed(), knob.unit, knob.help)
            lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
        return "\n".join(lines)


def _pointer(key: str) -> str:
    return quote(key.replace("~", "~0").replace("/", "~1"))


def _in_any_order(keys: Iterable[str], put: Callable[[str], None]) -> dict[str, CommandError]:
    """Does something for every key; again for those that refuse, as long as that brings one of them further.

    Returns:
        Why, for those that refuse to the last.
    """
    refused: dict[str, CommandError] = {}
    waiting = list(keys)
    while waiting:
        refused = {}
        for key in waiting:
            try:
                put(key)
            except CommandError as error:
                refused[key] = error
        if len(refused) == len(waiting):
            break
        waiting = list(refused)
    return refused


# --- declaring -------------------------------------------------------------------------------------------------------


def controllable(
    key: str,
    *,
    get: str | Callable[[Any], Any] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[Any] | None = None,
    finite: bool = True,
    unit: str = "",
    help: str = "",  # noqa: A002 - the word that argparse and typer use, too
    scope: str = "",
) -> Callable[[Method], Method]:
    """Declares that a method of a model, a data module or a callback sets a knob.

        @controllable("dropout", get="rate", ge=0.0, lt=1.0, help="share of the units that are silenced")
        def set_dropout(self, rate: float) -> None: ...

    Args:
        key: the knob's name.
        get: how to find out its value: the name of an attribute, or a function of the object. Without it, the value
            last set is shown.
        ge: the value is not less than this.
        gt: the value is greater than this.
        le: the value is not more than this.
        lt: the value is less than this.
        choices: the value is one of these.
        finite: refuses NaN and infinities.
        unit: of the value.
        help: one line; the method's first docstring line by default.
        scope: whose it is; what declares it, by default.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices, "finite": finite}

    def declare(method: Method) -> Method:
        about = help or (inspect.getdoc(method) or "").partition("\n")[0]
        setattr(method, _MARK, {"key": key, "unit": unit, "help": about, "scope": scope, "getter": get, **bounds})
        return method

    return declare


weavelet_controllable = weavelet_handler = controllable  # torchLoom's names for it


def declared(owner: Any, scope: str) -> list[Knob]:
    """Returns the knobs that an object's class declares with `controllable`.

    Raises:
        ConfigError: a method does not take exactly one value.
    """
    names = {name for kind in type(owner).__mro__ for name, member in vars(kind).items() if hasattr(member, _MARK)}
    return [_bound(owner, name, scope) for name in sorted(names) if hasattr(getattr(type(owner), name), _MARK)]


def _bound(owner: Any, name: str, scope: str) -> Knob:
    method = getattr(owner, name)
    options = dict(getattr(method, _MARK))
    getter = options.pop("getter")
    get: Callable[[], Any] | None = None
    if isinstance(getter, str):
        if not hasattr(owner, getter):
            raise ConfigError(
                f"the knob '{options['key']}' is to be read from the attribute '{getter}', which this "
                f"{type(owner).__name__} does not have."
            )
        get = lambda: getattr(owner, getter)  # noqa: E731
    elif getter is not None:
        get = lambda: getter(owner)  # noqa: E731
    options["scope"] = options["scope"] or scope
    return knob_of(method, get=get, **options)


def knob_of(function: Callable[..., Any], *, key: str, get: Callable[[], Any] | None = None, **options: Any) -> Knob:
    """Returns the knob that a function of one annotated value sets.

    Raises:
        ConfigError: it takes another number of values, or the value has no annotation.
    """
    name = getattr(function, "__qualname__", repr(function))
    found = inspect.signature(function).parameters.values()
    parameters = [one for one in found if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    required = [one for one in parameters if one.default is one.empty]
    required += [one for one in found if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    if len(required or parameters[:1]) != 1 or (required or parameters)[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise ConfigError(
            f"{name} sets the knob '{key}', so it must take exactly one value, by position; it takes "
            f"{', '.join(one.name for one in required) or 'none'}."
        )
    parameter = (required or parameters)[0]
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ConfigError(f"the annotations of {name}, setter of the knob '{key}', cannot be read: {error}.") from error
    if parameter.name not in hints:
        raise ConfigError(
            f"{name} sets the knob '{key}', but its value '{parameter.name}' has no annotation. Add one, such as "
            f"{parameter.name}: float."
        )
    return Knob(key, hints[parameter.name], function, get, **options)
