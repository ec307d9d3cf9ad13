from dataclasses import dataclass, field

from fi_runtime.cache.prefix_tree import Node
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
    adapter: int = 0
    """the number of the one that it is computed with; 0: none"""
    slot: int = -1
    """its place among those that run; -1 while it waits"""
    pages: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    """of the prefix tree; the first of its pages are theirs"""
    num_cached: int = 0
    """leading tokens whose keys and values are in the cache, or will be once the steps that were
    launched have been computed"""
    pending: int = 0
    """tokens to follow that steps which were launched choose, and that are not known here yet"""
    prompt_length: int = field(init=False)
    max_length: int = field(init=False)
    looks_back: bool = field(init=False)
    """whether all its tokens must be known here before the next one can be chosen, since its
    parameters or its guide change logits by them"""

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        params = self.params
        self.max_length = self.prompt_length + params.max_tokens
        self.looks_back = (
            params.min_tokens > 0
            or bool(params.logit_bias or params.bad_tokens or params.guide)
            or params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )

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


@dataclass(slots=True)
class Chunk:
    """The tokens of one sequence that one step computes: ``count`` from ``sequence.num_cached``."""

    sequence: Sequence
    count: int
    completes: bool
    """whether the step computes the sequence's last token, so that a next one is chosen"""
    begins: bool = False
    """whether the sequence begins to run with it, or does so again"""
