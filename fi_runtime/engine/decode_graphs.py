"""CUDA graphs of whole decode steps, one for each padded number of sequences."""

import bisect
import logging
import time
from typing import Any

import torch

from fi_runtime.attention.base import Int64s, StepLayout
from fi_runtime.attention.flashinfer import FlashInferAttention, GraphDecodeAttention
from fi_runtime.models import Decoder

log = logging.getLogger(__name__)


class _Graph:
    """A decode step of so many sequences, captured from tokens to logits."""

    def __init__(
        self, model: Decoder, attention: GraphDecodeAttention, sequences: int, pool: Any
    ) -> None:
        device = model.embedding.device
        self._attention = attention
        self._tokens = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._positions = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._graph = torch.cuda.CUDAGraph()
        # Once outside, so that kernels are loaded and libraries have their workspaces.
        self._compute(model)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, pool=pool):
            self._logits = self._compute(model)

    def _compute(self, model: Decoder) -> torch.Tensor:
        return model.logits(model(self._tokens, self._positions, self._attention))

    def run(self, layout: StepLayout, tokens: Int64s, positions: Int64s) -> torch.Tensor:
        count = len(tokens)
        self._tokens[:count].copy_(torch.from_numpy(tokens))
        self._positions[:count].copy_(torch.from_numpy(positions))
        self._positions[count:] = 0  # padding must not index what a longer step left
        self._attention.plan(layout)
        self._graph.replay()
        return self._logits[:count]


class DecodeGraphs:
    """Replays decode steps of up to ``max_sequences`` sequences."""

    def __init__(self, model: Decoder, attention: FlashInferAttention, max_sequences: int) -> None:
        self.sizes = padded_sizes(max_sequences)
        self._graphs: dict[int, _Graph] = {}
        begin, free = time.perf_counter(), torch.cuda.mem_get_info()[0]
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            # The largest first: the smaller ones then fit the memory that it has taken.
            for size in reversed(self.sizes):
                self._graphs[size] = _Graph(model, attention.for_graph(size), size, pool)
        log.info(
            "captured decode graphs of %s sequences in %.1f s, %.0f MB",
            ", ".join(map(str, self.sizes)),
            time.perf_counter() - begin,
            (free - torch.cuda.mem_get_info()[0]) / 1e6,
        )

    def fits(self, sequences: int) -> bool:
        return sequences <= self.sizes[-1]

    def run(self, layout: StepLayout, tokens: Int64s, positions: Int64s) -> torch.Tensor:
        """The logits after one token of each sequence: (sequences, vocab), until the next run."""
        size = self.sizes[bisect.bisect_left(self.sizes, len(tokens))]
        return self._graphs[size].run(layout, tokens, positions)


def padded_sizes(max_sequences: int) -> list[int]:
    """1, 2, 4, then multiples of 8 up to 64 and of 16 beyond, and the maximum itself."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, max_sequences, 16)]
    return [*(size for size in steps if size < max_sequences), max_sequences]
