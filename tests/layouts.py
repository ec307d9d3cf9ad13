"""Steps over pages in random order."""

import random

import numpy as np

from fi_runtime.attention.base import StepLayout


def some_counts(contexts: list[int], rng: random.Random) -> list[list[int]]:
    """New tokens of sequences with such contexts: one of each, several, and some of either."""
    several = [rng.randint(1, context) for context in contexts]
    either = [rng.choice((1, count)) for count in several]
    return [[1] * len(contexts), several, [*either[:-1], 1]]


def make_layout(
    counts: list[int], contexts: list[int], page_size: int, rng: random.Random, pages: int
) -> StepLayout:
    """A step of sequences with so many new tokens and contexts, on pages in random order.

    Those of several new tokens come first, as a layout has them.
    """
    pairs = sorted(zip(counts, contexts, strict=True), key=lambda pair: pair[0] == 1)
    counts, contexts = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    needed = [-(-context // page_size) for context in contexts]
    drawn = rng.sample(range(1, pages), sum(needed))
    starts = np.concatenate(([0], np.cumsum(needed))).astype(np.int32)
    return StepLayout(
        query_starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        context_lens=np.array(contexts, dtype=np.int32),
        page_starts=starts,
        pages=np.array(drawn, dtype=np.int32),
    )
