"""Takes the README's pictures anew: the terminal while the digits train, and the curves of that run.

    python docs/make_pictures.py

The terminal is a real one, as far as the program can tell: what it writes goes into an emulator of 100 columns, whose
screen is drawn as it stands two thirds of the way. Then a second run is steered, and what was typed and answered in
that other terminal is drawn below what the first one shows meanwhile.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
COLUMNS, LINES = 100, 24
WIDE = 124  # for the journal
CONFIG = "examples/digits/config.yaml"
TRAINED = f"train {CONFIG} --live on --set epochs=400"
STEERED = (
    'set @last learning_rate=5e-4 --reason "plateau"',
    "set @last learning_rate=-1",
    "pause @last",
    "resume @last",
    "snapshot take @last --name good --pinned",
    'stop @last --reason "good enough"',
)
AFTERWARDS = ("journal @last", "replay @last")
SHOWN = r"epoch +1[0-9]/15 .*step +1[0-9]/23"  # the moment that is shown, in the words of the progress bar
# pyte does not know faint letters. Nothing here is italic, so that attribute carries them.
pyte.graphics.TEXT[2] = "+italics"
_COLORS = {"default": None, "brown": "yellow"}  # pyte's words for colours, where they are not rich's


def main() -> None:
    """Trains, and writes `docs/images/run.svg`, `curves.png` and `steer.svg`."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "examples" / "digits", Path(folder) / "examples" / "digits")
        _draw(_screen_of_a_run(folder), IMAGES / "run.svg")
        plot = [sys.executable, "-m", "aetheria", "plot", "@last", "-o", str(IMAGES / "curves.png")]
        subprocess.run(plot, cwd=folder, check=True)
        os.environ["AETHERIA_HOME"] = folder
        try:
            _steer(folder)
        finally:
            subprocess.run([sys.executable, "-m", "aetheria", "down"], cwd=folder, check=False)


def _steer(folder: str) -> None:
    """Trains a run and steers it from here; draws what both terminals show."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    words = ["-m", "aetheria", *TRAINED.split()]
    terminal = _spawn(folder, words)
    steering, typed, shown = [*STEERED], [], pyte.Screen(COLUMNS, LINES)
    while terminal.expect([b".+", pexpect.EOF]) == 0:
        if len(typed) < 5:
            stream.feed(terminal.after)
            shown = screen
        if steering and re.search(r"epoch +[3-9]/", "\n".join(screen.display)):
            command = steering.pop(0)
            done = subprocess.run(
                [sys.executable, "-m", "aetheria", *shlex.split(command)],
                cwd=folder,
                env=os.environ | {"COLUMNS": str(WIDE)},
                capture_output=True,
                text=True,
                check=False,
            )
            typed.append((command, done.stdout + done.stderr))
    terminal.close()
    for command in AFTERWARDS:
        done = subprocess.run(
            [sys.executable, "-m", "aetheria", *shlex.split(command)],
            cwd=folder,
            env=os.environ | {"COLUMNS": str(WIDE)},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if not line.startswith("replay ")]
        typed.append((command, "\n".join(lines)))
    console = Console(record=True, width=WIDE, file=io.StringIO(), legacy_windows=False)
    console.print(Text.assemble(("$ ", "dim"), f"aetheria {TRAINED}"))
    _print_screen(console, shown)
    console.print()
    console.rule(Text("another terminal", "dim"), style="dim")
    console.print()
    for command, answer in typed:
        console.print(Text.assemble(("$ ", "dim"), f"aetheria {command}"))
        console.print(Text(answer.rstrip()), overflow="crop", no_wrap=True)
    _save(console, IMAGES / "steer.svg")


def _screen_of_a_run(folder: str) -> pyte.Screen:
    """Trains to the end, and returns the terminal as it was on the way."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    terminal = _spawn(folder, ["-m", "aetheria", "train", CONFIG, "--live", "off"])
    while terminal.expect([b".+", pexpect.EOF]) == 0:
        if not re.search(SHOWN, "\n".join(screen.display), re.DOTALL):
            stream.feed(terminal.after)
    terminal.close()
    if terminal.exitstatus != 0:
        raise SystemExit("\n".join(screen.display))
    return screen


def _spawn(folder: str, words: list[str]) -> pexpect.spawn:
    return pexpect.spawn(
        sys.executable,
        words,
        cwd=folder,
        dimensions=(LINES, COLUMNS),
        env=os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
        timeout=600,
    )


def _draw(screen: pyte.Screen, path: Path) -> None:
    """Draws a screen as SVG, below the command that was typed."""
    console = _console()
    console.print(Text.assemble(("$ ", "dim"), f"aetheria train {CONFIG}"))
    _print_screen(console, screen)
    _save(console, path)


def _console() -> Console:
    return Console(record=True, width=COLUMNS, file=io.StringIO(), legacy_windows=False)


def _print_screen(console: Console, screen: pyte.Screen) -> None:
    lines = [_line(screen, number) for number in range(screen.lines)]
    while not lines[-1]:
        lines.pop()
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop")


def _save(console: Console, path: Path) -> None:
    svg = console.export_svg(title="aetheria", theme=DIMMED_MONOKAI)
    # A picture in a document asks no other server for its letters.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code, monospace", "Menlo, Consolas, 'DejaVu Sans Mono', monospace")
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


def _line(screen: pyte.Screen, number: int) -> Text:
    cells = [screen.buffer[number][column] for column in range(screen.columns)]
    line = Text()
    for style, alike in itertools.groupby(cells, _style):
        line.append("".join(cell.data for cell in alike), style)
    line.rstrip()
    return line


def _style(cell: pyte.screens.Char) -> Style:
    return Style(color=_color(cell.fg), bgcolor=_color(cell.bg), bold=cell.bold, dim=cell.italics)


def _color(name: str) -> str | None:
    return f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else _COLORS.get(name, name)


if __name__ == "__main__":
    main()
