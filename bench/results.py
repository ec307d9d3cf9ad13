"""Files of measured numbers, each with what it takes to judge and repeat them."""

import importlib.metadata
import json
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fi_runtime.config import ConfigError
from fi_runtime.doctor import driver_version

PACKAGES = {
    "torch": "torch",
    "flashinfer": "flashinfer-python",
    "transformers": "transformers",
    "numpy": "numpy",
    "tritonclient": "tritonclient",
}
"""Name in the file, and the distribution whose version it is."""


def write_results(path: Path, rows: list[dict[str, Any]], command: str) -> None:
    """Write one JSON object: machine, gpu, date, versions, command, rows, in this order.

    Args:
        path: its folder is made if missing; what was there is replaced.
        rows: what was measured.
        command: how to measure it again, without paths of this machine.
    """
    results = {
        "machine": _machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "command": command,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def read_results(path: Path) -> dict[str, Any]:
    """What ``write_results`` wrote.

    Raises:
        ConfigError: no such file, or something else in it.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as results: {error}") from error
    if not isinstance(results, dict) or "rows" not in results:
        raise ConfigError(f"{path}: has no rows; expected a file that a benchmark wrote with --out")
    return results


def _machine() -> str:
    """The CPU's model, cores that may be used, memory."""
    model = re.search(r"^model name\s*: (.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    parts = [
        model[1] if model else platform.machine(),
        f"{len(os.sched_getaffinity(0))} cores",
        f"{int(memory[1]) / (1 << 20):.0f} GiB" if memory else "",
    ]
    return ", ".join(part for part in parts if part)


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def _versions() -> dict[str, str]:
    """Of what is installed and known; what is not is left out."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            versions[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["cuda"] = torch.version.cuda
    versions["driver"] = driver_version()
    # NVIDIA's Triton images say it; a server from elsewhere does not.
    versions["tritonserver"] = os.environ.get("TRITON_SERVER_VERSION")
    return {name: version for name, version in versions.items() if version}
