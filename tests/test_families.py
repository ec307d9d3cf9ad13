"""Every family against transformers' own model of it, on the CPU in float32."""

from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from bench.families import FAMILIES, SHAPE, write
from fi_runtime.config import ConfigError
from fi_runtime.engine.build import check_has_kernels
from fi_runtime.kernels.heads import Heads
from fi_runtime.models import ARCHITECTURES, ModelConfig, load_model_config
from tests.twins import Twin, take_few_tokens_kernels

LENGTHS = [1, 2, 7, 16, 17, 33, 64, 100, 191, 256, 300]


@pytest.fixture(scope="module", params=FAMILIES)
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    folder = tmp_path_factory.mktemp("checkpoint")
    return Twin(folder, write(request.param, folder))


@pytest.mark.parametrize(("page_size", "step_tokens"), [(1, 7), (16, 64), (5, 512)])
def test_lengths_mixed_in_one_batch(twin: Twin, page_size: int, step_tokens: int) -> None:
    engine = twin.engine(
        cache_tokens=4000, page_size=page_size, step_tokens=step_tokens, max_sequences=6
    )
    twin.check(engine, LENGTHS)
    assert engine.scheduler.num_preemptions == 0


def test_preemption_changes_nothing(twin: Twin) -> None:
    engine = twin.engine(
        cache_tokens=336, page_size=4, step_tokens=40, max_sequences=16, max_context=320
    )
    twin.check(engine, LENGTHS)
    assert engine.scheduler.num_preemptions > 0


def test_few_tokens_meet_only_kernels_that_know_their_layers(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_few_tokens_kernels(monkeypatch)
    twin.check(twin.engine(cache_tokens=4000, step_tokens=24, max_sequences=6), LENGTHS)


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
            "Qwen3MoeForCausalLM",
            Qwen3MoeConfig(**SHAPE, num_experts=6, num_experts_per_tok=7),
            "num_experts_per_tok is 7; expected 1 to 6, as many experts as there are",
        ),
        (
            "GptOssForCausalLM",
            GptOssConfig(**SHAPE, num_local_experts=6, num_experts_per_tok=0),
            "num_experts_per_tok is 0; expected 1 to 6, as many experts as there are",
        ),
        (
            "Qwen3ForCausalLM",
            Qwen3Config(**SHAPE, quantization_config={"quant_method": "mxfp4"}),
            "quantization_config has quant_method 'mxfp4'; supported are quant_method fp8 and",
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
            "hidden_size=2048, experts' intermediate size=764: .* are of multiples of 8",
        ),
        (
            "Qwen3ForCausalLM",
            Qwen3Config(head_dim=128, intermediate_size=3076),
            torch.bfloat16,
            "hidden_size=4096, intermediate_size=3076: .* rows of multiples of 8",
        ),
        (
            "Qwen3ForCausalLM",
            Qwen3Config(head_dim=128, hidden_size=1028),
            torch.float16,
            "hidden_size=1028, intermediate_size=22016: .* rows of multiples of 8",
        ),
    ],
)
def test_what_a_gpu_has_no_kernels_for_is_refused_there(
    architecture: str, config: PreTrainedConfig, dtype: torch.dtype, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_has_kernels(read(architecture, config, tmp_path), dtype)
