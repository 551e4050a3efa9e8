"""The page that `aetheria --help` shows."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

__all__ = ["QuickHelp"]


class QuickHelp(TyperGroup):
    """A group of commands whose help looks like typer's own, and comes sooner.

    Typer's imports all of rich, its Markdown parser and highlighter among it, which takes as long as everything else
    together; `benchmarks/startup.py` measures it.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints usage, options, and the commands in panels by their `rich_help_panel`."""
        from rich.console import Console
        from rich.padding import Padding
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        panels: dict[str, Table] = {}

        def add(panel: str, name: str, help_text: str) -> None:
            table = panels.setdefault(panel, Table.grid(padding=(0, 2)))
            table.add_row(Text(name, style="bold cyan", no_wrap=True), help_text)

        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                add("Options", *record)
        for name, command in self.commands.items():
            add(getattr(command, "rich_help_panel", None) or "Commands", name, command.get_short_help_str(limit=200))
        console = Console(markup=False, highlight=False)
        console.print(Padding(self.get_usage(ctx), 1))
        console.print(Padding(self.help or "", (0, 1, 1, 1)))
        for title, table in panels.items():
            console.print(Panel(table, title=title, title_align="left", border_style="dim"))
        console.print(Padding(self.epilog or "", 1))
