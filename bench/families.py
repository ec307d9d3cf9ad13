"""Tiny random checkpoints of every family, written by transformers itself.

Of a shape in which nothing that a family does may be left out unnoticed: windows and lengths cross,
caps bend, heads are of an odd size, norms and biases are random.
"""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 199
SEED = 2
"""of the weights: one with which no greedy token of the tests is nearly another"""
Shape = dict[str, Any]

SHAPE: Shape = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 512,
    "rms_norm_eps": 0.01,
    # Wide enough that the likeliest token leads by more than rounding.
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
GEMMA: Shape = {
    "sliding_window": 24,
    "query_pre_attn_scalar": 10,
    "final_logit_softcapping": 6.0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXPERTS: Shape = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
GPT_OSS: Shape = {
    "intermediate_size": 40,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
    # Which is in reach of random weights.
    "swiglu_limit": 1.5,
}
SHARED_EXPERT: Shape = {"shared_expert_intermediate_size": 56}

GPU_SHAPE: Shape = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "initializer_range": 0.08,
}
"""what differs where a GPU's kernels must have heads of that size"""
GPU_EXPERTS: Shape = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
GPU_SHAPES: dict[str, Shape] = {
    "llama 2": {"head_dim": 128},
    "qwen3": {"num_attention_heads": 16},
    "qwen2-moe": GPU_EXPERTS,
    "qwen3-moe": GPU_EXPERTS,
    "qwen3-moe, some layers": GPU_EXPERTS,
    # Before transformers 5.20 or so, the limit was no value of the configuration.
    "gpt-oss": {
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "intermediate_size": 128,
        "swiglu_limit": 7.0,
    },
    "gemma 2": {"query_pre_attn_scalar": 64, "attn_logit_softcapping": 20.0},
    "gemma 3": {"query_pre_attn_scalar": 64},
    "gemma 3, with images": {"query_pre_attn_scalar": 64},
}
"""what differs there beside it, by the names of ``FAMILIES``"""


def rope(kind: str, **values: Any) -> Shape:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


def llama(**values: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE | values))


def mistral(**values: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SHAPE | values))


def qwen2(**values: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_no_head_dim(SHAPE | values)))


def qwen3(**values: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE | values))


def qwen3_moe(**values: Any) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE | EXPERTS | values))


def qwen2_moe(**values: Any) -> PreTrainedModel:
    shape = _no_head_dim(SHAPE | EXPERTS | SHARED_EXPERT | values)
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**shape))


def gemma2(**values: Any) -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE | GEMMA | values))


def gemma3(**values: Any) -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE | GEMMA | values))


def gemma3_with_images(**values: Any) -> PreTrainedModel:
    # Published ones have no cap, and transformers would apply it in Gemma3ForCausalLM alone.
    text = SHAPE | GEMMA | {"final_logit_softcapping": None} | values
    implementation = text.pop("attn_implementation")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        initializer_range=text["initializer_range"],
        attn_implementation=implementation,
    )
    return Gemma3ForConditionalGeneration(config)


def gpt_oss(**values: Any) -> PreTrainedModel:
    return GptOssForCausalLM(GptOssConfig(**SHAPE | GPT_OSS | values))


def phi3(**values: Any) -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**_no_head_dim(SHAPE | values)))


def phi3_longrope(**values: Any) -> PreTrainedModel:
    shape = SHAPE | values
    turning = shape["hidden_size"] // shape["num_attention_heads"] // 4  # half of half a head
    steps = [i / (turning - 1) for i in range(turning)]
    angles = rope(
        "longrope",
        short_factor=[1.0 + step for step in steps],
        long_factor=[4.0 * 4.0**step for step in steps],
        partial_rotary_factor=0.5,
    )
    lengths = {"max_position_embeddings": 4096, "original_max_position_embeddings": 512}
    return phi3(**lengths | angles | values)


def _no_head_dim(shape: Shape) -> Shape:
    """For configurations that have hidden / heads instead."""
    return {key: value for key, value in shape.items() if key != "head_dim"}


YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama 2": llama,
    "llama 3.1": partial(llama, **rope("llama3", **LLAMA3), tie_word_embeddings=True),
    "llama, biased": partial(llama, attention_bias=True, mlp_bias=True),
    "llama, linear rope": partial(llama, **rope("linear", factor=3.0)),
    "llama, yarn": partial(llama, **rope("yarn", **YARN)),
    "llama, dynamic rope": partial(llama, **rope("dynamic", factor=2.0)),
    "mistral": partial(mistral, sliding_window=None),
    "mistral, window": partial(mistral, sliding_window=24),
    "qwen2": partial(qwen2, tie_word_embeddings=True),
    "qwen2, windows": partial(
        qwen2, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": qwen3,
    "qwen2-moe": partial(qwen2_moe, decoder_sparse_step=2),
    "qwen3-moe": partial(qwen3_moe, norm_topk_prob=True),
    "qwen3-moe, some layers": partial(qwen3_moe, mlp_only_layers=[1], num_experts_per_tok=3),
    "gemma 2": partial(gemma2, attn_logit_softcapping=2.0),
    "gemma 3": partial(
        gemma3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
    "gemma 3, with images": gemma3_with_images,
    "gpt-oss": partial(gpt_oss, **rope("yarn", **YARN, truncate=False)),
    "phi-3": partial(phi3, sliding_window=30, **rope("default", partial_rotary_factor=0.5)),
    "phi-3, longrope": phi3_longrope,
}
"""Makes a model, of ``SHAPE`` but for what it is given."""


def write(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, **shape: Any
) -> PreTrainedModel:
    """Save a random checkpoint of ``FAMILIES``, of that dtype on disk; the model that was saved."""
    torch.manual_seed(SEED)
    model = FAMILIES[name](**shape).eval()
    for parameter_name, parameter in model.named_parameters():
        if any(part in parameter_name for part in ("norm", "bias", "sinks")):
            # About what it is made as: 0 for biases and where norms add 1 to it.
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    model.to(dtype).save_pretrained(folder)
    return model


def prompt_of(length: int, copy: int = 0) -> list[int]:
    """Random tokens, the same each time."""
    return random.Random(length + (copy << 32)).choices(range(VOCAB), k=length)
