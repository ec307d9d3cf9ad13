"""Paged attention through FlashInfer, with FA2 pinned in every wrapper.

FlashInfer's automatic choice once picked FA3 for decode on Hopper GPUs, several times slower at
long contexts. So nothing is left to it: each wrapper is told FA2, and what each will really run is
checked when the engine starts, since what it was told lies in a private attribute.
"""

import logging
from typing import Any

import numpy as np
import torch

from fi_runtime.attention.base import Int32s, StepLayout
from fi_runtime.cache.kv_cache import KVCache
from fi_runtime.cache.pages import SPARE_PAGE
from fi_runtime.config import Backend, ConfigError
from fi_runtime.kernels.library import flashinfer

log = logging.getLogger(__name__)

WORKSPACE_BYTES = 256 << 20
"""for the partial results of split contexts; shared, since one wrapper runs at a time"""
TENSOR_CORE_RATIO = 4
"""query heads for each key/value head from which decode is faster on tensor cores"""


class FlashInferAttention:
    """Prefill, or a mix with decode, by one wrapper; decode alone by another.

    Raises:
        ConfigError: a wrapper would run something else than it was told.
    """

    def __init__(self, cache: KVCache, heads: int, backend: Backend = "fa2") -> None:
        library = flashinfer()
        self._cache = cache
        self._heads = heads
        self._backend = backend
        device = cache.data.device
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # Decode graphs share it; only the pages that a step reads are written.
        self._graph_pages = torch.zeros(cache.shape.pages * 2, dtype=torch.int32, device=device)
        self._tensor_cores = heads // cache.shape.kv_heads >= TENSOR_CORE_RATIO
        self._prefill = library.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, "NHD", backend=backend
        )
        self._decode = library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_tensor_cores=self._tensor_cores, backend=backend
        )
        self._step = _Step(self._decode, cache)
        self._check_wrappers()

    def plan(self, layout: StepLayout) -> None:
        decoding = bool((np.diff(layout.query_starts) == 1).all())
        self._step = _Step(self._decode if decoding else self._prefill, self._cache)
        self._step.locate(layout)
        if decoding:
            _plan_decode(self._decode, layout, self._cache, self._heads)
        else:
            self._prefill.plan(
                torch.from_numpy(layout.query_starts),
                torch.from_numpy(layout.page_starts),
                torch.from_numpy(layout.pages),
                torch.from_numpy(_last_page_lens(layout, self._cache)),
                self._heads,
                self._cache.shape.kv_heads,
                self._cache.shape.head_dim,
                self._cache.shape.page_size,
                causal=True,
                q_data_type=self._cache.data.dtype,
                kv_data_type=self._cache.data.dtype,
            )

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        return self._step(layer, q, k, v)

    def for_graph(self, sequences: int) -> "GraphDecodeAttention":
        """Decode of exactly so many sequences, to be captured in a CUDA graph.

        Raises:
            ConfigError: its wrapper would run something else than it was told.
        """
        attention = GraphDecodeAttention(
            self._cache,
            self._heads,
            sequences,
            self._tensor_cores,
            self._workspace,
            self._graph_pages,
            self._backend,
        )
        attention.plan(_empty_layout(1, self._cache))
        self._check(f"CUDA-graph decode of {sequences}", attention.wrapper)
        return attention

    def _check_wrappers(self) -> None:
        self.plan(_empty_layout(1, self._cache))
        decode = self._check("decode", self._decode)
        self.plan(_empty_layout(2, self._cache))
        prefill = self._check("prefill", self._prefill)
        told = log.info if self._backend == "fa2" else log.warning
        told(
            "attention: FlashInfer %s, prefill runs %s, decode runs %s on %s cores",
            flashinfer().__version__,
            prefill,
            decode,
            "tensor" if self._tensor_cores else "CUDA",
        )

    def _check(self, name: str, wrapper: Any) -> str:
        """What a planned wrapper runs; refuses anything but FA2 where FA2 was asked for."""
        runs = getattr(wrapper, "_backend", "unknown")
        if self._backend == "fa2" and runs != "fa2":
            raise ConfigError(
                f"attention: the {name} wrapper of FlashInfer {flashinfer().__version__} would run "
                f"{runs} although it was told fa2; install the version of requirements.lock"
            )
        return str(runs)


