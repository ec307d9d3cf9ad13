"""Projections of few rows, together with the norm before them and what is done to their result.

They take as long as it takes to read the weights, so that kernels around them are what costs time.
``is_few`` says what they are for: all else is for a matrix product and kernels of their own.
"""

import torch
from torch.nn import functional

from fi_runtime.kernels.activation import silu_and_mul_reference
from fi_runtime.kernels.norm import rms_norm_reference
from fi_runtime.kernels.own import own

MOST_ROWS = 16


def is_few(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``x`` and a projection's weight, (out, in), are what these kernels are for."""
    return (
        x.is_cuda
        and x.dtype == weight.dtype == torch.bfloat16
        and len(x) <= MOST_ROWS
        and weight.shape[0] % 16 == 0
        and weight.shape[1] % 32 == 0
    )


def norm_linear(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The projection of the root-mean-square norm of ``x``: (rows, out).

    Args:
        x: (rows, in), few.
        gain: (in,), the norm's weight.
        eps: the norm's.
        weight: (out, in).
        bias: (out,).
        out: where to put it, if it is to be put somewhere.
    """
    if out is None:
        out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    own().linear(x, weight, gain, bias, out, eps)
    return out


def norm_linear_reference(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return functional.linear(rms_norm_reference(x, gain, eps), weight, bias)


def norm_linear_silu_and_mul(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """silu(gate) * up of ``norm_linear``'s result, gate first: (rows, out / 2)."""
    out = torch.empty((len(x), len(weight) // 2), dtype=x.dtype, device=x.device)
    own().linear_silu_and_mul(x, weight, gain, bias, out, eps)
    return out


def norm_linear_silu_and_mul_reference(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return silu_and_mul_reference(norm_linear_reference(x, gain, eps, weight, bias))


def add_linear(
    total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Add the projection of ``x``, (rows, in), few, to ``total``, (rows, out)."""
    own().linear_add(x, weight, bias, total)


def add_linear_reference(
    total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    total += functional.linear(x, weight, bias)
