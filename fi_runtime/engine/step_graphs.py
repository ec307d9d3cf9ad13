"""Which steps are replayed from CUDA graphs, and from which."""

from dataclasses import dataclass

import torch

from fi_runtime.attention.flashinfer import FlashInferAttention
from fi_runtime.config import EngineConfig
from fi_runtime.engine.decode_graphs import DecodeGraphs, padded_sizes
from fi_runtime.engine.piece_graphs import PieceGraphs
from fi_runtime.engine.scheduler import TILE
from fi_runtime.engine.token_graphs import TokenGraphs
from fi_runtime.models import Decoder


@dataclass(frozen=True)
class GraphSizes:
    """What graphs are captured for, rising; there are none of a kind where it is empty."""

    decode: list[int]
    """sequences of decode steps"""
    tokens: list[int]
    """of steps with short prompts"""
    pieces: list[int]
    """tokens of other steps"""

    @classmethod
    def of(cls, config: EngineConfig) -> "GraphSizes":
        decode = min(config.decode_graphs, config.max_sequences)
        return cls(
            decode=padded_sizes(decode) if decode else [],
            tokens=padded_token_counts(min(2 * decode, config.step_tokens)) if decode else [],
            pieces=padded_piece_counts(min(config.piece_graphs, config.step_tokens)),
        )

    def largest(self, count: int) -> "GraphSizes":
        """Of each kind."""
        return GraphSizes(self.decode[-count:], self.tokens[-count:], self.pieces[-count:])

    def __len__(self) -> int:
        return len(self.decode) + len(self.tokens) + len(self.pieces)


@dataclass(frozen=True)
class StepGraphs:
    """The graphs of one engine."""

    decode: DecodeGraphs | None = None
    tokens: TokenGraphs | None = None
    pieces: PieceGraphs | None = None

    @classmethod
    def capture(
        cls,
        model: Decoder,
        attention: FlashInferAttention,
        sizes: GraphSizes,
        last_tokens: torch.Tensor,
        page_size: int,
    ) -> "StepGraphs":
        return cls(
            DecodeGraphs(model, attention, sizes.decode, last_tokens) if sizes.decode else None,
            TokenGraphs(model, attention, sizes.tokens, last_tokens, page_size)
            if sizes.tokens
            else None,
            PieceGraphs(model, attention, sizes.pieces, last_tokens, page_size)
            if sizes.pieces
            else None,
        )


def padded_token_counts(most: int) -> list[int]:
    """8, 16, 32, multiples of 64 up to 256 and of tiles beyond, and the maximum itself."""
    steps = [8, 16, 32, *range(64, 256, 64), *range(256, most, TILE)]
    return [*(size for size in steps if size < most), most]


def padded_piece_counts(most: int) -> list[int]:
    """Multiples of 32 up to 256 and of tiles beyond, and the maximum itself; none if it is 0."""
    steps = [*range(32, 256, 32), *range(256, most, TILE)]
    return [*(size for size in steps if size < most), most] if most else []
