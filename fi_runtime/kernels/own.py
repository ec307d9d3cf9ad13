"""The project's own CUDA kernels, built and found as FlashInfer's modules are."""

import functools
import hashlib
import importlib
from pathlib import Path
from typing import Any

from fi_runtime.kernels.library import flashinfer

SOURCES = Path(__file__).parent / "csrc"


def own_spec() -> Any:
    """FlashInfer's specification of the module that is compiled from ``csrc``.

    Its name tells these sources from others, so that none that was built of others is loaded.
    """
    flashinfer()
    files = sorted(SOURCES.iterdir())
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return importlib.import_module("flashinfer.jit").gen_jit_spec(
        f"fi_runtime_{digest[:12]}", [file for file in files if file.suffix == ".cu"]
    )


@functools.cache
def own() -> Any:
    """The module: prebuilt, or compiled at first use."""
    return own_spec().build_and_load()
