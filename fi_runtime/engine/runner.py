"""Computes a step: fills its tensors, runs the model and chooses the tokens that follow."""

from dataclasses import dataclass

import numpy as np
import torch

from fi_runtime.attention.base import Attention, Int32s, Int64s, StepLayout
from fi_runtime.engine import sampler
from fi_runtime.engine.decode_graphs import DecodeGraphs
from fi_runtime.engine.sequence import Chunk
from fi_runtime.messages import TokenLogprob
from fi_runtime.models import Decoder


@dataclass(frozen=True)
class Sampled:
    """The token chosen for a sequence."""

    token: int
    logprobs: list[TokenLogprob] | None


class Runner:
    def __init__(
        self,
        model: Decoder,
        attention: Attention,
        page_size: int,
        device: torch.device,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._page_size = page_size
        self._device = device
        self._graphs = graphs

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[Sampled]:
        """Compute the chunks; one result for each that completes its sequence, in their order."""
        layout, tokens, positions = self._lay_out(chunks)
        decoding = len(tokens) == len(chunks) and all(chunk.completes for chunk in chunks)
        if decoding and self._graphs is not None and self._graphs.fits(len(chunks)):
            return self._choose(chunks, self._graphs.run(layout, tokens, positions))
        self._attention.plan(layout)
        hidden = self._model(
            torch.from_numpy(tokens).to(self._device),
            torch.from_numpy(positions).to(self._device),
            self._attention,
        )
        last_rows = [
            int(end) - 1
            for chunk, end in zip(chunks, layout.query_starts[1:], strict=True)
            if chunk.completes
        ]
        if not last_rows:
            return []
        return self._choose(chunks, self._model.logits(hidden[last_rows]))

    def _choose(self, chunks: list[Chunk], logits: torch.Tensor) -> list[Sampled]:
        """One token for each chunk that completes its sequence; ``logits`` has their rows."""
        sequences = [chunk.sequence for chunk in chunks if chunk.completes]
        params = [sequence.params for sequence in sequences]
        chosen = sampler.sample(logits, params, [s.num_generated for s in sequences])
        return [
            Sampled(token, logprobs)
            for token, logprobs in zip(
                chosen, sampler.logprobs(logits, chosen, params), strict=True
            )
        ]

    def _lay_out(self, chunks: list[Chunk]) -> tuple[StepLayout, Int64s, Int64s]:
        """The step's layout, and its tokens and positions: (tokens,) int64 each."""
        tokens, positions, slots = [], [], []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.num_cached
            tokens.append(np.array(sequence.tokens[start : start + chunk.count], dtype=np.int64))
            at = np.arange(start, start + chunk.count, dtype=np.int64)
            positions.append(at)
            pages = np.array(sequence.pages, dtype=np.int64)
            slots.append(pages[at // self._page_size] * self._page_size + at % self._page_size)
        contexts = np.array([c.sequence.num_cached + c.count for c in chunks], dtype=np.int32)
        # Only pages that hold context; a chunked prompt owns more than it has filled.
        page_counts = -(-contexts // self._page_size)
        layout = StepLayout(
            query_starts=_starts([chunk.count for chunk in chunks]),
            context_lens=contexts,
            page_starts=_starts(page_counts),
            pages=np.concatenate(
                [
                    np.array(chunk.sequence.pages[:count], dtype=np.int32)
                    for chunk, count in zip(chunks, page_counts, strict=True)
                ]
            ),
            slots=np.concatenate(slots),
        )
        return layout, np.concatenate(tokens), np.concatenate(positions)


def _starts(counts: list[int] | Int32s) -> Int32s:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
