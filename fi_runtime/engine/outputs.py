"""What a step gave its sequences."""

from collections.abc import Iterator
from typing import NamedTuple

from fi_runtime.attention.base import Int64s
from fi_runtime.engine.sequence import SequenceKey
from fi_runtime.messages import Output


class Tokens(NamedTuple):
    """One token each for sequences that go on, of which there is nothing else to say."""

    owners: Int64s
    """(sequences,): places of their front ends among those of ``Outputs``"""
    requests: Int64s
    """(sequences,): their numbers there"""
    tokens: Int64s
    """(sequences,)"""


class Outputs:
    """What a step gave each sequence that has anything new: by key, or in columns.

    Args:
        front_ends: that sequences come from.
    """

    def __init__(self, front_ends: list[bytes]) -> None:
        self.front_ends = front_ends
        self.columns: Tokens | None = None
        """of most"""
        self.others: list[tuple[SequenceKey, Output]] = []

    def __len__(self) -> int:
        return len(self.others) + (0 if self.columns is None else len(self.columns.tokens))

    def __iter__(self) -> Iterator[tuple[SequenceKey, Output]]:
        """All of them, one by one."""
        columns = (column.tolist() for column in self.columns or ())
        for owner, request, token in zip(*columns, strict=True):
            yield (self.front_ends[owner], request), Output(request, [token])
        yield from self.others
