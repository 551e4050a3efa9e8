"""The curves of runs as a picture (matplotlib) or as characters in a terminal (plotext)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from aetheria.cli.curves import RunCurves, best_mode, families, family, role, smoothed, wants_log_scale
from aetheria.errors import AetheriaError
from aetheria.loom.reader import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PICTURE_FORMATS", "draw_in_terminal", "save_figure"]

PICTURE_FORMATS = ("png", "svg", "pdf")

# Told apart by everybody: Okabe & Ito, "Color Universal Design", https://jfly.uni-koeln.de/color/
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_ROLE_COLORS = {"training": _COLORS[0], "epoch mean": _COLORS[5], "validation": _COLORS[1], "test": _COLORS[2]}
_ROLE_LINES: dict[str, Literal["-", ":", "--", "-."]] = {
    "training": "-",
    "epoch mean": ":",
    "validation": "--",
    "test": "-.",
}
_TERMINAL_COLORS = (75, 214, 35, 175, 166, 33)  # the same, as near as 256 colours come
_TICK_STEPS = (1, 2, 2.5, 5, 10)
_INK, _FAINT_INK = "#222222", "#8a8a8a"
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#b0b0b0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "axes.labelcolor": _FAINT_INK,
    "xtick.color": _FAINT_INK,
    "ytick.color": _FAINT_INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8.0,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are names
}


def save_figure(runs: Sequence[RunCurves], path: Path, smooth: float | None = None) -> None:
    """Draws the curves into a file, one panel for each family of metrics; the suffix says the format: PNG, SVG, PDF.

    Args:
        runs: what to draw; several runs are told apart by colour.
        path: the file; replaced where it exists.
        smooth: see `aetheria.cli.curves.smoothed`.

    Raises:
        AetheriaError: another suffix, or a file that cannot be written.
    """
    import matplotlib as mpl

    if path.suffix.lower().lstrip(".") not in PICTURE_FORMATS:
        found = f"ends in '{path.suffix}'" if path.suffix else "has no suffix"
        raise AetheriaError(f"{path} {found}; expected one of: {', '.join(PICTURE_FORMATS)}.")
    with mpl.rc_context(_STYLE):
        figure = _figure(runs, smooth)
        try:
            figure.savefig(path, dpi=160)
        except OSError as error:
            raise AetheriaError(f"cannot write {path}: {error.strerror or error}. Choose another place.") from error


def _figure(runs: Sequence[RunCurves], smooth: float | None) -> Figure:
    from matplotlib.figure import Figure

    titles = families(name for run in runs for name in run.curves)
    columns = 2 if len(titles) == 4 else min(len(titles), 3)
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(max(4.8 * columns, 6.4), 2.9 * rows + 0.8), layout="constrained")
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flatten())
    for panel in panels[len(titles) :]:
        panel.remove()
    for index, (title, panel) in enumerate(zip(titles, panels)):
        _draw_panel(panel, title, titles[title], runs, smooth)
        if index + columns >= len(titles):  # nothing below it
            panel.set_xlabel("step")
            panel.tick_params(labelbottom=True)
    _draw_heading(figure, titles, runs)
    return figure


def _draw_panel(panel: Axes, title: str, names: Sequence[str], runs: Sequence[RunCurves], smooth: float | None) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    panel.set_title(title.replace("_", " "))
    panel.margins(x=0.02, y=0.08)
    if wants_log_scale(title, runs):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    panel.xaxis.set_major_locator(MaxNLocator(6, steps=_TICK_STEPS, integer=True))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for order, run in enumerate(runs):
        for part, name in enumerate(names):
            if name in run.curves:
                color = _COLORS[order % len(_COLORS)] if len(runs) > 1 else _series_color(name, part)
                _draw_curve(panel, name, run.curves[name], color, several=len(runs) > 1, smooth=smooth)
        if len(runs) == 1:
            _draw_marks(panel, run)
    if len(runs) == 1 and (len(names) > 1 or role(names[0]) != "training"):
        panel.legend()


def _series_color(name: str, part: int) -> str:
    """Returns the colour of one curve of a single run: by role, or by number where a dot names parts of one thing."""
    return _COLORS[part % len(_COLORS)] if "." in name else _ROLE_COLORS[role(name)]


def _draw_curve(panel: Axes, name: str, curve: Curve, color: str, *, several: bool, smooth: float | None) -> None:
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    line = _line(name, curve, smooth)
    if not np.array_equal(line, values, equal_nan=True):
        panel.plot(curve.steps, values, color=color, linewidth=0.7, alpha=0.12 if several else 0.28)
    sparse = np.count_nonzero(np.isfinite(values)) <= 30
    panel.plot(
        curve.steps,
        line,
        color=color,
        linewidth=1.5,
        linestyle=_ROLE_LINES[role(name)] if several else "-",
        marker="o" if sparse else "",
        markersize=2.6,
        label=_label(name, curve),
    )


def _line(name: str, curve: Curve, smooth: float | None) -> NDArray[np.float64]:
    """Returns the values to draw: smoothed where they are noisy, with gaps where they are not finite."""
    noisy = role(name) == "training" and family(name) != "learning_rate"
    return smoothed(curve.values, smooth if noisy else 0.0)


def _label(name: str, curve: Curve) -> str:
    """Returns the words of the legend: the role, and the best value of what was validated."""
    _, _, part = name.partition(".")
    words = " ".join(filter(None, [part, role(name) if not part or role(name) != "training" else ""]))
    best = curve.best(best_mode(name))
    return f"{words}, best {best[1]:.4g} at {best[0]:,}" if role(name) == "validation" and best else words


def _draw_marks(panel: Axes, run: RunCurves) -> None:
    for step in run.resumed:
        panel.axvline(step, color=_FAINT_INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    if run.dropped:
        panel.vlines(run.dropped, 0, 0.035, color=_COLORS[1], linewidth=1.0, transform=panel.get_xaxis_transform())


def _draw_heading(figure: Figure, titles: Mapping[str, Sequence[str]], runs: Sequence[RunCurves]) -> None:
    """Says whose curves these are above the panels, and what the lines and marks mean below them."""
    from matplotlib.lines import Line2D

    if len(runs) == 1:
        figure.suptitle(runs[0].name, x=0.012, ha="left", fontsize=12, fontweight="bold")
        below = []
        if count := len(runs[0].resumed):
            below.append(Line2D([], [], color=_FAINT_INK, linestyle=":", label=f"resumed: {count:,}"))
        if count := len(runs[0].dropped):
            label = f"dropped, not finite: {count:,}"
            below.append(Line2D([], [], color=_COLORS[1], linestyle="", marker="|", label=label))
    else:
        above = [Line2D([], [], color=color, linewidth=2.5, label=run.name) for color, run in zip(cycle(_COLORS), runs)]
        figure.legend(handles=above, loc="outside upper left", ncols=3, prop={"weight": "bold", "size": 9})
        roles = {role(name) for names in titles.values() for name in names}
        below = [
            Line2D([], [], color=_FAINT_INK, linestyle=line, label=name)
            for name, line in _ROLE_LINES.items()
            if name in roles and len(roles) > 1
        ]
    if below:
        figure.legend(handles=below, loc="outside lower left", ncols=len(below))


def draw_in_terminal(runs: Sequence[RunCurves], width: int, smooth: float | None = None, color: bool = True) -> str:
    """Returns the curves drawn in characters, one panel below the other.

    Args:
        runs: what to draw.
        width: of the terminal, in characters.
        smooth: see `aetheria.cli.curves.smoothed`.
        color: whether curves are told apart by colour; otherwise all but the first are drawn with letters.
    """
    titles = families(name for run in runs for name in run.curves)
    return "\n\n".join(_terminal_panel(title, titles[title], runs, width, smooth, color) for title in titles)


def _terminal_panel(
    title: str, names: Sequence[str], runs: Sequence[RunCurves], width: int, smooth: float | None, color: bool
) -> str:
    import plotext  # type: ignore[import-untyped]

    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    plotext.terminal.limit(False, False)  # the width is given, and the height may be scrolled
    figure.plot_size(width, 16)
    log_scale = wants_log_scale(title, runs)
    heading, drawn_steps, drawn_values = [], [], []
    for number, (run, name) in enumerate((run, name) for run in runs for name in names if name in run.curves):
        values = _line(name, run.curves[name], smooth)
        shown = np.flatnonzero(np.isfinite(values))
        shown = shown[:: max(1, shown.size // (4 * width))]  # characters cannot show more
        steps, values = run.curves[name].steps[shown], values[shown]
        code = _TERMINAL_COLORS[number % len(_TERMINAL_COLORS)]
        symbol = "braille" if color or not number else "oxabcdefgh"[number % 10]
        marker = plotext.marker(symbol, code)
        signal = figure.signal(steps.tolist(), (np.log10(values) if log_scale else values).tolist(), marker=marker)
        figure.draw(signal.lines(symbol == "braille"))
        label = " ".join(filter(None, [run.name if len(runs) > 1 else "", _label(name, run.curves[name])]))
        heading.append(f"{_ansi('━━' if symbol == 'braille' else symbol, f'38;5;{code}', color)} {label}")
        drawn_steps.append(steps)
        drawn_values.append(values)
    _terminal_ticks(figure, np.concatenate(drawn_steps), np.concatenate(drawn_values), log_scale)
    words = [
        _ansi(title.replace("_", " "), "1", color),
        *(heading if len(heading) > 1 or role(names[0]) != "training" else []),
    ]
    lines = words if len(runs) > 1 else ["   ".join(words)]
    return "\n".join([*lines, str(figure.build().string(colorless=not color))])


def _terminal_ticks(figure: Any, steps: NDArray[np.int64], values: NDArray[np.float64], log_scale: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    def within(ticks: Iterable[float], numbers: NDArray[Any]) -> list[float]:
        return [float(tick) for tick in ticks if numbers.min() <= tick <= numbers.max()]

    if values.size:
        locator = LogLocator(subs=(1.0, 2.0, 5.0), numticks=12) if log_scale else MaxNLocator(5, steps=_TICK_STEPS)
        ticks = within(locator.tick_values(values.min(), values.max()), values)
        figure.ruler("y").ticks(
            [math.log10(tick) if log_scale else tick for tick in ticks], [f"{t:.6g}" for t in ticks]
        )
        locator = MaxNLocator(6, steps=_TICK_STEPS, integer=True)
        ticks = within(locator.tick_values(steps.min(), steps.max()), steps)
        figure.ruler("x").ticks(ticks, [f"{tick:,.0f}" for tick in ticks])


def _ansi(text: str, code: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text
