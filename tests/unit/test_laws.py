"""The laws of the house that an import contract cannot state, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import aetheria

PACKAGE = Path(aetheria.__file__).parent
TEMPLATES = PACKAGE / "cli" / "templates"
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for path in sorted(PACKAGE.rglob("*.py"))
    if not path.is_relative_to(TEMPLATES)
}


def offences(*, outside: tuple[str, ...] = (), inside: tuple[str, ...] = ("",), of: Callable[[ast.AST], bool]) -> str:
    """Returns the places, one a line, where `of` is true of a syntax node in the files concerned."""
    return "\n".join(
        f"{name}:{getattr(node, 'lineno', '?')}: {ast.unparse(node)}"
        for name, tree in SOURCES.items()
        if name.startswith(inside) and not (outside and name.startswith(outside))
        for node in ast.walk(tree)
        if of(node)
    )


def imported(node: ast.AST) -> Iterator[str]:
    """Yields the modules that a node imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(node: ast.AST, *names: str) -> bool:
    """Returns whether a node is a call that is written as one of these names."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in names


def keyword(node: ast.AST, name: str) -> object:
    """Returns the constant that a call passes under a name; None where it passes none."""
    found = [item.value for item in getattr(node, "keywords", ()) if item.arg == name]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


def test_only_the_accelerators_know_the_hardware() -> None:
    def names_a_device(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return node.attr in ("cuda", "mps", "xpu")
        return any(module.startswith(("torch.cuda", "torch.mps", "torch.xpu")) for module in imported(node))

    assert not offences(of=names_a_device, outside=("accelerator/",))


def test_there_is_no_pickle() -> None:
    picklers = ("pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib")

    def unpickles(node: ast.AST) -> bool:
        return (
            any(module.split(".")[0] in picklers for module in imported(node))
            or (calls(node, "torch.load") and keyword(node, "weights_only") is not True)
            or keyword(node, "allow_pickle") is True
            or calls(node, "eval", "exec")
        )

    assert not offences(of=unpickles)


def test_the_loop_does_not_wait_for_the_device() -> None:
    def waits(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "item"

    assert not offences(of=waits, inside=("engine/", "orchestrator.py"))


def test_only_the_command_line_prints() -> None:
    assert not offences(of=lambda node: calls(node, "print"), outside=("cli/",))


@pytest.mark.parametrize(
    "statement",
    [
        "import aetheria.config, aetheria.registry, aetheria.runs, aetheria.errors",
        "import aetheria.loom.recorder, aetheria.loom.reader",
        "import aetheria.cli",
    ],
)
def test_these_do_not_wait_for_torch(statement: str) -> None:
    script = f"import sys; {statement}; print(*{{'torch', 'matplotlib', 'pyarrow'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
