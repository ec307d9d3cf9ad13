"""CUDA graphs of whole decode steps, one for each padded number of sequences."""

import bisect
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fi_runtime.attention.base import Int64s, StepLayout
from fi_runtime.attention.flashinfer import FlashInferAttention, GraphDecodeAttention
from fi_runtime.engine.capture import capture_each
from fi_runtime.engine.sampler import filters
from fi_runtime.kernels.sampling import Draws, choose
from fi_runtime.models import Decoder
from fi_runtime.upload import upload


class _Graph:
    """A decode step of so many sequences, captured from tokens to chosen tokens.

    In several graphs: the forward pass, with the likeliest tokens; and drawing with filters or
    without, for steps that draw.
    """

    def __init__(
        self,
        model: Decoder,
        attention: GraphDecodeAttention,
        logits: torch.Tensor,
        last_tokens: torch.Tensor,
        pool: Any,
    ) -> None:
        sequences, device = len(logits), logits.device
        self._model = model
        self._attention = attention
        self._logits = logits
        self._last_tokens = last_tokens
        self._pool = pool
        # Tokens, and the slots that those chosen after them go to: padding's to the spare one.
        self._inputs = torch.zeros((2, sequences), dtype=torch.int64, device=device)
        self._inputs[1] = len(last_tokens) - 1
        # The rows of Draws. What padding is drawn with does not matter.
        self._draws = torch.zeros((len(Draws._fields), sequences), device=device)
        self._forward, self._likeliest = self._capture(self._compute)
        self._forward.replay()  # logits to try the drawing with
        # By whether any sequence has a filter.
        self._draw = {
            filtered: self._capture(functools.partial(self._choose, filtered))
            for filtered in (True, False)
        }

    def _capture(
        self, compute: Callable[[], torch.Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # Once outside, so that kernels are loaded and libraries have their workspaces.
        compute()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = compute()
        return graph, result

    def _compute(self) -> torch.Tensor:
        tokens = known_tokens(self._inputs[0], self._last_tokens)
        hidden = self._model(tokens, self._attention.positions, self._attention)
        self._logits.copy_(self._model.head(hidden))
        return self._keep(self._logits.argmax(dim=-1))

    def _choose(self, filtered: bool) -> torch.Tensor:
        return self._keep(choose(self._logits, Draws(*self._draws), filtered))

    def _keep(self, chosen: torch.Tensor) -> torch.Tensor:
        self._last_tokens[self._inputs[1]] = chosen
        return chosen

    def forward(self, layout: StepLayout, tokens: Int64s, slots: Int64s) -> torch.Tensor:
        count, size = len(tokens), self._inputs.shape[1]
        inputs = np.zeros((2, size), dtype=np.int64)
        inputs[0, :count], inputs[1, :count] = tokens, slots
        inputs[1, count:] = len(self._last_tokens) - 1
        self._inputs.copy_(upload(inputs, self._inputs.device))
        self._attention.plan(layout)
        self._forward.replay()
        return self._logits[:count]

    def choose(self, draws: torch.Tensor | None) -> torch.Tensor:
        if draws is None:
            return self._likeliest
        self._draws[:, : draws.shape[1]].copy_(upload(draws.float(), self._draws.device))
        graph, drawn = self._draw[filters(draws)]
        graph.replay()
        return drawn


class DecodeGraphs:
    """Replays decode steps of up to the largest of ``sizes`` sequences.

    Args:
        sizes: numbers of sequences to capture, rising; a step is padded to the next.
        last_tokens: (slots + 1,), int64: the token chosen last in each slot; padding's go to the
            spare one after them.
    """

    def __init__(
        self,
        model: Decoder,
        attention: FlashInferAttention,
        sizes: list[int],
        last_tokens: torch.Tensor,
    ) -> None:
        self._sizes = sizes
        pool = torch.cuda.graph_pool_handle()
        # Of all of them, since they are the largest by far and one step runs at a time.
        logits = torch.empty((sizes[-1], len(model.head.weight)), device=model.embedding.device)

        def capture(size: int) -> _Graph:
            return _Graph(model, attention.for_graph(size), logits[:size], last_tokens, pool)

        self._graphs, self.nbytes = capture_each(sizes, "decode graphs by sequences", capture)
        self._last = self._graphs[sizes[-1]]
        """of the last step"""

    def fits(self, sequences: int) -> bool:
        return sequences <= self._sizes[-1]

    def forward(self, layout: StepLayout, tokens: Int64s, slots: Int64s) -> torch.Tensor:
        """The logits after one token of each sequence: (sequences, vocab), until the next step.

        The likeliest tokens are kept in the slots.

        Args:
            layout: of the step.
            tokens: (sequences,), as ``known_tokens`` takes them.
            slots: (sequences,).
        """
        size = self._sizes[bisect.bisect_left(self._sizes, len(tokens))]
        self._last = self._graphs[size]
        return self._last.forward(layout, tokens, slots)

    def choose(self, draws: torch.Tensor | None, sequences: int) -> torch.Tensor:
        """Tokens from the last step's logits: (sequences,), until the next step. Kept likewise.

        Args:
            draws: (5, sequences), the rows of ``Draws``; None where all are greedy.
            sequences: of that step.
        """
        return self._last.choose(draws)[:sequences]


def known_tokens(tokens: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    """Put in tokens that the host did not know: -1 - slot stands for the one chosen last there.

    Args:
        tokens: (tokens,), int64.
        last_tokens: (slots,), int64.
    """
    return torch.where(tokens < 0, last_tokens[(-1 - tokens).clamp(min=0)], tokens)


def padded_sizes(max_sequences: int) -> list[int]:
    """1, 2, 4, then multiples of 8 up to 64 and of 16 beyond, and the maximum itself."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, max_sequences, 16)]
    return [*(size for size in steps if size < max_sequences), max_sequences]
