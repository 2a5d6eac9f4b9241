"""Where a sweep's MLflow database lies: never on a network file system, whose locks SQLite cannot trust."""

import hashlib
import os
from pathlib import Path

_MOUNTS = Path("/proc/self/mounts")
_NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "glusterfs", "ceph", "lustre", "gpfs", "beegfs"),
    *("fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.gcsfuse", "fuse.juicefs", "wekafs"),
)


def is_on_network(path: Path) -> bool:
    """Whether a path, which need not be there yet, lies on another machine's disk."""
    if not _MOUNTS.is_file():
        return False
    mounts = [line.split()[1:3] for line in _MOUNTS.read_text().splitlines()]
    place = path.resolve()
    kinds = {_unescaped(point): kind for point, kind in mounts}
    nearest = max((point for point in kinds if place.is_relative_to(point)), key=len, default="/")
    return kinds.get(nearest, "") in _NETWORK


def _unescaped(point: str) -> str:
    """A mount point as the kernel writes it, with spaces as octal numbers."""
    return point.encode().decode("unicode_escape")


def mlflow_place(folder: Path) -> Path:
    """Folder of the MLflow database of a sweep: its own, or one on this machine if that is on a network.

    What is there is made from the sweep's tables; on another machine it is made again.

    Args:
        folder: The sweep's folder.
    """
    folder = folder.resolve()
    if not is_on_network(folder):
        return folder
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "steersweep" / "mlflow" / hashlib.sha256(str(folder).encode()).hexdigest()[:16]
