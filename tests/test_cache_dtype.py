"""A cache in fp8 holds e4m3's nearest numbers to keys and values, and all else is as it was."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from bench.families import prompt_of, write
from fi_runtime.attention.base import AttentionKind
from fi_runtime.attention.reference import ReferenceAttention
from fi_runtime.cache.kv_cache import CacheShape, KVCache
from fi_runtime.config import EngineConfig
from fi_runtime.engine.core import Engine, Generation
from fi_runtime.kernels.heads import Heads
from fi_runtime.messages import SamplingParams
from tests.layouts import make_layout

FP8, CPU = torch.float8_e4m3fn, torch.device("cpu")


def e4m3() -> torch.Tensor:
    """All its numbers, as its definition counts them (Micikevicius et al., 2022): rising."""
    small = [fraction / 8 * 2.0**-6 for fraction in range(8)]
    normal = [(1 + fraction / 8) * 2.0 ** (e - 7) for e in range(1, 16) for fraction in range(8)]
    positive = torch.tensor(small + normal[:-1])  # the last one is NaN
    return torch.cat((-positive.flip(0), positive))


def nearest(x: torch.Tensor) -> torch.Tensor:
    """The number of e4m3 nearest to each; those beyond it become its last."""
    numbers = e4m3()
    above = torch.bucketize(x.contiguous(), numbers).clamp(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    return torch.where(x - low < high - x, low, high)


def test_keys_and_values_are_kept_as_the_nearest_numbers() -> None:
    rng, heads = random.Random(1), Heads(4, 2, 16)
    shape = CacheShape(1, 40, 4, 2, 16)
    kept, plain = (KVCache(shape, dtype, CPU) for dtype in (FP8, torch.float32))
    kinds = [AttentionKind(0.01)]
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 1.0, 300.0):  # subnormal, usual, and some that are too large
        layout = make_layout([5, 3, 1], [9, 20, 7], 4, rng, 40)
        qkv = torch.randn(9, 8 * 16, generator=generator) * scale
        found, expected = (ReferenceAttention(cache, kinds) for cache in (kept, plain))
        found.plan(layout)
        expected.plan(layout)
        rounded = qkv.clone()
        rounded[:, 64:] = nearest(qkv[:, 64:])
        result = found(0, qkv, heads)
        torch.testing.assert_close(result, expected(0, rounded, heads), rtol=1e-5, atol=0.0)
        assert torch.equal(kept.data.float(), plain.data)
    assert plain.data.max() == 448.0


class RoundedCache(DynamicCache):
    """transformers' own, of keys and values that have been rounded."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(nearest(key_states), nearest(value_states), *args, **kwargs)


def errors(results: list[Generation], prompts: list[list[int]], model: PreTrainedModel) -> float:
    """The mean absolute error of logprobs, against a model that rounds what it keeps."""
    found = []
    for prompt, result in zip(prompts, results, strict=True):
        tokens = torch.tensor([prompt + result.tokens])
        with torch.inference_mode():
            logits = model(tokens, past_key_values=RoundedCache(config=model.config)).logits
        own = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = own.gather(1, tokens[0, len(prompt) :, None])[:, 0]
        found.append((torch.tensor(result.logprobs) - expected).abs())
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("family", ["qwen3", "gemma 2", "mistral, window"])
def test_logprobs_are_those_of_a_model_that_rounds_its_keys_and_values(
    family: str, tmp_path: Path
) -> None:
    model = write(family, tmp_path)
    prompts = [prompt_of(length) for length in (1, 7, 40, 100, 191)]
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=1, logprobs=0)

    def error(**knobs: Any) -> float:
        config = EngineConfig(checkpoint=str(tmp_path), cache_tokens=1600, **knobs)
        return errors(Engine(config).generate(prompts, params), prompts, model)

    unrounded = error()
    assert unrounded > 1e-3, "rounding is seen at all"
    # Not 1e-4 as without rounding: a key that lies between two numbers may become either.
    assert error(cache_dtype="fp8") < unrounded / 20
    small = {"step_tokens": 32, "max_sequences": 4, "page_size": 5}
    assert error(cache_dtype="fp8", **small) < unrounded / 20


def test_a_token_takes_a_byte_for_each_element() -> None:
    shape = CacheShape(3, 10, 16, 2, 64)
    assert shape.nbytes(FP8) * 2 == shape.nbytes(torch.bfloat16)
    assert KVCache(shape, FP8, CPU).data.nbytes == shape.nbytes(FP8)
