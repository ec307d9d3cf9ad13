"""Times decode attention as the engine runs it: planned once, then replayed from a CUDA graph.

What is timed is FlashInfer's ``CUDAGraphBatchDecodeWithPagedKVCacheWrapper`` with tensor cores, the
wrapper whose automatic choice of kernel was once several times slower than FA2 on Hopper.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fi_runtime.config import Backend, ConfigError

WORKSPACE_BYTES = 256 << 20
"""for the partial results of split contexts"""
COPY_BYTES = 1 << 30
"""what ``memory_bandwidth`` copies, where that much is free"""
HOPPER = 9
"""major compute capability of the GPUs that FA3's kernels are for"""
ROUNDS = 5
REPLAYS = 50
"""in a round; the result is the median of the rounds' means"""


@dataclass(frozen=True)
class DecodeShape:
    """One step of decode: ``batch`` sequences of ``context`` tokens, one query token each."""

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    context: int
    page_size: int
    dtype: torch.dtype = torch.bfloat16
    """of queries"""
    cache_dtype: torch.dtype = torch.bfloat16
    """of keys and values"""

    @property
    def nbytes(self) -> int:
        """Bytes of all contexts' keys and values: what a decode has to read, once."""
        tokens = self.batch * self.context
        return 2 * tokens * self.kv_heads * self.head_dim * self.cache_dtype.itemsize

    @property
    def pages(self) -> int:
        """Of one sequence."""
        return -(-self.context // self.page_size)


@dataclass(frozen=True)
class DecodeTime:
    resolved_backend: str
    """what the wrapper really ran: fa2 or fa3, also where it was left to choose"""
    us: float
    """of one decode on the GPU"""
    gb_per_s: float
    """at which that reads the keys and values, in 1e9 bytes a second"""


def time_decode(library: Any, shape: DecodeShape, backend: Backend) -> DecodeTime:
    """Time one decode on the current GPU: the median of 5 rounds of 50 replays.

    A cache that fits the L2 would be read from there. So a graph holds several decodes where one
    is small, each over a cache of its own, as a model's layers are; together they are twice the L2.
    Pages lie in random order.

    Args:
        library: the module ``flashinfer``, of whatever version is to be timed.
        shape: all sequences have the same context.
        backend: fa2 and fa3 are pinned; auto leaves the choice to the library.

    Raises:
        ConfigError: the backend cannot run here; says why.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    if backend == "fa3" and torch.cuda.get_device_capability(device)[0] != HOPPER:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"fa3 needs a Hopper GPU (compute capability 9.0); this is {name}")
    try:
        decodes = _Decodes(library, shape, backend, device)
        decodes.plan()
        decodes.run()
        torch.cuda.synchronize()
    except Exception as error:  # whatever a missing module, compiler or kernel makes it raise
        raise ConfigError(f"{backend} cannot run: {one_line(error)}") from error
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decodes.run()
    us = _median_us(graph.replay) / len(decodes.caches)
    return DecodeTime(decodes.resolved_backend, us, shape.nbytes / us / 1e3)


def memory_needed(shape: DecodeShape) -> int:
    """Bytes of the current GPU's memory that ``time_decode`` takes, nearly."""
    device = torch.device("cuda", torch.cuda.current_device())
    return shape.nbytes * _count(shape, device) + WORKSPACE_BYTES


def memory_bandwidth(device: torch.device) -> float:
    """1e9 bytes a second, read and written together, that a copy within the GPU's memory moves."""
    size = min(COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    us = _median_us(lambda: target.copy_(source))
    return 2 * size / us / 1e3


def _count(shape: DecodeShape, device: torch.device) -> int:
    """Decodes in one graph, so that their caches are twice the L2."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return -(-2 * l2_bytes // shape.nbytes)


class _Decodes:
    """The decodes that one graph holds: one wrapper and plan, and a cache for each.

    ``caches``: (decodes, 2, pages, page_size, kv_heads, head_dim), keys at 0 and values at 1.
    """

    def __init__(
        self, library: Any, shape: DecodeShape, backend: Backend, device: torch.device
    ) -> None:
        self._shape = shape
        pages = shape.batch * shape.pages
        count = _count(shape, device)
        # Normal values, not zeros: what memory draws, and so its clock, depends on them.
        self.caches = torch.empty(
            (count, 2, pages, shape.page_size, shape.kv_heads, shape.head_dim),
            dtype=shape.cache_dtype,
            device=device,
        )
        for side in self.caches.flatten(0, 1):  # each apart: fp8 is filled from a wider copy
            side.copy_(torch.randn(side.shape, dtype=shape.dtype, device=device))
        queries = (shape.batch, shape.heads, shape.head_dim)
        self._q = torch.randn(queries, dtype=shape.dtype, device=device)
        self._out = torch.empty_like(self._q)
        self._starts = torch.arange(shape.batch + 1, dtype=torch.int32) * shape.pages
        last = (shape.context - 1) % shape.page_size + 1
        self._last = torch.full((shape.batch,), last, dtype=torch.int32)
        generator = torch.Generator().manual_seed(0)
        self._pages = torch.randperm(pages, generator=generator).int().to(device)
        self._wrapper = library.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
            self._starts.to(device),
            torch.empty_like(self._pages),
            self._last.to(device),
            "NHD",
            use_tensor_cores=True,
        )
        if backend != "auto":
            # The constructor takes no backend; plan() looks here.
            self._wrapper._backend = backend

    @property
    def resolved_backend(self) -> str:
        """What the wrapper runs, once planned."""
        return str(getattr(self._wrapper, "_backend", "unknown"))

    def plan(self) -> None:
        self._wrapper.plan(
            self._starts,
            self._pages,
            self._last,
            self._shape.heads,
            self._shape.kv_heads,
            self._shape.head_dim,
            self._shape.page_size,
            q_data_type=self._shape.dtype,
            kv_data_type=self._shape.cache_dtype,
        )

    def run(self) -> None:
        for cache in self.caches:
            self._wrapper.run(self._q, (cache[0], cache[1]), out=self._out)


def _median_us(call: Callable[[], object]) -> float:
    """GPU time of one call among many that follow each other."""
    begin: Any
    end: Any
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    call()
    times: list[float] = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        begin.record()
        for _ in range(REPLAYS):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / REPLAYS)
    return statistics.median(times)


def one_line(error: Exception) -> str:
    """The telling line of a message, which may be a compiler's whole output."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    return (telling or lines or [type(error).__name__])[0]
