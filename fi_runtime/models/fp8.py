"""Checkpoints whose projections are stored in fp8: what config.json says of them."""

import re
from dataclasses import dataclass
from typing import Any

from fi_runtime.config import ConfigError
from fi_runtime.kernels.fp8 import BLOCK

_SUPPORTED = (
    "supported are quant_method fp8 and compressed-tensors with weights in e4m3 that have a scale "
    f"for each tensor, row or block of {BLOCK} x {BLOCK}, and mxfp4 of gpt-oss"
)


@dataclass(frozen=True)
class Fp8:
    """Of which projections the weights are in fp8, and what their scales are."""

    blocks: bool
    """whether there is a scale for each block of 128 x 128; else one for each tensor or row"""
    scale_name: str
    """in the place of "weight" in a tensor's name"""
    excepted: tuple[str, ...] = ()
    """projections that are stored as usual, or modules with all that is in them; an expression
    where it begins with "re:" """

    def stores(self, name: str) -> bool:
        """Whether the projection of that name is said to be in fp8."""
        return not any(
            re.match(each[3:], name)
            if each.startswith("re:")
            else f"{name}.".startswith(f"{each}.")
            for each in self.excepted
        )


def read_fp8(quantisation: dict[str, Any]) -> Fp8:
    """What a quantization_config says.

    Raises:
        ConfigError: it is of another kind; says what was found and what is supported.
    """
    method = quantisation.get("quant_method")
    if method == "fp8":
        return _read_plain(quantisation)
    if method == "compressed-tensors":
        return _read_compressed(quantisation)
    raise _unsupported("quant_method", method)


def _read_plain(quantisation: dict[str, Any]) -> Fp8:
    """As DeepSeek's and Qwen's have it, with blocks, or as vLLM's, with a scale for a tensor."""
    for name, supported in (("fmt", "e4m3"), ("scale_fmt", "float")):
        if quantisation.get(name) not in (None, supported):
            raise _unsupported(name, quantisation[name])
    block = quantisation.get("weight_block_size")
    if block not in (None, [BLOCK, BLOCK]):
        raise _unsupported("weight_block_size", block)
    excepted = [
        *(quantisation.get("modules_to_not_convert") or []),
        *(quantisation.get("ignored_layers") or []),
    ]
    name = "weight_scale" if block is None else "weight_scale_inv"
    return Fp8(block is not None, name, tuple(excepted))


def _read_compressed(quantisation: dict[str, Any]) -> Fp8:
    if quantisation.get("transform_config"):
        # Rotations of what goes into projections, which weights alone do not tell.
        raise _unsupported("transform_config", quantisation["transform_config"])
    groups = list((quantisation.get("config_groups") or {}).values())
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        raise _unsupported("config_groups", groups)
    weights = groups[0].get("weights") or {}
    kind = (weights.get("num_bits"), weights.get("type"), weights.get("symmetric", True))
    if kind != (8, "float", True):
        raise _unsupported("weights", weights)
    strategy = weights.get("strategy")
    if strategy == "block" and weights.get("block_structure") != [BLOCK, BLOCK]:
        raise _unsupported("block_structure", weights.get("block_structure"))
    if strategy not in ("tensor", "channel", "block"):
        raise _unsupported("strategy", strategy)
    return Fp8(strategy == "block", "weight_scale", tuple(quantisation.get("ignore") or []))


def _unsupported(name: str, value: object) -> ConfigError:
    return ConfigError(f"quantization_config has {name} {value!r}; {_SUPPORTED}")
