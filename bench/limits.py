"""The least time that a model's steps can take: what they must move, and what they must compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fi_runtime.engine.build import weight_bytes
from fi_runtime.models import load_model_config

PREFILL_FLOPS = 650e12
"""a second: dense bfloat16 matrix products of large prompts on an H100, as peers' limits assume"""


@dataclass(frozen=True)
class Limits:
    """Of one model in bfloat16 on one GPU."""

    weight_bytes: int
    """that any decode step reads: all but an embedding that no logits come from, and experts"""
    prompt_bytes: int
    """of weights that a prompt's tokens are multiplied with: logits are of its last one alone"""
    token_bytes: int
    """of one token's keys and values"""
    bytes_per_s: float
    experts: int = 0
    """in a layer that has them"""
    per_token: int = 0
    """of them, that a token is multiplied with"""
    expert_bytes: int = 0
    """of one expert in each layer that has them"""

    def touched(self, tokens: int) -> float:
        """Experts of a layer that so many tokens go to, if all are as likely."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - (1 - self.per_token / self.experts) ** tokens)

    def decode_s(self, contexts: Sequence[int], touched: float | None = None) -> float:
        """Of a step: the weights are read once, and each sequence's keys and values once.

        Args:
            contexts: of each sequence.
            touched: experts of a layer that any of its tokens goes to; default: if all are as
                likely.
        """
        experts = self.touched(len(contexts)) if touched is None else touched
        read = self.weight_bytes + experts * self.expert_bytes
        return (read + sum(contexts) * self.token_bytes) / self.bytes_per_s

    def prefill_s(self, tokens: int) -> float:
        """Two operations for each weight, of two bytes, and token."""
        return tokens * self.prompt_bytes / PREFILL_FLOPS

    def offline_s(self, prompts: Sequence[int], outputs: Sequence[int]) -> float:
        """Prompts of so many tokens at once, then steps of all that still decode."""
        seconds = self.prefill_s(sum(prompts))
        for done in range(1, max(outputs)):
            seconds += self.decode_s(
                [p + done for p, o in zip(prompts, outputs, strict=True) if o > done]
            )
        return seconds


def limits_of(
    checkpoint: Path, bytes_per_s: float, cache_dtype: torch.dtype = torch.bfloat16
) -> Limits:
    """From a checkpoint's config.json.

    Args:
        bytes_per_s: that a copy within the GPU's memory moves, reading and writing counted.
        cache_dtype: of keys and values.
    """
    config = load_model_config(checkpoint)
    size = torch.bfloat16.itemsize
    head = config.vocab_size * config.hidden_size * size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    once = weight_bytes(config, torch.bfloat16, device) - (0 if config.tied_embeddings else head)
    experts, per_token, expert_bytes = 0, 0, 0
    if config.experts and config.experts.layers:
        experts, per_token = config.experts.count, config.experts.per_token
        elements = 3 * config.hidden_size * config.experts.intermediate_size
        expert_bytes = len(config.experts.layers) * elements * size
    always = once - experts * expert_bytes
    return Limits(
        weight_bytes=always,
        prompt_bytes=always - head + per_token * expert_bytes,
        token_bytes=2 * config.layers * config.kv_heads * config.head_dim * cache_dtype.itemsize,
        bytes_per_s=bytes_per_s,
        experts=experts,
        per_token=per_token,
        expert_bytes=expert_bytes,
    )
