"""CUDA graphs of whole decode steps, one for each padded number of sequences."""

import bisect
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fi_runtime.attention.base import Int64s, StepLayout
from fi_runtime.attention.flashinfer import (
    INPUTS,
    FlashInferAttention,
    GraphDecodeAttention,
)
from fi_runtime.engine.capture import capture_each, replay_first
from fi_runtime.kernels.sampling import Draws, TokenSlots, choose, scratch_for
from fi_runtime.models import Decoder


class _Graph:
    """A decode step of so many sequences, captured from tokens to chosen tokens.

    In two graphs: the forward pass, with tokens drawn from all of the vocabulary; and drawing with
    filters, for steps that have any.
    """

    def __init__(
        self,
        model: Decoder,
        attention: GraphDecodeAttention,
        shared: "_Shared",
        sequences: int,
    ) -> None:
        self._model = model
        self._attention = attention
        self._shared = shared
        # Tokens, the slots that those chosen after them go to, the table of Draws, and their
        # adapters if the model has any. Padding's tokens go to the spare slot.
        ahead = attention.ahead
        inputs = ahead.inputs.read[: INPUTS * sequences].view(INPUTS, sequences)
        self._staged = [
            staging.inputs[: INPUTS * sequences].view(INPUTS, sequences).numpy()
            for staging in ahead.stagings
        ]
        self._tokens = inputs[0]
        self._adapters = inputs[7] if model.adapters else None
        inputs[1] = self._spare = len(shared.last_tokens) - 1
        self._slots = TokenSlots(shared.last_tokens, inputs[1])
        self._draws = Draws.of(inputs[2:7].view(torch.float64))
        self._logits = shared.logits[:sequences]
        self._forward, self._drawn = self._capture(self._compute)
        replay_first([self._forward])  # logits to try the filters with, too
        self._filter, self._filtered = self._capture(functools.partial(self._choose, True))
        replay_first([self._filter])

    def _capture(
        self, compute: Callable[[], torch.Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # Once outside, so that kernels are loaded and libraries have their workspaces.
        compute()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._shared.pool):
            result = compute()
        return graph, result

    def _compute(self) -> torch.Tensor:
        last_tokens = self._shared.last_tokens
        hidden = self._model(self._tokens, last_tokens, self._attention, self._adapters)
        self._model.logits(hidden, self._logits)
        return self._choose(False)

    def _choose(self, filtered: bool) -> torch.Tensor:
        return choose(self._logits, self._draws, self._slots, filtered, self._shared.scratch)

    def forward(
        self,
        layout: StepLayout,
        tokens: Int64s,
        slots: Int64s,
        draws: torch.Tensor,
        adapters: Int64s | None,
    ) -> torch.Tensor:
        count = len(tokens)
        with self._attention.ahead.filling() as staging:
            inputs = self._staged[staging.turn]
            inputs[0, :count], inputs[1, :count] = tokens, slots
            inputs[2:7, :count] = draws.numpy().view(np.int64)
            inputs[7, :count] = 0 if adapters is None else adapters
            inputs[:, count:] = 0
            inputs[1, count:] = self._spare
            self._attention.put(layout, staging)
        self._forward.replay()
        return self._logits[:count]

    def choose(self, filtered: bool) -> torch.Tensor:
        if not filtered:
            return self._drawn
        self._filter.replay()
        return self._filtered


@dataclass(frozen=True)
class _Shared:
    """What the graphs of all sizes have in common, since one step runs at a time."""

    logits: torch.Tensor
    """(the most sequences, vocab): the largest tensor of a step by far"""
    last_tokens: torch.Tensor
    scratch: torch.Tensor
    pool: Any


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
        table, vocab = model.embedding, len(model.head.weight)
        shared = _Shared(
            logits=torch.empty((sizes[-1], vocab), dtype=table.dtype, device=table.device),
            last_tokens=last_tokens,
            scratch=scratch_for(sizes[-1], table.device),
            pool=torch.cuda.graph_pool_handle(),
        )

        def capture(size: int) -> _Graph:
            return _Graph(model, attention.for_graph(size), shared, size)

        self._graphs, self.nbytes = capture_each(sizes, "decode graphs by sequences", capture)
        self._last = self._graphs[sizes[-1]]
        """of the last step"""

    def fits(self, sequences: int) -> bool:
        return sequences <= self._sizes[-1]

    def forward(
        self,
        layout: StepLayout,
        tokens: Int64s,
        slots: Int64s,
        draws: torch.Tensor,
        adapters: Int64s | None,
    ) -> torch.Tensor:
        """The logits after one token of each sequence: (sequences, vocab), until the next step.

        Tokens that are drawn from them without any filter are kept in the slots.

        Args:
            layout: of the step.
            tokens: (sequences,), as ``embed`` takes them.
            slots: (sequences,).
            draws: (5, sequences), the table of ``Draws.of``.
            adapters: (sequences,); None: no sequence has one.
        """
        size = self._sizes[bisect.bisect_left(self._sizes, len(tokens))]
        self._last = self._graphs[size]
        return self._last.forward(layout, tokens, slots, draws, adapters)

    def choose(self, filtered: bool, sequences: int) -> torch.Tensor:
        """Tokens from the last step's logits: (sequences,), until the next step. Kept likewise.

        Args:
            filtered: whether any sequence has a top_k, top_p or min_p.
            sequences: of that step.
        """
        return self._last.choose(filtered)[:sequences]


def padded_sizes(max_sequences: int) -> list[int]:
    """1, 2, 4, then multiples of 8 up to 64 and of 16 beyond, and the maximum itself."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, max_sequences, 16)]
    return [*(size for size in steps if size < max_sequences), max_sequences]
