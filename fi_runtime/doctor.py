"""What a machine and a checkpoint can do together, found out before a server is started."""

import dataclasses
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fi_runtime import shared_memory
from fi_runtime.attention.flashinfer import FlashInferAttention, Limits
from fi_runtime.attention.timing import (
    DecodeShape,
    memory_bandwidth,
    memory_needed,
    one_line,
    time_decode,
)
from fi_runtime.cache.kv_cache import CacheShape, KVCache
from fi_runtime.config import Backend, ConfigError, EngineConfig
from fi_runtime.dtypes import dtype_name
from fi_runtime.engine.build import (
    available_memory,
    cache_dtype,
    check_gpu_has_kernels,
    compute_dtype,
    load_adapters,
    weight_bytes,
)
from fi_runtime.frontend.repository import read_engine_config
from fi_runtime.kernels.library import (
    check_version,
    flashinfer,
    prebuilt_manifest,
    use_prebuilt,
)
from fi_runtime.models import CheckpointWeights, ModelConfig, load_model_config

log = logging.getLogger(__name__)

PYTHONS = ((3, 11), (3, 12))
"""that there is a stub of Triton's Python backend for"""
COMPILERS = ("nvcc", "ninja", "c++")
BATCHES = ((1, 32_768), (8, 32_768), (32, 8192), (64, 1024))
"""sequences, and tokens of context of each, at which decode is timed"""
SLOW = 1.2
"""times as long as the fastest backend, from which the chosen one is worth a warning"""

Verdict = Literal["ok", "warning", "problem"]


class Check(msgspec.Struct, frozen=True):
    """One thing looked at."""

    name: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""
    """what to do, or what it means; empty where there is nothing to say"""


class DecodeRow(msgspec.Struct, frozen=True):
    """One decode attention timed, or why it could not be."""

    batch: int
    context: int
    backend: Backend
    """that was asked for"""
    runs: str = ""
    """what that came to: fa2 or fa3"""
    us: float = 0.0
    gb_per_s: float = 0.0
    share: float = 0.0
    """of the memory bandwidth that a copy on this GPU reaches"""
    reason: str = ""
    """why it could not be timed; the numbers are 0 then"""


class Report(msgspec.Struct, frozen=True):
    """Everything that was found; ``decode`` is empty without a GPU that can be timed."""

    checks: list[Check]
    decode: list[DecodeRow] = []
    copy_gb_per_s: float = 0.0
    """1e9 bytes a second, read and written, of a copy within the GPU's memory"""

    @property
    def has_problem(self) -> bool:
        """Whether something keeps the model from being served well here."""
        return any(check.verdict == "problem" for check in self.checks)


def examine(model_folder: Path) -> Report:
    """Look at the machine and at a model folder's checkpoint; with a GPU, time decode attention.

    What is wrong is a check of the report, never an exception.
    """
    gpu = torch.cuda.is_available()
    library = _flashinfer(gpu)
    checks = [_python(), _torch(gpu), _driver(), *_gpus(gpu), library, _shared_memory()]
    try:
        config = read_engine_config(model_folder, "cuda" if gpu else "cpu")
        model = load_model_config(Path(config.checkpoint))
    except ConfigError as error:
        checks.append(Check("checkpoint", "cannot be read", "problem", str(error)))
        return Report(checks)
    dtype = compute_dtype(config)
    weights = weight_bytes(model, dtype, torch.device(config.device))
    kernels = _kernels(config, gpu)
    checks += [
        Check("checkpoint", _describe(config, model, dtype)),
        _weights(config, weights),
        *_adapters(config, model),
        _host_memory(0 if gpu else weights),
        _cache_room(config, model, weights),
        kernels,
    ]
    if not gpu:
        return Report(checks)
    attention = _attention(model, dtype)
    checks.append(attention)
    if "problem" in (library.verdict, kernels.verdict, attention.verdict):
        return Report(checks)
    checks += _wrappers(config, model, dtype)
    copy_gb_per_s = memory_bandwidth(torch.device("cuda"))
    rows = list(_time_decode(config, model, dtype, copy_gb_per_s))
    checks += _chosen_backend(config, rows)
    return Report(checks, rows, copy_gb_per_s)


