"""Every family against transformers' own model of it, on the CPU in float32."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from bench.families import FAMILIES, SHAPE, prompt_of, write
from fi_runtime.config import ConfigError, EngineConfig
from fi_runtime.engine.build import check_has_kernels
from fi_runtime.engine.core import Engine
from fi_runtime.kernels import projection
from fi_runtime.kernels.heads import Heads
from fi_runtime.kernels.moe import experts_grouped
from fi_runtime.layers import moe
from fi_runtime.messages import SamplingParams
from fi_runtime.models import ARCHITECTURES, ModelConfig, load_model_config

LENGTHS = [1, 2, 7, 16, 17, 33, 64, 100, 191, 256, 300]
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, seed=0, logprobs=0)


@dataclass
class Twin:
    """A checkpoint, and what transformers makes of it."""

    folder: Path
    model: PreTrainedModel
    _answers: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)

    def answer(self, length: int) -> tuple[list[int], list[float]]:
        """Its own greedy tokens after the prompt of that length, and their logprobs."""
        if length not in self._answers:
            with torch.inference_mode():
                out = self.model.generate(
                    torch.tensor([prompt_of(length)]),
                    max_new_tokens=GREEDY.max_tokens,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            tokens = out.sequences[0, length:].tolist()
            rows = torch.cat(out.logits).float().log_softmax(-1)
            best, second = rows.topk(2).values.unbind(-1)
            assert (best - second).min() > 1e-4, "a near tie: choose another seed"
            self._answers[length] = tokens, [rows[i, t].item() for i, t in enumerate(tokens)]
        return self._answers[length]

    def engine(self, **knobs: Any) -> Engine:
        return Engine(EngineConfig(checkpoint=str(self.folder), **knobs))

    def check(self, engine: Engine) -> None:
        """All lengths at once."""
        lengths = random.Random(5).sample(LENGTHS, k=len(LENGTHS))
        results = engine.generate([prompt_of(length) for length in lengths], GREEDY)
        for length, result in zip(lengths, results, strict=True):
            tokens, logprobs = self.answer(length)
            assert result.tokens == tokens, f"prompt of {length} tokens"
            assert result.logprobs == pytest.approx(logprobs, abs=1e-4), f"{length} tokens"
        assert engine.pool.free == engine.pool.usable


@pytest.fixture(scope="module", params=FAMILIES)
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    folder = tmp_path_factory.mktemp("checkpoint")
    return Twin(folder, write(request.param, folder))


@pytest.mark.parametrize(("page_size", "step_tokens"), [(1, 7), (16, 64), (5, 512)])
def test_lengths_mixed_in_one_batch(twin: Twin, page_size: int, step_tokens: int) -> None:
    engine = twin.engine(
        cache_tokens=4000, page_size=page_size, step_tokens=step_tokens, max_sequences=6
    )
    twin.check(engine)
    assert engine.scheduler.num_preemptions == 0


def test_preemption_changes_nothing(twin: Twin) -> None:
    engine = twin.engine(
        cache_tokens=336, page_size=4, step_tokens=40, max_sequences=16, max_context=320
    )
    twin.check(engine)
    assert engine.scheduler.num_preemptions > 0


def test_few_tokens_meet_only_kernels_that_know_their_layers(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose kernels are stood in for by what they mean."""

    def norm_linear(*arguments: Any) -> torch.Tensor:
        *arguments, out = arguments
        result = projection.norm_linear_reference(*arguments)
        return result if out is None else out.copy_(result)

    monkeypatch.setattr(projection, "is_few", lambda x, weight: len(x) <= 16)
    monkeypatch.setattr(projection, "norm_linear", norm_linear)
    monkeypatch.setattr(moe, "experts", experts_grouped)
    for name in ("norm_linear_silu_and_mul", "add_linear"):
        monkeypatch.setattr(projection, name, getattr(projection, f"{name}_reference"))
    twin.check(twin.engine(cache_tokens=4000, step_tokens=24, max_sequences=6))


def test_heads_that_the_kernel_does_not_know() -> None:
    angles, weight = torch.zeros(9, 64), torch.zeros(64)
    assert Heads(2, 1, 64, angles, weight, weight).has_kernel
    assert Heads(2, 1, 64, angles, norms_add_one=True).has_kernel
    assert not Heads(2, 1, 64, angles, weight, weight, norms_add_one=True).has_kernel
    assert not Heads(2, 1, 64, angles[:, :48]).has_kernel


def test_every_architecture_has_a_twin() -> None:
    assert {type(build()).__name__ for build in FAMILIES.values()} == set(ARCHITECTURES)


def test_a_context_ends_where_the_angles_of_longrope_change(twin: Twin) -> None:
    longest = load_model_config(twin.folder).max_position
    assert longest == 512, "as the configurations say, or as longrope's original length"
    with pytest.raises(ConfigError, match="max_context=513 is more than the 512 positions"):
        twin.engine(max_context=513)


def read(architecture: str, config: PreTrainedConfig, folder: Path) -> ModelConfig:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return load_model_config(folder)


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        (
            "MistralForCausalLM",
            MistralConfig(**SHAPE, sliding_window=0),
            "sliding_window is 0; supported are 1 and more",
        ),
        (
            "Gemma2ForCausalLM",
            Gemma2Config(**SHAPE, hidden_activation="gelu"),
            "hidden_activation is 'gelu'; supported are 'silu' and 'gelu_pytorch_tanh'",
        ),
        (
            "Gemma3ForCausalLM",
            Gemma3TextConfig(**SHAPE, use_bidirectional_attention=True),
            "use_bidirectional_attention is true; supported is false",
        ),
        (
            "Qwen3ForCausalLM",
            Qwen3Config(**SHAPE, layer_types=["chunked_attention"] * 3),
            "layer_types has 'chunked_attention'; supported are full_attention and sliding_att",
        ),
        (
            "GptOssForCausalLM",
            GptOssConfig(),
            "architecture GptOssForCausalLM is not supported: its attention has sinks",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    architecture: str, config: PreTrainedConfig, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(architecture, config, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {words}")


@pytest.mark.parametrize(
    ("architecture", "config", "dtype", "words"),
    [
        (
            "Phi3ForCausalLM",
            Phi3Config(hidden_size=3072, num_attention_heads=32),
            torch.bfloat16,
            "head_dim=96: FlashInfer's FA2 kernels are for 64, 128, 256",
        ),
        (
            "Qwen3MoeForCausalLM",
            Qwen3MoeConfig(head_dim=128),
            torch.float16,
            "dtype=float16: experts are multiplied in bfloat16 on a GPU",
        ),
        (
            "Qwen3MoeForCausalLM",
            Qwen3MoeConfig(head_dim=128, moe_intermediate_size=764),
            torch.bfloat16,
            "hidden_size=2048, moe_intermediate_size=764: .* are of multiples of 8",
        ),
    ],
)
def test_what_a_gpu_has_no_kernels_for_is_refused_there(
    architecture: str, config: PreTrainedConfig, dtype: torch.dtype, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_has_kernels(read(architecture, config, tmp_path), dtype)
