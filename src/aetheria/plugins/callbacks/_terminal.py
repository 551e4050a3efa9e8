"""How log lines, warnings and worker processes live with a display that redraws the last lines of a terminal.

While rich draws, it replaces `sys.stdout` and `sys.stderr` with proxies that print above the display.
"""

from __future__ import annotations

import os
import sys

from loguru import logger
from rich.file_proxy import FileProxy

__all__ = ["let_log_lines_pass"]

_LOGURU_DEFAULT_HANDLER = 0  # the one loguru adds when it is imported


def let_log_lines_pass() -> None:
    """Lets loguru's own handler write to whatever `sys.stderr` is at that moment, so that it goes through the proxy.

    That handler holds on to the `sys.stderr` of the time when loguru was imported, and would write into the display.
    Handlers that somebody configured are left alone.
    """
    try:
        logger.remove(_LOGURU_DEFAULT_HANDLER)
    except ValueError:
        return  # removed before: the user's handlers, or ours, have taken its place

    def write(line: str) -> None:
        sys.stderr.write(line)

    logger.add(write, colorize=sys.stderr.isatty())


def _leave_the_proxies_behind() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, FileProxy):
            setattr(sys, name, stream.rich_proxied_file)


# A forked worker that printed a warning through the proxy would wait for ever, if the thread that draws held the
# console's lock at the moment of the fork: that thread does not exist in the worker.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_the_proxies_behind)
