"""Which file system a path lies on, and whether other machines write to it too."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["FileSystem", "filesystem_of"]

_MOUNT_TABLE = Path("/proc/self/mountinfo")

# Types as the Linux kernel names them. Folders shared between a virtual machine and its host count as network: the
# two kernels do not see each other's memory maps, no more than two machines do.
_NETWORK_TYPES = frozenset(
    {"9p", "acfs", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4"}
    | {"orangefs", "panfs", "prl_fs", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs", "wekafs"}
)


class FileSystem(NamedTuple):
    """What holds a path.

    Attributes:
        type: the kernel's name for it, for instance "ext4" or "nfs4"; "unknown" where there is no way to ask.
        mount_point: the folder where it is attached.
        network: whether another machine may have it open too, so that memory mapped by two processes need not agree.
            True for every file system in user space (`fuse.*`: sshfs, s3fs, rclone), which seldom promise otherwise.
    """

    type: str
    mount_point: Path
    network: bool


def filesystem_of(path: Path | str) -> FileSystem:
    """Returns the file system that holds a path, or that would hold it once it is made.

    Asks the mount table of Linux. Elsewhere the type is "unknown", and only a Windows share (`\\\\server\\share`) is
    recognised as a network.

    Args:
        path: a file or folder; it need not exist.
    """
    path = Path(os.path.realpath(path))
    try:
        table = _MOUNT_TABLE.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return _without_mount_table(path)
    return _find(path, table)


def _find(path: Path, table: str) -> FileSystem:
    """Returns the deepest mount above `path`; of several on the same folder the last one, which hides the others."""
    deepest = FileSystem("unknown", Path(path.anchor), network=False)
    for line in table.splitlines():
        # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue      (man 5 proc_pid_mountinfo)
        before, _, after = line.partition(" - ")
        mount_point = Path(_unescape(before.split(" ")[4]))
        if path.is_relative_to(mount_point) and len(mount_point.parts) >= len(deepest.mount_point.parts):
            name = after.split(" ")[0]
            deepest = FileSystem(name, mount_point, network=name in _NETWORK_TYPES or name.startswith("fuse."))
    return deepest


def _unescape(text: str) -> str:
    """Returns a path of the mount table with its blanks back, which the kernel writes in octal: `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _without_mount_table(path: Path) -> FileSystem:
    mount_point = next((folder for folder in (path, *path.parents) if os.path.ismount(folder)), Path(path.anchor))
    return FileSystem("unknown", mount_point, network=path.anchor.startswith("\\\\"))
