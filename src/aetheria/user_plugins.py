"""Imports a folder of the user's plugins, under a name that no other project has.

`/home/ada/digits/plugins/model.py` becomes the module `aetheria.user_plugins./home/ada/digits/plugins.model`: two
projects never clash, a plugin called `torch.py` hides nothing, and the files of a folder import one another with
`from .model import Net`. The folder is in the name because a data-loading worker that is spawned, not forked, has only
the name of a class to find it by: importing this module is enough to make all such names importable.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from urllib.parse import quote, unquote

from aetheria.errors import PluginError

__all__ = ["forget_folder", "import_folder"]

__path__: list[str] = []  # makes this module a package, whose submodules are the folders


class _FolderFinder(MetaPathFinder):
    """Finds the package that a folder's name stands for; the files in it are found by Python's own finder."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent, _, name = fullname.rpartition(".")
        folder = Path(unquote(name))
        if parent != __name__ or not folder.is_dir():
            return None
        initialiser = folder / "__init__.py"
        if initialiser.is_file():
            return spec_from_file_location(fullname, initialiser, submodule_search_locations=[str(folder)])
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec


sys.meta_path.append(_FolderFinder())


def import_folder(folder: Path) -> None:
    """Imports every `.py` file and package of a folder, except those whose name begins with `_` or `.`.

    Args:
        folder: the real path of a directory.

    Raises:
        PluginError: one of them raised; the original error is its cause.
    """
    package = _package_name(folder)
    _import(package, folder / "__init__.py", folder)
    for path in sorted(folder.iterdir()):
        is_plugin = path.suffix == ".py" or (path / "__init__.py").is_file()
        if is_plugin and not path.name.startswith(("_", ".")):
            _import(f"{package}.{path.stem}", path, folder)


def forget_folder(folder: Path) -> None:
    """Takes a folder's modules out of `sys.modules`, so that they can be imported again."""
    package = _package_name(folder)
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def _package_name(folder: Path) -> str:
    return f"{__name__}.{quote(str(folder)).replace('.', '%2E')}"


def _import(module: str, path: Path, folder: Path) -> None:
    importlib.invalidate_caches()  # the file may be younger than the last look into its folder
    try:
        importlib.import_module(module)
    except Exception as error:
        inside = [
            frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(folder))
        ]
        place = f"{inside[-1].filename}:{inside[-1].lineno}" if inside else str(path)
        hint = "Correct the file, or take it out of the folder."
        if isinstance(error, ModuleNotFoundError) and (folder / f"{error.name}.py").is_file():
            hint = f"Files of this folder import one another with a dot: from .{error.name} import ..."
        raise PluginError(f"{place}: found {type(error).__name__}: {error} while importing a plugin. {hint}") from error
