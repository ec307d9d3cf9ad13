"""Mixtures of experts: which experts a token goes to, and what they make of it.

On a GPU all experts are one matrix product, of tokens that are sorted by expert. What it reads is
the weights of those that any token goes to, whose number only the device knows.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from fi_runtime.config import ConfigError
from fi_runtime.dtypes import dtype_name
from fi_runtime.kernels.activation import GatedActivation

CAPABILITIES = (9, 10)
"""major ones of GPUs for which torch has a grouped product that reads its groups on the device"""
MULTIPLE = 8
"""of elements in a row: the product reads 16 bytes at a time"""


def check_sizes(dtype: torch.dtype, hidden: int, size: int) -> None:
    """Refuse experts that there is no grouped product for on any GPU.

    Args:
        dtype: of the weights.
        hidden: elements of a token.
        size: of an expert's intermediate layer.

    Raises:
        ConfigError: says what was found and what is possible.
    """
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"dtype={dtype_name(dtype)}: experts are multiplied in bfloat16 on a GPU; use it, or "
            "KIND_CPU"
        )
    if hidden % MULTIPLE or size % MULTIPLE:
        raise ConfigError(
            f"hidden_size={hidden}, experts' intermediate size={size}: experts' products on a GPU "
            f"are of multiples of {MULTIPLE}; use KIND_CPU"
        )


def check_gpu() -> None:
    """Refuse a GPU that torch has no grouped product for.

    Raises:
        ConfigError: says what was found and what is possible.
    """
    major, minor = torch.cuda.get_device_capability()
    if major not in CAPABILITIES:
        raise ConfigError(
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; mixtures of "
            f"experts need {' or '.join(f'{each}.x' for each in CAPABILITIES)}, or KIND_CPU"
        )


def route(
    logits: torch.Tensor, per_token: int, normalised: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest experts of each token, and their probabilities.

    Args:
        logits: (tokens, experts).
        per_token: how many to choose.
        normalised: whether the probabilities are scaled to a sum of 1.

    Returns:
        Weights, (tokens, per_token), and experts, (tokens, per_token) int64.
    """
    weights, chosen = logits.softmax(dim=-1, dtype=torch.float32).topk(per_token, dim=-1)
    if normalised:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), chosen


@dataclass(frozen=True)
class ExpertMLPs:
    """A gated MLP for each expert."""

    gate_up: torch.Tensor
    """(experts, 2 * size, hidden), the gate first"""
    down: torch.Tensor
    """(experts, hidden, size)"""
    activation: GatedActivation
    """(rows, 2 * size) -> (rows, size)"""
    gate_up_bias: torch.Tensor | None = None
    """(experts, 2 * size)"""
    down_bias: torch.Tensor | None = None
    """(experts, hidden)"""


def experts(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, mlps: ExpertMLPs
) -> torch.Tensor:
    """Sum of weight * down(activation(gate_up(x))) over each token's experts.

    Args:
        x: (tokens, hidden).
        weights: (tokens, per_token).
        chosen: (tokens, per_token), int64; no expert twice for a token.
        mlps: of all experts.

    Returns:
        (tokens, hidden).
    """
    compute = experts_grouped if x.is_cuda else experts_reference
    return compute(x, weights, chosen, mlps)


def experts_grouped(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, mlps: ExpertMLPs
) -> torch.Tensor:
    """``experts`` as two products of all experts at once.

    Of fixed shapes and without a look at any value, so that a CUDA graph can hold it.
    """
    tokens, per_token = chosen.shape
    of_expert, order = chosen.flatten().sort(stable=True)
    each = torch.arange(len(mlps.gate_up), device=x.device)
    ends = torch.searchsorted(of_expert, each, right=True, out_int32=True)
    inner = functional.grouped_mm(x[order // per_token], mlps.gate_up.mT, offs=ends)
    if mlps.gate_up_bias is not None:
        inner += mlps.gate_up_bias[of_expert]
    sorted_parts = functional.grouped_mm(mlps.activation(inner), mlps.down.mT, offs=ends)
    if mlps.down_bias is not None:
        sorted_parts += mlps.down_bias[of_expert]
    parts = torch.empty_like(sorted_parts).index_copy_(0, order, sorted_parts)
    # Each token's weights times its parts: a product, so that only the sum is rounded.
    return torch.bmm(weights[:, None], parts.view(tokens, per_token, -1))[:, 0]


def experts_reference(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, mlps: ExpertMLPs
) -> torch.Tensor:
    """``experts`` in plain torch, one expert after another."""
    out = torch.zeros_like(x)
    for expert in sorted(set(chosen.flatten().tolist())):
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        gate_up_bias, down_bias = (
            None if bias is None else bias[expert] for bias in (mlps.gate_up_bias, mlps.down_bias)
        )
        inner = mlps.activation(functional.linear(x[rows], mlps.gate_up[expert], gate_up_bias))
        part = functional.linear(inner, mlps.down[expert], down_bias)
        part *= weights[rows, places, None]
        out.index_add_(0, rows, part)
    return out
