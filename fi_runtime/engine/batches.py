"""What steps compute, in arrays; a decode step's are those of the one before it, updated."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from fi_runtime.attention.base import Int32s, Int64s, StepLayout, starts
from fi_runtime.engine import sampler
from fi_runtime.engine.sequence import Chunk, Sequence
from fi_runtime.engine.slots import Slots


@dataclass(frozen=True)
class Batch:
    """One step's tokens, and the sequences that get one after it, in the order of the layout."""

    layout: StepLayout
    tokens: Int64s
    """(tokens,), as ``embed`` takes them"""
    adapters: Int64s | None
    """(tokens,), each one's; None: none has any"""
    sequences: list[Sequence]
    """that get a token"""
    last_rows: Int64s
    """(sequences,): the token of the step that each one's follows"""
    slots: Int64s
    """(sequences,)"""
    indices: npt.NDArray[np.uint64]
    """(sequences,), of the token in each one's output"""
    draws: torch.Tensor
    """of ``sampler.draws_of``; the next batch's, too, once that has been made"""
    filtered: bool
    """whether any sequence has a top_k, top_p or min_p"""
    decodes: bool
    """whether each sequence computes one token and gets one"""
    looks_back: bool
    """whether any sequence's next token is chosen by those before it"""
    logprobs: list[int | None]
    """(sequences,), as ``sampler.logprobs`` takes them"""


class Batches:
    """Makes the batches of steps, one after another.

    Args:
        max_sequences: that run at a time.
        page_size: tokens in a page.
    """

    def __init__(self, max_sequences: int, page_size: int) -> None:
        self._slots = Slots(max_sequences)
        self._page_size = page_size
        self._last: Batch | None = None
        """if it decodes"""
        self._scheduled: list[Sequence] = []
        """its sequences, as they were scheduled"""
        self._views: list[Int32s] = []
        """the pages of each, in its order"""
        self._seeds = np.zeros(0, dtype=np.uint64)
        """of each"""
        self._following: Int64s = np.zeros(0, dtype=np.int64)
        """the token that each gets, as ``embed`` takes it"""

    def of(self, chunks: list[Chunk]) -> Batch:
        """The batch of a step, which is launched before that of the next is asked for.

        Args:
            chunks: as they were scheduled: those of sequences that begin to run are the last.
        """
        scheduled = [chunk.sequence for chunk in chunks]
        last, self._last = self._last, None  # until this one is made
        # One that begins again, with other pages, may have been there before.
        if last is not None and scheduled == self._scheduled and not chunks[-1].begins:
            batch = self._next(last)
        else:
            batch = self._new(chunks)
        self._last, self._scheduled = batch if batch.decodes else None, scheduled
        return batch

    def _next(self, last: Batch) -> Batch:
        """Of the same sequences, each with the token that it got."""
        contexts = last.layout.context_lens + np.int32(1)
        page_counts = self._page_counts(contexts)
        page_starts, pages = last.layout.page_starts, last.layout.pages
        grown = np.flatnonzero(page_counts > np.diff(page_starts)).tolist()
        if grown:
            for row in grown:
                self._views[row] = self._slots.pages(last.sequences[row], int(page_counts[row]))
            page_starts, pages = starts(page_counts), np.concatenate(self._views)
        indices = last.indices + np.uint64(1)
        last.draws.numpy()[-1] = sampler.keys(self._seeds, indices).view(np.float64)
        return replace(
            last,
            layout=StepLayout(last.layout.query_starts, contexts, page_starts, pages),
            tokens=self._following,
            indices=indices,
        )

    def _new(self, chunks: list[Chunk]) -> Batch:
        chunks = sorted(chunks, key=_turn)
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
        page_counts = self._page_counts(contexts)
        self._views = [
            self._slots.pages(chunk.sequence, count)
            for chunk, count in zip(chunks, page_counts.tolist(), strict=True)
        ]
        query_starts = starts(counts)
        layout = StepLayout(
            query_starts, contexts, starts(page_counts), np.concatenate(self._views)
        )
        completes = np.array([chunk.completes for chunk in chunks], dtype=bool)
        sequences = [chunk.sequence for chunk in chunks if chunk.completes]
        slots = np.array([sequence.slot for sequence in sequences], dtype=np.int64)
        # Of the tokens to come, those pending counted.
        indices = np.array([one.length - one.prompt_length for one in sequences], dtype=np.uint64)
        knobs, self._seeds = self._slots.drawing(slots)
        draws = sampler.draws_of(knobs, self._seeds, indices)
        self._following = -1 - slots
        return Batch(
            layout=layout,
            tokens=np.array(tokens, dtype=np.int64),
            adapters=_adapters(chunks),
            sequences=sequences,
            last_rows=(query_starts[1:] - 1)[completes].astype(np.int64),
            slots=slots,
            indices=indices,
            draws=draws,
            filtered=sampler.filters(draws),
            decodes=len(tokens) == len(chunks) == len(sequences),
            looks_back=any(sequence.looks_back for sequence in sequences),
            logprobs=[sequence.params.logprobs for sequence in sequences],
        )

    def _page_counts(self, contexts: Int32s) -> Int32s:
        return -(-contexts // np.int32(self._page_size))


def _turn(chunk: Chunk) -> tuple[bool, int]:
    """Several tokens before one, as a layout has them, and the longest context first.

    Attention takes them in turn: it would else end with few of its processors at work.
    """
    return chunk.count == 1, -(chunk.sequence.num_cached + chunk.count)


def _adapters(chunks: list[Chunk]) -> Int64s | None:
    """The adapter of each token; None if none has any."""
    if not any(chunk.sequence.adapter for chunk in chunks):
        return None
    each = np.array([chunk.sequence.adapter for chunk in chunks], dtype=np.int64)
    return np.repeat(each, [chunk.count for chunk in chunks])