def report_json(report: Report) -> str:
    """The report as one JSON object."""
    return msgspec.json.encode(report).decode()


def print_report(report: Report, console: Console) -> None:
    """The report as tables, with advice below."""
    colours = {"ok": "green", "warning": "yellow", "problem": "red"}
    table = Table(box=None, pad_edge=False)
    for column in ("check", "verdict", "found"):
        table.add_column(column, overflow="fold")
    for check in report.checks:
        colour = colours[check.verdict]
        table.add_row(check.name, Text(check.verdict, style=colour), Text(check.value))
    console.print(table)
    for check in report.checks:
        if check.advice:
            console.print(
                f"{check.name}: {check.advice}", style=colours[check.verdict], markup=False
            )
    if report.decode:
        console.print(_decode_table(report))
    for reason in dict.fromkeys(row.reason for row in report.decode if row.reason):
        console.print(Text(reason, style=colours["warning"]))


def _decode_table(report: Report) -> Table:
    table = Table(
        title="Decode attention of this checkpoint on tensor cores, from a CUDA graph; a copy "
        f"within the GPU's memory moves {report.copy_gb_per_s:.0f} GB/s",
    )
    for column in ("batch x context", "backend", "runs", "us", "us / fa2's", "GB/s", "share"):
        table.add_column(column, justify="left" if column in ("backend", "runs") else "right")
    fa2 = {(row.batch, row.context): row.us for row in report.decode if row.backend == "fa2"}
    for row in report.decode:
        place = f"{row.batch} x {row.context}"
        if row.reason:
            table.add_row(place, row.backend, "cannot")
            continue
        base = fa2[row.batch, row.context]
        ratio = f"{row.us / base:.1f}" if base else ""
        numbers = (f"{row.us:.0f}", ratio, f"{row.gb_per_s:.0f}", f"{row.share:.0%}")
        table.add_row(place, row.backend, row.runs, *numbers)
    return table


# The machine


