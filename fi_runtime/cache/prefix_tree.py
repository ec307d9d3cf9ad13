"""Pages that hold the beginnings of sequences, kept for others that begin alike."""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Sequence

from fi_runtime.cache.pages import OutOfPages, PagePool


class Node:
    """A full page, after those of its parents."""

    __slots__ = ("children", "last_used", "page", "parent", "tokens", "users")

    def __init__(self, parent: "Node | None", tokens: tuple[int, ...], page: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.page = page
        self.children: dict[tuple[int, ...], Node] = {}
        self.users = 0
        """sequences that read it; those of a node are users of its parents too"""
        self.last_used = 0


class PrefixTree:
    """Hands out a pool's pages, and keeps those that sequences are done with until it needs them.

    Keys and values depend on a sequence's adapter, so that each adapter has a root of its own.

    A node that nobody uses counts as free: where the pool has no page left, the leaf that was used
    longest ago gives up its own.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._roots: defaultdict[int, Node] = defaultdict(lambda: Node(None, (), -1))
        self._unused = 0
        """nodes without users"""
        self._leaves: list[tuple[int, int, Node]] = []
        """a heap of leaves that had no users when they were put here, by their last use"""
        self._clock = itertools.count(1)
        self._tie = itertools.count()

    @property
    def usable(self) -> int:
        """Pages that sequences can hold in all."""
        return self._pool.usable

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return self._pool.free + self._unused

    def take(self, count: int) -> list[int]:
        """Take ``count`` pages, or none at all.

        Raises:
            OutOfPages: fewer are free.
        """
        if count > self.free:
            raise OutOfPages(f"{count} pages asked for, {self.free} of {self.usable} free")
        while self._pool.free < count:
            self._evict()
        return self._pool.take(count)

    def give_back(self, pages: list[int]) -> None:
        """Return pages that were taken and that no node has."""
        self._pool.give_back(pages)

    def match(self, tokens: Sequence[int], adapter: int = 0) -> list[Node]:
        """The nodes of the longest beginning that is there, computed with that adapter.

        Never of all the tokens: without the last one there is nothing to choose the next one from.
        The caller now uses them, and has to release them.
        """
        nodes: list[Node] = []
        node, size = self._roots[adapter], self._page_size
        for start in range(0, len(tokens) - size, size):
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            self._use(child)
            nodes.append(child)
            node = child
        return nodes

    def add(
        self, nodes: Sequence[Node], tokens: Sequence[int], page: int, adapter: int = 0
    ) -> Node:
        """Keep a page of the caller's, which has what follows ``nodes`` in the tokens.

        The caller uses ``nodes`` and now this one. Where there was such a node already it is that
        one, with a page of its own.
        """
        parent, size = nodes[-1] if nodes else self._roots[adapter], self._page_size
        key = tuple(tokens[len(nodes) * size : (len(nodes) + 1) * size])
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(parent, key, page)
            self._unused += 1
        self._use(node)
        return node

    def forget(self) -> None:
        """Give up all that nobody uses."""
        while self._unused:
            self._evict()

    def release(self, nodes: Sequence[Node]) -> None:
        """Use them no longer."""
        now = next(self._clock)
        # The last first, so that a parent is never older than its children.
        for node in reversed(nodes):
            node.users -= 1
            node.last_used = now
            if not node.users:
                self._unused += 1
                self._offer(node)

    def _use(self, node: Node) -> None:
        self._unused -= not node.users
        node.users += 1

    def _offer(self, node: Node) -> None:
        if node.children:
            return
        heapq.heappush(self._leaves, (node.last_used, next(self._tie), node))
        if len(self._leaves) > 2 * self.usable:  # most of them out of date
            self._leaves = [leaf for leaf in self._leaves if _is_unused_leaf(*leaf)]
            heapq.heapify(self._leaves)

    def _evict(self) -> None:
        """Give up the unused leaf that was used longest ago."""
        while True:
            leaf = heapq.heappop(self._leaves)
            if not _is_unused_leaf(*leaf):
                continue
            node, parent = leaf[-1], leaf[-1].parent
            assert parent is not None
            del parent.children[node.tokens]
            node.parent = None
            self._unused -= 1
            self._pool.give_back([node.page])
            # A root has no page to give up.
            if parent.parent is not None and not parent.users:
                self._offer(parent)
            return


def _is_unused_leaf(last_used: int, _: int, node: Node) -> bool:
    """Whether it still is what it was at that time: not used, grown or given up since."""
    return (
        node.last_used == last_used
        and node.parent is not None
        and not node.users
        and not node.children
    )
