"""What steps compute, in arrays; a decode step's are those of the one before it, updated."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fi_runtime.attention.base import Int32s, Int64s, StepLayout, starts
from fi_runtime.engine import sampler
from fi_runtime.engine.sequence import Chunks, Sequence, Slots

NEXT = np.int64(-1)
"""less a slot: the token chosen last there, as ``embed`` takes it"""


@dataclass(slots=True)
class Batch:
    """One step's tokens, and the sequences that get one after it, in the order of the layout.

    To be launched before the next one is asked for, which may be made of it.
    """

    layout: StepLayout
    tokens: Int64s
    """(tokens,), as ``embed`` takes them"""
    adapters: Int64s | None
    """(tokens,), each one's; None: none has any"""
    last_rows: Int64s
    """(sequences,): the token of the step that each one's follows"""
    slots: Int64s
    """(sequences,)"""
    entries: Int64s
    """(sequences,): see ``Slots``"""
    sequences: list[Sequence]
    """that get a token"""
    indices: npt.NDArray[np.uint64]
    """(sequences,), of the token in each one's output"""
    draws: torch.Tensor
    """of ``sampler.draws_of``"""
    filtered: bool
    """whether any sequence has a top_k, top_p or min_p"""
    decodes: bool
    """whether each sequence computes one token and gets one"""
    looks_back: bool
    """whether any sequence's next token is chosen by those before it"""
    logprobs: dict[int, int]
    """of rows that ask for them, as ``sampler.logprobs`` takes them"""


class Batches:
    """Makes the batches of steps, one after another.

    Args:
        slots: of the sequences.
        page_size: tokens in a page.
    """

    def __init__(self, slots: Slots, page_size: int) -> None:
        self._slots = slots
        self._page_size = page_size
        self._last: Batch | None = None
        """if it decodes"""
        self._scheduled: Int64s = np.zeros(0, dtype=np.int64)
        """its slots, as they were scheduled"""
        self._streams = np.zeros(0, dtype=np.uint64)
        """of ``sampler.streams_of``, for each of its sequences"""

    def of(self, chunks: Chunks) -> Batch:
        """The batch of a step."""
        last, self._last = self._last, None  # until this one is made
        # One that begins again, with other pages, may have been there before.
        if last is None or chunks.begins or not np.array_equal(chunks.slots, self._scheduled):
            batch = self._new(chunks)
        else:
            batch = self._next(last)
        self._last, self._scheduled = batch if batch.decodes else None, chunks.slots
        return batch

    def _next(self, batch: Batch) -> Batch:
        """Of the same sequences, each with the token that it got: the last batch, changed."""
        layout, slots = batch.layout, self._slots
        page_starts, pages = layout.page_starts, layout.pages
        # A page more where the last one was full.
        [grown] = np.nonzero(layout.context_lens % np.int32(self._page_size) == 0)
        if len(grown):
            ends = page_starts[grown + 1]
            new = slots.page(batch.slots[grown], ends - page_starts[grown])
            pages = _inserted(pages, ends, new)
            more = np.zeros_like(page_starts)
            more[grown + 1] = 1
            page_starts = page_starts + more.cumsum(dtype=np.int32)
        contexts = layout.context_lens + np.int32(1)
        batch.layout = StepLayout(layout.query_starts, contexts, page_starts, pages)
        batch.tokens = NEXT - batch.slots
        batch.indices += np.uint64(1)
        batch.draws.numpy()[-1] = sampler.keys(self._streams, batch.indices).view(np.float64)
        return batch

    def _new(self, chunks: Chunks) -> Batch:
        slots = self._slots
        contexts = slots.cached[chunks.slots] + chunks.counts
        order = _turns(contexts, chunks.counts)
        all_slots, counts, contexts = chunks.slots[order], chunks.counts[order], contexts[order]
        cached = contexts - counts
        lengths = slots.known[all_slots] + slots.pending[all_slots]
        # Only pages that hold context; a chunked prompt owns more than it has filled.
        page_counts = -(-contexts // self._page_size)
        numbers = all_slots.tolist()
        pages = [
            slots.pages(slot, total)
            for slot, total in zip(numbers, page_counts.tolist(), strict=True)
        ]
        query_starts = starts(counts)
        tokens = np.repeat(NEXT - all_slots, counts)
        # What a sequence began to run with is known here alone.
        for row in np.flatnonzero(cached < slots.begun[all_slots]).tolist():
            first, last = query_starts[row], query_starts[row + 1]
            start = int(cached[row])
            known = slots.at(numbers[row]).tokens
            tokens[first:last] = known[start : start + int(last - first)]
        completes = contexts == lengths
        own = all_slots[completes]
        indices = (lengths - slots.prompts[all_slots])[completes].astype(np.uint64)
        self._streams = slots.streams[own]
        draws = sampler.draws_of(slots.knobs[:, own], self._streams, indices)
        wanted = slots.logprobs[own]
        adapters = slots.adapters[all_slots]
        return Batch(
            layout=StepLayout(
                query_starts,
                contexts.astype(np.int32),
                starts(page_counts),
                np.concatenate(pages),
            ),
            tokens=tokens,
            adapters=np.repeat(adapters, counts) if adapters.any() else None,
            last_rows=(query_starts[1:] - 1)[completes].astype(np.int64),
            slots=own,
            entries=slots.entries[own],
            sequences=[slots.at(slot) for slot in own.tolist()],
            indices=indices,
            draws=draws,
            filtered=sampler.filters(draws),
            decodes=len(tokens) == len(own),
            looks_back=bool(slots.looks_back[own].any()),
            logprobs={row: int(wanted[row]) for row in np.flatnonzero(wanted >= 0).tolist()},
        )


def _inserted(array: Int32s, before: Int32s, new: Int32s) -> Int32s:
    """The array with a number more before each of some of its places, which rise.

    numpy's own takes twice as long, since it is made for more than that.
    """
    result = np.empty(len(array) + len(new), dtype=np.int32)
    first = 0
    for count, (place, number) in enumerate(zip(before.tolist(), new.tolist(), strict=True)):
        result[first + count : place + count] = array[first:place]
        result[place + count] = number
        first = place
    result[first + len(new) :] = array[first:]
    return result


def _turns(contexts: Int64s, counts: Int64s) -> Int64s:
    """The order of sequences: several tokens before one, as a layout has them, longest ones first.

    Attention takes them in turn: it would else end with few of its processors at work.
    """
    order: Int64s = np.lexsort((-contexts, counts == 1))
    return order
