"""Properties of scheduling and paging, whatever comes in whatever order."""

import random
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_runtime.cache.pages import SPARE_PAGE, OutOfPages, PagePool
from fi_runtime.cache.prefix_tree import PrefixTree
from fi_runtime.engine import scheduler as scheduling
from fi_runtime.engine.scheduler import Scheduler
from fi_runtime.engine.sequence import Chunks, Sequence
from fi_runtime.messages import SamplingParams


def sequence(number: int, prompt_length: int, max_tokens: int) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    return Sequence((b"", number), [number] * prompt_length, params)


def scheduled(chunks: Chunks, scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    """Each sequence of a step, and how many of its tokens it computes."""
    pairs = zip(chunks.slots.tolist(), chunks.counts.tolist(), strict=True)
    return [(scheduler.slots.at(slot), count) for slot, count in pairs]


def completing(chunks: Chunks, scheduler: Scheduler) -> list[Sequence]:
    """Those that get a token."""
    return [one for one, count in scheduled(chunks, scheduler) if count == one.num_uncached]


def compute(chunks: Chunks, scheduler: Scheduler) -> None:
    """What the engine does with a step's chunks: cache them, append a token, end the finished."""
    complete = completing(chunks, scheduler)
    scheduler.slots.cached[chunks.slots] += chunks.counts
    for one in complete:
        scheduler.slots.append(np.array([one.slot]), np.array([7]))
        if one.num_generated == one.params.max_tokens:
            scheduler.remove(one)


def check_step(chunks: Chunks, scheduler: Scheduler, tree: PrefixTree, page_size: int) -> None:
    own = [page for one in scheduler.running for page in one.pages[len(one.nodes) :]]
    assert len(own) == len(set(own)), "a page belongs to two sequences"
    shared = {node.page for one in scheduler.running for node in one.nodes}
    assert not shared & set(own), "a page that others read is still somebody's own"
    assert SPARE_PAGE not in shared | set(own)
    assert tree.free + len(own) + len(shared) == tree.usable, "pages leaked"
    for one in scheduler.running:
        assert one.pages[: len(one.nodes)] == [node.page for node in one.nodes]
    assert all(not one.pages and one.num_cached == 0 for one in scheduler.waiting)
    assert len(chunks) == len(set(chunks.slots.tolist())), "a sequence stands twice"
    half_done = [one for one, count in scheduled(chunks, scheduler) if count < one.num_uncached]
    assert half_done in ([], scheduler.running[-1:]), "a prompt began behind one that is half done"
    for one, count in scheduled(chunks, scheduler):
        assert one in scheduler.running
        assert 0 < count <= one.num_uncached
        assert one.num_cached + count <= len(one.pages) * page_size


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=25),
    page_size=st.sampled_from([1, 3, 16]),
    max_sequences=st.integers(1, 8),
    extra_tokens=st.integers(0, 40),
    chunk_tokens=st.integers(1, 60),
    extra_pages=st.integers(0, 40),
    weighty=st.sampled_from([3, 10, scheduling.WEIGHTY_CONTEXT]),
    tile=st.sampled_from([1, scheduling.TILE]),
    seed=st.integers(0, 1 << 30),
)
def test_everything_finishes_and_no_page_is_lost(
    lengths: list[tuple[int, int]],
    page_size: int,
    max_sequences: int,
    extra_tokens: int,
    chunk_tokens: int,
    extra_pages: int,
    weighty: int,
    tile: int,
    seed: int,
) -> None:
    with mock.patch.multiple(scheduling, WEIGHTY_CONTEXT=weighty, TILE=tile):
        rng = random.Random(seed)
        longest = max(prompt + output for prompt, output in lengths)
        pool = PrefixTree(PagePool(-(-longest // page_size) + 1 + extra_pages), page_size)
        step_tokens = max_sequences + extra_tokens
        scheduler = Scheduler(pool, page_size, max_sequences, step_tokens, chunk_tokens)
        arriving = [sequence(i, *length) for i, length in enumerate(lengths)]
        live: list[Sequence] = []
        finished = 0
        steps = 0
        while arriving or live:
            while arriving and rng.random() < 0.5:
                live.append(arriving.pop())
                scheduler.add(live[-1])
            if live and rng.random() < 0.05:
                scheduler.remove(live.pop(rng.randrange(len(live))))  # cancelled
                finished += 1
            chunks = scheduler.schedule()
            check_step(chunks, scheduler, pool, page_size)
            assert chunks.counts.sum() <= step_tokens
            assert len(scheduler.running) <= max_sequences
            assert chunks or not live, "sequences wait although nothing runs"
            compute(chunks, scheduler)
            finished += sum(one.num_generated == one.params.max_tokens for one in live)
            live = [one for one in live if one.num_generated < one.params.max_tokens]
            steps += 1
            assert steps < 200_000, "no progress"
        assert finished == len(lengths)
        assert pool.free == pool.usable


def test_decoding_sequences_get_their_token_beside_a_long_prompt() -> None:
    pool = PrefixTree(PagePool(100), 16)
    scheduler = Scheduler(pool, 16, max_sequences=8, step_tokens=20, chunk_tokens=20)
    short = [sequence(i, 2, 50) for i in range(3)]
    for one in short:
        scheduler.add(one)
    compute(scheduler.schedule(), scheduler)
    long = sequence(9, 200, 5)
    scheduler.add(long)
    for _ in range(8):
        chunks = scheduler.schedule()
        counts = {one.key[1]: count for one, count in scheduled(chunks, scheduler)}
        assert {counts[i] for i in range(3)} == {1}
        assert counts[9] == 17  # all that the three leave of 20
        compute(chunks, scheduler)


def test_a_step_that_streams_wait_for_has_a_chunk_for_each_prompt_that_waits() -> None:
    scheduler = Scheduler(PrefixTree(PagePool(1000), 16), 16, 8, step_tokens=500, chunk_tokens=100)
    for one in (sequence(0, 2, 90), sequence(1, 1400, 90)):
        scheduler.add(one)
    # Nobody waits for the first step. Then one prompt is half done, then two more come.
    # The longer its context, the fewer of a prompt's tokens a chunk has, but a tile is filled.
    expected = [
        [2, 498],
        [1, 127],
        [1, 127],
        [1, 383],
        [1, 265],
        [1, 1, 254],
        [1, 1, 146, 108],
        [1, 1, 1, 125],
    ]
    for step, counts in enumerate(expected):
        if step == 3:
            for number in (2, 3):
                scheduler.add(sequence(number, 400, 90))
        chunks = scheduler.schedule()
        assert chunks.counts.tolist() == counts
        compute(chunks, scheduler)


def test_a_long_prompt_moves_on_while_short_ones_come() -> None:
    """By whole chunks: about as many steps as it takes with one prompt waiting beside it."""
    rng = random.Random(0)
    scheduler = Scheduler(PrefixTree(PagePool(9000), 16), 16, 64, 8192, chunk_tokens=512)
    for number in range(20):
        scheduler.add(sequence(number, 20, 10_000))
    compute(scheduler.schedule(), scheduler)
    long = sequence(99, 60_000, 5)
    scheduler.add(long)
    steps = 0
    while long.num_generated == 0:
        if len(scheduler.waiting) < 2:
            scheduler.add(sequence(100 + steps, rng.randint(1, 40), 3))
        compute(scheduler.schedule(), scheduler)
        steps += 1
        assert steps < 400


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    pool = PrefixTree(PagePool(5), 4)
    scheduler = Scheduler(pool, 4, max_sequences=8, step_tokens=64, chunk_tokens=64)
    old, young, later = sequence(0, 8, 9), sequence(1, 8, 9), sequence(2, 1, 9)
    for one in (old, young, later):
        scheduler.add(one)
    compute(scheduler.schedule(), scheduler)  # old and young hold all four pages
    chunks = scheduler.schedule()  # both need a third one
    assert scheduled(chunks, scheduler) == [(old, 1)]
    assert list(scheduler.waiting) == [young, later]
    assert young.pages == []
    assert scheduler.num_preemptions == 1


def test_a_pool_takes_all_or_nothing() -> None:
    pool = PagePool(4)
    with pytest.raises(OutOfPages, match="4 pages asked for, 3 of 3 free"):
        pool.take(4)
    pages = pool.take(3)
    assert sorted(pages) == [1, 2, 3]
    pool.give_back(pages[:1])
    with pytest.raises(ValueError, match="given back but was not taken"):
        pool.give_back(pages[:1])
    with pytest.raises(ValueError, match="at least 2"):
        PagePool(1)
