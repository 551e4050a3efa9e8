"""The run as a person at a terminal sees it."""

from __future__ import annotations

import math
import sys
import time
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Column, Table
from rich.text import Text

from aetheria.core import Logger
from aetheria.errors import ConfigError
from aetheria.plugins.callbacks._run import total_steps
from aetheria.plugins.callbacks._terminal import let_log_lines_pass
from aetheria.registry import Registry

__all__ = ["ProgressBar"]

_WIDTH = 100  # columns; longer bars are harder to read
_RATE_WINDOW = 10.0  # seconds over which the rate is measured
_EPOCH_LINE_INTERVAL = 0.2  # seconds; shorter epochs would flood the terminal


@Registry.register_callback("ProgressBar")
class ProgressBar(Logger):
    """Shows epoch, step, rate, time left and the newest metrics, on standard error.

    On a terminal, two bars and the metrics are redrawn a few times a second by a thread that looks at the run's
    counters: a step does nothing for it. Elsewhere (a file, a pipe, a notebook) it prints plain lines: one per epoch,
    and one every `line_interval` seconds in long epochs. Epochs of less than a fifth of a second share a line.

    Log lines and warnings appear above the bars; a loguru handler of your own should write to `sys.stderr` as it is
    at that moment (`logger.add(lambda line: sys.stderr.write(line))`). Metrics whose names have a dot are details of
    another one, and those of a whole epoch are in its line: neither is shown below the bars.

    Args:
        refresh_per_second: how often the bars are redrawn.
        line_interval: seconds between two lines within an epoch, where there is no terminal.
        console: where to draw, for tests and notebooks; None stands for standard error.

    Raises:
        ConfigError: `refresh_per_second` is not more than 0.
    """

    def __init__(
        self, refresh_per_second: float = 4.0, line_interval: float = 30.0, console: Console | None = None
    ) -> None:
        if refresh_per_second <= 0:
            raise ConfigError(f"ProgressBar got refresh_per_second={refresh_per_second}; it must be more than 0.")
        self.refresh_per_second = refresh_per_second
        self.line_interval = line_interval
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._shown = False  # only the main process shows anything
        self._validating = False
        self._latest: dict[str, float] = {}
        self._epoch_line: Text | None = None

    # --- what the run tells ----------------------------------------------------------------------------------------
    def on_train_start(self) -> None:
        """Starts to draw."""
        self._shown = self.context.accelerator.is_main_process
        if not self._shown:
            return
        let_log_lines_pass()
        console, step = self._console, self.context.global_step
        # In the middle of an epoch that is continued; dropped windows make it an estimate.
        steps_per_epoch = self.context.steps_per_epoch
        self._epoch_began = step if steps_per_epoch is None else min(step, self.context.epoch * steps_per_epoch)
        self._began, self._began_at_step = time.monotonic(), step
        self._last_line = self._last_epoch_line = self._began
        self._marks = ((self._began, self.context.samples_seen),) * 2
        if console.is_interactive and console.file.isatty():
            self._live = Live(
                console=console,
                get_renderable=self._draw,
                refresh_per_second=self.refresh_per_second,
                redirect_stdout=sys.stdout.isatty(),  # what goes into a file or a pipe must arrive there
            )
            self._live.start(refresh=True)

    def on_epoch_start(self) -> None:
        """Notes where the epoch began."""
        self._epoch_began = self.context.global_step

    def on_validation_start(self) -> None:
        """Says so instead of a rate that falls."""
        self._validation_began = time.monotonic()
        self._validating = True

    def on_validation_end(self, metrics: dict[str, float]) -> None:
        """Takes the time of the validation out of the rate."""
        self._validating = False
        if self._shown:
            seconds = time.monotonic() - self._validation_began
            older, newer = self._marks
            self._marks = ((older[0] + seconds, older[1]), (newer[0] + seconds, newer[1]))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Keeps the metrics for the next drawing; prints a line now and then where there is no terminal."""
        self._latest = {**self._latest, **metrics}  # replaced, not changed: another thread may be reading it
        if self._live is None and time.monotonic() - self._last_line >= self.line_interval:
            self._print_epoch_line()
            self._print(self._line(self._latest))

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        """Prints the epoch's line, unless another epoch's was printed a moment ago."""
        if not self._shown:
            return
        self._latest = {**self._latest, **metrics}
        self._epoch_line = self._line(metrics)
        if time.monotonic() - self._last_epoch_line >= _EPOCH_LINE_INTERVAL:
            self._print_epoch_line()

    def teardown(self) -> None:
        """Prints what is pending and gives the terminal back as it was."""
        if not self._shown:
            return
        self._print_epoch_line()
        if self._live is not None:
            self._live.stop()
            self._live = None

    # --- what is drawn ---------------------------------------------------------------------------------------------
    def _print_epoch_line(self) -> None:
        if self._epoch_line is not None:
            self._print(self._epoch_line)
            self._epoch_line, self._last_epoch_line = None, self._last_line

    def _print(self, line: Text) -> None:
        self._last_line = time.monotonic()
        self._console.print(line, soft_wrap=True)

    def _line(self, metrics: dict[str, float]) -> Text:
        """Returns one line of text: where the run is, what was measured and, where no bar says it, how fast it goes."""
        parts = [Text(f"epoch {self._epoch()}")]
        if self._live is None:
            parts.append(Text(f"step {_of(self.context.global_step, total_steps(self.context))}"))
        training, validation = _by_origin(metrics)
        parts += training + validation
        if self._live is None:
            parts += [Text(note) for note in (self._rate(), self._time()) if note]
        return Text("  ").join(parts)

    def _draw(self) -> RenderableType:
        """Returns the bars and the metrics; called by the thread that draws."""
        context = self.context
        in_epoch, steps_per_epoch = context.global_step - self._epoch_began, context.steps_per_epoch
        bars = Table.grid(
            Column(),
            Column(justify="right"),
            Column(ratio=1),
            Column(justify="right", min_width=4),
            Column(style="dim", min_width=16),
            padding=(0, 1),
            expand=True,
        )
        bars.add_row("epoch", self._epoch(), *_bar(context.global_step, total_steps(context)), self._time())
        rate = "validating" if self._validating else self._rate()
        bars.add_row("step", _of(in_epoch, steps_per_epoch), *_bar(in_epoch, steps_per_epoch), rate)
        lines = [Text("  ", no_wrap=True, overflow="ellipsis").join(part) for part in _by_origin(self._latest) if part]
        return Constrain(Group(bars, *lines), _WIDTH)

    def _epoch(self) -> str:
        """Returns the epoch that is trained and how many there are, for instance "3/10"."""
        epochs, steps_per_epoch = self.context.max_epochs, self.context.steps_per_epoch
        if self.context.max_steps is not None and steps_per_epoch:
            by_steps = math.ceil(self.context.max_steps / steps_per_epoch)
            epochs = by_steps if epochs is None else min(epochs, by_steps)
        current = self.context.epoch + 1
        return _of(current if epochs is None else min(current, epochs), epochs)

    def _rate(self) -> str:
        """Returns the speed of the last five to ten seconds; nothing where nothing was trained in them."""
        now = (time.monotonic(), self.context.samples_seen)
        older, newer = self._marks
        if now[0] - newer[0] > _RATE_WINDOW / 2:
            self._marks = (newer, now)
        samples = now[1] - older[1]
        return f"{samples / (now[0] - older[0]):,.0f} samples/s" if samples > 0 else ""

    def _time(self) -> str:
        """Returns how long the run will take at the pace of this session, validations and all; at its end, how long."""
        total, step = total_steps(self.context), self.context.global_step
        elapsed = time.monotonic() - self._began
        if total is None or step >= total:
            return f"{timedelta(seconds=round(elapsed))} in all"
        if step == self._began_at_step:
            return ""
        return f"{timedelta(seconds=round(elapsed / (step - self._began_at_step) * (total - step)))} left"


def _of(done: int, total: int | None) -> str:
    if total is None:
        return f"{done:,}"
    whole = f"{total:,}"
    return f"{done:>{len(whole)},}/{whole}"  # lines of several epochs stay aligned


def _bar(done: int, total: int | None) -> tuple[RenderableType, str]:
    """Returns a bar and the share it stands for; a bar that only moves, where nobody knows the total."""
    bar = Bar(total=total, completed=done, pulse=not total)
    return bar, f"{min(1.0, done / total):.0%}" if total else ""


def _by_origin(metrics: dict[str, float]) -> tuple[list[Text], list[Text]]:
    """Returns the training metrics, the loss first, and the validation metrics, each as "name value"."""
    names = [name for name in metrics if "." not in name and not name.startswith("epoch_")]
    names.sort(key=lambda name: name.removeprefix("val_") != "loss")
    pairs = {name: Text.assemble((f"{name} ", "dim"), f"{metrics[name]:<8.4g}") for name in names}
    return (
        [pair for name, pair in pairs.items() if not name.startswith("val_")],
        [pair for name, pair in pairs.items() if name.startswith("val_")],
    )
