"""The shared memory that Triton's Python backend passes tensors through."""

import contextlib
import os
import shutil
from pathlib import Path

FOLDER = Path("/dev/shm")
MIN_BYTES = 32 << 20
"""a Python-backend process takes 1 MiB and grows with its messages"""

MARGIN_BYTES = 4 << 20
"""what other processes may take at the same time"""


def shortage() -> str | None:
    """What is wrong with it and what to do; None where there is enough."""
    free = shutil.disk_usage(FOLDER).free if FOLDER.exists() else 0
    if free >= MIN_BYTES:
        return None
    return (
        f"{FOLDER} has {free >> 20} MiB free; the Python backend needs {MIN_BYTES >> 20} MiB. "
        "Remove what lies there, or make it larger: "
        f"mount -o remount,size=256m {FOLDER} (docker run --shm-size=256m)"
    )


def is_low(size: int) -> bool:
    """Whether a process may find no room for so many bytes."""
    return shutil.disk_usage(FOLDER).free < size + MARGIN_BYTES


def remove_of_stub(pid: int) -> None:
    """Remove the region of a stub of Triton's that is about to be ended.

    It does so itself, unless its server died while it waited for an answer. The region's name is
    the stub's second argument.
    """
    with contextlib.suppress(OSError):  # it has ended
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        program, name = Path(os.fsdecode(command[0])).name, os.fsdecode(b"".join(command[2:3]))
        if program == "triton_python_backend_stub" and name and "/" not in name:
            (FOLDER / name).unlink(missing_ok=True)