def driver_version() -> str | None:
    """Of NVIDIA's driver; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info[:2] in PYTHONS:
        return Check("Python", version)
    known = " and ".join(".".join(map(str, python)) for python in PYTHONS)
    advice = f"the Python backend's stubs are for {known}; use one of them"
    return Check("Python", version, "problem", advice)


def _torch(gpu: bool) -> Check:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    value = f"{torch.__version__}, {build}"
    if not gpu and driver_version():
        advice = (
            "there is an NVIDIA driver, but this torch finds no GPU; install a build for CUDA that "
            "the driver supports, and see that CUDA_VISIBLE_DEVICES hides none"
        )
        return Check("torch", value, "problem", advice)
    return Check("torch", value)


def _driver() -> Check:
    return Check("NVIDIA driver", driver_version() or "none")


def _gpus(gpu: bool) -> Iterator[Check]:
    if not gpu:
        yield Check("GPU", "none", advice="the engine runs on the CPU; nothing is timed")
        return
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        free, total = torch.cuda.mem_get_info(number)
        yield Check(
            f"GPU {number}",
            f"{torch.cuda.get_device_name(number)}, compute capability {major}.{minor}, "
            f"{_gib(free)} of {_gib(total)} free",
        )


def _flashinfer(gpu: bool) -> Check:
    try:
        version = importlib.metadata.version("flashinfer-python")
        check_version(version)
    except importlib.metadata.PackageNotFoundError:
        advice = "a GPU needs it: pip install 'fi-runtime[gpu]'"
        return Check("FlashInfer", "not installed", "problem" if gpu else "ok", advice)
    except ConfigError as error:
        return Check("FlashInfer", version, "problem", str(error))
    return Check("FlashInfer", f"{version}, without the slow choice of decode kernel on Hopper")


def _shared_memory() -> Check:
    shortage = shared_memory.shortage()
    if shortage is not None:
        return Check("shared memory", "too little", "problem", shortage)
    usage = shutil.disk_usage(shared_memory.FOLDER)
    value = f"{usage.free >> 20} of {usage.total >> 20} MiB free in {shared_memory.FOLDER}"
    return Check("shared memory", value)


# The checkpoint


def _describe(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> str:
    return (
        f"{model.architecture}, {model.layers} layers, {model.heads} query and {model.kv_heads} "
        f"key/value heads of {model.head_dim}, hidden size {model.hidden_size}, "
        f"{dtype_name(dtype)}{', stored in fp8' if model.fp8 else ''}, "
        f"pages of {config.page_size} tokens in {dtype_name(cache_dtype(config))}"
    )


def _weights(config: EngineConfig, nbytes: int) -> Check:
    value = f"{_gib(nbytes)} in memory"
    if config.load_format == "dummy":
        advice = "load_format is dummy: they are random, for measurements only"
        return Check("weights", value, "warning", advice)
    try:
        # Opens every file; reads no tensor.
        CheckpointWeights(Path(config.checkpoint), torch.float32, torch.device("cpu"))
    except ConfigError as error:
        return Check("weights", "cannot be read", "problem", str(error))
    files = Path(config.checkpoint).glob("*.safetensors")
    on_disk = sum(file.stat().st_size for file in files)
    return Check("weights", f"{value}, {_gib(on_disk)} on disk")


def _adapters(config: EngineConfig, model: ModelConfig) -> list[Check]:
    """Whether they can be served; nothing where there are none."""
    try:
        adapters = load_adapters(config, model)
    except ConfigError as error:
        return [Check("adapters", "cannot be read", "problem", str(error))]
    if adapters is None:
        return []
    value = f"{', '.join(adapters.names)}: {_gib(adapters.nbytes)} on disk"
    return [Check("adapters", value)]


def _host_memory(weights: int) -> Check:
    free = available_memory(torch.device("cpu"))
    value = f"{_gib(free)} free"
    if free < weights:
        return Check("host memory", value, "problem", f"the weights alone take {_gib(weights)}")
    return Check("host memory", value)


def _cache_room(config: EngineConfig, model: ModelConfig, weights: int) -> Check:
    """Tokens that would fit beside the weights; what a step and its graphs take is left out."""
    if config.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        room = free - (1.0 - config.gpu_memory_fraction) * total - weights
    else:
        # The engine leaves the machine a quarter.
        room = (available_memory(torch.device("cpu")) - weights) * 0.75
    shape = CacheShape(model.layers, 1, 1, model.kv_heads, model.head_dim)
    token = shape.nbytes(cache_dtype(config))
    tokens = max(0, int(room) // token)
    value = f"about {tokens:,} tokens of {token:,} bytes fit the memory"
    if config.cache_tokens:
        value += f"; cache_tokens is {config.cache_tokens:,}"
    if tokens < max(config.cache_tokens, config.page_size):
        advice = "use a smaller cache_tokens, a smaller checkpoint or a machine with more memory"
        return Check("cache", value, "problem", advice)
    return Check("cache", value)


# What a GPU would run


def _kernels(config: EngineConfig, gpu: bool) -> Check:
    """Prebuilt ones, or what they would be compiled with."""
    folder = Path(config.kernels)
    name = "prebuilt kernels"
    manifest = prebuilt_manifest(folder)
    if manifest is not None:
        made_for = ", ".join(f"{key} {value}" for key, value in sorted(manifest.items()))
        if gpu:
            try:
                use_prebuilt(folder)
            except ConfigError as error:
                return Check(name, made_for, "problem", str(error))
        return Check(name, made_for)
    if not gpu:
        advice = "a GPU starts sooner with them: python -m fi_runtime prebuild"
        return Check(name, "none", advice=advice)
    advice = (
        "those that FlashInfer has not compiled here before compile at first use, which takes "
        "minutes; ahead of it: python -m fi_runtime prebuild"
    )
    missing = [program for program in COMPILERS if not _has_program(program)]
    if missing:
        advice += f", on another machine, since this one has no {', no '.join(missing)}"
    return Check(name, "none", "warning", advice)


def _has_program(name: str) -> bool:
    """Where FlashInfer looks: on PATH and in CUDA's own folder."""
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    path = os.pathsep.join([os.environ.get("PATH", ""), str(cuda)])
    return shutil.which(name, path=path) is not None


