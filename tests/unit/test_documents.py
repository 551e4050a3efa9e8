"""What the documents point at is there, and what they quote is so."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from aetheria.config import TrainingConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for folder in (ROOT, ROOT / "docs", ROOT / "docs" / "decisions", ROOT / "examples", ROOT / "benchmarks")
    for path in folder.glob("*.md")
)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Returns what the headings of a document are called in links."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(language: str) -> list[object]:
    """Returns the code blocks of a language in all documents, named by where they stand."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            found.append(pytest.param(match[1], id=f"{path.relative_to(ROOT)}:{line}"))
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


def test_the_reference_of_the_configuration_is_up_to_date() -> None:
    path = ROOT / "docs" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert module.page_with(module.reference()) == page, "run: make docs"


@pytest.mark.parametrize("block", blocks("python"))
def test_python_is_python(block: str) -> None:
    ast.parse(block)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_configurations_are_valid(block: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    whole = re.search(r"^(epochs|max_steps):", block, re.MULTILINE)
    file.write_text(block if whole else f"epochs: 1\n{block}")
    TrainingConfig.from_yaml(file)
