"""Batches that were updated are what they would be if they were made anew."""

import random
from pathlib import Path

import numpy as np
import pytest

from bench.families import write
from fi_runtime.config import EngineConfig
from fi_runtime.engine.batches import Batch, Batches
from fi_runtime.engine.core import Engine
from fi_runtime.engine.runner import Runner
from fi_runtime.engine.sequence import Chunks, Sequence, Slots
from fi_runtime.messages import SamplingParams

SEQUENCES, PAGE_SIZE = 6, 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write("llama 3.1", folder, num_hidden_layers=1)
    return folder


def check_same(batch: Batch, anew: Batch) -> None:
    assert batch.sequences == anew.sequences
    for name in ("query_starts", "context_lens", "page_starts", "pages"):
        found, expected = getattr(batch.layout, name), getattr(anew.layout, name)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected), name
    for name in ("last_rows", "slots", "indices", "draws"):
        assert np.array_equal(getattr(batch, name), getattr(anew, name)), name
    assert batch.decodes == anew.decodes
    assert np.array_equal(batch.tokens, anew.tokens)


def test_a_sequence_that_begins_again_has_its_new_pages() -> None:
    """With the same ones around it, as where it gave way and finds pages that others share."""
    params = SamplingParams(max_tokens=9, temperature=0.0, seed=0)
    sequences = [Sequence((b"", number), [1, 2, 3], params) for number in range(2)]
    slots = Slots(SEQUENCES, PAGE_SIZE)
    for slot, sequence in enumerate(sequences):
        slots.enter(slot, sequence, [slot + 1], cached=2)
    batches = Batches(slots, PAGE_SIZE)
    both, one_each = np.arange(2), np.ones(2, dtype=np.int64)
    assert batches.of(Chunks(both, one_each, begins=True)).tokens.tolist() == [3, 3]
    slots.cached[both] += 1
    slots.append(both, np.array([4, 5]))
    slots.leave(sequences[1])
    slots.enter(1, sequences[1], [7], cached=3)
    batch = batches.of(Chunks(both, one_each, begins=True))
    assert batch.layout.pages.tolist() == [1, 7]
    assert batch.tokens.tolist() == [-1, 5]  # the one that ran on finds its own in its slot


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("cache_tokens", [80, 400])
def test_updated_batches_are_those_made_anew(
    checkpoint: Path, cache_tokens: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While sequences come, end, are aborted and, in the smaller cache, give way."""
    updated = made = 0
    of, new = Batches.of, Batches._new

    def counted(self: Batches, chunks: Chunks) -> Batch:
        nonlocal made
        made += 1
        return new(self, chunks)

    def checked(self: Batches, chunks: Chunks) -> Batch:
        nonlocal updated
        before = made
        batch = of(self, chunks)
        updated += made == before
        check_same(batch, new(Batches(self._slots, PAGE_SIZE), chunks))
        return batch

    monkeypatch.setattr(Runner, "runs_ahead", ahead)
    monkeypatch.setattr(Batches, "_new", counted)
    monkeypatch.setattr(Batches, "of", checked)
    engine = Engine(
        EngineConfig(
            checkpoint=str(checkpoint),
            cache_tokens=cache_tokens,
            page_size=PAGE_SIZE,
            max_sequences=SEQUENCES,
            max_context=64,
            step_tokens=24,
            chunk_tokens=12,
        )
    )
    rng = random.Random(cache_tokens)
    beginning = rng.choices(range(199), k=9)
    for step in range(600):
        if rng.random() < 0.15:
            rest = rng.choices(range(199), k=rng.randint(1, 12))
            prompt = [*beginning[: rng.choice([0, 4, 8, 9])], *rest]
            params = SamplingParams(max_tokens=rng.randint(1, 40), temperature=0.7, seed=step)
            engine.add((b"", step), prompt, params)
        if rng.random() < 0.02 and engine._sequences:
            engine.abort(rng.choice([*engine._sequences]))
        engine.step()
    assert (engine.scheduler.num_preemptions > 0) == (cache_tokens == 80)
    assert updated > 100
    assert made > 100
