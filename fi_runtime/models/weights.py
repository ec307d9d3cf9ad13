"""Reads a checkpoint's tensors from its safetensors files, by name, straight to their device."""

import itertools
import logging
import math
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from fi_runtime.config import ConfigError
from fi_runtime.dtypes import DTYPES
from fi_runtime.kernels.fp8 import BLOCK, FP8, dequantised, fits, has_products
from fi_runtime.models import mxfp4
from fi_runtime.models.config import read_json
from fi_runtime.models.fp8 import Fp8

log = logging.getLogger(__name__)

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PROGRESS_S = 5.0
"""between two lines of the log"""
STAGING_BYTES = 32 << 20
"""of each of two buffers: enough that launching a copy is nothing beside it"""


class Weights(Protocol):
    """Where a model takes its tensors from while it is built."""

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor of that name, which must have that shape; what is in fp8 as it is meant."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name, where a model can do without."""

    def keeps_fp8(self, outputs: Mapping[str, int], inputs: int) -> bool:
        """Whether projections can be taken as they are stored, in fp8, to be joined.

        Args:
            outputs: names of the projections, and how many outputs each has.
            inputs: of each.
        """

    def take_fp8(self, name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight in fp8 and its scale, as ``dequantised`` takes them."""

    def close(self) -> None:
        """All that was needed has been taken."""


class CheckpointWeights:
    """The tensors of a Hugging Face folder: ``model.safetensors``, or several with their index.

    Files are mapped, and each tensor is read by all of torch's threads. Beside the page cache, host
    memory is taken by tensors that stay on the CPU in another dtype than the file's, and by two
    staging buffers for a GPU; never by a file.

    Args:
        fp8: what is stored in fp8, if anything is.

    Raises:
        ConfigError: a file missing, truncated or otherwise unreadable, naming it; at once, not
            when the tensor is taken.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, fp8: Fp8 | None = None
    ) -> None:
        self._folder = folder
        self._dtype = dtype
        self._device = device
        self._fp8 = fp8
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in _files(folder):
            handle = open_safetensors(folder / file)
            self._files[file] = handle
            names = dict.fromkeys(handle.keys(), file)
            if twice := self._file_of.keys() & names:
                raise ConfigError(
                    f"{folder}: tensor {min(twice)} is in {self._file_of[min(twice)]} and in "
                    f"{file}; leave one of them in the folder"
                )
            self._file_of.update(names)
        self._left = set(self._file_of)
        self._staging = _Staging(device) if device.type == "cuda" else None
        self._progress = _Progress(folder, sum((folder / f).stat().st_size for f in self._files))

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read a tensor to the device, converted to the dtype of the weights.

        On a GPU it may still be on its way, which what is launched after waits for. On the CPU a
        tensor of that dtype stays in the file, to be read when it is first used.

        Raises:
            ConfigError: no such tensor, or one of another shape.
        """
        if len(shape) == 3 and not self.has(name) and self.has(f"{name}_blocks"):
            return self._take_mxfp4(name, shape)
        tensor = self._read(name, [shape])
        if self._fp8 and tensor.dtype == FP8:
            return dequantised(*self._with_scale(name, tensor)).to(self._dtype)
        self._check_dtype(name, tensor, DTYPES)
        return self._to_device(tensor, self._dtype)

    def has(self, name: str) -> bool:
        return name in self._file_of

    def keeps_fp8(self, outputs: Mapping[str, int], inputs: int) -> bool:
        """Where there are products for them, and all of them are in fp8."""
        return (
            self._fp8 is not None
            and has_products(self._device, self._dtype)
            and fits(outputs.values(), inputs, self._fp8.blocks)
            and all(self._is_fp8(f"{name}.weight") for name in outputs)
        )

    def take_fp8(self, name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Likewise, as it is stored.

        Raises:
            ConfigError: no such tensor, one of another shape, or no scale for it.
        """
        return self._with_scale(name, self._read(name, [shape]))

    def _is_fp8(self, name: str) -> bool:
        file = self._file_of.get(name)
        return file is not None and self._files[file].get_slice(name).get_dtype() == "F8_E4M3"

    def _take_mxfp4(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """(experts, in, out), seen through what is stored and computed by outputs."""
        if shape[1] % mxfp4.BLOCK:
            raise ConfigError(
                f"{self._folder / self._file_of[f'{name}_blocks']}: tensor {name} is in MXFP4, and "
                f"has {shape[1]} inputs by config.json; expected a multiple of {mxfp4.BLOCK}"
            )
        blocks, scales = (
            self._take_codes(f"{name}_{part}", stored)
            for part, stored in zip(("blocks", "scales"), mxfp4.stored_shapes(shape), strict=True)
        )
        return mxfp4.dequantised(blocks, scales, self._dtype).mT

    def _take_codes(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._read(name, [shape])
        self._check_dtype(name, tensor, {"uint8": torch.uint8})
        return self._to_device(tensor, torch.uint8)

    def _check_dtype(
        self, name: str, tensor: torch.Tensor, supported: Mapping[str, torch.dtype]
    ) -> None:
        if tensor.dtype not in supported.values():
            raise ConfigError(
                f"{self._folder / self._file_of[name]}: tensor {name} has dtype {tensor.dtype}; "
                f"supported are {', '.join(supported)}"
            )

    def _with_scale(self, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight in fp8 on the device, and its scale in float32."""
        assert self._fp8 is not None
        if tensor.dim() != 2:
            raise ConfigError(
                f"{self._folder / self._file_of[name]}: tensor {name} is in fp8 and has shape "
                f"{list(tensor.shape)}; supported in fp8 are matrices"
            )
        outputs, inputs = tensor.shape
        shapes: list[tuple[int, ...]] = [(), (1,), (outputs,), (outputs, 1)]
        if self._fp8.blocks:
            shapes = [(-(-outputs // BLOCK), -(-inputs // BLOCK))]
        module = name.removesuffix("weight")
        # Of what it is multiplied with; each row's own is nearer.
        self._left.discard(f"{module}input_scale")
        scale = self._to_device(self._read(module + self._fp8.scale_name, shapes), torch.float32)
        if not self._fp8.blocks:
            scale = scale.reshape(-1, 1).expand(outputs, 1)
        return self._to_device(tensor, FP8), scale

    def _read(self, name: str, shapes: list[tuple[int, ...]]) -> torch.Tensor:
        """A tensor of one of these shapes, in its file's memory."""
        if name not in self._file_of:
            raise ConfigError(
                f"{self._folder}: tensor {name} is in none of its {len(self._files)} safetensors "
                f"files; expected one of shape {_either(shapes)}"
            )
        file = self._file_of[name]
        try:
            tensor: torch.Tensor = self._files[file].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise ConfigError(f"{self._folder / file}: tensor {name}: {error}") from error
        if tuple(tensor.shape) not in shapes:
            raise ConfigError(
                f"{self._folder / file}: tensor {name} has shape {list(tensor.shape)}; "
                f"expected {_either(shapes)} from config.json"
            )
        self._left.discard(name)
        return tensor

    def _to_device(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        taken = self._staging.upload(tensor, dtype) if self._staging else tensor.to(dtype)
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

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._turns = itertools.cycle(
            [
                (
                    torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True),
                    torch.cuda.Event(),  # type: ignore[no-untyped-call]
                )
                for _ in range(2)
            ]
        )

    def upload(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor on the GPU in that dtype; its last part may be on its way."""
        size = STAGING_BYTES // dtype.itemsize
        uploaded = torch.empty(tensor.shape, dtype=dtype, device=self._device)
        parts = torch.split(tensor.flatten(), size)
        places = torch.split(uploaded.view(-1), size)
        for part, place in zip(parts, places, strict=True):
            buffer, copied = next(self._turns)
            copied.synchronize()
            staged = buffer.view(dtype)[: len(part)].copy_(part)
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

    def __init__(self, dtype: torch.dtype, device: torch.device, fp8: Fp8 | None = None) -> None:
        self._dtype = dtype
        self._device = device
        self._fp8 = fp8 if has_products(device, dtype) else None

    def has(self, name: str) -> bool:
        """Nothing that a model can do without."""
        return False

    def keeps_fp8(self, outputs: Mapping[str, int], inputs: int) -> bool:
        return _said_to_keep(self._fp8, outputs, inputs)

    def take_fp8(self, name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``take`` makes, of scales that are alike."""
        assert self._fp8 is not None
        outputs, inputs = shape
        scales = (outputs // BLOCK, inputs // BLOCK) if self._fp8.blocks else (outputs, 1)
        scale = torch.full(scales, 2.0**-10, device=self._device)
        return (self.take(name, shape) * 2.0**10).to(FP8), scale

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
    """Takes no memory: counts what the tensors of a model would take.

    Args:
        fp8: what stays in fp8, if anything does.
    """

    def __init__(self, dtype: torch.dtype, fp8: Fp8 | None = None) -> None:
        self._dtype = dtype
        self._fp8 = fp8
        self.nbytes = 0

    def has(self, name: str) -> bool:
        """Nothing that a model can do without."""
        return False

    def keeps_fp8(self, outputs: Mapping[str, int], inputs: int) -> bool:
        return _said_to_keep(self._fp8, outputs, inputs)

    def take_fp8(self, name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Likewise; the scales' few bytes are not counted."""
        self.nbytes += math.prod(shape) * FP8.itemsize
        scale = torch.empty((shape[0], 1), device="meta")
        return torch.empty(shape, dtype=FP8, device="meta"), scale

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor without memory."""
        self.nbytes += math.prod(shape) * self._dtype.itemsize
        return torch.empty(shape, dtype=self._dtype, device="meta")

    def close(self) -> None:
        """Nothing is held open."""


def _said_to_keep(fp8: Fp8 | None, outputs: Mapping[str, int], inputs: int) -> bool:
    """Whether projections that are not read are of those that stay in fp8."""
    if fp8 is None or not fits(outputs.values(), inputs, fp8.blocks):
        return False
    return all(fp8.stores(name) for name in outputs)


def _either(shapes: list[tuple[int, ...]]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)


def _files(folder: Path) -> list[str]:
    """Those that transformers reads, beside which others may lie; else all there are."""
    if (folder / WHOLE).is_file():
        return [WHOLE]
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
