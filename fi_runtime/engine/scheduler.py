from collections import deque

from fi_runtime.cache.pages import PagePool
from fi_runtime.engine.sequence import Chunk, Sequence


class Scheduler:
    """Chooses what each step computes: first come, first served, within pages and budget.

    Sequences that decode always get their token; prompts share what is left of the step's budget,
    so that a long one is computed in chunks beside running streams. A sequence is admitted with
    the pages of all its tokens. When a decoding one needs a page and none is free, the youngest
    running sequence gives up its pages and goes back to the head of the queue, to be computed
    again; since any sequence alone fits the pool, the oldest always moves on.

    It counts on tokens that launched steps will have chosen: a sequence moves on before its last
    token is known here.
    """

    def __init__(
        self, pool: PagePool, page_size: int, max_sequences: int, step_tokens: int
    ) -> None:
        self._pool = pool
        self._page_size = page_size
        self._step_tokens = step_tokens
        self._free_slots = list(reversed(range(max_sequences)))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """oldest first"""
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, oldest sequence first; empty when there is nothing to do."""
        budget = self._step_tokens - len(self.running)
        chunks = []
        index = 0
        # A while loop, since preemption shortens the list behind the index.
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            length = sequence.length
            if length == sequence.max_length:
                continue  # its last token is on its way
            count = min(length - sequence.num_cached, budget + 1)
            if count and self._hold_pages(sequence, length):
                chunks.append(Chunk(sequence, count))
                budget -= count - 1
        while self.waiting and self._free_slots and budget > 0:
            sequence = self.waiting[0]
            needed = self._pages_for(len(sequence.tokens))
            # One that was set back is computed again once all its tokens are known.
            if needed > self._pool.free or sequence.pending:
                break
            self.waiting.popleft()
            sequence.pages = self._pool.take(needed)
            sequence.slot = self._free_slots.pop()
            self.running.append(sequence)
            count = min(sequence.num_uncached, budget)
            chunks.append(Chunk(sequence, count))
            budget -= count
        return chunks

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def _hold_pages(self, sequence: Sequence, length: int) -> bool:
        """See that every token of a running sequence has its page; false if it was preempted."""
        if length <= len(sequence.pages) * self._page_size:
            return True
        missing = self._pages_for(length) - len(sequence.pages)
        while missing > self._pool.free:
            youngest = self.running.pop()
            self._stop(youngest)
            self.waiting.appendleft(youngest)
            self.num_preemptions += 1
            if youngest is sequence:
                return False
        sequence.pages += self._pool.take(missing)
        return True

    def _stop(self, sequence: Sequence) -> None:
        """Take back what a running sequence holds.

        RACE: a step that was launched may still write to its pages. Whoever has them next is
        computed by a later step, and so after it.
        """
        self._pool.give_back(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot, sequence.num_cached = [], -1, 0

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_size)
