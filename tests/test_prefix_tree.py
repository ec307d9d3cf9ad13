"""Pages that sequences share: that they hold what their readers think, and that none is lost."""

import random

import numpy as np
import pytest
import torch

from bench.families import VOCAB
from fi_runtime.cache.pages import PagePool
from fi_runtime.cache.prefix_tree import PrefixTree
from fi_runtime.config import EngineConfig
from fi_runtime.engine.batches import Batch
from fi_runtime.engine.core import Engine
from fi_runtime.engine.runner import Runner
from fi_runtime.engine.scheduler import Scheduler
from fi_runtime.engine.sequence import Chunks, Sequence
from fi_runtime.messages import SamplingParams
from tests.test_scheduler import check_step, completing, scheduled
from tests.twins import Twin

STEPS = 700
"""of each of the sixteen cases below, more than 10,000 in all"""


class Simulation:
    """Sequences of three tokens that begin alike, in a cache that remembers what it was written.

    Half of them have an adapter, of two, and what they write is their own.

    Each has a script of what it will have said, as far as it may go, so that tokens which are not
    known yet can be computed, as an engine does that launches its steps ahead.
    """

    def __init__(self, rng: random.Random, page_size: int, ahead: bool) -> None:
        self._rng = rng
        self._page_size = page_size
        self._ahead = ahead
        self.pool = PagePool(-(-60 // page_size) + rng.randint(2, 40))
        self.tree = PrefixTree(self.pool, page_size)
        self.scheduler = Scheduler(
            self.tree, page_size, rng.randint(1, 6), step_tokens=25, chunk_tokens=rng.randint(1, 25)
        )
        self.live: dict[int, Sequence] = {}
        self._beginnings = [rng.choices(range(3), k=30) for _ in range(3)]
        self._scripts: list[list[int]] = []
        self._written: dict[tuple[int, int], tuple[int, ...]] = {}
        """by page and place in it: the adapter, and the tokens up to the one written there"""
        self._launched: list[Sequence] = []

    def arrive(self) -> None:
        prompt = self._rng.choice(self._beginnings)[: self._rng.randint(1, 30)]
        prompt = prompt + self._rng.choices(range(3), k=self._rng.randint(0, 10))
        params = SamplingParams(max_tokens=self._rng.randint(1, 17), seed=0)
        adapter = self._rng.choice((0, 0, 1, 2))
        one = Sequence((b"", len(self._scripts)), list(prompt), params, adapter=adapter)
        self._scripts.append(prompt + self._rng.choices(range(3), k=params.max_tokens))
        self.live[one.key[1]] = one
        self.scheduler.add(one)

    def end(self, one: Sequence) -> None:
        self.scheduler.remove(one)
        del self.live[one.key[1]]

    def step(self) -> None:
        chunks = self.scheduler.schedule()
        check_step(chunks, self.scheduler, self.tree, self._page_size)
        complete = completing(chunks, self.scheduler)
        self._compute(chunks)
        slots = self.scheduler.slots
        for one in complete:
            slots.pending[one.slot] += 1
        before = self._launched if self._ahead else complete
        self._launched = complete
        for one in before:
            if self.live.get(one.key[1]) is one:
                token = self._scripts[one.key[1]][len(one.tokens)]
                if one.slot < 0:
                    one.take_late(token)
                else:
                    slots.pending[one.slot] -= 1
                    slots.append(np.array([one.slot]), np.array([token]))
                if len(one.tokens) == one.max_length or self._rng.random() < 0.05:
                    self.end(one)

    def _compute(self, chunks: Chunks) -> None:
        """All of a step is written before anything is read, as in each layer."""
        computed = scheduled(chunks, self.scheduler)
        for one, count in computed:
            for position in range(one.num_cached, one.num_cached + count):
                place, said = self._at(one, position)
                self._written[place] = said
        self.scheduler.slots.cached[chunks.slots] += chunks.counts
        for one, _ in computed:
            for position in range(one.num_cached):
                place, said = self._at(one, position)
                assert self._written[place] == said, "a page holds something else"

    def _at(self, one: Sequence, position: int) -> tuple[tuple[int, int], tuple[int, ...]]:
        page = one.pages[position // self._page_size]
        said = (one.adapter, *self._scripts[one.key[1]][: position + 1])
        return (page, position % self._page_size), said


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_pages_hold_what_their_readers_think(seed: int, page_size: int, ahead: bool) -> None:
    rng = random.Random(seed)
    running = Simulation(rng, page_size, ahead)
    for step in range(STEPS):
        while len(running.live) < 12 and rng.random() < 0.6 and step < STEPS - 300:
            running.arrive()
        if running.live and rng.random() < 0.05:
            running.end(rng.choice(list(running.live.values())))  # cancelled
        running.step()
    assert not running.live
    assert running.scheduler.num_reused_tokens > 0
    assert running.tree.free == running.tree.usable
    running.tree.forget()
    assert running.tree.free == running.tree.usable


def test_the_leaf_that_was_used_longest_ago_gives_way() -> None:
    pool = PagePool(5)
    tree = PrefixTree(pool, 2)

    def keep(tokens: list[int]) -> None:
        nodes = tree.match([*tokens, 0])
        while len(nodes) < len(tokens) // 2:
            nodes.append(tree.add(nodes, tokens, tree.take(1)[0]))
        tree.release(nodes)

    keep([1, 1, 2, 2])
    keep([3, 3])
    keep([1, 1, 4, 4])  # all four pages are in use now, and the first pair twice
    assert (pool.free, tree.free) == (0, 4)
    held = tree.match([3, 3, 0])
    tree.take(1)

    def there(tokens: list[int]) -> int:
        nodes = tree.match([*tokens, 0])
        tree.release(nodes)
        return len(nodes)

    assert there([1, 1, 2, 2]) == 1, "the oldest leaf"
    assert there([1, 1, 4, 4]) == 2
    tree.take(2)
    assert there([1, 1, 4, 4]) == 0, "then a leaf, then what was its parent"
    assert there([3, 3]) == 1, "never what somebody reads"
    tree.release(held)


def test_reading_the_same_again_and_again_takes_no_more_memory() -> None:
    tree = PrefixTree(PagePool(9), 2)
    tokens = [1, 2, 3]
    tree.release([tree.add([], tokens, tree.take(1)[0])])
    for _ in range(1000):
        tree.release(tree.match(tokens))
    assert len(tree._leaves) <= 2 * tree.usable + 1
    tree.take(8)
    assert tree.match(tokens) == []


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("step_tokens", [40, 512])
def test_answers_after_a_shared_beginning_are_transformers_own(
    twin: Twin,
    monkeypatch: pytest.MonkeyPatch,
    step_tokens: int,
    ahead: bool,
) -> None:
    """Also of a prompt that is all there, and of one that comes several times at once."""
    monkeypatch.setattr(Runner, "runs_ahead", ahead)
    folder, model = twin.folder, twin.model
    rng = random.Random(step_tokens)
    beginning = rng.choices(range(VOCAB), k=96)
    prompts = [beginning, beginning, beginning[:48], *([*beginning, n] for n in range(4))]
    config = EngineConfig(
        checkpoint=str(folder), cache_tokens=2048, step_tokens=step_tokens, max_sequences=16
    )
    engine = Engine(config)
    params = SamplingParams(max_tokens=12, temperature=0.0, seed=0)
    for turn in range(2):
        results = engine.generate(prompts, params)
        for prompt, result in zip(prompts, results, strict=True):
            with torch.inference_mode():
                out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
            assert result.tokens == out[0, len(prompt) :].tolist()
        if turn == 0:
            assert engine.scheduler.num_reused_tokens >= 80 * 4
            before = engine.scheduler.num_reused_tokens
    # Now all but the page with the last token is there.
    assert engine.scheduler.num_reused_tokens - before == 80 + 80 + 32 + 4 * 96
    assert engine.tree.free == engine.tree.usable


def test_a_step_that_failed_leaves_nothing_for_others(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(EngineConfig(checkpoint=str(twin.folder), cache_tokens=2048))
    params = SamplingParams(max_tokens=4, temperature=0.0, seed=0)
    prompt = list(range(100))
    engine.add((b"", 0), prompt, params)

    def broken(self: Runner, batch: Batch) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "launch", broken)
        [(_, output)] = engine.step()
        assert output.finish == "failed"
    engine.generate([prompt], params)
    assert engine.scheduler.num_reused_tokens == 0
