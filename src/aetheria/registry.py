"""Names for models, data modules, callbacks and the like, and the plugins they come from.

```python
@Registry.register_model("SmallNet")
class SmallNet(AetherModel): ...
```

A configuration says `model_name: SmallNet`; `Registry.build` checks the parameters against the constructor and then
calls it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from loguru import logger

from aetheria.errors import RegistryError, did_you_mean, nearest
from aetheria.parameters import checked_parameters, constructor_parameters
from aetheria.user_plugins import forget_folder, import_folder

__all__ = ["Kind", "Registry"]

Kind = Literal["model", "data", "callback", "logger", "optimizer", "scheduler", "accelerator", "loss"]
Target = TypeVar("Target", bound=Callable[..., Any])

ENTRY_POINTS = "aetheria.plugins"


class Registry:
    """All registered names of this process, by kind. Used through its class methods; never instantiated."""

    _targets: ClassVar[dict[Kind, dict[str, Callable[..., Any]]]] = {kind: {} for kind in get_args(Kind)}
    _folders: ClassVar[set[Path]] = set()
    _installed: ClassVar[dict[str, str]] = {}  # module -> why it could not be loaded, "" if it could

    # --- registering -----------------------------------------------------------------------------------------------
    @classmethod
    def register(cls, kind: Kind, name: str) -> Callable[[Target], Target]:
        """Returns a decorator that registers a class, or a function that returns an object, under a name.

        The same class again, from a module or notebook cell that is executed a second time, replaces the first.

        Raises:
            RegistryError: another class has that name, or the decorator was used without a name.
        """
        if not isinstance(name, str) or not name:
            raise RegistryError(
                f"found {name!r} as the name of a {kind}, expected a string. Write @Registry.register_{kind}('a name')."
            )

        def decorate(target: Target) -> Target:
            present = cls._targets[kind].get(name)
            if present is not None and _identity(present) != _identity(target):
                raise RegistryError(
                    f"found the {kind} name {name!r} twice: {_described(present)} has it and {_described(target)} "
                    "wants it, expected one class for it. Give one of them another name."
                )
            cls._targets[kind][name] = target
            return target

        return decorate

    @classmethod
    def register_model(cls, name: str) -> Callable[[Target], Target]:
        """Registers an `AetherModel`: `model_name` in the configuration."""
        return cls.register("model", name)

    @classmethod
    def register_data(cls, name: str) -> Callable[[Target], Target]:
        """Registers an `AetherDataModule`: `data_name` in the configuration."""
        return cls.register("data", name)

    @classmethod
    def register_callback(cls, name: str) -> Callable[[Target], Target]:
        """Registers a `Callback`: an item of `callbacks` in the configuration."""
        return cls.register("callback", name)

    @classmethod
    def register_logger(cls, name: str) -> Callable[[Target], Target]:
        """Registers a `Logger`: an item of `loggers` in the configuration."""
        return cls.register("logger", name)

    @classmethod
    def register_optimizer(cls, name: str) -> Callable[[Target], Target]:
        """Registers an optimiser, called with the model's parameters first."""
        return cls.register("optimizer", name)

    @classmethod
    def register_scheduler(cls, name: str) -> Callable[[Target], Target]:
        """Registers a learning-rate scheduler, called with the optimiser first."""
        return cls.register("scheduler", name)

    @classmethod
    def register_accelerator(cls, name: str) -> Callable[[Target], Target]:
        """Registers an `Accelerator`: `accelerator` in the configuration."""
        return cls.register("accelerator", name)

    @classmethod
    def register_loss(cls, name: str) -> Callable[[Target], Target]:
        """Registers a loss: a class of modules, or a function."""
        return cls.register("loss", name)

    # --- looking up ------------------------------------------------------------------------------------------------
    @classmethod
    def names(cls, kind: Kind) -> list[str]:
        """Returns all registered names of a kind, sorted."""
        return sorted(cls._targets[kind])

    @classmethod
    def name_of(cls, kind: Kind, target: Callable[..., Any]) -> str | None:
        """Returns the name a class or function is registered under, or None."""
        return next((name for name, known in cls._targets[kind].items() if known is target), None)

    @classmethod
    def get(cls, kind: Kind, name: str) -> Callable[..., Any]:
        """Returns the class or function with that name.

        Raises:
            RegistryError: nobody registered it; the message names the nearest.
        """
        try:
            return cls._targets[kind][name]
        except KeyError:
            raise RegistryError(cls._unknown(kind, name)) from None

    @classmethod
    def _unknown(cls, kind: Kind, name: str) -> str:
        names = cls.names(kind)
        text = f"found the unknown {kind} {name!r}, expected a registered one. {did_you_mean(name, names)}"
        failed = {point: reason for point, reason in cls._installed.items() if reason}
        if failed and not nearest(name, names):
            reasons = "; ".join(f"{point}: {reason}" for point, reason in failed.items())
            return f"{text} It may be in a plugin that could not be loaded ({reasons})."
        return f"{text} Your own is registered with @Registry.register_{kind}({name!r}) in plugins/ beside the config."

    # --- building --------------------------------------------------------------------------------------------------
    @classmethod
    def parameters(cls, kind: Kind, name: str) -> Mapping[str, inspect.Parameter]:
        """Returns what the constructor takes, `self` left out."""
        return constructor_parameters(cls.get(kind, name))

    @classmethod
    def build(cls, kind: Kind, name: str, params: Mapping[str, Any] | None = None, *leading: Any) -> Any:
        """Calls the class or function with that name.

        Args:
            kind: what is built.
            name: its registered name.
            params: arguments by name, as they stand in a configuration. They are checked against the constructor's
                parameters, strictly, and turned into what it is annotated with: a list into a tuple, a string into a
                `Path` or an `Enum`.
            leading: arguments that come first and do not stand in a configuration, for instance the model's
                parameters for an optimiser; they are not checked.

        Raises:
            RegistryError: nobody registered the name.
            ConfigError: a parameter is unknown, missing, or of the wrong type. What the constructor itself raises
                passes through untouched.
        """
        target = cls.get(kind, name)
        return target(*leading, **checked_parameters(f"{kind} {name!r}", target, params or {}, len(leading)))

    # --- plugins ---------------------------------------------------------------------------------------------------
    @classmethod
    def load_plugins(cls, folder: Path | None = None) -> None:
        """Imports the installed plugins, those that ship with Aetheria among them, and then the user's folder.

        What was loaded is not loaded again. The files of the folder import one another relatively: `from .model
        import Net`. An installed plugin that raises is warned of once, and mentioned when a name is not found.

        Args:
            folder: every `.py` file and package in it is imported; nothing is, if it does not exist.

        Raises:
            PluginError: a file of the user's raised; the original error is its cause.
        """
        cls._load_installed()
        if folder is None or not folder.is_dir() or folder.resolve() in cls._folders:
            return
        import_folder(folder.resolve())
        cls._folders.add(folder.resolve())

    @classmethod
    def _load_installed(cls) -> None:
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
            if point.value in cls._installed:
                continue
            try:
                point.load()
            except Exception as error:  # noqa: BLE001 - somebody else's package must not stop every run on this machine
                cls._installed[point.value] = f"{type(error).__name__}: {error}"
                logger.opt(exception=error).warning(
                    "The installed plugin {!r} cannot be loaded; its names are missing. Update or uninstall it.",
                    point.value,
                )
            else:
                cls._installed[point.value] = ""

    @classmethod
    @contextlib.contextmanager
    def isolated(cls) -> Iterator[None]:
        """Forgets, on leaving, what was registered and which folders were loaded inside: for tests and notebooks.

        Installed plugins are loaded on entering, because a module is only executed when it is first imported: what it
        registers would be lost for good.
        """
        cls._load_installed()
        targets = {kind: dict(named) for kind, named in cls._targets.items()}
        folders = set(cls._folders)
        try:
            yield
        finally:
            for folder in cls._folders - folders:
                forget_folder(folder)
            cls._targets, cls._folders = targets, folders


def _identity(target: Callable[..., Any]) -> Any:
    """Returns what stays the same when a module is executed again."""
    return getattr(target, "__module__", None), getattr(target, "__qualname__", target)


def _described(target: Callable[..., Any]) -> str:
    try:
        place = inspect.getfile(target)
    except (TypeError, OSError):  # built in, or typed into a console
        place = "no file"
    return f"{target.__module__}.{getattr(target, '__qualname__', repr(target))} ({place})"
