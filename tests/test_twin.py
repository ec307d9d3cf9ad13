"""The engine against transformers' own models: tokens equal, logprobs close, in float32."""

from pathlib import Path

import pytest

from fi_runtime.engine.runner import Runner
from tests.twins import Twin

LENGTHS = [1, 2, 3, 6, 7, 8, 15, 16, 17, 31, 33, 64, 100, 127, 191, 255, 256, 300]


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with each step launched before the last one's tokens are known, as on a GPU."""
    monkeypatch.setattr(Runner, "runs_ahead", request.param)


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("step_tokens", [7, 64, 512])
def test_mixed_lengths_in_one_batch(twin: Twin, page_size: int, step_tokens: int) -> None:
    engine = twin.engine(page_size=page_size, step_tokens=step_tokens, max_sequences=7)
    twin.check(engine, LENGTHS)
    assert engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize("length", LENGTHS)
def test_each_length_alone(twin: Twin, length: int) -> None:
    twin.check(twin.engine(step_tokens=11, max_sequences=1), [length])


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("page_size", [1, 16])
def test_preemption_changes_nothing(twin: Twin, page_size: int) -> None:
    # Room for the longest alone, so that the others must give way to it again and again.
    engine = twin.engine(page_size=page_size, cache_tokens=336, step_tokens=40, max_sequences=16)
    twin.check(engine, LENGTHS)
    assert engine.scheduler.num_preemptions > 0


def test_sharded_checkpoint_reads_the_same(twin: Twin, tmp_path: Path) -> None:
    twin.model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded = Twin(tmp_path, twin.model)
    sharded.check(sharded.engine(), [33])
