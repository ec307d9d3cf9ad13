from dataclasses import dataclass, field

from fi_runtime.engine.guides import Guide
from fi_runtime.messages import SamplingParams

SequenceKey = tuple[bytes, int]
"""Front end and its number for the request."""


@dataclass(eq=False)
class Sequence:
    """A prompt, what has been generated after it, and its place in the cache."""

    key: SequenceKey
    tokens: list[int]
    """prompt, then output"""
    params: SamplingParams
    end_ids: frozenset[int] = frozenset()
    """tokens that end it"""
    guide: Guide | None = None
    """what its text has to match, as far as it has come"""
    prompt_length: int = field(init=False)
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    """leading tokens whose keys and values are in the cache"""

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def num_uncached(self) -> int:
        """Tokens to compute before the next one can be chosen: 1 while decoding."""
        return len(self.tokens) - self.num_cached


@dataclass(frozen=True)
class Chunk:
    """The tokens of one sequence that one step computes: ``count`` from ``sequence.num_cached``."""

    sequence: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """Whether the step computes the sequence's last token, so that a next one is chosen."""
        return self.count == self.sequence.num_uncached
