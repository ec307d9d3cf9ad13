"""Checkpoint folders in the shapes of published models, without their weights.

Sizes are those of each model's config.json on its page; served with ``load_format: dummy``. The
tokenizer has as many tokens as the model, so that text costs what it costs: the 256 bytes, which
prompts become, and made-up words.
"""

import copy
import itertools
import string
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: dict[str, PretrainedConfig] = {
    # huggingface.co/Qwen/Qwen3-0.6B
    "Qwen3-0.6B": Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    ),
    # huggingface.co/Qwen/Qwen3-14B
    "Qwen3-14B": Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=151_936,
        hidden_size=5120,
        intermediate_size=17_408,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    ),
    # huggingface.co/meta-llama/Llama-3.1-8B
    "Llama-3.1-8B": LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters=LLAMA_3_ROPE,
    ),
    # huggingface.co/Qwen/Qwen3-30B-A3B
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        max_position_embeddings=40_960,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    ),
}


def _in_fp8(name: str, quantisation: dict[str, Any]) -> PretrainedConfig:
    config = copy.deepcopy(SHAPES[name])
    config.quantization_config = quantisation
    return config


SHAPES |= {
    # huggingface.co/RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic
    "Llama-3.1-8B-FP8": _in_fp8(
        "Llama-3.1-8B",
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                }
            },
            "ignore": ["lm_head"],
        },
    ),
    # huggingface.co/Qwen/Qwen3-14B-FP8
    "Qwen3-14B-FP8": _in_fp8(
        "Qwen3-14B",
        {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        },
    ),
}

PEERS = ("Qwen3-0.6B", "Llama-3.1-8B")
"""those that everything is measured with, as its peers were"""
DENSE = ("Qwen3-0.6B", "Qwen3-14B", "Llama-3.1-8B")
MIXTURE = "Qwen3-30B-A3B"
"""of experts"""


def write_shape(name: str, folder: Path) -> Path:
    """Write config.json and tokenizer.json of a shape; no token of it ends a sequence."""
    config = SHAPES[name]
    config.bos_token_id = config.eos_token_id = None
    config.save_pretrained(folder)
    made_up_tokenizer(config.vocab_size).save(str(folder / "tokenizer.json"))
    return folder


def made_up_tokenizer(tokens: int) -> Tokenizer:
    """The 256 bytes, and words up to so many tokens, each after a blank."""
    vocab = {
        token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    letters = string.ascii_lowercase
    words = (
        "".join(word)
        for length in itertools.count(2)
        for word in itertools.product(letters, repeat=length)
    )
    while len(vocab) < tokens:
        vocab["Ġ" + next(words)] = len(vocab)  # as byte-level vocabularies write a blank
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
