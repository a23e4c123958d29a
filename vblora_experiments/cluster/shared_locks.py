"""Whether the locks of runs hold between machines, by the file system that the runs are kept on.

A run's lock is flock on a file of its folder. Linux's NFS client turns it into a lock of the server (nfs(5)), unless it
was mounted to keep locks to itself; Lustre has it where it was mounted with `flock` (mount.lustre(8)).
"""

from __future__ import annotations

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
OF_ONE_MACHINE = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "ramfs", "f2fs"}
SHARED = {"nfs", "nfs4", "lustre", "ceph", "gpfs", "gfs2", "ocfs2"}


def fault(folder: Path, mounts: str | None = None) -> str:
    """Why locks in a folder may not hold between machines, in a sentence; "" where they do, or the system is no Linux.

    Args:
        folder: that the runs are kept in.
        mounts: what /proc/self/mountinfo says, unless it is to be read.
    """
    if mounts is None:
        if not MOUNTS.exists():
            return ""
        mounts = MOUNTS.read_text(encoding="utf-8", errors="replace")
    kind, options = _file_system(folder.absolute(), mounts)
    what = f"{folder} is on {kind}"
    if kind in OF_ONE_MACHINE:
        return f"{what}, which other machines do not see: good for a cluster of this machine alone"
    if kind in ("nfs", "nfs4") and options & {"nolock", "local_lock=all", "local_lock=flock"}:
        return f"{what}, mounted with locks of each machine alone: mount it without nolock and local_lock"
    if kind == "lustre" and "flock" not in options:
        return f"{what}, mounted without locks between machines: mount it with the option flock"
    return "" if kind in SHARED else f"{what}, of which it is not known whether locks hold between machines"


def _file_system(folder: Path, mounts: str) -> tuple[str, set[str]]:
    """The kind of the file system that a folder is, or will be, on; and the options it was mounted with."""
    found, longest = ("an unknown file system", set[str]()), -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if len(left) < 6 or len(right) < 3:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), left[4]))
        if (point == folder or point in folder.parents) and len(point.parts) >= longest:  # the last one covers others
            found, longest = (right[0], {*left[5].split(","), *right[2].split(",")}), len(point.parts)
    return found
