"""FlashInfer, of a version whose choice of decode kernel can be trusted."""

import functools
import importlib
import importlib.metadata
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.version import InvalidVersion, Version

from fi_runtime.config import ConfigError

MIN_VERSION = Version("0.6.4")


def check_version(installed: str) -> None:
    """Refuse a FlashInfer from before the regression on Hopper was mended.

    Raises:
        ConfigError: says what would go wrong and what to install.
    """
    try:
        version = Version(installed)
    except InvalidVersion:
        raise ConfigError(
            f"flashinfer-python {installed} has a version that cannot be read; "
            f"install flashinfer-python>={MIN_VERSION}"
        ) from None
    if version < MIN_VERSION:
        raise ConfigError(
            f"flashinfer-python {installed} is installed; before {MIN_VERSION} its CUDA-graph "
            "decode picks FA3 on Hopper GPUs, which takes about five times as long as FA2 at long "
            f"contexts: install flashinfer-python>={MIN_VERSION}"
        )


@functools.cache
def flashinfer() -> ModuleType:
    """The library, loaded at first use, so that the CPU needs none.

    Raises:
        ConfigError: it is missing or too old.
    """
    try:
        check_version(importlib.metadata.version("flashinfer-python"))
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "flashinfer-python is not installed, and the GPU needs it; install the package's "
            "extra: pip install 'fi-runtime[gpu]'"
        ) from None
    # Its CUDA norms come prebuilt as the other modules do; those it prefers compile at first use.
    os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
    library = importlib.import_module("flashinfer")
    for name in ("activation", "norm", "page", "rope"):
        importlib.import_module(f"flashinfer.{name}")
    return library


def use_prebuilt(folder: Path) -> None:
    """Load modules from a folder that ``prebuild`` filled; those it lacks compile at first use.

    Raises:
        ConfigError: there is none in it.
    """
    if not any(folder.glob("*/*.so")):
        raise ConfigError(
            f"{folder}: holds no prebuilt kernels; "
            "fill it with: python -m fi_runtime prebuild --out FOLDER"
        )
    flashinfer()
    # FlashInfer looks for what was compiled ahead of time in this folder, and has no other say in
    # where that is.
    places: Any = importlib.import_module("flashinfer.jit.env")
    places.FLASHINFER_AOT_DIR = folder.resolve()
