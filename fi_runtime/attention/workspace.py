"""Memory that all of an engine's FlashInfer wrappers share."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fi_runtime.config import ConfigError

MIN_PLAN_BYTES = 8 << 20
"""FlashInfer's own choice; FA3's plans are of fixed size and need most of it"""


class Workspace:
    """Partial results of split contexts, and the plans that say who computes which split.

    Wrappers that run one after another, in the order of one stream, share a place for partial
    results; prompts and decode of a step run beside each other, and have one each. A plan must last
    for its step, in which each kind of attention may have one for prefill and one for decode: a
    workspace each.

    Args:
        partial: for partial results; bytes, on the device.
        plan: for a plan; bytes, on the device. Pinned memory has as many twice, to copy it from.
    """

    def __init__(self, partial: torch.Tensor, plan: torch.Tensor) -> None:
        self.partial = partial
        self.plan = plan
        self._staging = [
            (
                torch.empty(plan.nbytes, dtype=torch.uint8, pin_memory=True),
                torch.cuda.Event(),  # type: ignore[no-untyped-call]
            )
            for _ in range(2)
        ]

    def share_with(self, wrapper: Any) -> None:
        """Have a wrapper use this workspace instead of its own.

        Raises:
            ConfigError: it has no staging buffer that could be replaced.
        """
        if not hasattr(wrapper, "_pin_memory_int_workspace_buffer"):
            raise ConfigError(
                f"attention: {type(wrapper).__name__} of this FlashInfer keeps its plans "
                "elsewhere; install the version of requirements.lock"
            )
        wrapper.reset_workspace_buffer(self.partial, self.plan)

    @contextlib.contextmanager
    def staged(self, wrapper: Any, turn: int | None = None) -> Iterator[None]:
        """Let a wrapper plan within this context.

        RACE: planning fills a pinned buffer at once and only queues its copy to the device. The
        next plan must not fill the same one while that copy waits behind a step that still runs:
        two buffers take turns, and each waits for its own last copy, one step back.

        Args:
            turn: 0 or 1, of the buffer, if the caller has seen to all that.
        """
        if turn is not None:
            wrapper._pin_memory_int_workspace_buffer = self._staging[turn][0]
            yield
            return
        self._staging.reverse()
        buffer, copied = self._staging[0]
        copied.synchronize()
        wrapper._pin_memory_int_workspace_buffer = buffer
        yield
        copied.record()

    def check(self, name: str, needed: tuple[int, int]) -> None:
        """Refuse a workspace that is too small, while nobody waits for an answer.

        Raises:
            ConfigError: ``needed``, bytes of partial results and of a plan, are more than there is.
        """
        there = (self.partial.nbytes, self.plan.nbytes)
        if any(n > t for n, t in zip(needed, there, strict=True)):
            raise ConfigError(
                f"attention: {name} needs a workspace of {needed} bytes and has {there}; use a "
                "smaller step_tokens or max_sequences, and report it"
            )


def partial_bytes(
    heads: int, kv_heads: int, head_dim: int, max_sequences: int, processors: int
) -> int:
    """Most bytes that FA2's partial results take, whatever the lengths.

    FlashInfer's ``PrefillPlan`` (scheduler.cuh) splits contexts into tiles of up to 128 queries
    while there are fewer than two tiles a multiprocessor and key/value head, and for each keeps
    head_dim float32 sums and one normaliser a query. A captured decode step has up to two tiles a
    sequence, of 16 queries, or 64 where more than 16 heads share a key/value head.

    Args:
        max_sequences: of one captured decode step.
        processors: the device's multiprocessors.
    """
    tiles = 2 * processors // kv_heads + 1
    decode_queries = 16 if heads // kv_heads <= 16 else 64
    rows = max(tiles * 128, max(tiles, 2 * max_sequences) * decode_queries)
    return _aligned(heads * rows * (head_dim + 1) * 4)


def plan_bytes(
    heads: int, kv_heads: int, step_tokens: int, max_sequences: int, least: int = MIN_PLAN_BYTES
) -> int:
    """Most bytes that a plan of FA2 takes: indices of each tile, each sequence and each token."""
    tiles = step_tokens * (heads // kv_heads) // 16 + 2 * max_sequences + 1024
    return max(least, _aligned(16 * tiles + 8 * max_sequences + 4 * step_tokens, 16))


def _aligned(size: int, bits: int = 20) -> int:
    """With room for FlashInfer to align each part, in whole MiB or 2^bits."""
    return ((size >> bits) + 1) << bits
