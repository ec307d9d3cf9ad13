import math
from collections import deque

from fi_runtime.cache.prefix_tree import PrefixTree
from fi_runtime.engine.sequence import Chunk, Sequence

TILE = 32
"""tokens: what a step that is replayed is padded to, so that a chunk fills it"""
WEIGHTY_CONTEXT = 10_240
"""tokens of context whose attention takes a prompt's token as long as all else does: what steps of
the Llama-3.1-8B shape took on an H100, by tokens and context"""


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
        self._decoding: dict[int, Chunk] = {}
        """by slot, the next token alone of each running sequence: the same at every step"""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """oldest first"""
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        """of all that have been admitted for the first time"""
        self.num_reused_tokens = 0
        """of them, those whose keys and values were there"""

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; empty when there is nothing to do.

        Oldest sequence first, and so those that begin to run last.
        """
        budget, effort = self._step_tokens - len(self.running), math.inf
        # Prompts are computed one after another: only the youngest can be half done.
        half_done = bool(self.running) and self.running[-1].num_uncached > 1
        if len(self.running) > half_done:
            effort = self._chunk_tokens * (len(self.waiting) + half_done)
        chunks = []
        index = 0
        # A while loop, since preemption shortens the list behind the index.
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            # Written out, as is all that every step does for every sequence.
            length = len(sequence.tokens) + sequence.pending
            if length == sequence.max_length:
                continue  # its last token is on its way
            held = len(sequence.pages) * self._page_size
            if length > held and not self._hold_pages(sequence, length):
                continue
            if length - sequence.num_cached == 1:
                chunks.append(self._decoding[sequence.slot])
            else:
                count = _next_tokens(sequence, budget + 1, effort, len(chunks))
                chunks.append(self._chunk(sequence, count))
                budget -= count - 1
                effort -= count * _weight(sequence)
        total = sum(chunk.count for chunk in chunks) if self.waiting else 0
        while self.waiting and self._free_slots and budget > 0 and effort >= 1:
            sequence = self.waiting[0]
            if sequence.pending or not self._admit(sequence):
                break  # one that was set back is computed again once all its tokens are known
            self.waiting.popleft()
            self.running.append(sequence)
            count = _next_tokens(sequence, budget, effort, total)
            chunks.append(self._chunk(sequence, count, begins=True))
            total += count
            budget -= count
            effort -= count * _weight(sequence)
        return chunks

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence pages for all its tokens and a slot; false if there are none."""
        nodes = self._tree.match(sequence.tokens, sequence.adapter)
        needed = self._pages_for(len(sequence.tokens)) - len(nodes)
        if needed > self._tree.free:
            self._tree.release(nodes)
            return False
        sequence.pages = [*(node.page for node in nodes), *self._tree.take(needed)]
        sequence.nodes = nodes
        sequence.num_cached = len(nodes) * self._page_size
        sequence.slot = self._free_slots.pop()
        self._decoding[sequence.slot] = Chunk(sequence, 1, completes=True)
        if not sequence.num_generated:
            self.num_prompt_tokens += sequence.prompt_length
            self.num_reused_tokens += sequence.num_cached
        return True

    def _chunk(self, sequence: Sequence, count: int, begins: bool = False) -> Chunk:
        """A chunk, whose full pages others may use from now on."""
        if count > 1:
            self._keep(sequence, sequence.num_cached + count)
        return Chunk(sequence, count, count == sequence.num_uncached, begins)

    def _keep(self, sequence: Sequence, tokens: int) -> None:
        """Put the full pages of the first ``tokens`` into the tree, up to one that is there."""
        nodes = sequence.nodes
        for index in range(len(nodes), tokens // self._page_size):
            page = sequence.pages[index]
            node = self._tree.add(nodes, sequence.tokens, page, sequence.adapter)
            if node.page != page:
                # Computed twice at once. It goes on with its own: others read the other one.
                self._tree.release([node])
                return
            nodes.append(node)

    def _hold_pages(self, sequence: Sequence, length: int) -> bool:
        """See that every token of a running sequence has its page; false if it was preempted."""
        missing = self._pages_for(length) - len(sequence.pages)
        while missing > self._tree.free:
            youngest = self.running.pop()
            self._stop(youngest)
            self.waiting.appendleft(youngest)
            self.num_preemptions += 1
            if youngest is sequence:
                return False
        sequence.pages += self._tree.take(missing)
        return True

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
        del self._decoding[sequence.slot]
        sequence.pages, sequence.nodes, sequence.slot, sequence.num_cached = [], [], -1, 0

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
