"""Computes a step: fills its tensors, runs the model and chooses the tokens that follow."""

from dataclasses import dataclass

import numpy as np
import torch

from fi_runtime.attention.base import Attention, Int32s, Int64s, StepLayout, starts
from fi_runtime.engine import sampler
from fi_runtime.engine.decode_graphs import DecodeGraphs
from fi_runtime.engine.guides import guided
from fi_runtime.engine.logit_edits import edited
from fi_runtime.engine.sequence import Chunk
from fi_runtime.messages import TokenLogprob
from fi_runtime.models import Decoder
from fi_runtime.upload import upload


@dataclass(frozen=True)
class Sampled:
    """The token chosen for a sequence."""

    token: int
    logprobs: list[TokenLogprob] | None
    dead_end: str = ""
    """why its guide lets no token follow; the token means nothing then"""


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
        sequences = [chunk.sequence for chunk in chunks if chunk.completes]
        params = [sequence.params for sequence in sequences]
        draws = sampler.draws_of(params, [sequence.num_generated for sequence in sequences])
        decoding = len(tokens) == len(chunks) == len(sequences)
        graphs = self._graphs if decoding else None
        if graphs is not None and graphs.fits(len(chunks)):
            logits = graphs.forward(layout, tokens)
        else:
            graphs = None
            hidden = self._forward(layout, tokens, positions)
            if not sequences:
                return []
            last_rows = [
                int(end) - 1
                for chunk, end in zip(chunks, layout.query_starts[1:], strict=True)
                if chunk.completes
            ]
            logits = self._model.logits(hidden[last_rows])
        wanted = edited(logits, sequences)
        dead_ends: dict[int, str] = {}
        if any(sequence.guide for sequence in sequences):
            wanted, dead_ends = guided(logits, wanted, [sequence.guide for sequence in sequences])
        if graphs is not None and wanted is logits:
            chosen = graphs.choose(draws, len(sequences))
        else:
            chosen = sampler.choose(wanted, draws)
        found: list[int] = chosen.tolist()
        reported = sampler.logprobs(logits, found, params)
        return [
            Sampled(token, logprobs, dead_ends.get(row, ""))
            for row, (token, logprobs) in enumerate(zip(found, reported, strict=True))
        ]

    def _forward(self, layout: StepLayout, tokens: Int64s, positions: Int32s) -> torch.Tensor:
        """Hidden states of all the step's tokens: (tokens, hidden)."""
        self._attention.plan(layout)
        return self._model(
            upload(tokens, self._device),
            upload(positions, self._device),
            self._attention,
        )

    def _lay_out(self, chunks: list[Chunk]) -> tuple[StepLayout, Int64s, Int32s]:
        """The step's layout, its tokens, (tokens,) int64, and their positions, (tokens,) int32."""
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
            query_starts=starts([chunk.count for chunk in chunks]),
            context_lens=contexts,
            page_starts=starts(page_counts),
            pages=np.concatenate(
                [
                    np.array(chunk.sequence.pages[:count], dtype=np.int32)
                    for chunk, count in zip(chunks, page_counts, strict=True)
                ]
            ),
            slots=np.concatenate(slots),
        )
        return layout, np.concatenate(tokens), np.concatenate(positions).astype(np.int32)
