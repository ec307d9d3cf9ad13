"""FlashInfer, of a version whose choice of decode kernel can be trusted, on a GPU that it knows."""

import functools
import importlib
import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from fi_runtime.config import ConfigError
from fi_runtime.dtypes import dtype_name

MIN_VERSION = Version("0.6.4")
MIN_CAPABILITY = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}
"""Compute capability from which FlashInfer's kernels run, for each dtype that they are made for."""

MANIFEST = "prebuilt.json"
"""In a folder of prebuilt kernels: what they were compiled for."""


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
    if torch.version.cuda is None:
        # Kernels that it has in CuTe ask torch for a GPU when they are imported, and expect no
        # torch without CUDA. None of them is used here, and others can be compiled with it.
        sys.modules.setdefault("cutlass", None)  # type: ignore[arg-type]
    # Its CUDA norms come prebuilt as the other modules do; those it prefers compile at first use.
    os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
    library = importlib.import_module("flashinfer")
    for name in ("activation", "norm"):
        importlib.import_module(f"flashinfer.{name}")
    return library


def check_gpu(dtype: torch.dtype) -> None:
    """Refuse a GPU, or a dtype, that FlashInfer has no kernels for.

    Raises:
        ConfigError: says what was found and what is possible.
    """
    if dtype not in MIN_CAPABILITY:
        raise ConfigError(
            f"dtype={dtype_name(dtype)}: FlashInfer's kernels are for "
            f"{' and '.join(map(dtype_name, MIN_CAPABILITY))}; use one of them, or KIND_CPU"
        )
    found, least = torch.cuda.get_device_capability(), MIN_CAPABILITY[dtype]
    if found < least:
        raise ConfigError(
            f"{torch.cuda.get_device_name()} has compute capability {_dotted(found)}; "
            f"FlashInfer's kernels in {dtype_name(dtype)} need {_dotted(least)} or later"
        )


def prebuilt_manifest(folder: Path) -> dict[str, str] | None:
    """What a folder's kernels were compiled for: "arch" and "flashinfer"; None if it has none."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def use_prebuilt(folder: Path) -> None:
    """Load modules from a folder that ``prebuild`` filled; those it lacks compile at first use.

    Raises:
        ConfigError: there are none in it, or they are for another FlashInfer or another GPU.
    """
    manifest = prebuilt_manifest(folder)
    again = "python -m fi_runtime prebuild --out FOLDER"
    if manifest is None:
        raise ConfigError(f"{folder}: holds no prebuilt kernels; fill it with: {again}")
    version = flashinfer().__version__
    if manifest["flashinfer"] != version:
        raise ConfigError(
            f"{folder}: kernels of FlashInfer {manifest['flashinfer']}, but {version} is "
            f"installed; remove the folder and fill it again: {again}"
        )
    capability = _dotted(torch.cuda.get_device_capability())
    if capability not in re.findall(r"\d+\.\d+", manifest["arch"]):
        raise ConfigError(
            f"{folder}: kernels for compute capability {manifest['arch']}, but "
            f"{torch.cuda.get_device_name()} has {capability}; remove the folder and fill it "
            f"again: {again} --arch {capability}"
        )
    # FlashInfer looks for what was compiled ahead of time in this folder, and has no other say in
    # where that is.
    places: Any = importlib.import_module("flashinfer.jit.env")
    places.FLASHINFER_AOT_DIR = folder.resolve()


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
