import math
from collections import deque

import numpy as np

from fi_runtime.attention.base import Int64s
from fi_runtime.cache.prefix_tree import PrefixTree
from fi_runtime.engine.sequence import Chunks, Sequence, Slots

TILE = 128
"""tokens: a step with a part of a prompt has a multiple of so many. Products of matrices compute
rows in tiles: a layer's of the Llama-3.1-8B shape took 179 us with 128 on an H100, 204 with 256,
302 with 512, and 431 with 448."""
WEIGHTY_CONTEXT = 7_500
"""tokens of context at which a part of a prompt has half as many tokens as at its beginning: by
what steps of that shape took there, by tokens and context"""


class Scheduler:
    """Chooses what each step computes: first come, first served, within pages and budget.

    Sequences that decode always get their token; prompts share what is left of the step's budget,
    so that a long one is computed in chunks beside running streams. A step that streams wait for is
    kept short: it has so many tokens for each prompt that waits, fewer where attention makes them
    slow, but many for many prompts, when more is lost by waiting than by slow streams.

    A sequence is admitted with the pages of all its tokens. When a decoding one needs a page and
    none is free, the youngest running sequence gives up its pages and goes back to the head of the
    queue, to be computed again; since any sequence alone fits the pool, the oldest always moves on.

    What a prompt begins with is not computed where the prefix tree has it, from an earlier sequence
    or from one that computes it in the same step: each layer writes the keys and values of all the
    step's tokens before it reads any.

    It counts on tokens that launched steps will have chosen: a sequence moves on before its last
    token is known here.

    Args:
        step_tokens: that a step computes at most, as many as sequences at least.
        chunk_tokens: of prompts, for each one that waits, in a step beside decoding sequences; of
            a prompt's beginning, and fewer the longer the context is that they attend to. As many
            more as fill the step's last tile.
    """

    def __init__(
        self,
        tree: PrefixTree,
        page_size: int,
        max_sequences: int,
        step_tokens: int,
        chunk_tokens: int,
    ) -> None:
        self._tree = tree
        self._page_size = page_size
        self._step_tokens = step_tokens
        self._chunk_tokens = chunk_tokens
        self._free_slots = list(reversed(range(max_sequences)))
        self.slots = Slots(max_sequences, page_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """oldest first"""
        self._order: Int64s | None = None
        """their slots; None: to be looked up"""
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        """of all that have been admitted for the first time"""
        self.num_reused_tokens = 0
        """of them, those whose keys and values were there"""

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Chunks:
        """The next step's chunks; none when there is nothing to do."""
        slots = self.slots
        order = self._running_slots()
        lengths = slots.known[order] + slots.pending[order]
        # Of the others the last token is on its way.
        goes_on = lengths < slots.limits[order]
        if self._hold_pages(order[goes_on & (lengths > slots.held[order])]):
            return self.schedule()  # of those that are left
        counts = np.ones(len(order), dtype=np.int64)
        budget, effort, total = self._step_tokens - len(order), math.inf, 0
        # Prompts are computed one after another: none begins behind one that is half done.
        half_done = bool(len(order)) and int(lengths[-1] - slots.cached[order[-1]]) > 1
        if len(order) > half_done:
            effort = self._chunk_tokens * (len(self.waiting) + half_done)
        if half_done:
            youngest = self.running[-1]
            total = int(goes_on[:-1].sum())
            counts[-1] = _next_tokens(youngest, budget + 1, effort, total)
            budget -= int(counts[-1]) - 1
            effort -= int(counts[-1]) * _weight(youngest)
            self._share(youngest, int(counts[-1]))
            half_done = int(counts[-1]) < youngest.num_uncached
        chunks = Chunks(order[goes_on], counts[goes_on])
        if half_done or not self.waiting:
            return chunks
        return self._begin(chunks, budget, effort)

    def _begin(self, chunks: Chunks, budget: int, effort: float) -> Chunks:
        """These chunks, and those of sequences that begin to run beside them."""
        slots, counts = [], []
        total = int(chunks.counts.sum())
        while self.waiting and self._free_slots and budget > 0 and effort >= 1:
            sequence = self.waiting[0]
            if sequence.pending or not self._admit(sequence):
                break  # one that was set back is computed again once all its tokens are known
            self.waiting.popleft()
            self.running.append(sequence)
            self._order = None
            count = _next_tokens(sequence, budget, effort, total)
            self._share(sequence, count)
            slots.append(sequence.slot)
            counts.append(count)
            total += count
            budget -= count
            effort -= count * _weight(sequence)
            if count < sequence.num_uncached:
                break
        if not slots:
            return chunks
        return Chunks(
            np.concatenate((chunks.slots, np.array(slots, dtype=np.int64))),
            np.concatenate((chunks.counts, np.array(counts, dtype=np.int64))),
            begins=True,
        )

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def _running_slots(self) -> Int64s:
        if self._order is None:
            self._order = np.array([one.slot for one in self.running], dtype=np.int64)
        return self._order

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence pages for all its tokens and a slot; false if there are none."""
        nodes = self._tree.match(sequence.tokens, sequence.adapter)
        needed = self._pages_for(len(sequence.tokens)) - len(nodes)
        if needed > self._tree.free:
            self._tree.release(nodes)
            return False
        pages = [*(node.page for node in nodes), *self._tree.take(needed)]
        sequence.nodes = nodes
        cached = len(nodes) * self._page_size
        self.slots.enter(self._free_slots.pop(), sequence, pages, cached)
        if not sequence.num_generated:
            self.num_prompt_tokens += sequence.prompt_length
            self.num_reused_tokens += cached
        return True

    def _share(self, sequence: Sequence, count: int) -> None:
        """Let others use what the next tokens fill, from now on."""
        if count > 1:
            self._keep(sequence, sequence.num_cached + count)

    def _keep(self, sequence: Sequence, tokens: int) -> None:
        """Put the full pages of the first ``tokens`` into the tree, up to one that is there."""
        nodes = sequence.nodes
        if len(nodes) == tokens // self._page_size:
            return
        pages = sequence.pages
        for index in range(len(nodes), tokens // self._page_size):
            page = pages[index]
            node = self._tree.add(nodes, sequence.tokens, page, sequence.adapter)
            if node.page != page:
                # Computed twice at once. It goes on with its own: others read the other one.
                self._tree.release([node])
                return
            nodes.append(node)

    def _hold_pages(self, slots: Int64s) -> bool:
        """Get each of these sequences a page more, for the one token that it gets.

        Where there are not enough, the youngest ones stop; whether any has.
        """
        stopped = False
        while len(slots) > self._tree.free:
            youngest = self.running.pop()
            slots = slots[slots != youngest.slot]
            self._stop(youngest)
            self.waiting.appendleft(youngest)
            self.num_preemptions += 1
            stopped = True
        if len(slots):
            self.slots.hold(slots, self._tree.take(len(slots)))
        return stopped

    def _stop(self, sequence: Sequence) -> None:
        """Take back what a running sequence holds.

        RACE: a step that was launched may still write to its pages. Whoever has them next is
        computed by a later step, and so after it.
        """
        # The token that is chosen last is in no page yet, and those pending are not known.
        self._keep(sequence, min(sequence.num_cached, len(sequence.tokens)))
        self._tree.give_back(sequence.pages[len(sequence.nodes) :])
        self._tree.release(sequence.nodes)
        self._free_slots.append(sequence.slot)
        self.slots.leave(sequence)
        self._order = None
        sequence.nodes = []

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_size)


def _next_tokens(sequence: Sequence, room: int, effort: float, before: int) -> int:
    """How many of a prompt's next tokens a step computes; at least one.

    Args:
        room: for so many.
        effort: that may be spent, in first tokens of a prompt.
        before: tokens that the step has already.
    """
    most = min(sequence.num_uncached, room)
    affordable = max(1, int(min(effort / _weight(sequence), most)))
    if affordable == most:
        return most
    return min(most, -(-(before + affordable) // TILE) * TILE - before)


def _weight(sequence: Sequence) -> float:
    """How much longer a prompt's next token takes than its first."""
    return 1 + sequence.num_cached / WEIGHTY_CONTEXT
