"""The file system of a path: on this machine for real, on others from mount tables as their kernels print them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aetheria.loom import filesystem
from aetheria.loom.filesystem import FileSystem, filesystem_of

TABLE = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /proc rw,nosuid - proc proc rw
40 22 0:50 /export /home rw,relatime shared:7 master:2 - nfs4 server:/export rw,vers=4.2
41 40 0:51 / /home/ada/local\040disk rw - xfs /dev/sdb rw
42 22 0:52 / /mnt/bucket rw,nosuid - fuse.s3fs s3fs rw
43 22 0:53 / /data rw - xfs /dev/sdc rw
44 22 0:54 / /data rw - lustre mds@tcp:/lustre rw
45 22 0:55 / /media/stick rw - fuseblk /dev/sdd1 rw
"""


@pytest.fixture
def mount_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(TABLE, encoding="utf-8")
    monkeypatch.setattr(filesystem, "_MOUNT_TABLE", table)


@pytest.mark.usefixtures("mount_table")
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/somewhere/else", FileSystem("ext4", Path("/"), network=False)),
        ("/home", FileSystem("nfs4", Path("/home"), network=True)),
        ("/home/ada/runs/not-made-yet", FileSystem("nfs4", Path("/home"), network=True)),
        ("/homestead", FileSystem("ext4", Path("/"), network=False)),
        ("/home/ada/local disk/runs", FileSystem("xfs", Path("/home/ada/local disk"), network=False)),
        ("/mnt/bucket/runs", FileSystem("fuse.s3fs", Path("/mnt/bucket"), network=True)),
        ("/data/runs", FileSystem("lustre", Path("/data"), network=True)),
        ("/media/stick/runs", FileSystem("fuseblk", Path("/media/stick"), network=False)),
    ],
)
def test_the_deepest_and_latest_mount_holds_a_path(path: str, expected: FileSystem) -> None:
    assert filesystem_of(path) == expected


@pytest.mark.usefixtures("mount_table")
def test_a_link_is_followed_to_where_the_bytes_are(tmp_path: Path) -> None:
    link = tmp_path / "runs"
    link.symlink_to("/home/ada/runs")
    assert filesystem_of(link).network


def test_without_a_mount_table_the_mount_point_is_still_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_MOUNT_TABLE", tmp_path / "missing")
    found = filesystem_of(tmp_path / "runs")
    assert found.type == "unknown"
    assert found.mount_point.is_mount()
    assert not found.network


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="Linux only")
def test_this_machine() -> None:
    assert filesystem_of("/proc/self") == FileSystem("proc", Path("/proc"), network=False)


def test_no_torch_is_imported() -> None:
    code = "import sys, aetheria.loom.filesystem; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
