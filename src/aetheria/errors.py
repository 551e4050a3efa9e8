"""What can go wrong, as types. Every message says what was found, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AetheriaError",
    "CommandError",
    "ConfigError",
    "DataDamagedError",
    "DataError",
    "HubError",
    "LaunchError",
    "MissingDependencyError",
    "ModelError",
    "NonFiniteError",
    "PluginError",
    "RegistryError",
    "RunFolderError",
    "SnapshotDamagedError",
    "SnapshotError",
    "SnapshotMismatchError",
    "SnapshotVersionError",
    "did_you_mean",
    "nearest",
]


class AetheriaError(Exception):
    """Base of every error that Aetheria raises on purpose. The message is written for the user."""


class ConfigError(AetheriaError, ValueError):
    """A configuration that cannot be trained: unknown key, wrong type, impossible combination."""


class CommandError(AetheriaError, ValueError):
    """A command that cannot be understood or accepted: malformed, expired, a knob or a value that is refused."""


class HubError(AetheriaError, ConnectionError):
    """The hub (the Weaver, or the message server behind it) cannot be reached, or refuses to talk."""


class LaunchError(AetheriaError, ValueError):
    """A launch of several processes that cannot be: an impossible number, nodes that would not meet, a bad job name."""


class RegistryError(AetheriaError, LookupError):
    """A name that nobody registered, or that two different classes claim."""


class PluginError(AetheriaError):
    """A user's `plugins/` folder, or an installed plugin, that cannot be imported."""


class MissingDependencyError(AetheriaError, ImportError):
    """An optional package that was asked for and is not installed."""

    @classmethod
    def of(cls, package: str, extra: str, wanted_by: str) -> MissingDependencyError:
        """Says which package is missing, who wanted it and the command that installs it."""
        return cls(
            f"{wanted_by} needs the package '{package}', which is not installed. "
            f"Install it with: pip install 'aetheria[{extra}]'"
        )


class RankError(AetheriaError):
    """Another rank of the run has failed, or is gone; the message says which, and with what."""


class ModelError(AetheriaError):
    """A model that broke its contract (`training_step`, `configure_optimizers`, ...)."""


class DataError(AetheriaError):
    """Data that cannot be trained on: an empty loader, a batch that cannot be measured."""


class DataDamagedError(DataError):
    """Shards whose files are missing or do not match their hashes; the message names file, block and samples."""


class NonFiniteError(AetheriaError, ArithmeticError):
    """NaN or infinity in the gradients, with `nonfinite: raise` or too often in a row."""


class RunFolderError(AetheriaError):
    """A run folder that cannot be made, found, opened, or is in use by another process."""


class SnapshotError(AetheriaError):
    """A snapshot that cannot be written or read."""


class SnapshotDamagedError(SnapshotError):
    """A snapshot whose files are missing or do not match their hashes; the message names them."""


class SnapshotVersionError(SnapshotError):
    """A snapshot written in a newer format than this version of Aetheria reads."""


class SnapshotMismatchError(SnapshotError):
    """A sound snapshot, but of another model, another optimiser or another data order."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Returns up to `count` of the known names that look most like `name`, best first.

    The comparison ignores case and treats `-` and `_` alike; the names come back as they are spelled.
    """

    def fold(text: str) -> str:
        return text.lower().replace("-", "_")

    spelled = {fold(candidate): candidate for candidate in known}
    return [spelled[match] for match in difflib.get_close_matches(fold(name), spelled, n=count, cutoff=0.5)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a sentence that names the nearest known spelling, or lists all of them."""
    known = sorted(known)
    near = nearest(name, known)
    if near:
        return "Did you mean " + " or ".join(repr(candidate) for candidate in near) + "?"
    if not known:
        return "None is known."
    return "Known: " + ", ".join(known) + "."
