"""Sequences, and what steps need of those that run, in columns that numpy takes at once."""

from itertools import count

import numpy as np
import numpy.typing as npt

from fi_runtime.attention.base import Int32s, Int64s
from fi_runtime.cache.prefix_tree import Node
from fi_runtime.engine import sampler
from fi_runtime.engine.guides import Guide
from fi_runtime.messages import SamplingParams

SequenceKey = tuple[bytes, int]
"""Front end and its number for the request."""

FIRST_PAGES = 64
"""that a slot has room for at first"""
NEW_TOKENS = 64
"""that a slot has room for before its sequence takes them"""
MOST_ENDS = 8
"""tokens that a slot has room for"""
NONE = -1
"""in a column of numbers that are not negative: there is none"""


class Sequence:
    """A prompt, what has been generated after it, and its place in the cache.

    While it runs its numbers are those of its slot.

    Args:
        prompt: its first tokens, at least one; the sequence's own from now on.
        end_ids: tokens that end it.
        guide: what its text has to match, as far as it has come.
        adapter: the number of the one that it is computed with; 0: none.
    """

    def __init__(
        self,
        key: SequenceKey,
        prompt: list[int],
        params: SamplingParams,
        end_ids: frozenset[int] = frozenset(),
        guide: Guide | None = None,
        adapter: int = 0,
    ) -> None:
        self.key = key
        self.params = params
        self.end_ids = end_ids
        self.guide = guide
        self.adapter = adapter
        self.prompt_length = len(prompt)
        self.max_length = self.prompt_length + params.max_tokens
        self.slot = NONE
        """its place among those that run"""
        self.nodes: list[Node] = []
        """of the prefix tree; the first of its pages are theirs"""
        self._tokens = prompt
        self._pending = 0
        self._slots: Slots | None = None
        """where it runs"""

    @property
    def looks_back(self) -> bool:
        """Whether all its tokens must be known here before the next one can be chosen.

        Since its parameters or its guide change logits by them.
        """
        params = self.params
        return (
            params.min_tokens > 0
            or bool(params.logit_bias or params.bad_tokens or params.guide)
            or params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )

    @property
    def tokens(self) -> list[int]:
        """Prompt, then output. Not to be changed."""
        self.take_new()
        return self._tokens

    @property
    def pages(self) -> list[int]:
        """Of the cache, that it holds."""
        return [] if self._slots is None else self._slots.pages(self.slot).tolist()

    @property
    def num_cached(self) -> int:
        """Leading tokens whose keys and values are in the cache.

        Or will be once the steps that were launched have been computed.
        """
        return 0 if self._slots is None else int(self._slots.cached[self.slot])

    @property
    def pending(self) -> int:
        """Tokens to follow that steps which were launched choose, and that are not known here."""
        return self._pending if self._slots is None else int(self._slots.pending[self.slot])

    @property
    def length(self) -> int:
        """Tokens, those pending among them."""
        return len(self.tokens) + self.pending

    @property
    def num_generated(self) -> int:
        """Output tokens that are known."""
        return len(self.tokens) - self.prompt_length

    @property
    def num_uncached(self) -> int:
        """Tokens to compute before the next one can be chosen: 1 while decoding."""
        return self.length - self.num_cached

    def take_new(self) -> None:
        """Make tokens its own that its slot has for it."""
        if self._slots is not None:
            self._tokens += self._slots.take_new(self.slot)

    def take_late(self, token: int) -> None:
        """Add a pending token that comes when it does not run any more."""
        assert self._slots is None
        self._tokens.append(token)
        self._pending -= 1

    def enter(self, slots: "Slots", slot: int) -> None:
        """Begin to run in a slot; all its tokens are known."""
        assert self._slots is None
        assert not self._pending
        self.slot, self._slots = slot, slots

    def leave(self) -> None:
        """Run no more, and wait for what is pending."""
        assert self._slots is not None
        self._tokens, self._pending = self.tokens, self.pending
        self.slot, self._slots = NONE, None


