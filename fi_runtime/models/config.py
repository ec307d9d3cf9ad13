"""What a checkpoint's config.json says of its shape."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fi_runtime.config import ConfigError

# Scalings whose frequencies do not depend on how long the sequence has become.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape. Sizes are numbers of elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    max_position: int
    eos_ids: tuple[int, ...]
    inverse_frequencies: torch.Tensor
    """(head_dim / 2,), float32, radians a position, on the CPU"""
    rope_scaling: float


def load_model_config(folder: Path, architectures: list[str]) -> ModelConfig:
    """Read config.json, and generation_config.json where there is one.

    Raises:
        ConfigError: a file missing or malformed, or something in it that cannot be served; says
            which file, what was found and what was expected.
    """
    path = folder / "config.json"
    found = read_json(path).get("architectures") or ["none"]
    if found[0] not in architectures:
        raise ConfigError(
            f"{path}: architecture {found[0]} is not supported; "
            f"supported are {', '.join(architectures)}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a malformed file makes transformers raise
        raise ConfigError(f"{path}: {error}") from error
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ConfigError(f"{path}: hidden_act is {config.hidden_act!r}; supported is 'silu'")
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"{path}: has a quantization_config; supported are checkpoints in {', '.join(DTYPES)}"
        )
    if getattr(config, "use_sliding_window", False):
        raise ConfigError(f"{path}: use_sliding_window is true; supported is false")
    heads = int(config.num_attention_heads)
    kv_heads = int(config.num_key_value_heads or heads)
    if heads % kv_heads:
        raise ConfigError(
            f"{path}: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
        )
    frequencies, scaling = _rope(config, path)
    return ModelConfig(
        architecture=found[0],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(config),
        norm_eps=config.rms_norm_eps,
        attention_bias=bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        tied_embeddings=bool(config.tie_word_embeddings),
        max_position=config.max_position_embeddings,
        eos_ids=_eos_ids(folder, config),
        inverse_frequencies=frequencies,
        rope_scaling=scaling,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        ConfigError: no such file, or something else in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; a checkpoint is a folder with config.json, tokenizer.json "
            "and *.safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a {type(value).__name__}; expected an object")
    return value


def _head_dim(config: PretrainedConfig) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _eos_ids(folder: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """generation_config.json's end-of-sequence tokens, else config.json's."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    ids = generation.get("eos_token_id", config.eos_token_id)
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _rope(config: PretrainedConfig, path: Path) -> tuple[torch.Tensor, float]:
    """Inverse frequencies (head_dim / 2,) and the factor on the result."""
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ConfigError(
            f"{path}: rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{path}: partial_rotary_factor is not 1; supported is 1")
    if kind != "default":
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return frequencies.float(), float(scaling)
    head_dim = _head_dim(config)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / parameters["rope_theta"] ** exponents, 1.0
