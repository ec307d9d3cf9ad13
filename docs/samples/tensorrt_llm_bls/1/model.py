"""Streams text. The runtime does the work; this file is how Triton finds it."""

from fi_runtime.frontend.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
