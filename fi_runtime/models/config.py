"""What a checkpoint's config.json says of its shape."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from fi_runtime.attention.base import AttentionKind
from fi_runtime.config import ConfigError
from fi_runtime.kernels.activation import GATED_ACTIVATIONS
from fi_runtime.models.fp8 import Fp8
from fi_runtime.models.rope import Rope, head_dim, read_rope

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experts:
    """Layers whose MLP is a mixture of experts, of which a router chooses some for each token."""

    layers: frozenset[int]
    count: int
    per_token: int
    intermediate_size: int
    """of one"""
    normalised: bool
    """whether the weights of those chosen are scaled to a sum of 1"""
    shared_size: int = 0
    """of the intermediate layer of an expert that every token goes to; 0: there is none"""
    slope: float = 1.0
    limit: float | None = None
    """of their activation, as ``clamped_silu_and_mul`` takes them; None: it is another"""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed.

        Raises:
            ConfigError: a token would have no expert, or more than there are.
        """
        if self.layers and not 1 <= self.per_token <= self.count:
            raise ConfigError(
                f"num_experts_per_tok is {self.per_token}; expected 1 to {self.count}, as many "
                "experts as there are"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape. Sizes are numbers of elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    """of the MLP, as config.json calls it"""
    qkv_bias: bool
    out_bias: bool
    """of attention's output projection"""
    mlp_bias: bool
    tied_embeddings: bool
    max_position: int
    attention: tuple[AttentionKind, ...]
    """of each layer"""
    ropes: tuple[Rope, ...]
    """of each layer"""
    architecture: str = ""
    eos_ids: tuple[int, ...] = ()
    embedding_scale: float = 1.0
    """by which rows of the embedding are multiplied"""
    final_soft_cap: float | None = None
    """logits x become final_soft_cap * tanh(x / final_soft_cap)"""
    sinks: bool = False
    """whether each head's softmax has a score beside those of the keys"""
    experts: Experts | None = None
    fp8: Fp8 | None = None
    """of which projections the weights are stored in fp8; None: of none"""


def read_common(
    found: PretrainedConfig,
    *,
    windows: Sequence[int | None] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    ropes: Sequence[Rope] | None = None,
) -> ModelConfig:
    """What most families call by the same names.

    Args:
        found: the checkpoint's config.json.
        windows: of attention, for each layer; default: none has one.
        soft_cap: of attention.
        scale: of attention; default: 1 / sqrt(head_dim).
        ropes: of each layer; default: all those of ``rope_parameters``.

    Raises:
        ConfigError: something in it cannot be served; says what was found and what is supported.
    """
    name = "hidden_activation" if hasattr(found, "hidden_activation") else "hidden_act"
    activation = getattr(found, name)
    if activation not in GATED_ACTIVATIONS:
        known = " and ".join(map(repr, GATED_ACTIVATIONS))
        raise ConfigError(f"{name} is {activation!r}; supported are {known}")
    if getattr(found, "use_bidirectional_attention", False):
        raise ConfigError("use_bidirectional_attention is true; supported is false")
    layers, heads = int(found.num_hidden_layers), int(found.num_attention_heads)
    kv_heads = int(found.num_key_value_heads or heads)
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
        )
    windows = windows or [None] * layers
    if any(window is not None and window < 1 for window in windows):
        raise ConfigError(f"sliding_window is {found.sliding_window}; supported are 1 and more")
    ropes = ropes or [read_rope(found)] * layers
    max_position = min(found.max_position_embeddings, *(rope.max_position for rope in ropes))
    if max_position < found.max_position_embeddings:
        log.warning(
            "contexts are of up to %d tokens, not %d: beyond, longrope turns the keys of all "
            "tokens by other angles, also of those that are in the cache",
            max_position,
            found.max_position_embeddings,
        )
    # One that holds all positions is none, and needs no kernels of its own.
    windows = [None if window is None or window >= max_position else window for window in windows]
    size = head_dim(found)
    scale = size**-0.5 if scale is None else scale
    attention_bias = bool(getattr(found, "attention_bias", False))
    return ModelConfig(
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        norm_eps=found.rms_norm_eps,
        activation=activation,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=bool(getattr(found, "mlp_bias", False)),
        tied_embeddings=bool(found.tie_word_embeddings),
        max_position=max_position,
        attention=tuple(AttentionKind(scale, window, soft_cap) for window in windows),
        ropes=tuple(ropes),
    )


def windows_by_type(found: PretrainedConfig) -> list[int | None]:
    """The window of each layer, where ``layer_types`` says which have one.

    Raises:
        ConfigError: a type that is not known.
    """
    known = {"full_attention": None, "sliding_attention": found.sliding_window}
    for kind in found.layer_types:
        if kind not in known:
            raise ConfigError(f"layer_types has {kind!r}; supported are {' and '.join(known)}")
    return [known[kind] for kind in found.layer_types]


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
