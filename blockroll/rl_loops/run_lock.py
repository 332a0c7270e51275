"""One process at a time works in a run's folder."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from blockroll.errors import RunInUse

LOCK_FILE = ".lock"
HOLDER_FILE = ".lock.holder"


def is_in_use(run_dir: Path) -> bool:
    """Whether a process works in the folder, or it cannot be asked because nobody here may write in it."""
    if not (run_dir / HOLDER_FILE).is_file():
        return False
    try:
        with FileLock(run_dir / LOCK_FILE, timeout=0):
            return False
    except (Timeout, PermissionError):
        return True


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold an existing run folder; RunInUse, naming the process, if another one does.

    The operating system lets go of the lock when its holder dies, however it dies.
    """
    lock = FileLock(run_dir / LOCK_FILE, timeout=0)
    holder = run_dir / HOLDER_FILE
    try:
        lock.acquire()
    except Timeout:
        who = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "another process"
        raise RunInUse(
            f"{run_dir} is in use by {who}: wait for it or stop it, or choose another name"
        ) from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
