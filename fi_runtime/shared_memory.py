"""The shared memory that Triton's Python backend passes tensors through."""

import shutil
from pathlib import Path

FOLDER = Path("/dev/shm")
MIN_BYTES = 32 << 20
"""a Python-backend process takes 1 MiB and grows with its messages"""


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
