"""An answer put together from its pieces, and how long it took."""

import contextlib
import time
from collections.abc import Generator
from dataclasses import dataclass, field

from client.request import Piece


@dataclass(frozen=True)
class Timing:
    """Of one answer, from just before its request is sent, as its client sees it."""

    time_to_first_token_s: float
    """until the first piece; without streaming that is the whole answer"""
    total_s: float
    """until the answer is complete"""
    tokens_per_second: float
    """all output tokens over the total"""


@dataclass
class Answer:
    """What has come so far.

    answer = Answer()
    for piece in answer.follow(server.generate(request)):
        ...
    print(answer.text, answer.timing)
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str = ""
    timing: Timing = Timing(0.0, 0.0, 0.0)
    _texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def follow(self, pieces: Generator[Piece]) -> Generator[Piece]:
        """Pass pieces on and keep what they add up to; closing it closes `pieces`."""
        start = time.perf_counter()
        first = None
        with contextlib.closing(pieces):
            for piece in pieces:
                elapsed = time.perf_counter() - start
                first = elapsed if first is None else first
                self.prompt_tokens = piece.prompt_tokens
                self.output_tokens += piece.tokens
                self.finish_reason = piece.finish_reason
                self.timing = Timing(first, elapsed, self.output_tokens / elapsed)
                self._texts.append(piece.text)
                yield piece
