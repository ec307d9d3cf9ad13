"""Compiles the FlashInfer modules that a checkpoint needs, on a machine that may have no GPU."""

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fi_runtime.config import ConfigError
from fi_runtime.kernels.activation import GATED_MODULES
from fi_runtime.kernels.library import MANIFEST, flashinfer, prebuilt_manifest
from fi_runtime.kernels.own import own_spec

HEADERS = {"cublasLt.h": "nvidia-cublas", "curand.h": "nvidia-curand"}
"""What FlashInfer includes beside the compiler's own, and the packages that carry it."""

DEFAULT_CUDA_HOME = "/usr/local/cuda"

Report = Callable[[str, int, int, float], None]
"""Told of each module that is done: its name, its number, how many there are, seconds."""


@dataclass(frozen=True)
class Compiled:
    """What of a model's shape is compiled into its kernels."""

    head_dim: int
    variants: frozenset[tuple[bool, bool]] = frozenset({(False, False)})
    """of attention: whether there is a window, and whether there is a soft cap"""
    activation: str = "silu"
    """as config.json calls it"""


def prebuild(
    model: Compiled,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    backends: Sequence[str],
    arch: str,
    out: Path,
    report: Report,
) -> None:
    """Compile into ``out``, as NAME/NAME.so; what is there already is left alone.

    Args:
        model: nothing else of its shape is compiled in.
        dtype: bfloat16 or float16.
        cache_dtype: of keys and values in the cache: the same, or float8_e4m3fn.
        backends: of attention, fa2 or fa3; each is a module of its own.
        arch: compute capability as FlashInfer writes it, such as 9.0a; several with blanks between.
        out: made if missing.
        report: called after each module.

    Raises:
        ConfigError: something is missing to compile with, naming it; a module does not compile; or
            ``out`` has kernels for something else.
    """
    scratch = out.resolve() / ".build"
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ |= _toolchain(scratch)
    # FlashInfer reads these when it is imported.
    os.environ |= {"FLASHINFER_CUDA_ARCH_LIST": arch, "FLASHINFER_WORKSPACE_BASE": str(scratch)}
    claim(out, {"arch": arch, "flashinfer": flashinfer().__version__})
    specs = list(_modules(model, dtype, cache_dtype, backends))
    for number, spec in enumerate(specs, 1):
        begin = time.monotonic()
        target = out / spec.name / f"{spec.name}.so"
        if not target.exists():
            try:
                spec.build()
            except RuntimeError as error:
                raise ConfigError(f"{spec.name} does not compile: {error}") from error
            target.parent.mkdir(exist_ok=True)
            # In one step: a file that is there is whole.
            shutil.copyfile(spec.jit_library_path, target.with_suffix(".part"))
            target.with_suffix(".part").rename(target)
        report(spec.name, number, len(specs), time.monotonic() - begin)
    shutil.rmtree(scratch)


def claim(out: Path, manifest: dict[str, str]) -> None:
    """Write down what the folder's kernels are for, and see that all in it are for that."""
    found = prebuilt_manifest(out)
    modules = (path for path in out.glob("*/*.so") if path.parent.name == path.stem)
    if found is None and any(modules):
        raise ConfigError(f"{out}: holds kernels and no {MANIFEST}; name an empty folder")
    if found not in (None, manifest):
        raise ConfigError(
            f"{out}: holds kernels for {found}, not for {manifest}; remove it, or name another"
        )
    (out / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")


def _modules(
    model: Compiled, dtype: torch.dtype, cache_dtype: torch.dtype, backends: Sequence[str]
) -> Iterator[Any]:
    """The specifications of what the runtime calls for such a model."""
    yield own_spec()
    jit = functools.partial(importlib.import_module, package="flashinfer.jit")
    yield jit(".norm").gen_norm_module()
    yield jit(".activation").gen_act_and_mul_module(GATED_MODULES[model.activation])
    attention = jit(".attention.modules")
    kind = (dtype, cache_dtype, dtype, torch.int32, model.head_dim, model.head_dim)
    no_position, no_half = 0, False
    for window, cap in sorted(model.variants):
        yield attention.gen_batch_decode_module(*kind, no_position, window, cap)
        for backend in backends:
            yield attention.gen_batch_prefill_module(
                backend, *kind, no_position, window, cap, no_half
            )


def _toolchain(scratch: Path) -> dict[str, str]:
    """Environment variables with which FlashInfer finds a compiler, headers and libraries.

    Raises:
        ConfigError: names all that is missing, and where each is to be had.
    """
    missing = []
    path = _joined(str(Path(sys.executable).parent), os.environ.get("PATH", ""))
    home = _cuda_home(path)
    if home is None:
        missing.append("nvcc (set CUDA_HOME, or install the CUDA toolkit)")
    if shutil.which("ninja", path=path) is None:
        missing.append("ninja (pip install ninja)")
    if shutil.which("c++", path=path) is None:
        missing.append("c++ (install g++)")
    folders = [home / "include"] if home else []
    folders += sorted((Path(sysconfig.get_paths()["purelib"]) / "nvidia").glob("*/include"))
    include = []
    for header, package in HEADERS.items():
        found = next((folder for folder in folders if (folder / header).exists()), None)
        if found is None:
            missing.append(f"{header} (pip install {package})")
        else:
            include.append(str(found))
    if missing or home is None:
        raise ConfigError(f"cannot compile without {'; '.join(missing)}")
    return {
        "CUDA_HOME": str(home),
        "CPATH": _joined(os.environ.get("CPATH", ""), *include),
        "LIBRARY_PATH": _joined(os.environ.get("LIBRARY_PATH", ""), str(_libcuda(home, scratch))),
        "PATH": path,
    }


def _cuda_home(path: str) -> Path | None:
    nvcc = shutil.which("nvcc", path=path)
    candidates = [os.environ.get("CUDA_HOME", "")]
    candidates += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    candidates += [DEFAULT_CUDA_HOME]
    homes = (Path(candidate) for candidate in candidates if candidate)
    # Its headers, too: an nvcc on PATH may be a script that only calls another.
    parts = ("bin/nvcc", "include/cuda_runtime.h")
    return next((home for home in homes if all((home / part).exists() for part in parts)), None)


def _libcuda(home: Path, scratch: Path) -> Path:
    """A folder with a libcuda.so to link against; the driver brings the real one."""
    for folder in (home / "lib64" / "stubs", home / "lib" / "stubs"):
        if (folder / "libcuda.so").exists():
            return folder
    command = ["c++", "-shared", "-x", "c++", os.devnull, "-Wl,-soname,libcuda.so.1", "-o"]
    subprocess.run([*command, str(scratch / "libcuda.so")], check=True)
    return scratch


def _joined(*parts: str) -> str:
    return os.pathsep.join(part for part in parts if part)
