"""Reads a checkpoint's tensors from its safetensors files, by name, straight to their device."""

import itertools
import logging
import math
import time
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from fi_runtime.config import ConfigError
from fi_runtime.models.config import DTYPES, read_json

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
PROGRESS_S = 5.0
"""between two lines of the log"""
STAGING_BYTES = 32 << 20
"""of each of two buffers: enough that launching a copy is nothing beside it"""


class Weights(Protocol):
    """Where a model takes its tensors from while it is built."""

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor of that name, which must have that shape."""

    def close(self) -> None:
        """All that was needed has been taken."""


class CheckpointWeights:
    """The tensors of a Hugging Face folder: one or several ``*.safetensors``, with their index.

    Files are mapped, and each tensor is read by all of torch's threads. Beside the page cache, host
    memory is taken by tensors that stay on the CPU in another dtype than the file's, and by two
    staging buffers for a GPU; never by a file.

    Raises:
        ConfigError: a file missing, truncated or otherwise unreadable, naming it; at once, not
            when the tensor is taken.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._folder = folder
        self._dtype = dtype
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in _files(folder):
            handle = open_safetensors(folder / file)
            self._files[file] = handle
            self._file_of.update(dict.fromkeys(handle.keys(), file))
        self._left = set(self._file_of)
        self._staging = _Staging(dtype, device) if device.type == "cuda" else None
        self._progress = _Progress(folder, sum((folder / f).stat().st_size for f in self._files))

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read a tensor to the device, converted to the dtype of the weights.

        On a GPU it may still be on its way, which what is launched after waits for. On the CPU a
        tensor of that dtype stays in the file, to be read when it is first used.

        Raises:
            ConfigError: no such tensor, or one of another shape.
        """
        if name not in self._file_of:
            raise ConfigError(
                f"{self._folder}: tensor {name} is in none of its {len(self._files)} safetensors "
                f"files; expected one of shape {list(shape)}"
            )
        file = self._file_of[name]
        try:
            tensor: torch.Tensor = self._files[file].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise ConfigError(f"{self._folder / file}: tensor {name}: {error}") from error
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"{self._folder / file}: tensor {name} has shape {list(tensor.shape)}; "
                f"expected {list(shape)} from config.json"
            )
        if tensor.dtype not in DTYPES.values():
            raise ConfigError(
                f"{self._folder / file}: tensor {name} has dtype {tensor.dtype}; "
                f"supported are {', '.join(DTYPES)}"
            )
        self._left.discard(name)
        taken = self._staging.upload(tensor) if self._staging else tensor.to(self._dtype)
        self._progress.add(tensor.nbytes)
        return taken

    def close(self) -> None:
        """Close the files and name in the log the tensors that nothing has taken."""
        self._files.clear()
        self._staging = None
        self._progress.end()
        if self._left:
            some = ", ".join(sorted(self._left)[:5])
            log.warning("%s: %d tensors not used: %s", self._folder, len(self._left), some)


class _Staging:
    """Uploads through two pinned buffers: one is filled while the other is copied to the GPU.

    From memory that is not pinned, the driver copies piece by piece while the host waits.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._size = STAGING_BYTES // dtype.itemsize
        self._turns = itertools.cycle(
            [
                (
                    torch.empty(self._size, dtype=dtype, pin_memory=True),
                    torch.cuda.Event(),  # type: ignore[no-untyped-call]
                )
                for _ in range(2)
            ]
        )

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the GPU in the buffers' dtype; its last part may be on its way."""
        uploaded = torch.empty(tensor.shape, dtype=self._dtype, device=self._device)
        parts = torch.split(tensor.flatten(), self._size)
        places = torch.split(uploaded.view(-1), self._size)
        for part, place in zip(parts, places, strict=True):
            buffer, copied = next(self._turns)
            copied.synchronize()
            staged = buffer[: len(part)].copy_(part)
            place.copy_(staged, non_blocking=True)
            copied.record()
        return uploaded


class _Progress:
    """Says in the log how far a checkpoint is loaded.

    Args:
        total: bytes of its files.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self._folder = folder
        self._total = total
        self._loaded = 0
        self._begin = self._said = time.monotonic()

    def add(self, nbytes: int) -> None:
        """So many bytes more of the files are loaded."""
        self._loaded += nbytes
        if time.monotonic() - self._said >= PROGRESS_S:
            self._said = time.monotonic()
            share = self._loaded / self._total
            log.info("%s: %.0f%% of %.1f GB loaded", self._folder, 100 * share, self._total / 1e9)

    def end(self) -> None:
        """No more is loaded."""
        seconds = time.monotonic() - self._begin
        log.info("%s: %.1f GB loaded in %.1f s", self._folder, self._loaded / 1e9, seconds)


class DummyWeights:
    """Random tensors, the same each time: what a measurement of speed needs.

    Norms are 1, all else is normal with a standard deviation of 0.02, as models are initialised.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Make a tensor on the device, of a name's own random numbers."""
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        if name.endswith("norm.weight"):
            return tensor.fill_(1.0)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return tensor.normal_(std=0.02, generator=generator)

    def close(self) -> None:
        """Nothing is held open."""


class CountedWeights:
    """Takes no memory: counts what the tensors of a model would take."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.nbytes = 0

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor without elements."""
        self.nbytes += math.prod(shape) * self._dtype.itemsize
        return torch.empty(0, dtype=self._dtype)

    def close(self) -> None:
        """Nothing is held open."""


def _files(folder: Path) -> list[str]:
    index = folder / INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{index}: no weight_map of tensors' names to files in it")
        names = {str(name) for name in weight_map.values()}
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ConfigError(f"{index}: names {name!r}, which is no file of that folder")
        return sorted(names)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{folder}: no *.safetensors file; weights are read from safetensors only"
        )
    return files


def open_safetensors(path: Path) -> Any:
    """A safetensors file, mapped.

    Raises:
        ConfigError: it is not a whole one.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path}: not a whole safetensors file ({path.stat().st_size} bytes): {error}"
        ) from error
