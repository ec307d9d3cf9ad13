"""Rotary frequencies, as a checkpoint's config.json asks for them."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fi_runtime.config import ConfigError

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


@dataclass(frozen=True, eq=False)
class Rope:
    """How a layer's queries and keys turn."""

    inverse_frequencies: torch.Tensor
    """(rotary_dim / 2,), float32, radians a position, on the CPU; rotary_dim: what of each head
    turns, from its beginning"""
    scaling: float
    """factor on the cosines and sines"""
    max_position: int
    """positions that the frequencies hold for"""


def read_rope(
    found: PretrainedConfig, layer_type: str | None = None, *, partial: bool = False
) -> Rope:
    """From ``rope_parameters``, as transformers computes them.

    Args:
        found: the checkpoint's config.json.
        layer_type: whose parameters to read, where each type of layer has its own.
        partial: whether the family can turn a part of each head.

    Raises:
        ConfigError: what is asked for cannot be served.
    """
    parameters = found.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    kind, part = (
        parameters.get("rope_type", "default"),
        parameters.get("partial_rotary_factor", 1.0),
    )
    if kind not in ROPE_TYPES:
        raise ConfigError(
            f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    if part != 1.0 and not partial:
        raise ConfigError(f"partial_rotary_factor is {part}; supported is 1 in such a model")
    positions = found.max_position_embeddings
    if kind == "default":
        rotary_dim = int(head_dim(found) * part)
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
        return Rope(1.0 / parameters["rope_theta"] ** exponents, 1.0, positions)
    try:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](
            found, torch.device("cpu"), layer_type=layer_type
        )
        if kind == "longrope":
            # Beyond, each key would have to turn anew, and those of the cache have turned already.
            # (What "dynamic" grows from is max_position_embeddings itself.)
            positions = min(positions, parameters["original_max_position_embeddings"])
    except KeyError as error:
        raise ConfigError(f"rope_parameters of type {kind!r} have no {error}") from error
    return Rope(frequencies.float(), float(scaling), positions)


def head_dim(found: PretrainedConfig) -> int:
    """Elements of an attention head."""
    return int(getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads)
