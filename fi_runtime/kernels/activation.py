"""Gated activations."""

import torch
from torch.nn import functional

from fi_runtime.kernels.library import flashinfer


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, for (tokens, 2 * size) with the gate first: (tokens, size)."""
    if gate_up.is_cuda:
        out: torch.Tensor = flashinfer().activation.silu_and_mul(gate_up)
        return out
    return silu_and_mul_reference(gate_up)


def silu_and_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