class GraphDecodeAttention:
    """Decode of a fixed number of sequences from buffers that never move.

    Fewer may be planned: the rest are padding, of one token each in the spare page.
    """

    def __init__(
        self,
        cache: KVCache,
        heads: int,
        sequences: int,
        tensor_cores: bool,
        workspace: torch.Tensor,
        pages: torch.Tensor,
        backend: Backend,
    ) -> None:
        self._cache = cache
        self._heads = heads
        self._sequences = sequences
        device = cache.data.device
        self.wrapper = flashinfer().CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
            workspace,
            torch.zeros(sequences + 1, dtype=torch.int32, device=device),
            pages,
            torch.ones(sequences, dtype=torch.int32, device=device),
            "NHD",
            use_tensor_cores=tensor_cores,
        )
        # Its constructor takes no backend; what it would choose itself is what this is about.
        self.wrapper._backend = backend
        self._step = _Step(self.wrapper, cache)
        self._step.hold(sequences, pages)

    def plan(self, layout: StepLayout) -> None:
        """Also before each replay: a replay with a stale plan reads the wrong keys."""
        padded = _pad(layout, self._sequences)
        self._step.locate(padded)
        _plan_decode(self.wrapper, padded, self._cache, self._heads)

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        return self._step(layer, q, k, v)


class _Step:
    """Where a step's keys and values go, and the wrapper that reads them."""

    def __init__(self, wrapper: Any, cache: KVCache) -> None:
        self._wrapper = wrapper
        self._cache = cache
        self._held: dict[str, torch.Tensor] = {}
        self._at: dict[str, torch.Tensor] = {}

    def hold(self, sequences: int, pages: torch.Tensor) -> None:
        """Keep everything in buffers that never move, for so many sequences of one token."""
        sizes = {"row": sequences, "position": sequences, "start": sequences + 1, "last": sequences}
        self._held = {
            name: torch.zeros(size, dtype=torch.int32, device=pages.device)
            for name, size in sizes.items()
        }
        self._held["page"] = pages

    def locate(self, layout: StepLayout) -> None:
        counts = np.diff(layout.query_starts)
        first = layout.context_lens - counts
        positions = np.arange(layout.query_starts[-1]) + np.repeat(
            first - layout.query_starts[:-1], counts
        )
        rows = np.repeat(np.arange(len(counts)), counts)
        arrays = {
            "row": rows.astype(np.int32),
            "position": positions.astype(np.int32),
            "start": layout.page_starts,
            "last": _last_page_lens(layout, self._cache),
            "page": layout.pages,
        }
        device = self._cache.data.device
        for name, array in arrays.items():
            host = torch.from_numpy(array)
            if self._held:
                self._held[name][: len(array)].copy_(host)
            else:
                self._at[name] = host.to(device)
        if self._held:
            self._at = self._held

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        paged = self._cache.layer(layer)
        flashinfer().page.append_paged_kv_cache(
            k,
            v,
            self._at["row"],
            self._at["position"],
            paged,
            self._at["page"],
            self._at["start"],
            self._at["last"],
            "NHD",
        )
        out: torch.Tensor = self._wrapper.run(q, paged)
        return out


def _plan_decode(wrapper: Any, layout: StepLayout, cache: KVCache, heads: int) -> None:
    wrapper.plan(
        torch.from_numpy(layout.page_starts),
        torch.from_numpy(layout.pages),
        torch.from_numpy(_last_page_lens(layout, cache)),
        heads,
        cache.shape.kv_heads,
        cache.shape.head_dim,
        cache.shape.page_size,
        q_data_type=cache.data.dtype,
        kv_data_type=cache.data.dtype,
    )


def _last_page_lens(layout: StepLayout, cache: KVCache) -> Int32s:
    """Tokens in each sequence's last page, 1 to page_size."""
    lengths: Int32s = (layout.context_lens - 1) % cache.shape.page_size + 1
    return lengths.astype(np.int32)


def _empty_layout(tokens: int, cache: KVCache) -> StepLayout:
    """One sequence, all its pages the spare one."""
    pages = -(-tokens // cache.shape.page_size)
    return StepLayout(
        query_starts=np.array([0, tokens], dtype=np.int32),
        context_lens=np.array([tokens], dtype=np.int32),
        page_starts=np.array([0, pages], dtype=np.int32),
        pages=np.full(pages, SPARE_PAGE, dtype=np.int32),
        slots=np.zeros(tokens, dtype=np.int64),
    )


def _pad(layout: StepLayout, sequences: int) -> StepLayout:
    """Add sequences of one token in the spare page, up to so many."""
    missing = sequences - len(layout.context_lens)
    ones = np.ones(missing, dtype=np.int32)
    more = np.arange(1, missing + 1, dtype=np.int32)
    return StepLayout(
        query_starts=np.concatenate((layout.query_starts, layout.query_starts[-1] + more)),
        context_lens=np.concatenate((layout.context_lens, ones)),
        page_starts=np.concatenate((layout.page_starts, layout.page_starts[-1] + more)),
        pages=np.concatenate((layout.pages, ones * SPARE_PAGE)),
        slots=np.concatenate((layout.slots, np.zeros(missing, dtype=np.int64))),
    )