class Slots:
    """What is known of each sequence that runs, by slot.

    In columns, and not in the sequences: these lie all over the host's memory, and to fetch a
    little of each of hundreds takes longer than all else that it does for a step. Columns of other
    slots mean nothing.

    Args:
        most: sequences that run at a time.
        page_size: tokens in a page.
    """

    def __init__(self, most: int, page_size: int) -> None:
        self._page_size = page_size
        self._entries = count(1)
        self.sequences: list[Sequence | None] = [None] * most

        def column() -> Int64s:
            return np.zeros(most, dtype=np.int64)

        self.entries = column()
        """a number of its own each time that a sequence enters; 0: nobody is there"""
        self.front_ends: list[bytes] = []
        """that any sequence has ever come from"""
        self._owners: dict[bytes, int] = {}
        """places there"""
        self.owners, self.requests = column(), column()
        """its front end's place among these, and its number there"""
        self.known, self.pending, self.cached = column(), column(), column()
        """tokens: known here, to follow those, and in the cache; see ``Sequence``"""
        self.prompts, self.limits = column(), column()
        """tokens: of its prompt, and of all that it may have"""
        self.begun = column()
        """tokens that it had when it entered; the slot's last token is not one of them"""
        self.held = column()
        """tokens that its pages have room for"""
        self.adapters = column()
        self.logprobs = column()
        """that it wants to be told of with each token, or NONE"""
        self.looks_back = np.zeros(most, dtype=bool)
        self.ends: Int64s = np.zeros((most, MOST_ENDS), dtype=np.int64)
        """(slots, MOST_ENDS): tokens that end it, then NONE"""
        self.apart = np.zeros(most, dtype=bool)
        """whether there may be more to each of its tokens: a guide, logprobs, or too many ends"""
        self.knobs = np.zeros((4, most))
        """as ``sampler.draws_of`` takes them"""
        self.streams = np.zeros(most, dtype=np.uint64)
        """likewise"""
        self._pages: Int32s = np.zeros((most, FIRST_PAGES), dtype=np.int32)
        self._new: Int64s = np.zeros((most, NEW_TOKENS), dtype=np.int64)
        self._new_counts = column()

    def enter(self, slot: int, sequence: Sequence, pages: list[int], cached: int) -> None:
        """Have a sequence run.

        Args:
            pages: that it holds.
            cached: its leading tokens whose keys and values are there.
        """
        params, known = sequence.params, len(sequence.tokens)
        front_end, request = sequence.key
        sequence.enter(self, slot)
        self.sequences[slot] = sequence
        self.entries[slot] = next(self._entries)
        self.owners[slot], self.requests[slot] = self._owner(front_end), request
        self.known[slot] = self.begun[slot] = known
        self.pending[slot], self.cached[slot] = 0, cached
        self.prompts[slot], self.limits[slot] = sequence.prompt_length, sequence.max_length
        self.adapters[slot] = sequence.adapter
        self.logprobs[slot] = NONE if params.logprobs is None else params.logprobs
        self.looks_back[slot] = sequence.looks_back
        ends = [*sequence.end_ids]
        self.ends[slot] = NONE
        self.ends[slot, : len(ends)] = ends[:MOST_ENDS]
        self.apart[slot] = (
            sequence.guide is not None or params.logprobs is not None or len(ends) > MOST_ENDS
        )
        self.knobs[:, slot] = sampler.knobs_of(params)
        self.streams[slot] = sampler.streams_of(np.array([params.seed], dtype=np.uint64))[0]
        self._new_counts[slot] = 0
        self._make_room(len(pages))
        self._pages[slot, : len(pages)] = pages
        self.held[slot] = len(pages) * self._page_size

    def at(self, slot: int) -> Sequence:
        """The sequence that runs there."""
        sequence = self.sequences[slot]
        assert sequence is not None
        return sequence

    def leave(self, sequence: Sequence) -> None:
        """Have a sequence run no more."""
        slot = sequence.slot
        sequence.leave()
        self.sequences[slot] = None
        self.entries[slot] = 0

    def hold(self, slots: Int64s, pages: list[int]) -> None:
        """Give each of some sequences a page more: (sequences,) each."""
        held = self.held[slots]
        indices = held // self._page_size
        self._make_room(int(indices.max(initial=0)) + 1)
        self._pages[slots, indices] = pages
        self.held[slots] = held + self._page_size

    def _make_room(self, pages: int) -> None:
        """For so many of one sequence."""
        if (more := pages - self._pages.shape[1]) > 0:
            self._pages = np.pad(self._pages, ((0, 0), (0, more + pages)))

    def pages(self, slot: int, total: int | None = None) -> Int32s:
        """The first pages of the sequence there, or all that it has: (total,)."""
        return self._pages[slot, : self.held[slot] // self._page_size if total is None else total]

    def page(self, slots: Int64s, indices: Int32s) -> Int32s:
        """One page of each sequence: (sequences,)."""
        pages: Int32s = self._pages[slots, indices]
        return pages

    def append(self, slots: Int64s, tokens: Int64s) -> None:
        """Add one token that is known now to each of some sequences: (sequences,) each."""
        counts = self._new_counts[slots]
        if (full := counts == NEW_TOKENS).any():
            for slot in slots[full].tolist():
                self.at(slot).take_new()
            counts = self._new_counts[slots]
        self._new[slots, counts] = tokens
        self._new_counts[slots] += 1
        self.known[slots] += 1

    def take_new(self, slot: int) -> list[int]:
        """The tokens that were added and that nobody has taken."""
        total, self._new_counts[slot] = int(self._new_counts[slot]), 0
        tokens: list[int] = self._new[slot, :total].tolist()
        return tokens

    def ended(self, slots: Int64s, tokens: Int64s) -> npt.NDArray[np.bool_]:
        """Whether a token ends its sequence, which is not ``apart``: (sequences,) each."""
        found: npt.NDArray[np.bool_] = (self.ends[slots] == tokens[:, None]).any(axis=1)
        return found

    def _owner(self, front_end: bytes) -> int:
        if front_end not in self._owners:
            self._owners[front_end] = len(self.front_ends)
            self.front_ends.append(front_end)
        return self._owners[front_end]


class Chunks:
    """The tokens that one step computes: of each sequence those after the ones in the cache.

    Args:
        slots: (sequences,), oldest first, so that those that begin to run are the last.
        counts: (sequences,), of tokens, at least one each.
        begins: whether any sequence begins to run, or does so again.
    """

    def __init__(self, slots: Int64s, counts: Int64s, begins: bool = False) -> None:
        self.slots = slots
        self.counts = counts
        self.begins = begins

    def __len__(self) -> int:
        return len(self.slots)
