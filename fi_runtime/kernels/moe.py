"""Mixtures of experts: which experts a token goes to, and what they make of it."""

import torch
from torch.nn import functional

from fi_runtime.kernels.activation import GatedActivation


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


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: GatedActivation,
) -> torch.Tensor:
    """Sum of weight * down(activation(gate_up(x))) over each token's experts.

    There is no kernel for it on a GPU yet: the loop waits for the device to know who is used.

    Args:
        x: (tokens, hidden).
        weights: (tokens, per_token).
        chosen: (tokens, per_token), int64.
        gate_up: (experts, 2 * size, hidden), the gate first.
        down: (experts, hidden, size).
        activation: (tokens, 2 * size) -> (tokens, size).

    Returns:
        (tokens, hidden).
    """
    out = torch.zeros_like(x)
    for expert in sorted(set(chosen.flatten().tolist())):
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        inner = activation(functional.linear(x[rows], gate_up[expert]))
        part = functional.linear(inner, down[expert]) * weights[rows, places, None]
        out.index_add_(0, rows, part)
    return out
