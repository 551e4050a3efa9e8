"""What is read: the streams of a data set, in which order and mixture, and how that is changed and continued."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aetheria.data.mixing import shares_of_epoch
from aetheria.data.order import BlockOrder
from aetheria.data.plan import Plan
from aetheria.data.selecting import Selection, read_selection
from aetheria.data.shards import Shards
from aetheria.errors import DataError, did_you_mean

__all__ = ["Source", "Streams"]

Source = str | Path | Shards
_REACH = 64 << 20  # bytes among which samples are shuffled, about, if nobody says
_ONE_STREAM = "data"


class Streams:
    """The shards of one stream or of several, and the plan of what is read of them when.

    Args:
        source: as for a `StreamingDataset`; so are the others.
        shards: instead of it.
        seed: of the order.
        shuffle: False reads in the order in which the samples were written.
        lanes: how many places are read from at once.
        window: samples within which a lane is shuffled; None chooses by the size of the samples.
        weights: how much of each stream is read, by name.
        repeat: how many times each sample of a stream comes in an epoch, by name.
        choose: how many samples of a stream come in an epoch, by name.
        selection: what is selected.
        version: of the data.
        options: of `Shards`.

    Attributes:
        shards: of each stream, by name.
        windows: of the order of each stream, by name.
        plan: what comes when.
    """

    def __init__(
        self,
        source: Source | Mapping[str, Source] | None,
        shards: Sequence[str | Path] | None,
        *,
        seed: int,
        shuffle: bool,
        lanes: int,
        window: int | None,
        weights: Mapping[str, float] | None,
        repeat: Mapping[str, float] | None,
        choose: Mapping[str, int] | None,
        selection: str | None,
        version: int | None,
        options: Mapping[str, Any],
    ) -> None:
        self._sources, self._only = _streams_of(source, shards)
        self._shuffle = shuffle
        self._lanes = lanes
        self._window = window
        self._asked = (weights, repeat, choose)
        self._selection = selection
        self._options = options
        self._open(dict.fromkeys(self._sources, version))
        self.arrange(seed)

    def _open(self, versions: Mapping[str, int | None]) -> None:
        self.shards: dict[str, Shards] = {}
        for name, source in self._sources.items():
            version = versions[name]
            if not isinstance(source, Shards):
                self.shards[name] = Shards(source, version, **self._options)
            else:
                self.shards[name] = source if version is None else source.of_version(version)
        first, *others = self.shards.items()
        for name, shards in others:
            if shards.schema != first[1].schema:
                raise DataError(
                    f"the samples of the stream {name!r} have the fields {shards.schema.fields}; those of {first[0]!r} "
                    f"have {first[1].schema.fields}. Streams that are mixed have the same fields."
                )

    def arrange(self, seed: int) -> None:
        """Puts the orders together, by a seed: what comes when. Whatever was changed is forgotten."""
        self.seed = seed
        self.windows = {name: self._window_of(shards) for name, shards in self.shards.items()}
        orders = [
            BlockOrder(
                shards.block_rows,
                seed,
                lanes=self._lanes,
                window=self.windows[name],
                shuffle=self._shuffle,
                left_out=self._left_out(name, shards),
            )
            for name, shards in self.shards.items()
        ]
        for (name, shards), order in zip(self.shards.items(), orders, strict=True):
            if not order.length and len(self.shards) > 1:
                raise DataError(f"the stream {name!r}, {shards.folder}, has no samples.")
            in_use = self._lanes * (self.windows[name] / max(1.0, len(shards) / max(1, len(shards.block_rows))) + 2)
            shards.keep(math.ceil(1.5 * in_use))
        weights, repeat, choose = (self._numbered(given, what) for given, what in zip(self._asked, _SHARES))
        if len(orders) == 1:
            if any((weights, repeat, choose)):
                raise DataError(f"{', '.join(_SHARES)} are for several streams; there is one.")
            self.plan = Plan(orders, list(self.shards))
        else:
            shares = shares_of_epoch([order.length for order in orders], repeat=repeat, choose=choose)
            wanted = shares if weights is None else [float(weights.get(number, 0.0)) for number in range(len(orders))]
            self.plan = Plan(orders, list(self.shards), wanted, sum(shares))
        self.plan.change_selections(0, self._selections(self._selection))
        self._begun_with = {"weights": list(self.plan.weights), "selection": self.selection}

    def _window_of(self, shards: Shards) -> int:
        if self._window is not None:
            return self._window
        rows, size = len(shards), sum(part.bytes for part in shards.manifest.parts)
        wanted = _REACH * max(1, rows) // (max(1, size) * self._lanes)
        return int(min(8192, max(64, 1 << max(0, wanted.bit_length() - 1))))

    def _left_out(self, name: str, shards: Shards) -> list[int]:
        left_out = set(shards.quarantined)
        if (chosen := self._only.get(name)) is not None:
            left_out |= set(shards.blocks_outside(chosen))
        return sorted(left_out)

    def _numbered(self, given: Mapping[str, Any] | None, what: str) -> dict[int, Any] | None:
        if not given:
            return None
        names = list(self.shards)
        for name in given:
            if name not in names:
                raise DataError(f"{what}: there is no stream {name!r}. {did_you_mean(name, names)}")
        return {names.index(name): value for name, value in given.items()}

    def _selections(self, wanted: str | None) -> tuple[Selection | None, ...]:
        names = list(self.shards)
        chosen: dict[str, Selection] = {}
        for entry in (wanted or "").split(","):
            if not entry.strip():
                continue
            stream, _, name = entry.strip().rpartition(":")
            if not stream and len(names) > 1:
                raise DataError(f"selection {entry!r}: there are several streams; say which one: {names[0]}:{name}.")
            stream = stream or names[0]
            if stream not in names:
                raise DataError(f"selection {entry!r}: there is no stream {stream!r}. {did_you_mean(stream, names)}")
            chosen[stream] = read_selection(self.shards[stream].folder, name)
        return tuple(chosen.get(name) for name in names)

    # --- continuing and changing ------------------------------------------------------------------------------------

    def arrangement(self) -> dict[str, Any]:
        """Returns what decides the order, besides epoch and position: as plain containers."""
        return {
            "streams": {
                name: {"uid": shards.manifest.uid, "version": shards.manifest.version, "digest": shards.manifest.digest}
                for name, shards in self.shards.items()
            },
            "order": {
                "seed": self.seed,
                "shuffle": self._shuffle,
                "lanes": self._lanes,
                "windows": self.windows,
                "length": self.plan.length,
                "begun with": self._begun_with,
            },
            "plan": self.plan.state_dict(),
        }

    def take_arrangement(self, state: Mapping[str, Any]) -> None:
        """Takes back what `arrangement` returned; the versions of the data are then those that it names.

        Raises:
            DataError: it is of other data, or of another order.
        """
        found = self.arrangement()
        before, now = state["streams"], found["streams"]
        if {name: held["uid"] for name, held in before.items()} != {name: held["uid"] for name, held in now.items()}:
            raise DataError(
                f"this continues training on {_named(before)}; these data are {_named(now)}. Continue with the same "
                "data, or begin a new run."
            )
        if before != now:  # something was added since, or put into quarantine
            self._open({name: held["version"] for name, held in before.items()})
            self.arrange(self.seed)
            found = self.arrangement()
        if found["streams"] != before:
            raise DataError(f"the data are not the same although their versions are: {_named(before)}.")
        if different := [name for name, value in state["order"].items() if found["order"][name] != value]:
            raise DataError(
                "this continues in another order: "
                + ", ".join(f"{name} was {state['order'][name]}, is {found['order'][name]}" for name in different)
                + ". Take the arguments with which it was begun."
            )
        selected = [
            {name: read_selection(shards.folder, name) for name in _selected_names(state["plan"], number)}
            for number, shards in enumerate(self.shards.values())
        ]
        self.plan.load_state_dict(state["plan"], selected)

    @property
    def weights(self) -> dict[str, float]:
        """How much of each stream is read, by name; all together are 1."""
        given = self.plan.weights
        return {name: weight / sum(given) for name, weight in zip(self.plan.names, given, strict=True)}

    @property
    def selection(self) -> str | None:
        """What is selected, as it is written for `set_selection`."""
        several = len(self.plan.names) > 1
        found = [
            f"{name}:{one.name}" if several else one.name
            for name, one in zip(self.plan.names, self.plan.selections, strict=True)
            if one is not None
        ]
        return ",".join(found) or None

    def set_weights(self, weights: Mapping[str, float], place: int) -> None:
        """Mixes otherwise from a base position on, counted over all epochs.

        Raises:
            DataError: there is one stream, or these are no weights of the streams.
        """
        numbered = self._numbered(weights, "weights") or {}
        if missing := [name for number, name in enumerate(self.plan.names) if number not in numbered]:
            raise DataError(f"weights are given for all streams; missing: {', '.join(missing)}. 0 reads none of it.")
        self.plan.change_weights(place, [float(numbered[number]) for number in range(len(self.plan.names))])

    def set_selection(self, selection: str | None, place: int) -> None:
        """Selects otherwise from a base position on, counted over all epochs.

        Raises:
            DataError: there is no such selection.
        """
        self.plan.change_selections(place, self._selections(selection))


_SHARES = ("weights", "repeat", "choose")


def _streams_of(
    source: Source | Mapping[str, Source] | None, shards: Sequence[str | Path] | None
) -> tuple[dict[str, Source], dict[str, set[int]]]:
    """Returns what each stream is read from, and of which only some shards are."""
    if shards is None:
        assert source is not None
        if not isinstance(source, Mapping):
            return {_ONE_STREAM: source}, {}
        if not source:
            raise DataError("a mixture has at least one stream; found none.")
        return dict(source), {}
    if isinstance(shards, str | Path) or not len(shards):
        raise DataError(f"shards is a list of folders, or of files of their shards; found {shards!r}.")
    found: dict[str, Source] = {}
    only: dict[str, set[int]] = {}
    for entry in shards:
        path = Path(entry)
        if path.suffix == ".arrow":
            folder = str(path.absolute().parent.parent)
            only.setdefault(folder, set()).add(_shard_number(path))
        else:
            folder = str(entry)
        if folder in found and folder not in only:
            raise DataError(f"shards: {folder} is there twice.")
        found[folder] = folder
    if len(found) == 1:
        (folder,) = found
        return {_ONE_STREAM: folder}, {_ONE_STREAM: only[folder]} if folder in only else {}
    return found, only


def _shard_number(path: Path) -> int:
    try:
        return int(path.stem.removeprefix("shard-"))
    except ValueError:
        raise DataError(
            f"{path} is not a shard: these are called shard-00000000.arrow, in the folder `shards` of the data. Other "
            "files are made shards by `aetheria data prepare`."
        ) from None


def _named(streams: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{name} (uid {held['uid']}, version {held['version']})" for name, held in streams.items())


def _selected_names(plan: Mapping[str, Any], stream: int) -> set[str]:
    return {names[stream][0] for _, names in plan["selections"] if names[stream] is not None}
