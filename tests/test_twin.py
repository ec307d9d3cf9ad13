"""The engine against transformers' own models: tokens equal, logprobs close, in float32."""

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from fi_runtime.config import EngineConfig
from fi_runtime.engine.core import Engine
from fi_runtime.engine.runner import Runner
from fi_runtime.messages import SamplingParams
from tests.conftest import VOCAB

Twin = tuple[Path, PreTrainedModel]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, seed=0, logprobs=0)
LENGTHS = [1, 2, 3, 6, 7, 8, 15, 16, 17, 31, 33, 64, 100, 127, 191, 255, 256, 300]


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with each step launched before the last one's tokens are known, as on a GPU."""
    monkeypatch.setattr(Runner, "runs_ahead", request.param)


def prompt_of(length: int) -> list[int]:
    return random.Random(length).choices(range(VOCAB), k=length)


_expected: dict[tuple[str, int], tuple[list[int], list[float]]] = {}


def expected(twin: Twin, length: int) -> tuple[list[int], list[float]]:
    """transformers' greedy tokens and their logprobs after the prompt of that length."""
    folder, model = twin
    key = (folder.name, length)
    if key not in _expected:
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([prompt_of(length)]),
                max_new_tokens=GREEDY.max_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = out.sequences[0, length:].tolist()
        rows = torch.cat(out.logits).float().log_softmax(-1)
        _expected[key] = tokens, [rows[i, t].item() for i, t in enumerate(tokens)]
    return _expected[key]


def engine_for(twin: Twin, **knobs: object) -> Engine:
    values: dict[str, object] = {"cache_tokens": 16_384, **knobs}
    return Engine(EngineConfig(checkpoint=str(twin[0]), **values))  # type: ignore[arg-type]


def check(twin: Twin, engine: Engine, lengths: list[int]) -> None:
    results = engine.generate([prompt_of(length) for length in lengths], GREEDY)
    for length, result in zip(lengths, results, strict=True):
        tokens, logprobs = expected(twin, length)
        assert result.tokens == tokens, f"prompt of {length} tokens"
        assert result.logprobs == pytest.approx(logprobs, abs=1e-4), f"prompt of {length} tokens"
        assert result.finish == "length"
    assert engine.pool.free == engine.pool.usable


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("step_tokens", [7, 64, 512])
def test_mixed_lengths_in_one_batch(twin: Twin, page_size: int, step_tokens: int) -> None:
    engine = engine_for(twin, page_size=page_size, step_tokens=step_tokens, max_sequences=7)
    check(twin, engine, random.Random(step_tokens).sample(LENGTHS, k=len(LENGTHS)))
    assert engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize("length", LENGTHS)
def test_each_length_alone(twin: Twin, length: int) -> None:
    check(twin, engine_for(twin, step_tokens=11, max_sequences=1), [length])


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("page_size", [1, 16])
def test_preemption_changes_nothing(twin: Twin, page_size: int) -> None:
    # Room for the longest alone, so that the others must give way to it again and again.
    engine = engine_for(
        twin, page_size=page_size, cache_tokens=336, step_tokens=40, max_sequences=16
    )
    check(twin, engine, LENGTHS)
    assert engine.scheduler.num_preemptions > 0


def test_sharded_checkpoint_reads_the_same(twin: Twin, tmp_path: Path) -> None:
    twin[1].save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    engine = engine_for((tmp_path, twin[1]))
    result = engine.generate([prompt_of(33)], GREEDY)[0]
    assert result.tokens == expected(twin, 33)[0]
