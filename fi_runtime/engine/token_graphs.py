"""CUDA graphs of whole passes in which each token is a sequence of its own: for short prompts."""

import bisect
from typing import Any

import numpy as np
import torch

from fi_runtime.attention.base import Int64s, StepLayout
from fi_runtime.attention.flashinfer import (
    APART_CONTEXT,
    FlashInferAttention,
    GraphDecodeAttention,
)
from fi_runtime.engine.capture import capture_each, replay_first
from fi_runtime.engine.step_inputs import StepInputs
from fi_runtime.models import Decoder


class _Pass:
    """The hidden states of a step of so many tokens."""

    def __init__(
        self,
        model: Decoder,
        attention: GraphDecodeAttention,
        tokens: torch.Tensor,
        last_tokens: torch.Tensor,
        adapters: torch.Tensor | None,
        pool: Any,
    ) -> None:
        self._attention = attention
        # Once outside, so that kernels are loaded and libraries have their workspaces.
        model(tokens, last_tokens, attention, adapters)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._hidden = model(tokens, last_tokens, attention, adapters)
        replay_first([self._graph])

    def replay(self, layout: StepLayout) -> torch.Tensor:
        self._attention.plan(layout)
        self._graph.replay()
        return self._hidden


class TokenGraphs:
    """Replays steps of up to the largest of ``sizes`` tokens, some of them of short prompts.

    To attention each token is a sequence that decodes: a layer writes the keys and values of all
    the step's tokens before it reads any, so a prompt's tokens find those before them. That reads
    the prompt once for each of its tokens, which is cheap while it is short, and spares the host
    all that it does for a layer.

    Args:
        sizes: numbers of tokens to capture, rising; a step is padded to the next.
        last_tokens: (slots + 1,), int64: the token chosen last in each slot.
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
        self._page_size = page_size
        self._inputs = StepInputs(sizes[-1], bool(model.adapters), last_tokens.device)
        pool = torch.cuda.graph_pool_handle()

        def capture(size: int) -> _Pass:
            tokens, adapters = self._inputs.first(size)
            return _Pass(model, attention.for_graph(size), tokens, last_tokens, adapters, pool)

        self._passes, self.nbytes = capture_each(
            sizes, "steps with short prompts by tokens", capture
        )

    def fits(self, layout: StepLayout) -> bool:
        counts = np.diff(layout.query_starts).astype(np.int64)
        # n tokens that end at context c have c - n + 1 to c before them and with them.
        contexts = counts * (2 * layout.context_lens - counts + 1) // 2
        return (
            int(layout.query_starts[-1]) <= self._sizes[-1]
            and int(contexts[counts > 1].sum()) <= APART_CONTEXT
        )

    def forward(self, layout: StepLayout, tokens: Int64s, adapters: Int64s | None) -> torch.Tensor:
        """Hidden states of a step: (tokens, hidden), until the next one.

        Args:
            layout: of the step.
            tokens: (tokens,), as ``embed`` takes them.
            adapters: (tokens,); None: no token has one.
        """
        count = len(tokens)
        self._inputs.fill(tokens, adapters)
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        return self._passes[size].replay(layout.apart(self._page_size))[:count]
