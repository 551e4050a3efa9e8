"""The progress bar: lines where there is no terminal, bars where there is one, and a terminal left as it was."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console
from rich.file_proxy import FileProxy

from aetheria.errors import ConfigError
from aetheria.plugins import ProgressBar
from aetheria.plugins.callbacks import _terminal

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screen():
    return Terminal()


@pytest.fixture
def live(run, screen):
    bar = ProgressBar(console=Console(file=screen, force_terminal=True, width=100, color_system=None))
    bar.context = run
    yield bar
    bar.teardown()


@pytest.fixture
def lines(run):
    bar = ProgressBar(line_interval=0.0, console=Console(file=io.StringIO(), width=40))
    bar.context = run
    bar.on_train_start()
    return bar


def written(bar):
    return bar._console.file.getvalue()


def test_one_line_for_each_set_of_metrics_where_there_is_no_terminal(run, lines):
    run.global_step, run.samples_seen = 4, 128
    lines.log_metrics({"loss": 0.12345, "gradient_norm.layers": 7.0}, 4)
    [line] = written(lines).splitlines()  # however narrow the console is
    assert line.startswith("epoch 1/3  step  4/30  loss 0.1235")
    assert line.endswith("left")
    assert "samples/s" in line
    assert "\x1b" not in line
    assert "layers" not in line


def test_the_line_interval_is_kept(run):
    bar = ProgressBar(line_interval=3600.0, console=Console(file=io.StringIO()))
    bar.context = run
    bar.on_train_start()
    bar.log_metrics({"loss": 1.0}, 1)
    assert not written(bar)


def test_one_line_for_each_epoch(run, monkeypatch):
    monkeypatch.setattr("aetheria.plugins.callbacks.progress_bar._EPOCH_LINE_INTERVAL", 0.0)
    bar = ProgressBar(console=Console(file=io.StringIO()))
    bar.context = run
    bar.on_train_start()
    for run.epoch in range(3):
        bar.on_epoch_start()
        run.global_step += 10
        bar.on_epoch_end({"loss": 1.0, "val_loss": 2.0})
    bar.teardown()
    epochs = written(bar).splitlines()
    assert [line[:10] for line in epochs] == ["epoch 1/3 ", "epoch 2/3 ", "epoch 3/3 "]
    assert "val_loss 2" in epochs[0]
    assert epochs[-1].endswith("in all")


def test_short_epochs_share_a_line_and_the_last_one_is_printed(run, monkeypatch):
    monkeypatch.setattr("aetheria.plugins.callbacks.progress_bar._EPOCH_LINE_INTERVAL", 3600.0)
    bar = ProgressBar(console=Console(file=io.StringIO()))
    bar.context = run
    bar.on_train_start()
    for run.epoch in range(3):
        bar.on_epoch_end({"loss": 1.0})
    assert not written(bar)
    bar.teardown()
    assert written(bar).startswith("epoch 3/3")


def test_a_line_that_was_held_back_comes_before_the_next(run, lines, monkeypatch):
    monkeypatch.setattr("aetheria.plugins.callbacks.progress_bar._EPOCH_LINE_INTERVAL", 3600.0)
    lines.on_epoch_end({"loss": 1.0})
    run.epoch = 1
    lines.log_metrics({"loss": 0.5}, 11)
    lines.teardown()
    assert [line[:9] for line in written(lines).splitlines()] == ["epoch 1/3", "epoch 2/3"]


def test_only_the_main_process_shows_anything(run):
    run.accelerator.rank = 1
    bar = ProgressBar(console=Console(file=io.StringIO()))
    bar.context = run
    bar.on_train_start()
    bar.on_validation_start()
    bar.on_validation_end({})
    bar.on_epoch_end({"loss": 1.0})
    bar.teardown()
    assert not written(bar)


def test_bars_on_a_terminal_show_the_run(run, live, screen):
    live.on_train_start()
    live.on_epoch_start()
    run.global_step, run.samples_seen = 7, 224
    live.log_metrics(
        {"accuracy": 0.5, "loss": 0.25, "learning_rate.matrices": 0.1, "val_loss": 0.5, "epoch_loss": 9}, 7
    )
    live.teardown()
    shown = screen.getvalue()
    assert "7/10" in shown
    assert "1/3" in shown
    assert "23%" in shown
    assert "70%" in shown
    assert "loss 0.25      accuracy 0.5" in shown  # the loss comes first
    assert "val_loss 0.5" in shown
    assert "matrices" not in shown
    assert "epoch_loss" not in shown


def test_the_terminal_is_left_as_it_was(live, screen):
    before = sys.stdout, sys.stderr
    live.on_train_start()
    assert isinstance(sys.stderr, FileProxy)
    assert HIDE_CURSOR in screen.getvalue()
    live.on_exception(RuntimeError("boom"))
    live.teardown()
    assert (sys.stdout, sys.stderr) == before
    assert screen.getvalue().rindex(SHOW_CURSOR) > screen.getvalue().rindex(HIDE_CURSOR)


def test_standard_error_appears_above_the_bars_and_a_redirected_standard_output_stays_apart(live, screen, capsys):
    live.on_train_start()
    print("a warning", file=sys.stderr)
    print("a result")
    live.teardown()
    assert "a warning" in screen.getvalue()
    assert "a result" not in screen.getvalue()
    assert capsys.readouterr().out == "a result\n"


def test_a_run_of_unknown_length(run, live, screen):
    run.max_epochs = run.steps_per_epoch = None
    live.on_train_start()
    run.global_step = 1234
    live.teardown()
    assert "1,234" in screen.getvalue()
    assert "left" not in screen.getvalue()


def test_epochs_follow_from_max_steps(run, live, screen):
    run.max_epochs, run.max_steps = None, 25
    live.on_train_start()
    live.teardown()
    assert "1/3" in screen.getvalue()


def test_a_run_that_continues_in_the_middle_of_an_epoch(run, live, screen):
    run.epoch, run.global_step = 1, 14
    live.on_train_start()
    live.teardown()
    assert "4/10" in screen.getvalue()


def test_a_validation_is_announced_and_taken_out_of_the_rate(run, live, screen, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("aetheria.plugins.callbacks.progress_bar.time.monotonic", lambda: now[0])
    live.on_train_start()
    now[0], run.samples_seen, run.global_step = 1001.0, 500, 5
    live.on_validation_start()
    live._live.refresh()
    assert "validating" in screen.getvalue()
    now[0] = 1004.0
    live.on_validation_end({})
    assert live._rate() == "500 samples/s"


def test_a_forked_worker_writes_past_the_bars(monkeypatch):
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", FileProxy(Console(file=io.StringIO()), plain))
    _terminal._leave_the_proxies_behind()
    assert sys.stderr is plain


def test_log_lines_follow_standard_error():
    """In a process of its own: loguru's default handler is there only once."""
    program = f"""
import io, runpy, sys
from loguru import logger
let_log_lines_pass = runpy.run_path({_terminal.__file__!r})["let_log_lines_pass"]
let_log_lines_pass()
let_log_lines_pass()
sys.stderr = io.StringIO()
logger.warning("above the bars")
assert sys.stderr.getvalue().count("above the bars") == 1, sys.stderr.getvalue()
logger.remove()
logger.add(sys.stdout)
let_log_lines_pass()
logger.warning("elsewhere")
assert "elsewhere" not in sys.stderr.getvalue()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="refresh_per_second=0"):
        ProgressBar(refresh_per_second=0)
