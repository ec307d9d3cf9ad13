"""Steps over pages in random order."""

import random

import numpy as np

from fi_runtime.attention.base import StepLayout


def make_layout(
    counts: list[int], contexts: list[int], page_size: int, rng: random.Random, pages: int
) -> StepLayout:
    """A step of sequences with so many new tokens and contexts, on pages in random order."""
    needed = [-(-context // page_size) for context in contexts]
    drawn = rng.sample(range(1, pages), sum(needed))
    starts = np.concatenate(([0], np.cumsum(needed))).astype(np.int32)
    return StepLayout(
        query_starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        context_lens=np.array(contexts, dtype=np.int32),
        page_starts=starts,
        pages=np.array(drawn, dtype=np.int32),
    )