def _attention(model: ModelConfig, dtype: torch.dtype) -> Check:
    """Whether FlashInfer has kernels for this GPU and these heads."""
    value = f"heads of {model.head_dim} in {dtype_name(dtype)}"
    try:
        check_gpu_has_kernels(model, dtype)
    except ConfigError as error:
        return Check("attention", value, "problem", str(error))
    return Check("attention", value)


def _wrappers(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> Iterator[Check]:
    """Plan each wrapper as the engine would, on a cache of a few pages."""
    log.info("planning attention; kernels that are not prebuilt compile now, for minutes")
    shape = CacheShape(1, 8, config.page_size, model.kv_heads, model.head_dim)
    context = config.max_context or model.max_position
    limits = Limits(config.step_tokens, config.max_sequences, context)
    try:
        cache = KVCache(shape, cache_dtype(config), torch.device("cuda"))
        attention = FlashInferAttention(
            cache, model.heads, limits, config.attention_backend, model.attention, dtype
        )
        attention.for_graph(1)
    except Exception as error:  # also what FlashInfer or a compiler makes of this machine
        yield Check("wrappers", "cannot run", "problem", one_line(error))
        return
    for name, runs in attention.runs.items():
        if config.attention_backend == "fa2":
            yield Check(name, runs)
        else:
            advice = f"attention_backend is {config.attention_backend}; fa2 is meant to be used"
            yield Check(name, runs, "warning", advice)


def _time_decode(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, copy_gb_per_s: float
) -> Iterator[DecodeRow]:
    log.info("timing decode; FA3's kernels compile first unless prebuild --fa3 has made them")
    failed: dict[Backend, str] = {}
    for batch, context in BATCHES:
        heads = (model.heads, model.kv_heads, model.head_dim)
        dtypes = (dtype, cache_dtype(config))
        shape = _that_fits(DecodeShape(*heads, batch, context, config.page_size, *dtypes))
        for backend in get_args(Backend):
            log.info("timing %s at %d x %d", backend, batch, shape.context)
            row = DecodeRow(batch, shape.context, backend)
            # Once: the next shape would have its kernels compiled in vain again.
            if backend not in failed:
                try:
                    time = time_decode(flashinfer(), shape, backend)
                except ConfigError as error:
                    failed[backend] = str(error)
            if backend in failed:
                yield msgspec.structs.replace(row, reason=failed[backend])
            else:
                yield msgspec.structs.replace(
                    row,
                    runs=time.resolved_backend,
                    us=time.us,
                    gb_per_s=time.gb_per_s,
                    share=time.gb_per_s / copy_gb_per_s,
                )


def _that_fits(shape: DecodeShape) -> DecodeShape:
    """The same with as much context as the GPU's free memory has room for."""
    free = torch.cuda.mem_get_info()[0]
    while shape.context > 1 and memory_needed(shape) > free:
        shape = dataclasses.replace(shape, context=shape.context // 2)
    return shape


def _chosen_backend(config: EngineConfig, rows: list[DecodeRow]) -> Iterator[Check]:
    """Whether the backend that is configured is the fastest, or near it, in every row."""
    chosen = config.attention_backend
    times = {(row.batch, row.context, row.backend): row.us for row in rows if not row.reason}
    slow = []
    for (batch, context, backend), us in times.items():
        fastest = min(t for (b, c, _), t in times.items() if (b, c) == (batch, context))
        if backend == chosen and us > SLOW * fastest:
            slow.append(f"{us / fastest:.1f} times the fastest's at {batch} x {context}")
    if not any(backend == chosen for _, _, backend in times):
        yield Check("attention_backend", chosen, "problem", "it cannot run here; see the table")
    elif slow:
        advice = f"its time is {', '.join(slow)}; see the table"
        yield Check("attention_backend", chosen, "warning", advice)
    else:
        yield Check("attention_backend", f"{chosen}, the fastest here or within {SLOW - 1:.0%}")


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB"
