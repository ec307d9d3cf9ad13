"""Gated activations. FlashInfer's kernels take rows that touch; others are for plain torch."""

from collections.abc import Callable

import torch
from torch.nn import functional

from fi_runtime.kernels.library import flashinfer


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, for (tokens, 2 * size) with the gate first: (tokens, size)."""
    if gate_up.is_cuda and gate_up.is_contiguous():
        out: torch.Tensor = flashinfer().activation.silu_and_mul(gate_up)
        return out
    return silu_and_mul_reference(gate_up)


def silu_and_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up likewise, with gelu's tanh approximation (Hendrycks and Gimpel, 2016)."""
    if gate_up.is_cuda and gate_up.is_contiguous():
        out: torch.Tensor = flashinfer().activation.gelu_tanh_and_mul(gate_up)
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def clamped_silu_and_mul(gate_up: torch.Tensor, slope: float, limit: float) -> torch.Tensor:
    """Gate * sigmoid(slope * gate) * (up + 1), of what is clamped first (OpenAI, 2025).

    Args:
        gate_up: (tokens, 2 * size) with the gate first.
        limit: of the gate from above, and of up from both sides.

    Returns:
        (tokens, size), rounded once.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(slope * gate) * (up + 1.0)).to(gate_up.dtype)


GatedActivation = Callable[[torch.Tensor], torch.Tensor]
"""(tokens, 2 * size) -> (tokens, size)"""

GATED_ACTIVATIONS: dict[str, GatedActivation] = {
    "silu": silu_and_mul,
    "gelu_pytorch_tanh": gelu_tanh_and_mul,
}
"""By the names that config.json calls the activations by."""

GATED_MODULES = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""What FlashInfer calls them."""
