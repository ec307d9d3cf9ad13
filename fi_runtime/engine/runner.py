"""Computes steps: fills their tensors, runs the model and chooses the tokens that follow."""

from dataclasses import dataclass

import numpy as np
import torch

from fi_runtime.attention.base import Attention, Int32s, Int64s, StepLayout, starts
from fi_runtime.engine import sampler
from fi_runtime.engine.download import Download
from fi_runtime.engine.guides import guided
from fi_runtime.engine.logit_edits import edited
from fi_runtime.engine.sequence import Chunk, Sequence
from fi_runtime.engine.slots import Slots
from fi_runtime.engine.step_graphs import StepGraphs
from fi_runtime.kernels import sampling
from fi_runtime.messages import TokenLogprob
from fi_runtime.models import Decoder
from fi_runtime.upload import upload


@dataclass(frozen=True)
class Launched:
    """A step that the device computes, or has computed."""

    sequences: list[Sequence]
    """those that get a token"""
    dead_ends: dict[int, str]
    """of rows whose guides let no token follow, and why; their tokens mean nothing"""
    _tokens: Download
    _logprobs: sampler.Logprobs | None

    def wait(self) -> tuple[list[int], list[list[TokenLogprob] | None]]:
        """Each sequence's token and, where it asked for them, its logprobs, once they are here."""
        tokens: list[int] = self._tokens.wait().tolist()
        if self._logprobs is None:
            return tokens, [None] * len(tokens)
        return tokens, self._logprobs.wait(tokens)


class Runner:
    """Launches steps, each of which may count on tokens that those before it choose.

    Args:
        last_tokens: (slots + 1,), int64: where the token chosen last in each slot is kept.
        graphs: that steps are replayed from.
    """

    def __init__(
        self,
        model: Decoder,
        attention: Attention,
        page_size: int,
        last_tokens: torch.Tensor,
        graphs: StepGraphs | None = None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._page_size = page_size
        self._device = model.embedding.device
        self._graphs = graphs or StepGraphs()
        self._slots = Slots(len(last_tokens) - 1)
        self._last_tokens = last_tokens

    @property
    def runs_ahead(self) -> bool:
        """Whether a step is computed while the host goes on."""
        return self._device.type == "cuda"

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> Launched:
        """Have the chunks computed, and a token chosen for each that completes its sequence."""
        chunks = sorted(chunks, key=_turn)
        layout, tokens = self._lay_out(chunks)
        adapters = self._adapters(chunks)
        sequences = [chunk.sequence for chunk in chunks if chunk.completes]
        if not sequences:
            self._forward(layout, tokens, adapters)
            return Launched([], {}, Download(torch.empty(0, dtype=torch.int64)), None)
        slots = np.array([sequence.slot for sequence in sequences], dtype=np.int64)
        draws = self._slots.draws(sequences, slots)
        decoding = len(tokens) == len(chunks) == len(sequences)
        graphs = self._graphs.decode if decoding else None
        if graphs is not None and graphs.fits(len(chunks)):
            logits = graphs.forward(layout, tokens, slots, draws, adapters)
        else:
            graphs = None
            hidden = self._forward(layout, tokens, adapters)
            completing = np.array([chunk.completes for chunk in chunks], dtype=bool)
            rows = (layout.query_starts[1:] - 1)[completing].astype(np.int64)
            logits = self._model.logits(hidden[upload(rows, self._device)])
        wanted, dead_ends = logits, dict[int, str]()
        if any(sequence.looks_back for sequence in sequences):
            wanted = edited(logits, sequences)
            guides = [sequence.guide for sequence in sequences]
            if any(guides):
                wanted, dead_ends = guided(logits, wanted, guides)
        if graphs is not None and wanted is logits:
            chosen = graphs.choose(sampler.filters(draws), len(sequences))
        else:
            there = sampling.TokenSlots(self._last_tokens, upload(slots, self._device))
            chosen = sampler.choose(wanted, draws, there)
        return Launched(
            sequences,
            dead_ends,
            Download(chosen),
            sampler.logprobs(logits, chosen, [one.params.logprobs for one in sequences]),
        )

    def _forward(self, layout: StepLayout, tokens: Int64s, adapters: Int64s | None) -> torch.Tensor:
        """Hidden states of all the step's tokens: (tokens, hidden)."""
        graphs = self._graphs
        if graphs.tokens is not None and graphs.tokens.fits(layout):
            return graphs.tokens.forward(layout, tokens, adapters)
        if graphs.pieces is not None and graphs.pieces.fits(len(tokens)):
            return graphs.pieces.forward(layout, tokens, adapters)
        self._attention.plan(layout)
        there = None if adapters is None else upload(adapters, self._device)
        uploaded = upload(tokens, self._device)
        return self._model(uploaded, self._last_tokens, self._attention, there)

    def _adapters(self, chunks: list[Chunk]) -> Int64s | None:
        """The adapter of each token; None if none has any."""
        if not self._model.adapters or not any(chunk.sequence.adapter for chunk in chunks):
            return None
        each = np.array([chunk.sequence.adapter for chunk in chunks], dtype=np.int64)
        return np.repeat(each, [chunk.count for chunk in chunks])

    def _lay_out(self, chunks: list[Chunk]) -> tuple[StepLayout, Int64s]:
        """The step's layout and its tokens, (tokens,) int64, as ``embed`` takes them."""
        tokens: list[int] = []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.num_cached
            if start == len(sequence.tokens):
                tokens.append(-1 - sequence.slot)
            else:
                tokens += sequence.tokens[start : start + chunk.count]
        counts: Int32s = np.array([chunk.count for chunk in chunks], dtype=np.int32)
        cached: Int32s = np.array([chunk.sequence.num_cached for chunk in chunks], dtype=np.int32)
        contexts = cached + counts
        # Only pages that hold context; a chunked prompt owns more than it has filled.
        page_counts = -(-contexts // self._page_size)
        layout = StepLayout(
            query_starts=starts(counts),
            context_lens=contexts,
            page_starts=starts(page_counts),
            pages=self._slots.pages([chunk.sequence for chunk in chunks], page_counts.tolist()),
        )
        return layout, np.array(tokens, dtype=np.int64)


def _turn(chunk: Chunk) -> tuple[bool, int]:
    """Several tokens before one, as a layout has them, and the longest context first.

    Attention takes them in turn: it would else end with few of its processors at work.
    """
    return chunk.count == 1, -(chunk.sequence.num_cached + chunk.count)
