"""Whether a run talks to a hub, and how."""

from __future__ import annotations

from collections.abc import Sequence

from aetheria.config import TrainingConfig
from aetheria.control.line import Line, NoLine
from aetheria.core import Accelerator
from aetheria.engine.opening import OpenedRun
from aetheria.loom.hub_file import default_hub_file, host_name
from aetheria.loom.link import Link
from aetheria.replicas import membership

__all__ = ["devices_of", "open_line"]


def devices_of(accelerator: Accelerator) -> list[str]:
    """Returns what the ranks train on, by rank: "cuda:0"; on another machine than the first one's, "host/cuda:0"."""
    said = [part.decode().split("\n") for part in accelerator.gather(f"{host_name()}\n{accelerator.device}".encode())]
    return [device if host == said[0][0] else f"{host}/{device}" for host, device in said]


def open_line(
    config: TrainingConfig, opened: OpenedRun, is_main_process: bool = True, devices: Sequence[str] = ()
) -> Line:
    """Returns the line to the run's sidecar; to nobody where the configuration, or the lack of a hub, says so.

    Args:
        config: of the run.
        opened: its folder.
        is_main_process: of several ranks the first one is told what all are to do.
        devices: of all ranks.
    """
    if not is_main_process or config.live == "off" or (config.live == "auto" and not default_hub_file().exists()):
        return NoLine()
    folder = opened.folder
    group, replica = membership(folder.run_id, folder.read())
    return Link(folder.path, folder.run_id, start_step=opened.step, group=group, replica=replica, devices=devices)
