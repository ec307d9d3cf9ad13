"""config.json as it is on the pages of published models: older keys, much left to defaults."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from fi_runtime.engine.build import weight_bytes
from fi_runtime.models import load_model_config

LLAMA_SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
PHI_ROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        **LLAMA_SHAPE,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "Mistral-7B-v0.1": {
        **LLAMA_SHAPE,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 32_000,
        "max_position_embeddings": 32_768,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
    },
    "Qwen2.5-7B": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "max_position_embeddings": 32_768,
        "max_window_layers": 28,
        "rope_theta": 1_000_000.0,
        "sliding_window": 131_072,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 128,
        "hidden_size": 2048,
        "max_position_embeddings": 40_960,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 151_936,
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "vocab_size": 256_000,
    },
    "gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"model_type": "siglip_vision_model"},
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_local_experts": 32,
        "experts_per_token": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "sliding_window": 128,
        "initial_context_length": 4096,
        "max_position_embeddings": 131_072,
        "rope_theta": 150_000,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "vocab_size": 201_088,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
        },
    },
    "Phi-4-mini-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 200_064,
        "max_position_embeddings": 131_072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": PHI_ROPE,
        "sliding_window": 262_144,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize(
    ("name", "parameters", "positions", "windows", "soft_cap", "turning"),
    [
        ("Llama-3.1-8B", 8.03e9, 131_072, {None: 32}, None, [128]),
        ("Mistral-7B-v0.1", 7.24e9, 32_768, {4096: 32}, None, [128]),
        ("Qwen2.5-7B", 7.62e9, 32_768, {None: 28}, None, [128]),
        ("Qwen3-30B-A3B", 30.5e9, 40_960, {None: 48}, None, [128]),
        ("gemma-2-2b", 2.61e9, 8192, {None: 13, 4096: 13}, 50.0, [256]),
        ("gemma-3-4b-it", 3.88e9, 131_072, {None: 5, 1024: 29}, None, [256, 256]),
        ("gpt-oss-20b", 20.9e9, 131_072, {None: 12, 128: 12}, None, [64]),
        ("Phi-4-mini-instruct", 3.84e9, 4096, {None: 32}, None, [96]),
    ],
)
def test_what_is_read_of_published_models(
    name: str,
    parameters: float,
    positions: int,
    windows: dict[int | None, int],
    soft_cap: float | None,
    turning: list[int],
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    model = load_model_config(tmp_path)
    assert weight_bytes(model, torch.int8) == pytest.approx(parameters, rel=0.005)
    assert model.max_position == positions
    assert Counter(kind.window for kind in model.attention) == windows
    assert {kind.soft_cap for kind in model.attention} == {soft_cap}
    # Elements of each head that turn, for each kind of layer.
    assert [2 * len(r.inverse_frequencies) for r in dict.fromkeys(model.ropes)] == turning


def test_the_end_tokens_of_one_that_reads_images(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gemma-3-4b-it"]))
    assert load_model_config(tmp_path).eos_ids == (1, 106)
    config = {k: v for k, v in PUBLISHED["gemma-3-4b-it"].items() if k != "eos_token_id"}
    config["text_config"] = config["text_config"] | {"eos_token_id": [7, 8]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = AutoConfig.from_pretrained(tmp_path)
    expected = GenerationConfig.from_model_config(found).eos_token_id
    assert load_model_config(tmp_path).eos_ids == tuple(expected) == (7, 8)
