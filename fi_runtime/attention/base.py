"""The interface between a model's layers and the paged cache."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fi_runtime.cache.pages import SPARE_PAGE
from fi_runtime.kernels.heads import Heads

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepLayout:
    """Whose tokens a step computes and where their keys and values lie. All arrays on the host.

    The step's tokens are those of each sequence in turn: sequence ``s`` has tokens
    ``query_starts[s]`` up to ``query_starts[s + 1]``, the last of the ``context_lens[s]`` tokens
    that it will have in the cache; its pages are ``pages[page_starts[s]:page_starts[s + 1]]``.
    Sequences of several tokens come before those of one, which attention computes apart.
    """

    query_starts: Int32s
    """(sequences + 1,), rising from 0 to the number of tokens."""
    context_lens: Int32s
    """(sequences,): tokens in the cache once this step's have been written."""
    page_starts: Int32s
    """(sequences + 1,), rising from 0 to the number of pages."""
    pages: Int32s
    """Page numbers of all sequences, one after another."""

    @functools.cached_property
    def places(self) -> tuple[Int32s, Int32s]:
        """Of each token: its sequence, and its position there; (tokens,) each."""
        counts = np.diff(self.query_starts)
        rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        before = self.context_lens - self.query_starts[1:]
        return rows, np.arange(self.query_starts[-1], dtype=np.int32) + before[rows]

    def apart(self, page_size: int) -> "StepLayout":
        """The step with each token as a sequence of its own, of all tokens up to itself.

        It means the same where all keys and values are written before any is read.
        """
        rows, positions = self.places
        page_counts = positions // page_size + 1
        page_starts = starts(page_counts)
        shifts = np.repeat(self.page_starts[rows] - page_starts[:-1], page_counts)
        return StepLayout(
            query_starts=np.arange(len(rows) + 1, dtype=np.int32),
            context_lens=positions + 1,
            page_starts=page_starts,
            pages=self.pages[np.arange(page_starts[-1]) + shifts],
        )

    def part(self, first: int, last: int) -> "StepLayout":
        """Of sequences ``first`` up to ``last`` alone."""
        query_starts, page_starts = (
            each[first : last + 1] for each in (self.query_starts, self.page_starts)
        )
        return StepLayout(
            query_starts=query_starts - query_starts[0],
            context_lens=self.context_lens[first:last],
            page_starts=page_starts - page_starts[0],
            pages=self.pages[page_starts[0] : page_starts[-1]],
        )


@dataclass(frozen=True)
class AttentionKind:
    """How a layer weighs the tokens that came before; layers may differ in it."""

    scale: float
    """by which products of queries and keys are multiplied, before all else"""
    window: int | None = None
    """tokens that each one sees, itself among them; None: all up to itself"""
    soft_cap: float | None = None
    """scores s become soft_cap * tanh(s / soft_cap) (Gemma team, 2024); None: they stay"""


def plain_kinds(layers: int, head_dim: int) -> tuple[AttentionKind, ...]:
    """Of layers that see all before them, scaled as usual (Vaswani et al., 2017)."""
    return (AttentionKind(scale=head_dim**-0.5),) * layers


class Attention(Protocol):
    """Writes a step's keys and values to the cache and attends to all before them."""

    def plan(self, layout: StepLayout) -> None:
        """Prepare for the calls of one step, one a layer. Must precede each step's first call."""

    def __call__(self, layer: int, qkv: torch.Tensor, heads: Heads) -> torch.Tensor:
        """Causal attention of a step's tokens, of the layer's kind.

        Args:
            layer: index of the layer, which has a cache of its own.
            qkv: (tokens, (heads + 2 * kv_heads) * head_dim).
            heads: what ``qkv`` holds, and what comes before attention.

        Returns:
            (tokens, heads, head_dim).
        """


def spare_layout(
    counts: Sequence[int], page_size: int, contexts: Sequence[int] | None = None
) -> StepLayout:
    """A step to try things with: every page of every sequence is the spare one.

    Args:
        counts: tokens of each sequence that the step computes.
        page_size: tokens in a page.
        contexts: of each sequence; default: no more than its counts.
    """
    contexts = counts if contexts is None else contexts
    pages = [-(-context // page_size) for context in contexts]
    return StepLayout(
        query_starts=starts(counts),
        context_lens=np.array(contexts, dtype=np.int32),
        page_starts=starts(pages),
        pages=np.full(sum(pages), SPARE_PAGE, dtype=np.int32),
    )


def starts(counts: Sequence[int] | Int32s | Int64s) -> Int32s:
    """Where each of some runs of so many begins, and where the last one ends: (runs + 1,)."""
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
