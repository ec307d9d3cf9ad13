"""CUDA graphs of all but attention, for steps with prompts or chunks that are long."""

import bisect
from typing import Any

import torch

from fi_runtime.attention.base import Int64s, StepLayout, spare_layout
from fi_runtime.attention.flashinfer import FlashInferAttention, PieceAttention
from fi_runtime.engine.capture import capture_each, replay_first
from fi_runtime.engine.step_inputs import StepInputs
from fi_runtime.kernels.heads import Heads
from fi_runtime.models import Decoder


class _Pieces:
    """A step of so many tokens, captured from one layer's attention to the next one's.

    While it is captured it is itself the attention that the model calls: each call ends a graph
    and begins the next one.
    """

    def __init__(
        self,
        model: Decoder,
        attention: PieceAttention,
        tokens: torch.Tensor,
        last_tokens: torch.Tensor,
        adapters: torch.Tensor | None,
        pool: Any,
        stream: Any,
    ) -> None:
        self._attention = attention
        self._tokens = tokens
        self._adapters = adapters
        self._pool = pool
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._capturing = False
        # Once outside, so that kernels are loaded and libraries have their workspaces.
        self._compute(model, last_tokens)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            self._capturing = True
            self._begin()
            self._hidden = self._compute(model, last_tokens)
            self._graphs[-1].capture_end()
        self._capturing = False
        replay_first(self._graphs)

    def __call__(self, layer: int, qkv: torch.Tensor, heads: Heads) -> torch.Tensor:
        self._attention.place(layer, qkv, heads)
        if self._capturing:
            self._graphs[-1].capture_end()
            self._begin()
        else:
            self._attention.attend(layer, len(qkv))
        return self._attention.out[: len(qkv)]

    def plan(self, layout: StepLayout) -> None:
        raise NotImplementedError("a step is planned before its first graph is replayed")

    def replay(self, count: int) -> torch.Tensor:
        """Hidden states of the first ``count`` tokens: (count, hidden), until the next step."""
        *before, last = self._graphs
        for layer, graph in enumerate(before):
            graph.replay()
            self._attention.attend(layer, count)
        last.replay()
        return self._hidden[:count]

    def _compute(self, model: Decoder, last_tokens: torch.Tensor) -> torch.Tensor:
        return model(self._tokens, last_tokens, self, self._adapters)

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # In the order of replay: it may take the memory that those before it are done with.
        graph.capture_begin(pool=self._pool)
        self._graphs.append(graph)


class PieceGraphs:
    """Replays steps of up to the largest of ``sizes`` tokens.

    Args:
        sizes: numbers of tokens to capture, rising; a step is padded to the next.
        last_tokens: (slots,), int64: the token chosen last in each slot.
    """

    def __init__(
        self,
        model: Decoder,
        attention: FlashInferAttention,
        sizes: list[int],
        last_tokens: torch.Tensor,
        page_size: int,
    ) -> None:
        self._sizes = sizes
        self._attention = attention.for_pieces(sizes[-1])
        self._inputs = StepInputs(sizes[-1], bool(model.adapters), last_tokens.device)
        pool = torch.cuda.graph_pool_handle()
        # One for all, since memory is reused on the stream that it was taken on.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

        def capture(size: int) -> _Pieces:
            self._attention.plan(spare_layout([size], page_size))
            tokens, adapters = self._inputs.first(size)
            return _Pieces(model, self._attention, tokens, last_tokens, adapters, pool, stream)

        self._pieces, self.nbytes = capture_each(
            sizes, "graphs of all but attention by tokens", capture
        )

    def fits(self, tokens: int) -> bool:
        return tokens <= self._sizes[-1]

    def forward(self, layout: StepLayout, tokens: Int64s, adapters: Int64s | None) -> torch.Tensor:
        """Hidden states of a step: (tokens, hidden), until the next one.

        Args:
            layout: of the step.
            tokens: (tokens,), as ``embed`` takes them.
            adapters: (tokens,); None: no token has one.
        """
        count = len(tokens)
        self._attention.plan(layout)
        self._inputs.fill(tokens, adapters)
        return self._pieces[self._sizes[bisect.bisect_left(self._sizes, count)]].replay(count)
