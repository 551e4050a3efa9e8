"""Whether a run talks to a hub, and how."""

from __future__ import annotations

from aetheria.config import TrainingConfig
from aetheria.control.line import Line, NoLine
from aetheria.engine.opening import OpenedRun
from aetheria.loom.hub_file import default_hub_file
from aetheria.loom.link import Link

__all__ = ["open_line"]


def open_line(config: TrainingConfig, opened: OpenedRun, is_main_process: bool = True) -> Line:
    """Returns the line to the run's sidecar; to nobody where the configuration, or the lack of a hub, says so.

    Args:
        config: of the run.
        opened: its folder.
        is_main_process: of several ranks the first one is told what all are to do.
    """
    if not is_main_process or config.live == "off" or (config.live == "auto" and not default_hub_file().exists()):
        return NoLine()
    return Link(opened.folder.path, opened.folder.run_id, start_step=opened.step)
